"""Started by torchrun in the tests: trains, then writes what this rank holds.

    torchrun ... tests/rank_worker.py FOLDER TRAIN-ARGUMENTS...
"""
import sys
from pathlib import Path

import torch

from mdil import train

losses, seeds, real_batch, real_finish = [], [], train.train_batch, train.finish_epoch


def noting_batch(*arguments):
    seeds.append(torch.initial_seed())
    result = real_batch(*arguments)
    losses.append(result['loss'].item())
    return result


def noting_finish(run, *arguments):
    real_finish(run, *arguments)
    torch.save({'student': run.student.state_dict(), 'losses': losses, 'seeds': seeds},
               Path(sys.argv[1]) / f'rank{run.place.rank}.pth')


train.train_batch, train.finish_epoch = noting_batch, noting_finish
train.main(sys.argv[2:])
