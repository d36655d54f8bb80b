"""The scripts as a user runs them, on toy roads: every method, the paper's commands, resuming, two processes."""
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from mdil import eval as evaluation, train
from mdil.evaluation.evaluation import evaluate as evaluate_split
from mdil.models import METHODS, build_model
from mdil.models import checkpoint
from mdil.models.layouts import published_keys
from mdil.training import domain_data, resume
from mdil.training.options import parse_train
from mdil.utils.errors import UserError, run_main
from mdil.utils.parallel import Place
from tests.conftest import ROOT, run_script, wait_for
from tests.fill import fill
from tests.test_checkpoints import encoder_file, published_file

SMALL = ['--height', '32', '--batch-size', '2', '--limit-batches', '2', '--num-workers', '0', '--device', 'cpu']


def learn(toy, savedir, *arguments, epochs=1):
    """train.py in this process; returns the latest checkpoint's content."""
    train.main(['--data-root', str(toy), '--savedir', str(savedir), '--num-epochs', str(epochs), *SMALL, *map(str, arguments)])
    return checkpoint.read(savedir / 'checkpoint.pth.tar')


def evaluate(toy, out, *arguments):
    """eval.py in this process; returns its JSON."""
    evaluation.main(['--data-root', str(toy), '--json', str(out), *SMALL, *map(str, arguments)])
    return json.loads(out.read_text())


@pytest.mark.usefixtures('shallow')
@pytest.mark.parametrize('method', METHODS)
def test_every_method_learns_two_domains_and_is_evaluated(toy, tmp_path, method):
    row = METHODS[method]
    if row.joint or row.one_domain:
        states = [tmp_path / 'one']
        names = ['cityscapes'] if row.one_domain else ['cityscapes', 'IDD']
        learn(toy, states[0], '--method', method, '--domains', *names)
    else:
        states = [tmp_path / 'one', tmp_path / 'two']
        learn(toy, states[0], '--method', method, '--domains', 'CS')
        learn(toy, states[1], '--method', method, '--domains', 'CS', 'IDD', '--state', states[0] / 'model_best.pth.tar')
        names = ['cityscapes', 'IDD']
    content = checkpoint.read(states[-1] / 'checkpoint.pth.tar')
    assert (content['method'], [d['name'] for d in content['domains']]) == (method, names)
    assert isinstance(content['best_acc'], float) and content['version'] == 1
    assert not any(key.startswith('module.') for key in content['state_dict'])
    line = json.loads((states[-1] / 'metrics.jsonl').read_text())
    assert set(line['train']) == {'loss', 'ce', 'kd', 'images_per_second'} and set(line['val']) == set(names)
    assert (line['train']['kd'] != 0) == (len(row.terms) > 1 and len(names) > 1)
    results = evaluate(toy, tmp_path / 'x.json', '--state', *(state / 'checkpoint.pth.tar' for state in states))
    assert set(results['domains']) == set(names) and len(results['steps']) == len(states)
    for name in names:
        assert results['domains'][name]['miou'] == pytest.approx(line['val'][name]['miou'], abs=1e-9)


@pytest.mark.usefixtures('shallow')
def test_the_papers_three_commands(toy, tmp_path):
    encoder = encoder_file(tmp_path / 'erfnet_encoder_pretrained.pth.tar')
    learn(toy, tmp_path / '1', '--state', encoder, '--num-classes', 20, '--current_task=0', '--dataset=cityscapes')
    learn(toy, tmp_path / '2', '--model-name-suffix=ours-CS1-BDD2', '--state', tmp_path / '1/checkpoint.pth.tar',
          '--dataset=BDD', '--dataset_old=cityscapes', '--num-classes', 20, 20, '--current_task=1', '--nb_tasks=2',
          '--num-classes-old', 20)
    content = learn(toy, tmp_path / '3', '--model-name-suffix=OURS-CS1-BDD2-IDD3', '--state',
                    tmp_path / '2/checkpoint.pth.tar', '--dataset-new=IDD', '--datasets', 'cityscapes', 'BDD', 'IDD',
                    '--num-classes', 20, 20, 27, '--num-classes-old', 20, 20, '--current_task=2', '--nb_tasks=3',
                    '--lambdac=0.1')
    assert [d['classes'] for d in content['domains']] == [20, 20, 27]
    results = evaluate(toy, tmp_path / 'x.json', '--state', *(tmp_path / f'{n}/checkpoint.pth.tar' for n in (1, 2, 3)),
                       '--single-task', 'CS=50', 'BDD=50', 'IDD=50')
    assert set(results['summary']['forgetting']) == {'cityscapes', 'BDD'}
    assert results['summary']['delta_m'] < 0


def test_published_files_are_evaluated_and_learnt_from(toy, tmp_path, capsys):
    model = fill(build_model([20, 20]))
    path = published_file(tmp_path / 'x', published_keys(model.state_dict(), [20, 20], 'parallel'))
    assert set(evaluate(toy, tmp_path / 'x.json', '--state', path, '--domains', 'CS', 'BDD')['domains']) == {
        'cityscapes', 'BDD'}
    assert 'tensors loaded' in capsys.readouterr().err
    with pytest.raises(UserError, match='no domain names; pass --domains'):
        evaluate(toy, tmp_path / 'y.json', '--state', path)
    content = learn(toy, tmp_path / 'next', '--state', path, '--domains', 'CS', 'BDD', 'IDD', '--method', 'mdil')
    assert len(content['domains']) == 3
    with pytest.raises(UserError, match='already knows IDD, the domain to learn; start from the checkpoint of the step before'):
        learn(toy, tmp_path / 'again', '--state', tmp_path / 'next/model_best.pth.tar', '--domains', 'CS', 'BDD', 'IDD')


@pytest.mark.usefixtures('shallow')
def test_released_recipe_of_step_three_from_a_published_file(toy, tmp_path):
    model = fill(build_model([20, 20]))
    path = published_file(tmp_path / 'x', published_keys(model.state_dict(), [20, 20], 'parallel'))
    content = learn(toy, tmp_path / 'next', '--state', path, '--domains', 'CS', 'BDD', 'IDD', '--recipe', 'released')
    old, new = model.state_dict(), content['state_dict']
    moved = {key for key in old if ('.0.' in key or '.1.' in key) and not torch.equal(old[key], new[key])}
    assert 'encoder.initial_block.bn_ini.0.running_mean' in moved and 'decoder.1.layers.0.bn.running_var' in moved
    opts = json.loads((tmp_path / 'next/opts.json').read_text())
    assert opts['options']['steps_per_batch'] == 2 and opts['options']['published_metric'] is True
    assert opts['class_weights']['IDD'][0] == pytest.approx(3.2356356) and opts['class_weights']['IDD'][-1] == 0


@pytest.mark.usefixtures('shallow')
def test_old_domain_without_data_is_not_validated(toy, tmp_path, capsys):
    learn(toy, tmp_path / '1', '--domains', 'CS')
    learn(toy, tmp_path / '2', '--domains', 'CS', 'BDD', '--state', tmp_path / '1/checkpoint.pth.tar', '--data',
          f'CS={tmp_path}/gone')
    assert 'cityscapes is not validated' in capsys.readouterr().err
    assert list(json.loads((tmp_path / '2/metrics.jsonl').read_text())['val']) == ['BDD']


def equal(a, b):
    """Whether two checkpoint contents are equal to the last bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def metrics(folder):
    """metrics.jsonl without times."""
    lines = [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]
    for line in lines:
        line['train'].pop('images_per_second', None)
    return lines


class StopAfter(Exception):
    """Ends a run as a crash would, after some batches."""


def learn_until(monkeypatch, toy, folder, batches, arguments):
    """A run, or the rest of one, that dies after `batches` batches, checkpoints written after each."""
    count, real = [0], train.train_batch

    def dying(*args):
        if count[0] == batches:
            raise StopAfter
        count[0] += 1
        return real(*args)
    with monkeypatch.context() as patch:
        patch.setattr(train, 'train_batch', dying)
        with pytest.raises(StopAfter):
            learn(toy, folder, *arguments, '--checkpoint-minutes', 0, epochs=2)


@pytest.mark.usefixtures('shallow')
@pytest.mark.parametrize('method, stops', [('mdil', [(0, 1), (2, 1), (2, 1)]), ('multi-task', [(0, 3)]), ('lwf', [(0, 2)]),
                                           ('multi-task-mixed', [(0, 1), (2, 2)]),
                                           *((name, [(0, 1)]) for name in METHODS
                                             if name not in ('mdil', 'multi-task', 'multi-task-mixed', 'lwf'))])
def test_interrupted_equals_straight(monkeypatch, toy, tmp_path, method, stops):
    """Within the first epoch, between the epochs (2 batches each, 4 of multi-task), within the second.

    stops: [(loader processes, batches until the run dies once more)].
    """
    alone = METHODS[method].one_domain
    arguments = ['--method', method, '--domains', 'CS', *([] if alone else ['IDD']), '--class-weights', 'none']
    if not METHODS[method].joint and not alone:
        torch.manual_seed(1)
        torch.save({'state_dict': build_model([20], method).state_dict()}, tmp_path / 'start')
        arguments += ['--state', tmp_path / 'start']
    straight = learn(toy, tmp_path / 'straight', *arguments, epochs=2)
    for number, (workers, batches) in enumerate(stops):
        again = ['--resume'] if number else []
        learn_until(monkeypatch, toy, tmp_path / 'broken', batches, [*arguments, '--num-workers', workers, *again])
    resumed = learn(toy, tmp_path / 'broken', *arguments, '--num-workers', workers, '--resume', epochs=2)
    for content in (straight, resumed):
        content.pop('options')
    assert equal(straight, resumed)
    assert metrics(tmp_path / 'straight') == metrics(tmp_path / 'broken')


def test_an_option_that_the_interrupted_run_did_not_know_may_be_left_at_its_default():
    options = SimpleNamespace(lr=0.1, sync_bn=False, distill_domains=None)
    assert resume.differences({'lr': 0.1}, options) == ([], [])
    options.distill_domains = 1
    assert resume.differences({'lr': 0.1}, options) == (['--distill-domains was None, is 1'], [])


@pytest.mark.usefixtures('shallow')
def test_resuming_with_other_options_is_refused_and_finished_is_said(toy, tmp_path, capsys):
    learn(toy, tmp_path / 'a', '--domains', 'CS', epochs=1)
    with pytest.raises(UserError, match='--lr was 0.0005, is 0.1; --seed was 0, is 7'):
        learn(toy, tmp_path / 'a', '--domains', 'CS', '--resume', '--seed', 7, '--lr', 0.1)
    with pytest.raises(UserError, match='--domains was .*cityscapes.*, is .*BDD'):
        learn(toy, tmp_path / 'a', '--domains', 'BDD', '--resume')
    learn(toy, tmp_path / 'a', '--domains', 'CS', '--resume', '--num-workers', 1)
    assert 'already finished after 1 epoch\n' in capsys.readouterr().out


@pytest.mark.usefixtures('shallow')
def test_a_damaged_checkpoint_falls_back_to_the_previous_one(toy, tmp_path, capsys):
    arguments = ['--domains', 'CS', '--class-weights', 'none']
    straight = learn(toy, tmp_path / 'a', *arguments, epochs=2)
    latest, previous = (tmp_path / 'a' / name for name in ('checkpoint.pth.tar', 'checkpoint.previous.pth.tar'))
    latest.write_bytes(latest.read_bytes()[:1000])
    assert equal(learn(toy, tmp_path / 'a', *arguments, '--resume', epochs=2)['state_dict'], straight['state_dict'])
    assert 'continuing from' in capsys.readouterr().err
    for path in (latest, previous):
        path.write_bytes(b'')
    with pytest.raises(UserError, match='damaged or not a checkpoint.*damaged or not a checkpoint'):
        learn(toy, tmp_path / 'a', *arguments, '--resume', epochs=2)


def start_script(toy, savedir, *arguments, **how):
    return subprocess.Popen([sys.executable, 'train.py', '--data-root', str(toy), '--savedir', str(savedir),
                             '--domains', 'CS', *SMALL, '--num-epochs', '500', *arguments], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, 'OMP_NUM_THREADS': '1'},
                            **how)


def loaders(process):
    """The loader processes of a run: children with its own command line (Python's resource tracker has another)."""
    line = lambda pid: Path(f'/proc/{pid}/cmdline').read_bytes()
    children = [child for thread in Path(f'/proc/{process.pid}/task').iterdir()
                for child in (thread / 'children').read_text().split()]
    return [int(child) for child in children if line(child) == line(process.pid)]


def test_a_signal_saves_and_stops_and_leaves_the_loaders_at_work(toy, tmp_path):
    """Schedulers send it to all processes of the run, the loaders too; a run notes all of these signals alike."""
    process = start_script(toy, tmp_path, '--num-workers', '2', start_new_session=True)
    wait_for(tmp_path / 'checkpoint.pth.tar', process)
    assert len(loaders(process)) >= 2
    caught = int(re.search(r'SigCgt:\s*(\w+)', Path(f'/proc/{process.pid}/status').read_text())[1], 16)
    for number in (signal.SIGUSR1, signal.SIGHUP, signal.SIGINT):
        assert caught >> number - 1 & 1, number
        for loader in loaders(process):
            os.kill(loader, number)
    os.killpg(process.pid, signal.SIGTERM)
    _, err = process.communicate()
    assert process.returncode == 75 and 'stopped by a signal' in err, err
    assert checkpoint.read(tmp_path / 'checkpoint.pth.tar')['batch'] > 0


def test_a_run_goes_on_when_the_folder_of_all_steps_has_moved(toy, tmp_path):
    second = '--domains', 'CS', 'IDD', '--resume', '--state'
    learn(toy, tmp_path / 'runs/1', '--domains', 'CS')
    learn(toy, tmp_path / 'runs/2', *second, tmp_path / 'runs/1/model_best.pth.tar')
    (tmp_path / 'runs').rename(tmp_path / 'moved')
    learn(toy, tmp_path / 'moved/2', *second, tmp_path / 'moved/1/model_best.pth.tar')
    learn(toy, tmp_path / 'moved/1', '--domains', 'CS', '--seed', '1', '--overwrite')
    with pytest.raises(UserError, match='--state was .*/runs/1/model_best.pth.tar, is .*/moved/1/model_best'):
        learn(toy, tmp_path / 'moved/2', *second, tmp_path / 'moved/1/model_best.pth.tar')


def test_a_second_run_on_a_folder_is_refused_until_the_first_is_dead(toy, tmp_path):
    process = start_script(toy, tmp_path)
    try:
        wait_for(tmp_path / 'checkpoint.pth.tar', process)
        with pytest.raises(UserError, match='another run is at work'):
            learn(toy, tmp_path, '--domains', 'CS', '--resume')
    finally:
        process.kill()
        process.communicate()
    learn(toy, tmp_path, '--domains', 'CS', '--overwrite')


def test_bad_input_is_one_line_and_status_two(tmp_path, script_here):
    for arguments in (['train', '--savedir', tmp_path / 's', '--domains', 'CS', '--data-root', tmp_path],
                      ['eval', '--state', tmp_path / 'none']):
        status, _, err = script_here(*arguments)
        assert status == 2 and err.startswith('error: ') and err.count('\n') == 1
    # Once with an interpreter of its own.
    assert run_script('train.py', '--nonsense', expect=2).stderr.startswith('error: ')


def validation_loss(toy, state):
    """Loss of a checkpoint on the validation images of BDD, its second domain, by one process."""
    place = Place(torch.device('cpu'))
    data, = domain_data.build_data(parse_train(['--domains', 'BDD', '--savedir', 'x', '--data-root', str(toy), *SMALL]), place)
    model = checkpoint.load_network(checkpoint.read_checkpoint(state))
    return evaluate_split(model, 1, data.val, data.class_weights, place).loss


def test_two_processes_learn_the_same_weights_and_evaluate_as_one_does(toy, tmp_path):
    """torchrun with gloo: both ranks end with the same tensors, the confusion matrices add up exactly."""
    launch = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2']
    start, state = tmp_path / '1/checkpoint.pth.tar', tmp_path / '2/checkpoint.pth.tar'
    learn(toy, tmp_path / '1', '--domains', 'CS')
    run_script(*launch, 'tests/rank_worker.py', tmp_path, '--data-root', toy, '--savedir', tmp_path / '2', '--domains', 'CS', 'BDD',
               '--state', start, '--method', 'mdil', '--lambdac', '10', '--shared-lr', '1e-3', '--num-epochs', '1', *SMALL,
               OMP_NUM_THREADS='1', PYTHONPATH='.')
    ranks = [torch.load(tmp_path / f'rank{rank}.pth', weights_only=True) for rank in (0, 1)]
    assert equal(*(rank['student'] for rank in ranks))
    assert ranks[0]['losses'] == ranks[1]['losses']     # of the whole batch
    # Their dropout differs, too.
    assert ranks[0]['seeds'][0] != ranks[1]['seeds'][0]
    assert equal(checkpoint.read(state)['state_dict'], ranks[0]['student'])
    line = json.loads((tmp_path / '2/metrics.jsonl').read_text())
    assert line['val']['BDD']['loss'] == pytest.approx(validation_loss(toy, state), rel=1e-6)
    run_script(*launch, 'eval.py', '--state', state, '--data-root', toy, '--json', tmp_path / 'two', '--height', '32',
               '--batch-size', '3', '--num-workers', '0', OMP_NUM_THREADS='1')
    two = json.loads((tmp_path / 'two').read_text())
    evaluation.main(['--data-root', str(toy), '--json', str(tmp_path / 'one'), '--height', '32', '--batch-size', '3',
                     '--num-workers', '0', '--state', str(state)])
    one = json.loads((tmp_path / 'one').read_text())
    assert one['domains']['cityscapes']['iou'] == two['domains']['cityscapes']['iou']
    assert one['domains']['cityscapes']['miou'] == two['domains']['cityscapes']['miou']


def test_a_dead_loader_worker_ends_with_advice(toy, tmp_path):
    process = start_script(toy, tmp_path, '--num-workers', '1')
    try:
        wait_for(tmp_path / 'checkpoint.pth.tar', process)
        os.kill(loaders(process)[0], signal.SIGKILL)
        _, err = process.communicate()
    finally:
        process.kill()
    # torch raises from a signal handler, which may also leave lines of its own before ours.
    assert process.returncode == 2 and err.splitlines()[-1].startswith('error: a loader process died'), err


def test_a_loader_worker_that_dies_while_it_hands_over_a_batch_ends_with_advice(capsys):
    def _try_get_data():        # the name of torch's function that waits for a worker
        raise ConnectionResetError(104, 'Connection reset by peer')
    with pytest.raises(SystemExit) as end:
        run_main(_try_get_data)
    assert end.value.code == 2 and 'a loader process died' in capsys.readouterr().err
    with pytest.raises(ConnectionResetError):       # of another origin: not ours to explain
        run_main(mock.Mock(side_effect=ConnectionResetError))


@pytest.mark.parametrize('error', [
    torch.OutOfMemoryError('CUDA out of memory. Tried to allocate ...'),
    RuntimeError('CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported')])
def test_out_of_gpu_memory_says_which_option_lowers_it(error, capsys):
    def main():
        raise error
    with pytest.raises(SystemExit) as end:
        run_main(main)
    assert end.value.code == 2 and 'GPU is out of memory; lower --batch-size' in capsys.readouterr().err


def test_a_gpu_that_is_not_there_is_refused(toy, tmp_path):
    if torch.cuda.device_count() > 7:
        pytest.skip('this machine has eight GPUs')
    with pytest.raises(UserError, match='this machine has . CUDA devices'):
        learn(toy, tmp_path, '--domains', 'CS', '--device', 'cuda:7')
