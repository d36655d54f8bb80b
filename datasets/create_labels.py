"""Makes the label images of IDD and Cityscapes from their annotations, next to them.

    python -m mdil create-labels idd --datadir data/IDD_Segmentation --id-type level3Id
    python -m mdil create-labels cityscapes --datadir data/cityscapes

IDD: `<frame>_gtFine_polygons.json` becomes `<frame>_gtFine_label<id-type>s.png`, drawn as the data set's
own converter draws it: objects in their order, without deleted ones and those with fewer than three points. A
group that is not in the table is drawn as its members (`cargroup` as `car`). Unknown names are left out
and reported. 8 bits hold 0 to 255: csId 355 (vehicle fallback) becomes 255, which is void, as Pillow
saturates it in the converter.

Cityscapes: `<frame>_gtFine_polygons.json`, or `<frame>_gtFine_labelIds.png` if there are no polygons,
becomes `<frame>_gtFine_labelTrainIds.png`, equal to that of the package cityscapesscripts. Objects with a
negative id (license plate) are not drawn.

`--out DIR` leaves the data set unchanged and writes to DIR/gtFine. It also makes DIR/leftImg8bit a link to
the images, so that `--data cityscapes=DIR` finds both.

Label images that are readable and newer than their source are kept, unless `--force`, so a stopped run
continues where it was.
"""
import json
import math
import os
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from mdil.datasets.declaration import VOID_FILE_VALUE
from mdil.datasets.domains import LABEL_IDS, cityscapes_label_ids
from mdil.datasets.labels import label_table
from mdil.datasets.pairs import Pair, files_by_key
from mdil.datasets.segmentation import FORMATS, UNREADABLE, open_label, to_classes
from mdil.utils.errors import UserError, run_main
from mdil.utils.files import check_writable, write_atomically
from mdil.utils.parser import Parser, natural
from mdil.utils.workers import in_parallel

ID_TYPES = ('level3Id', 'level1Id', 'level2Id', 'level4Id', 'id', 'csTrainId', 'csId')
POLYGONS = '_gtFine_polygons.json'
IMAGES = 'leftImg8bit'
COMPRESSION = 3         # zlib level: 1.5 times as fast as Pillow's default, files 25 % larger
LARGEST = 2 ** 31       # coordinates this large do not fit the integers that Pillow draws with


@dataclass(frozen=True)
class Encoding:
    """How annotations become label values: {name: value}, with None for names that are not drawn."""
    values: dict = field(hash=False)
    background: int
    least_points: int
    sources: tuple      # file-name suffixes, preferred first
    suffix: str         # of the label images


@dataclass(frozen=True)
class Outcome:
    """The result for one source: 'made', 'kept' or 'broken', the error, and the unknown names in it."""
    source: Path
    status: str
    error: str = ''
    unknown: tuple = ()


def idd_encoding(id_type):
    """The Encoding of IDD at `id_type`, a column of its label table."""
    values = {row['name']: min(row[id_type], VOID_FILE_VALUE) for row in label_table('idd')}
    return Encoding(values, values['unlabeled'], 3, (POLYGONS,), f'_gtFine_label{id_type}s.png')


def cityscapes_encoding():
    """The Encoding of Cityscapes as train ids."""
    values = {row['name']: row['trainId'] if row['id'] >= 0 else None for row in label_table('cityscapes')}
    return Encoding(values, values['unlabeled'], 2, (POLYGONS, LABEL_IDS), '_gtFine_labelTrainIds.png')


def known_name(name, values):
    """`name`, or `name` without its suffix 'group' (cargroup: car), whichever is in `values`; else None."""
    for candidate in (name, name.removesuffix('group')):
        if candidate in values:
            return candidate
    return None


def read_annotation(path):
    """(width, height) and [(name, [(x, y), ...]), ...] of the objects that are not deleted.

    UserError if the file cannot be read or is not an annotation.
    """
    try:
        spec = json.loads(path.read_bytes())
        size = int(spec['imgWidth']), int(spec['imgHeight'])
        objects = [(str(entry['label']), [(float(point[0]), float(point[1])) for point in entry['polygon']])
                   for entry in spec['objects'] if not entry.get('deleted')]
    except OSError as error:
        raise UserError(f'{path} cannot be read: {error.strerror}') from None
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError, RecursionError) as error:
        raise UserError(f'{path} is not a polygon annotation ({type(error).__name__}: {error})') from None
    if min(size) < 1 or size[0] * size[1] > Image.MAX_IMAGE_PIXELS:
        raise UserError(f'{path}: image size {size[0]}x{size[1]} is impossible')
    for name, points in objects:
        if not all(math.isfinite(value) and abs(value) < LARGEST for point in points for value in point):
            raise UserError(f'{path}: a polygon of {name!r} has coordinates that cannot be drawn')
    return size, objects


def draw_labels(size, objects, encoding):
    """The label image (mode L) of `objects`, and the names among them that `encoding` does not know."""
    image = Image.new('L', size, encoding.background)
    pen = ImageDraw.Draw(image)
    unknown = []
    for name, points in objects:
        known = known_name(name, encoding.values)
        if known is None:
            unknown.append(name)
        elif len(points) >= encoding.least_points and encoding.values[known] is not None:
            pen.polygon(points, fill=encoding.values[known])
    return image, tuple(unknown)


def train_id_image(path):
    """The label image with train ids (mode L, void 255) for a Cityscapes image of label ids."""
    pair = Pair(None, path, cityscapes_label_ids())
    classes = to_classes(np.asarray(open_label(pair)), pair)
    return Image.fromarray(np.where(classes == max(pair.values.values()), np.uint8(VOID_FILE_VALUE), classes))


def make_label(source, encoding, force=False):
    """Makes the label image of `source` unless it is up to date; returns the Outcome.

    source: (path of the annotation, its suffix, folder for the label image).
    """
    path, suffix, folder = source
    target = folder / (path.name[:-len(suffix)] + encoding.suffix)
    unknown = ()
    try:
        if not force and up_to_date(target, path):
            return Outcome(path, 'kept')
        if suffix == POLYGONS:
            image, unknown = draw_labels(*read_annotation(path), encoding)
        else:
            image = train_id_image(path)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(target, lambda file: image.save(file, 'PNG', compress_level=COMPRESSION))
    except (UserError, OSError) as error:
        return Outcome(path, 'broken', str(error))
    return Outcome(path, 'made', unknown=unknown)


def up_to_date(target, source):
    """Whether the image `target` is newer than `source` and can be decoded."""
    try:
        if target.stat().st_mtime_ns <= source.stat().st_mtime_ns:
            return False
        with Image.open(target, formats=FORMATS) as image:
            image.load()
    except UNREADABLE:
        return False
    return True


def find_sources(datadir, encoding, out=None):
    """[(path, suffix, folder for the label image)] of the annotations under `datadir`/gtFine, one per frame.

    Label images go next to the annotations, or into the same folders below `out`.
    """
    folder = Path(datadir) / 'gtFine'
    found = files_by_key(folder, encoding.sources)
    if not found:
        raise UserError(f'no *{" or *".join(encoding.sources)} in {folder}; '
                        '--datadir is the folder of the data set, which holds gtFine')
    target = Path(out) / 'gtFine' if out else folder
    return [(path, suffix, target / path.relative_to(folder).parent) for (path, suffix), *_ in found.values()]


def prepare(datadir, out, dataset):
    """Makes sure that label images can be written and that the images are next to them; UserError if that fails."""
    if not out:
        if not os.access(Path(datadir) / 'gtFine', os.W_OK):
            raise UserError(f'{datadir}/gtFine cannot be written to; --out FOLDER takes the label images instead')
        return
    check_writable('--out', out, folder=True)
    images, link = Path(datadir).absolute() / IMAGES, Path(out) / IMAGES
    if images.is_dir() and not os.path.lexists(link):
        try:
            link.symlink_to(images)
        except OSError as error:
            raise UserError(f'cannot make {link} a link to the images ({error.strerror}); put them there in another '
                            'way and run this again') from None
        print(f'{link} links to the images; --data {dataset}={out} uses both')


def report(outcomes, encoding):
    """Prints what was made and what is unknown or broken; UserError if anything is broken."""
    counts = Counter(outcome.status for outcome in outcomes)
    print(f'*{encoding.suffix}: {counts["made"]} made, {counts["kept"]} kept (up to date)')
    files = {}
    for outcome in outcomes:
        for name in outcome.unknown:
            files.setdefault(name, []).append(outcome.source)
    for name, sources in sorted(files.items()):
        print(f'unknown label {name!r}: {len(sources)} objects in {len(set(sources))} files left out, '
              f'e.g. in {sources[0]}')
    broken = [outcome for outcome in outcomes if outcome.status == 'broken']
    for outcome in broken:
        print(f'not made: {outcome.error}')
    if broken:
        raise UserError(f'{len(broken)} of {len(outcomes)} label images could not be made, e.g. of '
                        f'{broken[0].source}; fix what is named above and run this again')


def create_labels_parser():
    """The parser of this command."""
    parser = Parser(prog='python -m mdil create-labels',
                    description='Makes label images from annotations, next to them.')
    parser.add_argument('dataset', choices=('idd', 'cityscapes'), help='data set')
    parser.add_argument('--datadir', required=True, metavar='DIR', help='folder that holds gtFine')
    parser.add_argument('--out', metavar='DIR',
                        help='folder for the label images, and a link to the images, if --datadir is read-only')
    parser.add_argument('--id-type', choices=ID_TYPES, help='label values of idd (level3Id if not given)')
    parser.add_argument('--force', action='store_true', help='also remake images that are up to date')
    parser.add_argument('--num-workers', '--workers', type=natural, default=os.cpu_count() or 1, help='processes')
    return parser


def main(arguments=None):
    """Makes the label images that the command line asks for; returns 0, or UserError."""
    parser = create_labels_parser()
    options = parser.parse_args(arguments)
    if options.dataset == 'cityscapes' and options.id_type:
        parser.error('--id-type is for idd; cityscapes labels are train ids')
    idd = options.dataset == 'idd'
    encoding = idd_encoding(options.id_type or 'level3Id') if idd else cityscapes_encoding()
    make = partial(make_label, encoding=encoding, force=options.force)
    sources = find_sources(options.datadir, encoding, options.out)
    prepare(options.datadir, options.out, options.dataset)
    report(list(in_parallel(make, sources, options.num_workers, 'labels')), encoding)
    return 0


if __name__ == '__main__':
    run_main(main)
