"""Find the sampling that suits a tuned model, and ask base and tuned models thirty open questions, with llama.cpp on their bf16 files.

    python benchmarks/answers.py --runs runs/best runs/blog --json benchmarks/results/answers.json [--only sampling]

sampling   the first run's model answers its evaluated held-out rows in each way of SAMPLINGS: how often it stops by itself, how much it repeats
           itself, how near it comes to the wanted answer (chrF)
served     every run's model answers the same held-out rows, with the likeliest tokens and as --sampling says
questions  base and every run answer all of benchmarks/questions.toml, with the likeliest tokens and as --sampling says; the answers are kept whole

A run is one of `kofinetune run` with a bf16 file. Rows of KoAlpaca are not written into the result. The last line printed is the JSON that is written.
"""
import argparse, json, os, platform, tempfile, time, tomllib
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

from kofinetune.base import base_path
from kofinetune.eval import _describe_answers
from kofinetune.gguffile import write_gguf
from kofinetune.korean import known_nouns
from kofinetune.prompt import format_prompt
from kofinetune.proof import serve_gguf
from kofinetune.recipe import Recipe
from kofinetune.runs import read_jsonl, write_json
from kofinetune.server import read_modelfile

HERE = Path(__file__).resolve().parent
GOOGLE = dict(temperature=1., top_k=64, top_p=.95)   # ai.google.dev/gemma/docs/core: what Google's guides use for Gemma 3
SAMPLINGS = {
    'greedy': dict(temperature=0.),
    'greedy, penalty 1.1': dict(temperature=0., repeat_penalty=1.1),
    'greedy, penalty 1.2': dict(temperature=0., repeat_penalty=1.2),
    'google': GOOGLE,
    'google, temperature 0.7': GOOGLE | dict(temperature=.7),
    'google, temperature 0.4': GOOGLE | dict(temperature=.4),
    'google, temperature 0.7, penalty 1.1': GOOGLE | dict(temperature=.7, repeat_penalty=1.1)}
PLAIN = dict(top_k=0, top_p=1., min_p=0., repeat_penalty=1., repeat_last_n=64, seed=42)   # llama.cpp's own defaults are others
SLOTS = 16   # questions in one batch
SHOWN = 'stop_rate', 'repetition', 'chrf', 'characters', 'hangul_share', 'particle_agreement', 'polite_speech', 'mixed_speech'


def complete(server, prompts, stop, most, sampling):
    "Let a served model answer prompts, SLOTS at once: what `_describe_answers` reads, and the seconds."
    def answer(prompt):
        said = server.post('/completion', json=PLAIN | sampling | dict(prompt=prompt, stop=stop, n_predict=most, cache_prompt=False)).json()
        return dict(answer=said['content'].strip(), stopped=said['stop_type'] != 'limit')
    began = time.monotonic()
    with ThreadPoolExecutor(SLOTS) as pool: made = list(pool.map(answer, prompts))
    return made, round(time.monotonic() - began, 1)


def opened(run):
    "The recipe of a run, its bf16 file and its stop texts."
    recipe = Recipe.load(run/'recipe.json')
    stops = read_modelfile((run/'ollama'/'Modelfile').read_text(encoding='utf-8'))['parameters']['stop']
    return recipe, run/'ollama'/'model-bf16.gguf', stops


def answered(run):
    "The held-out rows that a run's evaluation has answered."
    return [row for row in read_jsonl(run/'eval'/'answers.jsonl') if row['tuned'] is not None]


def sampling(run, rows, ways):
    "Ways of choosing the next token, on held-out rows."
    recipe, file, stops = opened(run)
    nouns = known_nouns([row[key] for key in ('instruction', 'input', 'output') for row in read_jsonl(run/'data'/'train.jsonl')])
    found = {}
    with serve_gguf(file, recipe.num_ctx, slots=SLOTS) as server:
        for name in ways:
            options = SAMPLINGS[name]
            made, seconds = complete(server, [format_prompt(row, recipe.style) for row in rows], stops, recipe.max_new_tokens, options)
            said = _describe_answers(rows, made, nouns)
            found[name] = dict(options=options, rows=len(rows), seconds=seconds) | {key: said[key] for key in SHOWN}
            print(f'{name:38} stops {said["stop_rate"]:.0%}  repeats {said["repetition"]:.1%}  chrF {said["chrf"]:.1f}  {seconds} s', flush=True)
    return found


def served(runs, chosen):
    "Every run's model on the rows that the first run's evaluation has answered and every run held out."
    def key(row): return row['instruction'], row['input']
    kept = [{key(row) for row in read_jsonl(run/'data'/'valid.jsonl')} for run in runs]
    rows = [row for row in answered(runs[0]) if all(key(row) in seen for seen in kept)]
    return {run.name: sampling(run, rows, ('greedy', chosen)) for run in runs}


def questions(runs, chosen):
    "What base and tuned models say to every open question."
    asked = tomllib.loads((HERE/'questions.toml').read_text(encoding='utf-8'))['question']
    with tempfile.TemporaryDirectory() as folder:
        recipe, _, stops = opened(runs[0])
        base = Path(folder)/'base.gguf'
        write_gguf(base_path(recipe.base), base)
        models = {'base': (recipe, base, stops)} | {run.name: opened(run) for run in runs}
        said = {}
        for name, (recipe, file, stops) in models.items():
            with serve_gguf(file, recipe.num_ctx, slots=SLOTS) as server:
                for way in dict.fromkeys(('greedy', chosen)):
                    prompts = [format_prompt(row, recipe.style) for row in asked]
                    said[name, way], seconds = complete(server, prompts, stops, recipe.max_new_tokens, SAMPLINGS[way])
                    print(f'{name}, {way}: {seconds} s', flush=True)
    return [row | dict(answers=[dict(model=name, sampling=way) | made[i] for (name, way), made in said.items()]) for i, row in enumerate(asked)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--runs', type=Path, nargs='+', required=True)
    parser.add_argument('--json', type=Path)
    parser.add_argument('--sampling', choices=SAMPLINGS, default='greedy, penalty 1.1')
    parser.add_argument('--only', choices=['sampling', 'served', 'questions'])
    args = parser.parse_args()
    report = json.loads(args.json.read_text(encoding='utf-8')) if args.json and args.json.is_file() else {}
    report |= dict(versions={p: version(p) for p in ('kofinetune', 'xllamacpp', 'transformers')}, machine=dict(cores=os.cpu_count(), machine=platform.machine()))
    parts = dict(sampling=lambda: sampling(args.runs[0], answered(args.runs[0]), SAMPLINGS), served=lambda: served(args.runs, args.sampling),
                 questions=lambda: dict(sampling=args.sampling, asked=questions(args.runs, args.sampling)))
    for name, measure in parts.items():
        if args.only not in (None, name): continue
        report[name] = measure()
        if args.json: write_json(report, args.json)   # now: the next part takes minutes
    print(json.dumps(report, ensure_ascii=False))


if __name__ == '__main__': main()
