"""The Python interface: loading, predicting, the loss of a step."""
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import mdil
from mdil import eval as evaluation, predict
from mdil.datasets import get_domain
from mdil.datasets.pairs import find_split
from mdil.evaluation.advise import validation_set
from mdil.losses import cross_entropy_parts
from mdil.models import build_model, checkpoint
from mdil.models.identify import statistics_of
from tests.conftest import ROOT
from tests.test_eval import COUNTS
from tests.test_predict import expected

NAMES = ['cityscapes', 'IDD']
SIZE = 32, 64


@pytest.fixture(scope='module')
def file(toy, tmp_path_factory):
    """The checkpoint of an untrained network of two domains that knows how the toy roads look."""
    torch.manual_seed(5)
    paths = {name: [pair.image for pair in find_split(get_domain(name), toy, 'train').pairs] for name in NAMES}
    path = tmp_path_factory.mktemp('api') / 'two.pth'
    checkpoint.save({'version': 1, 'state_dict': build_model([COUNTS[name] for name in NAMES]).state_dict(),
                     'method': 'mdil', 'options': {'height': SIZE[0], 'width': SIZE[1]},
                     'domains': [{'name': name, 'classes': COUNTS[name]} for name in NAMES],
                     'domain_statistics': {name: statistics_of(found, 0, name) for name, found in paths.items()}}, path)
    return path


@pytest.fixture(scope='module')
def net(file):
    return mdil.load(file, device='cpu')


@pytest.fixture(scope='module')
def photo(toy):
    """A validation image of the second domain."""
    return find_split(get_domain('IDD'), toy, 'val').pairs[0].image


def saved(path, entry, **more):
    """A checkpoint at `path` of a network of the one domain `entry`."""
    checkpoint.save({'version': 1, 'state_dict': build_model([entry['classes']]).state_dict(), 'method': 'mdil',
                     'domains': [entry], 'options': {'height': 16, 'width': 32}, **more}, path)
    return path


def test_import_is_cheap():
    code = 'import mdil, sys; assert not {"torch", "numpy", "PIL"} & sys.modules.keys(); assert "load" in dir(mdil)'
    subprocess.run([sys.executable, '-c', code], cwd=ROOT, check=True)
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        mdil.lode       # noqa: B018


def test_the_branch_asked_for_answers_at_the_images_own_size(net, photo):
    labels, confidence = expected(net.model, 1, photo)
    found = net.predict(photo, 'IDD', probabilities=True)
    assert net.domains == NAMES and net.classes('CS')[0] == 'road' and len(net.classes('IDD')) == 26
    assert np.array_equal(found.labels, labels) and np.allclose(found.confidence, confidence, atol=1e-5)
    assert found.domain.name == 'IDD' and found.probabilities.shape == (26, *labels.shape)
    assert torch.equal(found.probabilities.argmax(0), found.labels.long())
    assert torch.allclose(found.probabilities.sum(0), torch.tensor(1.0))
    assert net.predict(photo, 'IDD').probabilities is None


def test_every_kind_of_image_gets_the_same_answer(net, photo):
    image = Image.open(photo).convert('RGB')
    array = np.asarray(image)
    tensor = torch.tensor(array).permute(2, 0, 1)
    labels = net.predict(photo, 'IDD').labels
    kinds = [str(photo), image, array, array.astype(np.float32) / 255, tensor, tensor / 255]
    kinds += [array[:20, :40], array[..., 0]]
    found = net.predict(kinds, 'IDD')
    assert all(torch.equal(labels, each.labels) for each in found[:6])
    assert found[6].labels.shape == (20, 40)
    assert torch.equal(found[7].labels, net.predict(image.getchannel(0), 'IDD').labels)
    assert net.predict([], 'IDD') == []


@pytest.mark.parametrize('image, error, says', [
    (np.zeros((3, 8, 8), np.uint8), ValueError, 'that of no image'), (np.zeros((8, 8, 3), int), ValueError, 'scale it'),
    (np.full((8, 8), 1.5), ValueError, 'scale it'), (np.full((8, 8), np.nan), ValueError, 'scale it'),
    (torch.zeros(0, 8), ValueError, 'that of no image'), (3, TypeError, 'not int'),
    *[(Image.new(mode, (8, 8)), mdil.UserError, f'the image: mode {mode}, but 8 bits') for mode in ('I;16', 'I', 'F')],
    (Image.new('RGB', (0, 0)), ValueError, 'the image has no pixels'), ('none.png', mdil.UserError, 'none.png cannot be read')])
def test_what_is_no_image_is_refused(net, image, error, says):
    with pytest.raises(error, match=says):
        net.predict(image, 'IDD')


def test_tensors_may_be_bfloat16(net):
    image = torch.rand(3, 16, 32).bfloat16()
    assert torch.equal(net.predict(image, 'IDD').labels, net.predict(image.float(), 'IDD').labels)


@pytest.mark.parametrize('path, says', [('~nouser/x', 'file ~nouser/x: there is no such user'), ('', 'file is empty')])
def test_a_path_that_cannot_be_one_is_refused(path, says):
    with pytest.raises(mdil.UserError, match=says):
        mdil.load(path, device='cpu')


def test_a_truncated_picture_that_is_open_is_refused(net, tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(tmp_path / 'whole.jpg')
    (tmp_path / 'cut.jpg').write_bytes((tmp_path / 'whole.jpg').read_bytes()[:2000])
    with pytest.raises(mdil.UserError, match='the image cannot be read .*truncated'):
        net.predict(Image.open(tmp_path / 'cut.jpg'), 'IDD')


def test_the_domain_is_told_from_the_image(net, toy, photo):
    other = find_split(get_domain('cityscapes'), toy, 'val').pairs[0].image
    choices = net.guess_domain([photo, other])
    assert [choice.name for choice in choices] == ['IDD', 'cityscapes'] and not choices[0].unknown
    assert sum(choices[0].probabilities.values()) == pytest.approx(1) and list(choices[0].probabilities) == NAMES
    assert net.guess_domain(photo) == net.predict(photo).choice == choices[0]
    assert net.predict(photo).domain.name == 'IDD'


def test_a_network_of_one_domain_has_nothing_to_tell(tmp_path, photo):
    net = mdil.load(saved(tmp_path / 'one.pth', {'name': 'camvid', 'classes': 12}), device='cpu')
    assert net.predict(photo).domain.name == net.guess_domain(photo).name == 'camvid'


def test_without_statistics_the_domain_must_be_named(file, tmp_path, photo):
    content = checkpoint.read(file)
    del content['domain_statistics']
    checkpoint.save(content, tmp_path / 'old.pth')
    net = mdil.load(tmp_path / 'old.pth', device='cpu')
    with pytest.raises(mdil.UserError, match='mdil identify'):
        net.predict(photo)
    with pytest.raises(mdil.UserError, match='the network knows .*, not moon'):
        net.predict(photo, 'moon')
    assert net.predict(photo, 'IDD').labels.shape == (64, 128)


def test_a_domain_of_ones_own_is_what_its_checkpoint_says(tmp_path, photo):
    entry = {'name': 'village', 'classes': 3, 'class_names': ['mud', 'hut'], 'colors': [[1, 2, 3], [4, 5, 6]]}
    net = mdil.load(saved(tmp_path / 'own.pth', entry), device='cpu')
    assert net.classes('village') == ['mud', 'hut'] and net.predict(photo).shares.keys() <= {'mud', 'hut'}
    predict.main(['--state', str(tmp_path / 'own.pth'), '--input', str(photo), '--out', str(tmp_path / 'out'),
                  '--device', 'cpu', '--num-workers', '0'])
    assert len(list((tmp_path / 'out').glob('*.png'))) == 1
    dataset, why = validation_set(net.predictor, 0, tmp_path)
    assert dataset is None and '--data village=FOLDER' in why
    with pytest.raises(mdil.UserError, match='unknown domain'):
        mdil.load(saved(tmp_path / 'nameless.pth', {'name': 'village', 'classes': 3}), device='cpu')


def test_a_published_file_is_told_its_domains(tmp_path, photo):
    torch.save({'state_dict': {f'module.{key}': value for key, value in build_model([20, 27]).state_dict().items()}},
               tmp_path / 'p.pth')
    with pytest.raises(mdil.UserError, match='no domain names'):
        mdil.load(tmp_path / 'p.pth', device='cpu')
    net = mdil.load(tmp_path / 'p.pth', domains=['CS', 'idd'], size=(16, 32), device='cpu')
    assert net.domains == NAMES and net.predictor.size == (16, 32)
    net.save(tmp_path / 'ours.pth')
    again = mdil.load(tmp_path / 'ours.pth', size=(16, 32), device='cpu')
    assert again.domains == NAMES and torch.equal(again.predict(photo, 'IDD').labels, net.predict(photo, 'IDD').labels)


@pytest.mark.parametrize('options, says', [
    ({'domains': ['BDD', 'IDD']}, '^domains BDD IDD contradicts .*which knows cityscapes IDD'), ({'precision': 'int8'}, 'is not one of'),
    ({'size': 3}, 'multiples of 8'), ({'size': (30, 64)}, 'multiples of 8'), ({'size': (16,)}, 'multiples of 8'),
    ({'device': 'moon'}, 'not a torch device'), ({'method': 'fine-tune'}, 'not a network of')])
def test_what_cannot_be_loaded_is_said(file, options, says):
    with pytest.raises(mdil.UserError, match=says):
        mdil.load(file, **{'device': 'cpu', **options})


@pytest.mark.parametrize('name', ['n.onnx', 'n.xml', 'n.pt2'])
def test_an_exported_network_is_called_that(tmp_path, name):
    (tmp_path / name).write_bytes(b'x')
    with pytest.raises(mdil.UserError, match='an exported network, which only predict.py takes'):
        mdil.load(tmp_path / name)


def test_other_types_are_refused_at_the_door(file, net):
    for act in (lambda: mdil.load(3), lambda: mdil.load(file, domains='CS'), lambda: mdil.load(file, data=['x']),
                lambda: mdil.load(file, data={1: 'x'}), lambda: mdil.load(file, data={'x': 2}),
                lambda: net.predict(None), lambda: net.predict(np.zeros((8, 8)), 3), lambda: net.classes(0), lambda: net.save(None)):
        with pytest.raises(TypeError, match='is expected, not'):
            act()
    with pytest.raises(mdil.UserError, match="'a.png' is not a pair"):
        net.evaluate('IDD', ['a.png'])


def test_single_is_a_plain_network_that_shares_the_weights(net):
    images = torch.rand(1, 3, 16, 32)
    single = net.single('IDD')
    assert torch.equal(single(images), net.model(images, 1)) and single(images).shape == (1, 27, 16, 32)
    assert not single.training and single.encoder.layers[0].conv is net.single('cityscapes').encoder.layers[0].conv


def test_save_writes_what_the_network_is_now(file, tmp_path, photo):
    net = mdil.load(file, device='cpu')
    with torch.no_grad():
        net.model.single(1).decoder.output_conv.bias[3] += 100
    net.save(tmp_path / 'new.pth')
    again = mdil.load(tmp_path / 'new.pth', device='cpu')
    assert again.predict(photo).shares == {net.classes('IDD')[3]: 1.0} and again.predictor.size == SIZE
    with pytest.raises(mdil.UserError, match='exists'):
        net.save(tmp_path / 'new.pth')
    net.save(tmp_path / 'new.pth', overwrite=True)


def test_a_tilde_is_the_home_folder(file, tmp_path, photo, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.chdir(tmp_path)
    net = mdil.load(file, device='cpu')
    net.save('~/new.pth')
    shutil.copy(photo, tmp_path / 'here.png')
    assert (tmp_path / 'new.pth').exists() and not (tmp_path / '~').exists()
    assert mdil.load('~/new.pth', data={'IDD': '~/nothing'}, device='cpu').predict('~/here.png').domain.name


def test_evaluate_gives_what_eval_py_does(file, net, toy, tmp_path):
    pairs = [(pair.image, pair.label) for pair in find_split(get_domain('IDD'), toy, 'val').pairs]
    found = net.evaluate('IDD', pairs)
    evaluation.main(['--state', str(file), '--data-root', str(toy), '--height', '32', '--device', 'cpu',
                     '--num-workers', '0', '--json', str(tmp_path / 'e.json')])
    entry = json.loads((tmp_path / 'e.json').read_text())['domains']['IDD']
    assert found['miou'] == entry['miou'] and found['accuracy'] == entry['accuracy']
    assert net.evaluate('IDD', iter(pairs))['miou'] == found['miou']
    with pytest.raises(mdil.UserError, match='no pairs to evaluate IDD'):
        net.evaluate('IDD', [])
    with pytest.raises(mdil.UserError, match='none.png cannot be read'):
        net.evaluate('IDD', [('none.png', 'none.png')])


def test_labels_of_an_own_domain_need_its_declaration(tmp_path, photo):
    """A checkpoint has the names of the classes, not the label values."""
    entry = {'name': 'village', 'classes': 3, 'class_names': ['road', 'rest']}
    content = {'version': 1, 'state_dict': build_model([3], 'single-task').state_dict(), 'domains': [entry],
               'method': 'single-task', 'options': {'height': 16, 'width': 32}}
    checkpoint.save(content, tmp_path / 'x')
    Image.new('L', (32, 16), 11).save(tmp_path / 'label.png')
    with pytest.raises(mdil.UserError, match=r"how labels are stored.* pass data=\{'village': FOLDER\} to mdil.load"):
        mdil.load(tmp_path / 'x', device='cpu').evaluate('village', [(photo, tmp_path / 'label.png')])


@pytest.fixture
def batch():
    """Images (2, 3, 16, 32) in [0, 1], and labels of 5 classes, void last."""
    generator = torch.Generator().manual_seed(0)
    return torch.rand(2, 3, 16, 32, generator=generator), torch.randint(0, 5, (2, 16, 32), generator=generator)


def test_the_loss_of_a_step_is_cross_entropy_and_distance_to_the_teacher(batch):
    torch.manual_seed(0)
    images, labels = batch
    model, teacher = build_model([4, 5]).eval(), build_model([4]).eval()
    weights = [1.0, 2, 3, 4, 0]
    found = mdil.step_loss(model, 1, images, labels, teacher, class_weights=weights, lambdac=0.5, temperature=2)
    ce = torch.nn.functional.cross_entropy(model(images, 1), labels, torch.tensor(weights))
    logs = [(network(images, 0) / 2).log_softmax(1) for network in (teacher, model)]
    kd = (logs[0].exp() * (logs[0] - logs[1])).sum(1).mean()
    assert torch.allclose(found['ce'], ce) and torch.allclose(found['kd'], 4 * kd, rtol=1e-4)      # T^2 = 4
    assert torch.allclose(found['loss'], found['ce'] + 0.5 * found['kd'])


@pytest.mark.parametrize('images, labels', [('float64', 'uint16'), ('float16', 'int8'), ('float32', 'uint8')])
def test_a_batch_may_be_of_any_type_that_holds_it(batch, images, labels):
    torch.manual_seed(0)
    model = build_model([4, 5]).eval()
    want = mdil.step_loss(model, 1, *batch)['loss']
    given = batch[0].to(getattr(torch, images)), batch[1].to(getattr(torch, labels))
    assert torch.allclose(mdil.step_loss(model, 1, *given)['loss'], want, rtol=1e-3)


def test_a_foreign_loop_learns_and_leaves_the_frozen_alone(batch):
    torch.manual_seed(0)
    images, labels = batch
    model = build_model([4, 5]).freeze([0], shared=True).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(3):
        found = mdil.step_loss(model, 1, (255 * images).byte(), labels)
        optimizer.zero_grad()
        found['loss'].backward()
        optimizer.step()
        losses.append(found['loss'].item())
    assert found.keys() == {'loss', 'ce'} and losses[-1] < losses[0]
    own = model.view_names(1)[0].values()
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert moved and moved <= set(own)


@pytest.mark.parametrize('change, error, says', [
    ({'temperature': 0}, ValueError, 'temperature: a finite number above 0'), ({'lambdac': -1}, ValueError, 'lambdac: a finite'),
    ({'labels': lambda x: x.float()}, ValueError, 'labels .torch.float32. are no class indices: .* 0 to 4'),
    ({'labels': lambda x: x + 5}, ValueError, 'no class indices'),
    ({'labels': lambda x: x.long() - 9}, ValueError, 'no class indices'), ({'labels': lambda x: x[:, None]}, ValueError, r'\(B, H, W\)'),
    ({'images': lambda x: 255 * x}, ValueError, 'images .torch.float32. hold neither'),
    ({'images': lambda x: x.numpy()}, TypeError, 'images: a tensor is expected, not a ndarray'),
    ({'class_weights': [1.0, 0.0]}, ValueError, 'class_weights .2,.: 5 finite numbers'),
    ({'class_weights': [float('nan')] * 5}, ValueError, '5 finite numbers'), ({'class_weights': [-1.0] * 5}, ValueError, 'at least 0'),
    ({'labels': lambda x: x.to(torch.complex64)}, ValueError, 'are no class indices'), ({'domain': True}, TypeError, 'not True'),
    ({'images': lambda x: x[:0], 'labels': lambda x: x[:0]}, ValueError, 'are expected'),
    ({'domain': 2}, IndexError, 'domain 2'),
    ({'domain': 'IDD'}, TypeError, 'a Network, which knows domains by name'), ({'domain': None}, TypeError, 'a name or an index'),
    ({'teacher': lambda _: build_model([4, 5])}, ValueError, 'it knows the domain that is learnt'),
    ({'teacher': lambda _: build_model([6])}, ValueError, r'its domains have \[6\] classes, those of net \[4, 5\]'),
    ({'net': None}, TypeError, 'net: a Network, or its model'), ({'teacher': 'x'}, TypeError, 'teacher: a Network')])
def test_step_loss_refuses_what_would_spoil_it(batch, change, error, says):
    given = {'net': build_model([4, 5]), 'domain': 1, 'images': batch[0], 'labels': batch[1], 'teacher': build_model([4]).eval()}
    given |= {name: value(given[name]) if callable(value) else value for name, value in change.items()}
    with pytest.raises(error, match=says):
        mdil.step_loss(**given)


def test_step_loss_takes_names_and_ignores_void(net, batch):
    images, labels = batch
    void = torch.full_like(labels, 26)
    assert mdil.step_loss(net, 'IDD', images, void)['ce'] == 0
    numerator, denominator = cross_entropy_parts(net.model(images, 1), labels, torch.tensor([1.0] * 26 + [0]))
    assert mdil.step_loss(net, 'IDD', images, labels)['loss'].item() == pytest.approx((numerator / denominator).item())
    with pytest.raises(IndexError):
        mdil.step_loss(net, 2, images, labels)
    with pytest.raises(mdil.UserError, match='moon'):
        mdil.step_loss(net, 'moon', images, labels)


def test_the_published_network_has_the_published_keys(file):
    net = mdil.published.Net([20, 20], nb_tasks=2, cur_task=1).eval()
    lines = (ROOT / 'tests/state_dict_keys_rap_20_20.txt').read_text().splitlines()
    published = dict(line.split('\t') for line in lines)
    own = {key: str(list(value.shape)) for key, value in net.state_dict().items()}
    assert len(own) == 680 and own == published
    images = torch.rand(1, 3, 16, 32)
    assert torch.equal(net(images), net(images, 1)) and not torch.equal(net(images), net(images, 0))
    other = mdil.published.Net([20, 27], 2)
    other.load_state_dict(checkpoint.read(file)['state_dict'])
    assert torch.allclose(other.eval()(images), mdil.load(file, device='cpu').single('cityscapes')(images), atol=1e-5)
    assert mdil.published.Net(20).num_classes == [20]
    for numbers in (([20], 2), ([20, 20], 2, 2), (20, 2)):
        with pytest.raises(ValueError, match='contradict'):
            mdil.published.Net(*numbers)


def test_hub_loads_without_an_installation(file, tmp_path):
    code = (f'import torch; net = torch.hub.load({str(ROOT)!r}, "load", {str(file)!r}, device="cpu", source="local"); '
            'import mdil; mdil.load; print(net.domains)')
    done = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == f'{NAMES}\n', done.stderr
