"""Every reliability test at full length, and what a batch itself costs.

`make reliability` writes runs/reliability/reliability.json. `reliability.py costs` (times: nothing
else should run) and `reliability.py test_slurm.py …` make a part anew. The site's part needs a
browser.
"""

import json, os, subprocess, sys, tempfile, time
from pathlib import Path
import yaml
from fewshotmeta.data.files import read_json, write_json
from fewshotmeta.lab.provenance import device_name, provenance

ROOT = Path(__file__).parent.parent
TESTS = (
    'test_reliability.py',
    'test_again.py',
    'test_batches.py',
    'test_slurm.py',
    'test_properties.py',
    'test_files.py',
)
# files of which only those tests are run that record something
PARTLY = (
    'test_orphans.py',
    'test_training.py',
    'test_runs.py',
    'test_data.py',
    'test_site.py',
)


def tests(folder, name):
    "Run the tests of a file at full length; what they recorded, and how they ended."
    kept = folder / name
    kept.write_text('')
    told = dict(FEWSHOTMETA_RECORD=str(kept))
    if name in PARTLY:
        told['FEWSHOTMETA_RECORD_ONLY'] = '1'
    out = subprocess.run(
        [sys.executable, '-m', 'pytest', '-q', '-rs', str(ROOT / 'tests' / name)],
        env=os.environ | told,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    print(out.stdout, flush=True)
    if out.returncode:
        sys.exit(f'a test of {name} failed: nothing of it was written')
    said = out.stdout.strip().splitlines()
    return dict(
        rows=[json.loads(line) for line in kept.read_text().splitlines()],
        said=said[-1].strip('= '),
        skipped=[line for line in said if line.startswith('SKIPPED')],
    )


def command(*args):
    return [sys.executable, '-m', 'fewshotmeta.lab.command', *map(str, args)]


def quietly(*args):
    "Seconds of a command, whose output is not shown."
    start = time.perf_counter()
    subprocess.run(command(*args), check=True, capture_output=True)
    return time.perf_counter() - start


def overhead(folder, n=40, jobs=2):
    "Wall time of a batch of smoke runs against the runs' own work."
    notebook, batch = folder / 'train.ipynb', folder / 'forty.yaml'
    notebook.write_bytes((ROOT / 'nbs' / 'experiments' / 'train.ipynb').read_bytes())
    runs = dict(maml=dict(seed=list(range(n))))
    batch.write_text(yaml.dump(dict(experiment='train.ipynb', runs=runs, scales=dict(smoke={}))))
    quietly('run', notebook, '--runs', folder / 'warm')  # banks and kernels are built
    wall = quietly('batch', batch, '--runs', folder / 'runs', '--jobs', jobs)
    results = (folder / 'runs').glob('forty/*/result.json')
    own = sum(read_json(result)['seconds'] for result in results)
    return dict(
        what=f'{n} smoke runs, {jobs} at a time: wall time against the runs\' own work',
        runs=n,
        wall_seconds=round(wall, 1),
        own_seconds=round(own, 1),
        overhead=round(wall * jobs / own - 1, 4),
    )


def looking(folder, n=1000):
    "Seconds of `status` and `results` over many finished runs; medians of five."
    one = read_json(sorted((ROOT / 'runs').glob('*/*/result.json'))[0])
    many = folder / 'many'
    for i in range(n):
        experiment, run = f'table{i // 50}', f'run{i}'
        result = one | dict(experiment=experiment, run=run)
        write_json(many / experiment / run / 'result.json', result)

    def median(command):
        return round(sorted(quietly(command, '--runs', many) for _ in range(5))[2], 2)

    return dict(
        what=f'looking at {n} finished runs',
        runs=n,
        status_seconds=median('status'),
        results_seconds=median('results'),
    )


def costs(folder):
    return dict(rows=[looking(folder), overhead(folder)])


def main(parts):
    path = ROOT / 'runs' / 'reliability' / 'reliability.json'
    for part in parts:
        with tempfile.TemporaryDirectory() as tmp:
            found = costs(Path(tmp)) if part == 'costs' else tests(Path(tmp), part)
        before = read_json(path) if path.exists() else {}
        write_json(path, before | {part: found | dict(device=device_name(), **provenance())})


if __name__ == '__main__':
    main(sys.argv[1:] or ('costs', *TESTS, *PARTLY))
