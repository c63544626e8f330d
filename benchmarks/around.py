"""Measure what lies around the training, on real Gemma 3 270M: the command's start, and scoring.

    python benchmarks/around.py --run runs/koalpaca-best --json benchmarks/results/around.json [--only start ...]

start    seconds of --help, of show, and to the first line of run, the fastest of five, beside a Python that does nothing
scoring  held-out rows: the share of the machine's fastest matrix product that their products reach, and the memory above the imports

Every measurement is a process of its own; nothing else may run. Needs Linux. The last line printed is the JSON.
"""
import argparse, json, os, subprocess, sys, tempfile, time
from importlib.metadata import version
from pathlib import Path

from gemma import machine

ROWS = 300
VERSIONED = 'kofinetune', 'torch', 'transformers', 'peft', 'trl'


def start(run):
    "Seconds of the command's start."
    kofinetune, found = [sys.executable, '-m', 'kofinetune.cli'], {}
    def seconds(command, line=False):
        began = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=os.environ | dict(PYTHONUNBUFFERED='1')) as process:
            process.stdout.readline() if line else process.communicate()
            took = time.perf_counter() - began
            process.kill()
        return took
    with tempfile.TemporaryDirectory() as folder:
        commands = dict(python=[sys.executable, '-c', 'pass'], help=[*kofinetune, '--help'], show=[*kofinetune, 'show', str(run)],
                        run=[*kofinetune, 'run', '--run', f'{folder}/new'])
        for name, command in commands.items(): found[name] = round(min(seconds(command, name == 'run') for _ in range(5)), 3)
    return found


def scoring(run):
    "Held-out rows through the merged model."
    import torch
    from train_speed import matrix_peak
    from kofinetune.base import load_base, peak_memory, settle_dtype
    from kofinetune.chat import tokenize
    from kofinetune.recipe import Recipe
    from kofinetune.runs import read_jsonl
    from kofinetune.scoring import answer_nll
    before = peak_memory()
    recipe = settle_dtype(Recipe.load(run/'recipe.json'), run)
    model, tok = load_base(recipe, 'none', path=run/'merged')
    rows = read_jsonl(run/'data'/'valid.jsonl')[:ROWS]
    answer_nll(model, tok, rows[:20], recipe.style, recipe.max_length)   # prepares kernels
    began = time.perf_counter()
    scores = answer_nll(model, tok, rows, recipe.style, recipe.max_length)
    seconds, held = time.perf_counter() - began, peak_memory() - before
    head = model.get_output_embeddings().weight.numel()
    graded = sum(s['tokens'] for s in scores if s)
    read = sum(len(tokenize(row, tok, recipe.style)[0]) for row, s in zip(rows, scores) if s)
    flops = 2 * ((model.num_parameters() - head) * read + head * graded)
    fastest = max(matrix_peak(torch.get_num_threads())['flops'].values())
    return dict(rows=len(rows), tokens=read, in_loss=graded, seconds=round(seconds, 1), tokens_per_second=round(read / seconds, 1), dtype=recipe.dtype,
                matrix_share=round(flops / seconds / fastest, 3), matrix_flops=fastest,
                memory_of_model=round(held / sum(p.nbytes for p in model.parameters()), 2))


def own_process(name, run):
    "Measure `name` in a process of its own."
    done = subprocess.run([sys.executable, __file__, '--run', str(run), '--one', name], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


PARTS = dict(start=start, scoring=scoring)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--run', type=Path, required=True)
    parser.add_argument('--json', type=Path)
    parser.add_argument('--only', nargs='+', choices=PARTS)
    parser.add_argument('--one', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one: return print('\n' + json.dumps(PARTS[args.one](args.run)))
    report = json.loads(args.json.read_text(encoding='utf-8')) if args.json and args.json.is_file() else {}
    report |= dict(machine=machine(), versions={p: version(p) for p in VERSIONED})
    for name in args.only or PARTS:
        report[name] = own_process(name, args.run)
        print(f'{name}: {report[name]}', flush=True)
        if args.json: args.json.write_text(json.dumps(report, ensure_ascii=False, indent=1) + '\n', encoding='utf-8', newline='\n')   # now
    print(json.dumps(report, ensure_ascii=False))


if __name__ == '__main__': main()
