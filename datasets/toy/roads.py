"""Toy roads: drawn street scenes in the folder layouts of the real data sets.

    python -m mdil toy-roads --out DIR [--train 96 --val 24 --height 128 --width 256 --seed 0]

writes `cityscapes/` (Germany), `bdd100k/` (USA) and `IDD_Segmentation/` (India) below DIR: enough
to run every script of the project without the real data. `datasets.toy.scenes` draws them.
"""
import hashlib
import io
import json
from pathlib import Path

from PIL import Image, ImageDraw
from tqdm import tqdm

from mdil.datasets.labels import label_table
from mdil.datasets.toy.scenes import draw_scene
from mdil.utils.errors import UserError, run_main
from mdil.utils.files import write_atomically
from mdil.utils.parser import Parser

VERSION = 1     # raised whenever the same request gives other pictures
SPLITS = ('train', 'val')
FOLDERS = ('cityscapes', 'bdd100k', 'IDD_Segmentation')
# Each country's label table, and the column that its label images hold.
COUNTRIES = {'germany': ('cityscapes', 'id'), 'usa': ('cityscapes', 'trainId'), 'india': ('idd', 'level3Id')}


def label_image(objects, country, height, width):
    """The label image, mode L, that the data set's own converter makes from the polygons."""
    table, column = COUNTRIES[country]
    values = {row['name']: row[column] for row in label_table(table)}
    image = Image.new('L', (width, height), values['unlabeled'])
    pen = ImageDraw.Draw(image)
    for entry in objects:
        pen.polygon([tuple(point) for point in entry['polygon']], fill=values[entry['label']])
    return image


def scene_paths(country, split, index):
    """Paths of a scene's image and label below the root."""
    if country == 'germany':
        city = ('toyburg', 'toyheim')[index % 2] if split == 'train' else 'toystadt'
        stem = f'{split}/{city}/{city}_000000_{index + 1:06d}'
        return f'cityscapes/leftImg8bit/{stem}_leftImg8bit.png', f'cityscapes/gtFine/{stem}_gtFine_labelIds.png'
    if country == 'usa':
        code = hashlib.sha256(f'{split}/{index}'.encode()).hexdigest()
        stem = f'{split}/{code[:8]}-{code[8:16]}'
        return f'bdd100k/seg/images/{stem}.jpg', f'bdd100k/seg/labels/{stem}_train_id.png'
    stem = f'{split}/{index % 3 + (100 if split == "val" else 0):03d}/{index + 1:06d}'
    return (f'IDD_Segmentation/leftImg8bit/{stem}_leftImg8bit.png',
            f'IDD_Segmentation/gtFine/{stem}_gtFine_labellevel3Ids.png')


def save(path, content):
    """Writes the bytes `content` completely or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: file.write(content))


def encoded(image, suffix):
    """The bytes of `image` as a .png or .jpg file."""
    file = io.BytesIO()
    image.save(file, 'JPEG' if suffix == '.jpg' else 'PNG', quality=92)
    return file.getvalue()


def write_scene(root, country, split, index, request):
    """Draws and writes image, label and, for India, polygons of one scene."""
    height, width = request['height'], request['width']
    seed = (request['seed'], list(COUNTRIES).index(country), SPLITS.index(split), index)
    image, objects = draw_scene(country, seed, height, width)
    image_path, label_path = (root / path for path in scene_paths(country, split, index))
    save(image_path, encoded(Image.fromarray(image), image_path.suffix))
    save(label_path, encoded(label_image(objects, country, height, width), '.png'))
    if country == 'india':
        extra = {'deleted': 0, 'verified': 1, 'date': '', 'user': ''}
        entries = [{**entry, **extra, 'id': number} for number, entry in enumerate(objects)]
        text = json.dumps({'imgHeight': height, 'imgWidth': width, 'objects': entries})
        save(label_path.with_name(label_path.name.replace('labellevel3Ids.png', 'polygons.json')), text.encode())


def differences(stored, request):
    """What toy roads on disk differ in from those asked for, as text."""
    if not isinstance(stored, dict):
        return 'unreadable'
    return ', '.join(f'{name} {stored.get(name, "not given")}, not {value}' for name, value in request.items()
                     if stored.get(name) != value)


def is_written(root, request):
    """Whether `root` holds all that `request` asks for; ValueError if it holds anything else."""
    for name in ('toy_roads.json', 'toy_roads.partial.json'):
        path = root / name
        if path.exists():
            try:
                stored = json.loads(path.read_text())
            except ValueError:
                stored = None
            if stored != request:
                raise ValueError(f'{path} is of other toy roads ({differences(stored, request)}): '
                                 'delete those or write to another folder')
            return name == 'toy_roads.json'
    for folder in FOLDERS:
        if (root / folder).exists():
            raise ValueError(f'{root / folder} is there already and not of toy roads: write to another folder')
    return False


def write_toy_roads(root, train=96, val=24, height=128, width=256, seed=0):
    """Writes `train` and `val` scenes of each country below `root`, unless they are there already.

    Scene i does not depend on the counts. ValueError if `root` holds other data or other toy roads.
    """
    root = Path(root)
    request = {'version': VERSION, 'train': train, 'val': val, 'height': height, 'width': width, 'seed': seed}
    for name, low, high in (('train', 1, 99999), ('val', 1, 99999), ('height', 16, 4096), ('width', 16, 4096),
                            ('seed', 0, 2 ** 63)):
        if not isinstance(request[name], int) or not low <= request[name] <= high:
            raise ValueError(f'{name} must be a whole number from {low} to {high}, found {request[name]!r}')
    if is_written(root, request):
        return
    save(root / 'toy_roads.partial.json', json.dumps(request).encode())
    scenes = [(country, split, index) for country in COUNTRIES for split in SPLITS for index in range(request[split])]
    for scene in tqdm(scenes, desc='toy roads', unit='scene', disable=None):
        write_scene(root, *scene, request)
    save(root / 'toy_roads.json', json.dumps(request).encode())
    (root / 'toy_roads.partial.json').unlink(missing_ok=True)


def main(argv=None):
    parser = Parser(prog='python -m mdil toy-roads', description='Write toy road scenes of three countries.')
    parser.add_argument('--out', required=True, metavar='DIR', help='folder to write the three data sets to')
    for name, default, text in (('train', 96, 'training scenes per country'), ('val', 24, 'the same for validation'),
                                ('height', 128, 'pixels'), ('width', 256, 'pixels'), ('seed', 0, 'random seed')):
        parser.add_argument(f'--{name}', type=int, default=default, metavar='N', help=text)
    options = vars(parser.parse_args(argv))
    out = options.pop('out')
    try:
        write_toy_roads(out, **options)
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from None
    print('{0}: {train} training and {val} validation scenes, {width}x{height}, in each of {1}'.format(
        out, ', '.join(FOLDERS), **options))


if __name__ == '__main__':
    run_main(main)
