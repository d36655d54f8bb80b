"""Writes a report on a sequence of steps, finished or running, as one self-contained HTML file.

    python -m mdil report runs/mdil --data-root DATA

The folder is one that the trainer scripts fill, with one folder for each run and the results.json
of eval.py, or the folder of a single run. The report holds tables, learning curves, predictions
after each step, options, versions and revision. It leaves out what is missing, and says so. It is
about one sequence, whose steps go on from one another; it names other runs in the folder. If there
are several such sequences, name the folders of the runs to show.
"""
import argparse
import base64
import io
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader
from PIL import Image
from tqdm import tqdm

from mdil.datasets import SegmentationDataset, get_domain
from mdil.evaluation import pictures, tables
from mdil.evaluation.epochs import FILES, started_from
from mdil.evaluation.history import curves, read_step, starts
from mdil.evaluation.lineage import sequence, step_before
from mdil.models import METHODS, method_name
from mdil.models.checkpoint import load_network, read_checkpoint
from mdil.training import records
from mdil.training.run import BEST, LATEST
from mdil.utils.errors import UserError, run_main
from mdil.utils.files import check_writable, write_text
from mdil.utils.parallel import Place, pick_device
from mdil.utils.parser import Parser, data_paths, paths_option, show

PICTURE_WIDTH = 512
LINES = ('#1f6fb4', '#d95f02', '#1b8a5a', '#8e44ad', '#b8860b', '#c0392b', '#5d6d7e', '#16a085')
TEMPLATES = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True)


@dataclass
class Results:
    """The content of results.json: evaluated domains, a paragraph about the protocol, and Tables.

    tables: across domains; classes: IoU of the classes of each domain; files, folders: names of the evaluated
    checkpoints and of their folders.
    """
    domains: list
    files: set
    folders: set
    about: str
    tables: list
    classes: list


def parse(argv=None):
    parser = Parser(prog='python -m mdil report',
                    description='One HTML file about a sequence of steps, finished or running.')
    parser.add_argument('folders', metavar='FOLDER', nargs='+',
                        help='folder of a sequence, or of one run; or the folders of the runs to show, with --out')
    parser.add_argument('--out', metavar='FILE', help='the HTML file (default: report.html in FOLDER)')
    parser.add_argument('--device', default='auto', help='device that draws the predictions')
    group = parser.add_argument_group('data')
    group.add_argument('--data-root', '--datadir', default=argparse.SUPPRESS, metavar='DIR',
                       help="folder that holds the data sets (default: the run's own)")
    paths_option(group)
    return parser.parse_args(argv)


def is_run(folder):
    """Whether a run has written its records to `folder`."""
    return any(os.path.exists(folder / name) for name in ('opts.json', 'metrics.jsonl'))


def folders_in(folder):
    """The paths in `folder`, sorted by name, numbers in it by value; UserError if it cannot be listed."""
    try:
        return sorted(folder.iterdir(), key=lambda path: re.sub(r'\d+', lambda digits: digits[0].zfill(9), path.name))
    except OSError as error:
        raise UserError(f'{folder} cannot be read: {error.strerror}; make it readable, or name the runs in '
                        'it') from None


def find_steps(folder):
    """The StepRecords of the run in `folder`, or of those in its folders; UserError if there are none."""
    folder = Path(folder)
    if not os.path.isdir(folder):
        raise UserError(f'{folder} is not a folder; name one that the trainer scripts fill, such as runs/mdil')
    found = [folder] if is_run(folder) else list(filter(is_run, folders_in(folder)))
    if not found:
        raise UserError(f'{folder} holds no run: neither it nor a folder in it has an opts.json or metrics.jsonl')
    return list(map(read_step, found))


def read_results(folder):
    """The Results of results.json in a sequence's folder, or None if there is none yet; UserError if it is invalid."""
    path = Path(folder) / 'results.json'
    if not os.path.exists(path):
        return None
    try:
        results = json.loads(path.read_text())
        shown, classes = tables.result_tables(results, per_class=True)
        states = [Path(step['state']) for step in results['steps']]
        return Results(list(results['domains']), {state.name for state in states},
                       {state.parent.name for state in states}, tables.about(results), shown, classes)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f'{path} is not a result of eval.py --json ({type(error).__name__}: {error}); '
                        'make it again') from None


def heat(text):
    """CSS of a table cell: the higher a number from 0 to 100, the stronger the green; '' for other text."""
    return (f'background: rgba(40, 150, 90, {min(float(text), 100) / 160:.2f})' if re.fullmatch(r'\d+\.\d+', text)
            else '')


def training_table(steps):
    """tables.Table of each step's best and last validation during training; None if nothing was validated yet."""
    found = {f'{number} ({step.title})': records.best_and_last(step.lines, step.learnt)
             for number, step in enumerate(steps, 1)}
    names = list(dict.fromkeys(name for lines in found.values() for line in lines if line for name in line['val']))
    rows = [[f'{title}, {which}', str(line['epoch']),
             *(tables.number(line['val'].get(name, {}).get('miou')) for name in names)]
            for title, lines in found.items() for which, line in zip(('best', 'last'), lines) if line]
    if not rows:
        return None
    note = ('From the validations while training. Best: the epoch saved as model_best.pth.tar, chosen on these very '
            'images. Last: the last validated epoch.')
    return tables.Table('mIoU while training', 'steps', ['step', 'epoch', *names], [rows], (note,))


def curve_picture(plot, steps):
    """data: URL of a Plot as SVG, with the start of every step marked."""
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
    axis.yaxis.get_offset_text().set(x=-0.02, horizontalalignment='right')      # beside the title of the first step
    if plot.log:
        axis.set_yscale('log')
    axis.grid(color='#eee')
    axis.spines[['top', 'right']].set_visible(False)
    for text in axis.legend(fontsize=8, frameon=False).get_texts():
        text.set_parse_math(False)
    file = io.BytesIO()
    figure.savefig(file, format='svg', metadata={'Date': None, 'Creator': None})
    return address(file, 'image/svg+xml')


def address(file, kind):
    """The data: URL of a file in memory, with the MIME type `kind`."""
    return f'data:{kind};base64,{base64.b64encode(file.getvalue()).decode()}'


def jpeg(pixels):
    """data: URL of a picture (H, W, 3) uint8 as JPEG."""
    file = io.BytesIO()
    shown = pictures.shrunk(pictures.enlarged(pixels), PICTURE_WIDTH)
    Image.fromarray(shown).save(file, 'JPEG', quality=90, subsampling=0)
    return address(file, 'image/jpeg')


@dataclass
class StepNetwork:
    """The network of a step, on the device, the names of its domains, and the options it was trained with."""
    title: str
    model: object
    names: list
    options: dict


def shown_file(steps, results):
    """The name of the checkpoints to show: LATEST if it was evaluated or continued from and BEST was not, else BEST."""
    files = results.files if results else set(map(started_from, steps[1:]))
    return LATEST if LATEST in files and BEST not in files else BEST


def networks(steps, file, place):
    """A StepNetwork for each step whose checkpoint `file` was written by a run.

    Joined files are left out, because they do not record where the data is.
    """
    found = []
    for number, step in enumerate(steps, 1):
        if (step.folder / file).exists():
            checkpoint = read_checkpoint(step.folder / file)
            if checkpoint.domains and {'data', 'data_root'} <= checkpoint.content.get('options', {}).keys():
                found.append(StepNetwork(f'after step {number} ({step.title}), {FILES[file]} epoch',
                                         load_network(checkpoint).to(place.device),
                                         checkpoint.domains, checkpoint.content['options']))
    return found


def dataset_of(name, trained, options):
    """The validation images of a domain as a run with options `trained` saw them; UserError if they are missing."""
    domain = get_domain(name, {**data_paths(trained['data']), **data_paths(options.data)})
    root = getattr(options, 'data_root', trained['data_root'])
    return SegmentationDataset(domain, root, 'val', (trained['height'], trained['width']))


def domain_pictures(name, learnt, options, place):
    """Pictures of a domain's image with the most classes: input, truth, prediction of each StepNetwork with the domain.

    Returns {'pictures': [(caption, data: URL)], 'classes': [(name, color)] of the classes in them}.
    """
    learnt = [step for step in learnt if name in step.names]
    dataset = dataset_of(name, learnt[0].options, options)
    domain, index = dataset.domain, pictures.richest(dataset)
    image, truth = dataset.load(index)
    pixels = pictures.hwc(image, truth.shape)
    cells = [(dataset.pairs[index].image.name, jpeg(pixels)),
             ('truth (void: no colour)', jpeg(pictures.overlay(pixels, truth, domain.palette, 0.8)))]
    shown = set(truth.unique().tolist())
    for step in learnt:
        predicted = pictures.predict(step.model, step.names.index(name), image, truth, place)
        shown |= set(predicted.unique().tolist())
        score = tables.number(pictures.image_miou(truth, predicted, domain))
        cells.append((f'{step.title}, mIoU of this image {score}',
                      jpeg(pictures.overlay(pixels, predicted, domain.palette, 0.8))))
    classes = [(domain.classes[kind], domain.palette[kind]) for kind in sorted(shown) if kind != domain.void]
    return {'pictures': cells, 'classes': classes}


def predictions(steps, file, options, place):
    """[(domain, its `domain_pictures`, or the reason why there are none)], of the checkpoints `file` of the steps."""
    learnt, found = networks(steps, file, place), []
    for name in tqdm(dict.fromkeys(name for step in learnt for name in step.names), desc='predictions', leave=False,
                     disable=None):
        try:
            found.append((name, domain_pictures(name, learnt, options, place)))
        except UserError as error:
            found.append((name, str(error)))
    return found


def recorded(steps, key):
    """[(name, [its value in each step, or ''])] of the part `key` of opts.json."""
    parts = [step.record.get(key, {}) for step in steps]
    return [(name, [show(part.get(name)) if name in part else '' for part in parts])
            for name in dict.fromkeys(name for part in parts for name in part)]


def progress(steps):
    """One sentence on how far each step is."""
    lines = []
    for number, step in enumerate(steps, 1):
        done, total = (step.lines[-1]['epoch'] if step.lines else 0), step.options.get('num_epochs', '?')
        lines.append(f'step {number} ({step.title}): {done} of {total} epochs')
    text = '; '.join(lines)
    return f'{text[0].upper()}{text[1:]}.'


def methods(steps):
    """What the methods of the steps are, a sentence each."""
    used = {}
    for number, step in enumerate(steps, 1):
        used.setdefault(method_name(step.options.get('method')), []).append(str(number))
    places = {name: f' (step {", ".join(numbers)})' if len(used) > 1 else '' for name, numbers in used.items()}
    return ''.join(f'{name}{places[name]}: {METHODS[name].about}. ' for name in used if name in METHODS)


def other_starts(steps):
    """Sentences on the steps that did not start from the step before them, as branches that are joined later."""
    found = [(number, step, step_before(step, steps)) for number, step in enumerate(steps, 1)]
    return ''.join(f' Step {number} ({step.title}) started from step {steps.index(before) + 1}.'
                   for number, step, before in found if before is not None and before is not steps[number - 2])


def chosen(folders, results):
    """(steps, notes) of the sequence in `folders`: its StepRecords, and sentences on runs that are left out.

    results: the Results of some of the runs, or None.
    """
    runs = {os.path.realpath(run.folder): run for folder in folders for run in find_steps(folder)}
    steps = sequence(list(runs.values()), results.folders if results else ())
    others = [str(run.folder) for run in runs.values() if run not in steps]
    return steps, [f'Left out, because not part of this sequence: {", ".join(others)}.'] if others else []


def home(folders):
    """The folder that holds the results of the runs in `folders`."""
    return Path(folders[0] if len(folders) == 1 else os.path.commonpath(map(os.path.abspath, folders)))


def results_of(results, folder, steps):
    """(the Results in `folder` or None, notes): None, and a sentence, if they are of a run there that is not shown."""
    shown = {step.folder.name for step in steps}
    strange = sorted(name for name in results.folders - shown - {''} if is_run(folder / name)) if results else ()
    if strange:
        return None, [f'Left out, because of other runs ({", ".join(strange)}): {folder / "results.json"}.']
    return results, []


def page(folders, options, place):
    """(HTML document about the sequence in `folders`, notes: sentences on what it leaves out)."""
    folder = home(folders)
    results = read_results(folder)
    steps, notes = chosen(folders, results)
    results, more = results_of(results, folder, steps)
    notes += more
    learnt = dict.fromkeys(name for step in steps for name in step.learnt)
    return TEMPLATES.get_template('report.html').render(
        folder=folder.absolute(), about=methods(steps), progress=progress(steps) + other_starts(steps), notes=notes,
        steps=steps, results=results, training=training_table(steps),
        missing=[name for name in learnt if results and name not in results.domains],
        revisions=dict.fromkeys(str(step.record.get('versions', {}).get('git') or 'not recorded') for step in steps),
        curves=[(plot.title, curve_picture(plot, steps)) for plot in curves(steps)],
        predictions=predictions(steps, shown_file(steps, results), options, place), recorded=recorded, heat=heat), notes


def main(argv=None):
    options = parse(argv)
    if len(options.folders) > 1 and not options.out:
        raise UserError('several folders are named; name the HTML file, too, with --out FILE')
    out = Path(options.out or Path(options.folders[0]) / 'report.html')
    if options.out:     # before the pictures, which take a while
        check_writable('--out', out)
        if out.suffix.lower() not in ('.html', '.htm'):
            raise UserError(f'--out {out}: the report is an HTML file; let the name end in .html')
    text, notes = page(options.folders, options, Place(pick_device(options.device)))
    write_text(out, text)
    print(*notes, f'written: {out} ({len(text) / 1e6:.1f} MB, opens without a network)', sep='\n')


if __name__ == '__main__':
    run_main(main)
