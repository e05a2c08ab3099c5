"""The pictures of a model of native images: each in its own aspect, on white of the size that all fit on."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from native_model import SIZES, save_native
from PIL import Image
from towers import call_visualize

import contrastive
from contrastive.errors import UserError
from contrastive.visualize.pictured_model import PicturedModel, read_inputs
from contrastive.visualize.pictures import PICTURES
from contrastive.visualize.representations import reading_attention, rollout_reading, trace


def save_pictures(folder):
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number, (height, width) in enumerate(SIZES[:4]):
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(folder / f"{number}.png")
    return str(folder)


def test_maps_are_those_of_each_image(tmp_path):
    bundle = contrastive.load(save_native(tmp_path / "model", class_token=True))
    texts = ["a cat", "a dog"]
    inputs = read_inputs([save_pictures(tmp_path / "photos")], bundle.preprocess, limit=9, texts=texts)
    pictured = PicturedModel("m", bundle.model, bundle.preprocess, bundle.tokenizer, inputs)
    tower, grids = bundle.model.image_tower, inputs.images.grids.tolist()
    whole = [max(grid[side] for grid in grids) for side in (0, 1)]
    assert inputs.canvas.shape[2:] == (whole[0] * 8, whole[1] * 8) and len({tuple(grid) for grid in grids}) == 4
    maps, rolled = (pictured.maps(lambda seen, of=of: of(tower, seen)) for of in (reading_attention, rollout_reading))
    similar = pictured.text_maps[0]
    for row, (rows, columns) in enumerate(grids):
        seen = trace(tower, pictured.pixels[row].pixels()[None])
        wanted = reading_attention(tower, seen)[0, :, 1:].unflatten(-1, (rows, columns)) * (1 + rows * columns)
        torch.testing.assert_close(maps[row, :, :rows, :columns], wanted)
        for each in (maps[row, 0], rolled[row], similar[row, 0]):
            own = torch.zeros(each.shape, dtype=torch.bool)
            own[:rows, :columns] = True
            assert torch.equal(~each.isnan(), own)
        beside = inputs.canvas[row].clone()
        beside[:, : rows * 8, : columns * 8] = 255
        assert (beside == 255).all()
    first = pictured.pixels[0].pixels()[None]
    for tokens, of in zip(pictured.first_patches, (pictured.untrained, tower), strict=True):
        torch.testing.assert_close(tokens, of.forward_features(first)[0, 1:])
    assert pictured.grid == (min(rows for rows, _ in grids), min(columns for _, columns in grids))
    with pytest.raises(UserError, match=f"patch 3 0: the grid has rows 0 to {pictured.grid[0] - 1} "):
        replace(pictured, query=(3, 0))


def test_the_script_draws_all_of_it(tmp_path, monkeypatch, capfd):
    model, photos = save_native(tmp_path / "model"), save_pictures(tmp_path / "photos")
    texts = ("--text", "a cat", "--text", "a dog")
    result = call_visualize(monkeypatch, capfd, model, photos, *texts, "--out", tmp_path / "out")
    assert result.returncode == 0 and {path.stem for path in (tmp_path / "out").glob("*.png")} == set(PICTURES)
