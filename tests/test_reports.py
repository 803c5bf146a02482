"""Ours beside the published numbers: which runs count, what several seeds give, what a cell says that has no run."""

import statistics
import pytest
from conftest import ROOT
from fewshotmeta.lab.batches import read_batch
from fewshotmeta.data.files import BadFile, write_json
from fewshotmeta.all import *


def result(run, seed=0, mean=0.9, ci95=0.01, scale='short', n=600, experiment='table', **params):
    return dict(
        experiment=experiment,
        run=run,
        scale=scale,
        params=dict(seed=seed, scale=scale, method='maml') | params,
        metrics=dict(
            test_accuracy=dict(mean=mean, ci95=ci95, n=n),
            test_accuracy_8way=dict(mean=mean / 2, ci95=ci95, n=n),
            seconds=dict(mean=8.5, ci95=None, n=600),
        ),
    )


@pytest.fixture
def runs(tmp_path):
    "`runs(result, …)` writes results where a batch would and gives their folder."

    def write(*results):
        for r in results:
            write_json(tmp_path / 'runs' / r['experiment'] / r['run'] / 'result.json', r)
        return tmp_path / 'runs'

    return write


def test_runs_are_grouped_by_name_at_their_largest_scale(runs):
    seeds = [result(f'maml_1shot_short_seed{k}', k) for k in (10, 2, 0)]
    paper = (
        result('mamlpp_1shot_paper_seed0', scale='paper'),
        result('mamlpp_1shot_short_seed0'),
        result('mamlpp_1shot_short_seed1', 1),
    )
    found = find_runs(
        runs(
            *seeds,
            *paper,
            result('alone', scale='short'),
            result('maml_1shot_smoke_seed0', scale='smoke'),
            result('new_smoke', scale='smoke'),
            result('other_short', experiment='else'),
        ),
        'table',
    )
    assert list(found) == ['alone', 'maml_1shot', 'mamlpp_1shot']
    assert [r['params']['seed'] for r in found['maml_1shot']] == [0, 2, 10] and [
        r['scale'] for r in found['mamlpp_1shot']
    ] == ['paper']
    assert (
        list(find_runs(runs(), 'table', 'mamlpp')) == ['mamlpp_1shot']
        and find_runs(runs(), 'nothing') == {}
    )


def test_a_name_keeps_what_only_looks_like_a_scale(runs):
    assert list(
        find_runs(runs(result('short_paper_short_seed0'), result('maml_seed1_x_short')), 'table')
    ) == ['maml_seed1_x', 'short_paper']


def test_an_altered_result_stops_the_report(runs):
    path = runs(result('maml_short_seed0')) / 'table/maml_short_seed0/result.json'
    path.write_text(path.read_text().replace('0.9', '0.99'))
    with pytest.raises(BadFile, match='--force'):
        find_runs(path.parents[2], 'table')


def test_seeds_give_mean_and_standard_deviation(runs):
    means = (0.9, 0.92, 0.97)
    found = find_runs(
        runs(*(result(f'maml_short_seed{k}', k, m) for k, m in enumerate(means))), 'table'
    )['maml']
    o, one = measured(found), measured(found[:1])
    assert (o.mean, o.interval) == pytest.approx((sum(means) / 3, statistics.stdev(means))) and (
        o.meaning,
        o.seeds,
        o.n,
    ) == ('standard deviation over 3 seeds', 3, 600)
    assert (one.mean, one.interval, one.meaning, one.seeds) == (0.9, 0.01, '95 % over 600 tasks', 1)
    assert (
        measured(found, 'test_accuracy_8way').mean == pytest.approx(o.mean / 2)
        and measured(found[:1], 'seconds').interval is None
    )


def test_what_is_not_one_configuration_is_refused(runs):
    found = find_runs(
        runs(
            result('maml_short_seed0'),
            result('maml_short_seed1', 1, n_way=5),
            result('maml_short_seed2', 2, method='fomaml'),
        ),
        'table',
    )['maml']
    assert measured(found[:2]).seeds == 2  # a parameter that one of them did not know yet
    for results, says in (
        (found, 'method'),
        (found[:1] * 2, 'same seed twice'),
        ([result('x_smoke', scale='smoke')], 'smoke run'),
    ):
        with pytest.raises(ValueError, match=says):
            measured(results)
    with pytest.raises(ValueError, match="no metric 'test_acc"):
        measured(found[:1], 'test_acc')


def test_beside_says_what_is_and_what_is_not(runs):
    folder = runs(result('maml_short_seed0', mean=0.91234, ci95=0.00456))
    found = find_runs(folder, 'table')
    rows = beside(
        'MPP-T1',
        {
            ('MAML++', '20-way 5-shot'): [],
            ('MAML++', '20-way 1-shot'): found['maml'],
            ('Meta-SGD', '20-way 1-shot'): NO_DATA,
        },
        folder.parent / 'nbs/reports',
    )
    assert [(r['row'], r['ours']) for r in rows] == [
        ('Meta-SGD', NO_DATA),
        ('MAML++', '91.23 ± 0.46'),
        ('MAML++', NO_RUN),
    ]  # in the published order
    assert rows[1] == {
        'row': 'MAML++',
        'column': '20-way 1-shot',
        'published': '97.65 ± 0.05 (text: 97.76)',
        'published ±': 'standard deviation over 3 seeds',
        'ours': '91.23 ± 0.46',
        'ours ±': '95 % over 600 tasks',
        'scale': 'short',
        'seeds': 1,
        'tasks': 600,
        'queries': '',
        'run': '[maml_short_seed0](../../runs/table/maml_short_seed0/notebook.ipynb)',
    }
    table, _, under = beside_table(
        rows + [dict(row='Siamese Nets', column='20-way 1-shot', published='88.2', ours=NOT_BUILT)]
    ).partition('\n\n')
    assert len(table.splitlines()) == 5 and {line.count('|') for line in table.splitlines()} == {11}
    shown = [[v.strip() for v in line.split('|')[1:-1]] for line in table.splitlines()[2:]]
    assert [(r[1], r[2][-3:], r[3]) for r in shown] == [
        ('20-way 1-shot', '(a)', NO_DATA),
        ('20-way 1-shot', '(b)', '91.23 ± 0.46'),
        ('20-way 5-shot', '(b)', NO_RUN),
    ]
    assert shown[1][4:] == [
        '95 %',
        'short',
        '1',
        '600',
        '',
        '[seed0](../../runs/table/maml_short_seed0/notebook.ipynb)',
    ]
    assert (
        under.startswith(
            'Published ±: (a) as quoted; (b) standard deviation over 3 seeds. Ours ±: 95 % is the interval of the mean over the test tasks.\n\n<details>'
        )
        and '- Siamese Nets: 20-way 1-shot 88.2' in under
    )


def test_columns_without_data_come_last_and_one_meaning_has_no_letter():
    rows = [
        dict(zip(('row', 'column', 'published', 'published ±', 'ours'), r))
        for r in (
            ('A', 'CUB', '1', 'x', NO_DATA),
            ('A', 'mini', '2', 'x', NO_RUN),
            ('B', 'CUB', '3', 'x', NO_DATA),
            ('B', 'mini', '4', 'x', NO_DATA),
        )
    ]
    table, _, under = beside_table(rows).partition('\n\n')
    assert [line.split('|')[3].strip() for line in table.splitlines()[2:]] == [
        '2',
        '4',
        '1',
        '3',
    ] and under == 'Published ±: x.'


def test_units_and_other_metrics(runs):
    found = find_runs(runs(result('maml_short_seed0', mean=0.5)), 'table')['maml']
    assert (
        beside('HM-T3', {('MAML, 5 steps', 'seconds'): measured(found, 'seconds')})[0]['ours']
        == '8.50'
    )
    assert (
        beside('HID-T1', {('maml', '8'): measured(found, 'test_accuracy_8way')})[0]['ours']
        == '25.00 ± 1.00'
    )


def test_a_missing_table_takes_any_row_and_others_do_not(runs):
    found = find_runs(runs(result('maml_short_seed0')), 'table')['maml']
    (row,) = beside('MPP-T2', {('MAML, 3 steps', 'mini-ImageNet 5-way 1-shot'): found})
    assert (row['published'], row['ours'], row['published ±']) == (
        'not in our copy',
        '90.00 ± 1.00',
        '',
    )
    for cell, says in (
        (('MAML+', '20-way 1-shot'), "did you mean 'MAML"),
        (('MAML++', '20-way'), "column='20-way'"),
    ):
        with pytest.raises(ValueError, match=says):
            beside('MPP-T1', {cell: found})


def test_links_of_the_committed_runs_lead_somewhere():
    found = find_runs(ROOT / 'runs', 'omniglot')
    assert {len(rs) for rs in found.values()} <= {1, 2, 3} and all(
        (r['folder'] / 'notebook.ipynb').is_file() for rs in found.values() for r in rs
    )
    (row,) = beside(
        'MPP-T1',
        {('MAML++', '20-way 1-shot'): found['mamlpp_20way_1shot_5steps']},
        ROOT / 'nbs/reports',
    )
    link = row['run'].split('](')[1].rstrip(')')
    assert (
        link.startswith('../../runs/omniglot/')
        and (ROOT / 'nbs/reports' / link).resolve().is_file()
    )


def ours(mean, ci95=0.01):
    return Ours(mean, ci95, '95 % over 600 tasks', 600, 1, 'short', ())


def test_every_cell_of_a_table_has_an_answer(runs):
    names = {'MAML++': 'mamlpp', 'Meta-SGD': 'meta_sgd'}
    found = find_runs(runs(result('mamlpp_1shot_short_seed0')), 'table')
    cells = every_cell(
        'MPP-T1',
        names,
        lambda row, column: found.get(f'{names[row]}_{"1shot" if "1-shot" in column else "5shot"}'),
    )
    assert (
        cells['MAML++', '20-way 1-shot'][0]['run'] == 'mamlpp_1shot_short_seed0'
        and cells['Meta-SGD', '20-way 5-shot'] is None
        and cells['Matching Nets', '20-way 1-shot'] == NOT_BUILT
    )
    assert ('MAML + MSL', '20-way 5-shot') not in cells and len(
        cells
    ) == 22  # an empty cell of the paper is none of ours


def test_a_wide_table(runs):
    found = find_runs(runs(result('hidra_short_seed0', mean=0.8)), 'table')['hidra']
    text = wide_table(
        beside(
            'HID-T1',
            {
                ('hidra 2', '2'): measured(found),
                ('hidra 2', '3'): None,
                ('hidra 5', '2'): None,
                ('maml', '3'): NO_DATA,
            },
        )
    )
    head, _, two, five, maml = [
        [c.strip() for c in line.split('|')[1:-1]] for line in text.splitlines()
    ]
    assert (
        head == ['', 'run', '2', '3', 'scale', 'seeds', 'tasks', 'queries', '±']
        and two[2:7] == ['82.95 → 80.00 ± 1.00', '72.93 → –', 'short', '1', '600']
        and two[1].startswith('[hidra](')
        and 'notebook.ipynb' in two[1]
    )
    assert five[1:4] == [NO_RUN, '77.48 → –', ''] and maml[1:4] == [NO_DATA, '', '70.06 → –']


def test_what_has_been_run_of_a_batch_file(tmp_path):
    file = ROOT / 'nbs' / 'experiments' / 'mamlpp_t4.yaml'

    def of():
        return [c.strip() for c in coverage([file], tmp_path).splitlines()[2].split('|')[1:-1]]

    assert of() == [
        'mamlpp_t4.yaml',
        '0 of 6',
        'maml_1shot, mamlpp_1shot, meta_sgd_1shot, maml_5shot, mamlpp_5shot, meta_sgd_5shot',
        '–',
    ]
    for p in read_batch(file, 'short', 'm*_1shot*', tmp_path):
        write_json(p.folder / 'result.json', {})
    assert of()[1:3] == ['3 of 6', 'maml_5shot, mamlpp_5shot, meta_sgd_5shot']
    assert [
        line.split('|')[4].strip()
        for line in coverage([file.with_name('mamlpp_t2.yaml')], tmp_path).splitlines()[2:]
    ] == ['16']


@pytest.mark.parametrize(
    'a,b,verdict', [(0.9, 0.8, AGREES), (0.8, 0.9, OPPOSITE), (0.9, 0.895, TOGETHER)]
)
def test_order_of_two_methods(a, b, verdict):
    cells = {
        ('MAML (local replication)', '20-way 1-shot'): ours(b),
        ('MAML++', '20-way 1-shot'): ours(a),
        ('MAML++', '20-way 5-shot'): ours(0.1),
        ('Siamese Nets', '20-way 1-shot'): NOT_BUILT,
    }
    (pair,) = orders('MPP-T1', cells)
    assert (
        (pair['higher'], pair['lower'], pair['verdict'])
        == ('MAML++', 'MAML (local replication)', verdict)
        and pair['seeds'] == '1, 1'
        and pair['published'] == '+6.38 ± 1.07'
        and pair['ours'] == f'{100 * (a - b):+.2f} ± 1.41'
    )
    assert f'1 {verdict}' in orders_table([pair]) and (verdict == AGREES) == (
        'MAML++' not in orders_table([pair])
    )


def test_runs_of_different_scales_are_not_compared():
    from dataclasses import replace

    (pair,) = orders(
        'MPP-T1',
        {
            ('MAML (local replication)', '20-way 1-shot'): replace(ours(0.95), scale='paper'),
            ('MAML++', '20-way 1-shot'): ours(0.9),
        },
    )
    assert pair['verdict'] == 'scales differ' and '1 scales differ' in orders_table([pair])


def test_what_the_paper_cannot_tell_apart_is_not_compared():
    assert (
        orders(
            'HM-T4', {('neither', 'accuracy'): ours(0.5), ('enhancement', 'accuracy'): ours(0.9)}
        )
        == []
    )  # 74.39 ± 0.88 and 75.28 ± 1.29
    assert (
        orders(
            'MPP-T2',
            {
                ('MAML++', 'mini-ImageNet 5-way 1-shot'): ours(0.5),
                ('MAML, 3 steps', 'mini-ImageNet 5-way 1-shot'): ours(0.4),
                ('MAML and MAML++', '1 to 5 inner steps'): ours(0.4),
            },
        )
        == []
    )
    assert 'has been run yet' in orders_table([])
