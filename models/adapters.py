"""Adapters for the convolutions of any network: 1x1 convolutions that belong to a domain.

Garg et al., WACV 2022, add theirs to the convolution pairs of ERFNet (`models.erfnet`). These are added to
the spatial convolutions of any encoder and have the same groups. They start at zero, so adding them does
not change what the network computes.
"""
from torch import nn

from mdil.models.multi_domain import outside_heads
from mdil.utils.errors import UserError


class Adapter(nn.Conv2d):
    """A 1x1 convolution that belongs to its domain and starts at zero. With stride n, it reads every n-th pixel.

    It strides by slicing: in torch 2.14, the backward pass of some strided 1x1 convolutions, such as
    3 -> 16 channels, crashes on CPUs with channels last.
    """
    per_domain = True

    def __init__(self, inputs, outputs, stride, groups):
        super().__init__(inputs, outputs, 1, groups=groups)
        self.every = stride

    def reset_parameters(self):
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x):
        down, right = self.every
        return super().forward(x[..., ::down, ::right])


class Adapted(nn.Module):
    """A convolution with an adapter parallel to it ('parallel') or after it ('series')."""

    def __init__(self, conv, kind):
        super().__init__()
        self.kind, self.conv = kind, conv
        inputs, stride = (conv.in_channels, conv.stride) if kind == 'parallel' else (conv.out_channels, (1, 1))
        self.adapter = Adapter(inputs, conv.out_channels, stride, conv.groups)

    def forward(self, x):
        y = self.conv(x)
        return y + self.adapter(x if self.kind == 'parallel' else y)


def takes_adapter(module):
    """Whether `module` is a convolution over several pixels that an adapter fits.

    It must be padded so that a 1x1 convolution with its stride has an output of the same size.
    """
    if not isinstance(module, nn.Conv2d) or max(module.kernel_size) == 1:
        return False
    return module.padding == 'same' or all(2 * padding == dilation * (size - 1) for padding, dilation, size
                                           in zip(module.padding, module.dilation, module.kernel_size))


def with_adapters(network, kind):
    """`network` with an adapter at each fitting convolution outside its heads; kind: 'parallel', 'series' or None."""
    found = [(name, module) for name, module in outside_heads(network) if takes_adapter(module)] if kind else []
    if kind and not found:
        raise UserError(f'{type(network).__name__} has no convolution that an adapter fits: choose a method without '
                        'adapters, such as fine-tune')
    for name, conv in found:
        parent, _, child = name.rpartition('.')
        setattr(network.get_submodule(parent), child, Adapted(conv, kind))
    return network
