"""Which notebooks are pages, where a reader finds them, and where a link of a notebook leads in the site."""

import fnmatch, os, re
from configparser import ConfigParser
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NO_PAGE = {'99_all'}  # re-exports the other rooms: nothing to read

# A reader's order: the wings are sections; MAML is the first page of its own.
# A name outranks a pattern, so that a new room appears among its neighbours without a word here.
SECTIONS = {
    'Start': ['index'],
    'Data': ['data/*'],
    'Learners': ['learners/10_maml', 'learners/[1-9]*', 'learners/*'],
    'Training': ['training/*'],
    'Engine': ['engine/*'],
    'Lab': ['lab/*'],
    'Experiments': ['experiments/train', 'experiments/*'],
    'Reports': [
        'reports/mamlpp',
        'reports/hidra',
        'reports/hypermaml',
        'reports/omniglot',
        'reports/*',
    ],
    'How-to': [
        'howto/your_images',
        'howto/your_backbone',
        'howto/add_a_method',
        'howto/cluster',
        'howto/results',
        'howto/which_method',
        '*',
    ],
}


@dataclass(frozen=True)
class Page:
    "A page of the site, made from one notebook."

    source: str  # of the notebook, from the repository's root
    name: str  # of the page, without .html
    section: str  # the sidebar's caption; '' for a run, which no sidebar lists

    @property
    def is_run(self):
        return self.source.startswith('runs/')

    @property
    def is_experiment(self):
        return self.source.startswith('nbs/experiments/')

    @property
    def folder(self):
        return (
            'nbs/experiments' if self.is_run else self.source.rpartition('/')[0]
        )  # that its links are relative to

    @property
    def up(self):
        return '../' * self.name.count('/')


def settings():
    "settings.ini, nbdev's one configuration."
    config = ConfigParser(interpolation=None)
    config.read(ROOT / 'settings.ini', encoding='utf-8')
    return config['DEFAULT']


def page_name(path: str) -> str:
    "The name that nbdev's links give a notebook: 10_maml.ipynb is maml.html."
    folder, _, name = path.removesuffix('.ipynb').lower().rpartition('/')
    return f'{folder}/'.lstrip('/') + re.sub(r'^\d+[a-z0-9]*_', '', name)


def notebooks() -> list[str]:
    "The notebooks of nbs/, without suffix."
    found = (p.relative_to(ROOT / 'nbs') for p in (ROOT / 'nbs').rglob('*.ipynb'))
    return sorted(
        p.with_suffix('').as_posix()
        for p in found
        if not any(part[0] in '._' for part in p.parts) and p.stem not in NO_PAGE
    )


def in_order(names) -> dict[str, list[str]]:
    "Section → notebooks, in reading order."
    left, claimed = (
        set(names),
        {p for patterns in SECTIONS.values() for p in patterns if '*' not in p},
    )
    out = {}
    for section, patterns in SECTIONS.items():
        found = [
            n
            for p in patterns
            for n in (sorted(fnmatch.filter(left - claimed, p)) if '*' in p else {p} & left)
        ]
        out[section] = list(dict.fromkeys(found))
        left -= set(found)
    return {k: v for k, v in out.items() if v}


def run_folders() -> list[Path]:
    "Folders of executed runs; smoke runs are no results."
    return sorted(
        p.parent
        for p in (ROOT / 'runs').glob('*/*/notebook.ipynb')
        if '_smoke' not in p.parent.name and (p.parent / 'result.json').exists()
    )


def pages() -> dict[str, Page]:
    "Source → page, in reading order; the runs at the end."
    out = [
        Page(f'nbs/{n}.ipynb', page_name(n), section)
        for section, names in in_order(notebooks()).items()
        for n in names
    ]
    out += [
        Page(
            (f / 'notebook.ipynb').relative_to(ROOT).as_posix(), f.relative_to(ROOT).as_posix(), ''
        )
        for f in run_folders()
    ]
    return {p.source: p for p in out}


def shipped() -> list[str]:
    "Files that the site carries as they are: the notebooks, the experiments' lists of runs, and what runs left."
    folders = [f.relative_to(ROOT) for f in run_folders()]
    runs = [
        f / p.name
        for f in folders
        for p in (ROOT / f).iterdir()
        if p.suffix in ('.json', '.csv', '.ipynb', '.png') and not p.name.startswith('.')
    ]
    other = [
        p.relative_to(ROOT)
        for pattern in (
            'nbs/experiments/*.yaml',
            'runs/speed/*/*.json',
            'runs/speed/*/*.png',
            'runs/*/*.json',
        )
        for p in ROOT.glob(pattern)
    ]
    return sorted({p.as_posix() for p in runs + other} | {f'nbs/{n}.ipynb' for n in notebooks()})


class Links:
    "Where links lead: from a notebook's point of view to the site's."

    def __init__(self):
        s = settings()
        self.pages, self.files = pages(), set(shipped())
        self.site = f'{s["doc_host"]}{s["doc_baseurl"]}/'
        self.git, self.branch = s['git_url'], s['branch']

    def __call__(self, link: str, page: Page) -> str:
        "The address, relative to the page. Raises `ValueError` where nothing is there."
        if link.startswith(self.site):
            return page.up + re.sub(
                r'#(.*\.)?_.*', '', link.removeprefix(self.site)
            )  # a private name has no place on its page
        if re.match(r'[a-z]+:|#|//', link) or not link:
            return link
        url, mark, fragment = link.partition('#')
        path = os.path.normpath(f'{page.folder}/{url}').replace(os.sep, '/')
        if path in self.pages:
            return f'{page.up}{self.pages[path].name}.html{mark}{fragment}'
        if path in self.files:
            return page.up + path
        if not (ROOT / path).exists() or path.startswith('..'):
            raise ValueError(
                f'{page.source}: a link to {link}, but there is no {path} in the repository'
            )
        return self.at_home(path)

    def at_home(self, path: str, verb='blob'):
        "A file's address at the repository's home."
        return f'{self.git}/{verb}/{self.branch}/{path}'

    def colab(self, path: str):
        "The address at which Colab opens a notebook."
        return f'https://colab.research.google.com/github/{self.git.removeprefix("https://github.com/")}/blob/{self.branch}/{path}'
