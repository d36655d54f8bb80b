"""Scores of every step in three columns, which attribute forgetting to batch-norm statistics or to weights.

trained: the network as the step left it. estimated: each domain with the running statistics of its batch
norms re-estimated from its own training images, all else unchanged. kept: each domain with the running
statistics that its own step left, shared norms included, and the current weights. No file is changed.

`options` are those of `python -m benchmarks.forgetting`.
"""
import functools
import json

from tqdm import tqdm

from mdil.benchmarks.sequences import checkpoint_of, data_arguments, finished, own_step, row_of, training_images
from mdil.datasets.cache import cached
from mdil.datasets.loading import TrainBatches, make_loader
from mdil.eval import PROTOCOL, eval_parser
from mdil.evaluation import metrics
from mdil.evaluation.evaluation import Evaluator
from mdil.evaluation.norms import estimate_statistics, take_statistics
from mdil.models import METHODS
from mdil.utils.files import without_nan, write_json
from mdil.utils.parser import flag

TRAINED, ESTIMATED, KEPT = COLUMNS = 'trained', 'estimated', 'kept'


def make_evaluator(options, place):
    """The Evaluator for all steps."""
    arguments = [*data_arguments(options), '--state', '-', '--num-workers', options.num_workers]
    for name in ('height', 'width', 'batch_size', 'precision', 'limit_batches'):
        if getattr(options, name) is not None:
            arguments += [flag(name), getattr(options, name)]
    return Evaluator(eval_parser().parse_args(list(map(str, arguments))), place)


def training_loader(options, name, seed, place):
    """A loader of a domain's training images, not augmented, in the batches of the first epoch."""
    data = training_images(options, name)
    batches = TrainBatches(len(data), options.batch_size, seed, limit=options.limit_batches)
    return make_loader(cached(data, options.cache) if options.cache else data, batches, options.num_workers,
                       place.device.type == 'cuda')


def score(step, column, number, load, evaluator, options):
    """The entry of domain `number` after a step, in a column; None if it equals that of the column `trained`.

    load: what `Evaluator.load` returns for the step. One network serves all domains, because the
    columns other than `trained` replace every statistic that the domain uses.
    """
    name, own = step.domains[number], own_step(step, step.domains[number])
    if column == KEPT and own == step:
        return None
    model, domains, _ = load()
    if column == ESTIMATED:
        loader = training_loader(options, name, step.seed, evaluator.place)
        estimate_statistics(model, number, loader, evaluator.place, options.precision)
    if column == KEPT:
        source, *_ = evaluator.load(checkpoint_of(own, options))
        take_statistics(model.single(number), source.single(own.domains.index(name)))
    return evaluator.entry(evaluator.score(model, number, domains[number]).matrix, domains[number], domains[number])


def scores(step, evaluator, options, column=TRAINED):
    """{domain: {'miou', 'accuracy', 'iou'}} after a step; its file is reused if its protocol is the same."""
    path = step.folder(options) / f'scores-{column}-{options.which}.json'
    protocol = {name: getattr(evaluator.options, name) for name in PROTOCOL}
    if path.exists():
        known = json.loads(path.read_text())
        if known['protocol'] == protocol:
            return known['domains']
    load = functools.cache(lambda: evaluator.load(checkpoint_of(step, options)))        # at most once
    entries = {name: score(step, column, number, load, evaluator, options) for number, name in enumerate(step.domains)}
    entries = without_nan({name: entry or scores(step, evaluator, options)[name]
                                  for name, entry in entries.items()})
    write_json(path, {'protocol': protocol, 'domains': entries})
    return entries


def evaluated(plans, evaluator, options):
    """{(order, row name, seed): {column: [{domain: mIoU} after each step]}} of the finished sequences."""
    complete = {key: steps for key, steps in plans.items() if all(finished(step, options) for step in steps)}
    return {key: {column: sequence(row_of(key[1]), steps, column, evaluator, options) for column in COLUMNS}
            for key, steps in tqdm(complete.items(), unit='sequence', disable=None)}


def sequence(row, steps, column, evaluator, options):
    """[{domain: mIoU} after each step] of a row, in a column."""
    found = [{name: entry['miou'] for name, entry in scores(step, evaluator, options, column).items()}
             for step in steps]
    if METHODS[row.method].one_domain:
        found = [{name: value for step in found for name, value in step.items()}]
    return own_networks(found) if row.copies else found


def own_networks(steps):
    """[{domain: mIoU} after each step] with every domain's mIoU taken from the step that learnt it."""
    learnt = metrics.learnt_at(steps)
    return [{name: learnt[name] for name in step} for step in steps]
