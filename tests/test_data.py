"""Banks: what they hold, what they refuse, and that a bad file is never used."""

import errno
import os
import pickle
import re
import struct
import tempfile
import threading
import time
from pathlib import Path

import forks
import numpy as np
import pytest
import torch
from conftest import full
from PIL import Image
from safetensors.torch import save_file

from fewshotmeta.all import *
from fewshotmeta.data.omniglot import _omniglot_folders


def write_images(folder, n=3, size=(30, 20), mode='RGB', seed=0):
    "Write n images of noise."
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for i in range(n):
        noise = rng.integers(0, 255, (size[1], size[0], 3), np.uint8)
        Image.fromarray(noise).convert(mode).save(folder / f'{i}.png')


# ---- splits (T15)
@pytest.mark.parametrize(
    'name,expected',
    [
        ('emnist', dict(val=31, test=31)),
        ('mini_imagenet', dict(train=64, val=16, test=20)),
        ('cub', dict(base=100, val=50, novel=50)),
    ],
)
def test_split_sizes_and_disjoint(name, expected):
    parts = splits(name)
    assert {k: len(v) for k, v in parts.items()} == expected
    every = [c for v in parts.values() for c in v]
    assert len(every) == len(set(every))


@pytest.mark.parametrize(
    'protocol,expected',
    [
        ('antoniou2018', dict(train=1150, val=50, test=423)),
        ('finn2017', dict(train=1100, val=100, test=423)),
        ('drumond2020', dict(train=1200, test=423)),
        ('closerlook', dict(train=1597)),
        ('lake2015', dict(background=964, evaluation=659)),
    ],
)
def test_omniglot_splits(protocol, expected):
    parts = {
        s: [(a, i) for a, chars in d.items() for i in chars]
        for s, d in splits('omniglot')[protocol].items()
    }
    assert {k: len(v) for k, v in parts.items()} == expected
    every = [c for v in parts.values() for c in v]
    assert len(every) == len(set(every))
    if protocol == 'closerlook':
        assert not any(a == 'Latin' for a, _ in every)


def test_glyph_scripts_are_in_one_split_only():
    scripts = [s for d in splits('glyphs').values() for s in d]
    chars = [c for d in splits('glyphs').values() for cs in d.values() for c in cs]
    assert len(scripts) == len(set(scripts)) == 12 and len(chars) == len(set(chars)) == 2075


# ---- files to pixels
def test_transparency_is_white(tmp_path):
    Image.new('RGBA', (10, 10), (255, 0, 0, 0)).save(tmp_path / 'clear.png')
    assert read_image(tmp_path / 'clear.png', 10, 3).min() == 255


@pytest.mark.parametrize('mode', ['1', 'L', 'P', 'LA', 'RGB', 'RGBA', 'CMYK'])
def test_modes(tmp_path, mode):
    file = tmp_path / f'{mode}.{"tif" if mode == "CMYK" else "png"}'
    Image.fromarray(np.full((40, 60, 3), 77, np.uint8)).convert(mode).save(file)
    assert read_image(file, 28, 3).shape == (3, 28, 28)
    assert read_image(file, 28, 1).shape == (1, 28, 28)


def test_sixteen_bits_are_refused(tmp_path):
    Image.fromarray(np.zeros((9, 9), np.uint16)).save(tmp_path / 'deep.png')
    with pytest.raises(BadImage, match='convert it to 8 bit'):
        read_image(tmp_path / 'deep.png', 9)


def stripes():
    "White ends, black middle, (40, 80)."
    wide = np.zeros((40, 80), np.uint8)
    wide[:, :20] = 255
    wide[:, 60:] = 255
    return wide


def test_crop_and_squash(tmp_path):
    Image.fromarray(stripes()).save(tmp_path / 'wide.png')
    assert read_image(tmp_path / 'wide.png', 20).max() == 0
    squashed = read_image(tmp_path / 'wide.png', 20, squash=True)
    assert squashed.mean() == pytest.approx(127.5)


def test_a_phone_held_upright(tmp_path):
    exif = Image.Exif()
    exif[0x112] = 6
    Image.fromarray(stripes()[:, :60]).save(tmp_path / 'phone.jpg', exif=exif)
    turned = read_image(tmp_path / 'phone.jpg', 60, squash=True)
    assert turned[0, :15].mean() > 200
    assert turned[0, 30:].mean() < 60


def test_a_file_that_is_no_image(tmp_path):
    (tmp_path / 'bad.pgm').write_bytes(b'P5 3 x 255 abc')
    with pytest.raises(BadImage, match='bad.pgm'):
        read_image(tmp_path / 'bad.pgm', 8)


def test_margin_cuts_the_centre_of_a_larger_image(tmp_path):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (40, 40), np.uint8)).save(tmp_path / 'a.png')
    whole = read_image(tmp_path / 'a.png', 24, resize='bilinear')
    centre = read_image(tmp_path / 'a.png', 20, resize='bilinear', margin=1.2)
    assert np.array_equal(centre, whole[:, 2:22, 2:22])


def test_resize_filter_is_what_it_says(tmp_path):
    rng = np.random.default_rng(0)
    file = tmp_path / 'bits.png'
    Image.fromarray(rng.random((105, 105)) > 0.5).save(file)
    assert set(np.unique(read_image(file, 28, resize='nearest'))) <= {0, 255}
    smooth = np.unique(read_image(file, 28, resize='lanczos'))
    assert len(smooth) > 50  # not silently nearest
    light, dark = read_image(file, 28), read_image(file, 28, invert=True)
    assert (light.astype(int) + dark == 255).all()


# ---- folders of classes
@pytest.fixture
def own_folder(tmp_path):
    "Four class folders of three images each, of four modes and sizes."
    for i, (c, mode) in enumerate(dict(cats='RGB', dogs='L', fish='P', fowl='RGBA').items()):
        size = (20 + 9 * i, 50 - 7 * i)
        write_images(tmp_path / 'own' / c, mode=mode, size=size, seed=i)
    return tmp_path / 'own'


def test_image_folder_of_a_stranger(own_folder, own_cache):
    bank = image_folder(own_folder, size=24)
    assert bank.classes == ['cats', 'dogs', 'fish', 'fowl']
    assert bank.count.tolist() == [3] * 4
    assert bank.images.shape[1:] == (3, 24, 24)


def test_images_of_any_size_come_as_they_are(tmp_path, own_cache):
    "As CIFAR's: 32×32, which nothing needs to enlarge; each size has a bank of its own."
    write_images(tmp_path / 'own' / 'train' / 'cats', mode='RGB', size=(32, 32))
    files = sorted((tmp_path / 'own' / 'train' / 'cats').iterdir())
    own = load_data(str(tmp_path / 'own'), 'train', size=32)
    assert np.array_equal(own.images[0].permute(1, 2, 0), np.asarray(Image.open(files[0])))
    grey = load_data(str(tmp_path / 'own'), 'train', size=32, channels=1)
    assert grey.images.shape == (len(files), 1, 32, 32)
    asked = load_data(str(tmp_path / 'own'), 'train', size=0, channels=0)
    assert asked.images.shape[1:] == (3, 84, 84)  # as if nothing was said
    assert len(list(own_cache.rglob('*.safetensors'))) == 3
    again = load_data(str(tmp_path / 'own'), 'train', size=32)
    assert again.digest == own.digest


def test_a_broken_file_of_a_folder_is_named(own_folder, own_cache):
    image_folder(own_folder, size=24)
    (own_folder / 'dogs' / '9.jpg').write_bytes(b'\xff\xd8broken')
    (own_folder / 'fish' / 'notes.txt').write_text('not an image')
    words = r'1 of 13 files cannot be used, nothing was written:\n.*dogs/9.jpg'
    with pytest.warns(UserWarning), pytest.raises(BadImage, match=words):
        image_folder(own_folder, size=24)
    assert len(list(own_cache.rglob('*.safetensors'))) == 1  # only the first bank
    with pytest.warns(UserWarning, match='9.jpg'):
        assert image_folder(own_folder, size=24, skip_unreadable=True).count.sum() == 12


def test_a_changed_folder_is_noticed(own_folder, own_cache):
    image_folder(own_folder, size=24)
    write_images(own_folder / 'dogs', n=5)
    with pytest.warns(UserWarning, match='files that it was made from have changed'):
        assert image_folder(own_folder, size=24).count.tolist() == [3, 5, 3, 3]


def animation(file, frames=2, **how):
    "A file of several frames, white ones but the first."
    first, *others = [Image.new('L', (30, 30), 255 * (i > 0)) for i in range(frames)]
    first.save(file, save_all=True, append_images=others, **how)


def warnings_of(recorded):
    "What was said of what a bank lacks."
    return [str(w.message) for w in recorded if 'not everything is in the bank' in str(w.message)]


def test_nothing_of_a_folder_vanishes_in_silence(own_folder, own_cache, recwarn):
    for name in ('cats/b.heic', 'cats/a.avif', 'dogs/list.txt', 'fish/c.heic', 'stray.png'):
        (own_folder / name).write_text('not looked into')
    (own_folder / 'dogs' / 'broken link.png').symlink_to('nowhere')
    write_images(own_folder / 'cats' / 'rejected')
    (own_folder / 'new').mkdir()
    animation(own_folder / 'fowl' / 'moving.gif')
    (own_folder / '.hidden').mkdir()
    (own_folder / 'cats' / '.DS_Store').write_text('')
    bank = image_folder(own_folder, size=24)
    assert bank.count.tolist() == [3, 3, 3, 4]
    assert bank['fowl'][3].max() == 0  # its first frame
    (said,) = warnings_of(recwarn)
    listed = (
        'files of a kind that is not read: 5 (cats/a.avif, cats/b.heic, dogs/broken link.png, …); '
        'folders within a class, which are not looked into: 1 (cats/rejected); '
        'files beside the class folders: 1 (stray.png); class folders without images: 1 (new)'
    )
    assert said.startswith(f'own: not everything is in the bank: {listed}')
    assert said.endswith('; animations, read as their first frame: 1 (fowl/moving.gif)')
    image_folder(own_folder, size=24)  # from the cache
    assert warnings_of(recwarn)[1].endswith(listed)


def test_a_whole_folder_is_read_without_a_word(own_folder, own_cache, recwarn):
    "JPEG by its other name, and a phone's JPEG of two pictures, which is one photograph."
    Image.new('RGB', (30, 20)).save(own_folder / 'cats' / 'z.jfif', 'JPEG')
    animation(own_folder / 'dogs' / 'z.jpg', format='MPO')
    assert image_folder(own_folder, size=24).count.tolist() == [4, 4, 3, 3]
    assert not warnings_of(recwarn)


def test_unreadable_files_are_counted_from_the_cache_as_well(own_folder, own_cache, recwarn):
    (own_folder / 'dogs' / '9.jpg').write_bytes(b'broken')
    with pytest.raises(BadImage, match='skip_unreadable=True leaves them out'):
        image_folder(own_folder, size=24)
    for expected in ('dogs/9.jpg: cannot identify', 'unreadable files: 1 (in dogs)'):
        image_folder(own_folder, size=24, skip_unreadable=True)
        assert expected in warnings_of(recwarn)[-1]


def test_a_folder_of_folders_of_classes_says_what_is_there(own_folder, own_cache):
    words = r'no class folders with images .*not looked into: 4 \(own/cats, own/dogs, own/fish, …'
    with pytest.raises(DataMissing, match=words):
        image_folder(own_folder.parent)


def test_classes_that_are_too_small_are_left_out(own_folder, own_cache, recwarn):
    write_images(own_folder / 'cats', n=5)
    write_images(own_folder / 'fowl', n=6)
    whole = image_folder(own_folder, size=24)
    words = "= 5 images, but class 'dogs' of own has 3; 2 classes of 4 with fewer: .*min_images=5"
    with pytest.raises(ValueError, match=words):
        EpisodeSampler(whole, 2, 1, 4)
    large = image_folder(own_folder, size=24, min_images=5)
    assert large.classes == ['cats', 'fowl']
    assert torch.equal(large['fowl'], whole['fowl'])
    EpisodeSampler(large, 2, 1, 4)
    (said,) = warnings_of(recwarn)
    assert 'classes of fewer than min_images: 2 (dogs has 3, fish has 3)' in said
    assert len(list(own_cache.rglob('*.safetensors'))) == 1
    with pytest.raises(ValueError, match='min_images=7, but the largest class of own has 6'):
        image_folder(own_folder, size=24, min_images=7)
    with pytest.raises(ValueError, match='min_images=-1: expected'):
        image_folder(own_folder, size=24, min_images=-1)


def test_a_home_is_found_behind_its_tilde(own_folder, own_cache, monkeypatch):
    home = own_folder.parent
    monkeypatch.setenv('HOME', str(home))
    own_folder.rename(home / 'train')
    expected = image_folder(home / 'train', size=24).digest
    assert image_folder('~/train', size=24).digest == expected
    for name in ('~', '~/'):
        assert load_data(name, 'train', size=24).digest == expected
    assert data_root('~/data') == home / 'data'
    monkeypatch.setenv('FEWSHOTMETA_DATA', '~/sets')
    assert data_root() == home / 'sets'
    monkeypatch.setenv('FEWSHOTMETA_CACHE', '~/kept')
    assert cache_folder() == home / 'kept'


def test_a_fingerprint_looks_into_folders(tmp_path):
    write_images(tmp_path / 'a' / 'b', n=1)
    file, whole = tmp_path / 'a' / 'b' / '0.png', fingerprint(tmp_path, [tmp_path / 'a'])
    alone = fingerprint(tmp_path, [tmp_path / 'a'], inside=False)
    file.write_bytes(file.read_bytes() + b' ')
    assert fingerprint(tmp_path, [tmp_path / 'a']) != whole
    assert fingerprint(tmp_path, [tmp_path / 'a'], inside=False) == alone


# ---- data sets on generated trees
def truncated(file):
    file.write_bytes(file.read_bytes()[:60])


def of_wrong_size(file):
    Image.new('1', (28, 28)).save(file)


def of_text(file):
    file.write_text('x')


@pytest.mark.parametrize('spoil', [truncated, of_wrong_size, of_text])
def test_omniglot_bad_file_is_named_and_no_bank_written(tmp_path, own_cache, spoil):
    base = tmp_path / 'omniglot-py'
    for folder in ('images_background/A', 'images_evaluation/B'):
        write_images(base / folder / 'character01', size=(105, 105), mode='1')
    spoil(base / 'images_background' / 'A' / 'character01' / '1.png')
    files = {c: images_in(folder) for c, folder in _omniglot_folders(base).items()}
    with pytest.raises(BadImage, match='character01/1.png'):
        build_bank(files, 28, 1, 'omniglot', expect=(105, 105))
    with pytest.raises(DataMissing, match='lacks .* characters'):
        omniglot(root=tmp_path)
    assert not own_cache.exists()


def test_cub_on_a_generated_tree(tmp_path, own_cache):
    for c in splits('cub')['val']:
        write_images(tmp_path / 'CUB_200_2011' / 'images' / c, n=2, size=(50, 40))
    bank = cub('val', size=32, root=tmp_path)
    assert len(bank) == 50 and bank.images.shape == (100, 3, 32, 32)
    with pytest.raises(DataMissing, match='lacks 100 species'):
        cub('base', root=tmp_path)


@pytest.fixture
def mini_trees(tmp_path):
    "The test split of mini-ImageNet with two images a class, in both layouts."
    by_csv, by_folder = tmp_path / 'csv', tmp_path / 'folders'
    images = by_csv / 'mini-imagenet' / 'images'
    images.mkdir(parents=True)
    rows = ['filename,label']
    for i, c in enumerate(splits('mini_imagenet')['test']):
        folder = by_folder / 'mini-imagenet' / 'test' / c
        write_images(folder, n=2, size=(84, 84), seed=i)
        for j in range(2):
            (images / f'{c}_{j}.png').write_bytes((folder / f'{j}.png').read_bytes())
            rows.append(f'{c}_{j}.png,{c}')
    (by_csv / 'mini-imagenet' / 'test.csv').write_text('\n'.join(rows))
    return by_csv, by_folder


def test_mini_imagenet_both_layouts(mini_trees, own_cache):
    by_csv, by_folder = mini_trees
    bank = mini_imagenet('test', root=by_csv)
    assert bank.digest == mini_imagenet('test', root=by_folder).digest


def moved(images, form):
    "Move a csv's images to where `form` has them."
    for c in splits('mini_imagenet')['test']:
        for file in sorted(images.glob(f'{c}*')):
            there = images / form.format(label=c, filename=file.name)
            there.parent.mkdir(parents=True, exist_ok=True)
            file.rename(there)


@pytest.mark.parametrize('form', ['{label}/{filename}', 'images/{filename}'])
def test_mini_imagenet_of_a_spreadsheet_with_nested_images(mini_trees, own_cache, form):
    by_csv, by_folder = mini_trees
    base = by_csv / 'mini-imagenet'
    (base / 'test.csv').write_text((base / 'test.csv').read_text(), encoding='utf-8-sig')
    moved(base / 'images', form)
    bank = mini_imagenet('test', root=by_csv)
    assert bank.digest == mini_imagenet('test', root=by_folder).digest


@pytest.mark.parametrize('place', ['.', 'images'])
def test_mini_imagenet_of_class_folders_without_a_split(mini_trees, own_cache, place):
    "And what else lies beside them is not looked at, nor do the other splits have any."
    _, by_folder = mini_trees
    expected, base = mini_imagenet('test', root=by_folder), by_folder / 'mini-imagenet'
    (base / place).mkdir(exist_ok=True)
    for folder in sorted((base / 'test').iterdir()):
        folder.rename(base / place / folder.name)
    (base / 'test').rmdir()
    (base / place / 'notes').mkdir()
    assert mini_imagenet('test', root=by_folder).digest == expected.digest
    with pytest.raises(DataMissing, match='which holds .*20 class folders'):
        mini_imagenet('val', root=by_folder)
    for folder in (base, base / place):
        if (gone := folder / splits('mini_imagenet')['test'][3]).is_dir():
            gone.rename(folder / 'elsewhere')
    with pytest.raises(DataMissing, match='1 classes differ'):
        mini_imagenet('test', root=by_folder)


class Python2(pickle._Pickler):
    "Write a pickle as Python 2 with NumPy 1 does: every text and every name is bytes."

    dispatch = dict(pickle._Pickler.dispatch)

    def save_old_text(self, obj):
        raw = obj.encode('latin1') if isinstance(obj, str) else obj
        self.write(pickle.BINSTRING + struct.pack('<i', len(raw)) + raw)
        self.memoize(obj)

    dispatch[bytes] = dispatch[str] = save_old_text


def of_python2(held, file):
    Python2(file, 2).dump(held)


def of_numpy1(held, file):
    file.write(pickle.dumps(held, 2).replace(b'numpy._core', b'numpy.core'))


def of_bytes(held, file):
    pickle.dump({k.encode(): v for k, v in held.items()}, file)


def of_arrays(held, file):
    numbers = {c: np.array(own) for c, own in held['class_dict'].items()}
    pickle.dump(held | dict(class_dict=numbers), file, 4)


def of_scalars(held, file):
    numbers = {c: [np.int64(i) for i in own] for c, own in held['class_dict'].items()}
    pickle.dump(held | dict(class_dict=numbers), file, 4)


def of_columns(held, file):
    pickle.dump(held | dict(image_data=np.asfortranarray(held['image_data'])), file, 2)


def of_python314(held, file):
    pickle.dump(held, file, 5)


WRITERS = [of_python2, of_numpy1, of_bytes, of_arrays, of_scalars, of_columns, of_python314]


def cache_pickle(root, name='mini-imagenet-cache-test.pkl'):
    (root / 'mini-imagenet').mkdir(parents=True, exist_ok=True)
    return root / 'mini-imagenet' / name


def as_pickled(bank):
    "What the cache pickle of a bank holds; a class's images are not adjacent."
    order = np.arange(len(bank.images)).reshape(len(bank), -1).T.ravel()
    images = bank.images.permute(0, 2, 3, 1).numpy()[order]
    place = np.argsort(order).reshape(len(bank), -1)
    numbers = {c: own.tolist() for c, own in zip(bank.classes, place)}
    return dict(image_data=images, class_dict=numbers)


@pytest.mark.parametrize('write', WRITERS)
def test_mini_imagenet_of_a_cache_pickle(mini_trees, tmp_path, own_cache, write):
    bank = mini_imagenet('test', root=mini_trees[1])
    with open(cache_pickle(tmp_path), 'wb') as f:
        write(as_pickled(bank), f)
    assert mini_imagenet('test', root=tmp_path).digest == bank.digest
    small = dict(size=42, margin=1.2)
    expected = mini_imagenet('test', root=mini_trees[1], **small).digest
    assert mini_imagenet('test', root=tmp_path, **small).digest == expected


class Hostile:
    def __init__(self, function, *arguments):
        self.asked = function, arguments

    def __reduce__(self):
        return self.asked


@pytest.mark.parametrize('protocol', [0, 2, 5])
@pytest.mark.parametrize(
    'function,argument,named',
    [
        (os.system, 'touch {}', f'{os.name}.system'),
        (eval, 'open({!r}, "w")', r'(builtins|__builtin__)\.eval'),
        (np.memmap, '{}', r'numpy\.memmap'),
    ],
)
def test_a_hostile_pickle_runs_nothing(
    tmp_path, own_cache, protocol, function, argument, named, record
):
    trace = tmp_path / 'trace'
    held = dict(image_data=Hostile(function, argument.format(str(trace))), class_dict={})
    pickle.loads(pickle.dumps(Hostile(os.system, f'touch {trace}'), protocol))
    trace.unlink()  # it would have run
    cache_pickle(tmp_path).write_bytes(pickle.dumps(held, protocol))
    with pytest.raises(BadImage, match=f'test.pkl: it asks for {named}'):
        mini_imagenet('test', root=tmp_path)
    assert not trace.exists()
    record('cache pickles that would run code: nothing is run', tries=1, survived=1)


PIXELS = np.zeros((4, 8, 8, 3), np.uint8)
WRONG_PICKLES = [
    (dict(data=[], catname2label={}), 'holds catname2label, data: expected image_data'),
    (dict(image_data=PIXELS, class_dict=[]), 'holds class_dict, image_data: .*as a dictionary'),
    ({1: [], 'a': []}, 'holds 1, a: expected image_data'),
    ([PIXELS], 'holds no dictionary'),
    (dict(image_data=[1], class_dict={}), 'image_data is no array'),
    (dict(image_data=PIXELS[0], class_dict={}), r'of the shape \(8, 8, 3\)'),
    (dict(image_data=PIXELS.astype(np.int32), class_dict={}), 'of int32, expected uint8'),
    (dict(image_data=PIXELS / 255, class_dict={}), "an array of 'f8'"),
    (dict(image_data=PIXELS, class_dict={'n1': [0, 4]}), 'has 0 to 4: there are 4 images'),
    (dict(image_data=PIXELS, class_dict={'n1': [-1]}), 'has -1 to -1'),
    (dict(image_data=PIXELS, class_dict={'n1': [0.5]}), "'n1'.* is not a list of whole numbers"),
    (dict(image_data=PIXELS, class_dict={'n1': 3}), 'is not a list of whole numbers'),
]


@pytest.mark.parametrize('held,words', WRONG_PICKLES)
def test_a_pickle_of_something_else_says_what_it_holds(tmp_path, own_cache, held, words):
    cache_pickle(tmp_path).write_bytes(pickle.dumps(held))
    with pytest.raises(BadImage, match=f'test.pkl.*{words}'):
        mini_imagenet('test', root=tmp_path)


def test_a_pickle_that_is_not_whole_or_of_another_split(tmp_path, own_cache):
    held = dict(image_data=PIXELS, class_dict={'n1': [0]})
    whole = pickle.dumps(held)
    for bad in (whole[:-9], b'', b'no pickle'):
        cache_pickle(tmp_path).write_bytes(bad)
        with pytest.raises(BadImage, match='test.pkl cannot be read'):
            mini_imagenet('test', root=tmp_path)
    cache_pickle(tmp_path).write_bytes(whole)
    with pytest.raises(DataMissing, match='21 classes differ .*holds mini-imagenet-cache-test.pkl'):
        mini_imagenet('test', root=tmp_path)


def test_what_a_folder_of_mini_imagenet_holds_is_said(tmp_path):
    base = tmp_path / 'mini-imagenet'
    base.mkdir()
    with pytest.raises(DataMissing, match='mini-imagenet, which is empty .*To get it'):
        mini_imagenet('test', root=tmp_path)
    for c in splits('mini_imagenet')['train'][:38]:
        (base / c).mkdir()
    (base / 'test.csv').write_text('filename,label')
    held = 'which holds 38 class folders, test.csv without images/ .*To get it.*cache.*pkl'
    with pytest.raises(DataMissing, match=held):
        mini_imagenet('test', root=tmp_path)
    (base / 'test.csv').unlink()
    (base / 'images' / splits('mini_imagenet')['val'][0]).mkdir(parents=True)
    with pytest.raises(DataMissing, match='38 class folders, images/ with 1 class folder '):
        mini_imagenet('test', root=tmp_path)


def test_twins_of_training_images_can_be_left_out(tmp_path, own_cache):
    for split in ('train', 'test'):
        for i, c in enumerate(splits('mini_imagenet')[split]):
            folder = tmp_path / 'mini-imagenet' / split / c
            write_images(folder, n=2, size=(8, 8), seed=2 * i + (split == 'test'))
    (a, *_), (_, b, *_) = (splits('mini_imagenet')[s] for s in ('train', 'test'))
    base = tmp_path / 'mini-imagenet'
    (base / 'test' / b / '0.png').write_bytes((base / 'train' / a / '1.png').read_bytes())
    train, whole = (mini_imagenet(s, size=8, root=tmp_path) for s in ('train', 'test'))
    assert twins(whole, train) == [((b, 0), (a, 1))]
    rest = mini_imagenet('test', size=8, root=tmp_path, leave_out_twins=True)
    assert rest.classes == whole.classes and rest.reading == whole.reading
    assert rest.count.tolist() == [2, 1] + [2] * 18
    assert torch.equal(rest[b], whole[b][1:])
    others = [i for i, c in enumerate(whole.classes) if c != b]
    assert [rest.digests[i] for i in others] == [whole.digests[i] for i in others]
    same = mini_imagenet('train', size=8, root=tmp_path, leave_out_twins=True)
    assert same.digest == train.digest


def test_mini_imagenet_overwritten_in_place_is_noticed(mini_trees, own_cache, record):
    n = 8 if full() else 1
    for root in mini_trees:
        before = mini_imagenet('test', root=root).digest
        for file, _ in zip(root.rglob('*.png'), range(n)):
            Image.new('RGB', (84, 84), 'red').save(file)  # the folder keeps its time
            with pytest.warns(UserWarning, match='files that it was made from have changed'):
                now = mini_imagenet('test', root=root).digest
            assert now != before
            before = now
    tries = n * len(mini_trees)
    record('images overwritten in place, of a cached bank: noticed', tries=tries, survived=tries)


def test_mini_imagenet_of_another_split(mini_trees, own_cache):
    by_csv, _ = mini_trees
    mini_imagenet('test', root=by_csv)
    file = by_csv / 'mini-imagenet' / 'test.csv'
    file.write_text('\n'.join(file.read_text().split('\n')[:-2]))
    os.utime(file, (1, 1))
    with pytest.warns(UserWarning), pytest.raises(DataMissing, match='1 classes differ'):
        mini_imagenet('test', root=by_csv)


# ---- EMNIST on synthetic IDX files
def idx(path, array):
    "Write an array of bytes as an IDX file."
    sizes = b''.join(n.to_bytes(4, 'big') for n in array.shape)
    path.write_bytes(bytes([0, 0, 8, array.ndim]) + sizes + array.astype(np.uint8).tobytes())


def drawn(top, left, height, width):
    "Draw a bar as a person sees it: 28×28, upright, dark ink (20) on light paper (240)."
    image = np.full((28, 28), 240, np.uint8)
    image[top : top + height, left : left + width] = 20
    return image


# what the images of some classes look like, upright; no two alike when transposed or inverted
BARS = {
    '1': [drawn(2, 12, 24, 3), drawn(2, 13, 24, 3)],
    'L': [drawn(20, 3, 4, 20), drawn(21, 3, 4, 20), drawn(22, 3, 4, 20)],
    'd': [drawn(14, 5, 10, 6), drawn(3, 18, 10, 4)],
    'T': [drawn(1, 4, 3, 20)],
}


@pytest.fixture
def small_emnist(tmp_path):
    "The classes of `BARS` in EMNIST's files: transposed, light ink on dark, classes mixed."
    raw = tmp_path / 'EMNIST' / 'raw'
    raw.mkdir(parents=True)
    pairs = [(EMNIST_CLASSES.index(c), image) for c, images in BARS.items() for image in images]
    order = [5, 0, 7, 2, 3, 1, 6, 4]
    assert [pairs[i][0] for i in order] != sorted(label for label, _ in pairs)
    images = np.stack([255 - pairs[i][1].T for i in order])
    labels = np.array([pairs[i][0] for i in order])
    idx(raw / 'emnist-byclass-test-images-idx3-ubyte', images)
    idx(raw / 'emnist-byclass-test-labels-idx1-ubyte', labels)
    return tmp_path, [pairs[i] for i in order]


def in_file_order(pairs, c):
    "The upright images of a class, in the order of the file."
    return [image for label, image in pairs if EMNIST_CLASSES[label] == c]


def test_emnist_is_turned_upright_and_has_dark_ink(small_emnist, own_cache):
    "What the loader gives is what a person saw, pixel for pixel."
    root, pairs = small_emnist
    banks = [emnist(split, root=root, download=False) for split in ('val', 'test')]
    found = {c: bank for bank in banks for c in bank.classes}
    assert len(found) == 62
    for c in EMNIST_CLASSES:
        wanted = in_file_order(pairs, c)
        assert len(found[c][c]) == len(wanted)
        for image, upright in zip(found[c][c], wanted):
            assert np.array_equal(image[0], upright), c


def test_emnist_inverted_resized_and_in_three_channels(small_emnist, own_cache):
    root, pairs = small_emnist
    plain = emnist('test', root=root, download=False)
    light = emnist('test', root=root, download=False, invert=True)
    assert torch.equal(light.images, 255 - plain.images)
    three = emnist('test', root=root, download=False, channels=3)
    assert torch.equal(three['L'], plain['L'].repeat(1, 3, 1, 1))
    wide = emnist('test', root=root, download=False, size=14, resize='box')
    upright = in_file_order(pairs, 'L')[0].reshape(14, 2, 14, 2).mean((1, 3))
    assert np.abs(wide['L'][0, 0].numpy() - upright).max() <= 1


def test_emnist_classes_of_a_split(small_emnist, own_cache):
    root, _ = small_emnist
    assert emnist('val', root=root, download=False).classes == EMNIST_CLASSES[0::2]
    assert emnist('test', root=root, download=False).classes == EMNIST_CLASSES[1::2]


def test_emnist_with_another_number_of_labels(small_emnist, own_cache):
    root, _ = small_emnist
    idx(root / 'EMNIST' / 'raw' / 'emnist-byclass-test-labels-idx1-ubyte', np.zeros(7))
    with pytest.raises(BadImage, match='8 images but 7 labels'):
        emnist(root=root, download=False)


def test_idx_truncated(small_emnist, own_cache):
    root, _ = small_emnist
    file = root / 'EMNIST' / 'raw' / 'emnist-byclass-test-images-idx3-ubyte'
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(BadImage, match='images-idx3-ubyte: not a whole IDX file'):
        emnist(root=root)
    assert not list(own_cache.rglob('*.safetensors'))


# ---- bad input
TRAIN_VAL_TEST = "split='validation'.*choose one of 'train', 'val', 'test'"
BAD_CALLS = [
    (omniglot, dict(split='validation'), TRAIN_VAL_TEST),
    (omniglot, dict(protocol='mine'), "protocol='mine'"),
    (emnist, dict(split='train'), "split='train'.*'val', 'test'"),
    (mini_imagenet, dict(split='novel'), "split='novel'"),
    (cub, dict(split='train'), "split='train'.*'base'"),
    (glyphs, dict(split='x'), "split='x'"),
    (load_data, dict(name='svhn', split='train'), "data='svhn'"),
    (load_data, dict(name='cub', split='base', channels=1), "channels=1: the loader of 'cub'"),
    (load_data, dict(name='glyphs', split='test', size=-1), 'size=-1: expected a whole number'),
    (glyphs, dict(size=2), 'size=2: expected a whole number of at least 8'),
    (omniglot, dict(size=-4), 'size=-4'),
    (omniglot, dict(channels=2), 'channels=2: expected 1 .grey. or 3'),
    (emnist, dict(margin=0.5), 'margin=0.5: expected at least 1'),
    (mini_imagenet, dict(resize='sharp'), "resize='sharp'"),
    (cub, dict(size=0), 'size=0'),
    (image_folder, dict(path='.', channels=4), 'channels=4'),
]


@pytest.mark.parametrize('load,arguments,words', BAD_CALLS)
def test_unknown_names_list_the_known(load, arguments, words):
    with pytest.raises(ValueError, match=words):
        load(**arguments)


ABSENT = [
    (omniglot, dict(download=False), 'omniglot-py'),
    (emnist, dict(download=False), 'EMNIST/raw'),
    (mini_imagenet, {}, 'mini-imagenet'),
    (cub, {}, 'CUB_200_2011'),
    (cifar_fs, dict(download=False), 'cifar-fs'),
    (fc100, dict(download=False), 'fc100'),
    (tiered_imagenet, {}, 'tiered-imagenet'),
]


@pytest.mark.parametrize('load,arguments,place', ABSENT)
def test_missing_data_says_where_and_how(load, arguments, place, tmp_path):
    with pytest.raises(DataMissing) as e:
        load(root=tmp_path, **arguments)
    assert str(tmp_path) in str(e.value)
    assert place in str(e.value)
    assert 'To get it' in str(e.value)


LOAD_OMNIGLOT = '''
import sys, warnings
warnings.simplefilter("ignore")
from fewshotmeta.all import *
try:
    omniglot(root=sys.argv[1])
except DataMissing as e:
    print("MISSING", e)
'''


def test_failed_download_is_data_missing(tmp_path):
    nowhere = 'http://127.0.0.1:9'
    proxies = dict(https_proxy=nowhere, http_proxy=nowhere, no_proxy='')
    out = forks.run(LOAD_OMNIGLOT, tmp_path, **proxies).stdout
    assert 'MISSING omniglot is not under' in out
    assert 'fewshotmeta data --get omniglot' in out


def test_status_tells_what_is_there(small_emnist):
    root, _ = small_emnist
    found = {row['name']: row['found'] for row in data_status(root)}
    assert {name for name, there in found.items() if there} == {'glyphs', 'emnist'}
    assert found.keys() == DATASETS.keys()


# ---- the cache
def test_bad_cached_bank_is_rebuilt(own_cache):
    digest = glyphs('val').digest
    (path,) = own_cache.rglob('*.safetensors')
    whole = path.read_bytes()
    one_bit = whole[:-3] + bytes([whole[-3] ^ 4]) + whole[-2:]
    for bad in (whole[:1000], whole[:-1], b'', one_bit, b'\x80\x04pickle'):
        path.write_bytes(bad)
        with pytest.warns(UserWarning, match='building it anew'):
            assert glyphs('val').digest == digest
        assert path.read_bytes() == whole
    foreign = {'images': torch.zeros(1, 1, 8, 8, dtype=torch.uint8)}
    save_file(foreign, path)
    with pytest.warns(UserWarning, match='not a bank of this version'):
        assert glyphs('val').digest == digest


def test_cache_that_cannot_be_written_costs_only_the_caching(tmp_path, monkeypatch):
    (tmp_path / 'file').write_text('')
    monkeypatch.setenv('FEWSHOTMETA_CACHE', str(tmp_path / 'file' / 'cache'))
    with pytest.warns(UserWarning, match='bank not cached'):
        assert len(glyphs('val')) == 154


def test_full_disk(small_disk, monkeypatch):
    monkeypatch.setenv('FEWSHOTMETA_CACHE', str(small_disk))
    with pytest.warns(UserWarning, match='bank not cached'):
        assert len(glyphs('val')) == 154
    stored = [p for p in small_disk.rglob('*') if p.is_file() and p.stat().st_size]
    assert not stored  # an empty lock may stay


# ---- banks
def test_rotations_are_family_members(noise_bank):
    turned = noise_bank.rotated()
    assert len(turned) == 160 and turned.n_families == 40
    assert turned.select(noise_bank.classes).digest == noise_bank.digest
    assert torch.equal(turned['class03@180'], torch.rot90(noise_bank['class03'], 2, (2, 3)))


def test_digest_sees_pixels_names_and_families(noise_bank):
    start, count, classes = noise_bank.start, noise_bank.count, noise_bank.classes
    images = noise_bank.images.clone()
    assert ImageBank(images, start, count, classes).digest == noise_bank.digest
    images[999, 0, 15, 15] ^= 1
    changed = ImageBank(images, start, count, classes)
    renamed = ImageBank(noise_bank.images, start, count, ['x', *classes[1:]])
    family = ImageBank(noise_bank.images, start, count, classes, [0, 0, *range(1, 39)])
    assert len({bank.digest for bank in (noise_bank, changed, renamed, family)}) == 4


@pytest.mark.parametrize('quarter', [1, 2, 3])
def test_each_rotation_is_what_it_says(noise_bank, quarter):
    turned, angle = noise_bank.rotated(), 90 * quarter
    expected = torch.rot90(noise_bank['class03'], quarter, (2, 3))
    assert torch.equal(turned[f'class03@{angle}'], expected)
    facts = turned.count, turned.family, turned.digests, set(turned.digests)
    assert [len(fact) for fact in facts] == [160] * 4


def test_what_a_bank_says_of_itself(noise_bank):
    said = f'1,000 images of 1×16×16, {noise_bank.digest}'
    assert repr(noise_bank) == f'noise: 40 classes, {said}'
    assert repr(noise_bank.rotated()).startswith('noise: 160 classes in 40 families, 4,000 images')


def test_banks_that_are_made_of_a_bank(noise_bank):
    "They keep its name and how it was read, and the digests of what they have unchanged."
    facts = noise_bank.start, noise_bank.count, noise_bank.classes
    reading, own = dict(resize=(16, 16)), [f'digest {i}' for i in range(40)]
    bank = ImageBank(noise_bank.images, *facts, name='x', digests=own, reading=reading)
    colours, few = bank.with_channels(3), bank.select([7, 3], 'few')
    assert colours[3].shape == (25, 3, 16, 16)
    assert torch.equal(colours[3], bank[3].expand(-1, 3, -1, -1))
    assert bank.with_channels(1) is bank
    assert (few.name, few.digests, few.classes) == ('few', [own[7], own[3]], ['class07', 'class03'])
    assert len(bank.select([])) == 0
    for made in (few.to('cpu'), colours, bank.rotated(), bank.select(['class03'])):
        assert made.reading == reading
        assert made.name == ('few' if len(made) == 2 else 'x')


MADE_FROM = dict(set='noise', source='a', resize=[16, 16])


def test_a_bank_in_a_file(noise_bank, tmp_path):
    "It comes back with how it was read, whatever it is asked for or nothing; it says what differs."
    path = tmp_path / 'x.safetensors'
    save_bank(noise_bank, path, MADE_FROM)
    for made_from in (None, MADE_FROM):
        bank = load_bank(path, made_from)
        assert (bank.digest, bank.reading) == (noise_bank.digest, dict(resize=[16, 16]))
    others = {
        'the files that it was made from have changed': MADE_FROM | dict(source='b'),
        r'else \(resize=\[16, 16\], wanted \[8, 8\]\)': MADE_FROM | dict(resize=[8, 8]),
        r'else \(margin=None, wanted 2\)': MADE_FROM | dict(margin=2),
    }
    for words, other in others.items():
        with pytest.raises(BadBank, match=words):
            load_bank(path, other)
    with pytest.raises(BadBank, match=r"else \(resize=\[16, 16\], wanted None\)"):
        load_bank(path, dict(set='noise', source='a'))


def test_a_bank_of_other_numbers_is_refused(noise_bank, tmp_path):
    images = noise_bank.images.float()
    bank = ImageBank(images, noise_bank.start, noise_bank.count, noise_bank.classes)
    save_bank(bank, tmp_path / 'x', {})
    with pytest.raises(BadBank, match='images of 40 classes are not what was stored'):
        load_bank(tmp_path / 'x')


def test_a_header_that_was_altered_or_is_no_json(noise_bank, tmp_path):
    save_bank(noise_bank, tmp_path / 'x', {})
    altered = (tmp_path / 'x').read_bytes().replace(b'class07', b'class70')
    (tmp_path / 'x').write_bytes(altered)
    with pytest.raises(BadBank, match='its header: its content is not what was stored'):
        load_bank(tmp_path / 'x')
    save_file({'images': noise_bank.images}, tmp_path / 'x', metadata=dict(bank='{'))
    with pytest.raises(BadBank, match='x is not a whole bank'):
        load_bank(tmp_path / 'x')


def test_a_bank_that_another_process_builds_is_waited_for(noise_bank, own_cache):
    made_from = dict(set='noise', size=8)
    found = []

    def take():
        found.append(cached(made_from, None))  # nothing to build it with

    cached(made_from, lambda: noise_bank)
    (path,) = (own_cache / 'banks').glob('*.safetensors')
    assert re.fullmatch('noise-[0-9a-f]{10}.safetensors', path.name)  # as in earlier versions
    whole = path.read_bytes()
    path.unlink()
    with locked(path.with_suffix('.lock')):
        other = threading.Thread(target=take)
        other.start()
        time.sleep(0.2)
        path.write_bytes(whole)
    other.join(10)
    assert found[0].digest == noise_bank.digest


def test_a_bank_is_built_once_and_without_a_word(noise_bank, own_cache, recwarn):
    built = []

    def build():
        built.append(1)
        return noise_bank

    for made_from in (MADE_FROM, dict(reversed(MADE_FROM.items()))):
        assert cached(made_from, build).digest == noise_bank.digest
    assert (len(built), len(recwarn)) == (1, 0)


def test_a_bank_that_cannot_be_written(noise_bank, small_disk):
    with pytest.raises(OSError, match='no space left') as full:
        save_bank(noise_bank.rotated(), small_disk / 'x', {})
    assert full.value.errno == errno.ENOSPC
    unknown = as_os_error(ValueError('broken'), small_disk / 'x')
    assert (unknown.errno, unknown.strerror[-6:]) == (errno.EIO, 'broken')


def test_a_class_that_is_not_there(noise_bank):
    with pytest.raises(ValueError, match="no class 'zebra'"):
        noise_bank.select(['zebra'])


# the banks and test tasks of every published number: a change of these must be meant
DIGESTS = dict(train='0c3e7ac497610122', val='bf359801b1fd9354', test='28f2f7e22521e39a')
TASKS = dict(train='039a39a2774c819a', val='c53c1e0a350a22f1', test='e5e473274efa7bd5')
DRAWN_BY = 'matplotlib 3.11.2, FreeType 2.14.3'


@pytest.mark.parametrize('split', DIGESTS)
def test_glyphs_are_pinned(split):
    "The same pixels and tasks as ever, where the same versions draw."
    from fewshotmeta.data.glyphs import _renderer

    if _renderer() != DRAWN_BY:
        pytest.skip(f'drawn by {_renderer()}, pinned for {DRAWN_BY}')
    bank = glyphs(split)
    assert bank.digest == DIGESTS[split]
    assert EpisodeSampler(bank, 5, 1, 3).digest() == TASKS[split]


# ---- real data
def test_real_omniglot_sizes(real_data):
    bank = omniglot('train')
    assert len(bank) == 4600
    assert bank.n_families == 1150
    assert int(bank.count.sum()) == 92_000
    turned = omniglot('test', rotate=True)
    assert turned.n_families == 423
    assert len(turned) == 4 * 423
    halves = [omniglot(half, protocol='lake2015') for half in ('background', 'evaluation')]
    assert sum(map(len, halves)) == 1623


def test_real_omniglot_splits_share_no_class(real_data):
    train, val, test = (omniglot(split) for split in ('train', 'val', 'test'))
    assert (len(val), len(test)) == (50, 423)
    upright = {c.split('@')[0] for c in train.classes}
    assert not upright & set(val.classes)
    assert not upright & set(test.classes)
    assert not set(val.classes) & set(test.classes)


def test_real_omniglot_pixels(real_data):
    bank = omniglot('train')
    assert set(np.unique(bank.images[:200])) == {0, 255}  # nearest keeps it binary
    assert bank.images.float().mean() > 127  # dark ink on light paper
    assert torch.equal(255 - bank.images[:50], omniglot('train', invert=True).images[:50])


def test_real_emnist_is_upright_and_of_omniglots_polarity(real_data):
    "T17. A letter L has its ink in the lower left; transposed it would be in the upper right."
    bank, val = emnist('test'), emnist('val')
    letters = {c: b for b in (bank, val) for c in b.classes}

    def ink(c):
        return 255 - letters[c][c].float().mean(0)[0]

    L, T = ink('L'), ink('T')
    assert L[14:, :].sum() > L[:14, :].sum()
    assert L[:, :14].sum() > L[:, 14:].sum()
    assert L[20:, 14:20].mean() > 3 * L[2:8, 18:24].mean()  # the foot is below, nothing above right
    assert T[:10].sum() > T[18:].sum()  # the bar of T is on top
    assert bank.images.float().mean() > 127
    assert (len(bank), len(val)) == (31, 31)


MEASURE_MINI_IMAGENET = '''
import resource
from fewshotmeta.all import *
banks = [mini_imagenet(split) for split in ("train", "val", "test")]
print(*map(len, banks))
print(sum(int(bank.count.sum()) for bank in banks))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
'''


@pytest.fixture
def fresh_cache():
    "An empty cache folder; the banks that are built there go to the usual one, for other tests."
    usual = cache_folder() / 'banks'
    usual.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=usual.parent) as folder:
        yield folder
        for bank in Path(folder).rglob('*.safetensors'):
            os.replace(bank, usual / bank.name)


@pytest.mark.xdist_group('mini_imagenet')
def test_real_mini_imagenet_builds_in_little_memory(real_data, fresh_cache):
    "60,000 JPEGs, behind a progress bar; the peak is that of the largest split and a copy."
    out = forks.run(MEASURE_MINI_IMAGENET, FEWSHOTMETA_CACHE=fresh_cache)
    assert not out.returncode, out.stderr[-2000:]
    classes, images, gigabytes = out.stdout.splitlines()
    assert classes == '64 16 20'
    assert images == '60000'
    assert float(gigabytes) < 3, gigabytes
    assert 'building mini_imagenet train' in out.stderr


@pytest.mark.xdist_group('mini_imagenet')
def test_real_mini_imagenet_has_seven_twins(real_data):
    banks = {split: mini_imagenet(split, root=real_data) for split in ('train', 'val', 'test')}
    pairs = {split: twins(banks[split], banks['train']) for split in ('val', 'test')}
    assert len(pairs['val']) == 6
    assert pairs['test'] == [(('n03127925', 114), ('n02795169', 312))]
    assert not twins(banks['val'], banks['test'])
    for split, found in pairs.items():
        rest = mini_imagenet(split, root=real_data, leave_out_twins=True)
        assert rest.count.sum() == banks[split].count.sum() - len(found)


@pytest.mark.xdist_group('mini_imagenet')
def test_real_mini_imagenet_augmented(real_data):
    bank = mini_imagenet('val', root=real_data)
    ep = EpisodeSampler(bank, 5, 1, 2, augment=CloserLook())[0:2]
    assert ep.xs.shape == (2, 5, 3, 84, 84)
    assert ep.xs.min() >= 0
    assert ep.xs.max() <= 1
    assert ep.xs.std() > 0.05
