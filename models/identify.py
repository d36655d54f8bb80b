"""Identifies the domain of an image from the image alone, or finds that it resembles none of them.

The look of an image is FEATURES numbers: colour, how much neighbouring pixels differ at four scales,
and noise. They do not depend on the network, so an old domain's statistics stay valid as the network learns
on. For each domain, a checkpoint holds the mean and covariance of these numbers over training images, and a
threshold: 7 kB and no image.

A linear discriminant chooses the domain. An image is unknown if it is further from that domain's mean than
99 % of the domain's training images are, each measured with statistics of the others.
"""
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from mdil.datasets.loading import spaced
from mdil.datasets.segmentation import open_image
from mdil.utils.errors import UserError
from mdil.utils.workers import in_threads

SIZE = 320, 160         # width, height to which images are resized
SCALES = 4
QUANTILES = 0.2, 0.5, 0.8, 0.95
FEATURES = 6 + 6 * SCALES + 3 * len(QUANTILES)
FLOOR = 1e-3            # keeps logarithms of flat images finite
SHRINKAGE = 0.02        # of covariances, towards their diagonal
TRIMMED = 3             # largest deviations of an image, which the distance ignores
FOLDS, STRETCH = 8, 15  # cross-validation: most folds, fewest images in a fold
FALSE_ALARMS = 0.01
FEWEST, MOST = 50, 1000     # training images: fewest that set a threshold, most that are used
ENTRIES = {'count': (), 'mean': (FEATURES,), 'covariance': (FEATURES, FEATURES), 'threshold': ()}


def appearance(image):
    """The look of a PIL image in RGB: float64 (FEATURES,)."""
    red, green, blue = torch.from_numpy(np.array(image.resize(SIZE, Image.BILINEAR))).permute(2, 0, 1).float() / 255
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    channels = torch.stack([luma, blue - luma, red - luma])
    deviation = torch.from_numpy(channels.flatten(1).numpy().std(axis=1, ddof=1))     # torch's std is ten times slower
    parts = [channels.mean(dim=(1, 2)), torch.log(deviation + FLOOR), noise(channels)]
    for _ in range(SCALES):
        parts.append(torch.log((channels[:, :, 1:] - channels[:, :, :-1]).abs().mean(dim=(1, 2)) + FLOOR / 10))
        parts.append(torch.log((channels[:, 1:] - channels[:, :-1]).abs().mean(dim=(1, 2)) + FLOOR / 10))
        channels = F.avg_pool2d(channels, 2)
    return torch.cat(parts).double()


def noise(channels):
    """Log quantiles (C * quantiles,) of channels (C, H, W) after removing smooth shading and straight edges."""
    rows = channels[:, 2:] - 2 * channels[:, 1:-1] + channels[:, :-2]
    rest = (rows[:, :, 2:] - 2 * rows[:, :, 1:-1] + rows[:, :, :-2]).abs().flatten(1).numpy()
    places = [round(quantile * (rest.shape[1] - 1)) for quantile in QUANTILES]
    # The upper halves of positive floats keep their order and are accurate to 0.2 %; 16 bits sort 5 times as fast.
    found = np.sort(((rest.view(np.uint32) + 0x8000) >> 16).astype(np.uint16), axis=1, kind='stable')[:, places]
    return torch.log(torch.from_numpy((found.astype(np.uint32) << 16).view(np.float32)) + FLOOR).flatten()


class OneDomain:
    """A Gaussian model of the looks of one domain's images, from their mean and covariance; `of` fits it to looks."""

    def __init__(self, mean, covariance):
        self.mean, self.covariance = mean, shrunk(covariance)
        values, axes = torch.linalg.eigh(self.covariance)
        self.whitening = axes / values.sqrt()

    @classmethod
    def of(cls, looks):
        return cls(looks.mean(dim=0), covariance(looks))

    def distance(self, looks):
        """Squared whitened distance (N,) of looks (N, FEATURES) from the mean, without the TRIMMED largest terms."""
        squares = ((looks - self.mean) @ self.whitening).square()
        return squares.sort(dim=1).values[:, :-TRIMMED].sum(dim=1)


def covariance(looks):
    """Covariance (FEATURES, FEATURES) of looks (N, FEATURES); 0 if N is 1."""
    centred = looks - looks.mean(dim=0)
    return centred.T @ centred / max(1, len(looks) - 1)


def shrunk(matrix):
    """A covariance shrunk towards its diagonal, which makes it invertible."""
    diagonal = torch.diag(matrix.diagonal())
    ridge = 1e-5 * matrix.diagonal().mean().clamp(min=FLOOR) * torch.eye(len(matrix), dtype=matrix.dtype)
    return (1 - SHRINKAGE) * matrix + SHRINKAGE * diagonal + ridge


def statistics(looks):
    """What a checkpoint holds about a domain, from the looks (N, FEATURES) of its training images in order.

    With fewer than FEWEST images, the threshold is infinite, so no image is unknown.
    """
    threshold = float('inf')
    if len(looks) >= FEWEST:
        # Neighbours may be frames of one drive, so each fold is a contiguous stretch.
        folds = min(FOLDS, len(looks) // STRETCH)
        fold = torch.arange(len(looks)) * folds // len(looks)
        held_out = [OneDomain.of(looks[fold != number]).distance(looks[fold == number]) for number in range(folds)]
        threshold = torch.cat(held_out).quantile(1 - FALSE_ALARMS).item()
    return {'count': len(looks), 'mean': looks.mean(dim=0).float(), 'covariance': covariance(looks).float(),
            'threshold': threshold}


def looks_of(paths, threads, title, read=open_image):
    """The looks (N, FEATURES) of image files, with progress on standard error; UserError if one cannot be read.

    read: path to image, as the images will be read that the looks are compared with.
    """
    return torch.stack(list(in_threads(lambda path: appearance(read(path)), paths, threads, title)))


def statistics_of(paths, threads, title, read=open_image):
    """The `statistics` of training images at `paths`, in order; of more than MOST, an evenly spaced sample."""
    return statistics(looks_of(spaced(paths, MOST), threads, title, read))


def are_statistics(value):
    """Whether `value` is a dict {domain: what `statistics` returns}."""
    return isinstance(value, dict) and all(
        isinstance(entry, dict) and entry.keys() == ENTRIES.keys() and all(
            has_form(entry[name], shape) for name, shape in ENTRIES.items()) for entry in value.values())


def has_form(part, shape):
    """Whether `part` is a number from 0 (shape ()), or a finite tensor of that shape."""
    if not shape:
        return isinstance(part, (int, float)) and not isinstance(part, bool) and part >= 0
    return isinstance(part, torch.Tensor) and part.shape == shape and bool(part.isfinite().all())


@dataclass(frozen=True)
class Guess:
    """About N images: probabilities (N, domains) that sum to 1, and novelty (N,), above 1 for an unknown image."""
    probabilities: torch.Tensor
    novelty: torch.Tensor

    @property
    def domain(self):
        """Index of the most probable domain of each image (N,)."""
        return self.probabilities.argmax(dim=1)

    @property
    def unknown(self):
        """Whether each image resembles none of the domains (N,)."""
        return self.novelty > 1


class Identifier:
    """Identifies the domain of images from the statistics of the domains, which are in the network's order."""

    def __init__(self, known):
        self.models = [OneDomain(entry['mean'].double(), entry['covariance'].double()) for entry in known]
        thresholds = torch.tensor([entry['threshold'] for entry in known], dtype=torch.float64)
        self.thresholds = thresholds.clamp(min=FLOOR)       # that of equal images is 0
        pooled = torch.stack([model.covariance for model in self.models]).mean(dim=0)
        means = torch.stack([model.mean for model in self.models])
        self.weights = torch.linalg.solve(pooled, means.T)                  # (FEATURES, domains)
        self.bias = -0.5 * (means.T * self.weights).sum(dim=0)

    def measures(self, looks):
        """(scores, novelties) of looks (N, FEATURES), each (N, domains): discriminant, and distance over threshold."""
        distances = torch.stack([model.distance(looks) for model in self.models], dim=1)
        return looks @ self.weights + self.bias, distances / self.thresholds

    def guess(self, looks):
        """The Guess about images with looks (N, FEATURES), each on its own."""
        return guessed(*self.measures(looks))


class Sequence:
    """Images that belong together, such as the frames of a drive: each guess also uses all earlier images."""

    def __init__(self, identifier):
        self.identifier, self.count, self.sums = identifier, 0, (0.0, 0.0)

    def guess(self, looks):
        """The Guess about the next images, with looks (N, FEATURES), from the means of all measures so far."""
        sums = [total + measure.cumsum(dim=0) for total, measure in zip(self.sums, self.identifier.measures(looks))]
        counts = torch.arange(1, len(looks) + 1)[:, None] + self.count
        self.count, self.sums = self.count + len(looks), tuple(total[-1] for total in sums)
        return guessed(*(total / counts for total in sums))


def guessed(scores, novelties):
    """The Guess from measures (N, domains); an image's novelty is that for its most probable domain."""
    chosen = scores.argmax(dim=1, keepdim=True)
    return Guess(torch.softmax(scores, dim=1), novelties.gather(1, chosen)[:, 0])


def never_unknown(identifier, domains):
    """Which images are never called unknown, because their Domain had too few training images; '' if all can be."""
    names = [domain.name for domain, bound in zip(domains, identifier.thresholds.tolist()) if bound == float('inf')]
    if len(names) == len(domains):
        return f'No image is called unknown, because every domain had fewer than {FEWEST} training images'
    return (f'Images that fit {" or ".join(names)} best are never called unknown, because fewer than {FEWEST} of their '
            'training images were seen' if names else '')


def unstated(content, domains):
    """Names of the Domains for which a checkpoint's content holds no statistics."""
    known = content.get('domain_statistics', {})
    return [domain.name for domain in domains if domain.name not in known]


def identifier_of(content, domains, source):
    """The Identifier for the Domains of a checkpoint's content; UserError that names domains without statistics."""
    missing = unstated(content, domains)
    if missing:
        raise UserError(f'{source} has no image statistics of {", ".join(missing)}, which --domain auto needs; add '
                        f'them with python -m mdil identify {source} --out FILE, or name the domain')
    return Identifier([content['domain_statistics'][domain.name] for domain in domains])
