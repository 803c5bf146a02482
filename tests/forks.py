"""Processes of their own without an import each: one that has the package forks them.

They share its hash seed: what may depend on that takes `subprocess`.
"""

import multiprocessing
import os
import sys
import tempfile
import warnings
from pathlib import Path
from subprocess import CompletedProcess, TimeoutExpired

CONTEXT = multiprocessing.get_context('forkserver')
CONTEXT.set_forkserver_preload(['fewshotmeta.all'])


class Fork:
    "Code that runs beside us, with arguments and an environment, as by `python -W always -c`."

    def __init__(self, code, *args, **env):
        self.folder = tempfile.TemporaryDirectory()
        self.said = [Path(self.folder.name) / name for name in ('stdout', 'stderr')]
        given = code, [*map(str, args)], os.environ | env, self.said
        self.process = CONTEXT.Process(target=_run, args=given)
        self.process.start()

    def wait(self, timeout=300):
        "Wait for its end: its exit status, and what it said."
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            raise TimeoutExpired('a fork', timeout)
        said = [path.read_text() for path in self.said]
        self.folder.cleanup()
        return CompletedProcess('a fork', self.process.exitcode, *said)


def _run(code, args, env, said):
    "In the child: what `python -c` would do."
    for number, path in enumerate(said, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = ['-c', *args]
    warnings.simplefilter('always')
    exec(code, {'__name__': '__main__'})


def run(code, *args, **env):
    "Run code in a process of its own: its exit status, and what it said."
    return Fork(code, *args, **env).wait()
