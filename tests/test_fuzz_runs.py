"""Folders of runs that were altered: what reads them names the file, and shows the other runs.

Each test tries some hundred altered folders here, and 20,000 with `make fuzz`.
"""

import base64
import contextlib
import io
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from fuzzing import ODD, STRANGE, altered, circle, filled_folder, folder, no_hang, nowhere
from fuzzing import often, pipe, put, spoilt
from hypothesis import example, given
from hypothesis import strategies as st

from fewshotmeta.data.files import seal, write_json
from fewshotmeta.lab.batches import Planned
from fewshotmeta.lab.command import _overview
from fewshotmeta.lab.compare import compare, task_accuracies
from fewshotmeta.lab.locks import failure_record, last_failure, marker
from fewshotmeta.lab.parameters import BadParameters
from fewshotmeta.lab.reports import find_runs, measured, picture, trained_in
from fewshotmeta.lab.results import all_results, group_results, table_of, table_text
from fewshotmeta.lab.runs import begun_by, changed_since_begun, run_notebook, settle_run
from fewshotmeta.lab.states import _table, describe_state, state_of
from fewshotmeta.training.checkpoints import note_phase, read_progress
from tiny import notebook

NOTEBOOK = 'scale = "short"\nseed = 0\nlearner = ""\nsteps = [1, 2]\n'
PARAMS = dict(scale='short', seed=0, learner='', steps=[1, 2])
ACCURACY = dict(mean=0.5, ci95=0.25, n=3, tasks='aa')
RESULT = dict(
    experiment='table',
    run='b_short_seed0',
    notebook='exp.ipynb',
    scale='short',
    params=PARAMS,
    metrics=dict(test_accuracy=ACCURACY, seconds=dict(mean=1.5, ci95=None, n=1)),
    episodes_digest='aa',
    device='CPU',
    kernels='',
    seconds=2.5,
    digest=dict(notebook='1', params='2', code='3'),
    versions=dict(python='3'),
    commit=None,
    dirty=None,
    started='2026-01-01T00:00:00.000+00:00',
    finished='2026-01-02T00:00:00.000+00:00',
    resumed_with=[dict(iteration=5, when='2026', digest=dict(code='4'), commit='a', dirty=True)],
)
TASKS = 'metric,task,step_0,step_1\n'
TASKS += ''.join(f'test_accuracy,{i},0.2,{a}\n' for i, a in enumerate((0.25, 0.5, 0.75)))
NUMBERS = (float('nan'), float('inf'), -1e308, 2**53, 10**4000)


def as_text(tree):
    "JSON; what is infinite as a number that is too large, too."
    text = json.dumps(tree, indent=1)
    return text.replace('-Infinity', '-1e999')


@st.composite
def json_files(draw, whole):
    "The file of sealed values: altered and sealed anew, or not; its text altered; something else."
    kind = draw(st.sampled_from(['sealed', 'sealed', 'sealed', 'as it is', 'text', 'strange']))
    if kind == 'strange':
        return draw(st.sampled_from(STRANGE))
    if kind == 'text':
        return draw(spoilt(as_text(seal(whole)).encode()))
    tree = draw(altered(whole, (*ODD, *NUMBERS, '2027', 'table', 1.5)))
    if kind == 'sealed' and isinstance(tree, dict):
        tree = seal(tree)
    text = as_text(tree)
    return draw(st.sampled_from([text, text, text.replace('Infinity', '1e999')])).encode()


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    "A folder of two runs; the tests alter the second one, and the first one is whole."
    place = tmp_path_factory.mktemp('runs') / 'runs'
    notebook(place.parent, NOTEBOOK)
    for name in ('a', 'b'):
        own = place / 'table' / f'{name}_short_seed0'
        write_json(own / 'result.json', RESULT | dict(run=own.name))
        (own / 'tasks.csv').write_text(TASKS)
        (own / 'checkpoint.safetensors').touch()
    return place


def planned(runs):
    "The run that is altered, as a batch has it."
    place = 'table', 'b_short_seed0', runs.parent / 'exp.ipynb'
    return Planned(*place, {}, PARAMS, runs)


def altered_run(runs):
    return runs / 'table' / 'b_short_seed0'


@contextlib.contextmanager
def in_place_of(path, thing):
    "Have something else in the place of a file for a while."
    whole = path.read_bytes() if path.exists() else None
    try:
        put(path, thing)
        yield
    finally:
        put(path, whole or b'')
        if whole is None:
            path.unlink()


def overview(runs):
    "What `fewshotmeta status` says of a folder."
    with contextlib.redirect_stdout(io.StringIO()) as said:
        _overview(runs)
    return said.getvalue()


def table(runs, whole):
    "Each result, or each of its numbers, has its row."
    assert len(table_of(whole)) == len(whole)
    assert len(table_of(whole, True, True)) == sum(len(r['metrics']) for r in whole)


def text(runs, whole):
    "Shown on a screen."
    assert 'test_accuracy' in table_text(table_of(whole, every=True))


def groups(runs, whole):
    "Grouped, or refused in words."
    try:
        found = group_results(whole, ['recipe'])
    except ValueError as e:
        assert 'short_seed0' in str(e)
    else:
        assert found['seeds'].sum() == len(whole)


def reported(runs, whole):
    "What a report takes of the runs of a table, and of the run that trained the learner."
    try:
        for results in find_runs(runs, 'table').values():
            assert measured(results).seeds == len(results) == 1
            assert trained_in(results[0])['folder'].is_dir()
    except ValueError as e:
        assert 'b_short_seed0' in str(e) and len(str(e)) < 5000
    except FileNotFoundError as e:
        assert str(runs) in str(e)


def compared(runs, whole):
    "Compared, or refused in words."
    names = [f'table/{name}_short_seed0' for name in 'ab']
    try:
        assert 'b_short_seed0' in str(compare(names, runs=runs))
    except ValueError as e:
        assert 'b_short_seed0' in str(e) and len(str(e)) < 5000


looks = st.sampled_from(6 * [reported] + [table, text, groups, compared])  # it is the quickest


def check_done_or_refused(runs):
    "A run that has a result is not executed again."
    try:
        again = run_notebook(runs.parent / 'exp.ipynb', {}, planned(runs).name, runs)
    except BadParameters as e:
        assert 'b_short_seed0' in str(e) and '--force' in str(e)
    else:
        assert again['already'] and again['params'].items() <= PARAMS.items()


def sealed(whole, **changes):
    "The file of values that were changed by hand and sealed again."
    return as_text(seal(whole | changes)).encode()


def metric(**changes):
    "The file of a result of one metric that was changed."
    return sealed(RESULT, metrics=dict(test_accuracy=ACCURACY | changes))


@often
@given(thing=json_files(RESULT), look=looks)
@example(thing=filled_folder, look=table)
@example(thing=pipe, look=compared)
@example(thing=circle, look=reported)
@example(thing=sealed(dict(seed=1)), look=table)
@example(thing=sealed(RESULT, run='../../x'), look=reported)
@example(thing=sealed(RESULT, scale='a('), look=text)
@example(thing=sealed(RESULT, seconds=10**400), look=table)
@example(thing=sealed(RESULT, device='\ud800'), look=table)
@example(thing=sealed(RESULT, params=PARAMS | {'\ud800': '\ud800'}), look=text)
@example(thing=sealed(RESULT, params=PARAMS | dict(learner='/')), look=reported)
@example(thing=sealed(RESULT, resumed_with=[7]), look=table)
@example(thing=sealed(RESULT, resumed_with=None), look=table)
@example(thing=sealed(RESULT, params=PARAMS | dict(seed=[])), look=compared)
@example(thing=metric(mean=None), look=text)
@example(thing=metric(mean=float('inf')).replace(b'Infinity', b'1e999'), look=groups)
@example(thing=metric(n='x'), look=table)
def test_results(runs, thing, look):
    file = altered_run(runs) / 'result.json'
    with in_place_of(file, thing), no_hang():
        whole, bad = all_results(runs)
        assert whole[0]['run'] == 'a_short_seed0'
        assert len(whole) + len(bad) == 2
        assert all(str(file) in said and len(said) < 1000 for said in bad)
        assert '✓ table/a_short_seed0' in overview(runs)
        state = state_of(planned(runs))
        assert describe_state(planned(runs), state)
        assert state.broken == bool(bad) or thing == nowhere
        look(runs, whole)
        if thing != nowhere:  # it would be executed
            check_done_or_refused(runs)


SWAPPED = TASKS.replace(',0,', ',x,').replace(',2,', ',0,').replace(',x,', ',2,').encode()


@often
@example(content=SWAPPED)
@example(content=TASKS.replace('step_1', 'metric').encode())
@example(content=b'')
@given(content=spoilt(TASKS.encode()) | st.sampled_from(STRANGE))
def test_accuracies_of_tasks(runs, content):
    place = altered_run(runs)
    with in_place_of(place / 'tasks.csv', content), no_hang():
        try:
            found = task_accuracies(place)
        except ValueError as e:
            assert f'{place}/tasks.csv' in str(e) or f'{place} has no tasks.csv' in str(e)
            assert '--force' in str(e) and len(str(e)) < 5000
        else:
            assert len(found) == 3 and abs(found[:, -1].mean() - 0.5) < 1e-5


PROGRESS = dict(
    iteration=50,
    iterations=200,
    seconds=25.0,
    loss=1.25,
    accuracy=0.5,
    best=0.25,
    phase='validating',
    done=1,
    all=9,
    spent=2.5,
    told=50,
)
CODE = dict(digest=dict(notebook='1', code='2'), modules=dict(x='1'), commit='a' * 40, dirty=True)
CODE |= dict(versions=dict(python='3'))
ORIGIN = CODE | dict(params=PARAMS, force=False, resumed_with=[CODE | dict(iteration=5)])
FAILURE = failure_record('raised', 'ValueError: no', 'a\nb', PARAMS, dict(code='1'))
NOTES = {
    '.progress.json': PROGRESS,
    '.origin.json': ORIGIN,
    'failed.json': FAILURE,
    'job.json': dict(job='7_1'),
    'json': dict(pid=7, host='node1', since=0.0),
}


def note_of(runs, name):
    "The path of a note: in the folder of its run, or beside its lock."
    place = altered_run(runs)
    inside = name in ('.progress.json', '.origin.json', 'failed.json')
    return place / name if inside else marker(runs, 'table', place.name, name)


@pytest.fixture
def begun(runs):
    "The same folder; the second run has no result yet."
    file = altered_run(runs) / 'result.json'
    file.rename(file.with_name('kept'))
    yield runs
    file.with_name('kept').rename(file)


def check_shown(state, width):
    "A line for it, as if it ran, on a terminal of any width."
    p = Planned('table', 'b_short_seed0', Path(), {}, {}, Path())
    for s in state, replace(state, kind='running'):
        assert describe_state(p, s)
        (line,) = _table({p: s}, width)
        assert len(line) <= width


@st.composite
def notes(draw):
    "The name of a note, and what is in its place."
    name = draw(st.sampled_from(sorted(NOTES)))
    return name, draw(json_files(NOTES[name]))


@often
@example(note=('.progress.json', sealed(PROGRESS, iteration=0)), width=80)
@example(note=('.progress.json', sealed(PROGRESS, loss=None)), width=80)
@example(note=('.progress.json', sealed(PROGRESS, iterations=10**400)), width=80)
@example(note=('.progress.json', pipe), width=80)
@example(note=('.origin.json', sealed(dict(params=PARAMS))), width=80)
@example(note=('.origin.json', sealed(ORIGIN, resumed_with=[7])), width=80)
@example(note=('failed.json', sealed(dict(kind='raised'))), width=80)
@example(note=('job.json', sealed(dict(job=[]))), width=80)
@given(note=notes(), width=st.integers(40, 200))
def test_notes(begun, note, width):
    "What is left for whoever looks on: it is used or left out, and says how the run stands."
    name, thing = note
    place, p = altered_run(begun), planned(begun)
    note_of(begun, name).parent.mkdir(parents=True, exist_ok=True)
    with in_place_of(note_of(begun, name), thing), no_hang():
        state = state_of(p, {'7_1': 'RUNNING'})
        assert state.kind in ('stopped', 'stopped, other code', 'failed', 'running')
        check_shown(state, width)
        assert isinstance(read_progress(place), dict)
        assert isinstance(last_failure(begun, p.experiment, p.slug).get('when', ''), str)
        assert isinstance(begun_by(place), dict)
        assert isinstance(changed_since_begun(place, p.notebook, p.params), str)
        if name == '.progress.json' and thing != nowhere:
            return
        note_phase(place, 'testing', 1, 2, 0.5)
        assert read_progress(place)['phase'] == 'testing'
        (place / '.progress.json').unlink()


@often
@example(thing=sealed(dict(names=['../b', '..'])))
@example(thing=sealed(dict(names=[[]])))
@example(thing=sealed(dict(other=1)))
@given(thing=json_files(dict(names=['notebook.ipynb', 'tasks.csv'])))
def test_names_of_files_that_replace_others(thing):
    "What stands outside a run's folder stays, whichever names are listed."
    with folder() as place:
        old, new = place / 'table' / 'a', place / '.new' / 'table' / 'a'
        for one in old, new, place / 'table' / 'b':
            one.mkdir(parents=True)
            put(one / 'result.json', as_text(seal(RESULT)).encode())
            put(one / 'tasks.csv', b'')
        put(new / '.files.json', thing)
        with no_hang():
            settle_run(place, 'table', 'a')
        assert sorted(os.listdir(place)) == ['.new', '.state', 'table']
        assert sorted(os.listdir(place / 'table')) == ['a', 'b']
        assert sorted(os.listdir(place / 'table' / 'b')) == ['result.json', 'tasks.csv']
        assert [len(r['metrics']) for r in all_results(place)[0]] == [2, 2]


PNG = base64.b64encode(b'\x89PNG\r\n\x1a\n' + bytes(40)).decode()
OUTPUT = dict(data={'image/png': PNG}, metadata={'image/png': dict(width=70)})
EXECUTED = dict(
    cells=[
        dict(cell_type='markdown', source=['# Curves']),
        dict(cell_type='code', source='x', outputs=[OUTPUT]),
    ]
)


@st.composite
def notebooks(draw):
    "An executed notebook that was altered."
    if draw(st.booleans()):
        return draw(spoilt(json.dumps(EXECUTED).encode()) | st.sampled_from(STRANGE))
    return json.dumps(draw(altered(EXECUTED))).encode()


@often
@example(thing=b'[' * 9999)
@example(thing=b'{"cells": [{"cell_type": "code"}, 7]}')
@given(thing=notebooks())
def test_pictures(thing):
    with folder() as place, no_hang():
        put(place / 'notebook.ipynb', thing)
        try:
            assert picture(place, 'Curves').data
        except (ValueError, FileNotFoundError) as e:
            assert f'{place}/notebook.ipynb' in str(e)
