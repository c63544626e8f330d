"API pages from nbdev's exported symbols, the page that gathers every notebook's symptoms, and links from back-ticked names."
import ast
import importlib
import inspect
import json
import re
import textwrap
from functools import cache
from pathlib import Path

from docutils import nodes
from docutils.parsers.rst import Directive
from fastcore.docments import docments
from sphinx.addnodes import pending_xref
from sphinx.transforms.post_transforms import SphinxPostTransform

from settings import page_order, settings

from .messages import catalogue, translate

BLOB = f'{settings["git_url"]}/blob/{settings["branch"]}'
EMPTY = inspect.Parameter.empty
PACKAGE = 'kofinetune'
SYMPTOMS = re.compile(r'^## What could go wrong\n(.*?)(?=^## |\Z)', re.M | re.S)


def modules():
    "The package's modules that export something, in the order of their notebooks."
    exported = {}
    for path in (Path(__file__).parents[2]/PACKAGE).glob('[a-z]*.py'):
        if notebook := re.search(r'File to edit: \.\./nbs/(\w+)\.ipynb', path.read_text(encoding='utf-8')):
            exported[path.stem] = notebook[1]
    return dict(sorted(exported.items(), key=lambda pair: pair[1]))


@cache
def symbols(name):
    "The functions and classes that one module exports."
    module = importlib.import_module(f'{PACKAGE}.{name}')
    found = {symbol: getattr(module, symbol) for symbol in module.__all__}
    return {symbol: o for symbol, o in found.items() if inspect.isfunction(o) or inspect.isclass(o)}


@cache
def full_names():
    "The full name of every exported symbol, and of every method that is documented."
    return {f'{PACKAGE}.{name}.{path}' for name in modules() for symbol, o in symbols(name).items()
            for path in (symbol, *(f'{symbol}.{method}' for method in methods(o)))}


def methods(symbol):
    "A class's own documented methods."
    if not inspect.isclass(symbol): return {}
    own = {name: getattr(o, '__func__', o) for name, o in vars(symbol).items() if not name.startswith('_')}
    return {name: o for name, o in own.items() if inspect.isfunction(o) and o.__doc__}


def signature(name, symbol):
    "How to call it, as its source spells it, without what only the command line wants to know."
    node = definition(symbol)
    if isinstance(node, ast.ClassDef): return name
    for argument in node.args.args + node.args.kwonlyargs:
        kind = argument.annotation
        if isinstance(kind, ast.Subscript) and ast.unparse(kind.value) == 'Annotated': argument.annotation = kind.slice.elts[0]
    return f'{name}({ast.unparse(node.args)})' + (f' -> {ast.unparse(node.returns)}' if node.returns else '')


def definition(symbol): return ast.parse(textwrap.dedent(inspect.getsource(symbol))).body[0]


def parameters(symbol):
    "The table of its parameters, from the comments beside them; those of one line share its comment."
    node, known, rows, before = definition(symbol), docments(symbol, full=True), [], []
    if not any(about['docment'] for about in known.values()): return []
    lines = {} if isinstance(node, ast.ClassDef) else {a.arg: a.lineno for a in node.args.args + node.args.kwonlyargs}
    for name, about in known.items():
        if name in ('self', 'cls', 'args', 'kwargs'): continue
        before.append((name, about))
        if not about['docment'] and lines.get(name): continue
        shared = [pair for pair in before if lines.get(pair[0]) == lines.get(name)]
        rows += [row([pair], '') for pair in before if pair not in shared]
        if about['docment']: rows.append(row(shared, about['docment']))
        before = []
    rows += [row([pair], '') for pair in before]
    return ['| parameter | type | default | what it is |', '|---|---|---|---|', *rows, '']


def row(parameters, text):
    "One line of that table."
    names = ', '.join(literal(name) if name != 'return' else 'returns' for name, _ in parameters)
    kinds = [literal(inspect.formatannotation(about['anno'])) for _, about in parameters if about['anno'] not in (EMPTY, type(None))]
    defaults = [literal(repr(about['default'])) for _, about in parameters if about.get('default', EMPTY) is not EMPTY]
    return f'| {names} | {", ".join(dict.fromkeys(kinds))} | {", ".join(defaults)} | {comment(text)} |'


def literal(text): return '`' + ' '.join(text.split()).replace('|', '\\|') + '`'
def comment(text): return ' '.join(text.split()).replace('|', '\\|').replace('<', '\\<')


def entry(name, symbol, module, kind='function'):
    "A directive of Sphinx's Python domain: signature, docstring, parameters, and a class's methods."
    inner = [entry(f'{name}.{method}', o, module, 'method') for method, o in methods(symbol).items()]
    fence = ':::' + ':' * bool(inner)
    kind = 'class' if inspect.isclass(symbol) else kind
    return '\n'.join([f'{fence}{{py:{kind}}} {signature(name, symbol)}', f':module: {module}', '',
                      (inspect.getdoc(symbol) or '').replace('<', '\\<'), '', *parameters(symbol), *inner, fence, ''])


def api_page(name, notebook):
    "The reference of one module."
    module = f'{PACKAGE}.{name}'
    head = f'# `{module}`\n\n{{.lead}}\n{inspect.getdoc(importlib.import_module(module))}\n\nEach function is explained, with examples, in [its notebook](project:/{notebook}.ipynb).\n'
    return '\n'.join([head, *(entry(symbol, o, module) for symbol, o in symbols(name).items())])


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
    pages = {f'api/{name}': api_page(name, notebook) for name, notebook in modules().items() if symbols(name)}
    pages['api/index'] = ('# API reference\n\n{.lead}\nEvery function and class that the notebooks export, by module.\n\n'
                          + '\n'.join(f'- {{doc}}`/api/{name}`' for name in modules() if symbols(name)) + '\n')
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


def plain_markdown(text, docname, messages):
    "A generated page as Markdown without directives, translated."
    text = re.sub(r'^:::+\{py:\w+\} (.+)\n:module: .+$', r'### `\1`', text, flags=re.M)
    text = re.sub(r'\{doc\}`/api/(\w+)`', rf'[{PACKAGE}.\1](\1.md)', text)
    text = re.sub(r'^:::+\n|^\{\.lead\}\n', '', text, flags=re.M)
    return re.sub(r'project:/(\w+)\.ipynb', '../' * docname.count('/') + r'\1.md', translate(text, messages))


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
        own = {notebook: name for name, notebook in modules().items()}.get(self.env.docname)
        for node in list(self.document.findall(nodes.literal)):
            if isinstance(node.parent, (nodes.reference, pending_xref, nodes.title)): continue
            cell = node.parent.parent
            if self.env.docname.startswith('api/') and isinstance(cell, nodes.entry) and not cell.parent.index(cell): continue   # a parameter
            name = re.sub(r'\(.*\)$', '', node.astext()).removeprefix(f'{PACKAGE}.')
            places = [own, *modules()] if own else list(modules())
            target = next((full for full in (f'{PACKAGE}.{name}', *(f'{PACKAGE}.{m}.{name}' for m in places)) if full in full_names()), None)
            if not target: continue
            link = pending_xref('', refdomain='py', reftype='obj', reftarget=target, refdoc=self.env.docname, refwarn=False)
            node.replace_self(link)
            link += node


def linkcode_resolve(domain, info):
    "The line on GitHub where a symbol begins."
    if not info['module']: return None
    symbol = importlib.import_module(info['module'])
    for name in info['fullname'].split('.'): symbol = getattr(symbol, name)
    return f'{BLOB}/{info["module"].replace(".", "/")}.py#L{inspect.getsourcelines(symbol)[1]}'


def setup(app):
    app.connect('builder-inited', write_pages)
    app.connect('env-before-read-docs', add_pages)
    app.add_directive('shown', Shown)
    app.add_post_transform(LinkSymbols)
    return dict(parallel_read_safe=True)
