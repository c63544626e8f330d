"""Fine-tune a small language model in Korean, serve it with Ollama, see what changed.

The names of `__all__` are imported from their modules when they are first used, as in
`from kofinetune import Recipe, finetune`. No notebook exports this one file.
"""
from importlib import import_module

__version__ = "0.1.0"

_MODULES = dict(
    Recipe='recipe', prepare='data', read_rows='formats', format_prompt='prompt',
    finetune='train', load_tuned='train', generate='scoring', merge_adapter='merge',
    export_ollama='export', evaluate='eval', read_run='report', compare_runs='report')
__all__ = list(_MODULES)


def __getattr__(name):
    if name not in _MODULES:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    found = getattr(import_module(f'{__name__}.{_MODULES[name]}'), name)
    globals()[name] = found
    return found


def __dir__(): return sorted({*globals(), *_MODULES})
