"""Writes what a sequence of steps has given so far as one HTML file that needs no network.

    python -m mdil report runs/mdil --data-root DATA

The folder is one that the trainer scripts fill: a run in each folder of it, results.json of
eval.py next to them (or a single run). Tables, learning curves, predictions after each step,
options, versions and revision; what is not there yet is left out and said.
"""
import argparse
import base64
import html
import io
import json
import re
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from mdil.datasets import SegmentationDataset, get_domain
from mdil.evaluation import pictures, tables
from mdil.evaluation.dashboard import curves, read_step, shrunk, starts
from mdil.models import METHODS, method_name
from mdil.models.checkpoint import load_network, read_checkpoint
from mdil.training import records
from mdil.training.run import BEST
from mdil.utils.errors import UserError, run_main
from mdil.utils.files import check_writable, write_text
from mdil.utils.parallel import Place, pick_device
from mdil.utils.parser import Parser, data_paths, show

PICTURE_WIDTH = 512
HEATED = ('steps', 'heads', 'classes')      # keys of tables whose figures are coloured
LINES = ('#1f6fb4', '#d95f02', '#1b8a5a', '#8e44ad', '#b8860b', '#c0392b', '#5d6d7e', '#16a085')
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c2329; max-width: 1180px; margin: 2em auto; padding: 0 1em; }
h1 { margin-bottom: 0 } h2 { margin-top: 2em; border-bottom: 1px solid #ccd3d9; } p.about { color: #55606a; }
table { border-collapse: collapse; margin: .8em 0; font-variant-numeric: tabular-nums; }
th, td { padding: .18em .7em; text-align: right; border-bottom: 1px solid #e6eaed; } th { background: #f3f5f7; }
th:first-child, td:first-child { text-align: left; } tbody + tbody { border-top: 2px solid #9aa5ae; }
p.title { font-weight: 600; margin: 1.2em 0 -.5em; }
.row { display: flex; flex-wrap: wrap; gap: .3em 2em; align-items: flex-start; }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(420px, 1fr)); gap: 1em; }
.curves img, .pictures img { width: 100%; display: block; }
.pictures { display: grid; gap: .3em; margin: .4em 0; overflow-x: auto; } figure { margin: 0; }
figcaption { font-size: 13px; color: #55606a; } td.other { background: #fff3cd; }
.key { white-space: nowrap; margin-right: .9em; }
.key i { display: inline-block; width: .8em; height: .8em; border: 1px solid #888; margin-right: .3em; }
.record td, .record th { text-align: left; overflow-wrap: anywhere; min-width: 7em; vertical-align: top; }
"""


def parse(argv=None):
    parser = Parser(prog='python -m mdil report', description='One HTML file about a sequence of steps, finished or running.')
    parser.add_argument('folder', metavar='FOLDER', help='folder of a sequence, or of one run')
    parser.add_argument('--out', metavar='FILE', help='the HTML file (default: report.html in FOLDER)')
    parser.add_argument('--device', default='auto', help='device that draws the predictions')
    group = parser.add_argument_group('data')
    group.add_argument('--data-root', '--datadir', default=argparse.SUPPRESS, metavar='DIR',
                       help="folder that holds the data sets (default: the run's own)")
    group.add_argument('--data', action='append', default=[], metavar='NAME=PATH',
                       help='place of one domain, or of your own domain; repeatable')
    return parser.parse_args(argv)


def find_steps(folder):
    """Steps in the folder of a sequence, in the order learnt; UserError if there is none."""
    runs = lambda place: any((place / name).exists() for name in ('opts.json', 'metrics.jsonl'))
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f'{folder} is not a folder; name one that the trainer scripts fill, such as runs/mdil')
    found = [folder] if runs(folder) else sorted(place for place in folder.iterdir() if place.is_dir() and runs(place))
    if not found:
        raise UserError(f'{folder} holds no run: neither it nor a folder in it has an opts.json or metrics.jsonl')
    return sorted(map(read_step, found), key=lambda step: len(step.options.get('domains', [])))


def read_results(folder):
    """What results.json in a sequence's folder says, None if there is none yet.

    (Number of steps evaluated, paragraph about the protocol, Tables of all domains, of the classes.)
    """
    path = Path(folder) / 'results.json'
    if not path.exists():
        return None
    try:
        results = json.loads(path.read_text())
        shown, classes = tables.result_tables(results, per_class=True)
        return len(results['steps']), tables.describe(results['protocol']), shown, classes
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f'{path} is not a result of eval.py --json ({type(error).__name__}: {error}); '
                        'make it again') from None


def element(name, content, **attributes):
    """An HTML element; `content` is HTML already."""
    given = ''.join(f' {key.rstrip("_")}="{html.escape(str(value))}"' for key, value in attributes.items())
    return f'<{name}{given}>{content}</{name}>'


def cell(text, heated):
    """A table's cell; figures from 0 to 100 on green, the more the higher."""
    value = float(text) if heated and re.fullmatch(r'\d+\.\d+', text) else None
    style = {'style': f'background: rgba(40, 150, 90, {min(value, 100) / 160:.2f})'} if value is not None else {}
    return element('td', html.escape(text), **style)


def html_table(table):
    """A tables.Table as HTML."""
    heated = table.key.split('-')[0] in HEATED
    head = element('thead', element('tr', ''.join(element('th', html.escape(text)) for text in table.header)))
    groups = [element('tbody', ''.join(element('tr', ''.join(cell(text, heated and number == 0) for text in row))
                                       for row in group)) for number, group in enumerate(table.groups) if group]
    notes = ''.join(element('p', html.escape(note), class_='about') for note in table.notes)
    title = element('p', html.escape(table.title), class_='title')
    return element('div', title + element('table', head + ''.join(groups)) + notes)


def training_table(steps):
    """tables.Table of each step's best and last validation while it trained; None if nothing was validated yet."""
    found = {f'{number} ({step.title})': records.best_and_last(step.lines, step.learnt)
             for number, step in enumerate(steps, 1)}
    names = list(dict.fromkeys(name for lines in found.values() for line in lines if line for name in line['val']))
    rows = [[f'{title}, {which}', str(line['epoch']),
             *(tables.number(line['val'].get(name, {}).get('miou')) for name in names)]
            for title, lines in found.items() for which, line in zip(('best', 'last'), lines) if line]
    if not rows:
        return None
    note = ('From the validations at the end of the epochs: the one in which the learnt domain was best, as '
            'model_best.pth.tar, which is chosen on these very images, and the last one.')
    return tables.Table('mIoU while training', 'steps', ['step', 'epoch', *names], [rows], (note,))


def result_parts(steps, results):
    """HTML of the tables: what eval.py found, or what was validated while training."""
    training = training_table(steps)
    while_training = html_table(training) if training else element('p', 'Nothing is validated yet.')
    if results is None:
        return element('p', 'Not evaluated yet (no results.json): these figures come from the training runs.',
                       class_='about') + while_training
    count, about, shown, classes = results
    parts = [element('p', html.escape(about), class_='about'), *map(html_table, shown)]
    if count < len(steps):
        parts.append(element('p', f'{count} of {len(steps)} steps are evaluated so far.', class_='about'))
    parts.append(while_training)
    if classes:
        parts.append(element('h2', 'Classes') + element('div', ''.join(map(html_table, classes)), class_='row'))
    return ''.join(parts)


def curve_picture(plot, steps):
    """SVG (bytes) of a dashboard.Plot with every step's start marked."""
    figure = pictures.new_figure(figsize=(5.6, 3.3))
    axis = figure.subplots()
    for number, (name, points) in enumerate(plot.lines.items()):
        axis.plot(*zip(*points), label=name, color=LINES[number % len(LINES)], linestyle=('-', '--')[number % 2],
                  linewidth=1.4, marker='.', markersize=4)
    for start, step in zip(starts(steps), steps):
        axis.axvline(start + 0.5, color='#999', linewidth=0.8, linestyle=':')
        axis.text(start + 0.5, 1.01, step.title, transform=axis.get_xaxis_transform(), fontsize=7, color='#555',
                  rotation=25, rotation_mode='anchor', ha='left', va='bottom', parse_math=False)
    axis.set_xlabel('epoch of the sequence' if len(steps) > 1 else 'epoch')
    axis.set_ylabel(plot.unit)
    axis.xaxis.get_major_locator().set_params(integer=True)
    if plot.log:
        axis.set_yscale('log')
    axis.grid(color='#eee')
    axis.spines[['top', 'right']].set_visible(False)
    for text in axis.legend(fontsize=8, frameon=False).get_texts():
        text.set_parse_math(False)
    file = io.BytesIO()
    figure.savefig(file, format='svg', metadata={'Date': None, 'Creator': None})
    return file.getvalue()


def embedded(kind, content, words):
    """HTML of a picture (bytes of the MIME type `kind`) described by `words`."""
    data = base64.b64encode(content).decode()
    return f'<img alt="{html.escape(words)}" src="data:{kind};base64,{data}">'


def curve_parts(steps):
    """HTML of the learning curves."""
    figures = [element('figure', element('figcaption', html.escape(plot.title))
                       + embedded('image/svg+xml', curve_picture(plot, steps), plot.title)) for plot in curves(steps)]
    return element('div', ''.join(figures), class_='curves') if figures else element('p', 'No epoch is finished yet.')


def image_figure(pixels, caption):
    """HTML of a picture (H, W, 3) uint8 with its caption."""
    file = io.BytesIO()
    Image.fromarray(shrunk(pictures.enlarged(pixels), PICTURE_WIDTH)).save(file, 'JPEG', quality=90, subsampling=0)
    return element('figure', embedded('image/jpeg', file.getvalue(), caption)
                   + element('figcaption', html.escape(caption)))


@dataclass
class Learnt:
    """The best network of a step, on the device; names of its domains, options it was trained with."""
    title: str
    model: object
    names: list
    options: dict


def networks(steps, place):
    """A Learnt for each step that has a best checkpoint of ours."""
    found = []
    for number, step in enumerate(steps, 1):
        if (step.folder / BEST).exists():
            checkpoint = read_checkpoint(step.folder / BEST)
            if checkpoint.domains and checkpoint.content.get('options'):
                found.append(Learnt(f'after step {number} ({step.title})', load_network(checkpoint).to(place.device),
                                    checkpoint.domains, checkpoint.content['options']))
    return found


def dataset_of(name, trained, options):
    """The validation images of a domain as a run with options `trained` saw them; UserError if they are not at hand."""
    domain = get_domain(name, data_paths(options.data or trained['data']))
    root = getattr(options, 'data_root', trained['data_root'])
    return SegmentationDataset(domain, root, 'val', (trained['height'], trained['width']))


def domain_pictures(name, learnt, options, place):
    """HTML of a domain's image with the most classes: input, truth, prediction of each Learnt that knows it."""
    learnt = [step for step in learnt if name in step.names]
    dataset = dataset_of(name, learnt[0].options, options)
    domain, index = dataset.domain, pictures.richest(dataset)
    image, truth = dataset.load(index)
    pixels = pictures.hwc(image, truth.shape)
    cells = [image_figure(pixels, dataset.pairs[index].image.name),
             image_figure(pictures.overlay(pixels, truth, domain.palette, 0.8), 'truth (void: no colour)')]
    shown = set(truth.unique().tolist())
    for step in learnt:
        predicted = pictures.predict(step.model, step.names.index(name), image, truth, place)
        shown |= set(predicted.unique().tolist())
        score = tables.number(pictures.image_miou(truth, predicted, domain))
        cells.append(image_figure(pictures.overlay(pixels, predicted, domain.palette, 0.8),
                                  f'{step.title}, mIoU of this image {score}'))
    keys = ' '.join(element('span', element('i', '', style=f'background: rgb{domain.palette[kind]}')
                            + html.escape(domain.classes[kind]), class_='key')
                    for kind in sorted(shown) if kind != domain.void)
    grid = element('div', ''.join(cells), class_='pictures',
                   style=f'grid-template-columns: repeat({min(len(cells), 3)}, minmax(220px, 1fr))')
    return grid + element('p', keys, class_='about')


def picture_parts(steps, options, place):
    """HTML of the predictions; it names domains whose data is missing."""
    learnt = networks(steps, place)
    if not learnt:
        return element('p', 'No step has a best checkpoint yet.')
    parts, names = [], list(dict.fromkeys(name for step in learnt for name in step.names))
    for name in tqdm(names, desc='predictions', leave=False, disable=None):
        try:
            content = domain_pictures(name, learnt, options, place)
        except UserError as error:
            content = element('p', html.escape(f'No pictures: {error}'))
        parts.append(element('h3', html.escape(name)) + content)
    return ''.join(parts)


def record_table(steps, key):
    """HTML of opts.json's part `key`, a column for each step; what differs between steps is marked."""
    parts = [step.record.get(key, {}) for step in steps]
    names = list(dict.fromkeys(name for part in parts for name in part))
    rows = []
    for name in names:
        values = [show(part.get(name)) if name in part else '' for part in parts]
        mark = {'class_': 'other'} if len(set(values)) > 1 else {}
        rows.append(element('tr', element('td', html.escape(name)) + ''.join(
            element('td', html.escape(value), **mark) for value in values)))
    titles = ['', *(f'step {number} ({step.title})' for number, step in enumerate(steps, 1))]
    head = element('tr', ''.join(element('th', html.escape(title)) for title in titles))
    table = element('table', head + ''.join(rows))
    return element('div', table, class_='record') if rows else element('p', 'Not recorded.')


def progress(steps):
    """One sentence for each step: how far it is."""
    lines = []
    for number, step in enumerate(steps, 1):
        done, total = (step.lines[-1]['epoch'] if step.lines else 0), step.options.get('num_epochs', '?')
        lines.append(f'step {number} ({step.title}): {done} of {total} epochs')
    text = '; '.join(lines)
    return f'{text[0].upper()}{text[1:]}.'


def page(folder, options, place):
    """The HTML document about the sequence in `folder`."""
    steps, results = find_steps(folder), read_results(folder)
    folder, method = Path(folder).absolute(), method_name(steps[-1].options.get('method'))
    about = f'{method}: {METHODS[method].about}. ' if method in METHODS else ''
    revisions = dict.fromkeys(str(step.record.get('versions', {}).get('git') or 'not recorded') for step in steps)
    body = [element('h1', html.escape(f'{folder.parent.name} / {folder.name}')),
            element('p', html.escape(f'{about}{progress(steps)} Revision of the code: {", ".join(revisions)}.'),
                    class_='about'),
            element('h2', 'Results'), result_parts(steps, results),
            element('h2', 'Learning curves'), curve_parts(steps),
            element('h2', 'Predictions'), picture_parts(steps, options, place),
            element('h2', 'Versions'), record_table(steps, 'versions'),
            element('h2', 'Options'), record_table(steps, 'options')]
    head = f'<meta charset="utf-8"><title>{html.escape(folder.name)}</title><style>{STYLE}</style>'
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body>{"".join(body)}</body></html>\n'


def main(argv=None):
    options = parse(argv)
    out = Path(options.out or Path(options.folder) / 'report.html')
    text = page(options.folder, options, Place(pick_device(options.device)))
    check_writable('--out', out)
    write_text(out, text)
    print(f'written: {out} ({len(text) / 1e6:.1f} MB, opens without a network)')


if __name__ == '__main__':
    run_main(main)
