"""Augmentation: horizontal flip and a shift of up to 2 pixels in each direction, drawn as published.

It works on uint8 tensors on any device. Its random numbers depend only on (seed, epoch, index), so neither
the number of workers nor the device changes a result.
"""
from typing import NamedTuple

import numpy as np
import torch

MAX_SHIFT = 2


class Draw(NamedTuple):
    """One sample's random numbers: whether to flip, and the shift in pixels, right and down."""
    flip: bool
    right: int
    down: int


def draw(seed, epoch, index):
    """The Draw of sample `index` in `epoch`."""
    random = np.random.default_rng((seed, epoch, index))
    right, down = random.integers(-MAX_SHIFT, MAX_SHIFT + 1, size=2)
    return Draw(bool(random.random() < 0.5), int(right), int(down))


def augment(image, label, drawn, void, padding='void'):
    """Flips and shifts image (3, H, W) and label (H, W), uint8; uncovered pixels are 0 and `void`.

    padding: 'void', or 'released'. The latter labels what a shift to the left or up uncovers, on the right
        and at the bottom, as class 0, as the published loops do.
    """
    return (moved(image, drawn, torch.full_like(image, 0)),
            moved(label, drawn, pad(torch.full_like(label, void), drawn, padding)))


def augment_batch(images, labels, draws, void, padding='void'):
    """Flips and shifts images (B, 3, H, W) and labels (B, H, W), uint8, on their device.

    draws: B Draws.

    The result equals `augment` sample by sample. Samples are copied into the batch one by one, without
    index tensors, so nothing waits for the device.
    """
    out_images, out_labels = torch.full_like(images, 0), torch.full_like(labels, void)
    for number, drawn in enumerate(draws):
        moved(images[number], drawn, out_images[number])
        moved(labels[number], drawn, pad(out_labels[number], drawn, padding))
    return out_images, out_labels


def pad(out, drawn, padding):
    """Writes 0 into `out` (H, W), all void, where `padding` labels uncovered pixels as class 0; returns it."""
    if padding == 'released':
        height, width = out.shape
        out[height + min(drawn.down, 0):] = 0
        out[:, width + min(drawn.right, 0):] = 0
    return out


def moved(x, drawn, out):
    """Writes x (..., H, W), flipped and then shifted right and down as drawn, into `out`; returns it."""
    height, width = x.shape[-2:]
    right, down = drawn.right, drawn.down
    rows, columns = height - abs(down), width - abs(right)
    x = x.flip(-1) if drawn.flip else x
    out[..., max(down, 0):max(down, 0) + rows, max(right, 0):max(right, 0) + columns] = \
        x[..., max(-down, 0):max(-down, 0) + rows, max(-right, 0):max(-right, 0) + columns]
    return out
