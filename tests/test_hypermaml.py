"""HyperMAML and its any-way form: counts, switch, gradients by two other ways, equivariance."""

import pytest, torch, torch.nn.functional as F
from fewshotmeta.all import *
from test_maml import assert_slope, noise

HALF = dict(warm=0, over=9, epochs=16)  # progress .25: epoch 4, p = .5; progress .9: p = 0
WARM = dict(warm=10, over=5, epochs=20)  # progress 0: p = 1


def tiny(make=HyperMAML, n=3, norm='transductive', **kw):
    m = to_dtype(
        make(
            conv4(
                size=16, filters=8, norm=norm, **({'norm_steps': 1} if norm == 'per_step' else {})
            ),
            n,
            **(dict(width=8, inner_lr=0.3) | kw),
        ),
        torch.float64,
    )
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


def test_parameter_counts():
    "T1."
    for width, hyper, total in ((256, 100_673, 214_086), (512, 332_353, 445_766)):
        m = HyperMAML(conv4(3, 28, 'hypermaml2022'), 5, width=width)

        def count(part):
            return sum(v.numel() for k, v in m.theta.items() if k.startswith(part))

        assert (count(''), count('hyper'), count('head')) == (
            total,
            hyper,
            325,
        ) and total - hyper - 325 == 113_088
    assert (
        sum(
            v.numel() for v in HyperMAML(conv4(3, 84, 'hypermaml2022'), 5, width=256).theta.values()
        )
        == 214_086
    )


@pytest.mark.parametrize(
    'warm,over,epochs', [(50, 500, 2048), (100, 1000, 4000), (0, 0, 5), (3, 0, 10), (0, 9, 10)]
)
def test_switch(warm, over, epochs):
    "T3."
    s = Switch(warm, over, epochs)
    p = [s(e / epochs) for e in range(epochs)]
    assert (
        all(v == 1 for v in p[:warm])
        and all(v == 0 for v in p[warm + over :])
        and s(1.0) == 0
        and p == sorted(p, reverse=True)
    )
    if over:
        assert p[warm] == pytest.approx(over / (over + 1)) and p[warm + over - 1] == pytest.approx(
            1 / (over + 1)
        )
    assert [s(e / epochs + 0.5 / epochs) for e in range(epochs)] == p and Switch(
        warm, over, epochs, 'none'
    )(0.0) == 0


def plain_embedding(m, x):
    t, net = m.theta, m.backbone
    for i in range(1, 5):
        x = F.conv2d(x, t[f'conv{i}.weight'], t[f'conv{i}.bias'], padding=1)
        x = F.max_pool2d(
            F.leaky_relu(
                F.batch_norm(
                    x, None, None, t[f'norm{i}.weight'], t[f'norm{i}.bias'], True, 0.0, net.eps
                ),
                net.leak,
            ),
            2,
        )
    return x.flatten(1)


def plain_loop(m, ep, p):
    "HyperMAML with PyTorch's own layers, one task after another."
    t, a, embed = m.theta, m.inner_lr, lambda x: plain_embedding(m, x)

    def H(r):
        return F.linear(
            F.linear(
                F.linear(r, t['hyper.0.weight'], t['hyper.0.bias']).relu(),
                t['hyper.1.weight'],
                t['hyper.1.bias'],
            ).relu(),
            t['hyper.2.weight'],
            t['hyper.2.bias'],
        )

    total, sign = 0.0, 1 if m.network.sign == 'plus' else -1
    for xs, ys, xq, yq in zip(*ep):
        e, w0, b0 = embed(xs), t['head.weight'], t['head.bias']
        rows = e
        if m.enhance:
            label = ys[:, None].to(e) if m.labels == 'scalar' else F.one_hot(ys, 3).to(e)
            o = F.linear(e, w0, b0)
            rows = torch.cat(
                [e, (o.softmax(1) if m.opinions == 'softmax' else o).detach(), label], 1
            )
        D = sign * H(torch.stack([rows[ys == c].mean(0) for c in range(3)]))

        def descend(w, b, p, add):
            first = w, b
            for _ in range(m.warm_steps):
                loss = F.cross_entropy(F.linear(e, w, b), ys)
                gw, gb = torch.autograd.grad(
                    loss, first if m.warm_gradient == 'through_start' else (w, b), create_graph=True
                )
                w, b = w - p * a * gw, b - p * a * gb
                if add:
                    w, b = w + (1 - p) * D[:, :-1], b + (1 - p) * D[:, -1]
            return w, b

        def loss(w, b):
            return F.cross_entropy(F.linear(embed(xq), w, b), yq)

        w, b = w0.clone(), b0.clone()
        if p == 0:
            out = loss(w + D[:, :-1], b + D[:, -1])
        elif p == 1:
            out = loss(*descend(w, b, 1.0, False))
        elif m.switch.mode == 'loss_mix':
            out = p * loss(*descend(w, b, 1.0, False)) + (1 - p) * loss(w + D[:, :-1], b + D[:, -1])
        elif m.switch.mode == 'update_mix_repeat':
            out = loss(*descend(w, b, p, True))
        else:
            w, b = descend(w, b, p, False)
            out = loss(w + (1 - p) * D[:, :-1], b + (1 - p) * D[:, -1])
        total = total + out / len(ep.xs)
    return total, dict(zip(t, torch.autograd.grad(total, list(t.values()), materialize_grads=True)))


VARIANTS = [
    dict(),
    dict(enhance=False),
    dict(labels='one_hot'),
    dict(opinions='logits'),
    dict(sign='minus'),
    dict(warm_steps=3),
    dict(warm_steps=3, warm_gradient='through_start'),
    dict(switch=Switch(mode='loss_mix', **HALF), warm_steps=2),
    dict(switch=Switch(mode='update_mix_repeat', **HALF), warm_steps=2),
]


@pytest.mark.parametrize('progress,p', [(0.25, 0.5), (0.9, 0.0)], ids=['mixed', 'pure'])
@pytest.mark.parametrize('kw', VARIANTS, ids=str)
@pytest.mark.parametrize('plan', list(PLANS))
def test_every_plan_equals_the_plain_loop(kw, progress, p, plan):
    m, ep = tiny(**(dict(switch=Switch(**HALF)) | kw)), noise(tasks=3)
    assert m.share(progress) == pytest.approx(p)
    loss, naive = plain_loop(m, ep, p)
    g = meta_gradient(m, ep, progress, plan_for('cpu', plan))
    size = sum(v.norm() ** 2 for v in naive.values()) ** 0.5
    assert g.loss.item() == pytest.approx(loss.item(), abs=1e-10)
    for k, v in zip(m.theta, g.grads):
        assert (v - naive[k]).norm() < 1e-10 * size, k


@pytest.mark.parametrize('n_way', [3, 5])
@pytest.mark.parametrize('plan', list(PLANS))
def test_anyway_equals_the_plain_loop(plan, n_way):
    m, ep = tiny(anyway_hypermaml, 4), noise(tasks=3, n_way=n_way)
    t, total, embed = m.theta, 0.0, lambda x: plain_embedding(m, x)
    for xs, ys, xq, yq in zip(*ep):
        e, w, b = embed(xs), [], []
        c = [e[ys == k].mean(0) for k in range(n_way)]
        for i in range(n_way):
            near = torch.stack([c[i] @ c[j] / 8**0.5 for j in range(n_way)])  # √F
            others = [j for j in range(n_way) if j != i]
            rival = sum(s * c[j] for s, j in zip(near[others].softmax(0), others))
            row = torch.cat(
                [c[i], c[i] - sum(c) / n_way, rival, near.softmax(0)[i : i + 1].detach()]
            )
            for k in range(3):
                row = F.linear(
                    row if k == 0 else row.relu(), t[f'hyper.{k}.weight'], t[f'hyper.{k}.bias']
                )
            w.append(t['head.weight'][0] + row[:-1])
            b.append(t['head.bias'][0] + row[-1])
        total = total + F.cross_entropy(
            F.linear(embed(xq), torch.stack(w), torch.stack(b)), yq
        ) / len(ep.xs)
    naive = dict(zip(t, torch.autograd.grad(total, list(t.values()), materialize_grads=True)))
    size = sum(v.norm() ** 2 for v in naive.values()) ** 0.5
    for k, v in zip(t, meta_gradient(m, ep, 1.0, plan_for('cpu', plan)).grads):
        same = (
            v.sum(0) - naive[k].sum(0) if k.startswith('head') else v - naive[k]
        )  # the master's rows: only their sum is defined, and it vanishes
        assert same.norm() < 1e-10 * size, k


@pytest.mark.parametrize(
    'kw', [dict(), dict(warm_steps=3), dict(warm_steps=3, warm_gradient='through_start')]
)
def test_warm_up_is_maml_on_the_head(kw):
    "T9, p = 1; and the hypernetwork has no part in it."
    m, ep = tiny(switch=Switch(**WARM), **kw), noise(tasks=3)
    loss, naive = plain_loop(m, ep, 1.0)
    ours = gradient(m, ep, 0.0)
    assert m.meta_loss(ep, 0.0).loss.mean().item() == pytest.approx(loss.item(), abs=1e-12)
    assert all(torch.allclose(ours[k], naive[k], atol=1e-11) for k in naive) and all(
        (v == 0).all() for k, v in ours.items() if k.startswith('hyper')
    )


def test_mixtures():
    "T9: with one step both mixtures of updates are equal; p = 0 adds the change once."
    ep = noise()

    def loss(mode, **kw):
        return tiny(switch=Switch(mode=mode, **HALF), **kw).meta_loss(ep, 0.25).loss

    assert torch.allclose(loss('update_mix'), loss('update_mix_repeat'), atol=1e-12)
    assert len({tuple(loss(mode, warm_steps=3).tolist()) for mode in SWITCHES}) == 4
    m = tiny()
    *_, fast = m.trajectory(ep.xs, ep.ys)
    e, _ = m.backbone(m.theta, ep.xs)
    assert torch.allclose(
        fast.params['head.weight'],
        m.theta['head.weight'] + m.generate(m.theta, e, ep.ys, 3)['head.weight'],
    )
    assert torch.allclose(m.meta_loss(ep, 1.0).loss, task_losses(m.predict(fast, ep.xq), ep.yq))


@pytest.mark.parametrize('make,n', [(HyperMAML, 3), (anyway_hypermaml, 4)])
@pytest.mark.parametrize('norm', ['transductive', 'support', 'affine_only', 'per_step'])
@pytest.mark.parametrize('progress', [0.25, 0.9])
def test_gradient_against_finite_differences(make, n, norm, progress):
    "With what enhancement shows of the universal head held constant, as the method does."
    m, ep, gen = (
        tiny(make, n, norm, switch=Switch(**HALF), enhance=False, warm_steps=2),
        noise(),
        torch.Generator().manual_seed(1),
    )
    d = {k: torch.randn(v.shape, generator=gen, dtype=torch.float64) for k, v in m.theta.items()}
    assert_slope(m, ep, gradient(m, ep, progress), d, 1e-6, progress)


def test_anyway_enhancement_against_finite_differences():
    "Its probability is shown without a gradient: finite differences with it held constant."
    m, ep, gen = tiny(anyway_hypermaml, 4), noise(), torch.Generator().manual_seed(1)
    names = [k for k in m.theta if k.startswith('hyper')]  # they do not change the probability
    d = {k: torch.randn(m.theta[k].shape, generator=gen, dtype=torch.float64) for k in names}
    assert_slope(m, ep, gradient(m, ep, 1.0), d, 1e-6, 1.0)


def test_no_task_knows_another():
    "T8: predictions do not depend on the tasks before; with the archaeology option they do."
    ep = noise(tasks=3)
    turned = Episodes(*(t[[1, 0, 2]] for t in ep))

    def last(m, e):
        return m.predict(m.adapt(e.xs, e.ys), e.xq)[2]

    m = tiny()
    alone = m.predict(m.adapt(ep.xs[2:], ep.ys[2:]), ep.xq[2:])[0]
    assert torch.allclose(last(m, ep), last(m, turned), atol=1e-12) and torch.allclose(
        last(m, ep), alone, atol=1e-12
    )
    stale = tiny(stale_enhancement=True)
    assert (last(stale, ep) - last(stale, turned)).abs().max() > 1e-6
    assert torch.allclose(
        stale.predict(stale.adapt(ep.xs, ep.ys), ep.xq)[0],
        m.predict(m.adapt(ep.xs, ep.ys), ep.xq)[0],
    )  # the first task has the universal head
    with pytest.raises(ValueError, match='batched'):
        stale.adapt(ep.xs[:1], ep.ys[:1])


def test_who_learns_from_what():
    "T10: the encoder learns through the rows, the universal head not through the enhancement."
    m, ep = tiny(), noise()
    e, _ = m.backbone(m.theta, ep.xs)
    g = dict(
        zip(
            m.theta,
            torch.autograd.grad(
                m.generate(m.theta, e, ep.ys, 3)['head.weight'].square().sum(),
                list(m.theta.values()),
                materialize_grads=True,
            ),
        )
    )
    assert (
        g['conv1.weight'].abs().max() > 0
        and g['hyper.0.weight'].abs().max() > 0
        and (g['head.weight'] == 0).all()
        and (g['head.bias'] == 0).all()
    )
    g = gradient(m, ep, 1.0)
    assert (
        g['head.weight'].abs().max() > 0 and g['hyper.2.bias'][:-1].abs().max() < 1e-12
    )  # a shift of all rows alike: the softmax does not see it
    with torch.no_grad():
        m.theta['head.weight'][0] += 1.0
    assert (
        m.generate(m.theta, e, ep.ys, 3)['head.weight']
        - tiny().generate(tiny().theta, e, ep.ys, 3)['head.weight']
    ).abs().max() > 1e-6


@pytest.mark.parametrize('make,n', [(HyperMAML, 3), (anyway_hypermaml, 4)])
@pytest.mark.parametrize('norm', ['support', 'affine_only', 'per_step'])
def test_not_transductive(make, n, norm):
    "T13."
    m, ep = tiny(make, n, norm), noise(q=4)
    fast = m.adapt(ep.xs, ep.ys)
    whole, turn = (
        m.predict(fast, ep.xq),
        torch.randperm(12, generator=torch.Generator().manual_seed(0)),
    )
    assert (
        not m.transductive
        and torch.allclose(m.predict(fast, ep.xq[:, turn]), whole[:, turn], atol=1e-10)
        and torch.allclose(m.predict(fast, ep.xq[:, :1]), whole[:, :1], atol=1e-10)
    )
    assert tiny(make, n).transductive and not tiny(make, n).with_norm('support').transductive


@pytest.mark.parametrize('enhance', [True, False])
@pytest.mark.parametrize('progress', [0.0, 0.25, 1.0])
def test_anyway_is_equivariant(enhance, progress):
    "Renaming the classes permutes the predictions and nothing else, whatever the ways and p."
    for n in (2, 3, 7):
        m, ep = (
            tiny(anyway_hypermaml, 4, enhance=enhance, switch=Switch(warm=2, over=9, epochs=20)),
            noise(n_way=n),
        )
        gen = torch.Generator().manual_seed(n)
        order, mix = torch.randperm(n, generator=gen), torch.randperm(2 * n, generator=gen)
        a, b = m.adapt(ep.xs, ep.ys), m.adapt(ep.xs[:, mix], order[ep.ys][:, mix])
        assert torch.allclose(m.predict(b, ep.xq)[..., order], m.predict(a, ep.xq), atol=1e-10)
        assert torch.allclose(
            m.meta_loss(
                Episodes(ep.xs[:, mix], order[ep.ys][:, mix], ep.xq, order[ep.yq]), progress
            ).loss,
            m.meta_loss(ep, progress).loss,
            atol=1e-10,
        )
    h = tiny(HyperMAML, 3)
    ep, order = noise(), torch.tensor([1, 2, 0])
    assert (
        h.predict(h.adapt(ep.xs, order[ep.ys]), ep.xq)[..., order]
        - h.predict(h.adapt(ep.xs, ep.ys), ep.xq)
    ).abs().max() > 1e-6  # HyperMAML is not


def test_selection_and_adams_steps(noise_bank):
    "Only the pure hypernetwork is selected, and Adam does not count the warm-up for it."
    train = EpisodeSampler(noise_bank, 5, 1, 3)

    def make(**kw):
        return HyperMAML(conv4(size=16, filters=8), 5, width=8, switch=Switch(4, 4, 16), **kw)

    def go(m):
        return fit(
            m,
            train,
            16,
            meta_batch=2,
            valid=train(seed=1),
            valid_tasks=3,
            valid_every=2,
            log_every=2,
            progress=False,
        )

    run = go(make())
    assert [r['val_accuracy'] is None for r in run.history] == [True] * 3 + [
        False
    ] * 5 and run.kept[0][1] >= 8
    steps = {
        k: run.opt.state[v]['step'].item() for k, v in run.learner.theta.items() if 'conv' not in k
    }
    assert steps['hyper.0.weight'] == 12 and steps['head.weight'] == 16
    assert all(r['val_accuracy'] is not None for r in go(make(selection='mixture')).history)


@pytest.mark.parametrize('make', [HyperMAML, anyway_hypermaml])
def test_resumes_to_the_same_bytes(noise_bank, resumed, make):
    train = EpisodeSampler(noise_bank, 5, 1, 3)

    def go(folder):
        return fit(
            make(conv4(size=16, filters=8), 5, width=8, switch=Switch(4, 3, 12)),
            train,
            12,
            meta_batch=2,
            checkpoint=folder,
            save_every=3,
            progress=False,
        ).learner

    resumed(go, 2, 7)


def test_out_scale_starts_with_no_change():
    m, ep = tiny(out_scale=0.0), noise()
    a, b = (m.predict(f, ep.xq) for f in m.trajectory(ep.xs, ep.ys))
    assert torch.equal(a, b)


@pytest.mark.parametrize(
    'call,words',
    [
        (
            lambda s: evaluate(HyperMAML(conv4(size=16), 5), s(n_way=7), 2),
            'n_way=7 for a learner of n_way=5',
        ),
        (
            lambda s: HyperMAML(conv4(size=16), 5).adapt(s(n_way=7)[0:2].xs, s(n_way=7)[0:2].ys),
            'labels 0 … 6 in ys',
        ),
        (lambda s: Switch(50, 500, 550), 'warm=50 . over=500 = 550 epochs, but the run has 550'),
        (lambda s: Switch(mode='mix'), "mode='mix'.*'loss_mix'"),
        (lambda s: HyperMAML(conv4(size=16, norm_steps=5), 5), 'norm_steps=5 of the backbone'),
        (lambda s: evaluate(HyperMAML(conv4(size=16), 5), s, 2, steps=4), 'steps=4.*one step'),
        (lambda s: HyperMAML(conv4(size=16), 5, labels='onehot'), "labels='onehot'"),
        (lambda s: HyperMAML(conv4(size=16), 5, width=0), 'width=0'),
        (lambda s: anyway_hypermaml(conv4(size=16), labels='scalar'), 'no labels'),
        (lambda s: hidra(conv4(size=16), method=HyperMAML), 'use anyway_hypermaml'),
        (lambda s: HyperMAML(conv4(size=16), 5, switch='none'), 'expected a Switch'),
        (
            lambda s: fit(anyway_hypermaml(conv4(size=16), 4), WaysSampler(s, 2, 5), 2),
            'make it for 5 classes',
        ),
        (
            lambda s: HyperMAML(conv4(size=16), 3).adapt(
                torch.rand(1, 2, 1, 16, 16), torch.tensor([[0, 2]])
            ),
            'class 1 has no support image',
        ),
    ],
)
def test_bad_input(call, words, noise_bank):
    with pytest.raises(ValueError, match=words):
        call(EpisodeSampler(noise_bank, 5, 1, 3))
