"""Drawings and plots that are SVG stand in the page itself: their colours are the page's, in light and dark, and their labels its language's.

A drawing of drawings.py has a file for each language. A plot has its labels as text (matplotlib's svg.fonttype 'none'), which the page's catalogue
translates.
"""
import re
from html import escape, unescape
from pathlib import Path

from docutils import nodes
from sphinx.transforms.post_transforms import SphinxPostTransform

from .messages import catalogue

LABEL = re.compile('(<text[^>]*>)([^<]*)(?=</text>)')
WORDS = re.compile('(?!.*[a-z]{2}_[a-z]).*[A-Za-z]{2}.*')   # no number, and no flag's name
COLOURS = {'#ffffff': 'var(--pst-color-background)', '#000000': 'var(--pst-color-text-base)', '#d3d3d3': 'var(--pst-color-border)'}   # a plot's paper, ink and light grey


class InlinePictures(SphinxPostTransform):
    "Put an SVG file's text in place of the picture that it is."
    default_priority, formats = 300, ('html',)

    def run(self):
        messages = catalogue(self.config.language, self.env.docname)
        for number, image in enumerate(list(self.document.findall(nodes.image))):
            path = Path(self.env.srcdir)/image['uri']
            if path.suffix != '.svg' or not path.is_file(): continue
            text = inline(path.read_text(encoding='utf-8'), image.get('alt', ''), f'picture-{number}', messages)
            image.replace_self(nodes.raw('', text, format='html'))


def inline(svg, alt, name, messages):
    "An SVG as part of a page: described by `alt`, its ids nobody else's."
    kind = 'plot' if 'matplotlib' in svg else 'drawing'
    svg = svg[re.search('<svg', svg).start():]
    if kind == 'plot':
        svg = re.sub('<metadata>.*?</metadata>', '', svg, flags=re.S)
        for colour, of_page in COLOURS.items(): svg = svg.replace(colour, of_page)
        svg = LABEL.sub(lambda found: found[1] + escape(messages.get(unescape(found[2]), unescape(found[2]))), svg)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf'\g<1>{name}-', svg)
    return svg.replace('<svg', f'<svg class="{kind}" role="img" aria-label="{escape(alt)}"', 1)


def labels(svg): return [unescape(text) for _, text in LABEL.findall(svg) if WORDS.fullmatch(text)] if 'matplotlib' in svg else []


def setup(app):
    app.add_post_transform(InlinePictures)
    return dict(parallel_read_safe=True)
