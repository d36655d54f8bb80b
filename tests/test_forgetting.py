"""The comparison of sequences and the variants that it tries: sharing, resuming, arithmetic, corrections."""
import copy
import json
import math

import numpy as np
import pytest
import torch

import train
from benchmarks import forgetting, sequences, variants
from datasets.toy_roads import write_toy_roads
from models import build_model
from models.erfnet import batch_norms_of
from tests.fill import fill, inputs
from utils import checkpoint, resume
from utils.errors import UserError
from utils.records import read_metrics

IMAGES, _ = inputs(3, 2, 32, 64, 8)
SMALL = ['--height', '32', '--batch-size', '2', '--class-weights', 'none', '--device', 'cpu', '--num-workers', '0']


@pytest.fixture(scope='module')
def roads(tmp_path_factory):
    """Toy roads: 4 training and 2 validation images of each domain, 32 x 64."""
    root = tmp_path_factory.mktemp('roads')
    write_toy_roads(root, train=4, val=2, height=32, width=64, seed=2)
    return root


def options_of(folder, *arguments, root='data'):
    return forgetting.parse(['--out', str(folder), '--data-root', str(root), '--epochs', '1', '--seeds', '0',
                             '--orders', 'CS BDD IDD', *SMALL, *arguments])


def last_steps(options):
    """{row name: Step of the last state}."""
    return {name: states[-1].step for (_, name, _), states in sequences.plan(options).items()}


def test_equal_steps_are_one_step_whatever_rows_they_are_of(tmp_path):
    options = options_of(tmp_path, '--rows', 'ours', 'adapters-only', 'shared-lr-5e-6', 'single-task', 'fine-tune',
                         'lwf')
    steps = sequences.steps_of(sequences.plan(options))
    names = [(len(step.domains), step.method) for step in steps]
    assert sorted(names) == sorted([(1, 'ours'), (1, 'single-task'), (1, 'single-task'), (1, 'single-task')] + [
        (count, method) for count in (2, 3) for method in ('ours', 'adapters-only', 'fine-tune', 'lwf')])
    assert len({step.folder(options) for step in steps}) == len(steps)
    assert all(step.before is None or steps.index(step.before) < number for number, step in enumerate(steps))


def test_an_order_shares_single_and_multi_task_runs_with_another(tmp_path):
    options = options_of(tmp_path, '--rows', 'single-task', 'multi-task', '--orders', 'CS BDD', 'BDD CS')
    assert len(sequences.steps_of(sequences.plan(options))) == 3


def test_a_step_is_another_after_another_step_or_with_other_options(tmp_path):
    last = last_steps(options_of(tmp_path, '--rows', 'ours', 'adapters-only-augmented-first', 'averaged-5e-4', 'lambdac-1', 'features-encoder-5e-4'))
    assert len(set(last.values())) == 5
    options = options_of(tmp_path)
    assert len({step.folder(options) for step in last.values()}) == 5
    assert last['adapters-only-augmented-first'].before.key == last['ours'].before.key and last['averaged-5e-4'].start.after == 'average'


def test_a_difference_that_a_step_of_the_released_recipe_has_not_is_no_other_step(tmp_path):
    """In step 2 of the published loops the teacher is in eval mode anyway."""
    rows = ['--rows', 'released', 'released-teacher-mode-eval', 'released-put-back']
    two, three = (last_steps(options_of(tmp_path, *rows, '--steps', count)) for count in '23')
    assert len(set(two.values())) == 1 and len(set(three.values())) == 2


@pytest.mark.parametrize('arguments, line', [
    (['--epochs', 'CS=2'], '--epochs says nothing of BDD'), (['--epochs', 'CS=x'], "'CS=x' is neither"),
    (['--orders', 'CS Mars'], 'Mars'), (['--rows', 'theirs'], 'released-put-back'),
    (['--rows', 'ours', '--curves', 'x.png'], '--rows leaves them out'),
    (['--rows', 'ours', '--steps', '1', '--figure', 'x.png'], 'no order'), (['--orders', ' '], 'empty order')])
def test_bad_options_are_one_line(tmp_path, arguments, line):
    with pytest.raises(UserError, match=line):
        sequences.plan(options_of(tmp_path, *arguments))


def test_epochs_are_of_the_domain_learnt(tmp_path):
    last = last_steps(options_of(tmp_path, '--rows', 'ours', 'multi-task', '--epochs', 'CS=5', '3', 'IDD=4'))
    assert {name: dict(step.key)['num_epochs'] for name, step in last.items()} == {'ours': '4', 'multi-task': '3'}


def test_units_count_teacher_and_old_branches(tmp_path):
    last = last_steps(options_of(tmp_path, '--rows', 'ours', 'fine-tune', 'lwf', 'multi-task', 'adapters-only'))
    assert {name: forgetting.units(step) for name, step in last.items()} == {
        'ours': 11, 'fine-tune': 3, 'lwf': 11, 'multi-task': 3, 'adapters-only': 3}
    assert forgetting.units(last['ours'].before) == 7
    assert forgetting.units(last_steps(options_of(tmp_path, '--rows', 'distill-domains-1'))['distill-domains-1']) == 7
    added = lambda name: forgetting.added(last[name], sequences.ROWS[name], options_of(tmp_path))
    assert added('ours') == sum(p.numel() for p in build_model([20, 20, 27]).branch_parameters(2))
    copies = sequences.ROWS['fine-tune-copies']
    assert forgetting.added(last['fine-tune'], copies, options_of(tmp_path)) == sum(
        p.numel() for p in build_model([27], 'single-task').parameters())
    assert forgetting.added(last['ours'], sequences.ROWS['own-late'], options_of(tmp_path)) == added('ours') + 788_480


def test_copies_keep_what_each_domain_had_when_learnt():
    steps = [{'CS': 40.0}, {'CS': 30.0, 'BDD': 50.0}, {'CS': 20.0, 'BDD': 44.0, 'IDD': 60.0}]
    assert forgetting.kept(steps) == [{'CS': 40.0}, {'CS': 40.0, 'BDD': 50.0}, {'CS': 40.0, 'BDD': 50.0, 'IDD': 60.0}]


def test_figures_of_a_hand_made_sequence(tmp_path):
    order = 'cityscapes', 'BDD', 'IDD'
    found = {(order, 'ours', seed): [{'cityscapes': 40.0 + seed}, {'cityscapes': 30.0, 'BDD': 50.0},
                                     {'cityscapes': 20.0, 'BDD': 44.0, 'IDD': 60.0}] for seed in (0, 2)}
    found.update({(order, 'single-task', seed): [{'cityscapes': 40.0, 'BDD': 40.0, 'IDD': 50.0}] for seed in (0, 2)})
    rows = forgetting.all_figures(found)[order]
    assert rows['ours'][0]['forgetting'] == {'cityscapes': 20.0, 'BDD': 6.0}
    assert rows['ours'][0]['new'] == 55.0 and rows['ours'][0]['delta_m'] == pytest.approx((-50 + 10 + 20) / 3)
    costs = {name: {'added_parameters': 5e5, 'units': 11, 'images_per_second': 2.0} for name in rows}
    options = options_of(tmp_path, '--seeds', '0', '2')
    assert forgetting.summary_table(order, rows, costs, options).groups[0] == [
        ['ours', '20.00 +- 0.00', '44.00 +- 0.00', '60.00 +- 0.00', f'21.00 +- {math.sqrt(2):.2f}', '6.00 +- 0.00',
         '55.00 +- 0.00', '-6.67 +- 0.00', '0.50', '11', '2.0'],
        ['single-task', '40.00 +- 0.00', '40.00 +- 0.00', '50.00 +- 0.00', '-', '-', '45.00 +- 0.00', '0.00 +- 0.00',
         '0.50', '11', '2.0']]
    second = forgetting.step_table(order, rows, options).groups[0][1]
    assert second == ['ours, 2', '30.00 +- 0.00', '50.00 +- 0.00', '-']
    del rows['ours'][2]
    shown = forgetting.summary_table(order, rows, costs, options).groups[0][0]
    assert shown[0] == 'ours (1 of 2 seeds)' and shown[1] == '20.00'


@pytest.fixture
def trained_here(monkeypatch):
    """Has steps be trained in this process; call it with a list for the commands, and what failing ones name."""
    monkeypatch.setattr(resume.Interrupt, '__enter__', lambda self: self)     # signals are the main thread's alone
    return lambda calls, failing='': monkeypatch.setattr(sequences, 'start', trained_in(calls, failing))


def trained_in(calls, failing):
    """A stand-in for `sequences.start`."""
    class Process:
        def __init__(self, command, log):
            calls.append(command)
            self.status = int(bool(failing) and any(failing in part for part in command))
            if self.status:
                log.write('error: no luck\n')
                log.flush()
            elif '-m' in command:
                variants.main(command[command.index('-m') + 2:])
            else:
                train.main(command[2:])

        def wait(self):
            return self.status

        terminate = wait
    return Process


def run(folder, roads, *arguments):
    return forgetting.main(['--out', str(folder / 'runs'), '--data-root', str(roads), '--orders', 'CS BDD',
                            '--seeds', '0', '--epochs', '1', '--limit-batches', '1', *SMALL, *arguments])


def test_whole_sequences_are_learnt_once_and_tabled(roads, tmp_path, trained_here, monkeypatch, capsys):
    calls, rows = [], ['single-task', 'ours', 'released', 'released-put-back', 'compensated-5e-4', 'warm-start-5e-4', 'fine-tune-copies']
    trained_here(calls)
    files = [text for option, name in (('--json', 'f.json'), ('--markdown', 'f.md'), ('--curves', 'f.svg'), ('--figure', 'g.svg'))
             for text in (option, str(tmp_path / name))]
    assert run(tmp_path, roads, '--rows', *rows, *files) is None
    # two single-task, the first of ours, and ours, released, 5e-4, warm start, fine-tune: the rest is of the same
    assert len(calls) == 8
    result = json.loads((tmp_path / 'f.json').read_text())['orders']['cityscapes BDD']
    assert list(result) == rows and result['ours']['cost']['units'] == 7
    put_back, plain = (result[name]['seeds']['0']['steps'] for name in ('released-put-back', 'released'))
    assert put_back[0] == plain[0] == result['ours']['seeds']['0']['steps'][0]
    assert put_back[1]['BDD'] == plain[1]['BDD']
    assert result['single-task']['seeds']['0']['delta_m'] == 0
    copies = result['fine-tune-copies']
    assert copies['seeds']['0']['forgetting'] == {'cityscapes': 0} and copies['cost']['added_parameters'] > 2e6
    assert all(f'<!-- {name} -->' in (tmp_path / 'g.svg').read_text() for name in rows)
    assert 'BDD' in (tmp_path / 'f.svg').read_text() and '| compensated-5e-4 |' in (tmp_path / 'f.md').read_text()
    shown = capsys.readouterr().out
    monkeypatch.setattr(forgetting.Evaluator, 'score', None)        # nothing is evaluated again
    assert run(tmp_path, roads, '--rows', *rows, *files) is None and len(calls) == 8
    assert capsys.readouterr().out.splitlines()[-10:] == shown.splitlines()[-10:]


def test_every_row_of_the_figure_has_a_marker():
    from matplotlib.figure import Figure
    axis = Figure().subplots()
    for marker in forgetting.MARKERS:
        assert axis.errorbar(1, 1, 0, 0, f'C1{marker}').lines[0].get_marker() == marker


def test_a_failing_step_names_its_log_and_the_others_finish(roads, tmp_path, trained_here, capsys):
    calls = []
    trained_here(calls, failing='single-task')
    assert run(tmp_path, roads, '--rows', 'fine-tune', 'ours', '--steps', '1') == 1
    output = capsys.readouterr()
    assert 'log.txt: error: no luck' in output.err and len(calls) == 2
    assert 'ours, 1' in output.out and 'fine-tune, 1' not in output.out
    trained_here(calls)
    assert run(tmp_path, roads, '--rows', 'fine-tune', 'ours', '--steps', '1') is None and len(calls) == 3


def test_the_command_of_a_step_names_the_state_it_starts_from(tmp_path):
    options = options_of(tmp_path, '--rows', 'averaged-5e-4', 'warm-start-5e-4', '--steps', '2', '--which', 'best', '--cache', 'c')
    averaged, warm = (sequences.command(step, options) for step in last_steps(options).values())
    assert averaged[1].endswith('train.py') and averaged[averaged.index('--state') + 1].endswith('/model_best.pth.tar')
    assert warm[1:6] == ['-m', 'benchmarks.variants', '--warm-start', '3', '--'] and '--resume' in warm and 'c' in warm


def pair(seed=0):
    """(network of the step before, that of two domains after it), with all tensors moved."""
    previous = fill(build_model([8]))
    current = copy.deepcopy(previous)
    current.add_domain(8)
    torch.manual_seed(seed)
    with torch.no_grad():
        for tensor in current.state_dict().values():
            if tensor.is_floating_point():
                tensor.mul_(1 + 0.1 * torch.rand_like(tensor))
    return previous.eval(), current.eval()


def test_put_back_gives_the_old_domains_the_buffers_they_had_and_changes_nothing_else():
    previous, current = pair()
    before = copy.deepcopy(current.state_dict())
    variants.put_back(previous, current, IMAGES)
    moved = {name for name, value in current.state_dict().items() if not torch.equal(value, before[name])}
    assert moved and all('running' in name for name in moved)
    for norm, kept in zip(batch_norms_of(current.branch(0)), batch_norms_of(previous.branch(0))):
        assert all(map(torch.equal, norm.buffers(), kept.buffers()))
    assert not any(torch.equal(norm.running_mean, kept.running_mean) for norm, kept in zip(
        batch_norms_of(current.branch(1)), batch_norms_of(previous.branch(0))))


def test_averaging_moves_the_shared_weights_halfway_back_and_no_branch():
    previous, current = pair()
    before = copy.deepcopy(current)
    variants.average_shared(previous, current, IMAGES)
    for after, new, old in zip(*(network.shared_parameters() for network in (current, before, previous))):
        assert torch.allclose(after, (new + old) / 2, atol=1e-7)
    for domain in (0, 1):
        assert all(map(torch.equal, current.branch_parameters(domain), before.branch_parameters(domain)))


def test_compensation_changes_nothing_where_the_shared_weights_did_not_move():
    previous = fill(build_model([8])).eval()
    current = copy.deepcopy(previous)
    current.add_domain(8)
    before = copy.deepcopy(current.state_dict())
    variants.compensate(previous, current, IMAGES)
    assert all(torch.equal(value, before[name]) for name, value in current.state_dict().items())


def test_compensation_brings_old_outputs_nearer_and_normalises_as_before():
    previous, current = pair()
    frozen = dict(previous.state_dict())
    with torch.no_grad():       # the old branch as it was, the shared weights moved
        for tensor, kept in zip(current.branch_parameters(0), previous.branch_parameters(0)):
            tensor.copy_(kept)
    variants.put_back(previous, current, IMAGES)
    wanted = previous(IMAGES, 0)
    before = (current(IMAGES, 0) - wanted).abs().mean()
    new = copy.deepcopy(list(current.branch_parameters(1)))
    variants.compensate(previous, current, IMAGES)
    assert (current(IMAGES, 0) - wanted).abs().mean() < 0.6 * before
    assert all(map(torch.equal, current.branch_parameters(1), new))
    assert all(torch.equal(value, frozen[name]) for name, value in previous.state_dict().items())
    assert all(norm.track_running_stats for norm in batch_norms_of([current, previous]))


def test_feature_distance_is_in_units_of_the_teachers_variance():
    teacher = torch.randn(2, 3, 8, 8) * torch.tensor([1.0, 10.0, 0.1])[:, None, None]
    deviation = teacher.std(dim=(0, 2, 3), unbiased=False, keepdim=True)
    assert variants.feature_distance(teacher + deviation, teacher) == pytest.approx(1, rel=1e-4)
    assert variants.feature_distance(teacher, teacher) == 0


@pytest.mark.parametrize('place', ['encoder', 'decoder'])
def test_features_come_with_the_networks_own_logits(place):
    network = fill(build_model([8])).eval()
    found, logits = variants.features(network, IMAGES, 0, place)
    assert torch.allclose(logits, network(IMAGES, 0), atol=1e-5)
    assert found.shape == {'encoder': (2, 128, 4, 8), 'decoder': (2, 16, 16, 32)}[place]


def test_strong_augmentation_is_drawn_by_sample_and_moves_image_and_label_together(roads):
    from datasets import get_domain
    make = lambda kind, split='train': kind(get_domain('BDD'), roads, split, (32, 64), split == 'train', 5)
    data, plain = make(variants.StrongDataset), make(variants.SegmentationDataset)
    (image, label, number), again = data[3, 1], data[3, 1]
    assert torch.equal(image, again[0]) and torch.equal(label, again[1]) and number == 1
    assert image.dtype == label.dtype == torch.uint8 and image.shape == (3, 32, 64) and label.shape == (32, 64)
    assert not torch.equal(image, plain[3, 1][0]) and not torch.equal(image, data[4, 1][0])
    assert set(label.unique().tolist()) <= {*plain[3, 1][1].unique().tolist(), 19}
    assert torch.equal(make(variants.StrongDataset, 'val')[0, 1][0], make(variants.SegmentationDataset, 'val')[0, 1][0])


@pytest.mark.parametrize('seed', range(6))
def test_rescaling_moves_label_and_image_alike(seed):
    """An image that is its label, in every channel: away from its edges it stays so."""
    label = torch.full((64, 128), 3, dtype=torch.uint8)
    label[16:48, 32:96] = 200
    image, moved = variants.rescaled(label.expand(3, -1, -1), label, np.random.default_rng(seed), 19)
    alike = (image[0].int() - moved.int()).abs() < 2
    assert (alike | (moved == 19)).float().mean() > 0.9 and (moved == 200).any()


@pytest.fixture(scope='module')
def first(roads, tmp_path_factory):
    """The checkpoint of a first step."""
    folder = tmp_path_factory.mktemp('first')
    train.main(['--domains', 'CS', '--savedir', str(folder), *train_arguments(roads)])
    return folder / 'checkpoint.pth.tar'


def train_arguments(roads, epochs=1):
    return ['--data-root', str(roads), '--num-epochs', str(epochs), '--limit-batches', '2', '--lr', '1e-3',
            '--val-every', str(epochs), *SMALL]


def learn(roads, first, folder, *options, epochs=1):
    """state_dict after a second step with the variant `options`."""
    variants.main([*options, '--', '--method', 'ours', '--domains', 'CS', 'BDD', '--state', str(first), '--savedir', str(folder),
                   '--resume', '--shared-lr', '1e-4', *train_arguments(roads, epochs)])
    return checkpoint.read(folder / 'checkpoint.pth.tar')['state_dict']


SHARED = 'encoder.layers.1.conv3x1_1.weight'


def test_variants_change_what_they_should(roads, first, tmp_path):
    start = checkpoint.read(first)['state_dict'][SHARED]
    plain = learn(roads, first, tmp_path / 'plain')
    assert not torch.equal(plain[SHARED], start)
    warm = learn(roads, first, tmp_path / 'warm', '--warm-start', '1')
    assert torch.equal(warm[SHARED], start)
    new, old = (warm[f'encoder.layers.1.parallel_conv_1.{domain}.weight'] for domain in (1, 0))
    assert not torch.equal(new, old)
    for place in ('encoder', 'decoder'):
        held = learn(roads, first, tmp_path / place, '--feature-distillation', '5', '--feature-place', place)
        assert not torch.equal(held[SHARED], plain[SHARED])
        held, free = (read_metrics(tmp_path / name)[0]['train']['kd'] for name in (place, 'plain'))
        assert held > 1e-4 > free
    few = learn(roads, first, tmp_path / 'few', '--learn-shared', r'encoder\.layers\.1\.conv3x1_1')
    moved = {name for name, value in checkpoint.read(first)['state_dict'].items() if not torch.equal(value, few[name])}
    assert moved == {SHARED, SHARED.replace('weight', 'bias')}
    strong = learn(roads, first, tmp_path / 'strong', '--strong-augmentation')
    assert not torch.equal(strong['decoder.1.output_conv.weight'], plain['decoder.1.output_conv.weight'])
    assert all(torch.equal(strong[name], plain[name]) for name in plain if name.startswith('decoder.0.'))


def test_the_moving_average_is_saved_and_survives_an_interruption(roads, first, tmp_path, monkeypatch):
    whole = learn(roads, first, tmp_path / 'whole', '--ema', '0.5', epochs=2)
    content = checkpoint.read(tmp_path / 'whole' / 'checkpoint.pth.tar')
    assert all(torch.equal(value, content['ema'][name]) for name, value in whole.items())
    real = train.finish_epoch

    def stopped(run, *rest):
        real(run, *rest)
        raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(variants.train, 'finish_epoch', stopped)
        learn(roads, first, tmp_path / 'broken', '--ema', '0.5', epochs=2)
    with pytest.raises(UserError, match='begun with other options'):
        learn(roads, first, tmp_path / 'broken', '--ema', '0.6', epochs=2)
    record = tmp_path / 'broken' / variants.RECORD      # as an earlier version, without a later option, left it
    known = json.loads(record.read_text())
    assert known.pop('learn_shared') is None
    record.write_text(json.dumps(known))
    resumed = learn(roads, first, tmp_path / 'broken', '--ema', '0.5', epochs=2)
    assert all(torch.equal(value, whole[name]) for name, value in resumed.items())


def test_the_training_is_itself_again_after_a_variant(roads):
    before = train.train_batch, train.Run, variants.building.Task
    options, _ = variants.parse(['--ema', '0.9', '--warm-start', '1', '--feature-distillation', '1', '--'])
    with variants.changed_training(options):
        assert train.Run is variants.AveragedRun
    assert before == (train.train_batch, train.Run, variants.building.Task)


@pytest.mark.parametrize('arguments, line', [([], 'come after --'), (['--ema', '1', '--'], 'not below 1')])
def test_bad_variants_are_one_line(arguments, line):
    with pytest.raises(UserError, match=line):
        variants.main(arguments)
