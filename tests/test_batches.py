"""Batches: real papermill, real kernels, real workers; whatever dies, every run is made once."""

import contextlib
import fcntl
import io
import os
import pty
import random
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import yaml
from conftest import ROOT, full
from fewshotmeta.data.files import locked, read_json, write_json
from fewshotmeta.lab.batches import BadBatch, Planned, read_batch, scales_of
from fewshotmeta.lab.command import main
from fewshotmeta.lab.results import all_results, table_of, write_table
from fewshotmeta.lab.locks import RunBusy, marker, read_marker
from fewshotmeta.lab.runs import run_notebook
from fewshotmeta.lab.states import State, View, describe_state, state_of
from fewshotmeta.lab.work import planned_of, record_failure, row_of
from fewshotmeta.lab.workers import Options, run_batch, todo
from fewshotmeta.training.checkpoints import read_checkpoint
from tiny import run_here

PARAMETERS = 'x = 1\nlr = 0.1\nsteps = 100\nname = "a"\nseed = 0\nscale = "smoke"'
# leaves a line for every execution, then does what it is told
TRACE = '''
import os, signal, time
from fewshotmeta.lab.execution import report, run_folder
gpu, threads = os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ.get("FEWSHOTMETA_WORKERS")
with open(os.environ["TRACES"], "a") as f:
    print(run_folder().name, os.getpid(), gpu, threads, file=f)
'''
OBEY = '''
if name == "raise":
    raise KeyError("gone")
if name == "hang":
    while True:
        time.sleep(1)
if name == "die":
    os.kill(os.getpid(), signal.SIGKILL)
if name == "memory":
    import torch
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
'''
REPORT = 'report(square=dict(mean=x*x, ci95=None, n=1))'
CELLS = (TRACE, OBEY, REPORT)
SLOW = (TRACE, 'time.sleep(1.5)', REPORT)
HANGS = (TRACE, 'time.sleep(600)', REPORT)
needs_proc = pytest.mark.skipif(not Path('/proc').is_dir(), reason='needs /proc')


def experiment(folder, runs, cells=CELLS, parameters=PARAMETERS, **doc):
    "Write an experiment and its YAML into a folder; the YAML's path."
    nb = nbformat.v4.new_notebook(
        metadata={'kernelspec': {'name': 'python3', 'display_name': 'python3'}},
        cells=[nbformat.v4.new_code_cell(s) for s in (parameters, *cells)],
    )
    nb.cells[0].metadata['tags'] = ['parameters']
    nbformat.write(nb, folder / 'exp.ipynb')
    doc = dict(experiment='exp.ipynb', runs=runs) | doc
    (folder / 'table.yaml').write_text(yaml.dump(doc, sort_keys=False))
    return folder / 'table.yaml'


@pytest.fixture
def batch(tmp_path, monkeypatch):
    "`batch(runs, …)` writes an experiment and its YAML, and returns the YAML's path."
    monkeypatch.setenv('TRACES', str(tmp_path / 'traces'))

    def make(runs, **more):
        return experiment(tmp_path, runs, **more)

    return make


THREE = dict(a=dict(x=2), b=dict(x=3, seed=[0, 1]))


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "A folder with the batch `THREE`, executed once for all tests that only look at finished runs."
    folder = tmp_path_factory.mktemp('made')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('TRACES', str(folder / 'traces'))
        states = run_batch(planned(experiment(folder, THREE)), Options(jobs=2))
    assert [s.kind for s in states.values()] == ['done'] * 3
    return folder


@pytest.fixture
def finished(made, batch, tmp_path):
    "A copy of the finished batch, to be changed; the YAML's path."
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return batch(THREE)


def planned(path, scale='', **kw):
    "The runs of a batch file, beside which all runs lie."
    return read_batch(path, scale, runs=path.parent / 'runs', **kw)


def first(path):
    "The first run of a batch file."
    return planned(path)[0]


def outcomes(runs, **options):
    "Execute runs; their states by slug."
    return {p.slug: s for p, s in run_batch(runs, Options(**options)).items()}


def kinds(path):
    "How each run of a batch file stands."
    return {p.slug: state_of(p).kind for p in planned(path)}


def trace_lines(path):
    "What every execution left: the run, its process, its GPUs, its threads."
    return [line.split() for line in (path.parent / 'traces').read_text().splitlines()]


def traces(path):
    "The runs that were executed, one entry an execution."
    return [line[0] for line in trace_lines(path)]


def seeds(n):
    "The slugs of a run `a` with so many seeds."
    return [f'a_smoke_seed{i}' for i in range(n)]


def command(*args):
    return [sys.executable, '-m', 'fewshotmeta.lab.command', *map(str, args)]


def fewshotmeta(*args, **kw):
    return subprocess.run(command(*args), capture_output=True, text=True, **kw)


def started(path, *args, folder='runs', before=(), **kw):
    "A batch in a process of its own."
    asked = command('batch', path, '--runs', path.parent / folder, *args)
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([*before, *asked], **pipes | kw)


def executed(path, *args, folder='runs'):
    "The same, waited for."
    return fewshotmeta('batch', path, '--runs', path.parent / folder, *args)


def heedful():
    "Run in a child before it starts: a shell's background job ignores Ctrl-C, and so its children."
    for s in (signal.SIGINT, signal.SIGHUP):
        signal.signal(s, signal.SIG_DFL)


def until(f, seconds=120):
    "Wait until a question is answered with yes."
    end = time.monotonic() + seconds
    while not f():
        assert time.monotonic() < end, 'waited in vain'
        time.sleep(0.05)


def until_begun(path, n=1):
    "Wait until so many runs have begun."
    until(lambda: (path.parent / 'traces').exists() and len(traces(path)) >= n)


def processes_of(path):
    "Kernels and workers that have something to do with a folder."
    found = []
    for pid in filter(str.isdigit, os.listdir('/proc')):
        try:
            text = Path(f'/proc/{pid}/environ').read_bytes()
            text += Path(f'/proc/{pid}/cmdline').read_bytes()
        except OSError:
            continue
        if str(path).encode() in text and int(pid) != os.getpid():
            found.append(int(pid))
    return found


# ---- the file
def test_order_of_changes(batch):
    "Defaults, common, run, scale, and the run at that scale."
    path = batch(
        dict(a=dict(x=2, steps=50, seed=[3, 4], scales=dict(short=dict(lr=1))), b={}),
        common=dict(lr='1e-2', steps=200),
        scales=dict(smoke=dict(steps=1), short=dict(steps='0.5x', name='s'), paper={}),
    )
    short = planned(path)
    assert [p.slug for p in short] == ['a_short_seed3', 'a_short_seed4', 'b_short']
    assert short[0].params == dict(x=2, lr=1.0, steps=25, name='s', seed=3, scale='short')
    assert short[2].params == dict(x=1, lr=0.01, steps=100, name='s', seed=0, scale='short')
    assert [p.params['steps'] for p in planned(path, 'smoke')] == [1, 1, 1]
    assert [p.params['steps'] for p in planned(path, 'paper')] == [50, 50, 200]
    assert [p.slug for p in planned(path, only='*seed4')] == ['a_short_seed4']
    assert short[0].name == 'table/a_short_seed3'
    assert short[0].folder == path.parent / 'runs' / 'table' / 'a_short_seed3'
    # never less than one
    assert planned(batch(dict(a=dict(steps='.001x'))), 'smoke')[0].params['steps'] == 1


def test_a_run_is_left_out_of_a_scale(batch):
    path = batch(dict(a={}, b=dict(scales=dict(short=False))), scales=dict(short={}, paper={}))
    assert [p.slug for p in planned(path)] == ['a_short']
    assert [p.slug for p in planned(path, 'paper')] == ['a_paper', 'b_paper']
    with pytest.raises(BadBatch, match='b: scales: short: expected .name: value. lines, not True'):
        planned(batch(dict(b=dict(scales=dict(short=True))), scales=dict(short={})))


def slugs(path, scale=''):
    return [p.slug for p in planned(path, scale)]


def values(path, *names, scale=''):
    return [tuple(p.params[name] for name in names) for p in planned(path, scale)]


def test_a_grid_makes_a_run_of_each_combination(batch):
    "Called after the values, seeds last; a factor is of what the scale has made of the parameter."
    sweep = dict(seed=[7, 8], lr=['5e-2', 1], steps=['0.5x', '2x'])
    path = batch(
        dict(a=dict(x=2, grid=sweep), b={}),
        common=dict(steps=200),
        scales=dict(smoke=dict(steps='0.1x', lr=9.0), paper={}),
    )
    names = [f'a_lr={lr}_steps={steps}' for lr in ('0.05', '1.0') for steps in ('0.5x', '2x')]
    each = [f'{name}_smoke_seed{seed}' for name in names for seed in (7, 8)]
    assert slugs(path, 'smoke') == [*each, 'b_smoke']
    small = [(2, lr, steps, seed) for lr in (0.05, 1) for steps in (10, 40) for seed in (7, 8)]
    assert values(path, 'x', 'lr', 'steps', 'seed', scale='smoke') == [*small, (1, 9.0, 20, 0)]
    assert slugs(path, 'paper')[0] == 'a_lr=0.05_steps=0.5x_paper_seed7'
    assert values(path, 'steps', scale='paper')[::2] == [(100,), (400,), (100,), (400,), (200,)]


def test_the_grid_of_a_run_changes_the_grid_of_common(batch):
    runs = dict(a={}, b=dict(grid=dict(lr=[3])), c=dict(grid=dict(name=['p/q', 'r'])))
    common = dict(x=4, seed=[5], grid=dict(lr=[1, 2]))
    ab = ['a_lr=1.0_smoke_seed5', 'a_lr=2.0_smoke_seed5', 'b_lr=3.0_smoke_seed5']
    c = [f'c_lr={lr}.0_name={name}_smoke_seed5' for lr in (1, 2) for name in ('p-q', 'r')]
    assert slugs(batch(runs, common=common)) == ab + c
    path = batch(dict(a=dict(grid=dict(x=[1, 2]))), common=dict(x=4))
    assert values(path, 'x') == [(1,), (2,)]  # the run is nearer than common
    path = batch(dict(a=dict(grid=dict(seed=[0, 1]))), common=dict(seed=[5]))
    assert slugs(path) == seeds(2)
    lists = 'ways = [2]\nwords = ["a"]\nseed = 0'
    grid = dict(ways=[[2, 5], []], words=['a,b', 'c'])
    path = batch(dict(a=dict(grid=grid)), parameters=lists)
    assert slugs(path)[0] == 'a_ways=2+5_words=a+b_smoke'
    assert values(path, 'ways', 'words')[3] == ([], ['c'])


@pytest.mark.parametrize(
    'runs,doc,words',
    [
        (dict(grid={}), {}, 'runs: a: grid: it is empty'),
        (dict(grid=None), {}, 'runs: a: grid: it is empty'),
        (dict(grid=[1]), {}, 'runs: a: grid: expected `name: value`'),
        (dict(grid=dict(lr=[])), {}, 'grid: lr: the list is empty'),
        (dict(grid=dict(lr=0.1)), {}, r'lr: expected a list of values, as in lr: \[0.1, …\]'),
        (dict(grid=dict(step=[1])), {}, "no parameter 'step', did you mean 'steps'"),
        (dict(grid=dict(x=[1, 'two'])), {}, "x='two': expected int"),
        (dict(grid=dict(x=[1, 1.5])), {}, 'grid: x=1.5: expected int'),
        (dict(grid=dict(x=[1, 1.0])), {}, 'two runs would be called a_x=1_smoke'),
        (dict(grid=dict(name=['a/b', 'a b'])), {}, 'two runs would be called a_name=a-b_smoke'),
        (dict(grid=dict(name=['b' * 200])), {}, '213 bytes, 200 at most: choose a shorter name'),
        (dict(x=3, grid=dict(x=[1, 2])), {}, r'x=3 and a grid of x=\[1, 2\]: which one is meant'),
        (dict(x=3), dict(common=dict(grid=dict(x=[1, 2]))), 'runs: a: x=3 .* which one is meant'),
        (dict(), dict(common=dict(x=3, grid=dict(x=[1, 2]))), 'x=3 .* which one is meant'),
        (
            dict(scales=dict(smoke=dict(x=3)), grid=dict(x=[1, 2])),
            dict(scales=dict(smoke={})),
            'which one is meant',
        ),
        (dict(), dict(scales=dict(smoke=dict(grid=dict(x=[1])))), 'a scale has no grid'),
        (dict(grid=dict(scale=['smoke'])), {}, 'the scale of a batch is chosen with --scale'),
        (dict(lr=[0.05, 0.1]), {}, r'lr=\[0.05, 0.1\]: .* `grid: {lr: \[0.05, 0.1\]}`'),
    ],
)
def test_a_grid_that_cannot_be_used(batch, runs, doc, words):
    with pytest.raises(BadBatch, match=words):
        planned(batch(dict(a=runs), **doc))


def test_numbers_of_yaml_are_those_of_python(batch, tmp_path):
    "`010` is no eight, `1:30` no ninety, `on` no truth; all are text, and text is no number."
    path = batch(dict(a={}))
    text = path.read_text()
    for word in ('010', '1:30', '1:30.5', '2001-01-01', 'on', 'off', 'yes', 'No', '.inf', '-.NaN'):
        path.write_text(text.replace('a: {}', f'a: {{x: {word}}}'))
        with pytest.raises(BadBatch, match=f"x='?{word}'?: expected (int|a finite number)"):
            planned(path)
        path.write_text(text.replace('a: {}', f'a: {{name: {word}}}'))
        assert values(path, 'name') == [(word,)]
    for word, value in {'1e3': 1000, '2.0': 2, '1_000': 1000, '0x10': 16, '-3': -3}.items():
        path.write_text(text.replace('a: {}', f'a: {{x: {word}}}'))
        assert values(path, 'x') == [(value,)]


KINDS = 'x = 2\nlr = 0.1\nmaybe = None\nflag = False\nways = [2, 5]\nwords = ["a"]\nseed = 0'


@pytest.mark.parametrize(
    'given,words',
    [
        ('flag: yes', "flag='yes': expected bool"),
        ('flag: on', "flag='on': expected bool"),
        ('flag: 1', 'flag=1: expected bool'),
        ('lr: .nan', 'lr=.nan: expected a finite number'),
        ('lr: 1e999', 'lr=inf: expected a finite number'),
        ('maybe: .inf', 'maybe=.inf: expected a finite number'),
        ('maybe: "nan"', 'maybe=nan: expected a finite number'),
        ('ways: [2, .inf]', 'ways=.inf: expected a finite number'),
        ('ways: [2, 1e999]', 'ways=inf: expected a finite number'),
        ('words: !!set {a, b}', 'words={.*: expected a number, text'),
        ('words: [!!binary eA==]', "words=b'x': expected a number, text"),
        (f'x: {"9" * 400}', 'x=…: expected a finite number'),
        (f'x: {"9" * 400}x', 'x=9+: no finite number is 2 times that'),
        (f'lr: {"9" * 400}x', 'lr=9+: no finite number is 0.1 times that'),
        (f'x: {"9" * 30}x', 'x=9+x: 2e.30 is more than a whole number may be'),
        ('maybe: 2x\nx: {a: 1}', "x={'a': 1}: expected int"),
    ],
)
def test_values_of_yaml_that_are_none(batch, given, words):
    path = batch(dict(a={}), parameters=KINDS)
    for form in 'runs: {a: {%s}}', 'common: {%s}\nruns: {a: }':
        path.write_text('experiment: exp.ipynb\n' + form % given.replace('\n', ', '))
        with pytest.raises(BadBatch, match=words):
            planned(path)


def test_values_of_yaml_as_on_the_command_line(batch):
    path = batch(dict(a={}), parameters=KINDS)
    given = 'flag: true, x: 1e5, ways: [1e1, 0x10, 3], words: [no, 1e5], maybe: off, lr: 2x'
    path.write_text(f'experiment: exp.ipynb\nruns: {{a: {{{given}}}}}')
    (found,) = values(path, 'flag', 'x', 'ways', 'words', 'maybe', 'lr')
    assert found == (True, 100_000, [10, 16, 3], ['no', '1e5'], 'off', 0.2)
    assert [type(value) for value in (found[1], *found[2])] == [int] * 4


@pytest.mark.parametrize(
    'runs,doc,words',
    [
        (dict(a=dict(y=1)), {}, "runs: a: no parameter 'y'"),
        (dict(a=dict(step=1)), {}, "did you mean 'steps'"),
        (dict(a=dict(x='two')), {}, "x='two': expected int"),
        (dict(a=dict(x=1.5)), {}, 'x=1.5: expected int'),
        (dict(a=dict(name=3)), {}, 'name=3: expected str'),
        (dict(a=dict(seed=['one'])), {}, "seed='one': expected int"),
        (dict(a=dict(name='2x', lr='x')), {}, "lr='x': expected float"),
        ({}, {}, 'there are none'),
        (dict(a=3), {}, 'expected `name: value` lines'),
        ({'../a': {}}, {}, 'letters, digits'),
        ({'a/b': {}}, {}, 'letters, digits|at most one'),
        ({True: {}}, {}, 'the name True is not text'),
        (dict(a={}), dict(run=1), "no entry 'run', did you mean 'runs'"),
        (
            dict(a={}),
            dict(scales=dict(big={})),
            "no entry 'big': choose one of smoke, short, long, code, paper",
        ),
        (dict(a=dict(scales=dict(huge={}))), {}, "no entry 'huge'"),
        (dict(a=dict(seed=[])), {}, 'seed: the list is empty'),
        (dict(a=dict(scales=dict(short={}))), {}, "'short' is not among the scales of the file"),
        (dict(a=dict(x='2x')), dict(common=dict(x=[1])), 'a factor of'),
        (dict(a=dict(seed=[1, 1])), {}, 'two runs would be called a_smoke_seed1'),
        (dict(a={}), dict(experiment='none.ipynb'), 'no notebook'),
        (dict(a={}), dict(experiment='../exp.ipynb'), 'a notebook beside this file'),
        (dict(a={}), dict(common=[1]), 'common: expected'),
    ],
)
def test_bad_batch_files(batch, runs, doc, words):
    with pytest.raises(BadBatch, match=words):
        planned(batch(runs, **doc))


@pytest.mark.parametrize(
    'text,words',
    [
        ('experiment: exp.ipynb\nruns: {a: {x: 1}, a: {x: 2}}', "'a' appears twice"),
        ('a: [', 'is not YAML'),
        ('', 'experiment=None'),
        ('- a', 'expected `name: value`'),
        ('runs: !!python/object/apply:os.system ["touch pwned"]', 'is not YAML'),
        ('a: *b', 'is not YAML'),
        ('experiment: exp.ipynb\nruns:\n  a: {x: 2001-01-01}', 'expected int'),
        ('? [1, 2]\n: 3', 'is not YAML'),
    ],
)
def test_text_that_is_no_batch(batch, tmp_path, text, words):
    batch(dict(a={}))
    (tmp_path / 'bad.yaml').write_text(text)
    with pytest.raises(BadBatch, match=words):
        read_batch(tmp_path / 'bad.yaml')


def test_what_a_batch_file_does_not_have(batch, tmp_path):
    batch(dict(a={}))
    with pytest.raises(BadBatch, match='cannot be read'):
        read_batch(tmp_path / 'none.yaml')
    with pytest.raises(BadBatch, match="no file omniglott here, did you mean 'omniglot'"):
        read_batch('omniglott')
    with pytest.raises(BadBatch, match="no run matches 'z'; there are a_smoke"):
        read_batch(tmp_path / 'table.yaml', only='z')
    with pytest.raises(BadBatch, match="no scale 'paper': choose one of smoke"):
        read_batch(tmp_path / 'table.yaml', 'paper')


@pytest.mark.parametrize(
    'bad,words',
    [
        (dict(jobs=-1), 'jobs=-1'),
        (dict(executor='ssh'), "executor='ssh': choose local or slurm"),
        (dict(executor='slurm', slurm=dict(time='2:00:00')), 'a whole number of minutes'),
        (dict(executor='slurm', gpus=(0,)), 'gpus_per_node=1'),
        (dict(limit=-1), 'limit=-1'),
        (dict(slurm=dict(time=3)), 'executor=slurm only'),
    ],
)
def test_options(bad, words):
    with pytest.raises(ValueError, match=words):
        Options(**bad)


def test_slurm_is_asked_for_where_it_is(monkeypatch):
    monkeypatch.setenv('PATH', '')
    with pytest.raises(ValueError, match='there is no sbatch here'):
        Options(executor='slurm')


# ---- a batch
def test_a_batch_from_the_command_line(batch, monkeypatch):
    "Said before it is done; one fails, and is tried again; looked at, and collected."
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
    runs = dict(one=dict(x=1, seed=[0, 1]), two=dict(x=2))
    path = batch(runs | dict(bad=dict(name='raise')), scales=dict(smoke={}))
    folder = path.parent / 'runs'
    dry = executed(path, '--dry-run')
    assert dry.returncode == 0
    assert 'table/two_smoke' in dry.stdout
    assert '4 of 4 runs would be executed' in dry.stdout
    assert not folder.exists()

    out = executed(path, '--jobs', '2')
    assert out.returncode == 1, out.stderr
    assert '4 runs: 3 done, 1 failed' in out.stdout
    assert "KeyError: 'gone'" in out.stdout
    assert 'Traceback' not in out.stdout + out.stderr
    done = dict(one_smoke_seed0='done', one_smoke_seed1='done', two_smoke='done')
    assert kinds(path) == done | dict(bad_smoke='failed')
    check_what_was_left(path)
    # only the failed one is tried again
    assert executed(path).returncode == 1
    assert len(traces(path)) == 5
    batch(runs | dict(bad=dict(name='fine')), scales=dict(smoke={}))
    assert executed(path).returncode == 0
    assert kinds(path)['bad_smoke'] == 'done'
    assert len(traces(path)) == 6
    assert len(list((folder / '.jobs').iterdir())) == 2  # logs are kept where something failed
    check_what_is_shown(path)


def check_what_was_left(path):
    "Of the failure, its record; of each execution, a trace."
    bad = path.parent / 'runs' / 'table' / 'bad_smoke'
    failed = read_json(bad / 'failed.json')
    assert failed['kind'] == 'raised'
    assert 'raise KeyError("gone")' in failed['traceback']
    assert (bad / 'failed.ipynb').is_file()
    assert sorted(traces(path)) == ['bad_smoke', 'one_smoke_seed0', 'one_smoke_seed1', 'two_smoke']
    threads = str(max(1, len(os.sched_getaffinity(0)) // 2))
    # threads are divided; without --gpus, GPUs are as the machine has them
    assert {(gpu, n) for _, _, gpu, n in trace_lines(path)} == {('None', threads)}


def check_what_is_shown(path):
    "The status of four finished runs, and their table."
    status = fewshotmeta('status', path, '--runs', path.parent / 'runs')
    assert status.returncode == 0
    assert '4 runs: 4 done' in status.stdout
    assert 'square 4.0000' in status.stdout
    table = path.parent / 't.csv'
    csv = fewshotmeta('results', 'table/*', '--runs', path.parent / 'runs', '--out', table)
    assert csv.returncode == 0
    assert len(table.read_text().splitlines()) == 5


def test_states_without_and_with_a_result(finished, batch):
    new = first(batch(dict(new=dict(x=3))))
    assert state_of(new).kind == 'waiting'
    assert todo([new], Options()) == {new: 'new'}
    a = first(batch(THREE))
    assert state_of(a).kind == 'done'
    assert todo([a], Options()) == {}
    assert todo([a], Options(force=True)) == {a: 'again'}


def test_states_after_an_edit_of_the_code(finished, batch):
    cells = CELLS[:2] + ('y = x*x\nreport(square=dict(mean=y, ci95=None, n=1))',)
    a = first(batch(THREE, cells=cells))
    s = state_of(a)
    assert (s.kind, s.note) == ('done, other code', 'another version of the notebook')
    assert s.done and s.stale and not s.to_be_made()
    assert todo([a], Options()) == {}
    assert 'again' in todo([a], Options(stale=True))[a]
    # comments and empty lines do not count
    cells = CELLS[:2] + ('# a comment\n\n' + REPORT,)
    assert state_of(first(batch(THREE, cells=cells))).kind == 'done'
    # a parameter that the notebook has got since
    more = PARAMETERS + '\nnew = True'
    assert state_of(first(batch(THREE, parameters=more))).kind == 'done, other code'
    other = batch(dict(a=dict(x=2, new=True)), parameters=more)
    assert state_of(first(other)).kind == 'changed'


def test_other_parameters_are_left_alone_unless_forced(finished, batch):
    before = len(traces(finished))
    a = first(batch(dict(a=dict(x=4))))
    assert state_of(a).kind == 'changed'
    assert 'another x' in state_of(a).note
    assert todo([a], Options()) == {}
    assert [s.kind for s in outcomes([a]).values()] == ['changed']
    assert len(traces(finished)) == before
    assert [s.kind for s in outcomes([a], force=True).values()] == ['done']
    assert read_json(a.folder / 'result.json')['metrics']['square']['mean'] == 16


def test_a_broken_result_is_made_again_and_a_checkpoint_is_begun(finished):
    a = first(finished)
    (a.folder / 'result.json').write_text('{}')
    assert state_of(a).kind == 'broken'
    assert [s.kind for s in outcomes([a]).values()] == ['done']
    (a.folder / 'result.json').unlink()
    (a.folder / 'checkpoint.safetensors').write_text('')
    assert (state_of(a).kind, state_of(a).note) == ('stopped', '')


FAILURES = dict(
    raises="raised: exp.ipynb raised KeyError: 'gone'",
    hangs='time limit: exp.ipynb ran longer than its limit of 0.4 minutes',
    dies='killed: ',
    memory='raised: exp.ipynb raised OutOfMemoryError: CUDA out of memory',
)


def test_what_fails_is_recorded_and_the_others_finish(batch, record):
    "A notebook raises, one hangs, kernels die, GPU memory ends, a folder cannot be written."
    bad = dict(raises='raise', hangs='hang', dies='die', memory='memory')
    bad = {run: dict(name=name) for run, name in bad.items()}
    path = batch(dict(good=dict(seed=[0, 1, 2])) | bad | dict(nowhere={}))
    (path.parent / 'runs' / 'table').mkdir(parents=True)
    in_the_way = path.parent / 'runs' / 'table' / 'nowhere_smoke'
    in_the_way.write_text('a file where the folder should be')
    states = outcomes(planned(path), gpus=(2, 5), limit=0.4)
    assert all(states[f'good_smoke_seed{i}'].kind == 'done' for i in range(3))
    for name, words in FAILURES.items():
        s = states[f'{name}_smoke']
        assert s.failed and s.kind == 'failed' and s.note.startswith(words), s
    assert states['nowhere_smoke'].kind == 'failed'
    assert 'irectory' in states['nowhere_smoke'].note
    # two workers, one for each GPU
    assert {gpu for _, _, gpu, _ in trace_lines(path)} == {'2', '5'}
    what = 'a notebook that raises, hangs, is killed, runs out of GPU memory, or cannot write'
    record(
        f'{what}, beside three good ones',
        failures=5,
        recorded=sum(s.kind == 'failed' for s in states.values()),
        others_finished=sum(s.kind == 'done' for s in states.values()),
    )


@pytest.fixture
def little_memory():
    "A control group with 300 MB; skipped, visibly, where none can be made."
    name = f'fewshotmeta-test-{os.getpid()}'
    old = Path('/sys/fs/cgroup/memory')
    group = (old if old.is_dir() else old.parent) / name
    limit = 'memory.limit_in_bytes' if old.is_dir() else 'memory.max'
    try:
        group.mkdir()
        (group / limit).write_text('300000000')
        if (group / 'memory.swap.max').exists():
            (group / 'memory.swap.max').write_text('0')
    except OSError as e:
        pytest.skip(f'no control groups for memory here: {e}')
    yield group
    group.rmdir()


def test_killed_by_the_system_for_memory(batch, record, little_memory):
    "A real limit of the kernel's memory (a control group), and the system's own killer."
    hog = f'''
import os
if name == "big":
    open("{little_memory}/cgroup.procs", "w").write(str(os.getpid()))
    hog = [bytearray(50_000_000) for _ in range(20)]
'''
    cells = (hog, 'from fewshotmeta.lab.execution import report\nreport(a=1)')
    states = outcomes(planned(batch(dict(big=dict(name='big'), small={}), cells=cells)))
    files = [little_memory / f'memory.{name}' for name in ('events', 'oom_control')]
    events = next(f for f in files if f.exists()).read_text()
    assert states['big_smoke'].kind == 'failed', states
    assert states['big_smoke'].note.startswith('killed'), states
    assert states['small_smoke'].kind == 'done', states
    counts = [line.split() for line in events.splitlines()]
    assert any(name == 'oom_kill' and int(n) for name, n in counts)
    what = 'kernel killed by the system for memory, beside a good one'
    record(what, failures=1, recorded=1, others_finished=1)


def test_a_failure_without_words_and_one_after_a_result(finished):
    "An exception may have no message; a failure counts if it is younger than the result."
    a, before = first(finished), len(traces(finished))
    record_failure(a, 'MemoryError', '')
    assert (state_of(a).kind, state_of(a).note) == ('failed', 'MemoryError: ')
    assert outcomes([a])['a_smoke'].kind == 'done'
    assert len(traces(finished)) == before  # the result is good: nothing to execute


def test_forced_runs_are_made_once_each(finished):
    states = outcomes(planned(finished), jobs=2, force=True)
    assert all(s.kind == 'done' for s in states.values())
    assert sorted(traces(finished)) == sorted([p.slug for p in planned(finished)] * 2)


def test_a_forced_run_that_cannot_be_made_is_not_called_done(finished, batch):
    path = batch(THREE, cells=('1/0',))
    states = outcomes(planned(path), jobs=2, force=True)
    assert [s.kind for s in states.values()] == ['failed'] * 3
    results, _ = all_results(path.parent / 'runs')  # the old ones stay
    assert [r['metrics']['square']['mean'] for r in results] == [4, 9, 9]


# ---- whatever is stopped or killed
def test_several_batches_at_once(batch, record):
    "Started together: each run is executed once, and each batch says that all are done."
    path, n = batch(dict(a=dict(seed=list(range(6)))), cells=SLOW), 8 if full() else 3
    all_ = [started(path) for _ in range(n)]
    said = [p.communicate(timeout=300)[0] for p in all_]
    assert all(p.returncode == 0 for p in all_)
    assert all('6 runs: 6 done' in s for s in said), said
    assert sorted(traces(path)) == seeds(6)
    record('batches over the same file at once', batches=n, runs=6, executed_once=6)


@needs_proc
def test_stopped_cleanly_and_finished_by_the_same_command(batch, tmp_path):
    "Ctrl-C, SIGTERM, a closed terminal: code 130, no process is left; then nohup keeps it going."
    runs = dict(a=dict(seed=[0, 1, 2]))
    path = batch(runs, cells=HANGS)
    for n, sig in enumerate((signal.SIGINT, signal.SIGTERM, signal.SIGHUP), 1):
        p = started(path, '--jobs', '2', start_new_session=True, preexec_fn=heedful)
        until_begun(path, 2 * n)
        if sig == signal.SIGTERM:
            p.send_signal(sig)
        else:
            os.killpg(p.pid, sig)  # what a terminal says reaches them all
        err = p.communicate(timeout=60)[1]
        assert p.returncode == 130, (sig, err)
        assert 'interrupted' in err and 'Traceback' not in err, (sig, err)
        until(lambda: not processes_of(tmp_path / 'runs'), 10)
    assert len(traces(path)) == 6
    # where SIGHUP is ignored, as nohup does, it stays ignored
    path = batch(runs, cells=SLOW)
    p = started(path, '--jobs', '2', before=['nohup'], start_new_session=True)
    until_begun(path, 7)
    os.killpg(p.pid, signal.SIGHUP)
    out, err = p.communicate(timeout=60)
    assert p.returncode == 0 and '3 runs: 3 done' in out, out + err
    assert sorted(traces(path)[6:]) == seeds(3)


@needs_proc
def test_workers_of_a_killed_batch_finish_their_run_and_end(batch):
    "And the next batch waits for that run, instead of starting more than it may."
    path = batch(dict(a=dict(seed=[0, 1, 2])), cells=SLOW)
    p = started(path)
    until_begun(path)
    p.kill()
    p.wait()  # its worker lives
    out = executed(path)
    assert out.returncode == 0, out.stdout + out.stderr
    assert traces(path) == seeds(3), out.stdout + out.stderr


@needs_proc
def test_a_killed_worker_is_replaced_and_its_kernel_does_not_stay(batch, tmp_path):
    path = batch(dict(a=dict(seed=[0, 1])), cells=SLOW)
    p = started(path)
    until_begun(path)
    kernel = trace_lines(path)[0][1]
    os.kill(read_marker(tmp_path / 'runs', 'table', 'a_smoke_seed0')['pid'], signal.SIGKILL)
    until(lambda: not Path(f'/proc/{kernel}').exists(), 15)
    assert '2 runs: 2 done' in p.communicate(timeout=120)[0]
    assert p.returncode == 0
    assert traces(path) == ['a_smoke_seed0', *seeds(2)]


def test_a_run_that_takes_every_worker_with_it_is_given_up(batch):
    kill = '''
if run_folder().name == "a_smoke":
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(60)
'''
    path = batch(dict(a={}, b={}), cells=(TRACE, kill, REPORT))
    states = outcomes(planned(path))
    assert states['a_smoke'].kind == 'failed'
    assert 'three workers died in it' in states['a_smoke'].note
    assert states['b_smoke'].kind == 'done'
    assert sorted(traces(path)) == ['a_smoke'] * 3 + ['b_smoke']


def test_workers_that_cannot_start_end_the_batch(batch, monkeypatch):
    path = batch(dict(a={}))
    monkeypatch.setenv('PYTHONSTARTUP', '')
    monkeypatch.setenv('PYTHONPATH', str(path.parent))
    (path.parent / 'cloudpickle.py').write_text('raise ImportError("no luck")')
    words = 'workers end without executing anything; the last one says'
    with pytest.raises(ChildProcessError, match=words):
        run_batch(planned(path), Options())


def test_the_runner_refuses_what_another_executes(batch):
    p = first(path := batch(dict(a={}), cells=SLOW))
    asked = command('run', p.notebook, '--runs', p.runs, '--name', p.name)
    other = subprocess.Popen(asked, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until_begun(path)
    s = state_of(p)
    assert (s.kind, s.who['pid']) == ('running', other.pid)
    words = f'table/a_smoke is being executed by another process .process {other.pid} on'
    with pytest.raises(RunBusy, match=words):
        run_notebook(p.notebook, p.given, p.name, p.runs, quiet=True)
    # watched, not executed again
    assert run_batch([p], Options())[p].kind == 'done'
    assert other.wait(60) == 0
    assert traces(path) == ['a_smoke']


# ---- the experiment: whatever is killed, the same bytes
TRAIN = dict(
    data='glyphs',
    iterations=40,
    valid_every=5,
    valid_tasks=4,
    test_tasks=10,
    filters=8,
    meta_batch=2,
    test_steps=1,
)
METHODS = dict(
    maml={},
    mamlpp=dict(inner_steps=2, norm='per_step'),
    hidra=dict(train_ways=[2, 6]),
    hypermaml=dict(hyper_width=16),
    fomaml={},
    meta_sgd={},
    reptile=dict(optimizer='sgd'),
    hidra_mamlpp={},
    anyway_hypermaml=dict(train_ways=[3, 5], hyper_width=16),
)


def training(folder, methods, **common):
    "A batch file of the real experiment, in a folder of its own; its path."
    source = ROOT / 'nbs' / 'experiments' / 'train.ipynb'
    shutil.copy(source, folder / 'train.ipynb')
    runs = {m: METHODS[m] | dict(method=m) for m in methods}
    doc = dict(experiment='train.ipynb', common=TRAIN | common, runs=runs, scales=dict(smoke={}))
    (folder / 'all.yaml').write_text(yaml.dump(doc))
    return folder / 'all.yaml'


def outcome(folder, r=None):
    "What must be the same: the checkpoint's tensors, every metric but the time, the tasks."
    r = r or read_json(folder / 'result.json')
    metrics = {k: v for k, v in r['metrics'].items() if k != 'training_seconds'}
    return read_checkpoint(folder)[0]['tensors'], metrics, r['episodes_digest']


def killed_again_and_again(path, most, spread):
    "Run a batch, and kill it with all its workers and kernels so often; how often it was."
    rng, kills, folder = random.Random(0), 0, path.parent / 'killed'

    def training_since(begun):
        "Whether a training has begun, however fast the machine."
        files = folder.glob('all/*/checkpoint.safetensors')
        return any(f.stat().st_mtime > begun for f in files)

    while True:
        begun, p = time.time(), started(path, '--jobs', '2', folder='killed')
        until(lambda: p.poll() is not None or kills == most or training_since(begun), 300)
        with contextlib.suppress(subprocess.TimeoutExpired):
            p.wait(timeout=rng.uniform(0, spread) if kills < most else 900)
            break
        p.kill()
        kills += 1
        for pid in processes_of(folder):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        p.communicate()
    assert p.returncode == 0, p.communicate()
    return kills


@needs_proc
def test_same_bytes_alone_beside_another_and_killed(tmp_path, record):
    "Each method: one at a time; two at a time; with batch, workers and kernels killed midway."
    path = training(tmp_path, METHODS if full() else ['maml', 'hypermaml'])
    alone, others = {}, ['killed']
    for p in planned(path):
        folder = tmp_path / 'alone' / p.slug
        alone[p.slug] = outcome(folder, run_here(p.notebook, p.params, folder))
    if full():
        out = executed(path, '--jobs', '2', folder='beside')
        assert out.returncode == 0, out.stdout + out.stderr
        others.append('beside')
    most, spread = (12, 6.0) if full() else (2, 0.3)
    kills = killed_again_and_again(path, most, spread)
    assert kills
    for name in others:
        for slug, expected in alone.items():
            assert outcome(tmp_path / name / 'all' / slug) == expected, (name, slug)
    what = 'same bytes: one at a time, two at a time, and killed'
    counted = dict(methods=len(alone), kills=kills, identical=len(alone))
    record(f'{what} (batch, workers and kernels at once)', **counted)


# ---- what one sees
class Terminal(io.StringIO):
    def isatty(self):
        return True


PROGRESS = dict(iteration=50, iterations=200, seconds=25.0, loss=1.25, accuracy=0.5, best=0.4567)


def test_the_view(finished, batch, tmp_path):
    a, c = planned(path := batch(dict(a=dict(x=2), c=dict(x=3))))
    write_json(c.folder / '.progress.json', PROGRESS)
    with locked(marker(c.runs, 'table', 'c_smoke', 'lock')):
        write_json(marker(c.runs, 'table', 'c_smoke'), dict(pid=7, host='node1', since=0.0))
        # the lock is our own here, so ask as another process would
        said = fewshotmeta('status', path, '--runs', tmp_path / 'runs').stdout
    assert 'table/a_smoke' in said
    assert 'done   square 4.0000' in said
    pace = '50/200   2.00 it/s   loss 1.250, accuracy 0.500, best val 0.4567   75 s left'
    assert f'running on node1, process 7   {pace}' in said, said
    out = Terminal()
    view = View(out)
    for _ in range(2):
        view({p: state_of(p) for p in (a, c)})
    assert out.getvalue().count('\x1b[3A') == 1
    assert out.getvalue().endswith('\x1b[J')


def running(name, **progress):
    "A run that another process executes, and how it stands."
    experiment, slug = name.split('/')
    p = Planned(experiment, slug, Path(), {}, {}, Path('runs'))
    return {p: State('running', '', {}, progress, dict(pid=12345, host='node1'))}


def drawn(monkeypatch, columns, states):
    "The rows of the view on a terminal of so many columns."
    monkeypatch.setenv('COLUMNS', str(columns))
    monkeypatch.setenv('LINES', '24')
    out = Terminal()
    View(out)(states)
    return out.getvalue().replace('\x1b[2K', '').removesuffix('\x1b[J').splitlines()


LONG = PROGRESS | dict(iteration=12_345, iterations=75_000, seconds=1234.5)
HYPER = 'hypermaml_t1/hypermaml_5way_1shot_long_seed0'


def test_a_narrow_terminal_drops_what_is_least_needed(monkeypatch):
    "Host and process, then accuracies, then the word; at last the name is shortened."
    parts = ['node1, process 12345', 'accuracy 0.500, best val 0.4567', ' running']
    kept = '▸', '10.00 it/s', 'loss 1.250', '12,345/75,000', '1.7 h left'
    states = running(HYPER, **LONG)
    for width, lost in (220, 0), (150, 1), (115, 2), (105, 3):
        row, total = drawn(monkeypatch, width, states)
        assert len(row) < width
        assert [part in row for part in parts] == [False] * lost + [True] * (3 - lost), row
        assert all(part in row for part in (*kept, HYPER))
    row, total = drawn(monkeypatch, 80, states)
    assert len(row) < 80
    assert all(part in row for part in kept)
    name = row.split()[1]
    start, end = name.split('…')
    assert HYPER.startswith(start) and HYPER.endswith(end) and len(row) == 79
    assert total == '1 runs: 1 running'


def test_every_row_of_a_narrow_terminal(monkeypatch):
    failure = State('failed', 'raised: ' + 'ValueError ' * 20)
    states = running(HYPER, **LONG) | running('a/short', **PROGRESS)
    states |= {next(iter(running('b/failed'))): failure}
    for width in (60, 80, 100, 200):
        rows = drawn(monkeypatch, width, states)
        assert max(map(len, rows)) < width
        starts = {row.find('12,345/75,000') for row in rows} | {row.find('50/200') for row in rows}
        assert width < 80 or len(starts - {-1}) == 1, 'columns stand under each other'
    assert rows[2].startswith('✗ b/failed') and rows[2].endswith('…')


ALPHABET = 'abcdefghijklm/nopqrstuvwxyz'
BEGUN = dict(iteration=1, iterations=9, seconds=0.5, loss=1.0, accuracy=0.5)
WELL = 'loss 1.000, accuracy 0.500   4 s left'
WORDS = [  # everything, then without what is least needed
    f'running on node1, process 12345   1/9, validating 3/4   2.00 it/s   {WELL}',
    f'running   1/9, validating 3/4   2.00 it/s   {WELL}',
    'running   validating 3/4   2.00 it/s   loss 1.000   4 s left',
    'validating 3/4  2.00 it/s  loss 1.000  4 s left',
]
SHORTENED = [  # of 20 columns at least
    'abcdefghi…lm/nopqrstuvwxyz',
    'abcdefg…/nopqrstuvwxyz',
    'abcdefg…nopqrstuvwxyz',
    'abcdefg…opqrstuvwxyz',
]


def test_what_a_column_less_costs(monkeypatch):
    "A line leaves one column of a terminal; with less room words go, then names, then the end."
    states = running(ALPHABET, **BEGUN | dict(phase='validating', done=3, all=4))
    lines = [f'▸ {ALPHABET} {words}' for words in WORDS]
    lines += [f'▸ {name} {WORDS[-1]}' for name in SHORTENED]
    for line in lines:
        assert drawn(monkeypatch, len(line) + 1, states)[0] == line
    for line, shorter in zip(lines, lines[1:5]):
        assert drawn(monkeypatch, len(line), states)[0] == shorter
    assert drawn(monkeypatch, len(lines[-1]), states)[0] == f'{lines[-1][:-2]}…'
    assert drawn(monkeypatch, 12, states)[1] == '1 runs: 1 r'


def test_a_name_gives_way_to_what_is_said_of_a_result_but_not_of_a_failure(monkeypatch):
    states = running(ALPHABET, **BEGUN)
    failed, done = (next(iter(running(name))) for name in ('b/failed', 'c/done'))
    states |= {failed: State('failed', 'raised: ' + 'x' * 99)}
    rows = drawn(monkeypatch, 130, states)
    line = f'✗ {"b/failed":27} failed: raised: {"x" * 99}'
    assert rows[0] == f'▸ {ALPHABET} running on node1, process 12345   1/9   2.00 it/s   {WELL}'
    assert rows[1] == f'{line[:128]}…'
    result = dict(metrics=dict(a=dict(mean=1.0, ci95=None)), seconds=1.0)
    states |= {done: State('done, other code', 'x' * 40, result)}
    rows = drawn(monkeypatch, 100, states)
    assert rows[0] == '▸ abcdefg…opqrstuvwxyz 1/9  2.00 it/s  loss 1.000  4 s left'
    assert rows[2] == f'✓ {"c/done":20} done, other code ({"x" * 40})   a 1.0000   1 s'


def test_a_name_alone_may_fill_a_terminal(monkeypatch):
    states = {next(iter(running(ALPHABET))): State('waiting')}
    assert drawn(monkeypatch, 31, states)[0] == f'· {ALPHABET}…'
    assert drawn(monkeypatch, 30, states)[0] == '· abcdefghi…lm/nopqrstuvwxyz…'


def test_what_is_said_of_each_phase():
    said = {}
    for phase, done, total in ('training', 50, 200), ('validating', 40, 100), ('testing', 120, 600):
        progress = PROGRESS | dict(phase=phase, done=done, all=total, spent=10.0)
        ((p, state),) = running('a/b', **progress).items()
        said[phase] = describe_state(p, state).partition('12345   ')[2]
    well = 'loss 1.250, accuracy 0.500, best val 0.4567'
    assert said['training'] == f'50/200   2.00 it/s   {well}   75 s left'
    assert said['validating'] == f'50/200, validating 40/100   2.00 it/s   {well}   75 s left'
    assert said['testing'] == 'testing 120/600   12.00 tasks/s   40 s left'
    ((p, state),) = running('a/b', phase='testing', done=1, all=2, spent=3.0).items()
    assert describe_state(p, state).endswith('testing 1/2   0.33 tasks/s   3 s left')


ANSWERS = {
    'done': ['done'],
    'done, other code': ['done', 'stale'],
    'changed': ['changed'],
    'broken': ['broken'],
    'running': ['running', 'taken'],
    'queued': ['taken'],
    'failed': ['failed'],
    'stopped': ['stopped'],
    'stopped, other code': ['blocked'],
    'waiting': [],
}
ASKED = 'done', 'stale', 'changed', 'broken', 'running', 'taken', 'failed', 'stopped', 'blocked'


@pytest.mark.parametrize('kind', ANSWERS)
def test_what_a_state_answers(kind):
    answers = {name: getattr(State(kind), name) for name in ASKED}
    assert answers == {name: name in ANSWERS[kind] for name in ASKED}


def test_what_is_to_be_made():
    failed = State('failed', result=dict(when='2026'))
    assert [failed.to_be_made(since) for since in ('', '2025', '2026', '2027')] == [1, 0, 0, 1]
    assert State('stopped', result=dict(when='2026')).to_be_made('2025')  # it has not failed
    blocked = State('stopped, other code')
    assert [blocked.to_be_made(accept_changes=a) for a in (False, True)] == [False, True]
    assert [State(kind).to_be_made() for kind in ('done', 'changed', 'broken')] == [0, 0, 1]


def told(state):
    "What is said of a run after its name."
    ((p, _),) = running('a/b').items()
    return describe_state(p, state).partition('a/b')[2].strip()


@pytest.mark.parametrize(
    'seconds,words',
    [(89.4, '89 s'), (90, '2 min'), (5399, '90 min'), (5400, '1.5 h'), (3_600_000, '1000.0 h')],
)
def test_how_long_is_said(seconds, words):
    result = dict(metrics=dict(a=dict(mean=1.0, ci95=None)), seconds=seconds)
    assert told(State('done', result=result)) == f'done   a 1.0000   {words}'
    other = State('done, other code', 'why', result)
    assert told(other) == f'done, other code (why)   a 1.0000   {words}'


def test_what_is_said_of_a_run():
    assert told(State('waiting')) == 'waiting'
    assert told(State('failed', 'raised: x')) == 'failed: raised: x'
    assert told(State('running', 'job 7')) == 'running (job 7)'
    assert told(State('running', who=dict(pid=7))) == 'running on ?, process 7'
    first_rows = State('running', progress=PROGRESS | dict(best=None))
    assert 'accuracy 0.500   75 s left' in told(first_rows)


TESTED = dict(phase='testing', iteration=9, iterations=9, done=1, all=5, spent=0.5)
PACES = [  # how far, and how fast, once that is known
    (BEGUN, f'1/9   2.00 it/s   {WELL}'),
    (BEGUN | dict(phase='validating'), f'1/9   2.00 it/s   {WELL}'),
    (BEGUN | dict(iteration=0), ''),
    (BEGUN | dict(seconds=0.0), ''),
    (TESTED, 'testing 1/5   2.00 tasks/s   2 s left'),
    (TESTED | dict(done=0), ''),
    (TESTED | dict(spent=0.0), ''),
    (dict(phase='validating', done=1, all=5, spent=1), 'validating 1/5   1.00 tasks/s   4 s left'),
    (dict(done=1, all=5, spent=2.0), ''),
]


@pytest.mark.parametrize('progress,words', PACES)
def test_what_is_said_of_how_far_a_run_is(progress, words):
    assert told(State('running', progress=progress)) == f'running   {words}'.strip()


def on_terminal(monkeypatch, states, columns=90, lines=6):
    "What a terminal of that size shows."
    monkeypatch.setenv('COLUMNS', str(columns))
    monkeypatch.setenv('LINES', str(lines))
    out = Terminal()
    View(out)(states)
    return out.getvalue().replace('\x1b[2K', '').removesuffix('\x1b[J').splitlines()


def test_a_low_terminal_shows_what_matters(monkeypatch):
    "All while they have room; else who runs, failed or is another's; never more rows than it has."
    kinds = 'done', 'running', 'failed', 'changed', 'stopped, other code', 'waiting', 'queued'
    result = dict(metrics=dict(a=dict(mean=1.0, ci95=None)), seconds=1.0)
    states = {}
    for kind in kinds:
        ((p, _),) = running(f'a/{kind}').items()
        states[p] = State(kind, result=result)
    rows = on_terminal(monkeypatch, states, lines=10)
    assert len(rows) == 8 and rows[-1].startswith('7 runs: ')
    rows = on_terminal(monkeypatch, states, lines=9)
    assert [row.split()[1] for row in rows[:-1]] == [f'a/{k.split()[0]}' for k in kinds[1:5]]
    rows = on_terminal(monkeypatch, states, lines=6)
    assert len(rows) == 4 and rows[0].split()[1] == 'a/running' and rows[-1].startswith('7 runs: ')
    row, total = on_terminal(monkeypatch, running('a/b', **LONG), columns=60)
    ratio = '12,345/75,000  10.00 it/s  loss 1.250  1.7 h left'
    assert row == f'▸ a/b {ratio}'
    phase = LONG | dict(phase='validating', done=1, all=5)
    row, total = on_terminal(monkeypatch, running('a/b', **phase), columns=60)
    assert 'validating 1/5  10.00 it/s' in row and '12,345' not in row
    row, total = on_terminal(monkeypatch, running('a/b', **phase), columns=72)
    assert 'running   validating 1/5   10.00 it/s' in row


@pytest.mark.parametrize('lines', [1, 2, 3, 4])
def test_the_lowest_terminals(monkeypatch, lines):
    "The count has its row, and none that would scroll stands above it."
    states = {p: s for name in 'abcde' for p, s in running(f'a/{name}').items()}
    rows = on_terminal(monkeypatch, states, lines=lines)
    assert rows[-1] == '5 runs: 5 running'
    assert len(rows) == max(1, lines - 2)


def test_lines_are_printed_for_what_changed_and_each_minute():
    out = io.StringIO()
    view = View(out)
    states = running('a/b', **PROGRESS) | {next(iter(running('a/c'))): State('waiting')}
    view(states)
    first_line = out.getvalue()
    assert first_line.count('\n') == 1 and 'a/b' in first_line
    view(states)
    assert out.getvalue() == first_line
    view.printed -= 61
    view(states)
    assert out.getvalue() == f'{2 * first_line}2 runs: 1 running, 1 waiting\n'
    view(states)
    assert out.getvalue().count('\n') == 3
    view({p: State('failed') for p in states})
    assert out.getvalue().count('✗') == 2
    view({p: State('waiting') for p in states})  # its folder was removed
    assert out.getvalue().count('waiting\n') == 3


def test_a_minute_is_sixty_seconds(monkeypatch):
    view = View(io.StringIO())
    view.printed = 0.0
    for now, lines in (60.0, 0), (60.5, 1), (120.5, 1), (121.0, 2):
        monkeypatch.setattr(time, 'monotonic', lambda: now)
        view({})
        assert view.out.getvalue().count('\n') == lines


def test_who_follows_a_file_of_lines_sees_each_at_once(tmp_path):
    with open(tmp_path / 'out.txt', 'w', encoding='utf-8') as out:
        View(out)(running('a/b'))
        assert (tmp_path / 'out.txt').read_text(encoding='utf-8').startswith('▸ a/b')


def watching(master, slave, *args):
    "`fewshotmeta status … --watch` on a terminal of 80 columns."
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack('4H', 24, 80, 0, 0))
    env = {k: v for k, v in os.environ.items() if k not in ('COLUMNS', 'LINES')}
    p = subprocess.Popen(command('status', *args), stdout=slave, env=env, preexec_fn=heedful)
    os.close(slave)
    return p


def read_until(master, words, text=''):
    "What a terminal shows up to some words; all of it if the process ends before."
    while words not in text:
        try:
            text += os.read(master, 10_000).decode()
        except OSError:
            break
    return text


@pytest.mark.parametrize('ends', ['with the run', 'by Ctrl-C'])
def test_watching_a_batch(batch, tmp_path, ends):
    (p,) = planned(path := batch(dict(c=dict(x=3))))
    write_json(p.folder / '.progress.json', LONG | dict(phase='testing', done=1, all=9, spent=2.0))
    (p.folder / 'checkpoint.safetensors').touch()
    master, slave = pty.openpty()
    with locked(marker(p.runs, 'table', 'c_smoke', 'lock')):
        looking = watching(master, slave, path, '--runs', tmp_path / 'runs', '--watch', '0.05')
        shown = read_until(master, '\x1b[2A')  # drawn over itself
        if ends == 'by Ctrl-C':
            looking.send_signal(signal.SIGINT)
            assert looking.wait(60) == 0
    shown = read_until(master, 'never', shown)
    assert looking.wait(60) == 0
    assert '▸ table/c_smoke' in shown and 'testing 1/9   0.50 tasks/s   16 s left' in shown
    assert ('1 runs: 1 stopped' in shown) == (ends == 'with the run')
    os.close(master)


def test_watching_a_folder(finished, tmp_path):
    "What is finished at the first look is not shown; without a terminal, changes are lines."
    runs = tmp_path / 'runs'
    (runs / 'table' / 'a_smoke' / 'result.json').rename(tmp_path / 'kept.json')
    write_json(runs / 'table' / 'a_smoke' / '.progress.json', PROGRESS)
    (runs / 'table' / 'a_smoke' / 'checkpoint.safetensors').touch()
    args = command('status', '--runs', runs, '--watch', '0.05')
    with locked(marker(runs, 'table', 'a_smoke', 'lock')):
        looking = subprocess.Popen(args, stdout=subprocess.PIPE, text=True, env=UNBUFFERED)
        first = looking.stdout.readline()
        (tmp_path / 'kept.json').rename(runs / 'table' / 'a_smoke' / 'result.json')
    rest, _ = looking.communicate(timeout=60)
    assert first.startswith('▸ table/a_smoke') and '75 s left' in first
    assert [line.split()[:3] for line in rest.splitlines()] == [
        ['✓', 'table/a_smoke', 'done'],
        ['1', 'runs:', '1'],
    ]


UNBUFFERED = os.environ | dict(PYTHONUNBUFFERED='1')


@pytest.mark.parametrize('given', ['0', '-1', 'nan', 'inf', 'table.yaml'])
def test_watching_asked_for_wrongly(capsys, given):
    assert main(['status', '--watch', given]) == 2
    said = f'--watch {given}: expected seconds, a number greater than 0; batch files go before'
    assert said in capsys.readouterr().err


def test_results(finished, tmp_path):
    results, bad = all_results(tmp_path / 'runs')
    rows = table_of(results)
    assert rows['run'].tolist() == ['a_smoke', 'b_smoke_seed0', 'b_smoke_seed1']
    assert rows['recipe'].tolist() == ['a', 'b', 'b']
    assert rows['mean'].tolist() == [4, 9, 9]
    assert rows['seed'].tolist()[1:] == [0, 1]
    assert not bad
    write_table(rows, tmp_path / 'r.parquet')
    write_table(rows, tmp_path / 'r.csv')
    assert pd.read_parquet(tmp_path / 'r.parquet')['mean'].tolist() == [4, 9, 9]
    assert pd.read_csv(tmp_path / 'r.csv')['mean'].tolist() == [4, 9, 9]
    with pytest.raises(ValueError, match='.csv or .parquet'):
        write_table(rows, tmp_path / 'r.xlsx')


def test_a_result_that_was_altered_is_left_out(finished, tmp_path):
    f = tmp_path / 'runs' / 'table' / 'a_smoke' / 'result.json'
    f.write_bytes(f.read_bytes().replace(b'4.0', b'5.0'))
    out = fewshotmeta('results', '--runs', tmp_path / 'runs')
    assert out.returncode == 1
    assert 'left out' in out.stderr
    assert 'not what was stored' in out.stderr
    rows = [line.split()[:2] for line in out.stdout.splitlines()[-2:]]
    assert rows == [['b', '0'], ['b', '1']]
    over = fewshotmeta('status', '--runs', tmp_path / 'runs').stdout
    assert '2 results, 0 not finished, 1 invalid result files' in over
    assert fewshotmeta('status', '--runs', tmp_path / 'none').returncode == 2


LOOK = '''
import sys
from fewshotmeta.lab.command import main
main(["results", "--runs", sys.argv[1]])
print([m for m in ("torch", "papermill", "submitit") if m in sys.modules])
'''


def test_looking_on_needs_no_torch():
    asked = [sys.executable, '-c', LOOK, str(ROOT / 'runs')]
    out = subprocess.run(asked, capture_output=True, text=True)
    assert out.stdout.splitlines()[-1] == '[]', out.stderr


# ---- the batch files that come with the experiments
BATCHES = sorted((ROOT / 'nbs' / 'experiments').glob('*.yaml'))


def stem_of(path):
    return path.stem


@pytest.mark.parametrize('path', BATCHES, ids=stem_of)
def test_batch_files_can_be_read_at_every_scale(path):
    for scale in scales_of(path):
        runs = read_batch(path, scale)
        assert len({p.name for p in runs}) == len(runs)
        assert all(p.params['scale'] == scale for p in runs)


def paper_of(path):
    return path.stem.partition('_')[0]


def smoke_rows(paper):
    "The rows of a paper's batch files, and those that they begin from, each once."
    rows = {}
    for path in BATCHES:
        if paper_of(path) == paper:
            rows |= {p.name: p for p in read_batch(path, 'smoke')}
    return rows


@pytest.mark.parametrize('paper', sorted({paper_of(path) for path in BATCHES}))
def test_smoke_of_every_batch_file(tmp_path, monkeypatch, paper):
    "Every table and figure at scale smoke, on drawn characters, in this process."
    monkeypatch.setenv('FEWSHOTMETA_WORKERS', '1')  # `make test` runs several tests at a time
    monkeypatch.chdir(ROOT / 'nbs' / 'experiments')
    for p in smoke_rows(paper).values():
        folder = tmp_path / p.name
        folder.mkdir(parents=True)
        learner = str(tmp_path / p.needs.name / 'learner.safetensors') if p.needs else ''
        given = p.params | (dict(learner=learner) if learner else {})
        reported = run_here(ROOT / p.notebook, given, folder)
        assert reported['metrics'], p.name


@pytest.mark.parametrize('paper', sorted({paper_of(path) for path in BATCHES}))
def test_smoke_of_a_batch_by_the_runner(tmp_path, monkeypatch, paper):
    """`fewshotmeta batch FILE --scale smoke`: the last row of each paper, and what it begins from.

    In kernels of their own."""
    monkeypatch.setenv('FEWSHOTMETA_WORKERS', '1')
    path = [path for path in BATCHES if paper_of(path) == paper][-1]
    *_, last = read_batch(path, 'smoke', runs=tmp_path)
    rows = [last.needs, last] if last.needs else [last]
    runs = run_batch(rows, Options())
    assert {p.name: (s.kind, s.note) for p, s in runs.items() if s.kind != 'done'} == {}


@pytest.mark.parametrize('path', BATCHES, ids=stem_of)
def test_committed_results_belong_to_their_batch_file(path):
    "What is in runs/ under a batch file's name is one of its runs, with its parameters."
    planned = {p.name: p for scale in scales_of(path) for p in read_batch(path, scale)}
    for f in (ROOT / 'runs' / path.stem).glob('*/result.json'):
        if '_smoke' not in f.parent.name:
            assert state_of(planned[f'{path.stem}/{f.parent.name}']).done, f


# ---- runs that begin from another's learner

OBEY_AND_KEEP = (OBEY, 'run_folder().joinpath("learner.safetensors").write_text("")', REPORT)
ASKS = PARAMETERS + '\nlearner = ""'


def test_a_learner_is_made_first_and_once(batch):
    "By two workers, for rows of two files; what begins from a failed run fails, and says so."
    runs = dict(
        late=dict(learner='made'), broken=dict(learner='bad'), made={}, bad=dict(name='raise')
    )
    path = batch(runs, parameters=ASKS, cells=(*SLOW[:2], *OBEY_AND_KEEP))
    beside = path.with_name('other.yaml')
    beside.write_text('experiment: exp.ipynb\nruns: {far: {learner: table/made}}')
    assert [(p.name, p.asked) for p in planned(beside)] == [
        ('table/made_smoke', False),
        ('other/far_smoke', True),
    ]
    both = planned(path) + [p for p in planned(beside) if p.asked]
    states = outcomes(both, jobs=2)
    assert states.pop('bad_smoke').kind == states['broken_smoke'].kind == 'failed'
    words = 'learner: it starts from the learner of table/bad_smoke, which is failed'
    assert states.pop('broken_smoke').note.startswith(words)
    assert {s.kind for s in states.values()} == {'done'}
    assert planned_of(row_of(both[-1])).needs.name == 'table/made_smoke'
    order = traces(path)
    assert sorted(order) == ['bad_smoke', 'far_smoke', 'late_smoke', 'made_smoke']
    assert order.index('made_smoke') < min(order.index('late_smoke'), order.index('far_smoke'))
    far = read_json(path.parent / 'runs' / 'other' / 'far_smoke' / 'result.json')
    assert far['params']['learner'] == 'table/made_smoke'

    assert [why for why in todo(planned(beside), Options(force=True)).values()] == ['again']
    (path.parent / 'runs' / 'table' / 'made_smoke' / 'learner.safetensors').unlink()
    again = outcomes([p for p in planned(beside) if p.asked], force=True)['far_smoke']
    assert 'has no learner.safetensors: make it again with --force' in again.note


def test_a_learner_of_no_row_is_a_file_or_a_run(batch):
    path = batch(dict(a=dict(learner='far/away_short'), b=dict(learner='x.st')), parameters=ASKS)
    assert [p.params['learner'] for p in planned(path)] == ['far/away_short', 'x.st']
    path = batch(
        dict(a=dict(scales=dict(short=False)), b=dict(learner='a')),
        parameters=ASKS,
        scales=dict(short={}),
    )
    with pytest.raises(BadBatch, match='runs: a: left out at short, but b starts from it'):
        planned(path)
