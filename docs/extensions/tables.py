"""Tables as they are read: one row of headers, numbers of a sensible length, and cells that say what they are where rows are stacked.

static/site.js stacks the rows of a table that does not fit. The words of an output's table are translated: what a row or a column is, not what
it is called in the code, and a cell that is a phrase, or whose text is written in the code above.
"""
import ast
import copy
import re

from bs4 import BeautifulSoup
from sphinx.locale import _

TABLE = re.compile('<table.*?</table>', re.S)
LONG_NUMBER = re.compile(r'(?<![\d.,])-?\d+\.(?:\d{4,}|(?<=\d{3}\.)\d{3})(?:e[+-]?\d+)?(?![\d.])')
LONG_NAME = 8   # characters; a shorter one is never broken
LONG_TABLE, FIRST = 16, 6   # rows of an output; of more than that the first ones are shown, and the others on a click
NUMBERS = re.compile(r'[\s\d.,:%±+–\[\]()eE-]*(\bto\b[\s\d.,%+)-]*)?')   # a number or an interval: never broken
PHRASE = re.compile(r'(?!\S+ - \S+( |$))(?=.*[A-Za-z]{2}).* .*')   # not the difference of two runs, by their names
WORD = re.compile('[A-Za-z]{2,}(/s)?')   # all others are names: lora_r, config.json, gguf-bf16
PAIR = re.compile(r'([-+]?[\d.,]+%?) (to|of) ([-+]?[\d.,]+%?)')   # 1.2 to 3.4, 5 of 6


def in_words(
    table,          # of an output
    source: str,    # the cell's code
) -> list:          # its cells
    "Find the cells that a reader of another language needs translated."
    found = []
    for names in (table.select('thead th'), table.select('tbody th')):
        if any(PHRASE.fullmatch(text_of(cell)) for cell in names):   # then the single words beside it are no names either
            found += [cell for cell in names if PHRASE.fullmatch(text_of(cell)) or WORD.fullmatch(text_of(cell))]
    try: written = [node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    except SyntaxError: written = []   # a line for the shell
    return found + [cell for cell in table.find_all('td') if re.fullmatch('[a-z]+( [a-z]+)+', text := text_of(cell)) or re.match(r'[a-z]+,? \w', text)
                    and any(one == text or text.endswith('...') and one.startswith(text[:-3]) for one in written)]   # pandas cuts long ones


def said(pair):
    "An interval or a share, as the language says it."
    return (_('%(first)s to %(second)s') if pair[2] == 'to' else _('%(first)s of %(second)s')) % dict(first=pair[1], second=pair[3])


def text_of(cell): return cell.get_text(' ', strip=True)


def table_words(html, source): return [text_of(cell) for table in BeautifulSoup(html, 'html.parser').select('table.dataframe') for cell in in_words(table, source)]


def translated(html, source, messages):
    "The tables of an output with the words of a language, where it has a catalogue."
    if not messages or 'dataframe' not in html: return html
    whole = BeautifulSoup(html, 'html.parser')
    for table in whole.select('table.dataframe'):
        for cell in in_words(table, source): cell.string = messages.get(text_of(cell), text_of(cell))
    return str(whole)


def finish_tables(app, pagename, templatename, context, doctree):
    "Finish every table of a page."
    if doctree: context['body'] = TABLE.sub(lambda found: finish(found[0]), context['body'])


def finish(html):
    "One table: what it is to a reader and to a screen reader, also when its rows are stacked."
    table = BeautifulSoup(html, 'html.parser').table
    heads = table.select('thead tr')
    if len(heads) == 2 and 'dataframe' in table.get('class', ()): merge_headers(*heads)
    unmerge(table)
    if 'dataframe' in table.get('class', ()): drop_count(table)
    head = table.select_one('thead tr')
    labels = [cell.get_text(' ', strip=True) for cell in head.find_all(['th', 'td'])] if head else []
    if head and not any(labels): head.parent.decompose()   # a line without a word in it
    table['role'] = 'table'
    for group in table.find_all(['thead', 'tbody']): group['role'] = 'rowgroup'
    for row in table.find_all('tr'):
        row['role'] = 'row'
        for place, cell in enumerate(row.find_all(['th', 'td'])):
            cell['role'] = 'cell' if cell.name == 'td' else 'columnheader' if cell.find_parent('thead') else 'rowheader'
            if place < len(labels) and not cell.find_parent('thead'): cell['data-label'] = labels[place]
            text = cell.get_text().strip()
            kind = 'blank' if not text else 'numbers' if NUMBERS.fullmatch(text) else None
            short = LONG_NUMBER.sub(lambda found: rounded(float(found[0])), text) if kind == 'numbers' else text
            if not re.search('[A-Za-z]', PAIR.sub('', short)): short = PAIR.sub(said, short)
            if short != text: cell.string = short
            if kind: cell['class'] = [*cell.get('class', ()), kind]
    for row in table.select('tbody tr'): drop_zeros(row.select('td'))
    for name in table.find_all('th'): break_at_underscores(name)
    rows = table.select('tbody tr')
    return split(table, rows) if len(rows) > LONG_TABLE and 'dataframe' in table.get('class', ()) else str(table)


def unmerge(table):
    "pandas writes an equal value of the index once for several rows; each row says it again."
    for cell in table.select('tbody th[rowspan]'):
        for row in cell.parent.find_next_siblings('tr')[:int(cell['rowspan']) - 1]: row.insert(len(cell.find_previous_siblings()), copy.copy(cell))
    for cell in table.select('tbody th[rowspan]'): del cell['rowspan']


def drop_zeros(cells):
    "Counts in a table of other numbers have decimals: 26.000."
    if len(cells) > 1 and all(re.fullmatch(r'-?\d+\.000', cell.get_text().strip()) for cell in cells):
        for cell in cells: cell.string = cell.get_text().strip().split('.')[0]


def drop_count(table):
    "pandas numbers the rows of a table without names; the numbers 0, 1, 2... say nothing."
    rows = table.select('tr')
    first = [row.find(['th', 'td']) for row in rows]
    said = [cell.get_text(strip=True) for cell in first]
    if len(rows) > 2 and said == ['', *map(str, range(len(rows) - 1))]:
        for cell in first: cell.decompose()


def break_at_underscores(cell):
    "Let a long name go on in the next line behind an underscore."
    for text in cell.find_all(string=re.compile('_')):
        if len(text) > LONG_NAME: text.replace_with(BeautifulSoup(text.replace('_', '_<wbr>'), 'html.parser'))


def split(table, rows):
    "A long table as its first rows, and the others in a fold."
    rest = copy.copy(table)
    for row in rows[FIRST:]: row.decompose()
    for row in rest.select('tbody tr')[:FIRST]: row.decompose()
    return f'{table}<details class="more"><summary>{_("%s more rows") % (len(rows) - FIRST)}</summary>{rest}</details>'


def merge_headers(first, second):
    "pandas writes the name of the index into a row of its own; it belongs above the index."
    cells, index = first.find_all('th'), [cell for cell in second.find_all('th') if cell.get_text(strip=True)]
    for cell, name in zip(cells, index):
        if not cell.get_text(strip=True): cell.string = name.get_text(strip=True)
    second.decompose()


def rounded(number):
    "Three decimals, one of what is a hundred or more, or two digits of what is smaller than a hundredth."
    return f'{number:.1f}' if abs(number) >= 100 else f'{number:.3f}' if abs(number) >= .01 or not number else f'{number:.2g}'


def setup(app):
    app.connect('html-page-context', finish_tables, priority=400)   # before the page is read for the search
    return dict(parallel_read_safe=True, parallel_write_safe=True)
