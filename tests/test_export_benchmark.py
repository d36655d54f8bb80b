"""The benchmark of exported networks: OpenVINO's file against the network itself, on toy roads."""
import json

import pytest

from mdil.benchmarks import export
from tests.test_networks import own, untrained  # noqa: F401 (fixture)


def test_a_format_is_compared_with_eager(toy, tmp_path, monkeypatch, capsys):
    pytest.importorskip('openvino')
    monkeypatch.setattr(export, 'FILES', {'OpenVINO float32': ('x.xml', 'openvino')})
    monkeypatch.setattr(export, 'PACKAGES', ('openvino',))
    state = untrained(tmp_path / 'model.pth.tar', 'tiny')
    export.main([str(state), '--domain', 'CS', '--data-root', str(toy), '--threads', '1', '--rounds', '2', '--seconds', '0',
                 '--json', str(tmp_path / 'r.json')])
    found = json.loads((tmp_path / 'r.json').read_text())
    sides = [export.EAGER, 'OpenVINO float32']
    assert list(found['miou']) == list(found['images_per_second']['1']) == sides and found['size'] == [32, 64]
    assert found['miou'][sides[1]] == pytest.approx(found['miou'][sides[0]], abs=0.5)
    assert all(len(rates) == 2 and min(rates) > 0 for side in found['images_per_second']['1'].values() for rates in side.values())
    table = capsys.readouterr().out
    assert all(side in table for side in sides) and '1.00-1.00' in table and '+0.00' in table
