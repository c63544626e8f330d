"""Measure what preparing rows costs: memory and time at growing sizes, and the speed against the post's own writer.

    python benchmarks/data_scale.py --json benchmarks/data_scale.json

Needs Linux and `psutil`. Rows are generated, so nothing is downloaded. The last line printed is the JSON that is written.
"""
import argparse, json, os, platform, random, shutil, subprocess, sys, tempfile, threading, time
from importlib.metadata import version
from pathlib import Path

import psutil

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


class PeakMemory:
    """Watch this process and its children. `anonymous` is the highest sum of memory that only they hold; `all` counts
    mapped files too, which the system may drop at any time. Pages that processes share are counted once (PSS)."""
    def __enter__(self):
        self.me, self.anonymous, self.all, self.stop = psutil.Process(), 0, 0, threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()
        return self

    def watch(self):
        while not self.stop.wait(.1):
            seen = [self.sizes(process) for process in [self.me, *self.me.children(recursive=True)]]
            self.anonymous = max(self.anonymous, sum(size[0] for size in seen))
            self.all = max(self.all, sum(size[1] for size in seen))

    def sizes(self, process):
        try: text = Path(f'/proc/{process.pid}/smaps_rollup').read_text()
        except OSError: return 0, 0      # it has just ended
        fields = dict(line.split(':') for line in text.splitlines()[1:])
        return tuple(1024 * int(fields[name].split()[0]) for name in ('Pss_Anon', 'Pss'))

    def __exit__(self, *_):
        self.stop.set()
        self.thread.join()


def one_size(source):
    "Prepare `source` (in a process of its own, so that its peak is its own) and print what it cost."
    from kofinetune.recipe import Recipe
    from kofinetune.large import prepare_large
    recipe = Recipe(valid_rows=1000, drop=('empty_answer', 'exact_duplicate'))
    with tempfile.TemporaryDirectory(dir=source.parent) as folder, PeakMemory() as peak:
        start, cpu = time.perf_counter(), os.times()
        counts = prepare_large(source, Path(folder), recipe)
        seconds, after = time.perf_counter() - start, os.times()
    used = sum(after[:4]) - sum(cpu[:4])
    assert counts['rows'] == counts['kept'] + counts['reported']
    assert counts['kept'] == counts['train'] + counts['valid']
    print(json.dumps(dict(rows=counts['rows'], kept=counts['kept'], seconds=round(seconds, 2), cpu_seconds=round(used, 2),
                          microseconds_per_row=round(1e6 * seconds / counts['rows'], 1),
                          cpu_microseconds_per_row=round(1e6 * used / counts['rows'], 1),
                          peak_bytes=peak.anonymous, peak_bytes_with_mapped_files=peak.all)))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--sizes', type=int, nargs='+', default=[20_000, 200_000, 2_000_000])
    parser.add_argument('--post-rows', type=int, default=49_620)
    parser.add_argument('--folder', type=Path, help='where the generated files go (2 million rows: 2 GB)')
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
            runs = []
            for _ in range(3 if count <= 50_000 else 1):   # a short run is measured three times; the fastest counts
                seen = subprocess.run([sys.executable, __file__, '--one', str(source)],
                                      stdout=subprocess.PIPE, text=True, check=True)
                runs.append(json.loads(seen.stdout.splitlines()[-1]))
            sizes.append(min(runs, key=lambda run: run['cpu_seconds']) | dict(file_bytes=source.stat().st_size))
            print('prepared:', sizes[-1])
            source.unlink()
    finally: shutil.rmtree(folder, ignore_errors=True)
    # Cost is processor time, of all processes: it does not depend on how many there are, or on what else is running.
    costs, walls = ([size[name] for size in sizes] for name in ('cpu_microseconds_per_row', 'microseconds_per_row'))
    report = dict(
        against_the_post=versus, sizes=sizes,
        cost_ratio=round(costs[-1] / costs[0], 3), wall_ratio=round(walls[-1] / walls[0], 3),
        peak_bytes=max(size['peak_bytes'] for size in sizes),
        promises=dict(ten_times_the_post=versus['ratio'] >= 10 and versus['same_bytes'],
                      cost_flat_within_30_percent=.7 <= costs[-1] / costs[0] <= 1.3,
                      within_1_5_GB=all(size['peak_bytes'] <= 1.5e9 for size in sizes)),
        versions={name: version(name) for name in ('kofinetune', 'pandas', 'numpy')},
        machine=dict(python=platform.python_version(), system=platform.platform(), cores=os.cpu_count()))
    text = json.dumps(report, ensure_ascii=False)
    if args.json: args.json.write_text(text + '\n', encoding='utf-8', newline='\n')
    print(text)


if __name__ == '__main__': main()
