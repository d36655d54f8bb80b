"""Training with things that are tried and not part of the product, and corrections of finished weights.

    python -m benchmarks.variants --ema 0.99 -- --domains cityscapes BDD --state STEP1 --savedir DIR ...

runs train.py with the options after `--`, changed as those before it say; with --resume too. The
options before `--` are kept in variants.json beside the checkpoints, and a run is not gone on with
under others. AFTER holds what needs no training: it corrects the network of a finished step, given
that of the step before. `python -m benchmarks.forgetting` compares them all.
"""
import argparse
import contextlib
import json
import re
import sys
from functools import partial, wraps
from pathlib import Path

import numpy as np
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

import train
from datasets import SegmentationDataset
from models.erfnet import batch_norms_of
from utils import building, records
from utils.errors import UserError, run_main
from utils.options import Parser, natural, parse_train, rate
from utils.run import LATEST, Run
from utils.task import Task

RECORD = 'variants.json'
USAGE = 'python -m benchmarks.variants [OPTIONS] -- TRAIN-OPTIONS'
PHOTOMETRIC = 3         # distinguishes these random numbers from those of order, flip and shift
LEAST_VARIANCE = 1e-5   # of a channel that is compared with another one's


def features(network, images, domain, place):
    """(features at `place`, logits) of images (B, 3, H, W) by a domain's branch.

    place: 'encoder' for its output (B, 128, H/8, W/8), 'decoder' for what its output layer
    gets (B, 16, H/2, W/2).
    """
    decoder = network.decoder[domain]
    encoded = x = network.encoder(images, domain)
    for layer in decoder.layers:
        x = layer(x)
    return encoded if place == 'encoder' else x, decoder.output_conv(x)


def feature_distance(student, teacher):
    """Mean squared error of features (B, C, H, W) in units of the teacher's variance of each channel."""
    student, teacher = student.float(), teacher.float()
    variance = teacher.var(dim=(0, 2, 3), unbiased=False, keepdim=True).clamp_min(LEAST_VARIANCE)
    return ((student - teacher) ** 2 / variance).mean()


class FeatureTask(Task):
    """The Task whose distillation holds the old branches' features beside their outputs.

    weight: of the features' distance, in units of the distance of the outputs.
    """

    def __init__(self, *arguments, weight, place, **keywords):
        super().__init__(*arguments, **keywords)
        self.weight, self.place = weight, place

    def distance(self, images, old):
        with torch.no_grad():
            wanted, target = features(self.teacher, images, old, self.place)
        found, logits = features(self.student, images, old, self.place)
        return self.distill(logits, target, self.temperature) + self.weight * feature_distance(found, wanted)


def warm_started(train_batch, epochs):
    """`train_batch` that leaves the shared weights as they are in the first `epochs` epochs."""
    @wraps(train_batch)
    def changed(run, *batch):
        groups = [group for group in run.optimizer.param_groups if group['name'] == 'shared' and run.epoch < epochs]
        rates = [group['lr'] for group in groups]
        for group in groups:
            group['lr'] = 0.0
        try:
            return train_batch(run, *batch)
        finally:        # the schedule and the checkpoints know nothing of it
            for group, lr in zip(groups, rates):
                group['lr'] = lr
    return changed


class AveragedRun(Run):
    """A Run that keeps a moving average of the student's tensors, {name: tensor}, in its checkpoints."""

    def __init__(self, *arguments):
        self.average = None
        super().__init__(*arguments)
        if self.average is None:
            self.average = {name: value.clone() for name, value in self.student.state_dict().items()}

    def state(self):
        return {**super().state(), 'ema': self.average}

    def restore(self, state):
        super().restore(state)
        self.average = {name: state['ema'][name].to(value.device) for name, value in self.student.state_dict().items()}


def averaged(train_batch, decay):
    """`train_batch` that moves the run's average after every batch, faster at first, as it starts from old weights."""
    @wraps(train_batch)
    def changed(run, *batch):
        losses = train_batch(run, *batch)
        done = run.epoch * len(run.learnt) * len(run.learnt[0].train) + run.batch
        move_average(run.average, run.student.state_dict(), 1 - min(decay, (1 + done) / (10 + done)))
        return losses
    return changed


@torch.no_grad()
def move_average(average, state, share):
    """Moves each tensor of `average` by `share` of the way to that in `state`; counters are copied."""
    for name, value in state.items():
        if value.is_floating_point():
            average[name].lerp_(value, share)
        else:
            average[name].copy_(value)


def ends_averaged(train_epoch):
    """`train_epoch` after whose last epoch the student holds the average, to be validated and saved."""
    @wraps(train_epoch)
    def changed(run, *arguments):
        result = train_epoch(run, *arguments)
        if run.epoch + 1 == run.options.num_epochs:
            run.student.load_state_dict(run.average)
        return result
    return changed


def shared_named(network, pattern):
    """The shared parameters of a network whose names `pattern` finds."""
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    return [parameter for parameter in network.shared_parameters() if re.search(pattern, names[id(parameter)])]


def learning_some(freeze, pattern):
    """`freeze` of a student of whose shared weights only those learn whose names `pattern` finds."""
    @wraps(freeze)
    def changed(student, *arguments):
        freeze(student, *arguments)
        learning = set(map(id, shared_named(student, pattern)))
        for parameter in student.shared_parameters():
            if id(parameter) not in learning:
                parameter.requires_grad_(False)
    return changed


class StrongDataset(SegmentationDataset):
    """Training images with changed colours and scale beside flip and shift, drawn from (seed, epoch, number)."""

    def __getitem__(self, key):
        image, label, number = super().__getitem__(key)
        if self.split != 'train':
            return image, label, number
        random = np.random.default_rng((self.seed, *key, PHOTOMETRIC))
        return (*rescaled(recoloured(image, random), label, random, self.domain.void), number)


def recoloured(image, random):
    """Image (3, H, W) uint8 with brightness, contrast, saturation and hue drawn anew."""
    for adjust in (functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation):
        image = adjust(image, random.uniform(0.6, 1.4))
    return functional.adjust_hue(image, random.uniform(-0.05, 0.05))


def rescaled(image, label, random, void):
    """Image (3, H, W) and label (H, W) scaled by 0.5 to 2 and cut or filled (0, void) to the same size."""
    scale = float(np.exp(random.uniform(np.log(0.5), np.log(2))))
    room = abs(scale - 1) / 2
    shift = [float(random.uniform(-room, room)) * side for side in image.shape[:0:-1]]
    move = partial(functional.affine, angle=0.0, translate=shift, scale=scale, shear=[0.0, 0.0])
    return (move(image, interpolation=v2.InterpolationMode.BILINEAR, fill=[0.0] * 3),
            move(label[None], interpolation=v2.InterpolationMode.NEAREST, fill=[float(void)])[0])


@contextlib.contextmanager
def replaced(module, name, value):
    """Has `module.name` be `value` within."""
    kept = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, kept)


@contextlib.contextmanager
def changed_training(options):
    """Has train.py do within what the options say."""
    with contextlib.ExitStack() as stack:
        put = lambda module, name, value: stack.enter_context(replaced(module, name, value))
        if options.feature_distillation is not None:
            put(building, 'Task', partial(FeatureTask, weight=options.feature_distillation,
                                          place=options.feature_place))
        if options.warm_start:
            put(train, 'train_batch', warm_started(train.train_batch, options.warm_start))
        if options.ema is not None:
            put(train, 'Run', AveragedRun)
            put(train, 'train_batch', averaged(train.train_batch, options.ema))
            put(train, 'train_epoch', ends_averaged(train.train_epoch))
        if options.learn_shared:
            put(building, 'freeze', learning_some(building.freeze, options.learn_shared))
        if options.strong_augmentation:
            put(building, 'SegmentationDataset', StrongDataset)
        yield


def keep_record(folder, options):
    """Writes variants.json; UserError if the run in `folder` was begun with other options."""
    path = folder / RECORD
    known = json.loads(path.read_text()) if path.exists() else None
    now = {name: value for name, value in vars(options).items() if name in (known or {}) or value}     # more came later
    if (folder / LATEST).exists() and known != now:
        raise UserError(f'the run in {folder} was begun with other options of benchmarks.variants: {known}; repeat '
                        'them, or use another --savedir')
    records.write_json(path, vars(options))


def old_norms(network, previous):
    """[(batch norm of `network`, the same of `previous`)] of the branches of each domain that `previous` knows."""
    return [list(zip(batch_norms_of(network.branch(domain)), batch_norms_of(previous.branch(domain))))
            for domain in range(len(previous.decoder))]


def put_back(previous, current, images):
    """Gives the old domains' batch norms of `current` the running statistics that they have in `previous`."""
    for pairs in old_norms(current, previous):
        for norm, before in pairs:
            for buffer, kept in zip(norm.buffers(), before.buffers()):
                buffer.copy_(kept)


def average_shared(previous, current, images, alpha=0.5):
    """Moves the shared weights of `current` back to those of `previous`, to `alpha` of the way it went."""
    for value, before in zip(current.shared_parameters(), previous.shared_parameters()):
        value.data.copy_(before + alpha * (value - before))


@torch.no_grad()
def compensate(previous, current, images):
    """Moves the old domains' running statistics of `current` as the shared weights moved what they are of.

    images: (B, 3, H, W) float of the new domain. They pass each old branch of both networks;
    mean and variance of what each batch norm gets, channel by channel, say by how much.
    A branch is corrected on the way, so that later layers see what the corrected ones give.
    """
    put_back(previous, current, images)
    for domain, pairs in enumerate(old_norms(current, previous)):
        inputs = {}
        with watched([before for _, before in pairs], lambda norm, x: inputs.update({norm: moments(x)})):
            previous.eval()(images, domain)
        wanted = {norm: inputs[before] for norm, before in pairs}
        with watched(list(wanted), lambda norm, x: correct(norm, moments(x), wanted[norm])):
            current.eval()(images, domain)


@contextlib.contextmanager
def watched(norms, see):
    """Calls see(batch norm in eval mode, its input) for each of `norms` before it is applied."""
    hooks = [norm.register_forward_pre_hook(lambda module, inputs: see(module, inputs[0])) for norm in norms]
    for norm in norms:
        norm.track_running_stats = False        # in eval mode: they are used all the same, but by the module itself
    try:
        yield
    finally:
        for norm, hook in zip(norms, hooks):
            norm.track_running_stats = True
            hook.remove()


def moments(x):
    """(mean, variance) of every channel of x (B, C, H, W)."""
    variance, mean = torch.var_mean(x, dim=(0, 2, 3), unbiased=False)
    return mean, variance.clamp_min(LEAST_VARIANCE)


def correct(norm, found, wanted):
    """Moves the running statistics of `norm` from inputs of the moments `wanted` to those of `found`."""
    norm.running_mean += found[0] - wanted[0]
    norm.running_var *= found[1] / wanted[1]


# name -> function (previous network, current network, images float (B, 3, H, W) of the new domain); changes `current`.
AFTER = {'put-back': put_back, 'average': average_shared, 'compensate': compensate}


def decay(text):
    """Type of --ema: a float from 0, below 1."""
    value = rate(text)
    if value >= 1:
        raise argparse.ArgumentTypeError(f'{text} is not below 1')
    return value


def parse(argv):
    """(options of this script, arguments of train.py)."""
    parser = Parser(prog='python -m benchmarks.variants', usage=USAGE,
                    description='Runs train.py with things that are tried.')
    parser.add_argument('--feature-distillation', type=rate, metavar='W',
                        help="hold the old branches' features too, W times their distance beside the outputs'")
    parser.add_argument('--feature-place', choices=('encoder', 'decoder'), default='encoder',
                        help="features: the encoder's output, or what the decoder's output layer gets")
    parser.add_argument('--warm-start', type=natural, default=0, metavar='N', help='shared weights wait for N epochs')
    parser.add_argument('--ema', type=decay, metavar='DECAY', help='end with the moving average of all tensors')
    parser.add_argument('--learn-shared', metavar='PATTERN', help='of the shared weights only those of such names learn')
    parser.add_argument('--strong-augmentation', action='store_true', help='change colours and scale too')
    if '--' not in argv:
        parser.parse_args(argv)         # so that --help and misspelt options are answered
        raise UserError(f'the options of train.py come after --: {USAGE}')
    border = argv.index('--')
    return parser.parse_args(argv[:border]), argv[border + 1:]


def main(argv=None):
    options, arguments = parse(sys.argv[1:] if argv is None else argv)
    keep_record(records.make_folder(Path(parse_train(arguments).savedir)), options)
    with changed_training(options):
        train.main(arguments)


if __name__ == '__main__':
    run_main(main)
