"""Evaluates one checkpoint, or a sequence of them in step order.

    python eval.py --state runs/3/model_best.pth.tar --data-root DATA
    python eval.py --state STEP1 STEP2 STEP3 --data-root DATA --json result.json

Prints mIoU per domain; several checkpoints give the step x domain matrix with forgetting
and transfer. Images and labels are resized to --width x --height, the published protocol.
"""
import sys
from pathlib import Path

from datasets import SegmentationDataset, get_domain
from datasets.loading import EvalBatches, make_loader
from models import METHODS
from utils import metrics, pictures, records, tables
from utils.checkpoint import check_known, load_network, read_checkpoint
from utils.errors import UserError, run_main
from utils.evaluation import evaluate
from utils.options import Parser, complete_size, data_options, data_paths, machine_options, positive, size_options
from utils.parallel import session
from utils.building import plain_weights


def eval_parser():
    """The parser of eval.py."""
    parser = Parser(prog='eval.py', description='Evaluates checkpoints on the validation images of their domains.')
    group = parser.add_argument_group('what is evaluated')
    group.add_argument('--state', nargs='+', required=True, metavar='FILE', help='checkpoints, in step order')
    group.add_argument('--domains', nargs='+', metavar='NAME',
                       help='domains of the last checkpoint, in order (published files do not name them)')
    group.add_argument('--method', choices=tuple(METHODS), help='method of a published file, where its keys fit several')
    group.add_argument('--single-task', nargs='+', default=[], metavar='NAME=mIoU|FILE',
                       help='single-task results, or checkpoints, for Delta_m%% and forward transfer')
    group.add_argument('--published-metric', action='store_true', help='absent classes count 0 in the mIoU')
    group.add_argument('--split', default='val', help='split of the data sets')
    size_options(group)
    group.add_argument('--batch-size', type=positive, default=6, help='images per batch')
    group.add_argument('--limit-batches', type=positive, metavar='N', help='batches per domain at most, for trials')
    data_options(parser)
    machine_options(parser)
    group = parser.add_argument_group('results')
    group.add_argument('--json', metavar='FILE', help='write all figures as JSON')
    group.add_argument('--per-class', action='store_true', help='print the IoU of every class')
    group.add_argument('--save-overlays', metavar='DIR', help='input, truth and prediction of every image as PNG')
    return parser


class Evaluator:
    """Networks meet data: loaders are made once for each domain."""

    def __init__(self, options, place):
        self.options, self.place = options, place
        self.paths, self.loaders = data_paths(options.data), {}

    def domains_of(self, checkpoint):
        """The Domain objects that a checkpoint knows."""
        count = len(checkpoint.found.num_classes)
        names = checkpoint.domains or (self.options.domains or [])[:count]
        if len(names) < count:
            raise UserError(f'{checkpoint.source} holds {checkpoint.found.kind} but no names; pass --domains')
        domains = [get_domain(name, self.paths) for name in names]
        check_known(checkpoint, domains)
        return domains

    def loader(self, domain):
        options = self.options
        if domain.name not in self.loaders:
            data = SegmentationDataset(domain, options.data_root, options.split, (options.height, options.width))
            batches = EvalBatches(len(data), options.batch_size, self.place.rank, self.place.world,
                                  options.limit_batches)
            self.loaders[domain.name] = make_loader(data, batches, options.num_workers,
                                                    self.place.device.type == 'cuda')
        return self.loaders[domain.name]

    def score(self, model, domains):
        """{domain: {'miou', 'accuracy', 'loss', 'iou': {class: IoU}}} of a network."""
        results = {}
        for number, domain in enumerate(domains):
            score = evaluate(model, number, self.loader(domain), plain_weights(domain), self.place,
                             self.options.precision, domain.name)
            published = self.options.published_metric
            iou = metrics.iou_per_class(score.matrix, published).tolist()
            results[domain.name] = {
                'miou': score.miou(published), 'accuracy': metrics.pixel_accuracy(score.matrix), 'loss': score.loss,
                'iou': {name: None if value != value else value for name, value in zip(domain.classes, iou)}}
        return results


def load(path, evaluator):
    """(network on the device, its Domain objects) of a checkpoint."""
    checkpoint = read_checkpoint(path)
    domains = evaluator.domains_of(checkpoint)
    return load_network(checkpoint, evaluator.options.method).to(evaluator.place.device), domains


def single_task_scores(items, evaluator):
    """{domain: mIoU} of --single-task items: NAME=mIoU, or a checkpoint to evaluate."""
    scores = {}
    for item in items:
        name, _, value = item.partition('=')
        if value and not Path(item).exists():
            try:
                scores[get_domain(name, evaluator.paths).name] = float(value)
            except ValueError:
                raise UserError(f'--single-task {item}: neither NAME=mIoU nor a checkpoint') from None
            continue
        model, domains = load(item, evaluator)
        if len(domains) > 1:
            raise UserError(f'--single-task {item} knows {len(domains)} domains, one is expected')
        scores[domains[0].name] = evaluator.score(model, domains)[domains[0].name]['miou']
    return scores


def summarise(steps, single):
    """The sequence's figures, from [{domain: mIoU}] after each step and {domain: single-task mIoU}."""
    return {'forgetting': metrics.forgetting(steps), 'backward_transfer': metrics.backward_transfer(steps),
            'forward_transfer': metrics.forward_transfer(steps, single),
            'delta_m': metrics.delta_m(steps[-1], single), 'single_task': single}


def print_results(results, steps, options):
    """The terminal's tables."""
    print(f'mIoU in percent over the non-void classes at {options.width}x{options.height}; void pixels do not count, '
          f'classes absent from truth and prediction {"count 0" if options.published_metric else "are left out"}')
    print(tables.plain(*tables.step_rows(steps)))
    summary = results['summary']
    for name, value in summary['forgetting'].items():
        print(f'forgetting of {name}: {tables.number(value)}')
    for key, label in (('backward_transfer', 'backward transfer'), ('forward_transfer', 'forward transfer'),
                       ('delta_m', 'Delta_m%')):
        if summary[key] is not None:
            print(f'{label}: {tables.number(summary[key])}')
    if options.per_class:
        for name, entry in results['domains'].items():
            print(f'\n{name}, pixel accuracy {tables.number(entry["accuracy"])}')
            print(tables.plain(*tables.class_rows(entry['iou'])))


def run(options, place):
    """Evaluates all checkpoints; returns what --json writes."""
    evaluator, steps = Evaluator(options, place), []
    for path in options.state:
        model, domains = load(path, evaluator)
        steps.append({'state': str(path), 'domains': evaluator.score(model, domains)})
        if options.save_overlays and place.main:
            for number, domain in enumerate(domains):
                pictures.save_overlays(model, number, evaluator.loader(domain).dataset,
                                       Path(options.save_overlays) / f'step{len(steps)}', place.device)
    single = single_task_scores(options.single_task, evaluator)
    miou = [{name: entry['miou'] for name, entry in step['domains'].items()} for step in steps]
    return {'domains': steps[-1]['domains'], 'steps': steps, 'summary': summarise(miou, single),
            'protocol': {'height': options.height, 'width': options.width, 'split': options.split,
                         'published_metric': options.published_metric},
            'versions': records.environment(place.device)}, miou


def main(argv=None):
    options = eval_parser().parse_args(argv)
    complete_size(options)
    with session(options.device) as place:
        results, miou = run(options, place)
        if place.main:
            print_results(results, miou, options)
            if options.json:
                records.write_json(options.json, results)


if __name__ == '__main__':
    run_main(main)
