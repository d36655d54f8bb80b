"""What a run has written so far, and the curves of a sequence of runs: the dashboard and the report draw them."""
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

from mdil.models.checkpoint import are_options
from mdil.models.methods import METHODS, method_name
from mdil.training import records
from mdil.utils.errors import UserError

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
    """The StepRecord in `folder`; UserError if one of its files was not written by a run."""
    return StepRecord(Path(folder), read_record(folder), records.read_metrics(folder))


def read_record(folder):
    """The dicts in opts.json, {} if there is no such file; UserError if it is damaged."""
    path = Path(folder) / 'opts.json'
    try:
        record = json.loads(path.read_text()) if os.path.exists(path) else {}
    except OSError as error:
        raise UserError(f'{path} cannot be read: {error.strerror}; move it away, its options will be '
                        'missing') from None
    except ValueError:
        record = None
    if not isinstance(record, dict) or not is_options(record.get('options', {})):
        raise UserError(f'{path} was not written by a run; move the file away, or fix it')
    return {name: value for name, value in record.items() if isinstance(value, dict)}


def is_options(value):
    """Whether `value` can be the options of a run: those that are shown or computed with have their types."""
    types = {'domains': list, 'method': str, 'lr': (int, float), 'shared_lr': (int, float), 'state': str,
             'savedir': str}
    return are_options(value) and all(isinstance(value[name], kind) for name, kind in types.items()
                                      if value.get(name) is not None) and all(
        isinstance(name, str) for name in value.get('domains') or ())


def history(folder):
    """The StepRecords up to the one in `folder`, oldest first, found through the folder of each run's --state."""
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
    """The Plot of `values` over the epochs of all StepRecords.

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
    """Names of the loss terms that the StepRecords have, in order."""
    names = dict.fromkeys(name for step in steps for line in step.lines for name in line['train'])
    return [name for name in names if name not in ('loss', 'images_per_second')]


def curves(steps):
    """The Plots of a sequence of StepRecords, with epochs counted across steps; Plots of only zeros are left out."""
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
