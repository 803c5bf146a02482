"""Whatever is read from outside: a value that keeps its contract, or an error that names it.

Each test tries some hundred altered inputs here, and 20,000 with `make fuzz`.
"""

import contextlib
import io
import json
import os
import re
import shutil

import pytest
from conftest import ROOT
from fuzzing import altered, folder, no_hang, often
from hypothesis import given
from hypothesis import strategies as st

from fewshotmeta.lab.batches import BadBatch, read_batch
from fewshotmeta.lab.command import _given, _parser
from fewshotmeta.lab.parameters import BadParameters, Parameter, default_name, merge_parameters
from fewshotmeta.lab.parameters import parse_value, read_parameters, split_name

EXPERIMENTS = ROOT / 'nbs' / 'experiments'


# ---- batch files
BATCHES = ('hidra_f1', 'hidra_f3', 'hypermaml_f1', 'photographs', 'mamlpp_t3', 'hypermaml_t6')
_TEN = [f'&{name} [{", ".join(["*" + other] * 10)}]' for other, name in zip('bcdefg', 'cdefgh')]
LAUGHS = f'[&b [{", ".join(["1"] * 10)}], {", ".join(_TEN)}]'
_TEN = [f'&{name} {{<<: [{", ".join(["*" + a] * 10)}]}}' for a, name in zip('bcdefg', 'cdefgh')]
MERGES = f'[&b {{seed: 1}}, {", ".join(_TEN)}]'
NUMBERS = (
    '010 0o17 0b11 0x1F 1_000 1_0.5 -0 +1 -1 0 3 1e5 1E+5 1.0e+5 .5 5. 1e999 -1e999 .inf -.inf '
    '.nan nan inf 1:30 190:20:30.15 2020-01-01 2020-11-11 2001-12-14t21:59:43.10-05:00 2x 0.5x 0x '
    '1e400x 1..2x true True yes no on off null ~ 1+2j 0x_1 ٣ ² 1_ _1 1e 9007199254740993'
).split()
LONG = ('9' * 400, '9' * 5000, '0x' + 'f' * 5000, '-' + '9' * 310, '9' * 400 + 'x', 'x' * 300)
YAML = (
    "''",
    '""',
    '"\\ud800"',
    '"\\0"',
    '"\\u2028"',
    '"a\\nb"',
    "'5'",
    '!!int "[1]"',
    '!!int [1]',
    '!!int {a: 1}',
    '!!float x',
    '!!bool 3',
    '!!str 5',
    '!!null x',
    '!!binary aGk=',
    '!!set {a, b}',
    '!!omap [a: 1]',
    '!!pairs [a: 1]',
    '!!timestamp 1',
    '!!python/name:os.system',
    '!own x',
    f'!!int "{"(" * 250}"',
    f'!!int "{"-" * 5000}1"',
    '&a [*a]',
    '&a {x: *a}',
    '&a {grid: *a}',
    '*nowhere',
    '{<<: 3}',
    '{<<: {seed: 1}}',
    '{<<: [{seed: 1}, {seed: 2}]}',
    '{<<: &a {<<: *a}}',
    '{? [a] : 1}',
    '{1: 2}',
    '{true: 2}',
    '{=: 2}',
    '{0x' + 'f' * 5000 + ': 2}',
    '[0x' + 'f' * 5000 + ']',
    '[.nan]',
    '[1, 2.5, a, null]',
    '[]',
    '{}',
    '[[[[1]]]]',
    '[' * 300 + ']' * 300,
    '[' * 3000,
    LAUGHS,
    f'{{grid: {{seed: {LAUGHS}}}}}',
    '{seed: [0, 1]}',
    '{seed: [0, 0.0, false]}',
    '{grid: {inner_lr: [0.1, 1x, 2x]}}',
    '{grid: {inner_lr: [0.1, 1e-1]}}',
    '{grid: {scale: [smoke]}}',
    '{grid: {method: [a b, "a\\nb", é]}}',
    '{scales: {short: no}}',
    MERGES,
    f'{{x: {MERGES}}}',
    '{scales: {paper: {seed: [1]}}}',
    '../../x',
    '/etc/passwd',
    'train.ipynb',
    'hidra_f1/random_init',
    'random_init',
    '%a',
    '`',
    '@',
    '\x07',
    '\ufeff',
    'é',
    '👾',
    '- a',
    '|\n  a',
    '# a',
)
NAMES = (
    'seed grid scale scales runs common experiment inner_lr n_way test_ways learner start options '
    '<< data method iterations train_ways plugin smoke short paper x'
).split()
words = st.sampled_from([*NUMBERS, *LONG, *YAML])
VALUE = re.compile(r'(?<=: )[^,{}\[\]\n]+')


@st.composite
def batch_texts(draw):
    "The text of a real batch file, changed in up to three places."
    text = (EXPERIMENTS / f'{draw(st.sampled_from(BATCHES))}.yaml').read_text(encoding='utf-8')
    for _ in range(draw(st.integers(1, 3))):
        lines = text.splitlines()
        at = draw(st.integers(0, max(0, len(lines) - 1)))
        line = lines[at] if lines else ''
        kind = draw(st.sampled_from(['value', 'value', 'value', 'line', 'twice', 'cut', 'letter']))
        spans = [found.span() for found in VALUE.finditer(line)]
        if kind == 'value' and spans:
            first, last = draw(st.sampled_from(spans))
            lines[at] = line[:first] + draw(words | st.text(max_size=8)) + line[last:]
        elif kind == 'line':
            indent = ' ' * (len(line) - len(line.lstrip()))
            lines.insert(at, f'{indent}{draw(st.sampled_from(NAMES))}: {draw(words)}')
        elif kind == 'twice':
            lines.insert(at, line)
        elif kind == 'cut':
            lines = lines[:at]
        else:
            place = draw(st.integers(0, len(line)))
            lines[at:at] = [line[:place] + draw(st.characters()) + line[place:]]
        text = '\n'.join(lines)
    return text


@pytest.fixture(scope='module')
def experiments(tmp_path_factory):
    "The notebooks of the experiments, to which batch files are put."
    place = tmp_path_factory.mktemp('experiments')
    for file in EXPERIMENTS.glob('*.ipynb'):
        shutil.copy(file, place)
    for name in BATCHES:
        shutil.copy(EXPERIMENTS / f'{name}.yaml', place)
    return place


def check_planned(planned):
    "Each run has a name of its own, all parameters in their types, and JSON for them."
    assert len({p.name for p in planned}) == len(planned) > 0
    for p in planned:
        known = read_parameters(p.notebook)
        assert list(p.params) == list(known)
        json.dumps(p.params, allow_nan=False)
        assert merge_parameters(known, p.given) == p.params
        assert split_name(p.name, '') == (p.experiment, p.slug)
        for name, parameter in known.items():
            if parameter.default is not None:
                assert type(p.params[name]) is type(parameter.default)


@often
@given(batch_texts(), st.sampled_from(['', 'smoke', 'short', 'paper']))
def test_batch_files(experiments, text, scale):
    file = experiments / 'b.yaml'
    file.write_text(text, encoding='utf-8', errors='surrogatepass')
    there = sorted(os.listdir(experiments))
    with no_hang():
        try:
            planned = read_batch(file, scale, runs=experiments / 'runs')
        except BadBatch as e:
            assert str(file) in str(e)
            assert len(str(e)) < 20_000
        else:
            check_planned(planned)
    assert sorted(os.listdir(experiments)) == there


CODE = dict(cell_type='code', metadata=dict(tags=['parameters']))
KINDS = dict(a=1, b=0.5, c=True, d=[1], e=[0.5])
plain_word = st.sampled_from(NUMBERS) | st.text('0123456789+-._xeoba', min_size=1, max_size=8)


@often
@given(st.sampled_from(sorted(KINDS)), plain_word | st.lists(plain_word, max_size=3))
def test_a_batch_file_and_the_command_line_mean_the_same(name, word):
    "What both accept is the same value; only a factor of another value means nothing when typed."
    parameter = Parameter(name, KINDS[name])
    text = f'[{", ".join(word)}]' if isinstance(word, list) else word
    with folder() as place:
        cell = CODE | dict(source=f'{name} = {KINDS[name]!r}')
        (place / 'x.ipynb').write_text(json.dumps(dict(cells=[cell])))
        file = place / 'b.yaml'
        file.write_text(f'experiment: x.ipynb\nruns: {{r: {{{name}: {text}}}}}', encoding='utf-8')
        with no_hang():
            try:
                (planned,) = read_batch(file, runs=place)
                typed = parse_value(parameter, text)
            except (BadBatch, BadParameters):
                return
    found = planned.params[name]
    if re.fullmatch(r'(\d+\.?\d*|\.\d+)x', text) or text in ('null', '~'):
        return
    assert (found, type(found)) == (typed, type(typed))


# ---- parameters
values = words | st.text(max_size=12) | st.integers().map(str) | st.floats().map(repr)
values = values | st.lists(st.integers() | st.text(max_size=3), max_size=3).map(repr)
PYTHON = (
    '{1: 0x' + 'f' * 5000 + '}',
    '{0x' + 'f' * 5000 + '}',
    '-' * 5000 + '1',
    '[' * 150 + ']' * 150,
    "'" + '\\' * 3,
    "'\ud800'",
    '\ud800',
    "b'x'",
    '...',
    "{'a': [1]}",
    '{1, 2}',
    '[1, [2, [3]]]',
    '(1,)',
    '1,2',
    '1,,2',
    ',',
    '[nan]',
    '[1e999]',
    ' 1',
    '1\n',
    '\x00',
)
PARSER = _parser()
GIVEN = ('inner_lr', 'n_way', 'test_ways', 'options', 'data', 'seed', '', 'X')
typed_values = st.sampled_from(PYTHON) | values


@often
@given(
    st.lists(
        st.tuples(st.sampled_from(GIVEN), typed_values),
        min_size=1,
        max_size=3,
    ),
    st.lists(st.text(max_size=6), max_size=1),
)
def test_parameters_of_the_command_line(items, more):
    "All in their types and fit for JSON; a value that is shown can be typed again."
    notebook = EXPERIMENTS / 'train.ipynb'
    typed = [f'{name}={value}' for name, value in items] + more
    try:
        with no_hang(), contextlib.redirect_stderr(io.StringIO()) as said:
            args = PARSER.parse_args(['run', str(notebook), '-p', *typed])
    except SystemExit as e:
        assert e.code == 2 and 'usage' in said.getvalue()
        assert any(item.startswith('-') for item in more)
        return
    known = read_parameters(notebook)
    try:
        given = _given(args, notebook)
        params = merge_parameters(known, given)
    except BadParameters as e:
        assert str(e)
        return
    json.dumps(params, allow_nan=False)
    assert split_name(default_name(given), 'train')
    for name, value in given.items():
        assert type(params[name]) is type(known[name].default)
        again = params[name] if isinstance(params[name], str) else repr(params[name])
        assert parse_value(known[name], again) == params[name]


NOTEBOOK = dict(
    cells=[
        dict(cell_type='markdown', metadata={}, source=['a']),
        CODE | dict(source=['x = 1  # a\n', 'y = [2]']),
    ],
    metadata={},
)
SOURCES = (
    'x = ' + '-' * 5000 + '1',
    'x = ' + '(' * 300,
    'x = "\ud800"',
    'x = {1: 0x' + 'f' * 5000 + '}',
    'x: int = 0x' + 'f' * 5000,
    'x = 1\x0cy = 2',
    'x = 1\u2028y = 2',
    'x = 1\ry = 2 # a',
    'x: ' + 'a.' * 3000 + 'b = 1',
    'x: list[' * 50 + ']' * 50 + ' = [1]',
    'x = 1 if',
    'x = "\\N{DASH}"',
    'x = f"{1}"',
    'def x(): pass',
    'x = y = 1',
    'x, y = 1, 2',
    'x: int',
    'x += 1',
    'x\x00 = 1',
)


def notebook_of(source):
    return dict(cells=[CODE | dict(source=source)])


sources = st.sampled_from(SOURCES) | st.text(max_size=40)


@often
@given(altered(NOTEBOOK) | sources.map(notebook_of))
def test_notebooks(tree):
    with folder() as place:
        file = place / 'x.ipynb'
        file.write_text(json.dumps(tree), encoding='utf-8')
        with no_hang():
            try:
                known = read_parameters(file)
            except BadParameters as e:
                assert 'x.ipynb' in str(e)
                return
    for parameter in known.values():
        json.dumps(parameter.default, allow_nan=False)
        assert parameter.name.isidentifier()
    assert merge_parameters(known, {}) == {k: p.default for k, p in known.items()}
