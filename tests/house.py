"""What a program can see of the house rules: who imports whom, and how the code is laid out."""

import ast
import json
import re
from pathlib import Path

WINGS = ('data', 'engine', 'learners', 'training', 'lab')
WIDEST = 100  # columns
LONGEST = 30  # lines of a function's body
CELL = 40  # lines of a cell that is exported


def source(cell):
    return ''.join(cell['source'])


def plain(text):
    "A cell's code without directives and magics, line for line."
    lines = text.splitlines()
    return '\n'.join('' if re.match(r'\s*(#\||%|!)', line) else line for line in lines)


def cells_of(notebook):
    return json.loads(Path(notebook).read_text(encoding='utf-8'))['cells']


def codes_of(notebook):
    return [c for c in cells_of(notebook) if c['cell_type'] == 'code']


def rooms(nbs):
    "Room (`data.files`) to its notebook, in the order in which rooms may import each other."
    found = {}
    for wing in WINGS:
        for path in sorted((Path(nbs) / wing).glob('*.ipynb')):
            text = '\n'.join(map(source, codes_of(path)))
            found[re.search(r'#\| default_exp ([\w.]+)', text)[1]] = path
    return found


def imports(room, text):
    "(room or package imported from, name) of every import of ours, wherever it stands."
    here = room.split('.')
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom):
            module = node.module or ''
            if node.level:
                above = here[: -node.level]
                module = '.'.join(['fewshotmeta', *above, *filter(None, [module])])
            if module.split('.')[0] == 'fewshotmeta':
                yield from ((module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith('fewshotmeta.'):
                    yield alias.name, ''


def wall_faults(package, order):
    "Imports that go upwards, take everything, or take what is private."
    place = {name: i for i, name in enumerate(order)}
    faults = []
    for room in order:
        text = (Path(package) / (room.replace('.', '/') + '.py')).read_text(encoding='utf-8')
        for module, name in imports(room, text):
            target = module.removeprefix('fewshotmeta').lstrip('.')
            if f'{target}.{name}'.lstrip('.') in place:
                target = f'{target}.{name}'.lstrip('.')
            if target in place and place[target] >= place[room]:
                faults.append(f'{room} imports {target}, which stands above it')
            if target == 'all':
                faults.append(f'{room} imports from all, the top of the house')
            if name == '*':
                faults.append(f'{room} imports everything from {target}')
            if name.startswith('_') and not name.startswith('__'):
                faults.append(f'{room} imports {name}, which is private to {target}')
    return faults


def _bodies(node):
    return [b for b in (getattr(node, f, None) for f in ('body', 'orelse', 'finalbody')) if b]


def _shared_lines(node):
    "Lines on which a statement of this node begins beside another one."
    blocks = ast.If, ast.For, ast.While, ast.With, ast.Try, ast.FunctionDef
    lines = []
    for body in _bodies(node):
        if isinstance(body, list) and isinstance(body[0], ast.stmt):
            at = [s.lineno for s in body]
            lines += sorted({n for n in at if at.count(n) > 1})
            if isinstance(node, blocks) and at[0] == node.lineno:
                lines.append(at[0])
    return lines


def _stored_lambdas(node):
    "Lines on which this node keeps a lambda: under a name, in a dict, as a keyword argument."
    values = []
    if isinstance(node, ast.Dict):
        values = node.values
    elif isinstance(node, ast.keyword | ast.Assign):
        values = [node.value]
    return [v.lineno for v in values if isinstance(v, ast.Lambda)]


def body_lines(function):
    "Lines of a function without its signature and docstring."
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return function.end_lineno - body[0].lineno + 1 if body else 0


def layout_faults(where, text):
    "Lines that are too wide, statements that share a line, lambdas that are kept."
    wide = [i for i, line in enumerate(text.splitlines(), 1) if len(line) > WIDEST]
    faults = [f'{where}, line {i}: over {WIDEST} columns' for i in wide]
    for node in ast.walk(ast.parse(text)):
        faults += [f'{where}, line {i}: two statements on a line' for i in _shared_lines(node)]
        faults += [f'{where}, line {i}: a stored lambda' for i in _stored_lambdas(node)]
    return faults


def length_faults(where, text):
    "Functions that are too long."
    functions = ast.FunctionDef, ast.AsyncFunctionDef
    found = [n for n in ast.walk(ast.parse(text)) if isinstance(n, functions)]
    long = [f for f in found if body_lines(f) > LONGEST]
    return [f'{where}: {f.name} has {body_lines(f)} lines, {LONGEST} at most' for f in long]
