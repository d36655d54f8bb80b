"""The network: published keys and sizes, branches that do not touch one another."""
from pathlib import Path

import pytest
import torch

from mdil.models import METHODS, build_model
from mdil.models.layouts import published_keys
from tests.fill import fill

HERE = Path(__file__).parent
IMAGES = torch.rand(1, 3, 16, 32, generator=torch.Generator().manual_seed(0))


def keys_of(name):
    rows = (line.split('\t') for line in (HERE / name).read_text().splitlines())
    return {key: shape.strip() for key, shape in rows}


def shapes(state):
    return {key.removeprefix('module.'): str(list(value.shape)) for key, value in state.items()}


def test_adapter_model_has_the_published_keys_and_sizes():
    model = build_model([20, 20])
    assert shapes(model.state_dict()) == keys_of('state_dict_keys_rap_20_20.txt')
    assert sum(p.numel() for p in model.shared_parameters()) == 1_868_252
    branch = sum(p.numel() for p in model.branch_parameters(1))
    assert branch == 305_792 + 5_792 + 190_212


def test_plain_model_is_written_with_the_published_keys():
    state = published_keys(build_model([20], 'single-task').state_dict(), [20], None)
    assert shapes(state) == keys_of('state_dict_keys_single_20.txt')


@pytest.mark.usefixtures('shallow')
@pytest.mark.parametrize('method', ['mdil', 'series-adapters', 'domain-bn'])
def test_every_module_of_a_branch_matters_to_its_domain_and_to_no_other(method):
    """A wrong adapter, batch-norm or decoder index would show in one of the two."""
    model = fill(build_model([5, 5, 5], method)).eval()
    with torch.no_grad():
        before = [model(IMAGES, domain) for domain in range(3)]
        for number, module in enumerate(module for module in model.branch(1) if module.state_dict()):
            kept = {name: value.clone() for name, value in module.state_dict().items()}
            for parameter in module.parameters():
                parameter.add_(0.5)
            after = [model(IMAGES, domain) for domain in range(3)]
            module.load_state_dict(kept)
            assert torch.equal(before[0], after[0]) and torch.equal(before[2], after[2]), f'{number}: {module}'
            assert not torch.equal(before[1], after[1]), f'{number}: {module}'


def test_branch_and_shared_parameters_partition_the_network():
    for method in METHODS:
        model = build_model([4] if METHODS[method].one_domain else [4, 6], method)
        parts = [p for d in range(len(model.views)) for p in model.branch_parameters(d)] + model.shared_parameters()
        assert sorted(map(id, parts)) == sorted(map(id, model.parameters()))


def test_parallel_adapter_adds_its_convolution_before_the_batch_norm():
    """y = BN(pair(x) + A x): with A = c * identity, the block equals one whose pair got c x added."""
    block = fill(build_model([3])).eval().single(0).encoder.layers[1]
    x = torch.rand(1, 64, 8, 8)
    adapter = block.parallel_conv_1
    with torch.no_grad():
        plain = block.conv1x3_1(block.conv3x1_1(x).relu())
        assert torch.allclose(block.pair(x, 1), block.bn1(plain + adapter(x)), atol=1e-6)


def test_new_domain_copies_the_last_branch_but_for_the_output_layer():
    model = fill(build_model([5, 7]))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert model.add_domain(9) == 2 and model.num_classes == [5, 7, 9]
    for old, new in zip(model.branch(1), model.branch(2)):
        for (name, kept), value in zip(old.state_dict().items(), new.state_dict().values()):
            assert 'output_conv' in name or torch.equal(kept, value), name
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert after['decoder.2.output_conv.weight'].shape == (16, 9, 2, 2)


def test_a_new_output_layer_is_drawn_anew_for_as_many_classes_too():
    """As from Cityscapes to BDD100K: the shapes would let it be copied."""
    model = fill(build_model([5]))
    model.add_domain(5)
    old, new = (model.single(domain).decoder.output_conv for domain in (0, 1))
    assert not torch.equal(old.weight, new.weight) and not torch.equal(old.bias, new.bias)


def test_a_fresh_head_copies_nothing_of_the_last_one():
    model = fill(build_model([5], 'fine-tune'))
    model.add_domain(5, head='fresh')
    old, new = (model.single(domain).decoder.state_dict() for domain in (0, 1))
    assert not any(torch.equal(value, new[name]) for name, value in old.items() if not name.endswith('batches_tracked'))
    assert all(model.single(0).encoder.layers[0] is view.encoder.layers[0] for view in model.views)


def test_dropout_is_erfnets():
    blocks = [layer for layer in build_model([3]).single(0).encoder.layers if hasattr(layer, 'dropout')]
    assert [block.dropout.p for block in blocks] == [0.03] * 5 + [0.3] * 8


@pytest.mark.parametrize('statistics', ['copied', 'fresh'])
def test_statistics_of_a_new_domain(statistics):
    model = fill(build_model([5]))
    model.add_domain(5, statistics)
    old, new = (model.single(d).encoder.layers[3].bn2.running_var for d in (0, 1))
    assert torch.equal(new, old if statistics == 'copied' else torch.ones_like(new))
    assert torch.equal(*(model.single(d).decoder.layers[0].bn.running_var for d in (0, 1)))


def test_wrong_calls_are_refused():
    model = build_model([4, 4])
    for domain in (-1, 2):
        with pytest.raises(IndexError):
            model(IMAGES, domain)
    with pytest.raises(ValueError, match='multiples of 8'):
        model(torch.rand(1, 3, 30, 64))
    with pytest.raises(KeyError, match='mdil'):
        build_model([4], 'nothing')
    with pytest.raises(ValueError):
        build_model([])
