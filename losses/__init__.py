"""Losses: weighted cross-entropy and the two forms of distillation."""
import torch
import torch.nn.functional as F


def cross_entropy_parts(logits, labels, weights):
    """Numerator and denominator of the weighted cross-entropy, float32 scalars.

    logits: (B, C, H, W), any float type; labels: (B, H, W) int64 in [0, C);
    weights: (C,) float32, 0 for void. Their ratio is what
    `torch.nn.CrossEntropyLoss(weights)` gives; kept apart they add up over batches.
    """
    total = F.cross_entropy(logits.float(), labels, weights, reduction='sum')
    return total, weights[labels].sum()


def cross_entropy(logits, labels, weights):
    """Weighted mean cross-entropy (see `cross_entropy_parts`); 0 where all labels are void."""
    total, mass = cross_entropy_parts(logits, labels, weights)
    return total / mass.clamp_min(torch.finfo(torch.float32).tiny)


def kl_per_pixel(student, teacher, temperature=1.0):
    """T^2 times the mean over pixels of KL(teacher || student) at temperature T.

    student, teacher: logits (B, C, H, W). 0 where they agree. Hinton et al.,
    "Distilling the Knowledge in a Neural Network", 2015.
    """
    log_p = F.log_softmax(student.float() / temperature, dim=1)
    log_q = F.log_softmax(teacher.float() / temperature, dim=1)
    pixels = student.shape[0] * student.shape[2] * student.shape[3]
    return F.kl_div(log_p, log_q, reduction='sum', log_target=True) * (temperature ** 2 / pixels)


def released_kl(student, teacher, temperature=1.0):
    """The published loops' distillation term, kept to reproduce them.

    Mean over all B*C*H*W elements of q (log q - p), where p and q are the
    *probabilities* of student and teacher: p stands where log p should, so the term
    is not 0 at p = q. The temperature is always 1.
    """
    p = F.softmax(student.float(), dim=1)
    q = F.softmax(teacher.float(), dim=1)
    return F.kl_div(p, q, reduction='sum') / q.numel()


DISTILLATIONS = {'kl': kl_per_pixel, 'released': released_kl}
