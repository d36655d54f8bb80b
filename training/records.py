"""What a run writes next to its checkpoints: opts.json and metrics.jsonl."""
import json
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from mdil.utils.errors import UserError, counted
from mdil.utils.files import write_json, write_text
from mdil.utils.precision import cpu_info


def git_revision():
    """The revision of the code, with '-dirty' if changed; None without git, or if the code is installed."""
    root = Path(__file__).resolve().parents[1]
    if not (root / 'mdil').is_dir():        # installed: a repository around it is another project's
        return None
    try:
        done = subprocess.run(['git', 'describe', '--always', '--dirty', '--abbrev=40', '--exclude=*'],
                              cwd=root, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def processor():
    """The processor's model, as Linux or Python names it, and the vector instructions that torch uses.

    Runs on two models are not bit-equal, even with the same seed.
    """
    models = cpu_info('model name')
    name = models[0] if models else platform.processor() or platform.machine()
    return f'{name}, {torch.backends.cpu.get_cpu_capability()}'


def environment(device):
    """Versions, revision and hardware, for records."""
    card = (torch.cuda.get_device_name(device) if device.type == 'cuda' else
            f'{processor()}, {counted(torch.get_num_threads(), "thread")}' if device.type == 'cpu' else str(device))
    return {'python': platform.python_version(), 'torch': torch.__version__, 'torchvision': version('torchvision'),
            'numpy': np.__version__, 'git': git_revision(), 'device': card}


def write_options(folder, options, place, class_weights):
    """Writes opts.json: final options, class weights in use, versions, git revision."""
    write_json(Path(folder) / 'opts.json', {
        'options': vars(options),
        'class_weights': {name: weights.tolist() for name, weights in zip(options.domains, class_weights)},
        'versions': environment(place.device)})


def append_metrics(folder, line):
    """Adds a line to metrics.jsonl."""
    path = Path(folder) / 'metrics.jsonl'
    try:
        with open(path, 'a') as file:
            file.write(json.dumps(line) + '\n')
    except OSError as error:
        raise UserError(f'{path} cannot be written: {error.strerror}; --resume continues from the last '
                        'checkpoint') from None


def read_metrics(folder):
    """The lines of metrics.jsonl, [] if there is none, without a last line that a crash cut short."""
    path, lines = Path(folder) / 'metrics.jsonl', []
    try:
        texts = path.read_bytes().splitlines() if path.exists() else []
    except OSError as error:
        raise UserError(f'{path} cannot be read: {error.strerror}; move it away, its epochs will be missing from the '
                        'curves') from None
    for number, text in enumerate(texts, 1):
        try:
            lines.append(checked(json.loads(text)))
        except (ValueError, TypeError, LookupError, AttributeError):
            if number < len(texts):
                raise UserError(f'{path}: line {number} was not written by a run; move the file away, or fix '
                                'it') from None
    return lines


def checked(line):
    """`line`, parsed from metrics.jsonl; raises an exception if a number that every run writes is not in it."""
    numbers = [line['lr'], line['train']['loss'], *(entry[name] for entry in line['val'].values()
                                                    for name in ('miou', 'loss'))]
    if not isinstance(line['epoch'], int) or not all(isinstance(value, (int, float)) for value in numbers):
        raise ValueError('not a line of a run')
    return line


def best_and_last(lines, learnt):
    """(line of the best validation of the domains `learnt`, line of the last one), from the lines of metrics.jsonl.

    The best has the highest mean mIoU, like model_best.pth.tar. (None, None) if nothing was validated.
    """
    scored = [line for line in lines if learnt and all(name in line['val'] for name in learnt)]
    return (max(scored, key=lambda line: mean_miou(line, learnt)), scored[-1]) if scored else (None, None)


def mean_miou(line, learnt):
    """Mean mIoU of the domains `learnt` in a line of metrics.jsonl that validates them."""
    return sum(line['val'][name]['miou'] for name in learnt) / len(learnt)


def closing_line(folder, learnt):
    """The last message of a finished run in `folder`: its best epoch and its last one."""
    best, last = best_and_last(read_metrics(folder), learnt)
    if best is None:
        return f'{folder}: finished, nothing was validated'
    return (f'{folder}: best epoch {best["epoch"]}, mIoU {mean_miou(best, learnt):.2f} ({", ".join(learnt)}); '
            f'last epoch {last["epoch"]}, mIoU {mean_miou(last, learnt):.2f}')


def keep_metrics(folder, epoch):
    """Cuts metrics.jsonl back to the epochs up to `epoch`; a resumed run writes the later ones again."""
    lines = [line for line in read_metrics(folder) if line['epoch'] <= epoch]
    text = ''.join(json.dumps(line) + '\n' for line in lines)
    write_text(Path(folder) / 'metrics.jsonl', text)
