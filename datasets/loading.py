"""Batches: which samples, in which order, on which rank."""
import contextlib
import os
import shutil
from functools import partial

import numpy as np
import torch
from torch.utils.data import DataLoader

from mdil.datasets.segmentation import SegmentationDataset
from mdil.utils.errors import UserError
from mdil.utils.workers import CONTEXT, become_loader

ORDER = 1       # distinguishes the order's random numbers from the augmentation's


def spaced(items, count):
    """At most `count` elements of a sequence, evenly spaced."""
    count = min(count, len(items))
    return [items[number * len(items) // count] for number in range(count)]


class TrainBatches:
    """Batch sampler: a new order every epoch, drawn from (seed, epoch).

    Yields lists of (epoch, number); the image is `number % count`.

    samples: samples per epoch (default: `count`). If more than `count`, the order is several permutations
        one after another.
    batch_size: over all ranks; each rank takes its share.
    limit: most batches per epoch.
    """

    def __init__(self, count, batch_size, seed, samples=None, limit=None, rank=0, world=1):
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.samples, self.limit = samples or count, limit
        self.rank, self.world = rank, world
        self.epoch, self.start = 1, 0

    def __len__(self):
        """Batches of an epoch."""
        batches = -(-self.samples // self.batch_size)
        return min(batches, self.limit or batches)

    @property
    def fewest(self):
        """Images of this rank in the smallest batch of an epoch."""
        left = self.samples % self.batch_size
        whole = not left or len(self) * self.batch_size <= self.samples
        return -(-(self.batch_size if whole else left) // self.world)

    def order(self):
        """Sample numbers of the epoch."""
        random = np.random.default_rng((self.seed, self.epoch, 0, ORDER))
        passes = -(-self.samples // self.count)
        return np.concatenate([number * self.count + random.permutation(self.count)
                               for number in range(passes)])[:self.samples]

    def __iter__(self):
        order = self.order()
        for batch in range(self.start, len(self)):
            numbers = order[batch * self.batch_size:(batch + 1) * self.batch_size]
            # A short last batch is filled up from the epoch's first samples, so that no rank is idle. With fewer
            # samples than ranks, they repeat.
            numbers = np.concatenate([numbers, np.resize(order, -len(numbers) % self.world)])
            yield [(self.epoch, int(number)) for number in numbers[self.rank::self.world]]


class EvalBatches:
    """Batch sampler: every image once, split over the ranks without padding. batch_size: per rank; limit: in all."""

    def __init__(self, count, batch_size, rank=0, world=1, limit=None):
        self.batch_size = batch_size * world
        indices = list(range(count))[:limit and limit * batch_size][rank::world]
        self.batches = [[(0, index) for index in indices[start:start + batch_size]]
                        for start in range(0, len(indices), batch_size)]

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        return iter(self.batches)


def check_shared_memory(dataset, batch_size, workers, folder='/dev/shm'):
    """UserError if the batches that loader processes may queue exceed the shared memory: they would hang."""
    needed = (2 * workers + 2) * batch_size * dataset.sample_bytes()
    with contextlib.suppress(FileNotFoundError):        # without such a folder, they do not use it
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise UserError(f'{folder} has {free / 2 ** 20:.1f} MiB free, but {workers} loader processes need '
                            f'{needed / 2 ** 20:.1f} MiB of shared memory; enlarge it (docker run --shm-size=8g), or '
                            'lower --num-workers (0: no such processes)')


def make_loader(dataset, batches, workers, pin, collate=None):
    """DataLoader over `batches`; workers live as long as the loader. collate: makes a batch (None: as torch does).

    It has a generator of its own. The default would draw from the global one, which dropout uses, at the
    start of every loop.
    """
    if workers and isinstance(dataset, SegmentationDataset):
        check_shared_memory(dataset, batches.batch_size, workers)
    return DataLoader(dataset, batch_sampler=batches, num_workers=workers, pin_memory=pin,
                      persistent_workers=workers > 0, generator=torch.Generator(), collate_fn=collate,
                      multiprocessing_context=CONTEXT if workers else None,
                      worker_init_fn=partial(become_loader, os.getpid()))
