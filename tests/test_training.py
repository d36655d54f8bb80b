"""One training step of every method: what must move moves, what is frozen stays to the last bit."""
import contextlib
import copy
from types import SimpleNamespace

import pytest
import torch

from mdil import train
from mdil.datasets import get_domain
from mdil.losses.terms import CrossEntropy, MixedCrossEntropy
from mdil.models import METHODS, build_model
from mdil.models.methods import Method
from mdil.models.multi_domain import PartByPart, batch_norms_of
from mdil.models.networks import DEFAULT as ERFNET
from mdil.training import building, domain_data
from mdil.training.options import parse_train
from mdil.training.plan import plan_step
from mdil.training.run import Run
from mdil.training.schedules import one_cycle
from mdil.utils.errors import UserError
from mdil.utils.parallel import Place
from tests.fill import fill, inputs

IMAGES, LABELS = inputs(3, 2, 32, 64, 12)
SEQUENTIAL = [name for name, row in METHODS.items() if not (row.joint or row.one_domain)]


def run_of(method, *arguments):
    """A run that is to learn camvid after idd-lite."""
    options = parse_train(['--domains', 'idd-lite', 'camvid', '--state', 'x', '--savedir', 'x', '--method', method,
                           *arguments])
    torch.manual_seed(0)
    student = fill(build_model([8], method))
    teacher = copy.deepcopy(student) if plan_step(options).needs_teacher else None
    student.add_domain(12, options.new_statistics, options.new_decoder)
    building.freeze(student, options)
    weights = torch.tensor([1.0] * 11 + [0.0])
    terms, place = building.build_terms(options), Place(torch.device('cpu'))
    run = SimpleNamespace(
        options=options, place=place, student=student, teacher=teacher, terms=terms,
        scaler=torch.amp.GradScaler('cpu', enabled=False),
        step_loss=building.build_step_loss(student, teacher, [weights] * 2, terms, options, place))
    run.optimizer, _ = building.build_optimizer(student, options)
    return run


def step_of(method, *arguments):
    """(run, state before, state after) of two batches."""
    run = run_of(method, *arguments)
    before = copy.deepcopy(run.student.state_dict())
    run.step_loss.train()
    for _ in range(2):
        train.train_batch(run, IMAGES, LABELS, 1)
    return run, before, run.student.state_dict()


def branch_keys(student, domain):
    """State-dict keys of a domain's branch."""
    ids = {id(tensor) for module in student.branch(domain)
           for tensor in module.state_dict(keep_vars=True).values()}
    return {key for key, tensor in student.state_dict(keep_vars=True).items() if id(tensor) in ids}


def changed(before, after):
    return {key for key in before if not torch.equal(before[key], after[key])}


@pytest.mark.parametrize('method', SEQUENTIAL)
def test_frozen_is_frozen_and_the_rest_learns(method):
    """Buffers included: running statistics of the old branch must not move by a bit."""
    run, before, after = step_of(method)
    old, new = branch_keys(run.student, 0), branch_keys(run.student, 1)
    shared = before.keys() - old - new
    moved = changed(before, after)
    assert not moved & old, sorted(moved & old)
    assert new <= moved, sorted(new - moved)
    if METHODS[method].shared != 'frozen':
        assert shared <= moved, sorted(shared - moved)
        return
    assert not moved & shared, sorted(moved & shared)
    assert not any(parameter.requires_grad for parameter in run.student.shared_parameters())
    old = copy.deepcopy(run.student)
    old.load_state_dict(before)
    with torch.no_grad():
        assert torch.equal(run.student.eval()(IMAGES, 0), old.eval()(IMAGES, 0))


def test_released_recipe_overwrites_the_old_statistics_and_nothing_else_of_the_old_branch():
    """Fault 1 of the published loops: 117 buffers change although every old parameter is frozen."""
    run, before, after = step_of('mdil', '--recipe', 'released')
    moved = changed(before, after) & branch_keys(run.student, 0)
    assert len(moved) == 117
    assert all(key.endswith(('running_mean', 'running_var', 'num_batches_tracked')) for key in moved)


def test_batch_statistics_without_update():
    """--old-bn batch: the old branch's outputs follow the batch, its buffers stay."""
    run, before, after = step_of('mdil', '--old-bn', 'batch')
    assert not changed(before, after) & branch_keys(run.student, 0)
    for block in run.student.modules():
        if isinstance(block, torch.nn.Dropout2d):
            block.p = 0.0
    with torch.no_grad():
        assert not torch.allclose(run.student.train()(IMAGES, 0), run.student.eval()(IMAGES, 0))


def test_published_feature_extraction_moves_the_encoders_statistics_and_drops_out():
    """As --recipe released, or --frozen-encoder train alone: 87 buffers, those of 29 batch norms; no weight."""
    for arguments in (('--recipe', 'released'), ('--frozen-encoder', 'train')):
        run, before, after = step_of('feature-extraction', *arguments)
        moved = changed(before, after) - branch_keys(run.student, 1)
        assert len(moved) == 87 and all(key.startswith('encoder.') and '.bn' in key for key in moved)
        assert all(key.endswith(('running_mean', 'running_var', 'num_batches_tracked')) for key in moved)
        with torch.no_grad():
            assert not torch.equal(run.student.train()(IMAGES, 1), run.student.train()(IMAGES, 1))


def test_new_branch_trains_with_dropout_and_the_old_one_without():
    run = run_of('mdil')
    run.student.train()
    with torch.no_grad():
        assert torch.equal(run.student(IMAGES, 0), run.student(IMAGES, 0))
        assert not torch.equal(run.student(IMAGES, 1), run.student(IMAGES, 1))


def test_teacher_mode_and_steps_are_options_of_their_own():
    run, _, _ = step_of('mdil', '--teacher-mode', 'train', '--steps-per-batch', '2')
    assert run.step_loss.teacher.training
    run.step_loss.eval()
    assert not run.step_loss.teacher.training
    steps = [int(state['step']) for state in run.optimizer.state.values()]
    assert max(steps) == 4 and min(steps) == 2      # shared weights step on both terms


@pytest.mark.parametrize('method, arguments, drops', [
    ('mdil', (), True), ('mdil', ('--no-dropout',), False), ('adapters-only', (), False),
    ('adapters-only', ('--dropout',), True)])
def test_dropout_is_the_methods_unless_said(method, arguments, drops):
    run = run_of(method, *arguments)
    run.student.train()
    with torch.no_grad():
        torch.manual_seed(1)
        one, other = run.student(IMAGES, 1), run.student(IMAGES, 1)
    assert torch.equal(one, other) is not drops


def test_the_first_step_is_learnt_alike_by_methods_of_one_network():
    first = [vars(parse_train(['--domains', 'CS', '--savedir', 'x', '--method', method])) for method in ('mdil', 'adapters-only')]
    differing = {name for name in first[0] if first[0][name] != first[1][name]}
    assert differing == {'method', 'shared_lr'} and first[0]['lr'] == 5e-4 and not first[0]['no_dropout']


@pytest.mark.parametrize('method, arguments, shared, branch', [
    ('mdil', (), 5e-6, 5e-4), ('mdil', ('--shared-lr', '1e-5'), 1e-5, 5e-4),
    ('mdil', ('--lr', '1e-3', '--shared-lr', '0'), None, 1e-3), ('adapters-only', (), None, 1e-3)])
def test_rates(method, arguments, shared, branch):
    run = run_of(method, *arguments)
    rates = {group['name']: group['lr'] for group in run.optimizer.param_groups}
    assert rates == ({'shared': shared, 'branch': branch} if shared else {'branch': branch})


def test_multi_task_scales_the_encoders_rate_and_takes_a_batch_of_each_in_turn(toy):
    """Every image of the largest domain once; the smaller one again from its start."""
    options = parse_train(['--domains', 'CS', 'IDD', '--method', 'multi-task', '--savedir', 'x', '--data-root', str(toy),
                           '--height', '32', '--batch-size', '3', '--num-workers', '0', '--class-weights', 'none'])
    student = build_model([20, 27], 'multi-task')
    building.freeze(student, options)
    rates = {group['name']: group['lr'] for group in building.parameter_groups(student, options)}
    assert rates == {'shared': 2.5e-4, 'branch': 5e-4}
    told = parse_train(['--domains', 'CS', 'IDD', '--method', 'multi-task', '--savedir', 'x', '--shared-lr', '1e-3'])
    assert [group['lr'] for group in building.parameter_groups(student, told)] == [1e-3, 5e-4]
    told.shared_lr = 0.0
    assert plan_step(told).shared_frozen and plan_step(told).trained == (0, 1)
    data = domain_data.build_data(options, Place(torch.device('cpu')))
    data[0].train.dataset.pairs = data[0].train.dataset.pairs[:3]
    data[0].train.batch_sampler.count = 3
    seen = [part for part, in train.batches(SimpleNamespace(trained=data, batch=0, plan=plan_step(options)))]
    assert [one.index for one, _ in seen] == [0, 1] * 3
    sizes = [3, 8]
    indices = [sorted(number % sizes[n] for one, batch in seen if one.index == n for number in batch[2].tolist())
               for n in (0, 1)]
    assert indices[1] == list(range(8)) and len(indices[0]) == 8 and set(indices[0]) == {0, 1, 2}


def test_joint_training_with_domain_batch_norms_moves_those_of_the_batchs_domain_alone():
    student = build_model([20, 27], 'multi-task-domain-bn')
    own = [[norm.running_mean for norm in batch_norms_of([student.single(domain)])] for domain in (0, 1)]
    before = [[mean.clone() for mean in means] for means in own]
    student.train()(torch.rand(2, 3, 32, 64), 1)
    changed = [[not torch.equal(mean, old) for mean, old in zip(means, olds)] for means, olds in zip(own, before)]
    assert not any(changed[0]) and all(changed[1])
    assert len(student.shared_parameters()) and student.views[0].encoder.initial_block.conv is student.views[1].encoder.initial_block.conv


MIXED = '--domains CS IDD --method multi-task-mixed --savedir x --device cpu --height 32 --class-weights none --num-workers 0'.split()


def test_mixed_batches_have_as_many_images_of_every_domain(toy):
    """8 of the larger domain, 3 of the smaller, which starts over; the shared weights learn at the full rate."""
    options = parse_train([*MIXED, '--data-root', str(toy), '--batch-size', '4'])
    assert options.shared_lr == options.lr
    place = Place(torch.device('cpu'))
    data = domain_data.build_data(options, place)
    data[0].train.dataset.pairs = data[0].train.dataset.pairs[:3]
    data[0].train.batch_sampler.count = 3
    seen = list(train.batches(SimpleNamespace(trained=data, batch=0, plan=plan_step(options))))
    assert [[entry.index for entry, _ in parts] for parts in seen] == [[0, 1]] * 4
    numbers = [[number % size for parts in seen for number in parts[index][1][2].tolist()] for index, size in enumerate((3, 8))]
    assert sorted(numbers[1]) == list(range(8)) and len(numbers[0]) == 8 and set(numbers[0]) == {0, 1, 2}
    images, labels, domain = domain_data.joined(seen[0], 0, 1, place)
    (_, (first, of_first, _)), (_, (second, of_second, _)) = seen[0]
    assert torch.equal(images, torch.cat([first, second])) and torch.equal(labels, torch.cat([of_first, of_second]))
    assert domain is None and domain_data.joined(seen[0][:1], 0, 1, place)[2] == 0
    run = Run.__new__(Run)
    run.data, run.plan, run.place, run.batch, run.totals, run.last, run.epoch = data, plan_step(options), place, 0, {}, None, 0
    assert run.batches == 4
    run.add({'loss': torch.tensor(float('nan'))}, seen[0])
    with pytest.raises(UserError) as error:
        run.check_last()
    assert [str(error.value).count(folder) for folder in ('/cityscapes/', '/IDD_Segmentation/')] == [2, 2]


def test_each_part_of_a_mixed_batch_is_augmented_by_its_domain(toy):
    """On the device as in the loaders: the void of what a shift uncovers is that of the image's domain."""
    labels = []
    for where in ('workers', 'device'):
        options = parse_train([*MIXED, '--data-root', str(toy), '--batch-size', '8', '--augment', where])
        place = Place(torch.device('cpu'))
        data = domain_data.build_data(options, place)
        parts = next(train.batches(SimpleNamespace(trained=data, batch=0, plan=plan_step(options))))
        labels.append(domain_data.joined(parts, options.seed, 1, place)[1])
    assert torch.equal(*labels) and (labels[0][:4] == 19).any() and (labels[0][4:] == 26).any()


def test_mixed_batches_divide_among_processes_and_domains():
    with pytest.raises(UserError, match='--batch-size 5 is not a multiple of 2: .* 2 domains share each batch; use 6$'):
        parse_train([*MIXED, '--batch-size', '5'])
    with pytest.raises(UserError, match='does not divide among 2 processes with images of 2 domains each; use 4$'):
        domain_data.check_batch_size(parse_train([*MIXED, '--batch-size', '2']), Place(torch.device('cpu'), 0, 2))


def test_a_mixed_batch_with_one_image_of_each_domain_suits_some_networks():
    """MobileNet's shared norms see three images then, DeepLab's pooled ones, in the head, one."""
    sampler = SimpleNamespace(fewest=1, samples=8)
    data = [SimpleNamespace(index=index, train=SimpleNamespace(batch_sampler=sampler)) for index in range(3)]
    arguments = [*MIXED, '--domains', 'CS', 'BDD', 'IDD', '--batch-size', '3', '--width', '32', '--network']
    for network, fits in (('lraspp_mobilenet_v3_large', True), ('deeplabv3_mobilenet_v3_large', False)):
        options = parse_train([*arguments, network])
        student = build_model([20, 20, 27], options.method, network)
        with contextlib.nullcontext() if fits else pytest.raises(
                UserError, match='has one image of each domain at 32x32 .* at least 6 per device that does not leave one'):
            building.check_batches(student, data, options, 1)


def test_terms_for_mixed_batches_go_together_in_a_joint_method():
    for given, message in (({'joint': True, 'terms': (CrossEntropy, MixedCrossEntropy)}, 'CrossEntropy: mixed is False'),
                           ({'terms': (MixedCrossEntropy,)}, 'need a joint method')):
        with pytest.raises(ValueError, match=message):
            Method('', **given)


def test_part_by_part_hands_on_what_is_not_a_tensor_and_refuses_unequal_parts():
    class Scaled(torch.nn.Module):
        def forward(self, maps, factor):
            return maps['fine'] * factor + maps['coarse'][0]

    joined = PartByPart([Scaled(), Scaled()])
    one, other = torch.rand(4, 3), torch.rand(4, 3)
    assert torch.equal(joined({'fine': one, 'coarse': [other]}, 2), one * 2 + other)
    with pytest.raises(RuntimeError):
        joined({'fine': one[:3], 'coarse': [other[:3]]}, 2)


@pytest.mark.parametrize('method, network', [('multi-task-mixed', ERFNET), ('multi-task-adapters', ERFNET),
                                             ('multi-task-mixed', 'lraspp_mobilenet_v3_large')])
def test_a_mixed_view_is_the_view_of_each_images_domain(method, network):
    """Also with batch norms and adapters of each domain's own, and a head that takes several feature maps."""
    torch.manual_seed(0)
    model = build_model([20, 27, 12], method, network).eval().double()
    images = torch.rand(6, 3, 32, 64, dtype=torch.double)
    view = model.mixed()
    assert {id(tensor) for tensor in view.parameters()} == {id(tensor) for tensor in model.parameters()}
    found = view(images)
    assert found.shape == (6, 27, 32, 64)
    for domain, count in enumerate(model.num_classes):
        part = slice(2 * domain, 2 * domain + 2)
        torch.testing.assert_close(found[part, :count], model(images[part], domain))
        assert not found[part, count:].any()


def test_a_mixed_batch_is_normalised_as_a_whole_and_judged_by_domain():
    """Cross-entropy over all pixels, each with its domain's classes and weights; --no-dropout holds in the mixed view, too."""
    options = parse_train([*MIXED, '--batch-size', '4', '--no-dropout'])
    torch.manual_seed(0)
    student = build_model([20, 27], options.method)
    building.freeze(student, options)
    weights, place = [torch.rand(20), torch.rand(27)], Place(torch.device('cpu'))
    run = SimpleNamespace(options=options, student=student, terms=building.build_terms(options))
    loss = building.build_step_loss(student, None, weights, run.terms, options, place).double()
    run.terms[0].setup(run)
    images, labels = torch.rand(4, 3, 32, 64).double(), torch.randint(20, (4, 32, 64), dtype=torch.uint8)
    convolution = student.views[0].encoder.initial_block
    seen = []
    convolution.bn.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach()))
    total, mass = loss.train()(images, labels, None)[0]
    assert [len(batch) for batch in seen] == [4]
    torch.testing.assert_close(convolution.bn.running_mean, 0.1 * seen[0].mean((0, 2, 3)))
    again = loss(images, labels, None)[0, 0]
    assert torch.equal(total, again)
    weights = [loss.class_weights(index) for index in (0, 1)]
    mixed = student.mixed()(images)
    want = sum(torch.nn.functional.cross_entropy(mixed[2 * index:2 * index + 2, :len(weight)], labels[2 * index:2 * index + 2].long(),
                                                 weight, reduction='sum') for index, weight in enumerate(weights))
    torch.testing.assert_close(total, want)
    torch.testing.assert_close(mass, weights[0][labels[:2].long()].sum() + weights[1][labels[2:].long()].sum())


def test_multi_task_rounds_are_the_published_number():
    """2,975, 7,000 and 6,993 training images in batches of 6: 496 rounds, of which Cityscapes' last has 5 images."""
    counts = 2975, 7000, 6993
    of = lambda rounds, method='multi-task': [domain_data.epoch_samples(SimpleNamespace(
        rounds=rounds, batch_size=6, method=method, domains='CS BDD IDD'.split(), shared_lr=None), count, counts) for count in counts]
    assert of('smallest') == [2975, 2976, 2976] and of('largest') == [7000] * 3
    assert of('smallest', 'multi-task-mixed') == [2975] * 3 and of('largest', 'multi-task-mixed') == [7000] * 3


def test_optimiser_and_schedule_are_the_published_ones():
    run = run_of('mdil', '--num-epochs', '10')
    optimizer, schedule = building.build_optimizer(run.student, run.options)
    settings = [(group['betas'], group['eps'], group['weight_decay']) for group in optimizer.param_groups]
    assert type(optimizer) is torch.optim.Adam and settings == [((0.9, 0.999), 1e-8, 1e-4)] * 2
    for epoch in range(1, 11):
        assert optimizer.param_groups[1]['lr'] == pytest.approx(5e-4 * (1 - (epoch - 1) / 10) ** 0.9)
        optimizer.step()
        schedule.step()


def test_one_cycle_rises_for_a_quarter_of_the_epochs_and_falls_after_it():
    run = run_of('mdil', '--num-epochs', '8', '--schedule', 'one-cycle')
    optimizer, schedule = building.build_optimizer(run.student, run.options)
    seen = []
    for _ in range(8):
        seen.append(optimizer.param_groups[1]['lr'] / 5e-4)
        optimizer.step()
        schedule.step()
    assert seen == pytest.approx([1 / 3, 2 / 3, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
    assert [one_cycle(0, 1), one_cycle(0, 3)] == [1, 1]      # too few to rise


def test_a_step_that_nothing_learns_from_is_left_out():
    """fp16's scaler refuses to step where no gradient was seen."""
    run, _, _ = step_of('mdil', '--recipe', 'released', '--shared-lr', '0', '--steps-per-batch', '2')
    assert {int(state['step']) for state in run.optimizer.state.values()} == {2}


def test_no_teacher_without_distillation():
    assert run_of('adapters-only').step_loss.teacher is None
    assert run_of('mdil', '--lambdac', '0').step_loss.teacher is None
    assert run_of('mdil', '--shared-lr', '0').step_loss.teacher is None


def test_a_loss_that_is_not_finite_touches_no_weight():
    """Nor Adam's moments: the next batch trains as if there had been none."""
    runs = [step_of('mdil')[0] for _ in range(2)]
    before = copy.deepcopy(runs[0].student.state_dict())
    loss = train.train_batch(runs[0], IMAGES * float('nan'), LABELS, 1)['loss']
    assert loss.isnan()
    after = runs[0].student.state_dict(keep_vars=True)
    assert all(torch.equal(before[name], value) for name, value in after.items() if value.requires_grad)
    first, second = (run.optimizer.state_dict()['state'] for run in runs)
    assert all(torch.equal(value, second[index][name]) for index in first for name, value in first[index].items())


def test_a_later_step_at_another_size_is_said(capsys):
    known = SimpleNamespace(content={'options': {'height': 16, 'width': 32}})
    building.note_size(SimpleNamespace(state='1.pth', height=512, width=1024), known)
    assert 'trains at 1024x512, but 1.pth was trained at 32x16; --height 16 --width 32 keeps that' in capsys.readouterr().err
    building.note_size(SimpleNamespace(state='1.pth', height=16, width=32), known)
    assert not capsys.readouterr().err


def test_the_missing_encoder_of_a_first_step_says_where_it_is():
    options = parse_train('--domains cityscapes --state no.pth --savedir x --device cpu'.split())
    with pytest.raises(UserError, match='--state no.pth does not exist; README.md says where to get the encoder'):
        building.build_networks(options, [get_domain('cityscapes')])
