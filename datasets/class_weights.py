"""Cross-entropy weights of a domain: 1 / ln(1.1 + class frequency).

The formula is ENet's (Paszke et al., 2016, with c = 1.1 as ERFNet's training uses
it); frequencies are over all pixels, void among them, and void's weight is reported
but set to 0 in training.
"""
import json
from pathlib import Path

import numpy as np
import torch

from datasets.pairs import find_split
from datasets.segmentation import open_label, to_classes
from utils.errors import UserError

CHOICES = ('published', 'computed', 'none')


def histogram(domain, root, split='train'):
    """Pixels of each class index, void last, over the split's labels at their own size: int64 (C,)."""
    counts = np.zeros(domain.num_classes, dtype=np.int64)
    for pair in find_split(domain, root, split).pairs:
        classes = to_classes(np.asarray(open_label(pair)), pair)
        counts += np.bincount(classes.ravel(), minlength=domain.num_classes)
    return counts


def weights_of(counts):
    """1 / ln(1.1 + counts / counts.sum()), float64 (C,)."""
    return 1 / np.log(1.1 + counts / counts.sum())


def training_weights(domain, root, choice='published'):
    """The (C,) float32 weights that training uses, void 0.

    choice: 'published' (the paper's values; computed for a domain that has none),
    'computed' from the training labels, 'none' for equal weights, or a JSON file
    {domain name: [C weights]}.
    """
    if choice == 'none':
        weights = np.ones(domain.num_classes)
    elif choice == 'published' and domain.weights:
        weights = np.array(domain.weights)
    elif choice in CHOICES:
        weights = weights_of(histogram(domain, root))
    else:
        weights = weights_from_file(domain, choice)
    weights = torch.tensor(weights, dtype=torch.float32)
    weights[domain.void] = 0
    return weights


def weights_from_file(domain, path):
    """The weights of `domain` in a JSON file {domain name: [C weights]}."""
    try:
        weights = np.array(json.loads(Path(path).read_text())[domain.name], dtype=np.float64)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f'--class-weights {path}: no weights of {domain.name} there ({error!r}); give one of '
                        f'{", ".join(CHOICES)} or a JSON file {{"{domain.name}": [weights]}}') from None
    if weights.shape != (domain.num_classes,) or not np.isfinite(weights).all() or (weights < 0).any():
        raise UserError(f'--class-weights {path}: {domain.name} needs {domain.num_classes} weights >= 0, void last')
    return weights
