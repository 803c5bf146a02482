"""Mutants of the rooms that must not lose a result: the small faults that no test finds.

`make mutants` makes each mutant in a copy of the repository and runs the tests that reach its line,
the quickest first. `--write FILE` keeps the outcomes and goes on from them; with `--again` those
that survived are tried once more, but for those that survivors.json explains. The faults are in
mutations.py.
"""

import argparse, compileall, contextlib, importlib, itertools, json
import os, resource, shutil, signal, subprocess, sys, tempfile, threading, time
from functools import partial
from pathlib import Path
import pytest
from mutations import AS_IT_IS, mutants_of, room_file

ROOT = Path(__file__).parent.parent
# imported once, before the forks; not ours
PRELOADED = 'torch numpy pandas matplotlib.pyplot papermill nbclient nbformat hypothesis'.split()
PRELOADED += 'yaml filelock safetensors.torch submitit fastcore.all torchvision'.split()
# the tests of a room
TESTS = {
    'data.files': 'files pages properties downloads reliability data again fuzz_files fuzz_runs',
    'data.banks': 'data pages properties episodes augment cifar_and_tiered reliability fuzz_data',
    'lab.runs': 'again runs batches pages command reliability fuzz_runs',
    'lab.states': 'again pages batches runs fuzz_runs',
    'training.checkpoints': 'training pages saving properties reliability fuzz_files',
}
# what takes long or needs what is not everywhere
LEFT_OUT = 'random_moments slurm real smoke wheel bare same_bytes many_processes'
LEFT_OUT += ' interrupted_experiment lacks_characters by_its_name_alone little_memory no_batch_file'
LEFT_OUT = ' or '.join(LEFT_OUT.split())
LEAST = 20  # seconds that a test may take at least
EXPLAINED = json.loads((ROOT / 'tests' / 'survivors.json').read_text())  # why no test finds it


# --- copies of the repository
def copied(folder):
    "Copy what tests need, so that processes which they start see the mutant, too."
    skip, repo = shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints'), folder / 'repo'
    for name in ('fewshotmeta', 'tests', 'nbs'):
        shutil.copytree(ROOT / name, repo / name, ignore=skip)
    run = Path('runs/hidra_t2/maml_2way_short_seed0')  # which a test alters
    shutil.copytree(ROOT / run, repo / run)
    for name in ('README.md', 'Makefile', 'pyproject.toml', 'settings.ini'):
        (repo / name).symlink_to(ROOT / name)
    with contextlib.suppress(OSError):  # without git
        git = ['git', '-c', 'user.name=x', '-c', 'user.email=x', '-C', str(repo)]
        for command in (['init', '-q'], ['add', '.'], ['commit', '-qm', 'x']):
            subprocess.run([*git, *command], stderr=subprocess.DEVNULL)
    compileall.compile_dir(repo / 'fewshotmeta', quiet=2)
    for room in TESTS:
        wing, name = room.split('.')
        for compiled in (repo / 'fewshotmeta' / wing / '__pycache__').glob(f'{name}.*'):
            compiled.unlink()


def renewed(folder, cache):
    "Leave a copy as it was: no processes, mounts, files; the cache as after the unmutated tests."
    mark = f'FEWSHOTMETA_CACHE={folder}/'.encode()
    for environ in Path('/proc').glob('[0-9]*/environ'):
        with contextlib.suppress(OSError):
            if mark in environ.read_bytes():
                os.kill(int(environ.parent.name), signal.SIGKILL)
    for line in Path('/proc/mounts').read_text().splitlines():
        if line.split()[1].startswith(f'{folder}/'):
            subprocess.run(['umount', '-l', line.split()[1]])
    for name in ('tmp', 'cache', 'home'):
        shutil.rmtree(folder / name, ignore_errors=True)
    (folder / 'home').mkdir()
    shutil.copytree(cache, folder / 'cache')


# --- tests, in a fork
class Watched:
    "A plugin of pytest: which tests are run, until when, how they end, what lines they reach."

    def __init__(self, folder, chosen=None, seconds=None, rooms=None, part=slice(None)):
        self.folder, self.chosen, self.seconds, self.part = folder, chosen, seconds or {}, part
        self.files = {str(folder / 'repo' / 'fewshotmeta' / room_file(r)): r for r in rooms or ()}
        self.found, self.lines = {}, set()

    def pytest_collection_modifyitems(self, items):
        if self.chosen is not None:
            by_name = {item.nodeid: item for item in items}
            items[:] = [by_name[name] for name in self.chosen]
        items[:] = items[self.part]

    def pytest_runtest_logstart(self, nodeid):
        limit = LEAST + 10 * self.seconds.get(nodeid, 10)
        (self.folder / 'until').write_text(str(time.time() + limit))
        self.lines.clear()

    def pytest_runtest_logreport(self, report):
        one = self.found.setdefault(report.nodeid, dict(seconds=0, passed=True))
        one['seconds'] += report.duration
        one['passed'] &= report.passed

    def pytest_runtest_logfinish(self, nodeid):
        reached = {room: [] for room in self.files.values()}
        for room, line in sorted(self.lines):
            reached[room].append(line)
        self.found[nodeid]['lines'] = reached

    def trace(self, frame, event, arg):
        "For `sys.settrace`: follow the frames of the rooms alone."
        return self.trace_line if frame.f_code.co_filename in self.files else None

    def trace_line(self, frame, event, arg):
        self.lines.add((self.files[frame.f_code.co_filename], frame.f_lineno))
        return self.trace_line


def test_file(name):
    return f'tests/{"" if name == "pages" else "test_"}{name}.py'


def begin(folder, files, plugin, *options):
    "Run tests in a fork; its process id. It ends as pytest does."
    (folder / 'until').write_text(str(time.time() + 120))
    if pid := os.fork():
        return pid
    os.setsid()
    repo = folder / 'repo'
    os.chdir(repo)
    said = os.open(folder / 'said', os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 1)
    os.dup2(said, 2)
    above = [p for p in os.environ.get('PYTHONPATH', '').split(os.pathsep) if p != str(ROOT)]
    os.environ['PYTHONPATH'] = os.pathsep.join([str(repo), *filter(None, above)])
    os.environ |= dict(FEWSHOTMETA_CACHE=f'{folder}/cache', PYTHONDONTWRITEBYTECODE='1')
    os.environ |= dict(HOME=f'{folder}/home', FEWSHOTMETA_WORKERS='1')
    os.environ.pop('FEWSHOTMETA_DATA', None)
    sys.dont_write_bytecode = True
    ours = str(ROOT), str(ROOT / 'tests')
    sys.path[:] = [str(repo), *(p for p in sys.path if p not in ours)]
    if plugin.files:
        threading.settrace(plugin.trace)
        sys.settrace(plugin.trace)
    quiet = ['-q', '-p', 'no:cacheprovider', '-o', 'addopts=', f'--basetemp={folder}/tmp']
    code = 70
    with contextlib.suppress(BaseException):
        quiet += ['-k', f'not ({LEFT_OUT})', *options]
        code = int(pytest.main([*map(test_file, files), *quiet], [plugin]))
        sys.settrace(None)
        if not sys.modules['fewshotmeta'].__file__.startswith(f'{repo}/'):
            code = 71
        if plugin.files:
            (folder / 'found').write_text(json.dumps(plugin.found))
    os._exit(code)


def pool(folders, tasks, end):
    "Begin tasks, one a folder at a time; `end(folder, task, code)` gets each, None: too long."
    free, running = list(folders), {}
    tasks = iter(tasks)
    for task in itertools.chain(tasks, itertools.repeat(None)):
        while not free or task is None and running:
            for pid, (folder, its) in list(running.items()):
                done, status = os.waitpid(pid, os.WNOHANG)
                if done or time.time() > float((folder / 'until').read_text() or 'inf'):
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(pid, signal.SIGKILL)
                    if not done:
                        os.waitpid(pid, 0)
                    end(folder, its, os.waitstatus_to_exitcode(status) if done else None)
                    free.append(running.pop(pid)[0])
            time.sleep(0.02)
        if task is None:
            return
        folder = free.pop()
        running[task(folder)] = folder, task


class Mutation:
    "The tests without mutants, then the mutants, and what is known of both."

    def __init__(self, folder, options):
        self.options, self.cache = options, folder / 'cache'
        self.folders = [folder / f'copy{i}' for i in range(options.workers)]
        stored = options.write and options.write.exists()
        self.outcomes = json.loads(options.write.read_text()) if stored else {}
        if options.again:
            found = self.outcomes.items()
            self.outcomes = {k: v for k, v in found if v.startswith('killed') or k in EXPLAINED}
        self.tests = {}
        self.stored = 0
        self.cache.mkdir()
        for place in self.folders:
            copied(place)
            renewed(place, self.cache)

    def store(self, every=0):
        if self.options.write and time.time() > self.stored + every:
            new = self.options.write.with_suffix('.partial')
            new.write_text(json.dumps(self.outcomes, indent=1, ensure_ascii=False))
            new.replace(self.options.write)
            self.stored = time.time()

    def look(self):
        "Run every file of tests as it is: what passes, how long, what it reaches."
        rooms = self.options.room or list(TESTS)
        names = dict.fromkeys(name for room in rooms for name in TESTS[room].split())
        parts = 1 + self.options.workers // 3
        parted = [f'{name} {i} {parts}' for name in names for i in range(parts)]
        pool(self.folders, [partial(self.begin_look, one) for one in parted], self.end_look)
        failed = [test for test, found in self.tests.items() if not found['passed']]
        print(f'{len(self.tests) - len(failed)} tests pass; left out, as they do not:', *failed)

    def begin_look(self, parted, folder):
        name, first, step = parted.split()
        part = slice(int(first), None, int(step))
        return begin(folder, [name], Watched(folder, rooms=TESTS, part=part))

    def end_look(self, folder, task, code):
        path = folder / 'found'
        if not path.exists():
            text = (folder / 'said').read_text(errors='replace')[-2000:]
            return print(f'no tests of {task.args[0]} are used (exit {code}): {text}')
        self.tests |= json.loads(path.read_text())
        print(f'{task.args[0]}: {len(self.tests)} tests', flush=True)
        path.unlink()
        shutil.copytree(folder / 'cache', self.cache, dirs_exist_ok=True)

    def tests_of(self, room, lines):
        "The tests that reach one of the lines, the quickest first, up to a limit."
        files = [test_file(name) for name in TESTS[room].split()]
        reach = []
        for name, found in self.tests.items():
            file = name.split('::')[0]
            if file in files and found['passed'] and not lines.isdisjoint(found['lines'][room]):
                reach.append((found['seconds'], files.index(file), name))
        chosen, spent = [], 0
        for seconds, _, name in sorted(reach):
            spent += seconds
            if not chosen or spent < self.options.seconds:
                chosen.append(name)
        return chosen

    def try_all(self):
        "Run the tests of every mutant, a room's after another's."
        rooms = [mutants_of(room, ROOT / 'fewshotmeta') for room in self.options.room or TESTS]
        some = [list(room.items())[:: self.options.every] for room in rooms]
        made = dict(filter(None, itertools.chain(*itertools.zip_longest(*some))))
        tasks = []
        for name, (room, lines, source) in made.items():
            if name in self.outcomes:
                continue
            if chosen := self.tests_of(room, lines):
                tasks.append(partial(self.begin_mutant, name, room, source, chosen))
            else:
                self.outcomes[name] = 'not reached'
        self.begun, self.all = 0, len(tasks)
        pool(self.folders, tasks, self.end_mutant)
        if not self.options.room and self.options.every == 1:  # of lines that are no more
            self.outcomes = {name: self.outcomes[name] for name in made if name in self.outcomes}
        self.store()
        return made

    def begin_mutant(self, name, room, source, chosen, folder):
        renewed(folder, self.cache)
        (folder / 'repo' / 'fewshotmeta' / room_file(room)).write_text(source())
        seconds = {test: self.tests[test]['seconds'] for test in chosen}
        held = {test.split('::')[0] for test in chosen}
        files = [name for name in TESTS[room].split() if test_file(name) in held]
        return begin(folder, files, Watched(folder, chosen, seconds), '-x')

    def end_mutant(self, folder, task, code):
        name, room = task.args[:2]
        outcome = {0: 'survived', None: 'killed by time'}.get(code, 'killed')
        if not name.endswith(AS_IT_IS):
            self.outcomes[name] = outcome
        elif outcome != 'survived':
            sys.exit(f'{name} is {outcome}: ' + (folder / 'said').read_text(errors='replace'))
        self.begun += 1
        if outcome == 'survived':
            print(f'{self.begun}/{self.all} {outcome}: {name}', flush=True)
        file = Path('fewshotmeta') / room_file(room)
        shutil.copy(ROOT / file, folder / 'repo' / file)
        self.store(every=5)


def report(outcomes):
    "Print the score of each room, and who survived."
    for room in TESTS:
        found = {name: o for name, o in outcomes.items() if name.startswith(f'{room} ')}
        killed = [o for o in found.values() if o.startswith('killed')]
        if found:
            print(f'{room}: {len(killed)} of {len(found)} killed')
    for name, outcome in outcomes.items():
        if not outcome.startswith('killed'):
            print(f'{outcome}: {name}', f'({EXPLAINED[name]})' if name in EXPLAINED else '')


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--workers', type=int, default=2)
    parser.add_argument('--every', type=int, default=1, help='each how manyeth mutant')
    parser.add_argument('--room', action='append', choices=TESTS)
    parser.add_argument('--write', type=Path, help='a JSON file of outcomes, to go on with')
    parser.add_argument('--again', action='store_true', help='who survived there is tried again')
    parser.add_argument('--seconds', type=float, default=60, help='of tests a mutant at most')
    options = parser.parse_args()
    os.environ.setdefault('OMP_NUM_THREADS', '1')
    sys.modules.setdefault('rfc3987_syntax', None)
    for name in PRELOADED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    os.environ.setdefault('MPLCONFIGDIR', sys.modules['matplotlib'].get_configdir())
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        mutation = Mutation(Path(folder), options)
        mutation.look()
        made = mutation.try_all()
        for place in mutation.folders:
            renewed(place, mutation.cache)
    report({name: o for name, o in mutation.outcomes.items() if name in made})
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f'{used.ru_utime + used.ru_stime:.0f} s of computing')


if __name__ == '__main__':
    main()
