"""Batches: real papermill, real kernels, real workers; whatever dies, every run is made once."""

import contextlib, io, os, signal, subprocess, sys, time
from pathlib import Path
import nbformat, pytest, yaml
from conftest import ROOT, full
from fewshotmeta.all import *
from fewshotmeta.lab.workers import todo
from fewshotmeta.lab.states import View
from fewshotmeta.all import *

PARAMETERS = 'x = 1\nlr = 0.1\nsteps = 100\nname = "a"\nseed = 0\nscale = "smoke"'
# leaves a line for every execution, then does what it is told
CELLS = (
    'import os, signal, time\nfrom fewshotmeta.lab.execution import report, run_folder\nwith open(os.environ["TRACES"], "a") as f: print(run_folder().name, os.getpid(), os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ.get("FEWSHOTMETA_WORKERS"), file=f)',
    'if name == "raise": raise KeyError("gone")\nif name == "hang":\n    while True: time.sleep(1)\nif name == "die": os.kill(os.getpid(), signal.SIGKILL)\nif name == "memory":\n    import torch; raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")',
    'report(square=dict(mean=x*x, ci95=None, n=1))',
)


@pytest.fixture
def batch(tmp_path, monkeypatch):
    "`batch(runs, …)` writes an experiment and its YAML, and returns the YAML's path."
    monkeypatch.setenv('TRACES', str(tmp_path / 'traces'))

    def make(runs, cells=CELLS, parameters=PARAMETERS, **doc):
        nb = nbformat.v4.new_notebook(
            metadata={'kernelspec': {'name': 'python3', 'display_name': 'python3'}},
            cells=[nbformat.v4.new_code_cell(s) for s in (parameters, *cells)],
        )
        nb.cells[0].metadata['tags'] = ['parameters']
        nbformat.write(nb, tmp_path / 'exp.ipynb')
        (tmp_path / 'table.yaml').write_text(
            yaml.dump(dict(experiment='exp.ipynb', runs=runs) | doc, sort_keys=False)
        )
        return tmp_path / 'table.yaml'

    return make


def planned(path, scale='', **kw):
    return read_batch(path, scale, runs=path.parent / 'runs', **kw)


def kinds(path):
    return {p.slug: state_of(p).kind for p in planned(path)}


def traces(path):
    return [l.split()[0] for l in (path.parent / 'traces').read_text().splitlines()]


def command(*args):
    return [sys.executable, '-m', 'fewshotmeta.lab.command', *map(str, args)]


def heedful():
    "Run in a child before it starts: a shell's background job ignores Ctrl-C, and its children inherit that."
    for s in (signal.SIGINT, signal.SIGHUP):
        signal.signal(s, signal.SIG_DFL)


def fewshotmeta(*args, **kw):
    return subprocess.run(command(*args), capture_output=True, text=True, **kw)


# ---- the file
def test_order_of_changes(batch):
    path = batch(
        dict(a=dict(x=2, steps=50, seed=[3, 4], scales=dict(short=dict(lr=1))), b={}),
        common=dict(lr='1e-2', steps=200),
        scales=dict(smoke=dict(steps=1), short=dict(steps='0.5x', name='s'), paper={}),
    )
    short = planned(path)
    assert [p.slug for p in short] == ['a_short_seed3', 'a_short_seed4', 'b_short']
    assert short[0].params == dict(
        x=2, lr=1.0, steps=25, name='s', seed=3, scale='short'
    ) and short[2].params == dict(x=1, lr=0.01, steps=100, name='s', seed=0, scale='short')
    assert [p.params['steps'] for p in planned(path, 'smoke')] == [1, 1, 1] and [
        p.params['steps'] for p in planned(path, 'paper')
    ] == [50, 50, 200]
    assert (
        [p.slug for p in planned(path, only='*seed4')] == ['a_short_seed4']
        and short[0].name == 'table/a_short_seed3'
        and short[0].folder == path.parent / 'runs' / 'table' / 'a_short_seed3'
    )
    assert (
        planned(batch(dict(a=dict(steps='.001x'))), 'smoke')[0].params['steps'] == 1
    )  # never less than one
    path = batch(dict(a={}, b=dict(scales=dict(short=False))), scales=dict(short={}, paper={}))
    assert [p.slug for p in planned(path)] == ['a_short'] and [
        p.slug for p in planned(path, 'paper')
    ] == ['a_paper', 'b_paper']  # left out of one scale
    with pytest.raises(BadBatch, match='b: scales: short: expected .name: value. lines, not True'):
        planned(batch(dict(b=dict(scales=dict(short=True))), scales=dict(short={})))


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
            "no entry 'big': choose one of smoke, short, paper",
        ),
        (dict(a=dict(scales=dict(long={}))), {}, "no entry 'long'"),
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


def test_text_that_is_no_batch(batch, tmp_path):
    batch(dict(a={}))
    for text, words in [
        ('experiment: exp.ipynb\nruns: {a: {x: 1}, a: {x: 2}}', "'a' stands there twice"),
        ('a: [', 'is not YAML'),
        ('', "experiment=None"),
        ('- a', 'expected `name: value`'),
        ('runs: !!python/object/apply:os.system ["touch pwned"]', 'is not YAML'),
        ('a: *b', 'is not YAML'),
        ('experiment: exp.ipynb\nruns:\n  a: {x: 2001-01-01}', 'expected int'),
        ('? [1, 2]\n: 3', 'is not YAML'),
    ]:
        (tmp_path / 'bad.yaml').write_text(text)
        with pytest.raises(BadBatch, match=words):
            read_batch(tmp_path / 'bad.yaml')
    with pytest.raises(BadBatch, match='cannot be read'):
        read_batch(tmp_path / 'none.yaml')
    with pytest.raises(BadBatch, match="no run matches 'z'; there are a_smoke"):
        read_batch(tmp_path / 'table.yaml', only='z')
    with pytest.raises(BadBatch, match="no scale 'paper': choose one of smoke"):
        read_batch(tmp_path / 'table.yaml', 'paper')


def test_options(monkeypatch):
    for bad, words in [
        (dict(jobs=-1), 'jobs=-1'),
        (dict(executor='ssh'), "executor='ssh': choose local or slurm"),
        (dict(executor='slurm', slurm=dict(time='2:00:00')), 'a whole number of minutes'),
        (dict(executor='slurm', gpus=(0,)), 'gpus_per_node=1'),
        (dict(limit=-1), 'limit=-1'),
        (dict(slurm=dict(time=3)), 'executor=slurm only'),
    ]:
        with pytest.raises(ValueError, match=words):
            Options(**bad)
    monkeypatch.setenv('PATH', '')
    with pytest.raises(ValueError, match='there is no sbatch here'):
        Options(executor='slurm')


# ---- a batch
def test_a_batch_from_the_command_line(batch):
    path = batch(
        dict(one=dict(x=1, seed=[0, 1]), two=dict(x=2), bad=dict(name='raise')),
        scales=dict(smoke={}),
    )
    args = (path, '--runs', path.parent / 'runs')
    dry = fewshotmeta('batch', *args, '--dry-run')
    assert (
        dry.returncode == 0
        and 'table/two_smoke' in dry.stdout
        and '4 of 4 runs would be executed' in dry.stdout
        and not (path.parent / 'runs').exists()
    )
    out = fewshotmeta('batch', *args, '--jobs', '2')
    assert (
        out.returncode == 1
        and '4 runs: 3 done, 1 failed' in out.stdout
        and "KeyError: 'gone'" in out.stdout
        and 'Traceback' not in out.stdout + out.stderr
    ), out.stderr
    assert kinds(path) == dict(
        one_smoke_seed0='done', one_smoke_seed1='done', two_smoke='done', bad_smoke='failed'
    )
    failed = read_json(path.parent / 'runs' / 'table' / 'bad_smoke' / 'failed.json')
    assert (
        failed['kind'] == 'raised'
        and 'raise KeyError("gone")' in failed['traceback']
        and (path.parent / 'runs' / 'table' / 'bad_smoke' / 'failed.ipynb').is_file()
    )
    assert sorted(traces(path)) == ['bad_smoke', 'one_smoke_seed0', 'one_smoke_seed1', 'two_smoke']
    lines = (path.parent / 'traces').read_text().splitlines()
    cores = len(os.sched_getaffinity(0))
    assert all(l.split()[3] == str(max(1, cores // 2)) for l in lines)  # threads are divided
    assert (
        fewshotmeta('batch', *args).returncode == 1 and len(traces(path)) == 5
    )  # only the failed one is tried again
    batch(
        dict(one=dict(x=1, seed=[0, 1]), two=dict(x=2), bad=dict(name='fine')),
        scales=dict(smoke={}),
    )
    out = fewshotmeta('batch', *args)
    assert out.returncode == 0 and kinds(path)['bad_smoke'] == 'done' and len(traces(path)) == 6
    assert (
        len(list((path.parent / 'runs' / '.jobs').iterdir())) == 2
    )  # logs are kept where something failed
    status = fewshotmeta('status', path, '--runs', path.parent / 'runs')
    assert (
        status.returncode == 0
        and '4 runs: 4 done' in status.stdout
        and 'square 4.0000' in status.stdout
    )
    csv = fewshotmeta(
        'results', 'table/*', '--runs', path.parent / 'runs', '--out', path.parent / 't.csv'
    )
    assert csv.returncode == 0 and len((path.parent / 't.csv').read_text().splitlines()) == 5


def test_states(batch):
    path = batch(dict(a=dict(x=3)))
    (p,) = planned(path)
    assert state_of(p).kind == 'waiting' and todo([p], Options()) == {p: 'new'}
    run_notebook(p.notebook, p.given, p.name, p.runs, quiet=True)
    assert (
        state_of(p).kind == 'done'
        and todo([p], Options()) == {}
        and todo([p], Options(force=True)) == {p: 'again'}
    )
    batch(
        dict(a=dict(x=3)),
        cells=CELLS[:2] + ('y = x*x\nreport(square=dict(mean=y, ci95=None, n=1))',),
    )
    (p,) = planned(path)
    s = state_of(p)
    assert (
        s.kind == 'done, other code'
        and s.note == 'another version of the notebook'
        and todo([p], Options()) == {}
        and 'again' in todo([p], Options(stale=True))[p]
    )
    batch(
        dict(a=dict(x=3)), cells=CELLS[:2] + ('# a comment\n\n' + CELLS[2],)
    )  # comments and empty lines do not count
    assert state_of(planned(path)[0]).kind == 'done'
    batch(dict(a=dict(x=4)))
    (p,) = planned(path)
    assert (
        state_of(p).kind == 'changed'
        and 'another x' in state_of(p).note
        and todo([p], Options()) == {}
    )
    assert {s.kind for s in run_batch([p], Options()).values()} == {'changed'} and len(
        traces(path)
    ) == 1
    assert {s.kind for s in run_batch([p], Options(force=True)).values()} == {'done'} and read_json(
        p.folder / 'result.json'
    )['metrics']['square']['mean'] == 16
    batch(
        dict(a=dict(x=4)), parameters=PARAMETERS + '\nnew = True'
    )  # a parameter that the notebook has got since
    assert (
        state_of(planned(path)[0]).kind == 'done, other code'
        and state_of(
            planned(batch(dict(a=dict(x=4, new=True)), parameters=PARAMETERS + '\nnew = True'))[0]
        ).kind
        == 'changed'
    )
    (p,) = planned(batch(dict(a=dict(x=4))))
    (p.folder / 'result.json').write_text('{}')
    assert state_of(p).kind == 'broken' and {
        s.kind for s in run_batch([p], Options()).values()
    } == {'done'}
    (p.folder / 'result.json').unlink()
    (p.folder / 'checkpoint.safetensors').write_text('')
    assert state_of(p).kind == 'stopped' and state_of(p).note == ''


def test_what_fails_is_recorded_and_the_others_finish(batch, record):
    "A notebook that raises, one that hangs, one whose kernel is killed, one whose GPU has no memory left; and one whose folder cannot be written."
    path = batch(
        dict(
            good=dict(seed=[0, 1, 2]),
            raises=dict(name='raise'),
            hangs=dict(name='hang'),
            dies=dict(name='die'),
            memory=dict(name='memory'),
            nowhere={},
        )
    )
    (path.parent / 'runs' / 'table').mkdir(parents=True)
    (path.parent / 'runs' / 'table' / 'nowhere_smoke').write_text(
        'a file where the folder should be'
    )
    states = {p.slug: s for p, s in run_batch(planned(path), Options(jobs=2, limit=0.4)).items()}
    assert all(states[f'good_smoke_seed{i}'].kind == 'done' for i in range(3))
    for name, words in dict(
        raises="raised: exp.ipynb raised KeyError: 'gone'",
        hangs='time limit: exp.ipynb ran longer than its limit of 0.4 minutes',
        dies='killed: ',
        memory='raised: exp.ipynb raised OutOfMemoryError: CUDA out of memory',
    ).items():
        s = states[f'{name}_smoke']
        assert s.kind == 'failed' and s.note.startswith(words), s
    assert states['nowhere_smoke'].kind == 'failed' and 'irectory' in states['nowhere_smoke'].note
    record(
        'a notebook that raises, hangs, is killed, runs out of GPU memory, or cannot write, beside three good ones',
        failures=5,
        recorded=sum(s.kind == 'failed' for s in states.values()),
        others_finished=sum(s.kind == 'done' for s in states.values()),
    )


def test_killed_by_the_system_for_memory(batch, record):
    "A real limit of the kernel's memory (a control group), and the system's own killer."
    group = Path('/sys/fs/cgroup') / f'fewshotmeta-test-{os.getpid()}'
    root = Path('/sys/fs/cgroup') / 'memory' / f'fewshotmeta-test-{os.getpid()}'
    try:
        place = root if (Path('/sys/fs/cgroup') / 'memory').is_dir() else group
        place.mkdir()
        (place / ('memory.limit_in_bytes' if place == root else 'memory.max')).write_text(
            str(300_000_000)
        )
        (place / 'memory.swap.max').write_text('0') if (
            place / 'memory.swap.max'
        ).exists() else None
    except OSError as e:
        pytest.skip(f'no control groups for memory here: {e}')
    try:
        path = batch(
            dict(big=dict(name='big'), small={}),
            cells=(
                f'import os\nif name == "big":\n    open("{place}/cgroup.procs", "w").write(str(os.getpid()))\n    hog = [bytearray(50_000_000) for _ in range(20)]',
                'from fewshotmeta.lab.execution import report\nreport(a=1)',
            ),
        )
        states = {p.slug: s for p, s in run_batch(planned(path), Options()).items()}
        events = (
            (place / 'memory.events').read_text()
            if (place / 'memory.events').exists()
            else (place / 'memory.oom_control').read_text()
        )
        assert (
            states['big_smoke'].kind == 'failed'
            and states['big_smoke'].note.startswith('killed')
            and states['small_smoke'].kind == 'done'
        ), states
        assert any(l.split()[0] == 'oom_kill' and int(l.split()[1]) for l in events.splitlines())
        record(
            'kernel killed by the system for memory, beside a good one',
            failures=1,
            recorded=1,
            others_finished=1,
        )
    finally:
        place.rmdir()


def test_gpus_are_divided(batch):
    path = batch(dict(a=dict(seed=[0, 1, 2, 3])))
    run_batch(planned(path), Options(gpus=(2, 5)))
    assert {l.split()[2] for l in (path.parent / 'traces').read_text().splitlines()} == {'2', '5'}
    run_batch(planned(path), Options(force=True))
    assert (path.parent / 'traces').read_text().splitlines()[-1].split()[
        2
    ] == 'None'  # without --gpus: as the machine has it


SLOW = (CELLS[0], 'time.sleep(1.5)', CELLS[2])


def test_a_failure_without_words_and_one_after_a_result(batch):
    "An exception may have no message; a failure counts if it is younger than the result."
    from fewshotmeta.lab.workers import record_failure

    path = batch(dict(a={}))
    (p,) = planned(path)
    run_notebook(p.notebook, p.given, p.name, p.runs, quiet=True)
    record_failure(p, 'MemoryError', '')
    assert state_of(p).kind == 'failed' and state_of(p).note == 'MemoryError: '
    assert (
        run_batch([p], Options())[p].kind == 'done' and len(traces(path)) == 1
    )  # the result is good: nothing to execute


def test_forced_runs_are_made_once_each(batch):
    path = batch(dict(a=dict(seed=[0, 1, 2])))
    run_batch(planned(path), Options(jobs=2))
    assert all(
        s.kind == 'done' for s in run_batch(planned(path), Options(jobs=2, force=True)).values()
    )
    assert sorted(traces(path)) == sorted(f'a_smoke_seed{i}' for i in range(3) for _ in range(2))


def test_a_forced_run_that_cannot_be_made_is_not_called_done(batch, tmp_path):
    path = batch(dict(a={}, b={}))
    run_batch(planned(path), Options())
    batch(dict(a={}, b={}), cells=('1/0',))
    states = run_batch(planned(path), Options(force=True))
    assert [s.kind for s in states.values()] == ['failed', 'failed'] and not list(
        (tmp_path / 'runs' / 'table').glob('*/result.json')
    )


def test_several_batches_at_once(batch, record):
    "Batches over the same file, started together: each run is executed once, and each batch says that all are done."
    path, n = batch(dict(a=dict(seed=list(range(6)))), cells=SLOW), 8 if full() else 3
    all_ = [
        subprocess.Popen(
            command('batch', path, '--runs', path.parent / 'runs'),
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(n)
    ]
    said = [p.communicate(timeout=300)[0] for p in all_]
    assert all(p.returncode == 0 for p in all_) and all('6 runs: 6 done' in s for s in said), said
    assert sorted(traces(path)) == sorted(f'a_smoke_seed{i}' for i in range(6))
    record('batches over the same file at once', batches=n, runs=6, executed_once=6)


def processes_of(path):
    "Kernels and workers that have something to do with a folder."
    out = []
    for d in filter(str.isdigit, os.listdir('/proc')):
        try:
            text = Path(f'/proc/{d}/environ').read_bytes() + Path(f'/proc/{d}/cmdline').read_bytes()
        except OSError:
            continue
        if str(path).encode() in text and int(d) != os.getpid():
            out.append(int(d))
    return out


@pytest.mark.skipif(not Path('/proc').is_dir(), reason='needs /proc')
@pytest.mark.parametrize(
    'sig', [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda s: s.name
)
def test_stopped_cleanly(batch, tmp_path, sig):
    "Ctrl-C, SIGTERM, a closed terminal: exit code 130, no process is left, and the same command finishes the rest."
    path = batch(dict(a=dict(seed=[0, 1, 2])), cells=SLOW)
    p = subprocess.Popen(
        command('batch', path, '--runs', tmp_path / 'runs', '--jobs', '2'),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=heedful,
    )
    until(lambda: (tmp_path / 'traces').exists() and len(traces(path)) == 2)
    p.send_signal(sig) if sig == signal.SIGTERM else os.killpg(
        p.pid, sig
    )  # what a terminal says reaches them all
    out, err = p.communicate(timeout=60)
    assert p.returncode == 130 and 'interrupted' in err and 'Traceback' not in err, err
    until(lambda: not processes_of(tmp_path / 'runs'), 10)
    out = fewshotmeta('batch', path, '--runs', tmp_path / 'runs', '--jobs', '2')
    assert out.returncode == 0 and '3 runs: 3 done' in out.stdout


def until(f, seconds=120):
    end = time.monotonic() + seconds
    while not f():
        assert time.monotonic() < end, 'waited in vain'
        time.sleep(0.05)


@pytest.mark.skipif(not Path('/proc').is_dir(), reason='needs /proc')
def test_workers_of_a_killed_batch_finish_their_run_and_end(batch, tmp_path):
    "And the next batch waits for that run, instead of starting more than it may."
    path = batch(dict(a=dict(seed=[0, 1, 2])), cells=SLOW)
    p = subprocess.Popen(
        command('batch', path, '--runs', tmp_path / 'runs'), stdout=subprocess.PIPE, text=True
    )
    until(lambda: (tmp_path / 'traces').exists())
    p.kill()
    p.communicate()
    out = fewshotmeta('batch', path, '--runs', tmp_path / 'runs')
    assert out.returncode == 0 and traces(path) == [f'a_smoke_seed{i}' for i in range(3)], (
        out.stdout + out.stderr
    )


def test_nohup_is_heeded(batch, tmp_path):
    "Where SIGHUP is ignored, as nohup does, it stays ignored."
    path = batch(dict(a={}), cells=SLOW)
    p = subprocess.Popen(
        ['nohup', *command('batch', path, '--runs', tmp_path / 'runs')],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    until(lambda: (tmp_path / 'traces').exists())
    os.killpg(p.pid, signal.SIGHUP)
    assert '1 runs: 1 done' in p.communicate(timeout=60)[0] and p.returncode == 0


@pytest.mark.skipif(not Path('/proc').is_dir(), reason='needs /proc')
def test_a_killed_worker_is_replaced_and_its_kernel_does_not_stay(batch, tmp_path):
    path = batch(dict(a=dict(seed=[0, 1])), cells=SLOW)
    p = subprocess.Popen(
        command('batch', path, '--runs', tmp_path / 'runs'), stdout=subprocess.PIPE, text=True
    )
    until(lambda: (tmp_path / 'traces').exists())
    kernel = int((tmp_path / 'traces').read_text().split()[1])
    os.kill(read_marker(tmp_path / 'runs', 'table', 'a_smoke_seed0')['pid'], signal.SIGKILL)
    until(lambda: not Path(f'/proc/{kernel}').exists(), 15)
    assert '2 runs: 2 done' in p.communicate(timeout=120)[0] and p.returncode == 0
    assert traces(path) == ['a_smoke_seed0', 'a_smoke_seed0', 'a_smoke_seed1']


def test_a_run_that_takes_every_worker_with_it_is_given_up(batch, tmp_path):
    path = batch(
        dict(a={}, b={}),
        cells=(
            CELLS[0],
            'if run_folder().name == "a_smoke": os.kill(os.getppid(), signal.SIGKILL); time.sleep(60)',
            CELLS[2],
        ),
    )
    states = {p.slug: s for p, s in run_batch(planned(path), Options()).items()}
    assert (
        states['a_smoke'].kind == 'failed'
        and 'three workers died in it' in states['a_smoke'].note
        and states['b_smoke'].kind == 'done'
    )
    assert sorted(traces(path)) == ['a_smoke'] * 3 + ['b_smoke']


def test_workers_that_cannot_start_end_the_batch(batch, monkeypatch):
    path = batch(dict(a={}))
    monkeypatch.setenv('PYTHONSTARTUP', '')
    monkeypatch.setenv('PYTHONPATH', str(path.parent))
    (path.parent / 'cloudpickle.py').write_text('raise ImportError("no luck")')
    with pytest.raises(
        ChildProcessError, match='workers end without executing anything; the last one says'
    ):
        run_batch(planned(path), Options())


def test_the_runner_refuses_what_another_executes(batch, tmp_path):
    path = batch(dict(a={}), cells=SLOW)
    (p,) = planned(path)
    other = subprocess.Popen(
        command('run', p.notebook, '--runs', p.runs, '--name', p.name),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    until(lambda: (tmp_path / 'traces').exists())
    s = state_of(p)
    assert s.kind == 'running' and s.who['pid'] == other.pid
    with pytest.raises(
        RunBusy, match=f'table/a_smoke is being executed by another process .process {other.pid} on'
    ):
        run_notebook(p.notebook, p.given, p.name, p.runs, quiet=True)
    assert (
        run_batch([p], Options())[p].kind == 'done'
        and other.wait(60) == 0
        and traces(path) == ['a_smoke']
    )  # watched, not executed again


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


def training(tmp_path, methods):
    (tmp_path / 'nbs').mkdir(exist_ok=True)
    (tmp_path / 'nbs' / 'train.ipynb').write_bytes(
        (ROOT / 'nbs' / 'experiments' / 'train.ipynb').read_bytes()
    )
    (tmp_path / 'nbs' / 'all.yaml').write_text(
        yaml.dump(
            dict(
                experiment='train.ipynb',
                common=TRAIN,
                runs={m: METHODS[m] | dict(method=m) for m in methods},
                scales=dict(smoke={}),
            )
        )
    )
    return tmp_path / 'nbs' / 'all.yaml'


def outcome(folder):
    "What must be the same: the checkpoint's tensors, every metric but the time, the tasks."
    from fewshotmeta.training.checkpoints import read_checkpoint

    r = read_json(folder / 'result.json')
    return (
        read_checkpoint(folder)[0]['tensors'],
        {k: v for k, v in r['metrics'].items() if k != 'training_seconds'},
        r['episodes_digest'],
    )


@pytest.mark.skipif(not Path('/proc').is_dir(), reason='needs /proc')
def test_same_bytes_alone_beside_another_and_killed(tmp_path, record):
    "Each method: one at a time; two beside each other; and with batch, workers and kernels killed in the middle."
    import random

    rng, path = random.Random(0), training(tmp_path, METHODS if full() else ['maml', 'hypermaml'])

    def go(name, *args):
        return subprocess.Popen(
            command('batch', path, '--runs', tmp_path / name, *args),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    p = go('alone')
    out = p.communicate(timeout=900)
    assert p.returncode == 0, out
    if full():
        p = go('beside', '--jobs', '2')
        assert p.communicate(timeout=900) and p.returncode == 0
    kills, most, spread = 0, 12 if full() else 2, 6.0 if full() else 0.3
    while True:
        begun, p = time.time(), go('killed', '--jobs', '2')
        until(
            lambda: (
                p.poll() is not None
                or kills == most
                or any(
                    f.stat().st_mtime > begun
                    for f in (tmp_path / 'killed').glob('all/*/checkpoint.safetensors')
                )
            ),
            300,
        )  # some training has begun, however fast the machine
        with contextlib.suppress(subprocess.TimeoutExpired):
            p.wait(timeout=rng.uniform(0, spread) if kills < most else 900)
            break
        p.kill()
        kills += 1
        for pid in processes_of(tmp_path / 'killed'):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        p.communicate()
    assert p.returncode == 0 and kills, p.communicate()
    runs = sorted(f.parent.name for f in (tmp_path / 'alone').glob('all/*/result.json'))
    for name in ('beside', 'killed') if full() else ('killed',):
        for r in runs:
            assert outcome(tmp_path / 'alone' / 'all' / r) == outcome(
                tmp_path / name / 'all' / r
            ), (name, r)
    record(
        'same bytes: one at a time, two at a time, and killed (batch, workers and kernels at once)',
        methods=len(runs),
        kills=kills,
        identical=len(runs),
    )


# ---- what one sees
class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_view(batch, tmp_path):
    path = batch(dict(a=dict(x=2), b=dict(x=3)))
    a, b = planned(path)
    run_notebook(a.notebook, a.given, a.name, a.runs, quiet=True)
    write_json(
        b.folder / '.progress.json',
        dict(iteration=50, iterations=200, seconds=25.0, loss=1.25, accuracy=0.5, best=0.4567),
    )
    with locked(marker(b.runs, 'table', 'b_smoke', 'lock')):
        write_json(marker(b.runs, 'table', 'b_smoke'), dict(pid=7, host='node1', since=0.0))
        # the lock is our own here, so ask as another process would
        said = fewshotmeta('status', path, '--runs', tmp_path / 'runs').stdout
    assert 'table/a_smoke' in said and 'done   square 4.0000' in said
    assert (
        'running on node1, process 7   50/200   2.00 it/s   loss 1.250, accuracy 0.500, best val 0.4567   75 s left'
        in said
    ), said
    out = Terminal()
    view = View(out)
    for _ in range(2):
        view({p: state_of(p) for p in (a, b)})
    assert out.getvalue().count('\x1b[3A') == 1 and out.getvalue().endswith('\x1b[J')


def test_results(batch, tmp_path):
    path = batch(dict(a=dict(x=2), b=dict(x=3, seed=[0, 1])))
    run_batch(planned(path), Options(jobs=2))
    results, bad = all_results(tmp_path / 'runs')
    rows = table_of(results)
    assert (
        [r['run'] for r in rows] == ['a_smoke', 'b_smoke_seed0', 'b_smoke_seed1']
        and [r['mean'] for r in rows] == [4, 9, 9]
        and rows[2]['seed'] == 1
        and not bad
    )
    write_table(rows, tmp_path / 'r.parquet')
    write_table(rows, tmp_path / 'r.csv')
    import pandas as pd

    assert (
        pd.read_parquet(tmp_path / 'r.parquet')['mean'].tolist()
        == pd.read_csv(tmp_path / 'r.csv')['mean'].tolist()
        == [4, 9, 9]
    )
    with pytest.raises(ValueError, match='.csv or .parquet'):
        write_table(rows, tmp_path / 'r.xlsx')
    f = tmp_path / 'runs' / 'table' / 'a_smoke' / 'result.json'
    f.write_bytes(f.read_bytes().replace(b'4.0', b'5.0'))
    out = fewshotmeta('results', '--runs', tmp_path / 'runs')
    assert (
        out.returncode == 1
        and 'left out' in out.stderr
        and 'not what was stored' in out.stderr
        and len(out.stdout.splitlines()) == 2
    )
    over = fewshotmeta('status', '--runs', tmp_path / 'runs').stdout
    assert '2 results, 0 not finished, 1 files that are no whole results' in over
    assert fewshotmeta('status', '--runs', tmp_path / 'none').returncode == 2


def test_looking_on_needs_no_torch():
    code = 'import sys; from fewshotmeta.lab.command import main; main(["results", "--runs", sys.argv[1]]); print([m for m in ("torch", "papermill", "pandas", "submitit") if m in sys.modules])'
    out = subprocess.run(
        [sys.executable, '-c', code, str(ROOT / 'runs')], capture_output=True, text=True
    )
    assert out.stdout.splitlines()[-1] == '[]', out.stderr


# ---- the batch files that come with the experiments
BATCHES = sorted((ROOT / 'nbs' / 'experiments').glob('*.yaml'))


@pytest.mark.parametrize('path', BATCHES, ids=lambda p: p.stem)
def test_batch_files_can_be_read_at_every_scale(path):
    for scale in ('smoke', 'short', 'paper'):
        runs = read_batch(path, scale)
        assert len({p.slug for p in runs}) == len(runs) and all(
            p.params['scale'] == scale for p in runs
        )


@pytest.mark.parametrize('path', BATCHES, ids=lambda p: p.stem)
def test_smoke_of_every_batch_file(tmp_path, path):
    "`fewshotmeta batch FILE --scale smoke`: every table and figure can be made, on drawn characters."
    runs = run_batch(
        read_batch(path, 'smoke', runs=tmp_path), Options()
    )  # one at a time: `make test` runs two tests at a time
    assert {p.name: (s.kind, s.note) for p, s in runs.items() if s.kind != 'done'} == {}


@pytest.mark.parametrize('path', BATCHES, ids=lambda p: p.stem)
def test_committed_results_belong_to_their_batch_file(path):
    "What is in runs/ under a batch file's name is one of its runs, with its parameters."
    planned = {p.slug: p for scale in ('short', 'paper') for p in read_batch(path, scale)}
    for f in (ROOT / 'runs' / path.stem).glob('*/result.json'):
        if '_smoke' not in f.parent.name:
            assert state_of(planned[f.parent.name]).done, f
