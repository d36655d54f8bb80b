"""Command-line options: the native ones, named recipes, and the paper's dialect.

`parse_train` returns a namespace in native terms only; the paper's options are
translated in `translate_paper` and nothing behind it knows them.
"""
import argparse
import os
from pathlib import Path

import torch

from mdil.datasets.domains import domain_names, get_domain
from mdil.models.methods import METHODS, Method
from mdil.utils.errors import UserError

SLOW_RATE = 5e-6
DISTILLING = {'lambdac': 0.1, 'temperature': 1.0}       # of both recipes
# Options that mean nothing where nothing is distilled and the shared weights are frozen.
OF_MOVING = (*DISTILLING, 'distill_domains', 'shared_lr', 'old_bn', 'distillation', 'teacher_mode', 'steps_per_batch')


# Options of the published scripts that have no counterpart here, and why.
REFUSED = {
    '--cuda': '--device decides', '--model': '--method decides', '--steps-loss': 'the loss is shown as it changes',
    '--steps-plot': 'curves get a point each epoch', '--epochs-save': 'the latest, the one before and the best are kept',
    '--iouTrain': 'training mIoU is not computed', '--iouVal': 'validation mIoU is always computed',
    '--visualize': '--port sends curves to visdom', '--model-old': '--state names the previous model',
    '--subset': 'eval.py --split names the split'}


class HelpFormatter(argparse.HelpFormatter):
    """Adds the defaults that say something, where the help text does not speak of them itself."""

    def _get_help_string(self, action):
        value = action.default
        if 'default' in action.help or value is False or value in (None, '', [], argparse.SUPPRESS):
            return action.help
        shown = ' '.join(map(str, value)) if isinstance(value, list) else '%(default)s'
        return f'{action.help} (default: {shown})'


class Parser(argparse.ArgumentParser):
    """ArgumentParser that ends with one line, without the usage text."""

    def __init__(self, **keywords):
        super().__init__(allow_abbrev=False, formatter_class=HelpFormatter, **keywords)

    def error(self, message):
        reasons = '; '.join(f'{option}: {reason}' for option, reason in REFUSED.items()
                            if f' {option} ' in f'{message} '.replace('=', ' '))
        raise UserError(f'{message} ({reasons or "--help lists the options"})')


def recipe_settings(recipe, domains):
    """The options that `--recipe` stands for, in a step that ends with `domains` domains.

    'released' is what the published loops do: the two-domain loop and the
    three-domain loop differ in teacher mode and in optimiser steps.
    """
    if recipe == 'corrected':
        return {**DISTILLING, 'old_bn': 'frozen', 'distillation': 'kl', 'teacher_mode': 'eval', 'steps_per_batch': 1,
                'new_statistics': 'copied', 'imagenet_bn': 'loaded', 'published_metric': False}
    two_steps = domains > 2
    return {**DISTILLING, 'old_bn': 'released', 'distillation': 'released',
            'teacher_mode': 'train' if two_steps else 'eval', 'steps_per_batch': 2 if two_steps else 1,
            'new_statistics': 'fresh', 'imagenet_bn': 'dropped', 'published_metric': True}


def positive(text):
    """argparse type: an int of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f'{text} is not at least 1')
    return value


def natural(text):
    """argparse type: an int of at least 0."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f'{text} is negative')
    return value


def rate(text):
    """argparse type: a finite float of at least 0."""
    value = float(text)
    if not 0 <= value < float('inf'):
        raise argparse.ArgumentTypeError(f'{text} is not a finite number >= 0')
    return value


def side(text):
    """argparse type: an image side, a positive multiple of 8."""
    value = int(text)
    if value < 8 or value % 8:
        near = max(8, round(value / 8) * 8)
        raise argparse.ArgumentTypeError(f'{text} is not a positive multiple of 8; the nearest is {near}')
    return value


def data_options(parser):
    """Adds where the data lies: `--data-root` and `--data`."""
    group = parser.add_argument_group('data')
    group.add_argument('--data-root', '--datadir', default='data', metavar='DIR',
                       help='folder that holds the data sets')
    group.add_argument('--data', action='append', default=[], metavar='NAME=PATH',
                       help='place of one domain, or of your own domain (folder with domain.json); repeatable')
    return group


def size_options(group):
    """Adds the size that images are resized to."""
    group.add_argument('--height', type=side, default=512, help='image height, a multiple of 8')
    group.add_argument('--width', type=side, default=argparse.SUPPRESS,
                       help='image width, a multiple of 8 (default: twice the height)')


def machine_options(parser, workers=2):
    """Adds device, precision and workers."""
    group = parser.add_argument_group('machine')
    group.add_argument('--device', default='auto', help='auto, cpu, cuda or cuda:N')
    group.add_argument('--precision', choices=('fp32', 'bf16', 'fp16'), default='fp32', help='autocast type')
    group.add_argument('--num-workers', type=natural, default=workers, help='loader processes')
    return group


def data_paths(items):
    """{domain name: Path} of `--data NAME=PATH` items; UserError if one is malformed."""
    paths = {}
    for item in items:
        name, equals, path = item.partition('=')
        if not (name and equals and path):
            raise UserError(f'--data {item!r} is not NAME=PATH')
        paths[name] = Path(path)
    return paths


def train_parser():
    """The parser of train.py."""
    parser = Parser(prog='train.py', description='Learns one step: the last of --domains; --state knows the others.')
    group = parser.add_argument_group('what is learnt')
    group.add_argument('--domains', nargs='+', metavar='NAME', help='domains in order; the last is learnt')
    group.add_argument('--method', choices=tuple(METHODS),
                       help="row of the table of methods (default: adapters-only; ours with --recipe released and "
                            "the paper's options)")
    group.add_argument('--state', metavar='FILE', help='checkpoint of the previous step, or an ImageNet encoder')
    group.add_argument('--savedir', required=True, metavar='DIR', help='folder for checkpoints and metrics')
    group.add_argument('--model-name-suffix', default='', metavar='NAME', help='name of the run in its records')
    group = data_options(parser)
    group.add_argument('--cache', metavar='DIR', help='keep resized images and labels there, read from it after')
    group.add_argument('--skip-bad-files', action='store_true', help='read all files first, leave out the bad ones')
    group.add_argument(
        '--class-weights', default='published', metavar='HOW',
        help='cross-entropy weights: published (computed where there are none), computed, none, or a JSON file')
    method_options(parser)
    group = parser.add_argument_group('training')
    group.add_argument('--num-epochs', type=positive, default=150, help='epochs')
    group.add_argument('--batch-size', type=positive, default=6, help='images per batch, over all devices')
    group.add_argument('--lr', type=rate, default=argparse.SUPPRESS,
                       help='rate of the new domain, and of all in step 1 (default: 0.0005, later by method)')
    size_options(group)
    group.add_argument('--seed', type=natural, default=0, help='seed of weights, order, augmentation, dropout')
    group.add_argument('--val-every', type=positive, default=1, metavar='N',
                       help='validate every N epochs (and after the last)')
    group.add_argument('--limit-batches', type=positive, metavar='N', help='batches per epoch at most, for trials')
    group.add_argument('--resume', action='store_true', help='go on from the checkpoint in --savedir')
    group.add_argument('--checkpoint-minutes', type=rate, metavar='M',
                       help='write checkpoints within epochs too, M minutes apart')
    group = machine_options(parser)
    group.add_argument('--compile', action='store_true', help='torch.compile networks and losses (slow start, on GPUs)')
    group.add_argument('--fast', action='store_true',
                       help='the same as --precision bf16 --augment device, and on a GPU --compile')
    group.add_argument('--deterministic', action='store_true', help='on a GPU, algorithms that repeat to the last bit')
    group.add_argument('--augment', choices=('workers', 'device'), default='workers',
                       help='who flips and shifts; the result is the same')
    group.add_argument('--parallel', choices=('auto', 'none', 'dp', 'ddp'), default='auto',
                       help='several devices: auto is ddp under torchrun, else dp')
    group.add_argument('--sync-bn', action='store_true', help='batch statistics over all processes, on GPUs')
    group = parser.add_argument_group('live curves (visdom)')
    group.add_argument('--port', type=natural, help='port of a running visdom server')
    group.add_argument('--server', default='http://localhost', help='its address')
    group.add_argument('--env', metavar='NAME', help='its environment to draw into (default: by method and domains)')
    paper_options(parser)
    return parser


def method_options(parser):
    """Adds the recipe and each difference between the recipes."""
    group = parser.add_argument_group('recipe', 'what is not given is set by --recipe')
    group.add_argument('--recipe', choices=('corrected', 'released'), default='corrected',
                       help='corrected, or the published loops to rounding')
    group.add_argument('--lambdac', type=rate, metavar='WEIGHT',
                       help=f'weight of the distillation term (default: {DISTILLING["lambdac"]})')
    group.add_argument('--temperature', type=rate, metavar='T',
                       help=f'temperature of --distillation kl (default: {DISTILLING["temperature"]})')
    group.add_argument('--distill-domains', type=positive, metavar='K',
                       help='old domains, drawn anew for each batch, that are distilled (default: all)')
    group.add_argument('--shared-lr', type=rate, metavar='RATE',
                       help='rate of the shared weights after the first domain (default: by method)')
    group.add_argument('--no-dropout', action='store_true', default=argparse.SUPPRESS,
                       help="the student's encoder drops out nothing (default: by method)")
    group.add_argument('--dropout', action='store_false', dest='no_dropout', default=argparse.SUPPRESS,
                       help="the student's encoder drops out (default: by method)")
    group.add_argument('--old-bn', choices=('frozen', 'batch', 'released'),
                       help='old branches: frozen, batch statistics without update, or as published (overwritten)')
    group.add_argument('--distillation', choices=('kl', 'released'), help='per-pixel KL, or the published term')
    group.add_argument('--teacher-mode', choices=('eval', 'train'), help='mode of the frozen previous model')
    group.add_argument('--steps-per-batch', type=int, choices=(1, 2),
                       help='one step on the sum, or one on each term')
    group.add_argument('--new-statistics', choices=('copied', 'fresh'),
                       help="running statistics that the new domain's encoder branch starts from")
    group.add_argument('--imagenet-bn', choices=('loaded', 'dropped'),
                       help="whether the ImageNet encoder's batch norms are taken over")
    group.add_argument('--published-metric', action=argparse.BooleanOptionalAction,
                       help='absent classes count 0 in the mIoU')


def paper_options(parser):
    """Adds the published scripts' options."""
    group = parser.add_argument_group("the paper's options", 'translated to the native ones above')
    many = {'nargs': '+', 'metavar': 'NAME'}
    group.add_argument('--dataset', metavar='NAME', help='the domain to learn')
    group.add_argument('--dataset-new', '--dataset_new', metavar='NAME', help='the domain to learn')
    group.add_argument('--dataset-old', '--dataset_old', help='the domains known', **many)
    group.add_argument('--datasets', help='all domains, in order', **many)
    counts = {'nargs': '+', 'type': positive, 'metavar': 'N'}
    group.add_argument('--num-classes', '--num_classes', help='classes of each domain, void included', **counts)
    group.add_argument('--num-classes-old', '--num_classes_old', help='of the domains known', **counts)
    group.add_argument('--num-classes-new', '--num_classes_new', help='of the domain to learn', **counts)
    group.add_argument('--current-task', '--current_task', type=natural, metavar='N', help='index of the step, from 0')
    group.add_argument('--nb-tasks', '--nb_tasks', type=positive, metavar='N', help='number of domains after the step')
    group.add_argument('--finetune', action='store_true', help='the same as --method fine-tune')
    group.add_argument('--decoder', action='store_true', help='train encoder and decoder (always so)')
    group.add_argument('--pretrainedEncoder', metavar='FILE', help='the same as --state, an ImageNet encoder')


def parse_train(argv=None):
    """Native options of train.py, complete and consistent; UserError where they are not."""
    options = train_parser().parse_args(argv)
    translate_paper(options)
    if not options.domains:
        raise UserError('say which domains: --domains NAME [NAME ...], the last is learnt')
    paths = data_paths(options.data)
    options.domains = [get_domain(name, paths).name for name in options.domains]
    complete_size(options)
    options.method = options.method or default_method(options)
    check_domains(options)
    complete_fast(options)
    for name, value in recipe_settings(options.recipe, len(options.domains)).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    complete_method(options)
    return options


def default_method(options):
    """The method where none is said: the published loops' own, else one that cannot forget."""
    if options.recipe == 'released':
        return 'ours'
    given = [f'--{name.replace("_", "-")}' for name in OF_MOVING if getattr(options, name) is not None]
    if given:
        raise UserError(f'{" ".join(given)}: the default --method adapters-only moves no shared weights and distils '
                        'nothing; add --method ours')
    return 'adapters-only'


def complete_method(options):
    """Sets rates and dropout that were not given to the method's."""
    method = METHODS[options.method]
    later = method if len(options.domains) > 1 else Method
    options.lr = getattr(options, 'lr', later.lr)
    options.no_dropout = getattr(options, 'no_dropout', not later.dropout)
    if method.shared == 'frozen' and options.shared_lr:
        raise UserError(f'--method {options.method} freezes the shared weights, --shared-lr {options.shared_lr} moves '
                        'them; leave it out, or choose another method')
    if options.shared_lr is None:
        options.shared_lr = {'slow': SLOW_RATE, 'full': options.lr, 'frozen': 0.0}[method.shared]


def complete_size(options):
    """Sets width to twice the height unless it was given."""
    options.width = getattr(options, 'width', 2 * options.height)


def complete_fast(options):
    """Replaces --fast by what it stands for."""
    if options.__dict__.pop('fast'):
        if options.precision == 'fp16':
            raise UserError('--fast stands for --precision bf16; give one of --fast and --precision fp16')
        options.precision, options.augment = 'bf16', 'device'
        # DataParallel, which several GPUs get without torchrun, cannot be compiled.
        alone = torch.cuda.device_count() == 1 or 'RANK' in os.environ
        options.compile |= options.device != 'cpu' and torch.cuda.is_available() and alone


def check_domains(options):
    """Refuses domains, method and state that contradict one another."""
    names, method = options.domains, METHODS[options.method]
    if len(set(names)) < len(names):
        raise UserError(f'--domains {" ".join(names)} names a domain twice')
    if method.lonely and len(names) > 1:
        raise UserError(f'--method {options.method} learns one domain, not {len(names)}: {" ".join(names)}')
    if len(names) > 1 and not method.joint and not options.state:
        raise UserError(f'--state is missing: learning {names[-1]} after {", ".join(names[:-1])} needs the '
                        'checkpoint that knows the latter')
    if options.batch_size * options.height * options.width == 64:
        raise UserError('--batch-size 1 with --height 8 and --width 8 leaves batch norms one value; enlarge one of them')
    if options.temperature == 0:
        raise UserError('--temperature must be above 0')


def translate_paper(options):
    """Turns the paper's options into the native ones and removes them from `options`."""
    paper = {name: options.__dict__.pop(name) for name in (
        'dataset', 'dataset_new', 'dataset_old', 'datasets', 'num_classes', 'num_classes_old',
        'num_classes_new', 'current_task', 'nb_tasks', 'finetune', 'decoder', 'pretrainedEncoder')}
    options.domains = paper_domains(paper, options.domains)
    options.method = paper_method(paper, options.method, options.domains)
    if paper['pretrainedEncoder']:
        if options.state and options.state != paper['pretrainedEncoder']:
            raise UserError('--state and --pretrainedEncoder name two files; give one')
        options.state = paper['pretrainedEncoder']
    check_counts(paper, options)


def agree(what, values):
    """The one value of {option: value} that are not None; UserError if they differ."""
    given = {option: value for option, value in values.items() if value is not None}
    if len({str(value) for value in given.values()}) > 1:
        raise UserError(f'{what} contradict: ' + ', '.join(f'{o} {show(v)}' for o, v in given.items()))
    return next(iter(given.values()), None)


def show(value):
    return ' '.join(map(str, value)) if isinstance(value, list) else str(value)


def canonical(names):
    """Domain names of aliases; a name that is not built in stays."""
    known = domain_names()
    return names and [known.get(name.lower(), name) for name in names]


def paper_domains(paper, domains):
    """All domains in order, from the paper's options and --domains."""
    one = lambda name: canonical([name])[0] if name else None
    new = agree('domain options', {'--dataset': one(paper['dataset']), '--dataset-new': one(paper['dataset_new'])})
    old = canonical(paper['dataset_old'])
    listed = agree('domain options', {'--domains': canonical(domains), '--datasets': canonical(paper['datasets'])})
    if listed is None:
        return (old or []) + [new] if new else None
    if new and listed[-1] != new:
        raise UserError(f'domain options contradict: the last of {show(listed)} is not {new}')
    if old and listed[:-1] != old:
        raise UserError(f'domain options contradict: --dataset-old {show(old)} are not the first of {show(listed)}')
    return listed


def paper_method(paper, method, domains):
    """The method: --finetune, and the multi-task and single-task argument lists, by their shape; None of native options.

    The published multi-task list names all of --datasets without a new one or a
    --current-task; the single-task list has --decoder and one domain. Others mean `ours`.
    """
    implied = 'ours' if any(value is not None and value is not False for value in paper.values()) else None
    if paper['finetune']:
        implied = 'fine-tune'
    elif paper['datasets'] and paper['current_task'] is None and not (paper['dataset'] or paper['dataset_new']):
        implied = 'multi-task'
    elif paper['decoder'] and paper['current_task'] is None and domains and len(domains) == 1:
        implied = 'single-task'
    if paper['finetune'] and method not in (None, 'fine-tune'):
        raise UserError(f'--finetune and --method {method} contradict')
    return method or implied


def check_counts(paper, options):
    """Refuses the paper's class counts and task numbers that do not fit the domains."""
    if not options.domains:
        return
    paths = data_paths(options.data)
    counts = [get_domain(name, paths).num_classes for name in options.domains]
    for option, given, expected in (('--num-classes', paper['num_classes'], counts),
                                    ('--num-classes-old', paper['num_classes_old'], counts[:-1]),
                                    ('--num-classes-new', paper['num_classes_new'], counts[-1:]),
                                    ('--nb-tasks', paper['nb_tasks'], len(counts)),
                                    ('--current-task', paper['current_task'], len(counts) - 1)):
        if given is not None and given != expected:
            raise UserError(f'{option} {show(given)} contradicts the domains {show(options.domains)}: '
                            f'expected {show(expected) or "none"}')
