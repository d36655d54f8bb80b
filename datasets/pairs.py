"""Pairing images with labels by name."""
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from mdil.utils.errors import UserError


@dataclass(frozen=True)
class Pair:
    """An image, its label and how the label's values map to classes."""
    image: Path
    label: Path
    values: dict


@dataclass(frozen=True)
class Split:
    """The pairs of a domain's split in the order of their names, and what has no partner."""
    pairs: tuple
    without_label: tuple
    without_image: tuple


def files_by_key(folder, suffixes):
    """{path below `folder` less its suffix: path} of the files with one of `suffixes`.

    The first suffix that a key has wins, in the order given; two files of one key and
    one suffix cannot be.
    """
    found = {}
    if not folder.is_dir():
        return found
    files = sorted(Path(place, name) for place, _, names in os.walk(folder, followlinks=True)
                   for name in names if not name.startswith('.'))
    for suffix in suffixes:
        for path in files:
            if path.name.endswith(suffix):
                key = path.relative_to(folder).as_posix()[:-len(suffix)]
                found.setdefault(key, (path, suffix))
    return found


def find_split(domain, root, split):
    """The Split of `domain` under `root` (`--data-root`); UserError if it holds no pair."""
    base = Path(root) / domain.folder
    looked = []
    for layout in domain.layouts:
        images_dir, labels_dir = (base / part.format(split=split) for part in (layout.images, layout.labels))
        looked.append(f'{images_dir} with {labels_dir}')
        images = files_by_key(images_dir, layout.image_suffixes)
        if not images:
            continue
        kinds = {kind.suffix: kind.values for kind in layout.label_kinds}
        labels = files_by_key(labels_dir, tuple(kinds))
        keys = sorted(images.keys() & labels.keys())
        if not keys:
            raise UserError(missing_labels(domain, base, labels_dir, layout, len(images)))
        return Split(tuple(Pair(images[k][0], labels[k][0], kinds[labels[k][1]]) for k in keys),
                     tuple(images[k][0] for k in sorted(images.keys() - labels.keys())),
                     tuple(labels[k][0] for k in sorted(labels.keys() - images.keys())))
    raise UserError(f'no {split} images of {domain.name}: looked in {"; ".join(looked)}; '
                    f'pass --data-root, or --data {domain.name}=FOLDER')


def missing_labels(domain, base, labels_dir, layout, count):
    """Message for images none of which has a label."""
    suffixes = ' or '.join(f'*{kind.suffix}' for kind in layout.label_kinds)
    hint = f'; run {domain.make_labels} {base}' if domain.make_labels else ''
    return f'none of the {count} images of {domain.name} has a label {suffixes} in {labels_dir}{hint}'


def report_unpaired(domain, split, found):
    """One line on standard error about files without a partner, if there are any."""
    for count, what, first in ((len(found.without_label), 'images without a label', found.without_label),
                               (len(found.without_image), 'labels without an image', found.without_image)):
        if count:
            print(f'{domain.name} {split}: {count} {what} left out, e.g. {first[0]}; '
                  f'python -m datasets.check lists them', file=sys.stderr)
