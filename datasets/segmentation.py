"""Images with their labels, as uint8 tensors of one size."""
import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from datasets.augment import augment, draw
from datasets.pairs import find_split, report_unpaired
from utils.errors import UserError

BAD = 255       # marks label values that the domain does not have
# what Pillow raises for damaged files
UNREADABLE = (OSError, SyntaxError, ValueError, IndexError, EOFError, Image.DecompressionBombError)
CHECK_HINT = '; python -m datasets.check finds all such files'


def lookup_table(values):
    """uint8 (256,) table from a label file's values to class indices, BAD where there is none."""
    table = np.full(256, BAD, dtype=np.uint8)
    for value, index in values.items():
        table[value] = index
    return table


def open_image(path):
    """The image as RGB, at the file's own size."""
    try:
        return Image.open(path).convert('RGB')
    except UNREADABLE as error:
        raise UserError(f'{path} cannot be read: {error}') from None


def open_label(pair):
    """The label image of `pair`, 8-bit single channel, at the file's own size."""
    try:
        label = Image.open(pair.label)
        label.load()
    except UNREADABLE as error:
        raise UserError(f'{pair.label} cannot be read: {error}') from None
    if label.mode not in ('L', 'P'):
        raise UserError(f'{pair.label}: label image has mode {label.mode}, 8-bit single-channel is expected')
    return label


def open_pair(pair):
    """Image (RGB) and label (8-bit), of equal size."""
    image, label = open_image(pair.image), open_label(pair)
    if image.size != label.size:
        raise UserError(f'{pair.image} is {image.size[0]}x{image.size[1]} but its label {pair.label} '
                        f'is {label.size[0]}x{label.size[1]}')
    return image, label


def likely_cause(wrong, values):
    """Why a label image holds the label values `wrong`, which the mapping `values` lacks."""
    void = next(value for value, index in values.items() if index == max(values.values()))
    if list(wrong) in ([255], [len(values) - 1]):
        return f'void is {wrong[0]} where {void} is expected'
    if max(wrong) < 34 and len(values) == 20:
        return 'labelIds where trainIds are expected'
    if max(wrong) < 40:
        return 'ids of another kind, label ids or those of another level?'
    return 'grey levels or palette of a colour image, or labels resized with interpolation?'


def to_classes(label, pair):
    """Label values (H, W) uint8 -> class indices; UserError naming the file if one is out of range."""
    classes = lookup_table(pair.values)[label]
    if (classes == BAD).any():
        wrong = np.unique(label[classes == BAD])
        raise UserError(f'{pair.label}: label values {wrong[:8].tolist()} are not in the class list '
                        f'({likely_cause(wrong, pair.values)}){CHECK_HINT}')
    return classes


class SegmentationDataset(Dataset):
    """A domain's split, resized to (height, width).

    Indexed by (epoch, number); gives image (3, H, W) uint8, label (H, W) uint8 class
    indices (void = domain.void), and the image's index, number % len. Images are
    resized bilinearly, labels by nearest neighbour, as published. With `augmented`,
    flip and shift are drawn from (seed, epoch, number).
    """

    def __init__(self, domain, root, split, size, augmented=False, seed=0):
        self.domain, self.size, self.augmented, self.seed = domain, size, augmented, seed
        found = find_split(domain, root, split)
        report_unpaired(domain, split, found)
        self.pairs = found.pairs

    def __len__(self):
        return len(self.pairs)

    def load(self, index):
        """Image (3, H, W) and label (H, W) of `index`, resized, not augmented."""
        pair = self.pairs[index]
        image, label = open_pair(pair)
        width_height = self.size[::-1]
        image = np.asarray(image.resize(width_height, Image.BILINEAR))
        label = to_classes(np.asarray(label.resize(width_height, Image.NEAREST)), pair)
        return torch.from_numpy(image.transpose(2, 0, 1).copy()), torch.from_numpy(label)

    def __getitem__(self, key):
        epoch, number = key
        index = number % len(self)
        image, label = self.load(index)
        if self.augmented:
            image, label = augment(image, label, draw(self.seed, epoch, number), self.domain.void)
        return image, label, index
