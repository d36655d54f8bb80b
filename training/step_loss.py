"""The loss of a step: student, frozen teacher and the method's loss terms. The training loop knows nothing else."""
import torch
from torch import nn

from mdil.utils.errors import UserError
from mdil.utils.parallel import summed
from mdil.utils.precision import autocast, memory_format, to_float


class StepLoss(nn.Module):
    """Computes the parts of the loss of a batch; the module that DataParallel and DDP wrap.

    student: the MultiDomainNet, which knows all domains.
    teacher: the frozen model of the previous step, or None.
    class_weights: for each domain a (C,) tensor, void 0.
    terms: the LossTerms.
    compiled: whether torch.compile makes one program of each part.
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
            # One program per branch and batch size. Beyond the limit, parts would silently run uncompiled.
            torch._dynamo.config.recompile_limit = max(64, 4 * len(class_weights))
            torch._dynamo.config.optimize_ddp = False       # would split each program
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
        """One part of the loss term called `term` as [[total, mass]]; see `LossTerm.forward` and `mean_over_batch`.

        images: (B, 3, H, W) uint8, or float in [0, 1].
        labels: (B, H, W) uint8 class indices of the domain with index `domain`.
        part: as `LossTerm.parts` returns it.
        """
        images = to_float(images).contiguous(memory_format=memory_format(images.device, self.precision))
        with autocast(images.device, self.precision):
            return self.part(images, labels, domain, term, part)

    def part(self, images, labels, domain, term, part):
        """What `forward` returns, for float images in their memory format."""
        value = self.terms[term](self, images, labels, domain, part)
        if isinstance(value, torch.Tensor):
            mass = torch.full_like(value, len(images))
            value = value * mass, mass
        elif isinstance(value, (int, float)):       # such as the sum over no parameters
            raise UserError(f'the loss term {term} is {value}, not a tensor; the copies that DataParallel makes have '
                            'no parameters: use torchrun, or --parallel none')
        return torch.stack(value)[None]


def mean_over_batch(parts, place):
    """(0-d tensor to differentiate here, value over the whole batch) from the parts of all replicas.

    parts: (replicas of this process, 2), totals and masses.

    The value is the sum of totals over the sum of masses, over all processes, and 0 if nothing has mass.
    DDP averages the gradients of processes, so the first result is scaled to give the value's gradient.
    """
    total, mass = parts.sum(0)
    whole, mass = summed(torch.stack([total.detach(), mass.detach()]), place)
    mass = mass + (mass == 0)
    return total * place.world / mass, whole / mass


def optimizer_steps(run):
    """What each optimiser step of a batch differentiates, in order: [[(LossTerm, part, factor), ...], ...].

    There is one step on the sum of the terms, or one on each of them.
    """
    parts = [[(term, *part) for part in term.parts(run)] for term in run.terms]
    if run.options.steps_per_batch == 1:
        # The cross-entropy, the first term, comes last: DDP reduces gradients in the last
        # backward pass, which must reach every weight that trains.
        return [[entry for term in reversed(parts) for entry in term]]
    return parts
