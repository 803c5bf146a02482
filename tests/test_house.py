"""The house itself: who may import whom, how code is laid out, what is explained."""

import ast
import configparser
import importlib
import io
import itertools
import json
import re
import shutil
import subprocess
import sys
import tokenize
import tomllib

import pytest
from conftest import ROOT
from house import CELL, cells_of, codes_of, layout_faults, length_faults, plain, rooms, source
from house import WIDEST, wall_faults

PACKAGE = ROOT / 'fewshotmeta'
NOTEBOOKS = sorted(
    p for p in (ROOT / 'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts
)
ROOMS = rooms(ROOT / 'nbs')
SCRIPTS = [*(ROOT / 'tests').glob('*.py'), *(ROOT / 'nbs' / '_site').glob('*.py')]


def room_file(room):
    return PACKAGE / (room.replace('.', '/') + '.py')


def stem(path):
    return path.stem


def is_room(path):
    return path in ROOMS.values()


# --- architecture


def test_rooms_import_only_what_stands_under_them():
    assert wall_faults(PACKAGE, list(ROOMS)) == []


@pytest.mark.parametrize(
    'room, line, said',
    [
        ('data.files', 'from ..lab.runs import report\n', 'data.files imports lab.runs'),
        ('data.files', 'def f():\n    from ..lab import runs\n', 'data.files imports lab.runs'),
        ('engine.layers', 'from fewshotmeta.learners.maml import MAML\n', 'imports learners.maml'),
        ('learners.hidra', 'from .hypermaml import HyperMAML\n', 'imports learners.hypermaml'),
        ('lab.runs', 'from ..data.files import *\n', 'imports everything from data.files'),
        ('lab.runs', 'from ..data.files import _named\n', '_named, which is private'),
        ('data.files', 'from ..all import MAML\n', 'imports from all'),
    ],
)
def test_a_planted_import_is_found(tmp_path, room, line, said):
    copy = tmp_path / 'fewshotmeta'
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns('__pycache__'))
    file = copy / (room.replace('.', '/') + '.py')
    file.write_text(file.read_text() + '\n\n' + line)
    found = wall_faults(copy, list(ROOMS))
    assert len(found) == 1 and said in found[0], found


def test_a_folder_of_notebooks_is_a_folder_of_modules():
    for room, path in ROOMS.items():
        assert room_file(room).is_file(), f'{path} exports {room}, which is not there'
        assert path.parent.name == room.split('.')[0]
    modules = {p for p in PACKAGE.glob('*/*.py') if p.name != '__init__.py'}
    assert modules == {room_file(room) for room in ROOMS}


# --- layout


@pytest.mark.parametrize('path', NOTEBOOKS, ids=stem)
def test_cells_are_laid_out_to_be_read(path):
    faults = []
    for cell in codes_of(path):
        text, where = plain(source(cell)), f'{path.name}, cell {cell["id"]}'
        faults += layout_faults(where, text)
        if re.search(r'^#\|\s*exports?\b', source(cell), re.M):
            faults += length_faults(where, text)
            if text.count('\n') >= CELL + 1:
                faults.append(f'{where}: {text.count(chr(10))} lines, {CELL} at most')
    assert not faults, '\n'.join(faults)


@pytest.mark.parametrize('path', SCRIPTS, ids=stem)
def test_scripts_are_laid_out_to_be_read(path):
    assert layout_faults(path.name, path.read_text()) == []


@pytest.mark.parametrize('path', sorted(PACKAGE.glob('*/*.py')), ids=stem)
def test_exported_lines_are_no_wider(path):
    "A page's subtitle becomes a docstring. Only `__all__` is wider: nbdev wraps it at 120 columns."
    text = re.sub(r'^__all__ = \[.*?\]$', '', path.read_text(), flags=re.M | re.S)
    assert [line for line in text.splitlines() if len(line) > WIDEST] == []


def test_what_a_layout_must_not_have_is_found():
    assert len(layout_faults('x', 'a = 1; b = 2\n')) == 1
    assert len(layout_faults('x', 'if a: b = 2\n')) == 1
    assert len(layout_faults('x', f'a = "{"b" * 100}"\n')) == 1
    assert len(layout_faults('x', 'f = lambda: 1\n')) == 1
    assert len(layout_faults('x', 'a = dict(f=lambda: 1)\n')) == 1
    assert len(length_faults('x', 'def f():\n' + '    a = 1\n' * 31)) == 1
    assert layout_faults('x', 'sorted(a, key=len)\n') == []


# --- notebooks


@pytest.mark.parametrize('path', NOTEBOOKS, ids=stem)
def test_notebook_form(path):
    cells, codes = cells_of(path), codes_of(path)
    first = source(cells[0])
    assert first.startswith('# ') and '\n> ' in first
    assert not [o for c in codes for o in c['outputs'] if o['output_type'] == 'error']
    assert len({c['id'] for c in cells}) == len(cells)
    if 'experiments' in path.parts:
        assert sum('parameters' in c['metadata'].get('tags', []) for c in codes) == 1
    elif is_room(path):
        assert 'nbdev.nbdev_export()' in source(codes[-1])


COLAB = '''#| hide
# Colab opens a notebook alone: get the rest of the repository and its package
if 'google.colab' in str(get_ipython()):
    shell = get_ipython().system
    shell('git clone -q --depth 1 {git_url} /content/fewshotmeta')
    shell('pip install -q "/content/fewshotmeta[nbdev]"')
    get_ipython().run_line_magic('cd', '-q /content/fewshotmeta/{folder}')'''

# what stands in the cells while `git_url` is empty, and no page has a button
NO_HOME = 'https://github.com/fewshotmeta/fewshotmeta'


def settings():
    "settings.ini, nbdev's one configuration."
    config = configparser.ConfigParser(interpolation=None)
    config.read(ROOT / 'settings.ini')
    return config['DEFAULT']


def project():
    return tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']


@pytest.mark.parametrize('path', [p for p in NOTEBOOKS if p.stem != '99_all'], ids=stem)
def test_a_notebook_begins_with_what_colab_needs(path):
    """Every page has a button that opens its notebook there; a fork changes the address.

    Colab has the notebook alone, and no settings, so the address stands in the notebook.
    """
    folder = path.parent.relative_to(ROOT).as_posix()
    home = settings()['git_url'] or NO_HOME
    expected = COLAB.format(git_url=home, folder=folder)
    said = 'copy the first code cell of another notebook, with the folder of this one'
    assert source(codes_of(path)[0]) == expected, said
    assert 'nbdev' in project()['optional-dependencies']


def test_the_contents_list_every_notebook():
    nbs = ROOT / 'nbs'
    outputs = [o for cell in codes_of(nbs / 'contents.ipynb') for o in cell['outputs']]
    text = ''.join(''.join(o.get('data', {}).get('text/markdown', '')) for o in outputs)
    rows = set(re.findall(r'^\| \[[^]]+\]\(([^)]+)\) \| ', text, re.M))
    names = {p.relative_to(nbs).as_posix() for p in NOTEBOOKS} - {'index.ipynb', 'contents.ipynb'}
    assert rows == names, f'run nbs/contents.ipynb again: {sorted(rows ^ names)}'
    assert '(nbs/contents.ipynb)' in (ROOT / 'README.md').read_text()


def test_a_parameter_of_an_experiment_is_no_name_of_ours():
    "An experiment imports everything after its parameters: a common name would replace one."
    from fewshotmeta.lab.parameters import read_parameters

    everything = vars(importlib.import_module('fewshotmeta.all'))
    for path in (ROOT / 'nbs' / 'experiments').glob('*.ipynb'):
        both = [name for name in read_parameters(path) if name in everything]
        assert not both, (path.name, both)


# --- public names


def exported_names(tree):
    "What a module's __all__ lists."
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], 'id', '') == '__all__':
            return ast.literal_eval(node.value)
    return []


def is_patch(node):
    "Whether a function is a method, told by `@patch`."
    decorators = [d.func if isinstance(d, ast.Call) else d for d in node.decorator_list]
    return any(getattr(d, 'id', '') == 'patch' for d in decorators)


def public():
    "(room, name, node, lines) of every public function, class and method."
    for room in ROOMS:
        text = room_file(room).read_text()
        tree, lines = ast.parse(text), text.splitlines()
        names = exported_names(tree)
        for node in tree.body:
            name = getattr(node, 'name', '')
            if name in names:
                yield room, name, node, lines
            if isinstance(node, ast.ClassDef) and name in names:
                yield from ((room, f'{name}.{f.name}', f, lines) for f in methods_of(node))
            elif isinstance(node, ast.FunctionDef) and is_patch(node) and not name.startswith('_'):
                owner = ast.unparse(node.args.args[0].annotation)
                yield room, f'{owner}.{name}', node, lines


def methods_of(node):
    functions = [f for f in node.body if isinstance(f, ast.FunctionDef)]
    return [f for f in functions if not f.name.startswith('_') or f.name == '__init__']


def test_public_things_have_docstrings():
    named = [(f'{room}.{name}', node) for room, name, node, _ in public()]
    silent = [n for n, node in named if not n.endswith('__init__') and not ast.get_docstring(node)]
    assert not silent, silent


def test_every_public_name_stands_in_all():
    everything = importlib.import_module('fewshotmeta.all')
    for room in ROOMS:
        module = importlib.import_module(f'fewshotmeta.{room}')
        lacking = [n for n in module.__all__ if not hasattr(everything, n)]
        assert not lacking, (room, lacking)


def says_shapes(function, lines):
    "Whether the comments of the arguments or the docstring have a shape, like (tasks, n) or ()."
    text = '\n'.join(lines[function.lineno - 1 : function.body[0].end_lineno])
    shape = r'\((\)(?! ?->|:)|[\w*+…]+, ?[^()]*\)|[\w*+…]+,\))'
    return bool(re.search(shape, text.partition('Tensor')[2])) or 'shape' in text


def takes_tensors(function):
    arguments = function.args.posonlyargs + function.args.args + function.args.kwonlyargs
    return any('Tensor' in ast.unparse(a.annotation) for a in arguments if a.annotation)


def test_tensors_have_shapes():
    "A method says its shapes once, where it is defined first."
    found = [p for p in public() if isinstance(p[2], ast.FunctionDef)]
    told = {f.name for _, _, f, lines in found if says_shapes(f, lines)}
    silent = [(room, n) for room, n, f, _ in found if takes_tensors(f) and f.name not in told]
    assert not silent, silent


def test_every_public_function_and_class_has_an_example_or_a_test():
    cells = [source(c) for p in NOTEBOOKS for c in codes_of(p)]
    shown = [c for c in cells if not re.search(r'^#\|\s*(export|default_exp)', c, re.M)]
    text = '\n'.join([*shown, *(p.read_text() for p in (ROOT / 'tests').glob('*.py'))])
    words = set(re.findall(r'\w+', text))
    idle = [
        f'{room}.{name}' for room, name, *_ in public() if '.' not in name and name not in words
    ]
    assert not idle, idle


# --- the package


READER = PACKAGE / 'data' / 'pickles.py'  # of arrays in pickles
READS = ['import pickle', 'class _ArraysAlone(pickle.Unpickler):']


def lines_with_pickles(text):
    "Lines of code, not of comments and texts, in which a name has to do with pickles."
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    names = [t for t in tokens if t.type == tokenize.NAME]
    found = [t for t in names if re.fullmatch(r'_?c?pickle|\w*pickler', t.string.lower())]
    return list(dict.fromkeys(t.line.strip() for t in found))


def test_no_pickle():
    "One class alone reads them, and it refuses what it does not know by name."
    for path in PACKAGE.rglob('*.py'):
        text = path.read_text()
        assert not re.search(r'torch\.load\(|torch\.save\(|allow_pickle', text), path
        assert lines_with_pickles(text) == (READS if path == READER else []), path


def test_settings_and_project_agree():
    import fewshotmeta

    s, p = settings(), project()
    assert s['version'] == fewshotmeta.__version__
    assert s['allowed_cell_metadata_keys'] == 'tags' and s['update_pyproject'] == 'False'
    assert p['requires-python'] == f'>={s["min_python"]}'
    needs = {re.split(r'[<>=]', d)[0] for d in p['dependencies']}
    assert set(s['requirements'].split()) <= needs
    assert not any('nbdev' in d for d in p['dependencies'])
    fastcore = [d for d in p['dependencies'] if d.startswith('fastcore')]
    assert fastcore and '<' not in fastcore[0], 'only the extra nbdev needs an upper bound'


def run_python(code):
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_importing_the_package_needs_no_nbdev_and_no_plots():
    heavy = ('nbdev', 'matplotlib.pyplot', 'papermill', 'pandas', 'torchvision')
    code = f'import sys; import fewshotmeta.all; print([m for m in {heavy} if m in sys.modules])'
    assert run_python(code) == '[]'


def test_package_data_is_installed():
    lists = ['cifar_fs', 'cub', 'emnist', 'fc100', 'glyphs', 'mini_imagenet', 'omniglot']
    lists.append('tiered_imagenet')
    assert sorted(p.stem for p in (PACKAGE / 'data' / 'splits').glob('*.json')) == lists
    patterns = tomllib.loads((ROOT / 'pyproject.toml').read_text())['tool']['setuptools']
    covered = set()
    for package, globs in patterns['package-data'].items():
        folder = ROOT / package.replace('.', '/')
        covered |= {p for pattern in globs for p in folder.glob(pattern)}
    data = {p for p in PACKAGE.rglob('*') if p.is_file() and p.suffix in ('.json', '.csv', '.c')}
    assert data == covered, data ^ covered


def test_result_files_are_not_notebooks_of_this_machine():
    "A notebook's metadata says nothing of who ran it."
    for path in NOTEBOOKS:
        metadata = json.loads(path.read_text())['metadata']
        assert set(metadata) <= {'kernelspec', 'language_info'}, (path, metadata)


def test_workflows_use_what_was_looked_at():
    "Actions by their commit, packages by the constraints, rights for what a job does."
    import yaml

    for path in (ROOT / '.github' / 'workflows').glob('*.yml'):
        doc = yaml.safe_load(path.read_text())
        steps = itertools.chain(*(job['steps'] for job in doc['jobs'].values()))
        used = [step['uses'] for step in steps if 'uses' in step]
        assert all(re.fullmatch(r'[\w-]+/[\w-]+@[0-9a-f]{40}', one) for one in used), (path, used)
        assert (ROOT / doc['env']['CONSTRAINTS']).is_file()
        assert set(doc['permissions'].values()) <= {'read'}, path


def test_constraints_fit_what_the_project_asks_for():
    from packaging.requirements import Requirement

    lines = (ROOT / '.github' / 'constraints.txt').read_text().splitlines()
    pins = dict(line.split('==') for line in lines if not line.startswith('#'))
    assert not [pin for pin in pins.items() if '+' in pin[1] or pin[0].startswith('nvidia')]
    optional = project()['optional-dependencies']
    asked = [*project()['dependencies'], *optional['nbdev'], *optional['docs']]
    for need in map(Requirement, asked):
        assert need.specifier.contains(pins[need.name.lower()]), need
