"""Which notebooks are pages, where a reader finds them, and where a link leads in the site."""

import fnmatch
import os
import re
import shutil
import subprocess
import urllib.parse
from configparser import ConfigParser
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NO_PAGE = {'99_all'}  # re-exports the other rooms: nothing to read
CARRIED = {'.json', '.csv', '.ipynb', '.png'}  # what the site carries of a run

# A reader's order: the wings are sections; MAML is the first page of its own.
# A name outranks a pattern, so that a new room appears among its neighbours without a word here.
SECTIONS = {
    'Start': ['index', 'howto/few_shot_learning', 'howto/glossary', 'contents'],
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

# What readers look for in words that a page does not have, or has beside many others: the search
# lists these pages first.
ASKED = {
    'index': ['install', 'installation', 'pip install', 'cite', 'citation'],
    'data/downloads': ['download data', 'download a data set'],
    'engine/plans': ['GPU', 'CUDA', 'speed', 'out of memory'],
    'training/evaluation': ['confidence interval', 'accuracy'],
    'training/saving': ['save a learner', 'save a model', 'load a learner', 'load a model'],
    'training/checkpoints': ['continue a training run', 'checkpoint', 'resume'],
    'howto/add_a_method': ['my own method', 'plugin'],
    'howto/cluster': ['cluster', 'Slurm', 'several GPUs'],
    'howto/use_a_learner': ['pretrained', 'use a model'],
    'howto/your_backbone': ['my own network'],
    'howto/your_images': ['my own images', 'my own data'],
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
    def shows_runs(self):
        "Whether its outputs are those of a run: data, which anyone may have committed."
        return self.is_run or self.is_experiment

    @property
    def folder(self):
        "The folder that its links are relative to: a run was executed where its experiment stands."
        return 'nbs/experiments' if self.is_run else self.source.rpartition('/')[0]

    @property
    def up(self):
        return '../' * self.name.count('/')


def settings():
    "Read settings.ini, nbdev's one configuration."
    config = ConfigParser(interpolation=None)
    config.read(ROOT / 'settings.ini', encoding='utf-8')
    return config['DEFAULT']


def site_address() -> str:
    "Read where the site will stand; nbdev's links begin with it."
    read = settings()
    return f'{read["doc_host"]}{read["doc_baseurl"]}/'


def page_name(path: str) -> str:
    "Name a notebook's page as nbdev's links do: learners/10_maml.ipynb is learners/maml.html."
    folder, _, name = path.removesuffix('.ipynb').lower().rpartition('/')
    return f'{folder}/'.lstrip('/') + re.sub(r'^\d+[a-z0-9]*_', '', name)


def last_name(path: str) -> str:
    "Name a page without its folder."
    return page_name(path).rpartition('/')[2]


def is_room(path: str) -> bool:
    "Say whether a path names a notebook that is a module, too: it begins with a number."
    return re.search(r'/\d\w*\.ipynb$', path) is not None


def is_shown(path: Path) -> bool:
    "Say whether no part of a path is hidden."
    return not any(part.startswith(('.', '_')) for part in path.parts)


def notebooks() -> list[str]:
    "List the notebooks of nbs/, without suffix."
    found = (p.relative_to(ROOT / 'nbs') for p in (ROOT / 'nbs').rglob('*.ipynb'))
    kept = (p for p in found if is_shown(p) and p.stem not in NO_PAGE)
    return sorted(p.with_suffix('').as_posix() for p in kept)


def matching(names: set, pattern: str, claimed: set) -> list[str]:
    "List the names that an entry of SECTIONS takes: itself, or its pattern's that no entry names."
    if '*' in pattern:
        return sorted(fnmatch.filter(names - claimed, pattern))
    return [pattern] if pattern in names else []


def in_order(names) -> dict[str, list[str]]:
    "Sort notebooks into sections, in reading order."
    entries = (entry for section in SECTIONS.values() for entry in section)
    claimed = {entry for entry in entries if '*' not in entry}
    left, out = set(names), {}
    for section, patterns in SECTIONS.items():
        out[section] = []
        for pattern in patterns:
            taken = matching(left, pattern, claimed)
            out[section] += taken
            left -= set(taken)
    return {section: found for section, found in out.items() if found}


def committed(folder: str) -> list[str] | None:
    "List the files that git tracks under a folder; None where there is no git to ask."
    if not (ROOT / '.git').exists() or not shutil.which('git'):
        return None
    command = ['git', '-C', str(ROOT), 'ls-files', '-z', '--', folder]
    asked = subprocess.run(command, capture_output=True, text=True)
    if asked.returncode:
        raise RuntimeError(f'git does not say what is committed in {folder}/: {asked.stderr}')
    return [name for name in asked.stdout.split('\0') if name]


def is_file_in(folder: Path, path: Path) -> bool:
    "Say whether a file is there, and no symbolic link leads it out of a folder."
    return path.is_file() and path.resolve().is_relative_to(folder)


def in_address(path: str) -> str:
    "Write a file's path as part of an address."
    return urllib.parse.quote(path, safe='/=+,@')


def run_files() -> list[Path]:
    """List the files of executed runs, from the repository's root.

    The site shows what is committed: what a user has run beside that changes no page. A downloaded
    archive has no git that could tell the two apart, so every run counts there. Smoke runs show
    that an experiment works, not what it gives: they are no results.
    """
    names = committed('runs')
    if names is None:
        found = [p.relative_to(ROOT) for p in (ROOT / 'runs').rglob('*')]
    else:
        found = [Path(name) for name in names]
    kept = (p for p in found if is_shown(p) and '_smoke' not in p.parent.name)
    inside = (ROOT / 'runs').resolve()
    return sorted(p for p in kept if is_file_in(inside, ROOT / p))


def run_folders() -> list[Path]:
    "List the folders of executed runs: each with a notebook and a result."
    files = set(run_files())
    folders = [p.parent for p in files if p.name == 'notebook.ipynb' and len(p.parts) == 4]
    return sorted(ROOT / folder for folder in folders if folder / 'result.json' in files)


def pages() -> dict[str, Page]:
    "Map each source to its page, in reading order, with the runs at the end."
    out = []
    for section, names in in_order(notebooks()).items():
        out += [Page(f'nbs/{name}.ipynb', page_name(name), section) for name in names]
    for folder in run_folders():
        name = folder.relative_to(ROOT).as_posix()
        out.append(Page(f'{name}/notebook.ipynb', name, ''))
    return {page.source: page for page in out}


def shipped() -> set[str]:
    "List what the site carries as it is: notebooks, the experiments' lists of runs, runs' files."
    lists = (p.relative_to(ROOT) for p in (ROOT / 'nbs' / 'experiments').glob('*.yaml'))
    runs = (p for p in run_files() if p.suffix in CARRIED)
    out = {path.as_posix() for path in (*lists, *runs)}
    return out | {f'nbs/{name}.ipynb' for name in notebooks()}


class Links:
    "Where links lead: from a notebook's point of view to the site's."

    def __init__(self):
        read = settings()
        self.pages = pages()
        self.files = shipped()
        self.site = site_address()
        self.git = read['git_url'].rstrip('/')  # '': the repository has no home that is known
        self.beside = {}  # where there is none: a file that a page links to, by its place here
        self.branch = read['branch']

    def __call__(self, link: str, page: Page) -> str:
        "Give the address, relative to the page. Raises `ValueError` where nothing is there."
        if link.startswith(self.site):
            # a private name has no place on its page
            return page.up + re.sub(r'#(.*\.)?_.*', '', link.removeprefix(self.site))
        if re.match(r'[a-z]+:|#|//', link) or not link:
            return link
        url, mark, fragment = link.partition('#')
        path = os.path.normpath(f'{page.folder}/{url}').replace(os.sep, '/')
        if page.is_run:
            path = self.moved(path)
        if path in self.pages:
            return f'{page.up}{in_address(self.pages[path].name)}.html{mark}{fragment}'
        if path in self.files:
            return page.up + in_address(path)
        if not (ROOT / path).exists() or path.startswith('..'):
            raise ValueError(
                f'{page.source}: a link to {link}, but there is no {path} in the repository'
            )
        return self.at_home(path) if self.git else self.carried(path, page)

    def carried(self, path: str, page: Page) -> str:
        "Let the site carry a file that no repository's home shows. Raises `ValueError`."
        if page.shows_runs or not is_file_in(ROOT, ROOT / path):
            raise ValueError(
                f'{page.source}: a link to {path}, which only the home of the repository could '
                'show: set git_url in settings.ini'
            )
        name = f'files/{path.lstrip(".")}'  # GitHub's pages leave out .github/
        self.beside[name] = path
        return page.up + in_address(name)

    def moved(self, path: str) -> str:
        "Find by its name a room that an executed run linked to and that has moved since."
        if (ROOT / path).exists() or not is_room(path):
            return path
        name = last_name(path)
        rooms = (source for source in self.pages if is_room(source))
        found = [source for source in rooms if last_name(source) == name]
        return found[0] if len(found) == 1 else path

    def at_home(self, path: str, verb: str = 'blob') -> str:
        "Give a file's address at the repository's home; '' where none is known."
        return self.git and f'{self.git}/{verb}/{self.branch}/{in_address(path)}'

    def colab(self, path: str) -> str:
        "Give the address at which Colab opens a notebook; '' where it could not find it."
        repository = self.git.removeprefix('https://github.com/')
        if repository == self.git:
            return ''
        at = f'{repository}/blob/{self.branch}/{in_address(path)}'
        return f'https://colab.research.google.com/github/{at}'


class LenientLinks:
    "Where the links of a run lead: a dead one to the head of the page, which says so."

    def __init__(self, links):
        self.links = links
        self.dead = []

    def __getattr__(self, name):
        return getattr(self.links, name)

    def __call__(self, link: str, page: Page) -> str:
        try:
            return self.links(link, page)
        except (ValueError, OSError) as e:
            self.dead.append(str(e).removeprefix(f'{page.source}: '))
            return '#'
