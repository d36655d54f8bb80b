"""How often the domain of an image is detected correctly, and how often a domain that was never learnt is noticed.

    python -m benchmarks.identify --data-root DATA --domains cityscapes camvid idd-lite --out identify.json
    python -m benchmarks.identify --data-root DATA --domains cityscapes camvid idd-lite --alike --out alike.json
    python -m benchmarks.identify ... --state CKPT      # the network whose layers are compared (default: random)

Statistics and thresholds come from the training images only, the results from the validation images.
Each domain is left out once: `unknown` is the percentage of its images that the statistics of the
others call unknown. `--alike` first stores all images as JPEG files of the same size, so that file
formats cannot give the domain away.
"""
import io
import time

import torch
from PIL import Image
from tqdm import tqdm

from mdil.datasets import get_domain
from mdil.datasets.pairs import find_split
from mdil.datasets.segmentation import open_image
from mdil.models import build_model
from mdil.models.checkpoint import load_network, read_checkpoint
from mdil.models.identify import Identifier, Sequence, appearance, statistics
from mdil.models.networks import DEFAULT as ERFNET
from mdil.training.records import environment
from mdil.utils.errors import UserError, run_main
from mdil.utils.files import check_new, write_json
from mdil.utils.parser import Parser, data_options, data_paths, natural, positive

ALIKE, QUALITY = (320, 160), 60     # width, height and JPEG quality of --alike
SIZES = (128, 64), (512, 256), (1024, 512)       # width, height at which to measure the network's cost
INPUT = (128, 64)                   # width, height of the network's input
# Layers of the encoder: 8 is at 1/8 of the resolution, 16 is the last.
LAYERS = {'layer 1': 1, 'layers 1, 2': 2, 'layer 8': 8, 'layer 16': 16}


def parse(argv=None):
    parser = Parser(prog='python -m benchmarks.identify', description='How well the domain is told from an image.')
    parser.add_argument('--domains', nargs='+', required=True, metavar='NAME', help='domains that are told apart')
    parser.add_argument('--state', metavar='CKPT',
                        help='network whose layers and branches are compared (default: random)')
    parser.add_argument('--look-alone', action='store_true', help='leave out the layers and branches of the network')
    parser.add_argument('--alike', action='store_true', help='store all images alike first')
    parser.add_argument('--frames', type=positive, default=10, help='images of a sequence')
    parser.add_argument('--seed', type=natural, default=0, help='seed of the random network')
    parser.add_argument('--out', required=True, metavar='FILE', help='JSON file to write')
    parser.add_argument('--overwrite', action='store_true', help='replace it')
    data_options(parser)
    options = parser.parse_args(argv)
    if len(options.domains) < 2:
        raise UserError('--domains needs two names or more: each is also left out once')
    return options


def stored_alike(image):
    """The image after it was resized to ALIKE and stored as JPEG."""
    file = io.BytesIO()
    image.resize(ALIKE, Image.BILINEAR).save(file, 'JPEG', quality=QUALITY)
    return Image.open(file).convert('RGB')


def network(options, domains):
    """The network of --state, or a random one."""
    if options.state:
        checkpoint = read_checkpoint(options.state)
        if checkpoint.layout.network != ERFNET:
            raise UserError(f'{options.state} holds the network {checkpoint.layout.network}; the layers compared here '
                            f'are those of {ERFNET}; choose another file')
        return load_network(checkpoint).eval()
    torch.manual_seed(options.seed)
    return build_model([domain.num_classes for domain in domains]).eval()


def tensor(image):
    """The image as input of the network: (1, 3, H, W) in [0, 1]."""
    pixels = torch.frombuffer(bytearray(image.resize(INPUT, Image.BILINEAR).tobytes()), dtype=torch.uint8)
    return pixels.view(1, INPUT[1], INPUT[0], 3).permute(0, 3, 1, 2).float() / 255


def layer_statistics(model, image):
    """{name in LAYERS: mean and standard deviation of every channel, float64} in the first domain's encoder."""
    encoder, x, found, parts = model.single(0).encoder, tensor(image), {}, []
    for number, layer in enumerate([encoder.initial_block, *encoder.layers], 1):
        x = layer(x)
        parts = [*parts[-1:], torch.cat([x.mean(dim=(2, 3)), x.std(dim=(2, 3))], dim=1)[0].double()]
        for name, wanted in LAYERS.items():
            if wanted == number:
                found[name] = torch.cat(parts) if wanted == 2 else parts[-1]
    return found


def branch_scores(model, image):
    """{'batch norms', 'confidence': (domains,)}: two scores of how well each branch fits an image; higher is better."""
    found = [branch_score(model.single(number), tensor(image)) for number in range(len(model.num_classes))]
    return {name: torch.stack([entry[name] for entry in found]) for name in found[0]}


def branch_score(view, x):
    """The two scores of one branch for an input x, 0-d tensors."""
    distances = []
    hooks = [norm.register_forward_pre_hook(lambda norm, args: distances.append(divergence(norm, args[0])))
             for norm in (view.encoder.initial_block.bn, view.encoder.layers[0].bn, view.encoder.layers[6].bn)]
    confidence = view(x)[0, :-1].softmax(dim=0).amax(dim=0).mean()
    for hook in hooks:
        hook.remove()
    return {'batch norms': -sum(distances), 'confidence': confidence}


def divergence(norm, x):
    """KL divergence, summed over channels, of x (1, C, H, W) from a batch norm's running statistics, as Gaussians."""
    mean, var = x.mean(dim=(0, 2, 3)), x.var(dim=(0, 2, 3)) + norm.eps
    known = norm.running_var + norm.eps
    return (0.5 * (torch.log(known / var) + (var + (mean - norm.running_mean).square()) / known - 1)).sum()


@torch.inference_mode()
def observe(domain, split, model, options):
    """({kind of features: (N, d)}, {kind: branch scores (N, domains)}, CPU ms per look) of a domain's split."""
    looks, scores, seconds = [], [], 0.0
    for pair in tqdm(find_split(domain, options.data_root, split).pairs, desc=f'{domain.name} {split}', disable=None):
        image = stored_alike(open_image(pair.image)) if options.alike else open_image(pair.image)
        start = time.process_time()
        look = appearance(image)
        seconds += time.process_time() - start
        looks.append({'look': look, **({} if options.look_alone else layer_statistics(model, image))})
        if split == 'val' and not options.look_alone:
            scores.append(branch_scores(model, image))
    gather = lambda entries: {name: torch.stack([entry[name] for entry in entries]) for name in (entries or [{}])[0]}
    return gather(looks), gather(scores), 1000 * seconds / len(looks)


@torch.inference_mode()
def network_cost(model):
    """{size: CPU ms for one image through the network with one branch, decoder included}."""
    costs = {}
    for width, height in SIZES:
        x = torch.rand(1, 3, height, width)
        model(x)
        start = time.process_time()
        for _ in range(3):
            model(x)
        costs[f'{width}x{height}'] = 1000 * (time.process_time() - start) / 3
    return costs


def percent(mask):
    """Percentage of true elements in a boolean tensor."""
    return 100 * mask.double().mean().item()


def windows(looks, length):
    """Looks (N, d) cut into sequences of `length` images; a shorter rest is dropped, unless it is all there is."""
    return [part for part in looks.split(length) if len(part) == min(length, len(looks))]


def told(train, val, names, frames):
    """Results for one kind of features; train, val: {domain: (N, d)}."""
    known = {name: statistics(train[name]) for name in names}
    everyone, result = Identifier([known[name] for name in names]), {'matrix': {}, 'false_alarms': {}, 'unknown': {}}
    sequences = {'right': {}, 'false_alarms': {}, 'unknown': {}}
    for number, name in enumerate(names):
        guess = everyone.guess(val[name])
        result['matrix'][name] = {other: int((guess.domain == index).sum()) for index, other in enumerate(names)}
        result['false_alarms'][name] = percent(guess.unknown)
        others = Identifier([known[other] for other in names if other != name])
        result['unknown'][name] = percent(others.guess(val[name]).unknown)
        ends = [Sequence(everyone).guess(part) for part in windows(val[name], frames)]
        sequences['right'][name] = percent(torch.stack([guess.domain[-1] == number for guess in ends]))
        sequences['false_alarms'][name] = percent(torch.stack([guess.unknown[-1] for guess in ends]))
        sequences['unknown'][name] = percent(torch.stack(
            [Sequence(others).guess(part).unknown[-1] for part in windows(val[name], frames)]))
    return {'features': len(train[names[0]][0]), **accuracy(result['matrix']), **result, 'sequences': sequences}


def accuracy(matrix):
    """{'accuracy': percentage of all images on the diagonal} of {truth: {answer: images}}."""
    images = sum(sum(row.values()) for row in matrix.values())
    return {'accuracy': 100 * sum(row[name] for name, row in matrix.items()) / images}


def chosen(scores, names):
    """Results of choosing the branch with the highest score; scores: {domain: (N, domains)}."""
    matrix = {name: {other: int((scores[name].argmax(dim=1) == index).sum()) for index, other in enumerate(names)}
              for name in names}
    return {**accuracy(matrix), 'matrix': matrix}


def measure(options):
    """The results that --out gets."""
    domains = [get_domain(name, data_paths(options.data)) for name in options.domains]
    names, model = [domain.name for domain in domains], network(options, domains)
    train = {domain.name: observe(domain, 'train', model, options)[0] for domain in domains}
    val = {domain.name: observe(domain, 'val', model, options) for domain in domains}
    kinds = {kind: told({name: train[name][kind] for name in names}, {name: val[name][0][kind] for name in names},
                        names, options.frames) for kind in train[names[0]]}
    for kind in val[names[0]][1]:
        kinds[kind] = chosen({name: val[name][1][kind] for name in names}, names)
    return {'images': {name: {'train': len(train[name]['look']), 'val': len(val[name][0]['look'])} for name in names},
            'network': 'trained' if options.state else f'random, seed {options.seed}', 'alike': options.alike,
            'frames': options.frames, 'kinds': kinds,
            'cpu_milliseconds': {'look': {name: val[name][2] for name in names}, 'network': network_cost(model)},
            'versions': environment(torch.device('cpu'))}


def main(argv=None):
    options = parse(argv)
    check_new('--out', options.out, options.overwrite)
    results = measure(options)
    write_json(options.out, results)
    for kind, found in results['kinds'].items():
        unknown = ', '.join(f'{name} {value:.0f}' for name, value in found.get('unknown', {}).items())
        print(f'{kind}: {found["accuracy"]:.1f} % right'
              + (f'; called unknown when left out, %: {unknown}' if unknown else ''))


if __name__ == '__main__':
    run_main(main)
