"The scripts in examples/, each run as its own docstring says, on the stand-in base."
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


def run(script, *args):
    made = subprocess.run([sys.executable, ROOT/'examples'/script, *map(str, args)], capture_output=True, text=True,
                          encoding='utf-8', cwd=ROOT)
    assert made.returncode == 0, made.stderr
    return made.stdout


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


def test_export_any_adapter(tmp_path, rehearsal_run):
    "The adapter is made by peft alone, with another rank than any recipe's."
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from kofinetune.rehearsal import stand_in_base
    from kofinetune.scoring import generate
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(stand_in_base(), dtype=torch.float32)
    other = get_peft_model(base, LoraConfig(r=3, lora_alpha=6, target_modules=['q_proj', 'down_proj'], init_lora_weights=False))
    other.save_pretrained(tmp_path/'adapter')
    rows = read_jsonl(rehearsal_run/'data'/'valid.jsonl')[:12]
    write_jsonl(rows, tmp_path/'rows.jsonl')
    said = run('export_any_adapter.py', tmp_path/'adapter', tmp_path/'rows.jsonl', tmp_path/'exported')
    assert '12 prompts with the same tokens' in said
    assert {p.name for p in (tmp_path/'exported').iterdir()} == {'merged', 'model-q8_0.gguf', 'Modelfile'}
    merged = AutoModelForCausalLM.from_pretrained(tmp_path/'exported'/'merged', dtype=torch.float32)
    tok = AutoTokenizer.from_pretrained(tmp_path/'exported'/'merged')
    ids = tok('### Instruction:\n137을 한글로 쓰세요.', return_tensors='pt')
    with torch.inference_mode(): there, here = other.eval()(**ids).logits, merged(**ids).logits
    assert (there - here).abs().max() < .1 * there.std()       # bf16 on the way to disk
    assert generate(merged, tok, rows[:1])[0]['answer'] != ''


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
