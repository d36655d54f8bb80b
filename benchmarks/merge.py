"""The tables of several result files of `python -m benchmarks.forgetting` as one: rows can be trained one by one.

    python -m benchmarks.merge benchmarks/results/forgetting/fast.json benchmarks/results/forgetting/fast-mdil.json \\
        --against "single-task-adapters --recipe fast"

    python -m benchmarks.merge benchmarks/results/forgetting/long.json --minus benchmarks/results/forgetting/fast.json

Nothing is trained. Delta_m% is computed again, against the first row of single-task networks, seed by seed. Joint and
single-task rows count in every order of their domains. Files whose rows were not trained alike are refused; --minus
compares the same rows after other training or, if the files have no order in common, in the other order. The table of
every step is left out where rows are compared.
"""
import argparse
import json
from typing import NamedTuple

from mdil.benchmarks.scoring import COLUMNS
from mdil.benchmarks.sequence_tables import (all_figures, change_table, column_table, in_column, paired_table,
                                             summary_table)
from mdil.benchmarks.sequences import row_of
from mdil.evaluation import tables
from mdil.models import METHODS
from mdil.utils.errors import UserError, brief, run_main
from mdil.utils.files import check_writable, write_text
from mdil.utils.parser import Parser

ALIKE = ('epochs', 'which', 'network', 'height', 'width', 'batch_size', 'lr', 'class_weights', 'precision',
         'limit_batches', 'val_every')


class Results(NamedTuple):
    """A file of results: `found` of sequence_tables, {(order, row name): cost}, options, revision."""
    found: dict
    costs: dict
    options: dict
    revision: str


def refuse(constant):
    """For json.load: NaN and infinities are no scores."""
    raise ValueError(f'{constant} is no score')


def read(path):
    """The Results in a file."""
    try:
        with open(path, encoding='utf-8') as file:
            content = json.load(file, parse_constant=refuse)
        options = {name: content['options'][name] for name in ALIKE}
        return Results(*runs_in(content), options, content['versions']['git'])
    except UserError as error:          # a row that this revision does not know
        raise UserError(f'{path}: {error}') from error
    except OSError as error:
        raise UserError(f'cannot read {path}: {error.strerror}') from error
    except (AttributeError, KeyError, IndexError, RecursionError, TypeError, ValueError) as error:
        raise UserError(f'{path} is not what --json of benchmarks.forgetting writes '
                        f'(missing or wrong: {brief(error)})') from error


def runs_in(content):
    """(`found`, costs) of a file's content; KeyError, TypeError or ValueError if it is not as it should be."""
    found, costs = {}, {}
    for names, rows in content['orders'].items():
        order = tuple(names.split())
        for name, row in rows.items():
            row_of(name)
            cost, rate = row['cost'], row['cost']['images_per_second']
            costs[order, name] = {'added_parameters': int(cost['added_parameters']), 'units': int(cost['units']),
                                  'images_per_second': rate and float(rate)}
            if not row['seeds']:
                raise ValueError(f'seeds of {name}')
            for seed, figures in row['seeds'].items():
                found[order, name, int(seed)] = {column: steps_in(in_column(figures, column), order)
                                                 for column in COLUMNS}
    if not found:
        raise ValueError('no run')
    return found, costs


def steps_in(figures, order):
    """[{domain: mIoU}] of a sequence's figures."""
    steps = [{name: float(step[name]) for name in order if name in step} for step in figures['steps']]
    if set(steps[-1]) != set(order):
        raise ValueError(f'steps of {" ".join(order)}')
    return steps


def check_same_training(read_files):
    """UserError if rows were trained with different options; read_files: {path: Results}."""
    (first, expected), *others = ((path, results.options) for path, results in read_files.items())
    for path, options in others:
        odd = [name for name in ALIKE if options[name] != expected[name]
               and (name != 'val_every' or expected['which'] == 'best')]
        if odd:
            raise UserError(f'rows are not alike: {odd[0]} is {expected[odd[0]]} in {first} and {options[odd[0]]} in '
                            f'{path}; leave out one of the files')


def merged(read_files):
    """`found` and costs of all files; UserError for a run with two different results."""
    found, costs, origin = {}, {}, {}
    for path, results in read_files.items():
        costs = {**results.costs, **costs}
        for key, columns in results.found.items():
            if found.setdefault(key, columns) != columns:
                order, name, seed = key
                raise UserError(f'{origin[key]} and {path} differ on seed {seed} of "{name}" in the order '
                                f'{" ".join(order)}; leave one of them out')
            origin.setdefault(key, path)
    for key in list(found):
        share(key, found, costs)
    return found, costs


def share(key, found, costs):
    """Adds a joint or single-task run to all orders of its domains, as `forgetting` does: it has no order.

    UserError if one of them has another result. Costs are those in the order that it was run for.
    """
    order, name, seed = key
    method = METHODS[row_of(name).method]
    for other in orders_of(order, {order for order, *_ in found}) if method.joint or method.one_domain else ():
        if found.setdefault((other, name, seed), found[key]) != found[key]:
            raise UserError(f'the orders {" ".join(order)} and {" ".join(other)} differ on seed {seed} of "{name}", '
                            'but this row has one run for all orders; leave out one of the files')
        costs.setdefault((other, name), costs[order, name])


def orders_of(domains, orders):
    """Those of `orders` that have the same domains."""
    return [order for order in orders if sorted(order) == sorted(domains)]


def rows_in(paths, against):
    """({path: Results}, {order: {row name: {seed: figures}}}, costs, options of the tables) of files that agree."""
    read_files = {path: read(path) for path in paths}
    check_same_training(read_files)
    found, costs = merged(read_files)
    names = list(dict.fromkeys(name for _, name, _ in found))
    if against and against not in names:
        raise UserError(f'--against {against!r} is no row of {", ".join(paths)}; theirs are {", ".join(names)}')
    stated = argparse.Namespace(rows=names, seeds=sorted({seed for *_, seed in found}), against=against)
    return read_files, all_figures(found, stated), costs, stated


def counterparts(order, figures, others):
    """The orders of `others` that an order of `figures` is compared with: itself, or if none is in common, others."""
    if figures.keys() & others:
        return [order] if order in others else []
    return orders_of(order, others)


def changes(figures, others, options):
    """The Tables of how rows differ from themselves in the files of --minus; UserError if no run is in both."""
    where, against, shown = ', '.join(options.minus), options.against, []
    for order, rows in figures.items():
        for other in counterparts(order, figures, others):
            if not against or against in rows and against in others[other]:
                turned = '' if order == other else f' ({", then ".join(other)})'
                shown.append(change_table(order, rows, others[other], against, f'{where}{turned}', options.per_seed))
    if not any(table.groups[0] for table in shown):
        raise UserError(f'--minus {where}: no run of the same domains, row and seed is there')
    return shown


def main(argv=None):
    parser = Parser(prog='python -m benchmarks.merge',
                    description='Shows results of benchmarks.forgetting as one table.')
    parser.add_argument('files', nargs='+', metavar='FILE', help='what --json of benchmarks.forgetting wrote')
    parser.add_argument('--against', metavar='"METHOD OPTIONS"',
                        help='a row: a table of how the other rows differ from it, paired by seed, with p')
    parser.add_argument('--minus', nargs='+', default=[], metavar='FILE',
                        help='the same rows after other training or in the other order: a table of how the rows '
                             'differ from those (with --against: of how their leads over that row differ), paired by '
                             'seed, with p')
    parser.add_argument('--per-seed', action='store_true', help='the differences of each seed, too')
    parser.add_argument('--markdown', metavar='FILE', help='write the tables')
    options = parser.parse_args(argv)
    if options.markdown:
        check_writable('--markdown', options.markdown, inputs=[*options.files, *options.minus])
    against = options.against = options.against and ' '.join(options.against.split())
    read_files, figures, costs, stated = rows_in(options.files, against)
    shown = []
    for order, rows in figures.items():
        shown.append(summary_table(order, rows, {name: costs[order, name] for name in rows}, stated))
        if not (against or options.minus):
            shown.append(column_table(order, rows, stated))
        if against in rows:
            shown.append(paired_table(order, rows, against, options.per_seed))
    if options.minus:
        others, their_figures, *_ = rows_in(options.minus, against)
        if not figures.keys() & their_figures:       # another order and other training would be two changes at once
            check_same_training({**read_files, **others})
        shown += changes(figures, their_figures, options)
        read_files = {**read_files, **others}
    about = f'From {", ".join(f"{path} ({results.revision})" for path, results in read_files.items())}.'
    print(tables.wrapped(about), *map(tables.terminal, shown), sep='\n\n')
    if options.markdown:
        write_text(options.markdown, tables.markdown_document(about, shown))


if __name__ == '__main__':
    run_main(main)
