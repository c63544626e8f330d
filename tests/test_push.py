"Publishing, against a stand-in of the Hub's HTTP API: no account, no network."
import base64, hashlib, json, os, shutil, signal, subprocess, sys, threading, time
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from kofinetune import hub as publishing
from kofinetune.recipe import Recipe
from kofinetune.runs import read_manifest

COMMAND = [sys.executable, '-c', 'from kofinetune.cli import main; main()']
TOKEN = 'hf_PlantedTokenThatNobodyMayEverSee0'
REPO = 'me/model'


class Hub(BaseHTTPRequestHandler):
    "What huggingface_hub asks for when it makes a repository and commits to it. Large files go by LFS, as on the Hub without Xet."
    protocol_version = 'HTTP/1.1'
    def log_message(self, *args): pass

    def answer(self, status=200, value=None):
        body = json.dumps(value if value is not None else {}).encode()
        self.send_response(status)
        self.send_header('Content-Type', 'application/json')
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def handle_any(self):
        hub, body = self.server, self.rfile.read(int(self.headers.get('Content-Length', 0)))
        path = self.path.split('?')[0]
        hub.seen.append((self.command, path))
        if path.startswith('/lfs/'): return self.store(path.removeprefix('/lfs/'), body)
        if self.headers.get('Authorization') != f'Bearer {hub.token}': return self.answer(401, dict(error='Invalid username or password.'))
        if hub.refuse and path.startswith(hub.refuse[0]): return self.answer(hub.refuse[1], dict(error='You may not do that.'))
        value = json.loads(body) if body and not path.endswith('/main') else None
        if path == '/api/repos/create': return self.create(f'{value["organization"]}/{value["name"]}', value)
        if path == '/api/validate-yaml': return self.answer(200, dict(warnings=[], errors=[]))
        repo = '/'.join(path.removeprefix('/api/models').removesuffix('.git/info/lfs/objects/batch').split('/')[1:3])
        if repo not in hub.repos: return self.answer(404, dict(error='Repository not found'))
        if path == f'/api/models/{repo}': return self.answer(200, dict(id=repo, private=hub.repos[repo]['private'], sha='0' * 40, siblings=[]))
        if path.endswith('/preupload/main'):
            return self.answer(200, dict(files=[dict(path=f['path'], shouldIgnore=False, uploadMode='lfs' if is_large(f['path']) else 'regular')
                                                for f in json.loads(body)['files']]))
        if path.endswith('.git/info/lfs/objects/batch'):
            return self.answer(200, dict(transfer='basic', objects=[
                dict(oid=o['oid'], size=o['size']) | ({} if o['oid'] in hub.objects else
                dict(actions=dict(upload=dict(href=f'http://{self.headers["Host"]}/lfs/{o["oid"]}'))))
                for o in value['objects']]))
        if path.endswith('/commit/main'): return self.commit(repo, [json.loads(line) for line in body.splitlines()])
        self.answer(404)
    do_GET = do_POST = do_PUT = handle_any

    def create(self, repo, asked):
        url = f'http://{self.headers["Host"]}/{repo}'
        if repo in self.server.repos: return self.answer(409, dict(error='You already created this model repo', url=url))
        self.server.repos[repo] = dict(private=asked['visibility'] == 'private', files={}, commits=0)
        self.answer(200, dict(url=url))

    def store(self, oid, body):
        with self.server.turn: self.server.waiting += 1
        if self.server.stall.is_set() and self.server.waiting > 1:       # the second large file never gets through
            while not self.server.puts: time.sleep(.01)
            self.server.stalled.set()
            return time.sleep(30)
        assert hashlib.sha256(body).hexdigest() == oid
        self.server.objects[oid] = body
        self.server.puts += 1
        self.answer()

    def commit(self, repo, lines):
        files = {}
        for line in lines[1:]:
            value = line['value']
            if line['key'] == 'lfsFile': files[value['path']] = self.server.objects[value['oid']]
            else: files[value['path']] = base64.b64decode(value['content'])
        self.server.repos[repo]['files'] |= files
        self.server.repos[repo]['commits'] += 1
        self.answer(200, dict(commitUrl=f'http://{self.headers["Host"]}/{repo}/commit/1', commitOid='1' * 40, success=True))


def is_large(path): return path.endswith(('.safetensors', '.gguf', '.model'))


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(('127.0.0.1', 0), Hub)
    server.daemon_threads = True
    server.repos, server.objects, server.seen, server.puts, server.token, server.refuse = {}, {}, [], 0, TOKEN, None
    server.stall, server.stalled, server.turn, server.waiting = threading.Event(), threading.Event(), threading.Lock(), 0
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def run(rehearsal_run, tmp_path):
    "A copy of the finished rehearsal, so that nothing is written into the shared one."
    return shutil.copytree(rehearsal_run, tmp_path/'finished')


def environment(hub, home, **env):
    kept = {k: v for k, v in os.environ.items() if not k.startswith('HF_')}
    return kept | dict(HF_ENDPOINT=f'http://127.0.0.1:{hub.server_port}', HF_TOKEN=TOKEN, HF_HOME=str(home), HF_HUB_DISABLE_XET='1',
                       HF_HUB_DISABLE_TELEMETRY='1', NO_PROXY='127.0.0.1') | env


def push(hub, run, home, *args, accept=True, **env):
    accepted = ['--accept-noncommercial'] if accept else []
    return subprocess.run([*COMMAND, 'push', str(run), REPO, *accepted, *args], env=environment(hub, home, **env), capture_output=True, text=True, cwd=home)


def one_line(seen, code):
    assert seen.returncode == code and 'Traceback' not in seen.stderr, seen.stderr
    lines = [l for l in seen.stderr.splitlines() if l.startswith('kofinetune: ')]
    assert len(lines) == 1, seen.stderr
    return lines[0]


INTENDED = {'merged': ('merged', {'config.json', 'generation_config.json', 'model.safetensors', 'tokenizer.json', 'tokenizer.model', 'tokenizer_config.json'}),
            'adapter': ('adapter', {'adapter_config.json', 'adapter_model.safetensors'}),
            'gguf': ('ollama', {'model-bf16.gguf', 'model-q8_0.gguf', 'Modelfile'})}


@pytest.mark.parametrize('what', INTENDED)
def test_exactly_the_intended_files_arrive_in_one_private_commit(what, hub, run, tmp_path):
    stage, names = INTENDED[what]
    stray = run/stage/'notes-of-mine.txt'
    stray.write_text('not for others')
    seen = push(hub, run, tmp_path, '--what', what)
    assert seen.returncode == 0, seen.stderr
    assert seen.stdout.strip() == f'push: done, http://127.0.0.1:{hub.server_port}/{REPO} (private)'
    repo = hub.repos[REPO]
    assert repo['private'] is True and repo['commits'] == 1
    assert set(repo['files']) == names | {'README.md', 'NOTICE'}
    recorded = read_manifest(run)['stages'][stage]['files']
    for name in names: assert hashlib.sha256(repo['files'][name]).hexdigest() == recorded[name]
    published = b'\n'.join(repo['files'].values())
    for secret in (TOKEN, str(run), str(Path.home()), '/.cache/'): assert secret.encode() not in published, secret
    written = b'\n'.join(p.read_bytes() for p in run.rglob('*') if p.is_file())
    assert TOKEN not in seen.stdout + seen.stderr and TOKEN.encode() not in written
    assert 'Apache-2.0' in repo['files']['NOTICE'].decode()


def test_the_card_says_what_was_measured(hub, run, tmp_path):
    assert push(hub, run, tmp_path).returncode == 0
    card = hub.repos[REPO]['files']['README.md'].decode()
    data = yaml.safe_load(card.split('---')[1])
    report = json.loads((run/'eval'/'report.json').read_text(encoding='utf-8'))
    merged = report['models']['merged']
    claimed = {m['type']: m['value'] for m in data['model-index'][0]['results'][0]['metrics']}
    assert {r.metric_type: r.metric_value for r in ModelCard(card).data.eval_results} == claimed      # the Hub's own library reads it
    assert claimed['answer_nll'] == round(merged['answer_nll'], 4) and claimed['exact_match'] == round(merged['exact_match'], 4)
    assert data['language'] == 'ko' and data['license'] == 'apache-2.0' and 'base_model' not in data
    low, high = merged['answer_nll_ci']
    assert f'| merged | {merged["answer_nll"]:.3f} ({low:.3f} to {high:.3f}) |' in card
    for version in read_manifest(run)['versions'].items(): assert ' '.join(version) in card
    for part in ('## Prompt', '### Instruction:\n{instruction}', 'ollama create', f'pipeline("text-generation", model="{REPO}")', 'stand-in'):
        assert part in card


def test_the_code_on_the_card_runs(run, tmp_path):
    "With the run's own folder in the place of the repository."
    settings = json.loads((run/'recipe.json').read_text(encoding='utf-8'))
    for what, stage, changes in (('merged', 'merged', {}), ('adapter', 'adapter', dict(temperature=.7, repeat_penalty=1.1))):
        (run/'recipe.json').write_text(json.dumps(settings | changes), encoding='utf-8')
        code = publishing._card(run, what, REPO).split('```python\n')[1].split('```')[0].replace(REPO, str(run/stage))
        seen = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=tmp_path)
        assert seen.returncode == 0 and seen.stdout.strip(), seen.stderr


def test_a_model_of_gemma_and_koalpaca_carries_both_licences(run, tmp_path):
    (run/'recipe.json').write_text(json.dumps(asdict(Recipe.named('best').replace(style='alpaca'))), encoding='utf-8')
    for what, relation in (('merged', 'finetune'), ('adapter', 'adapter')):
        card = publishing._card(run, what, REPO)
        data = yaml.safe_load(card.split('---')[1])
        assert data['license'] == 'other' and 'gemma' in data['license_name'] and 'cc-by-nc-4.0' in data['license_name']
        assert (data['base_model'], data['base_model_relation']) == ('google/gemma-3-270m', relation)
        assert 'CC BY-NC 4.0' in card and 'Gemma Terms of Use' in card and "google/gemma-3-270m" in card
        assert 'do_sample=False, repetition_penalty=1.1' in card     # as Ollama is told to


def test_a_card_names_no_path_of_this_machine(run, tmp_path):
    recipe = Recipe.named('rehearsal').replace(base=str(tmp_path/'my-base'), source=str(tmp_path/'mine.jsonl'), style='alpaca')
    (run/'recipe.json').write_text(json.dumps(asdict(recipe)), encoding='utf-8')
    for what in INTENDED:
        card = publishing._card(run, what, REPO)
        assert str(tmp_path) not in card and 'my-base' in card and 'own rows' in card


def test_nothing_is_sent_before_the_terms_are_accepted(hub, run, tmp_path):
    line = one_line(push(hub, run, tmp_path, accept=False), 2)
    assert '--accept-noncommercial' in line and hub.seen == []


def test_a_public_repository_is_refused_unless_that_is_said(hub, run, tmp_path):
    hub.repos[REPO] = dict(private=False, files={}, commits=0)
    assert '--public' in one_line(push(hub, run, tmp_path), 2)
    assert hub.repos[REPO]['commits'] == 0 and hub.puts == 0
    seen = push(hub, run, tmp_path, '--public')
    assert seen.returncode == 0 and '(public)' in seen.stdout and hub.repos[REPO]['commits'] == 1


REFUSALS = {'a token that the Hub does not know': (dict(HF_TOKEN='hf_wrong'), None, 'hf auth login'),
            'no token': (dict(HF_TOKEN=''), None, 'hf auth login'),
            'a token that may not make a repository': ({}, ('/api/repos/create', 403), 'hf auth login'),
            'a token that may not commit': ({}, ('/api/models/me/model/commit', 403), 'hf auth login'),
            'no such owner': ({}, ('/api/repos/create', 404), 'check owner'),
            'offline': (dict(HF_HUB_OFFLINE='1'), None, 'HF_HUB_OFFLINE'),
            'no network': (dict(HF_ENDPOINT='http://127.0.0.1:9'), None, 'run the same command again')}


@pytest.mark.parametrize('name', REFUSALS)
def test_what_the_hub_refuses_is_one_line_that_mends_it(name, hub, run, tmp_path):
    env, hub.refuse, mend = REFUSALS[name]
    seen = push(hub, run, tmp_path, **env)
    line = one_line(seen, 1)
    assert line.startswith(f'kofinetune: {REPO} was not pushed (') and mend in line
    assert TOKEN not in seen.stdout + seen.stderr and 'hf_wrong' not in seen.stderr
    assert not any(repo['files'] for repo in hub.repos.values())


def test_an_upload_that_was_cut_off_goes_on_and_publishes_nothing_half(hub, run, tmp_path):
    hub.stall.set()
    process = subprocess.Popen([*COMMAND, 'push', str(run), REPO, '--accept-noncommercial'], cwd=tmp_path,
                               env=environment(hub, tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert hub.stalled.wait(60)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert hub.repos[REPO]['files'] == {} and hub.repos[REPO]['commits'] == 0 and hub.puts == 1
    hub.stall.clear()
    seen = push(hub, run, tmp_path)
    assert seen.returncode == 0, seen.stderr
    assert hub.puts == 2 and hub.repos[REPO]['commits'] == 1       # the first large file was not sent again
    assert set(hub.repos[REPO]['files']) == INTENDED['merged'][1] | {'README.md', 'NOTICE'}


@pytest.mark.parametrize('args, message', [(['--what', 'all'], "--what is 'all'"), (['--what', 'gguf'], 'ollama is missing; make it with: kofinetune export')])
def test_what_cannot_be_pushed(args, message, hub, run, tmp_path):
    shutil.rmtree(run/'ollama')
    assert message in one_line(push(hub, run, tmp_path, *args), 2) and hub.seen == []


@pytest.mark.parametrize('repo', ['model', 'me/mo del', 'a/b/c'])
def test_a_name_that_the_hub_does_not_take(repo, hub, run, tmp_path):
    seen = subprocess.run([*COMMAND, 'push', str(run), repo, '--accept-noncommercial'], env=environment(hub, tmp_path),
                          capture_output=True, text=True, cwd=tmp_path)
    assert repo in one_line(seen, 2) and hub.repos == {}
