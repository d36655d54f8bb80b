"""Pairing images with labels, by name or by a list of pairs."""
import os
import re
from dataclasses import dataclass
from pathlib import Path

from mdil.utils.errors import UserError, printable
from mdil.utils.parallel import tell
from mdil.utils.files import same_file


@dataclass(frozen=True)
class Pair:
    """An image, its label, and how the label's values (or colours, see Labels) map to classes."""
    image: Path
    label: Path
    values: dict
    by_color: bool = False


@dataclass(frozen=True)
class Split:
    """The pairs of a domain's split in the order of their names, or of their list.

    without_label, without_image: files that have no partner.
    repeated_images, repeated_labels: groups of files of one kind with the same name, such as a.png and a.jpg; the
        first one is used.
    """
    pairs: tuple
    without_label: tuple = ()
    without_image: tuple = ()
    repeated_images: tuple = ()
    repeated_labels: tuple = ()


def identity(path):
    """What identifies a file or folder on this machine, whatever its name."""
    status = os.stat(path)
    return status.st_dev, status.st_ino


def files_below(folder, without=None):
    """Paths of the regular files below `folder`, without hidden files, hidden folders and the folder `without`.

    Links are followed. Every real folder is visited once, under its own name if it has one below `folder`.
    """
    found, seen, folders, links = [], set(), [folder], []
    if without and os.path.isdir(without) and identity(without) != identity(folder):
        seen.add(identity(without))
    while folders or links:
        place = (folders or links).pop()
        try:
            if identity(place) in seen:
                continue
            seen.add(identity(place))
            entries = sorted(os.scandir(place), key=lambda entry: entry.name, reverse=True)
        except OSError as error:
            raise UserError(f'{place} cannot be read: {error.strerror}') from None
        for entry in entries:
            path, link = Path(entry), entry.is_symlink()
            if entry.name.startswith('.'):
                continue
            # os.path is asked about links, because the entry raises an error on a link to itself.
            if os.path.isdir(path) if link else entry.is_dir():
                (links if link else folders).append(path)
            elif os.path.isfile(path) if link else entry.is_file():     # no pipe, device or broken link
                found.append(path)
    return found


def files_by_key(folder, suffixes):
    """{path below `folder` without its suffix: [(path, suffix), ...]} of the files with one of `suffixes`.

    Suffixes match regardless of case; the longest match counts. The files of one key are in the order of
    `suffixes`.
    """
    by_length = sorted(suffixes, key=len, reverse=True)
    found = {}
    for path in sorted(files_below(folder)) if os.path.isdir(folder) else ():
        suffix = next((suffix for suffix in by_length if path.name.lower().endswith(suffix.lower())), None)
        if suffix is not None:
            key = path.relative_to(folder).as_posix()[:-len(suffix)]
            found.setdefault(key, []).append((path, suffix))
    for files in found.values():
        files.sort(key=lambda file: suffixes.index(file[1]))
    return found


def find_split(domain, root, split):
    """The Split of `domain` under `root` (`--data-root`); UserError if it has no pairs."""
    base = Path(root) / domain.folder
    tried = []
    for layout in domain.layouts:
        if split in layout.lists:
            return listed_split(layout, base, split)
        if not layout.images:
            raise UserError(f'domain {domain.name} has no list of pairs for {split}: its domain.json names none'
                            if layout.lists else f'the images of {domain.name} are not declared here; pass --data '
                            f'{domain.name}=FOLDER, the folder with its domain.json')
        found = split_of_folders(layout, *folders_of(layout, base, split))
        if found.pairs:
            return found
        tried.append((layout, found))
    raise UserError(nothing_found(domain, base, split, tried))


def folders_of(layout, base, split):
    """Folders of the images and of the labels of a split."""
    return tuple(base / folder.replace('{split}', split) for folder in (layout.images, layout.labels))


def split_of_folders(layout, images_dir, labels_dir):
    """The Split of the files in two folders; it may have no pairs."""
    kinds = {kind.suffix: kind for kind in layout.label_kinds}
    labels = files_by_key(labels_dir, tuple(kinds))
    known = {path for files in labels.values() for path, _ in files} if labels_dir == images_dir else ()
    images = {key: [file for file in files if file[0] not in known]
              for key, files in files_by_key(images_dir, layout.image_suffixes).items()}
    images = {key: [path for path, _ in files] for key, files in images.items() if files}
    pairs = []
    for key in sorted(images.keys() & labels.keys()):
        label, suffix = labels[key][0]
        pairs.append(Pair(images[key][0], label, kinds[suffix].values, kinds[suffix].by_color))
    return Split(tuple(pairs), tuple(images[key][0] for key in sorted(images.keys() - labels.keys())),
                 tuple(labels[key][0][0] for key in sorted(labels.keys() - images.keys())),
                 tuple(tuple(images[key]) for key in sorted(images) if len(images[key]) > 1),
                 tuple(group for key in sorted(labels) for group in alike(labels[key], kinds)))


def alike(files, kinds):
    """Groups of several labels (path, suffix) whose values mean the same; kinds: {suffix: its Labels}."""
    groups = {}
    for path, suffix in files if len(files) > 1 else ():
        first = next(other for other in kinds if kinds[other].values == kinds[suffix].values)
        groups.setdefault(first, []).append(path)
    return [tuple(group) for group in groups.values() if len(group) > 1]


def listed_split(layout, base, split):
    """The Split in a list of pairs; UserError for an invalid line."""
    file = layout.lists[split]
    try:
        lines = file.read_text(encoding='utf-8-sig', errors='surrogateescape').split('\n')
    except OSError as error:
        raise UserError(f'{file} cannot be read: {error.strerror}') from None
    pairs, first = [], {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        image, label = listed_pair(layout, base, split, line.strip(), f'{file} line {number}')
        if image in first:
            raise UserError(f'{file} line {number} repeats the image of line {first[image]}')
        first[image] = number
        pairs.append(pair_of(layout, image, label))
    if not pairs:
        raise UserError(f'{file} lists no pairs; each line is: image, space, label')
    return Split(tuple(pairs))


def pair_of(layout, image, label):
    """The Pair of two paths; the label's suffix decides its kind (default: the first)."""
    kind = next((kind for kind in layout.label_kinds if label.name.lower().endswith(kind.suffix.lower())),
                layout.label_kinds[0])
    return Pair(image, label, kind.values, kind.by_color)


def listed_pair(layout, base, split, line, place):
    """The paths (image, label) of a line in a list: each below `base`, or both by one name that they share.

    Names may contain blanks: of several ways to split the line, the one whose files exist is used.
    """
    blanks = re.finditer(r'\t' if '\t' in line else r'\s+', line)
    cuts = [(line[:blank.start()], line[blank.end():]) for blank in blanks]
    ways = [tuple(listed_file(base, name) for name in cut) for cut in cuts]
    if layout.images:
        images, labels = folders_of(layout, base, split)
        image_suffixes = in_both_cases(layout.image_suffixes)
        stem = next((line.removesuffix(suffix) for suffix in image_suffixes if line.endswith(suffix)), line)
        ways += [(images / (stem + suffix), labels / (stem + label_suffix)) for suffix in image_suffixes
                 for label_suffix in in_both_cases(kind.suffix for kind in layout.label_kinds)]
    if not ways:
        raise UserError(f'{place} has one name; an image and a label, separated by a space, are expected')
    found = next((way for way in ways if os.path.isfile(way[0]) and os.path.isfile(way[1])), None)
    if found is None:
        nearest = max(ways, key=lambda way: os.path.isfile(way[0]) + os.path.isfile(way[1]))
        absent = next(path for path in nearest if not os.path.isfile(path))
        names = {listed_file(base, name): name for cut in cuts for name in cut}
        alone = f', nor is {names[absent]}' if names.get(absent, '').startswith('/') else ''
        raise UserError(f'{place}: {absent} is not a file{alone}')
    if same_file(*found):
        raise UserError(f'{place} names {found[0]} as the image and as its label')
    return found


def in_both_cases(suffixes):
    """The suffixes as they are written, then in capitals, as cameras write them."""
    suffixes = tuple(suffixes)
    return suffixes + tuple(map(str.upper, suffixes))


def listed_file(base, name):
    """The path of a name in a list: below `base`, even with a leading slash, unless the absolute path is a file."""
    path = base / name
    return path if os.path.isfile(path) else base / name.lstrip('/')


def nothing_found(domain, base, split, tried):
    """Message for a split without pairs: what was found, and which names are expected.

    tried: [(Layout, its Split)].
    """
    for layout, found in tried:
        if found.without_label:
            return missing_labels(domain, base, split, layout, found)
    looked, there = [], False
    for layout, _ in tried:
        images_dir, labels_dir = folders_of(layout, base, split)
        there |= os.path.isdir(images_dir)
        looked.append(f'{images_dir} ({holds(images_dir)}) with {labels_dir}')
    wanted = ' or '.join(dict.fromkeys(f'*{suffix}' for layout, _ in tried for suffix in layout.image_suffixes))
    hint = f'; wanted are {wanted}' if there else place_hint(domain)
    return f'no {split} images of {domain.name}: looked in {"; ".join(looked)}{hint}'


def place_hint(domain):
    """Which option says where a domain is, for one whose folders do not exist."""
    if Path(domain.folder).is_absolute():
        return f'; --data {domain.name}=PATH, or the domain.json there, says where they are'
    return f'; say where it is with --data-root FOLDER, or --data {domain.name}=FOLDER'


def holds(folder):
    """What `folder` holds, in words."""
    if not os.path.isdir(folder):
        return 'which does not exist'
    files = files_below(folder)
    return f'which holds {len(files)} files, e.g. {min(files).name}' if files else 'which holds no file'


def missing_labels(domain, base, split, layout, found):
    """Message for images of which none has a label."""
    labels_dir = folders_of(layout, base, split)[1]
    suffixes = ' or '.join(f'*{kind.suffix}' for kind in layout.label_kinds)
    text = (f'none of the {len(found.without_label)} images of {domain.name}, e.g. {found.without_label[0].name}, '
            f'has a label {suffixes} in {labels_dir}, {holds(labels_dir)}')
    if not domain.make_labels:
        return text
    annotated = any('_polygons' in path.name or '_labelIds' in path.name
                    for path in (files_below(labels_dir) if os.path.isdir(labels_dir) else ()))
    before = '' if annotated else 'unpack the annotations there and '
    return f'{text}; {before}run {domain.make_labels} {base}'


def report_left_out(domain, split, found):
    """Reports on standard error the files that no pair uses, in a line for each reason."""
    for odd, what in ((found.without_label, 'image{} without a label'),
                      (found.without_image, 'label{} without an image'),
                      ([path for _, *others in found.repeated_images for path in others],
                       'image{} with the name of another'),
                      ([path for _, *others in found.repeated_labels for path in others],
                       'label{} with the name of another')):
        if odd:
            tell(printable(f'{domain.name} {split}: {len(odd)} {what.format("s" * (len(odd) > 1))} left out, e.g. '
                           f'{odd[0]}; python -m mdil check lists them'))
