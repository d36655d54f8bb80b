"""Statistics of batch norms, estimated anew or taken from another network; the paired t test."""
import pytest
import torch

from mdil.evaluation import paired
from mdil.evaluation.norms import estimate_statistics, take_statistics
from mdil.models import build_model
from mdil.models.multi_domain import batch_norms_of
from mdil.utils.parallel import Place

CPU = Place(torch.device('cpu'))


def random_batches():
    torch.manual_seed(0)
    return [(torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8), None, None) for _ in range(3)]


def buffers(model, domain):
    return [norm.running_mean.clone() for norm in batch_norms_of([model.single(domain)])]


def same(one, other):
    return [torch.equal(a, b) for a, b in zip(one, other)]


def test_estimated_statistics_are_the_mean_over_the_batches_without_dropout():
    model = build_model([4])
    batches = random_batches()
    estimate_statistics(model, 0, batches, CPU)
    first = model.single(0).encoder.initial_block
    seen = []
    first.bn.register_forward_hook(lambda norm, given, out: seen.append(given[0]))
    with torch.no_grad():
        for images, *_ in batches:
            model(images / 255)
    means = torch.stack([x.mean((0, 2, 3)) for x in seen])
    assert torch.allclose(first.bn.running_mean, means.mean(0), atol=1e-5)
    variances = torch.stack([x.var((0, 2, 3)) for x in seen])
    assert torch.allclose(first.bn.running_var, variances.mean(0), rtol=1e-4)
    again = buffers(model, 0)
    estimate_statistics(model, 0, batches, CPU)
    assert all(same(again, buffers(model, 0)))      # nothing random, and nothing of the earlier statistics
    assert not model.training and not any(module.training for module in model.modules())
    assert all(norm.momentum == 0.1 for norm in batch_norms_of([model]))


@pytest.mark.parametrize('method, untouched', [('mdil', True), ('fine-tune', False)])
def test_the_statistics_that_change_are_those_of_the_domains_own_forward_pass(method, untouched):
    model = build_model([4, 5], method)
    weights = {name: value.clone() for name, value in model.named_parameters()}
    old, new = buffers(model, 0), buffers(model, 1)
    estimate_statistics(model, 1, random_batches(), CPU)
    assert not any(same(new, buffers(model, 1))) and all(same(old, buffers(model, 0))) == untouched
    assert all(torch.equal(value, weights[name]) for name, value in model.named_parameters())


@pytest.mark.parametrize('method', ['mdil', 'fine-tune', 'adapters-shared-bn'])
def test_statistics_are_taken_from_a_view_shared_norms_included(method):
    model, source = build_model([4, 5], method), build_model([4], method)
    estimate_statistics(source, 0, random_batches(), CPU)
    take_statistics(model.single(0), source.single(0))
    assert all(same(buffers(model, 0), buffers(source, 0)))


@pytest.mark.parametrize('differences, p', [
    ([1.0, 2.0, 3.0], 0.0741799), ([1.0, 2.0, 4.0, 2.5], 0.0320046), ([0.3, -0.2], 0.8743341), ([2.0, 2.1, 1.9, 2.0, 2.2], 2.332e-6)])
def test_p_of_a_paired_test(differences, p):
    """Values of scipy.stats.ttest_1samp."""
    assert paired.p_value(differences) == pytest.approx(p, rel=1e-4)


def test_better_is_said_below_one_percent_alone():
    assert [paired.verdict(values) for values in ([2, 2.1, 1.9], [-2, -2.1, -1.9], [1, 2, 3], [5], [])] == [
        'better', 'worse', '', '', '']
    assert paired.p_value([1.0]) is None and paired.p_value([0.0, 0.0]) == 1
