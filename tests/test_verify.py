"""verify: equal to the last bit or named; files of the published code and of others; what cannot be told is named."""
import json

import pytest
import torch
from torch import nn

from mdil.evaluation import verify
from mdil.models import build_model, unchanged
from mdil.models.fingerprint import digest_of, fingerprint
from mdil.models.layouts import published_keys
from mdil.utils.errors import UserError
from tests.conftest import run_script
from tests.fill import fill
from tests.test_branches import network, save_network
from tests.test_checkpoints import published_file


def run(*arguments):
    return verify.main(list(map(str, arguments)))


@pytest.fixture
def files(tmp_path):
    """(network that knew one domain, its file, what the next step made of it, that one's file)."""
    old, new = network(['cityscapes']), network(['cityscapes', 'IDD'])
    new.load_state_dict({**new.state_dict(), **old.state_dict()})
    save_network(tmp_path / 'old', old, ['cityscapes'], 'mdil')
    return old, tmp_path / 'old', new, save_network(tmp_path / 'new', new, ['cityscapes', 'IDD'], 'mdil')


@pytest.mark.parametrize('key, text', [
    ('encoder.layers.1.bns_1.0.running_mean', '1 buffers of 1 batch norms, 0 of 278 weight tensors changed'),
    ('encoder.layers.1.bns_1.0.num_batches_tracked', '1 buffers of 1 batch norms, 0 of 278 weight tensors changed; logits equal'),
    ('encoder.initial_block.conv.weight', 'cityscapes: changed; 1 of 278 weight tensors changed; logits differ by up to'),
    ('decoder.0.output_conv.bias', '1 of 278 weight tensors changed'),
    ('decoder.1.output_conv.bias', 'cityscapes: unchanged; 278 weight tensors and 117 buffers equal; logits equal')])
def test_one_bit_of_the_old_domain_is_noticed_and_none_of_the_new_one(files, capsys, key, text):
    _, before, new, after = files
    assert run(before, after) == 0 and 'IDD' not in capsys.readouterr().out
    value = new.state_dict()[key]
    value.view(-1)[0] = torch.nextafter(value.view(-1)[0], torch.tensor(9.)) if value.is_floating_point() else 7
    save_network(after, new, ['cityscapes', 'IDD'], 'mdil')
    assert run(before, after) == ('unchanged' not in text)
    assert text in capsys.readouterr().out


def test_the_command_ends_with_0_1_and_2(files, tmp_path, script_here):
    _, before, new, after = files
    status, out, _ = script_here('mdil', 'verify', before, after)
    assert status in (None, 0) and 'cityscapes: unchanged' in out
    fill(new).single(0).decoder.output_conv.bias.data.add_(1)
    save_network(after, new, ['cityscapes', 'IDD'], 'mdil')
    assert 'cityscapes: changed' in run_script('-m', 'mdil', 'verify', before, after, '--json', tmp_path / 'j', expect=1).stdout
    entry = json.loads((tmp_path / 'j').read_text())['domains']['cityscapes']
    assert entry['parameters'] == ['decoder.output_conv.bias'] and entry['buffers'] == [] and entry['logits'] > 0
    status, _, err = script_here('mdil', 'verify', before, save_network(tmp_path / 'bdd', network(['BDD']), ['BDD'], 'mdil'))
    assert status == 2 and 'no domain is in both' in err


@pytest.mark.usefixtures('shallow')
def test_json_replaces_its_own_kind_alone(files, tmp_path):
    _, before, _, after = files
    (tmp_path / 'notes').write_text('{"mine": 1}')
    for _ in range(2):
        run(before, after, '--json', tmp_path / 'j')
    for arguments in ((before, after, '--json', tmp_path / 'notes'), (before, after, '--json', after),
                      (before, after, '--domains', 'IDD', 'cityscapes')):
        with pytest.raises(UserError, match='exists and holds something else|is a file that is read|contradicts'):
            run(*arguments)
    assert (tmp_path / 'notes').read_text() == '{"mine": 1}'


@pytest.mark.usefixtures('shallow')
def test_domains_are_told_by_their_names_not_their_places(files, tmp_path):
    _, _, new, after = files
    new.remove_domain(0)
    assert run(save_network(tmp_path / 'one', new, ['IDD'], 'mdil'), after) == 0


@pytest.mark.usefixtures('shallow')
@pytest.mark.parametrize('method, classes', [('mdil', [20, 20, 27]), ('fine-tune', [20, 20])])
def test_published_files_are_compared_by_place_and_may_lack_counters(tmp_path, capsys, method, classes):
    model = fill(build_model(classes, method))
    adapter = 'parallel' if method == 'mdil' else None
    new = published_file(tmp_path / 'new', published_keys(model.state_dict(), classes, adapter))
    old_model = build_model(classes[:-1], method)
    state = model.state_dict()
    old_model.load_state_dict({name: state[name] for name in old_model.state_dict()})
    keys = {name: value for name, value in published_keys(old_model.state_dict(), classes[:-1], adapter).items()
            if not name.endswith('num_batches_tracked')}
    old = published_file(tmp_path / 'old', keys)
    given = ['--method', method, '--domains', 'CS', 'BDD']
    assert run(old, new, *given) == 0
    out = capsys.readouterr().out
    assert 'cityscapes: unchanged; ' in out and ('BDD: unchanged' in out) == (len(classes) == 3)
    with pytest.raises(UserError, match='--domains CS BDD IDD camvid: .*new holds .*; name each of its domains once'):
        run(old, new, '--domains', 'CS', 'BDD', 'IDD', 'camvid')
    assert run(old, new, '--method', method) == 0 and 'domain 0: unchanged' in capsys.readouterr().out
    keys['module.encoder.initial_block.conv.weight'] += 1
    assert run(published_file(tmp_path / 'old', keys), new, *given) == 1


@pytest.mark.usefixtures('shallow')
def test_what_cannot_be_compared_is_said(files, tmp_path):
    _, before, _, after = files
    plain = save_network(tmp_path / 'plain', network(['cityscapes'], 'fine-tune'), ['cityscapes'], 'fine-tune')
    with pytest.raises(UserError, match='cityscapes in .*cannot be compared.* is in one of the networks only'):
        run(plain, after)
    nameless = published_file(tmp_path / 'nameless', published_keys(build_model([12]).state_dict(), [12], 'parallel'))
    with pytest.raises(UserError, match='cityscapes has 20 classes .* and 12'):
        run(before, nameless)
    with pytest.raises(UserError, match='without it, pass two files'):
        run(after)
    with pytest.raises(UserError, match='3 given'):
        run(before, after, after)
    for text in ('[]', '{"version": 1}', '{', '{"version": 9, "domains": [], "tensors": {}}'):
        (tmp_path / unchanged.NAME).write_text(text)
        with pytest.raises(UserError, match='not a record of train.py'):
            run(after)


@pytest.mark.usefixtures('shallow')
def test_a_record_is_of_the_file_beside_it(files, tmp_path):
    _, _, new, after = files
    unchanged.begin(tmp_path, new, ['cityscapes'], 'old')
    assert run(after) == 0
    with pytest.raises(UserError, match='--domains IDD cityscapes contradicts'):
        run(after, '--domains', 'IDD', 'CS')
    unchanged.begin(tmp_path, new, ['BDD'], 'old')
    with pytest.raises(UserError, match='knows cityscapes, IDD, but unchanged.json next to it is for BDD'):
        run(after)


class Other(nn.Module):
    """A network of other code: shared features, a head for each domain."""

    def __init__(self, heads):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        self.heads = nn.ModuleList([nn.Conv2d(4, classes, 1) for classes in heads])


@pytest.mark.parametrize('wrapped', ['model', None])
def test_networks_of_other_code_by_a_map_of_keys(tmp_path, capsys, wrapped):
    new = Other([3, 5])
    state = {key.replace('heads.0.', 'head.'): value.clone() for key, value in new.state_dict().items() if 'heads.1' not in key}

    def save(path, content):
        torch.save({wrapped: content} if wrapped else content, path)
        return path
    old = save(tmp_path / 'old', {f'module.{key}': value for key, value in state.items()})
    (tmp_path / 'map').write_text(json.dumps({'cityscapes': {'backbone.': 'backbone.', 'head.': 'heads.0.'}}))
    given = ['--map', tmp_path / 'map']
    assert run(old, save(tmp_path / 'new', new.state_dict()), *given) == 0
    assert 'cityscapes: unchanged; 6 weight tensors and 3 buffers equal; logits not computed' in capsys.readouterr().out
    new.backbone[1].running_mean.add_(1)
    assert run(old, save(tmp_path / 'new', new.state_dict()), *given) == 1
    assert '1 buffers of 1 batch norms, 0 of 6 weight tensors changed' in capsys.readouterr().out
    for content, message in (('{"a": {"nothing.": "x."}}', 'no key has a prefix that --map gives for a'), ('[]', 'is not'), ('{"a": 1}', 'is not'),
                             ('{"a": {"head.": "x.", "backbone.0.": "x."}}', 'two keys of .* become x.weight for a'),
                             ('{"a": {"head.": "heads.7."}}', 'a in .* cannot be compared, heads.7.bias')):
        (tmp_path / 'map').write_text(content)
        with pytest.raises(UserError, match=message):
            run(old, tmp_path / 'new', *given)


def test_digests_tell_bits_types_shapes_and_names():
    value = torch.arange(6.).reshape(2, 3)
    assert digest_of(value) == digest_of(value.clone()) == digest_of(value.t().contiguous().t())
    others = [value.reshape(3, 2), value.double(), value + 1e-6, -value, value.view(torch.int32), torch.tensor(0.), 'a', 1, 1.0]
    assert len({digest_of(other) for other in [value, *others]}) == len(others) + 1
    assert digest_of(torch.tensor([0.0])) != digest_of(torch.tensor([-0.0]))
    assert fingerprint({'a': value, 'b': 1}) == fingerprint({'b': 1, 'a': value}) != fingerprint({'b': value, 'a': 1})
