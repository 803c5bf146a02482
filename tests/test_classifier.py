"""Photographs and names: of every kind that people have, and through scikit-learn."""

import numpy as np
import pytest
import torch
from fewshotmeta.all import *
from PIL import Image

BANK = glyphs('test')


@pytest.fixture
def learner():
    "An untrained ProtoNet, for grey images of 28×28."
    made = ProtoNet(conv4(filters=16))
    made.card = Card('proto_net', **training_facts(EpisodeSampler(BANK, 5, 1, 5)))
    return made


def some(first, last):
    "Images of three classes, and their names."
    images = torch.cat([BANK[c][first:last] for c in range(3)])[:, 0].numpy()
    return images, np.repeat(['cat', 'dog', 'owl'], last - first)


def test_images_of_every_kind_are_alike(learner, tmp_path):
    known, names = some(0, 2)
    asked, _ = some(2, 4)
    clf = FewShotClassifier(learner).fit(known, names)
    expected = clf.predict_proba(asked)
    assert expected.shape == (6, 3) and np.allclose(expected.sum(1), 1)
    files = [tmp_path / f'{i}.png' for i in range(len(asked))]
    for file, image in zip(files, asked):
        Image.fromarray(image).save(file)
    coloured = np.repeat(asked[..., None], 3, -1)
    kinds = dict(
        files=files,
        texts=list(map(str, files)),
        pil=[Image.fromarray(x) for x in asked],
        floats=asked / 255,
        tensor=torch.from_numpy(asked)[:, None],
        colour=coloured,
        channels_first=torch.from_numpy(coloured).permute(0, 3, 1, 2),
        mixed=[files[0], Image.fromarray(asked[1]), *asked[2:]],
    )
    for kind, images in kinds.items():
        assert np.allclose(clf.predict_proba(images), expected, atol=1e-6), kind


def test_a_prediction_does_not_depend_on_company_unless_asked(learner):
    known, names = some(0, 2)
    asked, _ = some(2, 8)
    alone = FewShotClassifier(learner).fit(known, names)
    assert np.allclose(alone.predict_proba(asked[:1])[0], alone.predict_proba(asked)[0], atol=1e-5)
    together = FewShotClassifier(learner, norm='transductive').fit(known, names)
    differ = together.predict_proba(asked[:1])[0] - together.predict_proba(asked)[0]
    assert np.abs(differ).max() > 1e-4


LABELS = [3, 1, 2], ['b', 'a', 'c'], [('x', 1), None, 2.5], [True, 5, 'y']


@pytest.mark.parametrize('labels', LABELS)
def test_labels_of_any_kind_in_any_order(learner, labels):
    known, _ = some(0, 2)
    order = [4, 0, 2, 5, 1, 3]
    names = [labels[i // 2] for i in order]
    clf = FewShotClassifier(learner).fit(known[order], names)
    assert clf.score(known, [label for label in labels for _ in range(2)]) == 1.0
    assert set(clf.classes_.tolist()) == set(labels)


def test_classes_of_different_sizes(learner):
    known, names = some(0, 3)
    clf = FewShotClassifier(learner).fit(known[[0, 1, 2, 3, 6]], names[[0, 1, 2, 3, 6]])
    assert clf.score(*some(3, 6)) > 0.5


def test_scikit_learn_takes_it_for_an_estimator(learner):
    from sklearn.base import clone, is_classifier
    from sklearn.model_selection import cross_val_score
    from sklearn.utils import estimator_checks as checks

    clf = FewShotClassifier(learner, steps=0)
    assert is_classifier(clf) and clone(clf).get_params()['steps'] == 0
    images, names = some(0, 6)
    scores = cross_val_score(clf, images, names, cv=3)
    assert len(scores) == 3 and scores.mean() > 0.5
    for check in ('get_params_invariance', 'set_params', 'no_attributes_set_in_init'):
        getattr(checks, f'check_{check}')('FewShotClassifier', clone(clf))


REFUSED = {
    'other numbers': (lambda x: (x, ['a', 'b']), '6 images, but 2 labels'),
    'one image': (lambda x: (x[:1], ['a']), 'images of 1 class: give at least two'),
    'a class is missing': (lambda x: (x, ['a'] * 6), 'images of 1 class:'),
    'no images': (lambda x: ([], []), 'the list is empty'),
    'a single path': (lambda x: ('a.png', ['a']), 'give a list of images'),
    'sixteen bits': (lambda x: (x.astype(np.uint16), list('aabbcc')), 'uint16 pixels'),
    'floats to 255': (lambda x: (x * 1.0, list('aabbcc')), r'they lie in \[0,1\]'),
    'no image': (lambda x: ([np.zeros((2, 3, 4, 5))] * 6, list('aabbcc')), 'has the shape'),
    'lists as labels': (lambda x: (x, [[1]] * 6), 'key of a dictionary'),
}


@pytest.mark.parametrize('given,said', REFUSED.values(), ids=list(REFUSED))
def test_bad_input(learner, given, said):
    with pytest.raises(ValueError, match=said):
        FewShotClassifier(learner).fit(*given(some(0, 2)[0]))


def test_a_head_for_five_is_not_asked_for_seven(learner):
    bound = MAML(conv4(filters=8), 5)
    bound.card = learner.card
    images = torch.cat([BANK[c][:1] for c in range(7)])
    with pytest.raises(ValueError, match='7 classes, but the head .* for 5: choose .*hidra'):
        FewShotClassifier(bound).fit(images, range(7))
    with pytest.raises(NotFitted, match='call fit first'):
        FewShotClassifier(bound).predict(images)
