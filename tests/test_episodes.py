"""Episodes are a pure function of (bank, sizes, seed, index)."""

import subprocess, sys
import numpy as np, pytest, torch
from fewshotmeta.all import *


def sampler(bank, **kw):
    return EpisodeSampler(bank, **(dict(n_way=5, k_shot=2, n_query=3, seed=7) | kw))


def test_same_alone_and_in_any_batch(noise_bank):
    s = sampler(noise_bank)
    for size in (1, 3, 16):
        batches = [s[i : min(i + size, 20)] for i in range(0, 20, size)]
        for part, whole in zip(zip(*batches), s[0:20]):
            assert torch.equal(torch.cat(part), whole)
    assert all(torch.equal(a, b) for a, b in zip(s[[17, 4]][0], s[17]))


def test_digest_in_other_processes_and_sizes(noise_bank):
    "T14"
    code = (
        'import torch\nfrom fewshotmeta.all import *\nfrom fewshotmeta.all import *\n'
        'images = torch.randint(0, 256, (1000, 1, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)\n'
        "b = ImageBank(images, range(0, 1000, 25), [25]*40, [f'class{i:02d}' for i in range(40)], name='noise')\n"
        'print(EpisodeSampler(b, 5, 2, 3, seed=7).digest(600))'
    )
    out = [
        subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout.strip()
        for _ in range(2)
    ]
    assert out == [sampler(noise_bank).digest(600)] * 2
    assert (
        len(
            {
                sampler(noise_bank, **kw).digest(50)
                for kw in ({}, dict(seed=8), dict(n_way=4), dict(k_shot=1), dict(n_query=4))
            }
        )
        == 5
    )


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


def test_families_do_not_meet(noise_bank):
    turned = noise_bank.rotated()
    classes, _ = sampler(turned, n_way=20).draw(np.arange(300))
    families = turned.family[classes]
    assert all(len(set(f)) == 20 for f in families.tolist())
    assert (
        np.bincount(classes.ravel() // 40).min() > 1300
    )  # all four rotations take part (1500 each expected)


def test_draws_are_uniform(noise_bank):
    "Chi-square over classes and over the images of a class, at 5 sigma."
    classes, images = sampler(noise_bank).draw(np.arange(20_000))
    for counts in (
        np.bincount(classes.ravel()),
        np.bincount(images[..., :2].ravel()),
        np.bincount(images[..., 2:].ravel()),
    ):
        expected, dof = counts.mean(), len(counts) - 1
        assert abs(((counts - expected) ** 2 / expected).sum() - dof) < 5 * np.sqrt(2 * dof)
    first = np.bincount(classes[:, 0])  # the order is random, too
    assert abs(((first - 500) ** 2 / 500).sum() - 39) < 5 * np.sqrt(78)


def test_unequal_classes():
    images = torch.zeros(60, 1, 8, 8, dtype=torch.uint8)
    bank = ImageBank(images, [0, 10, 30], [10, 20, 30], ['a', 'b', 'c'])
    _, i = EpisodeSampler(bank, 3, 4, 6).draw(np.arange(500))
    for c, (lo, hi) in enumerate([(0, 10), (10, 30), (30, 60)]):
        drawn = i[(i >= lo) & (i < hi)]
        assert len(drawn) == 5000 and len(set(drawn.tolist())) == hi - lo


def test_values_and_normalisation(noise_bank):
    s = sampler(noise_bank)
    ep, (_, images) = s[3], s.draw([3])
    assert (
        torch.equal(ep.xs[0], noise_bank.images[images[0, 0, 0]].float() / 255)
        and ep.xs.min() >= 0
        and ep.xs.max() <= 1
    )
    assert ep.ys.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4] and ep.yq.tolist() == [
        c for c in range(5) for _ in range(3)
    ]
    n = s(mean=0.5, std=0.25)[3]
    assert torch.allclose(n.xq, (ep.xq - 0.5) / 0.25, atol=1e-5)


@pytest.mark.parametrize(
    'kw,words',
    [
        (dict(n_way=41), 'n_way=41, but noise has 40 classes'),
        (dict(k_shot=20, n_query=6), "= 26 images, but class 'class00' of noise has 25"),
        (dict(n_way=1), 'n_way=1'),
        (dict(n_way=-5), 'n_way=-5'),
        (dict(k_shot=0), 'k_shot=0'),
        (dict(n_query=0), 'n_query=0'),
        (dict(seed=-1), 'seed=-1'),
        (dict(n_way=5.0), 'n_way=5.0'),
    ],
)
def test_bad_sizes_name_value_and_bound(noise_bank, kw, words):
    with pytest.raises(ValueError, match=words):
        sampler(noise_bank, **kw)


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
    assert all(len({bank.classes[c].split('@')[0] for c in row}) == 20 for row in classes.tolist())
