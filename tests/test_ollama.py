"A real Ollama server: what it lists, what it renders, which tokens it sees, what it answers, and what it refuses."
import hashlib
import json
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import httpx
import ollama
import pytest
from conftest import ollama_program, vouch

from test_export import copied, make_model

from kofinetune import export
from kofinetune.prompt import format_prompt
from kofinetune.recipe import Recipe
from kofinetune.runs import read_jsonl, read_manifest
from kofinetune.data import load_rows
from kofinetune.gguffile import load_gguf, read_gguf, write_gguf
from kofinetune.server import check_name, create_model, read_modelfile, server_url, server_version
from kofinetune.proof import compare_texts, difficult_rows, verify_ollama
from kofinetune.export import _modelfile_value, _served_differences, _template, export_ollama, modelfile

STYLES = ('alpaca', 'blog', 'chat')

pytestmark = pytest.mark.ollama
NAME = 'kofinetune-rehearsal:latest'
POST = '\n### Instruction:\n{{ .Prompt }}\n\n### Response:\n'


@pytest.fixture(scope='module')
def run(ollama_server, rehearsal_run):
    "The rehearsal's run, registered."
    export_ollama(Recipe.named('rehearsal'), rehearsal_run)
    return rehearsal_run


@pytest.fixture(scope='module')
def blog(run, tmp_path_factory):
    "The same weights behind the post's prompt style, under a name with a namespace and a tag."
    folder = tmp_path_factory.mktemp('blog')
    shutil.copyfile(run/'ollama'/'model-bf16.gguf', folder/'model-bf16.gguf')
    (folder/'Modelfile').write_text(modelfile('model-bf16.gguf', 'blog', num_ctx=512, num_predict=16, threads=1), encoding='utf-8')
    return create_model('tests/blog:v1.0', folder)


@pytest.fixture(scope='module')
def tiny(ollama_server, tmp_path_factory):
    "The stand-in's tokenizer around next to no model, in both styles: what is asked here is only the text and the tokens."
    folder = make_model(tmp_path_factory.mktemp('tiny'), hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1)
    write_gguf(folder, folder/'tiny.gguf')
    for style in STYLES:
        (folder/'Modelfile').write_text(modelfile('tiny.gguf', style, num_ctx=4096, num_predict=1, threads=1), encoding='utf-8')
        create_model(f'tests/tiny-{style}', folder)
    return folder


def ask(path, **request):
    return httpx.post(server_url() + path, json=dict(stream=False, **request), timeout=120).json()


def rendered(model, row, earlier=()):
    "The prompt that the server makes of a row, by generate and by chat."
    system = [dict(role='system', content=row['input'])] if row['input'] else []
    messages = [*system, *earlier, dict(role='user', content=row['instruction'])]
    asked = [('/api/chat', dict(messages=messages))]
    if not earlier: asked.append(('/api/generate', dict(prompt=row['instruction'], system=row['input'])))
    made = {ask(path, model=model, _debug_render_only=True, **said)['_debug_info']['rendered_template'] for path, said in asked}
    assert len(made) == 1
    return made.pop()


def test_the_list_shows_the_model_with_its_size(run):
    sizes, size = {m.model: m.size for m in ollama.Client().list().models}, (run/'ollama'/'model-q8_0.gguf').stat().st_size
    assert size < sizes[NAME] < size + 10_000
    assert not [name for name in sizes if 'unproved' in name]
    program = ollama_program()
    if program:
        text = subprocess.run([program, 'list'], capture_output=True, text=True, check=True).stdout
        assert re.search(rf'^{NAME} +[0-9a-f]{{12}} +[0-9.]+ [KM]B ', text, re.M), text


def test_api_and_program_make_the_same_model(run):
    "What the message tells people to type gives what `create_model` gives."
    program = ollama_program()
    if not program: pytest.skip('the server is remote: no ollama program here')
    subprocess.run([program, 'create', 'by-hand', '-f', str(run/'ollama'/'Modelfile')], check=True, capture_output=True)
    client = ollama.Client()
    by_api, by_hand = (read_modelfile(client.show(name).modelfile) for name in (NAME, 'by-hand'))
    assert by_api == by_hand
    assert by_api['template'] == _template('alpaca') and by_api['parameters']['stop'][0] == '### Instruction:'
    assert 'Gemma' in client.show(NAME).license
    client.delete('by-hand')


@pytest.mark.parametrize('style', STYLES)
def test_text_and_tokens_of_difficult_rows(tiny, style):
    rows = difficult_rows(style)
    proof = verify_ollama(f'tests/tiny-{style}', tiny, rows, asked=0, style=style)
    assert proof['text'] == dict(checked=len(rows), different=0, examples=[])
    assert proof['tokens'] == dict(checked=len(rows), different=0, share=0, extra_bos=0, examples=[])


def joined(rows, style, size=8):
    "The prompts of `size` rows as one question: the same text, and the same tokens to find in it, in fewer requests."
    prompts = [format_prompt(row, style) for row in rows]
    return [dict(instruction='\n\n'.join(prompts[i:i + size]), input='') for i in range(0, len(prompts), size)]


@pytest.mark.parametrize('style', STYLES)
def test_tokens_of_every_packaged_row(tiny, style):
    "Their text is compared in 03."
    questions = joined(load_rows('rehearsal'), style)
    proof = verify_ollama('tests/tiny-alpaca', tiny, questions, asked=0, texts=questions[:1])
    assert proof['tokens'] == dict(checked=290, different=0, share=0, extra_bos=0, examples=[])


@pytest.mark.koalpaca
def test_tokens_of_the_real_rows(tiny, koalpaca):
    questions = joined(json.loads(koalpaca.read_text(encoding='utf-8')), 'blog')
    proof = verify_ollama('tests/tiny-alpaca', tiny, questions, asked=0, texts=questions[:1])
    assert proof['tokens'] == dict(checked=1000, different=0, share=0, extra_bos=0, examples=[])


@pytest.mark.parametrize('style', STYLES)
def test_another_template_is_seen_in_the_text(tiny, style):
    "One newline more or less in the template, and every row is counted."
    rows = difficult_rows(style)[:5]
    for i, template in enumerate(('\n' + _template(style), _template(style)[:-1])):
        ollama.Client().create(f'tests/wrong-{i}', from_=f'tests/tiny-{style}', template=template)
        assert compare_texts(f'tests/wrong-{i}', rows, style)['different'] == 5


def test_a_conversation_asks_only_its_last_question(run, blog):
    earlier = [dict(role='user', content='처음 질문'), dict(role='assistant', content='처음 답')]
    for row in (dict(instruction='다음 질문', input=''), dict(instruction='다음 질문', input='사과')):
        assert rendered(NAME, row, earlier) == format_prompt(row, 'alpaca')
        assert rendered(blog, row, earlier) == format_prompt(row, 'blog')


@pytest.mark.parametrize('style', ['alpaca', 'blog'])
def test_the_server_sees_the_same_tokens_and_says_the_same(run, blog, style):
    model, dtype = (NAME, 'q8_0') if style == 'alpaca' else (blog, 'bf16')
    rows = read_jsonl(run/'data'/'valid.jsonl')[:20] + difficult_rows()
    proof = verify_ollama(model, run/'merged', rows, 20, dtype, style)
    assert proof['failed'] == [] and proof['text'] == dict(checked=len(rows), different=0, examples=[])
    assert proof['tokens'] == dict(checked=len(rows), different=0, share=0, extra_bos=0, examples=[])
    assert proof['logprobs']['compared'] >= 70 and proof['greedy']['checked'] == 20 and proof['server']


def test_a_held_out_question_gets_the_right_answer(run):
    rows = read_jsonl(run/'data'/'valid.jsonl')[:40]
    client, right = ollama.Client(), 0
    for row in rows:
        made = client.generate(NAME, row['instruction'], system=row['input'])
        assert made.done and made.done_reason == 'stop'
        right += made.response == row['output']
    assert right > len(rows) / 2


def test_a_finished_stage_is_registered_again(run, blog, capsys):
    ollama.Client().delete(NAME)
    assert _served_differences(NAME, run/'ollama') is None
    (run/'ollama'/'verify.json').write_text('{}', encoding='utf-8')
    export_ollama(Recipe.named('rehearsal'), run)
    out = capsys.readouterr().out
    assert 'already done' in out and f'registered {NAME}' in out
    assert _served_differences(NAME, run/'ollama') == []
    assert _served_differences('tests/blog:v1.0', run/'ollama') == ['file', 'template', 'parameters']
    verify_json_is_of_this_server(run)


def verify_json_is_of_this_server(run):
    path = run/'ollama'/'verify.json'
    said = json.loads(path.read_text(encoding='utf-8'))
    assert said['server'] and 'skipped' not in said['text']
    assert said['text']['different'] == said['tokens']['different'] == 0
    assert said['text']['checked'] == 20 + len(difficult_rows()) and said['logprobs']['checked'] == said['greedy']['checked'] == 20
    assert read_manifest(run)['stages']['ollama']['files']['verify.json'] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_model_that_fails_its_proof_gets_no_name(run, tmp_path):
    "The post's template under our weights: the stage says what differs, and the name stays free."
    copy = copied(run, tmp_path)
    manifest = json.loads((copy/'manifest.json').read_text(encoding='utf-8'))
    manifest['stages']['ollama']['result'] |= dict(name='never:latest')
    (copy/'manifest.json').write_text(json.dumps(manifest), encoding='utf-8')
    path = copy/'ollama'/'Modelfile'
    path.write_text(path.read_text(encoding='utf-8').replace(_template('alpaca'), POST), encoding='utf-8')
    vouch(copy, 'ollama')
    with pytest.raises(RuntimeError, match='78 of 78 prompts are rendered differently'):
        export_ollama(Recipe.named('rehearsal'), copy)
    assert not [m for m in ollama.Client().list().models if m.model.startswith('never')]


def verified(run, monkeypatch, capsys, *options):
    "`kofinetune verify RUN`, here: exit code, what it says, and verify.json."
    from kofinetune.cli import main
    monkeypatch.setattr('sys.argv', ['kofinetune', 'verify', str(run), *options])
    monkeypatch.setattr(export, 'load_rows', lambda source: load_rows(source)[:20])   # all of them: in 03 and above
    code = 0
    try: main()
    except SystemExit as e: code = e.code or 0
    said = capsys.readouterr()
    return code, said.out + said.err, json.loads((run/'ollama'/'verify.json').read_text(encoding='utf-8'))


def test_verify_proves_what_is_served_now(run, tmp_path, monkeypatch, capsys):
    copy, client = copied(run, tmp_path), ollama.Client()
    code, out, said = verified(copy, monkeypatch, capsys)
    assert code == 0 and said['failed'] == [] and said['served'] == dict(name=NAME, different=[])
    assert said['text']['checked'] == 78 and said['greedy']['checked'] == 20 and said['server'] == server_version()
    assert 'text  checked 78, different 0' in out
    code, out, said = verified(copy, monkeypatch, capsys, '--all')
    assert code == 0 and said['failed'] == [] and said['text']['checked'] == 178 and said['files_proved']['q8_0']['greedy']['checked'] == 100
    try:
        client.create(NAME, from_=NAME, template=POST)
        code, out, said = verified(copy, monkeypatch, capsys)
        assert code == 1 and 'lacks the template of' in out and 'prompts are rendered differently' in out and 'Traceback' not in out
        assert said['served']['different'] == ['template'] and said['text']['different'] == 78 and said['tokens']['different'] == 48
        assert said['failed'][0] in out
    finally: create_model(NAME, run/'ollama')


def test_verify_notices_another_model_under_the_name(run, tiny, tmp_path, monkeypatch, capsys):
    copy = copied(run, tmp_path)
    shutil.copyfile(tiny/'tiny.gguf', tmp_path/'model-q8_0.gguf')
    shutil.copyfile(run/'ollama'/'Modelfile', tmp_path/'Modelfile')
    try:
        create_model(NAME, tmp_path)
        code, out, said = verified(copy, monkeypatch, capsys)
        assert code == 1 and 'lacks the file of' in out and 'log-probabilities differ' in out
        assert said['served']['different'] == ['file'] and said['text']['different'] == said['tokens']['different'] == 0
    finally: create_model(NAME, run/'ollama')


def test_verify_without_the_model_says_how_to_register_it(run, tmp_path, monkeypatch, capsys):
    copy = copied(run, tmp_path)
    ollama.Client().delete(NAME)
    try:
        code, out, said = verified(copy, monkeypatch, capsys)
        assert code == 0 and f'has no model {NAME}; register it with: kofinetune export --run' in said['text']['skipped']
    finally: create_model(NAME, run/'ollama')


def test_known_differences_are_still_there(run):
    "The page names these; should a newer Ollama mend one, the page must change."
    assert 'image' in ask('/api/generate', model=NAME, prompt='[img-0]').get('error', '')
    rows = [dict(instruction='<unk>', input='')]
    said = verify_ollama(NAME, run/'merged', rows, asked=0)
    assert said['tokens']['different'] == 1 and said['text']['different'] == 0


NAMES = ('a', 'A_1-b.c', '_x', 'x:y', 'x:1.0_a-b', 'ns/x', 'ns_1/x:y', 'a' * 80, 'a' * 81, 'x:' + 'y' * 80, 'x:' + 'y' * 81, 'n' * 80 + '/x',
         'n' * 81 + '/x', '', ':', 'x:', ':x', '-x', '.x', 'x/', '/x', 'n.s/x', 'ns/x/y/z', '한글', 'x y', 'x:한', 'x\n', 'x@y', 'é')


@pytest.mark.parametrize('name', NAMES, ids=[str(i) for i in range(len(NAMES))])
def test_a_name_is_valid_here_where_it_is_in_ollama(tiny, name):
    try: ours = bool(check_name(name))
    except ValueError: ours = False
    status = ask('/api/create', model=name, **{'from': 'tests/tiny-alpaca'})
    assert ours == (status.get('status') == 'success'), status
    if ours: ollama.Client().delete(name)


def test_a_modelfile_keeps_what_we_let_through(tiny, tmp_path):
    "Characters of every kind, each in a value of its own: Ollama's program keeps those that we accept, and only those."
    program = ollama_program()
    if not program: pytest.skip('the server is remote: no ollama program here')
    shutil.copyfile(tiny/'tiny.gguf', tmp_path/'m.gguf')
    marks = ['가', '\u1112\u1161', '뼉', '👩', '🇰', '\u3000', '\u00a0', '\u200b', '\u200d', '\ufeff', '\u00ad', '\x07', '\x7f', '\t', ' ', '"', "'", '\\n', '{{', '“', 'م']
    def license_of(text):
        (tmp_path/'Modelfile').write_text(f'FROM ./m.gguf\nLICENSE """{text}"""\n', encoding='utf-8')
        subprocess.run([program, 'create', 'tests/mark', '-f', str(tmp_path/'Modelfile')], check=True, capture_output=True)
        return ollama.Client().show('tests/mark').license
    for mark in marks:
        text = f'앞{mark}뒤'
        try: ours = bool(_modelfile_value(text, 'LICENSE'))
        except ValueError as e: ours, message = False, str(e); assert f'U+{ord(mark):04X}' in message
        assert ours == (license_of(text) == text), repr(mark)


def test_what_the_post_did_loses_the_hangul(run, tmp_path):
    "Its Modelfile and a folder as transformers 5 saves it: `ollama create` says success, and the question has no Hangul left."
    program = ollama_program()
    if not program: pytest.skip('the server is remote: no ollama program here')
    shutil.copytree(run/'merged', tmp_path/'merged', ignore=shutil.ignore_patterns('tokenizer.model'))
    (tmp_path/'Modelfile').write_text('FROM ./merged\nPARAMETER num_thread 1\nTEMPLATE """' + POST + '"""\n', encoding='utf-8')
    made = subprocess.run([program, 'create', 'tests/post', '-f', str(tmp_path/'Modelfile')], capture_output=True, text=True, check=True)
    assert 'success' in made.stdout + made.stderr
    rows = read_jsonl(run/'data'/'valid.jsonl')[:20]
    proof = verify_ollama('tests/post', run/'merged', rows)
    assert proof['text']['different'] == proof['tokens']['different'] == 20 and proof['greedy']['equal'] == 0


def test_four_bits_fall_back_and_still_answer(run, tmp_path):
    "Ollama's own q4_K_M of rows of 128: most matrices cannot be what the name says, and the file still holds the model."
    for name in ('model-bf16.gguf', 'Modelfile'): shutil.copyfile(run/'ollama'/name, tmp_path/name)
    path = tmp_path/'Modelfile'
    path.write_text(path.read_text(encoding='utf-8').replace('q8_0', 'bf16'), encoding='utf-8')
    create_model('tests/four', tmp_path, quantize='q4_K_M')
    path = Path(read_modelfile(ollama.Client().show('tests/four').modelfile)['from'])
    assert Counter(t['type'] for t in read_gguf(path)[1] if len(t['shape']) > 1) == {'Q4_K': 2, 'Q5_0': 22, 'Q6_K': 2, 'Q8_0': 3}
    assert path.stat().st_size < (run/'ollama'/'model-q8_0.gguf').stat().st_size
    right = [ollama.Client().generate('tests/four', r['instruction'], system=r['input']).response == r['output']
             for r in read_jsonl(run/'data'/'valid.jsonl')[:40]]
    assert sum(right) > 20
    load_gguf(run/'merged', path)
