"""The outer loop: stopped anywhere it continues to the same bytes; what is broken is refused."""

import ast
import hashlib
import inspect
import json
import linecache
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import product

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import full
from forks import Fork
from pretended_gpu import GPU, pretended_gpu
from safetensors.torch import save_file

import fewshotmeta.training.evaluation as evaluation
import fewshotmeta.training.fit as training
from fewshotmeta.all import *


@pytest.fixture
def train(noise_bank):
    return EpisodeSampler(noise_bank, 5, 1, 3, seed=0)


@pytest.fixture
def valid(noise_bank):
    return EpisodeSampler(noise_bank, 5, 1, 3, seed=99)


def small(seed=0, **kw):
    net = {k: kw.pop(k) for k in ('norm', 'norm_steps') if k in kw}
    return MAML(conv4(size=16, filters=16, **net), 5, seed=seed, **kw)


def fitted(train, valid, folder=None, learner=None, **changes):
    "Train a small learner for 24 iterations; it validates, saves and logs at different intervals."
    how_long = dict(iterations=24, valid_tasks=6, valid_every=8, save_every=6, log_every=4)
    options = how_long | dict(meta_batch=2, valid=valid, schedule=Cosine()) | changes
    return fit(learner or small(), train, checkpoint=folder, progress=False, **options)


def same(a, b):
    "Whether two learners have the same bytes."
    pairs = [(a.theta, b.theta), (a.buffers, b.buffers)]
    return all(torch.equal(x[k], y[k]) for x, y in pairs for k in x)


def without_seconds(rows):
    "Rows of the metrics, but for how long they took."
    return [{k: v for k, v in row.items() if k != 'seconds'} for row in rows]


# ---- schedules, clipping
def test_schedules():
    assert [round(Cosine()(p), 6) for p in (0, 0.5, 1)] == [1, 0.505, 0.01]
    assert constant(0.7) == 1
    steps, at = MultiStep((0.1, 0.5), 0.3), (0, 0.0999, 0.1, 0.49, 0.5, 0.99)
    assert [round(steps(p), 3) for p in at] == [1, 1, 0.3, 0.3, 0.09, 0.09]


def test_schedule_is_what_adam_gets(train, valid):
    run = fitted(train, valid, meta_lr=2e-3)
    expected = [2e-3 * Cosine()((r['iteration'] - 1) / 24) for r in run.history]
    assert [r['lr'] for r in run.history] == expected


def test_clipping():
    for clip in (ClipValue, ClipNorm):
        with pytest.raises(ValueError, match='bound=-1'):
            clip(-1)
    g = [torch.tensor([3.0, -20.0]), torch.tensor([[0.1]])]
    assert ClipValue(10)(g)[0].tolist() == [3.0, -10.0]
    assert ClipNorm(10)(g)[0].norm() == pytest.approx(10, abs=1e-4)
    assert torch.equal(ClipNorm(10)(g)[1], g[1])


def test_an_optimizer_by_its_name(train):
    "Without moments, a step is the learning rate times the gradient."
    learner, before = small(), small()
    grads = meta_gradient(before, train[0:4]).grads
    fit(learner, train, 1, meta_batch=4, meta_lr=0.5, optimizer='sgd', progress=False)
    for k, grad in zip(before.theta, grads):
        assert torch.allclose(learner.theta[k], before.theta[k] - 0.5 * grad, atol=1e-5), k


def test_nesterov_is_torchs_and_goes_on_where_it_stood(train, resumed):
    "Momentum 0.9 and weight decay 0.0005; the speed is in the checkpoint."

    def go(folder):
        outer = dict(meta_batch=4, meta_lr=0.1, optimizer='nesterov', checkpoint=folder)
        return fit(small(), train, 5, save_every=1, progress=False, **outer).learner

    learner, plain = resumed(go, 2), small()
    opt = torch.optim.SGD(plain.theta.values(), 0.1, 0.9, nesterov=True, weight_decay=5e-4)
    for i in range(5):
        found = meta_gradient(plain, train[4 * i : 4 * i + 4])
        for param, grad in zip(plain.theta.values(), found.grads):
            param.grad = grad
        opt.step()
    for k in plain.theta:
        assert torch.allclose(learner.theta[k], plain.theta[k], atol=1e-4), k


def test_a_speed_of_another_shape_is_refused(train, tmp_path):
    outer = dict(meta_batch=4, optimizer='nesterov', checkpoint=tmp_path, progress=False)
    fit(small(), train, 2, **outer)
    head, tensors = read_checkpoint(tmp_path)
    assert {k for k in tensors if k.startswith('speed/')} == {f'speed/{k}' for k in small().theta}
    del head['tensors']
    tensors['speed/head.bias'] = torch.zeros(3)
    save_tensors(tmp_path / 'checkpoint.safetensors', 'run', head, tensors)
    with pytest.raises(BadCheckpoint, match=r'speed/head.bias is torch.float32 \(3,\)'):
        fit(small(), train, 2, **outer)


def test_the_sum_over_tasks_is_so_many_times_the_mean(train):
    mean, total = small(), small()
    options = dict(iterations=1, meta_batch=4, optimizer='sgd', progress=False)
    fit(mean, train, meta_lr=0.4, **options)
    fit(total, train, meta_lr=0.1, task_loss='sum', **options)
    for k in mean.theta:
        assert torch.allclose(mean.theta[k], total.theta[k], atol=1e-5), k


def test_fit_is_adam_on_the_mean_meta_loss(train):
    "Three iterations by hand."
    a, b = small(), small()
    plan = plan_for('cpu', 'batched')  # the same arithmetic as below
    outer = dict(meta_batch=4, meta_lr=0.01, clip=ClipValue(0.05))
    fit(a, train, 3, plan=plan, progress=False, **outer)
    opt = torch.optim.Adam(list(b.theta.values()), 0.01)
    for i in range(3):
        opt.zero_grad()
        plan.run(b.meta_loss, train[4 * i : 4 * i + 4]).loss.mean().backward()
        for p in b.theta.values():
            grad = torch.zeros_like(p) if p.grad is None else p.grad
            p.grad = grad.clamp(-0.05, 0.05)
        opt.step()
    for k in a.theta:
        assert torch.allclose(a.theta[k], b.theta[k], atol=1e-4), k


def test_training_learns():
    "Far above chance in seconds on the embedded characters."
    m = MAML(conv4(filters=16), 5, inner_lr=0.1)
    tasks = EpisodeSampler(glyphs('train'), 5, 1, 5)
    fit(m, tasks, 150, meta_batch=4, meta_lr=3e-3, progress=False)
    assert evaluate(m, EpisodeSampler(glyphs('test'), 5, 1, 15), 50).mean > 0.45


# ---- selection
def validated(run):
    "(iteration, accuracy) of each validation."
    rows = [(r['iteration'], r['val_accuracy']) for r in run.history]
    return [(i, value) for i, value in rows if value is not None]


def last_accuracy(learner, valid):
    "Mean accuracy on the validation tasks after the last inner step."
    return accuracies(learner, valid, 6)[:, -1].mean().item()


def test_the_best_and_the_last(train, valid):
    best, last = (fitted(train, valid, select=s, meta_lr=0.02) for s in ('best', 'last'))
    values = validated(best)
    assert [i for i, _ in values] == [8, 16, 24]
    assert best.best == max(v for _, v in values)
    assert last_accuracy(best.learner, valid) == best.best
    assert not last.kept


def test_an_ensemble_of_the_best_two(train, valid):
    run = fitted(train, valid, select='top_2', meta_lr=0.02)
    members = run.learner.members
    assert isinstance(run.learner, Ensemble) and len(members) == 2
    values = sorted((round(v, 6) for _, v in validated(run)), reverse=True)
    assert [round(last_accuracy(m, valid), 6) for m in members] == values[:2]


# ---- resume
@pytest.fixture(scope='module')
def never_stopped(noise_bank, tmp_path_factory):
    "`never_stopped(norm='per_step', …)` is a training that nothing interrupts, made once."
    made, train = {}, EpisodeSampler(noise_bank, 5, 1, 3, seed=0)

    def run(**kw):
        key = str(kw)
        if key not in made:
            folder = tmp_path_factory.mktemp('never_stopped')
            made[key] = fitted(train, train(seed=99), folder, small(**kw))
        return made[key]

    return run


def test_any_number_of_workers_gives_the_same_bytes(train, valid):
    runs = [fitted(train, valid, plan=Plan('p', 1, w)).learner for w in (1, 2, 3)]
    assert same(runs[0], runs[1]) and same(runs[0], runs[2])


@pytest.mark.parametrize('kw', [dict(), dict(norm='per_step', norm_steps=1)])
@pytest.mark.parametrize('stop', [1, 5, 6, 7, 8, 13, 23])
@pytest.mark.parametrize(
    'polite', [True, False], ids=['one Ctrl-C', 'in the middle of an iteration']
)
def test_stopped_anywhere(train, valid, tmp_path, monkeypatch, never_stopped, stop, kw, polite):
    "Ctrl-C is saved at the end of its iteration; what strikes inside one loses it."
    whole = never_stopped(**kw)
    step = training._Loop.step

    def stopping(self):
        if self.run.iteration == stop - polite:
            if not polite:
                raise KeyboardInterrupt
            os.kill(os.getpid(), signal.SIGINT)
        return step(self)

    with monkeypatch.context() as m:
        m.setattr(training._Loop, 'step', stopping)
        with pytest.raises(KeyboardInterrupt):
            fitted(train, valid, tmp_path, small(**kw))
    assert read_checkpoint(tmp_path)[0]['iteration'] == (stop if polite else stop // 6 * 6)
    again = fitted(train, valid, tmp_path, small(**kw))
    assert same(whole.learner, again.learner)
    assert without_seconds(whole.history) == without_seconds(again.history)


CHILD = '''
import sys
import torch
from fewshotmeta.all import *

gen = torch.Generator().manual_seed(0)
images = torch.randint(0, 256, (1000, 1, 16, 16), generator=gen, dtype=torch.uint8)
names = [f'class{i:02d}' for i in range(40)]
bank = ImageBank(images, range(0, 1000, 25), [25] * 40, names, name='noise')
s = EpisodeSampler(bank, 5, 1, 3, seed=0)
often = dict(valid_tasks=6, valid_every=20, save_every=3, log_every=4)
learner = MAML(conv4(size=16, filters=16), 5)
fit(learner, s, 120, 2, valid=s(seed=99), checkpoint=sys.argv[1], progress=False, **often)
'''


def train_in_a_process(folder, kill_after=None):
    fork = Fork(CHILD, folder)
    if kill_after is not None:
        time.sleep(kill_after)
        fork.process.kill()
    return fork.wait(120).returncode


def test_sigkill_at_random_moments(tmp_path):
    "Killed again and again, resumed each time: the same bytes as a run that nobody touched."
    assert train_in_a_process(tmp_path / 'a') == 0
    rng, kills = random.Random(), 0
    for _ in range(5):
        if train_in_a_process(tmp_path / 'b', kill_after=rng.uniform(0.05, 0.8)) == 0:
            break
        kills += 1
        if (tmp_path / 'b' / 'checkpoint.safetensors').exists():
            read_checkpoint(tmp_path / 'b')  # never half-written
    assert kills >= 1 and train_in_a_process(tmp_path / 'b') == 0
    (ha, a), (hb, b) = read_checkpoint(tmp_path / 'a'), read_checkpoint(tmp_path / 'b')
    assert ha['iteration'] == hb['iteration'] == 120
    assert ha['tensors'] == hb['tensors']
    assert all(torch.equal(a[k], b[k]) for k in a)
    tables = [p.read_text() for p in (tmp_path / 'b').iterdir() if p.suffix == '.csv']
    assert all(text.startswith('iteration') for text in tables)


def test_ctrl_c_waits_for_the_end_of_the_iteration(train, valid, tmp_path):
    class Press:
        __name__ = 'Cosine(final=0.01)'

        def __call__(self, p):
            if round(p * 24) == 10:
                os.kill(os.getpid(), signal.SIGINT)
            return Cosine()(p)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        fitted(train, valid, tmp_path, schedule=Press())
    assert read_checkpoint(tmp_path)[0]['iteration'] == 11
    assert signal.getsignal(signal.SIGINT) is before
    assert same(fitted(train, valid, tmp_path).learner, fitted(train, valid).learner)


REPLACE = """
import os, sys
target, *others = sys.argv[1:]
while True:
    for other in others:
        os.link(other, target + '.tmp')
        os.replace(target + '.tmp', target)
"""


def test_a_checkpoint_that_is_replaced_while_it_is_read(train, tmp_path, record):
    "What is read is the old one or the new one, never a header of one and tensors of the other."
    name, whole, reads = 'checkpoint.safetensors', {}, 10_000 if full() else 300
    for n in (1, 2):
        fit(small(), train, n, meta_batch=2, checkpoint=tmp_path / str(n), progress=False)
        whole[n] = read_checkpoint(tmp_path / str(n))
    files = [tmp_path / folder / name for folder in ('run', '1', '2')]
    files[0].parent.mkdir()
    other = subprocess.Popen([sys.executable, '-S', '-c', REPLACE, *map(str, files)])
    try:
        end, seen = time.monotonic() + 60, set()
        while not files[0].exists():
            assert time.monotonic() < end and other.poll() is None
        for _ in range(reads):
            head, tensors = read_checkpoint(files[0].parent)
            seen.add(head['iteration'])
            expected = whole[head['iteration']]
            assert head == expected[0]
            assert all(torch.equal(tensors[k], expected[1][k]) for k in expected[1])
    finally:
        other.kill()
        other.wait()
    assert seen == {1, 2}
    record('checkpoints replaced while they are read', tries=reads, survived=reads)


# ---- what is refused
def test_not_finite_names_the_iteration_and_keeps_the_last_good_state(train, valid, tmp_path):
    class Explode:
        __name__ = 'constant'

        def __call__(self, p):
            return 1e30 if round(p * 24) == 9 else 1.0

    said = r'iteration 10: the .*The last checkpoint is kept.*meta_lr=0.001.*in a new folder'
    with pytest.raises(FloatingPointError, match=said):
        fitted(train, valid, tmp_path, schedule=Explode())
    head, tensors = read_checkpoint(tmp_path)
    kept = with_theta(small(), {k: tensors[f'theta/{k}'] for k in small().theta})
    assert head['iteration'] == 6
    assert kept.meta_loss(train[0:4]).loss.isfinite().all()


def test_not_finite_gradient(train, tmp_path):
    m = small(inner_lr=1e30)
    with pytest.raises(FloatingPointError, match='iteration 0'):
        fit(m, train, 5, meta_batch=2, checkpoint=tmp_path, progress=False)
    assert all(t.isfinite().all() for t in read_checkpoint(tmp_path)[1].values())
    assert same(m, small(inner_lr=1e30))


def test_truncated_altered_foreign_checkpoints(train, valid, tmp_path):
    fitted(train, valid, tmp_path)
    path = tmp_path / 'checkpoint.safetensors'
    whole = path.read_bytes()
    for cut in (0, 1, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(BadCheckpoint, match='checkpoint.safetensors is not a whole checkpoint'):
            fitted(train, valid, tmp_path)
    for at in (len(whole) - 1, len(whole) - 2000):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(BadCheckpoint, match='not what was stored'):
            fitted(train, valid, tmp_path)
    torch.save({'theta': torch.zeros(2)}, path)  # a pickle is refused, not opened
    with pytest.raises(BadCheckpoint):
        fitted(train, valid, tmp_path)
    save_file({'x': torch.zeros(2)}, path)
    with pytest.raises(BadCheckpoint, match='is not a checkpoint: delete it'):
        fitted(train, valid, tmp_path)
    path.write_bytes(whole)
    fitted(train, valid, tmp_path)


FORKS = """
import os, signal, sys, warnings
import torch
from fewshotmeta.all import *

warnings.simplefilter('ignore')  # Python's own, of a fork beside threads
bank = glyphs('train')


def trained():
    learner = MAML(conv4(filters=4), 5)
    plan = plan_for('cpu', 'threads', workers=2)
    fit(learner, EpisodeSampler(bank, 5), 2, meta_batch=4, plan=plan, progress=False)
    return learner


learner = trained()
for _ in range(int(sys.argv[1])):
    child = os.fork()
    if not child:
        signal.alarm(60)
        both = zip(learner.theta.values(), trained().theta.values())
        os._exit(0 if all(torch.equal(a, b) for a, b in both) else 3)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
trained()  # the workers of the parent are still there
"""


def test_a_fork_of_a_process_with_workers_trains_too(record):
    forks = 20 if full() else 1
    done = Fork(FORKS, forks).wait(300)
    assert (done.returncode, done.stdout.split()) == (0, ['0'] * forks), done.stderr
    what = 'forks of a process that has trained with workers: they train, with the same bytes'
    record(what, tries=forks, survived=forks)


def bias_of_the_head(name, learner):
    "A rule of one's own for what adapts."
    return name == 'head.bias'


@pytest.mark.parametrize(
    'change,words',
    [
        (dict(iterations=25), 'iterations: 24 there, 25 here.*Cosine'),
        (dict(meta_lr=0.5), 'meta_lr: 0.001 there, 0.5 here'),
        (dict(schedule=constant), 'schedule'),
        (dict(learner=small(inner_lr=0.1)), 'inner_lr'),
        (dict(learner=small(norm='support')), 'support'),
        (dict(learner=small(head_init='zeros')), 'head_init'),
        (dict(learner=small(adapts=bias_of_the_head)), 'adapted'),
    ],
)
def test_checkpoint_of_another_configuration(train, valid, tmp_path, change, words):
    fitted(train, valid, tmp_path)
    before = (tmp_path / 'checkpoint.safetensors').read_bytes()
    with pytest.raises(BadCheckpoint, match=f'(?s)another run.*{words}.*choose another folder'):
        fitted(train, valid, tmp_path, **change)
    for other in (train(seed=5), train(mean=0.5, std=0.5)):
        with pytest.raises(BadCheckpoint, match='train: '):
            fitted(other, valid, tmp_path)
    assert (tmp_path / 'checkpoint.safetensors').read_bytes() == before


def slower(power):
    "A schedule of one's own, made for a power."

    def schedule(progress):
        return (1 - progress) ** power

    return schedule


class Halved:
    "A schedule that says nothing of itself but what it has."

    def __init__(self, at):
        self.at = at

    def __call__(self, progress):
        return 1.0 if progress < self.at else 0.5


def clipped(grads, bound=1.0):
    return [g.clamp(-bound, bound) for g in grads]


def of_source(folder, body):
    "A function of the same name, from a file."
    (folder / 'own.py').write_text(f'def own(progress):\n    return {body}\n')
    names = {}
    linecache.clearcache()
    exec(compile((folder / 'own.py').read_text(), str(folder / 'own.py'), 'exec'), names)
    return names['own']


LOW = replace(plan_for('cpu', 'batched'), precision='bf16')  # as on a GPU


@pytest.mark.parametrize(
    'mine,other',
    [
        (dict(schedule=slower(2)), dict(schedule=slower(3))),
        (dict(schedule=partial(pow, 0.5)), dict(schedule=partial(pow, 0.6))),
        (dict(schedule=Halved(0.5)), dict(schedule=Halved(0.6))),
        (dict(clip=clipped), dict(clip=partial(clipped, bound=2.0))),
        (dict(plan=None), dict(plan=LOW)),
    ],
    ids=['closure', 'partial', 'object', 'clip', 'precision'],
)
def test_a_function_is_part_of_what_a_checkpoint_is_of(train, valid, tmp_path, mine, other):
    fitted(train, valid, tmp_path, iterations=2, **mine)
    fitted(train, valid, tmp_path, iterations=2, **mine)
    with pytest.raises(BadCheckpoint, match='(?s)of another run .(schedule|clip|precision): '):
        fitted(train, valid, tmp_path, iterations=2, **other)


def test_a_function_goes_by_its_source(tmp_path):
    half, again, third = (plain_value(of_source(tmp_path, b)) for b in ('0.5', '0.5', '0.25'))
    assert half == again != third
    assert half.startswith('own ')
    assert plain_value(all_but_norm) == 'all_but_norm'  # of the package, whose code is recorded
    assert plain_value(Halved(0.5)).startswith("Halved({'at': 0.5}) ")
    named = Halved(0.5)
    named.__name__ = 'mine'
    assert plain_value(named) == 'mine'
    typed = {}
    exec('def own(progress):\n    return 1.0\n', typed)
    assert plain_value(typed['own']) != plain_value(typed['own'])  # nobody knows its source


def test_a_function_goes_by_what_it_has_from_elsewhere(tmp_path):
    "By its defaults and what it encloses, itself left aside; a method of an object by its class."

    def with_default(at=0.5, *, by=1):
        return at * by

    def calls_itself(n):
        return n and calls_itself(n - 1)

    before = plain_value(with_default)
    assert len(plain_value(calls_itself).split()[1]) == 8
    for name, values in ('__defaults__', (0.25,)), ('__kwdefaults__', dict(by=2)):
        old = getattr(with_default, name)
        setattr(with_default, name, values)
        assert plain_value(with_default) != before
        setattr(with_default, name, old)
    assert plain_value(with_default) == before
    alone = f'{inspect.getsource(calls_itself)}|[]'  # as in the checkpoints of earlier versions
    assert plain_value(calls_itself).endswith(hashlib.sha256(alone.encode()).hexdigest()[:8])
    nested = partial(round, 0.5, ndigits=partial(len))
    assert plain_value(nested) == "partial(round, [0.5], {'ndigits': 'partial(len, [], {})'})"
    assert plain_value(MAML) == 'MAML'


def test_a_function_whose_file_is_edited_just_now(tmp_path):
    "Its source is not known, which is no error of the training."
    own = of_source(tmp_path, '0.5')
    (tmp_path / 'own.py').write_text('def own(progress):\n    return """half of it')
    assert plain_value(own).startswith('own (its source is not known')


def calls_one_that_calls_it(owner):
    def first(n):
        return second(n - 1)

    def second(n):
        return n and owner and first(n - 1)

    return first


def as_keyword(owner):
    return partial(min, key=owner)


class Owner:
    "Has what is made of it."

    def __init__(self, made_of):
        self.own = made_of(self)


@pytest.mark.parametrize(
    'made_of,words',
    [
        (Halved, r"Halved\({'at': 'Owner above'}\) \w{8}"),
        (partial(partial, clipped), r"partial\(clipped \w{8}, \['Owner above'\], {}\)"),
        (as_keyword, r"partial\(min, \[\], {'key': 'Owner above'}\)"),
        (calls_one_that_calls_it, r'first \w{8}'),
    ],
    ids=['object', 'argument', 'keyword', 'functions'],
)
def test_what_belongs_to_each_other_is_described_once(made_of, words):
    said = plain_value(Owner(made_of)).removeprefix('Owner(').removesuffix(')')
    assert re.fullmatch(words, ast.literal_eval(said)['own'])


def test_a_run_before_it_has_begun():
    learner = small()
    run = Run(learner, torch.optim.Adam(learner.theta.values()))
    assert (run.best, run.seconds, run.iteration, run.calls) == (None, 0, 0, 1)
    run.kept = [(0.7, 8, {}, {}), (0.6, 4, {}, {})]
    assert run.best == 0.7


def test_a_file_of_tensors_is_one_like_others(tmp_path):
    "Others may read it as they may read any file; what is no such file, or not there, is said."
    path, own = tmp_path / 'x', tmp_path / 'own'
    own.touch()
    head, tensors = dict(format='fewshotmeta thing 1'), dict(a=torch.zeros(2))
    save_tensors(path, 'thing', head, tensors)
    assert path.stat().st_mode == own.stat().st_mode
    assert read_tensors(path, 'thing', head['format'])[1]['a'].shape == (2,)
    for file in (tmp_path / 'none', own):
        with pytest.raises(BadFile, match=f'{file} is not a whole thing'):
            read_tensors(file, 'thing', head['format'])
    save_file(tensors, path, metadata=dict(thing='{"format": "fewshotmeta thing 1"}'))
    with pytest.raises(BadFile, match='its header: its content is not what was stored'):
        read_tensors(path, 'thing', head['format'])
    with pytest.raises(BadFile, match='x is not a thing'):
        read_tensors(path, 'other', head['format'])


@pytest.mark.parametrize(
    'header,words',
    [
        (dict(a=dict(dtype='F4', shape=[2], data_offsets=[0, 1])), "'F4'"),
        (dict(__metadata__=dict(thing='[' * 100_000)), 'recursion'),
    ],
    ids=['a type that PyTorch lacks', 'lists in lists'],
)
def test_a_file_that_another_program_wrote(tmp_path, header, words):
    "Its header is in order, for all that safetensors itself sees."
    text = json.dumps(header).encode()
    (tmp_path / 'x').write_bytes(len(text).to_bytes(8, 'little') + text + b'0' * ('a' in header))
    with pytest.raises(BadFile, match=f'x is not a whole thing .*{words}'):
        read_tensors(tmp_path / 'x', 'thing', 'fewshotmeta thing 1')


HEADER = dict(config={}, iteration=0, history=[], pending=[], seconds=0.0, kept=[])
ROW = dict(iteration=1, loss=1, accuracy=0, lr=1, seconds=0)  # as JSON has whole numbers


def with_header(folder, changes):
    "What is read of a checkpoint without tensors."
    header = dict(format=CHECKPOINT) | HEADER | changes
    save_tensors(folder / 'checkpoint.safetensors', 'run', header, {})
    return read_checkpoint(folder)[0]


@pytest.mark.parametrize(
    'changes',
    [
        dict(iteration=2**53 - 1, calls=2**53 - 1),
        dict(calls=1),
        dict(history=[ROW, ROW | dict(val_accuracy=1, val_loss=0.5)]),
        dict(history=[ROW | dict(val_accuracy=None, val_loss=None)]),
    ],
    ids=str,
)
def test_a_header_that_is_in_order(tmp_path, changes):
    found = with_header(tmp_path, changes)
    assert {k: found[k] for k in changes} == changes


def test_a_header_of_an_earlier_version_says_no_calls(tmp_path):
    "Each task had one of its own, however many there are."
    assert with_header(tmp_path, {})['calls'] > 1_000_000


@pytest.mark.parametrize(
    'changes,words',
    [
        (dict(iteration=-1), 'has iteration=-1, not a number of iterations'),
        (dict(iteration=2**53), 'has iteration=9007199254740992, not a number of iterations'),
        (dict(calls=0), 'has calls=0, not a number of calls'),
        (dict(calls=2**53), 'has calls=9007199254740992, not a number of calls'),
        (dict(calls='x'), "has calls='x': expected int"),
        (dict(history=[ROW | dict(val_accuracy='x')]), "history, has val_accuracy='x': expected"),
        (dict(history=[ROW | dict(val_loss='x')]), "in its history, has val_loss='x': expected"),
        (dict(history=[ROW | dict(lr=None)]), 'in its history, has lr=None: expected'),
    ],
    ids=str,
)
def test_a_header_that_is_out_of_order(tmp_path, changes, words):
    with pytest.raises(BadCheckpoint, match=f'its header.*{words}.*delete it to start anew'):
        with_header(tmp_path, changes)


def begun(device='cpu'):
    "A run of a learner of a few parameters, that has taken a step."
    learner = MAML(conv4(size=16, filters=2), 3)
    learner.theta = {k: v.detach().to(device) for k, v in learner.theta.items()}
    run = Run(learner, torch.optim.Adam(learner.theta.values()))
    for param in learner.theta.values():
        param.grad = torch.ones_like(param)
    run.opt.step()
    return run


def steps_of(run):
    "Adam's count of steps, for each parameter."
    return [run.opt.state[param]['step'] for param in run.learner.theta.values()]


@pytest.mark.parametrize(
    'iterations,done',
    [([], 0), ([], 3), ([4], 4), ([4], 7), ([2, 4, 6], 9)],
    ids=str,
)
def test_rows_that_a_training_has(tmp_path, iterations, done):
    "One every four iterations at least, and more where it validates."
    run = with_rows(iterations, done)
    save_checkpoint(run, tmp_path, dict(log_every=4))
    again = begun()
    load_checkpoint(again, tmp_path, dict(log_every=4))
    assert (again.iteration, again.history) == (done, run.history)


@pytest.mark.parametrize(
    'iterations,done',
    [([], 4), ([4], 8), ([4], 3), ([0, 4], 4), ([4, 4], 4), ([8, 4], 5), ([4, 8], 6)],
    ids=str,
)
def test_rows_that_no_training_has(tmp_path, iterations, done):
    "Too few of them, of iterations that are not done, or in another order."
    save_checkpoint(with_rows(iterations, done), tmp_path, dict(log_every=4))
    words = re.escape(f'has rows of iterations {iterations} after {done} iterations')
    with pytest.raises(BadCheckpoint, match=words):
        load_checkpoint(begun(), tmp_path, dict(log_every=4))


def with_rows(iterations, done):
    "A run with rows of its metrics."
    run = begun()
    run.iteration = done
    run.history = [ROW | dict(iteration=i, val_loss=None) for i in iterations]
    return run


@pytest.mark.parametrize('device', ['cpu', 'meta', GPU])
def test_steps_are_counted_where_adam_looks_for_them(tmp_path, monkeypatch, device):
    "On the GPU, where a recorded step counts; elsewhere on the CPU."
    save_checkpoint(begun(), tmp_path, {})
    with pretended_gpu(monkeypatch) if device == GPU else nullcontext():
        run = begun(device)
        load_checkpoint(run, tmp_path, {})
        where = {step.device.type for step in steps_of(run)}
        run.opt.step()
    assert where == {GPU if device == GPU else 'cpu'}


def test_steps_that_were_counted_in_double_precision(tmp_path):
    "As PyTorch counts where that is the type by default; they stay so."
    run = begun()
    for param in run.learner.theta.values():
        run.opt.state[param]['step'] = torch.tensor(2.0**24 + 1, dtype=torch.float64)
    save_checkpoint(run, tmp_path, {})
    again = begun()
    load_checkpoint(again, tmp_path, {})
    assert steps_of(again) == steps_of(run)
    assert {step.dtype for step in steps_of(again)} == {torch.float64}


def test_every_part_of_a_tensor_is_in_its_digest(tmp_path):
    "Its name and its shape, too, of equal bytes."
    path, key = tmp_path / 'x', 'thing'
    head, seen = dict(format='fewshotmeta thing 1'), set()
    parts = dict(a=torch.zeros(2, 3)), dict(a=torch.zeros(3, 2)), dict(b=torch.zeros(2, 3))
    for tensors in (*parts, dict(a=torch.zeros(2, 3, dtype=torch.int32))):
        save_tensors(path, key, head, tensors)
        seen.add(read_tensors(path, key, head['format'])[0]['tensors'])
    assert len(seen) == 4


def test_a_checkpoint_of_a_configuration_with_more_in_it(half_done, train, valid, tmp_path):
    shutil.copy(half_done / 'checkpoint.safetensors', tmp_path)

    def with_more(head, tensors):
        head['config']['more'] = 1

    resealed(tmp_path, with_more)
    with pytest.raises(BadCheckpoint, match='another run .more: 1 there, None here.'):
        fitted(train, valid, tmp_path)


def test_a_phase_is_noted_beside_the_training(tmp_path):
    note_phase(None, 'testing', 1, 2, 3.0)  # nowhere to be left
    assert read_progress(tmp_path) == {}
    write_json(tmp_path / '.progress.json', dict(iteration=7, phase='training', done=7))
    note_phase(tmp_path, 'testing', 1, 2, 3.0)
    phase = dict(phase='testing', done=1, all=2, spent=3.0)
    assert read_progress(tmp_path) == dict(iteration=7) | phase
    (tmp_path / '.progress.json').write_text('{')
    assert read_progress(tmp_path) == {}
    note_phase(tmp_path, 'testing', 1, 2, 3.0)
    assert read_progress(tmp_path) == phase


def resealed(folder, change):
    "Write a checkpoint again after a change of its header and its tensors."
    head, tensors = read_checkpoint(folder)
    change(head, tensors)
    save_tensors(folder / 'checkpoint.safetensors', 'run', head, tensors)


def doubled(name):
    "Change the shape of a tensor."

    def change(head, tensors):
        tensors[name] = tensors[name].flatten().repeat(2)

    return change


def moved(name, to):
    "Call a tensor by another name; none: remove it."

    def change(head, tensors):
        value = tensors.pop(name)
        if to:
            tensors[to] = value

    return change


def said(**values):
    "Change the header; none: remove what it says."

    def change(head, tensors):
        for name, value in values.items():
            head[name] = value
            if value is None:
                del head[name]

    return change


def as_double(head, tensors):
    tensors['theta/head.bias'] = tensors['theta/head.bias'].double()


@pytest.mark.parametrize(
    'change,words',
    [
        (doubled('theta/head.bias'), r'theta/head.bias is .*\(10,\) there, .*\(5,\) in this run'),
        (doubled('m/head.bias'), r'm/head.bias is torch.float32 \(10,\) there'),
        (doubled('kept0/theta/head.weight'), 'kept0/theta/head.weight is'),
        (doubled('step/head.bias'), r'step/head.bias is torch.float32 \(2,\) there'),
        (as_double, 'theta/head.bias is torch.float64'),
        (moved('theta/head.bias', None), 'theta/head.bias is no tensor there'),
        (moved('v/head.bias', None), 'v/head.bias is no tensor there'),
        (moved('step/head.bias', None), 'step/head.bias is no tensor there'),
        (moved('theta/head.bias', 'theta/bias'), 'theta/head.bias is no tensor there'),
        (moved('kept0/theta/head.bias', 'kept7/x'), 'kept0/theta/head.bias is no tensor there'),
        (said(kept=[]), 'kept0/theta/.* there, no tensor in this run'),
        (said(iteration=None), 'its header has no iteration: expected int: delete it'),
        (said(iteration='many'), "its header has iteration='many': expected int"),
        (said(kept=[3]), r'its header has kept=\[3\], not a list of pairs'),
        (said(config=None), 'its header has no config'),
        (said(seconds='long'), "its header has seconds='long': expected float"),
        (said(kept=[[0.5, 1, 2]]), r'its header has kept=\[\[0.5, 1, 2\]\], not a list of pairs'),
        (said(format='fewshotmeta checkpoint 1'), "checkpoint 1': this version of the package"),
    ],
)
def test_a_resealed_checkpoint_of_other_tensors(half_done, train, valid, tmp_path, change, words):
    shutil.copy(half_done / 'checkpoint.safetensors', tmp_path)
    resealed(tmp_path, change)
    with pytest.raises(BadCheckpoint, match=words):
        fitted(train, valid, tmp_path)


def as_half(name):
    "Change the type of a tensor."

    def change(head, tensors):
        tensors[name] = tensors[name].half()

    return change


def test_every_tensor_of_a_resealed_checkpoint(half_done, train, valid, tmp_path, record):
    "Of another shape or type, or missing; a part of them, unless it runs at full length."
    names = sorted(read_checkpoint(half_done)[1])
    names = names if full() else names[::20]
    for name, kind in product(names, (doubled, as_half, partial(moved, to=None))):
        shutil.copy(half_done / 'checkpoint.safetensors', tmp_path)
        resealed(tmp_path, kind(name))
        with pytest.raises(BadCheckpoint, match=name):
            fitted(train, valid, tmp_path)
    what = 'checkpoints with a tensor of another shape or type, or without it, and a right digest'
    record(what, tries=3 * len(names), survived=3 * len(names))


def test_a_checkpoint_holds_the_buffers_of_what_is_kept(train, valid, tmp_path):
    "Of the parameters that validation kept, the statistics as well; the table has every row."
    run = fitted(train, valid, tmp_path, learner=small(norm='per_step', norm_steps=1))
    assert run.learner.buffers and len(run.kept) >= 1
    head, tensors = read_checkpoint(tmp_path)
    assert [tuple(k) for k in head['kept']] == [k[:2] for k in run.kept]
    for i, (*_, theta, buffers) in enumerate(run.kept):
        stored = {f'kept{i}/theta/{k}': v for k, v in theta.items()}
        stored |= {f'kept{i}/buffers/{k}': v for k, v in buffers.items()}
        there = {k: v for k, v in tensors.items() if k.startswith(f'kept{i}/')}
        assert there.keys() == stored.keys() and buffers
        assert all(torch.equal(v, stored[k]) for k, v in there.items())
    table = pd.read_csv(tmp_path / 'metrics.csv')
    assert table.iteration.tolist() == [row['iteration'] for row in run.history]


@pytest.fixture(scope='module')
def half_done(tmp_path_factory, noise_bank):
    "The folder of a training that has kept parameters."
    folder = tmp_path_factory.mktemp('half_done')
    tasks = EpisodeSampler(noise_bank, 5, 1, 3, seed=0)
    fitted(tasks, tasks(seed=99), folder)
    return folder


def test_a_learner_in_a_configuration():
    "An earlier checkpoint continues only if these words and their values stay."
    layers = 'conv1', 'conv2', 'conv3', 'conv4', 'head'
    assert describe(MAML(conv4(size=16, filters=2), 3)) == dict(
        method='MAML',
        parameters='d6daf29e',
        adapted=' '.join(f'{layer}.{name}' for layer in layers for name in ('weight', 'bias')),
        backbone="Conv4(channels=1, size=16, filters=2, down='max_pool', average=False, leak=0.01, "
        "norm='transductive', norm_steps=None, affine_per_step=True, affine='both', eps=1e-05, "
        "conv_init='xavier_uniform')",
        head='Rows(n_way=3)',
        n_way=3,
        inner_lr=0.4,
        inner_steps=1,
        order=2,
        adapts='all_but_norm',
        reduction='mean',
        head_init='xavier_uniform',
        seed=0,
    )


def test_the_configuration_in_a_checkpoint(train, valid, tmp_path):
    "A checkpoint of an earlier version continues only if these words and their values stay."
    options = dict(clip=10, betas=(0.5, 0.9), select='top_3', task_loss='sum')
    fitted(train, valid, tmp_path, iterations=1, plan=LOW, **options)
    config = read_checkpoint(tmp_path)[0]['config']
    assert config.pop('learner') == describe(small())
    assert config == dict(
        train=train.describe(2),
        optimizer='adam',
        task_loss='sum',
        iterations=1,
        meta_batch=2,
        meta_lr=1e-3,
        schedule='Cosine(final=0.01)',
        clip='ClipValue(bound=10)',
        betas=[0.5, 0.9],
        precision='bf16',
        valid=f'{valid.describe(6)}, 6 every 8',
        select='top_3',
        log_every=4,
    )


def test_a_run_may_go_on_by_another_plan(train, valid, tmp_path, stopped):
    "And be saved more or less often: that is not part of what it is."
    stopped(13, lambda: fitted(train, valid, tmp_path))
    plan = plan_for('cpu', 'batched')
    assert fitted(train, valid, tmp_path, plan=plan, save_every=9).iteration == 24


def test_read_only_folder(train, valid, read_only):
    said = 'cannot write .*checkpoint.safetensors: make .* writable, or choose another folder'
    with pytest.raises(PermissionError, match=said):
        fitted(train, valid, read_only)


def test_full_disk(train, small_disk):
    m = MAML(conv4(size=16, filters=64), 5)
    with pytest.raises(OSError, match='no space left to write .*checkpoint.safetensors: free some'):
        fit(m, train, 5, meta_batch=2, checkpoint=small_disk, progress=False)
    assert not [p for p in small_disk.rglob('*') if p.is_file()]


TWENTY = MAML(conv4(size=16, filters=4), 20)


@pytest.mark.parametrize(
    'kw,words',
    [
        (dict(iterations=0), 'iterations=0'),
        (dict(meta_batch=0), 'meta_batch=0'),
        (dict(meta_batch=2.5), 'meta_batch=2.5'),
        (dict(meta_lr=0), 'meta_lr=0'),
        (dict(valid_every=-1), 'valid_every=-1'),
        (dict(select='first'), "select='first'.*best, last, top_3"),
        (dict(select='top_0'), 'top_0'),
        (dict(optimizer='lion'), "optimizer='lion': choose one of 'adam', 'sgd', 'nesterov'"),
        (dict(task_loss='median'), "task_loss='median': choose one of 'mean', 'sum'"),
        (dict(schedule='line'), "schedule='line': choose one of 'constant', 'cosine'"),
        (dict(learner=TWENTY), 'episodes of n_way=5 for a learner of n_way=20'),
    ],
)
def test_bad_numbers(train, valid, kw, words):
    with pytest.raises(ValueError, match=words):
        fitted(train, valid, **kw)


def test_metrics_are_a_table(train, valid, tmp_path):
    run = fitted(train, valid, tmp_path)
    table = pd.read_csv(tmp_path / 'metrics.csv')
    assert table.iteration.tolist() == [4, 8, 12, 16, 20, 24]
    columns = ['iteration', 'loss', 'accuracy', 'lr', 'seconds', 'val_accuracy', 'val_loss']
    assert list(table) == columns
    assert table.val_accuracy.notna().sum() == table.val_loss.notna().sum() == 3
    assert np.allclose(table.loss, [r['loss'] for r in run.history])


# ---- the rows of the metrics
def test_every_row_is_a_mean_over_as_many_iterations(train, valid):
    "A validation between two rows makes no row of few iterations, and stands at its own time."
    single = [row['loss'] for row in fitted(train, valid, log_every=1).history]
    history = fitted(train, valid, log_every=5, valid_every=8).history
    assert [row['iteration'] for row in history] == [5, 8, 10, 15, 16, 20, 24]
    for row in history:
        i = row['iteration']
        assert row['loss'] == pytest.approx(np.mean(single[max(0, i - 5) : i]), abs=1e-6)
    assert [row['iteration'] for row in history if row['val_accuracy'] is not None] == [8, 16, 24]


@pytest.mark.parametrize('stop', [6, 8, 11])
def test_such_rows_after_a_resume(train, valid, tmp_path, stopped, stop):
    how = dict(log_every=5, valid_every=8, save_every=3)
    stopped(stop, lambda: fitted(train, valid, tmp_path / 'b', **how))
    whole, again = (fitted(train, valid, tmp_path / name, **how) for name in 'ab')
    assert without_seconds(again.history) == without_seconds(whole.history)
    tables = [pd.read_csv(tmp_path / name / 'metrics.csv') for name in 'ab']
    a, b = (table.drop(columns='seconds') for table in tables)
    assert a.equals(b)


def test_the_validation_loss_is_that_of_the_last_step(train, valid):
    run = fitted(train, valid, learner=small(inner_steps=2), select='last')
    ep, learner = valid[0:6], run.learner
    logits = learner.predict(learner.adapt(ep.xs, ep.ys), ep.xq)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ep.yq.flatten())
    assert run.history[-1]['val_loss'] == pytest.approx(loss.item(), abs=1e-4)
    assert run.history[0]['val_loss'] is None


def test_a_checkpoint_without_validation_losses(train, valid, tmp_path, stopped):
    "As earlier versions wrote them, with nothing kept of the iterations before the last row."
    stopped(13, lambda: fitted(train, valid, tmp_path))
    head, tensors = read_checkpoint(tmp_path)
    old = [{k: v for k, v in row.items() if k != 'val_loss'} for row in head['history']]
    head |= dict(history=old, pending=[])
    save_tensors(tmp_path / 'checkpoint.safetensors', 'run', head, tensors)
    again = fitted(train, valid, tmp_path)
    assert same(again.learner, fitted(train, valid).learner)
    losses = [row['val_loss'] for row in again.history]
    assert [loss is None for loss in losses] == [True] * 3 + [False, True, False]
    again.plot()


# ---- the plan that is chosen
def case_of(tasks, size=28, filters=64, images=(5, 75), **net):
    "A learner and a meta-batch without numbers."
    learner = MAML(conv4(size=size, filters=filters, **net), 5)
    xs, xq = (torch.empty(tasks, n, 1, size, size, device='meta') for n in images)
    ys, yq = (torch.empty(tasks, n, dtype=torch.int64, device='meta') for n in images)
    return learner, Episodes(xs, ys, xq, yq)


@pytest.mark.parametrize(
    'tasks,cores,chunk,case',
    [
        (16, 2, 4, {}),
        (8, 2, 4, {}),
        (5, 2, 3, {}),
        (2, 2, 1, {}),
        (32, 2, 6, {}),
        (16, 8, 2, {}),
        (16, 64, 1, {}),
        (16, 2, 8, dict(filters=32)),
        (4, 2, 1, dict(size=84, filters=48)),
        (8, 2, 4, dict(images=(20, 100))),
        (16, 2, 4, dict(norm='affine_only')),
        (16, 2, 1, dict(norm='support')),  # PyTorch's convolutions, task by task
        (16, 2, 1, dict(filters=40)),
    ],
)
def test_tasks_share_calls(tasks, cores, chunk, case, monkeypatch):
    monkeypatch.setattr('fewshotmeta.training.gradient.available_cores', lambda: cores)
    plan = plan_of(*case_of(tasks, **case))
    assert plan.chunk == chunk
    assert len(plan.chunks(tasks)) >= min(tasks, cores)
    assert plan_of(*case_of(tasks, **case), calls=tasks).chunk == 1


@pytest.mark.parametrize(
    'tasks,cores,chunk,filters',
    [(2, 2, 2, 16), (3, 2, 3, 16), (4, 2, 4, 16), (8, 2, 4, 16), (16, 16, 4, 16), (2, 2, 1, 32)],
)
def test_small_tasks_share_a_call_even_if_a_core_stays_idle(
    tasks, cores, chunk, filters, monkeypatch
):
    monkeypatch.setattr('fewshotmeta.training.gradient.available_cores', lambda: cores)
    case = case_of(tasks, filters=filters, images=(5, 25))
    assert plan_of(*case).chunk == chunk
    assert plan_of(*case, calls=tasks).chunk == min(chunk, 4)
    assert plan_of(*case, calls=ONE_A_TASK).chunk == 1  # a checkpoint of an earlier version


def test_without_the_kernels_each_task_has_its_call(monkeypatch):
    monkeypatch.setattr('fewshotmeta.learners.backbones.library', lambda dtype: None)
    assert plan_of(*case_of(16)).chunk == 1


def on_cores(n, monkeypatch):
    for room in 'fit', 'gradient':
        monkeypatch.setattr(f'fewshotmeta.training.{room}.available_cores', lambda: n)


def test_a_run_that_is_continued_on_other_cores(train, valid, tmp_path, stopped, monkeypatch):
    "Tasks share calls as they did where it began, so it ends in the same bytes."
    monkeypatch.setattr('fewshotmeta.training.gradient._LEAST', 0)  # these tasks are small
    on_cores(2, monkeypatch)
    stopped(13, lambda: fitted(train, valid, tmp_path, meta_batch=8))
    whole = fitted(train, valid, meta_batch=8)
    on_cores(4, monkeypatch)
    assert not same(fitted(train, valid, meta_batch=8).learner, whole.learner)
    again = fitted(train, valid, tmp_path, meta_batch=8)
    assert same(again.learner, whole.learner) and again.calls == 2


def test_a_checkpoint_of_one_task_a_call(train, valid, tmp_path, stopped):
    "As earlier versions wrote them: they did not say so."
    plan = plan_for('cpu', 'threads')
    stopped(13, lambda: fitted(train, valid, tmp_path, plan=plan, meta_batch=8))
    head, tensors = read_checkpoint(tmp_path)
    del head['calls']
    save_tensors(tmp_path / 'checkpoint.safetensors', 'run', head, tensors)
    whole = fitted(train, valid, plan=plan, meta_batch=8).learner
    assert same(fitted(train, valid, tmp_path, meta_batch=8).learner, whole)


# ---- rows for the user
def test_each_row_is_handed_on_when_it_is_complete(train, valid, tmp_path):
    rows = []
    run = fitted(train, valid, tmp_path, log=rows.append)
    assert rows == run.history
    assert rows is not run.history and rows[0] is not run.history[0]
    fitted(train, valid, tmp_path, log=rows.append)
    assert len(rows) == 6, 'a finished run has no new row'


def test_no_row_is_handed_on_twice(train, valid, tmp_path, stopped):
    "What strikes at iteration 17 loses the rows since the checkpoint; they are computed again."
    rows = []
    for stop in (11, 17):
        stopped(stop, lambda: fitted(train, valid, tmp_path, save_every=9, log=rows.append))
    fitted(train, valid, tmp_path, save_every=9, log=rows.append)
    assert [row['iteration'] for row in rows] == [4, 8, 12, 16, 20, 24]
    (tmp_path / 'checkpoint.safetensors').unlink()
    fitted(train, valid, tmp_path, log=rows.append)
    assert [row['iteration'] for row in rows[6:]] == [4, 8, 12, 16, 20, 24], 'a new run'


def test_what_log_raises_comes_after_a_checkpoint(train, valid, tmp_path):
    rows = []

    def broken(row):
        rows.append(row['iteration'])
        if row['iteration'] == 8:
            raise ConnectionError('no network')

    with pytest.raises(ConnectionError, match='no network'):
        fitted(train, valid, tmp_path, log=broken)
    assert read_checkpoint(tmp_path)[0]['iteration'] == 8
    again = fitted(train, valid, tmp_path, log=broken)
    assert rows == [4, 8, 12, 16, 20, 24]
    assert same(again.learner, fitted(train, valid).learner)


# ---- what who looks on sees
class Looking:
    "A `log` that reads what is noted in the folder."

    def __init__(self, folder):
        self.folder, self.seen = folder, []

    def __call__(self, row):
        noted = read_progress(self.folder)
        self.seen.append((noted['phase'], noted['done'], noted['all'], noted['told']))
        assert (noted['iteration'], noted['loss']) == (row['iteration'], row['loss'])


def test_what_is_noted_while_it_trains(train, valid, tmp_path, monkeypatch):
    look, phases = Looking(tmp_path), []
    note = evaluation.note_phase

    def noting(folder, *about):
        note(folder, *about)
        phases.append(about[:3])
        assert read_progress(folder)['iteration'] % 8 == 0

    monkeypatch.setattr(evaluation, 'note_phase', noting)
    monkeypatch.setattr(evaluation, '_NOTE_EVERY', 0)
    fitted(train, valid, tmp_path, log=look, plan=plan_for('cpu', 'loop'))
    assert look.seen == [('training', i, 24, i) for i in (4, 8, 12, 16, 20, 24)]
    assert len(phases) >= 3
    assert {(phase, total) for phase, _, total in phases} == {('validating', 6)}
    assert phases[-1][1] == 6


# ---- to more iterations
KEEPS = dict(schedule=constant, select='top_2', meta_lr=0.02)


@pytest.mark.parametrize('first', [10, 12, 16])
def test_a_finished_run_goes_on_to_more(train, valid, tmp_path, first):
    "Ended between two rows, at a row, and at a validation: the bytes of a run of 24 at once."
    fitted(train, valid, tmp_path / 'b', iterations=first, **KEEPS)
    whole, longer = (fitted(train, valid, tmp_path / name, **KEEPS) for name in 'ab')
    (ha, a), (hb, b) = (read_checkpoint(tmp_path / name) for name in 'ab')
    assert ha['config'] == hb['config']
    assert all(torch.equal(a[k], b[k]) for k in a | b)
    assert ha['kept'] == hb['kept']
    assert without_seconds(whole.history) == without_seconds(longer.history)
    assert longer.learner.members[0].card.iterations == 24


def test_the_end_of_the_shorter_run_pushes_no_candidate_out(train, valid, tmp_path):
    "It was the best when it was the last, and the longer run would not have had it."
    how = KEEPS | dict(select='best', valid_every=9)
    fitted(train, valid, tmp_path, iterations=19, **how)
    longer, whole = fitted(train, valid, tmp_path, **how), fitted(train, valid, **how)
    assert longer.kept[0][1] == whole.kept[0][1]
    assert same(longer.learner, whole.learner)


def test_twenty_and_forty(train, tmp_path):
    "Without validation, and with the defaults of how often what happens."
    for iterations in (20, 40):
        fit(small(), train, iterations, 2, checkpoint=tmp_path / 'b', progress=False)
    whole = fit(small(), train, 40, 2, checkpoint=tmp_path / 'a', progress=False)
    (ha, a), (hb, b) = (read_checkpoint(tmp_path / name) for name in 'ab')
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert without_seconds(ha['history']) == without_seconds(hb['history'])
    assert [row['iteration'] for row in whole.history] == [40]


def test_a_stopped_run_goes_on_to_more(train, valid, tmp_path, stopped):
    stopped(8, lambda: fitted(train, valid, tmp_path, iterations=12, **KEEPS))
    longer, whole = fitted(train, valid, tmp_path, **KEEPS), fitted(train, valid, **KEEPS)
    assert all(same(a, b) for a, b in zip(longer.learner.members, whole.learner.members))


def test_a_step_schedule_goes_on_while_its_first_milestone_is_ahead(train, valid, tmp_path):
    "A fraction of 0.5 is iteration 12 of 24: under 30 iterations, the 13th would have differed."
    steps = dict(schedule=MultiStep((0.5,)))
    fitted(train, valid, tmp_path / 'done', **steps)
    with pytest.raises(BadCheckpoint, match='MultiStep.* the learning rates so far would have'):
        fitted(train, valid, tmp_path / 'done', iterations=30, **steps)


def test_a_step_schedule_of_a_stopped_run(train, valid, tmp_path, stopped):
    steps = dict(schedule=MultiStep((0.5,)))
    stopped(8, lambda: fitted(train, valid, tmp_path, **steps))
    longer = fitted(train, valid, tmp_path, iterations=30, **steps)
    assert same(longer.learner, fitted(train, valid, iterations=30, **steps).learner)


def annealed(**ingredients):
    "MAML++ with some of its ingredients."
    return MAMLpp(conv4(size=16, filters=16), 5, inner_steps=2, **ingredients)


def hyper(mode):
    "HyperMAML with some switch."
    switch = Switch(1, 2, 8, mode)
    return HyperMAML(conv4(size=16, filters=8), 5, width=8, switch=switch)


@pytest.mark.parametrize(
    'learner,words',
    [
        (annealed(msl=MultiStepLoss(0.5)), 'MAMLpp depends on the progress'),
        (annealed(da=0.5), 'MAMLpp depends on the progress'),
        (hyper('update_mix'), 'HyperMAML depends on the progress'),
    ],
)
def test_a_learner_that_depends_on_the_progress_goes_on_to_no_more(
    train, tmp_path, learner, words
):
    options = dict(meta_batch=1, checkpoint=tmp_path, progress=False)
    fit(learner, train, 2, **options)
    before = (tmp_path / 'checkpoint.safetensors').read_bytes()
    said = f'iterations: 2 there, 3 here.*{words}.*begin from the trained learner in a new folder'
    with pytest.raises(BadCheckpoint, match=said):
        fit(learner, train, 3, **options)
    assert (tmp_path / 'checkpoint.safetensors').read_bytes() == before


def test_who_depends_on_the_progress():
    net = conv4(size=16, filters=8)
    fixed = small(), annealed(rates='per_tensor'), hyper('none'), ProtoNet(net), hidra(net, 5)
    assert not any(learner.depends_on_progress for learner in fixed)
    assert mamlpp(net, 5).depends_on_progress and hyper('loss_mix').depends_on_progress


def test_a_learner_that_does_not_say_counts_as_one_that_depends(train, tmp_path, monkeypatch):
    monkeypatch.delattr(MAML, 'depends_on_progress')
    options = dict(meta_batch=1, checkpoint=tmp_path, progress=False)
    fit(small(), train, 2, **options)
    with pytest.raises(BadCheckpoint, match='MAML depends on the progress'):
        fit(small(), train, 3, **options)


@pytest.mark.parametrize('iterations', [8, 12])
def test_fewer_iterations_than_done(train, valid, tmp_path, stopped, iterations):
    stopped(13, lambda: fitted(train, valid, tmp_path, schedule=constant))
    said = f'iterations={iterations}, but .* has done 12 of 24: ask for more than that'
    with pytest.raises(BadCheckpoint, match=said):
        fitted(train, valid, tmp_path, schedule=constant, iterations=iterations)
