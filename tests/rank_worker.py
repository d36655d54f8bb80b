"""Started by torchrun in the tests: trains, then writes what this rank holds.

    torchrun ... tests/rank_worker.py FOLDER TRAIN-ARGUMENTS...

With DIES=N in the environment, rank 1 is killed before its batch N.
"""
import os
import signal
import sys
from functools import partial
from pathlib import Path

import torch

from mdil import train
from mdil.utils.errors import run_main

losses, seeds, real_batch, real_finish = [], [], train.train_batch, train.finish_epoch


def noting_batch(*arguments):
    if os.environ['RANK'] == '1' and os.environ.get('DIES') == str(len(losses)):
        os.kill(os.getpid(), signal.SIGKILL)
    seeds.append(torch.initial_seed())
    result = real_batch(*arguments)
    losses.append(result['loss'].item())
    return result


def noting_finish(run, *arguments):
    real_finish(run, *arguments)
    torch.save({'student': run.student.state_dict(), 'losses': losses, 'seeds': seeds},
               Path(sys.argv[1]) / f'rank{run.place.rank}.pth')


train.train_batch, train.finish_epoch = noting_batch, noting_finish
run_main(partial(train.main, sys.argv[2:]))
