"""Measure what the command costs on real Gemma 3 270M: estimate, a whole run of `laptop`, verify, `best` with 1,000 held-out rows, conversations.

    python benchmarks/gemma.py --json benchmarks/results/gemma.json [--rows ko_alpaca_data.json] [--run runs/laptop] [--only laptop]

Every part is the command in a process of its own, with the Ollama server that it finds or starts. Nothing else may run meanwhile.
`best` needs KoAlpaca's rows (--rows, 1,400 of them); it trains for a tenth of an epoch, for only its evaluation is measured. `dialogs` trains the
packaged conversations in style chat, and counts the last answers that are right. The last line printed is the JSON that is written. It takes an
hour on two cores.
"""
import argparse, contextlib, json, os, platform, re, shutil, socket, subprocess, sys, tempfile, time
from importlib.metadata import distribution, version
from pathlib import Path

from packaging.requirements import Requirement

from kofinetune.runs import read_jsonl, read_manifest, write_json
from kofinetune.base import _auto_dtype

VERSIONED = 'kofinetune', 'torch', 'transformers', 'datasets', 'peft', 'bitsandbytes', 'accelerate', 'trl', 'gguf'

BASE = 'gemma-3-270m-q4'


def command(*args, run=None):
    "Run the command: what it printed, its seconds, and the most memory (bytes) of each stage of `run`, by its log."
    began, peaks = time.monotonic(), {}
    with tempfile.TemporaryFile('w+') as out:
        process = subprocess.Popen([sys.executable, '-m', 'kofinetune.cli', *map(str, args)], stdout=out, stderr=subprocess.STDOUT)
        while process.poll() is None:
            time.sleep(.2)
            with contextlib.suppress(OSError, TypeError):   # it has just ended
                held = int(re.search(r'VmRSS:\s*(\d+)', Path(f'/proc/{process.pid}/status').read_text())[1]) * 1024
                stage = stage_now(run)
                peaks[stage] = max(held, peaks.get(stage, 0))
        out.seek(0)
        said = out.read()
    if process.returncode: raise SystemExit(f'{" ".join(map(str, args))} ended with {process.returncode}:\n{said[-3000:]}')
    return said, round(time.monotonic() - began, 1), peaks


def stage_now(run):
    "The stage that a run's log says has begun last; data is before the log's first line."
    if run is None or not (run/'log.txt').is_file(): return 'data'
    begun = re.findall(r' (\w+): begun', (run/'log.txt').read_text(encoding='utf-8'))
    return begun[-1] if begun else 'data'


def laptop(run):
    "Estimate, run and verify the recipe that is the command's default."
    said, estimate_seconds, _ = command('estimate', '--recipe', 'laptop', '--run', run)
    expected = dict(line.split() for line in said.splitlines() if re.fullmatch(r' +\w+  \S+', line))
    if run.exists(): raise SystemExit(f'estimate has left {run}')
    _, seconds, peaks = command('run', '--recipe', 'laptop', '--run', run, run=run)
    stages = read_manifest(run)['stages']
    trained = stages['adapter']['result']
    evaluated = sum(e.get('eval_runtime', 0) for e in read_jsonl(run/'adapter'/'log.jsonl'))
    _, verify_seconds, _ = command('verify', run)
    proof = json.loads((run/'ollama'/'verify.json').read_text(encoding='utf-8'))
    number = {key: float(expected[key].replace(',', '')) for key in ('seconds', 'memory_bytes')}
    return dict(
        estimate=dict(seconds=estimate_seconds, expected=number,
                      of_time=round(number['seconds'] / trained['train_runtime'], 3),
                      of_memory=round(number['memory_bytes'] / trained['peak_memory_bytes'], 3)),
        run=dict(seconds=seconds, stages={name: s['seconds'] for name, s in stages.items()}, peak_memory_bytes=peaks,
                 registered=stages['ollama']['result']['registered']),
        training={key: trained[key] for key in ('dtype', 'train_runtime', 'num_tokens', 'tokens_per_second', 'peak_memory_bytes')} |
        dict(held_out_seconds=round(evaluated, 1), held_out_share=round(evaluated / trained['train_runtime'], 4)),
        exact_match={name: m['exact_match'] for name, m in stages['eval']['result']['models'].items()},
        verify=dict(seconds=verify_seconds, server=proof['server'], failed=proof['failed'], text=proof['text']['checked'],
                    tokens=proof['tokens']['checked'], greedy=proof['greedy']['checked']))


def best(run, rows):
    "Evaluate `best` on 1,000 held-out rows."
    settings = dict(base=BASE, source=rows, rows=1400, valid_rows=1000, epochs=.1)
    _, seconds, peaks = command('run', '--recipe', 'best', '--run', run, *(f'--set={k}={v}' for k, v in settings.items()), run=run)
    stages = read_manifest(run)['stages']
    report = stages['eval']['result']
    return dict(seconds=seconds, stages={name: s['seconds'] for name, s in stages.items()}, peak_memory_bytes=peaks,
                scored=report['rows'], answered=report['answered'], models=list(report['models']))


def dialogs(run):
    "Train the packaged conversations in style chat, judge the last answer of those held out, and prove what is served."
    settings = dict(source='dialogs', style='chat', valid_rows=.2, epochs=6)
    command('run', '--recipe', 'laptop', '--run', run, *(f'--set={k}={v}' for k, v in settings.items()), run=run)
    _, verify_seconds, _ = command('verify', run)
    stages, proof = read_manifest(run)['stages'], json.loads((run/'ollama'/'verify.json').read_text(encoding='utf-8'))
    report = stages['eval']['result']
    return dict(settings=settings, rows=report['rows'], held_out=report['held_out'],
                exact_match={name: m['exact_match'] for name, m in report['models'].items()}, kinds=report['kinds'],
                exact_match_ci={name: m['exact_match_ci'] for name, m in report['models'].items()},
                verify=dict(seconds=verify_seconds, server=proof['server'], failed=proof['failed'], text=proof['text']['checked'],
                            tokens=proof['tokens']['checked'], greedy=proof['greedy']['checked']))


def disk():
    "Bytes of the packages that `pip install kofinetune[gemma]` brings, and of the unpacked base."
    from kofinetune.base import base_path
    sizes, waiting = {}, [('kofinetune', ('gemma',))]
    while waiting:
        name, extras = waiting.pop()
        here = distribution(name)
        if here.name in sizes: continue
        sizes[here.name] = sum(file.size or 0 for file in here.files)
        for wanted in map(Requirement, here.requires or []):
            if not wanted.marker or any(wanted.marker.evaluate({'extra': extra}) for extra in ('', *extras)): waiting.append((wanted.name, wanted.extras))
    return dict(system=platform.system(), packages=len(sizes), packages_bytes=sum(sizes.values()),
                for_gpus_bytes=sum(size for name, size in sizes.items() if name.startswith(('nvidia', 'triton', 'cuda'))),
                base_bytes=sum(file.stat().st_size for file in Path(base_path(BASE)).iterdir()))


@contextlib.contextmanager
def ollama(folder):
    "An Ollama server: the one that OLLAMA_HOST names, or one of our own."
    from kofinetune.server import server_version
    if os.environ.get('OLLAMA_HOST') and server_version(): yield; return
    program = shutil.which('ollama') or str(Path.home()/'go'/'bin'/'ollama')
    if not Path(program).is_file(): raise SystemExit('no ollama program on PATH; bash .ci/ollama builds one')
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); os.environ['OLLAMA_HOST'] = f'127.0.0.1:{s.getsockname()[1]}'
    env = os.environ | dict(OLLAMA_MODELS=str(folder/'models'))
    with (folder/'serve.log').open('w') as log: server = subprocess.Popen([program, 'serve'], env=env, stdout=log, stderr=log)
    try:
        while not server_version(): time.sleep(.5)
        yield
    finally: server.terminate(); server.wait()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--json', type=Path)
    parser.add_argument('--rows', type=Path, help="KoAlpaca's file; without it `best` is left out")
    parser.add_argument('--run', type=Path, help='where to keep the run of laptop (or of what --only names), which must not be there; else it is thrown away')
    parser.add_argument('--only', choices=['laptop', 'best', 'dialogs', 'disk'])
    args = parser.parse_args()
    result = dict(machine=machine(), versions={p: version(p) for p in VERSIONED})
    with tempfile.TemporaryDirectory(prefix='gemma-') as scratch, ollama(Path(scratch)):
        def place(name): return args.run if args.run and name == (args.only or 'laptop') else Path(scratch)/name
        parts = dict(laptop=lambda: laptop(place('laptop')), best=lambda: best(place('best'), args.rows), dialogs=lambda: dialogs(place('dialogs')), disk=disk)
        for name, measure in parts.items():
            if args.only not in (None, name) or name == 'best' and not args.rows: continue
            result[name] = measure()
            print(f'{name}: {json.dumps(result[name], ensure_ascii=False)}', flush=True)
            if args.json: write_json(result, args.json)      # now, for the next part may take long
    print(json.dumps(result, ensure_ascii=False))


def machine():
    "The processor, what it can, and how fast it is."
    found = re.search(r'model name\s*: (.*)', Path('/proc/cpuinfo').read_text()) if Path('/proc/cpuinfo').is_file() else None
    flags = [flag for flag in ('avx2', 'avx512f', 'avx512_bf16', 'amx_bf16') if flag in Path('/proc/cpuinfo').read_text().split()] if found else []
    return dict(processor=found[1] if found else platform.machine(), flags=flags, cores=os.cpu_count(), faster_dtype=_auto_dtype(), bf16_gflops=gflops())


def gflops():
    "How fast this machine multiplies matrices of Gemma's size in bf16, so that seconds of two machines can be compared."
    import torch
    x, weight, took = torch.ones(512, 640, dtype=torch.bfloat16), torch.ones(640, 2048, dtype=torch.bfloat16), []
    for _ in range(50):
        start = time.perf_counter()
        x @ weight
        took.append(time.perf_counter() - start)
    return round(2 * 512 * 640 * 2048 / min(took) / 1e9)


if __name__ == '__main__': main()
