"""Exported networks: what they answer, what they say of themselves, what is refused."""
import importlib.util
import json
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from mdil import predict
from mdil.datasets.domains import DOMAINS
from mdil.evaluation import export
from mdil.evaluation.inputs import find_sources
from mdil.evaluation.predictor import Predictor
from mdil.models import build_model, checkpoint
from mdil.models.exported import PACKAGES, WRITERS, Exported, write_openvino
from mdil.utils.errors import UserError
from tests.fill import fill

pytestmark = pytest.mark.usefixtures('shallow_module')

FORMATS = {'onnx': 'x.onnx', 'torch': 'x.pt2', 'openvino': 'x.xml'}


@pytest.fixture(scope='module')
def state(tmp_path_factory):
    """A checkpoint of two domains, trained at 32x64."""
    path = tmp_path_factory.mktemp('export') / 'model.pth.tar'
    domains = [DOMAINS['cityscapes'].entry, DOMAINS['camvid'].entry]
    checkpoint.save({'version': checkpoint.VERSION, 'state_dict': fill(build_model([20, 12])).state_dict(), 'domains': domains,
                     'method': 'mdil', 'options': {'height': 32, 'width': 64}}, path)
    return path


class Tiny(nn.Module):
    """(B, 3, H, W) -> (B, 5, H, W)."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ConvTranspose2d(8, 5, 2, 2))

    def forward(self, x):       # any name will do
        return self.layers(x)


def lacking(kind):
    return next((name for name in PACKAGES[kind] if importlib.util.find_spec(name) is None), None)


@pytest.mark.parametrize('kind', FORMATS)
def test_a_file_of_each_kind_answers_as_the_network(kind, tmp_path):
    """At sizes and batches of any number. A network of two layers, as torch takes half a minute for ERFNet."""
    if lacking(kind):
        pytest.skip(f'{lacking(kind)} is not installed')
    network, path = Tiny().eval(), tmp_path / FORMATS[kind]
    about = {'name': 'camvid', 'class_names': ['road', 'Stra\xdfe']}
    WRITERS[kind](network, torch.rand(2, 3, 32, 64), path, about)
    exported = Exported(path)
    assert exported.about == about
    for shape in ((1, 3, 32, 64), (3, 3, 48, 40)):
        images = torch.rand(shape, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            assert torch.allclose(exported(images), network(images), atol=1e-5)


def test_predict_takes_an_exported_network(state, tmp_path, capsys):
    """And gives the same labels; OpenVINO is the format that is written fastest."""
    pytest.importorskip('openvino')
    path = tmp_path / 'x.xml'
    export.main([str(state), str(path), '--format', 'openvino', '--domain', 'camvid'])
    assert 'camvid, 11 classes' in capsys.readouterr().out
    about = Exported(path).about
    assert (about['name'], about['class_names'], about['height'], about['width'], about['void']) == (
        'camvid', list(DOMAINS['camvid'].classes), 32, 64, 11)
    Image.effect_noise((70, 50), 90).convert('RGB').save(tmp_path / 'photo.png')
    answers = []
    for name, more in ((path, []), (state, ['--domain', 'camvid'])):
        out = tmp_path / f'{name.name}-out'
        predict.main(['--state', str(name), '--input', str(tmp_path / 'photo.png'), '--out', str(out), '--device', 'cpu', *more])
        answers.append(Image.open(out / 'photo.png'))
    for name, value in (('--device', 'cuda'), ('--precision', 'bf16'), ('--domains', 'camvid'), ('--method', 'mdil')):
        with pytest.raises(UserError, match=f'{name} is for checkpoints; .*x.xml is an exported network'):
            predict.main(['--state', str(path), '--input', str(tmp_path), '--out', str(tmp_path / 'new'), name, value])
    same = sum(one == other for one, other in zip(*(answer.tobytes() for answer in answers)))
    assert answers[0].size == (70, 50) and same >= 0.999 * 70 * 50


def test_eight_bits_are_calibrated_by_images(tmp_path):
    pytest.importorskip('openvino')
    pytest.importorskip('nncf')
    torch.manual_seed(0)        # chance weights and grey noise once erred by a seventh
    random = np.random.default_rng(0)
    for number in range(3):
        Image.fromarray(random.integers(0, 256, (32, 64, 3), dtype=np.uint8)).save(tmp_path / f'{number}.png')
    network, path, predictor = Tiny().eval(), tmp_path / 'x.xml', Predictor(nn.Identity(), [], (32, 64), None)
    quantise = partial(export.calibrated, predictor, find_sources([str(tmp_path)]))
    write_openvino(network, torch.rand(2, 3, 32, 64), path, {}, quantise)
    images = torch.rand(1, 3, 32, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want = network(images)
    assert 'FakeQuantize' in path.read_text()
    assert 0 < (Exported(path)(images) - want).abs().max() < 0.1 * want.abs().max()


def test_what_a_library_cannot_write_is_said_in_a_line(state, tmp_path, monkeypatch):
    def full(*_, **__):
        raise RuntimeError('basic_ios::clear: iostream error')
    monkeypatch.setitem(WRITERS, 'torch', full)
    with pytest.raises(UserError, match='x.pt2 could not be written as torch .basic_ios::clear: iostream error'):
        export.main([str(state), str(tmp_path / 'x.pt2'), '--domain', 'camvid'])


@pytest.mark.parametrize('arguments, says', [
    (['x.onnx', '--format', 'onnx'], 'knows cityscapes, camvid; choose one with --domain'),
    (['x.onnx', '--format', 'onnx', '--domain', 'IDD'], 'the network knows cityscapes, camvid, not IDD'),
    (['x.bin', '--format', 'onnx', '--domain', 'CS'], 'OUT must end in .onnx'),
    (['x.XML', '--format', 'openvino', '--domain', 'CS'], 'OUT must end in .xml'),
    (['x', '--domain', 'CS'], 'OUT must end in one of'),
    (['x', '--domains', 'IDD', 'camvid'], '--domains IDD camvid contradicts'),
    (['x', '--domains', 'CS', 'camvid', 'IDD'], '--domains cityscapes camvid IDD contradicts'),
    (['x.pt2', '--domain', 'CS', '--domains', 'IDD', 'camvid'], '--domains IDD camvid contradicts'),
    (['x.onnx', '--format', 'published'], '--format published: OUT must not end in .onnx'),
    (['x.ONNX', '--domain', 'CS'], '--format onnx: OUT must end in .onnx'),
    (['x.onnx', '--domain', 'CS', '--int8', '--calibrate', '.'], '--int8 is for OpenVINO: OUT must end in .xml, not .onnx'),
    (['x.xml', '--format', 'openvino', '--domain', 'CS', '--int8'], 'go together')])
def test_what_cannot_be_exported_is_refused(arguments, says, state, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=says):
        export.main([str(state), *arguments])


def test_an_export_replaces_no_file_unasked(state, tmp_path):
    export.main([str(state), str(tmp_path / 'x')])
    with pytest.raises(UserError, match='OUT .*x exists'):
        export.main([str(state), str(tmp_path / 'x')])
    export.main([str(state), str(tmp_path / 'x'), '--overwrite'])
    (tmp_path / 'y.bin').write_bytes(b'precious')
    with pytest.raises(UserError, match='OUT .*y.bin exists'):
        export.main([str(state), str(tmp_path / 'y.xml'), '--domain', 'CS'])


def test_another_file_is_refused_by_name(tmp_path):
    (tmp_path / 'x.pt2').write_bytes(json.dumps({}).encode())
    with pytest.raises(UserError, match='x.pt2 cannot be read as a network of `python -m mdil export`'):
        Exported(tmp_path / 'x.pt2')
    with pytest.raises(UserError, match='y.onnx does not exist'):
        Exported(tmp_path / 'y.onnx')
