"""Measure the built site as a reader sees it: `python docs/measure.py [folder [page...]]`, all of _site when none is named. Fails past the limits.

Every page, or those named (00_data.html ko/00_data.html), is opened in Debian's Chromium, on a desk and on a phone. Then every fold is opened, and boxes are looked for that
cut what they hold, and in the dark for bright ones.
"""
import shutil
import sys
from pathlib import Path

VIEWS = {'desk': dict(width=1280, height=900), 'phone': dict(width=390, height=844)}
# What a page may have at most. `screens` holds for lessons on a desk, which is where they are worked through.
LIMITS = dict(screens=20, code=0, tables=0, wide=0, bright=0)

# How high the page is, in windows; how much of its width is out of sight; and the code boxes and tables whose content does not fit.
# On a desk a line of 88 columns is not broken either: a box of such lines is no higher than they are.
MEASURE = '''async desk => {
    const pixels = (e, name) => parseFloat(getComputedStyle(e)[name]);
    const cut = e => e.clientWidth && e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).overflowX != 'visible';
    const columns = line => [...line].reduce((sum, letter) => sum + (letter >= "\u1100" && letter < "\u2000" || letter >= "\u2e80" ? 2 : 1), 0);
    const fits = e => e.textContent.split('\\n').every(line => columns(line) <= 88);
    const broken = e => fits(e) && e.clientHeight - pixels(e, 'paddingTop') - pixels(e, 'paddingBottom')
        > (e.textContent.trimEnd().split('\\n').length + .5) * pixels(e, 'lineHeight');
    const screens = document.documentElement.scrollHeight / innerHeight;
    const folds = [...document.querySelectorAll('article details:not([open])')];
    for (const fold of folds) fold.open = true;
    await new Promise(done => setTimeout(done, 50));   // tables in them that do not fit are stacked
    const boxes = [...document.querySelectorAll('article *')].filter(cut);
    const code = [...document.querySelectorAll('article div[class*=highlight-] pre')].filter(e => cut(e) || desk && broken(e));
    const found = {screens: Math.round(screens * 10) / 10, code: code.length + boxes.filter(e => e.querySelector(':scope pre')).length,
                   tables: boxes.filter(e => e.querySelector(':scope table')).length,
                   wide: Math.max(0, document.documentElement.scrollWidth - innerWidth)};
    for (const fold of folds) fold.open = false;
    return found; }'''

# In the dark: boxes with a bright ground, and pictures that keep theirs.
BRIGHT = '''() => {
    Object.assign(document.documentElement.dataset, {theme: 'dark', mode: 'dark'});
    const bright = e => { const [r, g, b, a = 1] = getComputedStyle(e).backgroundColor.match(/[0-9.]+/g).map(Number);
                          return a > .5 && r + g + b > 540 && getComputedStyle(e).opacity > 0; };
    const kept = e => e.tagName == 'IMG' && !e.src.endsWith('.svg') && getComputedStyle(e).filter == 'none';
    const found = [...document.querySelectorAll('article *')].filter(e => e.offsetWidth > 20 && (bright(e) || kept(e))).length;
    Object.assign(document.documentElement.dataset, {theme: 'light', mode: 'light'});
    return {bright: found}; }'''


def measure(page, view):
    "Measure the page that is open, in a view."
    page.set_viewport_size(VIEWS[view])
    page.wait_for_timeout(50)
    found = page.evaluate(MEASURE, view == 'desk')
    return found | page.evaluate(BRIGHT) if view == 'desk' else found


def faults(name, view, found):
    "What is past the limits, a line each."
    is_lesson = Path(name).name[:2].isdigit()
    return [f'{name}, {view}: {what} {found[what]}, at most {most}' for what, most in LIMITS.items()
            if found.get(what, 0) > most and (what != 'screens' or is_lesson and view == 'desk')]


def main(folder, wanted):
    from playwright.sync_api import sync_playwright
    wrong = []
    print(f'{"page":34} {"view":5} ' + ' '.join(f'{what:>7}' for what in LIMITS))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which('chromium'), args=['--no-sandbox', '--disable-dev-shm-usage'])
        page = browser.new_page(color_scheme='light')
        for path in sorted(folder.rglob('*.html')):
            name = path.relative_to(folder).as_posix()
            if '_static' in name or wanted and name not in wanted: continue
            for view, size in VIEWS.items():
                page.set_viewport_size(size)
                page.goto(path.as_uri())
                found = measure(page, view)
                print(f'{name:34} {view:5} ' + ' '.join(f'{found.get(what, ""):>7}' for what in LIMITS), flush=True)
                wrong += faults(name, view, found)
    sys.exit('\n'.join(wrong) or 0)


if __name__ == '__main__': main(Path(sys.argv[1] if len(sys.argv) > 1 else '_site').resolve(), sys.argv[2:])
