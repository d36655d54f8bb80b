"""A trained network with what it takes to use it: images of any size in, class indices of the same size out."""
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import interpolate

from mdil.evaluation.evaluation import check_stated, load_network_and_domains, logits_of
from mdil.utils.errors import UserError
from mdil.utils.parser import data_paths

PUBLISHED_SIZE = 512, 1024      # height, width of files that do not say what they were trained at
SIDE = 8                        # the network takes sides that are multiples of it


@dataclass(frozen=True)
class Prepared:
    """An image ready for the network: pixels (3, h, w) uint8, and its own size (H, W)."""
    pixels: torch.Tensor
    size: tuple


@dataclass(frozen=True)
class Prediction:
    """What the network says of an image of H x W pixels, on the CPU.

    domain: the Domain whose branch was asked. labels: its class indices (H, W) uint8, never void.
    confidence: (H, W) float32, the probability in [0, 1] of each pixel's answer among the
    classes that are not void.
    """
    domain: object
    labels: torch.Tensor
    confidence: torch.Tensor

    @property
    def shares(self):
        """{class: share of the pixels} of the classes that occur."""
        counts = torch.bincount(self.labels.flatten(), minlength=len(self.domain.classes)).tolist()
        return {name: count / self.labels.numel() for name, count in zip(self.domain.classes, counts) if count}


class Predictor:
    """A network, the Domains of its branches and the size (height, width) that its images are resized to.

    size None: images keep their size, but for sides that are no multiples of 8.
    """

    def __init__(self, model, domains, size, place, precision='fp32'):
        self.model, self.domains, self.size = model.eval(), domains, size
        self.place, self.precision = place, precision

    def index(self, name):
        """Index of the domain called `name`, or by an alias; UserError if the network does not know it."""
        for index, domain in enumerate(self.domains):
            if name.lower() in map(str.lower, (domain.name, *domain.aliases)):
                return index
        raise UserError(f'the network does not know the domain {name!r} but {", ".join(d.name for d in self.domains)}')

    def prepare(self, image):
        """The Prepared form of a PIL image in RGB."""
        height, width = self.size or (max(SIDE, round(side / SIDE) * SIDE) for side in image.size[::-1])
        resized = image.resize((width, height), resample=2)     # bilinear, as in training
        return Prepared(torch.from_numpy(np.array(resized).transpose(2, 0, 1).copy()), image.size[::-1])

    def predict(self, images, domain):
        """The Predictions of PIL images in RGB, of any sizes, by the branch of `domain` (an index or a name)."""
        index = self.index(domain) if isinstance(domain, str) else domain
        return self.predict_prepared([self.prepare(image) for image in images], [index] * len(images))

    @torch.inference_mode()
    def predict_prepared(self, images, indices):
        """The Predictions of Prepared images, each by the branch of the domain index next to it."""
        groups = {}
        for number, (image, index) in enumerate(zip(images, indices)):
            groups.setdefault((image.pixels.shape, index), []).append(number)
        found = {}
        for (_, index), numbers in groups.items():
            batch = torch.stack([images[number].pixels for number in numbers])
            logits = logits_of(self.model, index, batch, self.place, self.precision)
            for number, own in zip(numbers, logits):
                found[number] = self.answer(own, images[number].size, self.domains[index])
        return [found[number] for number in range(len(images))]

    def answer(self, logits, size, domain):
        """The Prediction of logits (C, h, w) of `domain`, void their last class, for an image of `size` (H, W)."""
        logits = logits[None, :domain.void].float()
        if logits.shape[2:] != size:
            logits = interpolate(logits, size, mode='bilinear', align_corners=False)
        best, labels = logits[0].max(dim=0)
        confidence = (best - logits[0].logsumexp(dim=0)).exp()
        return Prediction(domain, labels.to(torch.uint8).cpu(), confidence.clamp(max=1).cpu())


def trained_size(checkpoint):
    """(height, width) that a checkpoint was trained at; the published size where it does not say."""
    options = checkpoint.content.get('options', {})
    sides = options.get('height'), options.get('width')
    return sides if all(isinstance(side, int) and side > 0 and side % SIDE == 0 for side in sides) else PUBLISHED_SIZE


def load_predictor(options, place):
    """The Predictor of a checkpoint, as the options of predict.py say."""
    checkpoint, model, domains = load_network_and_domains(options.state, options, place)
    check_stated(options.domains, domains, options.state, data_paths(options.data))
    size = None if options.native else options.size or trained_size(checkpoint)
    return Predictor(model, domains, size, place, options.precision)
