"""Segmentation metrics from confusion matrices, and metrics of a sequence of steps."""
import torch


def confusion(prediction, labels, num_classes, truths=None):
    """Confusion matrix int64 (T, C) on the tensors' device; rows are truth, columns prediction.

    prediction, labels: integer tensors of the same shape with values in [0, C) and [0, T).
    num_classes: C; truths: T, by default C.
    """
    truths = truths or num_classes
    index = labels.long().flatten() * num_classes + prediction.long().flatten()
    return torch.bincount(index, minlength=truths * num_classes).view(truths, num_classes)


def fold(matrix, truths, answers):
    """A confusion matrix (T, C) translated to another label space, int64 (N, N).

    truths, answers: index in that space of each row and of each column; the largest, N - 1, is void.
    """
    size = max(*truths, *answers) + 1
    index = torch.tensor(truths)[:, None] * size + torch.tensor(answers)
    folded = torch.zeros(size * size, dtype=matrix.dtype)
    return folded.index_add_(0, index.flatten(), matrix.flatten()).view(size, size)


def iou_per_class(matrix, published=False):
    """IoU in [0, 1] of each non-void class, float64 (C-1,), from a confusion matrix (C, C).

    Void is the last class. Its pixels never count, whatever is predicted there; void predicted
    elsewhere is a miss. A class absent from truth and prediction is NaN, or 0 if `published`.
    """
    counted = matrix[:-1].double()
    hit = counted.diagonal()
    union = counted.sum(dim=1) + counted.sum(dim=0)[:-1] - hit
    iou = hit / union
    return torch.where(union > 0, iou, 0.0) if published else iou


def mean_iou(matrix, published=False):
    """Mean IoU in percent over the non-void classes (see `iou_per_class`)."""
    return 100 * iou_per_class(matrix, published).nanmean().item()


def pixel_accuracy(matrix):
    """Percent of the non-void pixels that are predicted correctly."""
    counted = matrix[:-1].double()
    return 100 * (counted.diagonal().sum() / counted.sum()).item()


def forgetting(steps):
    """{domain: best earlier mIoU minus the last mIoU} of the domains that the last step but one already knew.

    steps: list of {domain: mIoU} after each step. Chaudhry et al., "Riemannian Walk", ECCV 2018.
    """
    last = steps[-1]
    return {name: max(step[name] for step in steps[:-1] if name in step) - last[name]
            for name in last if name in steps[-2]} if len(steps) > 1 else {}


def learnt_at(steps):
    """{domain: mIoU right after the step that learnt it}."""
    return {name: next(step[name] for step in steps if name in step) for name in steps[-1]}


def backward_transfer(steps):
    """Mean over the earlier domains of last mIoU minus mIoU when learnt; None with a single step.

    Lopez-Paz and Ranzato, "Gradient Episodic Memory", NeurIPS 2017.
    """
    first = learnt_at(steps)
    changes = [steps[-1][name] - first[name] for name in (steps[-2] if len(steps) > 1 else {})]
    return sum(changes) / len(changes) if changes else None


def forward_transfer(steps, single):
    """Mean over the later domains of mIoU when learnt minus single-task mIoU; None if no single-task mIoU is known."""
    first = learnt_at(steps)
    gains = [first[name] - single[name] for name in list(first)[1:] if name in single]
    return sum(gains) / len(gains) if gains else None


def delta_m(miou, single):
    """Delta_m%: mean over domains of 100 (mIoU - single-task mIoU) / single-task mIoU; None if any is unknown.

    Vandenhende et al., "Multi-Task Learning for Dense Prediction Tasks", TPAMI 2021.
    """
    if not all(single.get(name) for name in miou):
        return None
    return sum(100 * (miou[name] - single[name]) / single[name] for name in miou) / len(miou)


def summary(steps, single):
    """All metrics of a sequence, from [{domain: mIoU} after each step] and {domain: single-task mIoU}."""
    return {'forgetting': forgetting(steps), 'backward_transfer': backward_transfer(steps),
            'forward_transfer': forward_transfer(steps, single), 'delta_m': delta_m(steps[-1], single),
            'single_task': single}
