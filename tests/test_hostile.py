"""Damaged and hostile checkpoints, disks that fail, kills between any two file operations.

Whatever a file holds, reading it ends in the network that was saved or in one line that
says why not: never in a traceback, a hang, memory taken on the file's word, or other weights.
"""
import collections
import io
import os
import pickle
import pickletools
import random
import resource
import shutil
import signal
import struct
import time
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mdil import eval as evaluation, train
from mdil.datasets.toy.roads import write_toy_roads
from mdil.evaluation import compare, tsne
from mdil.evaluation.inputs import find_sources
from mdil.evaluation.report import find_steps
from mdil.losses.terms import CrossEntropy
from mdil.models import build_model, checkpoint
from mdil.training import resume
from mdil.training.options import parse_train
from mdil.training.run import BEST, LATEST, PREVIOUS, Run
from mdil.utils.errors import UserError
from mdil.utils.files import check_writable, temporary_name
from mdil.utils.parallel import session
from tests.fill import fill

pytestmark = pytest.mark.usefixtures('shallow_module')


def content(state):
    """A checkpoint of a step with one domain of two classes, without what only resuming needs."""
    return {'version': 1, 'epoch': 3, 'batch': 0, 'totals': {}, 'state_dict': state,
            'domains': [{'name': 'toy', 'classes': 2}], 'method': 'ours', 'best_acc': 1.5,
            'options': {'num_epochs': 5, 'domains': ['toy'], 'method': 'ours', 'lr': 5e-4}}


def saved(value, **how):
    """The bytes of torch.save(value)."""
    file = io.BytesIO()
    torch.save(value, file, **how)
    return file.getvalue()


@pytest.fixture(scope='module')
def whole():
    """(content, bytes of its file, bytes of its file in the old format)."""
    value = content(fill(build_model([2])).state_dict())
    return value, saved(value), saved(value, _use_new_zipfile_serialization=False)


def attempt(path, data, good=None):
    """Reads and loads the file as eval.py does: 'refused' with one line, or 'loaded', equal to `good` if given."""
    path.write_bytes(data)
    start = time.process_time()
    try:
        network = checkpoint.load_network(checkpoint.read_checkpoint(path))
    except UserError as error:
        assert '\n' not in str(error) and str(path) in str(error) and len(str(error)) < 600
        outcome = 'refused'
    else:
        outcome = 'loaded'
        if good is not None:
            state = network.state_dict()
            assert all(torch.equal(value, state[key]) for key, value in good['state_dict'].items())
    assert time.process_time() - start < 20
    return outcome


def flipped(data, chance, places):
    """`data` with one bit changed, or one to eight bytes replaced, at one of `places`."""
    data, place = bytearray(data), chance.choice(places)
    if chance.random() < 0.5:
        data[place] ^= 1 << chance.randrange(8)
    else:
        data[place:place + 8] = chance.randbytes(len(data[place:place + 8]))
    return bytes(data)


def test_an_archive_with_changed_bytes_is_refused_or_loads_the_same_weights(tmp_path, whole):
    """Numbers, pickle, headers of entries, directory at the end: torch alone takes other weights without a word."""
    good, data, _ = whole
    chance, seen = random.Random(1), collections.Counter()
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        heads = [entry.header_offset for entry in archive.infolist()]
        start = archive.start_dir
    regions = {'anywhere': range(len(data)), 'pickle': range(heads[0], heads[1]), 'directory': range(start, len(data)),
               'end': range(len(data) - 100, len(data)), 'heads': [head + n for head in heads for n in range(60)]}
    for region, places in regions.items():
        for _ in range(8):
            seen[region, attempt(tmp_path / 'x', flipped(data, chance, places), good)] += 1
    assert seen['anywhere', 'refused'] >= 7 and seen['pickle', 'refused'] >= 7 and seen['end', 'refused'] >= 3, seen


def test_a_flipped_number_is_refused_by_its_checksum(tmp_path, whole):
    good, data, _ = whole
    weights = good['state_dict']['encoder.layers.3.conv3x1_1.weight']
    place = data.index(weights.numpy().tobytes())
    changed = data[:place + 2] + bytes([data[place + 2] ^ 1]) + data[place + 3:]
    assert not torch.equal(torch.load(io.BytesIO(changed), weights_only=True)['state_dict'][
        'encoder.layers.3.conv3x1_1.weight'], weights)      # what torch alone makes of it
    (tmp_path / 'x').write_bytes(changed)
    with pytest.raises(UserError, match='does not match its checksum|Bad CRC-32'):
        checkpoint.read(tmp_path / 'x')


def test_cut_files_are_refused(tmp_path, whole):
    chance = random.Random(2)
    for data in whole[1:]:
        cuts = [0, 1, 4, 100, len(data) - 1, len(data) - 22, *(chance.randrange(len(data)) for _ in range(6))]
        assert {attempt(tmp_path / 'x', data[:cut]) for cut in cuts} == {'refused'}
        assert attempt(tmp_path / 'x', data) == 'loaded'


def archive(entries, **how):
    """The bytes of an archive of {name: bytes}, with checksums that are right."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, 'w', **how) as made:
        for name, data in entries.items():
            made.writestr(name, data)
    return file.getvalue()


def entries_of(data):
    with zipfile.ZipFile(io.BytesIO(data)) as made:
        return {name: made.read(name) for name in made.namelist()}


def test_archives_that_torch_does_not_write_are_refused(tmp_path):
    data = saved(content({'a.weight': torch.ones(3)}))
    entries, twice = entries_of(data), io.BytesIO(data)
    with warnings.catch_warnings(), zipfile.ZipFile(twice, 'a') as made:
        warnings.simplefilter('ignore')     # about the very name
        made.writestr('archive/data.pkl', entries['archive/data.pkl'])
    comment = io.BytesIO(data)
    with zipfile.ZipFile(comment, 'a') as made:
        made.comment = b'made elsewhere'
    for changed, message in ((twice.getvalue(), 'two entries of one name'), (comment.getvalue(), 'it has a comment'),
                             (archive(entries, compression=zipfile.ZIP_DEFLATED), 'entries are compressed')):
        (tmp_path / 'x').write_bytes(changed)
        with pytest.raises(UserError, match=message):
            checkpoint.read(tmp_path / 'x')
    (tmp_path / 'x').write_bytes(archive(entries))
    assert checkpoint.read(tmp_path / 'x')['state_dict']['a.weight'].tolist() == [1, 1, 1]


def test_changed_pickles_under_right_checksums_never_crash_or_hang(tmp_path):
    """What a checksum cannot tell: the reader meets any pickle at all, in either format."""
    small = content({'a.weight': torch.ones(3), 'b.weight': torch.zeros(2, 2)})
    entries, old = entries_of(saved(small)), saved(small, _use_new_zipfile_serialization=False)
    chance, pickled, seen = random.Random(3), entries['archive/data.pkl'], collections.Counter()
    for _ in range(150):
        changed = flipped(pickled, chance, range(len(pickled)))
        seen[attempt(tmp_path / 'x', archive({**entries, 'archive/data.pkl': changed}))] += 1
        seen[attempt(tmp_path / 'x', flipped(old, chance, range(len(old))))] += 1
    assert seen == {'refused': 300}


def test_an_old_file_with_changed_bytes_never_crashes_and_keeps_its_layout(tmp_path, whole):
    """Its numbers have no checksum, but what loads has all tensors of the network, finite."""
    data = whole[2]
    chance, seen = random.Random(4), collections.Counter()
    for place in (*[range(60000)] * 12, *[range(len(data))] * 4):
        seen[attempt(tmp_path / 'x', flipped(data, chance, place))] += 1
    assert seen['refused'] >= 5, seen       # 5 on Python 3.14, more on others, by how they write files


FIRST, SAME = 'encoder.initial_block.conv.weight', 'encoder.layers.1.conv3x1_1.weight'
OTHER = 'decoder.0.output_conv.weight'


def swap(state, a, b):
    state[a], state[b] = state[b], state[a]


@pytest.mark.parametrize('change, message', [
    (lambda s: swap(s, FIRST, OTHER), 'has the wrong shape|not four-dimensional|fits no known layout'),
    (lambda s: swap(s, SAME, SAME.replace('weight', 'bias')), 'wrong shape'),
    (lambda s: s.pop(SAME), f'{SAME} is missing'),
    (lambda s: s.pop(FIRST), 'no ERFNet in it'),
    (lambda s: s.update({SAME: s[SAME][:1]}), f'{SAME} has the wrong shape'),
    (lambda s: s.update({SAME: s[SAME].long()}), 'holds torch.int64, torch.float32 is expected'),
    (lambda s: s.update({SAME: s[SAME].to(torch.complex64)}), 'holds torch.complex64|ComplexFloatStorage'),
    (lambda s: s.update({SAME: s[SAME].double() * 1e300}), 'not finite'),
    (lambda s: s[SAME].flatten()[:1].fill_(float('nan')), 'not finite'),
    (lambda s: s[SAME].flatten()[:1].fill_(float('-inf')), 'not finite'),
    (lambda s: s['encoder.initial_block.bn_ini.0.running_var'].neg_(), 'negative variances'),
    (lambda s: s.update({SAME: s[SAME].to_sparse()}), 'refused'),
    (lambda s: s.update({SAME: s[SAME].to('meta')}), 'refused'),
    (lambda s: s.update({'module.' + SAME: s[SAME]}), 'have the names of others'),
    (lambda s: s.update({SAME + '\n': s.pop(SAME)}), 'keys of its dicts are not names'),
    (lambda s: s.update({OTHER + '\n': s.pop(OTHER)}), 'keys of its dicts are not names'),
    (lambda s: s.update({'x' * 5000: s.pop(SAME)}), 'keys of its dicts are not names'),
    (lambda s: s.update({f'decoder.{"9" * 5000}.output_conv.weight': s[OTHER]}), 'keys of its dicts are not names'),
    (lambda s: s.update({f'decoder.{"9" * 50}.output_conv.weight': s[OTHER]}), 'is surplus'),
    (lambda s: s.update({f'decoder_old{"9" * 50}.output_conv.weight': s[OTHER]}), 'is surplus'),
    (lambda s: s.update({OTHER: torch.zeros(1).expand(16, 10 ** 9, 2, 2)}), 'its tensors claim'),
    (lambda s: s.update({OTHER: torch.zeros(16, 1, 2, 2)}), 'with 2 to 256 classes'),
    (lambda s: s.update({OTHER: torch.zeros(16, 300, 2, 2)}), 'with 2 to 256 classes'),
    (lambda s: s.update({OTHER: torch.zeros(3)}), 'not four-dimensional'),
    (lambda s: s.update({SAME: [1.0]}), 'not a dict of tensors')])
def test_wrong_tensors_are_named(tmp_path, whole, change, message):
    state = {key: value.clone() for key, value in whole[0]['state_dict'].items()}
    change(state)
    torch.save({'state_dict': state}, tmp_path / 'x')
    with pytest.raises(UserError, match=message) as error:
        checkpoint.load_network(checkpoint.read_checkpoint(tmp_path / 'x'), 'ours')
    assert '\n' not in str(error.value) and len(str(error.value)) < 400


WRONG = [('version', 2), ('version', '1'), ('version', 0), ('version', True), ('version', None), ('epoch', -1),
         ('epoch', 2 ** 40), ('epoch', 6), ('epoch', '3'), ('epoch', None), ('epoch', 1.5), ('batch', -1),
         ('batch', 2 ** 40), ('batch', [1]), ('totals', [1]), ('totals', {'loss': 'x'}),
         ('totals', {'loss': float('nan')}), ('best_acc', 'x'), ('best_acc', None), ('best_acc', float('nan')),
         ('best_acc', float('inf')), ('best_acc', 1e9), ('best_acc', torch.zeros(2)), ('method', 'none'),
         ('method', ['ours']), ('method', 3), ('domains', 'toy'), ('domains', ['toy']), ('domains', [{'name': 'toy'}]),
         ('domains', [{'name': ['toy'], 'classes': 2}]), ('domains', [{'name': 'to\ny', 'classes': 2}]),
         ('domains', [{'name': 'toy', 'classes': '2'}]), ('domains', []), ('domains', None), ('options', 'x'),
         ('options', {1: 2}), ('options', {'lr': torch.zeros(2)}), ('options', {'domains': [['toy']]})]


@pytest.mark.parametrize('name, value', WRONG)
def test_wrong_metadata_is_named(tmp_path, name, value):
    (tmp_path / LATEST).write_bytes(saved({**content({'a.weight': torch.ones(3)}), name: value}))
    with pytest.raises(UserError) as error:
        checkpoint.read_checkpoint(tmp_path / LATEST)
    assert '\n' not in str(error.value) and name in str(error.value), error.value


def test_no_validation_yet_is_no_damage(tmp_path, whole):
    for best in (float('-inf'), 0.0, 100.0, torch.tensor(3.0)):
        assert attempt(tmp_path / 'x', saved({**whole[0], 'best_acc': best})) == 'loaded'


def test_foreign_files_may_hold_anything_in_what_is_not_used(tmp_path, whole):
    foreign = {'state_dict': whole[0]['state_dict'], 'epoch': '150 of 150', 'best_acc': -1, 'options': [1]}
    assert attempt(tmp_path / 'x', saved(foreign)) == 'loaded'


class Runs:
    """Pickled, a call of `function`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize('protocol', [0, 1, 2, 4, 5])
@pytest.mark.parametrize('function, name', [(os.mkdir, 'posix.mkdir'), (eval, 'eval'), (bytearray, 'bytearray')])
def test_pickles_that_would_run_code_are_refused_naming_the_global(tmp_path, protocol, function, name):
    """bytearray is on torch's own list of what is safe; it would take all memory."""
    victim = tmp_path / 'made'
    argument = {'eval': f'open({str(victim)!r}, "w")', 'bytearray': 10 ** 12}.get(name, str(victim))
    attack = {'state_dict': {}, 'x': Runs(function, argument)}
    raw = pickle.dumps(attack, protocol=protocol)
    forms = [archive({'archive/data.pkl': raw, 'archive/version': b'3\n', 'archive/byteorder': b'little'})]
    if protocol >= 2:
        forms += [raw, pickle.dumps(torch.serialization.MAGIC_NUMBER, protocol=2)
                  + pickle.dumps(1001, protocol=2) + pickle.dumps({}, protocol=2) + raw]
    for data in forms:
        (tmp_path / 'x').write_bytes(data)
        with pytest.raises(UserError, match=name):
            checkpoint.read(tmp_path / 'x')
    assert not victim.exists()


def peak():
    """MiB that this process has taken at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def claiming(change):
    """An archive, checksums right, of which `change` altered the pickle of a tensor of ten numbers."""
    entries = entries_of(saved({'state_dict': {'a': torch.arange(10.0)}}))
    pickled = entries['archive/data.pkl']
    assert pickled.count(b'cpuq') == 1
    changed = change(pickled)
    assert changed != pickled
    return archive({**entries, 'archive/data.pkl': changed})


def archived(pickled):
    """An archive of a pickle alone."""
    return archive({'archive/data.pkl': pickled, 'archive/version': b'3\n'})


def wide(times):
    """A pickle of a list of 1000 times a list of 1000 times ... the same: 1000^times for whoever counts."""
    return b'\x80\x02]q\x00' + b''.join(b']q' + bytes([n + 1]) + b'(' + (b'h' + bytes([n])) * 1000 + b'e'
                                        for n in range(times)) + b'.'


def claimed_entry():
    """An archive whose directory says 4 GB of an entry of 40 bytes."""
    data = archive({'archive/data.pkl': b'\x80\x02}.', 'archive/data/0': bytes(40)})
    assert data.count(struct.pack('<II', 40, 40)) == 2
    return data.replace(struct.pack('<II', 40, 40), struct.pack('<II', 2 ** 32 - 2, 2 ** 32 - 2))


def claimed_storage(pickled):
    """The pickle with a storage and a tensor of 2^31 numbers where ten are."""
    many = b'J' + struct.pack('<i', 2 ** 31 - 1)
    return pickled.replace(b'K\n\x85', many + b'\x85').replace(b'K\ntq', many + b'tq')


def old_and_claimed():
    """A file in the old format that says 40 GB."""
    data = saved({'state_dict': {'a': torch.arange(10.0)}}, _use_new_zipfile_serialization=False)
    return data.replace(b'K\nNtq', b'\x8a\x05' + (10 ** 10).to_bytes(5, 'little') + b'Ntq')


def old_without_numbers():
    """A file in the old format whose list of storages is empty: torch leaves the tensor as the memory was."""
    data, file = saved({'state_dict': {'a': torch.ones(10)}}, _use_new_zipfile_serialization=False), io.BytesIO()
    file.write(data)
    file.seek(0)
    ends = [collections.deque(pickletools.genops(file), 1) and file.tell() for _ in range(5)]
    return data[:ends[3]] + pickle.dumps([], protocol=2) + data[ends[4]:]


BOMBS = {'compressed': (lambda: archive({'archive/data.pkl': b'\x80\x02}.', 'archive/data/0': bytes(10 ** 8)},
                                        compression=zipfile.ZIP_DEFLATED), 'are compressed'),
         'entry of 4 GB claimed': (claimed_entry, 'claim 4294967.* bytes, the file has'),
         'storage of 8 GB claimed': (lambda: claiming(claimed_storage), 'damaged|claim'),
         'tensor without memory': (lambda: saved({'state_dict': {'a': torch.zeros(1).expand(10 ** 12)}}),
                                   'tensors claim 4000000000000 bytes'),
         'old format, 40 GB claimed': (old_and_claimed, 'damaged'),
         'old format without numbers': (old_without_numbers, 'it ends after'),
         'numpy type that says 1 GB': (lambda: archived(b'\x80\x02cnumpy.core.multiarray\nscalar\ncnumpy\ndtype\nX\x0b\0\0\0'
                                                         b'V1000000000\x85R\x85R.'), "a scalar of type 'V1000000000'"),
         'bytes of a long text': (lambda: archived(b'\x80\x02c_codecs\nencode\nX\xe8\x03\0\0' + b'a' * 1000
                                                    + b'X\x06\0\0\0latin1\x86R.'), 'more than a short text'),
         'bytes of a text known before': (lambda: archived(
             b'\x80\x02X\xe8\x03\0\0' + b'a' * 1000 + b'X\x06\0\0\0latin1\x86q\0c_codecs\nencode\nh\0R.'),
             'more than a short text'),
         'wide lists': (lambda: archived(wide(2)), 'not a plain dict'),
         'deep lists': (lambda: archived(b'\x80\x02' + b']' * 10 ** 5 + b'a' * (10 ** 5 - 1) + b'.'),
                        'nested too deep'),
         'attributes for methods': (lambda: archived(b'\x80\x02ccollections\nOrderedDict\n)R}X\x05\x00\x00\x00items'
                                                     b'K\x01sb.'), 'not a plain dict'),
         'a tar file': (lambda: b'state'.ljust(100, b'\0') + bytes(924), 'begins like no file of torch.save')}


@pytest.mark.parametrize('name', BOMBS)
def test_absurd_sizes_are_refused_before_they_cost_memory(tmp_path, name):
    make, message = BOMBS[name]
    (tmp_path / 'x').write_bytes(make())
    before, start = peak(), time.process_time()
    with pytest.raises(UserError, match=message) as error:
        checkpoint.read(tmp_path / 'x')
    assert '\n' not in str(error.value) and peak() - before < 300 and time.process_time() - start < 20


@pytest.fixture(scope='module')
def learnt(tmp_path_factory):
    """(options, the latest checkpoint's content) of a run stopped within its second epoch."""
    root = tmp_path_factory.mktemp('learnt')
    write_toy_roads(root / 'toy', train=3, val=1, height=32, width=64, seed=1)
    arguments = ['--data-root', str(root / 'toy'), '--savedir', str(root / 'run'), '--domains', 'CS', '--height', '32',
                 '--width', '64', '--batch-size', '2', '--num-workers', '0', '--device', 'cpu', '--num-epochs', '2',
                 '--class-weights', 'none', '--checkpoint-minutes', '0', '--seed', '1']
    real, count = train.train_batch, [0]

    def stopping(run, *batch):
        count[0] += 1
        if count[0] == 4:
            raise KeyboardInterrupt
        return real(run, *batch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, 'train_batch', stopping)
        with pytest.raises(KeyboardInterrupt):
            train.main(arguments)
    value = checkpoint.read(root / 'run' / LATEST)
    assert (value['epoch'], value['batch']) == (1, 1)
    return arguments + ['--resume'], value


def copied(value):
    """The content in dicts and lists of its own."""
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    return [copied(item) for item in value] if isinstance(value, list) else \
        value.clone() if isinstance(value, torch.Tensor) else value


def in_state(number, name, change):
    def apply(value):
        value['optimizer']['state'][number][name] = change(value['optimizer']['state'][number][name])
    return apply


def put(*keys_and_value):
    """A change that puts the last argument under the keys before it."""
    *keys, last, new = keys_and_value

    def apply(value):
        for key in keys:
            value = value[key]
        value[last] = new
    return apply


def drop(*keys):
    *keys, last = keys

    def apply(value):
        for key in keys:
            value = value[key]
        del value[last]
    return apply


# Wrong in itself, so that the previous copy is taken.
DAMAGED = [drop(name) for name in (*resume.PARTS, *checkpoint.KINDS)] + [
    put('epoch', 0), put('epoch', 2), put('epoch', 2 ** 40), put('batch', 0), put('totals', {}), put('best_acc', 'x'),
    put('method', 'lwf'), put('domains', [{'name': 'BDD', 'classes': 20}]),
    put('options', {}), put('optimizer', {}), put('optimizer', []), put('optimizer', 'state', []), put('scheduler', []),
    put('scheduler', {}), put('scaler', {'scale': 1.0}), put('scaler', None), put('teacher', 3), put('random', {}),
    put('random', 'torch', b''), put('random', 'cuda', None), put('state_dict', []),
    lambda value: value['state_dict'][FIRST].fill_(float('nan')),
    in_state(3, 'exp_avg', lambda moments: moments * float('inf'))]
# Wrong for the run that it is to resume.
UNFIT = [
    put('totals', {'loss': 1.0}),
    in_state(3, 'exp_avg', lambda moments: moments.flatten()[:1]),
    in_state(3, 'exp_avg_sq', lambda moments: moments[None]), in_state(3, 'exp_avg_sq', lambda moments: -1 - moments),
    in_state(3, 'step', lambda step: step * 0 - 1), in_state(3, 'step', lambda step: 'x'),
    in_state(3, 'exp_avg', lambda moments: moments.long()), drop('optimizer', 'state', 3, 'exp_avg'),
    drop('optimizer', 'state', 3), put('optimizer', 'state', 9999, {}), put('optimizer', 'state', 'x', {}),
    put('optimizer', 'state', {}), put('optimizer', 'param_groups', []), put('optimizer', 'param_groups', [1, 2]),
    put('optimizer', 'param_groups', 0, 'lr', 1.0), put('optimizer', 'param_groups', 0, 'betas', (0.5, 0.5)),
    put('optimizer', 'param_groups', 0, 'params', [0]), drop('optimizer', 'param_groups', 0, 'eps'),
    put('scheduler', '_last_lr', [1.0, 1.0]), put('scheduler', 'base_lrs', [1.0]), put('scheduler', '_last_lr', 'x'),
    drop('scheduler', 'base_lrs'), put('totals', {'loss': 1.0}), put('batch', 3), put('batch', 2 ** 30), put('state_dict', FIRST, torch.zeros(3)),
    drop('state_dict', FIRST), put('state_dict', 'x', torch.zeros(3)), put('state_dict', FIRST, 3),
    put('state_dict', FIRST, torch.zeros(13, 3, 3, 3).long()), put('teacher', {FIRST: torch.zeros(3)}),
    put('random', 'torch', torch.zeros(3)), put('random', 'torch', torch.zeros(3, dtype=torch.uint8))]


def test_a_checkpoint_that_contradicts_itself_gives_way_to_the_previous_one(tmp_path, learnt, capsys):
    small = copied(learnt[1])
    small['state_dict'] = {FIRST: small['state_dict'][FIRST]}
    small['optimizer']['state'] = {3: small['optimizer']['state'][3]}
    checkpoint.save(small, tmp_path / PREVIOUS)
    for number, change in enumerate(DAMAGED):
        value = copied(small)
        change(value)
        checkpoint.save(value, tmp_path / LATEST)
        assert resume.find(tmp_path, (LATEST, PREVIOUS))['file'] == PREVIOUS, number
        said = capsys.readouterr().err
        assert str(tmp_path / LATEST) in said and said.count('\n') == 1, (number, said)
    checkpoint.save(small, tmp_path / LATEST)
    assert resume.find(tmp_path, (LATEST, PREVIOUS))['file'] == LATEST


def test_what_a_term_draws_in_its_setup_does_not_move_the_random_numbers_of_a_resumed_run(learnt, monkeypatch):
    monkeypatch.setattr(CrossEntropy, 'setup', lambda self, run: torch.rand(9))
    arguments, value = learnt
    with session('cpu', 'none') as place:
        Run(parse_train(arguments), place, copied(value))
    assert torch.equal(torch.get_rng_state(), value['random']['torch'])


def test_a_checkpoint_that_does_not_fit_its_run_is_refused(learnt):
    arguments, value = learnt
    with session('cpu', 'none') as place:
        run = Run(parse_train(arguments), place, copied(value))     # as it is, it fits
        assert (run.epoch, run.batch, run.best) == (1, 1, value['best_acc']) and run.best > 0
        for number, change in enumerate(UNFIT):
            wrong = copied(value)
            change(wrong)
            with pytest.raises(UserError, match='does not fit this run') as error:
                run.restore(wrong)
                pytest.fail(f'change {number} was taken')
            assert '\n' not in str(error.value)


@pytest.mark.parametrize('name, value', [('epoch', '3'), ('best_acc', None), ('domains', [3]), ('version', 9),
                                         ('options', 5)])
def test_the_scripts_say_it_in_one_line(tmp_path, learnt, name, value):
    """--resume, --state of train.py, --state of eval.py."""
    arguments = learnt[0][:-1]
    (tmp_path / LATEST).write_bytes(saved({**learnt[1], name: value}))
    common = [*arguments[:2], *arguments[6:14]]
    for main, more in ((train.main, [*arguments, '--savedir', str(tmp_path), '--resume']),
                       (train.main, [*arguments, '--savedir', str(tmp_path / 'new'), '--domains', 'CS', 'BDD',
                                     '--state', str(tmp_path / LATEST)]),
                       (evaluation.main, [*common, '--state', str(tmp_path / LATEST)])):
        with pytest.raises(UserError, match=f'its {name} is not|version 9') as error:
            main(more)
        assert '\n' not in str(error.value)


def test_a_damaged_file_never_takes_the_place_of_the_copy_gone_on_from(tmp_path, learnt):
    """Else a second crash right then would leave nothing."""
    arguments, value = learnt
    checkpoint.save(value, tmp_path / PREVIOUS)
    (tmp_path / LATEST).write_bytes(b'damaged')
    options = parse_train([*arguments, '--savedir', str(tmp_path)])
    with session('cpu', 'none') as place:
        run = Run(options, place, resume.find(tmp_path, (LATEST, PREVIOUS)))
        run.save()
        for name in (LATEST, PREVIOUS):
            assert checkpoint.read(tmp_path / name)['batch'] == 1
        run.batch = 2
        run.save()
        assert [checkpoint.read(tmp_path / name)['batch'] for name in (LATEST, PREVIOUS)] == [2, 1]


def test_what_a_killed_run_left_half_written_is_removed(tmp_path, learnt):
    arguments, value = learnt
    checkpoint.save(value, tmp_path / LATEST)
    for name in (LATEST, BEST, 'metrics.jsonl', 'opts.json'):
        (tmp_path / f'.{name}.4711.tmp').write_bytes(b'half')
    (tmp_path / '.other.json.4711.tmp').write_bytes(b'of somebody else')
    with session('cpu', 'none') as place:
        Run(parse_train([*arguments, '--savedir', str(tmp_path)]), place, value)
    assert [path.name for path in tmp_path.glob('.*.tmp')] == ['.other.json.4711.tmp']


def test_a_directory_in_the_place_of_a_file_is_said_before_anything_is_learnt(tmp_path, learnt):
    for name in (LATEST, PREVIOUS, BEST):
        (tmp_path / name).mkdir()
        for arguments in (learnt[0], learnt[0][:-1]):
            with pytest.raises(UserError, match=f'{name} is a directory; move it away'):
                train.main([*arguments, '--savedir', str(tmp_path)])
        (tmp_path / name).rmdir()


def child(function):
    """Exit status of a forked process that calls `function`."""
    number = os.fork()
    if number == 0:
        try:
            function()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])


def dying_before(count, operations):
    """Makes the process end, as SIGKILL would end it, before file operation `count` of all that follow."""
    left = [count]

    def wrapped(real):
        def operation(*arguments, **keywords):
            if left[0] == 0:
                os._exit(9)
            left[0] -= 1
            return real(*arguments, **keywords)
        return operation
    for owner, name in operations:
        setattr(owner, name, wrapped(getattr(owner, name)))


@pytest.mark.parametrize('older, links', [(0, True), (1, False), (2, True), (2, False)])
def test_a_kill_between_any_two_file_operations_loses_nothing(tmp_path, older, links):
    """Run.save with 0, 1 or 2 checkpoints there before, on file systems with hard links and without."""
    operations = [(os, 'fsync'), (os, 'replace'), (os, 'link'), (Path, 'unlink'), (os, 'open')]
    place = SimpleNamespace(main=True)

    def run(epoch):
        return SimpleNamespace(place=place, folder=tmp_path / str(count), sound=True, check_last=lambda: None,
                               state=lambda: {'epoch': epoch, 'state_dict': {'weights': torch.full((99,), float(epoch))},
                                              'teacher': None, 'optimizer': {}})

    def dying():
        if not links:
            os.link = lambda *_: (_ for _ in ()).throw(OSError('no links here'))
        dying_before(count, operations)
        Run.save(run(older), best=True)
    for count in range(40):
        (tmp_path / str(count)).mkdir()
        for epoch in range(older):
            Run.save(run(epoch), best=True)
        status = child(dying)
        found = {}
        for name in (LATEST, PREVIOUS, BEST):
            if (tmp_path / str(count) / name).exists():
                found[name] = checkpoint.read(tmp_path / str(count) / name)['epoch']
        latest = found.get(LATEST, found.get(PREVIOUS) if not links else None)
        assert older == 0 or latest in (older - 1, older), (count, found)
        assert older == 0 or found[BEST] >= latest
        Run.save(run(older), best=True)     # the resumed run writes again
        assert checkpoint.read(tmp_path / str(count) / LATEST)['epoch'] == older
        if status == 0:
            break
        assert status == 9
    assert count >= 8 and found == {LATEST: older, BEST: older, **({PREVIOUS: older - 1} if older else {})}


def test_a_power_cut_meets_files_before_their_names_and_names_on_the_disk(tmp_path, monkeypatch):
    done = []

    def noted(name, real, what):
        def operation(*arguments):
            done.append((name, what(*arguments)))
            return real(*arguments)
        monkeypatch.setattr(os, name, operation)
    noted('fsync', os.fsync, lambda number: os.readlink(f'/proc/self/fd/{number}'))
    noted('replace', os.replace, lambda source, target: str(target))
    for _ in range(2):
        checkpoint.save({}, tmp_path / LATEST, previous=tmp_path / PREVIOUS)
    latest, temporary = str(tmp_path / LATEST), str(temporary_name(tmp_path / LATEST))
    first = [('fsync', temporary), ('replace', latest), ('fsync', str(tmp_path))]
    assert done == [*first, first[0], ('replace', str(tmp_path / PREVIOUS)), *first[1:]]


def test_a_lock_dies_with_its_process_though_its_loader_processes_live_on(tmp_path):
    reader, writer = os.pipe()

    def holder():
        with resume.lock(tmp_path):
            if os.fork() == 0:
                os.write(writer, str(os.getpid()).encode().ljust(20))
            time.sleep(60)
            os._exit(0)
    run = os.fork()
    if run == 0:
        holder()
    worker = int(os.read(reader, 20))
    with pytest.raises(UserError, match='another run is at work'):
        with resume.lock(tmp_path):
            pass
    os.kill(run, signal.SIGKILL)
    os.waitpid(run, 0)
    try:
        os.kill(worker, 0)      # it lives
        with resume.lock(tmp_path):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)


def test_a_lock_holds_in_other_threads_and_while_its_folder_is_copied(tmp_path):
    def another():
        with pytest.raises(UserError, match='another run is at work'):
            with resume.lock(tmp_path / 'run'):
                pass
    (tmp_path / 'run').mkdir()
    with resume.lock(tmp_path / 'run'):
        with ThreadPoolExecutor() as pool:
            pool.submit(another).result()
        shutil.copytree(tmp_path / 'run', tmp_path / 'copy')
        process = os.fork()
        if process == 0:
            try:
                another()
                os._exit(0)
            finally:
                os._exit(1)
        assert os.waitpid(process, 0)[1] == 0
    with resume.lock(tmp_path / 'run'):
        pass


@contextmanager
def file_size_limit(size):
    """No file grows beyond `size` bytes, for root too."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_no_room_for_a_checkpoint_is_one_line_and_keeps_the_old_one(tmp_path, learnt):
    arguments, value = learnt
    checkpoint.save(value, tmp_path / LATEST)
    data = (tmp_path / LATEST).read_bytes()
    with file_size_limit(10 ** 6):
        with pytest.raises(UserError, match='could not be written .*File too large.*; the previous file is kept'):
            train.main([*arguments, '--savedir', str(tmp_path)])
        with pytest.raises(UserError, match=r'could not be written .*File too large[^;]*$'):
            checkpoint.save(value, tmp_path / 'first')
    assert (tmp_path / LATEST).read_bytes() == data and not list(tmp_path.glob('.*.tmp'))
    train.main([*arguments, '--savedir', str(tmp_path)])
    assert checkpoint.read(tmp_path / LATEST)['epoch'] == 2


@pytest.mark.parametrize('where', ['file/below', '/proc/none', '/dev/null', 'x' * 300])
def test_a_folder_that_cannot_be_is_one_line(tmp_path, learnt, where):
    """As root too, whom no permission stops."""
    (tmp_path / 'file').write_text('')
    with pytest.raises(UserError, match='cannot be written to') as error:
        train.main([*learnt[0], '--savedir', str(tmp_path / where)])
    assert '\n' not in str(error.value)
    with pytest.raises(UserError, match='could not be written'):
        checkpoint.save({}, tmp_path / where / 'x')
    with pytest.raises(UserError, match='does not exist|is not a file'):
        checkpoint.read(tmp_path / where)


def test_a_path_that_cannot_be_looked_at_is_one_line(tmp_path):
    """Asking what is there raises, as it does in folders that one may not enter."""
    path = tmp_path / ('x' * 300)
    for look in (lambda: find_sources([path]), lambda: find_steps(path), lambda: compare.read_results([f'a={path}'])):
        with pytest.raises(UserError, match='does not exist|is not a folder|name too long'):
            look()
    with pytest.raises(UserError, match='cannot be written to'):
        check_writable('--json', path)
    assert tsne.checkpoint_pair(f'a={path},b', None) == ('a', str(path), 'b')


def test_a_lock_file_that_is_a_pipe_does_not_wait_for_a_reader(tmp_path):
    os.mkfifo(tmp_path / '.lock')
    signal.alarm(60)        # ends the tests where it waits
    try:
        with resume.lock(tmp_path):
            pass
    finally:
        signal.alarm(0)
