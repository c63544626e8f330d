"""Every number in README.md and index.ipynb comes from a run's report.json.

docs/rehearsal-report.json is the report of one rehearsal, copied; index.ipynb prints it and README.md is index.ipynb. Another machine
adds in another order and gets other digits, so the copy is compared with this machine's own run by its intervals.
After a change that moves the numbers:
    cp runs/rehearsal/eval/report.json docs/rehearsal-report.json, run index.ipynb, python docs/readme.py
"""
import json
import re
import subprocess
import sys
from pathlib import Path

import jsonschema
import nbformat
import pytest

from kofinetune.eval import REPORT_SCHEMA

ROOT = Path(__file__).resolve().parent.parent
NAMES = re.compile(r'Gemma(?: 3)?(?: 270M)?|gemma-3-270m|Python 3\.\d+|KoAlpaca v1\.\d|CC BY-NC 4\.0|License 2\.0|4-bit|95 % intervals?|'
                   r'NF4|\d\d\w*\.ipynb|\[\d\d \w')      # what a number is part of when it measures nothing
NUMBER = re.compile(r'[-+]?\d[\d,]*(?:\.\d+)?%?')


@pytest.fixture(scope='module')
def recorded(): return json.loads((ROOT/'docs'/'rehearsal-report.json').read_text(encoding='utf-8'))


def spellings(recorded):
    "Every way in which a page may write a number of the report: counts whole, the rest with three digits or as a percentage."
    seen, kept = {f'{recorded["training"]["train_runtime"]:.0f}'}, ('rows', 'models', 'training', 'outcomes')
    def walk(value):
        if isinstance(value, dict): value = list(value.values())
        if isinstance(value, list): [walk(v) for v in value]
        elif isinstance(value, float): seen.update((f'{value:.3f}', f'{value:.1%}'))
        elif isinstance(value, int): seen.add(f'{value:,}')
    walk([recorded[key] for key in kept])
    return seen


def strange_numbers(text, recorded):
    "Numbers of a page that are neither in the report, nor in its examples, nor part of a name."
    text = re.sub(r'```.*?```', '', text, flags=re.S)
    for example in recorded['examples']:
        for key in ('question', 'wanted', 'base', 'tuned'):
            text = text.replace(f'| {example[key].replace(chr(10), " ")[:60]} ', '| ')
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


@pytest.mark.parametrize('wrong', ['exact match rose to 93.1%', 'trained in 777 seconds', 'a loss of 0.777', '17x faster', 'over 1,000 rows'])
def test_a_number_that_nobody_measured_is_found(wrong, recorded):
    assert strange_numbers(page('README.md') + '\n' + wrong, recorded)


def test_readme_is_the_index_and_the_index_is_the_recorded_report(tmp_path):
    "Running the page again gives what is stored in it."
    notebook = nbformat.read(ROOT/'nbs'/'index.ipynb', 4)
    code = [c for c in notebook.cells if c.cell_type == 'code']
    script = '\n'.join(c.source for c in code).replace('\nMarkdown(', '\nprint(') + "\n"
    script = 'import os, sys; os.chdir(sys.argv[1])\n' + script
    seen = subprocess.run([sys.executable, '-c', script, str(ROOT/'nbs')], capture_output=True, text=True, check=True, encoding='utf-8').stdout
    assert seen.strip() == code[-1].outputs[0]['data']['text/markdown'].strip()


def test_recorded_report_is_what_this_machine_measures(recorded, rehearsal_run):
    "Same rows, and every interval overlaps that of this machine's own rehearsal."
    jsonschema.validate(recorded, REPORT_SCHEMA)
    now = json.loads((rehearsal_run/'eval'/'report.json').read_text(encoding='utf-8'))
    assert list(now['models']) == list(recorded['models']) and now['rows'] == recorded['rows']
    for key in ('rows', 'steps', 'trainable_parameters'): assert now['training'][key] == recorded['training'][key]
    for name, model in recorded['models'].items():
        for measure in ('answer_nll_ci', 'token_accuracy_ci', 'bits_per_byte_ci', 'exact_match_ci'):
            (low, high), (here_low, here_high) = model[measure], now['models'][name][measure]
            assert low <= here_high and here_low <= high, (f'{name} {measure}: recorded {low:.3f} to {high:.3f}, here {here_low:.3f} to '
                f'{here_high:.3f}; if the change is meant: cp runs/rehearsal/eval/report.json docs/rehearsal-report.json')
