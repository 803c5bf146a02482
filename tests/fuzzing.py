"""What the fuzz tests share: how often they try, what hangs, and trees with odd values."""

import contextlib
import copy
import os
import signal
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

ASKED = int(os.environ.get('FEWSHOTMETA_FUZZ', 0))  # examples; 0: a few, always the same
often = settings(
    max_examples=ASKED or 200,
    derandomize=not ASKED,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)


@contextlib.contextmanager
def no_hang(seconds=20):
    "Fail where something takes longer than that."

    def stop(*_):
        raise AssertionError(f'it hangs: more than {seconds} s')

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def folder():
    "An empty folder for one example."
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def places_in(tree):
    "Every place in a tree of lists and dicts: its holder, and the key."
    keys = range(len(tree)) if isinstance(tree, list) else tree
    for key in keys if isinstance(tree, dict | list) else ():
        yield tree, key
        yield from places_in(tree[key])


ODD = (None, True, -1, 0, 7, 2**70, 10**400, 0.5, 1e300, '', 'x', 'x' * 999, '../..', '/', 'a b')
ODD += ('\ud800', '\x00', 'é', [], {}, [[]], [None], [0], {'a': {}}, {'x': [1, 2]}, '\x1b[2J')
ODD += ('a\nb',)


@st.composite
def altered(draw, whole, odd=ODD):
    "A tree of lists and dicts with up to three values replaced, taken away or added."
    tree = copy.deepcopy(whole)
    for _ in range(draw(st.integers(1, 3))):
        places = list(places_in(tree))
        if not places:
            break
        holder, key = places[draw(st.integers(0, len(places) - 1))]
        kind = draw(st.sampled_from(['replace', 'replace', 'remove', 'add']))
        value = copy.deepcopy(draw(st.sampled_from(odd)))
        if kind == 'replace':
            holder[key] = value
        elif kind == 'remove':
            del holder[key]
        elif isinstance(holder, list):
            holder.append(value)
        else:
            holder[draw(st.sampled_from(['x', '../y', '']))] = value
    return tree


ENCODINGS = ('utf-16', 'utf-32', 'utf-8-sig', 'utf-7')
INSERTED = (b'\0', b'\xff', b'\xc3', b'\n', b',', b'"', b'{', b'}', b'[' * 9999, b'9' * 9999)


@st.composite
def spoilt(draw, whole):
    "Bytes with up to three of them changed, some taken away or put in; cut; in another encoding."
    content = whole
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(0, len(content) - 1)))
        kind = draw(st.sampled_from(['flip', 'flip', 'cut', 'remove', 'insert', 'encode', 'empty']))
        if kind == 'flip' and content:
            bit = 1 << draw(st.integers(0, 7))
            content = content[:at] + bytes([content[at] ^ bit]) + content[at + 1 :]
        elif kind == 'cut':
            content = content[:at]
        elif kind == 'remove':
            content = content[:at] + content[at + draw(st.integers(1, 99)) :]
        elif kind == 'insert':
            content = content[:at] + draw(st.sampled_from(INSERTED)) + content[at:]
        elif kind == 'encode':
            content = content.decode('latin-1').encode(draw(st.sampled_from(ENCODINGS)))
        elif kind == 'empty':
            content = b''
    return content


def filled_folder(path):
    "A folder with a file in it."
    path.mkdir()
    (path / 'x').touch()


def pipe(path):
    "What waits for ever for somebody who writes."
    os.mkfifo(path)


def circle(path):
    "A link to itself."
    path.symlink_to(path.name)


def nowhere(path):
    "A link to nothing."
    path.symlink_to('nowhere')


def elsewhere(path):
    "A link to what has no end."
    path.symlink_to('/dev/full')


def device(path):
    "A link to what is always empty."
    path.symlink_to('/dev/null')


STRANGE = (filled_folder, pipe, circle, nowhere, elsewhere, device)


def put(path, thing):
    "Write bytes, or what one of `STRANGE` makes, in the place of a file."
    if path.is_dir() and not path.is_symlink():
        (path / 'x').unlink()
        path.rmdir()
    path.unlink(missing_ok=True)
    if callable(thing):
        thing(path)
    else:
        path.write_bytes(thing)
