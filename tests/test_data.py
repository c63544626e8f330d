"Rows, sources and run folders: what a notebook cannot show well."
import http.server, json, subprocess, sys, threading

import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st

from kofinetune import runs
from kofinetune.audit import near_pairs
from kofinetune.data import _normalize_row
from kofinetune.recipe import Recipe
from kofinetune.runs import read_jsonl, stage
from kofinetune.data import _fetch, _git_blob_id, prepare, split_rows


def post_script(path):
    "The file that the post's script writes: read_json, then one json.dumps a row."
    lines = []
    for _, row in pd.read_json(path).iterrows():
        entry = {'instruction': row['instruction'], 'input': row['input'], 'output': row['output']}
        lines.append(json.dumps(entry, ensure_ascii=False) + '\n')
    return ''.join(lines).encode()


@pytest.mark.koalpaca
def test_blog_file_is_the_posts_byte_for_byte(koalpaca, tmp_path):
    counts = prepare(Recipe.named('blog').replace(source=str(koalpaca)), tmp_path)
    assert (tmp_path/'data'/'train.jsonl').read_bytes() == post_script(koalpaca)
    assert counts['train'] == counts['rows'] == 8000


@pytest.mark.koalpaca
def test_best_drops_only_what_the_audit_names(koalpaca, tmp_path):
    counts = prepare(Recipe.named('best').replace(source=str(koalpaca), valid_rows=1000), tmp_path)
    audit = json.loads((tmp_path/'data'/'audit.json').read_text(encoding='utf-8'))
    assert counts['rows'] == 8000 == counts['kept'] + counts['reported']
    assert counts['valid'] == 1000
    rows = json.loads(koalpaca.read_text(encoding='utf-8'))
    assert audit['flags']['empty_answer']['rows'] == [i for i, r in enumerate(rows) if not r['output'].strip()]
    train, valid = (read_jsonl(tmp_path/'data'/f'{part}.jsonl') for part in ('train', 'valid'))
    question = lambda row: (row['instruction'], row['input'])
    assert not set(map(question, train)) & set(map(question, valid))
    side = {question(row): part for part, rows in (('train', train), ('valid', valid)) for row in rows}
    both = train + valid
    assert all(side[question(both[i])] == side[question(both[j])] for i, j in near_pairs(both))


def blob_id(body, folder):
    path = folder/'body'
    path.write_bytes(body)
    seen = _git_blob_id(path)
    path.unlink()
    return seen


@pytest.fixture
def server(tmp_path):
    "A loopback server whose files can change; yields (address, dict of path -> bytes, list of paths asked for)."
    files, asked = {}, []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            body = files.get(self.path)
            self.send_response(200 if body is not None else 404)
            self.send_header('Content-Length', str(len(body or b'')))
            self.end_headers()
            self.wfile.write(body or b'')

        def log_message(self, *args): pass

    httpd = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{httpd.server_port}', files, asked
    httpd.shutdown()


def test_download_is_checked_kept_and_not_asked_for_again(server, tmp_path, monkeypatch):
    monkeypatch.setenv('KOFINETUNE_CACHE', str(tmp_path))
    address, files, asked = server
    files['/rows.json'] = '[{"instruction": "안녕?", "output": "네."}]'.encode()
    blob = blob_id(files['/rows.json'], tmp_path)
    first, second = (_fetch(f'{address}/rows.json', blob) for _ in range(2))
    assert first == second and first.read_bytes() == files['/rows.json'] and asked == ['/rows.json']


def test_moved_file_is_refused_with_both_ids(server, tmp_path, monkeypatch):
    monkeypatch.setenv('KOFINETUNE_CACHE', str(tmp_path))
    address, files, _ = server
    files['/rows.json'] = b'[]'
    with pytest.raises(ValueError, match=f'0637a088a01e8ddab3bf3fa98dbe804cbde1a0dc.*{"0" * 40}'):   # git's id of []
        _fetch(f'{address}/rows.json', '0' * 40)


def test_download_that_breaks_off_leaves_nothing_and_works_the_next_time(tmp_path, monkeypatch):
    monkeypatch.setenv('KOFINETUNE_CACHE', str(tmp_path))
    body, broken = b'[{"instruction": "a", "output": "b"}]' * 1000, [True]

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header('Content-Length', str(len(body)))
            self.end_headers()
            self.wfile.write(body[:2000] if broken else body)
            if broken: broken.clear()

        def log_message(self, *args): pass

    httpd = http.server.HTTPServer(('127.0.0.1', 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    url, blob = f'http://127.0.0.1:{httpd.server_port}/rows.json', blob_id(body, tmp_path)
    with pytest.raises(RuntimeError, match='could not be downloaded.*try again with a network'):
        _fetch(url, blob)
    assert [p.name for p in tmp_path.rglob('*') if p.is_file() and p.suffix != '.lock'] == []
    assert _fetch(url, blob).read_bytes() == body
    httpd.shutdown()


def test_without_a_network_the_error_says_where_to_put_the_file(tmp_path, monkeypatch):
    monkeypatch.setenv('KOFINETUNE_CACHE', str(tmp_path))
    with pytest.raises(RuntimeError, match=f'try again with a network.*put it at {tmp_path}'):
        _fetch('http://127.0.0.1:9/ko_alpaca_data.json', '0' * 40)
    assert [p.name for p in tmp_path.rglob('*') if p.is_file() and p.suffix != '.lock'] == []


def test_git_agrees_on_the_blob_id(tmp_path):
    body = '한글\n'.encode()
    seen = subprocess.run(['git', 'hash-object', '--stdin'], input=body, capture_output=True, check=True).stdout
    assert blob_id(body, tmp_path) == seen.decode().strip()


row = st.fixed_dictionaries(dict(instruction=st.text(min_size=1, max_size=4), input=st.text(max_size=2), output=st.text(max_size=4)))


@settings(deadline=None, max_examples=60)
@given(rows=st.lists(row, min_size=2, max_size=30), seed=st.integers(0, 5), share=st.floats(0, .9))
def test_split_loses_nothing_and_never_shares_a_question(rows, seed, share):
    train, valid = split_rows(rows, int(len(rows) * share), seed)
    key = lambda r: json.dumps(r, sort_keys=True)
    assert sorted(map(key, train + valid)) == sorted(map(key, rows))
    assert len(valid) <= int(len(rows) * share)
    question = lambda r: (r['instruction'], r['input'])
    assert not set(map(question, train)) & set(map(question, valid))


LABELS = {'긍정': 500, '부정': 330, '중립': 170}


@pytest.mark.parametrize('field', ['output', 'kind'])
@pytest.mark.parametrize('seed', range(6))
def test_held_out_rows_have_the_class_shares_of_the_file(field, seed):
    rows = [dict(instruction='나누세요.', input=f'{label} {i % (n // 2)}번 글', output=f'{i}번의 답', kind='') | {field: label}
            for label, n in LABELS.items() for i in range(n)]      # each question is there twice, so groups are of two
    pairs = near_pairs(rows)
    for most in (100, 60, 40):
        train, valid = split_rows(rows, most, seed, pairs)
        assert len(valid) == most and split_rows(rows[::-1], most, seed)[1] == valid[::-1]
        assert all(abs(sum(row[field] == label for row in valid) / most - n / 1000) <= .05 for label, n in LABELS.items())
        assert not {row['input'] for row in train} & {row['input'] for row in valid}
    assert valid != split_rows(rows, most, seed + 1)[1]


def test_a_split_that_is_skewed_by_long_rows_is_set_right():
    "Many short copies and few long rows: the hash alone would hold out the wrong shares."
    rows = [dict(instruction='나누세요.', input=f'{label}{i}', output=label) for label, n in (('가', 150), ('나', 100), ('다', 50)) for i in range(n)]
    for seed in range(30):
        held = [row['output'] for row in split_rows(rows, 60, seed)[1]]
        assert all(abs(held.count(label) - n) <= 3 for label, n in (('가', 30), ('나', 20), ('다', 10)))


@pytest.mark.parametrize('count', range(13))
def test_small_files_are_split(count):
    rows = [dict(instruction=f'{i}번?', input='', output='참' if i % 3 else '거짓') for i in range(count)]
    for most in range(max(count, 1)): assert [len(part) for part in split_rows(rows, most)] == [count - most, most]


def test_line_ends_of_windows_become_one_character():
    assert _normalize_row(dict(output='가\r\n나\r다\n라 ')) == dict(output='가\n나\n다\n라')


def test_manifest_says_where_the_rows_came_from(tmp_path):
    source = tmp_path/'rows.jsonl'
    source.write_text('{"instruction": "안녕?", "output": "네."}\n' * 3, encoding='utf-8')
    prepare(Recipe.named('rehearsal').replace(source=str(source), valid_rows=0), tmp_path/'run')
    seen = runs.read_manifest(tmp_path/'run')['stages']['data']['result']['provenance']
    assert seen == dict(source=str(source), url=None, blob=_git_blob_id(source))


def test_changed_source_is_noticed(tmp_path):
    source = tmp_path/'rows.jsonl'
    source.write_text('{"instruction": "안녕?", "output": "네."}\n', encoding='utf-8')
    recipe = Recipe.named('rehearsal').replace(source=str(source), valid_rows=0)
    prepare(recipe, tmp_path/'run')
    source.write_text('{"instruction": "안녕?", "output": "아니요."}\n', encoding='utf-8')
    with pytest.raises(ValueError, match='files that have changed since'): prepare(recipe, tmp_path/'run')


def test_importing_data_needs_no_torch():
    code = 'import sys, kofinetune.data; print([m for m in ("torch", "transformers", "pandas") if m in sys.modules])'
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout.strip() == '[]'


def test_stage_is_whole_or_absent(tmp_path):
    def half(folder):
        (folder/'train.jsonl').write_text('{', encoding='utf-8')
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): stage(Recipe(), tmp_path, 'data', half)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['.lock']
    assert runs.read_manifest(tmp_path)['stages'] == {}


def test_second_process_on_a_run_is_refused_and_a_dead_one_holds_nothing(tmp_path):
    code = ('import sys; from kofinetune.runs import run_lock\n'
            'with run_lock(sys.argv[1]): print("held", flush=True); sys.stdin.read()')
    other = subprocess.Popen([sys.executable, '-c', code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == 'held\n'
    with pytest.raises(RuntimeError, match='in use by another process'):
        with runs.run_lock(tmp_path): pass
    other.kill()
    other.wait()
    with runs.run_lock(tmp_path): pass
