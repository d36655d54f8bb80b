"""The terms of a step's loss, one class each; a method's row in models.methods lists its terms.

A new method is a class and a row in one file: docs/extending.md has an example. The progress bar, metrics.jsonl, the
dashboard and the report show its terms by name.
"""
import torch
from torch import nn

from mdil.losses import DISTILLATIONS, cross_entropy_parts


class LossTerm(nn.Module):
    """One term of the loss of a step. The training loop weights, adds, records and differentiates it.

    name: its name wherever it is shown.
    weight: its factor in the loss.
    needs_teacher: whether it uses the frozen model of the previous step. Steps without a previous one leave
        it out.
    mixed: whether it is for batches of images of all domains; then all terms of its method must be.

    `setup` may register buffers. They are not saved, because a resumed run calls `setup` again.
    """
    name = None
    needs_teacher = False
    mixed = False

    def __init__(self, options):
        """options: the complete options of train.py."""
        super().__init__()
        self.weight = 1.0

    @classmethod
    def applies(cls, options, plan):
        """Whether a step has this term; plan: its StepPlan (training.plan), with no terms yet."""
        return plan.from_previous or not cls.needs_teacher

    def setup(self, run):
        """Called once before the first batch, also in a resumed run. Networks are loaded and on their device."""

    def parts(self, run):
        """[(part, factor)] of a batch: the term is the sum of factor * forward(..., part).

        The parts are differentiated one after another, so only one part's activations are in memory at a
        time.
        """
        return [(None, 1.0)]

    def forward(self, step, images, labels, domain, part):
        """One part of the term: a 0-d tensor, the mean over the images, or a pair of 0-d tensors (total, mass).

        With several devices, each sees a slice of the batch. The term of the whole batch is the sum of
        their totals over the sum of their masses. The mass of a mean over images is the number of images.

        step: the StepLoss, which has `student`, `teacher` (or None) and `class_weights(domain)`.
        images: (B, 3, H, W) floats in [0, 1].
        labels: (B, H, W) uint8 class indices of the domain with index `domain`.
        domain: None if the term is `mixed`: the first B/n images are of the first of n domains, and so on.
        part: one of those that `parts` returns.

        The code must not wait for the device (no `.item()`, no `if tensor`).
        """
        raise NotImplementedError


class CrossEntropy(LossTerm):
    """Weighted cross-entropy of the batch's domain."""
    name = 'ce'

    def forward(self, step, images, labels, domain, part):
        return cross_entropy_parts(step.student(images, domain), labels.long(), step.class_weights(domain))


class MixedCrossEntropy(LossTerm):
    """Weighted cross-entropy of a mixed batch: each image has the classes and weights of its domain."""
    name, mixed = 'ce', True

    def setup(self, run):
        self.logits = run.student.mixed().forward       # a method: a module would count as one of the term's own

    def forward(self, step, images, labels, domain, part):
        counts = step.student.num_classes
        by_domain = (tensor.unflatten(0, (len(counts), -1)) for tensor in (self.logits(images), labels.long()))
        totals, masses = zip(*(cross_entropy_parts(logits[:, :count], truth, step.class_weights(index))
                               for index, (logits, truth, count) in enumerate(zip(*by_domain, counts))))
        return sum(totals), sum(masses)


class Distillation(LossTerm):
    """Distances of the student's outputs from the teacher's, summed over the old domains, one part each."""
    name, needs_teacher = 'kd', True

    def __init__(self, options):
        super().__init__(options)
        self.weight, self.temperature = options.lambdac, options.temperature
        self.distance, self.sample = DISTILLATIONS[options.distillation], options.distill_domains

    @classmethod
    def applies(cls, options, plan):
        """True if something can learn from it, or if it must overwrite old statistics as the published loops do."""
        learns = options.lambdac > 0 and not plan.shared_frozen
        return super().applies(options, plan) and (learns or options.old_bn == 'released')

    def parts(self, run):
        domains, factor = sample_old_domains(len(run.teacher.views), self.sample)
        return [(domain, factor) for domain in domains]

    def forward(self, step, images, labels, domain, part):
        with torch.no_grad():
            target = step.teacher(images, part)
        return self.distance(step.student(images, part), target, self.temperature)


def sample_old_domains(known, count=None):
    """(indices of the old domains that a batch distils, latest first; factor of their distances).

    All `known` domains, or `count` of them drawn with torch's generator. With K of n drawn, the factor n/K
    keeps the expectation of the sum. The draw adds n^2 (1/K - 1/n) S^2 to the sum's variance, where S^2 is
    the variance between the domains' distances.
    """
    if count is None or count >= known:
        return list(reversed(range(known))), 1.0
    return sorted(torch.randperm(known)[:count].tolist(), reverse=True), known / count
