"""Two machines, played by two launchers on this one that meet over the network."""
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from mdil import train
from mdil.models import checkpoint
from mdil.utils import parallel
from mdil.utils.errors import UserError
from mdil.utils.parallel import Place
from tests.conftest import ROOT
from tests.test_commands import SMALL, equal
from tests.test_parallel import free_port

CPU = torch.device('cpu')


def on_two_machines(tmp_path, *arguments, **environment):
    """Runs tests/rank_worker.py; [(exit status, standard error)] of the two launchers."""
    launch = [sys.executable, '-m', 'mdil', 'torchrun', '--nnodes', '2', '--nproc_per_node', '1', '--rdzv_backend',
              'c10d', '--rdzv_endpoint', f'127.0.0.1:{free_port()}', '--rdzv_id', 'x', 'tests/rank_worker.py', str(tmp_path)]
    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(lambda _: subprocess.run(
            [*launch, *map(str, arguments)], cwd=ROOT, text=True, capture_output=True,
            env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': '.', **environment}), range(2)))
    return [(process.returncode, process.stderr) for process in done]


def test_two_machines_learn_the_same_weights_and_go_on_when_one_was_killed(toy, tmp_path):
    """With as many processes as before, or with another number; the folder of the run is shared."""
    folder = tmp_path / 'run'
    arguments = ['--data-root', toy, '--savedir', folder, '--domains', 'CS', '--num-epochs', '1', '--class-weights', 'none',
                 '--checkpoint-minutes', '0', *SMALL[:4], *SMALL[6:], '--resume']
    ends = on_two_machines(tmp_path, *arguments, DIES='2')
    assert [status for status, _ in ends] == [2, 2], ends
    killed, other = sorted((said for _, said in ends), key=lambda said: 'SIGKILL' not in said)
    # The launcher that ends later may find that the other one no longer listens, which torch reports, too.
    assert 'error: process 1 was ended by SIGKILL (out of memory?); --resume continues from the last checkpoint\n' in killed
    assert 'error: another process of this run has ended' in other, other
    assert checkpoint.read(folder / 'checkpoint.pth.tar')['batch'] == 2
    shutil.copytree(folder, tmp_path / 'alone')

    ends = on_two_machines(tmp_path, *arguments)
    assert [status for status, _ in ends] == [0, 0], ends
    ranks = [torch.load(tmp_path / f'rank{rank}.pth', weights_only=True) for rank in (0, 1)]
    assert equal(*(rank['student'] for rank in ranks)) and len(ranks[0]['losses']) == len(ranks[1]['losses']) == 2
    content = checkpoint.read(folder / 'checkpoint.pth.tar')
    assert content['epoch'] == 1 and equal(content['state_dict'], ranks[0]['student'])

    train.main([*map(str, arguments), '--savedir', str(tmp_path / 'alone')])
    assert checkpoint.read(tmp_path / 'alone/checkpoint.pth.tar')['epoch'] == 1


def test_folders_that_machines_do_not_share_are_said(tmp_path, monkeypatch):
    monkeypatch.setattr(train, 'agreed', lambda numbers, place: numbers == [-1, -1] and place.world == 2)
    with pytest.raises(UserError, match='the processes find different checkpoints there; use a folder that all'):
        train.learn(train.parse_train(['--domains', 'CS', '--savedir', str(tmp_path), '--resume']), Place(CPU))


def test_how_a_batch_is_shared_is_said(monkeypatch):
    task = nn.Linear(2, 2)
    assert parallel.sharing(task, Place(CPU), 6) == ''
    assert parallel.sharing(task, Place(CPU, 0, 3), 6) == (
        '3 processes take 2 of the 6 images of a batch each; a batch norm sees its 2')
    assert parallel.sharing(task, Place(CPU, 0, 3), 6, sync_bn=True).endswith('a batch norm sees all 6 (--sync-bn)')
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 4)
    said = parallel.sharing(nn.DataParallel(task), Place(torch.device('cuda')), 6)
    assert said.startswith('3 of 4 GPUs take 2 + 2 + 2 images of a batch') and 'torchrun --nproc_per_node N' in said
