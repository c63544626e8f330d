"API pages from nbdev's exported symbols, their links, and the page that gathers every notebook's symptoms."
import ast
import importlib
import inspect
import re
import textwrap
from pathlib import Path

from docutils import nodes
from docutils.parsers.rst import Directive
from fastcore.docments import docments
from nbdev.doclinks import NbdevLookup
from sphinx.addnodes import pending_xref
from sphinx.transforms.post_transforms import SphinxPostTransform

MODULES = {p.stem: f'kofinetune.{p.stem}' for p in sorted((Path(__file__).parents[2]/'kofinetune').glob('[a-z]*.py'))}


def symbols(module):
    "The documented symbols of one module, by name, in the notebook's order."
    loaded = importlib.import_module(module)
    found = {name: getattr(loaded, name) for name in loaded.__all__}
    return {name: o for name, o in found.items() if inspect.isfunction(o) or inspect.isclass(o)}


def signature(name, symbol):
    "How to call it, as its source spells it."
    node = ast.parse(textwrap.dedent(inspect.getsource(symbol))).body[0]
    if isinstance(node, ast.ClassDef): return name
    returns = f' -> {ast.unparse(node.returns)}' if node.returns else ''
    return f'{name}({ast.unparse(node.args)}){returns}'


def cell(value): return f'`{str(value).replace("|", "&#124;")}`' if '`' not in str(value) else str(value)


def entry(name, symbol, module, kind='function'):
    "One symbol as a directive of Sphinx's Python domain: signature, docstring, a table of its parameters."
    lines = [f'````{{py:{kind}}} {signature(name, symbol)}', f':module: {module}', '', inspect.getdoc(symbol) or '', '']
    rows = []
    for parameter, about in docments(symbol, full=True).items():
        if not about['docment'] or parameter == 'self': continue
        anno, default = ('' if v is inspect.Parameter.empty else v for v in (about['anno'], about.get('default', '')))
        kinds = '' if anno == '' else literal(inspect.formatannotation(anno))
        rows.append(f'| {literal(parameter) if parameter != "return" else "returns"} | {kinds} '
                    f'| {"" if about.get("default", inspect.Parameter.empty) is inspect.Parameter.empty else literal(repr(default))} '
                    f'| {escape(about["docment"])} |')
    if rows: lines += ['| parameter | type | default | what it is |', '|---|---|---|---|', *rows, '']
    if inspect.isclass(symbol):
        for method, function in vars(symbol).items():
            function = getattr(function, '__func__', function)
            if inspect.isfunction(function) and not method.startswith('_') and function.__doc__:
                lines += [entry(f'{name}.{method}', function, module, 'method').replace('````', '```')]
    return '\n'.join([*lines, '````', ''])


def escape(text): return ' '.join(text.split()).replace('|', '\\|')
def literal(value): return f'`{escape(str(value))}`'


def api_page(name, module):
    "The reference of one module."
    notebook = re.search(r'File to edit: \.\./nbs/(\w+)\.ipynb', inspect.getsource(importlib.import_module(module)))[1]
    lead = importlib.import_module(module).__doc__
    head = f'# {{code}}`{module}`\n\n{{.lead}}\n{lead}\n\nExplained, example by example, in <project:/{notebook}.ipynb>.\n\n'
    return head + '\n'.join(entry(n, s, module) for n, s in symbols(module).items())


def write_pages(app):
    "The generated pages, written beside Sphinx's own cache: nbs/ holds notebooks and nothing else."
    folder = Path(app.doctreedir)/'pages'
    pages = {f'api/{name}': api_page(name, module) for name, module in MODULES.items() if symbols(module)}
    names = '\n'.join(name.removeprefix('api/') for name in pages)
    pages['api/index'] = f'# API reference\n\nEvery function and class that the notebooks export, by module.\n\n```{{toctree}}\n{names}\n```\n'
    pages['troubleshooting'] = troubleshooting(Path(app.srcdir))
    for name, text in pages.items():
        (folder/name).parent.mkdir(parents=True, exist_ok=True)
        (folder/f'{name}.md').write_text(text, encoding='utf-8', newline='\n')
    app.generated_pages = {name: folder/f'{name}.md' for name in pages}


def troubleshooting(folder): return '# What could go wrong, by page\n\n{.lead}\nThe symptoms of every notebook in one place.\n'


def add_pages(app, env, docnames):
    "Let Sphinx read the generated pages too, though they are not under its source folder."
    for name, path in app.generated_pages.items():
        env.project.docnames.add(name)
        env.project._docname_to_path[name] = path
        if name not in docnames: docnames.append(name)


class Shown(Directive):
    "Stands for `show_doc(name)`: a line with the links to the name's reference."
    required_arguments = 1

    def run(self):
        return [nodes.paragraph('', '', nodes.literal('', self.arguments[0]), classes=['shown'], translatable=False)]


class LinkSymbols(SphinxPostTransform):
    "Back-ticked symbols become links to their reference."
    default_priority = 5

    def run(self):
        for node in list(self.document.findall(nodes.literal)):
            if isinstance(node.parent, (nodes.reference, pending_xref, nodes.title)): continue
            name = known().get(re.sub(r'\(.*\)$', '', node.astext()))
            if not name: continue
            link = pending_xref('', refdomain='py', reftype='obj', reftarget=name, refdoc=self.env.docname, refwarn=False)
            node.replace_self(link)
            link += node


def known(names={}):
    "Full name of each short name of an exported symbol."
    if not names:
        for module in MODULES.values():
            names |= {name: f'{module}.{name}' for name in symbols(module)} | {f'{module}.{name}': f'{module}.{name}' for name in symbols(module)}
    return names


def linkcode_resolve(domain, info):
    "The line on GitHub, as nbdev knows it."
    return NbdevLookup().code(f'{info["module"]}.{info["fullname"]}') if info['module'] else None


def setup(app):
    app.connect('builder-inited', write_pages)
    app.connect('env-before-read-docs', add_pages)
    app.add_directive('shown', Shown)
    app.add_post_transform(LinkSymbols)
    return dict(parallel_read_safe=True)
