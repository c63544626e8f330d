"Broken on purpose: killed, cut off, out of room, flipped bits, servers that fail. Nothing is lost, nothing half is taken for whole."
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from kofinetune.export import modelfile
from kofinetune.proof import verify_ollama
from kofinetune.server import create_model
from kofinetune.recipe import Recipe
from kofinetune.runs import file_faults, note, read_manifest, stage, working_on
from kofinetune.data import prepare

ROOT = Path(__file__).resolve().parent.parent
COMMAND = [sys.executable, '-m', 'kofinetune.cli']
ENV = os.environ | dict(OMP_NUM_THREADS='1', TQDM_DISABLE='1', COLUMNS='200', PYTHONUNBUFFERED='1')
SMALL = Recipe.named('rehearsal').replace(rows=40, valid_rows=4)


def kofinetune(*args, **more):
    return subprocess.run([*COMMAND, *map(str, args)], capture_output=True, text=True, env=ENV, **more)


def test_every_stage_survives_one_fault_of_each_kind(tmp_path):
    "The short form of `make faults`: its report, its table, and no fault lost."
    done = subprocess.run([sys.executable, ROOT/'benchmarks'/'faults.py', '--quick', '--seed', '1', '--json', tmp_path/'faults.json'],
                          capture_output=True, text=True, env=ENV)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report == json.loads((tmp_path/'faults.json').read_text(encoding='utf-8'))
    assert report['lost'] == 0 and report['survived'] == report['tried'] == sum(r['tried'] for r in report['rows']) >= 30
    tried = {(r['stage'], r['fault']) for r in report['rows']}
    assert {stage for stage, _ in tried} >= {'data', 'train', 'merge', 'export', 'eval', 'data, on disk', 'download'}
    assert {(stage, 'kill -9 at a random moment') for stage in ('data', 'train', 'merge', 'export', 'eval')} <= tried
    assert ('train', 'two at once') in tried and ('download', 'the network drops in the middle') in tried
    for text in report['not_tried']: print(f'not tried: {text}')
    text = (tmp_path/'faults.md').read_text(encoding='utf-8')
    assert text.count('\n| ') == 1 + len(tried) and f'{report["tried"]} faults tried' in text


# Integrity

def flip(path, bit=3):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1 << bit
    path.write_bytes(data)


@pytest.fixture
def run(rehearsal_run, tmp_path):
    return Path(shutil.copytree(rehearsal_run, tmp_path/'run', ignore=shutil.ignore_patterns('.lock')))


def stage_of(command):
    from kofinetune.cli import stage_function
    return stage_function(command)


@pytest.mark.parametrize('file, used_by', [
    ('data/train.jsonl', ('train', 'eval')), ('data/valid.jsonl', ('merge', 'export')), ('adapter/adapter_model.safetensors', ('merge', 'eval')),
    ('adapter/adapter_config.json', ('merge',)), ('merged/model.safetensors', ('export', 'eval')), ('merged/tokenizer.json', ('export',)),
    ('ollama/model-q8_0.gguf', ('eval',)), ('ollama/Modelfile', ('eval',))])
def test_a_flipped_bit_is_noticed_before_the_file_is_used(run, file, used_by):
    flip(run/file)
    maker = {'data': 'data', 'adapter': 'train', 'merged': 'merge', 'ollama': 'export'}[file.split('/')[0]]
    for command in used_by:
        before = {p: p.stat().st_mtime_ns for p in run.rglob('*') if p.is_file() and p.name not in ('.lock', 'log.txt')}
        with pytest.raises(ValueError) as seen: stage_of(command)(Recipe.named('rehearsal'), run, force=True)
        assert str(seen.value).startswith(f'{run/file} is not the file that was written (SHA-256 ')
        assert f'kofinetune {maker} --run {run} --force' in str(seen.value)
        assert {p: p.stat().st_mtime_ns for p in run.rglob('*') if p.is_file() and p.name not in ('.lock', 'log.txt')} == before
    with pytest.raises(ValueError, match='is not the file that was written'): stage_of(maker)(Recipe.named('rehearsal'), run)
    shown = kofinetune('show', run)
    assert shown.returncode == 1 and len(shown.stderr.strip().splitlines()) == 1 and 'DAMAGED' in shown.stdout
    assert f'{run/file} is not the file that was written' in shown.stderr and f'kofinetune {maker} --run {run} --force' in shown.stderr


def test_data_that_is_made_again_is_the_same_and_the_run_is_whole_again(run):
    flip(run/'data'/'train.jsonl')
    prepare(Recipe.named('rehearsal'), run, force=True)
    assert file_faults(run, 'data') == {}
    for command in ('train', 'merge', 'eval'): assert stage_of(command)(Recipe.named('rehearsal'), run)     # already done


def test_show_says_what_is_missing_and_what_is_not_made(run):
    shown = kofinetune('show', run)
    assert shown.returncode == 0 and shown.stdout.count(' whole ') == 5 and shown.stderr == ''
    for text in ('rows to train on, 250 held out, of 2,320', ' steps, ', 'KL ', 'answer loss'): assert text in shown.stdout, text
    assert re.search(r' 0 of (158|2,\d{3}) prompts with other tokens', shown.stdout)     # on a server, or on llama.cpp
    flip(run/'ollama'/'verify.json')                        # every proof writes it again
    shutil.rmtree(run/'eval')
    (run/'merged'/'config.json').unlink()
    shown = kofinetune('show', run)
    assert shown.returncode == 1 and shown.stderr.startswith('kofinetune: 3 files of ') and shown.stdout.count('DAMAGED') == 3
    assert f'{run}/merged/config.json is missing; make it again with: kofinetune merge --run {run} --force' in shown.stdout
    assert f'verify.json is not the file that was written' in shown.stdout and f'kofinetune verify {run}' in shown.stdout
    assert f'{run}/eval is missing; make it again with: kofinetune eval --run {run}\n' in shown.stdout
    manifest = json.loads((run/'manifest.json').read_text(encoding='utf-8'))
    for name in ('merged', 'ollama', 'eval'): del manifest['stages'][name]
    (run/'manifest.json').write_text(json.dumps(manifest), encoding='utf-8')
    shown = kofinetune('show', run)
    assert shown.returncode == 0 and shown.stdout.count('not made') == 3 and f'kofinetune merge --run {run}' in shown.stdout


@pytest.mark.parametrize('text', ['{"stages": {', '[]', '{}', '\x00'])
def test_a_damaged_manifest_is_named(tmp_path, text):
    (tmp_path/'manifest.json').write_text(text, encoding='utf-8')
    shown = kofinetune('show', tmp_path)
    assert shown.returncode == 2 and f'{tmp_path}/manifest.json is damaged (' in shown.stderr and f'kofinetune run --run {tmp_path}' in shown.stderr
    assert len(shown.stderr.strip().splitlines()) == 1


def test_a_folder_that_is_no_run(tmp_path):
    shown = kofinetune('show', tmp_path)
    assert shown.returncode == 2 and f'{tmp_path} holds no finished stage' in shown.stderr


# Put in place

def test_what_a_killed_process_left_is_swept(tmp_path):
    prepare(SMALL, tmp_path)
    (tmp_path/'.adapter.partial').mkdir()
    (tmp_path/'.adapter.partial'/'x').write_text('x')
    (tmp_path/'.data.old').mkdir()
    (tmp_path/'.manifest.json.partial').write_text('{')
    (tmp_path/'data'/'.verify.json.partial').write_text('{')
    prepare(SMALL, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {'data', 'recipe.json', 'manifest.json', '.lock', 'log.txt'}
    assert {p.name for p in (tmp_path/'data').iterdir()} == {'train.jsonl', 'valid.jsonl', 'audit.json'}


def test_the_manifest_never_vouches_for_a_folder_of_another_recipe(tmp_path, monkeypatch):
    "Killed between the renaming of --force and its record, the stage counts as not made."
    from kofinetune import runs
    prepare(SMALL, tmp_path)
    class Killed(BaseException): pass
    def dies(*args): raise Killed
    monkeypatch.setattr(runs, 'file_hashes', dies)
    with pytest.raises(Killed): prepare(SMALL.replace(seed=7), tmp_path, force=True)
    assert read_manifest(tmp_path)['stages'] == {}
    monkeypatch.undo()
    prepare(SMALL, tmp_path)
    assert file_faults(tmp_path, 'data') == {} and read_manifest(tmp_path)['stages']['data']['inputs']['recipe']['seed'] == 42


def test_an_interrupted_stage_says_what_is_kept(tmp_path):
    prepare(SMALL, tmp_path)
    def half(folder): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt) as seen: stage(SMALL, tmp_path, 'adapter', half, scaffold='checkpoints')
    assert seen.value.__notes__ == [f'adapter was being made; kept in {tmp_path}: data']
    for step in (9, 12): (tmp_path/'checkpoints'/f'checkpoint-{step}').mkdir(parents=True)
    (tmp_path/'checkpoints'/'checkpoint-9'/'sealed.json').write_text('{}')
    with pytest.raises(KeyboardInterrupt) as seen: stage(SMALL, tmp_path, 'adapter', half, scaffold='checkpoints')
    assert seen.value.__notes__ == [f'adapter was being made; kept in {tmp_path}: data, checkpoint-9']
    assert (tmp_path/'log.txt').read_text(encoding='utf-8').splitlines()[-1].endswith('adapter: stopped, ' + seen.value.__notes__[0])


# Long work

def test_a_run_under_nohup_outlives_its_terminal_and_is_followed_from_another(tmp_path):
    recipe = ['--recipe', 'rehearsal', '--set', 'rows=80', '--set', 'valid_rows=8', '--set', 'epochs=3', '--set', 'max_length=64']
    assert kofinetune('data', '--run', 'r', *recipe, cwd=tmp_path).returncode == 0
    with (tmp_path/'out').open('w') as out:
        train = subprocess.Popen(['nohup', *COMMAND, 'train', '--run', 'r', *recipe], cwd=tmp_path, env=ENV, stdout=out, stderr=out, start_new_session=True)
    while working_on(tmp_path/'r') is None and train.poll() is None: time.sleep(.02)
    assert working_on(tmp_path/'r') == train.pid
    follow = subprocess.Popen([*COMMAND, 'show', 'r', '--follow'], cwd=tmp_path, env=ENV, stdout=subprocess.PIPE, text=True)
    lines = [next(line for line in follow.stdout if ' step ' in line)]
    os.killpg(train.pid, signal.SIGHUP)                    # what a terminal that closes sends
    shown = kofinetune('show', 'r', cwd=tmp_path)
    assert f'process {train.pid} works on it' in shown.stdout and 'kofinetune show r --follow' in shown.stdout
    lines += follow.stdout.readlines()
    assert train.wait(60) == 0 and follow.wait(10) == 0 and (tmp_path/'r'/'adapter').is_dir()
    steps = [int(re.search(r'step (\d+) of', line)[1]) for line in lines if ' step ' in line]
    assert len(steps) > 10 and steps == sorted(steps) and lines[-1] == 'nobody works on r\n'
    assert re.fullmatch(r'\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ adapter: done in [\d.]+ s\n', lines[-2])
    assert re.search(r'adapter: step \d+ of \d+, loss [\d.]+, \d+ s left\n', ''.join(lines))


def test_without_nohup_a_closed_terminal_stops_it_and_its_line_says_what_is_kept(tmp_path):
    recipe = ['--recipe', 'rehearsal', '--set', 'rows=80', '--set', 'valid_rows=8', '--set', 'epochs=30', '--set', 'max_length=64', '--set', 'save_steps=3']
    kofinetune('data', '--run', 'r', *recipe, cwd=tmp_path)
    train = subprocess.Popen([*COMMAND, 'train', '--run', 'r', *recipe], cwd=tmp_path, env=ENV, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
                             preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL))   # these tests may themselves run under nohup
    while not list(tmp_path.glob('r/checkpoints/checkpoint-3/sealed.json')) and train.poll() is None: time.sleep(.02)
    train.send_signal(signal.SIGHUP)
    said = [line for line in train.communicate(timeout=60)[1].splitlines() if line.startswith('kofinetune: ')]
    assert train.returncode == 1 and len(said) == 1
    assert re.fullmatch(r'kofinetune: stopped, for the terminal was closed \(SIGHUP\); adapter was being made; kept in r: data, checkpoint-\d+; '
                        r'go on with: kofinetune train --run r .*', said[0])


def test_a_signal_that_comes_in_a_destructor_is_not_lost():
    "Python drops exceptions of destructors, this one too; so it is raised once more."
    code = ('import os, signal, sys, time\nfrom kofinetune import cli\n'
            'class Dying:\n    def __del__(self): os.kill(os.getpid(), signal.SIGTERM); time.sleep(0)\n'
            'def app(prog_name): Dying(); time.sleep(20); print("went on")\n'
            'cli.app = app; cli.main()\n')
    done = subprocess.run([sys.executable, '-c', code, 'train', '--run', 'my run'], capture_output=True, text=True, env=ENV)
    assert (done.returncode, done.stdout) == (1, '')
    assert done.stderr == "kofinetune: asked to stop (SIGTERM); go on with: kofinetune train --run 'my run'\n"


def test_a_log_that_cannot_be_written_stops_nothing(tmp_path):
    prepare(SMALL, tmp_path)
    (tmp_path/'log.txt').unlink()
    (tmp_path/'log.txt').mkdir()
    note(tmp_path, 'hello')
    prepare(SMALL, tmp_path, force=True)


# A server that fails; the real one is broken in benchmarks/faults.py

@pytest.fixture
def server(monkeypatch, tmp_path):
    "A server that answers as `server.says[path]` tells, and a folder to give it."
    class Handler(BaseHTTPRequestHandler):
        protocol_version = 'HTTP/1.1'
        def log_message(self, *args): pass
        def do_GET(self):
            if self.command == 'POST': self.connection.settimeout(.2); self._read()
            status, text = next((s for path, s in self.server.says.items() if path in self.path), (200, '{}'))
            if status == 'silent': time.sleep(1.5); self.close_connection = True; return
            body = text.encode()
            self.send_response(200 if status == 'half' else status)
            self.send_header('Content-Length', str(len(body)))
            self.end_headers()
            if self.command != 'HEAD': self.wfile.write(body[:len(body) // 2] if status == 'half' else body)
            self.close_connection = True
        def _read(self):
            try:
                while self.rfile.read1(65536): pass
            except TimeoutError: pass
        do_POST = do_HEAD = do_DELETE = do_GET
    one = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    one.says = {'/api/version': (200, '{"version": "0.0"}')}
    one.url = f'http://127.0.0.1:{one.server_port}'
    threading.Thread(target=one.serve_forever, daemon=True).start()
    monkeypatch.setenv('OLLAMA_HOST', one.url)
    monkeypatch.setattr('kofinetune.server.PATIENCE', 1)
    (tmp_path/'m.gguf').write_bytes(b'GGUF' * 1000)
    (tmp_path/'Modelfile').write_text(modelfile('m.gguf'), encoding='utf-8')
    yield one
    one.shutdown()


STATUS = '{"status": "using"}\n'
FAILS = {
    'upload, 500': ({'/api/blobs': (500, 'no room')}, 'answers 500 while taking m.gguf: no room; see what it printed, then run the same command again'),
    'upload, silent': ({'/api/blobs': ('silent', '')}, 'said nothing for 1 s while taking m.gguf; start it again with: ollama serve, then'),
    'create, 500': ({'/api/blobs': (200, ''), '/api/create': (500, '{"error": "no engine"}')}, 'answers 500 while taking m.gguf: no engine; see'),
    'create, error in the stream': ({'/api/blobs': (200, ''), '/api/create': (200, STATUS + '{"error": "bad magic"}\n')}, 'answers while taking m.gguf: bad magic; see'),
    'create, breaks off': ({'/api/blobs': (200, ''), '/api/create': ('half', STATUS * 9)}, 'broke off while taking m.gguf (RemoteProtocolError); start'),
    'create, no end': ({'/api/blobs': (200, ''), '/api/create': (200, STATUS)}, "stopped at 'using' while it made m:latest; run the same command again"),
    'create, not JSON': ({'/api/blobs': (200, ''), '/api/create': (200, '<html>\n')}, 'broke off while taking m.gguf (JSONDecodeError)'),
    'no server': (None, 'start one with: ollama serve'),
}


@pytest.mark.parametrize('name', FAILS)
def test_a_failing_server_is_one_line_that_says_what_to_do(server, tmp_path, monkeypatch, name):
    says, message = FAILS[name]
    if says is None: monkeypatch.setenv('OLLAMA_HOST', '127.0.0.1:9')
    else: server.says |= says
    with pytest.raises(RuntimeError) as seen: create_model('m', tmp_path)
    assert message in str(seen.value) and '\n' not in str(seen.value)
    assert (server.url if says else 'http://127.0.0.1:9') in str(seen.value)


def test_an_answer_that_is_not_done_is_no_answer(server, rehearsal_run):
    from kofinetune.runs import read_jsonl
    server.says |= {'/api/generate': (200, json.dumps(dict(response='네', done=False, context=[], prompt_eval_count=1)))}
    rows = read_jsonl(rehearsal_run/'data'/'valid.jsonl')[:1]
    with pytest.raises(RuntimeError, match=r'broke off an answer \(done: false\) to .*; see what it printed, then run the same command again'):
        verify_ollama('m', rehearsal_run/'merged', rows, reference=[dict(answer=[1])])


def test_a_folder_that_a_library_made_anew_has_vanished_all_the_same(tmp_path):
    "save_pretrained makes its folder, and the folders above it; what the stage had in it before is gone."
    run = tmp_path/'run'
    prepare(SMALL, run)

    def make(folder):
        (folder/'16-bit').mkdir()
        shutil.move(folder, tmp_path/'elsewhere')
        (folder/'16-bit').mkdir(parents=True)
        (folder/'16-bit'/'config.json').read_text()

    with pytest.raises(RuntimeError, match=r'16-bit/config.json vanished while adapter was made; go on with: kofinetune run'):
        stage(SMALL, run, 'adapter', make)
    assert not list(run.glob('.*.partial'))


def test_a_signal_that_a_library_answers_with_an_error_of_its_own_is_still_said(monkeypatch, capsys):
    "torch's C code does: `could not determine the shape of object type 'torch.storage.UntypedStorage'`."
    from kofinetune import cli

    def app(prog_name):
        try: os.kill(os.getpid(), signal.SIGTERM); time.sleep(5)     # SIGINT is ignored in a shell's background
        except BaseException: raise TypeError('could not determine the shape') from None

    monkeypatch.setattr(cli, 'app', app)
    monkeypatch.setattr(sys, 'argv', ['kofinetune', 'export'])
    for _ in range(2):
        with pytest.raises(SystemExit) as ended: cli.main()
        assert ended.value.code == 1 and capsys.readouterr().err == 'kofinetune: asked to stop (SIGTERM); go on with: kofinetune export\n'
    monkeypatch.setattr(cli, 'app', lambda prog_name: int('x'))      # and is forgotten by the next command
    with pytest.raises(SystemExit) as ended: cli.main()
    assert ended.value.code == 2 and "invalid literal" in capsys.readouterr().err
