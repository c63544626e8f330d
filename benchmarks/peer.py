"""Train LoRA with another library on a CPU: what `train_speed.py --peer PYTHON` measures beside this package.

    PYTHON benchmarks/peer.py --library unsloth --model FOLDER --rows FILE

PYTHON is that of an environment of the library's own (pip install unsloth==2026.10.9); nothing of this package is
needed in it. FILE has one list of token ids a row, FOLDER the weights as transformers saves them. The rank is
that of the recipe `best`, learning rate and 16 rows a step are the post's; the loss is taken over whole rows. The last
line printed is the JSON.

    unsloth  Unsloth's own backend for CPUs: its loss in chunks, rows of about one length together; it does not pack there
    trl      TRL as it comes, with peft: packed rows, its fused loss; with --liger also Liger's kernels
"""
import argparse, importlib.util, json, os, platform, resource, sys, tempfile, time
from importlib.metadata import version

TARGETS = ['q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj']
LIBRARIES = ('unsloth', 'unsloth_zoo', 'trl', 'liger_kernel', 'peft', 'transformers', 'torch')


def load(args):
    "The model with its adapter, and the tokenizer, as the library's documentation says."
    if args.library == 'unsloth':
        from unsloth import FastLanguageModel   # before torch and transformers, which it changes
        import torch
        model, tok = FastLanguageModel.from_pretrained(
            args.model, max_seq_length=512, load_in_4bit=False, dtype=getattr(torch, args.dtype))
        model = FastLanguageModel.get_peft_model(
            model, r=16, lora_alpha=32, lora_dropout=0, target_modules=TARGETS, use_gradient_checkpointing=False)
        return model, tok
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype))
    lora = LoraConfig(task_type='CAUSAL_LM', r=16, lora_alpha=32, lora_dropout=0, target_modules=TARGETS)
    return get_peft_model(model, lora), AutoTokenizer.from_pretrained(args.model)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--library', choices=('unsloth', 'trl'), default='unsloth')
    parser.add_argument('--model', required=True, help='a folder with weights and tokenizer')
    parser.add_argument('--rows', required=True, help='a JSON file: a list of token ids for each row')
    parser.add_argument('--threads', type=int, default=os.cpu_count())
    parser.add_argument('--batch', type=int, default=4, help='rows at a time; 16 make a step')
    parser.add_argument('--dtype', default='bfloat16', choices=('bfloat16', 'float32'), help='of weights and arithmetic')
    parser.add_argument('--order', default='group_by_length', choices=('random', 'group_by_length'))
    parser.add_argument('--liger', action='store_true', help="Liger's kernels for TRL; they need Triton, which has no CPU")
    args = parser.parse_args()
    model, tok = load(args)
    import torch
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer
    torch.set_num_threads(args.threads)
    with open(args.rows, encoding='utf-8') as file: rows = json.load(file)
    packing = args.library == 'trl'
    with tempfile.TemporaryDirectory() as folder:
        settings = dict(
            output_dir=folder, num_train_epochs=1, max_length=512, packing=packing, per_device_train_batch_size=args.batch,
            gradient_accumulation_steps=16 // args.batch, learning_rate=2e-4, lr_scheduler_type='cosine',
            warmup_steps=0, weight_decay=0.0, optim='adamw_torch_fused', bf16=args.dtype == 'bfloat16', use_cpu=True,
            gradient_checkpointing=False, logging_steps=1, report_to='none', save_strategy='no', disable_tqdm=True,
            train_sampling_strategy=args.order, use_liger_kernel=args.liger, seed=42)
        def start(rows, **more):
            return SFTTrainer(model=model, args=SFTConfig(**settings | more), processing_class=tok,
                              train_dataset=Dataset.from_list([dict(input_ids=ids) for ids in rows]))
        start(rows[:16], learning_rate=0.0).train()   # memory is taken; the weights stay as they are
        trainer = start(rows)
        begin = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - begin
    steps = [e for e in trainer.state.log_history if 'loss' in e]
    tokens = sum(map(len, rows))
    print(json.dumps(dict(
        name=args.library, rows=len(rows), tokens=tokens, seconds=seconds, tokens_per_second=tokens / seconds,
        loss=steps[0]['loss'], losses=[e['loss'] for e in steps], steps=len(steps), packing=bool(trainer.args.packing),
        batch=args.batch, dtype=str(model.dtype), trainable_parameters=model.num_parameters(only_trainable=True),
        parameters=sum(p.numel() for name, p in model.named_parameters() if 'lora' not in name),
        peak_memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        command=' '.join(['benchmarks/peer.py', *sys.argv[1:]]), python=platform.python_version(),
        versions={p: version(p) for p in LIBRARIES if importlib.util.find_spec(p)})))


if __name__ == '__main__': main()
