"The GGUF files: every tensor and key against the safetensors, odd shapes, refusals, the real size, and nothing half-written."
import json
import re
import shutil

import numpy as np
import pytest

from kofinetune import export, gguffile, proof
from kofinetune.prompt import format_prompt
from kofinetune.recipe import Recipe
from kofinetune.runs import read_jsonl, read_manifest
from kofinetune.data import load_rows
from kofinetune.gguffile import _read_tokens, check_gguf, read_gguf, write_gguf
from kofinetune.server import read_modelfile
from kofinetune.proof import difficult_rows, serve_gguf, verify_gguf
from kofinetune.export import export_ollama, verify_run
from kofinetune.rehearsal import stand_in_base
STYLES = ('alpaca', 'blog')   # test_chat has the third

TYPES = dict(bf16='BF16', f16='F16', q8_0='Q8_0')   # what is written: GGML's name
SHAPE = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=7, num_attention_heads=4, num_key_value_heads=1, head_dim=32,
             query_pre_attn_scalar=32, sliding_window=24, max_position_embeddings=32768)


def make_model(folder, dtype='bfloat16', shard='5GB', **changes):
    "A random Gemma 3 with the stand-in's tokenizer: seven layers, so that one sees all, and a window shorter than a prompt."
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig
    base, shape = stand_in_base(), SHAPE | changes
    rows = json.loads((base/'config.json').read_text())['vocab_size'] + 37
    torch.manual_seed(1)
    model = Gemma3ForCausalLM(Gemma3TextConfig(**dict(vocab_size=rows) | shape))
    for name, weight in model.named_parameters():
        if 'norm' in name: weight.data.normal_(0, .2)
        elif 'layers' in name: weight.data.mul_(4)
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=shard)
    for path in base.glob('tokenizer*'): shutil.copyfile(path, folder/path.name)
    return folder


@pytest.fixture(scope='module')
def odd(tmp_path_factory):
    "A model in several shards, its head not tied, with more rows than tokens."
    return make_model(tmp_path_factory.mktemp('odd'), tie_word_embeddings=False, shard='400KB')


def stored_tensors(folder):
    from safetensors import safe_open
    made = {}
    for path in folder.glob('*.safetensors'):
        with safe_open(path, 'pt') as f: made |= {name: f.get_tensor(name).float().numpy() for name in f.keys()}
    return made


@pytest.mark.parametrize('dtype', TYPES)
def test_every_tensor_reads_back_as_the_safetensors_rounded(odd, tmp_path, dtype):
    import gguf
    assert len(list(odd.glob('model-*.safetensors'))) > 3
    write_gguf(odd, tmp_path/'m.gguf', dtype)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA3, 7)
    source = {names.get_name(k, ('.weight',)): v for k, v in stored_tensors(odd).items()}
    _, tensors = read_gguf(tmp_path/'m.gguf')
    assert {t['name'] for t in tensors} == set(source) and 'output.weight' in source
    for t in tensors:
        wanted = source[t['name']]
        assert t['shape'] == list(wanted.shape)
        kind = gguf.GGMLQuantizationType[t['type']]
        if wanted.ndim == 1:
            assert t['type'] == 'F32' and np.array_equal(t['data'], wanted + 1)
        else:
            assert t['type'] == TYPES[dtype]
            seen = gguf.quants.dequantize(t['data'], kind).reshape(wanted.shape)
            if dtype == 'bf16': assert np.array_equal(seen, wanted)
            elif dtype == 'f16': assert np.array_equal(seen, wanted.astype(np.float16).astype(np.float32))
            else:
                step = abs(wanted.reshape(-1, 32)).max(1, keepdims=True) / 127
                assert (abs(seen - wanted).reshape(-1, 32) <= step * .57 + 1e-8).all()


def test_keys(odd, tmp_path):
    write_gguf(odd, tmp_path/'m.gguf', 'q8_0', name='나의 모델')
    keys, _ = read_gguf(tmp_path/'m.gguf')
    wanted = {'general.architecture': 'gemma3', 'general.name': '나의 모델', 'general.file_type': 7, 'gemma3.context_length': 32768,
              'gemma3.embedding_length': 128, 'gemma3.block_count': 7, 'gemma3.feed_forward_length': 256, 'gemma3.attention.head_count': 4,
              'gemma3.attention.head_count_kv': 1, 'gemma3.attention.key_length': 32, 'gemma3.attention.value_length': 32,
              'gemma3.attention.sliding_window': 24, 'gemma3.rope.freq_base': 1e6, 'gemma3.rope.freq_base_swa': 1e4,
              'gemma3.rope.local.freq_base': 1e4, 'tokenizer.ggml.model': 'llama', 'tokenizer.ggml.pre': 'default',
              'tokenizer.ggml.bos_token_id': 2, 'tokenizer.ggml.eos_token_id': 1, 'tokenizer.ggml.unknown_token_id': 3,
              'tokenizer.ggml.padding_token_id': 0, 'tokenizer.ggml.add_bos_token': True, 'tokenizer.ggml.add_eos_token': False,
              'tokenizer.ggml.add_space_prefix': False}
    assert {key: keys[key] for key in wanted} == wanted
    tokens, types, size = keys['tokenizer.ggml.tokens'], keys['tokenizer.ggml.token_type'], json.loads((odd/'config.json').read_text())['vocab_size']
    assert len(tokens) == len(types) == len(keys['tokenizer.ggml.scores']) == size
    assert tokens[keys['tokenizer.ggml.eot_token_id']] == '<end_of_turn>'
    assert tokens[-1] == f'[PAD{size - 1}]' and types[-37:] == [5] * 37
    assert [types[tokens.index(t)] for t in ('<bos>', '<unk>', '<0xEA>', '\n\n', '가')] == [3, 2, 6, 1, 1]


@pytest.mark.parametrize('dtype', TYPES)
def test_a_flipped_bit_and_a_changed_key_are_noticed(odd, tmp_path, dtype):
    import gguf
    path, wrong = tmp_path/'m.gguf', tmp_path/'wrong.gguf'
    write_gguf(odd, path, dtype)
    whole = check_gguf(odd, path, dtype)
    assert whole == dict(tensors=94, keys=33, different=[])
    tensors = {t.name: (t.data_offset, t.n_bytes) for t in gguf.GGUFReader(path).tensors}
    for name, (offset, size) in list(tensors.items())[::12]:
        data = bytearray(path.read_bytes())
        data[offset + size // 2] ^= 1     # the lowest bit of a byte in the middle
        wrong.write_bytes(data)
        different = check_gguf(odd, wrong, dtype)['different']
        assert len(different) == 1 and different[0].startswith(f'{name} is not the '), (name, different)
    changes = {'general.file_type': 3, 'gemma3.rope.freq_base': 1e4, 'tokenizer.ggml.add_bos_token': False, 'tokenizer.ggml.scores': -5.}
    for key, value in changes.items():
        shutil.copyfile(path, wrong)
        field = gguf.GGUFReader(wrong, 'r+').fields[key]
        field.parts[field.data[-1]][0] = value
        different = check_gguf(odd, wrong, dtype)['different']
        assert len(different) == 1 and different[0].startswith(f'{key} is '), (key, different)
    assert check_gguf(odd, path, dtype, name='another')['different'] == ["general.name is 'kofinetune', not 'another'"]


def numbers_and_tokens(proof):
    "What failed but the answers: those of random weights are ties."
    return [said for said in proof['failed'] if 'answers' not in said]


@pytest.mark.parametrize('dtype', TYPES)
def test_a_head_of_its_own_runs_on_the_engine(odd, tmp_path, dtype):
    write_gguf(odd, tmp_path/'m.gguf', dtype)
    prompts = [format_prompt(r, 'blog') for r in difficult_rows()[:12]]
    proof = verify_gguf(odd, tmp_path/'m.gguf', prompts, dtype=dtype)
    assert proof['logprobs']['compared'] == 5 * len(prompts) and numbers_and_tokens(proof) == []


def test_a_wrong_position_base_is_noticed(odd, tmp_path):
    "The engine reads rope and window from the file: without them the same check fails."
    import gguf
    write_gguf(odd, tmp_path/'m.gguf')
    prompts = [format_prompt(r, 'blog') for r in difficult_rows()[:12]]
    def failures(name): return numbers_and_tokens(verify_gguf(odd, tmp_path/name, prompts))
    assert not failures('m.gguf')
    for key, value in {'gemma3.rope.freq_base': 1e4, 'gemma3.attention.sliding_window': 512}.items():
        shutil.copyfile(tmp_path/'m.gguf', tmp_path/'wrong.gguf')
        field = gguf.GGUFReader(tmp_path/'wrong.gguf', 'r+').fields[key]
        field.parts[field.data[0]][0] = value
        assert 'log-probabilities' in failures('wrong.gguf')[0], key


REFUSED = {'config.json': [(dict(model_type='llama'), "model_type is 'llama'"), (dict(layer_types=['full_attention'] * 7), 'layer_types'),
                           (dict(query_pre_attn_scalar=64), 'query_pre_attn_scalar is 64'), (dict(final_logit_softcapping=30.), 'final_logit_softcapping is 30.0'),
                           (dict(rope_parameters=None), 'rope_types is [None, None]'),
                           (dict(rope_parameters={'full_attention': dict(rope_type='linear', factor=8.), 'sliding_attention': dict(rope_type='default')}), "rope_types is ['linear', 'default']")],
           'tokenizer.json': [(dict(normalizer=None), 'normalizer is None'), (dict(model=dict(type='Unigram', vocab=[])), 'Unigram')]}


@pytest.mark.parametrize('file, changes, message', [(file, *case) for file, cases in REFUSED.items() for case in cases])
def test_refusals_are_one_line_and_leave_nothing(odd, tmp_path, file, changes, message):
    for path in odd.iterdir(): shutil.copyfile(path, tmp_path/path.name)
    data = json.loads((odd/file).read_text(encoding='utf-8'))
    (tmp_path/file).write_text(json.dumps(data | changes), encoding='utf-8')
    with pytest.raises(ValueError) as e: write_gguf(tmp_path, tmp_path/'m.gguf')
    assert message in str(e.value) and '\n' not in str(e.value) and len(str(e.value)) < 600
    assert not [p for p in tmp_path.iterdir() if 'gguf' in p.name]


def test_a_full_disk_keeps_the_old_file_and_leaves_nothing_else(odd, tmp_path, monkeypatch):
    import gguf
    write_gguf(odd, tmp_path/'m.gguf')
    before, real, calls = (tmp_path/'m.gguf').read_bytes(), gguf.quants.quantize, []
    def full(*args):
        calls.append(args)
        if len(calls) == 9: raise OSError(28, 'No space left on device')
        return real(*args)
    monkeypatch.setattr(gguf.quants, 'quantize', full)
    with pytest.raises(OSError, match='No space left'): write_gguf(odd, tmp_path/'m.gguf', 'q8_0')
    assert [p.name for p in tmp_path.iterdir()] == ['m.gguf'] and (tmp_path/'m.gguf').read_bytes() == before


def test_no_weights_and_no_type_make_no_file(odd, tmp_path):
    (tmp_path/'bare').mkdir()
    shutil.copyfile(odd/'config.json', tmp_path/'bare'/'config.json')
    with pytest.raises(FileNotFoundError, match='has no .safetensors'): write_gguf(tmp_path/'bare', tmp_path/'m.gguf')
    with pytest.raises(ValueError, match='q4_k_m'): write_gguf(odd, tmp_path/'m.gguf', 'q4_k_m')
    assert not list(tmp_path.glob('*.gguf*')) and not list(tmp_path.glob('.*'))


def test_tokens_beyond_the_embedding_are_dropped_only_when_added(odd, tmp_path):
    data = json.loads((odd/'tokenizer.json').read_text(encoding='utf-8'))
    size = len(data['model']['vocab'])
    added = data['added_tokens'][0] | dict(id=size, content='<image_soft_token>')
    (tmp_path/'tokenizer.json').write_text(json.dumps(data | dict(added_tokens=data['added_tokens'] + [added])), encoding='utf-8')
    assert '<image_soft_token>' not in _read_tokens(tmp_path, size)[0]
    with pytest.raises(ValueError, match='has no row; the embedding has'): _read_tokens(tmp_path, size - 1)


def test_scores_decide_between_two_cuts(odd, tmp_path):
    "가나다 is 가 + 나다 for transformers, whose list has that merge first; leftmost-first would say 가나 + 다."
    from transformers import AutoTokenizer
    for path in odd.iterdir(): shutil.copyfile(path, tmp_path/path.name)
    data = json.loads((odd/'tokenizer.json').read_text(encoding='utf-8'))
    first = len(data['model']['vocab'])
    data['model']['vocab'] |= {'나다': first, '가나': first + 1}
    data['model']['merges'] += [['나', '다'], ['가', '나']]
    (tmp_path/'tokenizer.json').write_text(json.dumps(data), encoding='utf-8')
    tok = AutoTokenizer.from_pretrained(tmp_path)
    assert tok.tokenize('가나다') == ['가', '나다'] and tok.tokenize('가나') == ['가나']
    write_gguf(tmp_path, tmp_path/'m.gguf')
    proof = verify_gguf(tmp_path, tmp_path/'m.gguf', ['가나다', '다가나다가나'], asked=0)
    assert proof['tokens'] == dict(checked=2, different=0, share=0, extra_bos=0, examples=[])


def test_the_real_size(tmp_path):
    "Gemma 3 270M's exact shape with made-up weights: the file's size, its last rows, and a word from the engine."
    import gguf
    import torch
    from transformers import Gemma3TextConfig, Gemma3ForCausalLM
    config = Gemma3TextConfig(vocab_size=262144, hidden_size=640, intermediate_size=2048, num_hidden_layers=18, num_attention_heads=4,
                              num_key_value_heads=1, head_dim=256, sliding_window=512, query_pre_attn_scalar=256, max_position_embeddings=32768,
                              dtype=torch.bfloat16)
    with torch.device('meta'): model = Gemma3ForCausalLM(config).to(torch.bfloat16)
    model.to_empty(device='cpu').tie_weights()
    for i, weight in enumerate(model.parameters()): weight.data.fill_((i % 17 - 8) / 64)
    assert model.num_parameters() == 268_098_176
    model.save_pretrained(tmp_path/'m')
    for path in stand_in_base().glob('tokenizer*'): shutil.copyfile(path, tmp_path/'m'/path.name)
    made = write_gguf(tmp_path/'m', tmp_path/'m.gguf', 'q8_0')
    assert made['tensors'] == 236
    assert 285e6 < made['bytes'] < 300e6
    shapes = {tuple(t['shape']): t for t in read_gguf(tmp_path/'m.gguf')[1]}
    assert set(shapes) == {tuple(weight.shape) for weight in model.parameters()}
    rows = gguf.quants.dequantize(shapes[262144, 640]['data'][-1000:], gguf.GGMLQuantizationType.Q8_0)
    assert np.allclose(rows, model.get_input_embeddings().weight[-1000:].float().numpy(force=True), atol=1e-4)
    with serve_gguf(tmp_path/'m.gguf', 64) as server:
        assert server.post('/completion', json=dict(prompt='가', n_predict=1)).json()['tokens_evaluated'] == 2


def test_one_file_only(rehearsal_run, tmp_path, monkeypatch):
    "gguf=bf16 writes that file alone; the Modelfile names it, and says how the recipe chooses the next token."
    monkeypatch.setenv('OLLAMA_HOST', '127.0.0.1:9')
    run = copied(rehearsal_run, tmp_path)
    result = export_ollama(Recipe.named('rehearsal').replace(gguf=('bf16',), style='alpaca', temperature=.7, repeat_penalty=1.1), run, force=True)
    assert {p.name for p in (run/'ollama').iterdir()} == {'model-bf16.gguf', 'Modelfile', 'verify.json'}
    made = read_modelfile((run/'ollama'/'Modelfile').read_text(encoding='utf-8'))
    assert made['from'] == './model-bf16.gguf'
    assert made['parameters'] == dict(temperature=.7, top_k=64, top_p=.95, repeat_penalty=1.1, num_ctx=512, num_predict=48, num_thread=1, stop=made['parameters']['stop'])
    said = json.loads((run/'ollama'/'verify.json').read_text(encoding='utf-8'))
    assert 'http://127.0.0.1:9' in said['text']['skipped'] and said['server'] is None
    assert said['tokens']['checked'] >= 100 and said['tokens']['different'] == 0 and not result['registered']


def copied(rehearsal_run, tmp_path):
    run = tmp_path/'run'
    shutil.copytree(rehearsal_run, run, ignore=shutil.ignore_patterns('checkpoints', '.lock'))
    return run


def test_a_failed_proof_leaves_no_folder(rehearsal_run, tmp_path, monkeypatch):
    monkeypatch.setenv('OLLAMA_HOST', '127.0.0.1:9')
    real = proof._ask_llama_cpp
    def off_by_one(*asked):
        seen = real(*asked)
        return seen | dict(top={i: logp - 1 for i, logp in seen.get('top', {}).items()})
    monkeypatch.setattr(proof, '_ask_llama_cpp', off_by_one)
    run = copied(rehearsal_run, tmp_path)
    shutil.rmtree(run/'ollama')
    with pytest.raises(RuntimeError, match=r'model-bf16.gguf is not the merged model: log-probabilities differ by 1\.\d+, more than 0\.\d+'):
        export_ollama(Recipe.named('rehearsal').replace(gguf=('bf16',)), run)
    assert not (run/'ollama').exists() and not list(run.glob('.*partial'))


def test_a_file_that_was_not_written_as_planned_stops_the_export(rehearsal_run, tmp_path, monkeypatch):
    "A disk that flips one bit: the export reads its own file back, and stops."
    monkeypatch.setenv('OLLAMA_HOST', '127.0.0.1:9')
    real = gguffile.write_gguf
    def flipping(model_dir, path, dtype, name):
        made = real(model_dir, path, dtype, name)
        data = bytearray(path.read_bytes())
        data[-40] ^= 1
        path.write_bytes(data)
        return made
    monkeypatch.setattr(export, 'write_gguf', flipping)
    run = copied(rehearsal_run, tmp_path)
    shutil.rmtree(run/'ollama')
    with pytest.raises(RuntimeError, match=r'model-bf16.gguf is not the merged model: \S+ is not the \S+ of the safetensors'):
        export_ollama(Recipe.named('rehearsal').replace(gguf=('bf16',)), run)
    assert not (run/'ollama').exists()


def test_verify_without_a_server_proves_the_files(rehearsal_run, tmp_path, monkeypatch):
    monkeypatch.setenv('OLLAMA_HOST', '127.0.0.1:9')
    run = copied(rehearsal_run, tmp_path)
    said = verify_run(Recipe.named('rehearsal'), run)
    assert said['failed'] == [] and 'http://127.0.0.1:9' in said['text']['skipped'] and said['server'] is None
    assert said['tokens']['checked'] == 100 + len(difficult_rows()) + 232 and said['tokens']['different'] == 0
    assert said['files_proved']['bf16']['file']['tensors'] == 54 and said['engine'].startswith('xllamacpp ')
    assert json.loads((run/'ollama'/'verify.json').read_text(encoding='utf-8')) == said


def test_verify_says_which_file_has_changed(rehearsal_run, tmp_path, monkeypatch, capsys):
    from kofinetune.cli import main
    run = copied(rehearsal_run, tmp_path)
    with (run/'ollama'/'model-q8_0.gguf').open('r+b') as f: f.seek(-40, 2); f.write(b'\x55')
    monkeypatch.setattr('sys.argv', ['kofinetune', 'verify', str(run)])
    with pytest.raises(SystemExit) as e: main()
    assert e.value.code == 1
    said = capsys.readouterr().err
    assert 'model-q8_0.gguf is not the file that was written' in said and '--force' in said


def test_without_a_server_it_says_how_to_register(rehearsal_run, monkeypatch, capsys):
    monkeypatch.setenv('OLLAMA_HOST', '127.0.0.1:9')
    export_ollama(Recipe.named('rehearsal'), rehearsal_run)
    out = capsys.readouterr().out
    assert 'already done' in out and re.search(r'\n  ollama serve\n  ollama create kofinetune-rehearsal -f \S+/ollama/Modelfile\n', out)


def test_a_bad_name_is_refused_before_any_work(rehearsal_run):
    before = read_manifest(rehearsal_run)
    with pytest.raises(ValueError, match="ollama_name is '한글'; a name has 1 to 80"): export_ollama(Recipe.named('rehearsal').replace(ollama_name='한글'), rehearsal_run)
    assert read_manifest(rehearsal_run) == before


@pytest.mark.parametrize('style', STYLES)
def test_tokens_of_the_packaged_rows(tmp_path, style):
    write_gguf(stand_in_base(), tmp_path/'m.gguf')
    prompts = [format_prompt(row, style) for row in load_rows('rehearsal') + difficult_rows()]
    proof = verify_gguf(stand_in_base(), tmp_path/'m.gguf', prompts, asked=0)
    assert proof['tokens'] == dict(checked=2320 + len(difficult_rows()), different=0, share=0, extra_bos=0, examples=[])


@pytest.mark.koalpaca
def test_tokens_of_the_real_rows(koalpaca, tmp_path):
    "Every real row's prompt has the ids that transformers gives it."
    write_gguf(stand_in_base(), tmp_path/'m.gguf')
    prompts = [format_prompt(row, 'blog') for row in json.loads(koalpaca.read_text(encoding='utf-8'))]
    proof = verify_gguf(stand_in_base(), tmp_path/'m.gguf', prompts, asked=0)
    assert proof['tokens'] == dict(checked=8000, different=0, share=0, extra_bos=0, examples=[])


def test_the_numbers_of_an_answer_that_begins_with_a_part_of_a_letter(rehearsal_run, tmp_path):
    "llama.cpp keeps such bytes back and has no numbers for them: its first numbers are those of a later place. So they are asked for again."
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    merged, folder = rehearsal_run/'merged', tmp_path/'m'
    model, tok = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.bfloat16), AutoTokenizer.from_pretrained(merged)
    prompts = [format_prompt(r) for r in read_jsonl(rehearsal_run/'data'/'valid.jsonl') if r['kind'] == 'order'][:12]
    def first_of(folder, prompt):
        "The first token of transformers' greedy answer."
        made = AutoModelForCausalLM.from_pretrained(folder)(torch.tensor([tok(prompt)['input_ids']]))
        return int(made.logits[0, -1].argmax())
    first = [first_of(merged, prompt) for prompt in prompts]
    rows, byte = model.get_input_embeddings().weight.data, tok.convert_tokens_to_ids('<0xEC>')
    rows[byte] = rows[max(set(first), key=first.count)] * 1.25      # begins in its place
    model.save_pretrained(folder)
    for path in merged.glob('tokenizer*'): shutil.copyfile(path, folder/path.name)
    assert byte in [first_of(folder, prompt) for prompt in prompts]
    write_gguf(folder, tmp_path/'m.gguf')
    proof = verify_gguf(folder, tmp_path/'m.gguf', prompts)
    assert proof['logprobs']['compared'] == 5 * len(prompts) and proof['failed'] == []
