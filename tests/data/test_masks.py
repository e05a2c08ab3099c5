"""Masks of pixels: those of rendered scenes, of folders and of tables, and what is refused."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from refusals import refused

from contrastive.data.decode import decode_mask
from contrastive.data.preprocess import Preprocess, PreprocessConfig
from contrastive.data.record import BadSample
from contrastive.data.sources import open_source
from contrastive.data.sources.scene_layout import SHAPES, Scene
from contrastive.data.sources.scenes import RGB, Scenes, render

HALVES = np.repeat(np.array([[0, 2]], np.uint8), [4, 4], axis=1).repeat(6, axis=0)  # 6 rows, 8 columns


def png(array, mode=None, kind="PNG"):
    stream = io.BytesIO()
    Image.fromarray(array, mode).save(stream, kind)
    return stream.getvalue()


def palette(array):
    picture = Image.fromarray(array)
    picture.putpalette([(7 * place) % 256 for place in range(768)])  # colours say nothing of the classes
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
def folder(tmp_path):
    """Three images, a mask for two of them, and one of no image."""
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    for name in "abc":
        (tmp_path / "images" / f"{name}.jpg").write_bytes(png(np.zeros((6, 8, 3), np.uint8), kind="JPEG"))
    for name in "acd":
        (tmp_path / "masks" / f"{name}.png").write_bytes(palette(HALVES))
    return tmp_path


@pytest.mark.parametrize("image_size", [48, 33])
def test_a_scenes_mask_is_where_the_renderer_put_ink(image_size):
    source, pixels = Scenes("masks", image_size), 0
    for index in range(60):
        record, scene = source[index], source.describe(index)
        ground = render(Scene(scene.backdrop, (), None), image_size).astype(float)
        expected, sure = np.zeros((image_size, image_size), int), np.ones((image_size, image_size), bool)
        for thing in scene.things:  # they do not touch: each alone makes its part of the picture
            alone = render(Scene(scene.backdrop, (thing,), None), image_size)
            ink = np.clip(np.array(RGB[thing.colour]) + thing.tint, 0, 255)
            share = ((alone - ground) * (ink - ground)).sum(2) / ((ink - ground) ** 2).sum(2)
            expected[share >= 0.5] = 1 + SHAPES.index(thing.shape)
            sure &= abs(share - 0.5) > 0.02  # bytes are rounded
        np.testing.assert_array_equal(record.image, render(scene, image_size))
        np.testing.assert_array_equal(record.mask[sure], expected[sure])
        pixels += (~sure).sum()
    assert pixels < 0.01 * 60 * image_size**2 and record.mask.dtype == np.uint8


def test_scenes_with_masks_are_none_that_is_trained_on():
    source, seen = Scenes("masks"), {Scenes("train")[index].image.tobytes() for index in range(1000)}
    assert not seen & {source[index].image.tobytes() for index in range(500)} and not source.labelled
    shares = np.bincount(np.concatenate([source[index].mask.ravel() for index in range(500)]), minlength=9)
    assert len(shares) == len(source.mask_names) == 9 and shares.min() > 0.005 * shares.sum()
    assert Scenes("train")[0].mask is None and not Scenes("val").masked


def test_a_folder_of_masks(folder):
    (folder / "classnames.txt").write_text("sky\ncat\ndog\n")
    source = open_source(str(folder))
    assert [source[index].key for index in range(len(source))] == ["images/a.jpg", "images/c.jpg"]
    assert source.masked and source.mask_names == ("sky", "cat", "dog")
    assert {reason: found["keys"] for reason, found in source.left_aside.items()} == {
        "images without a mask": ["b.jpg"],
        "masks without image": ["d.png"],
    }
    np.testing.assert_array_equal(decode_mask(source[0].mask, (6, 8), source.mask_names, (255,), "a"), HALVES)


def test_splits_of_folders_and_of_lists(folder):
    (folder / "ImageSets" / "Segmentation").mkdir(parents=True)
    (folder / "ImageSets" / "Segmentation" / "val.txt").write_text("b\nc\n")
    assert [open_source(f"{folder}:val")[0].key, len(open_source(f"{folder}:val"))] == ["images/c.jpg", 1]
    refused(f"{folder}:test", "unknown split 'test'; use val")
    for name in ("images", "masks"):
        inner = folder / "ade" / {"images": "images", "masks": "annotations"}[name]
        inner.mkdir(parents=True)
        for split in ("training", "validation"):
            (folder / name).rename(inner / split) if split == "training" else (inner / split).mkdir()
    refused(folder / "ade", "has the splits training; give one")
    assert len(open_source(f"{folder}/ade:training")) == 2


def test_what_no_folder_of_masks_is(folder):
    refused(f"{folder}:val", "'masks' has no folders, nor is there .*val.txt; leave ':val' out")
    for path in (folder / "masks").iterdir():
        path.rename(path.with_stem(f"{path.stem}_mask"))
    refused(folder, "no image has a mask of its name: 'images' has 'a.jpg', 'masks' has 'a_mask.png'")
    for path in (folder / "masks").iterdir():
        path.rename(path.with_suffix(".json"))
    refused(folder, "one class folder only")  # images and annotations of COCO, say


@pytest.mark.parametrize("kind", ["csv", "parquet", "saved"])
def test_a_table_with_a_mask_column(folder, kind):
    rows = {"image": [f"images/{name}.jpg" for name in "ac"], "mask": [f"masks/{name}.png" for name in "ac"]}
    if kind == "csv":
        spec = folder / "x.csv"
        spec.write_text("image,mask\n" + "".join(f"{a},{b}\n" for a, b in zip(*rows.values(), strict=True)))
    else:
        packed = {name: [{"bytes": (folder / at).read_bytes(), "path": at} for at in of] for name, of in rows.items()}
        spec = folder / "x.parquet"
        if kind == "parquet":
            pq.write_table(pa.table(packed), spec, row_group_size=1)
        else:
            import datasets

            pictures = datasets.Features(image=datasets.Image(), annotation=datasets.Image())
            packed["annotation"] = packed.pop("mask")
            datasets.Dataset.from_dict(packed, features=pictures).save_to_disk(spec)
    source = open_source(str(spec))
    assert len(source) == 2 and source.masked and "mask: column" in source.reading
    for index in range(2):
        np.testing.assert_array_equal(decode_mask(source[index].mask, (6, 8), None, (), ""), HALVES)


def test_a_missing_mask_does_not_spoil_the_row(folder):
    (folder / "x.csv").write_text("image,mask,caption\nimages/a.jpg,masks/none.png,a cat\n")
    record = open_source(str(folder / "x.csv"))[0]
    assert record.mask is None and record.captions == ("a cat",)


def test_columns_of_texts_are_no_masks(folder):
    (folder / "x.csv").write_text("image,annotation\nimages/a.jpg,a cat\n")
    refused(folder / "x.csv", "neither captions nor labels")


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (png(HALVES.repeat(2, axis=0)), "a: the mask has 8×12 pixels, its image 8×6; they have to be the same"),
        (png(np.stack([HALVES] * 3, axis=2)), "picture of kind RGB; masks are PNGs of class indices"),
        (png(HALVES, kind="JPEG"), "the mask is a JPEG, which blurs them"),
        (png(HALVES + np.uint8(7)), "has the value 7, but there are 3 class names, of 0 to 2"),
        (HALVES.astype(int) * 200, "has the value 400; classes go from 0 to 255"),
    ],
)
def test_refused_masks(mask, message):
    with pytest.raises(Exception, match=message):
        decode_mask(mask, (6, 8), ("sky", "cat", "dog"), (255,), "a")


def test_good_and_damaged_files():
    for good in (png(HALVES), palette(HALVES), png(HALVES.astype(np.uint16)), HALVES):
        np.testing.assert_array_equal(decode_mask(good, (6, 8), ("sky", "cat", "dog"), (255,), "a"), HALVES)
    border = np.where(HALVES == 2, np.uint8(255), HALVES)
    assert decode_mask(png(border), (6, 8), ("sky",), (255,), "a").max() == 255
    for bad in (b"", b"no image", png(HALVES)[:40]):
        with pytest.raises(BadSample, match="unreadable_mask"):
            decode_mask(bad, (6, 8), None, (), "a")


@pytest.mark.parametrize("options", [{}, {"resize": "crop"}, {"short_side": 40, "cut": "floor"}, {"cut": "corner"}])
def test_masks_go_where_pictures_go(options):
    preprocess = Preprocess(PreprocessConfig(image_size=32, **options))
    mask = np.zeros((91, 57), np.uint8)
    mask[30:70, 10:33] = 5
    image = preprocess.pixels(np.where(mask[..., None] == 5, np.uint8(250), np.uint8(0)).repeat(3, axis=2))[0]
    found = preprocess.mask(mask)
    assert found.shape == (32, 32) and set(found.unique().tolist()) == {0, 5}
    sure = (image < 60) | (image > 190)
    assert sure.float().mean() > 0.8 and torch.equal(found[sure] == 5, image[sure] > 190)
