"""Pages of executed runs: what was asked, what came out, the notebook; and the list of all."""

import json
import math
import re
from checked import asked_of, checked_notebook, checked_result, result_of
from convert import cells, joined, notebook, text_cell, titled
from pages import LenientLinks, Page, in_address
from safety import in_cell, in_code, in_words

LIST = 'runs/index'
LEAD = (
    'Every run behind a number of this site: its parameters, its result and the notebook '
    'as it was executed.'
)
STEPS = (
    'The test accuracy of a run is the one after its last inner step of testing, which the table '
    'names: 0 stands for methods that take no inner step. The page of a run lists the accuracy '
    'after every step.'
)
STEP = re.compile(r'accuracy_(?:(?P<ways>\d+)way_step|step_)(?P<step>\d{1,4})')
NOT_ALL = 'Not everything of this run can be shown'
SINGLE = (
    'Single runs, in no batch file; [the report on Omniglot](../reports/omniglot.html) says what '
    'they are for.'
)


def value(v) -> str:
    return in_cell(json.dumps(v, ensure_ascii=False))


def percent(found: dict) -> str:
    "Write an accuracy and its interval."
    interval = '' if found['ci95'] is None else f' ± {100 * found["ci95"]:.2f}'
    return f'{100 * found["mean"]:.2f}{interval}'


def accuracy(result) -> str:
    "Write the headline number of a run."
    found = result['metrics'].get('test_accuracy')
    return percent(found) if found else ''


def is_headline(found: dict, result) -> bool:
    "Say whether a metric is the headline number, to the last digit."
    headline = result['metrics'].get('test_accuracy', {})
    return all(found[name] == headline.get(name) for name in ('mean', 'ci95', 'n'))


def by_step(result) -> tuple[str, dict[int, dict]]:
    """Map each number of inner steps to the test accuracy after them, of what the headline is of.

    An experiment may test on several numbers of ways: they come first, '' where there is one.
    """
    groups = {}
    for key, metric in result['metrics'].items():
        if match := STEP.fullmatch(key):
            groups.setdefault(match['ways'] or '', {})[int(match['step'])] = metric
    found = (
        (ways, steps)
        for ways, steps in groups.items()
        if any(is_headline(metric, result) for metric in steps.values())
    )
    return next(found, ('', {}))


def step_of(result) -> int | None:
    "Find the inner step that the headline number is after: the last that has this very number."
    steps = by_step(result)[1]
    return max((k for k, metric in steps.items() if is_headline(metric, result)), default=None)


def in_steps(result) -> str:
    "Say after how many inner steps the headline number is; '' where that is not known."
    step, (ways, _) = step_of(result), by_step(result)
    if step is None:
        return ''
    told = f'after inner step {step}' if step else 'without an inner step'
    return f'{ways}-way, {told}' if ways else told


def duration(seconds) -> str:
    if math.isnan(seconds):
        return '–'
    return f'{seconds / 60:.0f} min' if seconds >= 90 else f'{seconds:.0f} s'


def table(head, rows) -> str:
    lines = [head, ['---'] * len(head), *rows]
    return '\n'.join('| ' + ' | '.join(map(str, line)) + ' |' for line in lines)


def parameter_table(params: dict) -> str:
    return table(('parameter', 'value'), [(in_cell(k), value(v)) for k, v in params.items()])


def experiment_of(result, links) -> Page | None:
    "Find the page of the experiment that a run executed."
    return links.pages.get(f'nbs/experiments/{result.get("notebook")}')


def experiment_link(page: Page, result, links) -> str:
    experiment = experiment_of(result, links)
    if experiment:
        return f'[{in_words(result["notebook"])}]({page.up}{experiment.name}.html)'
    return in_cell(result.get('notebook'))


def commit_link(result, links) -> str:
    commit = str(result.get('commit') or '')
    if not re.fullmatch('[0-9a-f]+', commit):
        return in_words(commit) or '–'
    link = f'`{commit[:7]}`'
    if links.git:
        link = f'[{link}]({links.git}/commit/{commit})'
    return link + (', with uncommitted changes' if result.get('dirty') else '')


def facts(page: Page, result, links) -> str:
    "Write the head of a run's page: the experiment, the number, the machine, the code."
    digest = result.get('episodes_digest')
    tasks = f'digest {in_cell(digest)}' if digest else '–'
    versions = ', '.join(f'{k} {v}' for k, v in result['versions'].items())
    rows = {
        'experiment': experiment_link(page, result, links),
        'scale': in_words(result['scale']),
        'seed': in_words(result['params'].get('seed', '–')),
    }
    if number := accuracy(result):
        n_tasks = result['metrics']['test_accuracy']['n']
        where = ', '.join(filter(None, (f'{n_tasks} tasks', in_steps(result))))
        rows['test accuracy, %'] = in_words(f'{number} ({where})')
    if len(steps := by_step(result)[1]) > 1:
        listed = ', '.join(f'{step}: {percent(found)}' for step, found in sorted(steps.items()))
        rows['after each inner step, %'] = in_words(listed)
    rows |= {
        'test tasks': tasks,
        'machine': in_words(result['device']),
        'time': duration(result['seconds']),
        'finished': in_words(result['finished'][:10]),
        'commit': commit_link(result, links),
        'versions': in_words(versions),
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
    told = ', '.join(filter(None, (f'test accuracy {number} %', in_steps(result))))
    ending = f': {told}.' if number else '.'
    return f'An executed run of {name} for {result["experiment"]}, scale {result["scale"]}{ending}'


def is_told_above(cell) -> bool:
    "Say whether a run's page has a cell's contents at its head: parameters, title."
    injected = 'injected-parameters' in cell['metadata'].get('tags', [])
    return injected or cell['cell_type'] == 'markdown' and joined(cell['source']).startswith('# ')


def converted_alone(cell, page: Page, links) -> tuple[list[dict], list[str]]:
    "Convert a cell, or say why that cannot be done."
    try:
        return cells(dict(cells=[cell]), page, links), []
    except Exception as e:
        return [], [f'a cell cannot be shown: {type(e).__name__}: {e}']


def body_of(nb, page: Page, links) -> tuple[list[dict], list[str]]:
    "Convert the cells of a run; one that cannot be converted costs itself."
    body = [cell for cell in nb['cells'] if not is_told_above(cell)]
    try:
        return cells(dict(cells=body), page, links), []
    except Exception:
        alone = [converted_alone(cell, page, links) for cell in body]
        return sum((made for made, _ in alone), []), sum((said for _, said in alone), [])


def warning(faults: list[str]) -> list[dict]:
    "Say at the head of a page what is wrong with its run."
    if not faults:
        return []
    told = in_words('; '.join(faults))
    return [text_cell(f':::{{admonition}} {NOT_ALL}\n:class: warning\n{told}\n:::')]


def run_page(page: Page, links) -> tuple[dict, dict]:
    "Make the notebook of a run's page, and what the site should know of it."
    links = LenientLinks(links)
    nb, faults = checked_notebook(page)
    result, more = checked_result(page)
    asked, not_read = asked_of(nb)
    body, not_shown = body_of(nb, page, links)
    faults = list(dict.fromkeys([*more, *faults, *not_read, *not_shown, *links.dead]))
    words = described(result, links)
    made = [
        titled(in_code(result['run']), in_words(words)),
        *warning(faults),
        text_cell(facts(page, result, links)),
        text_cell(asked_and_others(result, asked)),
        text_cell('## The notebook, as it was executed'),
        *body,
    ]
    folder = page.source.removesuffix('notebook.ipynb')
    names = ('result.json', 'metrics.csv', 'tasks.csv', 'learner.safetensors')
    files = {name: folder + name for name in names if folder + name in links.files}
    return notebook(made), dict(description=words, files=files, faults=faults)


def list_row(page: Page, result) -> tuple:
    step = step_of(result)
    return (
        f'[{in_words(result["run"])}]({in_address(page.name.removeprefix("runs/"))}.html)',
        in_words(result['notebook'].removesuffix('.ipynb')),
        in_words(result['scale']),
        accuracy(result),
        '–' if step is None else step,
        duration(result['seconds']),
    )


def run_list(links) -> str:
    "List every run, by table and name."
    groups = {}
    for page in links.pages.values():
        if page.is_run:
            result = result_of(page)
            groups.setdefault(result['experiment'], []).append(list_row(page, result))
    parts = [f'# Executed runs\n\n{{.lead}}\n{LEAD}\n\n{STEPS}\n']
    head = ('run', 'experiment', 'scale', 'test accuracy, %', 'after inner step', 'time')
    for name, rows in sorted(groups.items()):
        batch = f'nbs/experiments/{name}.yaml'
        listed = f'Listed in [{in_words(name)}.yaml](../{in_address(batch)}).'
        origin = listed if batch in links.files else SINGLE
        parts.append(f'## {in_words(name)}\n\n{origin}\n\n{table(head, rows)}\n')
    return '\n'.join(parts)
