"`make lab` in a real browser: Run All from the menu, as a reader would, on a copy of the notebooks, without network, GPU or Ollama."
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import httpx
import nbformat
import pytest

from driver import SHOTS, absent, answers, chromium, free_port, stop, wait_for  # noqa: F401  chromium is a fixture

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT/'docs'))
from settings import page_order   # noqa: E402

LESSONS = [*page_order()[0], 'cli', 'clusters']
ORDER = [*LESSONS, *(name for group in page_order() for name in group if name not in LESSONS), 'index']
COPIED = ['Makefile', '.jupyter', 'nbs', 'docs/gemma-tokens.json', 'docs/laptop-report.json', 'docs/quotes.json', 'benchmarks/results', 'examples']
TIMED = {'@jupyterlab/notebook-extension:tracker': {'recordTiming': True}}
PANEL = 'window.jupyterapp.shell.currentWidget'
# What the notebook's own model and the kernel's connection say; cells out of sight are not in the page.
STATE = PANEL + ''' && (panel => ({
    path: panel.context?.path, kernel: panel.sessionContext?.session?.kernel?.status,
    cells: [...(panel.content?.model?.cells ?? [])].filter(c => c.type === 'code').map(c => ({
        source: c.sharedModel.getSource(), count: c.executionCount, outputs: c.outputs.toJSON()}))}))(''' + PANEL + ')'

# All cells have run, or one has failed, which ends Run All, and the kernel has nothing to do (or is gone).
FINISHED = '''() => {
    const panel = window.jupyterapp.shell.currentWidget, kernel = panel.sessionContext.session?.kernel?.status;
    const cells = [...panel.content.model.cells].filter(c => c.type === 'code' && c.sharedModel.getSource().trim());
    const failed = c => { for (let i = 0; i < c.outputs.length; i++) if (c.outputs.get(i).type === 'error') return true; };
    if (document.querySelector('.jp-Dialog')) return true;      // says that the kernel died
    return kernel === 'dead' || kernel === 'idle' && (cells.every(c => c.executionCount) || cells.some(failed));
}'''


class Lab:
    "A JupyterLab that `make lab` started in `folder`, and a browser to look at it."
    def __init__(self, folder, browser):
        self.folder, self.browser, self.port, self.token = Path(folder), browser, free_port(), 'rehearsal'
        self.url = f'http://127.0.0.1:{self.port}'
        self.log = self.folder/'lab.log'

    def start(self):
        for path in COPIED:
            target = self.folder/path
            target.parent.mkdir(parents=True, exist_ok=True)
            (shutil.copytree if (ROOT/path).is_dir() else shutil.copyfile)(ROOT/path, target)
        own = {f'JUPYTER_{part.upper()}_DIR': str(self.folder/'jupyter'/part) for part in ('config', 'data', 'runtime')}
        write(self.folder/'jupyter'/'config'/'labconfig'/'default_setting_overrides.json', TIMED)
        # a kernel of the same name that somebody installed for all environments: it must not be taken
        write(self.folder/'jupyter'/'data'/'kernels'/'python3'/'kernel.json',
              dict(argv=['false'], display_name='another', language='python'))
        cut = {name: 'http://127.0.0.1:9' for name in ('http_proxy', 'https_proxy', 'HTTP_PROXY', 'HTTPS_PROXY')}
        env = os.environ | own | cut | dict(
            no_proxy='127.0.0.1,localhost', NO_PROXY='127.0.0.1,localhost', HF_HUB_OFFLINE='1', CUDA_VISIBLE_DEVICES='',
            OLLAMA_HOST='127.0.0.1:9', KOFINETUNE_KOALPACA='')      # bases are unpacked once: the cache is everybody's
        options = (f'--no-browser --allow-root --ServerApp.port={self.port} --ServerApp.port_retries=0 '
                   f'--IdentityProvider.token={self.token} --LabApp.expose_app_in_browser=True')
        self.process = subprocess.Popen(
            ['make', 'lab', f'VENV={sys.prefix}', f'-o{sys.prefix}/.ready', f'LAB={options}'], cwd=self.folder, env=env,
            stdout=self.log.open('w'), stderr=subprocess.STDOUT, start_new_session=True)
        wait_for(lambda: answers(self.url + '/api') or self.process.poll() is not None)
        assert self.process.poll() is None, self.log.read_text()
        return self

    def api(self, method, path, **more):
        return httpx.request(method, self.url + path, headers=dict(Authorization=f'token {self.token}'), timeout=30, **more)

    def open(self, path, query='?reset&'):
        "Open an address of the server; note what the page asks for elsewhere, and its errors."
        page = self.browser.new_page(viewport=dict(width=1280, height=900))
        page.outside, page.complaints = [], []
        page.on('request', lambda r: r.url.startswith((self.url, self.url.replace('http', 'ws'), 'data:', 'blob:'))
                or page.outside.append(r.url))
        page.on('pageerror', lambda e: page.complaints.append(str(e)))
        page.goto(f'{self.url}{path}{query}token={self.token}')
        page.wait_for_function('window.jupyterapp?.restored')
        return page

    def run_all(self, name, limit=900, suffix=''):
        "Run All of one notebook in a fresh kernel. Returns what the run left: model, file, seconds, picture, page's complaints."
        strip(ROOT/'nbs'/f'{name}.ipynb', self.folder/'nbs'/f'{name}.ipynb')
        page = self.open(f'/lab/tree/{name}.ipynb')
        try:
            wait_for(lambda: ready(page.evaluate(STATE), name), 120)
            start = time.monotonic()
            page.get_by_role('menuitem', name='Run', exact=True).click()
            page.get_by_role('menuitem', name='Run All Cells', exact=True).click()
            page.wait_for_function(FINISHED, timeout=limit * 1000, polling=500)
            seconds = time.monotonic() - start
            model = page.evaluate(STATE)['cells']
            picture = SHOTS/f'lab-{name}{suffix}.png'
            look_at(page, model)
            page.screenshot(path=picture)
            page.evaluate("window.jupyterapp.commands.execute('docmanager:save')")
            disk = wait_for(lambda: saved(self.folder/'nbs'/f'{name}.ipynb', model))
            return dict(name=name, suffix=suffix, seconds=round(seconds, 1), model=model, disk=disk, picture=picture, outside=page.outside,
                        complaints=page.complaints, times=times(disk))
        finally: self.leave(page)

    def leave(self, page):
        page.close()
        for session in self.api('GET', '/api/sessions').json(): self.api('DELETE', f'/api/sessions/{session["id"]}')


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding='utf-8')

def strip(source, target):
    "Copy a notebook without outputs, so that what is there later was made by this run."
    nb = nbformat.read(source, 4)
    for cell in code(nb): cell.update(outputs=[], execution_count=None)
    nbformat.write(nb, target)

def code(nb): return [cell for cell in nb.cells if cell.cell_type == 'code']
def ready(state, name): return state and state.get('path') == f'{name}.ipynb' and state['kernel'] == 'idle'
def errors(cells): return [o for c in cells for o in c['outputs'] if o['output_type'] == 'error']
PICTURES = {'image/png', 'image/svg+xml'}
def pictures(cell): return sum(not PICTURES.isdisjoint(o.get('data', {})) for o in cell['outputs'])

def saved(path, model):
    "The file, once it holds every cell's count."
    nb = nbformat.read(path, 4)
    return nb if [c.execution_count for c in code(nb)] == [c['count'] for c in model] else None

def times(nb):
    "Seconds of each cell, as JupyterLab noted them: the slowest five."
    import datetime
    stamp = lambda cell, key: datetime.datetime.fromisoformat(cell.metadata.execution[key].replace('Z', '+00:00'))
    spans = []
    for cell in code(nb):
        if {'shell.execute_reply', 'iopub.execute_input'} <= set(cell.metadata.get('execution', {})):
            spans.append(((stamp(cell, 'shell.execute_reply') - stamp(cell, 'iopub.execute_input')).total_seconds(), cell.source))
    return [dict(seconds=round(s, 1), cell=text[-160:]) for s, text in sorted(spans, reverse=True)[:8]]

def look_at(page, cells):
    "Scroll to the last cell with a picture, or to the last one."
    if not cells: return
    at = max((i for i, c in enumerate(cells) if pictures(c)), default=len(cells) - 1)
    page.evaluate(f'''async () => {{
        const content = {PANEL}.content;
        const place = content.widgets.map((w, i) => [w.model.type, i]).filter(([t, i]) => t === 'code')[{at}][1];
        content.activeCellIndex = place;
        await content.scrollToItem(place, 'center');
    }}''')
    page.wait_for_timeout(500)


@pytest.fixture(scope='module')
def lab(chromium, tmp_path_factory):
    if not shutil.which('make'): absent('no make')
    lab = Lab(tmp_path_factory.mktemp('lab'), chromium)
    try: yield lab.start()
    finally: stop(lab.process)


def check(result):
    "What a reader sees after Run All: no error, in the page or in the file, and every picture that the stored notebook has."
    name, here = result['name'], SHOTS/f'lab-{result["name"]}{result["suffix"]}.json'
    here.write_text(json.dumps({k: result[k] for k in ('name', 'seconds', 'times')} | dict(
        stderr=[o['text'] for c in result['model'] for o in c['outputs'] if o.get('name') == 'stderr']), indent=1, ensure_ascii=False))
    failed = errors(result['model']) + errors(code(result['disk']))
    assert failed == [], f'{name}: {failed[0]["ename"]}: {failed[0]["evalue"]}'
    assert all(c['count'] for c in result['model'] if c['source'].strip()), f'{name}: the kernel died'
    stored = code(nbformat.read(ROOT/'nbs'/f'{name}.ipynb', 4))
    for then, now, kept in zip(stored, result['model'], code(result['disk']), strict=True):
        if '#| ollama' in then.source or 'if koalpaca' in then.source: continue
        assert pictures(now) >= pictures(then) <= pictures(kept), f'{name}: no picture under {then.source[-200:]}'
    assert result['outside'] == [], f'{name} asks for {result["outside"][:3]}'
    assert result['complaints'] == []


def test_the_news_is_off_and_the_map_is_open(lab):
    page = lab.open('/', query='?')   # where `make lab` sends a browser
    wait_for(lambda: ready(page.evaluate(STATE), 'index'))
    page.screenshot(path=SHOTS/'lab-start.png')
    assert page.get_by_text('Would you like to').count() == 0
    assert page.outside == []
    page.close()


@pytest.mark.parametrize('name', ORDER)
def test_run_all_in_order(lab, name):
    check(lab.run_all(name))


@pytest.mark.parametrize('name', ['00_data', '01_qlora_train', '02_merge', '03_ollama_export', '04_eval'])
def test_a_second_run_all_reuses_what_is_done_and_says_so(lab, name):
    "In a fresh kernel again. No stage of the shared run is made a second time, and each says so."
    before = {path: path.stat().st_mtime_ns for path in (lab.folder/'runs'/'rehearsal').rglob('*') if path.is_file()}
    result = lab.run_all(name, suffix='-again')
    check(result)
    said = ''.join(o.get('text', '') for c in result['model'] for o in c['outputs'])
    for stage in dict(zip(LESSONS, ('data', 'adapter', 'merged', 'ollama', 'eval')))[name],:
        assert f'{stage}: already done' in said
    after = {path: path.stat().st_mtime_ns for path in before if path.is_file()}
    changed = {path.relative_to(lab.folder).as_posix() for path in before if before[path] != after.get(path)}
    allowed = '.lock', 'log.txt', 'manifest.json', 'ollama/verify.json'     # 03 verifies again, and writes that down
    assert changed <= {f'runs/rehearsal/{name}' for name in allowed}


def test_a_run_is_talked_to_in_a_box_of_the_page(lab):
    cell = nbformat.v4.new_code_cell("from kofinetune.talk import chat\nchat('../runs/rehearsal')")
    kernel = dict(kernelspec=dict(name='python3', display_name='python3', language='python'))
    nbformat.write(nbformat.v4.new_notebook(cells=[cell], metadata=kernel), lab.folder/'nbs'/'box.ipynb')
    page = lab.open('/lab/tree/box.ipynb')
    try:
        wait_for(lambda: ready(page.evaluate(STATE), 'box'), 120)
        page.evaluate("window.jupyterapp.commands.execute('notebook:run-all-cells')")
        box, said = page.get_by_placeholder('Ask, then press Enter'), page.locator('.jupyter-widgets pre')
        for question, answer in (("'사과'에 은/는 가운데 알맞은 조사를 붙여 쓰세요.", '사과는'), ('3, 2, 4를 작은 것부터 차례로 쓰세요.', '2, 3, 4')):
            box.fill(question)
            box.press('Enter')
            said.filter(has_text=f'> {question}\n{answer}\n').wait_for(timeout=60_000)
        assert box.input_value() == ''
        page.screenshot(path=SHOTS/'lab-box.png')
        box.fill('/bye')
        box.press('Enter')
        box.wait_for(state='detached')
        assert errors(page.evaluate(STATE)['cells']) == [] and page.complaints == [] and page.outside == []
    finally: lab.leave(page)
