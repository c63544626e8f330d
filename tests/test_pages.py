"Pages that show other files show them as they are now, every link to a section finds it, and a word has one meaning."
import json
import re
from pathlib import Path

import pytest

nbs = Path(__file__).resolve().parent.parent/'nbs'
pages = sorted(nbs.glob('*.ipynb'))


def cells(path): return json.loads(path.read_text(encoding='utf-8'))['cells']


def markdown(path): return '\n'.join(''.join(c['source']) for c in cells(path) if c['cell_type'] == 'markdown')


def anchors(path):
    text = re.sub(r'^( *)```.*?^\1```', '', markdown(path), flags=re.M | re.S)
    return {re.sub(r'[^\w\- ]', '', h.lower()).replace(' ', '-') for h in re.findall(r'^#+ (.+)$', text, re.M)}


def test_example_scripts_are_shown_as_they_are():
    shown = [''.join(o['data']['text/markdown']) for c in cells(nbs/'cli.ipynb') for o in c.get('outputs', ()) if 'text/markdown' in o.get('data', {})]
    scripts = sorted((nbs.parent/'examples').glob('*.py'))
    assert len(shown) == len(scripts) == 3
    for script in scripts: assert f'```python\n{script.read_text(encoding="utf-8")}```' in shown, f'run cli.ipynb again: {script.name}'


def test_the_map_has_every_notebook_once():
    import sys
    sys.path.insert(0, str(nbs.parent/'docs'))
    from settings import page_order
    shown = [name for group in page_order() for name in group]
    assert sorted(shown + ['index']) == [path.stem for path in pages] and len(shown) == len(set(shown))
    modules = {path.stem for path in (nbs.parent/'kofinetune').glob('*.py')} - {'__init__', '_modidx'}
    lessons = dict(data='00_data', train='01_qlora_train', merge='02_merge', export='03_ollama_export', eval='04_eval')
    assert {lessons.get(module, module) for module in modules} <= set(shown)     # a notebook has the name of its module


@pytest.mark.parametrize('page', pages, ids=lambda p: p.stem)
def test_links_to_other_notebooks_find_page_and_section(page):
    for name, anchor in re.findall(r'\]\(([\w.]+\.ipynb)(?:#([\w-]+))?\)', markdown(page)):
        assert (nbs/name).is_file(), name
        assert not anchor or anchor in anchors(nbs/name), f'{name}#{anchor}'


def test_glossary_has_each_word_once_in_both_languages_with_a_link():
    lines = [line for line in markdown(nbs/'glossary.ipynb').splitlines() if line.startswith('- ')]
    entries = [re.fullmatch(r'- \*\*(.+?)\*\* · (.+?): .+ \(\[\w+\]\([\w.#-]+\)\)', line) for line in lines]
    assert len(lines) > 60 and all(entries), [line for line, entry in zip(lines, entries) if not entry]
    assert len({entry[1] for entry in entries}) == len({entry[2] for entry in entries}) == len(entries)


@pytest.mark.parametrize('page', ['index', 'choose', 'from_the_post'])
def test_numbers_of_a_page_are_those_of_the_records(page, monkeypatch):
    "Run the page's code again, without a kernel, and compare what it shows with what is stored."
    from execnb.shell import CaptureShell
    monkeypatch.chdir(nbs)
    shell = CaptureShell()
    for cell in cells(nbs/f'{page}.ipynb'):
        if cell['cell_type'] != 'code': continue
        made = shell.run(''.join(cell['source']))
        assert shell.exc is None, shell.exc
        texts = [[''.join(o['text'] if 'text' in o else o['data'].get('text/markdown') or o['data']['text/plain'])
                  for o in outputs if o['output_type'] != 'display_data'] for outputs in (made, cell['outputs'])]
        assert texts[0] == texts[1], f'run {page}.ipynb again'
