"""Heat over images: the colours of a value, and where they lie."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from towers import noise

from contrastive.visualize.draw_pictures import draw_beside, draw_maps, draw_positions
from contrastive.visualize.drawing import DPI, Heat, Sheet, balanced, mosaic, png, wrapped


def test_a_value_covers_the_pixels_of_its_patch_alone():
    image = torch.randint(0, 256, (3, 16, 24), dtype=torch.uint8)
    values = torch.zeros(2, 3)
    heat = Heat(torch.tensor([0.0, 1.0]))
    before = heat.over(image, values)
    values[1, 2] = 1.0
    changed = np.abs(heat.over(image, values) - before).max(axis=2) > 1e-9
    assert before.shape == (16, 24, 3)
    assert changed[8:, 16:].all() and changed.sum() == 64
    assert before.min() >= 0 and before.max() <= 1


def test_the_bar_has_the_colours_that_are_seen_over_middle_grey():
    image = torch.full((3, 4, 4), 255 // 2, dtype=torch.uint8)
    for heat in (Heat(torch.linspace(-2, 5, 50)), Heat(torch.linspace(-2, 5, 50), centre=True)):
        for value in (-2.0, 0.3, 5.0):
            seen = heat.over(image, torch.full((1, 1), value))[0, 0]
            assert seen == pytest.approx(heat.bar_colours(heat.norm(value))[:3], abs=0.02)


def test_scales():
    values = torch.tensor([-1.0, 0.0, 4.0])
    assert (Heat(values).norm.vmin, Heat(values).norm.vmax) == (-1, 4)
    centred = Heat(values, centre=True)
    assert (centred.norm.vmin, centred.norm.vmax) == (-4, 4) and not centred.cut_off
    many = torch.cat([torch.linspace(0, 1, 999), torch.tensor([50.0])])
    cut = Heat(many, cut=0.01)
    assert cut.cut_off and cut.norm.vmax < 1.01
    assert not Heat(torch.tensor([-0.3, -0.1])).cut_off
    root = Heat(torch.tensor([0.0, 36.0]), low=0.0, root=True)
    assert root.norm(9.0) == pytest.approx(0.5) and root.ticks == [0, 0.5, 2, 5, 10, 20]
    alike = Heat(torch.ones(4))  # no range at all
    assert alike.norm.vmin < 1 < alike.norm.vmax


def test_panels_show_the_pixels_unsmoothed_and_in_their_places():
    sheet = Sheet(2, 3, (4, 4), title="a title", panel=1.0, has_bar=False)
    colours = np.random.default_rng(0).integers(0, 256, (6, 4, 4, 3), dtype=np.uint8)
    places = [sheet.show(place // 3, place % 3, colours[place], "x") for place in range(6)]
    picture = np.array(Image.open(io.BytesIO(png(sheet.figure))).convert("RGB"))
    for place, (left, top) in enumerate(places):
        for row in range(4):
            for column in range(4):
                x, y = left + (column + 0.5) / 4, top + (row + 0.5) / 4  # inches
                assert picture[int(y * DPI), int(x * DPI)].tolist() == colours[place, row, column].tolist()


def test_drawings_have_a_panel_for_each_map():
    images = torch.zeros(3, 3, 8, 16, dtype=torch.uint8)
    maps = noise(3, 9, 2, 4)
    labels = ["a text with $dollars$ and many words that go on and on beyond the room", *"bcdefghi"]
    figure = draw_maps(images, ["x" * 50] * 3, maps, labels, Heat(maps), title="t", unit="u", marked=(1, 3))
    sheet, _bar = figure.axes
    assert len(sheet.images) == 3 * 10  # the image and nine maps each
    assert len(sheet.patches) == 2 * len(sheet.images)  # two lines make a frame
    assert png(figure)[:4] == b"\x89PNG"
    assert len(draw_beside(images, ["x"] * 3, [np.zeros((2, 4, 3))] * 3, title="t").axes[0].images) == 6


def test_maps_of_a_large_grid_are_some_of_them():
    similarity = torch.eye(20 * 30).unflatten(0, (20, 30)).unflatten(-1, (20, 30))
    axes = draw_positions(similarity, title="t").axes[0]
    rows, columns = axes.images[0].get_array().shape
    gap = 30 // 8
    assert (rows, columns) == (16 * (20 + gap) - gap, 16 * (30 + gap) - gap)
    assert axes.get_xticklabels()[0].get_text() == "0"


def test_mosaic():
    tiles = torch.arange(5.0)[:, None, None].expand(-1, 2, 3)
    sheet = mosaic(tiles, columns=3, gap=1)
    assert sheet.shape == (5, 11)
    assert (sheet[:2, 4:7] == 1).all() and (sheet[3:, :3] == 3).all()
    assert np.isnan(sheet[2]).all() and np.isnan(sheet[3:, 8:]).all()


def test_labels():
    assert wrapped("one two three four", 9, 2) == "one two\nthree…"
    assert wrapped("  one\n two ", 20, 2) == "one two" and wrapped("", 9, 2) == ""
    assert balanced(14, 8) == (2, 7) and balanced(6, 8) == (1, 6) and balanced(18, 8) == (3, 6)
