"The blind sheet in a real browser, and a judge behind a real server: what is counted, and what is refused."
import csv
import json
import re
import shutil
import threading
import time
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from kofinetune.data import Recipe, load_rows, read_jsonl
from kofinetune.eval import (ask_judge, count_wins, draw_pairs, judge_pairs, measure_agreement, measure_judge, plant_pairs, read_sheet,
                             weigh_judge, write_sheet)

HOSTILE = ['</script><script>window.hacked = 1</script>', '<img src=x onerror="window.hacked = 1">', '{{ 7 * 7 }}', '"quoted", \'so\'',
           '\n첫 줄이 비었다\r\n둘째 줄', '=HYPERLINK("x")', '가나다 ㄱㄴㄷ 한글 𠀋 🙂', '   ', 'x' * 3000]
PAIRS = [dict(id=i * 7, question=f'질문 {i}: {text}', base=f'답 하나 {text}', tuned=f'답 둘 {text}') for i, text in enumerate(HOSTILE)]


@pytest.fixture(scope='module')
def browser():
    program = shutil.which('chromium')
    if not program: pytest.skip('no chromium on PATH; apt-get install --no-install-recommends chromium fonts-nanum')
    sync = pytest.importorskip('playwright.sync_api', reason='playwright is missing; pip install playwright')
    with sync.sync_playwright() as p:
        made = p.chromium.launch(executable_path=program, args=['--no-sandbox'])
        yield made
        made.close()


def opened(browser, sheet, **options):
    "A new profile with the sheet open; everything it asks the network for is noted."
    context = browser.new_context(accept_downloads=True, **options)
    page = context.new_page()
    page.asked, page.faults = [], []
    page.on('request', lambda r: page.asked.append(r.url))
    page.on('pageerror', lambda e: page.faults.append(str(e)))
    page.goto(sheet.as_uri())
    return page


def download(page, path):
    with page.expect_download() as got: page.get_by_role('button', name='CSV').click()
    got.value.save_as(path)
    return path


def choose(page, number, label):
    page.get_by_role('group', name=f'{number} / {len(PAIRS)}').get_by_label(label).check()


def test_a_person_fills_in_the_sheet(browser, tmp_path):
    sheet = write_sheet(PAIRS, tmp_path, seed=3)
    page = opened(browser, sheet)
    order = json.loads((tmp_path/'key.json').read_text(encoding='utf-8'))['order']
    choose(page, 1, 'A가 낫다'); choose(page, 2, 'B is better'); choose(page, 3, 'Tie')
    page.get_by_label('Note').nth(3).fill('메모, "따옴표"\n=1+1')
    page.get_by_label('Note').nth(4).fill('=1+1')
    assert page.locator('output').text_content() == f'3 / {len(PAIRS)}'
    page.reload()                                                     # what was chosen is still there
    assert page.locator('input:checked').count() == 3 and page.locator('output').text_content() == f'3 / {len(PAIRS)}'
    file = download(page, tmp_path/'filled.csv')
    assert file.read_bytes().startswith(b'\xef\xbb\xbf')
    verdicts = read_sheet(file, tmp_path/'key.json')
    assert [v['winner'] for v in verdicts] == [order['0'][0], order['7'][1], 'tie'] + [None] * 6
    assert verdicts[3]['note'] == '메모, "따옴표"\n=1+1' and verdicts[4]['note'] == "'=1+1"      # Excel shows it and does not run it
    counts = count_wins(verdicts)
    assert (counts['ties'], counts['open'], counts['wins'] + counts['losses']) == (1, 6, 2)
    assert not page.faults


def test_the_sheet_shows_hostile_text_as_text_and_asks_nobody(browser, tmp_path):
    page = opened(browser, write_sheet(PAIRS, tmp_path))
    shown = page.locator('.text').all_text_contents()
    for pair in PAIRS:
        for text in (pair['question'], pair['base'], pair['tuned']): assert text.replace('\r\n', '\n') in shown
    assert page.evaluate('window.hacked') is None and page.asked == [(tmp_path/'sheet.html').as_uri()] and not page.faults
    text = (tmp_path/'sheet.html').read_text(encoding='utf-8')
    assert not re.search(r'https?://|\btuned\b|\bbase\b', text)


def test_the_sheet_works_by_keyboard_alone(browser, tmp_path):
    page = opened(browser, write_sheet(PAIRS, tmp_path))
    page.keyboard.press('Tab'); page.keyboard.press('Tab')            # the button, the first question
    assert page.evaluate('document.activeElement.name') == 'q1'
    page.keyboard.press('Space')
    page.keyboard.press('ArrowRight')
    assert page.evaluate('document.activeElement.value') == 'tie'
    page.keyboard.press('b')
    assert page.evaluate('document.querySelector("input[name=q1]:checked").value') == 'B'
    page.keyboard.press('Tab'); page.keyboard.type('at b')            # in a note, letters are letters
    assert page.evaluate('document.querySelector("input[name=q1]:checked").value') == 'B'
    assert page.get_by_label('Note').first.input_value() == 'at b'
    page.keyboard.press('Tab')
    assert page.evaluate('document.activeElement.name') == 'q2'


@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_the_sheet_fits_a_phone_and_can_be_read(browser, tmp_path, scheme):
    page = opened(browser, write_sheet(PAIRS, tmp_path), viewport=dict(width=360, height=740), color_scheme=scheme, has_touch=True)
    assert page.evaluate('document.documentElement.scrollWidth') <= 360
    assert min(box['height'] for box in (l.bounding_box() for l in page.locator('.choices label').all())) >= 44
    contrast = page.evaluate('''() => {
      const light = c => c.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255).map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
        .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
      const behind = e => { while (e && getComputedStyle(e).backgroundColor === 'rgba(0, 0, 0, 0)') e = e.parentElement;
                            return getComputedStyle(e).backgroundColor; };
      return [...document.querySelectorAll('h1, h2, p, .en, .text, legend, button, label')].map(e => {
        const [a, b] = [light(getComputedStyle(e).color), light(behind(e))].sort((x, y) => y - x);
        return (a + .05) / (b + .05); }); }''')
    assert min(contrast) >= 4.5                                       # WCAG AA
    page.screenshot(path=tmp_path/f'{scheme}.png')


def test_two_people_and_their_agreement(browser, tmp_path):
    sheet, answers = write_sheet(PAIRS, tmp_path), ('AABBtABAA', 'AABBtABBt')
    said = []
    for person, line in enumerate(answers):
        page = opened(browser, sheet)
        assert page.locator('input:checked').count() == 0             # another browser, another person
        for number, c in enumerate(line, 1): choose(page, number, dict(A='A가 낫다', B='B가 낫다', t='비슷하다')[c])
        said.append(read_sheet(download(page, tmp_path/f'{person}.csv'), tmp_path/'key.json'))
        page.context.close()
    seen = measure_agreement(*said)
    metrics = pytest.importorskip('sklearn.metrics', reason='scikit-learn comes with the bench extra')
    assert seen['pairs'] == 9 and seen['same'] == 7 / 9
    assert seen['kappa'] == pytest.approx(metrics.cohen_kappa_score(*[[v['winner'] for v in s] for s in said]))


def test_the_order_is_drawn_for_each_question(tmp_path):
    pairs = [dict(id=i, question='q', base='x', tuned='y') for i in range(400)]
    def order(seed, some=pairs):
        write_sheet(some, tmp_path, seed=seed)
        return json.loads((tmp_path/'key.json').read_text(encoding='utf-8'))['order']
    first = order(0)
    assert 160 < sum(o[0] == 'tuned' for o in first.values()) < 240
    assert order(0) == first != order(1)
    assert order(0, pairs[5:9]) == {str(i): first[str(i)] for i in range(5, 9)}   # whatever else is on the sheet
    assert list(tmp_path.iterdir()) and {p.name for p in tmp_path.iterdir()} == {'sheet.html', 'key.json'}


def test_a_sheet_that_was_tampered_with_is_refused(tmp_path):
    write_sheet(PAIRS, tmp_path)
    sheet = json.loads((tmp_path/'key.json').read_text(encoding='utf-8'))['sheet']
    def read(lines, name=sheet):
        with (tmp_path/'f.csv').open('w', encoding='utf-8', newline='') as f:
            csv.writer(f).writerows([['sheet', 'id', 'number', 'choice', 'note'], *([name, *line] for line in lines)])
        return read_sheet(tmp_path/'f.csv', tmp_path/'key.json')
    lines = [[p['id'], 1, 'A', ''] for p in PAIRS]
    assert len(read(lines)) == len(PAIRS)
    for wrong, says in ((lines[:-1], 'has 8 of 9 questions'), ([[99, 1, 'A', '']], "id '99'"), (lines[:1] * 2, 'twice'),
                        ([[0, 1, 'C', '']], "choice 'C'")):
        with pytest.raises(ValueError, match=says): read(wrong)
    with pytest.raises(ValueError, match='use its own key'): read(lines, 'another')


def test_the_interval_holds_the_truth_as_often_as_it_says():
    import random
    draw, inside = random.Random(0), 0
    for _ in range(400):
        low, high = count_wins([dict(id=i, winner=draw.choices(['tuned', 'base'], [.7, .3])[0]) for i in range(20)])['share_ci']
        inside += low <= .7 <= high
    assert .92 < inside / 400 < .99
    z, n, p = 1.959964, 20, .75                                       # Wilson's formula, by hand
    middle, half = (p + z * z / 2 / n) / (1 + z * z / n), z / (1 + z * z / n) * (p * (1 - p) / n + z * z / 4 / n / n) ** .5
    seen = count_wins([dict(id=i, winner='tuned' if i < 15 else 'base') for i in range(n)])
    assert seen['share_ci'] == pytest.approx([middle - half, middle + half], abs=1e-5) and seen['p_value'] == pytest.approx(.0414, abs=1e-4)
    assert count_wins([dict(id=0, winner='tie'), dict(id=1, winner=None)]) == dict(
        wins=0, ties=1, losses=0, open=1, share=None, share_ci=None, p_value=None)


# A judge behind a server of the test's own, which speaks OpenAI's protocol and can be told to fail.

@contextmanager
def judge_server(answer):
    "Serve /v1/chat/completions; `answer` takes the request and returns (status, body)."
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
            server.seen.append(dict(path=self.path, key=self.headers.get('Authorization'), body=asked))
            status, body = answer(asked['messages'][-1]['content'])
            try:
                self.send_response(status); self.send_header('Content-Type', 'application/json'); self.end_headers()
                self.wfile.write(body if isinstance(body, bytes) else json.dumps(body).encode())
            except (BrokenPipeError, ConnectionResetError): pass      # the client gave up waiting
        def log_message(self, *args): pass
    server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    server.seen, server.url = [], f'http://127.0.0.1:{server.server_port}/v1'
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try: yield server
    finally: server.shutdown(); server.server_close(); thread.join(5)


def completion(text): return 200, dict(choices=[dict(message=dict(role='assistant', content=text))])
def parts(prompt): return re.search(r'\[Question\]\n(.*)\n\n\[Answer A\]\n(.*)\n\n\[Answer B\]\n(.*)\n\nReply', prompt, re.S).groups()


@pytest.fixture(scope='module')
def rows(): return load_rows('rehearsal')[:300]


def test_a_good_judge_is_accepted_after_it_has_been_weighed(rows, monkeypatch, tmp_path):
    monkeypatch.setenv('OPENAI_API_KEY', 'sk-secret-of-the-test')
    planted, names = plant_pairs(rows), ('right', 'wrong')
    truth = {p['question']: p['right'] for p in plant_pairs(rows, len(rows))}
    pairs = [dict(id=p['id'], question=p['question'], base=p['wrong'], tuned=p['right']) for p in plant_pairs(rows, 12, seed=9)]
    pairs[0] |= dict(tuned='모름'); pairs[1] |= dict(base=pairs[1]['tuned'], tuned='모름')
    def answer(prompt):
        question, a, b = parts(prompt)
        right = [x == truth[question] for x in (a, b)]
        return completion('**A**.' if right == [True, False] else 'b' if right == [False, True] else 'Tie')
    with judge_server(answer) as server:
        ask = partial(ask_judge, model='judge', base_url=server.url)
        judged, verdicts = judge_pairs(planted, ask, names), judge_pairs(pairs, ask)
    assert [v['winner'] for v in verdicts] == ['tie', 'base'] + ['tuned'] * 10
    human = [dict(id=v['id'], winner='tie' if i == 5 else v['winner'], note='') for i, v in enumerate(verdicts)]
    weighed = weigh_judge(judged, verdicts, human)
    assert weighed['refused'] == [] and weighed['planted']['right'] == 20 and weighed['agreement']['same'] == 11 / 12
    assert (weighed['scores']['wins'], weighed['scores']['ties'], weighed['scores']['losses']) == (10, 1, 1)
    assert weighed['order'] == dict(asked=64, failed={}, flips=0.0, first=pytest.approx(.5, abs=.01))
    assert {s['path'] for s in server.seen} == {'/v1/chat/completions'} and len(server.seen) == 64
    assert all(s['body']['temperature'] == 0 and s['key'] == 'Bearer sk-secret-of-the-test' for s in server.seen)
    assert 'sk-secret' not in json.dumps([weighed, verdicts, judged, [s['body'] for s in server.seen]])
    assert weigh_judge(judged, verdicts)['scores'] is None            # no human sheet, no scores
    alike = [dict(v, winner='tuned') for v in verdicts]                # kappa is undefined where all say the same
    assert weigh_judge(judged, alike, alike)['refused'] == []
    guesses = [dict(v, winner=('right', 'wrong')[i % 2]) for i, v in enumerate(judged)]
    assert weigh_judge(guesses, alike, alike)['refused'] == ['it found 10 of 20 planted answers, no surer than a coin']
    disagreeing = [dict(v, winner='base') for v in human]
    assert 'kappa' in weigh_judge(judged, verdicts, disagreeing)['refused'][0]


def test_failures_are_counted_and_leave_their_pair_open(rows, monkeypatch):
    monkeypatch.delenv('OPENAI_API_KEY', raising=False)
    replies = iter([completion('A'), (500, {}), completion('I like A best'), completion('B'), (200, b'<html>'), (200, dict(error='x')),
                    'slow', (429, {}), completion('A'), completion('B'), completion(None), completion('TIE')])
    def answer(prompt):
        reply = next(replies)
        if reply == 'slow': time.sleep(1.5); return completion('A')
        return reply
    planted = plant_pairs(rows, 6)
    with judge_server(answer) as server:
        verdicts = judge_pairs(planted, partial(ask_judge, model='m', base_url=server.url, timeout=.5), ('right', 'wrong'))
    seen = measure_judge(verdicts)
    assert seen['asked'] == 12 and seen['failed'] == {'HTTP 500': 1, 'no verdict': 2, 'not a completion': 2, 'timeout': 1, 'HTTP 429': 1}
    assert [v['winner'] for v in verdicts] == [None, None, None, None, 'right', None]
    assert len(verdicts) == len(planted) and count_wins(verdicts, 'right')['open'] == 5
    assert server.seen[0]['key'] is None
    weighed = weigh_judge(verdicts)                                   # one of six: the five open pairs count against it
    assert weighed['planted'] == dict(right=1, of=6, share_ci=weighed['planted']['share_ci']) and weighed['scores'] is None
    closed = ask_judge('q', 'a', 'b', 'm', server.url)
    assert closed == (None, 'ConnectError')


def test_a_judge_that_prefers_the_first_answer_is_found_out(rows):
    with judge_server(lambda prompt: completion('A')) as server:
        verdicts = judge_pairs(plant_pairs(rows, 8), partial(ask_judge, model='m', base_url=server.url), ('right', 'wrong'))
    assert measure_judge(verdicts) == dict(asked=16, failed={}, flips=1.0, first=1.0)
    assert {v['winner'] for v in verdicts} == {'tie'} and weigh_judge(verdicts)['scores'] is None


@pytest.mark.ollama
def test_the_rehearsals_model_on_ollama_is_no_judge(rows, ollama_server, rehearsal_run):
    from kofinetune.export import export_ollama, server_url
    export_ollama(Recipe.named('rehearsal'), rehearsal_run)
    ask = partial(ask_judge, model='kofinetune-rehearsal', base_url=server_url() + '/v1')
    pairs = draw_pairs(read_jsonl(rehearsal_run/'eval'/'answers.jsonl'), n=12)
    human = [dict(id=p['id'], winner='tuned', note='') for p in pairs]
    weighed = weigh_judge(judge_pairs(plant_pairs(rows), ask, ('right', 'wrong')), judge_pairs(pairs, ask), human)
    assert weighed['scores'] is None and weighed['refused'] and weighed['planted']['of'] == 20
    assert weighed['order']['asked'] == 64
    assert set(weighed['order']['failed']) <= {'no verdict'}          # it was really asked, and it answered
    missing = judge_pairs(pairs[:1], partial(ask, model='nobody'))
    assert missing[0]['failures'] == ['HTTP 404', 'HTTP 404']
