"""predict.py --advise: expected mIoU from confidence, and what it says about images of a new place."""
import json
import shutil

import pytest
import torch
from PIL import Image

from mdil import predict
from mdil.datasets import DOMAINS, SegmentationDataset
from mdil.datasets.pairs import find_split
from mdil.evaluation import advise, metrics
from mdil.evaluation.advise import Calibration, Counts, calibration, counts_of
from mdil.evaluation.predictor import Predictor
from mdil.models import checkpoint
from mdil.utils.errors import UserError
from mdil.utils.parallel import Place
from tests.test_predict import NAMES, SIZE, knowing, model, photos, state  # noqa: F401 (fixtures)

pytestmark = pytest.mark.usefixtures('shallow_module')

CPU = Place(torch.device('cpu'))


def test_trusted_miou_is_the_true_one_where_probabilities_are():
    """Answers drawn from the probabilities themselves: the expected IoU is met by the drawn truth."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(1, 5, 300, 300, generator=generator)
    counts, answers = counts_of(logits)
    probabilities = logits[0, :4].softmax(dim=0).flatten(1)
    truth = torch.multinomial(probabilities.T, 1, generator=generator).view(1, 300, 300)
    matrix = metrics.confusion(answers, truth, 5)
    assert counts.trusted_miou == pytest.approx(metrics.mean_iou(matrix), abs=0.5)
    assert counts.pixels.sum().item() == pytest.approx(90000, rel=1e-5) and counts.answers.sum() == 90000


def test_probabilities_of_classes_that_are_one_in_another_space_add_up():
    logits = torch.tensor([2.0, 1.9, 2.1, 9.0]).view(1, 4, 1, 1)        # void, the last, is no answer
    counts, answers = counts_of(logits, translation=[0, 0, 1], classes=2)
    p = logits[0, :3, 0, 0].softmax(dim=0)
    assert answers.item() == 0 and counts.right[0].item() == pytest.approx((p[0] + p[1]).item())


def test_calibration_corrects_by_the_ratio_and_errs_by_its_spread():
    sure = Counts(*(torch.tensor([50.0, 50.0]).double() for _ in range(3)))      # trusts itself fully
    good, bad = torch.tensor([[50, 0, 0], [0, 50, 0], [0, 0, 0]]), torch.tensor([[25, 25, 0], [25, 25, 0], [0, 0, 0]])
    found = calibration([(sure, good), (sure, bad)])
    assert found.miou == pytest.approx(60) and found.ratio == pytest.approx(0.6)        # 75 / 125
    assert found.spread == pytest.approx(torch.tensor([1, 1 / 3]).std().item())
    void = torch.zeros_like(good)       # of images without a label
    assert calibration([(sure, good), (sure, bad), (sure, void)]).spread == found.spread
    assert calibration([(sure, good), (sure, void)]).spread is None
    half = Counts(torch.tensor([50.0]).double(), torch.tensor([75.0]).double(), torch.tensor([75.0]).double())
    assert Calibration(60.0, 0.6, 0.1).expected(half) == (pytest.approx(30), pytest.approx(5))


def test_validation_images_give_the_networks_own_miou(toy, model):  # noqa: F811
    predictor = Predictor(model, [DOMAINS[name] for name in NAMES], SIZE, CPU)
    dataset = SegmentationDataset(DOMAINS['IDD'], toy, 'val', SIZE)
    matrix = 0
    for image, label in map(dataset.load, range(len(dataset))):
        with torch.inference_mode():
            answer = model(image[None] / 255, 1)[0, :-1].argmax(dim=0)
        matrix += metrics.confusion(answer, label, 27)
    assert advise.calibrate(predictor, 1, dataset).miou == pytest.approx(metrics.mean_iou(matrix), abs=1e-4)


def run(state, *arguments):  # noqa: F811
    predict.main(['--state', str(state), '--device', 'cpu', '--num-workers', '0', *map(str, arguments)])


def test_advice_about_images_of_a_known_domain(toy, knowing, tmp_path, capsys):  # noqa: F811
    folder = toy / 'IDD_Segmentation/leftImg8bit/val'
    run(knowing, '--advise', folder, '--data-root', tmp_path)       # learnt from too few images for a threshold
    said = capsys.readouterr().out
    assert 'not known: IDD had fewer than 50 training images' in said and 'no new branch' not in said
    content = checkpoint.read(knowing)
    content['domain_statistics']['IDD']['threshold'] = 1e9
    knowing = tmp_path / 'bounded.pth'
    checkpoint.save(content, knowing)
    run(knowing, '--advise', folder, '--data-root', toy, '--json', tmp_path / 'r.json')
    found, said = json.loads((tmp_path / 'r.json').read_text()), capsys.readouterr().out
    assert (found['domain'], found['unknown'], found['worth']) == ('IDD', 0.0, False)
    assert found['domains'] == {'cityscapes': 0.0, 'IDD': 1.0}
    # The folder holds the very validation images, so what is expected of it is what they have.
    assert found['expected_miou'] == pytest.approx(found['own_miou'], rel=1e-3)
    assert '4 images; the branch that fits best: IDD' in said and 'no new branch is needed' in said
    with pytest.raises(UserError, match='exists; name another file'):
        run(knowing, '--advise', folder, '--json', tmp_path / 'r.json')
    photo = next(folder.rglob('*.png'))
    for read in (knowing, photo):
        with pytest.raises(UserError, match='is a file that is read'):
            run(knowing, '--advise', folder, '--json', read, '--overwrite')


def test_advice_about_images_like_none(toy, knowing, tmp_path, capsys):  # noqa: F811
    content = checkpoint.read(knowing)
    content['domain_statistics']['IDD']['threshold'] = 1e-9
    checkpoint.save(content, tmp_path / 'strict.pth')
    run(tmp_path / 'strict.pth', '--advise', toy / 'IDD_Segmentation/leftImg8bit/val', '--data-root', tmp_path)
    said = capsys.readouterr().out
    assert '100 % are unlike any known domain' in said and 'a new branch is worth training' in said
    assert 'expected mIoU: not known without labelled validation images of IDD (no val images' in said
    run(tmp_path / 'strict.pth', '--advise', toy / 'IDD_Segmentation/leftImg8bit/val', '--data-root', toy)
    assert 'expected mIoU of that branch: at most ' in capsys.readouterr().out


def test_labels_that_are_all_void_are_no_labels(toy, knowing, tmp_path, capsys):  # noqa: F811
    shutil.copytree(toy / 'IDD_Segmentation', tmp_path / 'IDD_Segmentation')
    for pair in find_split(DOMAINS['IDD'], tmp_path, 'val').pairs:
        Image.new('L', Image.open(pair.label).size, 255).save(pair.label)
    run(knowing, '--advise', toy / 'IDD_Segmentation/leftImg8bit/val', '--data-root', tmp_path, '--json', tmp_path / 'r')
    assert 'IDD (the labels of those that were read hold nothing but void)' in capsys.readouterr().out
    found = json.loads((tmp_path / 'r').read_text(), parse_constant=pytest.fail)
    assert found['expected_miou'] is None and found['own_miou'] is None and 'nothing but void' in found['why_not']


def test_an_unreadable_image_is_left_out_of_the_advice(toy, knowing, tmp_path, capsys):  # noqa: F811
    for pair in find_split(DOMAINS['IDD'], toy, 'val').pairs[:2]:
        shutil.copy(pair.image, tmp_path)
    (tmp_path / 'broken.png').write_bytes(b'not an image')
    with pytest.raises(UserError, match='1 image was left out: .*broken.png'):
        run(knowing, '--advise', tmp_path, '--data-root', toy)
    assert '2 images; the branch that fits best: IDD' in capsys.readouterr().out
    for path in tmp_path.glob('*[!n].png'):
        path.unlink()
    with pytest.raises(UserError, match='1 image was left out'):
        run(knowing, '--advise', tmp_path, '--data-root', toy)
    assert not capsys.readouterr().out


def test_half_of_the_images_unknown_is_no_reason_for_a_new_branch():
    found = {'domain': 'IDD', 'unknown': 0.5, 'worth': 0.5 > advise.WORTH, 'domains': {'IDD': 1.0},
             'expected_miou': None, 'why_not': 'none'}
    assert 'at least half of the images are like those' in list(advise.sentences(found, 2))[-1]


def test_advice_segments_nothing(knowing, photos, tmp_path):  # noqa: F811
    with pytest.raises(UserError, match='--advise FOLDER does not segment images'):
        run(knowing, '--advise', photos, '--out', tmp_path / 'out')
    for words in (['--save', 'overlay'], ['--label-ids', 'files'], ['--sequence']):
        with pytest.raises(UserError, match='--advise FOLDER writes no predictions; leave out --save'):
            run(knowing, '--advise', photos, *words)
    with pytest.raises(UserError, match='say what to segment'):
        run(knowing, '--out', tmp_path / 'out')


def test_advice_needs_images_and_a_checkpoint(knowing, photos, tmp_path):  # noqa: F811
    (tmp_path / 'drive.mp4').touch()
    with pytest.raises(UserError, match='no images in .*, only videos'):
        run(knowing, '--advise', tmp_path / 'drive.mp4')
    with pytest.raises(UserError, match='--advise needs a checkpoint; idd.onnx is an exported network'):
        run('idd.onnx', '--advise', photos)
