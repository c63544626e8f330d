"A search that finds Korean inside words: 조정 in 미세조정을. Both languages have it, since the rows are Korean in both."
import re

from sphinx.search.en import SearchEnglish

HANGUL = re.compile('[가-힣]{2,}')


class SearchEnglishAndKorean(SearchEnglish):
    """English words as Sphinx splits and stems them, and every two syllables of a Korean word beside the word itself.

    Sphinx's search looks inside words only for what is longer than two signs; most Korean words have two syllables.
    """

    def split(self, input):
        words = super().split(input)
        return words + [run[i:i + 2] for word in words for run in HANGUL.findall(word) for i in range(len(run) - 1)]


class SearchKorean(SearchEnglishAndKorean): lang = 'ko'   # the language's name stays: Sphinx picks the stemmer by it


def setup(app):
    app.add_search_language(SearchEnglishAndKorean)
    app.add_search_language(SearchKorean)
    return dict(parallel_read_safe=True)
