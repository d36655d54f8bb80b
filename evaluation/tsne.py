"""Shows what a step does to the encoder features of a domain learnt before it.

    python -m mdil tsne mdil=runs/demo/mdil fine-tune=runs/demo/fine-tune --data-root DATA --out runs/demo/tsne

For every sequence NAME=FOLDER (or two checkpoints, NAME=BEFORE,AFTER), the same validation pixels
go through the encoder before and after the step. One t-SNE (van der Maaten and Hinton, JMLR 2008)
embeds both sets of features in common axes, so a point that stays in place is a feature that did not
change. Writes --out with the suffixes .png, .pdf, .csv (the coordinates) and .json (how far the
features moved and how well the classes separate).
"""
import csv
import importlib.util
import io
import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mdil.datasets import SegmentationDataset
from mdil.datasets.domains import canonical
from mdil.evaluation import features, pictures, tables
from mdil.evaluation.epochs import started_from
from mdil.evaluation.evaluation import read_named
from mdil.evaluation.history import read_step
from mdil.evaluation.predictor import trained_size
from mdil.models.checkpoint import load_network
from mdil.training.run import BEST
from mdil.utils.errors import UserError, run_main
from mdil.utils.files import check_new, write_json, write_text
from mdil.utils.parallel import pick_device
from mdil.utils.parser import Parser, complete_size, data_options, data_paths, positive, seed_number, size_options


@dataclass
class Pixels:
    """The pixels to compare: for each, dataset index, cell of the H/8 x W/8 grid, and class; each (N,)."""
    images: np.ndarray
    cells: np.ndarray
    classes: np.ndarray


@dataclass
class FeatureShift:
    """A sequence's result: the domain that the step learnt, coordinates (N, 2) before and after it, {name: number}."""
    learnt: str
    before: np.ndarray
    after: np.ndarray
    numbers: dict


def tsne_parser():
    """The parser of `python -m mdil tsne`."""
    parser = Parser(prog='python -m mdil tsne', description='Encoder features of one domain before and after a step.')
    group = parser.add_argument_group('what to compare')
    group.add_argument('sequences', nargs='+', metavar='NAME=FOLDER|NAME=BEFORE,AFTER',
                       help='folders with steps of one sequence each, or two checkpoints')
    group.add_argument('--step', type=positive, metavar='K', help='the step, 2 or later (default: the last)')
    group.add_argument('--domain', metavar='NAME', help='whose features (default: the first domain)')
    group.add_argument('--domains', nargs='+', default=[], metavar='NAME',
                       help='domains in order (published files do not name them)')
    group.add_argument('--split', default='val', help='split of the data set')
    size_options(group, None)
    group.add_argument('--images', type=positive, default=1, help='how many images, those with the most classes')
    group.add_argument('--points', type=positive, default=80, help='maximum number of pixels per class')
    group.add_argument('--perplexity', type=float, default=30.0, help='perplexity of t-SNE')
    group.add_argument('--seed', type=seed_number, default=0, help='seed of the pixels and of t-SNE')
    group.add_argument('--device', default='auto', help='device that computes the features')
    data_options(parser)
    parser.add_argument('--out', required=True, metavar='FILE', help='path of the output files, without suffix')
    parser.add_argument('--overwrite', action='store_true', help='replace existing files')
    return parser


def outputs(out):
    """Paths of the files of --out: the figure as PNG and PDF, the coordinates and the numbers."""
    return [Path(f'{out}.{ending}') for ending in ('png', 'pdf', 'csv', 'json')]


def steps_in(folder):
    """{step number: folder of the step}, of the steps with a checkpoint, in the folder of a sequence."""
    found = {}
    for path in Path(folder).glob(f'step*/{BEST}'):
        number = re.match(r'step(\d+)', path.parent.name)
        if number:
            found[int(number.group(1))] = path.parent
    return found


def checkpoint_pair(item, step):
    """(name, checkpoint before the step, checkpoint after it) of NAME=FOLDER or NAME=BEFORE,AFTER."""
    name, _, place = item.partition('=')
    if not name or not place:
        raise UserError(f'{item!r} is neither NAME=FOLDER nor NAME=BEFORE,AFTER')
    if ',' in place and not os.path.exists(place):
        files = place.split(',')
        if len(files) != 2:
            raise UserError(f'{item}: two checkpoints are expected, BEFORE,AFTER, not {len(files)}')
        return name, *files
    found = steps_in(place)
    step = step or max(found, default=0)
    if step < 2 or step not in found or step - 1 not in found:
        raise UserError(f'{item}: {BEST} of two steps in a row is needed, step{step - 1}-* and '
                        f'step{step}-*; found: {", ".join(f"step {k}" for k in sorted(found)) or "no step"}')
    file = started_from(read_step(found[step]))
    return name, str(found[step - 1] / file), str(found[step] / file)


def compared_domain(before, options):
    """The Domain whose features are compared; UserError unless `before`, a (Checkpoint, Domains) pair, knows it."""
    checkpoint, domains = before
    if not domains:
        raise UserError(f'{checkpoint.source} holds only an encoder, no decoder')
    wanted = canonical(options.domain) if options.domain else domains[0].name
    for domain in domains:
        if domain.name == wanted:
            return domain
    raise UserError(f'--domain {wanted}: {checkpoint.source}, before the step, knows '
                    f'{", ".join(domain.name for domain in domains)} only')


def choose_pixels(dataset, options):
    """The Pixels to compare, from the images with the most classes: up to --points of each class."""
    indices = features.richest_images(dataset, options.images)
    maps = [features.cell_classes(features.label_of(dataset, index), dataset.domain.num_classes).ravel()
            for index in indices]
    cells = len(maps[0])
    classes = np.concatenate(maps)
    chosen = features.sample_per_class(classes, options.points, dataset.domain.void,
                                       np.random.default_rng(options.seed))
    if 2 * len(chosen) <= options.perplexity or len(np.unique(classes[chosen])) < 2:
        raise UserError(f'{dataset.domain.name} {dataset.split} gives {len(chosen)} pixels of '
                        f'{len(np.unique(classes[chosen]))} classes at {dataset.size[1]}x{dataset.size[0]}: too few '
                        f'for --perplexity {options.perplexity:g}; lower it, or raise --images or --height')
    return Pixels(np.array(indices)[chosen // cells], chosen % cells, classes[chosen])


def features_at(model, number, dataset, pixels, device):
    """Encoder features (N, D) of the Pixels in the branch `number`."""
    result = [None] * len(pixels.cells)
    for index in np.unique(pixels.images):
        here = np.flatnonzero(pixels.images == index)
        found = features.encode(model, number, dataset.load(int(index))[0], device)[pixels.cells[here]]
        for place, values in zip(here, found):
            result[place] = values
    return np.stack(result)


def embed(before, after, perplexity, seed):
    """Coordinates (N, 2) of the features (N, D) before and after, from one t-SNE of both."""
    from sklearn.manifold import TSNE
    both = TSNE(perplexity=perplexity, init='pca', random_state=seed % 2 ** 32).fit_transform(
        np.concatenate([before, after]))
    return both[:len(before)], both[len(before):]


def compare(paths, domain, dataset, pixels, options):
    """The FeatureShift of a sequence; paths: its checkpoints before and after the step."""
    device, found = pick_device(options.device), []
    for path in paths:
        checkpoint, domains = read_named(path, data_paths(options.data), options.domains, sequence=path != paths[-1])
        names = [known.name for known in domains]
        if domain.name not in names:
            raise UserError(f'{path} knows {", ".join(names)}, not {domain.name}')
        model = load_network(checkpoint).to(device)
        found.append(features_at(model, names.index(domain.name), dataset, pixels, device))
    before, after = found
    numbers = {'cka': features.linear_cka(before, after), 'cosine': features.mean_cosine(before, after),
               'silhouette_before': features.silhouette(before, pixels.classes),
               'silhouette_after': features.silhouette(after, pixels.classes)}
    return FeatureShift(names[-1], *embed(before, after, options.perplexity, options.seed), numbers)


def caption(numbers):
    """The numbers of a sequence as text."""
    return ('before and after the step: linear CKA {cka}, mean cosine {cosine}; silhouette of the classes '
            '{silhouette_before} to {silhouette_after}').format(**{name: tables.number(value, 3)
                                                                   for name, value in numbers.items()})


def draw(results, dataset, pixels):
    """The matplotlib figure: the first image and its truth, then a row for each sequence."""
    from matplotlib.lines import Line2D
    domain = dataset.domain
    figure = pictures.new_figure(figsize=(9, 2.6 + 4.2 * len(results)))
    axes = figure.subplots(1 + len(results), 2, height_ratios=[0.55] + [1] * len(results))
    figure.suptitle(f'Encoder features of {len(pixels.cells)} pixels of {domain.name} ({dataset.split})',
                    parse_math=False)
    image, truth = dataset.load(int(pixels.images[0]))
    shown = pictures.hwc(image, truth.shape)
    axes[0, 0].imshow(shown)
    axes[0, 1].imshow(pictures.overlay(shown, truth, domain.palette, 0.8))
    axes[0, 0].set_title('the image' if len(set(pixels.images)) == 1 else 'the first image', fontsize=10)
    axes[0, 1].set_title('truth', fontsize=10)
    for (name, moved), row in zip(results.items(), axes[1:]):
        scatter(row, moved, pixels.classes, domain)
        row[0].set_ylabel(name, fontsize=12, parse_math=False)
        for axis, time in zip(row, ('before', 'after')):
            axis.set_title(f'{time} learning {moved.learnt}', fontsize=10, parse_math=False)
        row[0].set_xlabel(caption(moved.numbers), fontsize=9, loc='left')
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    marks = [Line2D([], [], linestyle='', marker='o', color=np.array(domain.palette[kind]) / 255,
                    label=domain.classes[kind]) for kind in np.unique(pixels.classes)]
    for text in figure.legend(handles=marks, loc='outside right center', fontsize=9, frameon=False).get_texts():
        text.set_parse_math(False)
    return figure


def scatter(axes, moved, classes, domain):
    """Draws the points before and after in the domain's colours, with the same limits."""
    both = np.concatenate([moved.before, moved.after])
    low, high = both.min(axis=0), both.max(axis=0)
    margin = 0.04 * (high - low)
    colors = np.array(domain.palette)[classes] / 255
    for axis, points in zip(axes, (moved.before, moved.after)):
        axis.scatter(*points.T, c=colors, s=9, linewidths=0)
        axis.set_xlim(low[0] - margin[0], high[0] + margin[0])
        axis.set_ylim(low[1] - margin[1], high[1] + margin[1])


def table(results, dataset, pixels):
    """The coordinates as CSV text, with a line for each sequence, time (before or after) and pixel.

    row, column: the pixel's position in the resized image.
    """
    text, across = io.StringIO(), dataset.size[1] // features.CELL
    writer = csv.writer(text, lineterminator='\n')
    writer.writerow(['sequence', 'time', 'image', 'row', 'column', 'class', 'x', 'y'])
    for name, moved in results.items():
        for time, points in (('before', moved.before), ('after', moved.after)):
            for index, cell, kind, (x, y) in zip(pixels.images, pixels.cells, pixels.classes, points):
                row, column = (features.CELL * place + features.CELL // 2 for place in divmod(int(cell), across))
                writer.writerow([name, time, dataset.pairs[index].image.name, row, column, dataset.domain.classes[kind],
                                 f'{x:.4f}', f'{y:.4f}'])
    return text.getvalue()


def run(options):
    """Compares all sequences; returns ({name: FeatureShift}, dataset, Pixels, {name: paths before and after})."""
    if importlib.util.find_spec('sklearn') is None:
        raise UserError('scikit-learn is missing: pip install scikit-learn')
    pictures.figure_format(f'{options.out}.png')        # fails without matplotlib
    pairs = {}
    for item in options.sequences:
        name, *pair = checkpoint_pair(item, options.step)
        if name in pairs:
            raise UserError(f'{item}: the name {name} is given twice; give each sequence its own')
        pairs[name] = pair
    first = read_named(next(iter(pairs.values()))[0], data_paths(options.data), options.domains, sequence=True)
    domain = compared_domain(first, options)
    size = (options.height, options.width) if options.height else trained_size(first[0].content)
    dataset = SegmentationDataset(domain, options.data_root, options.split, size)
    pixels = choose_pixels(dataset, options)
    results = {name: compare(pair, domain, dataset, pixels, options) for name, pair in pairs.items()}
    return results, dataset, pixels, pairs


def save(results, dataset, pixels, pairs, options):
    """Writes the figure as PNG and PDF, the coordinates as CSV and the numbers as JSON; returns the paths."""
    figure = draw(results, dataset, pixels)
    paths = outputs(options.out)
    for path in paths[:2]:
        pictures.save_figure(path, figure, dpi=150)
    write_text(paths[2], table(results, dataset, pixels))
    write_json(paths[3], {
        'domain': dataset.domain.name, 'split': dataset.split, 'height': dataset.size[0], 'width': dataset.size[1],
        'images': [dataset.pairs[index].image.name for index in dict.fromkeys(pixels.images.tolist())],
        'points': len(pixels.cells), 'perplexity': options.perplexity, 'seed': options.seed,
        'sequences': {name: {'before': pairs[name][0], 'after': pairs[name][1], **moved.numbers}
                      for name, moved in results.items()}})
    return paths


def main(argv=None):
    options = tsne_parser().parse_args(argv)
    if not 1 <= options.perplexity < float('inf'):
        raise UserError(f'--perplexity {options.perplexity:g} must be at least 1')
    complete_size(options)
    for path in outputs(options.out):
        check_new('--out', path, options.overwrite)
    results, dataset, pixels, pairs = run(options)
    paths = save(results, dataset, pixels, pairs, options)
    for name, moved in results.items():
        print(f'{name}: {caption(moved.numbers)}')
    print('written: ' + ', '.join(map(str, paths)))


if __name__ == '__main__':
    run_main(main)
