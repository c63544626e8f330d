"""Merge a LoRA adapter that was trained elsewhere (TRL, peft, ...), write it as GGUF, and prove the file.

The base must be a Gemma 3 text model and the adapter a folder of peft. The rows say on what to compare the file with the model.

    python examples/export_any_adapter.py path/to/adapter rows.jsonl exported
    python examples/export_any_adapter.py path/to/adapter rows.jsonl exported --base google/gemma-3-270m

Where Ollama runs, the model is then registered with: ollama create my-model -f exported/Modelfile
"""
import argparse
import json
from pathlib import Path

import torch

from kofinetune.prompt import format_prompt
from kofinetune.recipe import Recipe
from kofinetune import read_rows
from kofinetune.gguffile import check_gguf, write_gguf
from kofinetune.proof import verify_gguf
from kofinetune.export import modelfile
from kofinetune.merge import copy_tokenizer, merge_into
from kofinetune.base import load_base

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument('adapter', type=Path)
parser.add_argument('rows', type=Path)
parser.add_argument('out', type=Path)
parser.add_argument('--base', help='default: what adapter_config.json names')
parser.add_argument('--style', default='alpaca', help='how its training prompts were written: alpaca or blog')
args = parser.parse_args()

named = json.loads((args.adapter/'adapter_config.json').read_text(encoding='utf-8'))['base_model_name_or_path']
recipe = Recipe.named('rehearsal').replace(base=args.base or named)
merged, file = args.out/'merged', args.out/'model-q8_0.gguf'
model, tok = load_base(recipe, quant='none', dtype=torch.float32)
merge_into(model, args.adapter).bfloat16().save_pretrained(merged)
copy_tokenizer(recipe, merged)
write_gguf(merged, file, 'q8_0')
(args.out/'Modelfile').write_text(modelfile(file.name, args.style), encoding='utf-8', newline='\n')

prompts = [format_prompt(row, args.style) for row in read_rows(args.rows)[:100]]
proof = verify_gguf(merged, file, prompts, dtype='q8_0')
wrong = check_gguf(merged, file, 'q8_0')['different'] + proof['failed']
if wrong: raise SystemExit(f'{file} is not the merged model: {"; ".join(wrong)}')
print(f'{file}: {file.stat().st_size / 1e6:.1f} MB; {proof["tokens"]["checked"]} prompts with the same tokens, '
      f'{proof["greedy"]["equal"]} of {proof["greedy"]["checked"]} answers equal to the letter')
