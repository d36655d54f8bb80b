"""The HTML report: complete, self-contained, and made of whatever there is."""
import base64
import io
import json
import re
import shutil
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from PIL import Image

from mdil import eval as evaluation, train
from mdil.evaluation import branches, lineage, report
from mdil.utils.errors import UserError
from tests.test_dashboard import line, write_run

pytestmark = pytest.mark.usefixtures('shallow_module')

SMALL = ['--height', '32', '--num-workers', '0', '--device', 'cpu']


@pytest.fixture(scope='module')
def sequence(toy, tmp_path_factory):
    """A sequence of two steps, as the trainer scripts leave it."""
    root, states = tmp_path_factory.mktemp('runs') / 'mdil', []
    for step, domains in enumerate((['cityscapes'], ['cityscapes', 'IDD']), 1):
        folder = root / f'step{step}-{domains[-1]}'
        train.main(['--domains', *domains, '--data-root', str(toy), '--savedir', str(folder), '--num-epochs', '2',
                    '--batch-size', '4', '--model-name-suffix', '<b>bold</b>', '--method', 'mdil', *SMALL,
                    *(['--state', str(states[-1])] if states else [])])
        states.append(folder / 'model_best.pth.tar')
    evaluation.main(['--state', *map(str, states), '--data-root', str(toy), '--json', str(root / 'results.json'),
                     *SMALL])
    return root


@pytest.fixture(scope='module')
def text(sequence):
    """The report of the sequence."""
    return made(sequence)


@pytest.fixture
def no_curves(monkeypatch):
    """Leaves the curves out, for reports that are made for something else."""
    monkeypatch.setattr(report, 'curves', lambda steps: [])


@pytest.fixture
def copied(sequence, tmp_path):
    """A copy of the sequence to break."""
    return shutil.copytree(sequence, tmp_path / 'mdil')


class Page(HTMLParser):
    """What a page shows and what it refers to."""

    def __init__(self, text):
        super().__init__()
        self.shown, self.addresses, self.tags = [], [], []
        self.feed(text)
        self.text = ' '.join(' '.join(self.shown).split())

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ('src', 'href', 'srcset', 'data', 'action')]

    def handle_data(self, data):
        self.shown.append(data)


def made(folder, *arguments):
    """The report of a folder as text."""
    report.main([str(folder), '--device', 'cpu', *map(str, arguments)])
    return (folder / 'report.html').read_text()


def contents(page, kind):
    """Bytes of the pictures of a MIME type."""
    return [base64.b64decode(address.split(',')[1]) for address in page.addresses
            if address.startswith(f'data:{kind};base64,')]


def test_everything_is_in_the_file(text, sequence):
    page, results = Page(text), json.loads((sequence / 'results.json').read_text())
    for step in results['steps']:
        for entry in step['domains'].values():
            assert f'{entry["miou"]:.2f}' in page.text and f'{entry["accuracy"]:.2f}' in page.text
    revision = json.loads((sequence / 'step1-cityscapes/opts.json').read_text())['versions']['git']
    for words in ('1 (cityscapes)', '2 (IDD)', 'forgetting', 'autorickshaw', 'traffic light', str(revision),
                  'shared_lr', '<b>bold</b>', '2 of 2 epochs', 'learning rates', 'Predictions'):
        assert words in page.text, words
    assert 'b' not in page.tags         # the name was escaped
    # input, truth and one prediction for IDD, two for cityscapes
    pictures = [Image.open(io.BytesIO(data)) for data in contents(page, 'image/jpeg')]
    assert [picture.size for picture in pictures] == [(320, 160)] * 7        # enlarged five times
    plots = [ElementTree.fromstring(data) for data in contents(page, 'image/svg+xml')]
    assert len(plots) == 7 and all(plot.tag.endswith('svg') for plot in plots)


def test_the_file_asks_for_nothing_outside(text):
    page = Page(text)
    assert page.addresses and all(address.startswith('data:') for address in page.addresses)
    assert not {'script', 'link', 'iframe', 'object', 'base'} & set(page.tags)
    assert 'url(' not in text and '@import' not in text
    for data in contents(page, 'image/svg+xml'):
        assert not re.search(rb'(?:href|src)="(?!#)', data)


def test_a_running_sequence(copied):
    (copied / 'results.json').unlink()
    (copied / 'step2-IDD/model_best.pth.tar').unlink()
    metrics = copied / 'step2-IDD/metrics.jsonl'
    first = metrics.read_text().splitlines()[0]
    metrics.write_text(first + '\n{"epoch": 2, "tr')          # as a crash leaves it
    page = Page(made(copied))
    assert 'Not evaluated yet' in page.text and '1 of 2 epochs' in page.text
    assert f'{json.loads(first)["val"]["IDD"]["miou"]:.2f}' in page.text
    assert len(contents(page, 'image/jpeg')) == 3
    metrics.unlink()
    (copied / 'step1-cityscapes/metrics.jsonl').unlink()
    page = Page(made(copied))
    assert 'Nothing is validated yet' in page.text and 'No epoch is finished yet' in page.text
    (copied / 'step1-cityscapes/model_best.pth.tar').unlink()
    assert 'No step has a best checkpoint yet' in Page(made(copied)).text


def test_steps_not_yet_evaluated_and_a_single_run(copied, no_curves):
    results = json.loads((copied / 'results.json').read_text())
    evaluated = {**results, 'steps': results['steps'][:1], 'domains': results['steps'][0]['domains']}
    (copied / 'results.json').write_text(json.dumps(evaluated))
    assert 'Not evaluated so far: IDD.' in Page(made(copied)).text
    page = Page(made(copied / 'step2-IDD'))
    assert 'Not evaluated yet' in page.text and len(contents(page, 'image/jpeg')) == 6


def test_the_pictures_are_of_the_evaluated_checkpoints(copied, no_curves):
    assert 'after step 2 (IDD), best epoch' in made(copied)
    file = copied / 'results.json'
    file.write_text(file.read_text().replace('model_best', 'checkpoint'))
    text = made(copied)
    assert 'after step 2 (IDD), last epoch' in text and 'best epoch, mIoU' not in text


def test_a_joined_file_in_place_of_a_best_one_has_no_pictures(copied, no_curves):
    best = copied / 'step2-IDD' / 'model_best.pth.tar'
    branches.main(['remove', str(best), '--domain', 'cityscapes', '--out', str(copied / 'rest.pth.tar')])
    shutil.move(copied / 'rest.pth.tar', best)
    page = Page(made(copied))
    assert 'after step 1 (cityscapes)' in page.text and 'after step 2 (IDD), mIoU of this image' not in page.text


def test_images_elsewhere_or_nowhere(copied, no_curves, toy, tmp_path):
    page = Page(made(copied, '--data-root', tmp_path / 'gone'))
    assert page.text.count('No pictures:') == 2 and not contents(page, 'image/jpeg')
    page = Page(made(copied, '--data-root', tmp_path / 'gone', '--data', f'CS={toy}/cityscapes'))
    assert page.text.count('No pictures:') == 1 and len(contents(page, 'image/jpeg')) == 4


def test_bad_input_is_said_and_spoils_nothing(copied, no_curves, tmp_path):
    before = made(copied)
    for damaged in ('{"steps": [', '[]', '{"steps": [], "protocol": {}, "summary": {}}', '{"steps": [{}]}'):
        (copied / 'results.json').write_text(damaged)
        with pytest.raises(UserError, match='results.json is not a result of eval.py'):
            made(copied)
    assert (copied / 'report.html').read_text() == before
    (copied / 'results.json').unlink()
    record = next(copied.rglob('opts.json'))
    good = json.loads(record.read_text())
    for options in (None, [], {'domains': [1]}, {'method': ['mdil']}, {'shared_lr': 'x', 'domains': ['CS', 'IDD']}):
        record.write_text(json.dumps({'options': options, 'versions': 3}))
        with pytest.raises(UserError, match=f'{record} was not written by a run; move the file away, or fix it'):
            made(copied)
    for damaged in ('{"options": {', '[]', '3'):
        record.write_text(damaged)
        with pytest.raises(UserError, match=f'{record} was not written by a run'):
            made(copied)
    record.write_text(json.dumps({**good, 'versions': 3}))
    made(copied)
    (tmp_path / 'empty').mkdir()
    with pytest.raises(UserError, match='holds no run'):
        made(tmp_path / 'empty')
    with pytest.raises(UserError, match='is not a folder'):
        made(tmp_path / 'nowhere')


def test_an_out_that_cannot_be_written_is_said_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(report, 'page', lambda *_: pytest.fail('worked first'))
    with pytest.raises(UserError, match=f'--out {tmp_path} is a folder'):
        made(tmp_path, '--out', tmp_path)
    with pytest.raises(UserError, match='model_best.pth.tar: the report is an HTML file'):
        made(tmp_path, '--out', tmp_path / 'model_best.pth.tar')


def test_steps_are_in_the_order_of_their_numbers(tmp_path):
    for name in ('step10-a', 'step2-b', 'step1-c'):
        write_run(tmp_path / name, ['IDD'], [])
    assert [step.folder.name for step in report.find_steps(tmp_path)] == ['step1-c', 'step2-b', 'step10-a']


def test_a_folder_that_cannot_be_listed_is_one_line(tmp_path, monkeypatch):
    """As root too, whom no permission stops."""
    def denied(path):
        raise PermissionError(13, 'Permission denied')
    monkeypatch.setattr('pathlib.Path.iterdir', denied)
    with pytest.raises(UserError, match=f'{tmp_path} cannot be read: Permission denied; make it readable'):
        made(tmp_path)


def runs_of(folder, **options):
    """Records of cityscapes and camvid, one after the other, and of an experiment that started from another file."""
    folder.mkdir(exist_ok=True)
    for name, domains, state in (('1', ['cityscapes'], None), ('2', ['cityscapes', 'camvid'], '1'),
                                 ('t8', ['cityscapes', 'camvid', 'BDD'], 'elsewhere')):
        write_run(folder / name, domains, [line(1, 0.1, domains)], state and f'runs/{state}/model_best.pth.tar',
                  savedir=f'runs/{name}', **options)
    return folder


def shown(folder):
    """Names of the folders of the sequence in `folder`."""
    return [step.folder.name for step in report.chosen([folder], report.read_results(folder))[0]]


def test_a_run_of_another_sequence_is_left_out_and_named(tmp_path, no_curves, capsys):
    folder = runs_of(tmp_path / 'moved')
    page, left = Page(made(folder)), f'Left out, because not part of this sequence: {folder}/t8.'
    assert left in page.text and left in capsys.readouterr().out
    assert 'step 3' not in page.text.lower() and 'Step 1 (cityscapes): 1 of ? epochs; step 2 (camvid)' in page.text
    write_run(folder / '3', ['cityscapes', 'camvid', 'BDD'], [line(1)], folder / '2/model_best.pth.tar', method='mdil')
    assert shown(folder) == ['1', '2', '3']
    write_run(folder / '2b', ['cityscapes', 'camvid'], [line(1)], folder / '1/model_best.pth.tar')
    assert shown(folder) == ['1', '2', '3'] and shown(folder / 't8') == ['t8']
    (folder / '1/opts.json').unlink()       # nothing is known about it
    assert shown(folder) == ['2', '3']


def test_of_several_sequences_one_has_to_be_named(tmp_path, no_curves):
    folder = runs_of(tmp_path / 'runs')
    write_run(folder / '2b', ['cityscapes', 'IDD'], [line(1)], folder / '1/model_best.pth.tar')
    with pytest.raises(UserError, match=f'{folder}/2 and {folder}/2b are not steps of one sequence; name the folders of '
                       f'one: python -m mdil report {folder}/1 {folder}/2 --out FILE'):
        made(folder)
    with pytest.raises(UserError, match='name the HTML file, too, with --out'):
        report.main([str(folder / '1'), str(folder / '2b')])
    out = tmp_path / 'x.html'
    report.main([*(str(folder / name) for name in ('1', '2b', 't8')), '--out', str(out), '--device', 'cpu'])
    page = Page(out.read_text())
    assert 'step 2 (IDD): 1 of' in page.text and f'sequence: {folder}/t8.' in page.text
    for single in ('1', 't8'):
        with pytest.raises(UserError, match='are not steps of one sequence'):
            lineage.sequence(report.find_steps(folder / single) + report.find_steps(write_run(tmp_path / 's', ['IDD'], [])))


def test_the_sequence_is_the_one_that_was_evaluated(copied, no_curves, capsys):
    write_run(copied / 'other', ['cityscapes', 'BDD'], [line(1)], copied / 'step1-cityscapes/model_best.pth.tar')
    assert shown(copied) == ['step1-cityscapes', 'step2-IDD']
    out = copied / 'x.html'
    report.main([str(copied / 'step1-cityscapes'), str(copied / 'other'), '--out', str(out), '--device', 'cpu'])
    said = f'Left out, because of other runs (step2-IDD): {copied}/results.json.'
    assert said in capsys.readouterr().out and said in Page(out.read_text()).text and 'Not evaluated' in out.read_text()


@pytest.mark.parametrize('method', ['adapters-only', 'mdil'])
def test_steps_learnt_in_parallel_are_shown_if_they_can_be_joined(tmp_path, no_curves, method):
    base = write_run(tmp_path / 'step1-CS', ['cityscapes'], [line(1)], method=method)
    for number, name in ((2, 'BDD'), (3, 'IDD')):
        write_run(tmp_path / f'step{number}-{name}', ['cityscapes', name], [line(1)], base / 'model_best.pth.tar',
                  method=method)
    if method == 'mdil':
        with pytest.raises(UserError, match='are not steps of one sequence'):
            made(tmp_path)
    else:
        assert 'step 3 (IDD): 1 of ? epochs. Step 3 (IDD) started from step 1.' in Page(made(tmp_path)).text


@pytest.mark.parametrize('state, savedir, whole', [
    ('runs/1', 'runs/1', True), ('/gone/runs/1', 'runs/1', True), ('runs/1', '/gone/runs/1', True),
    ('/gone/runs/1', '/gone/./runs/1', True), ('/gone/1', 'runs/1', False), ('other/1', 'runs/1', False),
    ('/tmp/gone/1', '/gone/1', False)])
def test_steps_that_moved_together_are_one_sequence(tmp_path, state, savedir, whole):
    write_run(tmp_path / 'a', ['cityscapes'], [line(1)], savedir=savedir)
    write_run(tmp_path / 'b', ['cityscapes', 'IDD'], [line(1)], f'{state}/checkpoint.pth.tar', savedir='runs/2')
    runs = report.find_steps(tmp_path)
    assert len(lineage.chain(runs[1], runs)) == 1 + whole
