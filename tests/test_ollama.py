"A real Ollama server: what it lists, what it renders, which tokens it sees, what it answers, and what it refuses."
import hashlib
import json
import re
import shutil
import subprocess

import httpx
import ollama
import pytest
from conftest import ollama_program

from kofinetune.data import Recipe, format_prompt, read_jsonl, read_manifest
from kofinetune.export import (create_model, difficult_rows, export_ollama, is_registered, list_models, modelfile, prompt_template,
                               proof_failures, read_modelfile, server_url, verify_ollama, verify_run)

pytestmark = pytest.mark.ollama
NAME = 'kofinetune-rehearsal:latest'


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
    return create_model('tests/blog:v1.0', folder)['name']


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
    entry = next(m for m in list_models() if m['name'] == NAME)
    size = (run/'ollama'/'model-q8_0.gguf').stat().st_size
    assert size < entry['size'] < size + 10_000
    assert not [m for m in list_models() if 'unproved' in m['name']]
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
    assert by_api['template'] == prompt_template('alpaca') and by_api['parameters']['stop'][0] == '### Instruction:'
    assert 'Gemma' in client.show(NAME).license
    client.delete('by-hand')


def test_rendered_prompts_are_the_trained_ones(run, blog):
    rows = difficult_rows() + read_jsonl(run/'data'/'valid.jsonl')[:50]
    for model, style in ((NAME, 'alpaca'), (blog, 'blog')):
        for row in rows: assert rendered(model, row) == format_prompt(row, style)


def test_a_conversation_asks_only_its_last_question(run, blog):
    earlier = [dict(role='user', content='처음 질문'), dict(role='assistant', content='처음 답')]
    for row in (dict(instruction='다음 질문', input=''), dict(instruction='다음 질문', input='사과')):
        assert rendered(NAME, row, earlier) == format_prompt(row, 'alpaca')
        assert rendered(blog, row, earlier) == format_prompt(row, 'blog')


@pytest.mark.parametrize('style', ['alpaca', 'blog'])
def test_the_server_sees_the_same_tokens_and_says_the_same(run, blog, style):
    model, dtype = (NAME, 'q8_0') if style == 'alpaca' else (blog, 'bf16')
    rows = read_jsonl(run/'data'/'valid.jsonl')[:20] + difficult_rows()
    proof = verify_ollama(model, run/'merged', rows, style, answers=20)
    assert proof_failures(proof, dtype) == []
    assert proof['text'] == dict(checked=len(rows), different=0, examples=[])
    assert proof['tokens'] == dict(checked=len(rows), different=0, extra_bos=0, examples=[])
    assert proof['logprobs']['compared'] >= 70 and proof['greedy']['checked'] == 20 and proof['server']


def test_a_held_out_question_gets_the_right_answer(run):
    rows = read_jsonl(run/'data'/'valid.jsonl')[:40]
    client, right = ollama.Client(), 0
    for row in rows:
        made = client.generate(NAME, row['instruction'], system=row['input'])
        assert made.done and made.done_reason == 'stop'
        right += made.response == row['output']
    assert right > len(rows) / 2


def test_a_finished_stage_is_registered_again(run, capsys):
    ollama.Client().delete(NAME)
    assert not is_registered(NAME, run/'ollama')
    (run/'ollama'/'verify.json').write_text('{}', encoding='utf-8')
    export_ollama(Recipe.named('rehearsal'), run)
    out = capsys.readouterr().out
    assert 'already done' in out and f'registered {NAME}' in out
    assert is_registered(NAME, run/'ollama')
    assert not is_registered('tests/blog:v1.0', run/'ollama')
    verify_json_is_of_this_server(run)


def verify_json_is_of_this_server(run):
    path = run/'ollama'/'verify.json'
    said = json.loads(path.read_text(encoding='utf-8'))
    assert said['server'] and 'skipped' not in said['text']
    assert said['text']['different'] == said['tokens']['different'] == 0
    assert said['text']['checked'] >= 100 + len(difficult_rows()) and said['logprobs']['checked'] == said['greedy']['checked'] == 100
    assert read_manifest(run)['stages']['ollama']['files']['verify.json'] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_model_that_fails_its_proof_gets_no_name(run, tmp_path):
    "The post's template under our weights: the stage says what differs, and the name stays free."
    copy = tmp_path/'run'
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns('.lock', 'checkpoints'))
    manifest = json.loads((copy/'manifest.json').read_text(encoding='utf-8'))
    manifest['stages']['ollama']['result'] |= dict(name='never:latest')
    (copy/'manifest.json').write_text(json.dumps(manifest), encoding='utf-8')
    path = copy/'ollama'/'Modelfile'
    post = '\n### Instruction:\n{{ .Prompt }}\n\n### Response:\n'
    path.write_text(path.read_text(encoding='utf-8').replace(prompt_template('alpaca'), post), encoding='utf-8')
    with pytest.raises(RuntimeError, match=r'does not serve the merged model: \d+ of \d+ prompts are rendered differently'):
        verify_run(Recipe.named('rehearsal'), copy)
    assert not [m for m in list_models() if m['name'].startswith('never')]


def test_known_differences_are_still_there(run):
    "The page names these; should a newer Ollama mend one, the page must change."
    assert 'image' in ask('/api/generate', model=NAME, prompt='[img-0]').get('error', '')
    proof = verify_ollama(NAME, run/'merged', [dict(instruction='<unk>', input='')], answers=1)
    assert proof['tokens']['different'] == 1 and proof['text']['different'] == 0
