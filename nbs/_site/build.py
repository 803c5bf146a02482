"""Make the site in _docs/: nbdev reads the notebooks, we convert them, Sphinx draws them."""

import json
import os
import re
import shutil
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))  # for the processes that nbdev starts, too
from checked import asked_of, is_whole, notebook_of, parameters, result_of
from convert import cells, lead_of, notebook, read, text_cell, titled, with_outputs_of
from pages import ASKED, ROOT, SECTIONS, Links, Page, in_address
from runs import LIST, run_list, run_page
from safety import in_code, in_words

PROC = ROOT / '_proc'
DOCS = ROOT / '_docs'
SOURCE = PROC / '_sphinx'  # what Sphinx reads
DOCTREES = PROC / '_doctrees'  # what it has read
STATE = PROC / '_sphinx.json'  # what the templates know of each page


def written(path: Path, text: str) -> bool:
    "Write a file if that changes it: Sphinx reads again what is newer than the last build."
    text = text.encode('utf-8', 'replace').decode('utf-8')  # half a pair, of a run's JSON
    if path.exists() and path.read_text(encoding='utf-8') == text:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding='utf-8')
    return True


# nbdev's step


def fresh():
    "Start anew where the program that makes the site is newer than what it made."
    last = STATE if STATE.exists() else PROC  # which a build leaves that did not come to its end
    if not last.exists():
        return
    made = last.stat().st_mtime
    settings = [ROOT / 'settings.ini', ROOT / 'pyproject.toml']
    program = [*HERE.glob('*.py'), *HERE.glob('templates/*'), *settings]
    newer = {path.name for path in program if path.stat().st_mtime > made}
    stale = []
    if newer:
        stale = [SOURCE, DOCTREES, DOCS]
    if newer & {'processing.py', 'settings.ini', 'pyproject.toml'}:
        stale = [PROC, DOCS]
    for folder in stale:
        shutil.rmtree(folder, ignore_errors=True)


def is_outdated(processed: Path) -> bool:
    "Say whether a notebook was saved, or removed, after nbdev processed it."
    origin = ROOT / 'nbs' / processed.relative_to(PROC)
    return not origin.exists() or origin.stat().st_mtime > processed.stat().st_mtime


def processed(n_workers: int):
    "Let nbdev process the notebooks that changed since."
    import nbdev.serve
    from nbdev.doclinks import NbdevLookup
    from processing import SiteFilter

    if 'fewshotmeta' not in NbdevLookup().entries:
        sys.exit(
            'the package fewshotmeta, as it is installed, does not tell nbdev its names: '
            'install it again with `pip install -e .`'
        )
    nbdev.serve.FilterDefaults = SiteFilter
    there = [p for p in PROC.rglob('*.ipynb') if p.relative_to(PROC).parts[0] != SOURCE.name]
    changed = [path for path in there if is_outdated(path)]
    for path in changed:
        # nbdev compares times with its folder's, too, and would miss what was saved meanwhile
        path.unlink()
    # a worker imports torch anew, which takes longer than a notebook
    few = there and len(changed) <= 3
    nbdev.serve.proc_nbs(n_workers=0 if few else n_workers)


# our step


def can_show(page: Page, nb, run: Page, links) -> bool:
    "Say whether an experiment's page can be made with the outputs of a run."
    try:
        cells(with_outputs_of(nb, notebook_of(run))[0], page, links)
    except Exception:  # of the run's outputs, or of our own text, which fails without them, too
        return False
    return is_whole(run)


def nearest_run(page: Page, nb, links) -> Page | None:
    """Choose the run that an experiment's page shows.

    Its code is nearest to today's; of those it is one of the notebook's own method, the newest.
    A run that is damaged is passed over.
    """
    method = parameters(nb).get('method')

    def rank(run):
        result = result_of(run)
        same = with_outputs_of(nb, notebook_of(run))[1]
        return same, result['params'].get('method') == method, result['finished']

    name = Path(page.source).name
    runs = [p for p in links.pages.values() if p.is_run and result_of(p)['notebook'] == name]
    for run in sorted(runs, key=rank, reverse=True):
        if can_show(page, nb, run, links):
            return run
    return None


def experiment(page: Page, nb, links):
    "Show an experiment with the outputs of a run instead of a smoke test's, and say so."
    run = nearest_run(page, nb, links)
    if run is None:
        note = 'No run of this experiment is kept yet, so this page shows no outputs.'
        return with_outputs_of(nb, dict(cells=[]))[0], note
    executed = notebook_of(run)
    asked, _ = asked_of(executed)
    told = ', '.join(in_code(f'{k}={v!r}') for k, v in asked.items() if k != 'scale')
    scale = in_words(result_of(run)['scale'])
    link = f'[{in_words(run.name.removeprefix("runs/"))}]({page.up}{in_address(run.name)}.html)'
    note = (
        f'They are those of an executed run, {link}, scale {scale}, with {told}. '
        'The values in the cell of parameters are those of a smoke test, which takes seconds.'
    )
    return with_outputs_of(nb, executed)[0], note


def admonition(title: str, text: str) -> str:
    return f':::{{admonition}} {title}\n:class: note\n{text}\n:::'


def nbs_page(page: Page, links):
    "Make a page from a notebook of nbs/."
    nb = read(PROC / page.source.removeprefix('nbs/'))
    title, lead, words = lead_of(nb, page, links)
    made = [titled(title, lead)]
    if page.name in ASKED:
        made.append(text_cell(asked(page)))
    if page.is_experiment:
        nb, note = experiment(page, nb, links)
        made.append(text_cell(admonition('Where the outputs come from', note)))
    made += cells(nb, page, links)
    if page.name == 'index':
        made.append(text_cell(toctrees(links)))
    return notebook(made), dict(description=words, files={})


def asked(page: Page) -> str:
    "Write the index entries by which the search finds a page."
    entries = ', '.join(f'! {entry}' for entry in ASKED[page.name])
    return f':::{{index}} {entries}\n:::'


def toctrees(links) -> str:
    "Write the sidebar."
    out = []
    for section in SECTIONS:
        names = [page.name for page in links.pages.values() if page.section == section]
        names = ['Overview <self>' if name == 'index' else name for name in names]
        if section == 'Experiments':
            names.append(LIST)
        if names:
            listed = '\n'.join(names)
            out.append(f':::{{toctree}}\n:hidden:\n:caption: {section}\n{listed}\n:::')
    return '\n\n'.join(out)


def made_from(page: Page, links) -> list[Path]:
    "List what a page's contents depend on."
    if page.is_run:
        return [ROOT / page.source, ROOT / page.source.replace('notebook.ipynb', 'result.json')]
    own = [PROC / page.source.removeprefix('nbs/')]
    if not page.is_experiment:
        return own
    return own + [ROOT / p.source for p in links.pages.values() if p.is_run]


def is_newer(path: Path, sources: list[Path]) -> bool:
    "Say whether a file was made after all that it is made from was saved."
    return path.exists() and path.stat().st_mtime > max(p.stat().st_mtime for p in sources)


def brings_scripts(made: dict) -> bool:
    "Say whether a notebook's own outputs in HTML, or its text, hold scripts."
    outs = [output for cell in made['cells'] for output in cell.get('outputs', [])]
    texts = [output.get('data', {}).get('text/html', '') for output in outs]
    texts += [cell['source'] for cell in made['cells'] if cell['cell_type'] == 'markdown']
    return any(re.search(r'<script|<[^>]+\son\w+\s*=', text, re.I) for text in texts)


def page_made(page: Page, links, there: Path) -> dict:
    "Make one page for Sphinx, and say what the templates should know of it."
    links.beside.clear()
    made, about = run_page(page, links) if page.is_run else nbs_page(page, links)
    written(there, json.dumps(made, ensure_ascii=False, indent=1))
    return about | dict(
        notebook=page.source,
        run=page.is_run,
        shows_runs=page.shows_runs,
        scripts=not page.shows_runs and brings_scripts(made),
        colab=links.colab(page.source),
        edit='' if page.is_run else links.at_home(page.source, 'edit'),
        beside=dict(links.beside),
    )


def converted(links):
    "Make each notebook that nbdev processed, and each run, a page for Sphinx, where it changed."
    words = 'Every run behind a number of this site.'
    known = {LIST: dict(description=words, files={}, edit='', notebook='', colab='')}
    known[LIST]['shows_runs'] = True
    before = json.loads(STATE.read_text(encoding='utf-8')) if STATE.exists() else {}
    same_pages = set(before) == {LIST, *(page.name for page in links.pages.values())}
    for page in links.pages.values():
        there = SOURCE / f'{page.name}.ipynb'
        if same_pages and is_newer(there, made_from(page, links)):
            known[page.name] = before[page.name]
        else:
            known[page.name] = page_made(page, links, there)
    for name, about in known.items():
        if faults := about.get('faults'):
            print(f'warning: {name}: {"; ".join(faults)}', file=sys.stderr)
    written(SOURCE / f'{LIST}.md', run_list(links))
    forgotten(known)
    written(STATE, json.dumps(known, ensure_ascii=False, indent=1))


def forgotten(known):
    "Remove the pages that are no more."
    for old in list(SOURCE.rglob('*.ipynb')):
        name = old.relative_to(SOURCE)
        if name.with_suffix('').as_posix() not in known:
            old.unlink()
            (DOCS / name).with_suffix('.html').unlink(missing_ok=True)


# Sphinx's step


def drawn() -> int:
    "Let Sphinx draw the pages. Returns its exit status."
    from sphinx.application import Sphinx
    from sphinx.util.docutils import docutils_namespace, patch_docutils

    with patch_docutils(HERE), docutils_namespace():
        app = Sphinx(
            SOURCE,
            HERE,
            DOCS,
            DOCTREES,
            'html',
            parallel=os.cpu_count() or 1,
            warningiserror=True,
            status=None,
        )
        app.build()
    if app.statuscode:
        # Sphinx warns of a page when it reads it: it shall do so again
        shutil.rmtree(DOCTREES, ignore_errors=True)
    return app.statuscode


def carried(links):
    "Copy the files that the site carries, and remove others from their folders."
    files = {name: name for name in links.files}
    for page in json.loads(STATE.read_text(encoding='utf-8')).values():
        files |= page.get('beside', {})
    folders = ('nbs', 'runs', 'files')
    there = [p for folder in folders for p in (DOCS / folder).rglob('*') if p.is_file()]
    for old in there:
        if old.suffix != '.html' and old.relative_to(DOCS).as_posix() not in files:
            old.unlink()
    for name, origin in files.items():
        source, there = ROOT / origin, DOCS / name
        if there.exists() and there.stat().st_mtime >= source.stat().st_mtime:
            continue
        there.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, there)


def build(n_workers: int = os.cpu_count() or 1) -> int:
    "Make what changed. Returns Sphinx's exit status."
    os.chdir(ROOT)
    times = [time.time()]
    links = Links()
    fresh()
    processed(n_workers)
    times.append(time.time())
    converted(links)
    times.append(time.time())
    status = drawn()
    times.append(time.time())
    STATE.touch()
    carried(links)
    notebooks, conversion, sphinx = (b - a for a, b in zip(times, times[1:]))
    print(
        f'_docs: {len(links.pages)} pages in {time.time() - times[0]:.1f} s (notebooks '
        f'{notebooks:.1f}, conversion {conversion:.1f}, Sphinx {sphinx:.1f})'
    )
    return status
