"""Learns one step of a sequence of domains.

    python train.py --domains cityscapes --savedir runs/1
    python train.py --domains cityscapes BDD --state runs/1/model_best.pth.tar --savedir runs/2
    python train.py --domains cityscapes BDD IDD --state runs/2/model_best.pth.tar --savedir runs/3

The last of --domains is learnt; the checkpoint in --state must contain the others. The options
are listed by `python train.py --help`; README.md explains the method. One optimisation step is
`train_batch`, below.
"""
import contextlib
import itertools
import sys
import time
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from mdil.evaluation import tables
from mdil.evaluation.dashboard import Dashboard
from mdil.evaluation.evaluation import evaluate
from mdil.evaluation.scalars import Scalars
from mdil.models import unchanged
from mdil.training import domain_data, records, resume
from mdil.training.options import parse_train
from mdil.training.plan import plan_step
from mdil.training.run import BEST, LATEST, PREVIOUS, Run, check_kept, remove_results, results_in
from mdil.training.step_loss import mean_over_batch, optimizer_steps
from mdil.utils.errors import UserError, counted, run_main
from mdil.utils.files import new_folder
from mdil.utils.graphs import graphed
from mdil.utils.parallel import agreed, broadcast_buffers, reduced, session, sharing, tell


def train_batch(run, images, labels, domain):
    """Trains on a batch of domain number `domain` (None: mixed); returns {'loss' and each term's name: value}, 0-d.

    loss = sum of weight * term, by default ce + lambda * kd: the cross-entropy of the new
    domain, plus the distances to the teacher in the branches of the old domains. Takes one
    optimiser step on the loss, or one on each term. images (B, 3, H, W) uint8 and labels
    (B, H, W) uint8 are on the device; nothing here waits for it. Fused optimisers skip a step if the loss
    so far is not finite.
    """
    values = {term.name: 0.0 for term in run.terms}
    for parts in optimizer_steps(run):
        run.optimizer.zero_grad(set_to_none=True)
        learns = False
        for number, (term, part, factor) in enumerate(parts, 1):
            with reduced(run.step_loss, last=number == len(parts)):
                value, whole = mean_over_batch(run.step_loss(images, labels, domain, term.name, part), run.place)
                if value.requires_grad:
                    run.scaler.scale(term.weight * factor * value).backward()
                    learns = True
            values[term.name] = values[term.name] + factor * whole
        loss = sum(term.weight * values[term.name] for term in run.terms)
        if learns:
            if run.optimizer.defaults['fused']:       # the optimiser skips its step if found_inf is 1
                run.optimizer.found_inf = (~torch.isfinite(loss)).float()
            run.scaler.step(run.optimizer)
            run.scaler.update()
    return {'loss': loss, **{name: torch.as_tensor(value) for name, value in values.items()}}


def batches(run):
    """The rest of the epoch: for each batch its parts, [(DomainData, what its loader yields), ...].

    A batch has one part, the trained domains taking turns, or in mixed batches one of every domain.
    """
    rounds = ([*zip(run.trained, of_each)] for of_each in zip(*(data.train for data in run.trained)))
    found = rounds if run.plan.mixed else ([part] for parts in rounds for part in parts)
    return itertools.islice(found, run.batch % run.plan.turns, None)


def train_epoch(run, interrupt):
    """Trains for the rest of the epoch; returns images per second, or None if none were left.

    Saves and exits on a signal.
    """
    run.start_epoch()
    step = graphed(partial(train_batch, run), run.place)
    images_seen, start = 0, time.perf_counter()
    bar = tqdm(total=run.batches, initial=run.batch, unit='batch', leave=False,
               desc=f'epoch {run.epoch + 1}/{run.options.num_epochs}', disable=None if run.place.main else True)
    with bar:
        for parts in batches(run):
            images, labels, domain = domain_data.joined(parts, run.options.seed, run.epoch + 1, run.place)
            losses = step(images, labels, domain)
            images_seen += len(images) * run.place.world
            rate = images_seen / (time.perf_counter() - start)
            bar.update()
            if run.last and not bar.disable:        # shows the previous batch: the GPU is still working on this one
                shown = ', '.join(f'{name} {tables.number(value, 3)}' for name, value in run.last.losses.read().items())
                best = tables.number(run.best if run.epoch else None)
                bar.set_postfix_str(f'{shown}, best mIoU {best}, {rate:.1f} images/s')
            run.add(losses, parts)
            if interrupt.stop():
                save_and_stop(run, f'after batch {run.batch}')
            run.save_when_due()
    run.check_last()
    return images_seen / (time.perf_counter() - start) if images_seen else None


def save_and_stop(run, when):
    """Saves the run, to be resumed from here, and exits with the status of an interrupted run."""
    run.save()
    if run.place.main:
        print(f'stopped by a signal {when} of epoch {run.epoch + 1}; saved; continue with --resume, or run the '
              'script again', file=sys.stderr)
    sys.exit(resume.INTERRUPTED)


def validate(run):
    """{domain: {'loss', 'miou'}} of every domain whose validation images are available."""
    broadcast_buffers(run.student, run.place)
    results = {}
    for data in run.data:
        if data.val is not None:    # a loader without images on this rank is false, too
            score = evaluate(run.student, data.index, data.val, data.class_weights, run.place,
                             run.options.precision, data.domain.name)
            if not score.matrix[:-1].any():
                raise UserError(f'no pixel that is not void in the val images of {data.domain.name}; see '
                                f'python -m mdil check --domains {data.domain.name}')
            results[data.domain.name] = {'loss': score.loss, 'miou': score.miou(run.options.published_metric)}
    return results


def validate_when_due(run, interrupt):
    """The result of `validate`, or {} in an epoch without validation. Saves and exits on a signal."""
    epoch = run.epoch + 1
    if epoch % run.options.val_every and epoch not in (1, run.options.num_epochs):
        return {}
    try:
        # Several processes must stop together, which they can agree on only after the next batch.
        with interrupt.at_once() if run.place.world == 1 else contextlib.nullcontext():
            return validate(run)
    except resume.Stopped:
        save_and_stop(run, 'during the validation')


def finish_epoch(run, rate, displays, interrupt):
    """Validates, decays the learning rate, writes metrics and checkpoints, and prints the results."""
    lr, total = run.schedule.get_last_lr()[-1], run.options.num_epochs
    val = validate_when_due(run, interrupt)
    losses = run.end_epoch()
    miou = records.mean_miou({'val': val}, run.learnt) if val else float('-inf')
    better = miou > run.best
    if better:
        run.best = miou
    if run.place.main:
        # Every line of metrics.jsonl has 'kd', even if the step does not distil.
        train = {**losses, 'kd': losses.get('kd', 0.0), **({'images_per_second': rate} if rate is not None else {})}
        line = {'epoch': run.epoch, 'train': train, 'val': val, 'lr': lr}
        records.append_metrics(run.folder, line)
    run.save(best=better)
    if run.place.main:
        for display in displays:
            display.show(line, run)
        scores = ', '.join(f'{name} {entry["miou"]:.2f}' for name, entry in val.items()) or 'not validated'
        shown = ', '.join(f'{name} {tables.fine(value)}' for name, value in losses.items())
        print(f'epoch {run.epoch}/{total}: {shown}; {tables.number(rate, 1)} images/s, mIoU: {scores}', flush=True)


def find_saved(options):
    """The checkpoint that --resume continues from, or None."""
    if not options.resume:
        return None
    folder = Path(options.savedir)
    # Of an epoch, a run writes metrics, BEST and LATEST, in that order; in the first, there is no older LATEST.
    first = len(records.read_metrics(folder)) == 1
    saved = resume.find(folder, (LATEST, PREVIOUS, *[BEST] * first))
    if saved is None:
        found = results_in(folder)
        if found and not (first and found == ['metrics.jsonl']):
            raise UserError(f'--resume: {options.savedir} holds {", ".join(found)} but no {LATEST} to continue from; '
                            'use another --savedir, or start from scratch with --overwrite')
        tell(f'--resume: no checkpoint in {options.savedir}, starting from scratch')
    else:
        resume.check_options(saved, options)
    return saved


def begin(options, place, saved):
    """(Run, [objects that display its records]), new or resumed from the checkpoint `saved`.

    Writes the run's options and prints what it trains.
    """
    run = Run(options, place, saved)
    if not place.main:
        return run, []
    if options.overwrite:
        remove_results(run.folder)
    if saved is None:
        old = options.domains[:-1] if plan_step(options).from_previous else []
        unchanged.begin(run.folder, run.student, old, options.state)
    records.keep_metrics(run.folder, run.epoch)
    records.write_options(run.folder, options, place, [data.class_weights for data in run.data])
    name = f', {options.model_name_suffix}' if options.model_name_suffix else ''
    print(f'learning {", ".join(run.learnt)} ({options.method}, {options.network}{name}) at '
          f'{options.width}x{options.height} on {place.device}: {run.loaded}')
    shared = sharing(run.step_loss, place, options.batch_size, options.sync_bn, run.plan.domains_per_batch)
    if shared:
        print(shared)
    for data in run.trained:
        print(f'{data.domain.name}: {len(data.train.dataset)} training pairs, {len(data.val.dataset)} to validate '
              '(python -m mdil check reads every file)', flush=True)
    return run, [Dashboard(options), *([Scalars(options, run.epoch)] if options.tensorboard else [])]


def learn(options, place, watchers=()):
    """Learns the step from its start, or from where it stopped; watchers: see `learn_step`."""
    with resume.Interrupt(place) as interrupt:
        with interrupt.at_once():
            saved = find_saved(options)
            if not agreed([saved['epoch'], saved['batch']] if saved else [-1, -1], place):
                raise UserError(f'--savedir {options.savedir}: the processes find different checkpoints there; use a '
                                'folder that all machines share')
            if saved and saved['epoch'] >= options.num_epochs:
                if place.main:
                    print(f'{options.savedir}: already finished after {counted(saved["epoch"], "epoch")}')
                return
            run, displays = begin(options, place, saved)
        while run.epoch < options.num_epochs:
            rate = train_epoch(run, interrupt)
            finish_epoch(run, rate, [*displays, *watchers], interrupt)
        if place.main:
            print(*(f'old domain {line}' for line in unchanged.end(run.folder, run.student)),
                  records.closing_line(run.folder, run.learnt), sep='\n')


def learn_step(options, watchers=()):
    """Learns the step that `options`, as completed by the parser, describe.

    watchers: objects whose `show(line, run)` is called after each epoch with its line of metrics.jsonl.
    """
    check_kept(options)
    with session(options.device, options.parallel, options.precision, options.cuda_graphs) as place:
        with (new_folder('--savedir', options.savedir, [resume.LOCK]) as folder,
              resume.lock(folder) if place.main else contextlib.nullcontext()):
            if place.main:
                check_kept(options)     # another run may have ended in between
            learn(options, place, watchers)


def main(argv=None):
    learn_step(parse_train(argv))


if __name__ == '__main__':
    run_main(main)
