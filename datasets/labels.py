"""Label tables of Cityscapes and IDD: names, ids at every level, colours.

The tables are CSV files next to this one; `label_table` reads one.
"""
import csv
import functools
from pathlib import Path


@functools.cache
def label_table(name):
    """Rows of the table `name` ('cityscapes' or 'idd') as a tuple of dicts.

    Every value but `name` and `category` is an int. 255 means void.
    """
    path = Path(__file__).with_name(f'{name}_labels.csv')
    with open(path, newline='') as file:
        rows = csv.DictReader(file)
        text = ('name', 'category')
        return tuple({key: value if key in text else int(value) for key, value in row.items()}
                     for row in rows)
