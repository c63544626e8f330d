"Scores, intervals and the report: what a user reads is what was measured."
import copy
import json
import math
import re
import shutil
from importlib.resources import files

import jsonschema
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kofinetune.recipe import Recipe
from kofinetune.runs import read_jsonl, read_manifest, write_json
from kofinetune.stats import exact_match, paired_difference, share_ci, summarize
from kofinetune.scoring import answer_nll, generate
from kofinetune.report import compare_runs, render_page
from kofinetune.eval import _in_two, _side_by_side, evaluate
from kofinetune.train import encode


def headline(report): return render_page('headline.jinja', report=report).strip()


SCHEMA = json.loads((files('kofinetune')/'assets'/'report.schema.json').read_text(encoding='utf-8'))
MODELS = ['base', 'tuned', 'merged', 'gguf-bf16', 'gguf-q8_0']


@pytest.fixture(scope='module')
def report(rehearsal_run): return json.loads((rehearsal_run/'eval'/'report.json').read_text(encoding='utf-8'))


@pytest.fixture(scope='module')
def merged(rehearsal_run):
    return (AutoModelForCausalLM.from_pretrained(rehearsal_run/'merged', dtype=torch.float32).eval(),
            AutoTokenizer.from_pretrained(rehearsal_run/'merged'))


def test_batching_changes_neither_scores_nor_answers(rehearsal_run, merged):
    rows = read_jsonl(rehearsal_run/'data'/'valid.jsonl')[:40]
    together, alone = (answer_nll(*merged, rows, batch_tokens=n) for n in (4096, 1))
    assert all(abs(a['nll'] - b['nll']) / a['tokens'] < 1e-4 for a, b in zip(together, alone))
    assert [a['correct'] for a in together] == [b['correct'] for b in alone]
    for row, score in zip(rows, together):              # and what they say is transformers' own loss
        ids, labels = (torch.tensor([encode(row, merged[1])[key]]) for key in ('input_ids', 'labels'))
        with torch.no_grad(): said = merged[0](input_ids=ids, labels=labels)
        assert abs(score['nll'] / score['tokens'] - said.loss.item()) < 1e-4
        assert score['correct'] == (said.logits[0, :-1].argmax(-1) == labels[0, 1:]).sum()      # -100 is nobody's argmax
    assert generate(*merged, rows, batch_size=40) == generate(*merged, rows, batch_size=1)


def test_a_row_that_does_not_fit_is_counted(rehearsal_run, merged):
    rows = read_jsonl(rehearsal_run/'data'/'valid.jsonl')[:3]
    rows[1] = rows[1] | dict(output='가' * 600)
    scores = answer_nll(*merged, rows)
    assert [s is None for s in scores] == [False, True, False] and summarize(scores)['left_out'] == 1


def test_ninety_five_of_a_hundred_intervals_hold_the_truth():
    draw, inside = np.random.default_rng(1), 0
    for seed in range(300):
        rows = [dict(nll=2.0 * n * e, tokens=n, correct=0, bytes=1) for n, e in zip(draw.integers(1, 9, 80), draw.exponential(1, 80))]
        low, high = summarize(rows, seed)['answer_nll_ci']
        inside += low <= 2 <= high
    assert .89 < inside / 300 <= .98, inside / 300


def test_wilson_by_its_formula():
    for hits, of in ((0, 25), (13, 25), (25, 25), (7, 900)):
        z, p = 1.959963984540054, hits / of
        middle, reach = p + z * z / 2 / of, z * math.sqrt(p * (1 - p) / of + z * z / 4 / of ** 2)
        assert share_ci(hits, of) == pytest.approx([(middle - reach) / (1 + z * z / of), (middle + reach) / (1 + z * z / of)], abs=1e-12)


def test_a_paired_difference_is_surer_than_its_parts():
    hard = np.random.default_rng(0).exponential(1, 200)
    one, two = ([dict(nll=h + gain, tokens=1, correct=0, bytes=1) for h in hard] for gain in (.1, 0.))
    seen, parts = paired_difference(one, two), [summarize(side)['answer_nll_ci'] for side in (one, two)]
    assert seen['difference_ci'] == pytest.approx([-.1, -.1]) and parts[0][0] < parts[1][1]   # their own intervals overlap


def test_report_json_is_as_its_schema_says(report):
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(report, SCHEMA)
    assert list(report['models']) == MODELS
    assert list(report['differences']) == ['tuned - base', 'merged - tuned', 'gguf-bf16 - merged', 'gguf-q8_0 - merged']
    for model in report['models'].values():
        for name, (low, high) in ((n.removesuffix('_ci'), v) for n, v in model.items() if n.endswith('_ci')):
            assert low <= model[name] <= high and low < high


@pytest.mark.parametrize('where, value', [
    (('rows',), None), (('models', 'tuned', 'token_accuracy'), 97.0), (('models', 'gguf-q8_0', 'chrf'), 101), (('models', 'merged'), None),
    (('models', 'base', 'answer_nll_ci'), [1.0]), (('differences', 'tuned - base', 'answer_nll'), -2.7), (('outcomes', 'worse'), 'few')])
def test_a_report_that_breaks_the_schema_is_refused(report, where, value):
    broken = copy.deepcopy(report)
    at = broken
    for key in where[:-1]: at = at[key]
    if value is None: del at[where[-1]]
    else: at[where[-1]] = value
    with pytest.raises(jsonschema.ValidationError): jsonschema.validate(broken, SCHEMA)


def test_report_counts_what_the_answers_say(report, rehearsal_run):
    rows = read_jsonl(rehearsal_run/'eval'/'answers.jsonl')
    scores = read_jsonl(rehearsal_run/'eval'/'scores.jsonl')
    for name in MODELS:
        right, total = [exact_match(r, r[name]) for r in rows], sum(s[name]['tokens'] for s in scores)
        assert report['models'][name]['exact_match'] == sum(right) / len(rows)
        assert report['models'][name]['answer_nll'] == pytest.approx(sum(s[name]['nll'] for s in scores) / total)
    wrong = {r['kind'] for r in rows if not exact_match(r, r['tuned'])}
    assert set(report['failures']) == wrong and all(len(f) <= 5 for f in report['failures'].values())
    assert sum(report['outcomes'].values()) == len(rows) == report['rows']
    said = {name: [dict(answer=r[name]) for r in rows] for name in ('base', 'tuned')}
    assert report['outcomes'] == dict(better=0, same=0, worse=0) | _side_by_side(rows, said).outcome.value_counts().to_dict()
    for e in report['examples']: assert (e['base'], e['tuned']) == (rows[e['row']]['base'], rows[e['row']]['tuned'])


def test_a_drawn_part_is_answered_and_every_row_is_scored(report, rehearsal_run, tmp_path):
    "With answer_rows the same rows are scored to the same numbers, the drawn ones have the same answers, and measures of answers count only them."
    run = tmp_path/'run'
    shutil.copytree(rehearsal_run, run, ignore=shutil.ignore_patterns('eval', 'checkpoints'))
    recipe = Recipe.named('rehearsal').replace(answer_rows=40, eval_rows=90)
    manifest = json.loads((run/'manifest.json').read_text(encoding='utf-8'))
    del manifest['stages']['eval']
    (run/'manifest.json').write_text(json.dumps(manifest), encoding='utf-8')
    part = evaluate(recipe, run)
    whole, rows, scores = (read_jsonl(folder/'eval'/f'{name}.jsonl') for folder, name in (
        (rehearsal_run, 'answers'), (run, 'answers'), (run, 'scores')))
    asked = [i for i, row in enumerate(rows) if row['base'] is not None]
    assert (len(rows), len(scores), len(asked), part['rows'], part['answered']) == (90, 90, 40, 90, 40) and asked != list(range(40))
    assert all(rows[i][name] == whole[i][name] for i in asked for name in MODELS) and all(s[name]['tokens'] for s in scores for name in MODELS)
    right = [exact_match(rows[i], rows[i]['tuned']) for i in asked]
    assert part['models']['tuned']['exact_match'] == sum(right) / 40 and sum(part['outcomes'].values()) == 40
    assert sum(kind['rows'] for kind in part['kinds'].values()) == 40 and {e['row'] for e in part['examples']} <= set(asked)
    assert headline(part).endswith('of 40 drawn rows.') and 'drawn' not in headline(report)
    compared = compare_runs([rehearsal_run, run])
    assert compared['rows'] == 90 and 'exact_match' not in compared['runs']['run']     # 50 of the rows were not answered


def test_answers_that_follow_from_the_scores_are_those_that_are_generated(report, rehearsal_run, merged):
    "Where the scores say that each wanted token is likelier than any other by more than rounding, nothing was generated."
    rows, scores = (read_jsonl(rehearsal_run/'eval'/f'{name}.jsonl') for name in ('answers', 'scores'))
    known = [s['merged']['sure'] == s['merged']['tokens'] for s in scores]
    assert 150 < sum(known) < len(rows)      # some, and not all
    made = generate(*merged, rows)
    assert [a['answer'] for a in made] == [row['merged'] for row in rows]
    assert all(a['stopped'] for a, sure in zip(made, known) if sure) and all(s['merged']['sure'] <= s['merged']['correct'] for s in scores)


def test_a_files_matrix_keeps_in_bf16_what_bf16_would_round_away():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = torch.nn.Linear(2, 1, bias=False), torch.nn.Linear(2, 1, bias=False)
            for layer in (self.body, self.head): layer.weight.data = torch.tensor([[1 + 2 ** -10, -1.]])
        def get_output_embeddings(self): return self.head
    model, one = _in_two(Model()), torch.ones(1, 2, dtype=torch.bfloat16)
    assert model.body(one).item() == 2 ** -10 and model.body(one).dtype == torch.bfloat16
    assert model.head(one).item() == 0                 # the head is the embedding: rounded


def test_worse_answers_are_shown_first_and_no_more_than_a_quarter():
    rows = [dict(instruction=str(i), input='', output='참') for i in range(100)]
    base = [dict(answer='참' if i < 30 else '거짓') for i in range(100)]
    tuned = [dict(answer='참' if i >= 30 else '거짓') for i in range(100)]
    drawn, again, other = (_side_by_side(rows, dict(base=base, tuned=tuned), 20, seed) for seed in (0, 0, 1))
    assert list(drawn.outcome[:5]) == ['worse'] * 5 and len(drawn) == 20 and drawn.index.is_unique
    assert list(drawn.index) == list(again.index) != list(other.index)


def test_report_page_is_one_page_and_begins_with_the_answer(report, rehearsal_run):
    text = (rehearsal_run/'eval'/'report.md').read_text(encoding='utf-8')
    assert text.splitlines()[0] == f'# {headline(report)}' and len(text.splitlines()) <= 60
    for name in MODELS: assert f'| {name} | {report["models"][name]["answer_nll"]:.3f} (' in text
    for link in re.findall(r'\]\(([^)]+)\)', text): assert (rehearsal_run/'eval'/link).is_file(), link
    assert '## Limits' in text and 'kofinetune run --recipe recipe.json' in text
    examples = (rehearsal_run/'eval'/'side_by_side.md').read_text(encoding='utf-8')
    assert examples.count('\n| ') == 22     # a head, a line below it, twenty questions


def test_a_changed_gguf_is_noticed_and_a_later_proof_is_not(rehearsal_run, tmp_path, capsys):
    run, recipe = tmp_path/'run', Recipe.named('rehearsal')
    shutil.copytree(rehearsal_run, run, ignore=shutil.ignore_patterns('.lock'))
    manifest = read_manifest(run)
    manifest['stages']['ollama']['files']['verify.json'] = 'written again'
    write_json(manifest, run/'manifest.json')
    evaluate(recipe, run)
    assert 'already done' in capsys.readouterr().out
    manifest['stages']['ollama']['files']['model-q8_0.gguf'] = 'another file'
    write_json(manifest, run/'manifest.json')
    with pytest.raises(ValueError, match='model-q8_0.gguf is not the file that was written'): evaluate(recipe, run)
    del manifest['stages']['ollama']
    write_json(manifest, run/'manifest.json')
    with pytest.raises(FileNotFoundError, match='kofinetune export'): evaluate(recipe, run)
