"""What a command must not write: results that are there, files that it reads, devices, links, other caches."""
import json
import os
import subprocess
import sys

import pytest

from mdil import eval as evaluation, train
from mdil.datasets.domains import DOMAINS
from mdil.datasets.cache import cached
from mdil.datasets.segmentation import SegmentationDataset
from mdil.evaluation import export
from mdil.models import build_model, checkpoint
from mdil.training.options import parse_train
from mdil.training.run import BEST, LATEST, PREVIOUS, check_kept
from mdil.utils.errors import UserError
from mdil.utils.files import check_writable, write_atomically, write_text
from tests.conftest import ROOT
from tests.fill import fill

pytestmark = pytest.mark.usefixtures('shallow_module')

SMALL = ['--height', '32', '--num-epochs', '1', '--limit-batches', '1', '--batch-size', '2', '--num-workers', '0',
         '--device', 'cpu', '--class-weights', 'none']


def learn(toy, savedir, *arguments):
    train.main(['--data-root', str(toy), '--savedir', str(savedir), *SMALL, *map(str, arguments)])


def options_of(savedir, *arguments):
    return parse_train(['--domains', 'CS', 'BDD', '--savedir', str(savedir), '--state', str(savedir / 'x'), *arguments])


def snapshot(folder):
    """{name: (content, time)} of a folder, and the folder's own time."""
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}, folder.stat().st_mtime_ns


@pytest.fixture(scope='module')
def finished(toy, tmp_path_factory):
    """A finished run's folder."""
    folder = tmp_path_factory.mktemp('finished') / 'run'
    learn(toy, folder, '--domains', 'CS')
    return folder


@pytest.mark.parametrize('again', [
    ['--domains', 'CS'], ['--domains', 'BDD'], ['--domains', 'CS', 'BDD', '--state', 'elsewhere'],
    ['--domains', 'CS', '--data-root', 'nowhere']])
def test_a_repeated_command_touches_nothing(toy, finished, again):
    before = snapshot(finished)
    with pytest.raises(UserError, match='holds a result .*--resume, use another --savedir, or replace it with --overw'):
        learn(toy, finished, *again)
    assert snapshot(finished) == before


@pytest.mark.parametrize('name', [LATEST, PREVIOUS, BEST, 'metrics.jsonl'])
def test_each_file_of_a_result_is_one(tmp_path, name):
    check_kept(options_of(tmp_path))
    (tmp_path / 'opts.json').write_text('{}')       # of a run that never came to its first checkpoint
    (tmp_path / name).write_bytes(b'')
    check_kept(options_of(tmp_path))
    (tmp_path / name).write_bytes(b'x')
    with pytest.raises(UserError, match=f'holds a result .{name}'):
        check_kept(options_of(tmp_path))
    for option in ('--resume', '--overwrite'):
        check_kept(options_of(tmp_path, option))


@pytest.mark.parametrize('how', ['itself', 'link', 'hard link', 'linked folder'])
@pytest.mark.parametrize('option', [[], ['--resume'], ['--overwrite']])
def test_the_file_that_state_names_is_never_written(tmp_path, how, option):
    folder, state = tmp_path / 'run', tmp_path / 'run' / BEST
    folder.mkdir()
    state.write_bytes(b'x')
    if how == 'linked folder':
        (tmp_path / 'other').symlink_to(folder)
        state = tmp_path / 'other' / BEST
    elif how != 'itself':
        state = tmp_path / 'state'
        (os.symlink if how == 'link' else os.link)(folder / BEST, state)
    with pytest.raises(UserError, match=f'is the file {BEST} of --savedir, which the run would write'):
        check_kept(parse_train(['--domains', 'CS', 'BDD', '--savedir', str(folder), '--state', str(state), *option]))


def test_resume_without_a_checkpoint_keeps_what_else_there_is(toy, tmp_path):
    (tmp_path / BEST).write_bytes(b'x')
    with pytest.raises(UserError, match=f'holds {BEST} but no {LATEST} to continue from.*--overwrite'):
        learn(toy, tmp_path, '--domains', 'CS', '--resume')
    assert (tmp_path / BEST).read_bytes() == b'x'


@pytest.mark.parametrize('failed', [LATEST, BEST])
def test_a_run_whose_first_checkpoint_was_not_written_is_resumed(toy, tmp_path, monkeypatch, failed):
    """Its metrics are there, and perhaps its best network; later epochs have an older checkpoint."""
    whole = checkpoint.write_atomically

    def full(path, *arguments):
        if path.name == failed:
            raise UserError('disk full')
        whole(path, *arguments)
    with monkeypatch.context() as patch, pytest.raises(UserError, match='disk full'):
        patch.setattr(checkpoint, 'write_atomically', full)
        learn(toy, tmp_path, '--domains', 'CS', '--num-epochs', '2')
    assert (tmp_path / 'metrics.jsonl').read_text().count('\n') == 1
    assert (tmp_path / BEST).exists() is (failed == LATEST) and not (tmp_path / LATEST).exists()
    learn(toy, tmp_path, '--domains', 'CS', '--num-epochs', '2', '--resume')
    assert checkpoint.read(tmp_path / LATEST)['epoch'] == 2
    assert [json.loads(line)['epoch'] for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()] == [1, 2]
    (tmp_path / LATEST).unlink()
    (tmp_path / PREVIOUS).unlink(missing_ok=True)
    with pytest.raises(UserError, match=f'metrics.jsonl but no {LATEST}'):
        learn(toy, tmp_path, '--domains', 'CS', '--num-epochs', '2', '--resume')


def test_overwrite_replaces_the_whole_result_once_the_run_can_begin(toy, tmp_path):
    for name in (LATEST, PREVIOUS, BEST):
        (tmp_path / name).write_bytes(b'old')
    (tmp_path / 'metrics.jsonl').write_text('{"epoch": 7}\n')
    with pytest.raises(UserError, match='no train images'):
        learn(toy / 'nowhere', tmp_path, '--domains', 'CS', '--overwrite')
    assert (tmp_path / BEST).read_bytes() == b'old' and 'epoch' in (tmp_path / 'metrics.jsonl').read_text()
    learn(toy, tmp_path, '--domains', 'CS', '--overwrite')
    assert not (tmp_path / PREVIOUS).exists() and checkpoint.read(tmp_path / BEST)['epoch'] == 1
    assert len((tmp_path / 'metrics.jsonl').read_text().splitlines()) == 1


def test_overwrite_and_resume_contradict():
    with pytest.raises(UserError, match='--overwrite.* not allowed with .*--resume'):
        parse_train(['--domains', 'CS', '--savedir', 'S', '--resume', '--overwrite'])


def test_links_are_followed_and_stay(tmp_path):
    (tmp_path / 'far').mkdir()
    for name in ('there', 'not yet'):
        (tmp_path / name).symlink_to(tmp_path / 'far' / name)
    (tmp_path / 'far/there').write_text('old')
    for name in ('there', 'not yet'):
        check_writable('--json', tmp_path / name)
        write_text(tmp_path / name, 'new')
        assert (tmp_path / name).is_symlink() and (tmp_path / 'far' / name).read_text() == 'new'
    assert not list(tmp_path.rglob('*.tmp'))


def test_a_linked_checkpoint_keeps_its_previous_one_on_another_file_system(tmp_path, monkeypatch):
    """Neither a link nor a move goes from one to another."""
    def other_file_system(source, target, real=os.replace):
        if str(source).startswith(str(tmp_path / 'far')) != str(target).startswith(str(tmp_path / 'far')):
            raise OSError(18, 'Invalid cross-device link')
        return real(source, target)
    monkeypatch.setattr(os, 'replace', other_file_system)
    monkeypatch.setattr(os, 'link', other_file_system)
    (tmp_path / 'far').mkdir()
    (tmp_path / 'latest').symlink_to(tmp_path / 'far/latest')
    for text in (b'one', b'two'):
        write_atomically(tmp_path / 'latest', lambda file, text=text: file.write(text), previous=tmp_path / 'previous')
    assert (tmp_path / 'latest').read_bytes() == b'two' and (tmp_path / 'previous').read_bytes() == b'one'


WRITES = ("import sys; from mdil.utils.files import check_writable, write_text\n"
          "print('before'); check_writable('--json', sys.argv[1]); write_text(sys.argv[1], 'json\\n'); print('after')")


def writing(path, **how):
    return subprocess.run([sys.executable, '-c', WRITES, str(path)], cwd=ROOT, check=True, **how)


def test_standard_output_is_written_to_whatever_it_is(tmp_path):
    """A pipe, and a file, of which neither the place nor the content so far is lost."""
    assert writing('/dev/stdout', stdout=subprocess.PIPE, text=True).stdout == 'before\njson\nafter\n'
    with open(tmp_path / 'out', 'w') as file:
        file.write('already\n')
        file.flush()
        writing('/dev/stdout', stdout=file)
    assert (tmp_path / 'out').read_text() == 'already\nbefore\njson\nafter\n'


def test_devices_and_pipes_are_written_to(tmp_path):
    before = os.stat('/dev/null').st_ino
    write_text('/dev/null', 'x')
    assert os.stat('/dev/null').st_ino == before
    os.mkfifo(tmp_path / 'pipe')
    reader = subprocess.Popen(['cat', tmp_path / 'pipe'], stdout=subprocess.PIPE, text=True)
    check_writable('--json', tmp_path / 'pipe')
    write_text(tmp_path / 'pipe', 'through')
    assert reader.communicate()[0] == 'through' and (tmp_path / 'pipe').is_fifo()
    with pytest.raises(UserError, match='/dev/full could not be written .No space left'):
        write_text('/dev/full', 'x')


def test_no_tool_writes_to_the_file_that_it_reads(toy, tmp_path):
    checkpoint.save({'state_dict': fill(build_model([20])).state_dict()}, tmp_path / 'x')
    content = (tmp_path / 'x').read_bytes()
    with pytest.raises(UserError, match='--json .*x is a file that is read'):
        evaluation.main(['--state', str(tmp_path / 'x'), '--domains', 'CS', '--data-root', str(toy), '--json',
                         str(tmp_path / 'x')])
    (tmp_path / 'link').symlink_to('x')
    with pytest.raises(UserError, match='OUT .*link is a file that is read'):
        export.main([str(tmp_path / 'x'), str(tmp_path / 'link')])
    assert (tmp_path / 'x').read_bytes() == content


def test_a_cache_outlives_those_of_other_selections_and_not_a_change_of_its_files(toy, tmp_path):
    folder, data = tmp_path / 'cache', [SegmentationDataset(DOMAINS['BDD'], toy, 'train', (16, 32)) for _ in range(3)]
    data[1].pairs = data[1].pairs[:-1]
    found = [cached(part, folder).stored.folder for part in data[:2]]
    assert all(path.is_dir() for path in found) and cached(data[0], folder).stored.folder == found[0]
    sources = json.loads((found[1] / 'sources.json').read_text())
    sources[str(data[0].pairs[0].image)][1] -= 1        # as if the image had changed since
    (found[1] / 'sources.json').write_text(json.dumps(sources))
    data[2].pairs = data[2].pairs[:3]
    assert cached(data[2], folder).stored.folder.is_dir()
    assert found[0].is_dir() and not found[1].exists()
