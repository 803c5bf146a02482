"""HIDRA: the master has no influence, one model serves every number of ways, right gradients."""

import pytest, torch
from fewshotmeta.all import *
from test_maml import assert_slope, noise, plain_loop


def tiny(update='row_mean_adam', n_max=4, norm='transductive', **kw):
    m = to_dtype(
        hidra(
            conv4(size=16, filters=8, norm=norm),
            n_max,
            update,
            **(dict(inner_lr=0.3, inner_steps=5) | kw),
        ),
        torch.float64,
    )
    m.theta = {k: v.detach().contiguous().requires_grad_() for k, v in m.theta.items()}
    return m


def gradient(m, ep):
    return dict(
        zip(
            m.theta,
            torch.autograd.grad(
                m.meta_loss(ep, 0.5).loss.mean(), list(m.theta.values()), materialize_grads=True
            ),
        )
    )


def with_row(m, row):
    return with_theta(
        m,
        m.theta
        | {
            'head.weight': row.expand_as(m.theta['head.weight']).contiguous(),
            'head.bias': torch.full_like(m.theta['head.bias'], 3.0),
        },
    )


METHODS = {
    'maml': dict(),
    'first order': dict(order=1),
    'mamlpp': dict(method=mamlpp, ingredients=('msl', 'da', 'lslr')),
}


@pytest.mark.parametrize('norm', ['transductive', 'support', 'affine_only'])
@pytest.mark.parametrize('kw', METHODS.values(), ids=METHODS)
def test_the_master_has_no_influence(kw, norm):
    "T6: any row gives the same predictions and body gradient; the rows' gradients sum to zero."
    m, ep = tiny(norm=norm, **kw), noise(n_way=3)
    g = gradient(m, ep)
    assert (
        g['head.weight'][:3].sum(0).abs().max() < 1e-12
        and g['head.bias'][:3].sum().abs() < 1e-12
        and g['head.weight'][:3].abs().max() > 1e-4
        and (g['head.weight'][3] == 0).all()
    )
    for row in (
        torch.zeros(8, dtype=torch.float64),
        5 * torch.randn(8, generator=torch.Generator().manual_seed(0), dtype=torch.float64),
    ):
        other = with_row(m, row)
        for a, b in zip(m.trajectory(ep.xs, ep.ys), other.trajectory(ep.xs, ep.ys)):
            assert torch.allclose(
                m.predict(a, ep.xq).softmax(-1), other.predict(b, ep.xq).softmax(-1), atol=1e-10
            )
        theirs = gradient(other, ep)
        assert all(
            torch.allclose(g[k], theirs[k], atol=1e-10) for k in g if not k.startswith('head')
        )


def test_it_is_maml_with_the_head_reset_to_zero():
    "T7."
    m, ep = tiny(), noise(n_way=3)
    zero = to_dtype(MAML(conv4(size=16, filters=8), 3, 0.3, 5, head_init='zeros'), torch.float64)
    zero.theta |= {k: v for k, v in m.theta.items() if not k.startswith('head')}
    a, b = gradient(m, ep), gradient(zero, ep)
    assert all(torch.allclose(a[k], b[k], atol=1e-10) for k in a if not k.startswith('head'))


@pytest.mark.parametrize('plan', list(PLANS))
@pytest.mark.parametrize('norm', ['transductive', 'affine_only'])
def test_every_plan_equals_the_plain_loop(plan, norm):
    m, ep = tiny(norm=norm, inner_steps=3), noise(tasks=3, n_way=4)
    naive = plain_loop(m, ep)
    size = sum(v.norm() ** 2 for v in naive.values()) ** 0.5
    ours = dict(zip(m.theta, meta_gradient(m, ep, plan=plan_for('cpu', plan)).grads))
    for k in naive:
        assert (ours[k] - naive[k]).norm() < 1e-10 * size, k


@pytest.mark.parametrize('update', ['row_mean_adam', 'tied_gradient'])
@pytest.mark.parametrize('kw', [METHODS['maml'], METHODS['mamlpp']], ids=['maml', 'mamlpp'])
def test_gradient_against_finite_differences(kw, update):
    m, ep, gen = tiny(update, inner_steps=2, **kw), noise(n_way=3), torch.Generator().manual_seed(1)
    d = {
        k: torch.randn(v.shape, generator=gen, dtype=torch.float64)
        * (0.1 if k.startswith('rate') else 1)
        for k, v in m.theta.items()
    }
    assert_slope(m, ep, gradient(m, ep), d, 1e-6, 0.5)


class Still(torch.optim.SGD):
    def step(self):
        with torch.no_grad():
            for p in self.param_groups[0]['params']:
                p.add_(
                    torch.arange(1.0, len(p) + 1).reshape(-1, *[1] * (p.dim() - 1)).to(p)
                )  # row i moves by i + 1


@pytest.mark.parametrize(
    'update,expect',
    [('row_mean_adam', 2.0), ('row_mean_sgd', -0.2), ('tied_gradient', 1.0), ('frozen', 0.0)],
)
def test_master_updates(update, expect):
    "Three of four rows are active: the fourth's own movement does not count."
    head = Master(4, update)
    theta = {
        'head.weight': torch.zeros(4, 2, requires_grad=True),
        'head.bias': torch.zeros(4, requires_grad=True),
    }
    for v in theta.values():
        v.grad = torch.arange(1.0, 5.0).reshape(-1, *[1] * (v.dim() - 1)).expand_as(v)
    head.outer_step(Still(list(theta.values()), lr=0.1), theta, 3)
    assert torch.allclose(theta['head.weight'], torch.full((4, 2), expect)) and torch.allclose(
        theta['head.bias'], torch.full((4,), expect)
    )


@pytest.mark.parametrize('update', MASTER_UPDATES)
def test_the_update_does_not_matter(update, noise_bank):
    train = WaysSampler(EpisodeSampler(noise_bank, 3, 1, 3), 2, 4)

    class Double(WaysSampler):
        def meta_batch(self, i, size):
            return Episodes(
                *(t.double() if t.is_floating_point() else t for t in super().meta_batch(i, size))
            )

    def go(u):
        m = tiny(u, inner_steps=1)
        fit(m, Double(train.sampler, 2, 4), 8, meta_batch=2, progress=False)
        assert (m.theta['head.weight'] == m.theta['head.weight'][0]).all()
        return m

    a, b = go(update), go('frozen')
    assert all(
        torch.allclose(a.theta[k], b.theta[k], atol=1e-9)
        for k in a.theta
        if not k.startswith('head') and 'conv' not in k
    )
    assert all(
        torch.allclose(a.theta[k], b.theta[k], atol=1e-9)
        for k in a.theta
        if k.endswith('weight') and 'conv' in k
    )
    if update == 'row_mean_sgd':
        assert torch.allclose(a.theta['head.weight'], b.theta['head.weight'], atol=1e-14)


def test_one_model_every_number_of_ways(noise_bank):
    m, s = hidra(conv4(size=16, filters=8), 4, inner_lr=0.1), EpisodeSampler(noise_bank, 5, 1, 3)
    curve = evaluate_ways(m, s, (2, 4, 15, 40), n=4, steps=2)
    assert list(curve) == [2, 4, 15, 40] and all(len(e.by_step) == 3 for e in curve.values())
    with pytest.raises(ValueError, match='n_way=41, but noise has 40 classes'):
        evaluate_ways(m, s, (2, 41), n=4)


def test_ways_are_drawn_per_meta_batch(noise_bank):
    s = WaysSampler(EpisodeSampler(noise_bank, 5, 1, 3, seed=4), 2, 6)
    seen = [s.ways_at(i) for i in range(400)]
    assert (
        set(seen) == {2, 3, 4, 5, 6}
        and min(seen.count(n) for n in set(seen)) > 50
        and seen == [s.ways_at(i) for i in range(400)]
    )
    assert int(s.meta_batch(7, 3).ys.max()) + 1 == seen[7] and len(s.meta_batch(7, 3).xs) == 3
    assert seen != [WaysSampler(s.sampler(seed=5), 2, 6).ways_at(i) for i in range(400)]


@pytest.mark.parametrize('method', [MAML, mamlpp])
def test_resumes_to_the_same_bytes(noise_bank, tmp_path, resumed, method):
    train = WaysSampler(EpisodeSampler(noise_bank, 5, 1, 3), 2, 4)

    def go(folder):
        return fit(
            hidra(conv4(size=16, filters=8), 4, method=method, inner_steps=2),
            train,
            12,
            meta_batch=2,
            checkpoint=folder,
            save_every=3,
            progress=False,
        ).learner

    resumed(go, 7)
    with pytest.raises(BadCheckpoint, match='2 to 4 ways'):
        fit(
            hidra(conv4(size=16, filters=8), 4, method=method, inner_steps=2),
            WaysSampler(train.sampler, 2, 3),
            12,
            meta_batch=2,
            checkpoint=tmp_path / 'a',
            progress=False,
        )


@pytest.mark.parametrize(
    'call,words',
    [
        (lambda s: hidra(conv4(size=16), update=3), 'unexpected|update'),
        (lambda s: Master(update='mean'), "master_update='mean'.*'frozen'"),
        (lambda s: Master(1), 'n_max=1'),
        (lambda s: hidra(conv4(size=16), method=meta_sgd), "per_weight.*any number.*per_tensor"),
        (
            lambda s: fit(hidra(conv4(size=16), 4), WaysSampler(s, 2, 5), 2),
            'up to 5 ways.*n_max=4: make it for 5 classes',
        ),
        (lambda s: WaysSampler(s, 2, 41), 'n_way=41, but noise has 40 classes'),
        (lambda s: WaysSampler(s, 5, 3), 'low=5, high=3: expected'),
        (lambda s: WaysSampler(s, 1, 3), 'low=1'),
        (
            lambda s: fit(MAML(conv4(size=16), 5), WaysSampler(s, 2, 5), 2),
            'n_way=2 to 5 for a learner of n_way=5',
        ),
        (
            lambda s: evaluate(hidra(conv4(size=16)), WaysSampler(s, 2, 5), 2),
            'one number of ways at a time',
        ),
        (lambda s: MAML(conv4(size=16), 5, head=Master(4)), 'n_way=5, but Master'),
        (lambda s: fit(MAML(conv4(size=16), 5), s, 2, valid=WaysSampler(s, 2, 5)), 'n_way=2 to 5'),
        (
            lambda s: fit(hidra(conv4(size=16)), s, 2, valid=WaysSampler(s, 2, 5)),
            'one number of ways',
        ),
    ],
)
def test_bad_input(call, words, noise_bank):
    with pytest.raises((ValueError, TypeError), match=words):
        call(EpisodeSampler(noise_bank, 5, 1, 3))
