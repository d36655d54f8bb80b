"""Checkpoints: written atomically; read without running code from the file or trusting its content.

torch.load checks no checksums and believes what a file says about itself, so `read` checks first. Files in
torch's old format, which is not an archive, have no checksums: a changed number in them goes unnoticed.
"""
import io
import itertools
import math
import os
import pickletools
import struct
import warnings
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import torch

from mdil.datasets.domains import canonical
from mdil.datasets.own import is_color
from mdil.models.exported import SIDE, is_exported
from mdil.models.identify import are_statistics
from mdil.models.layouts import CLASSES, StateLayout, check_fit, describe, file_key, load, load_encoder, recognise
from mdil.models.methods import METHODS, build_model, get_method, method_name
from mdil.models.networks import DEFAULT, get_network
from mdil.utils.errors import UserError, brief
from mdil.utils.files import write_atomically

VERSION = 1

# The only globals a file of tensors needs. torch allows more, such as functions that fill any amount of memory.
NAMES = {'collections.OrderedDict', 'torch._utils._rebuild_tensor', 'torch._utils._rebuild_tensor_v2',
         'torch._utils._rebuild_parameter', 'torch.Size', 'numpy.core.multiarray.scalar',
         'numpy._core.multiarray.scalar', 'numpy.dtype', '_codecs.encode'}
NAMES |= {f'torch.{kind}Storage' for kind in ('Float', 'Double', 'Half', 'BFloat16', 'Long', 'Int', 'Short', 'Char',
                                              'Byte', 'Bool')}
# Type of a numpy scalar -> how struct reads it.
NUMBERS = {'f8': 'd', 'f4': 'f', 'f2': 'e', 'i8': 'q', 'i4': 'i', 'i2': 'h', 'i1': 'b', 'u1': 'B', 'b1': '?'}
# Keys under which other people's files hold their network.
STATES = 'state_dict', 'model_state_dict', 'model', 'net', 'network'
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


@dataclass
class Checkpoint:
    """A file's network and what is known about it. domains: names, or None if the file has none."""
    source: str
    found: StateLayout
    domains: list = None
    method: str = None
    content: dict = field(default_factory=dict, repr=False)


def check_stated(names, known, source):
    """UserError if `names`, from `--domains` or None, differ from `known`, the names in the file `source`."""
    stated = list(map(canonical, names or []))
    if stated and stated != known:
        raise UserError(f'--domains {" ".join(stated)} contradicts {source}, which knows {" ".join(known)}; '
                        'leave it out, or name those')


def stated_size(content):
    """The (height, width) at which a checkpoint says it was trained; None if it states none, or an impossible one."""
    options = content.get('options')
    sides = (options.get('height'), options.get('width')) if isinstance(options, dict) else ()
    return sides if sides and all(isinstance(side, int) and side > 0 and side % SIDE == 0 for side in sides) else None


def save(content, path, previous=None, best=None):
    """Writes a checkpoint dict to `path`, and first to `best` if given. Each file is replaced as a whole or not at all.

    previous: where the file that was at `path` is kept.
    """
    made = io.BytesIO()         # so that a full disk fails a plain write, with a clear error
    torch.save(content, made)
    if best is not None:
        write_atomically(best, lambda file: file.write(made.getbuffer()))
    write_atomically(path, lambda file: file.write(made.getbuffer()), previous)


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
        claimed = value.numel() * value.element_size() if isinstance(value, torch.Tensor) else 0
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


def not_finite(content):
    """Yields the names of tensors in a run's checkpoint that hold NaN or infinity."""
    for part in ('state_dict', 'teacher', 'optimizer'):
        for name, value in leaves(content[part]):
            if isinstance(value, torch.Tensor) and not value.isfinite().all():
                yield f'{part}.{name}'


def entry_name(name, key):
    """Name of the entry `key` of the dict called `name`, printable on one line; Refused for any other key."""
    if not (isinstance(key, int) or isinstance(key, str) and key.isprintable() and len(key) <= 200):
        raise Refused('the keys of its dicts are not names')
    return f'{name}.{key}'.lstrip('.')


def whole(value):
    """Whether `value` is an int that can be a count."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2 ** 31


def score(value):
    """Whether `value` is an mIoU: a number (numpy's and tensors too) from 0 to 100, or -inf before any validation."""
    if isinstance(value, torch.Tensor) and value.numel() != 1 or isinstance(value, (bool, str, bytes)):
        return False
    try:
        return 0 <= float(value) <= 100 or float(value) == -math.inf
    except (TypeError, ValueError, OverflowError):
        return False


def named_classes(value):
    """Whether `value` lists a network's domains as {name, classes}, with class_names or without."""
    return isinstance(value, list) and bool(value) and all(
        isinstance(entry, dict) and isinstance(entry.get('name'), str) and entry['name'].isprintable()
        and whole(entry.get('classes')) and described_classes(entry) for entry in value)


def described_classes(entry):
    """Whether `class_names` and `colors` of a domain's entry, if any, are those of every class but void."""
    parts = {'class_names': lambda name: isinstance(name, str), 'colors': is_color}
    return all(isinstance(entry[part], list) and len(entry[part]) == entry['classes'] - 1
               and all(map(fits, entry[part])) for part, fits in parts.items() if part in entry)


def plain_options(value):
    """Whether `value` is a dict of options: numbers, strings, None, and lists of them."""
    single = (str, int, float, type(None))
    return isinstance(value, dict) and all(isinstance(key, str) for key in value) and all(
        isinstance(item, single) or isinstance(item, list) and all(isinstance(part, single) for part in item)
        for item in value.values())


def sums(value):
    """Whether `value` is a dict of finite sums."""
    return isinstance(value, dict) and all(isinstance(part, float) and math.isfinite(part) for part in value.values())


# Entry of a checkpoint: (test of its value, what it must be).
KINDS = {'version': (whole, 'a whole number'), 'epoch': (whole, 'a whole number of epochs'),
         'batch': (whole, 'a whole number of batches'), 'totals': (sums, 'a dict of sums'),
         'domains': (named_classes, 'a list of {name, classes}'),
         'method': (lambda value: isinstance(value, str) and method_name(value) in METHODS,
                    'one of ' + ', '.join(METHODS)
                    + '; a method of your own is registered first: import its file, see docs/extending.md'),
         'domain_statistics': (are_statistics, 'what models.identify gives of each domain'),
         'best_acc': (score, 'an mIoU'), 'options': (plain_options, 'a dict of options')}
# Entries that files of earlier versions lack.
LATER = {'network': (lambda value: isinstance(value, str) and value.isprintable(), 'the name of a network')}


def check_kinds(content, path, kinds):
    """UserError if an entry of `content` fails its test in `kinds`, {name: (test, words)}; missing entries pass."""
    for name, (test, words) in kinds.items():
        if name in content and not test(content[name]):
            found = (f' (found {content[name]!r})'
                     if isinstance(content[name], str) and len(content[name]) <= 100 else '')
            raise UserError(f'{path}: its {name} is not {words}{found}')


def state_in(content, path):
    """{key: tensor} in what was read from `path`: `content` itself or an entry of it; UserError if there is none."""
    if not isinstance(content, dict):
        raise UserError(f'{path}: holds a {type(content).__name__}, a dict with state_dict is expected')
    if content.get('kind') == 'branch':
        raise UserError(f'{path} is a branch file, one domain without the shared weights; python -m mdil branches add '
                        'adds it to a checkpoint')
    name = next((name for name in STATES if isinstance(content.get(name), dict)), 'state_dict')
    state = content.get(name, content)
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) and isinstance(key, str)
                                              for key, value in state.items()):
        raise UserError(f'{path}: its {name} is not a dict of tensors')
    return state


def read_checkpoint(path):
    """The Checkpoint in a file of ours or a published one."""
    content = read(path)
    state = state_in(content, path)
    if state is not content:
        check_content(content, path)
    network = content.get('network', DEFAULT) if 'version' in content and state is not content else DEFAULT
    found = recognise(state, path) if network == DEFAULT else declared_layout(content, state, path)
    return Checkpoint(str(path), found, stated_domains(content, found, path), method_name(content.get('method')),
                      content)


def check_content(content, path):
    """UserError if an entry besides the state_dict is invalid; in foreign files, only entries that we use count."""
    if 'version' not in content:
        check_kinds(content, path, {name: KINDS[name] for name in ('domains', 'method', 'domain_statistics')})
        for name in ('epoch', 'best_acc', 'options'):       # of no use, but shown or kept
            if name in content and not KINDS[name][0](content[name]):
                del content[name]
        return
    check_kinds(content, path, {**KINDS, **LATER})
    if not 1 <= content['version'] <= VERSION:
        raise UserError(f'{path}: version {content["version"]}, this code reads up to {VERSION}')
    planned = content.get('options', {}).get('num_epochs')
    if planned is not None and not (whole(planned) and content.get('epoch', 0) <= planned):
        raise UserError(f'{path}: says {content.get("epoch", 0)} epochs are done of {planned}')


def declared_layout(content, state, path):
    """The StateLayout of a network other than ERFNet, from its entries; UserError if they are missing or wrong."""
    lacking = [name for name in ('domains', 'method') if name not in content]
    if lacking:
        raise UserError(f'{path}: damaged, it has no {lacking[0]}')
    name, counts, row = (content['network'], [entry['classes'] for entry in content['domains']],
                         get_method(content['method']))
    plain = build_plain(name, row, path)
    outputs = {layer: next(head for head in plain.heads if f'{layer}.'.startswith(f'{head}.'))
               for layer in plain.output_layers}
    for number, count in enumerate(counts):
        missing = [layer for layer, head in outputs.items() if file_key(f'{layer}.weight', head, number) not in state]
        if missing or count not in CLASSES:
            raise UserError(f'{path}: says {len(counts)} domains of {counts} classes, but that is not what it holds')
    norms = len(counts) if row.domain_bn else 1
    kind = f'{name}, {describe(counts, row.adapter, norms)}'
    return StateLayout(state, counts, row.adapter, norms, kind, network=name)


def build_plain(name, row, path):
    """The plain network `name` with a method row's adapters, without memory; UserError if it is not registered here."""
    try:
        with torch.device('meta'):
            return get_network(name).build(2, row.adapter)
    except UserError as error:
        raise UserError(f'{path}: unknown network: {error}. Register your own first, see '
                        'docs/networks.md') from None


def stated_domains(content, found, path):
    """Names of the domains in a file of ours, None if it states none; UserError if the class counts are not its own."""
    if 'domains' not in content or 'state_dict' not in content:
        return None
    counts = [entry['classes'] for entry in content['domains']]
    if counts != found.num_classes:
        raise UserError(f'{path}: says {counts} classes but its output layers have {found.num_classes}')
    return [entry['name'] for entry in content['domains']]


def check_known(checkpoint, domains):
    """UserError unless the checkpoint's domains are `domains` (Domain objects, in order)."""
    names = [domain.name for domain in domains]
    counts = [domain.num_classes for domain in domains]
    if checkpoint.domains is not None:
        known = list(map(canonical, checkpoint.domains))
        if known != names:
            raise UserError(f'{checkpoint.source} knows {", ".join(known)}, but should know {", ".join(names)}; name '
                            'its domains in its order (in training, before the one to learn), or choose another '
                            'checkpoint')
    if checkpoint.found.num_classes != counts:
        raise UserError(f'{checkpoint.source} holds {checkpoint.found.kind}, but {", ".join(names)} need '
                        f'{", ".join(map(str, counts))} classes, void included; name its domains in its order, with '
                        'the class lists that it was trained with')
    for entry, domain in zip(checkpoint.content.get('domains', []) if checkpoint.domains else [], domains):
        check_class_names(entry, domain, checkpoint.source)


def check_class_names(entry, domain, source):
    """UserError if `entry`, a domain in the checkpoint `source`, names a class differently from `domain`."""
    for number, (stated, name) in enumerate(zip(entry.get('class_names', []), domain.classes)):
        if stated != name:
            raise UserError(f'{source} was trained on {domain.name} with {stated!r} as class {number}, which is '
                            f'{name!r} here; use the class list that it was trained with')


def fitting_methods(found):
    """Names of the methods whose network, for the found domains, is the one found."""
    several = len(found.num_classes) > 1
    return [name for name, row in METHODS.items() if row.adapter == found.adapter
            and (not several or row.domain_bn == (found.batch_norms > 1)) and not (several and row.lonely)]


def check_method(found, method, source):
    """UserError unless what was found is a network of `method`."""
    if not found.num_classes:
        raise UserError(f'{source} holds only an encoder, no decoder')
    names = fitting_methods(found)
    if method not in names:
        raise UserError(f'{source} holds {found.kind}; that is not a network of --method {method} '
                        f'but of {", ".join(names) or "none"}')


def network_of(found, method, source):
    """The network of `method` with the found tensors loaded; UserError that names what does not fit."""
    method = method_name(method)
    check_method(found, method, source)
    with torch.device('meta'):      # takes no memory, whatever the file claims
        check_fit(build_model(found.num_classes, method, found.network).state_dict(), found, source)
    model = build_model(found.num_classes, method, found.network)
    load(model, found, source)
    return model


def method_of(checkpoint, method=None):
    """The method that a checkpoint states, or else `method`, or else the first whose network fits; None without one."""
    return checkpoint.method or method_name(method) or next(iter(fitting_methods(checkpoint.found)), None)


def load_network(checkpoint, method=None):
    """The network of a checkpoint, for its `method_of`; UserError also if it is no network of `method`."""
    if method:
        check_method(checkpoint.found, method_name(method), checkpoint.source)
    return network_of(checkpoint.found, method_of(checkpoint, method), checkpoint.source)


def start_from_encoder(model, checkpoint, batch_norms):
    """Loads an ImageNet encoder into `model`; returns the three lines that say what was loaded."""
    loaded, fresh = load_encoder(model, checkpoint.found, checkpoint.source, batch_norms)
    dropped = len(checkpoint.found.state) - len(loaded)
    return report(checkpoint, len(loaded), len(fresh), dropped)


def report(checkpoint, loaded, fresh, dropped=0):
    """Three lines: what was loaded, renamed and left fresh (with what the network did not use of the file)."""
    found = checkpoint.found
    unused = dropped + len(found.ignored)
    return (f'{checkpoint.source}: {found.kind}; {loaded} tensors loaded\n'
            f'  renamed: {found.renamed} (layouts of the published code)\n'
            f'  left fresh: {fresh} tensors of the network; not used of the file: {unused}'
            + (f', e.g. {found.ignored[0]}' if found.ignored else ''))
