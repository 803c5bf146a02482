"""Recorded meta-iterations give, replayed with other inputs, what running gives; lean gradients."""

import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from fewshotmeta.all import *
from fewshotmeta.training import gradient as gradient_room
from test_maml import VARIANTS, noise, tiny


class Branch(nn.Module):
    def forward(self, x):
        return x.flatten(1) * (2 if x.mean() > 0 else 1)


def as64(m):
    return to_dtype(m, torch.float64)


NET = dict(size=16, filters=8)


def net(**kw):
    "A small backbone, made anew."
    return conv4(**NET, **kw)


def a_maml(order=2, **kw):
    return MAML(net(**kw), 3, 0.3, 2, order=order)


def a_mamlpp():
    return mamlpp(net(), 3, 2, horizon=0.5, da=0.25)


def a_meta_sgd():
    return meta_sgd(net(), 3)


def a_reptile():
    return Reptile(net(), 3, 0.3, 2)


def a_hidra():
    return hidra(net(), 4, inner_lr=0.3, inner_steps=2)


def a_hidra_at_its_own_rate():
    return hidra(net(), 4, inner_steps=2)


def a_hidra_with_mamlpp():
    return hidra(net(), 4, method=mamlpp, inner_steps=2)


def a_hypermaml(*switch, **kw):
    return HyperMAML(net(), 3, width=8, switch=Switch(4, 6, 16, *switch), **kw)


def an_anyway_hypermaml():
    return anyway_hypermaml(net(), 4, width=8, switch=Switch(4, 6, 16))


def a_module():
    layers = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(2)
    return MAML(from_module(nn.Sequential(*layers), 1, 16), 3, 0.3, 2)


MIXED = dict(labels='one_hot', warm_gradient='through_start')
MAKE = {
    'maml': a_maml,
    'first order': partial(a_maml, order=1),
    'per step': partial(a_maml, norm='per_step', norm_steps=2),
    'support': partial(a_maml, norm='support'),
    'affine_only': partial(a_maml, norm='affine_only'),
    'mamlpp': a_mamlpp,
    'meta_sgd': a_meta_sgd,
    'reptile': a_reptile,
    'hidra': a_hidra,
    'hidra mamlpp': a_hidra_with_mamlpp,
    'hypermaml': a_hypermaml,
    'hypermaml loss_mix': partial(a_hypermaml, 'loss_mix', **MIXED),
    'anyway_hypermaml': an_anyway_hypermaml,
    'a module': a_module,
}


def eager(m, ep, progress):
    out = m.meta_loss(ep, progress)
    return [
        out.loss.mean(),
        out.accuracy.mean(),
        *torch.autograd.grad(out.loss.mean(), list(m.theta.values()), materialize_grads=True),
        *out.stats.values(),
    ]


@pytest.mark.parametrize('name', MAKE)
def test_a_replay_follows_what_changes(name):
    "Episodes, schedules, parameters, buffers: what Python had computed would be frozen."
    m = as64(MAKE[name]())
    recorder, gen = Recorder(m, plan_for('cpu', 'graph')), torch.Generator().manual_seed(0)
    for i, progress in enumerate([0.0, 0.1, 0.3, 0.35, 0.45, 0.9]):
        ep = noise(tasks=2, seed=i)
        loss, accuracy, grads, stats = recorder(ep, progress, 3)
        for a, b in zip(
            [loss, accuracy, *grads, *stats.values()], eager(m, ep, progress), strict=True
        ):
            assert (a - b).norm() <= 1e-10 * (1 + b.norm())
        with torch.no_grad():
            for p in m.theta.values():
                p.add_(torch.randn(p.shape, generator=gen, dtype=p.dtype), alpha=0.01)
        m.buffers = {k: v + 0.01 for k, v in m.buffers.items()}
    assert (
        len(recorder.graphs) == len({m.moment(p)[0] for p in [0.0, 0.1, 0.3, 0.35, 0.45, 0.9]}) < 4
    )


def test_a_module_is_recorded_in_a_thread_of_its_own():
    "The thread has no copy of the module yet, and makes one while it records."
    m, ep = as64(a_module()), noise()

    def record():
        return Recorder(m, plan_for('cpu', 'graph'))(ep, 0.0, 3)

    with ThreadPoolExecutor(1) as pool:
        loss, accuracy, grads, _ = pool.submit(record).result()
    for a, b in zip([loss, accuracy, *grads], eager(m, ep, 0.0), strict=True):
        assert (a - b).norm() <= 1e-10 * (1 + b.norm())


def test_one_graph_a_number_of_ways_and_shape():
    m = as64(MAKE['hidra']())
    recorder = Recorder(m, plan_for('cpu', 'graph'))
    for i, (n_way, k) in enumerate([(2, 2), (3, 2), (2, 2), (4, 2), (3, 2), (2, 1)]):
        ep = noise(n_way=n_way, k=k, seed=i)
        loss, _, grads, _ = recorder(ep, 0.0, n_way)
        for a, b in zip([loss, *grads], [v for j, v in enumerate(eager(m, ep, 0.0)) if j != 1]):
            assert torch.allclose(a, b, rtol=1e-9, atol=1e-10)
    assert len(recorder.graphs) == 4


def test_what_looks_at_values_is_refused_and_runs_otherwise():
    body = from_module(nn.Sequential(nn.Conv2d(1, 2, 3), Branch()), 1, 16)
    m, ep = as64(MAML(body, 3, 0.1, 1)), noise()
    with pytest.raises(ValueError, match='cannot be recorded.*plan without capture'):
        Recorder(m, plan_for('cpu', 'graph'))(ep, 0.0, 3)
    assert Recorder(as64(MAKE['maml']()), plan_for('cpu', 'graph'))(ep, 0.0, 3)


def test_another_shape_and_fused_kernels_are_refused():
    r = Recorded(lambda x: [x * 2], [], [torch.ones(2)])
    assert r(torch.tensor([1.0, 3.0]))[0].tolist() == [2.0, 6.0]
    with pytest.raises(ValueError, match=r'recorded for a tensor of shape \(2,\)'):
        r(torch.ones(3))
    with pytest.raises(ValueError, match="kernels='fused'.*capture"):
        plan_for('cpu', 'graph', kernels='fused')


OTHER_LOOP = dict(optimizer='sgd', task_loss='sum', clip=ClipNorm(1.0))


@pytest.mark.parametrize(
    'make,kw',
    [
        (a_hidra_at_its_own_rate, {}),
        (a_hidra_with_mamlpp, {}),
        (an_anyway_hypermaml, {}),
        (an_anyway_hypermaml, OTHER_LOOP),
    ],
)
def test_training_by_replays_is_training(noise_bank, make, kw):
    "`fit` with recorded graphs, ways that vary and schedules, against the same arithmetic."
    train = WaysSampler(EpisodeSampler(noise_bank, 5, 1, 2), 2, 3)
    runs = [
        fit(
            make(),
            train,
            12,
            meta_batch=2,
            schedule='cosine',
            plan=plan_for('cpu', p),
            progress=False,
            log_every=3,
            **kw,
        )
        for p in ('graph', 'batched')
    ]
    a, b, start = (
        torch.cat([v.detach().flatten() for v in m.theta.values()])
        for m in (*(r.learner for r in runs), make())
    )
    assert (a - b).norm() < 0.02 * (
        a - start
    ).norm()  # float32, and Adam makes much of small gradients
    for a, b in zip(*(r.history for r in runs)):
        assert a['loss'] == pytest.approx(b['loss'], rel=1e-3)


def test_a_loss_that_is_not_finite_is_found_late_but_before_the_checkpoint(
    noise_bank, tmp_path, monkeypatch
):
    "As on a GPU: the parameters have moved, the checkpoint has not."
    import fewshotmeta.training.fit as training

    start = training._Loop.__init__

    def late(self, *args):
        start(self, *args)
        self.late = True

    monkeypatch.setattr(training._Loop, '__init__', late)
    wild = MAML(conv4(**NET), 5, 0.1, 1)
    with torch.no_grad():
        wild.theta['head.weight'].fill_(torch.inf)
    with pytest.raises(FloatingPointError, match='iteration 4 or before: the loss'):
        fit(
            wild,
            EpisodeSampler(noise_bank, 5, 1, 2),
            12,
            meta_batch=2,
            checkpoint=tmp_path,
            log_every=4,
            save_every=4,
            progress=False,
        )
    assert read_checkpoint(tmp_path)[0]['iteration'] == 0


LEAN = [*VARIANTS, dict(order=1), dict(order=1, norm='support')]
# test_maml records every variant; recorded and recomputed, those whose steps keep other things
LEAN_AND_RECORDED = [
    {},
    dict(order=1),
    dict(norm='support'),
    dict(norm='per_step', norm_steps=3),
    dict(adapts=head_only),
]
PAIRS = [(kw, plan) for plan in ('loop', 'batched') for kw in LEAN]
PAIRS += [(kw, 'graph') for kw in LEAN_AND_RECORDED]


@pytest.mark.parametrize('kw,plan', PAIRS)
def test_recomputed_steps_give_the_same_gradient(kw, plan):
    m, ep = tiny(**kw), noise(tasks=2)
    whole, lean = (
        meta_gradient(m, ep, plan=plan_for('cpu', p, recompute=r))
        for p, r in (('plain', False), (plan, True))
    )
    for a, b in zip(
        [whole.loss, *whole.grads, *whole.stats.values()],
        [lean.loss, *lean.grads, *lean.stats.values()],
        strict=True,
    ):
        assert (a - b).norm() <= 1e-10 * (1 + a.norm())


@pytest.mark.parametrize(
    'name', ['mamlpp', 'hidra mamlpp', 'a module']
)  # the others take no gradient through inner steps
@pytest.mark.parametrize('progress', [0.0, 0.3, 0.9])
def test_recomputed_steps_of_every_method(name, progress):
    m, ep = as64(MAKE[name]()), noise(tasks=2)
    whole, lean = (
        meta_gradient(m, ep, progress, plan_for('cpu', p, recompute=r))
        for p, r in (('plain', False), ('threads', True))
    )
    for a, b in zip([whole.loss, *whole.grads], [lean.loss, *lean.grads], strict=True):
        assert (a - b).norm() <= 1e-10 * (1 + a.norm())


class Box:
    def __init__(self, t):
        self.t = t


def kept(m, ep, plan):
    "Bytes that the graph of a meta-loss keeps, once it is made."
    boxes = weakref.WeakSet()

    def pack(t):
        box = Box(t.detach())
        boxes.add(box)
        return box  # with its history, an output would hold itself

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda box: box.t):
        loss = plan.run(m.meta_loss, ep).loss
    return sum(
        {b.t.untyped_storage().data_ptr(): b.t.untyped_storage().nbytes() for b in boxes}.values()
    )


def test_recomputing_keeps_parameters_not_activations():
    "Second order: linear in the steps, with the size of the adapted parameters as its constant."
    ep = noise(tasks=1, k=5)

    def make(T):
        return as64(MAML(conv4(**NET), 3, 0.1, T))

    size = sum(make(1).theta[k].nbytes for k in make(1).adapted)
    whole = [kept(make(T), ep, plan_for('cpu', 'plain')) for T in (2, 10)]
    lean = [kept(make(T), ep, plan_for('cpu', 'loop', recompute=True)) for T in (2, 10)]
    assert lean[1] - lean[0] <= 8 * size * 1.1 and whole[1] - whole[0] > 20 * (lean[1] - lean[0])


def test_a_loss_at_every_step_keeps_a_gradient_of_each():
    "MAML++'s query losses are differentiated where they arise: gradients stay, not activations."
    ep = noise(tasks=1, q=20)

    def make(T):
        return as64(MAMLpp(conv4(**NET), 3, 0.1, T, msl=MultiStepLoss(1.0), order=1))

    two, six = (kept(make(T), ep, plan_for('cpu', 'loop')) for T in (2, 6))
    batched = kept(make(2), Episodes(*(torch.cat([t, t]) for t in ep)), plan_for('cpu', 'batched'))
    gradient = sum(v.nbytes for v in make(2).theta.values())
    assert six - two <= 4 * 1.1 * gradient and batched > 10 * two


def test_the_gradient_of_a_lean_gradient_is_refused():
    m, ep = tiny(), noise(tasks=1)
    loss = plan_for('cpu', 'loop', recompute=True).run(m.meta_loss, ep).loss.sum()
    with pytest.raises(RuntimeError, match='recompute=False'):
        torch.autograd.grad(loss, list(m.theta.values()), create_graph=True)


def test_inductor_compiles_a_meta_gradient():
    "On a linear learner: whole networks take a minute on a CPU, and gain nothing there."

    def f(w, x, y):
        w = w.detach().requires_grad_()
        with torch.enable_grad():
            (g,) = torch.autograd.grad(((x @ w - y) ** 2).mean(), w, create_graph=True)
            return [torch.autograd.grad(((x @ (w - 0.1 * g) - y) ** 2).mean(), w)[0]]

    w, x, y = torch.randn(3), torch.randn(5, 3), torch.randn(5)
    compiled = Recorded(f, [w], [x, y], 'inductor')
    for _ in range(2):
        x, y = torch.randn(5, 3), torch.randn(5)
        assert torch.allclose(compiled(x, y)[0], f(w, x, y)[0], atol=1e-5)
        w += 1


def test_fit_runs_what_it_cannot_record_unless_told_to(noise_bank, monkeypatch):
    "A GPU's plan is chosen without asking; a module that nothing can record must still train."
    import fewshotmeta.training.fit as training

    train = EpisodeSampler(noise_bank, 5, 1, 2)
    net = nn.Sequential(nn.Conv2d(1, 2, 3), Branch())

    def make():
        return MAML(from_module(net, 1, 16), 5, 0.01, 1)

    with pytest.raises(ValueError, match='cannot be recorded'):
        fit(make(), train, 2, meta_batch=2, plan=plan_for('cpu', 'graph'), progress=False)
    expected = fit(make(), train, 3, meta_batch=2, plan=plan_for('cpu', 'batched'), progress=False)
    monkeypatch.setattr(
        training, 'plan_for', lambda device, name=None, **kw: plan_for('cpu', name or 'graph')
    )
    with pytest.warns(UserWarning, match='running it instead'):
        run = fit(make(), train, 3, meta_batch=2, progress=False)
    assert all(
        torch.equal(a, b)
        for a, b in zip(run.learner.theta.values(), expected.learner.theta.values())
    )


@pytest.mark.parametrize('make', [MAKE['maml'], MAKE['mamlpp'], MAKE['hidra']])
def test_bf16_is_near_float32_and_says_so(make, noise_bank, tmp_path):
    m, ep = make(), Episodes(*(t.float() if t.is_floating_point() else t for t in noise()))
    plans = [replace(plan_for('cpu', 'batched'), precision=p) for p in ('float32', 'bf16')]
    exact, low = (meta_gradient(m, ep, plan=plan) for plan in plans)
    assert (low.loss - exact.loss).abs() < 0.05 and 1e-6 < abs(low.loss - exact.loss)
    train = EpisodeSampler(noise_bank, 3, 1, 2)
    fit(
        make(),
        train,
        2,
        meta_batch=2,
        plan=plans[1],
        checkpoint=tmp_path,
        progress=False,
    )
    with pytest.raises(BadCheckpoint, match='precision'):
        fit(make(), train, 2, meta_batch=2, checkpoint=tmp_path, progress=False)


@pytest.mark.parametrize('precision', ['tf32', 'bf16'])
def test_low_precision_is_a_gpus(precision):
    with pytest.raises(ValueError, match=f"precision='{precision}' needs a GPU: choose float32"):
        plan_for('cpu', precision=precision)
    assert plan_for('cuda', precision=precision).precision == precision


def test_a_schedule_that_nobody_announced_is_refused():
    class Decaying(MAML):
        def meta_loss(self, episodes, progress=0.0):
            return (
                super()
                .meta_loss(episodes)
                ._replace(loss=super().meta_loss(episodes).loss * (1 - progress))
            )

    with pytest.raises(ValueError, match=r'no moment\(progress\)'):
        Recorder(Decaying(conv4(**NET), 3), plan_for('cpu', 'graph'))


def test_another_error_stays_itself():
    def broken(x):
        raise RuntimeError('out of luck')

    with pytest.raises(RuntimeError, match='^out of luck'):
        Recorded(broken, [], [torch.ones(2)])


def test_gradients_get_the_parameters_layout(noise_bank):
    "A GPU's fused Adam wants one layout for both."
    m = MAML(conv4(**NET), 5, 0.1, 1)
    fit(
        m,
        EpisodeSampler(noise_bank, 5, 1, 2),
        1,
        meta_batch=2,
        plan=plan_for('cpu', 'graph'),
        progress=False,
    )
    assert all(p.grad.stride() == p.stride() for p in m.theta.values())


def test_a_meta_gradient_keeps_its_recording():
    "Until something of the learner is another: then it records anew."
    m, plan, ep = as64(a_maml()), plan_for('cpu', 'graph'), noise(tasks=2)

    def recorder_of_a_right_loss():
        found = meta_gradient(m, ep, plan=plan).loss
        torch.testing.assert_close(found, m.meta_loss(ep).loss.mean())
        return gradient_room._last[0]

    first = recorder_of_a_right_loss()
    with torch.no_grad():
        m.theta['head.bias'] += torch.arange(3.0)
    assert recorder_of_a_right_loss() is first and len(first.graphs) == 1
    m.inner_lr = 0.1
    second = recorder_of_a_right_loss()
    assert second is not first
    m.theta = {k: (v.detach() + 0.1).requires_grad_() for k, v in m.theta.items()}
    assert recorder_of_a_right_loss() is not second
