"""Branch files: one domain's part of a network, extracted from a checkpoint and added to another one.

A branch file is a dict like a checkpoint:
    kind        'branch'
    version, method, network    as in a checkpoint
    domain      its entry in the checkpoint's `domains`: name, classes and whatever else is there
    about       {entry of the checkpoint: its value for this domain}
    base        fingerprint of the shared weights that the branch was trained with
    state       {key in a plain network: tensor}
    digests     of `state` and of everything else, which tell a damaged branch from a renamed one
"""
import torch

from mdil.datasets.domains import get_domain, index_among, is_declared
from mdil.models.checkpoint import (BRANCH, KINDS, LATER, VERSION, are_domains, check_kinds, is_branch, load_network,
                                     method_of, names_in, read_checkpoint)
from mdil.models.fingerprint import SHOWN, branch_state, fingerprint, is_buffer, misfits, shared_state
from mdil.models.layouts import CLASSES, check_values
from mdil.models.networks import DEFAULT as ERFNET
from mdil.models.safe_reading import read
from mdil.utils.errors import UserError

WHAT = 'statistics', 'branch'       # what `put_back` can restore in an old domain
# Entry of a branch file: (test of its value, what it must be).
PARTS = {'version': KINDS['version'], 'method': KINDS['method'],
         'domain': (lambda value: are_domains([value]) and value['classes'] in CLASSES,
                    'a domain of {name, classes}'),
         'about': (lambda value: isinstance(value, dict), 'a dict'),
         'base': (lambda value: isinstance(value, str), 'a fingerprint'),
         'state': (lambda value: isinstance(value, dict)
                   and all(isinstance(part, torch.Tensor) for part in value.values()), 'a dict of tensors'),
         'digests': (lambda value: isinstance(value, dict), 'a dict of digests')}


class LoadedCheckpoint:
    """A checkpoint, its network, and `entries`: what the file says about each domain, {'name', 'classes', ...}.

    names, sequence: as for `names_in`.
    paths: places of domains, as for `get_domain`. Class names and colours of domains found there, or built
        in, are added to their entries.
    """

    def __init__(self, path, names=None, method=None, paths=None, sequence=False):
        self.checkpoint, self.paths = read_checkpoint(path), paths
        self.model = load_network(self.checkpoint, method)
        self.method, self.network = method_of(self.checkpoint, method), self.checkpoint.layout.network
        names, counts = names_in(self.checkpoint, names, sequence), self.checkpoint.layout.num_classes
        if self.checkpoint.domains:
            stated = self.checkpoint.content['domains']
        else:
            check_counts(path, names, counts, paths or {})
            stated = [{}] * len(names)
        self.entries = [{**described(name, count, paths), **entry, 'name': name, 'classes': count}
                        for name, count, entry in zip(names, counts, stated)]

    @property
    def names(self):
        """Names of its domains, in order."""
        return [entry['name'] for entry in self.entries]

    def index(self, name):
        """Index of the domain `name`, which may be an alias; UserError if it is not known."""
        return index_among(self.names, name, self.checkpoint.source)

    def about(self):
        """{entry of the file: {domain: value}} of the entries that are dicts by domain, such as statistics."""
        return {name: dict(value) for name, value in self.checkpoint.content.items()
                if isinstance(value, dict) and value and value.keys() <= set(self.names)}

    def content(self):
        """The content of a checkpoint of this network in its current state, without the state of a run."""
        options = self.checkpoint.content.get('options', {})
        size = {name: options[name] for name in ('height', 'width') if name in options}
        return {'version': VERSION, 'state_dict': self.model.state_dict(), 'domains': self.entries,
                'method': self.method, 'network': self.network, 'options': size}


def check_counts(source, names, counts, paths):
    """UserError if the file `source` has other class counts than the domains that `--domains` says it holds."""
    for name, count in zip(names, counts):
        needed = get_domain(name, paths).num_classes if is_declared(name, paths) else count
        if count != needed:
            raise UserError(f'{source} has {count} classes, void included, where --domains says {name}, which has '
                            f'{needed}')


def described(name, classes, paths):
    """A checkpoint's entry for a domain of `classes` classes; {} if it is not declared here, or has others."""
    try:
        domain = get_domain(name, paths)
    except UserError:
        return {}
    return domain.entry if domain.num_classes == classes else {}


def digests_of(branch):
    """{'state': digest of a branch's tensors, 'about': digest of its metadata}."""
    about = {name: branch[name] for name in ('method', 'domain', 'about', 'base', *LATER) if name in branch}
    return {'state': fingerprint(branch['state']), 'about': fingerprint(about)}


def extract(known, name):
    """The content of the branch file for the domain `name` of a LoadedCheckpoint."""
    number = known.index(name)
    entry = known.entries[number]
    about = {key: value[entry['name']] for key, value in known.about().items() if entry['name'] in value}
    branch = {'kind': BRANCH, 'version': VERSION, 'method': known.method, 'network': known.network, 'domain': entry,
              'about': about, 'base': fingerprint(shared_state(known.model)),
              'state': branch_state(known.model, number)}
    return {**branch, 'digests': digests_of(branch)}


def read_branch(path, paths=None):
    """The content of a branch file.

    UserError, naming the domain, if the branch is damaged, renamed or for other classes than the domain has
    here.
    """
    branch = read(path)
    if not is_branch(branch):
        raise UserError(f'{path} is not a branch file; python -m mdil branches extract makes one from a checkpoint')
    lacking = [name for name in PARTS if name not in branch]
    if lacking:
        raise UserError(f'{path}: damaged, it has no {lacking[0]}')
    check_kinds(branch, path, {**PARTS, **LATER})
    if branch['version'] != VERSION:
        raise UserError(f'{path}: version {branch["version"]}, this code reads {VERSION}')
    name, found = branch['domain']['name'], digests_of(branch)
    if found['state'] != branch['digests'].get('state'):
        raise UserError(f'{path}: damaged, the tensors of {name} are not those that were written; extract it anew')
    if found['about'] != branch['digests'].get('about'):
        raise UserError(f'{path}: renamed or changed, it was not written as a branch of {name} for '
                        f'{branch["domain"]["classes"]} classes; extract it anew')
    check_classes(branch['domain'], path, paths)
    return branch


def check_classes(entry, path, paths):
    """UserError if the domain of a branch is declared here with other classes."""
    try:
        domain = get_domain(entry['name'], paths)
    except UserError:       # a user's own domain, whose declaration is not available
        return
    stated = entry.get('class_names', list(domain.classes))
    if entry['classes'] != domain.num_classes or stated != list(domain.classes):
        other = next((f'{one!r} instead of {two!r}' for one, two in zip(stated, domain.classes) if one != two),
                     f'{entry["classes"]} instead of {domain.num_classes}, void included')
        raise UserError(f'{path}: a branch of {entry["name"]} with other classes than {entry["name"]} has here: '
                        f'{other}')


def put_on(known, branch, source):
    """Adds a branch, read from `source`, to the network of a LoadedCheckpoint; UserError if it does not fit."""
    entry, base, model = branch['domain'], fingerprint(shared_state(known.model)), known.model
    name, network = entry['name'], branch.get('network', ERFNET)
    if network != known.network:
        raise UserError(f'{source}: a branch of {network}, {known.checkpoint.source} is {known.network}')
    if name in known.names:
        raise UserError(f'{source}: a branch of {name}, which is already there: {", ".join(known.names)}')
    if branch['base'] != base:
        raise UserError(f'{source}: the branch of {name} was trained with the shared weights {branch["base"][:SHOWN]}, '
                        f'those of {known.checkpoint.source} are {base[:SHOWN]}; add it to the checkpoint that it was '
                        'trained from, or to one with the same shared weights (python -m mdil branches list)')
    number = model.add_domain(entry['classes'])
    own = branch_state(model, number)
    if odd := misfits(own, branch['state']):
        raise UserError(f'{source}: the branch of {name} ({branch["method"]}, {entry["classes"]} classes) does not fit '
                        f'the network of {known.checkpoint.source} ({known.method}): {odd[0]}')
    check_values(own, branch['state'], f'{source}, branch of {name}')
    model.single(number).load_state_dict(branch['state'], strict=False)
    known.entries.append(entry)


def joined(known, branches):
    """The content of a checkpoint with the domains of a base and then those of `branches`, [(file, content)]."""
    about = known.about()
    for source, branch in branches:
        put_on(known, branch, source)
        for key, value in branch['about'].items():
            about.setdefault(key, {})[branch['domain']['name']] = value
    return {**known.content(), **about}


def without(known, name):
    """The content of a checkpoint of a LoadedCheckpoint without the domain `name`; UserError if it is the only one."""
    number, about = known.index(name), known.about()
    if len(known.entries) == 1:
        raise UserError(f'{known.checkpoint.source} knows only {known.names[0]}; nothing would be left')
    gone = known.entries.pop(number)['name']
    known.model.remove_domain(number)
    left = {key: {domain: value for domain, value in values.items() if domain != gone} for key, values in about.items()}
    return {**known.content(), **{key: values for key, values in left.items() if values}}


def put_back(source, number, target, index, what='branch'):
    """Restores branch `index` of the network `target` from branch `number` of `source`; returns the keys that changed.

    what: 'statistics', the running statistics of the domain's own batch norms, or 'branch', everything that
        belongs to the domain.
    """
    kept, own = branch_state(source, number), branch_state(target, index)
    moved = [key for key in own if (what == 'branch' or is_buffer(key)) and not torch.equal(own[key], kept[key])]
    for key in moved:
        own[key].copy_(kept[key])       # state dicts hold the tensors themselves, not copies
    return moved
