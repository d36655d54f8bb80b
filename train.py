"""Learns one step of a sequence of domains.

    python train.py --domains cityscapes --savedir runs/1
    python train.py --domains cityscapes BDD --state runs/1/model_best.pth.tar --savedir runs/2
    python train.py --domains cityscapes BDD IDD --state runs/2/model_best.pth.tar --savedir runs/3

The last of --domains is learnt, --state knows the others. `python train.py --help` lists
everything; README.md tells the story. One optimisation step is `train_batch`, below.
"""
import contextlib
import itertools
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from mdil.evaluation.dashboard import Dashboard
from mdil.evaluation.evaluation import evaluate
from mdil.training import building, records, resume
from mdil.training.options import parse_train
from mdil.training.run import LATEST, PREVIOUS, Run
from mdil.training.task import drawn
from mdil.utils.errors import UserError, run_main
from mdil.utils.parallel import broadcast_buffers, reduced, session


class NotFinite(ArithmeticError):
    """The loss is NaN or infinite; no weight has been touched."""


def train_batch(run, images, labels, number):
    """One batch of domain `number`: a step on the loss, or one on each of its terms; returns {'loss', 'ce', 'kd'}.

    loss = ce + lambda * kd: the new domain's cross-entropy, and the sum of the distances to
    the teacher in the branches of the old domains. images (B, 3, H, W) uint8, labels
    (B, H, W) uint8; raises NotFinite.
    """
    options, seen = run.options, {'ce': 0.0, 'kd': 0.0}
    weights = {'ce': 1.0, 'kd': options.lambdac}
    olds, scale = drawn(run.old, options.distill_domains)
    for terms in [[*olds, None]] if options.steps_per_batch == 1 or not olds else [[None], olds]:
        run.optimizer.zero_grad(set_to_none=True)
        learns = False
        for old in terms:
            name, factor = ('ce', 1.0) if old is None else ('kd', scale)
            with reduced(run.task, last=old == terms[-1]):
                value = factor * run.task(images, labels, number, old).mean()
                if value.requires_grad:
                    run.scaler.scale(weights[name] * value).backward()
                    learns = True
            seen[name] = seen[name] + value.detach()
        loss = seen['ce'] + options.lambdac * seen['kd']
        if not torch.isfinite(loss):
            raise NotFinite(loss.item())
        if learns:
            run.scaler.step(run.optimizer)
            run.scaler.update()
    return {'loss': loss, **{name: torch.as_tensor(value) for name, value in seen.items()}}


def batches(run):
    """(feed, batch) of the rest of the epoch, the learnt domains in turn."""
    rounds = zip(*(feed.train for feed in run.learnt))
    in_turn = itertools.chain.from_iterable(zip(run.learnt, batch_of_each) for batch_of_each in rounds)
    return itertools.islice(in_turn, run.batch % len(run.learnt), None)


def train_epoch(run, interrupt):
    """The rest of the epoch; returns images per second. Saves and exits on a signal."""
    run.start_epoch()
    images_seen, start = 0, time.perf_counter()
    bar = tqdm(total=len(run.learnt) * len(run.learnt[0].train), initial=run.batch, unit='batch', leave=False,
               desc=f'epoch {run.epoch + 1}/{run.options.num_epochs}', disable=None if run.place.main else True)
    with bar:
        for feed, batch in batches(run):
            images, labels = building.on_device(feed, batch, run.options.seed, run.epoch + 1, run.place)
            try:
                losses = train_batch(run, images, labels, feed.number)
            except NotFinite as error:
                pairs = feed.train.dataset.pairs
                files = ', '.join(str(pairs[number % len(pairs)].image) for number in batch[2].tolist())
                raise UserError(f'the loss is {error} in epoch {run.epoch + 1}; no weight was touched and the last '
                                f'checkpoint is kept. Try a lower --lr or --precision fp32. Batch: {files}') from None
            run.totals = {name: run.totals.get(name, 0) + value.double() for name, value in losses.items()}
            run.batch += 1
            images_seen += len(images) * run.place.world
            rate = images_seen / (time.perf_counter() - start)
            bar.update()
            if not bar.disable:
                bar.set_postfix_str(f'loss {losses["loss"].item():.3f}, best mIoU {run.best:.2f}, {rate:.1f} images/s')
            if interrupt.stop(run.place):
                run.save()
                print(f'stopped by a signal after batch {run.batch} of epoch {run.epoch + 1}; saved, go on with '
                      '--resume', file=sys.stderr)
                sys.exit(resume.INTERRUPTED)
            run.save_when_due()
    return rate if images_seen else 0.0


def validate(run):
    """{domain: {'loss', 'miou'}} of every domain whose validation images are at hand."""
    broadcast_buffers(run.student, run.place)
    results = {}
    for feed in run.feeds:
        if feed.val:
            score = evaluate(run.student, feed.number, feed.val, feed.weights, run.place,
                             run.options.precision, feed.domain.name)
            if not score.matrix[:-1].any():
                raise UserError(f'no pixel that is not void in the val images of {feed.domain.name}; see '
                                f'python -m datasets.check --domains {feed.domain.name}')
            results[feed.domain.name] = {'loss': score.loss, 'miou': score.miou(run.options.published_metric)}
    return results


def finish_epoch(run, rate, dashboard):
    """Validates, decays the rate, writes metrics and checkpoints."""
    lr, total = run.schedule.get_last_lr()[-1], run.options.num_epochs
    train = {**run.end_epoch(), 'images_per_second': rate}
    val = validate(run) if run.epoch % run.options.val_every == 0 or run.epoch == total else {}
    learnt = [val[feed.domain.name]['miou'] for feed in run.learnt] if val else []
    better = bool(learnt) and sum(learnt) / len(learnt) > run.best
    if better:
        run.best = sum(learnt) / len(learnt)
    if run.place.main:
        line = {'epoch': run.epoch, 'train': train, 'val': val, 'lr': lr}
        records.append_metrics(run.folder, line)
        dashboard.show(line, run)
        scores = ', '.join(f'{name} {entry["miou"]:.2f}' for name, entry in val.items()) or 'not validated'
        print(f'epoch {run.epoch}/{total}: loss {train["loss"]:.4f} (ce {train["ce"]:.4f}, kd {train["kd"]:.4f}), '
              f'{rate:.1f} images/s, mIoU: {scores}', flush=True)
    run.save(best=better)


def find_saved(options):
    """The checkpoint to go on from under --resume, or None."""
    if not options.resume:
        return None
    saved = resume.find(Path(options.savedir), (LATEST, PREVIOUS))
    if saved is None:
        print(f'--resume: nothing in {options.savedir}, starting fresh')
    else:
        resume.check_options(saved, options)
    return saved


def learn(options, place):
    """Learns the step, from its start or from where it stopped."""
    saved = find_saved(options)
    if saved and saved['epoch'] >= options.num_epochs:
        print(f'{options.savedir}: already finished after {saved["epoch"]} epochs')
        return
    with resume.Interrupt() as interrupt:
        run = Run(options, place, saved)
        dashboard = None
        if place.main:
            records.keep_metrics(run.folder, run.epoch)
            records.write_options(run.folder, options, place, [feed.weights for feed in run.feeds])
            print(f'learning {options.domains[-1]} ({options.method}) on {place.device}: {run.loaded}')
            for feed in run.learnt:
                print(f'{feed.domain.name}: {len(feed.train.dataset)} training pairs, {len(feed.val.dataset)} to validate; '
                      f'python -m datasets.check --domains {feed.domain.name} reads every file', flush=True)
            dashboard = Dashboard(options)
        while run.epoch < options.num_epochs:
            rate = train_epoch(run, interrupt)
            finish_epoch(run, rate, dashboard)


def main(argv=None):
    options = parse_train(argv)
    with session(options.device, options.parallel) as place:
        folder = records.make_folder(options.savedir)
        with resume.lock(folder) if place.main else contextlib.nullcontext():
            learn(options, place)


if __name__ == '__main__':
    run_main(main)
