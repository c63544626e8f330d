"Audit, validation and scale: rows in = rows kept + rows reported, whatever comes in."
import json, random, time

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

import audit_rows
from kofinetune import audit as module
from kofinetune.recipe import Recipe
from kofinetune.runs import write_jsonl
from kofinetune.audit import DETECTORS, astray_batches, audit, near_pairs
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
    'html_entity': (ask(output='물 &amp; 불'), ask(output='R&D; 물 & 불')),
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


@pytest.mark.parametrize('kind', audit_rows.GOOD)
def test_good_row_is_kept(kind):
    dropped = {'html_entity', *Recipe.named('best').drop} & set(DETECTORS)
    flagged = [(flag, texts) for texts in audit_rows.GOOD[kind] for flag in dropped if DETECTORS[flag](ask(*texts))]
    assert flagged == [] and len(audit_rows.GOOD[kind]) == 6


@pytest.mark.parametrize('flag', audit_rows.BAD)
def test_bad_row_is_flagged(flag): assert [texts for texts in audit_rows.BAD[flag] if not DETECTORS[flag](ask(*texts))] == []


LONG = ('아래 문의를 읽고 배송, 환불, 상품 가운데 가장 알맞은 이름 하나를 고르세요. 설명은 덧붙이지 말고 이름만 한 단어로 답하세요. '
        '판단하기 어려우면 상품으로 답하세요. 뜻을 알 수 없는 문의도 셋 가운데 하나로 답합니다.')
DIFFERENT = [   # two rows that ask for different things
    (ask(LONG, '언제 도착하나요?', '배송'), ask(LONG, '주소를 바꾸고 싶어요', '배송')),
    (ask(LONG, '운동화 사이즈 270 있나요', '상품'), ask(LONG, '운동화 사이즈 275 있나요', '상품')),
    (ask('44미터를 센티미터로 바꾸어 쓰세요.', output='4400센티미터'), ask('4미터를 센티미터로 바꾸어 쓰세요.', output='400센티미터')),
    (ask('작은 수부터 쓰세요.', '1, 23', '1, 23'), ask('작은 수부터 쓰세요.', '12, 3', '3, 12')),
    (ask('5 + 3은 얼마인가요?', output='8'), ask('5 - 3은 얼마인가요?', output='2')),
    (ask('수직선에서 -3의 절댓값은 얼마인가요?', output='삼입니다.'), ask('수직선에서 +3의 절댓값은 얼마인가요?', output='삼입니다.')),
    (ask(LONG, '반품이요', '환불'), ask(LONG, '반품이요 말고 교환이요', '환불')),
    (ask('어제 시장에서 오랜 친구 민수를 만나 국수를 먹고 집으로 돌아온 일을 짧게 쓰세요.', output='어제 시장에서 민수를 만나 국수를 먹고 집에 왔습니다.'),
     ask('어제 시장에서 오랜 친구 지수를 만나 국수를 먹고 집으로 돌아온 일을 짧게 쓰세요.', output='어제 시장에서 지수를 만나 국수를 먹고 집에 왔습니다.')),
    (ask('서울에서 부산까지 가는 가장 빠른 방법을 알려 주세요.', output='기차를 타세요.'), ask('서울에서 부산까지 가는 가장 빠른 방법을 꼭 알려 주세요.', output='비행기를 타세요.')),
]
SAME = [   # two rows that say the same
    (ask('수도는 어디인가요?'), ask('수도는, 어디인가요')), (ask(LONG, '언제 도착하나요?', '배송'), ask(LONG, '언제  도착 하나요', '배송')),
    (ask('서울에서 부산까지 가는 가장 빠른 방법을 알려 주세요.', output='기차를 타세요.'), ask('서울에서 부산까지 가는 가장 빠른 방법을 꼭 알려 주세요.', output='기차를 타세요.')),
    (ask('사과를 오래 두고 먹으려면 어떻게 보관해야 할까요?', output='서늘한 곳에 봉지에 담아 둡니다.'),
     ask('사과는 오래 두고 먹으려면 어떻게 보관해야 할까요?', output='서늘한 곳에, 봉지에 담아 둡니다!')),
    (ask(LONG, '어제 주문한 파란 운동화가 아직도 오지 않아서 무척 답답합니다', '배송'),
     ask(LONG, '어제 주문한 파란 운동화가 아직도 오지 않아서 정말 무척 답답합니다', '배송')),
]


@pytest.mark.parametrize('pair', DIFFERENT)
def test_rows_that_ask_for_different_things_are_no_near_copies(pair): assert near_pairs([*pair]) == []


@pytest.mark.parametrize('pair', SAME)
def test_rows_that_say_the_same_are_near_copies(pair): assert near_pairs([*pair]) == [(1, 0)]


def words(draw, least, most): return ' '.join(''.join(draw.choices('가나다라마바사아자차카타파하고노도로모보', k=3)) for _ in range(draw.randint(least, most)))


def test_among_12000_rows_with_one_instruction_the_near_copies_alone_are_found():
    draw = random.Random(0)
    rows = [ask(LONG, words(draw, 4, 25), draw.choice(['배송', '환불', '상품'])) for _ in range(12_000)]
    rows += [row | dict(input=row['input'].replace(' ', '', 1) + '!') for row in rows[:100]]
    rows += [row | dict(input='저기 ' + row['input']) for row in rows[100:200] if len(row['input']) > 60]
    began = time.process_time()
    assert audit(rows)['near_duplicate'] == list(range(12_000, len(rows)))
    assert time.process_time() - began < 15


def test_12000_rows_of_one_mould_are_all_different():
    people, places = [words(random.Random(i), 1, 1) for i in range(20)], ['역', '학교', '공원', '시장', '극장', '도서관', '병원', '바다', '산', '집', '강', '숲']
    rows = [ask(f'Translate Korean to English: {when} {who} 씨는 {where}에서 오랜 친구를 만나 따뜻한 {food} 함께 먹고 집으로 돌아왔습니다.',
                output=f'{when} {who} met an old friend at {where}, ate warm {food} together and came back home.')
            for when in ('어제', '오늘', '그제', '지난주', '아침') for who in people for where in places for food in ('국수', '죽', '떡', '빵', '국', '밥', '면', '차', '전', '탕')]
    began = time.process_time()
    assert len(rows) == 12_000 and near_pairs(rows) == []
    assert time.process_time() - began < 15


def test_rows_of_one_mould_that_are_sorted_have_not_strayed():
    rows = [ask(f'{word}의 값을 {n}번 출력하는 코드를 쓰세요.', output=f'for k in range({n}):\n    print("{word}")')
            for word in (words(random.Random(i), 1, 1) for i in range(20)) for n in range(2, 8)]
    assert audit(rows)['astray_batch'] == []


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
