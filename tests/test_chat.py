"Conversations: which text, which tokens are in the loss, where an answer ends, which style a base gets, and every stage on them."
import json
import shutil
from itertools import groupby
from pathlib import Path

import pytest
from conftest import vouch

from test_bases import other_base

from kofinetune import chat, cli
from kofinetune.audit import audit
from kofinetune.base import base_path, load_base, load_tokenizer
from kofinetune.chat import end_ids, pick_style, tokenize, turns
from kofinetune.data import clean_rows, prepare, split_rows
from kofinetune.eval import evaluate
from kofinetune.export import export_ollama, modelfile
from kofinetune.formats import read_rows
from kofinetune.gguffile import write_gguf
from kofinetune.merge import merge_adapter
from kofinetune.prompt import format_answer, format_prompt
from kofinetune.proof import compare_texts, difficult_rows, verify_ollama
from kofinetune.recipe import Recipe
from kofinetune.runs import read_jsonl, write_jsonl
from kofinetune.scoring import answer_nll, generate
from kofinetune.server import create_model, read_modelfile
from kofinetune.train import encode, finetune

CASES = Path(__file__).resolve().parent.parent.parent/'shared'/'cases'
GEMMA = ('<start_of_turn>user\n짧게.\n\n사과는 얼마예요?<end_of_turn>\n<start_of_turn>model\n이천 원입니다.<end_of_turn>\n'
         '<start_of_turn>user\n두 개면요?<end_of_turn>\n<start_of_turn>model\n')
CHATML = ("{% for m in messages %}<|start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
          "{{ m.content }}<|end|>\n{% endfor %}")


def conversation(pairs=2, system='짧게.', n=0):
    said = [dict(role='system', content=system)] if system else []
    for i in range(pairs):
        said += [dict(role='user', content=f'{n}번 손님의 질문 {i}'), dict(role='assistant', content=f'{n}번 손님께 답 {i}.')]
    return dict(instruction=said[-2]['content'], input='', output=said[-1]['content'], messages=said)


def pieces(row, tok, style):
    "Cut what `tokenize` makes of a row: (ids, whether they are in the loss) of each piece."
    ids, labels, start = tokenize(row, tok, style)
    assert all(label in (i, -100) for i, label in zip(ids, labels))
    made = [([i for i, _ in group], graded) for graded, group in groupby(zip(ids, labels), key=lambda one: one[1] != -100)]
    assert made[-1] == (ids[start:], True)
    return made


@pytest.fixture(scope='module')
def tok(): return load_tokenizer(Recipe())


@pytest.fixture
def instruct(tmp_path):
    "The stand-in with a chat template, as an instruct model has one."
    base = tmp_path/'gemma-it'
    shutil.copytree(base_path('rehearsal'), base)
    shutil.copyfile(Path(chat.__file__).parent/'assets'/'chat_template.jinja', base/'chat_template.jinja')
    return base


# ---- text and tokens

def test_the_text_is_that_of_gemmas_template():
    texts = ['짧게.', '사과는 얼마예요?', '이천 원입니다.', '두 개면요?', '사천 원입니다.']
    for space in ('', ' ', '\n'):
        said = [dict(role=role, content=space + text + space) for role, text in zip(('system', *('user', 'assistant') * 2), texts)]
        row = dict(instruction='두 개면요?', input='', output=texts[-1], messages=said)
        assert format_prompt(row, 'chat') == format_prompt(row | dict(messages=said[:-1]), 'chat') == GEMMA
        assert format_answer(row | dict(output=space + texts[-1] + space), 'chat') == texts[-1]
    assert turns(dict(instruction='합은?', input='3, 4', output='7')) == [dict(role='user', content='합은?\n\n3, 4'), dict(role='assistant', content='7')]
    assert format_prompt(dict(instruction='합은?', input=''), 'chat') == '<start_of_turn>user\n합은?<end_of_turn>\n<start_of_turn>model\n'


@pytest.mark.parametrize('system', ['', '짧게.'])
@pytest.mark.parametrize('pairs', range(1, 7))
def test_every_answer_and_its_terminator_is_in_the_loss_and_nothing_else(tok, pairs, system):
    row = conversation(pairs, system)
    parts = pieces(row, tok, 'chat')
    said = [one['content'] for one in row['messages'] if one['role'] == 'assistant']
    assert [tok.decode(ids) for ids, graded in parts if graded] == [text + '<end_of_turn>' for text in said]
    example, ids = encode(row, tok, 'chat'), []
    assert example['input_ids'] == [i for part, _ in parts for i in part] and example['labels'].count(-100) == sum(len(p) for p, g in parts if not g)
    at = [i for i, one in enumerate(row['messages']) if one['role'] == 'assistant']
    for part, graded in parts:   # each answer stands behind the ids that the model is asked with
        if graded: assert ids == tok(format_prompt(dict(messages=row['messages'][:at.pop(0)]), 'chat'))['input_ids']
        ids = ids + part
    whole = encode(row, tok, 'chat', loss='whole')
    assert whole['labels'] == whole['input_ids'] == example['input_ids']
    assert encode(row, tok, 'chat', max_length=len(ids) - 1) is None and encode(row, tok, 'chat', max_length=len(ids)) == example


def test_the_other_styles_see_the_last_question_and_keep_their_ids(tok):
    row = conversation()
    plain = {name: row[name] for name in ('instruction', 'input', 'output')}
    for style in ('alpaca', 'blog'): assert encode(row, tok, style) == encode(plain, tok, style)
    assert pieces(plain, tok, 'alpaca')[-1][0][-1] == tok.eos_token_id and end_ids(tok) == [tok.eos_token_id]
    assert tok.convert_ids_to_tokens(end_ids(tok, 'chat')) == ['<end_of_turn>', '<eos>']


def test_the_template_of_another_base_is_taken_from_its_tokenizer(tmp_path):
    base = other_base(tmp_path/'qwen', 'qwen3')
    (base/'chat_template.jinja').write_text(CHATML)
    tok = load_tokenizer(Recipe(base=str(base)))
    assert tok.convert_ids_to_tokens(end_ids(tok, 'chat')) == ['<|end|>']
    *_, (prompt, _), (last, _) = pieces(conversation(), tok, 'chat')
    assert tok.decode(last) == '0번 손님께 답 1.<|end|>' and tok.decode(prompt).endswith('<|start|>assistant\n<think>\n\n</think>\n\n')
    graded = [tok.decode(ids) for ids, graded in pieces(conversation(), tok, 'chat') if graded]
    assert graded == ['0번 손님께 답 0.<|end|>', '0번 손님께 답 1.<|end|>']


@pytest.mark.parametrize('template, says', [
    ("{{ raise_exception('no system here') }}", 'no system here'), ('{{ messages[0].content }}', 'does not write every answer')])
def test_a_template_that_refuses_a_conversation_is_one_line(instruct, template, says):
    (instruct/'chat_template.jinja').write_text(template)
    tok = load_tokenizer(Recipe(base=str(instruct)))
    with pytest.raises(ValueError, match=says) as e: pieces(conversation(), tok, 'chat')
    assert 'set style=alpaca' in str(e.value) and '\n' not in str(e.value)


def test_generation_stops_at_the_end_of_a_turn_and_scoring_counts_it():
    import torch
    model, tok = load_base(Recipe(), 'none')
    row, end = conversation(), end_ids(tok, 'chat')[0]
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda layer, given, logits: logits.index_fill(-1, torch.tensor([end]), 1e4))
    assert generate(model, tok, [row], 'chat', 8) == [dict(answer='', stopped=True)]
    assert generate(model, tok, [row], 'alpaca', 8)[0]['stopped'] is False
    answer = pieces(row, tok, 'chat')[-1][0]
    assert answer_nll(model, tok, [row], 'chat')[0]['tokens'] == len(answer) and answer[-1] == end


# ---- rows

def test_conversations_with_the_same_last_question_are_no_copies(tmp_path):
    rows = [conversation(n=n) | dict(instruction='그럼 두 개면요?') for n in range(60)]
    for row in rows: row['messages'][-2]['content'] = '그럼 두 개면요?'; row['output'] = row['messages'][-1]['content'] = '사천 원'
    assert clean_rows(rows, ('exact_duplicate', 'near_duplicate'))[1]['dropped'] == []
    assert clean_rows(rows + rows[:2], ('exact_duplicate',))[1]['dropped'] == [60, 61]
    assert len(audit(rows)['exact_duplicate']) == 59   # seen alone, they are
    train, valid = split_rows(rows + rows, 12)
    assert len(valid) == 12 and not [row for row in valid if row in train]


@pytest.mark.parametrize('case, count', [('messages', 5), ('sharegpt', 4), ('history_system', 5)])
def test_the_cases_keep_their_turns(case, count, tmp_path):
    path = CASES/case/'rows.jsonl'
    if not path.is_file(): pytest.skip(f'no case at {path}')
    report, raw = {}, [json.loads(line) for line in path.read_text(encoding='utf-8').splitlines()]
    rows = read_rows(path, report=report)
    assert len(rows) == len(raw)
    for row, was in zip(rows, raw):
        given = was.get('messages') or [dict(role=dict(human='user', gpt='assistant')[one['from']], content=one['value'])
                                        for one in was.get('conversations', ())]
        if case == 'history_system':
            given = [dict(role=role, content=text) for role, text in zip(
                ('system', 'user', 'assistant', 'user', 'assistant'),
                (was['system'], *was['history'][0], was['instruction'], was['output']))]
        assert turns(row) == given
    assert ('read in style chat only' in report['understood']) == (case != 'sharegpt')


# ---- which style

def test_auto_follows_the_base_and_says_so_once(instruct, tmp_path, capsys):
    chat._say.cache_clear()
    for _ in range(2):
        assert pick_style(Recipe()).style == 'alpaca' and pick_style(Recipe(base=str(instruct))).style == 'chat'
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[0].startswith('style: alpaca') and lines[1] == f'style: chat, as base {instruct} has a chat template'
    for _ in range(2): assert pick_style(Recipe(base=str(instruct), style='alpaca')).style == 'alpaca'
    assert len(lines := capsys.readouterr().out.splitlines()) == 1 and '--set style=chat' in lines[0]
    assert pick_style(Recipe(style='blog')).style == 'blog' and capsys.readouterr().out == ''
    assert Recipe.named('blog').style == 'blog' and {Recipe.named(name).style for name in ('laptop', 'best', 'rehearsal')} == {'auto'}


def test_a_template_in_tokenizer_config_counts_and_one_that_is_not_gemmas_is_not_exported(instruct, monkeypatch, capsys):
    text = (instruct/'chat_template.jinja').read_text()
    (instruct/'chat_template.jinja').unlink()
    config = json.loads((instruct/'tokenizer_config.json').read_text())
    (instruct/'tokenizer_config.json').write_text(json.dumps(config | dict(chat_template=text)))
    assert pick_style(Recipe(base=str(instruct)), exported=True).style == 'chat'
    (instruct/'tokenizer_config.json').write_text(json.dumps(config | dict(chat_template=CHATML)))
    monkeypatch.setattr('sys.argv', ['kofinetune', 'run', '--recipe', 'rehearsal', '--run', str(instruct.parent/'run'), '--set', f'base={instruct}'])
    with pytest.raises(SystemExit) as e: cli.main()
    assert e.value.code == 2 and "not Gemma's" in capsys.readouterr().err and not (instruct.parent/'run').exists()


def test_known_instruct_bases_have_their_commit():
    for owner, commit in (('google', 'ac82b4e820549b854eebf28ce6dedaf9fdfa17b3'), ('unsloth', '23cf460f6bb16954176b3ddcc8d4f250501458a9')):
        assert Recipe.named('best').replace(base=f'{owner}/gemma-3-270m-it').revision == commit
    assert Recipe().replace(base='google/gemma-3-1b-it').revision == ''


# ---- whole runs

ROWS = [conversation(1 + n % 3, '짧게.' if n % 2 else '', n) for n in range(60)]
QUICK = Recipe.named('rehearsal').replace(quant='none', epochs=.2, valid_rows=6, lora_r=4, eval_rows=4, answer_rows=4, max_new_tokens=8,
                                          drop=('empty_answer',), gguf=('bf16',), style='chat', name='talk', num_ctx=1024)


@pytest.fixture(scope='module')
def talk(tmp_path_factory):
    "A run in style chat, on conversations, up to the merged model."
    folder = tmp_path_factory.mktemp('talk')
    recipe, run = QUICK.replace(source=str(write_jsonl(ROWS, folder/'rows.jsonl'))), folder/'run'
    for do in (prepare, finetune, merge_adapter): do(recipe, run)
    return recipe, run


def test_a_run_in_style_chat_goes_through(talk, monkeypatch):
    recipe, run = talk
    monkeypatch.setenv('OLLAMA_HOST', '127.0.0.1:9')
    assert all('messages' in row for row in read_jsonl(run/'data'/'train.jsonl') if row['output'].endswith(('1.', '2.')))
    verified = export_ollama(recipe, run)
    assert verified['tokens']['different'] == 0 and not verified['failed']
    made = read_modelfile((run/'ollama'/'Modelfile').read_text(encoding='utf-8'))
    assert made['parameters']['stop'] == ['<end_of_turn>'] and 'start_of_turn' in made['template']
    assert evaluate(recipe, run)['answered'] == 4
    assert '<start_of_turn>' not in (run/'eval'/'answers.jsonl').read_text(encoding='utf-8')
    monkeypatch.setattr('sys.argv', ['kofinetune', 'ask', str(run), '안녕?'])
    cli._app(['ask', str(run), '안녕?'], standalone_mode=False)
    from kofinetune.hub import _card
    card = _card(run)
    assert '<start_of_turn>user' in card and '`<end_of_turn>` ends it' in card and 'earlier turns' not in card


def test_the_merged_model_names_its_ends_and_its_turns_and_is_a_base_in_its_style(talk, tmp_path, capsys):
    recipe, run = talk
    assert json.loads((run/'merged'/'generation_config.json').read_text())['eos_token_id'] == end_ids(load_tokenizer(recipe), 'chat')
    tok = load_tokenizer(Recipe(base=str(run/'merged')))
    assert tok.apply_chat_template(ROWS[1]['messages'], tokenize=False, add_generation_prompt=True).endswith('<start_of_turn>model\n')
    assert pieces(ROWS[5], tok, 'chat') == pieces(ROWS[5], load_tokenizer(recipe), 'chat')
    again = recipe.replace(base=str(run/'merged'), style='auto')
    for do in (prepare, finetune, merge_adapter): do(again, tmp_path/'again')
    assert json.loads((tmp_path/'again'/'recipe.json').read_text())['style'] == 'chat' and (tmp_path/'again'/'merged'/'chat_template.jinja').is_file()
    moved = shutil.copytree(run/'merged', tmp_path/'moved')
    assert pick_style(recipe.replace(base=str(moved), style='auto')).style == 'chat'
    record = json.loads((run/'recipe.json').read_text())
    old = tmp_path/'old'
    shutil.copytree(run/'merged', old/'merged')
    (old/'recipe.json').write_text(json.dumps(record | dict(style='blog')))
    assert pick_style(recipe.replace(base=str(old/'merged'), style='auto')).style == 'blog'


def test_an_adapter_for_another_base_is_refused_unless_forced(talk, tmp_path):
    recipe, run = talk
    copy = shutil.copytree(run, tmp_path/'run', ignore=shutil.ignore_patterns('merged', 'ollama', 'eval'))
    file = copy/'adapter'/'adapter_config.json'
    file.write_text(json.dumps(json.loads(file.read_text()) | dict(base_model_name_or_path='google/gemma-3-270m-it')))
    vouch(copy, 'adapter')
    with pytest.raises(ValueError, match=r'was made for google/gemma-3-270m-it, not rehearsal.*merge --run .* --force'): merge_adapter(recipe, copy)
    assert merge_adapter(recipe, copy, force=True)['kl'] < 1e-3


@pytest.mark.parametrize('style', ['chat', 'alpaca'])
@pytest.mark.parametrize('kind', ['qwen3', 'llama'])
def test_other_families_train_merge_and_are_evaluated_in_either_style(talk, tmp_path, kind, style):
    base = other_base(tmp_path/kind, kind)
    if kind == 'qwen3': (base/'chat_template.jinja').write_text(CHATML)
    recipe = talk[0].replace(base=str(base), style=style, gguf=('none',), max_length=1024)
    for do in (prepare, finetune, merge_adapter): do(recipe, tmp_path/'run')
    report = evaluate(recipe, tmp_path/'run')
    assert abs(report['models']['merged']['answer_nll'] - report['models']['tuned']['answer_nll']) < .05
    if style == 'chat':
        own, merged = (load_tokenizer(Recipe(base=str(folder))) for folder in (base, tmp_path/'run'/'merged'))
        assert pieces(ROWS[5], merged, 'chat') == pieces(ROWS[5], own, 'chat')
    with pytest.raises(ValueError, match='gguf=none here|model_type'):
        from kofinetune.base import check_base
        check_base(recipe.replace(gguf=('bf16',)), tmp_path/'run')


# ---- a real Ollama

@pytest.mark.ollama
def test_ollama_renders_and_reads_conversations_of_up_to_six_questions(ollama_server, talk, tmp_path):
    recipe, run = talk
    write_gguf(run/'merged', tmp_path/'talk.gguf')
    (tmp_path/'Modelfile').write_text(modelfile('talk.gguf', 'chat', num_ctx=1024, num_predict=16, threads=1), encoding='utf-8')
    name = create_model('tests/talk', tmp_path)
    rows = [conversation(pairs, system, pairs) for pairs in range(1, 7) for system in ('', '짧게.')]
    hard = [row for row in difficult_rows('chat') if 'messages' in row]
    assert {sum(m['role'] == 'user' for m in row['messages']) for row in hard} == set(range(1, 7))
    assert {row['messages'][0]['role'] for row in hard} == {'system', 'user'}
    proof = verify_ollama(name, run/'merged', rows, len(rows), 'bf16', 'chat', texts=rows + difficult_rows('chat'))
    assert proof['failed'] == [] and proof['text']['different'] == proof['tokens']['different'] == 0 and proof['text']['checked'] > 50


@pytest.mark.ollama
def test_our_template_is_ollamas_own_for_gemma_3(ollama_server, talk, tmp_path):
    import ollama
    found = sorted(Path.home().glob('go/pkg/mod/github.com/ollama/ollama@*/template/gemma3-instruct.gotmpl'))
    if not found: pytest.skip("Ollama's sources are not in Go's module cache")
    write_gguf(talk[1]/'merged', tmp_path/'talk.gguf')
    (tmp_path/'Modelfile').write_text(modelfile('talk.gguf', 'chat', num_ctx=1024, num_predict=16, threads=1), encoding='utf-8')
    create_model('tests/talk', tmp_path)
    ollama.Client().create('tests/theirs', from_='tests/talk', template=found[-1].read_text().rstrip('\n'))   # its last newline would be one too many
    rows = [conversation(pairs, system, pairs) for pairs in range(1, 7) for system in ('', '짧게.')] + difficult_rows('chat')
    assert compare_texts('tests/theirs', rows, 'chat')['different'] == 0
    ollama.Client().create('tests/wrong', from_='tests/talk', template=found[-1].read_text().rstrip('\n').replace('$i 1', '$i 0'))
    assert compare_texts('tests/wrong', rows, 'chat')['different'] > 5
