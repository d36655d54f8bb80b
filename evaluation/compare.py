"""Compares methods: step x domain matrices, and a picture of what each method predicts.

    python -m mdil compare mdil=runs/demo/mdil fine-tune=runs/demo/fine-tune \\
        --data-root DATA --out runs/demo
    python -m mdil compare mdil='runs/seed*/mdil' fine-tune='runs/seed*/fine-tune' \\
        --data-root DATA --out runs

Reads the `results.json` that eval.py wrote into each folder, prints the matrices, and writes
`comparison.md`, `comparison.tex` and `comparison.png` (input, truth, one column for each method)
to --out. Several folders with the same NAME (a pattern, or NAME given again) are seeds of one method;
the tables show mean and sample standard deviation. The picture shows each method's first folder.
"""
import argparse
import glob
import json
import os
from pathlib import Path

from mdil.datasets import get_domain
from mdil.evaluation import pictures, tables
from mdil.evaluation.earlier import digest
from mdil.evaluation.evaluation import split_of
from mdil.evaluation.tables import Table, spread
from mdil.models.checkpoint import load_network, read_checkpoint
from mdil.utils.errors import UserError, run_main
from mdil.utils.files import check_writable, write_text
from mdil.utils.parallel import Place, pick_device
from mdil.utils.parser import Parser, data_options, data_paths


def parse(argv=None):
    parser = Parser(prog='python -m mdil compare', description='Compares evaluated sequences.')
    parser.add_argument('results', nargs='+', metavar='NAME=FOLDER',
                        help="folders with a results.json of eval.py, a quoted pattern, or such a file; several with "
                             'the same NAME are seeds')
    parser.add_argument('--out', required=True, metavar='DIR', help='where the tables and the picture go')
    parser.add_argument('--picture', action=argparse.BooleanOptionalAction, default=True,
                        help='draw comparison.png, which needs data and checkpoints')
    parser.add_argument('--images', nargs='+', default=[], metavar='[DOMAIN=]NAME|INDEX',
                        help='images of the picture, by part of the name or by index (default: the one with the most '
                             'classes of each domain)')
    parser.add_argument('--device', default='auto', help='device that draws the predictions')
    data_options(parser)
    return parser.parse_args(argv)


def files_of(item):
    """(name, paths of the results files) of a NAME=FOLDER item."""
    name, equals, pattern = item.partition('=')
    if not (name and equals and pattern):
        raise UserError(f'{item!r} is not NAME=FOLDER')
    found = sorted(glob.glob(pattern)) if glob.has_magic(pattern) and not os.path.exists(pattern) else [pattern]
    if not found:
        raise UserError(f'{item}: no folder matches the pattern {pattern}')
    return name, [Path(place) if os.path.isfile(place) else Path(place) / 'results.json' for place in found]


def read_results(items):
    """{name: [content of results.json for each seed]} of NAME=FOLDER items; UserError if they are not comparable."""
    results, seen = {}, set()
    for item in items:
        name, paths = files_of(item)
        for path in paths:
            if (name, path.resolve()) in seen:
                raise UserError(f'{item}: {path} is given twice; each folder is one seed of {name}')
            seen.add((name, path.resolve()))
            try:
                result = json.loads(path.read_text())
                check_result(result)
            except OSError as error:
                raise UserError(f'{item}: {path} cannot be read: {error.strerror}; eval.py --json writes it') from None
            except ValueError as error:
                raise UserError(f'{item}: {path} cannot be read ({error}); eval.py --json writes it') from None
            except (LookupError, TypeError, AttributeError):
                raise UserError(f'{item}: {path} is not a result of eval.py --json') from None
            if result.get('only'):
                raise UserError(f'{item}: {path} is of eval.py --only; a comparison needs the scores of all domains')
            results.setdefault(name, []).append(result)
    check_comparable(results)
    return results


def check_result(result):
    """KeyError, TypeError, AttributeError or IndexError unless `result` has the parts that are compared."""
    protocol(result), result['versions'].get('git')
    training = last_training(result)
    scores = [entry['miou'] for domains in (result['domains'], *(step['domains'] for step in result['steps']))
              for entry in domains.values()]
    scores += result['summary']['forgetting'].values()
    scores += [training[which]['miou'] for which in ('best', 'last')] if training else []
    if not all(isinstance(score, (int, float, type(None))) for score in scores):
        raise TypeError('a score is not a number')


def protocol(result):
    """{setting: value} of the settings that must be equal for results to be comparable."""
    stated = result['protocol']
    limit = stated.get('limit_batches')
    return {**{key: stated[key] for key in ('height', 'width', 'split', 'published_metric')},
            'resolution': stated.get('resolution', 'published'),
            'images at most': limit and limit * stated['batch_size']}


def check_comparable(results):
    """UserError if results differ in their domains or protocol or, within one name, in their steps."""
    everything = [result for seeds in results.values() for result in seeds]
    if len({tuple(result['domains']) for result in everything}) > 1:
        raise UserError('the folders hold different domains or orders; compare like with like')
    protocols = [protocol(result) for result in everything]
    for key in protocols[0]:
        values = sorted({str(settings[key]) for settings in protocols})
        if len(values) > 1:
            raise UserError(f'the folders were evaluated differently, {key} is {" and ".join(values)}; '
                            'compare like with like')
    for name, seeds in results.items():
        if len({tuple(tuple(step) for step in matrix(result)) for result in seeds}) > 1:
            raise UserError(f'{name}: its folders hold different steps, so they are not seeds of one sequence')


def matrix(result):
    """[{domain: mIoU} after each step]."""
    return [{name: entry['miou'] for name, entry in step['domains'].items()} for step in result['steps']]


def step_table(name, seeds):
    """The step x domain matrix of a method."""
    steps = [{domain: [step[domain] for step in across] for domain in across[0]}
             for across in zip(*map(matrix, seeds))]
    header, rows = tables.step_rows(steps, spread)
    return Table(name if len(seeds) == 1 else f'{name}, {len(seeds)} seeds', f'steps-{name}', header, [rows])


def mean_miou(result):
    """Mean mIoU over the domains after the last step; None if one is unknown."""
    return tables.mean([entry['miou'] for entry in result['domains'].values()])


def summary_table(results):
    """A row for each method: forgetting of every earlier domain, mean mIoU and, if known, transfers and Delta_m%.

    Also, if known, the mIoU of the last step's best and last epoch as validated while training. The
    best epoch was chosen on the very images that are reported here.
    """
    sequences = [result['summary'] for seeds in results.values() for result in seeds]
    old = list(dict.fromkeys(name for summary in sequences for name in summary['forgetting']))
    figures = {**{f'forgotten of {name}': lambda result, name=name: result['summary']['forgetting'].get(name)
                  for name in old}, 'mean mIoU': mean_miou}
    for key, label in tables.TRANSFERS:
        if any(summary.get(key) is not None for summary in sequences):
            figures[label] = lambda result, key=key: result['summary'].get(key)
    note = ()
    if all(last_training(result) for seeds in results.values() for result in seeds):
        note = ('best epoch, last epoch: mIoU on what the last step learns, as validated while training; the best '
                'epoch is chosen on these very images.',)
        for which in ('best', 'last'):
            figures[f'{which} epoch mIoU'] = lambda result, which=which: last_training(result)[which]['miou']
    rows = [[name, *(spread([figure(result) for result in seeds]) for figure in figures.values())]
            for name, seeds in results.items()]
    return Table('Methods', 'methods', ['method', *figures], [rows], note)


def last_training(result):
    """The result of `evaluation.epochs.training_of` for the last step, or None."""
    return result['steps'][-1].get('training')


def kept_and_lost(name, seeds):
    """A sentence on how much mIoU a method kept on each old domain, averaged over seeds; '' without old domains."""
    lost = {domain: tables.mean([result['summary']['forgetting'][domain] for result in seeds])
            for domain in seeds[0]['summary']['forgetting']}
    left = {domain: tables.mean([result['domains'][domain]['miou'] for result in seeds]) for domain in lost}
    old = [domain for domain in lost if None not in (lost[domain], left[domain])]
    if not old:
        return ''
    before = {domain: round(left[domain], 1) + round(lost[domain], 1) for domain in old}     # so that the sum is right
    risen = [domain for domain in old if lost[domain] < -0.05]
    kept = ' and '.join(f'{left[domain]:.1f} of {before[domain]:.1f} on {domain}' for domain in old
                        if domain not in risen)
    rise = ' and '.join(f'from {before[domain]:.1f} to {left[domain]:.1f} on {domain}' for domain in risen)
    did = ' and '.join(f'{verb} {what}' for verb, what in (('kept', kept), ('rose', rise)) if what)
    points = tables.mean([max(0.0, lost[domain]) for domain in old])      # a gain elsewhere makes up for no loss
    return (f'{name} {did}: {points:.1f} points of mIoU lost' + (' on average' if len(old) > 1 else '')
            + (', gains not counted.' if kept and rise else '.'))


def newest(results):
    """A sentence with each method's mIoU on the domain learnt last; '' if the last step learnt none or several."""
    first = next(iter(results.values()))[0]
    new = [name for name in first['domains'] if name not in first['summary']['forgetting']]
    if len(new) != 1:
        return ''
    domain, = new
    scores = {name: tables.mean([result['domains'][domain]['miou'] for result in seeds])
              for name, seeds in results.items()}
    if None in scores.values():
        return ''
    return f'On {domain}, learnt last: {", ".join(f"{name} {score:.1f}" for name, score in scores.items())}.'


def describe(results):
    """One paragraph: what the figures mean, and the torch version, device and revision that made them."""
    everything = [result for seeds in results.values() for result in seeds]
    several = any(len(seeds) > 1 for seeds in results.values())
    return (tables.describe(everything[0]['protocol'])
            + (' Several seeds: mean and sample standard deviation.' if several else '')
            + f' {tables.origin(everything)}')


def draw(results, options):
    """Writes comparison.png from the last checkpoint of each method's first folder."""
    firsts = {name: seeds[0] for name, seeds in results.items()}
    first, place = next(iter(firsts.values())), Place(pick_device(options.device))
    settings, paths = protocol(first), data_paths(options.data)
    sets = {number: split_of(get_domain(domain, paths), options.data_root, settings['split'],
                             (settings['height'], settings['width']), settings['resolution'])
            for number, domain in enumerate(first['domains'])}
    chosen = pictures.choose(sets, options.images)
    models = {f'{name}, after step {len(result["steps"])}': last_network(result['steps'][-1], place)
              for name, result in firsts.items()}
    pictures.save_panels(Path(options.out) / 'comparison.png', sets, models, place, chosen)


def last_network(step, place):
    """The network that was scored after a step; UserError if its file has been replaced since."""
    state = step['state']
    checkpoint = read_checkpoint(state)
    if step.get('digest') not in (None, digest(state)):
        raise UserError(f'{state} was replaced after it was evaluated; run eval.py again, or leave the picture out '
                        'with --no-picture')
    return load_network(checkpoint).to(place.device)


def main(argv=None):
    options = parse(argv)
    results = read_results(options.results)
    check_writable('--out', options.out, folder=True)
    about, summary = describe(results), summary_table(results)
    matrices = [step_table(name, seeds) for name, seeds in results.items()]
    blocks = tables.packed([tables.terminal(table) for table in matrices])
    print(tables.wrapped(about), blocks, tables.terminal(summary), sep='\n\n')
    written = {'comparison.md': tables.markdown_document, 'comparison.tex': tables.latex_document}
    for name, document in written.items():
        write_text(Path(options.out) / name, document(about, [*matrices, summary]))
    if options.picture:
        draw(results, options)
    print(f'\nwritten to {options.out}: {", ".join([*written, *(["comparison.png"] if options.picture else [])])}\n')
    sentences = [*(kept_and_lost(name, seeds) for name, seeds in results.items()), newest(results)]
    print(*map(tables.wrapped, filter(None, sentences)), sep='\n')


if __name__ == '__main__':
    run_main(main)
