"The held-out loss once more: plain torch, row by row, and not a line of kofinetune."
import json
import math

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def test_held_out_loss_equals_a_plain_computation(rehearsal_run):
    tok = AutoTokenizer.from_pretrained(rehearsal_run/'merged')
    model = AutoModelForCausalLM.from_pretrained(rehearsal_run/'merged', dtype=torch.float32).eval()
    nats = tokens = hits = size = 0
    for line in (rehearsal_run/'data'/'valid.jsonl').read_text(encoding='utf-8').splitlines():
        row = json.loads(line)
        prompt = f"### Instruction:\n{row['instruction']}\n\n"
        if row['input']: prompt += f"### Input:\n{row['input']}\n\n"
        prompt = tok(prompt + '### Response:\n')['input_ids']
        answer = tok(row['output'], add_special_tokens=False)['input_ids'] + [tok.convert_tokens_to_ids('<eos>')]
        with torch.no_grad(): logp = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        for i, token in enumerate(answer):
            nats -= logp[len(prompt) + i - 1, token].item()
            hits += int(logp[len(prompt) + i - 1].argmax() == token)
        tokens += len(answer)
        size += len(row['output'].encode())
    seen = json.loads((rehearsal_run/'eval'/'report.json').read_text(encoding='utf-8'))['models']
    for name in ('merged', 'gguf-bf16'):
        assert abs(seen[name]['answer_nll'] - nats / tokens) < 1e-4
        assert abs(seen[name]['perplexity'] - math.exp(nats / tokens)) < 1e-3
        assert abs(seen[name]['token_accuracy'] - hits / tokens) < 1e-4
        assert abs(seen[name]['bits_per_byte'] - nats / math.log(2) / size) < 1e-4
