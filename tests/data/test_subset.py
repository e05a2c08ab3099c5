from collections import Counter

import pytest

from contrastive.data.record import BadSample
from contrastive.data.sources import open_source
from contrastive.data.subset import LabelledSubset
from contrastive.errors import UserError


@pytest.fixture(scope="module")
def digits():
    return open_source("digits")


def keys(source):
    return [source[index].key for index in range(len(source))]


def test_each_class_gives_its_share(digits):
    whole = Counter(digits.label(i) for i in range(len(digits)))
    tenth = LabelledSubset(digits, 0.1)
    counts = Counter(tenth.label(i) for i in range(len(tenth)))
    assert counts == {label: round(0.1 * n) for label, n in whole.items()}
    assert tenth[3].label == tenth.label(3) and tenth.captions(3) == tenth[3].captions
    assert tenth.class_names == digits.class_names and tenth.name == "digits:train (10 %)"


def test_always_the_same_and_nested(digits):
    tenth, half = keys(LabelledSubset(digits, 0.1)), keys(LabelledSubset(digits, 0.5))
    assert tenth == keys(LabelledSubset(digits, 0.1)) and set(tenth) < set(half)
    prints = {LabelledSubset(digits, share).fingerprint for share in (0.1, 0.5, 1.0)}
    assert len(prints | {digits.fingerprint}) == 4


def test_the_least_is_one_of_each_class(digits):
    assert Counter(LabelledSubset(digits, 1e-6).label(i) for i in range(10)) == dict.fromkeys(range(10), 1)


class Holes:
    """Two of three samples have no label, one of them because it cannot be read."""

    name, class_names, fingerprint = "holes", ("even", "odd"), "0"

    def __init__(self, labelled=True):
        self.labelled = labelled

    def __len__(self):
        return 300

    def label(self, index):
        if index % 3 == 0:
            raise BadSample("bad_label")
        return index % 2 if index % 3 == 2 and self.labelled else None


def test_unlabelled_samples_are_left_out():
    assert len(LabelledSubset(Holes(), 1.0)) == 100
    with pytest.raises(UserError, match="holes has no labels"):
        LabelledSubset(Holes(labelled=False), 0.5)


@pytest.mark.parametrize("share", [0, -0.1, 1.1, float("nan")])
def test_a_share_that_is_none(digits, share):
    with pytest.raises(UserError, match="data.share is"):
        LabelledSubset(digits, share)
