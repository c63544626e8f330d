"""The site: Sphinx reads the notebooks in nbs/ as they are. Build it in both languages with `make docs`.

extensions/notebooks.py   nbdev's conventions become MyST's
extensions/folds.py       long implementations folded under their signature and summary
extensions/reference.py   API pages from docstrings and comments, the index of symptoms, links from back-ticked names
extensions/messages.py    which texts are translated, and the translation of a whole notebook
extensions/glossary.py    what a word means, at its first use in a lesson
extensions/lines.py       where a line of prose does not end
extensions/pictures.py    drawings and plots in the page's colours and language
extensions/tables.py      tables for a phone and for a screen reader, their words in the page's language
extensions/search.py      what the search looks through: the sections of every page
extensions/pages.py       what stands around a page: switch of language, buttons, notebooks, Markdown copies, llms.txt
"""
import sys
from pathlib import Path

docs = Path(__file__).resolve().parent
root = docs.parent
sys.path[:0] = [str(docs), str(root)]
from settings import settings, site                 # noqa: E402
from extensions.reference import linkcode_resolve   # noqa: E402, F401  sphinx.ext.linkcode looks for it here

project, author, release = settings['lib_name'], settings['author'], settings['version']
extensions = ['myst_nb', 'sphinx_copybutton', 'sphinx_design', 'sphinx.ext.autodoc', 'sphinx.ext.linkcode', 'sphinx.ext.githubpages',
              'sphinxext.opengraph', 'extensions.notebooks', 'extensions.reference', 'extensions.messages',
              'extensions.glossary', 'extensions.lines', 'extensions.pictures', 'extensions.tables', 'extensions.search', 'extensions.pages']
exclude_patterns = ['.ipynb_checkpoints', '_*']
source_suffix = {'.ipynb': 'myst-nb', '.md': 'myst-nb'}
nb_execution_mode = 'off'                # the outputs are stored in the notebooks
nb_render_markdown_format = 'gfm'        # tables in outputs too
nb_merge_streams = True                  # what several prints of a cell said is one box
smartquotes = False                      # 'blog' is a value, and stays one
myst_enable_extensions = ['colon_fence', 'attrs_block']
myst_heading_anchors = 3
suppress_warnings = ['mystnb.unknown_mime_type']
python_use_unqualified_type_names = True
add_module_names = False
autodoc_member_order = 'bysource'
autodoc_typehints = 'description'        # beside what the comment of a parameter says
autodoc_typehints_format = 'short'
autodoc_preserve_defaults = True
default_role = 'literal'                 # docstrings have Markdown's back-ticks

language = 'ko' if tags.has('ko') else 'en'   # noqa: F821  Sphinx gives `tags`
copyright = '2026년부터 kofinetune 개발자' if language == 'ko' else settings['copyright']
locale_dirs = [str(docs/'locale')]
gettext_compact = False                  # one catalogue a page
gettext_location = False                 # no line numbers, so that a diff shows what changed
templates_path = [str(docs/'templates')]

html_baseurl = site + ('ko/' if language == 'ko' else '')
nb_code_prompt_show, nb_code_prompt_hide = ('코드 보기', '코드 숨기기') if language == 'ko' else ('Show the code', 'Hide the code')
html_theme = 'sphinx_book_theme'
html_title = project
html_static_path = [str(docs/'static')]
html_css_files = ['site.css']
html_js_files = [('site.js', {'defer': 'defer'})]
html_favicon = str(docs/'static'/'favicon.svg')
html_context = {'default_mode': 'auto'}   # light or dark, as the reader's system has it
html_copy_source = False                 # each page's notebook and Markdown copy are written by extensions/pages.py
html_theme_options = {
    'repository_url': settings['git_url'], 'use_repository_button': True, 'use_download_button': False,
    'use_fullscreen_button': False, 'show_toc_level': 2, 'home_page_in_toc': True,
    'navbar_persistent': [], 'article_header_end': ['language.html', 'article-header-buttons.html'],
    'footer_content_items': ['copyright.html'], 'toc_title': '목차' if language == 'ko' else 'Contents',
    'search_bar_text': '검색어 입력' if language == 'ko' else 'Search',
    'pygments_light_style': 'a11y-high-contrast-light', 'pygments_dark_style': 'a11y-high-contrast-dark'}
ogp_site_url, ogp_site_name, ogp_image = html_baseurl, project, f'{site}_static/card.png'
ogp_social_cards, ogp_enable_meta_description = {'enable': False}, True
if language == 'en': extensions += ['notfound.extension']   # one page for lost readers of both languages
notfound_urls_prefix = settings['doc_baseurl'] + '/'
notfound_template = '404.html'
