"""Every number of a report can be traced: report = result JSON = injected parameters = batch file, and published = data file."""
import ast, json, re, statistics
import pytest
from conftest import ROOT
from fewshotmeta.batches import SCALES, read_batch
from fewshotmeta.files import read_json
from fewshotmeta.published import published
from fewshotmeta.reports import NO_DATA, NO_RUN, NOT_BUILT

RESULTS = sorted(f for f in (ROOT/'runs').glob('*/*/result.json') if '_smoke' not in f.parent.name)
REPORTS = sorted((ROOT/'nbs'/'reports').glob('*.ipynb'))
BATCHES = {p.stem: p for p in (ROOT/'nbs'/'experiments').glob('*.yaml')}

def injected(notebook):
    "The parameters that papermill put in, as a dict."
    cells = [c for c in json.loads(notebook.read_text())['cells'] if 'injected-parameters' in c['metadata'].get('tags', [])]
    return {n.targets[0].id: ast.literal_eval(n.value) for c in cells for n in ast.parse(''.join(c['source'])).body}

@pytest.mark.parametrize('path', RESULTS, ids=lambda f: f'{f.parent.parent.name}/{f.parent.name}')
def test_parameters_are_those_of_the_notebook_and_of_the_batch_file(path):
    result, given = read_json(path), injected(path.with_name('notebook.ipynb'))
    assert {k: result['params'][k] for k in given} == given
    assert (result['experiment'], result['run']) == (path.parent.parent.name, path.parent.name) and result['scale'] == result['params']['scale']
    if (file := BATCHES.get(result['experiment'])) and result['scale'] in SCALES:
        planned, = (p for p in read_batch(file, result['scale']) if p.slug == result['run'])
        known = {k: v for k, v in planned.params.items() if k in result['params']}         # a notebook may have got a parameter since
        assert result['params'] == known and set(planned.given) <= set(known)

def tables(report):
    "The Markdown tables in a report's outputs: lists of rows, each a dict by column."
    for c in json.loads(report.read_text())['cells']:
        for o in c.get('outputs', []):
            for block in re.findall(r'(?:^\|.*\n?)+', ''.join(o.get('data', {}).get('text/markdown', '')), re.M):
                head, _, *body = [[x.strip() for x in re.split(r'(?<!\\)\|', line.strip())[1:-1]] for line in block.splitlines()]
                yield [list(zip(head, line)) for line in body]

def linked(text): return [(ROOT/'nbs'/'reports'/p).resolve() for p in re.findall(r'\]\(([^)]*notebook\.ipynb)\)', text)]
def metrics(notebooks): return [read_json(n.with_name('result.json'))['metrics'] for n in notebooks]

def measured(notebooks, times):
    "Every `mean ± interval` that these runs can have been quoted with."
    ms = metrics(notebooks)
    out = {f'{times*v["mean"]:.2f}' + (f' ± {times*v["ci95"]:.2f}' if v['ci95'] is not None else '') for m in ms for v in m.values()}
    if len(ms) > 1:
        for k in set.intersection(*map(set, ms)):
            means = [times*m[k]['mean'] for m in ms]
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
            for n in runs: assert n.is_file() and n.with_name('result.json').is_file(), n
            if {'row', 'column', 'published', 'ours'} <= set(cells):                      # a table of `beside`
                here = {str(p) for p in published(row=cells['row'], column=cells['column'])} if (cells['row'], cells['column']) in {(p.row, p.column) for p in published()} else {'not in the text at hand'}
                assert cells['published'].split(' (')[0] in here, (path, row)
                if not runs: assert cells['ours'] in (NO_RUN, NO_DATA, NOT_BUILT), row
                else: assert cells['ours'] in measured(runs, 100) | measured(runs, 1) and cells['scale'] in SCALES[1:] and int(cells['seeds']) == len(runs), (path, row); seen += 1
            elif any(' → ' in v for _, v in row):                                         # a wide table
                for k, v in row:
                    if ' → ' in v:
                        theirs, ours = v.split(' → ')
                        assert theirs.split(' (')[0] in {str(p) for p in published(row=row[0][1], column=k)}, (row[0], k, v)
                        if ours != '–': assert ours in measured(runs, 100), (row[0], k, v); seen += 1
            elif runs:                                                                    # any other table: each interval is of its run or was published
                known = measured(runs, 100) | measured(runs, 1) | PRINTED
                for pair in re.findall(r'(?<![\d.+-])\d+\.\d\d ± \d+\.\d\d(?!\d)', text): assert pair in known, (path, pair, row); seen += 1
    assert seen or not any('runs/' in v for t in tables(path) for r in t for _, v in r)

def test_every_committed_run_of_a_table_stands_in_a_report():
    text = ''.join(p.read_text() for p in REPORTS)
    missing = [f'{f.parent.parent.name}/{f.parent.name}' for f in RESULTS if f.parent.parent.name.startswith(('mamlpp_', 'hidra_', 'hypermaml_')) and f'runs/{f.parent.parent.name}/{f.parent.name}/notebook.ipynb' not in text]
    assert not missing, f'execute nbs/reports again: {missing}'

def test_every_published_table_stands_in_a_report():
    text = ''.join(''.join(c['source']) for p in REPORTS for c in json.loads(p.read_text())['cells'])
    assert not [i for i in {p.id for p in published()} if i not in text and not i.endswith('-text') and i != 'MAML']
