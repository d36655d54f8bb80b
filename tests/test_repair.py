"""repair: every old domain gets back what it had when it was learnt; nothing else changes."""
import pytest
import torch

from mdil.evaluation import repair, verify
from mdil.models import build_model, checkpoint
from mdil.models.fingerprint import branch_state, is_buffer
from mdil.models.layouts import published_keys
from mdil.utils.errors import UserError
from tests.fill import fill
from tests.test_branches import equal, logits, network, save_network
from tests.test_checkpoints import published_file

NAMES = ['cityscapes', 'BDD', 'IDD']


@pytest.fixture(scope='module')
def steps(tmp_path_factory):
    """Files of three steps of which each overwrites the statistics of all old domains, but nothing else."""
    folder, whole, found = tmp_path_factory.mktemp('steps'), network(NAMES), []
    for count in (1, 2, 3):
        model = build_model([20, 20, 27][:count])
        state = whole.state_dict()
        model.load_state_dict({name: state[name] for name in model.state_dict()})
        for domain in range(count - 1):
            for key, value in branch_state(model, domain).items():
                if is_buffer(key):
                    value += count
        found.append(save_network(folder / f'step{count}', model, NAMES[:count], 'mdil', epoch=3, best_acc=1.5,
                                  options={'num_epochs': 3, 'height': 64, 'width': 128}, statistics=dict.fromkeys(NAMES[:count], 1)))
    return found


def run(*arguments):
    repair.main(list(map(str, arguments)))


def test_each_domain_comes_from_the_step_that_learnt_it(steps, tmp_path, capsys):
    run(*steps, '--out', tmp_path / 'out')
    text = capsys.readouterr().out
    assert f'cityscapes: 117 tensors restored from {steps[0]}\n' in text and f'BDD: 117 tensors restored from {steps[1]}\n' in text
    after, (one, two, three) = logits(tmp_path / 'out'), map(logits, steps)
    for name, before in (('cityscapes', one), ('BDD', two), ('IDD', three)):
        assert torch.equal(before[name], after[name]), name
    assert not torch.equal(three['cityscapes'], one['cityscapes'])
    assert verify.main([str(steps[0]), str(tmp_path / 'out')]) == 0
    content = checkpoint.read(tmp_path / 'out')
    assert (content['epoch'], content['best_acc'], content['statistics']) == (3, 1.5, dict.fromkeys(NAMES, 1))
    assert content['options']['num_epochs'] == 3 and [entry['name'] for entry in content['domains']] == NAMES


def test_a_later_file_helps_but_is_said_to(steps, tmp_path, capsys):
    run(*steps[1:], '--out', tmp_path / 'out')
    lines = capsys.readouterr().out.splitlines()
    assert 'cityscapes: 117 tensors restored' in lines[0] and 'old domain already; the file of the step that learnt cityscapes' in lines[0]
    assert equal(logits(steps[1]), logits(tmp_path / 'out'))
    together = save_network(tmp_path / 'together', network(NAMES[:2]), NAMES[:2], 'multi-task-adapters')
    run(together, steps[2], '--out', tmp_path / 'other')        # a joint step has learnt all its domains
    assert 'old already' not in capsys.readouterr().out


def test_statistics_leave_parameters_and_the_branch_takes_all(steps, tmp_path, capsys):
    model = network(NAMES)
    for value in branch_state(model, 0).values():
        value += 1
    new = save_network(tmp_path / 'new', model, NAMES, 'mdil')
    for what, moved, status in (('statistics', 117, 1), ('branch', 285, 0)):
        run(*steps[:2], new, '--out', tmp_path / what, '--what', what)
        assert f'cityscapes: {moved} tensors restored' in capsys.readouterr().out
        assert verify.main([str(steps[0]), str(tmp_path / what)]) == status


def test_published_files_are_repaired_once_their_domains_are_named(steps, tmp_path):
    def published(path, number):
        state = checkpoint.read(steps[number])['state_dict']
        return published_file(path, published_keys(state, [20, 20, 27][:number + 1], 'parallel'))
    files = [published(tmp_path / str(number), number) for number in range(3)]
    with pytest.raises(UserError, match='no domain names; pass --domains'):
        run(*files, '--out', tmp_path / 'out')
    with pytest.raises(UserError, match='no domain names; pass --domains, one for each'):
        run(*files[:2], '--out', tmp_path / 'out', '--domains', 'CS', 'BDD', 'IDD')     # of the next step's file
    run(*files, '--out', tmp_path / 'out', '--domains', 'CS', 'BDD', 'IDD')
    one, after = logits(steps[0]), logits(tmp_path / 'out')
    assert equal(one, after) and checkpoint.read(tmp_path / 'out')['best_acc'] == 59.2


def test_what_cannot_be_repaired_is_said(steps, tmp_path):
    plain = save_network(tmp_path / 'plain', fill(build_model([20], 'fine-tune')), ['cityscapes'], 'fine-tune')
    for states, message in (([steps[0]], 'repair needs'), ([steps[0], steps[2]], 'no earlier file contains BDD'),
                            ([steps[0], steps[0]], 'it has no old domain'),
                            ([plain, steps[1]], r'branch of cityscapes \(fine-tune\) differs from that in .*\(mdil\)')):
        with pytest.raises(UserError, match=message):
            run(*states, '--out', tmp_path / 'out')
    (tmp_path / 'out').write_text('mine')
    with pytest.raises(UserError, match='exists'):
        run(*steps, '--out', tmp_path / 'out')


def test_a_precision_that_is_slow_here_is_said(steps, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr('mdil.utils.precision.cpu_features', set)
    run(*steps, '--out', tmp_path / 'out', '--device', 'cpu', '--precision', 'bf16')
    assert '--precision bf16 is slow here' in capsys.readouterr().err
