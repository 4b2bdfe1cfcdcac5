"What happens when in an untrimmed video: a video transformer with temporal adapters below an action detector"
from importlib import import_module

__all__ = ['Config', 'System', 'AdaTAD']
# name → (module, its name there); imported when asked for, so that what is said of a system costs no torch
HELD = dict(Config=('config', 'Config'), System=('system', 'AdaTAD'), AdaTAD=('system', 'AdaTAD'))

def __dir__(): return sorted({*globals(), *__all__})

def __getattr__(name):
    if name not in HELD:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    module,own = HELD[name]
    return getattr(import_module(f'vadnb.systems.adatad.{module}'), own)
