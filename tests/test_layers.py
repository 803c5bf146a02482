"""Task-batched layers against PyTorch's own, one task at a time; and plans."""

import threading
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, vmap

from fewshotmeta.all import *
from fewshotmeta.engine.layers import _MaxPool, _Norm


def randn(*s, grad=True):
    return torch.randn(*s, dtype=torch.float64, requires_grad=grad)


@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.parametrize('stride', [1, 2])
@pytest.mark.parametrize('shared', [True, False])
@pytest.mark.parametrize('bias', [True, False])
def test_convolution_and_two_derivatives(channels, stride, shared, bias):
    torch.manual_seed(0)
    x, w, b = (
        randn(3, 4, channels, 7, 6),
        randn(*(() if shared else (3,)), 5, channels, 3, 3),
        randn(*(() if shared else (3,)), 5),
    )

    def ours():
        return task_conv2d(x, w, b if bias else None, stride)

    def own(t, i):
        return t if shared else t[i]

    def plain():
        return torch.stack(
            [F.conv2d(x[i], own(w, i), own(b, i) if bias else None, stride, 1) for i in range(3)]
        )

    args = (x, w, b) if bias else (x, w)

    def derivatives(f):
        y = f()
        g = torch.autograd.grad(y.pow(3).sum(), args, create_graph=True)
        return [y, *g, *torch.autograd.grad(sum(v.pow(2).sum() for v in g), args)]

    for a, e in zip(derivatives(ours), derivatives(plain)):
        assert torch.allclose(a, e, rtol=1e-9, atol=1e-9)


def test_norm_second_derivative_against_pytorch_and_finite_differences():
    torch.manual_seed(0)
    x, g, b = randn(4, 3, 3, 2), randn(3), randn(3)

    def f(x, g, b):
        return _Norm.apply(x, g, b, 1e-5)[0]

    assert gradcheck(f, (x, g, b)) and gradgradcheck(f, (x, g, b))

    def second(norm):
        y = norm(x, g, b)
        first = torch.autograd.grad(y.pow(3).sum(), (x, g, b), create_graph=True)
        return torch.autograd.grad(sum(v.pow(2).sum() for v in first), (x, g, b))

    for a, e in zip(second(f), second(lambda x, g, b: F.batch_norm(x, None, None, g, b, True))):
        assert torch.allclose(a, e, rtol=1e-8, atol=1e-10)


def test_batch_norm_under_vmap_is_wrong_and_ours_is_not():
    "Why there is own arithmetic, and no vmap. If this fails since vmap became right: good news."
    torch.manual_seed(0)
    x, y = randn(3, 6, 2, 8, 8, grad=False), torch.arange(3).repeat(2)
    theta = [randn(4, 2, 3, 3), randn(4), randn(4), randn(3, 4)]

    def net(p, x, norm):
        return F.relu(norm(F.conv2d(x, p[0], padding=1), p[1], p[2])).mean((2, 3)) @ p[3].T

    def bn(x, g, b):
        return F.batch_norm(x, None, None, g, b, True)

    def ours(x, g, b):
        return task_norm(x[None], g, b)[0][0]

    def loop(norm):
        total = 0.0
        for xi in x:

            def f(p):
                return F.cross_entropy(net(p, xi, norm), y)

            total = total + f(
                [
                    t - 0.1 * g
                    for t, g in zip(theta, torch.autograd.grad(f(theta), theta, create_graph=True))
                ]
            )
        return torch.cat([g.flatten() for g in torch.autograd.grad(total, theta)])

    def mapped(xi):
        def f(p):
            return F.cross_entropy(net(p, xi, bn), y)

        return f([t - 0.1 * g for t, g in zip(theta, grad(f)(theta))])

    right = loop(bn)
    assert torch.allclose(loop(ours), right, rtol=1e-9, atol=1e-12)
    wrong = torch.cat([g.flatten() for g in torch.autograd.grad(vmap(mapped)(x).sum(), theta)])
    assert (wrong - right).norm() > 1e-4 * right.norm()


@pytest.mark.parametrize('filters', [1, 2])
def test_a_scale_that_tasks_share(filters):
    "Of one channel, too, where the scales of all tasks would be one number in memory."
    episodes = EpisodeSampler(glyphs('train'), 3, 1, 2)[0:3]
    episodes = Episodes(episodes.xs.double(), episodes.ys, episodes.xq.double(), episodes.yq)
    learner = to_dtype(MAML(conv4(filters=filters), 3, 0.1), torch.float64)
    alone, together = (
        meta_gradient(learner, episodes, 0.0, plan_for('cpu', plan)).grads
        for plan in ('loop', 'batched')
    )
    for one, other in zip(alone, together):
        torch.testing.assert_close(one, other, atol=1e-11, rtol=0)


def test_norm_by_given_statistics():
    torch.manual_seed(0)
    x, q, g, b = randn(2, 5, 3, 4, 4), randn(2, 6, 3, 4, 4), randn(2, 3), randn(3)
    y, used = task_norm(q, g, b, batch_stats(x))
    for i in range(2):
        m, v = x[i].mean((0, 2, 3)), x[i].var((0, 2, 3), correction=0)

        def c(t):
            return t[:, None, None]

        assert torch.allclose(
            y[i], (q[i] - c(m)) / c(v + 1e-5).sqrt() * c(g[i]) + c(b), rtol=1e-9
        ) and torch.allclose(used[1][i], v)
    assert gradgradcheck(
        lambda x, q: task_norm(q, None, None, batch_stats(x))[0],
        (randn(2, 2, 2, 2, 2), randn(2, 2, 2, 2, 2)),
    )


def test_max_pool():
    x = randn(2, 3, 2, 7, 5)
    assert torch.equal(task_max_pool(x), torch.stack([F.max_pool2d(t, 2) for t in x]))
    assert gradgradcheck(_MaxPool.apply, (randn(2, 3, 5, 4),))


def test_channels_stay_adjacent():
    "One layer in the wrong memory format costs a factor: all activations are channels-last."
    x = channels_last(torch.rand(5, 1, 28, 28))
    assert x.stride() == (784, 1, 28, 1)
    for w in (torch.randn(64, 1, 3, 3), torch.randn(1, 64, 1, 3, 3)):
        y = task_conv2d(x[None], w)
        assert y[0].is_contiguous(memory_format=torch.channels_last)
    y = task_max_pool(task_norm(y, None, None)[0])
    assert y[0].is_contiguous(memory_format=torch.channels_last)


def test_wrong_number_of_tasks():
    with pytest.raises(ValueError, match='weights of 2 tasks for activations of 3'):
        task_conv2d(torch.randn(3, 1, 1, 5, 5), torch.randn(2, 4, 1, 3, 3))


# ---- plans
@pytest.mark.parametrize('chunk,n', [(None, 7), (1, 3), (3, 7), (10, 7)])
def test_chunks_cover_everything_once(chunk, n):
    assert [i for s in Plan('p', chunk).chunks(n) for i in range(n)[s]] == list(range(n))


@pytest.mark.parametrize('n', [1, 3, 4, 7, 33])
def test_small_tasks_share_a_call_whatever_the_workers(n):
    slices = {
        tuple((s.start, s.stop) for s in replace(plan_for('cpu'), workers=w).chunks(n, 28 * 28))
        for w in (0, 1, 2, 16)
    }
    assert len(slices) == 1 and [i for a, b in slices.pop() for i in range(a, b)] == list(range(n))

    def sizes(**kw):
        return {s.stop - s.start for s in plan_for('cpu', **kw).chunks(800, 5 * 28 * 28)}

    assert (
        sizes() == {8}
        and sizes(pixels=0) == {1}
        and sizes(name='plain') == {1}
        and {s.stop - s.start for s in plan_for('cpu').chunks(800, 5 * 84 * 84)} == {1}
    )


@pytest.mark.parametrize('stride', [1, 2])
def test_a_convolution_task_by_task(stride):
    "As the CPU's plans do it, against all tasks in one grouped convolution, with two derivatives."
    torch.manual_seed(0)
    x, w = (
        t.requires_grad_()
        for t in (torch.randn(3, 2, 4, 6, 6).double(), torch.randn(3, 5, 4, 3, 3).double())
    )

    def derivatives(plan):
        y = plan_for('cpu', plan).run(task_conv2d, x, w, None, stride)
        first = torch.autograd.grad(y.sin().sum(), (x, w), create_graph=True)
        return y, *first, *torch.autograd.grad(sum(g.square().sum() for g in first), (x, w))

    for a, b in zip(derivatives('threads'), derivatives('batched')):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-10)


def test_map_keeps_order_and_threads():
    before = torch.get_num_threads()
    barrier = threading.Barrier(2)

    def f(i):
        if i < 2:
            barrier.wait(10)  # both workers really run at once
        return i, torch.get_num_threads()

    assert Plan('p', 1, 2).map(f, range(6)) == [(i, 1) for i in range(6)]
    assert torch.get_num_threads() == before


def test_an_error_in_a_worker_is_the_callers():
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError):
        Plan('p', 1, 2).map(lambda i: 1 // i, [1, 0, 1])
    assert torch.get_num_threads() == before


def test_unknown_plan():
    with pytest.raises(ValueError, match='choose one of threads, loop, plain, batched'):
        plan_for('cpu', 'magic')
