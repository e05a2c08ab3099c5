"""Scenes with a thing at either end: what is drawn is what is said, and no one end tells the class."""

import pickle
from collections import Counter

import numpy as np
import pytest

from contrastive.data.sources import open_source
from contrastive.data.sources.scenes import HELD_OUT_PAIRS, RGB
from contrastive.data.sources.wide_scenes import CLASSES, TESTED
from contrastive.errors import UserError


def test_pictures_show_what_their_captions_say():
    source = pickle.loads(pickle.dumps(open_source("scenes:wide")))
    shapes = Counter()
    for index in (0, 1, 2, 3, 4, 5):
        record = source[index]
        height, width = record.image.shape[:2]
        shapes[height, width] += 1
        assert record.captions == source.captions(index) and record.label is None and 3 <= len(record.captions) <= 4
        first, second = record.captions[-1].split(" and ")
        here, there = ("on the left", "on the right") if width > height else ("at the top", "at the bottom")
        assert first.endswith(here) and second.endswith(there)
        one, other = np.split(record.image, 2, axis=int(width > height))
        for half, said in ((one, first), (other, second)):
            colour, shape = said.split()[1:3]
            assert (colour, shape) not in HELD_OUT_PAIRS
            distance = np.abs(half.astype(int) - RGB[colour]).max(axis=2)
            assert (distance < 20).sum() > 100, f"no {colour} {said}"
    assert set(shapes) == {(48, 192), (192, 48)}


def test_no_end_alone_tells_the_class():
    source = open_source("scenes:wide-test")
    assert len(CLASSES) == len(set(source.class_names)) == 112 and len(source) % 112 == 0
    assert not set(TESTED) & set(HELD_OUT_PAIRS)
    for place in (1, 2):
        assert set(Counter(one[place] for one in CLASSES).values()) == {14}
    record = source[5]
    assert record.captions[-1] == f"a {source.class_names[record.label]}"
    assert (record.image == open_source("scenes:wide-test")[5].image).all()


def test_what_is_not_there_is_said():
    with pytest.raises(UserError, match="scenes: unknown split 'wied'.*masks, wide, wide-val or wide-test"):
        open_source("scenes:wied")
