"""Replacing the running statistics of batch norms: re-estimated from images, or copied from another network."""
import torch

from mdil.evaluation.evaluation import logits_of
from mdil.models.multi_domain import batch_norms_of


@torch.inference_mode()
def estimate_statistics(model, number, loader, place, precision='fp32'):
    """Re-estimates the running statistics of the batch norms of the model's domain `number` from images in `loader`.

    The new statistics are the mean over the batches of each norm's batch statistics; no weight
    changes. The loader should give batches as in training: of that size, drawn at random. Shared
    norms change for all domains. Leaves the model in eval mode.
    """
    norms = batch_norms_of([model.single(number)])
    momenta = [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None        # the plain mean over all batches
        norm.training = True
    try:
        for images, *_ in loader:
            logits_of(model, number, images, place, precision)
    finally:
        for norm, momentum in zip(norms, momenta):
            norm.momentum = momentum
        model.eval()


def take_statistics(target, source):
    """Copies the batch-norm statistics of one single-domain view of a network, `source`, to another view, `target`."""
    for norm, other in zip(batch_norms_of([target]), batch_norms_of([source]), strict=True):
        for buffer, value in zip(norm.buffers(), other.buffers()):
            buffer.copy_(value)
