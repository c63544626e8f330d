"The site as it is built: both languages, their files, the catalogues. What needs a browser is in tests/browser/."
import importlib
import inspect
import json
import re
import subprocess
import sys
from html import unescape
from urllib.parse import unquote, urldefrag

import nbformat
import pytest
from lxml import etree, html

from conftest import ROOT

NOTEBOOKS = sorted((ROOT/'nbs').glob('*.ipynb'))
sys.path.insert(0, str(ROOT/'docs'))


@pytest.fixture(scope='module')
def pages(site):
    "Every page of both languages, parsed."
    return {path.relative_to(site).as_posix(): html.parse(str(path)).getroot()
            for path in site.rglob('*.html') if '_static' not in path.parts}


def test_every_notebook_is_a_page_in_both_languages(pages):
    for path in NOTEBOOKS:
        for language, name in (('en', f'{path.stem}.html'), ('ko', f'ko/{path.stem}.html')): assert pages[name].get('lang') == language


def test_each_page_is_linked_to_its_twin(site, pages):
    for name, page in pages.items():
        if name.endswith('404.html'): continue
        english, korean = (name[3:], name) if name.startswith('ko/') else (name, f'ko/{name}')
        links = {a.get('hreflang'): a.get('href') for a in page.iterfind('.//link[@rel="alternate"]')}
        assert links['en'].endswith(f'/kofinetune/{english}') and links['ko'].endswith(f'/kofinetune/{korean}')
        switch = page.find('.//a[@class="language"]')
        assert (site/name).parent.joinpath(switch.get('href')).resolve() == site/(english if name == korean else korean)


def test_links_between_pages_lead_somewhere(site, pages):
    ids = {name: {e.get('id') for e in page.iter() if e.get('id')} | {e.get('name') for e in page.iter('a')} for name, page in pages.items()}
    lost = []
    for name, page in pages.items():
        if name.endswith('404.html'): continue
        for link in page.iter('a', 'link', 'script', 'img'):
            address = link.get('href') or link.get('src') or ''
            if re.match(r'[a-z]+:|#$|$', address): continue
            file, anchor = urldefrag(address)
            target = ((site/name).parent/unquote(file.split('?')[0])).resolve() if file else site/name
            if not target.is_file(): lost.append(f'{name}: {address}')
            elif anchor and target.suffix == '.html' and unquote(anchor) not in ids[target.relative_to(site).as_posix()]: lost.append(f'{name}: {address}')
    assert not lost


def test_nothing_is_fetched_from_elsewhere(pages):
    for name, page in pages.items():
        fetched = [e.get('src') or e.get('href') for e in page.xpath('//script[@src]|//img|//iframe|//source|//link[@rel="stylesheet" or @rel="preload" or @rel="icon"]')]
        assert not [a for a in fetched if a and re.match('(https?:)?//', a)], name


def test_every_picture_has_a_description(pages):
    for name, page in pages.items():
        assert not [i.get('src') for i in page.iterfind('.//article//img') if not i.get('alt')], name
        assert not [1 for drawn in page.xpath('//article//svg[@role="img"]') if not drawn.get('aria-label')], name


def test_the_drawings_are_those_of_the_script_and_stand_in_the_page_in_its_language(site, pages, tmp_path):
    subprocess.run([sys.executable, ROOT/'docs'/'drawings.py', tmp_path], check=True)
    drawn = {path.name: path.read_text(encoding='utf-8') for path in tmp_path.iterdir()}
    assert drawn == {path.name: path.read_text(encoding='utf-8') for path in (ROOT/'nbs'/'drawings').iterdir()}
    shown = {}
    for name, page in pages.items():
        for drawing in page.xpath('//article//svg[@class="drawing"]'):
            label = drawing.xpath('string(.//*[local-name()="text"][last()])')
            found = [file for file, text in drawn.items() if f'>{label}<' in text.replace('&lt;', '<').replace('&gt;', '>')]
            shown.setdefault(name.startswith('ko/'), set()).update(file.split('.')[0] for file in found if ('.ko.' in file) == name.startswith('ko/'))
    everything = {name.split('.')[0] for name in drawn}
    assert shown == {False: everything, True: everything}
    for folder, end in ((site, ''), (site/'ko', '.ko')):   # the notebooks and the Markdown copies show them too
        for name in everything:
            for beside in (folder, folder/'notebooks'): assert (beside/'drawings'/f'{name}.svg').read_text(encoding='utf-8') == drawn[f'{name}{end}.svg']


def test_english_notebooks_are_the_notebooks(site):
    for path in NOTEBOOKS: assert (site/'notebooks'/path.name).read_bytes() == path.read_bytes()


def test_korean_notebooks_have_korean_prose_and_the_same_code(site):
    from extensions.messages import catalogue
    for path in NOTEBOOKS:
        before, after = (nbformat.read(p, as_version=4) for p in (path, site/'ko'/'notebooks'/path.name))
        nbformat.validate(after)
        assert [c for c in before.cells if c.cell_type != 'markdown'] == [c for c in after.cells if c.cell_type != 'markdown']
        english, korean = (' '.join('\n'.join(c.source for c in nb.cells if c.cell_type == 'markdown').replace('\\|', '|').split()) for nb in (before, after))
        # a message of an output ("base", "the same") also occurs inside sentences: it must stand alone here
        parts = {part.strip(' #*-\n') for c in before.cells if c.cell_type == 'markdown' for line in c.source.splitlines() for part in line.split('|')}
        printed = unescape(' '.join(''.join(text) for c in before.cells for output in c.get('outputs', []) for text in output.get('data', {}).values() if isinstance(text, (str, list))))
        said = {message: text for message, text in catalogue('ko', path.stem).items() if message in english and (message in parts or ' ' in message and message not in printed)}
        assert not [text for text in said.values() if ' '.join(text.split()) not in korean], path.name


def test_the_catalogues_are_complete(tmp_path):
    "Extract the messages anew: none is new, none has changed, each has its Korean."
    from babel.messages.pofile import read_po
    subprocess.run([sys.executable, '-m', 'sphinx', '-q', '-W', '-b', 'gettext', '-c', ROOT/'docs', '-d', tmp_path/'doctrees', ROOT/'nbs', tmp_path/'pot'], check=True)
    missing = []
    for template in sorted((tmp_path/'pot').rglob('*.pot')):
        name = template.relative_to(tmp_path/'pot').with_suffix('.po')
        path = ROOT/'docs'/'locale'/'ko'/'LC_MESSAGES'/name
        if not path.is_file(): missing.append(f'{name}: no catalogue'); continue
        done = {m.id for m in read_po(path.open('rb')) if m.id and m.string and not m.fuzzy}
        missing += [f'{name}: {m.id[:80]}' for m in read_po(template.open('rb')) if m.id and m.id not in done]
    assert not missing, f'{len(missing)} messages without Korean; `make po`, then translate: ' + '\n'.join(missing[:20])


def test_markdown_copies_and_llms_txt(site):
    for folder in (site, site/'ko'):
        listed = re.findall(r'\]\(https://[^)]*/kofinetune/(?:ko/)?([\w/]+\.md)\)', (folder/'llms.txt').read_text(encoding='utf-8'))
        assert {f'{path.stem}.md' for path in NOTEBOOKS} | {'troubleshooting.md'} == set(listed)
        for name in listed: assert (folder/name).read_text(encoding='utf-8').startswith('# ')


def test_the_reference_lists_every_commented_parameter_in_both_languages(pages):
    from fastcore.docments import docments
    from extensions import reference
    seen = 0
    for module in reference.modules():
        exported = vars(importlib.import_module(f'kofinetune.{module}'))
        for name in filter(lambda name: inspect.isroutine(exported[name]) or inspect.isclass(exported[name]), exported['__all__']):
            wanted = {parameter for parameter, comment in docments(exported[name]).items() if comment} - {'return'}
            for page in (pages[f'api/{module}.html'], pages[f'ko/api/{module}.html']):
                listed = page.xpath(f'//dt[@id="kofinetune.{module}.{name}"]/../dd/dl[contains(@class, "field-list")]//strong')
                assert wanted <= {e.text for e in listed}, f'{module}.{name}'
            seen += len(wanted)
    assert seen > 200


def test_sitemap_names_pages_that_exist(site, pages):
    root = etree.parse(str(site/'sitemap.xml')).getroot()
    listed = {e.text.split('/kofinetune/')[1] for e in root.iterfind('.//{*}loc')}
    assert {'index.html', 'ko/index.html', '00_data.html', 'ko/api/data.html'} <= listed <= set(pages)


def test_the_search_index_has_every_section_that_is_there(site, pages):
    for folder in ('', 'ko/'):
        text = (site/folder/'searchindex.js').read_text(encoding='utf-8')
        index = json.loads(text.removeprefix('const INDEX = ').removesuffix(';\n'))
        assert {address for address, *_ in index['pages']} >= {f'{path.stem}.html' for path in NOTEBOOKS} | {'troubleshooting.html', 'api/data.html'}
        for address, title, weight, sections in index['pages']:
            ids = {e.get('id') for e in pages[folder + address].iter() if e.get('id')} | {''}
            assert sections and {anchor for anchor, *_ in sections} <= ids, address
        titles = {title for _, _, _, sections in index['pages'] for _, title, *_ in sections}
        assert 'format_prompt' in titles


def test_long_implementations_are_folded_and_short_ones_are_not(pages):
    "Their signature and summary are in sight, in the page's language; the code is whole inside."
    for name, path in [(folder + f'{path.stem}.html', path) for path in NOTEBOOKS for folder in ('', 'ko/')]:
        exported = [c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == 'code' and re.match(r'#\| *exports\b', c.source)]
        code = [re.sub(r'^#\|.*\n?', '', source, flags=re.M).strip() for source in exported]
        folds = pages[name].xpath('//div[contains(@class, "implementation")]')
        inside = [fold.xpath('.//details//pre')[0].text_content().strip() for fold in folds]
        assert inside == [source for source in code if len(source.splitlines()) > 12], name
        for fold, source in zip(folds, inside):
            seen = fold.xpath('./div[contains(@class, "highlight")]//pre')
            assert seen and re.sub(r'\W', '', seen[0].text_content())[:20] in re.sub(r'\W', '', re.sub(' *#.*', '', source)), name
            about = [p.text_content() for p in fold.xpath('./p[not(contains(@class, "shown"))]')]
            assert not name.startswith('ko/') or all(re.search('[가-힣]', text) for text in about), (name, about)


def test_tables_have_one_row_of_headers_and_no_number_longer_than_it_matters(pages):
    for name, page in pages.items():
        for table in page.iterfind('.//article//table'):
            assert len(table.findall('thead/tr')) <= 1, name
            numbers = [cell.text_content().strip() for cell in table.iter('td')]
            assert not [number for number in numbers if re.fullmatch(r'-?\d+\.\d{4,}', number) and abs(float(number)) >= .01], name


def test_tables_say_in_korean_what_their_rows_and_columns_are(pages):
    "What an output calls them in words: the catalogue has it, and the table shows that. Names stay as they are in the code."
    from extensions.messages import catalogue
    from extensions.tables import table_words
    seen = 0
    for path in NOTEBOOKS:
        shown = {' '.join(cell.text_content().split()) for cell in pages[f'ko/{path.stem}.html'].xpath('//article//table//th | //article//table//td')}
        words = [text for cell in nbformat.read(path, as_version=4).cells for output in cell.get('outputs', [])
                 for text in table_words(output.get('data', {}).get('text/html', ''), cell.source)]
        assert {catalogue('ko', path.stem)[text] for text in words} <= shown, path.name
        seen += len(words)
    assert seen > 200


def test_intervals_and_shares_in_tables_are_written_as_the_language_writes_them(pages):
    for name, page in pages.items():
        cells = [cell.text_content() for cell in page.iterfind('.//article//table//td')]
        numbers = [text for text in cells if not re.search('[A-Za-z가-힣]', re.sub(r'\b(to|of)\b| 중 ', '', text))]
        wrong = r'\d%? (to|of) ' if name.startswith('ko/') else r'\d%?~|\d 중 \d'
        assert not [text for text in numbers if re.search(wrong, text)], name


def test_a_lesson_explains_words_of_the_glossary_in_its_own_language(pages):
    for path in (path for path in NOTEBOOKS if path.stem[0] == '0'):
        for folder, letters in (('', '[a-z]{3}'), ('ko/', '[가-힣]{2}')):
            terms = pages[folder + f'{path.stem}.html'].findall('.//dfn')
            meanings = [term.find('span').text for term in terms]
            assert len(terms) > 5 and len(meanings) == len(set(meanings)), path.stem
            assert all(re.search(letters, text) for text in meanings), path.stem


def test_card_and_lost_pages(site):
    card = (site/'_static'/'card.png').read_bytes()
    assert card.startswith(b'\x89PNG') and len(card) > 10_000
    lost = (site/'404.html').read_text(encoding='utf-8')
    assert 'href="/kofinetune/index.html"' in lost and '페이지' in lost
