"Each option of the recipe reaches its library, does what it says, and leaves a model that merges."
import json
import math

import pytest
import torch
from safetensors.torch import load_file

from kofinetune.recipe import Recipe
from kofinetune.runs import read_jsonl
from kofinetune.data import prepare
from kofinetune.merge import merge_adapter
from kofinetune.base import load_base, load_tokenizer
from kofinetune.train import add_lora, encode_rows, finetune, load_tuned, make_trainer

TINY = Recipe.named('rehearsal').replace(rows=60, valid_rows=8, epochs=1.0, max_length=96, quant='none', lora_r=4, save_steps=100.)
TOKENS = load_tokenizer(TINY).convert_tokens_to_ids(['<end_of_turn>', '<eos>'])


@pytest.fixture(scope='module')
def plain(tmp_path_factory):
    run = tmp_path_factory.mktemp('plain')
    prepare(TINY, run)
    return run, finetune(TINY, run), load_file(run/'adapter'/'adapter_model.safetensors')


def rslora(run, weights, plain):
    scaling = load_tuned(TINY, run)[0].base_model.model.model.layers[0].mlp.up_proj.scaling['default']
    assert scaling == pytest.approx(TINY.lora_options()['lora_alpha'] / math.sqrt(TINY.lora_r))


def dora(run, weights, plain):
    lengths = {n: w for n, w in weights.items() if 'magnitude' in n}
    fresh = add_lora(load_base(TINY)[0], TINY.replace(lora=dict(use_dora=True))).state_dict()
    before = {n: w for n, w in fresh.items() if 'magnitude' in n}
    assert len(lengths) == len(before) == len([n for n in weights if 'lora_A' in n])
    assert all((w != before[n.replace('lora_magnitude_vector', 'lora_magnitude_vector.default.weight')]).any() for n, w in lengths.items())


def neftune(run, weights, plain):
    assert any((weights[n] != plain[2][n]).any() for n in weights)
    recipe = TINY.replace(trainer=dict(neftune_noise_alpha=5.0))
    model, tok = add_lora(load_base(recipe)[0], recipe), load_tokenizer(recipe)
    rows, _ = encode_rows(read_jsonl(run/'data'/'train.jsonl')[:4], tok, recipe)
    trainer = make_trainer(model, tok, rows, rows, recipe, run/'again')
    clean, heard = [], []                                              # what the embeddings say, and what the first layer hears
    model.get_input_embeddings().register_forward_hook(lambda m, i, out: clean.append(out.detach().clone()))
    model.base_model.model.model.layers[0].register_forward_pre_hook(lambda m, i: heard.append((m.training, i[0].detach())))
    trainer.train()
    for before, (training, after) in zip(clean, heard, strict=True):
        noise, most = (after - before).abs().max(), 5.0 / math.sqrt(before.shape[1] * before.shape[2])
        assert most / 2 < noise <= most * 1.01 if training else noise == 0
    assert {training for training, _ in heard} == {True, False}


def all_linear(run, weights, plain):
    config = json.loads((run/'adapter'/'adapter_config.json').read_text())
    assert set(config['target_modules']) == {'q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj'}
    assert set(weights) == set(plain[2])


def tokens(run, weights, plain):
    base = load_base(TINY)[0].get_input_embeddings().weight
    merged = load_file(run/'merged'/'model.safetensors')
    name, = (n for n in merged if 'embed_tokens' in n)
    assert not any('lm_head' in n for n in merged)                     # tied, so stored once
    changed = (merged[name].float() != base.to(merged[name].dtype).float()).any(1).nonzero().flatten().tolist()
    assert set(changed) <= set(TOKENS) and TOKENS[1] in changed        # <eos> is graded in every row
    live = load_tuned(TINY, run)[0]
    assert torch.equal(live.get_output_embeddings().weight, live.get_input_embeddings().weight)


def checkpointing(run, weights, plain):
    assert all(torch.allclose(weights[n], plain[2][n], atol=1e-6) for n in weights)        # memory differs, numbers do not
    rows = [dict(instruction='가', input='', output='나')]
    for recipe, used in ((TINY.replace(trainer=dict(activation_checkpointing=True)), True), (TINY, False)):   # TRL's own default is on
        model, tok = load_base(recipe)
        trainer = make_trainer(model, tok, encode_rows(rows, tok, recipe)[0], [], recipe, run/f'again-{used}')
        trainer.train()
        assert trainer.model.is_activation_checkpointing == used


def tensorboard(run, weights, plain):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(run/'tensorboard')).Reload()
    losses = [e['loss'] for e in read_jsonl(run/'adapter'/'log.jsonl') if 'loss' in e]
    assert [e.value for e in events.Scalars('train/loss')] == pytest.approx(losses, rel=1e-6)


def changed(run, weights, plain): assert any((weights[n] != plain[2][n]).any() for n in weights)


def accumulated(run, weights, plain):
    steps = json.loads((run/'adapter'/'metrics.json').read_text(encoding='utf-8'))['steps']
    assert steps == -(-plain[1]['steps'] // 4)


def scheduled(run, weights, plain):
    rates = [e['learning_rate'] for e in read_jsonl(run/'adapter'/'log.jsonl') if 'loss' in e]
    assert set(rates[1:]) == {TINY.learning_rate}


OPTIONS = {
    'use_rslora': (dict(lora=dict(use_rslora=True)), rslora), 'use_dora': (dict(lora=dict(use_dora=True)), dora),
    'neftune_noise_alpha': (dict(trainer=dict(neftune_noise_alpha=5.0)), neftune),
    'all-linear': (dict(lora=dict(target_modules='all-linear')), all_linear),
    'trainable_token_indices': (dict(lora=dict(trainable_token_indices=TOKENS)), tokens),
    'activation_checkpointing': (dict(trainer=dict(activation_checkpointing=True)), checkpointing),
    'report_to': (dict(report_to='tensorboard'), tensorboard), 'optim': (dict(trainer=dict(optim='adafactor')), changed),
    'grad_accum': (dict(grad_accum=4), accumulated), 'lr_scheduler': (dict(trainer=dict(lr_scheduler_type='constant_with_warmup')), scheduled),
}


@pytest.mark.parametrize('name', OPTIONS)
def test_the_option_does_what_it_says_and_the_adapter_merges(name, plain, tmp_path):
    option, check = OPTIONS[name]
    recipe = TINY.replace(**option)
    prepare(recipe, tmp_path)
    finetune(recipe, tmp_path)
    assert merge_adapter(recipe, tmp_path)['kl'] < 1e-4
    check(tmp_path, load_file(tmp_path/'adapter'/'adapter_model.safetensors'), plain)
