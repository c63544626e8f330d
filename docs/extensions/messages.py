"Which texts are translated: those with words in them. Names, numbers, code and what code printed are not."
import re

from docutils import nodes
from sphinx.transforms import SphinxTransform

NO_WORDS = re.compile(r'(\{\w+\})?`[^`]*`|\]\([^)]*\)|<[^>]*>|[^A-Za-z]')


def has_words(text): return bool(re.search('[A-Za-z]{2}', NO_WORDS.sub(' ', text)))


class MarkUntranslated(SphinxTransform):
    "Keep out of the catalogues what a translator could only copy."
    default_priority = 10   # before Sphinx puts translations in their place

    def apply(self):
        for node in self.document.findall(nodes.TextElement):
            if isinstance(node, nodes.Inline): continue
            if not has_words(node.rawsource or node.astext()) or printed(node): node['translatable'] = False


def printed(node):
    "Whether a cell printed it; what a cell without shown code prints counts as prose."
    while node := node.parent:
        if isinstance(node, nodes.container) and 'cell' in node['classes']:
            return 'tag_remove-input' not in node['classes'] and not node.get('hide_mode') and 'remove-input' not in ' '.join(node['classes'])
    return False


def setup(app):
    app.add_transform(MarkUntranslated)
    return dict(parallel_read_safe=True)
