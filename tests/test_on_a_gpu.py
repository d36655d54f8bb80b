"""What a machine without a GPU can show of running on one: no tensor on the wrong device, nothing that waits for the device.

Fake tensors claim to be on a GPU and compute nothing; meta tensors do so with gradients, and
have no value that `.item()` or `if` could ask for.
"""
import contextlib
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from tqdm import tqdm

from mdil import train
from mdil.benchmarks import gpu, speed
from mdil.datasets.augment import augment_batch, draw
from mdil.evaluation.evaluation import logits_of
from mdil.models import METHODS, build_model
from mdil.training import building, domain_data
from mdil.training.options import parse_train
from mdil.training.plan import plan_step
from mdil.training.resume import Interrupt
from mdil.training.run import Run, like_their_weights
from mdil.utils import parallel
from mdil.utils.errors import UserError
from mdil.utils.graphs import EAGER, Graphed
from mdil.utils.parallel import Place, session
from tests.test_parallel import free_port, launched

pytestmark = pytest.mark.usefixtures('shallow_module')

PRECISIONS = 'fp32', 'bf16', 'fp16'


def run_on(device, method, *arguments, graphs=False):
    """A run of the method's last step on a device, without data."""
    row = METHODS[method]
    names = ['cityscapes', 'idd-lite', 'camvid'][:1 if row.one_domain else 3]
    options = parse_train(['--domains', *names, '--savedir', 'x', '--method', method, *arguments,
                           *([] if row.one_domain or row.joint else ['--state', 'x'])])
    counts, place = [20, 8, 12][:len(names)], Place(torch.device(device), graphs=graphs)
    student, teacher = build_model(counts, method), None
    if plan_step(options).needs_teacher:
        teacher = build_model(counts[:-1], method)
    building.freeze(student, options)
    terms = building.build_terms(options)
    step_loss = building.build_step_loss(student, teacher, [torch.ones(count) for count in counts], terms, options, place)
    run = SimpleNamespace(options=options, place=place, plan=plan_step(options), student=student, teacher=teacher, terms=terms,
                          step_loss=step_loss.train(), domain=None if row.mixed else len(names) - 1)
    for term in terms:
        term.setup(run)
    return run


def batch_on(device):
    return (torch.zeros(3, 3, 32, 64, dtype=torch.uint8, device=device),
            torch.zeros(3, 32, 64, dtype=torch.uint8, device=device))


@pytest.mark.parametrize('arguments', [(), ('--recipe', 'released')], ids=['corrected', 'released'])
def test_a_batch_trains_without_waiting_for_the_device(arguments):
    run = run_on('meta', 'mdil', *arguments)
    steps = []
    run.optimizer = SimpleNamespace(defaults={'fused': True}, zero_grad=lambda set_to_none: None, step=lambda: steps.append(1))
    run.scaler = torch.amp.GradScaler('cuda', enabled=False)
    losses = train.train_batch(run, *batch_on('meta'), run.domain)
    assert losses.keys() == {'loss', 'ce', 'kd'} and {loss.device.type for loss in losses.values()} == {'meta'}
    assert len(steps) == run.options.steps_per_batch and run.optimizer.found_inf.device.type == 'meta'
    assert all(p.grad.device.type == 'meta' for p in run.student.branch_parameters(run.domain))


@pytest.fixture
def fake_gpu(monkeypatch):
    """A context in which tensors are fake and may be on 'cuda', autocast included."""
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda *_, **__: True)
    monkeypatch.setattr(torch.cuda.amp.common, 'amp_definitely_not_available', lambda: False)
    return FakeTensorMode(allow_non_fake_inputs=True)


def to_fake_gpu(module):
    """The module, each of its tensors replaced by a fake one on the GPU; within the context of `fake_gpu`."""
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    moved = torch.empty(tensor.shape, dtype=tensor.dtype, device='cuda')
                    tensors[name] = nn.Parameter(moved, tensor.requires_grad) if tensors is part._parameters else moved
    return module


@pytest.mark.parametrize('method, precision', [*((method, 'bf16') for method in METHODS), ('mdil', 'fp32'), ('mdil', 'fp16')])
def test_every_method_computes_its_loss_on_the_device(method, precision, fake_gpu):
    run = run_on('cpu', method, '--precision', precision)
    with fake_gpu:
        to_fake_gpu(run.step_loss)
        for term in run.terms:
            for part, _ in term.parts(run):
                value = run.step_loss(*batch_on('cuda'), run.domain, term.name, part)
                assert value.device.type == 'cuda' and value.dtype == torch.float32 and value.shape == (1, 2)


def test_the_optimiser_goes_on_from_a_state_that_was_saved(fake_gpu):
    run = run_on('cpu', 'mdil')
    with fake_gpu:
        to_fake_gpu(run.student)
        first, second = (building.build_optimizer(run.student, run.options)[0] for _ in range(2))
        for parameter in run.student.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        first.found_inf = torch.zeros((), device='cuda')
        first.step()
        saved = first.state_dict()
        for moments in saved['state'].values():
            moments.update({name: value.cpu() for name, value in moments.items()})
        second.load_state_dict(saved)
        like_their_weights(second)
        second.step()
        assert {value.device.type for moments in second.state.values() for value in moments.values()} == {'cuda'}


@pytest.mark.parametrize('precision', PRECISIONS)
def test_augmentation_and_answers_are_on_the_device(precision, fake_gpu):
    model, place = build_model([20]).eval(), Place(torch.device('cuda'))
    with fake_gpu:
        images, labels = augment_batch(*batch_on('cuda'), [draw(0, 1, sample) for sample in range(3)], 19)
        with torch.inference_mode():
            logits = logits_of(to_fake_gpu(model), 0, images, place, precision)
        assert {tensor.device.type for tensor in (labels, logits, logits.argmax(1))} == {'cuda'}


@pytest.mark.parametrize('given', [['--precision', 'fp16'], ['--distill-domains', '1']])
def test_what_cannot_be_recorded_is_refused(given):
    with pytest.raises(UserError, match='--cuda-graphs cannot be combined with ' + ' '.join(given[:1])):
        parse_train(['--domains', 'cityscapes', '--savedir', 'x', '--method', 'mdil', '--cuda-graphs', *given])


def test_graphs_need_one_gpu(monkeypatch):
    with pytest.raises(UserError, match='--cuda-graphs needs a GPU'), session('cpu', graphs=True):
        pass
    launched(monkeypatch, RANK=0, WORLD_SIZE=1, LOCAL_RANK=0, MASTER_ADDR='127.0.0.1', MASTER_PORT=free_port())
    with pytest.raises(UserError, match='--cuda-graphs needs a GPU'), session('cpu', graphs=True):
        pass
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    monkeypatch.setattr(nn.Module, 'to', lambda self, *_, **__: self)
    monkeypatch.setattr(building, 'has_idle_weights', lambda *_: False)     # it moves the network to another device
    with pytest.raises(UserError, match='one GPU, not several'):
        run_on('cuda', 'mdil', graphs=True)


def test_torchrun_with_one_process_uses_graphs(monkeypatch):
    launched(monkeypatch, RANK=0, WORLD_SIZE=1, LOCAL_RANK=0, MASTER_ADDR='127.0.0.1', MASTER_PORT=free_port())
    monkeypatch.setattr(parallel, 'pick_device', lambda _: torch.device('cuda'))
    monkeypatch.setattr(parallel, 'join', lambda _: torch.distributed.init_process_group('gloo'))
    with session('cuda', graphs=True) as place:
        assert place == Place(torch.device('cuda'), graphs=True)


@pytest.mark.parametrize('recipe, tf32', [('corrected', True), ('released', False)])
def test_the_released_recipe_computes_in_full_float32(recipe, tf32, monkeypatch):
    class BuildsNoData(Exception):
        pass

    def build_data(*_):
        raise BuildsNoData
    monkeypatch.setattr(domain_data, 'build_data', build_data)
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', torch.backends.cudnn.allow_tf32)
    with pytest.raises(BuildsNoData):
        Run(parse_train(['--domains', 'cityscapes', '--savedir', 'x', '--recipe', recipe]), Place(torch.device('cpu')))
    assert torch.backends.cudnn.allow_tf32 is tf32


class Recorder:
    """Stands for CUDA's streams and graphs; counts the replays."""

    def __init__(self, monkeypatch):
        self.replays = 0
        for name in ('Stream', 'graph_pool_handle', 'CUDAGraph', 'stream', 'current_stream', 'synchronize', 'graph'):
            monkeypatch.setattr(torch.cuda, name, lambda *_, **__: self)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return False

    def wait_stream(self, other):
        pass

    def replay(self):
        self.replays += 1


def test_recording_starts_with_the_third_call_of_each_form(monkeypatch):
    cuda, calls = Recorder(monkeypatch), []
    graphed = Graphed(lambda images, domain: calls.append(images) or images + domain)
    for number in range(5):
        graphed(torch.full((2,), float(number)), 1)
    assert len(calls) == EAGER + 1 and cuda.replays == 3
    assert calls[-1].tolist() == [4, 4]     # the recording's own input has the newest values
    graphed(torch.zeros(3), 1)
    graphed(torch.zeros(2), 0)
    assert len(calls) == EAGER + 3 and cuda.replays == 3


def test_too_little_memory_for_a_recording_is_said_as_such(monkeypatch):
    Recorder(monkeypatch)

    def work(images):
        if next(calls) == EAGER:
            raise torch.OutOfMemoryError('CUDA out of memory')
        return images
    calls, graphed = iter(range(EAGER + 1)), Graphed(work)
    for _ in range(EAGER):
        graphed(torch.zeros(2))
    with pytest.raises(torch.OutOfMemoryError):
        graphed(torch.zeros(2))


def test_recording_is_not_disturbed_by_a_thread_that_pins_memory(monkeypatch):
    """By default, any thread's call to CUDA ends a recording with an error."""
    Recorder(monkeypatch)
    given = []
    monkeypatch.setattr(torch.cuda, 'graph', lambda *_, **options: given.append(options) or contextlib.nullcontext())
    graphed = Graphed(lambda images: images + 1)
    for _ in range(EAGER + 1):
        graphed(torch.zeros(2))
    assert [options['capture_error_mode'] for options in given] == ['thread_local']


def test_the_script_for_gpus_trains_deterministically_where_it_says_so(monkeypatch):
    found = []
    monkeypatch.setattr(train, 'train_batch', lambda *_: found.append(
        (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark)))
    monkeypatch.setattr(torch.backends.cudnn, 'benchmark', torch.backends.cudnn.benchmark)
    monkeypatch.setenv('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
    report = SimpleNamespace(add=lambda name, **figures: found.append(name))
    gpu.repeat(report, SimpleNamespace(device='cpu', batch_size=1, height=16, rehearse=True))
    assert found == [(False, True)] * 20 + ['fp32'] + [(True, False)] * 20 + ['fp32, deterministic']
    assert not torch.are_deterministic_algorithms_enabled()


def test_the_script_for_gpus_records_while_memory_is_pinned(monkeypatch):
    cuda = Recorder(monkeypatch)
    monkeypatch.setattr(torch.Tensor, 'pin_memory', lambda self: self)
    assert gpu.recording('cpu')['pinned'] > 0 and cuda.replays == 20


@pytest.mark.parametrize('rate, fewest, count', [(300, 1, 8), (9, 1, 2), (9000, 1, 50), (300, 84, 84)])
def test_a_speed_is_measured_over_batches_that_take_a_while(rate, fewest, count, monkeypatch):
    counts = []
    monkeypatch.setattr(gpu, 'warmed_up', lambda *_: (SimpleNamespace(fewest=fewest), {}))
    monkeypatch.setattr(gpu, 'timed', lambda work, batch, count, place: counts.append(count) or rate)
    gpu.compare(SimpleNamespace(add=lambda *_, **__: None), 'step 1', gpu.WAYS[:1], None, [range(6)],
                SimpleNamespace(rounds=1, seconds=0.15))
    assert counts == [1, count]


def test_the_speed_of_graphs_is_that_of_replays(monkeypatch):
    """Every evaluation records its network anew."""
    cuda, place = Recorder(monkeypatch), Place(torch.device('cpu'))
    monkeypatch.setattr(speed, 'VALIDATED', EAGER + 3)
    work = speed.Evaluation(speed.OURS, SimpleNamespace(precision='fp32', cuda_graphs=True), place)
    assert speed.turn(work, gpu.random_batch(1, 16), 0, place) > 0 and cuda.replays == 3


class Event:
    """Stands for CUDA's events; `waited` holds the numbers of those that were waited for."""
    made, waited = 0, []

    def __init__(self):
        Event.made, self.number = Event.made + 1, Event.made

    def record(self):
        pass

    def synchronize(self):
        Event.waited.append(self.number)


@pytest.fixture
def events(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'Event', Event)
    monkeypatch.setattr(Event, 'made', 0)
    monkeypatch.setattr(Event, 'waited', [])
    return Event


def test_the_check_of_a_batch_does_not_wait_for_the_next_one(fake_gpu, events):
    """`.item()` and `if tensor` wait for all that the GPU was given; fake tensors refuse both."""
    run = SimpleNamespace(place=Place(torch.device('cuda')), totals={}, batch=0, last=None, epoch=0)
    run.check_last = partial(Run.check_last, run)
    data = SimpleNamespace(train=SimpleNamespace(dataset=SimpleNamespace(pairs=())))
    with fake_gpu:
        for _ in range(3):
            Run.add(run, {'loss': torch.zeros((), device='cuda'), 'ce': torch.zeros(())}, [(data, (None, None, None))])
            run.last.losses.values = [1.0, 2.0]     # what a GPU would have copied
    assert events.waited == [0, 1] and run.last.losses.read() == {'loss': 1.0, 'ce': 2.0} and events.waited[-1] == 2


class Copies:
    """Stands for Fetched: meta tensors cannot be copied, and nothing but a copy may be waited for."""
    def __init__(self, values):
        self.names = list(values)

    def read(self):
        return dict.fromkeys(self.names, 1.0)


def test_an_epoch_waits_for_nothing_but_the_copies_of_its_losses(monkeypatch):
    class Loader(list):
        batch_sampler, dataset = SimpleNamespace(), SimpleNamespace(augmented=False, padding='void', pairs=())
    monkeypatch.setattr('mdil.training.run.Fetched', Copies)
    monkeypatch.setattr(train, 'tqdm', lambda **options: tqdm(**{**options, 'disable': False}))
    parts, run = run_on('meta', 'mdil', '--num-epochs', '1'), Run.__new__(Run)
    data = SimpleNamespace(index=2, domain=SimpleNamespace(void=11), train=Loader([(*batch_on('cpu'), torch.arange(3))] * 3))
    stepped = SimpleNamespace(defaults={'fused': True}, zero_grad=lambda set_to_none: None, step=lambda: None)
    vars(run).update(vars(parts), data=[data], optimizer=stepped, scaler=torch.amp.GradScaler('cuda', enabled=False),
                     epoch=0, batch=0, totals={}, best=0.0, last=None)
    assert train.train_epoch(run, Interrupt(run.place)) > 0 and run.batch == 3
    assert {total.device.type for total in run.totals.values()} == {'meta'}


def test_ranks_agree_to_stop_without_waiting_for_the_batch(fake_gpu, events, monkeypatch):
    monkeypatch.setattr(torch.distributed, 'all_reduce', lambda *_: None)
    place = Place(torch.device('cuda'), 0, 2)
    interrupt = Interrupt(place)
    interrupt.asked = True
    with fake_gpu:
        assert not interrupt.stop()
        interrupt.agreed.values = [1.0]
        assert interrupt.stop() and events.waited == [0]
