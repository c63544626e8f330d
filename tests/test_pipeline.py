"The whole pipeline: what it writes, what it reports, and real KoAlpaca rows through it."
import json
from pathlib import Path

import pytest

from kofinetune.prompt import format_prompt
from kofinetune.recipe import Recipe
from kofinetune.runs import read_jsonl, read_manifest
from kofinetune.data import prepare
from kofinetune.stats import exact_match
from kofinetune.eval import evaluate
from kofinetune.export import export_ollama
from kofinetune.merge import merge_adapter
from kofinetune.base import load_tokenizer
from kofinetune.train import finetune

STAGES = (prepare, finetune, merge_adapter, export_ollama, evaluate)


def files(folder): return {str(p.relative_to(folder)) for p in Path(folder).rglob('*') if p.is_file()}


def test_a_run_writes_exactly_these_files(rehearsal_run):
    tokenizer = {'tokenizer.json', 'tokenizer.model', 'tokenizer_config.json'}
    assert files(rehearsal_run/'data') == {'train.jsonl', 'valid.jsonl', 'audit.json'}
    assert files(rehearsal_run/'adapter') == {'adapter_config.json', 'adapter_model.safetensors', 'README.md', 'log.jsonl', 'metrics.json'}
    assert files(rehearsal_run/'merged') == tokenizer | {'config.json', 'generation_config.json', 'model.safetensors'}
    assert files(rehearsal_run/'ollama') == {'model-bf16.gguf', 'model-q8_0.gguf', 'Modelfile', 'verify.json'}
    assert files(rehearsal_run/'eval') == {'report.json', 'report.md', 'side_by_side.md', 'answers.jsonl', 'scores.jsonl', 'loss.png'}
    assert {p.name for p in rehearsal_run.iterdir()} - {'log.txt'} == {'data', 'adapter', 'merged', 'ollama', 'eval', 'recipe.json', 'manifest.json', '.lock'}


def test_the_rehearsal_learns(rehearsal_run):
    report = json.loads((rehearsal_run/'eval'/'report.json').read_text(encoding='utf-8'))
    base, tuned, merged = (report['models'][name] for name in ('base', 'tuned', 'merged'))
    assert report['held_out'] and report['rows'] >= 200
    assert tuned['answer_nll'] <= base['answer_nll'] / 4
    assert base['exact_match'] <= .05 and tuned['exact_match'] >= .70
    assert abs(merged['answer_nll'] - tuned['answer_nll']) < .05
    rows = read_jsonl(rehearsal_run/'data'/'valid.jsonl')
    assert len({r['kind'] for r in rows}) >= 8
    answers = read_jsonl(rehearsal_run/'eval'/'answers.jsonl')
    assert sum(exact_match(a, a['tuned']) for a in answers) / len(answers) == tuned['exact_match']


def test_manifest_holds_the_hash_of_every_file(rehearsal_run):
    import hashlib
    for name, record in read_manifest(rehearsal_run)['stages'].items():
        seen = {f: hashlib.sha256((rehearsal_run/name/f).read_bytes()).hexdigest() for f in files(rehearsal_run/name)}
        assert record['files'] == seen


def test_finished_stages_are_not_made_again(rehearsal_run, capsys):
    before = {f: (rehearsal_run/f).stat().st_mtime_ns for f in files(rehearsal_run)}
    for do in STAGES: do(Recipe.named('rehearsal'), rehearsal_run)
    assert capsys.readouterr().out.count('already done') == 5
    changed = {f for f in before if (rehearsal_run/f).stat().st_mtime_ns != before[f]} - {'.lock'}
    assert not changed


def test_whole_model_training_goes_all_the_way(tmp_path, rehearsal_run):
    recipe = Recipe.named('rehearsal').replace(name='full', adapter='none', quant='none', rows=300, valid_rows=20,
                                               epochs=1.0, learning_rate=1e-3)
    for do in (prepare, finetune, merge_adapter): do(recipe, tmp_path)
    assert not (tmp_path/'adapter'/'adapter_config.json').exists()
    merged = read_manifest(tmp_path)['stages']['merged']['result']
    assert merged['kl'] < 1e-4 and abs(merged['nll'][0] - merged['nll'][1]) < 1e-3      # apart from rounding to bf16


@pytest.mark.koalpaca
def test_blog_settings_on_real_rows(koalpaca, tmp_path, ollama_server):
    "320 real rows through the post's settings on the stand-in base, and a question to the real server."
    import ollama
    recipe = Recipe.named('blog').replace(name='blog-rehearsal', source=str(koalpaca), rows=320, base='rehearsal', revision='',
                                          gguf=('q8_0',), max_new_tokens=48, eval_rows=20)
    for do in STAGES: do(recipe, tmp_path)
    metrics = json.loads((tmp_path/'adapter'/'metrics.json').read_text(encoding='utf-8'))
    assert metrics['steps'] == 60 and metrics['rows'] == 320
    for key in ('train_runtime', 'train_samples_per_second', 'train_steps_per_second', 'train_loss', 'num_tokens', 'mean_token_accuracy', 'epoch'):
        assert metrics[key] > 0
    losses = [e['loss'] for e in read_jsonl(tmp_path/'adapter'/'log.jsonl') if 'loss' in e]
    assert losses[-1] < losses[0]
    report = json.loads((tmp_path/'eval'/'report.json').read_text(encoding='utf-8'))
    assert report['held_out'] is False and report['models']['base']['exact_match'] is None
    client = ollama.Client(host=ollama_server)
    name = 'kofinetune-blog-rehearsal'
    assert name in {m.model.split(':')[0] for m in client.list().models}
    question = dict(instruction='건강을 유지하기 위한 세 가지 팁을 알려주세요.', input='')
    made = client.generate(name, question['instruction'])
    assert made.done and made.prompt_eval_count == len(load_tokenizer(recipe)(format_prompt(question, 'blog'))['input_ids'])
