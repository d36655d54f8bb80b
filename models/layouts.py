"""Key layouts of checkpoints (ours, the published ones, the ImageNet encoder), and which network a file holds.

Our keys are those of the published adapter model: a domain's index follows the name of its module, and the
encoder's batch norms are lists, of length one if they are shared (`file_key`). Keys of other layouts are
renamed to these: a plain network's batch norms become the only entry of a list, its decoders entries of
`decoder`.
"""
import re
from dataclasses import dataclass, field

from mdil.models.erfnet import ADAPTERS
from mdil.models.fingerprint import COUNTER
from mdil.utils.errors import UserError, counted

PLAIN_NORMS = (
    (re.compile(r'^(encoder\.(?:initial_block|layers\.\d+))\.bn\.'), r'\1.bn_ini.{}.'),
    (re.compile(r'^(encoder\.layers\.\d+)\.bn([12])\.'), r'\1.bns_\2.{}.'))
# What torch's wrappers (DataParallel, torch.compile) and attributes of other code add to names.
WRAPPED = re.compile(r'(?:^|(?<=\.))(?:module|_orig_mod)\.')
HELD_AS = re.compile(r'^(?:(?:model|net|network)\.)+')
IGNORED = re.compile(r'^(classifier\.|features\.extralayer|encoder\.output_conv\.)')
PLAIN_DECODER = re.compile(r'^decoder\.(layers|output_conv)\.')
NAMED_DECODER = re.compile(r'^decoder_(old|old[0-9]{1,3}|new)\.')
OUTPUT = re.compile(r'^decoder\.([0-9]{1,3})\.output_conv\.weight\Z')
CLASSES = range(2, 257)        # labels are bytes


@dataclass
class StateLayout:
    """What a state dict holds, in native keys.

    num_classes: of each domain, [] for an encoder alone.
    adapter: as in `ERFNet`.
    batch_norms: how many the encoder has per layer.
    kind: a description in words.
    renamed: number of the file's keys that were renamed (beyond wrappers such as `module.`).
    ignored: the file's keys that are not used.
    network: its name in `models.networks`.
    """
    state: dict
    num_classes: list
    adapter: object
    batch_norms: int
    kind: str
    renamed: int = 0
    ignored: list = field(default_factory=list)
    network: str = 'erfnet'


def listed_norms(key, index):
    """The key; an encoder batch norm of a plain network becomes entry `index` of its list."""
    for pattern, replacement in PLAIN_NORMS:
        key = pattern.sub(replacement.format(index), key)
    return key


def file_key(key, owner=None, domain=0):
    """Name in our files of a view's tensor `key`; owner: name of the domain's module that holds it, None if shared."""
    name = listed_norms(key, 0 if owner is None else domain)
    if name != key or owner is None:
        return name
    return f'{owner}.{domain}{key.removeprefix(owner)}'


def native_keys(state):
    """Renames the keys of any known layout; returns (native state, number renamed, keys ignored)."""
    state = {HELD_AS.sub('', WRAPPED.sub('', key)): value for key, value in state.items()}
    named = {match.group(1) for match in map(NAMED_DECODER.match, state) if match}
    # old, or old1, old2, ... in order; new comes last.
    order = sorted(named, key=lambda name: (name == 'new', int(name[3:] or 1) if name != 'new' else 0))
    result, renamed, ignored = {}, 0, []
    for key, value in state.items():
        name = key.removeprefix('features.')
        if IGNORED.match(key) or IGNORED.match(name):
            ignored.append(key)
            continue
        name = listed_norms(name, 0)
        name = PLAIN_DECODER.sub(r'decoder.0.\1.', name)
        name = NAMED_DECODER.sub(lambda match: f'decoder.{order.index(match.group(1))}.', name)
        renamed += name != key
        result[name] = value
    return result, renamed, ignored


def recognise(state, source):
    """The StateLayout of a state dict from `source`; UserError if it is not an ERFNet, ours or the published code's."""
    native, renamed, ignored = native_keys(state)
    heads = {int(match.group(1)): native[match.group(0)].shape for match in map(OUTPUT.match, native) if match}
    if 'encoder.initial_block.conv.weight' not in native or sorted(heads) != list(range(len(heads))):
        raise UserError(f'{source}: no ERFNet in it; the first of its {len(state)} tensors is '
                        f'{next(iter(state), "none")!r}, encoder.initial_block.conv.weight is expected')
    if len(native) + len(ignored) < len(state):
        raise UserError(f'{source}: {len(state) - len(native) - len(ignored)} of its {len(state)} tensors have the '
                        'names of others in another layout')
    if any(len(shape) != 4 or shape[1] not in CLASSES for shape in heads.values()):
        raise UserError(f'{source}: an output layer is not four-dimensional with {CLASSES[0]} to {CLASSES[-1]} classes')
    adapter = next((kind for kind in filter(None, ADAPTERS)
                    if any(f'.{kind}_conv_1.' in key for key in native)), None)
    norms = len({key.split('.')[3] for key in native if key.startswith('encoder.initial_block.bn_ini.')})
    counts = [heads[index][1] for index in range(len(heads))]
    return StateLayout(native, counts, adapter, norms, describe(counts, adapter, norms), renamed, ignored)


def describe(num_classes, adapter, norms):
    """The layout in words, such as "2 domains (20, 20 classes), parallel adapters, 2 batch norms"."""
    if not num_classes:
        return 'an encoder alone'
    return (f'{counted(len(num_classes), "domain")} ({", ".join(map(str, num_classes))} classes), '
            f'{adapter or "no"} adapters, {counted(norms, "batch norm")} per layer')


def check_fit(own, found, source):
    """UserError unless the names and shapes found are those of the state dict `own`; batch counters may be missing."""
    missing = [key for key in own if key not in found.state and not key.endswith(COUNTER)]
    surplus = [key for key in found.state if key not in own]
    misshapen = [key for key, value in found.state.items() if key in own and value.shape != own[key].shape]
    if missing or surplus or misshapen:
        fit = len(own) - len(missing) - len(misshapen)
        first = (missing and f'{missing[0]} is missing' or misshapen and f'{misshapen[0]} has the wrong shape'
                 or f'{surplus[0]} is surplus')
        raise UserError(f'{source} fits no known layout; the closest is {found.kind}: {fit} of {len(own)} '
                        f'tensors fit, {first}')


def faults(own, given):
    """What is wrong, in words, with the values of the tensors `given`, which are to be loaded into `own`."""
    wrong = []
    for key, value in given.items():
        if value.is_complex() or value.is_floating_point() != own[key].is_floating_point():
            wrong.append(f'{key} holds {value.dtype}, {own[key].dtype} is expected')
        elif not value.to(own[key].dtype).isfinite().all():
            wrong.append(f'{key} holds values that are not finite')
        elif key.endswith('running_var') and (value < 0).any():
            wrong.append(f'{key} holds negative variances')
    return wrong


def check_values(own, given, source):
    """UserError, with the first of the `faults` and their number, if there are any."""
    if wrong := faults(own, given):
        raise UserError(f'{source}: {wrong[0]} ({counted(len(wrong), "such tensor")})')


def load_encoder(model, found, source, batch_norms=True):
    """Loads an ImageNet encoder into a one-domain network; returns (names loaded, names left fresh).

    Its convolutions become shared weights; if `batch_norms`, its batch norms become the first domain's.
    """
    own = {key: value for key, value in model.state_dict().items() if key.startswith('encoder.')}
    given = {key: value for key, value in found.state.items()
             if key.startswith('encoder.') and (batch_norms or '.bn' not in key)}
    wrong = [key for key, value in given.items() if key not in own or value.shape != own[key].shape]
    lacking = [key for key in own if '_conv_' not in key and '.bn' not in key and key not in given]
    if wrong or lacking:
        raise UserError(f'{source}: not the encoder of ERFNet; {(wrong or lacking)[0]} does not fit')
    check_values(own, given, source)
    model.load_state_dict(given, strict=False)
    return list(given), [key for key in model.state_dict() if key not in given]


def published_keys(state, num_classes, adapter, multi_task=False):
    """Our state dict in the key layout that the published code loads, `module.` included.

    Adapter models keep their keys; a plain network becomes the single-task, fine-tune
    (decoder_old, decoder_new) or multi-task (decoder.N) layout.
    """
    if adapter is not None:
        return {f'module.{key}': value for key, value in state.items()}
    count = len(num_classes)
    old = ['old'] if count == 2 else [f'old{number + 1}' for number in range(count - 1)]
    heads = {index: f'decoder_{name}' for index, name in enumerate(old + ['new'])}
    if count == 1:
        heads = {0: 'decoder'}
    result = {}
    for key, value in state.items():
        name = re.sub(r'\.bn_ini\.0\.', '.bn.', re.sub(r'\.bns_([12])\.0\.', r'.bn\1.', key))
        if not multi_task:
            name = re.sub(r'^decoder\.(\d+)\.', lambda match: f'{heads[int(match.group(1))]}.', name)
        result[f'module.{name}'] = value
    return result
