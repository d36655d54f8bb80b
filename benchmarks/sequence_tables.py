"""Figures, tables and pictures of compared sequences.

found: {(order, row name, seed): {column: [{domain: mIoU}] after each step}}, as `scoring.evaluated`
gives it. options: of `python -m benchmarks.forgetting`.
"""
import argparse
import statistics
from collections import Counter

from mdil.benchmarks.scoring import COLUMNS, ESTIMATED, KEPT, TRAINED
from mdil.benchmarks.sequences import is_single, parsed, row_of
from mdil.datasets import get_domain
from mdil.evaluation import metrics, paired, pictures, tables
from mdil.evaluation.tables import Table, number, spread
from mdil.models import METHODS, build_model
from mdil.training import records
from mdil.training.plan import plan_step
from mdil.utils.parser import data_paths

MARKERS = 'osD^v<>Pphd'
STROKES = '-', '--', '-.', ':'
LEAST = 1.0     # points: smaller losses get no percentages
LEAST_P = 0.0001    # smaller p are shown as below it
TITLES = {TRAINED: '', ESTIMATED: ', estimated', KEPT: ', kept'}


def baseline(options):
    """Name of the row that Delta_m% is against: the first of single-task networks; None without one."""
    return next(filter(is_single, options.rows), None)


def figures_of(order, steps, single):
    """Figures of one sequence, from [{domain: mIoU}] after each step and {domain: single-task mIoU}.

    new: mean over the domains after the first of the mIoU at the step that learnt it.
    """
    steps = [{name: step[name] for name in order if name in step} for step in steps]      # of joint rows, sorted
    learnt = metrics.learnt_at(steps)
    new = [learnt[name] for name in order[1:]]
    return {**metrics.summary(steps, single), 'steps': steps, 'learnt': learnt,
            'new': statistics.fmean(new) if new else None}


def all_figures(found, options):
    """{order: {row name: {seed: figures of the sequence, with those of the other columns under 'columns'}}}."""
    result = {}
    for (order, name, seed), columns in found.items():
        single = found.get((order, baseline(options), seed), {TRAINED: [{}]})[TRAINED][0]
        figures = {column: figures_of(order, steps, single) for column, steps in columns.items()}
        result.setdefault(order, {}).setdefault(name, {})[seed] = {**figures.pop(TRAINED), 'columns': figures}
    return result


def in_column(figures, column):
    """The figures of a sequence in a column."""
    return figures if column == TRAINED else figures['columns'][column]


def variants(rows):
    """(row name, column, {seed: figures in it}) of each row, and of its other columns where any figure differs."""
    for name, seeds in rows.items():
        for column in COLUMNS:
            found = {seed: in_column(figures, column) for seed, figures in seeds.items()}
            if column == TRAINED or any(differ(found[seed]['steps'], figures['steps'])
                                        for seed, figures in seeds.items()):
                yield name, column, found


def differ(steps, others):
    """Whether any mIoU of two [{domain: mIoU}] differs by what two decimals show."""
    return any(abs(step[name] - other[name]) >= 0.005 for step, other in zip(steps, others) for name in step)


def units(step):
    """Forward passes that an image of the step costs, a backward pass being two."""
    options, old = parsed(step.arguments), len(step.domains) - 1
    if not plan_step(argparse.Namespace(**options)).needs_teacher:
        return 3
    return 3 + min(old, options.get('distill_domains') or old) * (3 + 1)


def added(step, row, options):
    """Parameters that the last of the step's domains added: its branch, or a network of its own."""
    counts = [get_domain(name, data_paths(options.data)).num_classes for name in step.domains]
    if row.copies or METHODS[step.method].one_domain:
        model = build_model(counts[-1:], step.method, options.network)
        return sum(parameter.numel() for parameter in model.parameters())
    model = build_model(counts, step.method, options.network)
    return sum(parameter.numel() for parameter in model.branch_parameters(len(counts) - 1))


def cost(steps, row, options):
    """What the last steps of a row's seeds cost: {'added_parameters', 'units', 'images_per_second' (median)}."""
    lines = [line for step in steps for line in records.read_metrics(step.folder(options))]
    rates = [line['train']['images_per_second'] for line in lines if 'images_per_second' in line['train']]
    return {'added_parameters': added(steps[0], row, options), 'units': units(steps[0]),
            'images_per_second': statistics.median(rates) if rates else None}


def all_costs(plans, found, options):
    """{order: {row name: cost of its last step}} of what was evaluated."""
    steps = {}
    for order, name, seed in found:
        steps.setdefault(order, {}).setdefault(name, []).append(plans[order, name, seed][-1])
    return {order: {name: cost(last, row_of(name), options) for name, last in rows.items()}
            for order, rows in steps.items()}


def label(name, seeds, options, column=TRAINED):
    """What a row is called in a column, with the number of its seeds where some are missing."""
    missing = '' if len(seeds) == len(options.seeds) else f' ({len(seeds)} of {len(options.seeds)} seeds)'
    return f'{name}{TITLES[column]}{missing}'


def summary_table(order, rows, costs, options):
    """mIoU after the last step, forgetting, transfer and cost of each row of an order."""
    columns = {**{name: lambda one, name=name: one['steps'][-1][name] for name in order},
               **{f'{name} forgotten': lambda one, name=name: one['forgetting'].get(name) for name in order[:-1]},
               'new when learnt': lambda one: one['new'], tables.DELTA: lambda one: one['delta_m']}
    lines = [[label(name, seeds, options, column),
              *(spread([figure(one) for one in seeds.values()]) for figure in columns.values()),
              f'{costs[name]["added_parameters"] / 1e6:.2f}', str(costs[name]['units']),
              number(costs[name]['images_per_second'], 1)] for name, column, seeds in variants(rows)]
    return Table(f'{", then ".join(order)}: mIoU after the last step', f'forgetting-{"-".join(order)}',
                 ['row', *columns, 'added M', 'units', 'images/s'], [lines],
                 (f'{tables.DELTA} is against {baseline(options)}.',) if baseline(options) else ())


def column_table(order, rows, options):
    """mIoU of each domain after every step of each row in the three columns, and what they give back of its loss."""
    lines = []
    for name, seeds in rows.items():
        for step, found in enumerate(next(iter(seeds.values()))['steps']):
            row = f'{label(name, seeds, options)}, {step + 1}'
            lines += [[row, domain, *column_cells(step, domain, seeds.values())]
                      for domain in order if domain in found]
    return Table(f'{", then ".join(order)}: mIoU after every step, and percent of the loss that comes back',
                 f'columns-{"-".join(order)}', ['row, step', 'domain', 'when learnt', *COLUMNS, 'lost',
                                                f'% back, {ESTIMATED}', f'% back, {KEPT}'], [lines])


def column_cells(step, domain, seeds):
    """Cells of a line of `column_table`; seeds: figures of the sequence, one for each seed."""
    learnt = [figures['learnt'][domain] for figures in seeds]
    mious = {column: [in_column(figures, column)['steps'][step][domain] for figures in seeds] for column in COLUMNS}
    lost = [before - now for before, now in zip(learnt, mious[TRAINED])]
    shares = [spread([100 * (there - now) / loss for there, now, loss in zip(mious[column], mious[TRAINED], lost)], 0)
              if min(lost) >= LEAST else '-' for column in (ESTIMATED, KEPT)]
    return [spread(learnt), *map(spread, mious.values()), spread(lost), *shares]


def last_figures(order, rows):
    """{(row name, column): {seed: [mIoU of each domain after the last step, their mean, Delta_m% or None]}}."""
    def of(figures):
        mious = [figures['steps'][-1][domain] for domain in order]
        return [*mious, statistics.fmean(mious), figures['delta_m']]
    return {(name, column): {seed: of(figures) for seed, figures in seeds.items()}
            for name, column, seeds in variants(rows)}


def less(ours, others):
    """{seed: ours - others, figure by figure} of two {seed: figures}; a figure is None where either is.

    Without what rounding leaves of equal figures.
    """
    return {seed: [None if None in pair else round(pair[0] - pair[1], 9) for pair in zip(ours[seed], others[seed])]
            for seed in ours if seed in others}


def gains(order, rows, against):
    """`last_figures` of every other row less those of the row `against`."""
    found = last_figures(order, rows)
    base = found.pop((against, TRAINED))
    return {key: less(seeds, base) for key, seeds in found.items()}


def paired_table(order, rows, against, each=False):
    """How many points each row is above `against` after the last step, paired by seed, with p; each: and per seed."""
    return differences_table(f'{", then ".join(order)}: points more than {against} after the last step',
                             f'against-{"-".join(order)}', order, gains(order, rows, against), each)


def change_table(order, rows, others, against, where, each=False):
    """How many points each row is above its scores in `others`, the rows of other files, paired by seed, with p.

    against: None, or the row whose figures are taken off first, in both. each: per seed, too.
    """
    ours, theirs = ((gains(order, some, against) if against else last_figures(order, some)) for some in (rows, others))
    found = {key: less(ours[key], theirs[key]) for key in ours if key in theirs}
    what = f'change in the lead over {against} since' if against else 'points more after the last step than in'
    title = f'{", then ".join(order)}: {what} {where}{", in points" if against else ""}'
    return differences_table(title, f'change-{"-".join(order)}', order, found, each, judged=not against)


def differences_table(title, name, order, found, each=False, judged=True):
    """The Table of {(row name, column): {seed: differences}}; rows without seeds are left out.

    each: with a line per seed. judged: whether a difference can be called better or worse; of leads it is neither.
    """
    lines = []
    for (row, column), seeds in found.items():
        if seeds:
            cells = ['-' if None in values else gain_cell(values, judged) for values in zip(*seeds.values())]
            lines.append([f'{row}{TITLES[column]}', str(len(seeds)), *cells])
            lines += [[f'  seed {seed}', '', *map(number, values)] for seed, values in seeds.items() if each]
    verdicts = f'; "better" and "worse" where p < {paired.LIMIT}' if judged else ''
    return Table(title, name, ['row', 'n', *order, 'mean', tables.DELTA], [lines],
                 (f'p: two-sided t test, paired by seed{verdicts}.',))


def gain_cell(differences, judged):
    """Differences of one figure: mean and deviation, p, and the verdict if they are judged."""
    p, verdict = paired.p_value(differences), paired.verdict(differences) if judged else ''
    if p is None:
        return spread(differences)
    told = f'p = {p:.2g}' if p >= LEAST_P else f'p < {LEAST_P}'
    return f'{spread(differences)} ({", ".join(filter(None, (told, verdict)))})'


def learning_step(steps, domain):
    """The step of a row that learns the domain."""
    return next(step for step in steps if domain in step.domains)


def curve(step, domain, options):
    """How a domain is learnt: {percent of the step's epochs: validation mIoU in percent}."""
    epochs = parsed(step.arguments)['num_epochs']
    return {100 * line['epoch'] / epochs: line['val'][domain]['miou']
            for line in records.read_metrics(step.folder(options)) if domain in line['val']}


def add_validated(figures, plans, options):
    """Adds 'validated' to the figures of `all_figures`: each domain's {'last', 'best'} mIoU while it was learnt.

    In percent, as train.py validated it; the best may be that of any epoch with a validation.
    """
    for order, rows in figures.items():
        for name, seeds in rows.items():
            for seed, found in seeds.items():
                curves = {domain: list(curve(learning_step(plans[order, name, seed], domain), domain, options).values())
                          for domain in order}
                found['validated'] = {domain: {'last': mious[-1], 'best': max(mious)}
                                      for domain, mious in curves.items() if mious}


def best_table(order, rows, options):
    """mIoU of each domain in the last epoch that learnt it and in the best, as validated in training."""
    lines = []
    for name, seeds in rows.items():
        for domain in order:
            found = [figures['validated'][domain] for figures in seeds.values() if domain in figures['validated']]
            if found:
                lines.append([label(name, seeds, options), domain,
                              *(spread([one[end] for one in found]) for end in ('last', 'best')),
                              spread([one['best'] - one['last'] for one in found])])
    return Table(f'{", then ".join(order)}: validation mIoU while a domain is learnt, last and best epoch',
                 f'best-{"-".join(order)}', ['row', 'domain', 'last', 'best', 'best - last'], [lines])


def draw_curves(plans, options):
    """Writes --curves: validation mIoU of each domain while it is learnt; a line per row, thin ones per seed."""
    height, width = len(options.orders), max(map(len, options.orders))
    figure = pictures.new_figure(figsize=(3.2 * width + 3, 3 * height))
    axes = figure.subplots(height, width, squeeze=False)
    short = short_names(options.rows)
    panels = {(order, domain): axis for order, line in zip(options.orders, axes) for domain, axis in zip(order, line)}
    for (order, domain), axis in panels.items():
        for index, name in enumerate(options.rows):
            seeds = [curve(learning_step(plans[order, name, seed], domain), domain, options) for seed in options.seeds]
            for seed in seeds:
                axis.plot(seed.keys(), seed.values(), f'C{index % 10}', alpha=0.3, linewidth=0.7)
            stroke = STROKES[index % len(STROKES)]      # rows that share a step have the same curve there
            common = [percent for percent in seeds[0] if all(percent in seed for seed in seeds)]
            axis.plot(common, [statistics.fmean(seed[percent] for seed in seeds) for percent in common],
                      f'C{index % 10}{stroke}', linewidth=1.5, label=short[name])
        axis.set(title=f'{domain}, {order.index(domain) + 1} of {len(order)}', xlabel="percent of the step's epochs",
                 ylabel='validation mIoU in percent')
        axis.grid(color='#eee')
    add_legend(figure, 'mean over seeds; thin: each seed' if len(options.seeds) > 1 else None)
    pictures.save_figure(options.curves, figure)


def draw_rows(figures, options):
    """Writes --figure: what rows reach on new domains over what they lose of old ones, mean and deviation."""
    figure, short = pictures.new_figure(figsize=(5 * len(figures) + 2.5, 4.4)), short_names(options.rows)
    styles = {name: f'C{number % 10}{MARKERS[number % len(MARKERS)]}' for number, name in enumerate(options.rows)}
    for axis, (order, rows) in zip(figure.subplots(1, len(figures), squeeze=False)[0], figures.items()):
        for name, seeds in rows.items():
            new = [one['new'] for one in seeds.values()]
            lost = [statistics.fmean(one['forgetting'].values()) for one in seeds.values() if one['forgetting']]
            if lost:
                axis.errorbar(statistics.fmean(lost), statistics.fmean(new), deviation(new), deviation(lost),
                              styles[name], markersize=7, label=short[name], alpha=0.8)
            else:
                axis.axhline(statistics.fmean(new), color=styles[name][:2], linestyle='--', linewidth=1,
                             label=short[name])
        axis.set(title=', then '.join(order), xlabel='points forgotten, mean over the old domains',
                 ylabel='mIoU of new domains when learnt, mean')
        axis.grid(color='#eee')
    add_legend(figure, 'mean and standard deviation over seeds' if len(options.seeds) > 1 else None)
    pictures.save_figure(options.figure, figure)


def short_names(rows):
    """{row: its method, or the whole row if others have the same method}."""
    methods = Counter(row.split()[0] for row in rows)
    return {row: row.split()[0] if methods[row.split()[0]] == 1 else row for row in rows}


def add_legend(figure, title):
    """One legend for all panels, each label once."""
    handles = {label: handle for axis in figure.axes for handle, label in zip(*axis.get_legend_handles_labels())}
    figure.legend(handles.values(), handles, loc='outside right upper', frameon=False, fontsize=8, title=title,
                  title_fontsize=8)


def deviation(values):
    """Sample standard deviation; 0 of one value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0
