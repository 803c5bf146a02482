"""CIFAR-FS, FC100 and tiered-ImageNet: every layout gives the same bank; a wrong one is named."""

import io
import os
import pickle
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from fewshotmeta.all import *
from fewshotmeta.lab.protocols import make_learner, samplers

LOADERS = dict(cifar_fs=cifar_fs, fc100=fc100)
EVERY = sorted(c for names in splits('cifar_fs').values() for c in names)
SYNSETS = splits('tiered_imagenet')


def classes_of(name, split='test'):
    "The classes of a split, in order."
    found = splits(name)[split]
    return sorted(c for g in found.values() for c in g) if isinstance(found, dict) else found


def noise(classes, size=32, n=3):
    "Images of noise for each class."
    rng = np.random.default_rng(0)
    return {c: rng.integers(0, 255, (n, size, size, 3), np.uint8) for c in classes}


def png(image):
    "The bytes of a PNG file."
    file = io.BytesIO()
    Image.fromarray(image).save(file, 'PNG')
    return file.getvalue()


def folders(base, pixels):
    "Write class folders."
    for c, images in pixels.items():
        (base / str(c)).mkdir(parents=True, exist_ok=True)
        for i, image in enumerate(images):
            (base / str(c) / f'{i}.png').write_bytes(png(image))


def by_split(root, name, pixels, part='test'):
    folders(root / DATASETS.notes[name]['place'] / part, pixels)


def by_meta_split(root, name, pixels):
    by_split(root, name, pixels, 'meta-test')


def by_list(root, name, pixels):
    base = root / DATASETS.notes[name]['place']
    folders(base / 'data', pixels)
    (base / 'splits' / 'bertinetto').mkdir(parents=True)
    (base / 'splits' / 'bertinetto' / 'test.txt').write_text('\n'.join(pixels))


def shuffled(pixels):
    "All images and their class numbers, mixed."
    data = np.concatenate([*pixels.values()])
    labels = np.repeat([EVERY.index(c) for c in pixels], [len(x) for x in pixels.values()])
    order = np.random.default_rng(1).permutation(len(data))
    return data[order], labels[order].tolist()


def by_pickle(root, name, pixels):
    data, labels = shuffled(pixels)
    file = pickle_of(root, name)
    file.write_bytes(pickle.dumps(dict(data=data, labels=labels), 2))


def pickle_of(root, name):
    "The place of the pickle of a test split."
    base = root / DATASETS.notes[name]['place']
    base.mkdir(exist_ok=True, parents=True)
    title = dict(cifar_fs='CIFAR_FS', fc100='FC100')[name]
    return base / f'{title}_test.pickle'


def cifar100_files(pixels):
    "The three files of CIFAR-100, as its archive has them."
    data, labels = shuffled(pixels)
    rows, half = data.transpose(0, 3, 1, 2).reshape(len(data), -1), len(data) // 2
    held = {'meta': {b'fine_label_names': [c.encode() for c in EVERY]}}
    for part, own in dict(train=slice(half), test=slice(half, None)).items():
        held[part] = {b'data': rows[own], b'fine_labels': labels[own]}
    return {part: pickle.dumps(content, 2) for part, content in held.items()}


def by_cifar100(root, name, pixels):
    (root / 'cifar-100-python').mkdir(parents=True)
    for part, content in cifar100_files(noise(EVERY) | pixels).items():
        (root / 'cifar-100-python' / part).write_bytes(content)


WRITERS = [by_meta_split, by_list, by_pickle, by_cifar100]


@pytest.mark.parametrize('name', LOADERS)
def test_every_layout_gives_the_same_bank(name, tmp_path, own_cache):
    pixels = noise(classes_of(name))
    by_split(tmp_path / 'first', name, pixels)
    bank = LOADERS[name]('test', root=tmp_path / 'first', download=False)
    assert bank.classes == classes_of(name) and bank.images.shape[1:] == (3, 32, 32)
    own = bank[bank.classes[0]].permute(0, 2, 3, 1).numpy()
    assert {x.tobytes() for x in own} == {x.tobytes() for x in pixels[bank.classes[0]]}
    for write in WRITERS:
        root = tmp_path / write.__name__
        root.mkdir()
        write(root, name, pixels)
        found = LOADERS[name]('test', root=root, download=False)
        assert found.digest == bank.digest, write.__name__


@pytest.mark.parametrize('name,expected', [('cifar_fs', [64, 16, 20]), ('fc100', [60, 20, 20])])
def test_cifar_splits(name, expected):
    parts = [classes_of(name, split) for split in ('train', 'val', 'test')]
    assert [len(part) for part in parts] == expected
    assert sorted(sum(parts, [])) == EVERY and len(set(EVERY)) == 100


class Hostile:
    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.system, (f'touch {self.trace}',)


def test_a_bad_cifar_is_named(tmp_path, own_cache):
    by_split(tmp_path, 'cifar_fs', noise(classes_of('cifar_fs')))
    base = tmp_path / 'cifar-fs' / 'test'
    (base / 'baby' / '1.png').write_bytes((base / 'baby' / '1.png').read_bytes()[:99])
    with pytest.raises(BadImage, match=r'baby/1\.png'):
        cifar_fs('test', root=tmp_path)
    (base / 'baby').rename(base / 'babe')
    with pytest.raises(DataMissing, match="2 classes differ .first: it has 'babe'"):
        cifar_fs('test', root=tmp_path)
    for held, words in [
        (dict(data=Hostile(tmp_path / 'ran'), labels=[]), f'it asks for {os.name}.system'),
        (dict(image_data=[]), 'holds image_data: expected data and labels'),
        (dict(data=np.zeros((2, 8, 8, 3), np.uint8), labels=[0, 1]), r'expected uint8 of \(n, 32'),
        (dict(data=np.zeros((2, 32, 32, 3), np.uint8), labels=[0]), '2 images, but labels'),
        (dict(data=np.zeros((2, 32, 32, 3), np.uint8), labels=[0, [1]]), 'no whole number'),
    ]:
        pickle_of(tmp_path, 'fc100').write_bytes(pickle.dumps(held))
        with pytest.raises(BadImage, match=f'FC100_test.pickle.*{words}'):
            fc100('test', root=tmp_path, download=False)
    assert not (tmp_path / 'ran').exists()
    by_pickle(tmp_path, 'fc100', noise(classes_of('fc100', 'val')))
    with pytest.raises(DataMissing, match='40 classes differ'):
        fc100('test', root=tmp_path, download=False)


def test_a_bad_list_of_names_is_named(tmp_path, own_cache):
    by_cifar100(tmp_path, 'fc100', {})
    meta = tmp_path / 'cifar-100-python' / 'meta'
    meta.write_bytes(pickle.dumps(dict(fine_label_names=['ape', *EVERY[1:]])))
    with pytest.raises(DataMissing, match="other classes than CIFAR-100 .first: 'apple'"):
        fc100('test', root=tmp_path)
    meta.write_bytes(pickle.dumps([1]))
    with pytest.raises(BadImage, match='meta holds no list fine_label_names'):
        fc100('test', root=tmp_path)
    by_list(tmp_path, 'cifar_fs', noise(['ape', *classes_of('cifar_fs')[1:]]))
    with pytest.raises(DataMissing, match="test.txt: .*first: it has 'ape'"):
        cifar_fs('test', root=tmp_path)


def test_labels_from_zero_stay_unnamed(tmp_path, own_cache):
    data = np.zeros((20, 32, 32, 3), np.uint8)
    pickle_of(tmp_path, 'fc100').write_bytes(pickle.dumps(dict(data=data, labels=[*range(20)])))
    bank = fc100('test', root=tmp_path, download=False)
    assert bank.classes == sorted(f'label {i}' for i in range(20))


def test_cifar100_serves_both(tmp_path, own_cache, monkeypatch):
    archive = tmp_path / 'cifar-100-python.tar.gz'
    with tarfile.open(archive, 'w:gz') as t:
        for part, content in cifar100_files(noise(EVERY, n=2)).items():
            member = tarfile.TarInfo(f'cifar-100-python/{part}')
            member.size = len(content)
            t.addfile(member, io.BytesIO(content))
    root = tmp_path / 'root'
    unpack_download(archive, root)
    rows = {row['name']: row for row in data_status(root)}
    for name in LOADERS:
        row = rows[name]
        assert (row['found'], row['classes'], row['images']) == (True, 100, 200), row['lacking']
    monkeypatch.setenv('FEWSHOTMETA_DATA', str(root))
    for name in LOADERS:
        tasks = samplers(name, n_query=1, test_query=1)
        assert tasks.train.bank.images.shape[1:] == (3, 32, 32)
        learner = make_learner('maml', tasks.train, inner_steps=1, filters=4)
        before = {k: v.clone() for k, v in learner.theta.items()}
        fit(learner, tasks.train, 5, meta_batch=2, valid=tasks.valid, valid_tasks=2)
        assert any(not torch.equal(before[k], v) for k, v in learner.theta.items())
        assert all(torch.isfinite(v).all() for v in learner.theta.values())


# ---- tiered-ImageNet
def label_pickle(base, pixels):
    names = [*pixels][::-1]
    data = np.concatenate([pixels[c] for c in names])
    labels = np.repeat(np.arange(len(names), dtype=np.int32), [len(pixels[c]) for c in names])
    held = dict(label_specific=labels, label_specific_str=names, label_general_str={0: 'food'})
    base.mkdir(parents=True, exist_ok=True)
    (base / 'val_labels.pkl').write_bytes(pickle.dumps(held, 2))
    return data


def as_png(base, pixels):
    files = [np.frombuffer(png(image), np.uint8) for image in label_pickle(base, pixels)]
    (base / 'val_images_png.pkl').write_bytes(pickle.dumps(files, 4))


def as_npz(base, pixels):
    np.savez(base / 'val_images.npz', images=label_pickle(base, pixels)[..., ::-1])


def test_tiered_imagenet_in_every_layout(tmp_path, own_cache):
    pixels = noise(SYNSETS['val'], size=84, n=2)
    folders(tmp_path / 'a' / 'tiered-imagenet' / 'val', pixels)
    bank = tiered_imagenet('val', root=tmp_path / 'a')
    assert bank.classes == SYNSETS['val'] and bank.images.shape[1:] == (3, 84, 84)
    for write in (as_png, as_npz):
        base = tmp_path / write.__name__ / 'tiered-imagenet'
        base.mkdir(parents=True)
        write(base, pixels)
        assert tiered_imagenet('val', root=base.parent).digest == bank.digest, write
        (row,) = [r for r in data_status(base.parent) if r['name'] == 'tiered_imagenet']
        assert (row['found'], row['classes'], row['images']) == (False, 97, 194)
        assert row['lacking'] == ['train: is not there', 'test: is not there']


def test_a_bad_tiered_imagenet_is_named(tmp_path, own_cache):
    pixels = noise(SYNSETS['val'], size=84, n=1)
    base = tmp_path / 'tiered-imagenet'
    as_png(base, pixels)
    files = [png(image) for (image,) in pixels.values()]
    file = base / 'val_images_png.pkl'
    for held, words in [
        (files[:5] + [files[5][:60]] + files[6:], 'image 5: '),
        (files[:-1], '96 images, but .* has 97 labels'),
        ([Hostile(tmp_path / 'ran')], f'it asks for {os.name}.system'),
        (files[:3] + [7], 'image 3: expected the bytes'),
    ]:
        file.write_bytes(pickle.dumps(held))
        with pytest.raises(BadImage, match=f'val_images_png.pkl.*{words}'):
            tiered_imagenet('val', root=tmp_path)
    assert not (tmp_path / 'ran').exists()
    file.unlink()
    np.savez(base / 'val_images.npz', images=np.zeros((97, 8, 8), np.uint8))
    with pytest.raises(BadImage, match='val_images.npz: images is uint8'):
        tiered_imagenet('val', root=tmp_path)
    pixels['n00000001'] = pixels.pop(SYNSETS['val'][0])
    label_pickle(base, pixels)
    with pytest.raises(DataMissing, match="2 classes differ .first: it has 'n00000001'"):
        tiered_imagenet('val', root=tmp_path)
    for labels in (3, [[0], 1], [0.5]):
        held = dict(label_specific=labels, label_specific_str=[])
        (base / 'val_labels.pkl').write_bytes(pickle.dumps(held))
        with pytest.raises(BadImage, match='val_labels.pkl: .*lists|whole numbers'):
            tiered_imagenet('val', root=tmp_path)


# ---- archives
PHOTO = png(np.zeros((32, 32, 3), np.uint8))
BY_LIST = {f'cifar100/data/{c}/1.png': PHOTO for c in EVERY}
BY_LIST |= {
    f'cifar100/splits/bertinetto/{split}.txt': '\n'.join(names).encode()
    for split, names in splits('cifar_fs').items()
}
FC100_FOLDERS = {
    f'FC100/{split}/{c}/1.png': PHOTO
    for split in ('train', 'val', 'test')
    for c in classes_of('fc100', split)
}
TIERED = {f'tiered/{split}/{c}/1.png': PHOTO for split, names in SYNSETS.items() for c in names}


@pytest.mark.parametrize(
    'name,files', [('cifar_fs', BY_LIST), ('fc100', FC100_FOLDERS), ('tiered_imagenet', TIERED)]
)
def test_archives_go_to_their_places(tmp_path, name, files):
    with zipfile.ZipFile(tmp_path / 'x.zip', 'w') as z:
        for path, content in files.items():
            z.writestr(path, content)
    root = tmp_path / 'root'
    assert unpack_download(tmp_path / 'x.zip', root) == name
    (row,) = [row for row in data_status(root) if row['name'] == name]
    expected = 608 if name == 'tiered_imagenet' else 100
    assert (row['found'], row['classes'], row['images']) == (True, expected, expected), row
