"""What label counts and files show about a domain, besides damage: classes that never occur, void, shared files."""
import hashlib

from mdil.datasets.declaration import VOID_FILE_VALUE
from mdil.datasets.pairs import identity
from mdil.utils.errors import UserError

MOSTLY = 0.5        # share of void from which it is reported


def judge(domain, split, pixels):
    """(what makes a split unfit to train on, what is worth noting), lists of sentences; pixels (C,), void last."""
    absent = [name for name, count in zip(domain.classes, pixels) if not count] if split == 'train' else []
    void = pixels[-1] / max(1, sum(pixels))
    faults, remarks = [], []
    if split == 'train' and is_mask(domain, pixels):
        faults.append(mask_fault(domain, void))
    elif len(absent) == 1:
        remarks.append(f'class {absent[0]!r} occurs in no training image')
    elif absent:
        remarks.append(f'{len(absent)} of {len(domain.classes)} classes occur in no training image: '
                       + ', '.join(map(repr, absent)))
    if void == 1:
        faults.append(f'all {split} pixels are void')
    elif void >= MOSTLY:
        remarks.append(f'{100 * void:.0f} % of the {split} pixels are void')
    return faults, remarks


def is_mask(domain, pixels):
    """Whether the labels of a two-class domain hold nothing but the first class and void, which is 255."""
    values = domain.layouts[0].label_kinds[0].values
    return (len(pixels) == 3 and pixels[0] > 0 and pixels[1] == 0 and pixels[2] > 0
            and values.get(0) == 0 and values.get(VOID_FILE_VALUE) == 2)


def mask_fault(domain, void):
    """The message about labels that hold only 0 and 255."""
    first, second = domain.classes
    return (f'class {second!r} occurs in no image: the labels hold 0 and 255 alone, and 255 is void '
            f'({100 * void:.0f} % of the pixels); for masks of 0 and 255 domain.json states "values": '
            f'{{"0": "{first}", "255": "{second}"}}')


def shared_files(images, others):
    """The paths in `others` that are files in `images` too, under any name."""
    known = {identity(path) for path in images}
    return [path for path in others if identity(path) in known]


def copied_files(images, others):
    """[(path in `others`, path in `images` with the same content)]; reads only files of equal size."""
    def size(path):
        return path.stat().st_size
    sizes = set(map(size, images)) & set(map(size, others))
    known = {content_digest(path): path for path in images if size(path) in sizes}
    digests = [(path, content_digest(path)) for path in others if size(path) in sizes]
    return [(path, known[digest]) for path, digest in digests if digest in known]


def content_digest(path):
    """A digest of a file's content; UserError if it cannot be read."""
    try:
        return hashlib.blake2b(path.read_bytes(), digest_size=16).digest()
    except OSError as error:
        raise UserError(f'{path} cannot be read: {error.strerror}') from None
