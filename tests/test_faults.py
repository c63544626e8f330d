"Broken on purpose: killed, cut off, out of room, flipped bits, servers that fail. Nothing is lost, nothing half is taken for whole."
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from pkgutil import resolve_name

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT/'benchmarks'))
from faults import FILE, NAME, OLLAMA, Breaking    # noqa: E402

from kofinetune import runs
from kofinetune.data import prepare
from kofinetune.export import modelfile
from kofinetune.proof import verify_ollama
from kofinetune.recipe import Recipe
from kofinetune.runs import STAGES, file_faults, note, read_jsonl, read_manifest, stage, write_json
from kofinetune.server import create_model

COMMAND = [sys.executable, '-m', 'kofinetune.cli']
ENV = os.environ | dict(OMP_NUM_THREADS='1', TQDM_DISABLE='1', COLUMNS='200', PYTHONUNBUFFERED='1')
REHEARSAL = Recipe.named('rehearsal')
DO = {made.command: resolve_name(made.function) for made in STAGES.values()}
SMALL = REHEARSAL.replace(rows=40, valid_rows=4)
LONG = ['--recipe', 'rehearsal', '--set=rows=80', '--set=valid_rows=8', '--set=max_length=64', '--set=save_steps=3']


def kofinetune(*args, **more): return subprocess.run([*COMMAND, *map(str, args)], capture_output=True, text=True, env=ENV, **more)


def test_every_stage_survives_one_fault_of_each_kind(tmp_path):
    "The short form of `make faults`: its report, its table, and no fault lost."
    done = subprocess.run([sys.executable, ROOT/'benchmarks'/'faults.py', '--quick', '--seed', '1', '--json', tmp_path/'faults.json'],
                          capture_output=True, text=True, env=ENV)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report == json.loads((tmp_path/'faults.json').read_text(encoding='utf-8'))
    assert report['lost'] == 0 and report['survived'] == report['tried'] >= 30
    tried = {(r['stage'], r['fault']) for r in report['rows']}
    assert {(stage, 'kill -9 at a random moment') for stage in ('data', 'train', 'merge', 'export', 'eval')} <= tried
    assert {('train', 'two at once'), ('data, download', 'the network drops in the middle')} <= tried
    text = (tmp_path/'faults.md').read_text(encoding='utf-8')
    assert text.count('\n| ') == 1 + len(tried) and f'{report["tried"]} faults tried' in text


# Damage

@pytest.fixture
def run(rehearsal_run, tmp_path): return Path(shutil.copytree(rehearsal_run, tmp_path/'run', ignore=shutil.ignore_patterns('.lock')))


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 8
    path.write_bytes(data)


@pytest.mark.parametrize('file, maker, used_by', [
    ('data/train.jsonl', 'data', ('train', 'eval')), ('data/valid.jsonl', 'data', ('merge', 'export')),
    ('adapter/adapter_model.safetensors', 'train', ('merge', 'eval')), ('adapter/adapter_config.json', 'train', ('merge',)),
    ('merged/model.safetensors', 'merge', ('export', 'eval')), ('merged/tokenizer.json', 'merge', ('export',)),
    ('ollama/model-q8_0.gguf', 'export', ('eval',)), ('ollama/Modelfile', 'export', ('eval',))])
def test_a_flipped_bit_is_noticed_before_the_file_is_used(run, file, maker, used_by):
    flip(run/file)
    times = lambda: {p: p.stat().st_mtime_ns for p in run.rglob('*') if p.is_file() and p.name not in ('.lock', 'log.txt')}
    before = times()
    said = f'{run/file} is not the file that was written; restore it, or make it again with: kofinetune {maker} --run {run} --force'
    for command in (*used_by, maker):
        with pytest.raises(ValueError) as seen: DO[command](REHEARSAL, run, force=command != maker)
        assert str(seen.value) == said and times() == before
    shown = kofinetune('show', run)
    assert shown.returncode == 1 and 'DAMAGED' in shown.stdout and said in shown.stdout and shown.stderr.count('\n') == 1


def test_data_that_is_made_again_is_the_same_and_the_run_is_whole_again(run):
    flip(run/'data'/'train.jsonl')
    prepare(REHEARSAL, run, force=True)
    assert file_faults(run, 'data') == {}
    for command in ('train', 'merge', 'eval'): assert DO[command](REHEARSAL, run)     # already done


def test_show_says_what_is_missing_and_what_is_not_made(run):
    shown = kofinetune('show', run)
    assert shown.returncode == 0 and shown.stdout.count(' whole ') == 5 and shown.stderr == ''
    for text in ('rows to train on, 250 held out, of 2,320', ' steps, ', 'KL ', 'answer loss'): assert text in shown.stdout, text
    assert re.search(r' 0 of (48|158|390) prompts with other tokens', shown.stdout), shown.stdout     # on a server, by default and with --all, or on llama.cpp
    flip(run/'ollama'/'verify.json')                        # every proof writes it again
    (run/'eval'/'report.md').unlink()
    (run/'merged'/'config.json').unlink()
    shown = kofinetune('show', run)
    assert shown.returncode == 1 and shown.stdout.count('DAMAGED') == 3
    assert shown.stderr == f'kofinetune: {run} has 3 missing or damaged files\n'
    for text in (f'{run}/merged/config.json is missing; restore it, or make it again with: kofinetune merge --run {run} --force',
                 'verify.json is not the file that was written', f'kofinetune verify {run}', f'{run}/eval/report.md is missing'): assert text in shown.stdout
    manifest = read_manifest(run)
    write_json(manifest | dict(stages={name: manifest['stages'][name] for name in ('data', 'adapter')}), run/'manifest.json')
    shown = kofinetune('show', run)
    assert shown.returncode == 0 and shown.stdout.count('not made') == 3 and f'kofinetune merge --run {run}' in shown.stdout


@pytest.mark.parametrize('text', ['{"stages": {', '[]', '{}', '\x00', None])
def test_a_damaged_manifest_is_named_and_so_is_a_folder_without_one(tmp_path, text):
    if text: (tmp_path/'manifest.json').write_text(text, encoding='utf-8')
    shown = kofinetune('show', tmp_path)
    assert shown.returncode == 2 and shown.stderr.count('\n') == 1 and f'kofinetune run --run {tmp_path}' in shown.stderr
    assert (f'{tmp_path}/manifest.json is damaged (' if text else f'{tmp_path} holds no finished stage') in shown.stderr


# Put in place

def test_what_a_killed_process_left_is_swept(tmp_path):
    prepare(SMALL, tmp_path)
    for folder in ('.adapter.partial', '.data.old'): (tmp_path/folder).mkdir()
    for file in ('.adapter.partial/x', '.manifest.json.partial', 'data/.verify.json.partial'): (tmp_path/file).write_text('{')
    prepare(SMALL, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {'data', 'recipe.json', 'manifest.json', '.lock', 'log.txt'}
    assert {p.name for p in (tmp_path/'data').iterdir()} == {'train.jsonl', 'valid.jsonl', 'audit.json'}


def test_the_manifest_never_vouches_for_a_folder_of_another_recipe(tmp_path, monkeypatch):
    "Killed between the renaming of --force and its record, the stage counts as not made."
    class Killed(BaseException): pass
    def dies(*args): raise Killed
    prepare(SMALL, tmp_path)
    monkeypatch.setattr(runs, 'file_hashes', dies)
    with pytest.raises(Killed): prepare(SMALL.replace(seed=7), tmp_path, force=True)
    assert read_manifest(tmp_path)['stages'] == {}
    monkeypatch.undo()
    prepare(SMALL, tmp_path)
    assert file_faults(tmp_path, 'data') == {} and read_manifest(tmp_path)['stages']['data']['inputs']['recipe']['seed'] == 42


def test_a_folder_that_a_library_made_anew_has_vanished_all_the_same(tmp_path):
    "save_pretrained makes its folder, and the folders above it; what the stage had in it before is gone."
    def make(folder):
        shutil.move(folder, tmp_path/'elsewhere')
        (folder/'16-bit').mkdir(parents=True)
        (folder/'16-bit'/'config.json').read_text()
    prepare(SMALL, tmp_path)
    with pytest.raises(RuntimeError, match=r'adapter could not be written \(.*No such file or directory: .*16-bit/config.json.\), .*the same command again'):
        stage(SMALL, tmp_path, 'adapter', make)
    assert not list(tmp_path.glob('.*.partial'))


def test_a_recorded_name_that_leads_into_another_stage_is_refused(run):
    manifest = read_manifest(run)
    manifest['stages']['merged']['files']['../adapter/adapter_config.json'] = '0' * 64
    write_json(manifest, run/'manifest.json')
    with pytest.raises(ValueError, match='adapter_config.json leads out of .*/merged, to .*manifest.json'): runs.need(run, 'merged')


def test_a_log_that_cannot_be_written_stops_nothing(tmp_path):
    prepare(SMALL, tmp_path)
    (tmp_path/'log.txt').unlink()
    (tmp_path/'log.txt').mkdir()
    note(tmp_path, 'hello')
    prepare(SMALL, tmp_path, force=True)


# Signals

def test_a_run_under_nohup_outlives_its_terminal_and_logs_its_progress(tmp_path):
    assert kofinetune('data', '--run', 'r', *LONG, cwd=tmp_path).returncode == 0
    with (tmp_path/'out').open('w') as out:
        train = subprocess.Popen(['nohup', *COMMAND, 'train', '--run', 'r', *LONG, '--set=epochs=3'], cwd=tmp_path, env=ENV, stdout=out, stderr=out,
                                 start_new_session=True)
    log = tmp_path/'r'/'log.txt'
    while ' step ' not in log.read_text(encoding='utf-8') and train.poll() is None: time.sleep(.02)
    os.killpg(train.pid, signal.SIGHUP)                    # what a terminal that closes sends
    assert train.wait(60) == 0 and (tmp_path/'r'/'adapter').is_dir()
    lines = log.read_text(encoding='utf-8').splitlines()
    steps = [int(found[1]) for line in lines if (found := re.search(r'adapter: step (\d+) of \d+, (?:eval_)?loss [\d.]+.*, \d+ s left', line))]
    assert len(steps) > 10 and steps == sorted(steps)
    assert re.fullmatch(r'\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ adapter: done in [\d.]+ s', lines[-1])


def test_without_nohup_a_closed_terminal_stops_it_and_its_line_says_how_to_go_on(tmp_path):
    kofinetune('data', '--run', 'r', *LONG, cwd=tmp_path)
    train = subprocess.Popen([*COMMAND, 'train', '--run', 'r', *LONG, '--set=epochs=30'], cwd=tmp_path, env=ENV, stderr=subprocess.PIPE,
                             stdout=subprocess.DEVNULL, text=True,
                             preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL))   # these tests may themselves run under nohup
    while not list(tmp_path.glob('r/checkpoints/checkpoint-3/sealed.json')) and train.poll() is None: time.sleep(.02)
    train.send_signal(signal.SIGHUP)
    said = [line for line in train.communicate(timeout=60)[1].splitlines() if line.startswith('kofinetune: ')]
    assert train.returncode == 1 and len(said) == 1
    assert said[0].startswith('kofinetune: stopped by SIGHUP; continue with: kofinetune train --run r ')
    again = kofinetune('train', '--run', 'r', *LONG, '--set=epochs=1', '--force', cwd=tmp_path)
    assert again.returncode == 0 and not list(tmp_path.glob('r/.*.partial'))


@pytest.mark.parametrize('app', [   # Python drops exceptions of destructors; torch's C code puts one of its own in the place
    'class Dying:\n    def __del__(self): os.kill(os.getpid(), 15); time.sleep(0)\ndef app(prog_name): Dying(); time.sleep(20); print("went on")',
    'def app(prog_name):\n    try: os.kill(os.getpid(), 15); time.sleep(5)\n    except BaseException: raise TypeError("of C") from None'])
def test_a_signal_that_is_lost_in_a_library_is_still_said(app):
    code = f'import os, sys, time\nfrom kofinetune import cli\n{app}\ncli._app = app; cli.main()'
    done = subprocess.run([sys.executable, '-c', code, 'train', '--run', 'my run'], capture_output=True, text=True, env=ENV)
    assert (done.returncode, done.stdout) == (1, '')
    assert done.stderr == "\nkofinetune: stopped by SIGTERM; continue with: kofinetune train --run 'my run'\n"


# A server that fails, by the table of benchmarks/faults.py, which breaks a real one

def answer(method, path, headers, body):
    "What an Ollama server says that takes everything."
    if method == 'HEAD': return 404, {}, b''
    said = {'/api/version': b'{"version": "0.0"}', '/api/create': b'{"status": "success"}\n', '/api/tags': json.dumps(dict(models=[])).encode()}
    return 200, {}, said.get(path, b'{}')


@pytest.mark.parametrize('what', [*OLLAMA, 'is not there'])
def test_a_failing_server_is_one_line_that_says_what_to_do(what, tmp_path, monkeypatch, rehearsal_run):
    where, fault, line = OLLAMA.get(what, ('', '', 'start it again with: ollama serve'))
    server = Breaking(answer)
    server.faults, server.silence = {where: fault} if fault else {}, 1.5
    url = server.url if fault else 'http://127.0.0.1:9'
    monkeypatch.setenv('OLLAMA_HOST', url)
    monkeypatch.setattr('kofinetune.server._PATIENCE', 1)
    (tmp_path/FILE).write_bytes(b'GGUF' * 1000)
    (tmp_path/'Modelfile').write_text(modelfile(FILE), encoding='utf-8')
    with pytest.raises(RuntimeError) as seen:
        if 'generate' in where: verify_ollama('m', rehearsal_run/'merged', read_jsonl(rehearsal_run/'data'/'valid.jsonl')[:1])
        else: create_model(NAME, tmp_path)
    server.shutdown()
    assert line in str(seen.value) and '\n' not in str(seen.value) and url in str(seen.value)
