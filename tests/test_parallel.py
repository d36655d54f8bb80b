"""What several devices and processes need, as far as a machine without GPUs can show it."""
import contextlib
import os
import socket
import threading
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn

from mdil import train
from mdil.benchmarks import speed
from mdil.models import build_model
from mdil.models.erfnet import Downsampler
from mdil.training import building
from mdil.training.options import parse_train
from mdil.training.run import Run
from mdil.training.step_loss import mean_over_batch
from mdil.utils import parallel, precision
from mdil.utils.errors import UserError
from mdil.utils.parallel import Place
from tests.conftest import run_script
from tests.fill import inputs
from tests.test_speed import OPTIONS, distance, gradients_of, step_of


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    return Place(torch.device('cuda'))


@pytest.mark.parametrize('way', ['auto', 'dp'])
def test_data_parallel_is_left_to_steps_that_use_every_weight(two_gpus, way, capsys):
    task = nn.Linear(2, 2)
    assert isinstance(parallel.wrap(task, two_gpus, way), nn.DataParallel) and not capsys.readouterr().err
    assert parallel.wrap(task, two_gpus, way, against='err') is task
    assert 'because DataParallel would err; to use all: torchrun' in capsys.readouterr().err


@pytest.mark.parametrize('method, domains, reason', [
    ('multi-task-mixed', 'CS BDD', 'split a mixed batch by domain'), ('multi-task-mixed', 'CS', ''),
    ('multi-task', 'CS BDD', 'move weights that a batch does not use'), ('multi-task', 'CS', '')])
def test_joint_training_of_several_domains_uses_one_gpu_without_torchrun(method, domains, reason, monkeypatch):
    options, asked = parse_train(['--savedir', 'x', '--method', method, '--domains', *domains.split()]), []
    monkeypatch.setattr(building, 'wrap', lambda task, place, ways, unused, against: asked.append((unused, against)))
    student = build_model([20] * len(options.domains), method)
    building.build_step_loss(student, None, [torch.ones(20)] * len(options.domains), [], options, Place(torch.device('cpu')))
    assert asked == [(method == 'multi-task' and bool(reason), reason)]


def test_each_gpu_keeps_its_thread_in_data_parallel(two_gpus, monkeypatch):
    """What torch chooses for a convolution is kept per thread and never freed."""
    monkeypatch.setattr(torch.cuda, 'device', lambda gpu: contextlib.nullcontext())
    task = parallel.wrap(nn.Identity(), two_gpus, 'dp')
    passes = [task.parallel_apply([threading.get_ident] * 2, [()] * 2, [{}] * 2) for _ in range(3)]
    assert len({threading.get_ident(), *passes[0]}) == 3 and passes[1:] == passes[:-1]
    with torch.no_grad():
        assert task.parallel_apply([torch.is_grad_enabled], [()], [{}]) == [False]
    with pytest.raises(ZeroDivisionError):
        task.parallel_apply([divmod], [(1, 0)], [{}])


def free_port():
    with socket.socket() as found:
        found.bind(('127.0.0.1', 0))
        return found.getsockname()[1]


def launched(monkeypatch, **variables):
    """Sets these variables of a launcher and no others."""
    for name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT'):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))


@pytest.mark.parametrize('variables', [
    {}, {'RANK': 0}, {'WORLD_SIZE': 1}, {'RANK': 0, 'WORLD_SIZE': 1}, {'LOCAL_RANK': 3}, {'MASTER_PORT': 1},
    {'RANK': 0, 'WORLD_SIZE': 1, 'MASTER_ADDR': 'x'}])
def test_half_a_launcher_for_one_process_is_one_process(monkeypatch, variables):
    launched(monkeypatch, **variables)
    with parallel.session('cpu') as place:
        assert (place.rank, place.world) == (0, 1) and not dist.is_initialized()


@pytest.mark.parametrize('variables, message', [
    ({'RANK': 0, 'WORLD_SIZE': 'abc'}, "WORLD_SIZE='abc' in the environment is not a whole number; unset it"),
    ({'RANK': -1}, "RANK='-1' .* is not a whole number"), ({'LOCAL_RANK': ''}, "LOCAL_RANK='' .* is not a whole number"),
    ({'WORLD_SIZE': 4}, 'WORLD_SIZE=4 in the environment without RANK and MASTER_ADDR and MASTER_PORT: .*torchrun'),
    ({'RANK': 1, 'WORLD_SIZE': 2, 'MASTER_ADDR': 'x'}, 'RANK=1 WORLD_SIZE=2 .* without MASTER_PORT'),
    ({'RANK': 2, 'WORLD_SIZE': 2, 'MASTER_ADDR': 'x', 'MASTER_PORT': 1}, 'RANK=2 WORLD_SIZE=2 .* contradict')])
def test_half_a_launcher_for_several_is_one_line(monkeypatch, variables, message):
    launched(monkeypatch, **variables)
    with pytest.raises(UserError, match=message) as error, parallel.session('cpu'):
        pass
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('main', [True, False])
def test_only_the_process_that_writes_saves_within_an_epoch(main):
    saved = []
    run = SimpleNamespace(options=SimpleNamespace(checkpoint_minutes=0), written=0.0, save=lambda: saved.append(1),
                          place=SimpleNamespace(main=main))
    Run.save_when_due(run)
    assert bool(saved) is main


def test_one_gpu_for_several_processes_is_refused(monkeypatch):
    launched(monkeypatch, RANK=1, WORLD_SIZE=2, LOCAL_RANK=1, MASTER_ADDR='127.0.0.1', MASTER_PORT=1)
    with pytest.raises(UserError, match='--device cuda:0 is one GPU for all 2 processes; use --device cuda$'):
        with parallel.session('cuda:0'):
            pass


@pytest.mark.parametrize('load, threads, told', [(5.0, 2, True), (3.0, 2, False), (9.0, 1, False)])
def test_a_busy_machine_is_noticed(load, threads, told, monkeypatch, capsys):
    monkeypatch.setattr(os, 'getloadavg', lambda: (load, 0.0, 0.0))
    monkeypatch.setattr(os, 'cpu_count', lambda: 2)
    monkeypatch.setattr(torch, 'get_num_threads', lambda: threads)
    with parallel.session('cpu'):
        assert ('OMP_NUM_THREADS=1' in capsys.readouterr().err) == told


def test_a_session_works_with_torchs_newer_settings_of_precision():
    cudnn = torch.backends.cudnn
    with parallel.kept_settings():
        cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision = 'ieee', 'tf32'
        with pytest.raises(RuntimeError, match='allow_tf32'):
            print(cudnn.allow_tf32)
        with parallel.session('cpu'):
            cudnn.allow_tf32 = False
        assert (cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision) == ('ieee', 'tf32')
    with parallel.session('cpu'):
        cudnn.allow_tf32 = False
    assert cudnn.allow_tf32 and cudnn.conv.fp32_precision == 'tf32'


def test_a_session_leaves_torchs_settings_as_they_were(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, 'benchmark', False)
    monkeypatch.setenv('CUBLAS_WORKSPACE_CONFIG', ':4096:8')      # removed afterwards: seed_everything leaves it
    with parallel.session('cpu'):
        assert torch.backends.cudnn.benchmark
        building.seed_everything(0, deterministic=True)
        assert torch.are_deterministic_algorithms_enabled()
    assert not torch.backends.cudnn.benchmark and not torch.are_deterministic_algorithms_enabled()


def test_a_session_that_changes_no_setting_does_not_import_torchs_compiler():
    """A signal may arrive while torch imports it; importing the rest of it then fails and hides why the run ended."""
    code = ("import sys; from mdil.utils.parallel import session\nwith session('cpu'): pass\n"
            "print([name for name in ('torch._dynamo', 'sympy') if name in sys.modules])")
    assert run_script('-c', code).stdout.strip() == '[]'


def test_processes_that_cannot_meet_say_where(monkeypatch):
    launched(monkeypatch, RANK=0, WORLD_SIZE=2, MASTER_ADDR='127.0.0.1', MASTER_PORT=99999)
    with pytest.raises(UserError, match='cannot connect at 127.0.0.1:99999'), parallel.session('cpu'):
        pass


@pytest.mark.parametrize('name', ['meta', 'mps', 'xpu', 'cuda:99', 'nonsense', 'cpu:x', 'hpu'])
def test_a_device_that_is_not_there_is_one_line(name):
    with pytest.raises(UserError, match=f'--device {name}') as error:
        parallel.pick_device(name)
    assert '\n' not in str(error.value) and len(str(error.value)) < 300


def test_devices_that_only_some_options_know_say_so(monkeypatch, capsys):
    with pytest.raises(UserError, match='several processes need cpu or cuda'):
        parallel.join(torch.device('mps'))
    with pytest.raises(UserError, match='--precision bf16: lazy supports only float32'):
        precision.check_precision('bf16', torch.device('lazy'))
    assert precision.wide_type(torch.device('mps')) == torch.float32
    for name in ('ONEDNN_MAX_CPU_ISA', 'DNNL_MAX_CPU_ISA', 'ATEN_CPU_CAPABILITY'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(precision, 'cpu_features', lambda: {'avx2'})
    precision.check_precision('bf16', torch.device('cpu'))
    assert 'slow here, because this processor has no bf16 arithmetic' in capsys.readouterr().err
    precision.check_precision('fp16', torch.device('cpu'))
    assert not capsys.readouterr().err


@pytest.mark.parametrize('variables, features, lack', [
    ({}, {'avx2', 'fma'}, 'this processor has no bf16'), ({}, {'avx512_bf16'}, ''), ({}, {'amx_bf16'}, ''),
    ({'ONEDNN_MAX_CPU_ISA': 'avx2'}, {'avx512_bf16'}, 'ONEDNN_MAX_CPU_ISA=avx2 forbids'),
    ({'ONEDNN_MAX_CPU_ISA': 'AVX512_CORE_AMX'}, {'amx_bf16'}, ''), ({}, {'bf16'}, '')])
def test_fast_takes_the_precision_that_is_fast_here(monkeypatch, capsys, variables, features, lack):
    for name in ('ONEDNN_MAX_CPU_ISA', 'DNNL_MAX_CPU_ISA', 'ATEN_CPU_CAPABILITY'):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(precision, 'cpu_features', lambda: features)
    options = parse_train(['--domains', 'CS', '--savedir', 'S', '--fast', '--device', 'cpu'])
    assert options.precision == ('fp32' if lack else 'bf16') and options.augment == 'device'
    said = capsys.readouterr().err
    assert lack in said and said.count('\n') == bool(lack)
    assert speed.parse(['--device', 'cpu']).precision == options.precision
    asked = parse_train(['--domains', 'CS', '--savedir', 'S', '--fast', '--precision', 'bf16', '--device', 'cpu'])
    assert asked.precision == 'bf16'


@pytest.mark.parametrize('given, gpus, launched, compiled', [
    ('', 1, False, True), ('', 2, False, False), ('', 2, True, True), ('--device cpu', 1, False, False), ('', 0, False, False)])
def test_fast_compiles_on_a_single_gpu_and_under_torchrun(monkeypatch, given, gpus, launched, compiled):
    monkeypatch.setenv('RANK', '0') if launched else monkeypatch.delenv('RANK', raising=False)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: gpus)
    monkeypatch.setattr('mdil.training.options.pick_device', lambda name: None)
    monkeypatch.setattr('mdil.training.options.without_bf16', lambda device: '')
    options = parse_train(['--domains', 'CS', '--savedir', 'S', '--fast', *given.split()])
    assert options.compile == compiled


def test_an_error_does_not_wait_for_other_ranks(monkeypatch):
    """They may wait for this one: the group is left in order only where all ranks end."""
    launched(monkeypatch, RANK=0, WORLD_SIZE=1, LOCAL_RANK=0, MASTER_ADDR='127.0.0.1', MASTER_PORT=free_port())
    for error, left in ((ValueError, False), (SystemExit, True)):
        with pytest.raises(error), parallel.session('cpu'):
            assert dist.is_initialized()
            raise error
        assert dist.is_initialized() is not left
        if dist.is_initialized():
            dist.destroy_process_group()
    with parallel.session('cpu'):
        pass
    assert not dist.is_initialized()


def draws(place, random, batch=3):
    """Random numbers of a rank that goes on from `random` after `batch` batches."""
    run = SimpleNamespace(place=place, options=SimpleNamespace(seed=1))
    Run.restore_random(run, random, 0, batch)
    return torch.rand(4).tolist()


def test_ranks_go_on_with_numbers_of_their_own():
    torch.manual_seed(5)
    random = {'torch': torch.get_rng_state(), 'cuda': []}
    expected = torch.rand(4).tolist()
    ranks = [draws(Place(torch.device('cpu'), rank, 3), random) for rank in range(3)]
    assert ranks[0] == expected and len({tuple(rank) for rank in ranks}) == 3
    assert draws(Place(torch.device('cpu'), 1, 3), random, batch=4) != ranks[1]


def seed_of(epoch, rank, seed=1):
    """What dropout is seeded by in the epoch after `epoch` finished ones."""
    Run.start_epoch(SimpleNamespace(trained=[], batch=0, plan=None, epoch=epoch, options=SimpleNamespace(seed=seed),
                                    place=Place(torch.device('cpu'), rank, 2), step_loss=nn.Identity()))
    return torch.initial_seed()


def test_dropout_differs_between_epochs_ranks_and_seeds():
    assert seed_of(0, 0) == seed_of(0, 0)
    assert len({seed_of(*place) for place in ((0, 0), (1, 0), (0, 1), (1, 1), (0, 0, 2))}) == 5


def test_a_run_of_four_gpus_goes_on_with_two(two_gpus, monkeypatch):
    taken = []
    monkeypatch.setattr(torch.cuda, 'set_rng_state_all', taken.extend)
    draws(two_gpus, {'torch': torch.get_rng_state(), 'cuda': ['a', 'b', 'c', 'd']})
    assert taken == ['a', 'b']


def test_downsampling_stays_in_the_precision_of_its_convolution():
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert Downsampler(3, 16)(torch.rand(2, 3, 16, 32)).dtype == torch.bfloat16
    assert Downsampler(3, 16)(torch.rand(2, 3, 16, 32)).dtype == torch.float32


def whole_batch():
    """(images, labels) of two images, one of them nearly all void."""
    images, labels = inputs(5, 2, 32, 64, 6)
    labels[0, 1:] = 5
    return images, labels.to(torch.uint8)


def steady_step():
    """A StepLoss of a third domain whose batch norms do not look at the batch."""
    return step_of().eval()


def batch_of(loss, place, images, labels):
    """(losses, {name: gradient}) of a batch as training takes it, at rate 0."""
    inside = getattr(loss, 'module', loss)
    learning = [p for p in inside.student.parameters() if p.requires_grad]
    run = SimpleNamespace(place=place, step_loss=loss, terms=list(inside.terms.values()), teacher=inside.teacher,
                          options=OPTIONS, optimizer=torch.optim.Adam(learning, lr=0.0, fused=True),
                          scaler=torch.amp.GradScaler('cpu', enabled=False))
    losses = train.train_batch(run, images, labels, 2)
    return {name: value.item() for name, value in losses.items()}, gradients_of(inside)


@pytest.mark.parametrize('term', [('ce',), ('kd', 0)])
def test_replicas_give_the_loss_of_the_whole_batch(term):
    """As DataParallel gathers them; the mean of their own means is another loss."""
    loss, place, (images, labels) = steady_step(), Place(torch.device('cpu')), whole_batch()
    parts = [loss(images[index:index + 1], labels[index:index + 1], 2, *term) for index in range(2)]
    results = []
    for part in (loss(images, labels, 2, *term), torch.cat(parts)):
        value, shown = mean_over_batch(part, place)
        value.backward()
        results.append((shown.item(), gradients_of(loss)))
        loss.zero_grad()
    (want, exact), (got, gradients) = results
    assert got == pytest.approx(want, rel=1e-5)
    assert distance(gradients, exact) < 1e-5 * distance(exact, dict.fromkeys(exact, torch.tensor(0.0)))
    apart = torch.stack([total / mass for total, mass in torch.cat(parts)]).mean().item()
    assert term == ('kd', 0) or abs(apart - want) > 0.05 * want


def one_rank(rank, folder):
    """A process of `test_processes_give_the_loss_and_gradient_of_the_whole_batch`."""
    torch.set_num_threads(1)
    dist.init_process_group('gloo', f'file://{folder}/store', rank=rank, world_size=2)
    place = Place(torch.device('cpu'), rank, 2)
    images, labels = (tensor[rank:rank + 1] for tensor in whole_batch())
    found = batch_of(parallel.wrap(steady_step(), place, 'auto'), place, images, labels)
    torch.save(found, f'{folder}/{rank}.pth')
    dist.destroy_process_group()


def test_processes_give_the_loss_and_gradient_of_the_whole_batch(tmp_path):
    torch.multiprocessing.spawn(one_rank, (str(tmp_path),), 2)
    want, exact = batch_of(steady_step(), Place(torch.device('cpu')), *whole_batch())
    length = distance(exact, dict.fromkeys(exact, torch.tensor(0.0)))
    for rank in range(2):
        losses, gradients = torch.load(tmp_path / f'{rank}.pth')
        assert losses == pytest.approx(want, rel=1e-5) and distance(gradients, exact) < 1e-5 * length
