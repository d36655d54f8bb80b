"""predict.py --advise: which branch fits unlabelled images of a new place, how well, and whether to train a new one.

The expected mIoU comes from the network's own confidence. If its probabilities were calibrated, the
IoU of a class would follow from them alone. The probabilities of the class, summed over the pixels
predicted as it, give the expected number of correct pixels; summed over all pixels, they give the
expected number of pixels of the class. This "trusted" IoU is too high even on the known domain, so
it is multiplied by the ratio of true to trusted mIoU on labelled validation images. The spread of
that ratio over parts of those images gives the error.
"""
import math
from dataclasses import dataclass
from functools import reduce
from operator import add

import torch
from tqdm import tqdm

from mdil.datasets import SegmentationDataset
from mdil.datasets.loading import spaced
from mdil.evaluation import metrics
from mdil.evaluation.evaluation import logits_of
from mdil.models.identify import FEWEST
from mdil.utils.errors import UserError, counted

PART = 4            # images per part; each part gives one ratio of true to trusted mIoU
MOST = 64           # maximum number of images to segment, of the folder and of the validation set each
WORTH = 0.5         # share of unknown images above which a new branch is worth training


@dataclass(frozen=True)
class Counts:
    """Pixel counts for each class, (C,) float64.

    right: expected number of correct pixels; answers: pixels predicted as the class; pixels:
    expected number of pixels of the class.
    """
    right: torch.Tensor
    answers: torch.Tensor
    pixels: torch.Tensor

    def __add__(self, other):
        return Counts(*(getattr(self, name) + getattr(other, name) for name in ('right', 'answers', 'pixels')))

    @property
    def trusted_miou(self):
        """Mean IoU in percent if the probabilities were calibrated; classes that are never predicted are left out."""
        union = self.answers + self.pixels - self.right
        return 100 * (self.right / union)[self.answers > 0].mean().item()


def counts_of(logits, translation=None, classes=None):
    """(Counts, answers (B, H, W)) of logits (B, C, H, W), whose last class is void; void is never an answer.

    translation: for each non-void class, its index in another label space of `classes` classes.
    Counts and answers are then in that space.
    """
    probabilities = logits[:, :-1].float().softmax(dim=1)
    if translation is not None:
        folded = torch.zeros(len(logits), classes, *logits.shape[2:], device=logits.device)
        probabilities = folded.index_add_(1, torch.tensor(translation, device=logits.device), probabilities)
    best, answers = probabilities.max(dim=1)
    size = probabilities.shape[1]
    right = torch.zeros(size, device=logits.device).index_add_(0, answers.flatten(), best.flatten())
    return Counts(right.double().cpu(), torch.bincount(answers.flatten(), minlength=size).double().cpu(),
                  probabilities.sum(dim=(0, 2, 3)).double().cpu()), answers


@dataclass(frozen=True)
class Calibration:
    """mIoU in percent of a branch on its validation images, its ratio to the trusted mIoU, and the ratio's spread."""
    miou: float
    ratio: float
    spread: float = None

    def expected(self, counts):
        """(expected mIoU in percent, its error or None) for the Counts of other images."""
        return self.ratio * counts.trusted_miou, self.spread and self.spread * counts.trusted_miou


@torch.inference_mode()
def calibrate(predictor, index, dataset):
    """The Calibration of the branch `index` on a SegmentationDataset with images and labels at the network's size."""
    domain, parts = predictor.domains[index], []
    numbers = spaced(range(len(dataset)), MOST)
    bar = tqdm(range(0, len(numbers), PART), desc=f'validation images of {domain.name}', leave=False, disable=None)
    for start in bar:
        images, labels = map(torch.stack, zip(*(dataset.load(number) for number in numbers[start:start + PART])))
        logits = logits_of(predictor.model, index, images, predictor.place, predictor.precision)
        counts, answers = counts_of(logits)
        parts.append((counts, metrics.confusion(answers.cpu(), labels, domain.num_classes)))
    return calibration(parts)


def calibration(parts):
    """The Calibration of parts [(Counts, confusion matrix)]; its spread is the standard deviation over the parts."""
    matrix, counts = sum(matrix for _, matrix in parts), reduce(add, (counts for counts, _ in parts))
    ratios = torch.tensor([metrics.mean_iou(matrix) / counts.trusted_miou for counts, matrix in parts])
    ratios = ratios[ratios.isfinite()]       # NaN where all labels are void
    spread = ratios.std().item() if len(ratios) > 1 else None
    return Calibration(metrics.mean_iou(matrix), metrics.mean_iou(matrix) / counts.trusted_miou, spread)


@torch.inference_mode()
def trusted(predictor, index, prepared):
    """The summed Counts of the branch `index` on Prepared images, segmented one at a time."""
    return reduce(add, (counts_of(logits_of(predictor.model, index, image.pixels[None], predictor.place,
                                            predictor.precision))[0]
                        for image in tqdm(prepared, desc='segmenting', unit='image', leave=False, disable=None)))


def validation_set(predictor, index, root):
    """(validation images of a branch at the network's size, None), or (None, the reason) if they are not available."""
    domain = predictor.domains[index]
    try:
        return SegmentationDataset(domain, root, 'val', predictor.size), None
    except UserError as error:
        return None, str(error)


def advise(predictor, looks, prepare, root):
    """The advice about images of one place.

    looks: (N, FEATURES). prepare: returns Prepared images for a list of at most MOST indices.
    root: --data-root. Returns {'domain', 'domains': {name: share of the images}, 'unknown': share,
    'expected_miou', 'error', 'own_miou', 'why_not', 'worth'}; unknown values are None. 'why_not'
    is the reason why there is no expected mIoU, 'worth' whether a new branch is worth training.
    """
    guess = predictor.identifier.guess(looks)
    shares = torch.bincount(guess.domain, minlength=len(predictor.domains)).double() / len(looks)
    index, unknown = int(shares.argmax()), guess.unknown.double().mean().item()
    bounded = bool(predictor.identifier.thresholds[index].isfinite())
    found = {'domain': predictor.domains[index].name, 'unknown': unknown if bounded else None,
             'worth': unknown > WORTH if bounded else None,
             'domains': {domain.name: share for domain, share in zip(predictor.domains, shares.tolist())},
             'expected_miou': None, 'error': None, 'own_miou': None}
    dataset, found['why_not'] = validation_set(predictor, index, root)
    if dataset:
        known = calibrate(predictor, index, dataset)
    if dataset and math.isnan(known.miou):
        found['why_not'] = 'the labels of those that were read hold nothing but void'
    elif dataset:
        expected, error = known.expected(trusted(predictor, index, prepare(spaced(range(len(looks)), MOST))))
        found |= {'expected_miou': expected, 'error': error, 'own_miou': known.miou}
    return found


def sentences(found, images):
    """The advice as lines of text."""
    yield f'{counted(images, "image")}; the branch that fits best: {found["domain"]}'
    yield 'images by branch: ' + ', '.join(f'{name} {100 * share:.0f} %' for name, share in found['domains'].items())
    if found['unknown'] is not None:
        yield f'{100 * found["unknown"]:.0f} % are unlike any known domain'
    if found['expected_miou'] is None:
        yield f'expected mIoU: not known without labelled validation images of {found["domain"]} ({found["why_not"]})'
    else:
        error = '' if found['error'] is None else f' +- {found["error"]:.1f}'
        # Networks are overconfident on images unlike their training images.
        bound = 'at most ' if found['worth'] else ''
        yield (f'expected mIoU of that branch: {bound}{found["expected_miou"]:.1f}{error} (on its own validation '
               f'images {found["own_miou"]:.1f})')
    if found['worth'] is None:
        yield (f'whether a new branch is worth training is not known: {found["domain"]} had fewer than {FEWEST} '
               'training images, too few to tell which images are unlike them')
        return
    yield ('a new branch is worth training: most images are unlike what this one was trained on' if found['worth'] else
           'no new branch is needed: at least half of the images are like those that this one was trained on')
