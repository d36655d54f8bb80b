"""Loading in images per second of processor time: the published way, and ours without and with a cache.

    python -m benchmarks.loading [--height 512 --images 24 --rounds 7 --seconds 1 --json FILE]

Draws its own images in the sizes of three data sets, then measures the routes in turn, round by round.
Every route ends in batches. 'float': flipped and shifted, as float images and int64 labels, as published.
'uint8': flipped and shifted, with the conversion left to the GPU. 'raw': flip and shift left to the GPU
too. All files are in the operating system's cache when they are read, so the results do not include the
disk.
"""
import random
import statistics
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import default_collate
from tqdm import tqdm

from mdil.datasets.cache import cached
from mdil.datasets.domains import DOMAINS
from mdil.datasets.loading import TrainBatches, make_loader
from mdil.datasets.segmentation import SegmentationDataset
from mdil.datasets.toy.roads import draw_scene, label_image, scene_paths
from mdil.evaluation.tables import number, plain
from mdil.training.records import environment
from mdil.utils.errors import run_main
from mdil.utils.files import check_writable, write_json
from mdil.utils.parser import Parser, positive, side
from mdil.utils.precision import to_float

BATCH = 6
PUBLISHED = '(a) published, float'
MEMORY = {'RssAnon': 'own', 'RssFile': 'mapped files'}      # names in /proc/self/status


@dataclass(frozen=True)
class Source:
    """Files to load: name, size, JPEG quality (0: PNG); they are resized to the height --height / shrink."""
    name: str
    width: int
    height: int
    quality: int
    shrink: int

    @property
    def domain(self):
        """The domain whose folder layout and label values the files use."""
        return DOMAINS['BDD' if self.quality else 'cityscapes']


SOURCES = [Source('2048x1024 PNG', 2048, 1024, 0, 1), Source('1280x720 JPEG', 1280, 720, 75, 1),
           Source('320x227 JPEG', 320, 227, 92, 4)]


def write_pair(root, source, index):
    """Writes image and label number `index` of `source`: a small toy road, enlarged, with sensor noise."""
    drawn, objects = draw_scene('usa', index, 192, 384)
    size = source.width, source.height
    image = np.asarray(Image.fromarray(drawn).resize(size, Image.BICUBIC), dtype=np.float32)
    image = image + np.random.default_rng(index).normal(0, 0.5, image.shape)
    image = Image.fromarray(np.clip(np.rint(image), 0, 255).astype(np.uint8))
    label = label_image(objects, 'usa', 192, 384).resize(size, Image.NEAREST)
    paths = scene_paths('usa' if source.quality else 'germany', 'train', index)
    image_path, label_path = (root / path.replace('labelIds', 'labelTrainIds') for path in paths)
    for path in (image_path, label_path):
        path.parent.mkdir(parents=True, exist_ok=True)
    image.save(image_path, **({'quality': source.quality} if source.quality else {}))
    label.save(label_path)


def published(pair, size):
    """One sample loaded the published way: float image (3, H, W) and int64 label (1, H, W); size: (height, width)."""
    width_height = size[::-1]
    image, label = Image.open(pair.image).convert('RGB'), Image.open(pair.label).convert('P')
    image, label = image.resize(width_height, Image.BILINEAR), label.resize(width_height, Image.NEAREST)
    if random.random() < 0.5:
        image, label = (x.transpose(Image.FLIP_LEFT_RIGHT) for x in (image, label))
    right, down = random.randint(-2, 2), random.randint(-2, 2)
    shifted = []
    for x, fill in ((image, 0), (label, 255)):
        x = ImageOps.expand(x, border=(right, down, 0, 0), fill=fill)
        shifted.append(x.crop((0, 0, x.width - right, x.height - down)))
    pixels = torch.from_numpy(np.array(shifted[0])).permute(2, 0, 1).contiguous().float().div(255)
    classes = torch.from_numpy(np.array(shifted[1])).long()[None]
    classes[classes == 255] = 19
    return pixels, classes


def published_batches(pairs, size):
    """Yields batches loaded the published way."""
    for start in range(0, len(pairs), BATCH):
        yield default_collate([published(pair, size) for pair in pairs[start:start + BATCH]])


def our_batches(dataset):
    """Yields uint8 batches of `dataset`, loaded as in training but in this process."""
    yield from make_loader(dataset, TrainBatches(len(dataset), BATCH, seed=0), workers=0, pin=False)


def float_batches(dataset):
    """Yields batches of `dataset` as float images and int64 labels."""
    for images, labels, _ in our_batches(dataset):
        yield to_float(images), labels.long()


def routes(source, root, size, cache):
    """{name: function that yields the batches of an epoch} of the compared routes."""
    augmented, raw = (SegmentationDataset(source.domain, root, 'train', size, augmented)
                      for augmented in (True, False))
    stored, stored_raw = (cached(dataset, cache) for dataset in (augmented, raw))
    return {PUBLISHED: partial(published_batches, augmented.pairs, size),
            '(b) no cache, float': partial(float_batches, augmented),
            '(b) no cache, uint8': partial(our_batches, augmented),
            '(c) cache, float': partial(float_batches, stored),
            '(c) cache, uint8': partial(our_batches, stored),
            '(c) cache, raw': partial(our_batches, stored_raw)}


def rate(epoch, seconds):
    """Images per second of this process's CPU time, over whole epochs that take at least `seconds`."""
    images, start = 0, time.process_time()
    while not images or time.process_time() - start < seconds:
        images += sum(len(batch[0]) for batch in epoch())
    return images / (time.process_time() - start)


def measure(source, options, bar):
    """Results of one source: {route: rates of the rounds}, bytes per pair in files and cache, memory at the end."""
    with tempfile.TemporaryDirectory() as folder:
        root, cache = Path(folder) / 'data', Path(folder) / 'cache'
        for index in range(options.images):
            write_pair(root, source, index)
        size = options.height // source.shrink, 2 * options.height // source.shrink
        compared, rates = routes(source, root, size, cache), defaultdict(list)
        for round_number in range(options.rounds + 1):
            for name, epoch in compared.items():
                found = rate(epoch, options.seconds if round_number else 0)
                if round_number:        # the first round is a warm-up
                    rates[name].append(found)
                bar.update()
        return {'rates': dict(rates), 'size': size, 'file_bytes': bytes_below(root) / options.images,
                'cache_bytes': bytes_below(cache) / options.images, 'memory_mib': memory()}


def bytes_below(folder):
    """Total bytes of the files below `folder`."""
    return sum(path.stat().st_size for path in folder.rglob('*') if path.is_file())


def memory():
    """MiB in use by this process: its own, and mapped files, which processes share."""
    lines = dict(line.split(':', 1) for line in Path('/proc/self/status').read_text().splitlines())
    return {name: int(lines[key].split()[0]) / 1024 for key, name in MEMORY.items()}


def report(source, result):
    """Text about one source: images/s, their range and their ratio to the published way."""
    rows = []
    for name, rates in result['rates'].items():
        ratios = [ours / theirs for ours, theirs in zip(rates, result['rates'][PUBLISHED])]
        rows.append([name, number(statistics.median(rates), 1), f'{min(rates):.1f}-{max(rates):.1f}',
                     number(statistics.median(ratios)), f'{min(ratios):.2f}-{max(ratios):.2f}'])
    height, width = result['size']
    held = ', '.join(f'{value:.0f} MiB {name}' for name, value in result['memory_mib'].items())
    header = ['route', 'images/s', 'spread', 'ratio', 'spread']
    return '\n'.join([f'{source.name} to {width}x{height}', plain(header, rows),
                      f'an image and its label: {result["file_bytes"] / 1e6:.2f} MB as files, '
                      f'{result["cache_bytes"] / 1e6:.2f} MB in the cache; process: {held}', ''])


def main(arguments=None):
    parser = Parser(prog='python -m benchmarks.loading', description='Images per second of the ways to load.')
    parser.add_argument('--height', type=side, default=512, help='height that images are resized to')
    parser.add_argument('--images', type=positive, default=24, help='images of each source')
    parser.add_argument('--rounds', type=positive, default=7, help='measurements of each route')
    parser.add_argument('--seconds', type=float, default=1.0, help='length of a measurement at least')
    parser.add_argument('--json', metavar='FILE', help='write all figures')
    options = parser.parse_args(arguments)
    if options.json:
        check_writable('--json', options.json)
    torch.set_num_threads(1)
    random.seed(0)
    results = {}
    with tqdm(total=len(SOURCES) * 6 * (options.rounds + 1), leave=False, disable=None) as bar:
        for source in SOURCES:
            results[source.name] = measure(source, options, bar)
            tqdm.write(report(source, results[source.name]))
    if options.json:
        write_json(options.json, {'options': vars(options), 'versions': environment(torch.device('cpu')),
                                  'results': results})


if __name__ == '__main__':
    run_main(main)
