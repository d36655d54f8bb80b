"""Prediction with a trained network: images of any size in, class indices of the same size out."""
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate

from mdil.datasets.domains import domain_of, index_among
from mdil.evaluation.evaluation import load_network_and_domains, logits_of
from mdil.models.checkpoint import stated_size
from mdil.models.exported import Exported, is_exported
from mdil.models.identify import appearance, identifier_of, unstated
from mdil.utils.parallel import Place
from mdil.utils.parser import PUBLISHED_SIZE, SIDE, data_paths


@dataclass(frozen=True)
class Prepared:
    """An image ready for the network: pixels (3, h, w) uint8, and its own size (H, W)."""
    pixels: torch.Tensor
    size: tuple


@dataclass(frozen=True)
class Choice:
    """The index of the branch for an image, {domain: probability}, and whether the image is like no known domain."""
    index: int
    probabilities: dict
    unknown: bool = False

    @property
    def name(self):
        """Name of the most probable domain, whose branch segments the image."""
        return max(self.probabilities, key=self.probabilities.get)


@dataclass(frozen=True)
class Prediction:
    """The prediction for an image of H x W pixels, on the CPU.

    domain: the Domain whose branch made it; choice: how it was chosen. labels: class indices (H, W)
    uint8, never void. confidence: (H, W) float32, the probability in [0, 1] of each pixel's label
    among the non-void classes. probabilities: (C, H, W) float32 of all non-void classes, or None if
    they were not requested.
    """
    domain: object
    choice: Choice
    labels: torch.Tensor
    confidence: torch.Tensor
    probabilities: torch.Tensor = None

    def __repr__(self):
        return f'Prediction({self.domain.name!r}, {tuple(self.labels.shape)}, confidence {self.confidence.mean():.2f})'

    @property
    def shares(self):
        """{class: share of the pixels in [0, 1]} of the classes that occur."""
        counts = torch.bincount(self.labels.flatten(), minlength=len(self.domain.classes)).tolist()
        return {name: count / self.labels.numel() for name, count in zip(self.domain.classes, counts) if count}


class Predictor:
    """A network, the Domains of its branches and the size (height, width) that images are resized to.

    size: None keeps the size of each image, with sides rounded to multiples of 8. identifier: the
    models.identify.Identifier that detects the domain of an image, or None.
    """

    def __init__(self, model, domains, size, place, precision='fp32', identifier=None):
        self.model, self.domains, self.size = model.eval(), domains, size
        self.place, self.precision, self.identifier = place, precision, identifier

    def index(self, name):
        """Index of the domain with the name or alias `name`; UserError if the network does not know it."""
        if not isinstance(name, str):
            raise TypeError(f'the name of a domain is expected, not {name!r}')
        return index_among([domain.name for domain in self.domains], name, 'the network')

    def prepare(self, image):
        """The Prepared form of a PIL image in RGB."""
        height, width = self.size or (max(SIDE, round(side / SIDE) * SIDE) for side in image.size[::-1])
        resized = image.resize((width, height), resample=Image.BILINEAR)
        return Prepared(torch.from_numpy(np.array(resized).transpose(2, 0, 1).copy()), image.size[::-1])

    def stated(self, name):
        """The Choice of the domain called `name`."""
        index = self.index(name)
        return Choice(index, {self.domains[index].name: 1.0})

    def choices(self, guess):
        """The Choices for the images of a models.identify.Guess."""
        names = [domain.name for domain in self.domains]
        return [Choice(index, dict(zip(names, probabilities)), unknown) for index, probabilities, unknown
                in zip(guess.domain.tolist(), guess.probabilities.tolist(), guess.unknown.tolist())]

    def guess(self, images):
        """The Choice for each of a list of PIL images in RGB, detected from the image."""
        return self.choices(self.identifier.guess(torch.stack([appearance(image) for image in images])))

    def predict(self, images, domain='auto', probabilities=False):
        """The Predictions for PIL images in RGB of any size.

        domain: whose branch to use, or 'auto' to detect it for each image. probabilities: whether the
        Predictions hold them.
        """
        choices = self.guess(images) if domain == 'auto' else [self.stated(domain)] * len(images)
        return self.predict_prepared([self.prepare(image) for image in images], choices, probabilities)

    @torch.inference_mode()
    def predict_prepared(self, images, choices, probabilities=False):
        """The Predictions for Prepared images, each from the branch of its Choice."""
        groups, found = {}, {}
        for number, (image, choice) in enumerate(zip(images, choices)):
            groups.setdefault((image.pixels.shape, choice.index), []).append(number)
        for (_, index), numbers in groups.items():
            batch = torch.stack([images[number].pixels for number in numbers])
            logits = logits_of(self.model, index, batch, self.place, self.precision)
            for number, own in zip(numbers, logits):
                found[number] = self.answer(own, images[number].size, choices[number], probabilities)
        return [found[number] for number in range(len(images))]

    def answer(self, logits, size, choice, probabilities=False):
        """The Prediction for an image of `size` (H, W) from its branch's logits (C, h, w), whose last class is void."""
        domain = self.domains[choice.index]
        logits = logits[None, :domain.void].float()
        if logits.shape[2:] != size:
            logits = interpolate(logits, size, mode='bilinear', align_corners=False)
        best, labels = logits[0].max(dim=0)
        confidence = (best - logits[0].logsumexp(dim=0)).exp()
        return Prediction(domain, choice, labels.to(torch.uint8).cpu(), confidence.clamp(max=1).cpu(),
                          logits[0].softmax(dim=0).cpu() if probabilities else None)


def trained_size(content):
    """(height, width) that a checkpoint was trained at, from its content; PUBLISHED_SIZE if it does not say."""
    return stated_size(content) or PUBLISHED_SIZE


def exported_predictor(options):
    """The Predictor for a network that `python -m mdil export` wrote; it runs on the CPU."""
    network = Exported(options.state)
    size = None if options.native else options.size or (network.about['height'], network.about['width'])
    return Predictor(network, [domain_of(network.about, data_paths(options.data))], size, Place(torch.device('cpu')))


def load_predictor(options, place):
    """The Predictor for a checkpoint or an exported network, as the options of predict.py say."""
    if is_exported(options.state):
        return exported_predictor(options)
    checkpoint, model, domains = load_network_and_domains(options.state, place, data_paths(options.data),
                                                          options.domains, options.method, options.precision)
    size = None if options.native else options.size or trained_size(checkpoint.content)
    # A single domain without statistics needs no choice; with them, images unlike it are called unknown.
    auto = options.domain == 'auto' or options.domain is None and (
        len(domains) > 1 or not unstated(checkpoint.content, domains))
    identifier = identifier_of(checkpoint.content, domains, options.state) if auto else None
    return Predictor(model, domains, size, place, options.precision, identifier)
