"""The how-to pages.

Their links lead somewhere, the commands that they print can be typed, and each is found from
another.
"""

import json, re, shlex
import pytest
from conftest import ROOT

PAGES = sorted((ROOT / 'nbs' / 'howto').glob('*.ipynb'))


def cells(path, kind):
    every = json.loads(path.read_text())['cells']
    return '\n'.join(''.join(c['source']) for c in every if c['cell_type'] == kind)


def prose(path):
    return cells(path, 'markdown')


def linked(path):
    targets = re.findall(r'\]\(([^)#:]+\.ipynb)\)', prose(path))
    return {(path.parent / target).resolve() for target in targets}


def stem(path):
    return path.stem


@pytest.mark.parametrize('path', PAGES, ids=stem)
def test_form(path):
    _, *ends = prose(path).split('\n## What next\n')
    assert len(ends) == 1
    assert '\n## ' not in ends[0]
    assert not re.search(r'#\| (default_exp|export)', cells(path, 'code'))  # a page exports nothing
    assert not [p for p in linked(path) if not p.is_file()]


def test_each_is_found_from_another():
    for path in PAGES:
        assert any(path in linked(other) for other in PAGES if other != path), path.stem


def commands(text):
    "The words after `fewshotmeta` of each command that a page prints."
    launched = 'torchrun --nproc-per-node 4 -m fewshotmeta.lab.command'
    for block in re.findall(r'```\n(.*?)```', text, re.S):
        for line in block.splitlines():
            if re.match(r'(torchrun .*)?fewshotmeta', line):
                yield shlex.split(line.replace(launched, 'fewshotmeta'), comments=True)[1:]


@pytest.mark.parametrize('path', PAGES, ids=stem)
def test_commands_can_be_typed(path):
    from fewshotmeta.lab.batches import read_batch
    from fewshotmeta.lab.command import _parser
    from fewshotmeta.lab.parameters import experiment_file, merge_parameters, parse_value
    from fewshotmeta.lab.parameters import read_parameters

    for words in commands(prose(path)):
        parsed = _parser().parse_args([word for word in words if word != '…'])
        if 'parameters' in parsed:
            named = ROOT / parsed.notebook
            known = read_parameters(named if named.is_file() else experiment_file(named.name))
            given = dict(item.split('=', 1) for item in parsed.parameters)
            merge_parameters(known, {k: parse_value(known[k], v) for k, v in given.items()})
        if 'executor' in parsed:
            read_batch(ROOT / parsed.file, parsed.scale, parsed.only)
