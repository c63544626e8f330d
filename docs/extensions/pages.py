"""What stands around a page, and the files beside it.

For each page: the switch of language, the place among the lessons, the buttons. For each language: its notebooks, a Markdown
copy of each page, llms.txt, and the one string that Sphinx's Korean catalogue leaves empty.
"""
import json
import re
import shutil
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter
from sphinx.locale import _

from .messages import catalogue, translate, translate_notebook

PUBLISHED = 'gh-pages'   # the branch that the workflow publishes, where Colab finds the Korean notebooks
FOUND = 'Search finished, found one page matching the search query.'


def add_context(app, pagename, templatename, context, doctree):
    "What the templates need to know about a page."
    settings, language = app.config.settings, app.config.language
    to_root = context.get('content_root', './')
    page = f'{pagename}.html'
    context['twin'] = f'{to_root}ko/{page}' if language == 'en' else f'{to_root}../{page}'
    site = app.config.site
    lost = pagename == '404'   # shown at any address, so that nothing on it is relative
    if lost: context['twin'] = f'{settings["doc_baseurl"]}/ko/index.html'
    context['alternates'] = {} if lost else {'en': site + page, 'ko': f'{site}ko/{page}', 'x-default': site + page}
    context['lessons'] = sorted(name for name in app.env.found_docs if re.match(r'\d\d_', name))
    context['markdown_copy'] = pagename in copied(app)
    notebook = Path(app.srcdir)/f'{pagename}.ipynb'
    if not notebook.is_file(): return
    colab = f'https://colab.research.google.com/github/{settings["user"]}/{settings["repo"]}/blob'
    published = f'{PUBLISHED}/ko/notebooks' if language == 'ko' else f'{settings["branch"]}/{settings["nbs_path"]}'
    context['notebook'] = dict(repository=settings['git_url'], colab=f'{colab}/{published}/{notebook.name}', download=f'{to_root}notebooks/{notebook.name}',
                               source=f'{settings["git_url"]}/blob/{settings["branch"]}/{settings["nbs_path"]}/{notebook.name}')


def write_files(app, exception):
    "Write the files beside the pages of one language."
    if exception or app.builder.name != 'html': return
    out, language = Path(app.outdir), app.config.language
    (out/'notebooks').mkdir(exist_ok=True)
    for docname in copied(app):
        path = Path(app.env.doc2path(docname))
        if path.suffix == '.ipynb':
            before = path.read_bytes()
            notebook = translate_notebook(json.loads(before), catalogue(language, docname))
            after = (json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + '\n').encode()
            (out/'notebooks'/path.name).write_bytes(before if language == 'en' else after)
            text = notebook_markdown(notebook)
        else: text = plain_markdown(path.read_text(encoding='utf-8'), catalogue(language, docname))
        write(out/f'{docname}.md', text)
    for folder in (out/'drawings', out/'notebooks'/'drawings'):   # which the copies show
        folder.mkdir(exist_ok=True)
        for path in (Path(app.srcdir)/'drawings').glob('*.svg'):
            name, _, drawn_for = path.stem.partition('.')
            if (drawn_for or 'en') == language: shutil.copyfile(path, folder/f'{name}.svg')
    write(out/'llms.txt', llms_txt(app))
    if language == 'ko': mend_plural(out/'_static'/'translations.js')


def copied(app):
    "The pages that have a Markdown copy. A page of the API has none: its notebook's copy holds the functions whole."
    return ['index', *sorted(name for name in app.env.found_docs if name != 'index' and not name.startswith('api/'))]


def plain_markdown(text, messages):
    "A generated page as plain Markdown, translated."
    return re.sub(r'project:/(\w+)\.ipynb', r'\1.md', translate(text.replace('{.lead}\n', ''), messages))


def notebook_markdown(notebook):
    "A notebook as Markdown with its outputs, pictures left out."
    shown = nbformat.reads(json.dumps(notebook), as_version=4)
    shown.cells = [cell for cell in shown.cells if not re.search(r'^#\|\s*(hide|default_exp)\b', cell.source, re.M)]
    for cell in shown.cells:
        if cell.cell_type == 'code': cell.source = re.sub(r'^#\|.*\n?', '', cell.source, flags=re.M)
        for output in cell.get('outputs', []):
            for kind in ('image/png', 'image/svg+xml', 'text/html'): output.get('data', {}).pop(kind, None)
    text, _ = MarkdownExporter().from_notebook_node(shown)
    return re.sub(r'\]\((\w+)\.ipynb', r'](\1.md', re.sub(r'\n{3,}', '\n\n', text).strip() + '\n')


def llms_txt(app):
    "The map of the site for language models (llmstxt.org): every page's Markdown copy, with a line on what it holds."
    settings, base = app.config.settings, app.config.html_baseurl
    lines = [f'# {settings["lib_name"]}', '', f'> {settings["description"]}', '', f'## {_("Pages")}', '']
    for docname in copied(app):
        lead = next((n.astext() for n in app.env.get_doctree(docname).findall(lambda n: 'lead' in getattr(n, 'attributes', {}).get('classes', []))), '')
        lines.append(f'- [{app.env.titles[docname].astext()}]({base}{docname}.md)' + (f': {lead}' if lead else ''))
    return '\n'.join(lines) + '\n'


def mend_plural(path):
    "Give Sphinx's Korean catalogue the sentence that it lacks: without it a search ends with an empty line."
    start, middle, end = re.fullmatch(r'(.*?\()(\{.*\})(\).*)', path.read_text(encoding='utf-8'), re.S).groups()
    strings = json.loads(middle)
    strings['messages'][FOUND] = ['${resultCount}개 문서를 찾았습니다.']
    write(path, start + json.dumps(strings, ensure_ascii=False) + end)


def write(path, text): path.write_text(text, encoding='utf-8', newline='\n')


def setup(app):
    app.add_config_value('settings', {}, '', [dict])
    app.add_config_value('site', '', '', [str])
    app.connect('html-page-context', add_context)
    app.connect('build-finished', write_files)
    return dict(parallel_read_safe=True, parallel_write_safe=True)
