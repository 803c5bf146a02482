"""Several processes, one meta-batch: on the CPU, started as torchrun does or by itself."""

import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT
from forks import Fork, run
from fewshotmeta.data.files import read_json, write_json
from fewshotmeta.engine.ranks import Ranks
from fewshotmeta.training.checkpoints import read_checkpoint
from tiny import run_here

SCRIPT = '''
import os
import signal
import sys

import torch
import fewshotmeta.training.fit as training
from fewshotmeta.all import *

folder, iterations, stop, methods = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]
gen = torch.Generator().manual_seed(0)
images = torch.randint(0, 256, (1000, 1, 16, 16), generator=gen, dtype=torch.uint8)
names = [f'class{i:02d}' for i in range(40)]
bank = ImageBank(images, range(0, 1000, 25), [25] * 40, names, name='noise')


def made(method):
    norm = dict(norm='per_step', norm_steps=2) if method == 'mamlpp' else {}
    body = conv4(size=16, filters=8, **norm)
    if method in ('maml', 'few'):
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
for method in methods:
    size = 2 if method == 'few' else 5
    learner, place = to_dtype(made(method), torch.float64), f'{folder}/{method}'
    more = dict(checkpoint=place, progress=False) | options
    run = fit(learner, tasks, iterations, meta_batch=size, **more)
    if Ranks().first:
        print(method, 'done', run.iteration)
'''


METHODS = 'maml', 'mamlpp', 'hidra', 'hypermaml'
pytestmark = pytest.mark.xdist_group('ranks')  # share the trainings of one process


def launched(ranks):
    "What torchrun tells each rank: where they meet, in a store that is kept for them."
    store = dist.TCPStore('localhost', 0, is_master=True, wait_for_workers=False)
    shared = dict(MASTER_ADDR='localhost', MASTER_PORT=str(store.port), WORLD_SIZE=str(ranks))
    shared |= dict(TORCHELASTIC_USE_AGENT_STORE='True', TORCHELASTIC_RESTART_COUNT='0')
    told = [shared | dict(RANK=str(i), LOCAL_RANK=str(i)) for i in range(ranks)]
    return store, told


def train(folder, ranks, methods=('maml',), stop=0):
    "Eight iterations of each method, in so many ranks; 0: in none. What each rank said."
    given = SCRIPT, folder, 8, stop, *methods
    if not ranks:
        return [run(*given)]
    store, told = launched(ranks)  # the store lives until they are through
    return [fork.wait() for fork in [Fork(*given, **env) for env in told]]


def done(said, methods=('maml',)):
    "Whether the ranks came to the end, and the first of them said so of each method."
    assert not any(rank.returncode for rank in said), said
    expected = [f'{method} done 8' for method in methods]
    assert [rank.stdout.splitlines() for rank in said] == [expected, *[[]] * (len(said) - 1)], said


@pytest.fixture(scope='module')
def alone(tmp_path_factory):
    "A folder with what one process gives, a folder for each method."
    folder = tmp_path_factory.mktemp('alone')
    every = *METHODS, 'few'
    done(train(folder, 0, every), every)
    return folder


def same(a, b, eps=1e-10):
    (ha, ta), (hb, tb) = read_checkpoint(a), read_checkpoint(b)
    assert ha['iteration'] == hb['iteration'] and set(ta) == set(tb)
    for k in ta:
        assert torch.allclose(ta[k].double(), tb[k].double(), atol=eps, rtol=0), k
    assert len(ha['history']) == len(hb['history'])
    for x, y in zip(ha['history'], hb['history']):
        for k in ('iteration', 'loss', 'accuracy', 'lr'):
            assert x[k] == pytest.approx(y[k], abs=1e-6)
        assert x['val_accuracy'] == pytest.approx(y['val_accuracy'])


def files(folder):
    return sorted(p.name for p in folder.iterdir())


def test_ranks_give_what_one_process_gives(tmp_path, alone):
    "Five tasks over two ranks: to rounding, statistics and validation included; one checkpoint."
    done(train(tmp_path, 2, METHODS), METHODS)
    for method in METHODS:
        same(alone / method, tmp_path / method)
        assert files(tmp_path / method) == files(alone / method)


def test_resume_on_another_number_of_ranks(tmp_path, alone):
    "Begun on one, continued on three, finished on two."
    for ranks, stop in (0, 2), (3, 4):
        assert all(rank.returncode for rank in train(tmp_path, ranks, stop=stop))
        assert read_checkpoint(tmp_path / 'maml')[0]['iteration'] == stop
    done(train(tmp_path, 2))
    same(alone / 'maml', tmp_path / 'maml')


def test_more_ranks_than_tasks(tmp_path, alone):
    "Three ranks share two tasks: one of them has none."
    done(train(tmp_path, 3, ['few']), ['few'])
    same(alone / 'few', tmp_path / 'few')


def test_what_one_rank_is_told_all_do(tmp_path):
    "Ctrl-C that reaches one rank stops all after the same iteration; an error in one ends all."
    said = train(tmp_path / 'stopped', 2, stop=-5)
    assert all('KeyboardInterrupt' in rank.stderr for rank in said), said
    assert read_checkpoint(tmp_path / 'stopped/maml')[0]['iteration'] == 6
    done(train(tmp_path / 'stopped', 2))
    said = train(tmp_path / 'failed', 2, stop=-3)
    assert all(rank.returncode for rank in said)
    assert 'rank 1 has had enough' in said[1].stderr
    assert read_checkpoint(tmp_path / 'failed/maml')[0]['iteration'] == 2


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
    "The runner on two ranks: one result, for one from before, and the accuracy of one process."
    write_json(tmp_path / 'x' / 'two' / 'result.json', dict(metrics=dict(before=1)))
    sizes = dict(iterations=4, valid_every=2, valid_tasks=4, test_tasks=10, filters=4)
    sizes |= dict(meta_batch=4, test_steps=1)
    nb = ROOT / 'nbs' / 'experiments' / 'train.ipynb'
    args = ['-m', 'fewshotmeta.lab.command', 'run', nb, '--runs', tmp_path, '--name', 'x/two']
    args += ['--force', '-p', *(f'{name}={value}' for name, value in sizes.items())]
    torchrun = ['-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2']
    command = [sys.executable, *torchrun, *map(str, args)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    two = read_json(tmp_path / 'x' / 'two' / 'result.json')['metrics']['test_accuracy']['mean']
    one = run_here(nb, sizes, tmp_path / 'one')['metrics']['test_accuracy']['mean']
    assert abs(one - two) < 0.1
    kept = ['checkpoint.safetensors', 'learner.safetensors', 'metrics.csv', 'notebook.ipynb']
    kept += ['result.json', 'tasks.csv']
    assert files(tmp_path / 'x' / 'two') == kept
    assert not list((tmp_path / '.new').glob('*/*'))
