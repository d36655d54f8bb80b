"""Training a domain from other programs: `mdil.learn`."""
import colorsys
import contextlib
import json
import os
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from mdil.datasets.domains import domain_names
from mdil.datasets.own import Wrong, check_domain_name, read_classes
from mdil.api import PATH, as_arguments, check_pair, data_folders, expanded, expect
from mdil.models import get_method
from mdil.models.checkpoint import read_checkpoint
from mdil.train import learn_step
from mdil.training.options import parse_train
from mdil.training.records import best_and_last, mean_miou, read_metrics
from mdil.training.resume import LOCK
from mdil.training.run import BEST, LATEST, WRITTEN, check_kept, results_in
from mdil.utils.errors import UserError
from mdil.utils.files import new_folder, write_atomically
from mdil.utils.parser import flag
from mdil.utils.workers import INTERRUPTED


@dataclass(frozen=True)
class Record:
    """The result of a run: its folder, names of the domains it trained, its lines of metrics.jsonl, one per epoch."""
    folder: Path
    trained: tuple
    epochs: tuple

    @property
    def best(self):
        """Path of the checkpoint of the best epoch."""
        return self.folder / BEST

    @property
    def latest(self):
        """Path of the checkpoint of the last epoch."""
        return self.folder / LATEST

    @property
    def miou(self):
        """Mean IoU in percent of the best epoch, averaged over the trained domains; None if nothing was validated."""
        line, _ = best_and_last(self.epochs, self.trained)
        return line and mean_miou(line, self.trained)


@dataclass(frozen=True)
class Watcher:
    """Calls `function` with the record of each epoch."""
    function: object

    def show(self, line, run):
        self.function(line)


def learn(domain, train=None, val=None, *, savedir, state=None, classes=None, on_epoch=None, **options):
    """Learns a domain after those that the checkpoint `state` knows; returns the Record of the run.

    domain: the name of a built-in domain, or of your own.
    train, val: [(image, label), ...], paths. Without them, files are found as in train.py (options
        `data_root` and `data`, a dict {name: path}). Label files of a built-in domain hold the same values
        as its own.
    classes: for a domain of your own given by pairs: class names in the order of the label values 0, 1, ...
        (255 is void), or {name: (R, G, B)}.
    savedir: receives checkpoints and records as in train.py.
    on_epoch: called after each epoch with its record, {'epoch', 'train': {'loss', ...}, 'val': {name:
        {'loss', 'miou'}}, 'lr'}. An exception it raises ends the run, which `resume=True` continues.
    options: those of train.py with _ for -, such as num_epochs=20, height=256, method='fine-tune'. True
        sets an option without a value; False and None leave an option out. `domains` names all domains, in
        order, if `state` does not name those it knows.

    Lists of pairs are also written to savedir, with `DOMAIN.json`. Later steps need it only to validate the
    domain: data={'DOMAIN': 'savedir/DOMAIN.json'}. If the call fails before the run has a result, the lists
    are removed again. In the main thread, a signal makes the run save and raise KeyboardInterrupt; in other
    threads, signals are left alone. The random states of Python, NumPy and torch are restored afterwards.
    Raises `mdil.UserError` for invalid input, TypeError for arguments of the wrong type.

        >>> record = mdil.learn('cityscapes', data_root='DATA', savedir='runs/1', num_epochs=1, height=16, device='cpu')
        learning cityscapes (mdil, erfnet) at 32x16 on cpu: ...
        >>> len(record.epochs), record.best.name
        (1, 'model_best.pth.tar')
    """
    check_types(domain, train, val, savedir, state, on_epoch, options)
    if 'help' in options:       # argparse would print it and end the program
        raise UserError('help is not an option of mdil.learn; python train.py --help lists them')
    folder, data = expanded('savedir', savedir), dict(options.pop('data', None) or {})
    state = None if state is None else expanded('state', state)
    with as_arguments(), new_folder('--savedir', folder, [LOCK]), taken_back(folder, domain):
        check_kept(SimpleNamespace(savedir=folder, state=state, resume=options.get('resume'),
                                   overwrite=options.get('overwrite')))
        if train is not None:
            pairs = {split: found for split, found in (('train', train), ('val', val)) if found is not None}
            data[domain] = declare(domain, pairs, classes, folder, options.get('overwrite'))
        elif val is not None or classes is not None:
            raise UserError('val and classes need train, a list of pairs; without it, all three come from data')
        names = options.pop('domains', None) or [*known_domains(state), domain]
        words = arguments({**options, 'savedir': folder, 'state': state, 'domains': names,
                           'data': [f'{name}={path}' for name, path in data.items()]})
        parsed = parse_train(words)
        with kept_random(), as_interrupt():
            learn_step(parsed, [Watcher(on_epoch)] if on_epoch else [])
    return Record(folder, tuple(get_method(parsed.method).trained(parsed.domains)), tuple(read_metrics(folder)))


def check_types(domain, train, val, savedir, state, on_epoch, options):
    """TypeError if an argument of `learn` is of the wrong type."""
    expect('domain', domain, str, 'a name')
    for name, pairs in (('train', train), ('val', val)):
        expect(name, pairs, (Iterable, type(None)), 'a list of pairs')
    expect('savedir', savedir, PATH, 'a path')
    expect('state', state, (*PATH, type(None)), 'a path')
    expect('on_epoch', on_epoch, (Callable, type(None)), 'a function')
    expect('domains', options.get('domains'), (list, tuple, type(None)), 'a list of names')
    data_folders(options.get('data'))


@contextlib.contextmanager
def taken_back(folder, name):
    """Removes the files that `declare` made for the domain `name` if an error leaves no result in `folder`."""
    files = {folder / f'{name}{ending}' for ending in ('.train.txt', '.val.txt', '.json')}
    made = {path for path in files if not os.path.lexists(path)}
    try:
        yield
    except BaseException:
        for path in made if not results_in(folder) else ():
            with contextlib.suppress(OSError):
                path.unlink()
        raise


@contextlib.contextmanager
def as_interrupt():
    """Turns the SystemExit of a run that a signal stopped into KeyboardInterrupt: the calling program does not end."""
    try:
        yield
    except SystemExit as end:
        if end.code != INTERRUPTED:
            raise
        raise KeyboardInterrupt('a signal stopped the run; resume=True continues from what is saved') from None


def declare(name, pairs, classes, folder, overwrite=False):
    """Writes a domain's pairs {split: [(image, label), ...]} to `folder` as lists; returns the path of their JSON file.

    classes: as for `learn`. UserError if they are missing or not allowed, and if existing files differ,
        unless `overwrite`.
    """
    built_in = domain_names().get(name.lower())
    if built_in and classes is not None:
        raise UserError(f'{built_in} is built in and has its own classes; leave out classes, or choose another name')
    if not built_in and not classes:
        raise UserError(f'{name!r} is not built in: pass classes, the names of its classes in the order of the label '
                        'values')
    if f'{name}.json' in WRITTEN:
        raise UserError(f'{name!r} cannot be the name of a domain here: its lists would be called like {name}.json, '
                        'which runs write; choose another name')
    try:
        check_domain_name(name)
    except Wrong as error:
        raise UserError(str(error)) from None
    spec = {} if built_in else {'classes': described(classes)}
    for split, found in pairs.items():
        spec[split] = f'{name}.{split}.txt'
        write_bytes(folder / spec[split], os.fsencode(''.join(map(listed, found))), overwrite)
    write_bytes(folder / f'{name}.json', json.dumps(spec, indent=2).encode(), overwrite)
    return folder / f'{name}.json'


def described(classes):
    """The classes as in domain.json; classes without colours get hues that are far apart."""
    if not isinstance(classes, dict):
        if not isinstance(classes, (list, tuple)):
            raise UserError(f'classes is {classes!r}; give a list of names in the order of the label values, or a dict '
                            'of names and colours')
        hues = (0.618 * number % 1 for number in range(len(classes)))
        colors = ([round(255 * part) for part in colorsys.hsv_to_rgb(hue, 0.6, 0.9)] for hue in hues)
        named = zip(classes, colors)
    else:
        named = classes.items()
    entries = [{'name': name, 'color': list(color) if isinstance(color, Iterable) else color} for name, color in named]
    try:
        read_classes({'classes': entries})
    except Wrong as error:
        raise UserError(f'classes: {error}') from None
    return entries


def listed(pair):
    """The line for a pair (image, label) in a list file; UserError for paths that a list cannot hold."""
    check_pair(pair)
    line = '\t'.join(str(Path(path).absolute()) for path in pair)
    if line.count('\t') != 1 or len(line.splitlines()) != 1 or line != line.strip():
        raise UserError(f'{line}: a list cannot hold such names; rename the file')
    return line + '\n'


def write_bytes(path, content, overwrite):
    """Writes a file atomically; UserError if it exists with other content, unless `overwrite`."""
    if not overwrite and path.exists() and path.read_bytes() != content:
        raise UserError(f'{path} exists with other pairs or classes; pass those, use another savedir, or '
                        'replace it with overwrite=True')
    write_atomically(path, lambda file: file.write(content))


def known_domains(state):
    """Names of the domains in the checkpoint `state`, [] without one; UserError if it does not name them."""
    checkpoint = state and read_checkpoint(state)
    if checkpoint and checkpoint.layout.num_classes and checkpoint.domains is None:
        raise UserError(f'{state} holds {checkpoint.layout.kind} but no domain names; pass domains=[...], all in order')
    return checkpoint and checkpoint.domains or []


def arguments(options):
    """The command-line arguments for a dict of options; False and None leave an option out."""
    words = []
    for name, value in options.items():
        option = flag(name)
        if name == 'data':
            words += [f'{option}={item}' for item in value]
        elif isinstance(value, (list, tuple)):
            words += [option, *map(str, value)]
        elif value is not None and value is not False:
            words.append(option if value is True else f'{option}={value}')
    return words


@contextlib.contextmanager
def kept_random():
    """Restores the random states of Python, NumPy and torch afterwards."""
    plain, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count()) or None):     # all, without a warning
            yield
    finally:
        random.setstate(plain)
        np.random.set_state(numpy)
