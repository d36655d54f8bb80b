"""The shell scripts: what they would run is accepted, what they run is finished, a signal is survived."""
import os
import shlex
import signal
import subprocess
import sys
import time

import pytest

from mdil.eval import eval_parser
from mdil.training.options import parse_train
from tests.conftest import ROOT

SCRIPTS = ['mdil', 'ours', 'adapters_only', 'fine_tune', 'multi_task', 'single_task', 'ablations', 'demo', 'small_real']


def script(name, *arguments, expect=0):
    done = subprocess.run(['bash', f'trainer_files/{name}.sh', *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout + done.stderr


def commands(text):
    """Argument lists of the train.py commands in a dry run's output."""
    lists = [shlex.split(line[2:]) for line in text.splitlines() if line.startswith('+ ')]
    return [words[words.index('train.py') + 1:] for words in lists if 'train.py' in words]


@pytest.mark.parametrize('name', SCRIPTS)
def test_dry_run_prints_commands_that_train_py_accepts(name):
    found = commands(script(name, '--dry-run'))
    options = [parse_train(words) for words in found]
    steps = {'mdil': 3, 'ours': 3, 'adapters_only': 3, 'fine_tune': 3, 'multi_task': 1, 'single_task': 3, 'ablations': 36,
             'demo': 6, 'small_real': 6}
    assert len(options) == steps[name]
    assert len({option.savedir for option in options}) == len(options)
    for option in options:
        assert option.resume and (option.state is None) == (len(option.domains) == 1 or name == 'multi_task')


def test_order_epochs_and_encoder_are_settings():
    options = [parse_train(words) for words in commands(script(
        'mdil', '--dry-run', 'DOMAINS=IDD CS', 'EPOCHS=7 9', 'ENCODER=e.pth.tar', 'TRAIN_ARGS=--lambdac 1', 'HEIGHT=256'))]
    assert [(o.domains, o.num_epochs, o.state, o.lambdac, o.width) for o in options] == [
        (['IDD'], 7, 'e.pth.tar', 1.0, 512),
        (['IDD', 'cityscapes'], 9, 'runs/mdil/step1-IDD/model_best.pth.tar', 1.0, 512)]


def test_ablations_name_one_difference_each():
    options = [parse_train(words) for words in commands(script('ablations', '--dry-run', 'METHODS='))]
    last = {o.savedir.split('/')[1]: o for o in options if len(o.domains) == 3}
    base = last.pop('released')
    differing = {name: {key for key in ('old_bn', 'distillation', 'teacher_mode', 'steps_per_batch', 'new_statistics')
                        if getattr(option, key) != getattr(base, key)} for name, option in last.items()}
    assert sorted(map(len, differing.values())) == [1] * 5 and len(set(map(str, differing.values()))) == 5


def evaluations(text):
    """Argument lists of the eval.py commands in a dry run's output."""
    lists = [shlex.split(line[2:]) for line in text.splitlines() if line.startswith('+ ')]
    return [eval_parser().parse_args(words[2:]) for words in lists if words[1:2] == ['eval.py']]


@pytest.mark.parametrize('name', ['mdil', 'single_task', 'multi_task'])
def test_select_says_which_epoch_counts(name):
    for setting, file in (('best', 'model_best.pth.tar'), ('last', 'checkpoint.pth.tar')):
        text = script(name, '--dry-run', f'SELECT={setting}')
        assert {state.split('/')[-1] for found in evaluations(text) for state in found.state} == {file}
        later = [option.state for option in map(parse_train, commands(text)) if option.state]
        assert {state.split('/')[-1] for state in later} <= {file}
        assert bool(later) == (name == 'mdil')


@pytest.mark.parametrize('arguments, published', [
    ((), False), (('--recipe', 'released'), True), (('RECIPE=released',), True), (('--recipe=corrected',), False),
    (('TRAIN_ARGS=--recipe released',), True), (('TRAIN_ARGS=--recipe released --no-published-metric',), False),
    (('--recipe', 'released', 'METRIC=plain'), False), (('METRIC=published',), True)])
def test_the_released_recipe_is_evaluated_by_the_published_metric(arguments, published):
    text = script('mdil', '--dry-run', *arguments)
    assert {found.published_metric for found in evaluations(text)} == {published}
    recipe = 'released' if 'released' in ' '.join(arguments) else 'corrected'
    assert {option.recipe for option in map(parse_train, commands(text))} == {recipe}


def test_epochs_are_those_of_train_py_unless_set():
    text = script('single_task', '--dry-run', '--recipe', 'released')
    assert [option.num_epochs for option in map(parse_train, commands(text))] == [150, 150, 200]


@pytest.mark.parametrize('argument', ['SELECT=first', 'METRIC=x', 'RECIPE=x', '--recipe'])
def test_settings_that_are_none_of_their_words_are_refused(argument):
    assert ' is not ' in script('mdil', argument, expect=2)


def test_the_earlier_name_runs_the_same_commands():
    assert script('ours', '--dry-run', 'HEIGHT=256') == script('mdil', '--dry-run', 'HEIGHT=256')


def test_help_and_unknown_arguments():
    assert 'DOMAINS=' in script('mdil', '--help')
    assert "unknown argument '--nonsense'" in script('mdil', '--nonsense', expect=2)


def test_a_signal_ends_with_75_and_the_next_run_goes_on(toy, tmp_path):
    words = ['bash', 'trainer_files/mdil.sh', f'DATA={toy}', f'OUT={tmp_path}', 'DOMAINS=cityscapes', 'EPOCHS=3',
             'BATCH=2', 'HEIGHT=32', 'WORKERS=0', f'PYTHON={sys.executable}', 'TRAIN_ARGS=--checkpoint-minutes 0']
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               env={**os.environ, 'OMP_NUM_THREADS': '1'})
    saved, end = tmp_path / 'mdil/step1-cityscapes/checkpoint.pth.tar', time.monotonic() + 100
    while not saved.exists() and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    output = process.communicate(timeout=100)[0]
    assert process.returncode == 75 and 'stopped by a signal' in output, output
    output = script('mdil', *words[2:])
    assert 'resumed in' in output and (tmp_path / 'mdil/results.json').exists()
    assert 'already finished' in script('mdil', *words[2:])
