"""Reptile: the equation, on every plan and with every head."""

import pytest, torch
from fewshotmeta.all import *
from test_maml import noise


def tiny(make=Reptile, n=3, **kw):
    return to_dtype(
        make(conv4(size=16, filters=8), n, inner_lr=0.3, inner_steps=3, **kw), torch.float64
    )


def everything_of(ep):
    return torch.cat([ep.xs, ep.xq], 1), torch.cat([ep.ys, ep.yq], 1)


@pytest.mark.parametrize('plan', list(PLANS))
def test_the_gradient_is_the_way_back(plan):
    m, ep = tiny(), noise(tasks=3)
    fast, g = m.adapt(*everything_of(ep)), meta_gradient(m, ep, plan=plan_for('cpu', plan))
    for k, v in zip(m.theta, g.grads):
        assert torch.allclose(
            v,
            m.theta[k] - fast.params[k].mean(0) if k in m.adapted else torch.zeros_like(v),
            atol=1e-10,
        ), k
    assert g.loss.item() == pytest.approx(task_losses(m.predict(fast, ep.xq), ep.yq).mean().item())


def test_with_the_master_neuron():
    m, ep = tiny(lambda b, n, **kw: hidra(b, 4, 'tied_gradient', Reptile, **kw)), noise()
    fast, g = m.adapt(*everything_of(ep)), dict(zip(m.theta, meta_gradient(m, ep).grads))
    assert (
        g['head.weight'].abs().max() < 1e-12
        and (fast.params['head.weight'][0, 0] - m.theta['head.weight'][0]).abs().max() > 1e-4
    )  # the rows part symmetrically: the master stands still
    assert (
        torch.allclose(
            g['conv2.weight'],
            m.theta['conv2.weight'] - fast.params['conv2.weight'].mean(0),
            atol=1e-10,
        )
        and g['conv2.weight'].abs().max() > 1e-6
    )
    assert m.predict(m.adapt(noise(n_way=5).xs, noise(n_way=5).ys), ep.xq).shape[-1] == 5


def test_stored_statistics_are_remembered(noise_bank):
    m = Reptile(conv4(size=16, filters=8, norm='per_step', norm_steps=2), 5, 0.1, 2)
    fit(
        m,
        EpisodeSampler(noise_bank, 5, 1, 3),
        3,
        meta_batch=2,
        meta_lr=0.5,
        optimizer='sgd',
        progress=False,
    )
    assert (m.buffers['norm1.mean'] != 0).all()


def test_outer_sgd_resumes(noise_bank, tmp_path, resumed):
    def go(folder):
        return fit(
            Reptile(conv4(size=16, filters=8), 5, 0.1, 2),
            EpisodeSampler(noise_bank, 5, 1, 3),
            4,
            meta_batch=2,
            meta_lr=0.5,
            optimizer='sgd',
            checkpoint=folder,
            save_every=1,
            progress=False,
        ).learner

    resumed(go, 2)
    with pytest.raises(BadCheckpoint, match='optimizer'):
        fit(
            Reptile(conv4(size=16, filters=8), 5, 0.1, 2),
            EpisodeSampler(noise_bank, 5, 1, 3),
            4,
            meta_batch=2,
            meta_lr=0.5,
            checkpoint=tmp_path / 'a',
            progress=False,
        )
