"Runs side by side: the numbers, the intervals, the warnings, the command, and the files it writes."
import json
import random
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, vouch

from kofinetune.recipe import Recipe
from kofinetune.runs import read_jsonl, write_json, write_jsonl
from kofinetune.data import prepare
from kofinetune.stats import paired_difference
from kofinetune.report import compare_runs
from kofinetune.eval import evaluate
from kofinetune.export import export_ollama
from kofinetune.merge import merge_adapter
from kofinetune.train import finetune


@pytest.fixture(scope='session')
def ablation():
    "The two small runs of notebook 04: the loss on the answer alone, and on everything."
    runs = {loss: ROOT/'runs'/f'ablation-{loss}' for loss in ('answer', 'whole')}
    for loss, run in runs.items():
        recipe = Recipe.named('rehearsal').replace(name=f'ablation-{loss}', loss=loss, rows=400, valid_rows=100, epochs=1.0,
                                                   quant='none', gguf=('bf16',))
        for make in (prepare, finetune, merge_adapter, export_ollama, evaluate): make(recipe, run)
    return runs


def kofinetune(*args, cwd):
    return subprocess.run([sys.executable, '-c', 'from kofinetune.cli import main; main()', *map(str, args)], cwd=cwd,
                          capture_output=True, text=True)


def copied(run, where, rows=None):
    "A copy of what a comparison reads, perhaps evaluated on other rows: `rows` takes a list of (answer, score)."
    for name in ('adapter', 'data', 'eval'): shutil.copytree(run/name, where/name)
    for name in ('recipe.json', 'manifest.json'): shutil.copyfile(run/name, where/name)
    if rows:
        chosen = rows(list(zip(read_jsonl(run/'eval'/'answers.jsonl'), read_jsonl(run/'eval'/'scores.jsonl'))))
        for name, lines in zip(('answers', 'scores'), zip(*chosen)): write_jsonl(list(lines), where/'eval'/f'{name}.jsonl')
        vouch(where, 'eval')
    return where


def test_the_command_prints_and_writes_what_the_reports_say(ablation, tmp_path):
    seen = kofinetune('compare', *ablation.values(), '--out', tmp_path/'out', cwd=tmp_path)
    assert seen.returncode == 0, seen.stderr
    assert {p.name for p in (tmp_path/'out').iterdir()} == {'compare.json', 'compare.md', 'compare.png'}
    result = json.loads((tmp_path/'out'/'compare.json').read_text(encoding='utf-8'))
    for loss, run in ablation.items():
        report = json.loads((run/'eval'/'report.json').read_text(encoding='utf-8'))['models']
        mine, metrics = result['runs'][f'ablation-{loss}'], json.loads((run/'adapter'/'metrics.json').read_text(encoding='utf-8'))
        for m in ('answer_nll', 'token_accuracy', 'bits_per_byte', 'exact_match'):
            assert mine[m] == pytest.approx(report['tuned'][m], rel=1e-9)
        assert mine['base_answer_nll'] == pytest.approx(report['base']['answer_nll']) and mine['num_tokens'] == metrics['num_tokens'] and mine['device'] == metrics['device']
    assert list(result['recipe']) == ['loss'] and result['rows'] == 100
    text = (tmp_path/'out'/'compare.md').read_text(encoding='utf-8')
    value, difference = f"{result['runs']['ablation-answer']['answer_nll']:.3f}", result['differences']['ablation-whole']['answer_nll']
    for said in (value, 'recipe: loss', f"{difference['difference']:+.3f}"): assert said in text and said in seen.stdout
    assert '![loss of each run](compare.png)' in text and (tmp_path/'out'/'compare.png').read_bytes().startswith(b'\x89PNG')
    low, high = difference['difference_ci']
    assert low <= difference['difference'] <= high


def test_rows_that_not_every_run_was_evaluated_on_are_left_out(ablation, tmp_path):
    few = copied(ablation['whole'], tmp_path/'few', lambda pairs: pairs[:60])
    result = compare_runs([ablation['answer'], few])
    assert result['rows'] == 60
    other = copied(ablation['whole'], tmp_path/'other', lambda pairs: [(a | dict(instruction='다른 질문'), s) for a, s in pairs])
    with pytest.raises(ValueError, match='share none'): compare_runs([ablation['answer'], other])
    backwards = copied(ablation['whole'], tmp_path/'backwards', lambda pairs: pairs[::-1])
    same = compare_runs([ablation['whole'], backwards])['differences']['backwards']
    assert {m: d['difference'] for m, d in same.items()} == dict.fromkeys(same, 0.0)      # rows are matched by what they say


def test_a_run_that_was_trained_on_the_rows_is_named(ablation, tmp_path):
    leaky = copied(ablation['whole'], tmp_path/'leaky')
    write_jsonl(read_jsonl(leaky/'data'/'train.jsonl') + read_jsonl(leaky/'data'/'valid.jsonl')[:30], leaky/'data'/'train.jsonl')
    notes = compare_runs([ablation['answer'], leaky])['notes']
    assert 'leaky was TRAINED on 30 of these 100 rows: its numbers are too good' in notes
    assert not [n for n in compare_runs(list(ablation.values()))['notes'] if 'TRAINED' in n]


def test_the_paired_interval_is_right_and_narrower_than_two_alone():
    draw, inside, narrower = random.Random(1), 0, 0
    for _ in range(100):
        hard = [draw.gauss(5, 2) for _ in range(60)]
        first, second = ([dict(nll=h + draw.gauss(shift, .3), tokens=1) for h in hard] for shift in (0, -.1))
        low, high = paired_difference(first, second)['difference_ci']
        inside += low <= -.1 <= high
        alone = paired_difference(first, draw.sample(second, 60))['difference_ci']
        narrower += high - low < (alone[1] - alone[0]) / 3
    assert 88 <= inside <= 99 and narrower == 100
    one, two = [dict(nll=2.0, tokens=4), dict(nll=4.0, tokens=4)], [dict(nll=1.0, tokens=4), dict(nll=2.0, tokens=4)]
    assert paired_difference(one, two)['difference'] == pytest.approx(3 / 8 - 6 / 8)


def test_what_cannot_be_compared_is_refused_in_one_line(ablation, tmp_path):
    old = copied(ablation['answer'], tmp_path/'old')
    (old/'eval'/'scores.jsonl').unlink()
    (tmp_path/'empty').mkdir()
    for args, says in (([ablation['answer']], '1 run to compare'), ([ablation['answer'], ablation['answer']], '1 run to compare'),
                       ([ablation['answer'], 'empty'], 'kofinetune eval --run empty'), ([old, ablation['answer']], f'--run {old} --force')):
        seen = kofinetune('compare', *args, '--out', 'out', cwd=tmp_path)
        assert seen.returncode == 2 and len(seen.stderr.strip().splitlines()) == 1 and says in seen.stderr, seen.stderr
        assert not (tmp_path/'out').exists()


def test_three_runs_two_of_one_name(ablation, tmp_path):
    twin = copied(ablation['whole'], tmp_path/'elsewhere'/'ablation-answer')
    write_json(json.loads((twin/'recipe.json').read_text(encoding='utf-8')) | dict(seed=7), twin/'recipe.json')
    result = compare_runs([ablation['answer'], ablation['whole'], twin])
    assert list(result['runs']) == [str(ablation['answer']), str(ablation['whole']), str(twin)]
    assert set(result['recipe']) == {'loss', 'seed'} and len(result['differences']) == 2
