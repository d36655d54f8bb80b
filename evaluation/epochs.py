"""The epoch of an evaluated checkpoint and its validation results, from the records next to the file."""
from pathlib import Path

from mdil.evaluation.history import read_step
from mdil.training import records
from mdil.training.run import BEST, LATEST

FILES = {BEST: 'best', LATEST: 'last'}


def started_from(step):
    """The name of the file, BEST or LATEST, of the step before that a StepRecord continued from; BEST if unknown."""
    name = Path(step.options.get('state') or '').name
    return name if name in FILES else BEST


def training_of(path):
    """{'file', 'step', 'learnt', 'best', 'last'} of a checkpoint next to its run's metrics.jsonl; None for any other.

    file: 'best' or 'last', which of the two it is. step: number of the run in its sequence, from 1. learnt: names of
    the domains that the run learns.
    best, last: {'epoch', 'miou'} as validated while training, with the mIoU in percent, averaged over those.
    """
    if Path(path).name not in FILES:        # of another program, whose records may mean something else
        return None
    step = read_step(Path(path).parent)
    chosen = records.best_and_last(step.lines, step.learnt)
    if None in chosen:
        return None
    epochs = {which: {'epoch': line['epoch'], 'miou': records.mean_miou(line, step.learnt)}
              for which, line in zip(('best', 'last'), chosen)}
    number = len(step.options.get('domains') or step.learnt) - len(step.learnt) + 1
    return {'file': FILES[Path(path).name], 'step': number, 'learnt': list(step.learnt), **epochs}
