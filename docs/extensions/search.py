"""What the search reads: every section of every page, its prose and its code apart, and the words that mean the same.

Sphinx's own search ranks pages by whether a word is there, not by how much they are about it, and it finds few words inside Korean ones.
So searchindex.js holds the sections themselves, and static/search.js looks through them.
"""
import json
import re
from html.parser import HTMLParser
from pathlib import Path

from docutils.nodes import make_id

from .glossary import entries
from .lines import JOINER

# How much a hit counts for: the lessons before the other pages, and the list of all functions last.
WEIGHTS = ((r'\d\d_', 1.3), ('api/', .6), ('genindex', 0), ('', 1))
SKIPPED = {'script', 'style', 'svg', 'button', 'summary'}
VOID = {'br', 'img', 'hr', 'input', 'wbr', 'col', 'meta', 'link'}


class Sections(HTMLParser):
    "The sections of a page's body: [anchor, title, prose, code]."
    def __init__(self, page):
        super().__init__()
        self.prefix = make_id(page) + '-'
        self.found = [['', '', '', '']]
        self.path = [['', False, self.found[0]]]   # the open tags, each with whether it is skipped and the section it is in

    def handle_starttag(self, tag, attributes):
        if tag in VOID: return
        about = dict(attributes)
        classes, (_, skipped, section) = (about.get('class') or '').split(), self.path[-1]
        skipped = skipped or tag in SKIPPED or about.get('role') == 'tooltip' or bool({'headerlink', 'shown', 'viewcode-link'} & {*classes})
        if tag == 'details' and about.get('id') and not any(section[:2]): section[:2] = about['id'], about['id'].removeprefix(self.prefix).replace('-', '_')
        elif tag == 'section' and about.get('id') or 'implementation' in classes:   # whose name is that of the fold in it
            section = [about.get('id', ''), '', '', '']
            self.found.append(section)
        elif tag == 'dt' and 'sig' in classes and about.get('id'):
            section = self.path[-1][2] = [about['id'], about['id'].split('.')[-1], '', '']   # and what follows it in its list
            self.found.append(section)
        self.path.append([tag, skipped, section])

    def handle_endtag(self, tag):
        if tag not in VOID and len(self.path) > 1: self.path.pop()

    def handle_data(self, data):
        tags, (_, skipped, section) = {name for name, _, _ in self.path}, self.path[-1]
        if skipped: return
        place = 1 if tags & {'h1', 'h2', 'h3', 'h4'} else 3 if 'pre' in tags else 2
        section[place] += data + (' ' if self.path[-1][0] in ('td', 'th') else '')


def sections(html, page):
    "Read the sections of a page, white space made short; what holds nothing goes."
    parser = Sections(page)
    parser.feed(html.replace('<wbr/>', ''))   # a place for a line's end is none for a word's
    found = [[name, *(' '.join(text.replace(JOINER, '').split()) for text in texts)] for name, *texts in parser.found]
    return [one for one in found if any(one[1:])]


def read_page(app, pagename, templatename, context, doctree):
    "Keep the sections of a page when it is written."
    if not doctree: return
    weight = next(weight for start, weight in WEIGHTS if re.match(start, pagename))
    app.searched[pagename] = [f'{pagename}.html', re.sub('<.*?>', '', context['title']), weight, sections(context['body'], pagename)]


def begin(app):
    app.searched = {}
    app.builder.search = False   # Sphinx's own index


def search_page(app):
    yield 'search', {}, 'search.html'


def write_index(app, exception):
    if exception or app.builder.name != 'html': return
    both = zip(*(entries(Path(app.srcdir), language) for language in (app.config.language, 'en', 'ko')), strict=True)
    words = [[list(dict.fromkeys(name for names in (here, en, ko) for name in names[0] + names[1])), here[2], here[3].replace('.ipynb', '.html')]
             for here, en, ko in both]
    index = dict(pages=[app.searched[name] for name in sorted(app.searched)], words=words)
    text = 'const INDEX = ' + json.dumps(index, ensure_ascii=False, separators=(',', ':')) + ';\n'
    (Path(app.outdir)/'searchindex.js').write_text(text, encoding='utf-8', newline='\n')


def setup(app):
    app.connect('builder-inited', begin)
    app.connect('html-page-context', read_page)
    app.connect('html-collect-pages', search_page)
    app.connect('build-finished', write_index)
    return dict(parallel_read_safe=True)
