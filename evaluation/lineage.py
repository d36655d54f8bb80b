"""Which of several runs are one sequence: each step goes on from a checkpoint of another, its --state."""
import os
import shlex
from pathlib import Path

from mdil.models.methods import METHODS, method_name
from mdil.utils.errors import UserError
from mdil.utils.files import same_file


def step_before(step, runs):
    """The StepRecord among `runs` that `step` went on from, or None.

    --state names the folder of that run: where it is now, or where it was before both were moved.
    """
    learnt, folder = (step.options.get('domains') or [])[:-1], Path(step.options.get('state') or '').parent
    if not learnt or not step.options.get('state'):
        return None
    known = [run for run in runs if run.options.get('domains') == learnt]
    here = [run for run in known if same_file(folder, run.folder)]
    return next(iter(here or [run for run in known if was_in(run, folder)]), None)


def was_in(run, folder):
    """Whether a StepRecord's run was written to `folder`; of two paths, one may be relative to a forgotten place."""
    written = Path(os.path.normpath(run.options.get('savedir') or run.folder))
    folder = Path(os.path.normpath(folder))
    if written.is_absolute() == folder.is_absolute():
        return written == folder
    whole, part = (folder, written) if folder.is_absolute() else (written, folder)
    return not os.path.exists(whole) and whole.parts[-len(part.parts):] == part.parts


def chain(run, runs):
    """The StepRecords up to `run`, oldest first, each of which goes on from the one before."""
    steps = [run]
    while (before := step_before(steps[0], runs)) is not None:
        steps.insert(0, before)
    return steps


def sequence(runs, evaluated=()):
    """The StepRecords of the one sequence among `runs`, in step order: the longest, with all runs of `evaluated`.

    evaluated: names of the folders whose checkpoints have results. UserError if several sequences are equally long.
    """
    runs = [run for run in runs if run.options] or runs
    chains = [chain(run, runs) for run in runs]
    wanted = {run.folder.name for run in runs} & set(evaluated)
    chains = [steps for steps in chains if wanted <= {step.folder.name for step in steps}] or chains
    longest = max(map(len, chains))
    chains = [steps for steps in chains if len(steps) == longest]
    if len(chains) == 1 or joinable(chains):
        return chains[0] + [steps[-1] for steps in chains[1:]]
    one, other = (steps[-1].folder for steps in chains[:2])
    raise UserError(f'{one} and {other} are not steps of one sequence; name the folders of one: python -m mdil report '
                    f'{shlex.join(str(step.folder) for step in chains[0])} --out FILE')


def joinable(chains):
    """Whether the last steps of `chains` can be joined: of other domains each, from one run, with frozen weights."""
    last = [steps[-1] for steps in chains]
    rows = [METHODS.get(method_name(step.options.get('method'))) for step in last]
    return (bool(chains[0][:-1]) and all(steps[:-1] == chains[0][:-1] for steps in chains)
            and len({step.title for step in last}) == len(last) and all(row and row.shared == 'frozen' for row in rows))
