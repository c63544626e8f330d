"""Break every stage in every way of the table FAULTS, give the same command again, and compare with a run that nothing disturbed.

    make faults
    python benchmarks/faults.py [--json FILE] [--quick] [--stages data,train] [--only kill] [--kills 20] [--gemma 3]

A fault is survived when the broken command ends as it should (killed, or with one line that says what to do), the same command
again ends with 0, its files are byte for byte those of the undisturbed run (but for the seconds that training took), no earlier
stage was touched, and nothing else is left in the run or the cache. Moments are drawn from --seed. Each command runs in a process
forked from this one, which has imported everything. A full or read-only disk is a small tmpfs, which only root can mount.
"""
import argparse, hashlib, json, multiprocessing, os, platform, random, re, resource, shutil, signal, socket, subprocess, sys, tempfile, threading, time
from collections import namedtuple
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from kofinetune import base, cli, data
from kofinetune.rehearsal import stand_in_base
from kofinetune.runs import STAGES as MADE, file_hashes, read_manifest, write_json, write_jsonl

FOLDERS = {made.command: name for name, made in MADE.items()}
STAGES = tuple(FOLDERS)
SMALL = {'rows': 44, 'valid_rows': 6, 'epochs': 1.0, 'max_length': 64, 'grad_accum': 2, 'save_steps': 2, 'lora_r': 4,
         'lora.lora_dropout': .1, 'max_new_tokens': 8, 'gguf': 'q8_0'}
GEMMA = {'rows': 240, 'valid_rows': 20, 'epochs': 1.0, 'save_steps': .25, 'gguf': 'q8_0',   # of the recipe laptop
         'dtype': 'fp32'}   # auto would measure again in every run that begins anew, and a busy machine may answer otherwise
TIMES = ('runtime', 'per_second', 'peak_memory_bytes')   # how the keys end that no two trainings share
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


# A command in a process, and a run to compare with

class Job:
    "A command that runs in a folder; `before` is called in its process first."
    def __init__(self, folder, args, before=()):
        self.out, self.began = Path(tempfile.mkstemp(dir=folder, suffix='.out')[1]), time.monotonic()
        self.process = multiprocessing.get_context('fork').Process(target=self.command, args=(folder, args, before))
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)            # until the process is ready for them
        self.process.start()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        self.pid, self.running = self.process.pid, self.process.is_alive

    def command(self, folder, args, before):
        os.setsid()
        for number in SIGNALS: signal.signal(number, signal.SIG_DFL)     # nohup and & ignore some
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        with self.out.open('a') as out:
            for stream in (1, 2): os.dup2(out.fileno(), stream)
        os.chdir(folder)
        sys.argv = ['kofinetune', *args]
        for do in before: do()
        cli.main()

    def wait(self, most=900):
        "Wait for the end: the exit code. What hangs, and processes that are left, are ended and counted as wrong."
        self.process.join(most)
        self.wrong = ['it hung'] * self.running()
        self.process.kill()
        self.process.join()
        self.code, self.seconds, self.text = self.process.exitcode, time.monotonic() - self.began, self.out.read_text(errors='replace')
        self.said, deadline = [line for line in self.text.splitlines() if line.startswith('kofinetune: ')], time.monotonic() + 2
        while (left := session(self.pid)) and time.monotonic() < deadline: time.sleep(.05)
        for pid in left: os.kill(pid, signal.SIGKILL)
        self.wrong += [f'{len(left)} processes are left'] * bool(left)
        return self.code

    def one_line(self, *texts):
        "What is wrong with the end of a command that should have failed with 1, in one line."
        if (self.code, len(self.said)) != (1, 1) or 'Traceback' in self.text: return [f'ended with {self.code}: {self.text[-1500:]}']
        return [f'{text!r} is not in: {self.said[0]}' for text in texts if text not in self.said[0]]


def session(leader):
    "The processes of a session."
    found = []
    for path in Path('/proc').glob('[0-9]*'):
        with suppress(OSError):
            if (path/'stat').read_text().rsplit(')', 1)[1].split()[3] == str(leader): found.append(int(path.name))
    return found


class Bench:
    "A folder with an undisturbed run, `whole`, and one to break, `run`; `begin` is a run whose finished stages are taken over."
    server, reset, also, with_it = None, staticmethod(lambda: None), staticmethod(list), False

    def __init__(self, folder, settings, stages, recipe='rehearsal', before=(), begin=None, cache=None):
        folder.mkdir()
        self.folder, self.whole, self.run, self.cache = folder, folder/'whole', folder/'run', cache or folder/'cache'
        self.options = ['--recipe', recipe, *(part for key, value in settings.items() for part in ('--set', f'{key}={value}'))]
        self.before, self.seconds, self.operations = before, {}, {}
        if begin: shutil.copytree(begin, self.whole)
        for command in stages:
            job = self.start(command, run='whole')
            if job.wait(): raise SystemExit(f'the undisturbed {command} failed:\n{job.text}')
            self.seconds[command] = job.seconds
        self.cached = files(self.cache)

    def start(self, command, *extra, run='run', before=()):
        os.environ['KOFINETUNE_CACHE'] = str(self.cache)
        return Job(self.folder, [command, '--run', run, *self.options, *extra], [*self.before, *before])

    def fresh(self, command, with_it=False):
        "Make `run` anew, with the stages before `command` done, or it too."
        there = [FOLDERS[c] for c in STAGES[:STAGES.index(command) + with_it]]
        shutil.rmtree(self.run, ignore_errors=True)
        self.run.mkdir(exist_ok=True)
        for name in there: shutil.copytree(self.whole/name, self.run/name)
        if there:
            manifest = read_manifest(self.whole)
            write_json(manifest | dict(stages={name: manifest['stages'][name] for name in there}), self.run/'manifest.json')
            shutil.copy(self.whole/'recipe.json', self.run)
        self.earlier = self.before_it(command)

    def before_it(self, command):
        "The files of the stages before `command`, with their times and bytes."
        paths = [path for c in STAGES[:STAGES.index(command)] for path in (self.run/FOLDERS[c]).glob('*')]
        return {path: (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).digest()) for path in paths}

    def made(self, folder):
        "File -> bytes, without the seconds that a training took."
        found = {name: (folder/name).read_bytes() for name in files(folder)}
        for name in {'log.jsonl', 'metrics.json'} & set(found):
            entries = map(json.loads, found[name].splitlines() if name == 'log.jsonl' else [found[name]])
            found[name] = [{k: v for k, v in entry.items() if not k.endswith(TIMES)} for entry in entries]
        return found

    def judge(self, command):
        "What is wrong with the run after the same command again."
        name = FOLDERS[command]
        if not (self.run/name).is_dir(): return [f'{name} is not there']
        here, there = self.made(self.run/name), self.made(self.whole/name)
        wrong = [f'{name}/{file} differs' for file in {*here, *there} if here.get(file) != there.get(file)]
        allowed = {'recipe.json', 'manifest.json', '.lock', 'log.txt', *(FOLDERS[c] for c in STAGES[:STAGES.index(command) + 1])}
        wrong += [f'{path.name} is left' for path in self.run.iterdir() if path.name not in allowed]
        wrong += ['an earlier stage was touched'] * (self.before_it(command) != self.earlier)
        wrong += ['the manifest has other hashes'] * (read_manifest(self.run)['stages'][name]['files'] != file_hashes(self.run/name))
        return wrong + [f'{path} in the cache' for path in set(files(self.cache)) ^ set(self.cached)] + self.also()

    def disturb(self, command, chance, act, may_end=False):
        "Start a stage and `act(job)` at a random moment; earlier, where it was done before or, unless it `may_end`, ended with 0."
        share = chance.random()
        while True:
            self.fresh(command)
            job, moment = self.start(command), share * self.seconds[command]
            job.process.join(moment)
            acted = job.running() and act(job) is not False
            if job.wait() or acted and may_end: return job, f'{moment:.2f} s'
            share *= .8


def files(folder): return sorted(str(path.relative_to(folder)) for path in folder.rglob('*') if path.is_file())


# What breaks a command. Each yields the broken job, what is wrong with its end, and the moment, and tidies up afterwards

def kill(bench, command, chance):
    job, moment = bench.disturb(command, chance, lambda job: job.process.kill())
    yield job, ['not killed'] * (job.code != -9), moment


def kill_between(bench, command, chance, force=False):
    "Killed before a rename, a removal, a new folder or a file opened to be written; half of them the last ones, which put a stage in its place."
    def start(number):
        def hook(event, args):
            if event == 'open' and not (isinstance(args[0], str) and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)): return
            if event not in ('open', 'os.rename', 'os.remove', 'os.rmdir', 'os.mkdir'): return
            os.write(counter, b'.')
            if os.fstat(counter).st_size > number: os.kill(os.getpid(), signal.SIGKILL)
        bench.fresh(command, force)
        counter = os.open(bench.folder/'operations', os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        job = bench.start(command, *['--force'] * force, before=[lambda: sys.addaudithook(hook)])
        job.wait()
        return job, os.fstat(counter).st_size
    if (command, force) not in bench.operations: bench.operations[command, force] = start(10**9)[1]
    total = bench.operations[command, force]
    number = chance.choice([chance.randrange(total), total - chance.randint(1, 6)])
    job, _ = start(number)
    yield job, [f'ended with {job.code}: {job.text[-300:]}'] * (job.code != -9), f'operation {number + 1} of {total}'


def signalled(bench, command, chance, number):
    job, moment = bench.disturb(command, chance, lambda job: os.kill(job.pid, number))
    said = f'stopped by {number.name}; continue with: kofinetune {command}'
    yield job, job.one_line(said) if job.code != -number else [], moment    # or it was not ready yet


def no_room(bench, command, chance):
    limit = int(max(path.stat().st_size for path in (bench.whole/FOLDERS[command]).iterdir()) * chance.uniform(.2, .9))
    bench.fresh(command)
    job = bench.start(command, before=[lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))])
    job.wait()
    yield job, job.one_line('could not be written', 'the same command again'), f'{limit:,} bytes a file'


@contextmanager
def tmpfs(folder):
    folder.mkdir(exist_ok=True)
    subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=256m', 'faults', folder], check=True)
    try: yield lambda options: subprocess.run(['mount', '-o', f'remount,{options}', folder], check=True)
    finally: subprocess.run(['umount', '-l', folder], check=True)


def full_disk(bench, command, chance):
    with tmpfs(bench.run) as remount:
        bench.fresh(command)
        pages = lambda folder: sum(-(-path.stat().st_size // 4096) for path in folder.rglob('*') if path.is_file())
        room = int(chance.uniform(.1, .9) * pages(bench.whole/FOLDERS[command]))
        remount(f'size={4096 * (pages(bench.run) + room)}')
        def surprise(): base.check_base = lambda *asked: None     # training asks for room first: here the disk fills later
        job = bench.start(command, before=[surprise])
        job.wait()
        remount('size=256m')
        yield job, job.one_line('could not be written', 'the same command again'), f'{4096 * room:,} bytes free'


def read_only(bench, command, chance):
    with tmpfs(bench.run) as remount:
        bench.fresh(command)
        remount('ro')
        job = bench.start(command)
        job.wait()
        remount('rw')
        yield job, job.one_line('Read-only file system'), 'from the start'


def vanish(bench, command, chance):
    "The folder that is being filled is removed."
    partial = bench.run/f'.{FOLDERS[command]}.partial'
    def act(job):
        while not partial.is_dir():
            if not job.running(): return False
            time.sleep(.001)
        shutil.rmtree(partial, ignore_errors=True)
    job, moment = bench.disturb(command, chance, act, may_end=True)
    yield job, job.one_line('could not be written', 'the same command again') if job.code else [], moment


def vanish_data(bench, command, chance):
    job, moment = bench.disturb(command, chance, lambda job: shutil.rmtree(bench.run/'data'), may_end=True)
    wrong, remade = ['no line'] * (job.code != 0 and len(job.said) != 1), bench.start('data')
    wrong += ['data could not be made again'] * (remade.wait() != 0)
    bench.earlier = bench.before_it(command)
    yield job, wrong, moment


def two_at_once(bench, command, chance):
    bench.fresh(command)
    first = bench.start(command)
    holder = bench.run/'.lock'
    while not (holder.is_file() and holder.read_text()) and first.running(): time.sleep(.001)
    os.kill(first.pid, signal.SIGSTOP)              # asleep, it holds the run all the same
    second = bench.start(command)
    second.wait()
    os.kill(first.pid, signal.SIGCONT)
    yield second, second.one_line(f'in use by another process, {first.pid}') + ['the first failed'] * (first.wait() != 0), 'at the start'


def broken_server(bench, command, chance, where, fault, says):
    bench.reset()
    bench.fresh(command, bench.with_it)
    bench.server.faults = {where: fault}
    job = bench.start(command)
    if fault == 'kill':
        while not bench.server.broken and job.running(): time.sleep(.01)
        job.process.kill()
    job.wait()
    bench.server.faults = {}
    yield job, ['not killed'] * (job.code != -9) if fault == 'kill' else job.one_line(*says), where


# A server that breaks

class Breaking(ThreadingHTTPServer):
    """`answer(method, path, headers, body)` -> (status, headers, bytes), but for the requests that `faults` names, such as
    {'POST /api/create': 'half'}: '500', 'half' (of the answer), 'silent', 'dies', 'kill' (somebody) or the bytes to say instead."""
    silence, broken, die = 6, False, staticmethod(lambda: None)

    def __init__(self, answer):
        super().__init__(('127.0.0.1', 0), Answers)
        self.answer, self.faults, self.url = answer, {}, f'http://127.0.0.1:{self.server_port}'
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, request, client_address): pass     # a client that has gone


class Answers(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    def log_message(self, *args): pass

    def read(self):
        if 'chunked' not in self.headers.get('Transfer-Encoding', ''): return self.rfile.read(int(self.headers.get('Content-Length', 0)))
        body = b''
        while size := int(self.rfile.readline(), 16): body += self.rfile.read(size + 2)[:-2]
        return body + self.rfile.readline()[:0]

    def do_GET(self):
        server, body, self.close_connection = self.server, self.read(), True
        fault = next((fault for where, fault in server.faults.items() if re.search(where, f'{self.command} {self.path}')), None)
        server.broken = fault is not None
        if fault in ('silent', 'kill'): time.sleep(server.silence)
        if fault == 'dies': server.die()
        if fault in ('silent', 'kill', 'dies'): return
        if isinstance(fault, bytes): status, headers, said = 200, {}, fault
        elif fault == '500': status, headers, said = 500, {}, b'{"error": "no room left in the engine"}'
        else: status, headers, said = server.answer(self.command, self.path, self.headers, body)
        self.send_response(status)
        for name, value in (dict(Connection='close') | headers | {'Content-Length': str(len(said))}).items(): self.send_header(name, value)
        self.end_headers()
        if self.command != 'HEAD': self.wfile.write(said[:len(said) // 2] if fault == 'half' else said)

    do_POST = do_HEAD = do_DELETE = do_GET


# Other benches than that of the stand-in model

@contextmanager
def download(scratch, first):
    "A source that is downloaded."
    import pooch.downloaders
    rows = write_jsonl(data.load_rows('rehearsal')[:80], scratch/'remote.jsonl')
    server = Breaking(lambda method, path, headers, body: (200, {}, rows.read_bytes()))
    remote = dict(url=server.url + '/remote.jsonl', blob=data._git_blob_id(rows))
    def before():
        no_proxy()
        data._SOURCES, pooch.downloaders.DEFAULT_TIMEOUT = {'koalpaca-v1.0': remote}, 1
    bench = Bench(scratch/'download', dict(source='koalpaca-v1.0', valid_rows=8), ['data'], before=[before])
    bench.server, bench.reset = server, lambda: shutil.rmtree(bench.cache)
    yield bench
    server.shutdown()


@contextmanager
def hub(scratch, first):
    "A base of the Hub: its client tries some times and gives up, and the same command goes on."
    from huggingface_hub import constants
    folder, cache, commit = next(first.cache.glob('rehearsal-base-*')), scratch/'hub-cache', '0' * 39 + '1'
    def answer(method, path, headers, body):
        file = folder/path.split('?')[0].rsplit('/', 1)[-1]
        if '/resolve/' not in path or not file.is_file(): return 404, {'X-Error-Code': 'EntryNotFound'}, b'{}'
        said, start = file.read_bytes(), int(headers.get('Range', 'bytes=0-')[6:].split('-')[0])
        more = {'Content-Range': f'bytes {start}-{len(said) - 1}/{len(said)}'} if start else {}
        return 206 if start else 200, more | {'ETag': f'"{hashlib.sha256(said).hexdigest()}"', 'X-Repo-Commit': commit}, said[start:]
    server = Breaking(answer)
    def before():
        no_proxy()
        constants.ENDPOINT, constants.HUGGINGFACE_CO_URL_TEMPLATE = server.url, server.url + '/{repo_id}/resolve/{revision}/{filename}'
        constants.HF_HUB_OFFLINE, constants.HF_HUB_CACHE, constants.HF_HUB_DISABLE_XET = False, str(cache), True
        time.sleep = lambda seconds, sleep=time.sleep: sleep(min(seconds, .05))       # between two tries
    first.fresh('train')
    bench = Bench(scratch/'hub', SMALL | dict(base='me/base', revision=commit), ['train'], before=[before], begin=first.run, cache=first.cache)
    bench.server, bench.reset = server, lambda: shutil.rmtree(cache)
    yield bench
    server.shutdown()


def no_proxy():
    for name in [name for name in os.environ if name.lower().endswith('_proxy')]: del os.environ[name]


@contextmanager
def ollama(scratch, first):
    "The registration of a finished export with a real Ollama server, through one that breaks."
    import httpx
    from kofinetune import server as asking
    program = shutil.which('ollama') or shutil.which(Path.home()/'go'/'bin'/'ollama')
    if not program: raise LookupError('Ollama, whose program was not found')
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); real = f'127.0.0.1:{s.getsockname()[1]}'
    env = os.environ | dict(OLLAMA_HOST=real, OLLAMA_MODELS=str(scratch/'models'), HOME=str(scratch), OLLAMA_NUM_PARALLEL='1')
    running, one_at_a_time = [], threading.Lock()
    def die():
        while running: running[0].kill(); running.pop().wait()
    def begin():
        die()
        with (scratch/'serve.log').open('a') as log: running.append(subprocess.Popen([program, 'serve'], env=env, stdout=log, stderr=log))
        while True:
            with suppress(httpx.HTTPError): return httpx.get(f'http://{real}/api/version')
            time.sleep(.1)
    def empty():
        shutil.rmtree(scratch/'models', ignore_errors=True)
        begin()
    def answer(method, path, headers, body):
        with one_at_a_time:
            if not running: begin()                          # by the time of the same command again
        said = httpx.request(method, f'http://{real}{path}', content=body, timeout=60)
        return said.status_code, {'Content-Type': 'application/json'}, said.content
    def others():
        names = [model['name'] for model in httpx.get(f'http://{real}/api/tags').json()['models']]
        return [f'it serves {names}'] * (names != [NAME])
    server = Breaking(answer)
    def before():
        os.environ['OLLAMA_HOST'] = server.url
        if 'silent' in server.faults.values(): asking._PATIENCE = 3
    try:
        empty()
        first.fresh('export', with_it=True)
        bench = Bench(scratch/'ollama', SMALL, ['export'], before=[before], begin=first.run, cache=first.cache)
        bench.server, bench.reset, bench.also, bench.with_it, server.die = server, empty, others, True, die
        yield bench
    finally:
        server.shutdown()
        die()


@contextmanager
def gemma(scratch, first):
    "Real Gemma 3 270M, with every core."
    import torch
    try: base._packaged_files('gemma-3-270m-q4')
    except FileNotFoundError as e: raise LookupError(f'real Gemma ({e})') from None
    cores = lambda: torch.set_num_threads(os.cpu_count())
    yield Bench(scratch/'gemma', GEMMA, STAGES[:4], 'laptop', before=[cores], cache=first.cache)


# The table: what happens, what does it, to which commands, and to which of them in the short form; how often, of --kills or --gemma

NAME, FILE, STEP = 'kofinetune-rehearsal:latest', 'model-q8_0.gguf', b'{"status": "using"}\n'
UNDONE = '{"response": "네", "done": false, "context": [], "prompt_eval_count": 1}'.encode()
OLLAMA = {   # what an Ollama server does: at which request, how, and what the one line says
    'dies while it takes the file': ('POST /api/blobs', 'dies', f'broke off while taking {FILE}'),
    'dies while it answers': ('POST /api/generate', 'dies', 'broke off while answering'),
    'answers 500 to an upload': ('/api/blobs', '500', f'answers 500 while taking {FILE}: no room left in the engine; see what it printed'),
    'answers 500 to create': ('/api/create', '500', f'answers 500 while taking {FILE}: no room left in the engine'),
    'answers 500 to a question': ('/api/generate', '500', 'answers 500 while answering: no room left in the engine'),
    'says nothing to an upload': ('POST /api/blobs', 'silent', f'broke off while taking {FILE} ('),
    'says nothing to a question': ('/api/generate', 'silent', 'Timeout); start it again with: ollama serve'),
    'ends an answer with done: false': ('/api/generate', UNDONE, 'broke off an answer (done: false)'),
    'answers what is no JSON': ('/api/generate', b'<html>', 'broke off while answering (JSONDecodeError)'),
    'creates what is no JSON': ('/api/create', b'<html>\n', f'broke off while taking {FILE} (JSONDecodeError)'),
    'fails in the middle of create': ('/api/create', STEP + b'{"error": "bad magic"}\n', f'answers while taking {FILE}: bad magic'),
    'breaks off create': ('/api/create', 'half', f'broke off while taking {FILE}'),
    'does not end create': ('/api/create', STEP, "stopped at 'using' while it made"),
}
Fault = namedtuple('Fault', 'name breaks commands quick share', defaults=('', 0))
ALL = ' '.join(STAGES)
LOADED = ('could not be downloaded', 'try again')
FAULTS = {   # bench -> its faults
    '': [
        Fault('kill -9 at a random moment', kill, ALL, ALL, 1),
        Fault('kill -9 before a file operation', kill_between, ALL, ALL, .5),
        Fault('kill -9 before a file operation of --force', partial(kill_between, force=True), 'data merge', '', .5),
        Fault('SIGTERM', partial(signalled, number=signal.SIGTERM), ALL, 'train export'),
        Fault('SIGINT', partial(signalled, number=signal.SIGINT), ALL, 'data eval'),
        Fault('SIGHUP', partial(signalled, number=signal.SIGHUP), ALL, 'merge'),
        Fault('no room (RLIMIT_FSIZE)', no_room, ALL, ALL),
        Fault('no room (a full tmpfs)', full_disk, ALL),
        Fault('a read-only folder', read_only, ALL, 'data train'),
        Fault('its own folder vanishes', vanish, ALL, 'data train'),
        Fault('the folder of data vanishes', vanish_data, 'train merge export eval', 'train'),
        Fault('two at once', two_at_once, ALL, 'data train')],
    'download': [Fault(name, partial(broken_server, where='', fault=fault, says=LOADED), 'data', 'data') for name, fault in (
        ('the network drops in the middle', 'half'), ('the server answers 500', '500'), ('the server says nothing', 'silent'),
        ('kill -9 in the middle', 'kill'))],
    'Hub': [Fault('the network drops, again and again', partial(broken_server, where='GET .*safetensors', fault='half', says=(
        "base 'me/base' could not be loaded", 'run the same command again')), 'train', 'train')],
    'Ollama': [Fault(name, partial(broken_server, where=where, fault=fault, says=(line, 'run the same command again')), 'export',
                     'export' * (name == 'dies while it answers')) for name, (where, fault, line) in OLLAMA.items()],
    'Gemma 3 270M': [Fault('kill -9 at a random moment', kill, 'train merge export')],
}
BENCHES = {'download': download, 'Hub': hub, 'Ollama': ollama, 'Gemma 3 270M': gemma}


def try_fault(bench, label, fault, command, chance, rows):
    "Break a command, give it again, judge, and add to the row of the report."
    with contextmanager(fault.breaks)(bench, command, chance) as (job, wrong, moment):
        again = bench.start(command)
        wrong += job.wrong + ([f'the same command again ends with {again.code}: {again.text[-800:]}'] if again.wait() else bench.judge(command))
    where = (f'{command}, {label}' if label else command, fault.name)
    row = rows.setdefault(where, dict(stage=where[0], fault=where[1], tried=0, survived=0, lost=0, moments=[], said='', problems=[]))
    row['tried'] += 1
    row['lost' if wrong else 'survived'] += 1
    row['moments'].append(moment)
    row['said'] = row['said'] or ''.join(job.said[:1])
    if not wrong: return
    row['problems'].append(f'{moment}: {"; ".join(wrong)}')
    print('LOST', *where, row['problems'][-1], sep=', ', flush=True)


def warm_up():
    "Import what the stages import, before anything is forked."
    import bitsandbytes, gguf, matplotlib.figure, ollama, pandas, peft, sacrebleu, scipy.stats, torch, trl, xllamacpp   # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3ForCausalLM, GemmaTokenizer   # noqa: F401
    from trl import SFTTrainer   # noqa: F401
    from kofinetune import eval as _, export, merge, train   # noqa: F401
    torch.set_num_threads(1)
    export.load_rows = lambda source: data.load_rows(source)[:40]    # prove the export on fewer prompts


def can_mount(scratch):
    if os.geteuid() or not shutil.which('mount'): return False
    with suppress(subprocess.CalledProcessError), tmpfs(scratch/'try'): return True
    return False


def table(report):
    "The report as Markdown."
    cell = lambda text: str(text).replace('|', '\\|').replace('\n', ' ')
    names = ('stage', 'fault', 'tried', 'survived', 'lost', 'said')
    lines = ['# Faults', '', f'{report["tried"]:,} faults tried, {report["survived"]:,} survived, {report["lost"]:,} lost. Seed {report["seed"]}, '
             f'{report["seconds"]:,.0f} s on {report["machine"]["processor"]}, {report["machine"]["cores"]} cores. What survived means, and what a row '
             'means, is said in `benchmarks/faults.py`.', '', '| stage | fault | tried | survived | lost | the line that the first one ended with |',
             '|---|---|--:|--:|--:|---|', *('| ' + ' | '.join(cell(row[name]) for name in names) + ' |' for row in report['rows'])]
    return '\n'.join([*lines, '', *(f'Not tried: {text}.' for text in report['not_tried'])]).rstrip() + '\n'


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--json', type=Path, help='write the report there, and a table beside it')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--kills', type=int, default=20, help='kill -9 of each stage, at random moments; half as many before file operations')
    parser.add_argument('--gemma', type=int, default=0, help='kills of train, merge and export on real Gemma (the extra gemma): half an hour')
    parser.add_argument('--stages', default=','.join(STAGES))
    parser.add_argument('--only', default='', help='a part of the names of the faults to try')
    parser.add_argument('--quick', action='store_true', help='one fault of each kind, and not all kinds for all stages: two minutes')
    args = parser.parse_args()
    os.environ |= dict(OMP_NUM_THREADS='1', TQDM_DISABLE='1', TRANSFORMERS_VERBOSITY='error', TOKENIZERS_PARALLELISM='false', HF_HUB_OFFLINE='1',
                       BITSANDBYTES_NOWELCOME='1', COLUMNS='200', OLLAMA_HOST='127.0.0.1:9')    # where no Ollama answers
    began, wanted, rows, not_tried = time.monotonic(), args.stages.split(','), {}, []
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))      # so that servers and mounts go too
    warm_up()
    with tempfile.TemporaryDirectory(prefix='faults-') as scratch:
        scratch = Path(scratch)
        shutil.copytree(stand_in_base(), scratch/'cache'/stand_in_base().name)     # made once for all; it takes minutes
        first = Bench(scratch/'first', SMALL, STAGES[:max(map(STAGES.index, wanted)) + 1], cache=scratch/'cache')
        versions = read_manifest(first.whole)['versions']
        print('undisturbed, seconds: ' + ', '.join(f'{c} {s:.1f}' for c, s in first.seconds.items()), flush=True)
        cannot = () if can_mount(scratch) else (full_disk, read_only)
        not_tried += ['a full and a read-only tmpfs, which need root that may mount'] * bool(cannot)
        for label, faults in FAULTS.items():
            chosen = [(fault, command) for command in wanted for fault in faults if args.only in fault.name and fault.breaks not in cannot
                      and command in (fault.quick if args.quick else fault.commands).split()]
            if label.startswith('Gemma') and not args.gemma: chosen = not_tried.append('real Gemma; with --gemma 3')
            if not chosen: continue
            try:
                with BENCHES[label](scratch, first) if label else nullcontext(first) as bench:
                    for fault, command in chosen:
                        times = args.gemma if label.startswith('Gemma') else 1 if args.quick else max(1, int(args.kills * fault.share))
                        chance = random.Random(f'{args.seed} {label} {command} {fault.name}')
                        for _ in range(times): try_fault(bench, label, fault, command, chance, rows)
                        print(f'{time.monotonic() - began:6.0f} s  {command} {label} {fault.name}', flush=True)
            except LookupError as e: not_tried.append(str(e))
    rows = list(rows.values())
    found = re.search(r'model name\s*: (.*)', Path('/proc/cpuinfo').read_text()) if Path('/proc/cpuinfo').is_file() else None
    machine = dict(processor=found[1] if found else platform.machine(), cores=os.cpu_count(), python=platform.python_version(), system=platform.system())
    report = {key: sum(row[key] for row in rows) for key in ('tried', 'survived', 'lost')} | dict(
        seed=args.seed, seconds=round(time.monotonic() - began, 1), undisturbed_seconds={c: round(s, 2) for c, s in first.seconds.items()},
        rows=rows, not_tried=not_tried, versions=versions, machine=machine)
    report = json.loads(json.dumps(report).replace(str(scratch), '...'))
    if args.json:
        write_json(report, args.json)
        args.json.with_suffix('.md').write_text(table(report), encoding='utf-8', newline='\n')
    print(table(report))
    print(json.dumps(report, ensure_ascii=False))
    sys.exit(bool(report['lost']))


if __name__ == '__main__': main()
