"""Every number of a report can be traced.

Report = result JSON = injected parameters = batch file, and published = data file.
"""

import ast, csv, json, re, statistics, subprocess
import pytest
from conftest import ROOT
from fewshotmeta.lab.batches import SCALES, read_batch
from fewshotmeta.data.files import read_json
from fewshotmeta.lab.published import published
from fewshotmeta.lab.reports import NO_RUN

LISTED = subprocess.run(
    ['git', 'ls-files', 'runs'], cwd=ROOT, capture_output=True, text=True, check=True
).stdout
TRACKED = [ROOT / path for path in LISTED.split()]
RESULTS = [
    path
    for path in TRACKED
    if re.fullmatch(r'runs/[^/]+/[^/]+/result\.json', path.relative_to(ROOT).as_posix())
]
REPORTS = sorted((ROOT / 'nbs' / 'reports').glob('*.ipynb'))
BATCHES = {p.stem: p for p in (ROOT / 'nbs' / 'experiments').glob('*.yaml')}


def cells_of(notebook):
    return json.loads(notebook.read_text())['cells']


def markdown_of(output):
    return ''.join(output.get('data', {}).get('text/markdown', ''))


def injected(notebook):
    "The parameters that papermill put in, as a dict."
    out = {}
    for cell in cells_of(notebook):
        if 'injected-parameters' in cell['metadata'].get('tags', []):
            for line in ast.parse(''.join(cell['source'])).body:
                out[line.targets[0].id] = ast.literal_eval(line.value)
    return out


def folder_name(path):
    return f'{path.parent.parent.name}/{path.parent.name}'


def stem(path):
    return path.stem


@pytest.mark.parametrize('path', RESULTS, ids=folder_name)
def test_parameters_are_those_of_the_notebook_and_of_the_batch_file(path):
    result, given = read_json(path), injected(path.with_name('notebook.ipynb'))
    params = result['params']
    assert {k: params[k] for k in given} == given
    assert (result['experiment'], result['run']) == (path.parent.parent.name, path.parent.name)
    assert result['scale'] == params['scale']
    file = BATCHES.get(result['experiment'])
    if file and result['scale'] in SCALES:
        name = f'{result["experiment"]}/{result["run"]}'
        (planned,) = (p for p in read_batch(file, result['scale']) if p.name == name)
        # a notebook may have got a parameter since
        known = {k: v for k, v in planned.params.items() if k in params}
        assert params == known
        assert set(planned.given) <= set(known)


def rows_of(block):
    "The rows of a Markdown table, each a list of (column, cell)."
    head, _, *body = (re.split(r'(?<!\\)\|', line.strip())[1:-1] for line in block.splitlines())
    names = [name.strip() for name in head]
    return [list(zip(names, map(str.strip, line))) for line in body]


def tables(report):
    "The Markdown tables in a report's outputs: lists of rows, each a list of (column, cell)."
    for cell in cells_of(report):
        for output in cell.get('outputs', []):
            for block in re.findall(r'(?:^\|.*\n?)+', markdown_of(output), re.M):
                yield rows_of(block)


def linked(text):
    "The notebooks of runs that a text links to."
    found = re.findall(r'\]\(([^)]*notebook\.ipynb)\)', text)
    return [(ROOT / 'nbs' / 'reports' / path).resolve() for path in found]


def metrics(notebooks):
    return [read_json(n.with_name('result.json'))['metrics'] for n in notebooks]


def measured(notebooks, times):
    "Every `mean ± interval` that these runs can have been quoted with."
    every, out = metrics(notebooks), set()
    for one in every:
        for v in one.values():
            interval = f' ± {times * v["ci95"]:.2f}' if v['ci95'] is not None else ''
            out.add(f'{times * v["mean"]:.2f}{interval}')
    if len(every) > 1:
        for k in set.intersection(*map(set, every)):
            means = [times * one[k]['mean'] for one in every]
            out.add(f'{statistics.fmean(means):.2f} ± {statistics.stdev(means):.2f}')
    return out


PRINTED = {p.printed for p in published() if p.printed}


def check_beside(cells, runs):
    "A row of a table of `beside`; how many numbers of ours it had."
    known = {(p.row, p.column) for p in published()}
    here = {'not in our copy'}
    if (cells['row'], cells['column']) in known:
        here = {str(p) for p in published(row=cells['row'], column=cells['column'])}
    assert cells['published'].split(' (')[0] in here, cells
    assert cells['ours'] in measured(runs, 100) | measured(runs, 1), cells
    assert cells['scale'] in SCALES[1:], cells
    assert int(cells['seeds']) == len(runs), cells
    return 1


def check_untrained(cells):
    "The number of the network before any training, which was made by the run that it links to."
    if not (text := cells.get('untrained')):
        return 0
    (notebook,) = linked(text)
    assert text.startswith(f'[{quoted([read_json(notebook.with_name("result.json"))])}]'), cells
    return 1


def check_wide(row, runs):
    "A row of a wide table, published → ours in each column; how many numbers of ours it had."
    seen, name = 0, row[0][1]
    for column, cell in row[1:]:
        if ' → ' not in cell:
            continue
        theirs, ours = cell.split(' → ')
        here = {str(p) for p in published(row=name, column=column)}
        assert theirs.split(' (')[0] in here, (name, column, cell)
        if ours != '–':
            assert ours in measured(runs, 100), (name, column, cell)
            seen += 1
    return seen


INTERVAL = r'(?<![\d.+-])\d+\.\d\d ± \d+\.\d\d(?!\d)'


def check_any(text, runs):
    "Any other row: each interval is of its run or was published; how many there were."
    pairs = re.findall(INTERVAL, text)
    if runs:
        known = measured(runs, 100) | measured(runs, 1) | PRINTED
        assert set(pairs) <= known, (set(pairs) - known, text)
    return len(pairs) if runs else 0


def by_task(notebook):
    "The accuracy of each test task of a run, after the last step, in %."
    with notebook.with_name('tasks.csv').open() as f:
        rows = [row for row in csv.DictReader(f) if row['metric'] == 'test_accuracy']
    last = [name for name in rows[0] if name.startswith('step_') and rows[0][name]][-1]
    return [100 * float(row[last]) for row in rows]


def check_verdict(cells, runs):
    "A claim: the paired difference, computed anew from the tasks, and whether it decides."
    if cells['ours, points'] == '–':
        assert cells['verdict'] == '**not tested**' and not runs, cells
        return 0
    half = len(runs) // 2
    assert half == int(cells['seeds']), cells
    means, widths = [], []
    for better, worse in zip(map(by_task, runs[:half]), map(by_task, runs[half:])):
        apart = [a - b for a, b in zip(better, worse, strict=True)]
        means.append(statistics.fmean(apart))
        widths.append(1.96 * statistics.stdev(apart) / len(apart) ** 0.5)
    mean, width = statistics.fmean(means), statistics.fmean(widths)
    assert cells['ours, points'] == f'{mean:+.2f} ± {width:.2f}', (cells, mean, width)
    if cells['verdict'] == '**reproduced**':
        assert mean > width, cells
    if cells['verdict'] == '**not reproduced**':
        assert mean < -width, cells
    return 1


def check_row(row):
    "How many numbers of ours a row of a report has; each was checked."
    text, cells = ' | '.join(cell for _, cell in row), dict(row)
    runs = linked(text)
    for notebook in runs:
        assert notebook.is_file(), notebook
        assert notebook.with_name('result.json').is_file(), notebook
    if {'claim', 'verdict', 'runs'} <= set(cells):
        return check_verdict(cells, runs)
    if {'row', 'column', 'published', 'ours'} <= set(cells):
        return check_beside(cells, linked(cells['run'])) + check_untrained(cells)
    if {'±', 'queries', 'run'} <= set(cells):
        return check_wide(row, runs)
    return check_any(text, runs)


@pytest.mark.parametrize('path', REPORTS, ids=stem)
def test_numbers_of_a_report(path):
    rows = [row for table in tables(path) for row in table]
    seen = sum(map(check_row, rows))
    assert seen or not any('runs/' in cell for row in rows for _, cell in row)


# what a cell of a report must be, written down here a second time:
# row and column as published, the run, and which of its metrics
MEANT = {
    'mamlpp': [
        ('MAML++', '20-way 1-shot', 'mamlpp_t1/mamlpp_1shot', 'test_accuracy'),
        ('MAML (local replication)', '20-way 1-shot', 'mamlpp_t1/maml_1shot', 'test_accuracy'),
        ('MAML + LSLR', '20-way 1-shot', 'mamlpp_t1/maml_lslr_1shot', 'test_accuracy'),
        ('MAML + BNWB + BNRS', '20-way 1-shot', 'mamlpp_t1/maml_bnwb_1shot', 'test_accuracy'),
        ('MAML++', '20-way 5-shot', 'mamlpp_t1/mamlpp_5shot', 'test_accuracy'),
        ('Meta-SGD', '5-way 5-shot', 'mamlpp_t4/meta_sgd_5shot', 'test_accuracy'),
        ('MAML++', '5-way 1-shot', 'mamlpp_t4/mamlpp_1shot', 'test_accuracy'),
        (
            'MAML++, 1 step',
            'mini-ImageNet 5-way 1-shot',
            'mamlpp_t2/mamlpp_1shot_1step',
            'test_accuracy',
        ),
        (
            'MAML, 5 steps',
            'mini-ImageNet 5-way 1-shot',
            'mamlpp_t2/maml_1shot_5steps',
            'test_accuracy',
        ),
    ],
    'hidra': [
        ('regular head', 'Omniglot 10-way 5-shot', 'hidra_f3/maml_10way', 'test_accuracy'),
        (
            'one row of the head for all rows',
            'Omniglot 10-way 5-shot',
            'hidra_f3/maml_10way',
            'one_row',
        ),
        ('hidra 10, α 0.4, 1 step', '4', 'hidra_t2/hidra_10_rate0.4', 'accuracy_4way_step1'),
        ('hidra 2, α 0.4, 1 step', '7', 'hidra_t2/hidra_2_rate0.4', 'accuracy_7way_step1'),
        ('hidra 5-30, α 0.4, 1 step', '2', 'hidra_t2/hidra_5to30_rate0.4', 'accuracy_2way_step1'),
        ('hidra 10, α 0.01, 3 steps', '5', 'hidra_t2/hidra_10_rate0.01', 'accuracy_5way_step3'),
        ('hidra 2-10', '8', 'hidra_t1/hidra_2to10', 'accuracy_8way_step{test_steps}'),
        ('hidra 2', '15', 'hidra_t1/hidra_2', 'accuracy_15way_step{test_steps}'),
    ],
    'hypermaml': [
        ('neither', 'accuracy', 'hypermaml_t4/plain', 'test_accuracy'),
        ('enhancement', 'accuracy', 'hypermaml_t4/enhanced', 'test_accuracy'),
        ('switch', 'accuracy', 'hypermaml_t4/switched', 'test_accuracy'),
        (
            'switch and enhancement',
            'accuracy',
            'hypermaml_t2/emnist_hypermaml_1shot',
            'test_accuracy',
        ),
        (
            'HyperMAML',
            'Omniglot→EMNIST 1-shot',
            'hypermaml_t2/emnist_hypermaml_1shot',
            'test_accuracy',
        ),
        ('MAML', 'Omniglot→EMNIST 5-shot', 'hypermaml_t2/emnist_maml_5shot', 'test_accuracy'),
        ('HyperMAML', 'mini-ImageNet 1-shot', 'hypermaml_t1/mini_hypermaml_1shot', 'test_accuracy'),
        ('ProtoNet', 'mini-ImageNet 1-shot', 'hypermaml_t1/mini_proto_net_1shot', 'test_accuracy'),
        ('R2-D2', 'mini-ImageNet 1-shot', 'hypermaml_t1/mini_r2d2_1shot', 'test_accuracy'),
        ('Reptile', 'mini-ImageNet 5-shot', 'hypermaml_t1/mini_reptile_5shot', 'test_accuracy'),
    ],
}


def shown(report):
    "What a report shows as ours, by (row, column), in its tables of published numbers."
    out = {}
    for row in (row for table in tables(report) for row in table):
        cells = dict(row)
        if {'row', 'column', 'published', 'ours'} <= set(cells):
            out[cells['row'], cells['column']] = cells['ours']
        elif {'±', 'queries', 'run'} <= set(cells):
            out |= {(row[0][1], k): v.split(' → ')[1] for k, v in row[1:] if ' → ' in v}
    return out


def results_of(run):
    "The results of a run, all its seeds, at the largest scale that there is."
    table, name = run.split('/')
    for scale in reversed(SCALES[1:]):
        files = sorted((ROOT / 'runs' / table).glob(f'{name}_{scale}*/result.json'))
        whole = re.compile(rf'{re.escape(name)}_{scale}(_seed\d+)?')
        found = [read_json(f) for f in files if whole.fullmatch(f.parent.name)]
        if found:
            return found
    return []


def quoted(results, metric='test_accuracy'):
    "`mean ± spread` of a metric: of several seeds, or the interval of one; none: nothing has it."
    values = []
    for result in results:
        key = metric.format(**result['params'])
        if key in result['metrics']:
            values.append(result['metrics'][key])
    if not values:
        return None
    means = [100 * v['mean'] for v in values]
    spread = statistics.stdev(means) if len(means) > 1 else 100 * values[0]['ci95']
    return f'{statistics.fmean(means):.2f} ± {spread:.2f}'


@pytest.mark.parametrize('name', MEANT)
def test_cells_are_of_the_run_and_the_metric_that_is_meant(name):
    have = shown(ROOT / 'nbs' / 'reports' / f'{name}.ipynb')
    for row, column, run, metric in MEANT[name]:
        ours, want = have.get((row, column), NO_RUN), quoted(results_of(run), metric)
        if want is None:  # folded, or an empty cell of a row that was run
            assert ours in (NO_RUN, '–'), (row, column)
        else:
            assert ours == want, (row, column, run, metric)


def texts(report):
    "The Markdown outputs of a report."
    every = (markdown_of(o) for c in cells_of(report) for o in c.get('outputs', []))
    return [text for text in every if text]


def lines(text):
    "The rows of a Markdown table, each a list of cells."
    rows = (line.split('|')[1:-1] for line in text.splitlines() if line.startswith('| '))
    return [[cell.strip() for cell in row] for row in rows]


def check_adaptation(id, line, columns, of):
    "A row of HyperMAML's Tables 3 and 6, against what these methods measured."
    name, seconds, clean, as_published, accuracy, ours = line
    method, step = ('hypermaml', 1) if name == 'HyperMAML' else ('maml', int(name.split()[1]))
    assert seconds.split(' (')[0] == str(published(id, name, columns[0])[0])
    assert accuracy == str(published(id, name, columns[1])[0])
    for cell, key in ((clean, 'seconds_clean'), (as_published, 'seconds_as_published')):
        mine = of[method][f'{key}_step_{step}']['mean']
        base = of['maml'][f'{key}_step_1']['mean']
        assert cell == f'{mine:.2f} ({mine / base:.2f})', (name, key)
    found = of[method][f'accuracy_step_{step}']
    assert ours == f'{100 * found["mean"]:.2f} ± {100 * found["ci95"]:.2f}'


def test_seconds_and_ratios_of_adaptation():
    """HyperMAML's Tables 3 and 6.

    Each second, ratio and accuracy is of the run above the table, each published one of its row.
    """
    every = texts(ROOT / 'nbs' / 'reports' / 'hypermaml.ipynb')
    third, sixth = (text for text in every if '| ours, clean |' in text)
    for id, text, columns in (
        ('HM-T3', third, ('seconds', 'accuracy')),
        ('HM-T6', sixth, ('mini-ImageNet seconds', 'mini-ImageNet accuracy')),
    ):
        results = [read_json(n.with_name('result.json')) for n in linked(text)]
        of = {r['params']['method']: r['metrics'] for r in results}
        for line in lines(text)[1:]:
            check_adaptation(id, line, columns, of)


def test_milliseconds_of_an_iteration():
    "MAML++'s Table 3."
    (text,) = (t for t in texts(ROOT / 'nbs' / 'reports' / 'mamlpp.ipynb') if ' ms, ' in t)
    (found,) = metrics(linked(text))
    rows = {name: cells for name, *cells in lines(text)[1:]}
    phases = {f'MAML++, {part}' for part in ('phase 1', 'phase 2', 'phase 3', 'whole training')}
    assert set(rows) == {'MAML'} | phases
    for name, cells in rows.items():
        key = name.lower().replace('++', 'pp').replace(', ', '_').replace(' ', '_')
        for step, cell in enumerate(cells, 1):
            ratio = 1.0 if key == 'maml' else found[f'ratio_{key}_step_{step}']['mean']
            ms = found[f'ms_{key}_step_{step}']['mean']
            assert cell == f'{ms:.1f} ms, {ratio:.2f}', (name, step)


NAMED = re.compile(rf'(.+)_({"|".join(SCALES[1:])})(_seed\d+)?')


def test_every_committed_run_of_a_table_stands_in_a_report():
    "A run at the scale of a paper stands there in place of its short one."
    text, scales = ''.join(p.read_text() for p in REPORTS), {}
    papers = ('mamlpp_', 'hidra_', 'hypermaml_')
    ours = [f.parent for f in RESULTS if f.parent.parent.name.startswith(papers)]
    assert [d.name for d in ours if not NAMED.fullmatch(d.name)] == []
    for d in ours:
        run, scale, _ = NAMED.fullmatch(d.name).groups()
        scales.setdefault((d.parent, run), set()).add(scale)
    missing = []
    for d in ours:
        run, scale, _ = NAMED.fullmatch(d.name).groups()
        name = f'{d.parent.name}/{d.name}'
        largest = scale == max(scales[d.parent, run], key=SCALES.index)
        if largest and f'runs/{name}/notebook.ipynb' not in text:
            missing.append(name)
    assert not missing, f'execute nbs/reports again, or give these a place: {missing}'


# every table and figure of the papers, by the report and the word that its section's heading has
CATALOGUE = dict(
    mamlpp=('Figure 1', 'Table 1', 'Table 2', 'Table 3', 'Table 4'),
    hidra=(
        'Figure 1',
        'Figures 3 and 4',
        'Table 1 and Figure 5',
        'Table 2, Figures 6 and 7',
        'Figure 8',
    ),
    hypermaml=('Figures 1 and 3', 'Tables 1 and 5', 'Table 2', 'Tables 3 and 6', 'Table 4'),
)


def sections_of(report):
    "The cells of each section of a report, by its heading."
    sections, here = {}, ''
    for cell in cells_of(report):
        heading = re.match(r'## (.+)', ''.join(cell['source']))
        if heading and cell['cell_type'] == 'markdown':
            here = heading[1]
        sections.setdefault(here, []).append(cell)
    return sections


@pytest.mark.parametrize('name', CATALOGUE)
def test_every_table_and_figure_has_a_section_with_its_command_and_something_to_see(name):
    sections = sections_of(ROOT / 'nbs' / 'reports' / f'{name}.ipynb')
    for words in CATALOGUE[name]:
        (cells,) = (v for k, v in sections.items() if k.startswith(words))
        sources = [''.join(cell['source']) for cell in cells]
        assert any('fewshotmeta batch nbs/experiments/' in source for source in sources), words
        outputs = [set(o.get('data', {})) for cell in cells for o in cell.get('outputs', [])]
        assert any(output & {'text/markdown', 'image/png'} for output in outputs), words
        for command in re.findall(r'nbs/experiments/(\w+)\.yaml', ''.join(sources)):
            assert command in BATCHES


def test_runs_stay_small():
    "A learner may be larger than other files: HyperMAML's 445,766 parameters are 1.8 MB."
    assert TRACKED
    for path in TRACKED:
        learner = path.name == 'learner.safetensors'
        assert path.suffix != '.safetensors' or learner, path
        assert path.stat().st_size <= (2_000_000 if learner else 1_000_000), path


def test_the_runs_stay_under_60_megabytes():
    assert sum(path.stat().st_size for path in TRACKED) < 60e6


def test_the_guide_to_the_runs_names_each_folder():
    "The folders in `runs/README.md` are those that are there, and each has its batch file."
    text = (ROOT / 'runs' / 'README.md').read_text()
    rows = re.findall(r'^\| `(\w+)` \| (.*?) \|', text, re.M)
    named = [name for name, _ in rows]
    there = {path.relative_to(ROOT).parts[1] for path in TRACKED}
    assert sorted(named) == sorted(there - {'README.md'})
    for name, what in rows:
        assert (ROOT / 'nbs' / 'experiments' / f'{name}.yaml').is_file() or 'no runs' in what, name


def test_each_fault_that_no_test_finds_has_its_reason():
    outcomes = json.loads((ROOT / 'runs' / 'reliability' / 'mutants.json').read_text())
    reasons = json.loads((ROOT / 'tests' / 'survivors.json').read_text())
    left = {fault for fault, outcome in outcomes.items() if not outcome.startswith('killed')}
    assert len(outcomes) > 1500 and left == reasons.keys()
    assert all(len(why) > 20 for why in reasons.values())
