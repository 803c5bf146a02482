"""Run a command; fail, naming them, if it changes any notebook or exported module: `unchanged.py nbdev_clean`."""

import hashlib, subprocess, sys
from pathlib import Path


def state():
    files = [
        p
        for d in ('nbs', 'fewshotmeta')
        for p in Path(d).rglob('*')
        if p.suffix in ('.ipynb', '.py') and '.ipynb_checkpoints' not in p.parts
    ]
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


before = state()
subprocess.run(sys.argv[1:], check=True)
after = state()
changed = sorted(p for p in before | after if before.get(p) != after.get(p))
name = Path(sys.argv[1]).name
print(
    f'{name}: '
    + (
        f'changed {", ".join(changed)}: commit what it wrote'
        if changed
        else f'{len(after)} files as they should be'
    )
)
sys.exit(bool(changed))
