"Video and visual anomaly research in notebooks; what a script begins with stands here, the rest in the floors below"
from importlib import import_module

__version__ = "0.2.0"
# imported when it is first asked for: who wants one name should not wait for all
_ROOMS = dict(VideoReader='data.video', Track='data.tracks', fit='train.learner', load_config='systems.registry',
              load_run='systems.registry', register='systems.registry', evaluate_run='commands.measuring',
              load_pretrained='systems.registry', VadnbError='core')
__all__ = [*_ROOMS]

def __getattr__(name):
    if name in _ROOMS: return getattr(import_module(f'vadnb.{_ROOMS[name]}'), name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}; there are: {", ".join(__all__)}')

def __dir__(): return sorted({*globals(), *__all__})
