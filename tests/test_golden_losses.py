"""The losses of the same 20 batches of every method are those in golden_losses.json, within rounding.

Five batches each from four starts, on a shallow ERFNet, in float64: in float32 what one processor rounds otherwise
than another grows tenfold with each step, as Adam scales up gradients that are nothing but rounding and as ReLUs flip.
After a change that is meant to alter losses: python -m tests.test_golden_losses
"""
import json
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mdil import train
from mdil.datasets import get_domain
from mdil.datasets.toy.roads import write_toy_roads
from mdil.evaluation.norms import estimate_statistics
from mdil.models import METHODS, build_model, checkpoint
from mdil.training import domain_data
from mdil.training.options import parse_train
from mdil.training.run import Run
from mdil.utils.files import write_json
from mdil.utils.parallel import Place
from tests.conftest import shallow_erfnet

pytestmark = pytest.mark.usefixtures('shallow_module')

FILE = Path(__file__).with_name('golden_losses.json')
SEEDS = range(4)
TOLERANCE = 1e-11       # relative; AVX2 and AVX-512 agree to 1e-11
CPU = Place(torch.device('cpu'))


def draw_roads(folder):
    """Toy roads, 10 training images of each domain, 16 x 32."""
    write_toy_roads(folder, train=10, val=2, height=16, width=32, seed=5)
    return folder


def first_step(method, path):
    """Writes a checkpoint that knows Cityscapes by random weights, its statistics those of noise."""
    torch.manual_seed(1)
    model = build_model([20], method)
    noise = [(torch.randint(256, (4, 3, 16, 32), dtype=torch.uint8),) for _ in range(2)]
    estimate_statistics(model, 0, noise, CPU)
    checkpoint.save({'version': checkpoint.VERSION, 'state_dict': model.state_dict(), 'method': method,
                     'domains': [get_domain('cityscapes').entry]}, path)


def losses_of(method, seed, roads, folder, *arguments):
    """The losses of five batches of two images: of BDD after Cityscapes, of both at once, or of BDD alone."""
    row = METHODS[method]
    domains = ['BDD'] if row.one_domain else ['cityscapes', 'BDD']
    if not (row.joint or row.one_domain):
        first = folder / f'{method}.pth.tar'
        if not first.exists():
            first_step(method, first)
        arguments = '--state', str(first), *arguments
    options = parse_train(['--domains', *domains, '--method', method, '--data-root', str(roads), '--savedir', str(folder / 'run'),
                           '--height', '16', '--width', '32', '--batch-size', '2', '--num-workers', '0', '--device', 'cpu',
                           '--class-weights', 'none', '--limit-batches', '5', '--seed', str(seed), *arguments])
    (folder / 'run').mkdir(exist_ok=True)
    run = Run(options, CPU)
    run.step_loss.double()
    run.start_epoch()
    return [loss_of(run, parts) for parts in list(train.batches(run))[:5]]


def loss_of(run, parts):
    """The loss of a batch, from which the run learns."""
    images, labels, domain = domain_data.joined(parts, run.options.seed, 1, run.place)
    return train.train_batch(run, images.double() / 255, labels, domain)['loss'].item()


def deviation(losses, golden):
    """The largest relative difference of two lists of losses."""
    return max(abs(loss - expected) / expected for loss, expected in zip(losses, golden, strict=True))


@pytest.fixture(scope='module')
def roads(tmp_path_factory):
    return draw_roads(tmp_path_factory.mktemp('roads'))


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Where runs write, and the first steps that they share."""
    return tmp_path_factory.mktemp('runs')


@pytest.mark.parametrize('method', METHODS)
def test_losses_are_the_golden_ones(method, roads, folder):
    golden = json.loads(FILE.read_text())[method]
    for seed in SEEDS:
        assert deviation(losses_of(method, seed, roads, folder), golden[seed]) < TOLERANCE


@pytest.mark.parametrize('method, arguments, changed', [
    ('mdil', ['--lambdac', '0.101'], {}), ('mdil', ['--lr', '5.01e-4'], {}), ('adapters-only', [], {'shared': 'slow'}),
    ('feature-extraction', ['--frozen-encoder', 'train'], {}), ('mdil', ['--old-bn', 'batch'], {}), ('fine-tune', ['--no-dropout'], {})])
def test_a_change_of_the_method_shows(method, arguments, changed, roads, folder, monkeypatch):
    golden = json.loads(FILE.read_text())[method][0]
    monkeypatch.setitem(METHODS, method, replace(METHODS[method], **changed))
    assert deviation(losses_of(method, 0, roads, folder, '--limit-batches', '2', *arguments), golden[:2]) > TOLERANCE


def main():
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        roads = draw_roads(folder / 'roads')
        found = {method: [[float(f'{loss:.12g}') for loss in losses_of(method, seed, roads, folder)] for seed in SEEDS]
                 for method in METHODS}
    write_json(FILE, found)


if __name__ == '__main__':
    torch.set_num_threads(1)
    with shallow_erfnet():
        main()
