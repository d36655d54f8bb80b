"""What is fused or reordered for speed means the same as the plain formulas."""
import copy
import functools
import itertools
import json
import statistics
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from mdil import losses, train
from mdil.benchmarks import speed
from mdil.benchmarks.loading import Source
from mdil.evaluation.metrics import confusion, mean_iou
from mdil.losses import kl_per_pixel
from mdil.losses.terms import CrossEntropy, Distillation, sample_old_domains
from mdil.models import build_model, erfnet
from mdil.training import building
from mdil.training.options import parse_train
from mdil.training.run import like_their_weights
from mdil.training.step_loss import StepLoss, mean_over_batch
from mdil.utils.errors import UserError
from mdil.utils.parallel import Place
from mdil.utils.precision import without_bf16
from tests.conftest import needs_bf16
from tests.fill import fill, inputs
from tests.test_losses import cross_entropy

IMAGES, LABELS = inputs(5, 2, 32, 64, 6)
OPTIONS = SimpleNamespace(lambdac=0.7, temperature=2.0, distillation='kl', distill_domains=None, steps_per_batch=1)
WEIGHTS = torch.tensor([1.0, 2.0, 0.5, 3.0, 1.5, 0.0])
PLACE = Place(torch.device('cpu'))


def plain_conv_bn(bn, conv, x, *more):
    return bn(sum((c(y) for c, y in more), conv(x)))


def plain_cross_entropy(logits, labels, weights):
    return F.cross_entropy(logits.float(), labels, weights)


def plain_parts(*arguments):
    return plain_cross_entropy(*arguments), torch.tensor(1.0)


def plain_kl(student, teacher, temperature):
    log_p, log_q = ((x.float() / temperature).log_softmax(1).movedim(1, -1).flatten(0, 2) for x in (student, teacher))
    return F.kl_div(log_p, log_q, reduction='batchmean', log_target=True) * temperature ** 2


def value_of(loss, *arguments):
    """A part of the loss of the batch."""
    return mean_over_batch(loss(IMAGES, LABELS, *arguments), PLACE)[0]


def step_of(precision='fp32', old=2):
    """A StepLoss that learns a domain after `old` ones, the shared weights already moved, dropout 0."""
    teacher = fill(build_model([4, 5, 3][:old])).requires_grad_(False)
    student = fill(build_model([4, 5, 3][:old] + [6])).freeze(range(old))
    with torch.no_grad():
        for parameter in student.shared_parameters():
            parameter.mul_(1.05)
    for block in student.modules():
        if isinstance(block, torch.nn.Dropout2d):
            block.p = 0.0
    terms = [term(OPTIONS) for term in (CrossEntropy, Distillation)]
    return StepLoss(student, teacher, [None] * old + [WEIGHTS], terms, precision=precision).to(
        memory_format=torch.channels_last).train()


def measured(loss, sample=None):
    """(loss parts, {name: gradient}) of one batch as the training takes it, at rate 0."""
    learning = [p for p in loss.student.parameters() if p.requires_grad]
    loss.terms['kd'].sample = sample
    run = SimpleNamespace(place=PLACE, step_loss=loss, terms=list(loss.terms.values()), teacher=loss.teacher, options=OPTIONS,
                          optimizer=torch.optim.Adam(learning, lr=0.0, fused=True), scaler=torch.amp.GradScaler('cpu', enabled=False))
    parts = train.train_batch(run, IMAGES, LABELS, len(loss.student.views) - 1)
    return {name: value.item() for name, value in parts.items()}, gradients_of(loss)


def gradients_of(loss):
    return {name: p.grad.clone() for name, p in loss.student.named_parameters() if p.grad is not None}


def plainly(monkeypatch, precision):
    """(loss parts, gradients) of the plain formulas, all terms in one graph."""
    with monkeypatch.context() as patch:
        patch.setattr(erfnet, 'conv_bn', plain_conv_bn)
        patch.setattr('mdil.losses.terms.cross_entropy_parts', plain_parts)
        step_loss = step_of(precision).to(memory_format=torch.contiguous_format)
        step_loss.terms['kd'].distance = plain_kl
        ce, kd = value_of(step_loss, 2), sum(value_of(step_loss, 2, 'kd', old) for old in (1, 0))
        loss = ce + 0.7 * kd
        loss.backward()
        return {'loss': loss.item(), 'ce': ce.item(), 'kd': kd.item()}, gradients_of(step_loss)


def check_gradients(gradients, plain):
    """Equal relative to their tensor's largest; those of biases before a batch norm are rounding alone."""
    overall = max(gradient.abs().max() for gradient in plain.values())
    assert gradients.keys() == plain.keys()
    for name, gradient in plain.items():
        bound = 1e-4 * gradient.abs().max() + 1e-6 * overall
        assert (gradients[name] - gradient).abs().max() <= bound, name


def test_fused_step_in_float32_equals_the_plain_one(monkeypatch):
    parts, gradients = measured(step_of())
    want, plain = plainly(monkeypatch, 'fp32')
    assert parts['kd'] > 0.01
    for name, value in want.items():
        assert parts[name] == pytest.approx(value, rel=1e-4)
    check_gradients(gradients, plain)


def distance(gradients, others):
    """Length of the difference of two sets of gradients."""
    return sum((gradients[name] - other).double().square().sum() for name, other in others.items()).sqrt().item()


@needs_bf16
def test_fused_step_in_bf16_is_no_further_off_than_the_plain_one(monkeypatch):
    """Losses within 2 % of float32; gradients as far from float32's as bf16 without fusing, to a tenth."""
    parts, gradients = measured(step_of('bf16'))
    want, exact = plainly(monkeypatch, 'fp32')
    _, rounded = plainly(monkeypatch, 'bf16')
    for name, value in want.items():
        assert parts[name] == pytest.approx(value, rel=0.02)
    assert 0 < distance(gradients, exact) < 1.1 * distance(rounded, exact)


def short_step():
    """A step after one domain, each kind of an encoder's layer once or twice."""
    loss = step_of(old=1)
    for network in (loss.student, loss.teacher):
        for view in network.views:
            view.encoder.layers = torch.nn.ModuleList([view.encoder.layers[number] for number in (0, 1, 6, 7, 8)])
    return loss


def test_compiler_sees_one_program_that_means_the_same():
    """No break in the graph of networks, distillation and losses (code generation left out: it takes minutes)."""
    loss, (parts, gradients) = short_step(), measured(short_step())
    loss.part = torch.compile(loss.part, backend='eager', fullgraph=True, dynamic=False)
    found, compiled = measured(loss)
    assert found == pytest.approx(parts, rel=1e-6)
    check_gradients(compiled, gradients)


@pytest.mark.parametrize('method', ['mdil', 'series-adapters', 'single-task'])
def test_network_with_still_norms_equals_the_plain_one(method, monkeypatch):
    model = fill(build_model([4], method)).eval()
    with torch.no_grad():
        fused = model(IMAGES)
        monkeypatch.setattr(erfnet, 'conv_bn', plain_conv_bn)
        plain = model(IMAGES)
        assert (fused - plain).abs().max() <= 1e-4 * plain.abs().mean()


@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize('ours, theirs', [
    (lambda x, y: cross_entropy(x, LABELS, WEIGHTS), lambda x, y: plain_cross_entropy(x, LABELS, WEIGHTS)),
    (lambda x, y: kl_per_pixel(x, y, 3.0), lambda x, y: plain_kl(x, y, 3.0))], ids=['cross-entropy', 'kl'])
def test_losses_and_their_gradients_equal_torchs(ours, theirs, dtype, tolerance):
    """Values to rounding; gradients to that of their own type, however large the loss is scaled."""
    random = torch.Generator().manual_seed(1)
    x, y = ((3 * torch.randn(2, 6, 32, 64, generator=random)).to(dtype) for _ in range(2))
    a, b = x.clone().requires_grad_(), x.clone().float().requires_grad_()
    scale = 1000.0
    got, want = ours(a, y) * scale, theirs(b, y) * scale
    got.backward()
    want.backward()
    assert got.item() == pytest.approx(want.item(), rel=1e-5)
    assert a.grad.dtype == dtype
    assert (a.grad.float() - b.grad).abs().max() <= tolerance * b.grad.abs().max()


def test_losses_keep_one_tensor_of_the_logits_type():
    """No full-size float32 copy waits for the backward pass."""
    x = torch.randn(2, 6, 32, 64).bfloat16().requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        losses.kl_per_pixel(x, x.detach() + 1)
    assert [(t.dtype, t.numel()) for t in kept if t.dim()] == [(torch.bfloat16, x.numel())]


def test_a_draw_of_old_domains_is_unbiased():
    """The mean over all draws of K of n is the sum over all n, the variance n^2 (1/K - 1/n) S^2."""
    loss, n = step_of(old=3), 3
    with torch.no_grad():
        distances = [value_of(loss, 3, 'kd', old).item() for old in range(n)]
    for k in (1, 2):
        _, scale = sample_old_domains(n, k)
        draws = [scale * sum(draw) for draw in itertools.combinations(distances, k)]
        assert statistics.mean(draws) == pytest.approx(sum(distances))
        spread = n ** 2 * (1 / k - 1 / n) * statistics.variance(distances)
        assert statistics.pvariance(draws) == pytest.approx(spread) and spread > 0


def test_draws_are_uniform_and_repeat_with_the_random_state():
    assert sample_old_domains(3) == sample_old_domains(3, 5) == ([2, 1, 0], 1.0)
    torch.manual_seed(3)
    first = [sample_old_domains(3, 1) for _ in range(300)]
    counts = [sum(olds == [old] for olds, _ in first) for old in range(3)]
    assert sum(counts) == 300 and min(counts) > 70 and {scale for _, scale in first} == {3.0}
    torch.manual_seed(3)
    assert [sample_old_domains(3, 1) for _ in range(300)] == first


def test_a_batch_with_drawn_domains_takes_their_distance_times_the_scale():
    """Loss and gradient are those of the drawn term, scaled."""
    loss = step_of(old=3)
    torch.manual_seed(0)
    [old], scale = sample_old_domains(3, 1)
    torch.manual_seed(0)
    parts, gradients = measured(loss, sample=1)
    with torch.no_grad():
        assert parts['kd'] == pytest.approx(scale * value_of(loss, 3, 'kd', old).item(), rel=1e-5)
    loss.student.zero_grad()
    (value_of(loss, 3) + 0.7 * scale * value_of(loss, 3, 'kd', old)).backward()
    for name, gradient in gradients_of(loss).items():
        assert torch.allclose(gradients[name], gradient, rtol=1e-4, atol=1e-6), name


def test_fast_stands_for_options():
    options = parse_train(['--domains', 'camvid', '--savedir', 'x', '--fast', '--device', 'cpu'])
    precision = 'fp32' if without_bf16(torch.device('cpu')) else 'bf16'
    assert (options.precision, options.augment, options.compile) == (precision, 'device', False)
    assert not hasattr(options, 'fast')


@pytest.mark.parametrize('precision', ['fp32', 'bf16', 'fp16'])
def test_fast_leaves_what_is_given(precision):
    start = ['--domains', 'camvid', '--savedir', 'x', '--device', 'cpu']
    options = parse_train([*start, '--fast', '--precision', precision, '--augment', 'workers'])
    assert (options.precision, options.augment) == (precision, 'workers')
    assert vars(options) == vars(parse_train([*start, '--precision', precision]))


@pytest.mark.parametrize('arguments, message', [
    (['--growth', f'{__file__}/x.png'], '--growth'), (['--growth', 'x.xyz'], 'xyz'), (['--json', f'{__file__}/x'], '--json'),
    (['--floor', '--json', 'x.json'], '--floor'), (['--device', 'meta'], 'cannot be used here')])
def test_speed_benchmark_refuses_before_it_measures(arguments, message):
    with pytest.raises(UserError, match=message):
        speed.main(['--height', '16', *arguments])


def test_moments_of_another_layout_move_the_same_weights():
    """Fused Adam walks memory: moments read from a file are laid out as their weights are."""
    def stepped(layout):
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(4, 3, 3, 1).to(memory_format=torch.channels_last))
        optimizer = torch.optim.Adam([weight], fused=True)
        weight.grad = torch.randn_like(weight)
        optimizer.step()
        state = optimizer.state_dict()
        for name in ('exp_avg', 'exp_avg_sq'):
            state['state'][0][name] = state['state'][0][name].contiguous(memory_format=layout)
        optimizer.load_state_dict(state)
        like_their_weights(optimizer)
        optimizer.step()
        return weight
    assert torch.equal(stepped(torch.contiguous_format), stepped(torch.channels_last))


def test_losses_take_logits_of_any_strides():
    x = torch.randn(2, 6, 64, 32, generator=torch.Generator().manual_seed(4))
    a, b = x.clone().transpose(2, 3).requires_grad_(), x.transpose(2, 3).contiguous().requires_grad_()
    for logits in (a, b):
        logits.retain_grad()
        cross_entropy(logits, LABELS, WEIGHTS).backward()
    assert torch.allclose(a.grad, b.grad)


def test_synchronised_batch_norms_freeze_like_plain_ones():
    model = build_model([4, 5])
    keys = list(model.state_dict())
    options = parse_train(['--domains', 'camvid', '--savedir', 'x', '--sync-bn'])
    with pytest.raises(UserError, match='torchrun'):
        building.synchronised(copy.deepcopy(model), options, Place(torch.device('cpu')))
    model = building.synchronised(model, options, Place(torch.device('cuda'), 0, 2))
    model.freeze([0]).train()
    norms = [m for m in model.modules() if isinstance(m, torch.nn.SyncBatchNorm)]
    old = {id(bn) for module in model.branch(0) for bn in module.modules()}
    assert list(model.state_dict()) == keys and len(norms) == 2 * (29 + 10)
    assert all(bn.training == (id(bn) not in old) for bn in norms)


def test_floor_counts_what_the_design_counts():
    """60.2 GFLOP forward per image at 1024x512; step 1 three times that but for the image's own gradient."""
    options = speed.parse(['--precision', 'fp32'])
    count = lambda what: speed.floors(what, options, (1e12, 2e10))      # some layers wait for memory, others compute
    forward = count('evaluation')
    assert forward['gflop'] == pytest.approx(60.2, abs=0.05)
    assert count('step 1')['gflop'] == pytest.approx(3 * 60.2, rel=0.01)
    assert count('step 2')['gflop'] < 7 * 60.2 < count('step 3')['gflop'] < 11 * 60.2
    assert forward['seconds'] > 1.01 * max(forward['gflop'] / 1e3, forward['gb'] / 20)


def test_speed_benchmark_compares_both_sides(tmp_path, monkeypatch):
    """Real work on both sides, tiny: the file holds what the table shows."""
    monkeypatch.setattr(speed, 'SOURCES', [Source('256x128 PNG', 256, 128, 0, 1)])
    monkeypatch.setattr(speed, 'best_time', functools.partial(speed.best_time, rounds=1))
    speed.main(['--height', '16', '--batch-size', '2', '--rounds', '1', '--seconds', '0', '--device', 'cpu',
                '--what', 'step 1', 'evaluation', '--num-workers', '1', '--json', str(tmp_path / 'speed.json')])
    found = json.loads((tmp_path / 'speed.json').read_text())
    assert set(found['work']) == {'step 1', 'evaluation'} and set(found['waiting']) == {'published', 'ours'}
    for entry in found['work'].values():
        ours, published = entry['sides']['ours'], entry['sides']['published']
        assert ours['ratios'] == [pytest.approx(ours['images_per_second'][0] / published['images_per_second'][0])]


def test_published_side_evaluates_as_the_confusion_matrix_does():
    """One-hot counting and ours give the same mIoU where every class occurs."""
    network = fill(build_model([4])).eval()
    labels = torch.randint(0, 4, (2, 32, 64), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        _, miou = speed.published_evaluation(network, (255 * IMAGES).round(), labels, torch.ones(4))
        answers = network((255 * IMAGES).round() / 255).argmax(1)
    assert 100 * miou == pytest.approx(mean_iou(confusion(answers, labels, 4)), rel=1e-4)
