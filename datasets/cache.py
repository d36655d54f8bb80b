"""Cache of resized images and labels: decoded and resized once, then read from memory-mapped files.

A cache folder holds one folder for every domain, split and size:

    <domain>-<split>-<height>x<width>-<digest>/images.npy    uint8 (N, 3, H, W)
                                               labels.npy    uint8 (N, H, W) class indices
                                               sources.json  {file: [size, time]}

The digest covers the names, sizes and times of the source files and how labels map to classes, so any
change of them leads to a new folder. A new cache replaces those whose source files have changed; caches of
other selections of the data stay. A cache is built under a lock in a temporary folder next to it and
renamed when complete, so a folder with its name is always complete. The lock ends with the process that
holds it. The next build removes what a killed one has left.
"""
import contextlib
import copy
import hashlib
import json
import os
import shutil
import tempfile
from functools import partial
from pathlib import Path
from urllib.parse import quote

import numpy as np
import torch

from mdil.datasets.segmentation import load_pair
from mdil.utils.errors import UserError
from mdil.utils.files import locked
from mdil.utils.workers import in_threads

VERSION = 1     # raised whenever the same files give other pixels
HEX = '[0-9a-f]' * 16


class Stored:
    """The resized pairs in a cache folder. Can be pickled; every process maps the files itself."""

    def __init__(self, folder):
        self.folder = folder
        try:
            self.images, self.labels = (np.load(folder / name, mmap_mode='r') for name in ('images.npy', 'labels.npy'))
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f'{folder}: missing or damaged ({error}); delete the rest and start again') from None

    def __getitem__(self, index):
        """Image (3, H, W) and label (H, W), uint8, copied into memory."""
        return torch.from_numpy(np.array(self.images[index])), torch.from_numpy(np.array(self.labels[index]))

    def __reduce__(self):
        return Stored, (self.folder,)


def cached(dataset, folder, workers=None):
    """A copy of SegmentationDataset `dataset` that reads from the cache in `folder`, which is built if necessary.

    workers: threads that build it (default: one per core).

    Several processes may call this at once: one builds, the others wait. UserError for a bad image or
    label, as without a cache, and if the cache does not fit on the disk or cannot be written.
    """
    folder = Path(folder)
    try:
        found = find_or_build(dataset, folder, workers or os.cpu_count() or 1)
    except OSError as error:
        raise UserError(f'the cache in {folder} cannot be made: {error}') from None
    other = copy.copy(dataset)
    other.stored = Stored(found)
    return other


def find_or_build(dataset, folder, workers):
    """Path of the complete cache of `dataset` in `folder`."""
    name = f'{quote(dataset.domain.name, safe="")}-{dataset.split}-{dataset.size[0]}x{dataset.size[1]}'
    stamps = {os.path.abspath(path): stamp(path) for pair in dataset.pairs for path in (pair.image, pair.label)}
    target = folder / f'{name}-{digest(dataset, stamps)}'
    if not target.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / f'.{name}.lock') as alone:
            if not target.is_dir():
                outdated = filter(is_outdated, folder.glob(f'{name}-{HEX}'))
                for old in (*outdated, *folder.glob(f'.{name}-{HEX}.*')) if alone else ():
                    shutil.rmtree(old)
                check_space(dataset, folder)
                build(dataset, target, workers, stamps)
    return target


def stamp(path):
    """Size and time of a file: [bytes, nanoseconds]."""
    status = os.stat(path)
    return [status.st_size, status.st_mtime_ns]


def is_outdated(cache):
    """Whether a source file of the cache folder has changed since. A missing file does not count: it may come back."""
    try:
        sources = json.loads((cache / 'sources.json').read_text())
    except (OSError, ValueError):
        return True         # from an earlier version, or damaged
    return any(os.path.exists(path) and stamp(path) != before for path, before in sources.items())


def digest(dataset, stamps):
    """16 hexadecimal digits that change with the source files, their order and how their labels map to classes.

    stamps: {absolute path: `stamp`} of the source files.
    """
    state = hashlib.sha256(f'{VERSION}'.encode())
    for pair in dataset.pairs:
        for path in (pair.image, pair.label):
            state.update(os.fsencode(os.path.relpath(path, dataset.folder)))
            state.update('\0'.join(map(str, ('', *stamps[os.path.abspath(path)], ''))).encode())
        state.update(f'{sorted(pair.values.items())}{"colors" * pair.by_color}'.encode())
    return state.hexdigest()[:16]


def check_space(dataset, folder):
    """UserError if the cache of `dataset` does not fit on the disk of `folder`."""
    height, width = dataset.size
    needed, free = len(dataset) * dataset.sample_bytes() + 2 ** 20, shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(f'the cache of {dataset.domain.name} {dataset.split} at {width}x{height} needs '
                        f'{needed / 1e9:.2f} GB, {folder} has {free / 1e9:.2f} GB free; choose another folder, '
                        'free some space, or leave out --cache')


def build(dataset, target, workers, stamps):
    """Builds the cache folder `target` completely or not at all.

    stamps: {absolute path: `stamp`} of the source files before they are read; UserError if one has changed since.
    """
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f'.{target.name}.') as temporary:
        made = Path(temporary) / target.name
        made.mkdir()
        with contextlib.ExitStack() as stack:
            shape = (len(dataset), 3, *dataset.size)
            images = stack.enter_context(array_file(made / 'images.npy', shape))
            labels = stack.enter_context(array_file(made / 'labels.npy', shape[:1] + shape[2:]))
            for image, label in load_all(dataset, workers):
                images.write(image.numpy())
                labels.write(label.numpy())
        if changed := next((path for path, before in stamps.items() if stamp(path) != before), None):
            raise UserError(f'{changed} was changed while the cache was built; start again')
        (made / 'sources.json').write_text(json.dumps(stamps))
        try:
            os.rename(made, target)
        except OSError:
            if not target.is_dir():     # where files cannot be locked, another process may have been faster
                raise


@contextlib.contextmanager
def array_file(path, shape):
    """A new .npy file for uint8 values that are written in order; it is on disk when closed."""
    with open(path, 'wb') as file:
        np.lib.format.write_array_header_1_0(file, {'descr': '|u1', 'fortran_order': False, 'shape': shape})
        yield file
        file.flush()
        os.fsync(file.fileno())


def load_all(dataset, workers):
    """Yields the resized pairs in order, with progress on standard error.

    Threads are enough, because decoding and resizing release Python's lock.
    """
    return in_threads(partial(load_pair, size=dataset.size), dataset.pairs, workers,
                      f'cache of {dataset.domain.name} {dataset.split}')
