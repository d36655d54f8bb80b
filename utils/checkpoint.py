"""Checkpoints: written atomically, read without running code from the file."""
import os
import pickle
import re
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from datasets.domains import domain_names
from models.layouts import Found, fitting_methods, load_encoder, network_of, recognise
from models.methods import METHODS
from utils.errors import UserError

VERSION = 1

# What old files hold beside tensors: numpy scalars such as best_acc, under either module name.
NUMPY_SCALARS = [(np.float64(0).__reduce__()[0], name)
                 for name in ('numpy.core.multiarray.scalar', 'numpy._core.multiarray.scalar')]
NUMPY_SCALARS += [np.dtype, type(np.dtype('f8')), type(np.dtype('f4')), type(np.dtype('i8'))]


@dataclass
class Checkpoint:
    """A file's network and what is known about it. domains: names, or None if the file has none."""
    source: str
    found: Found
    domains: list = None
    method: str = None
    content: dict = field(default_factory=dict, repr=False)


def write_atomically(path, write, previous=None):
    """Calls write(file) on a new binary file that takes the place of `path` once complete.

    previous: where the file that was at `path` goes instead of vanishing. UserError if
    the disk does not take it; `path` is then as it was.
    """
    path = Path(path)
    temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    try:
        with open(temporary, 'wb') as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:    # torch.save reports a full disk as RuntimeError
        raise UserError(f'{path} could not be written ({" ".join(str(error).split())[:150]}); what was there before '
                        'is kept') from None
    finally:
        temporary.unlink(missing_ok=True)


def save(content, path, previous=None):
    """Writes a checkpoint dict; the file at `path` is the old one or the new one, never a part."""
    write_atomically(path, lambda file: torch.save(content, file), previous)


def read(path):
    """The object in a checkpoint file, tensors on the CPU; UserError if it cannot be read safely."""
    path = Path(path)
    if not path.exists():
        raise UserError(f'{path} does not exist')
    if not path.is_file():
        raise UserError(f'{path} is not a file')
    try:
        with torch.serialization.safe_globals(NUMPY_SCALARS):
            return torch.load(path, map_location='cpu', weights_only=True)
    except pickle.UnpicklingError as error:
        forbidden = re.search(r'GLOBAL ([\w.]+)', str(error))
        reason = f'it names {forbidden.group(1)}, which could run code' if forbidden else \
            f'{" ".join(str(error.__context__ or error).split())[:200]}'
        raise UserError(f'{path}: refused, it is not a plain file of tensors ({reason})') from None
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, TypeError, IndexError, AttributeError,
            OverflowError, MemoryError, AssertionError, zipfile.BadZipFile) as error:
        reason = ' '.join(str(error).split())
        raise UserError(f'{path}: damaged or no checkpoint ({type(error).__name__}: {reason[:200]})') from None


def read_checkpoint(path):
    """The Checkpoint in a file of ours or a published one."""
    content = read(path)
    if not isinstance(content, dict):
        raise UserError(f'{path}: holds a {type(content).__name__}, a dict with state_dict is expected')
    state = content.get('state_dict', content)
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) and isinstance(key, str)
                                              for key, value in state.items()):
        raise UserError(f'{path}: its state_dict is not a dict of tensors')
    if not isinstance(content.get('version', VERSION), int) or content.get('version', VERSION) > VERSION:
        raise UserError(f'{path}: version {content["version"]}, this code reads up to {VERSION}')
    found = recognise(state, path)
    domains, method = stated_domains(content, found, path), content.get('method')
    if method is not None and method not in METHODS:
        raise UserError(f'{path}: made by an unknown method {method!r}')
    return Checkpoint(str(path), found, domains, method, content)


def stated_domains(content, found, path):
    """Names of the domains in a file of ours, None for one that has none."""
    entries = content.get('domains')
    if entries is None:
        return None
    try:
        names, counts = [str(e['name']) for e in entries], [int(e['classes']) for e in entries]
    except (TypeError, KeyError, ValueError):
        raise UserError(f'{path}: its domains are not a list of {{name, classes}}') from None
    if counts != found.num_classes:
        raise UserError(f'{path}: says {counts} classes but its output layers have {found.num_classes}')
    return names


def check_known(checkpoint, domains):
    """Refuses a checkpoint whose domains are not `domains` (Domain objects, in order)."""
    names = [domain.name for domain in domains]
    counts = [domain.num_classes for domain in domains]
    if checkpoint.domains is not None:
        canonical = [domain_names().get(name.lower(), name) for name in checkpoint.domains]
        if canonical != names:
            raise UserError(f'{checkpoint.source} knows {", ".join(canonical)}, but the domains to know are '
                            f'{", ".join(names)}')
    if checkpoint.found.num_classes != counts:
        raise UserError(f'{checkpoint.source} holds {checkpoint.found.kind}, but {", ".join(names)} need '
                        f'{", ".join(map(str, counts))} classes')


def load_network(checkpoint, method=None):
    """The network of a checkpoint, that of `method` (default: as stated, else the first that fits)."""
    method = method or checkpoint.method or next(iter(fitting_methods(checkpoint.found)), None)
    if not checkpoint.found.num_classes:
        raise UserError(f'{checkpoint.source} holds an encoder alone, no decoder')
    return network_of(checkpoint.found, method, checkpoint.source)


def start_from_encoder(model, checkpoint, batch_norms):
    """Loads an ImageNet encoder into `model`; returns the three lines that say what happened."""
    loaded, fresh = load_encoder(model, checkpoint.found, checkpoint.source, batch_norms)
    dropped = len(checkpoint.found.state) - len(loaded)
    return report(checkpoint, len(loaded), len(fresh), dropped)


def report(checkpoint, loaded, fresh, dropped=0):
    """Three lines: loaded, renamed, left fresh (and what of the file was not used)."""
    found = checkpoint.found
    unused = dropped + len(found.ignored)
    return (f'{checkpoint.source}: {found.kind}; {loaded} tensors loaded\n'
            f'  renamed: {found.renamed} (layouts of the published code)\n'
            f'  left fresh: {fresh} tensors of the network; not used of the file: {unused}'
            + (f', e.g. {found.ignored[0]}' if found.ignored else ''))
