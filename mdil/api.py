"""Trained networks in other programs: `mdil.load`, and `mdil.step_loss` for custom training loops."""
import contextlib
import os
import re
from numbers import Integral, Real
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

from mdil.datasets.class_weights import equal_weights
from mdil.datasets.domains import domain_of, is_declared
from mdil.datasets.loading import EvalBatches, make_loader
from mdil.datasets.pairs import pair_of
from mdil.datasets.segmentation import SegmentationDataset, in_rgb
from mdil.evaluation.evaluation import evaluate, figures
from mdil.evaluation.inputs import upright
from mdil.evaluation.predictor import Predictor, trained_size
from mdil.losses.terms import CrossEntropy, Distillation
from mdil.models import checkpoint
from mdil.models.branches import LoadedCheckpoint
from mdil.models.checkpoint import check_known
from mdil.models.identify import identifier_of, unstated
from mdil.models.multi_domain import MultiDomainNet
from mdil.training.options import LAMBDA, TEMPERATURE
from mdil.training.step_loss import StepLoss, mean_over_batch
from mdil.utils.errors import UserError, brief
from mdil.utils.files import check_new
from mdil.utils.parallel import Place, pick_device
from mdil.utils.parser import LONGEST, SIDE, is_side
from mdil.utils.precision import PRECISIONS, check_precision, memory_format
from mdil.utils.workers import batched

BATCH = 6       # images segmented at a time
PATH = str, os.PathLike


def expect(name, value, types, wanted):
    """TypeError unless `value`, the argument called `name`, is an instance of `types`; `wanted` describes them."""
    if not isinstance(value, types):
        raise TypeError(f'{name}: {wanted} is expected, not a {type(value).__name__}')


def expanded(name, path):
    """The Path, with ~ replaced; UserError, naming the argument, if it is empty or ~ is of an unknown user."""
    if not os.fspath(path) or '\0' in os.fspath(path):
        raise UserError(f'{name} is empty, or holds a null character; a path is expected')
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(f'{name} {path}: there is no such user') from None


def data_folders(data):
    """The argument `data` as {name: path}, with ~ replaced; TypeError unless it is {name: path}, or None."""
    expect('data', data, (dict, type(None)), 'a dict {name: path}')
    for name, path in (data or {}).items():
        expect('data', name, str, 'a dict {name: path}')
        expect(f'data[{name!r}]', path, PATH, 'a path')
    return {name: str(expanded(f'data[{name!r}]', path)) for name, path in (data or {}).items()}


def is_size(value):
    """Whether `value` is a (height, width) that the network accepts."""
    return isinstance(value, (tuple, list)) and len(value) == 2 and all(map(is_side, value))


def check_pair(pair):
    """UserError unless `pair` is (image path, label path)."""
    if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not all(isinstance(path, PATH) for path in pair):
        raise UserError(f'{pair!r} is not a pair (image path, label path)')


@contextlib.contextmanager
def as_arguments():
    """In a UserError, names options of train.py as arguments; commands to run stay as they are."""
    try:
        yield
    except UserError as error:
        if 'python ' not in str(error):
            as_argument = lambda option: option[1].replace('-', '_')
            error.args = re.sub(r'(?<![\w-])--([a-z][a-z-]*)(?!\w)', as_argument,
                                str(error).removesuffix(' (--help lists the options)')),
        raise


@as_arguments()
def load(file, *, domains=None, method=None, data=None, size=None, device='auto', precision='fp32'):
    """The Network in a checkpoint, ours or a published one.

    domains, method: names of the domains, in order, and of the method, for a file that does not state them.
    data: {name: folder or JSON file} of domains that are not built in. Without it, their classes are those
        in the checkpoint.
    size: (height, width) to which images are resized, multiples of 8 (default: the training size).
    device: 'auto', 'cpu', 'cuda', ...
    precision: 'fp32', 'bf16' or 'fp16'.

    Raises `mdil.UserError` if the file cannot be read, the device is not available, or an argument is
    invalid.

        >>> net = mdil.load('step3.pth', device='cpu')
        >>> net.domains
        ['cityscapes', 'IDD']
    """
    expect('file', file, PATH, 'a path')
    expect('domains', domains, (list, tuple, type(None)), 'a list of names')
    for name in domains or ():
        expect('domains', name, str, 'a name')
    paths = data_folders(data)
    if size is not None and not is_size(size):
        raise UserError(f'size {size}: (height, width) is expected, multiples of {SIDE} up to {LONGEST}')
    if precision not in PRECISIONS:
        raise UserError(f'precision {precision!r} is not one of {", ".join(PRECISIONS)}')
    place = Place(pick_device(str(device)))
    check_precision(precision, place.device)
    known = LoadedCheckpoint(expanded('file', file), domains, method, paths)
    found = [domain_of(entry, paths) for entry in known.entries]
    check_known(known.checkpoint, found)
    model = known.model.to(place.device, memory_format=memory_format(place.device, precision))
    return Network(known, Predictor(model, found, size or trained_size(known.checkpoint.content), place, precision))


class Network:
    """A trained network for several domains; `mdil.load` makes one.

    model: the MultiDomainNet, an nn.Module, for loops of your own.
    predictor: the evaluation.predictor.Predictor that segments images.
    """

    def __init__(self, known, predictor):
        self.known, self.model, self.predictor = known, predictor.model, predictor

    def __repr__(self):
        return f'Network({self.known.checkpoint.source!r}, domains={self.domains}, method={self.known.method!r})'

    @property
    def domains(self):
        """Names of the domains, in the order they were learnt."""
        return [domain.name for domain in self.predictor.domains]

    def classes(self, domain):
        """Names of a domain's classes, without void. Labels are indices into this list."""
        return list(self.predictor.domains[self.predictor.index(domain)].classes)

    def predict(self, images, domain='auto', probabilities=False):
        """The Prediction for an image, or a list of Predictions for a list of images.

        images: a path, a PIL image, an array (see `to_image`), or a list of these, of any size.
        domain: the name of a domain, or 'auto' to identify it from each image.

        A Prediction has `labels` (H, W) uint8 class indices, never void; `confidence` (H, W) float32 in
        [0, 1]; `domain.name`; and `choice`, which has the `probabilities` of the domains and whether the
        image is `unknown`. If `probabilities` is set, it also has `probabilities` (C, H, W) of the classes.
        Tensors are on the CPU.

        Raises `mdil.UserError` for a file that cannot be read, for a domain that the network does not know,
        and for 'auto' if the checkpoint does not describe what images of its domains look like.

            >>> found = net.predict('photo.png')
            >>> found.domain.name, found.labels.shape, found.confidence.dtype
            ('IDD', torch.Size([64, 128]), torch.float32)
            >>> net.predict(['photo.png', numpy.zeros((20, 30, 3))], domain='IDD')[1].labels.shape
            torch.Size([20, 30])
        """
        return self.of_each(images, lambda batch: self.predictor.predict(batch, self.chosen(domain), probabilities))

    def guess_domain(self, images):
        """The Choice for an image, or a list of Choices for a list of images.

        A Choice has the domain's `name`, the `probabilities` of all domains, and `unknown`: whether the
        image resembles none of them. Images and errors are as for `predict`.

            >>> choice = net.guess_domain('photo.png')
            >>> choice.name, choice.unknown, list(choice.probabilities)
            ('IDD', False, ['cityscapes', 'IDD'])
        """
        if self.chosen('auto') != 'auto':
            return self.of_each(images, lambda batch: [self.predictor.stated(self.domains[0])] * len(batch))
        return self.of_each(images, self.predictor.guess)

    def chosen(self, domain):
        """The `domain` to pass to the predictor.

        'auto' becomes the domain's name if the network has only one and no statistics of its images. Otherwise it needs
        the predictor's identifier, which this creates on first use.
        """
        if domain != 'auto' or self.predictor.identifier:
            return domain
        about, domains = self.known.about(), self.predictor.domains
        if len(domains) == 1 and unstated(about, domains):
            return self.domains[0]
        self.predictor.identifier = identifier_of(about, domains, self.known.checkpoint.source)
        return domain

    def of_each(self, images, function):
        """Applies `function`, which takes a list of PIL images, in batches: a list of results, or one for one image."""
        if not isinstance(images, (list, tuple)):
            return function([to_image(images)])[0]
        return [found for batch in batched(map(to_image, images), BATCH) for found in function(batch)]

    def single(self, domain):
        """The network of one domain, an nn.Module in eval mode: images (B, 3, H, W) to logits (B, C + 1, H, W).

        Images are RGB, floats in [0, 1], with sides that are multiples of 8. Void is the last class. The
        module shares its weights with this network. Raises `mdil.UserError` for an unknown name.

            >>> net.single('IDD')(torch.rand(1, 3, 64, 128)).shape
            torch.Size([1, 27, 64, 128])
        """
        return self.model.single(self.predictor.index(domain)).eval()

    def evaluate(self, domain, pairs):
        """{'miou', 'accuracy', 'iou': {class: IoU}} of a domain's branch on [(image, label), ...].

        mIoU and accuracy are in percent, the classes' IoUs in [0, 1]. Pairs are paths; label files hold the
        same values as the domain's own: of a domain that is not built in, those that its `data` given to `load` states,
        or class indices and 255 for void. Images and labels are resized to the size that `load` chose, as
        train.py does when it validates. A class that occurs in neither labels nor predictions has the IoU
        NaN and does not count. Raises `mdil.UserError` for an unknown name, an empty list and files that
        cannot be read.
        """
        index, place = self.predictor.index(domain), self.predictor.place
        known, pairs = self.predictor.domains[index], list(pairs)
        if not pairs:
            raise UserError(f'no pairs to evaluate {known.name} on')
        for pair in pairs:
            check_pair(pair)
        found = [pair_of(known.layouts[0], Path(image), Path(label)) for image, label in pairs]
        data = SegmentationDataset(known, '', 'given', self.predictor.size, pairs=found)
        loader = make_loader(data, EvalBatches(len(data), BATCH), 0, pin=False)
        try:
            score = evaluate(self.model, index, loader, equal_weights(known.num_classes), place,
                             self.predictor.precision, known.name)
        except UserError as error:
            if is_declared(known.name, self.known.paths or {}):
                raise
            raise UserError(f'{error}; a checkpoint does not say how labels are stored: if yours hold other values '
                            f'than class indices, pass data={{{known.name!r}: FOLDER}} to mdil.load') from None
        return figures(score.own, known.classes, published=False)

    @as_arguments()
    def save(self, file, overwrite=False):
        """Writes a checkpoint of the network in its current state, which `load`, train.py and all tools read.

        Raises `mdil.UserError` if the file exists (unless `overwrite`) or cannot be written.
        """
        expect('file', file, PATH, 'a path')
        file = expanded('file', file)
        check_new('file', file, overwrite)
        checkpoint.save({**self.known.content(), **self.known.about()}, file)


def to_image(image):
    """A path, a PIL image or an array as a PIL image in RGB.

    Arrays are (H, W, 3) or (H, W), tensors (3, H, W) or (H, W); uint8 in [0, 255], or floats in [0, 1].
    Images from files are rotated as their EXIF data says. Raises `mdil.UserError` for a file that cannot be
    read and for 16-bit images, ValueError for other arrays, TypeError for anything else.
    """
    if isinstance(image, (str, os.PathLike)):
        return upright(expanded('image', image))
    if isinstance(image, Image.Image):
        if 0 in image.size:
            raise ValueError(f'the image has no pixels, its size is {image.size}')
        try:
            image.load()        # of a file that Pillow has only opened
            return in_rgb(image, 'the image')
        except OSError as error:
            raise UserError(f'the image cannot be read ({brief(error)})') from None
    if isinstance(image, torch.Tensor):
        image = image.detach().cpu()
        image = image.float() if image.is_floating_point() else image       # numpy has no bfloat16
        image = (image.permute(1, 2, 0) if image.ndim == 3 else image).numpy()
    if not isinstance(image, np.ndarray):
        raise TypeError(f'a path, a PIL image, an array or a list of these is expected, not {type(image).__name__}')
    return Image.fromarray(to_bytes(image)).convert('RGB')


def to_bytes(array):
    """A uint8 or float array in [0, 1], (H, W, 3) or (H, W), as uint8 of the same shape; ValueError for any other."""
    if array.ndim not in (2, 3) or array.ndim == 3 and array.shape[2] != 3 or 0 in array.shape:
        raise ValueError(f'the shape {array.shape} is that of no image; arrays are (H, W, 3), tensors (3, H, W)')
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    if array.dtype.kind != 'f' or not ((array >= 0) & (array <= 1)).all():
        raise ValueError(f'the array ({array.dtype}) holds neither uint8 nor floats in [0, 1]; scale it')
    return np.ascontiguousarray((255 * array).round().astype(np.uint8))


def model_of(name, net):
    """The MultiDomainNet of a Network; `net` itself if it is one. TypeError, naming the argument, for anything else."""
    model = net.model if isinstance(net, Network) else net
    expect(name, model, MultiDomainNet, 'a Network, or its model,')
    return model


def index_of(net, domain):
    """Index of a domain given by name or index. Names work with a Network only, not with its model."""
    if isinstance(domain, str):
        expect('net', net, Network, 'a Network, which knows domains by name,')
        return net.predictor.index(domain)
    expect('domain', domain, Integral, 'a name or an index')
    if isinstance(domain, bool):
        raise TypeError(f'domain: a name or an index is expected, not {domain}')
    model_of('net', net).single(domain)     # IndexError
    return domain


def teacher_of(net, domain, teacher):
    """The MultiDomainNet of a teacher; ValueError unless it knows the first domains of `net`, not number `domain`."""
    model, known = model_of('teacher', teacher), net.num_classes
    if model.num_classes != known[:len(model.views)]:
        raise ValueError(f'teacher: its domains have {model.num_classes} classes, those of net {known}, void included; '
                         'the network of the step before is expected')
    if len(model.views) > domain:
        raise ValueError('teacher: it knows the domain that is learnt; the network of the step before is expected')
    return model


def check_numbers(lambdac, temperature):
    """ValueError unless both are finite numbers, lambdac at least 0 and temperature above 0."""
    if not isinstance(lambdac, Real) or not 0 <= lambdac < float('inf'):
        raise ValueError(f'lambdac: a finite number of at least 0 is expected, not {lambdac!r}')
    if not isinstance(temperature, Real) or not 0 < temperature < float('inf'):
        raise ValueError(f'temperature: a finite number above 0 is expected, not {temperature!r}')


def check_batch(images, labels):
    """TypeError or ValueError unless images and labels are tensors of a batch, and the images in their range."""
    expect('images', images, torch.Tensor, 'a tensor')
    expect('labels', labels, torch.Tensor, 'a tensor')
    if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape or labels.shape != (
            len(images), *images.shape[2:]):
        raise ValueError(f'images {tuple(images.shape)} and labels {tuple(labels.shape)}: (B, 3, H, W) and (B, H, W) '
                         'are expected')
    if images.dtype != torch.uint8 and not (images.is_floating_point() and ((images >= 0) & (images <= 1)).all()):
        raise ValueError(f'the images ({images.dtype}) hold neither uint8 nor floats in [0, 1]; scale them')


def class_indices(labels, classes):
    """The labels as uint8 or int64; ValueError unless they are indices of `classes` classes, void included."""
    whole = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
    found = labels.long() if whole and labels.dtype != torch.uint8 else labels
    if not whole or ((found < 0) | (found >= classes)).any():
        raise ValueError(f'the labels ({labels.dtype}) are no class indices: whole numbers from 0 to {classes - 1}, '
                         'which is void')
    return found


def step_loss(net, domain, images, labels, teacher=None, *, class_weights=None, lambdac=LAMBDA,
              temperature=TEMPERATURE):
    """The method's loss of a batch, for a training loop of your own: {'loss', 'ce', 'kd'}, 0-d tensors.

    net: a Network, or its `model`.
    domain: name or index of the domain that is learnt.
    images: (B, 3, H, W) uint8, or floats in [0, 1], on the network's device.
    labels: (B, H, W) class indices, void last, on the network's device.
    teacher: the frozen network of the previous step, in eval mode. It knows the net's domains except the
        new ones. Without it, there is no 'kd'.
    class_weights: (C + 1,) for the cross-entropy (default: all equal, void 0).

    loss = ce + lambdac * kd. kd is the mean per-pixel KL divergence of the net's outputs from the teacher's
    at `temperature`, times the temperature squared, summed over the old domains. Call `backward()` on
    'loss'. `model.freeze(old)` freezes the branches of old domains; `train()` respects that.

    Raises `mdil.UserError` for a name, and IndexError for an index, that the network does not know;
    TypeError and ValueError for arguments of the wrong type, shape or range, and for a teacher that does not fit.

        >>> images, labels = torch.rand(2, 3, 16, 32), torch.zeros(2, 16, 32, dtype=torch.uint8)
        >>> losses = mdil.step_loss(net, 'IDD', images, labels)
        >>> losses['loss'].backward()
        >>> sorted(losses)
        ['ce', 'loss']
    """
    student, domain = model_of('net', net), index_of(net, domain)
    check_batch(images, labels)
    labels = class_indices(labels, student.num_classes[domain])
    check_numbers(lambdac, temperature)
    options = SimpleNamespace(lambdac=lambdac, temperature=temperature, distillation='kl', distill_domains=None)
    teacher = None if teacher is None else teacher_of(student, domain, teacher)
    terms = [CrossEntropy(options)] + ([Distillation(options)] if teacher is not None else [])
    weights = list(map(equal_weights, student.num_classes))
    if class_weights is not None:
        weights[domain] = torch.as_tensor(class_weights, dtype=torch.float32)
        if weights[domain].shape != (student.num_classes[domain],) or not (
                weights[domain].isfinite() & (weights[domain] >= 0)).all():
            raise ValueError(f'class_weights {tuple(weights[domain].shape)}: {student.num_classes[domain]} finite '
                             'numbers of at least 0 are expected, void last')
    if images.is_floating_point():
        images = images.to(next(student.parameters()).dtype)
    step = StepLoss(student, teacher, [each.to(images.device) for each in weights], terms)
    place, values = Place(images.device), {term.name: 0.0 for term in terms}
    for term in terms:
        for part, factor in term.parts(SimpleNamespace(teacher=teacher)):
            value, _ = mean_over_batch(step(images, labels, domain, term.name, part), place)
            values[term.name] = values[term.name] + factor * value
    return {'loss': sum(term.weight * values[term.name] for term in terms), **values}
