"""ERFNet whose encoder carries a small branch of its own for every domain.

The architecture is ERFNet (Romera et al., "ERFNet: Efficient Residual Factorized
ConvNet for Real-time Semantic Segmentation", T-ITS 2018). The branches are those
of Garg et al., "Multi-Domain Incremental Learning for Semantic Segmentation",
WACV 2022: 1x1 convolutions beside the factorised pairs, batch norms, a decoder.

A tensor of the state dict belongs to one domain exactly when it lies in a
`PerDomain` list; everything else is shared.
"""
import copy

import torch
import torch.nn.functional as F
from torch import nn

ADAPTERS = (None, 'parallel', 'series')
OLD_BN = ('frozen', 'batch', 'released')


class PerDomain(nn.ModuleList):
    """One module for each domain: `modules[domain]`."""


class Shared(nn.ModuleList):
    """One module for all domains, so that callers index it as they do `PerDomain`."""

    def __getitem__(self, domain):
        return super().__getitem__(0)


def batch_norms(channels, domains, own):
    """Batch norms of `channels`: one for each of `domains` if `own`, else a shared one."""
    make = lambda: nn.BatchNorm2d(channels, eps=1e-3)
    return PerDomain(make() for _ in range(domains)) if own else Shared([make()])


def adapters(channels, domains):
    """A 1x1 convolution with bias for each domain."""
    return PerDomain(nn.Conv2d(channels, channels, 1) for _ in range(domains))


def conv_pair(channels, dilation):
    """The factorised 3x3 convolution: 3x1, then 1x3 (ReLU between them is the caller's)."""
    return (nn.Conv2d(channels, channels, (3, 1), padding=(dilation, 0), dilation=(dilation, 1)),
            nn.Conv2d(channels, channels, (1, 3), padding=(0, dilation), dilation=(1, dilation)))


def normalised(bn, conv, x, *more):
    """bn(conv(x) + c(y) + ...) for the pairs (c, y) of `more`.

    A batch norm that stands still scales the convolutions' weights instead of what they
    give: the same function, without its pass over the activations.
    """
    still = not bn.training and bn.track_running_stats
    scale = bn.weight * torch.rsqrt(bn.running_var + bn.eps) if still else None
    out = scaled(conv, x, scale, bn.bias - bn.running_mean * scale) if still else conv(x)
    for c, y in more:
        out += scaled(c, y, scale) if still else c(y)
    return out if still else bn(out)


def scaled(conv, x, scale, shift=0):
    """scale * conv(x) + shift in one convolution, transposed or not; scale (C,), shift (C,) or 0."""
    bias = conv.bias * scale + shift
    if isinstance(conv, nn.ConvTranspose2d):
        return F.conv_transpose2d(x, conv.weight * scale[:, None, None], bias, conv.stride, conv.padding,
                                  conv.output_padding)
    return F.conv2d(x, conv.weight * scale[:, None, None, None], bias, conv.stride, conv.padding, conv.dilation)


class Downsampler(nn.Module):
    """(B, in_channels, H, W) -> (B, out_channels, H/2, W/2): strided 3x3 beside max pooling."""

    def __init__(self, in_channels, out_channels, domains, domain_bn):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels - in_channels, 3, stride=2, padding=1)
        self.bn_ini = batch_norms(out_channels, domains, domain_bn)

    def forward(self, x, domain):
        y = self.conv(x)        # of lower precision than the images, under autocast
        y = torch.cat([y, F.max_pool2d(x, 2).to(y.dtype)], dim=1)
        return F.relu_(self.bn_ini[domain](y))


class EncoderBlock(nn.Module):
    """Non-bottleneck-1D block with an adapter and batch norms per domain, (B, C, H, W) kept.

    Dropout is active exactly while the branch's last batch norm trains (and `drops` says
    so), so that a frozen branch is deterministic although its convolutions are shared.
    """

    def __init__(self, channels, dropout, dilation, domains, adapter, domain_bn):
        super().__init__()
        self.adapter, self.dropout, self.drops = adapter, dropout, True
        self.conv3x1_1, self.conv1x3_1 = conv_pair(channels, 1)
        self.conv3x1_2, self.conv1x3_2 = conv_pair(channels, dilation)
        self.bns_1 = batch_norms(channels, domains, domain_bn)
        self.bns_2 = batch_norms(channels, domains, domain_bn)
        if adapter:
            self.add_module(f'{adapter}_conv_1', adapters(channels, domains))
            self.add_module(f'{adapter}_conv_2', adapters(channels, domains))

    def adapted(self, x, number, domain):
        """The pair `number` (1 or 2) of `x`, with the domain's adapter added, after its BN."""
        children, bn = self._modules, getattr(self, f'bns_{number}')[domain]
        adapter = children[f'{self.adapter}_conv_{number}'][domain] if self.adapter else None
        y, conv = F.relu_(children[f'conv3x1_{number}'](x)), children[f'conv1x3_{number}']
        if self.adapter == 'series':
            y = conv(y)
            return bn(y + adapter(y))
        return normalised(bn, conv, y, *([(adapter, x)] if adapter else []))

    def forward(self, x, domain):
        y = F.relu_(self.adapted(x, 1, domain))
        y = self.adapted(y, 2, domain)
        y = F.dropout2d(y, self.dropout, training=self.drops and self.bns_2[domain].training)
        return F.relu_(y.add_(x))


class DecoderBlock(nn.Module):
    """Plain non-bottleneck-1D block, no dilation, no dropout."""

    def __init__(self, channels):
        super().__init__()
        self.conv3x1_1, self.conv1x3_1 = conv_pair(channels, 1)
        self.bn1 = nn.BatchNorm2d(channels, eps=1e-3)
        self.conv3x1_2, self.conv1x3_2 = conv_pair(channels, 1)
        self.bn2 = nn.BatchNorm2d(channels, eps=1e-3)

    def forward(self, x):
        y = F.relu_(normalised(self.bn1, self.conv1x3_1, F.relu_(self.conv3x1_1(x))))
        y = normalised(self.bn2, self.conv1x3_2, F.relu_(self.conv3x1_2(y)))
        return F.relu_(y.add_(x))


class Upsampler(nn.Module):
    """(B, in_channels, H, W) -> (B, out_channels, 2H, 2W)."""

    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.conv = nn.ConvTranspose2d(in_channels, out_channels, 3, stride=2, padding=1, output_padding=1)
        self.bn = nn.BatchNorm2d(out_channels, eps=1e-3)

    def forward(self, x):
        return F.relu_(normalised(self.bn, self.conv, x))


class Encoder(nn.Module):
    """(B, 3, H, W) -> (B, 128, H/8, W/8)."""

    def __init__(self, domains, adapter, domain_bn):
        super().__init__()

        def block(channels, dropout, dilation):
            return EncoderBlock(channels, dropout, dilation, domains, adapter, domain_bn)

        self.initial_block = Downsampler(3, 16, domains, domain_bn)
        self.layers = nn.ModuleList(
            [Downsampler(16, 64, domains, domain_bn)]
            + [block(64, 0.03, 1) for _ in range(5)]
            + [Downsampler(64, 128, domains, domain_bn)]
            + [block(128, 0.3, dilation) for dilation in (2, 4, 8, 16) * 2])

    def forward(self, x, domain):
        x = self.initial_block(x, domain)
        for layer in self.layers:
            x = layer(x, domain)
        return x


class Decoder(nn.Module):
    """(B, 128, H/8, W/8) -> logits (B, num_classes, H, W)."""

    def __init__(self, num_classes):
        super().__init__()
        self.layers = nn.ModuleList([
            Upsampler(128, 64), DecoderBlock(64), DecoderBlock(64),
            Upsampler(64, 16), DecoderBlock(16), DecoderBlock(16)])
        self.output_conv = output_layer(num_classes)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.output_conv(x)


def output_layer(num_classes):
    return nn.ConvTranspose2d(16, num_classes, 2, stride=2)


class ERFNet(nn.Module):
    """Segmentation network for one or more domains.

    num_classes: classes of each domain, void included, in the order learnt.
    adapter: None, 'parallel' (added beside each convolution pair) or 'series' (after it).
    domain_bn: whether every domain has batch norms of its own in the encoder.
    """

    def __init__(self, num_classes, adapter='parallel', domain_bn=True):
        super().__init__()
        if adapter not in ADAPTERS:
            raise ValueError(f'adapter {adapter!r} is not one of {ADAPTERS}')
        if not num_classes or any(count < 2 for count in num_classes):
            raise ValueError(f'num_classes must hold at least 2 for every domain, not {num_classes}')
        self.encoder = Encoder(len(num_classes), adapter, domain_bn)
        self.decoder = PerDomain(Decoder(count) for count in num_classes)
        self.still = ()      # modules that stay in eval mode while the network trains

    @property
    def num_classes(self):
        """Classes of each domain, void included."""
        return [decoder.output_conv.out_channels for decoder in self.decoder]

    def forward(self, images, domain=0):
        """Logits (B, classes of `domain`, H, W) of images (B, 3, H, W), floats in [0, 1].

        H and W are multiples of 8. Raises IndexError for a domain that the network lacks.
        """
        if not 0 <= domain < len(self.decoder):
            raise IndexError(f'domain {domain} asked of a network that knows {len(self.decoder)}')
        if images.shape[-2] % 8 or images.shape[-1] % 8:
            raise ValueError(f'image sides must be multiples of 8, not {tuple(images.shape[-2:])}')
        return self.decoder[domain](self.encoder(images, domain))

    def branch(self, domain):
        """The modules that belong to `domain` alone."""
        return [module[domain] for module in self.modules() if isinstance(module, PerDomain)]

    def branch_parameters(self, domain):
        """The parameters that belong to `domain` alone."""
        return [parameter for module in self.branch(domain) for parameter in module.parameters()]

    def shared_parameters(self):
        """The parameters that all domains use."""
        own = {id(p) for domain in range(len(self.decoder)) for p in self.branch_parameters(domain)}
        return [parameter for parameter in self.parameters() if id(parameter) not in own]

    def add_domain(self, num_classes, statistics='copied'):
        """Appends a domain whose branch copies the last one's, but for a fresh output layer.

        statistics: 'copied', or 'fresh' to start the encoder's running statistics of the
        new branch at mean 0 and variance 1. Returns the index of the new domain.
        """
        for module in list(self.modules()):
            if isinstance(module, PerDomain):
                module.append(copy.deepcopy(module[-1]))
        new = len(self.decoder) - 1
        reference = self.decoder[new].output_conv.weight
        self.decoder[new].output_conv = output_layer(num_classes).to(reference.device, reference.dtype)
        if statistics == 'fresh':
            for module in self.encoder.modules():
                if isinstance(module, PerDomain) and isinstance(module[new], nn.BatchNorm2d):
                    module[new].reset_running_stats()
        return new

    def train_only(self, domains, shared=True, old_bn='frozen', dropout=True):
        """Freezes all but the branches of `domains` and, if `shared`, the shared weights.

        Frozen covers batch-norm statistics: the modules stay in eval mode whatever
        `train()` says. `old_bn` loosens that for the other domains' branches:
        'batch' normalises by batch statistics without keeping them, 'released' lets
        them run and overwrite the buffers, as the published loops do. Dropout of a
        branch follows its batch norms; `dropout` says whether there is any.
        """
        if old_bn not in OLD_BN:
            raise ValueError(f'old_bn {old_bn!r} is not one of {OLD_BN}')
        others = [d for d in range(len(self.decoder)) if d not in domains]
        for parameter in self.parameters():
            parameter.requires_grad_(False)
        active = [p for d in domains for p in self.branch_parameters(d)]
        for parameter in active + (self.shared_parameters() if shared else []):
            parameter.requires_grad_(True)
        old = [module for d in others for module in self.branch(d)]
        for bn in batch_norms_of(old):
            bn.track_running_stats = old_bn != 'batch'
        still = old if old_bn == 'frozen' else []
        if not shared:
            still = still + [module for module in self.modules() if isinstance(module, Shared)]
        self.still = tuple(still)
        for module in self.modules():
            if isinstance(module, EncoderBlock):
                module.drops = dropout
        return self

    def train(self, mode=True):
        super().train(mode)
        for module in self.still:
            module.train(False)
        return self


def batch_norms_of(modules):
    """All batch norms within `modules`, synchronised ones too."""
    return [m for module in modules for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
