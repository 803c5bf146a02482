"""Feature Transfer, Baseline++, SimpleShot: sampler, loss on every plan, heads by autograd."""

import numpy as np, pytest, torch, torch.nn.functional as F
from fewshotmeta.all import *
from test_hypermaml import plain_embedding
from test_maml import assert_slope, noise

METHODS = [FeatureTransfer, BaselinePP, WeightNormBaselinePP, SimpleShot]


def tiny(make=FeatureTransfer, norm='transductive', **kw):
    m = to_dtype(
        make(
            conv4(
                size=16, filters=8, norm=norm, **({'norm_steps': 1} if norm == 'per_step' else {})
            ),
            7,
            **kw,
        ),
        torch.float64,
    )
    m.theta = {k: v.detach().contiguous().requires_grad_() for k, v in m.theta.items()}
    gen = torch.Generator().manual_seed(3)
    if 'feature.mean' in m.buffers:
        m.buffers['feature.mean'] = torch.rand(8, generator=gen, dtype=torch.float64)
    return m


def images(tasks=3, n=6, seed=0):
    "Mini-batches of noise, labels 0 … 6."
    gen = torch.Generator().manual_seed(seed)
    x, y = (
        torch.rand(tasks, n, 1, 16, 16, generator=gen, dtype=torch.float64),
        torch.randint(0, 7, (tasks, n), generator=gen),
    )
    return Episodes(x[:, :0], y[:, :0], x, y)


def plain_scores(m, h, head):
    w, b = head['head.weight'], head.get('head.bias')
    if isinstance(m, WeightNormBaselinePP):
        w = head['head.length'][:, None] * w / w.norm(dim=1, keepdim=True)
        return 2 * F.normalize(h, dim=1) @ w.T
    return (
        2 * F.normalize(h, dim=1) @ F.normalize(w, dim=1).T
        if isinstance(m, BaselinePP)
        else F.linear(h, w, b)
    )


def gradient(m, ep):
    return dict(
        zip(
            m.theta,
            torch.autograd.grad(
                m.meta_loss(ep).loss.mean(), list(m.theta.values()), materialize_grads=True
            ),
        )
    )


@pytest.mark.parametrize('make', METHODS)
@pytest.mark.parametrize('plan', list(PLANS))
def test_every_plan_equals_the_plain_loop(make, plan):
    m, ep = tiny(make), images()
    t = m.theta
    loss = (
        sum(
            F.cross_entropy(
                plain_scores(m, plain_embedding(m, x), t), y
            )
            for x, y in zip(ep.xq, ep.yq)
        )
        / 3
    )
    naive = torch.autograd.grad(loss, list(t.values()), materialize_grads=True)
    how = plan_for('cpu', plan)
    value, grads = (
        Recorder(m, how)(ep, 0.0, 7)[::2]
        if how.capture
        else (lambda g: (g.loss, g.grads))(meta_gradient(m, ep, plan=how))
    )
    assert value.item() == pytest.approx(loss.item(), abs=1e-12)
    size = sum(v.norm() ** 2 for v in naive) ** 0.5
    for k, a, b in zip(t, grads, naive):
        assert (a - b).norm() < 1e-10 * size, k


@pytest.mark.parametrize('make', METHODS)
@pytest.mark.parametrize('norm', NORMS)
def test_gradient_against_finite_differences(make, norm):
    m, ep, gen = tiny(make, norm), images(), torch.Generator().manual_seed(1)
    assert_slope(
        m,
        ep,
        gradient(m, ep),
        {k: torch.randn(v.shape, generator=gen, dtype=torch.float64) for k, v in m.theta.items()},
        1e-6,
    )


@pytest.mark.parametrize(
    'make,init',
    [
        (FeatureTransfer, 'zeros'),
        (FeatureTransfer, 'linear'),
        (BaselinePP, 'linear'),
        (WeightNormBaselinePP, 'linear'),
    ],
)
@pytest.mark.parametrize('norm', ['transductive', 'support'])
def test_the_fitted_head_is_what_autograd_and_sgd_find(make, init, norm):
    m, ep = tiny(make, norm, tune_steps=12, tune_lr=0.3, task_init=init), noise(k=3)
    fresh, fast = m.adapt(ep.xs, ep.ys, 0), m.adapt(ep.xs, ep.ys)
    for i in range(2):
        h, own = (
            plain_embedding(m, ep.xs[i]).detach(),
            {k: fresh.params[k][i].clone().requires_grad_() for k in m.head.parts},
        )
        opt = torch.optim.SGD(
            list(own.values()), 0.3, momentum=0.9, dampening=0.9, weight_decay=0.001
        )
        for _ in range(12):
            opt.zero_grad()
            F.cross_entropy(
                plain_scores(m, h, own), ep.ys[i]
            ).backward()
            opt.step()
        for k, v in own.items():
            assert torch.allclose(fast.params[k][i], v, atol=1e-11), k
        assert (fast.params['head.weight'][i] - fresh.params['head.weight'][i]).abs().max() > 1e-3


def test_learned_lengths_are_torchs_weight_normalisation():
    "A head of 7 rows by `weight_norm`: the same start, and the gradients of both parts."
    m, ep = tiny(WeightNormBaselinePP), images()
    rows = m.theta['head.weight']
    assert torch.allclose(m.theta['head.length'], rows.norm(dim=1))
    with torch.no_grad():
        m.theta['head.length'].copy_(1.5 * rows.norm(dim=1))
    layer = torch.nn.Linear(8, 7, bias=False, dtype=torch.float64)
    layer.weight.data = rows.detach().clone()
    layer = torch.nn.utils.parametrizations.weight_norm(layer)
    parts = layer.parametrizations.weight
    length, direction = parts.original0, parts.original1
    length.data *= 1.5
    h = [F.normalize(plain_embedding(m, x), dim=1).detach() for x in ep.xq]
    loss = sum(F.cross_entropy(2 * layer(x), y) for x, y in zip(h, ep.yq)) / 3
    theirs = torch.autograd.grad(loss, [length, direction])
    ours = gradient(m, ep)
    assert m.meta_loss(ep).loss.mean().item() == pytest.approx(loss.item(), abs=1e-12)
    assert torch.allclose(ours['head.length'], theirs[0][:, 0], atol=1e-12)
    assert torch.allclose(ours['head.weight'], theirs[1], atol=1e-12)
    assert theirs[0].abs().max() > 1e-4


def test_learned_lengths_outlive_a_file(tmp_path):
    m, ep = WeightNormBaselinePP(conv4(size=16, filters=8), 7, tune_steps=3), noise()
    save_learner(m, tmp_path / 'm.safetensors')
    assert isinstance(m.head, LengthRows)
    again, x = load_learner(tmp_path / 'm.safetensors'), (ep.xs.float(), ep.ys)
    assert torch.equal(again.adapt(*x).params['head.length'], m.adapt(*x).params['head.length'])


def test_momentum_descent_is_torchs():
    gen = torch.Generator().manual_seed(0)
    a, x = (torch.randn(4, 4, generator=gen, dtype=torch.float64) for _ in range(2))
    for momentum, dampening, decay in (
        (0.0, 0.0, 0.0),
        (0.9, 0.0, 0.0),
        (0.9, 0.9, 0.01),
        (0.5, 0.2, 0.1),
    ):
        p = x.clone().requires_grad_()
        opt = torch.optim.SGD([p], 0.05, momentum, dampening, decay)
        for _ in range(9):
            opt.zero_grad()
            (p @ a).square().sum().backward()
            opt.step()
        ours = momentum_descent(
            {'p': x}, lambda own: {'p': 2 * own['p'] @ a @ a.T}, 9, 0.05, momentum, dampening, decay
        )
        assert torch.allclose(ours['p'], p, rtol=1e-10)


@pytest.mark.parametrize('transform', list(TRANSFORMS))
def test_simpleshot_is_the_nearest_mean(transform):
    m, ep = tiny(SimpleShot, transform=transform), noise(k=3, q=4)
    logits = m.predict(m.adapt(ep.xs, ep.ys), ep.xq)
    for i in range(2):

        def look(x):
            h = plain_embedding(m, x).detach()
            if transform == 'CL2N':
                h = h - m.buffers['feature.mean']
            return h if transform == 'UN' else h / h.norm(dim=1, keepdim=True)

        s, q = look(ep.xs[i]), look(ep.xq[i])
        far = torch.stack([(q - s[ep.ys[i] == c].mean(0)).square().sum(1) for c in range(3)], 1)
        assert torch.allclose(logits[i], q.square().sum(1)[:, None] - far, atol=1e-12)


@pytest.mark.parametrize(
    'make,steps',
    [(FeatureTransfer, 1), (BaselinePP, 1), (WeightNormBaselinePP, 1), (SimpleShot, 0)],
)
def test_steps(make, steps, noise_bank):
    m, s = make(conv4(size=16, filters=8), 40), EpisodeSampler(noise_bank, 5, 1, 3)
    assert (
        [f.steps for f in m.trajectory(s[0:2].xs, s[0:2].ys)] == list(range(steps + 1))
        and evaluate(m, s, 4).accuracies.shape == (4, steps + 1)
        and m.n_way is None
    )
    if make is FeatureTransfer:
        assert (accuracies(m, s, 9, 0) == 0.2).all()  # all scores are equal
    assert m.predict(m.adapt(s(n_way=9)[0:2].xs, s(n_way=9)[0:2].ys), s[0:2].xq).shape[-1] == 9
    fast = m.adapt(s[0:2].xs, s[0:2].ys)
    assert not any(v.requires_grad for v in fast.params.values())


@pytest.mark.parametrize('make', METHODS)
def test_no_task_knows_another(make):
    m, ep = tiny(make), noise(tasks=3)
    whole = m.predict(m.adapt(ep.xs, ep.ys), ep.xq)
    for i in range(3):
        assert torch.allclose(
            m.predict(m.adapt(ep.xs[i : i + 1], ep.ys[i : i + 1]), ep.xq[i : i + 1])[0],
            whole[i],
            atol=1e-12,
        )


@pytest.mark.parametrize('make', METHODS)
@pytest.mark.parametrize('norm', ['support', 'per_step'])
def test_not_transductive(make, norm):
    m, ep = tiny(make), noise(q=4)
    assert m.transductive
    m = m.with_norm(norm)
    m.buffers = {k: v + 0.1 for k, v in m.buffers.items()}
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


@pytest.mark.parametrize('make', [FeatureTransfer, SimpleShot])
def test_names_of_the_classes_do_not_matter(make):
    m, ep, order = tiny(make), noise(), torch.tensor([1, 2, 0])
    assert torch.allclose(
        m.predict(m.adapt(ep.xs, order[ep.ys]), ep.xq)[..., order],
        m.predict(m.adapt(ep.xs, ep.ys), ep.xq),
        atol=1e-12,
    )


def test_what_is_remembered_is_what_evaluation_mode_uses(noise_bank):
    "The stored statistics are PyTorch's running ones (with the biased variance)."
    body = conv4(size=16, filters=8, conv_init='he_fan_out')  # its biases are not zero
    m, batches = SimpleShot(body, 40), ImageBatches(noise_bank, 8)
    net = torch.nn.BatchNorm2d(8, momentum=0.1)
    before = {k: v.detach().clone() for k, v in m.theta.items()}
    fit(m, batches, 3, meta_batch=1, meta_lr=1e-30, progress=False)
    for i in range(3):
        net(F.conv2d(batches[i].xq, before['conv1.weight'], before['conv1.bias'], padding=1))
    assert torch.allclose(m.buffers['norm1.mean'][0], net.running_mean, atol=1e-6)
    n = 8 * 16 * 16
    assert torch.allclose(
        m.buffers['norm1.var'][0] - 0.9**3, (net.running_var - 0.9**3) * (n - 1) / n, atol=1e-5
    )
    mean, x = torch.zeros(8), batches[0:3].xq
    for i in range(3):
        mean = torch.lerp(mean, m.backbone(m.theta, x[i : i + 1])[0].mean((0, 1)), 0.1)
    assert torch.allclose(m.buffers['feature.mean'], mean, atol=1e-6)
    h, q = m.with_norm('per_step').backbone(m.theta | m.buffers, x)[0], x[0]
    for i in range(1, 5):
        q = F.conv2d(q, m.theta[f'conv{i}.weight'], m.theta[f'conv{i}.bias'], padding=1)
        q = F.batch_norm(
            q,
            m.buffers[f'norm{i}.mean'][0],
            m.buffers[f'norm{i}.var'][0],
            m.theta[f'norm{i}.weight'],
            m.theta[f'norm{i}.bias'],
        )
        q = F.max_pool2d(F.leaky_relu(q, m.backbone.leak), 2)
    assert torch.allclose(h[0], q.flatten(1), atol=1e-5)


@pytest.fixture(scope='module')
def trained_shot():
    "SimpleShot on glyphs, with convolution biases that are not zero."
    bank = glyphs('train').select(range(64))
    m = SimpleShot(conv4(protocol='hypermaml2022', filters=16), len(bank))
    options = dict(meta_batch=4, meta_lr=4e-3, progress=False)
    return fit(m, ImageBatches(bank, batch=16), 200, **options).learner


def plain_network(m):
    "The learner's body of PyTorch's own layers, with its parameters and its statistics."
    layers, channels = [], m.backbone.channels
    for i in range(1, 5):
        conv = torch.nn.Conv2d(channels, m.backbone.filters, 3, padding=1)
        norm = torch.nn.BatchNorm2d(m.backbone.filters, m.backbone.eps, momentum=1.0)
        conv.weight.data, conv.bias.data = m.theta[f'conv{i}.weight'], m.theta[f'conv{i}.bias']
        norm.weight.data, norm.bias.data = m.theta[f'norm{i}.weight'], m.theta[f'norm{i}.bias']
        norm.running_mean = m.buffers[f'norm{i}.mean'][0].clone()
        norm.running_var = m.buffers[f'norm{i}.var'][0].clone()
        layers += [conv, norm, torch.nn.ReLU(), torch.nn.MaxPool2d(2)]
        channels = m.backbone.filters
    return torch.nn.Sequential(*layers, torch.nn.Flatten()).double()


def test_stored_statistics_are_those_of_batch_norm_in_evaluation_mode(trained_shot):
    m = to_dtype(trained_shot, torch.float64)
    assert m.theta['conv2.bias'].abs().max() > 0.01
    x = ImageBatches(glyphs('test'), 32)[0].xq.double()
    ours, _ = m.with_norm('per_step').backbone(m.theta | m.buffers, x[None])
    with torch.no_grad():
        theirs = plain_network(m).eval()(x)
    assert torch.allclose(ours[0], theirs, rtol=0, atol=1e-9)


def test_a_mini_batch_stores_what_batch_norm_in_training_mode_stores(trained_shot):
    "With a momentum of 1, PyTorch's running mean is that of the last mini-batch, bias included."
    m = to_dtype(trained_shot, torch.float64)
    x = ImageBatches(glyphs('test'), 32)[0:1].xq.double()
    stored = m.meta_loss(Episodes(x[:, :0], torch.zeros(1, 0), x, torch.zeros(1, 32).long())).stats
    net = plain_network(m).train()
    with torch.no_grad():
        net(x[0])
    for i, pixels in enumerate((28 * 28, 14 * 14, 7 * 7, 3 * 3)):
        norm, n = net[4 * i + 1], 32 * pixels
        mean, var = stored[f'norm{i + 1}.mean'][0], stored[f'norm{i + 1}.var'][0]
        assert torch.allclose(mean, norm.running_mean, rtol=0, atol=1e-9)
        assert torch.allclose(var * n / (n - 1), norm.running_var, rtol=0, atol=1e-9)


def test_stored_statistics_are_as_good_as_a_tasks_own(trained_shot):
    "Where stored means lack the convolution's bias, accuracy falls from 0.79 to 0.67."
    test = EpisodeSampler(glyphs('test'), 5, 1, 15, seed=0)
    own = accuracies(trained_shot, test, 60)[:, -1].mean()
    stored = accuracies(trained_shot.with_norm('per_step'), test, 60)[:, -1].mean()
    assert own > 0.6
    assert abs(own - stored) < 0.05


@pytest.mark.parametrize('make', METHODS)
def test_resumes_to_the_same_bytes(noise_bank, resumed, make):
    def go(folder):
        return fit(
            make(conv4(size=16, filters=8), 40),
            ImageBatches(noise_bank, 8),
            12,
            meta_batch=2,
            valid=EpisodeSampler(noise_bank, 5, 1, 3),
            valid_tasks=3,
            valid_every=4,
            checkpoint=folder,
            save_every=3,
            progress=False,
        ).learner

    whole = resumed(go, 2, 7)
    assert not any(v.requires_grad for v in whole.buffers.values())


def test_trained_alike(noise_bank):
    "Feature Transfer and SimpleShot differ in the tasks' heads alone; recorded training, too."

    def go(make, **kw):
        return fit(
            make(conv4(size=16, filters=8), 40),
            ImageBatches(noise_bank, 8),
            4,
            meta_batch=2,
            progress=False,
            **kw,
        ).learner

    a, b, c = go(FeatureTransfer), go(SimpleShot), go(SimpleShot, plan=plan_for('cpu', 'graph'))
    assert all(torch.equal(a.theta[k], b.theta[k]) for k in a.theta) and all(
        torch.allclose(b.theta[k], c.theta[k], atol=1e-5)
        for k in a.theta
        if 'conv' not in k or 'weight' in k
    )
    assert set(b.buffers) - set(a.buffers) == {'feature.mean'} and torch.allclose(
        b.buffers['feature.mean'], c.buffers['feature.mean'], atol=1e-5
    )


def test_learns(noise_bank):
    run = fit(
        FeatureTransfer(conv4(size=16, filters=16), 4),
        ImageBatches(noise_bank.select(range(4)), 16),
        60,
        meta_batch=1,
        meta_lr=1e-2,
        log_every=20,
        progress=False,
    )
    assert run.history[-1]['accuracy'] > 0.9 > run.history[0]['accuracy']  # by heart


def test_a_users_module():
    net = torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3, 2, 1),
        torch.nn.BatchNorm2d(4),
        torch.nn.Tanh(),
        torch.nn.AdaptiveAvgPool2d(2),
    )
    for make in METHODS:
        m, ep = to_dtype(make(from_module(net, 1, 16), 7), torch.float64), noise()
        assert gradient(m, images())['0.weight'].abs().max() > 0 and m.predict(
            m.adapt(ep.xs, ep.ys), ep.xq
        ).shape == (2, 6, 3)


# ---- the sampler
def test_a_mini_batch_is_a_function_of_seed_and_number(noise_bank):
    b = ImageBatches(noise_bank, 12, seed=4)
    whole = b[0:20]
    for i in (0, 7, 19):
        assert all(torch.equal(x, y) for x, y in zip(b[i], whole[i]))
    again = torch.cat([b.meta_batch(i, 5).xq for i in range(4)])
    assert torch.equal(again, whole.xq) and b.digest(20) == ImageBatches(
        noise_bank, 12, seed=4
    ).digest(20)
    assert (
        len(
            {
                b.digest(3),
                b(seed=5).digest(3),
                b(batch=11).digest(3),
                b(bank=noise_bank.select(range(39))).digest(3),
            }
        )
        == 4
    )
    assert (
        b.digest(20) in b.describe(20)
        and '40 classes' in b.describe(2)
        and b.way_range == (40, 40)
        and b.ways_at(3) == 40
    )
    assert b.digest(20) == 'cd8d4d5f6d3f7062'  # the same on every machine


def test_images_belong_to_their_classes_and_do_not_repeat(noise_bank):
    for bank in (noise_bank, noise_bank.select([3, 17, 30]), noise_bank.select(range(9)).rotated()):
        classes, numbers = ImageBatches(bank, 60).draw(np.arange(40))
        assert all(len(set(row)) == 60 for row in numbers.tolist())
        assert (
            (numbers >= bank.start[classes]) & (numbers < bank.start[classes] + bank.count[classes])
        ).all() and set(classes.flat) == set(range(len(bank)))


def test_images_are_drawn_uniformly():
    "Also where classes have different sizes: a large class comes more often."
    x = torch.arange(30, dtype=torch.uint8)[:, None, None, None].expand(30, 1, 16, 16).contiguous()
    bank = ImageBank(x, [0, 20], [20, 10], ['large', 'small'])
    classes, numbers = ImageBatches(bank, 5).draw(np.arange(6000))
    seen = np.bincount(numbers.flat, minlength=30)
    assert ((seen - 1000) ** 2 / 1000).sum() < 60 and abs(
        (classes == 0).mean() - 2 / 3
    ) < 0.01  # χ² with 29 degrees of freedom


def test_looks(noise_bank):
    b = ImageBatches(noise_bank, 6)
    assert torch.allclose(b(mean=0.5, std=0.25)[3].xq, (b[3].xq - 0.5) / 0.25)
    a = b(augment=CloserLook())
    assert (
        torch.equal(a[0:4].xq[2], a[2].xq)
        and not torch.equal(a[2].xq, b[2].xq)
        and torch.equal(a[2].yq, b[2].yq)
        and 'CloserLook' in a.describe(2)
    )


BODY = conv4(size=16, filters=16)


@pytest.mark.parametrize(
    'call,words',
    [
        (
            lambda b, s: fit(FeatureTransfer(BODY, 40), s, 2, progress=False),
            '5 support images: FeatureTransfer is trained on mini-batches',
        ),
        (lambda b, s: fit(MAML(BODY, 5), b, 2), 'n_way=40 for a learner of n_way=5'),
        (lambda b, s: fit(SimpleShot(BODY, 39), b, 2), 'n_max=39'),
        (lambda b, s: evaluate(SimpleShot(BODY, 40), b, 2), 'no support images'),
        (
            lambda b, s: evaluate(BaselinePP(BODY, 40), s, 2, steps=2),
            'steps=2, but BaselinePP adapts in 1 step: ',
        ),
        (lambda b, s: evaluate(SimpleShot(BODY, 40), s, 2, steps=1), 'adapts in 0 steps'),
        (
            lambda b, s: SimpleShot(BODY, 3).adapt(
                torch.rand(1, 2, 1, 16, 16), torch.tensor([[0, 2]])
            ),
            'class 1 has no support image',
        ),
        (lambda b, s: b(batch=1), 'batch=1: .*at least 2'),
        (lambda b, s: b(batch=1001), 'noise has 1000 images'),
        (lambda b, s: b(std=0.0), 'std=0.0'),
        (lambda b, s: b(augment=3), 'augment=3'),
        (lambda b, s: FeatureTransfer(BODY, 1), 'n_classes=1'),
        (lambda b, s: FeatureTransfer(BODY, 4, tune_steps=0), 'tune_steps=0'),
        (lambda b, s: FeatureTransfer(BODY, 4, tune_lr=0.0), 'tune_lr=0.0'),
        (lambda b, s: FeatureTransfer(BODY, 4, tune_dampening=1.0), 'tune_dampening=1.0'),
        (lambda b, s: FeatureTransfer(BODY, 4, tune_decay=-1.0), 'tune_decay=-1.0'),
        (lambda b, s: FeatureTransfer(BODY, 4, task_init='ones'), "task_init='ones'"),
        (lambda b, s: BaselinePP(BODY, 4, task_init='zeros'), 'no direction'),
        (lambda b, s: BaselinePP(BODY, 4, head_init='zeros'), 'no direction'),
        (lambda b, s: SimpleShot(BODY, 4, transform='cosine'), "transform='cosine'.*'CL2N'"),
        (lambda b, s: FeatureTransfer(conv4(size=16, norm_steps=5), 4), 'norm_steps=5'),
    ],
)
def test_bad_input(call, words, noise_bank):
    with pytest.raises(ValueError, match=words):
        call(ImageBatches(noise_bank, 8), EpisodeSampler(noise_bank, 5, 1, 3))


def test_no_number_below_zero(noise_bank):
    with pytest.raises(IndexError, match='mini-batch -1'):
        ImageBatches(noise_bank)[-1]
