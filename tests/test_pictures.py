"""Pictures: colours, legends, which images are chosen, and that they show what is scored."""
import json
import types

import numpy as np
import pytest
import torch
from PIL import Image

from mdil import eval as evaluation
from mdil.datasets import DOMAINS, SegmentationDataset
from mdil.evaluation import pictures
from mdil.models import build_model
from mdil.utils.errors import UserError
from mdil.utils.parallel import Place
from tests.test_eval import COUNTS, save

pytestmark = pytest.mark.usefixtures('shallow_module')

CPU = Place(torch.device('cpu'))


@pytest.fixture(scope='module')
def networks(tmp_path_factory):
    """[(path, network)] of two steps: cityscapes, then IDD."""
    folder, names, found = tmp_path_factory.mktemp('networks'), ['cityscapes', 'IDD'], []
    torch.manual_seed(3)
    for count in (1, 2):
        model = build_model([COUNTS[name] for name in names[:count]]).eval()
        found.append((save(folder / f'{count}.pth', model, names[:count]), model))
    return found


@pytest.fixture(scope='module')
def album(toy, networks, tmp_path_factory):
    """Folder of all pictures that eval.py makes of the two steps."""
    folder = tmp_path_factory.mktemp('album')
    evaluation.main(['--data-root', str(toy), '--height', '32', '--num-workers', '0', '--device', 'cpu', '--state',
                     *(str(path) for path, _ in networks), '--json', str(folder / 'r.json'),
                     '--save-panels', str(folder / 'p.pdf'),
                     *(part for kind in ('overlays', 'color', 'extremes', 'confusion')
                       for part in (f'--save-{kind}', str(folder / kind)))])
    return folder


def data(toy, name):
    return SegmentationDataset(DOMAINS[name], toy, 'val', (32, 64))


def prediction(model, number, image):
    with torch.inference_mode():
        return model(image[None] / 255, number)[0].argmax(dim=0)


def pixels(path):
    return np.asarray(Image.open(path))


def test_colour_maps_are_the_scored_predictions_in_the_palette(toy, networks, album):
    dataset = data(toy, 'IDD')
    files = sorted((album / 'color/step2/IDD').glob('0*.png'))
    assert len(files) == len(dataset) == 4
    for index, path in enumerate(files):
        expected = prediction(networks[1][1], 1, dataset.load(index)[0])
        assert (pixels(path) == np.array(DOMAINS['IDD'].palette)[expected.numpy()]).all()
        assert path.name == f'{index:04d}-{dataset.pairs[index].image.stem}.png'


def test_every_domain_after_every_step_has_its_pictures(album):
    places = {'step1/cityscapes', 'step2/cityscapes', 'step2/IDD'}
    for kind, count in (('overlays', 4), ('color', 5), ('extremes', 4), ('confusion', 1)):
        found = [path for path in (album / kind).rglob('*') if path.is_file()]
        assert {path.parent.relative_to(album / kind).as_posix() for path in found} == places
        assert len(found) == 3 * count and all(path.suffix == '.png' for path in found)     # no temporary files
    assert (album / 'p.pdf').read_bytes().startswith(b'%PDF')


@pytest.mark.parametrize('width', [120, 200, 640, 3072])
@pytest.mark.parametrize('name', DOMAINS)
def test_legends_show_each_colour_and_cut_no_text(name, width):
    domain = DOMAINS[name]
    strip = pictures.legend([*domain.classes, 'void'], domain.palette, width)
    number = strip.astype(int) @ [65536, 256, 1]       # a colour as one number
    assert set(np.array(domain.palette) @ [65536, 256, 1]) <= set(np.unique(number))
    assert (strip[:, -1] == 255).all() and (strip[-1] == 255).all() and (strip[:, 0] == 255).all()
    assert strip.shape[1] >= width


def test_bands_keep_texts_apart():
    strip = pictures.band(['a name that is much longer than its picture is wide', 'truth'], [100, 100])
    assert strip.shape[1] == 200 and (strip[:, 94:104] == 255).all() and (strip[:, :94] < 128).any()


def test_overlays_leave_void_as_it_is():
    image = np.full((2, 2, 3), 100, np.uint8)
    shown = pictures.overlay(image, np.array([[0, 19], [19, 1]]), DOMAINS['cityscapes'].palette, 0.5)
    assert shown[0, 1].tolist() == [100] * 3 and shown[0, 0].tolist() == [114, 82, 114]


def test_overlay_pictures_show_input_truth_and_prediction(toy, networks, album):
    dataset, domain = data(toy, 'cityscapes'), DOMAINS['cityscapes']
    image, truth = dataset.load(2)
    shown = pixels(next((album / 'overlays/step2/cityscapes').glob('0002-*.png')))
    original, predicted = image.permute(1, 2, 0).numpy(), prediction(networks[1][1], 0, image)
    row = np.concatenate([np.pad(np.kron(part, np.ones((5, 5, 1), np.uint8)), ((0, 0), (0, 6), (0, 0)),
                                 constant_values=255)        # 64 pixels wide: enlarged five times
                          for part in (original, pictures.overlay(original, truth, domain.palette),
                                       pictures.overlay(original, predicted, domain.palette))], axis=1)
    places = [top for top in range(len(shown) - 160) if (shown[top:top + 160, :978] == row).all()]
    assert len(places) == 1 and places[0] >= 2 * 18      # two lines of titles above


def test_extremes_are_the_worst_and_best_by_miou(toy, networks, album):
    dataset = data(toy, 'IDD')
    scores = []
    for index in range(4):
        image, truth = dataset.load(index)
        scores.append(pictures.image_miou(truth, prediction(networks[1][1], 1, image), DOMAINS['IDD']))
    order = np.argsort(scores)
    overlays = sorted((album / 'overlays/step2/IDD').glob('*.png'))
    for name, index in (('worst-1', order[0]), ('worst-2', order[1]), ('best-1', order[3]), ('best-2', order[2])):
        assert (pixels(album / f'extremes/step2/IDD/{name}.png') == pixels(overlays[index])).all()


def test_many_images_keep_only_the_ends():
    ranked = []
    for score in np.random.default_rng(0).permutation(50).tolist():
        ranked = pictures.ends([*ranked, (float(score), score, None)])
    assert [item[1] for item in ranked] == [0, 1, 2, 47, 48, 49]


@pytest.fixture
def figures(monkeypatch):
    """Figures that would be saved, by file name."""
    saved = {}
    monkeypatch.setattr(pictures, 'save_figure', lambda path, figure: saved.update({str(path): figure}))
    return saved


def test_confusion_figures_are_percent_of_each_true_class(figures):
    domain = DOMAINS['camvid']
    matrix = torch.randint(1, 90, (12, 12), generator=torch.Generator().manual_seed(0))
    matrix[4] = 0
    pictures.save_confusion('x.png', matrix, domain)
    axis = figures['x.png'].axes[0]
    shown = np.ma.filled(axis.images[0].get_array(), np.nan)
    counts = matrix[:11].numpy()
    assert np.isnan(shown[4]).all()
    rows = [row for row in range(11) if row != 4]
    assert np.allclose(shown[rows], 100 * counts[rows] / counts[rows].sum(axis=1, keepdims=True))
    assert [text.get_text() for text in axis.get_yticklabels()] == [
        f'{name} (no pixels)' if row == 4 else name for row, name in enumerate(domain.classes)]
    assert [text.get_text() for text in axis.get_xticklabels()] == [*domain.classes, 'void']


def test_panels_show_the_prediction_of_each_step(toy, networks, figures):
    sets = {0: data(toy, 'cityscapes'), 1: data(toy, 'IDD')}
    pictures.save_panels('p.png', sets, {'one': networks[0][1], 'two': networks[1][1]}, CPU, [(0, 1), (0, 3), (1, 2)])
    rows = np.array(figures['p.png'].axes).reshape(3, 5)
    assert [axis.get_title() for axis in rows[0]] == ['input', 'truth', 'one', 'two', '']
    assert [text.get_text() for text in rows[2, 2].texts] == ['not learnt yet'] and not rows[0, 2].texts
    image, truth = sets[0].load(3)
    original, domain = image.permute(1, 2, 0).numpy(), DOMAINS['cityscapes']
    guess = prediction(networks[0][1], 0, image)
    for axis, expected in ((rows[1, 0], original), (rows[1, 1], pictures.overlay(original, truth, domain.palette, 0.8)),
                           (rows[1, 2], pictures.overlay(original, guess, domain.palette, 0.8))):
        assert (axis.images[0].get_array() == expected).all()
    assert rows[1, 2].get_xlabel() == f'mIoU of this image: {pictures.image_miou(truth, guess, domain):.1f}'
    legend = {text.get_text(): patch.get_facecolor()[:3] for text, patch in
              zip(rows[1, 4].get_legend().get_texts(), rows[1, 4].get_legend().get_patches())}
    present = set(truth.unique().tolist()) | set(guess.unique().tolist())
    assert {name for number, name in enumerate(domain.classes) if number in present} <= set(legend)
    for name, color in legend.items():
        assert np.allclose(np.multiply(color, 255), domain.colors[domain.classes.index(name)])


def test_images_are_chosen_by_name_index_or_number_of_classes(toy):
    sets = {0: data(toy, 'cityscapes'), 1: data(toy, 'IDD')}
    assert pictures.choose(sets, ['1', 'CS=3', 'toystadt_000000_000003']) == [(0, 1), (0, 2), (0, 3), (1, 1)]
    kinds = [len(set(np.unique(sets[1].load(index)[1])) - {26}) for index in range(4)]
    assert pictures.choose(sets, []) == [(0, pictures.richest(sets[0])), (1, int(np.argmax(kinds)))]
    name = sets[1].pairs[2].image.relative_to(sets[1].folder).as_posix()
    assert pictures.choose(sets, [f'idd={name}']) == [(1, 2)]
    for item, message in (('000', 'or more than one'), ('gone', 'no image'), ('4', 'no image'), ('BDD=1', 'no domain')):
        with pytest.raises(UserError, match=message):
            pictures.choose(sets, [item])


def test_native_pictures_have_the_labels_size(toy, networks, tmp_path):
    evaluation.main(['--data-root', str(toy), '--height', '32', '--num-workers', '0', '--device', 'cpu', '--state',
                     str(networks[0][0]), '--resolution', 'native', '--limit-batches', '1', '--batch-size', '2',
                     '--save-color', str(tmp_path), '--save-overlays', str(tmp_path / 'o'), '--save-panels',
                     str(tmp_path / 'p.png')])
    files = sorted((tmp_path / 'cityscapes').glob('0*.png'))
    assert [Image.open(path).size for path in files] == [(128, 64)] * 2
    assert Image.open(next((tmp_path / 'o').rglob('0*.png'))).size[0] >= 3 * 128


def test_figures_take_dollar_signs_and_odd_names_as_they_are(tmp_path):
    domain = types.SimpleNamespace(name='a$b_$c', classes=('$x$', 'y_2'), colors=((1, 2, 3), (4, 5, 6)))
    pictures.save_confusion(tmp_path / 'x.svg', torch.ones(3, 3, dtype=torch.int64), domain)
    assert b'<svg' in (tmp_path / 'x.svg').read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ['x.svg']


def test_a_figure_that_cannot_be_written_leaves_the_old_one(monkeypatch, tmp_path):
    (tmp_path / 'x.png').write_bytes(b'old')
    figure = pictures.new_figure()
    monkeypatch.setattr(figure, 'savefig', lambda file, **_: (file.write(b'half'), (_ for _ in ()).throw(OSError('full'))))
    with pytest.raises(UserError, match='could not be written'):
        pictures.save_figure(tmp_path / 'x.png', figure)
    assert (tmp_path / 'x.png').read_bytes() == b'old' and len(list(tmp_path.iterdir())) == 1


def test_the_pictures_change_no_figure(toy, networks, album, tmp_path):
    evaluation.main(['--data-root', str(toy), '--height', '32', '--num-workers', '0', '--device', 'cpu', '--json',
                     str(tmp_path / 'r.json'), '--state', *(str(path) for path, _ in networks)])
    plainly, drawn = (json.loads((folder / 'r.json').read_text()) for folder in (tmp_path, album))
    assert plainly['steps'] == drawn['steps']
