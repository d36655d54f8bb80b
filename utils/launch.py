"""torchrun, ending as the processes that it starts do.

    python -m mdil torchrun --nproc_per_node 4 train.py --domains ...

What a user can mend is one line and exit status 2, as of a single process, in place of
torchrun's report of many lines and status 1. A signal lets all processes save and ends with 75.
"""
import logging
import os
import signal
from importlib import import_module

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from mdil.utils.errors import UserError, run_main

STOPPED = 75        # exit status of train.py where a signal stopped it


def end_of(failed):
    """Exit status for the ChildFailedError of torchrun; UserError for a process that a signal ended."""
    rank, failure = failed.get_first_failure()
    if failure.exitcode < 0:
        raise UserError(f'process {rank} was ended by {signal.Signals(-failure.exitcode).name} (out of memory?); --resume '
                        'goes on from the last checkpoint')
    return failure.exitcode


def main(argv=None):
    """Runs torchrun with the arguments; returns the exit status."""
    elastic = import_module('torch.distributed.elastic.multiprocessing.api')
    logging.getLogger('torch.distributed.elastic').setLevel(logging.CRITICAL)
    os.environ.setdefault('OMP_NUM_THREADS', '1')       # what torchrun sets, and says in four lines
    # torchrun passes SIGTERM on to its processes, which save; of SIGUSR1 it would die.
    signal.signal(signal.SIGUSR1, lambda *_: signal.raise_signal(signal.SIGTERM))
    try:
        run.main(argv)
    except ChildFailedError as failed:
        return end_of(failed)
    except elastic.SignalException:
        return STOPPED
    return 0


if __name__ == '__main__':
    run_main(main)
