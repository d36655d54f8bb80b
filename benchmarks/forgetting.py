"""What makes a sequence forget: methods and options, orders of domains and seeds side by side.

    python -m benchmarks.forgetting --data-root DATA --out runs/forgetting --class-weights computed \\
        --epochs cityscapes=60 camvid=20 idd-lite=10 --json FILE --markdown FILE --curves FILE --figure FILE
    python -m benchmarks.forgetting --data-root DATA --out DIR --epochs 150 --rows fine-tune mdil \\
        "mdil --shared-lr 5e-5 --lambdac 1" --orders "CS BDD IDD" --steps 2

Every step is a run of train.py in OUT/<domains so far>/seed<S>/<method and options>-<digest of all
options and of the step before>/, its output in log.txt there. Steps of equal options after equal
steps are run once, whatever rows they belong to; finished ones are skipped, interrupted ones resumed. Every
state is then evaluated on all domains that it knows, in the three columns of benchmarks.scoring
(scores-*.json next to it). Exit status 1 if a step failed; the tables are of what is there.
"""
import signal

from mdil.benchmarks.scoring import evaluated, make_evaluator
from mdil.benchmarks.sequence_tables import (add_validated, all_costs, all_figures, best_table, column_table,
                                             draw_curves, draw_rows, paired_table, summary_table)
from mdil.benchmarks.sequences import (DEFAULT_ROWS, FILES, FIRST, JOINT, ROWS, plan, run_steps, steps_of,
                                       training_images)
from mdil.datasets import get_domain
from mdil.eval import PROTOCOL
from mdil.evaluation import pictures, tables
from mdil.models.networks import DEFAULT as ERFNET, network_name
from mdil.training import records
from mdil.utils.errors import UserError, run_main
from mdil.utils.files import check_writable, write_json, write_text
from mdil.utils.parallel import pick_device, session
from mdil.utils.parser import (Parser, complete_size, data_options, data_paths, machine_options, positive,
                               rate, seed_number, size_options)

ORDERS = 'cityscapes camvid idd-lite', 'idd-lite camvid cityscapes'
OWN_PATHS = 'out', 'data_root', 'data', 'cache', 'json', 'markdown', 'curves', 'figure'    # do not affect results
ABOUT_ROWS = ('Rows: a method, and options of train.py in the steps after the first (of methods with one step: in '
              f'that), after {FIRST} those in the first; fine-tune-copies: every domain keeps the network that had '
              'learnt it; released: mdil --recipe released. '
              'Columns: the network as the step left it (trained); with the running statistics of batch norms '
              "estimated anew from each domain's own training images (estimated); with those that it had at the end of "
              "the domain's own step, in shared batch norms too (kept). What these two recover of a loss is due to "
              'statistics.')


def describe(evaluator, options):
    """What was run and what the columns are, one paragraph."""
    epochs = ', '.join(f'{name} {count}'.strip() for name, count in options.epochs.items())
    versions = records.environment(evaluator.place.device)
    return (tables.describe({name: getattr(evaluator.options, name) for name in PROTOCOL})
            + f' {options.network}, random initial weights; epochs: {epochs}; batches of {options.batch_size}; '
            f'class weights {options.class_weights}; {options.precision}; seeds {", ".join(map(str, options.seeds))}'
            + (' (mean and sample standard deviation)' if len(options.seeds) > 1 else '')
            + f'; the {options.which} state of every step. New when learnt: mean over the domains after the first, '
            'each at its own step. Added: parameters of the last domain. Units: forward passes per image of the last '
            f'step (a backward pass is two). Images/s with {options.jobs} runs at once. torch {versions["torch"]} on '
            f'{versions["device"]}, revision {versions["git"]}.')


def tables_of(order, rows, costs, options):
    """All Tables of an order."""
    paired = [paired_table(order, rows, options.against)] if options.against in rows else []
    return [summary_table(order, rows, costs, options), column_table(order, rows, options), *paired,
            best_table(order, rows, options)]


def report(plans, found, evaluator, options):
    """Prints the tables and writes the files."""
    figures, costs = all_figures(found, options), all_costs(plans, found, options)
    add_validated(figures, plans, options)
    about = describe(evaluator, options)
    shown = [table for order, rows in figures.items() for table in tables_of(order, rows, costs[order], options)]
    print(tables.wrapped(about), *map(tables.terminal, shown), sep='\n\n')
    if options.markdown:
        write_text(options.markdown, tables.markdown_document(f'{about}\n\n{ABOUT_ROWS}', shown))
    if options.json:
        orders = {' '.join(order): {name: {'cost': costs[order][name], 'seeds': seeds} for name, seeds in rows.items()}
                  for order, rows in figures.items()}
        stated = {name: value for name, value in vars(options).items() if name not in OWN_PATHS}
        write_json(options.json, {'options': {**stated, 'orders': list(orders)},
                                  'versions': records.environment(evaluator.place.device), 'orders': orders})
    if options.curves:
        draw_curves(plans, options)
    longer = {order: rows for order, rows in figures.items() if len(order) > 1}
    if options.figure and longer:
        draw_rows(longer, options)


def forgetting_parser():
    """The parser."""
    parser = Parser(prog='python -m benchmarks.forgetting', description='Compares whole sequences.')
    group = parser.add_argument_group('what to compare')
    group.add_argument('--rows', nargs='+', default=DEFAULT_ROWS, metavar='"METHOD OPTIONS"',
                       help='rows of the table: methods, with options of train.py for the steps after the first (of '
                            f'methods with one step: for that) and after {FIRST} for the first, each row quoted; or '
                            f'{", ".join(ROWS)} (default: these, the methods, and released with one difference each '
                            'switched off)')
    group.add_argument('--orders', nargs='+', default=list(ORDERS), metavar='"NAME NAME ..."',
                       help='orders of domains (default: "{}" and "{}")'.format(*ORDERS))
    group.add_argument('--seeds', nargs='+', type=seed_number, default=[0, 1, 2], metavar='N', help='seeds')
    group.add_argument('--against', metavar='"METHOD OPTIONS"',
                       help='one of --rows: a table of how the other rows differ from it, paired by seed, with p')
    group.add_argument('--steps', type=positive, metavar='N', help='stop after step N')
    group.add_argument('--which', choices=tuple(FILES), default='latest',
                       help='state of a step to evaluate and to start the next one from: the latest, or the best on '
                            'its domain')
    training_options(parser)
    data_options(parser).add_argument('--cache', metavar='DIR', help='keep resized images and labels there')
    machine_options(parser).add_argument('--jobs', type=positive, default=1, metavar='N', help='steps that run at once')
    group = parser.add_argument_group('results')
    group.add_argument('--out', required=True, metavar='DIR', help='folder of all runs')
    for name, text in (('json', 'all figures'), ('markdown', 'the tables'),
                       ('curves', 'a figure of how every row learns each domain'),
                       ('figure', 'a figure of the rows: new domains over forgetting')):
        group.add_argument(f'--{name}', metavar='FILE', help=f'write {text}')
    return parser


def training_options(parser):
    """Adds what all rows have in common."""
    group = parser.add_argument_group('training, the same for all rows')
    group.add_argument('--epochs', nargs='+', required=True, metavar='N|NAME=N',
                       help='epochs of every domain, or of each; multi-task=N for the joint run (default: the fewest)')
    group.add_argument('--network', type=network_name, default=ERFNET, metavar='NAME', help='as in train.py')
    size_options(group)
    group.set_defaults(height=128)
    group.add_argument('--batch-size', type=positive, default=6, help='images per batch')
    group.add_argument('--lr', type=rate, help="rate of new domains (default: train.py's)")
    group.add_argument('--class-weights', default='computed', metavar='HOW', help='as in train.py')
    group.add_argument('--val-every', type=positive, default=1, metavar='N', help='validate every N epochs')
    group.add_argument('--limit-batches', type=positive, metavar='N', help='at most N batches per epoch, for trials')


def parsed_epochs(items, paths):
    """{domain, or '' for any: epochs} of --epochs."""
    found = {}
    for item in items:
        name, equals, count = item.rpartition('=')
        if not count.isdecimal() or int(count) < 1 or equals and not name:
            raise UserError(f'--epochs {item!r} is neither a number nor NAME=N')
        found[name if name in ('', JOINT) else get_domain(name, paths).name] = int(count)
    return found


def parsed_orders(texts, steps, paths):
    """Tuples of domain names of --orders, cut to `steps`, each once."""
    orders = [tuple(get_domain(name, paths).name for name in text.split())[:steps] for text in texts]
    if not all(orders):
        raise UserError('--orders holds an empty order; each is a quoted list of domains')
    return list(dict.fromkeys(orders))


def parse(argv=None):
    """Options, complete and checked."""
    options = forgetting_parser().parse_args(argv)
    complete_size(options)
    paths = data_paths(options.data)
    options.orders = parsed_orders(options.orders, options.steps, paths)
    options.epochs = parsed_epochs(options.epochs, paths)
    options.rows = list(dict.fromkeys(' '.join(text.split()) for text in options.rows))
    options.seeds = list(dict.fromkeys(options.seeds))
    options.against = options.against and ' '.join(options.against.split())
    if options.against and options.against not in options.rows:
        raise UserError(f'--against {options.against!r} is not one of --rows: {", ".join(options.rows)}')
    for name in ('json', 'markdown', 'curves', 'figure'):
        if getattr(options, name):
            check_writable(f'--{name}', getattr(options, name))
    check_writable('--out', options.out, folder=True)
    pick_device(options.device)
    for path in filter(None, (options.curves, options.figure)):
        pictures.figure_format(path)
    if options.figure and all(len(order) < 2 for order in options.orders):
        raise UserError('--figure is of forgetting, but no order of --orders and --steps has a second step')
    return options


def check_data(options):
    """UserError unless the training images of all domains are at hand."""
    for name in dict.fromkeys(name for order in options.orders for name in order):
        training_images(options, name)


def main(argv=None):
    options = parse(argv)
    plans = plan(options)
    check_data(options)
    failures = run_steps(steps_of(plans), options)
    with session(options.device) as place:
        evaluator = make_evaluator(options, place)
        found = evaluated(plans, evaluator, options)
        if found:
            report(plans, found, evaluator, options)
    return 1 if failures else None


if __name__ == '__main__':
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    run_main(main)
