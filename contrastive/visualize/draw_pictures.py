"""Each kind of picture drawn: maps over images, patch filters and positions, embeddings, images against texts."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from contrastive.visualize.drawing import (
    GAP,
    INK,
    MARGIN,
    Heat,
    Sheet,
    as_picture,
    balanced,
    bare,
    colour_bar,
    frame,
    mosaic,
    new_figure,
    shortened,
    wrapped,
)
from contrastive.visualize.representations import FilterComponents, effective_rank, evenly_spread, mean_cosine

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_COLUMNS = 8
LABEL_CHARACTERS, NAME_CHARACTERS = 20, 17
MAX_POSITIONS = 16
"""Rows and columns of maps of positions; of larger grids some are shown."""
MAX_WRITTEN = 16
"""Rows and columns up to which each cell's value is written."""
# Inches.
LABEL_WIDTH = 2.3
SIDE = 5.6


def draw_maps(
    images: torch.Tensor,
    names: Sequence[str],
    maps: torch.Tensor,
    labels: Sequence[str],
    heat: Heat,
    *,
    title: str,
    unit: str,
    marked: tuple[int, int] | None = None,
) -> "Figure":
    """Draw each image, and after it its maps over it, all in one scale of colours.

    Args:
        images: (B, 3, H, W) uint8.
        names: B.
        maps: (B, K, rows, columns), one value a patch.
        labels: K, over the maps.
        unit: what the values are, for the colour bar.
        marked: (row, column) of a patch to frame in every panel.
    """
    rows, columns = balanced(1 + maps.shape[1], MAX_COLUMNS)
    labels = [wrapped(label, LABEL_CHARACTERS, 3) for label in labels]
    lines = max(1 + label.count("\n") for label in labels)
    sheet = Sheet(rows * len(images), columns, images.shape[-2:], title=title, title_lines=lines)
    for number, (image, name) in enumerate(zip(images, shortened(names, NAME_CHARACTERS), strict=True)):
        pictures = [as_picture(image), *(heat.over(image, values) for values in maps[number])]
        for place, (picture, label) in enumerate(zip(pictures, [name, *labels], strict=True)):
            at = (number * rows + place // columns, place % columns)
            sheet.show(*at, picture, label)
            if marked:
                sheet.frame(*at, marked, maps.shape[-2:])
    sheet.bar(heat, unit)
    return sheet.figure


def draw_beside(
    images: torch.Tensor,
    names: Sequence[str],
    pictures: Sequence[np.ndarray],
    *,
    title: str,
    heat: Heat | None = None,
    unit: str = "",
) -> "Figure":
    """Draw images (B, 3, H, W), and to the right of each the picture (H', W', 3) that was made of it."""
    pairs = min(len(images), MAX_COLUMNS // 2)
    sheet = Sheet(-(-len(images) // pairs), 2 * pairs, images.shape[-2:], title=title, has_bar=heat is not None)
    for number, (image, name) in enumerate(zip(images, shortened(names, NAME_CHARACTERS), strict=True)):
        row, column = number // pairs, 2 * (number % pairs)
        sheet.show(row, column, as_picture(image), name)
        sheet.show(row, column + 1, pictures[number])
    if heat is not None:
        sheet.bar(heat, unit)
    return sheet.figure


def draw_positions(similarity: torch.Tensor, *, title: str) -> "Figure":
    """Draw (rows, columns, rows, columns) cosines: a map for each position, in the places of the positions."""
    rows, columns = similarity.shape[:2]
    shown_rows, shown_columns = evenly_spread(rows, MAX_POSITIONS), evenly_spread(columns, MAX_POSITIONS)
    chosen = similarity[shown_rows][:, shown_columns].flatten(0, 1)
    heat = Heat(similarity, over_images=False)
    # The gap has to be seen between maps of many cells, too.
    gap = max(1, columns // 8)
    tiles = mosaic(chosen, len(shown_columns), gap)
    left, head, foot = 0.5, 0.34, 0.97
    width = SIDE - left - MARGIN
    height = width * tiles.shape[0] / tiles.shape[1]
    total = head + height + foot
    figure = new_figure(SIDE, total, title)
    axes = figure.add_axes((left / SIDE, foot / total, width / SIDE, height / total))
    heat.show(axes, np.ma.masked_invalid(tiles))
    axes.spines[:].set_visible(False)
    for axis, name, numbers, size in (
        (axes.xaxis, "column", shown_columns, columns),
        (axes.yaxis, "row", shown_rows, rows),
    ):
        # Their numbers at the middle of the maps of so many cells.
        axis.set_ticks([place * (size + gap) + (size - 1) / 2 for place in range(len(numbers))], map(str, numbers))
        axis.set_tick_params(length=0, labelsize=7)
        axis.set_label_text(f"{name} of the patch", fontsize=7.5, color=INK)
    bar = figure.add_axes((0.62 / SIDE, 0.36 / total, 3.2 / SIDE, 0.1 / total))
    colour_bar(figure, bar, heat, "cosine of the position embeddings")
    return figure


def draw_components(components: FilterComponents, *, title: str, most: int = 28) -> "Figure":
    """Draw the first principal components of the filters as RGB, each stretched to its own range, grey is 0."""
    filters = components.filters[:most]
    peaks = filters.abs().amax(dim=(1, 2, 3), keepdim=True).clamp(min=1e-12)
    return _draw_filters(filters / peaks, title)


def draw_filters(filters: torch.Tensor, *, title: str) -> "Figure":
    """Draw filters (K, 3, p, p) as RGB in one scale, grey is 0; the highest thousandth of the values is cut off."""
    peak = torch.quantile(filters.abs().flatten()[:1_000_000], 0.999).clamp(min=1e-12)
    return _draw_filters((filters / peak).clamp(-1, 1), title)


def _draw_filters(filters: torch.Tensor, title: str) -> "Figure":
    columns = max(1, min(len(filters), math.ceil(math.sqrt(1.75 * len(filters)))))
    tiles = mosaic(filters / 2 + 0.5, columns, gap=max(1, filters.shape[-1] // 8))
    panel = SIDE - 2 * MARGIN
    sheet = Sheet(1, 1, tiles.shape, title=title, panel=panel, title_lines=0, has_bar=False)
    sheet.show(0, 0, np.nan_to_num(tiles, nan=1.0))
    return sheet.figure


def draw_embeddings(untrained: torch.Tensor, trained: torch.Tensor, *, title: str) -> "Figure":
    """Draw two sets of unit-length embeddings (B, E) of the same images: values on the left, cosines on the right."""
    values = Heat(torch.cat([untrained, trained]), centre=True, over_images=False, cut=0.002)
    cosines = [features @ features.T for features in (untrained, trained)]
    alike = Heat(torch.stack(cosines), over_images=False, high=1.0)
    figure = new_figure(10, 5.3, title)
    for row, (name, features) in enumerate((("untrained", untrained), ("this model", trained))):
        bottom = 0.55 - row * 0.425
        left = figure.add_axes((0.045, bottom, 0.6, 0.31))
        values.show(left, features.cpu().numpy())
        left.set_title(
            f"{name}: effective rank {effective_rank(features):.1f} of at most {min(features.shape)}, "
            f"mean cosine of two images {mean_cosine(features):.2f}",
            fontsize=8.5,
            loc="left",
            color=INK,
        )
        right = figure.add_axes((0.755, bottom, 0.165, 0.31))
        alike.show(right, cosines[row].cpu().numpy(), aspect="equal")
        for axes in (left, right):
            axes.tick_params(labelsize=7, length=2)
            axes.spines[:].set_visible(False)
        left.set_ylabel("image", fontsize=7.5)
        for axis in (left.yaxis, right.xaxis, right.yaxis):
            axis.get_major_locator().set_params(integer=True)
    left.set_xlabel("dimension of the embedding", fontsize=7.5)
    right.set_xlabel("image", fontsize=7.5)
    colour_bar(figure, figure.add_axes((0.66, 0.125, 0.009, 0.735)), values, "value", "vertical")
    colour_bar(figure, figure.add_axes((0.94, 0.125, 0.009, 0.735)), alike, "cosine", "vertical")
    return figure


def draw_match(
    images: torch.Tensor,
    texts: Sequence[str],
    cosines: torch.Tensor,
    probabilities: torch.Tensor,
    own: Sequence[int | None],
    *,
    title: str,
    probability_title: str,
) -> "Figure":
    """Draw images (B, 3, H, W) over the columns, texts at the rows: cosines (B, T), then probabilities (B, T).

    own: of each image the number of its own text, which is framed.
    """
    count, side_by_side = len(images), len(images) <= 6
    cell = 0.62 if count <= 6 else 0.5 if count <= MAX_WRITTEN else max(0.12, 8 / count)
    row_height = 0.34
    across, down = count * cell, len(texts) * row_height
    block = 0.5 + cell + down  # a title, the images, the cells
    width = LABEL_WIDTH + 2 * MARGIN + (2 if side_by_side else 1) * (across + 0.85)
    width = max(width, LABEL_WIDTH + 0.08 * len(probability_title))
    height = 0.4 + (1 if side_by_side else 2) * block + MARGIN
    figure = new_figure(width, height, title)
    parts = (
        ("cosine", cosines, Heat(cosines, over_images=False, colours="Blues")),
        (probability_title, probabilities, Heat(probabilities, over_images=False, low=0.0, high=1.0, colours="Blues")),
    )
    for place, (name, values, heat) in enumerate(parts):
        left = LABEL_WIDTH + MARGIN + (place * (across + 0.85) if side_by_side else 0)
        top = 0.4 + (0 if side_by_side else place * block)
        named = place == 0 or not side_by_side

        def at(x: float, y: float, w: float, h: float):
            return figure.add_axes((x / width, 1 - (y + h) / height, w / width, h / height))

        figure.text(left / width, 1 - (top + 0.05) / height, name, va="top", fontsize=8.5, color=INK)
        for number, image in enumerate(images):
            thumbnail = at(left + number * cell + GAP / 4, top + 0.28, cell - GAP / 2, cell - GAP / 2)
            thumbnail.imshow(as_picture(image), interpolation="nearest")
            bare(thumbnail)
        cells = at(left, top + 0.3 + cell, across, down)
        _cells(cells, values.T.cpu().numpy(), heat, written=count <= MAX_WRITTEN)
        for number, text in enumerate(own):
            if text is not None:
                frame(cells, (number - 0.5, text - 0.5), 1, 1, ((2.6, "white"), (1.2, "#0a7f5a")))
        cells.set_yticks(range(len(texts)), [wrapped(text, 36, 2) for text in texts] if named else [])
        for label in cells.get_yticklabels():
            label.set(fontsize=7.5, parse_math=False, linespacing=1.0)
        bar = at(left + across + 0.1, top + 0.3 + cell, 0.08, max(down, 0.34))
        colour_bar(figure, bar, heat, "", "vertical")
    return figure


def _cells(axes, values: np.ndarray, heat: Heat, written: bool) -> None:
    heat.show(axes, values)
    bare(axes)
    axes.tick_params(length=0)
    if not written:
        return
    for (row, column), value in np.ndenumerate(values):
        colour = "white" if heat.norm(value) > 0.55 else "black"
        axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour)
