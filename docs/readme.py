"Write README.md from nbs/index.ipynb: `python docs/readme.py` (nbdev_readme needs Quarto, which pip does not carry)."
import re
import sys
from configparser import ConfigParser
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

root = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent)
ini = ConfigParser(delimiters=['='])
ini.read(root/'settings.ini', encoding='utf-8')

notebook = nbformat.read(root/'nbs'/'index.ipynb', as_version=4)
notebook.cells = [c for c in notebook.cells if not re.search(r'^#\|\s*hide\b', c.source, re.M)]
for cell in notebook.cells:
    if cell.cell_type != 'code': continue
    cell.outputs = [o for o in cell.outputs if o.output_type != 'stream']
    if re.search(r'^#\|\s*echo:\s*false', cell.source, re.M): cell.metadata['transient'] = {'remove_source': True}
text, _ = MarkdownExporter().from_notebook_node(notebook)
text = re.sub(r'\]\(([0-9a-z]\w*\.ipynb)\)', r'](nbs/\1)', text)
(root/'README.md').write_text(re.sub(r'\n{3,}', '\n\n', text).strip() + '\n', encoding='utf-8', newline='\n')
