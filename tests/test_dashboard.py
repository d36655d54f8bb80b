"""The visdom dashboard against a real server on loopback, read back through the server's API."""
import http.server
import json
import math
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from types import SimpleNamespace

import pytest

from mdil import train
from mdil.evaluation import dashboard, history
from mdil.training import records
from mdil.utils.files import write_json

SERVER = 'from visdom.server.run_server import main; main()'
SMALL = ['--domains', 'CS', '--height', '32', '--batch-size', '4', '--num-workers', '0', '--device', 'cpu',
         '--limit-batches', '1', '--class-weights', 'none', '--server', 'http://127.0.0.1', '--env', 'a run']


class Server:
    """A visdom server in a process of its own, on a free port of loopback."""

    def __init__(self, folder):
        with socket.socket() as free:
            free.bind(('127.0.0.1', 0))
            self.port = free.getsockname()[1]
        self.folder, self.process = folder, None
        self.start()

    def start(self):
        self.process = subprocess.Popen(
            [sys.executable, '-c', SERVER, '-port', str(self.port), '-bind_local', '-env_path', f'{self.folder}/'],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while socket.socket().connect_ex(('127.0.0.1', self.port)):
            assert self.process.poll() is None, 'the visdom server did not start'
            time.sleep(0.1)

    def stop(self):
        self.process.kill()
        self.process.wait()

    def windows(self, env='a-run'):
        """{window: its content} of an environment, as the server's API tells it."""
        ask = json.dumps({'win': None, 'eid': env}).encode()
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        answer = json.load(opener.open(f'http://127.0.0.1:{self.port}/win_data', ask, timeout=20))
        return {name: window['content'] for name, window in answer.items()}

    def points(self, env='a-run'):
        """{(window, curve): [(epoch, value)]}, gaps left out."""
        return {(name, trace['name']): [point for point in zip(trace['x'], trace['y']) if point[0] is not None]
                for name, content in self.windows(env).items() if isinstance(content, dict)
                for trace in content.get('data', [])}


@pytest.fixture(scope='module')
def server(tmp_path_factory):
    pytest.importorskip('visdom')
    server = Server(tmp_path_factory.mktemp('visdom'))
    yield server
    server.stop()


def line(epoch, kd=0.0, val=('cityscapes',), lr=5e-4):
    return {'epoch': epoch, 'lr': lr,
            'train': {'loss': 1 / epoch, 'ce': 0.9 / epoch, 'kd': kd, 'images_per_second': 8.0},
            'val': {name: {'miou': 10.0 * epoch, 'loss': 0.5} for name in val}}


def write_run(folder, domains, lines, state=None, **options):
    """The records of a run, without its checkpoints."""
    folder.mkdir(exist_ok=True)
    (folder / 'metrics.jsonl').unlink(missing_ok=True)
    for entry in lines:
        records.append_metrics(folder, entry)
    write_json(folder / 'opts.json', {'versions': {'torch': '2'}, 'options': {
        'domains': domains, 'method': 'mdil', 'lr': 5e-4, 'shared_lr': 5e-6, 'state': state and str(state), **options}})
    return folder


def test_curves_lead_on_from_step_to_step(tmp_path):
    one = write_run(tmp_path / '1', ['cityscapes'], [line(1), line(2, val=()), line(3)])
    two = write_run(tmp_path / '2', ['cityscapes', 'IDD'],
                    [line(1, 0.2, ('cityscapes', 'IDD')), line(2, 0.1, (), 2.5e-4)], one / 'model_best.pth.tar')
    steps = history.history(two)
    assert [step.title for step in steps] == ['cityscapes', 'IDD'] and history.starts(steps) == [0, 3]
    lines = {plot.title: plot.lines for plot in history.curves(steps)}
    miou = lines['mIoU on the validation images']
    # an epoch that was not validated leaves no hole, the next step is not joined to this one
    assert [point for point in miou['cityscapes'] if point != history.GAP] == [(1, 10.0), (3, 30.0), (4, 10.0)]
    assert miou['cityscapes'][2] == history.GAP and miou['IDD'] == [(4, 10.0)]
    assert lines['learning rates']['learnt weights'][-1] == (5, 2.5e-4)
    assert lines['learning rates']['shared weights'] == [(4, 5e-6), (5, pytest.approx(2.5e-6))]
    assert [math.isnan(value) or value for _, value in lines['loss term kd, before its weight']['kd']] == [
        0.0, 0.0, 0.0, True, 0.2, 0.1]
    marks = dashboard.step_marks(steps)
    assert [shape['x0'] for shape in marks['shapes']] == [0.5, 3.5] and marks['annotations'][1]['text'] == 'step 2: IDD'


def test_an_epoch_in_which_nothing_was_left_to_train_has_no_speed(tmp_path):
    whole, rest = line(1), line(2)
    del rest['train']['images_per_second']
    steps = history.history(write_run(tmp_path / '1', ['cityscapes'], [whole, rest]))
    assert {plot.title: plot.lines for plot in history.curves(steps)}['speed'] == {'images/s': [(1, 8.0)]}


def test_history_takes_only_the_step_before(tmp_path):
    one = write_run(tmp_path / '1', ['BDD'], [line(1)])
    two = write_run(tmp_path / '2', ['cityscapes', 'IDD'], [line(1)], one / 'model_best.pth.tar')
    assert len(history.history(two)) == 1
    itself = write_run(tmp_path / '3', ['cityscapes'], [line(1)], tmp_path / '3/model_best.pth.tar')
    assert len(history.history(itself)) == 1
    assert history.curves(history.history(tmp_path / 'none')) == []


def test_a_run_a_reload_and_a_resumed_run_show_every_point_once(server, toy, tmp_path, capsys):
    start = [*SMALL, '--data-root', str(toy), '--savedir', str(tmp_path), '--port', str(server.port)]
    train.main([*start, '--num-epochs', '2'])
    train.main([*start, '--num-epochs', '2', '--resume'])
    latest = tmp_path / 'checkpoint.pth.tar'
    (tmp_path / 'checkpoint.previous.pth.tar').replace(latest)     # epoch 2 has to be learnt again
    train.main([*start, '--num-epochs', '2', '--resume'])
    shown, windows = server.points(), server.windows()
    lines = records.read_metrics(tmp_path)
    assert [entry['epoch'] for entry in lines] == [1, 2]
    for window, name, value in (
            ('training loss', 'loss', lambda e: e['train']['loss']),
            ('loss term ce, before its weight', 'ce', lambda e: e['train']['ce']),
            ('speed', 'images/s', lambda e: e['train']['images_per_second']),
            ('learning rates', 'learnt weights', lambda e: e['lr']),
            ('mIoU on the validation images', 'cityscapes', lambda e: e['val']['cityscapes']['miou'])):
        assert shown[window, name] == [(entry['epoch'], pytest.approx(value(entry))) for entry in lines]
    assert windows['mIoU on the validation images']['layout']['shapes'][0]['x0'] == 0.5
    assert 'num_epochs' in windows['options'] and 'a run' in windows['options']
    assert windows['pictures of cityscapes']['src'].startswith('data:image/jpeg;base64,')
    server.stop()
    server.start()                                                  # it kept what it was told to
    assert server.points() == shown
    assert 'live curves' not in capsys.readouterr().err


def options_for(folder, port, **more):
    return SimpleNamespace(port=port, server='http://127.0.0.1', env=more.pop('env', None), model_name_suffix='',
                           savedir=str(folder), **more)


def test_a_server_that_goes_away_costs_one_line_and_gets_all_when_it_is_back(server, tmp_path, capfd):
    lines = [line(epoch) for epoch in (1, 2, 3, 4)]
    folder = write_run(tmp_path / 'x', ['cityscapes'], lines[:1])
    board = dashboard.Dashboard(options_for(folder, server.port, env='gone'))
    assert server.points('gone')['training loss', 'loss'] == [(1, 1.0)]
    server.stop()
    for count in (2, 3):
        write_run(folder, ['cityscapes'], lines[:count])
        board.show(lines[count - 1])
    server.start()
    write_run(folder, ['cityscapes'], lines)
    board.show(lines[3])
    assert [epoch for epoch, _ in server.points('gone')['training loss', 'loss']] == [1, 2, 3, 4]
    out, err = capfd.readouterr()
    assert err.count('\n') == 1 and err.startswith('live curves are off, training continues: visdom at http://127.0.0.1:')
    assert out == ''


def test_training_goes_on_without_a_server(toy, tmp_path, capfd):
    with socket.socket() as unused:
        unused.bind(('127.0.0.1', 0))
        port = unused.getsockname()[1]
        train.main([*SMALL, '--data-root', str(toy), '--savedir', str(tmp_path), '--num-epochs', '2',
                    '--port', str(port)])
    assert [entry['epoch'] for entry in records.read_metrics(tmp_path)] == [1, 2]
    assert capfd.readouterr().err.count('\n') == 1


def test_a_server_that_hangs_is_given_up(tmp_path, monkeypatch, capfd):
    pytest.importorskip('visdom')
    monkeypatch.setattr(dashboard, 'TIMEOUT', 0.3)
    folder = write_run(tmp_path / 'x', ['cityscapes'], [line(1)])
    with socket.create_server(('127.0.0.1', 0)) as silent:      # takes connections and never answers
        dashboard.Dashboard(options_for(folder, silent.getsockname()[1]))
    assert capfd.readouterr().err.count('live curves are off') == 1


def test_a_server_that_is_no_visdom_is_given_up(tmp_path, capfd):
    pytest.importorskip('visdom')

    class Refusing(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.send_response(404)
            self.send_header('Content-Length', '0')
            self.end_headers()

        def log_message(self, *_):
            pass
    folder = write_run(tmp_path / 'x', ['cityscapes'], [line(1)])
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Refusing) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        dashboard.Dashboard(options_for(folder, other.server_port))
        other.shutdown()
    assert capfd.readouterr().err.count('live curves are off') == 1


def test_visdom_is_imported_only_for_a_port(tmp_path, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, 'visdom', None)        # importing it fails
    folder = write_run(tmp_path / 'x', ['cityscapes'], [line(1)])
    dashboard.Dashboard(options_for(folder, None)).show(line(1))
    assert capfd.readouterr().err == ''
    board = dashboard.Dashboard(options_for(folder, 1))
    board.show(line(1))
    err = capfd.readouterr().err
    assert err.count('\n') == 1 and 'visdom' in err and 'ModuleNotFoundError' in err


def test_names_of_environments():
    name = lambda **options: dashboard.environment_name(SimpleNamespace(**{
        'env': None, 'model_name_suffix': '', 'savedir': 'runs/ours/step2-BDD', **options}))
    assert name() == 'ours-step2-BDD'
    assert name(model_name_suffix='ours-CS1-BDD2') == 'ours-CS1-BDD2'
    assert name(env='my run/2', model_name_suffix='x') == 'my-run-2'
