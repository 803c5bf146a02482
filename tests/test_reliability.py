"""Written so that they can fail, and often enough to mean something.

`make reliability` runs them at full length, CI a part.
"""

import json, random, subprocess, sys
from functools import partial
import pytest, torch
from conftest import ROOT, full, mounted
from forks import Fork
from fewshotmeta.learners.backbones import conv4
from fewshotmeta.data.banks import BadBank, ImageBank, load_bank, save_bank
from fewshotmeta.data.episodes import EpisodeSampler
from fewshotmeta.data.files import BadFile, read_json, write_json
from fewshotmeta.learners.hidra import hidra
from fewshotmeta.learners.hypermaml import HyperMAML
from fewshotmeta.learners.anyway_hypermaml import anyway_hypermaml
from fewshotmeta.learners.maml import MAML
from fewshotmeta.learners.mamlpp import mamlpp, meta_sgd
from fewshotmeta.learners.reptile import Reptile
from fewshotmeta.training.checkpoints import BadCheckpoint, read_checkpoint
from fewshotmeta.training.fit import fit


# ---- 1. killed at random moments
def test_killed_at_random_moments(tmp_path, record):
    """SIGKILL while a bank is built, while it trains, while a checkpoint and a result are written.

    Each time continued, in the end the same bytes.
    """
    jobs, kills, kinds = (30, 100, 4) if full() else (3, 6, 2)
    crash = [sys.executable, str(ROOT / 'tests' / 'crash.py'), str(tmp_path), str(jobs), '0']
    out = subprocess.run(crash, capture_output=True, text=True, timeout=1500)
    assert not out.returncode, out.stderr[-2000:]
    seen = json.loads(out.stdout)
    assert seen['identical'] == jobs
    assert seen['resumed'] == seen['kills'] >= kills
    assert len(seen['where']) >= kinds
    record(
        'SIGKILL at random moments: ' + ', '.join(f'{v} {k}' for k, v in seen['where'].items()),
        kills=seen['kills'],
        resumed=seen['resumed'],
        trainings=jobs,
        identical=seen['identical'],
    )


# ---- 2. damaged files
def damaged(whole, header, rng):
    """The file cut at every kilobyte, and with one byte changed.

    The byte is changed in every kilobyte, and at many places of the first `header` bytes.
    """
    size = len(whole)
    for cut in range(0, size, 1024):
        yield f'cut at {cut}', whole[:cut]
    at = [rng.randrange(k, min(k + 1024, size)) for k in range(0, size, 1024)]
    at += rng.sample(range(header), min(header, 600 if full() else 120))
    for i in at:
        changed = bytes([whole[i] ^ rng.randint(1, 255)])
        yield f'byte {i} changed', whole[:i] + changed + whole[i + 1 :]


def try_all(path, read, error, same, header):
    """How many damaged versions there were, and how many were refused, each by name.

    The others read as what was stored (a blank in the padding).
    """
    whole, rng = path.read_bytes(), random.Random(0)
    cases = refused = 0
    for what, data in damaged(whole, header, rng):
        path.write_bytes(data)
        cases += 1
        try:
            got = read(path)
        except error as e:
            refused += 1
            assert path.name in str(e), (what, e)
        else:
            assert same(got), what
    path.write_bytes(whole)
    assert same(read(path))
    return dict(damaged=cases, refused=refused, read_as_stored=cases - refused)


def read_folder(path):
    return read_checkpoint(path.parent)


def test_damaged_checkpoints(tmp_path, noise_bank, record):
    fit(
        MAML(conv4(size=16, filters=8), 5, inner_lr=0.1),
        EpisodeSampler(noise_bank, 5, 1, 2),
        2,
        meta_batch=2,
        checkpoint=tmp_path,
        log_every=1,
        progress=False,
    )
    head, tensors = read_checkpoint(tmp_path)

    def same(got):
        if got[0] != head or set(got[1]) != set(tensors):
            return False
        pairs = [(got[1][k], v) for k, v in tensors.items()]
        return all(torch.equal(a, b) and a.dtype == b.dtype for a, b in pairs)

    file = tmp_path / 'checkpoint.safetensors'
    found = try_all(file, read_folder, BadCheckpoint, same, 8_000)
    assert found['refused'] > 0.97 * found['damaged']
    record('checkpoints cut or with a changed byte', **found)


def test_damaged_banks(tmp_path, record):
    gen = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (200, 1, 28, 28), dtype=torch.uint8, generator=gen)
    names = [f'class{i}' for i in range(10)]
    bank = ImageBank(images, range(0, 200, 20), [20] * 10, names, name='noise')
    file = tmp_path / 'noise.safetensors'
    save_bank(bank, file, dict(set='noise'))

    def read(path):
        return load_bank(path, dict(set='noise'))

    def same(got):
        return (
            got.digest == bank.digest
            and got.name == bank.name
            and got.images.dtype == torch.uint8
            and got.classes == bank.classes
            and (got.start == bank.start).all()
        )

    found = try_all(file, read, BadBank, same, 1_500)
    assert found['refused'] > 0.97 * found['damaged']
    record('banks cut or with a changed byte', **found)


def test_damaged_results(tmp_path, record):
    some = sorted((ROOT / 'runs').glob('*/*/result.json'))[0]
    stored, file = read_json(some), tmp_path / 'result.json'
    write_json(file, stored)

    def same(got):
        return got == stored

    found = try_all(file, read_json, BadFile, same, len(some.read_bytes()) - 2)
    record('result JSON cut or with a changed byte', **found)


def train_in(folder, tasks):
    "A short training that writes a checkpoint after every iteration."
    return fit(
        MAML(conv4(size=16, filters=4), 5, inner_lr=0.1),
        tasks,
        6,
        meta_batch=2,
        checkpoint=folder,
        save_every=1,
        log_every=1,
        valid=tasks,
        valid_tasks=2,
        valid_every=2,
        select='top_3',
        progress=False,
    )


def refused_for_space(disk, tasks):
    "Whether the training in `disk`'s folder was refused; then by name, and what is there is whole."
    run, refused = disk / 'run', False
    try:
        train_in(run, tasks)
    except OSError as e:
        refused = True
        assert 'no space left to write' in str(e), e
        assert str(disk) in str(e), e
    if (run / 'checkpoint.safetensors').exists():
        read_checkpoint(run)
    assert not list(run.glob('.checkpoint*partial'))
    return refused


def test_disk_full_at_every_size(tmp_path, noise_bank, record):
    """A training on ever larger disks that are too small.

    It is refused by name, what is there is whole, and with room again it ends in the same bytes.
    """
    tasks = EpisodeSampler(noise_bank, 5, 1, 2)
    train_in(tmp_path / 'undisturbed', tasks)
    want = read_checkpoint(tmp_path / 'undisturbed')[0]['tensors']
    sizes, refused = range(8, 100, 8 if full() else 24), 0
    for kb in sizes:
        for disk in mounted(tmp_path / f'disk{kb}', f'size={kb}k'):
            refused += refused_for_space(disk, tasks)
            subprocess.run(['mount', '-o', 'remount,size=1m', str(disk)], check=True)
            train_in(disk / 'run', tasks)
            assert read_checkpoint(disk / 'run')[0]['tensors'] == want
    assert refused >= len(sizes) // 2
    record(
        'disk full while training, then with room again',
        disks=len(sizes),
        refused_by_name=refused,
        identical_in_the_end=len(sizes),
    )


def test_read_only_folders(read_only, noise_bank, monkeypatch, record):
    "Checkpoint, bank, result: refused by name at once, or, for the cache, worked without."
    from fewshotmeta.data.banks import cached
    from fewshotmeta.lab.runs import run_notebook

    with pytest.raises(PermissionError, match=f'cannot write {read_only}'):
        fit(
            MAML(conv4(size=16, filters=4), 5),
            EpisodeSampler(noise_bank, 5, 1, 2),
            2,
            checkpoint=read_only / 'run',
            progress=False,
        )
    with pytest.raises(PermissionError, match=f'cannot write {read_only}'):
        run_notebook(ROOT / 'nbs' / 'experiments' / 'train.ipynb', {}, 'a/b', read_only, quiet=True)
    monkeypatch.setenv('FEWSHOTMETA_CACHE', str(read_only))
    with pytest.warns(UserWarning, match='bank not cached'):
        assert cached(dict(set='noise'), lambda: noise_bank).digest == noise_bank.digest
    record(
        'folders that cannot be written: of checkpoints, results, banks',
        folders=3,
        refused_by_name=2,
        worked_without=1,
    )


# ---- 4. one bank
BUILD = '''
import os, sys, time, torch
from fewshotmeta.data.banks import ImageBank, cached
def build():
    with open(sys.argv[1], 'a') as f:
        print(os.getpid(), file=f)
    time.sleep(.5)
    return ImageBank(torch.zeros(100, 1, 16, 16, dtype=torch.uint8), [0], [100], ['a'])
while not os.path.exists(sys.argv[1]):
    time.sleep(.01)
print(cached(dict(set='one'), build).digest)
'''


def test_many_processes_build_one_bank(tmp_path, record):
    "Started together, they build it once, and all have it."
    log, cache = tmp_path / 'log', str(tmp_path / 'cache')
    started = [Fork(BUILD, log, FEWSHOTMETA_CACHE=cache) for _ in range(8)]
    log.write_text('')
    said = {fork.wait().stdout for fork in started}
    assert len(said) == 1
    assert said != {''}
    assert len(log.read_text().splitlines()) == 1
    record('processes building the same bank at once', processes=8, built=1)


# ---- 7. exactness, every method
SMALL = dict(size=16, filters=8)
METHODS = dict(
    maml=partial(MAML, inner_lr=0.1),
    fomaml=partial(MAML, inner_lr=0.1, order=1),
    meta_sgd=meta_sgd,
    reptile=Reptile,
    mamlpp=partial(mamlpp, inner_steps=2),
    hidra=hidra,
    hypermaml=partial(HyperMAML, width=16),
    anyway_hypermaml=partial(anyway_hypermaml, width=16),
)
ROWS = dict(hidra=6, anyway_hypermaml=6)  # any number of ways up to this; the others: five
NORMS = dict(mamlpp=dict(norm='per_step', norm_steps=2))


def fresh(method):
    "A learner of the method on a small backbone."
    return METHODS[method](conv4(**SMALL, **NORMS.get(method, {})), ROWS.get(method, 5))


@pytest.mark.parametrize('method', METHODS)
def test_same_seed_same_bytes(tmp_path, noise_bank, stopped, record, method):
    "Twice in one process, and stopped and resumed at every iteration."
    tasks = EpisodeSampler(noise_bank, 5, 1, 2, seed=0)

    def go(folder):
        return fit(
            fresh(method),
            tasks,
            6,
            meta_batch=3,
            meta_lr=3e-3,
            valid=tasks,
            valid_tasks=4,
            valid_every=2,
            save_every=6,
            log_every=2,
            checkpoint=tmp_path / folder,
            progress=False,
        )

    go('a')
    go('b')
    for i in range(1, 6):
        stopped(i, lambda: go('stopped'))
    go('stopped')
    a, *others = (read_checkpoint(tmp_path / n)[0]['tensors'] for n in ('a', 'b', 'stopped'))
    assert others == [a, a]
    record(f'same bytes: {method}, again and resumed at every iteration', trainings=2, identical=2)
