"""What each type of file costs a tuned Gemma 3 270M: size, held-out loss, repetition and speed.

    OLLAMA_HOST=127.0.0.1:11434 python benchmarks/quantization.py --run runs/best --json benchmarks/results/quantization.json

bf16 and q8_0 are the run's own files; Ollama makes q4_K_M of the bf16 one. The loss is that of the file's weights in transformers, in fp32, on the
first --rows held-out rows; differences are paired with bf16 and have 95 % intervals. `parts` says what q8_0 costs where it reaches one part of the
model alone. Answers are the likeliest tokens, by llama.cpp. Speeds are those of one thread, the fastest of three: with more, whatever else runs on
the machine makes the threads wait for each other. An Ollama that Go alone has compiled uses no vector instructions of the processor, so llama.cpp
is measured as well. Needs a running Ollama of this machine. The last line printed is the JSON that is written.
"""
import argparse, json, math, os, platform, re, shutil, tempfile
from importlib.metadata import version
from pathlib import Path

import gguf
import torch

from answers import SLOTS, complete, opened
from kofinetune.base import load_tokenizer
from kofinetune.data import load_rows
from kofinetune.eval import _describe_answers
from kofinetune.gguffile import load_gguf, read_gguf
from kofinetune.korean import known_nouns
from kofinetune.prompt import format_prompt
from kofinetune.proof import serve_gguf
from kofinetune.runs import read_jsonl, write_json
from kofinetune.scoring import answer_nll
from kofinetune.server import create_model, read_modelfile, server_version
from kofinetune.stats import paired_difference, summarize

PARTS = dict(embedding=lambda name: 'embed' in name, attention=lambda name: 'self_attn' in name, feed_forward=lambda name: 'mlp' in name)

MEANT = dict(bf16=('BF16',), q8_0=('Q8_0',), q4_K_M=('Q4_K', 'Q6_K'))   # for matrices


def served_file(name):
    "The GGUF file that Ollama serves under a name."
    import ollama
    return Path(read_modelfile(ollama.Client().show(name).modelfile)['from'])


def types_in(path, dtype):
    "How many matrices of a file have which type, and what share of the weights has another type than was asked for."
    matrices = [t for t in read_gguf(path)[1] if len(t['shape']) > 1]
    def size(tensors): return sum(math.prod(t['shape']) for t in tensors)
    types = [t['type'] for t in matrices]
    return dict(types={kind: types.count(kind) for kind in sorted(set(types))},
                other_type=size([t for t in matrices if t['type'] not in MEANT[dtype]]) / size(matrices))


def ollama_speed(name, words, seed):
    "Tokens a second of prompt and answer, on Ollama."
    import ollama
    client = ollama.Client()
    client.generate(name, '한 마디.', options=dict(num_predict=1, num_thread=1))   # loaded, not measured
    said = client.generate(name, f'{seed} {words}', options=dict(num_predict=64, temperature=1, seed=seed, num_thread=1))
    return dict(prompt=said.prompt_eval_count / said.prompt_eval_duration * 1e9, answer=said.eval_count / said.eval_duration * 1e9)


def llama_cpp_speed(path, words, seed):
    "The same on llama.cpp."
    with serve_gguf(path, threads=1) as server:
        said = server.post('/completion', json=dict(prompt=f'{seed} {words}', n_predict=64, ignore_eos=True)).json()['timings']
    return dict(prompt=said['prompt_per_second'], answer=said['predicted_per_second'])


def speeds(files, names, words, repeats=3):
    "Tokens a second of every file on both servers, measured in turns; the fastest counts."
    best = {dtype: dict(ollama=dict(prompt=0, answer=0), llama_cpp=dict(prompt=0, answer=0)) for dtype in files}
    for seed in range(repeats):
        for dtype, made in best.items():
            seen = dict(ollama=ollama_speed(names[dtype], words, seed), llama_cpp=llama_cpp_speed(files[dtype], words, seed))
            for server, rates in seen.items(): made[server] = {part: max(made[server][part], round(rate, 1)) for part, rate in rates.items()}
    return best


def rounded(model, chosen):
    "Round the matrices that `chosen` names as q8_0 does, in place."
    for name, weight in model.named_parameters():
        if weight.ndim > 1 and chosen(name):
            kind = gguf.GGMLQuantizationType.Q8_0
            for part in weight.data.split(8192): part.copy_(torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(part.numpy(), kind), kind)))
    return model


def compared(scores, first):
    "A file's loss, and how far it is from that of bf16."
    return dict(answer_nll=summarize(scores)['answer_nll']) | paired_difference(
        *([s for s, t in zip(side, other) if s and t] for side, other in ((first, scores), (scores, first))))


def measure(run, rows_taken, answers, names):
    "Every file of a run, and every part of its model, on held-out rows."
    recipe, bf16, stops = opened(run)
    files = dict(bf16=bf16, q8_0=bf16.with_name('model-q8_0.gguf'), q4_K_M=served_file(names['q4_K_M']))
    tok, rows = load_tokenizer(recipe), read_jsonl(run/'data'/'valid.jsonl')[:rows_taken]
    nouns = known_nouns([row[key] for key in ('instruction', 'input', 'output') for row in read_jsonl(run/'data'/'train.jsonl')])
    def score(model): return answer_nll(model.eval(), tok, rows, recipe.style, recipe.max_length)
    found, scores = {}, {}
    for name, file in files.items():
        scores[name] = score(load_gguf(run/'merged', file))
        with serve_gguf(file, recipe.num_ctx, slots=SLOTS) as server:
            made, _ = complete(server, [format_prompt(row, recipe.style) for row in rows[:answers]], stops, recipe.max_new_tokens, dict(temperature=0.))
        said = _describe_answers(rows[:answers], made, nouns)
        found[name] = dict(bytes=file.stat().st_size, answers=answers) | types_in(file, name) | compared(scores[name], scores['bf16'])
        found[name] |= {key: said[key] for key in ('stop_rate', 'repetition', 'chrf')}
        print(name, found[name], flush=True)
    parts = {name: compared(score(rounded(load_gguf(run/'merged', bf16), chosen)), scores['bf16']) for name, chosen in PARTS.items()}
    words = ' '.join(row['instruction'] for row in load_rows('rehearsal')[:12])
    for name, rates in speeds(files, names, words).items(): found[name]['tokens_per_second'] = rates
    return dict(rows=len(rows), files=found, parts=parts)


def main():
    import ollama
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--run', type=Path, required=True)
    parser.add_argument('--rows', type=int, default=300)
    parser.add_argument('--answers', type=int, default=100)
    parser.add_argument('--json', type=Path)
    args = parser.parse_args()
    server = server_version()
    if server is None: raise SystemExit('no Ollama server answers; start one with: ollama serve')
    names, said = {}, (args.run/'ollama'/'Modelfile').read_text(encoding='utf-8')   # with its template, so that the model answers
    with tempfile.TemporaryDirectory() as folder:
        try:
            for dtype in ('bf16', 'q8_0', 'q4_K_M'):
                beside = Path(folder)/dtype
                beside.mkdir()
                own = args.run/'ollama'/f'model-{"bf16" if dtype == "q4_K_M" else dtype}.gguf'
                shutil.copyfile(own, beside/'model.gguf')
                (beside/'Modelfile').write_text(re.sub(r'(?m)^FROM .*', 'FROM ./model.gguf', said), encoding='utf-8')
                names[dtype] = create_model(f'quantization-{dtype.lower()}', beside, quantize=dtype if dtype == 'q4_K_M' else '')
            report = measure(args.run, args.rows, args.answers, names)
        finally:
            for name in names.values(): ollama.Client().delete(name)
    report |= dict(versions=dict(ollama_server=server) | {p: version(p) for p in ('kofinetune', 'transformers', 'torch', 'gguf', 'xllamacpp')},
                   machine=dict(cores=os.cpu_count(), machine=platform.machine()))
    if args.json: write_json(report, args.json)
    print(json.dumps(report, ensure_ascii=False))


if __name__ == '__main__': main()
