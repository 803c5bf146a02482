"""The strict runner: real papermill, real kernels."""

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
import nbformat
import pandas as pd
import pytest
import torch
import fewshotmeta
from conftest import ROOT, full
from fewshotmeta.data.files import BadFile, read_json, write_json
from fewshotmeta.lab.batches import SCALES
from fewshotmeta.lab.execution import RESULT_TYPE, RunFailed, _last_states, report, run_folder
from fewshotmeta.lab.locks import RunBusy
from fewshotmeta.lab.parameters import BadParameters
from fewshotmeta.lab.provenance import changed_code, digests, kernels_in_use, module_digests
from fewshotmeta.lab.provenance import package_digest
from fewshotmeta.lab.runs import read_result, run_notebook
from fewshotmeta.lab.trained import tasks_for
from fewshotmeta.learners.maml import LEARNERS
from fewshotmeta.training.checkpoints import read_checkpoint
from fewshotmeta.training.evaluation import Evaluation, evaluate
from fewshotmeta.training.saving import load_learner
from tiny import PARAMETERS, REPORT, cells_of, files, folder_of, notebook, run, run_here

TRAIN = ROOT / 'nbs' / 'experiments' / 'train.ipynb'


@pytest.fixture(autouse=True)
def one_worker(monkeypatch):
    "A kernel computes by one worker: `make test` runs several tests at a time."
    monkeypatch.setenv('FEWSHOTMETA_WORKERS', '1')

SMALL = dict(
    iterations=2, valid_every=2, valid_tasks=2, test_tasks=3, test_steps=1, filters=4, meta_batch=2
)


# ---- a run
WHERE = """import os
from fewshotmeta.all import *
assert os.path.realpath(".") in map(os.path.realpath, run_folder().parents)
assert run_folder().parts[-2:] == ("demo", "one")
assert run_folder().is_dir()
assert os.environ["MALLOC_MMAP_MAX_"] == "0"
"""
one_run = pytest.mark.xdist_group('finished')  # made once


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    "The notebook of a run that is finished, and its result. Who changes the folder takes `copied`."
    nb = notebook(tmp_path_factory.mktemp('finished'), PARAMETERS, WHERE, REPORT)
    return nb, run(nb, dict(x=3, rate=1))


@pytest.fixture
def copied(finished, tmp_path):
    "The same notebook and its run, in a folder of one's own."
    shutil.copytree(finished[0].parent, tmp_path / 'copy')
    return tmp_path / 'copy' / 'exp.ipynb'


KEYS = """experiment run notebook scale params metrics episodes_digest seconds device kernels digest
versions commit dirty started finished"""


@one_run
def test_a_run_and_its_result(finished):
    nb, result = finished
    assert files(nb) == ['notebook.ipynb', 'result.json']
    assert read_json(folder_of(nb) / 'result.json') == result
    assert result['metrics'] == dict(square=dict(mean=9.0, ci95=None, n=1))
    assert result['params'] == dict(
        x=3, name='a', rate=1.0, flags=[1, 2], maybe=None, steps=[1, 2], scale='smoke'
    )
    assert set(result) == set(KEYS.split())
    assert result['versions']['fewshotmeta'] == fewshotmeta.__version__


@one_run
def test_the_executed_notebook(finished):
    nb, _ = finished
    path = folder_of(nb) / 'notebook.ipynb'
    executed = nbformat.read(path, 4)
    assert 'injected-parameters' in executed.cells[1].metadata.tags
    assert 'x = 3' in executed.cells[1].source
    assert str(nb.parent) not in path.read_text()
    with pytest.raises(BadParameters, match='was executed already'):
        run_notebook(path, runs=nb.parent / 'runs')


@one_run
def test_where_it_runs(finished):
    """cwd is the notebook's folder; the run's folder and the allocator come by the environment, and
    stay in the kernel."""
    nb, result = finished
    executed = nbformat.read(folder_of(nb) / 'notebook.ipynb', 4)
    assert WHERE in [cell.source for cell in executed.cells]
    assert result['metrics']['square']['mean'] == 9  # the asserts of `WHERE` held
    assert 'FEWSHOTMETA_RUN' not in os.environ
    assert run_folder() is None


@one_run
def test_done(finished):
    "A finished run is found again, tuples being lists; other parameters or notebooks are refused."
    nb, first = finished
    again = run(nb, dict(x=3, rate=1))
    assert again['already']
    assert again['finished'] == first['finished']
    way_out = 'choose another --name, or --force'
    with pytest.raises(BadParameters, match=f'finished run with another x: {way_out}'):
        run(nb, dict(x=4, rate=1))


@one_run
def test_done_by_another_notebook(copied):
    other = copied.rename(copied.parent / 'other.ipynb')
    with pytest.raises(BadParameters, match='finished run of exp.ipynb'):
        run(other, dict(x=3, rate=1))


@one_run
def test_force(copied):
    assert run(copied, dict(x=4), force=True)['metrics']['square']['mean'] == 16
    (folder_of(copied) / 'result.json').write_text('{"params": ')
    with pytest.raises(BadParameters, match='result.json is not whole .*: run again with --force'):
        run(copied, dict(x=4))


# ---- the accuracy of each task
def evaluation(accuracies, digest):
    "An `Evaluation` of these accuracies, (n, steps+1)."
    a = torch.tensor(accuracies)
    by_step = [(a[:, -1].mean().item(), 0.1)] * a.shape[1]
    return Evaluation(*by_step[-1], len(a), by_step, True, '', '', digest, 0.0, a)


def test_tasks_of_metrics_with_unlike_steps(tmp_path, monkeypatch):
    two, one = evaluation([[0.2, 0.4, 1 / 3]], 'aa'), evaluation([[0.5, 0.6], [0.7, 0.8]], 'bb')
    monkeypatch.chdir(tmp_path)
    report(first=two, plain=1.5, second=one)  # as in JupyterLab: no run
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv('FEWSHOTMETA_RUN', str(tmp_path))
    report(first=two, plain=1.5, second=one)
    assert [p.name for p in tmp_path.iterdir()] == ['tasks.csv']
    lines = (tmp_path / 'tasks.csv').read_text().splitlines()
    assert lines[0] == 'metric,task,step_0,step_1,step_2'
    assert lines[1:] == ['first,0,0.2,0.4,0.33333334', 'second,0,0.5,0.6,', 'second,1,0.7,0.8,']


def test_plain_metrics_and_further_ranks_write_no_tasks(tmp_path, monkeypatch):
    monkeypatch.setenv('FEWSHOTMETA_RUN', str(tmp_path))
    report(plain=1.5)
    monkeypatch.setenv('RANK', '1')
    report(first=evaluation([[0.2, 0.4]], 'aa'))
    assert list(tmp_path.iterdir()) == []


# ---- what it was made by
@one_run
def test_a_result_says_which_kernels_ran(finished):
    "Asked of a process of its own that has loaded them, and used them for nothing, as the run did."
    from fewshotmeta.engine import kernels

    expected = 'torch'
    if hasattr(kernels, 'kernels_used'):
        say = 'import json, fewshotmeta.engine.kernels as k; print(json.dumps(k.kernels_used()))'
        said = subprocess.run([sys.executable, '-c', say], capture_output=True, check=True).stdout
        expected = json.loads(said)
    assert finished[1]['kernels'] == expected


def test_no_kernels_are_loaded_to_be_named(monkeypatch):
    monkeypatch.delitem(sys.modules, 'fewshotmeta.engine.kernels', raising=False)
    assert kernels_in_use() == 'torch'
    assert 'fewshotmeta.engine.kernels' not in sys.modules


@pytest.fixture
def package(tmp_path, monkeypatch):
    "`package(**files)` writes a package, whose digests are then taken; its digest."
    monkeypatch.setattr(fewshotmeta, '__file__', str(tmp_path / '__init__.py'))
    monkeypatch.setenv('FEWSHOTMETA_CACHE', str(tmp_path / 'cache'))

    def write(files):
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
            os.utime(path, ns=(0, next(times)))  # as if a clock had ticked
        return package_digest()

    times = itertools.count(1)
    return write


ROOM = 'data/room.py'


@pytest.mark.parametrize(
    'text',
    [
        '# one\n\nx = 1\ndef f(a):\n    return a\n',
        '"What."\nx=1  # one\n\n\ndef f(\n    a,  # which\n):\n    "Why."\n    return (a)\n',
        "__all__ = ['x']\n\n# %% ../nbs/room.ipynb #1234\nx = 1\ndef f(a): return a\n",
    ],
    ids=['comments', 'docstrings and blanks', 'what nbdev writes'],
)
def test_what_does_not_count_of_python(package, text):
    assert package({ROOM: text}) == package({ROOM: 'x = 1\ndef f(a):\n    return a\n'})


def test_what_counts_of_python(package):
    texts = ['x = 1', 'x = 2', 'x = 1.0', 'y = 1', "x = '1'", 'x = -1', 'x = None', 'x: int = 1']
    texts += ['def f(a): pass', 'def f(a, b): pass', 'def f(a=1): pass', 'def f(*, a): pass']
    texts += ['x = f(a)(b)', 'x = f(a, b)', 'x = a - b', 'x = a + b', "x = f'{a}'", "x = f'{a!r}'"]
    assert len({package({ROOM: text}) for text in texts}) == len(texts)


def test_what_counts_of_c(package):
    def digest_of(text):
        return package({'engine/room.c': text})

    whole = digest_of('#include <math.h>\n#define N 1\nint f(int a) { return a - -N; }\n')
    reads = '#include  <math.h>\n/* one\ntwo */\n#define N 1  // one\nint f(int a)\n{return a- -N;}'
    assert digest_of(reads) == whole
    others = [
        '#include <math.h>\n#define N 2\nint f(int a) { return a - -N; }\n',
        '#define N 1\nint f(int a) { return a - -N; }\n',
        '#include <math.h>\n#define N 1\nint f(int a) { return a--N; }\n',
        '#include <math.h>\n#define N 1\nint f(int a) { return a + -N; }\n',
    ]
    assert whole not in map(digest_of, others)
    assert digest_of('f("/* a */");') != digest_of('f("/* b */");')


def test_only_what_a_notebook_passes_through_counts(package):
    files = {'data/a.py': 'x = 1', 'lab/protocols.py': 'x = 1', 'data/splits.json': '[1]'}
    whole = package(files)
    assert package({'lab/reports.py': 'x = 1', 'all.py': 'x = 1', 'data/a.txt': '1'}) == whole
    changed = {name: module_digests() for name in files if package({name: '2'}) != whole}
    assert list(changed) == list(files)
    assert set(module_digests()) == {'data.a', 'lab.protocols', 'data/splits.json'}


def test_digests_are_remembered_by_content(package, tmp_path):
    first = package({ROOM: 'x = 1'})
    store = read_json(tmp_path / 'cache' / 'code.json')
    write_json(tmp_path / 'cache' / 'code.json', {key: 'known' for key in store})
    assert package({ROOM: 'x = 1'}) != first  # not parsed again
    assert package({ROOM: 'x = 1 '}) == first
    (tmp_path / 'cache' / 'code.json').write_text('{')
    assert package({ROOM: 'x = 1'}) == first


def test_a_plugin_counts(tmp_path, monkeypatch):
    "A file beside the notebook or where we are, a module, a package; and one that is not there."
    nb = notebook(tmp_path / 'nb')
    monkeypatch.chdir(tmp_path)

    def digest_of(plugin):
        return digests(nb, dict(plugin=plugin))['plugin']

    def written(path, text):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)

    assert 'plugin' not in digests(nb, {}) | digests(nb, dict(plugin=''))
    gone = digest_of('own.py')
    written(tmp_path / 'own.py', 'x = 1')
    written(tmp_path / 'nb' / 'parts.py', '# one\nx = 1')
    written(tmp_path / 'nb' / 'pieces' / '__init__.py', '')
    one = digest_of('own.py')
    assert one == digest_of('parts.py') == digest_of('parts') == digest_of(f'{tmp_path}/own.py')
    assert gone == digest_of('no.such.module') != one
    written(tmp_path / 'own.py', 'x = 1 + 1')
    assert digest_of('own.py') != one
    before = digest_of('pieces')
    written(tmp_path / 'nb' / 'pieces' / 'more.py', 'x = 1')
    assert digest_of('pieces') not in (before, one)
    assert digest_of('pieces.more') == one
    assert 'pieces' not in sys.modules


def test_what_changed_is_named():
    then = dict(digest=dict(notebook='1', code='1'), modules=dict(a='1', b='1', c='1'))
    now = dict(digest=dict(notebook='1', code='2', plugin='1'), modules=dict(a='1', b='2', d='1'))
    assert changed_code(then, then) == []
    assert changed_code(then, now) == ['package (b, c, d)', 'plugin']
    assert changed_code(dict(digest=then['digest']), now) == ['package', 'plugin']
    older = dict(digest=dict(notebook='1', package='1'))  # as results had it before
    assert changed_code(older, then) == ['package']


# ---- a run that fails
def test_a_notebook_that_raises(tmp_path):
    nb = notebook(tmp_path, 'x = 1', 'raise KeyError("gone")')
    with pytest.raises(RunFailed, match="KeyError: 'gone'(?s:.*)failed.ipynb"):
        run(nb)
    assert files(nb) == ['failed.ipynb', 'failed.json']
    assert 'KeyError' in (folder_of(nb) / 'failed.ipynb').read_text()
    failed = read_json(folder_of(nb) / 'failed.json')
    assert failed['kind'] == 'raised'
    assert "KeyError: 'gone'" in failed['error']
    assert 'raise KeyError("gone")' in failed['traceback']
    good = notebook(tmp_path)
    run(good)
    assert files(good) == ['notebook.ipynb', 'result.json']


def test_what_failed_since_is_left_to_who_saw_it(tmp_path):
    """A worker that looked before another's run failed, and got its lock after: it neither executes
    it again nor forgets the failure."""
    nb = notebook(tmp_path, 'x = 1', 'open("traces", "a").write("x")\nraise KeyError("gone")')
    with pytest.raises(RunFailed):
        run(nb)
    record, traces = folder_of(nb) / 'failed.json', tmp_path / 'traces'
    failed = record.read_text()
    with pytest.raises(RunBusy, match='demo/one failed at .* leave .since. out to try again'):
        run(nb, since='2000-01-01T00:00:00+00:00')
    assert record.read_text() == failed
    assert len(traces.read_text()) == 1
    with pytest.raises(RunFailed):
        run(nb, since='3000-01-01T00:00:00+00:00')
    assert len(traces.read_text()) == 2


NOT_FINITE = 'from fewshotmeta.lab.execution import report\nreport(a=float("nan"))'


@pytest.mark.parametrize(
    'cells,words',
    [
        (('1',), r'report\(\) 0 times'),
        ((REPORT, REPORT), r'report\(\) 2 times'),
        ((NOT_FINITE,), 'a=nan: a result is a finite number'),
    ],
)
def test_one_finite_result(tmp_path, cells, words):
    nb = notebook(tmp_path, 'x = 1', *cells)
    with pytest.raises(RunFailed, match=words):
        run(nb)
    assert files(nb) == ['failed.ipynb', 'failed.json']


@pytest.mark.parametrize('ci95', [None, float('nan'), float('inf')])
def test_an_interval_that_is_not_known_is_none(monkeypatch, ci95):
    shown = []
    monkeypatch.setattr('IPython.display.display', shown.append)
    report(a=dict(mean=0.5, ci95=ci95, n=1))
    assert shown[0].result['metrics']['a']['ci95'] is None
    json.dumps(shown[0].result, allow_nan=False)
    for mean in (float('nan'), float('inf')):
        with pytest.raises(ValueError, match='a=(nan|inf): a result is a finite number'):
            report(a=mean)


def test_killed_kernel_is_recorded(tmp_path):
    nb = notebook(tmp_path, 'x = 1', 'import os, signal\nos.kill(os.getpid(), signal.SIGKILL)')
    with pytest.raises(RunFailed, match='(?i)kernel died.*a checkpoint, if there is one, is kept'):
        run(nb)
    assert 'result.json' not in files(nb)
    assert not [f for f in files(nb) if 'partial' in f]


# ---- folders that cannot be written
def test_read_only_runs_folder(tmp_path, read_only):
    with pytest.raises(
        OSError, match='cannot write .*: make .* writable, or choose another folder'
    ):
        run_notebook(notebook(tmp_path), runs=read_only, name='a/b', quiet=True)


def test_full_runs_folder(tmp_path, small_disk):
    nb = notebook(tmp_path, 'x = 1', 'print("x"*1_000_000)\n' + REPORT)
    with pytest.raises(OSError, match='(?i)no space left'):
        run_notebook(nb, runs=small_disk, name='a/b', quiet=True)
    left = [p.name for p in small_disk.rglob('*')]
    assert not {'result.json', 'notebook.ipynb'} & set(left)
    assert not [name for name in left if 'partial' in name]


# ---- the experiment
def test_train_notebook_runs_what_no_batch_file_has(tmp_path):
    special = dict(
        fomaml=dict(plan='loop', recompute=True),
        hidra=dict(train_ways=[2, 6], test_ways=[2, 7], clip_norm=10.0),
        hidra_mamlpp=dict(down='stride'),
        hypermaml=dict(labels='one_hot', augment=True),
        random_init={},
    )
    digests = set()
    for method, changes in special.items():
        given = SMALL | dict(method=method) | changes
        (tmp_path / method).mkdir()
        result = run_here(TRAIN, given, tmp_path / method)
        check_training(result, changes.get('test_ways', []))
        check_tasks(result, tmp_path / method)
        digests.add(result['episodes_digest'])
    assert (tmp_path / 'fomaml' / 'metrics.csv').is_file()
    assert not (tmp_path / 'random_init' / 'metrics.csv').exists()
    assert len(digests) == 1  # all methods meet the same test tasks


@pytest.mark.parametrize('method', sorted(LEARNERS))
def test_every_method_runs_by_its_name_alone(tmp_path, method):
    "Its defaults fit each other, and the learner that was tested is kept."
    folder = tmp_path / 'train' / method
    folder.mkdir(parents=True)
    n = 4  # fewer tasks than by default: no method's
    found = run_here(TRAIN, dict(method=method, valid_tasks=n, test_tasks=n), folder)
    metrics = found['metrics']
    assert metrics['test_accuracy']['n'] == n
    last = max(int(name.split('_')[-1]) for name in metrics if name.startswith('accuracy_step_'))
    learner = load_learner(folder / 'learner.safetensors')
    assert learner.card.run == f'train/{method}' and learner.card.method == method
    tasks = tasks_for(learner, 'glyphs')
    again = evaluate(learner, tasks, n)
    assert again.mean == pytest.approx(metrics['test_accuracy']['mean'], abs=1e-7)
    assert len(again.by_step) == last + 1 and again.digest == found['episodes_digest']


def check_training(result, ways):
    accuracy = result['metrics']['test_accuracy']
    assert 0 <= accuracy['mean'] <= 1
    assert accuracy['n'] == 3
    assert len(result['episodes_digest']) == 16
    expected = {'test_accuracy_not_transductive'} | {f'test_accuracy_{w}way' for w in ways}
    assert expected <= set(result['metrics'])


def check_tasks(result, folder):
    "The accuracy of each task, after each step, of each metric that is an evaluation."
    tasks = pd.read_csv(folder / 'tasks.csv')
    assert list(tasks) == ['metric', 'task', 'step_0', 'step_1']
    evaluated = {name for name in result['metrics'] if name.startswith('test_accuracy')}
    assert set(tasks['metric']) == evaluated
    assert {name for name, m in result['metrics'].items() if 'tasks' in m} == evaluated
    assert result['metrics']['test_accuracy']['tasks'] == result['episodes_digest']
    for name, rows in tasks.groupby('metric'):
        assert rows['task'].tolist() == [0, 1, 2]
        assert rows['step_1'].mean() == pytest.approx(result['metrics'][name]['mean'])
    for step in (0, 1):
        mean = tasks[tasks['metric'] == 'test_accuracy'][f'step_{step}'].mean()
        assert mean == pytest.approx(result['metrics'][f'accuracy_step_{step}']['mean'])


def test_train_notebook_on_real_data(tmp_path, real_data):
    "A kernel finds the data where this process does."
    given = SMALL | dict(data='omniglot', protocol='finn2017')
    result = run_notebook(TRAIN, given, 'm/x', tmp_path, quiet=True)
    assert result['scale'] == 'smoke'
    assert result['metrics']['test_accuracy']['n'] == 3


@pytest.mark.parametrize(
    'given',
    [
        dict(data='omniglot', protocol='drumond2020', select='last'),
        dict(data='omniglot', test_data='emnist', protocol='hypermaml2022'),
        pytest.param(
            dict(data='mini_imagenet', n_query=15),
            marks=pytest.mark.xdist_group('mini_imagenet'),  # the bank that test_data builds
        ),
    ],
    ids=['omniglot-drumond2020', 'omniglot-hypermaml2022', 'mini_imagenet-antoniou2018'],
)
def test_train_notebook_of_each_protocol(tmp_path, real_data, given):
    "Each protocol on its data, as the papers pair them."
    result = run_here(TRAIN, SMALL | given, tmp_path)
    assert result['metrics']['test_accuracy']['n'] == 3


@pytest.mark.parametrize(
    'given,words',
    [
        (dict(method='mamal'), "method='mamal': choose one of 'maml'"),
        (dict(schedule='cos'), "schedule='cos'"),
        (dict(norm='per_step', test_steps=3), 'test_steps=3, but this learner takes at most 1'),
        (dict(method='hypermaml', test_steps=2), 'test_steps=2, but this learner takes at most 1'),
        (dict(test_ways=[7]), 'test_ways=.7., but maml is bound to 5 ways'),
        (dict(method='hidra', test_ways=[5000]), 'n_way=5000, but'),
        (dict(method='hidra', train_ways=[5]), 'train_ways=.5.: the fewest and the most'),
        (
            dict(method='hypermaml', switch_epochs=[50, 500, 300]),
            'the switch must end before the run',
        ),
        (dict(clip=1.0, clip_norm=1.0), 'choose one'),
        (dict(data='emnist'), 'emnist has no train classes'),
        (dict(data='nowhere'), "data='nowhere'"),
    ],
)
def test_train_notebook_refuses_before_it_trains(given, words):
    "Its cells in this process: a kernel for each would say the same."
    names = {}
    with pytest.raises(ValueError, match=words):
        for source in cells_of(TRAIN, SMALL | given):
            assert 'fit(' not in source, 'it comes to the training'
            exec(source, names)


# ---- a run that is interrupted
QUIET = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


LONG_ENOUGH = dict(  # to be killed in its middle
    iterations=40, valid_every=5, valid_tasks=4, test_tasks=10, filters=8, meta_batch=2
)


def train_command(folder, name):
    code = 'import sys; from fewshotmeta.lab.command import main; sys.exit(main())'
    place = ['--runs', str(folder), '--name', f'x/{name}']
    given = [f'{k}={v}' for k, v in LONG_ENOUGH.items()]
    return [sys.executable, '-c', code, 'run', str(TRAIN), *place, '-p', *given]


def kill_at(iteration, command, folder):
    "Start a training and kill it, and its kernel, once its checkpoint has come to `iteration`."
    process = subprocess.Popen(command, start_new_session=True, **QUIET)
    end = time.time() + 120
    while reached(folder) < iteration and time.time() < end:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pid in kernels_of(folder):
        os.kill(pid, signal.SIGKILL)


def reached(folder):
    "The iteration of a run's checkpoint; -1: there is none."
    if not (folder / 'checkpoint.safetensors').exists():
        return -1
    return read_checkpoint(folder)[0]['iteration']


def kernels_of(folder):
    "The processes that execute a run, by their environment."
    if not Path('/proc').is_dir():
        return []
    pids = [int(name) for name in os.listdir('/proc') if name.isdigit()]
    return [pid for pid in pids if b'FEWSHOTMETA_RUN=' + str(folder).encode() in environ_of(pid)]


def environ_of(pid):
    try:
        return Path(f'/proc/{pid}/environ').read_bytes()
    except OSError:
        return b''


def left_by(folder, result):
    "A run's metrics but its time, the digest of its test tasks, and the tensors of its checkpoint."
    metrics = {k: v for k, v in result['metrics'].items() if k != 'training_seconds'}
    return metrics, result['episodes_digest'], read_checkpoint(folder)[0]['tensors']


def test_an_interrupted_experiment_continues(tmp_path):
    """Killed with SIGKILL in the middle of training, started again: the same accuracies and
    checkpoint as undisturbed."""
    whole, killed = tmp_path / 'whole', tmp_path / 'x' / 'killed'
    undisturbed = left_by(whole, run_here(TRAIN, LONG_ENOUGH, whole))
    kill_at(10, train_command(tmp_path, 'killed'), killed)
    assert not (killed / 'result.json').exists()
    assert 10 <= reached(killed) < 40
    subprocess.run(train_command(tmp_path, 'killed'), check=True, capture_output=True)
    assert left_by(killed, read_json(killed / 'result.json')) == undisturbed


@pytest.mark.parametrize(
    'change, said',
    [
        (dict(metrics={}), 'has no metric'),
        (dict(metrics=dict(a=3)), 'metrics has a=3: expected dict'),
        (dict(metrics=dict(a=dict(mean='high', n=1))), "a has mean='high': expected float"),
        (dict(metrics=dict(a=dict(mean=0.5))), 'a has no n: expected int'),
        (dict(resumed_with=[3]), 'resumed_with 0=3: expected dict'),
        (dict(resumed_with=[{}, dict(digest=3)]), 'resumed_with 1 has digest=3: expected dict'),
    ],
)
def test_a_result_without_what_it_must_have_is_refused(change, said, tmp_path):
    result = read_json(ROOT / 'runs/hidra_t2/maml_2way_short_seed0/result.json')
    folder = tmp_path / 'here' / 'this'
    write_json(folder / 'result.json', result)
    found = read_result(folder)
    assert (found['experiment'], found['run']) == ('here', 'this')  # as its folder is called
    assert found['metrics'] == result['metrics']
    write_json(folder / 'result.json', result | change)
    with pytest.raises(BadFile, match=re.escape(said)):
        read_result(folder)


MAY_LACK = 'scale notebook seconds finished digest versions commit dirty device resumed_with'
OR_NONE = dict.fromkeys('scale digest versions commit dirty device resumed_with'.split())


def test_a_result_may_lack_what_is_said_of_its_making(tmp_path):
    "Lacking or None; what is always asked for has a value."
    whole = read_json(ROOT / 'runs/hidra_t2/maml_2way_short_seed0/result.json')
    least = {k: v for k, v in whole.items() if k not in MAY_LACK.split()}
    least['metrics'] = dict(a=dict(mean=0.5, n=1))
    more = OR_NONE | dict(resumed_with=[{}, dict(digest=None)])
    for result in least, least | OR_NONE, least | more:
        write_json(tmp_path / 'result.json', result)
        found = read_result(tmp_path)
        asked = [found[name] for name in ('scale', 'notebook', 'seconds', 'finished')]
        assert asked == [None, '', 0.0, '']
        assert found['metrics'] == dict(a=dict(mean=0.5, ci95=None, n=1))


# ---- results that are in git
def test_committed_results_are_whole():
    "Each result under runs/ has its executed notebook, a scale, and the parameters injected."
    for path in (ROOT / 'runs').glob('*/*/result.json'):
        result, nb = read_json(path), nbformat.read(path.parent / 'notebook.ipynb', 4)
        assert result['scale'] in SCALES
        given = injected_into(nb)
        assert all(result['params'][k] == v for k, v in given.items())
        data = [o.get('data', {}) for c in nb.cells for o in c.get('outputs', [])]
        reported = [d[RESULT_TYPE]['metrics'] for d in data if RESULT_TYPE in d]
        assert reported == [result['metrics']]


def injected_into(nb):
    "The parameters that papermill gave an executed notebook."
    cells = [c.source for c in nb.cells if 'injected-parameters' in c.metadata.get('tags', [])]
    scope = {}
    exec(cells[0] if cells else '', scope)
    return {k: v for k, v in scope.items() if not k.startswith('__')}


# ---- what a notebook's own cells do to a run
@pytest.mark.parametrize('exit', ['import sys\nsys.exit(0)', 'exit()'])
def test_a_cell_that_exits_says_where_the_notebook_stopped(tmp_path, exit):
    nb = notebook(tmp_path, PARAMETERS, exit, REPORT)
    with pytest.raises(RunFailed) as failed:
        run(nb)
    last = exit.splitlines()[-1]
    assert failed.value.kind == 'report'
    assert f'exp.ipynb stopped in cell In [2] of failed.ipynb, which ends {last!r}' in str(
        failed.value
    )
    assert 'failed.ipynb' in files(nb)


def test_a_cell_that_exits_behind_its_report_has_a_result(tmp_path):
    nb = notebook(tmp_path, PARAMETERS, REPORT, 'exit()', 'raise RuntimeError("too late")')
    assert run(nb)['metrics']['square']['mean'] == 4


def test_a_limit_makes_no_noise(tmp_path, capfd):
    "Its message is all that is said: no traceback of a socket, no warning of the kernel."
    nb = notebook(tmp_path, PARAMETERS, 'import time\ntime.sleep(60)', REPORT)
    with pytest.raises(RunFailed, match='exp.ipynb ran longer than its limit of 0.06 minutes'):
        run(nb, limit=0.06)  # the kernel has begun the cell by then
    time.sleep(0.5)  # for what a kernel says at its end
    assert ''.join(capfd.readouterr()) == ''
    assert files(nb) == ['failed.ipynb', 'failed.json']


BARS = """from tqdm import tqdm
import sys
for _ in tqdm(range(30), mininterval=0):
    pass
from tqdm.auto import tqdm as auto
for _ in auto(range(30), mininterval=0, file=sys.stdout):
    pass
print("between")
for _ in auto(range(3), mininterval=0, leave=False):
    print("a line")
"""


def test_an_executed_notebook_keeps_one_state_of_a_bar(tmp_path, record):
    nb = notebook(tmp_path, PARAMETERS, BARS, REPORT)
    run(nb)
    cell = nbformat.read(folder_of(nb) / 'notebook.ipynb', 4).cells[1]
    said = {name: '' for name in ('stdout', 'stderr')}
    for output in cell.outputs:
        if 'name' in output:
            said[output.name] += output.text
    assert '\r' not in ''.join(said.values())
    assert said['stderr'].count('30/30') == 1 and 'it/s' in said['stderr']
    assert '1/30' not in said['stderr'].replace('30/30', '')
    assert said['stdout'].endswith('between\na line\na line\na line\n')
    record('progress bars in the output of a run: one state is kept', tries=3, survived=3)


def shown(*pieces):
    outputs = [dict(output_type='stream', name='stderr', text=text) for text in pieces]
    return [output['text'] for output in _last_states(outputs)]


@pytest.mark.parametrize(
    'pieces,kept',
    [
        (('a\n', 'b\n'), ['a\n', 'b\n']),
        (('\r 0%', '\r50%', '\r100%', '\n'), ['100%\n']),
        (('0%\r50%\r', '100%\n', 'end\n'), ['100%\n', 'end\n']),
        (('\r50%', '\r     ', '\rdone\n'), ['done\n']),
        (('\r50%', '\r     \r',), []),
        (('outer\n', 'inner 1', '\x1b[A\router 2\n', '\rinner 2\n'), ['outer 2\n', 'inner 2\n']),
        (('windows\r\n', 'lines\r\n'), ['windows\n', 'lines\n']),
    ],
)
def test_a_stream_is_kept_as_a_terminal_shows_it(pieces, kept, record):
    assert ''.join(shown(*pieces)) == ''.join(kept)
    assert '' not in shown(*pieces)
    record('progress bars in the output of a run: one state is kept', tries=1, survived=1)


def test_committed_notebooks_keep_one_state_of_a_bar():
    for path in (ROOT / 'runs').glob('*/*/notebook.ipynb'):
        for cell in json.loads(path.read_text(encoding='utf-8'))['cells']:
            for output in cell.get('outputs', []):
                text = ''.join(output.get('text', ''))
                assert '\r' not in text and '\x1b[A' not in text, path


def test_a_full_disk_names_the_notebook(small_disk, record):
    "That papermill writes, and nothing of it stays; with less to write, the run is whole."
    sizes, refused = range(400_000, 40_000, -40_000 if full() else -160_000), 0
    for size in sizes:
        nb = notebook(small_disk / str(size), PARAMETERS, f'print("x" * {size})', REPORT)
        try:
            assert run(nb)['metrics']['square']['mean'] == 4
            assert read_json(folder_of(nb) / 'result.json')
        except OSError as e:
            assert re.search('no space left to write .*: free some, or choose another', str(e))
            refused += 1
        assert not list(small_disk.rglob('*.partial*'))
        shutil.rmtree(nb.parent)
    assert 0 < refused < len(sizes)
    what = 'disk full while papermill writes a notebook: refused by name, or a whole run'
    record(what, tries=len(sizes), survived=len(sizes), refused_by_name=refused)


ENCODINGS = ['ascii', 'cp1252']
if full():
    ENCODINGS += ['cp437', 'koi8-r', 'shift_jis', 'big5', 'iso8859-2', 'mac_roman']


@pytest.mark.parametrize('encoding', ENCODINGS)
def test_a_terminal_that_lacks_characters_costs_no_run(tmp_path, encoding, record):
    nb = notebook(tmp_path, PARAMETERS, 'print("✓ ± θ")', REPORT)
    code = 'import sys; from fewshotmeta.lab.command import main; sys.exit(main())'
    args = ['run', nb, '--name', 'demo/one', '--runs', tmp_path / 'runs']
    env = os.environ | dict(PYTHONIOENCODING=encoding)
    done = subprocess.run([sys.executable, '-c', code, *args], capture_output=True, env=env)
    assert done.returncode == 0, done.stderr
    assert b'square' in done.stdout
    record('terminals that lack characters, of runs that print them', tries=1, survived=1)
