"""Sequences of steps: which rows are compared, the runs of train.py that they consist of, running each once.

A row over an order of domains and a seed is a list of Steps. What is called `options` here are
those of `python -m benchmarks.forgetting`.
"""
import argparse
import hashlib
import json
import subprocess
import sys
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional
from urllib.parse import quote

from tqdm import tqdm

from mdil.datasets import SegmentationDataset, get_domain
from mdil.models import METHODS, method_name
from mdil.models.networks import DEFAULT as ERFNET
from mdil.training import resume
from mdil.training.options import RECIPES, parse_train
from mdil.training.run import BEST, LATEST
from mdil.utils.errors import UserError
from mdil.utils.parser import data_paths, flag

ROOT = Path(__file__).resolve().parent.parent
JOINT = 'multi-task'
FIRST = '--first'       # in a row: what follows are options of its first step
FILES = {'latest': LATEST, 'best': BEST}
LOG, DONE = 'log.txt', 'done'
# Options that do not identify a step: where it runs, and paths.
PLACES = (resume.HARMLESS | resume.REPORTED | {'state'}) - {'precision'}


@dataclass(frozen=True)
class Row:
    """One row of the table.

    args: options of train.py in the steps after the first; of methods with one step, in that.
    first: options of train.py in the first of several steps.
    copies: whether every domain keeps a network of its own, as it was when it had learnt the domain.
    """
    method: str
    args: tuple = ()
    first: tuple = ()
    copies: bool = False


# Options of train.py that a row may set.
LEARNING = {'recipe', 'lr', 'shared_lr', 'no_dropout', 'distill_domains', *RECIPES['corrected']} - {'num_epochs'}
COPIES = 'fine-tune-copies'
ROWS = {COPIES: Row('fine-tune', copies=True), 'released': Row('mdil', ('--recipe', 'released'))}
DEFAULT_ROWS = (*METHODS, *ROWS, *(f'mdil --recipe released {difference}' for difference in (
    '--old-bn frozen', '--distillation kl', '--teacher-mode eval', '--steps-per-batch 1', '--new-statistics copied')))


def row_of(text):
    """The Row that `text` stands for: a name of ROWS, or a method and options of train.py; UserError if neither."""
    later, split, first = f'{text} '.partition(f' {FIRST} ')
    name, *args = later.split() or ['']
    copies = name == COPIES
    method = 'fine-tune' if copies else method_name(name)
    if text not in ROWS and method not in METHODS:
        raise UserError(f'--rows {text!r} is none of {", ".join(ROWS)}, and does not begin with a method: '
                        f'{", ".join(METHODS)}')
    if split and (METHODS[method].joint or METHODS[method].one_domain):
        raise UserError(f'--rows {text!r}: {method} has one step; give its options without {FIRST}')
    if split and not first.strip():
        raise UserError(f'--rows {text!r}: no option follows {FIRST}')
    return ROWS.get(text) or Row(method, tuple(args), tuple(first.split()), copies)


@dataclass(frozen=True)
class Step:
    """A run of train.py: it learns the last of `domains` from the state `start`. Equal steps are run once.

    key: (name, value) of the options that are not at their defaults. title: for reading.
    arguments: of train.py, but for paths and devices.
    """
    domains: tuple
    seed: int
    method: str
    key: tuple
    start: Optional['Step']
    title: str = field(compare=False)
    arguments: tuple = field(compare=False)

    def folder(self, options):
        """The folder of its results."""
        before = self.start and (self.start.folder(options).name, options.which)
        digest = hashlib.sha256(json.dumps([self.key, before]).encode()).hexdigest()[:8]
        domains = '+'.join(quote(name, safe='') for name in self.domains)
        return Path(options.out) / domains / f'seed{self.seed}' / f'{self.title}-{digest}'


def checkpoint_of(step, options):
    """The file that a step left."""
    return step.folder(options) / FILES[options.which]


def own_step(step, name):
    """The step that learnt the domain `name`, among `step` and those that it goes on from."""
    while step.start and name in step.start.domains:
        step = step.start
    return step


def is_single(name):
    """Whether the row called `name` is of a network of its own for each domain."""
    return METHODS[row_of(name).method].one_domain


def first_method(method):
    """The method of the first step of `method`: the same for all of the same network, for one domain if any."""
    network = lambda name: (METHODS[name].adapter, METHODS[name].domain_bn)
    return min((name for name in METHODS if network(name) == network(method)),
               key=lambda name: not METHODS[name].one_domain)


def epochs_of(options, name):
    """Epochs of a domain; of the multi-task run, by default, the fewest of any domain."""
    known = options.epochs
    if name not in known and name == JOINT:
        return min(known.values())
    if name not in known and '' not in known:
        raise UserError(f'--epochs has no value for {name}; add {name}=N')
    return known.get(name, known.get(''))


def protocol_arguments(options, name):
    """Options of train.py that all steps which learn `name` have."""
    arguments = ['--num-epochs', epochs_of(options, name)]
    for option in ('network', 'height', 'width', 'batch_size', 'lr', 'class_weights', 'precision', 'limit_batches',
                   'val_every'):
        if getattr(options, option) is not None:
            arguments += [flag(option), getattr(options, option)]
    return list(map(str, arguments))


def data_arguments(options):
    """Options of train.py and eval.py that say where the data lies."""
    return ['--data-root', options.data_root, *(text for item in options.data for text in ('--data', item))]


def parsed(arguments):
    """{option: value} of train.py's arguments, complete."""
    return vars(parse_train(['--state', '-', '--savedir', '-', *arguments]))


def changes(found, default):
    """((name, value as text), ...) of the options that are not as in `default`."""
    return tuple((name, str(found[name])) for name in sorted(found)
                 if found[name] != default[name] and name not in PLACES)


def parsed_row(common, args):
    """{option: value} of the arguments `common` and a row's own; UserError unless they say how a domain is learnt."""
    about = f'--rows: {" ".join(args)}'
    try:
        found = parsed([*common, *args])
    except UserError as error:
        raise UserError(f'{about}: {error}' if args else str(error)) from None
    same = parsed(common)
    others = [flag(name) for name in sorted(found) if found[name] != same[name] and name not in LEARNING]
    if others:
        raise UserError(f'{about}: {" ".join(others)} must be the same for all rows; leave it out there')
    return found


def make_step(options, domains, seed, method, args=(), start=None):
    """The Step that learns the last of `domains`, or all of them by a joint method, from the Step `start`."""
    plain = ['--domains', *domains, '--method', method, '--network', ERFNET, *data_arguments(options)]
    learnt = JOINT if METHODS[method].joint else domains[-1]
    common = [*plain, '--seed', str(seed), *protocol_arguments(options, learnt)]
    found = parsed_row(common, args)
    special = changes(found, parsed([*common, '--recipe', found['recipe']]))
    words = [method, *([found['recipe']] if found['recipe'] != 'corrected' else []),
             *(f'{name}={value}' for name, value in special)]
    return Step(domains, seed, method, changes(found, parsed(plain)), start, quote('_'.join(words), safe='=')[:80],
                (*common, *args))


def row_steps(options, row, order, seed):
    """The row's Step of each domain of an order; one of all of a joint method, one per domain of separate networks."""
    method = METHODS[row.method]
    if method.joint:
        return [make_step(options, tuple(sorted(order)), seed, row.method, row.args)]
    if method.one_domain:
        return [make_step(options, (name,), seed, row.method, row.args) for name in order]
    steps = [make_step(options, order[:1], seed, first_method(row.method), row.first)]
    for count in range(2, len(order) + 1):
        steps.append(make_step(options, order[:count], seed, row.method, row.args, steps[-1]))
    return steps


def plan(options):
    """{(order, row name, seed): its Steps}."""
    return {(order, name, seed): row_steps(options, row_of(name), order, seed)
            for order in options.orders for name in options.rows for seed in options.seeds}


def steps_of(plans):
    """All steps of a plan, each once, after those that they go on from."""
    return list(dict.fromkeys(step for steps in plans.values() for step in steps))


def finished(step, options):
    """Whether the step has been run to its end; UserError if that was with other options, which defaults may become."""
    folder = step.folder(options)
    if not (folder / DONE).exists():
        return False
    known = json.loads((folder / 'opts.json').read_text())['options']
    saved, now = ({name: found[name] for name in found.keys() - PLACES} for found in (known, parsed(step.arguments)))
    refused, _ = resume.differences(saved, argparse.Namespace(**now))
    if refused:
        raise UserError(f'{folder}: was run with other options: {"; ".join(refused)}; use another --out')
    return True


def command(step, options):
    """The command that runs a step, or goes on with it."""
    place = ['--savedir', step.folder(options), '--resume', '--device', options.device, '--num-workers',
             options.num_workers, *(['--cache', options.cache] if options.cache else []),
             *(['--state', checkpoint_of(step.start, options)] if step.start else [])]
    return [sys.executable, str(ROOT / 'train.py'), *step.arguments, *map(str, place)]


def start(arguments, log):
    """A process that runs the command `arguments`, its output in the open file `log`."""
    return subprocess.Popen(arguments, stdin=subprocess.DEVNULL, stdout=log, stderr=log)


def run_step(step, options, processes):
    """Runs a step; returns None, or a line that says why it failed. The process is added to `processes`."""
    folder = step.folder(options)
    folder.mkdir(parents=True, exist_ok=True)
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
                ready = [step for step in waiting if step.start is None or step.start in done]
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
        print(f'{len(waiting)} steps were not run, as those that they start from failed', file=sys.stderr)
    return failures


def note(step, future, done, failures, bar):
    """Records whether a step succeeded; a UserError while it is started counts as a failure."""
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
