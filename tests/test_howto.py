"""The how-to pages: their links lead somewhere, the commands that they print can be typed, and each is found from another."""

import json, re, shlex
import pytest
from conftest import ROOT

PAGES = sorted((ROOT / 'nbs' / 'howto').glob('*.ipynb'))


def cells(path, kind):
    return '\n'.join(
        ''.join(c['source'])
        for c in json.loads(path.read_text())['cells']
        if c['cell_type'] == kind
    )


def prose(path):
    return cells(path, 'markdown')


def linked(path):
    return {
        (path.parent / target).resolve()
        for target in re.findall(r'\]\(([^)#:]+\.ipynb)\)', prose(path))
    }


@pytest.mark.parametrize('path', PAGES, ids=lambda p: p.stem)
def test_form(path):
    assert prose(path).count('\n## What next\n') == 1 and not prose(path).split('\n## What next\n')[
        1
    ].count('\n## ')
    assert not re.search(r'#\| (default_exp|export)', cells(path, 'code'))  # a page exports nothing
    assert not [p for p in linked(path) if not p.is_file()]


def test_each_is_found_from_another():
    for path in PAGES:
        assert any(path in linked(other) for other in PAGES if other != path), path.stem


@pytest.mark.parametrize('path', PAGES, ids=lambda p: p.stem)
def test_commands_can_be_typed(path):
    from fewshotmeta.lab.command import _parser
    from fewshotmeta.lab.batches import read_batch
    from fewshotmeta.lab.runs import merge_parameters, parse_value, read_parameters

    lines = [
        shlex.split(
            l.replace('torchrun --nproc-per-node 4 -m fewshotmeta.lab.command', 'fewshotmeta'),
            comments=True,
        )[1:]
        for block in re.findall(r'```\n(.*?)```', prose(path), re.S)
        for l in block.splitlines()
        if re.match(r'(torchrun .*)?fewshotmeta', l)
    ]
    for line in lines:
        a = _parser().parse_args([w for w in line if w != '…'])
        if 'parameters' in a:
            known = read_parameters(ROOT / a.notebook)
            given = dict(item.split('=', 1) for item in a.parameters)
            merge_parameters(known, {k: parse_value(known[k], v) for k, v in given.items()})
        if 'executor' in a:
            read_batch(ROOT / a.file, a.scale, a.only)
