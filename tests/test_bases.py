"Bases of other kinds, bases that are not whole, and adapters that change the embedding: right to 1e-4 nats, or refused in one line."
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Gemma3Config, Gemma3ForConditionalGeneration, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, SiglipVisionConfig

from kofinetune import cli
from kofinetune.base import about_base, base_path, check_base, load_base, load_tokenizer
from kofinetune.data import load_rows, prepare
from kofinetune.export import licences
from kofinetune.gguffile import check_gguf, write_gguf
from kofinetune.merge import compare_models, copy_tokenizer, merge_adapter, merge_into
from kofinetune.proof import verify_gguf
from kofinetune.prompt import format_prompt
from kofinetune.recipe import Recipe
from kofinetune.runs import write_jsonl
from kofinetune.scoring import answer_nll, generate
from kofinetune.train import add_lora, finetune, load_tuned

PLAIN = Recipe.named('rehearsal').replace(quant='none')
QUICK = dict(rows=60, valid_rows=6, epochs=.1, max_length=200, lora_r=4)
PROJECTIONS = ['q_proj', 'down_proj']
SHAPE = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
             max_position_embeddings=1024)


def byte_tokenizer(folder, **special):
    "A byte-level BPE tokenizer, as Qwen and Llama have one."
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    texts = [row['instruction'] + row['output'] for row in load_rows('rehearsal')[:300]]
    tok.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=600, special_tokens=['<|start|>', '<|end|>'], show_progress=False,
                                                       initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    made = PreTrainedTokenizerFast(tokenizer_object=tok, **special)
    made.save_pretrained(folder)
    return len(made)


def other_base(folder, kind):
    "A tiny random base of another family."
    torch.manual_seed(0)
    special = dict(eos_token='<|end|>') | (dict(pad_token='<|start|>') if kind == 'qwen3' else {})   # Llama has no pad_token
    shape = SHAPE | dict(vocab_size=byte_tokenizer(folder, **special), eos_token_id=1, bos_token_id=0, pad_token_id=0)
    if kind == 'qwen3': model = Qwen3ForCausalLM(Qwen3Config(**shape, tie_word_embeddings=True))
    else: model = LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=False))
    model.bfloat16().save_pretrained(folder)
    return folder


def multimodal_base(folder):
    "The stand-in's tokenizer and shape as the text part of a Gemma 3 that sees."
    config = json.loads((Path(base_path('rehearsal'))/'config.json').read_text())
    taken = ('vocab_size', 'hidden_size', 'intermediate_size', 'num_hidden_layers', 'num_attention_heads', 'num_key_value_heads', 'head_dim',
             'query_pre_attn_scalar', 'sliding_window', 'max_position_embeddings', 'pad_token_id', 'eos_token_id', 'bos_token_id')
    eyes = SiglipVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    torch.manual_seed(0)
    both = Gemma3Config(text_config=Gemma3TextConfig(**{key: config[key] for key in taken}), vision_config=eyes, mm_tokens_per_image=4)
    Gemma3ForConditionalGeneration(both).bfloat16().save_pretrained(folder)
    copy_tokenizer(PLAIN, folder)
    return folder


@torch.no_grad()
def log_probs(model):
    ids = torch.arange(20, 68).reshape(2, 24)
    return model.eval()(input_ids=ids).logits.log_softmax(-1)


def gap(one, two): return (one - two).abs().max().item()


def fresh(): return load_base(PLAIN, dtype=torch.float32)[0]


# --- adapters of a base whose embedding is its head too

def lora(**more):
    from peft import LoraConfig
    return LoraConfig(**dict(r=4, lora_alpha=8, task_type='CAUSAL_LM', target_modules=PROJECTIONS) | more)


def of_peft(name, **more):
    import peft
    return getattr(peft, name)(**dict(task_type='CAUSAL_LM', target_modules=PROJECTIONS) | more)


HEAD, BELOW = [*PROJECTIONS, 'lm_head'], [*PROJECTIONS, 'embed_tokens']
KINDS = {   # the adapter, and whether one matrix is still enough
    'lora': (lora, True), 'dora': (lambda: lora(use_dora=True), True), 'rslora': (lambda: lora(use_rslora=True), True),
    'head': (lambda: lora(target_modules=HEAD), False), 'embedding': (lambda: lora(target_modules=BELOW), False),
    'both': (lambda: lora(target_modules=[*HEAD, 'embed_tokens']), False), 'head alone': (lambda: lora(target_modules=['lm_head']), False),
    'head, DoRA': (lambda: lora(target_modules=HEAD, use_dora=True), False),
    'embedding, kept tied': (lambda: lora(target_modules=BELOW, ensure_weight_tying=True), True),
    'head, kept tied': (lambda: lora(target_modules=HEAD, ensure_weight_tying=True), True),
    'a whole head': (lambda: lora(modules_to_save=['lm_head']), False), 'a whole embedding': (lambda: lora(modules_to_save=['embed_tokens']), False),
    'two whole ones': (lambda: lora(modules_to_save=['lm_head', 'embed_tokens']), False),
    'a whole one, kept tied': (lambda: lora(modules_to_save=['embed_tokens'], ensure_weight_tying=True), True),
    'tokens': (lambda: lora(trainable_token_indices=[5, 6]), True), 'tokens of the head': (lambda: lora(trainable_token_indices={'lm_head': [5]}), False),
    'other tokens below': (lambda: lora(trainable_token_indices={'lm_head': [7, 8], 'embed_tokens': [5, 6]}), False),
    'a norm': (lambda: lora(modules_to_save=['norm']), True), 'bias': (lambda: lora(bias='all'), True),
    'patterns': (lambda: lora(rank_pattern={'q_proj': 8}, alpha_pattern={'q_proj': 64}, layers_to_transform=[1, 2]), True),
    'IA3': (lambda: of_peft('IA3Config', feedforward_modules=['down_proj']), True),
    'IA3 of the head': (lambda: of_peft('IA3Config', target_modules=['q_proj', 'lm_head'], feedforward_modules=[]), False),
    'LoHa': (lambda: of_peft('LoHaConfig', r=4, alpha=8), True), 'LoHa of the head': (lambda: of_peft('LoHaConfig', r=4, alpha=8, target_modules=HEAD), False),
    'LoKr': (lambda: of_peft('LoKrConfig', r=4, alpha=8), True), 'OFT': (lambda: of_peft('OFTConfig', oft_block_size=8), True),
    'AdaLoRA': (lambda: of_peft('AdaLoraConfig', total_step=100), True), 'norms': (lambda: of_peft('LNTuningConfig', target_modules=['input_layernorm']), True)}


def made_elsewhere(folder, config, **saved):
    "An adapter of peft whose every weight was moved; what the model says with it."
    from peft import PeftModel, get_peft_model
    torch.manual_seed(1)
    model = get_peft_model(fresh(), config)
    for p in model.parameters():
        if p.requires_grad: p.data.add_(torch.randn_like(p) * .02)
    model.save_pretrained(folder, **saved)
    return log_probs(PeftModel.from_pretrained(fresh(), folder))


@pytest.mark.parametrize('kind', KINDS)
def test_an_adapter_merges_into_the_model_that_it_was_or_not_at_all(kind, tmp_path):
    make, one_matrix = KINDS[kind]
    live = made_elsewhere(tmp_path/'adapter', make())
    merged = merge_into(fresh(), tmp_path/'adapter')
    merged.save_pretrained(tmp_path/'merged')
    again = AutoModelForCausalLM.from_pretrained(tmp_path/'merged', dtype=torch.float32)
    assert gap(live, log_probs(merged)) < 1e-4 and gap(live, log_probs(again)) < 1e-4 < gap(live, log_probs(fresh()))
    assert merged.config.tie_word_embeddings == again.config.tie_word_embeddings == one_matrix
    assert ('lm_head.weight' in load_file(tmp_path/'merged'/'model.safetensors')) != one_matrix


@pytest.mark.parametrize('target', ['lm_head', 'embed_tokens'])
@pytest.mark.parametrize('save', [False, True, 'auto'])
def test_with_or_without_the_embedding_in_its_file(target, save, tmp_path):
    live = made_elsewhere(tmp_path, lora(target_modules=[*PROJECTIONS, target]), save_embedding_layers=save)
    assert gap(live, log_probs(merge_into(fresh(), tmp_path))) < 1e-4


UNMERGEABLE = {'a bias that no layer has': lambda: lora(lora_bias=True),
               'a soft prompt': lambda: __import__('peft').PromptTuningConfig(task_type='CAUSAL_LM', num_virtual_tokens=4)}


@pytest.mark.parametrize('kind', UNMERGEABLE)
def test_what_cannot_be_one_model_is_refused_in_one_line(kind, tmp_path):
    made_elsewhere(tmp_path, UNMERGEABLE[kind]())
    with pytest.raises(ValueError, match='cannot be merged: .*; train one that peft can merge') as e: merge_into(fresh(), tmp_path)
    assert str(tmp_path) in str(e.value) and '\n' not in str(e.value)


def test_a_merge_that_peft_gets_wrong_is_refused(tmp_path, monkeypatch):
    from peft.tuners.lora import Linear
    live = made_elsewhere(tmp_path, lora())
    assert gap(live, log_probs(merge_into(fresh(), tmp_path))) < 1e-4
    right = Linear.get_delta_weight
    monkeypatch.setattr(Linear, 'get_delta_weight', lambda self, name: 1.01 * right(self, name))
    with pytest.raises(ValueError, match=r'the result is \S+ nats off'): merge_into(fresh(), tmp_path)


@pytest.fixture(scope='module')
def embedding_run(tmp_path_factory):
    "A run that trains an adapter of the embedding too, and merges it."
    run = tmp_path_factory.mktemp('embedding')/'run'
    recipe = PLAIN.replace(name='embedding', **QUICK | dict(epochs=1.), lora=dict(target_modules=[*PROJECTIONS, 'embed_tokens']))
    for do in (prepare, finetune, merge_adapter): do(recipe, run)
    return recipe, run


def test_a_run_with_an_adapted_embedding_merges_and_exports(embedding_run, tmp_path):
    "Two matrices from the merged folder on, and llama.cpp reads both."
    recipe, run = embedding_run
    weights = load_file(run/'merged'/'model.safetensors')
    assert gap(weights['lm_head.weight'].float(), weights['model.embed_tokens.weight'].float()) > 0
    (live, tok), (merged, _) = load_tuned(recipe, run), load_base(recipe, path=run/'merged')
    assert compare_models(live, merged, tok, load_rows('rehearsal')[:20])['kl'] < 1e-3
    prompts = [format_prompt(row) for row in load_rows('rehearsal')[:20]]
    assert write_gguf(run/'merged', tmp_path/'m.gguf')['tensors'] == len(weights)
    proof = verify_gguf(run/'merged', tmp_path/'m.gguf', prompts)
    assert check_gguf(run/'merged', tmp_path/'m.gguf')['different'] == [] and proof['failed'] == []
    folder = shutil.copytree(run/'merged', tmp_path/'tied')       # as if the head were the embedding: the proof must notice
    del weights['lm_head.weight']
    save_file(weights, folder/'model.safetensors', metadata=dict(format='pt'))
    write_gguf(folder, tmp_path/'wrong.gguf')
    assert check_gguf(run/'merged', tmp_path/'wrong.gguf')['different']


@pytest.mark.parametrize('module', ['lm_head', 'embed_tokens'])
def test_a_whole_matrix_is_trained_merged_and_scored_as_it_is(module, tmp_path):
    recipe = PLAIN.replace(name='whole', **QUICK, lora=dict(modules_to_save=[module]))
    for do in (prepare, finetune): do(recipe, tmp_path)
    assert merge_adapter(recipe, tmp_path)['kl'] < 1e-3
    (live, tok), (merged, _) = load_tuned(recipe, tmp_path), load_base(recipe, path=tmp_path/'merged')
    one, two = (answer_nll(model, tok, load_rows('rehearsal')[:8]) for model in (live, merged))
    assert sum(s['nll'] for s in one) == pytest.approx(sum(s['nll'] for s in two), rel=2e-2)


def test_an_adapter_of_the_head_is_refused_before_training():
    recipe = PLAIN.replace(lora=dict(target_modules=HEAD))
    with pytest.raises(ValueError, match='has lm_head, tied to embed_tokens: TRL trains it only by lora.modules_to_save') as e: add_lora(fresh(), recipe)
    assert '\n' not in str(e.value)


# --- other families

@pytest.mark.parametrize('kind', ['qwen3', 'llama'])
def test_another_family_trains_merges_and_is_measured(kind, tmp_path):
    base = other_base(tmp_path/kind, kind)
    recipe = PLAIN.replace(name=kind, base=str(base), **QUICK | dict(max_length=400))
    for do in (prepare, finetune): do(recipe, tmp_path/'run')
    assert merge_adapter(recipe, tmp_path/'run')['kl'] < 1e-2
    (model, tok), rows = load_tuned(recipe, tmp_path/'run'), load_rows('rehearsal')[:4]
    assert all(s['nll'] > 0 for s in answer_nll(model, tok, rows)) and len(generate(model, tok, rows, max_new_tokens=4)) == 4
    with pytest.raises(ValueError, match=rf"model_type is '{kind}'.*convert_hf_to_gguf.py"): write_gguf(tmp_path/'run'/'merged', tmp_path/'m.gguf')
    with pytest.raises(ValueError, match=rf"model_type is '{kind}'.*convert_hf_to_gguf.py"): check_base(recipe, tmp_path/'new')


def test_the_text_part_of_a_multimodal_base(tmp_path):
    "The same numbers as the whole model gives for text; merged, it is a text model that can be exported."
    from transformers import AutoModelForImageTextToText
    base = multimodal_base(tmp_path/'base')
    recipe = PLAIN.replace(name='seeing', base=str(base), **QUICK)
    whole = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    assert gap(log_probs(whole), log_probs(load_base(recipe, dtype=torch.float32)[0])) < 1e-5
    check_base(recipe, tmp_path/'run')
    for do in (prepare, finetune): do(recipe, tmp_path/'run')
    assert merge_adapter(recipe, tmp_path/'run')['kl'] < 1e-2
    merged = tmp_path/'run'/'merged'
    assert json.loads((merged/'config.json').read_text())['model_type'] == 'gemma3_text'
    assert all(key.startswith(('model.layers.', 'model.embed_tokens.', 'model.norm.')) for key in load_file(merged/'model.safetensors'))
    write_gguf(merged, tmp_path/'m.gguf')
    assert check_gguf(merged, tmp_path/'m.gguf')['different'] == [] and about_base(str(base))['gemma']


# --- bases that are not whole, or are something else: one line, before anything is trained

def copied(folder): return Path(shutil.copytree(base_path('rehearsal'), folder))


def change(file, edit):
    data = json.loads(file.read_text(encoding='utf-8'))
    edit(data)
    file.write_text(json.dumps(data), encoding='utf-8')


def half(file):
    data = file.read_bytes()
    file.write_bytes(data[:len(data) // 2])


def reweigh(base, edit):
    weights = load_file(base/'model.safetensors')
    edit(weights)
    save_file(weights, base/'model.safetensors', metadata=dict(format='pt'))


def rename_layer(weights): weights['model.layers.9.mlp.up_proj.weight'] = weights['model.layers.3.mlp.up_proj.weight'].clone()


def as_adapter(base):
    shutil.rmtree(base)
    made_elsewhere(base, lora())
    copy_tokenizer(PLAIN, base)


def small_vocabulary(base):
    for path in base.glob('tokenizer*'): path.unlink()
    byte_tokenizer(base, eos_token='<|end|>', pad_token='<|start|>')
    reweigh(base, lambda w: w.update({'model.embed_tokens.weight': w['model.embed_tokens.weight'][:100].clone()}))
    change(base/'config.json', lambda c: c.update(vocab_size=100))


WRONG = {
    'half a config': (lambda b: half(b/'config.json'), 'config.json'),
    'no config': (lambda b: (b/'config.json').unlink(), 'it needs config.json'),
    'a config of another kind': (lambda b: (b/'config.json').write_text('[]'), 'could not be loaded'),
    'a config of nothing': (lambda b: (b/'config.json').write_text('{}'), 'could not be loaded'),
    'a word for a number': (lambda b: change(b/'config.json', lambda c: c.update(hidden_size='wide')), 'could not be loaded'),
    'half the weights': (lambda b: half(b/'model.safetensors'), 'could not be loaded'),
    'no weights': (lambda b: (b/'model.safetensors').unlink(), 'could not be loaded'),
    'a layer without weights': (lambda b: reweigh(b, lambda w: w.pop('model.layers.3.mlp.up_proj.weight')), 'layers.3.mlp.up_proj.weight is only in its'),
    'weights of more layers': (lambda b: reweigh(b, rename_layer), 'model.layers.9.mlp.up_proj.weight is only in its weights, or only in its config.json'),
    'other widths': (lambda b: change(b/'config.json', lambda c: c.update(intermediate_size=512)), 'could not be loaded'),
    'no tokenizer': (lambda b: [p.unlink() for p in b.glob('tokenizer*')], 'has no tokenizer'),
    'half a tokenizer': (lambda b: half(b/'tokenizer.json'), 'could not be loaded'),
    'a tokenizer without an end': (lambda b: change(b/'tokenizer_config.json', lambda c: c.update(eos_token=None)), 'without eos_token'),
    'a tokenizer of another model': (small_vocabulary, 'its tokenizer has 6'),
    'an adapter': (as_adapter, 'is an adapter; set base to the model'),
    'an adapter in a model': (lambda b: (b/'adapter_config.json').write_text('{}'), 'is an adapter; set base to the model'),
    'quantized weights': (lambda b: change(b/'config.json', lambda c: c.update(quantization_config=dict(
        quant_method='bitsandbytes', load_in_4bit=True))), 'is quantized (bitsandbytes); set base to the 16- or 32-bit model'),
    'an empty folder': (lambda b: (shutil.rmtree(b), b.mkdir()), 'could not be loaded'),
    'a file in place of the folder': (lambda b: (shutil.rmtree(b), b.write_text('no model')), 'is not a GGUF file'),
    'no such folder': (shutil.rmtree, 'is not a file or folder'),
}


def command(monkeypatch, capsys, *args):
    monkeypatch.setattr(sys, 'argv', ['kofinetune', *map(str, args)])
    code = 0
    try: cli.main()
    except SystemExit as e: code = e.code or 0
    seen = capsys.readouterr()
    return code, [line for line in seen.err.splitlines() if line.startswith('kofinetune: ')], seen


@pytest.mark.parametrize('kind', WRONG)
def test_a_base_that_is_not_one_is_refused_in_one_line(kind, tmp_path, monkeypatch, capsys):
    harm, said = WRONG[kind]
    harm(base := copied(tmp_path/'base'))
    monkeypatch.setenv('KOFINETUNE_CACHE', str(tmp_path/'cache'))
    settings = [x for pair in dict(QUICK, base=base, quant='none').items() for x in ('--set', f'{pair[0]}={pair[1]}')]
    code, lines, seen = command(monkeypatch, capsys, 'run', '--recipe', 'rehearsal', '--run', tmp_path/'run', *settings)
    assert code in (1, 2) and len(lines) == 1 and said in lines[0] and str(base) in lines[0], seen.err
    assert 'Traceback' not in seen.err and not (tmp_path/'run'/'adapter').exists()


def test_another_family_is_refused_before_its_run_begins(tmp_path, monkeypatch, capsys):
    base = other_base(tmp_path/'base', 'qwen3')
    code, lines, seen = command(monkeypatch, capsys, 'run', '--recipe', 'rehearsal', '--run', tmp_path/'run', '--set', f'base={base}')
    assert code == 2 and len(lines) == 1 and "model_type is 'qwen3'" in lines[0] and 'convert_hf_to_gguf.py' in lines[0]
    assert 'gguf=none' in lines[0] and not (tmp_path/'run').exists()


def test_another_family_is_evaluated_in_a_run_without_files(tmp_path, monkeypatch, capsys):
    base = other_base(tmp_path/'base', 'llama')
    settings = QUICK | dict(base=base, quant='none', gguf='none', max_length=400, max_new_tokens=8, answer_rows=4)
    args = ['run', '--recipe', 'rehearsal', '--run', tmp_path/'run', *(x for key, value in settings.items() for x in ('--set', f'{key}={value}'))]
    code, lines, seen = command(monkeypatch, capsys, *args)
    assert code == 0 and not (tmp_path/'run'/'ollama').exists() and 'Report:' in seen.out, seen.err
    report = json.loads((tmp_path/'run'/'eval'/'report.json').read_text(encoding='utf-8'))
    assert set(report['models']) == {'base', 'tuned', 'merged'} and report['rows'] == 6
    code, lines, seen = command(monkeypatch, capsys, 'export', '--run', tmp_path/'run')
    assert code == 2 and len(lines) == 1


BEST = Recipe.named('best').revision
REVISIONS = {'of another base': (dict(base='google/gemma-3-270m-it', revision=BEST), 'belongs to google/gemma-3-270m; set it to one of .*-it/commits'),
             'of a folder': (dict(base='FOLDER', revision='0' * 40), "is not of that base, .* set it to ''"),
             'of the stand-in': (dict(base='rehearsal', revision=BEST), "belongs to google/gemma-3-270m; set it to ''"),
             'a branch': (dict(base='google/gemma-3-270m', revision='main'), 'is not a commit'),
             'too short': (dict(base='google/gemma-3-270m', revision=BEST[:12]), 'is not a commit'),
             'none': (dict(base='google/gemma-3-270m-it'), 'is not a commit'),
             'of a folder that is not there': (dict(base='models/mine'), 'models/mine is not a folder here')}


@pytest.mark.parametrize('kind', REVISIONS)
def test_a_revision_is_a_commit_of_that_base(kind, tmp_path):
    fields, said = REVISIONS[kind]
    if fields['base'] == 'FOLDER': fields = fields | dict(base=str(copied(tmp_path/'base')))
    for ask in (lambda r: load_tokenizer(r), lambda r: load_base(r), lambda r: check_base(r, tmp_path/'run')):
        with pytest.raises(ValueError, match=said): ask(Recipe(**fields))


def test_terms_and_names_of_a_folder(tmp_path, monkeypatch):
    base = copied(tmp_path/'my-model')
    said = licences('mine.jsonl', str(base))[1]
    assert 'Gemma Terms of Use' in said and str(tmp_path) not in said
    monkeypatch.chdir(base)
    for name in ('.', '../my-model', f'{base}/', './'): assert about_base(name)['name'] == 'my-model'


def test_a_path_of_this_machine_is_in_no_file_of_the_adapter(tmp_path):
    base = copied(tmp_path/'모델 둘'/'mine')
    recipe = PLAIN.replace(name='local', base=str(base), **QUICK)
    for do in (prepare, finetune, merge_adapter): do(recipe, tmp_path/'run')
    files = [p for name in ('adapter', 'merged') for p in (tmp_path/'run'/name).iterdir()]
    hidden = [str(tmp_path).encode(), '모델 둘'.encode(), json.dumps('모델 둘')[1:-1].encode()]
    assert not [p for p in files for text in hidden if text in p.read_bytes()]
    assert json.loads((tmp_path/'run'/'adapter'/'adapter_config.json').read_text())['base_model_name_or_path'] == 'mine'
