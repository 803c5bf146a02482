"""The published numbers: as many as the tables have cells, digits as printed, one reference a cell, errors that help."""

import csv, re, subprocess, sys, tomllib
from collections import Counter
from importlib import resources
import pytest
from conftest import ROOT
from fewshotmeta.all import *
from fewshotmeta.lab.published import _everything

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
    cells, spoken = (
        [p for p in published(id) if p.table != 'text'],
        [p for p in published(id) if p.table == 'text'],
    )
    assert (len({p.row for p in cells}), len({p.column for p in cells})) == (rows, columns)
    assert (len(cells), sum(p.value is None for p in cells), len(spoken)) == (
        rows * columns,
        empty,
        text,
    )


def test_nothing_else_is_there():
    assert (
        Counter(p.id for p in published())
        == {i: r * c + t for i, (r, c, _, t) in SHAPES.items()} | REST
    )


def test_one_reference_a_cell_which_comes_first():
    assert max(Counter((p.id, p.row, p.column, p.table) for p in published()).values()) == 1
    cells = {}
    for p in published():
        cells.setdefault((p.id, p.row, p.column), []).append(p.reference)
    assert all(refs[0] and not any(refs[1:]) for refs in cells.values())


def test_the_file_is_what_is_read():
    with (resources.files('fewshotmeta') / 'published.csv').open(encoding='utf-8', newline='') as f:
        lines = list(csv.DictReader(f))
    assert set(lines[0]) == set(Published.__dataclass_fields__) - {'printed'} and len(lines) == len(
        published()
    )
    for line, p in zip(lines, published()):
        assert all(
            re.fullmatch(r'(\d+(\.\d+)?)?', line[k]) and line[k] in str(p)
            for k in ('value', 'interval')
        ), line
        assert (
            (p.value is None) == (line['value'] == '')
            and (p.interval is None or p.meaning)
            and (p.value is not None or p.note)
        ), line
    assert (
        'published.csv'
        in tomllib.loads((ROOT / 'pyproject.toml').read_text())['tool']['setuptools'][
            'package-data'
        ]['fewshotmeta']
    )


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
        assert (v := [p.value for p in published('HID-T1', row)]) == sorted(v, reverse=True)
    for p in published('HID-T1'):
        assert p.value > 100 / int(p.column) - 0.01
    for id, column in (
        ('HM-T3', 'seconds'),
        ('HM-T6', 'CUB seconds'),
        ('HM-T6', 'mini-ImageNet seconds'),
    ):
        assert (v := [p.value for p in published(id, column=column, method='MAML')]) == sorted(v)
    assert [p.steps for p in published('HM-T6', column='CUB accuracy', method='MAML')] == list(
        range(8)
    )


def test_contradictions_name_one_thing_and_begin_with_the_table():
    groups = {g[0].same: g for g in contradictions()}
    assert [(p.id, p.table, p.value) for p in groups['HyperMAML, Omniglot→EMNIST 1-shot']] == [
        ('HM-T2', 'Table 2', 79.07),
        ('HM-T2', 'text', 79.84),
        ('HM-T3', 'Table 3', 80.778),
        ('HM-T4', 'Table 4', 79.1),
    ]
    assert [p.value for p in groups['MAML++, Omniglot 20-way 1-shot']] == [
        97.65,
        97.76,
    ] and 'MAML++, Omniglot 20-way 5-shot' not in groups
    assert [p.printed for p in groups['MAML++, mini-ImageNet 5-way 5-shot']] == [
        '67.15',
        '68.32 ± 0.44',
    ]
    assert all(g[0].reference and len(g) > 1 for g in groups.values())


def test_who_measured_it():
    assert {p.measured_by for id in ('HM-T1', 'HM-T2') for p in published(id, 'MAML')} == {
        'quoted from the DKT paper (Patacchiola et al. 2020)'
    }
    assert {
        p.measured_by
        for id in ('HM-T3', 'HM-T4', 'HM-T6', 'HID-T1', 'HID-T2')
        for p in published(id)
    } == {'the paper'}
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
    lines = published_table(id).split('\n\n')[0].splitlines()
    assert len({line.count('|') for line in lines}) == 1 and len(lines) == 2 + len(
        {p.row for p in published(id)}
    )
    assert all(str(p) in published_table(id) for p in published(id))


def test_a_number_cannot_be_changed():
    with pytest.raises(AttributeError):
        published('HM-T4')[0].value = 99.0
    published().clear()
    assert published() and isinstance(_everything(), tuple)


def test_importing_it_needs_neither_torch_nor_pandas():
    code = 'import sys; import fewshotmeta.lab.published; print([m for m in ("torch", "pandas", "matplotlib") if m in sys.modules])'
    assert (
        subprocess.run(
            [sys.executable, '-c', code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == '[]'
    )
