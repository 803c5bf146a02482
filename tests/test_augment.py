"""Augmentation: torchvision's pixels, a function of (seed, index) alone, per sample."""

import numpy as np, pytest, torch
import torchvision.transforms.v2.functional as TF
from torchvision.transforms import InterpolationMode
from fewshotmeta.all import *


def images(n=20, c=3, size=32, seed=0):
    return torch.rand(n, c, size, size, generator=torch.Generator().manual_seed(seed))


def chances(n=20, k=8, seed=1):
    return torch.rand(n, k, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize('out', [16, 32, 40])
def test_crop_equals_torchvision(out):
    x, boxes = images(), crop_boxes(chances(), 32)
    theirs = torch.cat(
        [
            TF.resized_crop(
                v[None], *b.int().tolist(), [out, out], InterpolationMode.BILINEAR, antialias=False
            )
            for v, b in zip(x, boxes)
        ]
    )
    assert torch.allclose(crop(x, boxes, out), theirs, atol=1e-4)


def test_boxes_fit_and_vary():
    b = crop_boxes(chances(20_000), 32)
    assert (
        (b[:, :2] >= 0).all()
        and (b[:, 0] + b[:, 2] <= 32).all()
        and (b[:, 1] + b[:, 3] <= 32).all()
        and (b[:, 2:] >= 1).all()
    )
    area, ratio = b[:, 2] * b[:, 3] / 32**2, b[:, 3] / b[:, 2]
    assert (
        area.min() < 0.1
        and area.max() > 0.95
        and abs(area.mean() - 0.53) < 0.02
        and (ratio < 0.85).any()
        and (ratio > 1.2).any()
    )
    last = crop_boxes(torch.tensor([[0.0, 0.5, 1 - 2**-24, 1 - 2**-24]]), 32)[0]
    assert last[2] < 12 and (last[:2] + last[2:]).tolist() == [32, 32]


def test_jitter_equals_torchvision():
    x, f = images(), 1 + 0.4 * (2 * chances(k=3) - 1)
    theirs = torch.stack(
        [
            TF.adjust_saturation(TF.adjust_contrast(TF.adjust_brightness(v, a), b), c)
            for v, (a, b, c) in zip(x, f.tolist())
        ]
    )
    assert torch.allclose(
        jitter(x, f), theirs, atol=2e-3
    )  # torchvision's luma weights have four digits


def test_each_image_by_its_own_chances():
    a, x, u = CloserLook(), images(), chances()
    whole = a(x, u)
    assert torch.equal(whole[7:9], a(x[7:9], u[7:9])) and not torch.equal(
        a(x[:1].expand(20, -1, -1, -1), u)[0], a(x[:1].expand(20, -1, -1, -1), u)[1]
    )
    assert whole.min() >= 0 and whole.max() <= 1
    still = CloserLook(scale=(1.0, 1.0), ratio=(1.0, 1.0), strength=0.0, flip=0.0)
    assert torch.allclose(still(x, u), x, atol=1e-5) and torch.allclose(
        CloserLook(scale=(1.0, 1.0), ratio=(1.0, 1.0), strength=0.0, flip=1.0)(x, u),
        x.flip(-1),
        atol=1e-5,
    )
    assert CloserLook(size=24)(images(c=1), u).shape == (20, 1, 24, 24)


def test_a_function_of_seed_and_index(noise_bank):
    s = EpisodeSampler(noise_bank, 5, 2, 3, augment=CloserLook(), mean=0.5, std=0.5)
    assert all(torch.equal(a, b) for a, b in zip(s[7], s[0:9][7])) and all(
        torch.equal(a, b) for a, b in zip(s[[3, 7]][1], s[7])
    )
    plain = s(augment=None)
    assert (
        s.digest(9) == plain.digest(9)
        and not torch.equal(s[7].xs, plain[7].xs)
        and not torch.equal(s[7].xs, s(seed=1)[7].xs)
    )
    assert s.describe(9) != plain.describe(9) and 'CloserLook' in s.describe(9)
    x = torch.cat(
        [
            EpisodeSampler(
                ImageBank(
                    torch.full((50, 1, 16, 16), 128, dtype=torch.uint8),
                    range(0, 50, 10),
                    [10] * 5,
                    list('abcde'),
                ),
                5,
                2,
                3,
                augment=CloserLook(),
            )[i].xs
            for i in range(20)
        ]
    )
    assert len(x.mean((1, 2, 3)).unique()) > 150  # every image has its own brightness


def test_chances_are_independent_of_the_draws(noise_bank):
    s = EpisodeSampler(noise_bank, 5, 1, 1, augment=CloserLook())
    index = np.arange(4000)
    chance, (classes, images) = s._chances(index).reshape(4000, -1), s.draw(index)
    assert (
        np.abs(
            np.corrcoef(np.concatenate([chance, classes, images.reshape(4000, -1)], 1).T)[:80, 80:]
        ).max()
        < 0.08
        and abs(chance.mean() - 0.5) < 0.01
        and abs(chance.std() - 12**-0.5) < 0.01
    )


def test_training_resumes_with_augmentation(noise_bank, tmp_path, stopped):
    train = EpisodeSampler(noise_bank, 5, 1, 3, augment=CloserLook(scale=(0.5, 1.0)))

    def go(folder):
        return fit(
            MAML(conv4(size=16, filters=4), 5),
            train,
            8,
            meta_batch=2,
            checkpoint=folder,
            save_every=2,
            progress=False,
        ).learner

    whole = go(tmp_path / 'a')
    stopped(5, lambda: go(tmp_path / 'b'))
    again = go(tmp_path / 'b')
    assert all(torch.equal(whole.theta[k], again.theta[k]) for k in whole.theta)
    with pytest.raises(BadCheckpoint, match='augment'):
        fit(
            MAML(conv4(size=16, filters=4), 5),
            train(augment=None),
            8,
            meta_batch=2,
            checkpoint=tmp_path / 'a',
            progress=False,
        )


def test_mini_imagenet(real_data):
    s = EpisodeSampler(mini_imagenet('val', root=real_data), 5, 1, 2, augment=CloserLook())
    ep = s[0:2]
    assert (
        ep.xs.shape == (2, 5, 3, 84, 84)
        and 0 <= ep.xs.min()
        and ep.xs.max() <= 1
        and ep.xs.std() > 0.05
    )
