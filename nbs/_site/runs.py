"""Pages of executed runs: what was asked, what came out, the notebook; and the list of all."""

import ast
import copy
import json
import re
from convert import cells, joined, notebook, read, text_cell, titled
from pages import ROOT, Page

LIST = 'runs/index'
LEAD = (
    'Every run behind a number of this site: its parameters, its result and the notebook '
    'as it was executed.'
)
SINGLE = (
    'Single runs, in no batch file; [the report on Omniglot](../reports/omniglot.html) says what '
    'they are for.'
)


def parameters(nb, tag='parameters') -> dict:
    "Read the parameters in a notebook's cell with this tag: its own, or those papermill put in."
    cell = next((c for c in nb['cells'] if tag in c['metadata'].get('tags', [])), None)
    lines = ast.parse(joined(cell['source'])).body if cell else []
    return {n.targets[0].id: ast.literal_eval(n.value) for n in lines if isinstance(n, ast.Assign)}


def value(v) -> str:
    return f'`{json.dumps(v, ensure_ascii=False)}`'


def result_of(page: Page) -> dict:
    return read(ROOT / page.source.replace('notebook.ipynb', 'result.json'))


def accuracy(result) -> str:
    "Write the headline number of a run."
    found = result['metrics'].get('test_accuracy')
    if not found:
        return ''
    interval = '' if found['ci95'] is None else f' ± {100 * found["ci95"]:.2f}'
    return f'{100 * found["mean"]:.2f}{interval}'


def duration(seconds) -> str:
    return f'{seconds / 60:.0f} min' if seconds >= 90 else f'{seconds:.0f} s'


def table(head, rows) -> str:
    lines = [head, ['---'] * len(head), *rows]
    return '\n'.join('| ' + ' | '.join(map(str, line)) + ' |' for line in lines)


def parameter_table(params: dict) -> str:
    return table(('parameter', 'value'), [(f'`{k}`', value(v)) for k, v in params.items()])


def experiment_of(result, links) -> Page | None:
    "Find the page of the experiment that a run executed."
    return links.pages.get(f'nbs/experiments/{result.get("notebook")}')


def experiment_link(page: Page, result, links) -> str:
    experiment = experiment_of(result, links)
    if experiment:
        return f'[{result["notebook"]}]({page.up}{experiment.name}.html)'
    return f'`{result.get("notebook")}`'


def commit_link(result, links) -> str:
    if not result.get('commit'):
        return '–'
    link = f'[`{result["commit"][:7]}`]({links.git}/commit/{result["commit"]})'
    return link + (', with uncommitted changes' if result.get('dirty') else '')


def facts(page: Page, result, links) -> str:
    "Write the head of a run's page: the experiment, the number, the machine, the code."
    tasks = f'digest `{result["episodes_digest"]}`' if result.get('episodes_digest') else '–'
    rows = {
        'experiment': experiment_link(page, result, links),
        'scale': result['scale'],
        'seed': result['params'].get('seed', '–'),
    }
    if number := accuracy(result):
        n_tasks = result['metrics']['test_accuracy']['n']
        rows['test accuracy, %'] = f'{number} ({n_tasks} tasks)'
    rows |= {
        'test tasks': tasks,
        'machine': result['device'],
        'time': duration(result['seconds']),
        'finished': result['finished'][:10],
        'commit': commit_link(result, links),
        'versions': ', '.join(f'{k} {v}' for k, v in result['versions'].items()),
    }
    return table(('this run', ''), rows.items())


def asked_and_others(result, asked: dict) -> str:
    "Write the parameters: those that were asked for, and the others behind a click."
    rest = {k: v for k, v in result['params'].items() if k not in asked}
    if asked:
        told = f'Asked for:\n\n{parameter_table(asked)}'
    else:
        told = "None was asked for: the notebook's own."
    return (
        f'## Parameters\n\n{told}\n\n'
        '<details class="more"><summary>All the others, at their defaults</summary>\n\n'
        f'{parameter_table(rest)}\n\n</details>'
    )


def described(result, links) -> str:
    "Say in a sentence what a run is."
    experiment = experiment_of(result, links)
    name = result.get('notebook')
    if experiment:
        name = name.removesuffix('.ipynb')
    number = accuracy(result)
    ending = f': test accuracy {number} %.' if number else '.'
    return f'An executed run of {name} for {result["experiment"]}, scale {result["scale"]}{ending}'


def is_told_above(cell) -> bool:
    "Say whether a run's page has a cell's contents at its head: parameters, title."
    injected = 'injected-parameters' in cell['metadata'].get('tags', [])
    return injected or cell['cell_type'] == 'markdown' and joined(cell['source']).startswith('# ')


def run_page(page: Page, links) -> tuple[dict, dict]:
    "Make the notebook of a run's page, and what the site should know of it."
    nb, result = read(ROOT / page.source), result_of(page)
    asked = parameters(nb, 'injected-parameters')
    words = described(result, links)
    body = [cell for cell in nb['cells'] if not is_told_above(cell)]
    made = [
        titled(f'`{result["run"]}`', words),
        text_cell(facts(page, result, links)),
        text_cell(asked_and_others(result, asked)),
        text_cell('## The notebook, as it was executed'),
        *deeper(cells(dict(cells=body), page, links)),
    ]
    folder = page.source.removesuffix('notebook.ipynb')
    names = ('result.json', 'metrics.csv', 'tasks.csv', 'learner.safetensors')
    files = {name: folder + name for name in names if folder + name in links.files}
    return notebook(made), dict(description=words, files=files)


def deeper(made: list[dict]) -> list[dict]:
    "Put headings one level down, under the page's own."
    made = copy.deepcopy(made)
    for cell in made:
        if cell['cell_type'] == 'markdown':
            cell['source'] = re.sub(r'^(#{1,5}) ', r'#\1 ', cell['source'], flags=re.M)
    return made


def list_row(page: Page, result) -> tuple:
    return (
        f'[{result["run"]}]({page.name.removeprefix("runs/")}.html)',
        result['notebook'].removesuffix('.ipynb'),
        result['scale'],
        accuracy(result),
        duration(result['seconds']),
    )


def run_list(links) -> str:
    "List every run, by table and name."
    groups = {}
    for page in links.pages.values():
        if page.is_run:
            result = result_of(page)
            groups.setdefault(result['experiment'], []).append(list_row(page, result))
    parts = [f'# Executed runs\n\n{{.lead}}\n{LEAD}\n']
    head = ('run', 'experiment', 'scale', 'test accuracy, %', 'time')
    for name, rows in sorted(groups.items()):
        batch = f'nbs/experiments/{name}.yaml'
        listed = f'Listed in [{name}.yaml](../{batch}).'
        origin = listed if batch in links.files else SINGLE
        parts.append(f'## {name}\n\n{origin}\n\n{table(head, rows)}\n')
    return '\n'.join(parts)
