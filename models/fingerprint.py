"""Digests of tensors, equal only if every bit is; and which tensors belong to one domain, which to all."""
import hashlib
import json

import torch

from mdil.models.safe_reading import leaves

SHOWN = 16      # characters of a digest that are shown; files hold all 64
COUNTER = 'num_batches_tracked'
BUFFERS = '.running_mean', '.running_var', f'.{COUNTER}'


def digest_of(value):
    """SHA-256 of a tensor's type, shape and bits, or of a plain value, as 64 hexadecimal digits."""
    if not isinstance(value, torch.Tensor):
        return hashlib.sha256(repr(value).encode()).hexdigest()
    value = value.detach().cpu().contiguous()
    found = hashlib.sha256(f'{value.dtype} {list(value.shape)} '.encode())
    found.update(value.reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def tensor_digests(content):
    """{name: digest} of every tensor and plain value in nested dicts and lists."""
    return {name: digest_of(value) for name, value in leaves(content)}


def fingerprint(content):
    """One digest of nested dicts and lists: of the names and values in them, whatever the order of dict keys."""
    return hashlib.sha256(json.dumps(sorted(tensor_digests(content).items())).encode()).hexdigest()


def branch_state(model, domain):
    """{key in a plain network: tensor} of what belongs only to `domain` in a MultiDomainNet."""
    state = model.single(domain).state_dict()
    return {key: state[key] for key in model.view_names(domain)[0]}


def shared_state(model):
    """{key in a plain network: tensor} of what all domains of a MultiDomainNet share."""
    state = model.single(0).state_dict()
    return {key: state[key] for key in model.view_names(0)[1]}


def misfits(one, other):
    """Keys that only one of two states has, or else those of tensors whose shapes differ."""
    return sorted(one.keys() ^ other.keys()) or [key for key in one if one[key].shape != other[key].shape]


def is_buffer(name):
    """Whether a tensor of that name is a buffer of a batch norm; everything else is a parameter."""
    return name.endswith(BUFFERS)
