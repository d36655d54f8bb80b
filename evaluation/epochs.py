"""Of which epoch an evaluated checkpoint is, and what was validated then: from the records next to it."""
from pathlib import Path

from mdil.evaluation.dashboard import read_step
from mdil.training import records
from mdil.training.run import BEST, LATEST

FILES = {BEST: 'best', LATEST: 'last'}


def training_of(path):
    """{'file', 'best', 'last'} of a checkpoint next to its run's metrics.jsonl; None of any other.

    file: 'best' or 'last'. The others: {'epoch', 'miou'} of that epoch's validation while
    training, the mIoU in percent and the mean over the domains that the run learns.
    """
    step = read_step(Path(path).parent)
    chosen = records.best_and_last(step.lines, step.learnt)
    if Path(path).name not in FILES or None in chosen:
        return None
    epochs = {which: {'epoch': line['epoch'], 'miou': records.mean_miou(line, step.learnt)}
              for which, line in zip(('best', 'last'), chosen)}
    return {'file': FILES[Path(path).name], **epochs}
