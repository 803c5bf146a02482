"""The published numbers: all of them, digits as printed, one reference a cell, errors that help."""

import csv
import re
import subprocess
import sys
import tomllib
from collections import Counter
from importlib import resources

import pytest
from conftest import ROOT
from fewshotmeta.lab.published import (
    MISSING,
    Published,
    _everything,
    contradictions,
    markdown_table,
    published,
    published_table,
    reference,
)

# counted in the papers: rows, columns, cells without a number, numbers that only the text has
SHAPES = {
    'MPP-T1': (7 + 2 + 5, 2, 1 + 5, 2),
    'MPP-T4': (9, 2, 1, 0),
    'HID-T1': (6 + 1, 14, 0, 0),
    'HID-T2': (5 + 4 + 4 + 1, 9, 0, 0),
    'HID-F3': (2, 1, 0, 0),
    'HM-T1': (20, 4, 21, 0),
    'HM-T5': (19, 4, 31, 0),
    'HM-T2': (13, 4, 0, 2),
    'HM-T3': (10 + 1, 2, 0, 0),
    'HM-T4': (4, 1, 0, 0),
    'HM-T6': (8 + 1, 4, 0, 0),
}
REST = {
    'MAML': 2,
    'MPP-T2': 3 + 1,
    'MPP-T3': 1,
    'MPP-text': 3,
    'HID-F1': 1,
    'HID-text': 2,
    'HM-text': 2,
}


@pytest.mark.parametrize('id', SHAPES)
def test_a_table_has_as_many_numbers_as_cells(id):
    rows, columns, empty, text = SHAPES[id]
    cells = [p for p in published(id) if p.table != 'text']
    spoken = [p for p in published(id) if p.table == 'text']
    assert (len({p.row for p in cells}), len({p.column for p in cells})) == (rows, columns)
    assert len(cells) == rows * columns
    assert sum(p.value is None for p in cells) == empty
    assert len(spoken) == text


def test_nothing_else_is_there():
    shapes = {id: rows * columns + text for id, (rows, columns, _, text) in SHAPES.items()}
    assert Counter(p.id for p in published()) == shapes | REST


def test_one_reference_a_cell_which_comes_first():
    assert max(Counter((p.id, p.row, p.column, p.table) for p in published()).values()) == 1
    cells = {}
    for p in published():
        cells.setdefault((p.id, p.row, p.column), []).append(p.reference)
    assert all(refs[0] and not any(refs[1:]) for refs in cells.values())


def test_the_file_is_what_is_read():
    file = resources.files('fewshotmeta.lab') / 'published.csv'
    with file.open(encoding='utf-8', newline='') as f:
        lines = list(csv.DictReader(f))
    assert set(lines[0]) == set(Published.__dataclass_fields__) - {'printed'}
    assert len(lines) == len(published())
    for line, p in zip(lines, published()):
        for k in ('value', 'interval'):
            assert re.fullmatch(r'(\d+(\.\d+)?)?', line[k]), line
            assert line[k] in str(p), line
        assert (p.value is None) == (line['value'] == ''), line
        assert p.interval is None or p.meaning, line
        assert p.value is not None or p.note, line


def test_the_file_is_installed():
    settings = tomllib.loads((ROOT / 'pyproject.toml').read_text())
    assert 'published.csv' in settings['tool']['setuptools']['package-data']['fewshotmeta.lab']


@pytest.mark.parametrize(
    'id,row,column,printed',
    [
        ('MPP-T1', 'Siamese Nets', '20-way 1-shot', '88.2'),
        ('MPP-T1', 'MAML + DA', '20-way 1-shot', '92.3 ± 0.55'),
        ('MPP-T1', 'MAML++', '20-way 5-shot', '99.33 ± 0.03'),
        ('MPP-T4', 'MAML (original)', '5-way 5-shot', '99.9 ± 0.1'),
        ('MPP-T4', 'MAML++', '5-way 1-shot', '99.47'),
        ('MPP-T2', 'MAML++, 1 step', 'mini-ImageNet 5-way 1-shot', '51.05'),
        ('HID-F3', 'one row of the head for all rows', 'Omniglot 10-way 5-shot', '94.49'),
        ('HID-T1', 'hidra 2', '2', '82.95'),
        ('HID-T1', 'hidra 4-6', '15', '36.34'),
        ('HID-T1', 'maml', '14', '7.143'),
        ('HID-T2', 'hidra 5-30, α 0.4, 1 step', '10', '98.05'),
        ('HID-T2', 'hidra 10, α 0.01, 3 steps', '4', '87.72'),
        ('HID-T2', 'maml', '2', '98.16'),
        ('HM-T1', 'Feature Transfer', 'CUB 1-shot', '46.19 ± 0.64'),
        ('HM-T1', 'HyperMAML', 'mini-ImageNet 5-shot', '66.29 ± 0.43'),
        ('HM-T1', 'PPA', 'CUB 5-shot', '–'),
        ('HM-T5', 'SNAIL', 'mini-ImageNet 5-shot', '55.20'),
        ('HM-T5', 'OVE PG GP + Cosine (PL)', 'CUB 5-shot', '79.07 ± 0.05'),
        ('HM-T2', 'Bayesian MAML', 'mini-ImageNet→CUB 5-shot', '51.35 ± 0.16'),
        ('HM-T3', 'MAML, 100 steps', 'seconds', '212.62 ± 2.24'),
        ('HM-T4', 'switch', 'accuracy', '76.89 ± 0.71'),
        ('HM-T6', 'HyperMAML', 'mini-ImageNet seconds', '11.11 ± 0.25'),
        ('MPP-T3', 'MAML and MAML++', 'seconds an iteration, 1 to 5 inner steps', MISSING),
        ('HID-F1', 'random initialisation', 'mini-ImageNet, all numbers of ways', MISSING),
    ],
)
def test_corners(id, row, column, printed):
    assert str(reference(id, row, column)) == printed


def test_numbers_have_the_shape_of_what_they_measure():
    for p in published():
        assert p.value is None or p.unit != '%' or 0 < p.value < 100
    for row in {p.row for p in published('HID-T1')}:
        values = [p.value for p in published('HID-T1', row)]
        assert values == sorted(values, reverse=True)
    for p in published('HID-T1'):
        assert p.value > 100 / int(p.column) - 0.01
    times = [('HM-T3', 'seconds'), ('HM-T6', 'CUB seconds'), ('HM-T6', 'mini-ImageNet seconds')]
    for id, column in times:
        values = [p.value for p in published(id, column=column, method='MAML')]
        assert values == sorted(values)
    maml = published('HM-T6', column='CUB accuracy', method='MAML')
    assert [p.steps for p in maml] == list(range(8))


def test_contradictions_name_one_thing_and_begin_with_the_table():
    groups = {g[0].same: g for g in contradictions()}
    assert [(p.id, p.table, p.value) for p in groups['HyperMAML, Omniglot→EMNIST 1-shot']] == [
        ('HM-T2', 'Table 2', 79.07),
        ('HM-T2', 'text', 79.84),
        ('HM-T3', 'Table 3', 80.778),
        ('HM-T4', 'Table 4', 79.1),
    ]
    assert [p.value for p in groups['MAML++, Omniglot 20-way 1-shot']] == [97.65, 97.76]
    assert 'MAML++, Omniglot 20-way 5-shot' not in groups
    mini = groups['MAML++, mini-ImageNet 5-way 5-shot']
    assert [p.printed for p in mini] == ['67.15', '68.32 ± 0.44']
    assert all(g[0].reference and len(g) > 1 for g in groups.values())


def measured_by(ids, *names):
    "Who measured the numbers of some tables."
    return {p.measured_by for id in ids for p in published(id, *names)}


def test_who_measured_it():
    quoted = 'quoted from the DKT paper (Patacchiola et al. 2020)'
    assert measured_by(('HM-T1', 'HM-T2'), 'MAML') == {quoted}
    own = ('HM-T3', 'HM-T4', 'HM-T6', 'HID-T1', 'HID-T2')
    assert measured_by(own) == {'the paper'}
    assert not any(p.interval for p in published(paper='Drumond et al. 2020'))


@pytest.mark.parametrize(
    'look,says',
    [
        (lambda: published('MPP-T9'), "id='MPP-T9' was not published, did you mean 'MPP-T"),
        (lambda: published('HID-T1', 'hidra 3'), "row='hidra 3'"),
        (lambda: published('MPP-T1', column='20-way 1 shot'), "did you mean '20-way 1-shot'"),
        (lambda: published(inner_steps=5), "no field 'inner_steps'"),
        (lambda: reference('HID-T2', 'maml', '11'), "column='11'"),
        (lambda: published_table('HM-T9'), "id='HM-T9'"),
    ],
)
def test_errors_name_the_nearest(look, says):
    with pytest.raises(ValueError) as e:
        look()
    assert says in str(e.value)


@pytest.mark.parametrize('id', [*SHAPES, *REST])
def test_tables_are_whole(id):
    table = published_table(id)
    lines = table.split('\n\n')[0].splitlines()
    assert len({line.count('|') for line in lines}) == 1
    assert len(lines) == 2 + len({p.row for p in published(id)})
    assert all(str(p) in table for p in published(id))


def test_a_table_in_markdown():
    table = markdown_table(['a', 'b'], [[1, 'x'], (2.5, None)], ['---', '---:'])
    assert table == '| a | b |\n| --- | ---: |\n| 1 | x |\n| 2.5 | None |'
    assert markdown_table(['', ''], []) == '|  |  |\n| --- | --- |'


def test_a_number_cannot_be_changed():
    with pytest.raises(AttributeError):
        published('HM-T4')[0].value = 99.0
    published().clear()
    assert published() and isinstance(_everything(), tuple)


LOOK = '''
import sys
import fewshotmeta.lab.published
print([m for m in ("torch", "pandas", "matplotlib") if m in sys.modules])
'''


def test_importing_it_needs_neither_torch_nor_pandas():
    out = subprocess.run([sys.executable, '-c', LOOK], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == '[]'
