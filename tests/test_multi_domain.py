"""Domains as views: what is shared stays shared whatever is done to the model, and nothing else is touched."""
import copy
import sys

import pytest
import torch
from torch import nn

from mdil.losses.terms import LossTerm
from mdil.models import build_model
from mdil.models.erfnet import ERFNet
from mdil.models.multi_domain import MultiDomainNet, batch_norms_of, divide, output_layer_like
from mdil.training.step_loss import StepLoss
from mdil.utils.errors import UserError
from tests.fill import fill, inputs

IMAGES, LABELS = inputs(4, 2, 32, 64, 5)


class Tiny(nn.Module):
    """A network that knows nothing of domains: convolutions, a batch norm, dropout, a head."""
    heads, output_layers = ('head',), ('head.1',)

    def __init__(self, num_classes):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout2d(0.5),
                                      nn.Conv2d(8, 8, 1))
        self.head = nn.Sequential(nn.BatchNorm2d(8), nn.Conv2d(8, num_classes, 1))

    def forward(self, images):
        return self.head(self.features(images))


class TorchvisionNet(nn.Module):
    """LR-ASPP with MobileNetV3 of torchvision, as a view."""
    heads = ('net.classifier',)
    output_layers = 'net.classifier.low_classifier', 'net.classifier.high_classifier'

    def __init__(self, num_classes):
        super().__init__()
        segmentation = pytest.importorskip('torchvision.models.segmentation')
        self.net = segmentation.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=num_classes)

    def forward(self, images):
        return self.net(images)['out']


def three_domains(network, domain_bn=True):
    model = MultiDomainNet(network, domain_bn)
    for count in (4, 5):
        model.add_domain(count)
    return model


def tied(model):
    """Whether the shared modules are the same objects in all views, and hold tensors."""
    names = divide(model.single(0), model.domain_bn)[1]
    return any(True for module in model.shared() for _ in module.parameters()) and all(
        view.get_submodule(name) is model.single(0).get_submodule(name) for view in model.views for name in names)


def tensors(view):
    return {name: value.clone() for name, value in view.state_dict().items()}


@pytest.mark.parametrize('network', [Tiny, TorchvisionNet, lambda classes: ERFNet(classes, 'parallel')],
                         ids=['tiny', 'lr-aspp', 'erfnet'])
def test_two_steps_of_the_third_view_move_nothing_of_the_others(network):
    """With the shared modules frozen, the old views' every tensor and output stay to the last bit."""
    torch.manual_seed(0)
    model = three_domains(network(3)).freeze((0, 1), shared=True).train()
    assert model.num_classes == [3, 4, 5]
    before = [tensors(view) for view in model.views]
    with torch.no_grad():
        outputs = [model(IMAGES, domain) for domain in (0, 1)]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(IMAGES, 2), LABELS).backward()
        optimizer.step()
    for domain in (0, 1):
        after = tensors(model.single(domain))
        assert all(torch.equal(value, after[name]) for name, value in before[domain].items())
        with torch.no_grad():
            assert torch.equal(model(IMAGES, domain), outputs[domain])
    moved = {name for name, value in tensors(model.single(2)).items() if not torch.equal(value, before[2][name])}
    own = {name for name in before[2] for owner in divide(model.single(2), True)[0] if name.startswith(f'{owner}.')}
    # A bias before a batch norm has no gradient but for rounding.
    assert {name for name in own if not name.endswith('.bias')} <= moved <= own


@pytest.mark.parametrize('domain_bn', [True, False])
@pytest.mark.parametrize('change', [
    lambda model: model.double(), lambda model: model.to(memory_format=torch.channels_last), lambda model: model.to('meta'),
    copy.deepcopy, lambda model: model.synchronise_batch_norms(), lambda model: model.synchronise_batch_norms().double()],
    ids=['double', 'channels last', 'meta', 'deepcopy', 'sync-bn', 'sync-bn, double'])
def test_sharing_outlives(change, domain_bn):
    model = three_domains(ERFNet(3, 'parallel'), domain_bn)
    keys = list(model.state_dict())
    changed = change(model)
    assert tied(changed) and list(changed.state_dict()) == keys
    norms = sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in changed.modules())
    assert norms == (3 if domain_bn else 1) * 29 + 3 * 10


def test_a_copy_shares_nothing_with_its_original():
    model = three_domains(Tiny(3))
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    assert not any(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters()))


def test_replicas_of_data_parallel_share_too(monkeypatch):
    """DataParallel's own copying, each tensor cloned where it would go to another GPU."""
    replicate = sys.modules['torch.nn.parallel.replicate']
    monkeypatch.setattr(replicate, '_broadcast_coalesced_reshape', lambda tensors, devices, detach=False: [
        [tensor.clone() for tensor in tensors] for _ in devices])
    model = fill(three_domains(ERFNet(3, 'parallel'))).eval()
    for replica in replicate.replicate(model, [0, 1]):
        assert replica.single(0).encoder.layers[1].conv3x1_1 is replica.single(2).encoder.layers[1].conv3x1_1
        with torch.no_grad():
            assert all(torch.equal(replica(IMAGES, domain), model(IMAGES, domain)) for domain in range(3))


def test_a_loss_of_weights_is_refused_in_replicas_of_data_parallel(monkeypatch):
    """They have no parameters, so that it would be 0."""
    replicate = sys.modules['torch.nn.parallel.replicate']
    monkeypatch.setattr(replicate, '_broadcast_coalesced_reshape', lambda tensors, devices, detach=False: [
        [tensor.clone() for tensor in tensors] for _ in devices])

    class Penalty(LossTerm):
        name = 'penalty'

        def forward(self, step, images, labels, domain, part):
            return sum(weight.square().sum() for weight in step.student.shared_parameters())

    loss = StepLoss(three_domains(Tiny(3)), None, [torch.ones(3)] * 3, [Penalty(None)])
    assert loss(IMAGES, None, 0, 'penalty')[0, 0] > 0
    with pytest.raises(UserError, match='penalty is 0, not a tensor; .* torchrun, or --parallel none'):
        replicate.replicate(loss, [0, 1])[1](IMAGES, None, 0, 'penalty')


@pytest.mark.parametrize('layer', [nn.Conv2d(4, 5, 3, stride=2, padding=2, dilation=2, padding_mode='reflect'),
                                   nn.ConvTranspose2d(4, 5, 3, stride=2, padding=1, output_padding=1, bias=False)])
def test_a_new_output_layer_has_the_old_ones_settings(layer):
    fresh, x = output_layer_like(layer, 7), torch.rand(1, 4, 9, 9)
    assert fresh(x).shape == (1, 7, *layer(x).shape[2:])
    assert repr(fresh) == repr(layer).replace('4, 5', '4, 7')


def test_a_state_dict_holds_every_tensor_once_and_fills_another_model():
    model = fill(three_domains(Tiny(3)))
    state = model.state_dict()
    assert set(state) == {
        f'features.{rest}' for rest in ('0.weight', '0.bias', '4.weight', '4.bias')} | {
        f'{owner}.{domain}.{rest}' for domain in range(3) for owner in ('features.1', 'head')
        for rest in (('weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked') if owner != 'head' else (
            '0.weight', '0.bias', '0.running_mean', '0.running_var', '0.num_batches_tracked', '1.weight', '1.bias'))}
    assert len({value.data_ptr() for value in state.values()}) == len(state)
    other = three_domains(Tiny(3))
    other.load_state_dict(state)
    assert all(torch.equal(value, state[name]) for name, value in other.state_dict().items()) and tied(other)
    with pytest.raises(RuntimeError, match='Missing'):
        other.load_state_dict({name: value for name, value in state.items() if not name.startswith('head.2')})
    with pytest.raises(RuntimeError, match='stranger'):
        other.load_state_dict({**state, 'stranger': torch.zeros(1)})


def test_dropout_of_a_frozen_view_is_off_and_of_the_others_on():
    model = three_domains(Tiny(3)).freeze((0,)).train()
    with torch.no_grad():
        assert torch.equal(model(IMAGES, 0), model(IMAGES, 0))
        assert not torch.equal(model(IMAGES, 1), model(IMAGES, 1))
        model.freeze((0,), dropout=False).train()
        assert torch.equal(model(IMAGES, 1), model(IMAGES, 1))


def test_a_domain_added_after_old_norms_were_fixed_to_batches_learns_its_own_statistics():
    model = three_domains(Tiny(3)).freeze((0, 1, 2), old_bn='batch')
    added = model.add_domain(4, source=0)
    model.freeze((0, 1, 2)).train()(IMAGES, added)
    moved = [norm for norm in batch_norms_of(model.single(added).modules()) if norm.num_batches_tracked]
    assert moved == list(batch_norms_of(model.single(added).modules())) and moved


def test_norms_without_statistics_stay_as_they_are():
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False), nn.Conv2d(4, 3, 1))
    network.heads, network.output_layers = ('2',), ('2',)
    model = MultiDomainNet(network)
    model.freeze([0])
    model.load_state_dict(model.state_dict())


def test_a_view_is_the_plain_network_itself():
    model = fill(build_model([3, 4])).eval()
    plain = ERFNet(4, 'parallel').eval()
    plain.load_state_dict(model.single(1).state_dict())
    with torch.no_grad():
        assert torch.equal(plain(IMAGES), model(IMAGES, 1))
        assert torch.equal(model.single(1)(IMAGES), model(IMAGES, 1))


def test_a_tensor_that_could_not_be_shared_is_refused():
    network = Tiny(3)
    network.scale = nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match='scale lies directly in the network'):
        MultiDomainNet(network)


def test_ddp_sees_each_shared_parameter_once(tmp_path):
    """A group of one process: the gradient of a shared weight is that of the plain model."""
    torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        model = fill(three_domains(Tiny(3))).freeze((0, 1)).eval()
        wrapped = nn.parallel.DistributedDataParallel(model)
        nn.functional.cross_entropy(wrapped(IMAGES, 2), LABELS).backward()
    finally:
        torch.distributed.destroy_process_group()
    plain = fill(three_domains(Tiny(3))).freeze((0, 1)).eval()
    nn.functional.cross_entropy(plain(IMAGES, 2), LABELS).backward()
    for one, other in zip(model.parameters(), plain.parameters()):
        assert one.grad is other.grad is None or torch.allclose(one.grad, other.grad)
