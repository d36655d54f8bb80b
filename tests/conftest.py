"""Shared fixtures: toy roads drawn once, a way to run the scripts as a user does."""
import copy
import gc
import os
import runpy
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

from mdil.models import checkpoint
from mdil.utils.precision import without_bf16

ROOT = Path(__file__).resolve().parent.parent
torch.set_num_threads(1)     # the tests run two at a time
# What tests write need not outlive a power cut. And the collector of garbage need not walk torch again and again.
os.fsync = lambda number: None
gc.freeze()
gc.set_threshold(10_000, 10, 10)
# A shell starts what it puts into the background with Ctrl-C ignored, nohup with SIGHUP ignored; programs of ours
# would inherit that, and what they do on a signal is tested.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope='session')
def toy(tmp_path_factory):
    """Toy roads: 8 training and 4 validation images per domain, 64 x 128."""
    from mdil.datasets.toy.roads import write_toy_roads
    root = tmp_path_factory.mktemp('toy')
    write_toy_roads(root, train=8, val=4, height=64, width=128, seed=1)
    return root


@pytest.fixture(scope='session')
def real():
    """The small real data, where it is at hand."""
    path = Path(os.environ.get('REAL_DATA', ROOT.parent / 'shared' / 'real'))
    if not path.is_dir():
        pytest.skip('the small real data is not here; set REAL_DATA')
    return path


@pytest.fixture(scope='module')
def files_once():
    """Has each checkpoint be read, and its network be built, once in a module; every caller gets copies of its own.

    Not for tests of files, nor where the random state after the building of a network matters.
    """
    known = {}

    def once(act, name):
        def acting(*arguments):
            *_, path = arguments
            if not os.path.isfile(path):
                return act(*arguments)
            stat = os.stat(path)
            key = name, str(path), stat.st_mtime_ns, stat.st_size, stat.st_ino, *arguments[1:-1]
            if key not in known:
                known[key] = act(*arguments)
            return copy.deepcopy(known[key])
        return acting
    with pytest.MonkeyPatch.context() as patch:
        for name in ('read', 'network_of'):
            patch.setattr(checkpoint, name, once(getattr(checkpoint, name), name))
        yield


def wait_for(path, process):
    """Waits until `path` is there, however long that takes, as long as the process that is to make it lives."""
    while not path.exists():
        assert process.poll() is None, f'{path} was not made: {process.communicate()}'
        time.sleep(0.02)


# Without bf16 instructions such a test takes minutes.
needs_bf16 = pytest.mark.skipif(bool(without_bf16(torch.device('cpu'))), reason='the processor has no bf16 arithmetic')


@pytest.fixture
def script_here(monkeypatch, capsys):
    """Runs a module that ends with a status, as `run_script` does but in this process: (status, stdout, stderr)."""
    def run(name, *arguments):
        monkeypatch.setattr(sys, 'argv', [name, *map(str, arguments)])
        with pytest.raises(SystemExit) as end, warnings.catch_warnings():
            warnings.filterwarnings('ignore', '.*found in sys.modules', RuntimeWarning)
            runpy.run_module(name, run_name='__main__')
        return end.value.code, *capsys.readouterr()
    return run


def run_script(*arguments, expect=0, **environment):
    """Runs a script of the project with this Python; returns the finished process."""
    done = subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, 'OMP_NUM_THREADS': '1', **environment})
    assert done.returncode == expect, f'exit {done.returncode}\n{done.stdout}\n{done.stderr}'
    return done
