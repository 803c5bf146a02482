"""Reptile: the equation, on every plan and with every head."""
import pytest, torch
from fewshotmeta.backbones import *
from fewshotmeta.episodes import *
from fewshotmeta.hidra import *
from fewshotmeta.layers import *
from fewshotmeta.maml import *
from fewshotmeta.reptile import *
from fewshotmeta.training import *
from test_maml import noise

def tiny(make=Reptile, n=3, **kw): return to_dtype(make(conv4(size=16, filters=4), n, inner_lr=.3, inner_steps=3, **kw), torch.float64)

def everything_of(ep): return torch.cat([ep.xs, ep.xq], 1), torch.cat([ep.ys, ep.yq], 1)

@pytest.mark.parametrize('plan', list(PLANS))
def test_the_gradient_is_the_way_back(plan):
    m, ep = tiny(), noise(tasks=3)
    fast, g = m.adapt(*everything_of(ep)), meta_gradient(m, ep, plan=plan_for('cpu', plan))
    for k, v in zip(m.theta, g.grads): assert torch.allclose(v, m.theta[k] - fast.params[k].mean(0) if k in m.adapted else torch.zeros_like(v), atol=1e-10), k
    assert g.loss == pytest.approx(task_losses(m.predict(fast, ep.xq), ep.yq).mean().item())

def test_with_the_master_neuron():
    m, ep = tiny(lambda b, n, **kw: hidra(b, 4, 'tied_gradient', Reptile, **kw)), noise()
    fast, g = m.adapt(*everything_of(ep)), dict(zip(m.theta, meta_gradient(m, ep).grads))
    assert torch.allclose(g['head.weight'][0], 3*(m.theta['head.weight'][0] - fast.params['head.weight'].mean((0, 1))), atol=1e-10)
    assert m.predict(m.adapt(noise(n_way=5).xs, noise(n_way=5).ys), ep.xq).shape[-1] == 5

def test_outer_sgd_resumes(noise_bank, tmp_path):
    go = lambda n, folder: fit(Reptile(conv4(size=16, filters=4), 5, .1, 2), EpisodeSampler(noise_bank, 5, 1, 3), n, meta_batch=2, meta_lr=.5, optimizer='sgd', checkpoint=folder, progress=False).learner
    a, b = go(4, tmp_path/'a'), go(4, tmp_path/'a')
    assert all(torch.equal(a.theta[k], b.theta[k]) for k in a.theta)
    with pytest.raises(BadCheckpoint, match='optimizer'): fit(Reptile(conv4(size=16, filters=4), 5, .1, 2), EpisodeSampler(noise_bank, 5, 1, 3), 4, meta_batch=2, meta_lr=.5, checkpoint=tmp_path/'a', progress=False)
