"""Write docs/quotes.json, the stored outputs that nbs/from_the_post.ipynb quotes: `python docs/quotes.py`.

The page does not read the other notebooks themselves: whoever has run them has other outputs in them."""
import json
import re
import sys
from pathlib import Path

import nbformat

root = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent)


def code(page): return [c for c in nbformat.read(root/'nbs'/f'{page}.ipynb', as_version=4).cells if c.cell_type == 'code']


def outputs(page, words):
    "What `page` stores under the cell in which `words` stand, as text and as HTML."
    found = [c for c in code(page) if words in c.source]
    if len(found) != 1: sys.exit(f'nbs/{page}.ipynb has {len(found)} cells with {words!r}; nbs/from_the_post.ipynb must name one')
    texts, pages = zip(*[(o['text'], '') if 'text' in o else (o.data.get('text/plain', ''), o.data.get('text/html', ''))
                         for o in found[0].outputs])
    return dict(text='\n'.join(texts), html='\n'.join(pages))


wanted = {pair for c in code('from_the_post') for pair in re.findall(r"\bstored(?:_rows)?\('(\w+)', '([^']+)'", c.source)}
quotes = {f'{page}: {words}': outputs(page, words) for page, words in sorted(wanted)}
text = json.dumps(quotes, ensure_ascii=False, indent=1)
(root/'docs'/'quotes.json').write_text(text + '\n', encoding='utf-8', newline='\n')
