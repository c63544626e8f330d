"""Report what libraries said of renamed or deprecated arguments, as annotations that GitHub shows; usage: renamed.py FILE"""
import re, sys
from pathlib import Path

SAYS = re.compile(r'deprecat|renamed|will be removed|unexpected keyword|got an unexpected', re.I)

lines = Path(sys.argv[1]).read_text(encoding='utf-8', errors='replace').splitlines()
found = list(dict.fromkeys(line.strip() for line in lines if SAYS.search(line)))
for line in found: print(f'::warning title=renamed argument::{line}')
print(f'{len(found)} lines of the run speak of renamed or deprecated names')
