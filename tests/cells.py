"""The cells of an experiment, executed in this process: a run without the start of a kernel."""

import os

import pytest
from execnb.nbio import read_nb
from execnb.shell import CaptureShell
from fewshotmeta.lab.execution import RESULT_TYPE
from fewshotmeta.lab.parameters import merge_parameters, read_parameters


def execute(notebook, folder, **given):
    "Execute an experiment as the run of a folder; what it reported."
    merge_parameters(read_parameters(notebook), given)
    folder.mkdir(parents=True, exist_ok=True)
    results = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('FEWSHOTMETA_RUN', str(folder))
        patch.setenv('FEWSHOTMETA_WORKERS', '1')
        shell = CaptureShell(path=os.fspath(folder))
        for cell in read_nb(notebook).cells:
            if cell.cell_type == 'code' and 'google.colab' not in cell.source:
                results += _outputs(shell, cell, given)
    (result,) = results
    return result


def _outputs(shell, cell, given):
    "The results that a cell reports; its error is raised."
    source = cell.source
    if 'parameters' in cell.metadata.get('tags', []):
        source += ''.join(f'\n{name} = {value!r}' for name, value in given.items())
    outputs = shell.run(source)
    for output in outputs:
        if output['output_type'] == 'error':
            raise AssertionError('\n'.join(output['traceback']))
    found = [output.get('data', {}).get(RESULT_TYPE) for output in outputs]
    return [result for result in found if result]
