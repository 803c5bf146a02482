"""Shared by all tests: real data where FEWSHOTMETA_DATA says, visible skips elsewhere."""

import json
import os
import subprocess
import sys
from pathlib import Path

# what nbformat checks files by builds a grammar of internationalised addresses, if it finds that
# package: more than a second in each process, and notebooks have none
sys.modules.setdefault('rfc3987_syntax', None)

import pytest
import torch

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope='session')
def real_data():
    "The data root, for tests on real data."
    root = os.environ.get('FEWSHOTMETA_DATA')
    from fewshotmeta.data.datasets import data_status

    if not root:
        pytest.skip('no real data: FEWSHOTMETA_DATA is not set')
    needed = {'omniglot', 'emnist', 'mini_imagenet'}
    if lacking := needed - {row['name'] for row in data_status(root) if row['found']}:
        pytest.skip(f'no real data: {root} lacks {", ".join(sorted(lacking))}')
    return Path(root)


def full():
    "Whether the reliability tests run at full length, as `make reliability` does."
    return bool(os.environ.get('FEWSHOTMETA_RECORD'))


def pytest_collection_modifyitems(config, items):
    "Leave out what records nothing, where only that is asked for."
    if os.environ.get('FEWSHOTMETA_RECORD_ONLY'):
        kept = [item for item in items if 'record' in item.fixturenames]
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept


@pytest.fixture
def record(request):
    """`record(what, tries=…, survived=…)` keeps what a reliability test found.

    The page Workers shows it; rows of the same words are added up.
    """

    def keep(what, **figures):
        if full():
            found = dict(what=what, test=request.node.nodeid, **figures)
            with open(os.environ['FEWSHOTMETA_RECORD'], 'a') as f:
                print(json.dumps(found), file=f)

    return keep


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    "An empty cache folder."
    monkeypatch.setenv('FEWSHOTMETA_CACHE', str(tmp_path / 'cache'))
    return tmp_path / 'cache'


@pytest.fixture(scope='session')
def noise_bank():
    "40 classes of 25 random images, 16×16: a data set that costs nothing."
    from fewshotmeta.data.banks import ImageBank

    gen = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (1000, 1, 16, 16), generator=gen, dtype=torch.uint8)
    names = [f'class{i:02d}' for i in range(40)]
    return ImageBank(images, range(0, 1000, 25), [25] * 40, names, name='noise')


@pytest.fixture
def stopped(monkeypatch):
    "`stopped(7, go)` runs `go` up to iteration 7 of a training, where Ctrl-C comes."
    import fewshotmeta.training.fit as T

    step = T._Loop.step

    def run(iteration, go):
        def stop(self):
            if self.run.iteration == iteration:
                raise KeyboardInterrupt
            return step(self)

        with monkeypatch.context() as p:
            p.setattr(T._Loop, 'step', stop)
            with pytest.raises(KeyboardInterrupt):
                go()

    return run


@pytest.fixture
def resumed(stopped, tmp_path):
    "`resumed(go, 2, 7)`: `go(folder)`, stopped and begun again, gives the same bytes as at once."

    def run(go, *iterations):
        whole = go(tmp_path / 'a')
        for iteration in iterations:
            stopped(iteration, lambda: go(tmp_path / 'b'))
        again = go(tmp_path / 'b')
        for kind in ('theta', 'buffers'):
            once, twice = getattr(whole, kind), getattr(again, kind)
            assert once.keys() == twice.keys()
            assert [k for k in once if not torch.equal(once[k], twice[k])] == []
        return whole

    return run


def mounted(folder, options):
    "A small file system that binds root, too; a visible skip where none can be mounted."
    folder.mkdir()
    command = ['mount', '-t', 'tmpfs', '-o', options, 'tmpfs', str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f'cannot mount a file system here: {done.stderr.strip()}')
    yield folder
    subprocess.run(['umount', '-l', str(folder)], check=True)


@pytest.fixture
def small_disk(tmp_path):
    "A file system of 256 kB."
    yield from mounted(tmp_path / 'small', 'size=256k')


@pytest.fixture
def read_only(tmp_path):
    "A read-only file system."
    yield from mounted(tmp_path / 'ro', 'ro,size=64k')
