"""Several processes, one meta-batch: torchrun on the CPU."""

import subprocess, sys
import pytest, torch
from conftest import ROOT
from fewshotmeta.data.files import read_json
from fewshotmeta.engine.ranks import Ranks
from fewshotmeta.training.checkpoints import read_checkpoint

SCRIPT = '''
import os
import signal
import sys

import torch
import fewshotmeta.training.fit as training
from fewshotmeta.all import *

method, folder, iterations, stop = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
gen = torch.Generator().manual_seed(0)
images = torch.randint(0, 256, (1000, 1, 16, 16), generator=gen, dtype=torch.uint8)
names = [f'class{i:02d}' for i in range(40)]
bank = ImageBank(images, range(0, 1000, 25), [25] * 40, names, name='noise')
norm = dict(norm='per_step', norm_steps=2) if method == 'mamlpp' else {}
body = conv4(size=16, filters=8, **norm)


def made(method):
    if method == 'maml':
        return MAML(body, 5, inner_lr=0.1)
    if method == 'mamlpp':
        return mamlpp(body, 5, inner_steps=2)
    return hidra(body, 6) if method == 'hidra' else HyperMAML(body, 5, width=16)


def in64(episodes):
    return Episodes(*(t.double() if t.is_floating_point() else t for t in episodes))


class In64(EpisodeSampler):
    def meta_batch(self, i, n):
        return in64(super().meta_batch(i, n))

    def __getitem__(self, i):
        return in64(super().__getitem__(i))


tasks = In64(bank, 5, 1, 2, seed=0)
learner = to_dtype(made(method), torch.float64)
step = training._Loop.step


def stopping(self):
    if stop > 0 and self.run.iteration == stop:
        raise KeyboardInterrupt
    if stop < 0 and self.ranks.rank == 1 and self.run.iteration == -stop:
        if stop == -3:
            raise ValueError('rank 1 has had enough')
        os.kill(os.getpid(), signal.SIGINT)
    return step(self)


training._Loop.step = stopping
every = dict(valid_every=4, save_every=2, log_every=2)
options = dict(meta_lr=3e-3, schedule='cosine', clip=10.0, valid=tasks, valid_tasks=4) | every
run = fit(learner, tasks, iterations, meta_batch=5, checkpoint=folder, progress=False, **options)
if Ranks().first:
    print('done', run.iteration)
'''


def train(tmp_path, ranks, method='maml', folder='run', iterations=8, stop=0):
    (tmp_path / 'train.py').write_text(SCRIPT)
    launch = [sys.executable]
    if ranks:
        launch += ['-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', str(ranks)]
    arguments = [tmp_path / 'train.py', method, tmp_path / folder, iterations, stop]
    command = [*launch, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def same(a, b, eps):
    (ha, ta), (hb, tb) = read_checkpoint(a), read_checkpoint(b)
    assert ha['iteration'] == hb['iteration'] and set(ta) == set(tb)
    for k in ta:
        assert torch.allclose(ta[k].double(), tb[k].double(), atol=eps, rtol=0), k
    for x, y in zip(ha['history'], hb['history']):
        assert all(
            x[k] == pytest.approx(y[k], abs=1e-6)
            for k in ('iteration', 'loss', 'accuracy', 'lr')
            if x[k] is not None
        ) and x['val_accuracy'] == pytest.approx(y['val_accuracy'])


@pytest.mark.parametrize('method', ['maml', 'mamlpp', 'hidra', 'hypermaml'])
def test_ranks_give_what_one_process_gives(tmp_path, method):
    "Five tasks over two ranks: to rounding, statistics and validation included; one checkpoint."
    assert 'done 8' in (out := train(tmp_path, 0, method, 'one')).stdout, out.stderr
    assert 'done 8' in (out := train(tmp_path, 2, method, 'two')).stdout, out.stderr
    same(tmp_path / 'one', tmp_path / 'two', 1e-10)
    assert sorted(p.name for p in (tmp_path / 'two').iterdir()) == sorted(
        p.name for p in (tmp_path / 'one').iterdir()
    )


def test_resume_on_another_number_of_ranks(tmp_path):
    "Begun on one, continued on three, finished on two. And more ranks than tasks."
    train(tmp_path, 0, folder='one')
    assert (
        train(tmp_path, 0, stop=2).returncode
        and read_checkpoint(tmp_path / 'run')[0]['iteration'] == 2
    )
    assert (
        train(tmp_path, 3, stop=4).returncode
        and read_checkpoint(tmp_path / 'run')[0]['iteration'] == 4
    )
    assert 'done 8' in (out := train(tmp_path, 2)).stdout, out.stderr
    same(tmp_path / 'one', tmp_path / 'run', 1e-10)
    assert 'done 8' in (out := train(tmp_path, 6, folder='six')).stdout, out.stderr
    same(tmp_path / 'one', tmp_path / 'six', 1e-10)


def test_what_one_rank_is_told_all_do(tmp_path):
    "Ctrl-C that reaches one rank stops all after the same iteration; an error in one ends all."
    out = train(tmp_path, 2, folder='stopped', stop=-5)
    assert out.returncode and read_checkpoint(tmp_path / 'stopped')[0]['iteration'] == 6, out.stderr
    assert 'done 8' in train(tmp_path, 2, folder='stopped').stdout
    out = train(tmp_path, 2, folder='failed', stop=-3)
    assert (
        out.returncode
        and 'rank 1 has had enough' in out.stderr
        and read_checkpoint(tmp_path / 'failed')[0]['iteration'] == 2
    )


def test_shares():
    r = Ranks()
    for size in range(1, 9):
        for n in range(0, 20):
            r.size = size
            got = []
            for r.rank in range(size):
                got += list(range(n))[r.share(n)]
            assert got == list(range(n))


def test_an_experiment_under_torchrun(tmp_path):
    "The runner on two ranks: one result, and the accuracy of one process."
    nb = ROOT / 'nbs' / 'experiments' / 'train.ipynb'
    args = [
        '-m',
        'fewshotmeta.lab.command',
        'run',
        str(nb),
        '--runs',
        str(tmp_path),
        '-p',
        'iterations=4',
        'valid_every=2',
        'valid_tasks=4',
        'test_tasks=10',
        'filters=4',
        'meta_batch=4',
        'test_steps=1',
    ]
    one = subprocess.run(
        [sys.executable, *args, '--name', 'x/one'], capture_output=True, text=True, timeout=300
    )
    two = subprocess.run(
        [
            sys.executable,
            '-m',
            'torch.distributed.run',
            '--standalone',
            '--nproc-per-node',
            '2',
            *args,
            '--name',
            'x/two',
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert one.returncode == two.returncode == 0, one.stderr + two.stderr
    a, b = (read_json(tmp_path / 'x' / n / 'result.json')['metrics'] for n in ('one', 'two'))
    assert abs(a['test_accuracy']['mean'] - b['test_accuracy']['mean']) < 0.1
    assert sorted(p.name for p in (tmp_path / 'x' / 'two').iterdir()) == [
        'checkpoint.safetensors',
        'metrics.csv',
        'notebook.ipynb',
        'result.json',
    ]
