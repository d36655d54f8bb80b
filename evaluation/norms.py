"""The running statistics of batch norms as a cause of forgetting: estimated anew, or taken from another network."""
import torch

from mdil.evaluation.evaluation import logits_of
from mdil.models.multi_domain import batch_norms_of


@torch.inference_mode()
def estimate_statistics(model, number, loader, place, precision='fp32'):
    """Replaces the statistics of the norms that the model's domain `number` uses by those of its images in `loader`.

    The mean over the batches of what each batch norm sees in them, every weight as it is. The
    loader should give batches as in training: of its size, drawn at random. Shared norms are
    changed for all domains. The model is left in eval mode.
    """
    norms = batch_norms_of([model.single(number)])
    momenta = [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None        # the mean over all batches, each counting alike
        norm.training = True
    try:
        for images, *_ in loader:
            logits_of(model, number, images, place, precision)
    finally:
        for norm, momentum in zip(norms, momenta):
            norm.momentum = momentum
        model.eval()


def take_statistics(target, source):
    """Gives the batch norms of one view of a network, `target`, the statistics of those of another view, `source`."""
    for norm, other in zip(batch_norms_of([target]), batch_norms_of([source]), strict=True):
        for buffer, value in zip(norm.buffers(), other.buffers()):
            buffer.copy_(value)
