"""The site: `python nbs/_site/build.py` writes _docs/, `python nbs/_site/build.py --serve` keeps it up to date and shows it."""

import argparse, json, os, shutil, sys, time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))  # for the processes that nbdev starts, too
from convert import cells, lead_of, notebook, read, text_cell, titled, with_outputs_of
from pages import ROOT, SECTIONS, Links, Page
from runs import LIST, parameters, result_of, run_list, run_page

PROC, DOCS = ROOT / '_proc', ROOT / '_docs'
SOURCE = PROC / '_sphinx'  # what Sphinx reads
STATE = PROC / '_sphinx.json'  # what the templates know of each page


def written(path: Path, text: str) -> bool:
    "Write a file if that changes it: Sphinx reads again what is newer than the last build."
    if path.exists() and path.read_text(encoding='utf-8') == text:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding='utf-8')
    return True


def fresh():
    "Start anew where the program that makes the site is newer than what it made."
    if not STATE.exists():
        return
    newer = {
        p.name
        for p in [
            *HERE.glob('*.py'),
            *HERE.glob('templates/*'),
            ROOT / 'settings.ini',
            ROOT / 'pyproject.toml',
        ]
        if p.stat().st_mtime > STATE.stat().st_mtime
    }
    for folder in (
        [PROC, DOCS]
        if newer & {'processing.py', 'settings.ini', 'pyproject.toml'}
        else [SOURCE, PROC / '_doctrees', DOCS]
        if newer
        else []
    ):
        shutil.rmtree(folder, ignore_errors=True)


def processed(n_workers: int):
    "nbdev's step, for the notebooks that changed since."
    import nbdev.serve
    from nbdev.doclinks import NbdevLookup
    from processing import SiteFilter

    if 'fewshotmeta' not in NbdevLookup().entries:
        sys.exit(
            'the package fewshotmeta, as it is installed, does not tell nbdev its names: install it again with `pip install -e .`'
        )
    nbdev.serve.FilterDefaults = SiteFilter
    sources = [s for s in PROC.rglob('*.ipynb') if s.relative_to(PROC).parts[0] != '_sphinx']

    def origin(source):
        return ROOT / 'nbs' / source.relative_to(PROC)

    changed = [
        s
        for s in sources
        if not origin(s).exists() or origin(s).stat().st_mtime > s.stat().st_mtime
    ]
    for source in changed:
        source.unlink()  # nbdev compares times with its folder's, too, and would miss what was saved meanwhile
    nbdev.serve.proc_nbs(
        n_workers=n_workers if not sources or len(changed) > 3 else 0
    )  # a worker imports torch anew, which takes longer than a notebook


def nearest_run(page: Page, nb, links) -> Page | None:
    "The run that an experiment's page shows: its code is nearest to today's; of those one of the notebook's own method, and the newest."
    method = parameters(nb).get('method')

    def rank(run):
        result = result_of(run)
        return (
            with_outputs_of(json.loads(json.dumps(nb)), read(ROOT / run.source))[1],
            result['params'].get('method') == method,
            result['finished'],
        )

    runs = [
        p
        for p in links.pages.values()
        if p.is_run and result_of(p).get('notebook') == Path(page.source).name
    ]
    return max(runs, key=rank, default=None)


def experiment(page: Page, nb, links):
    "An experiment with the outputs of a run instead of a smoke test's, and the note that says so."
    run = nearest_run(page, nb, links)
    if run is None:
        return with_outputs_of(nb, dict(cells=[]))[
            0
        ], 'No run of this experiment is kept yet, so this page shows no outputs.'
    executed = read(ROOT / run.source)
    asked = ', '.join(
        f'`{k}={v!r}`'
        for k, v in parameters(executed, 'injected-parameters').items()
        if k != 'scale'
    )
    return with_outputs_of(nb, executed)[0], (
        f'They are those of an executed run, [{run.name.removeprefix("runs/")}]({page.up}{run.name}.html), scale {result_of(run)["scale"]}, with {asked}. '
        'The values in the cell of parameters are those of a smoke test, which takes seconds.'
    )


def nbs_page(page: Page, links):
    "A page made from a notebook of nbs/."
    nb, note = read(PROC / page.source.removeprefix('nbs/')), ''
    title, lead, words = lead_of(nb, page, links)
    if page.is_experiment:
        nb, note = experiment(page, nb, links)
    made = [
        titled(title, lead),
        *(
            [text_cell(f':::{{admonition}} Where the outputs come from\n:class: note\n{note}\n:::')]
            if note
            else []
        ),
        *cells(nb, page, links),
    ]
    if page.name == 'index':
        made += [text_cell(toctrees(links))]
    return notebook(made), dict(description=words, files={})


def toctrees(links) -> str:
    "The sidebar."
    out = []
    for section in SECTIONS:
        names = [p.name for p in links.pages.values() if p.section == section]
        names = ['Overview <self>' if n == 'index' else n for n in names] + (
            [LIST] if section == 'Experiments' else []
        )
        if names:
            out.append(
                f':::{{toctree}}\n:hidden:\n:caption: {section}\n' + '\n'.join(names) + '\n:::'
            )
    return '\n\n'.join(out)


def made_from(page: Page, links) -> list[Path]:
    "What a page's contents depend on."
    if page.is_run:
        return [ROOT / page.source, ROOT / page.source.replace('notebook.ipynb', 'result.json')]
    return [
        PROC / page.source.removeprefix('nbs/'),
        *(
            (ROOT / p.source for p in links.pages.values() if p.is_run)
            if page.is_experiment
            else ()
        ),
    ]


def converted(links):
    "Our step: each notebook that nbdev processed, and each run, as a page for Sphinx; only what changed, while the pages are the same."
    known = {
        LIST: dict(
            description='Every run behind a number of this site.',
            files={},
            edit='',
            notebook='',
            colab='',
        )
    }
    before = json.loads(STATE.read_text(encoding='utf-8')) if STATE.exists() else {}
    same = set(before) == {LIST, *(p.name for p in links.pages.values())}
    for page in links.pages.values():
        there = SOURCE / f'{page.name}.ipynb'
        if (
            same
            and there.exists()
            and there.stat().st_mtime > max(p.stat().st_mtime for p in made_from(page, links))
        ):
            known[page.name] = before[page.name]
            continue
        nb, about = run_page(page, links) if page.is_run else nbs_page(page, links)
        written(there, json.dumps(nb, ensure_ascii=False, indent=1))
        known[page.name] = about | dict(
            notebook=page.source,
            run=page.is_run,
            colab=links.colab(page.source),
            edit='' if page.is_run else links.at_home(page.source, 'edit'),
        )
    written(SOURCE / f'{LIST}.md', run_list(links))
    for old in [
        p
        for p in SOURCE.rglob('*.ipynb')
        if p.relative_to(SOURCE).with_suffix('').as_posix() not in known
    ]:
        old.unlink()
        (DOCS / old.relative_to(SOURCE)).with_suffix('.html').unlink(missing_ok=True)
    written(STATE, json.dumps(known, ensure_ascii=False, indent=1))


def drawn():
    "Sphinx. Returns its exit status."
    from sphinx.application import Sphinx
    from sphinx.util.docutils import docutils_namespace, patch_docutils

    with patch_docutils(HERE), docutils_namespace():
        app = Sphinx(
            SOURCE,
            HERE,
            DOCS,
            PROC / '_doctrees',
            'html',
            parallel=os.cpu_count() or 1,
            warningiserror=True,
            status=None,
        )
        app.build()
        return app.statuscode


def carried(links):
    "The files that the site carries, and no others of their folders."
    for old in [
        p
        for folder in ('nbs', 'runs')
        for p in (DOCS / folder).rglob('*')
        if p.is_file() and p.suffix != '.html' and p.relative_to(DOCS).as_posix() not in links.files
    ]:
        old.unlink()
    for name in links.files:
        there = DOCS / name
        if there.exists() and there.stat().st_mtime >= (ROOT / name).stat().st_mtime:
            continue
        there.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, there)


def build(n_workers=os.cpu_count() or 1) -> int:
    "Everything that changed."
    os.chdir(ROOT)
    start, links = time.time(), Links()
    fresh()
    processed(n_workers)
    t1 = time.time()
    converted(links)
    t2 = time.time()
    status = drawn()
    t3 = time.time()
    STATE.touch()
    if status:
        shutil.rmtree(
            PROC / '_doctrees', ignore_errors=True
        )  # Sphinx warns of a page when it reads it: it shall do so again
    carried(links)
    print(
        f'_docs: {len(links.pages)} pages in {time.time() - start:.1f} s (notebooks {t1 - start:.1f}, conversion {t2 - t1:.1f}, Sphinx {t3 - t2:.1f})'
    )
    return status


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--serve', action='store_true', help='show the site and keep it up to date')
    parser.add_argument('--port', type=int, default=8000)
    args = parser.parse_args()
    if args.serve:
        from serve import serve

        serve(args.port)
    sys.exit(build())
