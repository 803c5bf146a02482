"""MAML against finite differences, against the plain loop, and the invariants of the literature."""

import pytest, torch, torch.nn.functional as F
from torch import nn
from fewshotmeta.all import *
from fewshotmeta.training.gradient import meta_gradient


def tiny(n_way=3, **kw):
    net = {k: kw.pop(k) for k in ('norm', 'norm_steps', 'down', 'affine', 'leak') if k in kw}
    m = to_dtype(
        MAML(conv4(size=16, filters=8, **net), n_way, **(dict(inner_lr=0.3, inner_steps=3) | kw)),
        torch.float64,
    )
    m.theta = {k: v.detach().contiguous().requires_grad_() for k, v in m.theta.items()}
    return m


def noise(tasks=2, n_way=3, k=2, q=2, seed=0):
    gen = torch.Generator().manual_seed(seed)

    def x(n):
        return torch.rand(tasks, n_way * n, 1, 16, 16, generator=gen, dtype=torch.float64)

    def y(n):
        return torch.arange(n_way).repeat_interleave(n).expand(tasks, -1)

    return Episodes(x(k), y(k), x(q), y(q))


def gradient(m, ep):
    return dict(
        zip(
            m.theta,
            torch.autograd.grad(
                m.meta_loss(ep).loss.mean(), list(m.theta.values()), materialize_grads=True
            ),
        )
    )


def assert_slope(m, ep, g, d, h, *progress):
    "The gradient `g` along `d` is the slope of the meta-loss there, by central differences."
    start = {k: m.theta[k].detach().clone() for k in d}

    def at(s):
        with torch.no_grad():
            for k in d:
                m.theta[k].copy_(start[k] + s * d[k])
        return m.meta_loss(ep, *progress).loss.mean().item()

    numeric = (at(h) - at(-h)) / (2 * h)
    assert abs(sum((g[k] * d[k]).sum().item() for k in d) - numeric) < 1e-5 * max(1, abs(numeric))


VARIANTS = [
    dict(),
    dict(inner_steps=1),
    dict(norm='support'),
    dict(norm='affine_only'),
    dict(norm='per_step', norm_steps=3),
    dict(norm_steps=3),
    dict(down='stride'),
    dict(affine='shift'),
    dict(adapts=everything),
    dict(adapts=head_only),
    dict(reduction='sum_over_shots', inner_lr=0.1),
]


@pytest.mark.parametrize('kw', VARIANTS)
def test_second_order_against_finite_differences(kw):
    "T4, in float64, along a random direction in all parameters."
    m, ep, gen = tiny(**kw), noise(), torch.Generator().manual_seed(1)
    d = {k: torch.randn(v.shape, generator=gen, dtype=torch.float64) for k, v in m.theta.items()}
    assert_slope(m, ep, gradient(m, ep), d, 1e-7)


def plain_loop(m, ep, order=2):
    "MAML with PyTorch's own layers, one task after another."
    net = m.backbone

    def logits(p, x):
        for i in range(1, 5):
            x = F.conv2d(
                x,
                p[f'conv{i}.weight'],
                p[f'conv{i}.bias'],
                stride=2 if net.down == 'stride' else 1,
                padding=1,
            )
            if net.norm.transductive:
                x = F.batch_norm(
                    x, None, None, p.get(f'norm{i}.weight'), p[f'norm{i}.bias'], True, 0.0, net.eps
                )
            else:
                x = (
                    x * p[f'norm{i}.weight'][:, None, None] / (1 + net.eps) ** 0.5
                    + p[f'norm{i}.bias'][:, None, None]
                )
            x = F.leaky_relu(x, net.leak)
            if net.down == 'max_pool':
                x = F.max_pool2d(x, 2)
        return F.linear(
            x.mean((2, 3)) if net.down == 'stride' else x.flatten(1),
            p['head.weight'],
            p['head.bias'],
        )

    total = 0.0
    for xs, ys, xq, yq in zip(*ep):
        p = dict(m.theta)
        for _ in range(m.inner_steps):
            g = torch.autograd.grad(
                F.cross_entropy(logits(p, xs), ys),
                [p[k] for k in m.adapted],
                create_graph=order == 2,
                retain_graph=True,
            )
            p |= {k: p[k] - m.inner_lr * v for k, v in zip(m.adapted, g)}
        total = total + F.cross_entropy(logits(p, xq), yq) / len(ep.xs)
    return dict(
        zip(m.theta, torch.autograd.grad(total, list(m.theta.values()), materialize_grads=True))
    )


@pytest.mark.parametrize('plan', list(PLANS))
@pytest.mark.parametrize(
    'kw',
    [
        dict(),
        dict(down='stride'),
        dict(affine='shift'),
        dict(norm='affine_only'),
        dict(adapts=everything),
        dict(order=1),
        dict(inner_steps=5),
    ],
)
def test_every_plan_equals_the_plain_loop(kw, plan):
    m, ep = tiny(**kw), noise(tasks=3)
    naive = plain_loop(m, ep, m.order)
    ours = dict(zip(m.theta, meta_gradient(m, ep, plan=plan_for('cpu', plan)).grads))
    size = sum(v.norm() ** 2 for v in naive.values()) ** 0.5
    for k in naive:
        assert (ours[k] - naive[k]).norm() < 1e-10 * size, k


@pytest.mark.parametrize('plan', list(PLANS))
@pytest.mark.parametrize(
    'kw',
    [
        dict(norm='support'),
        dict(norm='per_step', norm_steps=3),
        dict(norm_steps=3),
        dict(norm='support', order=1),
    ],
)
def test_every_plan_in_every_norm_mode(kw, plan):
    "Against one task at a time with PyTorch's operations, which finite differences check above."
    m, ep = tiny(**kw), noise(tasks=3)
    plain, ours = (meta_gradient(m, ep, plan=plan_for('cpu', p)) for p in ('plain', plan))
    size = sum(v.norm() ** 2 for v in plain.grads) ** 0.5
    assert torch.allclose(ours.loss, plain.loss, rtol=1e-10)
    for a, b in zip(ours.grads, plain.grads, strict=True):
        assert (a - b).norm() < 1e-10 * size


def test_order_matters():
    a, b = (gradient(tiny(order=o), noise()) for o in (1, 2))
    assert (a['conv2.weight'] - b['conv2.weight']).norm() > 1e-3 * b['conv2.weight'].norm()


def test_zero_steps_is_chance(noise_bank):
    "T5: labels are numbered at random, so without the support set nothing can be known."
    m = MAML(conv4(size=16, filters=8), 5)
    ep = EpisodeSampler(noise_bank, 5, 1, 5)[0:200]
    right = (m.predict(m.adapt(ep.xs, ep.ys, 0), ep.xq).argmax(-1) == ep.yq).float().mean(1)
    assert abs(right.mean() - 0.2) < 4 * right.std() / 200**0.5


@pytest.mark.parametrize('norm,steps', [('support', None), ('per_step', 3), ('affine_only', None)])
def test_not_transductive(norm, steps):
    "T13: a query's prediction does not change when the other queries are permuted or removed."
    m, ep = tiny(norm=norm, norm_steps=steps), noise(q=4)
    fast = m.adapt(ep.xs, ep.ys)
    whole, turn = (
        m.predict(fast, ep.xq),
        torch.randperm(12, generator=torch.Generator().manual_seed(0)),
    )
    assert not m.transductive
    assert torch.allclose(m.predict(fast, ep.xq[:, turn]), whole[:, turn], atol=1e-10)
    assert torch.allclose(m.predict(fast, ep.xq[:, :1]), whole[:, :1], atol=1e-10)


def test_transductive_depends_on_the_other_queries():
    m, ep = tiny(), noise(q=4)
    fast = m.adapt(ep.xs, ep.ys)
    assert m.transductive and not torch.allclose(
        m.predict(fast, ep.xq[:, :2]), m.predict(fast, ep.xq)[:, :2], atol=1e-3
    )


def test_finns_loss_is_n_times_the_mean():
    "T16: α with sum/K equals N·α with the mean."
    ep = noise()
    a, b = (
        tiny(reduction='sum_over_shots', inner_lr=0.1),
        tiny(reduction='mean', inner_lr=finn_inner_lr(0.1, 3)),
    )
    for x, y in zip(gradient(a, ep).values(), gradient(b, ep).values()):
        assert torch.allclose(x, y, rtol=1e-10, atol=1e-12)


def test_statistics_change_per_step_and_not_transductive():
    "T11"
    ep = noise()
    for norm, moves in (('per_step', True), ('transductive', False)):
        m = tiny(norm=norm, norm_steps=3)
        before = m.predict(m.adapt(ep.xs, ep.ys), ep.xq)
        m.buffers = {k: v + 0.5 for k, v in m.buffers.items()}
        assert (
            bool(m.buffers) == moves
            and (not torch.allclose(m.predict(m.adapt(ep.xs, ep.ys), ep.xq), before)) == moves
        )


def test_per_step_statistics_are_those_of_each_step():
    m, ep = tiny(norm='per_step', norm_steps=3), noise()
    stats = m.meta_loss(ep).stats
    assert set(stats) == set(m.buffers) and all(v.shape == (3, 8) for v in stats.values())
    x = torch.stack(
        [F.conv2d(t, m.theta['conv1.weight'], m.theta['conv1.bias'], padding=1) for t in ep.xs]
    )
    assert torch.allclose(stats['norm1.mean'][0], x.mean((1, 3, 4)).mean(0))
    assert torch.allclose(stats['norm1.var'][0], x.var((1, 3, 4), correction=0).mean(0))


def test_adapt_leaves_the_learner_alone_and_keeps_no_graph():
    m, ep = tiny(), noise()
    before = {k: v.detach().clone() for k, v in m.theta.items()}
    fast = m.adapt(ep.xs, ep.ys, 7)
    assert fast.steps == 7 and all(torch.equal(m.theta[k], before[k]) for k in before)
    assert not m.predict(fast, ep.xq).requires_grad and all(
        v.grad_fn is None for v in fast.params.values()
    )
    assert fast.params['conv1.weight'].shape[0] == 2 and 'norm1.weight' not in m.adapted


def test_tasks_do_not_see_each_other():
    m, ep = tiny(), noise(tasks=3)
    whole = m.predict(m.adapt(ep.xs, ep.ys), ep.xq)
    for i in range(3):
        assert torch.allclose(
            m.predict(m.adapt(ep[i : i + 1].xs, ep[i : i + 1].ys), ep[i : i + 1].xq)[0],
            whole[i],
            atol=1e-10,
        )


def test_a_users_module_learns_the_same_way():
    "A plain nn.Module through from_module gives Conv4's meta-gradient."

    def block(i):
        return nn.Sequential(
            nn.Conv2d(i, 8, 3, padding=1), nn.BatchNorm2d(8), nn.MaxPool2d(2), nn.LeakyReLU(0.01)
        )

    m, ep = tiny(), noise()
    u = to_dtype(
        MAML(
            from_module(nn.Sequential(*(block(i) for i in (1, 8, 8, 8))), 1, 16),
            3,
            inner_lr=0.3,
            inner_steps=3,
        ),
        torch.float64,
    )
    names = {
        k: (f"{'conv' if k[2] == '0' else 'norm'}{int(k[0]) + 1}.{k[4:]}" if k[0].isdigit() else k)
        for k in u.theta
    }
    with torch.no_grad():
        for k, v in u.theta.items():
            v.copy_(m.theta[names[k]])
    a, b = gradient(u, ep), gradient(m, ep)
    for k in a:
        assert torch.allclose(a[k], b[names[k]], rtol=1e-8, atol=1e-10), k


@pytest.mark.parametrize('plan', list(PLANS))
def test_a_users_module_on_every_plan(plan):
    "Worker threads do not swap parameters into one module."
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, 2, 1),
        nn.BatchNorm2d(4),
        nn.Tanh(),
        nn.Conv2d(4, 4, 3, 2, 1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
    )
    u = to_dtype(MAML(from_module(net, 1, 16), 3, inner_lr=0.3, inner_steps=2), torch.float64)
    ep = noise(tasks=8)
    ours, one = (
        meta_gradient(u, ep, plan=plan_for('cpu', plan)).grads,
        [g for g in gradient(u, ep).values()],
    )
    for a, b in zip(ours, one):
        assert torch.allclose(a, b, rtol=1e-8, atol=1e-12)
    assert all(
        isinstance(m.weight, nn.Parameter) for m in net if hasattr(m, 'weight')
    ) and torch.equal(net[1].running_mean, torch.zeros(4))


@pytest.mark.parametrize('plan', ['loop', 'batched', 'threads'])
def test_a_frozen_weight_is_a_constant_of_the_meta_gradient(plan):
    "As if it took part, and neither loop moved it."
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3, 2), nn.Tanh(), nn.Conv2d(4, 4, 3, 2), nn.Tanh())
    held = [k for k, _ in net.named_parameters() if k.startswith('0.')]

    def all_but_first(name, learner):
        return name not in held

    options = dict(inner_lr=0.3, inner_steps=2, adapts=all_but_first)
    whole = to_dtype(MAML(from_module(net, 1, 16), 3, **options), torch.float64)
    net[0].requires_grad_(False)
    frozen = to_dtype(MAML(from_module(net, 1, 16), 3, **options), torch.float64)
    assert [k for k in whole.theta if k not in held] == list(frozen.theta)
    ep = noise(tasks=4)
    expected = gradient(whole, ep)
    found = meta_gradient(frozen, ep, plan=plan_for('cpu', plan)).grads
    for name, grad in zip(frozen.theta, found):
        assert torch.allclose(grad, expected[name], rtol=1e-8, atol=1e-12), name


def test_a_dropped_trajectory_leaves_the_grad_mode_alone():
    m, ep = tiny(), noise()
    with torch.no_grad():
        t = m.trajectory(ep.xs, ep.ys)
        next(t)
        assert not torch.is_grad_enabled()
    del t
    assert torch.is_grad_enabled()


def test_support_statistics_keep_no_graph_and_work_in_first_order():
    m, ep = tiny(norm='support'), noise()
    assert not any(v.requires_grad for pair in m.adapt(ep.xs, ep.ys).stats.values() for v in pair)
    assert all(g.isfinite().all() for g in gradient(tiny(norm='support', order=1), ep).values())


@pytest.mark.parametrize(
    'call,words',
    [
        (lambda: MAML(conv4(), 1), 'n_way=1: expected a whole number of at least 2'),
        (lambda: MAML(conv4(), 5, inner_steps=-1), 'inner_steps=-1'),
        (lambda: MAML(conv4(), 5, inner_lr=0.0), 'inner_lr=0.0'),
        (lambda: MAML(conv4(), 5, order=0), 'order=0'),
        (lambda: MAML(conv4(), 5, reduction='sum'), "reduction='sum'"),
        (lambda: tiny().adapt(noise(n_way=4).xs, noise(n_way=4).ys), 'labels 0 … 3 in ys.*n_way=3'),
        (lambda: tiny().adapt(noise().xs[0], noise().ys), 'expected .tasks'),
        (
            lambda: tiny(norm_steps=3).adapt(noise().xs, noise().ys, 4),
            'steps=4, but there are per-step parameters for 3: ask for at most 3',
        ),
        (
            lambda: tiny(norm='per_step', norm_steps=2),
            'norm_steps=2 of the backbone, but inner_steps=3',
        ),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_a_head_can_say_the_number_of_ways():
    "None takes the head's number; another number is refused."
    assert MAML(conv4(filters=4), None, head=Rows(5)).n_way == 5
    assert MAML(conv4(filters=4), 5, head=Rows(5)).n_way == 5
    with pytest.raises(ValueError, match='n_way=4, but .* has n_way=5: give None'):
        MAML(conv4(filters=4), 4, head=Rows(5))
