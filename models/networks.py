"""The networks, one declaration each. Other code asks for a network's name only for features of ERFNet alone.

Any file can add one to NETWORKS (docs/networks.md):

    NETWORKS['small'] = Network('three convolutions',
                                lambda classes, adapter: with_adapters(SmallNet(classes), adapter))
"""
from dataclasses import dataclass
from typing import Callable

import torch
from torch import nn
from torch.nn.functional import interpolate
from torch.nn.modules.batchnorm import _BatchNorm

from mdil.models.adapters import with_adapters
from mdil.models.erfnet import ERFNet
from mdil.models.multi_domain import outside_heads
from mdil.utils.errors import UserError, brief

DEFAULT = 'erfnet'
MOMENTUM = 0.1
TIMM = 'timm:'      # prefix of the names of timm's encoders
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)      # of ImageNet's images, by channel
ENCODER = ('no weights of ERFNet can be downloaded: trained_models/erfnet_encoder_pretrained.pth.tar of '
           'github.com/Eromera/erfnet_pytorch is its ImageNet encoder; pass that file')


@dataclass(frozen=True)
class Network:
    """One declaration.

    about: a description in words.
    build: called with the number of classes, void included, and the kind of adapters (None, 'parallel',
        'series'). Returns a plain network of one domain, as `models.multi_domain` needs it, with random
        weights.
    imagenet: called without arguments. Returns the state dict of ImageNet-trained weights; None if there
        are none.
    layouts: possible names of the encoder's tensors in files of weights, each {prefix in the file: prefix
        in the plain network}. The one that fits most tensors is used.
    """
    about: str
    build: Callable
    imagenet: Callable = None
    layouts: tuple = ({'': ''},)


class Scaling(nn.Module):
    """(images - mean) / deviation by channel. Both are saved with the network."""

    def __init__(self, mean, deviation):
        super().__init__()
        self.register_buffer('mean', torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer('deviation', torch.tensor(deviation).view(-1, 1, 1))

    def forward(self, images):
        return (images - self.mean) / self.deviation


def with_momentum(network):
    """`network` with torch's default momentum in its batch norms.

    MobileNets use 0.01, meant for ImageNet's long training: after 150 batches, a fifth of the initial
    running statistics would be left.
    """
    for module in network.modules():
        if isinstance(module, _BatchNorm):
            module.momentum = MOMENTUM
    return network


class TorchvisionNet(nn.Module):
    """A segmentation network of torchvision with ImageNet's scaling; output_layers: names within its head."""
    heads = ('net.classifier',)

    def __init__(self, name, num_classes, output_layers):
        from torchvision.models import get_model
        super().__init__()
        self.scaling = Scaling(MEAN, DEVIATION)
        self.net = with_momentum(get_model(name, weights=None, weights_backbone=None, num_classes=num_classes))
        self.output_layers = tuple(f'net.classifier.{layer}' for layer in output_layers)

    def forward(self, images):
        """Logits (B, num_classes, H, W) of images (B, 3, H, W), floats in [0, 1]."""
        return self.net(self.scaling(images))['out']


class Decoder(nn.Module):
    """Logits at the size of the finest of several feature maps, which are given from fine to coarse.

    All maps are projected to `width` channels, summed from coarse to fine, and smoothed.
    """

    def __init__(self, channels, num_classes, width=128):
        super().__init__()
        self.lateral = nn.ModuleList([nn.Conv2d(count, width, 1) for count in channels])
        self.smooth = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.classes = nn.Conv2d(width, num_classes, 1)

    def forward(self, maps):
        *finer, total = (lateral(x) for lateral, x in zip(self.lateral, maps))
        for x in reversed(finer):
            total = x + interpolate(total, x.shape[-2:], mode='bilinear', align_corners=False)
        return self.classes(self.smooth(total))


class TimmNet(nn.Module):
    """An encoder of timm with its own scaling, and a small decoder on its last three scales."""
    heads, output_layers = ('decoder',), ('decoder.classes',)

    def __init__(self, name, num_classes):
        timm = needed_timm()
        super().__init__()
        self.encoder = with_momentum(timm.create_model(name, features_only=True))
        settings = self.encoder.pretrained_cfg
        self.scaling = Scaling(settings['mean'], settings['std'])
        self.decoder = Decoder(self.encoder.feature_info.channels()[-3:], num_classes)

    def forward(self, images):
        """Logits (B, num_classes, H, W) of images (B, 3, H, W), floats in [0, 1]."""
        logits = self.decoder(self.encoder(self.scaling(images))[-3:])
        return interpolate(logits, images.shape[-2:], mode='bilinear', align_corners=False)


def needed_timm():
    """The module timm; UserError if it is not installed."""
    try:
        import timm
    except ImportError:
        raise UserError(f'networks called {TIMM}NAME need the package timm: pip install timm') from None
    return timm


def from_torchvision(name, output_layers, about):
    """The Network of a torchvision segmentation network."""
    backbone = name.partition('_')[2]

    def build(num_classes, adapter):
        return with_adapters(TorchvisionNet(name, num_classes, output_layers), adapter)

    def imagenet():
        from torchvision.models import get_model_weights
        # The ones that torchvision's own segmentation networks were trained from.
        return downloaded(get_model_weights(backbone).IMAGENET1K_V1)

    encoder = 'net.backbone.'
    return Network(about, build, imagenet, ({'backbone.': encoder, 'classifier.': 'net.classifier.'},
                                            {'features.': encoder}, {'': encoder}))


def downloaded(weights):
    """The state dict of an entry of torchvision's weights, from torch.hub's folder or else downloaded to it."""
    try:
        return weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:
        folder = f'{torch.hub.get_dir()}/checkpoints'
        raise UserError(f'{weights.url} could not be downloaded ({brief(error, 100)}); '
                        f'download it elsewhere and put {weights.url.rpartition("/")[2]} into {folder}, '
                        'or pass it as --weights FILE') from None


def from_timm(name):
    """The Network of an encoder of timm; UserError if timm has no such encoder or it returns no feature maps."""
    timm = needed_timm()
    if not timm.is_model(name):
        raise UserError(f'timm has no encoder {name!r}; python -c "import timm; print(timm.list_models())" lists them')

    def build(num_classes, adapter):
        try:
            network = TimmNet(name, num_classes)
        except (RuntimeError, AttributeError, TypeError, AssertionError) as error:
            raise UserError(f"timm's {name} returns no feature maps at several scales ({brief(error, 100)})") from None
        return with_adapters(network, adapter)

    def imagenet():
        try:
            return timm.create_model(name, features_only=True, pretrained=True).state_dict()
        except (OSError, RuntimeError, ValueError) as error:
            raise UserError(f"timm's weights of {name} could not be downloaded ({brief(error, 100)}); "
                            'pass them as --weights FILE') from None

    return Network(f'{name} of timm, a small decoder', build, imagenet, ({'': 'encoder.'},))


def erfnet_encoder():
    """Always UserError: there is nothing to download."""
    raise UserError(ENCODER)


LRASPP, CLASSIFIER = ('low_classifier', 'high_classifier'), ('4',)
NETWORKS = {
    DEFAULT: Network("the paper's network", ERFNet, erfnet_encoder),
    'lraspp_mobilenet_v3_large': from_torchvision('lraspp_mobilenet_v3_large', LRASPP,
                                                  'MobileNetV3 with a very small head'),
    'deeplabv3_mobilenet_v3_large': from_torchvision('deeplabv3_mobilenet_v3_large', CLASSIFIER,
                                                     'MobileNetV3, DeepLabV3 head'),
    'deeplabv3_resnet50': from_torchvision('deeplabv3_resnet50', CLASSIFIER, 'ResNet-50, DeepLabV3 head'),
    'fcn_resnet50': from_torchvision('fcn_resnet50', CLASSIFIER, 'ResNet-50, two convolutions as head'),
}


def get_network(name):
    """The Network called `name`; UserError lists the choices."""
    if name.startswith(TIMM):
        return from_timm(name.removeprefix(TIMM))
    if name not in NETWORKS:
        raise UserError(f'there is no network {name!r}; choose from {", ".join(NETWORKS)}, {TIMM}ENCODER')
    return NETWORKS[name]


def network_name(name):
    """argparse type: the name of a network."""
    get_network(name)
    return name


def build_network(name, num_classes, adapter, domain_bn):
    """The plain network `name` of one domain; UserError if its batch norms or output layers do not fit."""
    network = get_network(name).build(num_classes, adapter)
    if domain_bn and not any(isinstance(module, _BatchNorm) for _, module in outside_heads(network)):
        raise UserError(f'{name} has no batch norm outside its head, so domains cannot have their own; choose a method '
                        'with shared batch norms, such as fine-tune')
    check_outputs(name, network, num_classes)
    return network


def check_outputs(name, network, num_classes):
    """UserError unless every output layer of a plain network is a convolution in a head with `num_classes` outputs."""
    outside = dict(outside_heads(network))
    fit = sorted(layer for layer, module in network.named_modules()
                 if layer not in outside and getattr(module, 'out_channels', None) == num_classes)
    for layer in network.output_layers:
        if layer not in fit:
            raise UserError(f'{name}: its output layer {layer!r} is not a convolution of a head with '
                            f'{num_classes} outputs; those that are: {", ".join(fit) or "none"}')
