"""Running a network over a split: confusion matrix and loss."""
from dataclasses import dataclass

import torch
from tqdm import tqdm

from losses import cross_entropy_parts
from utils.metrics import confusion, mean_iou
from utils.parallel import summed
from utils.task import autocast, memory_format, to_float


@dataclass
class Score:
    """A network's result on one domain: confusion matrix int64 (C, C) on the CPU, mean loss."""
    matrix: torch.Tensor
    loss: float

    def miou(self, published=False):
        """Mean IoU in percent."""
        return mean_iou(self.matrix, published)


@torch.inference_mode()
def evaluate(model, number, loader, weights, place, precision='fp32', name=''):
    """The Score of `model`'s domain `number` over `loader`, summed over all ranks.

    weights: (C,) cross-entropy weights. The model is left in eval mode.
    """
    model.eval()
    classes = len(weights)
    weights = weights.to(place.device)
    matrix = torch.zeros(classes, classes, dtype=torch.int64, device=place.device)
    loss = torch.zeros(2, dtype=torch.float64, device=place.device)
    for images, labels, _ in tqdm(loader, desc=f'eval {name}', leave=False, disable=None if place.main else True):
        images, labels = images.to(place.device, non_blocking=True), labels.to(place.device, non_blocking=True)
        with autocast(place.device, precision):
            logits = model(to_float(images).contiguous(memory_format=memory_format(precision)), number)
        loss += torch.stack(cross_entropy_parts(logits, labels.long(), weights)).double()
        matrix += confusion(logits.argmax(dim=1), labels, classes)
    summed(matrix, place)
    total, mass = summed(loss, place).tolist()
    return Score(matrix.cpu(), total / mass if mass else 0.0)
