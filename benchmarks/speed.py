"""Speed of training and evaluation: the published loops and ours, in one process, in turn.

    python -m benchmarks.speed [--height 512 --batch-size 6 --rounds 7 --seconds 2 --json FILE]
    python -m benchmarks.speed --floor                  upper bounds set by FLOPs and bytes
    python -m benchmarks.speed --growth FIGURE          cost against the number of old domains, 1 to 8

`published` is the published way: recipe `released`, float32, eager, contiguous layout, the teacher's
output copied to the CPU and back, the device's cache emptied after each batch, and evaluation with
one-hot maps. `ours` runs in bf16 if the device is fast in it, and compiled with --compile. Both get the
same uint8 images and labels from the CPU. Every domain has 20 classes; step N has N - 1 old domains.
"""
import contextlib
import copy
import ctypes
import gc
import os
import statistics
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

from mdil import train
from mdil.benchmarks.floor import cache_size, traffic
from mdil.benchmarks.loading import SOURCES, published, write_pair
from mdil.datasets.cache import cached
from mdil.datasets.loading import TrainBatches, make_loader
from mdil.datasets.segmentation import SegmentationDataset
from mdil.evaluation import pictures
from mdil.evaluation.evaluation import evaluate
from mdil.evaluation.tables import number, plain
from mdil.models import build_model, erfnet
from mdil.training import building, domain_data
from mdil.training.options import recipe_settings
from mdil.training.records import environment
from mdil.training.step_loss import StepLoss
from mdil.utils.errors import UserError, run_main
from mdil.utils.files import check_writable, write_json
from mdil.utils.graphs import EAGER, graphed
from mdil.utils.parallel import pick_device, session
from mdil.utils.parser import Parser, complete_size, positive, rate, size_options
from mdil.utils.precision import memory_format, without_bf16
from mdil.utils.workers import CONTEXT

CLASSES = 20
WHAT = 'step 1', 'step 2', 'step 3', 'evaluation'
WARM = EAGER + 1        # first batches: algorithms are chosen, programs compiled, CUDA graphs recorded
VALIDATED = 84
PUBLISHED, OURS, REPEATABLE = 'published', 'ours', 'ours, --deterministic'


def published_batch(run, images, labels):
    """Trains on a batch the published way; returns its loss.

    Plain formulas, the teacher's output sent through the CPU, and one optimiser step on the sum of the
    terms or one on each, as the recipe says.
    """
    loss_of, total = run.step_loss, 0.0
    for part in run.published_steps:
        run.optimizer.zero_grad()
        loss = 0.0
        if part != 'kd':
            loss = F.cross_entropy(run.student(images, run.domain), labels.long(), loss_of.class_weights(run.domain))
        for old in reversed(range(run.domain if part != 'ce' else 0)):
            with torch.no_grad():
                target = run.teacher(images, old).cpu().to(images.device)
            loss = loss + run.options.lambdac * loss_of.terms['kd'].distance(run.student(images, old), target)
        loss.backward()
        run.optimizer.step()
        total += loss.item()
    return total


@contextlib.contextmanager
def unfolded():
    """Within this context, batch norms are not folded into convolutions but applied to their outputs, as published."""
    folded = erfnet.conv_bn
    erfnet.conv_bn = lambda bn, conv, x, *more: bn(sum((c(y) for c, y in more), conv(x)))
    try:
        yield
    finally:
        erfnet.conv_bn = folded


def settings(side, domains, options):
    """Options of train.py for a side, as far as building the networks needs them."""
    recipe, fast = ('released', False) if side == PUBLISHED else ('corrected', True)
    return SimpleNamespace(
        method='mdil', domains=[f'domain{n}' for n in range(domains)], lr=5e-4, shared_lr=5e-6,
        no_dropout=False, precision=options.precision if fast else 'fp32', compile=fast and options.compile,
        cuda_graphs=fast and options.cuda_graphs, distill_domains=options.distill_domains if fast else None,
        **recipe_settings(recipe, range(domains)))


def networks(domains, chosen):
    """(student, teacher or None) of step number `domains`."""
    torch.manual_seed(0)
    if domains == 1:
        student, teacher = build_model([CLASSES]), None
    else:
        teacher = build_model([CLASSES] * (domains - 1)).requires_grad_(False)
        student = copy.deepcopy(teacher).requires_grad_(True)
        student.add_domain(CLASSES)
    building.freeze(student, chosen)
    return student, teacher


def make_step_loss(side, domains, chosen, device):
    """The StepLoss of a side on a device."""
    student, teacher = networks(domains, chosen)
    weights = torch.linspace(1, 2, CLASSES)
    weights[-1] = 0
    loss = StepLoss(student, teacher, [weights] * domains, building.build_terms(chosen),
                    teacher_mode=chosen.teacher_mode, precision=chosen.precision, compiled=chosen.compile)
    return loss.to(device, memory_format=layout_of(side, torch.device(device), chosen.precision))


def layout_of(side, device, precision):
    """The memory format of a side's weights."""
    return torch.contiguous_format if side == PUBLISHED else memory_format(device, precision)


class Training:
    """One side's training in step number `domains`; a call trains on the same batch `count` times."""
    fewest = 1      # batches of a call that is timed

    def __init__(self, side, domains, options, place):
        self.options = chosen = settings(side, domains, options)
        self.side, self.place, self.domain = side, place, domains - 1
        self.step_loss = make_step_loss(side, domains, chosen, place.device).train()
        self.student, self.teacher, self.terms = (self.step_loss.student, self.step_loss.teacher,
                                                  list(self.step_loss.terms.values()))
        self.scaler = torch.amp.GradScaler(place.device.type, enabled=False)
        self.published_steps = ('ce', 'kd') if chosen.steps_per_batch == 2 else ('both',)
        self.optimizer, _ = building.build_optimizer(self.student, chosen)
        self.step = graphed(partial(train.train_batch, self), replace(place, graphs=chosen.cuda_graphs))

    def __call__(self, images, labels, count=1):
        torch.use_deterministic_algorithms(self.side == REPEATABLE, warn_only=True)
        torch.backends.cudnn.benchmark = self.side != REPEATABLE
        for _ in range(count):
            self.once(images, labels)

    def once(self, images, labels):
        device = self.place.device
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        if self.side == PUBLISHED:
            with unfolded():
                published_batch(self, images.float() / 255, labels)
            if device.type == 'cuda':
                torch.cuda.empty_cache()
        else:
            self.step(images, labels, self.domain)


class Evaluation:
    """One side's evaluation of a single-domain network; a call evaluates the same batch `count` times.

    With CUDA graphs, each call records the network anew, as each validation does. A call that is timed then takes as
    many batches as Cityscapes has in batches of 6.
    """

    def __init__(self, side, options, place):
        self.fewest = VALIDATED if options.cuda_graphs and side != PUBLISHED else 1
        self.side, self.place, self.options = side, replace(place, graphs=options.cuda_graphs), options
        self.weights = torch.ones(CLASSES, device=place.device)
        layout = layout_of(side, place.device, options.precision)
        self.network = build_model([CLASSES]).eval().to(place.device, memory_format=layout)

    def __call__(self, images, labels, count=1):
        if self.side == PUBLISHED:
            for _ in range(count):
                self.published(images.to(self.place.device), labels.to(self.place.device))
        else:
            batch = images, labels, torch.arange(len(images))
            evaluate(self.network, 0, [batch] * count, self.weights, self.place, self.options.precision)

    def published(self, images, labels):
        with unfolded(), torch.no_grad():
            published_evaluation(self.network, images, labels, self.weights)
        if self.place.device.type == 'cuda':
            torch.cuda.empty_cache()


def published_evaluation(network, images, labels, weights):
    """(loss, mean IoU) of a batch, computed with one-hot maps as in the published scripts."""
    logits = network(images.float() / 255, 0)
    loss = F.cross_entropy(logits, labels.long(), weights)
    answers, truth = (torch.zeros_like(logits).scatter_(1, index[:, None], 1)
                      for index in (logits.argmax(1), labels.long()))
    void = truth[:, -1:]
    answers, truth = answers[:, :-1], truth[:, :-1]
    hit = (answers * truth).sum((0, 2, 3))
    wrong = (answers * (1 - truth - void)).sum((0, 2, 3))
    missed = ((1 - answers) * truth).sum((0, 2, 3))
    return loss.item(), (hit / (hit + wrong + missed + 1e-15)).mean().item()


def side_of(side, what, options, place):
    """The Training or Evaluation of a side for `what`, one of WHAT or a later step."""
    if what == 'evaluation':
        return Evaluation(side, options, place)
    return Training(side, int(what.split()[1]), options, place)


def wait(place):
    """Waits until the device has finished its work."""
    if place.device.type == 'cuda':
        torch.cuda.synchronize(place.device)


def turn(run, batch, seconds, place):
    """Images per second over whole batches that take at least `seconds`.

    On a GPU, one untimed batch comes first, because the published side has emptied the cache.
    """
    if place.device.type == 'cuda':
        run(*batch)
    wait(place)
    done, start = 0, time.perf_counter()
    while not done or time.perf_counter() - start < seconds:
        run(*batch, run.fewest)
        done += run.fewest * len(batch[0])
        wait(place)
    return done / (time.perf_counter() - start)


class Peak:
    """Context whose `bytes` is the peak memory of the GPU (on the CPU: of the process) above that at its start."""

    def __init__(self, place):
        self.device, self.cuda = place.device, place.device.type == 'cuda'

    def resident(self, name):
        lines = Path('/proc/self/status').read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f'{name}:'))

    def __enter__(self):
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)
        else:
            ctypes.CDLL(None).malloc_trim(0)                    # returns freed memory first
            Path('/proc/self/clear_refs').write_text('5')       # resets the high-water mark
            self.before = self.resident('VmRSS')
        return self

    def __exit__(self, *_):
        highest = torch.cuda.max_memory_allocated(self.device) if self.cuda else self.resident('VmHWM')
        self.bytes = highest - self.before


def peak_of(side, what, options, place, batch):
    """Peak memory in GiB of a batch on one side, including networks and optimiser, measured alone."""
    with Peak(place) as peak:
        run = side_of(side, what, options, place)
        run(*batch, WARM)
        wait(place)
    return peak.bytes / 2 ** 30


def compare(what, options, place, batch):
    """{side: results} for one kind of work; the sides take turns in every round; ratios are to the published side."""
    sides = [PUBLISHED, OURS] + ([REPEATABLE] if options.deterministic and what != 'evaluation' else [])
    peaks = {side: peak_of(side, what, options, place, batch) for side in sides}
    runs = {side: side_of(side, what, options, place) for side in sides}
    for run in runs.values():
        run(*batch, WARM)
    rates = {side: [] for side in runs}
    for _ in tqdm(range(options.rounds), desc=what, leave=False, disable=None):
        for side, run in runs.items():
            rates[side].append(turn(run, batch, options.seconds, place))
    return {side: {'images_per_second': rates[side], 'peak_gib': peaks[side],
                   'ratios': [one / base for one, base in zip(rates[side], rates[PUBLISHED])]} for side in sides}


def ceilings(place, dtype):
    """(FLOP/s of a large matrix product in `dtype`, bytes/s read and written by a large copy) on the device."""
    device = place.device
    size = 8192 if device.type == 'cuda' else 2048
    a = torch.randn(size, size, device=device).to(dtype)
    source = torch.empty(2 ** 30 if device.type == 'cuda' else 2 ** 28, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    product = best_time(lambda: a @ a, place)
    copy_time = best_time(lambda: target.copy_(source), place)
    return 2 * size ** 3 / product, 2 * source.numel() / copy_time


def best_time(work, place, rounds=10):
    """Seconds of the fastest of `rounds` calls."""
    times = []
    for _ in range(rounds):
        wait(place)
        start = time.perf_counter()
        work()
        wait(place)
        times.append(time.perf_counter() - start)
    return min(times)


def floors(what, options, top, cache=0):
    """Minimum cost of one image: {'gflop', 'gb', 'seconds'}.

    top: what `ceilings` returns; cache: bytes of the device's cache.
    """
    return together(costs_of(what, options, cache), options, top)


def together(costs, options, top):
    """The result of `floors` from the costs of a batch."""
    batch, counts = options.batch_size, costs.values()
    return {'gflop': sum(c[0] for c in counts) / batch / 1e9, 'gb': sum(c[1] for c in counts) / batch / 1e9,
            'seconds': sum(max(flops / top[0], moved / top[1]) for flops, moved in counts) / batch}


def costs_of(what, options, cache):
    """{kind of operation: [FLOPs, bytes]} of a batch on our side, in the options' precision."""
    dtype = {'fp32': torch.float32, 'bf16': torch.bfloat16}[options.precision]
    images = torch.empty(options.batch_size, 3, options.height, options.width, dtype=dtype, device='meta')
    if what == 'evaluation':
        network = build_model([CLASSES]).eval().to('meta', dtype)
        with torch.no_grad():
            return traffic(lambda: network(images, 0), cache)
    domains = int(what.split()[1])
    chosen = settings(OURS, domains, SimpleNamespace(precision='fp32', compile=False, cuda_graphs=False,
                                                     distill_domains=None))
    loss = make_step_loss(OURS, domains, chosen, 'meta').to(dtype).train()
    labels = torch.empty(options.batch_size, options.height, options.width, dtype=torch.uint8, device='meta')
    old = range(min(domains - 1, options.distill_domains or domains - 1))
    parts = [('ce', None), *(('kd', domain) for domain in old)]
    return traffic(lambda: [loss(images, labels, domains - 1, *part)[0, 0].backward() for part in parts], cache)


def show_floor(options, top, cache):
    """Prints FLOPs and bytes per image for each kind of operation, and the speed that they allow."""
    for what in options.what:
        rows, costs = [], costs_of(what, options, cache)
        for name, (flops, moved) in costs.items():
            at_least = max(flops / top[0], moved / top[1])
            rows.append([name] + [number(value / options.batch_size, 3)
                                  for value in (flops / 1e9, moved / 1e9, 1e6 * at_least)])
        total = together(costs, options, top)
        rows.append(['together', number(total['gflop'], 3), number(total['gb'], 3), number(1e6 * total['seconds'], 3)])
        print(f'{what}: at most {1 / total["seconds"]:.1f} images/s')
        print(plain(['kernel, channels given, W x H', 'GFLOP', 'GB', 'microseconds'], rows) + '\n')


def starving(options, place):
    """{side: share of the time that step 1 waits for its data}; each side loads full-size PNGs in its own way."""
    size, shares = (options.height, options.width), {}
    with tempfile.TemporaryDirectory() as folder:
        for index in range(2 * options.batch_size):
            write_pair(Path(folder), SOURCES[0], index)
        data = SegmentationDataset(SOURCES[0].domain, folder, 'train', size, augmented=False)
        batches = TrainBatches(len(data), options.batch_size, seed=0)
        loaders = {PUBLISHED: DataLoader(Published(data.pairs, size), options.batch_size, shuffle=True, drop_last=True,
                                         num_workers=options.num_workers, persistent_workers=True,
                                         multiprocessing_context=CONTEXT, pin_memory=place.device.type == 'cuda'),
                   OURS: make_loader(cached(data, folder), batches, options.num_workers, place.device.type == 'cuda')}
        for side, loader in loaders.items():
            shares[side] = waiting_share(side, loader, Training(side, 1, options, place), data, place)
    return shares


class Published(torch.utils.data.Dataset):
    """Samples loaded the published way."""

    def __init__(self, pairs, size):
        self.pairs, self.size = pairs, size

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, index):
        image, label = published(self.pairs[index], self.size)
        return (255 * image).byte(), label[0], index


def waiting_share(side, loader, training, data, place):
    """Share of the time spent waiting for batches, over some epochs without the first."""
    waited = worked = 0.0
    for epoch in range(5):
        before = time.perf_counter()
        for images, labels, indices in loader:
            there = time.perf_counter()
            if side == OURS:
                source = SimpleNamespace(train=loader, domain=data.domain)
                images, labels = domain_data.on_device(source, (images, labels, indices), 0, epoch, place)
            training(images, labels)
            wait(place)
            after = time.perf_counter()
            if epoch:
                waited, worked = waited + there - before, worked + after - there
            before = after
    return waited / (waited + worked)


def growth(options, place, batch):
    """[{'old', side: {'seconds_per_image', 'peak_gib'}}] for 1 to 8 old domains."""
    ours_one = SimpleNamespace(**{**vars(options), 'distill_domains': 1})
    ways = {'published': (PUBLISHED, options), 'ours': (OURS, options), 'ours, --distill-domains 1': (OURS, ours_one)}
    found = []
    for old in tqdm(range(1, 9), desc='old domains', disable=None):
        entry = {'old': old}
        if options.compile:
            torch._dynamo.reset()       # drops the code compiled for fewer domains
        for name, (side, chosen) in ways.items():
            what = f'step {old + 1}'
            peak, run = peak_of(side, what, chosen, place, batch), side_of(side, what, chosen, place)
            run(*batch, WARM)
            rates = [turn(run, batch, options.seconds, place) for _ in range(options.rounds)]
            entry[name] = {'seconds_per_image': 1 / statistics.median(rates), 'peak_gib': peak}
        found.append(entry)
    return found


def draw_growth(found, path):
    """Writes the figure of `growth`."""
    figure = pictures.new_figure(figsize=(9, 3.4))
    axes = figure.subplots(1, 2)
    for name in list(found[0])[1:]:
        for axis, key, factor in ((axes[0], 'seconds_per_image', 1000), (axes[1], 'peak_gib', 1)):
            axis.plot([entry['old'] for entry in found], [factor * entry[name][key] for entry in found], 'o-',
                      label=name)
    for axis, label in zip(axes, ('ms per image', 'peak memory, GiB')):
        axis.set(xlabel='old domains', ylabel=label, ylim=(0, None))
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc='outside upper center', ncols=3, frameon=False)
    pictures.save_figure(path, figure)


def rows_of(result):
    """(header, rows) of the table of results; result: {kind of work: {'sides': of `compare`, 'floor'}}."""
    rows = []
    spread = lambda values, digits=1: f'{number(min(values), digits)}-{number(max(values), digits)}'
    for what, entry in result.items():
        floor = entry['floor']
        for side, figures in entry['sides'].items():
            rates, ratios = figures['images_per_second'], figures['ratios']
            median = statistics.median(rates)
            rows.append([what, side, number(median), spread(rates), number(statistics.median(ratios), 2),
                         spread(ratios, 2), number(figures['peak_gib'], 2), number(floor['gflop'] * median / 1e3, 2),
                         number(floor['gb'] * median, 1), number(1 / (median * floor['seconds']), 1)])
    return ['what', 'side', 'images/s', 'spread', 'ratio', 'spread', 'peak GiB', 'TFLOP/s', 'GB/s', 'x floor'], rows


def parse(argv=None):
    parser = Parser(prog='python -m benchmarks.speed', description=__doc__.splitlines()[0])
    size_options(parser)
    parser.add_argument('--batch-size', type=positive, default=6, help='images per batch')
    parser.add_argument('--what', nargs='+', choices=WHAT, default=list(WHAT), metavar='WHAT', help=', '.join(WHAT))
    parser.add_argument('--precision', choices=('fp32', 'bf16'),
                        help='of this code (default: bf16 where the device is fast in it)')
    parser.add_argument('--compile', action='store_true', help='compile this code')
    parser.add_argument('--cuda-graphs', action='store_true', help='run this code by CUDA graphs, on a GPU')
    parser.add_argument('--deterministic', action='store_true', help='train this code with --deterministic too')
    parser.add_argument('--distill-domains', type=positive, metavar='K', help='as in train.py, for this code')
    parser.add_argument('--device', default='auto', help='auto, cpu, cuda or cuda:N')
    parser.add_argument('--num-workers', type=positive, default=2, help='loader processes')
    parser.add_argument('--rounds', type=positive, default=7, help='turns of each side')
    parser.add_argument('--seconds', type=rate, default=2.0, help='minimum seconds per turn')
    parser.add_argument('--floor', action='store_true', help='only what bytes and FLOPs allow')
    parser.add_argument('--growth', metavar='FIGURE', help='only the cost against the number of old domains')
    parser.add_argument('--json', metavar='FILE', help='where the figures go')
    options = parser.parse_args(argv)
    complete_size(options)
    options.precision = options.precision or ('fp32' if without_bf16(pick_device(options.device)) else 'bf16')
    if options.floor and (options.json or options.growth):
        raise UserError('--floor prints and writes nothing; leave out --json and --growth')
    for name in ('json', 'growth'):
        if getattr(options, name):
            check_writable(f'--{name}', getattr(options, name))
    if options.growth:
        pictures.figure_format(options.growth)
    return options


def main(argv=None):
    options = parse(argv)
    if options.deterministic:
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
    with session(options.device, graphs=options.cuda_graphs) as place:
        dtype = torch.bfloat16 if options.precision == 'bf16' else torch.float32
        top, cache = ceilings(place, dtype), cache_size(place.device)
        print(f'{environment(place.device)["device"]}: matrix product {top[0] / 1e12:.2f} TFLOP/s '
              f'({options.precision}), copy {top[1] / 1e9:.1f} GB/s, cache {cache / 2 ** 20:.0f} MiB; '
              f'{options.width}x{options.height}, batch {options.batch_size}')
        if options.floor:
            show_floor(options, top, cache)
            return
        found = {'command': vars(options), 'environment': environment(place.device),
                 'ceilings': {'flops': top[0], 'bytes_per_second': top[1]}}
        random = torch.Generator().manual_seed(0)
        size = options.batch_size, options.height, options.width
        batch = (torch.randint(0, 256, (size[0], 3, *size[1:]), dtype=torch.uint8, generator=random),
                 torch.randint(0, CLASSES, size, dtype=torch.uint8, generator=random))
        if place.device.type == 'cuda':
            batch = tuple(tensor.pin_memory() for tensor in batch)      # as loaders do
        if options.compile:
            torch._dynamo.config.fail_on_recompile_limit_hit = True     # instead of running uncompiled
        if options.growth:
            found['growth'] = growth(options, place, batch)
            draw_growth(found['growth'], options.growth)
            print(growth_table(found['growth']))
        else:
            found['work'] = {what: {'sides': compare(what, options, place, batch),
                                    'floor': floors(what, options, top, cache)} for what in options.what}
            print(plain(*rows_of(found['work'])))
            if 'step 1' in options.what:
                found['waiting'] = starving(options, place)
                print('share of step 1 that waits for data: '
                      + ', '.join(f'{side} {100 * share:.0f} %' for side, share in found['waiting'].items()))
        if options.json:
            write_json(options.json, found)


def growth_table(found):
    """The results of `growth` as a text table."""
    names = list(found[0])[1:]
    rows = [[entry['old']] + [number(value, 2) for name in names
                              for value in (1000 * entry[name]['seconds_per_image'], entry[name]['peak_gib'])]
            for entry in found]
    return plain(['old domains'] + [text for name in names for text in (f'{name}, ms', 'GiB')], rows)


if __name__ == '__main__':
    run_main(main)
