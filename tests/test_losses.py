"""Losses against their formulas and torch's own."""
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from mdil.losses import cross_entropy_parts, kl_per_pixel, released_kl
from mdil.losses.terms import Distillation
from mdil.models import build_model
from mdil.training.step_loss import StepLoss, mean_over_batch
from mdil.utils.parallel import Place
from tests.fill import fill

random = torch.Generator().manual_seed(0)
STUDENT, TEACHER = (3 * torch.randn(2, 5, 4, 6, generator=random) for _ in range(2))
LABELS = torch.randint(0, 5, (2, 4, 6), generator=random)
WEIGHTS = torch.tensor([1.0, 2.0, 0.5, 3.0, 0.0])


def cross_entropy(logits, labels, weights):
    """What the training makes of the parts."""
    return mean_over_batch(torch.stack(cross_entropy_parts(logits, labels, weights))[None], Place(torch.device('cpu')))[0]


def test_cross_entropy_is_torchs_weighted_mean():
    assert torch.allclose(cross_entropy(STUDENT, LABELS, WEIGHTS), F.cross_entropy(STUDENT, LABELS, WEIGHTS))


def test_void_pixels_do_not_count():
    changed = STUDENT.clone()
    changed[:, :, 0, 0] += torch.randn(2, 5, generator=random)
    labels = LABELS.clone()
    labels[:, 0, 0] = 4
    assert torch.equal(cross_entropy(STUDENT, labels, WEIGHTS), cross_entropy(changed, labels, WEIGHTS))
    assert cross_entropy(STUDENT, torch.full_like(LABELS, 4), WEIGHTS) == 0


def test_a_batch_of_void_has_no_gradient_however_it_is_scaled():
    x = STUDENT.clone().requires_grad_()
    (65536 * cross_entropy(x, torch.full_like(LABELS, 4), WEIGHTS)).backward()
    assert x.grad.abs().max() == 0


def test_kl_is_zero_at_the_teacher_and_positive_elsewhere():
    student = TEACHER.clone().requires_grad_()
    loss = kl_per_pixel(student, TEACHER, 2.0)
    loss.backward()
    assert abs(loss.item()) < 1e-6 and student.grad.abs().max() < 1e-6
    assert kl_per_pixel(STUDENT, TEACHER, 2.0) > 0.1


def test_kl_is_the_mean_over_pixels_times_temperature_squared():
    for t in (1.0, 3.0):
        p, q = (STUDENT / t).softmax(1), (TEACHER / t).softmax(1)
        want = t ** 2 * (q * (q.log() - p.log())).sum(1).mean()
        assert torch.allclose(kl_per_pixel(STUDENT, TEACHER, t), want, rtol=1e-5)


def test_released_term_takes_probabilities_and_the_element_mean():
    p, q = STUDENT.softmax(1), TEACHER.softmax(1)
    assert torch.allclose(released_kl(STUDENT, TEACHER), (q * (q.log() - p)).mean(), rtol=1e-5)
    assert released_kl(TEACHER, TEACHER) < -0.01


def test_distillation_measures_each_old_branch_against_the_teacher():
    teacher = fill(build_model([4, 5])).eval().requires_grad_(False)
    student = fill(build_model([4, 5, 6]))
    student.freeze([0, 1])
    options = SimpleNamespace(lambdac=0.1, temperature=2.0, distillation='kl', distill_domains=None)
    loss = StepLoss(student, teacher, [None] * 3, [Distillation(options)]).train()
    assert not teacher.training
    images, labels = torch.rand(1, 3, 16, 16), torch.randint(0, 6, (1, 16, 16))
    with torch.no_grad():
        student.shared_parameters()[0].add_(0.05)
        for old in (0, 1):
            want = kl_per_pixel(student(images, old), teacher(images, old), 2.0)
            value, _ = mean_over_batch(loss(images, labels, 2, 'kd', old), Place(torch.device('cpu')))
            assert torch.allclose(value, want) and want > 0
