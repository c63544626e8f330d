"Where a base comes from: GGUF files of every kind, the cache, the packaged model, room. Real Gemma is in test_gemma.py."
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import ROOT
from kofinetune import base
from kofinetune.prompt import format_prompt
from kofinetune.recipe import Recipe
from kofinetune.data import load_rows
from kofinetune.gguffile import write_gguf
from kofinetune.proof import difficult_rows
from kofinetune.base import load_tokenizer
from kofinetune.export import licences
from kofinetune.merge import copy_tokenizer
from kofinetune.gguffile import read_gguf, unpack_gguf
from kofinetune.rehearsal import stand_in_base


@pytest.fixture(scope='module')
def small(tmp_path_factory):
    "The stand-in as a q8_0 file."
    path = tmp_path_factory.mktemp('gguf')/'small.gguf'
    write_gguf(stand_in_base(), path, 'q8_0')
    return path


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv('KOFINETUNE_CACHE', str(tmp_path/'cache'))
    return tmp_path/'cache'


def write(path, source, keys={}, tensors=lambda name, data, kind: (data, kind), without=()):
    "Write a file like `source` with other keys and tensors."
    old, stored = read_gguf(source)
    old = {k: v for k, v in old.items() if not k.startswith('GGUF.') and k not in without} | keys
    writer = gguf.GGUFWriter(path, old.pop('general.architecture'))
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}
    for key, value in old.items(): add[type(value)](key, value)
    for t in stored:
        if t['name'] in without: continue
        kind = gguf.GGMLQuantizationType[t['type']]
        data, kind = tensors(t['name'], gguf.quants.dequantize(t['data'], kind).reshape(t['shape']).astype(np.float32), kind)
        writer.add_tensor(t['name'], gguf.quants.quantize(data, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize('kind', ['F32', 'F16', 'BF16', 'Q8_0', 'Q5_0', 'Q4_0'])
def test_every_type_gives_the_weights_it_holds(small, tmp_path, kind):
    wanted = gguf.GGMLQuantizationType[kind]
    path = write(tmp_path/'m.gguf', small, tensors=lambda name, data, old: (data, wanted if data.ndim > 1 else old))
    about = unpack_gguf(path, tmp_path/'m')
    assert about['types'] == [kind]
    model = AutoModelForCausalLM.from_pretrained(tmp_path/'m', dtype=torch.float32)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA3, model.config.num_hidden_layers)
    stored = {t['name']: t for t in read_gguf(path)[1]}
    for key, weight in model.named_parameters():
        t = stored.pop(names.get_name(key, ('.weight',)))
        values = gguf.quants.dequantize(t['data'], gguf.GGMLQuantizationType[t['type']]).reshape(t['shape']) - key.endswith('norm.weight')
        assert torch.equal(weight.detach(), torch.from_numpy(values).bfloat16().float()), key
    assert not stored


def test_there_and_back_is_the_same_model(tmp_path):
    "Written as bf16 and unpacked: the same weights, the same configuration and the same tokens."
    write_gguf(stand_in_base(), tmp_path/'a.gguf', 'bf16')
    unpack_gguf(tmp_path/'a.gguf', tmp_path/'a')
    one, two = (AutoModelForCausalLM.from_pretrained(f) for f in (stand_in_base(), tmp_path/'a'))
    assert all(torch.equal(w, two.state_dict()[k]) for k, w in one.state_dict().items())
    old, new = (c.to_dict() for c in (one.config, two.config))
    assert {k for k in old | new if old.get(k) != new.get(k)} <= {'_name_or_path'}
    tok, again = (AutoTokenizer.from_pretrained(f) for f in (stand_in_base(), tmp_path/'a'))
    prompts = [format_prompt(row) for row in [*load_rows('rehearsal'), *difficult_rows()]]
    assert tok(prompts)['input_ids'] == again(prompts)['input_ids']
    assert (again.bos_token_id, again.eos_token_id, again.pad_token_id) == (2, 1, 0)


def test_a_file_is_known_by_its_first_bytes(small, tmp_path, cache):
    blob = shutil.copy(small, tmp_path/'sha256-0123')   # as Ollama's store names it
    assert Path(base.base_path(str(blob))).is_dir()
    (tmp_path/'not.gguf').write_bytes(b'PK\3\4')
    with pytest.raises(ValueError, match='is not a GGUF file'): base.base_path(str(tmp_path/'not.gguf'))
    with pytest.raises(FileNotFoundError, match='is not a file'): base.base_path(str(tmp_path/'none.gguf'))


@pytest.mark.parametrize('change, said', [
    (dict(keys={'general.architecture': 'llama'}), "its architecture is 'llama'; only gemma3 can be unpacked"),
    (dict(keys={'tokenizer.ggml.model': 'gpt2'}), r"its vocabulary is \('gpt2'"),
    (dict(keys={'tokenizer.ggml.add_space_prefix': True}), r"is \('llama', True, .* Gemma's is \('llama', False"),
    (dict(keys={'gemma3.rope.scaling.factor': 8.}), 'scaled positions'),
    (dict(without=('gemma3.block_count',)), 'it has no key gemma3.block_count'),
    (dict(without=('blk.1.attn_q.weight',)), 'self_attn.q_proj.weight is missing'),
    (dict(tensors=lambda name, data, kind: (data[:, :64] if name == 'blk.0.ffn_up.weight' else data, kind)), 'of the shape'),
], ids=['architecture', 'vocabulary', 'space', 'scaled', 'key', 'tensor', 'shape'])
def test_what_is_no_gemma_is_refused_in_one_line(small, tmp_path, cache, change, said):
    path = write(tmp_path/'m.gguf', small, **change)
    with pytest.raises(ValueError, match=said) as e: base.base_path(str(path))
    assert str(path) in str(e.value) and '\n' not in str(e.value)
    assert not [p for p in cache.iterdir() if p.is_dir()]      # nothing half-made


@pytest.mark.parametrize('share', [.001, .02, .3, .9, .9999])
def test_a_file_cut_short_is_refused_in_one_line(small, tmp_path, cache, share):
    path = tmp_path/'cut.gguf'
    path.write_bytes(small.read_bytes()[:int(small.stat().st_size * share)])
    with pytest.raises(ValueError, match='cut short or damaged') as e: base.base_path(str(path))
    assert '\n' not in str(e.value) and not [p for p in cache.iterdir() if p.is_dir()]


def test_a_type_that_cannot_be_expanded_is_named(small, tmp_path, cache, monkeypatch):
    def refuse(data, kind): raise NotImplementedError
    monkeypatch.setattr(gguf.quants, 'dequantize', refuse)
    with pytest.raises(ValueError, match='cannot be unpacked: .*Q4_K_M, Q8_0, F16 or BF16'): base.base_path(str(small))


def unpack_in(folder, path, out):
    os.environ['KOFINETUNE_CACHE'] = str(folder)
    out.put(base.base_path(str(path)))


def test_two_processes_unpack_once(small, cache, capfd):
    context, out = multiprocessing.get_context('spawn'), multiprocessing.get_context('spawn').Queue()
    both = [context.Process(target=unpack_in, args=(cache, small, out)) for _ in range(2)]
    for p in both: p.start()
    folders = {out.get(timeout=120) for _ in both}
    for p in both: p.join(60)
    assert len(folders) == 1 and capfd.readouterr().out.count('base: unpacking') == 1
    assert {p.name for p in Path(folders.pop()).iterdir()} == {
        'model.safetensors', 'config.json', 'generation_config.json', 'tokenizer.json', 'tokenizer_config.json', 'gguf.json', 'NOTICE'}


@pytest.mark.parametrize('wait', [.05, .4, 1.0])
def test_killed_while_unpacking_leaves_nothing_that_is_taken_for_whole(small, cache, wait):
    code = ('import time, safetensors.torch as s; save = s.save_file\n'
            'def slow(*a, **k): save(*a, **k); print("saved", flush=True); time.sleep(30)\n'
            's.save_file = slow\nfrom kofinetune.base import base_path; base_path(%r)' % str(small))
    process = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True, env=os.environ | {'KOFINETUNE_CACHE': str(cache)})
    while 'saved' not in process.stdout.readline(): pass
    time.sleep(wait)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not [p for p in cache.iterdir() if p.is_dir() and not p.name.startswith('.')]
    whole = Path(base.base_path(str(small)))
    assert (whole/'NOTICE').is_file() and not [p for p in cache.iterdir() if p.name.startswith('.gguf')]


def test_another_file_is_another_folder(small, tmp_path, cache):
    other = write(tmp_path/'other.gguf', small, keys={'general.name': 'other'})
    assert base.base_path(str(small)) != base.base_path(str(other))
    assert base.base_path(str(small)) == base.base_path(str(shutil.copy(small, tmp_path/'copy.gguf')))   # the bytes name it, not the path


def packaged(tmp_path, monkeypatch, small, spoil=lambda data: data):
    "A base that is packaged as Gemma is: two wheels' parts, terms, and a SHA-256."
    import hashlib
    data, terms = small.read_bytes(), tmp_path/'GEMMA_TERMS.html'
    terms.write_text('terms')
    parts = [tmp_path/'m.gguf.part00', tmp_path/'m.gguf.part01']
    for part, piece in zip(parts, (data[:1000], spoil(data[1000:]))): part.write_bytes(piece)
    monkeypatch.setitem(base._PACKAGED, 'toy-q8', dict(of='google/gemma-3-270m', file='m.gguf', sha256=hashlib.sha256(data).hexdigest(),
                                                       package='toy', parts=2))
    class Found:
        def __init__(self, path): self.path, self.name = path, path.name
        def locate(self): return self.path
    made = {'toy-part1': [Found(parts[0])], 'toy-part2': [Found(parts[1])], 'toy': [Found(terms)]}
    monkeypatch.setattr(base.metadata, 'files', made.get)


def test_a_packaged_base_is_put_together_checked_and_has_its_terms_beside_it(small, tmp_path, cache, monkeypatch, capsys):
    packaged(tmp_path, monkeypatch, small)
    folder = Path(base.base_path('toy-q8'))
    assert 'Gemma Terms of Use' in capsys.readouterr().out
    assert (folder/'GEMMA_TERMS.html').read_text() == 'terms' and 'Gemma Terms of Use' in (folder/'NOTICE').read_text(encoding='utf-8')
    assert not list(folder.glob('*.gguf*'))           # not kept twice
    assert json.loads((folder/'gguf.json').read_text())['sha256'] == base._PACKAGED['toy-q8']['sha256']


def test_a_spoilt_part_is_refused_before_it_is_read(small, tmp_path, cache, monkeypatch):
    packaged(tmp_path, monkeypatch, small, lambda data: data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ValueError, match='get them again with: pip install --force-reinstall'): base.base_path('toy-q8')
    assert not [p for p in cache.iterdir() if p.is_dir()]


def test_without_the_extra_the_other_ways_are_named(cache, monkeypatch, tmp_path):
    monkeypatch.setitem(base._PACKAGED['gemma-3-270m-q4'], 'package', 'no-such-package')
    for ask in (lambda: base.base_path('gemma-3-270m-q4'), lambda: base.check_base(Recipe.named('laptop'), tmp_path/'run')):
        with pytest.raises(FileNotFoundError) as e: ask()
        for way in ('pip install "kofinetune[gemma]"', 'base=FILE.gguf', 'google/gemma-3-270m', '--recipe rehearsal'): assert way in str(e.value)


@pytest.mark.parametrize('adapter, said', [('lora', r'needs about \d+ MB and its disk has 3 MB free; make room'), ('none', 'needs about')])
def test_too_little_room_is_said_before_anything_is_made(tmp_path, monkeypatch, adapter, said):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: usage._replace(free=3_000_000))
    with pytest.raises(RuntimeError, match=said): base.check_base(Recipe(adapter=adapter, quant='none'), tmp_path/'run')
    assert not (tmp_path/'run').exists()
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: usage._replace(free=40_000_000))      # 1.5 MB of weights
    if adapter == 'lora': base.check_base(Recipe(adapter=adapter, quant='none'), tmp_path/'run')
    else:
        with pytest.raises(RuntimeError, match=said): base.check_base(Recipe(adapter=adapter, quant='none'), tmp_path/'run')


def test_a_run_without_room_stops_at_once(tmp_path):
    "By the command: one line, exit code 1 or 2, no folder."
    code = ('import shutil; free = shutil.disk_usage; shutil.disk_usage = lambda p: free(p)._replace(free=1000)\n'
            'import sys; sys.argv[1:] = ["run", "--recipe", "rehearsal"]; from kofinetune.cli import main; main()')
    seen = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=tmp_path)
    assert seen.returncode == 1 and seen.stderr.count('\n') == 1 and 'needs about' in seen.stderr
    assert not list(tmp_path.iterdir())


def test_terms_follow_the_weights_not_the_name(small, tmp_path, cache):
    "A folder or a file with Gemma's vocabulary is Gemma's, whatever it is called; one without is not."
    assert 'Gemma Terms of Use' in licences('mine.jsonl', 'google/gemma-3-270m')[1]
    folder = tmp_path/'some-model'
    folder.mkdir()
    (folder/'config.json').write_text(json.dumps(dict(model_type='gemma3_text', vocab_size=262_144)))
    said = licences('mine.jsonl', str(folder))[1]
    assert 'Gemma Terms of Use' in said and str(tmp_path) not in said
    other = tmp_path/'not-gemma'
    other.mkdir()
    (other/'config.json').write_text(json.dumps(dict(model_type='qwen3', vocab_size=151_936)))
    said = licences('mine.jsonl', str(other))[1]
    assert 'Gemma' not in said and 'not-gemma' in said and str(tmp_path) not in said


def test_the_lock_names_every_part_with_its_hash():
    lock = (ROOT/'.ci'/'requirements.lock').read_text(encoding='utf-8')
    about = base._PACKAGED['gemma-3-270m-q4']
    for name in (about['package'], *(f'{about["package"]}-part{n}' for n in range(1, 5))):
        found = lock.split(f'\n{name}==1.0.0', 1)
        assert len(found) == 2 and '--hash=sha256:' in found[1].split('\n')[1]


def test_a_finished_run_asks_for_no_room(rehearsal_run, tmp_path, monkeypatch):
    "The same command again, on a full disk: nothing is made, so nothing is refused; with --force it is."
    from kofinetune import cli
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: usage._replace(free=1000))
    monkeypatch.setattr(sys, 'argv', ['kofinetune', 'run', '--recipe', 'rehearsal', '--run', str(rehearsal_run)])
    try: cli.main()
    except SystemExit as e: assert not e.code
    monkeypatch.setattr(sys, 'argv', [*sys.argv, '--force'])
    with pytest.raises(SystemExit) as e: cli.main()
    assert e.value.code == 1


def test_a_tokenizer_is_loaded_once_and_again_when_its_folder_changes(tmp_path):
    copy_tokenizer(Recipe.named('rehearsal'), tmp_path)
    recipe, about = Recipe(base=str(tmp_path)), tmp_path/'tokenizer_config.json'
    first = load_tokenizer(recipe)
    assert load_tokenizer(recipe) is first and first.eos_token == '<eos>'
    settings = json.loads(about.read_text(encoding='utf-8'))
    about.write_text(json.dumps(settings | dict(eos_token='<end_of_turn>')), encoding='utf-8')
    assert load_tokenizer(recipe).eos_token == '<end_of_turn>'
