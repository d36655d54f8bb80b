"""The released recipe reproduces the published models and loops.

Checks every entry of the JSON file that RELEASED_NUMBERS names (default: the copy
next to this test), with the same functions that train.py uses.
"""
import copy
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mdil import train
from mdil.models import build_model
from mdil.models.checkpoint import network_of
from mdil.models.layouts import published_keys, recognise
from mdil.training import building
from mdil.training.options import recipe_settings
from mdil.utils.parallel import Place
from tests.fill import fill, inputs, rule, rule_state

HERE = Path(__file__).parent
NUMBERS = json.loads(Path(os.environ.get('RELEASED_NUMBERS', HERE / 'released_numbers.json')).read_text())
RELATIVE = 1e-4


def summary(tensor):
    """Mean, mean absolute value and standard deviation in float64."""
    x = tensor.detach().double()
    return [x.mean().item(), x.abs().mean().item(), x.std().item()]


def close(got, wanted, scale=None):
    """Whether `got` is within the tolerance of `wanted`, relative to `scale` (default: wanted itself)."""
    return abs(got - wanted) <= RELATIVE * max(abs(wanted), scale or 0, 1e-6)


def check_summary(tensor, wanted, what):
    """A mean near 0 is a sum of cancelling terms: its error is relative to the mean absolute value."""
    for got, want in zip(summary(tensor), wanted):
        assert close(got, want, scale=wanted[1]), f'{what}: {summary(tensor)} instead of {wanted}'


def check_logits(logits, entry):
    assert list(logits.shape) == entry['shape']
    check_summary(logits, entry['mean_absmean_std'], 'logits')
    for place, want in entry['samples'].items():
        got = logits[tuple(int(i) for i in place.split(','))].item()
        assert close(got, want, scale=entry['mean_absmean_std'][1]), f'{place}: {got} instead of {want}'


@pytest.mark.parametrize('entry', NUMBERS['rap'], ids=lambda e: '-'.join(map(str, e['classes'])))
def test_adapter_model(entry):
    model = fill(build_model(entry['classes'])).eval()
    assert sum(p.numel() for p in model.parameters()) == entry['parameters']
    for wanted in entry['logits']:
        batch, _, height, width = wanted['shape']
        images, _ = inputs(entry['seed'], batch, height, width, 2)
        with torch.no_grad():
            check_logits(model(images, wanted['domain']), wanted)


def baseline(entry):
    """(method, classes, number of the head) that a baseline's description names."""
    text = entry['model']
    if text.startswith('single-task'):
        return 'single-task', entry.get('classes', [entry['shape'][1]]), 0
    if text.startswith('multi-task'):
        classes = entry.get('classes', [20, 20, 27])
        return 'multi-task', classes, len(classes) - 1 - classes[::-1].index(entry['shape'][1])
    step = int(re.search(r'step (\d+)', text).group(1))
    head = re.search(r'step \d+, (?:(first|second|third) )?(old|new) head', text)
    number = step - 1 if head.group(2) == 'new' else ('first', 'second', 'third').index(head.group(1) or 'first')
    return 'fine-tune', entry.get('classes', [20, 20, 27][:step]), number


@pytest.mark.parametrize('entry', NUMBERS['baselines'], ids=lambda e: e['model'].split(' (')[0])
def test_baseline(entry):
    """The published key names are filled by the rule, then loaded as a published file is."""
    method, classes, number = baseline(entry)
    ours = build_model(classes, method).state_dict()
    published = published_keys(ours, classes, None, multi_task=method == 'multi-task')
    state = rule_state({name.removeprefix('module.'): value.shape for name, value in published.items()})
    assert len(state) == entry['n_keys']
    model = network_of(recognise(state, 'file'), method, 'file').eval()
    assert sum(p.numel() for p in model.parameters()) == entry['parameters']
    batch, _, height, width = entry['shape']
    images, _ = inputs(entry.get('seed', 7), batch, height, width, 2)
    with torch.no_grad():
        check_logits(model(images, number), entry)


def released_run(entry):
    """What train.py builds for a step with the released recipe, weights by the rule, dropout 0."""
    classes = entry['classes']
    two = entry['optimizer_steps_per_batch'] == 2
    settings = {**recipe_settings('released', [f'd{i}' for i in range(len(classes))]), 'steps_per_batch': 2 if two else 1,
                'teacher_mode': 'train' if two else 'eval', 'lambdac': entry['lambda']}
    options = SimpleNamespace(domains=[f'd{i}' for i in range(len(classes))], method='ours', lr=5e-4, shared_lr=5e-6,
                              precision='fp32', parallel='none', compile=False, network='erfnet', height=32, width=64, sync_bn=False, cuda_graphs=False,
                              distill_domains=None, no_dropout=False, **settings)
    student = fill(build_model(classes[:-1]))
    teacher = copy.deepcopy(student)
    new = student.add_domain(classes[-1], options.new_statistics)
    with torch.no_grad():
        for name, value in student.single(new).decoder.output_conv.named_parameters():
            value.copy_(rule(f'decoder.{new}.output_conv.{name}', value.shape))
    for block in [*student.modules(), *teacher.modules()]:
        if isinstance(block, torch.nn.Dropout2d):
            block.p = 0.0
    weights = torch.linspace(1, 2, classes[-1])
    weights[-1] = 0
    building.freeze(student, options)
    place = Place(torch.device('cpu'))
    terms = building.build_terms(options)
    run = SimpleNamespace(options=options, place=place, student=student, teacher=teacher, terms=terms,
                          step_loss=building.build_step_loss(student, teacher, [weights] * len(classes), terms, options,
                                                             place),
                          scaler=torch.amp.GradScaler('cpu', enabled=False))
    run.optimizer, _ = building.build_optimizer(student, options)
    return run


def measured(entry, noise=None):
    """{quantity: (values, scale)} of a step, its images multiplied by 1 + 1e-7 of normal noise of a seed."""
    run, classes = released_run(entry), entry['classes']
    size = entry['batch'], entry['height'], entry['width'], classes[-1]
    random = noise and torch.Generator().manual_seed(noise)
    result = {}
    run.step_loss.train()
    for iteration in range(entry['iterations']):
        images, labels = inputs(entry['seed'] + iteration, *size)
        if noise:
            images = images * (1 + 1e-7 * torch.randn(images.shape, generator=random))
        got = train.train_batch(run, images, labels, len(classes) - 1)
        result[f'ce, kd of iteration {iteration}'] = [got['ce'].item(), got['kd'].item()]
    run.student.eval()
    images, _ = inputs(entry['seed'] + 100, *size)
    with torch.no_grad():
        for domain in range(len(classes)):
            result[f'logits of domain {domain}'] = summary(run.student(images, domain))
    state = run.student.state_dict()
    return {**result, **{name: summary(state[name]) for name in entry['tensors_mean_absmean_std']}}


def referenced(entry):
    """The reference's {quantity: values}, in the terms of `measured`."""
    return {**{f'ce, kd of iteration {i}': pair for i, pair in enumerate(entry['ce_kd_per_iteration'])},
            **{f'logits of domain {d}': v for d, v in enumerate(entry['eval_logits_mean_absmean_std_per_domain'])},
            **entry['tensors_mean_absmean_std']}


@pytest.mark.parametrize('entry', NUMBERS['steps'],
                         ids=lambda e: f'{"-".join(map(str, e["classes"]))}-{e["optimizer_steps_per_batch"]}')
def test_training_step(entry):
    """Within 1e-4 plus what rounding alone does to the quantity.

    A convolution's bias before a batch norm has zero gradient but for rounding; Adam
    turns the sign of that into full steps, and logits in eval mode feel them: noise of
    1e-7 on the images moves those of the new domain by up to 1e-2. So the same step is
    taken thrice with such noise, and three times the largest change is allowed on top.
    """
    plain, noisy = measured(entry), [measured(entry, noise) for noise in (1, 2, 3)]
    for name, wanted in referenced(entry).items():
        scale = [abs(v) for v in wanted] if name.startswith('ce') else [wanted[1]] * 3
        for i, want in enumerate(wanted):
            spread = max(abs(other[name][i] - plain[name][i]) for other in noisy)
            allowed = RELATIVE * scale[i] + 3 * spread
            assert abs(plain[name][i] - want) <= allowed, f'{name}: {plain[name]} instead of {wanted}, +- {allowed}'
