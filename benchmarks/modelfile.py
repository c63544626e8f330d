"""What the post's Modelfile costs Gemma 3 270M: the post's own model, asked through its template and imported as the post does.

    OLLAMA_HOST=127.0.0.1:11434 python benchmarks/modelfile.py --run runs/koalpaca-blog --json benchmarks/results/modelfile.json

A run of style `blog` on Gemma is needed, and a running Ollama of this machine. Ollama says which tokens the model sees for each held-out question;
the loss of the right answer after them is computed in transformers, in fp32, and llama.cpp lets the same weights answer them with the likeliest
tokens. Differences are paired with `ours` and have 95 % intervals. Rows of KoAlpaca are not written. The last line printed is the JSON that is written.
"""
import argparse, hashlib, json, os, platform
from importlib.metadata import version
from pathlib import Path

import httpx
import torch

from answers import SLOTS, complete, opened
from kofinetune.base import load_tokenizer
from kofinetune.eval import _describe_answers
from kofinetune.proof import serve_gguf
from kofinetune.runs import read_jsonl, write_json
from kofinetune.server import create_model, server_url, server_version
from kofinetune.stats import paired_difference, summarize
from kofinetune.train import encode

POST = '\n### Instruction:\n{{ .Prompt }}\n\n### Response:\n'
EXAMPLE = dict(instruction='다음 문장을 영어로 옮겨 주세요.', input='내일은 비가 옵니다.')


def serve_all(run, made):
    "Create the three models in Ollama, and add their names to `made`."
    import ollama
    client = ollama.Client()
    made['ours'] = create_model('modelfile-ours', run/'ollama')
    client.create('modelfile-post', from_=made['ours'], template=POST)
    made["the post's template, our GGUF"] = 'modelfile-post'
    files = {path.name: 'sha256:' + hashlib.sha256(path.read_bytes()).hexdigest() for path in (run/'merged').iterdir()}
    for name, digest in files.items():
        httpx.post(f'{server_url()}/api/blobs/{digest}', content=(run/'merged'/name).read_bytes(), timeout=600).raise_for_status()
    client.create('modelfile-import', files=files, template=POST)   # what `ollama create` does where FROM is a folder
    made['the same, imported'] = 'modelfile-import'


def seen_tokens(name, row, tok):
    "The ids that the model sees for a question."
    import ollama
    client = ollama.Client()
    has_bos = client.show(name).modelinfo['tokenizer.ggml.add_bos_token']
    said = client.generate(name, row['instruction'], system=row['input'], options=dict(num_predict=1, num_ctx=2048, num_thread=1))
    bos = [tok.bos_token_id] * bool(has_bos)
    return bos + list(said.context)[:said.prompt_eval_count - len(bos)]   # `context` leaves BOS out


def score(model, tok, ids, row, recipe):
    "The loss of a row's answer after these ids, in nats, with its tokens and bytes."
    answer = [label for label in encode(row, tok, recipe.style, 'answer', recipe.num_ctx)['labels'] if label != -100]
    with torch.inference_mode(): logits = model(torch.tensor([ids + answer])).logits[0, len(ids) - 1:-1]
    logp = logits.log_softmax(-1)[range(len(answer)), answer]
    right = (logits.argmax(-1) == torch.tensor(answer)).sum().item()
    return dict(nll=-logp.sum().item(), tokens=len(answer), right=right, bytes=len(row['output'].encode()))


def measure(run, count, names):
    "Every way of asking, on the first held-out rows."
    from transformers import AutoModelForCausalLM
    recipe, bf16, stops = opened(run)
    if recipe.style != 'blog': raise SystemExit(f'{run} has style {recipe.style}; a run of --recipe blog is needed')
    tok, rows = load_tokenizer(recipe), read_jsonl(run/'data'/'valid.jsonl')[:count]
    model = AutoModelForCausalLM.from_pretrained(run/'merged', dtype=torch.float32).eval()
    serve_all(run, names)
    found, scores = {}, {}
    for way, name in names.items():
        ids = [seen_tokens(name, row, tok) for row in rows]
        scores[way] = [score(model, tok, seen, row, recipe) for seen, row in zip(ids, rows)]
        with serve_gguf(bf16, recipe.num_ctx, slots=SLOTS) as server:   # a list of ids is a prompt that is not changed
            made, _ = complete(server, ids, stops, recipe.max_new_tokens, dict(temperature=0.))
        said = _describe_answers(rows, made, set())
        found[way] = summarize(scores[way]) | paired_difference(scores['ours'], scores[way], 'answer_nll')
        found[way] |= {key: said[key] for key in ('stop_rate', 'repetition', 'chrf')}
        found[way]['example'] = tok.convert_ids_to_tokens(seen_tokens(name, EXAMPLE, tok))
        print(way, found[way], flush=True)
    return dict(rows=len(rows), ways=found)


def main():
    import ollama
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--run', type=Path, required=True)
    parser.add_argument('--rows', type=int, default=100)
    parser.add_argument('--json', type=Path)
    args = parser.parse_args()
    server = server_version()
    if server is None: raise SystemExit('no Ollama server answers; start one with: ollama serve')
    names = {}
    try: report = measure(args.run, args.rows, names)
    finally:
        for name in names.values(): ollama.Client().delete(name)
    report |= dict(versions=dict(ollama_server=server) | {p: version(p) for p in ('kofinetune', 'transformers', 'torch', 'xllamacpp')},
                   machine=dict(cores=os.cpu_count(), machine=platform.machine()))
    if args.json: write_json(report, args.json)
    print(json.dumps(report, ensure_ascii=False))


if __name__ == '__main__': main()
