"""Networks and methods."""
from mdil.models.erfnet import ERFNet
from mdil.models.methods import METHODS, build_model, get_method, method_name

__all__ = ['ERFNet', 'METHODS', 'build_model', 'get_method', 'method_name']
