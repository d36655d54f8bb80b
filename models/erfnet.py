"""ERFNet, a plain network of one domain, with optional adapters in its encoder.

The architecture is ERFNet (Romera et al., "ERFNet: Efficient Residual Factorized ConvNet for Real-time
Semantic Segmentation", T-ITS 2018). The adapters are those of Garg et al., "Multi-Domain Incremental
Learning for Semantic Segmentation", WACV 2022: 1x1 convolutions parallel to the factorised pairs.
`models.multi_domain` lets several domains share the convolutions.
"""
import torch
import torch.nn.functional as F
from torch import nn

ADAPTERS = (None, 'parallel', 'series')


class Adapter(nn.Conv2d):
    """A 1x1 convolution with bias that belongs to its domain; keeps the shape (B, channels, H, W)."""
    per_domain = True

    def __init__(self, channels):
        super().__init__(channels, channels, 1)


def batch_norm(channels):
    return nn.BatchNorm2d(channels, eps=1e-3)


def conv_pair(channels, dilation):
    """The factorised 3x3 convolution: 3x1, then 1x3. The caller applies the ReLU between them."""
    return (nn.Conv2d(channels, channels, (3, 1), padding=(dilation, 0), dilation=(dilation, 1)),
            nn.Conv2d(channels, channels, (1, 3), padding=(0, dilation), dilation=(1, dilation)))


def conv_bn(bn, conv, x, *more):
    """bn(conv(x) + c(y) + ...) for the pairs (c, y) in `more`.

    A frozen batch norm is folded: it scales the convolutions' weights instead of their outputs. The
    function is the same, without a pass over the activations.
    """
    folded = not bn.training and bn.track_running_stats
    scale = bn.weight * torch.rsqrt(bn.running_var + bn.eps) if folded else None
    out = scaled_conv(conv, x, scale, bn.bias - bn.running_mean * scale) if folded else conv(x)
    for c, y in more:
        out += scaled_conv(c, y, scale) if folded else c(y)
    return out if folded else bn(out)


def scaled_conv(conv, x, scale, shift=0):
    """scale * conv(x) + shift in one convolution, transposed or not; scale (C,), shift (C,) or 0."""
    bias = conv.bias * scale + shift
    if isinstance(conv, nn.ConvTranspose2d):
        return F.conv_transpose2d(x, conv.weight * scale[:, None, None], bias, conv.stride, conv.padding,
                                  conv.output_padding)
    return F.conv2d(x, conv.weight * scale[:, None, None, None], bias, conv.stride, conv.padding, conv.dilation)


class Downsampler(nn.Module):
    """(B, in_channels, H, W) -> (B, out_channels, H/2, W/2): strided 3x3 and max pooling."""

    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels - in_channels, 3, stride=2, padding=1)
        self.bn = batch_norm(out_channels)

    def forward(self, x):
        y = self.conv(x)        # under autocast, of lower precision than the images
        y = torch.cat([y, F.max_pool2d(x, 2).to(y.dtype)], dim=1)
        return F.relu_(self.bn(y))


class EncoderBlock(nn.Module):
    """Non-bottleneck-1D block; keeps the shape (B, C, H, W).

    adapter: None, or 'parallel' to each convolution pair, or in 'series' after it.
    """

    def __init__(self, channels, dropout, dilation, adapter=None):
        super().__init__()
        self.adapter = adapter
        self.conv3x1_1, self.conv1x3_1 = conv_pair(channels, 1)
        self.conv3x1_2, self.conv1x3_2 = conv_pair(channels, dilation)
        self.bn1, self.bn2 = batch_norm(channels), batch_norm(channels)
        self.dropout = nn.Dropout2d(dropout)
        if adapter:
            self.add_module(f'{adapter}_conv_1', Adapter(channels))
            self.add_module(f'{adapter}_conv_2', Adapter(channels))

    def pair(self, x, which):
        """Applies convolution pair `which` (1 or 2) to x, with its adapter and batch norm."""
        children = self._modules
        bn, adapter = children[f'bn{which}'], children.get(f'{self.adapter}_conv_{which}')
        y, conv = F.relu_(children[f'conv3x1_{which}'](x)), children[f'conv1x3_{which}']
        if self.adapter == 'series':
            y = conv(y)
            return bn(y + adapter(y))
        return conv_bn(bn, conv, y, *([(adapter, x)] if adapter else []))

    def forward(self, x):
        y = self.pair(F.relu_(self.pair(x, 1)), 2)
        return F.relu_(self.dropout(y).add_(x))


class DecoderBlock(nn.Module):
    """Plain non-bottleneck-1D block, no dilation, no dropout."""

    def __init__(self, channels):
        super().__init__()
        self.conv3x1_1, self.conv1x3_1 = conv_pair(channels, 1)
        self.bn1 = batch_norm(channels)
        self.conv3x1_2, self.conv1x3_2 = conv_pair(channels, 1)
        self.bn2 = batch_norm(channels)

    def forward(self, x):
        y = F.relu_(conv_bn(self.bn1, self.conv1x3_1, F.relu_(self.conv3x1_1(x))))
        y = conv_bn(self.bn2, self.conv1x3_2, F.relu_(self.conv3x1_2(y)))
        return F.relu_(y.add_(x))


class Upsampler(nn.Module):
    """(B, in_channels, H, W) -> (B, out_channels, 2H, 2W)."""

    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.conv = nn.ConvTranspose2d(in_channels, out_channels, 3, stride=2, padding=1, output_padding=1)
        self.bn = batch_norm(out_channels)

    def forward(self, x):
        return F.relu_(conv_bn(self.bn, self.conv, x))


class Encoder(nn.Module):
    """(B, 3, H, W) -> (B, 128, H/8, W/8)."""

    def __init__(self, adapter=None):
        super().__init__()
        self.initial_block = Downsampler(3, 16)
        self.layers = nn.ModuleList(
            [Downsampler(16, 64)]
            + [EncoderBlock(64, 0.03, 1, adapter) for _ in range(5)]
            + [Downsampler(64, 128)]
            + [EncoderBlock(128, 0.3, dilation, adapter) for dilation in (2, 4, 8, 16) * 2])

    def forward(self, x):
        x = self.initial_block(x)
        for layer in self.layers:
            x = layer(x)
        return x


class Decoder(nn.Module):
    """(B, 128, H/8, W/8) -> logits (B, num_classes, H, W)."""

    def __init__(self, num_classes):
        super().__init__()
        self.layers = nn.ModuleList([
            Upsampler(128, 64), DecoderBlock(64), DecoderBlock(64),
            Upsampler(64, 16), DecoderBlock(16), DecoderBlock(16)])
        self.output_conv = nn.ConvTranspose2d(16, num_classes, 2, stride=2)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.output_conv(x)


class ERFNet(nn.Module):
    """Segmentation network of one domain.

    num_classes: void included.
    adapter: None, 'parallel' (added to each convolution pair of the encoder) or 'series' (after it).
    """
    heads = ('decoder',)
    output_layers = ('decoder.output_conv',)

    def __init__(self, num_classes, adapter=None):
        super().__init__()
        if adapter not in ADAPTERS:
            raise ValueError(f'adapter {adapter!r} is not one of {ADAPTERS}')
        if num_classes < 2:
            raise ValueError(f'num_classes must be at least 2, not {num_classes}')
        self.encoder = Encoder(adapter)
        self.decoder = Decoder(num_classes)

    def forward(self, images):
        """Logits (B, num_classes, H, W) of images (B, 3, H, W), floats in [0, 1]; H and W are multiples of 8."""
        if images.shape[-2] % 8 or images.shape[-1] % 8:
            raise ValueError(f'image sides must be multiples of 8, not {tuple(images.shape[-2:])}')
        return self.decoder(self.encoder(images))
