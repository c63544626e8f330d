"Fixtures and marks. A test that is skipped says why."
import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from filelock import FileLock

ROOT = Path(__file__).resolve().parent.parent


if 'PYTEST_XDIST_WORKER' in os.environ: os.environ['OMP_NUM_THREADS'] = '1'   # torch threads of several processes wait for each other


def pytest_configure(config):
    config.addinivalue_line('markers', 'koalpaca: needs the 8,000 real KoAlpaca rows beside the checkout, or $KOFINETUNE_KOALPACA')
    config.addinivalue_line('markers', 'gemma: needs real Gemma 3 270M, from the wheels of the extra gemma')
    config.addinivalue_line('markers', 'ollama: needs an Ollama server, or the ollama program')


# The files that take longest, longest first: a worker that begins one of them last would work on it alone.
LONGEST = ('test_gemma.py', 'test_lab.py', 'test_site.py', 'test_notebooks.py', 'test_ollama.py', 'test_faults.py', 'test_merge.py',
           'test_resume.py', 'test_distributed.py', 'test_pipeline.py')


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture(scope='session')
def koalpaca():
    "The file of 8,000 real rows; never committed."
    path = Path(os.environ.get('KOFINETUNE_KOALPACA') or ROOT.parent/'shared'/'koalpaca'/'ko_alpaca_data.head8000.json')
    if not path.is_file(): pytest.skip(f'no KoAlpaca rows at {path}; name the file with $KOFINETUNE_KOALPACA')
    return path


@pytest.fixture(scope='session')
def rehearsal_run():
    "The rehearsal's run folder, which the notebooks and `make run` share; made where it is missing."
    from kofinetune.recipe import Recipe
    from kofinetune.data import prepare
    from kofinetune.eval import evaluate
    from kofinetune.export import export_ollama
    from kofinetune.merge import merge_adapter
    from kofinetune.train import finetune
    run = ROOT/'runs'/'rehearsal'
    run.parent.mkdir(exist_ok=True)
    with FileLock(run.parent/'.tests.lock'):      # several pytest processes want it (pytest-xdist)
        for do in (prepare, finetune, merge_adapter, export_ollama, evaluate): do(Recipe.named('rehearsal'), run)
    return run


@pytest.fixture(scope='session')
def site(tmp_path_factory):
    "The folder of the site that `make docs` builds, once for all pytest processes."
    if not importlib.util.find_spec('sphinx'):
        reason = "no sphinx here; install it with: pip install -e '.[docs]'"
        pytest.fail(f'{reason} (CI=true, so this is no skip)') if os.environ.get('CI') == 'true' else pytest.skip(reason)
    shared = tmp_path_factory.getbasetemp()
    if 'PYTEST_XDIST_WORKER' in os.environ: shared = shared.parent
    with FileLock(shared/'site.lock'):
        if not (shared/'site.built').exists():
            started = time.monotonic()
            made = subprocess.run(['make', 'docs', f'VENV={sys.prefix}', f'-o{sys.prefix}/.ready'], cwd=ROOT, capture_output=True, text=True)
            assert made.returncode == 0, (made.stdout + made.stderr)[-4000:]
            print(f'built in {time.monotonic() - started:.0f} s')
            (shared/'site.built').touch()
    return ROOT/'_site'


def closure(wanted):
    "The distributions that `wanted` needs here, each with all that it needs."
    from importlib.metadata import distribution
    from packaging.requirements import Requirement
    found, todo = {}, [Requirement(text) for text in wanted]
    while todo:
        one = todo.pop()
        if one.name in found and not one.extras: continue
        found[one.name] = made = distribution(one.name)
        for need in map(Requirement, made.requires or ()):
            if not need.marker or any(need.marker.evaluate({'extra': extra}) for extra in ('', *one.extras)): todo.append(need)
    return found.values()


def bare_environment(folder, more=()):
    """Make an environment with what `requirements` in settings.ini needs, and nothing else: links to what is installed here.

    `more` names other packages that shall be there."""
    import venv
    from configparser import ConfigParser
    ini = ConfigParser(delimiters=['='])
    ini.read(ROOT/'settings.ini', encoding='utf-8')
    venv.create(folder, symlinks=True)
    place = next(folder.glob('lib/python*/site-packages'))
    for one in closure([*ini['DEFAULT']['requirements'].split(), *more]):
        for top in {file.parts[0] for file in one.files} - {'..', '__pycache__'}:
            if not (place/top).exists(): (place/top).symlink_to(one.locate_file(top))
    return folder


@pytest.fixture(scope='session')
def wheel(tmp_path_factory):
    "The wheel of this checkout."
    here = tmp_path_factory.mktemp('wheel')
    for name in ('settings.ini', 'setup.py', 'pyproject.toml', 'README.md', 'LICENSE', 'NOTICE', 'CHANGELOG.md', 'MANIFEST.in'): shutil.copy(ROOT/name, here)
    shutil.copytree(ROOT/'kofinetune', here/'kofinetune', ignore=shutil.ignore_patterns('__pycache__'))
    subprocess.run([sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps', '--no-build-isolation', '-w', here/'dist', here], check=True)
    return next((here/'dist').glob('*.whl'))


def vouch(run, name):
    "Record a stage's files as they are now, as if the stage had written them so: what is tested lies behind the check of the hashes."
    from kofinetune.runs import file_hashes, read_manifest, write_json
    manifest = read_manifest(run)
    manifest['stages'][name]['files'] = file_hashes(Path(run)/name)
    write_json(manifest, Path(run)/'manifest.json')


@pytest.fixture(scope='session')
def ollama_server(tmp_path_factory):
    "The host of a real Ollama server: the one that OLLAMA_HOST names, or one of our own."
    from kofinetune.server import server_version
    if os.environ.get('OLLAMA_HOST') and server_version(): yield os.environ['OLLAMA_HOST']; return
    with own_ollama(tmp_path_factory.mktemp('ollama')) as host: yield host


@contextmanager
def own_ollama(folder):
    "Serve Ollama with its own models folder while the block runs; OLLAMA_HOST names it."
    from kofinetune.server import server_version
    program = ollama_program()
    if not program:
        reason = 'no Ollama server at $OLLAMA_HOST and no ollama program on PATH or in Go\'s bin folder; .ci/ollama builds one'
        if os.environ.get('CI') == 'true' and shutil.which('go'): pytest.fail(reason + ' (CI=true and go is there, so this is no skip)')
        pytest.skip(reason)
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); host = f'127.0.0.1:{s.getsockname()[1]}'
    env = os.environ | dict(OLLAMA_HOST=host, OLLAMA_MODELS=str(folder/'models'), HOME=str(folder), OLLAMA_NUM_PARALLEL='1')
    with (folder/'serve.log').open('w') as log, pytest.MonkeyPatch.context() as patch:
        process = subprocess.Popen([program, 'serve'], env=env, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 60
            while server_version(host) is None:
                if process.poll() is not None or time.monotonic() > deadline:
                    pytest.fail(f'{program} serve does not answer:\n' + (folder/'serve.log').read_text()[-2000:])
                time.sleep(.2)
            patch.setenv('OLLAMA_HOST', host)
            yield host
        finally:
            process.terminate()
            try: process.wait(20)
            except subprocess.TimeoutExpired: process.kill()


def ollama_program():
    "Where the ollama program is: on PATH, in $GOBIN, or where `go install` puts it."
    folders = [os.environ.get('GOBIN')]
    if shutil.which('go'):
        folders += [Path(p)/'bin' for p in subprocess.run(['go', 'env', 'GOPATH'], capture_output=True, text=True).stdout.strip().split(os.pathsep)]
    folders.append(Path.home()/'go'/'bin')
    return shutil.which('ollama') or next((str(Path(f)/'ollama') for f in folders if f and (Path(f)/'ollama').is_file()), None)
