"""Learns one step of a sequence of domains.

    python train.py --domains cityscapes --savedir runs/1
    python train.py --domains cityscapes BDD --state runs/1/model_best.pth.tar --savedir runs/2
    python train.py --domains cityscapes BDD IDD --state runs/2/model_best.pth.tar --savedir runs/3

The last of --domains is learnt, --state knows the others. `python train.py --help` lists
everything; README.md tells the story. One optimisation step is `train_batch`, below.
"""
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from utils import building, checkpoint, records
from utils.dashboard import Dashboard
from utils.errors import UserError, run_main
from utils.evaluation import evaluate
from utils.options import parse_train
from utils.parallel import broadcast_buffers, session


class Run:
    """Everything that a training step consists of, and how far it is."""

    def __init__(self, options, place):
        building.seed_everything(options.seed)
        self.options, self.place = options, place
        self.feeds = building.build_feeds(options, place)
        self.student, teacher, self.loaded = building.build_networks(options, [f.domain for f in self.feeds])
        building.freeze(self.student, options)
        self.student.to(place.device)
        self.task = building.build_task(self.student, teacher, self.feeds, options, place)
        self.teacher = teacher
        self.optimizer, self.schedule = building.build_optimizer(self.student, options)
        self.scaler = torch.amp.GradScaler(place.device.type, enabled=options.precision == 'fp16')
        self.parts = building.loss_parts(options, teacher)
        self.epoch, self.best = 0, float('-inf')

    def state(self):
        """The checkpoint dict: tensors and built-in types only."""
        return {
            'version': checkpoint.VERSION, 'epoch': self.epoch, 'state_dict': self.student.state_dict(),
            'domains': [{'name': f.domain.name, 'classes': f.domain.num_classes} for f in self.feeds],
            'method': self.options.method, 'best_acc': self.best, 'optimizer': self.optimizer.state_dict(),
            'scheduler': self.schedule.state_dict(), 'scaler': self.scaler.state_dict(),
            'teacher': self.teacher and self.teacher.state_dict(), 'options': vars(self.options),
            'random': {'torch': torch.get_rng_state(), 'cuda': torch.cuda.get_rng_state_all()}}

    def restore(self, state):
        """Goes on from `state`, a dict that `state()` made with the same options."""
        self.student.load_state_dict(state['state_dict'])
        if self.teacher is not None:
            self.teacher.load_state_dict(state['teacher'])
        self.optimizer.load_state_dict(state['optimizer'])
        self.schedule.load_state_dict(state['scheduler'])
        self.scaler.load_state_dict(state['scaler'])
        torch.set_rng_state(state['random']['torch'])
        if self.place.device.type == 'cuda':
            torch.cuda.set_rng_state_all(state['random']['cuda'])
        self.epoch, self.best = state['epoch'], state['best_acc']


def train_batch(run, images, labels, number):
    """One batch of domain `number`: a step on the loss, or one on each term; returns its parts."""
    seen = {}
    for part in run.parts:
        run.optimizer.zero_grad(set_to_none=True)
        losses = {name: value.mean() for name, value in run.task(images, labels, number, part).items()}
        if not torch.isfinite(losses['loss']):
            raise UserError(f'the loss is {losses["loss"].item()}; weights and checkpoint are those of before. '
                            'Try a lower --lr or --precision fp32')
        run.scaler.scale(losses['loss']).backward()
        run.scaler.step(run.optimizer)
        run.scaler.update()
        seen['loss'] = seen.get('loss', 0) + losses.pop('loss').detach()
        seen.update({name: value.detach() for name, value in losses.items()})
    seen.setdefault('kd', torch.zeros_like(seen['ce']))
    return seen


def train_epoch(run):
    """One pass over the data; returns mean losses and images per second."""
    feeds = [feed for feed in run.feeds if feed.train]
    device = run.place.device
    for feed in feeds:
        feed.train.batch_sampler.epoch = run.epoch
    run.task.train()
    total, images_seen, batches, start = {}, 0, 0, time.perf_counter()
    bar = tqdm(total=len(feeds) * len(feeds[0].train), desc=f'epoch {run.epoch}/{run.options.num_epochs}',
               leave=False, disable=None if run.place.main else True, unit='batch')
    for batches_of_all in zip(*(feed.train for feed in feeds)):
        for feed, (images, labels, _) in zip(feeds, batches_of_all):
            losses = train_batch(run, images.to(device, non_blocking=True), labels.to(device, non_blocking=True),
                                 feed.number)
            total = {name: total.get(name, 0) + value for name, value in losses.items()}
            images_seen, batches = images_seen + len(images) * run.place.world, batches + 1
            bar.update()
            if not bar.disable:
                rate = images_seen / (time.perf_counter() - start)
                bar.set_postfix_str(f'loss {losses["loss"].item():.3f}, best mIoU {run.best:.2f}, {rate:.1f} images/s')
    bar.close()
    means = {name: value.item() / batches for name, value in total.items()}
    return {**means, 'images_per_second': images_seen / (time.perf_counter() - start)}


def validate(run):
    """{domain: {'loss', 'miou'}} of every domain whose validation images are at hand."""
    broadcast_buffers(run.student, run.place)
    results = {}
    for feed in run.feeds:
        if feed.val:
            score = evaluate(run.student, feed.number, feed.val, feed.weights, run.place,
                             run.options.precision, feed.domain.name)
            results[feed.domain.name] = {'loss': score.loss, 'miou': score.miou(run.options.published_metric)}
    return results


def finish_epoch(run, train, dashboard):
    """Validates, decays the rate, writes metrics and checkpoints."""
    options = run.options
    due = run.epoch % options.val_every == 0 or run.epoch == options.num_epochs
    val = validate(run) if due else {}
    line = {'epoch': run.epoch, 'train': train, 'val': val, 'lr': run.schedule.get_last_lr()[-1]}
    run.schedule.step()
    learnt = [val[feed.domain.name]['miou'] for feed in run.feeds if feed.train] if val else []
    better = bool(learnt) and sum(learnt) / len(learnt) > run.best
    if better:
        run.best = sum(learnt) / len(learnt)
    if not run.place.main:
        return
    folder = Path(options.savedir)
    if better:
        checkpoint.save(run.state(), folder / 'model_best.pth.tar')
    records.append_metrics(folder, line)
    checkpoint.save(run.state(), folder / 'checkpoint.pth.tar')
    dashboard.show(line)
    scores = ', '.join(f'{name} {entry["miou"]:.2f}' for name, entry in val.items()) or 'not validated'
    print(f'epoch {run.epoch}/{options.num_epochs}: loss {train["loss"]:.4f} (ce {train["ce"]:.4f}, '
          f'kd {train["kd"]:.4f}), {train["images_per_second"]:.1f} images/s, mIoU: {scores}', flush=True)


def prepare_folder(run):
    """Makes --savedir ready: goes on from its checkpoint under --resume, else starts fresh."""
    folder = Path(run.options.savedir)
    latest = folder / 'checkpoint.pth.tar'
    if run.options.resume and latest.exists():
        run.restore(checkpoint.read(latest))
        run.loaded = f'resumed from {latest} after epoch {run.epoch}'
    elif run.options.resume:
        run.loaded += f'\n--resume: no {latest}, starting fresh'
    if run.place.main:
        folder.mkdir(parents=True, exist_ok=True)
        records.keep_metrics(folder, run.epoch)
        records.write_options(folder, run.options, run.place, [feed.weights for feed in run.feeds])
        print(f'learning {run.options.domains[-1]} ({run.options.method}) on {run.place.device}: {run.loaded}')


def main(argv=None):
    options = parse_train(argv)
    with session(options.device, options.parallel) as place:
        run = Run(options, place)
        prepare_folder(run)
        dashboard = Dashboard(options) if place.main else None
        while run.epoch < options.num_epochs:
            run.epoch += 1
            train = train_epoch(run)
            finish_epoch(run, train, dashboard)


if __name__ == '__main__':
    run_main(main)
