"""The examples on a room's own page as a test of its module, for mutants of it.

`make test` runs the pages with what stands in them; `pytest tests/pages.py` with what is exported.
"""

import importlib
import re
import pytest
from conftest import ROOT
from house import codes_of, plain, rooms, source
from mutants import TESTS

OTHERS = re.compile(r'#\| *(export|default_exp|data|eval: false)|google\.colab|nbdev_export')


@pytest.mark.parametrize('room', TESTS)
def test_page(room, monkeypatch):
    notebook = rooms(ROOT / 'nbs')[room]
    monkeypatch.chdir(notebook.parent)
    names = dict(vars(importlib.import_module(f'fewshotmeta.{room}')))
    for cell in codes_of(notebook):
        if not OTHERS.search(source(cell)):
            exec(plain(source(cell)), names)
