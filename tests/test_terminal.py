"What a person sees of a run: one bar a stage on a terminal, and everything else in log.txt."
import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest

from kofinetune.runs import progress, quiet, read_manifest

SMALL = dict(rows=44, valid_rows=6, epochs=1.0, max_length=64, grad_accum=2, save_steps=2, max_new_tokens=8, gguf='q8_0')
CHATTER = ('Loading weights', 'Map:', 'Packing', "{'loss'", 'Warning', 'examples/s', '\x1b[31m')


def on_a_terminal(folder, *args):
    "Run the command on a terminal of its own; what the terminal got."
    here, there = pty.openpty()
    fcntl.ioctl(there, termios.TIOCSWINSZ, struct.pack('HHHH', 40, 150, 0, 0))
    env = os.environ | dict(OLLAMA_HOST='127.0.0.1:9', OMP_NUM_THREADS='1', COLUMNS='150')
    env.pop('TQDM_DISABLE', None)
    process = subprocess.Popen([sys.executable, '-m', 'kofinetune.cli', *args], cwd=folder, stdin=there, stdout=there, stderr=there, env=env)
    os.close(there)
    seen = b''
    while True:
        try: part = os.read(here, 65536)
        except OSError: break       # the other side is closed
        if not part: break
        seen += part
    os.close(here)
    assert process.wait() == 0, seen.decode()[-3000:]
    return seen.decode()


@pytest.fixture(scope='module')
def seen(tmp_path_factory):
    folder = tmp_path_factory.mktemp('terminal')
    return folder, on_a_terminal(folder, 'run', '--recipe', 'rehearsal', '--run', 'r', *(f'--set={k}={v}' for k, v in SMALL.items()))


def test_a_run_shows_a_bar_for_each_stage_with_loss_and_time_left(seen):
    text = seen[1]
    bars = {line.split(':')[0] for line in re.split(r'[\r\n]', text) if re.search(r'\d+%\|', line)}
    assert re.search(r'steps: +\d+%\|.*\[\d\d:\d\d<\d\d:\d\d.*loss [\d.]+', text)
    assert {'rows read, audited, split', 'comparing answer tokens', 'llama.cpp answers', 'base scores', 'tuned answers'} <= bars, bars


def test_no_library_speaks_on_the_terminal(seen):
    folder, text = seen
    assert [word for word in CHATTER if word in text] == []
    lines = [line.rsplit('\r', 1)[-1] for line in text.replace('\r\n', '\n').split('\n')]      # what stays
    assert [line for line in lines if line.startswith('[')] == [f'[{n}/5] {name}' for n, name in enumerate(('data', 'train', 'merge', 'export', 'eval'), 1)]
    assert [line for line in lines if '%|' in line] == []
    log = (folder/'r'/'log.txt').read_text(encoding='utf-8')
    assert 'adapter: step' in log and 'loss' in log


def test_estimate_leaves_no_run_folder(seen, tmp_path):
    text = on_a_terminal(tmp_path, 'estimate', '--recipe', 'rehearsal', '--run', 'none', *(f'--set={k}={v}' for k, v in SMALL.items()))
    assert list(tmp_path.iterdir()) == [] and re.search(r'steps: +\d+%', text)
    lines = [line.rsplit('\r', 1)[-1] for line in text.replace('\r\n', '\n').split('\n')]
    said = dict(line.split(None, 1) for line in lines if re.fullmatch(r' +\w+  \S+', line))
    done = read_manifest(seen[0]/'r')['stages']['adapter']['result']
    assert int(said['steps']) == done['steps'] and int(said['rows']) == done['rows'] and float(said['seconds']) > 0


def test_what_libraries_log_and_warn_of_is_in_the_log(tmp_path, capfd):
    import logging
    import warnings
    (tmp_path/'manifest.json').write_text('{}', encoding='utf-8')
    with quiet(tmp_path, 'adapter'):
        logging.getLogger('transformers.trainer').warning('a thing of transformers')
        warnings.warn('a thing of Python', UserWarning)
    log = (tmp_path/'log.txt').read_text(encoding='utf-8')
    assert 'transformers.trainer: a thing of transformers' in log and 'UserWarning: a thing of Python' in log
    assert capfd.readouterr() == ('', '')


def test_without_a_terminal_there_is_no_bar(capfd):
    assert [i for i in progress(range(3), 'counting')] == [0, 1, 2]
    assert capfd.readouterr() == ('', '')
