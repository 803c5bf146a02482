"""A tiny experiment, for the tests of the runner: its parameters, its notebook, its run."""

from pathlib import Path
import matplotlib.pyplot as plt
import nbformat
import pytest
from fewshotmeta.lab.parameters import merge_parameters, read_parameters
from fewshotmeta.lab.runs import run_notebook

PARAMETERS = """x = 2  # a number
name = "a"  # text
rate = 0.5
flags = [1, 2]
maybe = None
steps = (1, 2)
scale = "smoke"
"""
REPORT = """from fewshotmeta.lab.execution import report
report(square=dict(mean=x*x, ci95=None, n=1))
"""


def notebook(
    folder: Path,
    parameters: str = PARAMETERS,
    *cells: str,  # the others; none: `REPORT`
    tag: bool = True,  # whether the first cell is tagged
) -> Path:
    "Write an experiment."
    folder.mkdir(parents=True, exist_ok=True)
    sources = (parameters, *(cells or (REPORT,)))
    nb = nbformat.v4.new_notebook(
        metadata={'kernelspec': {'name': 'python3', 'display_name': 'python3'}},
        cells=[nbformat.v4.new_code_cell(source) for source in sources],
    )
    if tag:
        nb.cells[0].metadata['tags'] = ['parameters']
    nbformat.write(nb, folder / 'exp.ipynb')
    return folder / 'exp.ipynb'


def run(nb, given=None, name='demo/one', **options):
    "Run it, in `runs` beside it."
    return run_notebook(nb, given, name, runs=nb.parent / 'runs', quiet=True, **options)


def folder_of(nb, name='demo/one'):
    "The folder of its run."
    return nb.parent / 'runs' / name


def files(nb, name='demo/one'):
    "What a run left."
    return sorted(p.name for p in folder_of(nb, name).iterdir())


def cells_of(nb, given):
    "The code that a run executes cell by cell, without magics; behind the parameters its own."
    values = {k: v for k, v in merge_parameters(read_parameters(nb), given).items() if k in given}
    for cell in nbformat.read(nb, 4).cells:
        if cell.cell_type == 'code' and not cell.source.startswith('#| hide'):
            lines = [line for line in cell.source.splitlines() if not line.startswith('%')]
            yield '\n'.join(lines)
            if 'parameters' in cell.metadata.get('tags', []):
                yield '\n'.join(f'{k} = {v!r}' for k, v in values.items())


def run_here(nb, given, folder):
    "Execute a notebook in this process, as a run in `folder` that needs no kernel: its report."
    shown, names = [], {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('FEWSHOTMETA_RUN', str(folder))
        patch.setattr('IPython.display.display', shown.append)
        patch.setattr(plt, 'show', lambda: plt.close('all'))
        for source in cells_of(nb, given):
            exec(source, names)
    plt.close('all')
    (reported,) = [thing.result for thing in shown if hasattr(thing, 'result')]
    return reported
