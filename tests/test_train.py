"What is graded, packed and trained, on real rows and in fp32."
import torch

import pytest
import trl.trainer.utils

from kofinetune.prompt import format_prompt
from kofinetune.recipe import Recipe
from kofinetune.runs import read_jsonl
from kofinetune.data import load_rows, prepare
from kofinetune.base import load_base, load_tokenizer
from kofinetune.train import _drawn, add_lora, encode, encode_rows, finetune, load_tuned, make_trainer


@pytest.fixture(scope='module')
def tok(): return load_tokenizer(Recipe.named('rehearsal'))


@pytest.mark.koalpaca
@pytest.mark.parametrize('style', ['alpaca', 'blog'])
def test_graded_tokens_are_the_answer_and_its_terminator_for_every_real_row(koalpaca, tok, style):
    for row in load_rows(str(koalpaca)):
        example = encode(row, tok, style, max_length=10_000)
        prompt = tok(format_prompt(row, style))['input_ids']
        graded = [t for t in example['labels'] if t != -100]
        assert example['input_ids'][:len(prompt)] == prompt and example['labels'][:len(prompt)] == [-100] * len(prompt)
        assert example['input_ids'][len(prompt):] == graded
        assert graded[-1] == tok.eos_token_id and graded.count(tok.eos_token_id) == 1
        assert tok.decode(graded[:-1]) == row['output'] + ('\n' if style == 'blog' else '')     # the post's newline
        assert example['input_ids'].count(tok.bos_token_id) == 1 and example['input_ids'][0] == tok.bos_token_id


@pytest.mark.koalpaca
def test_rows_that_do_not_fit_are_counted_and_never_cut(koalpaca, tok):
    rows, recipe = load_rows(str(koalpaca))[:2000], Recipe.named('rehearsal').replace(max_length=128)
    dataset, left_out = encode_rows(rows, tok, recipe)
    assert left_out > 0 and len(dataset) + left_out == 2000
    assert all(ids[-1] == tok.eos_token_id and len(ids) <= 128 for ids in dataset['input_ids'])


@pytest.mark.parametrize('attention', ['sdpa', 'eager'])
def test_packed_rows_do_not_see_each_other_across_the_sliding_window(tok, attention):
    model, _ = load_base(Recipe.named('rehearsal'), quant='none', dtype=torch.float32)
    model.set_attn_implementation(attention)
    rows = [encode(r, tok)['input_ids'] for r in load_rows('rehearsal')]
    long = [tok.bos_token_id] + [t for r in rows[:60] for t in r if t != tok.bos_token_id][:model.config.sliding_window + 100]
    parts = [rows[60], long, rows[61]]
    assert len(long) > model.config.sliding_window
    with torch.no_grad():
        alone = torch.cat([model(torch.tensor([p]), use_cache=False).logits[0] for p in parts])
        packed = model(torch.tensor([sum(parts, [])]), position_ids=torch.tensor([[i for p in parts for i in range(len(p))]]),
                       use_cache=False).logits[0]
    assert (packed - alone).abs().max() < 1e-5 * alone.abs().max()


def test_gradient_of_a_packed_batch_equals_the_unpacked_one(tok, tmp_path):
    def gradient(packing):
        recipe = Recipe.named('rehearsal').replace(packing=packing, batch_size=1 if packing else 8, quant='none', max_length=512)
        model = add_lora(load_base(recipe)[0], recipe)
        generator = torch.Generator().manual_seed(0)
        for name, p in model.named_parameters():
            if 'lora_B' in name: p.data.normal_(0, .02, generator=generator)   # at zero, A would have no gradient
        dataset, _ = encode_rows(load_rows('rehearsal')[:8], tok, recipe)
        trainer = make_trainer(model, tok, dataset, [], recipe, tmp_path)
        batches = list(trainer.get_train_dataloader())
        assert len(batches) == 1 and ('position_ids' in batches[0]) == packing
        trainer.compute_loss(trainer.model, batches[0]).backward()
        return torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.requires_grad])
    packed, unpacked = gradient(True), gradient(False)
    assert torch.nn.functional.cosine_similarity(packed, unpacked, dim=0) > .9999
    assert abs(packed.norm() / unpacked.norm() - 1) < 1e-3


def test_trainable_parameters_and_ties_are_what_the_arithmetic_says():
    recipe = Recipe.named('rehearsal')
    model, _ = load_base(recipe)
    config = model.config
    q, kv, h, f = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim, config.hidden_size, config.intermediate_size
    sides = [(h, q), (h, kv), (h, kv), (q, h), (h, f), (h, f), (f, h)]
    tuned = add_lora(model, recipe)
    assert tuned.num_parameters(only_trainable=True) == config.num_hidden_layers * recipe.lora_r * sum(a + b for a, b in sides)
    assert tuned.get_output_embeddings().weight is tuned.get_input_embeddings().weight


def test_the_same_seed_gives_the_same_adapter_bytes(tmp_path):
    recipe = Recipe.named('rehearsal').replace(rows=200, valid_rows=20, epochs=1.0)
    for name in 'ab':
        prepare(recipe, tmp_path/name)
        finetune(recipe, tmp_path/name)
    weights = [(tmp_path/name/'adapter'/'adapter_model.safetensors').read_bytes() for name in 'ab']
    assert weights[0] == weights[1]


@pytest.mark.parametrize('window', [512, 16])
@pytest.mark.parametrize('packing', [True, False])
def test_the_faster_step_has_the_loss_and_the_gradient_of_trls_own(tok, tmp_path, packing, window):
    recipe = Recipe.named('rehearsal').replace(packing=packing, batch_size=2 if packing else 8, quant='none')
    dataset, _ = encode_rows(load_rows('rehearsal')[:128], tok, recipe)   # in bf16 the loss of a few rows is off by more than 1e-3 either way
    def outcome(fast, dtype=torch.float32):
        model = add_lora(load_base(recipe, dtype=dtype)[0], recipe)
        generator = torch.Generator().manual_seed(0)
        for name, p in model.named_parameters():
            if 'lora_B' in name: p.data.copy_(torch.empty(p.shape).normal_(0, .02, generator=generator))
        trainer = make_trainer(model, tok, dataset, [], recipe, tmp_path, bf16=dtype == torch.bfloat16)
        base = model.get_base_model()
        base.config.sliding_window = window
        for layer in base.model.layers:
            if layer.self_attn.is_sliding: layer.self_attn.sliding_window = window
        assert base.config._attn_implementation == 'by_row' and base.forward.__code__.co_filename.endswith('kofinetune/speed.py')
        changed = [m for m in base.modules() if type(m).__name__ in ('Gemma3RMSNorm', 'Linear') and 'forward' in vars(m)]
        assert len(changed) == 13 * base.config.num_hidden_layers + 1   # adapted matrices; norms
        if not fast:
            for m in changed: del m.forward
            base.set_attn_implementation('sdpa')
            trl.trainer.utils.add_fused_lm_head(base, outputs=('log_probs', 'entropy', 'is_top1'))
        losses = [trainer.compute_loss(trainer.model, batch) for batch in trainer.get_train_dataloader()]
        loss = sum(losses) / len(losses)
        loss.backward()
        return loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]), dict(trainer._metrics['train'])
    (loss, gradient, metrics), (ours, our_gradient, our_metrics) = outcome(False), outcome(True)
    assert abs(ours - loss) < 1e-5 * loss
    assert (our_gradient - gradient).norm() < 1e-5 * gradient.norm()
    assert our_metrics == {k: pytest.approx(v, abs=1e-4) for k, v in metrics.items()}
    (theirs, their_gradient, _), (ours, our_gradient, _) = (outcome(fast, torch.bfloat16) for fast in (False, True))
    assert abs(ours - loss) < 1e-3 * loss
    far, near = ((g - gradient).norm() / gradient.norm() for g in (their_gradient, our_gradient))
    assert near < 1.5 * far < .05   # of the gradient in fp32: about as far as the plain way in bf16


def test_padding_changes_neither_loss_nor_gradient(tok, tmp_path):
    recipe = Recipe.named('rehearsal').replace(batch_size=3, quant='none')
    dataset, _ = encode_rows(load_rows('rehearsal')[:64], tok, recipe)
    def outcome(pad):
        model = add_lora(load_base(recipe)[0], recipe)
        generator = torch.Generator().manual_seed(0)
        for name, p in model.named_parameters():
            if 'lora_B' in name: p.data.copy_(torch.empty(p.shape).normal_(0, .02, generator=generator))
        trainer = make_trainer(model, tok, dataset, [], recipe, tmp_path, pad_to_multiple_of=pad)
        batches = list(trainer.get_train_dataloader())
        loss = sum(trainer.compute_loss(trainer.model, batch) for batch in batches) / len(batches)
        loss.backward()
        lengths = [batch['input_ids'].shape[1] for batch in batches]
        return lengths, loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
    (plain, loss, gradient), (padded, padded_loss, padded_gradient) = outcome(None), outcome(64)
    assert any(n % 64 for n in plain) and padded == [-(-n // 64) * 64 for n in plain]
    assert abs(padded_loss - loss) < 1e-5 * loss and (padded_gradient - gradient).norm() < 1e-5 * gradient.norm()


def test_in_bf16_batches_have_few_lengths_and_padding_is_no_token(tok, tmp_path):
    "oneDNN keeps a kernel for each length. What TRL counts in its log has the padding in it; the result has not."
    recipe = Recipe.named('rehearsal').replace(rows=300, valid_rows=20, epochs=2.0, dtype='bf16', batch_size=2, max_length=128)
    prepare(recipe, tmp_path/'run')
    metrics = finetune(recipe, tmp_path/'run')
    dataset, left_out = encode_rows(read_jsonl(tmp_path/'run'/'data'/'train.jsonl'), tok, recipe)
    assert left_out == 0 and metrics['num_tokens'] == 2 * sum(map(len, dataset['input_ids']))
    counted = max(e.get('num_tokens', 0) for e in read_jsonl(tmp_path/'run'/'adapter'/'log.jsonl'))
    assert metrics['num_tokens'] < counted <= 1.5 * metrics['num_tokens'] and counted % 64 == 0


def test_measuring_between_two_steps_changes_neither_loss_nor_gradient(tok):
    "bitsandbytes repacks 4-bit matrices for AVX-512 BF16 when no gradient is wanted, and then passes none on."
    recipe = Recipe.named('rehearsal').replace(quant='nf4', dequantize=False)
    model = add_lora(load_base(recipe)[0], recipe)
    ids = torch.tensor([encode(load_rows('rehearsal')[0], tok)['input_ids']])

    def loss_and_gradients():
        model.train().zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return [loss.item()] + [p.grad.clone() for p in model.parameters() if p.requires_grad]

    before = loss_and_gradients()
    with torch.no_grad(): measured = model.eval()(input_ids=ids, labels=ids).loss
    after = loss_and_gradients()
    assert abs(measured.item() - before[0]) < 1e-5 and before[0] == after[0]
    assert len(before) == 57 and all(torch.equal(a, b) for a, b in zip(before[1:], after[1:], strict=True))


@pytest.mark.parametrize('dequantize', [True, False])
def test_what_is_loaded_to_answer_is_unpacked_once_too(tmp_path, dequantize):
    recipe = Recipe.named('rehearsal').replace(rows=40, valid_rows=4, epochs=1.0, dequantize=dequantize)
    prepare(recipe, tmp_path)
    finetune(recipe, tmp_path)
    packed = [m for m in load_tuned(recipe, tmp_path)[0].modules() if type(m).__name__ == 'Linear4bit']
    assert bool(packed) != dequantize


def test_the_repacking_is_off_on_every_processor(monkeypatch):
    "As if this one had AVX-512 BF16, where the test above can fail."
    import bitsandbytes.nn.modules as bnb
    monkeypatch.setattr(bnb, 'has_avx512bf16', lambda: True)
    assert bnb.Linear4bit(64, 64).support_avx512bf16_for_cpu
    model, _ = load_base(Recipe.named('rehearsal'), quant='nf4')
    four_bits = [module for module in model.modules() if isinstance(module, bnb.Linear4bit)]
    assert len(four_bits) == 28 and not any(module.support_avx512bf16_for_cpu for module in four_bits)


@pytest.mark.parametrize('rows, valid, epochs, save_steps', [(49_000, 1000, 3.0, .1), (260, 40, 1.0, .1), (2070, 250, 2.0, .5), (20, 200, 1.0, .5)])
def test_evaluations_on_the_way_read_a_fifth_of_the_trained_tokens_at_most(rows, valid, epochs, save_steps):
    "A token that is only evaluated takes half the time of one that is trained on, so that is a tenth of the time."
    from datasets import Dataset
    recipe = Recipe(epochs=epochs, save_steps=save_steps)
    train, held_out = (Dataset.from_dict(dict(input_ids=[[i] * 20 for i in range(n)])) for n in (rows, valid))
    taken = _drawn(held_out, train, recipe)
    times = round(1 / save_steps)
    read, trained = times * sum(map(len, taken['input_ids'])), epochs * 20 * rows
    assert read <= .2 * trained or len(taken) == 1
    assert len(taken) == valid or read > .2 * trained - times * 20 or len(taken) == 1     # and no row less
    assert taken['input_ids'] == _drawn(held_out, train, recipe)['input_ids'] and len(_drawn(train.select([]), train, recipe)) == 0
    assert len(_drawn(held_out, train, recipe.replace(save_steps=2))) == valid          # as often as the recipe says
