"""Evaluates one checkpoint, or a sequence of them in step order.

    python eval.py --state runs/3/model_best.pth.tar --data-root DATA
    python eval.py --state STEP1 STEP2 STEP3 --data-root DATA --json result.json --latex table.tex
    python eval.py --state STEP3 --data-root DATA --resolution native --cross-heads --common-classes
    python eval.py --state STEP1 STEP2 STEP3 --data-root DATA --save-panels forgetting.png
    python eval.py --state STEP3 --data-root DATA --domain auto
    python eval.py --state STEP3 --data-root DATA --only IDD

One checkpoint gives mIoU, pixel accuracy and the IoU of every class for each domain; several
give the step x domain matrix with forgetting and transfer. Void pixels never count. Images and
labels are resized to --width x --height, as in the published protocol; --resolution native keeps
the labels' own size. The default size is the training size, or 1024x512 if the file does not say.
"""
import os
from functools import partial

from mdil.datasets.domains import index_among
from mdil.evaluation import metrics, pictures, tables
from mdil.evaluation.auto import evaluate_auto
from mdil.evaluation.earlier import FILES, FOLDERS, check_files, digest, earlier_results, settings
from mdil.evaluation.epochs import training_of
from mdil.evaluation.evaluation import Evaluator, check_order
from mdil.evaluation.predictor import trained_size
from mdil.models.checkpoint import check_stated, read_checkpoint
from mdil.models.identify import identifier_of
from mdil.models.methods import method_name, nameless_options
from mdil.training import records
from mdil.training.paper import REFUSED
from mdil.utils.errors import UserError, run_main
from mdil.utils.files import without_nan, write_json, write_text
from mdil.utils.parallel import check_alone, session
from mdil.utils.parser import Parser, complete_size, data_options, machine_options, positive, size_options

PROTOCOL = ('height', 'width', 'split', 'published_metric', 'resolution', 'batch_size', 'limit_batches', 'precision')


def eval_parser():
    """The parser of eval.py."""
    parser = Parser(prog='eval.py', refused=REFUSED, several=True,
                    description='Evaluates checkpoints on the validation images of their domains.')
    group = parser.add_argument_group('what to evaluate')
    group.add_argument('--state', nargs='+', required=True, metavar='FILE', help='checkpoints, in step order')
    nameless_options(group, ' of the last checkpoint')
    group.add_argument('--only', nargs='+', default=[], metavar='NAME',
                       help='score only these domains, for example if you have only their images (one checkpoint)')
    group.add_argument('--single-task', nargs='+', default=[], metavar='RESULT',
                       help='for Delta_m%% and forward transfer: NAME=mIoU of single-task networks, or their '
                            'checkpoints')
    group.add_argument('--cross-heads', action='store_true',
                       help='also score each decoder of the last checkpoint on every domain with the same classes '
                            '(with --common-classes: on all domains)')
    group.add_argument('--domain', choices=('auto',),
                       help='only auto, no name (--only takes names): also score the branch that the last checkpoint '
                            'chooses for each image')
    group.add_argument('--split', default='val', help='split of the data sets')
    group.add_argument('--batch-size', type=positive, default=6, help='images per batch')
    group.add_argument('--limit-batches', type=positive, metavar='N', help='at most N batches per domain, for trials')
    group = parser.add_argument_group('scoring')
    size_options(group, None)
    group.add_argument('--resolution', choices=('published', 'native'), default='published',
                       help="labels resized as published, or logits upsampled to each label's own size")
    group.add_argument('--published-metric', action='store_true', help='count absent classes as 0 in the mIoU')
    group.add_argument('--common-classes', action='store_true',
                       help='also score on the classes that all domains share (IDD level 1)')
    data_options(parser)
    group = machine_options(parser)
    group.add_argument('--cuda-graphs', action='store_true', help='on one GPU: record the network and replay it')
    result_options(parser)
    return parser


def result_options(parser):
    """Adds the options for results and pictures."""
    group = parser.add_argument_group('results')
    group.add_argument('--per-class', action='store_true',
                       help='IoU of every class in the tables (one checkpoint: always)')
    for name, text in (('json', 'all scores as JSON'), ('csv', 'all scores as CSV, one per line'),
                       ('markdown', 'the tables as Markdown'), ('latex', 'the tables as LaTeX (booktabs)')):
        group.add_argument(f'--{name}', metavar='FILE', help=f'write {text}')
    group.add_argument('--resume', action='store_true',
                       help='keep --json if it already holds the results of these checkpoints with the same settings; '
                            'else replace it, unless it holds those of other checkpoints')
    group.add_argument('--overwrite', action='store_true', help='replace existing results, tables and pictures')
    group = parser.add_argument_group('pictures')
    for name, text in (('overlays', 'input, truth and prediction of every image, with a legend'),
                       ('color', "the prediction of every image in the domain's colours, and their legend"),
                       ('extremes', f'the {pictures.EXTREMES} worst and best images of each domain, by mIoU'),
                       ('confusion', 'the confusion matrix of each domain')):
        group.add_argument(f'--save-{name}', metavar='DIR', help=text)
    group.add_argument('--save-panels', metavar='FILE', help='one figure: input, truth, prediction after each step')
    group.add_argument('--images', nargs='+', default=[], metavar='[DOMAIN=]NAME|INDEX',
                       help='images of --save-panels, by part of the name or by index (default: the one with the most '
                            'classes of each domain)')


def check_options(options):
    """Completes the size; refuses unwritable files and conflicting options before hours of evaluation."""
    complete_size(options)
    if options.only and len(options.state) > 1:
        raise UserError('--only is for one checkpoint, but --state names several; evaluate them one by one')
    if options.only and options.single_task:
        raise UserError('--single-task needs the scores of all domains; leave out --only')
    if options.resume:
        check_alone('eval.py --resume')
        if not options.json:
            raise UserError('--resume needs --json FILE, the results of an earlier evaluation')
        if options.save_panels or any(getattr(options, name) for name in FOLDERS.values()):
            raise UserError('--resume evaluates nothing that pictures could show; leave it out, or the --save options')
    check_files(options)
    paths = [getattr(options, name) for name in FILES if getattr(options, name)]
    if len(set(map(os.path.realpath, paths))) < len(paths):
        raise UserError('two results would be written to the same file: ' + ', '.join(paths))
    if options.save_confusion:
        pictures.figure_format('confusion.png')     # fails without matplotlib, which hours of scoring must not
    if options.save_panels:
        pictures.figure_format(options.save_panels)
    elif options.images:
        raise UserError('--images chooses the images of --save-panels FILE, which is not given')


def single_task_scores(items, evaluator):
    """{domain: entry} of the items of --single-task."""
    scores = {}
    for item in items:
        name, entry = single_task_score(item, evaluator)
        if name in scores:
            raise UserError(f'--single-task {item}: {name} is given twice; give it once')
        scores[name] = entry
    return scores


def single_task_score(item, evaluator):
    """(domain, entry) of an item of --single-task: NAME=mIoU, whose entry has only 'miou', or a checkpoint."""
    name, equals, value = item.partition('=')
    if equals and not os.path.exists(item):
        return evaluator.domain(name).name, {'miou': stated_miou(item, value)}
    names = evaluator.options.domains
    if names and read_checkpoint(item).domains:
        names = ()
    if len(names) > 1:
        raise UserError(f'--single-task {item} does not name its domain; evaluate it alone (--state {item} '
                        '--domains NAME), then pass --single-task NAME=mIoU')
    model, (domain, *others), _ = evaluator.load(item, names)
    if others:
        raise UserError(f'--single-task {item} contains {len(others) + 1} domains; a checkpoint with one is expected')
    return domain.name, evaluator.entry(evaluator.score(model, 0, domain).matrix, domain, domain)


def stated_miou(item, value):
    """The mIoU of --single-task NAME=mIoU."""
    try:
        miou = float(value)
    except ValueError:
        raise UserError(f'--single-task {item}: a checkpoint names its domain itself; give {value} alone'
                        if os.path.exists(value) else
                        f'--single-task {item}: neither NAME=mIoU nor a checkpoint') from None
    if not 0 < miou <= 100:
        raise UserError(f'--single-task {item}: an mIoU in percent, above 0 and up to 100, is expected')
    return miou


def evaluate_step(evaluator, options, step, model, domains):
    """({domain: Score}, {domain: entry}) of a checkpoint; its pictures go into subfolders called `step`."""
    scores, entries = {}, {}
    folders = {kind: getattr(options, name) for kind, name in FOLDERS.items()}
    for number, domain in evaluator.scored(domains).items():
        album = None
        if any(folders.values()):
            album = pictures.Album(folders, step, evaluator.loader(domain).dataset)
        scores[domain.name] = score = evaluator.score(model, number, domain, album)
        if album:
            album.finish(score.own, evaluator.place)
        entries[domain.name] = {**evaluator.entry(score.matrix, domain, domain), 'loss': score.loss}
    return scores, entries


def summarise(steps, single, common=False):
    """Forgetting, transfer and Delta_m% of the sequence, from the entries after each step and the single-task ones.

    common: in the common classes instead of the domains' own.
    """
    if common:
        single = {name: entry for name, entry in single.items() if 'common' in entry}
    *miou, single = [{name: entry['miou'] for name, entry in tables.in_space(entries, common).items()}
                     for entries in (*steps, single)]
    return metrics.summary(miou, single)


def draw_panels(options, networks, known, datasets, chosen, place):
    """Writes the figure of --save-panels, with one column for each checkpoint."""
    titles = [f'step {number} ({domains[-1].name})' for number, domains in enumerate(known, 1)]
    models = dict(zip(titles if len(known) > 1 else ['prediction'], networks))
    pictures.save_panels(options.save_panels, datasets, models, place, chosen, options.precision)


def images_of(evaluator, domains):
    """{number: images} of those of a network's Domain objects that are scored; UserError if some are missing."""
    try:
        return {number: evaluator.loader(domain).dataset for number, domain in evaluator.scored(domains).items()}
    except UserError as error:
        if len(domains) == 1 or evaluator.options.only or len(evaluator.options.state) > 1:
            raise
        raise UserError(f'{error}; or score the other domains alone, with --only') from error


def size_of_training(files, contents):
    """(height, width) that the checkpoints with these contents were trained at; UserError if they differ."""
    sizes = list(map(trained_size, contents))
    if len(set(sizes)) > 1:
        shown = ', '.join(f'{file} {width}x{height}' for file, (height, width) in zip(files, sizes))
        raise UserError(f'the checkpoints were trained at different sizes ({shown}); choose one for all with --height')
    return sizes[0]


def run(options, place):
    """Evaluates all checkpoints; returns what --json writes, and a function that draws the figure of --save-panels."""
    given, evaluator, steps = settings(options), Evaluator(options, place), []
    trainings = list(map(training_of, options.state))       # before hours of evaluation, as it may raise UserError
    networks, known, contents = zip(*(evaluator.load(state, options.domains, options.method)
                                      for state in options.state))
    digests = list(map(digest, options.state))      # now, as a file may be replaced while it is scored
    check_order(options.state, known)
    if options.height is None:
        options.height, options.width = size_of_training(options.state, contents)
    check_stated(options.domains, [domain.name for domain in known[-1]], options.state[-1])
    identifier = identifier_of(contents[-1], known[-1], options.state[-1]) if options.domain == 'auto' else None
    datasets = images_of(evaluator, known[-1])
    chosen = pictures.choose(datasets, options.images) if options.save_panels else None
    single = single_task_scores(options.single_task, evaluator)
    names = [domain.name for domain in known[-1]]
    for name in single:
        index_among(names, name, f'--single-task: {options.state[-1]}')
    for number, (state, seen, training, model, domains, content) in enumerate(
            zip(options.state, digests, trainings, networks, known, contents), 1):
        folder = f'step{number}' if len(networks) > 1 else ''
        scores, entries = evaluate_step(evaluator, options, folder, model, domains)
        steps.append({'state': str(state), 'digest': seen, 'domains': entries,
                      'method': method_name(content.get('method') or options.method),
                      **({'training': training} if training else {})})
    entries = [step['domains'] for step in steps]
    results = {'domains': entries[-1], 'steps': steps, 'summary': summarise(entries, single)}
    if options.only:
        results['only'] = list(entries[-1])
    if options.common_classes:
        results['common_summary'] = summarise(entries, single, common=True)
    if options.cross_heads:
        results['cross_heads'] = evaluator.cross_heads(networks[-1], known[-1], scores)
    if identifier:
        results['auto'] = evaluate_auto(evaluator, identifier, networks[-1], known[-1])
    protocol = {name: getattr(options, name) for name in PROTOCOL}
    return (without_nan({**results, 'protocol': protocol, 'options': given,
                         'versions': records.environment(place.device)}),
            partial(draw_panels, options, networks, known, datasets, chosen, place))


def report(results, options):
    """Writes the tables, and prints them."""
    per_class = options.per_class or len(options.state) == 1
    for name, text in tables.documents(results, per_class).items():
        if getattr(options, name):
            write_text(getattr(options, name), text)
    shown, classes = tables.result_tables(results, per_class)
    print(tables.wrapped(tables.about(results)), *map(tables.terminal, shown), sep='\n\n')
    if classes:
        print('\n' + tables.packed(list(map(tables.terminal, classes))))


def main(argv=None):
    options = eval_parser().parse_args(argv)
    check_options(options)
    known = earlier_results(options) if options.resume else None
    if known:
        print(f'kept {options.json}: it already holds the results of {", ".join(options.state)}')
        alone = len(known['steps']) == len(options.state)
        if not alone and (options.csv or options.markdown or options.latex):
            raise UserError(f'--json {options.json} holds later steps, too, so no tables of these were written; name '
                            'all its checkpoints in --state, or leave out --resume and name another --json')
        if alone:
            report(known, options)
        return
    with session(options.device, precision=options.precision, graphs=options.cuda_graphs) as place:
        results, draw = run(options, place)
        if place.main:
            if options.json:
                write_json(options.json, results)
            report(results, options)
            if options.save_panels:     # last, because a figure that fails must not cost the results
                draw()


if __name__ == '__main__':
    run_main(main)
