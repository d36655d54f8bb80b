"""One process or several, one device or several."""
import contextlib
import os
import sys
import warnings
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from mdil.utils.errors import UserError


@dataclass(frozen=True)
class Place:
    """Where this process computes: its device, its rank among `world` processes."""
    device: torch.device
    rank: int = 0
    world: int = 1

    @property
    def main(self):
        """Whether this process writes files and speaks."""
        return self.rank == 0


@contextlib.contextmanager
def session(device, parallel='auto'):
    """The Place of this process; under torchrun it joins the process group for the session.

    device: 'auto', 'cpu', 'cuda' or 'cuda:N'. UserError if it is not there.
    """
    torch.backends.cudnn.benchmark = True       # images are all of one size
    world = int(os.environ.get('WORLD_SIZE', 1))
    launched = 'RANK' in os.environ and 'WORLD_SIZE' in os.environ
    if parallel == 'ddp' and not launched:
        raise UserError('--parallel ddp needs a launcher: torchrun --nproc_per_node N train.py ...')
    if launched and world > 1 and parallel in ('none', 'dp'):
        raise UserError(f'--parallel {parallel} contradicts torchrun with {world} processes')
    if not launched or parallel in ('none', 'dp'):
        yield Place(current(pick_device(device)))
        return
    local = int(os.environ.get('LOCAL_RANK', 0))
    chosen = pick_device(f'cuda:{local}' if device in ('auto', 'cuda') and torch.cuda.is_available() else device)
    dist.init_process_group('nccl' if current(chosen).type == 'cuda' else 'gloo')
    try:
        yield Place(chosen, dist.get_rank(), dist.get_world_size())
    except SystemExit:      # After any other error the others may wait for this rank: torchrun ends them.
        dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def current(device):
    """The device, made the current one if it is a certain GPU: what pins memory asks for that."""
    if device.type == 'cuda' and device.index is not None:
        torch.cuda.set_device(device)
    return device


def pick_device(name):
    """The torch.device called `name`; 'auto' is the first GPU, or the CPU."""
    if name == 'auto':
        return torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f'--device {name} is not one of auto, cpu, cuda, cuda:N') from None
    if device.type not in ('cpu', 'cuda'):
        raise UserError(f'--device {name} is not one of auto, cpu, cuda, cuda:N')
    if device.type == 'cuda' and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f'--device {name}: this machine has {torch.cuda.device_count()} CUDA devices; use --device cpu')
    return device


def wrap(task, place, parallel, unused=False):
    """The task for several devices: DDP under torchrun, DataParallel on several GPUs, else as it is.

    unused: whether some batches leave trainable parameters without a gradient. DataParallel
    would give them one of zeros, on which Adam moves them; then one GPU is used.
    """
    if dist.is_initialized() and place.world > 1:
        devices = [place.device] if place.device.type == 'cuda' else None
        # Running statistics follow rank 0's before each validation (`broadcast_buffers`), not at every step.
        with warnings.catch_warnings():     # forward_sync_buffers, its new name, is not known to older versions
            warnings.filterwarnings('ignore', '.broadcast_buffers. is deprecated')
            return nn.parallel.DistributedDataParallel(task, device_ids=devices, find_unused_parameters=unused,
                                                       broadcast_buffers=False, gradient_as_bucket_view=True)
    several = place.device.type == 'cuda' and place.device.index is None and torch.cuda.device_count() > 1
    if not several or parallel not in ('auto', 'dp'):
        return task
    if not unused:
        return nn.DataParallel(task)
    print('one GPU is used: DataParallel would move weights that a batch does not use; for all of them '
          'torchrun --nproc_per_node N train.py ...', file=sys.stderr)
    return task


def reduced(task, last):
    """Context of a forward and backward pass: DDP reduces gradients over processes in the `last` of a step alone."""
    alone = isinstance(task, nn.parallel.DistributedDataParallel) and not last
    return task.no_sync() if alone else contextlib.nullcontext()


def broadcast_buffers(module, place):
    """Gives every rank the buffers (batch-norm statistics) of rank 0."""
    if place.world > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)


def summed(tensor, place):
    """The sum of `tensor` over all ranks, in place."""
    if place.world > 1:
        dist.all_reduce(tensor)
    return tensor
