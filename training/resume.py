"""Resuming a run: which file to continue from, whether it fits, and that no other run uses the folder."""
import contextlib
import math
import os
import signal
import threading
from collections import OrderedDict

import torch
import torch.distributed as dist

from mdil.models import checkpoint, method_name
from mdil.models.layouts import faults
from mdil.models.networks import DEFAULT as ERFNET
from mdil.training.digest import are_digests, start_digest
from mdil.training.options import RECIPES
from mdil.utils.errors import UserError
from mdil.utils.fetch import Fetched
from mdil.utils.files import locked
from mdil.utils.output import say
from mdil.utils.parallel import tell
from mdil.utils.parser import flag
from mdil.utils.workers import INTERRUPTED, STOPPING

# A resumed run may change these options. HARMLESS: no effect on results. REPORTED: results are no longer bit-equal,
# which is reported. docs/reliability.md names them.
HARMLESS = {'resume', 'overwrite', 'num_workers', 'port', 'server', 'env', 'tensorboard', 'savedir', 'data_root',
            'data', 'checkpoint_minutes', 'cache', 'augment', 'model_name_suffix'}
REPORTED = {'device', 'precision', 'parallel', 'compile', 'cuda_graphs', 'deterministic'}

LOCK = '.lock'       # file of a run's folder

# Further entries of a run's checkpoint: (test of the value, what it must be).
PARTS = {'state_dict': (lambda value: isinstance(value, dict), 'a dict'),
         'teacher': (lambda value: value is None or isinstance(value, dict), 'a dict or None'),
         'optimizer': (lambda value: isinstance(value, dict) and isinstance(value.get('state'), dict)
                       and isinstance(value.get('param_groups'), list), 'the state of an optimiser'),
         'scheduler': (lambda value: isinstance(value, dict), 'a dict'),
         'scaler': (lambda value: isinstance(value, dict), 'a dict'),
         'random': (lambda value: isinstance(value, dict) and isinstance(value.get('torch'), torch.Tensor)
                    and isinstance(value.get('cuda'), list), 'a dict of random states')}
LATER = {'digests': (are_digests, 'a dict of digests'),       # missing from earlier files, as is checkpoint.LATER
         'start': (lambda value: value is None or isinstance(value, str), 'a digest or None')}
BEFORE_OPTIONS = {**RECIPES['corrected'], 'network': ERFNET}           # what happened before these options existed
# Settings of an optimiser's groups in every version of torch, except the rate.
SETTINGS = 'params', 'name', 'betas', 'eps', 'weight_decay', 'initial_lr'


def find(folder, names):
    """The content of the first readable checkpoint of `names` in `folder`, with its name added as 'file', or None.

    A damaged file is reported, and the next name tried; UserError if all that exist are damaged.
    """
    check_places(folder, names)
    reasons = []
    for name in names:
        path = folder / name
        if not os.path.lexists(path):
            continue
        try:
            content = checkpoint.read(path)
            check_run(content, path)
            if reasons:
                tell(f'{"; ".join(reasons)}; continuing from {path}')
            return {**content, 'file': name}
        except UserError as error:
            reasons.append(str(error))
    if reasons:
        raise UserError(f'--resume: {"; ".join(reasons)}; move the file away to start from scratch')
    return None


def check_places(folder, names):
    """UserError if a directory is in the place of a file that the run writes."""
    for name in names:
        if (folder / name).is_dir():
            raise UserError(f'{folder / name} is a directory; move it away, the run writes a file of that name')


def check_run(content, path):
    """UserError unless `content` is a complete and consistent checkpoint of a run of train.py."""
    wanted = {**PARTS, **checkpoint.KINDS}
    lacking = [name for name in wanted if not isinstance(content, dict) or name not in content]
    if lacking:
        raise UserError(f'{path} is not a checkpoint of a run of train.py: it has no {lacking[0]}')
    checkpoint.check_kinds(content, path, {**PARTS, **LATER})
    checkpoint.check_content(content, path)
    options, names = content['options'], [entry['name'] for entry in content['domains']]
    if (content['method'], names) != (options.get('method'), options.get('domains')):
        raise UserError(f'{path}: its method and domains do not match its options')
    if content.get('network', ERFNET) != options.get('network', ERFNET):
        raise UserError(f'{path}: its network does not match its options')
    if bool(content['batch']) != ('loss' in content['totals']):
        raise UserError(f'{path}: its batch {content["batch"]} does not match the sums {list(content["totals"])}')
    if bool(content['scaler']) != (options.get('precision') == 'fp16'):
        raise UserError(f'{path}: its scaler does not match its --precision')
    if content['scheduler'].get('last_epoch') != content['epoch']:
        raise UserError(f'{path}: its epoch {content["epoch"]} does not match its scheduler')
    for name in checkpoint.not_finite(content):
        raise UserError(f'{path}: {name} holds values that are not finite')


def check_same_form(saved, own, name):
    """ValueError unless `saved` has the same nesting, names, types and shapes as `own`."""
    if isinstance(own, torch.Tensor) and isinstance(saved, torch.Tensor):
        if saved.shape != own.shape:
            raise ValueError(f'{name} has the shape {list(saved.shape)}, {list(own.shape)} is expected')
    elif type(saved) is not type(own) and {type(saved), type(own)} != {dict, OrderedDict}:
        raise ValueError(f'{name} is of type {type(saved).__name__}, {type(own).__name__} is expected')
    elif isinstance(own, dict):
        odd = sorted(map(str, own.keys() ^ saved.keys()))
        if odd:
            raise ValueError(f'{odd[0]} is in one {name} only')
        for key in own:
            check_same_form(saved[key], own[key], f'{name} {key}')
    elif isinstance(own, (list, tuple)):
        if len(own) != len(saved):
            raise ValueError(f'{name} has {len(saved)} entries, {len(own)} are expected')
        for number, pair in enumerate(zip(saved, own)):
            check_same_form(*pair, f'{name} {number}')


def check_optimizer(saved, optimizer, complete):
    """ValueError unless `saved` holds the settings of `optimizer` and Adam's moments for its parameters.

    complete: whether every parameter must have moments.
    """
    groups = optimizer.state_dict()['param_groups']
    for name in SETTINGS:
        check_equal([group[name] for group in saved['param_groups']], [group[name] for group in groups], name)
    parameters = dict(enumerate(parameter for group in optimizer.param_groups for parameter in group['params']))
    odd = saved['state'].keys() ^ parameters.keys() if complete else saved['state'].keys() - parameters.keys()
    if odd:
        raise ValueError(f'the moments of parameter {min(map(str, odd))} are missing or surplus')
    for number, moments in saved['state'].items():
        like = {'step': torch.tensor(0.0), 'exp_avg': parameters[number], 'exp_avg_sq': parameters[number]}
        check_same_form(moments, like, f'optimiser state {number}')
        wrong = faults(like, moments)
        if wrong or moments['step'] < 0 or (moments['exp_avg_sq'] < 0).any():
            raise ValueError(f'optimiser state {number}: {(wrong or ["a value is negative where none can be"])[0]}')


def check_equal(saved, own, name):
    """ValueError if a setting has changed."""
    if saved != own:
        raise ValueError(f'{name} was {saved}, is {own}')


def checked_schedule(saved, schedule):
    """The saved state to load into `schedule`; ValueError unless its rates are those of the saved epoch."""
    own = schedule.state_dict()
    # Versions of torch differ in the other entries.
    state = {name: value for name, value in saved['scheduler'].items() if name in own}
    check_same_form(state, {name: own[name] for name in state}, 'scheduler')
    check_equal(state['base_lrs'], schedule.base_lrs, 'base rates')
    rates = [base * factor(saved['epoch']) for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas)]
    groups = [group['lr'] for group in saved['optimizer']['param_groups']]
    for found in (groups, state['_last_lr']):
        if not all(map(math.isclose, found, rates)):
            raise ValueError(f'the rates of epoch {saved["epoch"]} are {rates}, not {found}')
    return state


def check_scaler(saved, scaler):
    """ValueError unless `saved` is a valid state of `scaler`."""
    own = scaler.state_dict()
    if not saved or not own:        # --precision has changed, which is allowed
        return
    check_same_form(saved, own, 'scaler')
    for name in own.keys() - {'scale', '_growth_tracker'}:
        check_equal(saved[name], own[name], name)
    if not (0 < saved['scale'] < math.inf and checkpoint.is_count(saved['_growth_tracker'])):
        raise ValueError(f'scaler: {saved["scale"]} is not a scale')


def differences(saved, options):
    """(['--option was A, is B', ...] that forbid resuming, the same for those that are only reported)."""
    refused, said = [], []
    now = vars(options)
    for name in sorted(now.keys() | saved.keys()):
        before, value = saved.get(name), now.get(name)
        before = method_name(before) if name == 'method' else before
        # An option newer than the file, with a value that keeps the old behaviour.
        later = name not in saved and (not value or value == BEFORE_OPTIONS.get(name))
        unsaid = name == 'network' and value is None        # the file's network is kept
        if name in HARMLESS or before == value or later or unsaid:
            continue
        line = f'{flag(name)} was {before}, is {value}'
        (said if name in REPORTED else refused).append(line)
    return refused, said


def check_options(content, options):
    """Refuses to resume with options that differ from the checkpoint's run, unless the difference is harmless."""
    before = content['options']
    if content.get('start') and content['start'] == start_digest(options):      # the same file, which may have moved
        before = {**before, **{name: getattr(options, name) for name in ('state', 'weights') if before.get(name)}}
    refused, said = differences(before, options)
    if refused:
        raise UserError(f'--resume: the run in {options.savedir} had other options: {"; ".join(refused)}; '
                        'give those again, or use another --savedir')
    for line in said:
        tell(f'resuming although {line}: results will not be bit-equal to an uninterrupted run')


def lock(folder):
    """Locks `folder` for the run of this process; UserError if another run holds it."""
    return locked(folder / LOCK, f'another run is at work in {folder}; wait for it, or use another --savedir')


class Stopped(SystemExit):
    """Ends the run immediately on a signal."""


class Interrupt:
    """Notes the signals that ask a run to stop: the current batch is finished, then the run saves and stops.

    place: its main process reports the signal. Python delivers signals to the main thread only; in another
        thread nothing is noted, and the program's own handlers stay.
    """

    def __init__(self, place):
        self.asked, self.interrupts, self.idle, self.kept, self.place = False, 0, False, {}, place
        self.agreed = None      # of the batch before: whether a rank was asked to stop

    def __enter__(self):
        in_main = threading.current_thread() is threading.main_thread()
        for number in STOPPING if in_main else ():
            kept = signal.getsignal(number)
            # An ignored SIGHUP stays ignored: nohup sets that.
            if number != signal.SIGHUP or kept != signal.SIG_IGN:
                self.kept[number] = signal.signal(number, self.note)
        return self

    def __exit__(self, *_):
        for number, handler in self.kept.items():
            signal.signal(number, handler)

    def note(self, number, _):
        """The signal handler. A second SIGINT stops the run immediately."""
        if not self.asked and self.place.main:
            again = '; Ctrl-C again stops at once' if number == signal.SIGINT else ''
            when = '' if self.idle else f' as soon as the run is saved{again}'
            say(f'{signal.Signals(number).name}: stopping{when}')
        self.asked = True
        self.interrupts += number == signal.SIGINT
        if self.interrupts > 1:
            raise KeyboardInterrupt
        if self.idle:
            raise Stopped(INTERRUPTED)

    @contextlib.contextmanager
    def at_once(self):
        """While no batch is running: a signal raises Stopped immediately."""
        self.idle = True
        try:
            if self.asked:
                raise Stopped(INTERRUPTED)
            yield
        finally:
            self.idle = False

    def stop(self):
        """Whether to stop now. Several ranks agree, one batch after the signal: a GPU need not finish this one."""
        if self.place.world == 1:
            return self.asked
        flag = torch.full((), float(self.asked), device=self.place.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        before, self.agreed = self.agreed, Fetched({'asked': flag})
        return before is not None and before.read()['asked'] > 0
