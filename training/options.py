"""Options of train.py and named recipes.

`parse_train` returns a namespace of native options only. training.paper translates the paper's dialect, so
no other code needs to know it.
"""
import argparse
import contextlib
import importlib.util
import os
from pathlib import Path

import torch

from mdil.datasets.domains import canonical, get_domain
from mdil.losses import DISTILLATIONS
from mdil.models.checkpoint import read_checkpoint, stated_size
from mdil.models.methods import DEFAULT, METHODS, Method, get_method, method_name, unused
from mdil.models.multi_domain import OLD_BN
from mdil.models.networks import DEFAULT as ERFNET, NETWORKS, TIMM, network_name
from mdil.training.paper import REFUSED, paper_options, translate_paper
from mdil.training.schedules import SCHEDULES
from mdil.utils.errors import UserError
from mdil.utils.files import read_object
from mdil.utils.parallel import pick_device, tell
from mdil.utils.parser import (PUBLISHED_SIZE, Parser, complete_size, data_options, data_paths, flag, machine_options,
                               natural, positive, rate, seed_number, size_options)
from mdil.utils.precision import without_bf16

SLOW_RATE = 5e-6
LAMBDA, TEMPERATURE = 0.1, 1.0
# The options that `--recipe` sets: a value, or a function of the method's row and the domains' names.
# docs/methods.md explains how the published loops differ.
RECIPES = {
    'corrected': {
        'lambdac': LAMBDA, 'temperature': TEMPERATURE, 'old_bn': 'frozen', 'distillation': 'kl', 'teacher_mode': 'eval',
        'steps_per_batch': 1, 'frozen_encoder': 'eval', 'new_decoder': 'copied', 'new_statistics': 'copied',
        'imagenet_bn': 'loaded', 'label_padding': 'void', 'rounds': 'largest', 'num_epochs': 150, 'val_every': 1,
        'schedule': 'poly', 'published_metric': False},
    # The published loops for two and three domains differ in the teacher's mode and in optimiser steps.
    'released': {
        'lambdac': LAMBDA, 'temperature': TEMPERATURE, 'old_bn': 'released', 'distillation': 'released',
        'teacher_mode': lambda row, domains: 'train' if len(domains) > 2 else 'eval',
        'steps_per_batch': lambda row, domains: 2 if len(domains) > 2 else 1,
        'frozen_encoder': lambda row, domains: 'train' if row.plain else 'eval',
        'new_decoder': lambda row, domains: 'fresh' if row.plain else 'copied', 'new_statistics': 'fresh',
        'imagenet_bn': lambda row, domains: 'loaded' if row.plain else 'dropped', 'label_padding': 'released',
        'rounds': 'smallest', 'num_epochs': lambda row, domains: 200 if row.one_domain and domains == ['IDD'] else 150,
        'val_every': lambda row, domains: 5 if row.joint else 10 if len(domains) > 2 else 1,
        'schedule': 'poly', 'published_metric': True}}
# The fastest known way to a given score (docs/record.md), as differences from the corrected recipe.
RECIPES['fast'] = {**RECIPES['corrected'], 'schedule': 'one-cycle', 'lr': 4e-3, 'no_dropout': True}


def recipe_settings(recipe, domains, method=DEFAULT):
    """{option: value} that a recipe sets for a step of `method` on the domains of these names, the last one new."""
    row = get_method(method)
    return {option: value(row, list(domains)) if callable(value) else value
            for option, value in RECIPES[recipe].items()}


def train_parser():
    """The parser of train.py."""
    parser = Parser(prog='train.py', refused=REFUSED, several=True,
                    description='Trains one step: the last of --domains. --state must know the others.')
    step_options(parser)
    input_options(parser)
    method_options(parser)
    training_options(parser)
    device_options(parser)
    display_options(parser)
    paper_options(parser)
    return parser


def step_options(parser):
    """Adds options for what a step learns, what it starts from and where its results go."""
    group = parser.add_argument_group('what to train')
    group.add_argument('--domains', nargs='+', metavar='NAME', help='domains in order; the last is trained')
    group.add_argument('--method', type=method_name, choices=tuple(METHODS),
                       help="training method (default: mdil, the paper's, also called ours)")
    group.add_argument('--network', type=network_name, metavar='NAME',
                       help=f'network of the first step, kept by later steps: {", ".join(NETWORKS)}, or {TIMM}ENCODER '
                            f'(default: {ERFNET})')
    group.add_argument('--weights', metavar='none|imagenet|FILE',
                       help='initial weights of the encoder in the first step (default: none, random)')
    group.add_argument('--state', metavar='FILE',
                       help='checkpoint of the previous step, or an ImageNet encoder of ERFNet')
    group.add_argument('--savedir', required=True, metavar='DIR', help='folder for checkpoints and metrics')
    group.add_argument('--model-name-suffix', default='', metavar='NAME', help='name of the run in its records')
    group.add_argument('--branch-from', metavar='NAME',
                       help='domain whose branch the new branch is copied from (default: the last)')


def input_options(parser):
    """Adds options for where the data is and how it is read."""
    group = data_options(parser)
    group.add_argument('--cache', metavar='DIR', help='cache of resized images and labels, filled at the first use')
    group.add_argument('--skip-bad-files', action='store_true', help='read all files first, leave out the bad ones')
    group.add_argument(
        '--class-weights', default='published', metavar='HOW',
        help='cross-entropy weights: published (computed if there are none), computed, none, or a JSON file')


def by_recipe(option):
    """What the help says of the default of an option that recipes set."""
    return f' (default: {RECIPES["corrected"][option]}, or by --recipe)'


def method_options(parser):
    """Adds --recipe and the options in which recipes differ."""
    group = parser.add_argument_group('recipe', '--recipe sets the options that are not given')
    group.add_argument('--recipe', choices=tuple(RECIPES), default='corrected',
                       help='corrected, released (the published loops, up to rounding), or fast (one-cycle at 4e-3 '
                            'without dropout, for few epochs)')
    group.add_argument('--lambdac', type=rate, metavar='WEIGHT',
                       help=f'weight of the distillation term (default: {LAMBDA})')
    group.add_argument('--temperature', type=rate, metavar='T',
                       help=f'temperature of --distillation kl (default: {TEMPERATURE})')
    group.add_argument('--distill-domains', type=positive, metavar='K',
                       help='number of old domains to distil per batch, drawn at random (default: all)')
    group.add_argument('--shared-lr', type=rate, metavar='RATE',
                       help='learning rate of the shared weights where several domains share them (default: by method)')
    group.add_argument('--no-dropout', action='store_true', default=argparse.SUPPRESS,
                       help='disable dropout in the layers that train (default: by method)')
    group.add_argument('--dropout', action='store_false', dest='no_dropout', default=argparse.SUPPRESS,
                       help='use dropout in the layers that train (default: by method)')
    group.add_argument('--old-bn', choices=OLD_BN,
                       help='old branches: frozen, batch statistics without update, or as published (overwritten)'
                            + by_recipe('old_bn'))
    group.add_argument('--distillation', choices=tuple(DISTILLATIONS), help='per-pixel KL, or the published term'
                            + by_recipe('distillation'))
    group.add_argument('--teacher-mode', choices=('eval', 'train'), help='mode of the frozen previous model'
                            + by_recipe('teacher_mode'))
    group.add_argument('--steps-per-batch', type=int, choices=(1, 2),
                       help='one optimiser step on the sum of the losses, or one on each'
                            + by_recipe('steps_per_batch'))
    group.add_argument('--frozen-encoder', choices=('eval', 'train'),
                       help='mode of a frozen plain encoder: eval, or train (statistics move, dropout is on)'
                            + by_recipe('frozen_encoder'))
    group.add_argument('--new-decoder', choices=('copied', 'fresh'),
                       help="initial weights of the new domain's decoder: the last one's, or random"
                            + by_recipe('new_decoder'))
    group.add_argument('--new-statistics', choices=('copied', 'fresh'),
                       help="initial running statistics of the new domain's encoder branch"
                            + by_recipe('new_statistics'))
    group.add_argument('--imagenet-bn', choices=('loaded', 'dropped'),
                       help="whether the ImageNet encoder's batch norms are loaded" + by_recipe('imagenet_bn'))
    group.add_argument('--label-padding', choices=('void', 'released'),
                       help='label of pixels that a shift uncovers: void, or class 0 on the right and below, '
                            'as published' + by_recipe('label_padding'))
    group.add_argument('--rounds', choices=('largest', 'smallest'),
                       help='length of a multi-task epoch: as many batches of each domain (mixed: images) as the '
                            'largest or the smallest has' + by_recipe('rounds'))
    group.add_argument('--schedule', choices=tuple(SCHEDULES),
                       help='learning rate: poly, the published decay, or one-cycle, which rises for a quarter of the '
                            'epochs before it falls' + by_recipe('schedule'))
    group.add_argument('--published-metric', action=argparse.BooleanOptionalAction,
                       help='count absent classes as 0 in the mIoU')


def training_options(parser):
    """Adds options for how long and in what order a step trains, and how a run resumes."""
    group = parser.add_argument_group('training')
    group.add_argument('--num-epochs', type=positive, metavar='N', help='epochs' + by_recipe('num_epochs'))
    group.add_argument('--batch-size', type=positive, default=6, help='images per batch, over all devices')
    group.add_argument('--lr', type=rate, default=argparse.SUPPRESS,
                       help='learning rate of the new domain, and of all in step 1 (default: 0.0005, or by --recipe; '
                            'later by method)')
    size_options(group, None, f'that of --state, or {PUBLISHED_SIZE[0]}')
    group.add_argument('--seed', type=seed_number, default=0, help='seed of weights, order, augmentation, dropout')
    group.add_argument('--val-every', type=positive, metavar='N',
                       help='validate every N epochs, and after the first and the last (default: 1, or by --recipe)')
    group.add_argument('--limit-batches', type=positive, metavar='N', help='at most N batches per epoch, for trials')
    kept = group.add_mutually_exclusive_group()
    kept.add_argument('--resume', action='store_true', help='continue from the checkpoint in --savedir')
    kept.add_argument('--overwrite', action='store_true', help='replace the result in --savedir')
    group.add_argument('--checkpoint-minutes', type=rate, metavar='M',
                       help='write checkpoints within epochs too, M minutes apart')


def device_options(parser):
    """Adds options for where and how fast a step is computed."""
    group = machine_options(parser, precision=None)
    group.add_argument('--compile', action='store_true',
                       help='torch.compile networks and losses (for GPUs; slow start)')
    group.add_argument('--cuda-graphs', action='store_true',
                       help='on one GPU: record a batch and replay it as one launch, to spare the CPU')
    group.add_argument('--fast', action='store_true',
                       help='the same as --augment device, --precision bf16 if it is fast on the device, and with a '
                            'single GPU or under torchrun --compile; --augment and --precision, if given, win')
    group.add_argument('--deterministic', action='store_true', help='on a GPU, use algorithms that repeat bit for bit')
    group.add_argument('--augment', choices=('workers', 'device'),
                       help='where images are flipped and shifted; the result is the same (default: workers)')
    group.add_argument('--parallel', choices=('auto', 'none', 'dp', 'ddp'), default='auto',
                       help='several devices: auto is ddp under torchrun, else dp')
    group.add_argument('--sync-bn', action='store_true', help='batch statistics over all processes, on GPUs')


def display_options(parser):
    """Adds options for live curves and TensorBoard."""
    group = parser.add_argument_group('live curves (visdom)')
    group.add_argument('--port', type=natural, help='port of a running visdom server')
    group.add_argument('--server', default='http://localhost', help='address of the visdom server')
    group.add_argument('--env', metavar='NAME',
                       help='visdom environment to draw into (default: --model-name-suffix, or the last two parts of '
                            '--savedir)')
    group = parser.add_argument_group('scalars (TensorBoard)')
    group.add_argument('--tensorboard', action='store_true',
                       help='write losses, rates and scores to --savedir/tensorboard; needs the package tensorboard')


def parse_train(argv=None):
    """The native options of train.py, complete and consistent; UserError if they cannot be."""
    options = train_parser().parse_args(argv)
    if options.tensorboard and importlib.util.find_spec('tensorboard') is None:
        raise UserError('--tensorboard needs the package tensorboard, which is not installed: pip install tensorboard')
    published = translate_paper(options)
    if not options.domains:
        raise UserError('--domains NAME [NAME ...] is missing; the last of them is trained')
    check_declared(options)
    if options.branch_from is not None:
        options.branch_from = canonical(options.branch_from)
    settle_size(options, published)
    options.method = options.method or DEFAULT
    check_uses(options)
    check_domains(options)
    complete_weights(options)
    if options.network:
        check_network(options)
    complete_fast(options)
    check_graphs(options)
    settings = recipe_settings(options.recipe, options.domains, options.method)
    published_term = (options.distillation or settings['distillation']) != 'kl'
    if options.temperature is not None and published_term and not options.resume:       # earlier runs may have it
        raise UserError('--temperature is for --distillation kl, the published term has none; leave it out, or add '
                        '--distillation kl')
    for name, value in settings.items():
        if getattr(options, name, None) is None:
            setattr(options, name, value)
    complete_method(options)
    if published:
        tell(f"the paper's options mean --method {options.method} --domains {' '.join(options.domains)} "
             f"--recipe {options.recipe}")
    return options


def settle_size(options, published):
    """Sets a size that was not given: that of the checkpoint of the step before, or else the published one.

    published: whether the paper's options were given, whose default is the published size.
    """
    if options.height is None:
        inherits = len(options.domains) > 1 and options.state and not published and not hasattr(options, 'width')
        height, width = inherits and known_size(options) or PUBLISHED_SIZE
        options.height, options.width = height, getattr(options, 'width', width)
    complete_size(options)


def known_size(options):
    """The (height, width) of the run to resume, or else of the checkpoint in --state; None if neither states it."""
    size = stated_size(read_object(Path(options.savedir) / 'opts.json')) if options.resume else None
    with contextlib.suppress(UserError):        # a missing or damaged --state is reported when it is loaded
        size = size or stated_size(read_checkpoint(options.state).content)
    return size


def check_declared(options):
    """UserError for a domain that is neither built in nor declared; --state describes old ones."""
    for name in options.domains[-1:] if options.state else options.domains:
        get_domain(name, data_paths(options.data))


def typed(name, value):
    """An option with this value, as the user types it."""
    return '--dropout' if (name, value) == ('no_dropout', False) else flag(name)


def check_uses(options):
    """Refuses given options that other methods use and this one does not. Runs before defaults are filled in."""
    given = [name for name in unused(options.method) if getattr(options, name, None) is not None]
    if given:
        named = ' '.join(typed(name, getattr(options, name)) for name in given)
        fitting = ', '.join(name for name, row in METHODS.items() if set(given) <= set(row.uses))
        raise UserError(f'--method {options.method} does not use {named}; leave '
                        + ('it out' if len(given) == 1 else 'them out')
                        + (f', or choose a method that does: {fitting}' if fitting else ''))


def complete_method(options):
    """Sets rates and dropout that were not given to the method's defaults."""
    method = METHODS[options.method]
    later = method if len(options.domains) > 1 else Method
    options.lr = getattr(options, 'lr', later.lr)
    options.no_dropout = getattr(options, 'no_dropout', not later.dropout)
    if options.shared_lr is None:
        options.shared_lr = {'slow': SLOW_RATE, 'full': options.lr, 'divided': options.lr / len(options.domains),
                             'frozen': 0.0}[method.shared]


def complete_weights(options):
    """Turns --weights none into None; refuses --weights after the first step, and together with --state."""
    if options.weights == 'none':
        options.weights = None
    if options.weights and len(options.domains) > 1 and not METHODS[options.method].joint:
        raise UserError(f'--weights is for the first step; {options.domains[-1]} starts from the weights in --state')
    if options.weights and options.state:
        raise UserError('--state and --weights both say what the first step starts from; give one')


def check_network(options):
    """Refuses options that are for ERFNet only, once --network is known."""
    name = options.network
    if name != ERFNET and options.recipe == 'released':
        raise UserError(f'--recipe released reproduces the published loops of {ERFNET}; leave it out for '
                        f'--network {name}')
    if name != ERFNET and options.imagenet_bn == 'dropped':
        raise UserError(f'--imagenet-bn is for the ImageNet encoder of {ERFNET}; leave it out for --network {name}')


def complete_fast(options):
    """Replaces --fast by the options it stands for, except those given; completes --precision and --augment."""
    if options.__dict__.pop('fast'):
        lack = not options.precision and without_bf16(pick_device(options.device))
        if lack:
            tell(f'--fast computes in float32, because {lack}')
        options.precision = options.precision or ('fp32' if lack else 'bf16')
        options.augment = options.augment or 'device'
        # Without torchrun, several GPUs use DataParallel, which cannot be compiled.
        alone = torch.cuda.device_count() == 1 or 'RANK' in os.environ
        options.compile |= options.device != 'cpu' and torch.cuda.is_available() and alone
    options.precision = options.precision or 'fp32'
    options.augment = options.augment or 'workers'


def check_graphs(options):
    """Refuses options that a CUDA graph cannot record."""
    for name, given in (('--precision fp16', options.precision == 'fp16'),
                        ('--distill-domains', options.distill_domains)):
        if options.cuda_graphs and given:
            raise UserError(f'--cuda-graphs cannot be combined with {name}; leave out one of them')


def check_domains(options):
    """Refuses domains, method and state that contradict each other, and an impossible temperature."""
    names, method = options.domains, METHODS[options.method]
    if len(set(names)) < len(names):
        raise UserError(f'--domains {" ".join(names)} names a domain twice')
    if method.one_domain and len(names) > 1:
        raise UserError(f'--method {options.method} learns one domain, not {len(names)}: {" ".join(names)}')
    if len(names) > 1 and not method.joint and not options.state:
        raise UserError(f'--state is missing: learning {names[-1]} after {", ".join(names[:-1])} needs the '
                        'checkpoint of that step')
    if method.mixed and options.batch_size % len(names):
        raise UserError(f'--batch-size {options.batch_size} is not a multiple of {len(names)}: with --method '
                        f'{options.method}, {len(names)} domains share each batch; use '
                        f'{-(-options.batch_size // len(names)) * len(names)}')
    if options.branch_from is not None and (method.joint or options.branch_from not in names[:-1]):
        raise UserError(f'--branch-from {options.branch_from} is not a domain that was trained before {names[-1]}: '
                        + (', '.join(names[:-1]) if names[:-1] and not method.joint else 'there is none'))
    if options.temperature is not None and not 1e-6 <= options.temperature <= 1e6:
        raise UserError(f'--temperature {options.temperature}: a value from 1e-6 to 1e6 is expected')
