"The packaged conversations: made by the code, right, in right Korean, and not to be answered from the last question alone."
import json
import re
from collections import Counter
from datetime import date, timedelta

import pytest

from conftest import ROOT

from kofinetune.data import load_rows, split_rows
from kofinetune.dialogs import _EVENTS, _FACTS, _GOODS, _NAMES, _NOUNS, _PARTS, _PLACES, _converse, _make_dialogs

FILE = ROOT/'kofinetune'/'assets'/'dialogs.jsonl'
ROWS = [json.loads(line) for line in FILE.read_text(encoding='utf-8').splitlines()]


def users(row): return [turn['content'] for turn in row['messages'] if turn['role'] == 'user']


def system(row): return row['messages'][0]['content'] if row['messages'][0]['role'] == 'system' else ''


def bare(row):
    "The last answer, without what a system text made of it."
    form = dict(_PARTS['follow']).get(system(row), '{}')
    before, after = form.split('{}')
    assert row['output'].startswith(before) and row['output'].endswith(after)
    return row['output'][len(before):len(row['output']) - len(after)]


def test_the_code_makes_the_file_to_the_byte():
    made = ''.join(json.dumps(row, ensure_ascii=False) + '\n' for row in _make_dialogs())
    assert made.encode() == FILE.read_bytes()
    assert _make_dialogs(1) != ROWS


def test_there_are_50_of_each_of_ten_kinds():
    assert len(ROWS) == 500 and Counter(row['kind'] for row in ROWS) == dict.fromkeys(_PARTS['kinds'], 50) and len(_PARTS['kinds']) == 10
    assert [len(users(row)) for row in ROWS] == [2] * 500
    for row in ROWS:
        roles = [turn['role'] for turn in row['messages']]
        assert roles[-4:] == ['user', 'assistant'] * 2 and roles[:-4] in ([], ['system'])
        assert (row['instruction'], row['input'], row['output']) == (users(row)[-1], '', row['messages'][-1]['content'])
        assert len(row['output']) <= 30


def test_none_occurs_twice_and_so_none_leaks():
    "Held-out conversations neither open nor go on like one of the training rows, however the rows are split."
    openings = [users(row)[0] for row in ROWS]
    assert len(set(openings)) == len({json.dumps(row['messages'][:-1]) for row in ROWS}) == 500
    train, valid = split_rows([row | dict(instruction=users(row)[0]) for row in ROWS], 50)
    assert len(valid) == 50 and not {users(row)[0] for row in train} & {users(row)[0] for row in valid}


def blind(rows):
    "How often a reader is right who gives each last question its commonest answer."
    answers = {}
    for row in rows: answers.setdefault(row['instruction'], Counter())[row['output']] += 1
    return sum(max(counts.values()) for counts in answers.values()) / len(rows)


def test_the_last_question_alone_is_answered_in_at_most_one_of_twenty():
    assert blind(ROWS) <= .05
    assert Counter(row['instruction'] for row in ROWS) == dict.fromkeys((q for kind in _PARTS['kinds'].values() for q, _ in kind['second']), 25)
    assert blind([row | dict(output='네.') for row in ROWS]) == 1     # the measure sees an answer that needs no exchange


@pytest.mark.parametrize('kind', _PARTS['kinds'])
def test_of_many_conversations_too(kind):
    import random
    rng = random.Random(kind)
    assert blind([_converse(rng, kind, number) for number in [10, 11] * 2000]) <= .05


def test_a_fifth_has_a_system_text_that_matters_or_does_not():
    follow, ignore = dict(_PARTS['follow']), _PARTS['ignore']
    for kind in _PARTS['kinds']:
        texts = [system(row) for row in ROWS if row['kind'] == kind]
        assert sum(text in follow for text in texts) == sum(text in ignore for text in texts) == 5 and texts.count('') == 40
    for row in ROWS:
        for turn in row['messages']:
            if turn['role'] != 'assistant': continue
            obeys = turn['content'].startswith('답변: ') or turn['content'].endswith(' (끝)') or turn['content'][0] == turn['content'][-1] == '"'
            assert obeys == (system(row) in follow)


PAIRS = [('은', '는'), ('이', '가'), ('을', '를'), ('과', '와'), ('으로', '로'), ('이라고', '라고'), ('이에요', '예요')]


def test_every_particle_is_right():
    "By a rule of our own: has the last syllable a final consonant?"
    words = {*_NAMES, *_GOODS, *_EVENTS, *_PLACES, *_NOUNS, *'원 일 분 시 미터 그램 톤 킬로그램 밀리리터 센티미터 밀리미터 리터'.split()}
    forms = {form: closed for pair in PAIRS for form, closed in zip(pair, (True, False))}
    found = re.compile(f'({"|".join(sorted(words, key=len, reverse=True))})({"|".join(sorted(forms, key=len, reverse=True))})(?![가-힣])')
    seen = Counter()
    for row in ROWS:
        for turn in row['messages']:
            for word, form in found.findall(turn['content']):
                tail = (ord(word[-1]) - 0xAC00) % 28
                assert forms[form] == (tail not in (0, 8) if form in ('으로', '로') else tail > 0), turn['content']
                seen[form] += 1
            assert not re.search(r'[{}]|\s\s', turn['content'])
    assert set(seen) == set(forms) and seen.total() > 1400, seen


def day(text): return date(2024, *map(int, re.search(r'(\d+)월 (\d+)일', text).groups()))


def amounts(text): return [int(n.replace(',', '')) for n in re.findall(r'[\d,]*\d', text)]


def right(row):
    "Is the last answer what the first exchange says? Worked out from the texts, without the tables."
    (first, second), answer, said = users(row), bare(row), row['messages'][-3]['content']
    stem = re.sub(r'(?<=.)(이라고 하셨어요|라고 하셨어요| 님이에요|이에요|예요)\.$', '', answer)
    match row['kind']:
        case 'name': return re.search(f'{stem}(이라고|라고|이에요|예요)', first) and f'{stem} 님' in said
        case 'list': return re.findall(r'(\w+?), (\w+?), (\w+?)(?:이에요|예요|을 |를 | 순서)', first)[0][1 if '두 번째' in second else 2] == stem
        case 'plan': return bool(re.match('오[전후] ', stem)) == ('몇 시' in second) and (f'{stem}에' in first or f'{stem}까지' in first or f'{stem}로' in first or f'{stem}으로' in first)
        case 'who':
            who, what, other, thing = re.match(r'(..)[은는] (\w+?)[을를], (..)[은는] (\w+?)[을를] ', first).groups()
            return stem == ({who: other, other: who}[re.search(f'{who}|{other}', said)[0]] if '사람' in second else
                            {who: thing, other: what}[re.search(f'{who}|{other}', said)[0]])
        case 'particle': return answer[:-1] == re.search("'(.+)'", first)[1] and answer[-1] in ('을를' if '을/를' in second else '이가')
        case 'letters':
            word = re.search(r"'(..)'|^(..)(?:이라고|라고) 써|단어는 (..)(?:이에요|예요)", first)
            word = next(filter(None, word.groups()))
            return stem == (word[0] if '첫' in second else word[::-1])
        case 'polite': return f'{answer.rpartition(" ")[0]} ' in first and answer.endswith('니까?' if '물어보는' in second else '니다.')
        case 'date':
            wanted = day(first) + timedelta(1 if '다음' in second else -1)
            return answer.startswith(f'{wanted.month}월 {wanted.day}일')
        case 'price': return amounts(answer) == [min(amounts(first)) * (2 if '두 개' in second else 1)]
        case 'unit': return amounts(answer) == [amounts(said)[0] * (2 if '두 배' in second else 10)] and re.sub(r'[\d ]', '', stem) in said


def test_every_answer_is_right():
    assert [row for row in ROWS if not right(row)] == []
    other = {}
    for row in ROWS:      # the check sees an answer that belongs to another conversation
        other.setdefault(row['instruction'], []).append(row)
    swapped = [a | dict(output=b['output'], messages=a['messages']) for rows in other.values() for a, b in zip(rows, rows[1:]) if system(a) == system(b) == '']
    assert len(swapped) > 200 and sum(bool(right(row)) for row in swapped) < .02 * len(swapped)


def test_the_source_loads_them():
    assert [row['output'] for row in load_rows('dialogs')] == [row['output'] for row in ROWS]
    assert {row['kind'] for row in load_rows('dialogs')} == set(_FACTS)
