"""Work shared among processes."""
import signal
from collections import deque
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial

from tqdm import tqdm

from mdil.utils.errors import UserError


def ignore_interrupt():
    """Leaves Ctrl-C to the process that started this one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def in_parallel(function, items, workers, title):
    """Yields function(item) in the order of the list `items`, with progress on standard error.

    `workers` processes share the work (1: this process alone), so `function`, items and
    results must pickle. Raises what `function` raises, UserError if a process was killed.
    """
    progress = partial(tqdm, total=len(items), desc=title, unit='file', leave=False, disable=None)
    if workers == 1 or len(items) < 2:
        yield from progress(map(function, items))
        return
    chunk = max(1, min(16, len(items) // (4 * workers)))
    try:
        with ProcessPoolExecutor(min(workers, len(items)), initializer=ignore_interrupt) as pool:
            yield from progress(pool.map(function, items, chunksize=chunk))
    except BrokenProcessPool:
        raise UserError(f'{title}: a worker process was killed, maybe for memory; use fewer --workers') from None


def in_threads(function, items, threads):
    """Yields function(item) in the order of the iterable `items`, computed by `threads` threads (0: by this one).

    For work that runs without Python's lock. Threads stay at most four items each ahead,
    which bounds the memory.
    """
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
