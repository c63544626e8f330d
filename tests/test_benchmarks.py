"The benchmarks run, small, and print what they promise."
import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from kofinetune.rehearsal import stand_in_base

ROOT = Path(__file__).resolve().parent.parent


def test_train_speed_measures_both_settings_and_their_losses_agree(tmp_path):
    done = subprocess.run([sys.executable, ROOT/'benchmarks'/'train_speed.py', '--model', stand_in_base(), '--rounds', '1', '--blog-rows', '8',
                           '--best-rows', '16', '--profile-rows', '0', '--threads', '1', '--json', tmp_path/'speed.json'], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report == json.loads((tmp_path/'speed.json').read_text(encoding='utf-8'))
    assert report['ratio'] == report['best_tokens_per_second'] / report['blog_tokens_per_second']
    assert report['loss_difference'] < .005
    assert [len(report['runs'][name]) for name in ('blog', 'blog_fp32', 'best', 'best_same')] == [1, 1, 1, 1]
    assert report['runs']['blog'][0]['tokens'] == report['runs']['best_same'][0]['tokens']   # the same rows
    assert report['versions']['trl'] and report['machine']['cores']


@pytest.mark.parametrize('path', sorted((ROOT/'benchmarks').glob('*.py')), ids=lambda path: path.name)
def test_every_name_that_a_benchmark_takes_from_the_package_is_there(path):
    "Most of them take too long to run here."
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.ImportFrom) and node.module.startswith('kofinetune'):
            names = ', '.join(name.name for name in node.names)
            exec(f'from {node.module} import {names}', {})   # noqa: S102 - a line of ours
