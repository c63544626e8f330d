"""Every number in README.md and index.ipynb comes from a run's report.json, or from a record of benchmarks/results.

docs/laptop-report.json is the report of one `make run`, copied; index.ipynb prints it and README.md is index.ipynb.
After a change that moves the numbers:
    make run, cp runs/laptop/eval/report.json docs/laptop-report.json, run index.ipynb, python docs/readme.py
"""
import json
import re
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import jsonschema
import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
NAMES = re.compile(r'Gemma(?: 3)?(?: 270[Mm])?|gemma-3-270m[\w.-]*|Q\d_\w|SHA-256 \w+|Python 3\.\d+(?: to 3\.\d+)?|macOS \d+|KoAlpaca v1\.\d|CC BY-NC 4\.0|License 2\.0|4-bit|95 % intervals?|'
                   r'NF4|\d\d\w*\.ipynb|\[\d\d \w')      # what a number is part of when it measures nothing
NUMBER = re.compile(r'[-+]?\d[\d,]*(?:\.\d+)?%?')


@pytest.fixture(scope='module')
def recorded(): return json.loads((ROOT/'docs'/'laptop-report.json').read_text(encoding='utf-8'))


def spellings(recorded):
    "Every way in which a page may write a number of the report: counts whole, the rest with three digits or as a percentage."
    cost = recorded['training']
    seen, kept = {f'{cost["train_runtime"]:.0f}', f'{sum(cost["stage_seconds"].values()) / 60:.1f}'}, ('rows', 'models', 'training', 'outcomes')
    def walk(value):
        if isinstance(value, dict): value = list(value.values())
        if isinstance(value, list): [walk(v) for v in value]
        elif isinstance(value, float): seen.update((f'{value:.3f}', f'{value:.1%}'))
        elif isinstance(value, int): seen.add(f'{value:,}')
    walk([recorded[key] for key in kept])
    return seen


def result(name): return json.loads((ROOT/'benchmarks'/'results'/f'{name}.json').read_text(encoding='utf-8'))


def of_the_benchmarks():
    "What index.ipynb says of KoAlpaca's runs, and of time, memory and disk: whole phrases, so that their numbers are no others'."
    best, gemma = result('koalpaca')['best'], result('gemma')
    sizes = [max(gemma['laptop']['run']['peak_memory_bytes'].values()), best['report']['training']['peak_memory_bytes'], best['folder_bytes'],
             *(gemma['disk'][f'{of}_bytes'] for of in ('packages', 'for_gpus', 'base'))]
    seconds = gemma['laptop']['run']['seconds'], sum(best['stages'].values()), best['stages']['adapter']
    asked = result('answers')['questions']
    ended = [sum(a['stopped'] for row in asked['asked'] for a in row['answers'] if (a['model'], a['sampling']) == (name, asked['sampling']))
             for name in ('base', 'koalpaca-best')]
    losses = [f'{best["report"]["models"][name]["answer_nll"]:.3f}' for name in ('base', 'merged')]
    return ([f'{size / 1e9:.1f} GB' for size in sizes] + [f'{took / 60:.0f} minutes' for took in seconds] + ['first 8,000 rows of KoAlpaca']
            + [f'| of {len(asked["asked"])} answers end by themselves | {ended[0]} | {ended[1]} |', f'nats a token | {losses[0]} | {losses[1]} |'])


def strange_numbers(text, recorded):
    "Numbers of a page that are neither in the report, nor in its examples, nor part of a name."
    text = re.sub(r'```.*?```', '', text, flags=re.S)
    for example in recorded['examples']:
        for key in ('question', 'wanted', 'base', 'tuned'):
            text = text.replace(f'| {example[key].strip().replace("|", chr(92) + "|").replace(chr(10), " ")[:60]} ', '| ')
    for phrase in of_the_benchmarks(): text = re.sub(rf'(?<![\d.,]){re.escape(phrase)}', '', text)
    cell = lambda words: words.strip().replace('|', chr(92) + '|').replace(chr(10), ' ')
    for asked in result('answers')['questions']['asked']:
        for words in [asked['instruction'], asked.get('input', ''), *(a['answer'] for a in asked['answers'])]:
            for shown in (cell(words), cell(words)[:160]): text = text.replace(shown, '') if len(shown) > 5 else text
    return [n for n in NUMBER.findall(NAMES.sub('', text)) if n.strip(',') not in spellings(recorded)]


def page(name):
    "README.md, or the prose and the outputs of index.ipynb."
    if name == 'README.md': return (ROOT/name).read_text(encoding='utf-8')
    cells = nbformat.read(ROOT/'nbs'/name, 4).cells
    outputs = [o['data'].get('text/markdown', '') for c in cells if c.cell_type == 'code' for o in c.outputs if 'data' in o]
    return '\n\n'.join([c.source for c in cells if c.cell_type == 'markdown'] + outputs)


@pytest.mark.parametrize('name', ['README.md', 'index.ipynb'])
def test_every_number_is_the_reports(name, recorded):
    text, tuned = page(name), recorded['models']['tuned']
    assert strange_numbers(text, recorded) == []
    for number in (f'{tuned["answer_nll"]:.3f}', f'{tuned["exact_match"]:.1%}', f'{recorded["training"]["trainable_parameters"]:,}'):
        assert number in text
        assert strange_numbers(text.replace(number, '1.2345'), recorded)


@pytest.mark.parametrize('wrong', ['exact match rose to 93.1%', 'trained in 777 seconds', 'a loss of 0.777', '17x faster', 'over 1,000 rows', 'in 63 minutes', 'it needs 8.5 GB', '30 rows'])
def test_a_number_that_nobody_measured_is_found(wrong, recorded):
    assert strange_numbers(page('README.md') + '\n' + wrong, recorded)


def test_readme_is_the_index_and_the_index_is_the_recorded_report(tmp_path):
    "Running the page again gives what is stored in it."
    notebook = nbformat.read(ROOT/'nbs'/'index.ipynb', 4)
    code = [c for c in notebook.cells if c.cell_type == 'code']
    script = '\n'.join(c.source for c in code).replace('\nMarkdown(', '\nprint(') + "\n"
    script = 'import os, sys; os.chdir(sys.argv[1])\n' + script
    seen = subprocess.run([sys.executable, '-c', script, str(ROOT/'nbs')], capture_output=True, text=True, check=True, encoding='utf-8').stdout
    assert seen.split() == ' '.join(c.outputs[0]['data']['text/markdown'] for c in code).split()


def test_the_recorded_run_keeps_its_promises(recorded):
    "Real Gemma, on rows that it did not train on: what README says of it is what the recipe is for."
    jsonschema.validate(recorded, json.loads((files('kofinetune')/'assets'/'report.schema.json').read_text(encoding='utf-8')))
    base, tuned, cost = recorded['models']['base'], recorded['models']['tuned'], recorded['training']
    assert (recorded['recipe'], recorded['base'], recorded['rows'], recorded['held_out']) == ('laptop', 'gemma-3-270m-q4', 250, True)
    assert 'No number here is about the weights that Google published' in recorded['base_note']
    assert base['exact_match'] <= .02 and tuned['exact_match'] >= .9 and tuned['answer_nll'] <= base['answer_nll'] / 10
    shares = sorted(kind['tuned'] for kind in recorded['kinds'].values())
    assert len(shares) == 10 and shares[1] >= .8 and recorded['kinds']['count']['tuned'] == shares[0] > .2   # counting takes a second epoch; a guess is one in five
    assert cost['peak_memory_bytes'] < 5e9 and cost['trainable_parameters'] == 3_796_992


def test_the_recorded_run_is_of_the_recipe_as_it_is(recorded):
    "Rows, steps and tokens follow from the recipe: a change of `laptop` asks for a new run."
    from kofinetune.recipe import Recipe
    from kofinetune.data import load_rows
    laptop, cost = Recipe.named('laptop'), recorded['training']
    assert cost['rows'] + recorded['rows'] == len(load_rows(laptop.source)) and laptop.valid_rows == recorded['rows']
    assert list(recorded['models']) == ['base', 'tuned', 'merged', *(f'gguf-{kind}' for kind in laptop.gguf)]
    per_step = cost['num_tokens'] / cost['steps'] / laptop.batch_size / laptop.grad_accum
    assert .8 * laptop.max_length < per_step <= laptop.max_length       # packed sequences, nearly full


@pytest.fixture(scope='module')
def costs(): return json.loads((ROOT/'benchmarks'/'results'/'gemma.json').read_text(encoding='utf-8'))


@pytest.mark.parametrize('record, missed', [('laptop_without_amx', []), ('laptop', ['memory', 'exact match'])])
def test_the_recorded_costs_of_gemma_are_within_their_limits(costs, record, missed):
    "benchmarks/gemma.py on a machine that did nothing else: predictions, evaluation on the way, the proof of what is served, memory. In bf16 two miss theirs."
    about = costs if record == 'laptop' else costs[record]
    laptop, machine = about['laptop'], about['machine']
    assert machine['processor'] and machine['cores'] == 2 and costs['versions']['trl']
    assert laptop['estimate']['seconds'] <= 60 and all(.75 < laptop['estimate'][key] < 1.25 for key in ('of_time', 'of_memory'))
    assert laptop['training']['held_out_share'] <= .1
    assert laptop['verify']['seconds'] <= 180 and laptop['verify']['failed'] == [] and laptop['verify']['server'] and laptop['verify']['greedy'] == 20
    assert laptop['run']['registered'] and laptop['run']['seconds'] <= 600 and laptop['exact_match']['base'] <= .02
    held = {'memory': max(laptop['run']['peak_memory_bytes'].values()) < 5e9,
            'exact match': min(share for name, share in laptop['exact_match'].items() if name != 'base') >= .9}
    assert [what for what, is_held in held.items() if not is_held] == missed


def test_the_recorded_evaluation_of_1000_rows_and_the_conversations(costs):
    best, dialogs = costs['best'], costs['dialogs']
    assert (best['scored'], best['answered']) == (1000, 100) and best['stages']['eval'] <= 900
    assert dialogs['held_out'] and dialogs['rows'] == 100 and dialogs['exact_match']['tuned'] >= .8 and dialogs['exact_match']['base'] <= .05
