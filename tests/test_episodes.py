"""Episodes are a pure function of (bank, sizes, seed, index)."""

import subprocess
import sys

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
