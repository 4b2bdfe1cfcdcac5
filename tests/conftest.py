"Where the fixtures outside the repository are found, and a clean folder for every run"
import os
from pathlib import Path
import pytest

root = Path(__file__).resolve().parent.parent

@pytest.fixture(scope='session')
def shared():
    "The folder of golden values and real clips; tests that need it skip where it is missing"
    path = Path(os.environ.get('VADNB_SHARED') or root.parent/'shared')
    if not (path/'golden').is_dir(): pytest.skip(f'no shared fixtures at {path}; set VADNB_SHARED')
    return path
