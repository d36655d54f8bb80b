"""Exports a checkpoint for other programs.

    python -m mdil export runs/3/model_best.pth.tar idd.onnx --domain IDD
    python -m mdil export runs/3/model_best.pth.tar idd.xml --domain IDD --int8 --calibrate photos/
    python -m mdil export runs/mdil/step2-BDD/model_best.pth.tar out.pth.tar

The formats onnx (.onnx), torch (.pt2) and openvino (.xml) hold one domain's network; `predict.py
--state` takes the file. The format `published` holds all domains in the key layout of the published code:
adapter models keep their keys, prefixed with `module.`; plain networks get the published
single-task (decoder), fine-tune (decoder_old, decoder_new) or multi-task (decoder.N) layout.
Networks that the published code does not have are refused.
"""
from functools import partial
from pathlib import Path

import torch

from mdil.datasets.loading import spaced
from mdil.evaluation.evaluation import load_network_and_domains
from mdil.evaluation.inputs import images_in, upright
from mdil.evaluation.predictor import Predictor, trained_size
from mdil.models import get_method
from mdil.models.checkpoint import check_given, load_network, method_of, read_checkpoint, save
from mdil.models.exported import SUFFIXES, WRITERS, Exported, needed
from mdil.models.layouts import published_keys
from mdil.models.methods import nameless_options
from mdil.models.networks import DEFAULT as ERFNET
from mdil.utils.errors import UserError, brief, run_main
from mdil.utils.files import check_new
from mdil.utils.parallel import Place
from mdil.utils.parser import Parser, data_paths, paths_option
from mdil.utils.precision import to_float

COMPARED = 20           # images of the --calibrate folder on which to compare the int8 network with PyTorch
CALIBRATION = 100       # images, evenly spaced in that folder; each takes a second on a slow core


def parse(argv=None):
    parser = Parser(prog='python -m mdil export', description='Writes a checkpoint for other programs.')
    parser.add_argument('state', metavar='CKPT', help='a checkpoint of train.py')
    parser.add_argument('out', metavar='OUT', help='the file to write')
    parser.add_argument('--format', choices=('published', *WRITERS),
                        help='the published key layout, ONNX, torch.export or OpenVINO (default: by the suffix of OUT: '
                             + ', '.join(SUFFIXES) + ', or any other for published)')
    parser.add_argument('--domain', metavar='NAME', help='the domain whose network is written; not for published')
    parser.add_argument('--int8', action='store_true', help='8-bit weights and activations (NNCF), for openvino')
    parser.add_argument('--calibrate', metavar='FOLDER', help='images to calibrate the activation ranges of --int8')
    parser.add_argument('--overwrite', action='store_true', help='replace OUT')
    nameless_options(parser)
    paths_option(parser)
    options = parser.parse_args(argv)
    check(options)
    return options


def check(options):
    """Completes the format; refuses conflicting options."""
    suffix, endings = Path(options.out).suffix, ', '.join(SUFFIXES)
    options.format = options.format or SUFFIXES.get(suffix.lower(), 'published')
    if options.format == 'published' and (options.domain or options.int8):
        raise UserError(f'{options.out}: with --domain or --int8, OUT must end in one of {endings}; a file of the '
                        'published code holds all domains in float32')
    if options.int8 and options.format != 'openvino':
        raise UserError(f'--int8 is for OpenVINO: OUT must end in .xml, not {suffix}')
    if options.int8 != bool(options.calibrate):
        raise UserError('--int8 and --calibrate FOLDER, a folder of typical images, go together')
    if SUFFIXES.get(suffix.lower() if options.format == 'published' else suffix, 'published') != options.format:
        wanted = next((f'end in {own}' for own, name in SUFFIXES.items() if name == options.format),
                      f'not end in {suffix}')
        raise UserError(f'--format {options.format}: OUT must {wanted}, so that predict.py knows it')


def about(domain, size):
    """The metadata of an exported network: domain, classes, colours, index of void, image size, input and output.

    size: (height, width).
    """
    return {**domain.entry, 'void': domain.void, 'height': size[0], 'width': size[1],
            'input': 'images (B, 3, H, W), RGB, floats in [0, 1], sides multiples of 8',
            'output': f'logits (B, {domain.num_classes}, H, W), void last'}


def calibrated(predictor, sources, model):
    """The OpenVINO `model` quantised to 8 bits, with activation ranges measured on images of `sources`."""
    nncf, = needed('nncf')
    chosen = spaced(sources, CALIBRATION)
    # Weights use half the range; with the full range, sums overflow on processors without VNNI, e.g. with only AVX2.
    more = nncf.AdvancedQuantizationParameters(overflow_fix=nncf.OverflowFix.ENABLE)
    return nncf.quantize(model, nncf.Dataset(chosen, partial(pixels, predictor)), subset_size=len(chosen),
                         advanced_parameters=more)


def pixels(predictor, source):
    """The image of a source as input of the network: float32 (1, 3, H, W) in [0, 1]."""
    return to_float(predictor.prepare(upright(source.path)).pixels[None]).numpy()


def chosen_branch(options, predictor):
    """Index of --domain, or of the only domain; UserError if there are several to choose from."""
    names = [domain.name for domain in predictor.domains]
    if options.domain is None and len(names) > 1:
        raise UserError(f'{options.state} knows {", ".join(names)}; choose one with --domain')
    return predictor.index(options.domain or names[0])


def export_network(options):
    """Writes one domain's network; prints how much its outputs differ from PyTorch's."""
    place = Place(torch.device('cpu'))
    checkpoint, model, domains = load_network_and_domains(options.state, place, data_paths(options.data),
                                                          options.domains, options.method)
    size = trained_size(checkpoint.content)
    predictor = Predictor(model, domains, size, place)
    index = chosen_branch(options, predictor)
    network, domain = model.single(index).eval().requires_grad_(False).to(
        memory_format=torch.contiguous_format), domains[index]
    random = torch.Generator().manual_seed(0)
    example, *compared = [torch.rand(shape, generator=random)
                          for shape in ((2, 3, *size), (1, 3, *size), (3, 3, 64, 96))]
    write = WRITERS[options.format]
    if options.int8:
        sources = images_in(options.calibrate)
        write = partial(write, quantise=partial(calibrated, predictor, sources))
        # Random images would exceed the activation ranges measured on real ones.
        compared = [torch.from_numpy(pixels(predictor, source)) for source in spaced(sources, COMPARED)]
    try:
        write(network, example, options.out, about(domain, size))
    except RuntimeError as error:
        raise UserError(f'{options.out} could not be written as {options.format} ({brief(error)})') from None
    apart, agree = difference(network, Exported(options.out), compared)
    differ = f'differ from PyTorch\'s by up to {apart:.1e} of the largest' if apart else 'are equal to PyTorch\'s'
    print(f'{options.out}: {domain.name}, {len(domain.classes)} classes and void, {options.format}'
          f'{", int8" if options.int8 else ""}; the logits {differ}, {100 * agree:.2f} % of the predictions are equal')


@torch.inference_mode()
def difference(network, exported, batches):
    """(largest logit difference relative to the largest logit, share of equal predictions) over batches of images."""
    apart, agree = [], []
    for images in batches:
        want, got = network(images), exported(images)
        apart.append(((got - want).abs().max() / want.abs().max()).item())
        agree.append((got.argmax(1) == want.argmax(1)).double().mean().item())
    return max(apart), sum(agree) / len(agree)


def export_published(options):
    """Writes all domains in the published key layout."""
    checkpoint = read_checkpoint(options.state)
    if checkpoint.layout.network != ERFNET:
        raise UserError(f'{options.state} holds the network {checkpoint.layout.network}; the published code has only '
                        f'{ERFNET}: let OUT end in one of {", ".join(SUFFIXES)}')
    check_given(options.domains, checkpoint)
    model, method = load_network(checkpoint, options.method), method_of(checkpoint, options.method)
    row, counts = get_method(method), checkpoint.layout.num_classes
    if row.adapter == 'series' or row.domain_bn != (row.adapter is not None):
        raise UserError(f'{options.state}: the published code has no network of --method {method}')
    keys = published_keys(model.state_dict(), counts, row.adapter, multi_task=row.joint)
    save({'epoch': int(checkpoint.content.get('epoch', 0)), 'arch': 'ERFNet', 'state_dict': keys,
          'best_acc': float(checkpoint.content.get('best_acc', 0))}, options.out)
    print(f'{options.out}: {checkpoint.layout.kind}, {len(keys)} tensors, e.g. {next(iter(keys))}')


def main(argv=None):
    options = parse(argv)
    check_new('OUT', options.out, options.overwrite, inputs=[options.state])
    if options.format == 'openvino':
        check_new('OUT', Path(options.out).with_suffix('.bin'), options.overwrite, inputs=[options.state])
    (export_published if options.format == 'published' else export_network)(options)


if __name__ == '__main__':
    run_main(main)
