"The Korean rulers: on rows judged by hand, and on real rows with errors planted in them."
import random

import pytest

from kofinetune.data import load_rows
from kofinetune.korean import PAIRS, _PARTICLE, check_particles, code_switching, hangul_share, known_nouns, speech_level
from kofinetune.eval import _distinct as distinct

NOUNS = {'사람', '집', '물', '서울', '연필', '바다', '나무', '고양이', '국가', '학교', '대학', '나', '책', '전문가'}


@pytest.mark.parametrize('text, wanted', [
    ('사람은 집을 짓는다', {'사람은': True, '집을': True, '짓는다': None}),
    ('사람는 집를 짓는다', {'사람는': False, '집를': False}),
    ('물로 씻고 서울로 간다', {'물로': True, '서울로': True}),
    ('물으로 씻고 집로 간다', {'물으로': False, '집로': False}),
    ('바다으로, 나무으로', {'바다으로': False, '나무으로': False}),
    ('고양이가 온다', {'고양이가': True}), ('고양이이 온다', {'고양이이': False}), ('고양이 온다', {'고양이': None}),
    ('국가 전문가 모두', {'국가': None, '전문가': None}), ('국가가 돕는다', {'국가가': True}),
    ('먹는 것과 있는 것, 높은 산, 같이', {'먹는': None, '있는': None, '높은': None, '같이': None}),
    ('나는 나은 쪽이다', {'나는': True, '나은': None}),
    ('“책”을 "집"를', {}),                                        # the quotation mark parts the word from its particle
    ('3을 더하고 2을 빼면 1이 된다', {'3을': True, '2을': False, '1이': True}),
    ('8로 나누고 6으로 곱한다', {'8로': True, '6으로': True}),
    ('AI는 API를 쓴다. 90%가 넘는다', {'AI는': None, 'API를': None, '90%가': None}),
    ('학교에서는 대학에서도', {'학교에서는': None}),
    ('', {}),
])
def test_particles_by_hand(text, wanted):
    seen = dict(check_particles(text, NOUNS))
    assert {word: seen.get(word) for word in wanted} == wanted
    if not wanted: assert True not in seen.values() and False not in seen.values()


def test_other_rulers_by_hand():
    assert (distinct('가나다가나', 2), distinct(['나는', '나는', '간다'], 1), distinct('', 2)) == (3 / 4, 2 / 3, 1.0)
    assert (hangul_share('한글 abc'), hangul_share('123'), hangul_share('漢字')) == (2 / 5, 1.0, 0.0)
    assert [speech_level(t) for t in ('밥을 먹어요.', '밥을 먹었다.', '밥을 먹어요. 물도 마셨다.', '')] == ['polite', 'plain', 'mixed', None]
    assert code_switching(dict(instruction='날씨를 말해 주세요.', input='', output='오늘은 sunny 하고 따뜻합니다.'))


@pytest.mark.koalpaca
def test_particles_on_real_rows(koalpaca):
    "GPT's Korean has next to no wrong particle, so what is flagged in it are false alarms; planted errors must be found."
    rows = load_rows(str(koalpaca))
    nouns = known_nouns([row[field] for row in rows for field in ('instruction', 'input', 'output')])
    seen = [pair for row in rows[:4000] for pair in check_particles(row['output'], nouns)]
    decided = [(word, ok) for word, ok in seen if ok is not None]
    assert len(decided) > .5 * len(seen)
    assert sum(not ok for _, ok in decided) < .01 * len(decided)
    found = []
    for word, ok in random.Random(0).sample(decided, 2000):
        stem, particle = _PARTICLE.findall(word)[0]
        forms = next(forms for forms in PAIRS.values() if particle in forms)
        if ok: found += [fits for _, fits in check_particles(stem + forms[1 - forms.index(particle)], nouns)]
    assert found.count(True) == 0 and found.count(False) > .97 * len(found)
