"""datasets.cache: equal to loading without it, rebuilt when due, safe when builds meet or die."""
import errno
import io
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import struct
import tempfile
import time
import zlib
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mdil.datasets import cache
from mdil.datasets.cache import cached
from mdil.datasets.domains import DOMAINS, get_domain
from mdil.datasets.loading import TrainBatches, make_loader
from mdil.datasets.pairs import Pair
from mdil.datasets.segmentation import SegmentationDataset, load_pair
from mdil.utils import files
from mdil.utils.errors import UserError

FORK = multiprocessing.get_context('fork')
SIZE = (32, 64)


@pytest.fixture
def roads(toy, tmp_path):
    """A copy of the toy roads that a test may change."""
    shutil.copytree(toy / 'cityscapes', tmp_path / 'roads' / 'cityscapes')
    return tmp_path / 'roads'


@pytest.fixture
def loads(monkeypatch):
    """The images that builds have loaded in this process so far."""
    seen = []
    monkeypatch.setattr(cache, 'load_pair', lambda pair, size: seen.append(pair.image) or load_pair(pair, size))
    return seen


def train_set(root, size=SIZE, name='cityscapes', **keywords):
    return SegmentationDataset(DOMAINS[name], root, 'train', size, **keywords)


def subfolders(folder):
    return [path for path in folder.iterdir() if path.is_dir()]


def assert_equal(dataset, other):
    """Both give the same images, labels and indices."""
    assert len(dataset) == len(other) > 0
    for number in range(len(dataset)):
        for one, two in zip(dataset[1, number], other[1, number], strict=True):
            assert torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two


def by_pillow(pair, size):
    """Image (3, H, W) and label (H, W) as the published code decodes and resizes them."""
    image = Image.open(pair.image).convert('RGB').resize(size[::-1], Image.BILINEAR)
    label = np.array(Image.open(pair.label).resize(size[::-1], Image.NEAREST))
    classes = np.vectorize(pair.values.get)(label)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1), torch.from_numpy(classes.astype(np.uint8))


# Toy roads are 64 x 128: half, as large as they are, larger, and neither.
@pytest.mark.parametrize('size', [(32, 64), (64, 128), (128, 256), (40, 56), (64, 32)])
def test_pixels_are_those_of_pillow(toy, size):
    for name in ('cityscapes', 'BDD', 'IDD'):
        for pair in train_set(toy, size, name).pairs:
            for ours, theirs in zip(load_pair(pair, size), by_pillow(pair, size), strict=True):
                assert ours.dtype == torch.uint8 and ours.is_contiguous() and torch.equal(ours, theirs)


def pair_of(folder, image):
    """Pair of `image`, an Image or the bytes of a file, and a label of class 0, in `folder`."""
    path = folder / 'image.png'
    path.write_bytes(image) if isinstance(image, bytes) else image.save(path)
    Image.new('L', Image.open(path).size).save(folder / 'label.png')
    return Pair(path, folder / 'label.png', {0: 0})


def png_of_16_bits():
    """A 32x16 RGB PNG of 16 bits, which Pillow cannot write, as bytes."""
    rows = b''.join(b'\0' + np.random.default_rng(row).bytes(32 * 6) for row in range(16))
    chunks = (b'IHDR', struct.pack('>IIBBBBB', 32, 16, 16, 2, 0, 0, 0)), (b'IDAT', zlib.compress(rows)), (b'IEND', b'')
    return b'\x89PNG\r\n\x1a\n' + b''.join(struct.pack('>I', len(content)) + kind + content + struct.pack(
        '>I', zlib.crc32(kind + content)) for kind, content in chunks)


def image_of_kind(kind):
    """A 32x16 image of Pillow's mode `kind`, or a file that is no plain 8-bit RGB PNG, as bytes."""
    image = Image.fromarray(np.random.default_rng(0).integers(256, size=(16, 32, 3), dtype=np.uint8))
    if kind == '16 bits':
        return png_of_16_bits()
    if kind in ('jpeg', 'transparent'):
        file = io.BytesIO()
        image.save(file, 'JPEG' if kind == 'jpeg' else 'PNG', transparency=(1, 2, 3))
        return file.getvalue()
    return image.convert(kind)


@pytest.mark.parametrize('kind', ['RGBA', 'L', 'P', '1', '16 bits', 'jpeg', 'transparent', 'RGB'])
def test_images_of_other_kinds(tmp_path, kind):
    pair = pair_of(tmp_path, image_of_kind(kind))
    assert torch.equal(load_pair(pair, (8, 16))[0], by_pillow(pair, (8, 16))[0])


def damage(path):
    content = path.read_bytes()
    path.write_bytes(content[:len(content) // 2])


@pytest.mark.parametrize('size', [SIZE, (24, 48)])
@pytest.mark.parametrize('part', ['image', 'label'])
def test_damaged_file_is_named_and_leaves_nothing(roads, tmp_path, size, part):
    data = train_set(roads, size)
    path = getattr(data.pairs[5], part)
    damage(path)
    for use in (lambda: data.load(5), lambda: cached(data, tmp_path / 'cache')):
        with pytest.raises(UserError, match=f'{path.name} cannot be read'):
            use()
    assert [found.suffix for found in (tmp_path / 'cache').iterdir()] == ['.lock']


def test_wrong_sizes_and_labels_are_named(roads, tmp_path):
    data = train_set(roads)
    Image.new('L', (128, 64), 77).save(data.pairs[3].label)
    with pytest.raises(UserError, match=r'label values \[77\] are not in the class list'):
        cached(data, tmp_path / 'cache')
    Image.new('L', (64, 64)).save(data.pairs[3].label)
    with pytest.raises(UserError, match='is 128x64 but its label .* is 64x64'):
        cached(data, tmp_path / 'cache')


@pytest.mark.parametrize('name', ['cityscapes', 'BDD', 'IDD'])
@pytest.mark.parametrize('augmented', [False, True])
def test_equals_loading_without(toy, tmp_path, name, augmented):
    data = train_set(toy, name=name, augmented=augmented, seed=5)
    assert_equal(cached(data, tmp_path, workers=1), data)
    assert_equal(cached(data, tmp_path / 'many', workers=8), data)
    assert data.stored is None


def test_build_is_only_a_little_ahead_of_the_disk(toy, loads):
    building = cache.load_all(train_set(toy), workers=1)
    next(building)
    time.sleep(0.2)
    assert 1 <= len(loads) <= 5
    building.close()


def test_two_that_build_it_where_files_cannot_be_locked_leave_each_other_alone(toy, tmp_path, monkeypatch):
    def no_locks(file, how):
        raise OSError(errno.ENOLCK, 'No locks available')
    monkeypatch.setattr(files.fcntl, 'flock', no_locks)
    build, data = cache.build, train_set(toy)

    def twice(dataset, target, workers, stamps):
        monkeypatch.setattr(cache, 'build', build)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f'.{target.name}.') as half_built:
            cached(data, tmp_path)
            assert Path(half_built).is_dir()
        build(dataset, target, workers, stamps)     # the slower one
    monkeypatch.setattr(cache, 'build', twice)
    assert_equal(cached(data, tmp_path), data)


def test_is_built_once_for_each_split_and_size(toy, tmp_path, loads):
    data, val = train_set(toy), SegmentationDataset(DOMAINS['cityscapes'], toy, 'val', SIZE)
    for dataset in (data, val, train_set(toy, (16, 32)), train_set(toy, name='IDD')):
        before = len(loads)
        assert_equal(cached(dataset, tmp_path), dataset)
        assert len(loads) == before + len(dataset)
    cached(data, tmp_path), cached(val, tmp_path)
    assert len(loads) == 8 + 4 + 8 + 8


@pytest.mark.parametrize('part, level', [('image', 0), ('image', 9), ('label', 0), ('label', 9)])
def test_changed_file_rebuilds_and_replaces(roads, tmp_path, loads, part, level):
    """Level 0 changes a file's time alone, level 9 its size alone."""
    folder, path = tmp_path / 'cache', getattr(train_set(roads).pairs[2], part)
    Image.open(path).save(path, compress_level=0)
    first, before = cached(train_set(roads), folder), path.stat()
    Image.open(path).transpose(Image.FLIP_TOP_BOTTOM).save(path, compress_level=level)
    os.utime(path, ns=(0, before.st_mtime_ns + (level == 0)))
    assert (path.stat().st_size == before.st_size) == (level == 0)
    second = cached(train_set(roads), folder)
    assert_equal(second, train_set(roads))
    assert len(loads) == 16 and len(subfolders(folder)) == 1
    number = ('image', 'label').index(part)
    assert not torch.equal(first.load(2)[number], second.load(2)[number]), 'a run keeps what it has mapped'
    with pytest.raises(UserError, match='missing or damaged'):
        pickle.loads(pickle.dumps(first))


def test_a_file_that_changes_while_the_cache_is_built_ends_it(roads, tmp_path, monkeypatch):
    load_all = cache.load_all

    def changed(dataset, workers):
        path = dataset.pairs[0].label
        os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
        return load_all(dataset, workers)
    monkeypatch.setattr(cache, 'load_all', changed)
    with pytest.raises(UserError, match='was changed while the cache was built; start again'):
        cached(train_set(roads), tmp_path / 'cache')
    assert not subfolders(tmp_path / 'cache')


def test_changed_label_mapping_and_missing_file_rebuild(roads, tmp_path, loads):
    cached(train_set(roads), tmp_path / 'cache')
    data = train_set(roads)
    data.pairs = tuple(Pair(pair.image, pair.label, {**pair.values, 7: 3}) for pair in data.pairs)
    assert_equal(cached(data, tmp_path / 'cache'), data)
    data.pairs = data.pairs[1:]
    assert_equal(cached(data, tmp_path / 'cache'), data)
    assert len(loads) == 8 + 8 + 7
    cached(train_set(roads), tmp_path / 'cache')        # caches of other selections of the same files stay
    assert len(loads) == 8 + 8 + 7 and len(subfolders(tmp_path / 'cache')) == 3


def test_moved_data_is_recognised(roads, tmp_path, loads):
    cached(train_set(roads), tmp_path / 'cache')
    roads.rename(tmp_path / 'elsewhere')
    moved = train_set(tmp_path / 'elsewhere')
    assert_equal(cached(moved, tmp_path / 'cache'), moved)
    assert len(loads) == 8


@pytest.mark.parametrize(('workers', 'started_by'), [(0, 'fork'), (2, 'fork'), (2, 'forkserver')])
def test_batches_do_not_depend_on_workers(toy, tmp_path, workers, started_by, start_method):
    start_method(started_by)
    data = train_set(toy, augmented=True, seed=1)
    both = [make_loader(dataset, TrainBatches(len(data), 3, 1), count, pin=False)
            for dataset, count in ((data, 0), (cached(data, tmp_path), workers))]
    for plain, stored in zip(*both, strict=True):
        assert all(torch.equal(one, two) for one, two in zip(plain, stored, strict=True))


def test_pickle_holds_no_pixels(toy, tmp_path):
    data = cached(train_set(toy), tmp_path)
    content = pickle.dumps(data)
    assert len(content) < len(pickle.dumps(train_set(toy))) + 1000
    assert_equal(pickle.loads(content), data)
    data.load(0)[0].zero_()
    assert data.load(0)[0].any(), 'what load gives is its own memory'


def test_too_small_disk_is_refused(toy, tmp_path, monkeypatch, loads):
    usage = namedtuple('usage', 'total used free')
    needed = 8 * 4 * 512 * 1024
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: usage(10 ** 9, 0, needed))
    with pytest.raises(UserError, match='train at 1024x512 needs 0.02 GB, .* has 0.02 GB free'):
        cached(train_set(toy, (512, 1024)), tmp_path)
    assert not loads and not subfolders(tmp_path)
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: usage(10 ** 9, 0, needed + 2 ** 20))
    cached(train_set(toy, (512, 1024)), tmp_path)
    assert needed < sum(path.stat().st_size for path in tmp_path.rglob('*.npy')) < needed + 2 ** 20


def test_folder_that_cannot_be_written(toy, tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(UserError, match='cannot be made'):
        cached(train_set(toy), tmp_path / 'file' / 'cache')


def test_damaged_cache_is_named(toy, tmp_path):
    cached(train_set(toy), tmp_path)
    damage(next(tmp_path.rglob('images.npy')))
    with pytest.raises(UserError, match='missing or damaged'):
        cached(train_set(toy), tmp_path)


def test_own_domain_with_an_awkward_name_and_absolute_folders(tmp_path, loads):
    for folder in ('own', 'images', 'own/labels'):
        (tmp_path / folder).mkdir()
    Image.new('RGB', (16, 16), (9, 8, 7)).save(tmp_path / 'images/1.png')
    Image.new('L', (16, 16), 1).save(tmp_path / 'own/labels/1.png')
    (tmp_path / 'own/domain.json').write_text(json.dumps({
        'images': f'{tmp_path}/images', 'labels': 'labels', 'classes': [{'name': name, 'color': [0, 0, 0]} for name in 'ab']}))
    data = SegmentationDataset(get_domain('a b [*]', {'a b [*]': tmp_path / 'own'}), 'nowhere', 'train', (8, 8))
    for _ in range(2):
        assert_equal(cached(data, tmp_path / 'cache'), data)
    Image.new('L', (16, 16), 0).save(tmp_path / 'own/labels/1.png')
    assert_equal(cached(data, tmp_path / 'cache'), data)
    assert len(loads) == 2 and len(subfolders(tmp_path / 'cache')) == 1


def slow_build(root, folder, log, barrier=None):
    """Builds in a process of its own, slowly, with a line in `log` for every image loaded."""
    def load(pair, size):
        time.sleep(0.03)
        with open(log, 'a') as file:
            file.write(f'{pair.image}\n')
        return load_pair(pair, size)
    torch.set_num_threads(1)
    cache.load_pair = load
    data = train_set(root)
    if barrier:
        barrier.wait()
    assert_equal(cached(data, folder, workers=1), data)


def start_build(*arguments):
    process = FORK.Process(target=slow_build, args=arguments)
    process.start()
    return process


def test_builds_at_once_share_one(toy, tmp_path):
    barrier = FORK.Barrier(3)
    processes = [start_build(toy, tmp_path / 'cache', tmp_path / 'log', barrier) for _ in range(3)]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert len((tmp_path / 'log').read_text().splitlines()) == 8
    assert sorted(path.suffix for path in (tmp_path / 'cache').iterdir()) == ['', '.lock']


def test_killed_build_is_cleared_away(toy, tmp_path, loads):
    folder, log = tmp_path / 'cache', tmp_path / 'log'
    process = start_build(toy, folder, log)
    while not log.exists():
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.join(60)
    left = subfolders(folder)
    assert process.exitcode == -signal.SIGKILL and len(log.read_text().splitlines()) < 8
    assert len(left) == 1 and list(left[0].rglob('images.npy'))
    data = train_set(toy)
    assert_equal(cached(data, folder), data)
    assert len(loads) == 8 and not left[0].exists()
    assert len(subfolders(folder)) == 1
