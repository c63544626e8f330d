"settings.ini as the site reads it: names, version, addresses; and the order of the pages."
import json
import re
from configparser import ConfigParser
from pathlib import Path

ini = ConfigParser(delimiters=['='])
ini.read(Path(__file__).resolve().parent.parent/'settings.ini', encoding='utf-8')
settings = dict(ini['DEFAULT'])
site = settings['doc_host'] + settings['doc_baseurl'] + '/'   # where the published site stands


def page_order():
    "The notebooks in the order of the map in nbs/index.ipynb, the one place that says it: (lessons, other pages, reference)."
    cells = json.loads((Path(__file__).resolve().parent.parent/'nbs'/'index.ipynb').read_text(encoding='utf-8'))['cells']
    tables = re.findall(r'\| notebook \|.*\n\|[-|]+\n((?:\|.*\n?)+)', '\n'.join(''.join(c['source']) for c in cells))
    first, reference = (re.findall(r'^\| \[.+?\]\((\w+)\.ipynb\)', table, re.M) for table in tables)
    return [n for n in first if n[0].isdigit()], [n for n in first if not n[0].isdigit()], reference
