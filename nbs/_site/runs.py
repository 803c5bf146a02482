"""Pages of executed runs: what was asked, what came out, and the notebook as it was executed; and the list of all."""

import ast, json, re
from convert import cells, joined, notebook, read, text_cell, titled
from pages import Page, ROOT

LIST = 'runs/index'


def parameters(nb, tag='parameters') -> dict:
    "The parameters in a notebook's cell with this tag: its own, or those that papermill put in."
    cell = next((c for c in nb['cells'] if tag in c['metadata'].get('tags', [])), None)
    lines = ast.parse(joined(cell['source'])).body if cell else []
    return {n.targets[0].id: ast.literal_eval(n.value) for n in lines if isinstance(n, ast.Assign)}


def value(v):
    return f'`{json.dumps(v, ensure_ascii=False)}`'


def result_of(page: Page):
    return read(ROOT / page.source.replace('notebook.ipynb', 'result.json'))


def accuracy(result) -> str:
    "The headline number of a run."
    m = result['metrics'].get('test_accuracy')
    if not m:
        return ''
    return f'{100 * m["mean"]:.2f}' + (f' ± {100 * m["ci95"]:.2f}' if m['ci95'] is not None else '')


def duration(seconds) -> str:
    return f'{seconds / 60:.0f} min' if seconds >= 90 else f'{seconds:.0f} s'


def table(head, rows) -> str:
    return '\n'.join(
        '| ' + ' | '.join(map(str, r)) + ' |' for r in [head, ['---'] * len(head), *rows]
    )


def experiment_of(result, links) -> Page | None:
    "The page of the experiment that a run executed."
    return links.pages.get(f'nbs/experiments/{result.get("notebook")}')


def facts(page: Page, result, asked, links) -> str:
    "The head of a run's page."
    experiment = experiment_of(result, links)
    what = (
        f'[{result["notebook"]}]({page.up}{experiment.name}.html)'
        if experiment
        else f'`{result.get("notebook")}`'
    )
    rows = [
        ('experiment', what),
        ('scale', result['scale']),
        ('seed', result['params'].get('seed', '–')),
        *(
            [
                (
                    'test accuracy, %',
                    f'{accuracy(result)} ({result["metrics"]["test_accuracy"]["n"]} tasks)',
                )
            ]
            if accuracy(result)
            else []
        ),
        (
            'test tasks',
            f'digest `{result["episodes_digest"]}`' if result.get('episodes_digest') else '–',
        ),
        ('machine', result['device']),
        ('time', duration(result['seconds'])),
        ('finished', result['finished'][:10]),
        (
            'commit',
            f'[`{result["commit"][:7]}`]({links.git}/commit/{result["commit"]})'
            + (', with uncommitted changes' if result.get('dirty') else '')
            if result.get('commit')
            else '–',
        ),
        ('versions', ', '.join(f'{k} {v}' for k, v in result['versions'].items())),
    ]
    rest = {k: v for k, v in result['params'].items() if k not in asked}
    parts = [
        table(('this run', ''), rows),
        '## Parameters\n\nAsked for:\n\n'
        + table(('parameter', 'value'), [(f'`{k}`', value(v)) for k, v in asked.items()])
        if asked
        else '## Parameters\n\nNone was asked for: the notebook\'s own.',
        '<details class="more"><summary>All the others, at their defaults</summary>\n\n'
        + table(('parameter', 'value'), [(f'`{k}`', value(v)) for k, v in rest.items()])
        + '\n\n</details>',
    ]
    return '\n\n'.join(parts)


def run_page(page: Page, links) -> tuple[dict, dict]:
    "The notebook of a run's page, and what the site should know of it."
    nb, result = read(ROOT / page.source), result_of(page)
    asked = parameters(nb, 'injected-parameters')
    experiment = experiment_of(result, links)
    name = (
        experiment.source.rpartition('/')[2].removesuffix('.ipynb')
        if experiment
        else result.get('notebook')
    )
    folder = page.source.removesuffix('notebook.ipynb')
    words = (
        f'An executed run of {name} for {result["experiment"]}, scale {result["scale"]}'
        + (f': test accuracy {accuracy(result)} %' if accuracy(result) else '')
        + '.'
    )
    body = [
        c
        for c in nb['cells']
        if 'injected-parameters' not in c['metadata'].get('tags', [])
        and not (c['cell_type'] == 'markdown' and joined(c['source']).startswith('# '))
    ]
    made = [
        titled(f'`{result["run"]}`', words),
        text_cell(facts(page, result, asked, links)),
        text_cell('## The notebook, as it was executed'),
        *deeper(cells(dict(cells=body), page, links)),
    ]
    files = {n: folder + n for n in ('result.json', 'metrics.csv') if folder + n in links.files}
    return notebook(made), dict(description=words, files=files)


def deeper(made):
    "Headings one level down, under the page's own."
    for c in made:
        if c['cell_type'] == 'markdown':
            c['source'] = re.sub(r'^(#{1,5}) ', r'#\1 ', c['source'], flags=re.M)
    return made


def run_list(links) -> str:
    "Every run, by table and name."
    groups = {}
    for page in filter(lambda p: p.is_run, links.pages.values()):
        result = result_of(page)
        groups.setdefault(result['experiment'], []).append((page, result))
    parts = [
        '# Executed runs\n\n{.lead}\nEvery run behind a number of this site: its parameters, its result and the notebook as it was executed.\n'
    ]
    for name, found in sorted(groups.items()):
        yaml = f'nbs/experiments/{name}.yaml'
        origin = (
            f'Listed in [{name}.yaml](../{yaml}).\n\n'
            if yaml in links.files
            else 'Single runs, in no batch file; [the report on Omniglot](../reports/omniglot.html) says what they are for.\n\n'
        )
        rows = [
            (
                f'[{r["run"]}]({p.name.removeprefix("runs/")}.html)',
                r['notebook'].removesuffix('.ipynb'),
                r['scale'],
                accuracy(r),
                duration(r['seconds']),
            )
            for p, r in found
        ]
        parts.append(
            f'## {name}\n\n{origin}'
            + table(('run', 'experiment', 'scale', 'test accuracy, %', 'time'), rows)
            + '\n'
        )
    return '\n'.join(parts)
