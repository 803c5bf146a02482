"""Banks: what they hold, what they refuse, and that a bad file is never used."""

import os, subprocess, sys
import numpy as np, pytest, torch
from PIL import Image
from safetensors.torch import save_file
from fewshotmeta.all import *


def write_images(folder, n=3, size=(30, 20), mode='RGB', seed=0):
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for i in range(n):
        Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), np.uint8)).convert(mode).save(
            folder / f'{i}.png'
        )


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
def test_modes_and_transparency(tmp_path):
    rgba = Image.new('RGBA', (10, 10), (255, 0, 0, 0))
    rgba.save(tmp_path / 'clear.png')
    from fewshotmeta.data.banks import read_image

    assert read_image(tmp_path / 'clear.png', 10, 3).min() == 255  # transparent is white
    for mode in ('1', 'L', 'P', 'LA', 'RGB', 'RGBA', 'CMYK'):
        f = tmp_path / f'{mode}.{"tif" if mode == "CMYK" else "png"}'
        Image.fromarray(np.full((40, 60, 3), 77, np.uint8)).convert(mode).save(f)
        assert read_image(f, 28, 3).shape == (3, 28, 28) and read_image(f, 28, 1).shape == (
            1,
            28,
            28,
        )
    Image.fromarray(np.zeros((9, 9), np.uint16)).save(tmp_path / 'deep.png')
    with pytest.raises(BadImage, match='convert it to 8 bit'):
        read_image(tmp_path / 'deep.png', 9)


def test_crop_squash_and_orientation(tmp_path):
    from fewshotmeta.data.banks import read_image

    wide = np.zeros((40, 80), np.uint8)
    wide[:, :20] = wide[:, 60:] = 255  # white ends, black middle
    Image.fromarray(wide).save(tmp_path / 'wide.png')
    assert read_image(tmp_path / 'wide.png', 20).max() == 0 and read_image(
        tmp_path / 'wide.png', 20, squash=True
    ).mean() == pytest.approx(127.5)
    upright = Image.fromarray(wide[:, :60])
    exif = Image.Exif()
    exif[0x112] = 6  # a phone held upright
    upright.save(tmp_path / 'phone.jpg', exif=exif)
    turned = read_image(tmp_path / 'phone.jpg', 60, squash=True)
    assert turned[0, :15].mean() > 200 and turned[0, 30:].mean() < 60
    (tmp_path / 'bad.pgm').write_bytes(b'P5 3 x 255 abc')
    with pytest.raises(BadImage, match='bad.pgm'):
        read_image(tmp_path / 'bad.pgm', 8)


def test_resize_filter_is_what_it_says(tmp_path):
    from fewshotmeta.data.banks import read_image

    rng = np.random.default_rng(0)
    Image.fromarray(rng.random((105, 105)) > 0.5).save(tmp_path / 'bits.png')
    assert set(np.unique(read_image(tmp_path / 'bits.png', 28, resize='nearest'))) <= {0, 255}
    assert (
        len(np.unique(read_image(tmp_path / 'bits.png', 28, resize='lanczos'))) > 50
    )  # not silently nearest
    a, b = (read_image(tmp_path / 'bits.png', 28, invert=i) for i in (False, True))
    assert (a.astype(int) + b == 255).all()


def test_image_folder_of_a_stranger(tmp_path, own_cache):
    for i, (c, mode) in enumerate(dict(cats='RGB', dogs='L', fish='P', fowl='RGBA').items()):
        write_images(tmp_path / 'own' / c, mode=mode, size=(20 + 9 * i, 50 - 7 * i), seed=i)
    bank = image_folder(tmp_path / 'own', size=24)
    assert (
        bank.classes == ['cats', 'dogs', 'fish', 'fowl']
        and bank.count.tolist() == [3] * 4
        and bank.images.shape[1:] == (3, 24, 24)
    )
    (tmp_path / 'own' / 'dogs' / '9.jpg').write_bytes(b'\xff\xd8broken')
    (tmp_path / 'own' / 'fish' / 'notes.txt').write_text('not an image')
    with (
        pytest.warns(UserWarning),
        pytest.raises(
            BadImage, match=r'1 of 13 files cannot be used, nothing was written:\n.*dogs/9.jpg'
        ),
    ):
        image_folder(tmp_path / 'own', size=24)
    assert len(list(own_cache.rglob('*.safetensors'))) == 1  # only the first bank
    with pytest.warns(UserWarning, match='9.jpg'):
        assert image_folder(tmp_path / 'own', size=24, skip_unreadable=True).count.sum() == 12
    (tmp_path / 'own' / 'dogs' / '9.jpg').unlink()
    write_images(tmp_path / 'own' / 'dogs', n=5)  # a changed folder is noticed
    with pytest.warns(UserWarning, match='files that it was made from have changed'):
        assert image_folder(tmp_path / 'own', size=24).count.tolist() == [3, 5, 3, 3]


@pytest.mark.parametrize('what', ['truncated', 'wrong size', 'text'])
def test_omniglot_bad_file_is_named_and_no_bank_written(tmp_path, own_cache, what):
    for part, alphabets in dict(background=['A'], evaluation=['B']).items():
        for a in alphabets:
            write_images(
                tmp_path / 'omniglot-py' / f'images_{part}' / a / 'character01',
                size=(105, 105),
                mode='1',
            )
    bad = tmp_path / 'omniglot-py' / 'images_background' / 'A' / 'character01' / '1.png'
    if what == 'truncated':
        bad.write_bytes(bad.read_bytes()[:60])
    elif what == 'text':
        bad.write_text('x')
    else:
        Image.new('1', (28, 28)).save(bad)
    from fewshotmeta.data.datasets import _omniglot_files
    from fewshotmeta.data.banks import images_in, build_bank

    _, folders = _omniglot_files(tmp_path)
    with pytest.raises(BadImage, match='character01/1.png'):
        build_bank(
            {c: images_in(f) for c, f in folders.items()}, 28, 1, 'omniglot', expect=(105, 105)
        )
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


def test_mini_imagenet_both_layouts(tmp_path, own_cache):
    a, b = tmp_path / 'csv', tmp_path / 'folders'
    rows = ['filename,label']
    for i, c in enumerate(splits('mini_imagenet')['test']):
        write_images(b / 'mini-imagenet' / 'test' / c, n=2, size=(84, 84), seed=i)
        (a / 'mini-imagenet' / 'images').mkdir(parents=True, exist_ok=True)
        for j in range(2):
            (a / 'mini-imagenet' / 'images' / f'{c}_{j}.png').write_bytes(
                (b / 'mini-imagenet' / 'test' / c / f'{j}.png').read_bytes()
            )
            rows.append(f'{c}_{j}.png,{c}')
    (a / 'mini-imagenet' / 'test.csv').write_text('\n'.join(rows))
    assert mini_imagenet('test', root=a).digest == mini_imagenet('test', root=b).digest
    (a / 'mini-imagenet' / 'test.csv').write_text('\n'.join(rows[:-2]))
    os.utime(a / 'mini-imagenet' / 'test.csv', (1, 1))
    with pytest.warns(UserWarning), pytest.raises(DataMissing, match='1 classes differ'):
        mini_imagenet('test', root=a)


# ---- bad input
@pytest.mark.parametrize(
    'call,words',
    [
        (
            lambda: omniglot('validation'),
            "split='validation'.*choose one of 'train', 'val', 'test'",
        ),
        (lambda: omniglot(protocol='mine'), "protocol='mine'"),
        (lambda: emnist('train'), "split='train'.*'val', 'test'"),
        (lambda: mini_imagenet('novel'), "split='novel'"),
        (lambda: cub('train'), "split='train'.*'base'"),
        (lambda: glyphs('x'), "split='x'"),
        (lambda: load_data('svhn', 'train'), "data='svhn'"),
        (lambda: glyphs(size=2), 'size=2: expected a whole number of at least 8'),
        (lambda: omniglot(size=-4), 'size=-4'),
        (lambda: omniglot(channels=2), 'channels=2: 1 .grey. or 3'),
        (lambda: emnist(margin=0.5), 'margin=0.5: at least 1'),
        (lambda: mini_imagenet(resize='sharp'), "resize='sharp'"),
        (lambda: cub(size=0), 'size=0'),
        (lambda: image_folder('.', channels=4), 'channels=4'),
    ],
)
def test_unknown_names_list_the_known(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize(
    'load,place',
    [
        (lambda r: omniglot(root=r, download=False), 'omniglot-py'),
        (lambda r: emnist(root=r, download=False), 'EMNIST/raw'),
        (lambda r: mini_imagenet(root=r), 'mini-imagenet'),
        (lambda r: cub(root=r), 'CUB_200_2011'),
    ],
)
def test_missing_data_says_where_and_how(load, place, tmp_path):
    with pytest.raises(DataMissing) as e:
        load(tmp_path)
    assert str(tmp_path) in str(e.value) and place in str(e.value) and 'To get it' in str(e.value)


def test_failed_download_is_data_missing(tmp_path):
    code = f'import warnings; warnings.simplefilter("ignore")\nfrom fewshotmeta.all import *\ntry: omniglot(root={str(tmp_path)!r})\nexcept DataMissing as e: print("MISSING", e)'
    env = os.environ | dict(
        https_proxy='http://127.0.0.1:9', http_proxy='http://127.0.0.1:9', no_proxy=''
    )
    out = subprocess.run(
        [sys.executable, '-c', code], env=env, capture_output=True, text=True
    ).stdout
    assert 'MISSING omniglot is not under' in out and 'fewshotmeta data --get omniglot' in out


def test_idx_truncated(tmp_path, own_cache):
    raw = tmp_path / 'EMNIST' / 'raw'
    raw.mkdir(parents=True)
    (raw / 'emnist-byclass-test-images-idx3-ubyte').write_bytes(
        bytes([0, 0, 8, 3]) + (2).to_bytes(4, 'big') + (28).to_bytes(4, 'big') * 2 + bytes(100)
    )
    (raw / 'emnist-byclass-test-labels-idx1-ubyte').write_bytes(
        bytes([0, 0, 8, 1]) + (2).to_bytes(4, 'big') + bytes(2)
    )
    with pytest.raises(BadImage, match='images-idx3-ubyte: not a whole IDX file'):
        emnist(root=tmp_path)
    assert not list(own_cache.rglob('*.safetensors'))


# ---- the cache
def test_bad_cached_bank_is_rebuilt(own_cache):
    digest = glyphs('val').digest
    (path,) = own_cache.rglob('*.safetensors')
    whole = path.read_bytes()
    for bad in (
        whole[:1000],
        whole[:-1],
        b'',
        whole[:-3] + bytes([whole[-3] ^ 4]) + whole[-2:],
        b'\x80\x04pickle',
    ):
        path.write_bytes(bad)
        with pytest.warns(UserWarning, match='building it anew'):
            assert glyphs('val').digest == digest
        assert path.read_bytes() == whole
    save_file(
        {'images': torch.zeros(1, 1, 8, 8, dtype=torch.uint8)}, path
    )  # somebody else's safetensors
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
    assert not [
        p for p in small_disk.rglob('*') if p.is_file() and p.stat().st_size
    ]  # an empty lock may stay


# ---- banks
def test_rotations_are_family_members(noise_bank):
    turned = noise_bank.rotated()
    assert len(turned) == 160 and turned.n_families == 40
    assert turned.select(noise_bank.classes).digest == noise_bank.digest
    assert torch.equal(turned['class03@180'], torch.rot90(noise_bank['class03'], 2, (2, 3)))


def test_digest_sees_pixels_names_and_families(noise_bank):
    other = ImageBank(
        noise_bank.images.clone(), noise_bank.start, noise_bank.count, noise_bank.classes
    )
    assert other.digest == noise_bank.digest
    other.images[999, 0, 15, 15] ^= 1
    changed = ImageBank(other.images, noise_bank.start, noise_bank.count, noise_bank.classes)
    renamed = ImageBank(
        noise_bank.images, noise_bank.start, noise_bank.count, ['x', *noise_bank.classes[1:]]
    )
    family = ImageBank(
        noise_bank.images,
        noise_bank.start,
        noise_bank.count,
        noise_bank.classes,
        [0, 0, *range(1, 39)],
    )
    assert len({b.digest for b in (noise_bank, changed, renamed, family)}) == 4
    with pytest.raises(ValueError, match="no class 'zebra'"):
        noise_bank.select(['zebra'])


# ---- real data
def test_real_omniglot(real_data):
    bank = omniglot('train')
    assert len(bank) == 4600 and bank.n_families == 1150 and int(bank.count.sum()) == 92_000
    val, test = omniglot('val'), omniglot('test')
    assert (len(val), len(test)) == (50, 423) and not {c.split('@')[0] for c in bank.classes} & set(
        val.classes
    ) | set(val.classes) & set(test.classes)
    assert (
        omniglot('test', rotate=True).n_families == 423
        and len(omniglot('test', rotate=True)) == 4 * 423
    )
    assert set(np.unique(bank.images[:200])) == {0, 255}  # nearest keeps it binary
    assert bank.images.float().mean() > 127  # dark ink on light paper
    assert torch.equal(255 - bank.images[:50], omniglot('train', invert=True).images[:50])
    assert (
        len(omniglot('background', protocol='lake2015'))
        + len(omniglot('evaluation', protocol='lake2015'))
        == 1623
    )


def test_real_emnist_is_upright_and_of_omniglots_polarity(real_data):
    "T17. A letter L has its ink in the lower left; transposed it would be in the upper right. A 7 is the opposite."
    bank = emnist("test")
    val = emnist('val')
    letters = {c: b for b in (bank, val) for c in b.classes}

    def ink(c):
        return 255 - letters[c][c].float().mean(0)[0]

    L, T = ink('L'), ink('T')
    assert L[14:, :].sum() > L[:14, :].sum() and L[:, :14].sum() > L[:, 14:].sum()
    assert L[20:, 14:20].mean() > 3 * L[2:8, 18:24].mean()  # the foot is below, nothing above right
    assert T[:10].sum() > T[18:].sum()  # the bar of T is on top
    assert bank.images.float().mean() > 127 and (len(bank), len(val)) == (31, 31)


def test_real_mini_imagenet_builds_in_little_memory(real_data, tmp_path):
    "60,000 JPEGs, behind a progress bar; the peak is that of the largest split and a copy."
    code = (
        'import resource, sys\nfrom fewshotmeta.all import *\n'
        'n = [mini_imagenet(s) for s in ("train", "val", "test")]\n'
        'print([len(b) for b in n], sum(int(b.count.sum()) for b in n), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/2**20)'
    )
    out = subprocess.run(
        [sys.executable, '-c', code],
        env=os.environ | dict(FEWSHOTMETA_CACHE=str(tmp_path)),
        capture_output=True,
        text=True,
    )
    sizes, rest = out.stdout.split(']')
    assert sizes == '[64, 16, 20' and rest.split()[0] == '60000', out.stderr[-2000:]
    assert float(rest.split()[1]) < 3, rest
    assert 'building mini_imagenet train' in out.stderr
    import shutil

    shutil.rmtree(tmp_path / 'banks')
