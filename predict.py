"""Segments a single image, a folder, a list of images or a video.

    python predict.py --state runs/3/model_best.pth.tar --input photos --out answers
    python predict.py --state CKPT --domain IDD --input a.jpg list.txt drive.mp4 --out answers --save labels overlay
    python predict.py --state CKPT --domain cityscapes --input leftImg8bit/test --out upload --label-ids files
    python predict.py --state CKPT --advise photos --data-root DATA

For every image it writes `answers/<path below the input, without suffix>.png`: class indices at
the image's own size, never void. The domain is detected from each image, and that domain's branch
segments it; --domain names one instead. Existing predictions are skipped, so an interrupted run
continues where it stopped; an --out with predictions of another network or other settings is
refused. --advise writes no predictions: it says which branch fits images of a new place, how well
that branch should do there, and whether a new branch is worth training.
"""
import hashlib
import json
import os
import re
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from urllib.parse import quote

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from mdil.evaluation import pictures
from mdil.evaluation.advise import advise, sentences
from mdil.evaluation.inputs import KINDS, Item, find_sources, images_in, items_of, upright
from mdil.evaluation.predictor import Prepared, load_predictor
from mdil.models.exported import is_exported
from mdil.models.fingerprint import SHOWN
from mdil.models.identify import Sequence, appearance, never_unknown
from mdil.models.methods import nameless_options
from mdil.utils.errors import UserError, counted, run_main
from mdil.utils.files import check_new, check_writable, same_file, write_json, written_through
from mdil.utils.parallel import session
from mdil.utils.parser import Parser, complete_size, data_options, machine_options, positive, size_options
from mdil.utils.workers import batched, in_threads

# What --save can write for an image, and the suffix of its file.
ENDINGS = {'labels': '.png', 'color': '.color.png', 'overlay': '.overlay.png', 'confidence': '.confidence.png'}
MADE_BY = 'predict.json'        # in --out: the network and settings of the predictions there
# The file names of a video's predictions, in a folder of its own.
FRAME = re.compile(r'\d{6,}(' + '|'.join(map(re.escape, ENDINGS.values())) + ')')
LONGEST = 100                   # letters of a domain's name in the file name of its legend


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
    if options.advise and options.json:
        check_new('--json', options.json, options.overwrite)
    elif options.json:
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


def targets(options, name):
    """{kind: path} of the files to save for the image called `name`."""
    return {kind: Path(options.out) / f'{name}{ENDINGS[kind]}' for kind in options.save}


def real_paths(sources):
    """The paths of the inputs, links followed."""
    return {os.path.realpath(source.path) for source in sources}


def check_targets(options, sources):
    """UserError if two images would be written to the same file, or one would replace an input."""
    for folder in options.input:
        if same_file(folder, options.out):
            raise UserError(f'--out {options.out} is the folder {folder} of --input, so predictions would lie among '
                            'the images; name another folder, or one below it')
    inputs, owners = real_paths(sources), {}
    record = os.path.realpath(options.json) if options.json else None
    if options.json:
        check_writable('--json', options.json, inputs=[*options.input, *inputs])
    if record == os.path.realpath(Path(options.out) / MADE_BY):
        raise UserError(f'--json {options.json} is where predict.py records its settings; name another file')
    for source in sources:
        for path in targets(options, source.name).values():
            place = os.path.realpath(path)
            if place == record:
                raise UserError(f'--json {options.json} is an output file of {source.path}; name another file')
            if place in inputs:
                raise UserError(f'{path} is an input and would be replaced; choose another --out')
            if owners.get(path) == source.path:
                raise UserError(f'{source.path} is given twice')
            if path in owners:
                raise UserError(f'{owners[path]} and {source.path} would both be written to {path}; '
                                'predict them in two runs, each with its own --out')
            owners[path] = source.path
    check_frames(options, sources)


def check_frames(options, sources):
    """UserError if an image, or its prediction, has the place of a prediction of a video's frame."""
    videos = {os.path.realpath(Path(options.out) / source.name): source.path for source in sources if source.is_video}
    for source in (source for source in sources if not source.is_video):
        for path in (source.path, *targets(options, source.name).values()):
            video = videos.get(os.path.dirname(os.path.realpath(path)))
            if video and FRAME.fullmatch(path.name):
                raise UserError(f'{source.path} would share {path} with a frame of {video}; predict the video in a run '
                                'of its own, with another --out')


def read_records(options):
    """The entries of an earlier run in the --json file, or {}; UserError if predict.py did not write it."""
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


def settings(options, predictor):
    """Everything that the predictions depend on, as recorded in MADE_BY."""
    files = [Path(options.state)]
    if files[0].suffix.lower() == '.xml':       # OpenVINO keeps the weights in a second file
        files.append(files[0].with_suffix('.bin'))
    digest = hashlib.sha256(b''.join(map(Path.read_bytes, files))).hexdigest()
    return {'network': digest[:SHOWN], 'domains': ' '.join(domain.name for domain in predictor.domains),
            'domain': branch_of(options, predictor), 'sequence': options.sequence,
            'size': 'x'.join(map(str, predictor.size[::-1])) if predictor.size else 'native',
            'label-ids': options.label_ids, 'precision': options.precision}


def answers_to(options, source):
    """Existing files, of all kinds, at the places of a Source's predictions."""
    if source.is_video:
        return [path for path in (Path(options.out) / source.name).glob('*.png') if FRAME.fullmatch(path.name)]
    return [path for ending in ENDINGS.values() if (path := Path(options.out) / f'{source.name}{ending}').exists()]


def legends(options, predictor):
    """{path in --out: Domain} of the legends of the colours of all branches."""
    return {Path(options.out) / f'legend-of-{quote(domain.name, safe="")[:LONGEST]}.png': domain
            for domain in predictor.domains}


def wanted_legends(options, predictor, sources):
    """Those of `legends` to write: of the branches that may be used, if colours are saved.

    A file that is there is kept, unless --overwrite. UserError if one has the name of an input or of another output.
    """
    if not {'color', 'overlay'} & set(options.save):
        return {}
    branch, taken = branch_of(options, predictor), real_paths(sources)
    taken |= {os.path.realpath(path) for source in sources for path in targets(options, source.name).values()}
    taken |= {os.path.realpath(path) for path in (options.state, options.json) if path}
    found = {path: domain for path, domain in legends(options, predictor).items() if branch in ('auto', domain.name)}
    for path in found:
        if os.path.realpath(path) in taken:
            raise UserError(f'{path} is where the legend of the colours goes, but also an input or another output; '
                            'rename that, or choose another --out')
    return {path: domain for path, domain in found.items() if options.overwrite or not os.path.lexists(path)}


def claim(options, predictor, sources):
    """Records in --out the settings of the predictions.

    UserError if --out holds predictions made with other or unknown settings. --overwrite removes those of `sources`
    instead; then UserError if any made with other settings would remain.
    """
    path, made, inputs = Path(options.out) / MADE_BY, settings(options, predictor), real_paths(sources)
    before = read_object(path)
    there = {answer for source in sources for answer in answers_to(options, source)
             if os.path.realpath(answer) not in inputs}
    other = [f'{name} {before[name]}, now {value}' for name, value in made.items() if before.get(name, value) != value]
    if not options.overwrite and other:
        raise UserError(f'--out {options.out} holds predictions made with other settings: {"; ".join(other)}; choose '
                        'another --out, or replace them with --overwrite')
    if not options.overwrite and not before and (path.exists() or there):
        raise UserError(f'--out {options.out} holds predictions without {MADE_BY}, which records their settings; '
                        'choose another --out, or replace them with --overwrite')
    others = {path for path in Path(options.out).rglob('*.png') if os.path.realpath(path) not in inputs}
    others -= {*there, *legends(options, predictor)}
    if other and others:
        raise UserError(f'--out {options.out} holds {min(others).name}, which was made with other settings and would '
                        'remain; choose another --out')
    if other or not before:
        for answer in there:        # otherwise a run resumed after an interruption would keep these old files
            answer.unlink()
    write_json(path, {'state': str(options.state), **made})


def read_object(path):
    """The object in a JSON file; {} if the file is missing or holds no object."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        found = {}
    return found if isinstance(found, dict) else {}


def wanted(options, sources, records, skipped, drive):
    """Yields (Item, False) for the Items that lack a result; adds the keys of the finished ones to the list `skipped`.

    Of a drive, as told by the function `drive` (see Chooser), yields the finished frames too, as (Item, True).
    """
    for source in sources:
        for item in items_of(source):
            paths = targets(options, item.name).values()
            if options.overwrite or options.json and item.key not in records or not all(map(Path.exists, paths)):
                yield item, False
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


def record(prediction):
    """The entry of an image in --json."""
    choice = prediction.choice
    return {'domain': 'unknown' if choice.unknown else prediction.domain.name, 'branch': prediction.domain.name,
            'domains': choice.probabilities, 'confidence': prediction.confidence.mean().item(),
            'classes': prediction.shares}


def branch_of(options, predictor):
    """Name of the domain whose branch segments all images, or 'auto'."""
    if predictor.identifier:
        return 'auto'
    return predictor.domains[0 if options.domain in (None, 'auto') else predictor.index(options.domain)].name


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


def predict_all(options, predictor, sources, records):
    """Predicts the images without results and adds them to `records`; returns a summary in words, and the errors."""
    choose, count, unknown, errors, skipped = Chooser(options, predictor), 0, 0, [], []
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
            records[loaded.item.key] = record(prediction)
            unknown += prediction.choice.unknown
        count += len(todo)
    there = f', {len(skipped)} were there already' if skipped else ''
    odd = f', {unknown} of them unlike any known domain' if unknown else ''
    return f'{counted(count, "image")} predicted{odd}{there}', errors


def run(options, place):
    """Predicts all images; --json gets the finished ones even if the run ends early."""
    sources = find_sources(options.input, options.out)
    check_targets(options, sources)
    records = read_records(options)
    predictor = load_predictor(options, place)
    if options.native:
        torch.backends.cudnn.benchmark = False      # a search for each size would take longer than it saves
    for domain in predictor.domains if options.label_ids == 'files' else ():
        if branch_of(options, predictor) in ('auto', domain.name):
            file_values(domain)
    colors = wanted_legends(options, predictor, sources)
    claim(options, predictor, sources)
    for path, domain in colors.items():
        pictures.save_picture(path, pictures.legend(domain.classes, domain.colors, 640))
    try:
        done, errors = predict_all(options, predictor, sources, records)
    finally:
        if options.json:
            write_json(options.json, records)
    print(f'{options.out}: {done}', file=sys.stderr)
    if predictor.identifier and (note := never_unknown(predictor.identifier, predictor.domains)):
        print(note, file=sys.stderr)
    report_errors(errors)


def look_at(source):
    """(look, None) of an image, or (None, the UserError) if it cannot be read."""
    try:
        return appearance(upright(source.path)), None
    except UserError as error:
        return None, error


def run_advice(options, place):
    """Prints the advice about the images of --advise that can be read; --json gets the same."""
    sources = images_in(options.advise)
    options.domain = 'auto'
    predictor = load_predictor(options, place)
    seen = list(tqdm(in_threads(look_at, sources, options.num_workers), total=len(sources), desc='image statistics',
                     unit='image', leave=False, disable=None))
    known = [(source.path, look) for source, (look, error) in zip(sources, seen) if not error]
    if known:
        paths, looks = zip(*known)
        prepare = partial(map, lambda number: predictor.prepare(upright(paths[number])))
        found = advise(predictor, torch.stack(looks), prepare, options.data_root)
        if options.json:
            write_json(options.json, found)
        print(*sentences(found, len(paths)), sep='\n')
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
