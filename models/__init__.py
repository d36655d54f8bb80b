"""Networks and methods."""
from mdil.models.erfnet import ERFNet
from mdil.models.methods import METHODS, get_method

__all__ = ['ERFNet', 'METHODS', 'build_model', 'get_method']


def build_model(num_classes, method='ours'):
    """The network of `method` for domains of `num_classes` classes each, void included.

    `build_model([20, 20])(images, domain=1)` gives logits (B, 20, H, W) of images
    (B, 3, H, W), floats in [0, 1].
    """
    row = get_method(method)
    return ERFNet(list(num_classes), adapter=row.adapter, domain_bn=row.domain_bn)
