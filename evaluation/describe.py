"""Prints the model card of a checkpoint: domains and classes, size, cost, and how it was trained.

    python -m mdil describe runs/mdil/step3-IDD/model_best.pth.tar [--height 512 --width 1024]

The cost is that of one image through the encoder and one domain's decoder at --width x --height,
in FLOP: two for each multiply-add of a convolution. Batch norms, activations and biases are not
counted. The network is not run; torch's counter works on tensors without data.
"""
import copy
import textwrap
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from mdil.datasets.domains import DOMAINS, canonical, domain_of
from mdil.evaluation import tables
from mdil.models import METHODS
from mdil.models.checkpoint import check_given, load_network, read_checkpoint
from mdil.models.methods import nameless_options, unused
from mdil.models.networks import get_network
from mdil.training import records
from mdil.utils.errors import UserError, printable, run_main
from mdil.utils.parser import Parser, complete_size, data_options, data_paths, flag, show, size_options

# The options to show, in this order; those that a file does not hold, or its method does not use, are left out.
TRAINING = ('domains', 'method', 'network', 'weights', 'recipe', 'state', 'branch_from', 'num_epochs', 'batch_size',
            'sync_bn', 'lr', 'shared_lr', 'schedule', 'no_dropout', 'lambdac', 'temperature', 'distill_domains',
            'old_bn', 'distillation', 'teacher_mode', 'steps_per_batch', 'frozen_encoder', 'new_decoder',
            'new_statistics', 'imagenet_bn', 'label_padding', 'rounds', 'class_weights', 'height', 'width', 'precision',
            'seed', 'skip_bad_files', 'limit_batches', 'val_every', 'published_metric')


def parse(argv=None):
    parser = Parser(prog='python -m mdil describe', description='Prints the model card of a checkpoint.')
    parser.add_argument('state', metavar='CKPT', help='checkpoint of this code or a published one')
    nameless_options(parser)
    size_options(parser.add_argument_group('image size for the cost'))
    data_options(parser)
    options = parser.parse_args(argv)
    complete_size(options)
    return options


def gflop(model, number, height, width):
    """GFLOP for one image (3, height, width) in the branch `number`: 2 FLOP for each multiply-add of a convolution."""
    model = copy.deepcopy(model).to('meta').eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, 3, height, width, device='meta'), number)
    return counter.get_total_flops() / 1e9


def parameter_counts(model):
    """Parameter counts of a MultiDomainNet: {'shared', 'total', 'domains': [those of each domain's own branch]}."""
    count = lambda parameters: sum(parameter.numel() for parameter in parameters)
    return {'shared': count(model.shared_parameters()), 'total': count(model.parameters()),
            'domains': [count(model.branch_parameters(number)) for number in range(len(model.views))]}


def classes_of(checkpoint, options):
    """[(name, class names or None)] of each domain; the name is '?' if neither the file nor the options give it."""
    entries = checkpoint.content['domains'] if checkpoint.domains else [{'name': name} for name in options.domains]
    found = []
    for number, count in enumerate(checkpoint.layout.num_classes):
        entry = entries[number] if number < len(entries) else {'name': '?'}
        try:
            domain = domain_of(entry, data_paths(options.data))
            found.append((domain.name, domain.classes if domain.num_classes == count else None))
        except UserError:       # a user's own domain that neither the file nor --data describes
            found.append((entry['name'], None))
    return found


def domain_rows(model, checkpoint, options):
    """(header, rows): each domain's classes, its own parameters, their share of all parameters, and its cost."""
    counts, rows = parameter_counts(model), []
    for number, (name, _) in enumerate(classes_of(checkpoint, options)):
        own = counts['domains'][number]
        rows.append([name, f'{checkpoint.layout.num_classes[number] - 1} + void', f'{own:,}',
                     tables.number(100 * own / counts['total'], 1),
                     tables.number(gflop(model, number, options.height, options.width), 1)])
    shared = counts['shared']
    rows.append(['shared by all', '', f'{shared:,}', tables.number(100 * shared / counts['total'], 1), ''])
    rows.append(['together', '', f'{counts["total"]:,}', '100.0', ''])
    return ['domain', 'classes', 'parameters', '% of all', 'GFLOP per image'], rows


def best_lines(checkpoint):
    """Lines about the best validation results, from the file and from the metrics.jsonl next to it."""
    content, lines = checkpoint.content, []
    if isinstance(content.get('best_acc'), float) and content['best_acc'] >= 0:     # -inf before any validation
        lines.append(f'best validation mIoU of the run: {tables.number(content["best_acc"])}')
    epochs = [line for line in records.read_metrics(Path(checkpoint.source).parent)
              if line['epoch'] == content.get('epoch')]
    for name, entry in epochs[-1]['val'].items() if epochs else ():
        lines.append(f'  {name}: mIoU {tables.number(entry["miou"])}, loss {tables.number(entry["loss"], 4)} '
                     f'after epoch {content["epoch"]}')
    return lines or ['not recorded in the file']


def training_lines(checkpoint):
    """Lines about the training, from the options stored in the file."""
    options = checkpoint.content.get('options') or {}
    idle = unused(checkpoint.method) if checkpoint.method else ()
    lines = [f'{flag(name)[2:]}: {show(options[name])}' for name in TRAINING
             if options.get(name) is not None and name not in idle]
    own = [name for name in checkpoint.domains or () if canonical(name) not in DOMAINS]
    if own and options.get('class_weights') == 'published':
        lines.append(f'class-weights of {", ".join(own)}: from domain.json, or computed (none are published)')
    if 'epoch' in checkpoint.content and options:
        lines.append(f'this file: after epoch {checkpoint.content.get("epoch")} of {options.get("num_epochs")}')
    return lines or ['not recorded in the file']


def card(checkpoint, options):
    """The model card as text."""
    model = load_network(checkpoint, options.method)
    check_given(options.domains, checkpoint)
    method = checkpoint.method or options.method      # one that merely fits is not recorded
    about = f'{method}: {METHODS[method].about}' if method else 'not recorded in the file'
    network = f'{checkpoint.layout.network}: {get_network(checkpoint.layout.network).about}'
    parts = [f'{checkpoint.source}\n{checkpoint.layout.kind}\nnetwork: {network}\nmethod: {about}',
             tables.plain(*domain_rows(model, checkpoint, options))
             + f'\n(one image of {options.width}x{options.height} through one branch; 2 FLOP for each multiply-add)',
             'Classes\n' + '\n'.join(textwrap.fill(f'{name}: {printable(", ".join(names or ["names not known"]))}', 100,
                                                   initial_indent='  ', subsequent_indent='    ')
                                     for name, names in classes_of(checkpoint, options)),
             'Best results\n  ' + '\n  '.join(best_lines(checkpoint)),
             'How it was trained\n  ' + '\n  '.join(training_lines(checkpoint))]
    return '\n\n'.join(parts)


def main(argv=None):
    options = parse(argv)
    print(card(read_checkpoint(options.state), options))


if __name__ == '__main__':
    run_main(main)
