"Where the fixtures outside the repository are found, and a clean folder for every run"
import os, socket
from pathlib import Path
import pytest

root = Path(__file__).resolve().parent.parent

# what takes longest begins first, so that the two processes of `make test` end together
LONGEST = ['uniad_system', 'cli', 'fgclip_system', 'action_cls', 'processes', 'fgclip_health', 'adatad', 'report', 'unread', 'real', 'scorer',
           'image_prediction', 'checkpoint_faults', 'pretend_cuda', 'spine_images', 'backbone', 'uniad_memory', 'uniad_pictures', 'fuzz', 'prediction',
           'third_system', 'video', 'uniad_backbones', 'passes', 'own_system', 'fastcore', 'street', 'resume', 'lora', 'commands']

def pytest_configure(config):
    "Without this, pytest-xdist begins with the files of most tests, which are quick ones"
    if hasattr(config.option, 'loadscopereorder'): config.option.loadscopereorder = False

def pytest_collection_modifyitems(items):
    place = {f'test_{name}': k for k,name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))

@pytest.fixture(scope='session')
def shared():
    "The folder of golden values and real clips; tests that need it skip where it is missing"
    path = Path(os.environ.get('VADNB_SHARED') or root.parent/'shared')
    if not (path/'golden').is_dir(): pytest.skip(f'no shared fixtures at {path}; set VADNB_SHARED')
    return path

@pytest.fixture(scope='module')
def two_processes(tmp_path_factory):
    "Runs `worker(rank, port, folder)` in two forked processes, each of which saves `<rank>.pt`; gives back what they saved"
    import torch
    def run(worker):
        folder = tmp_path_factory.mktemp('ranks')
        with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
        # forked, so that the imports of this process are paid once
        torch.multiprocessing.start_processes(worker, (port, str(folder)), nprocs=2, start_method='fork')
        return [torch.load(folder/f'{rank}.pt', weights_only=True) for rank in (0, 1)]
    return run

@pytest.fixture
def on_cuda():
    "`with on_cuda() as device:` a GPU that is not there computes on the CPU and counts where the host would wait for it"
    from pretend_cuda import pretend_cuda
    return pretend_cuda
