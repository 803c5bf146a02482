"""Protocols: the same tasks for every method and seed, no class on two sides, every learner by name."""

import pytest, torch
from fewshotmeta.all import *
from fewshotmeta.lab.protocols import LEARNERS, OPTIONS, SETTINGS


@pytest.fixture(scope='module')
def tasks():
    return samplers('glyphs', n_way=3, n_query=2, test_query=3)


@pytest.mark.parametrize('method', LEARNERS)
def test_every_learner_by_name(method, tasks):
    learner = make_learner(method, tasks.train, filters=4, n_max=3, inner_steps=2)
    batches = training_batches(method, tasks.train)
    before = {k: v.detach().clone() for k, v in learner.theta.items()}
    fit(learner, batches, 1, 2, optimizer='sgd' if method == 'reptile' else 'adam', progress=False)
    assert any(not torch.equal(v, before[k]) for k, v in learner.theta.items())
    assert (
        0 <= evaluate(learner, tasks.test, 2).mean <= 1
        and evaluate(learner.with_norm('support'), tasks.test, 2).transductive is False
    )


@pytest.mark.parametrize('protocol', SETTINGS)
def test_a_protocol_is_network_and_head(protocol, tasks):
    a, b = (make_learner('maml', tasks.train, protocol, filters=4, seed=s) for s in (0, 1))
    assert {**vars(a.backbone)} == {**vars(conv4(1, 28, protocol, filters=4))} and not torch.equal(
        a.theta['head.weight'], b.theta['head.weight']
    )
    assert ('norm1.bias' in a.adapted) == (SETTINGS[protocol].adapts is everything)


def test_changes_of_the_network(tasks):
    assert make_learner('maml', tasks.train, down='stride').backbone.down == 'stride'
    assert (
        make_learner('maml', tasks.train, norm='per_step', inner_steps=4).backbone.norm_steps == 4
        and make_learner(
            'hypermaml', tasks.train, norm='per_step', inner_steps=4
        ).backbone.norm_steps
        == 1
    )


def test_test_tasks_are_the_same_whoever_asks(tasks):
    others = [
        samplers('glyphs', n_way=3, n_query=n, test_query=3, seed=seed, train_ways=ways)
        for n, seed, ways in ((5, 1, ()), (2, 7, [2, 6]))
    ]
    assert {t.test.digest(20) for t in others} == {tasks.test.digest(20)} and {
        t.valid.digest(20) for t in others
    } == {tasks.valid.digest(20)}
    assert others[0].train.digest(20) != tasks.train.digest(20) and others[1].train.way_range == (
        2,
        6,
    )
    names = [set(s.bank.classes) for s in (tasks.train, tasks.valid, tasks.test)]
    assert not names[0] & names[1] and not names[0] & names[2] and not names[1] & names[2]


@pytest.mark.parametrize('protocol', SETTINGS)
def test_real_omniglot_of_each_protocol(real_data, protocol):
    t = samplers('omniglot', 'emnist' if protocol == 'hypermaml2022' else '', protocol)
    looks = (0.485, 0.456, 0.406) if protocol == 'hypermaml2022' else 0.0
    assert t.train.mean == looks == t.test.mean and t.train.bank.images.shape[1] == (
        3 if protocol == 'hypermaml2022' else 1
    )
    assert (t.valid is None) == (protocol == 'drumond2020')
    dark = t.train.bank.images[:200].float().mean() < 128
    assert dark == (protocol == 'finn2017')  # Finn inverts: light strokes on a dark ground


@pytest.mark.parametrize(
    'bad,words',
    [
        (lambda t: make_learner('mamlplus', t.train), "method='mamlplus': choose one of 'maml'"),
        (lambda t: make_learner('maml', t.train, 'finn'), "protocol='finn': choose one of"),
        (lambda t: make_learner('maml', t.train, width=3), "option='width': choose one of"),
        (lambda t: samplers('emnist', protocol='hypermaml2022'), 'emnist has no train classes'),
        (
            lambda t: samplers('omniglot', protocol='hypermaml2022'),
            'omniglot has no test classes under protocol=.hypermaml2022.: choose another test_data, say emnist',
        ),
        (lambda t: samplers('glyphs', train_ways=[3]), 'train_ways=.3.: the fewest and the most'),
        (
            lambda t: split_bank('glyphs', 'novel'),
            "part='novel': choose one of 'train', 'val', 'test'",
        ),
    ],
)
def test_refusals(tasks, bad, words, request):
    if 'omniglot' in words:
        request.getfixturevalue('real_data')
    with pytest.raises(ValueError, match=words):
        bad(tasks)


def test_options_are_those_of_the_train_notebook():
    from conftest import ROOT

    params = read_parameters(ROOT / 'nbs' / 'experiments' / 'train.ipynb')
    for k, v in OPTIONS.items():
        if k not in ('n_max', 'inner_lr'):
            assert params[k].default == (list(v) if isinstance(v, tuple) else v), k
