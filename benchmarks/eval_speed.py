"""Measure scoring and generation in batches against one row at a time: same model, same arithmetic, same threads.

    OMP_NUM_THREADS=2 python benchmarks/eval_speed.py --json benchmarks/results/eval_speed.json [--rows ko_alpaca_data.json]

One row at a time is what a script does: the row alone through the model, transformers' own loss over all its logits. The large
model has the exact shape of Gemma 3 270M and random weights, in float32. Both ways are measured in turns, and the fastest of each
counts. The last line printed is the JSON that is written.
"""
import argparse, json, os, platform, time
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3ForCausalLM, Gemma3TextConfig

from kofinetune.data import load_rows
from kofinetune.scoring import answer_nll, generate
from kofinetune.rehearsal import stand_in_base
from kofinetune.train import encode


def full_size(folder):
    "Make the shape of Gemma 3 270M with random weights, or load what was made before."
    if folder and (folder/'config.json').is_file(): return Gemma3ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    torch.manual_seed(0)
    return Gemma3ForCausalLM(Gemma3TextConfig(
        vocab_size=262144, hidden_size=640, intermediate_size=2048, num_hidden_layers=18, num_attention_heads=4,
        num_key_value_heads=1, head_dim=256, sliding_window=512, query_pre_attn_scalar=256,
        max_position_embeddings=32768)).eval()


def score_alone(model, tok, rows):
    "Nats per answer token of each row, by transformers' loss, one row after the other."
    losses = []
    for row in rows:
        example = encode(row, tok)
        ids, labels = (torch.tensor([example[key]]) for key in ('input_ids', 'labels'))
        with torch.inference_mode(): losses.append(model(input_ids=ids, labels=labels).loss.item())
    return losses


def score_together(model, tok, rows):
    return [s['nll'] / s['tokens'] for s in answer_nll(model, tok, rows)]


def in_turns(one, other, rounds):
    "Run both in turns: the results of the last round, and the fastest seconds of each."
    seconds, results = [[], []], [None, None]
    for _ in range(rounds):
        for i, do in enumerate((one, other)):
            start = time.perf_counter()
            results[i] = do()
            seconds[i].append(time.perf_counter() - start)
    return results, [min(s) for s in seconds]


def scoring(case, model, tok, rows, rounds):
    rows = [row for row in rows if encode(row, tok)]
    lengths = [len(encode(row, tok)['input_ids']) for row in rows]
    graded = sum(label != -100 for row in rows for label in encode(row, tok)['labels'])
    score_alone(model, tok, rows[:2]), score_together(model, tok, rows[:2])
    results, seconds = in_turns(lambda: score_alone(model, tok, rows), lambda: score_together(model, tok, rows), rounds)
    tokens = sum(lengths)
    return dict(case=case, what='scoring', rows=len(rows), tokens=tokens, graded_share=round(graded / tokens, 3),
                alone_tokens_per_second=round(tokens / seconds[0], 1), together_tokens_per_second=round(tokens / seconds[1], 1),
                ratio=round(seconds[0] / seconds[1], 2), largest_difference=max(abs(a - b) for a, b in zip(*results)))


def generation(case, model, tok, rows, rounds, new_tokens):
    def write(batch): return generate(model, tok, rows, max_new_tokens=new_tokens, batch_size=batch)
    generate(model, tok, rows[:2], max_new_tokens=2)
    results, seconds = in_turns(lambda: write(1), lambda: write(32), rounds)
    made = sum(len(tok(a['answer'], add_special_tokens=False)['input_ids']) + 1 if a['stopped'] else new_tokens for a in results[0])
    return dict(case=case, what='generation', rows=len(rows), tokens=made,
                alone_tokens_per_second=round(made / seconds[0], 1), together_tokens_per_second=round(made / seconds[1], 1),
                ratio=round(seconds[0] / seconds[1], 2), answers_that_differ=sum(a != b for a, b in zip(*results)))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--model', type=Path, help='a saved model of the full size; made anew where absent')
    parser.add_argument('--rows', type=Path, help='real KoAlpaca rows, for one more case')
    parser.add_argument('--small', action='store_true', help='the stand-in base alone: seconds')
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--rounds', type=int, default=2)
    parser.add_argument('--json', type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    folder, packaged = stand_in_base(), load_rows('rehearsal')
    tok, cases = AutoTokenizer.from_pretrained(folder), []

    def done(case):
        print(case, flush=True)
        cases.append(case)
    small = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    done(scoring('stand-in, packaged rows', small, tok, packaged[:200], args.rounds))
    done(generation('stand-in, packaged rows', small, tok, packaged[:32], args.rounds, 24))
    if not args.small:
        large = full_size(args.model)
        done(scoring('270M, packaged rows', large, tok, packaged[:64], args.rounds))
        if args.rows: done(scoring('270M, KoAlpaca rows', large, tok, load_rows(str(args.rows))[:16], args.rounds))
        done(generation('270M, packaged rows', large, tok, packaged[:16], 1, 12))
    text = json.dumps(dict(
        cases=cases, threads=args.threads, dtype='float32',
        versions={name: version(name) for name in ('kofinetune', 'torch', 'transformers')},
        machine=dict(python=platform.python_version(), system=platform.platform(), processor=platform.machine(),
                     cpu_capability=torch.backends.cpu.get_cpu_capability(), cores=os.cpu_count())), ensure_ascii=False)
    if args.json: args.json.write_text(text + '\n', encoding='utf-8', newline='\n')
    print(text)


if __name__ == '__main__': main()
