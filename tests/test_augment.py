"""datasets.augment: the shift by hand, and batches on a device equal to single samples."""
import itertools

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from mdil.datasets.augment import MAX_SHIFT, Draw, augment, augment_batch, draw
from mdil.datasets.segmentation import SegmentationDataset
from mdil.training import domain_data
from mdil.training.options import parse_train
from mdil.utils.parallel import Place

SHIFTS = range(-MAX_SHIFT, MAX_SHIFT + 1)
EVERY_DRAW = [Draw(*values) for values in itertools.product((False, True), SHIFTS, SHIFTS)]
LABEL = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]], dtype=torch.uint8)
VOID = 19


@pytest.mark.parametrize('drawn, expected', [
    (Draw(False, 0, 0), [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]]),
    (Draw(True, 0, 0), [[4, 3, 2, 1], [8, 7, 6, 5], [12, 11, 10, 9]]),
    (Draw(False, 1, 2), [[VOID] * 4, [VOID] * 4, [VOID, 1, 2, 3]]),
    (Draw(False, -2, -1), [[7, 8, VOID, VOID], [11, 12, VOID, VOID], [VOID] * 4]),
    (Draw(True, 1, 0), [[VOID, 4, 3, 2], [VOID, 8, 7, 6], [VOID, 12, 11, 10]])])
def test_by_hand(drawn, expected):
    image, label = augment(LABEL.expand(3, 3, 4), LABEL, drawn, VOID)
    expected = torch.tensor(expected, dtype=torch.uint8)
    assert torch.equal(label, expected)
    assert torch.equal(image, expected.where(expected != VOID, torch.zeros_like(expected)).expand(3, 3, 4))


@pytest.mark.parametrize('drawn', EVERY_DRAW)
def test_released_padding_is_that_of_pillows_expand_and_crop(drawn):
    """The published loops expand by a border, which may be negative, and crop to the old size."""
    label = Image.fromarray(LABEL.numpy())
    if drawn.flip:
        label = label.transpose(Image.FLIP_LEFT_RIGHT)
    label = ImageOps.expand(label, border=(drawn.right, drawn.down, 0, 0), fill=VOID)
    label = label.crop((0, 0, label.size[0] - drawn.right, label.size[1] - drawn.down))
    got = augment(LABEL.expand(3, 3, 4), LABEL, drawn, VOID, 'released')[1]
    assert torch.equal(got, torch.from_numpy(np.array(label)))


def test_draws_cover_every_shift_and_flip():
    drawn = [draw(0, epoch, number) for epoch in (1, 2) for number in range(600)]
    assert set(drawn) == set(EVERY_DRAW)
    assert draw(0, 1, 5) == draw(0, 1, 5) and drawn[:600] != drawn[600:]
    assert [draw(1, 1, number) for number in range(600)] != drawn[:600]


def devices():
    return ['cpu'] + ['cuda'] * torch.cuda.is_available()


@pytest.mark.parametrize('padding', ['void', 'released'])
@pytest.mark.parametrize('device', devices())
def test_batch_equals_single_samples(device, padding):
    random = torch.Generator().manual_seed(0)
    images = torch.randint(256, (len(EVERY_DRAW), 3, 8, 16), dtype=torch.uint8, generator=random)
    labels = torch.randint(20, (len(EVERY_DRAW), 8, 16), dtype=torch.uint8, generator=random)
    before = images.clone(), labels.clone()
    singles = [augment(image, label, one, VOID, padding) for image, label, one in zip(images, labels, EVERY_DRAW)]
    out = augment_batch(images.to(device), labels.to(device), EVERY_DRAW, VOID, padding)
    for got, one_by_one in zip(out, zip(*singles)):
        assert got.device.type == device and torch.equal(got.cpu(), torch.stack(one_by_one))
    assert torch.equal(images, before[0]) and torch.equal(labels, before[1])


@pytest.mark.parametrize('padding', ['void', 'released'])
@pytest.mark.parametrize('where', ['workers', 'device'])
def test_a_run_feeds_the_same_batches_wherever_it_augments(toy, where, padding):
    options = parse_train(['--domains', 'CS', '--savedir', 'x', '--data-root', str(toy), '--height', '32', '--seed', '3',
                           '--batch-size', '3', '--num-workers', '0', '--class-weights', 'none', '--augment', where,
                           '--label-padding', padding])
    place = Place(torch.device('cpu'))
    data = domain_data.build_data(options, place)[0]
    assert data.train.dataset.augmented == (where == 'workers')
    for epoch in (1, 2):
        data.train.batch_sampler.epoch = epoch
        for batch in data.train:
            images, labels = domain_data.on_device(data, batch, options.seed, epoch, place)
            for image, label, number in zip(images, labels, batch[2].tolist()):
                source = SegmentationDataset(data.domain, toy, 'train', (32, 64))
                wanted = augment(*source.load(number), draw(3, epoch, number), data.domain.void, padding)
                assert torch.equal(image, wanted[0]) and torch.equal(label, wanted[1])
