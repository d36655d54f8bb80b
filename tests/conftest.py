"""Shared fixtures: toy roads drawn once, a way to run the scripts as a user does."""
import contextlib
import gc
import multiprocessing
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

from mdil.models import erfnet
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


@contextlib.contextmanager
def shallow_erfnet():
    """ERFNet has one block of each kind in place of 13 and 4: the same names and parts, a third of the tensors."""
    with pytest.MonkeyPatch.context() as patch:
        for kind, kept in ((erfnet.Encoder, (0, 1, 6, 7, 8)), (erfnet.Decoder, (0, 1, 3, 4))):
            patch.setattr(kind, '__init__', shortened(kind.__init__, kept))
        yield


def shortened(build, kept):
    """The constructor `build` of an encoder or decoder, which then keeps the layers of these numbers."""
    def constructor(module, *arguments):
        build(module, *arguments)
        module.layers = torch.nn.ModuleList(module.layers[number] for number in kept)
    return constructor


@pytest.fixture
def shallow():
    """For tests in this process to which the depth of ERFNet is all the same."""
    with shallow_erfnet():
        yield


@pytest.fixture(scope='module')
def shallow_module():
    """The same for all tests of a file, and for what they share."""
    with shallow_erfnet():
        yield


def wait_for(path, process):
    """Waits until `path` is there, however long that takes, as long as the process that is to make it lives."""
    while not path.exists():
        assert process.poll() is None, f'{path} was not made: {process.communicate()}'
        time.sleep(0.02)


# Without bf16 instructions such a test takes minutes.
needs_bf16 = pytest.mark.skipif(bool(without_bf16(torch.device('cpu'))), reason='the processor has no bf16 arithmetic')


@pytest.fixture
def start_method():
    """Sets how Python starts processes where nobody says how, until the test ends."""
    usual = multiprocessing.get_start_method()
    yield lambda name: multiprocessing.set_start_method(name, force=True)
    multiprocessing.set_start_method(usual, force=True)


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


@pytest.fixture
def trained_here(monkeypatch):
    """Has benchmarks train in this process; call it with a list for the commands, and what failing ones name."""
    from mdil.benchmarks import sequences
    from mdil.training import resume
    monkeypatch.setattr(resume.Interrupt, '__enter__', lambda self: self)     # signals are the main thread's alone
    return lambda calls, failing='': monkeypatch.setattr(sequences, 'start', trained_in(calls, failing))


def trained_in(calls, failing):
    """A stand-in for `sequences.start`."""
    from mdil import train

    class Process:
        def __init__(self, command, log):
            calls.append(command)
            self.status = int(bool(failing) and any(failing in part for part in command))
            if self.status:
                log.write('error: no luck\n')
                log.flush()
            else:
                train.main(command[2:])

        def wait(self):
            return self.status

        terminate = wait
    return Process
