"""Augmentation as published: horizontal flip and a shift of up to 2 pixels either way.

It works on uint8 tensors and takes its random numbers from (seed, epoch, index), so
neither the number of workers nor the device changes a result.
"""
from dataclasses import dataclass

import numpy as np
import torch

MAX_SHIFT = 2


@dataclass(frozen=True)
class Draw:
    """One sample's random numbers: whether to flip, and the shift in pixels, right and down."""
    flip: bool
    right: int
    down: int


def draw(seed, epoch, index):
    """The Draw of sample `index` in `epoch`."""
    random = np.random.default_rng((seed, epoch, index))
    right, down = random.integers(-MAX_SHIFT, MAX_SHIFT + 1, size=2)
    return Draw(bool(random.random() < 0.5), int(right), int(down))


def augment(image, label, drawn, void):
    """Flips and shifts image (3, H, W) and label (H, W), uint8; uncovered pixels are 0 and `void`."""
    if drawn.flip:
        image, label = image.flip(-1), label.flip(-1)
    return shift(image, drawn, 0), shift(label, drawn, void)


def shift(x, drawn, fill):
    """Moves x (..., H, W) right and down by the drawn pixels, filling what is uncovered."""
    height, width = x.shape[-2:]
    right, down = drawn.right, drawn.down
    out = torch.full_like(x, fill)
    rows, columns = height - abs(down), width - abs(right)
    out[..., max(down, 0):max(down, 0) + rows, max(right, 0):max(right, 0) + columns] = \
        x[..., max(-down, 0):max(-down, 0) + rows, max(-right, 0):max(-right, 0) + columns]
    return out
