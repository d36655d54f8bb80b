"""The data of a training step: each domain's pairs, loaders and class weights, and its batches on the device."""
from dataclasses import dataclass
from functools import partial

import torch

from mdil.datasets import SegmentationDataset
from mdil.datasets.augment import augment_batch, draw
from mdil.datasets.cache import cached
from mdil.datasets.check import inspect_pair
from mdil.datasets.class_weights import equal_weights, histogram, needs_counts, training_weights
from mdil.datasets.domains import domain_of, is_declared
from mdil.datasets.judgement import judge, shared_files
from mdil.datasets.loading import EvalBatches, TrainBatches, make_loader
from mdil.models.checkpoint import read_checkpoint
from mdil.models.identify import statistics_of
from mdil.training.plan import plan_step
from mdil.utils.errors import UserError, printable
from mdil.utils.parallel import tell
from mdil.utils.parser import data_paths
from mdil.utils.workers import in_parallel


@dataclass
class DomainData:
    """One domain's data: its index in the network, loaders (None if not needed) and cross-entropy weights."""
    index: int
    domain: object
    class_weights: torch.Tensor
    train: object = None
    val: object = None


def domains_of(options, saved):
    """The Domains of a step. The checkpoint describes old ones that are neither built in nor given with --data.

    saved: the content of the checkpoint to resume from, or None.
    """
    paths, entries = data_paths(options.data), {}
    undeclared = [name for name in options.domains if not is_declared(name, paths)]
    if undeclared:
        content = saved or read_checkpoint(options.state).content
        entries = {entry['name']: entry for entry in content.get('domains', [])}
        missing = [name for name in undeclared if name not in entries]
        if entries and missing:
            raise UserError(f'{options.state} knows {", ".join(entries)}, not {", ".join(missing)}; name its domains '
                            'in its order, or declare yours with --data NAME=FOLDER')
    return [domain_of(entries.get(name, {'name': name}), paths) for name in options.domains]


def build_data(options, place, saved=None):
    """The DomainData of every domain; old ones have a validation loader if their data is available.

    saved: the content of the checkpoint to resume from, or None.
    """
    check_batch_size(options, place)
    domains = domains_of(options, saved)
    train_sets = {index: dataset(options, domains[index], 'train') for index in plan_step(options).trained}
    sizes = [len(data) for data in train_sets.values()]
    found = []
    for index, domain in enumerate(domains):
        if index in train_sets:
            counts = counts_of(train_sets[index], options)
            data = DomainData(index, domain, training_weights(domain, options.data_root, options.class_weights, counts))
            data.train = train_loader(options, place, train_sets[index], sizes)
        else:
            data = DomainData(index, domain, equal_weights(domain.num_classes))
        data.val = val_loader(options, place, domain, required=index in train_sets)
        found.append(data)
        judge_data(data)
    return found


def counts_of(data, options):
    """Pixels of each class of a training set, if its weights need them or all files were read; else None."""
    if data.counts is None and needs_counts(data.domain, options.class_weights):
        data.counts = histogram(data.domain, options.data_root, workers=options.num_workers or 1, pairs=data.pairs)
    return data.counts


def judge_data(data):
    """Reports what is odd about a domain's labels, if they were counted; UserError if they are unfit to train on."""
    sets = [loader.dataset for loader in (data.train, data.val) if loader]
    for found in sets:
        faults, remarks = ([], []) if found.counts is None else judge(data.domain, found.split, found.counts)
        if faults:
            raise UserError(f'{data.domain.name} {found.split}: {faults[0]}')
        for remark in remarks:
            tell(f'{data.domain.name} {found.split}: {remark}')
    shared = shared_files(*([pair.image for pair in found.pairs] for found in sets)) if len(sets) == 2 else []
    if shared:
        tell(printable(f'{data.domain.name}: {len(shared)} validation images are also training images, e.g. '
                       f'{shared[0]}'))


def epoch_samples(options, size, sizes):
    """Images per epoch from a training set of `size` images, one of several sets of `sizes`.

    With `--rounds largest`, smaller sets start over, so that every image is seen. With `smallest`, every
    set gives as many batches as the smallest one has; if they share batches, as many images.
    """
    if options.rounds == 'largest':
        return max(sizes)
    if plan_step(options).mixed:
        return min(sizes)
    rounds = -(-min(sizes) // options.batch_size)
    return min(size, rounds * options.batch_size)


def dataset(options, domain, split):
    """A split of a domain as the options ask for it: with or without bad files, cached or not."""
    data = SegmentationDataset(domain, options.data_root, split, (options.height, options.width),
                               augmented=split == 'train' and options.augment == 'workers', seed=options.seed,
                               padding=options.label_padding)
    if options.skip_bad_files:
        leave_out_bad_files(data, max(1, options.num_workers))
    return cached(data, options.cache) if options.cache else data


def joined(parts, seed, epoch, place):
    """Images, labels and domain number of a batch of parts, [(DomainData, what its loader yields), ...].

    The number is None if the parts are of several domains.
    """
    images, labels = zip(*(on_device(data, batch, seed, epoch, place) for data, batch in parts))
    if len(parts) == 1:
        return images[0], labels[0], parts[0][0].index
    return torch.cat(images), torch.cat(labels), None


def on_device(data, batch, seed, epoch, place):
    """A training batch's images and labels on the device, augmented there unless the workers did so."""
    images, labels, samples = batch
    images, labels = images.to(place.device, non_blocking=True), labels.to(place.device, non_blocking=True)
    if data.train.dataset.augmented:
        return images, labels
    draws = [draw(seed, epoch, sample) for sample in samples.tolist()]
    return augment_batch(images, labels, draws, data.domain.void, data.train.dataset.padding)


def leave_out_bad_files(data, workers):
    """Reads all pairs, drops those with a bad file, and reports how many and the first; UserError if all are bad."""
    found = list(in_parallel(partial(inspect_pair, num_classes=data.domain.num_classes), data.pairs, workers,
                             f'reading {data.domain.name} {data.split}'))
    problems = [problem for problems, _ in found for problem in problems[:1]]
    data.pairs = tuple(pair for pair, (problems, _) in zip(data.pairs, found) if not problems)
    if not data.pairs:
        raise UserError(f'all {len(found)} {data.split} pairs of {data.domain.name} are bad, '
                        f'e.g. {problems[0].message}')
    data.counts = sum(counts for problems, counts in found if not problems)
    if problems:
        tell(printable(f'{data.domain.name} {data.split}: {len(problems)} bad files left out, e.g. '
                       f'{problems[0].message}'))


def check_batch_size(options, place):
    """UserError if --batch-size does not divide among the processes, each with images of all domains if mixed."""
    domains = plan_step(options).domains_per_batch
    shares = place.world * domains
    if options.batch_size % shares:
        fewer = options.batch_size // shares * shares
        mixed = f' with images of {domains} domains each' if domains > 1 else ''
        raise UserError(f'--batch-size {options.batch_size} does not divide among {place.world} processes{mixed}; use '
                        + (f'{fewer} or ' if fewer else '') + f'{fewer + shares}')


def train_loader(options, place, data, sizes):
    """Loader over the training set `data`, one of several sets of `sizes` images."""
    samples = epoch_samples(options, len(data), sizes)
    size = options.batch_size // plan_step(options).domains_per_batch
    batches = TrainBatches(len(data), size, options.seed, samples, options.limit_batches, place.rank, place.world)
    return make_loader(data, batches, options.num_workers, place.device.type == 'cuda')


def val_loader(options, place, domain, required):
    """Loader over the validation images; None, with a message, for an old domain whose data is missing."""
    try:
        data = dataset(options, domain, 'val')
    except UserError as error:
        if required:
            raise
        tell(f'{domain.name} is not validated: {error}')
        return None
    batches = EvalBatches(len(data), options.batch_size, place.rank, place.world, options.limit_batches)
    return make_loader(data, batches, options.num_workers, place.device.type == 'cuda')


def with_statistics(known, data, options, place):
    """{domain: statistics of its images, see models.identify}: `known`, and those of the domains that are trained.

    Only the main process reads the images, because it alone saves the statistics.
    """
    found = {entry.domain.name: statistics_of([pair.image for pair in entry.train.dataset.pairs], options.num_workers,
                                              f'image statistics of {entry.domain.name}')
             for entry in data if place.main and entry.train and entry.domain.name not in known}
    return {**known, **found}
