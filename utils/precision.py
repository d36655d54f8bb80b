"""Number types and memory layouts for computing, and which of them a device supports."""
import contextlib
import functools
import os
import sys

import torch

from mdil.utils.errors import UserError

PRECISIONS = {'fp32': None, 'bf16': torch.bfloat16, 'fp16': torch.float16}     # type that autocast uses, if any
# A processor's feature flags for bf16 arithmetic: two for x86, one for Arm.
BF16_FEATURES = {'avx512_bf16', 'amx_bf16', 'bf16'}
# Values of the instruction-set limits of oneDNN and ATen that rule it out.
WITHOUT_BF16 = {'SSE41', 'AVX', 'AVX2', 'AVX2_VNNI', 'AVX2_VNNI_2', 'AVX512_CORE', 'AVX512_CORE_VNNI'}


def cpu_info(*names):
    """Values of the lines of /proc/cpuinfo that begin with one of `names`, in lower case; [] where Linux is not."""
    try:
        with open('/proc/cpuinfo') as file:
            return [line.partition(':')[2].strip() for line in file if line.lower().startswith(names)]
    except OSError:
        return []


@functools.cache
def cpu_features():
    """The processor's feature flags, where Linux states them."""
    return {word for flags in cpu_info('flags', 'features') for word in flags.split()}


def without_bf16(device):
    """Why bf16 is slower than float32 on the device, in words; '' if it is not."""
    if device.type == 'cuda':
        return '' if torch.cuda.get_device_capability(device)[0] >= 8 else 'this GPU has no bf16 arithmetic'
    if device.type != 'cpu':
        return ''
    for name in ('ONEDNN_MAX_CPU_ISA', 'DNNL_MAX_CPU_ISA', 'ATEN_CPU_CAPABILITY'):
        if os.environ.get(name, '').upper() in WITHOUT_BF16:
            return f'{name}={os.environ[name]} forbids bf16 arithmetic'
    return '' if BF16_FEATURES & cpu_features() else 'this processor has no bf16 arithmetic'


def check_precision(precision, device):
    """Warns if the precision is slow on the device; UserError if the device does not support it."""
    if precision == 'fp32':
        return
    if not torch.amp.autocast_mode.is_autocast_available(device.type):
        raise UserError(f'--precision {precision}: {device.type} supports only float32; leave it out')
    reason = precision == 'bf16' and without_bf16(device)
    if reason:
        print(f'--precision bf16 is slow here, because {reason}; float32 is faster', file=sys.stderr)


def wide_type(device):
    """The type for sums: float64 if the device has it, else float32."""
    return torch.float32 if device.type == 'mps' else torch.float64


def to_float(images):
    """uint8 [0, 255] -> float32 [0, 1], on the images' device; floats are returned unchanged."""
    return images if images.is_floating_point() else images.float().div_(255)


def memory_format(device, precision):
    """The fastest layout for convolutions: channels last, except for float32 on a GPU."""
    contiguous = device.type == 'cuda' and precision == 'fp32'
    return torch.contiguous_format if contiguous else torch.channels_last


def autocast(device, precision):
    """Autocast context of `precision`, one of PRECISIONS."""
    dtype = PRECISIONS[precision]
    return torch.autocast(device.type, dtype=dtype) if dtype else contextlib.nullcontext()
