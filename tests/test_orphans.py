"""A runner is killed while its kernel starts: the kernel ends by itself, whoever its parent is."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, full

# seconds since the kernel's process was made; it answers after one or two
MOMENTS = (0, 0.002, 0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1, 1.2, 1.5, 2, 'busy')


def killed(folder, *tries):
    "What `orphans.py` found, and the folders of pipes that are left."
    (folder / 'tmp').mkdir()
    command = [sys.executable, str(ROOT / 'tests' / 'orphans.py'), str(folder / 'runs'), *tries]
    env = os.environ | dict(TMPDIR=str(folder / 'tmp'))
    out = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert out.returncode == 0, out.stderr
    found = [json.loads(line) for line in out.stdout.splitlines()]
    return found, list((folder / 'tmp').glob('fewshotmeta-*'))


@pytest.mark.skipif(not Path('/proc/self/task').is_dir(), reason='needs /proc')
def test_a_kernel_whose_runner_was_killed_ends_by_itself(tmp_path, record):
    tries = ['subreaper:0', 'subreaper:0.3', 'subreaper:busy', 'init:0.1']
    if full():
        tries = [f'{parent}:{moment}' for moment in MOMENTS for parent in ('subreaper', 'init')]
    found, pipes = killed(tmp_path, *tries)
    assert len(found) == len(tries)
    assert [row for row in found if row['left']] == []
    assert pipes == []
    what = 'runner killed while its kernel starts, and no process of it stays'
    record(what, tries=len(tries), survived=len(tries))
