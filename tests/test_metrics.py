"""Metrics against scikit-learn and by hand."""
import math

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, confusion_matrix, jaccard_score

from mdil.evaluation import metrics


@pytest.mark.parametrize('seed', range(5))
def test_iou_and_accuracy_equal_scikit_learns(seed):
    """Random maps with void (the last class) and classes absent from both."""
    random = np.random.default_rng(seed)
    present = random.choice(6, size=4, replace=False)
    truth = random.choice([*present, 6], size=(3, 20, 30))
    guess = np.where(random.random(truth.shape) < 0.6, truth, random.choice([*present, 6], size=truth.shape))
    matrix = metrics.confusion(torch.tensor(guess), torch.tensor(truth), 7)
    assert (matrix.numpy() == confusion_matrix(truth.ravel(), guess.ravel(), labels=range(7))).all()
    counted = truth != 6
    t, g = truth[counted], guess[counted]
    want = jaccard_score(t, g, labels=range(6), average=None, zero_division=0)
    got = metrics.iou_per_class(matrix)
    absent = [c for c in range(6) if c not in t and c not in g]
    assert absent and all(math.isnan(got[c]) for c in absent)
    assert np.allclose(got.nan_to_num(0), want)
    assert metrics.mean_iou(matrix) == pytest.approx(100 * np.mean([want[c] for c in range(6) if c not in absent]))
    assert metrics.mean_iou(matrix, published=True) == pytest.approx(100 * want.mean())
    assert metrics.pixel_accuracy(matrix) == pytest.approx(100 * accuracy_score(t, g))


def test_void_truth_never_counts_and_void_guesses_are_misses():
    truth, guess = torch.tensor([0, 0, 1, 2, 2]), torch.tensor([0, 2, 1, 0, 1])
    iou = metrics.iou_per_class(metrics.confusion(guess, truth, 3))
    assert iou.tolist() == [0.5, 1.0]


STEPS = [{'a': 60.0}, {'a': 50.0, 'b': 40.0}, {'a': 55.0, 'b': 30.0, 'c': 20.0}]
SINGLE = {'a': 60.0, 'b': 50.0, 'c': 10.0}


def test_sequence_metrics_by_hand():
    assert metrics.forgetting(STEPS) == {'a': 5.0, 'b': 10.0}
    assert metrics.forgetting([{'a': 50.0}, {'a': 55.0, 'b': 1.0}]) == {'a': -5.0}
    assert metrics.backward_transfer(STEPS) == pytest.approx((-5 - 10) / 2)
    assert metrics.forward_transfer(STEPS, SINGLE) == pytest.approx((-10 + 10) / 2)
    want = 100 * ((55 - 60) / 60 + (30 - 50) / 50 + (20 - 10) / 10) / 3
    assert metrics.delta_m(STEPS[-1], SINGLE) == pytest.approx(want)


def test_sequence_metrics_without_a_basis_are_none():
    assert metrics.forgetting(STEPS[:1]) == {} and metrics.backward_transfer(STEPS[:1]) is None
    assert metrics.delta_m(STEPS[-1], {'a': 1.0}) is None and metrics.forward_transfer(STEPS, {}) is None


def test_published_table():
    """Delta_m% of the published rows comes out of the published mIoUs."""
    single = {'CS': 72.55, 'BDD': 54.10, 'IDD': 61.97}
    assert metrics.delta_m({'CS': 59.19, 'BDD': 49.66, 'IDD': 59.16}, single) == pytest.approx(-10.39, abs=0.01)
    assert metrics.delta_m({'CS': 30.49, 'BDD': 32.05, 'IDD': 61.03}, single) == pytest.approx(-33.42, abs=0.01)
    assert metrics.delta_m({'CS': 65.21, 'BDD': 55.73}, single) == pytest.approx(-3.55, abs=0.01)


@pytest.mark.parametrize('seed', range(3))
def test_iou_and_accuracy_equal_torchmetrics(seed):
    """The same random maps as above, void (6) ignored in the truth, void answers misses."""
    classification = pytest.importorskip('torchmetrics.classification')
    random = np.random.default_rng(100 + seed)
    present = random.choice(6, size=4, replace=False)
    truth = torch.tensor(random.choice([*present, 6], size=(3, 20, 30)))
    guess = torch.where(torch.tensor(random.random(truth.shape)) < 0.6, truth,
                        torch.tensor(random.choice([*present, 6], size=truth.shape)))
    keywords = {'num_classes': 7, 'ignore_index': 6}
    want = classification.MulticlassJaccardIndex(average='none', **keywords)(guess, truth)[:6]
    accuracy = classification.MulticlassAccuracy(average='micro', **keywords)(guess, truth)
    matrix = metrics.confusion(guess, truth, 7)
    assert np.allclose(metrics.iou_per_class(matrix).nan_to_num(0), want, atol=1e-6)
    assert metrics.mean_iou(matrix) == pytest.approx(100 * want[present].mean().item(), abs=1e-4)
    assert metrics.pixel_accuracy(matrix) == pytest.approx(100 * accuracy.item(), abs=1e-4)


def test_folding_a_matrix_equals_relabelling_the_maps():
    random = torch.Generator().manual_seed(0)
    truth, guess = (torch.randint(0, count, (500,), generator=random) for count in (9, 5))
    rows, columns = [0, 0, 1, 2, 3, 3, 1, 2, 3], [1, 0, 2, 2, 3]
    matrix = metrics.confusion(guess, truth, 5, truths=9)
    assert matrix.shape == (9, 5) and (matrix[4, 2] == ((truth == 4) & (guess == 2)).sum())
    relabelled = metrics.confusion(torch.tensor(columns)[guess], torch.tensor(rows)[truth], 4)
    assert torch.equal(metrics.fold(matrix, rows, columns), relabelled)
