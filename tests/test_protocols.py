"""Protocols: the same tasks for every method and seed, every learner by name, plugins."""

import inspect
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from house import codes_of, source
from fewshotmeta.all import *
from PIL import Image

SIZES = dict(filters=4, n_max=3, inner_steps=2)


@pytest.fixture(scope='module')
def tasks():
    return samplers('glyphs', n_way=3, n_query=2, test_query=3)


@pytest.mark.parametrize('method', list(LEARNERS))
def test_every_learner_by_name(method, tasks):
    learner = make_learner(method, tasks.train, **SIZES)
    before = {k: v.detach().clone() for k, v in learner.theta.items()}
    optimizer = 'sgd' if method == 'reptile' else 'adam'
    batches = training_batches(learner, tasks.train)
    fit(learner, batches, 1, 2, optimizer=optimizer, progress=False)
    assert any(not torch.equal(v, before[k]) for k, v in learner.theta.items())
    assert 0 <= evaluate(learner, tasks.test, 2).mean <= 1
    assert learner.can_use('support')
    assert evaluate(learner.with_norm('support'), tasks.test, 2).transductive is False


@pytest.mark.parametrize('method', list(LEARNERS))
def test_every_learner_on_resnet12(method, tasks):
    learner = make_learner(method, tasks.train, backbone='resnet12', **SIZES | dict(filters=1))
    before = {k: v.detach().clone() for k, v in learner.theta.items()}
    batches = training_batches(learner, tasks.train)
    fit(learner, batches, 1, 2, progress=False)
    assert any(not torch.equal(v, before[k]) for k, v in learner.theta.items())
    assert 0 <= evaluate(learner, tasks.test, 1).mean <= 1
    assert evaluate(learner.with_norm('support'), tasks.test, 1).transductive is False


def test_resnet12_takes_no_way_down(tasks):
    said = "down='stride': the backbone 'resnet12' takes only channels"
    with pytest.raises(ValueError, match=said):
        make_learner('maml', tasks.train, backbone='resnet12', down='stride')


@pytest.mark.parametrize('protocol', SETTINGS)
def test_a_protocol_is_network_and_head(protocol, tasks):
    a, b = (make_learner('maml', tasks.train, protocol, filters=4, seed=s) for s in (0, 1))
    assert a.backbone == conv4(1, 28, protocol, filters=4)
    assert not torch.equal(a.theta['head.weight'], b.theta['head.weight'])
    assert ('norm1.bias' in a.adapted) == (SETTINGS[protocol].adapts is everything)


def test_changes_of_the_network(tasks):
    assert make_learner('maml', tasks.train, down='stride').backbone.down == 'stride'
    rows = dict(maml=4, hypermaml=1, simple_shot=1)
    for method, expected in rows.items():
        learner = make_learner(method, tasks.train, norm='per_step', inner_steps=4)
        assert learner.backbone.norm_steps == expected


def test_test_tasks_are_the_same_whoever_asks(tasks):
    asked = ((5, 1, ()), (2, 7, [2, 6]))
    others = []
    for n, seed, ways in asked:
        sizes = dict(n_way=3, n_query=n, test_query=3)
        others.append(samplers('glyphs', seed=seed, train_ways=ways, **sizes))
    assert {t.test.digest(20) for t in others} == {tasks.test.digest(20)}
    assert {t.valid.digest(20) for t in others} == {tasks.valid.digest(20)}
    assert others[0].train.digest(20) != tasks.train.digest(20)
    assert others[1].train.way_range == (2, 6)
    names = [set(s.bank.classes) for s in (tasks.train, tasks.valid, tasks.test)]
    assert not names[0] & names[1] and not names[0] & names[2] and not names[1] & names[2]


@pytest.fixture
def own_images(tmp_path, own_cache):
    "A folder of small coloured images in three parts."
    gen = torch.Generator().manual_seed(0)
    for part in PARTS:
        for c in range(3):
            folder = tmp_path / 'own' / part / f'{part}{c}'
            folder.mkdir(parents=True)
            for i in range(3):
                pixels = torch.randint(0, 256, (32, 32, 3), generator=gen, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(folder / f'{i}.png')
    return str(tmp_path / 'own')


def test_images_of_your_own_have_the_size_that_you_say(own_images):
    sizes = dict(n_way=3, n_query=1, test_query=2)
    for size, channels in ((32, 3), (16, 1)):
        t = samplers(own_images, size=size, channels=channels, **sizes)
        for s in t:
            assert s.bank.images.shape[1:] == (channels, size, size)
            assert bool(s.mean) == (channels == 3)  # ImageNet's, of coloured images
        learner = make_learner('maml', t.train, filters=4)
        assert learner.backbone.size == size
        assert learner.backbone.channels == channels
        assert 0 <= evaluate(learner, t.test, 2).mean <= 1
    small = samplers(own_images, size=12, **sizes).train
    with pytest.raises(ValueError, match='size=12: images of at least 16'):
        make_learner('maml', small)
    with pytest.raises(ValueError, match='size=7: expected a whole number of at least 8'):
        samplers(own_images, size=7, **sizes)
    assert split_bank('glyphs', 'test', size=16, channels=3).images.shape[1:] == (3, 16, 16)


def test_a_run_of_train_leaves_out_what_its_parameters_say(own_images, own_cache):
    "The notebook's own cells, executed here: a class too small in each part, a broken file."
    for part in PARTS:
        folder = Path(own_images, part)
        (folder / f'{part}0' / '2.png').unlink()
        (folder / f'{part}1' / '3.png').write_text('broken')
    cells = codes_of(ROOT / 'nbs' / 'experiments' / 'train.ipynb')
    parameters, _, data = [source(c) for c in cells if not source(c).startswith('#|')][:3]
    run = {}
    exec(parameters, run)
    assert (run['min_images'], run['skip_unreadable']) == (0, False)
    run |= dict(data=own_images, n_way=2, n_query=2, test_query=2, size=16)
    exec('from fewshotmeta.all import *\nimport torch', run)
    with pytest.raises(BadImage, match='skip_unreadable=True leaves them out'):
        exec(data, run)
    run |= dict(skip_unreadable=True)
    with pytest.raises(ValueError, match='1 class of 3 with fewer: .* min_images=3'):
        exec(data, run)
    run |= dict(min_images=3)
    with pytest.warns(UserWarning, match='train0 has 2'):
        exec(data, run)
    assert [len(run[name].bank) for name in ('train', 'valid', 'test')] == [2, 2, 2]


@pytest.mark.parametrize('data', ['omniglot', 'emnist'])
def test_what_the_papers_fix_stays_so(data):
    ways = dict(size=32, channels=3, min_images=9, skip_unreadable=True)
    for name, value in ways.items():
        words = f'{name}={value}, but the papers fix how the images of {data} are read'
        with pytest.raises(ValueError, match=words):
            split_bank(data, 'test', **{name: value})


@pytest.mark.parametrize('protocol', SETTINGS)
def test_real_omniglot_of_each_protocol(real_data, protocol):
    colour = protocol == 'hypermaml2022'
    t = samplers('omniglot', 'emnist' if colour else '', protocol)
    assert t.train.mean == t.test.mean == ((0.485, 0.456, 0.406) if colour else 0.0)
    assert t.train.bank.images.shape[1] == (3 if colour else 1)
    assert (t.valid is None) == (protocol == 'drumond2020')
    dark = t.train.bank.images[:200].float().mean() < 128
    assert dark == (protocol == 'finn2017')  # Finn inverts: light strokes on a dark ground


@pytest.mark.parametrize(
    'bad,words',
    [
        (lambda t: make_learner('mamlplus', t.train), "method='mamlplus': choose one of 'maml'"),
        (lambda t: make_learner('maml', t.train, 'finn'), "protocol='finn': choose one of"),
        (lambda t: make_learner('maml', t.train, width=3), "option='width': choose one of"),
        (lambda t: make_learner('maml', t.train, backbone='vit'), "backbone='vit': choose one of"),
        (lambda t: samplers('emnist', protocol='hypermaml2022'), 'emnist has no train classes'),
        (
            lambda t: samplers('omniglot', protocol='hypermaml2022'),
            'omniglot has no test classes under protocol=.hypermaml2022.: choose another test_data',
        ),
        (lambda t: samplers('glyphs', train_ways=[3]), 'train_ways=.3.: the fewest and the most'),
        (lambda t: split_bank('glyphs', 'novel'), "part='novel': choose one of 'train', 'val'"),
        (lambda t: import_plugin('nowhere.py'), "plugin='nowhere.py': no file"),
        (lambda t: import_plugin('no_such_module_at_all'), 'no such module'),
        (lambda t: named_values(['portion']), "options: 'portion': expected name=value"),
    ],
)
def test_refusals(tasks, bad, words, request):
    if 'omniglot' in words:
        request.getfixturevalue('real_data')
    with pytest.raises(ValueError, match=words):
        bad(tasks)


def test_options_are_parameters_of_the_train_notebook_or_named():
    "What train.ipynb has no parameter for is given by its `options`."
    params = read_parameters(ROOT / 'nbs' / 'experiments' / 'train.ipynb')
    named = {name for name in known_options() if name not in params}
    unicorn = {'order', 'temperature', 'remember'}
    assert named == {'n_max', 'weight_norm', 'maps', 'lam', 'alpha', 'learn_lam'} | unicorn
    for method in ('hypermaml', 'hidra', 'mamlpp'):
        for name, default in LEARNERS.options(method).items():
            if name not in ('n_max', 'inner_lr', 'inner_steps'):
                default = list(default) if isinstance(default, tuple) else default
                assert params[name].default == default, name


OWN = dict(
    maml=MAML,
    fomaml=MAML,
    random_init=MAML,
    hidra=MAML,
    hidra_random_init=MAML,
    mamlpp=mamlpp,
    hidra_mamlpp=mamlpp,
    meta_sgd=meta_sgd,
    reptile=Reptile,
    sign_maml=SignMAML,
    unicorn_maml=unicorn_maml,
    hypermaml=HyperMAML,
    anyway_hypermaml=HyperMAML,
    feature_transfer=FeatureTransfer,
    baseline_pp=FeatureTransfer,
    r2d2=R2D2,
)
CALLED = dict(hyper_width='width', alpha='scale')  # what a class calls an option


@pytest.mark.parametrize('method', OWN)
def test_a_method_has_the_defaults_of_its_class(method, tasks):
    "Nothing said, nothing changed: what a learner is made with is its class's own."
    signature = inspect.signature(OWN[method]).parameters
    checked = 0
    for option, value in LEARNERS.options(method).items():
        name = CALLED.get(option, option)
        if 'hypermaml' in method and option == 'inner_steps':
            name = 'warm_steps'
        if name in signature and name != 'switch':
            assert value == signature[name].default, option
            checked += 1
    assert checked
    learner = make_learner(method, tasks.train, filters=4)
    if 'switch' in signature:
        assert learner.switch == signature['switch'].default
    for name in ('inner_lr', 'tune_steps', 'lam', 'scale'):
        if name in signature and hasattr(learner, name):
            assert getattr(learner, name) == signature[name].default
    if 'hypermaml' not in method and 'inner_steps' in signature:
        assert learner.inner_steps == signature['inner_steps'].default


def test_methods_that_were_given_anothers_defaults(tasks):
    def of(method):
        learner = make_learner(method, tasks.train, filters=4)
        return learner.inner_lr, learner.inner_steps

    assert of('maml') == (0.4, 1)
    assert of('mamlpp') == of('hidra_mamlpp') == (0.1, 5)
    assert of('unicorn_maml') == (0.1, 15)
    assert of('reptile') == (0.1, 5)
    assert of('sign_maml') == (0.0035, 5)
    sign = make_learner('sign_maml', tasks.train, filters=4)
    assert sign.test_steps == 10 and sign.adapts is everything


def test_the_authors_options_by_name(tasks):
    def make(method, **options):
        return make_learner(method, tasks.train, filters=8, **options)

    assert type(make('baseline_pp', weight_norm=True)) is WeightNormBaselinePP
    assert type(make('relation_net', maps=True, backbone='conv4_maps')) is MapRelationNet
    ridge_fixed = make('r2d2', **named_values(['lam=50', 'alpha=1e-4', 'learn_lam=False']))
    assert ridge_fixed.lam == 50 and ridge_fixed.theta['ridge.scale'].item() == pytest.approx(1e-4)
    assert 'ridge.log_lam' not in ridge_fixed.theta
    unicorn = make('unicorn_maml', order=1, temperature=0.5, remember=True)
    assert (unicorn.order, unicorn.temperature) == (1, 0.5) and unicorn.buffers
    for learner in (make('baseline_pp'), make('relation_net')):
        assert type(learner) in (BaselinePP, RelationNet)


# --- plugins

PLUGIN = '''
from torch import nn
from fewshotmeta.all import *

@LEARNERS.register('half_maml')
def half_maml(backbone, setting, *, inner_lr=0.1, inner_steps=1, portion=0.5):
    "MAML at a portion of its rate."
    return MAML(backbone, setting.n_way, inner_lr * portion, inner_steps, **setting.fresh)

@BACKBONES.register('linear')
def linear(channels, size):
    "One linear layer."
    layers = nn.Flatten(), nn.Linear(channels * size**2, 8)
    return from_module(nn.Sequential(*layers), channels, size)
'''


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    "A file that registers a method and a backbone, forgotten after the test."
    for registry in (LEARNERS, BACKBONES):
        monkeypatch.setattr(registry, 'notes', dict(registry.notes))
    before = dict(LEARNERS), dict(BACKBONES)
    (tmp_path / 'half.py').write_text(PLUGIN)
    monkeypatch.setenv('FEWSHOTMETA_FROM', str(tmp_path))
    yield 'half.py'
    for registry, old in zip((LEARNERS, BACKBONES), before):
        registry.clear()
        registry.update(old)


def test_a_plugin_registers_a_method_and_a_backbone(plugin, tasks):
    import_plugin(plugin)
    options = named_values(['portion=0.25'])
    learner = make_learner('half_maml', tasks.train, backbone='linear', inner_lr=0.4, **options)
    assert learner.inner_lr == pytest.approx(0.1) and learner.backbone.out_features == 8
    assert learner.n_way == 3 and not learner.can_use('support')
    fit(learner, training_batches(learner, tasks.train), 1, 2, progress=False)
    assert 0 <= evaluate(learner, tasks.test, 2).mean <= 1


def test_a_backbone_says_what_it_takes(plugin, tasks):
    import_plugin(plugin)
    words = "filters=8: the backbone 'linear' takes only channels, size"
    with pytest.raises(ValueError, match=words):
        make_learner('maml', tasks.train, backbone='linear', filters=8)


def test_values_of_options_are_numbers_where_they_look_like_numbers():
    given = ['a=1', 'b=0.5', 'c=[1, 2]', 'd=row_mean', 'e=True', 'f=x=y']
    expected = dict(a=1, b=0.5, c=[1, 2], d='row_mean', e=True, f='x=y')
    assert named_values(given) == expected


def test_another_thing_of_the_same_name_is_refused():
    with pytest.raises(ValueError, match="method='maml' is taken by fewshotmeta.learners.maml"):
        LEARNERS.register('maml')(samplers)
