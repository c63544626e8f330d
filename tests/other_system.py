"""As if this were Windows: python other_system.py kofinetune-arguments, or `--import-all`.

What Windows lacks is taken away, and what it refuses is refused: Unix modules, signals and functions; a file or folder that is renamed or
removed while something in it is open or mapped; the first byte of a held lock. The console writes cp949. Libraries are imported before, as
they choose their own way for each system. It stands for Windows where none is at hand; it is not Windows.
"""
import io, os, shutil, signal, sys, warnings
from pathlib import Path

warnings.filterwarnings('ignore', category=EncodingWarning)      # of libraries
import accelerate, bitsandbytes, datasets, datasketch, filelock, gguf, httpx, huggingface_hub, matplotlib.pyplot, ollama, pandas, peft, pooch, psutil  # noqa: F401
import rich.console, rich.table, sacrebleu, scipy.stats, torch, transformers, trl, typer, xllamacpp  # noqa: F401
from trl import SFTTrainer  # noqa: F401

HERE = Path(os.environ['OTHER_SYSTEM_HERE']).resolve()     # what is refused is refused below this folder alone
MODULES = 'fcntl grp posix_ipc pty pwd readline resource syslog termios tty'.split()
FUNCTIONS = ('chown fork forkpty getegid geteuid getgid getgroups getloadavg getpgid getpgrp getpriority getsid getuid killpg lchown mkfifo nice posix_spawn '
             'sched_getaffinity sched_setaffinity setgid setpgid setpriority setsid setuid statvfs sync sysconf uname wait3 wait4').split()
SIGNALS = {'SIGABRT', 'SIGFPE', 'SIGILL', 'SIGINT', 'SIGSEGV', 'SIGTERM'}


def in_use(path):
    "Files at or below `path` that this process has open or mapped."
    held = [os.readlink(f'/proc/self/fd/{fd}') for fd in os.listdir('/proc/self/fd') if os.path.islink(f'/proc/self/fd/{fd}')]
    with real_open('/proc/self/maps', encoding='utf-8', errors='surrogateescape') as f: held += [line.rstrip('\n').split(None, 5)[-1] for line in f]
    return sorted({file for file in held if file == path or file.startswith(path + '/')})


def refuse(name):
    "Let a function of os refuse what is open."
    real = getattr(os, name)
    def refusing(*paths, **options):
        for path in map(os.path.abspath, paths):
            if Path(path).is_relative_to(HERE) and (held := in_use(path)):
                raise PermissionError(13, f'The process cannot access the file because it is being used: {held[0]} ({name})', path)
        return real(*paths, **options)
    setattr(os, name, refusing)


def careful_open(file, mode='r', buffering=-1, *more, **options):
    "Let open() refuse the first byte of a lock, which filelock holds, and Linux's /proc."
    if str(file).endswith('.lock') and buffering: raise PermissionError(13, 'Permission denied', str(file))
    return real_open(file, mode, buffering, *more, **options)


def careful_stat(path, *more, **options):
    if str(path) == '/proc/self/status': raise FileNotFoundError(2, 'No such file', str(path))
    return real_stat(path, *more, **options)


def memory_info(process):
    "What psutil says on Windows, with its name for the peak."
    found = real_memory_info(process)
    return type('pmem', (), dict(rss=found.rss, vms=found.vms, peak_wset=found.rss))


def disk_usage(path, statvfs=os.statvfs):
    "What shutil asks Windows for in another way."
    found = statvfs(path)
    return type('usage', (), dict(free=found.f_bavail * found.f_frsize))


for name in MODULES: sys.modules[name] = None
for name in FUNCTIONS: vars(os).pop(name, None)
for name in [name for name in dir(signal) if name.startswith('SIG') and name[3] != '_' and name not in SIGNALS]: delattr(signal, name)
real_open, real_stat, real_memory_info = io.open, os.stat, psutil.Process.memory_info
io.open, os.stat, psutil.Process.memory_info = careful_open, careful_stat, memory_info
for name in ('rename', 'replace', 'remove', 'unlink', 'rmdir'): refuse(name)
shutil._use_fd_functions = False                           # as there: by path
shutil.disk_usage = disk_usage
sys.platform = 'win32'
warnings.filterwarnings('error', category=EncodingWarning, module='kofinetune')     # a file opened in the code page of the machine

if sys.argv[1:] == ['--import-all']:
    import importlib, pkgutil
    import kofinetune
    for found in pkgutil.iter_modules(kofinetune.__path__): importlib.import_module(f'kofinetune.{found.name}')
else:
    from kofinetune.cli import main
    main()
