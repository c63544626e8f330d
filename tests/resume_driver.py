"Imports everything once, then runs each job that it reads from stdin in a forked process: the real stage, to be killed for real."
import json, os, resource, signal, sys, traceback, warnings

import torch
import bitsandbytes, peft, trl   # noqa: F401
from trl import SFTTrainer       # noqa: F401

import kofinetune.train as train
from kofinetune.recipe import Recipe

torch.set_num_threads(1)
warnings.filterwarnings('ignore')


def die(*args): os.kill(os.getpid(), signal.SIGKILL)


def work(job):
    out = os.open(job['out'], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1); os.dup2(out, 2)
    sys.stdout.reconfigure(line_buffering=True)
    if job['file_size']: resource.setrlimit(resource.RLIMIT_FSIZE, (job['file_size'],) * 2)
    if job['die_in']: setattr(train, job['die_in'], die)       # a kill at one certain moment
    try: train.finetune(Recipe(**{k: tuple(v) if isinstance(v, list) else v for k, v in job['recipe'].items()}), job['run'], job['force'])
    except BaseException as e:
        traceback.print_exc()
        print(f'ERROR {type(e).__name__}: {e}', flush=True)
        os._exit(1)
    sys.stdout.flush()
    os._exit(0)


print('ready', flush=True)
for line in sys.stdin:
    pid = os.fork()
    if pid == 0: work(json.loads(line))
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
