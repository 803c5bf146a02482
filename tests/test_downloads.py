"""What people download, unpacked by the command to where the loaders look; what is there, told."""

import gzip
import io
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image

from fewshotmeta.all import *
from fewshotmeta.lab.command import main


def picture(size=(40, 30), mode='RGB', kind='JPEG'):
    "The bytes of an image file."
    file = io.BytesIO()
    Image.new(mode, size).save(file, kind)
    return file.getvalue()


PHOTO = picture()
DRAWING = picture((105, 105), '1', 'PNG')


def tgz(path, files):
    "Write a tar.gz archive of names and contents."
    with tarfile.open(path, 'w:gz', compresslevel=1) as t:
        for name, content in files.items():
            m = tarfile.TarInfo(name)
            m.size = len(content)
            t.addfile(m, io.BytesIO(content))
    return path


def zipped(path, files):
    "Write a zip archive of names and contents."
    with zipfile.ZipFile(path, 'w') as z:
        for name, content in files.items():
            z.writestr(name, content)
    return path


def gzipped(path, content):
    path.write_bytes(gzip.compress(content))
    return path


def refused(capsys, *words):
    "What the command says of arguments that it refuses."
    assert main(['data', *map(str, words)]) == 2
    return capsys.readouterr().err


def told(root, name):
    "The line and the row about a data set."
    (row,) = [row for row in data_status(root) if row['name'] == name]
    return row


def all_of(root):
    "Every file in a folder, hidden ones as well."
    return sorted(str(p.relative_to(root)) for p in root.rglob('*') if p.is_file())


# ---- Omniglot
def characters(part):
    alphabets = splits('omniglot')['lake2015'][part]
    return [f'{a}/character{i:02d}' for a, numbers in alphabets.items() for i in numbers]


def drawings(part):
    return {f'images_{part}/{c}/0001_01.png': DRAWING for c in characters(part)}


def test_omniglot_in_two_archives(tmp_path, capsys):
    "And half of it is incomplete."
    root = tmp_path / 'root'
    for part, n, count in (('background', 964, 659), ('evaluation', 1623, 0)):
        hidden = {f'__MACOSX/images_{part}/._x': b'', f'images_{part}/.DS_Store': b''}
        archive = zipped(tmp_path / f'{part}.zip', drawings(part) | hidden)
        assert main(['data', '--root', str(root), '--unpack', str(archive)]) == 0
        out = capsys.readouterr().out
        where = root / 'omniglot-py'
        state = 'incomplete' if count else 'found     '
        assert f'{state}  omniglot        {where}   {n:,} classes, {n:,} images\n' in out
        assert (f'            {count} of 1,623 classes have no images' in out) == bool(count)
        assert told(root, 'omniglot')['found'] is not bool(count)
    assert len(all_of(root)) == 1623


def test_empty_folders_are_not_omniglot(tmp_path):
    for part in ('background', 'evaluation'):
        (tmp_path / 'omniglot-py' / f'images_{part}').mkdir(parents=True)
    row = told(tmp_path, 'omniglot')
    assert not row['found']
    assert row['lacking'][1].startswith('1,623 of 1,623 classes have no images')
    with pytest.raises(DataMissing, match='omniglot is not under .* --get omniglot'):
        omniglot(root=tmp_path, download=False)


# ---- EMNIST
def idx(array):
    "An array of bytes in an IDX file's form."
    sizes = b''.join(n.to_bytes(4, 'big') for n in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.astype(np.uint8).tobytes()


LABELS = np.arange(62).repeat(2)
IMAGES = np.zeros((124, 28, 28))
PARTS = {'images-idx3': idx(IMAGES), 'labels-idx1': idx(LABELS)}
TEST = {f'emnist-byclass-test-{kind}-ubyte': content for kind, content in PARTS.items()}
EMNIST_ZIP = {
    f'gzip/emnist-{part}-{kind}-ubyte.gz': gzip.compress(content)
    for part in ('byclass-train', 'byclass-test', 'letters-test')
    for kind, content in PARTS.items()
} | {'gzip/emnist-byclass-mapping.txt': b'0 48\n'}


def test_emnist_file_by_file(tmp_path, capsys):
    root = tmp_path / 'root'
    for n, (name, content) in enumerate(TEST.items(), 1):
        archive = gzipped(tmp_path / f'{name} (1).gz', content)  # as a browser saves it twice
        assert main(['data', '--root', str(root), '--unpack', str(archive)]) == 0
        assert len(all_of(root)) == n
        said = 'there is no emnist-byclass-test-labels-idx1-ubyte' in capsys.readouterr().out
        assert said == (n == 1)
    row = told(root, 'emnist')
    assert (row['found'], row['classes'], row['images']) == (True, 62, 124)
    assert emnist('test', root=root, download=False).count.tolist() == [2] * 31


def test_emnist_in_one_archive(tmp_path, capsys):
    "Of which two files are read; the others stay packed."
    archive = zipped(tmp_path / 'gzip.zip', EMNIST_ZIP)
    assert main(['data', '--root', str(tmp_path / 'root'), '--unpack', str(archive)]) == 0
    assert all_of(tmp_path / 'root') == sorted(f'EMNIST/raw/{name}' for name in TEST)
    assert told(tmp_path / 'root', 'emnist')['found']


def test_an_emnist_file_is_told_by_its_content(tmp_path, capsys):
    whole = np.zeros(116_323)
    name = 'emnist-byclass-test-images-idx3-ubyte.gz'
    files = [
        (gzipped(tmp_path / 'renamed.gz', idx(whole)), 'emnist-byclass-test-labels-idx1-ubyte'),
        (gzipped(tmp_path / 'some.gz', idx(LABELS)), ''),
        (gzipped(tmp_path / 'emnist-byclass-train-labels-idx1-ubyte.gz', idx(LABELS)), ''),
        (gzipped(tmp_path / name, b'something else'), ''),
    ]
    for i, (archive, expected) in enumerate(files):
        root = tmp_path / str(i)
        root.mkdir()
        if expected:
            assert main(['data', '--root', str(root), '--unpack', str(archive)]) == 0
        else:
            said = refused(capsys, '--root', root, '--unpack', archive)
            assert 'none of cifar_fs, cub, emnist' in said
        assert all_of(root) == [f'EMNIST/raw/{expected}'] * bool(expected)


@pytest.mark.parametrize(
    'spoil,words',
    [
        (dict(images=idx(IMAGES)[:-1]), 'images-idx3-ubyte: not a whole IDX file (97,231 bytes)'),
        (dict(images=None), 'there is no emnist-byclass-test-images-idx3-ubyte'),
        (dict(labels=None), 'there is no emnist-byclass-test-labels-idx1-ubyte'),
        (dict(labels=idx(LABELS[:-1])), '124 images but 123 labels'),
        (dict(labels=idx(LABELS + 1)), 'label 62, but there are 62 classes'),
        (dict(images=idx(IMAGES[:0]), labels=idx(LABELS[:0])), 'has no images'),
    ],
)
def test_emnist_that_would_not_open(tmp_path, spoil, words):
    raw = tmp_path / 'EMNIST' / 'raw'
    raw.mkdir(parents=True)
    for name, content in TEST.items():
        content = spoil.get(name.split('-')[3], content)
        if content is not None:
            (raw / name).write_bytes(content)
    row = told(tmp_path, 'emnist')
    assert not row['found']
    assert words in '\n'.join(row['lacking'])


def test_emnist_that_is_still_packed(tmp_path):
    (tmp_path / 'EMNIST' / 'raw').mkdir(parents=True)
    packed = tmp_path / 'EMNIST' / 'raw' / 'emnist-byclass-test-images-idx3-ubyte.gz'
    gzipped(packed, idx(IMAGES))
    assert f'`fewshotmeta data --unpack {packed}`' in '\n'.join(told(tmp_path, 'emnist')['lacking'])


# ---- CUB
SPECIES = sorted(c for names in splits('cub').values() for c in names)
BIRDS = {f'images/{c}/{c}_1.jpg': PHOTO for c in SPECIES}


def inside(folder, files):
    return {f'{folder}/{name}': content for name, content in files.items()}


def test_cub_with_a_file_beside_its_folder(tmp_path, capsys):
    "Again, and beside a file of the same name, which stays."
    beside = {'attributes.txt': b'1 has_bill', 'CUB_200_2011/README': b'read me'}
    hidden = {f'CUB_200_2011/images/{SPECIES[0]}/._x.jpg': b'\0'}
    archive = tgz(tmp_path / 'a.tgz', beside | hidden | inside('CUB_200_2011', BIRDS))
    root = tmp_path / 'root'
    root.mkdir()
    (root / 'attributes.txt').write_text('mine')
    for _ in range(2):
        assert main(['data', '--root', str(root), '--unpack', str(archive)]) == 0
        assert (root / 'attributes.txt').read_text() == 'mine'
        others = ['CUB_200_2011/README', 'CUB_200_2011/attributes.txt', 'attributes.txt']
        assert all_of(root) == sorted([*others, *inside('CUB_200_2011', BIRDS)])
    row = told(root, 'cub')
    assert (row['found'], row['classes'], row['images']) == (True, 200, 200)
    photo = root / 'CUB_200_2011' / 'images' / SPECIES[3] / f'{SPECIES[3]}_1.jpg'
    photo.write_bytes(PHOTO[:100])
    (lacking,) = told(root, 'cub')['lacking']
    assert lacking.startswith(f'1 class begins with a bad file: {photo}')
    photo.unlink()
    assert told(root, 'cub')['lacking'] == [
        f'1 of 200 classes have no images (first: {SPECIES[3]})'
    ]


@pytest.mark.parametrize('form', ['', 'a/b/', 'birds/images/', 'images/'])
def test_cub_as_others_pack_it(tmp_path, form):
    birds = {f'{form}{c}/1.jpg': PHOTO for c in SPECIES[:3]}
    outlines = {f'segmentations/{SPECIES[0]}/1.png': DRAWING}
    assert unpack_download(zipped(tmp_path / 'x.zip', birds | outlines), tmp_path / 'root') == 'cub'
    expected = [f'CUB_200_2011/images/{c}/1.jpg' for c in SPECIES[:3]]
    expected.append(f'CUB_200_2011/segmentations/{SPECIES[0]}/1.png')
    assert all_of(tmp_path / 'root') == expected


# ---- mini-ImageNet
MINI = splits('mini_imagenet')
EVERY = [c for names in MINI.values() for c in names]


def csv_files(form='{c}00000001.jpg'):
    "The three csv files of mini-ImageNet, with an image a class."
    rows = {split: [f'{form.format(c=c)},{c}' for c in names] for split, names in MINI.items()}
    return {f'{s}.csv': '\n'.join(['filename,label', *r]).encode() for s, r in rows.items()}


FLAT = {f'images/{c}00000001.jpg': PHOTO for c in EVERY}
BESIDE = {f'{c}00000001.jpg': PHOTO for c in EVERY}
BY_SPLIT = {f'{split}/{c}/1.jpg': PHOTO for split, names in MINI.items() for c in names}
BY_CLASS = {f'{c}/1.jpg': PHOTO for c in EVERY}


@pytest.mark.parametrize(
    'write,files',
    [
        (zipped, csv_files() | FLAT),
        (tgz, inside('miniImageNet--ravi', csv_files() | FLAT | {'README.md': b'read me'})),
        (zipped, inside('mini-imagenet', csv_files() | BESIDE)),
        (tgz, inside('a/mini', BY_SPLIT)),
        (zipped, BY_CLASS),
        (zipped, inside('mini/images', BY_CLASS)),
    ],
    ids=['csv', 'csv-in-folder', 'csv-beside', 'by-split', 'by-class', 'by-class-in-images'],
)
def test_mini_imagenet_as_it_is_passed_on(tmp_path, own_cache, write, files):
    archive = write(tmp_path / 'x', files | {'mini/._x': b'', '__MACOSX/train/._x.jpg': b''})
    root = tmp_path / 'root'
    assert main(['data', '--root', str(root), '--unpack', str(archive)]) == 0
    row = told(root, 'mini_imagenet')
    assert (row['found'], row['classes'], row['images']) == (True, 100, 100), row['lacking']
    assert [p.name for p in root.iterdir()] == ['mini-imagenet']
    assert len(mini_imagenet('test', size=8, root=root)) == 20


def test_mini_imagenet_stored_by_python(tmp_path):
    "Its three files go to their place; that the loader does not read them is said."
    stored = {f'mini/mini-imagenet-cache-{split}.pkl': b'\x80\x04' for split in MINI}
    root = tmp_path / 'root'
    assert unpack_download(zipped(tmp_path / 'x.zip', stored), root) == 'mini_imagenet'
    assert all_of(root) == sorted(f'mini-imagenet/{name[5:]}' for name in stored)
    row = told(root, 'mini_imagenet')
    assert not row['found']
    assert 'which holds mini-imagenet-cache-test.pkl' in row['lacking'][0]


def test_mini_imagenet_that_would_not_open(tmp_path):
    base = tmp_path / 'mini-imagenet'
    (base / 'images').mkdir(parents=True)
    for name, content in csv_files().items():
        (base / name).write_bytes(content)
    lacking = told(tmp_path, 'mini_imagenet')['lacking']
    assert 'has no images' in lacking[0]
    assert lacking[1].startswith('train: 64 of 64 images are not there')
    for name in FLAT:
        (base / name).write_bytes(PHOTO)
    assert told(tmp_path, 'mini_imagenet')['found']
    (base / 'images' / f'{MINI["val"][2]}00000001.jpg').unlink()
    (base / 'test.csv').write_text('a,b')
    row = told(tmp_path, 'mini_imagenet')
    said = row['lacking']
    assert said[0].startswith('val: 1 of 16 images are not there') and 'test.csv' in said[1]
    assert (row['found'], row['classes'], row['images']) == (False, 64, 64)


# ---- refusals
EVERY_SET = DATASETS.keys() - {'glyphs'}
OTHERS = {
    'a part of ImageNet': BY_CLASS | {'n00000001/1.jpg': PHOTO},
    'strokes': {'strokes_background/Greek/character01/0001_01.txt': b''},
    'photographs': {'cats/1.jpg': PHOTO, 'dogs/1.jpg': PHOTO},
    'csv files alone': csv_files(),
}


@pytest.mark.parametrize('files', OTHERS.values(), ids=OTHERS)
def test_an_archive_of_something_else(tmp_path, capsys, files):
    archive = zipped(tmp_path / 'CUB_200_2011.zip', files)
    root = tmp_path / 'root'
    said = refused(capsys, '--root', root, '--unpack', archive)
    assert f'holds {next(iter(files))}' in said
    assert f'none of {", ".join(sorted(EVERY_SET))} as it' in said
    assert not root.exists()


def test_two_copies_in_one_archive(tmp_path, capsys):
    archive = zipped(tmp_path / 'x.zip', inside('a', BY_SPLIT) | inside('b', BY_SPLIT))
    said = refused(capsys, '--root', tmp_path / 'root', '--unpack', archive)
    assert 'mini-ImageNet lies in several folders of the archive: a, b' in said


def test_the_limit_is_an_option(tmp_path, capsys):
    large = {f'CUB_200_2011/images/{SPECIES[0]}/1.jpg': bytes(101_000_000)}
    archive, root = tgz(tmp_path / 'x.tgz', large), tmp_path / 'root'
    words = '--root', root, '--unpack', archive
    said = refused(capsys, *words)
    assert f'{archive} would unpack to at least 101 MB; the limit is 100 MB' in said
    assert '--unpack-limit MB' in said
    assert not root.exists()
    for bad in ('-1', 'nan', 'inf'):
        said = refused(capsys, *words, '--unpack-limit', bad)
        assert f'--unpack-limit {bad}: expected MB' in said
    assert main(['data', *map(str, words), '--unpack-limit', '102']) == 0
    assert '200 classes' in capsys.readouterr().out


def test_what_lacks_is_said_by_the_command(tmp_path, capsys):
    (tmp_path / 'CUB_200_2011' / 'images').mkdir(parents=True)
    assert main(['data', '--root', str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    where = tmp_path / 'CUB_200_2011' / 'images'
    at = lines.index(f'incomplete  cub             {where}')
    assert lines[at + 1].strip() == f'{where}, which is empty, has no images'
    assert lines[at + 2].strip().startswith('200 of 200 classes have no images')
    assert 'CUB_200_2011.tgz' in lines[at + 3]
