"""The task of a step: student, frozen teacher, losses. The loop knows nothing else."""

import torch
from torch import nn

from mdil.losses import DISTILLATIONS, cross_entropy
from mdil.utils.precision import autocast, memory_format, to_float


class Task(nn.Module):
    """Computes the terms of the loss of a batch; the unit that DataParallel and DDP wrap.

    student: ERFNet that knows all domains. teacher: frozen model of the previous step,
    or None. class_weights: a (C,) tensor for each domain, void 0. compiled: whether
    torch.compile makes one program of each term.
    """

    def __init__(self, student, teacher, class_weights, *, distillation='kl', temperature=1.0, teacher_mode='eval',
                 precision='fp32', compiled=False):
        super().__init__()
        self.student, self.teacher = student, teacher
        self.distill, self.temperature = DISTILLATIONS[distillation], temperature
        self.teacher_mode, self.precision = teacher_mode, precision
        for number, weights in enumerate(class_weights):
            self.register_buffer(f'weights{number}', weights, persistent=False)
        if compiled:
            # A program for each branch and size of batch; beyond the limit terms would silently run uncompiled.
            torch._dynamo.config.recompile_limit = max(64, 4 * len(class_weights))
            torch._dynamo.config.optimize_ddp = False       # would cut each program in several
            self.term = torch.compile(self.term, dynamic=False)

    def train(self, mode=True):
        super().train(mode)
        if self.teacher is not None:
            self.teacher.train(mode and self.teacher_mode == 'train')
        return self

    def forward(self, images, labels, domain, old=None):
        """A term of the loss of images (B, 3, H, W) uint8 (or float in [0, 1]), labels (B, H, W) uint8 of `domain`.

        The cross-entropy, or with `old` the distance to the teacher in the branch of the
        domain `old`; a 0-d tensor. Terms are differentiated one by one, so that the
        activations of one branch are held at a time, however many domains there are.
        """
        images = to_float(images).contiguous(memory_format=memory_format(images.device, self.precision))
        with autocast(images.device, self.precision):
            return self.term(images, labels, domain, old)

    def term(self, images, labels, domain, old):
        """What `forward` returns, of float images in their memory format."""
        if old is None:
            return cross_entropy(self.student(images, domain), labels.long(), getattr(self, f'weights{domain}'))
        return self.distance(images, old)

    def distance(self, images, old):
        """Distance of the student's outputs to the teacher's in the branch of domain `old`."""
        with torch.no_grad():
            target = self.teacher(images, old)
        return self.distill(self.student(images, old), target, self.temperature)


def drawn(known, count=None):
    """(numbers of the old domains that a batch distils, the latest first; factor of their distances).

    All `known` domains, or `count` of them drawn by torch's generator. With K of n drawn
    the factor n / K keeps the expectation of the sum; the draw adds n^2 (1/K - 1/n) S^2 to
    its variance, S^2 being that of the domains' distances among one another.
    """
    if count is None or count >= known:
        return list(reversed(range(known))), 1.0
    return sorted(torch.randperm(known)[:count].tolist(), reverse=True), known / count
