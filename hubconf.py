"""Entry points for `torch.hub.load(CHECKOUT, NAME, ..., source='local')`; see docs/python.md."""
from mdil.api import load
from mdil.models import build_model

__all__ = ['load', 'network']
dependencies = ['torch', 'torchvision', 'numpy', 'PIL', 'tqdm']


def network(num_classes, method='mdil', network='erfnet'):
    """An untrained network for domains of `num_classes` classes each, void included; see mdil.models.build_model."""
    return build_model(num_classes, method, network)
