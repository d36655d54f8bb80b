"""Users' own domains: `domain.json`, read strictly.

A mistake in it would not stop training but spoil it: a wrong void value turns a class into void, a repeated
name drops a class from the table. So every entry is checked, and one sentence says what is wrong.
"""
import json
import os
import re
from dataclasses import replace
from urllib.parse import quote

from mdil.datasets.declaration import IMAGES, MASKS, VOID_FILE_VALUE, Domain, Labels, Layout
from mdil.utils.errors import UserError

SPLITS = ('train', 'val', 'test')
KEYS = ('classes', 'images', 'labels', 'image_suffix', 'label_suffix', 'void', 'values', 'by_color', 'weights', *SPLITS)
MOST = 254          # most classes: labels are bytes, one index is void, one marks errors
LONGEST_NAME = 200  # most bytes of a domain's name, percent-encoded, as in the names of folders
BLACK = 0


class Wrong(ValueError):
    """What is wrong with a domain.json, in words; `read_domain` adds the file's name."""


def read_domain(name, file, built_in=None):
    """The domain `name` that the JSON file declares; UserError if it cannot be used.

    built_in: the Domain of that name, for which the file may only give lists of pairs; else None.
    """
    try:
        spec = json.loads(file.read_text(encoding='utf-8-sig'), object_pairs_hook=without_repeats)
        folder = file.parent.absolute()
        return declared_domain(name, folder, spec) if built_in is None else with_lists(built_in, folder, spec)
    except FileNotFoundError:
        raise UserError(f'domain {name!r}: {file} does not exist; write it as docs/data.md shows') from None
    except OSError as error:
        raise UserError(f'domain {name!r}: {file} cannot be read ({error.strerror})') from None
    except (ValueError, RecursionError) as error:
        what = str(error) if isinstance(error, Wrong) else f'it is not JSON ({error})'
        raise UserError(f'domain {name!r}: {file} cannot be used: {what}; docs/data.md describes the file') from None


def without_repeats(pairs):
    """The dict of a JSON object's pairs; Wrong if a key is repeated (JSON silently keeps the last)."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [key for key, _ in pairs]
        raise Wrong(f'{next(key for key in names if names.count(key) > 1)!r} is stated twice')
    return found


def declared_domain(name, folder, spec):
    """The Domain that `spec`, the content of a domain.json in `folder`, declares."""
    check_domain_name(name)
    if not isinstance(spec, dict):
        raise Wrong('an object {"images": ..., "labels": ..., "classes": [...]} is expected')
    unknown = [key for key in spec if key not in KEYS]
    if unknown:
        raise Wrong(f'{unknown[0]!r} is not an entry of this file; its entries are {", ".join(KEYS)}')
    classes, colors = read_classes(spec)
    weights = read_weights(spec['weights'], len(classes)) if 'weights' in spec else None
    return Domain(name, str(folder), classes, colors, (read_layout(spec, folder, classes, colors),), weights=weights)


def check_domain_name(name):
    """Wrong unless `name` can be the name of a domain, of which folders and files are called, too."""
    if name.lower() == 'auto':
        raise Wrong('--domain auto lets the image decide, so no domain can be called auto; choose another name')
    encoded = quote(name, safe='', errors='surrogateescape')
    if (not name.isprintable() or name != name.strip() or name in ('', '.', '..') or set(name) & set('/\\=')
            or name.startswith('-') or len(encoded) > LONGEST_NAME):
        raise Wrong(f'{name!r} cannot be the name of a domain, because folders are called after it: use printable '
                    f'characters without / \\ and =, no - or blank first, and at most {LONGEST_NAME} bytes '
                    '(letters beyond ASCII count several times)')


def with_lists(domain, folder, spec):
    """A built-in Domain with pairs from lists in `folder`; spec: {"train": file, "val": file}."""
    if not isinstance(spec, dict) or not spec or not spec.keys() <= set(SPLITS):
        raise Wrong(f'{domain.name} is built in, so its entries are lists of pairs alone: {", ".join(SPLITS)}')
    lists = {split: folder / read_text(spec, split) for split in spec}
    return replace(domain, folder=str(folder), layouts=tuple(replace(layout, lists=lists) for layout in domain.layouts))


def read_classes(spec):
    """(names, colours) of the classes."""
    entries = spec.get('classes')
    if not isinstance(entries, list) or not 1 <= len(entries) <= MOST:
        raise Wrong(f'"classes" must be a list of 1 to {MOST} classes, each {{"name": ..., "color": [R, G, B]}}')
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict) or set(entry) != {'name', 'color'}:
            raise Wrong(f'class {number} must be {{"name": ..., "color": [R, G, B]}} and nothing else; its label value '
                        f'is {number}, its place in the list, unless "values" says otherwise')
        check_name(entry['name'], number)
        if not is_color(entry['color']):
            raise Wrong(f'the color of class {entry["name"]!r} must be [R, G, B], whole numbers from 0 to 255')
    names = [entry['name'] for entry in entries]
    for name in names:
        if names.count(name) > 1:
            raise Wrong(f'two classes are called {name!r}; give each a name of its own')
    return tuple(names), tuple(tuple(entry['color']) for entry in entries)


def check_name(name, number):
    """Wrong unless `name` can be the name of class `number`."""
    if not isinstance(name, str) or not name.strip() or not name.isprintable():
        raise Wrong(f'the name of class {number} must be a text that is not empty')
    if name != name.strip():
        raise Wrong(f'the name of class {number}, {name!r}, begins or ends with a blank; leave it out')
    if name.lower() == 'void':
        raise Wrong('void is not a class: leave it out of "classes" and give its label value as "void"')


def is_byte(value):
    """Whether `value` is a whole number that fits into 8 bits."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 255


def is_color(value):
    """Whether `value` is [R, G, B]."""
    return isinstance(value, list) and len(value) == 3 and all(map(is_byte, value))


def color_number(color):
    """0xRRGGBB of an RGB colour."""
    return color[0] << 16 | color[1] << 8 | color[2]


def weights_fault(weights, count):
    """What is wrong, in words, with cross-entropy weights of `count` classes and void; '' if nothing is."""
    if not isinstance(weights, list) or len(weights) != count + 1:
        found = f'{len(weights)} weights' if isinstance(weights, list) else f'{weights!r}'
        return f'{found} for {count} classes and void; a list of {count + 1} numbers is expected, void last'
    for weight in weights:
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight <= 1e6:
            return f'{weight!r} is not a weight; numbers from 0 to 1e6 are expected'
    return '' if any(weights[:-1]) else 'the weights of all classes are 0, so nothing would be learnt'


def read_weights(weights, count):
    """The weights as a tuple of floats."""
    fault = weights_fault(weights, count)
    if fault:
        raise Wrong(f'"weights": {fault}')
    return tuple(map(float, weights))


def read_layout(spec, folder, classes, colors):
    """The Layout of a domain.json's entries about files and label values."""
    lists = {split: folder / read_text(spec, split) for split in SPLITS if split in spec}
    lacking = [key for key in ('images', 'labels') if key not in spec]
    if lacking and (len(lacking) == 1 or not lists):
        raise Wrong(f'"{lacking[0]}" is missing: the folder of {lacking[0]}, in which {{split}} stands for train and '
                    'val; or give lists of pairs, "train" and "val"')
    images, labels = (read_folder(spec, key) if key in spec else '' for key in ('images', 'labels'))
    image_suffixes = read_suffixes(spec, 'image_suffix', IMAGES)
    label_suffixes = read_suffixes(spec, 'label_suffix', MASKS)
    if images and images == labels and {*map(str.lower, image_suffixes)} & {*map(str.lower, label_suffixes)}:
        raise Wrong('images and labels lie in one folder and have the same suffixes; state an "image_suffix" and a '
                    '"label_suffix" that differ')
    by_color = spec.get('by_color', False)
    if not isinstance(by_color, bool):
        raise Wrong('"by_color" must be true or false')
    values = (color_values if by_color else label_values)(spec, classes, colors)
    return Layout(images, image_suffixes, labels, tuple(Labels(suffix, values, by_color) for suffix in label_suffixes),
                  lists)


def names_files(value):
    """Whether `value` is a text that can name files."""
    try:
        return isinstance(value, str) and value != '' and b'\0' not in os.fsencode(value)
    except UnicodeEncodeError:
        return False


def read_text(spec, key):
    """The entry `key`, a text that can name files."""
    if not names_files(spec[key]):
        raise Wrong(f'"{key}" must be a text that is not empty')
    return spec[key]


def read_folder(spec, key):
    """The folder under `key`; it may contain {split}, but no other braces."""
    text = read_text(spec, key)
    if re.search('[{}]', text.replace('{split}', '')):
        raise Wrong(f'"{key}" is {text!r}; the only braces it may have are {{split}}')
    return text


def read_suffixes(spec, key, default):
    """The suffixes under `key`, a text or a list of them."""
    given = spec.get(key, list(default))
    suffixes = [given] if isinstance(given, str) else given
    if not isinstance(suffixes, list) or not suffixes or not all(
            names_files(suffix) and '/' not in suffix for suffix in suffixes):
        raise Wrong(f'"{key}" must be the ending of file names, such as "_L.png", or a list of endings')
    return tuple(suffixes)


def label_values(spec, classes, _):
    """{label value: class index} for labels that hold numbers."""
    void, count = spec.get('void', VOID_FILE_VALUE), len(classes)
    if void is not None and not is_byte(void):
        raise Wrong('void must be a whole number from 0 to 255, or null if no label value is void')
    if 'values' in spec:
        found = mapped(spec['values'], classes, parsed_byte, 'label values from 0 to 255, such as "7"')
    else:
        found = {value: value for value in range(count)}
    if void is not None and found.get(void, count) != count:
        if 'void' in spec:
            raise Wrong(f'void is {void}, which is the label value of class {classes[found[void]]!r}; where labels '
                        'count from 1, "values" says so: {"1": ' + f'"{classes[0]}"' + ', ...}')
        void = None
    return found if void is None else {**found, void: count}


def color_values(spec, classes, colors):
    """{0xRRGGBB: class index} for labels that are colour images; black is void unless stated otherwise."""
    found, count = {}, len(classes)
    for index, color in enumerate(colors):
        other = found.setdefault(color_number(color), index)
        if other != index:
            raise Wrong(f'classes {classes[other]!r} and {classes[index]!r} have the same color; with "by_color" each '
                        'class needs its own')
    for color, index in mapped(spec.get('values', {}), classes, parsed_color, 'colors, such as "128,64,128"').items():
        if found.setdefault(color, index) != index:
            raise Wrong(f'"values" gives the color of class {classes[found[color]]!r} to another')
    void = spec.get('void', [0, 0, 0])
    if void is None or 'void' not in spec and found.get(BLACK, count) != count:
        return found
    if not is_color(void):
        raise Wrong('void must be a color [R, G, B] where "by_color" is true, or null if no color is void')
    if found.get(color_number(void), count) != count:
        raise Wrong(f'void is the color of class {classes[found[color_number(void)]]!r}')
    return {**found, color_number(void): count}


def parsed_byte(text):
    """The number from 0 to 255 in `text`; False for any other text."""
    return text.isdecimal() and len(text) <= 3 and is_byte(int(text)) and int(text)


def parsed_color(text):
    """0xRRGGBB of "R,G,B"; False for any other text."""
    parts = [part.strip() for part in text.split(',')]
    color = [int(part) if part.isdecimal() and len(part) <= 3 else 256 for part in parts]
    return is_color(color) and color_number(color)


def mapped(values, classes, parse, what):
    """{parsed key: class index} from "values"; "void" and null mean void. parse: returns False for a wrong key."""
    if not isinstance(values, dict):
        raise Wrong('"values" must be an object {label value: class name}')
    found, indices = {}, {name: index for index, name in enumerate((*classes, 'void'))}
    indices[None] = indices['void']
    for key, name in values.items():
        value = parse(key)
        if value is False:
            raise Wrong(f'"values" has the key {key!r}; its keys are {what}')
        if value in found:
            raise Wrong(f'"values" has two entries for {key!r}')
        if not isinstance(name, (str, type(None))) or name not in indices:
            raise Wrong(f'"values" gives {key!r} to {name!r}, which is neither a class nor "void"')
        found[value] = indices[name]
    return found
