"""What goes into a run is read, checked and named before anything runs."""

from pathlib import Path

import papermill
import pytest
from fewshotmeta.lab.parameters import (
    BadParameters,
    default_name,
    merge_parameters,
    parse_value,
    read_parameters,
)
from tiny import notebook, run

FOLDER = Path(__file__).parents[1] / 'nbs/experiments'
EXPERIMENTS = sorted(path.name for path in FOLDER.glob('*.ipynb'))


def test_read_parameters(tmp_path):
    p = read_parameters(notebook(tmp_path))
    defaults = dict(x=2, name='a', rate=0.5, flags=[1, 2], maybe=None, steps=[1, 2], scale='smoke')
    assert {k: v.default for k, v in p.items()} == defaults
    assert p['x'].meaning == 'a number'


LONG = """# which method, and on what
method = "maml"  # maml, fomaml,
# or any other

ways = [
    2,  # the fewest
    5,
]  # the most
# of a task
word = "é # no comment"  # a meaning, whole
none = 1
"""


def test_a_meaning_takes_the_lines_that_it_needs(tmp_path):
    p = read_parameters(notebook(tmp_path, LONG))
    assert {k: v.meaning for k, v in p.items()} == dict(
        method='maml, fomaml, or any other',
        ways='the fewest the most of a task',
        word='a meaning, whole',
        none='',
    )


@pytest.mark.parametrize(
    'given,words',
    [
        (dict(y=1), "no parameter 'y'. There are: x, name"),
        (dict(rat=0.1), "did you mean 'rate'?"),
        (dict(x='3'), "x='3': expected int, like the default 2 .a number."),
        (dict(x=1.5), 'x=1.5: expected int'),
        (dict(x=True), 'x=True: expected int'),
        (dict(name=3), 'name=3: expected str'),
        (dict(rate='fast'), 'expected float'),
        (dict(flags=3), 'expected list'),
    ],
)
def test_unknown_or_wrong_parameters(tmp_path, given, words):
    nb = notebook(tmp_path)
    with pytest.raises(BadParameters, match=words):
        run(nb, given)
    assert not (tmp_path / 'runs').exists()


def test_values_from_the_command_line(tmp_path):
    p = read_parameters(notebook(tmp_path))
    assert parse_value(p['x'], '7') == 7
    assert parse_value(p['rate'], '1') == 1.0
    assert parse_value(p['name'], '7') == '7'
    assert parse_value(p['flags'], '[3]') == [3]
    assert parse_value(p['maybe'], 'none') is None
    assert parse_value(p['maybe'], 'hello') == 'hello'
    rate = merge_parameters(p, dict(rate=1))['rate']
    assert rate == 1.0
    assert type(rate) is float


@pytest.mark.parametrize(
    'cell,words',
    [
        ('x = open("f")', 'not .x = open'),
        ('import os', 'name = literal'),
        ('x, y = 1, 2', 'name = literal'),
        ('x = y = 1', 'name = literal'),
        ('x = 1\nz += 1', 'name = literal'),
        ('x = = 1', 'not plain Python, line 1'),
        ('%timeit 1', 'not plain Python'),
        ('x = [i for i in range(3)]', 'name = literal'),
    ],
)
def test_only_literals(tmp_path, cell, words):
    with pytest.raises(BadParameters, match=words):
        run(notebook(tmp_path, cell))


def test_missing_tag(tmp_path):
    with pytest.raises(BadParameters, match='0 cells tagged "parameters", not one'):
        run(notebook(tmp_path, tag=False))


def test_not_a_notebook(tmp_path):
    (tmp_path / 'exp.ipynb').write_text('hello')
    with pytest.raises(BadParameters, match='exp.ipynb is not a notebook'):
        run(tmp_path / 'exp.ipynb')


def test_names(tmp_path):
    nb = notebook(tmp_path)
    for bad in ('../x', 'a/b/c', '/abs', 'a/..', '.', 'a b'):
        with pytest.raises(BadParameters, match='letters, digits|at most one'):
            run(nb, name=bad)
    assert default_name(dict(n_way=20, data='x y')) == 'data=x-y_n_way=20'
    assert default_name({}) == 'defaults'


@pytest.mark.parametrize('name', EXPERIMENTS)
def test_papermill_reads_every_parameter_too(name, caplog):
    "It gives a line up, with a warning in the middle of a run, where a comment has a second `=`."
    path = FOLDER / name
    assert set(papermill.inspect_notebook(path)) == set(read_parameters(path))
    assert not caplog.records
