"""Reads a checkpoint file without running code from it or trusting its content.

torch.load checks no checksums and believes what a file says about itself, so `read` checks first. Files in
torch's old format, which is not an archive, have no checksums: a changed number in them goes unnoticed.
"""
import itertools
import os
import pickletools
import struct
import warnings
import zipfile
from pathlib import Path

import torch

from mdil.models.exported import is_exported
from mdil.utils.errors import UserError, brief

# The only globals a file of tensors needs. torch allows more, such as functions that fill any amount of memory.
NAMES = {'collections.OrderedDict', 'torch._utils._rebuild_tensor', 'torch._utils._rebuild_tensor_v2',
         'torch._utils._rebuild_parameter', 'torch.Size', 'numpy.core.multiarray.scalar',
         'numpy._core.multiarray.scalar', 'numpy.dtype', '_codecs.encode'}
NAMES |= {f'torch.{kind}Storage' for kind in ('Float', 'Double', 'Half', 'BFloat16', 'Long', 'Int', 'Short', 'Char',
                                              'Byte', 'Bool')}
# Type of a numpy scalar -> how struct reads it.
NUMBERS = {'f8': 'd', 'f4': 'f', 'f2': 'e', 'i8': 'q', 'i4': 'i', 'i2': 'h', 'i1': 'b', 'u1': 'B', 'b1': '?'}
SHORT = 64      # longest text that may stand for bytes, which pickle protocol 2 writes as text
ARCHIVE, PICKLE = b'PK\x03\x04', b'\x80'      # first bytes of the new and the old format
OLD_PICKLES = 5         # a file in the old format: five pickles, then the numbers
ENCODE = '_codecs.encode'
DEEPEST, MOST = 8, 10 ** 5      # nesting levels and objects, more than any checkpoint has


class NumberType:
    """Stands in for numpy.dtype in old files, which hold numpy scalars such as best_acc among tensors."""

    def __init__(self, code, *_):
        if code not in NUMBERS:
            raise ValueError(f'a scalar of type {str(code)[:20]!r}')
        self.form = NUMBERS[code]

    def __setstate__(self, state):
        self.form = ('>' if state[1] == '>' else '<') + self.form


def number(kind, content):
    """The number in `content`, bytes of a NumberType. Replaces numpy's `scalar`, which takes bytes of any length."""
    return struct.unpack(kind.form, content)[0]


class Refused(Exception):
    """What is wrong with a file's content, in words; `read` adds the file's name."""


def read(path):
    """The object in a checkpoint file, tensors on the CPU; UserError if it cannot be read safely."""
    path = Path(path)
    if not os.path.lexists(path):
        raise UserError(f'{path} does not exist')
    if not os.path.isfile(path):
        raise UserError(f'{path} is a folder; name a file in it, such as model_best.pth.tar' if os.path.isdir(path) else
                        f'{path} is not a file')
    if is_exported(path):
        raise UserError(f'{path}: an exported network, which only predict.py takes')
    try:
        with open(path, 'rb') as file:
            return read_from(file)
    except Refused as error:
        raise UserError(f'{path}: refused, {error}') from None
    except Exception as error:      # zipfile, pickle and torch may raise anything on a damaged file
        raise UserError(f'{path}: damaged or not a checkpoint ({type(error).__name__}: {brief(error, 200)})') from None


def read_from(file):
    """Loads an open file with torch.load, once its format is checked; then checks the content's size and nesting."""
    size, head = os.fstat(file.fileno()).st_size, file.read(len(ARCHIVE))
    file.seek(0)
    if head == ARCHIVE:
        pickles = checked_pickles(file, size)
    elif head.startswith(PICKLE):
        pickles = itertools.repeat(file, OLD_PICKLES)
    else:
        raise ValueError('it begins like no file of torch.save')
    for pickled in pickles:
        unknown = set(named_in(pickled)) - NAMES
        if unknown:
            raise Refused(f'it is not a plain file of tensors (it names {min(unknown)[:100]!r}, which could run code)')
    file.seek(0)
    stand_ins = [(NumberType, 'numpy.dtype'), *((number, name) for name in NAMES if name.endswith('multiarray.scalar'))]
    with torch.serialization.safe_globals(stand_ins), warnings.catch_warnings():
        warnings.simplefilter('ignore')     # torch warns about odd pickles
        content = torch.load(file, map_location='cpu', weights_only=True)
    if head != ARCHIVE and file.tell() != size:
        raise ValueError(f'it ends after {file.tell()} of {size} bytes')
    check_plain(content, size)
    return content


def checked_pickles(file, size):
    """The pickles in an archive of `size` bytes; BadZipFile unless its entries are whole and match their checksums."""
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        total = sum(entry.file_size for entry in entries)
        if any(entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size
               for entry in entries):
            raise zipfile.BadZipFile('its entries are compressed, which torch.save never does')
        if total > size:
            raise zipfile.BadZipFile(f'its entries claim {total} bytes, the file has {size}')
        if len(set(archive.namelist())) < len(entries) or archive.comment:
            raise zipfile.BadZipFile('it has a comment or two entries of one name, which torch.save never writes')
        # Of two concatenated archives, the end of the file describes the second, but torch reads the first.
        if min((entry.header_offset for entry in entries), default=0):
            raise zipfile.BadZipFile('something precedes its first entry; are these two files in one?')
        broken = archive.testzip()
        if broken is not None:
            raise zipfile.BadZipFile(f'{broken} does not match its checksum')
        return [archive.read(entry) for entry in entries if entry.filename.endswith('.pkl')]


def named_in(pickled):
    """Yields the names of globals in a pickle (bytes, or a file at its start) without running any of it.

    Refused if _codecs.encode, which makes bytes from text, gets anything but a short text.
    """
    strings, memo, last = ['', ''], {}, None
    for opcode, argument, _ in pickletools.genops(pickled):
        if opcode.name in ('PUT', 'BINPUT', 'LONG_BINPUT'):
            memo[argument] = last
        elif opcode.name == 'MEMOIZE':
            memo[len(memo)] = last
        elif opcode.name != 'MARK':
            given = memo.get(argument) if opcode.name in ('GET', 'BINGET', 'LONG_BINGET') else argument
            if isinstance(last, Name) and last == ENCODE and not (isinstance(given, str) and len(given) <= SHORT):
                raise Refused(f'it gives {ENCODE} more than a short text')
            if opcode.name in ('GLOBAL', 'INST'):
                given = Name(argument.replace(' ', '.'))
            elif opcode.name == 'STACK_GLOBAL':
                given = Name('.'.join(strings[-2:]))
            elif isinstance(given, str) and not isinstance(given, Name):
                strings = [strings[-1], given]
            if isinstance(given, Name):
                yield given
            last = given


class Name(str):
    """The name of a global, as opposed to a string in the file."""


def check_plain(content, size):
    """Refused if a tensor in `content` claims more than the file's `size` in bytes. Tensors may share storage."""
    for name, value in leaves(content):
        claimed = value.nbytes if isinstance(value, torch.Tensor) else 0
        if claimed > size:
            raise Refused(f'its tensors claim {claimed} bytes ({name}), the file has {size}')


def leaves(content):
    """Yields (name, value) of every leaf of nested dicts, lists and tuples; Refused for what no checkpoint has."""
    level, count = [('', content)], 0
    for _ in range(DEEPEST):
        below = []
        for name, value in level:
            if not isinstance(value, (dict, list, tuple)):
                yield name, value
                continue
            count += len(value)
            if count > MOST or getattr(value, '__dict__', {}).keys() - {'_metadata'}:
                raise Refused('it is not a plain dict of tensors')
            items = dict.items(value) if isinstance(value, dict) else enumerate(value)
            below.extend((entry_name(name, key), item) for key, item in items)
        level = below
    if level:
        raise Refused('its dicts are nested too deep')


def entry_name(name, key):
    """Name of the entry `key` of the dict called `name`, printable on one line; Refused for any other key."""
    if not (isinstance(key, int) or isinstance(key, str) and key.isprintable() and len(key) <= 200):
        raise Refused('the keys of its dicts are not names')
    return f'{name}.{key}'.lstrip('.')
