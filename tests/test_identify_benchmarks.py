"""The benchmarks of telling domains and of advice, on toy roads."""
import json

import pytest
import torch

from benchmarks import advise, identify
from mdil.models.identify import FEATURES
from tests.test_predict import knowing, model, state  # noqa: F401 (fixtures)

NAMES = ['cityscapes', 'BDD', 'IDD']


def test_every_kind_of_look_is_scored_on_the_validation_images(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(identify, 'SIZES', ((32, 16), (64, 32)))
    arguments = ['--data-root', str(toy), '--domains', *NAMES, '--frames', '3']
    for name, more in (('plain', []), ('alike', ['--alike', '--look-alone'])):
        identify.main([*arguments, *more, '--out', str(tmp_path / name)])
    plain, alike = (json.loads((tmp_path / name).read_text()) for name in ('plain', 'alike'))
    assert plain['images'] == {name: {'train': 8, 'val': 4} for name in NAMES}
    assert set(plain['kinds']) == {'look', *identify.LAYERS, 'batch norms', 'confidence'}
    for found in plain['kinds'].values():
        assert [sum(found['matrix'][name].values()) for name in NAMES] == [4, 4, 4]
        right = sum(found['matrix'][name][name] for name in NAMES)
        assert found['accuracy'] == pytest.approx(100 * right / 12)
    assert plain['kinds']['look']['features'] == FEATURES and plain['kinds']['look']['accuracy'] == 100
    assert plain['kinds']['layers 1, 2']['features'] == 2 * (16 + 64)
    assert list(plain['cpu_milliseconds']['network']) == ['32x16', '64x32']
    assert (plain['alike'], alike['alike']) == (False, True) and list(alike['kinds']) == ['look']


def test_windows_are_whole_unless_there_is_one_alone():
    looks = torch.zeros(7, 2)
    assert [len(part) for part in identify.windows(looks, 3)] == [3, 3]
    assert [len(part) for part in identify.windows(looks, 10)] == [7]


def test_the_divergence_from_a_batch_norms_statistics_is_0_where_they_are_the_images_own():
    x = torch.randn(1, 4, 20, 20, generator=torch.Generator().manual_seed(0))
    norm = torch.nn.BatchNorm2d(4)
    norm.running_mean, norm.running_var = x.mean(dim=(0, 2, 3)), x.var(dim=(0, 2, 3))
    assert identify.divergence(norm, x).item() == pytest.approx(0, abs=1e-5)
    norm.running_mean = norm.running_mean + 1
    assert identify.divergence(norm, x).item() > 1


def test_advice_is_compared_with_the_truth_in_the_common_classes(toy, knowing, tmp_path):  # noqa: F811
    advise.main(['--states', str(knowing), '--domains', *NAMES, '--data-root', str(toy), '--device', 'cpu', '--out',
                 str(tmp_path / 'r.json')])
    state, = json.loads((tmp_path / 'r.json').read_text())['states']  # noqa: F811
    assert state['knows'] == ['cityscapes', 'IDD'] and list(state['asked']) == NAMES
    assert [entry['learnt'] for entry in state['asked'].values()] == [True, False, True]
    assert all(0 <= entry['true_miou'] <= 100 and entry['expected_miou'] > 0 for entry in state['asked'].values())
