"""A trained network in other programs: `mdil.load`, and `mdil.step_loss` for training loops of their own."""
import os
from numbers import Integral, Real
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

from mdil.datasets.loading import EvalBatches, make_loader
from mdil.datasets.pairs import pair_of
from mdil.datasets.segmentation import SegmentationDataset, in_rgb
from mdil.evaluation.evaluation import evaluate, figures
from mdil.evaluation.inputs import upright
from mdil.evaluation.predictor import Predictor, domain_of, trained_size
from mdil.losses.terms import CrossEntropy, Distillation
from mdil.models import checkpoint
from mdil.models.branches import Known
from mdil.models.checkpoint import check_known
from mdil.models.exported import SIDE
from mdil.models.identify import identifier_of
from mdil.models.multi_domain import MultiDomainNet
from mdil.predict import batched
from mdil.training.building import plain_weights
from mdil.training.options import LAMBDA, TEMPERATURE
from mdil.training.step_loss import StepLoss, mean_over_batch
from mdil.utils.errors import UserError
from mdil.utils.files import check_new
from mdil.utils.parallel import Place, current, pick_device
from mdil.utils.precision import check_precision, memory_format

BATCH = 6       # images that are segmented at a time
PATH = str, os.PathLike
PRECISIONS = 'fp32', 'bf16', 'fp16'


def expect(name, value, types, wanted):
    """TypeError unless the argument called `name` is of one of `types`."""
    if not isinstance(value, types):
        raise TypeError(f'{name}: {wanted} is expected, not a {type(value).__name__}')


def is_size(value):
    """Whether it is (height, width) that the network takes."""
    return isinstance(value, (tuple, list)) and len(value) == 2 and all(
        isinstance(side, Integral) and side > 0 and side % SIDE == 0 for side in value)


def check_pair(pair):
    """UserError unless it is (path of an image, path of its label)."""
    if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not all(isinstance(path, PATH) for path in pair):
        raise UserError(f'{pair!r} is not a pair (image path, label path)')


def load(file, *, domains=None, method=None, data=None, size=None, device='auto', precision='fp32'):
    """The Network in a checkpoint, a published one too.

    domains, method: names of the domains, in order, and of the method, of a file that does not say
    them. data: {name: folder or JSON file} of domains that are not built in; without, their classes
    are what the checkpoint says. size: (height, width) that images are resized to, multiples of 8
    (default: the training size). device: 'auto', 'cpu', 'cuda' ... precision: 'fp32', 'bf16' or
    'fp16'. Raises `mdil.UserError` where the file cannot be read, the device is not there, or the size is none.

        >>> net = mdil.load('step3.pth', device='cpu')
        >>> net.domains
        ['cityscapes', 'IDD']
    """
    expect('file', file, PATH, 'a path')
    expect('domains', domains, (list, tuple, type(None)), 'a list of names')
    for name in domains or ():
        expect('domains', name, str, 'a name')
    expect('data', data, (dict, type(None)), 'a dict {name: path}')
    if size is not None and not is_size(size):
        raise UserError(f'size {size}: (height, width) is expected, positive multiples of {SIDE}')
    if precision not in PRECISIONS:
        raise UserError(f'precision {precision!r} is not one of {", ".join(PRECISIONS)}')
    place = Place(current(pick_device(str(device))))
    check_precision(precision, place.device)
    known = Known(file, domains, method, data)
    found = [domain_of(entry, data or {}) for entry in known.entries]
    check_known(known.checkpoint, found)
    model = known.model.to(place.device, memory_format=memory_format(place.device, precision))
    return Network(known, Predictor(model, found, size or trained_size(known.checkpoint.content), place, precision))


class Network:
    """A trained network for several domains; `mdil.load` makes one.

    model: the MultiDomainNet, an nn.Module, for loops of your own. predictor: the
    evaluation.predictor.Predictor that images go through.
    """

    def __init__(self, known, predictor):
        self.known, self.model, self.predictor = known, predictor.model, predictor

    def __repr__(self):
        return f'Network({self.known.checkpoint.source!r}, domains={self.domains}, method={self.known.method!r})'

    @property
    def domains(self):
        """Names of the domains, in the order in which they were learnt."""
        return [domain.name for domain in self.predictor.domains]

    def classes(self, domain):
        """Names of the classes of a domain, void left out; a label is an index into them."""
        return list(self.predictor.domains[self.predictor.index(domain)].classes)

    def predict(self, images, domain='auto', probabilities=False):
        """The Prediction for an image, or a list of them for a list.

        images: a path, a PIL image, an array (see `to_image`), or a list of these, of any sizes. domain:
        the name of one, or 'auto': it is told from each image. A Prediction has `labels` (H, W)
        uint8 class indices, never void; `confidence` (H, W) float32 in [0, 1]; `domain.name`;
        `choice`, which has the `probabilities` of the domains and whether the image is `unknown`;
        and with `probabilities` also `probabilities` (C, H, W), of the classes. Tensors are on the CPU.

        Raises `mdil.UserError` for a file that cannot be read, for a domain that the network does not
        know, and for 'auto' where the checkpoint does not say how images of its domains look.

            >>> found = net.predict('photo.png')
            >>> found.domain.name, found.labels.shape, found.confidence.dtype
            ('IDD', torch.Size([64, 128]), torch.float32)
            >>> net.predict(['photo.png', numpy.zeros((20, 30, 3))], domain='IDD')[1].labels.shape
            torch.Size([20, 30])
        """
        return self.of_each(images, lambda batch: self.predictor.predict(batch, self.chosen(domain), probabilities))

    def guess_domain(self, images):
        """The Choice for an image, or a list of them for a list: `name`, `probabilities` of the domains, `unknown`.

        images and errors: as of `predict`. unknown: whether the image is like none of the domains.

            >>> choice = net.guess_domain('photo.png')
            >>> choice.name, choice.unknown, list(choice.probabilities)
            ('IDD', False, ['cityscapes', 'IDD'])
        """
        if self.chosen('auto') != 'auto':
            return self.of_each(images, lambda batch: [self.predictor.stated(self.domains[0])] * len(batch))
        return self.of_each(images, self.predictor.guess)

    def chosen(self, domain):
        """The `domain` to ask the predictor for: where there is one, there is nothing to tell from the image."""
        if domain == 'auto' and len(self.domains) == 1:
            return self.domains[0]
        if domain == 'auto' and self.predictor.identifier is None:
            self.predictor.identifier = identifier_of(self.known.about(), self.predictor.domains,
                                                      self.known.checkpoint.source)
        return domain

    def of_each(self, images, function):
        """What `function` gives for lists of PIL images, a batch at a time: a list, or one result for one image."""
        if not isinstance(images, (list, tuple)):
            return function([to_image(images)])[0]
        return [found for batch in batched(map(to_image, images), BATCH) for found in function(batch)]

    def single(self, domain):
        """The network of one domain, an nn.Module in eval mode: logits (B, C + 1, H, W) of images (B, 3, H, W).

        Images are floats in [0, 1], RGB, with sides that are multiples of 8; void is the last
        class. The module shares its weights with this network. Raises `mdil.UserError` for an
        unknown name.

            >>> net.single('IDD')(torch.rand(1, 3, 64, 128)).shape
            torch.Size([1, 27, 64, 128])
        """
        return self.model.single(self.predictor.index(domain)).eval()

    def evaluate(self, domain, pairs):
        """{'miou', 'accuracy': percent, 'iou': {class: IoU in [0, 1]}} of a domain's branch on [(image, label), ...].

        Pairs are paths; label files hold what those of the domain do. Images and labels are resized
        to the size of the training, as train.py validates. A class that occurs neither in a label
        nor in an answer has the IoU NaN and does not count. Raises `mdil.UserError` for an unknown name,
        no pair at all, and files that cannot be read.
        """
        index, place = self.predictor.index(domain), self.predictor.place
        known = self.predictor.domains[index]
        if not pairs:
            raise UserError(f'no pairs to evaluate {known.name} on')
        for pair in pairs:
            check_pair(pair)
        found = [pair_of(known.layouts[0], Path(image), Path(label)) for image, label in pairs]
        data = SegmentationDataset(known, '', 'given', self.predictor.size, pairs=found)
        loader = make_loader(data, EvalBatches(len(data), BATCH), 0, pin=False)
        score = evaluate(self.model, index, loader, plain_weights(known), place, self.predictor.precision, known.name)
        return figures(score.own, known.classes, published=False)

    def save(self, file, overwrite=False):
        """Writes a checkpoint of the network as it now is, which `load`, train.py and all tools read.

        Raises `mdil.UserError` if the file exists (unless `overwrite`) or cannot be written.
        """
        expect('file', file, PATH, 'a path')
        check_new('file', file, overwrite)
        checkpoint.save({**self.known.content(), **self.known.about()}, file)


def to_image(image):
    """The PIL image in RGB of a path, a PIL image or an array.

    Arrays are (H, W, 3) or (H, W), tensors (3, H, W) or (H, W); uint8 in [0, 255], or floats in
    [0, 1]. A file is turned upright as its EXIF data says. Raises `mdil.UserError` for a file that
    cannot be read and for images of 16 bits, ValueError for an array of another kind, TypeError for anything else.
    """
    if isinstance(image, (str, os.PathLike)):
        return upright(Path(image))
    if isinstance(image, Image.Image):
        return in_rgb(image, 'the image')
    if isinstance(image, torch.Tensor):
        image = image.detach().cpu()
        image = (image.permute(1, 2, 0) if image.ndim == 3 else image).numpy()
    if not isinstance(image, np.ndarray):
        raise TypeError(f'a path, a PIL image, an array or a list of these is expected, not a {type(image).__name__}')
    return Image.fromarray(to_bytes(image)).convert('RGB')


def to_bytes(array):
    """uint8 (H, W, 3) or (H, W) of an array of that shape, uint8 or floats in [0, 1]; ValueError for any other."""
    if array.ndim not in (2, 3) or array.ndim == 3 and array.shape[2] != 3 or 0 in array.shape:
        raise ValueError(f'the shape {array.shape} is that of no image; arrays are (H, W, 3), tensors (3, H, W)')
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    if array.dtype.kind != 'f' or not ((array >= 0) & (array <= 1)).all():
        raise ValueError(f'the array ({array.dtype}) holds neither uint8 nor floats in [0, 1]; scale it')
    return np.ascontiguousarray((255 * array).round().astype(np.uint8))


def model_of(name, net):
    """The MultiDomainNet of a Network, or what is one."""
    model = net.model if isinstance(net, Network) else net
    expect(name, model, MultiDomainNet, 'a Network, or its model,')
    return model


def index_of(net, domain):
    """Index of a domain of a Network, or of its model, given by name (a Network alone has names) or index."""
    if isinstance(domain, str):
        expect('net', net, Network, 'a Network, which knows domains by name,')
        return net.predictor.index(domain)
    expect('domain', domain, Integral, 'a name or an index')
    model_of('net', net).single(domain)     # IndexError
    return domain


def check_numbers(lambdac, temperature):
    """ValueError unless they are finite numbers of at least 0, and above 0."""
    if not isinstance(lambdac, Real) or not 0 <= lambdac < float('inf'):
        raise ValueError(f'lambdac: a finite number of at least 0 is expected, not {lambdac!r}')
    if not isinstance(temperature, Real) or not 0 < temperature < float('inf'):
        raise ValueError(f'temperature: a finite number above 0 is expected, not {temperature!r}')


def check_batch(images, labels, classes):
    """TypeError, ValueError unless a network of so many classes, void included, learns from images with these labels."""
    expect('images', images, torch.Tensor, 'a tensor')
    expect('labels', labels, torch.Tensor, 'a tensor')
    if images.ndim != 4 or images.shape[1] != 3 or labels.shape != (len(images), *images.shape[2:]):
        raise ValueError(f'images {tuple(images.shape)} and labels {tuple(labels.shape)}: (B, 3, H, W) and (B, H, W) '
                         'are expected')
    if images.dtype != torch.uint8 and not (images.is_floating_point() and ((images >= 0) & (images <= 1)).all()):
        raise ValueError(f'the images ({images.dtype}) hold neither uint8 nor floats in [0, 1]; scale them')
    if labels.is_floating_point() or labels.dtype == torch.bool or ((labels < 0) | (labels >= classes)).any():
        raise ValueError(f'the labels ({labels.dtype}) are no class indices: whole numbers from 0 to {classes - 1}, which '
                         'is void')


def step_loss(net, domain, images, labels, teacher=None, *, class_weights=None, lambdac=LAMBDA,
              temperature=TEMPERATURE):
    """The method's loss of a batch, for a training loop of your own: {'loss', 'ce', 'kd'}, 0-d tensors.

    net: a Network, or its `model`. domain: name or index of the domain that is learnt. images:
    (B, 3, H, W) uint8, or floats in [0, 1]; labels: (B, H, W) class indices, void last; both on the
    network's device. teacher: the frozen network of the step before, in eval mode, whose domains
    are the net's but for the new ones; without, there is no 'kd'. class_weights: (C + 1,) of the
    cross-entropy (default: all equal, void 0).

    loss = ce + lambdac * kd, with kd the mean per-pixel KL divergence of the net's outputs from the
    teacher's at `temperature`, times its square, summed over the old domains. Call `backward()` on 'loss'.
    `model.freeze(old)` freezes the branches of old domains; `train()` respects that.

    Raises `mdil.UserError` for a name, IndexError for an index, that the network does not know; TypeError
    and ValueError for arguments of other types, shapes and ranges.

        >>> images, labels = torch.rand(2, 3, 16, 32), torch.zeros(2, 16, 32, dtype=torch.uint8)
        >>> losses = mdil.step_loss(net, 'IDD', images, labels)
        >>> losses['loss'].backward()
        >>> sorted(losses)
        ['ce', 'loss']
    """
    student, domain = model_of('net', net), index_of(net, domain)
    check_batch(images, labels, student.num_classes[domain])
    check_numbers(lambdac, temperature)
    options = SimpleNamespace(lambdac=lambdac, temperature=temperature, distillation='kl', distill_domains=None)
    teacher = None if teacher is None else model_of('teacher', teacher)
    terms = [CrossEntropy(options)] + ([Distillation(options)] if teacher is not None else [])
    weights = [torch.tensor([1.0] * (count - 1) + [0.0]) for count in student.num_classes]
    if class_weights is not None:
        weights[domain] = torch.as_tensor(class_weights, dtype=torch.float32)
        if weights[domain].shape != (student.num_classes[domain],):
            raise ValueError(f'class_weights {tuple(weights[domain].shape)}: {student.num_classes[domain]} numbers are '
                             'expected, void last')
    step = StepLoss(student, teacher, [each.to(images.device) for each in weights], terms)
    place, values = Place(images.device), {term.name: 0.0 for term in terms}
    for term in terms:
        for part, factor in term.parts(SimpleNamespace(teacher=teacher)):
            value, _ = mean_over_batch(step(images, labels, domain, term.name, part), place)
            values[term.name] = values[term.name] + factor * value
    return {'loss': sum(term.weight * values[term.name] for term in terms), **values}
