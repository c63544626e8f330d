"The scripts in examples/, each run as its own docstring says, on the stand-in base."
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, vouch

from kofinetune.recipe import Recipe
from kofinetune.runs import read_jsonl, write_jsonl
from kofinetune.data import load_rows

SCRIPTS = sorted((ROOT/'examples').glob('*.py'))


def start(script, *args):
    return subprocess.run([sys.executable, ROOT/'examples'/script, *map(str, args)], capture_output=True, text=True,
                          encoding='utf-8', cwd=ROOT, env=os.environ | dict(HF_HUB_OFFLINE='1'))


def run(script, *args):
    made = start(script, *args)
    assert made.returncode == 0, made.stderr
    return made.stdout


def refused(script, *args):
    "The one line with which a script ends."
    made = start(script, *args)
    said = [line for line in made.stderr.splitlines() if line.startswith(f'{script}: ')]
    assert made.returncode and len(said) == 1 and 'Traceback' not in made.stderr, made.stderr
    return said[0]


@pytest.mark.parametrize('path', SCRIPTS, ids=lambda path: path.name)
def test_each_says_how_it_is_run(path):
    text = path.read_text(encoding='utf-8')
    assert text.startswith('"""') and f'python examples/{path.name} ' in text.split('"""')[1]
    assert len(text.splitlines()) <= 60 and max(map(len, text.splitlines())) <= 130


def test_train_on_my_rows(tmp_path, rehearsal_run):
    rows = [{key: row[key] for key in ('instruction', 'input', 'output')} for row in load_rows('rehearsal')[:200]]
    write_jsonl(rows, tmp_path/'my.jsonl')
    said = run('train_on_my_rows.py', tmp_path/'my.jsonl', tmp_path/'mine', '--epochs', '.5')
    held = read_jsonl(tmp_path/'mine'/'data'/'valid.jsonl')
    trained = read_jsonl(tmp_path/'mine'/'data'/'train.jsonl')
    assert len(held) == 20 and f'{len(trained)} rows trained on, 20 held out' in said
    assert (tmp_path/'mine'/'adapter'/'adapter_model.safetensors').is_file()
    assert f'wanted: {held[0]["output"]}' in said and re.search(r'^base: .*?^tuned: ', said, re.M | re.S)     # the base may go on over several lines
    assert Recipe.load(tmp_path/'mine'/'recipe.json').source == str(tmp_path/'my.jsonl')


def test_tune_on_from_a_merged_model(tmp_path, rehearsal_run):
    "What is called the base is the model that was merged: it answers as the first run's tuned model does."
    known = [row for row in read_jsonl(rehearsal_run/'eval'/'answers.jsonl') if row['tuned'] == row['output'] != row['base']]
    write_jsonl([{key: row[key] for key in ('instruction', 'input', 'output')} for row in known[:40]], tmp_path/'more.jsonl')
    said = run('train_on_my_rows.py', tmp_path/'more.jsonl', tmp_path/'two', '--base', rehearsal_run/'merged', '--epochs', '.2')
    held = read_jsonl(tmp_path/'two'/'data'/'valid.jsonl')[0]
    before = re.search(r'^base: +(.*)', said, re.M)[1]
    assert before == held['output'] and Recipe.load(tmp_path/'two'/'recipe.json').base == str(rehearsal_run/'merged')


@pytest.mark.parametrize('count', [1, 2, 9])
def test_train_on_a_few_rows(count, tmp_path, rehearsal_run):
    rows = [{key: row[key] for key in ('instruction', 'input', 'output')} for row in load_rows('rehearsal')[:count]]
    write_jsonl(rows, tmp_path/'my.jsonl')
    said = run('train_on_my_rows.py', tmp_path/'my.jsonl', tmp_path/'mine', '--epochs', '1')
    assert f'{max(count - 1, 1)} rows trained on, {min(count - 1, 1)} held out' in said and 'wanted: ' in said


def test_train_on_my_rows_refuses_in_one_line(tmp_path):
    (tmp_path/'bad.jsonl').write_text('{"instruction": 1}\n')
    (tmp_path/'empty.jsonl').write_text('')
    for name in ('none.jsonl', 'bad.jsonl', 'empty.jsonl'):
        assert name in refused('train_on_my_rows.py', tmp_path/name, tmp_path/'mine')
    write_jsonl(load_rows('rehearsal')[:5], tmp_path/'my.jsonl')
    assert 'there is no recipe' in refused('train_on_my_rows.py', tmp_path/'my.jsonl', tmp_path/'mine', '--recipe', 'bset')


@pytest.fixture(scope='module')
def rows(tmp_path_factory, rehearsal_run):
    held_out = read_jsonl(rehearsal_run/'data'/'valid.jsonl')
    return write_jsonl([row for row in held_out if not row['input']][:12], tmp_path_factory.mktemp('rows')/'rows.jsonl')


def adapter(folder, targets=('q_proj', 'down_proj'), named=None):
    "An adapter made by peft alone, with another rank than any recipe's, and the model with it."
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM
    from kofinetune.rehearsal import stand_in_base
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(stand_in_base(), dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(r=3, lora_alpha=6, target_modules=list(targets)))
    for name, p in model.named_parameters():
        if p.requires_grad: p.data.add_(torch.randn_like(p) * .01)
    model.save_pretrained(folder)
    if named is not None:
        config = json.loads((folder/'adapter_config.json').read_text(encoding='utf-8')) | dict(base_model_name_or_path=named)
        (folder/'adapter_config.json').write_text(json.dumps(config), encoding='utf-8')
    return model.eval()


@pytest.mark.parametrize('targets', [('q_proj', 'down_proj'), ('q_proj', 'lm_head'), ('q_proj', 'embed_tokens')], ids=lambda t: t[-1])
def test_export_any_adapter(targets, tmp_path, rows):
    "The merged model is the adapter beside its base; an adapted head or embedding is a matrix of its own in the file."
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from kofinetune.gguffile import read_gguf
    live = adapter(tmp_path/'adapter', targets)
    said = run('export_any_adapter.py', tmp_path/'adapter', rows, tmp_path/'exported')
    assert '12 prompts with the same tokens' in said and re.search(r'0\.0\d+ nats a token from the adapter beside', said)
    assert {p.name for p in (tmp_path/'exported').iterdir()} == {'merged', 'model-q8_0.gguf', 'Modelfile'}
    assert {p.name for p in tmp_path.iterdir()} == {'adapter', 'exported'}
    names = {t['name'] for t in read_gguf(tmp_path/'exported'/'model-q8_0.gguf')[1]}
    assert ('output.weight' in names) == (targets[-1] != 'down_proj')
    merged = AutoModelForCausalLM.from_pretrained(tmp_path/'exported'/'merged', dtype=torch.float32)
    tok = AutoTokenizer.from_pretrained(tmp_path/'exported'/'merged')
    ids = tok('### Instruction:\n137을 한글로 쓰세요.', return_tensors='pt')
    with torch.inference_mode(): there, here = live(**ids).logits, merged(**ids).logits
    assert (there - here).abs().max() < .1 * there.std()       # bf16 on the way to disk
    assert str(tmp_path) not in (tmp_path/'exported'/'Modelfile').read_text(encoding='utf-8')


def test_the_base_that_the_adapter_names(tmp_path, rows):
    "Another one of the same shape is refused, and taken with --force; the style is the one that is asked for."
    adapter(tmp_path/'adapter', named='someone/other-270m')
    args = tmp_path/'adapter', rows, tmp_path/'out', '--base', 'rehearsal', '--style', 'blog'
    said = refused('export_any_adapter.py', *args)
    assert 'was trained for someone/other-270m, and --base is rehearsal' in said and '--force' in said and not (tmp_path/'out').exists()
    run('export_any_adapter.py', *args, '--force')
    assert '### Input:\n{{ .System }}\n\n### Response' in (tmp_path/'out'/'Modelfile').read_text(encoding='utf-8')
    assert 'is there already' in refused('export_any_adapter.py', *args, '--force')


def test_the_lines_of_its_docstring_need_no_revision(tmp_path, rows):
    "Where google/gemma-3-270m is not in the cache, one line says how to get it; another name of the Hub needs a commit."
    adapter(tmp_path/'adapter', named='google/gemma-3-270m')
    for more in ([], ['--base', 'google/gemma-3-270m']):
        said = refused('export_any_adapter.py', tmp_path/'adapter', rows, tmp_path/'out', *more)
        assert 'could not be loaded' in said and 'hf auth login' in said
    adapter(tmp_path/'it', named='google/gemma-3-270m-it')
    assert 'set it to one of' in refused('export_any_adapter.py', tmp_path/'it', rows, tmp_path/'out')
    assert 'hf auth login' in refused('export_any_adapter.py', tmp_path/'it', rows, tmp_path/'out', '--revision', '0' * 40)


def half(folder, file='adapter_model.safetensors'):
    data = (folder/file).read_bytes()
    (folder/file).write_bytes(data[:len(data) // 2])


def narrow(folder):
    config = json.loads((folder/'adapter_config.json').read_text(encoding='utf-8')) | dict(r=8)
    (folder/'adapter_config.json').write_text(json.dumps(config), encoding='utf-8')


SPOILT = {'no folder': (shutil.rmtree, 'adapter'), 'half the weights': (half, 'does not fit the base, or is damaged'),
          'half the config': (lambda f: half(f, 'adapter_config.json'), ''), 'another rank': (narrow, 'size mismatch'),
          'no weights': (lambda f: (f/'adapter_model.safetensors').unlink(), 'adapter_model.safetensors is missing'),
          'a model': (lambda f: [p.unlink() for p in f.iterdir()], 'adapter_config.json')}


@pytest.mark.parametrize('kind', SPOILT)
def test_an_adapter_that_is_none_is_refused_in_one_line(kind, tmp_path, rows):
    adapter(tmp_path/'adapter')
    harm, says = SPOILT[kind]
    harm(tmp_path/'adapter')
    assert says in refused('export_any_adapter.py', tmp_path/'adapter', rows, tmp_path/'out')
    assert [p.name for p in tmp_path.iterdir() if p.name != 'adapter'] == []


def test_compare_two_runs(tmp_path, rehearsal_run):
    "A copy of the run in which a tenth of the right answers was lost."
    worse = tmp_path/'worse'
    for name in ('adapter', 'data', 'eval'): shutil.copytree(rehearsal_run/name, worse/name)
    for name in ('recipe.json', 'manifest.json'): shutil.copyfile(rehearsal_run/name, worse/name)
    answers, scores = (read_jsonl(worse/'eval'/f'{name}.jsonl') for name in ('answers', 'scores'))
    lost = [i for i, row in enumerate(answers) if row['tuned'] == row['output']][::10]
    for i in lost: answers[i]['tuned'], scores[i]['tuned'] = '모름', scores[i]['base']
    write_jsonl(answers, worse/'eval'/'answers.jsonl')
    write_jsonl(scores, worse/'eval'/'scores.jsonl')
    vouch(worse, 'eval')
    said = run('compare_two_runs.py', rehearsal_run, worse)
    for measure in ('answer_nll', 'token_accuracy', 'exact_match'):
        assert re.search(rf'^{measure}: .*: rehearsal is better$', said, re.M)
    assert f'{len(lost)} of {len(answers)} answers differ' in said and said.count('| 모름 | wanted:') == 5
    shutil.copytree(rehearsal_run, tmp_path/'same')
    said = run('compare_two_runs.py', rehearsal_run, tmp_path/'same')
    assert said.count('cannot tell') == 3 and f'\n0 of {len(answers)} answers differ' in said
