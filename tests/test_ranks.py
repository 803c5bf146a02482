"""Several processes, one meta-batch: torchrun on the CPU."""

import subprocess
import sys

import pytest
import torch
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


def train(tmp_path, ranks, folder='run', methods=('maml',), stop=0):
    "Eight iterations of each method, in so many ranks; 0: without torchrun."
    (tmp_path / 'train.py').write_text(SCRIPT)
    launch = [sys.executable]
    if ranks:
        launch += ['-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', ranks]
    command = [*launch, tmp_path / 'train.py', tmp_path / folder, 8, stop, *methods]
    return subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300)


@pytest.fixture(scope='module')
def alone(tmp_path_factory):
    "A folder with what one process gives, a folder for each method."
    folder = tmp_path_factory.mktemp('alone')
    every = *METHODS, 'few'
    done = train(folder, 0, 'one', every)
    assert done.stdout.count('done 8') == len(every), done.stderr
    return folder / 'one'


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
    out = train(tmp_path, 2, 'two', METHODS)
    for method in METHODS:
        assert f'{method} done 8' in out.stdout, out.stderr
        same(alone / method, tmp_path / 'two' / method)
        assert files(tmp_path / 'two' / method) == files(alone / method)


def test_resume_on_another_number_of_ranks(tmp_path, alone):
    "Begun on one, continued on three, finished on two."
    for ranks, stop in (0, 2), (3, 4):
        assert train(tmp_path, ranks, stop=stop).returncode
        assert read_checkpoint(tmp_path / 'run/maml')[0]['iteration'] == stop
    assert 'done 8' in (out := train(tmp_path, 2)).stdout, out.stderr
    same(alone / 'maml', tmp_path / 'run/maml')


def test_more_ranks_than_tasks(tmp_path, alone):
    "Three ranks share two tasks: one of them has none."
    assert 'done 8' in (out := train(tmp_path, 3, methods=['few'])).stdout, out.stderr
    same(alone / 'few', tmp_path / 'run/few')


def test_what_one_rank_is_told_all_do(tmp_path):
    "Ctrl-C that reaches one rank stops all after the same iteration; an error in one ends all."
    out = train(tmp_path, 2, 'stopped', stop=-5)
    assert out.returncode
    assert read_checkpoint(tmp_path / 'stopped/maml')[0]['iteration'] == 6, out.stderr
    assert 'done 8' in train(tmp_path, 2, 'stopped').stdout
    out = train(tmp_path, 2, 'failed', stop=-3)
    assert out.returncode and 'rank 1 has had enough' in out.stderr
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
    "The runner on two ranks: one result, and the accuracy of one process."
    sizes = dict(iterations=4, valid_every=2, valid_tasks=4, test_tasks=10, filters=4)
    sizes |= dict(meta_batch=4, test_steps=1)
    nb = ROOT / 'nbs' / 'experiments' / 'train.ipynb'
    args = ['-m', 'fewshotmeta.lab.command', 'run', nb, '--runs', tmp_path, '-p']
    args += [f'{name}={value}' for name, value in sizes.items()]
    torchrun = ['-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2']
    metrics = []
    for launch, name in ([], 'one'), (torchrun, 'two'):
        command = [sys.executable, *launch, *map(str, args), '--name', f'x/{name}']
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        metrics.append(read_json(tmp_path / 'x' / name / 'result.json')['metrics'])
    one, two = (m['test_accuracy']['mean'] for m in metrics)
    assert abs(one - two) < 0.1
    kept = ['checkpoint.safetensors', 'metrics.csv', 'notebook.ipynb', 'result.json', 'tasks.csv']
    assert files(tmp_path / 'x' / 'two') == kept
