"""Measure training speed: the post's settings against the recipe `best`, on one machine, in turns.

    python benchmarks/train_speed.py --rows my_rows.json --json benchmarks/results/train_speed.json

Without --model the exact shape of google/gemma-3-270m is made with random weights and a tokenizer trained on the rows;
with --model BASE (gemma-3-270m-q4, or a folder) real weights are measured. The loss is taken over whole sequences in both settings, so that the work
is equal. Each measurement is a process of its own. The last line printed is the JSON that is written.

    blog        the post's settings as TRL runs them: NF4 unpacked at every use, bf16, checkpointing, 4 x 4 padded rows
    blog_fp32   the same in fp32 (CPU only, where bf16 may have no arithmetic of its own)
    best        the recipe `best`: packed rows that attend by themselves, NF4 unpacked once, a head that keeps no logits
    best_same   `best` on the very rows that blog saw, to compare the losses
"""
import argparse, json, os, platform, resource, subprocess, sys, tempfile, time
from importlib.metadata import version
from pathlib import Path

LIBRARIES = ('torch', 'transformers', 'datasets', 'peft', 'bitsandbytes', 'accelerate', 'trl')
ABLATIONS = {   # name: (recipe, changes to it, changes to TRL's settings); all on the same rows, whole-sequence loss
    'nf4_lora': ('best', {}, {}),
    'nf4_lora_packed_each_use': ('best', dict(dequantize=False), {}),
    'bf16_lora': ('best', dict(quant='none'), {}),
    'full': ('best', dict(quant='none', adapter='none'), {}),
    'length_1024': ('best', dict(max_length=1024, batch_size=2), {}),
    'length_2048': ('best', dict(max_length=2048, batch_size=1), {}),
    'batch_16': ('best', dict(batch_size=16, grad_accum=1), {}),
    'batch_32': ('best', dict(batch_size=32, grad_accum=1), {}),
    'compile': ('best', dict(batch_size=16, grad_accum=1), dict(torch_compile=True)),
    'eager_attention': ('best', {}, dict(attention='eager')),
    'adamw_8bit': ('best', dict(trainer=dict(optim='adamw_bnb_8bit')), {}),
    'adafactor': ('best', dict(trainer=dict(optim='adafactor')), {})}
ON_A_CPU = ('nf4_lora', 'nf4_lora_packed_each_use', 'bf16_lora', 'full')   # the ablations that are measured there


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


def settings(name, model, cuda):
    "The recipe and the further settings of TRL that `name` stands for."
    from kofinetune.recipe import Recipe
    if name in ABLATIONS: kind, changes, more = ABLATIONS[name]
    elif name.startswith('blog'):
        kind, changes = 'blog', dict(dtype='fp32' if name == 'blog_fp32' else 'bf16')
        more = dict(gradient_checkpointing=True)   # what TRL does where the post says nothing
    else: kind, changes, more = 'best', {}, {}
    if kind == 'best' and not cuda: changes = dict(batch_size=1, grad_accum=16) | changes   # the same step, less memory
    whole = dict(base=str(model), revision='', loss='whole', style='blog', epochs=1.0, trainer=dict(warmup_steps=0.0))
    return Recipe.named(kind).replace(**whole).replace(**changes), dict(more)


def measure(name, model, rows, threads, top=0):
    "Train on `rows` once with the settings of `name`; with `top`, say which operators took the time."
    import torch
    from torch.profiler import ProfilerActivity, profile
    from trl.trainer.utils import add_fused_lm_head
    from kofinetune.base import load_base
    from kofinetune.train import add_lora, encode_rows, make_trainer
    torch.set_num_threads(threads)
    cuda = torch.cuda.is_available()
    recipe, more = settings(name, model, cuda)
    loaded, tok = load_base(recipe)
    if 'attention' in more: loaded.set_attn_implementation(more.pop('attention'))
    if recipe.adapter == 'lora': loaded = add_lora(loaded, recipe)
    dataset, left_out = encode_rows(rows, tok, recipe)
    more |= dict(logging_steps=1, disable_tqdm=True, logging_strategy='steps')
    with tempfile.TemporaryDirectory() as folder:
        start = lambda data: make_trainer(loaded, tok, data, [], recipe, Path(folder), **more)
        if cuda: start(dataset).train()   # warms up: kernels are compiled, memory is taken
        trainer = start(dataset)
        if name.startswith('blog') and not cuda:   # the post had TRL's last layer and PyTorch's attention
            trainer.model.get_base_model().set_attn_implementation('sdpa')
            add_fused_lm_head(trainer.model.get_base_model(), outputs=('log_probs', 'entropy', 'is_top1'))
        watch = profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) if top else None
        if watch: watch.__enter__()
        begin = time.perf_counter()
        trainer.train()
        if cuda: torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
        if watch: watch.__exit__(None, None, None)
    tokens = sum(map(len, dataset['input_ids']))
    steps = [e for e in trainer.state.log_history if 'loss' in e]
    peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    measured = dict(name=name, rows=len(dataset), left_out=left_out, tokens=tokens, seconds=seconds,
                    tokens_per_second=tokens / seconds, loss=steps[0]['loss'], steps=len(steps),
                    peak_memory_bytes=peak, parameters=sum(p.numel() for n, p in loaded.named_parameters()
                                                           if 'lora' not in n))
    if watch:
        own = 'self_device_time_total' if cuda else 'self_cpu_time_total'
        events = sorted(watch.key_averages(), key=lambda e: -getattr(e, own))
        total = sum(getattr(e, own) for e in events)
        measured['operators'] = [dict(operator=e.key[:60], calls=e.count, seconds=getattr(e, own) / 1e6,
                                      share=getattr(e, own) / total) for e in events[:top]]
    return measured


def matrix_peak(threads):
    "The fastest matrix product seen here, in floating-point operations a second, for each type."
    import torch
    torch.set_num_threads(threads)
    cuda = torch.cuda.is_available()
    found = {}
    for name, dtype in dict(bf16=torch.bfloat16, fp32=torch.float32).items():
        n = 8192 if cuda else 1024
        a, b = (torch.randn(n, n, device='cuda' if cuda else 'cpu', dtype=dtype) for _ in range(2))
        best = 0
        for _ in range(30 if cuda else 6):
            if cuda: torch.cuda.synchronize()
            start = time.perf_counter()
            a @ b
            if cuda: torch.cuda.synchronize()
            best = max(best, 2 * n ** 3 / (time.perf_counter() - start))
        found[name] = best
    return found


def in_process(name, args, rows, top=0):
    "Run one measurement in a process of its own."
    command = [sys.executable, __file__, '--one', name, '--model', str(args.model), '--rows', str(args.rows),
               '--first', str(rows), '--threads', str(args.threads), '--top', str(top)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode: raise SystemExit(f'{name} failed:\n{done.stderr[-3000:]}')
    result = json.loads(done.stdout.splitlines()[-1])
    print(f'{name:26} {result["tokens"]:>9,} tokens {result["seconds"]:8.1f} s {result["tokens_per_second"]:11,.1f} '
          f'tokens/s  loss {result["loss"]:.4f}  peak {result["peak_memory_bytes"] / 1e9:.2f} GB', flush=True)
    return result


def best_of(runs): return max(runs, key=lambda r: r['tokens_per_second'])


def main():
    from kofinetune.data import load_rows
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--rows', default='rehearsal', help='a .json, .jsonl or .csv file of rows; default: the packaged ones')
    parser.add_argument('--model', help='a base, as a recipe names it; default: the shape of Gemma 3 270M with random weights')
    parser.add_argument('--rounds', type=int, default=2, help='how often each setting is measured, in turns')
    parser.add_argument('--blog-rows', type=int, help='rows for the post\'s settings; default 16 on a CPU, 512 on a GPU')
    parser.add_argument('--best-rows', type=int, help='rows for best; default 64 on a CPU, 8000 on a GPU')
    parser.add_argument('--profile-rows', type=int, default=16, help='rows to watch the operators on; 0: none')
    parser.add_argument('--threads', type=int, default=os.cpu_count(), help='CPU threads; default: as many as cores')
    parser.add_argument('--ablations', action='store_true', help='also each change to best on its own, at equal tokens')
    parser.add_argument('--json', help='write what was measured to this file')
    for hidden in ('--one', '--first', '--top'): parser.add_argument(hidden, help=argparse.SUPPRESS)
    args = parser.parse_args()
    rows = load_rows(args.rows)
    if args.one:
        print(json.dumps(measure(args.one, args.model, rows[:int(args.first)], args.threads, int(args.top))))
        return
    import torch
    cuda = torch.cuda.is_available()
    blog_rows, best_rows = args.blog_rows or (512 if cuda else 16), args.best_rows or (8000 if cuda else 64)
    with tempfile.TemporaryDirectory() as folder:
        described = Path(args.model).name if args.model else 'the shape of Gemma 3 270M, random weights'
        if not args.model:
            args.model = Path(folder)/'model'
            make_model(rows, args.model)
        plan = [('blog', blog_rows)] + ([] if cuda else [('blog_fp32', blog_rows)]) + [('best', best_rows)]
        runs = {name: [] for name, _ in plan}
        for _ in range(args.rounds):
            for name, count in plan: runs[name].append(in_process(name, args, count))
        same = in_process('best_same', args, blog_rows)
        profiles = {name: in_process(name, args, args.profile_rows, top=10)['operators']
                    for name in ('blog' if cuda else 'blog_fp32', 'best') if args.profile_rows}
        ablations = [in_process(name, args, best_rows) for name in (ABLATIONS if cuda else ON_A_CPU)] if args.ablations else []
    blog, best, peak = best_of(runs['blog']), best_of(runs['best']), matrix_peak(args.threads)
    flops = lambda run: 4 * run['parameters'] * run['tokens_per_second']
    report = dict(
        blog_tokens_per_second=blog['tokens_per_second'], best_tokens_per_second=best['tokens_per_second'],
        ratio=best['tokens_per_second'] / blog['tokens_per_second'],
        loss_difference=abs(same['loss'] - blog['loss']) / blog['loss'],
        peak_share=flops(best) / max(peak.values()), blog_peak_share=flops(blog) / max(peak.values()),
        peak_flops=peak, seconds_for_the_posts_epoch=11_568_384 / 3 / best['tokens_per_second'],
        runs=runs | dict(best_same=[same]), operators=profiles, ablations=ablations,
        model=described,
        versions={p: version(p) for p in ('kofinetune', *LIBRARIES)}, python=platform.python_version(),
        machine=dict(threads=args.threads, device=torch.cuda.get_device_name() if cuda else platform.machine() + ' CPU', cores=os.cpu_count(),
                     capability=None if cuda else torch.backends.cpu.get_cpu_capability()))
    if not cuda:
        fp32 = best_of(runs['blog_fp32'])['tokens_per_second']
        report |= dict(blog_fp32_tokens_per_second=fp32, ratio_fp32=best['tokens_per_second'] / fp32)
    if args.json: Path(args.json).write_text(json.dumps(report, indent=1) + '\n', encoding='utf-8', newline='\n')
    print(json.dumps(report))


if __name__ == '__main__': main()
