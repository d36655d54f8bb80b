"""Networks besides ERFNet: every method learns two steps with them, keeps what it promises, and its files are known again."""
import copy
import importlib.util
import sys

import pytest
import torch
from torch import nn

import mdil
from mdil import eval as evaluation, train
from mdil.evaluation import branches, verify
from mdil.models import METHODS, build_model, checkpoint, unchanged
from mdil.models.adapters import Adapted, Adapter, with_adapters
from mdil.models.networks import NETWORKS, Network, Scaling
from mdil.training.options import parse_train
from mdil.training.records import read_metrics
from mdil.utils.errors import UserError

LRASPP = 'lraspp_mobilenet_v3_large'
SMALL = ['--height', '64', '--width', '64', '--batch-size', '2', '--num-workers', '0', '--device', 'cpu', '--num-epochs', '1',
         '--limit-batches', '2', '--class-weights', 'none']
needs_timm = pytest.mark.skipif(importlib.util.find_spec('timm') is None, reason='timm is not installed')
TRIED = [*((LRASPP, method) for method in METHODS), ('tiny', 'mdil'), ('tiny', 'series-adapters')]


class Tiny(nn.Module):
    """A network of a user's own, which nothing in the project knows."""
    heads, output_layers = ('head',), ('head',)

    def __init__(self, num_classes):
        super().__init__()
        self.scaling = Scaling((0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Conv2d(8, num_classes, 1)

    def forward(self, images):
        return self.head(self.features(self.scaling(images)))


class NormFree(Tiny):
    """One without batch norms."""

    def __init__(self, num_classes):
        super().__init__(num_classes)
        self.features = nn.Sequential(nn.Conv2d(3, 8, 1), nn.GroupNorm(2, 8), nn.ReLU())


@pytest.fixture(autouse=True)
def own(monkeypatch):
    """Registers them as a user's file does."""
    monkeypatch.setitem(NETWORKS, 'tiny', Network('tiny', lambda classes, adapter: with_adapters(Tiny(classes), adapter)))
    monkeypatch.setitem(NETWORKS, 'norm-free',
                        Network('no norms', lambda classes, adapter: with_adapters(NormFree(classes), adapter)))


def learn(toy, folder, *arguments):
    """Trains; returns the best checkpoint's path."""
    train.main([*SMALL, '--data-root', str(toy), '--savedir', str(folder), *map(str, arguments)])
    return folder / 'model_best.pth.tar'


@pytest.fixture(scope='module')
def first(toy, tmp_path_factory):
    """A first step of LR-ASPP with the default method."""
    return learn(toy, tmp_path_factory.mktemp('networks') / '1', '--domains', 'CS', '--network', LRASPP)


@pytest.mark.parametrize('network, method', TRIED)
def test_two_steps_of_every_method(network, method, toy, tmp_path, capsys):
    row, states = METHODS[method], []
    if row.joint or row.lonely:
        names = ['CS', 'IDD'] if row.joint else ['CS']
        states.append(learn(toy, tmp_path / '1', '--domains', *names, '--network', network, '--method', method))
    else:
        states.append(learn(toy, tmp_path / '1', '--domains', 'CS', '--network', network, '--method', method))
        states.append(learn(toy, tmp_path / '2', '--domains', 'CS', 'IDD', '--state', states[0], '--method', method))
        # A batch norm that is shared and learns on moves the old domain; frozen ones and one's own do not.
        lines = unchanged.read(tmp_path / '2' / unchanged.NAME)['after']['cityscapes']
        assert ('moved' not in lines) == (row.shared == 'frozen')
        kept = build_model([20], method, network).view_names(0)[0].values()
        before, after = (checkpoint.read(state)['state_dict'] for state in states)
        assert kept and all(torch.equal(before[name], after[name]) for name in kept)
    evaluation.main(['--state', *map(str, states), '--data-root', str(toy), '--height', '64', '--width', '64', '--num-workers', '0',
                     '--device', 'cpu'])
    found = checkpoint.read_checkpoint(states[-1])
    assert found.found.network == network and found.content['network'] == network
    val = read_metrics(tmp_path / str(len(states)))[-1]['val']
    assert set(val) == set(found.domains) and capsys.readouterr().out


@pytest.mark.parametrize('network', ['deeplabv3_mobilenet_v3_large', 'deeplabv3_resnet50', 'fcn_resnet50',
                                     pytest.param('timm:resnet10t', marks=needs_timm),
                                     pytest.param('timm:mobilenetv3_small_050', marks=needs_timm)])
def test_a_step_of_the_other_networks(network):
    """The new domain learns from the loss of the method, the frozen old one stays to the last bit."""
    model = build_model([3], 'mdil', network)
    teacher = copy.deepcopy(model).eval()
    new = model.add_domain(4)
    model.freeze([0], shared=True).train()
    images, labels = torch.rand(2, 3, 64, 64), torch.randint(3, (2, 64, 64))
    before = model(images, 0)
    losses = mdil.step_loss(model, new, images, labels, teacher)
    losses['loss'].backward()
    assert losses['kd'] == 0        # nothing has moved yet
    own = model.branch_parameters(new)
    assert all(p.grad.isfinite().all() for p in own) and sum(p.grad.abs().sum() for p in own) > 0
    assert torch.equal(model(images, 0), before) and model.num_classes == [3, 4]


def test_a_resumed_run_equals_a_straight_one(toy, first, tmp_path, monkeypatch):
    """Without --network, and without the file that --state names."""
    step = '--domains', 'CS', 'IDD', '--state'
    learn(toy, tmp_path / 'straight', *step, first)
    other = tmp_path / 'copy.pth'
    other.write_bytes(first.read_bytes())
    batch = train.train_batch

    def dying(run, *arguments):
        if run.batch:
            raise ArithmeticError
        return batch(run, *arguments)
    with monkeypatch.context() as patch, pytest.raises(ArithmeticError):
        patch.setattr(train, 'train_batch', dying)
        learn(toy, tmp_path / 'broken', *step, other, '--checkpoint-minutes', '0')
    other.unlink()
    learn(toy, tmp_path / 'broken', *step, other, '--checkpoint-minutes', '0', '--resume')
    straight, broken = (checkpoint.read(tmp_path / name / 'checkpoint.pth.tar')['state_dict'] for name in ('straight', 'broken'))
    assert all(torch.equal(value, broken[name]) for name, value in straight.items())
    with pytest.raises(UserError, match=f'--network was {LRASPP}, is tiny'):
        learn(toy, tmp_path / 'broken', *step, other, '--checkpoint-minutes', '0', '--resume', '--network', 'tiny')


def test_adapters_start_as_if_they_were_not_there_and_cost_little():
    images = torch.rand(1, 3, 64, 96)
    torch.manual_seed(0)
    plain = build_model([20], 'fine-tune', LRASPP).eval()
    for method in ('mdil', 'series-adapters'):
        torch.manual_seed(0)
        model = build_model([20], method, LRASPP).eval()
        adapters = [module for module in model.modules() if isinstance(module, Adapter)]
        # One for the first convolution, one for each of 15 depthwise ones.
        assert len(adapters) == 16 and sum(isinstance(module, Adapted) for module in model.modules()) == 16
        with torch.no_grad():
            assert torch.equal(model(images), plain(images))
        whole, own = (sum(p.numel() for p in parameters) for parameters in (model.parameters(), model.branch_parameters(0)))
        assert own <= 0.1 * whole


def test_a_file_of_another_network_is_refused_by_name(toy, first, tmp_path):
    step = '--domains', 'CS', 'IDD', '--state', first
    with pytest.raises(UserError, match=f'is of the network {LRASPP}, not erfnet'):
        learn(toy, tmp_path / 'x', *step, '--network', 'erfnet')
    erfnet = learn(toy, tmp_path / 'erfnet', '--domains', 'CS')
    with pytest.raises(UserError, match=f'of other networks: {LRASPP} and erfnet'):
        verify.main([str(first), str(erfnet)])
    branches.main(['extract', str(erfnet), '--domain', 'CS', '--out', str(tmp_path / 'b')])
    with pytest.raises(UserError, match=f'a branch of erfnet, .* is {LRASPP}'):
        branches.main(['add', str(first), str(tmp_path / 'b'), '--out', str(tmp_path / 'c')])
    content = torch.load(first, weights_only=True)
    for changed, words in (({'network': 'unheard'}, "there is no network 'unheard'"), ({'network': 'tiny'}, 'not what it holds'),
                           ({'network': 3}, 'its network is not the name')):
        checkpoint.save({**content, **changed}, tmp_path / 'odd')
        with pytest.raises(UserError, match=words):
            checkpoint.load_network(checkpoint.read_checkpoint(tmp_path / 'odd'))


def test_what_is_erfnets_alone_says_so(toy, first, tmp_path):
    with pytest.raises(UserError, match='--recipe released .* erfnet'):
        parse_train(['--domains', 'CS', '--savedir', 'S', '--network', LRASPP, '--recipe', 'released'])
    with pytest.raises(UserError, match='--recipe released .* erfnet'):
        learn(toy, tmp_path / 'x', '--domains', 'CS', 'IDD', '--state', first, '--recipe', 'released')
    with pytest.raises(UserError, match='--imagenet-bn .* erfnet'):
        parse_train(['--domains', 'CS', '--savedir', 'S', '--network', LRASPP, '--imagenet-bn', 'dropped'])


def test_unknown_networks_and_those_without_batch_norms_are_refused(monkeypatch):
    with pytest.raises(UserError, match="no network 'nothing'; choose from erfnet, lraspp"):
        parse_train(['--domains', 'CS', '--savedir', 'S', '--network', 'nothing'])
    monkeypatch.setitem(sys.modules, 'timm', None)
    with pytest.raises(UserError, match='pip install timm'):
        parse_train(['--domains', 'CS', '--savedir', 'S', '--network', 'timm:resnet10t'])
    with pytest.raises(UserError, match='no batch norm outside its head.*fine-tune'):
        build_model([3], 'domain-bn', 'norm-free')
    with pytest.raises(UserError, match='no convolution that an adapter fits'):
        build_model([3], 'mdil', 'norm-free')
    assert build_model([3, 4], 'fine-tune', 'norm-free')(torch.rand(1, 3, 8, 8), 1).shape == (1, 4, 8, 8)


def test_a_last_batch_of_one_image_is_refused_where_a_batch_norm_follows_pooling(toy, tmp_path):
    """8 images in batches of 7; LR-ASPP has no such batch norm."""
    step = '--domains', 'CS', '--batch-size', '7', '--limit-batches', '9'
    with pytest.raises(UserError, match='one image of 64x64 .* of deeplabv3_mobilenet_v3_large one value; choose a --batch-size'):
        learn(toy, tmp_path / 'x', *step, '--network', 'deeplabv3_mobilenet_v3_large')
    learn(toy, tmp_path / 'y', *step, '--network', LRASPP)


@needs_timm
def test_encoders_of_timm_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="timm has no encoder 'nothing'"):
        build_model([3], 'mdil', 'timm:nothing')
