"One model for the good images of all classes: what it cannot rebuild is a defect"
from importlib import import_module

__all__ = ['Config', 'System', 'UniADSystem']
# name → (module, its name there); imported when asked for, so that what is said of a system costs no torch
HELD = dict(Config=('config', 'Config'), System=('system', 'UniADSystem'), UniADSystem=('system', 'UniADSystem'))

def __dir__(): return sorted({*globals(), *__all__})

def __getattr__(name):
    if name not in HELD:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    module,own = HELD[name]
    return getattr(import_module(f'vadnb.systems.uniad.{module}'), own)
