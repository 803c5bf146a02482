"""The strict runner: real papermill, real kernels."""

import json, os, subprocess, sys
from pathlib import Path
import nbformat, pytest
from conftest import ROOT
from fewshotmeta.all import *
from fewshotmeta.lab.runs import default_name, merge_parameters, parse_value

REPORT = 'from fewshotmeta.lab.runs import report\nreport(square=dict(mean=x*x, ci95=None, n=1))'


def notebook(
    folder,
    parameters='x = 2  # a number\nname = "a"  # text\nrate = 0.5\nflags = [1, 2]\nmaybe = None\nscale = "smoke"',
    *cells,
    tag=True,
):
    folder.mkdir(parents=True, exist_ok=True)
    nb = nbformat.v4.new_notebook(
        metadata={'kernelspec': {'name': 'python3', 'display_name': 'python3'}},
        cells=[nbformat.v4.new_code_cell(s) for s in (parameters, *(cells or (REPORT,)))],
    )
    if tag:
        nb.cells[0].metadata['tags'] = ['parameters']
    nbformat.write(nb, folder / 'exp.ipynb')
    return folder / 'exp.ipynb'


def run(nb, given=None, name='demo/one', **kw):
    return run_notebook(nb, given, name, runs=nb.parent / 'runs', quiet=True, **kw)


def files(nb, *parts):
    return sorted(p.name for p in (nb.parent / 'runs').joinpath(*parts).iterdir())


# ---- parameters, before anything runs
def test_read_parameters(tmp_path):
    p = read_parameters(notebook(tmp_path))
    assert {k: v.default for k, v in p.items()} == dict(
        x=2, name='a', rate=0.5, flags=[1, 2], maybe=None, scale='smoke'
    ) and p['x'].meaning == 'a number'


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
    assert (
        parse_value(p['x'], '7'),
        parse_value(p['rate'], '1'),
        parse_value(p['name'], '7'),
        parse_value(p['flags'], '[3]'),
        parse_value(p['maybe'], 'none'),
        parse_value(p['maybe'], 'hello'),
    ) == (7, 1.0, '7', [3], None, 'hello')
    assert (
        merge_parameters(p, dict(rate=1))['rate'] == 1.0
        and type(merge_parameters(p, dict(rate=1))['rate']) is float
    )


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


def test_not_a_notebook_and_an_executed_one(tmp_path):
    (tmp_path / 'exp.ipynb').write_text('hello')
    with pytest.raises(BadParameters, match='exp.ipynb is not a notebook'):
        run(tmp_path / 'exp.ipynb')
    nb = notebook(tmp_path)
    run(nb, dict(x=3))
    with pytest.raises(BadParameters, match='was executed already'):
        run_notebook(tmp_path / 'runs' / 'demo' / 'one' / 'notebook.ipynb', runs=tmp_path / 'runs')
    other = nb.rename(tmp_path / 'other.ipynb')
    with pytest.raises(BadParameters, match='finished run of exp.ipynb'):
        run(other, dict(x=3))


def test_tuples_are_lists(tmp_path):
    nb = notebook(tmp_path, 'x = 2\nsteps = (1, 2)')
    run(nb)
    assert run(nb)['already']


def test_names(tmp_path):
    nb = notebook(tmp_path)
    for bad in ('../x', 'a/b/c', '/abs', 'a/..', '.', 'a b'):
        with pytest.raises(BadParameters, match='letters, digits|at most one'):
            run(nb, name=bad)
    assert (
        default_name(dict(n_way=20, data='x y')) == 'data=x-y_n_way=20'
        and default_name({}) == 'defaults'
    )


# ---- a run
def test_a_run_and_its_result(tmp_path):
    nb = notebook(tmp_path)
    result = run(nb, dict(x=3, rate=1))
    folder = tmp_path / 'runs' / 'demo' / 'one'
    assert (
        files(nb, 'demo', 'one') == ['notebook.ipynb', 'result.json']
        and read_json(folder / 'result.json') == result
    )
    assert result['metrics'] == dict(square=dict(mean=9.0, ci95=None, n=1)) and result[
        'params'
    ] == dict(x=3, name='a', rate=1.0, flags=[1, 2], maybe=None, scale='smoke')
    assert set(result) == {
        'experiment',
        'run',
        'notebook',
        'scale',
        'params',
        'metrics',
        'episodes_digest',
        'seconds',
        'device',
        'digest',
        'versions',
        'commit',
        'dirty',
        'started',
        'finished',
    }
    executed = nbformat.read(folder / 'notebook.ipynb', 4)
    assert (
        'injected-parameters' in executed.cells[1].metadata.tags
        and 'x = 3' in executed.cells[1].source
    )
    assert str(tmp_path) not in (folder / 'notebook.ipynb').read_text()


def test_done_other_force(tmp_path):
    nb = notebook(tmp_path)
    first = run(nb, dict(x=3))
    assert run(nb, dict(x=3))['already'] and run(nb, dict(x=3))['finished'] == first['finished']
    with pytest.raises(
        BadParameters, match='finished run with another x: choose another --name, or --force'
    ):
        run(nb, dict(x=4))
    assert run(nb, dict(x=4), force=True)['metrics']['square']['mean'] == 16
    (tmp_path / 'runs' / 'demo' / 'one' / 'result.json').write_text('{"params": ')
    with pytest.raises(BadParameters, match='result.json is not whole .*: run again with --force'):
        run(nb, dict(x=4))


def test_a_notebook_that_raises(tmp_path):
    nb = notebook(tmp_path, 'x = 1', 'raise KeyError("gone")')
    with pytest.raises(RunFailed, match="KeyError: 'gone'(?s:.*)failed.ipynb"):
        run(nb)
    failed = read_json(tmp_path / 'runs' / 'demo' / 'one' / 'failed.json')
    assert (
        files(nb, 'demo', 'one') == ['failed.ipynb', 'failed.json']
        and 'KeyError' in (tmp_path / 'runs' / 'demo' / 'one' / 'failed.ipynb').read_text()
    )
    assert (
        failed['kind'] == 'raised'
        and "KeyError: 'gone'" in failed['error']
        and 'raise KeyError("gone")' in failed['traceback']
    )
    good = notebook(tmp_path)
    run(good)
    assert files(good, 'demo', 'one') == ['notebook.ipynb', 'result.json']


def test_what_failed_since_is_left_to_who_saw_it(tmp_path):
    "A worker that looked before another's run failed, and got its lock after: it neither executes it again nor forgets the failure."
    nb = notebook(tmp_path, 'x = 1', 'open("traces", "a").write("x")\nraise KeyError("gone")')
    with pytest.raises(RunFailed):
        run(nb)
    record, traces = (
        tmp_path / 'runs' / 'demo' / 'one' / 'failed.json',
        lambda: len(next(tmp_path.rglob('traces')).read_text()),
    )
    failed = record.read_text()
    with pytest.raises(RunBusy, match='demo/one failed at .* leave .since. out to try again'):
        run(nb, since='2000-01-01T00:00:00+00:00')
    assert record.read_text() == failed and traces() == 1
    with pytest.raises(RunFailed):
        run(nb, since='3000-01-01T00:00:00+00:00')
    assert traces() == 2


@pytest.mark.parametrize(
    'cells,words',
    [
        (('1',), r'report\(\) 0 times'),
        ((REPORT, REPORT), r'report\(\) 2 times'),
        (
            ('from fewshotmeta.lab.runs import report\nreport(a=float("nan"))',),
            'a=nan: a result is a finite number',
        ),
    ],
)
def test_one_finite_result(tmp_path, cells, words):
    nb = notebook(tmp_path, 'x = 1', *cells)
    with pytest.raises(RunFailed, match=words):
        run(nb)
    assert files(nb, 'demo', 'one') == ['failed.ipynb', 'failed.json']


def test_killed_kernel_is_recorded(tmp_path):
    nb = notebook(tmp_path, 'x = 1', 'import os, signal\nos.kill(os.getpid(), signal.SIGKILL)')
    with pytest.raises(RunFailed, match='(?i)kernel died.*a checkpoint, if there is one, is kept'):
        run(nb)
    assert 'result.json' not in files(nb, 'demo', 'one') and not [
        f for f in files(nb, 'demo', 'one') if 'partial' in f
    ]


def test_where_it_runs(tmp_path):
    "cwd is the notebook's folder; the run's folder and the allocator come by the environment, and stay in the kernel."
    nb = notebook(
        tmp_path / 'sub',
        'x = 1',
        'import os\nfrom fewshotmeta.all import *\nassert os.path.realpath(".") == os.path.realpath(os.environ["FEWSHOTMETA_RUN"] + "/../../..")\n'
        'assert run_folder().is_dir() and os.environ["MALLOC_MMAP_MAX_"] == "0"\nreport(a=1)',
    )
    assert run(nb)['metrics']['a']['mean'] == 1
    assert 'FEWSHOTMETA_RUN' not in os.environ and run_folder() is None


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
    assert not [
        p
        for p in small_disk.rglob('*')
        if p.name in ('result.json', 'notebook.ipynb') or 'partial' in p.name
    ]


# ---- the command
def fewshotmeta(*args, **env):
    return subprocess.run(
        [
            sys.executable,
            '-c',
            'import sys; from fewshotmeta.lab.command import main; sys.exit(main())',
            *args,
        ],
        capture_output=True,
        text=True,
        env=os.environ | env,
    )


def test_command_run(tmp_path):
    nb = notebook(tmp_path)
    out = fewshotmeta(
        'run', str(nb), '--runs', str(tmp_path / 'runs'), '-p', 'x=5', 'rate=0.25', '-p', 'name=b'
    )
    assert (
        out.returncode == 0
        and 'square' in out.stdout
        and '25.0000' in out.stdout
        and 'result.json' in out.stdout
    ), out.stderr
    assert (tmp_path / 'runs' / 'exp' / 'name=b_rate=0.25_x=5' / 'result.json').is_file()
    for args, words in [
        (('-p', 'y=1'), "no parameter 'y'"),
        (('-p', 'x=many'), "x='many': expected int"),
        (('-p', 'x'), 'expected name=value'),
    ]:
        out = fewshotmeta('run', str(nb), *args)
        assert out.returncode == 2 and words in out.stderr and 'Traceback' not in out.stderr
    assert fewshotmeta('run', str(tmp_path / 'none.ipynb')).returncode == 2
    assert (
        fewshotmeta(
            'run', str(notebook(tmp_path, 'x = 1', '1/0')), '--runs', str(tmp_path / 'runs')
        ).returncode
        == 1
    )


def test_command_data(tmp_path):
    out = fewshotmeta('data', '--root', str(tmp_path)).stdout
    for words in (
        'found    glyphs',
        'missing  omniglot',
        'missing  mini_imagenet',
        'missing  cub',
        'fewshotmeta data --get omniglot',
        'CUB_200_2011.tgz',
        str(tmp_path),
    ):
        assert words in out
    bad = fewshotmeta('data', '--get', 'imagenet', '--root', str(tmp_path))
    assert bad.returncode == 2 and 'choose one of omniglot' in bad.stderr


# ---- the experiment
def test_train_notebook_runs_what_no_batch_file_has(tmp_path):
    nb = ROOT / 'nbs' / 'experiments' / 'train.ipynb'
    special = dict(
        fomaml=dict(plan='loop', precision='bf16', recompute=True),
        hidra=dict(train_ways=[2, 6], test_ways=[2, 7], clip_norm=10.0),
        hidra_mamlpp=dict(down='stride'),
        hypermaml=dict(labels='one_hot', augment=True),
        random_init={},
    )
    for method, changes in special.items():
        result = run_notebook(
            nb, SMALL | dict(method=method) | changes, f'm/{method}', tmp_path, quiet=True
        )
        assert (
            result['scale'] == 'smoke'
            and 0 <= result['metrics']['test_accuracy']['mean'] <= 1
            and result['metrics']['test_accuracy']['n'] == 3
            and len(result['episodes_digest']) == 16
        )
        assert {'test_accuracy_not_transductive'} | {
            f'test_accuracy_{w}way' for w in changes.get('test_ways', [])
        } <= set(result['metrics'])
    assert (tmp_path / 'm' / 'fomaml' / 'metrics.csv').is_file() and not (
        tmp_path / 'm' / 'random_init' / 'metrics.csv'
    ).exists()
    digests = {
        json.loads((tmp_path / 'm' / m / 'result.json').read_text())['episodes_digest']
        for m in special
    }
    assert len(digests) == 1  # all methods meet the same test tasks


SMALL = dict(
    iterations=2, valid_every=2, valid_tasks=2, test_tasks=3, test_steps=1, filters=4, meta_batch=2
)


@pytest.mark.parametrize(
    'given',
    [
        dict(data='omniglot', protocol='finn2017'),
        dict(data='omniglot', protocol='drumond2020', select='last'),
        dict(data='omniglot', test_data='emnist', protocol='hypermaml2022'),
        dict(data='mini_imagenet', n_query=15),
    ],
    ids=lambda d: f'{d["data"]}-{d.get("protocol", "antoniou2018")}',
)
def test_train_notebook_on_real_data(tmp_path, real_data, given):
    "Each protocol on its data, as the papers pair them."
    result = run_notebook(
        ROOT / 'nbs' / 'experiments' / 'train.ipynb', SMALL | given, 'm/x', tmp_path, quiet=True
    )
    assert result['metrics']['test_accuracy']['n'] == 3


@pytest.mark.parametrize(
    'given,words',
    [
        (dict(method='mamal'), "method='mamal': choose one of 'maml'"),
        (dict(schedule='cos'), "schedule='cos'"),
        (dict(norm='per_step', test_steps=3), 'test_steps=3, but this learner takes at most 1'),
        (dict(method='hypermaml', test_steps=2), 'test_steps=2, but this learner takes at most 1'),
        (dict(test_ways=[7]), 'test_ways=.7., but maml is bound to n_way=5'),
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
        for c in json.loads((ROOT / 'nbs' / 'experiments' / 'train.ipynb').read_text())['cells']:
            if c['cell_type'] != 'code' or (source := ''.join(c['source'])).startswith('#| hide'):
                continue
            assert 'fit(' not in source, 'it comes to the training'
            exec(source, names)
            if 'parameters' in c['metadata'].get('tags', []):
                names |= SMALL | given


def test_a_refusal_of_the_train_notebook_is_said(tmp_path):
    with pytest.raises(RunFailed, match="method='mamal': choose one of 'maml'"):
        run_notebook(
            ROOT / 'nbs' / 'experiments' / 'train.ipynb',
            SMALL | dict(method='mamal'),
            'm/x',
            tmp_path,
            quiet=True,
        )
    assert not (tmp_path / 'm' / 'x' / 'checkpoint.safetensors').exists()


def test_an_interrupted_experiment_continues(tmp_path):
    "Killed with SIGKILL in the middle of training, started again: the same accuracies and checkpoint as undisturbed."
    import signal, time

    nb = ROOT / 'nbs' / 'experiments' / 'train.ipynb'
    args = [
        '-p',
        'iterations=40',
        'valid_every=5',
        'valid_tasks=4',
        'test_tasks=10',
        'filters=8',
        'meta_batch=2',
    ]

    def command(name):
        return [
            sys.executable,
            '-c',
            'import sys; from fewshotmeta.lab.command import main; sys.exit(main())',
            'run',
            str(nb),
            '--runs',
            str(tmp_path),
            '--name',
            f'x/{name}',
            *args,
        ]

    subprocess.run(command('whole'), check=True, capture_output=True)
    p = subprocess.Popen(
        command('killed'),
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    checkpoint, t = tmp_path / 'x' / 'killed' / 'checkpoint.safetensors', time.time()
    from fewshotmeta.training.checkpoints import read_checkpoint

    while (
        not (checkpoint.exists() and read_checkpoint(checkpoint.parent)[0]['iteration'] >= 10)
        and time.time() - t < 120
    ):
        time.sleep(0.05)
    os.killpg(p.pid, signal.SIGKILL)
    p.wait()
    kernels = (
        [
            int(d)
            for d in os.listdir('/proc')
            if d.isdigit() and b'FEWSHOTMETA_RUN=' + str(checkpoint.parent).encode() in _environ(d)
        ]
        if Path('/proc').is_dir()
        else []
    )
    for pid in kernels:
        os.kill(pid, signal.SIGKILL)
    assert (
        not (checkpoint.parent / 'result.json').exists()
        and 10 <= read_checkpoint(checkpoint.parent)[0]['iteration'] < 40
    )
    subprocess.run(command('killed'), check=True, capture_output=True)
    a, b = (
        json.loads((tmp_path / 'x' / n / 'result.json').read_text()) for n in ('whole', 'killed')
    )

    def drop(m):
        return {k: v for k, v in m.items() if k != 'training_seconds'}

    assert drop(a['metrics']) == drop(b['metrics']) and a['episodes_digest'] == b['episodes_digest']
    assert (
        read_checkpoint(tmp_path / 'x' / 'whole')[0]['tensors']
        == read_checkpoint(checkpoint.parent)[0]['tensors']
    )


def _environ(pid):
    try:
        return Path(f'/proc/{pid}/environ').read_bytes()
    except OSError:
        return b''


def test_committed_results_are_whole():
    "Each result under runs/ has its executed notebook, a scale, and the parameters that were injected."
    for path in (ROOT / 'runs').glob('*/*/result.json'):
        result, nb = read_json(path), nbformat.read(path.parent / 'notebook.ipynb', 4)
        assert result['scale'] in ('smoke', 'short', 'paper')
        injected = [
            c.source for c in nb.cells if 'injected-parameters' in c.metadata.get('tags', [])
        ]
        scope = {}
        exec(injected[0] if injected else '', scope)
        assert all(result['params'][k] == v for k, v in scope.items() if not k.startswith('__'))
        left = [
            o['data']
            for c in nb.cells
            for o in c.get('outputs', [])
            if 'application/vnd.fewshotmeta.result+json' in o.get('data', {})
        ]
        assert (
            len(left) == 1
            and left[0]['application/vnd.fewshotmeta.result+json']['metrics'] == result['metrics']
        )
