"What `import kofinetune` gives and costs, which module may import which, and the wheel where nothing else is."
import ast
import importlib
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import kofinetune
from conftest import ROOT, bare_environment
from kofinetune.rehearsal import stand_in_base

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
    messages='', prompt='messages', tables='', shared='', formats='prompt tables', recipe='tables', korean='', stats='', runs='recipe shared', gguffile='runs', server='runs',
    audit='korean prompt', data='formats runs audit', scoring='chat', chat='base', dialogs='korean',
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


# --- the wheel, in an environment without sources, make and packages for developers

def python(env, *args, cwd, **more):
    "Run the environment's Python as a new user would: no path to the sources, and a home of his own."
    own = dict(PATH=f'{env}/bin:/usr/bin:/bin', HOME=str(cwd), HF_HUB_OFFLINE='1', OLLAMA_HOST='127.0.0.1:9', OMP_NUM_THREADS='1', PIP_NO_INDEX='1',
               KOFINETUNE_CACHE=str(stand_in_base().parent))
    done = subprocess.run([f'{env}/bin/python', *map(str, args)], cwd=cwd, env=own | more, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope='module')
def bare(tmp_path_factory, wheel):
    "The wheel installed in an environment with what it needs and nothing else."
    env = bare_environment(tmp_path_factory.mktemp('bare')/'env')
    subprocess.run([sys.executable, '-m', 'pip', '--python', env/'bin'/'python', 'install', '-q', '--no-deps', '--no-index', wheel], check=True)
    return env


def test_the_wheel_needs_neither_the_sources_nor_packages_for_developers(bare, tmp_path):
    where = python(bare, '-c', 'import kofinetune; print(kofinetune.__file__)', cwd=tmp_path)
    assert where.startswith(str(bare))
    for name in ('nbdev', 'fastcore', 'pytest', 'IPython', 'ruff'):
        assert python(bare, '-c', f'import importlib.util; print(importlib.util.find_spec({name!r}))', cwd=tmp_path) == 'None\n', name
    python(bare, '-c', ''.join(f'import kofinetune.{module}\n' for module in MODULES), cwd=tmp_path)
    few = 'rows=120 valid_rows=20 epochs=1 gguf=q8_0 answer_rows=5'.split()
    said = python(bare, bare/'bin'/'kofinetune', 'run', '--recipe', 'rehearsal', *(word for one in few for word in ('--set', one)), cwd=tmp_path)
    assert 'exact match' in said and 'Register: ollama create kofinetune-rehearsal' in said


@pytest.mark.skipif(not os.environ.get('KOFINETUNE_LONG'), reason='two and ten minutes; the long form runs with KOFINETUNE_LONG=1')
@pytest.mark.parametrize('recipe', ['rehearsal', 'laptop'])
def test_the_wheel_trains_whole_recipes(tmp_path, wheel, recipe):
    from configparser import ConfigParser
    ini = ConfigParser(delimiters=['='])
    ini.read(ROOT/'settings.ini', encoding='utf-8')
    env = bare_environment(tmp_path/'env', ini['DEFAULT']['gemma_requirements'].split())
    subprocess.run([sys.executable, '-m', 'pip', '--python', env/'bin'/'python', 'install', '-q', '--no-deps', '--no-index', wheel], check=True)
    python(env, env/'bin'/'kofinetune', 'run', '--recipe', recipe, cwd=tmp_path, OMP_NUM_THREADS=str(os.cpu_count()))
    report = json.loads((tmp_path/'runs'/recipe/'eval'/'report.json').read_text(encoding='utf-8'))
    assert report['models']['tuned']['exact_match'] > .7


# --- Google Colab

LESSONS = sorted((ROOT/'nbs').glob('0*.ipynb'))


def first_cell(path):
    "A lesson's first code cell, without directives."
    cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    code = next(''.join(cell['source']) for cell in cells if cell['cell_type'] == 'code')
    return '\n'.join(line for line in code.splitlines() if not line.startswith('#|'))


def test_every_lesson_begins_with_the_same_installation_on_colab():
    assert len(LESSONS) == 5 and len({first_cell(path) for path in LESSONS}) == 1
    plain = first_cell(LESSONS[0]).replace('    !', '    raise SystemExit  # ').replace('    %', '    #')
    subprocess.run([sys.executable, '-c', plain], check=True)   # elsewhere: nothing


def test_what_the_lessons_do_on_colab_works_in_an_empty_environment(tmp_path):
    "Their own lines, with git's insteadOf in the place of the address, in an environment that has what pip would fetch."
    env = bare_environment(tmp_path/'env', ['pip', 'setuptools', 'wheel', 'fastcore'])
    git = dict(GIT_CONFIG_COUNT='1', GIT_CONFIG_KEY_0=f'url.file://{ROOT}.insteadOf', GIT_CONFIG_VALUE_0='https://github.com/kofinetune/kofinetune')
    place, ran = tmp_path, []
    for line in first_cell(LESSONS[0]).splitlines():
        line = line.strip()
        if line.startswith('!'): subprocess.run(line[1:].split(), cwd=place, env=os.environ | git, check=True)
        elif line.startswith('%pip '): python(env, '-m', *line[1:].split(), '--no-build-isolation', cwd=place)
        elif line.startswith('%cd '): place = place/line[4:]
        else: continue
        ran.append(line.split()[0])
    assert ran == ['!git', '%pip', '%cd'] and (place/LESSONS[0].name).is_file()
    code = 'import fastcore.test, kofinetune as k; print(k.__file__); k.prepare(k.Recipe(rows=50, valid_rows=5), "run")'
    assert python(env, '-c', code, cwd=place).startswith(f'{env}/lib')
