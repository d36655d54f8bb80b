"""A method with a loss term of its own is one file, tests/ewc.py: it is recorded and shown by name, its gradient acts."""
import pytest
import torch

from mdil import train
from mdil.evaluation import history, tables
from mdil.models import checkpoint
from mdil.models.methods import METHODS
from mdil.training import records
from tests import ewc

pytestmark = pytest.mark.usefixtures('shallow_module')

SMALL = ['--height', '32', '--batch-size', '2', '--num-workers', '0', '--device', 'cpu', '--num-epochs', '1',
         '--class-weights', 'none', '--method', 'ewc']


def learn(toy, folder, batches, *arguments):
    """`train` of the line of metrics.jsonl of a run."""
    train.main([*SMALL, '--data-root', str(toy), '--savedir', str(folder), '--limit-batches', str(batches),
                *map(str, arguments)])
    return records.read_metrics(folder)[-1]['train']


@pytest.fixture(scope='module')
def first(toy, tmp_path_factory):
    """The first step's checkpoint; the method is registered as long as the tests of this module run."""
    METHODS['ewc'] = ewc.ROW
    folder = tmp_path_factory.mktemp('ewc')
    assert 'ewc' not in learn(toy, folder, 1, '--domains', 'CS')        # nothing to hold yet
    yield folder / 'checkpoint.pth.tar'
    del METHODS['ewc']


def test_its_gradient_holds_the_weights_and_its_name_is_everywhere(toy, first, tmp_path, capsys):
    step = 4, '--domains', 'CS', 'IDD', '--state', first
    free = learn(toy, tmp_path / 'free', *step, '--lambdac', 0)
    held = learn(toy, tmp_path / 'held', *step, '--lambdac', 1e6)
    assert 0 < held['ewc'] < 0.9 * free['ewc']
    assert held['loss'] == pytest.approx(held['ce'] + 1e6 * held['ewc'], rel=1e-4)
    assert f'ewc {tables.fine(held["ewc"])}' in capsys.readouterr().out
    shown = {plot.title: plot.lines for plot in history.curves(history.history(tmp_path / 'held'))}
    assert shown['loss term ewc, before its weight']['ewc'][-1] == (2, held['ewc'])


def test_a_resumed_run_sets_it_up_again(toy, first, tmp_path, monkeypatch):
    step = 2, '--domains', 'CS', 'IDD', '--state', first, '--lambdac', 1e4
    learn(toy, tmp_path / 'straight', *step)

    def dying(run, *batch):
        if run.batch:
            raise ArithmeticError
        return train_batch(run, *batch)
    with monkeypatch.context() as patch, pytest.raises(ArithmeticError):
        train_batch = train.train_batch
        patch.setattr(train, 'train_batch', dying)
        learn(toy, tmp_path / 'broken', *step, '--checkpoint-minutes', 0)
    learn(toy, tmp_path / 'broken', *step, '--resume', '--checkpoint-minutes', 0)
    straight, broken = (checkpoint.read(tmp_path / name / 'checkpoint.pth.tar')['state_dict']
                        for name in ('straight', 'broken'))
    assert all(torch.equal(value, broken[name]) for name, value in straight.items())
