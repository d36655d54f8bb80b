"""Speed and mIoU of networks exported by `python -m mdil export`, on the CPU: all formats in turn in one process.

    python -m benchmarks.export CHECKPOINT --domain camvid --data-root DATA \\
        [--threads 1 2 --rounds 7 --compile --json FILE]

Eager float32 is the network as predict.py runs it. The 8-bit file is calibrated on training images.
The mIoU is measured on the validation images, resized as train.py validates. All sides get the same
float images and the same number of threads. With one thread, processor time is measured, so that
other programs do not count.
"""
import importlib.metadata
import statistics
import tempfile
import time
from pathlib import Path

import torch
from tqdm import tqdm

from mdil.datasets.class_weights import equal_weights
from mdil.datasets.loading import EvalBatches, make_loader
from mdil.datasets.pairs import find_split
from mdil.datasets.segmentation import SegmentationDataset
from mdil.evaluation import export
from mdil.evaluation.evaluation import evaluate, load_network_and_domains
from mdil.evaluation.predictor import Predictor, trained_size
from mdil.evaluation.tables import number, plain
from mdil.models.exported import Exported, needed
from mdil.training.records import environment
from mdil.utils.errors import run_main
from mdil.utils.files import check_writable, write_json
from mdil.utils.parallel import Place
from mdil.utils.parser import Parser, data_options, data_paths, positive, rate
from mdil.utils.precision import cpu_features, memory_format

EAGER, PLACE = 'eager float32', Place(torch.device('cpu'))
FILES = {'onnxruntime': ('x.onnx', 'onnx'), 'OpenVINO float32': ('x.xml', 'openvino'),
         'OpenVINO int8': ('x8.xml', 'openvino')}
PACKAGES = 'onnx', 'onnxruntime', 'openvino', 'nncf'
BATCHES = 1, 6
# Feature flags of instructions that multiply 8-bit numbers: three for x86, two for Arm.
INT8 = 'avx_vnni', 'avx512_vnni', 'amx_int8', 'asimddp', 'i8mm'


def parse(argv=None):
    parser = Parser(prog='python -m benchmarks.export',
                    description='Images/s and mIoU of exported networks on the CPU.')
    parser.add_argument('state', metavar='CHECKPOINT', help='a checkpoint of train.py')
    parser.add_argument('--domain', required=True, metavar='NAME', help='the domain whose network is measured')
    parser.add_argument('--threads', nargs='+', type=positive, default=[1, 2],
                        help='numbers of threads to compute with, in turn')
    parser.add_argument('--rounds', type=positive, default=7, help='turns of each side')
    parser.add_argument('--seconds', type=rate, default=1.0, help='minimum seconds per turn')
    parser.add_argument('--compile', action='store_true', help='torch.compile, too; it takes minutes')
    parser.add_argument('--json', metavar='FILE', help='where the figures go')
    data_options(parser)
    options = parser.parse_args(argv)
    if options.json:
        check_writable('--json', options.json, inputs=[options.state])
    return options


def network_of(options):
    """(the domain's network in eval mode, its Domain, its training size (height, width))."""
    checkpoint, model, domains = load_network_and_domains(options.state, PLACE, data_paths(options.data))
    predictor = Predictor(model, domains, trained_size(checkpoint.content), PLACE)
    index = predictor.index(options.domain)
    return model.single(index).requires_grad_(False), domains[index], predictor.size


def write_files(options, domain, folder):
    """Writes FILES to `folder` with the command that users call."""
    images = folder / 'calibrate.txt'
    images.write_text(''.join(f'{pair.image.absolute()}\n'
                              for pair in find_split(domain, options.data_root, 'train').pairs))
    for side, (name, kind) in FILES.items():
        more = ['--int8', '--calibrate', str(images)] if 'int8' in side else []
        data = [word for item in options.data for word in ('--data', item)]
        export.main([options.state, str(folder / name), '--format', kind, '--domain', domain.name, *data, *more])


class Eager(torch.nn.Module):
    """A PyTorch network with the interface of an Exported."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    @torch.inference_mode()
    def forward(self, images, domain=0):
        return self.network(images.contiguous(memory_format=memory_format(PLACE.device, 'fp32')))


def sides_of(network, folder, options):
    """{name: callable that maps images (B, 3, H, W) to logits}; all use torch's number of threads."""
    sides = {EAGER: Eager(network)}
    if options.compile:
        sides['torch.compile'] = Eager(torch.compile(network, dynamic=False))
    return {**sides, **{side: Exported(folder / name) for side, (name, _) in FILES.items()}}


def images_per_second(side, images, seconds):
    """Images per second over whole batches of `images` that take at least `seconds`."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    count, start = 0, clock()
    while not count or clock() - start < seconds:
        side(images)
        count += len(images)
    return count / (clock() - start)


def speeds(sides, size, options):
    """{side: {batch size: [images/s in each round]}}."""
    found = {name: {batch: [] for batch in BATCHES} for name in sides}
    random = torch.Generator().manual_seed(0)
    for batch in BATCHES:
        images = torch.rand(batch, 3, *size, generator=random)
        for side in sides.values():     # warm-up: memory, compiling
            side(images)
        for _ in tqdm(range(options.rounds), desc=f'batch {batch}', leave=False, disable=None):
            for name, side in sides.items():
                found[name][batch].append(images_per_second(side, images, options.seconds))
    return found


def miou(side, domain, size, options):
    """mIoU in percent of a side on the validation images."""
    data = SegmentationDataset(domain, options.data_root, 'val', size)
    loader = make_loader(data, EvalBatches(len(data), BATCHES[-1]), 0, pin=False)
    return evaluate(side, 0, loader, equal_weights(domain.num_classes), PLACE, name=domain.name).miou()


def measure(network, domain, size, options):
    """({threads: result of `speeds`}, {side: mIoU})."""
    rates = {}
    with tempfile.TemporaryDirectory() as folder:
        write_files(options, domain, Path(folder))
        for threads in options.threads:
            torch.set_num_threads(threads)
            sides = sides_of(network, Path(folder), options)
            rates[threads] = speeds(sides, size, options)
        return rates, {name: miou(side, domain, size, options) for name, side in sides.items()}


def rows_of(rates, mious):
    """(header, rows) of a table of the result of `measure`."""
    rows = []
    for threads, sides in rates.items():
        for name, batches in sides.items():
            row = [threads, name]
            for batch, own in batches.items():
                ratios = [one / eager for one, eager in zip(own, sides[EAGER][batch])]
                row += [number(statistics.median(own), 1), f'{min(own):.1f}-{max(own):.1f}',
                        number(statistics.median(ratios), 2), f'{min(ratios):.2f}-{max(ratios):.2f}']
            rows.append([*row, number(mious[name], 2), f'{mious[name] - mious[EAGER]:+.2f}'])
    per_batch = [text for batch in BATCHES for text in (f'images/s, batch {batch}', 'spread', 'ratio', 'spread')]
    return ['threads', 'side', *per_batch, 'mIoU', 'difference'], rows


def main(argv=None):
    options = parse(argv)
    needed(*PACKAGES)
    network, domain, size = network_of(options)
    rates, mious = measure(network, domain, size, options)
    int8 = sorted(set(INT8) & cpu_features())
    print(f'{domain.name}, {size[1]}x{size[0]}; instructions for 8 bits: {", ".join(int8) or "none"}',
          plain(*rows_of(rates, mious)), sep='\n')
    if options.json:
        versions = {**environment(PLACE.device), **{name: importlib.metadata.version(name) for name in PACKAGES}}
        stated = {name: getattr(options, name) for name in ('domain', 'threads', 'rounds', 'seconds', 'compile')}
        write_json(options.json, {'options': stated, 'size': size, 'int8_instructions': int8, 'versions': versions,
                                  'images_per_second': rates, 'miou': mious})


if __name__ == '__main__':
    run_main(main)
