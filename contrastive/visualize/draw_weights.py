"""Drawing: position embeddings and patch filters, as tiles on one sheet."""

import math
from typing import TYPE_CHECKING

import numpy as np
import torch

from contrastive.visualize.drawing import INK, MARGIN, Heat, bare, colour_bar, mosaic, new_figure
from contrastive.visualize.weights import FilterComponents, evenly_spread

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_POSITIONS = 16
"""Rows and columns of maps; of larger grids some are shown."""
SIDE = 5.6  # inches
HEAD, FOOT = 0.34, 0.97


def draw_positions(similarity: torch.Tensor, *, title: str) -> "Figure":
    """Draw (rows, columns, rows, columns) cosines: a map for each position, in the places of the positions."""
    rows, columns = similarity.shape[:2]
    shown_rows, shown_columns = evenly_spread(rows, MAX_POSITIONS), evenly_spread(columns, MAX_POSITIONS)
    chosen = similarity[shown_rows][:, shown_columns].flatten(0, 1)
    heat = Heat(similarity, over_images=False)
    # The gap has to be seen between maps of many cells, too.
    gap = max(1, columns // 8)
    tiles = mosaic(chosen, len(shown_columns), gap)
    figure, axes = _sheet(tiles.shape[0] / tiles.shape[1], title, has_bar=True)
    axes.imshow(np.ma.masked_invalid(tiles), cmap=heat.colours, norm=heat.norm, interpolation="nearest", aspect="auto")
    _count(axes.xaxis, shown_columns, columns, gap)
    _count(axes.yaxis, shown_rows, rows, gap)
    axes.set_xlabel("column of the patch", fontsize=7.5, color=INK)
    axes.set_ylabel("row of the patch", fontsize=7.5, color=INK)
    height = figure.get_figheight()
    bar = figure.add_axes((0.62 / SIDE, 0.36 / height, 3.2 / SIDE, 0.1 / height))
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
    figure, axes = _sheet(tiles.shape[0] / tiles.shape[1], title, has_bar=False)
    axes.imshow(np.nan_to_num(tiles, nan=1.0), interpolation="nearest", aspect="auto")
    bare(axes)
    return figure


def _sheet(proportion: float, title: str, has_bar: bool):
    """A figure `SIDE` inches wide with one axes of that height to width."""
    left, foot = (0.5, FOOT) if has_bar else (MARGIN, MARGIN)
    width = SIDE - left - MARGIN
    height = width * proportion
    total = HEAD + height + foot
    figure = new_figure(SIDE, total)
    figure.text(MARGIN / SIDE, 1 - 0.12 / total, title, va="top", fontsize=10, color=INK, parse_math=False)
    axes = figure.add_axes((left / SIDE, foot / total, width / SIDE, height / total))
    return figure, axes


def _count(axis, numbers: list[int], size: int, gap: int) -> None:
    """Write the numbers of the shown positions at the middle of their maps of so many cells."""
    places = [place * (size + gap) + (size - 1) / 2 for place in range(len(numbers))]
    axis.set_ticks(places, [str(number) for number in numbers])
    axis.set_tick_params(length=0, labelsize=7)
    for spine in axis.axes.spines.values():
        spine.set_visible(False)
