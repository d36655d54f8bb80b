"""The parts of a domain's declaration: where its files are, what label values mean, its classes."""
from dataclasses import dataclass, field
from typing import Optional

VOID_FILE_VALUE = 255
IMAGES = ('.png', '.jpg', '.jpeg', '.tif', '.tiff', '.webp', '.bmp')
MASKS = ('.png', '.tif', '.tiff', '.bmp')


@dataclass(frozen=True)
class Labels:
    """One way to store labels: a file-name suffix and {label value: class index}.

    values: maps values in the file to class indices, void being the last. Any other value is an error.
    by_color: whether the values are colours, each as the number 0xRRGGBB.
    """
    suffix: str
    values: dict = field(hash=False)
    by_color: bool = False


@dataclass(frozen=True)
class Layout:
    """Where images and labels of a split are under the domain's folder.

    An image and a label belong together if their paths below `images` and `labels`, without suffix, are
    equal. Suffixes match regardless of case. Of several label suffixes, the first that exists is used.

    lists: {split: file that lists the pairs}, used instead of the folders.
    """
    images: str
    image_suffixes: tuple
    labels: str
    label_kinds: tuple
    lists: dict = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Domain:
    """A data set. `classes` excludes void, whose index follows the last class."""
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

    @property
    def entry(self):
        """Its entry in a checkpoint, in built-in types."""
        return {'name': self.name, 'classes': self.num_classes, 'class_names': list(self.classes),
                'colors': [list(color) for color in self.colors]}


def train_ids(count, void=VOID_FILE_VALUE):
    """{label value: class index}: values 0 to count - 1 are the classes, `void` is void."""
    return {**{value: value for value in range(count)}, void: count}
