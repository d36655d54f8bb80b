"""The task of a step: student, frozen teacher, losses. The loop knows nothing else."""
import contextlib

import torch
from torch import nn

from losses import DISTILLATIONS, cross_entropy


class Task(nn.Module):
    """Computes the loss parts of a batch; the unit that DataParallel and DDP wrap.

    student: ERFNet that knows all domains. teacher: frozen model of the previous step,
    or None. class_weights: a (C,) tensor for each domain, void 0. The new domain is
    the student's last, the old ones those the teacher knows. distill_domains: how many of
    these, drawn anew for every batch, the distillation term looks at (None: all).
    compiled: whether torch.compile makes one program of both networks and the losses.
    """

    def __init__(self, student, teacher, class_weights, *, distillation='kl', temperature=1.0, lambdac=0.1,
                 teacher_mode='eval', distill_domains=None, precision='fp32', compiled=False):
        super().__init__()
        self.student, self.teacher = student, teacher
        self.distill = DISTILLATIONS[distillation]
        self.temperature, self.lambdac = temperature, lambdac
        self.teacher_mode, self.distill_domains, self.precision = teacher_mode, distill_domains, precision
        if compiled:
            self.losses = torch.compile(self.losses, dynamic=False)
        for number, weights in enumerate(class_weights):
            self.register_buffer(f'weights{number}', weights, persistent=False)

    def train(self, mode=True):
        super().train(mode)
        if self.teacher is not None:
            self.teacher.train(mode and self.teacher_mode == 'train')
        return self

    def forward(self, images, labels, domain, part='loss'):
        """Loss parts of images (B, 3, H, W) uint8 (or float in [0, 1]) and labels (B, H, W) uint8 of `domain`.

        part: 'loss' for both terms, 'ce' or 'kd' for one alone. Returns 0-d tensors
        {'loss', 'ce', 'kd'} (those computed), 'loss' = ce + lambdac * kd being what to
        differentiate.
        """
        images = to_float(images).contiguous(memory_format=memory_format(images.device, self.precision))
        olds = self.draw_old_domains() if part != 'ce' and self.teacher is not None else []
        return self.losses(images, labels, domain, part, olds)

    def draw_old_domains(self):
        """Numbers of the old domains to distil in this batch, the latest first."""
        known = len(self.teacher.decoder)
        drawn = range(known)
        if self.distill_domains is not None and self.distill_domains < known:
            drawn = torch.randperm(known)[:self.distill_domains].tolist()
        return sorted(drawn, reverse=True)

    def losses(self, images, labels, domain, part, olds):
        """What `forward` returns, of float images in their memory format and the old domains `olds`."""
        parts = {}
        with autocast(images.device, self.precision):
            if part != 'kd':
                logits = self.student(images, domain)
                parts['ce'] = cross_entropy(logits, labels.long(), getattr(self, f'weights{domain}'))
            if olds:
                parts['kd'] = self.distillation(images, olds)
        parts['loss'] = parts.get('ce', 0) + self.lambdac * parts.get('kd', 0)
        return parts

    def distillation(self, images, domains):
        """Sum over the old `domains` of the distance to the teacher.

        Scaled by n / K where K of n are given: with domains drawn uniformly its expectation
        is the sum over all n; the draw adds n^2 (1/K - 1/n) S^2 to its variance, S^2 being
        that of the domains' terms among one another.
        """
        total = 0.0
        for domain in domains:
            with torch.no_grad():
                target = self.teacher(images, domain)
            total = total + self.distill(self.student(images, domain), target, self.temperature)
        return total * (len(self.teacher.decoder) / len(domains))


def to_float(images):
    """uint8 [0, 255] -> float32 [0, 1], where the images are; floats pass as they are."""
    return images if images.is_floating_point() else images.float().div_(255)


def memory_format(device, precision):
    """The layout that convolutions run fastest in: channels last, but for float32 on a GPU."""
    contiguous = device.type == 'cuda' and precision == 'fp32'
    return torch.contiguous_format if contiguous else torch.channels_last


def autocast(device, precision):
    """Autocast context of `precision`: 'fp32' (none), 'bf16' or 'fp16'."""
    dtype = {'fp32': None, 'bf16': torch.bfloat16, 'fp16': torch.float16}[precision]
    return torch.autocast(device.type, dtype=dtype) if dtype else contextlib.nullcontext()
