"""MAML++: weights, rates, each ingredient alone, and the gradient by finite differences."""

import math

import pytest, torch, torch.nn.functional as F
from fewshotmeta.all import *
from test_maml import assert_slope, noise

ALL = ('msl', 'da', 'bnwb', 'lslr')


def tiny(ingredients=ALL, steps=3, make=None, **kw):
    m = make or mamlpp(conv4(size=16, filters=8), 3, steps, ingredients=ingredients, **kw)
    m = to_dtype(m, torch.float64)
    m.theta = {k: v.detach().contiguous().requires_grad_() for k, v in m.theta.items()}
    return m


def gradient(m, ep, progress):
    return dict(
        zip(
            m.theta,
            torch.autograd.grad(
                m.meta_loss(ep, progress).loss.mean(),
                list(m.theta.values()),
                materialize_grads=True,
            ),
        )
    )


@pytest.mark.parametrize('steps', [1, 2, 5])
@pytest.mark.parametrize('after', ['final_only', 'keep_annealed'])
def test_multi_step_weights(steps, after):
    "T2: they sum to 1, start equal, and end at the last step (or at the annealed weights)."
    w = MultiStepLoss(horizon=0.2, after=after)
    for i in range(50):
        assert (
            sum(w(i / 50, steps)) == pytest.approx(1)
            and min(w(i / 50, steps)) >= 0
            and len(w(i / 50, steps)) == steps + 1
            and w(i / 50, steps)[0] == 0
        )
    assert w(0.0, steps)[1:] == pytest.approx([1 / steps] * steps)
    assert w(0.9, steps)[1:-1] == pytest.approx(
        [0.0 if after == 'final_only' else 0.03 / steps] * (steps - 1)
    )
    assert w(0.18, 5)[1:] == pytest.approx([0.02] * 4 + [0.92])


@pytest.mark.parametrize('horizon', [0.1, 0.25, 1.0])
def test_the_horizon_belongs_to_what_comes_after(horizon):
    "At the horizon the last step alone counts, or the annealed weights stay."
    before = math.nextafter(horizon, 0)
    assert MultiStepLoss(horizon)(horizon, 4) == [0.0, 0.0, 0.0, 0.0, 1.0]
    annealed = pytest.approx([0, 0.0075, 0.0075, 0.0075, 0.9775])
    assert MultiStepLoss(horizon)(before, 4) == annealed
    assert MultiStepLoss(horizon, 'keep_annealed')(horizon, 4) == annealed
    m = tiny(('msl',), horizon=horizon)
    assert m.weights(horizon) == [0.0, 0.0, 0.0, 1.0]
    assert m.weights(before)[1] > 0


@pytest.mark.parametrize('da', [0.1, 1 / 3, 1.0])
def test_the_end_of_annealing_belongs_to_what_comes_after(da):
    "Second order begins at `da` exactly; without annealing it is there from the start."
    m = tiny(('da',), da=da)
    assert m.order_at(0.0) == 1
    assert m.order_at(math.nextafter(da, 0)) == 1
    assert m.order_at(da) == 2
    assert tiny(('da',), da=0.0).order_at(0.0) == 2


@pytest.mark.parametrize(
    'ingredients', [(), ('msl',), ('bnwb',), ('lslr',), ('bnrs',), ALL, (*ALL, 'bnrs')]
)
def test_second_order_against_finite_differences(ingredients):
    m, ep, gen, progress = (
        tiny(ingredients),
        noise(),
        torch.Generator().manual_seed(1),
        0.05 if 'da' not in ingredients else 0.5,
    )
    d = {
        k: torch.randn(v.shape, generator=gen, dtype=torch.float64)
        * (0.1 if k.startswith('rate') else 1)
        for k, v in m.theta.items()
    }
    assert_slope(m, ep, gradient(m, ep, progress), d, 1e-7, progress)


def plain_loop(m, ep, progress):
    "MAML++ with PyTorch's own layers, one task after another, everything by hand."
    net, t = m.backbone, m.theta

    def logits(p, x, row):
        for i in range(1, 5):
            x = F.conv2d(x, p[f'conv{i}.weight'], p[f'conv{i}.bias'], padding=1)
            x = F.batch_norm(
                x,
                None,
                None,
                t[f'norm{i}.weight'][row],
                t[f'norm{i}.bias'][row],
                True,
                0.0,
                net.eps,
            )
            x = F.max_pool2d(F.leaky_relu(x, net.leak), 2)
        return F.linear(x.flatten(1), p['head.weight'], p['head.bias'])

    names, T, total = (
        [k for k in t if k.split('.')[0] in ('conv1', 'conv2', 'conv3', 'conv4', 'head')],
        m.inner_steps,
        0.0,
    )
    x = progress / 0.1
    v = (
        [max(1 / T - x / T, 0.03 / T)] * (T - 1)
        + [min(1 / T + x * (T - 1) / T, 1 - (T - 1) * 0.03 / T)]
        if progress < 0.1
        else [0.0] * (T - 1) + [1.0]
    )
    for xs, ys, xq, yq in zip(*ep):
        p = {k: t[k] for k in names}
        for s in range(T):
            g = torch.autograd.grad(
                F.cross_entropy(logits(p, xs, s), ys),
                [p[k] for k in names],
                create_graph=progress >= 1 / 3,
                retain_graph=True,
            )
            p = {k: p[k] - t[f'rate.{k}'][s] * d for k, d in zip(names, g)}
            total = total + v[s] * F.cross_entropy(logits(p, xq, s), yq) / len(ep.xs)
    return dict(zip(t, torch.autograd.grad(total, list(t.values()), materialize_grads=True)))


@pytest.mark.parametrize('progress', [0.0, 0.05, 0.2, 0.5])
@pytest.mark.parametrize('plan', list(PLANS))
def test_every_plan_equals_the_plain_loop(plan, progress):
    m, ep = tiny(), noise(tasks=3)
    naive, whole = plain_loop(m, ep, progress), gradient(m, ep, progress)
    ours = dict(zip(m.theta, meta_gradient(m, ep, progress, plan_for('cpu', plan)).grads))
    size = sum(v.norm() ** 2 for v in naive.values()) ** 0.5
    for k in naive:
        assert (ours[k] - naive[k]).norm() < 1e-10 * size and (
            ours[k] - whole[k]
        ).norm() < 1e-10 * size, k


def test_multi_step_loss_by_hand():
    m, ep = tiny(('msl',)), noise()
    by_step = [task_losses(m.logits(f, ep.xq)[0], ep.yq) for f in m.trajectory(ep.xs, ep.ys)]
    w = m.weights(0.05)
    assert torch.allclose(
        m.meta_loss(ep, 0.05).loss, sum(w[t] * by_step[t] for t in range(1, 4)).detach(), atol=1e-12
    )
    assert torch.allclose(m.meta_loss(ep, 0.5).loss, by_step[3].detach(), atol=1e-12)


def test_derivative_order_annealing():
    m, ep = tiny(('da',), da=0.3), noise()
    first, second = tiny((), order=1), tiny(())
    for progress, like in ((0.29, first), (0.3, second)):
        for a, b in zip(gradient(m, ep, progress).values(), gradient(like, ep, 0.0).values()):
            assert torch.equal(a, b)


def test_rates():
    "T12: gradients in first-order mode, too, but for the unused row; a rate of 0 does not adapt."
    m, ep = tiny(('lslr', 'da'), da=1.0), noise()
    g = gradient(m, ep, 0.0)
    for k in ('conv1.weight', 'conv4.weight', 'head.weight'):
        assert (g[f'rate.{k}'][:3] != 0).all() and g[f'rate.{k}'][3] == 0
    assert (
        not [k for k in m.adapted if k.startswith('rate.') or k.startswith('norm')]
        and len([k for k in m.theta if k.startswith('rate.')]) == 10
    )
    with torch.no_grad():
        for k, v in m.theta.items():
            if k.startswith('rate.'):
                v.zero_()
    fast = m.adapt(ep.xs, ep.ys)
    assert torch.equal(fast.params['head.weight'][1], m.theta['head.weight'])


def test_the_unused_row_survives_training(noise_bank):
    m = mamlpp(conv4(size=16, filters=8), 5, 2)
    fit(m, EpisodeSampler(noise_bank, 5, 1, 3), 6, meta_batch=2, progress=False)
    rates = [
        v.detach()
        for k, v in m.theta.items()
        if k.startswith('rate.') and 'conv1.bias' not in k and 'conv' not in k
    ]
    assert all(v[2] == pytest.approx(0.1) and v[0] != pytest.approx(0.1, abs=1e-6) for v in rates)


def test_per_step_norms_and_rates_are_used_at_their_step():
    m, ep = tiny(), noise()

    def changed(key, row):
        n = tiny()
        with torch.no_grad():
            n.theta[key][row] += 0.3
        return [
            (a - b).abs().max() > 1e-9
            for a, b in zip(
                *(
                    [o.logits(f, ep.xq, max(f.steps - 1, 0))[0] for f in o.trajectory(ep.xs, ep.ys)]
                    for o in (m, n)
                )
            )
        ]

    assert (
        changed('norm2.bias', 2) == [False, False, False, True]
        and changed('rate.head.weight', 1) == [False, False, True, True]
        and changed('rate.head.weight', 3) == [False] * 4
    )


def traits(m):
    "What the ingredients change of a learner, early in the training."
    shapes = {k: tuple(v.shape) for k, v in m.theta.items()}
    return {
        'weights': m.weights(0.0),
        'order': m.order_at(0.0),
        'norm parameters': {k: v for k, v in shapes.items() if k.startswith('norm')},
        'rates': {k: v for k, v in shapes.items() if k.startswith('rate.')},
        'transductive': m.transductive,
        'buffers': {k: tuple(v.shape) for k, v in m.buffers.items()},
        'other parameters': {k: v for k, v in shapes.items() if k.startswith(('conv', 'head'))},
    }


CHANGED = {
    'msl': {'weights': [0.0, 0.5, 0.5]},
    'da': {'order': 1},
    'bnwb': {
        'norm parameters': {
            f'norm{i}.{kind}': (2, 8) for i in range(1, 5) for kind in ('weight', 'bias')
        }
    },
    'bnrs': {
        'transductive': False,
        'buffers': {f'norm{i}.{kind}': (2, 8) for i in range(1, 5) for kind in ('mean', 'var')},
    },
    'lslr': {
        'rates': {
            f'rate.{layer}.{kind}': (3,)
            for layer in ('conv1', 'conv2', 'conv3', 'conv4', 'head')
            for kind in ('weight', 'bias')
        }
    },
}


@pytest.mark.parametrize('ingredient', INGREDIENTS)
def test_what_each_ingredient_changes(ingredient):
    "Nothing but its own: the weights, the order, the norm's rows, its statistics, the rates."

    def make(ingredients):
        return traits(mamlpp(conv4(size=16, filters=8), 5, 2, ingredients=ingredients))

    assert make(()) | CHANGED[ingredient] == make((ingredient,))
    for name, value in CHANGED[ingredient].items():
        assert make(())[name] != value


def test_cosine_annealing_is_the_outer_rate(noise_bank):
    "The sixth ingredient is not the learner's: the outer learning rate falls, or it stays."
    train = EpisodeSampler(noise_bank, 5, 1, 3)

    def rates(**schedule):
        m = mamlpp(conv4(size=16, filters=8), 5, 2, ingredients=())
        options = dict(meta_batch=2, meta_lr=3e-3, log_every=3, progress=False)
        return [row['lr'] for row in fit(m, train, 12, **options, **schedule).history]

    assert set(rates()) == {3e-3}
    falling = rates(schedule=Cosine())
    assert falling == sorted(set(falling), reverse=True)
    assert len(falling) == 4


def test_each_ingredient_changes_the_result(noise_bank):
    train, losses = EpisodeSampler(noise_bank, 5, 1, 3), []
    for ingredients in ((), ('msl',), ('da',), ('bnwb',), ('bnrs',), ('lslr',)):
        m = mamlpp(conv4(size=16, filters=8), 5, 2, ingredients=ingredients)
        losses.append(
            fit(m, train, 12, meta_batch=2, meta_lr=3e-3, log_every=12, progress=False).history[-1][
                'loss'
            ]
        )
    losses.append(
        fit(
            mamlpp(conv4(size=16, filters=8), 5, 2, ingredients=()),
            train,
            12,
            meta_batch=2,
            meta_lr=3e-3,
            schedule=Cosine(),
            log_every=12,
            progress=False,
        ).history[-1]['loss']
    )
    assert len(set(losses)) == 7


def test_bnrs_and_bnwb_are_independent(noise_bank):
    "One has statistics for each step, the other scales and shifts; together a third learner."
    train, losses = EpisodeSampler(noise_bank, 5, 1, 3), []
    for ingredients, rows in ((('bnrs',), 1), (('bnwb',), 2), (('bnrs', 'bnwb'), 2)):
        m = mamlpp(conv4(size=16, filters=8), 5, 2, ingredients=ingredients)
        assert m.theta['norm1.weight'].dim() == rows and bool(m.buffers) == ('bnrs' in ingredients)
        losses.append(
            fit(m, train, 12, meta_batch=2, meta_lr=3e-3, log_every=12, progress=False).history[-1][
                'loss'
            ]
        )
    assert len(set(losses)) == 3


@pytest.mark.parametrize('name', ['antoniou2018', 'antoniou_repo'])
@pytest.mark.parametrize('small', [True, False])
def test_presets_run(name, small, noise_bank):
    learner, how = mamlpp_preset(name, small)
    train = EpisodeSampler(noise_bank, 3, 1, 2)
    m = mamlpp(conv4(size=16, filters=8), 3, **learner)
    assert (
        how['iterations'] == (75_000 if name == 'antoniou2018' else 50_000)
        and how['meta_batch']
        == {
            ('antoniou2018', True): 16,
            ('antoniou2018', False): 4,
            ('antoniou_repo', True): 8,
            ('antoniou_repo', False): 2,
        }[name, small]
    )
    run = fit(
        m,
        train,
        valid=train(seed=1),
        progress=False,
        **how | dict(iterations=6, meta_batch=2, valid_tasks=2, valid_every=1),
    )
    assert len(run.kept) == (1 if name == 'antoniou2018' else 5) and (
        run.history[-1]['lr'] == 1e-3
    ) == ((name, small) == ('antoniou_repo', False))


@pytest.mark.parametrize('steps', [1, 3])
def test_the_start_counts_on_request(steps):
    w = MultiStepLoss(0.2, start=True)
    assert (
        w(0.0, steps) == pytest.approx([1 / (steps + 1)] * (steps + 1))
        and sum(w(0.15, steps)) == pytest.approx(1)
        and w(0.3, steps) == [0.0] * steps + [1.0]
    )
    m, ep = tiny(('msl',), steps), noise()
    m.msl = w
    by_step = [task_losses(m.logits(f, ep.xq)[0], ep.yq) for f in m.trajectory(ep.xs, ep.ys)]
    assert torch.allclose(m.meta_loss(ep, 0.0).loss, sum(by_step) / (steps + 1), atol=1e-12)


def test_meta_sgd():
    m, ep = tiny(make=meta_sgd(conv4(size=16, filters=8), 3)), noise()
    assert sum(v.numel() for k, v in m.theta.items() if k.startswith('rate.')) == sum(
        m.theta[k].numel() for k in m.adapted
    )
    assert (gradient(m, ep, 0.0)['rate.conv2.weight'] != 0).any() and m.adapt(
        ep.xs, ep.ys, 4
    ).steps == 4


def test_resumes_to_the_same_bytes(noise_bank, resumed):
    train = EpisodeSampler(noise_bank, 5, 1, 3)

    def go(folder):
        return fit(
            mamlpp(conv4(size=16, filters=8), 5, 2, ingredients=(*ALL, 'bnrs')),
            train,
            12,
            meta_batch=2,
            checkpoint=folder,
            save_every=3,
            progress=False,
        ).learner

    resumed(go, 7)


@pytest.mark.parametrize(
    'call,words',
    [
        (lambda: MultiStepLoss(0.0), 'horizon=0.0.*end before the run'),
        (lambda: tiny(da=1.5), 'da=1.5'),
        (lambda: tiny(('lsrl',)), "ingredient='lsrl'.*'lslr'"),
        (lambda: MAMLpp(conv4(norm_steps=3), 5, inner_steps=5), 'norm_steps=3.*inner_steps=5'),
        (
            lambda: mamlpp(from_module(torch.nn.Flatten(), 1, 16), 5),
            'ModuleBackbone has no per-step norm',
        ),
        (lambda: tiny().adapt(noise().xs, noise().ys, 4), 'at most 3'),
        (lambda: MAMLpp(conv4(), 5, rates='per_layer'), "rates='per_layer'"),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(ValueError, match=words):
        call()
