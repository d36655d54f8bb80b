"""The loss of a step: student, frozen teacher and the method's loss terms. The loop knows nothing else."""
import torch
from torch import nn

from mdil.utils.parallel import summed
from mdil.utils.precision import autocast, memory_format, to_float


class StepLoss(nn.Module):
    """Computes the parts of the loss of a batch; the unit that DataParallel and DDP wrap.

    student: MultiDomainNet that knows all domains. teacher: frozen model of the previous
    step, or None. class_weights: a (C,) tensor for each domain, void 0, or None. terms:
    the LossTerms. compiled: whether torch.compile makes one program of each part.
    """

    def __init__(self, student, teacher, class_weights, terms, *, teacher_mode='eval', precision='fp32',
                 compiled=False):
        super().__init__()
        self.student, self.teacher = student, teacher
        self.terms = nn.ModuleDict({term.name: term for term in terms})
        self.teacher_mode, self.precision = teacher_mode, precision
        for domain, weights in enumerate(class_weights):
            self.register_buffer(f'weights{domain}', weights, persistent=False)
        if compiled:
            # A program for each branch and size of batch; beyond the limit parts would silently run uncompiled.
            torch._dynamo.config.recompile_limit = max(64, 4 * len(class_weights))
            torch._dynamo.config.optimize_ddp = False       # would cut each program in several
            self.part = torch.compile(self.part, dynamic=False)

    def class_weights(self, domain):
        """Cross-entropy weights (C,) of a domain."""
        return getattr(self, f'weights{domain}')

    def train(self, mode=True):
        super().train(mode)
        if self.teacher is not None:
            self.teacher.train(mode and self.teacher_mode == 'train')
        return self

    def forward(self, images, labels, domain, term='ce', part=None):
        """A part of the loss term called `term` as [[total, mass]], see `LossTerm.forward` and `mean_over_batch`.

        images: (B, 3, H, W) uint8, or float in [0, 1]; labels: (B, H, W) uint8 of the domain
        index `domain`; part: as `LossTerm.parts` gives it.
        """
        images = to_float(images).contiguous(memory_format=memory_format(images.device, self.precision))
        with autocast(images.device, self.precision):
            return self.part(images, labels, domain, term, part)

    def part(self, images, labels, domain, term, part):
        """What `forward` returns, of float images in their memory format."""
        value = self.terms[term](self, images, labels, domain, part)
        if isinstance(value, torch.Tensor):
            mass = torch.full_like(value, len(images))
            value = value * mass, mass
        return torch.stack(value)[None]


def mean_over_batch(parts, place):
    """(0-d tensor to differentiate here, value over the whole batch) of what replicas gave.

    parts: (replicas of this process, 2), totals and masses. The value is the sum of all
    totals over the sum of all masses, of every process, and 0 where nothing has mass. DDP
    averages the gradients of processes: the first is scaled so that this gives the value's.
    """
    total, mass = parts.sum(0)
    whole, mass = summed(torch.stack([total.detach(), mass.detach()]), place)
    mass = mass + (mass == 0)
    return total * place.world / mass, whole / mass


def optimizer_steps(run):
    """What each optimiser step of a batch differentiates, in order: [[(LossTerm, part, factor), ...], ...].

    One step on the sum of the terms, or one on each of them.
    """
    parts = [[(term, *part) for part in term.parts(run)] for term in run.terms]
    if run.options.steps_per_batch == 1:
        # The cross-entropy, the first term, comes last: DDP reduces gradients in the last
        # backward pass, which must reach every weight that trains.
        return [[entry for term in reversed(parts) for entry in term]]
    return parts
