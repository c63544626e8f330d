"The benchmark of scoring and generation: it runs, and its recorded results say what is promised of them."
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def test_benchmark_writes_what_it_measures(tmp_path):
    out = tmp_path/'speed.json'
    seen = subprocess.run([sys.executable, str(ROOT/'benchmarks'/'eval_speed.py'), '--small', '--rounds', '1', '--threads', '1', '--json', str(out)],
                          capture_output=True, text=True, check=True, encoding='utf-8').stdout
    result = json.loads(out.read_text(encoding='utf-8'))
    assert json.loads(seen.splitlines()[-1]) == result
    assert {case['what'] for case in result['cases']} == {'scoring', 'generation'} and result['versions']['torch']
    assert result['cases'][0]['largest_difference'] < 1e-4 and all(case['ratio'] > 1 for case in result['cases'])


def test_recorded_scoring_is_five_times_as_fast_and_the_same():
    cases = json.loads((ROOT/'benchmarks'/'results'/'eval_speed.json').read_text(encoding='utf-8'))['cases']
    scoring = {case['case']: case for case in cases if case['what'] == 'scoring'}
    assert all(case['largest_difference'] < 1e-4 for case in scoring.values())
    if '270M, packaged rows' not in scoring: pytest.skip('the full size is not recorded yet; run benchmarks/eval_speed.py on an idle machine')
    assert scoring['270M, packaged rows']['ratio'] >= 5
