"""An evaluation is a mean over fixed tasks, and says what kind."""

import math, subprocess, sys
import pytest, torch
from fewshotmeta.all import *
from fewshotmeta.engine.kernels import _wide


@pytest.fixture
def test(noise_bank):
    return EpisodeSampler(noise_bank, 5, 1, 4)


def small(**kw):
    return MAML(conv4(size=16, filters=4, **kw), 5, inner_lr=0.1, inner_steps=2)


def test_mean_and_interval_by_hand(test):
    m, e = small(), None
    e = evaluate(m, test, 30)
    a = torch.tensor(
        [
            (m.predict(m.adapt(ep.xs, ep.ys), ep.xq).argmax(-1) == ep.yq).double().mean()
            for ep in (test[i : i + 1] for i in range(30))
        ]
    )
    assert e.mean == pytest.approx(a.mean().item(), abs=1e-6) and e.ci95 == pytest.approx(
        1.96 * a.std().item() / 30**0.5, abs=1e-6
    )
    assert (e.n, e.task, e.digest, len(e.by_step)) == (
        30,
        '5-way 1-shot 4-query',
        test.digest(30),
        3,
    ) and e.by_step[-1] == (e.mean, e.ci95)


def test_every_step_is_the_evaluation_with_so_many_steps(test):
    m = small()
    whole = evaluate(m, test, 12, steps=4)
    for t in range(5):
        assert evaluate(m, test, 12, steps=t).mean == pytest.approx(whole.by_step[t][0], abs=1e-6)


@pytest.mark.parametrize(
    'filters',
    [4, pytest.param(16, marks=pytest.mark.skipif(not _wide(), reason='PyTorch\'s convolutions'))],
)
def test_the_first_tasks_do_not_depend_on_how_many(test, filters):
    m = MAML(conv4(size=16, filters=filters), 5, inner_lr=0.1, inner_steps=2)
    assert torch.equal(evaluate(m, test, 7).accuracies, evaluate(m, test, 40).accuracies[:7])


@pytest.mark.parametrize(
    'make',
    [
        lambda net: MAML(net, 5, 0.1, 3),
        lambda net: mamlpp(net, 5, 3, ingredients=('msl', 'lslr', 'da')),
        lambda net: ProtoNet(net),
    ],
)
def test_tasks_that_share_a_call_keep_their_results(test, make):
    "To the byte where the convolutions are ours."
    m, ep, plan = make(conv4(size=16, filters=16)), test[:8], plan_for('cpu')
    assert m.backbone.shares_calls == bool(library(torch.float32))

    def logits(size):
        return torch.cat(
            plan.map(
                lambda s: m.predict(m.adapt(ep.xs[s], ep.ys[s]), ep.xq[s]),
                [slice(i, i + size) for i in range(0, 8, size)],
            )
        )

    same = (
        torch.equal
        if library(torch.float32) and _wide()
        else lambda a, b: torch.allclose(a, b, atol=1e-3)
    )
    assert same(logits(1), logits(8)) and same(logits(1), logits(4))


def test_who_shares_calls():
    alone = [conv4(norm='support'), conv4(filters=12), from_module(torch.nn.Flatten(), 1, 28)]
    assert not any(b.shares_calls for b in alone)


def test_it_says_what_it_is(test):
    assert ', transductive)' in str(evaluate(small(), test, 3)) and ', not transductive)' in str(
        evaluate(small(norm='support'), test, 3)
    )
    assert str(evaluate(small(), test, 3)).endswith(
        '% (3 episodes, 5-way 1-shot 4-query, 2 steps, transductive)'
    )
    assert math.isnan(interval(torch.tensor([0.5])))


def test_no_graph_and_memory_independent_of_steps(tmp_path):
    "Peak memory of a process that evaluates with 1 and with 60 steps, 84×84."
    code = (
        'import resource, sys, torch\nfrom fewshotmeta.all import *\n'
        'images = torch.zeros(200, 3, 84, 84, dtype=torch.uint8).random_(0, 256, generator=torch.Generator().manual_seed(0))\n'
        'bank = ImageBank(images, range(0, 200, 20), [20]*10, list("abcdefghij"))\n'
        'e = evaluate(MAML(conv4(3, 84, filters=16), 5, inner_lr=.01), EpisodeSampler(bank, 5, 1, 5), 4, int(sys.argv[1]))\n'
        'print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024)'
    )
    peak = [
        float(
            subprocess.run(
                [sys.executable, '-c', code, str(s)], capture_output=True, text=True, check=True
            ).stdout
        )
        for s in (1, 60)
    ]
    assert peak[1] < peak[0] + 60, peak  # a kept graph would add some 30 MB a step


def test_bad_input(test):
    with pytest.raises(ValueError, match='n=0'):
        evaluate(small(), test, 0)
    with pytest.raises(ValueError, match='n_way=5'):
        evaluate(small(), test(n_way=6), 3)
    with pytest.raises(ValueError, match='per-step parameters for 2'):
        evaluate(small(norm_steps=2), test, 3, steps=3)
