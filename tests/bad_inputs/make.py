"""The files of the cases that text alone cannot make. Each function fills `here`; `base` is the stand-in base, `run` a finished rehearsal."""
import gzip
import json
import shutil
import struct

from conftest import vouch

ROW = '{"instruction": "수도는?", "input": "", "output": "서울"}\n'


def folder_named_like_a_file(here, base, run): (here/'a.jsonl').mkdir()
def utf16(here, base, run): (here/'a.jsonl').write_bytes(ROW.encode('utf-16'))
def cp949(here, base, run): (here/'a.jsonl').write_bytes(ROW.encode('cp949'))
def cp949_csv(here, base, run): (here/'a.csv').write_bytes('물음,대답\n수도는?,서울\n'.encode('cp949'))
def gzip_cut_short(here, base, run): (here/'a.jsonl.gz').write_bytes(gzip.compress(ROW.encode() * 99)[:40])
def half_a_character(here, base, run): (here/'a.jsonl').write_bytes(ROW.encode()[:-4] + b'\xec"}\n')
def deep(here, base, run): (here/'a.json').write_text('[' * 200_000)
def huge_number(here, base, run): (here/'a.jsonl').write_text('{"instruction": "q", "output": ' + '9' * 5000 + '}\n')
def zeros(here, base, run): (here/'a.jsonl').write_bytes(bytes(1000))
def only_bom(here, base, run): (here/'a.jsonl').write_bytes(b'\xef\xbb\xbf')
def link_to_nowhere(here, base, run): (here/'a.jsonl').symlink_to(here/'nowhere.jsonl')
def cp949_recipe(here, base, run): (here/'a.toml').write_bytes('name = "한글"\n'.encode('cp949'))
def deep_recipe(here, base, run): (here/'a.json').write_text('{"a":' * 100_000)


# bases: the stand-in, spoiled

def _base(here, base): return shutil.copytree(base, here/'base')


def _config(here, base, drop=(), **changes):
    path = _base(here, base)/'config.json'
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if k not in drop}))


def base_without_config(here, base, run): (_base(here, base)/'config.json').unlink()
def base_config_broken(here, base, run): (_base(here, base)/'config.json').write_text('{"model_type": ')
def base_of_t5(here, base, run): _config(here, base, model_type='t5', architectures=['T5ForConditionalGeneration'])
def base_of_nothing(here, base, run): _config(here, base, model_type='gemma99')
def base_of_another_width(here, base, run): _config(here, base, hidden_size=64)
def base_without_weights(here, base, run): (_base(here, base)/'model.safetensors').unlink()
def base_without_tokenizer(here, base, run):
    for path in _base(here, base).glob('tokenizer*'): path.unlink()


def base_cut_short(here, base, run):
    path = _base(here, base)/'model.safetensors'
    path.write_bytes(path.read_bytes()[:5000])


def base_pickled(here, base, run):
    (_base(here, base)/'model.safetensors').rename(here/'base'/'pytorch_model.bin')


def base_with_code(here, base, run):
    _config(here, base, model_type='mine', auto_map={'AutoConfig': 'code.C', 'AutoModelForCausalLM': 'code.M'})
    (here/'base'/'code.py').write_text(f'open({str(here/"executed")!r}, "w").close()\nclass C: pass\nclass M: pass\n')


def base_of_gpt2(here, base, run):
    from transformers import GPT2Config, GPT2LMHeadModel
    shutil.copytree(base, here/'base', ignore=shutil.ignore_patterns('*.safetensors', 'config.json', 'generation_config.json'))
    GPT2LMHeadModel(GPT2Config(vocab_size=1536, n_embd=16, n_layer=1, n_head=2, n_positions=256, bos_token_id=2, eos_token_id=1)).save_pretrained(here/'base')


# adapters of the finished run, spoiled; each stands in a whole run folder

def _run(here, run): return shutil.copytree(run, here/'run', ignore=shutil.ignore_patterns('.lock'))


def _adapter(here, run, change=None, **config):
    "Copy an adapter with other weights or another configuration."
    from safetensors.torch import load_file, save_file
    folder = shutil.copytree(run/'adapter', here/'adapter')
    path = folder/'adapter_config.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    if change: save_file(change(load_file(folder/'adapter_model.safetensors')), folder/'adapter_model.safetensors', metadata=dict(format='pt'))
    return folder


def adapter_of_another_rank(here, base, run): _adapter(here, run, r=8)
def adapter_of_another_width(here, base, run): _adapter(here, run, lambda w: {k: v[..., :8].contiguous() for k, v in w.items()})
def adapter_with_one_layer_more(here, base, run): _adapter(here, run, lambda w: w | {next(iter(w)).replace('layers.0', 'layers.9'): next(iter(w.values())).clone()})
def adapter_with_one_less(here, base, run): _adapter(here, run, lambda w: dict(list(w.items())[1:]))
def adapter_without_config(here, base, run): (_adapter(here, run)/'adapter_config.json').unlink()
def adapter_without_weights(here, base, run): (_adapter(here, run)/'adapter_model.safetensors').unlink()
def adapter_config_broken(here, base, run): (_adapter(here, run)/'adapter_config.json').write_text('{"r": ')
def adapter_of_another_kind(here, base, run): _adapter(here, run, peft_type='MAGIC')


def adapter_cut_short(here, base, run):
    path = _adapter(here, run)/'adapter_model.safetensors'
    path.write_bytes(path.read_bytes()[:1000])


def adapter_pickled(here, base, run):
    import torch
    from safetensors.torch import load_file
    folder = _adapter(here, run)
    torch.save(load_file(folder/'adapter_model.safetensors'), folder/'adapter_model.bin')
    (folder/'adapter_model.safetensors').unlink()


def run_with_pickled_adapter(here, base, run):
    adapter_pickled(here, base, run)
    shutil.rmtree(_run(here, run)/'adapter')
    (here/'adapter').rename(here/'run'/'adapter')
    vouch(here/'run', 'adapter')


def run_adapter_changed(here, base, run):
    path = _run(here, run)/'adapter'/'adapter_model.safetensors'
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


# run folders

def run_manifest_cut(here, base, run):
    path = _run(here, run)/'manifest.json'
    path.write_bytes(path.read_bytes()[:500])


def run_manifest_of_another_kind(here, base, run): (_run(here, run)/'manifest.json').write_text('[]')
def run_manifest_without_stages(here, base, run): (_run(here, run)/'manifest.json').write_text('{"versions": {}}')


def run_that_names_files_outside(here, base, run):
    path = _run(here, run)/'manifest.json'
    manifest = json.loads(path.read_text())
    manifest['stages']['merged']['files']['../../secret'] = '0' * 64
    path.write_text(json.dumps(manifest))
    (here/'secret').write_text('secret')


def run_with_a_linked_stage(here, base, run):
    (_run(here, run)/'merged').rename(here/'elsewhere')
    (here/'run'/'merged').symlink_to(here/'elsewhere')


def run_with_a_linked_file(here, base, run):
    (here/'secret').write_text('secret')
    path = _run(here, run)/'merged'/'tokenizer_config.json'
    path.unlink()
    path.symlink_to(here/'secret')


def run_is_a_file(here, base, run): (here/'run').write_text('')
def cache_is_a_file(here, base, run): (here/'cache').write_text('')


# merged folders and GGUF files

def _merged(here, run, drop=()): return shutil.copytree(run/'merged', here/'merged', ignore=shutil.ignore_patterns(*drop))


def _tokenizer(here, run, **model):
    path = _merged(here, run)/'tokenizer.json'
    data = json.loads(path.read_text(encoding='utf-8'))
    data['model'] |= model
    path.write_text(json.dumps(data), encoding='utf-8')


def tokenizer_without_bytes(here, base, run): _tokenizer(here, run, byte_fallback=False)
def tokenizer_of_words(here, base, run): _tokenizer(here, run, type='WordPiece')
def tokenizer_as_it_is(here, base, run): _merged(here, run)


def tokenizer_that_lowers(here, base, run):
    path = _merged(here, run)/'tokenizer.json'
    path.write_text(json.dumps(json.loads(path.read_text(encoding='utf-8')) | dict(normalizer={'type': 'Lowercase'})), encoding='utf-8')


def merged_config(here, base, run, **changes):
    path = _merged(here, run)/'config.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def merged_of_gemma2(here, base, run): merged_config(here, base, run, model_type='gemma2')
def merged_with_a_softcap(here, base, run): merged_config(here, base, run, final_logit_softcapping=30.0)
def merged_without_weights(here, base, run): _merged(here, run, ['*.safetensors'])


def merged_with_a_tensor_more(here, base, run):
    from safetensors.torch import load_file, save_file
    path = _merged(here, run)/'model.safetensors'
    weights = load_file(path)
    save_file(weights | {'model.layers.0.vision.weight': next(iter(weights.values())).clone()}, path, metadata=dict(format='pt'))


def gguf_cut_in_its_head(here, base, run): (here/'cut.gguf').write_bytes((run/'ollama'/'model-q8_0.gguf').read_bytes()[:1000])
def gguf_cut_in_a_tensor(here, base, run): (here/'cut.gguf').write_bytes((run/'ollama'/'model-q8_0.gguf').read_bytes()[:-1000])
def gguf_that_is_none(here, base, run): (here/'cut.gguf').write_bytes(b'PK\x03\x04' + bytes(1000))
def gguf_empty(here, base, run): (here/'cut.gguf').write_bytes(b'')
def gguf_of_the_future(here, base, run): (here/'cut.gguf').write_bytes(b'GGUF' + struct.pack('<I', 99) + bytes(1000))


def gguf_one_folder_up(here, base, run):
    (here/'served').mkdir()
    (here/'secret.gguf').write_bytes((run/'ollama'/'model-q8_0.gguf').read_bytes())
    (here/'served'/'Modelfile').write_text('FROM ../secret.gguf\n', encoding='utf-8')
