"""Builds the parts of a training step from its options: student, teacher, loss, optimiser."""
import copy
import os
import random

import numpy as np
import torch
from torch import nn

from mdil.models import build_model
from mdil.models.checkpoint import (check_known, loading_summary, network_of, read_checkpoint, start_from_encoder,
                                     stated_size)
from mdil.models.multi_domain import batch_norms_of
from mdil.models.networks import DEFAULT as ERFNET
from mdil.models.weights import IMAGENET, start_from_weights
from mdil.training.options import check_network
from mdil.training.plan import plan_step
from mdil.training.schedules import SCHEDULES
from mdil.training.step_loss import StepLoss
from mdil.utils.errors import UserError, brief
from mdil.utils.parallel import tell, wrap
from mdil.utils.precision import memory_format

NORMS = {'BatchNorm1d', 'BatchNorm2d', 'BatchNorm3d', 'SyncBatchNorm'}      # what --sync-bn can replace
FUSED = 'cpu', 'cuda', 'mps', 'xpu'      # devices with a fused Adam


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


def set_tf32(allowed):
    """Says whether float32 convolutions on GPUs may use TF32, which is less accurate; by torch's default they may."""
    cudnn = torch.backends.cudnn
    cudnn.allow_tf32 = allowed
    if not allowed:         # else the program's own setting for all of torch would count
        cudnn.conv.fp32_precision = cudnn.rnn.fp32_precision = 'ieee'


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
        student, lines = first_network(options, domains, checkpoint)
        return student, None, lines, {}
    if not checkpoint.layout.num_classes:
        raise UserError(f'{options.state} holds only an encoder; learning {domains[-1].name} after '
                        f'{domains[0].name} needs a checkpoint of the previous step')
    if domains[-1].name in (checkpoint.domains or ()):
        raise UserError(f'{options.state} already knows {domains[-1].name}, the domain to learn; start from the '
                        'checkpoint of the step before')
    check_known(checkpoint, domains[:-1])
    note_size(options, checkpoint)
    student = network_of(checkpoint.layout, options.method, checkpoint.source)
    known = len(student.state_dict())
    teacher = copy.deepcopy(student) if plan.needs_teacher else None
    # So that the new layers do not depend on how many domains were built before.
    torch.manual_seed(options.seed)
    source = options.domains.index(options.branch_from) if options.branch_from else -1
    added = student.add_domain(counts[-1], options.new_statistics, options.new_decoder, source)
    view = student.single(added)
    drawn = view.heads if options.new_decoder == 'fresh' else view.output_layers
    lines = loading_summary(checkpoint, known, sum(len(view.get_submodule(name).state_dict()) for name in drawn))
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
    known = checkpoint.layout.network if checkpoint else ERFNET
    options.network = options.network or known
    if checkpoint and options.network != known:
        raise UserError(f'{options.state} holds the network {known}, not {options.network}; leave out --network, '
                        'or give another --state')
    check_network(options)


def first_network(options, domains, checkpoint):
    """(student, lines about what was loaded) for a step without a previous one.

    checkpoint: that of --state, or None.
    """
    student = build_model([domain.num_classes for domain in domains], options.method, options.network)
    lines = 'random initial weights'
    if options.weights and (options.network != ERFNET or options.weights == IMAGENET):
        lines = start_from_weights(student, options.network, options.weights)
    elif options.weights:
        checkpoint = read_checkpoint(options.weights)
    if checkpoint:
        if checkpoint.layout.num_classes:
            raise UserError(f'{checkpoint.source} holds {checkpoint.layout.kind}, but {domains[0].name} is the first '
                            f'domain that --method {options.method} learns here: it starts from an encoder, or '
                            'without --state')
        lines = start_from_encoder(student, checkpoint, options.imagenet_bn == 'loaded')
    return student, lines


def rebuild_networks(options, domains, network):
    """(student, teacher or None) of a resumed run, called `network`, to be filled from its checkpoint."""
    options.network = network
    counts = [domain.num_classes for domain in domains]
    check_network(options)
    teacher = build_model(counts[:-1], options.method, options.network) if plan_step(options).needs_teacher else None
    return build_model(counts, options.method, options.network), teacher


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
    plan, height, width = plan_step(options), options.height, options.width
    least = plan.domains_per_batch
    one = 'one image' if least == 1 else 'one image of each domain'
    student.train()
    for domain in data:
        sampler = domain.train.batch_sampler
        if options.sync_bn or 1 not in map(len, torch.arange(sampler.fewest).chunk(replicas)):
            continue
        view = student.mixed() if plan.mixed else student.single(domain.index)
        if not bears(view, least, height, width):
            larger = 'enlarge --height or --width, or ' if bears(view, least, 16 * height, 16 * width) else ''
            raise UserError(f'the last batch of an epoch has {one} at {width}x{height} on a device, which leaves a '
                            f'batch norm of {options.network} one value; {larger}choose a --batch-size of at least '
                            f'{2 * least} per device that does not leave {one} of {sampler.samples} over')


def bears(view, images, height, width):
    """Whether the batch norms of a training view work with so few images of that size. Runs on the meta device."""
    probe = copy.deepcopy(view).to('meta')
    try:
        with torch.no_grad():
            probe(torch.empty(images, 3, height, width, device='meta'))
    except ValueError as error:
        if 'more than 1 value per channel' not in str(error):
            raise
        return False
    return True


def has_idle_weights(student, options):
    """Whether a weight that should train never gets a gradient, as in some encoders of timm. Runs on the meta device.

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
    plan = plan_step(options)
    unused = has_idle_weights(student, options) or plan.turns > 1 or options.steps_per_batch > 1 and len(terms) > 1
    against = ('split a mixed batch by domain' if plan.domains_per_batch > 1 else
               'move weights that a batch does not use' if unused else '')
    wrapped = wrap(loss, place, options.parallel, unused, against)
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
