"""Telling the domain of an image: looks, statistics, thresholds; what a checkpoint holds of them."""
import json

import numpy as np
import pytest
import torch
from PIL import Image

from mdil import eval as evaluation
from mdil import train
from mdil.datasets import DOMAINS, get_domain
from mdil.datasets.pairs import find_split
from mdil.evaluation import auto, metrics
from mdil.evaluation import identify as tool
from mdil.models import branches, checkpoint, identify
from mdil.models.identify import FEATURES, Identifier, OneDomain, appearance, statistics
from mdil.utils.errors import UserError

pytestmark = pytest.mark.usefixtures('shallow_module')


def looks(seed, count, shift=0.0, spread=1.0):
    """Drawn looks (count, FEATURES) around `shift`."""
    return shift + spread * torch.randn(count, FEATURES, generator=torch.Generator().manual_seed(seed)).double()


def picture(seed, shape=(90, 160), tint=0):
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 200, (9, 16, 3), dtype=np.uint8)).resize(shape[::-1], Image.BICUBIC)
    return Image.fromarray((np.asarray(coarse) + np.array([tint, 0, 0])).clip(0, 255).astype(np.uint8))


def test_the_look_of_an_image_is_finite_and_the_same_mirrored():
    image = picture(0)
    look = appearance(image)
    assert look.shape == (FEATURES,) and look.isfinite().all()
    assert torch.allclose(look, appearance(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)), atol=2e-3)
    assert appearance(Image.new('RGB', (8, 8), (9, 9, 9))).isfinite().all()


def test_the_look_starts_with_the_mean_colour():
    look = appearance(Image.new('RGB', (50, 40), (255, 0, 0)))
    assert look[:3].tolist() == pytest.approx([0.299, -0.299, 0.701], abs=1e-5)


def test_domains_are_told_apart_and_others_are_unknown():
    known = Identifier([statistics(looks(seed, 300, shift)) for seed, shift in ((1, 0.0), (2, 2.0))])
    for index, shift in enumerate((0.0, 2.0)):
        guess = known.guess(looks(5, 200, shift))
        assert (guess.domain == index).all() and guess.unknown.double().mean() < 0.05
        assert torch.allclose(guess.probabilities.sum(dim=1), torch.ones(200).double())
    assert known.guess(looks(6, 200, 5.0)).unknown.all()
    assert known.guess(looks(6, 200, -3.0)).unknown.all()


def test_the_widest_domain_does_not_swallow_what_is_like_a_narrow_one():
    """Images near the narrow domain, but not of it, lie well within the spread of the wide one."""
    known = Identifier([statistics(looks(1, 300, 0.0, 0.1)), statistics(looks(2, 300, 1.0, 1.0))])
    near = looks(3, 100, 0.3, 0.1)
    assert known.models[1].distance(near).max() < known.thresholds[1]
    assert known.guess(near).unknown.all()


def test_a_few_odd_features_do_not_make_an_image_unknown():
    model = OneDomain.of(looks(0, 400))
    odd = model.mean + 100 * torch.linalg.eigh(model.covariance).eigenvectors[:, -identify.TRIMMED:].sum(dim=1)
    assert model.distance(odd[None]).item() == pytest.approx(0, abs=1e-6)
    one_more = odd + torch.linalg.eigh(model.covariance).eigenvectors[:, 0]
    assert model.distance(one_more[None]).item() > 0.1


def test_the_threshold_is_exceeded_by_one_percent_of_held_out_images_and_needs_enough_of_them():
    found = statistics(looks(0, 2000))
    model = OneDomain(found['mean'].double(), found['covariance'].double())
    share = (model.distance(looks(1, 4000)) > found['threshold']).double().mean().item()
    assert 0.005 < share < 0.02
    few = statistics(looks(0, identify.FEWEST - 1))
    assert few['threshold'] == float('inf') and not Identifier([few]).guess(looks(1, 3, 9.0)).unknown.any()
    assert Identifier([statistics(looks(0, 1))]).guess(looks(1, 1)).probabilities.tolist() == [[1.0]]


def test_the_frames_of_a_drive_are_held_out_together():
    """Four drives of 15 alike frames: the threshold has room for a fifth drive, not for twins alone."""
    drives = looks(0, 4).repeat_interleave(15, dim=0) + looks(1, 60, 0.0, 0.05)
    found = statistics(drives)
    model = OneDomain(found['mean'].double(), found['covariance'].double())
    assert found['threshold'] > 10 * model.distance(drives).max()


def test_statistics_are_a_few_kilobytes_and_checked_when_read():
    found = statistics(looks(0, 60))
    assert sum(part.numel() * 4 for part in found.values() if isinstance(part, torch.Tensor)) < 8000
    assert identify.are_statistics({'cityscapes': found, 'IDD': found})
    for name, value in (('mean', torch.zeros(3)), ('count', True), ('threshold', -1.0), ('covariance', 'x'),
                        ('mean', torch.full((FEATURES,), float('nan')))):
        assert not identify.are_statistics({'cityscapes': {**found, name: value}})
    assert not identify.are_statistics({'cityscapes': {}}) and not identify.are_statistics([found])


def test_equal_images_have_statistics_that_a_checkpoint_may_hold():
    """Such as made-up ones: their threshold is 0, and only another image is unknown."""
    same = looks(0, 1).repeat(200, 1)
    found = statistics(same)
    assert found['threshold'] == 0 and identify.are_statistics({'cityscapes': found})
    guess = Identifier([found]).guess(torch.cat([same[:1], looks(1, 1)]))
    assert guess.unknown.tolist() == [False, True]


def test_many_images_are_sampled_in_order(monkeypatch):
    monkeypatch.setattr(identify, 'MOST', 4)
    monkeypatch.setattr(identify, 'looks_of', lambda paths, *_: paths)
    monkeypatch.setattr(identify, 'statistics', lambda found: found)
    assert identify.statistics_of(list(range(10)), 0, '') == [0, 2, 5, 7]
    assert identify.statistics_of(list(range(3)), 0, '') == [0, 1, 2]


@pytest.fixture(scope='module')
def steps(toy, tmp_path_factory):
    """The checkpoints of two steps of one batch each on toy roads."""
    folder, states = tmp_path_factory.mktemp('steps'), []
    for count in (1, 2):
        train.main(['--data-root', str(toy), '--savedir', str(folder / str(count)), '--height', '32', '--num-epochs', '1',
                    '--batch-size', '2', '--limit-batches', '1', '--num-workers', '0', '--device', 'cpu', '--domains',
                    *('cityscapes', 'IDD')[:count], *(['--state', str(states[-1])] if states else [])])
        states.append(folder / str(count) / 'checkpoint.pth.tar')
    return states


def test_every_step_adds_the_statistics_of_its_training_images(toy, steps):
    first, second = (checkpoint.read_checkpoint(path).content['domain_statistics'] for path in steps)
    assert list(first) == ['cityscapes'] and list(second) == ['cityscapes', 'IDD']
    assert torch.equal(first['cityscapes']['mean'], second['cityscapes']['mean'])
    images = sorted((toy / 'IDD_Segmentation/leftImg8bit/train').rglob('*.png'))
    own = torch.stack([appearance(Image.open(path)) for path in images])
    assert second['IDD']['count'] == len(images) == 8
    assert torch.allclose(second['IDD']['mean'].double(), own.mean(dim=0), atol=1e-5)
    assert np.allclose(second['IDD']['covariance'], np.cov(own.numpy().T), atol=1e-5)


def test_a_branch_file_carries_its_domains_statistics(steps, tmp_path):
    branch = branches.extract(branches.LoadedCheckpoint(steps[1]), 'IDD')
    checkpoint.save(branches.without(branches.LoadedCheckpoint(steps[1]), 'IDD'), tmp_path / 'one')
    assert list(checkpoint.read(tmp_path / 'one')['domain_statistics']) == ['cityscapes']
    content = branches.joined(branches.LoadedCheckpoint(tmp_path / 'one'), [('x', branch)])
    assert list(content['domain_statistics']) == ['cityscapes', 'IDD']


def test_damaged_statistics_are_refused(steps, tmp_path):
    content = checkpoint.read(steps[1])
    content['domain_statistics']['IDD']['mean'] = torch.zeros(2)
    checkpoint.save(content, tmp_path / 'x')
    with pytest.raises(UserError, match='its domain_statistics is not what models.identify gives'):
        checkpoint.read_checkpoint(tmp_path / 'x')


def older(path, target):
    """The checkpoint at `path` without its statistics."""
    content = checkpoint.read(path)
    del content['domain_statistics']
    checkpoint.save(content, target)
    return target


def test_the_tool_gives_an_older_file_what_training_would_have(toy, steps, tmp_path, capsys):
    state = older(steps[1], tmp_path / 'old')
    tool.main([str(state), '--out', str(tmp_path / 'new'), '--data-root', str(toy), '--images',
               f'CS={toy}/cityscapes/leftImg8bit/train'])
    before, after = checkpoint.read(steps[1]), checkpoint.read(tmp_path / 'new')
    assert before.keys() == after.keys()
    for name, entry in before['domain_statistics'].items():
        assert torch.equal(entry['mean'], after['domain_statistics'][name]['mean'])
    assert 'cityscapes: 8 images; fewer than 50: none will be called unknown' in capsys.readouterr().out
    with pytest.raises(UserError, match='exists; name another file'):
        tool.main([str(state), '--out', str(tmp_path / 'new'), '--data-root', str(toy)])


def test_the_tool_names_what_is_wrong(toy, steps, tmp_path):
    for items, message in ((['BDD=x'], 'knows cityscapes, IDD, not BDD'), (['IDD'], 'is not NAME=FOLDER'),
                           ([f'IDD={tmp_path}', f'idd={tmp_path}'], 'names IDD twice'),
                           ([f'IDD={tmp_path}/gone'], 'gone does not exist'), ([f'IDD={tmp_path}'], 'no images in')):
        with pytest.raises(UserError, match=message):
            tool.main([str(steps[1]), '--out', str(tmp_path / 'x'), '--data-root', str(toy), '--images', *items])
    assert not (tmp_path / 'x').exists()


def test_the_tool_reads_the_images_of_a_folder_in_order_and_nothing_else(steps, tmp_path, monkeypatch):
    for number in range(3):
        picture(number).save(tmp_path / f'{number}.png')
    for name in ('notes.txt', 'drive.mp4'):
        (tmp_path / name).touch()
    read = []
    monkeypatch.setattr(tool, 'statistics_of', lambda paths, *_: read.extend(paths) or {'count': len(paths)})
    monkeypatch.setattr(checkpoint, 'save', lambda content, path: None)
    tool.main([str(steps[1]), '--out', str(tmp_path / 'new'), '--images', f'IDD={tmp_path}'])
    assert [path.name for path in read] == ['0.png', '1.png', '2.png']


@pytest.mark.parametrize('folder', [False, True])
def test_photos_look_as_they_do_upright_pairs_as_they_are_stored(toy, steps, tmp_path, monkeypatch, folder):
    state, seen = older(steps[1], tmp_path / 'old'), []
    monkeypatch.setattr(tool, 'statistics_of', lambda paths, threads, title, read: seen.append(read) or {'count': 60})
    monkeypatch.setattr(checkpoint, 'save', lambda content, path: None)
    sideways = Image.new('RGB', (20, 10))
    sideways.getexif()[0x0112] = 6
    sideways.save(tmp_path / 'x.jpg', exif=sideways.getexif())
    images = ['--images', f'cityscapes={tmp_path}', f'IDD={tmp_path}'] if folder else ['--data-root', str(toy)]
    tool.main([str(state), '--out', str(tmp_path / 'new'), *images])
    assert [read(tmp_path / 'x.jpg').size for read in seen] == [(10, 20) if folder else (20, 10)] * 2


def evaluate(toy, state, out, *arguments):
    evaluation.main(['--data-root', str(toy), '--height', '32', '--num-workers', '0', '--device', 'cpu', '--state',
                     str(state), '--json', str(out), *arguments])
    return json.loads(out.read_text())


def test_eval_with_the_branch_told_from_the_image(toy, steps, tmp_path, capsys):
    found = evaluate(toy, steps[1], tmp_path / 'r.json', '--domain', 'auto', '--batch-size', '3')
    assert found['auto']['accuracy'] == 100
    assert found['auto']['matrix'] == {'cityscapes': {'cityscapes': 4, 'IDD': 0}, 'IDD': {'cityscapes': 0, 'IDD': 4}}
    for name, entry in found['domains'].items():        # all right, so auto is what the own branch has
        assert found['auto']['domains'][name]['miou'] == pytest.approx(entry['miou'])
    text = ' '.join(capsys.readouterr().out.split())
    assert 'The branch chosen for each image' in text
    assert 'No image is called unknown, because every domain had fewer than 50 training images.' in text
    alone = evaluate(toy, steps[1], tmp_path / 'alone.json', '--domain', 'auto', '--only', 'IDD')
    assert alone['auto']['matrix'] == {'IDD': {'cityscapes': 0, 'IDD': 4}} and list(alone['domains']) == ['IDD']
    with pytest.raises(UserError, match='python -m mdil identify'):
        evaluate(toy, older(steps[1], tmp_path / 'old'), tmp_path / 'x.json', '--domain', 'auto')


def test_a_wrong_branch_counts_by_the_names_of_its_classes(toy, steps, tmp_path, monkeypatch):
    """All images are taken for cityscapes: IDD's are scored by cityscapes' branch, read by its class names."""
    wrong = identify.Guess(torch.tensor([[1.0, 0.0]]).expand(4, 2), torch.zeros(4))
    monkeypatch.setattr(auto, 'guess_of', lambda *_: wrong)
    found = evaluate(toy, steps[1], tmp_path / 'r.json', '--domain', 'auto')['auto']
    assert found['accuracy'] == 50 and found['matrix']['IDD'] == {'cityscapes': 4, 'IDD': 0}
    model = checkpoint.load_network(checkpoint.read_checkpoint(steps[1])).eval()
    own, other = DOMAINS['IDD'], DOMAINS['cityscapes']
    table = np.array([own.classes.index(name) if name in own.classes else 26 for name in other.classes] + [26])
    total = 0
    for pair in find_split(get_domain('IDD'), toy, 'val').pairs:
        pixels = np.asarray(Image.open(pair.image).resize((64, 32), Image.BILINEAR))
        truth = np.asarray(Image.open(pair.label).resize((64, 32), Image.NEAREST)).astype(int)
        with torch.inference_mode():
            answer = model(torch.tensor(pixels).permute(2, 0, 1)[None] / 255, 0)[0].argmax(dim=0).numpy()
        total += metrics.confusion(torch.tensor(table[answer]), torch.tensor(np.where(truth == 255, 26, truth)), 27)
    assert found['domains']['IDD']['miou'] == pytest.approx(metrics.mean_iou(total), abs=1e-9)
