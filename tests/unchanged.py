"""Run a command and fail if it changes a notebook or an exported module: `unchanged.py CMD`."""

import hashlib
import subprocess
import sys
from pathlib import Path


def watched(path):
    "Tell whether a file is a notebook or a module, and not Jupyter's own copy."
    return path.suffix in ('.ipynb', '.py') and '.ipynb_checkpoints' not in path.parts


def state():
    "Compute the digest of each notebook and exported module."
    paths = [*Path('nbs').rglob('*'), *Path('fewshotmeta').rglob('*')]
    files = [path for path in paths if watched(path)]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


before = state()
subprocess.run(sys.argv[1:], check=True)
after = state()
changed = sorted(path for path in before | after if before.get(path) != after.get(path))
found = f'{len(after)} files as they should be'
if changed:
    found = f'changed {", ".join(changed)}: commit what it wrote'
print(f'{Path(sys.argv[1]).name}: {found}')
sys.exit(bool(changed))
