"""The house itself: rooms import only rooms above them, notebooks are in order, nothing loads a pickle."""

import ast, configparser, json, re, subprocess, sys, tomllib
import pytest
from conftest import ROOT

NOTEBOOKS = sorted(
    p for p in (ROOT / 'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts
)
ROOMS = {
    re.search(r'#\| default_exp (\w+)', p.read_text()).group(1): p.name.split('_')[0]
    for p in NOTEBOOKS
    if re.match(r'\d\d', p.name)
}


def test_a_room_imports_only_rooms_above():
    for room, number in ROOMS.items():
        tree = ast.parse((ROOT / 'fewshotmeta' / f'{room}.py').read_text())
        used = {
            n.module.split('.')[1]
            for n in ast.walk(tree)
            if isinstance(n, ast.ImportFrom) and n.module and n.module.startswith('fewshotmeta.')
        }
        assert all(ROOMS[u] < number for u in used), (room, used)


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_form(path):
    nb = json.loads(path.read_text())
    first, codes = (
        ''.join(nb['cells'][0]['source']),
        [c for c in nb['cells'] if c['cell_type'] == 'code'],
    )
    assert first.startswith('# ') and '\n> ' in first
    assert not [o for c in codes for o in c['outputs'] if o['output_type'] == 'error']
    assert len({c['id'] for c in nb['cells']}) == len(nb['cells'])
    if 'experiments' in path.parts:
        assert sum('parameters' in c['metadata'].get('tags', []) for c in codes) == 1
    elif re.match(r'\d\d', path.name):
        assert 'nbdev.nbdev_export()' in ''.join(codes[-1]['source'])


COLAB = '''#| hide
# Colab opens a notebook alone: get the rest of the repository and its package
if 'google.colab' in str(get_ipython()):
    shell = get_ipython().system
    shell('git clone -q --depth 1 {git_url} /content/fewshotmeta')
    shell('pip install -q "/content/fewshotmeta[nbdev]"')
    get_ipython().run_line_magic('cd', '-q /content/fewshotmeta/{folder}')'''


@pytest.mark.parametrize('path', [p for p in NOTEBOOKS if p.stem != '99_all'], ids=lambda p: p.stem)
def test_a_notebook_begins_with_what_colab_needs(path):
    "Every page of the site has a button that opens its notebook there; CONTRIBUTING says that a fork changes the address."
    settings = configparser.ConfigParser(interpolation=None)
    settings.read(ROOT / 'settings.ini')
    first = next(c for c in json.loads(path.read_text())['cells'] if c['cell_type'] == 'code')
    assert ''.join(first['source']) == COLAB.format(
        git_url=settings['DEFAULT']['git_url'], folder=path.parent.relative_to(ROOT).as_posix()
    ), 'copy the first code cell of another notebook, with the folder of this one'
    assert (
        'nbdev'
        in tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']['optional-dependencies']
    )


def test_the_readme_lists_every_notebook():
    text = (ROOT / 'README.md').read_text()
    assert not (
        lacking := [
            p.name
            for p in NOTEBOOKS
            if p.stem != 'index'
            and not re.search(
                rf'^\| \[[^]]+\]\({re.escape(p.relative_to(ROOT).as_posix())}\) \| ', text, re.M
            )
        ]
    ), f'give them a row in the table of nbs/index.ipynb, then make readme: {lacking}'


def test_public_methods_have_docstrings():
    silent = [
        f'{room}.{name}.{f.name}'
        for room, name, n, _ in _public()
        if isinstance(n, ast.ClassDef)
        for f in n.body
        if isinstance(f, ast.FunctionDef)
        and not f.name.startswith('_')
        and not ast.get_docstring(f)
    ]
    assert not silent, silent


def test_every_public_name_has_a_docstring_and_stands_in_all():
    import importlib, fewshotmeta.all as everything

    for room in ROOMS:
        module = importlib.import_module(f'fewshotmeta.{room}')
        for name in getattr(module, '__all__', []):
            value = getattr(module, name)
            assert room == 'all' or hasattr(everything, name)
            if (
                callable(value)
                and getattr(value, '__module__', '').startswith('fewshotmeta')
                and hasattr(value, '__name__')
                and value.__name__ != '<lambda>'
            ):
                assert value.__doc__ and not value.__doc__.startswith(f'{name}('), (
                    f'{room}.{name} has no docstring'
                )


def _public():
    "(room, name, node, source lines) of every function and class that a room exports."
    for room in ROOMS:
        text = (ROOT / 'fewshotmeta' / f'{room}.py').read_text()
        tree = ast.parse(text)
        names = next(
            (
                ast.literal_eval(n.value)
                for n in tree.body
                if isinstance(n, ast.Assign) and getattr(n.targets[0], 'id', '') == '__all__'
            ),
            [],
        )
        yield from (
            (room, n.name, n, text.splitlines())
            for n in tree.body
            if getattr(n, 'name', None) in names
        )


def _says_shapes(f, lines):
    "Whether the comments of the arguments or the docstring have a shape, like (tasks, n) or ()."
    text = '\n'.join(lines[f.lineno - 1 : f.body[0].end_lineno])
    return (
        bool(
            re.search(
                r'\((\)(?! ?->|:)|[\w*+…]+, ?[^()]*\)|[\w*+…]+,\))', text.partition('Tensor')[2]
            )
        )
        or 'shape' in text
    )


def test_tensors_have_shapes():
    methods = {}  # a method says them once, where it is defined first

    def takes(f):
        return any(
            'Tensor' in ast.unparse(a.annotation)
            for a in f.args.posonlyargs + f.args.args + f.args.kwonlyargs
            if a.annotation
        )

    public = [
        (room, name, f, lines)
        for room, name, n, lines in _public()
        for f in (n.body if isinstance(n, ast.ClassDef) else [n])
        if isinstance(f, ast.FunctionDef) and (not f.name.startswith('_') or f.name == '__init__')
    ]
    for room, name, f, lines in public:
        methods[f.name] = methods.get(f.name, False) or _says_shapes(f, lines)
    assert not (
        silent := [
            (room, name, f.name)
            for room, name, f, lines in public
            if takes(f) and not methods[f.name]
        ]
    ), silent


def test_every_public_function_and_class_has_an_example_or_a_test():
    cells = [
        ''.join(c['source'])
        for p in NOTEBOOKS
        for c in json.loads(p.read_text())['cells']
        if c['cell_type'] == 'code'
    ]
    text = '\n'.join(
        [c for c in cells if not re.search(r'^#\|\s*(export|default_exp)', c, re.M)]
        + [p.read_text() for p in (ROOT / 'tests').glob('*.py')]
    )
    words = set(re.findall(r'\w+', text))
    assert not (idle := [f'{room}.{name}' for room, name, *_ in _public() if name not in words]), (
        idle
    )


def test_no_pickle():
    for path in (ROOT / 'fewshotmeta').glob('*.py'):
        assert not re.search(
            r'torch\.load\(|torch\.save\(|\bpickle\b|allow_pickle', path.read_text()
        ), path


def test_settings_and_project_agree():
    settings, project = (
        configparser.ConfigParser(interpolation=None),
        tomllib.loads((ROOT / 'pyproject.toml').read_text()),
    )
    settings.read(ROOT / 'settings.ini')
    s = settings['DEFAULT']
    import fewshotmeta

    assert (
        s['version'] == fewshotmeta.__version__
        and s['allowed_cell_metadata_keys'] == 'tags'
        and s['update_pyproject'] == 'False'
    )
    assert (
        project['project']['requires-python'] == f'>={s["min_python"]}'
        and 'nbdev' not in project['tool']
    )
    needs = {re.split(r'[<>=]', d)[0] for d in project['project']['dependencies']}
    assert set(s['requirements'].split()) <= needs and not any(
        'nbdev' in d for d in project['project']['dependencies']
    )


def test_importing_the_package_needs_no_nbdev_and_no_plots():
    code = 'import sys; import fewshotmeta.all; print([m for m in ("nbdev", "matplotlib.pyplot", "papermill", "pandas", "torchvision") if m in sys.modules])'
    assert (
        subprocess.run(
            [sys.executable, '-c', code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == '[]'
    )


def test_package_data_is_installed():
    from importlib import resources

    assert sorted(
        p.name
        for p in (resources.files('fewshotmeta') / 'splits').iterdir()
        if p.name.endswith('.json')
    ) == ['cub.json', 'emnist.json', 'glyphs.json', 'mini_imagenet.json', 'omniglot.json']
