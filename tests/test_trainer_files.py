"""The shell scripts: what they would run is accepted, what they run is finished, a signal is survived."""
import fcntl
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys

import pytest
import torch

from mdil.eval import eval_parser
from mdil.models import METHODS, checkpoint
from mdil.training.options import parse_train
from tests.conftest import ROOT, wait_for

SCRIPTS = ['mdil', 'ours', 'adapters_only', 'parallel', 'fine_tune', 'multi_task', 'single_task', 'ablations', 'demo', 'small_real', 'speedrun']


def script(name, *arguments, expect=0):
    done = subprocess.run(['bash', f'trainer_files/{name}.sh', *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout + done.stderr


def copied_setup(folder):
    (folder / 'trainer_files').mkdir()
    for name in ('trainer_files/setup.sh', 'requirements.txt', 'requirements-dev.txt'):
        shutil.copy(ROOT / name, folder / name)


def test_two_setups_at_once_make_one_environment(tmp_path):
    """The second waits; what the first has made is not made again."""
    copied_setup(tmp_path)
    with open(tmp_path / '.venv.lock', 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        second = subprocess.Popen(['bash', 'trainer_files/setup.sh'], cwd=tmp_path, text=True, stdout=subprocess.PIPE,
                                  env={**os.environ, 'PYTHON_BIN': sys.executable})
        assert second.stdout.readline() == '== waiting: another process makes .venv\n'
        digits = subprocess.run('cat requirements*.txt | cksum | cut -d" " -f1', shell=True, cwd=tmp_path, text=True,
                                capture_output=True).stdout.strip()
        (tmp_path / '.venv').mkdir()
        (tmp_path / f'.venv/.{digits}-requirements-dev.txt').touch()
    assert second.communicate()[0] == '' and second.returncode == 0


def test_setup_names_an_interpreter_that_does_not_start(tmp_path):
    copied_setup(tmp_path)
    done = subprocess.run(['bash', 'trainer_files/setup.sh'], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, 'PYTHON_BIN': 'python3.99'})
    assert done.returncode == 2 and done.stderr == (
        'error: PYTHON_BIN=python3.99 does not start Python 3.10 to 3.14 (python3.99: command not found); name one that '
        'does, or leave it out\n')


def commands(text):
    """Argument lists of the train.py commands in a dry run's output."""
    lists = [shlex.split(line[2:]) for line in text.splitlines() if line.startswith('+ ')]
    return [words[words.index('train.py') + 1:] for words in lists if 'train.py' in words]


@pytest.mark.parametrize('name', SCRIPTS)
def test_dry_run_prints_commands_that_train_py_accepts(name):
    found = commands(script(name, '--dry-run'))
    options = [parse_train(words) for words in found]
    steps = {'mdil': 3, 'ours': 3, 'adapters_only': 3, 'parallel': 3, 'fine_tune': 3, 'multi_task': 1, 'single_task': 3, 'ablations': 36,
             'demo': 6, 'small_real': 6, 'speedrun': 1}
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


@pytest.mark.parametrize('name, every', [('mdil', 3), ('single_task', 3), ('multi_task', 1), ('parallel', 1)])
def test_evaluate_says_after_which_steps(name, every):
    counts = [len(evaluations(script(name, '--dry-run', f'EVALUATE={word}'))) for word in ('every', 'last', 'none')]
    assert counts == [every, every if name == 'single_task' else 1, 0]


def test_epochs_are_those_of_train_py_unless_set():
    text = script('single_task', '--dry-run', '--recipe', 'released')
    assert [option.num_epochs for option in map(parse_train, commands(text))] == [150, 150, 200]


@pytest.mark.parametrize('argument', ['SELECT=first', 'METRIC=x', 'RECIPE=x', '--recipe', 'EVALUATE=never', 'METHODS=x', 'PYTHON=/nope'])
def test_settings_that_are_none_of_their_words_are_refused(argument):
    assert ' is not ' in script('ablations', argument, expect=2)


@pytest.mark.parametrize('arguments, says', [
    (['DOMAINS=IDD'], 'needs two domains or more'), (['NODES=2', 'HOST=a', 'NODE=1'], 'runs on one machine')])
def test_parallel_refuses_what_it_cannot_divide(arguments, says):
    assert says in script('parallel', '--dry-run', *arguments, expect=2)


def test_the_scripts_know_every_method():
    names = [*METHODS, 'ours']
    found = commands(script('ablations', '--dry-run', 'DOMAINS=CS', 'RECIPES=', f'METHODS={" ".join(names)}'))
    assert [words[words.index('--method') + 1] for words in found] == names


def test_the_earlier_name_runs_the_same_commands():
    assert script('ours', '--dry-run', 'HEIGHT=256') == script('mdil', '--dry-run', 'HEIGHT=256')


def test_a_missing_data_folder_is_one_line(tmp_path):
    said = script('mdil', f'DATA={tmp_path}/nowhere', f'OUT={tmp_path}/out', f'PYTHON={sys.executable}', expect=2)
    assert said.strip() == f'error: DATA={tmp_path}/nowhere is not a folder; name the folder that holds the data sets'


def test_help_and_unknown_arguments():
    assert 'DOMAINS=' in script('mdil', '--help')
    assert "unknown argument '--nonsense'" in script('mdil', '--nonsense', expect=2)
    assert "unknown argument 'DOMAIN=CS'; did you mean DOMAINS?" in script('mdil', 'DOMAIN=CS', expect=2)
    for setting in ('METHODS', 'RECIPES'):
        assert f'this script does not read {setting}; ablations.sh does' in script('mdil', f'{setting}=lwf', expect=2)


def test_speedrun_starts_from_the_weights_it_is_given():
    option, = map(parse_train, commands(script('speedrun', '--dry-run', 'WEIGHTS=imagenet', 'NETWORK=fcn_resnet50',
                                               'EPOCHS=4')))
    assert (option.weights, option.num_epochs) == ('imagenet', 4)


@pytest.mark.parametrize('setting, message', [
    ('GPUS=two', 'GPUS=two is not a whole number'), ('GPUS=0', 'GPUS=0 is not a whole number of at least 1'),
    ('HEIGHT=a[$(touch MADE)]', 'HEIGHT=a.* is not a whole number'), ('WIDTH=-8', 'WIDTH=-8 is not'),
    ('WORKERS=', 'WORKERS= is not'), ('SEED=1e3', 'SEED=1e3 is not'), ('BATCH=99999999999', 'BATCH=9+ is not'),
    ('EPOCHS=5 3', 'EPOCHS="5 3" has 2 numbers for 3 domains'), ('EPOCHS=5 x 3', "'x' is not a whole number"),
    ('EPOCHS=0', "'0' is not"), ('DOMAINS=', 'DOMAINS is empty'), ('DATA=', 'DATA is empty'),
    ('OUT=', 'OUT is empty'), ('DOMAINS=  ', 'DOMAINS is empty'),
    ('NODES=2', 'NODES=2 needs HOST=NAME, the first machine'), ('NODE=1', 'NODE=1 of NODES=1'),
    ('TRAIN_ARGS=--cache "x', 'a quote is not closed'), ('TRAIN_ARGS=--sync-bn --height=64', 'sets --height; use HEIGHT'),
    ('TRAIN_ARGS=--method lwf', 'sets --method; use another script'), ('TRAIN_ARGS=--savedir x', 'use OUT'), ('TRAIN_ARGS=-h', 'trains nothing')])
def test_settings_are_checked_before_anything_runs(tmp_path, setting, message):
    setting = setting.replace('MADE', str(tmp_path / 'made'))
    for name, environment in (('mdil', {}), ('multi_task', dict([setting.split('=', 1)]))):
        arguments = [] if environment else [setting]
        done = subprocess.run(['bash', f'trainer_files/{name}.sh', '--dry-run', *arguments], cwd=ROOT, text=True,
                              capture_output=True, env={**os.environ, **environment})
        if environment.get(setting.split('=')[0]) == '':    # an empty variable is none
            continue
        assert done.returncode == 2 and done.stderr.startswith('error: ') and done.stderr.count('\n') == 1, done
        assert re.search(message, done.stderr) and not done.stdout
    assert not (tmp_path / 'made').exists()


@pytest.mark.parametrize('settings, message', [
    (['METHODS=mdil'], 'mdil learns one domain after another'), (['METHODS='], 'METHODS is empty'),
    (['EPOCHS=1 2 3'], 'all domains train together; give one number'),
    (['METHODS=multi-task-mixed', 'BATCH=4'], 'BATCH=4 does not divide among 3 domains in each of 1 process; use 3 or 6')])
def test_joint_training_checks_its_settings_first(settings, message):
    done = subprocess.run(['bash', 'trainer_files/multi_task.sh', '--dry-run', *settings], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count('\n') == 1 and not done.stdout


def test_joint_training_takes_methods_and_a_batch_that_suits_them():
    trained = commands(script('multi_task', '--dry-run', 'METHODS=multi-task multi-task-mixed', 'GPUS=4'))
    assert [line[line.index('--method') + 1] for line in trained] == ['multi-task', 'multi-task-mixed']
    assert {line[line.index('--batch-size') + 1] for line in trained} == {'12'}


def test_quotes_in_train_args_keep_spaces_and_nothing_is_expanded_or_run(tmp_path):
    text = script('mdil', '--dry-run', 'DOMAINS=CS', f"TRAIN_ARGS=--cache '/my disk/*' --env \"a b\" --model-name-suffix $(touch {tmp_path}/made)")
    assert not (tmp_path / 'made').exists()
    words = commands(text)[0]
    assert words[words.index('--cache') + 1] == '/my disk/*' and words[words.index('--env') + 1] == 'a b'
    assert words[words.index('--model-name-suffix') + 1] == '$(touch'


def test_paths_with_spaces_and_home():
    option = parse_train(commands(script('mdil', '--dry-run', 'DATA=~/my data', 'OUT=a b', 'DOMAINS=CS'))[0])
    assert (option.data_root, option.savedir) == (os.path.expanduser('~/my data'), 'a b/mdil/step1-CS')


def test_empty_words_stay_and_blank_settings_have_none():
    words = commands(script('mdil', '--dry-run', 'DOMAINS=CS', "TRAIN_ARGS=--model-name-suffix ''", 'PATHS=\n\t'))[0]
    assert words[-2:] == ['--model-name-suffix', ''] and '--data' not in words


def test_the_comparison_of_a_folder_with_spaces():
    line = script('small_real', '--dry-run', 'OUT=a b').splitlines()[-1]
    assert shlex.split(line)[4:7] == ['compare', 'mdil=a b/mdil', 'fine-tune=a b/fine-tune']


def test_all_commands_are_told_where_an_own_domain_lies():
    text = script('mdil', '--dry-run', 'DOMAINS=CS my', "PATHS=my='/my disk/x' CS=y")
    lists = [shlex.split(line[2:]) for line in text.splitlines() if line.startswith('+ ')]
    assert len(lists) == 6      # a check, two steps, two evaluations, a report
    assert all(words.count('--data') == 2 and 'my=/my disk/x' in words and 'CS=y' in words for words in lists)
    assert f'my={os.path.expanduser("~/my disk/x")}' in commands(script('mdil', '--dry-run', 'PATHS="my=~/my disk/x"'))[0]
    assert "PATHS: 'my' is not NAME=PATH" in script('mdil', '--dry-run', 'PATHS=CS=y my', expect=2)


@pytest.mark.parametrize('settings, batch, said', [
    ([], 6, ''), (['GPUS=3'], 6, ''), (['GPUS=4'], 8, '== BATCH=8: 6 images do not divide among 4 processes, 2 for each do'),
    (['GPUS=4', 'NODES=2', 'HOST=x'], 8, 'among 8 processes, 1 for each'), (['GPUS=4', 'BATCH=12'], 12, '')])
def test_the_batch_is_one_that_all_gpus_share(settings, batch, said):
    text = script('mdil', '--dry-run', *settings)
    assert parse_train(commands(text)[0]).batch_size == batch
    assert said in text and ('BATCH=' in text) == bool(said)


def test_a_batch_that_gpus_cannot_share_is_refused():
    assert 'BATCH=6 does not divide among 4 processes; use 4 or 8' in script('mdil', 'BATCH=6', 'GPUS=4', expect=2)
    assert 'BATCH=3 does not divide among 4 processes; use 4' in script('demo', '--dry-run', 'GPUS=4', expect=2)


def launchers(text):
    """What starts train.py in a dry run's output."""
    return [line[2:].split(' train.py')[0] for line in text.splitlines() if ' train.py ' in line]


def test_several_machines_meet_at_the_first_and_one_evaluates():
    words = ['--dry-run', 'NODES=2', 'GPUS=3', 'HOST=first:1234', 'OUT=o']
    first, second = (script('mdil', *words, f'NODE={node}') for node in (0, 1))
    assert launchers(first) == launchers(second) and len(launchers(first)) == 3
    assert launchers(first)[0].startswith(
        '.venv/bin/python -m mdil torchrun --nproc_per_node 3 --nnodes 2 --rdzv_backend c10d --rdzv_endpoint first:1234 --rdzv_id '
        'mdil-o-mdil-step1-cityscapes ')
    assert first.count('eval.py') == 3 and 'report' in first
    assert 'eval.py' not in second and 'report' not in second


def test_under_slurm_the_machines_are_those_of_the_job(tmp_path):
    """sbatch runs the script on the first machine, srun on each."""
    (tmp_path / 'scontrol').write_text('#!/bin/sh\n[ "$*" = "show hostnames n[3-4]" ] && printf "n3\\nn4\\n"')
    (tmp_path / 'scontrol').chmod(0o755)
    slurm = {**os.environ, 'PATH': f'{tmp_path}:{os.environ["PATH"]}', 'SLURM_JOB_ID': '71234', 'SLURM_NODEID': '0',
             'SLURM_JOB_NUM_NODES': '2', 'SLURM_JOB_NODELIST': 'n[3-4]'}
    for step, starts in ((None, 'srun --nodes 2 --ntasks 2 --ntasks-per-node 1 .venv/bin/python -m mdil torchrun'),
                         ('0', '.venv/bin/python -m mdil torchrun')):
        environment = slurm if step is None else {**slurm, 'SLURM_STEP_ID': step}
        done = subprocess.run(['bash', 'trainer_files/mdil.sh', '--dry-run', 'GPUS=2'], cwd=ROOT, text=True,
                              capture_output=True, env=environment)
        assert launchers(done.stdout)[0].startswith(starts) and '--rdzv_endpoint n3:21234 ' in done.stdout, done


@pytest.mark.parametrize('name', SCRIPTS)
def test_sbatch_from_another_folder_says_what_to_do(tmp_path, name):
    """It runs a copy of the script."""
    copy = tmp_path / 'spool' / 'slurm_script'
    copy.parent.mkdir()
    copy.write_text((ROOT / f'trainer_files/{name}.sh').read_text())
    for folder, status in ((tmp_path, 2), (ROOT, 0)):
        done = subprocess.run(['bash', copy, '--dry-run'], cwd=tmp_path, capture_output=True, text=True,
                              env={**os.environ, 'SLURM_SUBMIT_DIR': str(folder)})
        assert done.returncode == status, done
        assert (done.stderr == f'error: no train.py in {folder}: call sbatch in the folder that holds it\n') == bool(status)


def test_a_checkout_with_autocrlf_keeps_line_ends(tmp_path):
    for arguments in (['init', '-q'], ['config', 'core.autocrlf', 'true']):
        subprocess.run(['git', *arguments], cwd=tmp_path, check=True)
    (tmp_path / '.gitattributes').write_text((ROOT / '.gitattributes').read_text())
    names = 'x.sh', 'run', 'x.py', 'x.csv', 'x.json'
    for name in names:
        (tmp_path / name).write_bytes(b'a\nb\n')
    (tmp_path / 'x.png').write_bytes(b'\x89PNG\r\n\n')
    subprocess.run(['git', 'add', '.'], cwd=tmp_path, check=True, capture_output=True)
    for name in (*names, 'x.png'):
        (tmp_path / name).unlink()
    subprocess.run(['git', 'checkout', '-q', '.'], cwd=tmp_path, check=True)
    assert {(tmp_path / name).read_bytes() for name in names} == {b'a\nb\n'}
    assert (tmp_path / 'x.png').read_bytes() == b'\x89PNG\r\n\n'


@pytest.mark.parametrize('number, gpus', [(signal.SIGUSR1, 1), (signal.SIGHUP, 2)])
def test_a_signal_ends_with_75_and_the_next_run_goes_on(toy, tmp_path, number, gpus):
    words = ['bash', 'trainer_files/mdil.sh', f'DATA={toy}', f'OUT={tmp_path}', 'DOMAINS=cityscapes', f'EPOCHS={20 if gpus == 1 else 200}',
             'BATCH=2', 'HEIGHT=32', 'WORKERS=0', f'GPUS={gpus}', f'PYTHON={sys.executable}',
             'TRAIN_ARGS=--limit-batches 1 --val-every 50']
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               env={**os.environ, 'OMP_NUM_THREADS': '1'})
    wait_for(tmp_path / 'mdil/step1-cityscapes/checkpoint.pth.tar', process)
    process.send_signal(number)
    output = process.communicate()[0]
    assert process.returncode == 75 and 'stopped by a signal' in output, output
    if gpus > 1:
        return
    output = script('mdil', *words[2:])
    assert re.search(r'resumed in \S+ after epoch \d', output) and (tmp_path / 'mdil/results.json').exists()


def test_a_sequence_that_is_run_again_loses_nothing(toy, tmp_path):
    words = [f'DATA={toy}', f'OUT={tmp_path}', 'BATCH=2', 'HEIGHT=32', 'WORKERS=0', f'PYTHON={sys.executable}',
             'TRAIN_ARGS=--limit-batches 1 --device cpu', 'DOMAINS=cityscapes BDD']
    results = tmp_path / 'mdil/results.json'
    assert 'it already holds the results' not in script('mdil', *words, 'EPOCHS=1')
    before = results.read_bytes()
    text = script('mdil', *words, 'EPOCHS=1 2', expect=2)
    assert f'kept {results}: it already holds the results of' in text and 'num-epochs was 1, is 2' in text
    text = script('mdil', *words, 'DOMAINS=cityscapes BDD Cityscape', 'EPOCHS=1', expect=2)
    assert "unknown domain 'Cityscape'" in text and 'train.py' not in text
    assert results.read_bytes() == before and not (tmp_path / 'mdil/step3-Cityscape').exists()


def test_later_domains_are_learnt_at_once_from_the_first_and_joined(toy, tmp_path):
    words = [f'DATA={toy}', f'OUT={tmp_path}', 'DOMAINS=cityscapes BDD IDD', 'EPOCHS=1', 'BATCH=2', 'HEIGHT=32', 'WORKERS=0',
             f'PYTHON={sys.executable}', 'TRAIN_ARGS=--limit-batches 1 --device cpu']
    options = [parse_train(arguments) for arguments in commands(script('parallel', '--dry-run', *words))]
    base = f'{tmp_path}/parallel/step1-cityscapes/model_best.pth.tar'
    assert [(option.domains, option.state) for option in options] == [
        (['cityscapes'], None), (['cityscapes', 'BDD'], base), (['cityscapes', 'IDD'], base)]
    assert 'cityscapes: unchanged' in script('parallel', *words)
    joined = checkpoint.read(tmp_path / 'parallel/joined.pth.tar')
    assert [entry['name'] for entry in joined['domains']] == ['cityscapes', 'BDD', 'IDD']
    assert set(json.loads((tmp_path / 'parallel/results.json').read_text())['domains']) == {'cityscapes', 'BDD', 'IDD'}
    for name in ('BDD', 'IDD'):
        number = ['cityscapes', 'BDD', 'IDD'].index(name)
        learnt = checkpoint.read(tmp_path / f'parallel/step{number + 1}-{name}/model_best.pth.tar')['state_dict']
        assert torch.equal(joined['state_dict'][f'decoder.{number}.output_conv.weight'], learnt['decoder.1.output_conv.weight'])


def test_one_gpu_means_one_of_several():
    assert {option.parallel for option in map(parse_train, commands(script('mdil', '--dry-run')))} == {'none'}
    assert {option.parallel for option in map(parse_train, commands(script('mdil', '--dry-run', 'GPUS=2')))} == {'auto'}


@pytest.mark.parametrize('assigned, used', [('4,5', ['4', '5']), ('4', ['4', '4']), ('4,5,6', ['4', '5']), ('', ['0', '1'])])
def test_domains_learnt_at_once_share_out_the_gpus_that_were_assigned(tmp_path, monkeypatch, assigned, used):
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', assigned)
    python = tmp_path / 'python'
    python.write_text('#!/bin/sh\ncase "$*" in *train.py*--state*) echo "$CUDA_VISIBLE_DEVICES" >> "$0.gpus";; esac\n')
    python.chmod(0o755)
    script('parallel', 'DATA=tests', f'OUT={tmp_path}', 'EPOCHS=1', 'GPUS=2', f'PYTHON={python}')
    assert sorted((tmp_path / 'python.gpus').read_text().split()) == used


def test_a_domain_that_cannot_be_learnt_at_once_is_named(tmp_path):
    """With a Python that ends with 2 where train.py learns camvid, as it does without its data, and with 0 else."""
    python = tmp_path / 'python'
    python.write_text('#!/bin/sh\necho "$@" >> "$0.calls"\ncase "$*" in *train.py*camvid*) exit 2;; esac\n')
    python.chmod(0o755)
    text = script('parallel', 'DATA=tests', f'OUT={tmp_path}', 'DOMAINS=cityscapes BDD camvid', 'EPOCHS=1', f'PYTHON={python}', expect=2)
    assert 'error: not learnt: camvid; see log.txt' in text
    calls = (tmp_path / 'python.calls').read_text()
    assert calls.count('train.py') == 3 and 'extract' in calls and 'branches add' not in calls
