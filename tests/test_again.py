"""Runs that are made again, and runs that other code has begun: nothing finished is lost."""

import contextlib
import errno
import json
import os
import shutil
import signal
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
import pytest
import fewshotmeta.lab.runs as runs_room
from conftest import full
from fewshotmeta.data.files import locked, read_json, write_json
from fewshotmeta.lab.batches import Planned
from fewshotmeta.lab.command import main
from fewshotmeta.lab.execution import RunFailed
from fewshotmeta.lab.locks import RunBusy, failure_record, hold_run, last_failure, marker
from fewshotmeta.lab.locks import read_marker
from fewshotmeta.lab.parameters import BadParameters, default_name
from fewshotmeta.lab.results import all_results
from fewshotmeta.lab.runs import CodeChanged, begun_by, changed_since_begun, folder_anew, settle_run
from fewshotmeta.lab.states import describe_state, state_of
from fewshotmeta.lab.work import Work, row_of
from fewshotmeta.lab.workers import Options, todo
from fewshotmeta.training.saving import BadLearner, load_learner
from tiny import files, folder_of, notebook, run, run_here

PLACE = 'demo', 'one'
PARAMETERS = 'x = 2\nplugin = ""\nstop = False  # after the checkpoint\nscale = "smoke"'
# a training of a hundred iterations that can be stopped in its middle, and says where it began
TRAINING = '''import json
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file
from fewshotmeta.data.files import write_json
from fewshotmeta.lab.execution import report, run_folder
file, first = run_folder() / 'checkpoint.safetensors', 0
if file.exists():
    with safe_open(file, 'numpy') as opened:
        first = json.loads(opened.metadata()['run'])['iteration']
if not first:
    save_file({'a': np.zeros(1)}, file, metadata=dict(run=json.dumps(dict(iteration=50))))
    write_json(run_folder() / '.progress.json', dict(iteration=50, iterations=100))
    if stop:
        raise KeyboardInterrupt
'''
REPORT = '''report(square=x * x, first=first)
for name in ('metrics.csv', 'learner.safetensors'):
    run_folder().joinpath(name).write_text(str(x))
if x == 2:
    run_folder().joinpath('tasks.csv').write_text(str(x))
'''
CELLS = TRAINING, REPORT
OTHER = TRAINING, REPORT + 'y = 1'


def execute_here(notebook, folder, params, quiet=False, limit=0, run=None):
    "What `execute_notebook` does, in this process, where an interrupt is one of the notebook's."
    try:
        result = run_here(notebook, params, folder)
    except Exception as e:
        (folder / 'failed.ipynb').write_text(str(e))
        message = f'{notebook.name} raised {e!r}, see {folder}/failed.ipynb'
        raise RunFailed(message, 'raised', 'Traceback') from e
    (folder / 'notebook.ipynb').write_text(str(params.get('x', 2)))
    return result


@pytest.fixture(autouse=True)
def no_kernels(monkeypatch):
    monkeypatch.setattr(runs_room, 'execute_notebook', execute_here)


def stopped(nb, **options):
    "Begin a run and stop it in its middle."
    given = options.pop('given', {})
    with pytest.raises(KeyboardInterrupt):
        run(nb, given | dict(stop=True), **options)


def anew(nb):
    return folder_anew(nb.parent / 'runs', *PLACE)


def state(nb, **given):
    "How a run stands, as a batch asks."
    params = dict(x=2, plugin='', stop=False, scale='smoke') | given
    return state_of(Planned(*PLACE, nb, given, params, nb.parent / 'runs'))


WHOLE = ['checkpoint.safetensors', 'learner.safetensors', 'metrics.csv', 'notebook.ipynb']
WHOLE += ['result.json']


def contents(nb):
    "Which value of `x` each file of a finished run has; all have the same."
    folder = folder_of(nb)
    found = {name: (folder / name).read_text() for name in files(nb) if name.endswith('.csv')}
    found['notebook'] = (folder / 'notebook.ipynb').read_text()
    found['learner'] = (folder / 'learner.safetensors').read_text()
    return found | dict(result=str(read_json(folder / 'result.json')['params']['x']))


OLD = {k: '2' for k in ('metrics.csv', 'tasks.csv', 'notebook', 'learner', 'result')}
NEW = {k: '3' for k in ('metrics.csv', 'notebook', 'learner', 'result')}


# ---- made again
@pytest.fixture
def finished(tmp_path):
    "A run that is finished; its notebook."
    nb = notebook(tmp_path, PARAMETERS, *CELLS)
    run(nb)
    assert files(nb) == sorted([*WHOLE, 'tasks.csv'])
    assert contents(nb) == OLD
    return nb


def test_a_run_that_is_made_again_is_replaced_whole(finished):
    "Every file: what the new run does not have is gone, what is the user's own stays."
    (folder_of(finished) / 'notes.txt').write_text('mine')
    assert run(finished, dict(x=3), force=True)['metrics']['first']['mean'] == 0
    assert contents(finished) == NEW
    assert files(finished) == sorted([*WHOLE, 'notes.txt'])
    assert not anew(finished).exists()
    assert state(finished, x=3).kind == 'done'


def test_one_that_fails_leaves_the_old_one(finished):
    notebook(finished.parent, PARAMETERS, TRAINING, 'raise KeyError("gone")', REPORT)
    with pytest.raises(RunFailed, match='gone') as failed:
        run(finished, dict(x=3), force=True)
    folder = folder_of(finished)
    assert contents(finished) == OLD
    assert f'see {folder}/failed.ipynb' in str(failed.value)
    assert 'gone' in (folder / 'failed.ipynb').read_text()
    assert read_json(folder / 'failed.json')['error'] == str(failed.value)
    assert state(finished).kind == 'failed'
    assert [r['params']['x'] for r in all_results(finished.parent / 'runs')[0]] == [2]
    run(finished)  # there is a result
    assert state(finished).kind == 'done, other code'


def test_an_interrupted_one_continues_by_the_same_command(finished, capsys):
    "And without `force` the old result stands, and what was begun is told."
    stopped(finished, force=True)
    assert contents(finished) == OLD
    assert run(finished)['already']
    s = state(finished)
    assert (s.kind, s.to_be_made()) == ('done', False)
    assert s.note == 'made again up to iteration 50 of 100: --force continues'
    asked = ['run', str(finished), '--name', 'demo/one', '--runs', str(finished.parent / 'runs')]
    assert main(asked) == 0
    assert '--force continues to make it again' in capsys.readouterr().out
    assert main([*asked, '--force', '-p', 'stop=True']) == 0
    assert read_json(folder_of(finished) / 'result.json')['metrics']['first']['mean'] == 50
    assert state(finished, stop=True).note == ''
    assert main([*asked, '-p', 'stop=True']) == 0
    assert '--force makes it again' in capsys.readouterr().out


@pytest.mark.parametrize('what', ['parameters', 'code', 'accepted'])
def test_an_interrupted_one_continues_what_is_the_same(finished, what):
    stopped(finished, force=True)
    given = dict(x=3) if what == 'parameters' else {}
    if what != 'parameters':
        notebook(finished.parent, PARAMETERS, *OTHER)
    accept = what == 'accepted'
    result = run(finished, given | dict(stop=accept), force=True, accept_changes=accept)
    assert result['metrics']['first']['mean'] == (50 if accept else 0)
    assert ('resumed_with' in result) == accept


def test_what_has_no_result_is_begun_anew_and_then_continues(tmp_path):
    "With `force` a run without a result is executed in its folder."
    nb = notebook(tmp_path, PARAMETERS, *CELLS)
    stopped(nb)
    stopped(nb, force=True)  # begun anew: it would not stop at 50 a second time
    assert not anew(nb).exists()
    result = run(nb, dict(stop=True), force=True)
    assert result['metrics']['first']['mean'] == 50
    assert 'resumed_with' not in result


def test_runs_whose_names_are_alike_do_not_meet(tmp_path, record):
    "What is known of `a` is not taken for what is known of `a.failed`."
    names = 'a', 'a.failed', 'a.job', 'a.lock', 'a.json', 'a.failed.json'
    kinds = 'json', 'lock', 'failed.json', 'job.json'
    paths = [marker(tmp_path, 'demo', name, kind) for name in names for kind in kinds]
    assert len(set(paths)) == len(names) * len(kinds)
    write_json(marker(tmp_path, 'demo', 'a', 'failed.json'), failure_record('raised', 'no'))
    assert read_marker(tmp_path, 'demo', 'a.failed') == {}
    with hold_run(tmp_path, 'demo', 'a.failed', {}):
        pass
    assert last_failure(tmp_path, 'demo', 'a')['error'] == 'no'
    assert last_failure(tmp_path, 'demo', 'a.failed') == {}
    what = "files of a run's state, of runs named like `a` and `a.failed`: each is one's own"
    record(what, tries=len(paths), survived=len(set(paths)))


def test_one_that_is_being_made_again_is_running(finished):
    stopped(finished, force=True)
    place = finished.parent / 'runs', *PLACE
    with hold_run(*place, {}):
        pid = os.fork()  # another process: the lock is our own here
        if not pid:
            os._exit(0 if state(finished).kind == 'running' else 1)
        assert os.waitpid(pid, 0)[1] == 0
    assert state(finished).done


def test_nothing_of_it_counts_as_a_run(finished, capsys):
    stopped(finished, force=True)
    runs = finished.parent / 'runs'
    write_json(anew(finished) / '.files.json', dict(names=[]))
    (anew(finished) / 'result.json').write_text('{')
    assert [r['run'] for r in all_results(runs)[0]] == ['one']
    assert all_results(runs)[1] == []
    assert list(runs.glob('*/*/result.json')) == [folder_of(finished) / 'result.json']
    assert not main(['status', '--runs', str(runs)])
    assert '1 results, 0 not finished, 0 invalid result files' in capsys.readouterr().out
    assert run(finished, dict(stop=True), force=True)['metrics']['first']['mean'] == 50


def test_one_finds_the_learners_of_other_runs(finished, monkeypatch):
    "By their names, in its own folder of runs."
    stopped(finished, force=True)
    monkeypatch.setenv('FEWSHOTMETA_RUN', str(anew(finished)))
    monkeypatch.chdir(finished.parent.parent)
    with pytest.raises(BadLearner, match=str(folder_of(finished) / 'learner.safetensors')):
        load_learner('demo/one')
    with pytest.raises(FileNotFoundError, match=f'in {finished.parent}/runs.*: demo/one$'):
        load_learner('demo/two')


def test_a_time_before_which_a_result_is_made_again(finished):
    "With `force`: what was finished then or later stands, whole or not is asked of it alone."
    when = read_json(folder_of(finished) / 'result.json')['finished']
    for since in (when, '2000'):
        assert run(finished, force=True, since=since)['already']
    assert run(finished, since='3000')['already']
    (folder_of(finished) / 'result.json').write_text('{')
    assert 'already' not in run(finished, force=True, since='2000')
    assert 'already' not in run(finished, force=True, since='3000')


def test_parameters_that_a_notebook_has_got_or_lost_since(finished):
    "A new one says nothing until it is given; one that is gone makes it another run."
    notebook(finished.parent, PARAMETERS + '\ny = 1', *CELLS)
    assert run(finished)['already']
    with pytest.raises(BadParameters, match='holds a finished run with another y: choose'):
        run(finished, dict(y=1))
    notebook(finished.parent, PARAMETERS.replace('x = 2', 'z = 2'), *CELLS)
    with pytest.raises(BadParameters, match='holds a finished run with another x: choose'):
        run(finished)


def test_a_run_by_its_parameters_alone(finished, monkeypatch):
    "Its name and its place, where neither is said; a notebook has to be there."
    (finished.parent / 'settings.ini').write_text('')
    given, start = dict(x=3, scale='smoke'), time.perf_counter()
    result = runs_room.run_notebook(finished, given, quiet=True)
    assert 0 <= result['seconds'] <= time.perf_counter() - start + 0.01
    assert (result['experiment'], result['run']) == ('exp', default_name(given))
    assert (finished.parent / 'runs' / 'exp' / default_name(given) / 'result.json').exists()
    with pytest.raises(BadParameters, match='no notebook .*none.ipynb'):
        runs_room.run_notebook(finished.parent / 'none.ipynb')


def test_what_is_left_of_other_executions_goes(finished):
    "Half-written files, a notebook that failed, what was begun by other code; not the user's own."
    folder = folder_of(finished)
    stopped(finished, force=True)
    (anew(finished) / 'odd.txt').write_text('of other code')
    notebook(finished.parent, PARAMETERS, *OTHER)
    for name in ('.metrics.csv.7.partial', 'failed.ipynb'):
        (folder / name).write_text('')
    (anew(finished) / '.tasks.csv.7.partial').write_text('')
    run(finished, force=True)
    assert files(finished) == sorted([*WHOLE, 'tasks.csv', '.metrics.csv.7.partial'])
    for name in ('result.json', 'checkpoint.safetensors'):
        (folder / name).unlink()
    run(finished)
    assert files(finished) == sorted([*WHOLE, 'tasks.csv'])


def test_what_nobody_knows_is_not_continued_by_force(finished):
    stopped(finished, force=True)
    (anew(finished) / '.origin.json').unlink()
    assert run(finished, force=True)['metrics']['first']['mean'] == 0


def test_a_folder_of_a_run_is_replaced(tmp_path):
    plots = "folder = run_folder() / 'plots'\nfolder.mkdir()\nfolder.joinpath(str(x)).touch()"
    nb = notebook(tmp_path, PARAMETERS, *CELLS, plots)
    for x in (2, 3):
        run(nb, dict(x=x), force=True)
        assert [p.name for p in (folder_of(nb) / 'plots').iterdir()] == [str(x)]


def test_a_further_rank_only_follows(finished, monkeypatch, capsys):
    "Its report comes back, its failure is recorded; it writes nothing else."
    before = contents(finished)
    monkeypatch.setenv('RANK', '1')
    result = run(finished, dict(x=3), force=True)
    assert (result['metrics']['square']['mean'], result['params']['x']) == (9, 3)
    assert (result['experiment'], result['run'], result['seconds']) == ('demo', 'one', 0)
    assert contents(finished) == before
    notebook(finished.parent, PARAMETERS, 'raise KeyError("gone")')
    with pytest.raises(RunFailed, match='gone'):
        run(finished, force=True)
    assert last_failure(finished.parent / 'runs', *PLACE)['error'].startswith('rank 1: exp.ipynb')
    assert 'rank 1: exp.ipynb raised' in capsys.readouterr().err


@pytest.fixture
def just_before_us(monkeypatch):
    "`just_before_us(act)`: `act()` is what another process does just before we hold the run."
    hold = runs_room.hold_run

    def set_act(act):
        @contextlib.contextmanager
        def too_late(*args):
            with hold(*args) as folder:
                act()
                yield folder

        monkeypatch.setattr(runs_room, 'hold_run', too_late)

    return set_act


def test_one_that_is_finished_just_before_us(finished, just_before_us, monkeypatch):
    "It is theirs; where other ranks wait for ours, that is an error."
    file = folder_of(finished) / 'result.json'
    just_before_us(partial(file.write_bytes, file.read_bytes()))
    for size in (None, '1'):
        (folder_of(finished) / 'result.json').unlink()
        assert run(finished)['already']
        monkeypatch.setenv('WORLD_SIZE', '1')
    monkeypatch.setenv('WORLD_SIZE', '2')
    (folder_of(finished) / 'result.json').unlink()
    with pytest.raises(RunBusy, match='demo/one was finished by another process just now'):
        run(finished)


def test_what_is_finished_is_found_by_every_rank_whoever_holds_it(finished, monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '2')
    with hold_run(finished.parent / 'runs', *PLACE, {}):
        for rank in '0', '1':
            monkeypatch.setenv('RANK', rank)
            assert run(finished)['already']


def test_how_a_notebook_is_executed(tmp_path, monkeypatch):
    "Shown and without a limit, if nothing else is asked for; of several ranks only the first's."
    nb, told = notebook(tmp_path, PARAMETERS, *CELLS), []

    def executed(notebook, folder, params, quiet, limit, run=None):
        who = read_marker(tmp_path / 'runs', *PLACE)
        told.append((quiet, limit, who.get('job')))
        return execute_here(notebook, folder, params)

    monkeypatch.setattr(runs_room, 'execute_notebook', executed)
    again = partial(runs_room.run_notebook, nb, {}, 'demo/one', tmp_path / 'runs', force=True)
    again()
    again(quiet=True, limit=5, note=dict(job='7'))
    monkeypatch.setenv('RANK', '1')
    again(limit=5)
    assert told == [(False, 0, None), (True, 5, '7'), (True, 5, None)]


def test_a_run_says_its_seconds_to_the_hundredth(tmp_path, monkeypatch):
    clock = iter([1.0, 3.4567])
    monkeypatch.setattr(runs_room, 'time', SimpleNamespace(perf_counter=partial(next, clock)))
    assert run(notebook(tmp_path, PARAMETERS, *CELLS))['seconds'] == 2.46


def test_a_half_written_file_may_go_by_itself(tmp_path, monkeypatch):
    "Its own writer removes it between our look and our removal."
    nb, unlink = notebook(tmp_path, PARAMETERS, *CELLS), Path.unlink
    half = folder_of(nb) / '.metrics.csv.7.partial'
    half.parent.mkdir(parents=True)
    half.touch()

    def later(path, missing_ok=False):
        if path == half:
            unlink(path)
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, 'unlink', later)
    run(nb)
    assert files(nb) == sorted([*WHOLE, 'tasks.csv'])


def test_a_list_of_files_in_a_run_s_own_folder_removes_nothing(tmp_path):
    "It is there where a folder was copied by hand out of `runs/.new`."
    nb = notebook(tmp_path, PARAMETERS, *CELLS)
    write_json(folder_of(nb) / '.files.json', dict(names=['metrics.csv']))
    run(nb)
    assert files(nb) == sorted(['.files.json', *WHOLE, 'tasks.csv'])


# ---- how it stands
def test_a_result_of_other_parameters(finished):
    "Of one that is given, or that the result has; a new one of the notebook says nothing."
    assert state(finished).kind == 'done'
    for given in (dict(x=3), dict(y=1), dict(x=3, y=1)):
        s = state(finished, **given)
        assert (s.kind, s.note) == ('changed', f'the result there has another {", ".join(given)}')
    params = dict(x=2, plugin='', stop=False, scale='smoke')
    runs = finished.parent / 'runs'
    assert state_of(Planned(*PLACE, finished, {}, params | dict(y=1), runs)).kind == 'done'
    del params['x']
    s = state_of(Planned(*PLACE, finished, {}, params, runs))
    assert (s.kind, s.note) == ('changed', 'the result there has another x')


def test_a_failure_counts_from_the_result_on(finished):
    result, runs = read_json(folder_of(finished) / 'result.json'), finished.parent / 'runs'
    for when, kind in ('2000', 'done'), (result['finished'], 'done'), ('3000', 'failed'):
        failure = dict(kind='raised', error='KeyError\nmore', when=when)
        write_json(folder_of(finished) / 'failed.json', failure)
        s = state(finished)
        assert s.kind == kind
        assert s.when == (when if kind == 'failed' else result['finished'])
    assert (s.note, s.result) == ('raised: KeyError', failure)
    write_json(folder_of(finished) / 'failed.json', failure | dict(error=''))
    assert state(finished).note == 'raised: '
    with hold_run(runs, *PLACE, {}):
        assert state(finished).kind == 'running'


@pytest.mark.parametrize('text', [None, '{'])
def test_one_that_somebody_executes(finished, text, monkeypatch):
    "Whatever result is there; who was killed while it executed it is only named."
    runs = finished.parent / 'runs'
    if text:
        (folder_of(finished) / 'result.json').write_text(text)
    assert state(finished).kind == ('broken' if text else 'done')
    write_json(marker(runs, *PLACE), dict(pid=7, host='node1'))
    s = state(finished)
    assert (s.kind, s.who) == (('broken', {}) if text else ('done', dict(pid=7, host='node1')))
    slept = []
    monkeypatch.setattr(time, 'sleep', slept.append)
    with locked(marker(runs, *PLACE, 'lock')):
        s = state(finished)
        assert (s.kind, s.note, s.result, s.who['pid']) == ('running', '', {}, 7)
        assert not slept, 'who looks does not wait for the lock'
        marker(runs, *PLACE).unlink()
        assert state(finished).kind == ('broken' if text else 'done')  # it only looks


@pytest.mark.skipif(not os.path.exists('/proc/self/mem'), reason='needs /proc')
def test_a_result_that_the_disk_does_not_give_back(finished):
    file = folder_of(finished) / 'result.json'
    file.unlink()
    file.symlink_to('/proc/self/mem')  # a plain file whose first byte cannot be read
    s = state(finished)
    assert (s.kind, s.note) == ('broken', '[Errno 5] Input/output error')


NOTED = [  # what is left for who looks on, and what is said of it
    (dict(iteration=1, iterations=9, seconds=2, spent=2, loss=1, accuracy=0), '1 of 9'),
    (dict(iteration=1, iterations=9, seconds=None), '1 of 9'),
    (dict(iteration=1, iterations=10**15 - 1), '1 of 999,999,999,999,999'),
    (dict(iteration=1, iterations=10**15), ''),
    (dict(iteration=1, iterations=9, loss=-1e15), ''),
    (dict(iteration=1, iterations=9, phase=7), ''),
    (dict(iteration=1, iterations=9.0), ''),
]


@pytest.mark.parametrize('progress,words', NOTED)
def test_notes_that_are_used_and_notes_that_are_left_out(tmp_path, progress, words):
    nb = notebook(tmp_path, PARAMETERS, *CELLS)
    write_json(folder_of(nb) / '.progress.json', progress)
    assert state(nb).note == (f'at iteration {words}' if words else '')


def test_one_without_a_result(tmp_path):
    nb = notebook(tmp_path, PARAMETERS, *CELLS)
    assert (state(nb).kind, state(nb).note) == ('waiting', '')
    assert not (tmp_path / 'runs').exists(), 'who looks leaves nothing'
    folder_of(nb).parent.mkdir(parents=True)
    folder_of(nb).write_text('where a folder would be')
    assert (state(nb).kind, state(nb).note) == ('waiting', '')
    folder_of(nb).unlink()
    marker(tmp_path / 'runs', *PLACE, 'lock').mkdir(parents=True)  # which nobody can hold
    write_json(marker(tmp_path / 'runs', *PLACE), dict(pid=7, host='node1'))
    assert (state(nb).kind, state(nb).note) == ('stopped', '')
    marker(tmp_path / 'runs', *PLACE, 'lock').rmdir()
    marker(tmp_path / 'runs', *PLACE).unlink()
    failure = dict(kind='raised', error='KeyError', when='2026')
    write_json(folder_of(nb) / 'failed.json', failure)
    s = state(nb)
    assert (s.kind, s.note, s.result) == ('failed', 'raised: KeyError', failure)
    stopped(nb)
    s = state(nb, stop=True)
    assert (s.kind, s.note) == ('stopped', 'at iteration 50 of 100')
    notebook(nb.parent, PARAMETERS, *OTHER)
    write_json(folder_of(nb) / 'failed.json', failure)
    s = state(nb, stop=True)
    assert s.result == {}
    (folder_of(nb) / 'failed.json').unlink()
    words = 'begun by another version of the notebook'
    assert (s.kind, s.note) == ('stopped, other code', f'at iteration 50 of 100, {words}')
    (folder_of(nb) / '.progress.json').write_text('{')
    s = state(nb, stop=True)
    assert (s.kind, s.note) == ('stopped, other code', words)
    (folder_of(nb) / '.origin.json').unlink()
    assert (state(nb).kind, state(nb).note) == ('stopped', '')


def test_one_that_is_made_again_in_part(finished):
    stopped(finished, force=True)
    assert state(finished).note == 'made again up to iteration 50 of 100: --force continues'
    (anew(finished) / '.progress.json').unlink()
    assert state(finished).note == 'made again in part: --force continues'


QUEUE = dict(PENDING='queued', REQUEUED='queued', RUNNING='running', COMPLETING='running')


def test_one_in_a_queue(tmp_path):
    nb = notebook(tmp_path, PARAMETERS, *CELLS)
    write_json(marker(tmp_path / 'runs', *PLACE, 'job.json'), dict(job='7'))
    p = Planned(*PLACE, nb, {}, {}, tmp_path / 'runs')
    for said, kind in QUEUE.items():
        s = state_of(p, {'7': said})
        assert (s.kind, s.note) == (kind, 'job 7')
    assert state_of(p, {'8': 'PENDING'}).kind == state_of(p).kind == 'waiting'


# ---- killed while it is replaced
WRITES = 'os.rename', 'os.remove', 'os.rmdir', 'os.mkdir', 'shutil.rmtree'


def kill_at(number, runs):
    "Kill this process before it changes anything under `runs` for the n-th time."
    seen = []

    def look(event, args):
        changes = event in WRITES
        if event == 'open' and isinstance(args[2], int):
            changes = args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if changes and str(args[0]).startswith(str(runs)):
            seen.append(event)
            if len(seen) == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(look)


def killed(nb, number):
    "Make a run again in a child that is killed at its n-th write; whether it was."
    pid = os.fork()
    if not pid:
        kill_at(number, nb.parent / 'runs')
        run(nb, dict(x=3), force=True)
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])


def test_killed_at_every_write(finished, tmp_path, record):
    """The old run or the new one, whole, whoever looks; and the same command makes the new one.

    Every third write, unless it runs at full length.
    """
    kept, number, seen = tmp_path / 'kept', 0, []
    shutil.copytree(tmp_path / 'runs', kept)
    looks = [lambda: state(finished), lambda: run(finished, dict(x=2)), all_of(finished)]
    while True:
        number += 1 if full() else 3
        shutil.rmtree(tmp_path / 'runs')
        shutil.copytree(kept, tmp_path / 'runs')
        if not killed(finished, number):
            break
        read_json(folder_of(finished) / 'result.json')  # at any moment there is a whole one
        try:
            looks[len(seen) % 3]()
        except ValueError as e:
            assert 'another x' in str(e)  # the new one is there, and was not asked for
        found = contents(finished)
        assert found in (OLD, NEW), number
        seen.append(found == NEW)
        run(finished, dict(x=3), force=True)
        assert contents(finished) == NEW
        assert not anew(finished).exists()
    assert seen == sorted(seen)
    old, new = seen.count(False), seen.count(True)
    assert min(old, new) >= (6 if full() else 2)
    what = 'killed at every write while a finished run is made again: old or new, whole'
    record(what, tries=old + new, survived=old + new, old=old, new=new)


def killed_once_whole(nb):
    "Make a run again, up to where the new one is whole and no file of it is in its place."

    def die(*args):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, 'move', die)
        run(nb, dict(x=3), force=True)
    assert (anew(nb) / 'result.json').exists()
    assert read_json(folder_of(nb) / 'result.json')['params']['x'] == 2


def test_a_new_run_that_is_whole_is_found_by_who_asks_for_it(finished):
    "Nothing is left of how it was made."
    killed_once_whole(finished)
    assert run(finished, dict(x=3))['already']
    assert contents(finished) == NEW
    assert files(finished) == WHOLE


def test_one_whose_process_dies_just_before_us_is_not_made_again(finished, just_before_us):
    when = read_json(folder_of(finished) / 'result.json')['finished']
    killed_once_whole(finished)
    aside = anew(finished).rename(anew(finished).with_name('aside'))
    just_before_us(partial(aside.rename, anew(finished)))
    assert run(finished, dict(x=3), force=True, since=when + 'Z')['already']
    assert contents(finished) == NEW


def test_a_folder_that_cannot_be_removed_costs_no_result(finished, monkeypatch):
    "As on a network's file system, while another process has a file of it open."

    def busy(*args, **options):
        raise OSError(errno.EBUSY, 'busy')

    def executed(*args):
        result = execute_here(*args)
        monkeypatch.setattr(os, 'rmdir', busy)
        return result

    monkeypatch.setattr(runs_room, 'execute_notebook', executed)
    assert run(finished, dict(x=3), force=True)['params']['x'] == 3
    assert contents(finished) == NEW
    assert anew(finished).exists()
    assert state(finished, x=3).kind == 'done'


def all_of(nb):
    return lambda: all_results(nb.parent / 'runs')


def test_who_looks_does_not_disturb_who_replaces(finished, tmp_path, monkeypatch):
    "Nor wait for it."
    monkeypatch.setattr(time, 'sleep', lambda seconds: pytest.fail('it waits'))
    shutil.copytree(folder_of(finished), anew(finished))
    write_json(anew(finished) / '.files.json', dict(names=['notebook.ipynb']))
    with locked(marker(tmp_path / 'runs', *PLACE, 'lock')):
        settle_run(tmp_path / 'runs', *PLACE)
        assert (anew(finished) / 'result.json').exists()
    settle_run(tmp_path / 'runs', *PLACE)
    assert files(finished) == ['notebook.ipynb', 'result.json']


# ---- other code
@pytest.fixture
def interrupted(tmp_path):
    "A run that stopped at iteration 50; its notebook."
    nb = notebook(tmp_path, PARAMETERS, *CELLS)
    stopped(nb)
    assert state(nb).kind == 'stopped'
    return nb


def go_on(nb, **options):
    return run(nb, dict(stop=True), **options)


def test_the_same_code_continues(interrupted):
    folder = folder_of(interrupted)
    assert changed_since_begun(folder, interrupted, {}) == ''
    result = go_on(interrupted)
    assert result['metrics']['first']['mean'] == 50
    assert 'resumed_with' not in result
    assert '.origin.json' not in files(interrupted)


def test_other_code_is_refused_with_the_ways_out(interrupted):
    origin = begun_by(folder_of(interrupted))
    notebook(interrupted.parent, PARAMETERS, *OTHER)
    origin['modules']['data.banks'], origin['digest']['code'] = 'other', 'other'
    write_json(folder_of(interrupted) / '.origin.json', origin)
    write_json(folder_of(interrupted) / 'failed.json', dict(kind='killed', error='', when='2026'))
    with pytest.raises(CodeChanged) as refused:
        go_on(interrupted)
    said = str(refused.value)
    assert 'demo/one was begun by other code: since then the notebook and the package' in said
    assert '(data.banks) changed' in said
    for way in (f'Go back to commit {origin["commit"][:10]}', '--accept-changes', '--force'):
        assert way in said
    assert (folder_of(interrupted) / 'failed.json').exists()
    assert not (folder_of(interrupted) / 'result.json').exists()


def test_one_that_other_code_began_just_before_us_is_refused(interrupted, just_before_us):
    folder = folder_of(interrupted)
    origin, aside = begun_by(folder), folder.rename(folder.with_name('aside'))
    just_before_us(partial(aside.rename, folder))
    notebook(interrupted.parent, PARAMETERS, *OTHER)
    with pytest.raises(CodeChanged):
        go_on(interrupted)
    assert begun_by(folder) == origin


BACK = [
    (dict(commit='0123456789ab', dirty=False), 'commit 0123456789 to continue'),
    (dict(commit='0123456789ab', dirty=True), 'commit 0123456789 and its uncommitted changes to'),
    (dict(commit=None, dirty=None), 'the code that began it to continue'),
]


@pytest.mark.parametrize('there,words', BACK)
def test_where_to_go_back_to(interrupted, there, words):
    origin = begun_by(folder_of(interrupted)) | there
    write_json(folder_of(interrupted) / '.origin.json', origin)
    notebook(interrupted.parent, PARAMETERS, *OTHER)
    with pytest.raises(CodeChanged, match=f'Go back to {words}'):
        go_on(interrupted)


def test_what_began_it_is_not_known_if_its_record_is_not_whole(interrupted):
    folder = folder_of(interrupted)
    assert changed_since_begun(folder, folder / 'none.ipynb', {}) == ''
    write_json(folder / '.origin.json', begun_by(folder) | dict(digest={}))
    assert changed_since_begun(folder, interrupted, {}) == 'package'
    (folder / '.origin.json').write_text('{')
    assert begun_by(folder) == {}
    assert changed_since_begun(folder, interrupted, {}) == ''


NO_ORIGINS = [
    *(dict([pair]) for pair in dict(digest=3, modules=[], commit=3, versions=[]).items()),
    *(dict([pair]) for pair in dict(params=3, force=None, resumed_with={}).items()),
    *(dict(resumed_with=[later]) for later in (3, 'ab', [], ['ab'], {}, dict(digest=3))),
]


@pytest.mark.parametrize('change', NO_ORIGINS, ids=str)
def test_a_record_of_another_form_says_nothing_of_what_began_it(interrupted, change):
    file = folder_of(interrupted) / '.origin.json'
    write_json(file, read_json(file) | change)
    assert begun_by(folder_of(interrupted)) == {}
    with pytest.warns(UserWarning, match='the code that began it is not recorded'):
        assert go_on(interrupted)['digest'] == {}


MAY_LACK = 'versions', 'commit', 'dirty'


def test_a_record_may_lack_versions_and_commit(interrupted):
    "It is compared by its digests; the result does not say what is not known."
    file = folder_of(interrupted) / '.origin.json'
    write_json(file, {k: v for k, v in read_json(file).items() if k not in MAY_LACK})
    notebook(interrupted.parent, PARAMETERS, *OTHER)
    with pytest.raises(CodeChanged, match='Go back to the code that began it to'):
        go_on(interrupted)
    notebook(interrupted.parent, PARAMETERS, *CELLS)
    result = go_on(interrupted)
    assert [result[name] for name in MAY_LACK] == [None] * 3
    assert 'resumed_with' not in result


@pytest.mark.parametrize('edit,part', [('x = 1 + 1', 'plugin'), ('# one\nx=1', '')])
def test_a_plugin_s_code_counts(tmp_path, monkeypatch, edit, part):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'own.py').write_text('x = 1')
    nb, given = notebook(tmp_path, PARAMETERS, *CELLS), dict(plugin='own.py')
    stopped(nb, given=given)
    (tmp_path / 'own.py').write_text(edit)
    if part:
        with pytest.raises(CodeChanged, match=f'since then the {part} changed'):
            run(nb, given | dict(stop=True))
    else:
        assert run(nb, given | dict(stop=True))['metrics']['first']['mean'] == 50


def test_accepted_changes_are_in_the_result(interrupted):
    "And what was accepted once continues without a word, but is never taken for one code's."
    before = begun_by(folder_of(interrupted))['digest']
    notebook(interrupted.parent, PARAMETERS, TRAINING.replace('not first', 'True'), REPORT)
    stopped(interrupted, accept_changes=True)
    assert state(interrupted).kind == 'stopped'
    notebook(interrupted.parent, PARAMETERS, TRAINING.replace('not first', 'True'), REPORT)
    result = run(interrupted)
    (later,) = result['resumed_with']
    assert result['digest'] == before
    assert later['digest']['notebook'] != before['notebook']
    assert later['digest']['code'] == before['code']
    assert later['iteration'] == 50
    assert later['when'] < result['finished']
    assert set(later) == {'iteration', 'when', 'digest', 'versions', 'commit', 'dirty'}
    assert 'modules' not in result
    s = state(interrupted)
    assert (s.kind, s.note) == ('done, other code', 'in part another version of the notebook')
    notebook(interrupted.parent, PARAMETERS, *CELLS)  # as it was begun
    assert state(interrupted).kind == 'done, other code'


def test_force_begins_anew(interrupted):
    notebook(interrupted.parent, PARAMETERS, *OTHER)
    result = run(interrupted, force=True)
    assert result['metrics']['first']['mean'] == 0
    assert 'resumed_with' not in result
    assert state(interrupted).kind == 'done'


def test_what_an_older_version_began_continues_with_a_warning(interrupted):
    (folder_of(interrupted) / '.origin.json').unlink()
    with pytest.warns(UserWarning, match='demo/one continues, but the code that began it'):
        result = go_on(interrupted)
    assert result['digest'] == {}
    assert [result[name] for name in MAY_LACK] == [None] * 3
    assert result['resumed_with'][0]['iteration'] == 50
    assert result['resumed_with'][0]['versions']
    s = state(interrupted, stop=True)
    assert (s.kind, s.note) == ('done, other code', 'in part another version of the package')


def test_results_of_older_versions_are_of_other_code(finished):
    file = folder_of(finished) / 'result.json'
    result = read_json(file)
    old = dict(notebook='1', params='1', package='1')
    for digest in (old, None):
        write_json(file, result | dict(digest=digest))
        s = state(finished)
        assert (s.kind, s.note) == ('done, other code', 'another version of the package')
    assert run(finished)['already']


def test_a_result_that_names_no_device_is_shown(finished, capsys):
    file = folder_of(finished) / 'result.json'
    write_json(file, {k: v for k, v in read_json(file).items() if k != 'device'})
    asked = ['run', str(finished), '--name', 'demo/one', '--runs', str(finished.parent / 'runs')]
    assert main(asked) == 0
    assert 'already done: demo/one, scale smoke, 0 s\n' in capsys.readouterr().out


def test_a_checkpoint_that_cannot_be_read_is_left_to_the_training(interrupted):
    (folder_of(interrupted) / 'checkpoint.safetensors').write_text('')
    notebook(interrupted.parent, PARAMETERS, 'x = 2', 'run', *CELLS[1:])
    with pytest.raises(RunFailed):
        run(interrupted, accept_changes=True)
    origin = read_json(folder_of(interrupted) / '.origin.json')
    assert [later['iteration'] for later in origin['resumed_with']] == [None]


# ---- in a batch
def planned(nb, slug='one'):
    params = dict(x=2, plugin='', stop=True, scale='smoke')
    return Planned('demo', slug, nb, dict(stop=True), params, nb.parent / 'runs')


def test_a_batch_leaves_other_code_alone_and_says_so(interrupted, capsys):
    "It is listed with the way out, with exit status 1; nothing is executed."
    notebook(interrupted.parent, PARAMETERS, *OTHER)
    p = planned(interrupted)
    s = state_of(p)
    assert s.kind == 'stopped, other code'
    assert s.note == 'at iteration 50 of 100, begun by another version of the notebook'
    assert s.blocked and not s.stopped and not s.to_be_made()
    assert describe_state(p, s).startswith('! demo/one')
    assert todo([p], Options()) == {}
    assert todo([p], Options(accept_changes=True)) == {p: 'continues, by other code'}
    text = 'experiment: exp.ipynb\nruns: {one: {stop: true}}\nscales: {smoke: {}}'
    (interrupted.parent / 'demo.yaml').write_text(text)
    folder = folder_of(interrupted)
    folder.rename(folder.with_name('one_smoke'))
    asked = ['batch', str(interrupted.parent / 'demo.yaml'), '--runs', str(folder.parent.parent)]
    assert main(asked) == 1
    said = capsys.readouterr().out
    assert 'demo/one_smoke: stopped, other code. at iteration 50' in said
    assert '--accept-changes continues it with this code, --only one_smoke --force begins' in said
    assert main([*asked, '--dry-run', '--accept-changes']) in (0, None)
    assert 'continues, by other code' in capsys.readouterr().out


def ordered(folder, *planned, **more):
    "A file of orders."
    orders = dict(runs=[row_of(p) for p in planned], again=[], limit=0, since='2000')
    write_json(folder / 'orders.json', orders | dict(accept_changes=False) | more)
    return str(folder / 'orders.json')


def test_a_worker_goes_on_to_the_others(interrupted, tmp_path):
    notebook(interrupted.parent, PARAMETERS, *OTHER)
    one, two = planned(interrupted), planned(interrupted, 'two')
    with pytest.raises(KeyboardInterrupt):
        Work()(ordered(tmp_path, one, two))
    assert state_of(two).kind == 'stopped'  # at 50, as it is asked to
    assert Work()(ordered(tmp_path, one, two)) == ['demo/two']
    assert [state_of(p).kind for p in (one, two)] == ['stopped, other code', 'done']
    assert not Work().execute(one, json.loads((tmp_path / 'orders.json').read_text()))
    assert not (one.folder / 'failed.json').exists()
    assert Work()(ordered(tmp_path, one, two, accept_changes=True)) == ['demo/one']
    assert state_of(one).result['resumed_with'][0]['iteration'] == 50


def test_a_worker_that_follows_a_dead_one_continues_what_is_made_again(finished, tmp_path):
    "Also after a requeue: the orders are the same."
    p = planned(finished)
    orders = ordered(tmp_path, p, again=[p.name], since=state_of(p).when + 'Z')
    with pytest.raises(KeyboardInterrupt):
        Work()(orders)
    assert contents(finished) == OLD
    assert Work()(orders) == [p.name]
    assert state_of(p).result['metrics']['first']['mean'] == 50
    assert state_of(p).kind == 'done'
