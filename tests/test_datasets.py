"""Domains in their true layouts: what belongs together, what the labels mean, what augmentation does."""
import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

from mdil.datasets import DOMAINS, SegmentationDataset, check, get_domain
from mdil.datasets.cache import cached
from mdil.datasets.domains import index_among
from mdil.datasets.labels import label_table
from mdil.datasets.loading import EvalBatches, TrainBatches, make_loader, spaced
from mdil.datasets.pairs import find_split
from mdil.utils.errors import UserError

# Image and label paths of sample n under the domain's folder, and raw label value -> class index.
LAYOUTS = {
    'cityscapes-trainids': ('cityscapes', 'leftImg8bit/train/c{n}/c{n}_0_leftImg8bit.png',
                            'gtFine/train/c{n}/c{n}_0_gtFine_labelTrainIds.png', {0: 0, 18: 18, 255: 19}),
    'cityscapes-ids': ('cityscapes', 'leftImg8bit/train/c{n}/c{n}_0_leftImg8bit.jpg',
                       'gtFine/train/c{n}/c{n}_0_gtFine_labelIds.png',
                       {7: 0, 8: 1, 11: 2, 26: 13, 33: 18, 0: 19, 4: 19, 9: 19}),
    'bdd-seg': ('BDD', 'seg/images/train/a{n}.jpg', 'seg/labels/train/a{n}_train_id.png', {0: 0, 18: 18, 255: 19}),
    'bdd-10k': ('BDD', 'images/10k/train/a{n}.jpg', 'labels/sem_seg/masks/train/a{n}.png', {0: 0, 255: 19}),
    'idd': ('IDD', 'leftImg8bit/train/{n}/f_leftImg8bit.png', 'gtFine/train/{n}/f_gtFine_labellevel3Ids.png',
            {0: 0, 25: 25, 255: 26}),
    'idd-lite': ('idd-lite', 'leftImg8bit/train/{n}/f_image.jpg', 'gtFine/train/{n}/f_label.png', {6: 6, 255: 7}),
    'camvid': ('camvid', 'train/x{n}.png', 'trainannot/x{n}.png', {0: 0, 10: 10, 11: 11})}
SIZE = (16, 32)


def write(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array, dtype=np.uint8)).save(path, **({'quality': 100} if path.suffix == '.jpg' else {}))


def write_samples(folder, image, label, values, count=3):
    """Sample n is an image of grey 60 n under a label whose columns are the raw values, in turn from n on."""
    raw = list(values)
    for n in range(count):
        write(folder / image.format(n=n), np.full((*SIZE, 3), 60 * n))
        row = [raw[(n + column) % len(raw)] for column in range(SIZE[1])]
        write(folder / label.format(n=n), np.tile(row, (SIZE[0], 1)))


@pytest.mark.parametrize('layout', LAYOUTS)
def test_pairs_and_label_values(tmp_path, layout):
    """Swapped partners or a label off by one show: content names the sample, values are exact."""
    name, image, label, values = LAYOUTS[layout]
    domain = get_domain(name)
    write_samples(tmp_path / domain.folder, image, label, values)
    data = SegmentationDataset(domain, tmp_path, 'train', SIZE)
    assert len(data) == 3
    classes = list(values.values())
    for index in range(3):
        pixels, labels, _ = data[0, index]
        n = round(pixels.float().mean().item() / 60)
        assert n == index
        want = [classes[(n + column) % len(classes)] for column in range(SIZE[1])]
        assert labels.tolist() == [want] * SIZE[0]


def test_a_domain_is_found_by_any_of_its_names_in_any_case():
    names = ['MyTown', 'cityscapes']
    assert [index_among(names, name, 'x') for name in ('mytown', 'MyTown', 'CS', 'CITY', 'cityscapes')] == [0, 0, 1, 1, 1]
    with pytest.raises(UserError, match='x.pth knows MyTown, cityscapes, not BDD'):
        index_among(names, 'BDD', 'x.pth')
    with pytest.raises(UserError, match=r'not mytwn \(did you mean MyTown\?\)'):
        index_among(names, 'mytwn', 'x.pth')


def test_aliases_and_class_counts():
    for alias, name, count in (('CS', 'cityscapes', 20), ('cityscapes', 'cityscapes', 20), ('bdd100k', 'BDD', 20),
                               ('BDD', 'BDD', 20), ('idd', 'IDD', 27), ('IDD', 'IDD', 27), ('camvid', 'camvid', 12),
                               ('idd-lite', 'idd-lite', 8)):
        domain = get_domain(alias)
        assert (domain.name, domain.num_classes) == (name, count)
    for domain in DOMAINS.values():
        assert len(domain.palette) == domain.num_classes and len(set(domain.classes)) == len(domain.classes)
        assert domain.weights is None or len(domain.weights) == domain.num_classes


def own_domain(folder, count=3, **changes):
    spec = {'images': 'photos/{split}', 'labels': 'masks/{split}', 'void': 9,
            'classes': [{'name': 'way', 'color': [1, 2, 3]}, {'name': 'rest', 'color': [4, 5, 6]}], **changes}
    write_samples(folder, 'photos/train/p{n}.jpg', 'masks/train/p{n}.png', {0: 0, 1: 1, 9: 2}, count)
    (folder / 'domain.json').write_text(json.dumps(spec))
    return folder


def test_own_domain_from_two_folders_and_a_json_file(tmp_path):
    domain = get_domain('village', {'village': own_domain(tmp_path / 'v')})
    assert (domain.classes, domain.num_classes, domain.void) == (('way', 'rest'), 3, 2)
    data = SegmentationDataset(domain, 'anywhere', 'train', SIZE)
    assert data[0, 1][1][0, :4].tolist() == [1, 2, 0, 1]
    assert get_domain('village', {'village': tmp_path / 'v' / 'domain.json'}) == domain


@pytest.mark.parametrize('changes, message', [
    ({'classes': []}, '1 to 254 classes'), ({'weights': [1.0]}, '1 weights for 2 classes')])
def test_own_domain_that_is_wrong(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        get_domain('v', {'v': own_domain(tmp_path, **changes)})
    with pytest.raises(UserError, match='does not exist'):
        get_domain('v', {'v': tmp_path / 'nowhere'})


def test_place_of_a_known_domain(tmp_path):
    write_samples(tmp_path / 'elsewhere', *LAYOUTS['camvid'][1:])
    domain = get_domain('camvid', {'camvid': tmp_path / 'elsewhere'})
    assert len(SegmentationDataset(domain, 'nowhere', 'train', SIZE)) == 3


def camvid(tmp_path):
    folder = tmp_path / 'camvid'
    write_samples(folder, *LAYOUTS['camvid'][1:])
    return folder, lambda: SegmentationDataset(get_domain('camvid'), tmp_path, 'train', SIZE)


def test_unpaired_files_are_left_out_and_said(tmp_path, capsys):
    folder, make = camvid(tmp_path)
    write(folder / 'train/lonely.png', np.zeros((*SIZE, 3)))
    (folder / 'trainannot/x0.png').unlink()
    data = make()
    assert [pair.image.stem for pair in data.pairs] == ['x1', 'x2']
    said = capsys.readouterr().err
    assert '2 images without a label' in said and 'lonely.png' in said


def test_bad_data_names_the_file(tmp_path):
    folder, make = camvid(tmp_path)
    write(folder / 'trainannot/x0.png', np.full(SIZE, 33))
    with pytest.raises(UserError, match=r'x0.png: label values \[33\].*label IDs'):
        make()[0, 0]
    write(folder / 'trainannot/x1.png', np.zeros((8, 8)))
    with pytest.raises(UserError, match='x1.png is 32x16 but its label .*x1.png is 8x8'):
        make()[0, 1]
    (folder / 'train/x2.png').write_bytes((folder / 'train/x2.png').read_bytes()[:40])
    with pytest.raises(UserError, match='x2.png cannot be read'):
        make()[0, 2]
    write(folder / 'trainannot/x0.png', np.zeros((*SIZE, 3)))
    with pytest.raises(UserError, match='x0.png: label image has mode RGB'):
        make()[0, 0]


def test_nothing_there_says_where_it_looked(tmp_path):
    with pytest.raises(UserError, match='no train images of BDD: looked in .*seg/images/train.*images/10k/train'):
        find_split(get_domain('BDD'), tmp_path, 'train')
    write(tmp_path / 'cityscapes/leftImg8bit/train/a/a_leftImg8bit.png', np.zeros((*SIZE, 3)))
    with pytest.raises(UserError, match='run python -m mdil create-labels cityscapes'):
        find_split(get_domain('CS'), tmp_path, 'train')


def test_nothing_found_says_what_was(tmp_path):
    """A hint is given only where it helps: the folders that exist need other names in them."""
    for number in range(3):
        write(tmp_path / f'bdd100k/seg/images/train/{number}.gif', np.zeros(SIZE))
    with pytest.raises(UserError, match=r'seg/images/train \(which holds 3 files, e.g. 0.gif\).*images/10k/train \(which '
                                        r'does not exist\).*wanted are \*.jpg or \*.png') as error:
        find_split(get_domain('BDD'), tmp_path, 'train')
    assert '--data' not in str(error.value)
    write(tmp_path / 'cityscapes/leftImg8bit/train/a/a_leftImg8bit.png', np.zeros((*SIZE, 3)))
    (tmp_path / 'cityscapes/gtFine/train/a').mkdir(parents=True)
    (tmp_path / 'cityscapes/gtFine/train/a/a_gtFine_polygons.json').write_text('')
    with pytest.raises(UserError, match='holds 1 files, e.g. a_gtFine_polygons.json; run python -m mdil create-labels'):
        find_split(get_domain('CS'), tmp_path, 'train')


def test_the_first_layout_that_gives_pairs_counts(tmp_path):
    """A left-over image where BDD's first layout has its images."""
    write(tmp_path / 'bdd100k/seg/images/train/stray.jpg', np.zeros((*SIZE, 3)))
    write_samples(tmp_path / 'bdd100k', *LAYOUTS['bdd-10k'][1:])
    assert [pair.image.stem for pair in find_split(get_domain('BDD'), tmp_path, 'train').pairs] == ['a0', 'a1', 'a2']


def names(tmp_path):
    found = find_split(get_domain('camvid'), tmp_path, 'train')
    assert not found.without_label and not found.without_image
    return [pair.image.relative_to(tmp_path / 'camvid/train').as_posix() for pair in found.pairs]


def test_hidden_folders_are_skipped_and_real_ones_visited_once(tmp_path):
    folder, _ = camvid(tmp_path)
    plain = [f'x{number}.png' for number in range(3)]
    for place in ('train', 'trainannot'):
        for hidden in ('.ipynb_checkpoints', 'a/.Trash-1000/files'):
            write(folder / place / hidden / 'x0-checkpoint.png', np.zeros((*SIZE, 3)))
        (folder / place / 'again').symlink_to(folder / place)       # a link to the folder that it lies in
        (folder / place / 'loop.png').symlink_to('loop.png')
        (folder / place / 'b').mkdir()
        (folder / place / 'b/up').symlink_to('..')
    assert names(tmp_path) == plain
    for place, value in (('train', np.zeros((*SIZE, 3))), ('trainannot', np.zeros(SIZE))):
        write(folder / place / 'm/y.png', value)
        (folder / place / 'l').symlink_to(folder / place / 'm')     # comes first, but is no real folder
        write(tmp_path / 'outside' / place / 'z.png', value)
        (folder / place / 'o').symlink_to(tmp_path / 'outside' / place)
    assert names(tmp_path) == ['m/y.png', 'o/z.png', *plain]


def test_only_regular_files_are_opened_and_only_wanted_formats(tmp_path):
    folder, make = camvid(tmp_path)
    (folder / 'train/x0.png').unlink()
    os.mkfifo(folder / 'train/x0.png')
    (folder / 'train/x1.png').unlink()
    (folder / 'train/x1.png').symlink_to(folder / 'nowhere.png')
    (folder / 'train/x2.png').write_bytes(b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 16\n%%EndComments\nshowpage\n')
    assert [pair.image.name for pair in find_split(get_domain('camvid'), tmp_path, 'train').pairs] == ['x2.png']
    with pytest.raises(UserError, match='x2.png cannot be read: it is not a PNG, JPEG, TIFF, WEBP, BMP or PPM image'):
        make()[0, 0]


def test_file_names_of_any_bytes(tmp_path, capsys):
    folder, make = camvid(tmp_path)
    for place in ('train', 'trainannot'):
        (folder / place / 'x0.png').rename(folder / place / 'stra\udcdfe\n.png')
    data = make()
    assert len(cached(data, tmp_path / 'cache').load(0)[0]) == 3
    (folder / 'trainannot/stra\udcdfe\n.png').write_bytes(b'')
    with pytest.raises(UserError, match=r'stra\\udcdfe\\n.png cannot be read'):
        make().load(0)
    with pytest.raises(UserError):
        check.main(['--domains', 'camvid', '--data-root', str(tmp_path), '--splits', 'train', '--workers', '1'])
    capsys.readouterr().out.encode()        # what is printed can be


def test_every_epoch_sees_every_image_once_in_another_order():
    batches = TrainBatches(10, 3, seed=1)
    orders = []
    for batches.epoch in (1, 2):
        keys = [key for batch in batches for key in batch]
        assert sorted(keys) == [(batches.epoch, n) for n in range(10)]
        orders.append([n for _, n in keys])
    assert orders[0] != orders[1] and len(batches) == 4
    batches.epoch = 1
    assert [n for batch in batches for _, n in batch] == orders[0]


def test_images_are_spaced_evenly():
    assert spaced(range(10), 4) == [0, 2, 5, 7] and spaced(range(3), 4) == [0, 1, 2] and spaced([], 4) == []


def test_ranks_share_a_batch_and_leave_none_out():
    whole = list(TrainBatches(10, 4, seed=1))
    parts = [list(TrainBatches(10, 4, seed=1, rank=rank, world=2)) for rank in (0, 1)]
    assert [sorted(a + b) for a, b in zip(*parts)] == [sorted(batch) for batch in whole]
    odd = [list(TrainBatches(5, 4, seed=1, rank=rank, world=4)) for rank in range(4)]
    assert all(len(batch) == 1 for part in odd for batch in part)
    few = [list(TrainBatches(2, 8, seed=1, rank=rank, world=8)) for rank in range(8)]      # fewer images than ranks
    assert [len(batch) for part in few for batch in part] == [1] * 8
    evaluated = [key for rank in range(3) for batch in EvalBatches(10, 4, rank, 3) for key in batch]
    assert sorted(evaluated) == [(0, n) for n in range(10)]


def test_a_smaller_domain_is_repeated_to_the_size_of_the_largest():
    keys = [n for batch in TrainBatches(4, 3, seed=0, samples=10) for _, n in batch]
    assert len(keys) == 10 and sorted(n % 4 for n in keys[:4]) == [0, 1, 2, 3] and len(set(keys)) == 10


def test_workers_change_nothing(toy):
    domain, results = get_domain('CS'), []
    for workers in (0, 2):
        data = SegmentationDataset(domain, toy, 'train', (64, 128), augmented=True, seed=3)
        batches = TrainBatches(len(data), 3, seed=3)
        loader = make_loader(data, batches, workers, pin=False)
        batches.epoch = 2
        results.append(list(loader))
    for one, two in zip(*results):
        assert all(torch.equal(a, b) for a, b in zip(one, two))


def test_augmentation_depends_on_seed_epoch_and_sample(toy):
    make = lambda seed: SegmentationDataset(get_domain('CS'), toy, 'train', (64, 128), augmented=True, seed=seed)
    seen = [make(seed)[epoch, number][0] for seed, epoch, number in ((0, 1, 0), (0, 1, 8), (0, 2, 0), (1, 1, 0))]
    assert torch.equal(seen[0], make(0)[1, 0][0])
    assert len({image.numpy().tobytes() for image in seen}) > 1


def test_real_samples_pair(real):
    for name, counts in (('cityscapes', (60, 16)), ('camvid', (367, 101)), ('idd-lite', (702, 204))):
        for split, count in zip(('train', 'val'), counts):
            found = find_split(get_domain(name), real, split)
            assert len(found.pairs) == count and not found.without_label and not found.without_image


def test_idd_classes_are_called_as_in_its_own_table():
    """Labels of one level-3 id share a class; where one is a fallback of all of them, the class has its name."""
    rows = {}
    for row in label_table('idd'):
        rows.setdefault(row['level3Id'], []).append(row['name'])
    names = get_domain('IDD').classes
    assert all(name in rows[index] for index, name in enumerate(names))
    assert (names[1], names[3], names[12]) == ('drivable fallback', 'non-drivable fallback', 'vehicle fallback')
    assert all(name.endswith('fallback') for index, name in enumerate(names)
               if any(label.endswith('fallback') for label in rows[index]))
