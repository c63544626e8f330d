"""Find words of translated English in the notebooks, README.md and the templates, and say what to write instead: python .ci/words.py"""
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
INSTEAD = {   # what has no right use on these pages; code cells are searched too, for their docstrings, comments and messages
    r'foret(?:ell|old)\w*': 'predict', r'reckon\w*': 'compute', r'heed\w*': 'follow', r'mend(?:s|ed|ing)?': 'fix',
    r'spoil(?:s|t|ed|ing)?': 'corrupt', r'judge?ments?|judged': 'evaluation, evaluated', r'graded': 'in the loss', r'coarse(?:ly)?': 'in 4-bit precision',
    r'(?:stands|stood|lies)': 'is, are', r'as (?:it|they) stand': 'unchanged', r'(?<!there )(?-i:(?:is|are) none)': 'no, not one, NaN', r'of (?:its|their|your) own': 'its own, separate',
    r'so many': 'that many', r'by number|number by number': 'by measurement, element by element', r'such an?': 'this, a', r'this very': 'exactly this',
    r'right to the letter': 'exactly right', r'words of (?:a|the|its) vocabulary': 'vocabulary entries', r'goe?s? on with': 'continue with'}


def texts():
    "Where each text is, and the text."
    for path in sorted((ROOT/'nbs').glob('*.ipynb')):
        for i, cell in enumerate(json.loads(path.read_text(encoding='utf-8'))['cells']): yield f'nbs/{path.name} cell {i}', ''.join(cell['source'])
    for path in [ROOT/'README.md', *sorted((ROOT/'kofinetune'/'assets').glob('*.jinja'))]: yield path.relative_to(ROOT), path.read_text(encoding='utf-8')


found = [f'{where}: {text[max(0, m.start() - 30):m.end() + 30]!r}: write {instead!r} instead of {m[0]!r}' for where, text in texts()
         for words, instead in INSTEAD.items() for m in re.finditer(rf'\b(?:{words})\b', text, re.I)]
if found: sys.exit('\n'.join(found))
