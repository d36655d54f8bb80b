"""TensorBoard scalars of a running training (`--tensorboard`), in the folder `tensorboard` of --savedir."""
from pathlib import Path

from mdil.utils.errors import UserError
from mdil.utils.files import check_writable


class Scalars:
    """Writes the scalars of metrics.jsonl; a subfolder is named after --model-name-suffix.

    epoch: number of finished epochs; scalars of later epochs, left by an interrupted run, are discarded.
    """

    def __init__(self, options, epoch=0):
        from torch.utils.tensorboard import SummaryWriter       # imported here because the package is optional
        name = options.model_name_suffix.replace('/', '-')
        if name == '..':
            raise UserError("--model-name-suffix .. cannot name TensorBoard's folder; use another name")
        folder = Path(options.savedir) / 'tensorboard' / name
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
