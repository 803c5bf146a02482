"""The command `fewshotmeta`, typed: runs, data, versions; and where only the package is there."""

import importlib.metadata
import os
import re
import shlex
import shutil
import subprocess
import sys
import venv
import zipfile
from argparse import SUPPRESS, Namespace
from pathlib import Path
import pytest
import fewshotmeta
import fewshotmeta.lab.command as C
from conftest import ROOT
from fewshotmeta.data.datasets import DATASETS
from fewshotmeta.data.files import read_json
from fewshotmeta.lab.command import main
from fewshotmeta.lab.parameters import default_name, experiment_file, merge_parameters
from fewshotmeta.lab.parameters import read_parameters
from tiny import notebook

TRAIN = ROOT / 'nbs' / 'experiments' / 'train.ipynb'


def command(*args, **env):
    code = 'import sys; from fewshotmeta.lab.command import main; sys.exit(main())'
    return subprocess.run(
        [sys.executable, '-c', code, *map(str, args)],
        capture_output=True,
        text=True,
        env=os.environ | env,
    )


def parsed(words):
    "What the command is asked for, and the parameters that are given, with and without defaults."
    args = C._parser().parse_args([str(word) for word in words])
    given = C._given(args, Path(args.notebook))
    return args, given, merge_parameters(read_parameters(args.notebook), given)


def test_run(tmp_path, monkeypatch, capsys):
    "From its project's root, without a scale; then what is said from a folder inside it."
    nb = notebook(tmp_path / 'nbs', 'x = 2\nname = "a"\nrate = 0.5')
    (tmp_path / 'settings.ini').write_text('')
    given = ('-p', 'x=5', 'rate=0.25', '-p', "name=it's b")
    out = command('run', nb, *given)
    assert out.returncode == 0, out.stderr
    for words in ('square', '25.0000', 'result.json'):
        assert words in out.stdout
    assert 'None' not in out.stdout
    assert (tmp_path / 'runs/exp/name=it-s-b_rate=0.25_x=5/result.json').is_file()
    words = shlex.split(out.stdout.splitlines()[-1])
    args, _, params = parsed(words[words.index('run') :])
    assert params == dict(x=6, name="it's b", rate=0.25)
    assert args.notebook == str(nb)
    deep = tmp_path / 'nbs' / 'deep'
    deep.mkdir()
    monkeypatch.chdir(deep)
    for look in ('status', 'results'):
        assert C.main([look]) == 0
        assert 'name=it-s-b_rate=0.25_x=5 ' in capsys.readouterr().out
    monkeypatch.chdir('/')
    assert C.main(['results']) == 2
    assert 'no folder /runs: go to the project, or name it with --runs' in capsys.readouterr().err


SEEDED = 'x = 2\nrate = 0.5\nways = [1]\nmaybe = None\niterations = 30\nseed = 0'
LONG = tuple(f'parameter_{i:02d}=1' for i in range(9))


@pytest.mark.parametrize(
    'cell,given,options,change,name',
    [
        (SEEDED, (), (), dict(seed=1), 'seed=1'),
        (SEEDED, ('seed=4', 'rate=.1'), (), dict(seed=5), 'rate=0.1_seed=5'),
        (SEEDED, ('ways=1,2', 'maybe="a b"'), (), dict(seed=1), "maybe=a-b_seed=1_ways=-1-2-"),
        (SEEDED, ('x=3',), ('--name', 'm/one'), dict(seed=1), 'm/one_seed1'),
        (SEEDED, ('seed=9',), ('--name', 'one_seed9'), dict(seed=10), 'one_seed10'),
        (SEEDED[:-9], ('x=3',), ('--limit', '2.5'), dict(iterations=60), 'iterations=60_x=3'),
        ('rate = 0.5\nx = -1', (), ('--name', 'a'), dict(x=0), 'a_x0'),
    ],
)
def test_what_a_run_proposes(tmp_path, cell, given, options, change, name):
    "The same run but for one parameter, under another name, in the same place."
    pairs = ('-p', *given) if given else ()
    words = 'run', notebook(tmp_path, cell), *pairs, *options, '--runs', tmp_path / 'a b'
    args, values, params = parsed(words)
    result = dict(run=args.name.rpartition('/')[2] or default_name(values), params=params)
    said = C._next_command(result, values, args, *C._changed(params))
    words = shlex.split(said)
    again, values, changed = parsed(words[words.index('run') :])
    assert changed == params | change
    assert (again.runs, again.limit) == (args.runs, args.limit)
    assert (again.name or default_name(values)) == name


def test_a_proposal_has_a_name_where_that_of_its_parameters_is_cut(tmp_path):
    nb = notebook(tmp_path, '\n'.join(f'{pair[:-1]}0' for pair in LONG) + '\nseed = 0')
    args, values, params = parsed(('run', nb, '-p', *LONG))
    result = dict(run=default_name(values), params=params)
    words = shlex.split(C._next_command(result, values, args, *C._changed(params)))
    assert words[-1] == f'{default_name(values)}_seed1'


def test_a_run_without_a_whole_number_proposes_nothing(capsys):
    params = dict(name='a', rate=0.5, flag=True)
    C._say_next(dict(params=params), {}, Namespace())
    assert 'change a parameter with -p: name, rate, flag' in capsys.readouterr().out


def parsers():
    "Of each subcommand."
    (subcommands,) = [a for a in C._parser()._actions if hasattr(a, '_choices_actions')]
    return subcommands.choices


@pytest.mark.parametrize('name', parsers())
def test_help_tells_each_argument_and_its_default(name):
    "An argument that must be given has none."
    parser = parsers()[name]
    for action in parser._actions:
        told = action.help
        assert told and told != SUPPRESS, (name, action.dest)
        if action.dest != 'help' and not action.required:
            assert '(default: ' in told, (name, action.dest)
    assert parser.description


@pytest.mark.parametrize(
    'given,words',
    [
        (('-p', 'y=1'), "no parameter 'y'"),
        (('-p', 'x=many'), "x='many': expected int"),
        (('-p', 'x'), 'expected name=value'),
    ],
)
def test_run_asked_for_wrongly(tmp_path, given, words):
    out = command('run', notebook(tmp_path), *given)
    assert out.returncode == 2
    assert words in out.stderr
    assert 'Traceback' not in out.stderr


def test_run_of_no_notebook(tmp_path):
    assert command('run', tmp_path / 'none.ipynb').returncode == 2


@pytest.mark.parametrize(
    'given,words',
    [
        ('method=mamal', "method='mamal': choose one of 'maml'"),
        ('method=proto_net test_steps=3', 'takes at most 0: test_steps=0, or -1'),
        ('test_ways=[7]', 'maml is bound to 5 ways'),
        ('schedule=cos', "schedule='cos': choose one of 'constant'"),
        ('clip=1.0 clip_norm=1.0', 'clip=1.0 and clip_norm=1.0: choose one'),
        ('backbone=vit', "backbone='vit': choose one of"),
    ],
)
def test_what_cannot_run_is_refused_before_a_kernel_starts(tmp_path, capsys, given, words):
    asked = ['run', str(TRAIN), '--runs', str(tmp_path), '--name', 'm/x', '-p', *given.split()]
    assert main(asked) == 2
    assert words in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_row_that_cannot_run_is_named(tmp_path, capsys):
    (tmp_path / 'train.ipynb').write_bytes(TRAIN.read_bytes())
    file = tmp_path / 'table.yaml'
    file.write_text('experiment: train.ipynb\nruns: {fine: {}, bad: {method: r2d2, test_steps: 1}}')
    assert main(['batch', str(file), '--runs', str(tmp_path / 'runs')]) == 2
    assert 'table/bad_smoke: test_steps=1, but this learner takes' in capsys.readouterr().err


def test_data(tmp_path, capsys):
    assert main(['data', '--root', str(tmp_path)]) == 0
    out = capsys.readouterr().out
    for words in (
        'found       glyphs',
        'missing     omniglot',
        'missing     mini_imagenet',
        'missing     cub',
        'fewshotmeta data --get omniglot',
        'CUB_200_2011.tgz',
        str(tmp_path),
    ):
        assert words in out
    assert main(['data', '--get', 'imagenet', '--root', str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert '--get imagenet: choose one of ' in said
    assert set(DATASETS) <= set(re.findall(r'\w+', said))


# ---- tab completion
def test_completion_says_what_it_needs(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'argcomplete', None)
    with pytest.raises(SystemExit) as stopped:
        C.main(['--print-completion', 'bash'])
    assert stopped.value.code == 2
    needs = 'tab completion needs argcomplete: pip install "fewshotmeta[complete]"'
    assert needs in capsys.readouterr().err
    monkeypatch.setenv('_ARGCOMPLETE', '1')
    asked = ['results', 'hidra_f3/*', '--runs', str(ROOT / 'runs')]
    assert C.main(asked) == 0  # it goes on without


def completer(subcommand, dest):
    (action,) = [a for a in parsers()[subcommand]._actions if a.dest == dest]
    return action.completer


def test_what_is_completed(tmp_path, monkeypatch):
    nb = notebook(tmp_path / 'mine')
    (tmp_path / 'mine.yaml').write_text('')
    monkeypatch.chdir(tmp_path)
    notebooks, files = completer('run', 'notebook'), completer('batch', 'file')
    assert {'train', 'ways', 'mine/'} <= set(notebooks('mi'))
    assert 'mine/exp.ipynb' in notebooks('mine/')
    assert 'mine.yaml' not in notebooks('mi')
    assert {'omniglot', 'mine.yaml', 'mine/'} <= set(files('m'))
    assert set(completer('status', 'files')('m')) == set(files('m'))
    parameters = completer('run', 'parameters')
    assert parameters('', Namespace(notebook=str(nb)))[:2] == ['x=', 'name=']
    assert 'n_way=' in parameters('n', Namespace(notebook='train'))
    for none in ('', 'none', 'none.ipynb', 'mine.yaml', None):
        assert parameters('', Namespace(notebook=none)) == []


@pytest.mark.parametrize(
    'line,expected',
    [
        ('fewshotmeta ru', 'run '),
        ('fewshotmeta batch --dry', '--dry-run '),
        ('fewshotmeta run adapt', 'adaptation_timing '),
        ('fewshotmeta run train -p n_w', 'n_way='),
        ('fewshotmeta run train -p n_way=5 inner_l', 'inner_lr='),
    ],
)
def test_a_shell_is_answered(tmp_path, line, expected):
    pytest.importorskip('argcomplete')
    answer = tmp_path / 'answer'
    asked = dict(COMP_LINE=line, COMP_POINT=str(len(line)), COMP_TYPE='9', _ARGCOMPLETE='1')
    command(**asked, _ARGCOMPLETE_STDOUT_FILENAME=str(answer))
    assert answer.read_text() == expected
    assert 'fewshotmeta' in command('--print-completion', 'bash').stdout


# ---- a wheel, away from the repository
@pytest.fixture(scope='module')
def installed(tmp_path_factory):
    "`installed(…)` runs the command of a wheel's content, in an empty folder with a project above."
    folder = tmp_path_factory.mktemp('wheel')
    source, away = folder / 'source', folder / 'away'
    no_caches = shutil.ignore_patterns('__pycache__')
    for part in ('fewshotmeta', 'nbs/experiments'):
        shutil.copytree(ROOT / part, source / part, ignore=no_caches)
    for part in ('pyproject.toml', 'README.md', 'LICENSE'):
        shutil.copy(ROOT / part, source)
    build = f'from setuptools.build_meta import build_wheel; build_wheel({str(folder)!r})'
    subprocess.run([sys.executable, '-c', build], cwd=source, check=True, capture_output=True)
    (wheel,) = folder.glob('*.whl')
    zipfile.ZipFile(wheel).extractall(folder / 'site')
    away.mkdir()
    (folder / 'settings.ini').write_text('')  # a virtual environment may lie in a project

    def python(*args):
        program = [sys.executable, '-m', 'fewshotmeta.lab.command', *map(str, args)]
        env = os.environ | dict(PYTHONPATH=str(folder / 'site'))
        return subprocess.run(program, cwd=away, env=env, capture_output=True, text=True)

    return folder, python


@pytest.mark.xdist_group('wheel')
def test_a_wheel_has_all_modules_and_experiments(installed):
    folder, _ = installed
    no_caches = {p for p in (ROOT / 'fewshotmeta').rglob('*') if '__pycache__' not in p.parts}
    files = {p.relative_to(ROOT) for p in no_caches if p.is_file()}
    there = [p for p in (ROOT / 'nbs/experiments').iterdir() if p.suffix in ('.ipynb', '.yaml')]
    files |= {Path('fewshotmeta/experiments', p.name) for p in there}
    assert {f for f in files if not (folder / 'site' / f).is_file()} == set()


@pytest.mark.xdist_group('wheel')
def test_a_wheel_runs_experiments_by_name(installed):
    folder, python = installed
    unknown = python('run', 'trian')
    assert unknown.returncode == 2
    assert "trian here, did you mean 'train'? The experiments are: adaptation_" in unknown.stderr
    few = [f'{name}=2' for name in ('iterations', 'valid_every', 'valid_tasks', 'test_tasks')]
    out = python('run', 'train', '--name', 'by/name', '-p', *few, 'filters=4')
    assert out.returncode == 0, out.stderr
    assert read_json(folder / 'away/runs/by/name/result.json')['notebook'] == 'train.ipynb'
    dry = python('batch', 'hypermaml_t2', '--scale', 'smoke', '--dry-run')
    assert 'hypermaml_t2/emnist_hypermaml_1shot_smoke    new' in dry.stdout, dry.stderr


# ---- the package on PYTHONPATH, and no distribution of its name
@pytest.fixture(scope='module')
def bare(tmp_path_factory):
    """A Python of its own that finds a copy of the package and all that the package needs, on
    PYTHONPATH alone: `bare(…)` runs it."""
    folder = tmp_path_factory.mktemp('bare')
    package, needs = folder / 'package', folder / 'needs'
    no_caches = shutil.ignore_patterns('__pycache__')
    shutil.copytree(Path(fewshotmeta.__file__).parent, package / 'fewshotmeta', ignore=no_caches)
    needs.mkdir()
    for installed in installed_packages():
        (needs / installed.name).symlink_to(installed)
    venv.create(folder / 'python', symlinks=True)
    env = os.environ | dict(
        PYTHONPATH=os.pathsep.join([str(package), str(needs)]),
        GIT_CEILING_DIRECTORIES=str(folder),  # a copy stands in no repository
    )

    def python(*args):
        program = [folder / 'python' / 'bin' / 'python', *map(str, args)]
        return subprocess.run(program, cwd=folder, env=env, capture_output=True, text=True)

    return python


def installed_packages():
    "What stands in the folders of installed packages, but our own: its .dist-info, its finder."
    folders = [p for p in map(Path, sys.path) if p.name in ('site-packages', 'dist-packages')]
    first = {}
    for path in [path for folder in folders if folder.is_dir() for path in folder.iterdir()]:
        if 'fewshotmeta' not in path.name:
            first.setdefault(path.name, path)
    return first.values()


@pytest.mark.xdist_group('bare')
def test_a_bare_python_has_no_such_distribution(bare):
    code = 'import importlib.metadata, fewshotmeta; print(fewshotmeta.__file__); '
    out = bare('-c', code + 'importlib.metadata.version("fewshotmeta")')
    assert 'bare' in Path(out.stdout).parts[-4]
    assert importlib.metadata.PackageNotFoundError.__name__ in out.stderr


@pytest.mark.xdist_group('bare')
def test_version_without_a_distribution(bare):
    out = bare('-m', 'fewshotmeta.lab.command', '--version')
    assert out.returncode == 0, out.stderr
    assert out.stdout.startswith(f'fewshotmeta {fewshotmeta.__version__}, torch ')


@pytest.mark.xdist_group('bare')
def test_a_run_without_a_distribution(bare, tmp_path):
    report = 'from fewshotmeta.all import *\nreport(there=len(fewshotmeta_file))'
    where = 'import fewshotmeta\nfewshotmeta_file = fewshotmeta.__file__'
    nb = notebook(tmp_path, 'x = 1', where, report)
    place = ('--runs', tmp_path / 'runs', '--name', 'demo/one')
    out = bare('-m', 'fewshotmeta.lab.command', 'run', nb, *place)
    assert out.returncode == 0, out.stderr
    result = read_json(tmp_path / 'runs' / 'demo' / 'one' / 'result.json')
    assert result['versions']['fewshotmeta'] == fewshotmeta.__version__
    assert result['versions']['torch'] == importlib.metadata.version('torch')
    assert result['commit'] is None
    assert result['dirty'] is None


# ---- GPUs
def test_a_gpu_that_is_not_there_is_refused_before_anything_starts(tmp_path, capsys):
    batch = ROOT / 'nbs' / 'experiments' / 'omniglot.yaml'
    asked = ['batch', batch, '--scale', 'smoke', '--gpus', '99', '--runs', tmp_path]
    assert main([str(word) for word in asked]) == 2
    assert '--gpus 99: PyTorch sees ' in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    'visible,asked,given',
    [(None, (0, 1), (0, 1)), ('4,5', (0, 1), ('4', '5')), ('4,5', (1,), ('5',)), ('4', (), ())],
)
def test_gpus_are_those_that_are_visible(monkeypatch, visible, asked, given):
    monkeypatch.setattr('torch.cuda.device_count', lambda: 2)
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
    if visible:
        monkeypatch.setenv('CUDA_VISIBLE_DEVICES', visible)
    assert C._visible(asked) == given
    where = f'under CUDA_VISIBLE_DEVICES={visible}' if visible else 'here'
    words = f'--gpus 0,2: PyTorch sees 2 {where}: choose from numbers 0 to 1'
    with pytest.raises(ValueError, match=words):
        C._visible((0, 2))


# ---- what a batch will take
SOME = """
experiment: train.ipynb
common: {device: cpu, filters: 4, n_query: 2, test_query: 2}
runs:
  here: {data: glyphs, seed: [0, 1]}
  elsewhere: {data: cub}
  untrained: {data: glyphs, method: random_init}
scales:
  smoke: {iterations: 100, valid_every: 50}
"""


def test_an_estimate_says_hours_and_memory(tmp_path, monkeypatch, capsys):
    "Of each setting, however many seeds; what is not on this machine is left out; nothing runs."
    monkeypatch.setenv('FEWSHOTMETA_DATA', str(tmp_path))
    runs, kept = tmp_path / 'runs', tmp_path / 'kept.json'
    (tmp_path / 'train.ipynb').symlink_to(experiment_file('train'))
    (tmp_path / 'some.yaml').write_text(SOME)
    asked = ['batch', str(tmp_path / 'some.yaml'), '--runs', str(runs), '--estimate']
    assert main([*asked, '--write', str(kept)]) in (0, None)
    said = capsys.readouterr().out.splitlines()
    assert said[2].split('cub is not under')[0].split() == ['some/elsewhere_smoke', '1']
    here, untrained = read_json(kept)['rows']
    assert (here['name'], here['runs']) == ('some/here_smoke', 2)
    assert here['training'] == pytest.approx(100 * here['iteration'])
    seconds = here['training'] + here['validation'] + here['test']
    assert here['hours'] == pytest.approx(seconds / 3600) and here['validation'] > 0
    assert untrained['training'] == untrained['validation'] == 0 < untrained['test']
    assert 0 < here['least'] < here['recomputed'] <= here['peak']
    assert main([*asked, 'memory', '--write', str(kept)]) in (0, None)
    again = read_json(kept)['rows'][0]
    assert (again['hours'], again['peak']) == (None, here['peak'])
    assert not runs.exists()
    assert main(['batch', str(tmp_path / 'some.yaml'), '--write', str(kept)]) == 2
    assert 'belongs to --estimate' in capsys.readouterr().err
