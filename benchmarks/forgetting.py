"""What makes a sequence forget: methods and options, orders of domains and seeds beside each other.

    python -m benchmarks.forgetting --data-root DATA --out runs/forgetting --class-weights computed \\
        --epochs cityscapes=60 camvid=20 idd-lite=10 --json FILE --markdown FILE --curves FILE
    python -m benchmarks.forgetting --data-root DATA --out DIR --rows ours fine-tune --orders "CS BDD IDD" --steps 2

Every step is a run of train.py in OUT/<domains so far>/seed<S>/<method and options>-<digest of all
options and of the step before>/, its output in log.txt there. Steps of equal options after equal
steps are run once, whatever rows they are of; finished ones are skipped, broken ones go on. Every
state is then evaluated on all domains that it knows (scores-*.json beside it). Exit status 1 if a
step failed; the tables are of what is there.
"""
import argparse
import hashlib
import json
import signal
import statistics
import subprocess
import sys
import threading
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional
from urllib.parse import quote

import torch
from tqdm import tqdm

from benchmarks.variants import AFTER
from datasets import SegmentationDataset, get_domain
from eval import PROTOCOL, eval_parser
from models import METHODS, build_model
from utils import checkpoint, metrics, pictures, records, resume, tables
from utils.building import distils
from utils.errors import UserError, run_main
from utils.evaluation import Evaluator
from utils.options import (Parser, complete_size, data_options, data_paths, machine_options, natural, parse_train,
                           positive, rate, size_options)
from utils.parallel import pick_device, session
from utils.run import BEST, LATEST
from utils.tables import Table, number, spread
from utils.task import to_float

ROOT = Path(__file__).resolve().parent.parent
ORDERS = 'cityscapes camvid idd-lite', 'idd-lite camvid cityscapes'
JOINT, SINGLE = 'multi-task', 'single-task'
FILES = {'latest': LATEST, 'best': BEST}
LOG, DONE = 'log.txt', 'done'
IMAGES = 24         # of the new domain, that corrections of finished weights are measured on
# Options that say nothing of what a step is: where it runs, and paths.
PLACES = (resume.HARMLESS | resume.SAID | {'state'}) - {'precision'}
CORRECTING = threading.Lock()
OWN_PATHS = 'out', 'data_root', 'data', 'cache', 'json', 'markdown', 'curves'     # say nothing of a result


@dataclass(frozen=True)
class Row:
    """One row of the table.

    args: options of train.py in the steps after the first, first: in the first one.
    variant, first_variant: options of benchmarks.variants likewise.
    after: name of a correction in AFTER, of the states that are evaluated. carried: whether
    the next step starts from the corrected state. copies: whether every domain keeps the
    network that learnt it.
    """
    about: str
    method: str = 'ours'
    args: tuple = ()
    first: tuple = ()
    variant: tuple = ()
    first_variant: tuple = ()
    after: Optional[str] = None
    carried: bool = False
    copies: bool = False


def with_values(option, values):
    """{row name: Row} of the method with one option at each of `values`."""
    return {f'{option}-{value}': Row(f'ours, --{option} {value}', args=(f'--{option}', value)) for value in values}


def moving(lr, weight):
    """Options of shared weights that move at rate `lr`, held by distillation of `weight`."""
    return '--shared-lr', lr, '--lambdac', weight


def with_corrected(*pairs):
    """{row name: Row} of the released recipe with one option each as the corrected one has it."""
    return {f'released-{option}-{value}': Row(f'released, but --{option} {value}',
                                              args=('--recipe', 'released', f'--{option}', value))
            for option, value in pairs}


ROWS = {
    SINGLE: Row('a network per domain', SINGLE),
    JOINT: Row('all domains at once', JOINT),
    'fine-tune': Row('plain encoder learns on', 'fine-tune'),
    'fine-tune-copies': Row('the same, every domain keeping the network that learnt it', 'fine-tune', copies=True),
    'feature-extraction': Row('plain encoder frozen', 'feature-extraction'),
    'lwf': Row('plain encoder, distillation', 'lwf'),
    'adapters-only': Row('as ours, shared weights frozen', 'adapters-only'),
    'low-rank-adapters': Row('as adapters-only, the adapters added to the kernels', 'low-rank-adapters'),
    **{f'adapters-only-lr-{lr}': Row(f'adapters-only, later steps at --lr {lr}', 'adapters-only', args=('--lr', lr))
       for lr in ('1e-3', '2e-3')},
    'adapters-only-ema': Row('adapters-only, moving average of the weights', 'adapters-only',
                             variant=('--ema', '0.99')),
    'adapters-only-augmented-first': Row('adapters-only, strong augmentation in step 1', 'adapters-only',
                                         first_variant=('--strong-augmentation',)),
    'ours': Row('the method, corrected'),
    'released': Row('the published loops', args=('--recipe', 'released')),
    **with_corrected(('old-bn', 'frozen'), ('distillation', 'kl'), ('teacher-mode', 'eval'), ('steps-per-batch', '1'),
                     ('new-statistics', 'copied')),
    'released-put-back': Row('released, old BN statistics put back afterwards', args=('--recipe', 'released'),
                             after='put-back'),
    **with_values('shared-lr', ('0', '5e-6', '5e-5', '5e-4')),
    **with_values('lambdac', ('0.01', '0.1', '1', '10')),
    **with_values('temperature', ('2', '4')),
    **{f'shared-lr-{lr}-lambdac-{weight}': Row(f'ours, --shared-lr {lr} --lambdac {weight}', args=moving(lr, weight))
       for lr, weight in (('5e-5', '0'), ('5e-5', '1'), ('5e-5', '10'), ('5e-4', '1'), ('5e-4', '10'))},
    **with_values('distill-domains', ('1',)),
    'shared-lr-5e-5-distill-domains-1': Row('ours, --shared-lr 5e-5 --lambdac 1 --distill-domains 1',
                                            args=(*moving('5e-5', '1'), '--distill-domains', '1')),
    # What is meant to hold the old domains, where the shared weights move enough to lose them:
    'temperature-2-5e-4': Row('--shared-lr 5e-4 --lambdac 10 --temperature 2',
                              args=(*moving('5e-4', '10'), '--temperature', '2')),
    'features-encoder-5e-4': Row("--shared-lr 5e-4 --lambdac 10, encoder's features held too",
                                 args=moving('5e-4', '10'), variant=('--feature-distillation', '1')),
    'features-decoder-5e-4': Row("the same of the decoder's features", args=moving('5e-4', '10'),
                                 variant=('--feature-distillation', '1', '--feature-place', 'decoder')),
    'warm-start-5e-4': Row('--shared-lr 5e-4 --lambdac 10, shared weights wait for 3 epochs',
                           args=moving('5e-4', '10'), variant=('--warm-start', '3')),
    'averaged-5e-4': Row('--shared-lr 5e-4 --lambdac 10, shared weights put halfway back after a step',
                         args=moving('5e-4', '10'), after='average', carried=True),
    'compensated-5e-4': Row('--shared-lr 5e-4 --lambdac 10, old BN statistics moved along afterwards',
                            args=moving('5e-4', '10'), after='compensate'),
}


@dataclass(frozen=True)
class Step:
    """A run of train.py: it learns the last of `domains` from the state `start`. Equal steps are run once.

    key: (name, value) of the options that are not at their defaults. variant: options of
    benchmarks.variants. title: for reading. arguments: of train.py, but for paths and devices.
    """
    domains: tuple
    seed: int
    method: str
    key: tuple
    variant: tuple
    start: Optional['State']
    title: str = field(compare=False)
    arguments: tuple = field(compare=False)

    @property
    def before(self):
        """The step that it goes on from, or None."""
        return self.start and self.start.step

    def folder(self, options):
        """Where it is kept."""
        before = self.start and (self.before.folder(options).name, self.start.after, options.which)
        digest = hashlib.sha256(json.dumps([self.key, self.variant, before]).encode()).hexdigest()[:8]
        domains = '+'.join(quote(name, safe='') for name in self.domains)
        return Path(options.out) / domains / f'seed{self.seed}' / f'{self.title}-{digest}'


@dataclass(frozen=True)
class State:
    """What a step left, corrected by `after` given the state `before` of the step before it."""
    step: Step
    after: Optional[str] = None
    before: Optional['State'] = None

    def file(self, options):
        """Its checkpoint."""
        name = FILES[options.which]
        return self.step.folder(options) / (f'{self.after}-{name}' if self.after else name)

    def scores(self, options):
        """Where its scores are kept."""
        return self.step.folder(options) / f'scores-{self.after or "trained"}-{options.which}.json'


def first_method(method):
    """The method that the first step of `method` is run as: the same for all of the same network."""
    network = lambda name: (METHODS[name].adapter, METHODS[name].domain_bn)
    lonely_first = sorted(METHODS, key=lambda name: not METHODS[name].lonely)
    return next(name for name in lonely_first if network(name) == network(method))


def epochs_of(options, name):
    """Epochs of a domain; of the multi-task run, unless told, those of the domain with the fewest."""
    known = options.epochs
    if name not in known and name == JOINT:
        return min(known.values())
    if name not in known and '' not in known:
        raise UserError(f'--epochs says nothing of {name}; add {name}=N')
    return known.get(name, known.get(''))


def protocol_arguments(options, name):
    """Options of train.py that all steps which learn `name` have."""
    arguments = ['--num-epochs', epochs_of(options, name)]
    for option in ('height', 'width', 'batch_size', 'lr', 'class_weights', 'precision', 'limit_batches',
                   'val_every'):
        if getattr(options, option) is not None:
            arguments += [f'--{option.replace("_", "-")}', getattr(options, option)]
    return list(map(str, arguments))


def data_arguments(options):
    """Options of train.py and eval.py that say where the data lies."""
    return ['--data-root', options.data_root, *(text for item in options.data for text in ('--data', item))]


def parsed(arguments):
    """{option: value} of train.py's arguments, complete."""
    return vars(parse_train([*arguments, '--state', '-', '--savedir', '-']))


def changes(found, default):
    """((name, value as text), ...) of the options that are not as in `default`."""
    return tuple((name, str(found[name])) for name in sorted(found)
                 if found[name] != default[name] and name not in PLACES)


def make_step(options, domains, seed, method, args, variant, start):
    """The Step that learns the last of `domains`, or all of them by a joint method."""
    plain = ['--domains', *domains, '--method', method, *data_arguments(options)]
    learnt = JOINT if METHODS[method].joint else domains[-1]
    common = [*plain, '--seed', str(seed), *protocol_arguments(options, learnt)]
    found = parsed([*common, *args])
    special = changes(found, parsed([*common, '--recipe', found['recipe']]))
    words = [method, *([found['recipe']] if found['recipe'] != 'corrected' else []),
             *(f'{name}={value}' for name, value in special), *(text.lstrip('-') for text in variant)]
    return Step(domains, seed, method, changes(found, parsed(plain)), variant, start,
                quote('_'.join(words), safe='=')[:80], (*common, *args))


def states_of(options, row, order, seed):
    """The row's State after each step of an order; one of all of a joint method, one per domain of a lonely one."""
    method = METHODS[row.method]
    make = lambda domains, name, args, variant, start: make_step(options, domains, seed, name, args, variant, start)
    if method.joint:
        return [State(make(tuple(sorted(order)), row.method, row.args, row.variant, None))]
    if method.lonely:
        return [State(make((name,), row.method, row.first, row.first_variant, None)) for name in order]
    states = [State(make(order[:1], first_method(row.method), row.first, row.first_variant, None))]
    for count in range(2, len(order) + 1):
        begin = states[-1] if row.carried else State(states[-1].step)
        step = make(order[:count], row.method, row.args, row.variant, begin)
        states.append(State(step, row.after, states[-1]) if row.after else State(step))
    return states


def plan(options):
    """{(order, row name, seed): its States}."""
    return {(order, name, seed): states_of(options, ROWS[name], order, seed)
            for order in options.orders for name in options.rows for seed in options.seeds}


def steps_of(plans):
    """All steps of a plan, each once, after those that they go on from."""
    found = {}
    for states in plans.values():
        for state in states:
            chain = [state.step]
            while chain[-1].before:
                chain.append(chain[-1].before)
            found.update(dict.fromkeys(reversed(chain)))
    return list(found)


def finished(step, options):
    """Whether the step has been run to its end; UserError if that was with other options, which defaults may become."""
    folder = step.folder(options)
    if not (folder / DONE).exists():
        return False
    saved, now = json.loads((folder / 'opts.json').read_text())['options'], parsed(step.arguments)
    both = (saved.keys() & now.keys()) - PLACES     # an option may come with a later version of the code
    refused, _ = resume.differences({name: saved[name] for name in both},
                                    argparse.Namespace(**{name: now[name] for name in both}))
    if refused:
        raise UserError(f'{folder}: was run with other options: {"; ".join(refused)}; use another --out')
    return True


def command(step, options):
    """The command that runs a step, or goes on with it."""
    script = [str(ROOT / 'train.py')]
    if step.variant:
        script = ['-m', 'benchmarks.variants', *step.variant, '--']
    place = ['--savedir', step.folder(options), '--resume', '--device', options.device, '--num-workers',
             options.num_workers, *(['--cache', options.cache] if options.cache else []),
             *(['--state', step.start.file(options)] if step.start else [])]
    return [sys.executable, *script, *step.arguments, *map(str, place)]


def start(arguments, log):
    """A process that runs the command `arguments`, its output in the open file `log`."""
    return subprocess.Popen(arguments, stdin=subprocess.DEVNULL, stdout=log, stderr=log)


def run_step(step, options, processes):
    """Runs a step; returns None, or a line that says why it failed. The process is added to `processes`."""
    folder = step.folder(options)
    folder.mkdir(parents=True, exist_ok=True)
    if step.start:
        make_state(step.start, options)
    with open(folder / LOG, 'a') as log:
        process = start(command(step, options), log)
        processes.append(process)
        status = process.wait()
    if status:
        last = (folder / LOG).read_text().strip().splitlines()[-1:]
        return f'exit status {status}, see {folder / LOG}: {"".join(last)[:200]}'
    (folder / DONE).touch()


def run_steps(steps, options):
    """Runs the steps that are not finished, --jobs at a time; returns lines about those that failed."""
    waiting = [step for step in steps if not finished(step, options)]
    done, running, failures, processes = set(steps) - set(waiting), {}, [], []
    with ThreadPoolExecutor(options.jobs) as pool, tqdm(total=len(waiting), unit='step', disable=None) as bar:
        try:
            while True:
                ready = [step for step in waiting if step.before is None or step.before in done]
                for step in ready[:options.jobs - len(running)]:
                    waiting.remove(step)
                    running[pool.submit(run_step, step, options, processes)] = step
                if not running:
                    break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    note(running.pop(future), future, done, failures, bar)
        except BaseException:
            for process in processes:       # they save and stop
                process.terminate()
            raise
    if waiting:
        print(f'{len(waiting)} steps were not run, as those that they go on from failed', file=sys.stderr)
    return failures


def note(step, future, done, failures, bar):
    """Takes down how a step ended; what a user can mend of its start counts as its failure."""
    try:
        failure = future.result()
    except UserError as error:
        failure = str(error)
    if failure:
        failures.append(failure)
        tqdm.write(f'failed: {failure}', file=sys.stderr)
    else:
        done.add(step)
        bar.update()


def training_images(options, name):
    """The training split of a domain."""
    return SegmentationDataset(get_domain(name, data_paths(options.data)), options.data_root, 'train',
                               (options.height, options.width))


def new_images(options, name, device):
    """The first training images (B, 3, H, W) of a domain, float on the device."""
    data = training_images(options, name)
    return to_float(torch.stack([data.load(index)[0] for index in range(min(IMAGES, len(data)))])).to(device)


def make_state(state, options):
    """Writes the file of a corrected state, and of those that it needs, unless it is there."""
    path = state.file(options)
    if not state.after or path.exists():
        return
    make_state(state.before, options)
    with CORRECTING:
        device = pick_device(options.device)
        content = checkpoint.read(State(state.step).file(options))
        previous, current = (checkpoint.load_network(checkpoint.read_checkpoint(file)).eval().to(device)
                             for file in (state.before.file(options), State(state.step).file(options)))
        with torch.no_grad():
            AFTER[state.after](previous, current, new_images(options, state.step.domains[-1], device))
        checkpoint.save({**{name: content[name] for name in ('version', 'domains', 'method')},
                         'state_dict': current.cpu().state_dict()}, path)


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
    records.write_json(path, {'protocol': protocol, 'domains': entries})
    return entries


def evaluated(plans, evaluator, options):
    """{(order, row name, seed): [{domain: mIoU}] after each step} of the sequences whose steps are all finished."""
    complete = {key: states for key, states in plans.items() if all(finished(state.step, options) for state in states)}
    found = {}
    for key, states in tqdm(complete.items(), unit='sequence', disable=None):
        steps = [{name: entry['miou'] for name, entry in scores(state, evaluator, options).items()} for state in states]
        row = ROWS[key[1]]
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
    if not distils(argparse.Namespace(**options)):
        return 3
    return 3 + min(old, options.get('distill_domains') or old) * (3 + 1)


def added(step, row, options):
    """Parameters that the last of the step's domains added: its branch, or a whole network."""
    counts = [get_domain(name, data_paths(options.data)).num_classes for name in step.domains]
    if METHODS[step.method].lonely or row.copies:
        parameters = build_model(counts[-1:], step.method).parameters()
    else:
        parameters = build_model(counts, step.method).branch_parameters(len(counts) - 1)
    return sum(parameter.numel() for parameter in parameters)


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
    return {order: {name: cost(last, ROWS[name], options) for name, last in rows.items()}
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


def about_rows(options):
    """What the rows are."""
    return 'Rows: ' + '; '.join(f'{name}: {ROWS[name].about}' for name in options.rows) + '.'


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


def report(plans, found, evaluator, options):
    """Prints the tables and writes the files."""
    figures, costs = all_figures(found), all_costs(plans, found, options)
    about = describe(evaluator, options)
    shown = [table for order, rows in figures.items() for table in (summary_table(order, rows, costs[order], options),
                                                                    step_table(order, rows, options))]
    print(tables.wrapped(about), *map(tables.terminal, shown), sep='\n\n')
    if options.markdown:
        tables.write(options.markdown, tables.markdown_document(f'{about}\n\n{about_rows(options)}', shown))
    if options.json:
        orders = {' '.join(order): {name: {'cost': costs[order][name], 'seeds': seeds} for name, seeds in rows.items()}
                  for order, rows in figures.items()}
        stated = {name: value for name, value in vars(options).items() if name not in OWN_PATHS}
        records.write_json(options.json, tables.without_nan(
            {'options': {**stated, 'orders': list(orders)}, 'versions': records.environment(evaluator.place.device), 'orders': orders}))
    if options.curves:
        draw_curves(plans, options)


def forgetting_parser():
    """The parser."""
    parser = Parser(prog='python -m benchmarks.forgetting', description='Compares whole sequences.')
    group = parser.add_argument_group('what is compared')
    group.add_argument('--rows', nargs='+', choices=tuple(ROWS), default=list(ROWS), metavar='NAME',
                       help=f'rows of the table: {", ".join(ROWS)}')
    group.add_argument('--orders', nargs='+', default=list(ORDERS), metavar='"NAME NAME ..."', help='orders of domains')
    group.add_argument('--seeds', nargs='+', type=natural, default=[0, 1, 2], metavar='N', help='seeds')
    group.add_argument('--steps', type=positive, metavar='N', help='stop after step N')
    group.add_argument('--which', choices=tuple(FILES), default='latest',
                       help='state of a step that is evaluated and gone on from: the latest, or the best on its domain')
    training_options(parser)
    data_options(parser).add_argument('--cache', metavar='DIR', help='keep resized images and labels there')
    machine_options(parser).add_argument('--jobs', type=positive, default=1, metavar='N', help='steps that run at once')
    group = parser.add_argument_group('results')
    group.add_argument('--out', required=True, metavar='DIR', help='folder of all runs')
    for name, text in (('json', 'all figures'), ('markdown', 'the tables'),
                       ('curves', 'a figure of how the single-task runs converge')):
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
    options.rows, options.seeds = list(dict.fromkeys(options.rows)), list(dict.fromkeys(options.seeds))
    for name in ('json', 'markdown', 'curves'):
        if getattr(options, name):
            tables.check_writable(f'--{name}', getattr(options, name))
    tables.check_writable('--out', options.out, folder=True)
    pick_device(options.device)
    if options.curves and SINGLE not in options.rows:
        raise UserError(f'--curves draws the {SINGLE} runs, but --rows leaves them out')
    if options.curves:
        pictures.figure_format(options.curves)
    return options


def check_data(options):
    """UserError unless the training images of all domains are at hand."""
    for name in dict.fromkeys(name for order in options.orders for name in order):
        training_images(options, name)


def main(argv=None):
    options = parse(argv)
    check_data(options)
    plans = plan(options)
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
