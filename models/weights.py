"""Initial weights for the encoder of a network: ImageNet-trained ones by name, or a file of them."""
from mdil.models.adapters import Adapted
from mdil.models.checkpoint import state_in
from mdil.models.fingerprint import COUNTER
from mdil.models.layouts import WRAPPED, check_values
from mdil.models.multi_domain import outside_heads
from mdil.models.networks import Scaling, get_network
from mdil.models.safe_reading import read
from mdil.utils.errors import UserError

IMAGENET = 'imagenet'


def start_from_weights(model, network, weights):
    """Loads `weights`, 'imagenet' or a file, into every domain's view of `model`; returns a line about it.

    The encoder must be complete. Of the head, whatever fits is loaded, but never an output layer.
    """
    declared = get_network(network)
    if weights == IMAGENET and declared.imagenet is None:
        raise UserError(f'--weights {weights}: {network} has none of its own; pass a file, or leave out --weights')
    source = f'{weights} ({network})' if weights == IMAGENET else weights
    given = declared.imagenet() if weights == IMAGENET else state_in(read(weights), weights)
    own, wanted = plain_state(model.single(0))
    found = best_layout(own, wanted, {WRAPPED.sub('', key): value for key, value in given.items()}, declared.layouts)
    lacking = [key for key in wanted if key not in found]
    if lacking:
        raise UserError(f'{source}: not the weights of {network}; {len(lacking)} of the {len(wanted)} tensors of its '
                        f'encoder are missing or have another shape, e.g. {lacking[0]}')
    check_values(own, found, source)
    for view in model.views:
        tensors, _ = plain_state(view)      # the network's tensors themselves, not copies
        for key, value in found.items():
            tensors[key].copy_(value)
    return (f'{source}: {len(found)} tensors loaded, {len(given) - len(found)} not used; '
            f'{len(own) - len(found)} other tensors and the output layers stay as initialised')


def plain_state(view):
    """({key: tensor} of a view without its output layers, keys that a file of weights must have).

    Keys are those of the network without adapters.
    """
    inner = {f'{name}.conv': name for name, module in view.named_modules() if isinstance(module, Adapted)}
    own = {f'{inner.get(owner, owner)}.{name}': value for key, value in view.state_dict().items()
           for owner, _, name in [key.rpartition('.')] if owner not in view.output_layers}
    optional = [name for name, module in outside_heads(view)
                if isinstance(module, Scaling) or getattr(module, 'per_domain', False)]
    wanted = [key for key in own if key.rpartition('.')[0] not in optional and not key.endswith(COUNTER)
              and not any(key.startswith(f'{head}.') for head in view.heads)]
    return own, wanted


def best_layout(own, wanted, given, layouts):
    """{key of `own`: tensor of `given`}: what fits in name and shape under the layout that fits most of `wanted`."""
    def renamed(key, layout):
        beginning = next((part for part in layout if key.startswith(part)), None)
        return None if beginning is None else layout[beginning] + key.removeprefix(beginning)

    fitting = [{name: value for key, value in given.items() if (name := renamed(key, layout)) in own
                and value.shape == own[name].shape} for layout in layouts]
    return max(fitting, key=lambda found: len(found.keys() & set(wanted)))
