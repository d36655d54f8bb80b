"""Scalars for TensorBoard while a run trains: `--tensorboard`, in the folder tensorboard of --savedir."""
from pathlib import Path

from mdil.utils.files import check_writable


class Scalars:
    """Writes the figures of metrics.jsonl; the run's name is --model-name-suffix below its folder.

    epoch: epochs finished so far; later ones of an interrupted run are shown as it repeats them.
    """

    def __init__(self, options, epoch=0):
        from torch.utils.tensorboard import SummaryWriter       # the package is asked for only where it is wanted
        folder = Path(options.savedir) / 'tensorboard' / options.model_name_suffix.replace('/', '-')
        check_writable('--tensorboard', folder, folder=True)
        self.writer = SummaryWriter(str(folder), purge_step=epoch + 1)

    def show(self, line, run=None):
        """Writes `line` of metrics.jsonl."""
        for name, value in line['train'].items():
            self.writer.add_scalar(f'training/{name}', value, line['epoch'])
        for name, entry in line['val'].items():
            self.writer.add_scalar(f'validation mIoU/{name}', entry['miou'], line['epoch'])
            self.writer.add_scalar(f'validation loss/{name}', entry['loss'], line['epoch'])
        self.writer.add_scalar('learning rate', line['lr'], line['epoch'])
        self.writer.flush()
