"""Domains: the names of each data set, its classes and where its files are.

A domain is one declaration. `get_domain` finds one by name or alias, or reads a user's own from JSON;
`domain_of` takes a user's own from a file that a training wrote.
"""
import difflib
from dataclasses import replace
from pathlib import Path

from mdil.datasets.declaration import IMAGES, Domain, Labels, Layout, train_ids
from mdil.datasets.labels import label_table
from mdil.datasets.own import read_domain
from mdil.utils.errors import UserError

LABEL_IDS = '_gtFine_labelIds.png'


def cityscapes_label_ids():
    """{Cityscapes label id: class index}, void 19. Id -1 (license plate) occurs in no label image."""
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
IDD_CLASSES, IDD_COLORS = idd_classes('level3Id', 26,
                                      ('drivable fallback', 'non-drivable fallback', 'vehicle fallback'))

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
        make_labels='python -m mdil create-labels cityscapes --datadir',
        layouts=(Layout('leftImg8bit/{split}', ('_leftImg8bit.png', '_leftImg8bit.jpg'),
                        'gtFine/{split}', (Labels('_gtFine_labelTrainIds.png', train_ids(19)),
                                           Labels(LABEL_IDS, cityscapes_label_ids()))),)),
    Domain(
        'BDD', 'bdd100k', CS_CLASSES, CS_COLORS, aliases=('bdd100k',), weights=BDD_WEIGHTS,
        layouts=(Layout('seg/images/{split}', ('.jpg', '.png'),
                        'seg/labels/{split}', (Labels('_train_id.png', train_ids(19)),)),
                 Layout('images/10k/{split}', ('.jpg', '.png'),
                        'labels/sem_seg/masks/{split}', (Labels('.png', train_ids(19)),)))),
    Domain(
        'IDD', 'IDD_Segmentation', IDD_CLASSES, IDD_COLORS, weights=IDD_WEIGHTS,
        make_labels='python -m mdil create-labels idd --id-type level3Id --datadir',
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
        layouts=(Layout('{split}', ('.png', '.jpg', '.jpeg'),
                        '{split}annot', (Labels('.png', train_ids(11, void=11)),)),)),
)}


def domain_names():
    """{name or alias, lower case: the domain's name}."""
    return {alias.lower(): domain.name for domain in DOMAINS.values()
            for alias in (domain.name, *domain.aliases)}


def canonical(name):
    """The domain's name for an alias, in any case; a name that is not built in stays."""
    return domain_names().get(name.lower(), name)


def is_called(domain, name):
    """Whether `name`, in any case, is that of the domain called `domain`, or an alias of it."""
    return domain.lower() == canonical(name).lower()


def index_among(names, name, source):
    """Index in `names` of the domain that is called `name`, see `is_called`; else UserError."""
    for index, known in enumerate(names):
        if is_called(known, name):
            return index
    question = meant(name, {known.lower(): known for known in names})
    raise UserError(f'{source} knows {", ".join(names)}, not {name}{question}')


def meant(name, names):
    """The name of {lower case: name} that `name` was perhaps meant to be, as a question; '' if there is none."""
    alike = difflib.get_close_matches(name.lower(), names, 1)
    return f' (did you mean {names[alike[0]]}?)' if alike else ''


def is_declared(name, paths):
    """Whether the domain is built in, or a user's own that `paths` declare."""
    return canonical(name) in DOMAINS or name in paths


def placed(paths):
    """`paths` with aliases replaced by domain names; UserError if two aliases have different paths."""
    found = {}
    for key, value in paths.items():
        path = found.setdefault(canonical(key), Path(value))
        if path != Path(value):
            raise UserError(f'--data gives two paths for {canonical(key)}, {path} and {value}; give one')
    return found


def get_domain(name, paths=None):
    """The domain called `name` (or an alias of it), with its files where `paths` says.

    paths: {name: folder or JSON file} from `--data NAME=PATH`. A name that is not built in is a user's own
        domain, declared by that JSON file or by `domain.json` in that folder. A JSON file for a built-in
        domain names lists of its pairs.

    Raises UserError for a name that is neither built in nor in `paths`.
    """
    paths, name = placed(paths or {}), canonical(name)
    if name in DOMAINS and name in paths and paths[name].suffix == '.json':
        return read_domain(name, paths[name], DOMAINS[name])
    if name in DOMAINS:
        return replace(DOMAINS[name], folder=str(paths[name].absolute())) if name in paths else DOMAINS[name]
    if name not in paths:
        names = {**{own.lower(): own for own in paths}, **domain_names()}
        raise UserError(f'unknown domain {name!r}{meant(name, names)}; built in are {", ".join(DOMAINS)}; for your own '
                        f'pass --data {name}=FOLDER with a domain.json in FOLDER (docs/data.md describes it)')
    path = paths[name]
    return read_domain(name, path if path.suffix == '.json' else path / 'domain.json')


def domain_of(entry, paths):
    """The Domain for an entry of a checkpoint or an exported file.

    It is the built-in one or the one that `paths` declare; otherwise the entry describes it, and its
    label files hold class indices, and 255 for void.
    """
    name = entry['name']
    if is_declared(name, paths) or 'class_names' not in entry:
        return get_domain(name, paths)
    count = len(entry['class_names'])
    colors = tuple(map(tuple, entry.get('colors', [(0, 0, 0)] * count)))
    nowhere = Layout('', IMAGES, '', (Labels('', train_ids(count)),))
    return Domain(name, name, tuple(entry['class_names']), colors, (nowhere,))
