"""The tables of several files of `python -m benchmarks.forgetting --json` as one, so that rows can be trained one by one.

    python -m benchmarks.merge benchmarks/results/forgetting/fast.json benchmarks/results/forgetting/fast-mdil.json \\
        --against "single-task-adapters --recipe fast"

Nothing is trained. Delta_m% is computed again, against the first row of single-task networks, seed by seed.
Files whose rows were not trained alike are refused.
"""
import argparse
import json

from mdil.benchmarks.scoring import COLUMNS
from mdil.benchmarks.sequence_tables import all_figures, in_column, paired_table, summary_table
from mdil.evaluation import tables
from mdil.utils.errors import UserError, brief, run_main
from mdil.utils.files import check_writable, write_text
from mdil.utils.parser import Parser

ALIKE = ('epochs', 'which', 'network', 'height', 'width', 'batch_size', 'lr', 'class_weights', 'precision', 'limit_batches')


def read(path):
    """The contents of a file of results."""
    try:
        with open(path, encoding='utf-8') as file:
            content = json.load(file)
        for rows in content['orders'].values():
            for row in rows.values():
                row['cost'], [figures['columns'] for figures in row['seeds'].values()]
        content['options'], content['versions']
    except (OSError, ValueError) as error:
        raise UserError(f'cannot read {path}: {brief(error)}') from error
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(f'{path} is not what --json of benchmarks.forgetting writes today '
                        f'(missing or wrong: {brief(error)})') from error
    return content


def check_alike(contents):
    """UserError if rows were trained with different options; contents: {path: contents of the file}."""
    first, *others = contents
    for name in ALIKE:
        for path in others:
            one, other = (contents[file]['options'].get(name) for file in (first, path))
            if one != other:
                raise UserError(f'rows are not alike: {name} is {one} in {first} and {other} in {path}')


def merged(contents):
    """`found` of sequence_tables, and {(order, row name): cost}; UserError for a run with two different results."""
    found, costs, origin = {}, {}, {}
    for path, content in contents.items():
        for order, rows in content['orders'].items():
            for name, row in rows.items():
                costs.setdefault((tuple(order.split()), name), row['cost'])
                for seed, figures in row['seeds'].items():
                    key = tuple(order.split()), name, int(seed)
                    columns = {column: in_column(figures, column)['steps'] for column in COLUMNS}
                    if found.setdefault(key, columns) != columns:
                        raise UserError(f'{origin[key]} and {path} differ on seed {seed} of "{name}" in the order '
                                        f'{order}; leave one of them out')
                    origin.setdefault(key, path)
    return found, costs


def main(argv=None):
    parser = Parser(prog='python -m benchmarks.merge', description='Shows results of benchmarks.forgetting as one table.')
    parser.add_argument('files', nargs='+', metavar='FILE', help='what --json of benchmarks.forgetting wrote')
    parser.add_argument('--against', metavar='"METHOD OPTIONS"',
                        help='a row: a table of what the others have more than it, paired by seed, with p')
    parser.add_argument('--markdown', metavar='FILE', help='write the tables')
    options = parser.parse_args(argv)
    if options.markdown:
        check_writable('--markdown', options.markdown)
    contents = {path: read(path) for path in options.files}
    check_alike(contents)
    found, costs = merged(contents)
    names = list(dict.fromkeys(name for _, name, _ in found))
    if options.against and options.against not in names:
        raise UserError(f'--against {options.against!r} is no row of the files: {", ".join(names)}')
    stated = argparse.Namespace(rows=names, seeds=sorted({seed for *_, seed in found}), against=options.against)
    shown = []
    for order, rows in all_figures(found, stated).items():
        shown.append(summary_table(order, rows, {name: costs[order, name] for name in rows}, stated))
        if stated.against in rows:
            shown.append(paired_table(order, rows, stated))
    about = 'From ' + ', '.join(f'{path} ({content["versions"]["git"]})' for path, content in contents.items()) + '.'
    print(tables.wrapped(about), *map(tables.terminal, shown), sep='\n\n')
    if options.markdown:
        write_text(options.markdown, tables.markdown_document(about, shown))


if __name__ == '__main__':
    run_main(main)
