"""A visdom dashboard of a running training, redrawn from its records after every epoch.

    python train.py ... --port 8097 [--server http://localhost] [--env NAME]

Every window is redrawn from metrics.jsonl, so neither a reload nor a resumed run duplicates
points. The HTML report draws the same `curves`.
"""
import html
import json
import logging
import math
import re
import sys
import threading
from concurrent.futures import Future, TimeoutError
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

from mdil.datasets.loading import spaced
from mdil.evaluation import pictures
from mdil.models.methods import METHODS, method_name
from mdil.training import records
from mdil.utils.errors import brief
from mdil.utils.parser import show

TIMEOUT = 5         # seconds to wait for an answer of the server
PICTURES = 2        # validation images to show of each domain
PICTURE_WIDTH = 720
PANE = {'width': 480, 'height': 360}
TITLE_BAR = 24      # height in pixels of a pane's title bar, which covers part of a picture
GAP = (math.nan, math.nan)


@dataclass
class StepRecord:
    """What a run has written so far: `record` is the content of opts.json or {}, `lines` those of metrics.jsonl."""
    folder: Path
    record: dict
    lines: list

    @property
    def options(self):
        """Options of the run, {} if unknown."""
        return self.record.get('options', {})

    @property
    def learnt(self):
        """Names of the domains that the run learns: the last, or all with a joint method; [] if unknown."""
        domains, row = self.options.get('domains') or [], METHODS.get(method_name(self.options.get('method')))
        return row.trained(domains) if row else domains[-1:]

    @property
    def title(self):
        """What the run learns, as text."""
        return ' + '.join(self.learnt or [self.folder.name])


@dataclass
class Plot:
    """Curves over epochs: `lines` {name: [(epoch, value)]}, with a GAP between steps; log: logarithmic axis."""
    title: str
    unit: str
    lines: dict
    log: bool = False


def read_step(folder):
    """The StepRecord in `folder`."""
    try:
        record = json.loads((Path(folder) / 'opts.json').read_text())
    except (OSError, ValueError):
        record = {}
    return StepRecord(Path(folder), record if isinstance(record, dict) else {}, records.read_metrics(folder))


def history(folder):
    """The Steps up to the one in `folder`, oldest first, found through the folder of each run's --state."""
    steps = [read_step(folder)]
    while steps[0].options.get('state'):
        before = read_step(Path(steps[0].options['state']).parent)
        if not before.lines or before.options.get('domains') != steps[0].options['domains'][:-1]:
            break
        steps.insert(0, before)
    return steps


def starts(steps):
    """For each step, the number of epochs of the sequence that were finished when it began."""
    counts = [step.lines[-1]['epoch'] if step.lines else 0 for step in steps]
    return [sum(counts[:number]) for number in range(len(steps))]


def rates(line, options):
    """{name: learning rate} in an epoch: of what trained domains own, and of the shared weights if theirs differs."""
    base = options.get('lr')
    alone = len(options.get('domains', [])) < 2
    if alone or not base or options.get('shared_lr') in (None, 0, base):
        return {'learnt weights': line['lr']}
    return {'learnt weights': line['lr'], 'shared weights': line['lr'] / base * options['shared_lr']}


def plot(steps, title, unit, values, log=False):
    """The Plot of `values` over the epochs of all Steps.

    values(line of metrics.jsonl, options of its run) returns {name: value}.
    """
    lines = {}
    for start, step in zip(starts(steps), steps):
        for points in lines.values():
            points.append(GAP)
        for line in step.lines:
            for name, value in values(line, step.options).items():
                lines.setdefault(name, []).append((start + line['epoch'], value))
    return Plot(title, unit, lines, log)


def loss_terms(steps):
    """Names of the loss terms that the Steps recorded, in order."""
    names = dict.fromkeys(name for step in steps for line in step.lines for name in line['train'])
    return [name for name in names if name not in ('loss', 'images_per_second')]


def curves(steps):
    """The Plots of a sequence of Steps, with epochs counted across steps; Plots of only zeros are left out."""
    def validation(key):
        return lambda line, _: {name: entry[key] for name, entry in line['val'].items()}

    def term(name, label=None):
        return lambda line, _: {label or name: line['train'][name]} if name in line['train'] else {}

    plots = [
        plot(steps, 'mIoU on the validation images', '%', validation('miou')),
        plot(steps, 'training loss', '', lambda line, _: {'loss': line['train']['loss']}),
        *(plot(steps, f'loss term {name}, before its weight', '', term(name)) for name in loss_terms(steps)),
        plot(steps, 'validation loss (by class weights while learnt)', '', validation('loss')),
        plot(steps, 'learning rates', '', rates, log=True),
        plot(steps, 'speed', 'images/s', term('images_per_second', 'images/s'))]
    return [plot for plot in plots if any(value and value == value for points in plot.lines.values()
                                          for _, value in points)]


def environment_name(options):
    """The name of the visdom environment: --env, --model-name-suffix, or the last two folders of --savedir."""
    name = options.env or options.model_name_suffix or '-'.join(Path(options.savedir).absolute().parts[-2:])
    return re.sub(r'[^\w.-]+', '-', name)


def is_local(server):
    """Whether the address is on this machine."""
    return urlsplit(server if '//' in server else f'//{server}').hostname in ('localhost', '127.0.0.1', '::1')


def within(seconds, function):
    """Returns or raises what `function()` does; after `seconds`, raises TimeoutError and leaves its thread running."""
    future = Future()

    def run():
        try:
            future.set_result(function())
        except Exception as error:
            future.set_exception(error)
    threading.Thread(target=run, daemon=True).start()
    try:
        return future.result(timeout=seconds)
    except TimeoutError:
        raise TimeoutError(f'no whole answer within {seconds} seconds') from None


def connect(options):
    """A visdom client that raises an exception if the server does not answer in time."""
    import visdom
    logging.getLogger('visdom').setLevel(logging.ERROR)

    class Client(visdom.Visdom):
        def _handle_post(self, url, data=None):
            if is_local(options.server):
                self.session.trust_env = False      # no proxy for this machine
            answer = within(TIMEOUT, partial(self.session.post, url, data=data or {}, timeout=TIMEOUT))
            answer.raise_for_status()
            return answer.text

    return Client(server=options.server, port=options.port, env=environment_name(options), raise_exceptions=True,
                  use_incoming_socket=False)


def options_page(step):
    """HTML of the text pane: the options and versions of a run."""
    rows = {**step.options, **step.record.get('versions', {})}
    cells = ''.join(f'<tr><td><b>{html.escape(name)}</b>&nbsp;</td><td>{html.escape(show(value))}</td></tr>'
                    for name, value in rows.items())
    return f'<table>{cells}</table>'


def shrunk(pixels, width):
    """The image (H, W, 3) uint8, scaled down if it is wider than `width`."""
    height = round(pixels.shape[0] * width / pixels.shape[1])
    return pixels if pixels.shape[1] <= width else np.asarray(Image.fromarray(pixels).resize((width, height)))


def validation_pictures(run, data):
    """Input, truth and prediction of PICTURES validation images of a domain, always the same ones: (H, W, 3) uint8."""
    samples, rows = data.val.dataset, []
    for index in spaced(range(len(samples)), PICTURES):
        image, truth = samples.load(index)
        predicted = pictures.predict(run.student, data.index, image, truth, run.place, run.options.precision)
        rows.append(pictures.comparison(data.domain, image, truth, predicted, samples.pairs[index].image.stem))
    return shrunk(pictures.stacked(rows), PICTURE_WIDTH)


class Dashboard:
    """The visdom windows of a run with `options`; does nothing without --port.

    visdom is imported only if it is used. If the server is down, one warning is printed; every
    epoch tries again, and draws everything as soon as the server answers.
    """

    def __init__(self, options):
        self.options, self.vis, self.warned = options, None, False
        self.draw()

    def show(self, line, run=None):
        """Draws the records, whose last is `line` of metrics.jsonl; after a validation, pictures of the Run too."""
        self.draw(run if line['val'] else None)

    def draw(self, run=None):
        if self.options.port is None:
            return
        try:
            self.vis = self.vis or connect(self.options)
            self.draw_records()
            if run is not None:
                self.draw_pictures(run)
            self.vis.save([self.vis.env])
        except Exception as error:      # no drawing error may stop the training
            self.vis = None
            if not self.warned:
                reason = brief(f'{type(error).__name__} {error}')
                print(f'live curves are off, training continues: visdom at {self.options.server}:{self.options.port}: '
                      f'{reason}', file=sys.stderr)
            self.warned = True

    def draw_records(self):
        """Draws the text pane and the curves."""
        steps = history(self.options.savedir)
        self.vis.text(options_page(steps[-1]), win='options', opts={'title': f'options: {steps[-1].folder}', **PANE})
        for plot in curves(steps):
            points = np.full((max(map(len, plot.lines.values())), len(plot.lines), 2), math.nan)
            for number, line in enumerate(plot.lines.values()):
                points[:len(line), number] = line
            opts = {'title': plot.title, 'xlabel': 'epoch', 'ylabel': plot.unit, 'legend': list(plot.lines),
                    'markers': True, 'markersize': 4, 'ytype': 'log' if plot.log else 'linear', 'margintop': 70,
                    'layoutopts': {'plotly': step_marks(steps)}, **PANE}
            self.vis.line(X=points[..., 0], Y=points[..., 1], win=plot.title, opts=opts)

    def draw_pictures(self, run):
        """Draws a few validation images of every domain, with truth and prediction."""
        for data in run.data:
            if data.val is not None:
                pixels = validation_pictures(run, data)
                size = {'width': pixels.shape[1] + 2, 'height': pixels.shape[0] + TITLE_BAR}
                self.vis.image(pixels.transpose(2, 0, 1), win=f'pictures of {data.domain.name}',
                               opts={'title': data.domain.name, 'jpgquality': 90, **size})


def step_marks(steps):
    """plotly layout: a vertical line where each step starts, labelled with its domain; the pane shows the title."""
    places = [start + 0.5 for start in starts(steps)]
    line = {'color': '#888', 'width': 1, 'dash': 'dot'}
    shapes = [{'type': 'line', 'x0': x, 'x1': x, 'y0': 0, 'y1': 1, 'yref': 'paper', 'line': line} for x in places]
    notes = [{'x': x, 'y': 1, 'yref': 'paper', 'yanchor': 'bottom', 'xanchor': 'left', 'textangle': -30,
              'showarrow': False, 'font': {'size': 10}, 'text': html.escape(f'step {number}: {step.title}')}
             for number, (x, step) in enumerate(zip(places, steps), 1)]
    return {'title': '', 'shapes': shapes, 'annotations': notes}
