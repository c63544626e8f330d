"Any text: what is read or written is either right, or refused with a reason. Seeded in CI; hypothesis shrinks what fails."
import ast
import json
import os
import subprocess
from dataclasses import asdict, fields

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from kofinetune.prompt import format_prompt
from kofinetune.recipe import Recipe
from kofinetune.runs import write_jsonl
from kofinetune.formats import read_rows, validate_rows
from kofinetune.server import check_name, read_modelfile
from kofinetune.export import _modelfile_value, modelfile

SEEDED = bool(os.environ.get('CI'))


def bounded(examples):
    return settings(max_examples=examples, deadline=None, derandomize=SEEDED, database=None,
                    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


NASTY = ['"', '"""', '\\', '\n', '\r\n', '\t', ' ', '{{', '}}', '{{ .Prompt }}', '<eos>', '<start_of_turn>', '### Response:\n', '\u3000', '\u200b',
         '\ufeff', '\x00', '가', 'ㄱ', '\u1100', '\U00020000', '🙂', '▁', "'", '#', 'FROM x', ',', ':']
text = st.lists(st.one_of(st.sampled_from(NASTY), st.text(max_size=6)), max_size=8).map(''.join)
filled = text.filter(lambda t: t.strip())
rows = st.lists(st.fixed_dictionaries(dict(instruction=filled, input=text, output=text)), min_size=1, max_size=5)
values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | text, lambda v: st.lists(v, max_size=3) | st.dictionaries(text, v, max_size=3), max_leaves=6)
held = st.one_of(filled, filled, values, st.sampled_from(['\ud83d', '가\udc00']))    # with halves of characters
rowlike = st.fixed_dictionaries(dict(instruction=held, output=held), optional=dict(input=held, kind=held, url=held))


# --- the row reader

@bounded(150)
@given(rows=rows)
def test_rows_are_read_as_they_were_written(rows, tmp_path):
    assert read_rows(write_jsonl(rows, tmp_path/'a.jsonl')) == rows
    (tmp_path/'a.json').write_text(json.dumps(rows), encoding='utf-8')
    assert read_rows(tmp_path/'a.json') == rows


@bounded(300)
@given(data=st.one_of(st.binary(max_size=60), text.map(str.encode), values.map(lambda v: json.dumps(v).encode()),
                      st.lists(rowlike, max_size=4).map(lambda vs: json.dumps(vs).encode()),
                      st.lists(rowlike | values, max_size=4).map(lambda vs: '\n'.join(map(json.dumps, vs)).encode()),
                      st.lists(text, max_size=4).map(lambda ts: ('instruction,output\n' + ','.join(ts)).encode())),
       kind=st.sampled_from(['json', 'jsonl', 'csv']))
def test_any_bytes_are_rows_or_a_reason(data, kind, tmp_path):
    path = tmp_path/f'a.{kind}'
    path.write_bytes(data)
    try: kept, report = validate_rows(path)
    except ValueError as e: assert 'a.' + kind in str(e); return
    assert report['rows'] == len(kept) + report['reported'] and bool(report['first']) == bool(report['reported'])
    for row in kept:
        assert set(row) <= {'instruction', 'input', 'output', 'kind'} and row['instruction'].strip()
        for value in row.values(): value.encode()


@bounded(100)
@given(rows=rows, share=st.floats(0, 1))
def test_a_file_cut_anywhere_keeps_its_whole_lines(rows, share, tmp_path):
    whole = write_jsonl(rows, tmp_path/'a.jsonl').read_bytes()
    cut = whole[:int(len(whole) * share)]
    (tmp_path/'a.jsonl').write_bytes(cut)
    kept, report = validate_rows(tmp_path/'a.jsonl')
    assert kept[:cut.count(b'\n')] == rows[:cut.count(b'\n')] and report['reported'] <= 1


# --- the recipe reader

NAMES = [f.name for f in fields(Recipe)]
some_fields = st.dictionaries(st.sampled_from([*NAMES, 'extends', 'lora_rank']), values, max_size=4)


@bounded(300)
@given(said=some_fields)
def test_any_fields_are_a_recipe_or_a_reason(said, tmp_path):
    path = tmp_path/'mine.json'
    path.write_text(json.dumps(said), encoding='utf-8')
    try: made = Recipe.load(path)
    except ValueError as e:
        assert any(name in str(e) for name in [*said, 'recipe', 'mine.json']), e
        return
    assert Recipe.load(write(tmp_path/'again.json', json.dumps(asdict(made)))) == made


def write(path, what): path.write_text(what, encoding='utf-8'); return path


@bounded(150)
@given(said=st.one_of(text, st.lists(st.tuples(st.sampled_from(NAMES), st.sampled_from(['1', '1.5', 'true', 'nan', '-inf', '[]', '""', '{}', '1979-05-27', '0x7F', "['a']"])),
                                     max_size=3).map(lambda pairs: '\n'.join(f'{k} = {v}' for k, v in pairs))))
def test_any_toml_is_a_recipe_or_a_reason(said, tmp_path):
    try: assert isinstance(Recipe.load(write(tmp_path/'mine.toml', said)), Recipe)
    except ValueError as e: assert str(e)


# --- the prompt format

@bounded(200)
@given(row=rows.map(lambda r: r[0]), style=st.sampled_from(['alpaca', 'blog']))
def test_a_prompt_holds_its_row_and_nothing_else(row, style):
    prompt = format_prompt(row, style)
    assert prompt.startswith('### Instruction:\n' + row['instruction']) and prompt.endswith('\n\n### Response:\n')
    assert ('### Input:\n' + row['input'] + '\n\n' in prompt) == (style == 'blog' or bool(row['input'])) or '### Input:' in row['instruction']
    assume('### ' not in row['instruction'] + row['input'])
    rest = prompt.removeprefix('### Instruction:\n').removesuffix('\n\n### Response:\n')
    instruction, mark, given = rest.partition('\n\n### Input:\n')
    assert (instruction, given) == (row['instruction'], row['input']) and bool(mark) == (style == 'blog' or bool(row['input']))


# --- the Modelfile writer

def sorted_out(texts):
    "The texts that `_modelfile_value` takes; the others are refused with a reason."
    kept = []
    for one in texts:
        try: _modelfile_value(one, 'LICENSE')
        except ValueError as e: assert str(e).startswith('LICENSE has ')
        else: kept.append(one)
    return tuple(kept)


printed = st.lists(st.sampled_from(['"', '"""', '"""\n', '"""\nFROM y', '\n', ' ', '\t', '가', 'a', '{{', '\\', '\nPARAMETER stop x', '#', "'", '🙂']),
                   max_size=8).map(''.join)
texts = st.lists(st.one_of(printed, printed, text), min_size=1, max_size=6)


@bounded(300)
@given(licences=texts)
def test_a_modelfile_is_read_back_by_its_own_reader(licences):
    licences = sorted_out(licences)
    made = read_modelfile(modelfile('m.gguf', licences=licences))
    assert (made['from'], made['license'], len(made['parameters']['stop'])) == ('./m.gguf', list(licences), 3)


@pytest.fixture(scope='module')
def served(ollama_server, rehearsal_run, tmp_path_factory):
    "A folder with a small GGUF file, and a function that lets the ollama program read a Modelfile there."
    import httpx
    from conftest import ollama_program
    folder = tmp_path_factory.mktemp('served')
    (folder/'m.gguf').symlink_to(rehearsal_run/'ollama'/'model-q8_0.gguf')
    def create(said):
        write(folder/'Modelfile', said)
        seen = subprocess.run([ollama_program(), 'create', 'fuzz', '-f', 'Modelfile'], cwd=folder, capture_output=True, text=True)
        assert seen.returncode == 0, seen.stderr
        return httpx.post(f'http://{ollama_server.removeprefix("http://")}/api/show', json=dict(model='fuzz'), timeout=60).json()
    yield create
    import ollama
    ollama.Client(host=ollama_server).delete('fuzz')


@pytest.mark.ollama
@bounded(25)
@example(licences=['"'])
@given(licences=texts)
def test_ollama_reads_exactly_what_was_written_or_it_was_refused_here(licences, served):
    licences = [t for t in sorted_out(licences) if t]
    shown = served(modelfile('m.gguf', licences=tuple(licences)))
    assert shown.get('license', '') == '\n'.join(licences)
    seen = [line.split(None, 1) for line in shown.get('parameters', '').splitlines()]
    assert [ast.literal_eval(text) for name, text in seen if name == 'stop'] == ['### Instruction:', '### Input:', '### Response:']


@pytest.mark.ollama
@bounded(150)
@given(name=st.text(alphabet='aZ0_-.:/가 \n"', max_size=12))
def test_ollama_takes_every_name_that_is_taken_here(name, ollama_server):
    import httpx
    try: name = check_name(name)
    except ValueError as e: assert repr(name) in str(e); return
    seen = httpx.post(f'http://{ollama_server.removeprefix("http://")}/api/show', json=dict(model=name), timeout=60)
    assert seen.status_code == 404 and 'not found' in seen.text, seen.text
