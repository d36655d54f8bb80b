"""A training run: its parts, its progress, and how it is saved and resumed."""
import math
import os
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from mdil.models import checkpoint, unchanged
from mdil.models.layouts import faults
from mdil.models.networks import DEFAULT as ERFNET
from mdil.training import building, digest, domain_data, resume
from mdil.training.plan import plan_step
from mdil.utils.errors import UserError, brief
from mdil.utils.fetch import Fetched
from mdil.utils.files import remove_leftovers, same_file
from mdil.utils.precision import wide_type

LATEST, PREVIOUS, BEST = 'checkpoint.pth.tar', 'checkpoint.previous.pth.tar', 'model_best.pth.tar'
RESULTS = LATEST, PREVIOUS, BEST, 'metrics.jsonl'
WRITTEN = *RESULTS, 'opts.json', unchanged.NAME


def results_in(folder):
    """Names of the files in `folder` that hold results of a run and are not empty."""
    return [name for name in RESULTS if os.path.isfile(folder / name) and os.path.getsize(folder / name)]


def check_kept(options):
    """UserError if the run would replace a result, or write to the file that --state names."""
    folder, found = Path(options.savedir), results_in(Path(options.savedir))
    for name in WRITTEN:
        if options.state and same_file(folder / name, options.state):
            raise UserError(f'--state {options.state} is the file {name} of --savedir, which the run would write; '
                            'use another --savedir')
    if found and not (options.resume or options.overwrite):
        raise UserError(f'--savedir {folder} holds a result ({", ".join(found)}); continue with --resume, use another '
                        '--savedir, or replace it with --overwrite')


def remove_results(folder):
    """Removes the result in `folder`, which a new one is to replace."""
    for name in results_in(folder):
        (folder / name).unlink()


def like_their_weights(optimizer):
    """Gives Adam's moments the memory layout of their weights, which fused Adam assumes.

    A file from another device or precision may have another layout.
    """
    for parameter, moments in optimizer.state.items():
        for name in ('exp_avg', 'exp_avg_sq'):
            moments[name] = torch.empty_like(parameter).copy_(moments[name])


def seed_dropout(*numbers):
    """Seeds torch's generators with a hash of several numbers."""
    torch.manual_seed(hash(numbers) % 2 ** 63)


class Batch(NamedTuple):
    """A batch that was trained on: its losses, and (pairs of a data set, sample numbers) of each of its parts."""
    losses: Fetched
    parts: list

    @property
    def files(self):
        """Paths of its images."""
        return [str(pairs[sample % len(pairs)].image) for pairs, samples in self.parts for sample in samples.tolist()]


class Run:
    """Everything that a training step consists of.

    epoch: epochs finished.
    batch: batches finished in the current epoch.
    totals: sums of the loss parts over those batches.
    last: the Batch whose loss has not been checked yet.
    sound: whether the file at LATEST is worth keeping.
    saved: the checkpoint to resume from, as `resume.find` returns it, or None.
    """

    def __init__(self, options, place, saved=None):
        building.seed_everything(options.seed, options.deterministic)
        building.set_tf32(options.recipe != 'released')
        self.options, self.place, self.plan = options, place, plan_step(options)
        resume.check_places(self.folder, WRITTEN)
        if place.main:
            remove_leftovers(self.folder, WRITTEN)
        self.data = domain_data.build_data(options, place, saved)
        self.digests = digest.data_digests(self.data) if place.main else {}
        self.start = saved.get('start') if saved else digest.start_digest(options) if place.main else None
        if saved and place.main:
            digest.check_unchanged(saved.get('digests', {}), self.digests, self.folder)
        self.student, self.teacher, self.loaded, known = self.networks(saved)
        self.domain_statistics = domain_data.with_statistics(known, self.data, options, place)
        if options.sync_bn:
            self.student = building.synchronised(self.student, options, place)
        building.freeze(self.student, options)
        self.student.to(place.device)
        self.terms = building.build_terms(options)
        self.step_loss = building.build_step_loss(self.student, self.teacher,
                                                  [data.class_weights for data in self.data],
                                                  self.terms, options, place)
        replicas = torch.cuda.device_count() if isinstance(self.step_loss, nn.DataParallel) else 1
        building.check_batches(self.student, self.trained, options, replicas)
        self.optimizer, self.schedule = building.build_optimizer(self.student, options)
        self.scaler = torch.amp.GradScaler(place.device.type, enabled=options.precision == 'fp16')
        self.epoch, self.batch, self.totals, self.best = 0, 0, {}, float('-inf')
        self.last = None
        self.written, self.sound = time.monotonic(), not saved or saved.get('file', LATEST) == LATEST
        if saved:
            self.restore(saved)
        # What a term draws is the same in a resumed run, and does not move the generators that were restored.
        with torch.random.fork_rng(range(torch.cuda.device_count()) if place.device.type == 'cuda' else []):
            torch.manual_seed(options.seed)
            for term in self.terms:
                term.setup(self)

    def networks(self, saved):
        """(student, teacher or None, what was loaded in words, {old domain: its statistics})."""
        domains = [data.domain for data in self.data]
        if not saved:
            return building.build_networks(self.options, domains)
        networks = building.rebuild_networks(self.options, domains, saved.get('network', ERFNET))
        return *networks, f'resumed in {self.options.savedir}', saved.get('domain_statistics', {})

    @property
    def folder(self):
        """The folder --savedir."""
        return Path(self.options.savedir)

    @property
    def trained(self):
        """DomainData of the domains that this step trains."""
        return [data for data in self.data if data.train is not None]

    @property
    def batches(self):
        """Number of batches in an epoch."""
        return self.plan.turns * len(self.trained[0].train)

    @property
    def learnt(self):
        """Names of the domains that this step trains."""
        return [data.domain.name for data in self.trained]

    @property
    def loss_names(self):
        """Names of a batch's losses: the loss and its terms."""
        return {'loss', *(term.name for term in self.terms)}

    def start_epoch(self):
        """Sets sample order, augmentation and dropout for the epoch after the finished ones."""
        for data in self.trained:
            sampler = data.train.batch_sampler
            sampler.epoch, sampler.start = self.epoch + 1, self.batch // self.plan.turns
        if self.batch == 0:
            self.totals = {}
            seed_dropout(self.options.seed, self.epoch + 1, self.place.rank)
        self.step_loss.train()

    def add(self, losses, parts):
        """Counts a batch with the losses from `train_batch`; checks the one before, which is done by now."""
        device = self.place.device
        losses = {name: value.to(device, wide_type(device)) for name, value in losses.items()}
        self.check_last()
        self.totals = {name: self.totals.get(name, 0) + value for name, value in losses.items()}
        images = [(data.train.dataset.pairs, samples) for data, (*_, samples) in parts]
        self.batch, self.last = self.batch + 1, Batch(Fetched(losses), images)

    def check_last(self):
        """Waits for the last batch; UserError that names its files if its loss is not finite."""
        last, self.last = self.last, None
        loss = last.losses.read()['loss'] if last else 0.0
        if not math.isfinite(loss):
            raise UserError(f'the loss is {loss} in epoch {self.epoch + 1}; the last '
                            'checkpoint is kept. Try a lower --lr or --precision fp32. Batch: ' + ', '.join(last.files))

    def end_epoch(self):
        """Counts the epoch as finished; returns its mean losses."""
        self.check_last()
        means = {name: value.item() / self.batch for name, value in self.totals.items()}
        self.epoch, self.batch = self.epoch + 1, 0
        with warnings.catch_warnings():     # a run resumed in its validation takes no step before this
            warnings.filterwarnings('ignore', 'Detected call of `lr_scheduler.step')
            self.schedule.step()
        return means

    def state(self):
        """The checkpoint dict: tensors and built-in types only."""
        return {
            'version': checkpoint.VERSION, 'epoch': self.epoch, 'batch': self.batch,
            'totals': {name: value.item() for name, value in self.totals.items()} if self.batch else {},
            'state_dict': self.student.state_dict(),
            'domains': [data.domain.entry for data in self.data], 'digests': self.digests, 'start': self.start,
            'domain_statistics': self.domain_statistics,
            'method': self.options.method, 'network': self.options.network, 'best_acc': self.best,
            'optimizer': self.optimizer.state_dict(), 'scheduler': self.schedule.state_dict(),
            'scaler': self.scaler.state_dict(),
            'teacher': self.teacher and self.teacher.state_dict(), 'options': vars(self.options),
            'random': {'torch': torch.get_rng_state(),
                       'cuda': torch.cuda.get_rng_state_all() if self.place.device.type == 'cuda' else []}}

    def restore(self, state):
        """Continues from `state`, a dict that `state()` made with the same options; UserError if it does not fit."""
        try:
            self.check_fit(state)
            self.student.load_state_dict(state['state_dict'])
            if self.teacher is not None:
                self.teacher.load_state_dict(state['teacher'])
            self.optimizer.load_state_dict(state['optimizer'])
            like_their_weights(self.optimizer)
            for group in self.optimizer.param_groups:
                group['capturable'] = self.options.cuda_graphs
            self.schedule.load_state_dict(resume.checked_schedule(state, self.schedule))
            if state['scaler']:
                self.scaler.load_state_dict(state['scaler'])
            self.restore_random(state['random'], state['epoch'], state['batch'])
            self.totals = {name: torch.tensor(value, dtype=wide_type(self.place.device), device=self.place.device)
                           for name, value in state['totals'].items() if name in self.loss_names}
            self.epoch, self.batch, self.best = state['epoch'], state['batch'], float(state['best_acc'])
            self.loaded += f' after epoch {self.epoch}' + (f' and {self.batch} batches' if self.batch else '')
        except (LookupError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise UserError(f'the checkpoint in {self.folder} does not fit this run '
                            f'({brief(error, 200)}); use another --savedir') from None

    def restore_random(self, random, epoch, batch):
        """Sets torch's generators to the saved states, which are rank 0's; other ranks are seeded anew."""
        if self.place.main:
            torch.set_rng_state(random['torch'])
            if self.place.device.type == 'cuda':        # the saved run may have had more GPUs
                torch.cuda.set_rng_state_all(random['cuda'][:torch.cuda.device_count()])
        else:
            seed_dropout(self.options.seed, epoch + 1, self.place.rank, batch)

    def check_fit(self, state):
        """ValueError unless every part of `state` has the form of this run's own and valid values."""
        # fp16 skips the step of a batch whose scaled gradients overflow.
        stepped = not self.scaler.is_enabled() and (state['epoch'] > 0 or state['batch'] >= self.plan.turns)
        complete = stepped and not building.has_idle_weights(self.student, self.options)
        resume.check_optimizer(state['optimizer'], self.optimizer, complete)
        resume.check_scaler(state['scaler'], self.scaler)
        for name, network in (('state_dict', self.student), ('teacher', self.teacher)):
            own = network.state_dict() if network is not None else {}
            resume.check_same_form(state[name] or {}, own, name)
            if wrong := faults(own, state[name] or {}):
                raise ValueError(wrong[0])
        lacking = self.loss_names - state['totals'].keys()
        if state['batch'] and lacking:
            raise ValueError(f'it has no sum of the loss term {min(lacking)}')
        if state['batch'] > self.batches:
            raise ValueError(f'batch {state["batch"]} of {self.batches} in an epoch')

    def save(self, best=False):
        """Writes the checkpoint and keeps the previous one; with `best`, also writes the best model."""
        self.check_last()
        if not self.place.main:
            return
        state = self.state()
        unsound = next(checkpoint.not_finite(state), None)
        if unsound:
            raise UserError(f'{unsound} is not finite after {self.epoch} epochs and {self.batch} batches; nothing was '
                            'saved, the last checkpoint is kept. Try a lower --lr or --precision fp32')
        # A damaged file must not replace the copy from which this run resumed.
        checkpoint.save(state, self.folder / LATEST, previous=self.folder / PREVIOUS if self.sound else None,
                        best=self.folder / BEST if best else None)
        self.written, self.sound = time.monotonic(), True

    def save_when_due(self):
        """Writes a checkpoint within the epoch if --checkpoint-minutes have passed since the last."""
        minutes = self.options.checkpoint_minutes
        if self.place.main and minutes is not None and time.monotonic() - self.written >= 60 * minutes:
            self.save()
