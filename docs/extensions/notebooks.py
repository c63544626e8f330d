"Notebooks as Sphinx reads them: nbdev's own processors first, then Quarto's conventions become MyST's."
import json
import re
from pathlib import Path

import yaml
from execnb.nbio import dict2nb
from nbdev import processors
from nbdev.process import NBProcessor

from settings import page_order

from .folds import folded, is_long, own_summaries
from .messages import catalogue
from .pictures import labels
from .reference import modules
from .tables import table_words, translated

# What nbdev does for its own site, less what belongs to Quarto alone; show_doc is answered by reference.py.
PROCESSORS = (processors.FrontmatterProc, processors.populate_language, processors.add_show_docs, processors.strip_ansi,
              processors.hide_line, processors.filter_stream_, processors.rm_header_dash, processors.rm_export,
              processors.ai_magics, processors.clean_magics, processors.hide_, processors.strip_hidden_metadata)
# A directive, its value, and the tag by which MyST-NB does the same.
TAGS = {('echo:', 'false'): 'remove-input', ('output:', 'false'): 'remove-output', ('include:', 'false'): 'remove-cell',
        ('code-fold:', 'true'): 'hide-input', ('code-fold:', 'show'): 'hide-input'}
TRAIL = re.compile(r'^```text\n +\[?00 .*-->.*\n```\n*', re.M)   # where a lesson is; the site says it above each
FILE_LINK = re.compile(r'\[([^\]]+)\]\((?!https?:)[^)]*\)')   # in what a cell printed: to a file of its run


SHOWN = re.compile(r'^show_doc\(([\w.]+)', re.M)


def read_notebook(app, docname, source):
    "Turn the notebook that Sphinx has just read into MyST's dialect."
    path = Path(app.env.doc2path(docname))
    if path.suffix != '.ipynb': return
    notebook = dict2nb(json.loads(source[0]))
    notebook.path_ = path
    NBProcessor(nb=notebook, procs=PROCESSORS).process()
    cells, heading, extracts = [], '', app.builder.name == 'gettext'
    for cell, shown in with_names(notebook.cells):
        if cell.cell_type == 'markdown': heading = next(iter(re.findall('^#+ (.+)$', cell.source, re.M)[::-1]), heading)
        if 'exports' in options(cell) and is_long(bare(cell)):
            about = own_summaries(bare(cell), shown) if extracts else [folded(bare(cell), shown, docname, app.config.language)]
            cells += [markdown(text) for text in about]
            continue
        cells.append(convert(cell, heading, catalogue(app.config.language, docname)))
        if shown: cells.append(markdown(f'```{{shown}} {" ".join(shown)}\n```'))
    if extracts: cells += [markdown(text) for cell in notebook.cells for text in (described(cell), *output_words(cell)) if text]
    if docname == 'index': cells.append(markdown(contents(path.parent)))
    for number, cell in enumerate(cells): cell['id'] = f'cell-{number}'
    source[0] = json.dumps(dict(cells=cells, metadata=json.loads(source[0])['metadata'], nbformat=4, nbformat_minor=5))


def with_names(cells):
    "Each cell with the names for which nbdev puts a `show_doc` below it, in the order in which they are defined."
    pairs = []
    for cell in cells:
        if cell.cell_type == 'code' and (shown := SHOWN.findall(cell.source)): pairs[-1][1][:0] = shown
        else: pairs.append((cell, []))
    return pairs


def convert(cell, heading, messages):
    "A cell as nbdev left it, as MyST-NB wants it."
    if cell.cell_type == 'raw': return markdown(front_matter(yaml.safe_load(cell.source.strip().strip('-'))))
    if cell.cell_type == 'markdown': return markdown(to_myst(cell.source))
    return code(cell, described(cell) or heading, messages)


def markdown(text): return dict(cell_type='markdown', metadata={}, source=text)


def front_matter(fields):
    "nbdev's front matter as a heading and a lead."
    return f'# {fields["title"]}' + (f'\n\n{{.lead}}\n{fields["description"]}' if 'description' in fields else '')


def to_myst(text):
    "Folded solutions and Quarto's callouts as MyST's directives. One trail of the lessons is enough."
    text = TRAIL.sub('', text)
    text = re.sub(r'<details>\s*<summary>(.+?)</summary>', r':::{dropdown} \1', text).replace('</details>', ':::')
    return re.sub(r'^:::+ *\{\.callout-(\w+)(.*?)\}', callout, text, flags=re.M)


def callout(found):
    "The first line of a callout as an admonition's."
    kind, options = found[1], found[2]
    title = re.search('title="(.+?)"', options)
    fold = ' dropdown' if 'collapse="true"' in options else ''
    if not title and not fold: return f':::{{{kind}}}'
    return f':::{{admonition}} {title[1] if title else kind.title()}\n:class: {kind}{fold}\n'


def options(cell): return {name: ' '.join(values).strip('"\'') for name, values in getattr(cell, 'directives_', {}).items()}
def bare(cell): return re.sub(r'^#\|.*\n?', '', cell.source, flags=re.M).strip('\n')   # without directives
def described(cell): return options(cell).get('fig-alt:') or options(cell).get('fig-cap:')


def output_words(cell):
    "What is translated of a cell's outputs: the labels of its plots and the words of its tables."
    shown = [output.get('data', {}) for output in cell.get('outputs', [])]
    words = [text.replace('|', '\\|') for data in shown for text in table_words(''.join(data.get('text/html', '')), bare(cell))]
    found = [text for data in shown for text in labels(''.join(data.get('image/svg+xml', '')))] + [f'| {text} |\n|---|' for text in words]
    return list(dict.fromkeys(found))


def code(cell, alt, messages):
    "A code cell with Quarto's directives as tags. A picture is described by `fig-alt`, or else by the heading above it."
    said, source = options(cell), bare(cell)
    tags = ['hide-input'] * (is_long(source) and said.get('code-fold:') != 'false') + list(cell.metadata.get('tags', [])) + [tag for (name, value), tag in TAGS.items() if said.get(name) == value]
    alt = messages.get(alt, alt).replace('`', '')   # MyST-NB makes pictures too late for Sphinx to translate their texts
    for output in cell.get('outputs', []):
        if printed := output.get('data', {}).get('text/markdown'): output['data']['text/markdown'] = FILE_LINK.sub(r'\1', ''.join(printed))
        if printed := output.get('data', {}).get('text/html'): output['data']['text/html'] = translated(''.join(printed), source, messages)
    return dict(cell_type='code', execution_count=cell.get('execution_count'), outputs=cell.get('outputs', []),
                metadata=dict(tags=tags, mystnb=dict(image=dict(alt=alt))),
                source=source)


def contents(folder):
    "Every page in its order, in groups with a caption each."
    lessons, more, parts = page_order()
    groups = {'Lessons': lessons, 'More': more + ['troubleshooting'], 'Parts': parts, 'Reference': ['api/index', *(f'api/{name}' for name in modules())]}
    return '\n\n'.join('```{toctree}\n:hidden:\n:caption: ' + caption + '\n\n' + '\n'.join(pages) + '\n```'
                       for caption, pages in groups.items())


def setup(app):
    app.connect('source-read', read_notebook)
    return dict(parallel_read_safe=True)
