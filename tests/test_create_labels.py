"""datasets.create_labels: pixels equal to the data sets' converters, restarts, bad input."""
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from mdil.datasets import get_domain
from mdil.datasets.create_labels import main
from mdil.datasets.labels import label_table
from mdil.datasets.pairs import find_split
from mdil.utils.errors import UserError
from mdil.utils.workers import in_parallel

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / 'tests/idd_polygons'
FRAMES = ('000001', '000002')
SQUARE = [[1, 1], [4, 1], [4, 4], [1, 4]]


def annotation(*objects, width=8, height=6):
    """JSON text of a polygon file; objects are (name, polygon, other fields)."""
    return json.dumps({'imgWidth': width, 'imgHeight': height, 'objects': [
        {'label': name, 'polygon': polygon, **other} for name, polygon, other in objects]})


def write_annotation(datadir, frame, text, split='train'):
    """Writes a polygon file of `frame`; gives the stem of its label images."""
    folder = datadir / 'gtFine' / split / 'a'
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f'{frame}_gtFine_polygons.json').write_text(text)
    return folder / f'{frame}_gtFine_label'


def pixels(stem, kind):
    image = Image.open(f'{stem}{kind}.png')
    assert image.mode == 'L'
    return np.array(image)


def run(dataset, datadir, *more):
    return main([dataset, '--datadir', str(datadir), '--workers', '1', *more])


@pytest.fixture
def examples(tmp_path):
    """A copy of the example annotations in the data set's folders."""
    folder = tmp_path / 'gtFine/val/seq'
    folder.mkdir(parents=True)
    for frame in FRAMES:
        shutil.copy(EXAMPLES / f'{frame}_gtFine_polygons.json', folder)
    return tmp_path


@pytest.mark.parametrize('id_type', ['csTrainId', 'level1Id', 'level3Id'])
def test_idd_equals_the_converter(examples, id_type):
    assert run('idd', examples, '--id-type', id_type) == 0
    for frame in FRAMES:
        name = f'{frame}_gtFine_label{id_type}s.png'
        assert np.array_equal(Image.open(examples / 'gtFine/val/seq' / name), Image.open(EXAMPLES / name)), name


def test_idd_levels_follow_from_ids(examples):
    kinds = ('id', 'csId', 'csTrainId', 'level4Id', 'level3Id', 'level2Id', 'level1Id')
    for kind in kinds:
        run('idd', examples, '--id-type', kind)
    for frame in FRAMES:
        ids = pixels(examples / f'gtFine/val/seq/{frame}_gtFine_label', 'ids')
        assert len(np.unique(ids)) > 10
        for kind in kinds[1:]:
            table = np.array([min(row[kind], 255) for row in label_table('idd')])
            found = pixels(examples / f'gtFine/val/seq/{frame}_gtFine_label', f'{kind}s')
            assert np.array_equal(found, table[ids]), kind


def test_linked_folders_are_followed(examples, tmp_path_factory):
    linked = tmp_path_factory.mktemp('linked')
    (linked / 'gtFine').mkdir()
    (linked / 'gtFine/val').symlink_to(examples / 'gtFine/val')
    assert run('idd', linked) == 0
    assert len(list(examples.rglob('*.png'))) == 2


def test_a_read_only_data_set_has_its_labels_elsewhere(tmp_path, monkeypatch, capsys):
    """With a link to the images, the other folder is a whole data set."""
    data, out = tmp_path / 'data', tmp_path / 'out'
    write_annotation(data, 'f', annotation(('car', SQUARE, {})))
    (data / 'leftImg8bit/train/a').mkdir(parents=True)
    Image.new('RGB', (8, 6)).save(data / 'leftImg8bit/train/a/f_leftImg8bit.png')
    before = sorted(data.rglob('*'))
    monkeypatch.setattr(os, 'access', lambda path, mode: not str(path).startswith(str(data)))
    with pytest.raises(UserError, match='gtFine cannot be written to; --out FOLDER'):
        run('cityscapes', data)
    for _ in range(2):
        assert run('cityscapes', data, '--out', str(out)) == 0
    assert '1 kept' in capsys.readouterr().out and sorted(data.rglob('*')) == before
    (pair,) = find_split(get_domain('CS', {'CS': out}), '', 'train').pairs
    assert pair.label == out / 'gtFine/train/a/f_gtFine_labelTrainIds.png' and np.asarray(Image.open(pair.label))[2, 2] == 13
    (tmp_path / 'file').write_text('')
    with pytest.raises(UserError, match='--out .*file cannot be written to'):
        run('cityscapes', data, '--out', str(tmp_path / 'file'))


def test_idd_default_is_level3(examples):
    run('idd', examples)
    assert {path.name for path in (examples / 'gtFine/val/seq').glob('*.png')} == {
        f'{frame}_gtFine_labellevel3Ids.png' for frame in FRAMES}


def test_idd_background_is_unlabeled(tmp_path):
    stem = write_annotation(tmp_path, 'f', annotation())
    for kind, value in (('id', 35), ('csId', 0), ('csTrainId', 255), ('level4Id', 255), ('level1Id', 255)):
        run('idd', tmp_path, '--id-type', kind)
        assert pixels(stem, f'{kind}s').shape == (6, 8)
        assert (pixels(stem, f'{kind}s') == value).all()


def test_cs_id_beyond_8_bits_is_void(tmp_path):
    stem = write_annotation(tmp_path, 'f', annotation(('vehicle fallback', SQUARE, {})))
    run('idd', tmp_path, '--id-type', 'csId')
    assert pixels(stem, 'csIds')[2, 2] == 255
    drawn = Image.new('L', (3, 3))
    ImageDraw.Draw(drawn).rectangle([0, 0, 2, 2], fill=355)     # what Pillow makes of it in the converter
    assert drawn.getpixel((1, 1)) == 255


@pytest.mark.parametrize('name, polygon, other, value', [
    ('car', SQUARE, {}, 12),
    ('car', SQUARE, {'deleted': 0}, 12),
    ('car', SQUARE, {'deleted': 1}, 0),
    ('car', SQUARE, {'deleted': True}, 0),
    ('car', SQUARE[:2], {}, 0),
    ('car', [], {}, 0),
    ('cargroup', SQUARE, {}, 12),
    ('polegroup', SQUARE, {}, 27),                          # a label of its own
    ('license plate', SQUARE, {}, 39),
    ('spaceship', SQUARE, {}, 0),
    ('spaceshipgroup', SQUARE, {}, 0),
    ('car', [[-9.7, -9.7], [99.5, -9.5], [99.5, 99.5], [-9.5, 99.5]], {}, 12),
])
def test_idd_objects(tmp_path, name, polygon, other, value):
    everywhere = [[0, 0], [8, 0], [8, 6], [0, 6]]
    stem = write_annotation(tmp_path, 'f', annotation(('road', everywhere, {}), (name, polygon, other)))
    assert run('idd', tmp_path, '--id-type', 'id') == 0
    assert pixels(stem, 'ids')[2, 2] == value


def test_coordinates_are_cut_to_integers(tmp_path):
    stem = write_annotation(tmp_path, 'f', annotation(('car', [[1.9, 1.9], [4.9, 1.9], [4.9, 4.9], [1.9, 4.9]], {})))
    run('idd', tmp_path, '--id-type', 'id')
    rows, columns = np.nonzero(pixels(stem, 'ids') == 12)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (1, 4, 1, 4)


def test_unknown_names_are_reported(tmp_path, capsys):
    write_annotation(tmp_path, 'f', annotation(('spaceship', SQUARE, {}), ('spaceship', SQUARE, {})))
    write_annotation(tmp_path, 'g', annotation(('spaceship', SQUARE, {'deleted': 1}), ('car', SQUARE, {})))
    assert run('idd', tmp_path) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if 'spaceship' in line]
    assert len(lines) == 1 and '2 objects in 1 files' in lines[0] and 'f_gtFine_polygons.json' in lines[0]


def random_objects(seed, names):
    """Objects as annotators make them, and worse: floats, outside the image, two points, deleted, groups."""
    draw = random.Random(seed)
    for _ in range(60):
        x, y = draw.uniform(-20, 180), draw.uniform(-20, 116)
        points = [[x + draw.gauss(0, 20), y + draw.gauss(0, 20)] for _ in range(draw.choice((2, 3, 4, 7, 12)))]
        if draw.random() < .5:
            points = [[round(x), round(y)] for x, y in points]
        yield draw.choice(names) + draw.choice(('', '', 'group')), points, {'deleted': int(draw.random() < .2)}


@pytest.mark.parametrize('seed', range(5))
def test_cityscapes_equals_cityscapesscripts(tmp_path, seed):
    pytest.importorskip('cityscapesscripts')
    from cityscapesscripts.helpers.labels import name2label
    from cityscapesscripts.preparation.json2labelImg import json2labelImg
    objects = list(random_objects(seed, sorted(name2label)))
    stem = write_annotation(tmp_path, 'f', annotation(*objects, width=160, height=96))
    assert run('cityscapes', tmp_path) == 0
    expected = tmp_path / 'expected.png'
    json2labelImg(str(stem.with_name('f_gtFine_polygons.json')), str(expected), 'trainIds')
    assert np.array_equal(pixels(stem, 'TrainIds'), Image.open(expected))
    assert len(np.unique(pixels(stem, 'TrainIds'))) > 8


def test_cityscapes_undrawn(tmp_path):
    objects = [('car', SQUARE, {}), ('license plate', SQUARE, {}), ('spaceship', SQUARE, {}), ('road', [], {}),
               ('road', [[2, 2]], {})]
    stem = write_annotation(tmp_path, 'f', annotation(*objects))
    assert run('cityscapes', tmp_path) == 0
    assert pixels(stem, 'TrainIds')[2, 2] == 13         # the car: nothing after it is drawn
    assert pixels(stem, 'TrainIds')[0, 0] == 255        # background is void


def save_label_ids(datadir, frame, values):
    """A Cityscapes image of label ids; gives the stem of the frame's label images."""
    folder = datadir / 'gtFine/train/a'
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.array(values, dtype=np.uint8)).save(folder / f'{frame}_gtFine_labelIds.png')
    return folder / f'{frame}_gtFine_label'


def test_cityscapes_from_label_ids(tmp_path):
    labels = pytest.importorskip('cityscapesscripts.helpers.labels')
    ids = [[*range(34)]]
    stem = save_label_ids(tmp_path, 'f', ids)
    assert run('cityscapes', tmp_path) == 0
    assert pixels(stem, 'TrainIds').tolist() == [[labels.id2label[value].trainId for value in ids[0]]]


def test_cityscapes_label_ids_out_of_range(tmp_path, capsys):
    save_label_ids(tmp_path, 'bad', [[7, 34]])
    good = save_label_ids(tmp_path, 'good', [[7, 33]])
    with pytest.raises(UserError, match='1 of 2'):
        run('cityscapes', tmp_path)
    assert 'bad_gtFine_labelIds.png: label values [34]' in capsys.readouterr().out
    assert pixels(good, 'TrainIds').tolist() == [[0, 18]]


def test_cityscapes_prefers_polygons(tmp_path):
    save_label_ids(tmp_path, 'f', np.full((6, 8), 7))
    stem = write_annotation(tmp_path, 'f', annotation(('car', SQUARE, {})))
    run('cityscapes', tmp_path)
    assert set(np.unique(pixels(stem, 'TrainIds'))) == {13, 255}


def test_restart(examples, capsys):
    run('idd', examples)
    first, second = (examples / f'gtFine/val/seq/{frame}_gtFine_labellevel3Ids.png' for frame in FRAMES)
    content = first.read_bytes()
    for path in (first, second):
        os.utime(path, (2e9, 2e9))

    def made(*more):
        capsys.readouterr()
        run('idd', examples, *more)
        return capsys.readouterr().out

    assert ' 0 made, 2 kept' in made()
    first.write_bytes(content[:-200])                                   # what a full disk leaves
    os.utime(first, (2e9, 2e9))
    assert ' 1 made, 1 kept' in made() and first.read_bytes() == content
    os.utime(first, (2e9, 2e9))
    os.utime(examples / 'gtFine/val/seq/000002_gtFine_polygons.json', (2.1e9, 2.1e9))
    assert ' 1 made, 1 kept' in made()
    assert second.stat().st_mtime < 2e9 == first.stat().st_mtime
    os.utime(second, (2.1e9, 2.1e9))        # as old as its source, which may have changed within the clock's step
    assert ' 1 made, 1 kept' in made()
    assert ' 2 made, 0 kept' in made('--force')


def test_label_images_appear_whole(examples, capsys, monkeypatch):
    run('idd', examples)
    before = {path: path.read_bytes() for path in examples.rglob('*.png')}

    def half(image, file, *_, **__):
        file.write(b'half')
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(Image.Image, 'save', half)
    with pytest.raises(UserError, match='2 of 2'):
        run('idd', examples, '--force')
    assert '000002_gtFine_labellevel3Ids.png could not be written ([Errno 28] No space left' in capsys.readouterr().out
    assert before == {path: path.read_bytes() for path in examples.rglob('*.png')}
    assert len(list((examples / 'gtFine/val/seq').iterdir())) == 4


BROKEN = {
    'empty': '', 'cut': annotation(('car', SQUARE, {}))[:-9], 'list': '[]', 'null': 'null',
    'no size': '{"objects": []}', 'no objects': '{"imgWidth": 8, "imgHeight": 6}',
    'no label': '{"imgWidth": 8, "imgHeight": 6, "objects": [{"polygon": []}]}',
    'no polygon': '{"imgWidth": 8, "imgHeight": 6, "objects": [{"label": "car"}]}',
    'object is text': '{"imgWidth": 8, "imgHeight": 6, "objects": ["car"]}',
    'one coordinate': annotation(('car', [[1], [2], [3]], {})), 'text': annotation(('car', [['a', 'b']] * 3, {})),
    'flat': annotation(('car', [1, 2, 3, 4, 5, 6], {})), 'nan': annotation(('car', [[float('nan'), 1]] * 3, {})),
    'infinite': annotation(('car', [[float('inf'), 1]] * 3, {})), 'far': annotation(('car', [[2 ** 31, 1]] * 3, {})),
    'farther': annotation(('car', [[10 ** 400, 1]] * 3, {})), 'deep': '[' * 100000,
    'no width': annotation(width=0), 'negative': annotation(height=-1), 'huge': annotation(width=10 ** 9),
    'not a number': annotation(width='wide'),
}


@pytest.mark.parametrize('text', BROKEN.values(), ids=BROKEN)
def test_broken_annotation(tmp_path, capsys, text):
    broken = write_annotation(tmp_path, 'broken', text)
    good = write_annotation(tmp_path, 'good', annotation(('car', SQUARE, {})))
    with pytest.raises(UserError, match='1 of 2 .*broken_gtFine_polygons.json'):
        run('idd', tmp_path)
    assert 'not made: ' in (out := capsys.readouterr().out) and 'broken_gtFine_polygons.json' in out
    assert pixels(good, 'level3Ids')[2, 2] == 9
    assert not Path(f'{broken}level3Ids.png').exists()


def test_broken_annotation_as_command(tmp_path):
    write_annotation(tmp_path, 'broken', '\0')
    for number in range(3):
        write_annotation(tmp_path, f'good{number}', annotation(('car', SQUARE, {})))
    done = subprocess.run([sys.executable, '-m', 'datasets.create_labels', 'idd', '--datadir', str(tmp_path),
                           '--workers', '2'], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert 'Traceback' not in done.stderr
    assert 'broken_gtFine_polygons.json' in done.stderr.splitlines()[-1]
    assert len(list(tmp_path.rglob('*_labellevel3Ids.png'))) == 3


@pytest.mark.parametrize('arguments, message', [
    (['idd', '--datadir', 'nowhere'], 'nowhere/gtFine'),
    (['idd', '--datadir', 'nowhere', '--id-type', 'level5Id'], 'level5Id'),
    (['idd', '--datadir', 'nowhere', '--num-workers', '-1'], 'num-workers'),
    (['cityscapes', '--datadir', 'nowhere'], '_gtFine_polygons.json or .*_gtFine_labelIds.png'),
    (['cityscapes', '--datadir', 'nowhere', '--id-type', 'id'], '--id-type is for idd'),
    (['bdd', '--datadir', 'nowhere'], 'bdd'),
    (['idd'], '--datadir'),
])
def test_bad_arguments(arguments, message):
    with pytest.raises(UserError, match=message) as caught:
        main(arguments)
    assert '\n' not in str(caught.value)


def test_label_path_is_a_folder(examples, capsys):
    (examples / 'gtFine/val/seq/000001_gtFine_labellevel3Ids.png').mkdir()
    with pytest.raises(UserError, match='1 of 2'):
        run('idd', examples)
    assert '000001_gtFine_labellevel3Ids.png could not be written' in capsys.readouterr().out


def test_processes_make_what_one_makes(examples):
    run('idd', examples)
    alone = {path: path.read_bytes() for path in examples.rglob('*.png')}
    assert main(['idd', '--datadir', str(examples), '--workers', '2', '--force']) == 0
    assert alone == {path: path.read_bytes() for path in examples.rglob('*.png')} and len(alone) == 2


def square(number):
    return number ** 2


def die(_):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize('started_by', ['fork', 'forkserver'])       # Python's default before and from 3.14
def test_in_parallel_keeps_order(started_by, start_method):
    start_method(started_by)
    numbers = list(range(100))
    assert list(in_parallel(square, numbers, 2, 'squares')) == [number ** 2 for number in numbers]
    assert list(in_parallel(square, [], 2, 'squares')) == []


def test_killed_worker_is_an_error():
    with pytest.raises(UserError, match='killed'):
        list(in_parallel(die, [1, 2, 3], 2, 'dying'))


def test_real_cityscapes_labels(tmp_path):
    real = Path(os.environ.get('REAL_DATA', ROOT / '../shared/real')) / 'cityscapes/gtFine/val/aachen'
    labels = pytest.importorskip('cityscapesscripts.helpers.labels')
    frames = sorted(real.glob('*_gtFine_labelIds.png'))[:3]
    if not frames:
        pytest.skip('no real Cityscapes labels')
    folder = tmp_path / 'gtFine/val/aachen'
    folder.mkdir(parents=True)
    for frame in frames:
        shutil.copy(frame, folder)
    run('cityscapes', tmp_path)
    table = np.array([labels.id2label[value].trainId for value in range(34)])
    for frame in frames:
        made = Image.open(folder / frame.name.replace('labelIds', 'labelTrainIds'))
        assert np.array_equal(made, table[np.array(Image.open(frame))])
