"Audit, validation and scale: rows in = rows kept + rows reported, whatever comes in."
import json, random

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from kofinetune import audit as module
from kofinetune.recipe import Recipe
from kofinetune.runs import write_jsonl
from kofinetune.audit import DETECTORS, astray_batches, audit
from kofinetune.data import clean_rows, prepare
from kofinetune.formats import read_rows

relaxed = settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])


def ask(instruction='수도는 어디인가요?', input='', output='서울입니다.', **more):
    return dict(instruction=instruction, input=input, output=output, **more)


# ---- the audit on real rows

@pytest.fixture(scope='module')
def real(koalpaca): return read_rows(koalpaca)


@pytest.fixture(scope='module')
def flags(real): return audit(real)


@pytest.mark.koalpaca
def test_astray_batches_are_the_three_that_a_reader_finds(real, flags):
    assert flags['astray_batch'] == [*range(70, 79), *range(2740, 2749), *range(5140, 5149)]
    assert all(batch['chance'] < 1e-6 for batch in astray_batches(real))


@pytest.mark.koalpaca
def test_astray_batches_are_found_where_rows_are_missing(real):
    draw = random.Random(5)
    kept = [i for i in range(len(real)) if draw.random() > .05]
    found = {kept[i] for i in module._astray_batch([real[i] for i in kept])}
    astray = {*range(70, 80), *range(2740, 2750), *range(5140, 5150)}
    assert found <= astray and len(found) >= .8 * len(astray & set(kept)) - 3


@pytest.mark.koalpaca
@pytest.mark.parametrize('seed', range(3))
def test_shuffled_rows_have_no_batches(real, seed):
    assert astray_batches(random.Random(seed).sample(real, len(real))) == []


@pytest.mark.koalpaca
def test_counts_that_can_be_checked_by_hand(real, flags):
    text = [row['output'] for row in real]
    assert flags['empty_answer'] == [i for i, t in enumerate(text) if not t.strip()] == []
    assert flags['no_hangul'] == [i for i, t in enumerate(text) if not any('가' <= c <= '힣' or 'ㄱ' <= c <= 'ㆎ' for c in t)]
    assert flags['odd_number'] == [5, 973, 2117, 4419]
    assert set(range(4550, 4560)) <= set(flags['prompt_marker'])
    assert len(flags['no_hangul']) == 310


# ---- detectors, each beside a row that is as it should be

PAIRS = {   # flag: (a row that has it, the same row without)
    'empty_answer': (ask(output=' \n'), ask()),
    'no_hangul': (ask(output='Seoul'), ask(output='서울(Seoul)')),
    'echoes_question': (ask(input='나는 간다.', output='나는 간다. '), ask(input='나는 간다.', output='저는 갑니다.')),
    'no_input_answer': (ask(output='입력 내용이 없어 답할 수 없습니다.'), ask(output='함수는 입력에 따라 다른 값을 냅니다.')),
    'placeholder_input': (ask(input='<noinput>'), ask(input='없음의 반대말')),
    'prompt_marker': (ask(output='서울입니다.\n### Input:'), ask(output='서울입니다. #수도')),
    'odd_number': (ask('홀수 단어를 고르세요.', '물, 불, 책상'), ask('홀수를 고르세요.', '1, 2, 4')),
    'truncated_ending': (ask(output='서울은 한강의 남과 북에 걸쳐 있으며'), ask(output='강, 산, 들, 바다')),
    'mixed_speech': (ask(output='서울은 넓다. 부산은 바다에 닿아 있습니다.'), ask(output='그는 "서울은 넓다."라고 했습니다. 맞는 말입니다.')),
    'code_switching': (ask(output='서울은 the biggest city입니다.'), ask(output='서울(the capital)은 KTX로 갑니다.')),
}


@pytest.mark.parametrize('flag', PAIRS)
def test_detector(flag):
    with_it, without = PAIRS[flag]
    assert DETECTORS[flag](with_it) and not DETECTORS[flag](without)


def test_every_detector_is_shown_here(): assert set(PAIRS) == set(DETECTORS)


def test_near_duplicates_need_the_same_answer():
    rows = [ask(), ask('수도는, 어디인가요'), ask('수도는 어디에 있나요?', output='한강 옆입니다.'), ask()]
    flags = audit(rows)
    assert flags['near_duplicate'] == [1] and flags['exact_duplicate'] == [3]


text = st.text(alphabet='가나다라마바사 ab1.,', min_size=1, max_size=30)


def shingles(text):
    text = ''.join(filter(str.isalnum, text))
    return {text[i:i + 3] for i in range(max(len(text) - 2, 1))} - {''}


@relaxed
@given(texts=st.lists(text, max_size=12))
def test_similar_pairs_are_measured_exactly_and_point_back(texts):
    for i, j, share in module._similar_pairs(texts, .5):
        assert j < i and share >= .5
        a, b = shingles(texts[i]), shingles(texts[j])
        assert share == len(a & b) / len(a | b)


any_text = st.text(max_size=20)
any_row = st.builds(ask, any_text.filter(str.strip), any_text, any_text)


@relaxed
@given(rows=st.lists(any_row, max_size=25), drop=st.sets(st.sampled_from(list(audit([])))))
def test_cleaning_keeps_or_reports_every_row(rows, drop):
    kept, report = clean_rows(rows, tuple(drop))
    assert len(kept) + len(report['dropped']) == len(rows)
    assert kept == [row for i, row in enumerate(rows) if i not in set(report['dropped'])]
    for name, where in report['flags'].items(): assert where == sorted(set(where)) and all(0 <= i < len(rows) for i in where), name


def test_audit_of_no_rows(): assert all(where == [] for where in audit([]).values())


# ---- many rows

def test_among_many_rows_near_copies_are_not_looked_for_and_cannot_be_dropped(tmp_path, monkeypatch):
    write_jsonl([ask(f'{i}번은 어느 도시인가요?') for i in range(9)] + [ask('0번은 어느 도시인가요?')], tmp_path/'a.jsonl')
    monkeypatch.setattr(module, '_SMALL', 9)
    recipe = Recipe(source=str(tmp_path/'a.jsonl'), valid_rows=3, drop=('exact_duplicate',))
    prepare(recipe, tmp_path/'run')
    report = json.loads((tmp_path/'run'/'data'/'audit.json').read_text(encoding='utf-8'))
    assert set(DETECTORS) | {'exact_duplicate', 'length_outlier'} == set(report['flags']) and report['dropped'] == [9]
    with pytest.raises(ValueError, match="'near_duplicate'; the flags of 10 rows are"):
        prepare(recipe.replace(drop=('near_duplicate',)), tmp_path/'other')
