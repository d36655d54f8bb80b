"""The inputs of predict.py: images, folders of images, list files and videos, with one Item for each image."""
import math
import os
import struct
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Callable

from PIL import ImageOps

from mdil.datasets import declaration
from mdil.datasets.pairs import files_below
from mdil.datasets.segmentation import open_image
from mdil.utils.errors import UserError, brief

IMAGES = (*declaration.IMAGES, '.ppm')
VIDEOS = ('.mp4', '.avi', '.mov', '.mkv', '.webm', '.m4v', '.mpg', '.mpeg')
LISTS = ('.txt', '.lst')
KINDS = 'an image, a folder, a list of images (.txt) or a video'


@dataclass(frozen=True)
class Source:
    """A file to read. name: its path below the input, without suffix; result files get this name."""
    path: Path
    name: str

    @property
    def is_video(self):
        return self.path.suffix.lower() in VIDEOS


@dataclass(frozen=True)
class Item:
    """One image. key: its name in JSON; name: as `Source.name`; load: returns it as RGB, or raises UserError.

    video: path of the video if it is a frame of one, else None.
    """
    key: str
    name: str
    load: Callable
    video: Path = None


def find_sources(inputs, out=None):
    """The Sources of the paths `inputs`, in order, without files in the folder `out`; UserError if there are none."""
    found = [source for path in map(Path, inputs) for source in sources_of(path, out)]
    if not found:
        raise UserError(f'no images in {", ".join(map(str, inputs))}; only files that end in {" ".join(IMAGES)} '
                        'are read, hidden ones are not')
    return found


def images_in(path):
    """The Sources of the images in a folder, or of another input, in order; UserError if there are none."""
    found = [source for source in find_sources([path]) if not source.is_video]
    if not found:
        raise UserError(f'no images in {path}, only videos')
    return found


def sources_of(path, out):
    """The Sources of one input (see `find_sources`); UserError if it is missing or of another kind."""
    if os.path.isdir(path):     # False, unlike path.is_dir, where one may not look
        return [named(file, path) for file in media_below(path, out)]
    check_file(path)
    suffix = path.suffix.lower()
    if suffix in LISTS:
        return listed(path)
    if suffix not in IMAGES + VIDEOS:
        raise UserError(f'{path}: {KINDS} is expected')
    return [named(path, path.parent)]


def check_file(path):
    """UserError unless `path` is a regular file; reading a pipe could wait forever."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f'{path} does not exist') from None
    except OSError as error:
        raise UserError(f'{path} cannot be read: {error.strerror}') from None
    if not os.path.isfile(path):
        raise UserError(f'{path} is not a file; {KINDS} is expected')


def named(path, folder):
    """The Source of a file, named by its path relative to a folder."""
    return Source(path, Path(os.path.relpath(path, folder)).with_suffix('').as_posix())


def media_below(folder, out):
    """Images and videos below a folder, sorted, without hidden files and folders and without the folder `out`."""
    return sorted(path for path in files_below(folder, out) if path.suffix.lower() in IMAGES + VIDEOS)


def listed(path):
    """The Sources of a list file: one path per line, relative to the folder of the list."""
    try:
        text = path.read_text(encoding='utf-8-sig', errors='surrogateescape')
    except OSError as error:
        raise UserError(f'{path} cannot be read: {error.strerror}') from None
    lines = (line.strip(' \t') for line in text.split('\n'))     # splitlines would split at signs that names may hold
    files = [path.parent / line for line in lines if line]
    for file in files:
        if file.suffix.lower() not in IMAGES + VIDEOS:
            raise UserError(f'{path}: {file} is not an image or a video')
        if not os.path.isfile(file):
            raise UserError(f'{path}: {file} does not exist; lines are relative to the folder of the list')
    files = [Path(os.path.abspath(file)) for file in files]
    folder = Path(os.path.abspath(path.parent))
    if any(folder not in file.parents for file in files):
        folder = os.path.commonpath([file.parent for file in files])
    return [named(file, folder) for file in files]


def items_of(source):
    """Yields the Items of a Source; the frames of a video in order."""
    if source.is_video:
        yield from frames_of(source)
    else:
        yield Item(str(source.path), source.name, partial(upright, source.path))


def upright(path):
    """The image at `path` as RGB, rotated as its EXIF data says; as it is stored if that data is broken."""
    image = open_image(path)
    try:
        return ImageOps.exif_transpose(image)
    except Exception:       # Pillow raises errors of many kinds on broken EXIF data
        return image


def rotation(frame):
    """Degrees counter-clockwise by which a video's frame is shown, as phones store it; 0 if it is mirrored, too."""
    matrix = frame.side_data.get('DISPLAYMATRIX')
    a, b, _, c, d = struct.unpack_from('=5i', bytes(matrix)) if matrix else (1, 0, 0, 0, 1)
    return -round(math.degrees(math.atan2(b, a))) if a * d > b * c else 0


def frames_of(source):
    """Yields an Item for each frame of a video and, where it is damaged, a last one whose `load` raises; needs av."""
    import av
    try:
        with av.open(str(source.path)) as container:
            for number, frame in enumerate(container.decode(video=0)):
                image = frame.to_image().rotate(rotation(frame), expand=True)
                yield Item(f'{source.path}/{number:06d}', f'{source.name}/{number:06d}', lambda image=image: image,
                           source.path)
    except (av.FFmpegError, IndexError) as error:
        reason = f'{source.path} cannot be read as a video: {brief(error)}'
        yield Item(str(source.path), source.name, partial(refuse, reason), source.path)


def refuse(reason):
    """Raises UserError."""
    raise UserError(reason)
