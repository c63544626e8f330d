"Which texts are translated, and the translation of Markdown that Sphinx does not see: notebooks and Markdown copies."
import re
from functools import cache
from pathlib import Path

from babel.messages.pofile import read_po
from docutils import nodes
from markdown_it import MarkdownIt
from sphinx.transforms import SphinxTransform

CATALOGUES = Path(__file__).parents[1]/'locale'
NO_WORDS = re.compile(r'(\{\w+\})?`[^`]*`|\]\([^)]*\)|<[^>]*>|\d%? (?:to|of) |[^A-Za-z]')   # code, links' targets, intervals and shares, all but letters
CELL_BORDER = re.compile(r'(?<!\\)\|')
parser = MarkdownIt('commonmark').enable('table')


class MarkUntranslated(SphinxTransform):
    "Keep out of the catalogues what a translator could only copy: names, numbers, code, and what code printed."
    default_priority = 10   # before Sphinx puts translations in their place

    def apply(self):
        for node in self.document.findall(nodes.TextElement):
            if isinstance(node, nodes.Inline) and 'translatable' not in node: continue   # the text of a field has it
            words = re.search('[A-Za-z]{2}', NO_WORDS.sub(' ', node.rawsource or node.astext()))
            if not words or is_printed(node) or isinstance(node, nodes.field_name): node['translatable'] = False   # Sphinx has those names


def is_printed(node):
    "Whether code printed it. What a cell prints that shows no code counts as prose, and so do the words in its tables."
    words = ' ' in node.astext()
    while node := node.parent:
        if words and isinstance(node, nodes.entry): return False
        if isinstance(node, nodes.container) and 'cell' in node['classes']: return 'tag_remove-input' not in node['classes']
    return False


@cache
def catalogue(
    language: str,  # the language's code; English has no catalogue
    docname: str,   # a page
) -> dict:          # the translation of each message
    "Read the translations of a page."
    path = CATALOGUES/language/'LC_MESSAGES'/f'{docname}.po'
    if language == 'en' or not path.is_file(): return {}
    with path.open('rb') as file: messages = read_po(file)
    return {m.id: m.string for m in messages if m.id and m.string and not m.fuzzy}


def translate(
    text: str,       # Markdown
    messages: dict,  # the translation of each message; what has none stays
) -> str:
    "Translate Markdown, a paragraph, heading or table cell at a time, as Sphinx does; the rest stays as it is."
    def of(message): return messages.get(message.replace('\n', ' ').strip(), message)
    lines = text.split('\n')
    for token in reversed(parser.parse(text)):
        if token.type == 'tr_open': lines[token.map[0]] = translate_row(lines[token.map[0]], of)
        elif token.type == 'html_block':
            first, last = token.map
            block = '\n'.join(lines[first:last])
            lines[first:last] = re.sub('(?<=<summary>).+(?=</summary>)', lambda m: of(m[0]), block).split('\n')
        elif token.type == 'inline' and token.map and of(token.content) != token.content:
            first, last = token.map
            before = lines[first].find(token.content.split('\n')[0])
            if before >= 0 and not is_row(lines[first], token): lines[first:last] = [lines[first][:before] + of(token.content)]
    return '\n'.join(lines)


def is_row(line, token): return token.level >= 4 and CELL_BORDER.search(line) is not None


def translate_row(line, of):
    "Translate the cells of a table's row."
    cells = CELL_BORDER.split(line)
    done = [of(cell.strip().replace('\\|', '|')).replace('|', '\\|') for cell in cells]
    return '|'.join(f' {cell} ' if cell else cell for cell in done)


def translate_notebook(
    notebook: dict,  # the JSON of an .ipynb file
    messages: dict,  # the translation of each message
) -> dict:
    "Translate a notebook's prose; its code and outputs stay."
    def cell(before):
        if before['cell_type'] != 'markdown': return before
        return before | {'source': translate(''.join(before['source']), messages).splitlines(keepends=True)}
    return notebook | {'cells': [cell(c) for c in notebook['cells']]}


def setup(app):
    app.add_transform(MarkUntranslated)
    return dict(parallel_read_safe=True)
