"""Runs compared task by task: what is paired, what is refused, what is shown."""

import shutil

import matplotlib
import numpy as np
import pandas as pd
import pytest
from fewshotmeta.data.files import BadFile, read_json, write_json
from fewshotmeta.lab.command import main
from fewshotmeta.lab.compare import Comparison, Difference, Pair, compare, task_accuracies
from tiny import notebook, run

matplotlib.use('Agg')

# ---- runs of the runner
EXPERIMENT = """
method = 'maml'  # a gradient learner
seed = 0
n_way = 5
test_tasks = 12
scale = 'short'
"""
EVALUATE = """
from fewshotmeta.all import *
test = EpisodeSampler(glyphs('test'), n_way=n_way, k_shot=1, n_query=3)
options = dict(filters=4, seed=seed, inner_lr=0.4, inner_steps=2)
own = {k: v for k, v in options.items() if method != 'proto_net' or k in ('filters', 'seed')}
learner = make_learner(method, test, **own)
fewer = evaluate(learner, test, 4, steps=0)
report(test_accuracy=evaluate(learner, test, test_tasks), fewer=fewer, seconds=1.0)
"""


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "The folder of two runs that the runner made, with unlike numbers of inner steps."
    nb = notebook(tmp_path_factory.mktemp('made'), EXPERIMENT, EVALUATE)
    for method in ('maml', 'proto_net'):
        run(nb, dict(method=method), f'demo/{method}_short_seed0')
    return nb.parent / 'runs'


def half_width(values):
    "The half width of a 95 % interval, by numpy."
    return 1.96 * np.std(values, ddof=1) / np.sqrt(len(values))


@pytest.mark.xdist_group('compared')
def test_runs_of_the_runner_by_hand(made):
    last = {}
    for method, step in dict(maml='step_2', proto_net='step_0').items():
        table = pd.read_csv(made / f'demo/{method}_short_seed0/tasks.csv')
        rows = table[table['metric'] == 'test_accuracy']
        last[method] = 100 * rows[step].to_numpy()
        folder = made / f'demo/{method}_short_seed0'
        assert task_accuracies(folder, 'fewer').shape == (4, 1)
        assert task_accuracies(folder).shape == (12, 1 + int(step[-1]))
    found = compare(['demo/maml_short_seed0', 'demo/proto_net_short_seed0'], runs=made)
    (pair,) = found.differences[0].pairs
    points = last['proto_net'] - last['maml']
    assert pair.points == pytest.approx(points.mean(), abs=1e-4)
    assert pair.paired == pytest.approx(half_width(points), abs=1e-4)
    apart = np.hypot(half_width(last['maml']), half_width(last['proto_net']))
    assert pair.unpaired == pytest.approx(apart, abs=1e-4)
    result = read_json(made / 'demo/maml_short_seed0/result.json')
    assert pair.reference == pytest.approx(100 * result['metrics']['test_accuracy']['mean'])
    assert (found.n, found.tasks) == (12, result['episodes_digest'])
    assert found.differences[0].parameters == dict(method=('maml', 'proto_net'))


@pytest.mark.xdist_group('compared')
def test_the_command_prints_what_was_found(made, capsys):
    names = 'demo/maml_short_seed0', str(made / 'demo/proto_net_short_seed0')
    assert main(['compare', *names, '--runs', str(made)]) == 0
    said = capsys.readouterr().out
    (pair,) = compare(names, runs=made).differences[0].pairs
    row = next(line for line in said.splitlines() if line.startswith('  seed 0'))
    assert row.split()[-3:] == [f'{pair.points:+.2f}', f'{pair.paired:.2f}', f'{pair.unpaired:.2f}']
    assert 'minus demo/maml_short_seed0, scale short' in said
    assert 'What differs: method: maml → proto_net.' in said
    assert max(map(len, said.splitlines())) <= 100


# ---- runs that are written
@pytest.fixture
def write(tmp_path):
    "`write(name, accuracies, …)` writes a run of one inner step, and gives the folder of all runs."

    def kept(name, accuracies, digest='aa', scale='short', **params):
        folder = tmp_path / 'runs' / name
        experiment, slug = name.split('/')
        metric = dict(mean=float(np.mean(accuracies)), ci95=0.1, n=len(accuracies), tasks=digest)
        params = dict(method='maml', n_way=5, scale=scale, test_query=15, seed=0) | params
        metrics = dict(test_accuracy=metric, seconds=dict(mean=3.0, ci95=None, n=1))
        what = dict(experiment=experiment, run=slug, scale=scale, params=params, metrics=metrics)
        write_json(folder / 'result.json', what)
        rows = [['test_accuracy', i, 0.2, a] for i, a in enumerate(accuracies)]
        table = pd.DataFrame(rows, columns=['metric', 'task', 'step_0', 'step_1'])
        table.to_csv(folder / 'tasks.csv', index=False)
        return tmp_path / 'runs'

    return kept


HARD = np.array([0.2, 0.4, 0.6, 0.8])  # the same tasks are hard for both


@pytest.fixture
def seeds(write):
    "Three seeds of one method, and of another, which lacks one of them and has one more."
    for seed in (0, 1, 2):
        write(f'table/maml_1shot_short_seed{seed}', HARD, seed=seed)
    for seed, more in {1: 0.1, 2: 0.05, 3: 0.15}.items():
        better = HARD + [more, more, more, more + 0.02]
        runs = write(f'table/hidra_1shot_short_seed{seed}', better, seed=seed, method='hidra')
    return runs


MAML, HIDRA = 'table/maml_1shot_short_seed*', 'table/hidra_1shot_short_seed*'


def test_seeds_are_paired(seeds):
    (found,) = compare([MAML, HIDRA], runs=seeds).differences
    assert [p.seed for p in found.pairs] == ['seed 1', 'seed 2']
    assert [p.points for p in found.pairs] == pytest.approx([10.5, 5.5])
    assert [p.paired for p in found.pairs] == pytest.approx([half_width([0, 0, 0, 2])] * 2)
    assert found.points == pytest.approx(8)
    assert found.deviation == pytest.approx(np.std([10.5, 5.5], ddof=1))
    assert found.alone == ('table/maml_1shot_short_seed0', 'table/hidra_1shot_short_seed3')
    assert (found.name, found.reference) == ('table/hidra_1shot', 'table/maml_1shot')


def test_what_is_said_of_seeds(seeds):
    found = compare([MAML, HIDRA], runs=seeds)
    text, table = str(found), found._repr_markdown_()
    mean = '+8.00 ± 3.54'
    for words in (mean, '50.00 ± 0.00 → 58.00 ± 3.54', 'Left out, without a partner'):
        assert words in text and words in table
    assert table.count('\n|') == 5  # a head, a rule, two seeds and their mean
    assert max(map(len, text.splitlines())) <= 100
    single = str(compare([HIDRA.replace('*', '1'), HIDRA.replace('*', '2')], runs=seeds))
    assert 'seeds 2 and 1' in single
    assert 'nothing that changes what is computed' in single
    assert 'standard deviation' not in single


def test_several_runs_against_the_first(seeds, write):
    write('table/other_paper', HARD, method='other', n_way=5, scale='paper')
    one = 'table/maml_1shot_short_seed0'
    found = compare([one, HIDRA.replace('*', '1'), 'table/other_paper'], runs=seeds)
    assert [d.reference for d in found.differences] == [one, one]
    assert [d.scale for d in found.differences] == ['short', 'short and paper']
    assert found.differences[1].pairs[0].points == 0
    assert compare([MAML, HIDRA.replace('*', '1')], runs=seeds).differences[0].deviation is None


def test_the_figure_has_a_row_for_each(seeds):
    import matplotlib.pyplot as plt

    ax = plt.subplots()[1]
    compare([MAML, HIDRA], runs=seeds).plot(ax)
    labels = [tick.get_text() for tick in ax.get_yticklabels()]
    assert labels == ['hidra_1shot, seed 1', 'hidra_1shot, seed 2', 'hidra_1shot, 2 seeds']
    assert ax.get_xlabel() == 'test_accuracy minus that of table/maml_1shot, points'
    bars = {c.get_label(): [s[0, 0] for s in c.lines[2][0].get_segments()] for c in ax.containers}
    low = 10.5 - half_width([0, 0, 0, 2])
    assert bars['95 % over tasks, paired'][0] == pytest.approx(low)
    assert bars['mean ± s.d. over seeds'] == pytest.approx([8 - np.std([10.5, 5.5], ddof=1)])
    plt.close('all')


def test_other_tasks_are_refused_by_name(seeds, write):
    write('table/ways', HARD, digest='bb', n_way=20)
    write('table/code', HARD, digest='cc')
    one = 'table/maml_1shot_short_seed0'
    with pytest.raises(ValueError, match=r'seed0 and table/ways .*of aa and bb.*n_way \(5, 20'):
        compare([one, 'table/ways'], runs=seeds)
    with pytest.raises(ValueError, match='no parameter of the tasks differs'):
        compare([one, 'table/code'], runs=seeds)


@pytest.mark.parametrize(
    'names,words',
    [
        ([MAML], 'name at least two runs'),
        (MAML, 'name at least two runs'),
        ([MAML, 'table/hydra_1shot_short_seed1'], "did you mean 'table/hidra_1shot_short_seed1'"),
        ([MAML, 'none/*'], r"no result in .* matches 'none/\*'.*There are: table/"),
        ([MAML, 'table/maml_1shot_short_seed0'], 'is named twice'),
        (['table/*', MAML], 'differ in method: a pattern stands for the seeds'),
        ([MAML.replace('*', '[01]'), HIDRA.replace('*', '[23]')], 'none in common'),
    ],
)
def test_what_cannot_be_compared(seeds, names, words):
    with pytest.raises(ValueError, match=words):
        compare(names, runs=seeds)


def test_a_seed_twice_is_no_repetition(seeds, write):
    write('table/maml_1shot_short_seed0b', HARD)
    with pytest.raises(ValueError, match='has the same seed twice'):
        compare([MAML, HIDRA], runs=seeds)


def test_metrics_without_tasks(seeds):
    for metric, words in dict(seconds='not measured task by task', tset='no metric').items():
        with pytest.raises(ValueError, match=words):
            compare([MAML, HIDRA], metric, seeds)
    assert task_accuracies(seeds / 'table/maml_1shot_short_seed0').shape == (4, 2)


def test_a_file_of_tasks_that_is_missing_or_of_another_run(seeds):
    one, two = (seeds / 'table' / f'{m}_1shot_short_seed1' for m in ('maml', 'hidra'))
    shutil.copy(one / 'tasks.csv', two / 'tasks.csv')
    with pytest.raises(BadFile, match='belongs to another result'):
        compare([MAML, HIDRA], runs=seeds)
    (two / 'tasks.csv').unlink()
    with pytest.raises(ValueError, match='has no tasks.csv.*run it again with --force'):
        compare([MAML, HIDRA], runs=seeds)
    (one / 'result.json').write_text('{')
    with pytest.raises(BadFile, match='run it again with --force'):
        compare([MAML, HIDRA], runs=seeds)


def test_runs_of_two_folders(seeds, tmp_path):
    "The same run before and after a change of the code: folders tell them apart."
    shutil.copytree(seeds, tmp_path / 'before')
    before = str(tmp_path / 'before/table/maml_1shot_short_seed0')
    (found,) = compare([before, 'table/maml_1shot_short_seed0'], runs=seeds).differences
    assert (found.reference, found.points) == (before, 0)


def test_a_run_that_is_older_than_tasks(seeds):
    path = seeds / 'table/hidra_1shot_short_seed1/result.json'
    old = read_json(path)
    del old['metrics']['test_accuracy']['tasks']
    write_json(path, old)
    with pytest.raises(ValueError, match='has no tasks.csv.*run it again with --force'):
        compare([MAML, HIDRA], runs=seeds)


def test_the_parts_of_a_comparison():
    pair = Pair('seed 0', 60.0, 62.5, 1.0, 2.0)
    one = Difference('a/x', 'a/y', 'short', (pair,), {}, ())
    assert (one.points, one.deviation) == (2.5, None)
    assert '+2.50' in str(Comparison('test_accuracy', 'aa', 600, (one,)))
