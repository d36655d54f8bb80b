"""examples/ianvs: the estimator against stand-ins of the classes that sedna gives it."""
import importlib.util
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import mdil
from tests.conftest import ROOT

pytestmark = pytest.mark.usefixtures('shallow_module')

FILE = ROOT / 'examples/ianvs/basemodel.py'
OPTIONS = {'height': 16, 'width': 32, 'batch_size': 2, 'num_workers': 0, 'device': 'cpu', 'num_epochs': 1}


class ClassFactory:
    """Stands in for sedna's registry: keeps classes by kind and alias."""
    known = {}

    @classmethod
    def register(cls, kind, alias):
        return lambda found: cls.known.setdefault((kind, alias), found)


@pytest.fixture
def BaseModel(monkeypatch):
    """The estimator as ianvs finds it: imported from its file, then asked of the registry."""
    module = ModuleType('sedna.common.class_factory')
    module.ClassFactory, module.ClassType = ClassFactory, SimpleNamespace(GENERAL='general')
    for name in ('sedna', 'sedna.common'):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(ClassFactory, 'known', {})
    spec = importlib.util.spec_from_file_location('basemodel', FILE)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    return ClassFactory.known['general', 'BaseModel']


def data(folder, brightness):
    """A data set as ianvs gives it: x, lists of the paths of image and depth; y, the paths of labels."""
    x, y = [], []
    folder.mkdir()
    for number in range(2):
        labels = np.resize(np.uint8([0, 1, 255]), (16, 32))
        noise = np.random.default_rng(number).integers(0, 20, (16, 32, 3)) + brightness
        for name, content in (('image', np.uint8(noise)), ('label', labels)):
            Image.fromarray(content).save(folder / f'{name}{number}.png')
        x.append([f'{folder}/image{number}.png', f'{folder}/depth{number}.png'])
        y.append(f'{folder}/label{number}.png\n')
    return SimpleNamespace(x=x, y=y)


def test_it_is_short():
    assert len(FILE.read_text().splitlines()) <= 60


def test_it_learns_two_domains_predicts_evaluates_saves_and_loads(BaseModel, tmp_path):
    sets = {'real': data(tmp_path / 'real', 20), 'simulated': data(tmp_path / 'simulated', 200)}
    model = BaseModel(domains=list(sets), classes=['road', 'car'], savedir=tmp_path / 'run', **OPTIONS)
    for given in sets.values():
        path = model.train(given)
    assert mdil.load(path, device='cpu').domains == ['real', 'simulated'] and model.save() == path
    found = model.predict(sets['real'].x)
    assert [each.shape for each in found] == [(1, 16, 32)] * 2 and found[0].max() <= 1
    assert [model.net.predict(given.x[0][0]).domain.name for given in sets.values()] == list(sets)

    def right(labels, predictions):
        truth = [np.asarray(Image.open(label.rstrip())) for label in labels]
        return np.mean([(each == answer[0])[each != 255].mean() for each, answer in zip(truth, predictions)])
    score = model.evaluate(sets['simulated'], metric=('accuracy', right))
    assert score == pytest.approx(model.net.evaluate('simulated', [(x[0], y.rstrip()) for x, y in zip(
        sets['simulated'].x, sets['simulated'].y)])['accuracy'] / 100)
    other = BaseModel(domains=list(sets))
    other.load(model.save(tmp_path / 'saved.pth'))
    assert other.evaluate(sets['simulated'], metric=('accuracy', right)) == score
