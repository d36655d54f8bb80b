"""Tables of results as text for the terminal, Markdown, LaTeX and CSV."""
import csv
import io
import itertools
import math
import re
import statistics
import textwrap
from dataclasses import dataclass


WIDTH = 80          # columns of the terminal
LONGEST = 28        # maximum characters of a line of a cell in the terminal
DELTA = 'Delta_m%'
COMMON = '7 common classes (IDD level 1)'
TRANSFERS = (('backward_transfer', 'backward transfer'), ('forward_transfer', 'forward transfer'), ('delta_m', DELTA))
MEANINGS = (('forgetting', 'forgetting: best earlier mIoU minus the last'),
            ('backward_transfer', 'backward transfer: last minus when learnt, mean over the earlier domains'),
            ('forward_transfer', 'forward transfer: when learnt minus single-task, mean over the later domains'),
            ('delta_m', f'{DELTA}: last against single-task, in percent of that, mean over all domains'))
TEX = {'\\': r'\textbackslash{}', '~': r'\textasciitilde{}', '^': r'\textasciicircum{}', '<': r'\textless{}',
       '>': r'\textgreater{}', '|': r'\textbar{}', '[': '{[}', '*': '{*}', **{mark: '\\' + mark for mark in '&%$#_{}'}}


@dataclass
class Table:
    """title: one line. key: short name. groups: lists of rows, separated by rules; cells are str. notes: sentences."""
    title: str
    key: str
    header: list
    groups: list
    notes: tuple = ()


def number(value, digits=2):
    """A number as text; '-' for None and NaN."""
    return '-' if value is None or math.isnan(value) else f'{round(value, digits) + 0.0:.{digits}f}'    # no -0.00


def fine(value):
    """A loss as text: four decimals, or two digits of a positive one that would be shown as 0."""
    return f'{value:.1e}' if value and 0 < value < 5e-5 else number(value, 4)


def spread(values, digits=2):
    """Numbers of several seeds as text: mean +- sample standard deviation; '-' if one is None or NaN."""
    if any(number(value) == '-' for value in values):
        return '-'
    mean = number(statistics.fmean(values), digits)
    return f'{mean} +- {statistics.stdev(values):.{digits}f}' if len(values) > 1 else mean


def plain(header, *groups):
    """An aligned text table: first column left, the others right, a rule above each group of rows."""
    return aligned([[[str(cell) for cell in row] for row in group] for group in ([header], *groups)])


def aligned(cells):
    """`plain` of groups of rows of str, the header as the first group."""
    widths = [max(len(row[column]) for group in cells for row in group) for column in range(len(cells[0][0]))]
    lines = [['  '.join(cell.ljust(width) if column == 0 else cell.rjust(width)
                        for column, (cell, width) in enumerate(zip(row, widths))).rstrip() for row in group]
             for group in cells]
    rule = '-' * max(len(line) for group in lines for line in group)
    return f'\n{rule}\n'.join('\n'.join(group) for group in lines if group)


def fitted(header, groups):
    """`plain` within WIDTH columns: long cells are wrapped, columns that do not fit go into further blocks below."""
    rows = [[line for row in group for line in lines_of(row)] for group in ([header], *groups)]
    widths = [max(len(row[column]) for group in rows for row in group) for column in range(len(header))]
    blocks, used = [[0]], widths[0]
    for column in range(1, len(header)):
        if used + 2 + widths[column] > WIDTH and len(blocks[-1]) > 1:
            blocks.append([0])
            used = widths[0]
        blocks[-1].append(column)
        used += 2 + widths[column]
    return '\n\n'.join(aligned([[[row[column] for column in block] for row in group] for group in rows])
                       for block in blocks)


def lines_of(row):
    """A row as rows of one line each: cells of more than LONGEST characters go on in the rows below."""
    cells = [textwrap.wrap(cell, LONGEST, subsequent_indent='  ', break_on_hyphens=False) for cell in row]
    return list(itertools.zip_longest(*cells, fillvalue=''))


def wrapped(text):
    """A paragraph wrapped to WIDTH columns."""
    return textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False)


def packed(blocks):
    """Text blocks side by side where they fit into WIDTH columns, else one below the other."""
    done = blocks[:1]
    for block in blocks[1:]:
        row = side_by_side(done[-1], block)
        if max(map(len, row.splitlines())) <= WIDTH:
            done[-1] = row
        else:
            done.append(block)
    return '\n\n'.join(done)


def side_by_side(left, right):
    """Two text blocks side by side."""
    left, right = left.splitlines(), right.splitlines()
    width, height = max(map(len, left), default=0), max(len(left), len(right))
    left, right = left + [''] * (height - len(left)), right + [''] * (height - len(right))
    return '\n'.join(f'{a.ljust(width)}    {b}'.rstrip() for a, b in zip(left, right))


def terminal(table):
    """A Table as text of at most WIDTH columns."""
    body = fitted(table.header, table.groups)
    return '\n'.join([wrapped(table.title), body, *map(wrapped, table.notes)])


def markdown(header, *groups):
    """The rows as a Markdown table."""
    line = lambda cells: '| ' + ' | '.join(str(cell).replace('|', r'\|').replace('+-', '±') for cell in cells) + ' |'
    rows = [row for group in groups for row in group]
    return '\n'.join([line(header), '|' + ' --- |' + ' ---: |' * (len(header) - 1), *map(line, rows)])


def markdown_document(about, tables):
    """A paragraph and Tables as Markdown."""
    parts = [f'**{table.title}**\n\n' + '\n\n'.join([markdown(table.header, *table.groups), *table.notes])
             for table in tables]
    return '\n\n'.join([about, *parts]) + '\n'


def tex(text):
    """Text as LaTeX; numbers with a sign or a deviation in math mode, '-' (no number) as a dash."""
    if text == '-':
        return '--'
    if re.fullmatch(r'-?\d+\.\d+( \+- \d+\.\d+)?', text) and ('-' in text):
        return f'${text.replace("+-", chr(92) + "pm")}$'
    marked = r'$\Delta_m$\%'.join(''.join(TEX.get(letter, letter) for letter in part) for part in text.split(DELTA))
    return re.sub(r'(?<= )-(?=\d)', '$-$', marked)


def latex(table, about=''):
    """A Table as a LaTeX table with booktabs rules; the caption holds title, `about` and notes."""
    row = lambda cells: '    ' + ' & '.join(map(tex, cells)) + r' \\'
    body = [line for group in table.groups if group for line in (r'    \midrule', *map(row, group))]
    caption = ' '.join(tex(part.rstrip('.') + '.') for part in (table.title, about, *table.notes) if part)
    label = re.sub(r'[^A-Za-z0-9]+', '-', table.key)
    return '\n'.join([
        r'\begin{table}[t]', r'  \centering', rf'  \caption{{{caption}}}', rf'  \label{{tab:{label}}}', r'  \smallskip',
        rf'  \begin{{tabular}}{{l{"r" * (len(table.header) - 1)}}}', r'    \toprule', row(table.header), *body,
        r'    \bottomrule', r'  \end{tabular}', r'\end{table}'])


def latex_document(about, tables):
    """Tables as LaTeX to be included with \\input; `about` goes into the first caption."""
    parts = [latex(table, '' if index else about) for index, table in enumerate(tables)]
    return '\n\n'.join(['% \\usepackage{booktabs} in the preamble', *parts]) + '\n'


def describe(protocol):
    """One paragraph on what the results mean, from the protocol stored with them."""
    size = f'{protocol["width"]}x{protocol["height"]}'
    how = (f"at each label's own size (native): logits of the images resized to {size} are upsampled bilinearly"
           if protocol.get('resolution') == 'native' else f'at {size}, to which images and labels are resized')
    absent = 'counts 0' if protocol['published_metric'] else 'is left out'
    limit = protocol.get('limit_batches')
    return (f'mIoU in percent over the non-void classes, split {protocol["split"]}, {how}. Void pixels do not count, '
            f'void predicted elsewhere is a miss; a class absent from truth and prediction {absent}.'
            + (f' Trial: {limit * protocol["batch_size"]} images of each domain at most.' if limit else ''))


def origin(results):
    """A sentence: torch version, device and revision of results of eval.py, and the method and n of a single one."""
    methods = {str(step.get('method') or '') for result in results for step in result['steps']}
    stated = [' or '.join(dict.fromkeys(str(result.get('versions', {}).get(key) or 'not recorded')
                                        for result in results)) for key in ('torch', 'device', 'git')]
    method = f'Method {min(methods)}, torch' if all(methods) and len(methods) == 1 else 'torch'
    return '{} {} on {}, revision {}{}.'.format(method, *stated, ', n = 1' if len(results) == 1 else '')


def about(result):
    """One paragraph on a result of eval.py: what its figures mean, and where they come from."""
    return f'{describe(result["protocol"])} {origin([result])}'


def mean(values):
    """Mean of the values; None if there are none, or one of them is None or NaN."""
    values = list(values)
    unknown = any(value is None or math.isnan(value) for value in values)
    return None if unknown or not values else statistics.fmean(values)


def step_rows(steps, show=number):
    """(header, rows) of the step x domain mIoU matrix; steps: list of {domain: mIoU}; show: turns an mIoU into text."""
    names = list(steps[-1])
    return (['mIoU after step', *names],
            [[f'{index} ({list(step)[-1]})', *(show(step[name]) if name in step else '-' for name in names)]
             for index, step in enumerate(steps, 1)])


def in_space(entries, common):
    """{domain: scores} of a step's entries, in the common classes or the domains' own."""
    return {name: entry['common'] if common else entry for name, entry in entries.items()}


def transfer_note(summary):
    """Transfers and Delta_m% of the sequence in one sentence; '' if none is known."""
    known = [f'{label} {number(summary[key])}' for key, label in TRANSFERS if summary[key] is not None]
    return f'{known[0][0].upper()}{", ".join(known)[1:]}.' if known else ''


def meanings(summary):
    """Definitions of the known metrics of a sequence, in one sentence; '' if there are none."""
    known = [text for key, text in MEANINGS if summary[key] not in (None, {})]
    text = '; '.join(known)
    return f'{text[0].upper()}{text[1:]}.' if known else ''


def domain_table(entries, summary):
    """Table of one checkpoint: mIoU and pixel accuracy of each domain."""
    single, note = summary['single_task'], transfer_note(summary)
    header = ['domain', 'mIoU', 'pixel accuracy', *(['single-task mIoU'] if single else [])]
    columns = {name: [entry['miou'], entry['accuracy'], *([single.get(name)] if single else [])]
               for name, entry in entries.items()}
    rows = [[name, *map(number, values)] for name, values in columns.items()]
    means = [['mean', *(number(mean(values)) for values in zip(*columns.values()))]] if len(rows) > 1 else []
    return Table('Scores of each domain', 'domains', header, [rows, means], (note,) if note else ())


def step_table(steps, summary):
    """Table of a sequence: mIoU of each domain after each step, forgetting and single-task results."""
    steps = [{name: entry['miou'] for name, entry in step.items()} for step in steps]
    header, rows = step_rows(steps)
    rows = [[*row, number(mean(step.values()))] for row, step in zip(rows, steps)]
    forgetting, single = summary['forgetting'], summary['single_task']
    extra = [[label, *(number(values.get(name)) for name in header[1:]), number(mean(map(values.get, averaged)))]
             for label, values, averaged in (('forgetting', forgetting, forgetting),
                                             ('single-task', single, header[1:])) if values]
    header = [*header, 'mean']
    note = transfer_note(summary)
    return Table('mIoU of each domain after each step', 'steps', header, [rows, extra], (note,) if note else ())


def class_rows(title, key, columns):
    """Table of the IoU in percent of each class, the mIoU and the pixel accuracy; columns: {header: entry}."""
    percent = lambda value: number(None if value is None else 100 * value)
    classes = next(iter(columns.values()))['iou']
    rows = [[label, *(percent(entry['iou'][label]) for entry in columns.values())] for label in classes]
    means = [[label, *(number(entry[key]) for entry in columns.values())]
             for label, key in (('mIoU', 'miou'), ('pixel accuracy', 'accuracy'))]
    return Table(title, key, ['class', *columns], [rows, means])


def class_tables(steps):
    """For each domain, a Table of the IoU of each class after each step that knows it; steps: [{domain: entry}]."""
    tables = []
    for name in steps[-1]:
        columns = {f'step {index}' if len(steps) > 1 else 'IoU': step[name]
                   for index, step in enumerate(steps, 1) if name in step}
        tables.append(class_rows(f'IoU of the classes of {name}', f'classes-{name}', columns))
    return tables


def head_table(heads):
    """Table of the mIoU of every head on the images of every domain."""
    names = list(next(iter(heads.values())))
    rows = [[head, *(number(row[name]['miou']) for name in names)] for head, row in heads.items()]
    other = any(row[name]['iou'] is None for row in heads.values() for name in names)
    note = ('No figure where the head has other classes than the domain.',) if other else ()
    return Table('mIoU of every head on the images of every domain', 'heads', ['head', *names], [rows], note)


def epoch_table(steps):
    """Table of each step's best and last epoch, and which of them was evaluated; None if there are no records."""
    rows = [[f'{found.get("step", index)} ({found.get("learnt", list(step["domains"]))[-1]})', found['file'],
             *(text for which in ('best', 'last')
               for text in (str(found[which]['epoch']), number(found[which]['miou'])))]
            for index, step in enumerate(steps, 1) if (found := step.get('training'))]
    if not rows:
        return None
    note = ('mIoU of what the step learns, as validated while training. The best epoch is chosen on these very images, '
            'the last one is not.')
    return Table('The best epoch and the last', 'epochs',
                 ['step', 'evaluated', 'best epoch', 'mIoU', 'last epoch', 'mIoU'], [rows], (note,))


def sequence_tables(results, common):
    """Tables across domains, in the common classes or the domains' own."""
    steps = [in_space(step['domains'], common) for step in results['steps']]
    summary = results['common_summary' if common else 'summary']
    tables = [step_table(steps, summary) if len(steps) > 1 else domain_table(steps[0], summary)]
    if meanings(summary) and not common:
        tables[0].notes += (meanings(summary),)
    if 'cross_heads' in results:
        tables.append(head_table({head: in_space(row, common) for head, row in results['cross_heads'].items()}))
    return tables


def result_tables(results, per_class):
    """(Tables across domains, Tables of the IoU of every class if `per_class`) of eval.py's results."""
    steps, common = [step['domains'] for step in results['steps']], []
    tables, classes = sequence_tables(results, False), class_tables(steps) if per_class else []
    tables += filter(None, [epoch_table(results['steps'])])
    if 'common_summary' in results:
        common = sequence_tables(results, True)
        for table in common:
            table.title, table.key = f'{table.title} in the {COMMON}', f'{table.key}-common'
        if per_class:
            common.append(class_rows(f'IoU of the {COMMON}', 'classes-common', in_space(steps[-1], True)))
    auto = [auto_table(results)] if 'auto' in results else []
    return tables + common + auto, classes


def documents(results, per_class):
    """{'csv', 'markdown', 'latex': content of the file that eval.py writes} of its results."""
    text, (shown, classes) = about(results), result_tables(results, per_class)
    return {'csv': csv_text(results), 'markdown': markdown_document(text, shown + classes),
            'latex': latex_document(text, shown + classes)}


def auto_table(results):
    """The Table of --domain auto: mIoU with the own and with the chosen branch, and how often each was chosen."""
    auto, names = results['auto'], list(results['auto']['matrix'])
    branches = list(auto['matrix'][names[0]])
    rows = [[name, number(results['domains'][name]['miou']), number(auto['domains'][name]['miou']),
             *(str(auto['matrix'][name][other]) for other in branches), str(auto['unknown'][name])] for name in names]
    seconds = auto['seconds']
    note = (f'The own branch is chosen for {number(auto["accuracy"])} % of the images. Choosing branches, reading '
            f'included, took {seconds["identify"]:.1f} s, segmentation {seconds["segment"]:.1f} s. Unknown images are '
            'segmented by the branch that is chosen; classes count by their names.')
    if auto.get('never_unknown'):
        note += f' {auto["never_unknown"]}.'
    return Table('The branch chosen for each image (--domain auto), and images by chosen branch', 'auto',
                 ['domain', 'own mIoU', 'auto mIoU', *branches, 'unknown'], [rows], (note,))


def entry_rows(step, head, domain, entry):
    """CSV rows of one entry: the scores in its own classes and in the common ones."""
    rows = []
    for space, values in (('own', entry), ('common', entry.get('common', {}))):
        place = [step, head, domain, space]
        rows += [[*place, '', key, values[key]] for key in ('miou', 'accuracy', 'loss') if values.get(key) is not None]
        classes = (values.get('iou') or {}).items()
        rows += [[*place, label, 'iou', 100 * iou] for label, iou in classes if iou is not None]
    return rows


def csv_text(results):
    """All scores as CSV, one per line: step, head, domain, classes (own or common), class, metric, value.

    Values are in percent, except the loss.
    """
    rows, last = [], len(results['steps'])
    for step, content in enumerate(results['steps'], 1):
        for name, entry in content['domains'].items():
            rows += entry_rows(step, name, name, entry)
    for head, row in results.get('cross_heads', {}).items():
        for name, entry in row.items():
            rows += entry_rows(last, head, name, entry) if name != head else []
    for space, summary in (('own', results['summary']), ('common', results.get('common_summary', {}))):
        for key, value in summary.items():
            values = value.items() if isinstance(value, dict) else [('', value)]
            rows += [[last, '', name, space, '', key, figure] for name, figure in values if figure is not None]
    file = io.StringIO()
    csv.writer(file, lineterminator='\n').writerows(
        [['step', 'head', 'domain', 'classes', 'class', 'metric', 'value'], *rows])
    return file.getvalue()
