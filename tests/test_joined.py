"""Steps of train.py and branches: learnt apart and joined equals learnt one after another; what a step leaves of the old."""
import json

import pytest
import torch

from mdil import train
from mdil.evaluation import branches as tool, repair, verify
from mdil.models import METHODS, checkpoint, unchanged
from mdil.training.options import parse_train
from mdil.training.run import BEST, LATEST
from mdil.utils.errors import UserError
from tests.conftest import shallow_erfnet

FROZEN = [name for name, row in METHODS.items() if row.shared == 'frozen']
SLOWED = [name for name, row in METHODS.items() if not (row.joint or row.one_domain) and name not in FROZEN]
STEPS = {**dict.fromkeys(FROZEN, ()), **dict.fromkeys(SLOWED, ('--shared-lr', '0'))}
SMALL = ['--height', '32', '--batch-size', '2', '--num-epochs', '1', '--limit-batches', '1', '--num-workers', '0',
         '--class-weights', 'none', '--device', 'cpu']


def learn(toy, folder, domains, *arguments):
    """The folder of a run of train.py."""
    train.main(['--domains', *domains, '--data-root', str(toy), '--savedir', str(folder), *SMALL, *map(str, arguments)])
    return folder


@pytest.fixture(scope='module')
def base(toy, tmp_path_factory):
    """A run of `mdil` that learnt Cityscapes first."""
    return learn(toy, tmp_path_factory.mktemp('base'), ['CS'])


@pytest.fixture(scope='module')
def shallow_bases(toy, tmp_path_factory):
    """{method: run of a shallow ERFNet that learnt Cityscapes first}, one run for all methods of one network."""
    made, found = {}, {}
    for name, row in METHODS.items():
        kind = row.adapter, row.domain_bn
        if not row.one_domain and not row.joint:
            if kind not in made:
                with shallow_erfnet():
                    made[kind] = learn(toy, tmp_path_factory.mktemp('base'), ['CS'], '--method', name)
            found[name] = made[kind]
    return found


def tensors(path):
    return checkpoint.read(path)['state_dict']


@pytest.mark.usefixtures('shallow')
@pytest.mark.parametrize('method', STEPS)
def test_branches_learnt_apart_and_joined_equal_the_steps_one_after_another(toy, shallow_bases, tmp_path, method):
    base, given = shallow_bases[method] / LATEST, ('--method', method, *STEPS[method])
    for domain in ('BDD', 'IDD'):
        run = learn(toy, tmp_path / domain, ['CS', domain], '--state', base, *given)
        tool.main(['extract', str(run / LATEST), '--domain', domain, '--out', str(tmp_path / f'{domain}.branch')])
    tool.main(['add', str(base), str(tmp_path / 'BDD.branch'), str(tmp_path / 'IDD.branch'), '--out', str(tmp_path / 'joined')])
    after = learn(toy, tmp_path / 'after', ['CS', 'BDD', 'IDD'], '--state', tmp_path / 'BDD' / LATEST, '--branch-from', 'CS', *given)
    one, other = tensors(after / LATEST), tensors(tmp_path / 'joined')
    assert one.keys() == other.keys() and not [key for key in one if not torch.equal(one[key], other[key])]
    assert verify.main([str(base), str(tmp_path / 'joined')]) == 0


@pytest.mark.usefixtures('shallow')
def test_a_branch_that_starts_from_the_domain_before_it_is_another_one(toy, shallow_bases, tmp_path):
    """What --branch-from is for."""
    given = '--method', 'adapters-only'
    two = learn(toy, tmp_path / '2', ['CS', 'BDD'], '--state', shallow_bases['adapters-only'] / LATEST, *given)
    one, other = (tensors(learn(toy, tmp_path / name, ['CS', 'BDD', 'IDD'], '--state', two / LATEST, *given, *more) / LATEST)
                  for name, more in (('last', ()), ('first', ('--branch-from', 'cityscapes'))))
    moved = [key for key in one if not torch.equal(one[key], other[key])]
    assert moved and all('.2.' in key for key in moved)


@pytest.mark.parametrize('domains, method', [(['CS', 'BDD'], 'mdil'), (['CS'], 'mdil'), (['CS', 'IDD'], 'multi-task')])
def test_a_branch_starts_from_a_domain_that_is_known(domains, method):
    source = 'BDD' if method == 'mdil' else 'CS'
    with pytest.raises(UserError, match='--branch-from .* is not a domain that was trained before'):
        parse_train(['--domains', *domains, '--state', 'x', '--savedir', 'x', '--method', method, '--branch-from', source])


@pytest.mark.parametrize('arguments, moved', [
    (('--method', 'adapters-only'), '278 weight tensors and 117 buffers equal'),
    (('--recipe', 'released'), '117 buffers of 39 batch norms, 110 of 278 weight tensors changed'),
    (('--recipe', 'released', '--shared-lr', '0'), '117 buffers of 39 batch norms, 0 of 278 weight tensors changed')])
def test_a_step_says_what_it_left_of_the_old_domains(toy, base, tmp_path, capsys, arguments, moved):
    run = learn(toy, tmp_path / 'run', ['CS', 'BDD'], '--state', base / LATEST, *arguments)
    assert f'old domain cityscapes: {moved}' in capsys.readouterr().out
    record = json.loads((run / unchanged.NAME).read_text())
    assert record['after'] == {'cityscapes': moved} and record['domains'] == ['cityscapes']
    assert len(record['tensors']) == 278 + 117
    status = 0 if 'equal' in moved else 1
    found = tmp_path / 'found.json'
    for files in ([run / LATEST], [run / BEST], [base / LATEST, run / LATEST]):
        assert verify.main([*map(str, files), '--json', str(found)]) == status
        assert moved in capsys.readouterr().out
        entry = json.loads(found.read_text())['domains']['cityscapes']
        assert entry['unchanged'] is (status == 0)
        assert entry['logits'] is None if len(files) == 1 else (entry['logits'] == 0) is (status == 0)


@pytest.mark.parametrize('arguments, what, status', [
    (('--shared-lr', '0'), 'statistics', 0), ((), 'statistics', 1), ((), 'branch', 1)])
def test_what_a_released_step_overwrote_is_put_back(toy, base, tmp_path, capsys, arguments, what, status):
    """Where nothing else moved, the old domain is what it was; the shared weights are left as they are."""
    start, step = base / LATEST, tmp_path / 'run'
    learn(toy, step, ['CS', 'BDD'], '--state', start, '--recipe', 'released', *arguments)
    repair.main(list(map(str, [start, step / LATEST, '--out', tmp_path / 'out', '--what', what, '--data-root', toy,
                               '--height', '32', '--device', 'cpu', '--num-workers', '0'])))
    out = capsys.readouterr().out
    assert 'cityscapes: 117 tensors restored' in out and 'mIoU before' in out and '+0.00' in out.splitlines()[-1]
    assert verify.main([str(start), str(tmp_path / 'out')]) == status
    assert ('equal' if status == 0 else 'changed; 110 of 278 weight tensors changed') in capsys.readouterr().out
    before, after = tensors(step / LATEST), tensors(tmp_path / 'out')
    assert all('.0.' in key for key in before if not torch.equal(before[key], after[key]))


def test_the_record_outlives_a_resumed_run_and_goes_with_the_result(toy, base, tmp_path):
    given = ['CS', 'BDD'], '--state', base / LATEST, '--recipe', 'released', '--num-epochs', '2'
    run = learn(toy, tmp_path / 'run', *given)
    record = (run / unchanged.NAME).read_text()
    content = checkpoint.read(run / LATEST)
    assert verify.main([str(run / LATEST)]) == 1
    content['epoch'] = content['scheduler']['last_epoch'] = 1       # as if it had stopped after the first epoch
    for group, rate in zip(content['optimizer']['param_groups'], content['scheduler']['base_lrs']):
        group['lr'] = rate * 0.5 ** 0.9
    content['scheduler']['_last_lr'] = [group['lr'] for group in content['optimizer']['param_groups']]
    checkpoint.save(content, run / LATEST)
    learn(toy, run, *given, '--resume')
    assert json.loads((run / unchanged.NAME).read_text())['tensors'] == json.loads(record)['tensors']
    learn(toy, run, ['CS'], '--overwrite')
    assert not (run / unchanged.NAME).exists()


def test_a_checkpoint_says_the_classes_of_its_domains(base):
    entry, = checkpoint.read(base / LATEST)['domains']
    assert entry['name'] == 'cityscapes' and entry['classes'] == 20
    assert entry['class_names'][0] == 'road' and entry['colors'][0] == [128, 64, 128] and len(entry['colors']) == 19
