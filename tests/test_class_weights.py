"""datasets.class_weights: counts, the formula, and the file that training reads."""
import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mdil.datasets.class_weights import histogram, main, training_weights, weights_of
from mdil.datasets.domains import DOMAINS, get_domain
from mdil.utils.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
LABELS = ([0, 0, 1, 11], [1, 1, 10, 10], [0, 11, 11, 11])
COUNTS = [3, 3, 0, 0, 0, 0, 0, 0, 0, 0, 2, 4]


@pytest.fixture
def camvid(tmp_path):
    """A root with a camvid of three training labels, and one validation label of road alone."""
    for split, labels in (('train', LABELS), ('val', ([3] * 4,))):
        for number, values in enumerate(labels):
            for folder in (split, f'{split}annot'):
                (tmp_path / 'camvid' / folder).mkdir(parents=True, exist_ok=True)
            Image.new('RGB', (2, 2)).save(tmp_path / f'camvid/{split}/{number}.png')
            values = np.array(values, dtype=np.uint8).reshape(2, 2)
            Image.fromarray(values).save(tmp_path / f'camvid/{split}annot/{number}.png')
    return tmp_path


@pytest.mark.parametrize('workers', [1, 2, None])
def test_histogram(camvid, workers):
    counts = histogram(DOMAINS['camvid'], camvid, workers=workers)
    assert counts.dtype == np.int64 and counts.tolist() == COUNTS


def test_histogram_of_another_split(camvid):
    assert np.nonzero(histogram(DOMAINS['camvid'], camvid, 'val'))[0].tolist() == [3]


def test_histogram_names_a_bad_label(camvid):
    Image.new('L', (2, 2), 200).save(camvid / 'camvid/trainannot/1.png')
    for workers in (1, 2):
        with pytest.raises(UserError, match='trainannot/1.png: label values'):
            histogram(DOMAINS['camvid'], camvid, workers=workers)


def test_formula():
    weights = weights_of(np.array([1, 3, 0]))
    assert weights == pytest.approx([1 / math.log(1.35), 1 / math.log(1.85), 1 / math.log(1.1)])


def test_published_weights_have_the_formula():
    for name in ('cityscapes', 'BDD', 'IDD'):
        frequencies = np.exp(1 / np.array(DOMAINS[name].weights)) - 1.1
        assert frequencies.sum() == pytest.approx(1, abs=1e-3), name
        assert weights_of(frequencies) == pytest.approx(DOMAINS[name].weights, rel=1e-3), name


def test_choices(camvid):
    computed = torch.tensor(weights_of(np.array(COUNTS)), dtype=torch.float32)
    computed[11] = 0
    assert torch.equal(training_weights(DOMAINS['camvid'], camvid, 'computed'), computed)
    assert torch.equal(training_weights(DOMAINS['camvid'], camvid, 'published'), computed)     # it has none
    assert training_weights(DOMAINS['camvid'], camvid, 'none').tolist() == [1] * 11 + [0]
    published = training_weights(DOMAINS['BDD'], camvid)
    assert published[:19].tolist() == pytest.approx(DOMAINS['BDD'].weights[:19]) and published[19] == 0


@pytest.mark.parametrize('name, listed', [('cityscapes', 'cityscapes'), ('BDD', 'bdd100k'), ('IDD', 'idd')])
def test_published_weights_are_the_published_ones(name, listed, camvid):
    with open(Path(__file__).with_name('class_weights.csv')) as file:
        wanted = [float(row['weight']) for row in csv.DictReader(file) if row['domain'] == listed]
    *found, void = training_weights(DOMAINS[name], camvid, 'published').tolist()
    assert found == pytest.approx(wanted[:-1], rel=1e-6) and void == 0


def test_file_is_what_training_reads(camvid):
    file = camvid / 'weights.json'
    arguments = ['--domains', 'camvid', '--data-root', str(camvid), '--json', str(file)]
    assert main(arguments) == 0
    written = json.loads(file.read_text())
    assert list(written) == ['camvid'] and written['camvid'] == pytest.approx(weights_of(np.array(COUNTS)).tolist())
    for choice in (file, str(file)):
        assert torch.equal(training_weights(DOMAINS['camvid'], camvid, choice),
                           training_weights(DOMAINS['camvid'], camvid, 'computed'))
    assert main([*arguments, '--split', 'val']) == 0
    assert json.loads(file.read_text())['camvid'][3] == pytest.approx(1 / math.log(2.1))
    assert list(camvid.glob('.*')) == []
    file.write_text('{"classes": []}')      # a domain.json, say
    with pytest.raises(UserError, match='weights.json exists and holds something else'):
        main(arguments)
    assert file.read_text() == '{"classes": []}'


def test_table(tmp_path, capsys):
    for folder, name in (('images', 'a.jpg'), ('labels', 'a_train_id.png')):
        (tmp_path / 'seg' / folder / 'train').mkdir(parents=True)
        Image.new('L', (4, 4), 13).save(tmp_path / 'seg' / folder / 'train' / name)
    assert main(['--domains', 'bdd100k', '--data', f'BDD={tmp_path}']) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    rows = [line.split() for line in lines]
    assert rows[0] == ['BDD', 'train']
    assert rows[1] == ['class', 'percent', 'computed', 'published']
    assert ['car', '100.0000', f'{1 / math.log(2.1):.4f}', f'{DOMAINS["BDD"].weights[13]:.4f}'] in rows
    assert ['road', '0.0000', f'{1 / math.log(1.1):.4f}', '3.6525'] in rows


def test_table_without_published(camvid, capsys):
    main(['--domains', 'camvid', '--data-root', str(camvid)])
    assert ['sky', '25.0000', f'{1 / math.log(1.35):.4f}', '-'] in [
        line.split() for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize('content', ['', '[]', '{}', '{"camvid": [1, 2]}', '{"camvid": "all"}',
                                     '{"camvid": [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, -1]}',
                                     '{"camvid": [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, NaN]}',
                                     '{"camvid": [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]}'])
def test_file_that_does_not_fit(tmp_path, content):
    file = tmp_path / 'weights.json'
    file.write_text(content)
    with pytest.raises(UserError, match='weights.json'):
        training_weights(get_domain('camvid'), tmp_path, str(file))


@pytest.mark.parametrize('arguments, message', [
    (['--domains', 'mars'], "unknown domain 'mars'"),
    (['--domains', 'camvid', '--data-root', 'nowhere'], 'no train images of camvid'),
    (['--domains', 'camvid', '--data', 'camvid='], 'NAME=PATH'),
    (['--domains', 'camvid', '--json', '.'], '--json . is a folder'),
])
def test_bad_arguments(arguments, message):
    with pytest.raises(UserError, match=message):
        main(arguments)


def test_a_bad_label_leaves_no_file_of_weights(camvid):
    (camvid / 'camvid/trainannot/0.png').write_bytes(b'')
    with pytest.raises(UserError, match='trainannot/0.png cannot be read'):
        main(['--domains', 'camvid', '--data-root', str(camvid), '--json', str(camvid / 'w.json'), '--workers', '2'])
    assert not (camvid / 'w.json').exists()
