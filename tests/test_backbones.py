"""Every variant of Conv4, by its parameter count and against a network of nn modules."""

import pytest, torch
from torch import nn
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


@pytest.mark.parametrize(
    'call,words',
    [
        (lambda: conv4(protocol='maml'), "protocol='maml': choose one of 'finn2017'"),
        (lambda: conv4(norm='batch'), "norm='batch'"),
        (lambda: conv4(down='avg'), "down='avg'"),
        (lambda: conv4(norm='per_step'), 'norm_steps'),
        (lambda: conv4(size=8), 'size=8.*at least 16'),
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
