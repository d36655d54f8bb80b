"""Segments a single image, a folder, a list of images or a video.

    python predict.py --state runs/3/model_best.pth.tar --input photos --out answers
    python predict.py --state CKPT --domain IDD --input a.jpg list.txt drive.mp4 --out answers --save labels overlay
    python predict.py --state CKPT --domain cityscapes --input leftImg8bit/test --out upload --label-ids files
    python predict.py --state CKPT --advise photos --data-root DATA

For every image it writes `answers/<path below the input, without suffix>.png`: class indices at
the image's own size, never void. The domain is detected from each image, and that domain's branch
segments it; --domain names one instead. Existing predictions are skipped, so an interrupted run
continues where it stopped; an --out with predictions of another network or other settings, or of
other images with the same names, is refused. --advise writes no predictions: it says which branch
fits images of a new place, how well that branch should do there, and whether a new branch is worth
training.
"""
import os
import sys
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from mdil.evaluation import pictures
from mdil.evaluation.advise import advise, sentences
from mdil.evaluation.inputs import KINDS, Item, find_sources, images_in, items_of, refuse, upright
from mdil.evaluation.outputs import (ENDINGS, add_records, branch_of, check_targets, claim, read_records,
                                     reset_records, settings, targets, too_long, wanted_legends)
from mdil.evaluation.predictor import Prepared, load_predictor
from mdil.models.exported import is_exported
from mdil.models.fingerprint import SHOWN, fingerprint
from mdil.models.identify import Sequence, appearance, never_unknown
from mdil.models.methods import nameless_options
from mdil.utils.errors import UserError, counted, run_main
from mdil.utils.files import check_new, check_writable, write_json
from mdil.utils.parallel import session
from mdil.utils.parser import Parser, complete_size, data_options, machine_options, positive, size_options
from mdil.utils.workers import batched, in_threads


def predict_parser():
    """The parser of predict.py."""
    parser = Parser(prog='predict.py', description='Segments images with a checkpoint.')
    group = parser.add_argument_group('what to segment')
    group.add_argument('--state', required=True, metavar='FILE', help='a checkpoint of this code or a published one')
    group.add_argument('--input', nargs='+', metavar='PATH', help=KINDS)
    group.add_argument('--advise', metavar='FOLDER',
                       help='instead of --input: say which branch fits these images, the mIoU to expect, and whether a '
                            'new one is worth training')
    group.add_argument('--domain', metavar='NAME|auto',
                       help='domain whose branch is used, or auto: choose it for each image (default: auto, unless the '
                            'file knows one domain and not what its images look like)')
    group.add_argument('--sequence', action='store_true',
                       help='the images of each folder are frames of one drive, in order: the domain is chosen from '
                            'all of them so far (videos: always)')
    group.add_argument('--native', action='store_true',
                       help="keep the size of each image (default: resize to the training size)")
    size_options(group, None)
    group = parser.add_argument_group('results')
    group.add_argument('--out', metavar='DIR', help='folder to write to')
    group.add_argument('--save', nargs='+', choices=tuple(ENDINGS), default=['labels'], metavar='WHAT',
                       help='any of ' + ', '.join(ENDINGS))
    group.add_argument('--label-ids', choices=('train', 'files'), default='train',
                       help='label images hold class indices, or the values of the data set\'s own label files')
    group.add_argument('--json', metavar='FILE', help='write domain, confidence and classes of every image')
    group.add_argument('--overwrite', action='store_true', help='replace existing predictions')
    group = parser.add_argument_group('files that do not name their domains or method')
    nameless_options(group)
    data_options(parser)
    group = machine_options(parser, work='threads that load images')
    group.add_argument('--batch-size', type=positive, default=6, help='images per batch')
    return parser


def check_options(options):
    """Completes the size; refuses conflicting options."""
    if options.advise and (options.input or options.out or options.native or options.domain):
        raise UserError('--advise FOLDER does not segment images; leave out --input, --out, --native and --domain')
    if options.advise and is_exported(options.state):
        raise UserError(f'--advise needs a checkpoint; {options.state} is an exported network, which does not say '
                        'what images of its domain look like')
    if options.advise and (options.save != ['labels'] or options.label_ids != 'train' or options.sequence):
        raise UserError('--advise FOLDER writes no predictions; leave out --save, --label-ids and --sequence')
    if is_exported(options.state):
        check_exported(options)
    if not options.advise and not (options.input and options.out):
        raise UserError('say what to segment and where to write it: --input PATH --out DIR')
    complete_size(options)
    if options.native and options.height:
        raise UserError('--native keeps the size of the images, but --height and --width change it; leave out '
                        'one of them')
    if options.sequence and options.domain not in (None, 'auto'):
        raise UserError(f'--sequence works only with --domain auto, not with --domain {options.domain}')
    options.size = options.height and (options.height, options.width)


def check_exported(options):
    """Refuses options that an exported network has no use for."""
    for name, given in (('domains', options.domains), ('method', options.method),
                        ('device', options.device not in ('auto', 'cpu')), ('precision', options.precision != 'fp32')):
        if given:
            raise UserError(f'--{name} is for checkpoints; {options.state} is an exported network, which names its '
                            'domain and runs on the CPU at its own precision')


def check_places(options):
    """Refuses output paths that cannot be written to."""
    if options.json and not options.advise:
        check_writable('--json', options.json, inputs=[options.state])
    if options.out:
        check_writable('--out', options.out, folder=True)


@dataclass(frozen=True)
class Loaded:
    """An Item with its image (and its look if the domain is detected from it), or why it could not be loaded.

    Of a finished frame, only the look is kept: the choice for later frames depends on it.
    """
    item: Item
    image: Image.Image = None
    prepared: Prepared = None
    look: torch.Tensor = None
    error: UserError = None


def load(work, predictor):
    """The Loaded image of (Item, whether it is finished)."""
    item, finished = work
    try:
        image = item.load()
    except UserError as error:
        return Loaded(item, error=error)
    look = appearance(image) if predictor.identifier else None
    return Loaded(item, look=look) if finished else Loaded(item, image, predictor.prepare(image), look)


def writable(item, paths):
    """The Item, or one that cannot be loaded if the name of one of its outputs is too long."""
    reason = f'{item.key}: its name is too long for the names of its outputs; shorten it'
    return replace(item, load=partial(refuse, reason)) if any(map(too_long, paths)) else item


def wanted(options, sources, records, skipped, drive):
    """Yields (Item, False) for the Items that lack a result; adds the keys of the finished ones to the list `skipped`.

    Of a drive, as told by the function `drive` (see Chooser), yields the finished frames too, as (Item, True).
    """
    for source in sources:
        for item in items_of(source):
            paths = targets(options, item.name).values()
            if options.overwrite or options.json and item.key not in records or not all(map(os.path.exists, paths)):
                yield writable(item, paths), False
            else:
                skipped.append(item.key)
                if drive(item):
                    yield item, True


def file_values(domain):
    """uint8 (C,), or (C, 3) for colours: the value of each non-void class in the domain's label files.

    UserError if a class has none.
    """
    kind = domain.layouts[0].label_kinds[-1]
    lowest = {index: value for value, index in sorted(kind.values.items(), reverse=True)}
    lacking = [name for index, name in enumerate(domain.classes) if index not in lowest]
    if lacking:
        raise UserError(f'--label-ids files: {domain.name} has no label value for the class {lacking[0]!r}; use '
                        '--label-ids train')
    values = np.array([lowest[index] for index in range(domain.void)])
    return (values[:, None] >> [16, 8, 0] if kind.by_color else values).astype(np.uint8)


def picture(kind, image, prediction, label_ids):
    """The picture that is saved as `kind`: uint8 (H, W) or (H, W, 3)."""
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


def record(prediction, made_by):
    """The entry of an image in --json; made_by: a digest of the run's `settings`."""
    choice = prediction.choice
    return {'made_by': made_by, 'domain': 'unknown' if choice.unknown else prediction.domain.name,
            'branch': prediction.domain.name,
            'domains': {name: round(probability, 6) for name, probability in choice.probabilities.items()},
            'confidence': round(prediction.confidence.mean().item(), 6),
            'classes': prediction.shares}


class Chooser:
    """Chooses the branch for each image: that of the named domain, the only one, or that of the detected domain."""

    def __init__(self, options, predictor):
        self.predictor, self.sequence = predictor, options.sequence
        self.stated = None if predictor.identifier else predictor.stated(branch_of(options, predictor))
        self.sequences = {}

    def __call__(self, batch):
        """The Choices for a list of Loaded."""
        if self.stated:
            return [self.stated] * len(batch)
        return [choice for loaded in batch for choice in self.predictor.choices(self.guess(loaded))]

    def guess(self, loaded):
        """The Guess about one image; with --sequence and in videos, it uses the frames so far."""
        known, drive = self.predictor.identifier, self.drive(loaded.item)
        return (self.sequences.setdefault(drive, Sequence(known)) if drive else known).guess(loaded.look[None])

    def drive(self, item):
        """The video or folder whose frames so far choose the branch for an Item; None if it is chosen otherwise."""
        return None if self.stated else item.video or (Path(item.key).parent if self.sequence else None)


def predict_all(options, predictor, sources, records, made_by):
    """Predicts the images without results and adds them to `records`; returns a summary in words, and the errors."""
    choose, unknown, errors, skipped = Chooser(options, predictor), 0, [], []
    used = Counter({domain.name: 0 for domain in predictor.domains})
    items = tqdm(wanted(options, sources, records, skipped, choose.drive), unit='image', disable=None,
                 total=None if any(source.is_video for source in sources) else len(sources))
    for batch in batched(in_threads(partial(load, predictor=predictor), items, options.num_workers),
                         options.batch_size):
        errors += [loaded.error for loaded in batch if loaded.error]
        batch = [loaded for loaded in batch if not loaded.error]
        todo = [(loaded, choice) for loaded, choice in zip(batch, choose(batch)) if loaded.prepared]
        images, choices = [loaded.prepared for loaded, _ in todo], [choice for _, choice in todo]
        for (loaded, _), prediction in zip(todo, predictor.predict_prepared(images, choices)):
            save(options, loaded, prediction)
            records[loaded.item.key] = record(prediction, made_by)
            unknown += prediction.choice.unknown
            used[prediction.domain.name] += 1
    return summary(used, predictor.identifier and len(predictor.domains) > 1, unknown, len(skipped)), errors


def summary(used, chosen, unknown, skipped):
    """The numbers of images in words; used: {branch: images}; chosen: whether the branches were chosen."""
    branches = ', '.join(f'{name} {count}' for name, count in used.items() if count and chosen)
    return (f'{counted(sum(used.values()), "image")} predicted' + (f' ({branches})' if branches else '') +
            (f', {unknown} of them unlike any known domain' if unknown else '') +
            (f', {skipped} were there already' if skipped else ''))


def run(options, place):
    """Predicts all images; --json gets the finished ones even if the run ends early."""
    sources = find_sources(options.input, options.out)
    check_targets(options, sources)
    predictor = load_predictor(options, place)
    made = settings(options, predictor)
    made_by = fingerprint(made)[:SHOWN]
    records = {} if options.overwrite else read_records(options, made_by)
    if options.native:
        torch.backends.cudnn.benchmark = False      # a search for each size would take longer than it saves
    for domain in predictor.domains if options.label_ids == 'files' else ():
        if branch_of(options, predictor) in ('auto', domain.name):
            file_values(domain)
    colors = wanted_legends(options, predictor, sources)
    claim(options, predictor, sources, made)
    reset_records(options)
    for path, domain in colors.items():
        pictures.save_picture(path, pictures.legend(domain.classes, domain.colors, 640))
    try:
        done, errors = predict_all(options, predictor, sources, records, made_by)
    finally:
        add_records(options, made_by, records)
    print(f'{options.out}: {done}', file=sys.stderr)
    if predictor.identifier and (note := never_unknown(predictor.identifier, predictor.domains)):
        print(f'{note}; --domain NAME chooses the domain', file=sys.stderr)
    report_errors(errors)


def look_at(path):
    """(look, None) of an image, or (None, the UserError) if it cannot be read."""
    try:
        return appearance(upright(path)), None
    except UserError as error:
        return None, error


def run_advice(options, place):
    """Prints the advice about the images of --advise that can be read; --json gets the same."""
    paths = [source.path for source in images_in(options.advise)]
    if options.json:
        check_new('--json', options.json, options.overwrite, [options.state, *paths])
    options.domain = 'auto'
    predictor = load_predictor(options, place)
    seen = list(in_threads(look_at, paths, options.num_workers, 'image statistics'))
    read = [(path, look) for path, (look, error) in zip(paths, seen) if not error]
    if read:
        prepared = lambda numbers: (predictor.prepare(upright(read[number][0])) for number in numbers)
        found = advise(predictor, torch.stack([look for _, look in read]), prepared, options.data_root)
        if options.json:
            write_json(options.json, found)
        print(*sentences(found, len(read)), sep='\n')
    report_errors([error for _, error in seen if error])


def report_errors(errors):
    """UserError that counts the images left out, if any; prints the reasons of all but the first."""
    for error in errors[1:]:
        print(error, file=sys.stderr)
    if errors:
        raise UserError(f'1 image was left out: {errors[0]}' if len(errors) == 1 else
                        f'{len(errors)} images were left out, e.g. {errors[0]}')


def main(argv=None):
    options = predict_parser().parse_args(argv)
    check_options(options)
    check_places(options)
    with session(options.device, precision=options.precision) as place:
        (run_advice if options.advise else run)(options, place)


if __name__ == '__main__':
    run_main(main)
