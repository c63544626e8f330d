"""The site: Sphinx reads the notebooks in nbs/ as they are. Build it in both languages with `make docs`.

extensions/notebooks.py   nbdev's conventions become MyST's
extensions/reference.py   API pages from the exported symbols, and the index of symptoms
extensions/messages.py    which texts are translated
"""
import sys
from configparser import ConfigParser
from pathlib import Path

docs = Path(__file__).resolve().parent
root = docs.parent
sys.path[:0] = [str(docs), str(root)]
ini = ConfigParser(delimiters=['='])
ini.read(root/'settings.ini', encoding='utf-8')
settings = ini['DEFAULT']

project, author, release = settings['lib_name'], settings['author'], settings['version']
extensions = ['myst_nb', 'sphinx_copybutton', 'sphinx_design', 'sphinx.ext.linkcode',
              'extensions.notebooks', 'extensions.reference', 'extensions.messages']
exclude_patterns = ['.ipynb_checkpoints', '_*']
source_suffix = {'.ipynb': 'myst-nb', '.md': 'myst-nb'}
nb_execution_mode = 'off'          # the outputs are stored in the notebooks
nb_render_markdown_format = 'gfm'  # tables in outputs too
myst_enable_extensions = ['colon_fence', 'deflist', 'attrs_block']
myst_heading_anchors = 3
suppress_warnings = ['mystnb.unknown_mime_type']
python_maximum_signature_line_length = 88
python_use_unqualified_type_names = True
add_module_names = False

language = 'en'
locale_dirs = [str(docs/'locale')]
gettext_compact = False            # one catalogue a page
gettext_location = False           # no line numbers, so that a diff shows what changed
templates_path = [str(docs/'templates')]

html_theme = 'sphinx_book_theme'
html_title = project
html_theme_options = {'repository_url': settings['git_url'], 'repository_branch': settings['branch'],
                      'path_to_docs': settings['nbs_path'], 'use_repository_button': True, 'show_toc_level': 2}

from extensions.reference import linkcode_resolve   # noqa: E402  sphinx.ext.linkcode looks for it here
