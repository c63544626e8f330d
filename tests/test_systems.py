"Windows, macOS and other GPUs: as far as a Linux machine without them can tell."
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conftest import ROOT
from kofinetune import base, merge
from kofinetune.recipe import Recipe
from kofinetune.runs import read_manifest
from kofinetune.rehearsal import stand_in_base

FEW = ['--recipe', 'rehearsal', '--set', 'rows=60', '--set', 'valid_rows=12', '--set', 'epochs=1', '--set', 'gguf=q8_0', '--set', 'quant=none', '--set', 'answer_rows=2', '--run']


def elsewhere(home, *args):
    "Run the command as if on Windows, at home in a folder with Korean letters and a space, on a Korean console."
    env = {k: v for k, v in os.environ.items() if k not in ('PYTHONUTF8', 'KOFINETUNE_CACHE', 'OLLAMA_HOST')} | dict(
        HOME=str(home), USERPROFILE=str(home), OTHER_SYSTEM_HERE=str(home), PYTHONIOENCODING='cp949', PYTHONWARNDEFAULTENCODING='1', HF_HUB_OFFLINE='1',
        OLLAMA_HOST='127.0.0.1:9', PYTHONPATH=str(ROOT))
    return subprocess.run([sys.executable, ROOT/'tests'/'other_system.py', *map(str, args)], cwd=home, env=env, capture_output=True)


@pytest.fixture
def home(tmp_path):
    "A home with the stand-in in its cache, and a letter in its name that a Korean console lacks."
    path = tmp_path/'사용자 김é'      # é is not in cp949
    shutil.copytree(stand_in_base(), path/'.cache'/'kofinetune'/stand_in_base().name)
    return path


def test_every_module_can_be_imported_without_what_unix_alone_has(home):
    done = elsewhere(home, '--import-all')
    assert done.returncode == 0, done.stderr.decode('cp949')


def test_every_stage_runs_without_what_unix_alone_has(home):
    done = elsewhere(home, 'run', *FEW, home/'실행 1')
    said, wrong = done.stdout.decode('cp949'), done.stderr.decode('cp949')
    assert done.returncode == 0, wrong + said
    assert 'Traceback' not in wrong
    run, stages = home/'실행 1', read_manifest(home/'실행 1')['stages']
    assert list(stages) == ['data', 'adapter', 'merged', 'ollama', 'eval']
    assert 1e8 < stages['adapter']['result']['peak_memory_bytes'] < 1e11        # bytes
    text = [path for path in run.rglob('*') if path.suffix in ('.json', '.jsonl', '.md', '.txt') or path.name == 'Modelfile']
    assert len(text) > 12 and not [path for path in text if b'\r' in path.read_bytes()]
    assert not [path.name for path in run.rglob('*') if set(path.name) & set('<>:"|?*\\') or path.name[-1] in ' .']
    assert [path.name for path in (home/'.cache'/'kofinetune').iterdir()] == [stand_in_base().name]


@pytest.mark.parametrize('name', ['con', 'NUL', 'aux.txt', 'com1', 'Lpt9.x', 'my run.', 'my run ', 'prn .csv'])
def test_names_that_windows_keeps_are_refused(name):
    with pytest.raises(ValueError, match='it must not be a path'): Recipe(name=name)
    for good in ('console', 'nullable', 'com', 'my.con', '실행 1', 'aux2'): Recipe(name=good)


# --- other GPUs. None is here, so torch is told that there is one, and the choice is looked at.

def test_an_apple_gpu_is_used_in_bfloat16_and_without_nf4(monkeypatch, capsys):
    base._auto_dtype.cache_clear()
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    assert base.pick_device(Recipe()) == (torch.device('mps'), torch.bfloat16)
    assert base.pick_device(Recipe(dtype='fp32')) == (torch.device('mps'), torch.float32)
    asked = {}
    def load(auto_class, recipe, path, **options):
        asked.update(options)
        raise RuntimeError('there is no such GPU')
    monkeypatch.setattr(base, '_text_config', lambda *_: None)
    monkeypatch.setattr(base, '_from_hub', load)
    monkeypatch.setattr(base, 'load_tokenizer', lambda recipe: None)
    with pytest.raises(RuntimeError, match='no such GPU'): base.load_base(Recipe(quant='nf4'))
    assert asked['device_map'] == {'': torch.device('mps')} and 'quantization_config' not in asked
    assert capsys.readouterr().out == 'base: NF4 is off on an Apple GPU, where it was not tested\n'
    base._auto_dtype.cache_clear()


def test_an_adapter_is_merged_one_way_on_an_apple_gpu(monkeypatch, rehearsal_run, tmp_path):
    "The other way needs NF4, which is off there: in training too. The matrices are multiplied by the CPU here."
    run = tmp_path/'run'
    for part in ('data', 'adapter'): shutil.copytree(rehearsal_run/part, run/part)
    for part in ('recipe.json', 'manifest.json'): shutil.copyfile(rehearsal_run/part, run/part)
    monkeypatch.setattr(merge, 'pick_device', lambda recipe: (torch.device('mps'), torch.bfloat16))
    assert Recipe.load(run/'recipe.json').quant == 'nf4'
    for wanted in ('auto', 'nf4'):
        made = merge.merge_adapter(Recipe.load(run/'recipe.json').replace(merge=wanted), run, force=True)
        assert made['merge'] == '16-bit' and list(made['ways']) == ['16-bit'] and made['why'] == 'there is no other way'


@pytest.mark.parametrize('has_bf16, dtype, said', [(True, torch.bfloat16, ''), (False, torch.float32, 'base: Tesla T4 has no bfloat16; float32 is used\n')])
def test_a_gpu_without_bfloat16_computes_in_float32_and_says_so(monkeypatch, capsys, has_bf16, dtype, said):
    base._auto_dtype.cache_clear()
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation=True: has_bf16 or including_emulation)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda: 'Tesla T4')
    for _ in range(2): assert base.pick_device(Recipe()) == (torch.device('cuda:0'), dtype)
    assert capsys.readouterr().out == said      # once
    base._auto_dtype.cache_clear()


# --- the cache

def cache(tmp_path, *args):
    env = os.environ | dict(KOFINETUNE_CACHE=str(tmp_path/'cache'), COLUMNS='120')
    return subprocess.run([sys.executable, '-m', 'kofinetune.cli', 'show', *args], cwd=tmp_path, env=env, capture_output=True, text=True)


def test_the_cache_is_listed_and_removed_and_nothing_beside_it(tmp_path):
    ours = ['gguf-0123456789abcdef-2/model.safetensors', 'rehearsal-base-0123456789ab/config.json', '.gguf-0123456789abcdee-2-made/half',
            'sources/0123456789ab-rows.json', 'gguf-0123456789abcdef-2.lock']
    theirs = ['gguf-mine/model', 'rehearsal-base-0123456789abc/x', 'notes.txt', 'sources/rows.json', 'kept/model']
    for name in ours + theirs:
        (tmp_path/'cache'/name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path/'cache'/name).write_bytes(b'x' * 1_234_000)
    (tmp_path/'cache'/'rehearsal-base-ba9876543210').symlink_to(tmp_path/'cache'/'kept')     # a link goes, not what it leads to
    listed = cache(tmp_path, '--cache')
    for name in ours[:4]: assert listed.returncode == 0 and name.split('/x')[0].rsplit('/', 'sources' not in name)[0] in listed.stdout, listed.stderr
    assert '1.234' in listed.stdout and 'mine' not in listed.stdout and 'notes' not in listed.stdout
    removed = cache(tmp_path, '--cache', '--clear')
    assert removed.returncode == 0 and 'cache, removed' in ' '.join(removed.stdout.split()) and 'rehearsal-base-0123456789ab' in removed.stdout   # a long path wraps
    left = {path.relative_to(tmp_path/'cache').as_posix() for path in (tmp_path/'cache').rglob('*') if path.is_file()}
    assert left == set(theirs)


@pytest.mark.parametrize('args', [['--clear'], [], ['run', '--cache'], ['run', '--clear'], ['run', '--cache', '--clear']])
def test_clear_goes_with_cache_alone(tmp_path, args):
    (tmp_path/'run').mkdir()
    seen = cache(tmp_path, *args)
    assert seen.returncode == 2 and seen.stderr == 'kofinetune: show takes a RUN or --cache, and --clear only with --cache: kofinetune show --cache --clear\n'


def test_what_another_process_makes_is_not_removed(tmp_path):
    from filelock import FileLock
    made = tmp_path/'cache'/'.rehearsal-base-0123456789ab-made'
    made.mkdir(parents=True)
    with FileLock(tmp_path/'cache'/'rehearsal-base-0123456789ab.lock'):
        seen = cache(tmp_path, '--cache', '--clear')
    assert seen.returncode == 1 and 'is being made by another process' in seen.stderr and made.is_dir()
