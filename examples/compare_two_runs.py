"""Compare two finished runs: which one is better, how sure is that, and where do their answers differ?

    python examples/compare_two_runs.py runs/blog runs/best

Both runs must have been evaluated (`kofinetune eval`), on rows that they share.
"""
import argparse
from pathlib import Path

from kofinetune import compare_runs
from kofinetune.runs import read_jsonl

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument('first', type=Path)
parser.add_argument('second', type=Path)
parser.add_argument('--show', type=int, default=5, help='answers to print')
args = parser.parse_args()

result = compare_runs([args.first, args.second])
(first, second), (differences,) = result['runs'], result['differences'].values()
for note in result['notes']: print('Note:', note)
for measure, better in (('answer_nll', -1), ('token_accuracy', 1), ('exact_match', 1)):
    if measure not in differences: continue   # exact match needs rows with a checkable answer
    change, (low, high) = differences[measure]['difference'], differences[measure]['difference_ci']
    verdict = 'cannot tell' if low <= 0 <= high else f'{second if change * better > 0 else first} is better'
    print(f'{measure}: {result["runs"][first][measure]:.3f} and {result["runs"][second][measure]:.3f}, '
          f'difference {change:+.3f} ({low:+.3f} to {high:+.3f}): {verdict}')

question = lambda row: (row['instruction'], row['input'], row['output'])
others = {question(row): row['tuned'] for row in read_jsonl(args.second/'eval'/'answers.jsonl')}
both = [(row, others.get(question(row))) for row in read_jsonl(args.first/'eval'/'answers.jsonl')]
shared = [(row, other) for row, other in both if None not in (row['tuned'], other)]   # a drawn part may be answered
apart = [(row, other) for row, other in shared if row['tuned'] != other]
print(f'{len(apart)} of {len(shared)} answers differ')
for row, other in apart[:args.show]:
    print(f'  {row["instruction"]} {row["input"]} -> {row["tuned"]} | {other} | wanted: {row["output"]}')
