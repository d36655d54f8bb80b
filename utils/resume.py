"""Going on where a run stopped: which file, whether it fits, and that nobody else is at it."""
import contextlib
import fcntl
import signal
import sys

import torch
import torch.distributed as dist

from utils import checkpoint
from utils.errors import UserError

# Options that change no result, or only where the data lies; a change of the second kind is said.
HARMLESS = {'resume', 'num_workers', 'port', 'server', 'env', 'savedir', 'data_root', 'data', 'checkpoint_minutes',
            'cache', 'model_name_suffix'}
SAID = {'device', 'precision', 'parallel'}
INTERRUPTED = 75        # exit status: saved on a signal, run again with --resume


def find(folder, names):
    """The content of the first readable checkpoint of `names` in `folder`; None if there is none at all.

    A damaged file is said, and the next name tried; UserError if all that exist are damaged.
    """
    reasons = []
    for name in names:
        path = folder / name
        if not path.exists():
            continue
        try:
            content = checkpoint.read(path)
            if not isinstance(content, dict) or 'optimizer' not in content or 'random' not in content:
                raise UserError(f'{path} is no checkpoint of a run of train.py')
            if reasons:
                print(f'{"; ".join(reasons)}; going on from {path}', file=sys.stderr)
            return content
        except UserError as error:
            reasons.append(str(error))
    if reasons:
        raise UserError(f'--resume: {"; ".join(reasons)}; move the file away to start fresh')
    return None


def differences(saved, options):
    """(list of 'option: was A, is B' that forbid going on, list of those worth saying)."""
    refused, said = [], []
    now = vars(options)
    for name in sorted(now.keys() | saved.keys()):
        before, value = saved.get(name), now.get(name)
        if name in HARMLESS or before == value:
            continue
        line = f'--{name.replace("_", "-")} was {before}, is {value}'
        (said if name in SAID else refused).append(line)
    return refused, said


def check_options(content, options):
    """Refuses to go on with other options than the checkpoint's run had, unless they are harmless."""
    saved = content.get('options')
    if not isinstance(saved, dict):
        raise UserError(f'--resume: the checkpoint in {options.savedir} holds no options; use another --savedir')
    refused, said = differences(saved, options)
    if refused:
        raise UserError(f'--resume: the run in {options.savedir} had other options: {"; ".join(refused)}; '
                        'repeat them, or use another --savedir')
    for line in said:
        print(f'resuming although {line}: results will not be bit-equal to an uninterrupted run', file=sys.stderr)


@contextlib.contextmanager
def lock(folder):
    """Holds `folder` for this process; UserError if another one does. A dead process holds nothing."""
    with open(folder / '.lock', 'w') as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f'another run is at work in {folder}; wait for it, or use another --savedir') from None
        yield


class Interrupt:
    """Notes SIGTERM, SIGINT and SIGUSR1 so that the batch is finished before the run saves and stops."""

    def __init__(self):
        self.asked, self.interrupts, self.kept = False, 0, {}

    def __enter__(self):
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            self.kept[number] = signal.signal(number, self.note)
        return self

    def __exit__(self, *_):
        for number, handler in self.kept.items():
            signal.signal(number, handler)

    def note(self, number, _):
        """The handler: a second SIGINT stops at once."""
        self.asked = True
        self.interrupts += number == signal.SIGINT
        if self.interrupts > 1:
            raise KeyboardInterrupt

    def stop(self, place):
        """Whether to stop now; all ranks agree."""
        if place.world == 1:
            return self.asked
        flag = torch.tensor(float(self.asked), device=place.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)
