"""What runs on a GPU, on a pretended one: every learner as on a CPU, and nobody waits."""

import collections
from dataclasses import replace
from functools import cache, partial

import pytest
import torch
from pretended_gpu import GPU, Machine, pretended_gpu
from torch import nn

from fewshotmeta.all import *
from fewshotmeta.lab.protocols import IMAGENET
from fewshotmeta.training import fit as fit_room

SMALL = dict(filters=4, inner_lr=0.1, inner_steps=2, hyper_width=8, tune_steps=2, n_max=3)
SMALL |= dict(switch_epochs=(1, 1, 6))
ITERATIONS = 6
METHODS = [name for name in LEARNERS if not name.startswith('random')]


def bank(channels):
    "Six classes of six random images."
    gen = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (36, channels, 16, 16), generator=gen, dtype=torch.uint8)
    return ImageBank(images, range(0, 36, 6), [6] * 6, list('abcdef'))


def as_sampled(device, channels=1, **looks):
    there = bank(channels) if device == 'cpu' else bank(channels).to(device)
    return EpisodeSampler(there, 3, 1, 2, **looks)


class Doubles:
    "Episodes in double precision."

    def __init__(self, sampler):
        self.sampler = sampler

    def __getattr__(self, name):
        return getattr(self.sampler, name)

    def __getitem__(self, i):
        return doubled(self.sampler[i])

    def meta_batch(self, i, size):
        return doubled(self.sampler.meta_batch(i, size))


def doubled(episodes):
    xs, ys, xq, yq = episodes
    return Episodes(xs.double(), ys, xq.double(), yq)


@pytest.fixture
def waits(monkeypatch):
    "What each iteration of `fit` waits for."
    every, step = [], fit_room._Loop.step

    def counted(loop):
        Machine.waits, Machine.counts = collections.Counter(), True
        step(loop)
        Machine.counts = False
        every.append(Machine.waits)

    monkeypatch.setattr(fit_room._Loop, 'step', counted)
    return every


class Stopped(Exception):
    pass


def stop_at_four(row):
    if row['iteration'] == 4:
        raise Stopped


def trained(method, device, plan=None, folder=None, log=None, dtype=torch.float64, **looks):
    "A learner, of double precision, trained on a device with all that belongs to it."
    train = as_sampled(device, **looks)
    learner = method if isinstance(method, MAML) else make_learner(method, train, seed=1, **SMALL)
    learner = to_dtype(learner, dtype, device)
    as_typed = Doubles if dtype == torch.float64 else EpisodeSampler.__call__
    valid = as_typed(as_sampled(device, **looks)(seed=1, augment=None))
    sizes = dict(meta_batch=2, meta_lr=1e-2, log_every=2, valid_tasks=2, valid_every=4)
    how = dict(schedule='cosine', clip=ClipNorm(10.0), plan=plan, progress=False, log=log)
    batches = as_typed(training_batches(learner, train))
    run = fit(learner, batches, 6, valid=valid, checkpoint=folder, **sizes, **how)
    return run.learner, measure(run.learner, valid, 3, plan=plan)


@cache
def on_a_cpu(method):
    return trained(method, 'cpu', plan_for('cpu', 'batched'))


def between(found, wanted):
    "The relative distance of two learners' parameters."
    both = found, wanted
    a, b = (torch.cat([v.detach().cpu().flatten() for v in m.theta.values()]) for m in both)
    return ((a - b).norm() / b.norm()).item()


def apart(found, wanted):
    "The same, and of what they answer."
    (a, seen), (b, known) = found, wanted
    assert torch.equal(seen.accuracies, known.accuracies)
    return between(a, b) + (seen.losses - known.losses).norm().item()


# ---- every learner
@pytest.mark.parametrize('method', METHODS)
def test_trained_as_on_a_cpu_without_a_wait(method, waits, monkeypatch):
    "By the plan that a GPU gets."
    wanted = on_a_cpu(method)
    with pretended_gpu(monkeypatch):
        found = trained(method, GPU)
    assert waits[-1] == {}
    assert apart(found, wanted) < 1e-9


# with statistics, with a switch, with ways that vary, without an inner loop
@pytest.mark.parametrize('method', ['mamlpp', 'hypermaml', 'hidra', 'proto_net'])
def test_a_continued_run_ends_in_the_same_bytes(method, monkeypatch, tmp_path):
    with pretended_gpu(monkeypatch):
        found = trained(method, GPU)
        with pytest.raises(Stopped):
            trained(method, GPU, folder=tmp_path, log=stop_at_four)
        again = trained(method, GPU, folder=tmp_path)
    assert apart(again, found) == 0


PLANS_OF_A_GPU = {
    'batched': dict(name='batched'),
    'one by one': dict(name='plain'),
    'patches': dict(conv='im2col'),
    'chunks': dict(chunk=1),
    'recomputed': dict(recompute=True),
    'inductor': dict(capture='inductor'),
    'tf32': dict(precision='tf32'),
}


@pytest.mark.parametrize('plan', PLANS_OF_A_GPU)
def test_every_plan_of_a_gpu(plan, waits, monkeypatch):
    "Of MAML++, whose loss counts every step and whose rates and norms have rows."
    wanted = on_a_cpu('mamlpp')
    with pretended_gpu(monkeypatch):
        found = trained('mamlpp', GPU, plan_for(GPU, **PLANS_OF_A_GPU[plan]))
    assert waits[-1] == {}
    assert apart(found, wanted) < 1e-9


@pytest.mark.parametrize('method', ['maml', 'mamlpp'])
def test_bf16_on_a_gpu(method, waits, monkeypatch):
    "In single precision, where it changes the convolutions."
    bf16 = dict(precision='bf16')
    low = replace(plan_for('cpu', 'batched'), **bf16)
    wanted, _ = trained(method, 'cpu', low, dtype=torch.float32)
    with pretended_gpu(monkeypatch):
        found, _ = trained(method, GPU, plan_for(GPU, **bf16), dtype=torch.float32)
    assert waits[-1] == {}
    plain, _ = trained(method, 'cpu', plan_for('cpu', 'batched'), dtype=torch.float32)
    assert between(found, wanted) < 1e-2 and between(plain, wanted) > 1e-4


@pytest.mark.parametrize('method', ['maml', 'mamlpp', 'hypermaml', 'hidra'])
def test_little_is_launched_beside_a_recording(method, monkeypatch):
    "Episodes, finite check, clip, Adam: a few operations each, however many parameters there are."
    every, step = [], fit_room._Loop.step

    def counted(loop):
        before = Machine.launches
        step(loop)
        every.append(Machine.launches - before)

    monkeypatch.setattr(fit_room._Loop, 'step', counted)
    with pretended_gpu(monkeypatch):
        trained(method, GPU)
    assert 10 < every[-1] <= 50


# ---- images, backbones
def test_augmented_colours(waits, monkeypatch):
    looks = dict(channels=3, augment=CloserLook(), **IMAGENET)
    wanted = trained('maml', 'cpu', plan_for('cpu', 'batched'), **looks)
    with pretended_gpu(monkeypatch):
        found = trained('maml', GPU, **looks)
    assert waits[-1] == {}
    assert apart(found, wanted) < 1e-6  # images are of single precision


def own_backbone():
    layers = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(2)
    return MAML(from_module(nn.Sequential(*layers), 1, 16), 3, 0.1, 2)


def test_a_backbone_of_ones_own(waits, monkeypatch):
    torch.manual_seed(0)
    wanted = trained(own_backbone(), 'cpu', plan_for('cpu', 'batched'))
    torch.manual_seed(0)
    with pretended_gpu(monkeypatch):
        found = trained(own_backbone(), GPU)
    assert waits[-1] == {}
    assert apart(found, wanted) < 1e-9


# ---- what the pretended GPU finds
def test_it_counts_waits(waits, monkeypatch):
    "Numbers of images that are not pinned, as it was once."
    monkeypatch.setattr('fewshotmeta.data.episodes.sent', lambda t, like: t.to(like.device))
    with pretended_gpu(monkeypatch):
        trained('maml', GPU)
    assert {kind.split(' at ')[0] for kind in waits[-1]} == {'a copy from the host'}
    assert sum(waits[-1].values()) == 2


class Looks(MAML):
    "A learner that looks at a loss."

    def meta_loss(self, episodes, progress=0.0, numbers=None):
        out = super().meta_loss(episodes, progress, numbers)
        return out if out.loss.mean().item() else None

    def moment(self, progress):
        return super().moment(progress)


def test_a_look_at_a_value_is_not_recorded(monkeypatch):
    learner = Looks(conv4(size=16, filters=4), 3, 0.1, 1)
    with pretended_gpu(monkeypatch):
        with pytest.warns(UserWarning, match='cannot be recorded .*running it instead'):
            trained(learner, GPU)


def test_devices_are_not_mixed(monkeypatch):
    with pretended_gpu(monkeypatch):
        with pytest.raises(RuntimeError, match=r'\(3,\).* on the CPU, others on the GPU'):
            torch.ones(3, device=GPU) + torch.ones(3)


# ---- memory and arithmetic of a GPU
def test_too_little_memory_names_what_helps(monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB.\nA hint')

    said = 'CUDA out of memory. Tried .* Less memory is needed with fewer tasks per call .chunk=4, '
    with pretended_gpu(monkeypatch):
        monkeypatch.setattr('fewshotmeta.engine.layers._Direct.forward', full)
        with pytest.raises(torch.OutOfMemoryError, match=said + '.* .recompute=True. or') as found:
            trained('maml', GPU)
    assert str(found.value).count('Less memory') == 1


@pytest.mark.parametrize(
    'plan,said',
    [
        (Plan('x', chunk=6), r'\(chunk=3, now chunk=6\), if inner steps .* or with fewer q'),
        (Plan('x', chunk=1), 'Less memory is needed if inner steps .* or with fewer queries'),
        (Plan('x', chunk=1, recompute=True), 'Less memory is needed with fewer queries, small'),
    ],
)
def test_what_helps_depends_on_the_plan(plan, said):
    def full():
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 B")

    with pytest.raises(torch.OutOfMemoryError, match=said):
        plan.run(full)


def test_another_error_stays_what_it_is():
    def broken():
        raise RuntimeError('sizes differ')

    with pytest.raises(RuntimeError, match='^sizes differ$') as found:
        Plan('x').run(broken)
    assert type(found.value) is RuntimeError


MATMUL, CUDNN = torch.backends.cuda.matmul, torch.backends.cudnn
NEWER = hasattr(MATMUL, 'fp32_precision')


def flags():
    "Every flag of a GPU's arithmetic; none where PyTorch refuses to say."
    found = []
    for owner, name in (MATMUL, 'allow_tf32'), (CUDNN, 'allow_tf32'), *ON:
        try:
            found.append((owner, name, getattr(owner, name)))
        except RuntimeError:
            found.append((owner, name, None))
    return found


ON = [(CUDNN, 'deterministic'), (CUDNN, 'benchmark')]
ON += [(MATMUL, 'fp32_precision'), (CUDNN.conv, 'fp32_precision')] if NEWER else []


@pytest.fixture
def own_flags(monkeypatch):
    "A GPU that is there; afterwards every flag is as before."
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    before = flags()
    yield
    for owner, name, value in before:
        if value is not None:
            setattr(owner, name, value)


def old(value):
    MATMUL.allow_tf32 = CUDNN.allow_tf32 = value


def new(value):
    MATMUL.fp32_precision = CUDNN.conv.fp32_precision = value


SETTINGS = dict(nothing=type(None), old_on=partial(old, True), old_off=partial(old, False))
SETTINGS |= dict(new_on=partial(new, 'tf32'), new_off=partial(new, 'ieee')) if NEWER else {}
SETTINGS |= dict(high=partial(torch.set_float32_matmul_precision, 'high'))


@pytest.mark.parametrize('precision', ['float32', 'tf32', 'bf16'])
@pytest.mark.parametrize('setting', SETTINGS)
def test_tf32_where_it_was_asked_for_alone(setting, precision, own_flags):
    "Whatever the user has set, by the older flags or the newer ones; it is as before afterwards."
    SETTINGS[setting]()
    before, wanted = flags(), precision == 'tf32'
    with gpu_arithmetic(precision):
        assert (CUDNN.deterministic, CUDNN.benchmark) == (True, False)
        if NEWER:
            own = 'tf32' if wanted else 'ieee'
            assert (MATMUL.fp32_precision, CUDNN.conv.fp32_precision) == (own, own)
        assert [value for _, name, value in flags() if name == 'allow_tf32'] == [wanted] * 2
    pairs = zip(flags(), before)
    assert all(found == was for found, was in pairs if was[2] is not None)
