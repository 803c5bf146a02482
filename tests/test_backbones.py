"""Conv4 and ResNet-12, by their parameter counts and against networks of nn modules."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torchvision.ops import FrozenBatchNorm2d

from fewshotmeta.all import *


def count(net, n_way=0):
    return sum(t.numel() for t in net.init(torch.Generator()).values()) + n_way * (
        net.out_features + 1
    )


@pytest.mark.parametrize(
    'net,n_way,expected',
    [  # T1
        (conv4(protocol='finn2017'), 5, 112_005),
        (conv4(protocol='finn2017'), 20, 112_980),
        (conv4(3, 84, 'finn2017'), 5, 32_773),
        (conv4(), 5, 112_261),
        (conv4(), 20, 113_236),
        (conv4(protocol='antoniou_repo'), 5, 112_261),
        (conv4(3, 84), 5, 70_085),
        (conv4(3, 84, filters=32), 5, 32_901),
        (conv4(norm_steps=5), 5, 114_369 - 60),
        (conv4(norm_steps=5), 20, 115_344 - 60),
        (conv4(3, 84, norm_steps=5), 5, 71_681 - 60),
        (conv4(3, 84, filters=32, norm_steps=5), 5, 33_985 - 60),
        (conv4(protocol='drumond2020'), 1, 112_001),
        (conv4(3, 84, 'drumond2020'), 1, 29_697),
        (conv4(protocol='drumond2020'), 10, 111_936 + 650),
        (conv4(3, 84, 'drumond2020'), 5, 28_896 + 5 * 801),
        (conv4(3, 28, 'hypermaml2022'), 0, 113_088),
        (conv4(3, 28, 'hypermaml2022'), 5, 113_413),
        (conv4(3, 84, 'hypermaml2022'), 5, 113_413),
        (conv4(3, 84, 'hypermaml2022', average=False), 5, 121_093),
    ],
)
def test_parameter_counts(net, n_way, expected):
    assert count(net, n_way) == expected


@pytest.mark.parametrize(
    'kw,features',
    [
        (dict(), 64),
        (dict(down='stride'), 64),
        (dict(size=84, filters=32), 800),
        (dict(size=84, filters=48), 1200),
        (dict(size=84, filters=64, average=True), 64),
        (dict(size=84, filters=64, average=False), 1600),
        (dict(size=84, down='stride'), 48),
        (dict(size=32), 256),
    ],
)
def test_features(kw, features):
    net = conv4(**kw)
    x = torch.rand(2, 3, 1, net.size, net.size)
    assert net.out_features == features and net(net.init(torch.Generator()), x)[0].shape == (
        2,
        3,
        features,
    )


def plain(net):
    act, blocks = (nn.LeakyReLU(net.leak) if net.leak else nn.ReLU()), []
    for i in range(4):
        stride = 2 if net.down == 'stride' else 1
        blocks += [
            nn.Conv2d(net.channels if i == 0 else net.filters, net.filters, 3, stride, 1),
            nn.BatchNorm2d(net.filters, net.eps, track_running_stats=False),
            act,
        ]
        if net.down == 'max_pool':
            blocks.append(nn.MaxPool2d(2))
    if net.average or net.down == 'stride':
        blocks.append(nn.AdaptiveAvgPool2d(1))
    return nn.Sequential(*blocks, nn.Flatten())


@pytest.mark.parametrize(
    'net',
    [
        conv4(filters=6),
        conv4(filters=6, protocol='finn2017', affine='both'),
        conv4(3, 40, 'hypermaml2022', filters=6),
        conv4(filters=6, protocol='drumond2020'),
    ],
)
def test_conv4_is_the_network_that_it_says(net):
    gen = torch.Generator().manual_seed(0)
    p = {
        k: v.double() + 0.1 * torch.randn(v.shape, generator=gen, dtype=torch.float64)
        for k, v in net.init(gen).items()
    }
    module = plain(net).double()
    convs, norms = ([m for m in module if isinstance(m, k)] for k in (nn.Conv2d, nn.BatchNorm2d))
    with torch.no_grad():
        for i, (c, n) in enumerate(zip(convs, norms), 1):
            for m, name in ((c, f'conv{i}'), (n, f'norm{i}')):
                m.weight.copy_(p[f'{name}.weight'])
                m.bias.copy_(p[f'{name}.bias'])
    x = torch.rand(2, 5, net.channels, net.size, net.size, generator=gen, dtype=torch.float64)
    assert torch.allclose(net(p, x)[0], torch.stack([module(t) for t in x]), rtol=1e-9, atol=1e-10)


def test_inits():
    gen = torch.Generator().manual_seed(0)
    x = conv4().init(gen)['conv2.weight']
    bound = (6 / (128 * 9)) ** 0.5
    assert x.abs().max() <= bound and abs(x.std() - bound / 3**0.5) < 0.02 * bound
    h = conv4(protocol='hypermaml2022').init(gen)
    assert (
        abs(h['conv2.weight'].std() - (2 / (64 * 9)) ** 0.5) < 1e-3
        and 0 < h['conv2.bias'].abs().max() <= (1 / (64 * 9)) ** 0.5
    )
    assert (
        init_head(5, 64, 'normal', gen)['head.weight'].std() > 0.9
        and init_head(5, 64, 'zeros')['head.weight'].abs().sum() == 0
    )


def test_affine_only_normalises_nothing():
    net = conv4(norm='affine_only', filters=4)
    p = net.init(torch.Generator().manual_seed(0))
    x = torch.rand(1, 3, 1, 28, 28)
    alone, together = net(p, x[:, :1])[0], net(p, x)[0][:, :1]
    assert torch.allclose(alone, together, atol=1e-6) and not torch.allclose(
        net(p, 2 * x)[0], net(p, x)[0], atol=1e-4
    )


def test_from_module():
    module = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.Dropout(0.9),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
    )
    body = from_module(module, 1, 16)
    assert (
        body.out_features == 16
        and body.norm.transductive
        and body.norm_names == {'1.weight', '1.bias'}
    )
    p, x = body.init(), torch.rand(2, 6, 1, 16, 16)
    assert torch.equal(body(p, x)[0], body(p, x)[0])  # dropout is off
    assert (
        torch.equal(body.module[1].running_mean, torch.zeros(4))
        and body.module[1].num_batches_tracked == 0
    )
    own = dict(p, **{'0.weight': torch.stack([p['0.weight'], 3 * p['0.weight'] + 1])})
    assert torch.allclose(body(own, x)[0][0], body(p, x[:1])[0][0], atol=1e-6)
    assert not torch.allclose(body(own, x)[0][1], body(p, x[1:])[0][0], atol=1e-3)


def two_stages(batch_norm=False):
    "A small module; its first convolution and its norm are frozen."
    torch.manual_seed(3)
    norm = nn.BatchNorm2d(4) if batch_norm else nn.GroupNorm(2, 4)
    first = nn.Sequential(nn.Conv2d(1, 4, 3, 2), norm, nn.ReLU())
    first.requires_grad_(False)
    return nn.Sequential(first, nn.Conv2d(4, 6, 3, 2), nn.Tanh())


FROZEN = {'0.0.weight', '0.0.bias', '0.1.weight', '0.1.bias'}


@pytest.mark.parametrize('method', sorted(LEARNERS))
def test_frozen_weights_stay_as_they_are_under_every_method(method, noise_bank):
    body = from_module(two_stages(), 1, 16)
    before = {name: value.clone() for name, value in body.frozen.items()}
    assert before.keys() == FROZEN
    train = EpisodeSampler(noise_bank, 3, 1, 2)
    setting = Setting(3, len(noise_bank), everything, 'xavier_uniform', 0)
    own = dict(ingredients=('msl', 'da', 'lslr'), hyper_width=8, tune_steps=2, n_max=3)
    own = {k: v for k, v in own.items() if k in LEARNERS.options(method)}
    learner = LEARNERS[method](body, setting, **own)
    start = learner.theta['1.weight'].detach().clone()
    fit(learner, learner.training_data(train), 2, meta_batch=2, meta_lr=0.01, progress=False)
    assert not any(name.endswith(tuple(FROZEN)) for name in learner.theta)  # nor has one a rate
    assert not FROZEN & set(learner.adapted)
    assert not torch.equal(learner.theta['1.weight'], start)
    for name, value in before.items():
        assert torch.equal(learner.backbone.frozen[name], value)
    fast = learner.adapt(*(x[None] for x in (train[0].xs, train[0].ys)))
    assert learner.predict(fast, train[0].xq[None]).isfinite().all()


def test_frozen_weights_are_used_in_the_type_of_the_images():
    body = from_module(two_stages(), 1, 16)
    x = torch.rand(1, 3, 1, 16, 16, dtype=torch.float64)
    params = {name: value.double() for name, value in body.init().items()}
    expected = two_stages().double()(x[0]).flatten(1)
    assert close(body(params, x)[0][0], expected)


def test_frozen_weights_stand_in_the_text_of_a_module():
    half, whole = two_stages(), two_stages().requires_grad_(True)
    assert '4 of 6 tensors frozen' in repr(from_module(half, 1, 16))
    assert 'frozen' not in repr(from_module(whole, 1, 16))
    with torch.no_grad():
        half[0][0].weight.add_(1)
    weights = {repr(from_module(m, 1, 16)).split('weights ')[1][:8] for m in (half, whole)}
    assert len(weights) == 2


def test_a_network_frozen_whole_is_evaluated_and_not_trained(noise_bank):
    learner = ProtoNet(from_module(two_stages().requires_grad_(False), 1, 16))
    tasks = EpisodeSampler(noise_bank, 3, 1, 2)
    assert evaluate(learner, tasks, 3).n == 3
    with pytest.raises(ValueError, match='ProtoNet has no parameter to train'):
        fit(learner, tasks, 1, progress=False)


def test_one_query_through_batch_norm():
    "Where one pixel is left, two images are needed; a norm with fixed statistics needs one."
    net = two_stages(batch_norm=True)[0]
    learner = MAML(from_module(net, 1, 4), 2)
    fast = learner.adapt(torch.rand(1, 2, 1, 4, 4), torch.arange(2)[None])
    assert learner.predict(fast, torch.rand(1, 2, 1, 4, 4)).shape == (1, 2, 2)
    with pytest.raises(ValueError, match='1 image, but the module needs at least 2.*GroupNorm'):
        learner.predict(fast, torch.rand(1, 1, 1, 4, 4))
    assert from_module(net, 1, 16).alone == ''  # its norm sees 49 pixels of one image
    net[1] = FrozenBatchNorm2d(4)
    fixed = MAML(from_module(net, 1, 4), 2)
    assert not fixed.transductive
    assert fixed.predict(fast, torch.rand(1, 1, 1, 4, 4)).shape == (1, 1, 2)


def test_a_module_lies_on_the_cpu_in_float32():
    "Wherever it lies, as every backbone begins; one without values is refused."
    body = from_module(two_stages().double(), 1, 16)
    assert {v.dtype for v in body.init().values()} == {torch.float32}
    with pytest.raises(ValueError, match='6 of 6 tensors .* "meta".*load the weights first'):
        from_module(two_stages().to('meta'), 1, 16)


class Pair(nn.Module):
    "Not one tensor, but two."

    def forward(self, x):
        return x, x


@pytest.mark.parametrize(
    'module,words',
    [
        (nn.Conv2d(3, 4, 3), r'channels=1, size=16, but Conv2d fails on images of \(1, 16, 16\)'),
        (nn.LSTM(16, 4), 'LSTM fails on images'),
        (Pair(), '2 images give a tuple: features are one tensor'),
        (nn.Flatten(0), r'2 images give \(512,\)'),
    ],
)
def test_a_module_that_makes_no_features_of_these_images(module, words):
    with pytest.raises(ValueError, match=words):
        from_module(module, 1, 16)


def test_a_module_refuses_images_of_another_shape():
    learner = MAML(from_module(nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1))), 2)
    for shape in ((1, 84, 84), (3, 32, 32)):
        words = f'images of .{str(shape)[1:-1]}., but the backbone takes .3, 84, 84.: read them'
        with pytest.raises(ValueError, match=words):
            learner.adapt(torch.rand(1, 2, *shape), torch.arange(2)[None])



# ---- ResNet-12
class PlainBlock(nn.Module):
    "A residual block of nn modules."

    def __init__(self, channels, width, batch_norm):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.conv3 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.skip = nn.Conv2d(channels, width, 1, bias=False)
        for name in ('norm1', 'norm2', 'norm3', 'skip_norm'):
            setattr(self, name, batch_norm(width))

    def forward(self, x):
        h = F.leaky_relu(self.norm1(self.conv1(x)), 0.1)
        h = F.leaky_relu(self.norm2(self.conv2(h)), 0.1)
        h = self.norm3(self.conv3(h))
        return F.max_pool2d(F.leaky_relu(h + self.skip_norm(self.skip(x)), 0.1), 2)


class Given(nn.BatchNorm2d):
    "A norm that uses its buffers, and notes the statistics of what it was shown."

    def forward(self, x):
        self.seen = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias)


class Own(nn.BatchNorm2d):
    "A norm that uses the statistics of what it is shown, and notes them."

    def forward(self, x):
        self.seen = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
        return F.batch_norm(x, None, None, self.weight, self.bias, training=True)


def plain_resnet12(net, batch_norm=Own):
    "The same network of nn modules; its parameters have the same names."
    channels = (net.channels, *net.widths)
    blocks = [PlainBlock(*pair, batch_norm) for pair in zip(channels, net.widths)]
    module = nn.Module()
    for i, block in enumerate(blocks, 1):
        setattr(module, f'block{i}', block)
    module.forward = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten()).forward
    return module.double()


def shaken(net, tasks=0, seed=0):
    "Parameters in float64, none of them trivial, shared or one for each of some tasks."
    gen = torch.Generator().manual_seed(seed)

    def moved(v):
        shape = (tasks, *v.shape) if tasks else v.shape
        return v.double() + 0.1 * torch.randn(shape, generator=gen, dtype=torch.float64)

    return {name: moved(v) for name, v in net.init(gen).items()}


def tasks_of(params, n):
    "The parameters of each task."
    return [{name: v[i] for name, v in params.items()} for i in range(n)]


def images(net, tasks, n, seed=1):
    gen = torch.Generator().manual_seed(seed)
    shape = tasks, n, net.channels, net.size, net.size
    return torch.rand(shape, generator=gen, dtype=torch.float64)


def close(a, b):
    return torch.allclose(a, b, rtol=1e-9, atol=1e-10)


def test_resnet12_has_the_parameters_of_the_papers():
    assert count(resnet12()) == 12_424_320
    assert resnet12().out_features == 640
    assert count(resnet12()) == sum(p.numel() for p in plain_resnet12(resnet12()).parameters())
    rows = resnet12(filters=2, norm_steps=3)
    norms = sum(2 * width for width in rows.norm_layers().values())
    assert count(rows) == count(resnet12(filters=2)) + 2 * norms
    weight = resnet12().init(torch.Generator().manual_seed(0))['block2.conv2.weight']
    assert abs(weight.std() / (2 / (160 * 9)) ** 0.5 - 1) < 0.01


@pytest.mark.parametrize('channels,size', [(1, 28), (3, 33)])
def test_resnet12_is_the_network_that_it_says(channels, size):
    net = resnet12(channels, size, filters=2)
    module = plain_resnet12(net)
    params, x = shaken(net, tasks=2), images(net, 2, 4)
    features, stats = net(params, x)
    for i, own in enumerate(tasks_of(params, 2)):
        assert close(features[i], functional_call(module, own, (x[i],)))
        for layer, (mean, var) in stats.items():
            block, norm = layer.split('.')
            expected = getattr(getattr(module, block), norm).seen
            assert close(mean[i], expected[0]) and close(var[i], expected[1])


def test_resnet12_by_the_support_sets_statistics():
    net = resnet12(1, 20, filters=2, norm='support')
    params, xs, xq = shaken(net, tasks=2), images(net, 2, 4), images(net, 2, 3, seed=2)
    _, stats = net(params, xs)
    features, _ = net(params, xq, 0, stats)
    own, given = plain_resnet12(net), plain_resnet12(net, Given)
    for i, params_of_one in enumerate(tasks_of(params, 2)):
        functional_call(own, params_of_one, (xs[i],))
        state = dict(params_of_one)
        for layer in net.norm_layers():
            block, norm = layer.split('.')
            mean, var = getattr(getattr(own, block), norm).seen
            state |= {f'{layer}.running_mean': mean, f'{layer}.running_var': var}
        assert close(features[i], functional_call(given, state, (xq[i],)))
    alone = net(params, xq[:, :1], 0, stats)[0]
    assert close(alone, features[:, :1])  # no look at the other queries


@pytest.mark.parametrize('norm', ['per_step', 'affine_only'])
def test_resnet12_by_statistics_that_are_given(norm):
    net = resnet12(1, 20, filters=2, norm=norm, norm_steps=3)
    gen = torch.Generator().manual_seed(3)
    buffers = {k: v.double() + torch.rand(v.shape, generator=gen) for k, v in net.buffers().items()}
    params, x = shaken(net), images(net, 2, 4)
    module = plain_resnet12(net, Given)
    for step in (0, 2):
        state = {k: v[step] if 'norm' in k else v for k, v in params.items()}
        for name, value in buffers.items():
            layer, _, kind = name.rpartition('.')
            state[f'{layer}.running_{kind}'] = value[step]
        features, stats = net(params | buffers, x, step)
        assert close(features, torch.stack([functional_call(module, state, (t,)) for t in x]))
    mean, var = stats['block3.skip_norm']
    seen = module.block3.skip_norm.seen if norm == 'per_step' else (0 * mean[1], 0 * var[1] + 1)
    assert close(mean[1], seen[0]) and close(var[1], seen[1])


def plain_meta_loss(module, theta, adapted, ep, rate):
    "Query losses of one inner step, by functional_call, a task at a time."

    def loss(params, x, y):
        features = functional_call(module, {k: params[k] for k in body}, (x,))
        return F.cross_entropy(F.linear(features, params['head.weight'], params['head.bias']), y)

    body, losses = [k for k in theta if not k.startswith('head.')], []
    for xs, ys, xq, yq in zip(*ep):
        own = {k: theta[k] for k in adapted}
        grads = torch.autograd.grad(loss(theta, xs, ys), list(own.values()), create_graph=True)
        moved = {k: v - rate * g for (k, v), g in zip(own.items(), grads)}
        losses.append(loss(theta | moved, xq, yq))
    return torch.stack(losses)


@pytest.mark.parametrize('plan', ['loop', 'batched', 'threads', 'im2col', 'plain'])
def test_an_inner_step_of_resnet12_and_its_gradient(plan):
    "Through the step, in second order, for tasks that adapt each on its own."
    net = resnet12(1, 18, filters=2)
    learner = to_dtype(MAML(net, 3, inner_lr=0.2, inner_steps=1), torch.float64)
    gen = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for v in learner.theta.values():
            v.add_(0.1 * torch.randn(v.shape, generator=gen, dtype=torch.float64))
    ys = torch.arange(3).repeat(4, 2)
    ep = Episodes(images(net, 4, 6), ys, images(net, 4, 6, seed=2), ys)
    found = meta_gradient(learner, ep, plan=plan_for('cpu', plan))
    module = plain_resnet12(net)
    losses = plain_meta_loss(module, learner.theta, learner.adapted, ep, 0.2)
    assert close(found.loss, losses.mean().detach())
    expected = torch.autograd.grad(losses.mean(), list(learner.theta.values()))
    for name, a, b in zip(learner.theta, found.grads, expected):
        assert torch.allclose(a, b, rtol=1e-7, atol=1e-9), name


def test_resnet12_is_kept_in_a_file(tmp_path):
    learner = mamlpp(resnet12(1, 16, filters=2), 3, inner_steps=2)
    save_learner(learner, tmp_path / 'r.safetensors')
    again = load_learner(tmp_path / 'r.safetensors')
    assert isinstance(again.backbone, ResNet12)
    assert again.backbone == learner.backbone
    assert again.backbone.norm_steps == 2
    xs, ys = images(learner.backbone, 1, 3).float(), torch.arange(3)[None]
    logits = [m.predict(m.adapt(xs, ys), xs) for m in (learner, again)]
    assert torch.equal(*logits)


# ---- bad input
@pytest.mark.parametrize(
    'call,words',
    [
        (lambda: conv4(protocol='maml'), "protocol='maml': choose one of 'finn2017'"),
        (lambda: conv4(norm='batch'), "norm='batch'"),
        (lambda: conv4(down='avg'), "down='avg'"),
        (lambda: conv4(norm='per_step'), 'norm_steps'),
        (lambda: conv4(size=8), 'size=8.*at least 16'),
        (lambda: resnet12(size=12), 'size=12.*at least 16'),
        (lambda: resnet12(norm='per_step'), 'norm_steps'),
        (lambda: resnet12(filters=0.5), 'filters=0.5: expected a whole number'),
        (
            lambda: resnet12()({}, torch.rand(1, 2, 1, 9, 9)),
            r'\(1, 9, 9\), but the backbone takes \(3, 84, 84\)',
        ),
        (lambda: init_head(5, 64, 'ones'), "head_init='ones'"),
        (
            lambda: conv4()(conv4().init(torch.Generator()), torch.rand(1, 2, 3, 28, 28)),
            r'\(3, 28, 28\), but the backbone takes \(1, 28, 28\)',
        ),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize('network', NormedNetwork.__subclasses__())
def test_networks_share_what_their_norms_ask_for(network):
    for given, words in (
        (dict(size=12), 'size=12: images of at least 16 pixels are needed'),
        (dict(filters=0), 'filters=0: expected a whole number of at least 1'),
        (dict(norm_steps=0), 'norm_steps=0: expected'),
        (dict(norm='per_step'), 'say how many with norm_steps'),
    ):
        with pytest.raises(ValueError, match=words):
            network(**given)
    net = network(filters=2, size=16).with_steps(3).with_norm('per_step')
    stored = net.buffers()
    assert {name.rsplit('.', 1)[0] for name in stored} == set(net.norm_layers())
    assert {len(values) for values in stored.values()} == {3}
    params, layer = net.init(torch.Generator()), next(iter(net.norm_layers()))
    params[f'{layer}.bias'][1] = 7
    scale, shift = net.scale_and_shift(params, layer, 1)
    assert scale.shape == shift.shape == (net.norm_layers()[layer],) and (shift == 7).all()
