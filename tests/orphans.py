"""Kill a runner while its kernel starts, and see which of its processes stay.

`orphans.py FOLDER PARENT:MOMENT…`: a kernel that has lost its runner gets process 1 or a subreaper
(this process) as its parent; the moment is a number of seconds, or `busy`, when a cell is executed.
Prints a line of JSON for each.
"""

import ctypes
import json
import os
import signal
import sys
import time
from pathlib import Path

sys.modules.setdefault('rfc3987_syntax', None)

from fewshotmeta.lab.execution import execute_notebook
from tiny import notebook

PR_SET_CHILD_SUBREAPER = 36
# a cell that never ends, with a process beside the kernel
BUSY = '''
import subprocess, time
from fewshotmeta.lab.execution import run_folder
subprocess.Popen(['sleep', '600'])
(run_folder() / 'busy').touch()
time.sleep(600)
'''
PATIENCE = 20  # seconds that a kernel may take to notice


def until(ready, seconds=60):
    "Wait; whether it is so in the end."
    end = time.monotonic() + seconds
    while not (so := ready()) and time.monotonic() < end:
        time.sleep(0.001)
    return so


def children(pid):
    tasks = Path(f'/proc/{pid}/task').iterdir()
    return [int(kid) for task in tasks for kid in (task / 'children').read_text().split()]


def lives(pid, said=b''):
    "Whether a process has not ended, and its environment has these words."
    try:
        state = Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0]
        return state not in 'ZX' and said in Path(f'/proc/{pid}/environ').read_bytes()
    except OSError:
        return False


def of_run(folder, first):
    "The processes of a run: its kernel, perhaps not yet told so, and what that started."
    said = f'FEWSHOTMETA_RUN={folder}'.encode()
    told = [int(n) for n in os.listdir('/proc') if n.isdigit() and lives(n, said)]
    return {pid for pid in first if lives(pid)} | set(told)


def runner(experiment, folder):
    "Fork a process that executes the notebook."
    if pid := os.fork():
        return pid
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    try:
        execute_notebook(experiment, folder, {}, quiet=True)
    finally:
        os._exit(1)


def kill(experiment, folder, moment):
    "Execute a notebook, kill its runner, and wait for its kernel's end."
    folder.mkdir()
    pid = runner(experiment, folder)
    until(lambda: children(pid))
    first = children(pid)
    if moment == 'busy':
        assert until((folder / 'busy').exists)
    else:
        time.sleep(float(moment))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    begun = time.monotonic()
    until(lambda: not of_run(folder, first), PATIENCE)
    left = of_run(folder, first)
    for stays in left:
        os.kill(stays, signal.SIGKILL)
    return dict(left=len(left), seconds=round(time.monotonic() - begun, 2))


def main(place, *tries):
    import papermill  # once for all runners

    experiment = notebook(Path(place), 'x = 1', BUSY)
    for number, (parent, moment) in enumerate(word.split(':') for word in tries):
        subreaper = int(parent == 'subreaper')
        assert ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, subreaper, 0, 0, 0) == 0
        found = kill(experiment, Path(place) / f'run{number}', moment)
        print(json.dumps(dict(parent=parent, moment=moment) | found), flush=True)


if __name__ == '__main__':
    main(*sys.argv[1:])
