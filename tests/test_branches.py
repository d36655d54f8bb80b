"""Branch files: what is taken out comes back to the last bit, onto its own base only, and nothing else is taken."""
import copy
import shutil
from pathlib import Path

import pytest
import torch

from mdil.datasets.domains import get_domain
from mdil.evaluation import branches as tool
from mdil.models import METHODS, branches, build_model, checkpoint
from mdil.models.fingerprint import branch_state, fingerprint, shared_state
from mdil.models.layouts import published_keys
from mdil.utils.errors import UserError
from tests.conftest import shallow_erfnet
from tests.fill import fill
from tests.test_checkpoints import published_file

COUNTS = {'cityscapes': 20, 'BDD': 20, 'IDD': 27, 'camvid': 12}
# One method for each kind of network.
KINDS = {(row.adapter, row.domain_bn): name for name, row in METHODS.items() if not row.one_domain}.values()
IMAGES = torch.rand(2, 3, 16, 32, generator=torch.Generator().manual_seed(0))


def save_network(path, model, names, method, **more):
    """A checkpoint of a network."""
    checkpoint.save({'version': 1, 'state_dict': model.state_dict(), 'method': method, **more,
                     'domains': [{'name': name, 'classes': COUNTS[name]} for name in names]}, path)
    return path


def network(names, method='mdil'):
    """A filled network in which no two branches are equal."""
    return fill(build_model([COUNTS[name] for name in names], method)).eval()


def logits(path):
    """{domain: logits} of a checkpoint."""
    known = branches.LoadedCheckpoint(path)
    known.model.eval()
    with torch.no_grad():
        return {name: known.model(IMAGES, number) for number, name in enumerate(known.names)}


def equal(one, other):
    """Whether the domains of `one` have the same logits in `other`, to the last bit."""
    return all(torch.equal(value, other[name]) for name, value in one.items())


def run(*arguments):
    tool.main(list(map(str, arguments)))


@pytest.fixture(scope='module')
def three(tmp_path_factory):
    """A checkpoint of three domains, with an entry by domain; read only."""
    names = ['cityscapes', 'BDD', 'IDD']
    statistics = {name: {'mean': torch.full((3,), float(number)), 'count': number} for number, name in enumerate(names)}
    with shallow_erfnet():
        return save_network(tmp_path_factory.mktemp('three') / 'three', network(names), names, 'mdil', statistics=statistics,
                            options={'num_epochs': 3, 'height': 64, 'width': 128}, optimizer={'state': {}})


@pytest.fixture(scope='module')
def parted(three):
    """(Branch of IDD, checkpoint of the other two), both taken out of `three`; read only."""
    idd, two = three.parent / 'idd', three.parent / 'two'
    with shallow_erfnet():
        run('extract', three, '--domain', 'idd', '--out', idd)
        run('remove', three, '--domain', 'IDD', '--out', two)
    return idd, two


@pytest.mark.usefixtures('shallow')
@pytest.mark.parametrize('method', KINDS)
def test_out_and_back_in_any_order_is_bit_equal(tmp_path, method):
    names = ['cityscapes', 'BDD', 'IDD']
    whole = save_network(tmp_path / 'whole', network(names, method), names, method)
    before = logits(whole)
    for name in names[1:]:
        run('extract', whole, '--domain', name, '--out', tmp_path / f'{name}.branch')
    run('remove', whole, '--domain', 'IDD', '--out', tmp_path / 'two')
    run('remove', tmp_path / 'two', '--domain', 'BDD', '--out', tmp_path / 'base')
    files = [tmp_path / 'BDD.branch', tmp_path / 'IDD.branch']
    run('add', tmp_path / 'base', *files, '--out', tmp_path / 'joined')
    run('add', tmp_path / 'base', *reversed(files), '--out', tmp_path / 'other')
    for file in ('two', 'base'):
        assert equal(logits(tmp_path / file), before)
    other = logits(tmp_path / 'other')
    assert list(other) == ['cityscapes', 'IDD', 'BDD'] and equal(before, other)
    one, joined = (checkpoint.read(tmp_path / name)['state_dict'] for name in ('whole', 'joined'))
    assert one.keys() == joined.keys() and all(torch.equal(one[key], joined[key]) for key in one)


@pytest.mark.usefixtures('shallow')
def test_the_first_domain_may_go_too(three, tmp_path):
    before = logits(three)
    run('remove', three, '--domain', 'CS', '--out', tmp_path / 'rest')
    run('extract', three, '--domain', 'CS', '--out', tmp_path / 'cs')
    run('add', tmp_path / 'rest', tmp_path / 'cs', '--out', tmp_path / 'again')
    assert list(logits(tmp_path / 'rest')) == ['BDD', 'IDD'] and equal(logits(tmp_path / 'rest'), before)
    assert equal(before, logits(tmp_path / 'again'))


@pytest.mark.usefixtures('shallow')
def test_a_branch_is_no_checkpoint_and_names_that_contradict_a_file_are_refused(three, parted):
    for words, message in ((['remove', parted[0], '--domain', 'IDD', '--out', 'x'],
                            'is a branch file, one domain without the shared weights; .* branches add'),
                           (['list', three, '--domains', 'IDD', 'BDD', 'CS'],
                            '--domains IDD BDD cityscapes contradicts')):
        with pytest.raises(UserError, match=message):
            run(*words)


@pytest.mark.usefixtures('shallow')
def test_a_branch_file_is_listed_with_the_shared_weights_that_it_fits(three, parted, capsys):
    run('list', parted[0])
    of_branch = capsys.readouterr().out
    run('list', three)
    shared = capsys.readouterr().out.split()[-1]
    assert 'branch of mdil, erfnet' in of_branch and f'fits the shared weights {shared}' in of_branch
    assert '26 + void' in of_branch and 'road, drivable fallback, sidewalk' in of_branch


@pytest.mark.usefixtures('shallow')
def test_a_branch_carries_all_that_the_checkpoint_holds_of_its_domain(parted, tmp_path):
    path, without = parted
    branch = branches.read_branch(path)
    idd = get_domain('IDD')
    assert branch['domain']['class_names'] == list(idd.classes) and branch['domain']['colors'][0] == list(idd.colors[0])
    assert list(branch['about']) == ['statistics'] and branch['about']['statistics']['mean'].tolist() == [2, 2, 2]
    two = checkpoint.read(without)
    assert list(two['statistics']) == ['cityscapes', 'BDD'] and two['options'] == {'height': 64, 'width': 128}
    run('add', without, path, '--out', tmp_path / 'again')
    again = checkpoint.read(tmp_path / 'again')
    assert again['statistics']['IDD']['count'] == 2 and list(again['statistics']) == ['cityscapes', 'BDD', 'IDD']
    assert [entry['name'] for entry in again['domains']] == ['cityscapes', 'BDD', 'IDD']


@pytest.mark.usefixtures('shallow')
def test_a_branch_is_a_part_and_a_base_the_same_whatever_domains_it_has(three, tmp_path):
    run('extract', three, '--domain', 'BDD', '--out', tmp_path / 'bdd')
    known = branches.LoadedCheckpoint(three)
    numbers = sum(parameter.numel() for parameter in known.model.branch_parameters(1))
    assert 4 * numbers < (tmp_path / 'bdd').stat().st_size < 4 * numbers * 1.1
    base = fingerprint(shared_state(known.model))
    known.model.remove_domain(0)
    assert fingerprint(shared_state(known.model)) == base == branches.read_branch(tmp_path / 'bdd')['base']


@pytest.mark.usefixtures('shallow')
def test_published_files_give_branches_once_their_domains_are_named(tmp_path):
    model = network(['cityscapes', 'BDD'])
    path = published_file(tmp_path / 'x', published_keys(model.state_dict(), [20, 20], 'parallel'))
    with pytest.raises(UserError, match='2 domains.*no domain names.*--domains'):
        run('extract', path, '--domain', 'BDD', '--out', tmp_path / 'bdd')
    with pytest.raises(UserError, match='has 20 classes, void included, where --domains says IDD, which has 27'):
        run('extract', path, '--domain', 'CS', '--out', tmp_path / 'bdd', '--domains', 'CS', 'IDD')
    run('extract', path, '--domain', 'BDD', '--out', tmp_path / 'bdd', '--domains', 'CS', 'bdd100k')
    state = branches.read_branch(tmp_path / 'bdd')['state']
    assert all(torch.equal(value, state[key]) for key, value in branch_state(model, 1).items())


def test_list_shows_domains_sizes_and_fingerprint(tmp_path, capsys):
    names = ['cityscapes', 'BDD', 'IDD']
    whole = save_network(tmp_path / 'whole', network(names), names, 'mdil')
    run('list', whole)
    out = capsys.readouterr().out
    shared = fingerprint(shared_state(branches.LoadedCheckpoint(whole).model))
    for text in ('cityscapes', '26 + void', '1,868,252', '7.13', shared[:16]):
        assert text in out, text


def changed(path, change):
    """The branch file with a change made to its content by hand."""
    content = checkpoint.read(path)
    change(content)
    checkpoint.save(content, path)


def flip(content):
    content['state']['decoder.output_conv.bias'][0] += 1e-7


def other_classes(content):
    """A whole branch, rightly signed, whose IDD has other classes than IDD has here."""
    content['domain'] = {**content['domain'], 'class_names': ['sky', *content['domain']['class_names'][1:]]}
    content['digests'] = branches.digests_of(content)


def fewer_classes(content):
    content['domain'] = {'name': 'IDD', 'classes': 20}
    content['digests'] = branches.digests_of(content)


def wrong_head(content):
    content['domain'] = {'name': 'mine', 'classes': 9}
    content['digests'] = branches.digests_of(content)


def huge(content):
    content['domain'] = {'name': 'mine', 'classes': 10 ** 9}
    content['digests'] = branches.digests_of(content)


def not_finite(content):
    content['state']['decoder.output_conv.bias'][0] = float('nan')
    content['digests'] = branches.digests_of(content)


@pytest.mark.usefixtures('shallow')
@pytest.mark.parametrize('change, message', [
    (flip, 'damaged, the tensors of IDD'),
    (lambda content: content['domain'].update(name='BDD'), 'renamed or changed, it was not written as a branch of BDD'),
    (lambda content: content.update(base='0' * 64), 'renamed or changed'),
    (lambda content: content['about'].update(statistics={}), 'renamed or changed'),
    (lambda content: content.pop('digests'), 'damaged, it has no digests'),
    (lambda content: content.update(method='nonsense'), "its method is not one of mdil.*import its file.*'nonsense'"),
    (lambda content: content.update(version=7), 'version 7, this code reads 1'),
    (other_classes, "IDD with other classes than IDD has here: 'sky' instead of 'road'"),
    (fewer_classes, 'IDD with other classes.*20 instead of 27'),
    (wrong_head, r'branch of mine \(mdil, 9 classes\) does not fit.*output_conv'),
    (huge, 'its domain is not'), (not_finite, 'not finite')])
def test_a_bad_branch_is_refused_by_name(parted, tmp_path, change, message):
    branch, two = parted
    path = Path(shutil.copy(branch, tmp_path))
    changed(path, change)
    with pytest.raises(UserError, match=message) as error:
        run('add', two, path, '--out', tmp_path / 'out')
    assert str(path) in str(error.value) and '\n' not in str(error.value) and not (tmp_path / 'out').exists()


@pytest.mark.usefixtures('shallow')
def test_a_cut_or_flipped_file_is_refused(three, parted, tmp_path):
    path = Path(shutil.copy(parted[0], tmp_path))
    content = path.read_bytes()
    for broken in (content[:len(content) // 2], content[:10 ** 5] + bytes([content[10 ** 5] ^ 1]) + content[10 ** 5 + 1:]):
        path.write_bytes(broken)
        with pytest.raises(UserError, match=f'{path}: damaged'):
            run('add', three, path, '--out', tmp_path / 'out')


@pytest.mark.usefixtures('shallow')
def test_another_base_another_network_and_a_domain_twice_are_refused(three, parted, tmp_path):
    idd, two = parted
    with pytest.raises(UserError, match='branch of IDD, which is already there: cityscapes, BDD, IDD'):
        run('add', three, idd, '--out', tmp_path / 'out')
    with pytest.raises(UserError, match='branch of IDD, which is already there'):
        run('add', two, idd, idd, '--out', tmp_path / 'out')
    other = branches.LoadedCheckpoint(two).model
    old = fingerprint(shared_state(other))
    other.shared_parameters()[0].data[0] += 1
    save_network(tmp_path / 'moved', other, ['cityscapes', 'BDD'], 'mdil')
    with pytest.raises(UserError, match=f'shared weights {old[:16]}.* are {fingerprint(shared_state(other))[:16]}'):
        run('add', tmp_path / 'moved', idd, '--out', tmp_path / 'out')
    # Series adapters have the same shared weights as parallel ones.
    series = build_model([20, 20], 'series-adapters')
    series.load_state_dict({**series.state_dict(), **shared_files(branches.LoadedCheckpoint(two).model)})
    save_network(tmp_path / 'series', series, ['cityscapes', 'BDD'], 'series-adapters')
    with pytest.raises(UserError, match='branch of IDD .mdil, 27 classes. does not fit .* .series-adapters.'):
        run('add', tmp_path / 'series', idd, '--out', tmp_path / 'out')
    with pytest.raises(UserError, match='is not a branch file'):
        run('add', two, three, '--out', tmp_path / 'out')


def shared_files(model):
    """{name in our files: tensor} of the shared weights."""
    state = model.state_dict()
    return {name: state[name] for name in model.view_names(0)[1].values()}


@pytest.mark.usefixtures('shallow')
def test_unknown_domains_the_only_one_and_existing_files_are_refused(three, tmp_path):
    with pytest.raises(UserError, match='knows cityscapes, BDD, IDD, not camvid'):
        run('extract', three, '--domain', 'camvid', '--out', tmp_path / 'x')
    one = save_network(tmp_path / 'one', network(['BDD']), ['BDD'], 'mdil')
    with pytest.raises(UserError, match='knows only BDD'):
        run('remove', one, '--domain', 'BDD', '--out', tmp_path / 'x')
    (tmp_path / 'x').write_text('mine')
    with pytest.raises(UserError, match='exists; name another file, or replace it with --overwrite'):
        run('extract', three, '--domain', 'IDD', '--out', tmp_path / 'x')
    assert (tmp_path / 'x').read_text() == 'mine'
    run('extract', three, '--domain', 'IDD', '--out', tmp_path / 'x', '--overwrite')
    with pytest.raises(UserError, match='is a file that is read'):
        run('remove', three, '--domain', 'IDD', '--out', three, '--overwrite')


@pytest.mark.parametrize('what, moved', [('statistics', 117), ('branch', 285)])
def test_put_back_gives_a_domain_what_it_had_and_leaves_the_others(what, moved):
    old, new = network(['cityscapes']), network(['cityscapes', 'BDD'])
    for value in branch_state(new, 0).values():
        value.add_(1)
    before = copy.deepcopy(new.state_dict())
    names = branches.put_back(old, 0, new, 0, what)
    assert len(names) == moved
    own, _ = new.view_names(0)
    differing = {name for name, value in new.state_dict().items() if not torch.equal(value, before[name])}
    assert differing == {own[name] for name in names}
    assert all(torch.equal(branch_state(new, 0)[name], branch_state(old, 0)[name]) for name in names)
