"""Episodes are a pure function of (bank, sizes, seed, index)."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from fewshotmeta.all import *


def sampler(bank, **changes):
    return EpisodeSampler(bank, **(dict(n_way=5, k_shot=2, n_query=3, seed=7) | changes))


def test_same_alone_and_in_any_batch(noise_bank):
    s = sampler(noise_bank)
    for size in (1, 3, 16):
        batches = [s[i : min(i + size, 20)] for i in range(0, 20, size)]
        for part, whole in zip(zip(*batches), s[0:20]):
            assert torch.equal(torch.cat(part), whole)
    for one, alone in zip(s[[17, 4]][0], s[17]):
        assert torch.equal(one, alone)


PRINT_DIGEST = '''
import torch
from fewshotmeta.all import *
gen = torch.Generator().manual_seed(0)
images = torch.randint(0, 256, (1000, 1, 16, 16), generator=gen, dtype=torch.uint8)
names = [f'class{i:02d}' for i in range(40)]
bank = ImageBank(images, range(0, 1000, 25), [25] * 40, names, name='noise')
print(EpisodeSampler(bank, 5, 2, 3, seed=7).digest(600))
'''


def test_digest_in_another_process(noise_bank):
    "T14: of another hash seed."
    command = [sys.executable, '-c', PRINT_DIGEST]
    out = subprocess.run(command, capture_output=True, text=True).stdout
    assert out.strip() == sampler(noise_bank).digest(600)


def test_digest_of_other_sizes(noise_bank):
    changes = ({}, dict(seed=8), dict(n_way=4), dict(k_shot=1), dict(n_query=4))
    assert len({sampler(noise_bank, **change).digest(50) for change in changes}) == 5


def test_the_first_episode_is_pinned(noise_bank):
    "A change of this digest changes every published test list: it must be meant."
    assert sampler(noise_bank).digest(100) == PINNED


PINNED = '86db5d27c84d9bc3'


@pytest.mark.parametrize('n_way,k,q', [(2, 1, 1), (5, 1, 15), (20, 5, 5), (40, 12, 13)])
def test_draws_are_distinct_and_disjoint(noise_bank, n_way, k, q):
    classes, images = sampler(noise_bank, n_way=n_way, k_shot=k, n_query=q).draw(np.arange(300))
    assert all(len(set(c)) == n_way for c in classes.tolist())
    assert all(len(set(i)) == n_way * (k + q) for i in images.reshape(300, -1).tolist())
    assert (images // 25 == classes[..., None]).all()  # each image is of its class


# ---- support and queries
PER = 25  # images of a class


@pytest.fixture(scope='module')
def numbered_bank():
    "30 classes of 25 images; two pixels of an image are the two digits, base 256, of its number."
    number = torch.arange(30 * PER)
    images = torch.zeros(len(number), 1, 2, 2, dtype=torch.uint8)
    images[:, 0, 0, 0] = (number // 256).byte()
    images[:, 0, 0, 1] = (number % 256).byte()
    names = [f'c{i}' for i in range(30)]
    return ImageBank(images, range(0, len(number), PER), [PER] * 30, names, name='numbered')


def numbers(x):
    "Read the number of each image of a batch of tasks, (tasks, n)."
    digits = (255 * x[:, :, 0, 0]).round().long()
    return 256 * digits[..., 0] + digits[..., 1]


SIZES = [(2, 1, 1), (5, 1, 15), (5, 5, 5), (20, 5, 5), (30, 12, 13)]


@pytest.mark.parametrize('n_way,k,q', SIZES)
def test_no_query_is_in_the_support(numbered_bank, n_way, k, q):
    "Of the episodes that a learner is given, image by image, support against queries."
    s = sampler(numbered_bank, n_way=n_way, k_shot=k, n_query=q)
    some = s[0:300]
    support, query = numbers(some.xs), numbers(some.xq)
    assert support.shape == (300, n_way * k)
    assert query.shape == (300, n_way * q)
    for one, other in zip(support.tolist(), query.tolist()):
        assert len(set(one)) == len(one)
        assert len(set(other)) == len(other)
        assert not set(one) & set(other)


@pytest.mark.parametrize('n_way,k,q', SIZES)
def test_each_image_lies_in_the_class_of_its_label(numbered_bank, n_way, k, q):
    s = sampler(numbered_bank, n_way=n_way, k_shot=k, n_query=q)
    some, (classes, images) = s[0:300], s.draw(np.arange(300))
    classes = torch.from_numpy(classes)
    for x, y in ((some.xs, some.ys), (some.xq, some.yq)):
        assert torch.equal(numbers(x) // PER, classes.gather(1, y))
    drawn = torch.from_numpy(images)
    assert torch.equal(numbers(some.xs), drawn[:, :, :k].flatten(1))
    assert torch.equal(numbers(some.xq), drawn[:, :, k:].flatten(1))


def test_no_query_is_in_the_support_when_ways_vary(numbered_bank):
    ways = WaysSampler(sampler(numbered_bank), 2, 20)
    for i in range(100):
        batch = ways.meta_batch(i, 4)
        for one, other in zip(numbers(batch.xs).tolist(), numbers(batch.xq).tolist()):
            assert len(set(one + other)) == len(one) + len(other)


# ---- draws
def test_families_do_not_meet(noise_bank):
    turned = noise_bank.rotated()
    classes, _ = sampler(turned, n_way=20).draw(np.arange(300))
    families = turned.family[classes]
    assert all(len(set(f)) == 20 for f in families.tolist())
    turns = np.bincount(classes.ravel() // 40)
    assert turns.min() > 1300  # all four rotations take part (1500 each expected)


def chi_square(counts):
    "Deviation from equal counts, in standard deviations of the statistic."
    expected, freedom = counts.mean(), len(counts) - 1
    statistic = ((counts - expected) ** 2 / expected).sum()
    return abs(statistic - freedom) / np.sqrt(2 * freedom)


def test_draws_are_uniform(noise_bank):
    "Chi-square over classes and over the images of a class, at 5 sigma."
    classes, images = sampler(noise_bank).draw(np.arange(20_000))
    for drawn in (classes, images[..., :2], images[..., 2:]):
        assert chi_square(np.bincount(drawn.ravel())) < 5
    first = np.bincount(classes[:, 0])  # the order is random, too
    assert first.sum() == 20_000 and len(first) == 40
    assert chi_square(first) < 5


def test_unequal_classes():
    images = torch.zeros(60, 1, 8, 8, dtype=torch.uint8)
    bank = ImageBank(images, [0, 10, 30], [10, 20, 30], ['a', 'b', 'c'])
    _, drawn = EpisodeSampler(bank, 3, 4, 6).draw(np.arange(500))
    for low, high in ((0, 10), (10, 30), (30, 60)):
        of_class = drawn[(drawn >= low) & (drawn < high)]
        assert len(of_class) == 5000
        assert len(set(of_class.tolist())) == high - low


def test_values_and_normalisation(noise_bank):
    s = sampler(noise_bank)
    ep, (_, images) = s[3], s.draw([3])
    assert torch.equal(ep.xs[0], noise_bank.images[images[0, 0, 0]].float() / 255)
    assert ep.xs.min() >= 0
    assert ep.xs.max() <= 1
    assert ep.ys.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert ep.yq.tolist() == [c for c in range(5) for _ in range(3)]
    normalised = s(mean=0.5, std=0.25)[3]
    assert torch.allclose(normalised.xq, (ep.xq - 0.5) / 0.25, atol=1e-5)


# ---- names
def test_an_episode_carries_the_names_of_its_classes(noise_bank):
    s = sampler(noise_bank.rotated())
    classes, _ = s.draw(np.arange(4))
    names = [tuple(s.bank.classes[c] for c in row) for row in classes]
    assert s[0:4].names == tuple(names)
    assert any('@' in name for own in names for name in own)
    assert s[2].names == s[0:4][2].names == names[2]
    assert s[0:4][1:3].names == tuple(names[1:3])
    assert s.meta_batch(0, 4)[[3, 0]].names == (names[3], names[0])
    assert s[0:4][torch.tensor([False, True, False, True])].names == (names[1], names[3])
    assert len(WaysSampler(s, 2, 9).meta_batch(1, 2).names) == 2
    xs, ys, xq, yq = s[0:4]  # four tensors, as ever
    assert Episodes(xs, ys, xq, yq)[0].names == ()


def test_the_names_stand_at_rows_or_columns(noise_bank, monkeypatch):
    import matplotlib.pyplot as plt

    monkeypatch.setattr(plt, 'show', lambda: None)
    long = 'a name of more than eighteen letters'
    bank = noise_bank.select(range(20))
    bank.classes[:] = [f'{long} {i:02d}' for i in range(20)]
    for n_way, turned in ((3, 0), (12, 90)):
        ep = sampler(bank, n_way=n_way)[0]
        show_episode(ep)
        texts = [t for ax in plt.gcf().axes for t in ax.texts]
        assert [t.get_text() for t in texts] == ['a name o…etters ' + n[-2:] for n in ep.names]
        assert {t.get_rotation() for t in texts} == {turned}
        show_episode(Episodes(*ep))
        assert not [t for ax in plt.gcf().axes for t in ax.texts]
    plt.close('all')


# ---- tensors of one's own
def own(**changes):
    "Two tasks of three classes, as somebody's arrays, and what differs from them."
    gen = np.random.default_rng(0)
    labels = np.array([[0, 1, 2, 0, 1, 2], [2, 1, 0, 0, 1, 2]])
    arrays = dict(
        xs=gen.random((2, 6, 3, 20, 20)),
        ys=labels,
        xq=gen.random((2, 3, 3, 20, 20)),
        yq=labels[:, :3],
    )
    return arrays | changes


def test_arrays_become_episodes():
    ep = Episodes.of(**own(), names=['cat', 'dog', 'lynx'])
    assert ep.xs.dtype == ep.xq.dtype == torch.float32
    assert ep.ys.dtype == ep.yq.dtype == torch.int64
    assert np.allclose(ep.xs, own()['xs'])
    assert ep.names == (('cat', 'dog', 'lynx'),) * 2
    assert Episodes.of(**own(ys=own()['ys'].astype(np.uint8))).ys.dtype == torch.int64
    same = Episodes.of(*ep, names=[['a', 'b', 'c'], ['d', 'e', 'f']])
    assert same.xs is ep.xs
    assert same[1].names == ('d', 'e', 'f')
    learner = MAML(conv4(3, 20, filters=4), 3)
    assert learner.predict(learner.adapt(ep.xs, ep.ys), ep.xq).shape == (2, 3, 3)


def holed(a):
    "The same numbers, one of which is none."
    b = a.copy()
    b[0, 0, 0, 0, 0] = np.nan
    return b


SLIPS = [
    (lambda a: dict(xs=(255 * a['xs']).astype(np.uint8)), r'xs has the type .*uint8.*xs / 255'),
    (lambda a: dict(xq=255 * a['xq']), r'xq has values from 0.\d+ to 25\d.*like pixels.*xq / 255'),
    (lambda a: dict(xs=16 * a['xs']), r'xs has values from .* to 1[56].*like pixels'),
    (lambda a: dict(xs=100 * (a['xs'] - 0.5)), 'xs has values from -.*standardised'),
    (lambda a: dict(xs=holed(a['xs'])), 'xs has 1 of 14400 values that are not finite'),
    (lambda a: {k: v[0] for k, v in a.items()}, r'xs has shape \(6, 3, 20, 20\).*xs\[None\]'),
    (lambda a: dict(xs=a['xs'][:, :, 0]), r'xs\[..., None, :, :\]'),
    (lambda a: dict(xq=a['xq'][0]), r'xq has shape \(3, 3, 20, 20\): expected \(tasks'),
    (lambda a: dict(xq=a['xq'][..., 1:]), r'xq has image=\(3, 20, 19\), but xs has image=\(3, 20'),
    (lambda a: dict(xq=a['xq'][:1], yq=a['yq'][:1]), 'xq has tasks=1, but xs has tasks=2'),
    (lambda a: dict(xs=torch.rand(2, 6, 3, 20, 20).double()), 'xq has dtype=torch.float32, but xs'),
    (
        lambda a: {k: np.moveaxis(a[k], 2, 4) for k in ('xs', 'xq')},
        r'xs has images of \(20, 20, 3\): channels come before',
    ),
    (lambda a: dict(xs=a['xs'][:, :0], ys=a['ys'][:, :0]), 'xs has shape .*it contains no image'),
    (lambda a: dict(ys=a['ys'][:, :5]), r'ys has shape \(2, 5\).*expected \(2, 6\); each image'),
    (lambda a: dict(ys=a['ys'][0]), r'ys has shape \(6,\).*a single task is ys\[None\]'),
    (lambda a: dict(ys=np.eye(3)[a['ys']]), r'one-hot rows are ys.argmax\(-1\)'),
    (lambda a: dict(ys=a['ys'] / 1), r'ys has the type torch.float.*ys.long\(\)'),
    (lambda a: dict(ys=a['ys'].tolist()), 'ys is of the type list: give a tensor'),
    (lambda a: dict(xs=None), 'xs is of the type NoneType'),
    (lambda a: dict(ys=a['ys'] + 1), 'ys of task 0 has the labels 1, 2, 3, but none is 0'),
    (lambda a: dict(ys=a['ys'] - 1), 'ys of task 0 has the labels -1, 0, 1, and labels run from 0'),
    (lambda a: dict(ys=np.minimum(a['ys'], [[2], [1]])), 'ys of task 1 has .* 0, 1, but none is 2'),
    (lambda a: dict(yq=a['yq'] + 1), 'yq of task 0 has the labels 3, which are not among'),
    (lambda a: dict(names=('cat', 'dog')), '2 names of classes for task 0, which has 3'),
    (lambda a: dict(names=[('a', 'b', 'c')]), 'names of 1 tasks, but xs has 2'),
]


@pytest.mark.parametrize('change,words', SLIPS)
def test_what_does_not_fit_is_refused_with_the_way_out(change, words):
    arrays = own()
    with pytest.raises(ValueError, match=words):
        Episodes.of(**arrays | change(arrays))


def test_what_is_made_by_hand_fits_together_too(noise_bank):
    xs, ys, xq, yq = sampler(noise_bank)[0:2]
    Episodes(xs[:, :0], ys[:, :0], xq, yq)  # mini-batches have no support
    wrong = [(xs.numpy(), ys, xq, yq), (xs, ys[:, 1:], xq, yq), (xs[0], ys[0], xq, yq)]
    for tensors in [*wrong, ((255 * xs).byte(), ys, xq, yq), (xs, ys.int(), xq, yq)]:
        with pytest.raises(ValueError, match=r'^x|^y'):
            Episodes(*tensors)
    with pytest.raises(ValueError, match='names of 1 tasks, but xs has 2'):
        Episodes(xs, ys, xq, yq, (('a', 'b', 'c', 'd', 'e'),))


def test_no_value_is_looked_at_where_episodes_are_made(noise_bank):
    "Tensors of the device `meta` have none: whoever asks for one is told so."
    ep = Episodes(*(t.to('meta') for t in sampler(noise_bank)[0:4]))
    assert ep[1:3].xs.shape[0] == 2
    learner = to_dtype(MAML(conv4(1, 16, filters=4), 5), torch.float32, 'meta')
    learner.ways = 5  # as in a recorded graph
    assert learner.meta_loss(ep).loss.shape == (4,)
    with pytest.raises((RuntimeError, NotImplementedError)):
        Episodes.of(*ep)


def test_a_learner_looks_at_what_it_is_given_by_hand(noise_bank):
    learner = MAML(conv4(1, 16, filters=4), 5)
    xs, ys, xq, yq = sampler(noise_bank)[0:2]
    fast = learner.adapt(xs, ys)
    tensors = [(xs[0], ys[0]), (xs.numpy(), ys), ((255 * xs).byte(), ys), (xs.double(), ys)]
    for x, y in [*tensors, (xs, ys[0]), (xs, ys.float()), (xs, ys - 1), (xs[:, :0], ys[:, :0])]:
        with pytest.raises(ValueError, match=r'^xs |^ys '):
            learner.adapt(x, y)
    for x in (xq[0], xq.numpy(), xq.byte(), xq.double(), xq[:, :0]):
        with pytest.raises(ValueError, match='^xq '):
            learner.predict(fast, x)
    with pytest.raises(ValueError, match=r'xs is torch.float64 on cpu, but the parameters are'):
        learner.meta_loss(Episodes(xs.double(), ys, xq.double(), yq))


def labelled(task):
    "Two tasks of one image a label: of these labels, and of 0, 1, 2."
    ys = torch.tensor([task, [0, 1, 2]])
    gen = torch.Generator().manual_seed(0)
    return torch.rand(2, 3, 1, 16, 16, generator=gen), ys


OTHER_LABELS = ([3, 10, 17], [-1, 0, 1], [0, 1, 1], [0, 1, 3], [0, 2**40, 1])


@pytest.mark.parametrize('method', sorted(LEARNERS))
def test_every_method_refuses_other_labels_than_those_of_its_classes(method, noise_bank):
    tasks = EpisodeSampler(noise_bank, 3, 1, 1)
    options = dict(n_max=3, hyper_width=8, tune_steps=1)
    own = {k: v for k, v in options.items() if k in LEARNERS.options(method)}
    learner = make_learner(method, tasks, filters=4, **own)
    x, right = labelled([2, 0, 1])
    learner.adapt(x, right)
    pretrained = hasattr(learner.head, 'n_classes')
    for labels in OTHER_LABELS:
        _, wrong = labelled(labels)
        with pytest.raises(ValueError, match='^ys of task 0 has the labels .*from 0, alike in ys'):
            learner.adapt(x, wrong)
        if not pretrained:
            with pytest.raises(ValueError, match='^ys of task 0 has the labels'):
                learner.meta_loss(Episodes(x, wrong, x, right))
    if pretrained:  # on mini-batches of all classes, without support
        with pytest.raises(ValueError, match='labels from 38 to 40 in yq.*n_classes=40'):
            learner.meta_loss(Episodes(x[:, :0], right[:, :0], x, right + 38))
        return
    assert learner.meta_loss(Episodes(x, right, x, right)).loss.isfinite().all()
    _, wrong = labelled([0, 1, 3])
    with pytest.raises(ValueError, match='^yq of task 0 has the labels 3, which are not among'):
        learner.meta_loss(Episodes(x, right, x, wrong))


def test_fewer_classes_than_rows_are_refused(noise_bank):
    learner = MAML(conv4(1, 16, filters=4), 5)
    x, ys = labelled([0, 1, 2])
    with pytest.raises(ValueError, match='labels 0 … 2 in ys, but the learner has n_way=5'):
        learner.adapt(x, ys)


def test_labels_are_looked_at_where_a_graph_is_recorded_and_where_accuracy_is_measured(noise_bank):
    learner = hidra(conv4(1, 16, filters=4), 3)
    x, right = labelled([2, 0, 1])
    _, wrong = labelled([3, 10, 17])
    recorder = Recorder(learner, plan_for('cpu', 'graph'))
    with pytest.raises(ValueError, match='3, 10, 17, but none is 0'):
        recorder(Episodes(x, wrong, x, right), 0.0, 3)
    with pytest.raises(ValueError, match='n_way=2, but the tasks have 3 classes'):
        recorder(Episodes(x, right, x, right), 0.0, 2)
    assert not recorder.graphs
    tasks = EpisodeSampler(noise_bank, 3, 1, 1)
    other = replace(tasks[0:2], yq=tasks[0:2].yq + 1)

    class Shifted(EpisodeSampler):
        "Tasks whose queries are numbered from 1."

        def __getitem__(self, i):
            return other

    with pytest.raises(ValueError, match='^yq of task 0 has the labels 3, which are not among'):
        evaluate(learner, Shifted(noise_bank, 3, 1, 1), 2)


def test_images_and_labels_are_checked_by_name():
    x = torch.rand(1, 4, 1, 8, 8)
    check_images('photos', x)
    check_labels('kinds', torch.zeros(1, 4).long(), 'photos', x)
    with pytest.raises(ValueError, match='photos has shape'):
        check_images('photos', x[0, 0])
    with pytest.raises(ValueError, match=r'kinds has shape \(4,\), but photos has'):
        check_labels('kinds', torch.zeros(4).long(), 'photos', x)

# ---- bad input
BAD_SIZES = [
    (dict(n_way=41), 'n_way=41, but noise has 40 classes'),
    (dict(k_shot=20, n_query=6), "= 26 images, but class 'class00' of noise has 25"),
    (dict(n_way=1), 'n_way=1'),
    (dict(n_way=-5), 'n_way=-5'),
    (dict(k_shot=0), 'k_shot=0'),
    (dict(n_query=0), 'n_query=0'),
    (dict(seed=-1), 'seed=-1'),
    (dict(n_way=5.0), 'n_way=5.0'),
]


@pytest.mark.parametrize('sizes,words', BAD_SIZES)
def test_bad_sizes_name_value_and_bound(noise_bank, sizes, words):
    with pytest.raises(ValueError, match=words):
        sampler(noise_bank, **sizes)


def test_more_ways_than_families(noise_bank):
    with pytest.raises(ValueError, match='n_way=41, but noise has 40 families'):
        sampler(noise_bank.rotated(), n_way=41)


def test_bad_indices(noise_bank):
    with pytest.raises(IndexError, match='run from 0'):
        sampler(noise_bank)[-1]
    with pytest.raises(IndexError, match='has no end'):
        sampler(noise_bank)[3:]


def test_real_omniglot_has_no_rotated_twins(real_data):
    bank = omniglot('train')
    classes, _ = EpisodeSampler(bank, 20, 1, 1).draw(np.arange(500))
    for row in classes.tolist():
        assert len({bank.classes[c].split('@')[0] for c in row}) == 20


def test_an_episode_is_shown_with_as_many_queries_as_asked(monkeypatch):
    import matplotlib.pyplot as plt

    monkeypatch.setattr(plt, 'show', lambda: None)
    ep = EpisodeSampler(glyphs('test'), 3, 2, 4, seed=0)[0]
    for queries, images in ((None, 6), (1, 3), (9, 6)):
        show_episode(ep, queries=queries)
        assert len(plt.gcf().axes) == 3 * images
        plt.close('all')
