"""Kills training runs at random moments, resumes them, and compares the results with an uninterrupted run.

    python -m benchmarks.crash [--kills 50 --seed 0 --json FILE]

The runs train on toy roads and write a checkpoint after every batch. SIGKILL comes at the start of a
run, at any moment or, most often, while a checkpoint is being written. The run is resumed at once;
when it finishes, the next one begins. After every kill, all files that existed before must still exist,
complete and no older. At the end of every run, all tensors, the optimiser's moments, the best model and
metrics.jsonl (except images per second) must equal those of the uninterrupted run bit for bit. Then the
files of a stopped run are damaged in various ways, and disks are made full or read-only. Exit status 1
if anything was lost or differs.
"""
import collections
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from mdil import train
from mdil.datasets.toy.roads import write_toy_roads
from mdil.evaluation.tables import plain
from mdil.models import checkpoint
from mdil.training.records import environment, read_metrics
from mdil.training.run import BEST, LATEST, PREVIOUS
from mdil.utils.errors import UserError, run_main
from mdil.utils.files import write_json
from mdil.utils.parser import Parser, positive, seed_number

ROOT = Path(__file__).resolve().parent.parent
IMAGES, EPOCHS, BATCH = 12, 3, 2
PER_EPOCH = IMAGES // BATCH
OPTIONS = ['--domains', 'cityscapes', '--height', '32', '--width', '64', '--batch-size', str(BATCH), '--num-epochs',
           str(EPOCHS), '--class-weights', 'none', '--device', 'cpu', '--checkpoint-minutes', '0', '--resume']
STOP = 8        # batches after which to stop the run whose files are then damaged
WAIT = 1800     # maximum seconds for one process of a run
WHERE = 'start', 'any moment', 'writing'
SHARES = 1, 3, 6


def live(progress, *arguments):
    """Runs train.py, and appends a byte to the file `progress` after every batch; called in a process of its own."""
    real, file = train.train_batch, os.open(progress, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def noted(*batch):
        losses = real(*batch)
        os.write(file, b'.')
        return losses
    train.train_batch = noted
    run_main(partial(train.main, arguments))


def said_by(process):
    """What a process wrote to standard error until its end; after WAIT seconds it is killed and UserError raised."""
    try:
        return process.communicate(timeout=WAIT)[1].strip()
    except subprocess.TimeoutExpired:
        process.kill()
        raise UserError(f'a process did not end within {WAIT} seconds: {process.communicate()[1].strip()}') from None


@dataclass
class CrashRun:
    """A run with its --savedir, `folder`; `root` holds the data and the file that counts the run's batches."""
    root: Path
    folder: Path

    @property
    def progress(self):
        return self.root / f'{self.folder.name}.progress'

    @property
    def batches(self):
        """Batches finished in all processes of the run together."""
        return self.progress.stat().st_size if self.progress.exists() else 0

    def start(self, *more, limit=None):
        """Starts a process that continues the run; `limit`: maximum bytes of a file that it writes."""
        code = 'import sys; from mdil.benchmarks.crash import live; live(*sys.argv[1:])'
        limiting = limit and partial(resource.setrlimit, resource.RLIMIT_FSIZE, (limit, limit))
        return subprocess.Popen([sys.executable, '-c', code, str(self.progress), '--data-root', str(self.root / 'data'),
                                 '--savedir', str(self.folder), *OPTIONS, *more], cwd=ROOT, preexec_fn=limiting,
                                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                                env={**os.environ, 'OMP_NUM_THREADS': '1', 'OMP_WAIT_POLICY': 'PASSIVE'})

    def finish(self, *more, limit=None):
        """Continues the run to its end; returns (exit status, text on standard error)."""
        process = self.start(*more, limit=limit)
        said = said_by(process)
        return process.returncode, said

    def copy(self, name):
        """A CrashRun whose folder is a copy of this one's."""
        shutil.copytree(self.folder, self.root / name)
        return CrashRun(self.root, self.root / name)


@dataclass
class Tally:
    """Results of the kills.

    where: {moment: kills}; batches: trained by all processes together;
    repeated: those trained again after a kill; lost, differing: what went wrong, in words.
    """
    where: collections.Counter = field(default_factory=collections.Counter)
    kills: int = 0
    runs: int = 0
    batches: int = 0
    repeated: int = 0
    lost: list = field(default_factory=list)
    differing: list = field(default_factory=list)


def position(folder):
    """(finished epochs, finished batches of the whole run) in the latest checkpoint; zeros if there is none."""
    if not (folder / LATEST).exists():
        return 0, 0
    content = checkpoint.read(folder / LATEST)
    return content['epoch'], content['epoch'] * PER_EPOCH + content['batch']


def half_written(folder):
    """Temporary files that a run was writing when it was killed."""
    return list(folder.glob('.*.tmp'))


def kill(process, place, where, chance):
    """Kills the process at a moment drawn from `chance`; returns whether that was before it ended by itself."""
    begun, before, batches = time.monotonic(), place.batches, chance.randrange(4)
    delay = chance.uniform(0, {'start': 5, 'any moment': 0.5, 'writing': 0.05}[where])
    reached = {'start': lambda: True, 'any moment': lambda: place.batches >= before + batches,
               'writing': lambda: place.batches >= before + batches and half_written(place.folder)}[where]
    try:
        while process.poll() is None and not reached():
            if time.monotonic() > begun + WAIT:
                raise UserError(f'a run in {place.folder} took more than {WAIT} seconds')
            time.sleep(0.001)
        time.sleep(delay)
    finally:
        process.kill()
        process.communicate()
    return process.returncode == -signal.SIGKILL


def lost_files(folder, known, least):
    """What is missing, damaged or older, in words. known: file names seen before; least: batches finished before."""
    lost = []
    for name in known | {LATEST} if (folder / LATEST).exists() else known:
        try:
            checkpoint.read(folder / name)
        except UserError as error:
            lost.append(str(error))
    if lost:
        return lost
    epochs, batches = position(folder)
    if batches < least:
        lost.append(f'{LATEST} fell from batch {least} to {batches}')
    if len(read_metrics(folder)) < epochs:
        lost.append(f'metrics.jsonl has {len(read_metrics(folder))} of {epochs} epochs')
    return lost


def killed_run(place, kills, chance, tally, bar):
    """One run, killed and resumed until it ends or all runs together had `kills` kills; then it runs to its end."""
    known, least = set(), 0
    while tally.kills < kills and not tally.lost:
        before = place.batches
        # Every second process has a loader worker, which outlives the kill by seconds and must not block resuming.
        process = place.start('--num-workers', str(tally.kills % 2))
        survived = not kill(process, place, chance.choices(WHERE, SHARES)[0], chance)
        if survived and process.returncode:
            tally.lost.append(f'run {tally.runs} ended with exit status {process.returncode}')
        if survived:
            return
        tally.kills += 1
        tally.where['while a file was written' if half_written(place.folder) else 'elsewhere'] += 1
        tally.lost += lost_files(place.folder, known, least)
        known |= {name for name in (LATEST, PREVIOUS, BEST) if (place.folder / name).exists()}
        reached, least = least + place.batches - before, position(place.folder)[1]
        tally.repeated += reached - least
        bar.update()
    status, said = place.finish()
    if status:
        tally.lost.append(f'run {tally.runs} could not be resumed: {said}')


def difference(a, b, name=''):
    """Where two values first differ, in words; None if they are bit-identical."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return None if a.dtype == b.dtype and torch.equal(a, b) else name
    if isinstance(a, dict) and isinstance(b, dict):
        odd = sorted(map(str, a.keys() ^ b.keys()))
        return f'{name}.{odd[0]}' if odd else first(difference(a[key], b[key], f'{name}.{key}') for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        if len(a) != len(b):
            return f'the length of {name}'
        return first(difference(*pair, f'{name}.{number}') for number, pair in enumerate(zip(a, b)))
    return None if a == b else name


def first(found):
    return next((item for item in found if item is not None), None)


def result(folder):
    """The parts of a run to compare: latest and best checkpoint without options, metrics.jsonl without speeds."""
    files = {name: {key: value for key, value in checkpoint.read(folder / name).items() if key != 'options'}
             for name in (LATEST, BEST)}
    lines = read_metrics(folder)
    for line in lines:
        line['train'].pop('images_per_second', None)
    return {**files, 'metrics.jsonl': lines}


def kill_many(root, options, straight):
    """Kills runs `options.kills` times in all and compares each with `straight`; returns the Tally."""
    chance, tally = random.Random(options.seed), Tally()
    with tqdm(total=options.kills, unit='kill', leave=False, disable=None) as bar:
        while tally.kills < options.kills and not tally.lost:
            tally.runs += 1
            place = CrashRun(root, root / f'run{tally.runs}')
            killed_run(place, options.kills, chance, tally, bar)
            odd = not tally.lost and difference(straight, result(place.folder))
            if odd:
                tally.differing.append(f'run {tally.runs}: {odd}')
            tally.batches += place.batches
            shutil.rmtree(place.folder)
    return tally


def cut(name, part, place):
    """Truncates a file to the fraction `part` of its length."""
    data = (place.folder / name).read_bytes()
    (place.folder / name).write_bytes(data[:int(part * len(data))])


def flip(name, place):
    """Changes one bit in the middle of a file."""
    data = bytearray((place.folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (place.folder / name).write_bytes(data)


def both(place):
    cut(LATEST, 0.5, place)
    cut(PREVIOUS, 0.5, place)


def make_directory(place):
    (place.folder / LATEST).unlink()
    (place.folder / LATEST).mkdir()


def remove(place):
    (place.folder / LATEST).unlink()


def leave_half(place):
    """Leaves a half-written temporary file, as a run killed while writing does."""
    (place.folder / f'.{LATEST}.4711.tmp').write_bytes((place.folder / LATEST).read_bytes()[:1000])


def cut_metrics(place):
    with open(place.folder / 'metrics.jsonl', 'a') as file:
        file.write('{"epoch": 2, "tra')


def nothing(place):
    """Leaves the files as they are."""


# (damage to the files of a stopped run, function that does it, options of the resumed run, whether it continues).
DAMAGE = [
    ('nothing', nothing, (), True), ('latest cut in half', partial(cut, LATEST, 0.5), (), True),
    ('latest empty', partial(cut, LATEST, 0), (), True), ('one bit of latest flipped', partial(flip, LATEST), (), True),
    ('latest gone', remove, (), True), ('latest a directory', make_directory, (), False),
    ('latest and previous cut', both, (), False), ('a half-written file left', leave_half, (), True),
    ('metrics.jsonl cut within a line', cut_metrics, (), True),
    ('another method', nothing, ('--method', 'fine-tune'), False),
    ('another domain', nothing, ('--domains', 'BDD'), False)]


def refused(status, said):
    """Whether a run ended with an error of one line."""
    return status == 2 and said.startswith('error: ') and '\n' not in said


def verdict(place, straight, status, said, goes_on=True):
    """(outcome in words, whether it is as expected) of a run that ended; goes_on: whether it should have continued."""
    if not goes_on:
        return said, refused(status, said)
    if status:
        return f'exit {status}: {said}', False
    odd = difference(straight, result(place.folder))
    left = half_written(place.folder)
    told = f'{said}; ' if said else ''
    if odd or left:
        return f'{told}{odd or left[0].name} differs', False
    return f'{told}equal at the end', True


def damaged(stopped, straight):
    """Yields (name, outcome, good) for every kind of damage to the files of the CrashRun `stopped`."""
    for name, harm, more, goes_on in DAMAGE:
        place = stopped.copy('damaged')
        harm(place)
        yield name, *verdict(place, straight, *place.finish(*more), goes_on)
        shutil.rmtree(place.folder)


def file_size_limit(stopped, straight):
    """(name, outcome, good) of a run that cannot write a checkpoint for a while, and continues later."""
    place = stopped.copy('limited')
    least, files = position(place.folder)[1], {LATEST, PREVIOUS, BEST}
    status, said = place.finish(limit=(place.folder / LATEST).stat().st_size // 2)
    lost = lost_files(place.folder, files, least) + [path.name for path in half_written(place.folder)]
    outcome, good = verdict(place, straight, *place.finish())
    shutil.rmtree(place.folder)
    return 'no room for a checkpoint (RLIMIT_FSIZE)', f'{said}; {len(lost)} files lost; later {outcome}', \
        good and refused(status, said) and not lost


def mount(folder, *options):
    """Mounts or remounts a tmpfs; returns the reason if that fails, else ''."""
    try:
        done = subprocess.run(['mount', '-t', 'tmpfs', '-o', ','.join(options), 'tmpfs', str(folder)],
                              capture_output=True, text=True)
    except OSError as error:
        return str(error)
    return done.stderr.strip()


def full_disk(root, straight):
    """Yields (name, outcome, good) for a small file system that fills up, then becomes read-only, then grows."""
    place = CrashRun(root, root / 'disk' / 'run')
    place.folder.parent.mkdir()
    reason = mount(place.folder.parent, 'size=60m')
    if reason:
        yield 'full disk (tmpfs)', f'not tried: {reason}', True
        return
    try:
        status, said = place.finish()
        lost = lost_files(place.folder, {LATEST}, 1) + [path.name for path in half_written(place.folder)]
        yield 'full disk (tmpfs)', f'{said}; {len(lost)} files lost', refused(status, said) and not lost
        mount(place.folder.parent, 'remount', 'ro')
        yield 'read-only disk', *verdict(place, straight, *place.finish(), goes_on=False)
        mount(place.folder.parent, 'remount', 'rw', 'size=400m')
        yield 'the disk grown', *verdict(place, straight, *place.finish())
    finally:
        subprocess.run(['umount', str(place.folder.parent)], check=True)


def below_a_file(root, straight):
    """(name, outcome, good) of a --savedir that cannot exist, whatever the user's rights."""
    (root / 'file').write_text('')
    place = CrashRun(root, root / 'file' / 'run')
    return '--savedir below a file', *verdict(place, straight, *place.finish(), goes_on=False)


def stopped_run(root):
    """A CrashRun whose run was stopped by SIGTERM after STOP batches or a few more."""
    place = CrashRun(root, root / 'stopped')
    process = place.start()
    while process.poll() is None and place.batches < STOP:
        time.sleep(0.01)
    process.terminate()
    said_by(process)
    return place


def trials(root, straight):
    """Yields (name, outcome, good) of every trial other than kills."""
    stopped = stopped_run(root)
    yield from damaged(stopped, straight)
    yield file_size_limit(stopped, straight)
    yield from full_disk(root, straight)
    yield below_a_file(root, straight)


def report(tally, tried):
    """The results as text for the terminal."""
    rows = [['kills', tally.kills], *([f'  {where}', count] for where, count in sorted(tally.where.items())),
            ['runs', tally.runs], ['batches', tally.batches],
            ['  of them repeated', tally.repeated], ['files lost', len(tally.lost)],
            ['runs that differ from the one left alone', len(tally.differing)]]
    trials_rows = [f'{"ok " if good else "BAD"}  {name}: {outcome}' for name, outcome, good in tried]
    return '\n'.join([plain(['SIGKILL', ''], rows), '', *tally.lost, *tally.differing, *trials_rows])


def main(arguments=None):
    parser = Parser(prog='python -m benchmarks.crash', description='Kills training runs and damages their files.')
    parser.add_argument('--kills', type=positive, default=50, help='kills in all')
    parser.add_argument('--seed', type=seed_number, default=0, help='seed of the moments')
    parser.add_argument('--json', metavar='FILE', help='write all figures')
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_toy_roads(root / 'data', train=IMAGES, val=2, height=32, width=64, seed=1)
        alone = CrashRun(root, root / 'alone')
        status, said = alone.finish()
        if status:
            raise UserError(f'the uninterrupted run ended with exit status {status}: {said}')
        straight = result(alone.folder)
        tally = kill_many(root, options, straight)
        tried = [(name, outcome.replace(folder, ''), good) for name, outcome, good in trials(root, straight)]
    print(report(tally, tried))
    if options.json:
        write_json(options.json, {
            'options': {'kills': options.kills, 'seed': options.seed}, 'versions': environment(torch.device('cpu')),
            'train': OPTIONS, 'kills': vars(tally),
            'trials': [{'name': n, 'outcome': o, 'good': g} for n, o, g in tried]})
    return int(bool(tally.lost or tally.differing) or not all(good for _, _, good in tried))


if __name__ == '__main__':
    run_main(main)
