"""Long implementations folded: how a function is called and what it does stay in sight, its code and its parameters open on a click.

The words come from the function itself, and their Korean from the catalogue of its reference, so that nothing is translated twice.
"""
import ast
import copy
import importlib
import re
import textwrap

from fastcore.docments import docments
from sphinx.locale import _

from .messages import catalogue
from .reference import PACKAGE, modules

LONG, IMPORTS = 12, 3   # lines of code, and of nothing but imports: what is no longer than that is shown whole
WIDTH = 88   # characters a line of code has at most


def is_long(source): return len(source.strip().splitlines()) > (IMPORTS if only_imports(source) else LONG)


def only_imports(source):
    try: return all(isinstance(node, (ast.Import, ast.ImportFrom)) for node in ast.parse(source).body)
    except SyntaxError: return False   # a line for the shell, such as !git


def folded(
    source: str,    # an exported cell
    shown: list,    # its names that have a reference
    page: str,      # the name of the notebook
    language: str,
) -> str:           # Markdown
    "Write an implementation as its signatures and summaries, above folds with its code and its parameters."
    defined = [node for node in ast.parse(source).body if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Assign))]
    seen = [node for node in defined if getattr(node, 'name', '') in shown] or defined
    module = next(name for name, notebook in modules().items() if notebook == page)
    messages = catalogue(language, page) | catalogue(language, f'api/{module}')
    parts = []
    for node in seen:
        parts.append(f'```python\n{signature(node)}\n```')
        if text := summary(node): parts.append(plain(messages.get(text, text)))
    name = getattr(seen[0], 'name', None) or seen[0].targets[0].id
    parts.append(f':::{{dropdown}} {_("Show the code")}\n:name: {page}-{name.strip("_")}\n````python\n{source.strip()}\n````\n:::')
    lines = [line for name in shown for line in parameters(module, name, messages)]
    if lines: parts.append(f':::{{dropdown}} {_("Parameters")}\n' + '\n'.join(lines) + '\n:::')
    if shown: parts.append(f'```{{shown}} {" ".join(shown)}\n```')
    return '::::{div} implementation\n' + '\n\n'.join(parts) + '\n::::'


def signature(node):
    "The first line of a definition, broken between parameters where it is long."
    if isinstance(node, ast.Assign): return f'{ast.unparse(node.targets[0])} = ...'
    bare = copy.copy(node)
    bare.body, bare.decorator_list = [ast.Pass()], []
    line = ast.unparse(bare).rsplit('\n', 1)[0]
    return '\n'.join(textwrap.wrap(line, WIDTH, subsequent_indent=' ' * (line.find('(') + 1), break_long_words=False))


def summary(node):
    "The first paragraph of a docstring, in one line."
    text = '' if isinstance(node, ast.Assign) else ast.get_docstring(node) or ''
    return ' '.join(text.split('\n\n')[0].split())


def own_summaries(source, shown):
    "The summaries that no reference has: those of private functions and classes. They are translated with the page."
    return [text for node in ast.parse(source).body
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name not in shown and (text := summary(node))]


def parameters(module, name, messages):
    "A list item for each parameter with a comment, and for what is returned."
    symbol = getattr(importlib.import_module(f'{PACKAGE}.{module}'), name)
    comments = {one: ' '.join(comment.split()) for one, comment in docments(symbol).items() if comment}
    return [f'- {_("Returns") if one == "return" else f"`{one}`"}: {plain(messages.get(comment, comment))}' for one, comment in comments.items()]


def plain(text):
    "Escape what Markdown would read as more than text, but for back-ticks, and for what a translation escapes itself."
    return ''.join(part if part.startswith('`') else re.sub(r'(?<!\\)([*<&\[$])', r'\\\1', part) for part in re.split('(`[^`]*`)', text))
