"""Break every stage in every way we can think of, give the same command again, and compare with a run that nothing disturbed.

    make faults
    python benchmarks/faults.py --json benchmarks/results/faults.json [--kills 20] [--gemma 3] [--signals 1] [--stages data,train] [--seed 0] [--quick]

A fault is survived when the command that was broken ends as it should (killed, or one line that says what to do), the same command
again ends with 0, the stage's files are byte for byte those of the undisturbed run (but for the seconds that training took), the
stages before it were not touched, and nothing else is left in the run folder or the cache. Faults happen at moments drawn from --seed.

The command runs in processes forked from this one, which has imported everything: so a kill costs seconds. Disk faults need a small
tmpfs, which only root can mount; without it, RLIMIT_FSIZE and chmod stand in. The last line printed is the JSON that is written;
a table goes to a .md file beside it.
"""
import argparse, contextlib, copy, hashlib, json, os, platform, random, re, resource, shutil, signal, subprocess, sys, tempfile, threading, time, traceback
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path

os.environ |= dict(OMP_NUM_THREADS='1', TQDM_DISABLE='1', TRANSFORMERS_VERBOSITY='error', TOKENIZERS_PARALLELISM='false', HF_HUB_OFFLINE='1',
                   BITSANDBYTES_NOWELCOME='1', COLUMNS='200')

from kofinetune import base, cli, data, runs
from kofinetune.runs import COMMANDS, file_hashes, working_on, write_json, write_jsonl
from kofinetune.data import load_rows

FOLDERS = {command: name for name, command in COMMANDS.items()}
SETTINGS = dict(rows=44, valid_rows=6, epochs=1.0, max_length=64, grad_accum=2, save_steps=2, lora_r=4, **{'lora.lora_dropout': .1},
                max_new_tokens=8, gguf='q8_0')
GEMMA_SETTINGS = dict(rows=240, valid_rows=20, epochs=1.0, save_steps=.25, gguf='q8_0')   # of the recipe laptop
SECONDS = {'train_runtime', 'train_samples_per_second', 'train_steps_per_second', 'eval_runtime', 'eval_samples_per_second',
           'eval_steps_per_second', 'predicted_seconds', 'tokens_per_second', 'peak_memory_bytes'}   # what no two trainings share
NOBODY = '127.0.0.1:9'   # where no Ollama answers


def warm_up():
    "Import what the stages import, before anything is forked."
    import bitsandbytes, gguf, matplotlib.figure, ollama, pandas, peft, sacrebleu, scipy.stats, torch, trl, xllamacpp   # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3ForCausalLM, GemmaTokenizer   # noqa: F401
    from trl import SFTTrainer   # noqa: F401
    from kofinetune import eval as _, export, merge, train   # noqa: F401
    torch.set_num_threads(1)
    data.load_rows = lambda source: load_rows(source)[:40]    # prove the export on fewer prompts


class Job:
    "The command in a process of its own: `Job(bench, ['train', '--run', 'x'])`. `before` is called in it first."
    def __init__(self, bench, args, before=()):
        self.out = Path(tempfile.mkstemp(dir=bench.scratch, suffix='.out')[1])
        sys.stdout.flush()
        signals = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
        signal.pthread_sigmask(signal.SIG_BLOCK, signals)      # until the child is ready for them
        self.start, self.pid = time.monotonic(), os.fork()
        if self.pid: signal.pthread_sigmask(signal.SIG_UNBLOCK, signals); return
        code = 70
        try:
            os.setsid()
            for number in signals: signal.signal(number, signal.SIG_DFL)     # nohup and & ignore some
            signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
            out = os.open(self.out, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(out, 1); os.dup2(out, 2)
            os.chdir(bench.work)
            sys.argv = ['kofinetune', *args]
            for do in before: do()
            try: cli.main()
            except SystemExit as e: code = e.code or 0
        except BaseException: traceback.print_exc()
        finally:
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(OSError): stream.flush()
            os._exit(code)

    def running(self):
        if hasattr(self, 'code'): return False
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if pid: self.code, self.seconds = os.waitstatus_to_exitcode(status), time.monotonic() - self.start
        return not pid

    def wait(self, most=300):
        "Wait for the end, in naps (a machine that sleeps does not count); a process that hangs is killed and counts as lost."
        for self.naps in range(10**9):
            if not self.running(): return self.code
            if self.naps == most * 200: os.kill(self.pid, signal.SIGKILL); self.hung = True
            time.sleep(.005)

    def orphans(self):
        "Processes that it started and that are still there a moment after its end; they are ended."
        for _ in range(40):
            left = [int(p.name) for p in Path('/proc').glob('[0-9]*') if session(p) == str(self.pid)]
            if not left: return []
            time.sleep(.05)
        for pid in left: os.kill(pid, signal.SIGKILL)
        return [f'{len(left)} processes are left']

    @property
    def text(self): return self.out.read_text(encoding='utf-8', errors='replace')

    @property
    def errors(self): return [line for line in self.text.splitlines() if line.startswith('kofinetune: ')]


def session(process):
    "The session that a process of /proc belongs to."
    with contextlib.suppress(OSError): return (process/'stat').read_text().rsplit(')', 1)[1].split()[3]


def file_size(limit): return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
def patched(module, **values): return lambda: [setattr(module, name, value) for name, value in values.items()]


def at_operation(number, count_into=None):
    "Kill this process before its file operation `number` (a rename, a removal, a new folder, a file opened to be written), or count them."
    def install():
        seen = [0]
        def hook(event, args):
            if event == 'open' and not (isinstance(args[0], str) and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)): return
            if event not in ('open', 'os.rename', 'os.remove', 'os.rmdir', 'os.mkdir'): return
            if count_into: return os.write(counter, b'.')
            if seen[0] == number: os.kill(os.getpid(), signal.SIGKILL)
            seen[0] += 1
        if count_into: counter = os.open(count_into, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        sys.addaudithook(hook)
    return install


class Bench:
    "Scratch folders, an undisturbed run, and what to compare with it."
    def __init__(self, scratch, seed, stages, mount):
        self.scratch, self.seed, self.rows, self.can_mount = Path(scratch), seed, [], mount
        self.work = self.scratch/'work'
        self.work.mkdir()
        os.environ['OLLAMA_HOST'] = NOBODY
        settings = [f'{k}={v}' for k, v in SETTINGS.items()]
        self.settings = ['--recipe', 'rehearsal', *(part for s in settings for part in ('--set', s))]
        self.whole, self.seconds = self.work/'whole', {}
        for command in stages:
            job = Job(self, self.command(command, 'whole'))
            if job.wait(): raise SystemExit(f'the undisturbed {command} failed:\n{job.text}')
            self.seconds[command] = job.seconds
        self.cached = self.cache()

    def command(self, command, run): return [command, '--run', str(run), *self.settings]

    def cache(self): return sorted(str(p) for p in data.cache_dir().glob('*')) + sorted(str(p) for p in data.cache_dir().glob('sources/*'))

    def before(self, command):
        order = list(FOLDERS)
        return [FOLDERS[c] for c in order[:order.index(command)]]

    def fresh(self, command, run):
        "A run whose stages before `command` are done."
        shutil.rmtree(run, ignore_errors=True)
        run.mkdir(exist_ok=True)
        for name in self.before(command): shutil.copytree(self.whole/name, run/name)
        manifest = json.loads((self.whole/'manifest.json').read_text(encoding='utf-8'))
        manifest['stages'] = {n: s for n, s in manifest['stages'].items() if n in self.before(command)}
        if manifest['stages']:
            write_json(manifest, run/'manifest.json')
            shutil.copy(self.whole/'recipe.json', run)
        return run

    def touched(self, command, run): return {p: (p.stat().st_ino, p.stat().st_mtime_ns, hashlib.sha256(p.read_bytes()).hexdigest())
                                             for n in self.before(command) for p in sorted((run/n).glob('*'))}

    def artifacts(self, folder):
        "File -> bytes, without the seconds that a training took."
        made = {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob('*') if p.is_file()}
        for name in ('log.jsonl', 'metrics.json'):
            if name not in made: continue
            entries = [json.loads(line) for line in made[name].splitlines()] if name == 'log.jsonl' else [json.loads(made[name])]
            made[name] = [{k: v for k, v in e.items() if k not in SECONDS} for e in entries]
        return made

    def judge(self, command, run, earlier):
        "What is wrong with a run after the same command again; empty where nothing is."
        name, wrong = FOLDERS[command], []
        if not (run/name).is_dir(): return [f'{name} is not there']
        here, there = self.artifacts(run/name), self.artifacts(self.whole/name)
        wrong += [f'{name}/{file} differs' for file in sorted(here.keys() | there.keys()) if here.get(file) != there.get(file)]
        allowed = {*self.before(command), name, 'recipe.json', 'manifest.json', '.lock', 'log.txt'}
        wrong += [f'{p.name} is left' for p in run.iterdir() if p.name not in allowed]
        if self.touched(command, run) != earlier: wrong.append('an earlier stage was touched')
        manifest = json.loads((run/'manifest.json').read_text(encoding='utf-8'))
        if manifest['stages'][name]['files'] != file_hashes(run/name): wrong.append('the manifest has other hashes')
        wrong += [f'{p} is left' for p in self.cache() if p not in self.cached]
        return wrong

    def record(self, stage, fault, wrong, said, moment):
        "Add one fault to its row."
        row = next((r for r in self.rows if (r['stage'], r['fault']) == (stage, fault)), None)
        if row is None: self.rows.append(row := dict(stage=stage, fault=fault, tried=0, survived=0, lost=0, moments=[], said='', problems=[]))
        row['tried'] += 1
        row['lost' if wrong else 'survived'] += 1
        row['moments'].append(moment)
        row['said'] = row['said'] or said
        row['problems'] += [f'{moment}: {"; ".join(wrong)}'] if wrong else []
        if wrong: print(f'LOST {stage}, {fault}, {moment}: {"; ".join(wrong)}', flush=True)

    def again(self, stage, fault, command, run, earlier, broken, wrong, moment, args=None, before=()):
        "Give the same command again, and judge."
        wrong = [*wrong, *broken.orphans(), *['it hung'] * hasattr(broken, 'hung')]
        if self.before(command) and fault not in VANISHING and self.touched(command, run) != earlier: wrong = [*wrong, 'it touched an earlier stage']
        job = Job(self, args or self.command(command, run), before)
        if job.wait(): wrong = [*wrong, f'the same command again ends with {job.code}: {job.errors or job.text[-800:]}']
        else: wrong = [*wrong, *self.judge(command, run, earlier)]
        self.record(stage, fault, wrong, broken.errors[0] if broken.errors else '', moment)
        for p in (job.out, broken.out): p.unlink()


VANISHING = ('its own folder vanishes', 'the folder of data vanishes')


def one_line(job, *texts, code=1):
    "What is wrong with the end of a command that should have failed in one line."
    wrong = []
    if job.code != code: wrong.append(f'ended with {job.code}, not {code}: {job.text[-500:]}')
    if len(job.errors) != 1: wrong.append(f'{len(job.errors)} lines of error: {job.errors or job.text[-500:]}')
    else: wrong += [f'{text!r} is not in: {job.errors[0]}' for text in texts if text not in job.errors[0]]
    if 'Traceback' in job.text: wrong.append('a traceback: ' + job.text[-1500:])
    return wrong


def disturbed(bench, command, chance, act, prepare=None, before=(), extra=()):
    "Start a stage, and `act(pid, run)` at a random moment of it; a stage that was done sooner is started again. (run, earlier, job, moment)"
    share = chance.random()
    for _ in range(8):
        run = bench.fresh(command, bench.work/'run')
        if prepare: prepare(run)
        earlier, wait = bench.touched(command, run), share * bench.seconds[command]
        job = Job(bench, [*bench.command(command, 'run'), *extra], before)
        while job.running() and time.monotonic() - job.start < wait: time.sleep(.001)
        if job.running():
            act(job.pid, run)
            return run, earlier, job, f'{wait:.2f} s'
        share *= .8
    raise SystemExit(f'{command} is always done before it can be disturbed')


def kills(bench, command, chance, times):
    for _ in range(times):
        while True:
            run, earlier, job, moment = disturbed(bench, command, chance, lambda pid, run: os.kill(pid, signal.SIGKILL))
            if job.wait(): break          # 0: it was done when the signal came
        bench.again(command, 'kill -9 at a random moment', command, run, earlier, job, [] if job.code == -9 else ['not killed'], moment)


def kills_at_operations(bench, command, chance, times, last=12, force=False):
    "Killed between two steps of writing, renaming and removing: the `last`, which put a stage in its place, and others up to `times`."
    name, extra = 'kill -9 before a file operation' + (' of --force' if force else ''), ['--force'] if force else []
    def start(before):
        run = bench.fresh(command, bench.work/'run')
        if force:
            shutil.copytree(bench.whole/FOLDERS[command], run/FOLDERS[command])
            manifest = json.loads((bench.whole/'manifest.json').read_text(encoding='utf-8'))
            manifest['stages'] = {n: s for n, s in manifest['stages'].items() if n in (*bench.before(command), FOLDERS[command])}
            write_json(manifest, run/'manifest.json')
            shutil.copy(bench.whole/'recipe.json', run)
        return run, bench.touched(command, run), Job(bench, [*bench.command(command, 'run'), *extra], [before])
    counter = bench.scratch/'operations'
    counter.write_bytes(b'')
    _, _, job = start(at_operation(None, counter))
    if job.wait(): raise SystemExit(job.text)
    total = len(counter.read_bytes())
    ends = list(range(total))[-last:]
    rest = [i for i in range(total) if i not in ends]
    chosen = ends + chance.sample(rest, min(len(rest), max(0, times - len(ends))))
    for number in sorted(chosen):
        run, earlier, job = start(at_operation(number))
        job.wait()
        bench.again(command, name, command, run, earlier, job, [] if job.code == -9 else [f'ended with {job.code}: {job.text[-300:]}'],
                    f'operation {number + 1} of {total}')


def signals(bench, command, chance, times, quick):
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    for number in (chance.choice(numbers),) if quick else numbers:
        for _ in range(times):
            while True:
                run, earlier, job, moment = disturbed(bench, command, chance, lambda pid, run: os.kill(pid, number))
                if job.wait() or job.naps > 20: break          # 0 at once: it was done when the signal came
            wrong = one_line(job, number.name if number != signal.SIGINT else 'interrupted', 'go on with: kofinetune ' + command) if job.code != -number else []
            if job.naps > 60 * 200: wrong.append('it took more than a minute to stop')
            if (run/f'.{FOLDERS[command]}.partial').exists() and job.code == 1: wrong.append('it left a half-made folder')
            bench.again(command, number.name, command, run, earlier, job, wrong, moment)


def full_disks(bench, command, chance, times, quick):
    sizes = [p.stat().st_size for p in (bench.whole/FOLDERS[command]).iterdir()]
    for _ in range(times):
        limit = int(max(sizes) * chance.uniform(.2, .9))
        run = bench.fresh(command, bench.work/'run')
        earlier, job = bench.touched(command, run), Job(bench, bench.command(command, 'run'), [file_size(limit)])
        job.wait()
        bench.again(command, 'no room (RLIMIT_FSIZE)', command, run, earlier, job, one_line(job, 'could not be written'), f'{limit:,} bytes a file')
    for _ in range(times if bench.can_mount and not quick else 0):
        with tmpfs(bench.work/'run'):
            run = bench.fresh(command, bench.work/'run')
            pages = lambda folder: sum(-(-p.stat().st_size // 4096) for p in folder.rglob('*') if p.is_file())
            room = int(chance.uniform(.1, .9) * pages(bench.whole/FOLDERS[command]))
            remount(run, f'size={4096 * (pages(run) + room)}')
            # training asks for room first, and would not begin: here the disk fills behind its back
            earlier, job = bench.touched(command, run), Job(bench, bench.command(command, 'run'), [patched(base, check_room=lambda *asked: None)])
            job.wait()
            wrong = one_line(job, 'could not be written')
            remount(run, 'size=256m')
            bench.again(command, 'no room (a full tmpfs)', command, run, earlier, job, wrong, f'{4096 * room:,} bytes free')


def read_only(bench, command):
    if not bench.can_mount and os.geteuid() == 0: return
    with tmpfs(bench.work/'run') if bench.can_mount else contextlib.nullcontext():
        run = bench.fresh(command, bench.work/'run')
        def lock(on):
            if bench.can_mount: remount(run, 'ro' if on else 'rw')
            else:
                for p in (run, *run.rglob('*')): p.chmod(p.stat().st_mode & ~0o222 if on else p.stat().st_mode | 0o200)
        lock(True)
        earlier, job = bench.touched(command, run), Job(bench, bench.command(command, 'run'))
        job.wait()
        lock(False)
        bench.again(command, 'a read-only folder', command, run, earlier, job, one_line(job, 'could not be written'), 'from the start')


def vanishing(bench, command, chance, times):
    for _ in range(times):
        gone = []
        def act(pid, run):
            partial = run/f'.{FOLDERS[command]}.partial'
            while not partial.is_dir() and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None: time.sleep(.001)
            if partial.is_dir(): gone.append(shutil.rmtree(partial, ignore_errors=True))
        while not gone:                                        # none: the stage was in its place already
            run, earlier, job, moment = disturbed(bench, command, chance, act)
            job.wait()
        job.wait()
        wrong = one_line(job, 'vanished', 'kofinetune run') if job.code else bench.judge(command, run, earlier)
        bench.again(command, VANISHING[0], command, run, earlier, job, wrong, moment)
        if command == 'data': continue
        run, earlier, job, moment = disturbed(bench, command, chance, lambda pid, run: shutil.rmtree(run/'data'))
        job.wait()
        wrong = one_line(job, 'kofinetune ', code=job.code) if job.code else []
        remade = Job(bench, bench.command('data', 'run'))
        wrong += [f'data could not be made again: {remade.errors}'] * bool(remade.wait())
        bench.again(command, VANISHING[1], command, run, bench.touched(command, run), job, wrong, moment)


def two_at_once(bench, command):
    run = bench.fresh(command, bench.work/'run')
    earlier, first = bench.touched(command, run), Job(bench, bench.command(command, 'run'))
    while not working_on(run) and first.running(): time.sleep(.001)
    os.kill(first.pid, signal.SIGSTOP)              # asleep, it holds the run all the same
    second = Job(bench, bench.command(command, 'run'))
    second.wait()
    os.kill(first.pid, signal.SIGCONT)
    wrong = one_line(second, f'in use by another process, {first.pid}')
    if first.wait(): wrong.append(f'the first ended with {first.code}: {first.text[-500:]}')
    bench.again(command, 'two at once', command, run, earlier, second, wrong, 'at the start')


@contextlib.contextmanager
def tmpfs(folder):
    folder.mkdir(exist_ok=True)
    subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=64m', 'faults', folder], check=True)
    try: yield
    finally:
        subprocess.run(['umount', '-l', folder], check=True)
        shutil.rmtree(folder)


def remount(folder, options): subprocess.run(['mount', '-o', f'remount,{options}', folder], check=True)


def can_mount(scratch):
    if os.geteuid() or not shutil.which('mount'): return False
    folder = Path(scratch)/'try'
    folder.mkdir()
    done = subprocess.run(['mount', '-t', 'tmpfs', 'faults', folder], capture_output=True)
    if done.returncode == 0: subprocess.run(['umount', folder], check=True)
    return done.returncode == 0


def large_source(bench, chance, times):
    "Rows prepared on disk, line by line."
    source = write_jsonl(load_rows('rehearsal') * 3, bench.work/'large.jsonl')
    args = ['data', '--run', 'run', '--recipe', 'rehearsal', '--set', f'source={source}', '--set', 'valid_rows=8']
    before = [patched(data, _LARGE=0)]
    reference = bench.work/'large'
    job = Job(bench, ['data', '--run', 'large', *args[3:]], before)
    if job.wait(): raise SystemExit(job.text)
    whole = bench.artifacts(reference/'data')
    for _ in range(times):
        for share in [chance.random() * .8 ** n for n in range(8)]:
            shutil.rmtree(bench.work/'run', ignore_errors=True)
            killed = Job(bench, args, before)
            while killed.running() and time.monotonic() - killed.start < share * job.seconds: time.sleep(.001)
            if killed.running(): os.kill(killed.pid, signal.SIGKILL); break
        killed.wait()
        wrong, again = killed.orphans(), Job(bench, args, before)
        if again.wait(): wrong.append(f'the same command again ends with {again.code}: {again.errors}')
        elif bench.artifacts(bench.work/'run'/'data') != whole: wrong.append('data differs')
        wrong += [f'{p.name} is left' for p in (bench.work/'run').iterdir() if p.name not in ('data', 'recipe.json', 'manifest.json', '.lock', 'log.txt')]
        bench.record('data, on disk', 'kill -9 at a random moment', wrong, '', f'{share * job.seconds:.2f} s')


class Quiet(ThreadingHTTPServer):
    "A server that does not print when a client has gone."
    def handle_error(self, request, client_address): pass


class Server(BaseHTTPRequestHandler):
    "An HTTP server that breaks off, says 500, or says nothing, as `faults` (a list, one entry a request) tells."
    protocol_version = 'HTTP/1.1'
    faults, body = [], b''
    def log_message(self, *args): pass
    def do_GET(self):
        fault = self.faults.pop(0) if self.faults else 'none'
        if fault == '500': return self.send_error(500)
        if fault == 'silent': time.sleep(4)
        self.send_response(200)
        self.send_header('Content-Length', str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body if fault != 'half' else self.body[:len(self.body) // 2])
        self.close_connection = True


def downloads(bench, chance):
    "A source that is downloaded: the network drops, the server fails, says nothing, sends another file; the process is killed."
    Server.body = write_jsonl(load_rows('rehearsal')[:80], bench.work/'remote.jsonl').read_bytes()
    server = Quiet(('127.0.0.1', 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    source = {'koalpaca-v1.0': dict(url=f'http://127.0.0.1:{server.server_port}/remote.jsonl', blob=data.git_blob_id(bench.work/'remote.jsonl'), licence='')}
    import pooch.downloaders
    cache = bench.scratch/'cache'
    def before():
        data.SOURCES, pooch.downloaders.DEFAULT_TIMEOUT = source, 1
        os.environ['KOFINETUNE_CACHE'] = str(cache)
        for name in ('http_proxy', 'https_proxy', 'HTTP_PROXY', 'HTTPS_PROXY', 'all_proxy', 'ALL_PROXY'): os.environ.pop(name, None)
    args = ['data', '--run', 'run', '--recipe', 'rehearsal', '--set', 'source=koalpaca-v1.0', '--set', 'valid_rows=8']
    for fault in ('half', '500', 'silent', 'kill'):
        name = dict(half='the network drops in the middle', silent='the server says nothing', kill='kill -9 in the middle').get(fault, 'the server answers 500')
        shutil.rmtree(cache, ignore_errors=True); shutil.rmtree(bench.work/'run', ignore_errors=True)
        Server.faults[:] = ['silent' if fault == 'kill' else fault]
        job = Job(bench, args, [before])
        if fault == 'kill':
            while not list(cache.glob('sources/*')) and job.running(): time.sleep(.01)
            time.sleep(.3)
            os.kill(job.pid, signal.SIGKILL)
        job.wait()
        Server.faults[:] = []
        wrong = one_line(job, 'could not be downloaded', 'try again') if fault != 'kill' else [] if job.code == -9 else ['not killed']
        again = Job(bench, args, [before])
        if again.wait(): wrong.append(f'the same command again ends with {again.code}: {again.errors}')
        left = sorted(p.name for p in (cache/'sources').iterdir())
        if [n for n in left if n != '.lock'] != [f'{source["koalpaca-v1.0"]["blob"][:12]}-remote.jsonl']: wrong.append(f'the cache holds {left}')
        bench.record('download', name, wrong, job.errors[0] if job.errors else '', 'the first request')
    server.shutdown()


class Hub(BaseHTTPRequestHandler):
    "A stand-in of the Hub's file server, with one repository; `broken`: it closes every file of weights in the middle."
    protocol_version = 'HTTP/1.1'
    folder, broken, commit = None, False, '0' * 39 + '1'
    def log_message(self, *args): pass
    def do_GET(self):
        path = self.folder/self.path.split('?')[0].rsplit('/', 1)[-1]
        known = '/resolve/' in self.path and path.is_file()
        body = path.read_bytes() if known else b'{}'
        start = int(self.headers.get('Range', 'bytes=0-')[6:].split('-')[0])
        self.send_response(404 if not known else 206 if start else 200)
        if not known: self.send_header('X-Error-Code', 'EntryNotFound')
        self.send_header('ETag', f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header('X-Repo-Commit', self.commit)
        self.send_header('Connection', 'close')      # said, so that nobody sends the next request into a closing door
        self.send_header('Content-Length', str(len(body) - start))
        if start: self.send_header('Content-Range', f'bytes {start}-{len(body) - 1}/{len(body)}')
        self.end_headers()
        half = self.broken and path.suffix == '.safetensors'
        if self.command != 'HEAD': self.wfile.write(body[start:max(start, len(body) // 2)] if half else body[start:])
        self.close_connection = True
    do_HEAD = do_GET


def hub_download(bench):
    "A base of the Hub whose weights do not arrive: the Hub's client tries some times, gives up, and the same command goes on."
    from kofinetune.rehearsal import stand_in_base
    from huggingface_hub import constants
    Hub.folder = stand_in_base()
    server = Quiet(('127.0.0.1', 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url, cache = f'http://127.0.0.1:{server.server_port}', str(bench.scratch/'hub')
    def before():
        constants.ENDPOINT, constants.HUGGINGFACE_CO_URL_TEMPLATE = url, url + '/{repo_id}/resolve/{revision}/{filename}'
        constants.HF_HUB_OFFLINE, constants.HF_HUB_CACHE, constants.HF_HUB_DISABLE_XET = False, cache, True
        time.sleep = lambda seconds, sleep=time.sleep: sleep(min(seconds, .05))       # between two tries
        for name in ('http_proxy', 'https_proxy', 'HTTP_PROXY', 'HTTPS_PROXY', 'all_proxy', 'ALL_PROXY'): os.environ.pop(name, None)
    run, args = bench.fresh('train', bench.work/'run'), ['train', '--run', 'run', *bench.settings, '--set', 'base=me/base', '--set', f'revision={Hub.commit}']
    Hub.broken = True
    job = Job(bench, args, [before])
    job.wait()
    Hub.broken = False
    wrong, again = one_line(job, "base 'me/base' could not be loaded", 'run the same command again'), Job(bench, args, [before])
    if again.wait(): wrong.append(f'the same command again ends with {again.code}: {again.errors or again.text[-800:]}')
    elif (run/'adapter'/'adapter_model.safetensors').read_bytes() != (bench.whole/'adapter'/'adapter_model.safetensors').read_bytes(): wrong.append('the adapter differs')
    bench.record('download', "the Hub's connection drops, again and again", wrong, job.errors[0] if job.errors else '', 'in the middle of the weights')
    server.shutdown()


class OllamaProxy:
    """What stands between the command and a real Ollama server. `fault(path, method)` -> None, '500', 'silent', 'slow', 'not done',
    'kill' (the server, after half of what is sent or answered) or 'not json'."""
    def __init__(self, ollama):
        import httpx
        self.ollama, self.fault, self.seen = ollama, lambda path, method: None, []
        proxy = self
        class Handler(BaseHTTPRequestHandler):
            protocol_version = 'HTTP/1.1'
            def log_message(self, *args): pass
            def body(self):
                if 'chunked' not in self.headers.get('Transfer-Encoding', ''): return self.rfile.read(int(self.headers.get('Content-Length', 0)))
                made = b''
                while size := int(self.rfile.readline(), 16): made += self.rfile.read(size); self.rfile.readline()
                self.rfile.readline()
                return made
            def answer(self, status, content):
                self.send_response(status)
                self.send_header('Content-Type', 'application/json')
                self.send_header('Content-Length', str(len(content)))
                self.end_headers()
                self.wfile.write(content)
            def do(self):
                fault, sent = proxy.fault(self.path, self.command), self.body()
                proxy.seen.append((self.command, self.path, fault))
                if fault == '500': return self.answer(500, b'{"error": "no room left in the engine"}')
                if fault == 'not json': return self.answer(200, b'<html>a gateway</html>')
                if fault in ('silent', 'slow'): time.sleep(6 if fault == 'silent' else .8)
                try:
                    if fault == 'kill upload':            # the server dies with half of the file
                        half = sent[:len(sent) // 2]
                        def pieces(): yield half; proxy.ollama.kill(); yield sent[len(half):]
                        httpx.request(self.command, proxy.ollama.url + self.path, content=pieces(), timeout=60)
                    said = httpx.request(self.command, proxy.ollama.url + self.path, content=sent, timeout=60)
                except httpx.HTTPError: self.close_connection = True; return
                content = said.content
                if fault == 'not done': content = content.replace(b'"done":true', b'"done":false')
                if fault == 'kill answer':                # the server dies with half of its answer sent
                    self.send_response(200); self.send_header('Content-Length', str(len(content))); self.end_headers()
                    self.wfile.write(content[:len(content) // 2]); proxy.ollama.kill(); self.close_connection = True; return
                if self.command == 'HEAD': self.send_response(said.status_code); self.send_header('Content-Length', '0'); self.end_headers(); return
                self.answer(said.status_code, content)
            do_GET = do_POST = do_HEAD = do_DELETE = do
        self.server = Quiet(('127.0.0.1', 0), Handler)
        self.host = f'127.0.0.1:{self.server.server_port}'
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


class Ollama:
    "A real server, to be killed and started again on the same port with the same models."
    def __init__(self, program, folder):
        import socket
        self.program, self.folder = program, Path(folder)
        with socket.socket() as s: s.bind(('127.0.0.1', 0)); self.port = s.getsockname()[1]
        self.url = f'http://127.0.0.1:{self.port}'
        self.start()

    def start(self):
        import httpx
        env = os.environ | dict(OLLAMA_HOST=f'127.0.0.1:{self.port}', OLLAMA_MODELS=str(self.folder/'models'), HOME=str(self.folder), OLLAMA_NUM_PARALLEL='1')
        with (self.folder/'serve.log').open('a') as log:
            self.process = subprocess.Popen([self.program, 'serve'], env=env, stdout=log, stderr=log, start_new_session=True)
        for _ in range(300):
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(self.url + '/api/version', timeout=2).status_code == 200: return
            time.sleep(.1)
        raise SystemExit('Ollama does not start:\n' + (self.folder/'serve.log').read_text()[-2000:])

    def kill(self):
        with contextlib.suppress(ProcessLookupError): os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


OLLAMA_FAULTS = {   # what happens: (fault, on which request, what the one line says)
    'killed in the middle of an upload': ('kill upload', ('/api/blobs/', 'POST'), 'broke off while taking model-q8_0.gguf'),
    'killed in the middle of an answer': ('kill answer', ('/api/generate', 'POST'), 'broke off while'),
    'answers 500 to an upload': ('500', ('/api/blobs/', 'POST'), 'answers 500 while taking model-q8_0.gguf'),
    'answers 500 to create': ('500', ('/api/create', 'POST'), 'answers 500 while taking model-q8_0.gguf: no room left in the engine'),
    'answers 500 to a question': ('500', ('/api/generate', 'POST'), 'answers 500: no room left in the engine'),
    'ends an answer with done: false': ('not done', ('/api/generate', 'POST'), 'broke off an answer (done: false)'),
    'answers what is no JSON': ('not json', ('/api/generate', 'POST'), 'broke off while'),
    'says nothing to a question': ('silent', ('/api/generate', 'POST'), 'said nothing for 3 s while'),
    'says nothing to an upload': ('silent', ('/api/blobs/', 'POST'), 'said nothing for 3 s while taking model-q8_0.gguf'),
}


def ollama_faults(bench, program, names, quick):
    "The registration of a finished export with a real server, through a proxy that breaks it."
    from kofinetune import proof, server as asking
    import httpx
    folder = bench.scratch/'ollama'
    folder.mkdir()
    server = Ollama(program, folder)
    proxy = OllamaProxy(server)
    def before(): os.environ['OLLAMA_HOST'] = proxy.host
    def hurried(): asking.PATIENCE = proof.PATIENCE = 3
    def models(): return sorted(m['name'] for m in httpx.get(server.url + '/api/tags').json()['models'])
    def forget():
        for name in models(): httpx.request('DELETE', server.url + '/api/delete', json=dict(model=name))
        server.kill(); shutil.rmtree(folder/'models'); server.start()
    name = 'kofinetune-rehearsal:latest'
    try:
        for what, (fault, (path, method), text) in names.items():
            run = bench.fresh('eval', bench.work/'run')
            left, keep = [1 if fault.startswith('kill') else 10**6], {'files': file_hashes(run/'ollama')}
            def fails(p, m):
                if p.startswith(path) and m == method and left[0]: left[0] -= 1; return fault
            proxy.fault = fails
            job = Job(bench, bench.command('export', 'run'), [before, hurried] if fault == 'silent' else [before])
            job.wait()
            wrong = one_line(job, text, 'run the same command again')
            proxy.fault = lambda p, m: None
            if server.process.poll() is not None: server.start()
            again = Job(bench, bench.command('export', 'run'), [before])
            if again.wait(): wrong.append(f'the same command again ends with {again.code}: {again.errors or again.text[-500:]}')
            if models() != [name]: wrong.append(f'the server has {models()}')
            now = file_hashes(run/'ollama')
            wrong += [f'{file} differs' for file in now if file != 'verify.json' and now[file] != keep['files'].get(file)]
            if not json.loads((run/'manifest.json').read_text(encoding='utf-8'))['stages']['ollama']['result']['registered']: wrong.append('not registered')
            bench.record('export, Ollama', what, wrong, job.errors[0] if job.errors else '', f'{method} {path}')
            forget()
        for what, fault in () if quick else (('answers slowly', 'slow'), ('is not there', None)):
            run = bench.fresh('eval', bench.work/'run')
            count = [3]
            def slow(p, m):
                if count[0] and p.startswith('/api/generate'): count[0] -= 1; return fault
            proxy.fault = slow
            job = Job(bench, bench.command('export', 'run'), [before] if fault else [])
            wrong = [f'ended with {job.code}: {job.errors}'] if job.wait() else []
            if not fault and 'ollama serve' not in job.text: wrong.append('it does not say how to start a server')
            again = Job(bench, bench.command('export', 'run'), [before])
            if again.wait(): wrong.append(f'the same command again ends with {again.code}: {again.errors}')
            if models() != [name]: wrong.append(f'the server has {models()}')
            bench.record('export, Ollama', what, wrong, '', 'three questions' if fault else 'from the start')
            forget()
    finally:
        server.kill()
        proxy.server.shutdown()


def gemma_kills(bench, chance, times):
    "Real Gemma, the command in a process of its own: train, merge and export are killed at drawn moments, and given again."
    env = {k: v for k, v in os.environ.items() if k != 'OMP_NUM_THREADS'}
    settings = [f'--set={k}={v}' for k, v in GEMMA_SETTINGS.items()]
    def start(command, run):
        return subprocess.Popen([sys.executable, '-m', 'kofinetune.cli', command, '--recipe', 'laptop', '--run', str(run), *settings],
                                env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    real, seconds = copy.copy(bench), {}
    real.whole = bench.work/'gemma'
    for command in ('data', 'train', 'merge', 'export'):
        began, process = time.monotonic(), start(command, real.whole)
        said, _ = process.communicate()
        if process.returncode: raise SystemExit(f'the undisturbed {command} of Gemma failed:\n{said}')
        seconds[command] = time.monotonic() - began
    real.cached = real.cache()
    print('Gemma undisturbed, seconds: ' + ', '.join(f'{c} {s:.0f}' for c, s in seconds.items()), flush=True)
    for command in ('train', 'merge', 'export'):
        for number in range(times):
            moment = seconds[command] * (number + chance.random()) / times
            run = real.fresh(command, bench.work/'run')
            earlier, process = real.touched(command, run), start(command, run)
            with contextlib.suppress(subprocess.TimeoutExpired): process.wait(moment)
            process.kill()
            process.communicate()
            wrong, again = [] if process.returncode == -9 else ['not killed'], start(command, run)
            said, _ = again.communicate()
            wrong += [f'the same command again ends with {again.returncode}: {said[-800:]}'] if again.returncode else real.judge(command, run, earlier)
            bench.record(f'{command}, Gemma 3 270M', 'kill -9 at a drawn moment', wrong, '', f'{moment:.0f} of {seconds[command]:.0f} s')
            print(f'Gemma: {command} killed after {moment:.0f} s, {wrong or "survived"}', flush=True)


def table(report):
    "The report as Markdown."
    cell = lambda text: str(text).replace('|', '\\|').replace('\n', ' ')
    lines = ['# Faults', '', f'{report["tried"]:,} faults tried, {report["survived"]:,} survived, {report["lost"]:,} lost. '
             f'Seed {report["seed"]}, {report["seconds"]:,.0f} s on {report["machine"]["processor"]}, {report["machine"]["cores"]} cores. '
             'Survived: the same command again ended with 0, the files of the stage were byte for byte those of an undisturbed run (but for '
             'the seconds that training took), earlier stages were untouched, and nothing else was left. What a row means stands in `benchmarks/faults.py`.', '',
             '| stage | fault | tried | survived | lost | the line that the first one ended with |', '|---|---|--:|--:|--:|---|']
    lines += ['| ' + ' | '.join(cell(row[k]) for k in ('stage', 'fault', 'tried', 'survived', 'lost', 'said')) + ' |' for row in report['rows']]
    return '\n'.join([*lines, '', *(f'Not tried: {text}.' for text in report['not_tried']), *report.get('notes', ())]).rstrip() + '\n'


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--json', type=Path)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--kills', type=int, default=20, help='kill -9 of each stage, at random moments; half as many before file operations')
    parser.add_argument('--signals', type=int, default=1, help='of each other fault of each stage')
    parser.add_argument('--stages', default=','.join(COMMANDS.values()))
    parser.add_argument('--quick', action='store_true', help='one fault of each kind, and not all kinds for all stages: two minutes')
    parser.add_argument('--gemma', type=int, default=0, help='kills of each of train, merge and export on real Gemma (the extra gemma): half an hour')
    parser.add_argument('--only', default='', help='a part of the names of the faults to try')
    parser.add_argument('--ollama', default='', help='the ollama program; empty: look for it; none: leave it out')
    args = parser.parse_args()
    began, wanted, not_tried = time.monotonic(), args.stages.split(','), []
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))      # so that servers and mounts go too
    warm_up()
    program = args.ollama or shutil.which('ollama') or next((str(p) for p in [Path.home()/'go'/'bin'/'ollama'] if p.is_file()), 'none')
    with tempfile.TemporaryDirectory(prefix='faults-') as scratch:
        order = list(COMMANDS.values())
        bench = Bench(scratch, args.seed, order[:max(map(order.index, wanted)) + 1], can_mount(scratch))
        print('undisturbed, seconds: ' + ', '.join(f'{c} {s:.1f}' for c, s in bench.seconds.items()), flush=True)
        if not bench.can_mount: not_tried.append('a full tmpfs, which needs root that may mount' + (
            ', and a read-only folder, which root writes to' if not os.geteuid() else ''))
        def part(name, do, *rest):
            if args.only and args.only not in name: return
            do(bench, *rest)
            tried = Counter({k: sum(r[k] for r in bench.rows) for k in ('tried', 'lost')})
            print(f'{time.monotonic() - began:6.0f} s  {rest[0] if rest and isinstance(rest[0], str) else ""} {name}: {tried["tried"]} tried, {tried["lost"]} lost', flush=True)
        kills_each, others = (1, 1) if args.quick else (args.kills, args.signals)
        for command in wanted:
            chance = random.Random(f'{args.seed} {command}')
            part('kill', kills, command, chance, kills_each)
            part('operation', kills_at_operations, command, chance, kills_each if command == 'data' else kills_each // 2, 1 if args.quick else 5)
            if command in ('data', 'merge') and not args.quick: part('force', kills_at_operations, command, chance, kills_each // 2, 5, True)
            part('signal', signals, command, chance, others, args.quick)
            part('disk', full_disks, command, chance, others, args.quick)
            if args.quick and command not in ('data', 'train'): continue
            part('read-only', read_only, command)
            part('vanish', vanishing, command, chance, others)
            part('two', two_at_once, command)
        chance = random.Random(f'{args.seed} other')
        if 'data' in wanted:
            part('large', large_source, chance, max(1, kills_each // 2))
            part('download', downloads, chance)
        if 'train' in wanted: part('hub', hub_download)
        if args.gemma:
            try: base._packaged_files('gemma-3-270m-q4')
            except FileNotFoundError as e: not_tried.append(f'real Gemma ({e})')
            else: part('gemma', gemma_kills, random.Random(f'{args.seed} gemma'), args.gemma)
        else: not_tried.append('real Gemma; with --gemma 3')
        if 'export' in wanted and program == 'none': not_tried.append('Ollama, whose program was not found')
        elif 'export' in wanted: part('ollama', ollama_faults, program, dict(list(OLLAMA_FAULTS.items())[:1 if args.quick else None]), args.quick)
    rows = bench.rows
    report = dict(tried=sum(r['tried'] for r in rows), survived=sum(r['survived'] for r in rows), lost=sum(r['lost'] for r in rows), seed=args.seed,
                  seconds=round(time.monotonic() - began, 1), undisturbed_seconds={c: round(s, 2) for c, s in bench.seconds.items()}, rows=rows,
                  not_tried=not_tried, versions={p: version(p) for p in runs.VERSIONED},
                  machine=dict(processor=processor(), cores=os.cpu_count(), python=platform.python_version(), system=platform.system()))
    report = json.loads(json.dumps(report).replace(str(scratch), '...'))
    if args.json:
        write_json(report, args.json)
        args.json.with_suffix('.md').write_text(table(report), encoding='utf-8', newline='\n')
    print(table(report))
    print(json.dumps(report, ensure_ascii=False))
    sys.exit(bool(report['lost']))


def processor():
    found = re.search(r'model name\s*: (.*)', Path('/proc/cpuinfo').read_text()) if Path('/proc/cpuinfo').is_file() else None
    return found[1] if found else platform.machine()


if __name__ == '__main__': main()
