"""What machines, environments and numbers at their limits do: handled, or one line with the remedy."""
import math
import os
import resource
import socketserver
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mdil import train
from mdil.__main__ import TOOLS, run as run_tool
from mdil.datasets import DOMAINS, SegmentationDataset
from mdil.datasets.loading import EvalBatches, TrainBatches, check_shared_memory, make_loader
from mdil.eval import eval_parser
from mdil.evaluation import dashboard, history
from mdil.evaluation.evaluation import split_of
from mdil.models import checkpoint
from mdil.training import building, domain_data, records
from mdil.training.options import parse_train, train_parser
from mdil.training.run import BEST, LATEST, Run
from mdil.utils import launch
from mdil.utils.errors import UserError, advice, first_to_fail
from mdil.utils.parallel import Place, allow_open_files
from mdil.utils.parser import home_in
from tests.conftest import ROOT
from tests.test_commands import learn

CPU = torch.device('cpu')


@pytest.mark.parametrize('message, remedy', [
    ('DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that workers are out of shared memory.',
     'docker run --shm-size'),
    ('unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)', 'docker run --shm-size'),
    ('Caught OSError in DataLoader worker process 0.\n[Errno 24] Too many open files', 'ulimit -n'),
    ('received 0 items of ancdata', 'ulimit -n'), ('[Errno 12] Cannot allocate memory', 'memory of this machine is full'),
    ("DefaultCPUAllocator: can't allocate memory: you tried", 'memory of this machine is full'),
    ('DataLoader worker (pid 7) is killed by signal: Killed.', 'lower --num-workers'),
    ('[../gloo/transport/tcp/pair.cc:534] Connection closed by peer', 'another process of this run has ended')])
def test_what_a_machine_lacks_is_said_with_its_remedy(message, remedy):
    assert remedy in advice(RuntimeError(message))
    assert 'memory of this machine is full' in advice(MemoryError())
    assert advice(RuntimeError('some fault of ours')) is None


def test_a_small_shared_memory_is_said_before_loaders_would_hang(toy):
    data = SegmentationDataset(DOMAINS['BDD'], toy, 'train', (1024, 2048))
    with pytest.raises(UserError, match='MiB free, but 2 loader processes need .*--shm-size.*lower --num-workers'):
        check_shared_memory(data, 10 ** 9, 2)
    check_shared_memory(data, 10 ** 9, 2, folder='/none/such')
    native = split_of(DOMAINS['BDD'], toy, 'val', (32, 64), 'native')
    assert native.sample_bytes() == sum(tensor.numel() for tensor in native.load(0)) > 4 * 32 * 64
    for batches in (TrainBatches(8, 10 ** 9, 0), EvalBatches(8, 10 ** 9)):
        with pytest.raises(UserError, match='shared memory'):
            make_loader(data, batches, 2, False)
        make_loader(data, batches, 0, False)


def test_few_open_files_are_made_more():
    now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, most))
        allow_open_files()
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == min(2 ** 16, most)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (now, most))


@pytest.mark.skipif(sys.platform != 'linux', reason='counts the page faults of glibc')
def test_freed_memory_is_kept_for_the_next_batch():
    """In a process of its own: what this one has allocated before may leave the heap no room to grow."""
    program = ('''
import resource
import torch
from mdil.utils.parallel import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.zeros(2 ** 24)                        # 64 MiB, freed at once
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

keep_freed_memory()
print(min(faults() for _ in range(20)))''')
    done = subprocess.run([sys.executable, '-c', program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1000      # of 16,384 pages: the heap settles after a few


def test_home_is_found_in_options():
    home = str(Path.home())
    assert home_in('--savedir=~/x') == f'--savedir={home}/x' and home_in('CS=~/d') == f'CS={home}/d'
    assert home_in('~') == home and home_in('--data=CS=~/d') == f'--data=CS={home}/d'
    for text in ('a~b', '--x=a~/b', '--lr=0.1', 'x/~/y', '~nobody-of-this-name/x'):
        assert home_in(text) == text
    options = parse_train(['--domains=CS', '--savedir=~/s', '--data', 'BDD=~/b', '--state', '~/c'])
    assert (options.savedir, options.data, options.state) == (f'{home}/s', [f'BDD={home}/b'], f'{home}/c')


@pytest.mark.parametrize('arguments, place', [
    (['--state', 'x', '--json', ''], '--json'), (['--json=', '--state', 'x'], '--json='), ([''], 'eval.py')])
def test_empty_values_are_refused(arguments, place):
    with pytest.raises(UserError, match=f'the value after {place} is empty'):
        eval_parser().parse_args(arguments)


@pytest.mark.parametrize('arguments, message', [
    (['--seed', str(2 ** 64)], 'not between 0 and 2.63 - 1'), (['--seed', str(2 ** 63)], 'not between'),
    (['--num-workers', '-3'], '--num-workers: -3 is not at least 0'), (['--batch-size', 'six'], "'six' is not a whole number"),
    (['--lr', 'fast'], '--lr: fast is not a finite number >= 0'), (['--height', '64.5'], "'64.5' is not a whole number"),
    (['--height', '8000000000'], 'is more than 65536'), (['--num-epochs', '1' + '0' * 30], 'too large'), (['--batch-size', str(2 ** 31)], 'too large'),
    (['--lr', '1e400'], 'finite'), (['--lambdac', '1e400'], 'finite'), (['--temperature', '1e200'], 'from 1e-6 to 1e6'),
    (['--temperature', '1e-300'], 'from 1e-6 to 1e6')])
def test_numbers_that_no_generator_or_float_takes_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        parse_train(['--domains', 'CS', 'BDD', '--state', 'x', '--savedir', 'S', *arguments])


def test_the_largest_seed_is_one():
    options = parse_train(['--domains', 'CS', '--savedir', 'S', '--seed', str(2 ** 63 - 1)])
    building.seed_everything(options.seed)
    assert len(TrainBatches(4, 2, options.seed).order()) == 4


def test_a_network_that_is_not_finite_is_never_saved(toy, tmp_path):
    """The last step of an epoch is followed by no loss that could tell."""
    with pytest.raises(UserError, match='is not finite after 1 epochs.*nothing was saved.*lower --lr'):
        learn(toy, tmp_path, '--domains', 'CS', '--lr', '1e38', '--limit-batches', '1')
    assert not (tmp_path / BEST).exists() and not (tmp_path / LATEST).exists()


def test_the_names_of_what_is_not_finite():
    content = {'state_dict': {'a': torch.tensor([1.0]), 'b': torch.tensor([math.inf])}, 'teacher': None,
               'optimizer': {'state': {0: {'exp_avg': torch.tensor([math.nan])}}}}
    assert list(checkpoint.not_finite(content)) == ['state_dict.b', 'optimizer.state.0.exp_avg']


def test_one_image_of_one_value_more_than_fits_is_refused(toy):
    options = parse_train(['--domains', 'CS', '--savedir', 'S', '--data-root', str(toy), '--height', '8', '--width', '8',
                           '--num-workers', '0', '--batch-size', '7', '--class-weights', 'none'])
    with pytest.raises(UserError, match='last batch .* one image at 8x8.* enlarge --height'):
        Run(options, Place(CPU))
    options.batch_size = 6
    Run(options, Place(CPU))
    with pytest.raises(UserError, match='--batch-size 6 does not divide among 4 processes; use 4 or 8'):
        domain_data.build_data(options, Place(CPU, 0, 4))
    with pytest.raises(UserError, match='does not divide among 7 processes; use 7'):
        domain_data.build_data(options, Place(CPU, 0, 7))


def test_a_rank_without_validation_images_validates_too(monkeypatch):
    """The sum over all ranks waits for it."""
    val = make_loader([], EvalBatches(1, 1, rank=1, world=2), 0, False)
    data = SimpleNamespace(val=val, index=0, class_weights=None, domain=DOMAINS['BDD'])
    asked = []
    score = SimpleNamespace(matrix=torch.ones(2, 2), loss=0.0, miou=lambda published: 1.0)
    monkeypatch.setattr(train, 'evaluate', lambda *arguments: asked.append(arguments) or score)
    monkeypatch.setattr(train, 'broadcast_buffers', lambda *_: None)
    run = SimpleNamespace(student=None, place=None, data=[data, SimpleNamespace(val=None)],
                          options=SimpleNamespace(precision='fp32', published_metric=False))
    assert len(val) == 0 and set(train.validate(run)) == {'BDD'} and len(asked) == 1


LINE = b'{"epoch": 1, "lr": 0.1, "train": {"loss": 0.5}, "val": {"CS": {"miou": 1.5, "loss": NaN}}}\n'


@pytest.mark.parametrize('content, message', [
    (LINE + b'nonsense\n' + LINE, 'line 2 was not written by a run'), (b'\xff\xfe\n' + LINE, 'line 1'),
    *((LINE + LINE.replace(part, other) + LINE, 'line 2 was not written by a run') for part, other in (
        (LINE, b'[1]\n'), (b'1,', b'"1",'), (b'"lr"', b'"rate"'), (b'"train"', b'"tr"'), (b'"val"', b'"v"'),
        (b'{"loss": 0.5}', b'{}'), (b'0.5', b'"low"'), (b'"miou"', b'"iou"'), (b'1.5', b'null'),
        (b'{"CS": {"miou": 1.5, "loss": NaN}}', b'[]'), (b'{"miou": 1.5, "loss": NaN}', b'1')))])
def test_metrics_of_another_kind_are_refused_and_kept(tmp_path, content, message):
    (tmp_path / 'metrics.jsonl').write_bytes(content)
    with pytest.raises(UserError, match=message):
        records.keep_metrics(tmp_path, 9)
    assert (tmp_path / 'metrics.jsonl').read_bytes() == content


@pytest.mark.parametrize('last', [b'{"epoch": 2, "tr', b'\0\0\0', b'\xff', b''])
def test_a_last_line_cut_short_is_left_out(tmp_path, last):
    (tmp_path / 'metrics.jsonl').write_bytes(LINE + last)
    assert [line['epoch'] for line in records.read_metrics(tmp_path)] == [1]


def test_metrics_and_options_that_cannot_be_read_or_written(toy, tmp_path):
    (tmp_path / 'opts.json').write_bytes(b'\xff')
    with pytest.raises(UserError, match='opts.json was not written by a run; move the file away, or fix it'):
        history.read_step(tmp_path)
    (tmp_path / 'opts.json').unlink()
    (tmp_path / 'opts.json').mkdir()
    with pytest.raises(UserError, match='opts.json cannot be read: Is a directory; move it away'):
        history.read_step(tmp_path)
    (tmp_path / 'opts.json').rmdir()
    assert history.read_step(tmp_path).record == {}
    (tmp_path / 'metrics.jsonl').mkdir()
    with pytest.raises(UserError, match='metrics.jsonl cannot be read: Is a directory'):
        records.read_metrics(tmp_path)
    with pytest.raises(UserError, match='metrics.jsonl cannot be written: Is a directory'):
        records.append_metrics(tmp_path, {})
    with pytest.raises(UserError, match='metrics.jsonl is a directory; move it away'):
        learn(toy, tmp_path, '--domains', 'CS')


class Drips(socketserver.BaseRequestHandler):
    """A server that sends a header without end, a byte each moment."""

    def handle(self):
        self.request.sendall(b'HTTP/1.1 200 OK\r\nX: ')
        while not self.server.over.wait(0.02):
            self.request.sendall(b'x')


def test_a_server_that_drips_costs_no_more_than_one_that_is_silent(tmp_path, monkeypatch, capsys):
    """Behind a proxy, which a server on this machine does not go through."""
    pytest.importorskip('visdom')
    monkeypatch.setattr(dashboard, 'TIMEOUT', 0.3)
    monkeypatch.setenv('http_proxy', 'http://127.0.0.1:9')
    for name in ('no_proxy', 'NO_PROXY'):
        monkeypatch.delenv(name, raising=False)
    server = socketserver.ThreadingTCPServer(('127.0.0.1', 0), Drips)
    server.daemon_threads, server.over = True, threading.Event()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        dashboard.Dashboard(SimpleNamespace(port=server.server_address[1], server='http://127.0.0.1', env='x',
                                            savedir=str(tmp_path), model_name_suffix=''))
    finally:
        server.over.set()
        server.shutdown()
    said = capsys.readouterr().err
    assert 'live curves are off' in said and 'no whole answer within 0.3 seconds' in said, said


@pytest.mark.parametrize('server, local', [('http://localhost', True), ('127.0.0.1', True), ('http://[::1]:3', True),
                                           ('localhost:80', True), ('http://example.org', False)])
def test_which_servers_are_on_this_machine(server, local):
    assert dashboard.is_local(server) is local


def test_of_several_processes_the_first_to_fail_says_why(tmp_path, monkeypatch):
    (tmp_path / 'attempt_0').mkdir()
    for rank, first in ((1, True), (0, False), (2, False)):
        monkeypatch.setenv('TORCHELASTIC_ERROR_FILE', str(tmp_path / f'attempt_0/{rank}/error.json'))
        assert first_to_fail() is first
    for file in ('', '/none/such/0/error.json'):
        monkeypatch.setenv('TORCHELASTIC_ERROR_FILE', file)
        assert first_to_fail() and first_to_fail()


def test_torchrun_gives_one_line_and_the_status_of_its_processes(tmp_path):
    done = subprocess.run([sys.executable, '-m', 'mdil', 'torchrun', '--standalone', '--nproc_per_node', '2', 'train.py',
                           '--domains', 'CS', '--data-root', tmp_path, '--savedir', tmp_path / 'S', '--device', 'cpu'],
                          cwd=ROOT, capture_output=True, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert done.returncode == 2 and done.stderr.count('\n') == 1, done.stderr
    assert done.stderr.startswith('error: no train images of cityscapes')


def test_torchrun_gives_its_processes_longer_to_save_than_its_own_30_seconds(monkeypatch):
    for name in ('PET_SIGNALS_TO_HANDLE', 'TORCHELASTIC_SIGNALS_TO_HANDLE', 'OMP_NUM_THREADS', 'TORCH_ELASTIC_SHUTDOWN_TIMEOUT'):
        monkeypatch.setenv(name, '')        # so that each is restored after the test
        monkeypatch.delenv(name)
    monkeypatch.setattr(launch, 'STOPPING', ())
    monkeypatch.setattr(launch.logging, 'disable', lambda level: None)
    seen = []
    monkeypatch.setattr(launch.run, 'main', lambda argv: seen.append(os.environ['TORCH_ELASTIC_SHUTDOWN_TIMEOUT']))
    assert launch.main([]) == 0 and seen == ['240']


ALONE = {'predict': ['--state', 'x', '--input', 'x', '--out', 'x'], 'check': ['--domains', 'CS'],
         'create-labels': ['idd', '--datadir', 'x'], 'class-weights': ['--domains', 'CS'], 'toy-roads': ['--out', 'x'],
         'compare': ['a=x', '--out', 'x'], 'report': ['x'], 'tsne': ['a=x', '--out', 'x'], 'describe': ['x'],
         'branches': ['list', 'x'], 'verify': ['x', 'y'], 'repair': ['x', 'y', '--out', 'z'],
         'identify': ['x', '--out', 'y'], 'export': ['x', 'y']}


@pytest.mark.parametrize('name', sorted(TOOLS.keys() - {'train', 'eval', 'torchrun'}))
def test_a_tool_that_works_in_one_process_does_not_start_in_several(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('WORLD_SIZE', '2')
    with pytest.raises(UserError, match='works in one process, but WORLD_SIZE=2 .*; start it without') as error:
        run_tool([name, *ALONE[name]])
    assert '\n' not in str(error.value) and not list(tmp_path.iterdir())


def test_training_and_evaluation_start_in_several_processes(monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '2')
    assert eval_parser().parse_args(['--state', 'x']).state == ['x']
    assert train_parser().parse_args(['--domains', 'CS', '--savedir', 'x']).savedir == 'x'


def test_torchrun_ends_as_the_first_of_its_processes_to_fail():
    def failed(status):
        return SimpleNamespace(get_first_failure=lambda: (3, SimpleNamespace(exitcode=status)))
    assert launch.end_of(failed(75)) == 75
    with pytest.raises(UserError, match='process 3 was ended by SIGKILL .out of memory'):
        launch.end_of(failed(-9))
