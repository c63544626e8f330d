"API pages from docstrings and comments, the page that gathers every notebook's symptoms, and links from back-ticked names."
import importlib
import inspect
import json
import re
from pathlib import Path

from docutils import nodes
from docutils.parsers.rst import Directive
from fastcore.docments import docments
from sphinx.addnodes import pending_xref
from sphinx.transforms.post_transforms import SphinxPostTransform

from settings import page_order, settings

from .messages import catalogue, translate

BLOB = f'{settings["git_url"]}/blob/{settings["branch"]}'
PACKAGE = 'kofinetune'
SYMPTOMS = re.compile(r'^## What could go wrong\n(.*?(?:^\|[^\n]*\n?)+)', re.M | re.S)   # up to the end of the table


def modules():
    "The package's modules that export something, in the order of their notebooks."
    exported = {}
    for path in (Path(__file__).parents[2]/PACKAGE).glob('[a-z]*.py'):
        if notebook := re.search(r'File to edit: \.\./nbs/(\w+)\.ipynb', path.read_text(encoding='utf-8')):
            exported[path.stem] = notebook[1]
    return dict(sorted(exported.items(), key=lambda pair: pair[1]))


def document_parameters(app, what, name, symbol, options, lines):
    "Add the comments beside the parameters to a docstring, as Sphinx's fields."
    if what == 'module': lines.clear()   # the page's lead
    if what not in ('function', 'method', 'class') or '.__' in name: return
    for parameter, about in docments(symbol, full=True).items():
        if not about.docment: continue
        field = 'returns' if parameter == 'return' else f'param {parameter}'
        lines += ['', f':{field}: ' + ' '.join(about.docment.split()).replace('*', r'\*')]
        if what == 'class': lines.append(f':type {parameter}: {inspect.formatannotation(about.anno)} = {about.default!r}')


def shorten_signature(app, what, name, symbol, options, signature, returned):
    "A class by its name alone: its fields are listed with their defaults."
    if what == 'class' and signature: return '', None


def api_page(name, notebook):
    "The reference of one module."
    module = f'{PACKAGE}.{name}'
    return (f'# `{module}`\n\n{{.lead}}\n{importlib.import_module(module).__doc__}\n\n'
            f'Each function is explained, with examples, in [its notebook](project:/{notebook}.ipynb).\n\n'
            f'```{{eval-rst}}\n.. automodule:: {module}\n   :members:\n```\n')


def symptoms_page(folder, language):
    "Every notebook's section on what could go wrong, in one page; in Korean it is made of the notebooks' translations."
    page = ['# Troubleshooting\n\n{.lead}\nWhat could go wrong, gathered from every notebook.\n']
    for path in [] if language is None else [folder/f'{name}.ipynb' for group in page_order() for name in group]:
        cells = json.loads(path.read_text(encoding='utf-8'))['cells']
        text = '\n\n'.join(''.join(c['source']) for c in cells if c['cell_type'] == 'markdown')
        found, title = SYMPTOMS.search(text), re.search('^# (.+)$', text, re.M)[1]
        if not found: continue
        messages = catalogue(language, path.stem)
        page.append(f'## [{messages.get(title, title)}]({path.name}#what-could-go-wrong)\n\n{translate(found[1].strip(), messages)}\n')
    return re.sub(r'\]\((\w+\.ipynb)', r'](project:/\1', '\n'.join(page))   # this page is not in the notebooks' folder


def write_pages(app):
    "Write the generated pages beside Sphinx's own cache, so that nbs/ holds notebooks and nothing else."
    language = None if app.builder.name == 'gettext' else app.config.language
    pages = {f'api/{name}': api_page(name, notebook) for name, notebook in modules().items()}
    pages['api/index'] = ('# API reference\n\n{.lead}\nEvery function and class that the notebooks export, by module.\n\n'
                          + '\n'.join(f'- {{doc}}`/api/{name}`' for name in modules()) + '\n')
    pages['troubleshooting'] = symptoms_page(Path(app.srcdir), language)
    app.generated_pages = {}
    for name, text in pages.items():
        path = app.generated_pages[name] = Path(app.doctreedir).parent/f'pages-{app.config.language}'/f'{name}.md'
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding='utf-8', newline='\n')


def add_pages(app, env, docnames):
    "Have Sphinx read the generated pages too, though they are not in its source folder."
    for name, path in app.generated_pages.items():
        env.project.docnames.add(name)
        env.project._docname_to_path[name] = path
        if name not in docnames: docnames.append(name)


class Shown(Directive):
    "Stands for each `show_doc(name)` below a cell: a line with the links to the names' reference."
    required_arguments, final_argument_whitespace = 1, True

    def run(self):
        line = nodes.paragraph(self.arguments[0], '', classes=['shown'], translatable=False)
        for name in self.arguments[0].split(): line += [nodes.literal(name, name), nodes.Text(' ')]
        return [line]


class LinkSymbols(SphinxPostTransform):
    "Back-ticked names of exported symbols become links to their reference, a page's own module first."
    default_priority = 5   # before references are resolved

    def run(self):
        names = {name for name, about in self.env.domains.python_domain.objects.items() if about.objtype != 'module'}
        places = modules()
        own = [name for name, notebook in places.items() if notebook == self.env.docname]
        for node in list(self.document.findall(nodes.literal)):
            if isinstance(node.parent, (nodes.reference, pending_xref, nodes.title)): continue
            bare = node.astext().removeprefix(f'{PACKAGE}.')
            name = re.sub(r'\(.*\)$', '', bare)
            means_module = bare in places and not (bare in own and f'{PACKAGE}.{bare}.{bare}' in names)   # or a style of that name: `chat`
            if means_module and 'shown' not in node.parent['classes']: continue
            full = [f'{PACKAGE}.{name}', *(f'{PACKAGE}.{place}.{name}' for place in [*own, *places])]
            target = next((one for one in full if one in names), None)
            if not target: continue
            link = pending_xref('', refdomain='py', reftype='obj', reftarget=target, refdoc=self.env.docname, refwarn=False)
            node.replace_self(link)
            link += node
        for text in list(self.document.findall(nodes.Text)):   # between a parameter and what it is
            if text == ' -- ': text.parent.replace(text, nodes.Text(' – '))


def linkcode_resolve(domain, info):
    "The line on GitHub where a symbol begins."
    if not info['module']: return None
    symbol = importlib.import_module(info['module'])
    for name in info['fullname'].split('.'): symbol = getattr(symbol, name)
    return f'{BLOB}/{info["module"].replace(".", "/")}.py#L{inspect.getsourcelines(symbol)[1]}'


def setup(app):
    app.connect('builder-inited', write_pages)
    app.connect('autodoc-process-docstring', document_parameters)
    app.connect('autodoc-process-signature', shorten_signature)
    app.connect('env-before-read-docs', add_pages)
    app.add_directive('shown', Shown)
    app.add_post_transform(LinkSymbols)
    return dict(parallel_read_safe=True)
