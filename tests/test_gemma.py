"""Real Gemma 3 270M, from the packaged GGUF file: its tokens, its loss, a training, an export, an answer.

Skipped, with the reason, where the wheels of the extra `gemma` are not installed. The long form, three recipes on 300 rows each and a real
server, runs with KOFINETUNE_LONG=1 and takes about an hour on two cores."""
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT
from kofinetune.prompt import format_prompt
from kofinetune.recipe import Recipe
from kofinetune.runs import read_jsonl, write_jsonl
from kofinetune.data import load_rows, prepare, rows_to_measure

pytestmark = pytest.mark.gemma
GOLDEN = ROOT.parent/'shared'/'gemma'/'golden_tokens.json'
NAME = 'gemma-3-270m-q4'


@pytest.fixture(scope='module')
def gemma():
    "The folder with real Gemma's weights and tokenizer."
    from kofinetune.base import base_path
    try: return Path(base_path(NAME))
    except FileNotFoundError as e:
        if os.environ.get('CI') == 'true': pytest.fail(f'{e} (CI=true, so this is no skip)')
        pytest.skip(str(e))


@pytest.fixture(scope='module')
def tok(gemma):
    from transformers import AutoTokenizer
    return AutoTokenizer.from_pretrained(gemma)


@pytest.fixture(scope='module')
def golden():
    if not GOLDEN.is_file(): pytest.skip(f'no ids of Gemma\'s own tokenizer at {GOLDEN}')
    return json.loads(GOLDEN.read_text(encoding='utf-8'))


def test_unpacking_is_quick_small_and_imports_none_of_the_wheel(gemma, tmp_path):
    code = ('import sys; from kofinetune.base import base_path, peak_memory; base_path(%r); print(peak_memory())\n'
            'assert not [m for m in sys.modules if m.startswith("gemma3_270m")], "the wheel was imported"' % NAME)
    process = subprocess.Popen([sys.executable, '-c', code], env=os.environ | {'KOFINETUNE_CACHE': str(tmp_path)}, stdout=subprocess.PIPE, text=True)
    said = process.stdout.read()
    used = os.wait4(process.pid, 0)
    assert used[1] == 0
    seconds, memory = used[2].ru_utime + used[2].ru_stime, int(said.split()[-1])
    print(f'unpacked in {seconds:.0f} s of processor time with {memory / 1e9:.2f} GB')
    assert seconds < 60 and memory < 2.5e9
    folder = next(p for p in tmp_path.iterdir() if p.is_dir())
    assert {p.name for p in folder.iterdir()} == {
        'model.safetensors', 'config.json', 'generation_config.json', 'tokenizer.json', 'tokenizer_config.json', 'gguf.json', 'NOTICE',
        'GEMMA_TERMS.html'}
    def digest(path): return hashlib.sha256(path.read_bytes()).hexdigest()
    assert {p.name: digest(p) for p in folder.iterdir()} == {p.name: digest(p) for p in gemma.iterdir()}   # the same bytes each time


def test_the_ids_are_gemmas_own(tok, golden):
    assert len(golden['prompts']) == 130
    assert [p['text'] for p in golden['prompts'] if tok(p['text'])['input_ids'] != p['ids']] == []
    assert (tok.eos_token, tok.eos_token_id, tok.chat_template) == ('<eos>', 1, None)


def test_the_ids_of_8000_rows_and_the_posts_number_of_tokens(tok, golden, koalpaca):
    "Ids by their digest; and one epoch of `blog`, each text with the post's newline and `<eos>`, has the post's number of tokens."
    from kofinetune.prompt import format_answer
    from kofinetune.train import encode
    rows, about = json.loads(koalpaca.read_text(encoding='utf-8')), golden['koalpaca_head8000']
    ids = tok([format_prompt(row, 'blog') + format_answer(row, 'blog') for row in rows])['input_ids']
    text = json.dumps(ids, separators=(',', ':'))
    assert hashlib.sha256(text.encode()).hexdigest() == about['sha256_of_ids_as_compact_json']
    blog = Recipe.named('blog')
    encoded = [encode(row, tok, blog.style, blog.loss, blog.max_length)['input_ids'] for row in rows[:400]]
    assert encoded == [one + [tok.eos_token_id] for one in ids[:400]]
    assert sum(map(len, ids)) + len(ids) == about['post_num_tokens_per_epoch'] == 610_492


def test_llama_cpp_reads_the_same_tokens(gemma, tok, golden, tmp_path):
    "Gemma written back with `write_gguf`: the golden prompts, and the difficult ones."
    from kofinetune.gguffile import write_gguf
    from kofinetune.proof import difficult_rows, serve_gguf
    write_gguf(gemma, tmp_path/'m.gguf', 'q8_0')
    texts = [p['text'] for p in golden['prompts']] + [format_prompt(row, style) for row in difficult_rows() for style in ('alpaca', 'blog')]
    with serve_gguf(tmp_path/'m.gguf', 512) as server:
        def ids(text): return server.post('/tokenize', json=dict(content=text, add_special=True, parse_special=True)).json()['tokens']
        assert [text for text in texts if ids(text) != tok(text)['input_ids']] == []


@pytest.mark.parametrize('quant, wanted', [('none', 2.645), ('nf4', 3.04)])
def test_the_loss_on_60_real_rows(gemma, koalpaca, quant, wanted):
    from kofinetune.stats import summarize
    from kofinetune.scoring import answer_nll
    from kofinetune.base import load_base
    rows = json.loads(koalpaca.read_text(encoding='utf-8'))[:60]
    model, tok = load_base(Recipe(base=NAME, quant=quant, dtype='fp32'))
    loss = summarize(answer_nll(model, tok, rows))['answer_nll']
    assert abs(loss - wanted) < .02, loss


def test_the_recorded_losses_of_the_base_on_held_out_rows_are_those_of_plain_torch(gemma, koalpaca, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT/'benchmarks')
    from koalpaca import plain_loss
    held_out = []
    for name in ('best', 'blog'):
        prepare(Recipe.named(name).replace(source=str(koalpaca), valid_rows=1000), tmp_path/name)
        held_out.append({(row['instruction'], row['input'], row['output']): row for row in read_jsonl(tmp_path/name/'data'/'valid.jsonl')})
    rows = [row for key, row in held_out[0].items() if key in held_out[1]][:12]
    recorded = json.loads((ROOT/'benchmarks'/'results'/'koalpaca.json').read_text(encoding='utf-8'))['plain']['base']['plain']['rows'][:12]
    for found, wanted in zip(plain_loss(gemma, rows, 'alpaca')['rows'], recorded, strict=True):
        assert found[1:] == tuple(wanted[1:]) and found[0] == pytest.approx(wanted[0], rel=1e-3)


def test_every_text_that_ollama_prints_names_one_id_or_none(tok):
    "110 texts of the vocabulary belong to two ids, and U+FFFD to a piece of any letter: where it is not known which is meant, nothing is compared."
    from kofinetune.proof import _pieces, _read_ollama
    pieces, vocab, texts, cut = _pieces(tok), tok.get_vocab(), tok.convert_ids_to_tokens(range(len(tok))), '\ufffd'.encode()
    bytes_too = [data for data, i in pieces.items() if len(data) == 1 and f'<0x{data[0]:02X}>' in vocab and not texts[i].startswith('<0x')]
    assert len(bytes_too) == 110 and pieces[b'\n'] == 107 and cut not in pieces
    def piece(data, logp): return dict(bytes=list(data), logprob=logp)
    prompt = '### Response:\n'
    ids, seoul = tok(prompt)['input_ids'], tok.convert_tokens_to_ids('서울')
    top = [piece('서울'.encode(), -.1), piece(cut, -2.), piece(b'\n', -3.)]
    said = dict(done=True, done_reason='stop', response='서울', context=[*ids[1:], seoul], prompt_eval_count=len(ids),
                logprobs=[dict(token='서울', top_logprobs=top)])
    seen = _read_ollama(said, tok, pieces, prompt, ids)
    assert seen['same'] and seen['top'] == {seoul: -.1, 107: -3.} and seen['answer'] == [seoul, tok.eos_token_id]
    top.append(piece(b'\n', -4.))       # which of the two is the letter?
    assert _read_ollama(said, tok, pieces, prompt, ids)['top'] == {seoul: -.1}
    said['logprobs'].append(dict(token='\ufffd', top_logprobs=[]))      # more tokens than the text has
    assert _read_ollama(said, tok, pieces, prompt, ids)['answer'] is None


@pytest.fixture(scope='module')
def trained(gemma, tmp_path_factory):
    "Ten steps on one kind of packaged rows: a run with adapter and merged model."
    from kofinetune.merge import merge_adapter
    from kofinetune.train import finetune
    folder = tmp_path_factory.mktemp('gemma')
    rows = [row for row in load_rows('rehearsal') if row['kind'] == 'topic']     # the noun, with 은 or 는
    write_jsonl(rows, folder/'rows.jsonl')
    recipe = Recipe.named('laptop').replace(name='ten', source=str(folder/'rows.jsonl'), valid_rows=20, gguf=('q8_0',), epochs=1.0, save_steps=5.0)
    counts = prepare(recipe, folder/'run')
    metrics = finetune(recipe, folder/'run')
    merge_adapter(recipe, folder/'run')
    assert counts['valid'] == 20 and metrics['steps'] >= 10
    return recipe, folder/'run'


def test_ten_steps_lower_the_loss(trained):
    log = [e for e in read_jsonl(trained[1]/'adapter'/'log.jsonl') if 'eval_loss' in e]
    assert len(log) > 1 and log[-1]['eval_loss'] < .9 * log[0]['eval_loss'], log
    metrics = json.loads((trained[1]/'adapter'/'metrics.json').read_text(encoding='utf-8'))
    assert metrics['peak_memory_bytes'] < 5e9 and metrics['trainable_parameters'] == 3_796_992


def test_an_answer_of_ollama_is_right_and_the_terms_travel(trained, ollama_server, monkeypatch):
    "Proved on fewer prompts than an export is: the long form, and every export, take them all."
    import ollama
    from kofinetune import export
    from kofinetune.server import read_modelfile
    few = export.difficult_rows('alpaca')[::3]
    monkeypatch.setattr(export, 'difficult_rows', lambda style: few)
    monkeypatch.setattr(export, 'rows_to_measure', lambda run, most, fill: rows_to_measure(run, 20, fill))
    monkeypatch.setattr(export, 'load_rows', lambda source: load_rows(source)[:200])
    recipe, run = trained
    made = export.export_ollama(recipe, run)
    assert made['registered'] and made['failed'] == []
    greedy = json.loads((run/'ollama'/'verify.json').read_text(encoding='utf-8'))['greedy']
    assert greedy['equal'] + greedy['ties'] + greedy['different'] == greedy['checked'] and len(greedy['parted']) == greedy['ties'] + greedy['different']
    rows = read_jsonl(run/'data'/'valid.jsonl')
    def answer(row): return ollama.Client().generate(made['name'], row['instruction'], system=row['input']).response
    assert any(answer(row) == row['output'] for row in rows)
    licence = read_modelfile((run/'ollama'/'Modelfile').read_text(encoding='utf-8'))['license']
    assert any('Gemma Terms of Use' in text for text in licence)
    ollama.Client().delete(made['name'])


def test_one_wrong_row_of_one_matrix_is_refused(trained, tmp_path):
    "A right file passes, read back and on llama.cpp; one row of one matrix moved by one column does not, and the matrix is named."
    import gguf
    import numpy as np
    from kofinetune.gguffile import check_gguf, write_gguf
    from kofinetune.proof import verify_gguf
    merged, path = trained[1]/'merged', tmp_path/'m.gguf'
    write_gguf(merged, path, 'bf16')
    assert check_gguf(merged, path, 'bf16')['different'] == []
    prompts = [format_prompt(row) for row in read_jsonl(trained[1]/'data'/'valid.jsonl')]
    assert verify_gguf(merged, path, prompts)['failed'] == []
    matrix = next(t for t in gguf.GGUFReader(path, 'r+').tensors if t.name == 'blk.9.attn_output.weight')
    matrix.data[7] = np.roll(matrix.data[7], 2)      # two bytes: the right numbers, one column on
    assert check_gguf(merged, path, 'bf16')['different'] == ['blk.9.attn_output.weight is not the model.layers.9.self_attn.o_proj.weight of the safetensors']


LONG = pytest.mark.skipif(os.environ.get('KOFINETUNE_LONG') != '1', reason='the long form; run it with KOFINETUNE_LONG=1')


@LONG
@pytest.mark.parametrize('name', ['laptop', 'best', 'blog'])
def test_the_recipe_runs_to_the_end_on_300_rows(gemma, koalpaca, ollama_server, tmp_path, name):
    "By the command, with the real server: five stages, a table, exit code 0."
    rows = json.loads(koalpaca.read_text(encoding='utf-8'))[:300] if name != 'laptop' else load_rows('rehearsal')[:300]
    (tmp_path/'rows.json').write_text(json.dumps(rows, ensure_ascii=False), encoding='utf-8')
    settings = dict(source=tmp_path/'rows.json', base=NAME, epochs=1, eval_rows=40, max_new_tokens=48) | ({} if name == 'blog' else dict(valid_rows=40))
    seen = subprocess.run([sys.executable, '-m', 'kofinetune.cli', 'run', '--recipe', name, '--run', tmp_path/'run',
                           *(f'--set={key}={value}' for key, value in settings.items())], capture_output=True, text=True)
    print(seen.stdout[-5000:])
    assert seen.returncode == 0, seen.stderr[-3000:]
    manifest = json.loads((tmp_path/'run'/'manifest.json').read_text(encoding='utf-8'))['stages']
    assert list(manifest) == ['data', 'adapter', 'merged', 'ollama', 'eval'] and manifest['ollama']['result']['registered']
    for dtype, proof in manifest['ollama']['result']['files_proved'].items(): print(dtype, proof['greedy'], proof['logprobs'])
    print('served', manifest['ollama']['result']['greedy'], manifest['ollama']['result']['logprobs'])
    assert 'Ask it:   ollama run' in seen.stdout
