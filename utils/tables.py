"""Tables of results as plain text and Markdown."""
import math


def number(value, digits=2):
    """A figure as text; '-' for None and NaN."""
    return '-' if value is None or math.isnan(value) else f'{value:.{digits}f}'


def plain(header, rows):
    """An aligned text table: first column left, the others right."""
    cells = [[str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = ['  '.join(cell.ljust(width) if i == 0 else cell.rjust(width)
                       for i, (cell, width) in enumerate(zip(row, widths))).rstrip() for row in cells]
    return '\n'.join([lines[0], '-' * max(map(len, lines)), *lines[1:]])


def markdown(header, rows):
    """The same as a Markdown table."""
    line = lambda cells: '| ' + ' | '.join(str(cell) for cell in cells) + ' |'
    return '\n'.join([line(header), '|' + ' --- |' + ' ---: |' * (len(header) - 1), *map(line, rows)])


def step_rows(steps):
    """(header, rows) of the step x domain mIoU matrix; steps: list of {domain: mIoU}."""
    names = list(steps[-1])
    return (['mIoU after step', *names],
            [[f'{index} ({list(step)[-1]})', *(number(step.get(name)) for name in names)]
             for index, step in enumerate(steps, 1)])


def class_rows(classes):
    """(header, rows) of per-class IoU in percent; classes: {name: IoU in [0, 1] or None}."""
    return ['class', 'IoU'], [[name, number(None if iou is None else 100 * iou)] for name, iou in classes.items()]


def side_by_side(left, right, gap='    '):
    """Two text blocks beside each other."""
    left, right = left.splitlines(), right.splitlines()
    width, height = max(map(len, left), default=0), max(len(left), len(right))
    left, right = left + [''] * (height - len(left)), right + [''] * (height - len(right))
    return '\n'.join(f'{a.ljust(width)}{gap}{b}'.rstrip() for a, b in zip(left, right))
