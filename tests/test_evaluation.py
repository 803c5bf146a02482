"""An evaluation is a mean over fixed tasks, and says what kind."""

import io
import math
import re
import sys

import forks
import pytest
import torch

import fewshotmeta.training.evaluation as evaluation
from fewshotmeta.all import *
from fewshotmeta.engine.kernels import _wide


@pytest.fixture
def test(noise_bank):
    return EpisodeSampler(noise_bank, 5, 1, 4)


def small(**kw):
    return MAML(conv4(size=16, filters=4, **kw), 5, inner_lr=0.1, inner_steps=2)


def test_mean_and_interval_by_hand(test):
    m = small()
    e = evaluate(m, test, 30)
    a = []
    for ep in (test[i : i + 1] for i in range(30)):
        right = m.predict(m.adapt(ep.xs, ep.ys), ep.xq).argmax(-1) == ep.yq
        a.append(right.double().mean())
    a = torch.tensor(a)
    assert e.mean == pytest.approx(a.mean().item(), abs=1e-6)
    assert e.ci95 == pytest.approx(1.96 * a.std().item() / 30**0.5, abs=1e-6)
    assert (e.n, e.task, e.digest) == (30, '5-way 1-shot 4-query', test.digest(30))
    assert len(e.by_step) == 3 and e.by_step[-1] == (e.mean, e.ci95)


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


def maml_of_three_steps(net):
    "MAML."
    return MAML(net, 5, 0.1, 3)


def mamlpp_of_three_steps(net):
    "MAML++ but for its norm."
    return mamlpp(net, 5, 3, ingredients=('msl', 'lslr', 'da'))


@pytest.mark.parametrize('make', [maml_of_three_steps, mamlpp_of_three_steps, ProtoNet])
def test_tasks_that_share_a_call_keep_their_results(test, make):
    "To the byte where the convolutions are ours."
    m, ep, plan = make(conv4(size=16, filters=16)), test[:8], plan_for('cpu')
    assert m.backbone.shares_calls == bool(library(torch.float32))

    def some(tasks):
        return m.predict(m.adapt(ep.xs[tasks], ep.ys[tasks]), ep.xq[tasks])

    def logits(size):
        return torch.cat(plan.map(some, [slice(i, i + size) for i in range(0, 8, size)]))

    def close(a, b):
        return torch.allclose(a, b, atol=1e-3)

    same = torch.equal if library(torch.float32) and _wide() else close
    assert same(logits(1), logits(8))
    assert same(logits(1), logits(4))


def test_who_shares_calls():
    alone = [conv4(norm='support'), conv4(filters=12), from_module(torch.nn.Flatten(), 1, 28)]
    assert not any(b.shares_calls for b in alone)


def test_it_says_what_it_is(test):
    assert ', transductive)' in str(evaluate(small(), test, 3))
    assert ', not transductive)' in str(evaluate(small(norm='support'), test, 3))
    said = '% (3 episodes, 5-way 1-shot 4-query, 2 steps, transductive)'
    assert str(evaluate(small(), test, 3)).endswith(said)
    assert math.isnan(interval(torch.tensor([0.5])))


PEAK = '''
import resource
import sys
import torch
from fewshotmeta.all import *

gen = torch.Generator().manual_seed(0)
images = torch.zeros(200, 3, 84, 84, dtype=torch.uint8).random_(0, 256, generator=gen)
bank = ImageBank(images, range(0, 200, 20), [20] * 10, list("abcdefghij"))
learner = MAML(conv4(3, 84, filters=16), 5, inner_lr=0.01)
evaluate(learner, EpisodeSampler(bank, 5, 1, 5), 4, int(sys.argv[1]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
'''


def peak_memory(steps):
    "MiB that a process needs at most to evaluate with so many inner steps, 84×84."
    return float(forks.run(PEAK, steps).stdout)


def test_no_graph_and_memory_independent_of_steps():
    "A kept graph would add some 30 MB a step."
    one, twenty = peak_memory(1), peak_memory(20)
    assert twenty < one + 20, (one, twenty)


def test_bad_input(test):
    with pytest.raises(ValueError, match='n=0'):
        evaluate(small(), test, 0)
    with pytest.raises(ValueError, match='n_way=5'):
        evaluate(small(), test(n_way=6), 3)
    with pytest.raises(ValueError, match='2 to 5 ways: accuracy is for one number of ways'):
        accuracies(hidra(conv4(size=16, filters=4), 5), WaysSampler(test, 2, 5), 3)
    with pytest.raises(ValueError, match='per-step parameters for 2'):
        evaluate(small(norm_steps=2), test, 3, steps=3)


# ---- accuracy and loss from one pass
@pytest.mark.parametrize('several', [False, True])
def test_the_losses_by_hand(test, several):
    learner = Ensemble([small(), small()]) if several else small()
    found = measure(learner, test, 9)
    assert isinstance(found, Measured)
    assert torch.equal(found.accuracies, accuracies(learner, test, 9))
    for i, loss in enumerate(found.losses):
        ep = test[i : i + 1]
        logits = learner.predict(learner.adapt(ep.xs, ep.ys), ep.xq)[0]
        by_hand = torch.nn.functional.cross_entropy(logits, ep.yq[0])
        assert loss.item() == pytest.approx(by_hand.item(), abs=1e-4)


@pytest.mark.parametrize('several', [False, True])
def test_without_a_curve_the_queries_are_answered_once(test, several, monkeypatch):
    "The last column of the curve and the same losses, to the bit."
    learner, asked = small(), []
    if several:
        learner = Ensemble([learner, small()])
    predict = type(learner).predict

    def counted(*args):
        asked.append(1)
        return predict(*args)

    monkeypatch.setattr(type(learner), 'predict', counted)
    whole = measure(learner, test, 9, steps=3)
    calls = len(asked)
    last = measure(learner, test, 9, steps=3, curve=False)
    assert len(asked) - calls == calls / 4
    assert torch.equal(last.accuracies, whole.accuracies[:, -1:])
    assert torch.equal(last.losses, whole.losses)


# ---- seen while it goes on
class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def at_once(monkeypatch):
    "What is shown and noted late comes at once."
    for name in ('_BAR_AFTER', '_LINE_AFTER', '_NOTE_EVERY'):
        monkeypatch.setattr(evaluation, name, 0)


@pytest.fixture
def shown(monkeypatch, test):
    "`shown(out, …)` is what `evaluate` writes to this standard error while it tests three tasks."

    def show(out, **options):
        with monkeypatch.context() as m:
            m.setattr(sys, 'stderr', out)
            evaluate(small(), test, 3, **options)
        return out.getvalue()

    return show


def test_a_bar_on_a_terminal_and_a_line_elsewhere(shown, at_once):
    bar = shown(Terminal())
    assert 'testing' in bar and '/3' in bar
    assert bar.endswith('\r') and '\n' not in bar, 'it goes away'
    assert re.fullmatch(r'testing: 3 tasks in \d+ s\n', shown(io.StringIO()))
    for out in (Terminal(), io.StringIO()):
        assert shown(out, progress=False) == ''


def test_what_is_short_shows_nothing(shown, monkeypatch):
    monkeypatch.setattr(evaluation, '_BAR_AFTER', 600)
    monkeypatch.setattr(evaluation, '_LINE_AFTER', 600)
    assert shown(Terminal()) == shown(io.StringIO()) == ''


def test_an_evaluation_within_a_run_is_noted_in_its_folder(monkeypatch, at_once, test, tmp_path):
    "And what was noted of the training stays; a test without a training is noted, too."
    expected = evaluate(small(), test, 8).accuracies
    monkeypatch.setenv('FEWSHOTMETA_RUN', str(tmp_path))
    assert torch.equal(evaluate(small(), test, 8).accuracies, expected)
    noted = read_progress(tmp_path)
    assert noted.pop('spent') >= 0
    assert noted == dict(phase='testing', done=8, all=8)
    fit(small(), test, 1, 1, checkpoint=tmp_path / 'trained', progress=False)
    monkeypatch.setenv('FEWSHOTMETA_RUN', str(tmp_path / 'trained'))
    evaluate_ways(small(), test, (5,), 4)
    noted = read_progress(tmp_path / 'trained')
    assert (noted['phase'], noted['all'], noted['iteration']) == ('testing', 4, 1)


def test_only_the_first_rank_shows_and_notes(shown, monkeypatch, at_once, tmp_path):
    monkeypatch.setenv('FEWSHOTMETA_RUN', str(tmp_path))
    monkeypatch.setenv('RANK', '1')
    assert shown(Terminal()) == shown(io.StringIO()) == ''
    assert read_progress(tmp_path) == {}


def test_an_error_is_no_end(monkeypatch, at_once):
    said = io.StringIO()
    monkeypatch.setattr(sys, 'stderr', said)
    with pytest.raises(KeyboardInterrupt), TaskProgress('testing', 3):
        raise KeyboardInterrupt
    assert said.getvalue() == ''
