"Korean benchmarks through lm-evaluation-harness: its own task definitions on rows written here, and ours end to end."
import random

import pytest
import torch
import yaml

from kofinetune.prompt import format_prompt
from kofinetune.recipe import Recipe
from kofinetune.runs import read_jsonl, write_jsonl
from kofinetune.scoring import answer_nll
from kofinetune.bench import benchmark
from kofinetune.train import load_tuned

BENCHMARKS = ('kobest', 'haerae', 'kmmlu')
lm_eval = pytest.importorskip('lm_eval', reason="lm-eval is missing; pip install 'kofinetune[bench]'")

# A few rows of our own in the form of each data set (made up for this test; not the benchmarks' rows).
ROWS = {
    'kobest_copa': ([dict(premise='비가 왔다.', question='결과', alternative_1='길이 젖었다.', alternative_2='길이 말랐다.', label=0),
                     dict(premise='불이 꺼졌다.', question='원인', alternative_1='배가 고팠다.', alternative_2='전기가 나갔다.', label=1)], 2,
                    ('비가 왔다.  그래서', ' 길이 젖었다.')),
    'kobest_boolq': ([dict(paragraph='사과는 과일이다.', question='사과는 과일인가?', label=1)], 2,
                     ('사과는 과일이다. 질문: 사과는 과일인가? 답변:', '아니오')),
    'haerae_general_knowledge': ([dict(query='한국의 수도는? (A) 부산 (B) 서울 (C) 대구 (D) 광주 (E) 대전', answer='(B)')], 5, ('(E) 대전', ' (A)')),
    'kmmlu_accounting': ([dict(question='1 더하기 1은?', A='1', B='2', C='3', D='4', answer=2)], 4, ('정답：', ' A')),
}


@pytest.fixture(scope='module')
def tuned(rehearsal_run): return load_tuned(Recipe.named('rehearsal'), rehearsal_run)


@pytest.mark.parametrize('name', ROWS)
def test_the_harness_asks_its_own_tasks(name, rehearsal_run):
    from datasets import Dataset
    rows, choices, (context, first) = ROWS[name]
    data = {split: Dataset.from_list(rows) for split in ('train', 'validation', 'test', 'dev')}
    task = dict(task=name, custom_dataset=lambda **_: data)
    seen = benchmark(Recipe.named('rehearsal'), rehearsal_run, [task])[name]['tuned']
    assert seen['rows'] == len(rows) and seen['chance'] == 1 / choices and len(seen['correct']) == len(rows)
    assert seen['prompt'][0].rstrip().endswith(context) and seen['prompt'][1].strip() == first.strip(), seen['prompt']
    assert seen['versions']['lm-eval'] == lm_eval.__version__ and seen['versions'][name] in (1.0, 2.0)


def test_the_groups_hold_the_tasks_that_are_known_by_these_names(rehearsal_run):
    from pathlib import Path
    from lm_eval.tasks import TaskManager
    folders = [Path(lm_eval.__file__).parent/'tasks'/name for name in BENCHMARKS]
    known = TaskManager(include_path=folders, include_defaults=False)
    assert set(BENCHMARKS) <= set(known.all_groups)
    leaves = [t for t in known.all_subtasks if t.startswith(BENCHMARKS)]
    assert sum(t.startswith('kobest_') for t in leaves) == 5 and sum(t.startswith('haerae_') for t in leaves) == 5
    with pytest.raises(KeyError, match="'mmlu' is not a registered task"):
        benchmark(Recipe.named('rehearsal'), rehearsal_run, ['mmlu'])


def own_task(rows, folder):
    "A task in a local folder: the rows as multiple choice, each with three answers to other rows of its kind."
    draw, questions = random.Random(0), []
    for row in rows:
        others = sorted({r['output'] for r in rows if r['kind'] == row['kind']} - {row['output']})
        choices = draw.sample([row['output'], *draw.sample(others, 3)], 4)
        questions.append(dict(prompt=format_prompt(row), choices=choices, right=choices.index(row['output'])))
    data = str(write_jsonl(questions, folder/'questions.jsonl'))
    task = dict(task='own_rows', dataset_path='json', dataset_kwargs=dict(data_files=dict(test=data)), test_split='test',
                output_type='multiple_choice', doc_to_text='prompt', doc_to_choice='choices', doc_to_target='right', target_delimiter='',
                metric_list=[dict(metric='acc')])
    (folder/'own_rows.yaml').write_text(yaml.safe_dump(task), encoding='utf-8')
    return str(folder/'own_rows.yaml')


def test_a_task_of_a_local_folder_on_base_and_tuned(rehearsal_run, tmp_path):
    rows = read_jsonl(rehearsal_run/'data'/'valid.jsonl')[:120]
    result = benchmark(Recipe.named('rehearsal'), rehearsal_run, [own_task(rows, tmp_path)], limit=80)['own_rows']
    base, after = result['base'], result['tuned']
    assert base['rows'] == after['rows'] == 80 and base['chance'] == after['chance'] == .25
    assert after['accuracy'] > .8 and after['accuracy_ci'][0] <= after['accuracy'] <= after['accuracy_ci'][1]
    assert result['difference'] == pytest.approx(after['accuracy'] - base['accuracy'])
    assert base['prompt'][1] in {row['output'] for row in rows}           # nothing between prompt and answer, as trained
    assert base['prompt'][0] == format_prompt(rows[0])


def test_the_harness_scores_as_answer_nll_does(rehearsal_run, tuned):
    "The log-probability of a choice is that of the prompt's last newline, which the harness moves there, and of the answer, behind one <bos>."
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    model, tok = tuned
    rows = read_jsonl(rehearsal_run/'data'/'valid.jsonl')[:20]
    asked = [Instance('loglikelihood', {}, (format_prompt(row), row['output']), i) for i, row in enumerate(rows)]
    theirs = [logp for logp, _ in HFLM(pretrained=model, tokenizer=tok, batch_size=8).loglikelihood(asked, disable_tqdm=True)]
    expected = []
    for row, score in zip(rows, answer_nll(model, tok, rows)):
        prompt, answer = tok(format_prompt(row))['input_ids'], tok(row['output'], add_special_tokens=False)['input_ids']
        with torch.inference_mode(): logp = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        newline, end = logp[len(prompt) - 2, prompt[-1]].item(), logp[-1, tok.eos_token_id].item()
        expected.append(newline - score['nll'] - end)
    assert theirs == pytest.approx(expected, abs=2e-3)
