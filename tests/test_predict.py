"""predict.py: answers against an independent implementation, every kind of input, what is written and skipped."""
import json
import os
import shutil
import struct
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from mdil import predict
from mdil.datasets import DOMAINS, get_domain
from mdil.datasets.pairs import find_split
from mdil.evaluation.inputs import find_sources, rotation
from mdil.evaluation.predictor import PUBLISHED_SIZE, Predictor, trained_size
from mdil.models import build_model, checkpoint
from mdil.models.identify import Sequence, appearance, statistics_of
from mdil.utils.errors import UserError, run_main
from mdil.utils.parallel import Place
from tests.test_eval import COUNTS

pytestmark = pytest.mark.usefixtures('shallow_module')

NAMES = ['cityscapes', 'IDD']
SIZE = 32, 64
CPU = Place(torch.device('cpu'))


@pytest.fixture(scope='module')
def model():
    """An untrained network of two domains."""
    torch.manual_seed(5)
    return build_model([COUNTS[name] for name in NAMES]).eval()


@pytest.fixture(scope='module')
def state(model, tmp_path_factory):
    """Its checkpoint, which says that it was trained at SIZE."""
    path = tmp_path_factory.mktemp('state') / 'two.pth'
    checkpoint.save({'version': 1, 'epoch': 1, 'state_dict': model.state_dict(), 'best_acc': 0.0, 'method': 'ours',
                     'domains': [{'name': name, 'classes': COUNTS[name]} for name in NAMES],
                     'options': {'num_epochs': 1, 'height': SIZE[0], 'width': SIZE[1]}}, path)
    return path


@pytest.fixture(scope='module')
def knowing(state, toy, tmp_path_factory):
    """The same checkpoint with the statistics of its domains' training images, toy roads."""
    content = checkpoint.read(state)
    content['domain_statistics'] = {name: statistics_of([pair.image for pair in find_split(
        get_domain(name), toy, 'train').pairs], 0, name) for name in NAMES}
    path = tmp_path_factory.mktemp('knowing') / 'two.pth'
    checkpoint.save(content, path)
    return path


@pytest.fixture(scope='module')
def mixed(toy, tmp_path_factory):
    """A folder of validation images of both domains, called by their domain, and their domains."""
    folder, truth = tmp_path_factory.mktemp('mixed'), {}
    for name in NAMES:
        for number, pair in enumerate(find_split(get_domain(name), toy, 'val').pairs):
            truth[folder / f'{name}-{number}.png'] = name
            Image.open(pair.image).save(folder / f'{name}-{number}.png')
    return folder, truth


@pytest.fixture
def photos(tmp_path):
    """A folder of three images of different sizes, one of them grey, in two levels."""
    random = np.random.default_rng(0)
    for name, shape in (('a.png', (50, 70, 3)), ('sub/b.JPG', (64, 128, 3)), ('sub/c.png', (37, 41))):
        path = tmp_path / 'photos' / name
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(random.integers(0, 256, (4, 6, *shape[2:]), dtype=np.uint8))
        coarse.resize(shape[1::-1], Image.BICUBIC).save(path)
    return tmp_path / 'photos'


def run(state, out, *arguments):
    predict.main(['--state', str(state), '--out', str(out), '--device', 'cpu', '--num-workers', '0',
                  *map(str, arguments)])


def expected(model, number, path, size=SIZE):
    """(labels, confidence) by plain steps: resize, network, logits resized back, void left out."""
    image = Image.open(path).convert('RGB')
    pixels = torch.tensor(np.asarray(image.resize(size[::-1], Image.BILINEAR))).permute(2, 0, 1)[None] / 255
    with torch.inference_mode():
        logits = torch.nn.functional.interpolate(model(pixels, number), image.size[::-1], mode='bilinear')[0, :-1]
    return logits.argmax(dim=0).numpy(), logits.softmax(dim=0).amax(dim=0).numpy()


def pixels(path):
    return np.asarray(Image.open(path))


def test_a_folder_keeps_its_tree_and_every_image_its_size(model, state, photos, tmp_path):
    run(state, tmp_path / 'out', '--input', photos, '--domain', 'IDD', '--json', tmp_path / 'r.json', '--save',
        'labels', 'color', 'overlay', 'confidence')
    assert len(list((tmp_path / 'out').rglob('*.png'))) == 13       # and the legend
    legend = np.asarray(Image.open(tmp_path / 'out/legend-of-IDD.png')).reshape(-1, 3)
    assert all((legend == color).all(axis=1).any() for color in DOMAINS['IDD'].colors)
    records = json.loads((tmp_path / 'r.json').read_text())
    assert set(records) == {str(path) for path in photos.rglob('*.*')}
    for name, source in (('a', 'a.png'), ('sub/b', 'sub/b.JPG'), ('sub/c', 'sub/c.png')):
        labels, confidence = expected(model, 1, photos / source)
        assert np.array_equal(pixels(tmp_path / f'out/{name}.png'), labels)
        assert np.abs(pixels(tmp_path / f'out/{name}.confidence.png') - 255 * confidence).max() <= 0.51
        colors = np.array(DOMAINS['IDD'].colors)[labels]
        assert np.array_equal(pixels(tmp_path / f'out/{name}.color.png'), colors)
        image = np.asarray(Image.open(photos / source).convert('RGB'))
        assert np.abs(pixels(tmp_path / f'out/{name}.overlay.png') - (0.45 * image + 0.55 * colors)).max() <= 1
        entry = records[str(photos / source)]
        assert (entry['domain'], entry['domains']) == ('IDD', {'IDD': 1.0})
        assert entry['confidence'] == pytest.approx(confidence.mean(), abs=1e-5)
        assert entry['classes'] == {DOMAINS['IDD'].classes[index]: pytest.approx(count / labels.size)
                                    for index, count in zip(*np.unique(labels, return_counts=True))}


def test_a_prediction_at_the_trained_size_is_what_eval_scores(model, state, toy, tmp_path):
    pairs = find_split(get_domain('cityscapes'), toy, 'val').pairs
    run(state, tmp_path, '--input', *(pair.image for pair in pairs), '--domain', 'CS', '--batch-size', 3)
    for pair in pairs:
        assert np.array_equal(pixels(tmp_path / f'{pair.image.stem}.png'), expected(model, 0, pair.image)[0])


def test_void_is_never_an_answer(photos):
    model = build_model([20])
    with torch.no_grad():
        model.single(0).decoder.output_conv.bias[19] += 100.0
    predictor = Predictor(model, [DOMAINS['cityscapes']], SIZE, CPU)
    image = Image.open(photos / 'a.png')
    assert (model(predictor.prepare(image).pixels[None] / 255).argmax(dim=1) == 19).all()
    prediction, = predictor.predict([image], 'CS')
    assert prediction.labels.max() < 19 and 0 < prediction.confidence.min() and prediction.confidence.max() <= 1
    assert sum(prediction.shares.values()) == pytest.approx(1)
    assert repr(prediction).startswith("Prediction('cityscapes', (")


def test_the_branch_that_answers_is_told_from_the_image(model, knowing, mixed, tmp_path):
    folder, truth = mixed
    run(knowing, tmp_path / 'out', '--input', folder, '--json', tmp_path / 'r.json', '--batch-size', 5)
    records = json.loads((tmp_path / 'r.json').read_text())
    assert {path: records[str(path)]['domain'] for path in truth} == truth
    for path, name in truth.items():
        assert np.array_equal(pixels(tmp_path / f'out/{path.stem}.png'), expected(model, NAMES.index(name), path)[0])
        entry = records[str(path)]['domains']
        assert list(entry) == NAMES and max(entry, key=entry.get) == name and sum(entry.values()) == pytest.approx(1)
        assert all(value == round(value, 6) for value in (*entry.values(), records[str(path)]['confidence']))


def test_a_network_of_one_domain_tells_what_is_unlike_it(mixed, toy, tmp_path, capsys):
    known = statistics_of([pair.image for pair in find_split(get_domain('IDD'), toy, 'train').pairs], 0, 'IDD')
    content = {'version': 1, 'state_dict': build_model([27]).state_dict(), 'method': 'mdil',
               'domains': [{'name': 'IDD', 'classes': 27}], 'options': {'height': 32, 'width': 64}}
    checkpoint.save({**content, 'domain_statistics': {'IDD': {**known, 'threshold': 1e-9}}}, tmp_path / 'strict.pth')
    run(tmp_path / 'strict.pth', tmp_path / 'a', '--input', mixed[0], '--json', tmp_path / 'a.json')
    found = json.loads((tmp_path / 'a.json').read_text()).values()
    assert {(entry['domain'], entry['branch']) for entry in found} == {('unknown', 'IDD')}
    assert f'{len(mixed[1])} images predicted, {len(mixed[1])} of them unlike any known domain' in capsys.readouterr().err
    checkpoint.save(content, tmp_path / 'silent.pth')       # without statistics, nothing is called unknown
    run(tmp_path / 'silent.pth', tmp_path / 'b', '--input', mixed[0], '--json', tmp_path / 'b.json')
    assert {entry['domain'] for entry in json.loads((tmp_path / 'b.json').read_text()).values()} == {'IDD'}


def test_a_legend_replaces_nothing_and_is_no_prediction(state, photos, tmp_path):
    arguments = ['--domain', 'IDD', '--save', 'labels', 'color']
    out, legend = tmp_path / 'out', tmp_path / 'out/legend-of-IDD.png'
    (photos / 'a.png').rename(photos / 'legend-of-IDD.png')
    with pytest.raises(UserError, match='legend-of-IDD.png is where the legend of the colours goes, but also an input'):
        run(state, out, '--input', photos, *arguments)
    run(state, tmp_path / 'labels', '--input', photos, '--domain', 'IDD')       # without colours there is no legend
    (photos / 'legend-of-IDD.png').rename(photos / 'a.png')
    shutil.copy(photos / 'a.png', legend)
    (tmp_path / 'list.txt').write_text('out/legend-of-IDD.png\n')
    for words in (['--input', tmp_path / 'list.txt'], ['--input', photos, '--json', legend]):
        with pytest.raises(UserError, match='legend-of-IDD.png'):
            run(state, out, *words, *arguments)
    run(state, out, '--input', photos, *arguments)
    assert legend.read_bytes() == (photos / 'a.png').read_bytes()       # a file of the user's stays
    run(state, out, '--input', photos, *arguments, '--overwrite', '--height', 16)      # it is no prediction
    assert legend.read_bytes() != (photos / 'a.png').read_bytes()


def test_an_image_like_no_domain_is_unknown_and_segmented_all_the_same(knowing, mixed, tmp_path, capsys):
    content = checkpoint.read(knowing)
    content['domain_statistics']['IDD']['threshold'] = 1e-9
    checkpoint.save(content, tmp_path / 'strict.pth')
    run(tmp_path / 'strict.pth', tmp_path / 'out', '--input', mixed[0], '--json', tmp_path / 'r.json')
    found = {Path(path): entry['domain'] for path, entry in json.loads((tmp_path / 'r.json').read_text()).items()}
    assert found == {path: 'unknown' if name == 'IDD' else name for path, name in mixed[1].items()}
    assert len(list((tmp_path / 'out').glob('*.png'))) == 8
    said = capsys.readouterr().err
    assert '8 images predicted (cityscapes 4, IDD 4), 4 of them unlike any known domain' in said
    assert 'Images that fit cityscapes best are never called unknown, because fewer than 50 of their training' in said


def test_the_frames_of_a_sequence_are_judged_together(knowing, mixed, tmp_path):
    """After three frames of one domain a single one of the other does not change the branch."""
    known = predict.load_predictor(predict.predict_parser().parse_args(
        ['--state', str(knowing), '--input', 'x', '--out', 'y', '--native']), CPU).identifier
    names = ['cityscapes'] * 4 + ['IDD']
    looks = [appearance(Image.open(mixed[0] / f'{name}-{number}.png')) for number, name in enumerate(names[:4])]
    looks.append(appearance(Image.open(mixed[0] / 'IDD-0.png')))
    sequence = Sequence(known)
    streamed = [sequence.guess(look[None]) for look in looks]
    together = Sequence(known).guess(torch.stack(looks))
    for part in ('probabilities', 'novelty'):
        assert torch.allclose(torch.cat([getattr(guess, part) for guess in streamed]), getattr(together, part))
    scores = known.measures(torch.stack(looks))[0].mean(dim=0)
    assert torch.allclose(together.probabilities[-1], torch.softmax(scores, dim=0))
    folder = tmp_path / 'drive'
    folder.mkdir()
    for number, name in enumerate(names):
        Image.open(mixed[0] / f'{name}-{number % 4}.png').save(folder / f'{number}.png')
    (folder / 'next').mkdir()
    Image.open(mixed[0] / 'IDD-0.png').save(folder / 'next/5.png')
    run(knowing, tmp_path / 'out', '--input', folder, '--json', tmp_path / 'r.json', '--sequence')
    found = json.loads((tmp_path / 'r.json').read_text())
    assert found[f'{folder}/4.png']['domains']['cityscapes'] == pytest.approx(together.probabilities[-1, 0].item())
    alone = known.guess(looks[-1][None]).probabilities[0, 0].item()         # another folder is another drive
    assert found[f'{folder}/next/5.png']['domains']['cityscapes'] == pytest.approx(alone)


def test_auto_needs_statistics_and_says_how_to_add_them(state, photos, tmp_path):
    for arguments in ([], ['--domain', 'auto']):
        with pytest.raises(UserError, match='no image statistics of cityscapes, IDD.*python -m mdil identify'):
            run(state, tmp_path / 'out', '--input', photos, *arguments)
    with pytest.raises(UserError, match='--sequence works only with --domain auto'):
        run(state, tmp_path / 'out', '--input', photos, '--domain', 'CS', '--sequence')


def test_native_size_differs_from_the_trained_one_by_less_than_a_block(model, state, photos, tmp_path, monkeypatch):
    searched, save = [], predict.save
    monkeypatch.setattr(predict, 'save', lambda *given: (searched.append(torch.backends.cudnn.benchmark), save(*given)))
    run(state, tmp_path / 'out', '--input', photos / 'a.png', '--domain', 'CS', '--native')
    assert np.array_equal(pixels(tmp_path / 'out/a.png'), expected(model, 0, photos / 'a.png', (48, 72))[0])
    run(state, tmp_path / 'other', '--input', photos / 'a.png', '--domain', 'CS', '--height', 64)
    assert searched == [False, True]        # no search for the fastest algorithms at each size
    assert np.array_equal(pixels(tmp_path / 'other/a.png'), expected(model, 0, photos / 'a.png', (64, 128))[0])


def test_label_files_as_the_data_set_has_them(model, state, photos, tmp_path):
    """Cityscapes' test server wants label ids: 7 for road (class 0), 33 for bicycle (class 18)."""
    ids = np.array([7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33])
    run(state, tmp_path, '--input', photos / 'a.png', '--domain', 'CS', '--label-ids', 'files')
    assert np.array_equal(pixels(tmp_path / 'a.png'), ids[expected(model, 0, photos / 'a.png')[0]])
    assert predict.file_values(DOMAINS['IDD']).tolist() == list(range(26))


def own_domain(folder, **entries):
    """The Domain of a domain.json with these entries."""
    spec = {'images': 'i', 'labels': 'l', 'classes': [{'name': 'road', 'color': [128, 64, 200]},
                                                     {'name': 'car', 'color': [0, 0, 142]}], **entries}
    (folder / 'domain.json').write_text(json.dumps(spec))
    return get_domain('own', {'own': folder})


def test_label_files_of_your_own_domain(model, state, photos, tmp_path, monkeypatch):
    colors = predict.file_values(own_domain(tmp_path, by_color=True))
    assert colors.tolist() == [[128, 64, 200], [0, 0, 142]] and colors.dtype == np.uint8
    labels = expected(model, 0, photos / 'a.png')[0]
    with monkeypatch.context() as colored:
        colored.setattr(predict, 'file_values', lambda domain: np.tile(np.arange(19, dtype=np.uint8)[:, None], 3))
        run(state, tmp_path / 'out', '--input', photos / 'a.png', '--domain', 'CS', '--label-ids', 'files')
    assert np.array_equal(pixels(tmp_path / 'out/a.png'), labels[..., None].repeat(3, axis=2))


def test_a_class_without_a_label_value_is_refused_before_anything_is_written(state, photos, tmp_path, monkeypatch):
    lacking = own_domain(tmp_path, values={'1': 'road'})
    with pytest.raises(UserError, match="own has no label value for the class 'car'"):
        predict.file_values(lacking)
    monkeypatch.setattr(predict, 'file_values', lambda domain, values=predict.file_values: values(lacking))
    with pytest.raises(UserError, match='has no label value for'):
        run(state, tmp_path / 'out', '--input', photos, '--domain', 'CS', '--label-ids', 'files')
    assert not list((tmp_path / 'out').iterdir())


def test_what_exists_is_skipped_unless_overwritten(state, photos, tmp_path):
    arguments = ['--input', photos, '--domain', 'CS', '--json', tmp_path / 'r.json']
    run(state, tmp_path / 'out', *arguments)
    (tmp_path / 'out/a.png').write_bytes(b'kept')
    (tmp_path / 'out/sub/b.png').unlink()
    records = json.loads((tmp_path / 'r.json').read_text())
    run(state, tmp_path / 'out', *arguments)
    assert (tmp_path / 'out/a.png').read_bytes() == b'kept' and (tmp_path / 'out/sub/b.png').exists()
    assert json.loads((tmp_path / 'r.json').read_text()) == records
    run(state, tmp_path / 'out', *arguments, '--overwrite')
    assert (tmp_path / 'out/a.png').read_bytes() != b'kept'


def test_entries_of_other_networks_or_settings_are_not_kept(state, knowing, photos, tmp_path):
    given = '--input', photos, '--json', tmp_path / 'r.json', '--domain'
    run(state, tmp_path / 'one', *given, 'CS')
    before = (tmp_path / 'r.json').read_bytes()
    for other, domain in ((knowing, 'CS'), (state, 'IDD')):
        with pytest.raises(UserError, match='r.json holds .*, which was predicted with other settings; choose another'):
            run(other, tmp_path / 'two', *given, domain)
    assert (tmp_path / 'r.json').read_bytes() == before


def test_answers_of_other_networks_or_settings_are_not_mixed(state, knowing, photos, tmp_path, capsys, monkeypatch):
    def answers():
        return {path: path.read_bytes() for path in (tmp_path / 'out').rglob('*.png') if 'legend' not in path.name}
    first = '--input', photos, '--domain', 'CS'
    run(state, tmp_path / 'out', *first)
    before = answers()
    run(state, tmp_path / 'out', *first, '--save', 'labels', 'color')       # more of the same
    (photos / 'd.png').write_bytes((photos / 'a.png').read_bytes())
    run(state, tmp_path / 'out', *first)
    assert capsys.readouterr().err.endswith('out: 1 image predicted, 3 were there already\n')
    for file, arguments, said in ((knowing, first, 'network .*, now'),
                                  (state, (*first, '--height', 64), 'size 64x32, now 128x64'),
                                  (state, ('--input', photos, '--domain', 'IDD'), 'domain cityscapes, now IDD'),
                                  (state, (*first, '--label-ids', 'files'), 'label-ids train, now files')):
        with pytest.raises(UserError, match=f'made with other settings: {said}.*another --out.*--overwrite'):
            run(file, tmp_path / 'out', *arguments)
    assert before.items() <= answers().items()
    with pytest.raises(UserError, match='holds .*png, which was made with other settings and would remain; choose another --out'):
        run(knowing, tmp_path / 'out', '--input', photos / 'a.png', '--domain', 'CS', '--overwrite')
    assert before.items() <= answers().items()
    with monkeypatch.context() as stopped, pytest.raises(KeyboardInterrupt):
        stopped.setattr(predict, 'predict_all', lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        run(state, tmp_path / 'out', '--input', photos, '--domain', 'IDD', '--overwrite')
    assert not answers()        # or the next run would take them for its own
    run(state, tmp_path / 'out', '--input', photos, '--domain', 'IDD')
    assert len(answers()) == 4
    (tmp_path / 'out/predict.json').unlink()
    with pytest.raises(UserError, match='holds predictions without predict.json'):
        run(state, tmp_path / 'out', *first)


def test_an_interrupted_run_goes_on_where_it_ended(monkeypatch, state, photos, tmp_path):
    arguments = ['--input', photos, '--domain', 'CS', '--json', tmp_path / 'r.json', '--batch-size', 1]
    saved, real = [], predict.save

    def dying(options, loaded, prediction):
        if len(saved) == 2:
            raise KeyboardInterrupt
        saved.append(loaded.item.name)
        real(options, loaded, prediction)
    monkeypatch.setattr(predict, 'save', dying)
    with pytest.raises(KeyboardInterrupt):
        run(state, tmp_path / 'out', *arguments)
    assert saved == ['a', 'sub/b'] and len(json.loads((tmp_path / 'r.json').read_text())) == 2
    monkeypatch.setattr(predict, 'save', lambda options, loaded, prediction: saved.append(loaded.item.name))
    run(state, tmp_path / 'out', *arguments)
    assert saved == ['a', 'sub/b', 'sub/c']


def drive_of(frames, folder, video):
    """The images `frames` as a drive in `folder`: a video, or a folder of numbered images."""
    if not video:
        for number, frame in enumerate(frames):
            frame.save(folder / f'{number}.png')
        return folder
    av = pytest.importorskip('av', reason='av reads videos')
    with av.open(str(folder / 'drive.mkv'), 'w') as container:
        stream = container.add_stream('ffv1', rate=5)       # without loss, which would change the looks
        stream.width, stream.height, stream.pix_fmt = *frames[0].size, 'bgr0'
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())
    return folder / 'drive.mkv'


@pytest.mark.parametrize('video, workers', [(False, 0), (True, 2)])
def test_a_resumed_drive_chooses_as_if_it_had_not_been_interrupted(knowing, mixed, tmp_path, monkeypatch, capsys, video,
                                                                  workers):
    """Without its first frames, the last one would be of another domain."""
    (tmp_path / 'drive').mkdir()
    drive = drive_of([Image.open(mixed[0] / f'{name}.png').convert('RGB') for name in (
        'cityscapes-0', 'cityscapes-1', 'cityscapes-2', 'cityscapes-3', 'IDD-0')], tmp_path / 'drive', video)

    def predicted(name):
        """{frame: (record, labels)} of the results called `name`."""
        run(knowing, tmp_path / name, '--input', drive, '--sequence', '--json', tmp_path / f'{name}.json',
            '--batch-size', 2, '--num-workers', workers)
        found = json.loads((tmp_path / f'{name}.json').read_text())
        return {key: (entry, pixels(path).tolist()) for (key, entry), path in zip(
            sorted(found.items()), sorted((tmp_path / name).rglob('*.png')), strict=True)}
    whole, count, real = predicted('whole'), 0, predict.save
    assert [entry['domain'] for entry, _ in whole.values()] == ['cityscapes'] * 5

    def dying(*arguments):
        nonlocal count
        count += 1
        if count > 4:
            raise KeyboardInterrupt
        real(*arguments)
    with monkeypatch.context() as stopped, pytest.raises(KeyboardInterrupt):
        stopped.setattr(predict, 'save', dying)
        predicted('broken')
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / 'broken').rglob('*.png')}
    capsys.readouterr()
    assert len(kept) == 4 and predicted('broken') == whole
    assert kept.items() <= {path: path.stat().st_mtime_ns for path in (tmp_path / 'broken').rglob('*.png')}.items()
    assert '1 image predicted (cityscapes 1), 4 were there already' in capsys.readouterr().err


def test_a_list_is_read_relative_to_its_folder(state, photos, tmp_path):
    (photos / 'list.txt').write_text('\ufeffsub/c.png\n\na.png\n')       # some editors write that mark
    run(state, tmp_path / 'out', '--input', photos / 'list.txt', '--domain', 'CS')
    assert sorted(str(path.relative_to(tmp_path / 'out')) for path in (tmp_path / 'out').rglob('*.png')) == [
        'a.png', 'sub/c.png']


def rolls(folder, level, *names):
    """Writes images of one grey level below a folder; returns it."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (64, 32), (level,) * 3).save(folder / name)
    return folder


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob('*.*')}


@pytest.mark.parametrize('more', [[], ['--save', 'color'], ['--save', 'labels', 'color'], ['--json', 'r.json']])
def test_no_image_gets_the_prediction_of_another(state, tmp_path, monkeypatch, more):
    monkeypatch.chdir(tmp_path)
    first, other, out = rolls(tmp_path / 'A', 0, 'img.png'), rolls(tmp_path / 'B', 255, 'img.jpg', 'new.png'), tmp_path / 'out'
    given = ['--domain', 'CS', *more]
    run(state, out, '--input', first, '--domain', 'CS', *more[:2 * ('--json' in more)])
    before = contents(out)
    with pytest.raises(UserError) as refused:
        run(state, out, '--input', other, *given)
    assert str(refused.value) == (f'--out {out}: img is there the prediction of {first}/img.png, not of {other}/img.jpg; '
                                  'choose another --out, or replace it with --overwrite')
    assert contents(out) == before
    assert '--json' not in more or list(json.loads(Path('r.json').read_text())) == [f'{first}/img.png']
    run(state, out, '--input', other, *given, '--overwrite')
    run(state, tmp_path / 'fresh', '--input', other, *given)
    assert contents(out).keys() == contents(tmp_path / 'fresh').keys()      # no picture of the first image is left
    with pytest.raises(UserError, match='B/img.jpg, not of .*/A/img.png'):
        run(state, out, '--input', first, *given)
    for path in out.rglob('img*.png'):
        path.unlink()
    if '--json' not in more:
        run(state, out, '--input', first, *given)       # there is no prediction that could pass for its own


def test_an_input_is_known_again_by_its_place(state, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rolls(tmp_path / 'A', 0, 'img.png', 'sub/x.png')
    Path('alias').symlink_to('A')
    Path('A/list.txt').write_text('img.png\nsub/x.png\n')
    rolls(tmp_path / 'C', 255, 'new.png')
    run(state, 'out', '--input', 'A', '--domain', 'CS')
    for given in ('A', tmp_path / 'A', 'alias', 'A/../A/img.png', 'A/list.txt'):
        run(state, 'out', '--input', given, '--domain', 'CS')
        assert ': 0 images predicted' in capsys.readouterr().err
    rolls(tmp_path / 'A', 99, 'more.png')
    Path('out').rename('moved')
    for given in ('A', 'C'):        # more images of the same folder; another folder whose images have other names
        run(state, 'moved', '--input', given, '--domain', 'CS')
        assert ': 1 image predicted' in capsys.readouterr().err
    made = json.loads(Path('moved/predict.json').read_text())
    assert made['inputs'] == {name: f'{tmp_path}/{folder}/{name}.png' for folder, name in (
        ('A', 'img'), ('A', 'more'), ('C', 'new'), ('A', 'sub/x'))}
    del made['inputs']      # as earlier versions wrote it
    Path('moved/predict.json').write_text(json.dumps(made))
    run(state, 'moved', '--input', rolls(tmp_path / 'D', 0, 'img.png'), '--domain', 'CS')


def test_no_video_gets_the_frames_of_another(state, tmp_path):
    frames, videos = [Image.new('RGB', (64, 32), (level,) * 3) for level in range(0, 180, 30)], []
    for name, count in (('A', 4), ('B', 2)):
        (tmp_path / name).mkdir()
        videos.append(drive_of(frames[:count], tmp_path / name, True))
    arguments, out = ['--domain', 'CS', '--save', 'labels'], tmp_path / 'out'
    run(state, out, '--input', videos[0], *arguments)
    with pytest.raises(UserError, match=f'drive/ is there the prediction of {videos[0]}, not of {videos[1]}'):
        run(state, out, '--input', videos[1], *arguments)
    assert len(list((out / 'drive').iterdir())) == 4
    run(state, out, '--input', videos[1], *arguments, '--overwrite')
    assert len(list((out / 'drive').iterdir())) == 2


@pytest.mark.parametrize('more', [[], ['--overwrite']])
def test_two_runs_at_once_with_one_json_keep_the_entries_of_both(state, tmp_path, monkeypatch, more):
    """The second run starts and ends while the first one predicts."""
    given, real = ['--domain', 'CS', '--json', tmp_path / 'r.json', *more], predict.predict_all
    first, second = rolls(tmp_path / 'A', 0, 'a.png'), rolls(tmp_path / 'B', 255, 'b.png')
    (tmp_path / 'r.json').write_text('{}')

    def meanwhile(*arguments):
        monkeypatch.setattr(predict, 'predict_all', real)
        run(state, tmp_path / 'out', '--input', second, *given)
        return real(*arguments)
    monkeypatch.setattr(predict, 'predict_all', meanwhile)
    run(state, tmp_path / 'out', '--input', first, *given)
    assert set(json.loads((tmp_path / 'r.json').read_text())) == {f'{first}/a.png', f'{second}/b.png'}
    assert json.loads((tmp_path / 'out/predict.json').read_text())['inputs'].keys() == {'a', 'b'}


def test_an_image_whose_outputs_have_too_long_names_is_left_out(state, photos, tmp_path):
    for letters in (247, 251):      # too long for the temporary file of an output, and for .color.png
        shutil.copy(photos / 'a.png', photos / f'sub/{"n" * letters}.png')
    shutil.copy(photos / 'a.png', photos / f'sub/{"m" * 230}.png')
    with pytest.raises(UserError, match='2 images were left out, e.g. .*nnn.png: its name is too long'):
        run(state, tmp_path / 'out', '--input', photos, '--domain', 'CS')
    assert len(list((tmp_path / 'out').rglob('*.png'))) == 4


def test_a_folder_that_cannot_be_written_to_is_refused_first(state, photos, tmp_path, monkeypatch):
    (tmp_path / 'out/sub').mkdir(parents=True)
    monkeypatch.setattr('mdil.evaluation.outputs.os.access', lambda path, mode: Path(path).name != 'sub')
    with pytest.raises(UserError, match='out/sub is no folder that predictions can be written to; choose another --out'):
        run(state, tmp_path / 'out', '--input', photos, '--domain', 'CS')
    assert not list((tmp_path / 'out').rglob('*.*'))
    monkeypatch.undo()
    (tmp_path / 'out/sub').rmdir()
    (tmp_path / 'out/sub').write_text('a file')
    with pytest.raises(UserError, match='out/sub is no folder that predictions can be written to'):
        run(state, tmp_path / 'out', '--input', photos, '--domain', 'CS')


def test_an_input_that_is_no_regular_file_is_refused(tmp_path):
    for name in ('pipe.png', 'pipe.mp4', 'pipe.txt'):
        os.mkfifo(tmp_path / name)
        with pytest.raises(UserError, match=f'{name} is not a file; an image, a folder'):
            find_sources([tmp_path / name])
    with pytest.raises(UserError, match='gone.png does not exist$'):
        find_sources([tmp_path / 'gone.png'])
    with pytest.raises(UserError, match='loop.png cannot be read: Too many levels'):
        (tmp_path / 'loop.png').symlink_to('loop.png')
        find_sources([tmp_path / 'loop.png'])


def test_a_list_names_one_file_a_line(tmp_path):
    names = ['a\x85b.png', 'c\u2028d.png', ' e\x1cf.png']
    rolls(tmp_path, 0, *(name.strip() for name in names))
    (tmp_path / 'list.txt').write_text('\r\n'.join(names), newline='', encoding='utf-8')
    assert [source.path.name for source in find_sources([tmp_path / 'list.txt'])] == [name.strip() for name in names]


def test_a_phones_picture_is_turned_upright(state, photos, tmp_path):
    image = Image.open(photos / 'a.png')
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(photos / 'turned.png', exif=exif)
    image.transpose(Image.Transpose.ROTATE_270).save(photos / 'upright.png')
    run(state, tmp_path / 'out', '--input', photos, '--domain', 'CS')
    assert np.array_equal(pixels(tmp_path / 'out/turned.png'), pixels(tmp_path / 'out/upright.png'))


def test_a_photo_with_broken_exif_data_is_read_as_it_is_stored(state, photos, tmp_path):
    entries = [struct.pack('<HHI', 0x0112, 3, 1) + b'\6\0\0\0', struct.pack('<HHI', 0x8825, 9, 1) + b'\xff' * 4]
    exif = b'Exif\0\0II*\0' + struct.pack('<IH', 8, 2) + b''.join(entries) + b'\0' * 4
    Image.open(photos / 'a.png').save(photos / 'odd.jpg', exif=exif)
    run(state, tmp_path / 'out', '--input', photos / 'odd.jpg', photos / 'a.png', '--domain', 'CS')
    assert pixels(tmp_path / 'out/odd.png').shape == pixels(tmp_path / 'out/a.png').shape


def test_predictions_of_a_video_replace_nothing_else(state, tmp_path):
    frame = Image.new('RGB', (32, 16))
    photos, out = tmp_path / 'photos', tmp_path / 'out'
    for folder in (photos / 'drive', out / 'drive/sub'):
        folder.mkdir(parents=True)
    run_video = lambda *inputs: run(state, out, '--input', *inputs, '--domain', 'CS', '--overwrite')
    video = drive_of([frame] * 2, photos, True)
    kept = [out / 'drive/holiday.png', out / 'drive/sub/000000.png', out / 'drive/1.png']
    for path in kept:
        frame.save(path)
    frame.save(out / 'drive/000007.png')
    run_video(video)
    assert all(path.exists() for path in kept) and not (out / 'drive/000007.png').exists()
    frame.save(photos / 'drive/000001.jpg')
    with pytest.raises(UserError, match=r'/photos/drive/000001.jpg would share .*out/drive/000001.png with a frame of .*drive.mkv'):
        run_video(photos)
    frame.save(photos / 'drive/000001.png')
    with pytest.raises(UserError, match='photos/drive/000001.png would share .*/photos/drive/000001.png with a frame of .*drive.mkv'):
        run(state, photos, '--input', video, photos / 'drive/000001.png', '--domain', 'CS', '--overwrite')


def test_bad_images_are_left_out_and_named(state, photos, tmp_path, capsys):
    for name in ('bad.png', 'worse.png'):
        (photos / name).write_bytes(b'no image')
    with pytest.raises(UserError, match='2 images were left out, e.g. .*bad.png cannot be read'):
        run(state, tmp_path / 'out', '--input', photos, '--domain', 'CS')
    assert 'worse.png cannot be read' in capsys.readouterr().err
    assert len(list((tmp_path / 'out').rglob('*.png'))) == 3


def test_results_below_the_input_are_no_inputs(state, photos):
    for _ in range(2):
        run(state, photos / 'out', '--input', photos, '--domain', 'CS')
    assert len(list((photos / 'out').rglob('*.png'))) == 3


@pytest.mark.parametrize('arguments, message', [
    (['--input', 'gone.png'], 'gone.png does not exist'),
    (['--input', 'empty'], 'no images in'),
    (['--input', 'notes.pdf'], 'an image, a folder'),
    (['--input', 'bad.txt'], 'gone.png does not exist; lines are relative'),
    (['--input', 'photos', '--domain', 'BDD'], 'the network knows cityscapes, IDD, not BDD'),
    (['--input', 'photos', '--out', 'photos'], '--out photos is the folder photos of --input'),
    (['--input', 'photos', '--out', 'alias', '--overwrite'], '--out alias is the folder photos of --input'),
    (['--input', 'photos/a.png', '--out', 'photos', '--overwrite'], 'photos/a.png is an input and would be replaced'),
    (['--input', 'photos/a.png', '--out', 'alias', '--overwrite'], 'alias/a.png is an input and would be replaced'),
    (['--input', 'photos/a.png', '--out', 'more/../photos', '--overwrite'], 'a.png is an input and would be replaced'),
    (['--input', 'photos/sub', 'photos/sub'], 'b.JPG is given twice'),
    (['--input', 'photos', 'more'], 'photos/a.png and more/a.bmp would both be written to'),
    (['--input', 'photos', '--native', '--height', '64'], '--native keeps'),
    (['--input', 'photos', '--width', '64'], '--width is given without'),
    (['--input', 'photos', '--json', 'notes.json'], 'was not written by predict.py'),
    (['--input', 'photos', '--json', 'photos/a.png'], 'a.png is a file that is read'),
    (['--input', 'photos', '--json', 'out/predict.json'], 'predict.json is where predict.py records'),
    (['--input', 'photos', '--json', 'out/a.png'], 'is an output file of .*a.png'),
    (['--input', 'photos', '--label-ids', 'colours'], 'invalid choice')])
def test_bad_input(monkeypatch, state, photos, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path('empty').mkdir()
    Path('more').mkdir()
    Path('more/a.bmp').touch()
    Path('notes.pdf').touch()
    Path('alias').symlink_to('photos')
    before = {path: path.read_bytes() for path in photos.rglob('*.*')}
    Path('notes.json').write_text('[1]')
    Path('bad.txt').write_text('gone.png\n')
    with pytest.raises(UserError, match=message):
        run(state, 'out', '--domain', 'CS', *arguments)
    assert Path('notes.json').read_text() == '[1]'
    assert {path: path.read_bytes() for path in photos.rglob('*.*')} == before


def test_overlays_beside_the_photos_do_not_replace_them(state, photos):
    before = (photos / 'a.png').read_bytes()
    for more in ([], ['--overwrite']):
        run(state, photos, '--input', photos / 'a.png', '--domain', 'CS', '--save', 'overlay', *more)
        assert (photos / 'a.png').read_bytes() == before and (photos / 'a.overlay.png').exists()


def test_the_size_of_the_training_is_what_the_file_says():
    size = lambda **options: trained_size({'options': options} if options else {})
    assert size(height=64, width=128) == (64, 128)
    assert size() == size(height='64', width=128) == size(height=60, width=128) == size(height=2 ** 40, width=128) == PUBLISHED_SIZE


def test_a_video_without_av_says_what_to_install(monkeypatch, state, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, 'av', None)
    (tmp_path / 'drive.mp4').touch()
    with pytest.raises(SystemExit) as end:
        run_main(lambda: run(state, tmp_path / 'out', '--input', tmp_path / 'drive.mp4', '--domain', 'CS'))
    assert end.value.code == 2 and capsys.readouterr().err.endswith('error: av is missing: pip install av\n')


def test_the_frames_of_a_video(state, tmp_path):
    av = pytest.importorskip('av', reason='av reads videos')
    with av.open(str(tmp_path / 'drive.mp4'), 'w') as container:
        stream = container.add_stream('mpeg4', rate=5)
        stream.width, stream.height = 64, 48
        for level in (0, 100, 200):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), level, dtype=np.uint8))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    run(state, tmp_path / 'out', '--input', tmp_path / 'drive.mp4', '--domain', 'CS', '--json', tmp_path / 'r.json')
    files = sorted((tmp_path / 'out/drive').iterdir())
    assert [path.name for path in files] == ['000000.png', '000001.png', '000002.png']
    assert all(pixels(path).shape == (48, 64) for path in files)
    assert list(json.loads((tmp_path / 'r.json').read_text())) == [f'{tmp_path}/drive.mp4/{n:06d}' for n in range(3)]
    (tmp_path / 'broken.mp4').write_bytes(b'no video')
    with pytest.raises(UserError, match='1 image was left out: .*broken.mp4 cannot be read as a video'):
        run(state, tmp_path / 'both', '--input', tmp_path / 'broken.mp4', tmp_path / 'drive.mp4', '--domain', 'CS')
    assert len(list((tmp_path / 'both/drive').iterdir())) == 3
    # The same video as a phone held upright stores it: sideways, with a matrix that turns it.
    content = bytearray((tmp_path / 'drive.mp4').read_bytes())
    matrix = content.index(b'tkhd') + 44
    assert content[matrix:matrix + 8] == b'\0\1\0\0\0\0\0\0'
    content[matrix:matrix + 20] = b''.join(number.to_bytes(4, 'big', signed=True) for number in (0, 1 << 16, 0, -1 << 16, 0))
    (tmp_path / 'phone.mp4').write_bytes(content)
    run(state, tmp_path / 'phone', '--input', tmp_path / 'phone.mp4', '--domain', 'CS')
    assert pixels(tmp_path / 'phone/phone/000000.png').shape == (64, 48)
    frame = lambda *numbers: SimpleNamespace(side_data={'DISPLAYMATRIX': struct.pack('=9i', *numbers, *[0] * (9 - len(numbers)))})
    assert [rotation(frame(*turn)) for turn in ((1, 0, 0, 0, 1), (0, -1, 0, 1, 0), (-1, 0, 0, 0, -1), (-1, 0, 0, 0, 1))] == [
        0, 90, -180, 0]     # the last one is mirrored, not turned
