"""Types and layouts that networks compute in."""
import contextlib

import torch


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
