"""Measure what lies around the training, on real Gemma 3 270M: the command's start, scoring, generation, merge and export, and how training grows.

    python benchmarks/around.py --run runs/koalpaca-best --json benchmarks/results/around.json [--only start ...]

start       seconds of --help, of show, and to the first line of run, the fastest of five, beside a Python that does nothing
scoring     held-out rows: the share of the machine's fastest matrix product that their products reach, and the memory above the imports
generation  250 answers of the merged model in transformers, and of its own bf16 file by llama.cpp, 16 at once
export      the base unpacked, the adapter merged, both files written and proved on llama.cpp
growth      a training step of `best`, as `kofinetune estimate` times it, against tokens in a micro-batch and against parameters

Every measurement is a process of its own; nothing else may run. The run must have both files. Needs Linux. The last line printed is the JSON.
"""
import argparse, json, math, os, resource, shutil, subprocess, sys, tempfile, time
from importlib.metadata import version
from pathlib import Path

from gemma import machine

SLOTS, ROWS, ANSWERS, WRITTEN = 16, 300, 250, 64
VERSIONED = 'kofinetune', 'torch', 'transformers', 'peft', 'trl', 'gguf', 'xllamacpp'


def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


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
    from kofinetune.base import load_base, settle_dtype
    from kofinetune.recipe import Recipe
    from kofinetune.runs import read_jsonl
    from kofinetune.scoring import answer_nll
    before = peak()
    recipe = settle_dtype(Recipe.load(run/'recipe.json'), run)
    model, tok = load_base(recipe, 'none', path=run/'merged')
    rows = read_jsonl(run/'data'/'valid.jsonl')[:ROWS]
    answer_nll(model, tok, rows[:20], recipe.style, recipe.max_length)   # prepares kernels
    began = time.perf_counter()
    scores = answer_nll(model, tok, rows, recipe.style, recipe.max_length)
    seconds, held = time.perf_counter() - began, peak() - before
    head = model.get_output_embeddings().weight.numel()
    graded = sum(s['tokens'] for s in scores if s)
    from kofinetune.chat import tokenize
    read = sum(len(tokenize(row, tok, recipe.style)[0]) for row, s in zip(rows, scores) if s)
    flops = 2 * ((model.num_parameters() - head) * read + head * graded)
    fastest = max(matrix_peak(torch.get_num_threads())['flops'].values())
    return dict(rows=len(rows), tokens=read, in_loss=graded, seconds=round(seconds, 1), tokens_per_second=round(read / seconds, 1), dtype=recipe.dtype,
                matrix_share=round(flops / seconds / fastest, 3), matrix_flops=fastest,
                memory_of_model=round(held / sum(p.nbytes for p in model.parameters()), 2))


def generation(run):
    "The same 250 questions answered in transformers and by llama.cpp; tokens a second of both."
    from answers import complete, opened
    from kofinetune.base import load_base, settle_dtype
    from kofinetune.prompt import format_prompt
    from kofinetune.proof import serve_gguf
    from kofinetune.runs import read_jsonl
    from kofinetune.scoring import generate
    recipe, file, stops = opened(run)
    rows = read_jsonl(run/'data'/'valid.jsonl')[:ANSWERS]
    model, tok = load_base(settle_dtype(recipe, run), 'none', path=run/'merged')
    def tokens(made): return sum(len(tok(a['answer'], add_special_tokens=False)['input_ids']) + a['stopped'] for a in made)
    began = time.perf_counter()
    ours = generate(model, tok, rows, recipe.style, WRITTEN)
    seconds = time.perf_counter() - began
    del model
    with serve_gguf(file, recipe.num_ctx, slots=SLOTS) as server:
        theirs, took = complete(server, [format_prompt(row, recipe.style) for row in rows], stops, WRITTEN, dict(temperature=0.))
    rates = dict(transformers=tokens(ours) / seconds, llama_cpp=tokens(theirs) / took)
    return dict(rows=len(rows), most=WRITTEN, tokens=tokens(ours), tokens_per_second={k: round(v, 1) for k, v in rates.items()},
                ratio=round(rates['transformers'] / rates['llama_cpp'], 2), same=sum(a['answer'].strip() == b['answer'] for a, b in zip(ours, theirs)))


def export(run):
    "Unpack, merge, write and prove, in a copy of the run."
    from kofinetune.base import base_path
    from kofinetune.export import export_ollama
    from kofinetune.merge import merge_adapter
    from kofinetune.recipe import Recipe
    import torch, transformers, peft, trl   # noqa: E401, F401  before is after the imports
    recipe, before, took = Recipe.load(run/'recipe.json').replace(gguf=('bf16', 'q8_0'), merge='16-bit'), peak(), {}
    def timed(name, do):
        began = time.perf_counter()
        do()
        took[name] = round(time.perf_counter() - began, 1)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)/'run'
        for part in ('data', 'adapter'): shutil.copytree(run/part, copy/part)
        for part in ('recipe.json', 'manifest.json'): shutil.copyfile(run/part, copy/part)
        os.environ['KOFINETUNE_CACHE'] = folder + '/cache'
        timed('unpack', lambda: base_path(recipe.base))
        timed('merge', lambda: merge_adapter(recipe, copy, force=True))
        timed('export', lambda: export_ollama(recipe, copy, force=True))
        size = (copy/'merged'/'model.safetensors').stat().st_size
    return dict(seconds=took, all_seconds=round(sum(took.values()), 1), memory_of_model=round((peak() - before) / size, 2))


def growth(run):
    "Seconds and memory of a training step: {'tokens': [...], 'parameters': [...]} with exponents."
    import numpy as np
    points = dict(tokens=[dict(batch=n) for n in (1, 2, 4, 8)], parameters=[dict(base='rehearsal', batch=2), dict(batch=2), dict(base='1B', batch=2)])
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for what, all_of in points.items():
            found[what] = [own_process('step', run, '--point', json.dumps(point | dict(folder=folder))) for point in all_of]
            x, seconds, memory = (np.log([made[key] for made in found[what]]) for key in (what, 'step_seconds', 'memory_bytes'))
            found[f'exponents_{what}'] = {name: round(float(np.polyfit(x, y, 1)[0]), 2) for name, y in dict(seconds=seconds, memory=memory).items()}
    return found


def step(run, base='gemma-3-270m-q4', batch=2, folder='.'):
    "One point: a micro-batch of so many rows of 256 tokens."
    from kofinetune.data import prepare
    from kofinetune.recipe import Recipe
    from kofinetune.train import estimate
    if base == '1B': base = str(random_model(Path(folder)/'1B'))
    recipe = Recipe.named('best').replace(base=base, source=str(run/'data'/'train.jsonl'), rows=1000, valid_rows=0, drop=(), max_length=256, batch_size=batch,
                                          style='alpaca', dtype='bf16')
    scratch = Path(tempfile.mkdtemp(dir=folder))
    prepare(recipe, scratch)
    made = estimate(recipe, scratch)
    parameters = sum(math.prod(shape) for shape in shapes(base))
    return dict(tokens=256 * batch, parameters=parameters, step_seconds=made['seconds'] / made['steps'], memory_bytes=made['memory_bytes'])


def shapes(base):
    "The shapes of a base's matrices."
    from safetensors import safe_open
    from kofinetune.base import base_path
    for file in Path(base_path(base)).glob('*.safetensors'):
        with safe_open(file, 'pt') as stored: yield from (stored.get_slice(name).get_shape() for name in stored.keys())


def random_model(folder):
    "Gemma 3's shape of 1B parameters with random weights, and Gemma's tokenizer."
    import torch
    from transformers import AutoTokenizer, Gemma3ForCausalLM, Gemma3TextConfig
    from kofinetune.base import base_path
    torch.set_default_dtype(torch.bfloat16)
    Gemma3ForCausalLM(Gemma3TextConfig(vocab_size=262144, hidden_size=1152, intermediate_size=6912, num_hidden_layers=26, num_attention_heads=4, head_dim=256,
                                       num_key_value_heads=1, sliding_window=512, query_pre_attn_scalar=256)).save_pretrained(folder)
    torch.set_default_dtype(torch.float32)
    AutoTokenizer.from_pretrained(base_path('gemma-3-270m-q4')).save_pretrained(folder)
    return folder


def own_process(name, run, *more):
    "Measure `name` in a process of its own."
    done = subprocess.run([sys.executable, __file__, '--run', str(run), '--one', name, *more], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


PARTS = dict(start=start, scoring=scoring, generation=generation, export=export, growth=growth)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--run', type=Path, required=True)
    parser.add_argument('--json', type=Path)
    parser.add_argument('--only', nargs='+', choices=PARTS)
    parser.add_argument('--one', help=argparse.SUPPRESS)
    parser.add_argument('--point', type=json.loads, default={}, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one: return print('\n' + json.dumps((PARTS | dict(step=step))[args.one](args.run, **args.point)))
    report = json.loads(args.json.read_text(encoding='utf-8')) if args.json and args.json.is_file() else {}
    report |= dict(machine=machine(), versions={p: version(p) for p in VERSIONED})
    for name in args.only or PARTS:
        report[name] = own_process(name, args.run)
        print(f'{name}: {report[name]}', flush=True)
        if args.json: args.json.write_text(json.dumps(report, ensure_ascii=False, indent=1) + '\n', encoding='utf-8', newline='\n')   # now
    print(json.dumps(report, ensure_ascii=False))


if __name__ == '__main__': main()
