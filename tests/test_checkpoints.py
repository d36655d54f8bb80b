"""Files: the published layouts in, the published layouts out, nothing unsafe, nothing silent."""
import json
import os
import pickle
from collections import OrderedDict
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mdil import eval as evaluation
from mdil.datasets import get_domain
from mdil.evaluation import export
from mdil.models import build_model, checkpoint
from mdil.models.branches import LoadedCheckpoint
from mdil.models.layouts import published_keys, recognise
from mdil.training import building, resume
from mdil.utils.errors import UserError
from mdil.utils.files import write_atomically
from tests.fill import fill

CS, BDD, IDD = (get_domain(name) for name in ('CS', 'BDD', 'IDD'))
# Layout of a published file: method, class counts, multi-task keys.
PUBLISHED = {'ours-2': ('mdil', [20, 20], False), 'ours-3': ('mdil', [20, 20, 27], False),
             'ours-1': ('mdil', [20], False), 'fine-tune-2': ('fine-tune', [20, 20], False),
             'fine-tune-3': ('fine-tune', [20, 20, 27], False), 'single-task': ('single-task', [27], False),
             'multi-task': ('multi-task', [20, 20, 27], True)}


def published_file(path, state, prefix=True, **save):
    """A file as the published code wrote it, best_acc a numpy scalar."""
    state = OrderedDict((key if prefix else key.removeprefix('module.'), value) for key, value in state.items())
    torch.save({'epoch': 150, 'arch': 'ERFNet(...)', 'state_dict': state, 'best_acc': np.float64(59.2),
                'optimizer': {'state': {}, 'param_groups': []}}, path, **save)
    return path


def encoder_file(path):
    """An ImageNet encoder: plain encoder under features, a classifier that is of no use."""
    plain = published_keys(fill(build_model([20], 'single-task')).state_dict(), [20], None)
    state = {key.replace('module.', 'module.features.'): value for key, value in plain.items() if '.encoder.' in key}
    state['module.classifier.linear.weight'] = torch.zeros(1000, 128)
    return published_file(path, state)


@pytest.mark.parametrize('layout, form', [*((layout, 'module') for layout in PUBLISHED), ('ours-2', 'bare'),
                                          ('fine-tune-3', 'bare'), ('ours-2', 'old format'), ('fine-tune-3', 'old format')])
def test_published_files_load(tmp_path, layout, form):
    method, classes, multi = PUBLISHED[layout]
    model = fill(build_model(classes, method)).eval()
    keys = published_keys(model.state_dict(), classes, 'parallel' if method == 'mdil' else None, multi)
    path = published_file(tmp_path / 'x.pth.tar', keys, prefix=form == 'module',
                          _use_new_zipfile_serialization=form != 'old format')
    read = checkpoint.read_checkpoint(path)
    assert read.domains is None and read.layout.num_classes == classes
    loaded = checkpoint.load_network(read, method).eval()
    images = torch.rand(1, 3, 16, 32)
    with torch.no_grad():
        for domain in range(len(classes)):
            assert torch.equal(loaded(images, domain), model(images, domain))


FOREIGN = {'model': lambda state: {'model': state, 'epoch': 'last'}, 'model_state_dict': lambda state: {'model_state_dict': state},
           'name and network': lambda state: {'model': 'erfnet', 'network': state}, 'net': lambda state: {'net': state},
           'twice': lambda state: {'state_dict': state, 'ema': state, 'model': state}}
WRAPPERS = {'compiled': '_orig_mod.{}', 'twice parallel': 'module.module.{}', 'compiled and parallel': 'module._orig_mod.{}',
            'parallel and compiled': '_orig_mod.module.{}', 'an attribute': 'model.{}', 'all': 'model.module._orig_mod.{}'}


def same(state, other):
    return state.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in state.items())


def test_files_of_others_load(tmp_path):
    state = build_model([4, 5]).state_dict()
    for form, wrapped in FOREIGN.items():
        torch.save(wrapped(state), tmp_path / 'x')
        assert same(checkpoint.read_checkpoint(tmp_path / 'x').layout.state, state), form


def test_names_of_wrapped_networks_are_recognised():
    state = build_model([4, 5]).state_dict()
    for form, name in WRAPPERS.items():
        assert same(recognise({name.format(key): value for key, value in state.items()}, form).state, state), form
    part = {key.replace('encoder.', 'encoder._orig_mod.'): value for key, value in state.items()}
    assert same(recognise(part, 'a compiled part').state, state)


def test_two_files_in_one_are_refused(tmp_path):
    """The end of the file describes the second, torch loads the first."""
    for name, value in (('a', 1.0), ('b', 2.0)):
        torch.save({'state_dict': {'x': torch.full((9,), value)}}, tmp_path / 'one')
        (tmp_path / 'one').rename(tmp_path / name)
    glued = tmp_path / 'glued'
    glued.write_bytes((tmp_path / 'a').read_bytes() + (tmp_path / 'b').read_bytes())
    assert torch.load(glued, weights_only=True)['state_dict']['x'][0] == 1
    with pytest.raises(UserError, match='two files in one|Corrupt zip64'):      # Python 3.14 notices by itself
        checkpoint.read(glued)


def test_best_acc_may_be_a_tensor_or_a_numpy_scalar(tmp_path):
    state = build_model([4]).state_dict()
    for best in (np.float64(3), np.float32(3), torch.tensor(3.0), 3.0):
        torch.save({'state_dict': state, 'best_acc': best}, tmp_path / 'x')
        assert float(checkpoint.read(tmp_path / 'x')['best_acc']) == 3


def options(path, domains, **changes):
    return SimpleNamespace(**{'method': 'mdil', 'network': None, 'weights': None, 'recipe': 'corrected', 'state': str(path), 'imagenet_bn': 'loaded', 'new_statistics': 'copied', 'new_decoder': 'copied',
                              'seed': 0, 'branch_from': None, 'domains': [d.name for d in domains], 'lambdac': 0.1, 'shared_lr': 5e-6, 'old_bn': 'frozen',
                              **changes})


@pytest.mark.parametrize('taken', ['loaded', 'dropped'])
def test_imagenet_encoder_starts_step_one(tmp_path, taken):
    path = encoder_file(tmp_path / 'encoder.pth.tar')
    student, teacher, lines, _ = building.build_networks(options(path, [CS], imagenet_bn=taken), [CS])
    assert teacher is None and len(lines.splitlines()) == 3 and 'classifier' in lines
    source = fill(build_model([20], 'single-task')).state_dict()
    for name, value in student.state_dict().items():
        if name.startswith('encoder.') and '_conv_' not in name and not name.endswith('num_batches_tracked'):
            assert torch.equal(value, source[name]) == (taken == 'loaded' or '.bn' not in name), name


def test_imagenet_encoder_starts_multi_task_with_shared_batch_norms(tmp_path):
    path = encoder_file(tmp_path / 'encoder.pth.tar')
    student, _, lines, _ = building.build_networks(options(path, [CS, IDD], method='multi-task'), [CS, IDD])
    assert '268 tensors loaded' in lines or 'tensors loaded' in lines
    assert student.num_classes == [20, 27]


def test_step_two_from_a_published_file_has_its_teacher(tmp_path):
    model = fill(build_model([20, 20]))
    path = published_file(tmp_path / 'x', published_keys(model.state_dict(), [20, 20], 'parallel'))
    student, teacher, lines, _ = building.build_networks(options(path, [CS, BDD, IDD]), [CS, BDD, IDD])
    assert student.num_classes == [20, 20, 27] and teacher.num_classes == [20, 20]
    assert 'not in the file: 2 tensors of the network, which start from initial values' in lines


@pytest.mark.parametrize('change, message', [
    (lambda s: s.pop('encoder.layers.3.conv3x1_1.weight'), 'encoder.layers.3.conv3x1_1.weight is missing'),
    (lambda s: s.update({'encoder.layers.3.conv3x1_1.weight': torch.zeros(3)}), 'has the wrong shape'),
    (lambda s: s.update({'backbone.weight': torch.zeros(3)}), 'backbone.weight is surplus'),
    (lambda s: s['decoder.0.output_conv.weight'].fill_(float('nan')), 'not finite')])
def test_a_file_that_does_not_fit_is_refused(tmp_path, change, message):
    state = build_model([4, 5]).state_dict()
    change(state)
    torch.save({'state_dict': state}, tmp_path / 'x')
    with pytest.raises(UserError, match=message):
        checkpoint.load_network(checkpoint.read_checkpoint(tmp_path / 'x'), 'mdil')


def test_other_methods_and_other_domains_are_refused(tmp_path):
    torch.save({'state_dict': build_model([20], 'fine-tune').state_dict()}, tmp_path / 'plain')
    plain = checkpoint.read_checkpoint(tmp_path / 'plain')
    with pytest.raises(UserError, match='no adapters.*not a network of --method mdil but of .*fine-tune'):
        checkpoint.load_network(plain, 'mdil')
    with pytest.raises(UserError, match='20 classes.*IDD need 27 classes, void included; name its domains in its order'):
        checkpoint.check_known(plain, [IDD])
    plain.domains = ['cityscapes']
    with pytest.raises(UserError, match='knows cityscapes, but should know BDD; name its domains in its order'):
        checkpoint.check_known(plain, [BDD])
    with pytest.raises(UserError, match='is a folder; name a file in it, such as model_best.pth.tar'):
        checkpoint.read(tmp_path)
    torch.save({'weights': torch.zeros(3)}, tmp_path / 'other')
    with pytest.raises(UserError, match="no ERFNet in it; the first of its 1 tensors is 'weights'"):
        checkpoint.read_checkpoint(tmp_path / 'other')


def own_domain(folder, *names):
    """A user's own domain with classes of these names."""
    folder.mkdir(exist_ok=True)
    (folder / 'domain.json').write_text(json.dumps({'images': '{split}', 'labels': '{split}annot', 'classes': [
        {'name': name, 'color': [0, 0, 0]} for name in names]}))
    return get_domain('own', {'own': folder})


def test_other_classes_of_the_same_number_are_refused_by_name(tmp_path):
    learnt, other = own_domain(tmp_path / 'a', 'road', 'car'), own_domain(tmp_path / 'b', 'road', 'sky')
    content = {'version': 1, 'state_dict': build_model([3]).state_dict(), 'domains': [learnt.entry], 'method': 'mdil'}
    checkpoint.save(content, tmp_path / 'x')
    checkpoint.check_known(checkpoint.read_checkpoint(tmp_path / 'x'), [learnt])
    for act in (lambda: checkpoint.check_known(checkpoint.read_checkpoint(tmp_path / 'x'), [other]),
                lambda: building.build_networks(options(tmp_path / 'x', [other, CS]), [other, CS]),
                lambda: evaluation.main(['--state', str(tmp_path / 'x'), '--data', f'own={tmp_path / "b"}'])):
        with pytest.raises(UserError, match="was trained on own with 'car' as class 1, which is 'sky' here"):
            act()
    del content['domains'][0]['class_names']        # a file of before they were kept
    checkpoint.save(content, tmp_path / 'x')
    checkpoint.check_known(checkpoint.read_checkpoint(tmp_path / 'x'), [other])


def test_domains_that_contradict_the_file_are_refused(tmp_path):
    checkpoint.save({'version': 1, 'state_dict': build_model([20, 20]).state_dict(), 'method': 'mdil',
                     'domains': [CS.entry, BDD.entry]}, tmp_path / 'x')
    with pytest.raises(UserError, match='--domains BDD cityscapes contradicts .*x, which knows cityscapes BDD'):
        evaluation.main(['--state', str(tmp_path / 'x'), '--device', 'cpu', '--domains', 'BDD', 'CS'])
    for names in (['CS'], ['CS', 'BDD', 'IDD'], ['CS', 'camvid']):
        with pytest.raises(UserError, match='contradicts'):
            checkpoint.check_stated(names, ['cityscapes', 'BDD'], 'x')
    for names in (None, ['city', 'bdd100k']):
        checkpoint.check_stated(names, ['cityscapes', 'BDD'], 'x')


class Attack:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_file_that_would_run_code_is_refused_naming_the_global(tmp_path):
    victim = tmp_path / 'made'
    torch.save({'state_dict': {}, 'x': Attack(str(victim))}, tmp_path / 'zip')
    (tmp_path / 'raw').write_bytes(pickle.dumps(Attack(str(victim)), protocol=2))
    for name in ('zip', 'raw'):
        with pytest.raises(UserError, match='posix.mkdir'):
            checkpoint.read(tmp_path / name)
    assert not victim.exists()


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / 'x'
    checkpoint.save({'a': 1}, path)

    def fail(file):
        file.write(b'half')
        raise OSError('disk full')
    with pytest.raises(UserError, match='disk full'):
        write_atomically(path, fail)
    assert checkpoint.read(path) == {'a': 1} and os.listdir(tmp_path) == ['x']


@pytest.mark.parametrize('content', [b'', b'PK\x03\x04', b'hello', b'\x80\x02}q\x00.'])
def test_broken_files_give_one_line(tmp_path, content):
    (tmp_path / 'x').write_bytes(content)
    with pytest.raises(UserError) as error:
        checkpoint.read_checkpoint(tmp_path / 'x')
    assert '\n' not in str(error.value) and str(tmp_path / 'x') in str(error.value)


@pytest.mark.parametrize('layout', ['ours-3', 'fine-tune-2', 'fine-tune-3', 'single-task', 'multi-task'])
def test_export_writes_the_published_layout(tmp_path, layout):
    method, classes, multi = PUBLISHED[layout]
    model = fill(build_model(classes, method))
    names = [{'name': f'd{n}', 'classes': count} for n, count in enumerate(classes)]
    checkpoint.save({'version': 1, 'epoch': 3, 'state_dict': model.state_dict(), 'domains': names, 'method': method,
                     'best_acc': 1.0}, tmp_path / 'mdil')
    export.main([str(tmp_path / 'mdil'), str(tmp_path / 'out')])
    want = published_keys(model.state_dict(), classes, 'parallel' if method == 'mdil' else None, multi)
    got = checkpoint.read(tmp_path / 'out')['state_dict']
    assert got.keys() == want.keys() and all(torch.equal(got[key], want[key]) for key in want)
    heads = {key.split('.')[1] for key in got if key.startswith('module.decoder')}
    assert heads == ({'decoder'} if method in ('mdil', 'multi-task', 'single-task') else
                     {'decoder_old', 'decoder_new'} if len(classes) == 2 else
                     {'decoder_old1', 'decoder_old2', 'decoder_new'})


@pytest.mark.parametrize('layout, given', [('ours-2', None), ('fine-tune-2', None), ('multi-task', 'multi-task')])
def test_files_without_a_method_are_written_with_the_one_that_they_hold(tmp_path, layout, given):
    """Not with the default method, whose network they may not be."""
    method, classes, multi = PUBLISHED[layout]
    keys = published_keys(fill(build_model(classes, method)).state_dict(), classes,
                          'parallel' if method == 'mdil' else None, multi)
    path = published_file(tmp_path / 'x', keys)
    known = LoadedCheckpoint(path, ['cityscapes', 'BDD', 'IDD'][:len(classes)], given)
    checkpoint.save(known.content(), tmp_path / 'named')
    read = checkpoint.read_checkpoint(tmp_path / 'named')
    assert read.method == method
    checkpoint.load_network(read)
    export.main([str(path), str(tmp_path / 'out'), *(['--method', given] if given else [])])
    assert checkpoint.read(tmp_path / 'out')['state_dict'].keys() == keys.keys()


def test_odd_entries_of_foreign_files_do_not_matter(tmp_path):
    model = fill(build_model([20], 'single-task'))
    torch.save({'state_dict': model.state_dict(), 'epoch': None, 'best_acc': 'good', 'options': [3]}, tmp_path / 'x')
    export.main([str(tmp_path / 'x'), str(tmp_path / 'out')])
    assert checkpoint.read(tmp_path / 'out')['epoch'] == 0


@pytest.mark.parametrize('planned', [2, 'three', [3]])
def test_a_file_after_more_epochs_than_it_plans_is_refused(tmp_path, planned):
    content = {'version': 1, 'epoch': 3, 'state_dict': build_model([20], 'single-task').state_dict(),
               'domains': [{'name': 'cityscapes', 'classes': 20}], 'method': 'single-task'}
    for options in ({}, {'num_epochs': 3}, {'num_epochs': None}):
        checkpoint.save({**content, 'options': options}, tmp_path / 'x')
        checkpoint.read_checkpoint(tmp_path / 'x')
    checkpoint.save({**content, 'options': {'num_epochs': planned}}, tmp_path / 'x')
    with pytest.raises(UserError, match='says 3 epochs are done of'):
        checkpoint.read_checkpoint(tmp_path / 'x')


def test_export_refuses_what_the_published_code_lacks(tmp_path):
    checkpoint.save({'state_dict': build_model([4, 4], 'domain-bn').state_dict(), 'method': 'domain-bn'}, tmp_path / 'x')
    with pytest.raises(UserError, match='no network of --method domain-bn'):
        export.main([str(tmp_path / 'x'), str(tmp_path / 'out')])


def test_files_that_say_ours_are_of_mdil_and_their_runs_go_on(tmp_path):
    model = fill(build_model([20]))
    checkpoint.save({'version': 1, 'state_dict': model.state_dict(), 'domains': [{'name': 'cityscapes', 'classes': 20}],
                     'method': 'ours'}, tmp_path / 'x')
    assert checkpoint.read_checkpoint(tmp_path / 'x').method == 'mdil'
    assert resume.differences({'method': 'ours'}, SimpleNamespace(method='mdil')) == ([], [])
    assert resume.differences({'method': 'ours'}, SimpleNamespace(method='lwf'))[0]


@pytest.mark.parametrize('colors', [7, [[1, 2, 3]], [], ['red', 'blue'], [[1, 2], [3, 4]], [[1, 2, 256], [1, 2, 3]]])
def test_colours_that_are_none_are_refused(tmp_path, colors):
    entry = own_domain(tmp_path / 'a', 'road', 'car').entry
    content = {'version': 1, 'state_dict': build_model([3]).state_dict(), 'domains': [entry], 'method': 'mdil'}
    checkpoint.save(content, tmp_path / 'x')
    assert checkpoint.read_checkpoint(tmp_path / 'x').domains == ['own']
    checkpoint.save({**content, 'domains': [{**entry, 'colors': colors}]}, tmp_path / 'x')
    with pytest.raises(UserError, match='domains'):
        checkpoint.read_checkpoint(tmp_path / 'x')
