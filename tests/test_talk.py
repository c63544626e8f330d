"A conversation with a run: on a terminal, on Ollama, llama.cpp and transformers, and what ends it."
import json
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest

from conftest import vouch

import kofinetune.chat
from kofinetune import talk
from kofinetune.chat import pick_style
from kofinetune.export import export_ollama
from kofinetune.recipe import Recipe
from kofinetune.runs import read_jsonl, read_manifest, write_json
from kofinetune.talk import _TooLong, _open, chat

APPLE, PRICE = "'사과'에 은/는 가운데 알맞은 조사를 붙여 쓰세요.", '3, 2, 4를 작은 것부터 차례로 쓰세요.'
NOWHERE = '127.0.0.1:9'


@pytest.fixture
def alone(monkeypatch): monkeypatch.setenv('OLLAMA_HOST', NOWHERE)


@pytest.fixture(scope='module')
def on_ollama(ollama_server, rehearsal_run):
    export_ollama(Recipe.named('rehearsal'), rehearsal_run)
    return rehearsal_run


def pieces(run, name, row, **changes):
    "Where a model of a run is asked, and what it writes, piece by piece."
    made = []
    recipe = pick_style(Recipe.load(run/'recipe.json'), run).replace(**changes)
    with _open(run, recipe, name) as (where, answer): answer(row, made.append)
    return where, made


def typed(monkeypatch, *lines):
    "Let `chat` read these lines, as if a person typed them."
    left = iter(lines)
    def read(prompt):
        try: return next(left)
        except StopIteration: raise EOFError from None
    monkeypatch.setattr('builtins.input', read)


# the engines

def test_the_engines_say_the_same_token_by_token(on_ollama, monkeypatch):
    rows = [row for row in read_jsonl(on_ollama/'data'/'valid.jsonl') if row['kind'] in ('polite', 'count', 'order')][:8]
    seen = {}
    for row in rows:
        where, made = pieces(on_ollama, 'tuned', row)
        assert where == 'Ollama, kofinetune-rehearsal:latest' and sum(map(bool, made)) > 2
        seen['Ollama', row['instruction'] + row['input']] = ''.join(made)
    monkeypatch.setenv('OLLAMA_HOST', NOWHERE)
    for row in rows:
        where, made = pieces(on_ollama, 'tuned', row)
        assert where == f'llama.cpp, {on_ollama}/ollama/model-q8_0.gguf' and sum(map(bool, made)) > 2
        assert seen['Ollama', row['instruction'] + row['input']] == ''.join(made)
    assert sum(seen['Ollama', row['instruction'] + row['input']] == row['output'] for row in rows) > 4


def test_transformers_writes_whole_letters_and_what_generate_says(rehearsal_run, alone):
    from kofinetune.base import load_base
    from kofinetune.scoring import generate
    rows = [row for row in read_jsonl(rehearsal_run/'data'/'valid.jsonl') if row['kind'] == 'polite'][:2] + [dict(instruction='뷁쒧?', input='')]
    recipe = Recipe.load(rehearsal_run/'recipe.json')
    wanted = generate(*load_base(recipe, 'none'), rows, max_new_tokens=recipe.max_new_tokens)
    for row, made in zip(rows, wanted):
        where, said = pieces(rehearsal_run, 'base', row)
        assert where == 'transformers' and len(said) > 2 and '\ufffd' not in ''.join(said[:-1]) and ''.join(said) == made['answer']


def test_a_letter_of_several_tokens_is_written_once_it_is_whole(rehearsal_run):
    "The stand-in's vocabulary has no 뷁: it is three bytes, which are three tokens."
    import torch
    from kofinetune.base import load_tokenizer
    from kofinetune.talk import _ask_transformers
    recipe = Recipe.load(rehearsal_run/'recipe.json')
    tok, made = load_tokenizer(recipe), []
    ids = tok('가뷁다', add_special_tokens=False)['input_ids']
    class Model:
        device = 'cpu'
        def generate(self, input_ids, streamer, **options):
            streamer.put(input_ids)
            for i in ids: streamer.put(torch.tensor([i]))
            streamer.end()
    _ask_transformers(Model(), tok, pick_style(recipe), dict(instruction='안녕', input=''), made.append)
    assert len(ids) > 4 and made == ['가', '뷁', '다']


def test_without_an_export_the_tuned_model_is_that_of_transformers(rehearsal_run, tmp_path, alone):
    run = tmp_path/'run'
    shutil.copytree(rehearsal_run, run, ignore=shutil.ignore_patterns('.lock', 'merged', 'ollama', 'eval'))
    manifest = read_manifest(run)
    for stage in ('merged', 'ollama', 'eval'): del manifest['stages'][stage]
    write_json(manifest, run/'manifest.json')
    where, made = pieces(run, 'tuned', dict(instruction=APPLE, input=''))
    assert (where, ''.join(made)) == ('transformers', '사과는')


def test_a_base_that_is_a_gguf_file_is_served(rehearsal_run, alone):
    file = rehearsal_run/'ollama'/'model-bf16.gguf'
    where, made = pieces(rehearsal_run, 'base', dict(instruction=APPLE, input=''), base=str(file))
    assert (where, ''.join(made)) == (f'llama.cpp, {file}', '사과는')


@pytest.mark.ollama
def test_another_model_of_the_same_name_is_not_asked(on_ollama, tmp_path):
    "Its name is that of the run, and its file is not."
    run = tmp_path/'run'
    shutil.copytree(on_ollama, run, ignore=shutil.ignore_patterns('.lock'))
    served = run/'ollama'/'model-q8_0.gguf'
    shutil.copyfile(run/'ollama'/'model-bf16.gguf', served)
    vouch(run, 'ollama')
    assert pieces(run, 'tuned', dict(instruction=APPLE, input=''))[0] == f'llama.cpp, {served}'


def test_the_temperature_of_the_recipe_counts(rehearsal_run, alone):
    row = dict(instruction='하나를 고르세요.', input='')
    for name in ('tuned', 'base'):
        cold, warm = ({''.join(pieces(rehearsal_run, name, row, temperature=t)[1]) for _ in range(5)} for t in (0., 5.))
        assert len(cold) == 1 < len(warm), name


@pytest.mark.parametrize('name', ['tuned', 'base'])
def test_the_other_fields_of_sampling_count(rehearsal_run, alone, name):
    row = dict(instruction=PRICE, input='')
    def said(**changes): return ''.join(pieces(rehearsal_run, name, row, **changes)[1])
    cold = said()
    assert said(temperature=5., top_k=1) == said(temperature=5., top_p=1e-6) == cold     # one token is left to choose from
    assert said(repeat_penalty=5.) != cold


@pytest.mark.parametrize('name', ['tuned', 'base'])
def test_a_prompt_that_is_too_long_is_said_to_be(rehearsal_run, alone, name):
    with pytest.raises(_TooLong, match='512'): pieces(rehearsal_run, name, dict(instruction='가' * 2000, input=''))


@pytest.mark.ollama
def test_on_ollama_too(on_ollama):
    with pytest.raises(_TooLong): pieces(on_ollama, 'tuned', dict(instruction='가' * 2000, input=''))


# the conversation

def test_a_conversation_goes_on_after_a_question_that_is_too_long(rehearsal_run, alone, monkeypatch, capsys):
    typed(monkeypatch, '가' * 2000, APPLE)
    chat(rehearsal_run)
    seen = capsys.readouterr().out
    assert seen.index('/clear starts over)') < seen.index('사과는')


def test_history_is_kept_for_each_model_and_cleared(rehearsal_run, alone, monkeypatch, capsys):
    "What is asked; the stand-in's own style shows the last question alone."
    rows, make = [], talk._row
    def row(question, turns):
        made = make(question, turns)
        rows.append([turn['content'] for turn in made['messages']])
        assert made['instruction'] == rows[-1][-1] and made['input'] == ''
        return made
    monkeypatch.setattr(talk, '_row', row)
    typed(monkeypatch, APPLE, PRICE, '/clear', PRICE, '', APPLE)
    chat(rehearsal_run, 'both')
    said = dict(re.findall(r'^(base|tuned): (.*)$', capsys.readouterr().out.split('starts over.\n')[1], re.M)[:2])
    base, tuned = [APPLE, said['base'], PRICE], [APPLE, said['tuned'], PRICE]
    assert said['base'] != said['tuned'] == '사과는'
    assert rows == [[APPLE], [APPLE], base, tuned, [PRICE], [PRICE]]


@pytest.fixture
def chatting(rehearsal_run, tmp_path):
    "The run, and its recipe says that it was trained in style chat."
    run = tmp_path/'run'
    shutil.copytree(rehearsal_run, run, ignore=shutil.ignore_patterns('.lock'))
    write_json(json.loads((run/'recipe.json').read_text()) | dict(style='chat'), run/'recipe.json')
    return run


def test_in_style_chat_a_second_question_sees_the_first(chatting, alone, monkeypatch, capsys):
    "What llama.cpp is sent, and what transformers reads: all turns so far, in Gemma's form."
    sent, read, stream, cut = [], [], talk._stream, kofinetune.chat.tokenize
    def post(client, path, write, **request):
        sent.append(request['prompt'])
        return stream(client, path, write, **request)
    def tokens(row, tok, style):
        made = cut(row, tok, style)
        read.append(tok.decode(made[0][:made[2]]))
        return made
    monkeypatch.setattr(talk, '_stream', post)
    monkeypatch.setattr(kofinetune.chat, 'tokenize', tokens)
    typed(monkeypatch, APPLE, PRICE, '/clear', PRICE)
    chat(chatting, 'both')
    assert 'without the earlier ones' not in capsys.readouterr().out
    for begin, prompts in (('', sent), ('<bos>', read)):
        first, second, cleared = prompts
        assert first == f'{begin}<start_of_turn>user\n{APPLE}<end_of_turn>\n<start_of_turn>model\n'
        assert second.startswith(first) and second.endswith(f'<end_of_turn>\n<start_of_turn>user\n{PRICE}<end_of_turn>\n<start_of_turn>model\n')
        assert second.count('<start_of_turn>user') == 2 and cleared == first.replace(APPLE, PRICE)


@pytest.mark.ollama
def test_on_ollama_a_second_question_sees_the_first(on_ollama, tmp_path, monkeypatch, capsys):
    sent, stream, run = [], talk._stream, tmp_path/'run'
    def post(client, path, write, **request):
        sent.append((path, request['raw'], request['prompt']))
        return stream(client, path, write, **request)
    shutil.copytree(on_ollama, run, ignore=shutil.ignore_patterns('.lock'))
    write_json(json.loads((run/'recipe.json').read_text()) | dict(style='chat'), run/'recipe.json')
    monkeypatch.setattr(talk, '_stream', post)
    typed(monkeypatch, APPLE, PRICE)
    chat(run)
    assert 'tuned: Ollama' in capsys.readouterr().out and {one[:2] for one in sent} == {('/api/generate', True)}
    assert sent[1][2].startswith(sent[0][2]) and PRICE in sent[1][2]


def test_the_turns_of_another_base_are_those_of_its_tokenizer(tmp_path):
    from test_bases import other_base
    from test_chat import CHATML
    from kofinetune.base import load_base
    base = other_base(tmp_path/'qwen', 'qwen3')
    (base/'chat_template.jinja').write_text(CHATML)
    recipe, seen = Recipe(base=str(base), style='chat', quant='none', dtype='fp32', max_new_tokens=4), {}
    model, tok = load_base(recipe)
    generate = model.generate
    model.generate = lambda **given: (seen.update(given), generate(**given))
    talk._ask_transformers(model, tok, recipe, talk._row(PRICE, [dict(role='user', content=APPLE), dict(role='assistant', content='사과는')]), lambda piece: None)
    text = tok.decode(seen['input_ids'][0])
    assert text.endswith('<|start|>assistant\n<think>\n\n</think>\n\n') and text.count('<|start|>user\n') == 2 and '사과는<|end|>' in text
    assert tok.convert_ids_to_tokens(seen['eos_token_id'])[0] == '<|end|>'


def test_it_says_once_that_questions_are_asked_alone(rehearsal_run, alone, monkeypatch, capsys):
    typed(monkeypatch, APPLE, APPLE)
    chat(rehearsal_run)
    assert capsys.readouterr().out.count('asks each question without the earlier ones') == 1


def test_decomposed_hangul_is_composed(rehearsal_run, alone, monkeypatch, capsys):
    import unicodedata
    typed(monkeypatch, unicodedata.normalize('NFD', APPLE))
    chat(rehearsal_run)
    assert '사과는' in capsys.readouterr().out


def test_an_answer_cannot_control_the_terminal(capsys):
    assert talk._answer(lambda prompt, write: write('가\x1b[2J\r\x07나\n'), '') == '가[2J나\n'
    assert capsys.readouterr().out == '가[2J나\n\n'


@pytest.mark.parametrize('error, says, asked', [
    (ValueError, "model is 'teacher'", dict(model='teacher')), (ValueError, "'사과' has no question", dict(given='사과')),
    (FileNotFoundError, 'kofinetune train --run', dict(run='nowhere'))])
def test_what_makes_no_sense_is_refused(rehearsal_run, error, says, asked):
    with pytest.raises(error, match=says): chat(**dict(run=rehearsal_run) | asked)


# the command

COMMAND = [sys.executable, '-m', 'kofinetune.cli', 'ask']


class Terminal:
    "The command on a terminal of its own."
    def __init__(self, *args, **env):
        self.here, there = pty.openpty()
        env = os.environ | dict(OLLAMA_HOST=NOWHERE, OMP_NUM_THREADS='1', TERM='dumb', COLUMNS='150', LC_ALL='C.UTF-8') | env
        self.process = subprocess.Popen([*COMMAND, *map(str, args)], stdin=there, stdout=there, stderr=there, env=env, start_new_session=True)
        os.close(there)
        self.text = ''

    def wait_for(self, text, times=1):
        deadline, seen = time.monotonic() + 120, self.text.encode()
        while self.text.count(text) < times:
            if not select.select([self.here], [], [], 1)[0]:
                assert time.monotonic() < deadline, self.text
                continue
            try: part = os.read(self.here, 65536)
            except OSError: part = b''
            assert part, f'ended before {text!r}: {self.text}'
            seen += part
            self.text = seen.decode(errors='ignore').replace('\r\n', '\n')

    def type(self, text): os.write(self.here, text.encode())

    def end(self):
        "Everything that was shown, and the exit code."
        seen = self.text.encode()
        while True:
            try: part = os.read(self.here, 65536)
            except OSError: break
            if not part: break
            seen += part
        os.close(self.here)
        return seen.decode().replace('\r\n', '\n'), self.process.wait(60)


@pytest.mark.parametrize('bye', ['\x04', '\n', '/bye\n'])
def test_on_a_terminal_a_conversation_ends_with(bye, rehearsal_run):
    terminal = Terminal(rehearsal_run)
    terminal.wait_for('> ')
    terminal.type(APPLE + '\n')
    terminal.wait_for('> ', 2)
    terminal.type(bye)
    text, code = terminal.end()
    assert code == 0 and '\n사과는\n' in text and 'Traceback' not in text
    before = text[:text.index('> ')].splitlines()
    assert len(before) == 3 and before[0].startswith('tuned: llama.cpp, '), before     # nothing of the libraries


def test_on_a_terminal_both_models_answer(rehearsal_run):
    terminal = Terminal(rehearsal_run, '--model', 'both')
    terminal.wait_for('> ')
    terminal.type(APPLE + '\n')
    terminal.wait_for('> ', 2)
    terminal.type('\x04')
    text, code = terminal.end()
    assert code == 0 and re.search('\nbase: .+\ntuned: 사과는\n', text)
    assert len(text[:text.index('> ')].splitlines()) == 4, text


def test_with_a_question_it_is_one_answer_of_each(rehearsal_run):
    seen = subprocess.run([*COMMAND, rehearsal_run, '다음 낱말에 은/는 가운데 알맞은 조사를 붙여 쓰세요.', '--input', '포도'], capture_output=True, text=True)
    assert seen.returncode == 0 and re.fullmatch('base: .*\ntuned: 포도는\n', seen.stdout, re.S), seen.stderr


@pytest.mark.parametrize('args, says', [(['--model', 'x'], "model is 'x'"), (['--input', '사과'], 'has no question')])
def test_a_wrong_request_is_one_line(rehearsal_run, args, says):
    seen = subprocess.run([*COMMAND, rehearsal_run, *args], capture_output=True, text=True)
    assert seen.returncode == 2 and says in seen.stderr and len(seen.stderr.splitlines()) == 1


class Cut(BaseHTTPRequestHandler):
    "Passes everything on to a real server; of an answer it lets a piece through, and then the connection is gone."
    protocol_version = 'HTTP/1.1'
    def log_message(self, *_): pass
    def do_GET(self): self.do_POST()

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get('Content-Length', 0)))
        made = httpx.request(self.command, f'http://{self.server.real}{self.path}', content=body, timeout=120)
        cut = self.path == '/api/generate'
        self.send_response(made.status_code)
        self.send_header('Content-Length', str(len(made.content)))
        self.end_headers()
        self.wfile.write(made.content.splitlines(True)[0] if cut else made.content)
        if cut: self.close_connection = True


@pytest.mark.ollama
def test_a_server_that_dies_in_the_middle_is_one_line(on_ollama, ollama_server):
    proxy = ThreadingHTTPServer(('127.0.0.1', 0), Cut)
    proxy.real = ollama_server
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    terminal = Terminal(on_ollama, OLLAMA_HOST=f'127.0.0.1:{proxy.server_port}')
    terminal.wait_for('> ')
    assert 'tuned: Ollama, kofinetune-rehearsal:latest' in terminal.text
    terminal.type(APPLE + '\n')
    text, code = terminal.end()
    proxy.shutdown()
    last = text.splitlines()[-1]
    assert code == 1 and 'Traceback' not in text and re.search(r'kofinetune: Ollama at .* broke off while answering .*ollama serve', last), text


@pytest.mark.ollama
def test_a_server_that_is_gone_is_one_line(on_ollama, ollama_server, monkeypatch, capsys):
    "Stopped between two questions."
    proxy = ThreadingHTTPServer(('127.0.0.1', 0), Cut)
    proxy.real = ollama_server
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    monkeypatch.setenv('OLLAMA_HOST', f'127.0.0.1:{proxy.server_port}')
    def read(prompt):
        proxy.shutdown()
        proxy.server_close()
        return APPLE
    monkeypatch.setattr('builtins.input', read)
    with pytest.raises(RuntimeError, match='broke off while answering .*ollama serve'): chat(on_ollama)
