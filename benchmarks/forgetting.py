"""What makes a sequence forget: methods and options, orders of domains and seeds side by side.

    python -m benchmarks.forgetting --data-root DATA --out runs/forgetting --class-weights computed \\
        --epochs cityscapes=60 camvid=20 idd-lite=10 --json FILE --markdown FILE --curves FILE --figure FILE
    python -m benchmarks.forgetting --data-root DATA --out DIR --epochs 150 --rows fine-tune mdil \\
        "mdil --shared-lr 5e-5 --lambdac 1" --orders "CS BDD IDD" --steps 2

Every step is a run of train.py in OUT/<domains so far>/seed<S>/<method and options>-<digest of all
options and of the step before>/, its output in log.txt there. Steps of equal options after equal
steps are run once, whatever rows they are of; finished ones are skipped, broken ones go on. Every
state is then evaluated on all domains that it knows (scores-*.json next to it). Exit status 1 if a
step failed; the tables are of what is there.
"""
import argparse
import json
import signal
import statistics

from tqdm import tqdm

from mdil.benchmarks.sequences import (DEFAULT_ROWS, FILES, JOINT, ROWS, SINGLE, data_arguments, finished, make_state,
                                       parsed, plan, row_of, run_steps, steps_of, training_images)
from mdil.datasets import get_domain
from mdil.eval import PROTOCOL, eval_parser
from mdil.evaluation import metrics, pictures, tables
from mdil.evaluation.evaluation import Evaluator
from mdil.evaluation.tables import Table, number, spread
from mdil.models import METHODS, build_model
from mdil.training import records
from mdil.training.plan import plan_step
from mdil.utils.errors import UserError, run_main
from mdil.utils.files import check_writable, write_json, write_text
from mdil.utils.parallel import pick_device, session
from mdil.utils.parser import (Parser, complete_size, data_options, data_paths, machine_options, positive,
                               rate, seed_number, size_options)

ORDERS = 'cityscapes camvid idd-lite', 'idd-lite camvid cityscapes'
OWN_PATHS = 'out', 'data_root', 'data', 'cache', 'json', 'markdown', 'curves', 'figure'    # say nothing of a result
MARKERS = 'osD^v<>Pphd'
ABOUT_ROWS = ('Rows: a method, and options of train.py in the steps after the first (single-task, multi-task: in all); '
              'fine-tune-copies: every domain keeps the network that had learnt it; released: mdil --recipe released; '
              'released-put-back: the same, with the statistics of the old batch norms put back before the evaluation.')


def make_evaluator(options, place):
    """The Evaluator of all states."""
    arguments = [*data_arguments(options), '--state', '-', '--num-workers', options.num_workers]
    for name in ('height', 'width', 'batch_size', 'precision', 'limit_batches'):
        if getattr(options, name) is not None:
            arguments += [f'--{name.replace("_", "-")}', getattr(options, name)]
    return Evaluator(eval_parser().parse_args(list(map(str, arguments))), place)


def scores(state, evaluator, options):
    """{domain: {'miou', 'accuracy', 'iou'}} of a state, from its file where that was made the same way."""
    path, protocol = state.scores(options), {name: getattr(evaluator.options, name) for name in PROTOCOL}
    if path.exists():
        known = json.loads(path.read_text())
        if known['protocol'] == protocol:
            return known['domains']
    make_state(state, options)
    model, domains = evaluator.load(state.file(options))
    matrices = [evaluator.score(model, index, domain).matrix for index, domain in enumerate(domains)]
    entries = tables.without_nan({domain.name: evaluator.entry(matrix, domain, domain)
                                  for domain, matrix in zip(domains, matrices)})
    write_json(path, {'protocol': protocol, 'domains': entries})
    return entries


def evaluated(plans, evaluator, options):
    """{(order, row name, seed): [{domain: mIoU}] after each step} of the sequences whose steps are all finished."""
    complete = {key: states for key, states in plans.items() if all(finished(state.step, options) for state in states)}
    found = {}
    for key, states in tqdm(complete.items(), unit='sequence', disable=None):
        steps = [{name: entry['miou'] for name, entry in scores(state, evaluator, options).items()} for state in states]
        row = row_of(key[1])
        if METHODS[row.method].lonely:
            steps = [{name: value for step in steps for name, value in step.items()}]
        found[key] = kept(steps) if row.copies else steps
    return found


def kept(steps):
    """[{domain: mIoU}] after each step where every domain's is that of the step that learnt it."""
    learnt = metrics.learnt_at(steps)
    return [{name: learnt[name] for name in step} for step in steps]


def sequence_figures(order, steps, single):
    """Figures of one sequence, from [{domain: mIoU}] after each step and {domain: single-task mIoU}.

    new: mean over the domains after the first of the mIoU at the step that learnt it.
    """
    learnt = metrics.learnt_at(steps)
    new = [learnt[name] for name in order[1:]]
    return {**metrics.summary(steps, single), 'steps': steps, 'learnt': learnt,
            'new': statistics.fmean(new) if new else None}


def all_figures(found):
    """{order: {row name: {seed: figures of the sequence}}}."""
    result = {}
    for (order, name, seed), steps in found.items():
        single = found.get((order, SINGLE, seed), [{}])[0]
        result.setdefault(order, {}).setdefault(name, {})[seed] = sequence_figures(order, steps, single)
    return result


def units(step):
    """Forward passes that an image of the step costs, a backward pass being two."""
    options, old = parsed(step.arguments), len(step.domains) - 1
    if not plan_step(argparse.Namespace(**options)).needs_teacher:
        return 3
    return 3 + min(old, options.get('distill_domains') or old) * (3 + 1)


def added(step, row, options):
    """Parameters that the last of the step's domains added: its branch, or a network of its own."""
    counts = [get_domain(name, data_paths(options.data)).num_classes for name in step.domains]
    if row.copies or METHODS[step.method].lonely:
        return sum(parameter.numel() for parameter in build_model(counts[-1:], SINGLE).parameters())
    return sum(parameter.numel() for parameter in build_model(counts, step.method).branch_parameters(len(counts) - 1))


def cost(steps, row, options):
    """What the last steps of a row's seeds cost: {'added_parameters', 'units', 'images_per_second' (median)}."""
    lines = [line for step in steps for line in records.read_metrics(step.folder(options))]
    rates = [line['train']['images_per_second'] for line in lines]
    return {'added_parameters': added(steps[0], row, options), 'units': units(steps[0]),
            'images_per_second': statistics.median(rates) if rates else None}


def all_costs(plans, found, options):
    """{order: {row name: cost of its last step}} of what was evaluated."""
    steps = {}
    for order, name, seed in found:
        steps.setdefault(order, {}).setdefault(name, []).append(plans[order, name, seed][-1].step)
    return {order: {name: cost(last, row_of(name), options) for name, last in rows.items()}
            for order, rows in steps.items()}


def label(name, seeds, options):
    """A row's name, with the number of its seeds where some are missing."""
    return name if len(seeds) == len(options.seeds) else f'{name} ({len(seeds)} of {len(options.seeds)} seeds)'


def summary_table(order, rows, costs, options):
    """mIoU after the last step, forgetting, transfer and cost of each row of an order."""
    columns = {**{name: lambda one, name=name: one['steps'][-1][name] for name in order},
               **{f'{name} forgotten': lambda one, name=name: one['forgetting'].get(name) for name in order[:-1]},
               'new when learnt': lambda one: one['new'], tables.DELTA: lambda one: one['delta_m']}
    lines = [[label(name, seeds, options),
              *(spread([column(one) for one in seeds.values()]) for column in columns.values()),
              f'{costs[name]["added_parameters"] / 1e6:.2f}', str(costs[name]['units']),
              number(costs[name]['images_per_second'], 1)] for name, seeds in rows.items()]
    return Table(f'{", then ".join(order)}: mIoU after the last step', f'forgetting-{"-".join(order)}',
                 ['row', *columns, 'added M', 'units', 'images/s'], [lines])


def step_table(order, rows, options):
    """mIoU after every step of each row of an order."""
    lines = []
    for name, seeds in rows.items():
        for count, across in enumerate(zip(*(one['steps'] for one in seeds.values())), 1):
            lines.append([f'{label(name, seeds, options)}, {count}', *(
                spread([step[domain] for step in across]) if domain in across[0] else '-' for domain in order)])
    return Table(f'{", then ".join(order)}: mIoU after every step', f'steps-{"-".join(order)}', ['row, step', *order],
                 [lines])


def describe(evaluator, options):
    """What was run and what the columns are, one paragraph."""
    epochs = ', '.join(f'{name} {count}'.strip() for name, count in options.epochs.items())
    versions = records.environment(evaluator.place.device)
    return (tables.describe({name: getattr(evaluator.options, name) for name in PROTOCOL})
            + f' Random initial weights; epochs: {epochs}; batches of {options.batch_size}; class weights '
            f'{options.class_weights}; {options.precision}; seeds {", ".join(map(str, options.seeds))}'
            + (' (mean and sample standard deviation)' if len(options.seeds) > 1 else '')
            + f'; the {options.which} state of every step. New when learnt: mean over the domains after the first, '
            'each at its own step. Added: parameters of the last domain. Units: forward passes per image of the last '
            f'step (a backward pass is two). Images/s with {options.jobs} runs at once. torch {versions["torch"]} on '
            f'{versions["device"]}, revision {versions["git"]}.')


def draw_curves(plans, options):
    """Writes --curves: validation mIoU over the epochs of the single-task runs."""
    runs = {}
    for step in steps_of({key: states for key, states in plans.items() if key[1] == SINGLE}):
        runs.setdefault(step.domains[0], []).append(step)
    figure = pictures.new_figure(figsize=(3.6 * len(runs), 3))
    for axis, (name, steps) in zip(figure.subplots(1, len(runs), squeeze=False)[0], runs.items()):
        for step in steps:
            lines = [line for line in records.read_metrics(step.folder(options)) if line['val']]
            axis.plot([line['epoch'] for line in lines], [line['val'][name]['miou'] for line in lines],
                      label=f'seed {step.seed}', linewidth=1.2, marker='.', markersize=3)
        axis.set(title=name, xlabel='epoch', ylabel='validation mIoU in percent')
        axis.grid(color='#eee')
        axis.legend(frameon=False, fontsize=8)
    pictures.save_figure(options.curves, figure)


def draw_rows(figures, options):
    """Writes --figure: what rows reach on new domains over what they lose of old ones, mean and deviation over seeds."""
    figure = pictures.new_figure(figsize=(5 * len(figures) + 2.5, 4.4))
    styles = {name: f'C{number % 10}{MARKERS[number % len(MARKERS)]}' for number, name in enumerate(options.rows)}
    for axis, (order, rows) in zip(figure.subplots(1, len(figures), squeeze=False)[0], figures.items()):
        for name, seeds in rows.items():
            new = [one['new'] for one in seeds.values()]
            lost = [statistics.fmean(one['forgetting'].values()) for one in seeds.values() if one['forgetting']]
            if lost:
                axis.errorbar(statistics.fmean(lost), statistics.fmean(new), deviation(new), deviation(lost), styles[name],
                              markersize=7, label=name, alpha=0.8)
            else:
                axis.axhline(statistics.fmean(new), color=styles[name][:2], linestyle='--', linewidth=1, label=name)
        axis.set(title=', then '.join(order), xlabel='points forgotten, mean over the old domains',
                 ylabel='mIoU of new domains when learnt, mean')
        axis.grid(color='#eee')
    handles = {label: handle for axis in figure.axes for handle, label in zip(*axis.get_legend_handles_labels())}
    figure.legend(handles.values(), handles, loc='outside right upper', frameon=False, fontsize=8)
    pictures.save_figure(options.figure, figure)


def deviation(values):
    """Sample standard deviation; 0 of one value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def report(plans, found, evaluator, options):
    """Prints the tables and writes the files."""
    figures, costs = all_figures(found), all_costs(plans, found, options)
    about = describe(evaluator, options)
    shown = [table for order, rows in figures.items() for table in (summary_table(order, rows, costs[order], options),
                                                                    step_table(order, rows, options))]
    print(tables.wrapped(about), *map(tables.terminal, shown), sep='\n\n')
    if options.markdown:
        write_text(options.markdown, tables.markdown_document(f'{about}\n\n{ABOUT_ROWS}', shown))
    if options.json:
        orders = {' '.join(order): {name: {'cost': costs[order][name], 'seeds': seeds} for name, seeds in rows.items()}
                  for order, rows in figures.items()}
        stated = {name: value for name, value in vars(options).items() if name not in OWN_PATHS}
        write_json(options.json, tables.without_nan(
            {'options': {**stated, 'orders': list(orders)}, 'versions': records.environment(evaluator.place.device), 'orders': orders}))
    if options.curves:
        draw_curves(plans, options)
    longer = {order: rows for order, rows in figures.items() if len(order) > 1}
    if options.figure and longer:
        draw_rows(longer, options)


def forgetting_parser():
    """The parser."""
    parser = Parser(prog='python -m benchmarks.forgetting', description='Compares whole sequences.')
    group = parser.add_argument_group('what is compared')
    group.add_argument('--rows', nargs='+', default=DEFAULT_ROWS, metavar='"METHOD OPTIONS"',
                       help='rows of the table: methods, with options of train.py for the steps after the first (of '
                            f'{SINGLE} and {JOINT}: for all), each row quoted; or {", ".join(ROWS)} (default: these, the '
                            'methods, and released with one difference each switched off)')
    group.add_argument('--orders', nargs='+', default=list(ORDERS), metavar='"NAME NAME ..."',
                       help='orders of domains (default: "{}" and "{}")'.format(*ORDERS))
    group.add_argument('--seeds', nargs='+', type=seed_number, default=[0, 1, 2], metavar='N', help='seeds')
    group.add_argument('--steps', type=positive, metavar='N', help='stop after step N')
    group.add_argument('--which', choices=tuple(FILES), default='latest',
                       help='state of a step that is evaluated and gone on from: the latest, or the best on its domain')
    training_options(parser)
    data_options(parser).add_argument('--cache', metavar='DIR', help='keep resized images and labels there')
    machine_options(parser).add_argument('--jobs', type=positive, default=1, metavar='N', help='steps that run at once')
    group = parser.add_argument_group('results')
    group.add_argument('--out', required=True, metavar='DIR', help='folder of all runs')
    for name, text in (('json', 'all figures'), ('markdown', 'the tables'),
                       ('curves', 'a figure of how the single-task runs converge'),
                       ('figure', 'a figure of the rows: new domains over forgetting')):
        group.add_argument(f'--{name}', metavar='FILE', help=f'write {text}')
    return parser


def training_options(parser):
    """Adds what all rows have in common."""
    group = parser.add_argument_group('training, the same for all rows')
    group.add_argument('--epochs', nargs='+', required=True, metavar='N|NAME=N',
                       help='epochs of every domain, or of each; multi-task=N for the joint run (default: the fewest)')
    size_options(group)
    group.set_defaults(height=128)
    group.add_argument('--batch-size', type=positive, default=6, help='images per batch')
    group.add_argument('--lr', type=rate, help="rate of new domains (default: train.py's)")
    group.add_argument('--class-weights', default='computed', metavar='HOW', help='as of train.py')
    group.add_argument('--val-every', type=positive, default=1, metavar='N', help='validate every N epochs')
    group.add_argument('--limit-batches', type=positive, metavar='N', help='batches per epoch at most, for trials')


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
    for name in ('json', 'markdown', 'curves', 'figure'):
        if getattr(options, name):
            check_writable(f'--{name}', getattr(options, name))
    check_writable('--out', options.out, folder=True)
    pick_device(options.device)
    if options.curves and SINGLE not in options.rows:
        raise UserError(f'--curves draws the {SINGLE} runs, but --rows leaves them out')
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
