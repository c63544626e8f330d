"""Measure the export's three kinds of file at the exact shape of Gemma 3 270M, with random weights.

    OLLAMA_HOST=127.0.0.1:11434 python benchmarks/export_ladder.py --json benchmarks/results/export_ladder.json

Needs a running Ollama of this machine, 3 GB of memory and about five minutes on two cores. Sizes, types and speeds do not depend
on what a model has learned; answers would, so none are judged. Log-probabilities are compared twice: as the weights are, with
every next token about equally likely, and with the last norm raised until the model is as sure as a trained one. Speeds are those
of one thread: with more, whatever else runs on the machine makes the threads wait for each other. An Ollama that Go alone has
compiled uses no vector instructions of the processor, so speeds are taken on llama.cpp as well.
The last line printed is the JSON that is written.
"""
import argparse, json, math, os, platform, shutil, tempfile, time
from importlib.metadata import version
from pathlib import Path

os.environ['TQDM_DISABLE'] = '1'   # read when tqdm is imported: a log is no terminal

from kofinetune.prompt import format_prompt
from kofinetune.data import load_rows
from kofinetune.gguffile import check_gguf, read_gguf, write_gguf
from kofinetune.server import create_model, read_modelfile, server_version
from kofinetune.proof import serve_gguf, verify_gguf
from kofinetune.export import modelfile
from kofinetune.rehearsal import stand_in_base

SHAPE = dict(vocab_size=262144, hidden_size=640, intermediate_size=2048, num_hidden_layers=18, num_attention_heads=4,
             num_key_value_heads=1, head_dim=256, sliding_window=512, query_pre_attn_scalar=256, max_position_embeddings=32768)
SPREAD = 2.3   # standard deviation of the rehearsal model's log-probabilities of a next token


def make_model(folder):
    "Save Gemma 3 270M's shape with random weights and the stand-in's tokenizer."
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig
    torch.manual_seed(0)
    model = Gemma3ForCausalLM(Gemma3TextConfig(**SHAPE)).to(torch.bfloat16)
    model.save_pretrained(folder)
    for path in stand_in_base().glob('tokenizer*'): shutil.copyfile(path, folder/path.name)
    return model.num_parameters()


def make_sure(folder, spread):
    "Raise the last norm of a saved model, so that its log-probabilities spread `SPREAD` instead of `spread`."
    from safetensors.torch import load_file, save_file
    tensors = load_file(folder/'model.safetensors')
    norm = tensors['model.norm.weight']
    tensors['model.norm.weight'] = ((norm.float() + 1) * (SPREAD / spread) - 1).to(norm.dtype)
    save_file(tensors, folder/'model.safetensors', metadata={'format': 'pt'})


MEANT = dict(bf16=('BF16',), q8_0=('Q8_0',), q4_K_M=('Q4_K', 'Q6_K'))   # for matrices


def served_file(name):
    "The GGUF file that Ollama serves under a name."
    import ollama
    return Path(read_modelfile(ollama.Client().show(name).modelfile)['from'])


def fallen_back(path, dtype):
    "Which shares of a file's matrices, and of their weights, have another type than was asked for; and how many have which."
    matrices = [t for t in read_gguf(path)[1] if len(t['shape']) > 1]
    def size(tensors): return sum(math.prod(t['shape']) for t in tensors)
    other, types = [t for t in matrices if t['type'] not in MEANT[dtype]], [t['type'] for t in matrices]
    return dict(tensors=len(other) / len(matrices), weights=size(other) / size(matrices),
                types={kind: types.count(kind) for kind in sorted(set(types))})


def timed(do, *args, **kwargs):
    "What `do` returns, and the seconds it took."
    start = time.perf_counter()
    return do(*args, **kwargs), round(time.perf_counter() - start, 1)


def compare(model, files, prompts):
    "The numbers of each file: the differences, what rounding alone costs, and how far log-probabilities spread."
    made = dict(spread=round(spread_of(model, prompts), 3))
    for dtype, path in files.items():
        proof = verify_gguf(model, path, prompts, dtype=dtype)
        made[dtype] = dict(proof['logprobs'], answers_equal=proof['greedy']['equal'],
                           failed=[said for said in proof['failed'] if 'answers' not in said])   # of random weights: ties
    return made


def spread_of(model, prompts):
    "The standard deviation of the log-probabilities of a next token, over all tokens, on average."
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    tok, model = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.inference_mode():
        logits = [model(**tok(prompt, return_tensors='pt'), logits_to_keep=1).logits[0, -1] for prompt in prompts]
    return sum(float(one.log_softmax(-1).std()) for one in logits) / len(logits)


def speed(models, words, repeats):
    "Tokens a second of each model, prompt and answer, asked in turns; the fastest of `repeats` counts."
    import ollama
    best = {dtype: dict(prompt=0, answer=0) for dtype in models}
    client = ollama.Client()
    for seed in range(repeats):
        for dtype, name in models.items():
            client.generate(name, '한 마디.', options=dict(num_predict=1))   # loaded, not measured
            said = client.generate(name, f'{seed} {words}', options=dict(num_predict=64, temperature=1, seed=seed))
            seen = dict(prompt=said.prompt_eval_count / said.prompt_eval_duration, answer=said.eval_count / said.eval_duration)
            best[dtype] = {part: max(best[dtype][part], round(seen[part] * 1e9, 1)) for part in seen}
    return best


def engine_speed(paths, words, repeats):
    "The same on llama.cpp, which picks the processor's vector instructions when it starts."
    best = {dtype: dict(prompt=0, answer=0) for dtype in paths}
    for seed in range(repeats):
        for dtype, path in paths.items():
            with serve_gguf(path, threads=1) as server:
                said = server.post('/completion', json=dict(prompt=f'{seed} {words}', n_predict=64, ignore_eos=True)).json()['timings']
            seen = dict(prompt=said['prompt_per_second'], answer=said['predicted_per_second'])
            best[dtype] = {part: max(best[dtype][part], round(seen[part], 1)) for part in seen}
    return best


def main():
    import ollama
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--prompts', type=int, default=100)
    parser.add_argument('--repeats', type=int, default=3)
    parser.add_argument('--folder', type=Path, help='where the files go (2 GB)')
    parser.add_argument('--json', type=Path)
    args = parser.parse_args()
    server = server_version()
    if server is None: raise SystemExit('no Ollama server answers; start one with: ollama serve')

    folder, names = Path(tempfile.mkdtemp(dir=args.folder)), {}
    try:
        parameters = make_model(folder/'model')
        rows = load_rows('rehearsal')
        prompts = [format_prompt(row) for row in rows[:args.prompts]]
        ladder, files = {}, {}
        for dtype in ('bf16', 'q8_0', 'q4_K_M'):
            quantize = dtype if dtype == 'q4_K_M' else ''
            beside = folder/dtype
            beside.mkdir()
            ladder[dtype] = {}
            if quantize: os.link(files['bf16'], beside/'model.gguf')
            else:
                files[dtype] = beside/'model.gguf'
                ladder[dtype]['write_seconds'] = timed(write_gguf, folder/'model', files[dtype], dtype)[1]
                seen, ladder[dtype]['check_seconds'] = timed(check_gguf, folder/'model', files[dtype], dtype)
                ladder[dtype]['file_different'] = seen['different']
            (beside/'Modelfile').write_text(modelfile('model.gguf', num_predict=64, threads=1), encoding='utf-8')
            names[dtype] = f'ladder-270m-{dtype.lower()}'
            ladder[dtype]['create_seconds'] = timed(create_model, names[dtype], beside, quantize=quantize)[1]
            path = served_file(names[dtype])
            ladder[dtype] |= dict(bytes=path.stat().st_size, fell_back=fallen_back(path, dtype))
            print(dtype, ladder[dtype])
        words = ' '.join(row['instruction'] for row in rows[:12])
        speeds = dict(ollama=speed(names, words, args.repeats),
                      llama_cpp=engine_speed({dtype: served_file(name) for dtype, name in names.items()}, words, args.repeats))
        for dtype, rung in ladder.items():
            rung['bytes_ratio'] = round(rung['bytes'] / ladder['bf16']['bytes'], 3)
            rung['tokens_per_second'] = {engine: seen[dtype] for engine, seen in speeds.items()}
            rung['speed_ratio'] = {engine: {part: round(seen[dtype][part] / seen['bf16'][part], 2) for part in seen[dtype]}
                                   for engine, seen in speeds.items()}
            print(dtype, rung['tokens_per_second'], rung['speed_ratio'])
        numbers = dict(as_made=compare(folder/'model', files, prompts))
        print(numbers)
        make_sure(folder/'model', numbers['as_made']['spread'])
        for dtype, path in files.items(): write_gguf(folder/'model', path, dtype)
        numbers['as_sure_as_trained'] = compare(folder/'model', files, prompts)
        print(numbers['as_sure_as_trained'])
    finally:
        for name in names.values():
            try: ollama.Client().delete(name)
            except ollama.ResponseError: pass   # it was never made
        shutil.rmtree(folder, ignore_errors=True)

    report = dict(parameters=parameters, prompts=len(prompts), ladder=ladder, logprobs=numbers,
                  versions=dict(ollama_server=server, **{name: version(name) for name in
                                ('kofinetune', 'transformers', 'torch', 'gguf', 'xllamacpp')}),
                  machine=dict(python=platform.python_version(), system=platform.platform(), cores=os.cpu_count()))
    text = json.dumps(report, ensure_ascii=False)
    if args.json: args.json.write_text(text + '\n', encoding='utf-8', newline='\n')
    print(text)


if __name__ == '__main__': main()
