"""The C kernels against PyTorch's operations, with two derivatives; without a compiler; damaged."""

import os
import shutil
import subprocess
import sys
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from forks import Fork

from fewshotmeta.all import *
from fewshotmeta.engine import kernels
from fewshotmeta.engine.kernels import _NormPool, c_source, kernels_used
from test_maml import noise

pytestmark = pytest.mark.skipif(library(torch.float64) is None, reason='no C compiler')


def plain(x, w, gamma, beta, leak, stride, pool):
    z = F.batch_norm(F.conv2d(x, w, None, stride, 1), None, None, gamma, beta, True)
    if pool:
        z = F.max_pool2d(z, 2)
    return F.leaky_relu(z, leak) if leak else F.relu(z)


def derivatives(f, args):
    z = f(*args)
    wave = torch.sin(torch.arange(z.numel(), dtype=z.dtype)).view(z.shape)
    first = torch.autograd.grad((z * wave + z.square() / 9).sum(), args, create_graph=True)

    def weighted(g):
        return (g * torch.cos(torch.arange(g.numel(), dtype=g.dtype)).view(g.shape)).sum()

    return [z, *first, *torch.autograd.grad(sum(map(weighted, first)) + z.sum(), args)]


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize(
    'channels,size', [(1, 28), (1, 17), (3, 21), (3, 16), (16, 14), (16, 7), (2, 6)]
)
@pytest.mark.parametrize('stride,pool', [(1, True), (2, False), (1, False), (2, True)])
@pytest.mark.parametrize('filters,leak', [(8, 0.0), (48, 0.01), (40, 0.2)])
def test_block_and_two_derivatives(channels, size, stride, pool, filters, leak):
    torch.manual_seed(0)
    x = channels_last(randn(3, channels, size, size) + 2)
    w = channels_last(randn(filters, channels, 3, 3) / 5)
    gamma, beta = randn(filters), randn(filters)
    args = [t.requires_grad_() for t in (w, gamma, beta)]
    if channels not in (1, 3):
        args = [x.requires_grad_(), *args]

    def full(a):
        return a if len(a) == 4 else (x, *a)

    def ours(*a):
        x, *params = full(a)
        return fused_block(x[None], *params, 1e-5, leak, stride, pool)[0][0]

    def theirs(*a):
        return plain(*full(a), leak, stride, pool)

    for a, b in zip(derivatives(ours, args), derivatives(theirs, args)):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-10)


def drawn_for_tasks(tasks, filters, channels, size, own):
    "Images, parameters of each task or shared, what is differentiated, and how it is completed."
    torch.manual_seed(0)
    x = randn(tasks, 2, channels, size, size) + 2
    shapes = (filters, channels, 3, 3), (filters,), (filters,)
    params = [randn(*(tasks,) * o, *shape) / 2 for o, shape in zip(own, shapes)]
    args = [t.requires_grad_() for t in ([x] if channels > 3 else []) + params]

    def full(a):
        return a if len(a) == 4 else (x, *a)

    return x, params, args, full


@pytest.mark.parametrize(
    'own', [(True, True, True), (False, False, False), (False, True, False), (True, False, True)]
)
@pytest.mark.parametrize(
    'channels,size,stride,conv',
    [
        (1, 14, 1, 'winograd'),
        (3, 9, 2, 'winograd'),
        (16, 7, 1, 'winograd'),
        (16, 3, 1, 'winograd'),
        (16, 6, 1, 'grouped'),
        (2, 6, 2, 'winograd'),
    ],
)
def test_many_tasks_are_one_after_another(channels, size, stride, conv, own):
    "With weights, scales and shifts of their own or shared: each task's values and derivatives."
    tasks, filters, pool = 3, 8, size > 3
    x, params, args, full = drawn_for_tasks(tasks, filters, channels, size, own)

    def of_task(i, params):
        return [t[i] if o else t for t, o in zip(params, own)]

    def together(*a):
        return plan_for('cpu', conv=conv).run(fused_block, *full(a), 1e-5, 0.01, stride, pool)[0]

    def alone(*a):
        x, *p = full(a)
        each = [plain(x[i], *of_task(i, p), 0.01, stride, pool) for i in range(tasks)]
        return torch.stack(each)

    for a, b in zip(derivatives(together, args), derivatives(alone, args)):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-9)
    stats = fused_block(x, *params, stride=stride, pool=pool)[1]
    for i in range(tasks):
        one = fused_block(x[i : i + 1], *of_task(i, params), stride=stride, pool=pool)[1]
        for a, b in zip(stats, one):
            assert torch.allclose(a[i], b[0])


@pytest.mark.parametrize('own', [(True, True, True), (False, False, False), (False, True, True)])
@pytest.mark.parametrize('channels,size,stride', [(1, 14, 1), (3, 9, 2), (16, 7, 1), (16, 3, 1)])
def test_a_norm_of_fixed_statistics(channels, size, stride, own):
    "Scale and shift that come from anywhere: values, statistics and two derivatives."
    tasks, filters, pool = 3, 8, size > 3
    x, params, args, full = drawn_for_tasks(tasks, filters, channels, size, own)

    def ours(*a):
        return fused_affine(*full(a), 0.01, stride, pool)[0]

    def theirs(*a):
        x, w, scale, shift = full(a)
        fixed = torch.zeros(filters).double(), torch.ones(filters).double()
        y = task_norm(task_conv2d(x, w, None, stride), scale, shift, fixed, 0.0)[0]
        return F.leaky_relu(task_max_pool(y) if pool else y, 0.01)

    for a, b in zip(derivatives(ours, args), derivatives(theirs, args), strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-9)
    seen = fused_affine(x, *params, stride=stride, pool=pool, observe=True)[1]
    for a, b in zip(seen, batch_stats(task_conv2d(x, params[0], None, stride)), strict=True):
        assert torch.allclose(a, b, rtol=1e-9) and not a.requires_grad


@pytest.mark.parametrize('norm', ['affine_only', 'per_step'])
@pytest.mark.parametrize('changes', [{}, dict(down='stride', affine='shift'), dict(leak=0.1)])
def test_a_network_of_fixed_statistics(norm, changes):
    "In C as by PyTorch's operations: a meta-loss, its statistics and its gradients."
    torch.manual_seed(0)
    steps = 2 if norm == 'per_step' else None
    net = conv4(size=16, filters=16, norm=norm, norm_steps=steps, **changes)
    learner = to_dtype(MAML(net, 3, 0.01, 2), torch.float64)
    with torch.no_grad():
        for value in (*learner.theta.values(), *learner.buffers.values()):
            value += 0.1 * torch.rand_like(value)
    found = [meta_gradient(learner, noise(), plan=plan_for('cpu', p)) for p in ('loop', 'plain')]
    for a, b in zip(*(one.tensors() for one in found), strict=True):
        assert (a - b).norm() < 1e-10 * (1 + b.norm())


def test_statistics_are_those_of_the_norm():
    torch.manual_seed(0)
    for c in (1, 16):
        x, w = torch.rand(1, 6, c, 12, 12, dtype=torch.float64), randn(8, c, 3, 3)
        used = fused_block(x, w, None, torch.zeros(8, dtype=torch.float64))[1]
        for a, b in zip(used, batch_stats(task_conv2d(x, w))):
            assert torch.allclose(a, b, rtol=1e-9)


@pytest.mark.parametrize('channels', [1, 16])
def test_what_is_not_a_number_stays_so(channels):
    x, w = torch.rand(1, 2, channels, 8, 8), torch.randn(16, channels, 3, 3)
    x[0, 0, 0, 3, 3] = torch.nan
    assert fused_block(x, w, None, torch.zeros(16))[0].isnan().any()


def test_float32_is_near_its_float64():
    torch.manual_seed(0)
    for c in (1, 64):
        x, w, b = torch.rand(1, 75, c, 14, 14), torch.randn(64, c, 3, 3) / 10, torch.randn(64)
        a = fused_block(x, w, None, b)[0]
        e = fused_block(x.double(), w.double(), None, b.double())[0]
        assert (a - e).norm() < 1e-5 * e.norm()


def test_when_it_is_used():
    def x(*s, dtype=torch.float32):
        return torch.rand(*s, dtype=dtype)

    assert fusable(x(1, 2, 1, 8, 8), 16)
    assert fusable(x(2, 2, 1, 8, 8), 16)
    assert not fusable(x(1, 2, 1, 8, 8), 12)
    assert not fusable(x(1, 2, 1, 8, 8, dtype=torch.float16), 32)
    assert not plan_for('cpu', 'plain').run(fusable, x(1, 2, 1, 8, 8), 16)
    assert plan_for('cpu').run(fusable, x(1, 2, 1, 8, 8), 16)


def test_a_third_derivative_is_refused():
    y = torch.randn(2, 16, 4, 4, requires_grad=True)
    z = _NormPool.apply(channels_last(y), torch.ones(1, 16), torch.zeros(1, 16), 1e-5, 0.0, True)[0]
    (g,) = torch.autograd.grad(z.pow(2).sum(), y, create_graph=True)
    torch.autograd.grad(g.pow(2).sum(), y, retain_graph=True)
    with pytest.raises(RuntimeError, match='two derivatives'):
        torch.autograd.grad(g.pow(2).sum(), y, create_graph=True)
    w = torch.randn(16, 1, 3, 3, requires_grad=True)
    z = fused_block(torch.rand(1, 2, 1, 8, 8), w, None, torch.zeros(16))[0]
    (g,) = torch.autograd.grad(z.pow(2).sum(), w, create_graph=True)
    with pytest.raises(RuntimeError, match='two derivatives'):
        torch.autograd.grad(g.pow(2).sum(), w, create_graph=True)


IMPORTS = 'import torch\nfrom fewshotmeta.all import *\n'


def begun(code, cache, **env):
    "Code in a process that has loaded no kernels yet."
    return Fork(IMPORTS + code, FEWSHOTMETA_CACHE=str(cache), **env)


def in_new_process(code, cache, **env):
    return begun(code, cache, **env).wait()


ASK = """
x, body = torch.ones(1, 5, 1, 28, 28), conv4()
features = body(body.init(torch.Generator().manual_seed(0)), x)[0]
print(features.shape, fusable(x, 64), fusable(x, 64))
"""


@pytest.mark.parametrize(
    'env,said',
    [
        (dict(CC='no-such-compiler -m64'), "no C compiler 'no-such-compiler'"),
        (dict(CC=' '), "no C compiler ' '"),
        (dict(CC='cc "-O2'), 'no C compiler \'cc "-O2\''),
        (dict(FEWSHOTMETA_KERNELS='torch'), ''),
    ],
)
def test_without_a_compiler(tmp_path, env, said):
    done = in_new_process(ASK, tmp_path, **env)
    assert done.stdout.strip() == 'torch.Size([1, 5, 64]) False False'
    assert not list(tmp_path.rglob('*.so'))
    assert done.stderr.count(said) == 1 if said else not done.stderr


def test_a_wrong_wish_is_refused(tmp_path):
    done = in_new_process(ASK, tmp_path, FEWSHOTMETA_KERNELS='off')
    assert 'FEWSHOTMETA_KERNELS=off: choose one of torch, fused' in done.stderr


def test_a_compiler_that_fails_is_quoted_once(tmp_path):
    cc = tmp_path / 'cc'
    cc.write_text('#!/bin/sh\necho "error: out of electrons" >&2; exit 1\n')
    cc.chmod(0o755)
    done = in_new_process(ASK, tmp_path / 'cache', CC=str(cc))
    assert 'False False' in done.stdout
    assert done.stderr.count('out of electrons') == 1
    assert not list((tmp_path / 'cache').rglob('*.*'))


def test_a_cache_that_cannot_be_written(read_only):
    done = in_new_process(ASK, read_only / 'cache')
    assert 'False False' in done.stdout and 'could not be compiled' in done.stderr


def compiler(folder, options, before=''):
    "A compiler that is called with further options: what the environment says."
    cc = folder / 'cc'
    cc.write_text(f'#!/bin/sh\n{before}\nexec cc "$@" {options}\n')
    cc.chmod(0o755)
    return dict(CC=str(cc))


def test_compiled_once_by_many_at_once(tmp_path):
    code = """
from concurrent.futures import ThreadPoolExecutor
print(len(set(ThreadPoolExecutor(4).map(library, [torch.float64] * 4))))
"""
    slow = compiler(tmp_path, '-O0', f'echo >> {tmp_path}/calls; sleep 1')
    cache = tmp_path / 'cache'
    outs = [fork.wait() for fork in [begun(code, cache, **slow) for _ in range(3)]]
    assert [o.stdout.strip() for o in outs] == ['1'] * 3
    assert not any('damaged' in o.stderr for o in outs)
    assert [p.suffix for p in sorted((cache / 'kernels').iterdir())] == ['.json', '.so', '']
    assert (tmp_path / 'calls').read_text() == '\n'


# ---- damage
USE = """
from fewshotmeta.engine.kernels import kernels_used
before = kernels_used()
x = torch.arange(784.).view(1, 1, 1, 28, 28) / 784
z = fused_block(x, torch.ones(16, 1, 3, 3), None, torch.zeros(16))[0]
print(z.sum().item(), fusable(x, 16), before, kernels_used())
"""


def cut_short(path):
    os.truncate(path, 5000)


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def lose_the_digest(path):
    path.with_suffix('.json').unlink()


def empty_the_digest(path):
    path.with_suffix('.json').write_text('{}')


@pytest.fixture(scope='module')
def quick(tmp_path_factory):
    "The compiler without its optimisations, a tenth of the time: what the environment says."
    return compiler(tmp_path_factory.mktemp('quick'), '-O0')


@pytest.fixture(scope='module')
def compiled(tmp_path_factory, quick):
    "A cache folder with freshly compiled kernels, and what the process that made them said."
    folder = tmp_path_factory.mktemp('compiled')
    return folder, in_new_process(USE, folder, **quick)


@pytest.mark.xdist_group('kernels')
@pytest.mark.parametrize('damage', [cut_short, flip_a_byte, lose_the_digest, empty_the_digest])
def test_a_damaged_library_is_compiled_again_once(tmp_path, compiled, quick, damage):
    cache, first = tmp_path / 'cache', compiled[1]
    shutil.copytree(compiled[0], cache)
    (path,) = cache.rglob('*.so')
    whole = path.read_bytes()
    damage(path)
    second, third = (in_new_process(USE, cache, **quick) for _ in range(2))
    assert first.returncode == second.returncode == third.returncode == 0, second.stderr
    assert first.stdout == second.stdout == third.stdout
    assert path.read_bytes() == whole
    assert second.stderr.count(f'{path} is damaged: the kernels are compiled again') == 1
    assert 'damaged' not in first.stderr + third.stderr


@pytest.mark.xdist_group('kernels')
def test_which_kernels_ran(tmp_path, compiled):
    said = compiled[1].stdout.split(maxsplit=3)
    assert said[1:3] == ['True', 'torch']
    assert said[3].startswith('fused C (float32, digest ')
    code = 'from fewshotmeta.engine.kernels import kernels_used\nprint(kernels_used())'
    assert in_new_process(code, tmp_path / 'other').stdout.strip() == 'torch'
    assert not (tmp_path / 'other').exists()


SIDES = 1, 2, 3, 4, 5, 6, 7, 9


@pytest.mark.parametrize('tile', [2, 4])
@pytest.mark.parametrize('tasks', [1, 2])
def test_winograds_three_maps_of_every_size(tile, tasks):
    "By tiles that fit and tiles that hang over, up to many at a time; channels in and out differ."
    maps, gen = kernels._Winograd(tasks, tile), torch.Generator().manual_seed(0)
    direct = EachTask(direct_convolution(1, 1, 1, torch.float64), tasks)
    for h, w in product(SIDES, SIDES):
        n = 1 if min(h, w) > 3 else 30
        shapes = (tasks * n, 8, h, w), (tasks * 16, 8, 3, 3), (tasks * n, 16, h, w)
        x, weight, gy = (random_like(shape, gen) for shape in shapes)
        for name, args in dict(forward=(x, weight), to_input=(gy, x, weight)).items():
            close(getattr(maps, name)(*args), getattr(direct, name)(*args))
        close(maps.to_weight(gy, x, weight), direct.to_weight(gy, x, weight))


def random_like(shape, gen):
    return channels_last(torch.randn(shape, generator=gen, dtype=torch.float64))


def close(found, wanted):
    assert (found - wanted).abs().max() <= 1e-12 * wanted.abs().max()


TILES = [(14, 3, 2), (14, 4, 4), (7, 15, 2), (7, 16, 4), (3, 63, 2), (3, 64, 4)]


@pytest.mark.parametrize('size,n,tile', TILES)
def test_large_tiles_where_they_save_enough(size, n, tile):
    assert kernels._tile(n, size, size) == tile
    assert kernels._tile(100, 10, 10) == kernels._tile(100, 6, 6) == 2
    assert kernels._tile(100, 42, 42) == kernels._tile(100, 28, 3) == 4


HUGE = 2**40
NO_MEMORY = dict(
    norm_forward=[0, 1, 1, 1, HUGE, 0, 0, 0, 0, 0.0, 0.0, 0, 0, 0, 0],
    norm_backward=[0, 0, 0, 0, 1, 1, 1, HUGE, 0, 0, 0, 0.0, 0, 0],
    norm_twice=[0, 0, 0, 0, 0, 0, 0, 1, 1, 1, HUGE, 0, 0, 0, 0, 0, 0.0, 0, 0, 0],
    patch_moments=[0, 1, 1, HUGE, 1, 1, 0, 0],
    first_forward=[0, 1, 1, HUGE, 1, 16, 1, 1, 0, 0, 0.0, 0, 0],
    first_weight=[0, 0, 0, 0, 1, 1, HUGE, 1, 16, 1, 1, 0.0, 0, 0],
    first_at=[0, 0, 0, 1, 1, HUGE, 3, 16, 1, 0, 0, 0, 0.0, 0],
    wino_forward=[0, 1, 1, 1, 16, HUGE, 0, 0, 0, 0, 4, 0],
    wino_weight=[0, 0, 1, 1, 1, 16, HUGE, 2, 0],
)


def test_no_memory_is_an_error():
    "Of each kernel, for one task and for several, in a process that may have no more than 32 GB."
    code = f"""
import resource
from fewshotmeta.engine.kernels import _call
library(torch.float32)
resource.setrlimit(resource.RLIMIT_AS, (2**35, 2**35))
for kernel, args in {NO_MEMORY}.items():
    for tasks in (1, 2):
        try:
            _call(kernel, torch.float32, tasks, *args)
        except MemoryError as e:
            print(e)
"""
    done = in_new_process(code, cache_folder())
    for kernel in NO_MEMORY:
        assert done.stdout.count(f'the kernel {kernel} could not allocate memory') == 2, done.stderr


def test_the_page_shows_the_c_that_is_compiled():
    assert 'int norm_forward(' in c_source('norm_forward').data
    assert 'int norm_backward(' not in c_source('norm_forward').data
    assert c_source().data.startswith('```c\n')
    with pytest.raises(ValueError, match="part='pooling': choose one of vectors, moments"):
        c_source('pooling')


def turned(x):
    return x.rot90(1, (3, 4))


def cut(x):
    return x[..., 2:-2, 2:-2]


def repeated(x):
    return x[:, :1].expand(1, 5, 1, 20, 20)


def transposed(x):
    return x.transpose(3, 4)


def every_other(x):
    return x.flip(1)[:, ::2]


@pytest.mark.parametrize('view', [turned, cut, repeated, transposed, every_other])
@pytest.mark.parametrize('channels', [1, 3])
def test_views_of_images_are_read_as_they_look(view, channels):
    x = torch.rand(1, 5, channels, 20, 20)
    if channels == 3 and view(x[:, :, :1]).shape[1] == 5 and view(x[:, :, :1]).stride()[1] == 0:
        x = x[:, :1].expand(1, 5, 3, 20, 20)
    else:
        x = view(x)
    w, b = torch.randn(16, channels, 3, 3), torch.zeros(16)
    z = fused_block(x, w, None, b)[0]
    assert torch.allclose(z, fused_block(x.contiguous(), w, None, b)[0])
    assert torch.allclose(z[0], plain(x[0], w, torch.ones(16), b, 0.0, 1, True), atol=1e-4)


@pytest.mark.parametrize('channels', [1, 3])
def test_images_may_have_a_gradient(channels):
    torch.manual_seed(0)
    x = torch.rand(1, 3, channels, 9, 9, dtype=torch.float64, requires_grad=True)
    w, b = randn(8, channels, 3, 3), torch.zeros(8, dtype=torch.float64)
    (ours,) = torch.autograd.grad(fused_block(x, w, None, b)[0].square().sum(), x)
    z = plain(x[0], w, torch.ones(8).double(), b, 0.0, 1, True)
    (theirs,) = torch.autograd.grad(z.square().sum(), x)
    assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-10)


def test_smooth_images_and_filters_that_sum_to_zero():
    "Where sums cancel: float32 stays near its float64."
    line = torch.linspace(0.8, 0.9, 28)
    x = (line[:, None] + line)[None, None, None].expand(1, 25, 1, 28, 28)
    x = x + 1e-3 * torch.rand(1, 25, 1, 28, 28)
    w = torch.randn(16, 1, 3, 3)
    w = w - w.mean((2, 3), keepdim=True)
    a = fused_block(x, w, None, torch.zeros(16))[0]
    e = fused_block(x.double(), w.double(), None, torch.zeros(16).double())[0]
    assert (a - e).norm() < 5e-3 * e.norm()


@pytest.mark.parametrize(
    'change,message',
    [
        (dict(w=torch.rand(4, 16, 1, 3, 3)), 'weights of 4 tasks for activations of 1'),
        (dict(w=torch.rand(16, 2, 3, 3)), r'expected \(16, 1, 3, 3\)'),
        (dict(w=torch.rand(16, 1, 5, 5)), r'expected \(16, 1, 3, 3\)'),
        (dict(beta=torch.zeros(16).double()), 'beta is torch.float64'),
        (dict(beta=torch.zeros(5)), r'beta of shape \(5,\): expected \(16,\)'),
        (dict(gamma=torch.zeros(17)), r'gamma of shape \(17,\): expected \(16,\)'),
        (
            dict(x=torch.rand(3, 2, 1, 8, 8), gamma=torch.zeros(2, 16)),
            r'gamma of shape \(2, 16\): expected \(16,\), or \(3, 16\) for one per task',
        ),
    ],
)
def test_what_does_not_fit_never_reaches_c(change, message):
    given = dict(x=torch.rand(1, 2, 1, 8, 8), w=torch.rand(16, 1, 3, 3))
    given |= dict(gamma=None, beta=torch.zeros(16)) | change
    with pytest.raises(ValueError, match=message):
        fused_block(**given)


def test_no_images_are_not_for_c():
    assert not fusable(torch.rand(1, 0, 1, 8, 8), 16)
    m = MAML(conv4(size=16, filters=16), 3, 0.1)
    fast = m.adapt(torch.rand(1, 3, 1, 16, 16), torch.arange(3)[None])
    with pytest.raises(ValueError, match='it contains no image'):
        m.predict(fast, torch.rand(1, 0, 1, 16, 16))


TRAIN = """
import hashlib
import sys
seeded = torch.Generator().manual_seed(0)
images = torch.zeros(60, 1, 16, 16, dtype=torch.uint8).random_(0, 256, generator=seeded)
bank = ImageBank(images, range(0, 60, 6), [6] * 10, list('abcdefghij'))
train = EpisodeSampler(bank, 5, 1, 3)
learner = mamlpp(conv4(size=16, filters=16), 5, 3)
m = fit(learner, train, 6, meta_batch=5, progress=False, plan=plan_for('cpu')).learner
content = b''.join(v.detach().numpy().tobytes() for v in m.theta.values())
print(fusable(torch.ones(1, 1, 1, 16, 16), 16), 'torch._dynamo' in sys.modules, end=' ')
print(hashlib.sha256(content).hexdigest())
"""


def test_the_same_bytes_in_every_process_and_with_any_number_of_workers():
    "And PyTorch's compiler, whose import takes a second and more, is never loaded."
    cache, other = cache_folder(), dict(FEWSHOTMETA_WORKERS='2')
    outs = {in_new_process(TRAIN, cache, FEWSHOTMETA_WORKERS=n).stdout for n in '213'}
    command = [sys.executable, '-c', IMPORTS + TRAIN]  # of another hash seed
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | other)
    outs.add(done.stdout)
    assert len(outs) == 1 and outs.pop().startswith('True False ')
