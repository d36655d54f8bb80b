"""Weights and inputs made by rule from tensor names and seeds, as the reference figures ask."""
import functools
import zlib

import numpy as np
import torch


@functools.cache
def rule(name, shape):
    """The tensor `name` of `shape`, filled by the rule of the reference figures, float32; the same one each time."""
    u = np.random.RandomState(zlib.crc32(name.encode())).rand(int(np.prod(shape)))
    s = 2 * u - 1
    if name.endswith('num_batches_tracked'):
        return torch.zeros(shape, dtype=torch.int64)
    if name.endswith('running_var'):
        values = 0.5 + u
    elif name.endswith('running_mean'):
        values = 0.1 * s
    elif len(shape) == 1:
        values = 0.8 + 0.4 * u if name.endswith('.weight') else 0.1 * s
    else:
        values = s * np.sqrt(3 / np.prod(shape[1:]))
    return torch.tensor(values.reshape(shape), dtype=torch.float32)


def rule_state(shapes):
    """{name: filled tensor} of {name: shape}."""
    return {name: rule(name, tuple(shape)).clone() for name, shape in shapes.items()}


def fill(model):
    """Fills a network by the rule, under its own key names."""
    model.load_state_dict(rule_state({name: value.shape for name, value in model.state_dict().items()}))
    return model


def inputs(seed, batch, height, width, classes):
    """Images (B, 3, H, W) float32 in [0, 1) and labels (B, H, W) int64 of a seed."""
    r = np.random.RandomState(seed)
    images = torch.tensor(r.rand(batch, 3, height, width), dtype=torch.float32)
    return images, torch.tensor(r.randint(0, classes, (batch, height, width)))
