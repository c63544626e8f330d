"What `import kofinetune` gives and costs, and which module may import which."
import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

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


# Who may import whom. What is reachable over any number of steps may be imported.
ARROWS = dict(
    messages='', prompt='messages', tables='', formats='prompt tables', recipe='tables', korean='', stats='', runs='recipe', gguffile='runs', server='runs', audit='korean prompt',
    data='formats runs audit', scoring='chat', chat='base', dialogs='korean',
    rehearsal='data', base='gguffile rehearsal', checkpoints='runs', parallel='base', speed='scoring', train='checkpoints parallel scoring speed', merge='train',
    proof='train server', export='proof', talk='proof', report='stats runs', eval='export report', bench='eval', hub='export report', cli='hub bench merge talk')


def reachable(module):
    found, todo = set(), ARROWS[module].split()
    while todo:
        if (one := todo.pop()) not in found: found.add(one); todo += ARROWS[one].split()
    return found


def imported(path):
    "(module, name, inside a function) for everything that a module imports from this package."
    tree = ast.parse(path.read_text(encoding='utf-8'))
    top = set(map(id, tree.body))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or '').startswith('kofinetune')):
            for name in node.names: yield (node.module or '').removeprefix('kofinetune').lstrip('.') or name.name, name.name, id(node) not in top
        elif isinstance(node, ast.Import): assert not any(name.name.startswith('kofinetune') for name in node.names), path


MODULES = {path.stem: path for path in sorted(Path(kofinetune.__file__).parent.glob('*.py')) if path.stem not in ('__init__', '_modidx')}


def test_the_arrows_name_every_module(): assert set(ARROWS) == set(MODULES)


@pytest.mark.parametrize('module', sorted(MODULES))
def test_imports_go_along_the_arrows_and_take_no_private_name(module):
    for other, name, inside in imported(MODULES[module]):
        assert other in reachable(module), f'{module} imports {name} of {other}'
        assert not name.startswith('_'), f'{module} imports the private {name} of {other}'
        assert module != 'cli' or inside or other in ('recipe', 'runs'), f'cli imports {other} before a command asks for it'


def test_the_table_of_stages_names_functions_that_are_there():
    from kofinetune.runs import STAGES
    for made in STAGES.values():
        module, function = made.function.split(':')
        assert callable(getattr(importlib.import_module(module), function))
