"""Folders of images and tables of file names as they come: a bank of what is there, or an error.

Each test tries some hundred altered folders here, and 20,000 with `make fuzz`.
"""

import io
import os
import struct
import warnings
import zlib

import numpy as np
import pytest
from fuzzing import STRANGE, circle, folder, no_hang, nowhere, often, pipe, put, spoilt
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from fewshotmeta.data.banks import splits
from fewshotmeta.data.images import IMAGE_SUFFIXES, BadImage, DataMissing, image_folder
from fewshotmeta.data.mini_imagenet import mini_imagenet

# ---- images
PIXELS = np.random.default_rng(0).integers(0, 256, (9, 12), np.uint8)


def image_bytes(mode='L', form='PNG', more=(), **options):
    "A small image of a mode, as a file of a format has it."
    image = Image.fromarray(PIXELS)
    image = Image.fromarray(PIXELS.astype(np.uint16)) if mode == 'I;16' else image.convert(mode)
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def declared(width, height):
    "A PNG of a few bytes that says it is so large."
    whole = image_bytes()
    head = b'IHDR' + struct.pack('>II', width, height) + whole[24:29]
    return whole[:12] + head + struct.pack('>I', zlib.crc32(head)) + whole[33:]


def moving(form):
    "An animation of two frames."
    frames = [Image.fromarray(PIXELS), Image.fromarray(255 - PIXELS)]
    file = io.BytesIO()
    frames[0].save(file, form, save_all=True, append_images=frames[1:])
    return file.getvalue()


IMAGES = [image_bytes(mode) for mode in ('1', 'L', 'LA', 'P', 'RGB', 'RGBA', 'I;16')]
IMAGES += [image_bytes(mode, 'JPEG') for mode in ('L', 'RGB', 'CMYK')]
IMAGES += [image_bytes(mode, 'TIFF') for mode in ('1', 'L', 'P', 'RGB', 'CMYK', 'F', 'LAB')]
IMAGES += [image_bytes('RGB', form) for form in ('BMP', 'WEBP', 'PPM', 'GIF')]
IMAGES += [moving(form) for form in ('GIF', 'WEBP', 'PNG', 'TIFF')]
IMAGES += [image_bytes('P', 'PNG', transparency=3), image_bytes(exif=b'Exif\0\0MM\0*\0\0\0\x08')]
IMAGES += [declared(60_000, 60_000), declared(2**31 - 1, 1), declared(0, 5), declared(1, 3000)]
images = st.sampled_from(IMAGES)
CLASSES = ('cats', 'dogs', 'cats.png', '.hidden', 'é', '\udcfe', 'a\nb', 'a|b', ' ', '-x', '%s')
NAMES = ('a.png', 'b.PNG', 'c.jpg', 'd.TiFF', 'e.webp', '.f.png', 'g.txt', 'h.heic', '.png')
NAMES += ('noext', 'i.png.txt', 'é.gif', '\udcff.bmp', 'a b.ppm', 'x\n.png', '{0}.png', '-.png')
NAMES += ('x' * 200 + '.png', 'y' * 200, 'Thumbs.db')


def up(path):
    "A link to the folder of the folder that it lies in."
    path.symlink_to('..')


contents = images | images | images.flatmap(spoilt) | st.just(b'') | st.sampled_from([*STRANGE, up])
inside = st.tuples(st.sampled_from(CLASSES[:3]) | st.sampled_from(CLASSES), st.sampled_from(NAMES))
beside = st.tuples(st.just('.'), st.sampled_from([*NAMES, *CLASSES]))
trees = st.dictionaries(inside | inside | inside | beside, contents, min_size=1, max_size=7)


def plant(root, tree):
    "Make the folders and files of a tree, as far as its names do not clash."
    for (own, name), content in tree.items():
        place = root / own
        if os.path.lexists(place) and not place.is_dir():
            continue
        place.mkdir(parents=True, exist_ok=True)
        if not os.path.lexists(place / name):
            put(place / name, content)


def is_image(path):
    return path.lower().endswith(IMAGE_SUFFIXES) and os.path.isfile(path)


def shown(path):
    "The paths in a folder that are not hidden."
    names = os.listdir(path)
    return [os.path.join(path, name) for name in sorted(names) if not name.startswith('.')]


def look(root):
    "The images of each class, and whether there is anything else."
    classes, others = {}, False
    for path in shown(root):
        files = shown(path) if os.path.isdir(path) else []
        found = [file for file in files if is_image(file)]
        others = others or not found or len(found) < len(files)
        if found:
            classes[os.path.basename(path)] = len(found)
    return classes, others


def read(root, **options):
    "A bank of a folder, and what was said of that it lacks."
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        bank = image_folder(root, size=8, **options)
    texts = [str(one.message) for one in caught if one.category is UserWarning]
    return bank, [text for text in texts if 'not everything is in the bank' in text]


@pytest.fixture(scope='module', autouse=True)
def cache():
    "The variable that says where banks are kept, as it was."
    before = os.environ.get('FEWSHOTMETA_CACHE')
    yield
    os.environ.pop('FEWSHOTMETA_CACHE')
    if before is not None:
        os.environ['FEWSHOTMETA_CACHE'] = before


CUT = IMAGES[20][:-9]  # a GIF that ends where its second frame would begin


@often
@example({('cats', 'a.png'): IMAGES[0], ('cats', 'b.png'): circle}, 1, False, 0)
@example({('cats', 'a.png'): IMAGES[0], ('.', 'b.png'): circle}, 1, False, 0)
@example({('cats', 'a.png'): IMAGES[0], ('.', 'b.png'): nowhere}, 1, False, 0)
@example({('cats', 'a.png'): IMAGES[0], ('.', 'b.png'): pipe}, 1, False, 0)
@example({('cats', '\udcff.png'): IMAGES[0]}, 1, False, 0)
@example({('\udcff', 'a.png'): IMAGES[0]}, 1, False, 0)
@example({('cats', 'a.png'): b'x'}, 1, True, 0)
@example({('cats', 'a.png'): IMAGES[0], ('cats', 'b.gif'): CUT}, 1, True, 0)
@given(trees, st.sampled_from([1, 3]), st.booleans(), st.sampled_from([0, 0, 2]))
def test_folders_of_images(tree, channels, skip, least):
    "As many images as there are files, and one warning of what is left out; or our error."
    with folder() as place, no_hang():
        os.environ['FEWSHOTMETA_CACHE'] = str(place / 'cache')
        root = place / 'own'
        root.mkdir()
        plant(root, tree)
        options = dict(channels=channels, skip_unreadable=skip, min_images=least)
        try:
            bank, said = read(root, **options)
        except (DataMissing, BadImage) as e:
            assert 'own' in str(e) and len(str(e)) < 10_000
            return
        except ValueError as e:
            assert str(e).startswith('min_images=2, but the largest class of own has 1')
            return
        classes, others = look(root)
        small = {c for c, n in zip(bank.classes, bank.count) if n < least}
        assert not small and len(bank) and bank.images.shape[1:] == (channels, 8, 8)
        missing = sum(classes.values()) - bank.count.sum()
        assert all(n <= classes[c] for c, n in zip(bank.classes, bank.count))
        assert missing == 0 or skip or least
        animated = any('animations' in one for one in said)
        assert len(said) == bool(missing or others or animated)
        assert repr(bank) and bank.digest
        again, told = read(root, **options)
        assert again.digest == bank.digest and len(told) >= len(said) - animated


# ---- a table of file names
VAL = splits('mini_imagenet')['val']
FILES = {f'{c}_{i}.png': c for c in VAL for i in range(2)}
SECRET = 255  # the value of each pixel of an image that no split has


@pytest.fixture(scope='module')
def mini(tmp_path_factory):
    "The validation split as a table and a folder of images; each has a value of its own."
    root = tmp_path_factory.mktemp('data')
    images = root / 'mini-imagenet' / 'images'
    for form in '', VAL[0], 'images':
        (images / form).mkdir(parents=True, exist_ok=True)
    for value, name in enumerate(FILES):
        Image.new('RGB', (8, 8), (value, 0, 0)).save(images / name)
    for secret in root / 'secret.png', images.parent / 'secret.png':
        Image.new('RGB', (8, 8), (SECRET, 0, 0)).save(secret)
    os.mkfifo(images / 'pipe.png')
    (images / 'circle.png').symlink_to('circle.png')
    return root


WHOLE = 'filename,label\n' + ''.join(f'{name},{c}\n' for name, c in FILES.items())
ROWS = ('', ',', ',,,', 'pipe.png,{c}', 'circle.png,{c}', '../secret.png,{c}')
ROWS += ('{root}/secret.png,{c}', '../../secret.png,{c}', './{f},{c}', '../images/{f},{c}')
ROWS += ('{f}', '{f},', ',{c}', '{f},x', '{f},{c},7', '"{f}","{c}"', '"{f},{c}', '{f};{c}')
ROWS += ('{f},../{c}', '{f}\0,{c}', 'images,{c}', '.,{c}', '..,{c}', 'x' * 5000 + ',{c}')
ROWS += ('\ud800,{c}', 'x' * 200_000 + ',{c}', '{{label}},{c}', '{f},{c}\r')
ROWS += ('images/{f},{c}', '{f},{c}', ' {f} , {c} ', '{F},{c}', '{f}\t{c}')
HEADS = ('filename,label', 'label,filename', 'filename,label,x', 'filename', 'filename;label', '')
HEADS += ('filename,label,label', 'filename,filename', 'FILENAME,LABEL', ' filename, label', ',')


@st.composite
def tables(draw):
    "The table with a row replaced, put in, or taken away; its head; its form; its bytes."
    rows = WHOLE.splitlines()
    for _ in range(draw(st.integers(0, 2))):
        at = draw(st.integers(1, len(rows) - 1))
        name, c = draw(st.sampled_from(sorted(FILES.items())))
        row = draw(st.sampled_from(ROWS))
        row = row.replace('{f}', name).replace('{c}', c).replace('{F}', name.upper())
        rows[at : at + draw(st.integers(0, 2))] = [row]
    if draw(st.integers(0, 4)) == 0:
        rows[0] = draw(st.sampled_from(HEADS))
    text = draw(st.sampled_from(['\n', '\n', '\r\n', '\r'])).join(rows)
    separator = draw(st.sampled_from([',', ',', ',', ';', '\t']))
    content = text.replace(',', separator).encode('utf-8', 'surrogatepass')
    return draw(st.just(content) | st.just(content) | spoilt(content))


def with_row(row):
    "The table with a further row."
    return (WHOLE + row).encode()


@often
@example(with_row(f'../secret.png,{VAL[0]}'))
@example(with_row(f'{{root}}/secret.png,{VAL[0]}'))
@example(with_row(f'./{VAL[0]}_0.png,{VAL[0]}'))
@example(with_row(f'pipe.png,{VAL[0]}'))
@example(with_row(f'{"x" * 200_000},{VAL[0]}'))
@example(with_row(VAL[0]))
@example(WHOLE.encode('utf-16'))
@example(WHOLE.replace('label\n', f'label\n{"x" * 300},{VAL[0]}\n').encode())
@given(tables())
def test_tables_of_mini_imagenet(mini, content):
    "Each image of the folder once at most, and none of another folder; or our error."
    base = mini / 'mini-imagenet'
    (base / 'val.csv').write_bytes(content.replace(b'{root}', os.fsencode(mini)))
    with folder() as place, no_hang():
        os.environ['FEWSHOTMETA_CACHE'] = str(place)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')
                bank = mini_imagenet('val', size=8, root=mini)
        except (BadImage, DataMissing) as e:
            assert str(base) in str(e) or 'mini_imagenet val' in str(e)
            assert len(str(e)) < 25_000
            return
        values = bank.images[:, 0, 0, 0].tolist()
        assert bank.classes == VAL and bank.count.sum() == len(values)
        assert SECRET not in values and len(set(values)) == len(values)
