"""Change one thing of a plain recipe at a time, which is where `best` comes from, on real Gemma 3 270M: held-out loss after equal training.

    python benchmarks/ablations.py --rows ko_alpaca_data.json --json benchmarks/results/ablations.json [--only nf4 learning_rate_5e-4 ...]

Every setting trains on 2,000 rows once (two epochs: on half of them twice) in a process of its own, in bf16 where the first found that faster, and is
scored on the same 500 audited held-out rows. What the result file already holds is not trained again, so a run that was cut off goes on where it was.
Differences are paired with the first setting, their intervals are 95 %. Twelve to fourteen minutes a setting on one core with AMX. The last line printed is the JSON
that is written.
"""
import argparse, json, os, platform, subprocess, sys, tempfile
from importlib.metadata import version
from pathlib import Path

from kofinetune.base import _auto_dtype
from kofinetune.runs import write_json, write_jsonl

BASE, TRAIN, HELD_OUT = 'gemma-3-270m-q4', 2000, 500
VERSIONED = 'kofinetune', 'torch', 'transformers', 'datasets', 'peft', 'bitsandbytes', 'accelerate', 'trl'
FIRST = dict(epochs=1.0, quant='none', grad_accum=4, learning_rate=2e-4)   # the setting that the others change
SETTINGS = {   # the most telling first
    'none': {},
    'nf4': dict(quant='nf4'),
    'small_steps': dict(grad_accum=1),   # 2,000 tokens a step, four times as many steps
    'small_steps_5e-4': dict(grad_accum=1, learning_rate=5e-4),
    'learning_rate_1e-3': dict(learning_rate=1e-3),
    'all_weights_3e-5': dict(adapter='none', learning_rate=3e-5),
    'whole_loss': dict(loss='whole'),
    'every_row': {},         # the first 2,000 rows as they are, before the audit
    'half_twice': dict(epochs=2.0),
    'blog_layout': dict(style='blog'),
    'rank_64': dict(lora_r=64, lora=dict(lora_alpha=128))}


def rows_of(name, path):
    "The rows that a setting trains on, and the held-out rows, which are the same for all."
    from kofinetune.data import clean_rows, load_rows, split_rows
    from kofinetune.recipe import Recipe
    rows = load_rows(str(path))
    kept, _ = clean_rows(rows, Recipe.named('best').drop)
    train, held_out = split_rows(kept, HELD_OUT, 42)
    if name == 'every_row':
        asked = {(row['instruction'], row['input']) for row in held_out}
        train = [row for row in rows if (row['instruction'], row['input']) not in asked]
    return train[:TRAIN // 2 if name == 'half_twice' else TRAIN], held_out


def measure(name, path, dtype):
    "Train one setting, or take the base as it is, and score the held-out rows."
    from kofinetune.base import load_base, settle_dtype
    from kofinetune.data import prepare
    from kofinetune.recipe import Recipe
    from kofinetune.scoring import answer_nll
    from kofinetune.stats import summarize
    from kofinetune.train import finetune, load_tuned
    train, held_out = rows_of(name, path)
    changes = FIRST | dict(dtype=dtype) | SETTINGS.get(name, {})
    if name == 'base_nf4': changes['quant'] = 'nf4'
    with tempfile.TemporaryDirectory() as folder:
        run, source = Path(folder)/'run', Path(folder)/'rows.jsonl'
        write_jsonl(train, source)
        recipe = Recipe.named('best').replace(base=BASE, source=str(source), drop=(), valid_rows=0, **changes)
        if name in SETTINGS:
            prepare(recipe, run)
            trained = finetune(recipe, run)
            model, tok = load_tuned(recipe, run)
        else: trained, (model, tok) = {}, load_base(settle_dtype(recipe, run))
        scores = answer_nll(model, tok, held_out, recipe.style, recipe.max_length)
    said = {key: trained[key] for key in ('num_tokens', 'train_loss', 'trainable_parameters', 'peak_memory_bytes') if key in trained}
    return dict(name=name, changes=changes, trained_rows=trained.get('rows', 0), scores=[s and [round(s['nll'], 4), s['tokens'], s['bytes']] for s in scores]) | said | summarize(scores, 0)


def differences(results):
    "Of every setting: its loss less that of the first one, over the rows that both were scored on. Only the first one's scores are kept."
    from kofinetune.stats import paired_difference
    first = results.get('none')
    for result in [r for r in results.values() if first and 'scores' in r]:
        pairs = [(a, b) for a, b in zip(first['scores'], result['scores']) if a and b]
        one, other = ([dict(nll=nll, tokens=tokens, bytes=count) for nll, tokens, count in side] for side in zip(*pairs))
        measure = 'bits_per_byte' if result['name'] == 'blog_layout' else 'answer_nll'   # its answers have one token more
        result |= dict(difference_of=measure) | paired_difference(one, other, measure)
        if result is not first: del result['scores']


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--rows', type=Path, required=True, help="KoAlpaca's file, or its first 8,000 rows")
    parser.add_argument('--json', type=Path)
    parser.add_argument('--only', nargs='+', choices=['base', 'base_nf4', *SETTINGS])
    parser.add_argument('--one', help=argparse.SUPPRESS)
    parser.add_argument('--dtype', choices=['bf16', 'fp32'], help='of the computation; the faster one if absent, the same for every setting')
    args = parser.parse_args()
    if args.one: return print(json.dumps(measure(args.one, args.rows, args.dtype), ensure_ascii=False))
    report = json.loads(args.json.read_text(encoding='utf-8')) if args.json and args.json.is_file() else dict(
        base=BASE, rows=TRAIN, held_out=HELD_OUT, versions={p: version(p) for p in VERSIONED},
        machine=dict(cores=os.cpu_count(), threads=int(os.environ.get('OMP_NUM_THREADS', os.cpu_count())), machine=platform.machine()), dtype=args.dtype or _auto_dtype(), results={})
    results = report['results']
    for name in args.only or ['base', 'base_nf4', *SETTINGS]:
        if name in results: continue
        command = [sys.executable, __file__, '--rows', str(args.rows), '--one', name, '--dtype', report['dtype']]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode: raise SystemExit(f'{name} failed:\n{done.stderr[-3000:]}')
        results[name] = json.loads(done.stdout.splitlines()[-1])
        differences(results)
        if args.json: write_json(report, args.json)   # now: the next takes ten minutes
        print(f'{name}: {results[name]["answer_nll"]:.3f} nats, difference {results[name].get("difference", 0):+.3f} {results[name].get("difference_ci")}', flush=True)
    print(json.dumps(report, ensure_ascii=False))


if __name__ == '__main__': main()
