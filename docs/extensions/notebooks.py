"Notebooks as Sphinx reads them: nbdev's own processors first, then Quarto's conventions become MyST's."
import json
import re
from pathlib import Path

from execnb.nbio import dict2nb
from nbdev import processors
from nbdev.process import NBProcessor

# What nbdev does for its own site, less what belongs to Quarto alone; show_doc is answered by reference.py.
PROCESSORS = (processors.FrontmatterProc, processors.populate_language, processors.add_show_docs, processors.strip_ansi,
              processors.hide_line, processors.filter_stream_, processors.rm_header_dash, processors.rm_export,
              processors.ai_magics, processors.clean_magics, processors.hide_, processors.strip_hidden_metadata)
# A directive's name and value, and the tag by which MyST-NB does the same.
TAGS = {'echo:': {'false': 'remove-input'}, 'output:': {'false': 'remove-output'}, 'include:': {'false': 'remove-cell'},
        'code-fold:': {'true': 'hide-input', 'show': 'hide-input'}}
GROUPS = {'Lessons': '[0-9]*_*.ipynb', 'More': '[a-z]_*.ipynb'}


def read_notebook(app, docname, source):
    "Turn the notebook that Sphinx has just read into MyST's dialect."
    path = Path(app.env.doc2path(docname))
    if path.suffix != '.ipynb': return
    notebook = dict2nb(json.loads(source[0]))
    notebook.path_ = path
    NBProcessor(nb=notebook, procs=PROCESSORS).process()
    cells = [cell for before in notebook.cells for cell in convert(before)]
    if docname == 'index': cells.append(markdown(contents(path.parent)))
    for number, cell in enumerate(cells): cell['id'] = f'cell-{number}'
    source[0] = json.dumps(dict(cells=cells, metadata=json.loads(source[0])['metadata'], nbformat=4, nbformat_minor=5))


def convert(cell):
    "One cell as nbdev left it, as no cell, one or two of MyST's."
    if cell.cell_type == 'raw': return [markdown(front_matter(cell.source))]
    if cell.cell_type == 'markdown': return [markdown(to_myst(cell.source))]
    if shown := re.match(r'show_doc\((\w+)', cell.source): return [markdown(f'```{{shown}} {shown[1]}\n```')]
    return [code(cell)]


def markdown(text): return dict(cell_type='markdown', metadata={}, source=text)


def front_matter(text):
    "nbdev's front matter as a heading and a lead."
    fields = dict(re.findall(r'^(title|description): (.+?)$', text.replace('\n  ', ' '), re.M))
    unquote = lambda s: s[1:-1].replace("''", "'") if s[:1] == "'" else s
    lead = f'\n\n{{.lead}}\n{unquote(fields["description"])}' if 'description' in fields else ''
    return f'# {unquote(fields["title"])}{lead}'


def to_myst(text):
    "Folded solutions and Quarto's callouts as MyST's directives."
    text = re.sub(r'<details>\s*<summary>(.+?)</summary>', r':::{dropdown} \1', text).replace('</details>', ':::')
    def admonition(callout):
        kind, rest = callout[1], callout[2]
        title = re.search(r'title="(.+?)"', rest)
        if not title and 'collapse' not in rest: return f':::{{{kind}}}'
        fold = ' dropdown' if 'collapse="true"' in rest else ''
        return f':::{{admonition}} {title[1] if title else kind.title()}\n:class: {kind}{fold}\n'
    return re.sub(r'^:::+ *\{\.callout-(\w+)(.*?)\}', admonition, text, flags=re.M)


def code(cell):
    "A code cell with Quarto's directives as MyST-NB's tags and options."
    tags, image = list(cell.metadata.get('tags', [])), {}
    for name, values in cell.directives_.items():
        if tag := TAGS.get(name, {}).get(values[0] if values else ''): tags.append(tag)
        if name in ('fig-alt:', 'fig-cap:'): image['alt'] = ' '.join(values).strip('"')
    options = dict(mystnb=dict(image=image)) if image else {}
    return dict(cell_type='code', execution_count=cell.get('execution_count'), outputs=cell.get('outputs', []),
                metadata=dict(tags=tags) | options, source=re.sub(r'^#\|.*\n?', '', cell.source, flags=re.M).strip('\n'))


def contents(folder):
    "Every page in its order, in groups with a caption each."
    names = {caption: sorted(p.stem for p in folder.glob(pattern)) for caption, pattern in GROUPS.items()}
    names['Reference'] = ['api/index']
    names['More'].append('troubleshooting')
    toc = '```{{toctree}}\n:hidden:\n:caption: {}\n\n{}\n```'
    return '\n\n'.join(toc.format(caption, '\n'.join(names[caption])) for caption in ('Lessons', 'More', 'Reference'))


def setup(app):
    app.connect('source-read', read_notebook)
    return dict(parallel_read_safe=True)
