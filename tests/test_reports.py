"""Ours beside the published numbers: which runs count, what seeds give, what is said of no run."""

import re
import statistics
from dataclasses import replace

import pandas as pd
import pytest
from conftest import ROOT
from fewshotmeta.data.files import BadFile, write_json
from fewshotmeta.lab.batches import read_batch
from fewshotmeta.lab.command import main
from fewshotmeta.lab.orders import AGREES, OPPOSITE, TOGETHER, orders, orders_table
from fewshotmeta.lab.reports import (
    NO_DATA,
    NO_RUN,
    NOT_BUILT,
    Ours,
    beside,
    coverage,
    every_cell,
    find_runs,
    measured,
)
from fewshotmeta.lab.results import (
    all_results,
    differing_parameters,
    group_results,
    nothing_matches,
    recipe_name,
    table_of,
    table_text,
    write_table,
)
from fewshotmeta.lab.tables import beside_table, wide_table


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
    paper = [
        result('mamlpp_1shot_paper_seed0', scale='paper'),
        result('mamlpp_1shot_short_seed0'),
        result('mamlpp_1shot_short_seed1', 1),
    ]
    smoke = [result(name, scale='smoke') for name in ('maml_1shot_smoke_seed0', 'new_smoke')]
    others = [result('alone', scale='short'), result('other_short', experiment='else')]
    found = find_runs(runs(*seeds, *paper, *smoke, *others), 'table')
    assert list(found) == ['alone', 'maml_1shot', 'mamlpp_1shot']
    assert [r['params']['seed'] for r in found['maml_1shot']] == [0, 2, 10]
    assert [r['scale'] for r in found['mamlpp_1shot']] == ['paper']
    assert list(find_runs(runs(), 'table', 'mamlpp')) == ['mamlpp_1shot']
    assert find_runs(runs(), 'nothing') == {}


def test_a_name_keeps_what_only_looks_like_a_scale(runs):
    folder = runs(result('short_paper_short_seed0'), result('maml_seed1_x_short'))
    assert list(find_runs(folder, 'table')) == ['maml_seed1_x', 'short_paper']


def test_an_altered_result_stops_the_report(runs):
    path = runs(result('maml_short_seed0')) / 'table/maml_short_seed0/result.json'
    path.write_text(path.read_text().replace('0.9', '0.99'))
    with pytest.raises(BadFile, match='--force'):
        find_runs(path.parents[2], 'table')


def test_seeds_give_mean_and_standard_deviation(runs):
    means = (0.9, 0.92, 0.97)
    results = [result(f'maml_short_seed{k}', k, mean) for k, mean in enumerate(means)]
    found = find_runs(runs(*results), 'table')['maml']
    three, one = measured(found), measured(found[:1])
    expected = (sum(means) / 3, statistics.stdev(means))
    assert (three.mean, three.interval) == pytest.approx(expected)
    assert three.meaning == 'standard deviation over 3 seeds'
    assert (three.seeds, three.n) == (3, 600)
    assert (one.mean, one.interval, one.meaning, one.seeds) == (0.9, 0.01, '95 % over 600 tasks', 1)
    assert measured(found, 'test_accuracy_8way').mean == pytest.approx(three.mean / 2)
    assert measured(found[:1], 'seconds').interval is None


def test_what_is_not_one_configuration_is_refused(runs):
    one, two, other = (
        result('maml_short_seed0'),
        result('maml_short_seed1', 1, n_way=5),
        result('maml_short_seed2', 2, method='fomaml'),
    )
    found = find_runs(runs(one, two, other), 'table')['maml']
    assert measured(found[:2]).seeds == 2  # a parameter that one of them did not know yet
    smoke = [result('x_smoke', scale='smoke')]
    refused = ((found, 'method'), (found[:1] * 2, 'same seed twice'), (smoke, 'smoke run'))
    for results, says in refused:
        with pytest.raises(ValueError, match=says):
            measured(results)
    with pytest.raises(ValueError, match="no metric 'test_acc"):
        measured(found[:1], 'test_acc')


@pytest.fixture
def three_rows(runs):
    "Of three cells one was run, one was not, and one cannot be."
    folder = runs(result('maml_short_seed0', mean=0.91234, ci95=0.00456))
    cells = {
        ('MAML++', '20-way 5-shot'): [],
        ('MAML++', '20-way 1-shot'): find_runs(folder, 'table')['maml'],
        ('Meta-SGD', '20-way 1-shot'): NO_DATA,
    }
    return beside('MPP-T1', cells, folder.parent / 'nbs/reports')


def test_beside_says_what_is_and_what_is_not(three_rows):
    shown = [(r['row'], r['ours']) for r in three_rows]
    # in the published order
    assert shown == [('Meta-SGD', NO_DATA), ('MAML++', '91.23 ± 0.46'), ('MAML++', NO_RUN)]
    assert three_rows[1] == {
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


def cells_of(table):
    "The cells of a Markdown table, line by line."
    return [[c.strip() for c in line.split('|')[1:-1]] for line in table.splitlines()]


def test_the_same_as_a_table(three_rows):
    siamese = dict(row='Siamese Nets', column='20-way 1-shot', published='88.2', ours=NOT_BUILT)
    table, _, under = beside_table(three_rows + [siamese]).partition('\n\n')
    (shown,) = cells_of(table)[2:]
    link = '[seed0](../../runs/table/maml_short_seed0/notebook.ipynb)'
    assert shown[1:2] + shown[3:] == [
        *('20-way 1-shot', '91.23 ± 0.46'),
        *('95 %', 'short', '1', '600', '', link),
    ]
    assert under.startswith(
        'Published ±: standard deviation over 3 seeds. '
        'Ours ±: 95 % is the interval of the mean over the test tasks.\n\n<details>'
    )
    folded = re.findall(r'<summary>Also in this table, (.+)</summary>\n\n- (.+?): ', under)
    names = [r['row'] for why in (NO_RUN, NO_DATA) for r in three_rows if r['ours'] == why]
    reasons = [f'{why}: 1 cell' for why in (NO_RUN, NO_DATA, NOT_BUILT)]
    assert folded == list(zip(reasons, [*names, 'Siamese Nets']))


def test_an_untrained_network_stands_beside(runs):
    there = runs(result('maml_short_seed0'), result('start_short_seed0', mean=0.3))
    found = find_runs(there, 'table')
    cell = 'MAML++', '20-way 1-shot'
    cells = {cell: found['maml'], ('MAML + MSL', cell[1]): found['maml']}
    rows = beside('MPP-T1', cells, untrained={cell: found['start'], ('MAML', '-'): None})
    head, _, *lines = cells_of(beside_table(rows))
    at = head.index('untrained')
    assert head[at - 1] == 'ours'
    shown = {line[0]: line[at] for line in lines if len(line) == len(head)}
    assert shown['MAML + MSL'] == ''
    assert re.fullmatch(
        r'\[30\.00 ± 1\.00\]\(.*start_short_seed0/notebook\.ipynb\)', shown['MAML++']
    )


def test_the_cells_of_a_column_stand_together():
    names = ('row', 'column', 'published', 'published ±', 'ours')
    values = (
        ('A', 'CUB', '1', 'x', '70.00'),
        ('A', 'mini', '2', 'y', '80.00'),
        ('B', 'CUB', '3', 'x', '90.00'),
    )
    rows = [dict(zip(names, v)) for v in values]
    table, _, under = beside_table(rows).partition('\n\n')
    assert [line[2] for line in cells_of(table)[2:]] == ['1 (a)', '3 (a)', '2 (b)']
    assert under == 'Published ±: (a) x; (b) y.'


def test_units_and_other_metrics(runs):
    found = find_runs(runs(result('maml_short_seed0', mean=0.5)), 'table')['maml']
    (row,) = beside('HM-T3', {('MAML, 5 steps', 'seconds'): measured(found, 'seconds')})
    assert row['ours'] == '8.50'
    (row,) = beside('HID-T1', {('maml', '8'): measured(found, 'test_accuracy_8way')})
    assert row['ours'] == '25.00 ± 1.00'


def test_a_missing_table_takes_any_row_and_others_do_not(runs):
    found = find_runs(runs(result('maml_short_seed0')), 'table')['maml']
    (row,) = beside('MPP-T2', {('MAML, 3 steps', 'mini-ImageNet 5-way 1-shot'): found})
    assert (row['published'], row['published ±']) == ('not in our copy', '')
    assert row['ours'] == '90.00 ± 1.00'
    wrong = {
        ('MAML+', '20-way 1-shot'): "did you mean 'MAML",
        ('MAML++', '20-way'): "column='20-way'",
    }
    for cell, says in wrong.items():
        with pytest.raises(ValueError, match=says):
            beside('MPP-T1', {cell: found})


def test_links_of_the_committed_runs_lead_somewhere():
    found = find_runs(ROOT / 'runs', 'omniglot')
    assert {len(seeds) for seeds in found.values()} <= {1, 2, 3}
    folders = [r['folder'] for seeds in found.values() for r in seeds]
    assert all((folder / 'notebook.ipynb').is_file() for folder in folders)
    cells = {('MAML++', '20-way 1-shot'): found['mamlpp_20way_1shot_5steps']}
    (row,) = beside('MPP-T1', cells, ROOT / 'nbs/reports')
    link = row['run'].split('](')[1].rstrip(')')
    assert link.startswith('../../runs/omniglot/')
    assert (ROOT / 'nbs/reports' / link).resolve().is_file()


def ours(mean, ci95=0.01):
    return Ours(mean, ci95, '95 % over 600 tasks', 600, 1, 'short', ())


def test_every_cell_of_a_table_has_an_answer(runs):
    names = {'MAML++': 'mamlpp', 'Meta-SGD': 'meta_sgd'}
    found = find_runs(runs(result('mamlpp_1shot_short_seed0')), 'table')

    def ours_of(row, column):
        shots = '1shot' if '1-shot' in column else '5shot'
        return found.get(f'{names[row]}_{shots}')

    cells = every_cell('MPP-T1', names, ours_of)
    assert cells['MAML++', '20-way 1-shot'][0]['run'] == 'mamlpp_1shot_short_seed0'
    assert cells['Meta-SGD', '20-way 5-shot'] is None
    assert cells['Matching Nets', '20-way 1-shot'] == NOT_BUILT
    assert ('MAML + MSL', '20-way 5-shot') not in cells  # an empty cell of the paper
    assert len(cells) == 22


def test_a_wide_table(runs):
    found = find_runs(runs(result('hidra_short_seed0', mean=0.8)), 'table')['hidra']
    cells = {
        ('hidra 2', '2'): measured(found),
        ('hidra 2', '3'): None,
        ('hidra 5', '2'): None,
        ('maml', '3'): NO_DATA,
    }
    table, *folded = wide_table(beside('HID-T1', cells)).split('\n\n<details>')
    head, _, two = cells_of(table)
    assert head == ['', 'run', '2', '3', 'scale', 'seeds', 'tasks', 'queries', '±']
    assert two[2:7] == ['82.95 → 80.00 ± 1.00', '72.93 → –', 'short', '1', '600']
    assert two[1].startswith('[hidra](')
    assert 'notebook.ipynb' in two[1]
    assert [text.split('\n\n')[1] for text in folded] == ['- hidra 5: 2 77.48', '- maml: 3 70.06']
    assert [why in text for why, text in zip((NO_RUN, NO_DATA), folded)] == [True, True]


def test_what_has_been_run_of_a_batch_file(tmp_path):
    file = ROOT / 'nbs' / 'experiments' / 'mamlpp_t4.yaml'

    def line():
        return cells_of(coverage([file], tmp_path))[2]

    assert line() == ['mamlpp_t4.yaml', '0 of 6', '0 of 6', '0 of 6', '0 of 18']
    for p in read_batch(file, 'short', 'm*_1shot*', tmp_path):
        write_json(p.folder / 'result.json', {})
    assert line()[1:3] == ['3 of 6', '0 of 6']
    timing = cells_of(coverage([file.with_name('mamlpp_t3.yaml')], tmp_path))[2]
    assert timing[2:4] == ['–', '–']


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
    assert (pair['higher'], pair['lower']) == ('MAML++', 'MAML (local replication)')
    assert pair['verdict'] == verdict
    assert pair['seeds'] == '1, 1'
    assert pair['published'] == '+6.38 ± 1.07'
    assert pair['ours'] == f'{100 * (a - b):+.2f} ± 1.41'
    assert f'{verdict} in 1. With one seed' in orders_table([pair])
    assert (verdict == AGREES) == ('MAML++' not in orders_table([pair]))


def test_runs_of_different_scales_are_not_compared():
    cells = {
        ('MAML (local replication)', '20-way 1-shot'): replace(ours(0.95), scale='paper'),
        ('MAML++', '20-way 1-shot'): ours(0.9),
    }
    (pair,) = orders('MPP-T1', cells)
    assert pair['verdict'] == 'scales differ'
    assert 'were made at different scales in 1' in orders_table([pair])


def test_what_the_paper_cannot_tell_apart_is_not_compared():
    # 74.39 ± 0.88 and 75.28 ± 1.29
    near = {('neither', 'accuracy'): ours(0.5), ('enhancement', 'accuracy'): ours(0.9)}
    assert orders('HM-T4', near) == []
    missing = {
        ('MAML++', 'mini-ImageNet 5-way 1-shot'): ours(0.5),
        ('MAML, 3 steps', 'mini-ImageNet 5-way 1-shot'): ours(0.4),
        ('MAML and MAML++', '1 to 5 inner steps'): ours(0.4),
    }
    assert orders('MPP-T2', missing) == []
    assert 'has been run yet' in orders_table([])


# ---- all results, as a table
@pytest.fixture
def grid(runs):
    "Two methods at two rates, three seeds each but for one; and a batch of one run."
    results = []
    for method in ('maml', 'hidra'):
        for rate in (0.1, 0.01):
            for k in range(3 if (method, rate) != ('hidra', 0.1) else 1):
                name, mean = f'{method}_rate{rate}_short_seed{k}', 0.5 + rate + k / 50
                values = dict(method=method, inner_lr=rate, n_way=5, plan='loop' * k)
                results.append(result(name, k, mean, **values))
    alone = result('alone_paper', scale='paper', experiment='other', n_way=20, only_here=[1, 2])
    return runs(*results, alone)


def test_a_column_for_each_parameter_that_differs(grid):
    results, _ = all_results(grid, 'table/*')
    assert differing_parameters(results) == ['seed', 'method', 'inner_lr', 'plan']
    table = table_of(results)
    names = [*table.columns]
    assert names[:6] == ['experiment', 'run', 'recipe', 'scale', 'seed', 'metric']
    assert names[6:12] == ['mean', 'ci95', 'n', 'method', 'inner_lr', 'plan']
    assert table['recipe'].unique().tolist()[:2] == ['hidra_rate0.01', 'hidra_rate0.1']
    assert 'n_way' not in table
    assert set(table_of(results, all_parameters=True)['n_way']) == {5}
    assert table_of(results, every=True)['metric'].nunique() == 3
    assert len(table_of(results, every=True)) == 3 * len(table)


def test_what_only_one_notebook_has_is_no_column(grid):
    results, _ = all_results(grid)
    table = table_of(results)
    assert 'n_way' in table and 'only_here' not in table
    all_of_them = table_of(results, all_parameters=True)
    assert all_of_them['only_here'].dropna().tolist() == ['1,2']
    assert all_of_them['inner_lr'].isna().sum() == 1


def test_a_recipe_has_neither_scale_nor_seed():
    names = {'maml_short_seed0': 'maml', 'maml_short': 'maml', 'short_seed1_x': 'short_seed1_x'}
    for run, recipe in names.items():
        assert recipe_name(result(run)) == recipe


def test_files_have_the_same_columns(grid, tmp_path):
    table = table_of(all_results(grid)[0], all_parameters=True)
    for name, read in (('t.csv', pd.read_csv), ('t.parquet', pd.read_parquet)):
        write_table(table, tmp_path / name)
        again = read(tmp_path / name)
        assert list(again) == list(table)
        assert again['mean'].tolist() == table['mean'].tolist()
        assert again['inner_lr'].tolist()[1:] == table['inner_lr'].tolist()[1:]


def test_groups_over_seeds(grid):
    results, _ = all_results(grid, 'table/*')
    groups = group_results(results, ['method', 'inner_lr'])
    assert groups['seeds'].tolist() == [3, 1, 3, 3]
    assert groups['tasks'].tolist() == [600] * 4
    assert groups['scale'].tolist() == ['short'] * 4
    means = [0.51, 0.53, 0.55]
    assert groups['mean'][0] == pytest.approx(statistics.fmean(means))
    assert groups['sd'][0] == pytest.approx(statistics.stdev(means))
    assert pd.isna(groups['sd'][1])


def test_no_mean_over_what_is_no_repetition(grid, runs):
    results, _ = all_results(grid, 'table/*')
    with pytest.raises(ValueError, match='method=hidra.* more than the seed, in inner_lr: group'):
        group_results(results, ['method'])
    runs(result('again_short_seed0', method='maml', inner_lr=0.1, n_way=5, plan=''))
    results, _ = all_results(grid, 'table/*')
    with pytest.raises(ValueError, match='again_short_seed0 and maml_.*_seed0 have the same seed'):
        group_results(results, ['method', 'inner_lr'])
    with pytest.raises(ValueError, match="no parameter 'iner_lr', did you mean 'inner_lr'"):
        group_results(results, ['method', 'iner_lr'])


def test_scales_are_not_mixed(runs):
    short, paper = result('maml_short_seed0'), result('maml_paper_seed1', 1, scale='paper')
    groups = group_results(all_results(runs(short, paper))[0], ['method'])
    assert groups['scale'].tolist() == ['paper', 'short']


def test_a_table_on_a_screen(runs):
    many = {f'parameter_{i:02d}': i for i in range(20)}
    other = {name: 10_000 * i for i, name in enumerate(many)}
    folder = runs(
        result('maml_short_seed0', same='this', **many),
        result('maml_other_short_seed1', 1, same='this', **other),
        result('alone_paper', scale='paper', experiment='last', same='that'),
    )
    text = table_text(table_of(all_results(folder)[0]))
    last, table = text.split('\n\n', 1)
    assert last.splitlines()[0] == 'experiment=last  scale=paper  metric=test_accuracy  same=that'
    assert last.splitlines()[2].split() == ['alone', '0', '0.9000', '±', '0.0100', '600']
    lines = table.splitlines()
    assert lines[0] == 'experiment=table  scale=short  metric=test_accuracy  same=this'
    assert max(map(len, lines)) <= 100
    blocks = table.split('\n\n')
    assert len(blocks) > 2
    assert [line.split()[:2] for line in blocks[-1].splitlines()[1:]] == [
        ['maml_other', '1'],
        ['maml', '0'],
    ]
    heads = ' '.join(block.splitlines()[-3] for block in blocks)
    assert [name for name in many if name not in heads.split()] == ['parameter_00']


def test_the_command_shows_and_groups(grid, capsys, tmp_path):
    def said(*words):
        status = main(['results', *words, '--runs', str(grid)])
        return status, *capsys.readouterr()

    status, out, _ = said('table/maml*', '--by', 'method', 'inner_lr')
    assert status == 0
    assert out.splitlines()[-1].split() == ['maml', '0.1', '0.6200', '±', '0.0200', '3', '600']
    for name in ('run', 'recipe', 'experiment', 'seed'):  # of the table itself
        groups = said('table/maml_rate0.1*', '--by', name, 'inner_lr')[1]
        assert '0.62' in groups
    assert 'n_way=5' not in said('table/*')[1]
    assert 'n_way=5' in said('table/*', '--all-parameters')[1]
    out = said('table/*', '--by', 'recipe', '--every', '--out', str(tmp_path / 'g.csv'))[1]
    assert out.startswith('12 rows')
    assert pd.read_csv(tmp_path / 'g.csv')['seeds'].max() == 3


def test_a_pattern_that_matches_nothing(grid, capsys, tmp_path):
    for pattern, near in (('nothing/*', ''), ('tabel/*', "did you mean 'table/*'")):
        assert main(['results', pattern, '--runs', str(grid)]) == 2
        said = capsys.readouterr().err
        assert f'matches {pattern!r}' in said and near in said
        assert 'There are: other/* (1), table/* (10)' in said
    assert 'no result in' in nothing_matches(tmp_path / 'none', '*')
