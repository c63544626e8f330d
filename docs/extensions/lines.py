"""Where a line of prose does not end: inside short code, and before a Korean particle.

Browsers keep a Korean word whole, but may go on in the next line after a bracket, a slash or code that ends in one. A word joiner forbids that.
"""
import re

from docutils import nodes
from sphinx.transforms.post_transforms import SphinxPostTransform

SHORT = 16   # characters of code that are not broken
JOINER = '\u2060'
SIGNS = r'[)\]}>/:;=%"\'”’…*+#~.-]'
BETWEEN = re.compile(f'(?<={SIGNS})(?=[가-힣])')


class KeepTogether(SphinxPostTransform):
    "Mark short code, and join Hangul to the sign before it, also where that is the end of code or of a link."
    default_priority, formats = 310, ('html',)   # after terms are marked and drawings are put in

    def run(self):
        for element in self.document.findall(nodes.TextElement):
            if isinstance(element, (nodes.Inline, nodes.FixedTextElement, nodes.title)): continue
            in_table = isinstance(element.parent, nodes.entry)
            for code in [] if in_table else element.findall(nodes.literal):
                if len(code.astext()) <= SHORT: code['classes'].append('short')
            if self.config.language == 'ko': join(element)


def join(element):
    before = ''
    for text in list(element.findall(nodes.Text)):
        said = text.astext()
        if not is_code(text): text.parent.replace(text, nodes.Text(BETWEEN.sub(JOINER, before + said)[len(before):]))
        before = said[-1:] or before


def is_code(text): return isinstance(text.parent, (nodes.literal, nodes.raw)) or isinstance(text.parent.parent, nodes.literal)


def setup(app):
    app.add_post_transform(KeepTogether)
    return dict(parallel_read_safe=True)
