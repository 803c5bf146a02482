"""What a report says besides its numbers, and the learners that it speaks of."""

import json
import matplotlib.pyplot as plt
import pandas as pd
import pytest
from conftest import ROOT
from fewshotmeta.all import *
from fewshotmeta.data.files import write_json
from fewshotmeta.lab.accounts import at_every_scale, cost_table, deviations, draw_learning
from fewshotmeta.lab.accounts import learning_curve
from fewshotmeta.lab.batches import read_batch

RUNS = ROOT / 'runs'
T1 = ROOT / 'nbs' / 'experiments' / 'mamlpp_t1.yaml'


def cells(table):
    return [[cell.strip() for cell in line.split('|')[1:-1]] for line in table.splitlines()]


def written(tmp_path, scale, only, **changes):
    "Results of the runs of Table 1 that `only` names, with some parameters changed."
    for p in read_batch(T1, scale, only, tmp_path):
        metrics = dict(test_accuracy=dict(mean=0.9, ci95=0.01, n=600))
        made = dict(scale=scale, seconds=1800.0, device='CPU', metrics=metrics)
        params = p.params | changes
        whole = made | dict(experiment=p.experiment, run=p.slug, params=params)
        write_json(p.folder / 'result.json', whole)
        table = dict(iteration=[10, 20, 30], val_accuracy=[None, 0.5, 0.75])
        pd.DataFrame(table).to_csv(p.folder / 'metrics.csv', index=False)


def test_deviations_are_from_the_published_settings(tmp_path):
    assert deviations(T1, tmp_path) == ''
    written(tmp_path, 'paper', 'maml_1shot*')
    written(tmp_path, 'long', 'mamlpp_1shot*')
    written(tmp_path, 'long', 'maml_lslr_1shot*', meta_lr=0.5)
    _, _, *lines = cells(deviations(T1, tmp_path))
    assert sorted(lines) == [
        ['maml_1shot', '`paper`', '1,200,000 of 1,200,000', 'none'],
        *[
            [name, '`long`', '50,000 of 1,200,000', other]
            for name, other in (
                ('maml_lslr_1shot', 'meta_lr 0.001 → 0.5, valid_tasks 600 → 200'),
                ('mamlpp_1shot', 'valid_tasks 600 → 200'),
            )
        ],
    ]


def test_the_curve_of_a_row_at_every_scale(tmp_path):
    written(tmp_path, 'long', 'maml_1shot*')
    written(tmp_path, 'short', 'maml_1shot*')
    written(tmp_path, 'smoke', 'maml_lslr_1shot*')
    found = at_every_scale(tmp_path, 'mamlpp_t1', 'maml_1shot')
    assert [r['scale'] for r in found] == ['short', 'long']
    assert at_every_scale(tmp_path, 'mamlpp_t1', 'maml_lslr_1shot') == []
    assert learning_curve(found[1]) == ([320, 480], [50.0, 75.0])
    ax = plt.figure().subplots()
    draw_learning(ax, {'a': found, 'none': []}, {'a': 91.27}, {'a': found[:1]})
    curves = [tuple(line.get_xdata()) for line in ax.lines if len(line.get_xdata()) == 2]
    assert curves[:1] == [(80, 120)] and (320, 480) in curves
    levels = {line.get_ydata()[0] for line in ax.lines if tuple(line.get_xdata()) == (0, 1)}
    assert levels == {91.27, 90.0}
    ends = {line.get_xdata()[0] for line in ax.lines if line.get_marker() == 'o'}
    assert ends == {2_400, 50_000}
    plt.close('all')


def test_cost_is_the_sum_of_the_runs(tmp_path):
    written(tmp_path, 'paper', 'maml_1shot*')
    written(tmp_path, 'long', 'm*_1shot*')
    _, _, *lines = cells(cost_table(['mamlpp_t1', 'nothing'], tmp_path))
    assert lines == [
        ['mamlpp_t1', '`long`', '8', '4.0', 'CPU'],
        ['mamlpp_t1', '`paper`', '3', '1.5', 'CPU'],
        ['**all**', '', '11', '**5.5**', ''],
    ]


def test_an_interrupted_run_costs_its_whole_training(tmp_path):
    written(tmp_path, 'long', 'maml_1shot*')
    (file,) = tmp_path.rglob('result.json')
    r = json.loads(file.read_text())
    r['metrics']['training_seconds'] = dict(mean=7200.0, ci95=None, n=1)
    write_json(file, r)
    assert cells(cost_table(['mamlpp_t1'], tmp_path))[2][3] == '2.0'


LEARNERS_KEPT = (
    'mamlpp_t4/mamlpp_1shot_long_seed0',
    'hidra_t2/hidra_10_rate0.4_long_seed0',
    'mamlpp_t4/meta_sgd_1shot_long_seed0',
)


@pytest.mark.parametrize('run', LEARNERS_KEPT)
def test_a_committed_learner_gives_its_accuracy(run, real_data):
    """On each of the first tasks of its own test, after each step; rounding may turn a query.

    Before any step equal rows tie, and rounding alone decides.
    """
    folder = RUNS / run
    p = json.loads((folder / 'result.json').read_text())['params']
    learner = load_learner(folder / 'learner.safetensors')
    ways = p.get('n_way') or p['train_ways'][1]
    tasks = tasks_for(learner, p['data'], 'test', ways, p['k_shot'], p['test_query'])
    kept = pd.read_csv(folder / 'tasks.csv').query('metric == "test_accuracy"')
    n, steps = 50, p['test_steps']
    first = 1 if learner.n_way is None else 0  # a head for any number of ways has equal rows
    found = accuracies(learner, tasks, n, steps)[:, first:]
    there = kept[[f'step_{i}' for i in range(first, steps + 1)]][:n].to_numpy()
    assert abs(found.numpy() - there).mean() < 0.002
