"""A stored learner is the learner: every method and norm; whatever is not whole is refused."""

import os
import subprocess
import sys
from dataclasses import replace

import forks
import pytest
import torch
from fewshotmeta.all import *

METHODS = sorted(LEARNERS)


def made(method, norm='transductive', **options):
    "A small learner of a method, its parameters moved so that none is at its start."
    tasks = EpisodeSampler(glyphs('train'), n_way=3, k_shot=1, n_query=2)
    own = dict(inner_steps=2, n_max=3, hyper_width=8, tune_steps=3, master_update='tied_gradient')
    own = {k: v for k, v in own.items() if k in LEARNERS.options(method)} | options
    learner = make_learner(method, tasks, norm=norm, filters=8, **own)
    gen = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in [*learner.theta.values(), *learner.buffers.values()]:
            value.add_(0.01 * torch.rand(value.shape, generator=gen))
    learner.card = replace(learner.card, **training_facts(tasks), iterations=3)
    return learner


def logits(learner, plan='loop'):
    episodes = EpisodeSampler(glyphs('test'), n_way=3, k_shot=1, n_query=2)[0:2]

    def of_tasks():
        return learner.predict(learner.adapt(episodes.xs, episodes.ys), episodes.xq)

    return plan_for('cpu', plan).run(of_tasks)


IN_ANOTHER = """
import sys
import torch
from fewshotmeta.all import *
sys.path.insert(0, sys.argv[1])
from test_saving import logits
for file in sys.argv[2:]:
    for plan in ('loop', 'plain', 'batched'):
        torch.save(logits(load_learner(file), plan), f'{file}.{plan}')
"""


def test_every_method_gives_the_same_bytes_in_another_process(tmp_path):
    "On three plans each."
    files = {}
    for method in METHODS:
        files[method] = tmp_path / f'{method}.safetensors'
        save_learner(made(method), files[method])
    here = os.path.dirname(__file__)
    command = [sys.executable, '-c', IN_ANOTHER, here, *map(str, files.values())]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for method, file in files.items():
        for plan in ('loop', 'plain', 'batched'):
            theirs = torch.load(f'{file}.{plan}', weights_only=True)
            assert theirs.equal(logits(made(method), plan)), (method, plan)


@pytest.mark.parametrize('norm', sorted(NORMS))
@pytest.mark.parametrize('method', ['maml', 'mamlpp', 'hidra', 'hypermaml'])
def test_every_norm(tmp_path, method, norm):
    learner = made(method, norm)
    save_learner(learner, tmp_path / 'x.safetensors')
    again = load_learner(tmp_path / 'x.safetensors')
    assert again.backbone == learner.backbone
    assert logits(again).equal(logits(learner))
    assert describe(again) == describe(learner) and again.card == learner.card


def test_an_ensemble(tmp_path):
    both = Ensemble([made('maml'), made('maml', inner_lr=0.2)])
    save_learner(both, tmp_path / 'x.safetensors')
    assert logits(load_learner(tmp_path / 'x.safetensors')).equal(logits(both))


def test_it_lies_where_it_is_asked_for(tmp_path):
    save_learner(made('mamlpp', 'per_step'), tmp_path / 'x.safetensors')
    there = load_learner(tmp_path / 'x.safetensors', device='meta')
    values = [*there.theta.values(), *there.buffers.values()]
    assert there.buffers and {v.device.type for v in values} == {'meta'}


def test_a_damaged_byte_anywhere_is_refused(tmp_path):
    "Every 97th byte, and each of the first 64."
    file = tmp_path / 'x.safetensors'
    save_learner(made('proto_net'), file)
    whole = file.read_bytes()
    for i in [*range(64), *range(64, len(whole), len(whole) // 97)]:
        file.write_bytes(whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :])
        with pytest.raises(BadLearner, match='x.safetensors'):
            load_learner(file)
    for i in (0, 7, 100, len(whole) - 1):
        file.write_bytes(whole[:i])
        with pytest.raises(BadLearner, match='is not a whole learner'):
            load_learner(file)


PLUGIN = """
import torch
from torch import nn
from fewshotmeta.all import *

@BACKBONES.register('own_net')
def own_net(channels, size, width=4):
    torch.manual_seed(0)
    layers = nn.Conv2d(channels, width, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2)
    return from_module(nn.Sequential(*layers), channels, size)

class Halved(MAML):
    def rate(self, theta, name, step):
        return self.inner_lr / 2

@LEARNERS.register('halved')
def halved(backbone, setting, *, inner_lr=0.1):
    return Halved(backbone, setting.n_way, inner_lr)
"""


def test_parts_of_a_plugin_are_named_and_asked_for(tmp_path):
    plugin, file = tmp_path / 'own_parts.py', tmp_path / 'x.safetensors'
    plugin.write_text(PLUGIN)
    import_plugin(str(plugin))
    tasks = EpisodeSampler(glyphs('train'), n_way=3)
    learner = make_learner('halved', tasks, backbone='own_net')
    save_learner(learner, file)
    assert logits(load_learner(file)).equal(logits(learner))
    code = f'from fewshotmeta.all import *\nprint(load_learner({str(file)!r}, plugin=%r))'
    for given, said in ('', 'which is not imported: give it, plugin='), (str(plugin), 'halved: '):
        done = forks.run(code % given)
        assert said in done.stdout + done.stderr


def test_a_module_that_nobody_registered_cannot_be_stored(tmp_path):
    net = from_module(torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3)), 1, 28)
    with pytest.raises(ValueError, match='BACKBONES.register'):
        save_learner(MAML(net, 3), tmp_path / 'x.safetensors')
    assert not list(tmp_path.iterdir())


def test_frozen_weights_are_stored_and_handed_back(tmp_path, monkeypatch):
    "Also where the function that makes the module draws others each time."
    shape = dict(filters=4, trains=False)

    def own(channels, size):
        torch.seed()
        first = torch.nn.Conv2d(channels, shape['filters'], 3, 2).requires_grad_(shape['trains'])
        layers = first, torch.nn.Conv2d(shape['filters'], 2, 3, 2)
        return from_module(torch.nn.Sequential(*layers), channels, size)

    nets = Backbones('backbone')
    nets.register('drawn_anew')(own)
    monkeypatch.setitem(BACKBONES, 'drawn_anew', nets['drawn_anew'])
    learner = MAML(BACKBONES['drawn_anew'](1, 28), 3, inner_lr=0.1)
    save_learner(learner, tmp_path / 'x.safetensors')
    again = load_learner(tmp_path / 'x.safetensors')
    for name, value in learner.backbone.frozen.items():
        assert torch.equal(again.backbone.frozen[name], value)
    assert logits(again).equal(logits(learner))
    for other in dict(filters=5), dict(trains=True):
        shape |= dict(filters=4, trains=False) | other
        with pytest.raises(BadLearner, match='x.safetensors: 2 frozen parameters were stored'):
            load_learner(tmp_path / 'x.safetensors')


def test_a_run_is_found_by_its_name(tmp_path, monkeypatch):
    place = tmp_path / 'runs' / 'table' / 'maml_seed0'
    save_learner(made('maml'), place / 'learner.safetensors')
    (tmp_path / 'nbs').mkdir()
    monkeypatch.chdir(tmp_path / 'nbs')
    assert load_learner('table/maml_seed0').card.data == 'glyphs train'
    with pytest.raises(FileNotFoundError, match="did you mean 'table/maml_seed0'"):
        load_learner('table/maml_seed1')


def test_training_writes_what_it_trained_on(noise_bank):
    tasks = EpisodeSampler(noise_bank, 3, 1, 2, mean=0.5, std=0.25)
    learner = MAML(conv4(size=16, filters=8), 3)
    assert 'not trained' in repr(learner)
    learner = fit(learner, tasks, 2, meta_batch=2, progress=False).learner
    card = learner.card
    assert (card.data, card.iterations, card.meta_batch) == ('noise', 2, 2)
    assert card.classes == tuple(noise_bank.classes) and card.images.std == 0.25
    assert 'trained on noise, 3-way 1-shot, 2 iterations of 2' in repr(learner)
    assert '| images | 1×16×16 |' in learner._repr_markdown_()


def test_a_backbone_remembers_what_made_it():
    nets = Backbones('backbone')

    @nets.register('flat')
    def flat(channels, size=16, **options):
        return from_module(torch.nn.Flatten(), channels, size)

    made = nets['flat'](1, depth=2)
    assert made.recipe == ('flat', dict(channels=1, depth=2))
    assert not hasattr(BACKBONES['conv4'](), 'recipe')  # a dataclass says itself what it is


def test_names_in_a_file_have_their_owner_in_front():
    tensors = {'theta/a': torch.ones(1), 'm/a': torch.zeros(1)}
    assert under_prefix(tensors, 'theta/') == {'a': torch.ones(1)}


def test_others_may_read_a_learner_as_they_may_other_files(tmp_path):
    save_learner(made('maml'), tmp_path / 'x.safetensors')
    (tmp_path / 'y').touch()
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1


def test_a_card_does_not_print_a_thousand_classes():
    card = Card('maml', data='omniglot', classes=('Latin/character01',) * 1000)
    assert len(repr(card)) < 400 and 'character01' not in repr(card)
    assert card != Card('maml', data='omniglot')  # though they compare
