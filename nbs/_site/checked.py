"""What the files of a run hold, as far as it can be shown, and what is wrong with them.

Anyone may commit a run. One that is damaged costs its own page something, and no other page.
"""

import ast
import json
import math
from pages import ROOT, Page

KINDS = {str: 'text', dict: 'object', float: 'number'}
# the fields of a result that pages show; those of the run's place are known without it
FIELDS = dict(
    notebook=str,
    scale=str,
    device=str,
    finished=str,
    seconds=float,
    params=dict,
    metrics=dict,
    versions=dict,
)
UNKNOWN = {str: '–', dict: {}, float: math.nan}
BROKEN = (SyntaxError, ValueError, TypeError, AttributeError, LookupError, RecursionError)


def is_a(kind, value) -> bool:
    "Say whether a value of JSON is of a kind; a number is finite."
    if kind is not float:
        return isinstance(value, kind)
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    return abs(value) < 1e18


def read_part(page: Page, name: str) -> tuple[dict, list[str]]:
    "Read one of a run's two files, an object in JSON; empty if it is none."
    path = ROOT / page.source.replace('notebook.ipynb', name)
    try:
        found = json.loads(path.read_text(encoding='utf-8'))
    except (OSError, ValueError, RecursionError) as e:
        return {}, [f'{name} cannot be read: {e}']
    return (found, []) if isinstance(found, dict) else ({}, [f'{name} holds no object'])


def is_measured(found) -> bool:
    "Say whether a metric has a mean, a number of tasks, and an interval or None."
    if not isinstance(found, dict):
        return False
    numbers = [found.get(name) for name in ('mean', 'n')]
    if found.get('ci95') is not None:
        numbers.append(found['ci95'])
    return all(is_a(float, number) for number in numbers)


def metrics_shown(metrics: dict) -> tuple[dict, list[str]]:
    "Leave out what has no number; say so of the accuracy."
    found = metrics.get('test_accuracy')
    if not found:
        return {}, []
    if is_measured(found):
        return {k: dict(ci95=None) | v for k, v in metrics.items() if is_measured(v)}, []
    return {}, [f'result.json has test_accuracy={found!r:.60}, no mean, ci95 and n']


def checked_result(page: Page) -> tuple[dict, list[str]]:
    "Read a run's result: what is malformed is unknown, and said."
    found, faults = read_part(page, 'result.json')
    _, experiment, run, _ = page.source.split('/')
    result = found | dict(experiment=experiment, run=run)
    for name in ('experiment', 'run'):
        if is_a(str, found.get(name)):
            result[name] = found[name]
    for name, kind in FIELDS.items():
        value = found.get(name)
        if is_a(kind, value) or name == 'scale' and value is None:
            result[name] = UNKNOWN[kind] if value is None else value
            continue
        result[name] = UNKNOWN[kind]
        if found:
            faults.append(f'result.json has {name}={value!r:.60}, no {KINDS[kind]}')
    result['metrics'], more = metrics_shown(result['metrics'])
    return result, faults + more


def result_of(page: Page) -> dict:
    return checked_result(page)[0]


def is_valid(cells) -> bool:
    "Say whether cells are such as notebooks have, whatever their ids."
    from nbformat.validator import isvalid

    try:
        named = [cell | dict(id=f'cell-{i}') for i, cell in enumerate(cells)]
        return isvalid(dict(cells=named, metadata={}, nbformat=4, nbformat_minor=5))
    except BROKEN:
        return False


def checked_notebook(page: Page) -> tuple[dict, list[str]]:
    "Read a run's notebook without the cells that are none."
    found, faults = read_part(page, 'notebook.ipynb')
    cells = found.get('cells', [])
    if not is_valid(cells):
        cells = cells if isinstance(cells, list) else []
        wrong = [i for i, cell in enumerate(cells, 1) if not is_valid([cell])]
        faults += [f'cell {i} of notebook.ipynb is malformed' for i in wrong]
        cells = [cell for i, cell in enumerate(cells, 1) if i not in wrong]
    if not cells:
        faults.append('notebook.ipynb has no cells')
    return dict(cells=cells), faults


def notebook_of(page: Page) -> dict:
    return checked_notebook(page)[0]


def parameters(nb, tag='parameters') -> dict:
    "Read the parameters in a notebook's cell with this tag: its own, or those papermill put in."
    cell = next((c for c in nb['cells'] if tag in c['metadata'].get('tags', [])), None)
    lines = ast.parse(''.join(cell['source'])).body if cell else []
    return {n.targets[0].id: ast.literal_eval(n.value) for n in lines if isinstance(n, ast.Assign)}


def asked_of(nb) -> tuple[dict, list[str]]:
    "Read the parameters that a run was given."
    try:
        return parameters(nb, 'injected-parameters'), []
    except BROKEN as e:
        return {}, [f'its parameters cannot be read: {e}']


def is_whole(page: Page) -> bool:
    "Say whether nothing is wrong with a run's files."
    return not checked_result(page)[1] and not checked_notebook(page)[1]
