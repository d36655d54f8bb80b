"""Checkpoints: what a file means, and how it is written. `safe_reading` opens it."""
import io
import math
from dataclasses import dataclass, field

import torch

from mdil.datasets.domains import canonical
from mdil.datasets.own import is_color
from mdil.models.identify import are_statistics
from mdil.models.layouts import (CLASSES, StateLayout, check_fit, check_values, describe, file_key, load_encoder,
                                 recognise)
from mdil.models.methods import METHODS, build_model, get_method, method_name
from mdil.models.networks import DEFAULT, get_network
from mdil.models.safe_reading import leaves, read
from mdil.utils.errors import UserError, counted
from mdil.utils.files import write_atomically
from mdil.utils.parser import is_side

VERSION = 1
BRANCH = 'branch'       # `kind` of a branch file

# Keys under which other people's files hold their network.
STATES = 'state_dict', 'model_state_dict', 'model', 'net', 'network'


@dataclass
class Checkpoint:
    """A file's network and what is known about it. domains: names, or None if the file has none."""
    source: str
    layout: StateLayout
    domains: list = None
    method: str = None
    content: dict = field(default_factory=dict, repr=False)


def check_stated(names, known, source):
    """UserError if `names`, from `--domains`, differ from `known`, those in the file `source`; either may be None."""
    stated = list(map(canonical, names or []))
    if stated and known and stated != known:
        raise UserError(f'--domains {" ".join(stated)} contradicts {source}, which knows {" ".join(known)}; '
                        'leave it out, or name those')


def check_given(names, checkpoint):
    """UserError if `names`, from `--domains`, contradict a Checkpoint, are more than it has, or name one twice.

    Of a file that states none, there may be fewer.
    """
    check_stated(names, checkpoint.domains, checkpoint.source)
    if len(names) > len(checkpoint.layout.num_classes) or len(set(map(canonical, names))) < len(names):
        raise UserError(f'--domains {" ".join(names)}: {checkpoint.source} holds {checkpoint.layout.kind}; name each '
                        'of its domains once, in order')


def names_in(checkpoint, names=(), sequence=False):
    """Names of a Checkpoint's domains: those in the file, or else `names`, from `--domains`.

    sequence: `names` are those of the last file of a sequence, to which this file belongs. UserError if names
        contradict the file, or if it has none and they are not one for each domain.
    """
    found, names = checkpoint.layout, list(map(canonical, names or []))
    names = names[:len(found.num_classes)] if sequence else names
    if checkpoint.domains:
        check_stated(names, checkpoint.domains, checkpoint.source)
        return checkpoint.domains
    if len(names) != len(found.num_classes) or len(set(names)) < len(names):
        raise UserError(f'{checkpoint.source} holds {found.kind} but no domain names; pass --domains, one for each')
    return names


def stated_size(content):
    """The (height, width) at which a checkpoint says it was trained; None if it states none, or an impossible one."""
    options = content.get('options')
    sides = (options.get('height'), options.get('width')) if isinstance(options, dict) else ()
    return sides if sides and all(map(is_side, sides)) else None


def save(content, path, previous=None, best=None):
    """Writes a checkpoint dict to `path`, and first to `best` if given. Each file is replaced as a whole or not at all.

    previous: where the file that was at `path` is kept.
    """
    made = io.BytesIO()         # so that a full disk fails a plain write, with a clear error
    torch.save(content, made)
    if best is not None:
        write_atomically(best, lambda file: file.write(made.getbuffer()))
    write_atomically(path, lambda file: file.write(made.getbuffer()), previous)


def not_finite(content):
    """Yields the names of tensors in a run's checkpoint that hold NaN or infinity."""
    for part in ('state_dict', 'teacher', 'optimizer'):
        for name, value in leaves(content[part]):
            if isinstance(value, torch.Tensor) and not value.isfinite().all():
                yield f'{part}.{name}'


def is_count(value):
    """Whether `value` is an int that can be a count."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2 ** 31


def is_miou(value):
    """Whether `value` is an mIoU: a number (numpy's and tensors too) from 0 to 100, or -inf before any validation."""
    if isinstance(value, torch.Tensor) and value.numel() != 1 or isinstance(value, (bool, str, bytes)):
        return False
    try:
        return 0 <= float(value) <= 100 or float(value) == -math.inf
    except (TypeError, ValueError, OverflowError):
        return False


def are_domains(value):
    """Whether `value` lists a network's domains as {name, classes}, with class_names or without."""
    return isinstance(value, list) and bool(value) and all(
        isinstance(entry, dict) and isinstance(entry.get('name'), str) and entry['name'].isprintable()
        and is_count(entry.get('classes')) and described_classes(entry) for entry in value)


def described_classes(entry):
    """Whether `class_names` and `colors` of a domain's entry, if any, are those of every class but void."""
    parts = {'class_names': lambda name: isinstance(name, str), 'colors': is_color}
    return all(isinstance(entry[part], list) and len(entry[part]) == entry['classes'] - 1
               and all(map(fits, entry[part])) for part, fits in parts.items() if part in entry)


def are_options(value):
    """Whether `value` is a dict of options: numbers, strings, None, and lists of them."""
    single = (str, int, float, type(None))
    return isinstance(value, dict) and all(isinstance(key, str) for key in value) and all(
        isinstance(item, single) or isinstance(item, list) and all(isinstance(part, single) for part in item)
        for item in value.values())


def are_sums(value):
    """Whether `value` is a dict of finite sums."""
    return isinstance(value, dict) and all(isinstance(part, float) and math.isfinite(part) for part in value.values())


# Entry of a checkpoint: (test of its value, what it must be).
KINDS = {'version': (is_count, 'a whole number'), 'epoch': (is_count, 'a whole number of epochs'),
         'batch': (is_count, 'a whole number of batches'), 'totals': (are_sums, 'a dict of sums'),
         'domains': (are_domains, 'a list of {name, classes}'),
         'method': (lambda value: isinstance(value, str) and method_name(value) in METHODS,
                    'one of ' + ', '.join(METHODS)
                    + '; a method of your own is registered first: import its file, see docs/extending.md'),
         'domain_statistics': (are_statistics, 'what models.identify gives of each domain'),
         'best_acc': (is_miou, 'an mIoU'), 'options': (are_options, 'a dict of options')}
# Entries that files of earlier versions lack.
LATER = {'network': (lambda value: isinstance(value, str) and value.isprintable(), 'the name of a network')}


def check_kinds(content, path, kinds):
    """UserError if an entry of `content` fails its test in `kinds`, {name: (test, words)}; missing entries pass."""
    for name, (test, words) in kinds.items():
        if name in content and not test(content[name]):
            found = (f' (found {content[name]!r})'
                     if isinstance(content[name], str) and len(content[name]) <= 100 else '')
            raise UserError(f'{path}: its {name} is not {words}{found}')


def is_branch(content):
    """Whether the content of a file is that of a branch file, perhaps a damaged one."""
    return isinstance(content, dict) and content.get('kind') == BRANCH


def state_in(content, path):
    """{key: tensor} in what was read from `path`: `content` itself or an entry of it; UserError if there is none."""
    if not isinstance(content, dict):
        raise UserError(f'{path}: holds a {type(content).__name__}, a dict with state_dict is expected')
    if is_branch(content):
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
    if planned is not None and not (is_count(planned) and content.get('epoch', 0) <= planned):
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
    if checkpoint.layout.num_classes != counts:
        raise UserError(f'{checkpoint.source} holds {checkpoint.layout.kind}, but {", ".join(names)} need '
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
            and (not several or row.domain_bn == (found.batch_norms > 1)) and not (several and row.one_domain)]


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
    check_values(model.state_dict(), found.state, source)
    model.load_state_dict(found.state, strict=False)     # batch counters that early files lack stay 0
    return model


def method_of(checkpoint, method=None):
    """The method that a checkpoint states, or else `method`, or else the first whose network fits; None without one."""
    return checkpoint.method or method_name(method) or next(iter(fitting_methods(checkpoint.layout)), None)


def load_network(checkpoint, method=None):
    """The network of a checkpoint, for its `method_of`; UserError also if it is no network of `method`."""
    if method:
        check_method(checkpoint.layout, method_name(method), checkpoint.source)
    return network_of(checkpoint.layout, method_of(checkpoint, method), checkpoint.source)


def start_from_encoder(model, checkpoint, batch_norms):
    """Loads an ImageNet encoder into `model`; returns lines that say what was loaded."""
    loaded, fresh = load_encoder(model, checkpoint.layout, checkpoint.source, batch_norms)
    dropped = len(checkpoint.layout.state) - len(loaded)
    return loading_summary(checkpoint, len(loaded), len(fresh), dropped)


def loading_summary(checkpoint, loaded, fresh, dropped=0):
    """Lines that say how many tensors were loaded, and of these renamed; and how many were not loaded, if any."""
    found = checkpoint.layout
    unused = dropped + len(found.ignored)
    return (f'{checkpoint.source}: {found.kind}; {loaded} tensors loaded'
            + (f', {found.renamed} of them renamed from the published layout' if found.renamed else '')
            + (f'\n  not in the file: {counted(fresh, "tensor")} of the network, which start from initial values'
               if fresh else '')
            + (f'\n  {counted(unused, "tensor")} of the file not used' if unused else '')
            + (f', e.g. {found.ignored[0]}' if found.ignored else ''))
