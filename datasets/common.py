"""The label space that all domains share, IDD's level 1, for comparing scores of different class sets.

A class is assigned to a common class by its name: classes of Cityscapes, BDD100K and IDD as in IDD's own
label table, those of CamVid as below. A user's own domain can take part if all its class names are among
these. Void stays void. Only Cityscapes' label ids are finer than its classes (parking is drivable, a guard
rail is a roadside object); the ground truth keeps that detail.
"""
from dataclasses import replace

from mdil.datasets.declaration import Labels
from mdil.datasets.domains import DOMAINS, LABEL_IDS
from mdil.datasets.labels import label_table
from mdil.utils.errors import UserError

CLASSES = DOMAINS['idd-lite'].classes
VOID = len(CLASSES)
CAMVID = {'sky': 6, 'building': 5, 'pole': 4, 'road': 0, 'sidewalk': 1, 'tree': 5, 'sign': 4, 'fence': 4, 'car': 3,
          'pedestrian': 2, 'bicyclist': 2}


def places():
    """{class name: index in CLASSES} for the classes of all built-in domains."""
    found = {name: index for index, name in enumerate(CLASSES)}
    found.update(CAMVID)
    for row in label_table('idd'):
        for domain, column in (('cityscapes', 'csTrainId'), ('IDD', 'level3Id')):
            if row[column] < len(DOMAINS[domain].classes):
                found[DOMAINS[domain].classes[row[column]]] = row['level1Id']
    return found


def to_common(domain):
    """Index in CLASSES, or VOID, of every class index of `domain`, void included, as a list.

    UserError for a domain with a class that belongs to no common class.
    """
    known = places()
    strange = [name for name in domain.classes if name not in known]
    if strange:
        more = f' and {len(strange) - 3} more' if len(strange) > 3 else ''
        raise UserError(f'--common-classes: domain {domain.name!r} has no mapping to the common classes: '
                        f'{", ".join(map(repr, strange[:3]))}{more} is not a class name of the built-in domains; '
                        'name its classes as those do, or leave --common-classes out')
    return [known[name] for name in domain.classes] + [VOID]


def with_finer_labels(domain):
    """`domain` with labels that keep common classes which are void in the domain itself.

    Such a pixel has the label num_classes + its index in CLASSES, instead of void. Only Cityscapes' label
    ids are finer than its classes; they are then read in preference to train ids.
    """
    finer = {row['csId']: domain.num_classes + row['level1Id'] for row in label_table('idd') if row['level1Id'] < VOID}
    layouts = []
    for layout in domain.layouts:
        kinds = [kind if kind.suffix != LABEL_IDS or domain.name != 'cityscapes' else
                 Labels(LABEL_IDS, {value: finer.get(value, index) if index == domain.void else index
                                    for value, index in kind.values.items()}) for kind in layout.label_kinds]
        kinds.sort(key=lambda kind: kind.suffix != LABEL_IDS)
        layouts.append(replace(layout, label_kinds=tuple(kinds)))
    return replace(domain, layouts=tuple(layouts))
