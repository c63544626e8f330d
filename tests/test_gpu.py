"""What a lent GPU machine runs (benchmarks/gpu.sh), tried on the CPU: the bundles, the measurements, the limits; and the peer beside them."""
import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location('train_speed', ROOT/'benchmarks'/'train_speed.py')
train_speed = importlib.util.module_from_spec(spec)
spec.loader.exec_module(train_speed)


def gpu(*args, **env):
    return subprocess.run(['bash', ROOT/'benchmarks'/'gpu.sh', *map(str, args)], capture_output=True, text=True,
                          env=os.environ | dict(PYTHON=sys.executable, PYTHONPATH=str(ROOT)) | env)


def test_a_dry_run_measures_everything_that_needs_no_gpu(tmp_path):
    done = gpu('dry', OUT=str(tmp_path))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    report = json.loads((tmp_path/'train_speed_gpu.json').read_text(encoding='utf-8'))
    assert [one['name'] for one in report['ablations']] == [name for name in train_speed.ABLATIONS if name not in train_speed.GPU_ALONE]
    assert report['left_out'] == [dict(name=name, where='ablations', why='needs a GPU')
                                  for name in train_speed.ABLATIONS if name in train_speed.GPU_ALONE]
    assert report['ratio'] == report['best_tokens_per_second'] / report['blog_tokens_per_second']
    assert report['loss_difference'] < .005 and report['peak_share'] > 0 and set(report['operators']) == {'blog_fp32', 'best'}
    assert abs(report['runs']['pass'][0]['tokens'] - 2000) < 200
    assert len({one['tokens'] for one in report['ablations']}) == 1   # equal tokens
    assert report['versions']['trl'] and report['machine']['device'].endswith('CPU')
    assert 'adafactor' in done.stdout and 'needs a GPU' in done.stdout


def wheel(folder, name, files):
    "A wheel of a package that holds `files`."
    folder.mkdir(exist_ok=True)
    about = f'{name}-1.0.dist-info'
    with zipfile.ZipFile(folder/f'{name}-1.0-py3-none-any.whl', 'w') as made:
        for file, data in files.items(): made.writestr(f'{name}/{file}', data)
        made.writestr(f'{about}/METADATA', f'Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n')
        made.writestr(f'{about}/WHEEL', 'Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n')
        made.writestr(f'{about}/RECORD', '')


@pytest.fixture(scope='module')
def bundles(tmp_path_factory):
    "Packed rows and a wheel for several cards, in parts of 60 KB."
    folder = tmp_path_factory.mktemp('gpu')
    rows = folder/'mine.json'
    rows.write_text('[{"instruction": "가", "input": "", "output": "나"}]', encoding='utf-8')
    files = {'__init__.py': '', 'lib_cpu.so': b'c', 'lib_cuda118.so': b'o' * 9, 'lib_cuda130.so': os.urandom(90_000), 'lib_rocm72.so': b'r'}
    wheel(folder/'wheels', 'probe', files)
    done = gpu('pack', folder/'bundles', rows, folder/'wheels', BUNDLE_BYTES='60K')
    assert done.returncode == 0, done.stderr
    return folder/'bundles', done.stdout


def test_the_bundles_are_small_and_hold_one_card_and_the_code(bundles, tmp_path):
    folder, said = bundles
    parts = sorted(folder.glob('bundle-*'))
    assert sorted(p.name for p in folder.iterdir()) == [*(p.name for p in parts), 'gpu.sh', 'sums.txt']
    assert len(parts) > 2 and all(part.stat().st_size <= 60 * 1024 and part.name in said for part in parts)
    (tmp_path/'whole').write_bytes(b''.join(part.read_bytes() for part in parts))
    with tarfile.open(tmp_path/'whole') as whole: whole.extractall(tmp_path, filter='data')
    with zipfile.ZipFile(tmp_path/'wheels'/'probe-1.0-py3-none-any.whl') as made: names = made.namelist()
    assert sorted(n for n in names if n.endswith('.so')) == ['probe/lib_cpu.so', 'probe/lib_cuda130.so']
    assert (tmp_path/'rows.json').is_file() and (tmp_path/'kofinetune'/'assets'/'presets.toml').is_file()
    for name in ('train_speed.py', 'gpu.sh'): assert (tmp_path/'benchmarks'/name).read_bytes() == (ROOT/'benchmarks'/name).read_bytes()


def test_a_run_says_what_is_missing(bundles, tmp_path):
    folder, _ = bundles
    if not torch.cuda.is_available():   # the bundles are joined and the wheel is installed before that
        done = subprocess.run(['bash', 'gpu.sh', 'run', '.'], cwd=folder, capture_output=True, text=True, env=os.environ | dict(PYTHON=sys.executable))
        assert done.returncode == 2 and 'no GPU is seen here' in done.stderr and 'gpu.sh dry' in done.stderr
    (tmp_path/'some').mkdir()
    for part in folder.iterdir():
        if part.name != 'bundle-01': (tmp_path/'some'/part.name).write_bytes(part.read_bytes())
    assert 'missing or not whole' in gpu('run', tmp_path/'some').stderr
    assert 'holds no bundles' in gpu('run', tmp_path/'none').stderr
    assert 'is there already' in gpu('pack', folder).stderr
    assert 'is no file' in gpu('pack', tmp_path/'new', tmp_path/'no.json').stderr
    done = gpu()
    assert done.returncode == 2 and 'gpu.sh pack FOLDER' in done.stdout


def run(name, speed=100., loss=2.):
    return dict(name=name, tokens=100, seconds=1., tokens_per_second=speed, loss=loss, peak_memory_bytes=1, parameters=1000,
                versions={}, python='3', command='peer.py')


@pytest.fixture
def asked(tmp_path):
    return argparse.Namespace(blog_rows=512, best_rows=8000, rounds=1, peer=None, pass_tokens=0, ablations=True, profile_rows=0, together=False,
                              seconds=60, end=float('inf'), threads=1, described='a model', json=str(tmp_path/'gpu.json'))


def test_what_was_measured_is_kept_when_the_rest_fails_or_the_time_is_up(asked, monkeypatch):
    seen = []
    def one(name, args, count, top):
        if name == 'matrix_peak': return dict(flops=dict(bf16=8e6), device='a card', capability=None)
        if name == 'best' and seen:   # the file is written after each one
            assert json.loads(Path(args.json).read_text(encoding='utf-8'))['blog_tokens_per_second'] == 100
        seen.append((name, count))
        if name == 'bf16_lora': raise RuntimeError('out of memory')
        if name == 'full': raise subprocess.TimeoutExpired('python', 5)
        if name == 'compile': args.end = 0   # the time is up after this one
        return run(name, 2000. if name == 'best' else 100., 2.002 if name == 'best_same' else 2.)
    monkeypatch.setattr(train_speed, 'one', one)
    report = train_speed.run_plan(asked, cuda=True)
    assert report == json.loads(Path(asked.json).read_text(encoding='utf-8'))
    assert seen == [('blog', 512), ('best', 8000), ('best_same', 16), ('blog_same', 16), *((n, 8000) for n in ('nf4_lora', 'bf16_lora', 'full', 'compile'))]
    assert (report['ratio'], report['peak_share'], round(report['loss_difference'], 6)) == (20, 1, .001)
    assert [one['name'] for one in report['ablations']] == ['nf4_lora', 'compile']
    assert report['left_out'][:2] == [dict(name='bf16_lora', where='ablations', why='out of memory'),
                                      dict(name='full', where='ablations', why='the time was up')]
    assert [one['name'] for one in report['left_out'][2:]] == [*train_speed.ABLATIONS][4:] and report['left_out'][2]['why'] == 'the time was up'


def test_a_figure_that_was_not_measured_is_none(asked, monkeypatch):
    asked.end = 0
    report = train_speed.run_plan(asked, cuda=True)
    assert all(report[key] is None for key in ('blog_tokens_per_second', 'best_tokens_per_second', 'ratio', 'loss_difference', 'peak_share'))
    assert {one['why'] for one in report['left_out']} == {'the time was up'}


def test_rows_of_any_length_attend_within_themselves(monkeypatch):
    "PyTorch's kernel runs on a GPU alone; here a plain loop stands for it, so that shapes, boundaries and heads are held."
    from torch.nn.attention import varlen
    from torch.nn.functional import scaled_dot_product_attention as attend
    def loop(q, k, v, cu_q, cu_k, longest_q, longest_k, *, scale, window_size):
        assert window_size == (-1, 0) and q.shape == k.shape == v.shape == (10, 4, 8) and longest_q == 6
        rows = [attend(*(x[a:b].transpose(0, 1) for x in (q, k, v)), is_causal=True, scale=scale) for a, b in zip(cu_q, cu_q[1:])]
        return torch.cat([row.transpose(0, 1) for row in rows])
    monkeypatch.setattr(varlen, 'varlen_attn', loop)
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 4, 10, 8), torch.randn(1, 1, 10, 8), torch.randn(1, 1, 10, 8)
    bounds = torch.tensor([0, 6, 10], dtype=torch.int32)
    made, _ = train_speed.attend_varlen(None, q, k, v, None, scaling=.5, cu_seq_lens_q=bounds, max_length_q=6)
    row = torch.cat([torch.zeros(6), torch.ones(4)])
    seen = (row[:, None] == row) & torch.ones(10, 10, dtype=torch.bool).tril()
    plain = attend(q, k.expand_as(q), v.expand_as(q), attn_mask=seen, scale=.5).transpose(1, 2)
    assert torch.allclose(made, plain, atol=1e-6)


def test_the_peer_trains_on_the_same_tokens_to_the_same_loss(tmp_path):
    "TRL alone is a peer that is installed here; the one of the published figures has an environment of its own."
    done = subprocess.run([sys.executable, ROOT/'benchmarks'/'train_speed.py', '--model', 'rehearsal', '--together', '--rounds', '1', '--threads', '1',
                           '--blog-rows', '4', '--best-rows', '8', '--profile-rows', '0', '--json', tmp_path/'speed.json', '--peer', sys.executable,
                           '--peer-options', '--library trl --dtype float32 --batch 1'], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads((tmp_path/'speed.json').read_text(encoding='utf-8'))
    runs, peer = report['runs'], report['peer']
    for name in ('{}', '{}_same'): assert runs[name.format('peer')][0]['tokens'] == runs[name.format('bf16_lora')][0]['tokens']
    assert runs['peer'][0]['tokens'] > runs['peer_same'][0]['tokens'] and runs['peer_same'][0]['packing']
    assert peer['loss_difference'] < .005 and peer['ratio'] == peer['our_tokens_per_second'] / peer['peer_tokens_per_second']
    assert peer['versions']['trl'] and '--library trl' in peer['command']
    assert report['left_out'] == []
