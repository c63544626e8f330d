"""The built site as a reader meets it: served under a sub-path, in both languages and themes, on a desk and on a phone.

What can be read from the files alone (links, twins, catalogues) is tested in tests/test_docs.py.
"""
import http.server
import json
import os
import re
import sys
import threading
import time
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from driver import SHOTS, chromium  # noqa: F401  chromium is a fixture

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT/'docs'))
from measure import faults, measure   # noqa: E402

SITE = ROOT/'_site'
UNDER = '/kofinetune/'
LANGUAGES = {'en': '', 'ko': 'ko/'}
NOTEBOOKS = sorted(path.stem for path in (ROOT/'nbs').glob('*.ipynb') if path.stem != 'index')


@pytest.fixture(scope='module')
def built(site):
    "The names of all pages."
    return sorted(path.relative_to(site).as_posix() for path in site.rglob('*.html') if '_static' not in path.parts)


def address(page):
    "What a browser asks for."
    return UNDER + page


def is_korean(page): return page.startswith('ko/')
def of(language, pages): return [p for p in pages if is_korean(p) == (language == 'ko')]


class Handler(http.server.SimpleHTTPRequestHandler):
    "Serve _site under the sub-path, and its 404 page for what is not there, as GitHub Pages does."
    protocol_version = 'HTTP/1.1'
    def translate_path(self, path):
        path = unquote(urlsplit(path).path)
        return str(SITE/path[len(UNDER):]) + ('/' if path.endswith('/') else '') if path.startswith(UNDER) else str(SITE/'outside')

    def send_error(self, code, *args, **kwargs):
        if code != 404 or not (SITE/'404.html').is_file(): return super().send_error(code, *args, **kwargs)
        text = (SITE/'404.html').read_bytes()
        self.send_response(404)
        self.send_header('Content-Type', 'text/html; charset=utf-8')
        self.send_header('Content-Length', str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *args): pass


@pytest.fixture(scope='module')
def url(built):
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}'
    server.shutdown()


@pytest.fixture
def page(chromium):
    page = chromium.new_page(viewport=dict(width=1280, height=900))
    yield page
    page.close()


def theme(page, name): page.evaluate('name => { document.documentElement.dataset.theme = name; document.documentElement.dataset.mode = name }', name)


# A notebook has thousands of coloured words and of table cells. Of each kind axe looks at the first; other words become plain
# text, and other rows go.
ALIKE = '''() => { const seen = new Set();
    for (const word of document.querySelectorAll('.highlight span, .sig span')) {
        if (word.children.length) continue;
        seen.has(word.className) ? word.replaceWith(word.textContent) : seen.add(word.className);
    }
    for (const row of document.querySelectorAll('tbody tr')) {
        const like = [row, ...row.querySelectorAll('*')].map(n => n.tagName + n.className).join();
        seen.has(like) ? row.remove() : seen.add(like);
    }
    document.body.normalize(); }'''
AXE = '''async rules => (await axe.run(document, {resultTypes: ['violations'], preload: false, ...rules})).violations
    .filter(v => ['serious', 'critical'].includes(v.impact))
    .map(v => `${v.id}: ${v.nodes.length} times, first ${v.nodes[0].target} ${v.nodes[0].failureSummary.split('\\n')[1]}`)'''
# What is wider than the window: the page itself scrolls sideways, or would if it did not cut the rest off.
WIDE = '''() => document.documentElement.scrollWidth <= innerWidth ? null : [document.documentElement.scrollWidth,
    ...[...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1 && !e.closest('.sidebar-primary-item, dialog'))
        .slice(0, 3).map(e => e.tagName + '.' + e.className)].join(' ')'''


@pytest.fixture(scope='module')
def walk(built, url, chromium):
    "Every page once, on a phone and on a desk in both themes: what it asked for, complained of, and how it measures."
    import axe_playwright_python
    axe = (Path(axe_playwright_python.__file__).parent/'axe.min.js').read_text(encoding='utf-8')
    seen, page = {}, chromium.new_page()
    for name in built:
        here = seen[name] = dict(outside=[], complaints=[], axe=[])
        handlers = dict(
            request=lambda r: r.url.startswith((url, 'data:', 'blob:')) or here['outside'].append(r.url),
            console=lambda m: m.type == 'error' and 'Failed to load resource' not in m.text and here['complaints'].append(m.text),
            response=lambda r: r.status >= 400 and here['complaints'].append(f'{r.status} {r.url}'),
            pageerror=lambda e: here['complaints'].append(str(e)))
        for event, handler in handlers.items(): page.on(event, handler)
        page.set_viewport_size(dict(width=390, height=844))
        page.goto(url + address(name), wait_until='load')
        start = time.monotonic()
        here['wide'] = page.evaluate(WIDE)
        here['limits'] = faults(name, 'phone', measure(page, 'phone'))
        if os.environ.get('KOFINETUNE_SHOTS'): shoot(page, f'{name}-phone')
        page.set_viewport_size(dict(width=1280, height=900))
        here['limits'] += faults(name, 'desk', measure(page, 'desk'))
        if os.environ.get('KOFINETUNE_SHOTS'):
            for look in ('dark', 'light'): theme(page, look); shoot(page, f'{name}-{look}')
        page.add_style_tag(content='* { transition: none !important }')     # a colour on its way to another is not judged
        page.evaluate(axe)
        page.evaluate(ALIKE)
        for look, rules in (('light', {}), ('dark', dict(runOnly=['color-contrast']))):
            theme(page, look)
            here['axe'] += [f'{look}: {what}' for what in page.evaluate(AXE, rules)]
        here['seconds'] = round(time.monotonic() - start, 1)
        for event, handler in handlers.items(): page.remove_listener(event, handler)
        (SHOTS/'site.json').write_text(json.dumps(seen, ensure_ascii=False, indent=1), encoding='utf-8')
    page.close()
    return seen


def shoot(page, name): page.screenshot(path=SHOTS/f'site-{name.replace("/", "-").removesuffix("index.html")}.png', full_page=True)


@pytest.mark.parametrize('language', LANGUAGES)
@pytest.mark.parametrize('what', ['outside', 'complaints', 'axe', 'wide', 'limits'], ids=[
    'no_request_leaves_the_site', 'no_error_in_the_console', 'no_barrier_that_axe_calls_serious', 'nothing_sideways_on_a_phone', 'nothing_cut_and_no_lesson_too_long'])
def test_on_every_page(walk, what, language):
    pages = of(language, walk)
    assert len(pages) > len(NOTEBOOKS)
    wrong = {page: walk[page][what] for page in pages if walk[page][what]}
    assert wrong == {}, f'{len(wrong)} of {len(pages)} pages: {json.dumps(wrong, ensure_ascii=False, indent=1)[:3000]}'


def search(page, url, language, words):
    "Type into the page's own search field; the titles and the excerpts found."
    page.goto(url + UNDER + LANGUAGES[language])
    page.locator('.search-button, .search-button__button, .search-button-field').locator('visible=true').first.click()
    page.locator('input[type=search]').locator('visible=true').first.fill(words)
    page.keyboard.press('Enter')
    page.wait_for_url('**/search.html?**')
    page.wait_for_selector('#search-results .search-summary')
    return page.locator('#search-results ul.search > li').all_inner_texts()


@pytest.mark.parametrize('language,words,pages', [('en', 'out of memory', ['01_qlora_train', 'troubleshooting'])] + [(language, *wanted) for language in LANGUAGES for wanted in (
    ('파인튜닝', ['choose', 'glossary', 'index', '01_qlora_train']), ('미세조정', ['choose', 'glossary', 'index', '01_qlora_train']),
    ('조정', ['choose', 'glossary', 'index', '01_qlora_train']), ('튜닝', ['choose', 'glossary', 'index', '01_qlora_train']), ('양자화', ['01_qlora_train', '03_ollama_export']), ('랭크', ['01_qlora_train']),
    ('BOS', ['03_ollama_export']), ('format_prompt', ['prompt', '00_data']),
    ('어댑터', ['01_qlora_train', '02_merge']))])
def test_search_finds_the_right_page_first(url, page, language, words, pages):
    "With a snippet in the page's language that has the word, or what it is called in the other language."
    found = search(page, url, language, words)
    page.screenshot(path=SHOTS/f'site-search-{language}-{words.replace(" ", "-")}.png')
    first = page.locator('#search-results ul.search > li').first
    assert Path(urlsplit(first.locator('a').first.get_attribute('href')).path).stem in pages, found[:3]
    snippet = first.locator('.context')
    assert snippet.locator('mark').count() or words in first.locator('a').first.inner_text()
    assert re.search('[가-힣]{2}' if language == 'ko' else '[a-z]{3}', snippet.inner_text())
    first.locator('a').first.click()
    page.wait_for_load_state()
    if language == 'ko' or words.isascii():   # on the English site the glossary knows the Korean words
        there = '파인튜닝' if words in ('미세조정', '조정') else words   # the glossary's first name of it
        assert there.lower() in page.locator('main').text_content().lower()


# What a reader asks, and the lesson that says it.
QUESTIONS = {
    "Why does the post's train_loss say little?": '01_qlora_train', 'What does NF4 save on Gemma, and what does it cost?': '01_qlora_train',
    'Why must `### Input:` be in TEMPLATE, and `<bos>` not?': '03_ollama_export', 'How many numbers does r = 8 add to one 640 x 2,048 matrix?': '01_qlora_train',
    "Why are some of KoAlpaca's rows about another question?": '00_data', 'Why bits per byte?': '04_eval', 'What makes the model stop?': '03_ollama_export',
    'Why is q4_K_M hardly smaller than q8_0 here?': '03_ollama_export', 'What does each way of merging keep?': '02_merge',
    'Why does a tuned model repeat itself, and what helps?': '04_eval'}


@pytest.mark.parametrize('question', QUESTIONS)
def test_a_question_is_answered_by_one_of_the_first_three_pages(url, page, question):
    page.goto(f'{url}{UNDER}search.html')
    found = page.evaluate('question => search(question).pages.slice(0, 3).map(([best]) => [best.address, best.title])', question)
    assert f'{QUESTIONS[question]}.html' in [address for address, _ in found], found


@pytest.mark.parametrize('language', LANGUAGES)
def test_no_result_says_what_to_do(url, page, language):
    assert search(page, url, language, 'qqqzzz') == []
    advice = page.locator('#search-results li a')
    assert advice.count() == 3
    for link in advice.all(): assert page.request.get(f'{url}{UNDER}{LANGUAGES[language]}{link.get_attribute("href")}').ok


def test_a_fold_opens_for_a_link_into_it_and_for_the_printer(url, page):
    page.goto(url + UNDER + '00_data.html')
    folds = page.locator('.implementation details[id]')
    inside = folds.nth(1)
    assert not inside.evaluate('fold => fold.open')
    page.goto(f'{url}{UNDER}00_data.html#{inside.get_attribute("id")}')
    assert inside.evaluate('fold => fold.open') and not folds.first.evaluate('fold => fold.open')
    page.pdf()
    assert page.evaluate("[...document.querySelectorAll('details')].every(fold => fold.open)")


@pytest.mark.parametrize('language', LANGUAGES)
def test_the_keyboard_shows_what_a_word_means_and_puts_it_away(url, page, language):
    page.goto(f'{url}{UNDER}{LANGUAGES[language]}01_qlora_train.html')
    term = page.locator('dfn').first
    meaning = term.locator('[role=tooltip]')
    assert not meaning.is_visible()
    term.focus()
    assert meaning.is_visible() and term.get_attribute('aria-describedby') == meaning.get_attribute('id')
    box = meaning.bounding_box()
    assert box['x'] >= 0 and box['x'] + box['width'] <= 1280
    page.keyboard.press('Escape')
    assert not meaning.is_visible()


def test_on_a_phone_every_cell_of_a_stacked_table_says_its_column(url, page):
    page.set_viewport_size(dict(width=390, height=844))
    page.goto(url + UNDER + '04_eval.html')
    cells = page.locator('table.stacked tbody td[data-label]:not([data-label=""]):not(:first-child)')
    assert cells.count() > 10
    for cell in cells.all()[:20]:
        assert cell.evaluate("cell => getComputedStyle(cell, '::before').content") == f'"{cell.get_attribute("data-label")}: "'
        box = cell.bounding_box()
        assert box['x'] >= 0 and box['x'] + box['width'] <= 391


def test_the_language_switch_keeps_the_page(url, page):
    page.goto(url + UNDER + '01_qlora_train.html')
    for language, other in (('ko', 'en'), ('en', 'ko')):
        page.locator(f'a[hreflang={language}]').locator('visible=true').first.click()
        page.wait_for_load_state()
        assert page.url.split('#')[0] == f'{url}{UNDER}{LANGUAGES[language]}01_qlora_train.html'
        assert page.locator('html').get_attribute('lang') == language


def luminance(page):
    "How bright the page's ground is, from 0 to 255."
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
    return sum(map(float, colour[colour.index('(') + 1:-1].split(',')[:3])) / 3


def test_the_dark_mode_stays_dark_on_the_next_page(url, page):
    page.goto(url + UNDER)
    assert luminance(page) > 200
    page.locator('.theme-switch-button').locator('visible=true').first.click()
    page.locator('.theme-change-button[data-mode=dark]').locator('visible=true').first.click()
    assert luminance(page) < 60
    page.goto(url + UNDER + 'ko/00_data.html')
    page.wait_for_timeout(200)
    page.screenshot(path=SHOTS/'site-dark.png')
    assert luminance(page) < 60


@pytest.mark.parametrize('name', NOTEBOOKS)
def test_the_downloaded_notebook_is_the_source(url, page, name):
    "In English byte by byte; in Korean the same code in the same order, under Korean words."
    page.goto(f'{url}{UNDER}{name}.html')
    assert download(page) == (ROOT/'nbs'/f'{name}.ipynb').read_bytes()
    page.goto(f'{url}{UNDER}ko/{name}.html')
    korean, source = json.loads(download(page)), json.loads((ROOT/'nbs'/f'{name}.ipynb').read_text(encoding='utf-8'))
    code = lambda nb: [''.join(c['source']) for c in nb['cells'] if c['cell_type'] == 'code']
    words = lambda nb: ''.join(''.join(c['source']) for c in nb['cells'] if c['cell_type'] == 'markdown')
    assert code(korean) == code(source) and len(korean['cells']) == len(source['cells'])
    assert sum('가' <= c <= '힣' for c in words(korean)) > 5 * sum('가' <= c <= '힣' for c in words(source))


def download(page):
    "What a click on the download button gives."
    with page.expect_download() as wait: page.locator('a[download][href$=".ipynb"]').first.click()
    return Path(wait.value.path()).read_bytes()


def test_an_address_that_is_not_there_gets_a_page_that_works(url, page):
    lost = []
    page.on('requestfailed', lambda r: lost.append(r.url))
    page.on('response', lambda r: r.status >= 400 and lost.append(r.url))
    assert page.goto(url + UNDER + 'nowhere/deep/').status == 404
    assert lost == [url + UNDER + 'nowhere/deep/']      # its style sheets are found from any depth
    page.locator('main a').first.click()
    page.wait_for_load_state()
    assert page.url.startswith(url + UNDER) and page.locator('article h1').count() == 1
