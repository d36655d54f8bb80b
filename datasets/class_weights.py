"""Cross-entropy weights of a domain: 1 / ln(1.1 + class frequency).

The formula is ENet's (Paszke et al., 2016), with c = 1.1 as in ERFNet's training. Frequencies are over all
pixels, including void. Void's weight is reported, but set to 0 in training.

    python -m mdil class-weights --domains cityscapes BDD IDD --data-root data --json weights.json

prints them next to the published ones; train.py takes the file with --class-weights.
"""
import json
import os
from functools import partial
from pathlib import Path

import numpy as np
import torch

from mdil.datasets.domains import get_domain
from mdil.datasets.own import weights_fault
from mdil.datasets.pairs import find_split
from mdil.datasets.segmentation import open_label, to_classes
from mdil.utils.errors import UserError, run_main
from mdil.utils.files import check_results, write_json
from mdil.utils.parser import Parser, data_options, data_paths, natural
from mdil.utils.workers import in_parallel

CHOICES = ('published', 'computed', 'none')


def equal_weights(num_classes):
    """Equal cross-entropy weights (num_classes,), void 0."""
    return torch.tensor([1.0] * (num_classes - 1) + [0.0])


def label_counts(pair, num_classes):
    """Pixels of each class index, void last, in the label of `pair`: int64 (num_classes,)."""
    classes = to_classes(np.asarray(open_label(pair)), pair)
    return np.bincount(classes.ravel(), minlength=num_classes)


def histogram(domain, root, split='train', workers=None, pairs=None):
    """Pixels of each class index, void last, over the split's labels at their own size: int64 (C,).

    workers: processes that count (default: one per core, at most 8).
    pairs: those to count (default: all of the split).

    UserError names a label that cannot be read or has values out of range.
    """
    pairs = find_split(domain, root, split).pairs if pairs is None else pairs
    count = partial(label_counts, num_classes=domain.num_classes)
    workers = min(8, os.cpu_count() or 1) if workers is None else workers
    return sum(in_parallel(count, pairs, workers, f'{domain.name} {split}'), np.zeros(domain.num_classes, np.int64))


def weights_of(counts):
    """1 / ln(1.1 + counts / counts.sum()), float64 (C,)."""
    return 1 / np.log(1.1 + counts / counts.sum())


def needs_counts(domain, choice):
    """Whether the weights for `choice` are computed from the training labels."""
    return choice == 'computed' or choice == 'published' and not domain.weights


def training_weights(domain, root, choice='published', counts=None):
    """The (C,) float32 weights that training uses, void 0.

    choice: 'published' (the paper's values; computed for a domain that has none), 'computed' from the
        training labels, 'none' for equal weights, or a JSON file {domain name: [C weights]}.
    counts: the pixels of each class, if they are known.
    """
    if choice == 'none':
        weights = np.ones(domain.num_classes)
    elif needs_counts(domain, choice):
        weights = weights_of(histogram(domain, root) if counts is None else counts)
    else:
        weights = domain.weights if choice == 'published' else weights_from_file(domain, choice)
    weights = torch.tensor(np.array(weights), dtype=torch.float32)
    weights[domain.void] = 0
    return weights


def weights_from_file(domain, path):
    """The weights of `domain` in a JSON file {domain name: [C weights]}; UserError if they are missing or invalid."""
    try:
        weights = json.loads(Path(path).read_text())[domain.name]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f'--class-weights {path}: no weights of {domain.name} there ({error!r}); give one of '
                        f'{", ".join(CHOICES)} or a JSON file {{"{domain.name}": [weights]}}') from None
    fault = weights_fault(weights, len(domain.classes))
    if fault:
        raise UserError(f'--class-weights {path}: {domain.name} has {fault}')
    return weights


def weights_table(domain, counts, computed):
    """Lines of at most 80 columns: class, percent of pixels, computed and published weight."""
    published = [f'{weight:.4f}' for weight in domain.weights] if domain.weights else ['-'] * domain.num_classes
    rows = [f'{name[:36]:<36} {percent:>9.4f} {weight:>10.4f} {known:>10}'
            for name, percent, weight, known in zip((*domain.classes, 'void (0 in training)'),
                                                    100 * counts / counts.sum(), computed, published)]
    return [f'{"class":<36} {"percent":>9} {"computed":>10} {"published":>10}', *rows]


def class_weights_parser():
    """The parser of this command."""
    parser = Parser(prog='python -m mdil class-weights',
                    description='Cross-entropy weights 1 / ln(1.1 + class frequency) of domains.')
    parser.add_argument('--domains', nargs='+', required=True, metavar='NAME', help='domains to count')
    data_options(parser)
    parser.add_argument('--split', default='train', help='split to count')
    parser.add_argument('--json', metavar='FILE', help='write {domain: [weights, void last]}')
    parser.add_argument('--num-workers', '--workers', type=natural, default=os.cpu_count() or 1, help='processes')
    return parser


def main(arguments=None):
    """Prints the weights that the command line asks for and writes them to --json; returns 0, or UserError."""
    options = class_weights_parser().parse_args(arguments)
    domains, weights = [get_domain(name, data_paths(options.data)) for name in options.domains], {}
    if options.json:
        check_results('--json', options.json, [domain.name for domain in domains])
    for domain in domains:
        counts = histogram(domain, options.data_root, options.split, options.num_workers)
        computed = weights_of(counts)
        print(f'{domain.name} {options.split}', *weights_table(domain, counts, computed), '', sep='\n')
        weights[domain.name] = computed.tolist()
    if options.json:
        write_json(options.json, weights)
    return 0


if __name__ == '__main__':
    run_main(main)
