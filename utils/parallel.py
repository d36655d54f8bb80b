"""Devices and processes: choosing a device, joining a process group, sharing a batch."""
import contextlib
import ctypes
import os
import resource
import signal
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from mdil.utils.errors import UserError, brief
from mdil.utils.precision import check_precision
from mdil.utils.workers import end_with

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4       # of glibc's malloc.h


@dataclass(frozen=True)
class Place:
    """Where this process computes: its device, its rank among `world` processes; graphs: whether to use CUDA graphs."""
    device: torch.device
    rank: int = 0
    world: int = 1
    graphs: bool = False

    @property
    def main(self):
        """Whether this is the process that writes files and prints."""
        return self.rank == 0


@contextlib.contextmanager
def session(device, parallel='auto', precision='fp32', graphs=False):
    """The Place of this process; under torchrun it joins the process group for the session.

    Afterwards torch's settings are as before. device: 'auto', or torch's name of a device. UserError if the device is
    missing or lacks the precision, or if the options contradict one another or the launcher.
    """
    with kept_settings(), placed(device, parallel, precision, graphs) as place:
        yield place


@contextlib.contextmanager
def kept_settings():
    """Restores torch's process-wide settings that a session may change."""
    cudnn = torch.backends.cudnn
    benchmark, legacy, tf32 = cudnn.benchmark, None, (cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision)
    with contextlib.suppress(RuntimeError):     # it cannot be read if the program has set the newer two differently
        legacy = cudnn.allow_tf32
    deterministic = deterministic_settings()
    try:
        yield
    finally:
        cudnn.benchmark = benchmark
        if legacy is not None:
            cudnn.allow_tf32 = legacy
        cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision = tf32
        if deterministic_settings() != deterministic:   # the call imports torch's compiler, which takes seconds
            enabled, warn_only = deterministic
            torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


def deterministic_settings():
    """Whether torch uses deterministic algorithms, and whether it only warns where there are none."""
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


@contextlib.contextmanager
def placed(device, parallel, precision, graphs):
    """The Place of a session."""
    torch.backends.cudnn.benchmark = True       # pays off because all images have the same size
    allow_open_files()
    keep_freed_memory()
    launched = launcher()
    if parallel == 'ddp' and launched is None:
        raise UserError('--parallel ddp needs a launcher: torchrun --nproc_per_node N train.py ...')
    if launched and launched.world > 1 and parallel in ('none', 'dp'):
        raise UserError(f'--parallel {parallel} contradicts torchrun with {launched.world} processes')
    if graphs and launched and launched.world > 1:
        raise UserError('--cuda-graphs does not work with several processes; leave it out')
    if launched is None or parallel in ('none', 'dp'):
        chosen = current(pick_device(device))
        check_precision(precision, chosen)
        check_graphs(graphs, chosen)
        if chosen.type == 'cpu':
            note_load(os.getloadavg()[0], os.cpu_count() or 1, torch.get_num_threads())
        yield Place(chosen, graphs=graphs)
        return
    if launched.world > 1 and device.startswith('cuda:'):
        raise UserError(f'--device {device} is one GPU for all {launched.world} processes; use --device cuda')
    chosen = current(pick_device(f'cuda:{launched.local}' if device in ('auto', 'cuda') and torch.cuda.is_available()
                                 else device))
    if launched.rank == 0:
        check_precision(precision, chosen)
    check_graphs(graphs, chosen)
    join(chosen)
    try:
        yield Place(chosen, dist.get_rank(), dist.get_world_size(), graphs)
    except SystemExit:      # after any other error the other ranks may be waiting for this one; torchrun ends them
        dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def note_load(load, cores, threads):
    """Tells the user if torch's threads would wait for one another, because other programs use the cores."""
    if threads > 1 and load > 2 * cores:
        tell(f'this machine is busy (load {load:.0f} on {cores} cores); OMP_NUM_THREADS=1 in the environment may make '
             'this many times faster')


def check_graphs(graphs, device):
    """UserError if CUDA graphs are asked for and the device is no GPU."""
    if graphs and device.type != 'cuda':
        raise UserError(f'--cuda-graphs needs a GPU, this runs on {device}; leave it out')


def allow_open_files():
    """Raises the limit on open files up to 65536 where allowed: loader processes pass tensors as open files."""
    now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 ** 16 if most == resource.RLIM_INFINITY else min(2 ** 16, most)
    if now != resource.RLIM_INFINITY and now < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))


def keep_freed_memory():
    """Makes glibc keep freed memory for the next batch: returning and re-faulting it costs 5 % of a step on a CPU."""
    with contextlib.suppress(AttributeError, OSError, TypeError):      # another C library
        glibc = ctypes.CDLL(None)
        glibc.mallopt(M_TRIM_THRESHOLD, 2 ** 31 - 1)
        glibc.mallopt(M_MMAP_MAX, 0)


@dataclass(frozen=True)
class Launched:
    """What a launcher such as torchrun tells a process: its rank among `world`, and its `local` rank on its machine."""
    rank: int
    world: int
    local: int


def launcher():
    """The Launched of this process, None if it runs alone; UserError if the variables are incomplete or contradict."""
    found = {name: launch_number(name) for name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK')}
    rank, world, local = found.values()
    address = [name for name in ('MASTER_ADDR', 'MASTER_PORT') if not os.environ.get(name)]
    if (rank or 0) == 0 and (world or 1) == 1 and (None in (rank, world) or address):
        return None
    lacking = [name for name in ('RANK', 'WORLD_SIZE') if found[name] is None] + address
    given = ' '.join(f'{name}={value}' for name, value in found.items() if value is not None)
    if lacking:
        raise UserError(f'{given} in the environment without {" and ".join(lacking)}: start the processes with '
                        'torchrun, or unset the variables for one process')
    if not rank < world:
        raise UserError(f'{given} in the environment contradict: ranks go from 0 to WORLD_SIZE - 1; '
                        'start with torchrun')
    return Launched(rank, world, local or 0)


def launch_number(name):
    """The launcher's variable `name` as an int, or None if it is unset; UserError if it is not a whole number."""
    text = os.environ.get(name)
    if text is None or text.isdecimal():
        return text and int(text)
    raise UserError(f'{name}={text!r} in the environment is not a whole number; unset it, or start with torchrun')


def check_alone(tool):
    """UserError if this is one of several processes: each would do all the work of `tool` and write the same files."""
    world = launch_number('WORLD_SIZE') or 1
    if world > 1:
        raise UserError(f'{tool} works in one process, but WORLD_SIZE={world} in the environment; start it without '
                        'torchrun, or unset the variable')


def join(device):
    """Joins the launcher's process group; if torchrun is killed, this process gets SIGTERM, saves and ends."""
    backend = {'cuda': 'nccl', 'cpu': 'gloo'}.get(device.type)
    if backend is None:
        raise UserError(f'--device {device.type}: several processes need cpu or cuda; start without torchrun')
    if 'TORCHELASTIC_RUN_ID' in os.environ:
        end_with(os.getppid(), signal.SIGTERM)
    try:
        dist.init_process_group(backend)
    except (RuntimeError, ValueError) as error:
        meeting = f'{os.environ["MASTER_ADDR"]}:{os.environ["MASTER_PORT"]}'
        raise UserError(f'the processes cannot connect at {meeting} ({brief(error)}); check that '
                        'the port is free and the machines can reach it') from None


def tell(text):
    """Prints a line to standard error, in the first process only; works before a session too."""
    if os.environ.get('RANK', '0') == '0':
        print(text, file=sys.stderr)


def current(device):
    """Returns the device; if it names one GPU, makes it the current one, because pinned memory uses the current GPU."""
    if device.type == 'cuda' and device.index is not None:
        torch.cuda.set_device(device)
    return device


def pick_device(name):
    """The torch.device called `name`; 'auto' is a GPU if there is one, else the CPU. UserError if it is not usable."""
    if name == 'auto':
        return torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f'--device {name} is not a torch device; use auto, cpu, cuda, cuda:N, mps or xpu') from None
    if device.type == 'cuda' and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f'--device {name}: this machine has {torch.cuda.device_count()} CUDA devices; use --device cpu')
    try:
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:     # missing backends fail in many ways
        reason = ' '.join(str(error).split('.')[0].split())
        raise UserError(f'--device {name} cannot be used here ({reason[:150]}); use --device cpu') from None
    return device


class DataParallel(nn.DataParallel):
    """nn.DataParallel with one thread per GPU that lives on; nn.DataParallel starts new ones for every forward pass.

    torch keeps its choice of cuDNN's algorithms per thread and never frees it (2.11 to 2.14): new threads would
    search again in every pass, and fill the memory of the machine.
    """

    def __init__(self, task):
        super().__init__(task)
        self.threads = [ThreadPoolExecutor(1) for _ in range(torch.cuda.device_count())]

    def parallel_apply(self, replicas, inputs, kwargs):
        """The outputs of the replicas, each computed on its GPU by that GPU's thread."""
        learns = torch.is_grad_enabled()

        def output(gpu, replica, given, named):
            with torch.cuda.device(gpu), torch.set_grad_enabled(learns):
                return replica(*given, **named)

        waiting = [thread.submit(output, gpu, *work)
                   for gpu, (thread, *work) in enumerate(zip(self.threads, replicas, inputs, kwargs))]
        return [done.result() for done in waiting]


def wrap(task, place, parallel, unused=False, against=''):
    """Wraps the task for several devices: DDP under torchrun, DataParallel on several GPUs, else unchanged.

    unused: whether some batches leave trainable parameters without a gradient. DataParallel would
    give them a gradient of zeros, and Adam would still move them.
    against: what DataParallel would do wrong, in words; then one GPU is used instead.
    """
    if dist.is_initialized() and place.world > 1:
        devices = [place.device] if place.device.type == 'cuda' else None
        # Ranks get rank 0's running statistics before each validation (`broadcast_buffers`), not at every step.
        with warnings.catch_warnings():     # older versions do not know the new name, forward_sync_buffers
            warnings.filterwarnings('ignore', '.broadcast_buffers. is deprecated')
            return nn.parallel.DistributedDataParallel(task, device_ids=devices, find_unused_parameters=unused,
                                                       broadcast_buffers=False, gradient_as_bucket_view=True)
    several = place.device.type == 'cuda' and place.device.index is None and torch.cuda.device_count() > 1
    if not several or parallel not in ('auto', 'dp'):
        return task
    if not against:
        return DataParallel(task)
    print(f'using one GPU, because DataParallel would {against}; to use all: torchrun --nproc_per_node N train.py ...',
          file=sys.stderr)
    return task


def sharing(task, place, batch_size, sync_bn=False, domains=1):
    """One line on how devices share a batch; '' for a single device.

    task: the result of `wrap`. domains: how many share the batch.
    """
    if place.world > 1:
        each = batch_size // place.world
        norms = f'all {batch_size} (--sync-bn)' if sync_bn else f'its {each}'
        own = f", one of a decoder {(batch_size if sync_bn else each) // domains}" if domains > 1 else ''
        return (f'{place.world} processes take {each} of the {batch_size} images of a batch each; '
                f'a batch norm sees {norms}{own}')
    if not isinstance(task, nn.DataParallel):
        return ''
    parts = [len(part) for part in torch.arange(batch_size).chunk(torch.cuda.device_count())]
    return (f'{len(parts)} of {torch.cuda.device_count()} GPUs take {" + ".join(map(str, parts))} images of a batch, '
            'which is what a batch norm sees (DataParallel, in one process); faster: torchrun --nproc_per_node N '
            'train.py ...')


def agreed(numbers, place):
    """Whether all processes have the same list of ints."""
    if place.world == 1:
        return True
    own = torch.tensor(numbers, device=place.device)
    first = own.clone()
    dist.broadcast(first, 0)
    return not summed((own != first).sum(), place).item()


def reduced(task, last):
    """Context for a forward and backward pass: DDP reduces gradients across processes only in a step's `last` pass."""
    alone = isinstance(task, nn.parallel.DistributedDataParallel) and not last
    return task.no_sync() if alone else contextlib.nullcontext()


def broadcast_buffers(module, place):
    """Gives every rank the buffers (batch-norm statistics) of rank 0."""
    if place.world > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)


def summed(tensor, place):
    """Sums `tensor` over all ranks in place; returns it."""
    if place.world > 1:
        dist.all_reduce(tensor)
    return tensor
