"""Segments images: one, a folder of them, a list or a video.

    python predict.py --state runs/3/model_best.pth.tar --domain IDD --input photos --out answers
    python predict.py --state CKPT --domain cityscapes --input a.jpg list.txt drive.mp4 --out answers --save labels overlay
    python predict.py --state CKPT --domain cityscapes --input leftImg8bit/test --out upload --label-ids files

Every image gets `answers/<its path below the input, less the suffix>.png`: class indices, of the
image's own size. Void is never an answer. What exists is skipped, so a run that was stopped goes
on where it ended.
"""
import json
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from mdil.evaluation import pictures
from mdil.evaluation.inputs import KINDS, Item, find_sources, items_of
from mdil.evaluation.predictor import Prepared, load_predictor
from mdil.models import METHODS
from mdil.utils.errors import UserError, run_main
from mdil.utils.files import check_writable, write_json, written_through
from mdil.utils.parallel import session
from mdil.utils.parser import Parser, data_options, machine_options, positive, side
from mdil.utils.workers import in_threads

# What can be saved of an image, and how the file's name ends.
ENDINGS = {'labels': '.png', 'color': '.color.png', 'overlay': '.overlay.png', 'confidence': '.confidence.png'}


def predict_parser():
    """The parser of predict.py."""
    parser = Parser(prog='predict.py', description='Segments images with a checkpoint.')
    group = parser.add_argument_group('what is segmented')
    group.add_argument('--state', required=True, metavar='FILE', help='a checkpoint of this code or a published one')
    group.add_argument('--input', nargs='+', required=True, metavar='PATH', help=KINDS)
    group.add_argument('--domain', metavar='NAME', help='domain whose branch answers')
    group.add_argument('--native', action='store_true',
                       help="images keep their own size (default: they are resized to the size of the training)")
    group.add_argument('--height', type=side, help='image height, a multiple of 8 (default: that of the training)')
    group.add_argument('--width', type=side, help='image width, a multiple of 8 (default: twice the height)')
    group = parser.add_argument_group('results')
    group.add_argument('--out', required=True, metavar='DIR', help='folder to write to')
    group.add_argument('--save', nargs='+', choices=tuple(ENDINGS), default=['labels'], metavar='WHAT',
                       help='any of ' + ', '.join(ENDINGS))
    group.add_argument('--label-ids', choices=('train', 'files'), default='train',
                       help='label images hold class indices, or the values of the data set\'s own label files')
    group.add_argument('--json', metavar='FILE', help='write domain, confidence and classes of every image')
    group.add_argument('--overwrite', action='store_true', help='predict again what exists')
    group = parser.add_argument_group('files that do not say what they hold')
    group.add_argument('--domains', nargs='+', metavar='NAME', help='domains of a published file, in order')
    group.add_argument('--method', choices=tuple(METHODS), help='method of a published file whose keys fit several')
    data_options(parser)
    group = machine_options(parser)
    group.add_argument('--batch-size', type=positive, default=6, help='images per batch')
    return parser


def check_options(options):
    """Completes the size; refuses what cannot be written or does not fit together."""
    if options.native and (options.height or options.width):
        raise UserError('--native keeps the size of the images, --height and --width change it; leave one of them out')
    if options.width and not options.height:
        raise UserError('--width is given without --height')
    options.size = options.height and (options.height, options.width or 2 * options.height)
    check_writable('--out', options.out, folder=True)
    if options.json:
        check_writable('--json', options.json)


@dataclass(frozen=True)
class Loaded:
    """An Item with its image, or the error that it could not be read for."""
    item: Item
    image: Image.Image = None
    prepared: Prepared = None
    error: UserError = None


def load(item, predictor):
    """The Loaded image of an Item."""
    try:
        image = item.load()
    except UserError as error:
        return Loaded(item, error=error)
    return Loaded(item, image, predictor.prepare(image))


def targets(options, name):
    """{kind: path} of what is saved for the image called `name`."""
    return {kind: Path(options.out) / f'{name}{ENDINGS[kind]}' for kind in options.save}


def check_targets(options, sources):
    """UserError if two images would be written to one file, or one would replace an input."""
    inputs, owners = {source.path.absolute() for source in sources}, {}
    for source in sources:
        for path in targets(options, source.name).values():
            if path.absolute() in inputs:
                raise UserError(f'{path} is an input and would be replaced; choose another --out')
            if path in owners:
                raise UserError(f'{owners[path]} and {source.path} would both be written to {path}; '
                                'predict them in two runs with an --out each')
            owners[path] = source.path


def read_records(options):
    """The entries that --json FILE holds from an earlier run, {} without; UserError if it is another file."""
    if not options.json or options.overwrite or not Path(options.json).exists() or written_through(options.json):
        return {}
    try:
        records = json.loads(Path(options.json).read_text())
    except (OSError, ValueError):
        records = None
    if not isinstance(records, dict) or not all(isinstance(entry, dict) and 'classes' in entry
                                                for entry in records.values()):
        raise UserError(f'--json {options.json} exists and was not written by predict.py; choose another name, or '
                        'replace it with --overwrite')
    return records


def wanted(options, sources, records):
    """Yields the Items that lack a result."""
    for source in sources:
        for item in items_of(source):
            paths = targets(options, item.name).values()
            if options.overwrite or options.json and item.key not in records or not all(map(Path.exists, paths)):
                yield item


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


def file_values(domain):
    """uint8 (C,) the value of each class in the label files of a domain, void left out."""
    values = domain.layouts[0].label_kinds[-1].values
    lowest = {index: value for value, index in sorted(values.items(), reverse=True)}
    return np.array([lowest[index] for index in range(domain.void)], dtype=np.uint8)


def picture(kind, image, prediction, label_ids):
    """What is saved as `kind`, uint8 (H, W) or (H, W, 3)."""
    domain, labels = prediction.domain, prediction.labels.numpy()
    if kind == 'labels':
        return labels if label_ids == 'train' else file_values(domain)[labels]
    if kind == 'color':
        return pictures.colorize(labels, domain.palette)
    if kind == 'overlay':
        return pictures.overlay(np.asarray(image), labels, domain.palette)
    return (255 * prediction.confidence).round().byte().numpy()


def save(options, loaded, prediction):
    """Writes the pictures of an image."""
    for kind, path in targets(options, loaded.item.name).items():
        pictures.make(path.parent)
        pictures.save_picture(path, picture(kind, loaded.image, prediction, options.label_ids))


def record(prediction):
    """What --json holds of an image."""
    return {'domain': prediction.domain.name, 'domains': {prediction.domain.name: 1.0},
            'confidence': prediction.confidence.mean().item(), 'classes': prediction.shares}


def chosen_domain(options, predictor):
    """Index of the domain whose branch answers."""
    if options.domain:
        return predictor.index(options.domain)
    if len(predictor.domains) > 1:
        raise UserError(f'{options.state} knows {", ".join(d.name for d in predictor.domains)}; choose with --domain')
    return 0


def predict_all(options, predictor, sources, records):
    """Predicts what is missing and adds it to `records`; returns (number of images, errors of those left out)."""
    index, count, errors = chosen_domain(options, predictor), 0, []
    items = tqdm(wanted(options, sources, records), unit='image', disable=None,
                 total=None if any(source.is_video for source in sources) else len(sources))
    for batch in batched(in_threads(partial(load, predictor=predictor), items, options.num_workers), options.batch_size):
        errors += [loaded.error for loaded in batch if loaded.error]
        batch = [loaded for loaded in batch if not loaded.error]
        predictions = predictor.predict_prepared([loaded.prepared for loaded in batch], [index] * len(batch))
        for loaded, prediction in zip(batch, predictions):
            save(options, loaded, prediction)
            records[loaded.item.key] = record(prediction)
        count += len(batch)
    return count, errors


def run(options, place):
    """Predicts all; what was done is on record even if it ends early."""
    sources = find_sources(options.input, options.out)
    check_targets(options, sources)
    records = read_records(options)
    predictor = load_predictor(options, place)
    try:
        count, errors = predict_all(options, predictor, sources, records)
    finally:
        if options.json:
            write_json(options.json, records)
    print(f'{options.out}: {count} images predicted', file=sys.stderr)
    if errors:
        raise UserError(f'{len(errors)} images were left out, e.g. {errors[0]}')


def main(argv=None):
    options = predict_parser().parse_args(argv)
    check_options(options)
    with session(options.device, precision=options.precision) as place:
        run(options, place)


if __name__ == '__main__':
    run_main(main)
