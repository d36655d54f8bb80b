"""examples/avalanche: a sequence of two domains in Avalanche's own loop, where avalanche-lib is installed."""
import importlib.util

import pytest
import torch

from tests.conftest import ROOT

FILE = ROOT / 'examples/avalanche/strategy.py'


@pytest.fixture(scope='module')
def example():
    """The module, imported from its file."""
    pytest.importorskip('avalanche')
    spec = importlib.util.spec_from_file_location('strategy', FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_is_short():
    assert len(FILE.read_text().splitlines()) <= 60


@pytest.mark.parametrize('shared_lr', [1e-3, 0])
def test_two_domains_are_learnt_and_the_old_branch_stands_still(example, toy, shared_lr):
    from avalanche.evaluation.metrics import loss_metrics
    from avalanche.training.plugins import EvaluationPlugin
    roads = example.benchmark(['cityscapes', 'IDD'], toy, (16, 32))
    strategy = example.MDIL(classes=[20, 27], shared_lr=shared_lr, train_mb_size=4, eval_mb_size=4,
                            evaluator=EvaluationPlugin(loss_metrics(experience=True)))
    first, second = roads.train_stream
    strategy.train(first)
    known = [loss_of(strategy, roads.val_stream[0])]
    view, shared = strategy.model.single(0), set(map(id, strategy.model.shared_parameters()))
    before = {name: tensor.clone() for name, tensor in view.state_dict().items()}
    strategy.train(second)
    moved = {name for name, tensor in view.state_dict().items() if not torch.equal(before[name], tensor)}
    assert moved <= {name for name, parameter in view.named_parameters() if id(parameter) in shared}
    assert bool(moved) == bool(shared_lr) and strategy.model.num_classes == [20, 27]
    known.append(loss_of(strategy, roads.val_stream[0]))
    assert (known[0] == known[1]) == (not shared_lr)
    assert loss_of(strategy, roads.val_stream[1]) > 0


def loss_of(strategy, experience):
    """The cross-entropy that Avalanche gives for an experience."""
    wanted = f'Exp{experience.current_experience:03d}'
    return next(value for name, value in strategy.eval(experience).items() if 'val_stream' in name and wanted in name)
