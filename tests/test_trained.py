"""Trained learners in experiments: kept by their run, measured by others, begun from."""

import shutil
from dataclasses import replace

import pytest
import torch
from PIL import Image
from conftest import ROOT
from fewshotmeta.all import *
from tiny import run_here

EXPERIMENTS = ROOT / 'nbs' / 'experiments'
SMALL = dict(filters=8, inner_lr=0.1, test_query=5, test_tasks=4)
TRAINING = SMALL | dict(iterations=2, meta_batch=2, valid_every=2, valid_tasks=2)


def execute(notebook, folder, **given):
    "Execute an experiment as the run of a folder; what it reported."
    folder.mkdir(parents=True, exist_ok=True)
    return run_here(notebook, given, folder)


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    "The folder of a run of Train, 5-way MAML, and what it reported."
    folder = tmp_path_factory.mktemp('runs') / 'train' / 'maml'
    found = execute(EXPERIMENTS / 'train.ipynb', folder, method='maml', **TRAINING)
    return folder, found


def test_one_training_serves_every_experiment(trained, tmp_path):
    "None of them trains, and all of them measure the same learner."
    folder, found = trained
    given = dict(learner=str(folder / 'learner.safetensors'), test_query=5)
    tests = given | dict(test_tasks=4)
    for name, more in dict(
        test=tests | dict(method='maml', test_steps=1),
        ways=tests | dict(test_ways=[5], test_steps=1),
        neurons=tests | dict(test_steps=1),
        adaptation_timing=tests | dict(steps=[0, 1], published_tasks=2, repeats=1),
    ).items():
        again = execute(EXPERIMENTS / f'{name}.ipynb', tmp_path / 'x' / name, **more)
        accuracy = again['metrics']['test_accuracy']
        assert accuracy['mean'] == pytest.approx(found['metrics']['test_accuracy']['mean'])
        assert again['episodes_digest'] == found['episodes_digest']
        assert 'training_seconds' not in again['metrics']
        left = {path.name for path in (tmp_path / 'x' / name).iterdir()}
        assert not left & {'learner.safetensors', 'checkpoint.safetensors', 'metrics.csv'}


@pytest.mark.parametrize(
    'notebook,given,words',
    [
        ('ways', dict(method='hidra'), "method='hidra', but the learner was trained with"),
        ('ways', dict(test_ways=[7]), 'maml is bound to 5 ways'),
        ('test', dict(test_steps=2, norm='per_step'), 'per_step'),
        ('test', dict(n_way=7), 'n_way=7 for a learner of n_way=5'),
        ('test', dict(part='novel'), "part='novel': choose one of 'train', 'val', 'test'"),
        ('neurons', dict(n_way=7), 'n_way=7 for a learner of n_way=5'),
    ],
)
def test_what_does_not_fit_the_learner_is_refused(trained, tmp_path, notebook, given, words):
    learner = str(trained[0] / 'learner.safetensors')
    with pytest.raises(ValueError, match=words):
        execute(EXPERIMENTS / f'{notebook}.ipynb', tmp_path / 'x' / 'y', learner=learner, **given)


def test_photographs_are_prepared_as_its_training_images_were(trained, tmp_path):
    "Colour, 20×20, for a learner of 28×28 in grey; what cannot be prepared so is refused."
    for i in range(5):
        place = tmp_path / 'photos' / 'test' / f'class{i}'
        place.mkdir(parents=True)
        for j in range(16):
            Image.new('RGB', (20, 20), (10 * i, 10 * j, 0)).save(place / f'{j}.png')
    learner = load_learner(trained[0] / 'learner.safetensors')
    tasks = tasks_for(learner, str(tmp_path / 'photos'))
    assert tasks.bank.images.shape == (80, 1, 28, 28)
    assert 0 <= evaluate(learner, tasks, 2).mean <= 1
    learner.card = replace(learner.card, images=replace(learner.card.images, channels=3))
    assert tasks_for(learner, 'glyphs').bank.images.shape[1:] == (3, 28, 28)
    learner.card = replace(learner.card, images=replace(learner.card.images, channels=2))
    words = 'images of 1×28×28 .* but the learner was trained on 2×28'
    with pytest.raises(ValueError, match=words):
        tasks_for(learner, 'glyphs')


def test_a_training_begins_from_a_learner(trained, tmp_path):
    "Its first parameters are the other's last; the card, and a checkpoint, say where it began."
    start = str(trained[0] / 'learner.safetensors')
    given = TRAINING | dict(method='maml', start=start)
    folder = tmp_path / 'train' / 'further'
    execute(EXPERIMENTS / 'train.ipynb', folder, **given | dict(meta_lr=1e-12, select='last'))
    before, after = load_learner(start), load_learner(folder / 'learner.safetensors')
    assert after.card.start == start and after.card.run == 'train/further'
    for name, value in before.theta.items():
        torch.testing.assert_close(after.theta[name], value, atol=1e-6, rtol=0)

    (folder / 'learner.safetensors').rename(tmp_path / 'other.safetensors')
    shutil.move(folder, tmp_path / 'moved')
    again = tmp_path / 'train' / 'further'
    again.mkdir()
    shutil.copy(tmp_path / 'moved' / 'checkpoint.safetensors', again)
    other = given | dict(start=str(tmp_path / 'other.safetensors'), meta_lr=1e-12, select='last')
    again_in = tmp_path / 'train' / 'further'
    with pytest.raises(ValueError, match='start: .*learner.safetensors.* there'):
        execute(EXPERIMENTS / 'train.ipynb', again_in, **other)


def test_a_learner_of_another_network_is_no_start(trained, tmp_path):
    given = dict(method='maml', start=str(trained[0] / 'learner.safetensors'), filters=16)
    words = r'do not fit: conv1.bias \(8,\)'
    with pytest.raises(ValueError, match=words):
        execute(EXPERIMENTS / 'train.ipynb', tmp_path / 'a' / 'b', **given)
