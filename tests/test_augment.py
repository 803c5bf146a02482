"""Augmentation: torchvision's pixels, a function of (seed, index) alone, per sample."""

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as TF
from torchvision.transforms import InterpolationMode

from fewshotmeta.all import *


def images(n=20, c=3, size=32, seed=0):
    return torch.rand(n, c, size, size, generator=torch.Generator().manual_seed(seed))


def chances(n=20, k=8, seed=1):
    return torch.rand(n, k, generator=torch.Generator().manual_seed(seed))


def cut_by_torchvision(x, box, size):
    "Cut one box out of one image."
    bilinear = InterpolationMode.BILINEAR
    box = box.int().tolist()
    return TF.resized_crop(x[None], *box, [size, size], bilinear, antialias=False)


@pytest.mark.parametrize('size', [16, 32, 40])
def test_crop_equals_torchvision(size):
    x, boxes = images(), crop_boxes(chances(), 32)
    theirs = torch.cat([cut_by_torchvision(v, box, size) for v, box in zip(x, boxes)])
    assert torch.allclose(crop(x, boxes, size), theirs, atol=1e-4)


def test_boxes_fit():
    top, left, height, width = crop_boxes(chances(20_000), 32).unbind(1)
    assert (top >= 0).all() and (left >= 0).all()
    assert (height >= 1).all() and (width >= 1).all()
    assert (top + height <= 32).all()
    assert (left + width <= 32).all()
    last = crop_boxes(torch.tensor([[0.0, 0.5, 1 - 2**-24, 1 - 2**-24]]), 32)[0]
    assert last[2] < 12
    assert (last[:2] + last[2:]).tolist() == [32, 32]


def test_boxes_vary():
    _, _, height, width = crop_boxes(chances(20_000), 32).unbind(1)
    area, ratio = height * width / 32**2, width / height
    assert area.min() < 0.1
    assert area.max() > 0.95
    assert abs(area.mean() - 0.53) < 0.02
    assert (ratio < 0.85).any()
    assert (ratio > 1.2).any()


def jitter_by_torchvision(x, factors):
    "Change one image by three of torchvision's functions."
    bright, contrast, colour = factors.tolist()
    return TF.adjust_saturation(
        TF.adjust_contrast(TF.adjust_brightness(x, bright), contrast), colour
    )


def test_jitter_equals_torchvision():
    x, factors = images(), 1 + 0.4 * (2 * chances(k=3) - 1)
    theirs = torch.stack([jitter_by_torchvision(v, f) for v, f in zip(x, factors)])
    # torchvision's luma weights have four digits
    assert torch.allclose(jitter(x, factors), theirs, atol=2e-3)


def test_each_image_by_its_own_chances():
    augment, x, u = CloserLook(), images(), chances()
    whole = augment(x, u)
    assert torch.equal(whole[7:9], augment(x[7:9], u[7:9]))
    twenty_times = augment(x[:1].expand(20, -1, -1, -1), u)
    assert not torch.equal(twenty_times[0], twenty_times[1])
    assert whole.min() >= 0
    assert whole.max() <= 1
    assert CloserLook(size=24)(images(c=1), u).shape == (20, 1, 24, 24)


def test_nothing_but_a_flip():
    x, u = images(), chances()
    still = dict(scale=(1.0, 1.0), ratio=(1.0, 1.0), strength=0.0)
    assert torch.allclose(CloserLook(flip=0.0, **still)(x, u), x, atol=1e-5)
    assert torch.allclose(CloserLook(flip=1.0, **still)(x, u), x.flip(-1), atol=1e-5)


def test_a_function_of_seed_and_index(noise_bank):
    s = EpisodeSampler(noise_bank, 5, 2, 3, augment=CloserLook(), mean=0.5, std=0.5)
    for alone, in_a_batch, in_a_list in zip(s[7], s[0:9][7], s[[3, 7]][1]):
        assert torch.equal(alone, in_a_batch)
        assert torch.equal(alone, in_a_list)
    assert not torch.equal(s[7].xs, s(seed=1)[7].xs)


def test_tasks_are_those_without_augmentation(noise_bank):
    s = EpisodeSampler(noise_bank, 5, 2, 3, augment=CloserLook(), mean=0.5, std=0.5)
    plain = s(augment=None)
    assert s.digest(9) == plain.digest(9)
    assert not torch.equal(s[7].xs, plain[7].xs)
    assert s.describe(9) != plain.describe(9)
    assert 'CloserLook' in s.describe(9)


def test_every_image_has_its_own_brightness():
    grey = torch.full((50, 1, 16, 16), 128, dtype=torch.uint8)
    bank = ImageBank(grey, range(0, 50, 10), [10] * 5, list('abcde'))
    s = EpisodeSampler(bank, 5, 2, 3, augment=CloserLook())
    x = torch.cat([s[i].xs for i in range(20)])
    assert len(x.mean((1, 2, 3)).unique()) > 150


def test_chances_are_independent_of_the_draws(noise_bank):
    s = EpisodeSampler(noise_bank, 5, 1, 1, augment=CloserLook())
    index = np.arange(4000)
    chance, (classes, images) = s._chances(index).reshape(4000, -1), s.draw(index)
    columns = np.concatenate([chance, classes, images.reshape(4000, -1)], 1)
    correlation = np.corrcoef(columns.T)[:80, 80:]
    assert np.abs(correlation).max() < 0.08
    assert abs(chance.mean() - 0.5) < 0.01
    assert abs(chance.std() - 12**-0.5) < 0.01


def trained(sampler, folder):
    "Eight iterations of MAML with a checkpoint after every second."
    learner = MAML(conv4(size=16, filters=4), 5)
    how = dict(meta_batch=2, checkpoint=folder, save_every=2, progress=False)
    return fit(learner, sampler, 8, **how).learner


def test_training_resumes_with_augmentation(noise_bank, tmp_path, stopped):
    sampler = EpisodeSampler(noise_bank, 5, 1, 3, augment=CloserLook(scale=(0.5, 1.0)))
    whole = trained(sampler, tmp_path / 'a')
    stopped(5, lambda: trained(sampler, tmp_path / 'b'))
    again = trained(sampler, tmp_path / 'b')
    for name, value in whole.theta.items():
        assert torch.equal(value, again.theta[name])
    with pytest.raises(BadCheckpoint, match='augment'):
        trained(sampler(augment=None), tmp_path / 'a')
