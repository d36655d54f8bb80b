"""Sequences of steps: which rows are compared, the runs of train.py that they consist of, running each once.

A row (Row, ROWS) over an order of domains and a seed is a list of States, each of a Step. What is
called `options` here are those of `python -m benchmarks.forgetting`.
"""
import argparse
import hashlib
import json
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
from models import METHODS
from utils import checkpoint, resume
from utils.errors import UserError
from utils.options import data_paths, parse_train
from utils.parallel import pick_device
from utils.run import BEST, LATEST
from utils.task import to_float

ROOT = Path(__file__).resolve().parent.parent
JOINT, SINGLE = 'multi-task', 'single-task'
FILES = {'latest': LATEST, 'best': BEST}
LOG, DONE = 'log.txt', 'done'
IMAGES = 24         # of the new domain, that corrections of finished weights are measured on
# Options that say nothing of what a step is: where it runs, and paths.
PLACES = (resume.HARMLESS | resume.SAID | {'state'}) - {'precision'}
CORRECTING = threading.Lock()


@dataclass(frozen=True)
class Row:
    """One row of the table.

    args: options of train.py in the steps after the first, first: in the first one.
    variant, first_variant: options of benchmarks.variants likewise.
    after: name of a correction in AFTER, of the states that are evaluated. carried: whether
    the next step starts from the corrected state. copies: pattern that finds the names of the
    shared tensors of which every domain keeps a copy, as it learnt them.
    """
    about: str
    method: str = 'ours'
    args: tuple = ()
    first: tuple = ()
    variant: tuple = ()
    first_variant: tuple = ()
    after: Optional[str] = None
    carried: bool = False
    copies: Optional[str] = None


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


# Parts of the shared encoder: (in words, names of their tensors).
PARTS = {'early': ('the layers of up to 64 channels', r'encoder\.(initial_block|layers\.[0-6]\.)'),
         'late': ('the last four blocks', r'encoder\.layers\.1[1-4]\.'),
         'encoder': ('the encoder', '')}
FASTER = {'lr-1e-3': ('--lr', '1e-3'), 'lr-1e-3-no-dropout': ('--lr', '1e-3', '--no-dropout')}
ROWS = {
    SINGLE: Row('a network per domain', SINGLE),
    JOINT: Row('all domains at once', JOINT),
    'fine-tune': Row('plain encoder learns on', 'fine-tune'),
    'fine-tune-copies': Row('the same, every domain keeping the network that learnt it', 'fine-tune', copies=''),
    **{f'single-task-{name}': Row(f'a network per domain, {" ".join(args)}', SINGLE, first=args)
       for name, args in FASTER.items()},
    **{f'fine-tune-{name}': Row(f'fine-tune, later steps {" ".join(args)}', 'fine-tune', args=args)
       for name, args in FASTER.items()},
    'feature-extraction': Row('plain encoder frozen', 'feature-extraction'),
    'lwf': Row('plain encoder, distillation', 'lwf'),
    'adapters-only': Row('shared weights frozen, later steps at 1e-3 without dropout', 'adapters-only'),
    **{f'adapters-only-{"-".join(args).replace("--", "")}': Row(f'adapters-only, {" ".join(args)}', 'adapters-only', args=args)
       for args in (('--lr', '5e-4', '--dropout'), ('--lr', '5e-4'), ('--dropout',), ('--lr', '2e-3'))},
    'adapters-only-ema': Row('adapters-only, moving average of the weights', 'adapters-only',
                             variant=('--ema', '0.99')),
    **{f'own-{part}{name}': Row(f'every domain with a copy of {about} of its own, {said}', copies=pattern,
                                args=(*args, '--lambdac', '0'), variant=('--learn-shared', pattern) if pattern else ())
       for part, (about, pattern) in PARTS.items()
       for name, said, args in (('', '5e-4, dropout', ('--shared-lr', '5e-4')),
                                ('-lr-1e-3-no-dropout', '1e-3, no dropout', ('--shared-lr', '1e-3', *FASTER['lr-1e-3-no-dropout'])))},
    'adapters-only-augmented-first': Row('adapters-only, strong augmentation in step 1', 'adapters-only',
                                         first_variant=('--strong-augmentation',)),
    'ours': Row('the method, corrected'),
    **{f'ours-{name}': Row(f'ours, later steps {" ".join(args)}', args=args) for name, args in FASTER.items()},
    **{f'shared-lr-5e-5-lambdac-1-{name}': Row(f'ours, --shared-lr 5e-5 --lambdac 1, later steps {" ".join(args)}',
                                               args=(*moving('5e-5', '1'), *args)) for name, args in FASTER.items()},
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
