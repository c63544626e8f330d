"What SECURITY.md promises."
import ast
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import ROOT

from kofinetune.recipe import Recipe
from kofinetune.runs import stage
from kofinetune.data import _SOURCES, prepare
from kofinetune.server import server_url
from kofinetune.proof import serve_gguf

COMMAND = [sys.executable, '-c', 'from kofinetune.cli import main; main()']
CODE = sorted((ROOT/'kofinetune').glob('*.py'))


# --- no code from others

def test_the_package_runs_no_shell_reads_no_pickle_and_runs_no_text():
    banned = {'subprocess', 'pickle', 'shelve', 'marshal', 'cloudpickle', 'dill', 'joblib', 'os.system', 'os.popen', 'eval', 'exec', 'torch.load', 'shlex.os'}
    for path in CODE:
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module] if isinstance(node, ast.ImportFrom) and not node.level else \
                [ast.unparse(node.func)] if isinstance(node, ast.Call) else []
            assert not banned & set(names), f'{path}:{node.lineno} {names}'


def test_code_that_comes_with_a_model_is_never_allowed():
    for path in [*CODE, *(ROOT/'nbs').glob('*.ipynb'), *(ROOT/'benchmarks').glob('*.py'), *(ROOT/'docs').glob('*.py')]:
        found = re.findall(r'trust_remote_code\s*=\s*(\w+)', path.read_text(encoding='utf-8'))
        assert set(found) <= {'False'}, path
    loads = [node for node in ast.walk(ast.parse((ROOT/'kofinetune'/'base.py').read_text(encoding='utf-8')))
             if isinstance(node, ast.Call) and ast.unparse(node.func) == 'auto_class.from_pretrained']
    assert len(loads) == 1 and 'trust_remote_code=False' in ast.unparse(loads[0])


@pytest.mark.parametrize('model_type', ['mine', 'gemma3_text'])
def test_code_beside_a_base_is_not_run(model_type, tmp_path):
    "An architecture that only this code has is refused; one that transformers has is loaded from transformers."
    import shutil
    from kofinetune.rehearsal import stand_in_base
    from kofinetune.base import load_base
    base = shutil.copytree(stand_in_base(), tmp_path/'base')
    for file, more in (('config.json', dict(model_type=model_type, auto_map={'AutoConfig': 'code.C', 'AutoModelForCausalLM': 'code.M'})),
                       ('tokenizer_config.json', dict(tokenizer_class='Mine', auto_map={'AutoTokenizer': ['code.T', 'code.T']}))):
        (base/file).write_text(json.dumps(json.loads((base/file).read_text()) | more))
    (base/'code.py').write_text(f'open({str(tmp_path/"executed")!r}, "w").close()\nclass C: pass\nclass M: pass\nclass T: pass\n')
    recipe = Recipe(base=str(base), quant='none')
    if model_type == 'mine':
        with pytest.raises(ValueError, match='never run'): load_base(recipe)
    else: assert type(load_base(recipe)[0]).__module__.startswith('transformers.')
    assert not (tmp_path/'executed').exists()


def test_what_is_downloaded_is_pinned():
    assert re.fullmatch('[0-9a-f]{40}', Recipe.named('best').revision)
    for source in _SOURCES.values():
        assert re.search('/[0-9a-f]{40}/', source['url']) and re.fullmatch('[0-9a-f]{40}', source['blob'])
        assert source['url'].startswith('https://')


# --- nothing outside the run folder

@pytest.mark.parametrize('name', ['.lock', '.manifest.json.partial', '.recipe.json.partial', '.data.partial', 'data', 'manifest.json'])
def test_a_planted_link_writes_nothing_outside(name, tmp_path):
    outside = tmp_path/'outside'
    if name in ('data', '.data.partial'): outside.mkdir()
    else: outside.write_text('{"stages": {}}')
    (tmp_path/'run').mkdir()
    (tmp_path/'run'/name).symlink_to(outside)
    with pytest.raises((ValueError, RuntimeError, OSError)): prepare(Recipe.named('rehearsal'), tmp_path/'run')
    assert list(outside.iterdir()) == [] if outside.is_dir() else outside.read_text() == '{"stages": {}}'


# --- this machine alone

def test_another_machine_only_when_that_is_said(monkeypatch):
    for host in ('127.0.0.1', 'localhost', '[::1]', '127.9.9.9', '0.0.0.0', '[::]'): server_url(f'http://{host}:11434')
    for host in ('192.0.2.1', 'example.com', 'localhost.example.com', '[2001:db8::1]', '127.0.0.1.example.com'):
        with pytest.raises(ValueError, match='KOFINETUNE_REMOTE_OLLAMA=1'): server_url(f'http://{host}:11434')
    monkeypatch.setenv('KOFINETUNE_REMOTE_OLLAMA', '1')
    assert server_url('http://192.0.2.1:11434') == 'http://192.0.2.1:11434'


def test_llama_cpp_listens_on_loopback_alone(rehearsal_run):
    import psutil
    with serve_gguf(rehearsal_run/'ollama'/'model-q8_0.gguf') as client:
        listening = {c.laddr for c in psutil.Process().net_connections('inet') if c.status == psutil.CONN_LISTEN}
        assert client.base_url.port in {a.port for a in listening}
        assert {a.ip for a in listening if a.port == client.base_url.port} == {'127.0.0.1'}


# --- no secret in anything that is written

SECRETS = {name: f'planted{i}SecretThatNobodyMayEverSee{i}' for i, name in enumerate(
    ('HF_TOKEN', 'HUGGING_FACE_HUB_TOKEN', 'WANDB_API_KEY', 'OPENAI_API_KEY', 'OLLAMA_API_KEY', 'TRACKIO_API_KEY'))}


def leaks(*texts): return [name for name, value in SECRETS.items() for t in texts if value.encode() in (t if isinstance(t, bytes) else t.encode())]


class Echo(BaseHTTPRequestHandler):
    "A server that refuses, and repeats the key that it was sent: the worst that a server can do."
    protocol_version = 'HTTP/1.1'
    def log_message(self, *args): pass
    def do_POST(self):
        self.rfile.read(int(self.headers.get('Content-Length', 0)))
        body = json.dumps(dict(error=f'You may not: {self.headers["Authorization"]}')).encode()
        self.server.seen.append(self.headers['Authorization'])
        self.send_response(self.server.status)
        self.send_header('Content-Type', 'application/json')
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    do_GET = do_POST


def test_what_a_failed_stage_says_is_logged_without_the_secret_in_it(tmp_path, monkeypatch):
    secret, recipe = SECRETS['HF_TOKEN'], Recipe.named('rehearsal').replace(rows=80, valid_rows=20)
    monkeypatch.setenv('HF_TOKEN', secret)
    prepare(recipe, tmp_path)
    def refused(folder): raise RuntimeError(f'403 for Bearer {secret}')
    with pytest.raises(RuntimeError): stage(recipe, tmp_path, 'adapter', refused)
    text = (tmp_path/'log.txt').read_text(encoding='utf-8')
    assert 'adapter: stopped, 403 for Bearer $HF_TOKEN' in text and secret not in text


@pytest.fixture
def echo():
    server = ThreadingHTTPServer(('127.0.0.1', 0), Echo)
    server.daemon_threads, server.seen, server.status = True, [], 403
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def kofinetune(*args, cwd, **env):
    kept = {k: v for k, v in os.environ.items() if k not in SECRETS}
    return subprocess.run([*COMMAND, *map(str, args)], cwd=cwd, capture_output=True, text=True, env=kept | SECRETS | dict(TMPDIR=str(cwd/'tmp')) | env)


def test_no_secret_in_a_whole_run_nor_in_what_fails(tmp_path, echo, rehearsal_run):
    "Every stage of a small run, its card, and a push that is refused by a server which repeats the key."
    from kofinetune import hub as publishing
    (tmp_path/'tmp').mkdir()
    small = ['--set', 'rows=400', '--set', 'valid_rows=20', '--set', 'epochs=0.2', '--set', 'quant=none', '--set', 'report_to=tensorboard',
             '--set', 'gguf=q8_0']
    ran = kofinetune('run', '--recipe', 'rehearsal', '--run', 'r', *small, cwd=tmp_path, OLLAMA_HOST='127.0.0.1:9')
    assert ran.returncode == 0, ran.stderr
    said = [ran.stdout, ran.stderr, *(publishing._card(tmp_path/'r', what) for what in ('merged', 'adapter', 'gguf'))]
    hub = dict(HF_ENDPOINT=f'http://127.0.0.1:{echo.server_port}', HF_HUB_OFFLINE='0', HF_HUB_DISABLE_TELEMETRY='1', NO_PROXY='127.0.0.1')
    for echo.status in (401, 403, 500):
        pushed = kofinetune('push', 'r', 'me/model', '--accept-noncommercial', cwd=tmp_path, **hub)
        assert pushed.returncode == 1 and 'was not pushed' in pushed.stderr
        said += [pushed.stdout, pushed.stderr]
    assert f'Bearer {SECRETS["HF_TOKEN"]}' in echo.seen           # it was sent, and sent back
    written = [p for p in tmp_path.rglob('*') if p.is_file()]
    assert {p.name for p in written} >= {'manifest.json', 'recipe.json', 'Modelfile', 'model-q8_0.gguf', 'report.json', 'adapter_model.safetensors'}
    assert any('tfevents' in p.name for p in written)
    assert leaks(*said) == [] and [p for p in written if leaks(p.read_bytes())] == []


def test_a_message_shows_the_name_of_a_secret_in_its_place(tmp_path):
    (tmp_path/'tmp').mkdir()
    seen = kofinetune('data', '--set', f'source={SECRETS["HF_TOKEN"]}.jsonl', cwd=tmp_path)
    assert seen.returncode == 2 and '$HF_TOKEN.jsonl is not a file' in seen.stderr and leaks(seen.stdout, seen.stderr) == []


def test_no_notebook_page_or_file_of_the_repository_holds_a_token():
    token = re.compile(rb'hf_[A-Za-z0-9]{30,}|sk-[A-Za-z0-9_-]{20,}|Bearer [A-Za-z0-9]{16,}|gh[pousr]_[A-Za-z0-9]{30,}|AKIA[A-Z0-9]{16}')
    planted = {b'hf_PlantedTokenThatNobodyMayEverSee0'}
    names = subprocess.run(['git', 'ls-files'], cwd=ROOT, capture_output=True, text=True).stdout.split('\n')
    files = [ROOT/name for name in names if name] or [p for p in ROOT.rglob('*') if p.is_file() and '.venv' not in p.parts]
    found = {(p.name, t) for p in files if p.is_file() for t in token.findall(p.read_bytes()) if t not in planted}
    assert not found


# --- what CI installs and looks for

def locked():
    lock = (ROOT/'.ci'/'requirements.lock').read_text(encoding='utf-8')
    entries = re.split(r'\n(?=[A-Za-z0-9])', lock.split('make lock\n')[1])
    return lock, entries


def test_the_lock_holds_every_dependency_with_hashes_and_no_address():
    from configparser import ConfigParser
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name
    lock, entries = locked()
    assert '://' not in lock and len(entries) > 200
    pinned = {}
    for entry in entries:
        name, version = re.match(r'([A-Za-z0-9._-]+)==(\S+)', entry).groups()
        assert '--hash=sha256:' in entry, name
        pinned.setdefault(canonicalize_name(name), []).append(version)
    ini = ConfigParser(delimiters=['='])
    ini.read(ROOT/'settings.ini', encoding='utf-8')
    for key, value in ini['DEFAULT'].items():
        for wanted in map(Requirement, value.split() if key.endswith('requirements') else ()):
            assert all(v in wanted.specifier for v in pinned.get(canonicalize_name(wanted.name), ['missing'])), f'{wanted}; fix it with: make lock'


def test_no_finding_is_silenced_without_a_reason():
    config = (ROOT/'.ci'/'ruff.toml').read_text(encoding='utf-8')
    reasons = ' '.join(line for line in config.splitlines() if line.startswith('#'))
    for rule in set(re.findall(r'"(S\d+)"', config)): assert rule in reasons, rule
    for path in CODE:
        for line in path.read_text(encoding='utf-8').splitlines():
            assert 'noqa' not in line and 'nosec' not in line, f'{path}: {line}'


class Holes(BaseHTTPRequestHandler):
    "A service that knows the holes of the packages in `server.holes`; None: one that cannot be asked."
    protocol_version = 'HTTP/1.1'
    def log_message(self, *args): pass
    def do_POST(self):
        asked, holes = json.loads(self.rfile.read(int(self.headers['Content-Length'])))['package']['name'], self.server.holes
        hole = dict(id=f'HOLE-{asked}', summary='x', affected=[dict(package=dict(name=asked, ecosystem='PyPI'),
                    ranges=[dict(type='ECOSYSTEM', events=[dict(introduced='0'), dict(fixed='99')])])])
        body = json.dumps(dict(vulns=[hole]) if asked in (holes or ()) else {}).encode()
        self.send_response(404 if holes is None else 200)
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        self.wfile.write(body)


AUDITS = {'nobody to ask': (None, {}, 0, 'COULD NOT ASK'), 'nobody to ask, where asking is a must': (None, dict(AUDIT_REQUIRED='1'), 1, 'COULD NOT ASK'),
          'a service that knows nothing': (set(), {}, 0, 'COULD NOT ASK'), 'no hole': ({'jinja2'}, {}, 0, 'no known hole in a package of the lock'),
          'a hole': ({'jinja2', 'six'}, {}, 1, 'HOLE-six')}


@pytest.mark.parametrize('name', AUDITS)
def test_the_audit_fails_on_a_hole_and_says_when_it_could_not_ask(name, tmp_path):
    "The real pip-audit, asking a service on this machine about a lock of two packages."
    import shutil
    holes, env, code, says = AUDITS[name]
    shutil.copytree(ROOT/'.ci', tmp_path/'.ci')
    for folder in ('kofinetune', 'nbs', 'tests', 'benchmarks', 'docs'): (tmp_path/folder).mkdir()
    (tmp_path/'setup.py').write_text('')
    (tmp_path/'.ci'/'requirements.lock').write_text('six==1.17.0\nidna==3.20\n')
    server = ThreadingHTTPServer(('127.0.0.1', 0), Holes)
    server.daemon_threads, server.holes = True, holes
    threading.Thread(target=server.serve_forever, daemon=True).start()
    env = os.environ | dict(PIP_AUDIT_VULNERABILITY_SERVICE='osv', PIP_AUDIT_OSV_URL=f'http://127.0.0.1:{server.server_port}', NO_PROXY='127.0.0.1',
                            PATH=f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}') | env
    seen = subprocess.run(['bash', '.ci/audit'], cwd=tmp_path, env=env, capture_output=True, text=True)
    server.shutdown()
    server.server_close()
    assert seen.returncode == code and says in seen.stdout + seen.stderr, seen.stdout + seen.stderr
