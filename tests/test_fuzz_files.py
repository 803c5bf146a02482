"""Checkpoints and stored learners that were altered: refused by name, or the same as before.

Each test tries some hundred altered files here, and 20,000 with `make fuzz`.
"""

import json
import warnings

import pytest
import torch
from fuzzing import ODD, STRANGE, altered, no_hang, often, put, spoilt
from hypothesis import given
from hypothesis import strategies as st

from fewshotmeta.data.episodes import EpisodeSampler
from fewshotmeta.data.files import seal
from fewshotmeta.engine.plans import plan_for
from fewshotmeta.learners.backbones import conv4
from fewshotmeta.learners.maml import MAML
from fewshotmeta.training.checkpoints import BadCheckpoint, describe, read_checkpoint
from fewshotmeta.training.checkpoints import read_tensors, save_tensors
from fewshotmeta.training.fit import fit
from fewshotmeta.training.saving import LEARNER, BadLearner, load_learner, save_learner

HEADER_ODD = (*ODD, 'F32', 'BF16', 'F8_E4M3', 'F4', 'BOOL', 'U64', [0, 4], [0, 0], [4, 0])
HEADER_ODD += ([2, 2, 2], [2**62, 2**62], {'dtype': 'F32', 'shape': [0], 'data_offsets': [0, 0]})


def pieces(content):
    "The JSON header of a safetensors file, and what follows it."
    size = int.from_bytes(content[:8], 'little')
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def joined(header, rest):
    "A safetensors file of such pieces."
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, 'little') + text + rest


def cast(tensor, draw):
    "The tensor in another type."
    types = torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.complex64
    return tensor.to(draw(st.sampled_from([*types, torch.float8_e4m3fn])))


def reshaped(tensor, draw):
    "A tensor of another shape."
    shapes = (0,), (), (1,), (2, 3), (*tensor.shape, 1), tuple(tensor.shape[::-1])
    return torch.zeros(draw(st.sampled_from(shapes)), dtype=tensor.dtype)


def broken(tensor, draw):
    "A tensor with a number that is none."
    return torch.full_like(tensor, draw(st.sampled_from([float('nan'), float('inf')])))


@st.composite
def other_tensors(draw, tensors):
    "Named tensors of which some were changed, removed or added."
    tensors = dict(tensors)
    for _ in range(draw(st.integers(1, 2))):
        name = draw(st.sampled_from(sorted(tensors)))
        kind = draw(st.sampled_from(['change', 'change', 'remove', 'rename', 'add']))
        value = tensors[name]
        if kind == 'change':
            tensors[name] = draw(st.sampled_from([cast, reshaped]))(value, draw)
        elif kind != 'add':
            del tensors[name]
        if kind in ('rename', 'add'):
            stem = name.rpartition('/')[2]
            forms = 'x', '7/theta/' + stem, '0/theta/x', '0/buffers/x', 'theta/x', 'm/x', ''
            tensors[draw(st.sampled_from(forms))] = value.clone()
    return tensors


class Stored:
    "A file with its header and its tensors, and how it can be altered."

    def __init__(self, path, key, head, tensors):
        self.path = path
        self.key = key
        self.content = path.read_bytes()
        self.head = {k: v for k, v in head.items() if k not in ('sha256', 'tensors')}
        self.tensors = tensors
        self.digest = head['tensors']


@st.composite
def altered_files(draw, kept):
    "What to put in the place of a file: a function of what is stored there, drawn anew each time."
    kind = draw(st.sampled_from(['bytes', 'header', 'head', 'head', 'head', 'tensors', 'strange']))
    if kind == 'strange':
        return kind, draw(st.sampled_from(STRANGE))
    if kind == 'bytes':
        return kind, draw(spoilt(kept.content))
    if kind == 'header':
        header, rest = pieces(kept.content)
        return kind, joined(draw(altered(header, HEADER_ODD)), rest)
    if kind == 'tensors':
        return kind, (kept.head, draw(other_tensors(kept.tensors)))
    sealed = draw(st.booleans())
    head = draw(altered(kept.head | dict(tensors=kept.digest), ODD))
    header, rest = pieces(kept.content)
    head = seal(head) if sealed and isinstance(head, dict) else head
    header['__metadata__'][kept.key] = json.dumps(head)
    return kind if sealed else 'unsealed', joined(header, rest)


def write(kept, thing):
    "Write it; what has tensors of its own is sealed as the package seals it."
    if isinstance(thing, tuple):
        head, tensors = thing
        save_tensors(kept.path, kept.key, head, tensors)
    else:
        put(kept.path, thing)


# ---- learners
@pytest.fixture(scope='module')
def stored_learner(tmp_path_factory):
    "A learner in a file."
    path = tmp_path_factory.mktemp('learners') / 'x.safetensors'
    learner = MAML(conv4(size=16, filters=2, norm='per_step', norm_steps=2), 3, inner_steps=2)
    save_learner(learner, path, method='maml', iterations=3)
    whole = load_learner(path)
    return Stored(path, 'learner', *read_tensors(path, 'learner', LEARNER)), whole


def set_at(tree, path, value):
    "The tree with another value at a place; none: without the value that is there."
    *holders, last = path.split('.')
    tree = json.loads(json.dumps(tree))
    inner = tree
    for name in holders:
        inner = inner[int(name) if name.isdigit() else name]
    inner[last] = value
    if value is None:
        del inner[last]
    return tree


def with_head(kept, path, value):
    "The file with a header that was changed at a place and sealed again."
    header, rest = pieces(kept.content)
    head = set_at(kept.head | dict(tensors=kept.digest), path, value)
    header['__metadata__'][kept.key] = json.dumps(seal(head))
    return joined(header, rest)


FOUND = dict(tensors=None, members=[], card=7, plugins=7)
FOUND |= {'members.0.attributes.n_way': None, 'members.0.piece': 'x', 'card.iterations': 'x'}
FOUND |= {'members.0.theta': ['head.bias'], 'members.0.attributes.backbone.with.filters': 3}
FOUND |= {'members.0.attributes.norm': {}, 'members.0.channels_last': 7}


@pytest.mark.parametrize('path', FOUND)
def test_learners_that_were_found(stored_learner, path):
    kept, _ = stored_learner
    write(kept, with_head(kept, path, FOUND[path]))
    with pytest.raises(BadLearner, match='x.safetensors: '):
        load_learner(kept.path)


@pytest.mark.parametrize(
    'change',
    [
        {'0/theta/head.bias': torch.zeros(4)},
        {'0/theta/head.bias': torch.zeros(3, dtype=torch.int64)},
        {'0/buffers/norm1.mean': torch.zeros(2, 3)},
        {'0/theta/more': torch.zeros(3)},
        {'1/theta/head.bias': torch.zeros(3)},
    ],
    ids=str,
)
def test_tensors_that_were_found(stored_learner, change):
    kept, _ = stored_learner
    write(kept, (kept.head, kept.tensors | change))
    with pytest.raises(BadLearner, match='x.safetensors: it'):
        load_learner(kept.path)


def test_a_header_without_texts(stored_learner):
    kept, _ = stored_learner
    header, rest = pieces(kept.content)
    write(kept, joined(header | dict(__metadata__=None), rest))
    with pytest.raises(BadLearner, match='x.safetensors'):
        load_learner(kept.path)


@often
@given(data=st.data())
def test_learners(stored_learner, data):
    kept, whole = stored_learner
    kind, thing = data.draw(altered_files(kept))
    write(kept, thing)
    with no_hang():
        try:
            found = load_learner(kept.path)
        except BadLearner as e:
            assert str(kept.path) in str(e) and len(str(e)) < 2000
            return
        except FileNotFoundError as e:
            assert kind == 'strange' and str(kept.path) in str(e)
            return
    for name, value in whole.theta.items():
        assert found.theta[name].shape == value.shape and found.theta[name].is_floating_point()
    assert list(found.theta) == list(whole.theta) and found.buffers.keys() >= whole.buffers.keys()
    assert repr(found)
    if kind in ('bytes', 'header', 'unsealed'):
        assert describe(found) == describe(whole) and found.card == whole.card
        assert all(torch.equal(found.theta[k], v) for k, v in whole.theta.items())


# ---- checkpoints
@pytest.fixture(scope='module')
def stored_run(tmp_path_factory, noise_bank):
    "A training of two iterations, with its checkpoint and what continues it."
    place = tmp_path_factory.mktemp('run')
    tasks = EpisodeSampler(noise_bank, 3, 1, 1)

    def go(path=place):
        learner = MAML(conv4(size=16, filters=2), 3, inner_steps=1)
        sizes = dict(iterations=2, meta_batch=1, valid_tasks=1, valid_every=1, log_every=1)
        plan = plan_for('cpu', 'plain')
        how = dict(valid=tasks(seed=9), checkpoint=path, plan=plan, progress=False)
        return fit(learner, tasks, **sizes, **how)

    whole = go()
    head, tensors = read_checkpoint(place)
    return Stored(place / 'checkpoint.safetensors', 'run', head, tensors), go, whole


@often
@given(data=st.data())
def test_checkpoints(stored_run, data):
    kept, go, whole = stored_run
    kind, thing = data.draw(altered_files(kept))
    write(kept, thing)
    with no_hang(), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try:
            found = go(kept.path.parent)
        except BadCheckpoint as e:
            assert str(kept.path.parent) in str(e) and len(str(e)) < 5000
            return
    if kind in ('bytes', 'header', 'unsealed'):
        assert found.history == whole.history and found.iteration == whole.iteration
        assert all(torch.equal(found.learner.theta[k], v) for k, v in whole.learner.theta.items())
    assert found.iteration >= 2 and found.history


RUNS = {'tensors': None, 'config.iterations': None, 'history': [7], 'history.0.loss': 'x'}
RUNS |= {'history  ': [], 'pending': [7], 'kept': [['x', 1]], 'iteration': -1, 'iteration ': 2**70}
RUNS |= {'calls': 0, 'calls ': -2, 'calls  ': 'x'}


@pytest.mark.parametrize('path', RUNS)
def test_checkpoints_that_were_found(stored_run, path):
    kept, go, _ = stored_run
    write(kept, with_head(kept, path.strip(), RUNS[path]))
    with pytest.raises(BadCheckpoint, match='checkpoint.safetensors|config|another run'):
        go(kept.path.parent)
