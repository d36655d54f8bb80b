"""A visdom dashboard of a running training, redrawn from its records after every epoch.

    python train.py ... --port 8097 [--server http://localhost] [--env NAME]

Every window is redrawn from metrics.jsonl, so neither a reload nor a resumed run duplicates
points. The HTML report draws the same `curves`.
"""
import html
import logging
import math
import re
import sys
import threading
from concurrent.futures import Future, TimeoutError
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np

from mdil.datasets.loading import spaced
from mdil.evaluation import pictures
from mdil.evaluation.history import curves, history, starts
from mdil.utils.errors import brief
from mdil.utils.parser import show

TIMEOUT = 5         # seconds to wait for an answer of the server
PICTURES = 2        # validation images to show of each domain
PICTURE_WIDTH = 720
PANE = {'width': 480, 'height': 360}
TITLE_BAR = 24      # height in pixels of a pane's title bar, which covers part of a picture


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


def validation_pictures(run, data):
    """Input, truth and prediction of PICTURES validation images of a domain, always the same ones: (H, W, 3) uint8."""
    samples, rows = data.val.dataset, []
    for index in spaced(range(len(samples)), PICTURES):
        image, truth = samples.load(index)
        predicted = pictures.predict(run.student, data.index, image, truth, run.place, run.options.precision)
        rows.append(pictures.comparison(data.domain, image, truth, predicted, samples.pairs[index].image.stem))
    return pictures.shrunk(pictures.stacked(rows), PICTURE_WIDTH)


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
