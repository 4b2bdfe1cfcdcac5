"Which action a clip shows: a vision-language model with adapters, read at a token, and a decoder that trains with it"
from importlib import import_module

__all__ = ['Config', 'System', 'ActionCls']
# name → (module, its name there); imported when asked for, so that what is said of a system costs no torch
HELD = dict(Config=('config', 'Config'), System=('system', 'ActionCls'), ActionCls=('system', 'ActionCls'))

def __dir__(): return sorted({*globals(), *__all__})

def __getattr__(name):
    if name not in HELD:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    module,own = HELD[name]
    return getattr(import_module(f'vadnb.systems.action_cls.{module}'), own)
