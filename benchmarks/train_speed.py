"""Measure training speed: the post's settings against the recipe `best`, on one machine, in turns.

    python benchmarks/train_speed.py --rows my_rows.json --json benchmarks/results/train_speed.json

Without --model the exact shape of google/gemma-3-270m is made with random weights and a tokenizer trained on the rows; with --model BASE
(gemma-3-270m-q4, or a folder) real weights are measured. The loss is taken over whole sequences in both settings, so that the work is equal.
Each measurement is a process of its own, and the file of --json is written after each of them. The last line printed is that JSON.
On a machine with a GPU run benchmarks/gpu.sh, which calls this script.

    blog        the post's settings as TRL runs them: NF4 unpacked at every use, bf16, checkpointing, 4 x 4 padded rows
    blog_fp32   the same in fp32 (CPU only, where bf16 may have no arithmetic of its own)
    best        the recipe `best` on the post's NF4 base: packed rows that attend by themselves, NF4 unpacked once, a head that keeps no logits
    NAME_same   the settings NAME on the same few rows, to compare the losses of the first step
    pass        `best` over as many tokens as one of the post's three epochs has
    peer        with --peer: another library (benchmarks/peer.py) on 16-bit weights, in turns with bf16_lora, which is `best` on the same weights
"""
import argparse, json, os, platform, resource, shlex, subprocess, sys, tempfile, time
from importlib.metadata import version
from itertools import cycle, islice
from pathlib import Path

POST_TOKENS = 11_568_384 // 3   # in one of the post's epochs
SAME_ROWS = 16                  # one step of either setting
LIBRARIES = ('torch', 'transformers', 'datasets', 'peft', 'bitsandbytes', 'accelerate', 'trl')
ABLATIONS = {   # name: (recipe, changes to it, changes to TRL's settings); all on the same rows, whole-sequence loss; the most telling first
    'nf4_lora': ('best', {}, {}),
    'bf16_lora': ('best', dict(quant='none'), {}),
    'full': ('best', dict(quant='none', adapter='none'), {}),
    'compile': ('best', dict(batch_size=16, grad_accum=1), dict(torch_compile=True)),
    'batch_16': ('best', dict(batch_size=16, grad_accum=1), {}),
    'varlen_attention': ('best', {}, dict(attention='varlen')),
    'varlen_batch_64': ('best', dict(batch_size=64, grad_accum=1), dict(attention='varlen')),
    'eager_attention': ('best', {}, dict(attention='eager')),
    'flex_attention': ('best', {}, dict(attention='flex_attention')),
    'adamw_8bit': ('best', dict(trainer=dict(optim='adamw_bnb_8bit')), {}),
    'adafactor': ('best', dict(trainer=dict(optim='adafactor')), {}),
    'nf4_lora_packed_each_use': ('best', dict(dequantize=False), {}),
    'batch_32': ('best', dict(batch_size=32, grad_accum=1), {}),
    'length_1024': ('best', dict(max_length=1024, batch_size=2), {}),
    'length_2048': ('best', dict(max_length=2048, batch_size=1), {})}
ON_A_CPU = ('nf4_lora', 'bf16_lora', 'full', 'nf4_lora_packed_each_use')   # the ablations that tell something there
GPU_ALONE = ('varlen_attention', 'varlen_batch_64', 'flex_attention')      # PyTorch trains with these kernels on a GPU alone


def make_model(rows, folder):
    "Save the exact shape of Gemma 3 270M with random weights, and a tokenizer whose rows are as long as the post's."
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig
    from kofinetune.rehearsal import _train_tokenizer
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=262144, hidden_size=640, intermediate_size=2048, num_hidden_layers=18, num_attention_heads=4,
        num_key_value_heads=1, head_dim=256, sliding_window=512, query_pre_attn_scalar=256,
        max_position_embeddings=32768)
    Gemma3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    texts = [row[k] for row in rows for k in ('instruction', 'input', 'output') if row[k]]
    _train_tokenizer(texts, folder, 12_000 if len(rows) > 5000 else 1536)


def attend_varlen(module, query, key, value, mask, scaling=None, cu_seq_lens_q=None, max_length_q=None, **kwargs):
    "Attend within each packed row in one call of PyTorch's kernel for rows of any length. No row is longer than the window here."
    from torch.nn.attention.varlen import varlen_attn
    heads = query.shape[1] // key.shape[1]
    q, k, v = (x[0].transpose(0, 1) for x in (query, key.repeat_interleave(heads, 1), value.repeat_interleave(heads, 1)))
    made = varlen_attn(q, k, v, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q, scale=scaling, window_size=(-1, 0))
    return made[None], None


def settings(name, model, cuda):
    "The recipe and the further settings of TRL that `name` stands for."
    from kofinetune.recipe import Recipe
    name = name.removesuffix('_same')
    if name in ABLATIONS: kind, changes, more = ABLATIONS[name]
    elif name.startswith('blog'):
        kind, changes = 'blog', dict(dtype='fp32' if name == 'blog_fp32' else 'bf16')
        more = dict(gradient_checkpointing=True)   # what TRL does where the post says nothing
    else: kind, changes, more = 'best', {}, {}
    if 'torch_compile' in more and not cuda: more = more | dict(torch_compile_backend='eager')   # Inductor takes minutes there
    whole = dict(base=str(model), revision='', quant='nf4', loss='whole', style='blog', epochs=1.0, grad_accum=4, learning_rate=2e-4,
                 trainer=dict(warmup_steps=0.0))   # the post's, so that the losses can be compared
    return Recipe.named(kind).replace(**whole).replace(**changes), dict(more)


def measure(name, model, rows, threads, top=0):
    "Train on `rows` once with the settings of `name`; with `top`, say which operators took the time."
    import torch
    from torch.profiler import ProfilerActivity, profile
    from transformers import AttentionInterface
    from trl.trainer.utils import add_fused_lm_head
    from kofinetune.base import load_base
    from kofinetune.train import add_lora, encode_rows, make_trainer
    torch.set_num_threads(threads)
    cuda = torch.cuda.is_available()
    recipe, more = settings(name, model, cuda)
    loaded, tok = load_base(recipe)
    AttentionInterface.register('varlen', attend_varlen)
    if 'attention' in more: loaded.set_attn_implementation(more.pop('attention'))
    if recipe.adapter == 'lora': loaded = add_lora(loaded, recipe)
    dataset, left_out = encode_rows(rows, tok, recipe)
    more |= dict(logging_steps=1, disable_tqdm=True, logging_strategy='steps')
    with tempfile.TemporaryDirectory() as folder:
        start = lambda data, **m: make_trainer(loaded, tok, data, [], recipe, Path(folder), **more | m)
        # kernels are compiled, memory is taken; the weights stay as they are
        some = 512 if cuda else 32 if recipe.packing else 4
        start(dataset.select(range(min(len(dataset), some))), learning_rate=0.0).train()
        trainer = start(dataset)
        if name.startswith('blog') and not cuda:   # the post had TRL's last layer, PyTorch's attention and peft's own adapters
            base = trainer.model.get_base_model()
            for layer in base.modules(): vars(layer).pop('forward', None)
            base.set_attn_implementation('sdpa')
            add_fused_lm_head(base, outputs=('log_probs', 'entropy', 'is_top1'))
        watch = profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) if top else None
        if watch: watch.__enter__()
        begin = time.perf_counter()
        trainer.train()
        if cuda: torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
        if watch: watch.__exit__(None, None, None)
    tokens = sum(map(len, dataset['input_ids']))
    losses = [e['loss'] for e in trainer.state.log_history if 'loss' in e]
    late = losses[-max(1, len(losses) // 4):]
    peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    measured = dict(name=name, rows=len(dataset), left_out=left_out, tokens=tokens, seconds=seconds, tokens_per_second=tokens / seconds,
                    loss=losses[0], loss_of_the_last_quarter=sum(late) / len(late), steps=len(losses), peak_memory_bytes=peak,
                    parameters=sum(p.numel() for n, p in loaded.named_parameters() if 'lora' not in n))
    if watch:
        own = 'self_device_time_total' if cuda else 'self_cpu_time_total'
        events = sorted(watch.key_averages(), key=lambda e: -getattr(e, own))
        total = sum(getattr(e, own) for e in events)
        measured['operators'] = [dict(operator=e.key[:60], calls=e.count, seconds=getattr(e, own) / 1e6,
                                      share=getattr(e, own) / total) for e in events[:top]]
    return measured


def matrix_peak(threads):
    "The device, and the fastest matrix product seen on it, in floating-point operations a second, for each type."
    import torch
    torch.set_num_threads(threads)
    cuda = torch.cuda.is_available()
    found = {}
    for name, dtype in dict(bf16=torch.bfloat16, fp32=torch.float32).items():
        n = 8192 if cuda else 1024
        a, b = (torch.randn(n, n, device='cuda' if cuda else 'cpu', dtype=dtype) for _ in range(2))
        best = 0
        for _ in range(30 if cuda else 300):   # the first ones prepare kernels
            if cuda: torch.cuda.synchronize()
            start = time.perf_counter()
            a @ b
            if cuda: torch.cuda.synchronize()
            best = max(best, 2 * n ** 3 / (time.perf_counter() - start))
        found[name] = best
    return dict(flops=found, device=torch.cuda.get_device_name() if cuda else platform.machine() + ' CPU',
                capability=None if cuda else torch.backends.cpu.get_cpu_capability())


def peer_command(args, count):
    "The command that measures the peer, and its rows in a file: the very tokens that `best` trains on."
    from kofinetune.base import base_path, load_tokenizer
    from kofinetune.train import encode_rows
    recipe, _ = settings('bf16_lora', args.model, cuda=False)
    file = Path(args.folder)/f'peer-{count}.json'
    encoded, _ = encode_rows(list(islice(cycle(args.loaded), count)), load_tokenizer(recipe), recipe)
    file.write_text(json.dumps([*encoded['input_ids']]), encoding='utf-8', newline='\n')
    return [args.peer, str(Path(__file__).with_name('peer.py')), '--model', base_path(recipe.base), '--rows', str(file),
            '--threads', str(args.threads), *shlex.split(args.peer_options)]


def here(name, args, count, top):
    "Measure `name` in this process, on as many rows, the first ones again where they are too few."
    if name == 'matrix_peak': return matrix_peak(args.threads)
    return measure(name, args.model, list(islice(cycle(args.loaded), count)), args.threads, top)


def one(name, args, count, top):
    "Measure `name`, in a process of its own unless --together. RuntimeError says why it failed, TimeoutExpired that the time is up."
    if args.together and not name.startswith('peer'): return here(name, args, count, top)
    command = peer_command(args, count) if name.startswith('peer') else [
        sys.executable, __file__, '--one', name, '--model', str(args.model), '--rows', str(args.rows), '--first', str(count),
        '--threads', str(args.threads), '--top', str(top)]
    left = args.end - time.monotonic() if args.seconds else None
    done = subprocess.run(command, capture_output=True, text=True, timeout=left)
    if done.returncode:
        print(done.stderr[-3000:], file=sys.stderr, flush=True)
        raise RuntimeError(([*filter(str.strip, done.stderr.splitlines())] or [f'exit code {done.returncode}'])[-1][:300])
    return json.loads(done.stdout.splitlines()[-1]) | dict(name=name)


def plan(args, cuda):
    "What is measured, in the order of its worth: (where it is reported, name, rows)."
    same = min(args.blog_rows, SAME_ROWS)
    turns = [('blog', args.blog_rows)] + [('blog_fp32', args.blog_rows)] * (not cuda) + [('best', args.best_rows)]
    if args.peer: turns += [('bf16_lora', args.best_rows), ('peer', args.best_rows)]
    compared = ['best'] + ['blog'] * (args.blog_rows != same) + ['bf16_lora', 'peer'] * bool(args.peer)
    todo = [('peak', 'matrix_peak', 0)] + [('runs', *turn) for turn in turns] * args.rounds
    todo += [('runs', name + '_same', same) for name in compared]
    if args.pass_tokens:   # the packaged rows, or a few thousand, as often as it takes
        from kofinetune.base import load_tokenizer
        from kofinetune.train import encode_rows
        recipe, _ = settings('best', args.model, cuda)
        some, _ = encode_rows(args.loaded[:1000], load_tokenizer(recipe), recipe)
        todo.append(('runs', 'pass', round(args.pass_tokens * len(some) / sum(map(len, some['input_ids'])))))
    chosen = ABLATIONS if cuda or args.together else ON_A_CPU
    todo += [('ablations', name, args.best_rows) for name in chosen if args.ablations]
    return todo + [('operators', name, args.profile_rows) for name in ('blog' if cuda else 'blog_fp32', 'best') if args.profile_rows]


def summary(found, args, left_out):
    "What the runs say. A figure that was not measured is None."
    runs, peak = found['runs'], found['peak']
    def rate(name): return max((run['tokens_per_second'] for run in runs.get(name, ())), default=None)
    def ratio(a, b): return a / b if a and b else None
    def loss(name):   # of the first step on the same rows
        few = name == 'blog' and args.blog_rows <= SAME_ROWS
        return next((run['loss'] for run in runs.get(name if few else name + '_same', ())), None)
    def share(name):   # a step with frozen weights is four operations a weight and token: half of them forward
        flops = max((4 * run['parameters'] * run['tokens_per_second'] for run in runs.get(name, ())), default=None)
        return ratio(flops, max(peak.get('flops', {}).values(), default=None))
    best, blog = rate('best'), rate('blog')
    apart = ratio(loss('best'), loss('blog'))
    report = dict(
        blog_tokens_per_second=blog, best_tokens_per_second=best, ratio=ratio(best, blog),
        loss_difference=apart and abs(apart - 1), peak_share=share('best'), blog_peak_share=share('blog'), peak_flops=peak.get('flops'),
        seconds_for_the_posts_epoch=ratio(POST_TOKENS, best), runs=runs, operators=found['operators'], ablations=found['ablations'],
        model=args.described, versions={p: version(p) for p in LIBRARIES}, python=platform.python_version(),
        machine=dict(threads=args.threads, device=peak.get('device'), cores=os.cpu_count(), capability=peak.get('capability')),
        left_out=left_out)
    from kofinetune import __version__   # a machine that only measures has the files, not the installed package
    report['versions'] = dict(kofinetune=__version__) | report['versions']
    if 'blog_fp32' in runs: report |= dict(blog_fp32_tokens_per_second=rate('blog_fp32'), ratio_fp32=ratio(best, rate('blog_fp32')))
    if 'peer' in runs:
        ours, theirs = rate('bf16_lora'), rate('peer')
        apart = ratio(loss('peer'), loss('bf16_lora'))
        report['peer'] = dict(
            peer_tokens_per_second=theirs, our_tokens_per_second=ours, ratio=ratio(ours, theirs), loss_difference=apart and abs(apart - 1),
            versions=runs['peer'][0]['versions'], python=runs['peer'][0]['python'], command=runs['peer'][0]['command'])
    return report


def save(report, path):
    "Write the file whole, or leave the one before."
    part = Path(f'{path}.part')
    part.write_text(json.dumps(report, indent=1) + '\n', encoding='utf-8', newline='\n')
    part.replace(path)


def run_plan(args, cuda):
    "Measure what the plan says until the time is up, and write after each what there is. What was left out, and why, is in the report."
    found, left_out = dict(peak={}, runs={}, ablations=[], operators={}), []
    report = summary(found, args, left_out)
    for where, name, count in plan(args, cuda):
        try:
            if not cuda and name in GPU_ALONE: raise RuntimeError('needs a GPU')
            if args.seconds and time.monotonic() > args.end: raise TimeoutError
            result = one(name, args, count, 10 * (where == 'operators'))
        except (RuntimeError, ValueError, NotImplementedError, TimeoutError, subprocess.TimeoutExpired) as error:
            late = isinstance(error, (TimeoutError, subprocess.TimeoutExpired))
            why = 'the time was up' if late else ' '.join(str(error).split())[:300] or type(error).__name__
            left_out.append(dict(name=name, where=where, why=why))
            print(f'{name:26} left out: {why}', flush=True)
        else:
            if where == 'peak': found['peak'] = result
            elif where == 'runs': found['runs'].setdefault(name, []).append(result)
            elif where == 'operators': found['operators'][name] = result['operators']
            else: found['ablations'].append(result)
            if where != 'peak':
                print(f'{name:26} {result["tokens"]:>9,} tokens {result["seconds"]:8.1f} s {result["tokens_per_second"]:11,.1f} tokens/s'
                      f'  loss {result["loss"]:.4f}  peak {result["peak_memory_bytes"] / 1e9:.2f} GB', flush=True)
        report = summary(found, args, left_out)
        if args.json: save(report, args.json)
    return report


def main():
    from kofinetune.data import load_rows
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--rows', default='rehearsal', help='a .json, .jsonl or .csv file of rows; default: the packaged ones')
    parser.add_argument('--model', help='a base, as a recipe names it; default: the shape of Gemma 3 270M with random weights')
    parser.add_argument('--rounds', type=int, default=2, help='how often each setting is measured, in turns')
    parser.add_argument('--blog-rows', type=int, help='rows for the post\'s settings; default 16 on a CPU, 512 on a GPU')
    parser.add_argument('--best-rows', type=int, help='rows for best; default 64 on a CPU, 8000 on a GPU')
    parser.add_argument('--profile-rows', type=int, default=16, help='rows to watch the operators on; 0: none')
    parser.add_argument('--pass-tokens', type=int, default=0, help=f'tokens of one long run; one of the post\'s epochs has {POST_TOKENS:,}')
    parser.add_argument('--threads', type=int, default=os.cpu_count(), help='CPU threads; default: as many as cores')
    parser.add_argument('--ablations', action='store_true', help='also each change to best on its own, at equal tokens')
    parser.add_argument('--peer', metavar='PYTHON', help='the Python of another library\'s environment; see benchmarks/peer.py')
    parser.add_argument('--peer-options', default='', help='further options of benchmarks/peer.py, in one argument')
    parser.add_argument('--seconds', type=float, default=0, help='stop after this time and list what was left out; 0: no limit')
    parser.add_argument('--together', action='store_true', help='every setting in this process: quick, for a dry run; figures mean little')
    parser.add_argument('--json', help='write what was measured to this file')
    for hidden in ('--one', '--first', '--top'): parser.add_argument(hidden, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.loaded, args.end = load_rows(args.rows), time.monotonic() + args.seconds
    if args.one:
        print(json.dumps(here(args.one, args, int(args.first), int(args.top))))
        return
    import torch
    cuda = torch.cuda.is_available()
    args.blog_rows, args.best_rows = args.blog_rows or (512 if cuda else 16), args.best_rows or (8000 if cuda else 64)
    with tempfile.TemporaryDirectory() as args.folder:
        args.described = Path(args.model).name if args.model else 'the shape of Gemma 3 270M, random weights'
        if not args.model:
            args.model = Path(args.folder)/'model'
            make_model(args.loaded, args.model)
        report = run_plan(args, cuda)
    print(json.dumps(report))
    if any(one['why'] not in ('the time was up', 'needs a GPU') for one in report['left_out']): raise SystemExit(1)


if __name__ == '__main__': main()
