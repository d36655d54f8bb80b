"""The benchmark of repair: real steps of the released recipe, repaired and counted."""
import json

import pytest

from mdil.benchmarks import repair
from mdil.utils.errors import UserError
from mdil.datasets.toy.roads import write_toy_roads

pytestmark = pytest.mark.usefixtures('shallow_module')


def test_a_sequence_is_learnt_repaired_and_counted(tmp_path, trained_here, capsys):
    calls = []
    trained_here(calls)
    write_toy_roads(tmp_path / 'roads', train=4, val=2, height=32, width=64, seed=2)
    given = ['--data-root', tmp_path / 'roads', '--out', tmp_path / 'out', '--orders', 'CS BDD', '--seeds', '0', '--epochs', '1',
             '--height', '32', '--batch-size', '2', '--class-weights', 'none', '--device', 'cpu', '--num-workers', '0',
             '--json', tmp_path / 'json', '--markdown', tmp_path / 'md']
    assert repair.main(list(map(str, given))) is None and len(calls) == 2
    found = json.loads((tmp_path / 'json').read_text())
    entries = found['orders']['cityscapes BDD']['0']
    assert found['options']['seeds'] == [0] and set(entries) == {'cityscapes', 'BDD'}
    assert set(entries['cityscapes']) == {'learnt', 'before', 'statistics', 'branch'}
    # Nothing but its statistics is overwritten of an old branch, and nothing at all of the new one.
    assert entries['cityscapes']['statistics'] == entries['cityscapes']['branch']
    assert len(set(entries['BDD'].values())) == 1
    for text in (capsys.readouterr().out, (tmp_path / 'md').read_text()):
        assert 'cityscapes, then BDD' in text and 'statistics put back' in text


def test_what_came_back_is_a_share_of_what_was_lost():
    entry = {'learnt': 20.0, 'before': 10.0, 'statistics': 17.5, 'branch': 20.0}
    assert (repair.returned(entry, 'statistics'), repair.returned(entry, 'branch')) == (75, 100)
    assert repair.returned({**entry, 'before': 20.0}, 'branch') is None
    table = repair.order_table(('a', 'b'), {0: {'a': entry, 'b': entry}, 1: {'a': {**entry, 'statistics': 12.5}, 'b': entry}})
    first, last = table.groups[0]
    assert first[-2:] == ['50 +- 35', '100 +- 0'] and last[-2:] == ['-', '-']


@pytest.mark.parametrize('arguments', [['--orders', ''], ['--epochs', 'x']])
def test_bad_options_are_one_line(tmp_path, arguments):
    with pytest.raises(UserError):
        repair.parse(['--out', str(tmp_path), '--epochs', '1', *arguments])
