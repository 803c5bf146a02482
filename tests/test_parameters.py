"""What goes into a run is read, checked and named before anything runs."""

from pathlib import Path

import papermill
import pytest
from fewshotmeta.lab.parameters import (
    BadParameters,
    Parameter,
    check_value,
    default_name,
    experiment_file,
    merge_parameters,
    parse_value,
    project_folder,
    read_parameters,
    runs_folder,
    split_name,
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
    'text,value',
    [
        ('7', 7),
        ('1e5', 100_000),
        ('3.0', 3),
        ('2_000', 2000),
        ('-1e3', -1000),
        ('0x10', 16),
    ],
)
def test_whole_numbers_as_people_type_them(text, value):
    found = parse_value(Parameter('n', 30), text)
    assert found == value
    assert type(found) is int


@pytest.mark.parametrize('text', ['1.5e0', '2.5', '010', 'inf', 'nan', '1e999', '1e30', '', '1,5'])
def test_what_is_no_whole_number(text):
    with pytest.raises(BadParameters, match='n=.* expected (int, like the default 30|a finite)'):
        parse_value(Parameter('n', 30), text)
    with pytest.raises(BadParameters, match='n=.* expected int.* a whole number is written 20'):
        parse_value(Parameter('n', 30), '010')


@pytest.mark.parametrize('text', ['inf', '-inf', 'nan', '1e999', '-1e999', '1' * 400])
def test_a_number_that_json_lacks_is_refused_by_any_spelling(text):
    with pytest.raises(BadParameters, match='lr=.* finite number'):
        parse_value(Parameter('lr', 0.1), text)
    for default in (None, [1.0]):
        with pytest.raises(BadParameters, match='finite number'):
            parse_value(Parameter('lr', default), '[1, 1e999]')


@pytest.mark.parametrize('word', ['inf', '-Infinity', 'nan', ' NaN ', '.inf', '-.inf', '.NaN'])
def test_infinity_in_words_is_refused_but_as_text(word):
    for default, text in ((0.1, word), (1, word), (None, word), ([1.0], f'2,{word}'), ([], word)):
        with pytest.raises(BadParameters, match='lr=.*(a finite number|a list is written)'):
            parse_value(Parameter('lr', default), text)
    for default, value in ((None, word), (None, [word]), ([2], [1, word])):
        with pytest.raises(BadParameters, match='lr=.*: expected a finite number'):
            merge_parameters(dict(lr=Parameter('lr', default)), dict(lr=value))
    assert parse_value(Parameter('name', 'a'), word) == word
    assert parse_value(Parameter('names', ['a']), word) == [word.strip()]


def test_a_list_of_whole_numbers_has_whole_numbers():
    found = parse_value(Parameter('ways', [2, 5]), '1e1,3')
    assert found == [10, 3]
    assert [type(item) for item in found] == [int, int]
    assert parse_value(Parameter('ways', [2, 5]), '0.5,3') == [0.5, 3]


@pytest.mark.parametrize('text', ['[b"x"]', '{1, 2}', '[{1}]', '[1j]', '[...]', '9' * 400])
def test_what_no_list_can_hold(text):
    with pytest.raises(BadParameters, match='words=.*expected (a number, text|list|a finite)'):
        parse_value(Parameter('words', [1]), text)


def test_a_number_too_long_to_be_written():
    for text in ('9' * 400, '9' * 5000, '0x' + 'f' * 10_000):
        with pytest.raises(BadParameters, match='n=.*expected (a finite number|int)'):
            parse_value(Parameter('n', 1), text)


@pytest.mark.parametrize(
    'default,text,value',
    [
        (['a'], 'msl,da', ['msl', 'da']),
        (['a'], '[msl, da]', ['msl', 'da']),
        (['a'], '["msl", \'d,a\']', ['msl', 'd,a']),
        (['a'], 'msl', ['msl']),
        (['a'], 'none', ['none']),
        (['a'], '', []),
        (['a'], '[]', []),
        ([], '[ ]', []),
        ([], 'msl,3,', ['msl', 3]),
        ([2], '2,10', [2, 10]),
        ([2], '2,', [2]),
        ([2], '7', [7]),
        ([], '(2, (3, 4))', [2, [3, 4]]),
    ],
)
def test_lists_as_people_type_them(default, text, value):
    assert parse_value(Parameter('ways', default), text) == value


@pytest.mark.parametrize(
    'default,value,odd',
    [
        ([2], [2, 'x'], "'x'"),
        ([2], [None], 'None'),
        ([0.5], [True], 'True'),
        ([1, 0.5], ['null'], "'null'"),
        ([2], [2, [3]], r'\[3\]'),
        ([True], [1], '1'),
        (['a'], ['a', 1], '1'),
    ],
)
def test_items_of_another_kind_are_refused(default, value, odd):
    with pytest.raises(BadParameters, match=rf'ways=.*: {odd} is not like the items of the def'):
        check_value(Parameter('ways', default), value)


@pytest.mark.parametrize('text', ['a,,b', '[a', '{a,b}', 'a,"b"', '[a,[b]]', '{}'])
def test_what_is_no_list(text):
    with pytest.raises(BadParameters, match='expected list.* a list is written 1,2 or'):
        parse_value(Parameter('ways', ['a']), text)


def test_a_list_for_one_value_is_a_sweep():
    for default in (0.1, 3, True):
        with pytest.raises(BadParameters, match=r'batch file .* `grid: {lr: \[0.05, 0.1\]}`'):
            parse_value(Parameter('lr', default), '[0.05,0.1]')


@pytest.mark.parametrize('text', ['{1, 2}', 'b"x"', '1j', '{1: 2}', '{[]: 1}', '[' * 300])
def test_what_a_result_cannot_hold(text):
    "Text stays text where anything will do; other things of Python are refused."
    try:
        assert parse_value(Parameter('maybe', None), text) == text
    except BadParameters as e:
        assert 'expected a number, text, a truth value, None, or a list' in str(e)
    with pytest.raises(BadParameters, match='n=.*: expected '):
        parse_value(Parameter('n', 1), text)


TYPED = """n: int = 1  # a number
lr: float = 1
ways: list[int] = (2, 3)
maybe: int | None = None
name: 'str' = "a"
"""


def test_types_behind_the_names(tmp_path):
    p = read_parameters(notebook(tmp_path, TYPED))
    defaults = dict(n=1, lr=1.0, ways=[2, 3], maybe=None, name='a')
    assert {k: v.default for k, v in p.items()} == defaults
    assert type(p['lr'].default) is float
    assert p['n'].meaning == 'a number'
    assert run(notebook(tmp_path, 'x: int = 2'), dict(x=3))['metrics']['square']['mean'] == 9


@pytest.mark.parametrize(
    'cell,words',
    [
        ('n: int', 'name = literal'),
        ('n: int = "a"', "'n: int = .a.': 'a' is not int: change the default"),
        ('n: int = None', 'None is not int: .* write int . None'),
        ('n: int = 1.5', '1.5 is not int'),
        ('n: bool = 1', '1 is not bool'),
        ('ways: list[int] = 3', r'3 is not list\[int\]'),
        ('lr = 1e999', 'lr=inf: expected a finite number'),
        ('tags = {1, 2}', 'tags={1, 2}: expected a number'),
        ('tags = {[]: 1}', 'name = literal'),
        ('a.b: int = 1', 'name = literal'),
    ],
)
def test_defaults_that_are_not_what_they_should_be(tmp_path, cell, words):
    with pytest.raises(BadParameters, match=words):
        read_parameters(notebook(tmp_path, cell))


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


def test_a_notebook_with_conflict_markers(tmp_path):
    "As git leaves it behind a merge; the same marks in a cell's text are a cell's text."
    nb = notebook(tmp_path, 'x = 1', "print('<<<<<<< HEAD')")
    assert read_parameters(nb)['x'].default == 1
    lines = nb.read_text().splitlines()
    lines[2:2] = ['<<<<<<< HEAD', '  "a": 1,', '=======', '  "a": 2,', '>>>>>>> theirs']
    nb.write_text('\n'.join(lines))
    words = "has git's conflict markers, the first in line 3: resolve the conflict, or take one"
    with pytest.raises(BadParameters, match=words):
        read_parameters(nb)


def test_names(tmp_path):
    nb = notebook(tmp_path)
    for bad in ('../x', 'a/b/c', '/abs', 'a/..', '.', 'a b'):
        with pytest.raises(BadParameters, match='letters, digits|at most one'):
            run(nb, name=bad)
    with pytest.raises(BadParameters, match='201 bytes, 200 at most: choose a shorter name'):
        run(nb, name='a' * 201)
    assert split_name(default_name(dict(x='猫' * 300)), 'exp')
    assert default_name(dict(n_way=20, data='x y')) == 'data=x-y_n_way=20'
    assert default_name({}) == 'defaults'


@pytest.mark.parametrize('name', EXPERIMENTS)
def test_papermill_reads_every_parameter_too(name, caplog):
    "It gives a line up, with a warning in the middle of a run, where a comment has a second `=`."
    path = FOLDER / name
    assert set(papermill.inspect_notebook(path)) == set(read_parameters(path))
    assert not caplog.records


def test_the_folder_of_runs_is_found_from_below(tmp_path, monkeypatch):
    nb = notebook(tmp_path / 'project' / 'nbs')
    deep = tmp_path / 'project' / 'nbs' / 'deep'
    deep.mkdir()
    monkeypatch.chdir(deep)
    assert runs_folder() == deep / 'runs'  # nothing stands above
    (tmp_path / 'runs').mkdir()
    assert runs_folder() == tmp_path / 'runs'
    (tmp_path / 'project' / 'settings.ini').write_text('')
    assert runs_folder() == tmp_path / 'project' / 'runs'
    monkeypatch.chdir(tmp_path)
    assert runs_folder() == tmp_path / 'runs'
    assert runs_folder(nb) == tmp_path / 'project' / 'runs'


def test_experiments_are_found_by_name(tmp_path, monkeypatch):
    "A file that is there, then the project's, then the package's."
    monkeypatch.chdir(tmp_path)
    assert experiment_file('train') == FOLDER / 'train.ipynb'
    assert experiment_file('train.ipynb') == FOLDER / 'train.ipynb'
    assert experiment_file('omniglot', '.yaml') == FOLDER / 'omniglot.yaml'
    assert experiment_file('nbs/train.ipynb') == Path('nbs/train.ipynb')  # a path is a path
    with pytest.raises(BadParameters, match="trian here, did you mean 'train'. .*: adaptation_"):
        experiment_file('trian')
    (tmp_path / 'settings.ini').write_text('')
    own = tmp_path / 'nbs' / 'experiments' / 'train.ipynb'
    notebook(own.parent).rename(own)
    assert experiment_file('train') == own
    (tmp_path / 'train.ipynb').write_text('')
    assert experiment_file('train.ipynb') == Path('train.ipynb')
    assert project_folder(own) == tmp_path
