"""Native training images: a step's patches, their variation, and batches that ranks and workers do not change."""

import io
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from contrastive.data.augment import AugmentConfig, augment
from contrastive.data.decode import decode
from contrastive.data.loader import train_loader
from contrastive.data.order import Order
from contrastive.data.preprocess import NativeSize, native_patches
from contrastive.data.record import BadSample, Record, Source
from contrastive.data.samples import DrawnSize, LabelledDataset

SIZES = [(24, 24), (12, 48), (48, 12), (30, 20), (17, 33), (8, 64), (64, 8)]
DRAWN = DrawnSize(4, (4, 9, 16), seed=3)
VARIED = AugmentConfig(crop_scale=(0.5, 1.0), flip=True, rand_augment_ops=1, color_jitter=(0.2, 0.2, 0.2, 0.1))


class Shapes(Source):
    name = "shapes"

    def __len__(self):
        return 24

    def __getitem__(self, index):
        if index == 5:
            return Record("thin", np.zeros((1, 4000, 3), np.uint8), label=0)
        size = SIZES[index % len(SIZES)]
        return Record(str(index), np.random.default_rng(index).integers(0, 256, (*size, 3), np.uint8), label=0)


def batches(**how):
    dataset = LabelledDataset(Shapes(), Order(24, 8, 0), DRAWN, VARIED, num_classes=1)
    return list(train_loader(dataset, **{"num_steps": 6, **how}))


def rows(batch):
    """What a batch holds, by image: the most patches, where it is from, how many were bad before it, its pixels."""
    images = batch["image"]
    numbers = (batch[name].tolist() for name in ("patches", "index", "replaced"))
    return list(zip(*numbers, [one.pixels() for one in images], strict=True))


def assert_same(one, other):
    assert len(one) == len(other)
    for mine, theirs in zip(one, other, strict=True):
        assert mine[:3] == theirs[:3] and torch.equal(mine[3], theirs[3])


@pytest.fixture(scope="module")
def whole():
    return [rows(batch) for batch in batches()]


def test_a_steps_patches_are_drawn_from_seed_and_step():
    drawn = [DRAWN(step) for step in range(3000)]
    assert drawn == [DrawnSize(4, (4, 9, 16), seed=3)(step) for step in range(3000)]
    assert all(abs(count - 1000) < 100 for count in Counter(size.most for size in drawn).values())
    assert [DrawnSize(4, (4, 9, 16), seed=4)(step) for step in range(20)] != drawn[:20]
    assert str(DRAWN) == "native, up to 4, 9 or 16 patches of 4 px, drawn for each step"
    assert str(DrawnSize(4, (9,), 0)) == "native, up to 9 patches of 4 px"


def test_a_batch_is_of_the_steps_patches(whole):
    for step, batch in enumerate(whole):
        assert {row[0] for row in batch} == {DRAWN(step).most}
        for most, _, _, image in batch:
            assert (image.shape[1] // 4) * (image.shape[2] // 4) <= most
    assert len({batch[0][0] for batch in whole}) > 1
    assert len({tuple(row[3].shape) for row in whole[0]}) > 2


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_the_same_batches(world, whole):
    of_ranks = [batches(rank=rank, world_size=world) for rank in range(world)]
    for step, expected in enumerate(whole):
        assert_same([row for rank in of_ranks for row in rows(rank[step])], expected)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_and_late_starts_change_nothing(workers, whole):
    late = batches(num_workers=workers, timeout=60, start_step=2, num_steps=4)
    for batch, expected in zip(late, whole[2:], strict=True):
        assert_same(rows(batch), expected)


def test_what_is_too_thin_is_counted_and_replaced():
    bad = {fault for batch in batches(num_steps=3) for fault in batch["bad"]}
    # Others are for the steps of 4 patches: those that a crop makes longer than 4 to 1.
    assert ("too_thin", "thin") in bad and {reason for reason, _ in bad} == {"too_thin"}


def test_without_variation_it_is_what_preprocessing_makes():
    pixels = np.random.default_rng(0).integers(0, 256, (30, 90, 3), np.uint8)
    plain = augment(pixels, NativeSize(4, 12), AugmentConfig(crop_scale=(1, 1)), np.random.default_rng(0))
    expected = native_patches(decode(pixels), 4, 12)
    assert torch.equal(plain.values, expected.values) and plain.grids.tolist() == expected.grids.tolist() == [2, 6]


def test_crops_have_the_aspect_of_the_image():
    pixels = np.zeros((40, 160, 3), np.uint8)
    config = AugmentConfig(crop_scale=(0.3, 0.5), crop_ratio=(1, 1))
    for seed in range(20):
        assert augment(pixels, NativeSize(4, 16), config, np.random.default_rng(seed)).grids.tolist() == [2, 8]


def test_a_jpeg_is_not_reduced_below_what_it_is_resized_to():
    ramp = np.linspace(0, 255, 800, dtype=np.float32)
    picture = np.broadcast_to((ramp[:200, None] + ramp[None]) / 2, (200, 800)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(picture).convert("RGB").save(buffer, "JPEG", quality=95)
    for most, reduced in ((16, 4), (64, 2), (1600, 1)):
        size = NativeSize(16 if most < 100 else 8, most)
        found = decode(buffer.getvalue(), None, size.room)
        assert found.shape[1:] == (200 // reduced, 800 // reduced)
        assert all(has >= wants for has, wants in zip(found.shape[1:], size.of(200, 800), strict=True))
    whole = AugmentConfig(crop_scale=(1, 1))
    ours = augment(buffer.getvalue(), NativeSize(16, 16), whole, np.random.default_rng(0)).pixels()
    fully = native_patches(decode(buffer.getvalue()), 16, 16).pixels()
    assert (ours.int() - fully.int()).abs().float().mean() < 2
    with pytest.raises(BadSample, match="too_thin"):
        augment(np.zeros((1, 65, 3), np.uint8), NativeSize(4, 64), whole, np.random.default_rng(0))
