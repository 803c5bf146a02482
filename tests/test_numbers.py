"""Every number of a report can be traced: report = result JSON = injected parameters = batch file, and published = data file."""

import ast, json, re, statistics, subprocess
import pytest
from conftest import ROOT
from fewshotmeta.lab.batches import SCALES, read_batch
from fewshotmeta.data.files import read_json
from fewshotmeta.lab.published import published
from fewshotmeta.lab.reports import NO_DATA, NO_RUN, NOT_BUILT

TRACKED = [
    ROOT / p
    for p in subprocess.run(
        ['git', 'ls-files', 'runs'], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
]
RESULTS = [
    f
    for f in TRACKED
    if re.fullmatch(r'runs/[^/]+/[^/]+/result\.json', f.relative_to(ROOT).as_posix())
]
REPORTS = sorted((ROOT / 'nbs' / 'reports').glob('*.ipynb'))
BATCHES = {p.stem: p for p in (ROOT / 'nbs' / 'experiments').glob('*.yaml')}


def injected(notebook):
    "The parameters that papermill put in, as a dict."
    cells = [
        c
        for c in json.loads(notebook.read_text())['cells']
        if 'injected-parameters' in c['metadata'].get('tags', [])
    ]
    return {
        n.targets[0].id: ast.literal_eval(n.value)
        for c in cells
        for n in ast.parse(''.join(c['source'])).body
    }


@pytest.mark.parametrize('path', RESULTS, ids=lambda f: f'{f.parent.parent.name}/{f.parent.name}')
def test_parameters_are_those_of_the_notebook_and_of_the_batch_file(path):
    result, given = read_json(path), injected(path.with_name('notebook.ipynb'))
    assert {k: result['params'][k] for k in given} == given
    assert (result['experiment'], result['run']) == (
        path.parent.parent.name,
        path.parent.name,
    ) and result['scale'] == result['params']['scale']
    if (file := BATCHES.get(result['experiment'])) and result['scale'] in SCALES:
        (planned,) = (p for p in read_batch(file, result['scale']) if p.slug == result['run'])
        known = {
            k: v for k, v in planned.params.items() if k in result['params']
        }  # a notebook may have got a parameter since
        assert result['params'] == known and set(planned.given) <= set(known)


def tables(report):
    "The Markdown tables in a report's outputs: lists of rows, each a dict by column."
    for c in json.loads(report.read_text())['cells']:
        for o in c.get('outputs', []):
            for block in re.findall(
                r'(?:^\|.*\n?)+', ''.join(o.get('data', {}).get('text/markdown', '')), re.M
            ):
                head, _, *body = [
                    [x.strip() for x in re.split(r'(?<!\\)\|', line.strip())[1:-1]]
                    for line in block.splitlines()
                ]
                yield [list(zip(head, line)) for line in body]


def linked(text):
    return [
        (ROOT / 'nbs' / 'reports' / p).resolve()
        for p in re.findall(r'\]\(([^)]*notebook\.ipynb)\)', text)
    ]


def metrics(notebooks):
    return [read_json(n.with_name('result.json'))['metrics'] for n in notebooks]


def measured(notebooks, times):
    "Every `mean ± interval` that these runs can have been quoted with."
    ms = metrics(notebooks)
    out = {
        f'{times * v["mean"]:.2f}'
        + (f' ± {times * v["ci95"]:.2f}' if v['ci95'] is not None else '')
        for m in ms
        for v in m.values()
    }
    if len(ms) > 1:
        for k in set.intersection(*map(set, ms)):
            means = [times * m[k]['mean'] for m in ms]
            out.add(f'{statistics.fmean(means):.2f} ± {statistics.stdev(means):.2f}')
    return out


PRINTED = {p.printed for p in published() if p.printed}


@pytest.mark.parametrize('path', REPORTS, ids=lambda p: p.stem)
def test_numbers_of_a_report(path):
    seen = 0
    for table in tables(path):
        for row in table:
            text, cells = ' | '.join(v for _, v in row), dict(row)
            runs = linked(text)
            for n in runs:
                assert n.is_file() and n.with_name('result.json').is_file(), n
            if {'row', 'column', 'published', 'ours'} <= set(cells):  # a table of `beside`
                here = (
                    {str(p) for p in published(row=cells['row'], column=cells['column'])}
                    if (cells['row'], cells['column']) in {(p.row, p.column) for p in published()}
                    else {'not in our copy'}
                )
                assert cells['published'].split(' (')[0] in here, (path, row)
                if not runs:
                    assert cells['ours'] in (NO_RUN, NO_DATA, NOT_BUILT), row
                else:
                    assert (
                        cells['ours'] in measured(runs, 100) | measured(runs, 1)
                        and cells['scale'] in SCALES[1:]
                        and int(cells['seeds']) == len(runs)
                    ), (path, row)
                    seen += 1
            elif {'±', 'queries', 'run'} <= set(cells):  # a wide table
                for k, v in row[1:]:
                    if ' → ' in v:
                        theirs, ours = v.split(' → ')
                        assert theirs.split(' (')[0] in {
                            str(p) for p in published(row=row[0][1], column=k)
                        }, (row[0], k, v)
                        if ours != '–':
                            assert ours in measured(runs, 100), (row[0], k, v)
                            seen += 1
            elif runs:  # any other table: each interval is of its run or was published
                known = measured(runs, 100) | measured(runs, 1) | PRINTED
                for pair in re.findall(r'(?<![\d.+-])\d+\.\d\d ± \d+\.\d\d(?!\d)', text):
                    assert pair in known, (path, pair, row)
                    seen += 1
    assert seen or not any('runs/' in v for t in tables(path) for r in t for _, v in r)


# what a cell of a report must be: row and column as published, the run, and which of its metrics; written down here a second time
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
        ('switch and enhancement', 'accuracy', 'hypermaml_t4/switched_enhanced', 'test_accuracy'),
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
    for table in tables(report):
        for row in table:
            cells = dict(row)
            if {'row', 'column', 'published', 'ours'} <= set(cells):
                out[cells['row'], cells['column']] = cells['ours']
            elif {'±', 'queries', 'run'} <= set(cells):
                out |= {(row[0][1], k): v.split(' → ')[1] for k, v in row[1:] if ' → ' in v}
    return out


@pytest.mark.parametrize('name', MEANT)
def test_cells_are_of_the_run_and_the_metric_that_is_meant(name):
    have = shown(ROOT / 'nbs' / 'reports' / f'{name}.ipynb')
    for row, column, run, metric in MEANT[name]:
        ours = have[row, column]
        results = [
            read_json(f)
            for f in sorted((ROOT / 'runs').glob(f'{run}_short*/result.json'))
            + sorted((ROOT / 'runs').glob(f'{run}_paper*/result.json'))
            if re.fullmatch(
                rf'{re.escape(run.split("/")[1])}_(short|paper)(_seed\d+)?', f.parent.name
            )
        ]
        if scales := [r['scale'] for r in results]:
            results = [r for r in results if r['scale'] == scales[-1]]
        values = [
            r['metrics'][k] for r in results if (k := metric.format(**r['params'])) in r['metrics']
        ]
        if not values:
            assert ours in (NO_RUN, '–'), (row, column)
            continue
        means = [100 * v['mean'] for v in values]
        spread = statistics.stdev(means) if len(means) > 1 else 100 * values[0]['ci95']
        assert ours == f'{statistics.fmean(means):.2f} ± {spread:.2f}', (row, column, run, metric)


def texts(report):
    "The Markdown outputs of a report."
    return [
        t
        for c in json.loads(report.read_text())['cells']
        for o in c.get('outputs', [])
        if (t := ''.join(o.get('data', {}).get('text/markdown', '')))
    ]


def lines(text):
    return [
        [x.strip() for x in line.split('|')[1:-1]]
        for line in text.splitlines()
        if line.startswith('| ')
    ]


def test_seconds_and_ratios_of_adaptation():
    "HyperMAML's Tables 3 and 6: each second, ratio and accuracy is of the run above the table, each published one of its row."
    tables = [
        t for t in texts(ROOT / 'nbs' / 'reports' / 'hypermaml.ipynb') if '| ours, clean |' in t
    ]
    assert len(tables) == 2
    for id, text, (sec, acc) in zip(
        ('HM-T3', 'HM-T6'),
        tables,
        (('seconds', 'accuracy'), ('mini-ImageNet seconds', 'mini-ImageNet accuracy')),
    ):
        of = {
            r['params']['method']: r['metrics']
            for n in linked(text)
            for r in [read_json(n.with_name('result.json'))]
        }
        for name, seconds, clean, as_published, accuracy, ours in lines(text)[1:]:
            method, step = (
                ('hypermaml', 1) if name == 'HyperMAML' else ('maml', int(name.split()[1]))
            )
            assert seconds.split(' (')[0] == str(published(id, name, sec)[0]) and accuracy == str(
                published(id, name, acc)[0]
            )
            m, base = of[method], of['maml']
            for shown_, key in ((clean, 'seconds_clean'), (as_published, 'seconds_as_published')):
                assert (
                    shown_
                    == f'{m[f"{key}_step_{step}"]["mean"]:.2f} ({m[f"{key}_step_{step}"]["mean"] / base[f"{key}_step_1"]["mean"]:.2f})'
                ), (name, key)
            assert (
                ours
                == f'{100 * m[f"accuracy_step_{step}"]["mean"]:.2f} ± {100 * m[f"accuracy_step_{step}"]["ci95"]:.2f}'
            )


def test_milliseconds_of_an_iteration():
    "MAML++'s Table 3."
    (text,) = (t for t in texts(ROOT / 'nbs' / 'reports' / 'mamlpp.ipynb') if ' ms, ' in t)
    (notebook,) = linked(text)
    m, rows = metrics([notebook])[0], {name: cells for name, *cells in lines(text)[1:]}
    assert set(rows) == {
        'MAML',
        'MAML++, phase 1',
        'MAML++, phase 2',
        'MAML++, phase 3',
        'MAML++, whole training',
    }
    for name, cells in rows.items():
        key = name.lower().replace('++', 'pp').replace(', ', '_').replace(' ', '_')
        for step, cell in enumerate(cells, 1):
            ratio = 1.0 if key == 'maml' else m[f'ratio_{key}_step_{step}']['mean']
            assert cell == f'{m[f"ms_{key}_step_{step}"]["mean"]:.1f} ms, {ratio:.2f}', (name, step)


def test_every_committed_run_of_a_table_stands_in_a_report():
    text, scales = ''.join(p.read_text() for p in REPORTS), {}
    named = re.compile(r'(.+)_(short|paper)(_seed\d+)?')
    ours = [
        f.parent
        for f in RESULTS
        if f.parent.parent.name.startswith(('mamlpp_', 'hidra_', 'hypermaml_'))
    ]
    assert [d.name for d in ours if not named.fullmatch(d.name)] == []
    for d in ours:
        scales.setdefault((d.parent, named.fullmatch(d.name)[1]), set()).add(
            named.fullmatch(d.name)[2]
        )
    largest = [
        d
        for d in ours
        if named.fullmatch(d.name)[2] == min(scales[d.parent, named.fullmatch(d.name)[1]])
    ]  # paper before short
    missing = [
        f'{d.parent.name}/{d.name}'
        for d in largest
        if f'runs/{d.parent.name}/{d.name}/notebook.ipynb' not in text
    ]
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


@pytest.mark.parametrize('name', CATALOGUE)
def test_every_table_and_figure_has_a_section_with_its_command_and_something_to_see(name):
    sections, here = {}, ''
    for c in json.loads((ROOT / 'nbs' / 'reports' / f'{name}.ipynb').read_text())['cells']:
        if (m := re.match(r'## (.+)', ''.join(c['source']))) and c['cell_type'] == 'markdown':
            here = m[1]
        sections.setdefault(here, []).append(c)
    for words in CATALOGUE[name]:
        (cells,) = (v for k, v in sections.items() if k.startswith(words))
        assert any('fewshotmeta batch nbs/experiments/' in ''.join(c['source']) for c in cells), (
            words
        )
        assert any(
            set(o.get('data', {})) & {'text/markdown', 'image/png'}
            for c in cells
            for o in c.get('outputs', [])
        ), words
        for command in re.findall(
            r'nbs/experiments/(\w+)\.yaml', ''.join(''.join(c['source']) for c in cells)
        ):
            assert command in BATCHES


def test_runs_stay_small():
    assert TRACKED and not [
        p for p in TRACKED if p.suffix == '.safetensors' or p.stat().st_size > 1_000_000
    ]
