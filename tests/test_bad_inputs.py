"Every bad input of bad_inputs/cases.toml is refused in one line that says what is wrong, what was seen, and what mends it."
import importlib
import os
import shlex
import tomllib
from pathlib import Path

import pytest

from kofinetune import cli
from kofinetune.rehearsal import stand_in_base

HERE = Path(__file__).parent/'bad_inputs'
CASES = tomllib.loads((HERE/'cases.toml').read_text(encoding='utf-8'))
spec = importlib.util.spec_from_file_location('bad_inputs_make', HERE/'make.py')
make = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make)


def value(text, here):
    "A value of a case's `call`: '@base' is a loaded model, '@recipe KEY=VALUE ...' a recipe, '@name' a path below `here`."
    from kofinetune.recipe import Recipe
    if not (isinstance(text, str) and text.startswith('@')): return text
    name, *settings = text[1:].split(' ')
    recipe = Recipe(quant='none').replace(**dict(map(cli._setting, settings if name == 'recipe' else [f'base={s}' for s in settings])))
    if name == 'recipe': return recipe
    if name != 'base': return here/text[1:]
    from kofinetune.base import load_base
    return load_base(recipe)[0]


def refused(case, here, monkeypatch):
    "Do what a case says inside the command's own `main`: its exit code."
    monkeypatch.setattr('signal.signal', lambda *_: None)     # Ctrl-C ends these tests, not the command
    if 'run' in case: monkeypatch.setattr('sys.argv', ['kofinetune', *shlex.split(case['run'])])
    else:
        name, *args = case['call']
        module, name = name.split('.')
        function = getattr(importlib.import_module(f'kofinetune.{module}'), name)
        monkeypatch.setattr(cli, '_app', lambda prog_name: function(*(value(a, here) for a in args)))
        monkeypatch.setattr('sys.argv', ['kofinetune'])
    try: cli.main()
    except SystemExit as e: return e.code
    return 0


def files(here): return {str(p.relative_to(here)) for p in here.rglob('*') if p.is_file() and p.name != '.lock'}


@pytest.fixture(scope='session')
def base(): return stand_in_base()


@pytest.mark.parametrize('name', CASES)
def test_is_refused_in_one_line(name, tmp_path, monkeypatch, capsys, request):
    case, here = CASES[name], tmp_path
    for file, text in case.get('files', {}).items(): (here/file).write_text(text, encoding='utf-8', newline='')
    needs_run = case.get('make', '').startswith(('run_', 'adapter', 'merged', 'tokenizer', 'gguf', 'modelfile'))
    base = request.getfixturevalue('base') if 'make' in case else None
    if 'make' in case: getattr(make, case['make'])(here, base, request.getfixturevalue('rehearsal_run') if needs_run else None)
    monkeypatch.chdir(here)
    for key, text in case.get('env', {}).items(): monkeypatch.setenv(key, text.replace('HERE', str(here)))
    before = files(here)
    capsys.readouterr()
    code, said = refused(case, here, monkeypatch), capsys.readouterr()
    line = said.err.strip().splitlines()[-1] if said.err.strip() else ''
    if os.environ.get('SHOW_BAD_INPUTS'): print(f'\n{name}\n  {code} {line}')
    assert (code, line.startswith('kofinetune: ')) == (case.get('code', 2), True), said.err
    for text in case['says']: assert text in line, line
    assert len(line) < 800 and 'Traceback' not in said.err and line.count('kofinetune: ') == 1
    assert not (here/'executed').exists()
    assert files(here) - {f for f in files(here) if f.startswith('runs/laptop/data/') or f in ('runs/laptop/manifest.json', 'runs/laptop/recipe.json')} == before


def test_there_are_at_least_eighty_cases(): assert len(CASES) >= 80
