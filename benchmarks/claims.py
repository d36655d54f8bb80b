"""Every comparison that docs/results.md makes, computed from the stored results.

    python -m benchmarks.claims --markdown docs/comparisons.md

There is a table for each section of results.md; the tests check that the page is up to date. Each line is a difference
between two rows, paired by seed. It counts as established if p < 0.01, which is printed in bold. Differences over all
domains are in Delta_m%, those on single domains and of what is forgotten in points of mIoU.
"""
import itertools
import json
import statistics
from functools import cache, partial
from itertools import starmap
from pathlib import Path
from typing import NamedTuple

from mdil.benchmarks.scoring import TRAINED
from mdil.benchmarks.sequence_tables import LEAST_P, in_column
from mdil.evaluation import tables
from mdil.evaluation.paired import LIMIT, p_value, student
from mdil.evaluation.tables import Table, number, spread
from mdil.utils.errors import UserError, run_main
from mdil.utils.files import check_writable, write_text
from mdil.utils.parser import Parser

STORED = Path(__file__).parent / 'results' / 'forgetting'
FIRST, REVERSE = 'cityscapes camvid idd-lite', 'idd-lite camvid cityscapes'
FAST = '--recipe fast'
ADAPTERS, SEPARATE, JOINT = (f'adapters-only {FAST} --first {FAST}', f'single-task-adapters {FAST}',
                             f'multi-task-adapters {FAST}')
MDIL, TUNED, PLAIN = f'mdil {FAST} --first {FAST}', f'fine-tune {FAST} --first {FAST}', f'single-task {FAST}'
ALIKE = '--lr 1e-3 --no-dropout'        # of "Short training at 1e-3 without dropout"
# The paper's method at its own rates, and with shared weights that move faster: its stored file and row.
PAPER = {"`mdil` at the paper's rates": ('mdil-rates', 'mdil'),
         '`mdil` at 1e-3, shared 5e-5, lambda 1': ('mdil-shared', f'mdil {ALIKE} --shared-lr 5e-5 --lambdac 1'),
         '`mdil` at 1e-3, shared 5e-4, lambda 10': ('mdil-rates', f'mdil {ALIKE} --shared-lr 5e-4 --lambdac 10')}
# The same in the reverse order.
REVERSED = {words: (file, row) for (words, (_, row)), file in
            zip(PAPER.items(), ('released-order2', 'mdil-shared-order2', 'mdil-rates-order2'))}
TUNED_ALIKE = {FIRST: 'tuned-alike', REVERSE: 'tuned-alike-fine-tune-order2'}      # files of fine-tuning at 1e-3
# adapters-only in both orders, trained on each of two processors; rows are compared with those of their own.
EPYC_OWN = {FIRST: 'tuned-alike-adapters', REVERSE: 'tuned-alike-order2'}
XEON_OWN = {FIRST: 'adapters-worth', REVERSE: 'adapters-only-order2-xeon'}
XEON = {*XEON_OWN.values(), 'fast-fine-tune-order2', 'joint-mixed', 'long-fine-tune-order2', 'long-mixed',
        'mdil-rates-order2', 'mdil-shared', 'mdil-shared-order2', 'released-order2', 'toy-released',
        'tuned-alike-fine-tune-order2'}       # files trained on an Intel Xeon, the others on an AMD EPYC
TITLES = {'cityscapes': 'Cityscapes', 'camvid': 'CamVid', 'idd-lite': 'IDD-Lite'}
ORDERS = {'first order': FIRST, 'reverse order': REVERSE}
CONFIDENCE = 0.95
HEAD = '''# Every comparison

Written by `python -m benchmarks.claims --markdown docs/comparisons.md` from files in `benchmarks/results/forgetting/`
(`repair`: one level up), which the last column names. The sections are those of [results](results.md), which explains
the terms. A difference is of two rows, paired by seed: mean and sample standard deviation over n seeds, with p and the
95 % interval of a two-sided t test. Bold: p < 0.01. `--per-seed` prints the difference of each seed. †: the two rows
ran on two processors, where the same seed gives different runs, so pairing by seed removes little of the spread.'''
STORED_FILES = 'Stored results'      # title of the table of files
BEST = 'Best epoch or last'          # title of the table of both
VALIDATED = ('joint-mixed', 'long-mixed', 'tuned-alike-fine-tune-order2', *XEON_OWN.values(), 'mdil-shared',
             'mdil-shared-order2', 'mdil-rates-order2', 'released-order2', 'fast-fine-tune-order2',
             'long-fine-tune-order2', 'toy-released')         # files that have both


class Scores(NamedTuple):
    """mIoU in percent: {seed: {domain: mIoU}}, and the stored files that they come from."""
    seeds: dict
    files: tuple


class Difference(NamedTuple):
    """One number per seed, {seed: number}, its unit, and the stored files that it comes from."""
    seeds: dict
    unit: str
    files: tuple


@cache
def stored(name):
    """The content of a stored file; `repair` is that of benchmarks.repair."""
    path = (STORED.parent if name == 'repair' else STORED) / f'{name}.json'
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        raise UserError(f'{path} is missing or damaged; git checkout restores it') from None


def scores(files, row, order=None, column=TRAINED, step=-1):
    """Scores of a row after a step of its sequence.

    files: names of stored files that share its seeds; order: of the domains (default: any, for rows that have none);
    column: of scoring.COLUMNS, 'estimated' or 'kept' instead of the scores as they are.
    """
    seeds = {}
    for file in files.split():
        orders = stored(file)['orders']
        found = orders[order] if order else next(rows for rows in orders.values() if row in rows)
        for seed, figures in found[row]['seeds'].items():
            seeds[seed] = in_column(figures, column)['steps'][step]
    return Scores(seeds, tuple(files.split()))


def copies_of(file, row, order):
    """Scores of copies of the network, one kept for each domain as it was when it had just learnt it."""
    return Scores({seed: figures['learnt'] for seed, figures in stored(file)['orders'][order][row]['seeds'].items()},
                  (file,))


def repaired(order):
    """Scores of the published loops after the last step, and with the old statistics restored, of benchmarks.repair."""
    return [Scores({seed: {name: entry[state] for name, entry in domains.items()}
                    for seed, domains in stored('repair')['orders'][order].items()}, ('repair',))
            for state in ('before', 'statistics')]


def together(one, other):
    """The Scores of both on all their domains, of the seeds that both have."""
    seeds, files = common(one, other)
    return Scores({seed: {**one.seeds[seed], **other.seeds[seed]} for seed in seeds}, files)


def branch(images, of):
    """Scores in the common classes on the images of a domain, with the branch of another, in each seed's file."""
    files = [f'label-seed{seed}' for seed in range(5)]
    return Scores({seed: {images: stored(file)['cross_heads'][of][images]['common']['miou']}
                   for seed, file in enumerate(files)}, tuple(files))


def common(one, other):
    """The seeds that both have, and the files of both."""
    return [seed for seed in one.seeds if seed in other.seeds], tuple(dict.fromkeys(one.files + other.files))


def points(one, other, *domains):
    """The Difference of two Scores in points of mIoU, mean over `domains` (default: all that both have)."""
    seeds, files = common(one, other)
    return Difference({seed: statistics.fmean(value - other.seeds[seed][name]
                                              for name, value in one.seeds[seed].items()
                                              if name in (domains or other.seeds[seed])) for seed in seeds},
                      'points', files)


def relative(one, other):
    """Delta_m% of two Scores: mean over the domains of the relative difference, in percent."""
    seeds, files = common(one, other)
    return Difference({seed: statistics.fmean(100 * (value - other.seeds[seed][name]) / other.seeds[seed][name]
                                              for name, value in one.seeds[seed].items()) for seed in seeds},
                      '%', files)


def minus(one, other):
    """The Difference of two Differences."""
    seeds, files = common(one, other)
    return Difference({seed: one.seeds[seed] - other.seeds[seed] for seed in seeds}, one.unit, files)


def published_loops():
    """What the published loops and fine-tuning lose after three steps, and what statistics give back."""
    two, file, tuned = 'released-two-steps', 'tuned-alike', f'fine-tune {ALIKE}'

    def recovered(row, column, *domains, step=-1, file=file, order=FIRST):
        return points(scores(file, row, order, column, step), scores(file, row, order, step=step), *domains)
    yield 'published loops, old statistics restored after two steps, Cityscapes', recovered(
        'released', 'kept', 'cityscapes', step=1)
    yield 'published loops, old statistics restored after two steps, Cityscapes, earlier runs', points(
        scores(two, 'released-put-back'), scores(two, 'released'), 'cityscapes')
    for name in ('cityscapes', 'camvid'):
        yield f'published loops, old statistics restored, {TITLES[name]}', recovered('released', 'kept', name)
    yield 'published loops, old statistics restored, both', recovered('released', 'kept', 'cityscapes', 'camvid')
    for order, source in TUNED_ALIKE.items():
        yield from changed(f'fine-tuning{said(order)}', scores(source, tuned, order), copies_of(source, tuned, order),
                           order)
        for name in order.split()[:2]:
            yield f'fine-tuning, statistics estimated anew{said(order)}, {TITLES[name]}', recovered(
                tuned, 'estimated', name, file=source, order=order)
            yield f'fine-tuning, old statistics restored{said(order)}, {TITLES[name]}', recovered(
                tuned, 'kept', name, file=source, order=order)
    for name in ('cityscapes', 'camvid'):
        yield f'fine-tuning against `adapters-only`, {TITLES[name]}', points(
            scores(file, tuned, FIRST), scores(file, 'adapters-only', FIRST), name)
        yield f'fine-tuning at 5e-4 against `adapters-only`, {TITLES[name]}', points(
            scores('orders', 'fine-tune', FIRST), scores('orders', 'adapters-only-lr-1e-3-no-dropout', FIRST), name)
    for name in REVERSE.split()[:2]:
        yield f'published loops, old statistics restored, reverse order, {TITLES[name]}', recovered(
            'released', 'kept', name, file='released-order2', order=REVERSE)
    for order, source in ((FIRST, file), (REVERSE, 'released-order2')):
        for words, column in (('', TRAINED), (', old statistics restored', 'kept')):
            yield from changed(f'published loops{words}{said(order)}', scores(source, 'released', order, column),
                               copies_of(source, 'released', order), order)
        yield from changed(f'fine-tuning at 5e-4{said(order)}', scores('orders', 'fine-tune', order),
                           copies_of('orders', 'fine-tune', order), order)
    for words, order in ORDERS.items():
        before, after = repaired(order)
        for name in order.split()[:-1]:
            yield f'published loops, 720 images a step, old statistics restored, {words}, {TITLES[name]}', points(
                after, before, name)
    toy = 'toy-released'
    for words, column in (('old statistics restored', 'kept'), ('statistics estimated anew', 'estimated')):
        yield f'toy roads, published loops, {words}, Cityscapes', recovered('released', column, 'cityscapes', file=toy,
                                                                          order=None)
    for name, domain in (('Cityscapes', 'cityscapes'), ('BDD', 'BDD')):
        yield f'toy roads, `mdil` against `released`, {name}', points(scores(toy, 'mdil'), scores(toy, 'released'),
                                                                      domain)


def said(order):
    """The words that name an order in a claim."""
    return '' if order == FIRST else ', reverse order'


def against(words, one, other, names):
    """Claims that compare two Scores on all domains and on each of `names`."""
    yield words, relative(one, other)
    for name in names:
        yield f'{words}, {TITLES[name]}', points(one, other, name)


def changed(words, found, learnt, order):
    """Claims about how far the old domains are after step 3 from what they were when learnt."""
    for name in order.split()[:2]:
        yield f'{words}, after step 3 minus when learnt, {TITLES[name]}', points(found, learnt, name)


def fine_tuning(file, plain, separate, own, order=FIRST):
    """Claims about fine-tuning in a stored file and its copies.

    plain, separate: separate networks, plain ones and those with adapters; own: adapters-only.
    """
    copies, tuned, names = copies_of(file, TUNED, order), scores(file, TUNED, order), order.split()
    where = said(order)
    yield from changed(f'fine-tuning{where}', tuned, copies, order)
    yield f'fine-tuning against separate networks{where}', relative(tuned, separate)
    yield f'fine-tuned copies against separate networks{where}', relative(copies, separate)
    yield from against(f'fine-tuned copies against plain separate networks{where}', copies, plain, names[1:])
    yield from against(f'fine-tuned copies against `adapters-only`{where}', copies, own, names)
    yield f'lead of the copies minus lead of `adapters-only`{where}', minus(relative(copies, plain),
                                                                           relative(own, separate))
    for name in names[:-1]:
        yield f'fine-tuning against `adapters-only`{where}, {TITLES[name]}', points(tuned, own, name)
        yield f'fine-tuning, statistics estimated anew{where}, {TITLES[name]}', points(
            scores(file, TUNED, order, 'estimated'), tuned, name)


def long_training():
    """All rows use --recipe fast in all steps."""
    separate, joint = scores('long', SEPARATE), scores('long-joint', JOINT)
    own = {'first order': scores('long', ADAPTERS, FIRST), 'reverse order': scores('long-order2', ADAPTERS, REVERSE)}
    for words, order in ORDERS.items():
        yield from against(f'`adapters-only` against separate networks, {words}', own[words], separate,
                           order.split()[1:])
    yield '`adapters-only` against separate networks, first order, mean of the domains', points(own['first order'],
                                                                                              separate)
    for words, order in ORDERS.items():
        yield from against(f'`adapters-only` against joint training, {words}', own[words], joint, order.split())
    yield from against('joint training against separate networks', joint, separate, FIRST.split())
    mixed, estimated = (scores('long-mixed', f'multi-task-mixed {FAST}', FIRST, column)
                        for column in (TRAINED, 'estimated'))
    yield from against('`multi-task-mixed` against separate networks', mixed, separate, FIRST.split())
    yield from against('`multi-task-mixed` against `multi-task-adapters`', mixed, joint, FIRST.split())
    yield from against('`adapters-only` against `multi-task-mixed`, first order', own['first order'], mixed,
                       FIRST.split())
    yield '`multi-task-mixed`, statistics estimated per domain, CamVid', points(estimated, mixed, 'camvid')
    mdil = scores('long-mdil long-mdil-seed2', MDIL, FIRST)
    yield '`mdil` against separate networks', relative(mdil, separate)
    yield '`mdil` against `adapters-only`', relative(mdil, own['first order'])
    plain = together(scores('long-camvid', PLAIN), scores('long-plain', PLAIN))
    yield from against('plain separate networks against separate networks', plain, separate, FIRST.split())
    yield from fine_tuning('long-fine-tune', plain, separate, own['first order'])
    yield from fine_tuning('long-fine-tune-order2', plain, separate, own['reverse order'], REVERSE)


def short_training():
    """All rows use --recipe fast in all steps."""
    separate, mdil = scores('fast', SEPARATE), scores('fast-mdil fast-mdil-seed2', MDIL, FIRST)
    own = {'first order': scores('fast', ADAPTERS, FIRST), 'reverse order': scores('fast-order2', ADAPTERS, REVERSE)}
    for words, order in ORDERS.items():
        yield from against(f'`adapters-only` against separate networks, {words}', own[words], separate,
                           order.split()[1:])
    yield '`mdil` against separate networks', relative(mdil, separate)
    yield '`mdil` against `adapters-only`', relative(mdil, own['first order'])
    plain = scores('fast', PLAIN)
    yield 'plain separate networks against separate networks', relative(plain, separate)
    yield from fine_tuning('fast-fine-tune', plain, separate, own['first order'])
    yield from fine_tuning('fast-fine-tune-order2', plain, separate, own['reverse order'], REVERSE)


def one_rate():
    """Rows at 1e-3 without dropout."""
    five, three = EPYC_OWN[FIRST], 'tuned-alike'
    plain, separate = scores(five, f'single-task {ALIKE}'), scores(five, f'single-task-adapters {ALIKE}')
    own, turned = (scores(EPYC_OWN[order], 'adapters-only', order) for order in (FIRST, REVERSE))

    def over_both(words, found):
        yield f'{words} against plain separate networks', relative(found, plain)
        yield f'{words} against separate networks', relative(found, separate)
    yield 'separate networks against plain ones', relative(separate, plain)
    yield from over_both('`adapters-only`, first order,', own)
    yield from over_both('`adapters-only`, reverse order,', turned)
    for order, file in TUNED_ALIKE.items():
        yield from over_both(f'fine-tuning{said(order)}', scores(file, f'fine-tune {ALIKE}', order))
    yield from without_adapters(over_both)
    for words, order, file in (('', FIRST, three), (', reverse order,', REVERSE, 'released-order2')):
        yield from over_both(f'`released`{words}', scores(file, 'released', order))
        yield from over_both(f'`released`{words or ","} old statistics kept,', scores(file, 'released', order, 'kept'))
    for order, rows, published in ((FIRST, PAPER, three), (REVERSE, REVERSED, 'released-order2')):
        for words, (file, row) in rows.items():
            yield from over_both(f'{words}{said(order)},', scores(file, row, order))
        yield from corrected_loops(order, rows, published)
    yield 'fine-tuned copies against plain separate networks, both at 5e-4', relative(
        scores('orders', 'fine-tune-copies', FIRST), scores('orders', 'single-task'))
    yield from joint_training(over_both)


def without_adapters(over_both):
    """Claims about what adapters are worth, and what another processor changes."""
    words = 'without adapters (`domain-bn`, shared weights frozen)'
    bare = scores(XEON_OWN[FIRST], f'domain-bn {ALIKE} --shared-lr 0', FIRST)
    yield from over_both(words, bare)
    yield from against(f'{words} against `adapters-only`', bare, scores(XEON_OWN[FIRST], 'adapters-only', FIRST),
                       FIRST.split())
    for order in ORDERS.values():
        one, other = (scores(own[order], 'adapters-only', order) for own in (XEON_OWN, EPYC_OWN))
        yield from over_both(f'`adapters-only` on an Intel Xeon{said(order)},', one)
        yield from against(f'`adapters-only` on an Intel Xeon against on an AMD EPYC{said(order)}', one, other,
                           order.split())


def joint_training(over_both):
    """Claims about joint training at 1e-3 without dropout."""
    in_turn = partial(scores, 'tuned-alike', f'multi-task {ALIKE}', FIRST)
    mixed = partial(scores, 'joint-mixed', f'multi-task-mixed {ALIKE}', FIRST)
    rows = {'`multi-task`': in_turn(), '`multi-task`, statistics estimated per domain,': in_turn('estimated'),
            **{f'`{name}`': scores('tuned-alike', f'{name} {ALIKE}', FIRST)
               for name in ('multi-task-domain-bn', 'multi-task-adapters')}}
    for words, found in {**rows, '`multi-task-mixed`': mixed()}.items():
        yield from over_both(words, found)
    for words, found in rows.items():
        yield f'`multi-task-mixed` against {words.rstrip(",")}', relative(mixed(), found)
    for words, found in (('`multi-task`', in_turn), ('`multi-task-mixed`', mixed)):
        yield f'{words}, statistics estimated per domain, against as trained', relative(found('estimated'), found())
    yield from against('`adapters-only` against `multi-task-mixed`', scores(XEON_OWN[FIRST], 'adapters-only', FIRST),
                       mixed(), FIRST.split())
    yield '`adapters-only` against `multi-task-adapters`', relative(scores(EPYC_OWN[FIRST], 'adapters-only', FIRST),
                                                                   rows['`multi-task-adapters`'])


def corrected_loops(order, rows, published):
    """Claims about the paper's method in an order: its rows {words: (stored file, row)}, at its own rates first.

    published: stored file of the published loops.
    """
    where = said(order)
    for words, (file, row) in rows.items():
        found, own = scores(file, row, order), (XEON_OWN if file in XEON else EPYC_OWN)[order]
        yield from against(f'{words}{where}, against `adapters-only`', found, scores(own, 'adapters-only', order),
                           order.split())
        yield from changed(f'{words}{where}', found, copies_of(file, row, order), order)
    words, (file, row) = next(iter(rows.items()))
    for name in order.split():
        yield f'{words}{where}, against `released`, {TITLES[name]}', points(
            scores(file, row, order), scores(published, 'released', order), name)
    yield f'{words}{where}, against `released`, old statistics kept', relative(
        scores(file, row, order), scores(published, 'released', order, 'kept'))


def length_and_order():
    """How the training length, the order and the recipe change the leads over separate networks."""
    files = {('long', FIRST): 'long', ('short', FIRST): 'fast', ('long', REVERSE): 'long-order2',
             ('short', REVERSE): 'fast-order2'}
    own = {key: scores(file, ADAPTERS, key[1]) for key, file in files.items()}
    separate = {'long': scores('long', SEPARATE), 'short': scores('fast', SEPARATE)}
    lead = {(length, order): relative(found, separate[length]) for (length, order), found in own.items()}
    camvid = {length: points(own[length, REVERSE], own[length, FIRST], 'camvid') for length in separate}
    turned = {length: minus(lead[length, REVERSE], lead[length, FIRST]) for length in separate}
    for words, order in ORDERS.items():
        yield f'lead over separate networks, long minus short, {words}', minus(lead['long', order],
                                                                               lead['short', order])
    for length in separate:
        yield f'reverse order minus first, {length}', turned[length]
        yield f'reverse order minus first, {length}, CamVid', camvid[length]
    yield 'reverse order minus first, long minus short', minus(turned['long'], turned['short'])
    yield 'reverse order minus first, long minus short, CamVid', minus(camvid['long'], camvid['short'])
    for (words, order), file in zip(ORDERS.items(), ('tuned-alike-adapters', 'tuned-alike-order2')):
        yield f'`adapters-only`, short, `--recipe fast` against its default, {words}', relative(
            own['short', order], scores(file, 'adapters-only', order))
    yield 'separate networks, short, `--recipe fast` against 1e-3 without dropout', relative(
        separate['short'], scores('tuned-alike-adapters', f'single-task-adapters {ALIKE}'))


def first_domain():
    """CamVid after 60 images of Cityscapes, and BDD after 60 or 1,000 scenes of toy roads, in long training."""
    moving = f'mdil {FAST} --shared-lr 5e-4 --lambdac 10 --first {FAST}'
    pairs = {'`adapters-only`': (ADAPTERS, SEPARATE), 'fine-tuning': (TUNED, PLAIN),
             '`mdil` with shared weights at 5e-4 and lambda 10': (moving, SEPARATE)}
    leads = {words: points(*(scores('long-camvid', row) for row in pair), 'camvid') for words, pair in pairs.items()}
    for words, lead in leads.items():
        yield f'CamVid, {words} against the same network from random weights', lead
    yield 'CamVid, lead of `adapters-only` minus lead of fine-tuning', minus(leads['`adapters-only`'],
                                                                           leads['fine-tuning'])
    longer, shorter, separate = scores('long-first-700', ADAPTERS), scores('long', ADAPTERS), scores('long', SEPARATE)
    for name in FIRST.split():
        yield f'{TITLES[name]}, `adapters-only` with 700 epochs of Cityscapes against 150', points(longer, shorter,
                                                                                                  name)
    for name in FIRST.split()[1:]:
        yield f'{TITLES[name]}, `adapters-only` after 700 epochs of Cityscapes against separate networks', points(
            longer, separate, name)
    moved = points(scores('long-fine-tune', TUNED), scores('long-plain', PLAIN), 'idd-lite')
    yield 'IDD-Lite in step 3, fine-tuning against the same network from random weights', moved
    yield 'IDD-Lite in step 3, lead of `adapters-only` minus lead of fine-tuning', minus(
        points(shorter, separate, 'idd-lite'), moved)
    separate, joint = scores('toy-first-1000', SEPARATE), scores('toy-baselines-seed0 toy-joint', JOINT)
    many = scores('toy-first-1000', ADAPTERS)
    few = {150: scores('toy-first-60', ADAPTERS), 500: scores('toy-first-60-long', ADAPTERS)}
    plain, tuned = (scores('toy-baselines-seed0 toy-plain', row) for row in (PLAIN, TUNED))
    frozen, moved = points(many, separate, 'BDD'), points(tuned, plain, 'BDD')
    yield 'BDD, `adapters-only` after 1,000 scenes against separate networks', frozen
    yield 'BDD, fine-tuning after 1,000 scenes against plain separate networks', moved
    yield 'BDD, lead of `adapters-only` minus lead of fine-tuning', minus(frozen, moved)
    for epochs, found in few.items():
        yield f'BDD, `adapters-only` after 60 scenes in {epochs} epochs against separate networks', points(
            found, separate, 'BDD')
    for epochs, found in few.items():
        yield f'BDD, `adapters-only` after 1,000 scenes in 30 epochs against after 60 in {epochs}', points(
            many, found, 'BDD')
    yield 'BDD, `adapters-only` after 60 scenes in 500 epochs against in 150', points(few[500], few[150], 'BDD')
    yield 'toy Cityscapes after BDD, fine-tuning against `adapters-only`', points(tuned, many, 'cityscapes')
    yield 'toy roads, plain separate networks against separate networks', relative(plain, separate)
    yield 'toy roads, joint training against separate networks', relative(joint, separate)
    yield 'toy roads, `adapters-only` against joint training', relative(many, joint)


def labels():
    """What a wrong branch costs, in the classes that all three domains share."""
    for images in FIRST.split():
        for other in FIRST.split():
            if other != images:
                yield (f'images of {TITLES[images]}, branch of {TITLES[other]} instead of their own',
                       points(branch(images, other), branch(images, images)))


SECTIONS = {'Long training': long_training, 'Short training': short_training,
            'Short training at 1e-3 without dropout': one_rate, 'Statistics or weights': published_loops,
            'Training length, order and recipe': length_and_order, 'What the first domain changes': first_domain,
            'What the domain label is worth': labels}


def best_lines():
    """Cells of each domain of the rows in VALIDATED: how far its best validation lies above the last, in points."""
    for file in VALIDATED:
        for order, rows in stored(file)['orders'].items():
            for (row, found), name in itertools.product(rows.items(), order.split()):
                ends = [figures['validated'][name] for figures in found['seeds'].values()]
                yield [f'`{row}`', name, spread([end['best'] - end['last'] for end in ends]), str(len(ends)), file]


def interval(values):
    """The confidence interval of the mean, from Student's t distribution; '-' for fewer than three values."""
    if len(values) < 3:
        return '-'
    low, high = 0.0, 1e3
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if student(middle, len(values) - 1) < CONFIDENCE else (low, middle)
    mean, half = statistics.fmean(values), high * statistics.stdev(values) / len(values) ** 0.5
    return f'{number(mean - half)} to {number(mean + half)}'


def line(words, difference):
    """The cells of a claim."""
    values = list(difference.seeds.values())
    p = p_value(values)
    shown = f'< {LEAST_P}' if p < LEAST_P else f'{p:#.2g}'
    return [words, f'{spread(values)} {difference.unit}', str(len(values)), f'**{shown}**' if p < LIMIT else shown,
            interval(values), named(difference.files)]


def named(files):
    """The names of stored files; of a numbered series, the first and the last; † if they are of two processors."""
    mark = ' †' if 0 < sum(file in XEON for file in files) < len(files) else ''
    series = len(files) > 4 and files[0][:-1] == files[-1][:-1]
    return (f'{files[0]} to {files[-1]}' if series else ' '.join(files)) + mark


def section_table(title):
    """The Table of a section; those of best epochs and of the stored files that the sections use are sections, too."""
    if title == BEST:
        return Table(title, 'best', ['row', 'domain', 'best minus last epoch', 'n', 'stored in'], [list(best_lines())])
    if title == STORED_FILES:
        used = {file for claims in SECTIONS.values() for _, difference in claims() for file in difference.files}
        return Table(title, 'stored', ['file', 'revision', 'processor', 'torch', 'precision', 'seeds'],
                     [list(map(provenance, sorted(used)))])
    return Table(title, 'claims', ['comparison', 'difference', 'n', 'p', f'{100 * CONFIDENCE:.0f} % interval',
                                   'stored in'], [list(starmap(line, SECTIONS[title]()))])


def section(title):
    """A section's title and table, as Markdown."""
    table = section_table(title)
    return f'## {title}\n\n{tables.markdown(table.header, *table.groups)}'


def page():
    """The page of all sections."""
    return '\n\n'.join([HEAD, *map(section, (*SECTIONS, BEST, STORED_FILES))]) + '\n'


def provenance(name):
    """The cells of a stored file: where its figures come from."""
    content = stored(name)
    versions, settings = content['versions'], content.get('options', content.get('protocol'))
    revision, _, changed = versions['git'].partition('-')
    return [name, revision[:7] + (' with uncommitted changes' if changed else ''),
            'Intel Xeon' if name in XEON else 'AMD EPYC', versions['torch'],
            settings['precision'], ' '.join(map(str, settings.get('seeds', [name[-1]])))]


def counts():
    """How many comparisons there are, how many are established, and how many still are with Bonferroni's correction."""
    found = [p_value(list(difference.seeds.values())) for claims in SECTIONS.values() for _, difference in claims()]
    return len(found), sum(p < LIMIT for p in found), sum(p < (1 - CONFIDENCE) / len(found) for p in found)


def main(argv=None):
    parser = Parser(prog='python -m benchmarks.claims',
                    description='Prints every comparison of docs/results.md, computed from the stored results.')
    parser.add_argument('--per-seed', action='store_true', help='the difference of each seed, too')
    parser.add_argument('--markdown', metavar='FILE', help='writes the tables as a page of Markdown')
    options = parser.parse_args(argv)
    if options.markdown:
        check_writable('--markdown', options.markdown)
        write_text(options.markdown, page())
    for title in (*SECTIONS, BEST, STORED_FILES):
        print(section(title) + '\n')
        for words, difference in SECTIONS[title]() if options.per_seed and title in SECTIONS else ():
            print(f'{words}: {", ".join(map(number, difference.seeds.values()))}')
    made, established, corrected = counts()
    print(f"{made} comparisons, {established} of them with p < {LIMIT}, {corrected} with Bonferroni's correction")


if __name__ == '__main__':
    run_main(main)
