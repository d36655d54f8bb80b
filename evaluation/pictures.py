"""Pictures of predictions: colour maps, overlays, panels, best and worst images, confusion matrices.

All pictures show exactly what is scored: the class with the largest logit, void included, at the
size of the label.
"""
import os
from pathlib import Path
from urllib.parse import quote

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont

from mdil.datasets.domains import is_called
from mdil.evaluation import metrics, tables
from mdil.evaluation.evaluation import at_label_size, logits_of
from mdil.evaluation.features import label_of
from mdil.utils.errors import UserError
from mdil.utils.files import write_atomically

EXTREMES = 3        # number of best and of worst images for --save-extremes
INK, PAPER = (0, 0, 0), (255, 255, 255)
READABLE = 320      # pixels; narrower images are enlarged
GAP = 6             # white pixels to the right of each image of a comparison


def colorize(labels, palette):
    """Class indices (H, W) -> RGB uint8 (H, W, 3); palette: an RGB triple for each class."""
    return np.asarray(palette, dtype=np.uint8)[np.asarray(labels)]


def overlay(image, labels, palette, alpha=0.55):
    """Image (H, W, 3) uint8 blended with the colours of its labels (H, W), except at void pixels."""
    labels = np.asarray(labels)
    blended = ((1 - alpha) * image + alpha * colorize(labels, palette)).astype(np.uint8)
    return np.where((labels == len(palette) - 1)[..., None], image, blended)


def hwc(image, size):
    """(3, H, W) uint8 tensor -> array (*size, 3), resized if necessary."""
    pixels = image.permute(1, 2, 0).numpy()
    if pixels.shape[:2] != tuple(size):
        pixels = np.asarray(Image.fromarray(pixels).resize(size[::-1], Image.BILINEAR))
    return pixels


def save_picture(path, pixels):
    """Writes RGB uint8 (H, W, 3) as PNG, atomically."""
    write_atomically(path, lambda file: Image.fromarray(pixels).save(file, 'PNG'))


def text_size(width):
    """Font size in pixels for a picture that is `width` pixels wide."""
    return max(11, min(width // 45, 20 + width // 150))


def band(texts, widths):
    """A line of text above pictures: RGB (H, sum of widths, 3), with each text above the picture of that width."""
    font = ImageFont.load_default(text_size(sum(widths)))
    height = int(1.7 * font.size)
    strip = Image.new('RGB', (sum(widths), height), PAPER)
    for text, width, left in zip(texts, widths, np.cumsum([0, *widths])):
        while font.getlength(text) > width - 8 and len(text) > 4:
            text = text[:-4] + '...'
        ImageDraw.Draw(strip).text((int(left) + 4, height // 2), text, INK, font, anchor='lm')
    return np.asarray(strip)


def legend(names, colors, width):
    """Coloured squares with class names: RGB uint8 (H, width or more, 3)."""
    font = ImageFont.load_default(text_size(width))
    line, gap = int(1.6 * font.size), font.size // 2
    cell = max(int(font.getlength(name)) for name in names) + line + 2 * gap
    columns = min(len(names), max(1, width // cell))
    strip = Image.new('RGB', (max(width, cell), line * -(-len(names) // columns) + gap), PAPER)
    pen = ImageDraw.Draw(strip)
    for number, (name, color) in enumerate(zip(names, colors)):
        left, top = number % columns * cell + gap, number // columns * line + gap // 2
        pen.rectangle((left, top + 2, left + font.size, top + 2 + font.size), color, INK)
        pen.text((left + line, top + 2 + font.size // 2), name, INK, font, anchor='lm')
    return np.asarray(strip)


def stacked(pictures):
    """RGB pictures one below the other, padded with white to the widest."""
    width = max(picture.shape[1] for picture in pictures)
    return np.concatenate([np.pad(picture, ((0, 0), (0, width - picture.shape[1]), (0, 0)), constant_values=255)
                           for picture in pictures])


def enlarged(pixels):
    """RGB (H, W, 3) enlarged by repeating pixels until it is at least READABLE wide."""
    times = -(-READABLE // pixels.shape[1])
    return pixels.repeat(times, axis=0).repeat(times, axis=1)


def comparison(domain, image, truth, prediction, name):
    """Input, truth and prediction side by side with titles and legend, RGB uint8 (h, w, 3).

    image: (3, H, W) uint8; truth, prediction: class indices of the same size; name: of the image.
    """
    pixels = hwc(image, truth.shape)
    row = [np.pad(enlarged(picture), ((0, 0), (0, GAP), (0, 0)), constant_values=255)
           for picture in (pixels, overlay(pixels, truth, domain.palette), overlay(pixels, prediction, domain.palette))]
    widths = [picture.shape[1] for picture in row]
    miou = tables.number(image_miou(truth, prediction, domain))
    titles = [band([f'{domain.name}  {name}'], [sum(widths)]),
              band(['input', 'truth (void: no colour)', f'prediction, mIoU {miou}'], widths)]
    return stacked([*titles, np.concatenate(row, axis=1), legend(domain.classes, domain.colors, sum(widths))])


def image_miou(truth, prediction, domain):
    """mIoU in percent of one image over the classes in truth or prediction; NaN if all pixels are void."""
    return metrics.mean_iou(metrics.confusion(prediction, truth, domain.num_classes))


class Album:
    """Saves the pictures of a domain while it is evaluated; each rank saves those of its own images.

    It is called as `watch` of `evaluate`; `finish` saves the pictures that need all images. folders:
    {'overlays', 'color', 'extremes', 'confusion': folder or None}; the pictures go into
    <folder>/<step>/<domain>.
    """

    def __init__(self, folders, step, dataset):
        place = Path(step) / quote(dataset.domain.name, safe='')
        self.folders = {kind: Path(folder) / place for kind, folder in folders.items() if folder}
        self.dataset, self.domain, self.ends = dataset, dataset.domain, []
        for kind, folder in self.folders.items():
            make(folder)
            if kind == 'color':
                save_picture(folder / 'legend.png', legend([*self.domain.classes, 'void'], self.domain.palette, 640))

    def __call__(self, index, image, truth, prediction):
        stem = self.dataset.pairs[index].image.stem
        if 'color' in self.folders:
            save_picture(self.folders['color'] / f'{index:04d}-{stem}.png', colorize(prediction, self.domain.palette))
        if 'overlays' not in self.folders and 'extremes' not in self.folders:
            return
        picture = comparison(self.domain, image, truth, prediction, stem)
        if 'overlays' in self.folders:
            save_picture(self.folders['overlays'] / f'{index:04d}-{stem}.png', picture)
        miou = image_miou(truth, prediction, self.domain)
        if 'extremes' in self.folders and miou == miou:
            self.ends = ends([*self.ends, (miou, index, picture)])

    def finish(self, matrix, place):
        """Saves the worst and best images of all ranks, and the picture of the confusion matrix (C, C)."""
        if 'extremes' in self.folders:
            ranked = ends(gathered(self.ends, place))
            count = min(EXTREMES, len(ranked) // 2 or len(ranked))
            for number in range(count) if place.main else ():
                save_picture(self.folders['extremes'] / f'worst-{number + 1}.png', ranked[number][2])
                save_picture(self.folders['extremes'] / f'best-{number + 1}.png', ranked[-1 - number][2])
        if 'confusion' in self.folders and place.main:
            save_confusion(self.folders['confusion'] / 'confusion.png', matrix, self.domain)


def make(folder):
    """Makes a folder; UserError if that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f'{folder} cannot be made: {error.strerror}') from None


def ends(ranked):
    """The EXTREMES lowest and highest of (mIoU, index, picture) triples, in ascending order."""
    ranked = sorted(ranked, key=lambda item: item[:2])
    return ranked if len(ranked) <= 2 * EXTREMES else ranked[:EXTREMES] + ranked[-EXTREMES:]


def gathered(items, place):
    """The lists `items` of all ranks, joined."""
    if place.world == 1:
        return items
    everyones = [None] * place.world
    dist.all_gather_object(everyones, items)
    return [item for items in everyones for item in items]


def richest(dataset):
    """Index of the image whose label has the most classes, void excluded; the first in a tie."""
    return int(np.argmax([int((label_of(dataset, index).unique() < dataset.domain.void).sum())
                          for index in range(len(dataset))]))


def choose(datasets, wanted):
    """[(number of the domain, index of the image)] for figures, in the order of the domains.

    datasets: {number of a domain in the networks: its images}.
    wanted: items WHAT or DOMAIN=WHAT; WHAT is an index, or a part of the path of exactly one image of
    the domain. Without items, the `richest` image of each domain. UserError for an item without such
    an image in any domain.
    """
    if not wanted:
        return [(number, richest(dataset)) for number, dataset in datasets.items()]
    chosen = []
    for item in wanted:
        name, equals, what = item.partition('=')
        searched = [(number, dataset) for number, dataset in datasets.items()
                    if not equals or is_called(dataset.domain.name, name)]
        found = [(number, index) for number, dataset in searched
                 for index in [find_image(dataset, what if equals else item)] if index is not None]
        if not found:
            places = ', '.join(dataset.domain.name for _, dataset in searched) or f'no domain called {name!r}'
            raise UserError(f'--images {item}: no image, or more than one, with that name or index in {places}')
        chosen += found
    return sorted(set(chosen))


def find_image(dataset, what):
    """Index of the only image that `what` matches (see `choose`), or None."""
    paths = [Path(os.path.relpath(pair.image, dataset.folder)).as_posix() for pair in dataset.pairs]
    exact = [index for index, path in enumerate(paths) if Path(path).stem == what]
    if not exact and what.isdecimal() and str(int(what)) == what:
        return int(what) if int(what) < len(paths) else None
    found = exact or [index for index, path in enumerate(paths) if what in path]
    return found[0] if len(found) == 1 else None


@torch.inference_mode()
def predict(model, number, image, label, place, precision='fp32'):
    """Class indices (H, W), at the size of the label, of an image (3, h, w) uint8 in the model's domain `number`."""
    model.eval()
    labels = label[None] if label.shape == image.shape[1:] else [label]
    _, logits, _ = next(at_label_size(logits_of(model, number, image[None], place, precision), labels))
    return logits[0].argmax(dim=0).cpu()


def shrunk(pixels, width):
    """The image (H, W, 3) uint8, scaled down if it is wider than `width`."""
    height = round(pixels.shape[0] * width / pixels.shape[1])
    return pixels if pixels.shape[1] <= width else np.asarray(Image.fromarray(pixels).resize((width, height)))


def figure_format(path):
    """The format given by the suffix of a figure's file name; UserError if matplotlib does not have it."""
    from matplotlib.backend_bases import FigureCanvasBase
    suffix = Path(path).suffix[1:].lower()
    if suffix not in FigureCanvasBase.get_supported_filetypes():
        raise UserError(f'{path}: figures are .png, .pdf or .svg, not {Path(path).suffix or "without suffix"}')
    return suffix


def new_figure(**keywords):
    """A matplotlib Figure with constrained layout, drawn without pyplot."""
    from matplotlib.figure import Figure
    return Figure(layout='constrained', **keywords)


def save_figure(path, figure, dpi=110):
    """Writes a figure atomically, in the format of the file name's suffix, without date and Type 3 fonts."""
    from matplotlib import rc_context
    kind = figure_format(path)
    undated = {'pdf': {'CreationDate': None}, 'svg': {'Date': None}}.get(kind)
    with rc_context({'pdf.fonttype': 42, 'ps.fonttype': 42}):
        write_atomically(path, lambda file: figure.savefig(file, format=kind, dpi=dpi, metadata=undated))


def save_panels(path, datasets, models, place, chosen, precision='fp32'):
    """Writes a figure with a row for each chosen image: input, truth, the prediction of each model, legend.

    datasets: {number of a domain in the networks: its images}; models: {title: network}, which may lack
    the later domains; chosen: the result of `choose`.
    """
    columns = ['input', 'truth', *models]
    shapes = [dataset.size for dataset in datasets.values()]
    height = 2.9 * max(h / w for h, w in shapes) + 0.25
    figure = new_figure(figsize=(3.2 * (len(columns) + 1), height * len(chosen) + 0.3))
    axes = figure.subplots(len(chosen), len(columns) + 1, squeeze=False)
    for (number, index), row in zip(chosen, axes):
        draw_row(row, datasets[number], number, index, models, place, precision)
    for axis, title in zip(axes[0], columns):
        axis.set_title(title, parse_math=False)
    save_figure(path, figure)


class OneEach(torch.nn.Module):
    """Several single-domain networks behind the interface of one multi-domain network."""

    def __init__(self, networks):
        super().__init__()
        self.networks = torch.nn.ModuleList(networks)

    @property
    def num_classes(self):
        """Classes of each domain, void included."""
        return [network.num_classes[0] for network in self.networks]

    def forward(self, images, domain=0):
        """Logits of `domain`, from its own network."""
        return self.networks[domain](images)


def draw_row(row, dataset, number, index, models, place, precision):
    """Draws one row of `save_panels`."""
    domain, (image, truth) = dataset.domain, dataset.load(index)
    truth = truth.long().clamp(max=domain.void)
    pixels, shown = hwc(image, truth.shape), set(truth.unique().tolist())
    row[0].imshow(pixels)
    row[0].set_ylabel(domain.name, parse_math=False)
    row[0].set_xlabel(dataset.pairs[index].image.stem, fontsize=7, parse_math=False)
    row[1].imshow(overlay(pixels, truth, domain.palette, 0.8))
    for axis, model in zip(row[2:], models.values()):
        if number >= len(model.num_classes):
            axis.imshow(np.full_like(pixels, 235))
            axis.text(0.5, 0.5, 'not learnt yet', ha='center', va='center', transform=axis.transAxes)
            continue
        prediction = predict(model, number, image, truth, place, precision)
        shown |= set(prediction.unique().tolist())
        axis.imshow(overlay(pixels, prediction, domain.palette, 0.8))
        axis.set_xlabel(f'mIoU of this image: {image_miou(truth, prediction, domain):.1f}', fontsize=8)
    for axis in row[:-1]:
        axis.set_xticks([])
        axis.set_yticks([])
    shown = sorted(shown - {domain.void})
    row[-1].axis('off')
    draw_legend(row[-1], domain, shown, loc='center left', ncols=1 + len(shown) // 10, fontsize=7, borderaxespad=0,
                columnspacing=1)


def draw_legend(place, domain, classes, **keywords):
    """Draws the colours and names of the classes with the indices `classes` on `place`, an axis or a figure."""
    from matplotlib.patches import Patch
    patches = [Patch(facecolor=np.divide(domain.colors[index], 255), edgecolor='black', linewidth=0.5,
                     label=domain.classes[index]) for index in classes]
    for text in place.legend(handles=patches, frameon=False, **keywords).get_texts():
        text.set_parse_math(False)


def save_confusion(path, matrix, domain):
    """Writes a figure of a confusion matrix (C, C): percent of each true class (row) predicted as each class."""
    matrix = matrix[:-1].double()
    percent = (100 * matrix / matrix.sum(dim=1, keepdim=True)).numpy()     # NaN for a class without pixels
    names = [name if known else f'{name} (no pixels)' for name, known in zip(domain.classes, matrix.any(dim=1))]
    answers = [*domain.classes, 'void']
    side = 2.2 + 0.42 * len(answers)
    figure = new_figure(figsize=(side + 1.2, side))
    axis = figure.subplots()
    image = axis.imshow(percent, cmap='Blues', vmin=0, vmax=100)
    axis.set_xticks(range(len(answers)), answers, rotation=60, ha='right', rotation_mode='anchor', parse_math=False)
    axis.set_yticks(range(len(names)), names, parse_math=False)
    axis.set_xlabel('prediction')
    axis.set_ylabel('truth')
    axis.set_title(f'{domain.name}: percent of the pixels of each true class', parse_math=False)
    for (row, column), value in np.ndenumerate(percent):
        if value >= 0.5:
            axis.text(column, row, f'{value:.0f}', ha='center', va='center', fontsize=7,
                      color='white' if value > 55 else 'black')
    figure.colorbar(image, ax=axis, label='percent', fraction=0.04)
    save_figure(path, figure)
