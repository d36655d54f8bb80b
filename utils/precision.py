"""Types and layouts that networks compute in, and which of them a device has."""
import contextlib
import functools
import os
import sys

import torch

from mdil.utils.errors import UserError

# Names of bf16 arithmetic among a processor's features: x86's two kinds, Arm's.
BF16_FEATURES = {'avx512_bf16', 'amx_bf16', 'bf16'}
# Values of oneDNN's limits that exclude it.
WITHOUT_BF16 = {'SSE41', 'AVX', 'AVX2', 'AVX2_VNNI', 'AVX2_VNNI_2', 'AVX512_CORE', 'AVX512_CORE_VNNI'}


@functools.cache
def cpu_features():
    """Names of what the processor can do, as Linux lists them; empty on other systems."""
    try:
        with open('/proc/cpuinfo') as file:
            return {word for line in file if line.lower().startswith(('flags', 'features')) for word in line.split()}
    except OSError:
        return set()


def without_bf16(device):
    """Why the device computes in bf16 more slowly than in float32, in words; '' if it does not."""
    if device.type == 'cuda':
        return '' if torch.cuda.get_device_capability(device)[0] >= 8 else 'this GPU has no bf16 arithmetic'
    if device.type != 'cpu':
        return ''
    for name in ('ONEDNN_MAX_CPU_ISA', 'DNNL_MAX_CPU_ISA', 'ATEN_CPU_CAPABILITY'):
        if os.environ.get(name, '').upper() in WITHOUT_BF16:
            return f'{name}={os.environ[name]} forbids bf16 arithmetic'
    return '' if BF16_FEATURES & cpu_features() else 'this processor has no bf16 arithmetic'


def check_precision(precision, device):
    """Warns of a precision that the device is slow in; UserError for one that it does not have."""
    if precision == 'fp32':
        return
    if not torch.amp.autocast_mode.is_autocast_available(device.type):
        raise UserError(f'--precision {precision}: {device.type} supports only float32; leave it out')
    reason = precision == 'bf16' and without_bf16(device)
    if reason:
        print(f'--precision bf16 is slow here, because {reason}; float32 is faster', file=sys.stderr)


def wide_type(device):
    """The type that sums are kept in: float64 where the device has it."""
    return torch.float32 if device.type == 'mps' else torch.float64


def to_float(images):
    """uint8 [0, 255] -> float32 [0, 1], where the images are; floats pass as they are."""
    return images if images.is_floating_point() else images.float().div_(255)


def memory_format(device, precision):
    """The layout that convolutions run fastest in: channels last, but for float32 on a GPU."""
    contiguous = device.type == 'cuda' and precision == 'fp32'
    return torch.contiguous_format if contiguous else torch.channels_last


def autocast(device, precision):
    """Autocast context of `precision`: 'fp32' (none), 'bf16' or 'fp16'."""
    dtype = {'fp32': None, 'bf16': torch.bfloat16, 'fp16': torch.float16}[precision]
    return torch.autocast(device.type, dtype=dtype) if dtype else contextlib.nullcontext()
