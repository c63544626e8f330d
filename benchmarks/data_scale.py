"""Measure what preparing rows costs: memory and time at growing sizes, and the speed against the post's own writer.

    python benchmarks/data_scale.py --json benchmarks/data_scale.json

Needs Linux. Rows are generated, so nothing is downloaded. The last line printed is the JSON that is written.
"""
import argparse, json, os, platform, random, resource, shutil, subprocess, sys, tempfile, time
from importlib.metadata import version
from pathlib import Path

WORDS = [a + b + c for a in '가나다라마바사아자차카하' for b in '구두루무부수우주추쿠' for c in '기니리미비시이지치키']


def rows(count, seed=0):
    "Yield `count` rows about as long as KoAlpaca's: three in a hundred repeat a row before, one has Hangul in pieces."
    draw = random.Random(seed)
    words = lambda least, most: ' '.join(draw.choices(WORDS, k=draw.randint(least, most)))
    row = None
    for i in range(count):
        if row is None or draw.random() > .03:
            row = dict(instruction=f'{words(3, 9)} 무엇인가요? ({i})', input=words(2, 10) if draw.random() < .4 else '',
                       output=f'{words(5, 40)} 합니다.')
        yield row


def write_rows(path, count):
    "Write generated rows as JSON lines, or as an array for the post's script."
    with path.open('w', encoding='utf-8', newline='\n') as f:
        if path.suffix == '.json': f.write('[\n')
        for i, row in enumerate(rows(count)):
            if path.suffix == '.json' and i: f.write(',\n')
            f.write(json.dumps(row, ensure_ascii=False) + ('\n' if path.suffix == '.jsonl' else ''))
        if path.suffix == '.json': f.write('\n]\n')


def post_writer(source, target):
    "The post's script: read_json, iterrows, one json.dumps a row."
    import pandas as pd
    with open(target, 'w', encoding='utf-8') as f:
        for _, row in pd.read_json(source).iterrows():
            entry = {'instruction': row['instruction'], 'input': row['input'], 'output': row['output']}
            f.write(json.dumps(entry, ensure_ascii=False) + '\n')


def our_writer(source, target):
    "The same file by this project: every row checked, then written."
    from kofinetune.runs import write_jsonl
    from kofinetune.formats import read_rows
    write_jsonl(read_rows(source), target)


def best_of(times, do, *args):
    "Seconds of the fastest of `times` runs."
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        do(*args)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def against_the_post(folder, count):
    "Write the same file both ways, in one process, in turns."
    import pandas  # noqa: F401  imports are not what is measured
    source = folder/'array.json'
    write_rows(source, count)
    ours = best_of(3, our_writer, source, folder/'ours.jsonl')
    post = best_of(2, post_writer, source, folder/'post.jsonl')
    ours = min(ours, best_of(3, our_writer, source, folder/'ours.jsonl'))
    same = (folder/'ours.jsonl').read_bytes() == (folder/'post.jsonl').read_bytes()
    return dict(rows=count, post_rows_per_second=round(count / post), our_rows_per_second=round(count / ours),
                ratio=round(post / ours, 1), same_bytes=same)


def one_size(source):
    "Prepare `source` (in a process of its own, so that its peak is its own) and print what it cost."
    from kofinetune.data import prepare
    from kofinetune.recipe import Recipe
    recipe = Recipe(source=str(source), valid_rows=1000, drop=('empty_answer', 'exact_duplicate'))
    with tempfile.TemporaryDirectory(dir=source.parent) as folder:
        start, cpu = time.perf_counter(), time.process_time()
        counts = prepare(recipe, Path(folder)/'run')
        seconds, used = time.perf_counter() - start, time.process_time() - cpu
    assert counts['rows'] == counts['kept'] + counts['reported']
    assert counts['kept'] == counts['train'] + counts['valid']
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps(dict(rows=counts['rows'], kept=counts['kept'], seconds=round(seconds, 2), cpu_seconds=round(used, 2), peak_bytes=peak)))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--sizes', type=int, nargs='+', default=[50_000, 1_000_000])
    parser.add_argument('--post-rows', type=int, default=49_620)
    parser.add_argument('--folder', type=Path, help='where the generated files go (a million rows: 1 GB)')
    parser.add_argument('--json', type=Path)
    parser.add_argument('--one', type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one: return one_size(args.one)

    folder = Path(tempfile.mkdtemp(dir=args.folder))
    try:
        versus = against_the_post(folder, args.post_rows)
        print('against the post:', versus)
        sizes = []
        for count in args.sizes:
            source = folder/f'{count}.jsonl'
            write_rows(source, count)
            seen = subprocess.run([sys.executable, __file__, '--one', str(source)], stdout=subprocess.PIPE, text=True, check=True)
            sizes.append(json.loads(seen.stdout.splitlines()[-1]) | dict(file_bytes=source.stat().st_size))
            print('prepared:', sizes[-1])
            source.unlink()
    finally: shutil.rmtree(folder, ignore_errors=True)
    report = dict(
        against_the_post=versus, sizes=sizes,
        promises=dict(the_posts_bytes=versus['same_bytes'],
                      within_1_GB=all(size['peak_bytes'] <= 1e9 for size in sizes),
                      within_5_minutes=all(size['seconds'] <= 300 for size in sizes)),
        versions={name: version(name) for name in ('kofinetune', 'pandas', 'numpy')},
        machine=dict(python=platform.python_version(), system=platform.platform(), cores=os.cpu_count()))
    text = json.dumps(report, ensure_ascii=False)
    if args.json: args.json.write_text(text + '\n', encoding='utf-8', newline='\n')
    print(text)


if __name__ == '__main__': main()
