"The notebooks with cells for Ollama, run as `make notebooks` runs them, on a copy; tests/browser/test_lab.py runs every notebook without Ollama."
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT, own_ollama

WITH_OLLAMA = [path.stem for path in sorted((ROOT/'nbs').glob('*.ipynb')) if '"#| ollama' in path.read_text(encoding='utf-8')]


@pytest.fixture(scope='module')
def server(tmp_path_factory):
    "A server for these notebooks alone: their models have the names that other tests use."
    with own_ollama(tmp_path_factory.mktemp('ollama')) as host: yield host


@pytest.mark.ollama
@pytest.mark.parametrize('name', WITH_OLLAMA)
def test_the_cells_for_ollama_run(name, rehearsal_run, server, tmp_path):
    for folder in ('nbs', 'benchmarks/results', 'docs'): shutil.copytree(ROOT/folder, tmp_path/folder, ignore=shutil.ignore_patterns('locale'))
    shutil.copyfile(ROOT/'settings.ini', tmp_path/'settings.ini')
    shutil.copytree(rehearsal_run, tmp_path/'runs'/'rehearsal', ignore=shutil.ignore_patterns('.lock'))
    command = [Path(sys.executable).parent/'nbdev_test', '--path', tmp_path/'nbs'/f'{name}.ipynb', '--n_workers', '0', '--flags', 'ollama']
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


def test_there_are_such_notebooks(): assert '03_ollama_export' in WITH_OLLAMA
