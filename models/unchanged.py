"""What a step changed in old domains, found by comparing digests, and the record that a run keeps of it.

The record, `unchanged.json`, is next to the run's checkpoint: {"version": 1, "state": the file that the
step started from, "domains": [old domains, in order], "tensors": {name in our files: digest before the
step}, "after": {domain: what moved, in words} once the step has ended}.
"""
import json
from dataclasses import dataclass
from pathlib import Path

from mdil.models.fingerprint import COUNTER, is_buffer, tensor_digests
from mdil.utils.errors import UserError
from mdil.utils.files import write_json

NAME, VERSION = 'unchanged.json', 1


@dataclass(frozen=True)
class TensorChanges:
    """Names of the tensors that differ, and how many tensors of each kind there are in all."""
    parameters: tuple
    buffers: tuple
    all_parameters: int
    all_buffers: int

    def __bool__(self):
        return bool(self.parameters or self.buffers)

    def __str__(self):
        if not self:
            return f'{self.all_parameters} weight tensors and {self.all_buffers} buffers equal'
        norms = len({name.rpartition('.')[0] for name in self.buffers})
        buffers = f'{len(self.buffers)} buffers of {norms} batch norms, ' if norms else ''
        return f'{buffers}{len(self.parameters)} of {self.all_parameters} weight tensors changed'


def compare(old, new, source):
    """The TensorChanges between two {name: digest} of one domain; UserError, naming `source`, if their names differ.

    Only batch counters, which early files lack, may be missing from one of them.
    """
    odd = sorted(name for name in old.keys() ^ new.keys() if not name.endswith(COUNTER))
    if odd:
        raise UserError(f'{source}: cannot be compared, {odd[0]} is in one of the networks only '
                        f'({len(odd)} such tensors)')
    both = sorted(old.keys() & new.keys())
    moved = [name for name in both if old[name] != new[name]]
    buffers = sum(map(is_buffer, both))
    return TensorChanges(tuple(name for name in moved if not is_buffer(name)), tuple(filter(is_buffer, moved)),
                         len(both) - buffers, buffers)


def old_digests(model, count):
    """{name in our files: digest} of every tensor of the first `count` domains, shared ones included."""
    state = model.state_dict()
    return tensor_digests({name: state[name] for domain in range(count)
                           for names in model.view_names(domain) for name in names.values()})


def moved_since(record, model):
    """{domain: TensorChanges} of a record's old domains in a MultiDomainNet, whose first domains they are."""
    found, now = {}, old_digests(model, len(record['domains']))
    for domain, name in enumerate(record['domains']):
        names = [name for part in model.view_names(domain) for name in part.values()]
        before = {name: record['tensors'][name] for name in names if name in record['tensors']}
        found[name] = compare(before, {name: now[name] for name in names}, NAME)
    return found


def begin(folder, model, domains, state):
    """Writes the record of a step that starts now from the file `state`; domains: names of the old domains.

    Without old domains there is nothing to record, and the record of an earlier run is removed.
    """
    path = Path(folder) / NAME
    if not domains:
        path.unlink(missing_ok=True)
        return
    write_json(path, {'version': VERSION, 'state': state, 'domains': domains,
                      'tensors': old_digests(model, len(domains))})


def end(folder, model):
    """Adds to the record what the step moved; returns a line for each old domain, or [] if there is no record."""
    path = Path(folder) / NAME
    if not path.exists():
        return []
    record = read(path)
    found = {name: str(moved) for name, moved in moved_since(record, model).items()}
    write_json(path, {**record, 'after': found})
    return [f'{name}: {text}' for name, text in found.items()]


def read(path):
    """The record at `path`; UserError if it cannot be read or is not a record."""
    try:
        record = json.loads(Path(path).read_text())
        version, names, tensors = record['version'], record['domains'], record['tensors']
    except OSError as error:
        raise UserError(f'{path} cannot be read ({error.strerror}); train.py writes it in every step after the first; '
                        'without it, pass two files: OLD NEW') from None
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f'{path}: not a record of train.py ({type(error).__name__}: {error})') from None
    if version != VERSION or not (isinstance(names, list) and all(isinstance(name, str) for name in names)
                                  and isinstance(tensors, dict)):
        raise UserError(f'{path}: not a record of train.py, or from a later version of this code')
    return record
