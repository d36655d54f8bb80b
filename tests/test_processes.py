"""Signals, processes that die, output that breaks: no work is lost, no process is left."""
import os
import signal
import subprocess
import sys
import time
from functools import partial
from types import SimpleNamespace

import pytest

from mdil import train
from mdil.models import checkpoint
from mdil.training import domain_data, records, resume
from mdil.utils.errors import run_main
from mdil.utils.output import Lenient
from tests.conftest import ROOT
from tests.test_commands import SMALL, equal, learn, metrics

MAIN = SimpleNamespace(main=True, world=1)


def hit(number):
    """Sends this process a signal, which the handler has seen when this returns."""
    os.kill(os.getpid(), number)


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_is_acknowledged_at_once_and_the_batch_goes_on(number, capfd):
    with resume.Interrupt(MAIN) as interrupt:
        hit(number)
        said = capfd.readouterr().err
        assert interrupt.stop() and said.count('\n') == 1
        assert said.startswith(f'{number.name}: stopping as soon as the run is saved')
        assert ('Ctrl-C again' in said) == (number == signal.SIGINT)
        hit(signal.SIGTERM)
        assert not capfd.readouterr().err
    assert signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)


def test_a_signal_while_nothing_is_trained_promises_nothing(capfd):
    with resume.Interrupt(MAIN) as interrupt, pytest.raises(resume.Stopped), interrupt.at_once():
        hit(signal.SIGTERM)
    assert capfd.readouterr().err == 'SIGTERM: stopping\n'


def test_a_second_ctrl_c_stops_at_once():
    with resume.Interrupt(MAIN):
        hit(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            hit(signal.SIGINT)


def test_nohup_is_respected():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with resume.Interrupt(MAIN) as interrupt:
            hit(signal.SIGHUP)
            assert not interrupt.asked
    finally:
        signal.signal(signal.SIGHUP, before)


def test_where_no_batch_is_under_way_a_signal_stops_at_once(toy, tmp_path, monkeypatch, capfd):
    """While files are read, a cache is built, networks are made."""
    monkeypatch.setattr(domain_data, 'build_data', lambda *_: hit(signal.SIGINT))
    with pytest.raises(SystemExit) as end:
        learn(toy, tmp_path, '--domains', 'CS')
    assert end.value.code == 75 and 'SIGINT: stopping' in capfd.readouterr().err
    with resume.Interrupt(MAIN) as interrupt:
        hit(signal.SIGTERM)             # as the last batch ends
        with pytest.raises(resume.Stopped), interrupt.at_once():
            pytest.fail('it goes on')


def test_a_signal_during_validation_saves_and_the_run_goes_on_as_if_there_was_none(toy, tmp_path, monkeypatch, capfd):
    arguments = ['--domains', 'CS', '--class-weights', 'none']
    straight = learn(toy, tmp_path / 'straight', *arguments, epochs=2)
    with monkeypatch.context() as patch:
        patch.setattr(train, 'evaluate', lambda *_: hit(signal.SIGTERM))
        with pytest.raises(SystemExit) as end:
            learn(toy, tmp_path / 'broken', *arguments, epochs=2)
    assert end.value.code == 75 and 'stopped by a signal during the validation of epoch 1' in capfd.readouterr().err
    resumed = learn(toy, tmp_path / 'broken', *arguments, '--resume', epochs=2)
    for content in (straight, resumed):
        content.pop('options')
    assert equal(straight, resumed) and metrics(tmp_path / 'straight') == metrics(tmp_path / 'broken')
    speeds = ['images_per_second' in line['train'] for line in records.read_metrics(tmp_path / 'broken')]
    assert speeds == [False, True] and '; - images/s' in capfd.readouterr().out      # nothing was left to train in epoch 1


def is_alive(number):
    """Whether a process runs; one that has ended but was not waited for does not."""
    try:
        with open(f'/proc/{number}/stat') as file:
            return file.read().rsplit(')', 1)[1].split()[0] != 'Z'
    except FileNotFoundError:
        return False


POOL = r"""
import os, time
from mdil.utils.workers import in_parallel
def work(number):
    os.write(1, b'%d\n' % os.getpid())
    time.sleep(1000)
if __name__ == '__main__':
    list(in_parallel(work, [1, 2], 2, 'work'))
"""
LOADER = r"""
import os, time
from mdil.datasets.loading import make_loader
class Data:
    def __getitem__(self, number):
        os.write(1, b'%d\n' % os.getpid())
        time.sleep(1000)
if __name__ == '__main__':
    list(make_loader(Data(), [[0], [1]], 2, False))
"""


@pytest.mark.skipif(sys.platform != 'linux', reason='other systems do not tell a process of the end of its parent')
@pytest.mark.parametrize('program', [POOL, LOADER])
def test_no_worker_outlives_a_killed_parent(tmp_path, program):
    (tmp_path / 'program.py').write_text(program)
    process = subprocess.Popen([sys.executable, tmp_path / 'program.py'], stdout=subprocess.PIPE, text=True,
                               env={**os.environ, 'PYTHONPATH': str(ROOT)})
    workers = [int(process.stdout.readline()) for _ in range(2)]
    assert all(map(is_alive, workers)) and len(set(workers)) == 2
    process.kill()
    process.wait()
    while any(map(is_alive, workers)):
        time.sleep(0.01)


class Broken:
    """The stream of a terminal that is gone."""
    encoding = 'utf-8'

    def isatty(self):
        return True

    def write(self, *_):
        raise BrokenPipeError(32, 'Broken pipe')

    flush = fileno = write


def test_broken_output_costs_no_checkpoint(toy, tmp_path, monkeypatch):
    arguments = ['--data-root', str(toy), '--savedir', str(tmp_path), '--domains', 'CS', *SMALL, '--num-epochs', '1']
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(sys, 'stdout', Broken())
        patch.setattr(sys, 'stderr', Broken())
        run_main(partial(train.main, arguments))
    assert not end.value.code and checkpoint.read(tmp_path / 'checkpoint.pth.tar')['epoch'] == 1


PRINTS = ("import sys; from mdil.utils.errors import run_main\n"
          "def main():\n"
          "    for _ in range(9999): print('a line')\n"
          "    sys.stdout.flush(); open(sys.argv[1], 'w').write('saved')\n"
          "run_main(main)")


@pytest.mark.parametrize('stdout, status, said', [
    ('| true', 0, ''), ('>&-', 0, ''), ('> /dev/full', 2, 'error: standard output could not be written (No space left'),
    ('>&- 2>&-', 0, '')])
def test_output_that_breaks_does_not_end_the_work(tmp_path, stdout, status, said):
    command = f'set -o pipefail; {sys.executable} -c "$1" {tmp_path}/file {stdout}'
    done = subprocess.run(['bash', '-c', command, 'bash', PRINTS], cwd=ROOT, capture_output=True, text=True)
    assert (tmp_path / 'file').read_text() == 'saved' and done.returncode == status
    assert done.stderr.startswith(said) and done.stderr.count('\n') == bool(said), done.stderr


def test_a_stream_that_recovers_is_written_to_again():
    texts = []

    def write(text):
        if text == 'lost':
            raise OSError(28, 'No space left on device')
        texts.append(text)
    stream = Lenient(SimpleNamespace(write=write, encoding='utf-8'))
    for text in ('one', 'lost', 'two'):
        stream.write(text)
    assert texts == ['one', 'two'] and stream.error.errno == 28 and stream.encoding == 'utf-8'


KEPT = """
from mdil.datasets.loading import EvalBatches, make_loader

class Numbers:
    def __len__(self):
        return 6

    def __getitem__(self, key):
        return key[0] if isinstance(key, tuple) else key

kept = make_loader(Numbers(), EvalBatches(6, 2), 2, pin=False)
print(sum(len(batch) for batch in kept))
"""


def test_a_process_ends_though_it_keeps_a_loader():
    """Loaders ignore the SIGTERM that Python sends them at exit, after which it would wait for them forever."""
    done = subprocess.run([sys.executable, '-c', KEPT], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stdout, done.stderr) == (0, '6\n', '')
