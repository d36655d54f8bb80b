"""Images with their labels, as uint8 tensors of one size."""
import struct
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from mdil.datasets.augment import augment, draw
from mdil.datasets.pairs import Split, find_split, report_left_out
from mdil.utils.errors import UserError

BAD = 255       # marks label values that the domain does not have
FORMATS = ('PNG', 'JPEG', 'TIFF', 'WEBP', 'BMP', 'PPM')      # others may run external programs, as EPS does
# what Pillow raises for damaged files
UNREADABLE = (OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, EOFError, struct.error,
              Image.DecompressionBombError)
ORIENTATION = 0x0112    # EXIF tag
CHECK_HINT = '; python -m mdil check finds all such files'


def lookup_table(values):
    """uint8 (256,) table from a label file's values to class indices, BAD for all other values."""
    table = np.full(256, BAD, dtype=np.uint8)
    for value, index in values.items():
        table[value] = index
    return table


def decoded(path):
    """The decoded image at `path`; UserError if that fails, or if the file holds several images."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            count = getattr(image, 'n_frames', 1)
            if count > 1 and image.format != 'MPO':     # from phones: the photo comes first, then extras
                raise UserError(f'{path} holds {count} images, one is expected; save the right one as a separate file')
            image.load()
            return image
    except Image.UnidentifiedImageError:
        wanted = f'{", ".join(FORMATS[:-1])} or {FORMATS[-1]}'
        raise UserError(f'{path} cannot be read: it is not a {wanted} image') from None
    except UNREADABLE as error:
        raise UserError(f'{path} cannot be read: {getattr(error, "strerror", None) or error}') from None


def open_image(path):
    """The image as RGB at its own size, with pixels as stored: an EXIF rotation is not applied.

    Grey, palette, CMYK and images with alpha are converted. More than 8 bits per channel is a UserError, as
    Pillow would clip them.
    """
    return in_rgb(decoded(path), path)


def in_rgb(image, name):
    """A PIL image in RGB; UserError, which begins with `name`, if it has more than 8 bits per channel."""
    if image.mode.startswith(('I', 'F')):
        raise UserError(f'{name}: mode {image.mode}, but 8 bits per channel are expected; convert it')
    return image if image.mode == 'RGB' else image.convert('RGB')


def open_label(pair):
    """The label image of `pair` at its own size: 8-bit single channel, or RGB if colours are classes."""
    label = decoded(pair.label)
    if label.format in ('JPEG', 'MPO'):
        raise UserError(f'{pair.label}: a label stored as JPEG, which changes label values; store labels as PNG')
    if pair.by_color:
        return in_rgb(label, pair.label)
    if label.mode not in ('L', 'P'):
        hint = '; a colour image? "by_color" in domain.json' if label.mode.startswith('RGB') else ''
        raise UserError(f'{pair.label}: label image has mode {label.mode}, 8-bit single-channel is expected{hint}')
    return label


def likely_cause(wrong, present, values):
    """The likely reason why label values `present` include `wrong` ones, which the mapping `values` lacks."""
    void = next((value for value, index in values.items() if index == max(values.values())), 'none')
    if list(wrong) == [len(values) - 1] and 0 not in present:
        return 'do the classes count from 1? "values" in domain.json can say so'
    if list(wrong) in ([255], [len(values) - 1]):
        other = ', or classes count from 1 and 0 is void' if wrong[0] != 255 else ''
        return f'void is {wrong[0]} where {void} is expected{other}'
    if max(wrong) < 34 and len(values) == 20:
        return 'label IDs where train IDs are expected'
    if max(wrong) < 40:
        return 'perhaps label IDs, or IDs of another level'
    return 'grey levels or palette of a colour image, or labels resized with interpolation?'


def to_classes(label, pair):
    """Class indices (H, W) uint8 of label values (H, W) uint8; UserError naming the file if one is out of range.

    If colours are the classes, `label` is (H, W, 3).
    """
    if pair.by_color:
        return colors_to_classes(label, pair)
    classes = lookup_table(pair.values)[label]
    if (classes == BAD).any():
        wrong = np.unique(label[classes == BAD])
        raise UserError(f'{pair.label}: label values {wrong[:8].tolist()} are not in the class list '
                        f'({likely_cause(wrong, np.unique(label), pair.values)}){CHECK_HINT}')
    return classes


def colors_to_classes(label, pair):
    """Class indices (H, W) uint8 of a label's colours (H, W, 3) uint8."""
    numbers = label.astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], np.uint32)
    known = np.array(sorted(pair.values), dtype=np.uint32)
    places = np.searchsorted(known, numbers).clip(max=len(known) - 1)
    wrong = numbers[known[places] != numbers]
    if len(wrong):
        colors = [[int(number) >> shift & 255 for shift in (16, 8, 0)] for number in np.unique(wrong)[:4]]
        raise UserError(f'{pair.label}: the colors {colors} are not in the class list (soft edges? "values" '
                        f'in domain.json can map more colors to classes){CHECK_HINT}')
    return np.array([pair.values[number] for number in known.tolist()], dtype=np.uint8)[places]


def load_image(pair, width_height, size):
    """Image (3, H, W) uint8 of `pair`, resized to `size`; UserError unless it has its label's width and height."""
    image = open_image(pair.image)
    if image.size != width_height:
        raise UserError(f'{pair.image} is {image.size[0]}x{image.size[1]} but its label {pair.label} '
                        f'is {width_height[0]}x{width_height[1]}{rotation_hint(pair.image)}')
    image = np.asarray(image.resize(size[::-1], Image.BILINEAR))
    return torch.from_numpy(image.transpose(2, 0, 1).copy())


def rotation_hint(path):
    """A hint for an image whose size does not fit: '' unless its EXIF data rotates it."""
    turned = False
    with Image.open(path, formats=FORMATS) as image, suppress(Exception):       # on broken EXIF data, of many kinds
        turned = image.getexif().get(ORIENTATION, 1) != 1
    return ' (the image has an EXIF rotation, which is not applied: store it turned)' if turned else ''


def load_pair(pair, size):
    """Image (3, H, W) and label (H, W) of `pair`, uint8, resized to `size` = (H, W).

    Images are resized bilinearly, labels by nearest neighbour, as published.
    """
    label = open_label(pair)
    image = load_image(pair, label.size, size)
    label = to_classes(np.asarray(label.resize(size[::-1], Image.NEAREST)), pair)
    return image, torch.from_numpy(label)


class SegmentationDataset(Dataset):
    """A domain's split, resized to (height, width).

    Indexed by (epoch, number). Returns image (3, H, W) uint8, label (H, W) uint8 class indices (void =
    domain.void), and number; the image is the one at index number % len.

    augmented: whether flip and shift, drawn from (seed, epoch, number), are applied here. If not,
        `augment_batch` may do so later.
    padding: as for `augment`.
    pairs: Pairs to use instead of those of the split below `root`.

    Attributes: `stored` holds the resized pairs if there is a cache (datasets.cache), `counts` the pixels
    of each class in the labels (C,) if they were counted.
    """

    def __init__(self, domain, root, split, size, augmented=False, seed=0, padding='void', pairs=None):
        self.domain, self.split, self.size, self.augmented, self.seed = domain, split, size, augmented, seed
        self.padding = padding
        self.folder = Path(root) / domain.folder
        found = find_split(domain, root, split) if pairs is None else Split(tuple(pairs))
        report_left_out(domain, split, found)
        self.pairs, self.stored, self.counts = found.pairs, None, None

    def __len__(self):
        return len(self.pairs)

    def sample_bytes(self):
        """Bytes of an image and its label, as loaded."""
        return 4 * self.size[0] * self.size[1]

    def load(self, index):
        """Image (3, H, W) and label (H, W) of `index`, resized, not augmented."""
        return load_pair(self.pairs[index], self.size) if self.stored is None else self.stored[index]

    def __getitem__(self, key):
        epoch, number = key
        image, label = self.load(number % len(self))
        if self.augmented:
            image, label = augment(image, label, draw(self.seed, epoch, number), self.domain.void,
                                   self.padding)
        return image, label, number
