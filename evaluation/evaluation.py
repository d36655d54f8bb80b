"""Evaluating networks on a split: confusion matrices, losses, and the scores computed from them."""
import sys
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch.nn.functional import interpolate
from tqdm import tqdm

from mdil.datasets import SegmentationDataset, common, get_domain
from mdil.datasets.class_weights import equal_weights
from mdil.datasets.domains import domain_of, index_among
from mdil.datasets.loading import EvalBatches, make_loader
from mdil.datasets.segmentation import load_image, open_label, to_classes
from mdil.evaluation import metrics
from mdil.losses import cross_entropy_parts
from mdil.models.checkpoint import check_known, load_network, loading_summary, names_in, read_checkpoint
from mdil.utils.errors import UserError
from mdil.utils.graphs import graphed
from mdil.utils.parallel import summed
from mdil.utils.parser import data_paths
from mdil.utils.precision import autocast, memory_format, to_float, wide_type


@dataclass
class Score:
    """A network's result on one domain: confusion matrix int64 (T, C) on the CPU, and mean loss.

    T > C if the labels are finer than the classes (see datasets.common.with_finer_labels).
    """
    matrix: torch.Tensor
    loss: float

    @property
    def own(self):
        """The confusion matrix (C, C) of the domain's own classes."""
        truths, classes = self.matrix.shape
        return metrics.fold(self.matrix, [min(row, classes - 1) for row in range(truths)], range(classes))

    def miou(self, published=False):
        """Mean IoU in percent."""
        return metrics.mean_iou(self.own, published)


def logits_of(model, number, images, place, precision):
    """Logits (B, C, H, W) of the model's domain `number`, on the place's device, for images (B, 3, H, W).

    images: uint8, or floats in [0, 1].
    """
    images = to_float(images.to(place.device, non_blocking=True))
    with autocast(place.device, precision):
        return model(images.contiguous(memory_format=memory_format(place.device, precision)), number)


def at_label_size(logits, labels):
    """Yields (slice of the batch, logits (N, C, H, W), labels (N, H, W) of the same size).

    labels: (B, H, W) of the logits' size, or a list of B labels of any size; each image's logits
    are then resized bilinearly to its label.
    """
    if isinstance(labels, torch.Tensor):
        yield slice(None), logits, labels
        return
    for number, label in enumerate(labels):
        larger = interpolate(logits[number:number + 1].float(), label.shape, mode='bilinear', align_corners=False)
        yield slice(number, number + 1), larger, label[None]


@torch.inference_mode()
def answers(model, number, loader, place, precision, name):
    """Yields (indices, images on the CPU, logits, labels int64) over a loader; logits and labels are on the device.

    The next iteration may overwrite the logits.
    """
    model.eval()
    forward = graphed(partial(logits_of, model, number, place=place, precision=precision), place)
    for images, labels, indices in tqdm(loader, desc=f'eval {name}', leave=False,
                                        disable=None if place.main else True):
        logits = forward(images.to(place.device, non_blocking=True))
        for part, scored, truth in at_label_size(logits, labels):
            yield indices[part], images[part], scored, truth.to(place.device, non_blocking=True).long()


@torch.inference_mode()
def evaluate(model, number, loader, weights, place, precision='fp32', name='', truths=None, watch=None):
    """The Score of `model`'s domain `number` over `loader`, summed over all ranks.

    weights: (C,) cross-entropy weights. truths: the number T of label values (default: C); those
    from C - 1 on are void. watch: called as watch(index, image uint8 (3, H, W), label, prediction)
    for each of this rank's images; label and prediction are class indices (H, W) on the CPU. Leaves
    the model in eval mode.
    """
    classes, truths = len(weights), truths or len(weights)
    weights = weights.to(place.device)
    matrix = torch.zeros(truths, classes, dtype=torch.int64, device=place.device)
    loss = torch.zeros(2, dtype=wide_type(place.device), device=place.device)
    for indices, images, logits, labels in answers(model, number, loader, place, precision, name):
        own = labels if truths == classes else labels.clamp(max=classes - 1)
        predictions = logits.argmax(dim=1)
        loss += torch.stack(cross_entropy_parts(logits, own, weights)).to(loss.dtype)
        matrix += metrics.confusion(predictions, labels, classes, truths)
        if watch:
            for item in zip(indices.tolist(), images, own.cpu(), predictions.cpu()):
                watch(*item)
    summed(matrix, place)
    total, mass = summed(loss, place).tolist()
    return Score(matrix.cpu(), total / mass if mass else 0.0)


def cross_confusion(model, number, loader, classes, truths, place, precision, name):
    """Confusion matrix int64 (truths, classes) of head `number` on another domain's images, summed over all ranks."""
    matrix = torch.zeros(truths, classes, dtype=torch.int64, device=place.device)
    for _, _, logits, labels in answers(model, number, loader, place, precision, name):
        matrix += metrics.confusion(logits.argmax(dim=1), labels, classes, truths)
    return summed(matrix, place).cpu()


class NativeLabels(SegmentationDataset):
    """A domain's split with images resized to (height, width) and labels at their files' own size."""

    def sample_bytes(self):
        """Bytes of an image and its label, if all labels are as large as the first."""
        width, height = open_label(self.pairs[0]).size
        return 3 * self.size[0] * self.size[1] + height * width

    def load(self, index):
        """Image (3, height, width) and label (H, W) number `index`, uint8."""
        pair = self.pairs[index]
        label = open_label(pair)
        image = load_image(pair, label.size, self.size)
        return image, torch.from_numpy(to_classes(np.asarray(label), pair))


def split_of(domain, root, split, size, resolution):
    """The data set of a domain's split with images resized to `size`.

    resolution: 'published' resizes the labels too, 'native' keeps their own size.
    """
    return (NativeLabels if resolution == 'native' else SegmentationDataset)(domain, root, split, size)


def keep_labels(samples):
    """Collates samples with labels of different sizes: images (B, 3, H, W), list of labels, indices (B,)."""
    images, labels, indices = zip(*samples)
    return torch.stack(images), list(labels), torch.tensor(indices)


def check_order(states, known):
    """UserError unless the domains of each checkpoint begin with those of the one before."""
    names = [[domain.name for domain in domains] for domains in known]
    for number in range(1, len(names)):
        if names[number][:len(names[number - 1])] != names[number - 1]:
            raise UserError(f'--state is not in step order: {states[number - 1]} knows '
                            f'{", ".join(names[number - 1])}, but the next, {states[number]}, '
                            f'{", ".join(names[number])}')


def read_named(path, paths, names=(), sequence=False):
    """(Checkpoint, its Domain objects) of a file; names, sequence: as for `names_in`.

    paths: {domain: Path}, as of --data.
    """
    checkpoint = read_checkpoint(path)
    names = names_in(checkpoint, names, sequence)
    entries = checkpoint.content['domains'] if checkpoint.domains else [{'name': name} for name in names]
    domains = [domain_of(entry, paths) for entry in entries]
    check_known(checkpoint, domains)
    return checkpoint, domains


def load_network_and_domains(path, place, paths, names=(), method=None, precision='fp32', sequence=False):
    """(Checkpoint, network on the place's device, its Domain objects) of a file.

    paths, names, sequence: as for `read_named`. method: for a file whose keys fit several networks.
    """
    checkpoint, domains = read_named(path, paths, names, sequence)
    model = load_network(checkpoint, method)
    if checkpoint.domains is None and place.main:
        print(loading_summary(checkpoint, len(checkpoint.layout.state), 0), file=sys.stderr)
    return checkpoint, model.to(place.device, memory_format=memory_format(place.device, precision)), domains


class Evaluator:
    """Loads networks and data and scores them as the options of eval.py say; makes one loader for each domain."""

    def __init__(self, options, place):
        self.options, self.place = options, place
        self.paths, self.loaders = data_paths(options.data), {}

    def load(self, path, names=(), method=None):
        """(network on the device, its Domain objects, content of the file) of a checkpoint of a sequence.

        names: of the last one's domains. method: for a file whose keys fit several networks.
        """
        options = self.options
        checkpoint, model, domains = load_network_and_domains(path, self.place, self.paths, names, method,
                                                              options.precision, sequence=True)
        if options.common_classes:
            for domain in domains if options.cross_heads else self.scored(domains).values():
                common.to_common(domain)
        return model, domains, checkpoint.content

    def scored(self, domains):
        """{number: Domain} of those of a network's Domain objects that are scored; UserError if --only has others."""
        names = [domain.name for domain in domains]
        wanted = {index_among(names, name, '--only: the checkpoint') for name in self.options.only}
        return {number: domain for number, domain in enumerate(domains) if not wanted or number in wanted}

    def domain(self, name):
        """The Domain called `name`."""
        return get_domain(name, self.paths)

    def loader(self, domain):
        """The loader of a domain's split, made on first use."""
        if domain.name not in self.loaders:
            self.loaders[domain.name] = self.make_loader(domain)
        return self.loaders[domain.name]

    def make_loader(self, domain):
        options = self.options
        data = split_of(common.with_finer_labels(domain) if options.common_classes else domain, options.data_root,
                        options.split, (options.height, options.width), options.resolution)
        return self.loader_over(data)

    def loader_over(self, data):
        """A loader over this rank's share of a data set."""
        options = self.options
        batches = EvalBatches(len(data), options.batch_size, self.place.rank, self.place.world, options.limit_batches)
        collate = None if options.resolution == 'published' else keep_labels
        return make_loader(data, batches, options.num_workers, self.place.device.type == 'cuda', collate)

    def score(self, model, number, domain, watch=None):
        """The Score of the model's domain `number`, whose Domain is `domain`."""
        return evaluate(model, number, self.loader(domain), equal_weights(domain.num_classes), self.place,
                        self.options.precision, domain.name, self.truths(domain), watch)

    def truths(self, domain):
        """Number of label values that the domain's loader can give."""
        return domain.num_classes + (len(common.CLASSES) if self.options.common_classes else 0)

    def entry(self, matrix, head, domain):
        """{'miou', 'accuracy', 'iou': {class: IoU}} of a confusion matrix of `head`'s predictions on `domain`.

        The scores are None if the head's classes are not the domain's. With --common-classes, 'common'
        holds the same scores for the common classes.
        """
        published = self.options.published_metric
        result = {'miou': None, 'accuracy': None, 'iou': None}
        if head.classes == domain.classes:
            result = figures(Score(matrix, 0.0).own, domain.classes, published)
        if self.options.common_classes:
            rows = common.to_common(domain) + list(range(len(common.CLASSES)))
            folded = metrics.fold(matrix, rows, common.to_common(head))
            result['common'] = figures(folded, common.CLASSES, published)
        return result

    def cross_heads(self, model, domains, scores):
        """{head: {domain: entry}} of every head of a network on the images of every domain.

        scores: {domain: Score} of each head on its own domain. A head is run only on domains with its
        classes, or with --common-classes on all.
        """
        return {head.name: {domain.name: self.cross_head(model, number, head, domain, scores)
                            for domain in self.scored(domains).values()}
                for number, head in enumerate(domains)}

    def cross_head(self, model, number, head, domain, scores):
        """The entry of the model's domain `number`, whose Domain is `head`, on the images of `domain`."""
        matrix = None
        if head.name == domain.name:
            matrix = scores[domain.name].matrix
        elif head.classes == domain.classes or self.options.common_classes:
            matrix = cross_confusion(model, number, self.loader(domain), head.num_classes, self.truths(domain),
                                     self.place, self.options.precision, f'{head.name} on {domain.name}')
        return self.entry(matrix, head, domain)


def figures(matrix, classes, published):
    """{'miou', 'accuracy' in percent, 'iou': {class: IoU in [0, 1]}} of a confusion matrix; NaN where undefined."""
    return {'miou': metrics.mean_iou(matrix, published), 'accuracy': metrics.pixel_accuracy(matrix),
            'iou': dict(zip(classes, metrics.iou_per_class(matrix, published).tolist()))}
