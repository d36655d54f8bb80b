"""The t-SNE figure: what is compared, the numbers next to it, the files."""
import csv
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from mdil.datasets import DOMAINS, SegmentationDataset
from mdil.evaluation import tsne
from mdil.evaluation import features
from mdil.models import build_model, checkpoint
from mdil.utils.errors import UserError
from tests.fill import fill

pytestmark = pytest.mark.usefixtures('shallow_module')

SMALL = ['--perplexity', '5', '--points', '12', '--device', 'cpu']


def gram_cka(first, second):
    """Linear CKA as the paper writes it first: centred Gram matrices of the N pixels (Kornblith et al., equation 1)."""
    grams = []
    for values in (first, second):
        gram = values @ values.T
        centre = np.eye(len(gram)) - 1 / len(gram)
        grams.append(centre @ gram @ centre)
    return np.sum(grams[0] * grams[1]) / np.sqrt(np.sum(grams[0] ** 2) * np.sum(grams[1] ** 2))


def test_cka_equals_its_other_form_and_ignores_rotation_scale_and_offset():
    random = np.random.default_rng(0)
    first, second = random.normal(size=(60, 8)), random.normal(size=(60, 5))
    assert features.linear_cka(first, second) == pytest.approx(gram_cka(first, second), abs=1e-12)
    assert features.linear_cka(first, second) < 0.4
    rotation = np.linalg.qr(random.normal(size=(8, 8)))[0]
    assert features.linear_cka(first, 3 * first @ rotation + 7) == pytest.approx(1)
    assert np.isnan(features.linear_cka(first, np.ones((60, 3))))


def test_cosine_and_silhouette_on_known_clouds():
    first = np.array([[1., 0], [0, 2]])
    assert features.mean_cosine(first, 5 * first) == pytest.approx(1)
    assert features.mean_cosine(first, -first) == pytest.approx(-1)
    assert features.mean_cosine(first, first[:, ::-1]) == pytest.approx(0)
    # two pairs at 0, 1 and 10, 11: of the outer points a = 1, b = 10.5; of the inner ones a = 1, b = 9.5
    line = np.array([[0.], [1], [10], [11]])
    assert features.silhouette(line, [0, 0, 1, 1]) == pytest.approx((9.5 / 10.5 + 8.5 / 9.5) / 2)
    assert np.isnan(features.silhouette(line, [0, 0, 0, 0]))


def test_a_cell_has_its_commonest_class_and_pixels_are_drawn_evenly():
    label = torch.zeros(16, 24, dtype=torch.uint8)
    label[:8, 8:16] = 2
    label[0, 8:16] = 1          # the minority of its cell
    label[8:, 16:] = 3
    classes = features.cell_classes(label, 4)
    assert classes.tolist() == [[0, 2, 0], [0, 0, 3]]
    classes = np.array([0] * 50 + [1] * 3 + [2] * 20 + [3] * 9)
    chosen = features.sample_per_class(classes, 10, 3, np.random.default_rng(1))
    assert np.bincount(classes[chosen]).tolist() == [10, 3, 10] and sorted(set(chosen)) == chosen.tolist()
    assert chosen.tolist() == features.sample_per_class(classes, 10, 3, np.random.default_rng(1)).tolist()
    assert chosen.tolist() != features.sample_per_class(classes, 10, 3, np.random.default_rng(2)).tolist()


def test_features_are_the_encoders_in_eval_mode_row_by_row():
    model = fill(build_model([20, 20])).train()
    image = torch.randint(0, 256, (3, 32, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = features.encode(model, 1, image)
    expected = model.eval().single(1).encoder(image[None] / 255)[0]
    assert found.shape == (4 * 8, 128)
    assert torch.allclose(torch.from_numpy(found[2 * 8 + 5]), expected[:, 2, 5], atol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_image_with_the_most_classes_is_chosen(toy):
    data = SegmentationDataset(DOMAINS['cityscapes'], toy, 'val', (64, 128))
    kinds = [len(set(np.unique(features.cell_classes(data.load(i)[1], 20))) - {19}) for i in range(len(data))]
    ranked = features.richest_images(data, 3)
    assert [kinds[index] for index in ranked] == sorted(kinds, reverse=True)[:3]
    assert torch.equal(features.label_of(data, 2), data.load(2)[1])


def save_network(path, domains, method, seed):
    """A checkpoint of untrained weights."""
    torch.manual_seed(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    model = build_model([DOMAINS[name].num_classes for name in domains], method)
    checkpoint.save({'version': 1, 'state_dict': model.state_dict(), 'method': method,
                     'domains': [{'name': name, 'classes': DOMAINS[name].num_classes} for name in domains],
                     'options': {'height': 64, 'width': 128}}, path)
    return path


@pytest.fixture(scope='module')
def sequences(tmp_path_factory):
    """Folders of two methods, two steps each."""
    root = tmp_path_factory.mktemp('sequences')
    for seed, method in enumerate(('mdil', 'fine-tune')):
        save_network(root / method / 'step1-cityscapes/model_best.pth.tar', ['cityscapes'], method, seed)
        save_network(root / method / 'step2-IDD/model_best.pth.tar', ['cityscapes', 'IDD'], method, 10 + seed)
    return root


def run(toy, out, *arguments):
    tsne.main([*map(str, arguments), '--data-root', str(toy), '--out', str(out), *SMALL])


def test_the_script_writes_picture_coordinates_and_numbers_the_same_each_time(toy, sequences, tmp_path, capsys):
    items = [f'{name}={sequences / name}' for name in ('mdil', 'fine-tune')]
    run(toy, tmp_path / 'a/one', *items)
    run(toy, tmp_path / 'two', *items)
    assert (tmp_path / 'a/one.csv').read_bytes() == (tmp_path / 'two.csv').read_bytes()
    assert (tmp_path / 'a/one.pdf').read_bytes().startswith(b'%PDF')
    assert min(Image.open(tmp_path / 'two.png').size) > 500
    rows = list(csv.DictReader((tmp_path / 'two.csv').open()))
    numbers = json.loads((tmp_path / 'two.json').read_text())
    assert len(rows) == 2 * 2 * numbers['points'] and (numbers['height'], numbers['width']) == (64, 128)
    assert {row['sequence'] for row in rows} == {'mdil', 'fine-tune'} and 'void' not in {row['class'] for row in rows}
    one = [row for row in rows if row['sequence'] == 'mdil' and row['time'] == 'before']
    data = SegmentationDataset(DOMAINS['cityscapes'], toy, 'val', (64, 128))
    truth = features.label_of(data, [pair.image.name for pair in data.pairs].index(one[0]['image']))
    cells = features.cell_classes(truth, 20)
    assert {row['class'] for row in one} == {DOMAINS['cityscapes'].classes[kind] for kind in set(cells.ravel()) - {19}}
    assert all(DOMAINS['cityscapes'].classes[cells[int(row['row']) // 8, int(row['column']) // 8]] == row['class']
               for row in one)
    entry = numbers['sequences']['mdil']
    assert 0 <= entry['cka'] < 0.99 and -1 <= entry['silhouette_after'] <= 1     # two unrelated random networks
    assert f'linear CKA {entry["cka"]:.3f}' in capsys.readouterr().out


def test_the_networks_are_those_that_the_step_started_from_and_left(sequences, tmp_path):
    shutil.copytree(sequences / 'mdil', tmp_path / 'mdil')
    pair = [str(tmp_path / 'mdil' / step / 'model_best.pth.tar') for step in ('step1-cityscapes', 'step2-IDD')]
    assert tsne.checkpoint_pair(f'x={tmp_path}/mdil', None) == ('x', *pair)
    (tmp_path / 'mdil/step2-IDD/opts.json').write_text('{"options": {"state": "moved/step1/checkpoint.pth.tar"}}')
    last = [name.replace('model_best', 'checkpoint') for name in pair]
    assert tsne.checkpoint_pair(f'x={tmp_path}/mdil', None) == ('x', *last)


@pytest.mark.parametrize('ending', ['png', 'pdf', 'csv', 'json'])
def test_no_file_is_replaced_unasked(toy, sequences, tmp_path, monkeypatch, ending):
    file = tmp_path / f'photo.{ending}'
    file.write_text('mine')
    monkeypatch.setattr(tsne, 'run', lambda options: pytest.fail('compared'))
    with pytest.raises(UserError, match=f'--out {file} exists; name another file, or replace it with --overwrite'):
        run(toy, tmp_path / 'photo', f'mdil={sequences}/mdil')
    with pytest.raises(pytest.fail.Exception, match='compared'):
        run(toy, tmp_path / 'photo', f'mdil={sequences}/mdil', '--overwrite')


def test_a_network_that_did_not_change_has_not_moved(toy, sequences, tmp_path):
    same, other = (sequences / f'mdil/{step}/model_best.pth.tar' for step in ('step1-cityscapes', 'step2-IDD'))
    run(toy, tmp_path / 'x', f'same={same},{same}', f'other={same},{other}', '--seed', 3)
    numbers = json.loads((tmp_path / 'x.json').read_text())['sequences']
    assert numbers['same']['cka'] == pytest.approx(1) and numbers['same']['cosine'] == pytest.approx(1)
    assert numbers['same']['silhouette_before'] == numbers['same']['silhouette_after']
    rows = list(csv.DictReader((tmp_path / 'x.csv').open()))
    place = lambda name, time: np.array([(float(row['x']), float(row['y'])) for row in rows
                                         if (row['sequence'], row['time']) == (name, time)])
    moved = {name: np.median(np.linalg.norm(place(name, 'before') - place(name, 'after'), axis=1))
             / np.ptp(place(name, 'before')) for name in ('same', 'other')}
    assert moved['same'] < 0.05 < moved['other']


@pytest.mark.parametrize('arguments, message', [
    (['mdil={root}/mdil', '--step', '3'], 'step2-.* and step3-.*found: step 1, step 2'),
    (['mdil={root}/none'], 'found: no step'),
    (['mdil'], 'neither NAME=FOLDER'),
    (['mdil={root}/mdil', 'mdil={root}/mdil'], 'the name mdil is given twice'),
    (['mdil=a,b,c'], 'two checkpoints are expected'),
    (['mdil={root}/mdil', '--domain', 'IDD'], 'before the step, knows cityscapes only'),
    (['mdil={root}/mdil', '--perplexity', '5000'], 'too few for --perplexity 5000'),
    (['mdil={root}/mdil', '--perplexity', '0'], 'at least 1'),
    (['mdil={root}/mdil', '--width', '64'], '--width is given without --height'),
    (['mdil={root}/mdil', '--out', '/proc/x/y'], '--out /proc/x/y.png cannot be written to'),
    (['mdil={root}/mdil', '--split', 'nowhere'], 'nowhere')])
def test_bad_input_is_said(toy, sequences, tmp_path, arguments, message):
    arguments = [item.replace('{root}', str(sequences)) for item in arguments]
    with pytest.raises(UserError, match=message):
        tsne.main([*SMALL, '--data-root', str(toy), '--out', str(tmp_path / 'x'), *arguments])
    assert not list(tmp_path.iterdir())


def test_a_file_without_domain_names_needs_them(toy, tmp_path):
    torch.save({'state_dict': build_model([20]).state_dict()}, tmp_path / 'bare')
    pair = f'x={tmp_path}/bare,{tmp_path}/bare'
    with pytest.raises(UserError, match='no domain names; pass --domains'):
        run(toy, tmp_path / 'out', pair)
    run(toy, tmp_path / 'out', pair, '--domains', 'CS', '--height', '64')
    assert json.loads((tmp_path / 'out.json').read_text())['domain'] == 'cityscapes'
