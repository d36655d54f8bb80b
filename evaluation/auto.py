"""eval.py --domain auto: detects the domain of each image; measures how often that is right, the mIoU and the time."""
import copy
import time

import torch

from mdil.evaluation import metrics
from mdil.evaluation.evaluation import cross_confusion
from mdil.models.identify import looks_of, never_unknown


def evaluate_auto(evaluator, identifier, model, domains):
    """Results of detecting the domain of every image, as `--json` has them under 'auto'.

    {'accuracy': percent of images for which their own branch is chosen, 'matrix': {truth: {chosen: images}},
    'unknown': {truth: images called unknown}, 'domains': {truth: {'miou'}}, 'seconds': {'identify', 'segment'},
    'never_unknown': what `identify.never_unknown` says}.
    An image called unknown is still segmented by the branch chosen for it.
    """
    result = {'matrix': {}, 'unknown': {}, 'domains': {}, 'seconds': {'identify': 0.0, 'segment': 0.0}}
    for domain in evaluator.scored(domains).values():
        start = time.perf_counter()
        guess = guess_of(evaluator, identifier, domain)
        middle = time.perf_counter()
        matrix = confusion_of(evaluator, model, domains, domain, guess.domain)
        result['seconds']['segment'] += time.perf_counter() - middle
        result['seconds']['identify'] += middle - start
        result['matrix'][domain.name] = {other.name: int((guess.domain == index).sum())
                                         for index, other in enumerate(domains)}
        result['unknown'][domain.name] = int(guess.unknown.sum())
        result['domains'][domain.name] = {'miou': metrics.mean_iou(matrix, evaluator.options.published_metric)}
    right = sum(row[name] for name, row in result['matrix'].items())
    images = sum(sum(row.values()) for row in result['matrix'].values())
    return {'accuracy': 100 * right / images, **result, 'never_unknown': never_unknown(identifier, domains)}


def guess_of(evaluator, identifier, domain):
    """The Guess about the evaluated images of a domain, in order."""
    options, pairs = evaluator.options, evaluator.loader(domain).dataset.pairs
    count = options.limit_batches and options.limit_batches * options.batch_size
    return identifier.guess(looks_of([pair.image for pair in pairs[:count]], options.num_workers,
                                     f'image statistics of {domain.name}'))


def confusion_of(evaluator, model, domains, domain, chosen):
    """Confusion matrix (C, C) of a domain whose image i is segmented by branch number chosen[i]."""
    total = torch.zeros(domain.num_classes, domain.num_classes, dtype=torch.int64)
    for index, branch in enumerate(domains):
        indices = torch.nonzero(chosen == index).flatten().tolist()
        if not indices:
            continue
        part = copy.copy(evaluator.loader(domain).dataset)
        part.pairs = tuple(part.pairs[number] for number in indices)
        matrix = cross_confusion(model, index, evaluator.loader_over(part), branch.num_classes,
                                 evaluator.truths(domain), evaluator.place, evaluator.options.precision,
                                 f'{branch.name} on {domain.name}')
        rows = [min(row, domain.void) for row in range(len(matrix))]
        total += metrics.fold(matrix, rows, translation(branch, domain))
    return total


def translation(branch, domain):
    """For each class of `branch`, the index in `domain` of the class of the same name, or of void if there is none."""
    return [domain.classes.index(name) if name in domain.classes else domain.void for name in branch.classes] + [
        domain.void]
