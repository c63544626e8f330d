"""The post's recipe and ours on KoAlpaca and real Gemma 3 270M: train, evaluate and compare both on rows that neither saw.

    python benchmarks/koalpaca.py --rows ko_alpaca_data.json --runs runs --json benchmarks/results/koalpaca.json [--only best]

Each is `kofinetune run` with the settings below, for one epoch; a run that is finished is not made again. `blog` unpacks its NF4 base once, which gives
the same numbers and is faster. Beside each report stands the same loss from a few lines of plain torch, on the first --plain rows that both were
evaluated on. Rows of KoAlpaca, and answers to them, are left out. One to two hours a run on two cores. The last line printed is the JSON that is written.
"""
import argparse, json, math, subprocess, sys, tempfile
from pathlib import Path

from gemma import BASE, VERSIONED, machine
from importlib.metadata import version
from kofinetune.base import base_path
from kofinetune.runs import read_jsonl, read_manifest, write_json
from kofinetune.stats import summarize

SETTINGS = dict(
    best=dict(epochs=1),
    blog=dict(epochs=1, dequantize='true', gguf='bf16'))
COMMON = dict(base=BASE, valid_rows=1000)


def plain_loss(folder, rows, style):
    "The loss of given answers, in all and row by row (nats, tokens, bytes), with nothing of kofinetune."
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    tok = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    made = []
    for row in rows:
        prompt = f"### Instruction:\n{row['instruction']}\n\n"
        if row['input'] or style == 'blog': prompt += f"### Input:\n{row['input']}\n\n"
        prompt = tok(prompt + '### Response:\n')['input_ids']
        text = row['output'] + ('\n' if style == 'blog' else '')
        answer = tok(text, add_special_tokens=False)['input_ids'] + [1]   # <eos>
        with torch.no_grad(): logp = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1:-1].log_softmax(-1)
        made.append((round(-logp[torch.arange(len(answer)), answer].sum().item(), 4), len(answer), len(row['output'].encode())))
    nats, tokens, size = map(sum, zip(*made))
    return dict(answer_nll=nats / tokens, bits_per_byte=nats / math.log(2) / size, tokens=tokens, rows=made)


def untrained(path, count=200, chunk=512):
    "What the post's trainer would print of a base that it has not trained: loss and accuracy over every token of its texts."
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
    folder, rows = base_path(BASE), json.loads(path.read_text(encoding='utf-8'))[:count]
    tok, found = AutoTokenizer.from_pretrained(folder), dict(rows=count)
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='nf4', bnb_4bit_compute_dtype=torch.bfloat16)
    for name, options in dict(bf16={}, nf4=dict(quantization_config=nf4)).items():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **options).eval()
        if options: model = model.dequantize()   # the same numbers, ten times as fast on a CPU
        nats = right = tokens = 0
        for row in rows:
            text = f"### Instruction:\n{row['instruction']}\n\n### Input:\n{row['input']}\n\n### Response:\n{row['output']}\n"
            ids = torch.tensor([tok(text)['input_ids'][:chunk - 1] + [1]])
            with torch.no_grad(): logits = model(ids).logits[0, :-1].float()
            nats += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction='sum').item()
            right, tokens = right + (logits.argmax(-1) == ids[0, 1:]).sum().item(), tokens + len(logits)
        found[name] = dict(loss=nats / tokens, accuracy=right / tokens, tokens=tokens)
    return found


def measure(name, run, rows):
    "Make a run and take its report, without the rows."
    command = ['kofinetune', 'run', '--recipe', name, '--run', run] + [f'--set={k}={v}' for k, v in (COMMON | dict(source=rows) | SETTINGS[name]).items()]
    done = subprocess.run([sys.executable, '-m', 'kofinetune.cli', *map(str, command[1:])])
    if done.returncode: raise SystemExit(done.returncode)
    stages = read_manifest(run)['stages']
    report = {key: value for key, value in stages['eval']['result'].items() if key not in ('examples', 'failures')}
    return dict(command=' '.join(map(str, command)).replace(str(rows), 'ko_alpaca_data.json'), report=report,
                stages={stage: s['seconds'] for stage, s in stages.items()}, folder_bytes=sum(path.stat().st_size for path in run.rglob('*') if path.is_file()))


def both(runs, count):
    "What `kofinetune compare` says, and the losses in plain torch on rows that neither run was trained on, beside those of the runs' own reports."
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, '-m', 'kofinetune.cli', 'compare', *map(str, runs.values()), '--out', folder], check=True)
        compared = json.loads((Path(folder)/'compare.json').read_text(encoding='utf-8'))
    scored = {name: {(row['instruction'], row['input'], row['output']): (row, score) for row, score in
                     zip(read_jsonl(run/'eval'/'answers.jsonl'), read_jsonl(run/'eval'/'scores.jsonl')) if score['merged']} for name, run in runs.items()}
    shared = [key for key in scored['best'] if key in scored['blog']][:count]
    rows = [scored['best'][key][0] for key in shared]
    plain = dict(base=dict(plain=plain_loss(base_path(BASE), rows, 'alpaca')))
    for name, run in runs.items(): plain[name] = dict(plain=plain_loss(run/'merged', rows, 'blog' if name == 'blog' else 'alpaca'))
    for name in plain:
        ours = [scored['blog' if name == 'blog' else 'best'][key][1]['base' if name == 'base' else 'merged'] for key in shared]
        plain[name]['report'] = summarize(ours)['answer_nll']
    return dict(compare=compared, plain=dict(rows=len(rows)) | plain)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--rows', type=Path, required=True, help="KoAlpaca's file, or its first 8,000 rows")
    parser.add_argument('--runs', type=Path, default=Path('runs'), help='the folder of run folders: best and blog')
    parser.add_argument('--json', type=Path)
    parser.add_argument('--only', choices=[*SETTINGS, 'untrained', 'both'])
    parser.add_argument('--plain', type=int, default=100)
    args = parser.parse_args()
    result = json.loads(args.json.read_text(encoding='utf-8')) if args.json and args.json.is_file() else {}
    if args.only in (None, 'untrained'): result['untrained'] = untrained(args.rows)
    for name in SETTINGS if args.only is None else {args.only} & set(SETTINGS):
        result[name] = measure(name, args.runs/f'koalpaca-{name}', args.rows) | dict(machine=machine(), versions={p: version(p) for p in VERSIONED})
        if args.json: write_json(result, args.json)
    runs = {name: args.runs/f'koalpaca-{name}' for name in ('blog', 'best')}
    if args.only in (None, 'both'): result |= both(runs, args.plain)
    if args.json: write_json(result, args.json)
    print(json.dumps(result, ensure_ascii=False))


if __name__ == '__main__': main()
