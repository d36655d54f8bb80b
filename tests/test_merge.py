"""benchmarks.merge: rows of several result files in one table."""
import json

import pytest

from mdil.benchmarks import merge
from mdil.benchmarks.sequence_tables import figures_of, less
from mdil.utils.errors import UserError

OPTIONS = {**dict.fromkeys(merge.ALIKE), 'epochs': {'': 5}}


def results(path, scores, order='cityscapes BDD', **changed):
    """Writes a result file; scores: {row: {seed: (mIoU of CS, of BDD)}}."""
    rows = {}
    for name, seeds in scores.items():
        figures = {}
        for seed, (city, bdd) in seeds.items():
            last = {'cityscapes': city, 'BDD': bdd}
            first = order.split()[0]
            steps = [last] if name.startswith(('single', 'multi')) else [{first: last[first]}, last]
            figures[str(seed)] = {'steps': steps, 'delta_m': None, 'columns': dict.fromkeys(('estimated', 'kept'), {'steps': steps})}
        rows[name] = {'cost': {'added_parameters': 5e5, 'units': 3, 'images_per_second': None}, 'seeds': figures}
    path.write_text(json.dumps({'options': {**OPTIONS, **changed}, 'versions': {'git': path.stem}, 'orders': {order: rows}}))
    return str(path)


SINGLE = {'single-task': {seed: (20.0 + seed, 40.0) for seed in range(3)}}


def test_rows_of_two_files_stand_in_one_table_with_delta_m_across_them(tmp_path, capsys):
    first = results(tmp_path / 'first.json', SINGLE)
    second = results(tmp_path / 'second.json', {'adapters-only': {seed: (20.0 + seed, 44.0 + 0.01 * seed) for seed in range(3)}})
    markdown = tmp_path / 'both.md'
    merge.main([first, second, '--against', 'single-task', '--markdown', str(markdown)])
    text = markdown.read_text()
    assert f'From {first} (first), {second} (second).' in text
    lines = [line for line in text.splitlines() if line.startswith('| adapters-only |')]
    assert '44.01 ± 0.01' in lines[0] and '5.01 ± 0.01' in lines[0]           # (0 + 10.02) / 2 percent
    assert lines[1].startswith('| adapters-only | 3 | 0.00 ± 0.00 (p = 1) | 4.01 ± 0.01 (p < 0.0001, better)')
    assert '| 5.01 ± 0.01 (p < 0.0001, better) |' in lines[1] and 'Delta_m% is against single-task.' in text
    assert 'adapters-only' in capsys.readouterr().out


def test_seeds_of_a_row_may_come_from_two_files(tmp_path, capsys):
    files = [results(tmp_path / f'{seed}.json', {'single-task': {seed: (20.0 + 2 * seed, 40.0)}}, val_every=seed)
             for seed in (0, 1)]
    merge.main([*files, files[0]])
    assert '21.00 +- 1.41' in capsys.readouterr().out


@pytest.mark.parametrize('changed, scores, words', [
    ({'epochs': {'': 6}}, {'mdil': {0: (1.0, 2.0)}}, 'not alike: epochs'),
    ({'val_every': 9}, {'mdil': {0: (1.0, 2.0)}}, 'not alike: val_every'),
    ({}, {'single-task': {0: (19.0, 40.0)}}, 'differ on seed 0 of "single-task"'),
])
def test_what_cannot_be_compared_is_refused(tmp_path, changed, scores, words):
    first = results(tmp_path / 'a.json', SINGLE, which='best')
    second = results(tmp_path / 'b.json', scores, which='best', **changed)
    with pytest.raises(UserError, match=words):
        merge.main([first, second])


LATER = {**SINGLE, 'adapters-only': {seed: (20.0 + seed, 44.0 + seed) for seed in range(3)}}
EARLIER = {'single-task': dict.fromkeys(range(3), (19.0, 38.0)),
           'adapters-only': {0: (19.0, 45.0), 1: (19.0, 45.5), 5: (19.0, 1.0)}}


@pytest.mark.parametrize('against, title, line', [
    # (20, 44) - (19, 45) and (21, 45) - (19, 45.5)
    ((), 'points more after the last step than in {}', '| adapters-only | 2 | 1.50 ± 0.71 (p = 0.2) | -0.75 ± 0.35 (p = 0.2) | 0.38 ± 0.53 (p = 0.5) |'),
    # less what single-task gains: 1 and 2 on cityscapes, 2 on BDD
    (('--against', 'single-task'), 'change in the lead over single-task since {}, in points',
     '| adapters-only | 2 | 0.00 ± 0.00 (p = 1) | -2.75 ± 0.35 (p = 0.058) | -1.38 ± 0.18 (p = 0.058) |'),
])
def test_rows_after_other_training_are_subtracted_seed_by_seed(tmp_path, against, title, line):
    later, earlier = results(tmp_path / 'later.json', LATER), results(tmp_path / 'earlier.json', EARLIER, epochs={'': 1})
    markdown = tmp_path / 'change.md'
    merge.main([later, *against, '--minus', earlier, '--markdown', str(markdown)])
    change = markdown.read_text().split(title.format(earlier))[1]
    assert line in change
    assert ('| single-task | 3 | 2.00 ± 1.00' in change) == (not against)


def test_without_a_run_in_both_nothing_is_subtracted(tmp_path):
    paths = [results(tmp_path / f'{name}.json', {name: {0: (1.0, 2.0)}}) for name in ('mdil', 'lwf')]
    with pytest.raises(UserError, match='lwf.json: no run of the same domains, row and seed'):
        merge.main([paths[0], '--minus', paths[1]])
    with pytest.raises(UserError, match="'mdil' is no row of .*lwf.json"):
        merge.main([paths[0], '--against', 'mdil', '--minus', paths[1]])


def test_a_row_is_compared_with_itself_in_the_other_order(tmp_path):
    turned = {'adapters-only': {seed: (30.0, 40.0 + seed) for seed in range(3)}}
    paths = [results(tmp_path / 'ours.json', LATER), results(tmp_path / 'turned.json', turned, 'BDD cityscapes')]
    markdown = tmp_path / 'change.md'
    merge.main([paths[0], '--minus', paths[1], '--markdown', str(markdown)])
    change = markdown.read_text().split(f'than in {paths[1]} (BDD, then cityscapes)')[1]
    assert '| adapters-only | 3 | -9.00 ± 1.00 (p = 0.0041, worse) | 4.00 ± 0.00 (p < 0.0001, better) |' in change
    merge.main([*paths, '--minus', paths[1], '--markdown', str(tmp_path / 'same.md')])        # an order in common
    assert 'last step than in' in (text := (tmp_path / 'same.md').read_text()) and '(BDD, then' not in text


def test_the_differences_of_each_seed_are_shown_on_request(tmp_path, capsys):
    paths = [results(tmp_path / 'later.json', LATER), results(tmp_path / 'earlier.json', EARLIER, epochs={'': 1})]
    merge.main([paths[0], '--minus', paths[1], '--against', 'single-task', '--per-seed'])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ['seed', '0', '0.00', '-3.00'] in lines and ['seed', '1', '0.00', '-2.50'] in lines
    merge.main([paths[0], '--minus', paths[1], '--against', 'single-task'])
    text = capsys.readouterr().out
    assert 'seed 0' not in text and 'after every step' not in text and 'worse' not in text.split('in the lead over')[1]


def test_what_rounding_leaves_of_equal_scores_is_no_difference():
    assert less({0: [0.1 + 0.2, None]}, {0: [0.3, 1.0]}) == {0: [0.0, None]}


def test_another_order_after_other_training_is_refused(tmp_path):
    paths = [results(tmp_path / 'ours.json', LATER), results(tmp_path / 'turned.json', LATER, 'BDD cityscapes', epochs={'': 1})]
    with pytest.raises(UserError, match='not alike: epochs'):
        merge.main([paths[0], '--minus', paths[1]])


def test_a_joint_row_counts_in_every_order_of_its_domains(tmp_path):
    paths = [results(tmp_path / 'turned.json', {'single-task': SINGLE['single-task']}, 'BDD cityscapes'),
             results(tmp_path / 'joint.json', {'multi-task': {seed: (21.0 + seed, 40.0) for seed in range(3)}})]
    markdown = tmp_path / 'both.md'
    merge.main([*paths, '--against', 'multi-task', '--markdown', str(markdown)])
    text = markdown.read_text()
    assert 'BDD, then cityscapes: points more than multi-task' in text
    assert '| single-task | 3 | 0.00 ± 0.00 (p = 1) | -1.00 ± 0.00' in text


def test_a_run_of_all_orders_has_one_result(tmp_path):
    paths = [results(tmp_path / 'ours.json', SINGLE),
             results(tmp_path / 'turned.json', {'single-task': {0: (20.0, 39.0)}}, 'BDD cityscapes')]
    with pytest.raises(UserError, match='orders .* differ on seed 0 of "single-task"'):
        merge.main(paths)


def test_forward_transfer_is_of_the_domains_after_the_first():
    """The scores of a joint run are sorted by name."""
    figures = figures_of(('b', 'a'), [{'a': 30.0, 'b': 40.0}], {'a': 25.0, 'b': 40.0})
    assert figures['forward_transfer'] == 5.0 and figures['new'] == 30.0


def test_files_that_are_read_are_not_written(tmp_path):
    paths = [results(tmp_path / f'{name}.json', SINGLE) for name in 'ab']
    for path in paths:
        with pytest.raises(UserError, match='a file that is read'):
            merge.main([paths[0], '--minus', paths[1], '--markdown', path])


@pytest.mark.parametrize('odd', [float('nan'), None, 'x', [1]])
def test_a_score_that_is_none_is_refused(tmp_path, odd):
    with pytest.raises(UserError, match='a.json is not what --json'):
        merge.main([results(tmp_path / 'a.json', {'single-task': {0: (odd, 40.0)}}), '--against', 'single-task'])


@pytest.mark.parametrize('content', ['', '[]', '{}', '{"orders": {"CS": {"mdil": {"cost": {}, "seeds": {"0": {}}}}}}', '{"orders": 3}', '{"orders": {}}'])
def test_other_files_are_named(tmp_path, content):
    path = tmp_path / 'other.json'
    path.write_text(content)
    with pytest.raises(UserError, match='other.json'):
        merge.main([str(path)])


def test_a_row_that_no_file_has_is_named(tmp_path):
    with pytest.raises(UserError, match='is no row of .*a.json; theirs are single-task'):
        merge.main([results(tmp_path / 'a.json', SINGLE), '--against', 'mdil'])
