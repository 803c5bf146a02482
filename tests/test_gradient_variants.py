"""SignMAML by two other ways; Unicorn-MAML against its equation, HIDRA, and equal rows."""

import pytest, torch, torch.nn.functional as F
from fewshotmeta.all import *
from test_maml import assert_slope, gradient, noise


def tiny(make=SignMAML, n=3, norm='transductive', **kw):
    net = dict(norm=norm, **({'norm_steps': 3} if norm == 'per_step' else {}))
    m = to_dtype(
        make(conv4(size=16, filters=8, **net), n, **(dict(inner_lr=0.01, inner_steps=3) | kw)),
        torch.float64,
    )
    m.theta = {k: v.detach().contiguous().requires_grad_() for k, v in m.theta.items()}
    return m


def plain_logits(net, p, x):
    for i in range(1, 5):
        x = F.conv2d(x, p[f'conv{i}.weight'], padding=1)  # the norm subtracts the bias again
        x = F.max_pool2d(
            F.leaky_relu(
                F.batch_norm(
                    x, None, None, p[f'norm{i}.weight'], p[f'norm{i}.bias'], True, 0.0, net.eps
                ),
                net.leak,
            ),
            2,
        )
    return F.linear(x.flatten(1), p['head.weight'], p['head.bias'])


def plain_loop(m, ep, step, start=lambda p: p, create_graph=False):
    "Loss and gradient of an inner loop `step(parameter, gradient)`, with PyTorch's own layers."
    t, total = m.theta, 0.0
    names = [k for k in m.adapted if not ('conv' in k and 'bias' in k)]
    for xs, ys, xq, yq in zip(*ep):
        p = start(dict(t))
        for _ in range(m.inner_steps):
            g = torch.autograd.grad(
                F.cross_entropy(plain_logits(m.backbone, p, xs), ys),
                [p[k] for k in names],
                create_graph=create_graph,
                retain_graph=True,
            )
            p |= {k: step(p[k], v) for k, v in zip(names, g)}
        total = total + F.cross_entropy(plain_logits(m.backbone, p, xq), yq) / len(ep.xs)
    return total, dict(zip(t, torch.autograd.grad(total, list(t.values()), materialize_grads=True)))


def assert_same(m, ep, plan, loss, naive):
    g = meta_gradient(m, ep, plan=plan)
    size = sum(v.norm() ** 2 for v in naive.values()) ** 0.5
    assert g.loss.item() == pytest.approx(loss.item(), abs=1e-10)
    for k, v in zip(m.theta, g.grads):
        same = (
            v.sum(0) - naive[k].sum(0) if k in HEAD and not m.n_way else v - naive[k]
        )  # of a tied head only the rows' sum is defined
        assert same.norm() < 1e-10 * size, k


PLANNED = [*PLANS, 'recompute']


def how(plan):
    return (
        plan_for('cpu', 'batched', recompute=True) if plan == 'recompute' else plan_for('cpu', plan)
    )


@pytest.mark.parametrize('plan', PLANNED)
@pytest.mark.parametrize('steps', [1, 4])
def test_signmaml_on_every_plan_equals_the_plain_loop(plan, steps):
    m, ep = tiny(inner_steps=steps), noise(tasks=3)
    loss, naive = plain_loop(m, ep, lambda v, g: v - 0.01 * torch.sign(g))
    assert_same(m, ep, how(plan), loss, naive)


@pytest.mark.parametrize('norm', NORMS)
@pytest.mark.parametrize('adapts', [all_but_norm, head_only])
def test_signmaml_against_finite_differences(norm, adapts):
    "Its first-order gradient is the whole gradient."
    m, ep, gen = tiny(norm=norm, adapts=adapts), noise(), torch.Generator().manual_seed(2)
    assert_slope(
        m,
        ep,
        gradient(m, ep),
        {k: torch.randn(v.shape, generator=gen, dtype=torch.float64) for k, v in m.theta.items()},
        1e-8,
    )


def test_every_weight_moves_by_alpha():
    m, ep = tiny(inner_steps=1), noise()
    fast, some = m.adapt(ep.xs, ep.ys, 1), m.adapt(10 * ep.xs, ep.ys, 1)
    for k in ('conv1.weight', 'conv3.weight', 'head.weight', 'head.bias'):
        assert torch.allclose(
            (fast.params[k] - m.theta[k]).abs(), torch.tensor(0.01, dtype=torch.float64), atol=1e-12
        )
    assert (
        torch.equal(fast.params['conv2.bias'][0], m.theta['conv2.bias']) and m.order == 1
    )  # no gradient, no step
    a = tiny(inner_steps=1, reduction='sum_over_shots').adapt(ep.xs, ep.ys, 1)
    assert all(
        torch.allclose(a.params[k], fast.params[k]) for k in m.adapted
    )  # the loss's scale does not count


@pytest.mark.parametrize('make', [SignMAML, unicorn_maml])
def test_no_task_knows_another(make):
    m, ep = tiny(make), noise(tasks=3)
    whole = m.predict(m.adapt(ep.xs, ep.ys), ep.xq)
    for i in range(3):
        assert torch.allclose(
            m.predict(m.adapt(ep.xs[i : i + 1], ep.ys[i : i + 1]), ep.xq[i : i + 1])[0],
            whole[i],
            atol=1e-10,
        )


@pytest.mark.parametrize('make', [SignMAML, unicorn_maml])
def test_not_transductive(make):
    m, ep = tiny(make).with_norm('support'), noise(q=4)
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


@pytest.mark.parametrize('make', [SignMAML, unicorn_maml])
def test_resumes_to_the_same_bytes(noise_bank, resumed, make):
    train = EpisodeSampler(noise_bank, 5, 1, 3)

    def go(folder):
        return fit(
            make(conv4(size=16, filters=8), 5, inner_steps=2),
            train,
            6,
            meta_batch=2,
            checkpoint=folder,
            save_every=2,
            progress=False,
        ).learner

    resumed(go, 3)


@pytest.mark.parametrize('plan', PLANNED)
@pytest.mark.parametrize('order', [1, 2])
def test_unicorn_on_every_plan_equals_its_equation(plan, order):
    "One row, expanded; a MAML inner loop; the gradient of the row."
    m, ep = tiny(unicorn_maml, inner_lr=0.3, order=order), noise(tasks=3)
    loss, naive = plain_loop(
        m,
        ep,
        lambda v, g: v - 0.3 * g,
        lambda p: p | {k: p[k][:1].expand(3, *p[k].shape[1:]) for k in HEAD},
        create_graph=order == 2,
    )
    assert_same(m, ep, how(plan), loss, naive)
    assert naive['head.weight'].abs().max() < 1e-12 and naive['conv1.weight'].abs().max() > 1e-4


def test_unicorn_is_hidra():
    m, ep = tiny(unicorn_maml, inner_lr=0.3), noise()
    h = tiny(lambda b, n, **kw: hidra(b, n, 'tied_gradient', **kw), inner_lr=0.3)
    assert describe(m) == describe(h) and torch.equal(m.meta_loss(ep).loss, h.meta_loss(ep).loss)
    assert all(
        torch.equal(a, b) for a, b in zip(gradient(m, ep).values(), gradient(h, ep).values())
    )
    order = torch.tensor([1, 2, 0])
    assert torch.allclose(
        m.predict(m.adapt(ep.xs, order[ep.ys]), ep.xq)[..., order],
        m.predict(m.adapt(ep.xs, ep.ys), ep.xq),
        atol=1e-10,
    )
    assert (
        m.inner_steps == 3
        and unicorn_maml(conv4(), 5).inner_steps == 15
        and m.predict(m.adapt(noise(n_way=6).xs, noise(n_way=6).ys), ep.xq).shape[-1] == 6
    )


def test_the_shared_vector_says_nothing():
    m, ep, gen = (
        tiny(unicorn_maml, inner_lr=0.3, inner_steps=5),
        noise(),
        torch.Generator().manual_seed(0),
    )
    other = with_theta(
        m,
        m.theta
        | {
            k: torch.randn(1, *m.theta[k].shape[1:], generator=gen, dtype=torch.float64)
            .expand_as(m.theta[k])
            .contiguous()
            for k in HEAD
        },
    )
    assert torch.allclose(m.meta_loss(ep).loss, other.meta_loss(ep).loss, atol=1e-9)


@pytest.mark.parametrize(
    'call,words',
    [
        (lambda s: SignMAML(conv4(size=16), 5, order=2), 'order=2: the sign has no derivative'),
        (lambda s: SignMAML(conv4(size=16), 5, inner_lr=-1.0), 'inner_lr=-1.0'),
        (lambda s: SignMAML(conv4(size=16), 1), 'n_way=1'),
        (
            lambda s: evaluate(SignMAML(conv4(size=16), 5), s(n_way=7), 2),
            'n_way=7 for a learner of n_way=5',
        ),
        (lambda s: unicorn_maml(conv4(size=16), 1), 'n_max=1'),
        (lambda s: fit(unicorn_maml(conv4(size=16), 4), s, 2), 'n_max=4'),
        (lambda s: unicorn_maml(conv4(size=16), 5, inner_steps=-1), 'inner_steps=-1'),
    ],
)
def test_bad_input(call, words, noise_bank):
    with pytest.raises(ValueError, match=words):
        call(EpisodeSampler(noise_bank, 5, 1, 3))


# ---- the authors' settings


def test_signmaml_is_by_default_what_its_authors_job_file_says():
    m = SignMAML(conv4(size=16, filters=8), 3)
    assert (m.inner_lr, m.inner_steps, m.test_steps) == (0.0035, 5, 10)
    assert m.adapts is everything and 'norm1.weight' in m.adapted


def test_steps_at_test_are_others_than_in_training(noise_bank):
    "Ten at test, five in the meta-loss, whose value is that of five steps of another learner."
    task = EpisodeSampler(noise_bank, 3, 1, 3)
    net, episodes = conv4(size=16, filters=8), task[0:2]
    m, as_trained = SignMAML(net, 3), SignMAML(net, 3, test_steps=None)
    assert m.adapt(episodes.xs, episodes.ys).steps == 10
    assert m.adapt(episodes.xs, episodes.ys, 2).steps == 2
    assert as_trained.adapt(episodes.xs, episodes.ys).steps == 5
    assert torch.equal(m.meta_loss(episodes).loss, as_trained.meta_loss(episodes).loss)
    assert evaluate(m, task, 2).accuracies.shape == (2, 11)


def test_steps_at_test_are_at_most_those_there_are_parameters_for(noise_bank):
    m = SignMAML(conv4(size=16, filters=8, norm='per_step', norm_steps=5), 3)
    assert evaluate(m, EpisodeSampler(noise_bank, 3, 1, 3), 2).accuracies.shape == (2, 6)


def test_steps_at_test_outlive_a_file(tmp_path):
    save_learner(SignMAML(conv4(size=16, filters=8), 3, test_steps=7), tmp_path / 'm.safetensors')
    assert load_learner(tmp_path / 'm.safetensors').test_steps == 7


@pytest.mark.parametrize('order', [1, 2])
@pytest.mark.parametrize('plan', ['plain', 'batched', 'recompute', 'graph'])
def test_a_temperature_divides_the_logits_of_queries_alone(plan, order):
    m, ep = tiny(unicorn_maml, inner_lr=0.3, order=order, temperature=0.5), noise(tasks=3)
    plain = tiny(unicorn_maml, inner_lr=0.3, order=order)
    loss, naive = tempered_loop(plain, ep, 0.5, create_graph=order == 2)
    assert_same(m, ep, how(plan), loss, naive)
    fast, cold = m.adapt(ep.xs, ep.ys), plain.adapt(ep.xs, ep.ys)
    assert torch.allclose(fast.params['head.weight'], cold.params['head.weight'], atol=1e-12)
    assert torch.allclose(m.predict(fast, ep.xq), 2 * plain.predict(cold, ep.xq), atol=1e-10)


def tempered_loop(m, ep, temperature, create_graph):
    "Loss and gradient of Unicorn-MAML, a task at a time, with PyTorch's own layers."
    theta, total = m.theta, 0.0
    names = [k for k in m.adapted if not ('conv' in k and 'bias' in k)]
    for xs, ys, xq, yq in zip(*ep):
        p = theta | {k: theta[k][:1].expand(3, *theta[k].shape[1:]) for k in HEAD}
        for _ in range(m.inner_steps):
            loss = F.cross_entropy(plain_logits(m.backbone, p, xs), ys)
            kept = dict(create_graph=create_graph, retain_graph=True)
            grads = torch.autograd.grad(loss, [p[k] for k in names], **kept)
            p |= {k: p[k] - 0.3 * g for k, g in zip(names, grads)}
        logits = plain_logits(m.backbone, p, xq) / temperature
        total = total + F.cross_entropy(logits, yq) / len(ep.xs)
    grads = torch.autograd.grad(total, list(theta.values()), materialize_grads=True)
    return total, dict(zip(theta, grads))


@pytest.fixture
def remembering(noise_bank):
    "Unicorn-MAML after some training, by the authors' settings, and its tasks."
    tasks = EpisodeSampler(noise_bank, 3, 1, 3)
    own = dict(inner_steps=2, order=1, adapts=everything, temperature=0.5, remember=True)
    m = unicorn_maml(conv4(size=16, filters=8), 3, **own)
    fit(m, tasks, 4, meta_batch=2, meta_lr=0.01, optimizer='nesterov', progress=False)
    return m, tasks


def test_queries_are_normalised_by_what_training_remembers(remembering):
    m, tasks = remembering
    assert m.transductive and not any(v.requires_grad for v in m.buffers.values())
    running, ep = m.with_norm(RunningQueries()), tasks[0:2]
    fast, own = running.adapt(ep.xs, ep.ys), m.adapt(ep.xs, ep.ys)
    for name in m.adapted:  # support images by their own statistics, as in training
        assert torch.allclose(fast.params[name], own.params[name], atol=1e-5), name
    whole = running.predict(fast, ep.xq)
    assert not running.transductive
    assert torch.allclose(running.predict(fast, ep.xq[:, :1]), whole[:, :1], atol=1e-5)
    for i in range(2):
        p = {k: v[i] if v.dim() > m.theta[k].dim() else v for k, v in fast.params.items()}
        p |= {k: fast.params[k][i] for k in HEAD}
        expected = evaluation_mode(m, p, ep.xq[i]) / 0.5
        assert torch.allclose(whole[i], expected, atol=1e-4)


def evaluation_mode(m, p, x):
    "Logits with the statistics of the last inner step, as PyTorch's batch norm evaluates."
    for i in range(1, 5):
        mean, var = (m.buffers[f'norm{i}.{kind}'][-1] for kind in ('mean', 'var'))
        x = F.conv2d(x, p[f'conv{i}.weight'], p[f'conv{i}.bias'], padding=1)
        scale = p[f'norm{i}.weight'], p[f'norm{i}.bias']
        x = F.batch_norm(x, mean, var, *scale, False, 0.0, m.backbone.eps)
        x = F.max_pool2d(F.leaky_relu(x, m.backbone.leak), 2)
    return F.linear(x.flatten(1), p['head.weight'], p['head.bias'])


@pytest.mark.parametrize('plan', ['batched', 'recompute', 'graph'])
def test_every_plan_remembers_alike(plan):
    m, ep = tiny(unicorn_maml, remember=True), noise(tasks=3)
    found = meta_gradient(m, ep, plan=how('plain')).stats
    if plan == 'graph':
        *_, stats = Recorder(m, how(plan))(ep, 0.0, 3)
    else:
        stats = meta_gradient(m, ep, plan=how(plan)).stats
    assert set(stats) == set(m.buffers)
    for name, value in stats.items():
        assert torch.allclose(value, found[name], atol=1e-10), name


def test_what_is_remembered_goes_on_and_outlives_a_file(remembering, resumed, noise_bank, tmp_path):
    tasks = EpisodeSampler(noise_bank, 3, 1, 3)

    def go(folder):
        own = dict(inner_steps=2, order=1, temperature=0.5, remember=True)
        m = unicorn_maml(conv4(size=16, filters=8), 3, **own)
        outer = dict(meta_batch=2, optimizer='nesterov', checkpoint=folder, save_every=2)
        return fit(m, tasks, 6, progress=False, **outer).learner

    resumed(go, 3)
    m = remembering[0].with_norm(RunningQueries())
    save_learner(m, tmp_path / 'm.safetensors')
    again, ep = load_learner(tmp_path / 'm.safetensors'), tasks[0:2]
    assert torch.equal(
        again.predict(again.adapt(ep.xs, ep.ys), ep.xq), m.predict(m.adapt(ep.xs, ep.ys), ep.xq)
    )


def test_what_the_authors_settings_refuse():
    net = from_module(torch.nn.Flatten(), 1, 16)
    with pytest.raises(ValueError, match='temperature=0'):
        unicorn_maml(conv4(size=16), 3, temperature=0)
    with pytest.raises(ValueError, match='remember=True, but .* has no norm that keeps'):
        unicorn_maml(net, 3, remember=True)
    with pytest.raises(ValueError, match='keeps statistics|no statistics'):
        unicorn_maml(conv4(size=16), 3).with_norm(RunningQueries())
    with pytest.raises(ValueError, match='test_steps=-1'):
        SignMAML(conv4(size=16), 3, test_steps=-1)
