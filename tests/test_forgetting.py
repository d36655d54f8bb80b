"""The comparison of sequences: rows, sharing, resuming, arithmetic, statistics put back."""
import json
import math

import pytest

from mdil.benchmarks import forgetting, scoring, sequence_tables, sequences
from mdil.datasets.toy.roads import write_toy_roads
from mdil.models import build_model
from mdil.utils.errors import UserError

pytestmark = pytest.mark.usefixtures('shallow_module')

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
    return {name: steps[-1] for (_, name, _), steps in sequences.plan(options).items()}


def test_equal_steps_are_one_step_whatever_rows_they_are_of(tmp_path):
    options = options_of(tmp_path, '--rows', 'mdil', 'adapters-only', 'mdil --shared-lr 5e-6', 'single-task',
                         'fine-tune', 'lwf')
    steps = sequences.steps_of(sequences.plan(options))
    names = [(len(step.domains), step.method) for step in steps]
    assert sorted(names) == sorted([(1, 'single-task-adapters'), (1, 'single-task'), (1, 'single-task'), (1, 'single-task')] + [
        (count, method) for count in (2, 3) for method in ('mdil', 'adapters-only', 'fine-tune', 'lwf')])
    assert len({step.folder(options) for step in steps}) == len(steps)
    assert all(step.start is None or steps.index(step.start) < number for number, step in enumerate(steps))


def test_an_order_shares_single_and_multi_task_runs_with_another(tmp_path):
    options = options_of(tmp_path, '--rows', 'single-task', 'multi-task', '--orders', 'CS BDD', 'BDD CS')
    assert len(sequences.steps_of(sequences.plan(options))) == 3


def test_a_step_is_another_after_another_step_or_with_other_options(tmp_path):
    rows = ['mdil', 'mdil --lambdac 1', 'lwf', 'lwf --lambdac 1']
    options = options_of(tmp_path, '--rows', *rows)
    last = last_steps(options)
    assert len(set(last.values())) == len({step.folder(options) for step in last.values()}) == 4
    plain, heavy = (last[name] for name in rows[:2])
    assert plain.start.start == heavy.start.start and plain.start != heavy.start
    again = sequences.make_step(options, plain.domains, 0, 'mdil', start=heavy.start)
    assert again.key == plain.key and again.folder(options) != plain.folder(options)


@pytest.mark.parametrize('text, row', [
    ('released', sequences.Row('mdil', ('--recipe', 'released'))), ('lwf', sequences.Row('lwf')),
    ('mdil --lambdac 1', sequences.Row('mdil', ('--lambdac', '1')))])
def test_a_row_is_a_name_or_a_method_with_options(text, row):
    assert sequences.row_of(text) == row


def test_options_of_the_first_step_are_of_that_alone_and_shared_with_a_network_of_its_own(tmp_path):
    fast, lonely = 'adapters-only --lambdac 1 --first --lr 1e-3 --no-dropout', 'single-task-adapters --lr 1e-3 --no-dropout'
    options = options_of(tmp_path, '--rows', fast.replace(' --lambdac 1', ''), 'adapters-only', lonely, '--orders', 'CS BDD')
    assert sequences.row_of(fast) == sequences.Row('adapters-only', ('--lambdac', '1'), ('--lr', '1e-3', '--no-dropout'))
    first, default, alone = ([*steps] for steps in sequences.plan(options).values())
    assert first[0] == alone[0] and first[0].folder(options) == alone[0].folder(options) != default[0].folder(options)
    assert first[1].key == default[1].key and first[1].folder(options) != default[1].folder(options)


def test_a_difference_that_a_step_of_the_released_recipe_has_not_is_no_other_step(tmp_path):
    """In step 2 of the published loops the teacher is in eval mode anyway."""
    rows = ['--rows', 'released', 'mdil --recipe released --teacher-mode eval']
    two, three = (last_steps(options_of(tmp_path, *rows, '--steps', count)) for count in '23')
    assert len(set(two.values())) == 1 and len(set(three.values())) == 2


@pytest.mark.parametrize('arguments, line', [
    (['--epochs', 'CS=2'], '--epochs has no value for BDD'), (['--epochs', 'CS=x'], "'CS=x' is neither"),
    (['--orders', 'CS Mars'], 'Mars'), (['--rows', 'theirs'], 'fine-tune-copies'),
    (['--rows', 'mdil --nonsense 1'], '--rows: --nonsense 1: '),
    (['--rows', 'single-task --first --lr 1'], 'has one step'),
    (['--rows', 'mdil --first'], 'no option follows --first'),
    (['--rows', 'mdil --first --seed 5'], '--rows: .*: --seed must be'),
    (['--rows', 'mdil --seed 5 --state x'], '--rows: .*: --seed --state must be the same'),
    (['--rows', 'mdil --method lwf'], '--method must be the same'), (['--rows', 'mdil', '--against', 'lwf'], "--against 'lwf' is not one of --rows: mdil"), (['--rows', ' '], 'does not begin with a method'),
    (['--rows', 'mdil', '--steps', '1', '--figure', 'x.png'], 'no order'), (['--orders', ' '], 'empty order')])
def test_bad_options_are_one_line(tmp_path, arguments, line):
    with pytest.raises(UserError, match=line):
        sequences.plan(options_of(tmp_path, *arguments))


def test_epochs_are_of_the_domain_learnt(tmp_path):
    last = last_steps(options_of(tmp_path, '--rows', 'mdil', 'multi-task', '--epochs', 'CS=5', '3', 'IDD=4'))
    assert {name: dict(step.key)['num_epochs'] for name, step in last.items()} == {'mdil': '4', 'multi-task': '3'}


def test_all_rows_have_one_network(tmp_path):
    other = 'lraspp_mobilenet_v3_large'
    options = options_of(tmp_path, '--rows', 'mdil', 'multi-task', 'single-task', '--network', other)
    last = last_steps(options)
    steps = sequences.steps_of(sequences.plan(options))
    assert {dict(step.key)['network'] for step in steps} == {sequences.parsed(step.arguments)['network'] for step in steps} == {other}
    assert sequence_tables.added(last['mdil'], sequences.row_of('mdil'), options) == sum(
        p.numel() for p in build_model([20, 20, 27], 'mdil', other).branch_parameters(2))


def test_a_first_step_serves_all_methods_of_its_network():
    assert [sequences.first_method(name) for name in ('adapters-only', 'fine-tune', 'domain-bn')] == ['single-task-adapters', 'single-task', 'domain-bn']


def test_units_count_teacher_and_old_branches(tmp_path):
    last = last_steps(options_of(tmp_path, '--rows', 'mdil', 'fine-tune', 'lwf', 'multi-task', 'adapters-only',
                                 'single-task-adapters'))
    assert {name: sequence_tables.units(step) for name, step in last.items()} == {
        'mdil': 11, 'fine-tune': 3, 'lwf': 11, 'multi-task': 3, 'adapters-only': 3, 'single-task-adapters': 3}
    assert sequence_tables.units(last['mdil'].start) == 7
    few = 'mdil --distill-domains 1'
    assert sequence_tables.units(last_steps(options_of(tmp_path, '--rows', few))[few]) == 7
    added = lambda name: sequence_tables.added(last[name], sequences.row_of(name), options_of(tmp_path))
    assert added('mdil') == sum(p.numel() for p in build_model([20, 20, 27]).branch_parameters(2))
    assert added('single-task-adapters') == sum(p.numel() for p in build_model([27]).parameters())
    copies = sequences.ROWS['fine-tune-copies']
    assert sequence_tables.added(last['fine-tune'], copies, options_of(tmp_path)) == sum(
        p.numel() for p in build_model([27], 'single-task').parameters())


def test_copies_take_options_as_methods_do():
    row = sequences.row_of('fine-tune-copies --recipe fast --first --lr 1')
    assert row == sequences.Row('fine-tune', ('--recipe', 'fast'), ('--lr', '1'), copies=True)
    assert not sequences.row_of('fine-tune --recipe fast').copies and sequences.row_of('fine-tune-copies').copies


def test_copies_keep_what_each_domain_had_when_learnt():
    steps = [{'CS': 40.0}, {'CS': 30.0, 'BDD': 50.0}, {'CS': 20.0, 'BDD': 44.0, 'IDD': 60.0}]
    assert scoring.own_networks(steps) == [{'CS': 40.0}, {'CS': 40.0, 'BDD': 50.0}, {'CS': 40.0, 'BDD': 50.0, 'IDD': 60.0}]


def test_figures_of_a_hand_made_sequence(tmp_path):
    order = 'cityscapes', 'BDD', 'IDD'
    after_three = lambda city, bdd: {'cityscapes': city, 'BDD': bdd, 'IDD': 60.0}
    found = {(order, 'mdil', seed): {column: [{'cityscapes': 40.0 + seed}, {'cityscapes': 30.0, 'BDD': 50.0}, after_three(*last)]
             for column, last in zip(scoring.COLUMNS, ((20, 44), (25, 44), (40, 50)))} for seed in (0, 2)}
    single = [{'cityscapes': 40.0, 'BDD': 40.0, 'IDD': 50.0}]
    found.update({(order, 'single-task', seed): dict.fromkeys(scoring.COLUMNS, single) for seed in (0, 2)})
    options = options_of(tmp_path, '--seeds', '0', '2', '--rows', 'mdil', 'single-task', '--against', 'mdil')
    rows = forgetting.all_figures(found, options)[order]
    assert rows['mdil'][0]['forgetting'] == {'cityscapes': 20.0, 'BDD': 6.0}
    assert rows['mdil'][0]['new'] == 55.0 and rows['mdil'][0]['delta_m'] == pytest.approx((-50 + 10 + 20) / 3)
    costs = {name: {'added_parameters': 5e5, 'units': 11, 'images_per_second': 2.0} for name in rows}
    lines = forgetting.summary_table(order, rows, costs, options).groups[0]
    assert lines[0] == ['mdil', '20.00 +- 0.00', '44.00 +- 0.00', '60.00 +- 0.00', f'21.00 +- {math.sqrt(2):.2f}',
                        '6.00 +- 0.00', '55.00 +- 0.00', '-6.67 +- 0.00', '0.50', '11', '2.0']
    assert lines[3] == ['single-task', '40.00 +- 0.00', '40.00 +- 0.00', '50.00 +- 0.00', '-', '-', '45.00 +- 0.00',
                        '0.00 +- 0.00', '0.50', '11', '2.0']
    # Figures of other columns have a line where they differ, so single-task has none.
    assert [line[0] for line in lines] == ['mdil', 'mdil, estimated', 'mdil, kept', 'single-task']
    lines = forgetting.column_table(order, rows, options).groups[0]
    lost = f'21.00 +- {math.sqrt(2):.2f}'
    assert lines[3][:7] == ['mdil, 3', 'cityscapes', f'41.00 +- {math.sqrt(2):.2f}', '20.00 +- 0.00', '25.00 +- 0.00',
                            '40.00 +- 0.00', lost]
    assert lines[3][7:] == ['24 +- 2', '95 +- 6'] and lines[4][7:] == ['0 +- 0', '100 +- 0'] and lines[5][7:] == ['-', '-']
    lines = forgetting.paired_table(order, rows, options.against).groups[0]
    assert lines[-1] == ['single-task', '2', '20.00 +- 0.00 (p < 0.0001, better)', '-4.00 +- 0.00 (p < 0.0001, worse)',
                         '-10.00 +- 0.00 (p < 0.0001, worse)', '2.00 +- 0.00 (p < 0.0001, better)', '6.67 +- 0.00 (p < 0.0001, better)']
    del rows['mdil'][2]
    shown = forgetting.summary_table(order, rows, costs, options).groups[0][0]
    assert shown[0] == 'mdil (1 of 2 seeds)' and shown[1] == '20.00'


def test_the_best_epoch_is_that_of_the_step_that_learns_the_domain(tmp_path):
    options = options_of(tmp_path, '--orders', 'CS BDD', '--seeds', '0', '1', '--rows', 'mdil')
    plans, order = sequences.plan(options), ('cityscapes', 'BDD')
    for seed in options.seeds:
        for step, mious in zip(plans[order, 'mdil', seed], ((10.0, 30.0, 20.0), (40.0, 50.0 + seed, None))):
            step.folder(options).mkdir(parents=True)
            lines = [{'epoch': epoch, 'lr': 1e-3, 'train': {'loss': 1.0}, 'val':
                      {name: {'miou': miou if name == step.domains[-1] else 99.0, 'loss': 1.0} for name in step.domains}
                      if miou else {}} for epoch, miou in enumerate(mious, 1)]
            (step.folder(options) / 'metrics.jsonl').write_text('\n'.join(map(json.dumps, lines)))
    figures = {order: {'mdil': {seed: {} for seed in options.seeds}}}
    sequence_tables.add_validated(figures, plans, options)
    assert figures[order]['mdil'][1] == {'validated': {'cityscapes': {'last': 20.0, 'best': 30.0},
                                                       'BDD': {'last': 51.0, 'best': 51.0}}}
    lines = sequence_tables.best_table(order, figures[order], options).groups[0]
    assert lines == [['mdil', 'cityscapes', '20.00 +- 0.00', '30.00 +- 0.00', '10.00 +- 0.00'],
                     ['mdil', 'BDD', '50.50 +- 0.71', '50.50 +- 0.71', '0.00 +- 0.00']]


def run(folder, roads, *arguments):
    return forgetting.main(['--out', str(folder / 'runs'), '--data-root', str(roads), '--orders', 'CS BDD',
                            '--seeds', '0', '--epochs', '1', '--limit-batches', '1', *SMALL, *arguments])


def test_whole_sequences_are_learnt_once_and_tabled(roads, tmp_path, trained_here, monkeypatch, capsys):
    calls, rows = [], ['single-task', 'mdil', 'released', 'fine-tune-copies']
    trained_here(calls)
    files = [text for option, name in (('--json', 'f.json'), ('--markdown', 'f.md'), ('--curves', 'f.svg'), ('--figure', 'g.svg'))
             for text in (option, str(tmp_path / name))]
    assert run(tmp_path, roads, '--rows', *rows, '--against', 'mdil', *files) is None
    # two single-task, the first of mdil, and mdil, released, fine-tune: the rest is of the same
    assert len(calls) == 6
    result = json.loads((tmp_path / 'f.json').read_text())['orders']['cityscapes BDD']
    assert list(result) == rows and result['mdil']['cost']['units'] == 7
    released, learnt = result['released']['seeds']['0'], result['mdil']['seeds']['0']['steps'][0]
    kept, estimated = (released['columns'][column]['steps'] for column in ('kept', 'estimated'))
    assert released['steps'][0] == kept[0] == learnt and kept[1]['BDD'] == released['steps'][1]['BDD']
    # Of the published loops' old branch nothing but statistics is overwritten; one batch moves the shared weights by little.
    assert kept[1]['cityscapes'] == pytest.approx(learnt['cityscapes'], abs=0.5)
    assert estimated != released['steps']
    assert result['single-task']['seeds']['0']['delta_m'] == 0
    copies = result['fine-tune-copies']
    fine_tuned = sum(p.numel() for p in build_model([20], 'fine-tune').parameters())     # the whole network again
    assert copies['seeds']['0']['forgetting'] == {'cityscapes': 0} and copies['cost']['added_parameters'] == fine_tuned
    drawn = (tmp_path / 'g.svg').read_text()
    assert all(f'<!-- {name} -->' in drawn.replace('- -', '--') for name in rows)
    curves = (tmp_path / 'f.svg').read_text().replace('- -', '--')
    assert all(f'<!-- {text} -->' in curves for text in ['cityscapes, 1 of 2', 'BDD, 2 of 2', *rows])
    assert '| released |' in (tmp_path / 'f.md').read_text()
    assert 'points more than mdil after the last step' in (tmp_path / 'f.md').read_text()
    shown = capsys.readouterr().out
    monkeypatch.setattr(scoring.Evaluator, 'score', None)        # nothing is evaluated again
    assert run(tmp_path, roads, '--rows', *rows, '--against', 'mdil', *files) is None and len(calls) == 6
    assert capsys.readouterr().out.splitlines()[-10:] == shown.splitlines()[-10:]


def test_every_row_of_the_figure_has_a_marker():
    from matplotlib.figure import Figure
    axis = Figure().subplots()
    for marker in sequence_tables.MARKERS:
        assert axis.errorbar(1, 1, 0, 0, f'C1{marker}').lines[0].get_marker() == marker


def test_a_failing_step_names_its_log_and_the_others_finish(roads, tmp_path, trained_here, capsys):
    calls = []
    trained_here(calls, failing='single-task-adapters')
    assert run(tmp_path, roads, '--rows', 'fine-tune', 'mdil', '--steps', '1') == 1
    output = capsys.readouterr()
    assert 'log.txt: error: no luck' in output.err and len(calls) == 2
    assert 'fine-tune, 1' in output.out and 'mdil, 1' not in output.out
    trained_here(calls)
    assert run(tmp_path, roads, '--rows', 'fine-tune', 'mdil', '--steps', '1') is None and len(calls) == 3


def test_the_command_of_a_step_names_the_state_it_starts_from(tmp_path):
    rows = '--rows', 'released', 'single-task'
    options = options_of(tmp_path, *rows, '--which', 'best', '--cache', 'c')
    steps = last_steps(options)
    released, single = (sequences.command(steps[name], options) for name in rows[1:])
    assert released[1].endswith('train.py') and '--resume' in released and 'c' in released
    assert released[released.index('--state') + 1] == str(steps['released'].start.folder(options) / 'model_best.pth.tar')
    assert '--state' not in single


@pytest.mark.parametrize('known, fits', [
    ({}, True), ({'no_dropout': None}, False), ({'lr': 5e-4}, False), ({'cache': 'x', 'skip_bad_files': None}, True)])
def test_a_finished_step_is_not_taken_for_one_of_other_options(tmp_path, known, fits):
    """None: the run is of a version that had no such option."""
    options = options_of(tmp_path, '--rows', 'adapters-only')
    step = last_steps(options)['adapters-only']
    saved = {**sequences.parsed(step.arguments), **known}
    folder = step.folder(options)
    folder.mkdir(parents=True)
    (folder / 'opts.json').write_text(json.dumps({'options': {k: v for k, v in saved.items() if v is not None}}))
    assert not sequences.finished(step, options)
    (folder / 'done').touch()
    if fits:
        assert sequences.finished(step, options)
    else:
        with pytest.raises(UserError, match='was run with other options'):
            sequences.finished(step, options)
