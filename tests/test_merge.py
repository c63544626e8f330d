"Merging: bases of every kind, both ways by number, refusals, memory, and the merged folder in a process of its own."
import json, shutil, subprocess, sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig

from kofinetune.prompt import format_prompt
from kofinetune.recipe import Recipe
from kofinetune.runs import read_jsonl, read_manifest, stage
from kofinetune.data import prepare
from kofinetune.merge import copy_tokenizer, merge_adapter, merge_into
from kofinetune.base import base_path
from kofinetune.base import load_base
from kofinetune.train import add_lora

COMMAND = [sys.executable, '-c', 'from kofinetune.cli import main; main()']


def untrained(run, **changes):
    "A run whose adapter is random: as good as a trained one for everything but the answers."
    recipe = Recipe.named('rehearsal').replace(**dict(name='quick', style='alpaca', rows=80, valid_rows=20) | changes)
    def make(folder):
        model = load_base(recipe)[0]
        if recipe.adapter == 'lora':
            model = add_lora(model, recipe)
            generator = torch.Generator().manual_seed(1)
            for name, p in model.named_parameters():
                if 'lora_B' in name: p.data.normal_(0, .02, generator=generator)
        model.save_pretrained(folder)
        return {}
    prepare(recipe, run)
    stage(recipe, run, 'adapter', make)
    return recipe


def make_base(folder, shard='5GB', **changes):
    "The stand-in with another configuration, in a folder; what the stand-in has, it keeps."
    model = AutoModelForCausalLM.from_pretrained(base_path('rehearsal'), dtype=torch.float32)
    config = Gemma3TextConfig(**model.config.to_dict() | changes)
    torch.manual_seed(0)
    other = Gemma3ForCausalLM(config)
    other.load_state_dict({k: v for k, v in model.state_dict().items() if k != 'lm_head.weight'}, strict=False)
    other.to(torch.bfloat16).save_pretrained(folder, max_shard_size=shard)
    copy_tokenizer(Recipe.named('rehearsal'), folder)
    return folder


def weights_of(folder):
    return {k: v for path in sorted(Path(folder).glob('*.safetensors')) for k, v in load_file(path).items()}


def test_both_ways_are_reported_and_the_better_one_is_kept(rehearsal_run):
    result = read_manifest(rehearsal_run)['stages']['merged']['result']
    assert set(result['ways']) == {'16-bit', 'nf4'} and result['merge'] in result['ways'] and result['why']
    assert result['held_out'] and result['rows'] == 250
    for way in result['ways'].values():
        assert way['max_difference'] >= way['mean_difference'] > 0 and way['kl'] >= -1e-6 and len(way['nll']) == 2
    near, far = result['ways']['nf4'], result['ways']['16-bit']
    assert near['kl'] < far['kl'] and near['kl'] < 1e-3
    kept = result['ways'][result['merge']]
    assert {k: result[k] for k in kept} == kept
    if result['why'].startswith('lower'): assert kept['nll'][1] == min(w['nll'][1] for w in result['ways'].values())
    else: assert kept['kl'] == min(w['kl'] for w in result['ways'].values())


def test_merged_weights_are_base_plus_pair_rounded_once(tmp_path):
    recipe = untrained(tmp_path, merge='16-bit')
    result = merge_adapter(recipe, tmp_path)
    assert result['merge'] == '16-bit' and set(result['ways']) == {'16-bit', 'nf4'} and 'recipe says' in result['why']
    base, merged, pair = (weights_of(f) for f in (base_path('rehearsal'), tmp_path/'merged', tmp_path/'adapter'))
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    assert set(base) == set(merged) and len(changed) == 28
    for name in changed:
        A, B = (pair[f'base_model.model.{name.removesuffix(".weight")}.lora_{half}.weight'].double() for half in 'AB')
        exact = base[name].double() + B @ A * recipe.lora_options()['lora_alpha'] / recipe.lora_r
        assert (merged[name].double() - exact).abs().max() <= exact.abs().max() * 2 ** -8


ROPE = dict(full_attention=dict(rope_type='default', rope_theta=5e5), sliding_attention=dict(rope_type='default', rope_theta=2e4))
BASES = {'tied, one file': {}, 'untied': dict(tie_word_embeddings=False), 'sharded': dict(shard='500KB'),
         'untied and sharded': dict(tie_word_embeddings=False, shard='500KB'), 'other rope': dict(rope_parameters=ROPE)}


@pytest.mark.parametrize('kind', BASES)
def test_a_base_in_a_folder(kind, tmp_path):
    base = make_base(tmp_path/'base', **BASES[kind])
    files = list(base.glob('*.safetensors'))
    assert (len(files) > 1) == ('sharded' in kind)
    recipe = untrained(tmp_path/'run', base=str(base), merge='nf4')
    result = merge_adapter(recipe, tmp_path/'run')
    merged = tmp_path/'run'/'merged'
    assert result['ways']['nf4']['kl'] < 1e-3 < result['ways']['16-bit']['kl']
    assert result['merge'] == 'nf4' and ('lm_head.weight' in weights_of(merged)) == ('untied' in kind)
    if 'untied' in kind: assert torch.equal(weights_of(merged)['lm_head.weight'], weights_of(base)['lm_head.weight'])
    read, was = AutoConfig.from_pretrained(merged), AutoConfig.from_pretrained(base)
    assert read.rope_parameters == was.rope_parameters and read.dtype == was.dtype == torch.bfloat16
    assert not [p for p in merged.rglob('*') if p.is_file() and str(tmp_path).encode() in p.read_bytes()]
    assert not list((tmp_path/'run').glob('.merged*'))


@pytest.mark.parametrize('kind', [dict(), dict(use_rslora=True), dict(use_dora=True)], ids=['lora', 'rslora', 'dora'])
def test_every_kind_of_adapter_that_peft_merges(kind, tmp_path):
    from peft import LoraConfig, get_peft_model
    recipe = Recipe.named('rehearsal')
    model, tok = load_base(recipe, quant='none', dtype=torch.float32)
    live = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=recipe.lora_options()['target_modules'], **kind))
    for name, p in live.named_parameters():
        if 'lora_B' in name or 'magnitude' in name: p.data += torch.randn(p.shape, generator=torch.Generator().manual_seed(2)) * .02
    live.save_pretrained(tmp_path)
    merged = merge_into(load_base(recipe, quant='none', dtype=torch.float32)[0], tmp_path)
    ids = tok(format_prompt(dict(instruction='수 12를 한글로 쓰세요.', input='')), return_tensors='pt')
    with torch.no_grad(): a, b, c = (m(**ids).logits for m in (live.eval(), merged, load_base(recipe, quant='none', dtype=torch.float32)[0]))
    assert (a - b).abs().max() < 1e-3 < (a - c).abs().max() / 10


def test_what_is_tried_depends_on_what_was_trained(tmp_path):
    exact = merge_adapter(untrained(tmp_path/'exact', quant='none'), tmp_path/'exact')
    assert set(exact['ways']) == {'16-bit'} and exact['kl'] < 1e-3
    whole = merge_adapter(untrained(tmp_path/'whole', quant='none', adapter='none'), tmp_path/'whole')
    assert set(whole['ways']) == {'copy'} and whole['kl'] < 1e-6
    assert all(torch.equal(w, weights_of(base_path('rehearsal'))[k]) for k, w in weights_of(tmp_path/'whole'/'merged').items())
    seen = merge_adapter(untrained(tmp_path/'seen', valid_rows=0), tmp_path/'seen')
    assert seen['merge'] == 'nf4' and not seen['held_out'] and 'no rows are held out' in seen['why'] and seen['rows'] == 80


def swap(adapter):
    weights = load_file(adapter/'adapter_model.safetensors')
    save_file({k: v + .01 for k, v in weights.items()}, adapter/'adapter_model.safetensors')


REFUSED = {'another base': ([], ['--set', 'base=google/gemma-3-1b-pt'], "was made with base = 'rehearsal', and now it is 'google/gemma-3-1b-pt'"),
           'another rank': ([], ['--set', 'lora_r=8'], 'was made with lora_r = 16, and now it is 8'),
           'other weights': ([swap], [], 'adapter_model.safetensors is not the file that was written'),
           'weights missing': ([lambda a: (a/'adapter_model.safetensors').unlink()], [], 'adapter_model.safetensors is missing'),
           'config missing': ([lambda a: (a/'adapter_config.json').unlink()], [], 'adapter_config.json is missing'),
           'no adapter': ([shutil.rmtree], [], 'adapter is missing')}


def test_refusals_are_one_line_and_leave_nothing(tmp_path):
    untrained(tmp_path/'good')
    for name, (damage, args, message) in REFUSED.items():
        run = tmp_path/name.replace(' ', '-')
        shutil.copytree(tmp_path/'good', run)
        for do in damage: do(run/'adapter')
        seen = subprocess.run([*COMMAND, 'merge', '--run', run.name, *args], cwd=tmp_path, capture_output=True, text=True)
        lines = [l for l in seen.stderr.splitlines() if l.startswith('kofinetune: ')]
        assert seen.returncode == 2 and len(lines) == 1 and message in lines[0], (name, seen.stderr)
        assert f'kofinetune train --run {run.name}' in lines[0] and 'Traceback' not in seen.stderr
        assert not (run/'merged').exists() and not list(run.glob('.merged*'))


@pytest.mark.parametrize('other', [dict(num_hidden_layers=6, layer_types=['sliding_attention'] * 6), dict(num_hidden_layers=2, layer_types=['sliding_attention'] * 2),
                                   dict(head_dim=64)], ids=['more layers', 'fewer layers', 'wider heads'])
def test_the_adapter_of_another_base_is_refused(other, tmp_path, rehearsal_run):
    config = AutoConfig.from_pretrained(base_path('rehearsal')).to_dict()
    base = Gemma3ForCausalLM(Gemma3TextConfig(**config | other))
    with pytest.raises(ValueError, match='does not fit the base, or is damaged: .*adapter_config.json names') as seen:
        merge_into(base, rehearsal_run/'adapter')
    assert '\n' not in str(seen.value)


MEASURE = '''
import json, sys
from pathlib import Path
import torch, peft, bitsandbytes, accelerate
from transformers import AutoModelForCausalLM, Gemma3ForCausalLM
from kofinetune.recipe import Recipe
from kofinetune.merge import merge_adapter
def status(key): return next(int(l.split()[1]) * 1024 for l in open('/proc/self/status') if l.startswith(key))
run = Path(sys.argv[1])
before = status('VmRSS')
result = merge_adapter(Recipe.load(run/'recipe.json'), run)
print(json.dumps(dict(growth=status('VmHWM') - before, result=result)))
'''


@pytest.mark.skipif(not Path('/proc/self/status').is_file(), reason='peak memory is read from /proc/self/status, which only Linux has')
@pytest.mark.parametrize('adapter', ['lora', 'none'])
def test_peak_memory_is_at_most_2_2_times_the_model(adapter, tmp_path):
    "The exact shape of Gemma 3 270M, random, in bfloat16; the model's size is that of its float32 weights, in which it is merged."
    torch.manual_seed(0)
    model = Gemma3ForCausalLM(Gemma3TextConfig(
        vocab_size=262144, hidden_size=640, intermediate_size=2048, num_hidden_layers=18, num_attention_heads=4, num_key_value_heads=1,
        head_dim=256, sliding_window=512, query_pre_attn_scalar=256, max_position_embeddings=32768))
    parameters = model.num_parameters()
    model.to(torch.bfloat16).save_pretrained(tmp_path/'base')
    copy_tokenizer(Recipe.named('rehearsal'), tmp_path/'base')
    del model
    quant = dict() if adapter == 'lora' else dict(quant='none')
    untrained(tmp_path/'run', base=str(tmp_path/'base'), valid_rows=6, max_length=512, adapter=adapter, **quant)
    seen = subprocess.run([sys.executable, '-c', MEASURE, str(tmp_path/'run')], capture_output=True, text=True)
    assert seen.returncode == 0, seen.stderr
    measured = json.loads(seen.stdout.splitlines()[-1])
    ratio = measured['growth'] / (4 * parameters)
    print(f'{parameters:,} parameters; peak growth {measured["growth"] / 1e9:.2f} GB, {ratio:.2f} times the model')
    assert parameters == 268_098_176 and ratio <= 2.2
    if adapter == 'lora': assert measured['result']['ways']['nf4']['kl'] < measured['result']['ways']['16-bit']['kl']


def test_transformers_alone_reads_the_merged_folder(rehearsal_run, tmp_path):
    "In a process without kofinetune, peft and bitsandbytes, with the one-liner of the notebook."
    row = read_jsonl(rehearsal_run/'eval'/'answers.jsonl')[0]
    code = ('import sys; from transformers import pipeline; '
            "print(pipeline('text-generation', model=sys.argv[1])(sys.argv[2], return_full_text=False, do_sample=False, max_new_tokens=48)[0]['generated_text']); "
            "assert not {'kofinetune', 'bitsandbytes'} & set(sys.modules)")
    seen = subprocess.run([sys.executable, '-c', code, str(rehearsal_run/'merged'), format_prompt(row)], cwd=tmp_path, capture_output=True, text=True)
    assert seen.returncode == 0, seen.stderr
    assert seen.stdout.rstrip('\n') == row['merged']
