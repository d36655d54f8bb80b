"""The model card: parameters, costs, what is known of the training."""
import copy
import json

import pytest
import torch
from torch import nn

from mdil.evaluation import describe
from mdil.models import build_model, checkpoint
from mdil.models.checkpoint import load_network, read_checkpoint
from mdil.models.layouts import published_keys
from mdil.training.options import RECIPES
from mdil.utils.errors import UserError
from tests.fill import fill
from tests.test_checkpoints import published_file
from tests.test_tsne import save_network


def counted(model, number, height, width):
    """GFLOP by hooks: 2 for each weight of a convolution and each place it is applied at.

    Of a copy in train mode, where every convolution is called by itself.
    """
    model, total = copy.deepcopy(model).train(), [0]

    def hook(layer, inputs, output):
        places = inputs[0] if isinstance(layer, nn.ConvTranspose2d) else output
        total[0] += 2 * layer.weight.numel() * places.shape[2] * places.shape[3]
    for layer in model.modules():
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            layer.register_forward_hook(hook)
    with torch.no_grad():
        model(torch.zeros(1, 3, height, width), number)
    return total[0] / 1e9


@pytest.mark.usefixtures('shallow')
@pytest.mark.parametrize('method', ['mdil', 'fine-tune', 'series-adapters'])
def test_cost_equals_a_count_by_hooks(method):
    model = build_model([20, 12], method)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for number in (0, 1):
        assert describe.gflop(model, number, 64, 96) == pytest.approx(counted(model, number, 64, 96), rel=1e-12)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_methods_cost_and_size_are_the_known_ones():
    model = build_model([20, 20])
    assert describe.gflop(model, 0, 512, 1024) == pytest.approx(60.2, abs=0.05)
    counts = describe.parameter_counts(model)
    assert counts == {'shared': 1868252, 'total': 2871844, 'domains': [305792 + 5792 + 190212] * 2}


def test_card_of_a_run(tmp_path, capsys):
    path = save_network(tmp_path / 'run/model_best.pth.tar', ['cityscapes', 'IDD'], 'mdil', 0)
    content = torch.load(path, weights_only=True)
    content.update(epoch=2, best_acc=41.25, options={'num_epochs': 3, 'lr': 5e-4, 'domains': ['cityscapes', 'IDD'],
                                                     'recipe': 'corrected', 'limit_batches': None,
                                                     'lambdac': 0.1, 'rounds': 2})
    torch.save(content, path)
    lines = [{'epoch': epoch, 'lr': 0.1, 'train': {'loss': 0.5}, 'val': {
        'cityscapes': {'miou': 60.0 + epoch, 'loss': 0.5}, 'IDD': {'miou': 41.25, 'loss': 1}}} for epoch in (1, 2, 3)]
    (path.parent / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    describe.main([str(path), '--height', '64'])
    out = ' '.join(capsys.readouterr().out.split())
    for expected in ('2 domains (20, 27 classes)', "mdil: the paper's method, parallel adapters", '501,796', '1,868,252', '128x64',
                     'cityscapes: road, sidewalk', 'autorickshaw', 'best validation mIoU of the run: 41.25',
                     'cityscapes: mIoU 62.00, loss 0.5000 after epoch 2', 'recipe: corrected', 'lambdac: 0.1',
                     'this file: after epoch 2 of 3'):
        assert expected in out, expected
    assert 'limit-batches' not in out and 'mIoU 63' not in out
    assert 'rounds' not in out          # an option of joint training
    torch.save({**content, 'epoch': 0, 'best_acc': float('-inf')}, path)         # before the first validation
    describe.main([str(path), '--height', '64'])
    assert 'best validation mIoU' not in capsys.readouterr().out


def test_card_does_not_call_the_weights_of_an_own_domain_published(tmp_path, capsys):
    path = save_network(tmp_path / 'model_best.pth.tar', ['cityscapes', 'IDD'], 'mdil', 0)
    content = torch.load(path, weights_only=True)
    content['options'] = {'class_weights': 'published'}
    torch.save(content, path)
    describe.main([str(path), '--height', '64'])
    assert 'none are published' not in capsys.readouterr().out
    content['domains'][1]['name'] = 'mine'
    torch.save(content, path)
    describe.main([str(path), '--height', '64'])
    assert 'class-weights of mine: from domain.json, or computed (none are published)' in capsys.readouterr().out


def test_card_leaves_out_no_option_of_a_recipe_and_refuses_other_names(tmp_path):
    assert set(RECIPES['corrected']) <= set(describe.TRAINING)
    with pytest.raises(UserError, match='--domains IDD contradicts .*x.pth, which knows cityscapes'):
        save_network(tmp_path / 'x.pth', ['cityscapes'], 'mdil', 0)
        describe.main([str(tmp_path / 'x.pth'), '--domains', 'IDD'])


@pytest.mark.usefixtures('shallow')
def test_card_of_a_published_file_says_what_it_does_not_know(tmp_path, capsys):
    model = fill(build_model([20, 20]))
    path = published_file(tmp_path / 'x', published_keys(model.state_dict(), [20, 20], 'parallel'))
    describe.main([str(path), '--height', '64'])
    out = capsys.readouterr().out
    assert 'names not known' in out and out.count('not recorded in the file') >= 2
    describe.main([str(path), '--height', '64', '--domains', 'CS', 'BDD'])
    out = capsys.readouterr().out
    assert 'BDD' in out and 'names not known' not in out
    for names in (['CS', 'BDD', 'IDD'], ['CS', 'cityscapes']):
        with pytest.raises(UserError, match=r'holds 2 domains \(20, 20 classes\), .*; name each of its domains once'):
            describe.main([str(path), '--domains', *names])


@pytest.mark.usefixtures('shallow')
def test_card_of_your_own_domain_takes_its_classes_from_the_file(tmp_path, capsys):
    checkpoint.save({'version': 1, 'state_dict': build_model([3]).state_dict(), 'method': 'mdil', 'domains': [
        {'name': 'village', 'classes': 3, 'class_names': ['mud', 'hut']}]}, tmp_path / 'x')
    describe.main([str(tmp_path / 'x'), '--height', '64'])
    assert 'village: mud, hut' in capsys.readouterr().out


@pytest.mark.usefixtures('shallow')
def test_the_parts_add_up_to_the_whole(tmp_path):
    path = save_network(tmp_path / 'model_best.pth.tar', ['cityscapes', 'BDD', 'IDD'], 'mdil', 0)
    options = describe.parse([str(path), '--height', '64'])
    found = read_checkpoint(path)
    header, rows = describe.domain_rows(load_network(found), found, options)
    counts, shares = ([float(row[column].replace(',', '')) for row in rows] for column in (2, 3))
    assert len(rows) == 5 and sum(counts[:4]) == counts[4] and sum(shares[:4]) == pytest.approx(100, abs=0.21)
