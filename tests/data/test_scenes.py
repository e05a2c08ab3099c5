import hashlib
import pickle
import re
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest

from contrastive.data.sources import open_source
from contrastive.data.sources.scene_layout import BACKDROPS, COLOURS, SHAPES
from contrastive.data.sources.scenes import (
    END_CLASSES,
    END_PAIRS,
    HELD_OUT_PAIRS,
    PAIRS,
    RGB,
    TRAINING_PAIRS,
    Scenes,
)
from contrastive.errors import UserError

MENTION = re.compile(rf"({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})")
REWORDED = re.compile(rf"a ({'|'.join(SHAPES)}) (?:that is|in) ({'|'.join(COLOURS)})")

DIGEST = """
import hashlib
from contrastive.data.sources.scenes import Scenes
digest = hashlib.sha256()
for split in ("train", "val", "test", "heldout"):
    source = Scenes(split)
    for index in range(40):
        record = source[index]
        digest.update(record.image.tobytes())
        digest.update("|".join((record.key, *record.captions, str(record.label))).encode())
print(digest.hexdigest())
"""


def pairs_named(caption: str) -> list[tuple[str, str]]:
    return MENTION.findall(caption) + [(colour, shape) for shape, colour in REWORDED.findall(caption)]


def palette_counts(image: np.ndarray) -> dict[str, int]:
    """How many pixels are close to each named colour, and closer to it than to any other."""
    palette = np.array([RGB[colour] for colour in COLOURS], dtype=np.float32)
    distance = np.linalg.norm(image.reshape(-1, 1, 3).astype(np.float32) - palette, axis=2)
    nearest = distance.argmin(1)[distance.min(1) < 30]
    return dict(zip(COLOURS, np.bincount(nearest, minlength=len(COLOURS)).tolist(), strict=True))


def test_every_process_draws_the_same_scenes():
    digests = {
        subprocess.run([sys.executable, "-c", DIGEST], capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    }
    assert len(digests) == 1 and len(digests.pop().strip()) == 64


def test_order_of_access_does_not_matter():
    source = Scenes("train")
    late_first = [source[index] for index in (7, 3)]
    early_first = [Scenes("train", num_samples=10)[index] for index in (3, 7)]
    for one, other in zip(late_first, reversed(early_first), strict=True):
        assert one.key == other.key and one.captions == other.captions
        np.testing.assert_array_equal(one.image, other.image)


def test_splits_and_indices_differ():
    seen = {
        hashlib.sha256(Scenes(split)[index].image.tobytes()).digest()
        for split in ("train", "val", "test", "heldout")
        for index in range(100)
    }
    assert len(seen) == 400


def test_held_out_pairs_use_each_colour_and_shape_once():
    assert len(HELD_OUT_PAIRS) == 8 and len(TRAINING_PAIRS) == 56
    assert {colour for colour, _ in HELD_OUT_PAIRS} == set(COLOURS)
    assert {shape for _, shape in HELD_OUT_PAIRS} == set(SHAPES)


@pytest.mark.parametrize("split", ["train", "val"])
def test_training_never_draws_or_names_a_held_out_pair(split):
    source = Scenes(split, num_samples=5_000)
    drawn, named, seconds = set(), set(), 0
    for index in range(len(source)):
        things = source.describe(index).things
        drawn.update((thing.colour, thing.shape) for thing in things)
        seconds += len(things) == 2
        for caption in source.captions(index):
            named.update(pairs_named(caption))
    assert drawn == named == set(TRAINING_PAIRS)
    assert 0.15 < seconds / len(source) < 0.25


def test_test_split_is_balanced_and_labelled():
    source = Scenes("test")
    assert source.class_names == tuple(f"{colour} {shape}" for colour, shape in PAIRS)
    labels = [source.label(index) for index in range(len(source))]
    assert np.bincount(labels, minlength=64).tolist() == [40] * 64


def test_heldout_split_has_only_held_out_pairs():
    source = Scenes("heldout")
    labels = [source.label(index) for index in range(len(source))]
    assert source.class_names == Scenes("test").class_names
    assert np.bincount(labels, minlength=64).tolist() == [80 * (pair in HELD_OUT_PAIRS) for pair in PAIRS]


@pytest.mark.parametrize("split", ["test", "heldout"])
def test_label_names_what_is_drawn_and_said(split):
    source = Scenes(split, num_samples=200)
    for index in range(len(source)):
        record, (thing,) = source[index], source.describe(index).things
        assert record.label == source.label(index)
        assert source.class_names[record.label] == thing.name
        assert all(pairs_named(caption) == [(thing.colour, thing.shape)] for caption in record.captions)


def test_training_scenes_have_no_labels():
    source = Scenes("train")
    assert source.class_names is None and source.label(0) is None and source[0].label is None


def test_captions_are_varied_and_true():
    source = Scenes("train", num_samples=2_000)
    wordings = set()
    for index in range(len(source)):
        scene, captions = source.describe(index), source.captions(index)
        assert 3 <= len(captions) <= 5 and len(set(captions)) == len(captions)
        names = {(thing.colour, thing.shape) for thing in scene.things}
        sizes = {thing.size for thing in scene.things}
        for caption in captions:
            assert set(pairs_named(caption)) == names
            assert not re.search(r"\b(small|tiny|little)\b", caption) or "small" in sizes
            assert not re.search(r"\b(large|big|huge)\b", caption) or "large" in sizes
            assert ("striped" not in caption) or scene.backdrop.kind == "stripes"
            assert not re.search(r"\ba [aeiou]", caption)
        assert "background" in captions[0]
        if len(scene.things) == 1:
            assert captions[-1].removeprefix("a ").removeprefix("an ") == scene.things[0].name
        wordings.update(captions)
    assert len(wordings) > 2_000


def test_words_for_places_and_relations_hold():
    source = Scenes("train", num_samples=3_000)
    relations, places = set(), set()
    for index in range(len(source)):
        scene, captions = source.describe(index), source.captions(index)
        if scene.relation is None:
            (thing,) = scene.things
            for caption in captions:
                places.update(re.findall(r"\b(?:top|bottom|left|right|centre|middle)\b", caption))
                assert "top" not in caption or thing.y < 0.4
                assert "bottom" not in caption or thing.y > 0.6
                assert " left" not in caption or thing.x < 0.4
                assert " right" not in caption or thing.x > 0.6
                if re.search("centre|middle", caption):
                    assert max(abs(thing.x - 0.5), abs(thing.y - 0.5)) < 0.1
            continue
        where = {(thing.colour, thing.shape): (thing.x, thing.y) for thing in scene.things}
        for caption in captions:
            found = re.search(r"\b(left of|right of|above|over|below|under)\b", caption)
            if found is None:
                continue
            relations.add(found[0])
            (x1, y1), (x2, y2) = (where[pair] for pair in pairs_named(caption))
            holds = {"left of": x1 < x2, "right of": x1 > x2, "above": y1 < y2, "below": y1 > y2}
            assert {**holds, "over": holds["above"], "under": holds["below"]}[found[0]], caption
            along, across = abs(x1 - x2), abs(y1 - y2)
            assert (along > across) == ("of" in found[0])
    assert relations == {"left of", "right of", "above", "over", "below", "under"}
    assert places == {"top", "bottom", "left", "right", "centre", "middle"}


def test_colours_are_far_apart():
    palette = np.array([RGB[colour] for colour in COLOURS], dtype=np.float32)
    distance = np.linalg.norm(palette[:, None] - palette, axis=2) + 1_000 * np.eye(len(COLOURS))
    assert distance.min() > 90
    grounds = np.array([Scenes("train").describe(index).backdrop.tone for index in range(500)])
    assert np.linalg.norm(palette[:, None] - grounds, axis=2).min() > 60


def test_named_colour_is_in_the_pixels():
    source = Scenes("test", num_samples=640)
    grounds = set()
    for index in range(len(source)):
        scene = source.describe(index)
        counts = palette_counts(source[index].image)
        count = counts.pop(scene.things[0].colour)
        assert count > 40 and count > 5 * max(counts.values()), scene
        grounds.add(scene.backdrop.kind)
    assert grounds == set(BACKDROPS)


def test_both_objects_are_visible_and_apart():
    source = Scenes("train", num_samples=1_000)
    for index in range(len(source)):
        scene = source.describe(index)
        if scene.relation is None:
            continue
        counts = palette_counts(source[index].image)
        assert all(counts[thing.colour] > 40 for thing in scene.things)
        first, second = scene.things
        distance = np.hypot(first.x - second.x, first.y - second.y)
        assert distance > first.radius + second.radius


def test_no_object_touches_the_border():
    for source in (Scenes("test", num_samples=640), Scenes("train", num_samples=640)):
        for index in range(len(source)):
            image = source[index].image.copy()
            image[1:-1, 1:-1] = 128
            assert max(palette_counts(image).values()) == 0


def test_shapes_differ_at_48_pixels():
    """The nearest-class-mean rule on centred, scaled silhouettes tells the shapes apart well above chance."""
    source = Scenes("test", num_samples=64 * 12)
    features, shapes = [], []
    for index in range(len(source)):
        thing = source.describe(index).things[0]
        image = source[index].image.astype(np.float32)
        mask = np.linalg.norm(image - np.array(RGB[thing.colour]), axis=2) < 60
        offsets = np.linspace(-1.1, 1.1, 12) * thing.radius
        rows = np.clip(((thing.y + offsets) * 48).astype(int), 0, 47)
        columns = np.clip(((thing.x + offsets) * 48).astype(int), 0, 47)
        features.append(mask[np.ix_(rows, columns)].ravel())
        shapes.append(SHAPES.index(thing.shape))
    features, shapes = np.array(features, dtype=np.float32), np.array(shapes)
    half = len(shapes) // 2
    means = np.stack([features[:half][shapes[:half] == shape].mean(0) for shape in range(8)])
    distance = ((features[half:, None] - means) ** 2).sum(2)
    assert (distance.argmin(1) == shapes[half:]).mean() > 0.9


@pytest.mark.parametrize("image_size", [16, 33, 48, 224])
def test_image_sizes_show_the_same_scene(image_size):
    image = Scenes("test", image_size=image_size)[9].image
    assert image.shape == (image_size, image_size, 3) and image.dtype == np.uint8
    share = palette_counts(image)["green"] / image_size**2
    reference = palette_counts(Scenes("test", image_size=480)[9].image)["green"] / 480**2
    assert share == pytest.approx(reference, rel=0.35)


def test_captions_do_not_need_the_image_and_agree_with_the_record():
    source = Scenes("val")
    assert all(source.captions(index) == source[index].captions for index in range(50))


def test_fingerprint_follows_the_data():
    sources = [Scenes(), Scenes("val"), Scenes(image_size=64), Scenes(num_samples=10)]
    assert len({source.fingerprint for source in sources}) == 4
    assert Scenes().fingerprint == sources[0].fingerprint
    lengths = {split: len(Scenes(split)) for split in ("train", "val", "test", "heldout")}
    assert lengths == {"train": 200_000, "val": 2_000, "test": 2_560, "heldout": 640}


def test_pickle_round_trip():
    source = Scenes("test", image_size=40, num_samples=100)
    copy = pickle.loads(pickle.dumps(source))
    assert (len(copy), copy.name, copy.fingerprint) == (100, "scenes:test", source.fingerprint)
    np.testing.assert_array_equal(copy[5].image, source[5].image)


def test_numpy_indices_and_range():
    source = Scenes("train", num_samples=10)
    assert source[np.int64(3)].key == "train-00000003"
    for index in (10, -1):
        with pytest.raises(IndexError, match="scenes:train"):
            source[index]
        with pytest.raises(IndexError):
            source.captions(index)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "held_out"}, "Did you mean 'heldout'"),
        ({"image_size": 8}, "image size 8"),
        ({"num_samples": 0}, "num_samples is 0"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        Scenes(**options)


def test_rendering_keeps_up_with_training():
    source = Scenes("train")
    source[0]
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        for index in range(200):
            source[index]
        best = min(best, (time.perf_counter() - start) / 200)
    assert best < 0.002  # about 0.1 ms on an idle core


def test_wide_pictures_show_what_their_captions_say():
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
    assert len(END_CLASSES) == len(set(source.class_names)) == 112 and len(source) % 112 == 0
    assert not set(END_PAIRS) & set(HELD_OUT_PAIRS)
    for place in (1, 2):
        assert set(Counter(one[place] for one in END_CLASSES).values()) == {14}
    record = source[5]
    assert record.captions[-1] == f"a {source.class_names[record.label]}"
    assert (record.image == open_source("scenes:wide-test")[5].image).all()


def test_a_split_that_is_not_there_is_said():
    with pytest.raises(UserError, match="scenes: unknown split 'wied'.*masks, wide, wide-val or wide-test"):
        open_source("scenes:wied")
