"The site: Sphinx reads the notebooks in nbs/ as they are. Build it with `make docs`."
import json
import re
from configparser import ConfigParser
from pathlib import Path

root = Path(__file__).resolve().parent.parent
ini = ConfigParser(delimiters=['='])
ini.read(root/'settings.ini', encoding='utf-8')
settings = ini['DEFAULT']

project, author, release = settings['lib_name'], settings['author'], settings['version']
extensions = ['myst_nb', 'sphinx_copybutton', 'sphinx_design']
exclude_patterns = ['.ipynb_checkpoints', '_*']
html_theme = 'sphinx_book_theme'
html_title = project
html_theme_options = {'repository_url': settings['git_url'], 'repository_branch': settings['branch'],
                      'path_to_docs': settings['nbs_path'], 'use_repository_button': True, 'show_toc_level': 2}
nb_execution_mode = 'off'          # the outputs are stored in the notebooks
myst_enable_extensions = ['colon_fence', 'deflist', 'dollarmath']
myst_heading_anchors = 3
suppress_warnings = ['mystnb.unknown_mime_type']


def prepare(app, docname, source):
    "Turn nbdev's conventions into MyST's: front matter into a title, directives into nothing."
    if not str(app.env.doc2path(docname)).endswith('.ipynb'): return
    notebook = json.loads(source[0])
    cells = []
    for cell in notebook['cells']:
        text = ''.join(cell['source'])
        if re.search(r'^#\|\s*(hide|default_exp)\b', text, re.M): continue
        if cell['cell_type'] == 'code': text = re.sub(r'^#\|.*\n?', '', text, flags=re.M)
        elif not cells: text = re.sub(r'^> (.+)$', r'*\1*', text, flags=re.M)
        cells.append(cell | {'source': text.strip('\n')})
    if docname == 'index': cells.append({'cell_type': 'markdown', 'metadata': {}, 'source': contents(), 'id': 'contents'})
    source[0] = json.dumps(notebook | {'cells': cells})


def contents():
    "The pages in their order, from the names of the notebooks."
    names = sorted(p.stem for p in (root/settings['nbs_path']).glob('[0-9a-z]*_*.ipynb'))
    return '```{toctree}\n:hidden:\n\n' + '\n'.join(names) + '\n```'


def setup(app): app.connect('source-read', prepare)
