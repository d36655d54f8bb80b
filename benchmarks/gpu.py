"""What only a GPU can show: that everything runs on one, and how fast.

    bash benchmarks/gpu.sh [DIR]            all parts, within 9 minutes; --rehearse: small, on the CPU
    python -m benchmarks.gpu PART --out DIR

The parts, most valuable first: smoke, speed, loading, repeat, compiled, sequence; `table` prints the
results so far. The script runs each part as a process with a time limit. Every result is appended to
DIR/gpu.jsonl at once, so an aborted run keeps what it had.
"""
import contextlib
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch

from mdil import train
from mdil.benchmarks import speed
from mdil.datasets.cache import cached
from mdil.datasets.loading import TrainBatches, make_loader
from mdil.datasets.segmentation import SegmentationDataset
from mdil.datasets.toy.roads import write_toy_roads
from mdil.evaluation.tables import plain
from mdil.models import METHODS
from mdil.training import domain_data
from mdil.training.records import environment
from mdil.training.step_loss import mean_over_batch
from mdil.utils.errors import UserError, advice, brief, run_main
from mdil.utils.graphs import EAGER, Graphed
from mdil.utils.parallel import Place, session
from mdil.utils.parser import Parser, natural
from mdil.utils.precision import PRECISIONS

GRAPHS = '--cuda-graphs', '--limit-batches', '5', '--batch-size', '2'
RUNNING_OUT = 0.01      # share of the GPU's memory that the out-of-memory trial may use


class Report:
    """Appends a line of JSON to DIR/gpu.jsonl for every result."""

    def __init__(self, folder, part):
        self.path, self.part = Path(folder) / 'gpu.jsonl', part

    def add(self, name, **figures):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, 'a') as file:
            file.write(json.dumps({'part': self.part, 'name': name, **figures}) + '\n')
        print(f'{self.part}, {name}: {figures}', flush=True)

    def attempt(self, name, work, *arguments):
        """Calls `work(*arguments)`; records the dict that it returns, or how it failed, and the seconds it took."""
        start = time.perf_counter()
        try:
            figures = work(*arguments)
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            figures = {'failed': f'{type(error).__name__}: {brief(error, 400)}',
                       'where': f'{Path(last.filename).name}:{last.lineno}'}
        self.add(name, **figures, seconds=round(time.perf_counter() - start, 2))
        release()


def release():
    """Frees the memory of the last measurement."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# Smoke: every method in every precision, CUDA graphs, resuming, agreement with the CPU, running out of memory.

class Smoke:
    """Trains on toy roads with `train.main`, in this process, two batches per run unless told otherwise."""

    def __init__(self, folder, device):
        self.folder, self.device = Path(folder), device
        write_toy_roads(self.folder / 'toy', train=8, val=2, height=64, width=128, seed=1)

    def train(self, name, *arguments):
        """(folder, losses of the last epoch) of a run."""
        out = self.folder / name.replace(' ', '-')
        train.main(['--data-root', str(self.folder / 'toy'), '--savedir', str(out), '--height', '64', '--num-epochs',
                    '1', '--limit-batches', '2', '--batch-size', '4', '--num-workers', '0', '--device', self.device,
                    *map(str, arguments)])
        line = json.loads((out / 'metrics.jsonl').read_text().splitlines()[-1])
        return out, {name: round(value, 5) for name, value in line['train'].items()}

    def first(self, method):
        """The checkpoint of step 1 for the method's network, trained on first use."""
        row = METHODS[method]
        folder = self.folder / f'first-{row.adapter}-{row.domain_bn}'
        if not folder.exists():
            self.train(folder.name, '--method', method, '--domains', 'cityscapes')
        return folder / 'checkpoint.pth.tar'

    def second(self, method, *more):
        """Losses of the method's second step, or of the only step of a single-task or joint method."""
        row, name, domains = METHODS[method], ' '.join([method, *more]), ['cityscapes', 'BDD']
        if row.one_domain or row.joint:
            return self.train(name, '--method', method, '--domains', *domains[:1 if row.one_domain else 2], *more)[1]
        return self.train(name, '--method', method, '--domains', *domains, '--state', self.first(method), *more)[1]

    def third(self, recipe):
        """Losses of a third step."""
        state = self.folder / 'mdil---precision-fp32' / 'checkpoint.pth.tar'
        return self.train(f'third {recipe}', '--method', 'mdil', '--recipe', recipe, '--state', state,
                          '--domains', 'cityscapes', 'BDD', 'IDD')[1]

    def resume(self, *more):
        """Largest difference between the weights of a resumed and of an uninterrupted run."""
        states = []
        for name in ('whole', 'broken'):
            arguments = [f'{name} {len(more)}', '--domains', 'cityscapes', '--num-epochs', '2', '--deterministic',
                         *more]
            out, _ = self.train(*arguments)
            if name == 'broken':
                (out / 'checkpoint.previous.pth.tar').replace(out / 'checkpoint.pth.tar')
                self.train(*arguments, '--resume')
            states.append(torch.load(out / 'checkpoint.pth.tar', weights_only=True)['state_dict'])
        apart = max((states[0][key].double() - states[1][key].double()).abs().max().item() for key in states[0])
        return {'largest_difference': apart, **({'failed': 'the resumed run differs'} if apart else {})}

    def out_of_memory(self):
        """The line that a user reads if the GPU has too little memory."""
        torch.cuda.set_per_process_memory_fraction(RUNNING_OUT)
        try:
            self.train('too large', '--domains', 'cityscapes', '--height', '512', '--batch-size', '8')
        except torch.cuda.OutOfMemoryError as error:
            return {'line': advice(error)}
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        return {'failed': 'it fitted'}


def agreement(device, dtype, tf32=False):
    """How far losses, gradients and predictions of step 3 are from the CPU's, with the same weights and batch."""
    torch.manual_seed(0)
    images, labels = random_batch(2, 64)
    loss = speed.make_step_loss(speed.OURS, 3, settings(3), 'cpu').to(dtype)
    with torch.no_grad():
        for parameter in loss.student.shared_parameters():
            parameter.mul_(1.05)
    for module in loss.modules():
        if isinstance(module, torch.nn.Dropout2d):
            module.p = 0.0
    with arithmetic(Way('', tf32=tf32)):
        found = {where: outcome(loss.to(where), images.to(where, dtype) / 255, labels.to(where))
                 for where in ('cpu', device)}
    (losses, gradients, logits), (other_losses, other_gradients, other_logits) = found['cpu'], found[device]
    length = sum(gradient.square().sum() for gradient in gradients).sqrt()
    apart = sum((a - b).square().sum() for a, b in zip(gradients, other_gradients)).sqrt()
    return {'losses': losses, 'losses_device': other_losses, 'gradients_apart': (apart / length).item(),
            'logits_apart': (logits - other_logits).abs().max().item(),
            'other_answers': (logits.argmax(1) != other_logits.argmax(1)).double().mean().item()}


def outcome(loss, images, labels):
    """(losses, gradients, logits) of a batch; gradients and logits as float64 on the CPU."""
    loss.train().zero_grad()
    parts = [loss(images, labels, 2, *part) for part in (('ce',), ('kd', 0), ('kd', 1))]
    terms = [mean_over_batch(part, Place(images.device))[0] for part in parts]
    sum(terms).backward()
    gradients = [p.grad.double().cpu() for p in loss.student.parameters() if p.grad is not None]
    with torch.inference_mode():
        logits = loss.eval().student(images, 2).double().cpu()
    return [term.item() for term in terms], gradients, logits


def smoke(report, options):
    device, cuda = options.device, options.device == 'cuda'
    for name, dtype, tf32 in (('float64', torch.float64, False), ('float32', torch.float32, False),
                              ('TF32', torch.float32, True)):
        report.attempt(f'agreement with the CPU, {name}', agreement, device, dtype, tf32)
    with tempfile.TemporaryDirectory() as folder:
        runs = Smoke(folder, device)
        every_precision(report, runs, 'mdil', cuda)
        for recipe in ('corrected', 'released'):
            report.attempt(f'step 3, {recipe}', runs.third, recipe)
        report.attempt('augmented on the device', runs.second, 'mdil', '--augment', 'device')
        report.attempt('going on', runs.resume)
        if cuda:
            report.attempt('going on, graphs', runs.resume, *GRAPHS)
            report.attempt('recording while memory is pinned', recording, device)
            report.attempt('out of memory', runs.out_of_memory)
        for method in ['fine-tune'] if options.rehearse else [name for name in METHODS if name != 'mdil']:
            every_precision(report, runs, method, cuda)


def every_precision(report, runs, method, cuda):
    """Trains the last step of a method in every precision and by graphs; on the CPU in float32 alone."""
    for precision in PRECISIONS if cuda else ('fp32',):
        report.attempt(f'{method} {precision}', runs.second, method, '--precision', precision)
    if cuda:
        report.attempt(f'{method} bf16, graphs', runs.second, method, '--precision', 'bf16', *GRAPHS)


def recording(device):
    """Records CUDA graphs while another thread pins memory, as a loader's does; how often each was done."""
    ended = threading.Event()

    def pin():
        times = 0
        while not ended.is_set():
            torch.empty(2 ** (12 + times % 12)).pin_memory()
            times += 1
        return times

    with ThreadPoolExecutor(1) as pool:
        pinned = pool.submit(pin)
        try:
            for _ in range(20):
                step = Graphed(lambda x: sum(number * x for number in range(300)))
                for _ in range(EAGER + 1):
                    step(torch.ones(4, device=device))
        finally:
            ended.set()
        return {'recorded': 20, 'pinned': pinned.result()}


# Speed: the published loop and ours, measured in turn.

@dataclass(frozen=True)
class Way:
    """One way to do the same work; published: as the published loops do it; repeatable: with --deterministic."""
    name: str
    precision: str = 'bf16'
    compile: bool = False
    graphs: bool = False
    tf32: bool = True
    published: bool = False
    repeatable: bool = False

    @property
    def on_cpu(self):
        """Whether a rehearsal on the CPU includes it."""
        return not (self.compile or self.graphs or self.precision == 'bf16')


WAYS = [Way('published', 'fp32', published=True), Way('published, no TF32', 'fp32', published=True, tf32=False),
        Way('ours, fp32', 'fp32'), Way('ours, fp32, graphs', 'fp32', graphs=True), Way('ours, bf16'),
        Way('ours, bf16, graphs', graphs=True), Way('ours, bf16, compiled', compile=True),
        Way('ours, --fast', compile=True, graphs=True)]


def settings(domains, precision='fp32', compiled=False):
    """Options of train.py for our side, as far as building the networks needs them."""
    return speed.settings(speed.OURS, domains, SimpleNamespace(precision=precision, compile=compiled,
                                                               cuda_graphs=False, distill_domains=None))


def random_batch(size, height, pin=False):
    """Images (B, 3, H, 2H) and labels (B, H, 2H), uint8, as a loader returns them."""
    random = torch.Generator().manual_seed(0)
    batch = (torch.randint(0, 256, (size, 3, height, 2 * height), dtype=torch.uint8, generator=random),
             torch.randint(0, speed.CLASSES, (size, height, 2 * height), dtype=torch.uint8, generator=random))
    return tuple(tensor.pin_memory() for tensor in batch) if pin else batch


def work_of(way, what, place):
    """A callable work(images, labels, count) that does a batch of `what` `count` times in one way."""
    chosen = SimpleNamespace(precision=way.precision, compile=way.compile, cuda_graphs=way.graphs, distill_domains=None)
    side = speed.PUBLISHED if way.published else speed.REPEATABLE if way.repeatable else speed.OURS
    return speed.side_of(side, what, chosen, place)


@contextlib.contextmanager
def arithmetic(way):
    """Switches TF32 convolutions on or off as the way says."""
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, way.tf32
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def timed(work, batch, count, place):
    """Images per second over `count` batches; waits for the device only before and after them."""
    speed.wait(place)
    start = time.perf_counter()
    work(*batch, count)
    speed.wait(place)
    return count * len(batch[0]) / (time.perf_counter() - start)


def warmed_up(way, what, place, batch):
    """(`work_of` the way, {'start_seconds': of the first batches, 'peak_gib': GPU memory, on a GPU})."""
    start = time.perf_counter()
    release()
    before = torch.cuda.memory_allocated() if place.device.type == 'cuda' else 0
    if place.device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats()
    with arithmetic(way):
        work = work_of(way, what, place)
        work(*batch, 4)
        speed.wait(place)
    figures = {'start_seconds': round(time.perf_counter() - start, 1)}
    if place.device.type == 'cuda':
        figures['peak_gib'] = round((torch.cuda.max_memory_allocated() - before) / 2 ** 30, 2)
    return work, figures


def compare(report, what, ways, place, batch, options):
    """Times the ways in turn, round by round; records each with its ratios to the first way."""
    works, figures, rates = {}, {}, {}
    for way in ways:
        try:
            works[way], figures[way] = warmed_up(way, what, place, batch)
        except (RuntimeError, UserError) as error:
            report.add(f'{what}: {way.name}', failed=brief(error, 400))
    for _ in range(options.rounds):
        for way, work in works.items():
            with arithmetic(way):
                one = len(batch[0]) / timed(work, batch, 1, place)
                count = max(2, work.fewest, min(50, round(options.seconds / one)))
                rates.setdefault(way, []).append(timed(work, batch, count, place))
    for way, values in rates.items():
        ratios = [value / base for value, base in zip(values, rates.get(ways[0], ()))]
        report.add(f'{what}: {way.name}', images_per_second=spread(values, 1), **figures[way],
                   **({'ratio': spread(ratios, 2)} if ratios else {}))
    release()


def spread(values, digits):
    """[median, minimum, maximum]."""
    return [round(value, digits) for value in (statistics.median(values), min(values), max(values))]


def measure_speed(report, options, compiled=False):
    """Images per second of the first way and of those that are compiled or, without `compiled`, that are not."""
    with session(options.device) as place:
        cuda = place.device.type == 'cuda'
        report.add('environment', **environment(place.device), command=sys.argv[1:], **card())
        if cuda and not compiled:
            top = speed.ceilings(place, torch.bfloat16)
            report.add('ceilings, bf16', flops=top[0], bytes_per_second=top[1])
            for what in options.what:
                floor = speed.floors(what, SimpleNamespace(**vars(options), precision='bf16', distill_domains=None),
                                     top, speed.cache_size(place.device))
                report.add(f'{what}: floor', images_per_second=[round(1 / floor['seconds'], 1)])
        batch = random_batch(options.batch_size, options.height, pin=cuda)
        ways = [way for way in WAYS if way == WAYS[0] or way.compile == compiled and (cuda or way.on_cpu)]
        for what in options.what:
            if not compiled:
                compare(report, what, ways, place, batch, options)
            elif what != 'evaluation':          # only training is compiled
                for way in reversed(ways[1:]):          # one by one, as the first alone may fill the time
                    compare(report, what, [ways[0], way], place, batch, options)


def card():
    """Name, driver and memory of the GPU; {} without one."""
    query = ['nvidia-smi', '--query-gpu=name,driver_version,memory.total', '--format=csv,noheader']
    try:
        return {'card': subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()}
    except (OSError, subprocess.CalledProcessError):
        return {}


# Loading: whether the GPU waits for its images.

def loading(report, options):
    """Share of the time that step 1 waits for images from the cache, augmented on the device; on a GPU with graphs."""
    with tempfile.TemporaryDirectory() as folder, session(options.device) as place:
        for index in range(2 if options.rehearse else 4):
            speed.write_pair(Path(folder), speed.SOURCES[0], index)
        data = SegmentationDataset(speed.SOURCES[0].domain, folder, 'train', (options.height, options.width),
                                   augmented=False)
        data.pairs = tuple(data.pairs) * (1 if options.rehearse else 24)
        stored, cuda = cached(data, folder), place.device.type == 'cuda'
        feed = SimpleNamespace(domain=data.domain, train=SimpleNamespace(dataset=stored))
        way = Way('', graphs=True) if cuda else Way('', 'fp32')
        work, batch = work_of(way, 'step 1', place), random_batch(options.batch_size, options.height, cuda)
        for workers in options.workers[:1] if options.rehearse else options.workers:
            loader = make_loader(stored, TrainBatches(len(stored), options.batch_size, seed=0), workers, cuda)
            shares = []
            for epoch in range(4):
                rate, start = timed(work, batch, len(loader), place), time.perf_counter()
                for loaded in loader:
                    work(*domain_data.on_device(feed, loaded, 0, epoch, place))
                speed.wait(place)
                if epoch:       # the first epoch also starts the workers
                    shares.append(1 - len(stored) / (time.perf_counter() - start) / rate)
            report.add(f'{workers} workers', waiting=spread(shares, 3))


# Repeatability.

def repeat(report, options):
    """Whether --deterministic gives bit-identical results twice in step 2, and what it costs."""
    os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
    with session(options.device) as place:
        batch = random_batch(options.batch_size, options.height, pin=place.device.type == 'cuda')
        for precision in ('fp32',) if options.rehearse else ('fp32', 'bf16'):
            for deterministic in (False, True):
                way = Way('', precision, repeatable=deterministic)
                (first, rate), (second, other) = (five_batches(way, place, batch) for _ in range(2))
                same = torch.equal(first, second)
                report.add(f'{precision}{", deterministic" if deterministic else ""}',
                           same_bits=same, apart=(first - second).abs().max().item(),
                           images_per_second=spread([rate, other], 1),
                           **({'failed': 'two runs differ'} if deterministic and not same else {}))


def five_batches(way, place, batch):
    """(the student's parameters after five batches of step 2, images per second of five more)."""
    torch.manual_seed(0)
    run = work_of(way, 'step 2', place)
    for _ in range(5):
        run(*batch)
    parameters = torch.cat([p.detach().flatten().cpu() for p in run.student.parameters()])
    return parameters, timed(run, batch, 5, place)


# The small real sequence, if its data is available.

def sequence(report, options):
    """mIoU after each step of cityscapes, camvid, idd-lite at 512x256, seed 0, about 9,000 images per step."""
    if not options.real or not Path(options.real).is_dir():
        report.add('left out', reason='no --real DIR with the small real data')
        return
    domains, images = {'cityscapes': 60, 'camvid': 367, 'idd-lite': 702}, 60 if options.rehearse else 9000
    size = options.height // 2
    with tempfile.TemporaryDirectory() as folder:
        for method in ('mdil', 'adapters-only', 'fine-tune'):
            state = []
            for step, name in enumerate(domains, 1):
                out, start = Path(folder) / f'{method}-{step}', time.perf_counter()
                train.main(['--domains', *list(domains)[:step], '--method', method, '--data-root', options.real,
                            '--savedir', str(out), '--height', str(size),
                            '--num-epochs', str(max(1, images // domains[name])),
                            '--val-every', '1000', '--cache', str(Path(folder) / 'cache'), '--device', options.device,
                            '--num-workers', '4' if options.device == 'cuda' else '0',
                            *(['--precision', 'bf16', '--augment', 'device', '--cuda-graphs']
                              if options.device == 'cuda' else ['--limit-batches', '2']), *state])
                state = ['--state', str(out / 'checkpoint.pth.tar')]
                line = json.loads((out / 'metrics.jsonl').read_text().splitlines()[-1])
                report.add(f'{method}, step {step}',
                           miou={key: round(value['miou'], 2) for key, value in line['val'].items()},
                           seconds=round(time.perf_counter() - start, 1))


def table(report, options):
    """Prints the results in DIR/gpu.jsonl: failures first, then speeds, loading and the sequence."""
    if not report.path.is_file():
        raise UserError(f'{report.path} does not exist; measure something first')
    lines = [json.loads(text) for text in report.path.read_text().splitlines()]
    failed = [[line['part'], line['name'], line['failed']] for line in lines if 'failed' in line]
    print(plain(['part', 'failed', 'how'], failed) if failed else 'nothing failed')
    rows = [[line['name'], *[' '.join(map(str, line.get(key, ['']))) for key in ('images_per_second', 'ratio')],
             line.get('peak_gib', ''), line.get('start_seconds', '')]
            for line in lines if line['part'] in ('speed', 'compiled', 'repeat') and 'images_per_second' in line]
    print(plain(['what', 'images/s: median, least, greatest', 'times published', 'GiB', 'start, s'],
                [[str(cell) for cell in row] for row in rows]))
    for line in lines:
        if line['part'] in ('loading', 'sequence') and 'failed' not in line:
            print(line['part'], line['name'], line.get('waiting') or line.get('miou') or line.get('reason'), sep=', ')


PARTS = {'smoke': smoke, 'speed': measure_speed, 'loading': loading, 'repeat': repeat,
         'compiled': partial(measure_speed, compiled=True), 'sequence': sequence, 'table': table}


def main(argv=None):
    parser = Parser(prog='python -m benchmarks.gpu', description=__doc__.splitlines()[0])
    parser.add_argument('part', choices=PARTS, help='what to measure')
    parser.add_argument('--out', default='runs/gpu', metavar='DIR', help='where gpu.jsonl goes')
    parser.add_argument('--rehearse', action='store_true', help='small and on the CPU, to try the script')
    parser.add_argument('--real', metavar='DIR', help='the small real data, for the sequence')
    parser.add_argument('--what', nargs='+', choices=speed.WHAT, default=['step 3', 'evaluation', 'step 1', 'step 2'],
                        metavar='WHAT', help='of speed and compiled: ' + ', '.join(speed.WHAT))
    parser.add_argument('--workers', nargs='+', type=natural, default=[4, 8], metavar='N', help='of loading')
    options = parser.parse_args(argv)
    small = options.rehearse
    options.device, options.height, options.batch_size = ('cpu', 64, 2) if small else ('cuda', 512, 6)
    options.width, options.rounds, options.seconds = 2 * options.height, 1 if small else 7, 0.01 if small else 0.15
    PARTS[options.part](Report(options.out, options.part), options)


if __name__ == '__main__':
    run_main(main)
