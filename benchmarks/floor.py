"""The minimum work for the hardware: FLOPs and bytes of a computation, counted without data."""
from collections import defaultdict
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

# Operation: (argument with the size of the forward output, None for the result; argument with the weights, or None).
COUNTED = {'convolution': (None, 1), 'convolution_backward': (0, 2), 'native_batch_norm': (None, None),
           'native_batch_norm_backward': (0, None)}


class Traffic(TorchDispatchMode):
    """Counts the cost of convolutions and batch norms in `counts`: {kind: [FLOPs, bytes]}.

    Forward, a convolution reads its input and writes its output. Backward, it reads the upstream
    gradient and, if its weights are trained, the input, and writes the input's gradient. A batch norm in
    training reads its input once more and writes its output; backward it reads gradient and input
    and writes the input's gradient. Everything else is assumed to be fused into these operations.
    Weights, sums and maps of at most `cache` bytes cost nothing.
    """

    def __init__(self, cache):
        super().__init__()
        self.cache = cache
        self.counts = defaultdict(lambda: [0, 0])

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        operation = function.overloadpacket
        if operation.__name__ in COUNTED:
            result = out[0] if isinstance(out, tuple) else out
            entry = self.counts[kind(operation.__name__, args, result)]
            if operation in flop_registry:
                entry[0] += flop_registry[operation](*args, **(kwargs or {}), out_val=out)
            sizes = map(size, read(operation.__name__, args) + [result])
            entry[1] += sum(bytes for bytes in sizes if bytes > self.cache)
        return out


def size(tensor):
    """Bytes of a tensor; 0 for None."""
    return 0 if tensor is None else tensor.nbytes


def read(name, args):
    """The maps that the operation `name` reads."""
    if name == 'convolution_backward' and not args[-1][1]:
        return [args[0]]
    return list(args[:2] if 'backward' in name else args[:1])


def kind(name, args, result):
    """A name such as '3x1, 64 channels, 256x128' (W x H), the same for forward and backward."""
    upstream, weight = COUNTED[name]
    shape = (result if upstream is None else args[upstream]).shape
    kernel = 'batch norm' if weight is None else 'x'.join(map(str, args[weight].shape[2:]))
    return f'{kernel}, {shape[1]} channels, {shape[3]}x{shape[2]}'


def cache_size(device):
    """Bytes of a device's last-level cache; 0 if unknown."""
    if device.type == 'cuda':
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = sorted(Path('/sys/devices/system/cpu/cpu0/cache').glob('index*/size'))
    return int(sizes[-1].read_text().strip().removesuffix('K')) * 1024 if sizes else 0


def traffic(work, cache=0):
    """{kind: [FLOPs, bytes]} of a call of `work`, which runs networks on the device 'meta'."""
    with Traffic(cache) as counted:
        work()
    return dict(counted.counts)
