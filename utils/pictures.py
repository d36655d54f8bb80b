"""Predictions made visible: colour maps, overlays, panels."""
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from utils.task import to_float


def colorize(labels, palette):
    """Class indices (H, W) -> RGB uint8 (H, W, 3); palette: an RGB triple for each class."""
    return np.asarray(palette, dtype=np.uint8)[np.asarray(labels)]


def overlay(image, labels, palette, alpha=0.55):
    """Image (H, W, 3) uint8 under the colours of its labels (H, W); void pixels stay as they are."""
    labels = np.asarray(labels)
    blended = ((1 - alpha) * image + alpha * colorize(labels, palette)).astype(np.uint8)
    return np.where((labels == len(palette) - 1)[..., None], image, blended)


@torch.inference_mode()
def predict(model, number, image, device='cpu'):
    """Class indices (H, W), numpy, of an image (3, H, W) uint8 by the model's domain `number`.

    Void is not among the answers: the picture shows the best of the real classes.
    """
    model.eval()
    logits = model(to_float(image[None].to(device)), number)[0]
    return logits[:-1].argmax(dim=0).cpu().numpy()


def hwc(image):
    """(3, H, W) tensor -> (H, W, 3) array."""
    return image.permute(1, 2, 0).numpy()


def save_overlays(model, number, dataset, folder, device, count=None):
    """Writes input, truth and prediction beside each other as PNG, one for each image; returns the paths."""
    folder = Path(folder) / dataset.domain.name
    folder.mkdir(parents=True, exist_ok=True)
    palette, paths = dataset.domain.palette, []
    for index in range(min(len(dataset), count or len(dataset))):
        image, truth = dataset.load(index)
        predicted = predict(model, number, image, device)
        row = [hwc(image), overlay(hwc(image), truth, palette), overlay(hwc(image), predicted, palette)]
        paths.append(folder / f'{index:04d}-{dataset.pairs[index].image.stem}.png')
        Image.fromarray(np.concatenate(row, axis=1)).save(paths[-1])
    return paths


def richest(dataset):
    """Index of the image whose label has the most classes, the first of equals; void is no class."""
    kinds = [len(set(np.unique(dataset.load(index)[1])) - {dataset.domain.void}) for index in range(len(dataset))]
    return int(np.argmax(kinds))


def save_panels(path, datasets, models, device):
    """A figure: a row for each domain; columns input, truth and the prediction of each model.

    datasets: of each domain, in the networks' order; models: {name: network}. Shows the
    image of each domain whose label has the most classes.
    """
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    columns = ['input', 'truth', *models]
    figure, axes = plt.subplots(len(datasets), len(columns), squeeze=False, layout='constrained',
                                figsize=(3.2 * len(columns), 1.9 * len(datasets)))
    for number, (dataset, row) in enumerate(zip(datasets, axes)):
        image, truth = dataset.load(richest(dataset))
        pixels, palette = hwc(image), dataset.domain.palette
        maps = [truth, *(predict(model, number, image, device) for model in models.values())]
        pictures = [pixels, *(overlay(pixels, labels, palette, 0.8) for labels in maps)]
        for axis, title, picture in zip(row, columns, pictures):
            axis.imshow(picture)
            axis.set_xticks([])
            axis.set_yticks([])
            if number == 0:
                axis.set_title(title)
        row[0].set_ylabel(dataset.domain.name)
    figure.savefig(path, dpi=110)
    plt.close(figure)
