"A training that is killed, cut off, fed wrong numbers or out of disk: what is kept, what is said, and the same bytes in the end."
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from kofinetune.recipe import Recipe
from kofinetune.runs import read_jsonl, write_json
from kofinetune.data import prepare

SMALL = Recipe.named('rehearsal').replace(rows=80, valid_rows=8, epochs=2.0, max_length=64, grad_accum=2, save_steps=3,
                                          lora_r=4, lora=dict(lora_dropout=.1))
TIMES = {'train_runtime', 'train_samples_per_second', 'train_steps_per_second', 'eval_runtime', 'eval_samples_per_second',
         'eval_steps_per_second', 'tokens_per_second', 'peak_memory_bytes'}


class Stage:
    "The train stage in processes of its own."
    def __init__(self, folder):
        self.out, env = folder/'out.txt', os.environ | dict(OMP_NUM_THREADS='1', TRANSFORMERS_VERBOSITY='error', TQDM_DISABLE='1')
        self.driver = subprocess.Popen([sys.executable, Path(__file__).with_name('resume_driver.py')], stdin=subprocess.PIPE,
                                       stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env)
        assert self.driver.stdout.readline() == 'ready\n'

    def __call__(self, recipe, run, kill_when=None, force=False, file_size=0, die_in=''):
        "Run the stage; kill it as soon as `kill_when()` holds. Returns (exit code, lines of output)."
        self.out.write_text('')
        job = dict(recipe=asdict(recipe), run=str(run), out=str(self.out), force=force, file_size=file_size, die_in=die_in)
        self.driver.stdin.write(json.dumps(job) + '\n')
        self.driver.stdin.flush()
        pid = int(self.driver.stdout.readline())
        if kill_when:
            while Path(f'/proc/{pid}').exists():
                if kill_when(): os.kill(pid, signal.SIGKILL); break
                time.sleep(.002)
        return int(self.driver.stdout.readline()), self.out.read_text().splitlines()


@pytest.fixture(scope='module')
def train(tmp_path_factory):
    stage = Stage(tmp_path_factory.mktemp('driver'))
    yield stage
    stage.driver.stdin.close()
    stage.driver.wait(20)


def steps(run): return sorted(int(p.name.split('-')[1]) for p in (run/'checkpoints').glob('checkpoint-*'))


def sealed(run, step): return (run/'checkpoints'/f'checkpoint-{step}'/'sealed.json').is_file()


def weights(run):
    files = [p for p in (run/'adapter').iterdir() if p.suffix == '.safetensors']
    assert len(files) == 1
    return files[0].read_bytes()


def record(run):
    "What a run reports, but for times."
    log, metrics = read_jsonl(run/'adapter'/'log.jsonl'), json.loads((run/'adapter'/'metrics.json').read_text(encoding='utf-8'))
    return [{k: v for k, v in e.items() if k not in TIMES} for e in log], {k: v for k, v in metrics.items() if k not in TIMES}


def same(one, two): return weights(one) == weights(two) and record(one) == record(two) and not (two/'checkpoints').exists()


@pytest.fixture(scope='module')
def whole(train, tmp_path_factory):
    "A run that nothing disturbed."
    run = tmp_path_factory.mktemp('whole')
    prepare(SMALL, run)
    assert train(SMALL, run)[0] == 0
    return run


@pytest.fixture(scope='module')
def cut(train, tmp_path_factory):
    "A run that was killed after its third checkpoint."
    run = tmp_path_factory.mktemp('cut')
    prepare(SMALL, run)
    assert train(SMALL, run, kill_when=lambda: sealed(run, 9))[0] == -signal.SIGKILL
    assert steps(run)[:3] == [3, 6, 9] and not (run/'adapter').exists()
    return run


@pytest.fixture
def again(cut, tmp_path): return Path(shutil.copytree(cut, tmp_path/'again'))


def last(run):
    "The newest whole checkpoint."
    return run/'checkpoints'/f'checkpoint-{max(s for s in steps(run) if sealed(run, s))}'


def test_killed_at_ten_random_moments_the_run_ends_with_the_same_bytes(train, whole, tmp_path):
    chance, kills = random.Random(20), 0
    prepare(SMALL, tmp_path)
    while kills < 10:
        before, seen, start, wait = steps(tmp_path), [], time.monotonic(), chance.uniform(0, .3)
        def now():              # while it loads, or a random while behind the first new checkpoint, or while that is written
            if kills in (0, 5): return time.monotonic() - start > 5 * wait
            if not seen and set(steps(tmp_path)) - set(before): seen.append(time.monotonic())
            return bool(seen) and time.monotonic() - seen[0] > wait
        code, lines = train(SMALL, tmp_path, kill_when=now)
        assert code in (0, -signal.SIGKILL), lines
        kills += code != 0
        if code == 0: assert same(whole, tmp_path); shutil.rmtree(tmp_path/'adapter')      # too fast for us: once more
    assert train(SMALL, tmp_path)[0] == 0 and same(whole, tmp_path)


def test_a_kill_between_the_last_step_and_the_finished_folder_costs_no_training(train, whole, again):
    assert train(SMALL, again, die_in='write_jsonl')[0] == -signal.SIGKILL
    end = max(steps(again))
    code, lines = train(SMALL, again)
    assert code == 0 and f'adapter: resuming from checkpoint-{end}' in lines and same(whole, again)


def test_a_half_written_checkpoint_is_left_out(train, again):
    end = last(again)
    (end/'sealed.json').unlink()
    (end/'optimizer.pt').unlink()
    code, lines = train(SMALL, again, kill_when=lambda: 'resuming from' in train.out.read_text())
    assert f'adapter: {end.name} is half-written; skipped' in lines and code == -signal.SIGKILL
    assert f'adapter: resuming from checkpoint-{int(end.name.split("-")[1]) - 3}' in lines


@pytest.mark.parametrize('name', ['adapter_model.safetensors', 'optimizer.pt', 'trainer_state.json', 'sealed.json'])
def test_a_damaged_checkpoint_is_left_out_for_the_one_before(train, whole, again, name):
    end = last(again)
    data = bytearray((end/name).read_bytes())
    data[len(data) // 2] ^= 16
    (end/name).write_bytes(data if name != 'optimizer.pt' else data[:len(data) // 2])
    code, lines = train(SMALL, again, kill_when=lambda: 'resuming from' in train.out.read_text())
    assert any(line.startswith(f'adapter: {end.name} is damaged: {"" if name == "sealed.json" else name}') for line in lines)
    assert f'adapter: resuming from checkpoint-{int(end.name.split("-")[1]) - 3}' in lines
    if name == 'optimizer.pt': assert train(SMALL, again)[0] == 0 and same(whole, again)


def test_where_no_checkpoint_can_be_read_the_training_says_so_and_begins_again(train, whole, again):
    before = steps(again)
    for step in before:
        path = again/'checkpoints'/f'checkpoint-{step}'/'scheduler.pt'
        path.write_bytes(path.read_bytes()[:-1])
    code, lines = train(SMALL, again)
    assert code == 0 and not any('resuming from' in line for line in lines) and same(whole, again)
    assert sum(line.endswith('skipped') for line in lines) == len(before)


def test_a_checkpoint_of_another_recipe_or_of_other_rows_is_refused(train, again):
    code, lines = train(SMALL.replace(learning_rate=1e-3), again)
    assert code == 1 and 'ERROR ValueError' in lines[-1] and 'learning_rate = 0.003, and now it is 0.001' in lines[-1]
    prepare(SMALL.replace(seed=1), again, force=True)
    manifest = json.loads((again/'manifest.json').read_text(encoding='utf-8'))
    manifest['stages']['data']['inputs']['recipe']['seed'] = 42                 # the rows alone differ
    write_json(manifest, again/'manifest.json')
    code, lines = train(SMALL, again)
    assert code == 1 and 'checkpoints was made from files that have changed since; make it again with: kofinetune train' in lines[-1]
    assert max(steps(again)) > 6


def test_a_full_disk_stops_with_one_line_and_keeps_the_last_checkpoint(train, whole, again):
    before = last(again)
    code, lines = train(SMALL, again, file_size=(before/'optimizer.pt').stat().st_size // 2)
    assert code == 1 and lines[-1].startswith('ERROR RuntimeError: ') and 'could not be written (' in lines[-1]
    assert lines[-1].endswith('then run the same command again')
    assert last(again) == before
    assert train(SMALL, again)[0] == 0 and same(whole, again)


@pytest.mark.parametrize('valid_rows', [8, 0])
def test_a_loss_that_is_not_a_number_stops_and_keeps_the_last_good_checkpoint(train, tmp_path, valid_rows):
    recipe = SMALL.replace(valid_rows=valid_rows, learning_rate=9999., save_steps=1,
                           lora=dict(lora_alpha=2**32 - 1, lora_dropout=0.), trainer=dict(warmup_steps=.5))
    prepare(recipe, tmp_path)
    code, lines = train(recipe, tmp_path)
    assert code == 1 and re.match(r'ERROR RuntimeError: (eval_loss|loss|grad_norm) is (nan|inf) at step \d+; lower learning_rate', lines[-1])
    import torch
    from safetensors.torch import load_file
    kept = load_file(last(tmp_path)/'adapter_model.safetensors')
    assert all(torch.isfinite(w).all() for w in kept.values()) and not (tmp_path/'adapter').exists()


def test_whole_model_training_goes_on_too(train, tmp_path):
    recipe = SMALL.replace(adapter='none', quant='none', rows=60, learning_rate=1e-3)
    for name in 'ab': prepare(recipe, tmp_path/name)
    assert train(recipe, tmp_path/'a')[0] == 0
    assert train(recipe, tmp_path/'b', kill_when=lambda: sealed(tmp_path/'b', 6))[0] == -signal.SIGKILL
    assert train(recipe, tmp_path/'b')[0] == 0 and same(tmp_path/'a', tmp_path/'b')
