"Video anomaly detection with region captions: CLIP, trained on what happens, where and when"
from importlib import import_module

__all__ = ['Config', 'System', 'FGCLIP']
# name → (module, its name there); imported when asked for, so that what is said of a system costs no torch
HELD = dict(Config=('config', 'Config'), System=('system', 'FGCLIP'), FGCLIP=('system', 'FGCLIP'))

def __dir__(): return sorted({*globals(), *__all__})

def __getattr__(name):
    if name not in HELD:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    module,own = HELD[name]
    return getattr(import_module(f'vadnb.systems.fgclip.{module}'), own)
