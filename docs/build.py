"""Build the site in both languages: `python docs/build.py [folder [cache]]`, _site when no folder is named. Any warning fails.
A second folder names the cache, build/site when there is none.

English stands in the folder itself and Korean in ko/ below it. Each language is a process of its own.
"""
import json
import shutil
import subprocess
import sys
from pathlib import Path
from xml.sax.saxutils import escape

ROOT = Path(__file__).resolve().parent.parent


def build(out, cache):
    "Run Sphinx for each language at once, stop where one fails, and put both together."
    for language in ('en', 'ko'): shutil.rmtree(cache/language/'html', ignore_errors=True)   # a page that is gone stays nowhere
    command = [sys.executable, '-m', 'sphinx', '-q', '-W', '--keep-going', '-b', 'html', '-c', ROOT/'docs']
    sphinx = {language: subprocess.Popen([*command, *tag, '-d', cache/language/'doctrees', ROOT/'nbs', cache/language/'html'])   # noqa: S603
              for language, tag in (('en', []), ('ko', ['-t', 'ko']))}
    failed = [language for language, process in sphinx.items() if process.wait()]
    if failed: sys.exit(f'the site was not built: {", ".join(failed)}')
    shutil.rmtree(out, ignore_errors=True)
    for language, folder in (('en', out), ('ko', out/'ko')):
        shutil.copytree(cache/language/'html', folder, ignore=shutil.ignore_patterns('.buildinfo', '_sources'))


def write_sitemap(out, site):
    "Every page with its twin."
    pages = sorted(str(p.relative_to(out)) for p in out.rglob('*.html') if 'ko' not in p.parts[len(out.parts):])
    pages = [p for p in pages if p not in ('404.html', 'search.html') and not p.startswith('_')]
    links = ''.join(f'<xhtml:link rel="alternate" hreflang="{language}" href="{site}{folder}%(page)s"/>'
                    for language, folder in (('en', ''), ('ko', 'ko/')))
    lines = [f'<url><loc>{site}{folder}{escape(p)}</loc>{links % dict(page=escape(p))}</url>' for p in pages for folder in ('', 'ko/')]
    text = ('<?xml version="1.0" encoding="utf-8"?>\n<urlset xmlns="http://www.sitemaps.org/schemas/sitemap/0.9" '
            'xmlns:xhtml="http://www.w3.org/1999/xhtml">\n' + '\n'.join(lines) + '\n</urlset>\n')
    (out/'sitemap.xml').write_text(text, encoding='utf-8', newline='\n')
    (out/'robots.txt').write_text(f'User-agent: *\nAllow: /\nSitemap: {site}sitemap.xml\n', encoding='utf-8', newline='\n')


def draw_card(path, title, lead, report):
    "The picture that stands for the site where it is linked: what tuning changed in Gemma."
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    models = json.loads(report.read_text(encoding='utf-8'))['models']
    figure = plt.figure(figsize=(12, 6.3), dpi=100, facecolor='#14181e')
    figure.text(.07, .78, title, color='white', size=54, weight='bold')
    figure.text(.07, .66, lead, color='#c9d1d9', size=21)
    bars = figure.add_axes([.24, .14, .62, .34], facecolor='#14181e')
    shares = [models['tuned']['exact_match'], models['base']['exact_match']]
    drawn = bars.barh(['tuned', 'base'], shares, color=['#56b4e9', '#8b949e'])
    bars.bar_label(drawn, [f'{share:.1%}' for share in shares], color='white', size=22, padding=10)
    bars.set_title('Gemma 3 270M: answers that match exactly', color='#c9d1d9', size=18, loc='left')
    bars.set(xlim=(0, 1.15), xticks=[])
    bars.tick_params(colors='white', labelsize=22, length=0)
    bars.spines[:].set_visible(False)
    figure.savefig(path)


if __name__ == '__main__':
    sys.path.insert(0, str(ROOT/'docs'))
    from settings import settings, site
    out, cache = [Path(p).resolve() for p in [*sys.argv[1:], *(ROOT/'_site', ROOT/'build'/'site')[len(sys.argv) - 1:]]]
    build(out, cache)
    write_sitemap(out, site)
    draw_card(out/'_static'/'card.png', settings['lib_name'], settings['description'].replace(', serve', ',\nserve'), ROOT/'docs'/'laptop-report.json')
