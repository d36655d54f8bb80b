"""Losses: weighted cross-entropy and the two forms of distillation.

Logits are (B, C, H, W) of any float type. Sums are taken in float32, or in float64 for float64 logits.
"""
import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


class SumOverImages(torch.autograd.Function):
    """The sum over images of a loss whose gradient is known in closed form.

    each(number, x), for image `number` with logits x (H*W, C), returns the loss and a function that
    computes its gradient (H*W, C), both in the type `wide` gives. Only one image at a time is copied to
    that type, and only once: the gradient is kept in the logits' own type until backward. Compiled code
    uses the plain formulas instead, which the compiler fuses better.
    """

    @staticmethod
    def forward(ctx, logits, each):
        last = logits.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if last else torch.contiguous_format
        gradient = torch.empty_like(logits, memory_format=layout) if ctx.needs_input_grad[0] else None
        total = 0
        for number, image in enumerate(logits):
            value, slope = each(number, by_pixel(image))
            total = total + value
            if gradient is not None:
                by_pixel(gradient[number]).copy_(slope())
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        return ctx.saved_tensors[0] * upstream, None


def wide(logits):
    """The type in which sums over logits are taken."""
    return torch.promote_types(logits.dtype, torch.float32)


def by_pixel(image):
    """A view (H*W, C) of an image (C, H, W); its rows are contiguous if the image is in channels-last format."""
    return image.flatten(1).T


def cross_entropy_parts(logits, labels, weights):
    """Numerator and denominator of the weighted cross-entropy, scalars.

    labels: (B, H, W) int64 in [0, C).
    weights: (C,) float32, 0 for void.

    Their ratio is what `torch.nn.CrossEntropyLoss(weights)` returns. Kept apart, they can be summed over
    batches.
    """
    if torch.compiler.is_compiling():
        return F.cross_entropy(logits.to(wide(logits)), labels, weights, reduction='none').sum(), weights[labels].sum()
    classes, labels = torch.arange(len(weights), device=labels.device), labels.flatten(1)

    def each(number, x):
        label, log_p = labels[number][:, None], F.log_softmax(x, dim=1, dtype=wide(x))
        weight = weights[label]
        return -(log_p.gather(1, label) * weight).sum(), lambda: (log_p.exp() - (label == classes).float()) * weight

    return SumOverImages.apply(logits, each), weights[labels].sum()


def kl_per_pixel(student, teacher, temperature=1.0):
    """T^2 times the mean over pixels of KL(teacher || student) at temperature T.

    It is 0 where the two agree. No gradient reaches the teacher. Hinton et al., "Distilling the Knowledge
    in a Neural Network", 2015.
    """
    def each(number, x):
        log_p, log_q = (F.log_softmax(logits.to(wide(logits)) / temperature, dim=1)
                        for logits in (x, by_pixel(teacher[number])))
        q = log_q.exp()
        return (q * (log_q - log_p)).sum(), lambda: (log_p.exp() - q) / temperature

    factor = temperature ** 2 / (student.shape[0] * student.shape[2] * student.shape[3])
    if torch.compiler.is_compiling():
        log_p, log_q = (F.log_softmax(logits.to(wide(logits)) / temperature, dim=1)
                        for logits in (student, teacher))
        return F.kl_div(log_p, log_q, reduction='sum', log_target=True) * factor
    return SumOverImages.apply(student, each) * factor


def released_kl(student, teacher, temperature=1.0):
    """The distillation term of the published loops, kept to reproduce them.

    Mean over all B*C*H*W elements of q (log q - p), where p and q are the *probabilities* of student and
    teacher. With p in place of log p, the term is not 0 at p = q. The temperature is always 1.
    """
    p = F.softmax(student.to(wide(student)), dim=1)
    q = F.softmax(teacher.to(wide(teacher)), dim=1)
    return F.kl_div(p, q, reduction='sum') / q.numel()


DISTILLATIONS = {'kl': kl_per_pixel, 'released': released_kl}
