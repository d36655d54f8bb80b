"""torchrun with the exit status of the processes that it starts.

    python -m mdil torchrun --nproc_per_node 4 train.py --domains ...

An error that a user can fix gives one line and exit status 2, as in a single process, instead of
torchrun's long report and status 1. On a signal, all processes save and the exit status is 75.
"""
import logging
import os
import signal
import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError

from mdil.utils.errors import UserError, brief, run_main
from mdil.utils.workers import INTERRUPTED, STOPPING

# Seconds after which torchrun kills what a signal has not ended; its own 30 are too few to validate or compile first.
# Less than the 300 that the scripts ask of SLURM. Older versions of torch do not read it.
GRACE = 240


def end_of(failed):
    """Exit status for torchrun's ChildFailedError; UserError if a signal killed the process."""
    rank, failure = failed.get_first_failure()
    if failure.exitcode < 0:
        raise UserError(f'process {rank} was ended by {signal.Signals(-failure.exitcode).name} (out of memory?); '
                        '--resume continues from the last checkpoint')
    return failure.exitcode


def stop_once(number, _):
    """The signal handler: torchrun passes the first signal on and waits for its processes to save, up to GRACE."""
    for other in STOPPING:
        signal.signal(other, signal.SIG_IGN)
    raise SignalException(signal.Signals(number).name, signal.Signals(number))


def main(argv=None):
    """Runs torchrun with the arguments; returns the exit status."""
    logging.disable(logging.ERROR)      # hides torchrun's report
    sys.argv[0] = 'python -m mdil torchrun'     # the name in its help
    os.environ.setdefault('TORCH_ELASTIC_SHUTDOWN_TIMEOUT', str(GRACE))
    os.environ.setdefault('OMP_NUM_THREADS', '1')       # torchrun would set it too, with a four-line warning
    for name in ('PET_SIGNALS_TO_HANDLE', 'TORCHELASTIC_SIGNALS_TO_HANDLE'):      # in newer and in older versions
        os.environ.setdefault(name, 'SIGQUIT')      # this module handles the other signals
    for number in STOPPING:
        signal.signal(number, stop_once)
    try:
        run.main(argv)
    except ChildFailedError as failed:
        return end_of(failed)
    except SignalException:
        return INTERRUPTED
    except (RendezvousError, ConnectionError) as error:
        raise UserError(f'the machines cannot connect, or no longer can ({brief(error)}); check '
                        'what the others say, that all name the same first machine, and that its port is '
                        'open') from None
    return 0


if __name__ == '__main__':
    run_main(main)
