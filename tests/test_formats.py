"Files as people have them: every shape of row, every kind of file, and what happens to each row."
import gzip
import hashlib
import json

import pandas as pd
import pytest
from conftest import ROOT
from hypothesis import HealthCheck, given, settings, strategies as st

from kofinetune import cli
from kofinetune.data import prepare
from kofinetune.formats import read_rows, validate_rows
from kofinetune.recipe import Recipe
from kofinetune.report import render_page
from kofinetune.runs import read_jsonl, write_jsonl

relaxed = settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])


def ask(instruction='수도는 어디인가요?', input='', output='서울입니다.', **more):
    return dict(instruction=instruction, input=input, output=output, **more)


# ---- shapes of rows

ROW = ask('다음 수의 합은?', '3, 4', '7입니다.')
SHORT = ask('다음 수의 합은?', '', '7입니다.')
USER, BOT, SYSTEM = (dict(role=role, content=text) for role, text in (('user', SHORT['instruction']), ('assistant', SHORT['output']), ('system', '짧게.')))
PAST = [dict(role='user', content='앞 질문'), dict(role='assistant', content='앞 대답')]
TOLD = SHORT | dict(messages=[SYSTEM, USER, BOT])
LONG = ROW | dict(messages=[SYSTEM, *PAST, dict(role='user', content='다음 수의 합은?\n\n3, 4'), BOT])
ALPACA = 'Below is an instruction.\n\n### Instruction:\n다음 수의 합은?\n\n### Input:\n3, 4\n\n### Response:\n7입니다.'
SHAPES = {   # what a file holds, the row that is right, what is left out
    # of the list
    'messages': (dict(messages=[SYSTEM, USER, BOT]), TOLD, {}),
    'ShareGPT': (dict(id='a1', conversations=[{'from': 'human', 'value': USER['content']}, {'from': 'gpt', 'value': BOT['content']}]), SHORT, {'id': 1}),
    'prompt, completion': (dict(prompt=SHORT['instruction'], completion=SHORT['output']), SHORT, {}),
    'question, answer': (dict(question=SHORT['instruction'], answer=SHORT['output']), SHORT, {}),
    'Dolly': (dict(instruction=ROW['instruction'], context=ROW['input'], response=ROW['output'], category='qa'), ROW, {'category': 1}),
    'OpenOrca': (dict(id='1', system_prompt='짧게.', question=SHORT['instruction'], response=SHORT['output']), TOLD, {'id': 1}),
    'text, Alpaca': (dict(text=ALPACA), ROW, {'text before the first heading': 1}),
    'text, ChatML': (dict(text='<|im_start|>system\n짧게.<|im_end|>\n<|im_start|>user\n다음 수의 합은?<|im_end|>\n<|im_start|>assistant\n7입니다.<|im_end|>\n'),
                     TOLD, {}),
    'system and history': (ROW | dict(system='짧게.', history=[['앞 질문', '앞 대답']]), LONG, {}),
    'history in a cell': (ROW | dict(system='짧게.', history='[["앞 질문", "앞 대답"]]'), LONG, {}),
    'history of turns': (ROW | dict(system='짧게.', history=PAST), LONG, {}),
    'no history': (ROW | dict(system=' ', history=[]), ROW, {'system': 1}),
    'ShareGPT with a system': (dict(conversations=[USER, BOT], system='짧게.', kind='sum'), TOLD | dict(kind='sum'), {}),
    'a system twice': (dict(messages=[SYSTEM, USER, BOT], system='짧게.'), TOLD, {}),
    'unstripped': (dict(messages=[dict(role='system', content=' 짧게.\n'), USER, BOT]), TOLD, {}),
    'input null': (ROW | dict(input=None), SHORT, {}),
    'input NaN': (ROW | dict(input=float('nan')), SHORT, {}),
    'capitals and spaces': ({' Instruction': ROW['instruction'], 'INPUT ': ROW['input'], 'Output': ROW['output']}, ROW, {}),
    'Korean': ({'질문': SHORT['instruction'], '답변': SHORT['output']}, SHORT, {}),
    'Korean, three': ({'지시문': ROW['instruction'], '입력': ROW['input'], '출력': ROW['output']}, ROW, {}),
    # further ones
    'input, output': (dict(input=SHORT['instruction'], output=SHORT['output']), SHORT, {}),
    'query, response (MetaMath)': (dict(query=SHORT['instruction'], response=SHORT['output'], type='GSM'), SHORT, {'type': 1}),
    'problem, solution': (dict(problem=SHORT['instruction'], solution=SHORT['output']), SHORT, {}),
    'Q, A, label': (dict(Q=SHORT['instruction'], A=SHORT['output'], label=0), SHORT, {'label': 1}),
    'question, context, answer': (dict(question=ROW['instruction'], context=ROW['input'], answer=ROW['output']), ROW, {}),
    'user, assistant': (dict(user=SHORT['instruction'], assistant=SHORT['output']), SHORT, {}),
    'Alpaca with its text': (ROW | dict(text=ALPACA), ROW, {'text': 1}),
    'messages with their prompt': (dict(prompt=SHORT['instruction'], prompt_id='x', messages=[USER, BOT]), SHORT, {'prompt': 1, 'prompt_id': 1}),
    'preferences': (dict(prompt=SHORT['instruction'], chosen=SHORT['output'], rejected='8입니다.'), SHORT, {'rejected': 1}),
    'preferences as turns': (dict(prompt=SHORT['instruction'], chosen=[USER, BOT], rejected=[USER, BOT]), SHORT, {'prompt': 1, 'rejected': 1}),
    'prompt and completion as turns': (dict(prompt=[SYSTEM, USER], completion=[BOT]), TOLD, {}),
    'parts of a turn': (dict(messages=[dict(role='user', content=[dict(type='text', text=SHORT['instruction'])]), BOT]), SHORT, {}),
    'turns by role and text': (dict(conversation=[dict(speaker='Human', text=USER['content']), dict(speaker='Bot', text=BOT['content'])]), SHORT, {}),
    'turns as pairs': (dict(conversation=[dict(human=USER['content'], assistant=BOT['content'])]), SHORT, {}),
    'turns as JSON in a cell': (dict(messages=json.dumps([USER, BOT])), SHORT, {}),
    'fields of a turn': (dict(messages=[USER | dict(name='kim', tool_calls=None), BOT]), SHORT, {'name of a turn': 1}),
    'text, Gemma': (dict(text='<bos><start_of_turn>user\n다음 수의 합은?<end_of_turn>\n<start_of_turn>model\n7입니다.<end_of_turn>\n'), SHORT, {}),
    'text, Llama 2': (dict(text='<s>[INST] <<SYS>>\n짧게.\n<</SYS>>\n\n다음 수의 합은? [/INST] 7입니다. </s>'), TOLD, {}),
    'text, Llama 3': (dict(text='<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n다음 수의 합은?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n'
                                '7입니다.<|eot_id|>'), SHORT, {}),
    'text, Zephyr': (dict(text='<|user|>\n다음 수의 합은?</s>\n<|assistant|>\n7입니다.</s>'), SHORT, {}),
    'text, Guanaco': (dict(text='### Human: 다음 수의 합은?### Assistant: 7입니다.'), SHORT, {}),
    'text, Korean headings': (dict(text='### 질문: 다음 수의 합은?\n\n### 맥락: 3, 4\n\n### 답변: 7입니다.<|endoftext|>'), ROW, {}),
    'text, usr and bot': (dict(text='<usr> 다음 수의 합은?\n<bot> 7입니다.'), SHORT, {}),
    'text, speakers': (dict(text='Human: 다음 수의 합은?\n\nAssistant: 7입니다.'), SHORT, {}),
}


def written(tmp_path, *values):
    return write_jsonl(values, tmp_path/'rows.jsonl')


@pytest.mark.parametrize('name', SHAPES)
def test_a_shape_is_read_and_says_what_it_leaves_out(name, tmp_path):
    value, row, left_out = SHAPES[name]
    rows, report = validate_rows(written(tmp_path, value, value))
    assert rows == [row, row] and report['faults'] == {} and report['left_out'] == {name: 2 * n for name, n in left_out.items()}
    for part in ('2 rows', *(f'{name} ({2 * n})' for name, n in left_out.items())): assert part in report['understood']


def test_a_conversation_keeps_its_turns_in_one_row_and_the_line_says_who_reads_them(tmp_path):
    talk = [SYSTEM, USER, BOT, dict(role='user', content='곱은?'), dict(role='assistant', content='12입니다.'), dict(role='user', content='고마워요.')]
    rows, report = validate_rows(written(tmp_path, dict(messages=talk), dict(messages=[USER, BOT])))
    assert rows == [ask('곱은?', '', '12입니다.', messages=talk[:-1]), SHORT]
    assert report['understood'] == ('messages: 2 rows of conversations; left out: question without an answer (1); '
                                    'system texts are read in style chat only; earlier turns are read in style chat only')


HOSTILE = {   # turns -> the questions that are asked; what is counted
    'the assistant begins': ([BOT, USER, BOT], [SHORT['instruction']], {'answer without a question': 1}),
    'two questions in a row': ([dict(role='user', content='안녕?'), USER, BOT], ['안녕?\n\n' + SHORT['instruction']], {}),
    'two answers in a row': ([USER, BOT, BOT], [SHORT['instruction']], {'answer without a question': 1}),
    'an answer that is not to be trained': ([USER, BOT | dict(weight=0), USER, BOT | dict(weight=1)], [SHORT['instruction']], {'turn of weight 0': 1}),
    'an empty question': ([dict(role='user', content=' '), BOT, USER, BOT], [SHORT['instruction']], {'answer without a question': 1}),
}


@pytest.mark.parametrize('name', HOSTILE)
def test_an_odd_conversation_loses_nothing_in_silence(name, tmp_path):
    turns, asked, left_out = HOSTILE[name]
    rows, report = validate_rows(written(tmp_path, dict(messages=turns)))
    assert [row['instruction'] for row in rows] == asked and left_out.items() <= report['left_out'].items()
    if name.startswith('two questions'): assert 'questions in a row, joined' in report['understood']


@pytest.mark.parametrize('value, kind', [
    (dict(messages=[SYSTEM, USER]), 'turns: no answer'), (dict(messages=[]), 'instruction: missing'), (dict(messages='안녕'), 'turns: not JSON'),
    (dict(messages=[USER, dict(role='tool', content='3'), BOT]), 'turn: unknown role'), (dict(messages=['가?', '나']), 'turn: no object'),
    (dict(messages=[USER, dict(role='assistant', content=None)]), 'content: not text'), (dict(turns=['가?', '나?']), 'turn: no object'),
    (dict(messages=[dict(content='가?')]), 'turn: no text'), (dict(text=''), 'text: no headings'), (dict(text='그냥 글입니다.'), 'text: no headings'),
    (dict(text=None), 'text: not text'), (dict(question='고르면?', A='가', B='나'), 'output: missing'),
    (ROW | dict(history=['앞']), 'turn: no object'), (dict(text=ALPACA + '\n\n### Output:\n7'), 'text: headings'), (dict(text=ALPACA + '\n\n### Input:\n7'), 'text: headings'), (dict(question='가?', query='나?', answer='다'), 'instruction: two fields'),
    (dict(question='가?', answers=['나', '다']), 'output: missing'), (dict(question='가?', answer=['나', '다']), 'output: not text'),
    (ROW | dict(output={'a': 1}), 'output: not text'), (ROW | dict(output=7), 'output: not text'), (ROW | dict(input={'a': 1}), 'input: not text'),
    (ROW | dict(output=None), 'output: not text'), (ROW | dict(instruction=''), 'instruction: empty'), ([ROW], 'no object'), (None, 'no object'), ({}, 'instruction: missing')])
def test_a_row_that_cannot_be_used_is_a_fault_of_its_kind(value, kind, tmp_path):
    rows, report = validate_rows(written(tmp_path, ROW, value, ROW))
    assert (rows, report['faults']) == ([ROW, ROW], {kind: 1}) and report['first'][0].startswith('line 2')


def test_shapes_may_be_mixed_in_one_file_and_the_line_names_each(tmp_path):
    rows, report = validate_rows(written(tmp_path, ROW, dict(messages=[USER, BOT]), dict(question=SHORT['instruction'], answer=SHORT['output'])))
    assert rows == [ROW, SHORT, SHORT]
    for part in ('question as instruction', 'answer as output', 'messages: 1 rows of conversations'): assert part in report['understood']


def test_a_kind_that_is_no_text_is_left_out(tmp_path):
    rows, report = validate_rows(written(tmp_path, ROW | dict(kind=3), ROW | dict(kind='sum')))
    assert rows == [ROW, ROW | dict(kind='sum')] and report['left_out'] == {'kind': 1}


def test_fields_map_any_name_and_a_wrong_map_is_refused(tmp_path):
    path = written(tmp_path, {'손님': SHORT['instruction'], '직원': SHORT['output'], 'answer': '다른 글'})
    with pytest.raises(ValueError, match="has no 'instruction'.*--set fields.손님=instruction"): read_rows(path)
    assert read_rows(path, {'손님': 'instruction', '직원': 'output'}) == [SHORT]
    path = written(tmp_path, {'손님': '', '직원': '네.', 'question': '다른 글'})
    with pytest.raises(ValueError, match='the instruction is empty'): read_rows(path, {'손님': 'instruction', '직원': 'output'})
    with pytest.raises(ValueError, match="'고객', but no row"): read_rows(path, {'고객': 'instruction'})
    with pytest.raises(ValueError, match="fields.손님 is 'instuction'; it must be one of instruction, input"): read_rows(path, {'손님': 'instuction'})


# ---- kinds of files

TWO = [ROW, ask('세 글자로 쓰면?', '', '"가", 나\n다')]
FRAME = pd.DataFrame(TWO)
AS_JSON, LINES = json.dumps(TWO, ensure_ascii=False), '\n'.join(json.dumps(row, ensure_ascii=False) for row in TWO)
FILES = {
    'array.json': AS_JSON, 'indented.json': json.dumps(TWO, indent=1), 'lines.json': LINES, 'nested.json': json.dumps(dict(version='1', data=TWO)),
    'deeper.json': json.dumps(dict(data=dict(train=TWO))), 'columns.json': json.dumps(FRAME.to_dict('list')), 'pandas.json': FRAME.to_json(),
    'split.json': FRAME.to_json(orient='split'), 'index.json': FRAME.to_json(orient='index'), 'table.json': FRAME.to_json(orient='table', index=False),
    'lines.jsonl': LINES, 'array.jsonl': AS_JSON, 'indented.jsonl': json.dumps(TWO, indent=1), 'crlf.jsonl': LINES.replace('\n', '\r\n'), 'bom.jsonl': '\ufeff' + LINES,
    'blank.jsonl': f'\n\n{LINES}\n\n', 'LINES.JSONL': LINES, 'lines.ndjson': LINES, 'bom.json': '\ufeff' + AS_JSON,
    'plain.csv': FRAME.to_csv(index=False), 'bom.csv': '\ufeff' + FRAME.to_csv(index=False), 'crlf.csv': FRAME.to_csv(index=False, lineterminator='\r\n').replace('나\r\n', '나\n'),
    'semicolon.csv': FRAME.to_csv(index=False, sep=';'), 'index.csv': FRAME.to_csv(), 'blank.csv': FRAME.to_csv(index=False) + ',,\n\n', 'PLAIN.CSV': FRAME.to_csv(index=False),
    'tabs.csv': FRAME.to_csv(index=False, sep='\t'), 'tabs.tsv': FRAME.to_csv(index=False, sep='\t'), 'commas.tsv': FRAME.to_csv(index=False),
    'header.csv': FRAME.to_csv(index=False, header=[' Instruction', '입력 ', 'OUTPUT']),
    'windows.csv': FRAME.to_csv(index=False).encode('cp949'), 'excel.csv': FRAME.to_csv(index=False, sep='\t').encode('utf-16'),
    'packed.jsonl.gz': gzip.compress(LINES.encode()), 'PACKED.CSV.GZ': gzip.compress(FRAME.to_csv(index=False).encode()), 'one.parquet': FRAME.to_parquet(),
}


@pytest.mark.parametrize('name', FILES)
def test_a_kind_of_file_is_read(name, tmp_path):
    body = FILES[name]
    (tmp_path/name).write_bytes(body if isinstance(body, bytes) else body.encode())
    rows, report = validate_rows(tmp_path/name)
    assert rows == TWO and report['reported'] == 0
    if name in ('windows.csv', 'excel.csv'): assert 'read as ' in report['understood'] and f'-t utf-8 {name}' in report['understood']
    if name == 'nested.json': assert 'left out: version (1)' in report['understood']


def test_a_parquet_file_holds_conversations(tmp_path):
    pd.DataFrame([dict(messages=[USER, BOT]), dict(messages=[USER | dict(name='kim'), BOT])]).to_parquet(tmp_path/'talk.parquet')
    rows, report = validate_rows(tmp_path/'talk.parquet')
    assert rows == [SHORT, SHORT] and report['left_out'] == {'name of a turn': 1}


def test_one_object_is_one_row(tmp_path):
    (tmp_path/'one.json').write_text(json.dumps(dict(id='1', messages=[USER, BOT])), encoding='utf-8')
    (tmp_path/'two.json').write_text(json.dumps(dict(messages=[USER, BOT])), encoding='utf-8')
    assert read_rows(tmp_path/'one.json') == read_rows(tmp_path/'two.json') == [SHORT]


def test_excel_is_read_or_says_what_is_missing(tmp_path):
    try: FRAME.to_excel(tmp_path/'book.xlsx', index=False)
    except ModuleNotFoundError:
        (tmp_path/'book.xlsx').write_bytes(b'PK')
        with pytest.raises(ValueError, match='book.xlsx needs openpyxl; install it with: pip install openpyxl'): read_rows(tmp_path/'book.xlsx')
    else:
        assert read_rows(tmp_path/'book.xlsx') == TWO
        with pd.ExcelWriter(tmp_path/'two.xlsx') as book:
            FRAME.to_excel(book, sheet_name='행', index=False)
            FRAME.to_excel(book, sheet_name='메모', index=False)
        assert validate_rows(tmp_path/'two.xlsx')[1]['left_out'] == {'sheet 메모': 3}
        (tmp_path/'no.xlsx').write_bytes(b'PK')
        with pytest.raises(ValueError, match='no.xlsx is not an Excel file'): read_rows(tmp_path/'no.xlsx')


@pytest.mark.parametrize('splits', [['only'], ['train', 'test'], ['one', 'two']])
def test_a_saved_folder_gives_its_training_rows(splits, tmp_path):
    import datasets
    saved = datasets.Dataset.from_list(TWO)
    whole = datasets.DatasetDict({name: saved for name in splits}) if len(splits) > 1 else saved
    whole.save_to_disk(tmp_path/'saved')
    if 'one' in splits:
        with pytest.raises(ValueError, match='saved has the splits one, two, not train'): read_rows(tmp_path/'saved')
        return
    rows, report = validate_rows(tmp_path/'saved')
    assert rows == TWO and report['left_out'] == ({'rows of test': 2} if 'test' in splits else {})


def snapshot(folder):
    (folder/'data').mkdir(parents=True)
    FRAME.to_parquet(folder/'data'/'train-00000-of-00002.parquet')
    (folder/'data'/'train-00001-of-00002.parquet').write_bytes(FRAME.to_parquet())
    FRAME.to_parquet(folder/'data'/'test-00000-of-00001.parquet')
    (folder/'README.md').write_text('---\nlicense: cc-by-4.0\n---\n# Rows\n', encoding='utf-8')
    return folder


def test_a_folder_as_on_the_hub_gives_its_training_rows(tmp_path):
    rows, report = validate_rows(snapshot(tmp_path/'hub'))
    assert rows == TWO + TWO and report['left_out'] == {'files of test': 1}


def test_a_plain_folder_of_files_names_the_file_of_a_fault(tmp_path):
    (tmp_path/'mine').mkdir()
    (tmp_path/'mine'/'a.jsonl').write_text(LINES, encoding='utf-8')
    (tmp_path/'mine'/'b.jsonl').write_text('{"instruction": "가?"}', encoding='utf-8')
    with pytest.raises(ValueError, match="mine b.jsonl line 1 has no 'output'"): read_rows(tmp_path/'mine')
    (tmp_path/'mine'/'b.jsonl').write_text(LINES, encoding='utf-8')
    assert read_rows(tmp_path/'mine') == TWO + TWO


def test_an_empty_or_torn_folder_is_refused_in_one_line(tmp_path):
    import datasets
    (tmp_path/'empty').mkdir()
    datasets.Dataset.from_list(TWO).save_to_disk(tmp_path/'torn')
    next((tmp_path/'torn').glob('*.arrow')).write_bytes(b'xx')
    for name in ('empty', 'torn'):
        with pytest.raises(ValueError, match=f'{name} cannot be read: .*name one file') as error: read_rows(tmp_path/name)
        assert '\n' not in str(error.value)


def test_a_data_set_of_the_hub_is_pinned_and_read_from_its_cache(tmp_path, monkeypatch):
    from huggingface_hub import constants
    commit = '0123456789' * 4
    snapshot(tmp_path/'cache'/'datasets--owner--name'/'snapshots'/commit)
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path/'cache'))
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    recipe = Recipe(source=f'owner/name@{commit}', drop=(), valid_rows=0)
    assert prepare(recipe, tmp_path/'run')['rows'] == 4
    with pytest.raises(FileNotFoundError, match='OWNER/NAME@COMMIT'): prepare(recipe.replace(source='owner/name'), tmp_path/'b')
    with pytest.raises(ValueError, match='owner/name@main is not pinned; name a commit, 40 digits, of https://huggingface.co/datasets/owner/name'):
        prepare(recipe.replace(source='owner/name@main'), tmp_path/'b')
    with pytest.raises(RuntimeError, match=f'owner/other@{commit} could not be downloaded'):
        prepare(recipe.replace(source=f'owner/other@{commit}'), tmp_path/'b')


@pytest.mark.parametrize('body, faults', [
    ('instruction,output\n가,나\n가,나,다\n마,바\n', {'cells: too many': 1}), ('instruction,output\n가\n가,나\n마,바', {'output: missing': 1})])
def test_a_ragged_line_of_a_table_is_one_bad_row(body, faults, tmp_path):
    (tmp_path/'a.csv').write_text(body, encoding='utf-8')
    rows, report = validate_rows(tmp_path/'a.csv')
    assert (rows, report['faults']) == ([ask('가', '', '나'), ask('마', '', '바')], faults)


def test_damaged_utf8_is_not_taken_for_an_older_coding(tmp_path):
    (tmp_path/'a.csv').write_bytes('instruction,output\n이것은 무엇인가요?,연필입니다.\n'.encode()[:-4] + b'\n')
    with pytest.raises(ValueError, match='is not UTF-8 .*it is damaged there'): read_rows(tmp_path/'a.csv')


# ---- the data stage

def stage(tmp_path, written_rows, **changes):
    recipe = Recipe.named('best').replace(**dict(source=str(written(tmp_path, *written_rows)), drop=('exact_duplicate', 'empty_answer')) | changes)
    made = prepare(recipe, tmp_path/'run')
    return made, json.loads((tmp_path/'run'/'data'/'audit.json').read_text(encoding='utf-8'))


def numbered(n):
    "Rows that nobody takes for copies of each other."
    words = [hashlib.sha256(str(i).encode()).hexdigest()[:40] for i in range(n)]
    return [ask(f'{word} 값은?', '', f'{word[::-1]}입니다.') for word in words]


def test_every_row_is_accounted_for_on_the_last_lines_and_in_the_audit(tmp_path, capsys):
    rows = [row | dict(memo='짧게.') for row in numbered(20)]
    made, audit = stage(tmp_path, [*rows, rows[0], rows[1], dict(instruction='가?'), ask('빈 답은?', '', '')], skip_bad_rows=True, valid_rows=.25)
    assert (made['train'], made['valid'], made['kept'], made['rows']) == (15, 5, 20, 23)
    assert audit['left_out'] == {'memo': 22, 'output: missing': 1, 'exact_duplicate': 2, 'empty_answer': 1}
    understood, happened = capsys.readouterr().out.splitlines()[-2:]
    assert understood == 'data: instruction, input, output: 23 rows; left out: memo (22)'
    assert happened == ('data: 24 rows read: 15 to train on, 5 held out, 1 left out (output: missing), 2 left out (exact_duplicate), '
                        '1 left out (empty_answer)')
    assert made['train'] + made['valid'] + 4 == 24


def test_a_row_with_two_flags_is_counted_once(tmp_path):
    made, audit = stage(tmp_path, [*numbered(9), ask('빈 답은?', '', ''), ask('빈 답은?', '', '')], valid_rows=0)
    assert audit['left_out'] == {'exact_duplicate': 1, 'empty_answer': 1} and made['reported'] == 2


def test_rows_after_the_first_are_counted(tmp_path, capsys):
    made, audit = stage(tmp_path, numbered(9), rows=5, valid_rows=0)
    assert made['rows'] == 5 and audit['left_out'] == {'after the first 5': 4} and '4 left out (after the first 5)' in capsys.readouterr().out


def test_no_row_left_says_why(tmp_path):
    with pytest.raises(ValueError, match=r'has 3 rows, 3 left out \(empty_answer\); none can be trained on'):
        stage(tmp_path, [ask(f'{i}번 물음은?', '', '') for i in range(3)])


def test_bad_rows_are_refused_unless_they_are_to_be_skipped(tmp_path):
    rows = [*numbered(5), ask('수는?', '', 7)]
    with pytest.raises(ValueError, match=r"rows.jsonl line 6: 'output' is 7; .*rows with faults: 1; .*--set skip_bad_rows=true"): stage(tmp_path, rows)
    assert stage(tmp_path, rows, skip_bad_rows=True)[1]['left_out'] == {'output: not text': 1}
    with pytest.raises(ValueError, match=r'faults: 1\)$'): read_rows(written(tmp_path, rows[-1]), skip_bad_rows=True)    # none would be left


@pytest.mark.parametrize('n, valid_rows, held', [(1, None, 0), (2, None, 1), (9, None, 1), (60, None, 6), (60, .5, 30), (60, 7, 7), (60, 1, 1), (60, 0, 0), (3, .99, 2)])
def test_the_rows_held_out_suit_a_file_of_any_size(n, valid_rows, held, tmp_path):
    changes = {} if valid_rows is None else dict(valid_rows=valid_rows)
    assert stage(tmp_path, numbered(n), **changes)[0]['valid'] == held


def test_a_number_of_held_out_rows_belongs_to_the_rows_of_its_preset():
    laptop, blog = Recipe.named('laptop'), Recipe.named('blog')
    assert (laptop.valid_rows, Recipe.named('best').valid_rows, blog.valid_rows, Recipe().valid_rows) == (250, 1000, 0, .1)
    assert laptop.replace(source='my.jsonl').valid_rows == .1 and laptop.replace(source='my.jsonl', valid_rows=30).valid_rows == 30
    assert blog.replace(source='my.jsonl').valid_rows == 0 and laptop.replace(seed=2).valid_rows == 250
    for wrong in (-1, 1.5, float('nan')):
        with pytest.raises(ValueError, match='valid_rows is'): Recipe(valid_rows=wrong)


def test_the_command_maps_fields_and_skips_bad_rows(tmp_path, monkeypatch, capsys):
    written(tmp_path, *({'손님': row['instruction'], '직원': row['output']} for row in numbered(8)), {'손님': '가?'})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('signal.signal', lambda *_: None)
    monkeypatch.setattr('sys.argv', ['kofinetune', 'data', '--set', 'source=rows.jsonl', '--run', 'run', '--set', 'fields.손님=instruction',
                                     '--set', 'fields.직원=output', '--set', 'skip_bad_rows=true', '--set', 'valid_rows=0.25'])
    with pytest.raises(SystemExit) as end: cli.main()
    assert not end.value.code
    assert capsys.readouterr().out.splitlines()[-3:] == [
        'data: 손님 as instruction, 직원 as output: 8 rows', 'data: 9 rows read: 6 to train on, 2 held out, 1 left out (output: missing)', 'data: done, run']
    assert len(read_jsonl(tmp_path/'run'/'data'/'train.jsonl')) == 6


def test_the_report_says_what_happened_to_the_rows():
    report = json.loads((ROOT/'docs'/'laptop-report.json').read_text(encoding='utf-8'))
    before = {key: value for key, value in report.items() if key != 'data'}       # of a run made before this was recorded
    assert '- Rows: ' not in render_page('report.md.jinja', report=before)
    told = report | dict(data=['messages: 5 rows', '5 rows read: 4 to train on, 1 held out'], training=report['training'] | dict(left_out=2))
    assert ('- Rows: messages: 5 rows; 5 rows read: 4 to train on, 1 held out, 2 of those to train on left out (longer than max_length).\n'
            in render_page('report.md.jinja', report=told))


def test_line_ends_are_made_one(tmp_path):
    rows = [ask('두 줄로?', '', '하나\r\n둘\r셋')]
    stage(tmp_path, rows, valid_rows=0)
    assert read_jsonl(tmp_path/'run'/'data'/'train.jsonl')[0]['output'] == '하나\n둘\n셋'


# ---- faults, and files that cannot be used

GOOD = '{"instruction": "가?", "input": "", "output": "나."}'
BAD_LINES = {   # kind: a line that has it
    'not JSON': '{"instruction": "가?", "out', 'no object': '[1, 2]', 'output: missing': '{"instruction": "가?"}',
    'output: not text': '{"instruction": "가?", "output": 3}',
    'instruction: empty': '{"instruction": " ", "output": "나."}',
    'output: half': '{"instruction": "가?", "output": "\\ud83d"}',
}


@pytest.mark.parametrize('kind', BAD_LINES)
def test_fault_is_reported_with_its_line_and_counted(kind, tmp_path):
    (tmp_path/'a.jsonl').write_text('\n'.join([GOOD, BAD_LINES[kind], GOOD, BAD_LINES[kind]]), encoding='utf-8')
    kept, report = validate_rows(tmp_path/'a.jsonl')
    assert (len(kept), report['rows'], report['kept'], report['reported']) == (2, 4, 2, 2)
    assert report['faults'] == {kind: 2}
    assert [fault[:6] for fault in report['first']] == ['line 2', 'line 4']
    with pytest.raises(ValueError, match='a.jsonl line 2.*faults: 2') as error: read_rows(tmp_path/'a.jsonl')
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('file', ['a.jsonl', 'a.json'])
def test_a_key_that_is_there_twice_is_refused(file, tmp_path):
    row = '{"instruction": "가?", "input": "", "output": "나.", "output": "다."}'
    (tmp_path/file).write_text(row if file == 'a.jsonl' else f'[{row}]', encoding='utf-8')
    with pytest.raises(ValueError, match="is not JSON: an object has 'output' twice; keep one .*가"): read_rows(tmp_path/file)


def test_two_rows_on_one_line_are_one_fault(tmp_path):
    (tmp_path/'a.jsonl').write_text(f'{GOOD} {GOOD}\n{GOOD}\n', encoding='utf-8')
    kept, report = validate_rows(tmp_path/'a.jsonl')
    assert (len(kept), report['faults']) == (1, {'not JSON': 1})


def test_twenty_faults_are_shown_and_all_are_counted(tmp_path):
    (tmp_path/'a.jsonl').write_text('{"instruction": "가?"}\n' * 1000, encoding='utf-8')
    kept, report = validate_rows(tmp_path/'a.jsonl')
    assert (kept, len(report['first']), report['faults']) == ([], 20, {'output: missing': 1000})


NOTES = {   # what a note says: bytes of a file with it
    'U+0000': GOOD.replace('나', '나\\u0000').encode(), 'U+FFFD': GOOD.replace('나', '\ufffd').encode(),
}


@pytest.mark.parametrize('note', NOTES)
def test_odd_row_is_kept_unchanged_and_noted(note, tmp_path):
    (tmp_path/'a.jsonl').write_bytes(NOTES[note])
    kept, report = validate_rows(tmp_path/'a.jsonl')
    assert report['reported'] == 0 and any(note in text for text in report['notes'])
    first = json.loads(NOTES[note].decode('utf-8-sig').split('\n')[0])
    assert kept[0] == {name: first.get(name, '') for name in ('instruction', 'input', 'output')}


@pytest.mark.parametrize('array', [f'[{GOOD}, {GOOD}', f'[{GOOD}, {GOOD[:30]}', f'[{GOOD} {GOOD}]', f'[{GOOD}, {GOOD}]]', '['])
def test_array_that_is_cut_off_is_refused_as_a_whole(array, tmp_path):
    (tmp_path/'a.json').write_text(array, encoding='utf-8')
    with pytest.raises(ValueError, match=r'a.json is not JSON: .* line 1 column \d+'): validate_rows(tmp_path/'a.json')


@pytest.mark.parametrize('name, body, says', [
    ('a.json', '', 'has no rows'), ('a.jsonl', '\n\n', 'has no rows'), ('a.csv', '', 'has no rows'), ('a.json', '[]', 'has no rows'),
    ('a.json', '{"a": 1}', "row 0 has no 'instruction'"), ('a.json', '5', 'must be an array'), ('a.json', 'hello', 'is not JSON'), ('a.csv', '가,나\n다,라', "has no 'instruction'"),
    ('a.csv', 'instruction,output\n"가,나', 'is not CSV'), ('a.csv', 'instruction,output\n가,나,다', 'line 2 has 3 cells, and line 1 has 2'),
    ('a.csv', 'instruction,output\n가\n', "row 0 has no 'output'"), ('a.csv', 'instruction,output,output\n가,나,다', 'each column once'),
    ('a.txt', GOOD, "ends in '.txt'"), ('a.json', f'[{GOOD}]'.encode('cp949'), 'iconv -f cp949'),
    ('a.jsonl', GOOD.encode('euc-kr'), 'iconv -f cp949'),
    ('a.json', f'[{GOOD}]'.encode('utf-16'), 'iconv -f utf-16'), ('a.json', '[' * 100_000, 'is not JSON'),
    ('a.jsonl', '{"instruction": ' + '1' * 5000 + '}', 'is not JSON')])
def test_file_that_cannot_be_used_is_one_line(name, body, says, tmp_path):
    (tmp_path/name).write_bytes(body if isinstance(body, bytes) else body.encode())
    with pytest.raises(ValueError) as error: read_rows(tmp_path/name)
    assert says in str(error.value) and name in str(error.value) and '\n' not in str(error.value)


def test_csv_with_line_breaks_and_a_megabyte(tmp_path):
    (tmp_path/'a.csv').write_text('instruction,input,output\r\n가?,"나\n다",라\r\n마?,,"' + '바' * 400_000 + '"\r\n', encoding='utf-8-sig',
                                  newline='')
    kept, report = validate_rows(tmp_path/'a.csv')
    assert (kept[0], len(kept[1]['output']), report['reported']) == (ask('가?', '나\n다', '라'), 400_000, 0)


# anything that JSON can hold, biased towards rows
leaf = st.none() | st.booleans() | st.integers(-9, 9) | st.text(st.characters(), max_size=5)
name = st.sampled_from(['instruction', 'input', 'output', 'kind', 'url'])
any_text = st.text(max_size=20)
any_row = st.builds(ask, any_text.filter(str.strip), any_text, any_text)
thing = st.dictionaries(name, leaf, max_size=5) | any_row | leaf | st.lists(leaf, max_size=2)


@relaxed
@given(things=st.lists(thing, max_size=12), cut=st.integers(0, 30), array=st.booleans())
def test_rows_in_are_rows_kept_and_rows_reported(things, cut, array, tmp_path):
    lines = [json.dumps(value) for value in things]                 # ASCII, so that lone surrogates can be written
    body = '[' + ',\n'.join(lines) + ']' if array else '\n'.join(lines)
    whole = len(body) if cut > 20 else max(len(body) - cut, 0)
    path = tmp_path/('a.json' if array else 'a.jsonl')
    path.write_text(body[:whole], encoding='utf-8')
    if array and whole < len(body):                                 # no part of an array is taken
        if body[:whole]: pytest.raises(ValueError, validate_rows, path)
        return
    kept, report = validate_rows(path)
    assert report['rows'] == report['kept'] + report['reported'] == len(kept) + report['reported']
    if whole == len(body) and (array or body[:1] != '['): assert report['rows'] == len(things)     # a line with an array may be the file
    rest = iter(things)                                             # kept rows are input rows, in order; null is no input, and a kind is text
    def unread(k, v): return k == 'url' or k == 'input' and v is None or k == 'kind' and not isinstance(v, str)
    def as_read(thing):   # an input alone is the question
        row = {'input': ''} | {k: v for k, v in thing.items() if not unread(k, v)}
        return row if 'instruction' in row else row | dict(instruction=row['input'], input='')
    for row in kept: assert any(isinstance(t, dict) and as_read(t) == row for t in rest)


@relaxed
@given(body=st.binary(max_size=200), suffix=st.sampled_from(['.json', '.jsonl', '.csv']))
def test_any_bytes_end_in_a_report_or_one_line(body, suffix, tmp_path):
    path = tmp_path/f'a{suffix}'
    path.write_bytes(body)
    try: kept, report = validate_rows(path)
    except ValueError as error: assert 'a' + suffix in str(error) and '\n' not in str(error)
    else: assert report['rows'] == len(kept) + report['reported']
