"""Merge an adapter that was trained elsewhere (TRL, peft, ...), write it as GGUF, and prove the file.

The base must be a Gemma 3 text model, the adapter a folder of peft. The file is compared with
the adapter beside its base on the rows (instruction, input, output). If they are not the same model, nothing is written.

    python examples/export_any_adapter.py path/to/adapter rows.jsonl exported
    python examples/export_any_adapter.py path/to/adapter rows.jsonl exported --base google/gemma-3-270m

Any other base on the Hub needs --revision. Where Ollama runs, register the model: ollama create my-model -f exported/Modelfile
"""
import argparse, tempfile, warnings, torch
from pathlib import Path
from peft import PeftConfig, PeftModel
from kofinetune import Recipe, format_prompt, read_rows
from kofinetune.base import load_base
from kofinetune.export import licences, modelfile
from kofinetune.gguffile import check_gguf, load_gguf, write_gguf
from kofinetune.merge import compare_models, copy_tokenizer, merge_into
from kofinetune.proof import verify_gguf

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
for name in ('adapter', 'rows', 'out'): parser.add_argument(name, type=Path)
parser.add_argument('--base', default='', help='default: what adapter_config.json names')
parser.add_argument('--revision', default='', help='the commit of a base on the Hub')
parser.add_argument('--style', default='alpaca', choices=('alpaca', 'blog', 'chat'), help='how its training prompts were written')
parser.add_argument('--force', action='store_true', help='merge into --base even if adapter_config.json names another one')
warnings.simplefilter('ignore')

def export(args, out, file='model-q8_0.gguf'):
    named, best = PeftConfig.from_pretrained(args.adapter).base_model_name_or_path or '', Recipe.named('best')
    base, rows = args.base or named, read_rows(args.rows)[:100]
    if Path(named or base).name != Path(base).name and not args.force:
        raise ValueError(f'{args.adapter} was trained for {named}, and --base is {base}; leave --base out, or add --force')
    if not rows: raise ValueError(f'{args.rows} has no rows to compare the file and the adapter on')
    revision = args.revision or (best.revision if base == best.base else '')
    recipe = Recipe().replace(base=base, revision=revision, style=args.style, quant='none')
    def load(**more): return load_base(recipe, dtype=torch.float32, **more)
    merge_into(load()[0], args.adapter).bfloat16().save_pretrained(out/'merged')
    copy_tokenizer(recipe, out/'merged')
    size = write_gguf(out/'merged', out/file, 'q8_0')['bytes'] / 1e6
    (out/'Modelfile').write_text(modelfile(file, args.style, licences=licences('', base)[1:]), 'utf-8', newline='\n')
    proof = verify_gguf(out/'merged', out/file, [format_prompt(row, args.style) for row in rows], dtype='q8_0')
    wrong, (live, tok) = check_gguf(out/'merged', out/file, 'q8_0')['different'] + proof['failed'], load()
    live, made = PeftModel.from_pretrained(live, args.adapter), load_gguf(out/'merged', out/file)
    for name, model, most in (('merged', load(path=out/'merged')[0], .01), (file, made.to(live.device), .1)):   # bf16, q8_0
        kl = compare_models(live, model, tok, rows, args.style, 2048)['kl']
        if not kl < most: wrong.append(f'{name} is {kl:.3f} nats a token from it, more than {most}')
    if wrong: raise ValueError(f'{file} is not the adapter beside its base: {"; ".join(wrong)}')
    return (f'{size:.1f} MB, {kl:.5f} nats a token from the adapter beside {base}; {proof["tokens"]["checked"]} prompts '
            f'with the same tokens, {proof["greedy"]["equal"]} of {proof["greedy"]["checked"]} answers equal to the letter')

args = parser.parse_args()
try:
    if args.out.exists(): raise ValueError(f'{args.out} is there already; name another folder')
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.out.parent) as folder:
        print(f'{args.out}: {export(args, Path(folder)/"made")}')
        (Path(folder)/'made').rename(args.out)
except (OSError, RuntimeError, ValueError) as e: raise SystemExit(f'{parser.prog}: {" ".join(str(e).split())}') from None
