"""Properties, with inputs that nobody thought of."""

import json
import keyword
import string
from pathlib import Path

import nbformat
import pytest
import torch
import yaml
from conftest import full
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from fewshotmeta.data.banks import ImageBank
from fewshotmeta.data.episodes import EpisodeSampler
from fewshotmeta.data.files import BadFile, read_json, seal, unseal, write_json
from fewshotmeta.lab.batches import BadBatch, read_batch
from fewshotmeta.lab.parameters import BadParameters, default_name, merge_parameters
from fewshotmeta.lab.parameters import parse_value, read_parameters, split_name
from fewshotmeta.training.schedules import SCHEDULES, Cosine, MultiStep

often = settings(
    max_examples=1000 if full() else 60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda s: st.lists(s, max_size=4) | st.dictionaries(st.text(max_size=8), s, max_size=4),
    max_leaves=12,
)
literal = (
    st.booleans()
    | st.integers(-(10**6), 10**6)
    | st.floats(-1e6, 1e6)
    | st.text(string.printable, max_size=12)
    | st.lists(st.integers(-9, 9), max_size=3)
)


def no_keyword(text):
    return not keyword.iskeyword(text)


name = st.from_regex(r'[a-z_][a-z0-9_]{0,8}', fullmatch=True).filter(no_keyword)


# ---- episodes
def bank_of_numbers(classes, per):
    "A bank in which every pixel of image number i is i."
    number = torch.arange(classes * per, dtype=torch.int64)
    pixels = (number[:, None, None, None].expand(-1, 1, 2, 2) % 256).to(torch.uint8).contiguous()
    names = [f'c{c}' for c in range(classes)]
    return ImageBank(pixels, range(0, classes * per, per), [per] * classes, names)


def number_of(x):
    "The numbers of the images of one task."
    return (x[:, 0, 0, 0] * 255).round().long()


def check_episode(ep, per, n_way, k_shot, n_query):
    "Different classes, different images, labels 0 … n_way-1."
    support, query = number_of(ep.xs).tolist(), number_of(ep.xq).tolist()
    ys, yq = ep.ys.tolist(), ep.yq.tolist()
    assert sorted(ys) == sorted(list(range(n_way)) * k_shot)
    assert sorted(yq) == sorted(list(range(n_way)) * n_query)
    assert len(set(support + query)) == n_way * (k_shot + n_query)  # no image twice
    class_of = {label: i // per for label, i in zip(ys, support)}
    assert len(set(class_of.values())) == n_way
    for label, i in zip(ys + yq, support + query):
        assert class_of[label] == i // per


@often
@given(
    classes=st.integers(2, 12),
    per=st.integers(3, 9),
    n_way=st.integers(2, 6),
    k_shot=st.integers(1, 3),
    n_query=st.integers(1, 3),
    seed=st.integers(0, 2**32),
    i=st.integers(0, 10**9),
)
def test_an_episode_is_what_it_should_be(classes, per, n_way, k_shot, n_query, seed, i):
    "What it should be, and the same again; too much asked is refused."
    bank = bank_of_numbers(classes, per)
    if n_way > classes or k_shot + n_query > per:
        with pytest.raises(ValueError):
            EpisodeSampler(bank, n_way, k_shot, n_query, seed=seed)
        return
    s = EpisodeSampler(bank, n_way, k_shot, n_query, seed=seed)
    ep, again = s[i : i + 2], EpisodeSampler(bank, n_way, k_shot, n_query, seed=seed)[i : i + 2]
    assert torch.equal(ep.xs, again.xs)
    assert torch.equal(ep.xq, again.xq)
    assert torch.equal(s[i + 1].xs, ep.xs[1])  # one alone is the one of many
    for task in range(2):
        check_episode(ep[task], per, n_way, k_shot, n_query)


# ---- schedules
@often
@given(st.floats(0, 1, exclude_max=True), st.floats(0, 1, exclude_max=True), st.floats(0.001, 1))
def test_schedules_fall_and_stay_positive(a, b, final):
    a, b = sorted((a, b))
    for f in (*SCHEDULES.values(), Cosine(final), MultiStep((final / 2,), final)):
        assert 0 < f(b) <= f(a) + 1e-12 <= 1 + 1e-9


# ---- parameters
def notebook(folder, source):
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    nb.cells[0].metadata['tags'] = ['parameters']
    path = Path(folder) / 'exp.ipynb'
    nbformat.write(nb, path)
    return path


@often
@given(st.dictionaries(name, literal, min_size=1, max_size=5), st.data())
def test_parameters_come_back_as_they_were(tmp_path, values, data):
    "The cell's values are read, text is understood as itself, another type is refused."
    nb = notebook(tmp_path, '\n'.join(f'{k} = {v!r}  # about {k}' for k, v in values.items()))
    known = read_parameters(nb)
    assert {k: p.default for k, p in known.items()} == values
    assert merge_parameters(known, {}) == values
    for k, v in values.items():
        assert parse_value(known[k], str(v)) == v
        other = data.draw(literal)
        try:
            got = merge_parameters(known, {k: other})[k]
        except BadParameters as e:
            assert type(other) is not type(v)
            assert k in str(e)
        else:
            assert type(got) is type(v)
            assert got == other


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


@often
@given(st.text(max_size=80))
@example('import os; os.system("touch pwned")')
@example('x = __import__("os").system("touch pwned")')
def test_no_parameters_cell_is_executed(tmp_path, source):
    "Any text: parameters or a clear refusal, and nothing happens."
    try:
        read_parameters(notebook(tmp_path, source))
    except BadParameters:
        pass
    assert names_in(tmp_path) == ['exp.ipynb']
    assert not Path('pwned').exists()


@often
@given(st.text(max_size=40))
def test_names_stay_inside(text):
    try:
        experiment, slug = split_name(text, 'stem')
    except BadParameters:
        return
    for part in (experiment, slug):
        assert part
        assert not part.startswith('.')
        assert not set(part) & set('/\\\0 ')


@often
@given(st.dictionaries(name, plain, max_size=4))
def test_default_names_are_names(values):
    assert split_name(default_name(values), 'stem')


# ---- JSON and YAML
finite = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=20)
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda s: st.lists(s, max_size=4) | st.dictionaries(st.text(max_size=8), s, max_size=4),
    max_leaves=12,
)


def as_text(values):
    "The JSON that a seal is a digest of."
    return json.dumps({k: v for k, v in values.items() if k != 'sha256'}, sort_keys=True)


@often
@given(st.dictionaries(st.text(max_size=8), finite, max_size=6), st.data())
def test_sealed_values(tmp_path, values, data):
    "What is sealed and written is read again, and any other value under the same seal is refused."
    path = tmp_path / 'x.json'
    write_json(path, values)
    want = {k: v for k, v in values.items() if k != 'sha256'}
    assert read_json(path) == json.loads(json.dumps(want))
    other = data.draw(st.dictionaries(st.text(max_size=8), finite, max_size=6))
    if as_text(other) != as_text(want):
        with pytest.raises(BadFile):
            unseal(other | dict(sha256=seal(values)['sha256']), '')


@often
@given(finite, st.sampled_from([float('inf'), -float('inf'), float('nan')]), st.booleans())
def test_what_json_has_no_word_for(tmp_path, value, bad, deep):
    "Neither written, nor read where somebody else wrote it."
    path, values = tmp_path / 'x.json', dict(a=value, b=[{'c': bad}] if deep else bad)
    with pytest.raises(ValueError, match='has values that JSON cannot represent'):
        write_json(path, values)
    path.write_text(json.dumps(seal(values)))
    with pytest.raises(BadFile, match='(NaN|Infinity) is not valid JSON'):
        read_json(path)
    path.unlink()


@often
@given(st.binary(max_size=200))
def test_any_bytes_are_no_result(tmp_path, data):
    (tmp_path / 'x.json').write_bytes(data)
    with pytest.raises(BadFile):
        read_json(tmp_path / 'x.json')


def a_batch(tmp_path, text):
    if not (tmp_path / 'exp.ipynb').exists():
        notebook(tmp_path, 'x = 1\nlr = 0.1\nname = "a"\nseed = 0\nscale = "smoke"')
    (tmp_path / 'b.yaml').write_text(text, encoding='utf-8')
    return tmp_path / 'b.yaml'


@often
@given(st.text(max_size=120) | plain.map(yaml.safe_dump))
@example('!!python/object/apply:os.system ["touch pwned"]')
@example('experiment: exp.ipynb\nruns: !!python/name:os.system')
@example(
    'experiment: exp.ipynb\nruns: {a: !!python/object/new:subprocess.Popen [["touch", "pwned"]]}'
)
@example('a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]')
def test_any_text_is_a_batch_or_refused(tmp_path, text):
    "Nothing is executed, nothing is written, the error is ours."
    try:
        text.encode()
    except UnicodeEncodeError:
        return
    try:
        read_batch(a_batch(tmp_path, text), runs=tmp_path / 'runs')
    except BadBatch as e:
        assert str(e)
    assert names_in(tmp_path) == ['b.yaml', 'exp.ipynb']
    assert not Path('pwned').exists()


keys = st.sampled_from(['x', 'lr', 'name', 'seed', 'scale', 'y', 'scales'])
scales = st.sampled_from(['smoke', 'short', 'paper', 'tiny'])
entries = st.dictionaries(keys, plain, max_size=2)
batches = st.fixed_dictionaries(
    dict(
        experiment=st.just('exp.ipynb'),
        runs=st.dictionaries(
            name, st.dictionaries(keys, plain, max_size=3), min_size=1, max_size=3
        ),
    ),
    optional=dict(common=entries, scales=st.dictionaries(scales, entries, max_size=2)),
)


@often
@given(batches)
def test_a_batch_that_is_accepted_can_be_run(tmp_path, doc):
    "Each run has a name of its own and all parameters, of the right types; or it is refused."
    file = a_batch(tmp_path, yaml.safe_dump(doc))
    try:
        runs = read_batch(file, runs=tmp_path / 'runs')
    except BadBatch as e:
        assert str(file) in str(e)
        return
    assert len({run.name for run in runs}) == len(runs)
    types = dict(x=int, lr=float, name=str, seed=int, scale=str)
    for run in runs:
        assert {k: type(v) for k, v in run.params.items()} == types
        assert split_name(run.name, '')


@often
@given(st.lists(st.integers(-5, 10**9), min_size=1, max_size=6, unique=True))
def test_seeds_expand(tmp_path, seeds):
    doc = dict(experiment='exp.ipynb', runs=dict(a=dict(seed=seeds)))
    runs = read_batch(a_batch(tmp_path, yaml.safe_dump(doc)), runs=tmp_path / 'runs')
    assert [run.params['seed'] for run in runs] == seeds
