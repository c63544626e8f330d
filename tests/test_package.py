"What `import kofinetune` gives, and what it costs."
import importlib
import inspect
import subprocess
import sys

import pytest

import kofinetune

NAMES = ['Recipe', 'prepare', 'finetune', 'merge_adapter', 'export_ollama', 'evaluate', 'load_tuned', 'generate', 'format_prompt', 'read_rows',
         'read_run', 'compare_runs']


def test_the_package_has_the_dozen_names_that_a_script_needs():
    assert sorted(kofinetune.__all__) == sorted(NAMES) and set(NAMES) <= set(dir(kofinetune))
    for name in NAMES:
        found = getattr(kofinetune, name)
        assert found is getattr(importlib.import_module(inspect.getmodule(found).__name__), name)
    with pytest.raises(AttributeError, match='finetuned'): kofinetune.finetuned


def test_importing_the_package_is_quick_and_loads_no_torch():
    code = ('import sys, time; start = time.perf_counter(); import kofinetune; print(time.perf_counter() - start)\n'
            'heavy = {"torch", "transformers", "datasets", "pandas", "numpy"} & set(sys.modules); assert not heavy, heavy')
    seconds = min(float(subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout) for _ in range(3))
    assert seconds < .2


def test_a_script_reads_naturally(tmp_path):
    from kofinetune import Recipe, format_prompt, prepare, read_rows
    counts = prepare(Recipe(rows=40, valid_rows=4), tmp_path/'run')
    assert counts['train'] + counts['valid'] == counts['kept']
    row = read_rows(tmp_path/'run'/'data'/'valid.jsonl')[0]
    assert format_prompt(row).endswith('### Response:\n') and row['instruction'] in format_prompt(row)
