"Several processes train one model: real launchers, real sockets, on CPUs (gloo)."
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest

from kofinetune.recipe import Recipe
from kofinetune.runs import read_jsonl, read_manifest
from kofinetune.data import prepare
from kofinetune.train import finetune

SMALL = Recipe.named('rehearsal').replace(rows=320, valid_rows=20, epochs=1.0, grad_accum=2)
WHOLE = SMALL.replace(adapter='none', quant='none', learning_rate=1e-3)
TORCHRUN = (sys.executable, '-m', 'torch.distributed.run', '--nproc-per-node')
TRAIN = ('-m', 'kofinetune.cli', '--', 'train', '--run')
ENV = {k: v for k, v in os.environ.items() if k not in ('RANK', 'WORLD_SIZE')} | dict(
    OMP_NUM_THREADS='1', PYTHONUNBUFFERED='1', CUDA_VISIBLE_DEVICES='')


def losses(run): return [(e['step'], e['loss']) for e in read_jsonl(run/'adapter'/'log.jsonl') if 'loss' in e]


def assert_same_losses(one, other, within=1e-3):
    assert [step for step, _ in one] == [step for step, _ in other] and len(one) > 10
    assert max(abs(a - b) for (_, a), (_, b) in zip(one, other)) < within


def launch(*command, timeout=300, env=()):
    return subprocess.run(command, capture_output=True, text=True, encoding='utf-8', timeout=timeout, env=ENV | dict(env))


def free_port():
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); return str(s.getsockname()[1])


@pytest.fixture(scope='module')
def trained_alone(tmp_path_factory):
    "The losses of one process, by recipe; and data stages to start from."
    def made(recipe):
        run = tmp_path_factory.mktemp('alone')
        prepare(recipe, run)
        shutil.copytree(run, run.parent/f'{run.name}-data', ignore=shutil.ignore_patterns('.lock'))
        finetune(recipe, run)
        return run, run.parent/f'{run.name}-data'
    return dict(small=made(SMALL), whole=made(WHOLE))


def test_a_killed_worker_ends_the_run_and_the_same_command_finishes_it(trained_alone, tmp_path):
    alone, data = trained_alone['small']
    run = shutil.copytree(data, tmp_path/'run')
    command = (*TORCHRUN, '2', '--standalone', *TRAIN, str(run))
    with (tmp_path/'log').open('w') as log, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=ENV) as launcher:
        while 'loss' not in ((run/'log.txt').read_text(encoding='utf-8') if (run/'log.txt').is_file() else ''):
            assert launcher.poll() is None, 'it ended before the first loss'
            time.sleep(.05)
        second = next(p for p in psutil.Process(launcher.pid).children() if p.environ().get('RANK') == '1')
        second.send_signal(signal.SIGKILL)
        start = time.monotonic()
        rest = launcher.communicate(timeout=120)[0]
        assert launcher.returncode != 0 and time.monotonic() - start < 90 and 'train: done' not in rest
    assert not (run/'adapter').exists() and 'adapter' not in read_manifest(run)['stages']
    again = launch(*command)
    assert again.returncode == 0, again.stderr[-3000:]
    assert again.stdout.count('train: done') == 1
    assert {p.name for p in run.iterdir()} == {'data', 'adapter', 'recipe.json', 'manifest.json', '.lock', 'log.txt'}
    assert {p.name for p in (run/'adapter').iterdir()} == {p.name for p in (alone/'adapter').iterdir()}
    assert_same_losses(losses(alone), losses(run))
    metrics = json.loads((run/'adapter'/'metrics.json').read_text(encoding='utf-8'))
    assert metrics['processes'] == 2 and metrics['num_tokens'] == read_manifest(alone)['stages']['adapter']['result']['num_tokens']


SLOW = """import os, sys, time
from transformers import Trainer
load = Trainer._load_best_model
def load_late(self):
    if os.environ['RANK'] == '1':
        time.sleep(4)
        print('the best checkpoint is there:', os.path.isdir(self.state.best_model_checkpoint), flush=True)
    load(self)
Trainer._load_best_model = load_late
from kofinetune.cli import main
main()
"""


def test_the_first_process_waits_for_those_that_still_read_its_checkpoints(trained_alone, tmp_path):
    "The second loads the best checkpoint late; the first removes the checkpoints when it has finished."
    run = shutil.copytree(trained_alone['small'][1], tmp_path/'run')
    (tmp_path/'slow.py').write_text(SLOW, encoding='utf-8')
    done = launch(*TORCHRUN, '2', '--standalone', '--', str(tmp_path/'slow.py'), 'train', '--run', str(run))
    assert done.returncode == 0, done.stderr[-3000:]
    assert 'the best checkpoint is there: True' in done.stdout
    assert done.stdout.count('train: done') == 1 and not (run/'checkpoints').exists()


def nodes(*runs):
    "Start a launcher of one process for each run folder, as on machines that share no disk; wait for all."
    where = ('--nnodes', str(len(runs)), '--master-addr', '127.0.0.1', '--master-port', free_port())
    started = [subprocess.Popen((*TORCHRUN, '1', *where, '--node-rank', str(i), *TRAIN, str(run)), stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT, text=True, env=ENV) for i, run in enumerate(runs)]
    return [(p.communicate(timeout=300)[0], p.returncode) for p in started]


def test_on_two_machines_only_the_first_writes(trained_alone, tmp_path):
    alone, data = trained_alone['whole']
    first, second = (shutil.copytree(data, tmp_path/name) for name in ('first', 'second'))
    before = {p: p.stat().st_mtime_ns for p in second.rglob('*')}
    (said, code), (said_second, code_second) = nodes(first, second)
    assert (code, code_second) == (0, 0), said + said_second
    assert 'train: done' in said and 'train: done' not in said_second 
    assert {p: p.stat().st_mtime_ns for p in second.rglob('*')} == before
    assert_same_losses(losses(alone), losses(first))


def test_a_machine_with_other_rows_stops_the_run(trained_alone, tmp_path):
    first, second = (shutil.copytree(trained_alone['small'][1], tmp_path/name) for name in ('first', 'second'))
    with (second/'data'/'train.jsonl').open('a', encoding='utf-8') as f: f.write('{"instruction": "?", "input": "", "output": "!"}\n')
    (_, code), (said, code_second) = nodes(first, second)
    assert code != 0 and code_second != 0 and 'process 1 sees another recipe, or other files in' in said
    assert not (first/'adapter').exists()


def test_what_is_missing_is_said_once(tmp_path):
    done = launch(*TORCHRUN, '2', '--standalone', *TRAIN, str(tmp_path/'nothing'), '--recipe', 'rehearsal', '--set', 'grad_accum=2')
    assert done.returncode != 0
    assert done.stderr.count('is missing; make it with: kofinetune data --run') == 1
    assert not (tmp_path/'nothing'/'adapter').exists()


@pytest.mark.parametrize('command, env, message', [
    (('train',), {}, 'grad_accum is 1, and 2 processes cannot share these batches; set grad_accum to a multiple of 2'),
    (('train', '--set', 'grad_accum=2'), dict(ACCELERATE_USE_FSDP='true'), 'the launcher is set to FSDP, which splits the weights too'),
])
def test_a_wrong_request_exits_with_2_everywhere_and_the_first_process_says_why(tmp_path, command, env, message):
    said = [launch(sys.executable, '-m', 'kofinetune.cli', *command, '--recipe', 'rehearsal', '--run', str(tmp_path/'run'),
                   env=dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE='2') | env) for rank in '01']
    assert [s.returncode for s in said] == [2, 2]
    assert message in said[0].stderr and len(said[0].stderr.strip().splitlines()) == 1
    assert said[1].stderr == ''
