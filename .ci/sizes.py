"""Print how large the package and the notebooks are, and fail where a number is over its limit: python .ci/sizes.py

Limits only go down. docs/ and tests/ are not counted.
"""
import ast, json, re, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMITS = dict(module_lines=3600, with_later_modules=4738, largest_module=300, public_names=120, unused_names=0, private_imports=0,
              largest_lesson_cells=80, longest_exported_cell=30, long_lines=0)
# what they keep to: 3,600 lines, 400 a module, 120 names, none unused, none private, 80 cells, 30 lines, none over 88 characters
LATER = ('speed', 'formats', 'tables', 'dialogs', 'talk', 'chat', 'messages', 'shared')   # came or grew after the 3,600 lines, as modules of their own; `with_later_modules` counts them too: 22 more for fewer passes in `speed`, 96 for conversations made by code in `dialogs`, 173 (and 7 fewer in `cli`) for a conversation in the terminal and in a notebook in `talk`, 250 for conversations (162 in `chat`, 37 in `messages`, 36 in `formats`, 8 in `talk`, 7 where they are used), 8 for few lengths in `speed`, 14 for the recipe's sampling and for files evaluated in bf16 (13 of them within the 3,600), 72 for the lock and the cache in `shared` (19 of them from `runs`, 12 from `rehearsal`, 2 from `data`)
LESSONS = ('00_data', '01_qlora_train', '02_merge', '03_ollama_export', '04_eval')


def cells(path, kind='code'):
    "The sources of a notebook's cells."
    return [''.join(c['source']) for c in json.loads(path.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == kind]


def exported(cell): return re.match(r'\s*#\| exports?\b', cell) is not None


def counted(text):
    "Lines of code: without blank ones, and without nbdev's marks and directives."
    return [line for line in text.splitlines() if line.strip() and not line.startswith(('# %%', '#|'))]


def words(text): return set(re.findall(r'\b[A-Za-z_]\w*\b', text))


def public(text):
    "The names of a module's __all__."
    found = [node.value for node in ast.parse(text).body if isinstance(node, ast.Assign) and getattr(node.targets[0], 'id', '') == '__all__']
    return ast.literal_eval(found[0]) if found else []


def measure():
    modules = {p.stem: p.read_text(encoding='utf-8') for p in sorted((ROOT/'kofinetune').glob('*.py')) if p.stem not in ('_modidx', '__init__')}
    notebooks = {p.stem: p for p in sorted((ROOT/'nbs').glob('*.ipynb'))}
    lines = {name: len(counted(text)) for name, text in modules.items()}
    shown = '\n'.join(cell for path in notebooks.values() for cell in cells(path) if not exported(cell))
    users = [p.read_text(encoding='utf-8') for folder in ('tests', 'examples', 'benchmarks') for p in sorted((ROOT/folder).rglob('*.py'))]
    elsewhere = words('\n'.join([shown, *users]))
    names = {name: public(text) for name, text in modules.items()}
    body = {name: words(re.sub(r'__all__ = \[.*?\]', '', text, flags=re.S)) for name, text in modules.items()}
    unused = [f'{name}.{one}' for name, all_ in names.items() for one in all_
              if one not in elsewhere and not any(one in other for m, other in body.items() if m != name)]
    private = [f'{name}: {found}' for name, text in modules.items()
               for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom) and (node.level or 'kofinetune' in (node.module or ''))
               for found in [a.name for a in node.names] if found.startswith('_')]
    lesson_cells = {name: len(cells(notebooks[name])) + len(cells(notebooks[name], 'markdown')) for name in LESSONS if name in notebooks}
    longest = {name: max((len(counted(c)) for c in cells(path) if exported(c) and 'class Recipe:' not in c), default=0)   # a table of fields
               for name, path in notebooks.items()}
    # a picture's description is one line, whatever its length; exported cells are counted here too
    wide = {name: sum(len(line) > 88 and not line.startswith('#| fig-alt') for cell in cells(path) for line in cell.splitlines())
            for name, path in notebooks.items()}
    numbers = dict(module_lines=sum(n for name, n in lines.items() if name not in LATER), with_later_modules=sum(lines.values()), largest_module=max(lines.values()), public_names=sum(map(len, names.values())),
                   unused_names=len(unused), private_imports=len(private), largest_lesson_cells=max(lesson_cells.values()),
                   longest_exported_cell=max(longest.values()), long_lines=sum(wide.values()))
    details = dict(module_lines=lines, lesson_cells=lesson_cells, longest_exported_cell=longest, long_lines=wide, unused_names=unused,
                   private_imports=private)
    return numbers, details


def main():
    numbers, details = measure()
    if '--all' in sys.argv: print(json.dumps(details, indent=1, ensure_ascii=False))
    for name, value in numbers.items(): print(f'{name:>24} {value:6,}   limit {LIMITS[name]:,}')
    over = [f'{name} is {value}, over its limit of {LIMITS[name]}' for name, value in numbers.items() if value > LIMITS[name]]
    if over: sys.exit('\n'.join(over) + '\nsee them with: python .ci/sizes.py --all')


if __name__ == '__main__': main()
