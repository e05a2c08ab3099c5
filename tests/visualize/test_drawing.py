"""Heat over images: the colours of a value, and where they lie."""

import io

import numpy as np
import pytest
import torch
from towers import noise

from contrastive.visualize.draw_pictures import draw_beside, draw_maps, draw_positions
from contrastive.visualize.drawing import balanced, colour_scale, mosaic, over, panels, png, style, wrapped


def test_a_value_covers_the_pixels_of_its_patch_alone():
    image = torch.randint(0, 256, (3, 16, 24), dtype=torch.uint8)
    values = torch.zeros(2, 3)
    scale = colour_scale(torch.tensor([0.0, 1.0]))
    before = over(image, values, scale)
    values[1, 2] = 1.0
    changed = (over(image, values, scale) != before).any(axis=2)
    assert before.shape == (16, 24, 3) and before.dtype == np.uint8
    assert changed[8:, 16:].all() and changed.sum() == 64


def test_the_bar_has_the_colours_that_are_seen_over_middle_grey():
    image = torch.full((3, 4, 4), 255 // 2, dtype=torch.uint8)
    for scale in (colour_scale(torch.linspace(-2, 5, 50)), colour_scale(torch.linspace(-2, 5, 50), centre=True)):
        for value in (-2.0, 0.3, 5.0):
            seen = over(image, torch.full((1, 1), value), scale)[0, 0] / 255
            assert seen == pytest.approx(scale.to_rgba(value)[:3], abs=0.02)


def test_heat_over_black_and_white_stays_within_the_colours():
    scale = colour_scale(torch.tensor([0.0, 1.0]))
    for level in (0, 255):
        image = torch.full((3, 4, 4), level, dtype=torch.uint8)
        for value in (0.0, 1.0):
            seen = over(image, torch.full((1, 1), value), scale)[0, 0] / 255
            pure = np.array(scale.to_rgba(value)[:3]) + 0.19 * (level / 255 - 0.5)
            assert seen == pytest.approx(pure, abs=0.005)  # nothing wrapped around in uint8


def test_scales():
    values = torch.tensor([-1.0, 0.0, 4.0])
    assert (colour_scale(values).norm.vmin, colour_scale(values).norm.vmax) == (-1, 4)
    centred = colour_scale(values, centre=True)
    assert (centred.norm.vmin, centred.norm.vmax) == (-4, 4) and not centred.cmap.colorbar_extend
    many = torch.cat([torch.linspace(0, 1, 999), torch.tensor([50.0])])
    cut = colour_scale(many, cut=0.01)
    assert cut.cmap.colorbar_extend == "max" and cut.norm.vmax < 1.01
    assert not colour_scale(torch.tensor([-0.3, -0.1])).cmap.colorbar_extend
    root = colour_scale(torch.tensor([0.0, 36.0]), low=0.0, root=True)
    assert root.norm(9.0) == pytest.approx(0.5)
    alike = colour_scale(torch.ones(4))  # no range at all
    assert alike.norm.vmin < 1 < alike.norm.vmax


def test_panels_show_the_pixels_unsmoothed_and_in_their_places():
    tiles = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    with style():
        axes = panels(tiles, 3, ["x"] * 6)
    axes.figure.savefig(file := io.BytesIO(), format="rgba")
    width, height = (axes.figure.get_size_inches() * axes.figure.dpi).astype(int)
    picture = np.frombuffer(file.getvalue(), np.uint8).reshape(height, width, 4)
    step = 8 + round(8 / 1.3 * (0.08 + 0.05 + 0.135)), 8 + 1  # what stands between the panels, in their pixels
    for place, tile in enumerate(tiles):
        for row, column in np.ndindex(8, 8):
            at = (place % 3 * step[1] + column, place // 3 * step[0] + row)
            x, y = axes.transData.transform(at)  # from the lower left corner
            assert picture[height - 1 - int(y), int(x), :3].tolist() == tile[row, column].tolist()


def test_drawings_have_a_panel_for_each_map():
    images = torch.zeros(3, 3, 8, 16, dtype=torch.uint8)
    maps = noise(3, 9, 2, 4)
    labels = ["a text with $dollars$ and many words that go on and on beyond the room", *"bcdefghi"]
    figure = draw_maps(images, ["x" * 50] * 3, maps, labels, colour_scale(maps), unit="u", marked=(1, 3))
    (axes,) = figure.axes
    texts = [text.get_text() for text in axes.texts]
    assert len(texts) == 3 * 10 and texts[0] == "…" + "x" * 16 and texts[1].count("\n") == 2
    assert len(axes.patches) == 3 * 10  # a frame in the image and in each of its nine maps
    assert len(axes.child_axes) == 1  # the bar
    assert png(figure, "a $title$")[:4] == b"\x89PNG"
    beside = draw_beside(images, ["x"] * 3, [np.zeros((2, 4, 3), np.uint8)] * 3).axes[0]
    assert beside.images[0].get_array().shape[1] == 6 * 16 + 5 * 1


def test_maps_of_a_large_grid_are_some_of_them():
    similarity = torch.eye(20 * 30).unflatten(0, (20, 30)).unflatten(-1, (20, 30))
    axes = draw_positions(similarity).axes[0]
    rows, columns = axes.images[0].get_array().shape
    gap = 30 // 8
    assert (rows, columns) == (16 * (20 + gap) - gap, 16 * (30 + gap) - gap)
    assert axes.get_xticklabels()[0].get_text() == "0"


def test_mosaic():
    tiles = np.arange(5.0)[:, None, None].repeat(2, axis=1).repeat(3, axis=2)
    whole = mosaic(tiles, 3, (1, 1), np.nan)
    assert whole.shape == (5, 11)
    assert (whole[:2, 4:7] == 1).all() and (whole[3:, :3] == 3).all()
    assert np.isnan(whole[2]).all() and np.isnan(whole[3:, 8:]).all()


def test_labels():
    assert wrapped("one two three four", 9, 2) == "one two\nthree…"
    assert wrapped("  one\n two ", 20, 2) == "one two" and wrapped("", 9, 2) == ""
    assert balanced(14, 8) == (2, 7) and balanced(6, 8) == (1, 6) and balanced(18, 8) == (3, 6)
