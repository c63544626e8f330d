"""The words of glossary.ipynb where they are used: the first one of each in a lesson shows its line on hover, focus or tap.

The search uses the pairs of names too: who looks for 양자화 on an English page means quantization.
"""
import json
import re
from html import escape
from pathlib import Path

from docutils import nodes
from sphinx.transforms.post_transforms import SphinxPostTransform

from .messages import catalogue

ENTRY = re.compile(r'\*\*(?P<english>.+?)\*\* · (?P<korean>.+?): (?P<meaning>.+) \(\[.+?\]\((?P<link>.+?)\)\)')
PARTICLE = '(?:은|는|이|가|을|를|의|과|와|에|에서|로|으로|도|만|마다|이란|란|이라고|라고)?'
COMMON = {'run', 'split', 'flag', 'answer', 'rank', 'process', 'precision', 'step', 'proof'}   # mean other things too: explained on their own page alone


def entries(
    folder: Path,   # of the notebooks
    language: str,
) -> list:          # (English names, Korean names, meaning, link to where it is explained) of each word
    "Read the glossary in a language."
    cells = json.loads((folder/'glossary.ipynb').read_text(encoding='utf-8'))['cells']
    lines = [line[2:] for cell in cells for line in ''.join(cell['source']).splitlines() if line.startswith('- **')]
    messages = catalogue(language, 'glossary')
    found = [entry for line in lines if (entry := ENTRY.fullmatch(messages.get(line, line)))]
    return [(names(e['english']), names(e['korean']), re.sub('[`*]', '', e['meaning']), e['link']) for e in found]


def names(text):
    "The names in a list of them; what stands in brackets is one more: 파인튜닝(미세조정)."
    return [name for name in re.split(r', |\(|\)', text) if name]


class MarkTerms(SphinxPostTransform):
    "Put the meaning of a word beside its first use in a lesson."
    default_priority = 20

    def run(self):
        if not re.match(r'\d\d_', self.env.docname): return
        language = self.config.language
        meanings = {name.lower(): meaning for english, korean, meaning, link in entries(Path(self.app.srcdir), language)
                    if not COMMON & {*english} or link.startswith(self.env.docname) for name in (english if language == 'en' else korean)}
        known = '|'.join(re.escape(name) for name in sorted(meanings, key=len, reverse=True))
        if language == 'en': word = re.compile(rf'(?<![\w-])({known})s?(?![\w-])', re.I)
        else: word = re.compile(rf'(?<![\w가-힣])({known})(?={PARTICLE}(?![\w가-힣]))', re.I)
        for text in list(self.document.findall(nodes.Text)):
            if is_prose(text): text.parent.replace(text, explained(text.astext(), word, meanings))


def is_prose(text):
    "Whether a text is a sentence of a paragraph or of a list."
    node = text.parent.parent if isinstance(text.parent, (nodes.emphasis, nodes.strong)) else text.parent
    while isinstance(node, nodes.Element):
        if isinstance(node, (nodes.entry, nodes.reference, nodes.title, nodes.literal, nodes.literal_block)): return False
        if {'cell_output', 'shown', 'implementation', 'dropdown'} & {*node.get('classes', ()), node.get('design_component')}: return False
        if isinstance(node, nodes.document): return True
        node = node.parent


def explained(text, word, meanings):
    "A text with the meaning at each word that still has one; a meaning is used up."
    done, last = [], 0
    for found in word.finditer(text):
        meaning = meanings.get(found[1].lower())
        if not meaning or found[0] == 'splits': continue   # a verb
        for name in [name for name, other in meanings.items() if other == meaning]: meanings[name] = None
        at = f'term-{len(meanings)}-{sum(value is None for value in meanings.values())}'
        done += [nodes.Text(text[last:found.start()]),
                 nodes.raw('', f'<dfn tabindex="0" aria-describedby="{at}">{escape(found[0])}<span role="tooltip" id="{at}">{escape(meaning)}</span></dfn>', format='html')]
        last = found.end()
    return done + [nodes.Text(text[last:])]


def setup(app):
    app.add_post_transform(MarkTerms)
    return dict(parallel_read_safe=True)
