"""Files: whole or not there, as they were written, one at a time; archives that lead elsewhere."""

import errno
import gzip
import io
import json
import math
import os
import pathlib
import random
import resource
import stat
import subprocess
import sys
import tarfile
import threading
import zipfile

import pytest

from fewshotmeta.all import *


# ---- sealed JSON
VALUES = dict(a=1, b=[0.5, None, True], c=dict(d='ä'))
OTHERS = [
    dict(VALUES, a=2),
    dict(VALUES, a=1.5),
    dict(VALUES, b=[0.5, None, False]),
    {k: v for k, v in VALUES.items() if k != 'a'},
    dict(VALUES, e=0),
]


@pytest.mark.parametrize('other', OTHERS)
def test_seal_sees_every_change(other):
    with pytest.raises(BadFile, match='where: its content is not what was stored'):
        unseal(other | dict(sha256=seal(VALUES)['sha256']), 'where')


def test_a_seal_is_needed_and_comes_off():
    assert unseal(seal(VALUES), '') == VALUES
    for bad in (VALUES, [], None, 'x'):
        with pytest.raises(BadFile):
            unseal(bad, '')


def test_read_json_of_all_sorts(tmp_path):
    path = tmp_path / 'x.json'
    for bad in (b'', b'{', b'[]', b'null', b'\xff\xfe', b'{"a": 1}', b'[' * 100_000):
        path.write_bytes(bad)
        with pytest.raises(BadFile, match='x.json'):
            read_json(path)
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / 'none.json')


def test_a_number_beyond_all_floats_is_no_json(tmp_path):
    "Even under a seal that fits: Python would read infinity."
    sealed = json.dumps(seal(dict(x=math.inf)))
    for word in ('Infinity', '1e999'):
        (tmp_path / 'x.json').write_text(sealed.replace('Infinity', word))
        with pytest.raises(BadFile, match=f'x.json is not whole .*{word}|is not whole .*inf'):
            read_json(tmp_path / 'x.json')


def test_a_seal_does_not_depend_on_the_order():
    assert seal(dict(a=1, b=dict(c=2, d=3))) == seal(dict(b=dict(d=3, c=2), a=1))


# ---- whole or not at all
def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    "What is renamed was synced before, all of it, and not another file."
    done = []
    fsync, replace = os.fsync, os.replace

    def recorded_fsync(descriptor):
        found = os.fstat(descriptor)
        done.append(('synced', found.st_ino, found.st_size))
        fsync(descriptor)

    def recorded_replace(source, target):
        done.append(('renamed', os.stat(source).st_ino, target))
        replace(source, target)

    monkeypatch.setattr(os, 'fsync', recorded_fsync)
    monkeypatch.setattr(os, 'replace', recorded_replace)
    path = tmp_path / 'a' / 'new' / 'x'
    with atomic(path) as tmp:
        tmp.write_text('whole')
        inode = tmp.stat().st_ino
        assert not done
    assert done == [('synced', inode, 5), ('renamed', inode, path)]
    assert path.read_text() == 'whole'


def test_atomic_leaves_the_old_file_and_nothing_else(small_disk):
    path = small_disk / 'x'
    with atomic(path) as tmp:
        tmp.write_text('old')
    full = f'no space left to write {path}: free some, or choose another folder'
    with pytest.raises(OSError, match=full):
        with atomic(path) as tmp:
            tmp.write_bytes(bytes(1_000_000))
    assert path.read_text() == 'old'
    assert os.listdir(small_disk) == ['x']


def test_a_folder_that_cannot_be_written(read_only):
    with pytest.raises(PermissionError, match='cannot write .*: make .* writable'):
        with atomic(read_only / 'x') as tmp:
            tmp.write_text('new')
    with pytest.raises(PermissionError, match='cannot write'):
        with locked(read_only / 'lock'):
            pass


# ---- where things are
def test_where_the_cache_and_the_data_are(tmp_path, monkeypatch):
    "The argument, our variable, the user's folders, in this order."
    for name in ('FEWSHOTMETA_CACHE', 'FEWSHOTMETA_DATA', 'XDG_CACHE_HOME'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv('HOME', str(tmp_path))
    usual = tmp_path / '.cache' / 'fewshotmeta'
    assert (cache_folder(), data_root()) == (usual, usual / 'data')
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'xdg'))
    assert cache_folder() == tmp_path / 'xdg' / 'fewshotmeta'
    monkeypatch.setenv('FEWSHOTMETA_CACHE', '~/own')
    assert (cache_folder(), data_root()) == (tmp_path / 'own', tmp_path / 'own' / 'data')
    monkeypatch.setenv('FEWSHOTMETA_DATA', '~/data')
    assert (data_root(), data_root('~/here')) == (tmp_path / 'data', tmp_path / 'here')


# ---- one at a time
HOLD = '''
import sys, time
from fewshotmeta.data.files import locked
with locked(sys.argv[1]):
    print("mine", flush=True)
    time.sleep(60)
'''


def test_a_lock_is_free_when_its_holder_is_killed(tmp_path):
    lock = tmp_path / 'lock'
    command = [sys.executable, '-c', HOLD, str(lock)]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == 'mine\n'
    with pytest.raises(TimeoutError, match='lock is held by another process'):
        with locked(lock, wait=0.2):
            pass
    holder.kill()
    holder.wait()
    with locked(lock, wait=0.2):
        pass


def test_a_lock_is_waited_for(tmp_path):
    "As long as it takes, where nothing else is said; its folder need not be there."
    lock, had = tmp_path / 'a' / 'b' / 'lock', threading.Event()

    def take():
        with locked(lock):
            had.set()

    with locked(lock):
        other = threading.Thread(target=take)
        other.start()
        assert not had.wait(0.2)
    other.join(10)
    assert had.is_set()


# ---- archives
FILE = tarfile.REGTYPE
LINK = tarfile.SYMTYPE
HARD = tarfile.LNKTYPE
FIFO = tarfile.FIFOTYPE
DIR = tarfile.DIRTYPE


def tar(path, *members):
    "Write a tar archive of members (name, kind, target of a link)."
    with tarfile.open(path, 'w:gz') as t:
        for name, kind, target in members:
            m = tarfile.TarInfo(name)
            m.type = kind
            m.linkname = target
            m.size = int(kind == FILE)
            t.addfile(m, io.BytesIO(b'x'))
    return path


def zipped(path, *members):
    "Write a zip archive of members (name, mode)."
    with zipfile.ZipFile(path, 'w') as z:
        for name, mode in members:
            m = zipfile.ZipInfo(name)
            m.external_attr = mode << 16
            z.writestr(m, 'x')
    return path


EVIL = ['../out', '/abs', 'a/../../out', '..', 'a/..', 'C:x', 'C:\\x', '..\\out', '\\abs']


@pytest.mark.parametrize('name', EVIL)
def test_archives_that_lead_elsewhere_are_refused_before_anything_is_written(tmp_path, name):
    archives = [
        tar(tmp_path / 'a.tgz', ('fine', FILE, ''), (name, FILE, '')),
        zipped(tmp_path / 'a.zip', ('fine', 0), (name, 0)),
    ]
    for archive in archives:
        with pytest.raises(BadFile, match='leads out of the folder: nothing was unpacked'):
            unpack(archive, tmp_path / 'data')
    assert not (tmp_path / 'data').exists()
    assert sorted(os.listdir(tmp_path)) == ['a.tgz', 'a.zip']


ODD = [(LINK, '/etc'), (LINK, 'fine'), (HARD, 'fine'), (FIFO, '')]


@pytest.mark.parametrize('kind,target', ODD)
def test_links_and_devices_are_refused(tmp_path, kind, target):
    archives = [
        tar(tmp_path / 'a.tgz', ('fine', FILE, ''), ('odd', kind, target)),
        zipped(tmp_path / 'a.zip', ('odd', stat.S_IFLNK | 0o777)),
    ]
    for archive in archives:
        with pytest.raises(BadFile, match="'odd' is a link or a device"):
            unpack(archive, tmp_path / 'data')
    assert not (tmp_path / 'data').exists()


def test_whole_archives(tmp_path):
    good = tar(tmp_path / 'a.tgz', ('set', DIR, ''), ('set/x.txt', FILE, ''))
    assert unpack(good, tmp_path / 'data', digest_of(good)) == ['set']
    assert (tmp_path / 'data' / 'set' / 'x.txt').read_text() == 'x'
    assert unpack(good, tmp_path / 'data') == ['set']  # again
    with pytest.raises(BadFile, match='expected 0000'):
        unpack(good, tmp_path / 'other', '0000')
    assert not list((tmp_path / 'other').glob('*'))


def test_the_digest_of_a_file(tmp_path):
    (tmp_path / 'x').write_bytes(b'abc')  # FIPS 180-2
    digest = 'ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad'
    assert digest_of(tmp_path / 'x') == digest


def test_broken_archives(tmp_path):
    good = tar(tmp_path / 'a.tgz', ('set', DIR, ''), ('set/x.txt', FILE, ''))
    (tmp_path / 'b.tgz').write_bytes(good.read_bytes()[:40])
    with pytest.raises(BadFile, match='b.tgz is not'):
        unpack(tmp_path / 'b.tgz', tmp_path / 'other')
    (tmp_path / 'c.zip').write_bytes(b'hello')
    with pytest.raises(BadFile, match='not a zip, tar or gzip archive'):
        unpack(tmp_path / 'c.zip', tmp_path / 'other')
    noise = tmp_path / 'noise'
    noise.write_bytes(random.Random(0).randbytes(100_000))
    with tarfile.open(tmp_path / 'd.tgz', 'w:gz') as t:
        t.add(noise, 'one')
        t.add(noise, 'two')
    (tmp_path / 'd.tgz').write_bytes((tmp_path / 'd.tgz').read_bytes()[:50_000])
    with pytest.raises(BadFile, match='d.tgz is not a whole archive'):
        unpack(tmp_path / 'd.tgz', tmp_path / 'other')
    with pytest.raises(FileNotFoundError, match='no archive'):
        unpack(tmp_path / 'none.zip', tmp_path / 'other')
    assert not list((tmp_path / 'other').glob('*'))


def test_a_name_with_a_null_is_refused(tmp_path):
    with tarfile.open(tmp_path / 'a.tar', 'w') as t:
        m = tarfile.TarInfo('a')
        m.pax_headers = dict(path='a\0b')
        t.addfile(m)
    with pytest.raises(BadFile, match='leads out of the folder'):
        unpack(tmp_path / 'a.tar', tmp_path / 'data')


@pytest.mark.parametrize('mode', [0, 0o644, stat.S_IFREG | 0o644])
def test_a_zip_archive_of_any_system(tmp_path, mode):
    "Folders go by their names, files by their modes, where there are any."
    archive = zipped(tmp_path / 'a.zip', ('set/', 0), ('set/x', mode))
    assert unpack(archive, tmp_path / 'new' / 'data') == ['set']
    assert trees(tmp_path / 'new' / 'data') == {'set/x': 'x'}


def trees(folder):
    "Every file in a folder, and what it holds."
    files = [path for path in folder.rglob('*') if path.is_file()]
    return {str(path.relative_to(folder)): path.read_text() for path in files}


NAMES = 'a/new', 'b/same', '._b', '__MACOSX/c'


def test_archives_lie_beside_what_is_there(tmp_path):
    "What is the same stays, what is another is not replaced, and then nothing is unpacked."
    names = [(f'set/{name}', FILE, '') for name in NAMES]
    archive, data = tar(tmp_path / 'a.tgz', *names), tmp_path / 'data'
    for name, text in (('set/b/same', 'x'), ('set/b/own', 'mine')):
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        (data / name).write_text(text)
    for _ in range(2):
        assert unpack(archive, data) == ['set']
        assert trees(data) == {'set/a/new': 'x', 'set/b/same': 'x', 'set/b/own': 'mine'}
    (data / 'set' / 'b' / 'same').write_text('mine')
    (data / 'set' / 'a' / 'new').unlink()
    before = trees(data)
    with pytest.raises(FileExistsError, match='same already exists with different content'):
        unpack(archive, data)
    assert trees(data) == before


@pytest.mark.parametrize('there', ['set', 'set/x'])
def test_a_file_and_a_folder_of_one_name(tmp_path, there):
    "One that is there, the other in the archive: neither gives way."
    place = tmp_path / 'data' / there
    if there == 'set':
        place.parent.mkdir()
        place.write_text('x')
    else:
        place.mkdir(parents=True)
    with pytest.raises(FileExistsError, match=f'{place} already exists with different content'):
        unpack(tar(tmp_path / 'a.tgz', ('set/x', FILE, '')), tmp_path / 'data')
    assert place.is_file() == (there == 'set')


def test_a_link_in_the_data_is_not_followed(tmp_path):
    (tmp_path / 'data').mkdir()
    (tmp_path / 'away').mkdir()
    (tmp_path / 'data' / 'set').symlink_to(tmp_path / 'away')
    with pytest.raises(FileExistsError, match='set is a link'):
        unpack(tar(tmp_path / 'a.tgz', ('set/x', FILE, '')), tmp_path / 'data')
    assert not os.listdir(tmp_path / 'away')


def test_what_was_moved_goes_back_when_a_move_fails(tmp_path, monkeypatch):
    rename, moved = os.rename, []

    def fails_once(source, target):
        moved.append(target)
        if len(moved) == 2:
            raise OSError(errno.EACCES, 'denied')
        rename(source, target)

    monkeypatch.setattr(os, 'rename', fails_once)
    with pytest.raises(PermissionError, match='cannot write'):
        unpack(tar(tmp_path / 'a.tgz', ('a', FILE, ''), ('b', FILE, '')), tmp_path / 'data')
    assert not os.listdir(tmp_path / 'data')


BOMBS = ['bomb.tgz', 'bomb.zip', 'bomb.gz', 'nested.zip']


def bomb(path, size=101_000_000):
    "Write an archive of equal bytes; `nested.zip` has them in a file that is packed itself."
    equal = b'\1' * size
    if path.suffix == '.tgz':
        with tarfile.open(path, 'w:gz', compresslevel=1) as t:
            m = tarfile.TarInfo('equal')
            m.size = size
            t.addfile(m, io.BytesIO(equal))
        return path
    packed = gzip.compress(equal, 1)
    if path.suffix == '.gz':
        path.write_bytes(packed)
        return path
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED, compresslevel=1) as z:
        if path.stem == 'nested':
            z.writestr('equal.gz', packed)
        else:
            z.writestr('equal', equal)
    return path


@pytest.mark.parametrize('name', BOMBS)
def test_an_archive_that_unpacks_to_far_more_than_it_is(tmp_path, name, record):
    archive, data = bomb(tmp_path / name), tmp_path / 'data'
    place = {'equal': 'equal', 'equal.gz': 'equal'}

    def placed(files):
        return {name: place.get(name, name) for name in files}

    words = f'{name} would unpack to .* the limit is 100 MB .*--unpack-limit'
    with pytest.raises(BadFile, match=words):
        unpack(archive, data, place=placed)
    assert not list(data.glob('*'))
    unpack(archive, data, place=placed, limit=200_000_000)
    (path,) = data.iterdir()
    assert path.stat().st_size == 101_000_000
    record('archives that unpack to far more than they are: refused', tries=1, survived=1)
    path.unlink()


LIMITS = [(2 << 20, True), ((2 << 20) - 1, False), (1 << 20, False)]


@pytest.mark.parametrize('limit,fits', LIMITS)
def test_a_limit_holds_to_the_byte(tmp_path, limit, fits):
    "Of a file whose size only its end tells, and of several together before any is written."
    (tmp_path / 'x.gz').write_bytes(gzip.compress(b'x' * (2 << 20), 1))
    half = tmp_path / 'half'
    half.write_bytes(bytes(1 << 20))
    with zipfile.ZipFile(tmp_path / 'a.zip', 'w', zipfile.ZIP_DEFLATED) as z:
        z.write(half, 'x')
        z.write(half, 'y')
    placed = []

    def place(files):
        placed.append([*files])
        return {name: name for name in files}

    for name in ('x.gz', 'a.zip'):
        if fits:
            unpack(tmp_path / name, tmp_path / name[0], place=place, limit=limit)
            continue
        with pytest.raises(BadFile, match=f'{name} would unpack to'):
            unpack(tmp_path / name, tmp_path / name[0], place=place, limit=limit)
        assert not list((tmp_path / name[0]).glob('*'))
    assert placed == [['x'], ['x', 'y']][: 1 + fits]


@pytest.mark.parametrize('junk,limit', [(0, 100_000_000), (6_000_000, 0)])
def test_what_an_archive_may_unpack_to(tmp_path, junk, limit):
    "20 times its own size, and 100 MB at least: a byte more, by what it says itself, is too much."
    archive = zipped(tmp_path / 'a.zip', ('x', 0))
    raw = bytearray(junk) + archive.read_bytes()
    at = raw.rindex(b'PK\1\2') + 24  # where the size of its file stands
    for more in (0, 1):
        raw[at : at + 4] = ((limit or 20 * len(raw)) + more).to_bytes(4, 'little')
        archive.write_bytes(raw)
        if more:
            with pytest.raises(BadFile, match='a.zip would unpack to'):
                unpack(archive, tmp_path / 'data')
        else:
            assert unpack(archive, tmp_path / 'data') == ['x']


def test_sizes_are_said_in_megabytes(tmp_path):
    with tarfile.open(tmp_path / 'a.tar', 'w') as t:
        m = tarfile.TarInfo('x')
        m.size = 5 * 10**13
        t.addfile(m)
    said = 'to at least 50,000,000 MB; the limit is 30,000,000 MB'
    with pytest.raises(BadFile, match=said):
        unpack(tmp_path / 'a.tar', tmp_path / 'data', limit=3 * 10**13)


def test_a_bomb_is_left_as_soon_as_it_is_too_large(tmp_path):
    (tmp_path / 'x.gz').write_bytes(gzip.compress(b'x' * (8 << 20), 1))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4 << 20, before[1]))  # of each file
    try:
        with pytest.raises(BadFile, match='x.gz would unpack to more'):
            unpack(tmp_path / 'x.gz', tmp_path / 'data', limit=1 << 20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_packed_file_stays_packed_under_its_name(tmp_path):
    with zipfile.ZipFile(tmp_path / 'a.zip', 'w') as z:
        z.writestr('x.gz', gzip.compress(b'x'))
    unpack(tmp_path / 'a.zip', tmp_path / 'data')
    assert gzip.decompress((tmp_path / 'data' / 'x.gz').read_bytes()) == b'x'


def test_names_that_cannot_be_files_together(tmp_path):
    for i, names in enumerate([('a', 'a/b'), ('x' * 300,)]):
        archive = tar(tmp_path / f'{i}.tgz', *[(name, FILE, '') for name in names])
        with pytest.raises(BadFile, match='stands for two things .*: nothing was unpacked'):
            unpack(archive, tmp_path / 'data')
    assert not os.listdir(tmp_path / 'data')


def test_an_archive_without_files_is_refused(tmp_path):
    for archive in (tar(tmp_path / 'a.tgz', ('set', DIR, '')), zipped(tmp_path / 'a.zip')):
        with pytest.raises(BadFile, match='has no files to unpack'):
            unpack(archive, tmp_path / 'data')


def test_an_archive_with_a_password_is_refused(tmp_path):
    archive = zipped(tmp_path / 'a.zip', ('x', 0))
    raw = bytearray(archive.read_bytes())
    for mark, flags in ((b'PK\x03\x04', 6), (b'PK\x01\x02', 8)):
        raw[raw.index(mark) + flags] |= 1
    archive.write_bytes(raw)
    with pytest.raises(BadFile, match='a.zip is not a whole archive .*encrypted'):
        unpack(archive, tmp_path / 'data')


def test_full_disk_leaves_no_half_archive(tmp_path, small_disk, record):
    with zipfile.ZipFile(tmp_path / 'big.zip', 'w', zipfile.ZIP_DEFLATED) as z:
        z.writestr('set/zeros', bytes(1_000_000))
    with pytest.raises(OSError, match='no space left'):
        unpack(tmp_path / 'big.zip', small_disk)
    assert not os.listdir(small_disk)
    record('disk full while an archive is unpacked: nothing of it stays', tries=1, survived=1)


def test_downloads_are_checked_by_digest(tmp_path):
    "torchvision, which downloads for us, knows a digest of every file and refuses another."
    from torchvision.datasets import EMNIST, Omniglot
    from torchvision.datasets.utils import check_integrity

    (tmp_path / 'x.zip').write_bytes(b'not it')
    for digest in (*Omniglot.zips_md5.values(), EMNIST.md5):
        assert len(digest) == 32
        assert not check_integrity(str(tmp_path / 'x.zip'), digest)


@pytest.mark.parametrize('code,words', [('ENOSPC', 'no space left'), ('EROFS', 'writable')])
def test_an_error_of_writing_names_the_file_and_the_way_out(code, words):
    number = getattr(errno, code)
    error = write_error(OSError(number, os.strerror(number)), pathlib.Path('/a/b.json'))
    assert error.errno == number
    assert all(part in str(error) for part in (words, '/a/b.json', 'choose another folder'))
    other = OSError(errno.EIO, 'broken')
    assert write_error(other, pathlib.Path('/a/b.json')) is other
