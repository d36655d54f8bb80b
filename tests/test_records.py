"""What a run says and leaves of its epochs: validations, the best and the last, TensorBoard."""
import contextlib
import io
import json
import platform
import re
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch

from mdil import eval as evaluation
from mdil import train
from mdil.evaluation import epochs, report, tables
from mdil.evaluation.history import StepRecord
from mdil.evaluation.evaluation import Score
from mdil.evaluation.scalars import Scalars
from mdil.training import options, records
from mdil.utils import precision
from mdil.utils.errors import UserError
from mdil.utils.parallel import Place

SMALL = ['--height', '32', '--batch-size', '2', '--limit-batches', '1', '--num-workers', '0', '--device', 'cpu']


@pytest.fixture(scope='module')
def run(toy, tmp_path_factory):
    """Folder of a run of four epochs that is validated every third, and what it said."""
    folder = tmp_path_factory.mktemp('records') / 'run'
    # A distance that rounding turns negative.
    with pytest.MonkeyPatch.context() as patch:
        said, batch = [], train.train_batch
        patch.setattr(train, 'train_batch', lambda *given: {**batch(*given), 'kd': torch.tensor(-1e-9)})
        patch.setattr('builtins.print', lambda *words, **_: said.append(' '.join(map(str, words))))
        train.main(['--domains', 'CS', '--savedir', str(folder), '--data-root', str(toy), '--num-epochs', '4', *SMALL,
                    '--val-every', '3', '--model-name-suffix', 'OURS-CS1', *(['--tensorboard'] if find_spec('tensorboard') else [])])
    return folder, said


def test_the_first_and_the_last_epoch_are_validated_too(run):
    lines = records.read_metrics(run[0])
    assert [line['epoch'] for line in lines if line['val']] == [1, 3, 4]


def test_the_rate_decays_once_an_epoch(run):
    rates = [line['lr'] for line in records.read_metrics(run[0])]
    assert rates == pytest.approx([5e-4 * (1 - epoch / 4) ** 0.9 for epoch in range(4)])


def test_no_figure_is_minus_zero(run):
    shown = [line for line in run[1] if line.startswith('epoch ')]
    assert len(shown) == 4 and all('kd 0.0000' in line and '-0.0' not in line for line in shown)


def test_a_small_distance_is_not_shown_as_none():
    assert [tables.fine(value) for value in (3.2e-6, 0.00004, 0.00005, 1.23456, 0.0, None)] == [
        '3.2e-06', '4.0e-05', '0.0001', '1.2346', '0.0000', '-']


def test_a_run_is_called_by_its_suffix_and_ends_with_its_best_epoch(run):
    folder, said = run
    assert said[0].startswith('learning cityscapes (mdil, erfnet, OURS-CS1) at 64x32 on cpu')
    scores = {line['epoch']: line['val']['cityscapes']['miou'] for line in records.read_metrics(folder) if line['val']}
    best = max(scores, key=scores.get)
    assert said[-1] == (f'{folder}: best epoch {best}, mIoU {scores[best]:.2f} (cityscapes); '
                        f'last epoch 4, mIoU {scores[4]:.2f}')


def test_no_name_of_a_run_leads_out_of_the_tensorboard_folder(tmp_path):
    pytest.importorskip('tensorboard')
    for name in ('..', '../..', '/..'):
        options = SimpleNamespace(savedir=tmp_path, model_name_suffix=name)
        with contextlib.suppress(UserError):
            Scalars(options).writer.close()
    assert [path.name for path in tmp_path.iterdir()] in ([], ['tensorboard'])


def test_tensorboard_shows_the_records(run):
    reader = pytest.importorskip('tensorboard.backend.event_processing.event_accumulator')
    found = reader.EventAccumulator(str(run[0] / 'tensorboard/OURS-CS1'))
    found.Reload()
    lines = records.read_metrics(run[0])
    for tag, values in (('training/loss', {line['epoch']: line['train']['loss'] for line in lines}),
                        ('training/kd', {line['epoch']: -1e-9 for line in lines}),
                        ('learning rate', {line['epoch']: line['lr'] for line in lines}),
                        ('validation mIoU/cityscapes', {line['epoch']: line['val']['cityscapes']['miou']
                                                        for line in lines if line['val']})):
        assert {event.step: event.value for event in found.Scalars(tag)} == pytest.approx(values, rel=1e-6), tag


def test_a_file_in_the_place_of_tensorboards_folder_is_said(tmp_path):
    pytest.importorskip('tensorboard')
    (tmp_path / 'tensorboard').touch()
    with pytest.raises(UserError, match='--tensorboard .*tensorboard/x cannot be written to'):
        Scalars(SimpleNamespace(savedir=tmp_path, model_name_suffix='x'))


def test_tensorboard_that_is_not_installed_is_said(monkeypatch):
    monkeypatch.setattr(options.importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(UserError, match='needs the package tensorboard, which is not installed: pip install'):
        options.parse_train(['--domains', 'CS', '--savedir', 'S', '--tensorboard'])


@pytest.mark.parametrize('published, expected', [(False, 100 * 3 / 4), (True, 100 * 1 / 2)])
def test_validations_have_the_metric_that_is_asked_for(monkeypatch, published, expected):
    """Three classes, one of which occurs nowhere: IoU 1 and 1/2, and nothing or 0."""
    matrix = torch.tensor([[4, 0, 0, 0], [0, 2, 0, 2], [0, 0, 0, 0], [0, 9, 9, 0]])
    monkeypatch.setattr(train, 'evaluate', lambda *_: Score(matrix, 0.5))
    data = SimpleNamespace(index=0, val=[1], class_weights=None, domain=SimpleNamespace(name='CS'))
    run = SimpleNamespace(student=torch.nn.Identity(), place=Place(torch.device('cpu')), data=[data],
                          options=SimpleNamespace(published_metric=published, precision='fp32'))
    assert train.validate(run) == {'CS': {'loss': 0.5, 'miou': pytest.approx(expected)}}


def test_the_best_model_is_that_of_the_highest_mean_over_what_is_learnt(monkeypatch):
    saved = []
    run = SimpleNamespace(best=float('-inf'), learnt=['CS', 'IDD'], place=SimpleNamespace(main=False), options=SimpleNamespace(num_epochs=9),
                          schedule=SimpleNamespace(get_last_lr=lambda: [0.1]), end_epoch=dict,
                          save=lambda best: saved.append((best, run.best)))
    for mious in ((10, 50), (40, 30), (20, 50), None, (60, 20)):
        val = {name: {'miou': miou} for name, miou in zip(('CS', 'IDD'), mious)} if mious else {}
        monkeypatch.setattr(train, 'validate_when_due', lambda *_, val=val: val)
        train.finish_epoch(run, 1.0, [], None)
    assert saved == [(True, 30), (True, 35), (False, 35), (False, 35), (True, 40)]


def line_of(epoch, **mious):
    return {'epoch': epoch, 'val': {name: {'miou': miou, 'loss': 1.0} for name, miou in mious.items()},
            'train': {'loss': 1.0}, 'lr': 0.1}


def test_the_best_epoch_is_that_of_what_is_learnt():
    lines = [line_of(1, CS=90, BDD=20), line_of(2), line_of(3, CS=10, BDD=40), line_of(4, CS=50, BDD=40), line_of(5, CS=99)]
    assert [line['epoch'] for line in records.best_and_last(lines, ['BDD'])] == [3, 4]
    assert [line['epoch'] for line in records.best_and_last(lines, ['CS', 'BDD'])] == [1, 4]
    assert records.best_and_last(lines, ['IDD']) == records.best_and_last([], ['CS']) == (None, None)


def test_the_report_shows_the_last_epoch_beside_the_best():
    lines = [line_of(1, CS=90, BDD=20), line_of(2, CS=80, BDD=45), line_of(3, CS=70, BDD=40)]
    step = StepRecord(None, {'options': {'domains': ['CS', 'BDD'], 'method': 'mdil'}}, lines)
    assert report.training_table([step]).groups[0] == [
        ['1 (BDD), best', '2', '80.00', '45.00'], ['1 (BDD), last', '3', '70.00', '40.00']]


@pytest.mark.parametrize('file, which', [('model_best.pth.tar', 'best'), ('checkpoint.pth.tar', 'last')])
def test_eval_says_of_which_epoch_a_checkpoint_is(run, toy, tmp_path, capsys, file, which):
    folder = run[0]
    evaluation.main(['--state', str(folder / file), '--data-root', str(toy), '--json', str(tmp_path / 'x.json'),
                     *SMALL])
    found = json.loads((tmp_path / 'x.json').read_text())['steps'][0]['training']
    best, last = records.best_and_last(records.read_metrics(folder), ['cityscapes'])
    assert found == {'file': which, 'step': 1, 'learnt': ['cityscapes'],
                     **{name: {'epoch': line['epoch'], 'miou': line['val']['cityscapes']['miou']}
                        for name, line in (('best', best), ('last', last))}}
    shown = ' '.join(capsys.readouterr().out.split())
    assert 'The best epoch and the last' in shown
    assert (f'1 (cityscapes) {which} {best["epoch"]} {tables.number(found["best"]["miou"])} 4 '
            f'{tables.number(found["last"]["miou"])}') in shown


def test_nothing_is_said_of_a_checkpoint_without_records(tmp_path):
    assert epochs.training_of(tmp_path / 'model_best.pth.tar') is None
    (tmp_path / 'metrics.jsonl').write_text(json.dumps(line_of(1, CS=1.0)) + '\n')
    (tmp_path / 'opts.json').write_text(json.dumps({'options': {'domains': ['CS'], 'method': 'mdil'}}))
    assert epochs.training_of(tmp_path / 'model_best.pth.tar')['best'] == {'epoch': 1, 'miou': 1.0}
    assert epochs.training_of(tmp_path / 'copy.pth.tar') is None
    (tmp_path / 'opts.json').write_text('[1]')      # of another program
    assert epochs.training_of(tmp_path / 'copy.pth.tar') is None


@pytest.mark.parametrize('device, says', [('cpu', 'Xeon, AVX2, 1 thread'), ('mps', 'mps')])
def test_the_device_is_recorded_that_was_used(device, says, monkeypatch):
    monkeypatch.setattr(torch, 'get_num_threads', lambda: 1)
    monkeypatch.setattr(records, 'processor', lambda: 'Xeon, AVX2')
    assert records.environment(torch.device(device))['device'] == says


def test_the_processor_has_a_name_with_and_without_linux(monkeypatch):
    monkeypatch.setattr(precision, 'open', lambda path: io.StringIO('processor : 0\nmodel name\t: A CPU: B\nmodel name\t: C\n'),
                        raising=False)
    assert re.fullmatch(r'A CPU: B, \w+', records.processor())
    monkeypatch.setattr(precision, 'open', missing, raising=False)
    monkeypatch.setattr(platform, 'processor', lambda: '')
    assert records.processor().startswith(f'{platform.machine()}, ')


def missing(path):
    raise FileNotFoundError(path)
