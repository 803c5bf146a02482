"""The metric methods against a plain loop, finite differences, and what must not matter."""

from functools import partial

import pytest, torch, torch.nn.functional as F
from torch import nn
from fewshotmeta.all import *
from test_hypermaml import plain_embedding
from test_maml import assert_slope, gradient, noise

MAKE = dict(
    matching=MatchingNet,
    matching_as_printed=partial(MatchingNet, scale=1.0),
    proto=ProtoNet,
    relation=partial(RelationNet, width=8),
    relation_mse=partial(RelationNet, width=8, loss='mse'),
    relation_maps=partial(MapRelationNet, width=8),
    r2d2_fixed=partial(R2D2, lam=50.0, scale=10.0, learn_lam=False),
    r2d2=partial(R2D2, lam=0.5, scale=3.0),
)


def tiny(name, norm='transductive', dtype=torch.float64):
    make = conv4_maps if name == 'relation_maps' else conv4
    m = to_dtype(MAKE[name](make(size=16, filters=8, norm=norm)), dtype)
    m.theta = {k: v.detach().contiguous().requires_grad_() for k, v in m.theta.items()}
    return m


def logits(m, ep):
    return m.predict(m.adapt(ep.xs, ep.ys), ep.xq)


every = pytest.mark.parametrize('name', MAKE)


# ---- as one would write it on a blackboard, a task and a query at a time
def matching(m, e, ys, q, n):
    a = torch.stack([F.cosine_similarity(q, x, dim=0) for x in e]).mul(m.scale).softmax(0)
    return torch.stack([a[ys == c].sum() for c in range(n)]).log()


def proto(m, e, ys, q, n):
    return torch.stack([-((q - e[ys == c].mean(0)) ** 2).sum() for c in range(n)])


def relation(m, e, ys, q, n):
    def g(h):
        for i in range(3):
            h = F.linear(
                h if i == 0 else h.relu(),
                m.theta[f'relation.{i}.weight'],
                m.theta[f'relation.{i}.bias'],
            )
        return h[0]

    return torch.stack([g(torch.cat([e[ys == c].mean(0), q])) for c in range(n)])


def map_features(m, x):
    "Four blocks of PyTorch's layers, a pool behind the first two."
    p = m.theta
    for i in range(1, 5):
        x = F.conv2d(x, p[f'conv{i}.weight'], padding=1)
        x = F.batch_norm(x, None, None, p[f'norm{i}.weight'], p[f'norm{i}.bias'], True)
        x = F.leaky_relu(x, m.backbone.leak)
        x = F.max_pool2d(x, 2) if i <= 2 else x
    return x


def relation_maps(m, e, ys, q, n):
    "All queries at once: the module's norm takes the statistics of all pairs."
    p, means = m.theta, torch.stack([e[ys == c].mean(0) for c in range(n)])
    h = torch.stack([torch.cat([mean, one]) for one in q for mean in means])
    for i in (1, 2):
        h = F.conv2d(h, p[f'relation.conv{i}.weight'], padding=1)
        scale = p[f'relation.norm{i}.weight'], p[f'relation.norm{i}.bias']
        h = F.max_pool2d(F.batch_norm(h, None, None, *scale, True).relu(), 2)
    for i in (0, 1):
        h = h.flatten(1).relu()
        h = F.linear(h, p[f'relation.{i}.weight'], p[f'relation.{i}.bias'])
    return h.view(len(q), n)


def r2d2_fixed(m, e, ys, q, n):
    "R2-D2 with λ = 50, by the matrix of the embedding's size."
    x, q = (torch.cat([v, torch.ones_like(v[..., :1])], -1) for v in (e, q))
    within = x.T @ x + 50 * torch.eye(x.shape[1], dtype=x.dtype)
    solution = torch.linalg.solve(within, x.T @ F.one_hot(ys, n).to(x))
    return m.theta['ridge.scale'] * (q @ solution) + m.theta['ridge.bias']


def r2d2(m, e, ys, q, n):
    def ones(x):
        return torch.cat([x, torch.ones_like(x[..., :1])], -1)

    x = ones(e)
    W = (
        torch.linalg.inv(
            x.T @ x + m.theta['ridge.log_lam'].exp() * torch.eye(x.shape[1], dtype=x.dtype)
        )
        @ x.T
        @ F.one_hot(ys, n).to(x)
    )  # the features×features form
    return m.theta['ridge.scale'] * (ones(q) @ W) + m.theta['ridge.bias']


PLAIN = dict(
    matching=matching,
    matching_as_printed=matching,
    proto=proto,
    relation=relation,
    relation_mse=relation,
    r2d2_fixed=r2d2_fixed,
    r2d2=r2d2,
)


def plain_loop(name, m, ep):
    n, total = int(ep.ys.max()) + 1, 0.0
    for xs, ys, xq, yq in zip(*ep):
        if name == 'relation_maps':
            scores = relation_maps(m, map_features(m, xs), ys, map_features(m, xq), n)
        else:
            e, q = plain_embedding(m, xs), plain_embedding(m, xq)
            scores = torch.stack([PLAIN[name](m, e, ys, one, n) for one in q])
        loss = (
            F.mse_loss(scores.sigmoid(), F.one_hot(yq, n).to(scores))
            if name == 'relation_mse'
            else F.cross_entropy(scores, yq)
        )
        total = total + loss / len(ep.xs)
    return total, dict(
        zip(m.theta, torch.autograd.grad(total, list(m.theta.values()), materialize_grads=True))
    )


@every
@pytest.mark.parametrize('plan', list(PLANS))
def test_every_plan_equals_the_plain_loop(name, plan):
    m, ep = tiny(name), noise(tasks=3)
    loss, naive = plain_loop(name, m, ep)
    g = meta_gradient(m, ep, plan=plan_for('cpu', plan))
    size = sum(v.norm() ** 2 for v in naive.values()) ** 0.5
    assert g.loss.item() == pytest.approx(loss.item(), abs=1e-10) and size > 1e-3
    for k, v in zip(m.theta, g.grads):
        assert (v - naive[k]).norm() < 1e-10 * size, k


@every
@pytest.mark.parametrize('norm', ['transductive', 'support', 'affine_only'])
def test_gradient_against_finite_differences(name, norm):
    m, ep, gen = tiny(name, norm), noise(), torch.Generator().manual_seed(1)
    d = {k: torch.randn(v.shape, generator=gen, dtype=torch.float64) for k, v in m.theta.items()}
    assert_slope(m, ep, gradient(m, ep), d, 1e-7)


@every
def test_any_number_of_ways(name, noise_bank):
    "One model, no parameter of which knows the number of ways; the loop agrees at each."
    m = tiny(name)
    for n in (2, 3, 7):
        ep = noise(n_way=n, k=3)
        assert logits(m, ep).shape == (2, 2 * n, n) and m.meta_loss(
            ep
        ).loss.mean().item() == pytest.approx(plain_loop(name, m, ep)[0].item(), abs=1e-10)
    curve = evaluate_ways(
        tiny(name, dtype=torch.float32), EpisodeSampler(noise_bank, 5, 2, 3), (2, 5, 40), n=3
    )
    assert list(curve) == [2, 5, 40] and all(len(e.by_step) == 1 for e in curve.values())


def test_classes_need_not_have_equally_many_images():
    ep = noise(n_way=3, k=4)
    uneven = Episodes(
        ep.xs, torch.tensor([0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2]).expand(2, -1), ep.xq, ep.yq
    )
    for name in MAKE:
        m = tiny(name)
        assert m.meta_loss(uneven).loss.mean().item() == pytest.approx(
            plain_loop(name, m, uneven)[0].item(), abs=1e-10
        )


@every
def test_renaming_the_classes_permutes_the_predictions(name):
    "Nor does the order of the support images matter: there are no full context embeddings."
    m, ep, gen = tiny(name), noise(n_way=4, k=3), torch.Generator().manual_seed(0)
    order, mix = torch.randperm(4, generator=gen), torch.randperm(12, generator=gen)
    other = Episodes(ep.xs[:, mix], order[ep.ys][:, mix], ep.xq, order[ep.yq])
    assert torch.allclose(
        logits(m, other)[..., order], logits(m, ep), atol=1e-10
    ) and torch.allclose(m.meta_loss(other).loss, m.meta_loss(ep).loss, atol=1e-10)


@every
def test_no_task_knows_another(name):
    m, ep = tiny(name), noise(tasks=3)
    whole = logits(m, ep)
    for i in range(3):
        assert torch.allclose(logits(m, ep[i : i + 1])[0], whole[i], atol=1e-10)


@every
@pytest.mark.parametrize('norm', ['support', 'affine_only'])
def test_not_transductive(name, norm):
    "T13: a query's prediction does not change when the other queries are permuted or removed."
    m, ep = tiny(name, norm), noise(q=4)
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
    t = tiny(name)
    fast = t.adapt(ep.xs, ep.ys)
    assert t.transductive and not torch.allclose(
        t.predict(fast, ep.xq[:, :2]), t.predict(fast, ep.xq)[:, :2], atol=1e-6
    )
    if norm == 'support':
        assert torch.equal(logits(t.with_norm('support'), ep), whole)


@every
def test_adapt_is_one_look_and_keeps_no_graph(name):
    m, ep = tiny(name, 'support'), noise()
    walk = list(m.trajectory(ep.xs, ep.ys, 0))
    assert [f.steps for f in walk] == [0] and m.adapted == [] and torch.is_grad_enabled()
    new = {k: v for k, v in walk[0].params.items() if k not in m.theta}
    assert (
        new
        and not any(
            v.requires_grad
            for v in [*new.values(), *(s for pair in walk[0].stats.values() for s in pair)]
        )
        and all(len(v) == 2 for v in new.values())
    )
    assert not m.predict(walk[0], ep.xq).requires_grad and torch.allclose(
        m.losses(m.predict(walk[0], ep.xq), ep.yq), m.meta_loss(ep).loss
    )


@every
def test_resumes_to_the_same_bytes(name, noise_bank, tmp_path, resumed):
    train = WaysSampler(EpisodeSampler(noise_bank, 5, 1, 3), 2, 5)

    def go(folder):
        return fit(
            tiny(name, dtype=torch.float32),
            train,
            9,
            meta_batch=2,
            checkpoint=folder,
            save_every=3,
            progress=False,
        ).learner

    whole = resumed(go, 2, 7)
    head, tensors = read_checkpoint(tmp_path / 'b')
    assert head['config']['learner']['method'] == type(whole).__name__
    stored = {k for k in tensors if k.startswith('theta/')}
    assert stored == {f'theta/{k}' for k in whole.theta}


def test_a_checkpoint_of_other_options_is_refused(noise_bank, tmp_path):
    train, net = EpisodeSampler(noise_bank, 3, 1, 3), conv4(size=16, filters=8)
    for i, (a, b, word) in enumerate(
        [
            (MatchingNet(net), MatchingNet(net, scale=1.0), "'scale': 100.0"),
            (RelationNet(net), RelationNet(net, loss='mse'), 'loss'),
            (R2D2(net), R2D2(net, lam=2.0), 'lam'),
            (ProtoNet(net), MatchingNet(net), 'method'),
        ]
    ):
        fit(a, train, 1, meta_batch=2, checkpoint=tmp_path / str(i), progress=False)
        with pytest.raises(BadCheckpoint, match=word):
            fit(b, train, 1, meta_batch=2, checkpoint=tmp_path / str(i), progress=False)


@every
def test_selection_and_ensembles(name, noise_bank):
    train = EpisodeSampler(noise_bank, 3, 1, 3)
    run = fit(
        tiny(name, dtype=torch.float32),
        train,
        6,
        meta_batch=2,
        valid=train(seed=1),
        valid_tasks=4,
        valid_every=2,
        select='top_2',
        progress=False,
    )
    assert (
        len(run.learner.members) == 2
        and evaluate(run.learner.with_norm('support'), train(seed=2), 4).n == 4
    )


@every
def test_a_replay_follows_what_changes(name):
    "Recorded, with other episodes, parameters and numbers of ways; a graph for each number."
    m, gen = tiny(name), torch.Generator().manual_seed(0)
    recorder = Recorder(m, plan_for('cpu', 'graph'))
    for i, n in enumerate([3, 3, 4, 3]):
        ep = noise(n_way=n, seed=i)
        loss, _, grads, _ = recorder(ep, i / 4, n)
        for a, b in zip(
            [loss, *grads], [m.meta_loss(ep).loss.mean(), *gradient(m, ep).values()], strict=True
        ):
            assert (a - b).norm() <= 1e-10 * (1 + b.norm())
        with torch.no_grad():
            for p in m.theta.values():
                p.add_(torch.randn(p.shape, generator=gen, dtype=p.dtype), alpha=0.01)
    assert len(recorder.graphs) == 2


@every
def test_the_encoder_learns(name, noise_bank):
    "Every parameter gets a gradient, but those that the norm, or the softmax, does not see."
    g = gradient(tiny(name), noise())
    unseen = dict(relation='relation.2.bias', relation_maps='relation.1.bias')
    unseen |= dict(r2d2='ridge.bias', r2d2_fixed='ridge.bias')
    blind = {f'conv{i}.bias' for i in range(1, 5)} | {unseen.get(name, 'conv1.bias')}
    assert {k for k, v in g.items() if v.abs().max() < 1e-12} == blind


# ---- MatchingNet
def test_attention_does_not_underflow():
    m, ep = to_dtype(MatchingNet(conv4(size=16, filters=8), scale=1e4), torch.float32), noise()
    ep = Episodes(ep.xs.float(), ep.ys, ep.xq.float(), ep.yq)
    assert m.meta_loss(ep).loss.isfinite().all() and all(
        v.isfinite().all() for v in gradient(m, ep).values()
    )


# ---- RelationNet on maps
@pytest.mark.parametrize('size,sides', [(16, 1), (28, 1), (84, 3)])
def test_the_full_module_has_the_authors_sizes(size, sides):
    "576 inputs of the hidden layer for 84 pixels and 64 channels, 8 neurons, as the authors have."
    m = MapRelationNet(conv4_maps(channels=3, size=size, filters=64))
    sizes = {k: tuple(v.shape) for k, v in m.theta.items() if k.startswith('relation')}
    assert sizes['relation.conv1.weight'] == (64, 128, 3, 3)
    assert sizes['relation.conv2.weight'] == (64, 64, 3, 3)
    assert sizes['relation.0.weight'] == (8, 64 * sides**2) and sizes['relation.1.weight'] == (1, 8)
    x = torch.rand(1, 4, 3, size, size)
    ys = torch.tensor([[0, 0, 1, 1]])
    assert m.predict(m.adapt(x, ys), x[:, :3]).shape == (1, 3, 2)


def test_a_network_without_norms_cannot_have_the_full_module():
    net = from_module(nn.Sequential(nn.Conv2d(1, 4, 3, 2), nn.AdaptiveAvgPool2d(4)), 1, 16)
    net.map_shape = 4, 4, 4
    with pytest.raises(ValueError, match="norm='none' of the backbone"):
        MapRelationNet(net)


@pytest.mark.parametrize('name', ['relation_maps', 'r2d2_fixed'])
def test_a_variant_outlives_a_file(name, tmp_path):
    m, ep = tiny(name, dtype=torch.float32), noise()
    ep = Episodes(ep.xs.float(), ep.ys, ep.xq.float(), ep.yq)
    save_learner(m, tmp_path / 'm.safetensors')
    assert torch.equal(logits(load_learner(tmp_path / 'm.safetensors'), ep), logits(m, ep))


# ---- R2-D2
def test_a_fixed_lambda_is_no_parameter(noise_bank):
    m = R2D2(conv4(size=16, filters=8), lam=50.0, scale=1e-4, learn_lam=False)
    tasks = EpisodeSampler(noise_bank, 3, 1, 3)
    fit(m, tasks, 2, meta_batch=2, optimizer='nesterov', progress=False)
    assert {k for k in m.theta if 'ridge' in k} == {'ridge.scale', 'ridge.bias'} and m.lam == 50


def test_the_authors_division_multiplies_lambda():
    "X and Y divided by √n and λ is n times λ without: what the page says of 50 and 250."
    gen = torch.Generator().manual_seed(0)
    x, y = (torch.randn(1, 5, k, generator=gen, dtype=torch.float64) for k in (7, 5))
    lam, root = torch.tensor(50.0, dtype=torch.float64), 5**0.5
    assert torch.allclose(ridge(x / root, y / root, lam), ridge(x, y, 5 * lam), atol=1e-12)


@pytest.mark.parametrize('n,features', [(3, 20), (20, 3), (1, 1)])
def test_ridge_is_least_squares(n, features):
    "Both ways round: more images than features, and fewer."
    gen = torch.Generator().manual_seed(0)
    x, y = (
        torch.randn(4, n, features, generator=gen, dtype=torch.float64),
        torch.randn(4, n, 5, generator=gen, dtype=torch.float64),
    )
    lam = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    W = ridge(x, y, lam)
    more = torch.eye(features, dtype=torch.float64).expand(4, -1, -1) * 0.2**0.5
    assert torch.allclose(
        W,
        torch.linalg.lstsq(
            torch.cat([x, more], 1),
            torch.cat([y, torch.zeros(4, features, 5, dtype=torch.float64)], 1),
        ).solution,
        atol=1e-10,
    )
    assert torch.autograd.gradcheck(ridge, (x.requires_grad_(), y, lam))


def test_no_solution_is_not_a_wrong_one():
    "Equal images and λ next to nothing: NaN for that task alone, and training stops."
    x = torch.ones(2, 6, 4)
    x[1] = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    W = ridge(x, torch.ones(2, 6, 3), torch.tensor(1e-30))
    assert W[0].isnan().all() and not ridge(x, torch.ones(2, 6, 3), torch.tensor(0.1)).isnan().any()


def test_training_stops_where_there_is_no_solution(noise_bank):
    class Twice(EpisodeSampler):
        def meta_batch(self, i, size):
            ep = super().meta_batch(i, size)
            return Episodes(ep.xs.repeat(1, 2, 1, 1, 1), ep.ys.repeat(1, 2), ep.xq, ep.yq)

    m = R2D2(conv4(size=16, filters=8), lam=1e-30)
    before = {k: v.detach().clone() for k, v in m.theta.items()}
    with pytest.raises(FloatingPointError, match='not finite'):
        fit(m, Twice(noise_bank, 3, 1, 3), 3, meta_batch=2, progress=False)
    assert all(torch.equal(m.theta[k], before[k]) for k in before)


@every
def test_a_users_module(name, noise_bank):
    side = 4 if name == 'relation_maps' else 2
    net = from_module(
        nn.Sequential(
            nn.Conv2d(1, 4, 3, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(side)
        ),
        1,
        16,
    )
    if name == 'relation_maps':
        net.map_shape = 4, 4, 4
    m = MAKE[name](net)
    before = {k: v.detach().clone() for k, v in m.theta.items()}
    fit(m, EpisodeSampler(noise_bank, 3, 1, 3), 2, meta_batch=2, progress=False)
    assert any(not torch.equal(m.theta[k], before[k]) for k in before if k.startswith('0.'))


@pytest.mark.parametrize('make', [MatchingNet, ProtoNet, RelationNet, R2D2])
def test_a_seed_is_a_start(make):
    a, b, c = (make(conv4(size=16, filters=8), seed=s).theta for s in (0, 0, 1))
    assert all(torch.equal(a[k], b[k]) for k in a) and not torch.equal(
        a['conv1.weight'], c['conv1.weight']
    )


NET = conv4(size=16, filters=8)


@pytest.mark.parametrize(
    'call,words',
    [
        (
            lambda s: evaluate(ProtoNet(NET), s, 2, steps=1),
            'steps=1, but ProtoNet takes no inner steps',
        ),
        (
            lambda s: ProtoNet(conv4(size=16, norm_steps=5)),
            'norm_steps=5 of the backbone, but ProtoNet',
        ),
        (lambda s: ProtoNet(conv4(size=16, norm='per_step', norm_steps=1)), 'leave norm_steps out'),
        (lambda s: ProtoNet(NET).with_norm('per_step'), 'no statistics'),
        (lambda s: MatchingNet(NET, scale=0.0), 'scale=0.0: it must be greater than 0'),
        (lambda s: RelationNet(NET, width=0), 'width=0'),
        (lambda s: RelationNet(NET, loss='l2'), "loss='l2'.*'mse'"),
        (lambda s: MapRelationNet(NET), 'maps of 0×0 pixels.*conv4_maps'),
        (lambda s: conv4_maps(down='stride'), "down='stride': a map is halved by max pooling"),
        (lambda s: R2D2(NET, lam=0.0), 'lam=0.0'),
        (lambda s: R2D2(NET, scale=-1.0), 'scale=-1.0'),
        (
            lambda s: ProtoNet(NET).adapt(torch.rand(1, 2, 1, 16, 16), torch.tensor([[0, 2]])),
            'class 1 has no support image',
        ),
        (
            lambda s: ProtoNet(NET).adapt(torch.rand(2, 1, 16, 16), torch.tensor([[0, 1]])),
            'expected .tasks',
        ),
        (lambda s: Metric(NET).adapt(s[0:1].xs, s[0:1].ys), 'write keep'),
        (
            lambda s: evaluate(ProtoNet(NET), WaysSampler(s, 2, 5), 2),
            'one number of ways at a time',
        ),
    ],
)
def test_bad_input(call, words, noise_bank):
    with pytest.raises((ValueError, NotImplementedError), match=words):
        call(EpisodeSampler(noise_bank, 5, 1, 3))
