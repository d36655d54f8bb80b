"""Networks besides ERFNet: every method learns two steps with them, keeps what it promises, and its files are known again."""
import copy
import importlib.util
import os
import signal
import sys
from urllib.error import URLError

import pytest
import torch
from torch import nn

import mdil
from mdil import eval as evaluation, predict, train
from mdil.datasets import DOMAINS
from mdil.evaluation import branches, describe, export, features, verify
from mdil.models import METHODS, build_model, checkpoint, unchanged
from mdil.models.adapters import Adapted, Adapter, takes_adapter, with_adapters
from mdil.models.exported import Exported
from mdil.models.networks import NETWORKS, Network, Scaling, from_torchvision
from mdil.models.weights import start_from_weights
from mdil.training import building
from mdil.training.options import parse_train
from mdil.training.records import read_metrics
from mdil.utils.errors import UserError
from mdil.utils.parallel import Place

LRASPP = 'lraspp_mobilenet_v3_large'
SMALL = ['--height', '64', '--width', '64', '--batch-size', '2', '--num-workers', '0', '--device', 'cpu', '--num-epochs', '1',
         '--limit-batches', '1', '--class-weights', 'none']
needs_timm = pytest.mark.skipif(importlib.util.find_spec('timm') is None, reason='timm is not installed')
# What methods have in common is tiny's to show; adapters on both sides of a convolution are LR-ASPP's, too.
TRIED = [*(('tiny', method) for method in METHODS), (LRASPP, 'mdil'), (LRASPP, 'series-adapters')]


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


class Pooled(Tiny):
    """One with a branch of DeepLabV3's head: the mean over the image, laid out over it again."""

    def __init__(self, num_classes):
        from torchvision.models.segmentation.deeplabv3 import ASPPPooling
        super().__init__(num_classes)
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), ASPPPooling(8, 8))


class NormFree(Tiny):
    """One without batch norms."""

    def __init__(self, num_classes):
        super().__init__(num_classes)
        self.features = nn.Sequential(nn.Conv2d(3, 8, 1), nn.GroupNorm(2, 8), nn.ReLU())


class Idle(Tiny):
    """One with a layer that no output depends on, as some encoders of timm have them."""

    def __init__(self, num_classes):
        super().__init__(num_classes)
        self.idle = nn.Linear(2, 2)


class OneSize(Tiny):
    """One for images of one size, as transformers are."""

    def forward(self, images):
        assert images.shape[-1] == 32, 'the width must be 32'
        return super().forward(images)


@pytest.fixture(autouse=True)
def own(monkeypatch):
    """Registers them as a user's file does."""
    for name, network in (('tiny', Tiny), ('pooled', Pooled), ('norm-free', NormFree), ('idle', Idle), ('one-size', OneSize)):
        monkeypatch.setitem(NETWORKS, name, Network(name, lambda classes, adapter, made=network: with_adapters(made(classes), adapter)))


def learn(toy, folder, *arguments):
    """Trains; returns the best checkpoint's path."""
    train.main([*SMALL, '--data-root', str(toy), '--savedir', str(folder), *map(str, arguments)])
    return folder / 'model_best.pth.tar'


def untrained(path, network, entry=DOMAINS['cityscapes'].entry):
    """Writes a checkpoint of a network that knows the domain `entry` by random weights; returns its path."""
    checkpoint.save({'version': 1, 'state_dict': build_model([entry['classes']], 'mdil', network).state_dict(), 'domains': [entry],
                     'method': 'mdil', 'network': network, 'options': {'height': 32, 'width': 64}}, path)
    return path


@pytest.fixture(scope='module')
def first(toy, tmp_path_factory):
    """A first step of LR-ASPP with the default method."""
    return learn(toy, tmp_path_factory.mktemp('networks') / '1', '--domains', 'CS', '--network', LRASPP)


@pytest.mark.parametrize('network, method', TRIED)
def test_two_steps_of_every_method(network, method, toy, first, tmp_path, capsys):
    row, states = METHODS[method], []
    if row.joint or row.one_domain:
        names = ['CS', 'IDD'] if row.joint else ['CS']
        states.append(learn(toy, tmp_path / '1', '--domains', *names, '--network', network, '--method', method))
    else:
        states.append(first if (network, method) == (LRASPP, 'mdil') else
                      learn(toy, tmp_path / '1', '--domains', 'CS', '--network', network, '--method', method))
        states.append(learn(toy, tmp_path / '2', '--domains', 'CS', 'IDD', '--state', states[0], '--method', method))
        # A batch norm that is shared and learns on moves the old domain; frozen ones and one's own do not.
        lines = unchanged.read(tmp_path / '2' / unchanged.NAME)['after']['cityscapes']
        assert ('changed' not in lines) == (row.shared == 'frozen')
        kept = build_model([20], method, network).view_names(0)[0].values()
        before, after = (checkpoint.read(state)['state_dict'] for state in states)
        assert kept and all(torch.equal(before[name], after[name]) for name in kept)
    evaluation.main(['--state', *map(str, states), '--data-root', str(toy), '--height', '64', '--width', '64', '--num-workers', '0',
                     '--device', 'cpu'])
    found = checkpoint.read_checkpoint(states[-1])
    assert found.layout.network == network and found.content['network'] == network
    val = read_metrics(tmp_path / str(len(states)))[-1]['val']
    assert set(val) == set(found.domains) and capsys.readouterr().out


@pytest.mark.parametrize('network', NETWORKS)
def test_every_network_of_the_list_takes_new_domains(network):
    with torch.device('meta'):
        model = build_model([3, 4], 'mdil', network)
        assert model.add_domain(5) == 2 and model.num_classes == [3, 4, 5]


@pytest.mark.parametrize('network', ['deeplabv3_mobilenet_v3_large', 'fcn_resnet50',
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


def test_a_resumed_run_equals_a_straight_one(toy, tmp_path, monkeypatch):
    """Without --network, and without the file that --state names."""
    first = learn(toy, tmp_path / 'first', '--domains', 'CS', '--network', 'tiny')
    step = '--limit-batches', '2', '--domains', 'CS', 'IDD', '--state'
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
    with pytest.raises(UserError, match=f'--network was tiny, is {LRASPP}'):
        learn(toy, tmp_path / 'broken', *step, other, '--checkpoint-minutes', '0', '--resume', '--network', LRASPP)


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
        assert {module.momentum for module in model.modules() if isinstance(module, nn.BatchNorm2d)} == {0.1}
        whole, own = (sum(p.numel() for p in parameters) for parameters in (model.parameters(), model.branch_parameters(0)))
        assert own <= 0.1 * whole


def test_a_file_of_another_network_is_refused_by_name(toy, first, tmp_path):
    step = '--domains', 'CS', 'IDD', '--state', first
    with pytest.raises(UserError, match=f'holds the network {LRASPP}, not erfnet'):
        learn(toy, tmp_path / 'x', *step, '--network', 'erfnet')
    erfnet = untrained(tmp_path / 'erfnet', 'erfnet')
    with pytest.raises(UserError, match=f'hold different networks: {LRASPP} and erfnet'):
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


@pytest.mark.parametrize('layer', ['nope', 'scale.0', ''])
def test_an_output_layer_that_is_none_is_refused_before_training(monkeypatch, layer):
    monkeypatch.setitem(NETWORKS, 'mine', from_torchvision(LRASPP, (layer,), 'mine'))
    with pytest.raises(UserError, match=f"mine: its output layer 'net.classifier.{layer}' is not .* those that are: "
                                        "net.classifier.high_classifier, net.classifier.low_classifier$"):
        build_model([20], 'mdil', 'mine')


def test_unknown_networks_and_those_without_batch_norms_are_refused(monkeypatch):
    with pytest.raises(UserError, match="no network 'nothing'; choose from erfnet, lraspp"):
        parse_train(['--domains', 'CS', '--savedir', 'S', '--network', 'nothing'])
    monkeypatch.setitem(sys.modules, 'timm', None)
    with pytest.raises(UserError, match='pip install timm'):
        parse_train(['--domains', 'CS', '--savedir', 'S', '--network', 'timm:resnet10t'])
    with pytest.raises(UserError, match='no batch norm outside its head.*fine-tune'):
        build_model([3], 'domain-bn', 'norm-free')
    uneven = nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 4, padding=1), nn.Conv2d(3, 3, 1)
    assert [takes_adapter(conv) for conv in uneven] == [False, True, False, False]       # padded to the size, and spatial
    with pytest.raises(UserError, match='no convolution that an adapter fits'):
        build_model([3], 'mdil', 'norm-free')
    assert build_model([3, 4], 'fine-tune', 'norm-free')(torch.rand(1, 3, 8, 8), 1).shape == (1, 4, 8, 8)


def test_a_last_batch_of_one_image_is_refused_where_a_batch_norm_follows_pooling(toy, tmp_path):
    """8 images in batches of 7; LR-ASPP has no such batch norm."""
    step = '--domains', 'CS', '--batch-size', '7', '--limit-batches', '9'
    with pytest.raises(UserError, match='one image at 64x64 .* of deeplabv3_mobilenet_v3_large one value; choose a --batch-size'):
        learn(toy, tmp_path / 'x', *step, '--network', 'deeplabv3_mobilenet_v3_large')
    learn(toy, tmp_path / 'y', *step, '--network', LRASPP)


def test_a_layer_that_no_output_depends_on_stays_and_the_run_goes_on(toy, tmp_path, monkeypatch):
    step = '--domains', 'CS', '--network', 'idle', '--method', 'fine-tune', '--num-epochs', '2'
    with monkeypatch.context() as patch:
        patch.setattr(train, 'evaluate', lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(SystemExit):
            learn(toy, tmp_path, *step)
    assert checkpoint.read(learn(toy, tmp_path, *step, '--resume').with_name('checkpoint.pth.tar'))['epoch'] == 2
    for network, idle in (('idle', True), ('tiny', False), ('erfnet', False)):
        options = parse_train(['--domains', 'CS', '--savedir', 'S', '--height', '32', '--network', network])
        assert building.has_idle_weights(build_model([3], 'mdil', network), options) == idle     # DDP must look for them


def test_a_size_that_a_network_cannot_process_is_refused(toy, tmp_path):
    with pytest.raises(UserError, match='one-size cannot process images of 64x64 .the width must be 32.*; change --height and --width'):
        learn(toy, tmp_path, '--domains', 'CS', '--network', 'one-size')
    learn(toy, tmp_path, '--domains', 'CS', '--network', 'one-size', '--height', '32', '--width', '32')


@needs_timm
def test_encoders_of_timm_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="timm has no encoder 'nothing'"):
        build_model([3], 'mdil', 'timm:nothing')


def classifier():
    """MobileNetV3 of torchvision as it is trained on ImageNet, here of random weights."""
    from torchvision.models import mobilenet_v3_large
    torch.manual_seed(7)
    return mobilenet_v3_large(weights=None)


def test_imagenet_weights_come_from_torchvision(toy, tmp_path, monkeypatch, capsys):
    given, asked = classifier().state_dict(), []
    monkeypatch.setattr('torchvision.models._api.load_state_dict_from_url',
                        lambda url, **options: asked.append((url, options)) or given)
    for method in ('mdil', 'multi-task', 'multi-task-domain-bn'):
        model = build_model([3, 4], method, LRASPP)
        line = start_from_weights(model, LRASPP, 'imagenet')
        state = model.single(0).state_dict()
        conv = 'net.backbone.4.block.1.0.' + ('conv.' if method == 'mdil' else '')
        assert torch.equal(state[f'{conv}weight'], given['features.4.block.1.0.weight'])
        assert f'imagenet ({LRASPP})' in line
        for view in model.views:
            assert torch.equal(view.net.backbone['0'][1].running_mean, given['features.0.1.running_mean'])
        assert model.single(1).get_submodule('net.backbone.5.block.0.0') is model.single(0).get_submodule('net.backbone.5.block.0.0')
    assert 'mobilenet_v3_large-' in asked[0][0] and asked[0][1]['weights_only'] and asked[0][1]['check_hash']
    state = learn(toy, tmp_path / '1', '--domains', 'CS', '--network', LRASPP, '--weights', 'imagenet', '--lr', '0')
    held = checkpoint.read(state)['state_dict']
    assert torch.equal(held['net.backbone.4.block.1.0.conv.weight'], given['features.4.block.1.0.weight'])
    assert torch.allclose(held['scaling.mean'].flatten(), torch.tensor([0.485, 0.456, 0.406]))      # each file has its own
    assert 'imagenet (lraspp_mobilenet_v3_large): 308 tensors loaded' in capsys.readouterr().out


def test_learning_from_python(toy, tmp_path):
    record = mdil.learn('cityscapes', data_root=toy, savedir=tmp_path, network='tiny', num_epochs=1, height=32, limit_batches=1,
                        num_workers=0, device='cpu', class_weights='none')
    assert mdil.load(record.best, device='cpu').known.network == 'tiny'


def test_without_a_network_the_file_and_its_folder_are_named(monkeypatch):
    def unreachable(url, **options):
        raise URLError('Name or service not known')
    monkeypatch.setattr('torchvision.models._api.load_state_dict_from_url', unreachable)
    with pytest.raises(UserError, match=r'could not be downloaded .*put mobilenet_v3_large-\w+\.pth into .*/checkpoints, or'):
        start_from_weights(build_model([3], 'mdil', LRASPP), LRASPP, 'imagenet')


def test_files_of_weights(tmp_path):
    from torchvision.models import resnet50, segmentation
    torch.save({'state_dict': {f'module.{key}': value for key, value in classifier().state_dict().items()}}, tmp_path / 'features')
    whole = segmentation.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=21)
    torch.save(whole.state_dict(), tmp_path / 'segmentation')
    torch.save(resnet50(weights=None).state_dict(), tmp_path / 'resnet')
    model = build_model([21], 'mdil', LRASPP)
    fresh = model.single(0).net.classifier.low_classifier.weight.clone()
    start_from_weights(model, LRASPP, str(tmp_path / 'features'))
    start_from_weights(model, LRASPP, str(tmp_path / 'segmentation'))
    head = model.single(0).net.classifier
    assert torch.equal(head.cbr[0].weight, whole.classifier.cbr[0].weight)
    assert torch.equal(head.low_classifier.weight, fresh)       # other classes, however many
    start_from_weights(build_model([3], 'mdil', 'fcn_resnet50'), 'fcn_resnet50', str(tmp_path / 'resnet'))
    with pytest.raises(UserError, match=f'resnet: not the weights of {LRASPP}; .* of its encoder are missing'):
        start_from_weights(model, LRASPP, str(tmp_path / 'resnet'))
    broken = {key: value * float('nan') if value.is_floating_point() else value for key, value in whole.state_dict().items()}
    torch.save(broken, tmp_path / 'broken')
    with pytest.raises(UserError, match='not finite'):
        start_from_weights(model, LRASPP, str(tmp_path / 'broken'))


@pytest.mark.parametrize('words, message', [
    (['--domains', 'CS', 'IDD', '--state', 'x', '--weights', 'imagenet'], '--weights is for the first step; IDD'),
    (['--domains', 'CS', '--state', 'x', '--weights', 'y'], '--state and --weights'),
    (['--domains', 'CS', '--weights', 'imagenet'], 'erfnet_encoder_pretrained.pth.tar .*pass that file'),
    (['--domains', 'CS', '--weights', 'imagenet', '--network', 'tiny'], 'tiny has none of its own')])
def test_weights_that_cannot_be_are_refused(words, message, toy, tmp_path):
    with pytest.raises(UserError, match=message):
        learn(toy, tmp_path / 'x', *words)


def test_weights_of_erfnet_are_its_encoder_file(toy, tmp_path, capsys):
    encoder = {f'module.features.{key}': value for key, value in build_model([20], 'single-task').single(0).state_dict().items()
               if key.startswith('encoder.')}
    torch.save({'state_dict': encoder}, tmp_path / 'encoder')
    learn(toy, tmp_path / '1', '--domains', 'CS', '--weights', tmp_path / 'encoder')
    assert 'an encoder alone' in capsys.readouterr().out


def test_other_tools_know_the_file(toy, first, tmp_path, capsys):
    """Prediction, export, model card, a branch and back, encoder features, Python."""
    second = learn(toy, tmp_path / '2', '--domains', 'CS', 'IDD', '--state', first, '--method', 'adapters-only')
    # Frozen shared weights leave the first domain as it is, LR-ASPP's batch norms included.
    assert 'changed' not in unchanged.read(tmp_path / '2' / unchanged.NAME)['after']['cityscapes']
    image = next((toy / 'cityscapes/leftImg8bit/val').rglob('*.png'))
    predict.main(['--state', str(second), '--input', str(image), '--out', str(tmp_path / 'p'), '--device', 'cpu'])
    describe.main([str(second), '--height', '64'])
    assert LRASPP in capsys.readouterr().out
    with pytest.raises(UserError, match=f'holds the network {LRASPP}; the published code has only erfnet'):
        export.main([str(second), str(tmp_path / 'x.pth')])
    branches.main(['extract', str(second), '--domain', 'IDD', '--out', str(tmp_path / 'idd.branch')])
    branches.main(['remove', str(second), '--domain', 'IDD', '--out', str(tmp_path / 'rest')])
    branches.main(['add', str(tmp_path / 'rest'), str(tmp_path / 'idd.branch'), '--out', str(tmp_path / 'whole')])
    assert verify.main([str(second), str(tmp_path / 'whole')]) == 0
    net = mdil.load(tmp_path / 'whole', device='cpu')
    assert net.known.network == LRASPP and net.predict(str(image), domain='IDD').labels.shape == (64, 128)
    net.save(tmp_path / 'again')
    assert checkpoint.read_checkpoint(tmp_path / 'again').layout.network == LRASPP
    assert features.encode(net.model, 1, torch.zeros(3, 64, 128, dtype=torch.uint8)).shape == (8 * 16, 960)


def test_export_of_a_network_and_a_domain_of_ones_own(tmp_path, capsys):
    village = {'name': 'village', 'classes': 3, 'class_names': ['mud', 'hut'], 'colors': [[1, 2, 3], [4, 5, 6]]}
    export.main([str(untrained(tmp_path / 'x', 'tiny', village)), str(tmp_path / 'x.pt2'), '--format', 'torch'])
    assert '100.00 % of the predictions are equal' in capsys.readouterr().out
    assert Exported(tmp_path / 'x.pt2').about['class_names'] == ['mud', 'hut']


def test_openvino_runs_a_network_with_pooled_features(tmp_path, capsys):
    pytest.importorskip('openvino')
    export.main([str(untrained(tmp_path / 'x', 'pooled')), str(tmp_path / 'x.xml'), '--format', 'openvino'])
    assert '100.00 % of the predictions are equal' in capsys.readouterr().out


def test_batch_norms_of_a_kind_of_their_own_are_not_synchronised():
    class Own(nn.BatchNorm2d):
        pass
    model = build_model([3], 'mdil', 'tiny')
    model.single(0).features[1] = Own(8)
    options = parse_train(['--domains', 'CS', '--savedir', 'S', '--network', 'tiny', '--sync-bn'])
    with pytest.raises(UserError, match='--sync-bn: tiny has special batch norms .Own.'):
        building.synchronised(model, options, Place(torch.device('cuda'), 0, 2))
