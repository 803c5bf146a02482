"""The command `fewshotmeta`, typed: runs, data, versions; and where only the package is there."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path
import pytest
import fewshotmeta
from conftest import ROOT
from fewshotmeta.data.files import read_json
from fewshotmeta.lab.command import main
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


def test_run(tmp_path):
    nb = notebook(tmp_path)
    given = ('-p', 'x=5', 'rate=0.25', '-p', 'name=b')
    out = command('run', nb, '--runs', tmp_path / 'runs', *given)
    assert out.returncode == 0, out.stderr
    for words in ('square', '25.0000', 'result.json'):
        assert words in out.stdout
    assert (tmp_path / 'runs' / 'exp' / 'name=b_rate=0.25_x=5' / 'result.json').is_file()


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


def test_data(tmp_path):
    out = command('data', '--root', tmp_path).stdout
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
    bad = command('data', '--get', 'imagenet', '--root', tmp_path)
    assert bad.returncode == 2
    assert 'choose one of omniglot' in bad.stderr


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
