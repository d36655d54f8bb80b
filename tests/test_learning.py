"""mdil.learn: from folders and from lists of pairs, in a thread, what it leaves and what it refuses."""
import json
import os
import random
import signal
import threading

import numpy as np
import pytest
import torch
from PIL import Image

import mdil
from mdil.datasets import get_domain
from mdil.datasets.pairs import find_split
from mdil.learning import kept_random
from mdil.models import checkpoint
from mdil.utils.files import new_folder

pytestmark = pytest.mark.usefixtures('shallow_module')

TINY = {'height': 16, 'width': 32, 'batch_size': 4, 'num_workers': 0, 'device': 'cpu', 'num_epochs': 1}


def pairs_of(toy, name, split):
    """[(image, label)] of a toy domain."""
    return [(pair.image, str(pair.label)) for pair in find_split(get_domain(name), toy, split).pairs]


@pytest.fixture(scope='module')
def village(tmp_path_factory):
    """Pairs of a domain of one's own, whose names have blanks; labels 0, 1 and 255."""
    folder, found = tmp_path_factory.mktemp('village green'), []
    for number in range(4):
        labels = np.resize(np.uint8([0, 1, 255]), (16, 32))
        for name, content in (('image', np.uint8(200 * (labels == 1))), ('label', labels)):
            Image.fromarray(content).save(folder / f'{name} {number}.png')
        found.append((folder / f'image {number}.png', folder / f'label {number}.png'))
    return found


@pytest.fixture(scope='module')
def learnt(toy, tmp_path_factory):
    """The Record of Cityscapes learnt from pairs in a thread, what on_epoch got, and signal handlers seen there."""
    folder, seen, handlers, records = tmp_path_factory.mktemp('learnt') / 'run', [], [], []

    def on_epoch(line):
        seen.append(line)
        handlers.append(signal.getsignal(signal.SIGINT))

    def work():
        records.append(mdil.learn('CS', pairs_of(toy, 'cityscapes', 'train'), pairs_of(toy, 'cityscapes', 'val')[:2],
                                  savedir=folder, on_epoch=on_epoch, **{**TINY, 'num_epochs': 2}))
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return records[0], seen, handlers


def test_a_refused_call_leaves_no_folder_and_the_program_alive(toy, tmp_path):
    for options in ({'help': True}, {'data_root': tmp_path / 'nowhere'}, {'data_root': toy, 'num_epochs': 0},
                    {'data_root': toy, 'state': tmp_path / 'nothing'}):
        with pytest.raises(mdil.UserError):
            mdil.learn('cityscapes', savedir=tmp_path / 'runs/1', **{**TINY, **options})
        assert not (tmp_path / 'runs').exists()
    with pytest.raises(mdil.UserError, match='savedir is empty, or holds a null character'):
        mdil.learn('cityscapes', savedir='x\0y', data_root=toy)
    (tmp_path / 'mine').mkdir()
    with pytest.raises(mdil.UserError):
        mdil.learn('cityscapes', savedir=tmp_path / 'mine/1', data_root=tmp_path / 'nowhere', **TINY)
    assert list((tmp_path / 'mine').iterdir()) == []


def test_a_folder_that_another_run_makes_is_left_to_it(tmp_path, monkeypatch):
    make = os.mkdir

    def late(path, *mode):
        make(path, *mode)
        if str(path).endswith('run'):
            raise FileExistsError
    monkeypatch.setattr(os, 'mkdir', late)
    with pytest.raises(mdil.UserError), new_folder('--savedir', tmp_path / 'runs/run'):
        raise mdil.UserError('refused')
    assert (tmp_path / 'runs/run').is_dir()


def test_a_thread_learns_from_pairs_and_says_how_it_goes(learnt):
    record, seen, handlers = learnt
    assert [line['epoch'] for line in seen] == [1, 2] and list(record.epochs) == seen
    assert handlers == [signal.default_int_handler] * 2
    assert record.miou == max(line['val']['cityscapes']['miou'] for line in seen) and record.trained == ('cityscapes',)
    options = checkpoint.read(record.latest)['options']
    assert options['height'] == 16 and len((record.folder / 'CS.val.txt').read_text().splitlines()) == 2


def test_pairs_and_folders_give_the_same_network(learnt, toy, tmp_path):
    record = mdil.learn('cityscapes', savedir=tmp_path, data_root=toy, **{**TINY, 'num_epochs': 2})
    states = [checkpoint.read(each.latest)['state_dict'] for each in (record, learnt[0])]
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    assert record.epochs[0]['train']['loss'] == learnt[0].epochs[0]['train']['loss']


def test_a_domain_of_ones_own_is_learnt_after_another_and_loaded(learnt, village, tmp_path):
    random.seed(1)
    before = random.getstate(), torch.get_rng_state(), np.random.get_state()[1].copy()
    record = mdil.learn('village', village, village[:1], classes=['mud', 'hut'], state=learnt[0].best,
                        savedir=tmp_path / '2', data={'cityscapes': learnt[0].folder / 'CS.json'}, **TINY)
    assert random.getstate() == before[0] and torch.equal(torch.get_rng_state(), before[1])
    assert (np.random.get_state()[1] == before[2]).all()
    net = mdil.load(record.best, device='cpu')
    assert net.domains == ['cityscapes', 'village'] and net.classes('village') == ['mud', 'hut']
    assert net.predict(village[0][0], 'village').shares.keys() <= {'mud', 'hut'}
    assert net.evaluate('village', village[:1])['miou'] == record.miou
    assert record.trained == ('village',) and record.epochs[0]['val'].keys() == {'cityscapes', 'village'}


def test_a_step_after_someone_elses_domain_needs_its_file_alone(village, toy, tmp_path, capsys):
    first = mdil.learn('village', village, village[:1], classes={'mud': (1, 2, 3), 'hut': (4, 5, 6)}, savedir=tmp_path / '1', **TINY)
    step = lambda **options: mdil.learn(
        'IDD', pairs_of(toy, 'IDD', 'train'), pairs_of(toy, 'IDD', 'val')[:1], state=first.best,
        savedir=tmp_path / '2', **{**TINY, 'num_epochs': 2, 'domains': ['village', 'IDD'], **options})
    with pytest.raises(mdil.UserError, match='knows village, not Village; name its domains in its order'):
        step(domains=['Village', 'IDD'])
    with pytest.raises(ZeroDivisionError):
        step(on_epoch=lambda line: 1 / 0)
    first.best.unlink()
    second = step(resume=True)         # the checkpoint itself describes it, too
    assert second.trained == ('IDD',) and [line['val'].keys() for line in second.epochs] == [{'IDD'}] * 2
    assert capsys.readouterr().err.count('village is not validated: the images of village are not declared here; pass --data') == 2
    entries = [checkpoint.read(record.latest)['domains'][0] for record in (first, second)]
    assert entries[0] == entries[1] and entries[0]['class_names'] == ['mud', 'hut']


def test_a_run_that_on_epoch_ends_goes_on(village, tmp_path):
    class Enough(Exception):
        pass

    def stop(line):
        raise Enough
    options = {**TINY, 'num_epochs': 2, 'savedir': tmp_path / 'run', 'classes': {'mud': (1, 2, 3), 'hut': (4, 5, 6)}}
    with pytest.raises(Enough):
        mdil.learn('village', village, village[:1], on_epoch=stop, **options)
    before = (tmp_path / 'run/village.train.txt').read_bytes()
    with pytest.raises(mdil.UserError, match='holds a result'):
        mdil.learn('village', village[:2], village[:1], **options)
    assert (tmp_path / 'run/village.train.txt').read_bytes() == before
    with pytest.raises(mdil.UserError, match='village.train.txt exists with other pairs'):
        mdil.learn('village', village[:2], village[:1], resume=True, **options)
    record = mdil.learn('village', village, village[:1], resume=True, **options)
    assert [line['epoch'] for line in record.epochs] == [1, 2]
    assert (record.best.name, record.latest.name) == ('model_best.pth.tar', 'checkpoint.pth.tar')
    assert json.loads((tmp_path / 'run/village.json').read_text())['classes'][1] == {'name': 'hut', 'color': [4, 5, 6]}


@pytest.mark.parametrize('arguments, says', [
    ({'domain': 'village'}, 'unknown domain'), ({'domain': 'village', 'train': [('a', 'b')]}, 'pass classes'),
    ({'domain': 'CS', 'train': [('a', 'b')], 'classes': ['mud']}, 'leave out classes'),
    ({'domain': 'CS', 'val': [('a', 'b')]}, 'need train'),
    *[({'domain': name, 'train': [], 'classes': ['mud']}, 'cannot be the name of a domain') for name in ('a/b', 'a=b', '--x', ' ', 'x' * 300, 'a\u00a0b', 'a\nb', '..', 'opts')],
    ({'domain': 'village', 'train': [('a', 'b')], 'classes': {'mud', 'hut'}}, 'give a list of names'),
    ({'domain': 'village', 'train': [('a', 'b')], 'classes': ['mud', 'hut', 'mud']}, "two classes are called 'mud'"),
    ({'domain': 'CS', 'train': ['a.png']}, 'is not a pair'), ({'domain': 'CS', 'train': [('a\nb', 'c')]}, 'rename'),
    ({'domain': 'CS', 'train': [('none.png', 'none.png')]}, 'is not a file'),
    ({'domain': 'CS', 'colour': 3}, 'arguments: colour=3'), ({'domain': 'CS', 'num_epochs': 0}, 'not at least 1'),
    ({'domain': 'CS', 'state': 'none.pth'}, 'does not exist')])
def test_what_does_not_fit_is_said(arguments, says, tmp_path):
    with pytest.raises(mdil.UserError, match=says):
        mdil.learn(savedir=tmp_path / 'run', **{**TINY, **arguments})
    assert not list(tmp_path.rglob('*.txt')) + list(tmp_path.rglob('*.json'))


@pytest.mark.parametrize('arguments', [{'domain': 5}, {'train': 5}, {'savedir': None}, {'state': 5}, {'on_epoch': 3},
                                       {'domains': 'CS'}, {'data': 'x'}])
def test_other_types_are_refused_at_the_door(arguments, tmp_path):
    with pytest.raises(TypeError, match=f'{next(iter(arguments))}: .* is expected, not a'):
        mdil.learn(**{'domain': 'CS', 'savedir': tmp_path, **TINY, **arguments})


def test_a_file_in_the_place_of_savedir_is_said(village, tmp_path):
    (tmp_path / 'run').touch()
    with pytest.raises(mdil.UserError, match='^savedir .*run cannot be written to'):
        mdil.learn('village', village, village[:1], classes=['mud', 'hut'], savedir=tmp_path / 'run', **TINY)


def test_a_signal_stops_the_run_and_not_the_program(village, tmp_path):
    options = {**TINY, 'num_epochs': 2, 'savedir': tmp_path, 'classes': ['mud', 'hut']}
    with pytest.raises(KeyboardInterrupt, match='stopped the run; resume=True continues from what is saved'):
        mdil.learn('village', village, village[:1], on_epoch=lambda line: os.kill(os.getpid(), signal.SIGTERM), **options)
    record = mdil.learn('village', village, village[:1], resume=True, **options)
    assert [line['epoch'] for line in record.epochs] == [1, 2]


def test_the_random_states_of_several_gpus_are_kept_without_a_warning(monkeypatch, recwarn):
    kept = []
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    monkeypatch.setattr(torch.cuda, 'get_rng_state', lambda device: device)
    monkeypatch.setattr(torch.cuda, 'set_rng_state', lambda *state: kept.append(state))
    monkeypatch.setattr(torch.random, '_fork_rng_warned_already', False)
    with kept_random():
        pass
    assert kept == [(0, 0), (1, 1)] and not recwarn.list


def test_a_json_file_gives_a_built_in_domain_lists_alone(tmp_path):
    (tmp_path / 'a.json').write_text('{"train": "a.txt", "classes": []}')
    with pytest.raises(mdil.UserError, match='built in, so its entries are lists'):
        get_domain('CS', {'CS': tmp_path / 'a.json'})
