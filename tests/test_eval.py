"Held-out loss against an independent computation, in plain torch, row by row."
import json
import math

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kofinetune.data import read_jsonl
from kofinetune.eval import answer_nll, generate, summarize


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
    seen = json.loads((rehearsal_run/'eval'/'report.json').read_text(encoding='utf-8'))['models']['merged']
    assert abs(seen['answer_nll'] - nats / tokens) < 1e-4
    assert abs(seen['token_accuracy'] - hits / tokens) < 1e-4
    assert abs(seen['bits_per_byte'] - nats / math.log(2) / size) < 1e-4


def test_batching_changes_neither_scores_nor_answers(rehearsal_run):
    tok = AutoTokenizer.from_pretrained(rehearsal_run/'merged')
    model = AutoModelForCausalLM.from_pretrained(rehearsal_run/'merged', dtype=torch.float32).eval()
    rows = read_jsonl(rehearsal_run/'data'/'valid.jsonl')[:40]
    together, alone = (answer_nll(model, tok, rows, batch_size=n) for n in (40, 1))
    assert all(abs(a['nll'] / a['tokens'] - b['nll'] / b['tokens']) < 1e-4 for a, b in zip(together, alone))
    assert generate(model, tok, rows, batch_size=40) == generate(model, tok, rows, batch_size=1)


def test_interval_shrinks_with_the_square_root_of_the_rows(rehearsal_run):
    scores = [dict(nll=float(i % 7), tokens=1, correct=0, bytes=1) for i in range(1600)]
    few, many = summarize(scores[:100])['answer_nll_ci'], summarize(scores)['answer_nll_ci']
    assert 3 < (few[1] - few[0]) / (many[1] - many[0]) < 5
