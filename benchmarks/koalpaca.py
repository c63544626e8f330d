"""The post's recipe and ours on KoAlpaca and real Gemma 3 270M: train, evaluate and compare both on rows that neither saw.

    python benchmarks/koalpaca.py --rows ko_alpaca_data.json --runs runs --json benchmarks/results/koalpaca.json [--only best]

Each is `kofinetune run` with the settings below, for one epoch; a run that is finished is not made again. `blog` unpacks its NF4 base once, which gives
the same numbers and is faster. Beside each report stands the same loss from a few lines of plain torch, on the first --plain rows that both were
evaluated on. Rows of KoAlpaca, and answers to them, are left out. One to two hours a run on two cores. The last line printed is the JSON that is written.
"""
import argparse, json, math, subprocess, sys
from pathlib import Path

from gemma import BASE, VERSIONED, machine
from importlib.metadata import version
from kofinetune.runs import read_jsonl, read_manifest, write_json

SETTINGS = dict(
    best=dict(epochs=1),
    blog=dict(epochs=1, dequantize='true', gguf='bf16'))
COMMON = dict(base=BASE, valid_rows=1000)


def plain_loss(folder, rows, style):
    "Nats, tokens and bytes of the answers, row by row, with nothing of kofinetune."
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    tok = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    nats = tokens = size = 0
    for row in rows:
        prompt = f"### Instruction:\n{row['instruction']}\n\n"
        if row['input'] or style == 'blog': prompt += f"### Input:\n{row['input']}\n\n"
        prompt = tok(prompt + '### Response:\n')['input_ids']
        text = row['output'] + ('\n' if style == 'blog' else '')
        answer = tok(text, add_special_tokens=False)['input_ids'] + [1]   # <eos>
        with torch.no_grad(): logp = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1:-1].log_softmax(-1)
        nats -= logp[torch.arange(len(answer)), answer].sum().item()
        tokens, size = tokens + len(answer), size + len(row['output'].encode())
    return dict(answer_nll=nats / tokens, bits_per_byte=nats / math.log(2) / size, tokens=tokens)


def measure(name, run, rows):
    "Make a run and take its report, without the rows."
    command = ['kofinetune', 'run', '--recipe', name, '--run', run] + [f'--set={k}={v}' for k, v in (COMMON | dict(source=rows) | SETTINGS[name]).items()]
    done = subprocess.run([sys.executable, '-m', 'kofinetune.cli', *map(str, command[1:])])
    if done.returncode: raise SystemExit(done.returncode)
    stages = read_manifest(run)['stages']
    report = {key: value for key, value in stages['eval']['result'].items() if key not in ('examples', 'failures')}
    return dict(command=' '.join(map(str, command)).replace(str(rows), 'ko_alpaca_data.json'), report=report,
                stages={stage: s['seconds'] for stage, s in stages.items()})


def both(runs, count):
    "What `kofinetune compare` prints, and the losses in plain torch on rows that neither run was trained on."
    from kofinetune.base import base_path
    said = subprocess.run([sys.executable, '-m', 'kofinetune.cli', 'compare', *map(str, runs.values())], capture_output=True, text=True, check=True).stdout
    held = [{(row['instruction'], row['input']): row for row in read_jsonl(run/'eval'/'answers.jsonl')} for run in runs.values()]
    rows = [row for key, row in held[-1].items() if key in held[0]][:count]
    plain = {name: plain_loss(run/'merged', rows, 'blog' if name == 'blog' else 'alpaca') for name, run in runs.items()}
    return dict(compare=said, plain=dict(rows=len(rows), base=plain_loss(base_path(BASE), rows, 'alpaca')) | plain)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--rows', type=Path, required=True, help="KoAlpaca's file, or its first 8,000 rows")
    parser.add_argument('--runs', type=Path, default=Path('runs'), help='the folder of run folders: best and blog')
    parser.add_argument('--json', type=Path)
    parser.add_argument('--only', choices=SETTINGS)
    parser.add_argument('--plain', type=int, default=100)
    args = parser.parse_args()
    result = json.loads(args.json.read_text(encoding='utf-8')) if args.json and args.json.is_file() else {}
    for name in [args.only] if args.only else SETTINGS:
        result[name] = measure(name, args.runs/f'koalpaca-{name}', args.rows) | dict(machine=machine(), versions={p: version(p) for p in VERSIONED})
        if args.json: write_json(result, args.json)
    runs = {name: args.runs/f'koalpaca-{name}' for name in ('blog', 'best')}
    if all((run/'eval').is_dir() for run in runs.values()): result |= both(runs, args.plain)
    if args.json: write_json(result, args.json)
    print(json.dumps(result, ensure_ascii=False))


if __name__ == '__main__': main()
