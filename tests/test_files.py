"""Files: whole or not there, as they were written, one at a time; archives that lead elsewhere."""

import io, os, stat, subprocess, sys, tarfile, zipfile
import pytest
from fewshotmeta.all import *


def test_seal_sees_every_change():
    values = dict(a=1, b=[0.5, None, True], c=dict(d='ä'))
    for other in (
        dict(values, a=2),
        dict(values, a=1.5),
        dict(values, b=[0.5, None, False]),
        {k: v for k, v in values.items() if k != 'a'},
        dict(values, e=0),
    ):
        with pytest.raises(BadFile, match='where: its content is not what was stored'):
            unseal(other | dict(sha256=seal(values)['sha256']), 'where')
    assert unseal(seal(values), '') == values
    for bad in (values, [], None, 'x'):
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


def test_atomic_leaves_the_old_file_and_nothing_else(tmp_path, small_disk, read_only):
    path = small_disk / 'x'
    with atomic(path) as tmp:
        tmp.write_text('old')
    with pytest.raises(
        OSError, match=f'no space left to write {path}: free some, or choose another folder'
    ):
        with atomic(path) as tmp:
            tmp.write_bytes(bytes(1_000_000))
    assert path.read_text() == 'old' and os.listdir(small_disk) == ['x']
    with pytest.raises(PermissionError, match='cannot write .*: make .* writable'):
        with atomic(read_only / 'x') as tmp:
            tmp.write_text('new')
    with pytest.raises(PermissionError, match='cannot write'):
        with locked(read_only / 'lock'):
            pass


def test_a_lock_is_free_when_its_holder_is_killed(tmp_path):
    code = f'import time\nfrom fewshotmeta.data.files import locked\nwith locked("{tmp_path}/lock"): print("mine", flush=True); time.sleep(60)'
    holder = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == 'mine\n'
    with pytest.raises(TimeoutError, match='lock is held by another process'):
        with locked(tmp_path / 'lock', wait=0.2):
            pass
    holder.kill()
    holder.wait()
    with locked(tmp_path / 'lock', wait=0.2):
        pass


def tar(path, *members):
    with tarfile.open(path, 'w:gz') as t:
        for name, kind, target in members:
            m = tarfile.TarInfo(name)
            m.type, m.linkname, m.size = kind, target, 1 if kind == tarfile.REGTYPE else 0
            t.addfile(m, io.BytesIO(b'x'))
    return path


def zipped(path, *members):
    with zipfile.ZipFile(path, 'w') as z:
        for name, mode in members:
            m = zipfile.ZipInfo(name)
            m.external_attr = mode << 16
            z.writestr(m, 'x')
    return path


FILE, LINK, HARD, FIFO, DIR = (
    tarfile.REGTYPE,
    tarfile.SYMTYPE,
    tarfile.LNKTYPE,
    tarfile.FIFOTYPE,
    tarfile.DIRTYPE,
)
EVIL = ['../out', '/abs', 'a/../../out', '..', 'a/..', 'C:\\x', '..\\out', '\\abs']


@pytest.mark.parametrize('name', EVIL)
def test_archives_that_lead_elsewhere_are_refused_before_anything_is_written(tmp_path, name):
    for archive in (
        tar(tmp_path / 'a.tgz', ('fine', FILE, ''), (name, FILE, '')),
        zipped(tmp_path / 'a.zip', ('fine', 0), (name, 0)),
    ):
        with pytest.raises(BadFile, match='leads out of the folder: nothing was unpacked'):
            unpack(archive, tmp_path / 'data')
    assert not (tmp_path / 'data').exists() and sorted(os.listdir(tmp_path)) == ['a.tgz', 'a.zip']


@pytest.mark.parametrize(
    'kind,target', [(LINK, '/etc'), (LINK, 'fine'), (HARD, 'fine'), (FIFO, '')]
)
def test_links_and_devices_are_refused(tmp_path, kind, target):
    with pytest.raises(BadFile, match="'odd' is a link or a device"):
        unpack(
            tar(tmp_path / 'a.tgz', ('fine', FILE, ''), ('odd', kind, target)), tmp_path / 'data'
        )
    with pytest.raises(BadFile, match="'odd' is a link or a device"):
        unpack(zipped(tmp_path / 'a.zip', ('odd', stat.S_IFLNK | 0o777)), tmp_path / 'data')
    assert not (tmp_path / 'data').exists()


def test_whole_archives_and_broken_ones(tmp_path):
    good = tar(tmp_path / 'a.tgz', ('set', DIR, ''), ('set/x.txt', FILE, ''))
    assert (
        unpack(good, tmp_path / 'data', digest_of(good)) == ['set']
        and (tmp_path / 'data' / 'set' / 'x.txt').read_text() == 'x'
    )
    with pytest.raises(FileExistsError, match='set is there already'):
        unpack(good, tmp_path / 'data')
    with pytest.raises(BadFile, match='expected 0000'):
        unpack(good, tmp_path / 'other', '0000')
    (tmp_path / 'b.tgz').write_bytes(good.read_bytes()[:40])
    with pytest.raises(BadFile, match='b.tgz is not'):
        unpack(tmp_path / 'b.tgz', tmp_path / 'other')
    (tmp_path / 'c.zip').write_bytes(b'hello')
    with pytest.raises(BadFile, match='not a zip or tar archive'):
        unpack(tmp_path / 'c.zip', tmp_path / 'other')
    with pytest.raises(FileNotFoundError, match='no archive'):
        unpack(tmp_path / 'none.zip', tmp_path / 'other')
    assert not list((tmp_path / 'other').glob('*'))


def test_full_disk_leaves_no_half_archive(tmp_path, small_disk):
    with zipfile.ZipFile(tmp_path / 'big.zip', 'w', zipfile.ZIP_DEFLATED) as z:
        z.writestr('set/zeros', bytes(1_000_000))
    with pytest.raises(OSError, match='no space left'):
        unpack(tmp_path / 'big.zip', small_disk)
    assert not os.listdir(small_disk)


def test_downloads_are_checked_by_digest(tmp_path):
    "torchvision, which downloads for us, refuses a file with another digest; every data set that it gets has one."
    from torchvision.datasets import EMNIST, Omniglot
    from torchvision.datasets.utils import check_integrity

    (tmp_path / 'x.zip').write_bytes(b'not it')
    for digest in (*Omniglot.zips_md5.values(), EMNIST.md5):
        assert len(digest) == 32 and not check_integrity(str(tmp_path / 'x.zip'), digest)
