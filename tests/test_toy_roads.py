import json
import os
import sys

import numpy as np
import pytest
from PIL import Image, ImageDraw

from mdil.datasets.labels import label_table
from mdil.datasets.toy import roads as toy_roads, scenes as toy_scenes
from mdil.datasets.toy.roads import draw_scene, label_image, write_toy_roads
from mdil.utils.errors import UserError, run_main

HEIGHT, WIDTH = 64, 128
IMAGES = {'cityscapes': ('cityscapes/leftImg8bit', '_leftImg8bit.png', 'cityscapes/gtFine', '_gtFine_labelIds.png'),
          'BDD': ('bdd100k/seg/images', '.jpg', 'bdd100k/seg/labels', '_train_id.png'),
          'IDD': ('IDD_Segmentation/leftImg8bit', '_leftImg8bit.png', 'IDD_Segmentation/gtFine',
                  '_gtFine_labellevel3Ids.png')}
COUNTS = {'train': 4, 'val': 2}


def contents(root):
    """{path below root: bytes} of all files."""
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob('*') if path.is_file()}


def keys(folder, suffix):
    return sorted(path.relative_to(folder).as_posix()[:-len(suffix)] for path in folder.rglob('*' + suffix))


@pytest.fixture(scope='module')
def roads(tmp_path_factory):
    root = tmp_path_factory.mktemp('roads')
    write_toy_roads(root, **COUNTS, height=HEIGHT, width=WIDTH)
    return root


@pytest.fixture(scope='module')
def classes_seen():
    """{country: names of classes that cover at least 30 pixels of one of 30 scenes}."""
    seen = {}
    for country, (table, _column) in toy_roads.COUNTRIES.items():
        names = [row['name'] for row in label_table(table)]
        found = set()
        for seed in range(30):
            objects = draw_scene(country, seed, HEIGHT, WIDTH)[1]
            index = Image.new('L', (WIDTH, HEIGHT), 255)
            for entry in objects:
                outline = [tuple(point) for point in entry['polygon']]
                ImageDraw.Draw(index).polygon(outline, fill=names.index(entry['label']))
            counts = np.bincount(np.asarray(index).ravel(), minlength=256)
            assert counts[255] == 0, 'every pixel belongs to an object'
            found.update(names[i] for i in np.flatnonzero(counts >= 30))
        seen[country] = found
    return seen


@pytest.mark.parametrize('country', toy_roads.COUNTRIES)
def test_a_scene_follows_from_its_seed(country):
    image, objects = draw_scene(country, 3, HEIGHT, WIDTH)
    again, same = draw_scene(country, 3, HEIGHT, WIDTH)
    other, different = draw_scene(country, 4, HEIGHT, WIDTH)
    assert image.shape == (HEIGHT, WIDTH, 3) and image.dtype == np.uint8
    assert np.array_equal(image, again) and objects == same
    assert not np.array_equal(image, other) and objects != different


def test_scenes_do_not_depend_on_how_many_are_written(tmp_path):
    for name, train in (('one', 1), ('two', 2)):
        write_toy_roads(tmp_path / name, train=train, val=1, height=16, width=32, seed=7)
    one, two = contents(tmp_path / 'one'), contents(tmp_path / 'two')
    for files in (one, two):
        del files['toy_roads.json']
    assert len(one) == 2 * 2 + 2 * 2 + 2 * 3 and len(two) == 3 * 2 + 3 * 2 + 3 * 3
    assert one.items() < two.items()


def test_another_seed_gives_other_scenes_of_the_same_names(tmp_path, roads):
    write_toy_roads(tmp_path, train=1, val=1, height=HEIGHT, width=WIDTH, seed=1)
    ours, theirs = contents(tmp_path), contents(roads)
    assert ours.keys() < theirs.keys()
    assert not any(ours[name] == theirs[name] for name in ours)


@pytest.mark.parametrize('domain', IMAGES)
@pytest.mark.parametrize('split', COUNTS)
def test_images_and_labels_pair_up(roads, domain, split):
    images, image_suffix, labels, label_suffix = IMAGES[domain]
    names = keys(roads / images / split, image_suffix)
    assert len(names) == COUNTS[split]
    assert names == keys(roads / labels / split, label_suffix)
    for name in names:
        image = Image.open(roads / images / split / (name + image_suffix))
        label = Image.open(roads / labels / split / (name + label_suffix))
        assert image.size == label.size == (WIDTH, HEIGHT)
        assert (image.mode, label.mode) == ('RGB', 'L')


def test_all_pictures_differ(roads):
    pictures = [content for name, content in contents(roads).items()
                if '/leftImg8bit/' in name or '/images/' in name]
    assert len(pictures) == len(set(pictures)) == 3 * sum(COUNTS.values())


@pytest.mark.parametrize('domain, country', list(zip(IMAGES, toy_roads.COUNTRIES)))
def test_label_values_are_of_the_table(roads, domain, country):
    table, column = toy_roads.COUNTRIES[country]
    valid = {row[column] for row in label_table(table)}
    values = set()
    for path in (roads / IMAGES[domain][2]).rglob('*.png'):
        values |= set(np.unique(np.asarray(Image.open(path))).tolist())
    assert values <= valid
    assert len(values) > 12


def test_indian_labels_equal_their_polygons(roads):
    ids = {row['name']: row['level3Id'] for row in label_table('idd')}
    files = sorted((roads / 'IDD_Segmentation/gtFine').rglob('*_polygons.json'))
    assert len(files) == sum(COUNTS.values())
    for path in files:
        annotation = json.loads(path.read_text())
        assert (annotation['imgWidth'], annotation['imgHeight']) == (WIDTH, HEIGHT)
        expected = Image.new('L', (WIDTH, HEIGHT), 255)
        for entry in annotation['objects']:
            assert entry.keys() == {'label', 'polygon', 'deleted', 'verified', 'date', 'id', 'user'}
            outline = [(int(x), int(y)) for x, y in entry['polygon']]
            assert [list(point) for point in outline] == entry['polygon']
            ImageDraw.Draw(expected).polygon(outline, fill=ids[entry['label']])
        label = Image.open(path.with_name(path.name.replace('polygons.json', 'labellevel3Ids.png')))
        assert np.array_equal(np.asarray(label), np.asarray(expected))


def test_picture_and_label_share_their_edges():
    scene = toy_scenes.Scene('germany', np.random.default_rng(0), 60, 80)
    scene.polygon([(-1, -1), (80, -1), (80, 60), (-1, 60)], (0, 0, 0), 'road')
    scene.polygon([(10.3, 8.6), (50.4, 12.2), (61.7, 40.1), (20.2, 51.8)], (255, 0, 0), 'car')
    painted = np.asarray(scene.canvas.reduce(2))[..., 0] > 127
    labelled = np.asarray(label_image(scene.objects, 'germany', 60, 80)) == 26
    assert 1000 < labelled.sum() < 2000
    inner = labelled[:-2, 1:-1] & labelled[2:, 1:-1] & labelled[1:-1, :-2] & labelled[1:-1, 2:]
    outer = labelled[:-2, 1:-1] | labelled[2:, 1:-1] | labelled[1:-1, :-2] | labelled[1:-1, 2:]
    assert not (inner & ~painted[1:-1, 1:-1]).any()
    assert not (painted[1:-1, 1:-1] & ~outer).any()


def test_the_layout_does_not_depend_on_the_size():
    small, large = (draw_scene('usa', 5, height, 2 * height)[1] for height in (96, 192))
    first, second = (next(entry for entry in objects if entry['label'] == 'road') for objects in (small, large))
    assert np.abs(2 * np.array(first['polygon']) - np.array(second['polygon'])).max() <= 2


def test_every_country_has_its_classes(classes_seen):
    common = {'road', 'sidewalk', 'building', 'vegetation', 'sky', 'car', 'truck', 'bus', 'person', 'rider', 'bicycle',
              'motorcycle', 'pole', 'traffic sign', 'traffic light', 'wall', 'fence', 'ego vehicle'}
    for country, seen in classes_seen.items():
        assert common <= seen, country
    assert 'terrain' in classes_seen['germany'] and 'terrain' in classes_seen['usa']


def test_some_classes_are_of_one_country(classes_seen):
    only = {'train': 'germany', 'autorickshaw': 'india', 'animal': 'india', 'billboard': 'india', 'curb': 'india',
            'vehicle fallback': 'india', 'non-drivable fallback': 'india', 'obs-str-bar-fallback': 'india'}
    for label, country in only.items():
        assert [name for name, seen in classes_seen.items() if label in seen] == [country], label


def test_countries_differ_in_colour():
    means, saturation = [], []
    for country in toy_roads.COUNTRIES:
        images = np.stack([draw_scene(country, seed, 32, 64)[0] for seed in range(12)]).astype(float)
        means.append(images.mean((0, 1, 2)))
        saturation.append((images.max(-1) - images.min(-1)).mean())
    germany, usa, india = means
    assert germany[2] > germany[0] + 5, 'grey light is bluish'
    assert india[0] > india[2] + 40, 'dust is brown'
    assert india[0] > usa[0] + 15
    assert usa[0] - usa[2] > germany[0] - germany[2] + 8
    assert saturation[1] > 2 * saturation[0]


def test_a_second_write_does_nothing(roads):
    before = {path: path.stat().st_mtime_ns for path in roads.rglob('*')}
    write_toy_roads(roads, **COUNTS, height=HEIGHT, width=WIDTH)
    assert before == {path: path.stat().st_mtime_ns for path in roads.rglob('*')}


def test_another_request_is_refused(roads):
    before = contents(roads)
    with pytest.raises(ValueError, match='another folder'):
        write_toy_roads(roads, train=9, val=3, height=HEIGHT, width=WIDTH)
    assert contents(roads) == before


def test_an_interrupted_write_goes_on(tmp_path, monkeypatch):
    request = dict(train=1, val=1, height=16, width=32)
    write_scene, written = toy_roads.write_scene, []

    def break_off(*scene):
        if len(written) == 4:
            raise KeyboardInterrupt
        written.append(write_scene(*scene))

    monkeypatch.setattr(toy_roads, 'write_scene', break_off)
    with pytest.raises(KeyboardInterrupt):
        write_toy_roads(tmp_path / 'broken', **request)
    assert not (tmp_path / 'broken/toy_roads.json').exists()
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r'other toy roads \(seed 0, not 1\)'):
        write_toy_roads(tmp_path / 'broken', **{**request, 'seed': 1})
    write_toy_roads(tmp_path / 'broken', **request)
    write_toy_roads(tmp_path / 'straight', **request)
    assert contents(tmp_path / 'broken') == contents(tmp_path / 'straight')


def test_a_broken_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / 'image.png'
    toy_roads.save(path, b'old')

    def full(_):
        raise OSError('disk full')

    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(UserError, match='disk full'):
        toy_roads.save(path, b'newer')
    assert contents(tmp_path) == {'image.png': b'old'}


def test_real_data_is_left_alone(tmp_path):
    (tmp_path / 'cityscapes').mkdir()
    with pytest.raises(ValueError, match='not of toy roads'):
        write_toy_roads(tmp_path, train=1, val=1)
    assert [path.name for path in tmp_path.rglob('*')] == ['cityscapes']


@pytest.mark.parametrize('wrong', [{'train': 0}, {'height': 8}, {'width': 2.5}, {'seed': -1}, {'width': 10 ** 9}])
def test_bad_values_are_refused(tmp_path, wrong):
    with pytest.raises(ValueError, match=f'{next(iter(wrong))} must be'):
        write_toy_roads(tmp_path / 'out', **wrong)
    assert not (tmp_path / 'out').exists()


def test_an_unknown_country_is_named():
    with pytest.raises(ValueError, match="'france'; choose one of germany, usa, india"):
        draw_scene('france', 0)


def run_command(monkeypatch, *arguments):
    """Exit status of the command line."""
    monkeypatch.setattr(sys, 'argv', ['toy_roads', *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        run_main(toy_roads.main)
    return stop.value.code or 0


def test_command_line(tmp_path, monkeypatch, capfd):
    request = ['--out', tmp_path / 'out', '--train', 1, '--val', 1, '--height', 32, '--width', 64]
    assert run_command(monkeypatch, *request) == 0
    assert tuple(capfd.readouterr()) == (f'{tmp_path}/out: 1 training and 1 validation scenes, 64x32, in each of cityscapes, '
                                         'bdd100k, IDD_Segmentation\n', '')
    assert json.loads((tmp_path / 'out/toy_roads.json').read_text())['height'] == 32
    (tmp_path / 'file').touch()
    for extra, word in ((['--seed', 1], 'another folder'), (['--train', 'x'], 'invalid int'),
                        (['--out', tmp_path / 'file'], 'file'), (['--nonsense'], 'nonsense')):
        assert run_command(monkeypatch, *request, *extra) == 2
        message = capfd.readouterr().err
        assert word in message and message.count('\n') == 1


def test_the_module_runs_as_a_script(tmp_path, script_here):
    status, _, err = script_here('datasets.toy_roads', '--out', tmp_path, '--width', '8')
    assert status == 2 and err == 'error: width must be a whole number from 16 to 4096, found 8\n'
