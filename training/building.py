"""Builds the parts of a training step from its options: data, student, teacher, optimiser."""
import copy
import os
import random
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import nn

from mdil.datasets import SegmentationDataset
from mdil.datasets.augment import augment_batch, draw
from mdil.datasets.cache import cached
from mdil.datasets.check import inspect_pair
from mdil.datasets.class_weights import equal_weights, histogram, needs_counts, training_weights
from mdil.datasets.domains import domain_of, is_declared
from mdil.datasets.judgement import judge, shared_files
from mdil.datasets.loading import EvalBatches, TrainBatches, make_loader
from mdil.models import build_model
from mdil.models.checkpoint import check_known, network_of, read_checkpoint, report, start_from_encoder, stated_size
from mdil.models.identify import statistics_of
from mdil.models.multi_domain import batch_norms_of
from mdil.models.networks import DEFAULT as ERFNET
from mdil.models.weights import IMAGENET, start_from_weights
from mdil.training.options import check_network
from mdil.training.plan import plan_step
from mdil.training.schedules import SCHEDULES
from mdil.training.step_loss import StepLoss
from mdil.utils.errors import UserError, brief, printable
from mdil.utils.parallel import tell, wrap
from mdil.utils.parser import data_paths
from mdil.utils.precision import memory_format
from mdil.utils.workers import in_parallel

NORMS = {'BatchNorm1d', 'BatchNorm2d', 'BatchNorm3d', 'SyncBatchNorm'}      # what --sync-bn can replace
FUSED = 'cpu', 'cuda', 'mps', 'xpu'      # devices with a fused Adam


@dataclass
class DomainData:
    """One domain's data: its index in the network, loaders (None if not needed) and cross-entropy weights."""
    index: int
    domain: object
    class_weights: torch.Tensor
    train: object = None
    val: object = None


def seed_everything(seed, deterministic=False):
    """Seeds Python, NumPy and torch; with `deterministic`, results on GPUs repeat bit for bit."""
    random.seed(seed)
    np.random.seed(seed % 2 ** 32)
    torch.manual_seed(seed)
    if deterministic:
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
        torch.backends.cudnn.benchmark = False
        # Warn only: what is left in ERFNet is the backward pass of max pooling. Its windows do not overlap there, so
        # each pixel gets one gradient and the order does not matter.
        torch.use_deterministic_algorithms(True, warn_only=True)


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
    """Images per epoch from a training set of `size` images, one of several sets of `sizes` that take turns.

    With `--rounds largest`, smaller sets start over, so that every image is seen. With `smallest`, every
    set gives as many batches as the smallest one has.
    """
    if options.rounds == 'largest':
        return max(sizes)
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


def train_loader(options, place, data, sizes):
    """Loader over the training set `data`, one of several sets of `sizes` images.

    UserError if --batch-size does not divide among the processes.
    """
    if options.batch_size % place.world:
        fewer = options.batch_size // place.world * place.world
        raise UserError(f'--batch-size {options.batch_size} does not divide among {place.world} processes; use '
                        + (f'{fewer} or ' if fewer else '') + f'{fewer + place.world}')
    samples = epoch_samples(options, len(data), sizes)
    batches = TrainBatches(len(data), options.batch_size, options.seed, samples, options.limit_batches,
                           place.rank, place.world)
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


def build_networks(options, domains):
    """(student, teacher or None, lines about what was loaded, {old domain: its statistics}) for the step's Domains."""
    plan = plan_step(options)
    counts = [domain.num_classes for domain in domains]
    if options.state and not plan.from_previous and not os.path.lexists(options.state):
        raise UserError(f'--state {options.state} does not exist; README.md says where to get the encoder, without '
                        '--state the first step starts from random weights')
    checkpoint = read_checkpoint(options.state) if options.state else None
    settle_network(options, checkpoint)
    if not plan.from_previous:
        return *first_network(options, domains, counts, checkpoint), {}
    if not checkpoint.found.num_classes:
        raise UserError(f'{options.state} holds only an encoder; learning {domains[-1].name} after '
                        f'{domains[0].name} needs a checkpoint of the previous step')
    if domains[-1].name in (checkpoint.domains or ()):
        raise UserError(f'{options.state} already knows {domains[-1].name}, the domain to learn; start from the '
                        'checkpoint of the step before')
    check_known(checkpoint, domains[:-1])
    note_size(options, checkpoint)
    student = network_of(checkpoint.found, options.method, checkpoint.source)
    known = len(student.state_dict())
    teacher = copy.deepcopy(student) if plan.needs_teacher else None
    # So that the new layers do not depend on how many domains were built before.
    torch.manual_seed(options.seed)
    source = options.domains.index(options.branch_from) if options.branch_from else -1
    added = student.add_domain(counts[-1], options.new_statistics, options.new_decoder, source)
    view = student.single(added)
    drawn = view.heads if options.new_decoder == 'fresh' else view.output_layers
    lines = report(checkpoint, known, sum(len(view.get_submodule(name).state_dict()) for name in drawn))
    return student, teacher, lines, checkpoint.content.get('domain_statistics', {})


def note_size(options, checkpoint):
    """Tells the user if the step trains at another size than the Checkpoint of --state."""
    size = stated_size(checkpoint.content)
    if size and size != (options.height, options.width):
        height, width = size
        tell(f'this step trains at {options.width}x{options.height}, but {options.state} was trained at '
             f'{width}x{height}; --height {height} --width {width} keeps that')


def settle_network(options, checkpoint):
    """Sets --network, if not given, to that of the Checkpoint of --state (or None); UserError if they differ."""
    known = checkpoint.found.network if checkpoint else ERFNET
    options.network = options.network or known
    if checkpoint and options.network != known:
        raise UserError(f'{options.state} holds the network {known}, not {options.network}; leave out --network, '
                        'or give another --state')
    check_network(options)


def first_network(options, domains, counts, checkpoint):
    """(student, None for the teacher, lines about what was loaded) for a step without a previous one.

    checkpoint: that of --state, or None.
    """
    student, lines = build_model(counts, options.method, options.network), 'random initial weights'
    if options.weights and (options.network != ERFNET or options.weights == IMAGENET):
        lines = start_from_weights(student, options.network, options.weights)
    elif options.weights:
        checkpoint = read_checkpoint(options.weights)
    if checkpoint:
        if checkpoint.found.num_classes:
            raise UserError(f'{checkpoint.source} holds {checkpoint.found.kind}, but {domains[0].name} is the first '
                            f'domain that --method {options.method} learns here: it starts from an encoder, or '
                            'without --state')
        lines = start_from_encoder(student, checkpoint, options.imagenet_bn == 'loaded')
    return student, None, lines


def rebuild_networks(options, domains, network):
    """The networks of a resumed run, called `network`, to be filled from its checkpoint; --state is not read."""
    options.network = network
    counts = [domain.num_classes for domain in domains]
    check_network(options)
    teacher = build_model(counts[:-1], options.method, options.network) if plan_step(options).needs_teacher else None
    return build_model(counts, options.method, options.network), teacher, f'resumed in {options.savedir}', {}


def with_trained(known, data, options, place):
    """{domain: statistics of its images, see models.identify}: `known`, and those of the domains that are trained.

    Only the main process reads the images, because it alone saves the statistics.
    """
    found = {entry.domain.name: statistics_of([pair.image for pair in entry.train.dataset.pairs], options.num_workers,
                                              f'image statistics of {entry.domain.name}')
             for entry in data if place.main and entry.train and entry.domain.name not in known}
    return {**known, **found}


def synchronised(student, options, place):
    """The student with batch statistics over all processes; UserError if that is not possible."""
    if options.distill_domains and options.old_bn != 'frozen':
        raise UserError(f'--sync-bn and --old-bn {options.old_bn} need every process to run the same old domains; '
                        'leave out --distill-domains')
    if place.device.type != 'cuda' or place.world == 1:
        raise UserError('--sync-bn needs several processes with a GPU each: torchrun --nproc_per_node N train.py ...')
    odd = {type(norm).__name__ for norm in batch_norms_of(student.modules())} - NORMS
    if odd:
        raise UserError(f'--sync-bn: {options.network} has special batch norms ({min(odd)}), which would lose what '
                        'they add; leave it out')
    return student.synchronise_batch_norms()


def check_batches(student, data, options, replicas):
    """UserError if an epoch's smallest batch would give a training batch norm only one value per channel.

    data: DomainData of the trained domains.
    replicas: number of devices that share this process's batch.
    """
    height, width = options.height, options.width
    for domain in data:
        batch = domain.train.batch_sampler.fewest
        alone = 1 in map(len, torch.arange(batch).chunk(replicas))
        if alone and not options.sync_bn and not bears_one_image(student, domain.index, height, width):
            larger = ('enlarge --height or --width, or '
                      if bears_one_image(student, domain.index, 16 * height, 16 * width) else '')
            raise UserError(f'the last batch of an epoch has one image of {width}x{height} on a device, which leaves a '
                            f'batch norm of {options.network} one value; {larger}choose a --batch-size of at least 2 '
                            'per device that does not leave one of '
                            f'{domain.train.batch_sampler.samples} images over')


def bears_one_image(student, domain, height, width):
    """Whether the training batch norms of a domain's view work with one image of that size; computes nothing."""
    probe = copy.deepcopy(student.train().single(domain)).to('meta')
    try:
        with torch.no_grad():
            probe(torch.empty(1, 3, height, width, device='meta'))
    except ValueError as error:
        if 'more than 1 value per channel' not in str(error):
            raise
        return False
    return True


def has_idle_weights(student, options):
    """Whether a weight that should train never gets a gradient, as in some encoders of timm; computes nothing.

    UserError if the network cannot process images of the training size.
    """
    probe = copy.deepcopy(student).train(not options.sync_bn).to('meta')
    try:
        for index in plan_step(options).trained:
            probe(torch.empty(2, 3, options.height, options.width, device='meta'), index).sum().backward()
    except (RuntimeError, AssertionError, ValueError, TypeError) as error:
        if 'meta' in str(error).lower():        # an operation that cannot be tried without computing
            return True
        raise UserError(f'{options.network} cannot process images of {options.width}x{options.height} '
                        f'({brief(error, 100)}); change --height and --width, or --network') from None
    return any(weight.requires_grad and weight.grad is None for weight in probe.parameters())


def freeze(student, options):
    """Freezes what the step's plan says."""
    plan = plan_step(options)
    student.freeze(plan.frozen, plan.shared_frozen, options.old_bn, not options.no_dropout, options.frozen_encoder)


def parameter_groups(student, options):
    """Optimiser groups: shared weights and trained branches. Every parameter is in exactly one of them or frozen."""
    plan = plan_step(options)
    shared_lr = options.shared_lr if len(options.domains) > 1 else options.lr
    branches = [p for domain in plan.trained for p in student.branch_parameters(domain)]
    groups = [{'name': 'shared', 'lr': shared_lr, 'params': student.shared_parameters()},
              {'name': 'branch', 'lr': options.lr, 'params': branches}]
    groups = [{**group, 'params': [p for p in group['params'] if p.requires_grad]} for group in groups]
    grouped = [id(p) for group in groups for p in group['params']]
    frozen = [id(p) for p in student.parameters() if not p.requires_grad]
    assert sorted(grouped + frozen) == sorted(id(p) for p in student.parameters()), (
        'a parameter is in no group or in two')
    return [group for group in groups if group['params']]


def build_terms(options):
    """The LossTerms of the step."""
    return [term(options) for term in plan_step(options).terms]


def build_step_loss(student, teacher, class_weights, terms, options, place):
    """The StepLoss on its device, wrapped if there are several; class_weights: a (C,) tensor for each domain."""
    if teacher is not None:
        teacher.requires_grad_(False)
        teacher.frozen_modules = ()
    loss = StepLoss(student, teacher, class_weights, terms, teacher_mode=options.teacher_mode,
                    precision=options.precision, compiled=options.compile)
    loss.to(place.device, memory_format=memory_format(place.device, options.precision))
    # A batch of one domain, or a step on one term, leaves other weights without a gradient.
    unused = (has_idle_weights(student, options) or len(plan_step(options).trained) > 1
              or options.steps_per_batch > 1 and len(terms) > 1)
    wrapped = wrap(loss, place, options.parallel, unused)
    if options.compile and isinstance(wrapped, nn.DataParallel):
        raise UserError('--compile does not work with DataParallel; use torchrun --nproc_per_node N train.py ...')
    if place.graphs and isinstance(wrapped, nn.DataParallel):
        raise UserError('--cuda-graphs needs one GPU, not several; add --device cuda:0, or leave it out')
    return wrapped


def build_optimizer(student, options):
    """Adam as published, and its learning-rate schedule, which steps once an epoch (`training.schedules`)."""
    optimizer = torch.optim.Adam(parameter_groups(student, options), betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-4,
                                 fused=next(student.parameters()).device.type in FUSED, capturable=options.cuda_graphs)
    factor = SCHEDULES[options.schedule]
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: factor(done, options.num_epochs))
