"""What several devices and processes need, as far as a machine without GPUs can show it."""
import socket
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn

from mdil.models.erfnet import Downsampler
from mdil.training.run import Run
from mdil.utils import parallel
from mdil.utils.parallel import Place


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    return Place(torch.device('cuda'))


@pytest.mark.parametrize('way', ['auto', 'dp'])
def test_data_parallel_is_left_to_steps_that_use_every_weight(two_gpus, way, capsys):
    task = nn.Linear(2, 2)
    assert isinstance(parallel.wrap(task, two_gpus, way), nn.DataParallel) and not capsys.readouterr().err
    assert parallel.wrap(task, two_gpus, way, unused=True) is task
    assert 'torchrun' in capsys.readouterr().err


def free_port():
    with socket.socket() as found:
        found.bind(('127.0.0.1', 0))
        return found.getsockname()[1]


def test_an_error_does_not_wait_for_other_ranks(monkeypatch):
    """They may wait for this one: the group is left in order only where all ranks end."""
    for name, value in dict(RANK='0', WORLD_SIZE='1', LOCAL_RANK='0', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(free_port())).items():
        monkeypatch.setenv(name, value)
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


def test_a_run_of_four_gpus_goes_on_with_two(two_gpus, monkeypatch):
    taken = []
    monkeypatch.setattr(torch.cuda, 'set_rng_state_all', taken.extend)
    draws(two_gpus, {'torch': torch.get_rng_state(), 'cuda': ['a', 'b', 'c', 'd']})
    assert taken == ['a', 'b']


def test_downsampling_stays_in_the_precision_of_its_convolution():
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert Downsampler(3, 16)(torch.rand(2, 3, 16, 32)).dtype == torch.bfloat16
    assert Downsampler(3, 16)(torch.rand(2, 3, 16, 32)).dtype == torch.float32
