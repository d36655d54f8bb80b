"""Sharing work among processes and threads, and ending those processes."""
import atexit
import ctypes
import multiprocessing.util     # for its exit function, which runs after `end_loaders` because it comes first
import os
import signal
import sys
from collections import deque
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial

from tqdm import tqdm

from mdil.utils.errors import UserError

STOPPING = signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGTERM     # signals that ask a run to stop
INTERRUPTED = 75        # exit status of a run that a signal stopped; it has saved and continues with --resume
PARENTS_DEATH = 1       # PR_SET_PDEATHSIG of Linux's prctl
# How processes start. From 3.14 on, Python's default on Linux is a fork server: every process would import torch
# again, scripts without `if __name__ == '__main__'` would fail, and the server would be the parent.
CONTEXT = multiprocessing.get_context('fork') if sys.platform == 'linux' else None


def batched(iterable, size):
    """Yields lists of `size` elements; the last may be shorter."""
    batch = []
    for element in iterable:
        batch.append(element)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def end_with(parent, number=signal.SIGKILL):
    """Makes this process receive the signal `number` when its parent, the process `parent`, ends; Linux only.

    Linux already counts the end of the thread that started this process as the end of the parent.
    """
    if sys.platform == 'linux':
        ctypes.CDLL(None).prctl(PARENTS_DEATH, number)
        if os.getppid() != parent:      # the parent has already ended
            os.kill(os.getpid(), number)


def become_worker(parent, ignored):
    """Makes this process a worker: it ends with the process `parent`, and leaves the signals in `ignored` to it.

    The other signals in STOPPING get their default action.
    """
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN if number in ignored else signal.SIG_DFL)
    end_with(parent)


def become_loader(parent, _):
    """`partial(become_loader, os.getpid())` is the worker_init_fn of a DataLoader.

    Schedulers send a signal to all processes of a run at once. Loaders ignore it, because the run
    needs them to finish its batch.
    """
    become_worker(parent, STOPPING)


def end_loaders(owner):
    """Kills the loaders that are still there when the process `owner`, not a fork of it, ends.

    Python then sends them SIGTERM and waits, but loaders ignore that signal.
    """
    loaders = [child for child in multiprocessing.active_children() if child.daemon and os.getpid() == owner]
    if loaders and hasattr(signal, 'SIGCHLD'):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)       # torch's handler would call this an error
    for loader in loaders:
        loader.kill()


atexit.register(end_loaders, os.getpid())


def in_parallel(function, items, workers, title):
    """Yields function(item) in the order of the list `items`, with a progress bar on standard error.

    `workers` processes share the work (0 or 1: this process does it), so `function`, items and results
    must be picklable. Raises what `function` raises; UserError if a process was killed.
    """
    progress = partial(tqdm, total=len(items), desc=title, unit='file', leave=False, disable=None)
    if workers < 2 or len(items) < 2:
        yield from progress(map(function, items))
        return
    chunk = max(1, min(16, len(items) // (4 * workers)))
    # A pool ends its processes with SIGTERM, so they must not ignore that signal.
    worker = {'mp_context': CONTEXT, 'initializer': become_worker, 'initargs': (os.getpid(), STOPPING[:-1])}
    try:
        with ProcessPoolExecutor(min(workers, len(items)), **worker) as pool:
            yield from progress(pool.map(function, items, chunksize=chunk))
    except BrokenProcessPool:
        raise UserError(f'{title}: a worker process was killed, perhaps for lack of memory; '
                        'use fewer processes (--num-workers)') from None


def in_threads(function, items, threads, title=''):
    """Yields function(item) in the order of the iterable `items`, computed by `threads` threads (0: in this thread).

    For work that releases Python's global lock. At most four items per thread are computed ahead,
    which bounds the memory. With a title, `items` is a list, and standard error shows a progress bar.
    """
    if title:
        yield from tqdm(in_threads(function, items, threads), total=len(items), desc=title, unit='image', leave=False,
                        disable=None)
        return
    if not threads:
        yield from map(function, items)
        return
    with ThreadPoolExecutor(threads) as pool:
        waiting = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 4 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
