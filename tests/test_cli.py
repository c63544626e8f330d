"The command: exit codes, one line an error, nothing half-written."
import os, resource, subprocess, sys

import pytest

from kofinetune.recipe import Recipe

COMMAND = [sys.executable, '-c', 'from kofinetune.cli import main; main()']


def kofinetune(*args, cwd, **env):
    return subprocess.run([*COMMAND, *map(str, args)], cwd=cwd, capture_output=True, text=True, env=os.environ | env)


def write(folder, name, text):
    (folder/name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return name


# one of each kind, in a process of its own; all others are in bad_inputs/cases.toml
BAD = {   # files to write, arguments, exit code, what the one line must say
    'a file': ({'a.json': 'hello'}, ['data', '--set', 'source=a.json'], 2, 'a.json is not JSON'),
    'a recipe': ({'x.toml': 'lora_rank = 3'}, ['run', '--recipe', 'x.toml'], 2, "no field 'lora_rank'"),
    'an option': ({}, ['train', '--set', 'learning_rate=-1'], 2, 'learning_rate is -1; it must be more than 0'),
    'a stage before its turn': ({}, ['merge'], 2, 'kofinetune train'),
    'unknown command': ({}, ['dance'], 2, 'dance'),
}


@pytest.mark.parametrize('name', BAD)
def test_bad_request(name, tmp_path):
    files, args, code, says = BAD[name]
    for file, text in files.items(): write(tmp_path, file, text)
    seen = kofinetune(*args, cwd=tmp_path)
    assert (seen.returncode, 'Traceback' in seen.stderr) == (code, False), seen.stderr
    assert says in seen.stderr
    if name != 'unknown command': assert len(seen.stderr.strip().splitlines()) == 1, seen.stderr
    left = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob('*') if p.is_file() and p.name != '.lock'}
    assert left == set(files)


def test_run_folder_of_another_recipe_is_refused(tmp_path):
    assert kofinetune('data', '--run', 'r', cwd=tmp_path).returncode == 0
    before = (tmp_path/'r'/'manifest.json').read_bytes()
    seen = kofinetune('data', '--run', 'r', '--set', 'valid_rows=100', cwd=tmp_path)
    assert seen.returncode == 2 and 'valid_rows = 250, and now it is 100' in seen.stderr and '--force' in seen.stderr
    assert (tmp_path/'r'/'manifest.json').read_bytes() == before
    forced = kofinetune('data', '--run', 'r', '--set', 'valid_rows=100', '--force', cwd=tmp_path)
    assert forced.returncode == 0
    assert len((tmp_path/'r'/'data'/'valid.jsonl').read_text(encoding='utf-8').splitlines()) == 100


def test_without_network_the_download_fails_in_one_line(tmp_path):
    dead = {name: 'http://127.0.0.1:9' for name in ('http_proxy', 'https_proxy', 'HTTP_PROXY', 'HTTPS_PROXY')}
    seen = kofinetune('data', '--recipe', 'blog', cwd=tmp_path, KOFINETUNE_CACHE=str(tmp_path/'cache'), no_proxy='', NO_PROXY='', **dead)
    assert seen.returncode == 1 and 'could not be downloaded' in seen.stderr and 'Traceback' not in seen.stderr
    assert [p.name for p in (tmp_path/'cache').rglob('*') if p.is_file() and p.suffix != '.lock'] == []


def test_without_the_hubs_licence_training_says_what_to_do(tmp_path):
    assert kofinetune('data', cwd=tmp_path).returncode == 0
    seen = kofinetune('train', '--run', 'runs/laptop', '--set', 'base=google/gemma-3-270m',
                      '--set', f'revision={Recipe.named("best").revision}', cwd=tmp_path,
                      HF_HUB_OFFLINE='1', HF_HOME=str(tmp_path/'hub'))
    assert seen.returncode == 1 and 'hf auth login' in seen.stderr and 'huggingface.co/google/gemma-3-270m' in seen.stderr
    assert 'Traceback' not in seen.stderr and not (tmp_path/'runs'/'laptop'/'adapter').exists()


def test_a_later_command_takes_the_runs_own_recipe(tmp_path):
    kofinetune('data', '--run', 'r', '--set', 'valid_rows=100', cwd=tmp_path)
    again = kofinetune('data', '--run', 'r', cwd=tmp_path)
    assert again.returncode == 0 and 'already done' in again.stdout


def test_the_closing_questions_are_among_those_that_were_answered(rehearsal_run, capsys):
    from kofinetune import cli
    from kofinetune.runs import read_manifest
    cli._summarize(rehearsal_run)
    seen = capsys.readouterr().out
    shown = read_manifest(rehearsal_run)['stages']['eval']['result']['examples'][-5:]
    assert all(row['wanted'].split()[0] in seen for row in shown) and 'Ask it:' in seen


def test_help_takes_less_than_three_tenths_of_a_second(tmp_path):
    def seconds(command):     # of the processor: other tests run at the same time
        def spent(): return sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
        start = spent()
        assert subprocess.run(command, cwd=tmp_path, capture_output=True).returncode == 0
        return spent() - start
    seconds([*COMMAND, '--help'])     # compiles the bytecode
    assert min(seconds([*COMMAND, '--help']) for _ in range(5)) < 0.3


def test_help_documents_every_command(tmp_path):
    text = kofinetune('--help', cwd=tmp_path).stdout
    for command in ('run', 'data', 'train', 'merge', 'export', 'eval', 'show', 'estimate', 'verify', 'ask', 'push'): assert command in text


def test_run_says_what_it_does_before_it_loads_torch(tmp_path):
    code = 'import sys; from kofinetune.cli import main; sys.modules["torch"] = None; main()'     # to import it fails
    seen = subprocess.run([sys.executable, '-c', code, 'run', '--set', 'rows=9'], cwd=tmp_path, capture_output=True, text=True)
    assert seen.stdout == 'recipe laptop, run folder runs/laptop\n' and 'torch' in seen.stderr


def test_no_line_of_the_help_is_cut(tmp_path): assert '...\n' not in kofinetune('--help', cwd=tmp_path, COLUMNS='80').stdout.replace('[ARGS]...', '')
