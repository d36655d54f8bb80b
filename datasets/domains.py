"""Domains: what each data set is called, what its classes are and where its files lie.

A domain is one declaration. `get_domain` finds one by name or alias, or reads a
user's own from a JSON file.
"""
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Optional

from mdil.datasets.labels import label_table
from mdil.utils.errors import UserError

VOID_FILE_VALUE = 255


@dataclass(frozen=True)
class Labels:
    """One way labels are stored: file-name suffix, and label value -> class index.

    values: maps values found in the file to class indices; a value not in it is an
    error, except that void maps to the last class. Missing suffix and values mean a
    file `<stem>.png` of class indices.
    """
    suffix: str
    values: dict = field(hash=False)


@dataclass(frozen=True)
class Layout:
    """Where images and labels of a split lie under the domain's folder.

    Images and labels belong together when their paths below `images` and `labels`,
    less the suffix, are equal. Of several label suffixes the first that exists counts.
    """
    images: str
    image_suffixes: tuple
    labels: str
    label_kinds: tuple


@dataclass(frozen=True)
class Domain:
    """A data set: `classes` excludes void, which is the index after the last class."""
    name: str
    folder: str
    classes: tuple
    colors: tuple
    layouts: tuple
    aliases: tuple = ()
    weights: Optional[tuple] = None     # published cross-entropy weights, void's last
    make_labels: str = ''               # command that makes missing labels

    @property
    def num_classes(self):
        """Classes of the network's output, void included."""
        return len(self.classes) + 1

    @property
    def void(self):
        """Index of the void class."""
        return len(self.classes)

    @property
    def palette(self):
        """RGB of every class index, void (black) last."""
        return self.colors + ((0, 0, 0),)


def train_ids(count, void=VOID_FILE_VALUE):
    """Values 0 to count-1 are the classes, `void` is void."""
    return {**{value: value for value in range(count)}, void: count}


def cityscapes_label_ids():
    """Cityscapes label ids -> class index, void 19. Id -1 (license plate) is in no label image."""
    return {row['id']: 19 if row['trainId'] == 255 else row['trainId']
            for row in label_table('cityscapes') if row['id'] >= 0}


def cityscapes_classes():
    rows = sorted((row for row in label_table('cityscapes') if row['trainId'] != 255),
                  key=lambda row: row['trainId'])
    return tuple(row['name'] for row in rows), tuple((row['r'], row['g'], row['b']) for row in rows)


def idd_classes(level, count, preferred=()):
    """Names and colours of IDD's classes at `level`: those of the first label in each, or of a preferred one."""
    chosen = {}
    for row in label_table('idd'):
        if row[level] < count and (row[level] not in chosen or row['name'] in preferred):
            chosen[row[level]] = row
    rows = [chosen[index] for index in range(count)]
    return tuple(row['name'] for row in rows), tuple((row['r'], row['g'], row['b']) for row in rows)


CS_CLASSES, CS_COLORS = cityscapes_classes()
IDD_CLASSES, IDD_COLORS = idd_classes('level3Id', 26, ('non-drivable fallback', 'vehicle fallback'))
IMAGES = ('.png', '.jpg', '.jpeg')

# The cross-entropy weights below are the published ones, 1 / ln(1.1 + class frequency).
CS_WEIGHTS = (
    2.8159904084894922, 6.9874672455551075, 3.7901719017455604, 9.94305485286704,
    9.77037625072462, 9.511470001589007, 10.310780572569994, 10.025305236316246,
    4.6341256102158805, 9.561389195953845, 7.869695292372276, 9.518873463871952,
    10.374050047877898, 6.662394711556909, 10.26054487392723, 10.28786101490449,
    10.289883605859952, 10.405463349170795, 10.138502340710136, 5.131658171724055)
BDD_WEIGHTS = (
    3.6525147483016243, 8.799815287822142, 4.781908267406055, 10.034828238618045,
    9.5567865464289, 9.645099012085169, 10.315292989325766, 10.163473632969513,
    4.791692009441432, 9.556915153488912, 4.142994047786311, 10.246903827488143,
    10.47145010979545, 6.006704177894196, 9.60620532303246, 9.964959813857726,
    10.478333987902301, 10.468010534454706, 10.440929141422366, 3.960822533003462)
IDD_WEIGHTS = (
    3.235635601598852, 6.76221624390441, 9.458242359884549, 9.446818215454014,
    9.947040673126763, 9.789672819856547, 9.476665808564432, 10.465565126694731,
    9.59189547383129, 7.637805282159825, 8.990899026692638, 9.26222234098628,
    10.265657138809514, 9.386517631614392, 8.357391489170013, 9.910382864314824,
    10.389977663948363, 8.997422571963602, 10.418070541191673, 10.483262606962834,
    9.511436923349441, 7.597725385711079, 6.1734896019878205, 9.787631041755187,
    3.9178330193378708, 4.417448652936843, 10.313160683418731)

DOMAINS = {domain.name: domain for domain in (
    Domain(
        'cityscapes', 'cityscapes', CS_CLASSES, CS_COLORS, aliases=('CS', 'city'), weights=CS_WEIGHTS,
        make_labels='python -m datasets.create_labels cityscapes --datadir',
        layouts=(Layout('leftImg8bit/{split}', ('_leftImg8bit.png', '_leftImg8bit.jpg'),
                        'gtFine/{split}', (Labels('_gtFine_labelTrainIds.png', train_ids(19)),
                                           Labels('_gtFine_labelIds.png', cityscapes_label_ids()))),)),
    Domain(
        'BDD', 'bdd100k', CS_CLASSES, CS_COLORS, aliases=('bdd100k',), weights=BDD_WEIGHTS,
        layouts=(Layout('seg/images/{split}', ('.jpg', '.png'),
                        'seg/labels/{split}', (Labels('_train_id.png', train_ids(19)),)),
                 Layout('images/10k/{split}', ('.jpg', '.png'),
                        'labels/sem_seg/masks/{split}', (Labels('.png', train_ids(19)),)))),
    Domain(
        'IDD', 'IDD_Segmentation', IDD_CLASSES, IDD_COLORS, weights=IDD_WEIGHTS,
        make_labels='python -m datasets.create_labels idd --id-type level3Id --datadir',
        layouts=(Layout('leftImg8bit/{split}', ('_leftImg8bit.png', '_leftImg8bit.jpg'),
                        'gtFine/{split}', (Labels('_gtFine_labellevel3Ids.png', train_ids(26)),)),)),
    Domain(
        'idd-lite', 'idd-lite',
        ('drivable', 'non-drivable', 'living things', 'vehicles', 'roadside objects', 'far objects', 'sky'),
        idd_classes('level1Id', 7)[1],
        layouts=(Layout('leftImg8bit/{split}', ('_image.jpg', '_image.png'),
                        'gtFine/{split}', (Labels('_label.png', train_ids(7)),)),)),
    Domain(
        'camvid', 'camvid',
        ('sky', 'building', 'pole', 'road', 'sidewalk', 'tree', 'sign', 'fence', 'car', 'pedestrian',
         'bicyclist'),
        ((128, 128, 128), (128, 0, 0), (192, 192, 128), (128, 64, 128), (60, 40, 222), (128, 128, 0),
         (192, 128, 128), (64, 64, 128), (64, 0, 128), (64, 64, 0), (0, 128, 192)),
        layouts=(Layout('{split}', IMAGES, '{split}annot', (Labels('.png', train_ids(11, void=11)),)),)),
)}


def domain_names():
    """Names and aliases, lower case -> the domain's name."""
    return {alias.lower(): domain.name for domain in DOMAINS.values()
            for alias in (domain.name, *domain.aliases)}


def get_domain(name, paths=None):
    """The domain called `name` (or an alias of it), placed where `paths` says.

    paths: {name: folder or JSON file} from `--data NAME=PATH`. A name that is not
    built in is a user's own domain, declared by that JSON file or by `domain.json`
    in that folder. Raises UserError for a name that is neither.
    """
    known = domain_names()
    paths = {known.get(key.lower(), key): Path(value) for key, value in (paths or {}).items()}
    name = known.get(name.lower(), name)
    if name in DOMAINS:
        return replace(DOMAINS[name], folder=str(paths[name].absolute())) if name in paths else DOMAINS[name]
    if name not in paths:
        raise UserError(f'unknown domain {name!r}; built in are {", ".join(DOMAINS)}; for your own pass '
                        f'--data {name}=FOLDER with a domain.json in FOLDER (see README)')
    path = paths[name]
    return read_domain(name, path if path.suffix == '.json' else path / 'domain.json')


def read_domain(name, file):
    """A user's own domain from a JSON file: images, labels, classes, optional void and weights.

    `images` and `labels` are folders beside the file, with `{split}` for train and val;
    `classes` a list of {"name", "color"} in the order of the label values; `void` the
    label value that does not count (255 unless given).
    """
    try:
        spec = json.loads(file.read_text())
        classes = tuple(str(entry['name']) for entry in spec['classes'])
        colors = tuple(tuple(int(value) for value in entry['color']) for entry in spec['classes'])
        layout = Layout(spec['images'], IMAGES, spec['labels'],
                        (Labels('.png', train_ids(len(classes), spec.get('void', VOID_FILE_VALUE))),))
        weights = tuple(float(w) for w in spec['weights']) if 'weights' in spec else None
    except FileNotFoundError:
        raise UserError(f'domain {name!r}: {file} does not exist; write it as the README shows') from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f'domain {name!r}: {file} cannot be used ({type(error).__name__}: {error}); '
                        'see "Your own domain" in the README') from None
    if not classes or len(classes) > 254 or any(len(color) != 3 for color in colors):
        raise UserError(f'domain {name!r}: {file} needs 1 to 254 classes, each with an RGB colour')
    if weights is not None and len(weights) != len(classes) + 1:
        raise UserError(f'domain {name!r}: {file} has {len(weights)} weights for {len(classes)} classes and void')
    return Domain(name, str(file.parent.absolute()), classes, colors, (layout,), weights=weights)
