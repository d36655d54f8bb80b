"""How much of what the published loops forget `python -m mdil repair` restores, over orders and seeds.

    python -m benchmarks.repair --data-root DATA --out runs/repair --epochs cityscapes=40 camvid=6 idd-lite=3 \\
        --height 64 --precision bf16 --val-every 50 --json FILE --markdown FILE

The sequences are the row `released` of `python -m benchmarks.forgetting`: every step is a run of
train.py in OUT, and finished runs are not repeated. The network of the last step is repaired from the
files of all steps and evaluated on every domain: unrepaired, with the old statistics restored, and
with the old branches restored.
"""
import signal

from mdil.benchmarks import forgetting
from mdil.benchmarks.scoring import make_evaluator, scores
from mdil.benchmarks.sequences import checkpoint_of, finished, plan, run_steps, steps_of
from mdil.evaluation import repair, tables
from mdil.evaluation.tables import Table, spread
from mdil.models.branches import WHAT, LoadedCheckpoint
from mdil.training import records
from mdil.utils.errors import run_main
from mdil.utils.files import check_writable, write_json, write_text
from mdil.utils.parallel import session
from mdil.utils.parser import Parser, complete_size, data_options, data_paths, machine_options, natural, positive

ROW = 'released'


def parse(argv=None):
    """The options, completed and checked."""
    parser = Parser(prog='python -m benchmarks.repair',
                    description='What repair gives back of what the published loops lose.')
    group = parser.add_argument_group('what is repaired')
    group.add_argument('--orders', nargs='+', default=list(forgetting.ORDERS), metavar='"NAME NAME ..."',
                       help='orders of domains (default: "{}" and "{}")'.format(*forgetting.ORDERS))
    group.add_argument('--seeds', nargs='+', type=natural, default=[0, 1, 2], metavar='N', help='seeds')
    forgetting.training_options(parser)
    data_options(parser).add_argument('--cache', metavar='DIR', help='keep resized images and labels there')
    machine_options(parser).add_argument('--jobs', type=positive, default=1, metavar='N', help='steps that run at once')
    group = parser.add_argument_group('results')
    group.add_argument('--out', required=True, metavar='DIR', help='folder of all runs')
    group.add_argument('--json', metavar='FILE', help='write all figures')
    group.add_argument('--markdown', metavar='FILE', help='write the tables')
    parser.set_defaults(rows=[ROW], which='latest')
    options = parser.parse_args(argv)
    complete_size(options)
    options.orders = forgetting.parsed_orders(options.orders, None, data_paths(options.data))
    options.epochs = forgetting.parsed_epochs(options.epochs, data_paths(options.data))
    for name in ('json', 'markdown'):
        if getattr(options, name):
            check_writable(f'--{name}', getattr(options, name))
    check_writable('--out', options.out, folder=True)
    return options


def measured(steps, evaluator, options):
    """{domain: {'learnt', 'before', and each of WHAT: mIoU}} of a sequence of steps.

    learnt: right after the domain's own step; before: after the last step, unrepaired.
    """
    known = [scores(step, evaluator, options) for step in steps]
    found = {name: {'learnt': known[number][name]['miou'], 'before': known[-1][name]['miou']}
             for number, name in enumerate(known[-1])}
    for what in WHAT:
        *older, new = (LoadedCheckpoint(checkpoint_of(step, options)) for step in steps)
        repair.repair(new, repair.sources(older, new), what)
        for name, miou in repair.scores(new, evaluator).items():
            found[name][what] = miou
    return found


def returned(entry, what):
    """Percent of a domain's loss that `what` restores; None if nothing was lost."""
    lost = entry['learnt'] - entry['before']
    return 100 * (entry[what] - entry['before']) / lost if lost > 0 else None


def order_table(order, seeds):
    """Table of an order: mIoU of each domain when learnt, after the last step, and repaired.

    seeds: {seed: result of `measured`}.
    """
    rows = []
    for name in order:
        entries = [found[name] for found in seeds.values()]
        shares = [[returned(entry, what) for entry in entries] for what in WHAT]
        rows.append([name, *(spread([entry[key] for entry in entries]) for key in ('learnt', 'before', *WHAT)),
                     *(spread(share, 0) if name != order[-1] and None not in share else '-' for share in shares)])
    return Table(f'{", then ".join(order)}: mIoU, and percent of the loss that came back', f'repair-{"-".join(order)}',
                 ['domain', 'when learnt', 'after the last step', *(f'{what} put back' for what in WHAT),
                  *(f'% back, {what}' for what in WHAT)], [rows])


def report(found, evaluator, options):
    """Prints the tables and writes the files; found: {order: {seed: result of `measured`}}."""
    shown = [order_table(order, seeds) for order, seeds in found.items()]
    versions = records.environment(evaluator.place.device)
    epochs = ', '.join(f'{name} {count}'.strip() for name, count in options.epochs.items())
    about = (f'{options.width}x{options.height}, --recipe {ROW}, random initial weights, epochs: {epochs}, batches of '
             f'{options.batch_size}, {options.precision}; seeds {", ".join(map(str, options.seeds))} (mean and sample '
             f'standard deviation); the latest state of every step. torch {versions["torch"]} on {versions["device"]}, '
             f'revision {versions["git"]}.')
    print(tables.wrapped(about), *map(tables.terminal, shown), sep='\n\n')
    if options.markdown:
        write_text(options.markdown, tables.markdown_document(about, shown))
    if options.json:
        stated = {name: value for name, value in vars(options).items() if name not in forgetting.OWN_PATHS}
        write_json(options.json, {
            'options': {**stated, 'orders': [' '.join(order) for order in options.orders]}, 'versions': versions,
            'orders': {' '.join(order): seeds for order, seeds in found.items()}})


def main(argv=None):
    options = parse(argv)
    plans, found = plan(options), {}
    forgetting.check_data(options)
    failures = run_steps(steps_of(plans), options)
    with session(options.device) as place:
        evaluator = make_evaluator(options, place)
        for (order, _, seed), steps in plans.items():
            if all(finished(step, options) for step in steps):
                found.setdefault(order, {})[seed] = measured(steps, evaluator, options)
        if found:
            report(found, evaluator, options)
    return 1 if failures else None


if __name__ == '__main__':
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    run_main(main)
