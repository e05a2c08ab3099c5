"""Each kind of picture drawn: maps over images, patch filters and positions, embeddings, images against texts."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from contrastive.visualize.drawing import (
    as_array,
    as_picture,
    as_uint8,
    balanced,
    bar_below,
    colour_scale,
    frame,
    mosaic,
    over,
    panels,
    shortened,
    spread,
    style,
    whole_axes,
    wrapped,
)
from contrastive.visualize.representations import effective_rank, evenly_spread, mean_cosine

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

MAX_COLUMNS = 8
LABEL_CHARACTERS, NAME_CHARACTERS = 20, 17
MAX_POSITIONS = 16
"""Rows and columns of maps of positions; of larger grids some are shown."""
MAX_WRITTEN = 16
"""Images up to which each cell's value is written."""
SIDE = 5.4
"""Width in inches of pictures that are one mosaic."""


@style()
def draw_maps(
    images: torch.Tensor,
    names: Sequence[str],
    maps: torch.Tensor,
    labels: Sequence[str],
    scale: "ScalarMappable",
    *,
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
    # Each image begins a row of its own: what is left of its last one stays white.
    blank = [np.full_like(as_picture(images[0]), 255)] * (rows * columns - 1 - maps.shape[1])
    after = [*(wrapped(label, LABEL_CHARACTERS, 3) for label in labels), *[""] * len(blank)]
    tiles, over_tiles = [], []
    for image, name, own in zip(images, shortened(names, NAME_CHARACTERS), maps, strict=True):
        tiles += [as_picture(image), *(over(image, values, scale) for values in own), *blank]
        over_tiles += [name, *after]
    if marked:
        height, width = images.shape[-2] / maps.shape[-2], images.shape[-1] / maps.shape[-1]
        marked = (marked[1] * width, marked[0] * height, width, height)
    axes = panels(np.stack(tiles), columns, over_tiles, marked)
    bar_below(axes, scale, unit)
    return axes.figure


@style()
def draw_beside(
    images: torch.Tensor,
    names: Sequence[str],
    pictures: Sequence[np.ndarray],
    scale: "ScalarMappable | None" = None,
    unit: str = "",
) -> "Figure":
    """Draw images (B, 3, H, W), and right of each the uint8 picture (rows, columns, 3) that was made of it."""
    tiles, labels = [], []
    for image, name, picture in zip(images, shortened(names, NAME_CHARACTERS), pictures, strict=True):
        tiles += [as_picture(image), spread(picture, image.shape[1:])]
        labels += [name, ""]
    axes = panels(np.stack(tiles), min(len(tiles), MAX_COLUMNS), labels)
    if scale is not None:
        bar_below(axes, scale, unit)
    return axes.figure


@style()
def draw_positions(similarity: torch.Tensor) -> "Figure":
    """Draw (rows, columns, rows, columns) cosines: a map for each position, in the places of the positions."""
    rows, columns = similarity.shape[:2]
    shown_rows, shown_columns = evenly_spread(rows, MAX_POSITIONS), evenly_spread(columns, MAX_POSITIONS)
    chosen = as_array(similarity[shown_rows][:, shown_columns].flatten(0, 1))
    scale = colour_scale(similarity, over_images=False)
    # The gap has to be seen between maps of many cells, too.
    gap = max(1, columns // 8)
    tiles = mosaic(chosen, len(shown_columns), (gap, gap), np.nan)
    axes = whole_axes(np.ma.masked_invalid(tiles), SIDE, scale)
    # Their numbers at the middle of the maps of so many cells.
    axes.set_xticks([(columns + gap) * place + (columns - 1) / 2 for place in range(len(shown_columns))], shown_columns)
    axes.set_yticks([(rows + gap) * place + (rows - 1) / 2 for place in range(len(shown_rows))], shown_rows)
    axes.tick_params(length=0)
    axes.set(xlabel="column of the patch", ylabel="row of the patch")
    bar_below(axes, scale, "cosine of the position embeddings", distance=0.52)
    return axes.figure


def draw_components(filters: torch.Tensor, most: int = 28) -> "Figure":
    """Draw the first of the principal components of the filters as RGB, each stretched to its range, grey is 0."""
    filters = filters[:most]
    return _draw_filters(filters / filters.abs().amax(dim=(1, 2, 3), keepdim=True).clamp(min=1e-12))


def draw_filters(filters: torch.Tensor) -> "Figure":
    """Draw filters (K, 3, p, p) as RGB in one scale, grey is 0; the highest thousandth of the values is cut off."""
    peak = torch.quantile(filters.abs().flatten()[:1_000_000], 0.999).clamp(min=1e-12)
    return _draw_filters((filters / peak).clamp(-1, 1))


@style()
def _draw_filters(filters: torch.Tensor) -> "Figure":
    columns, gap = math.ceil(math.sqrt(1.75 * len(filters))), max(1, filters.shape[-1] // 8)
    tiles = as_uint8(as_picture(filters.detach() / 2 + 0.5))
    return whole_axes(mosaic(tiles, min(len(tiles), columns), (gap, gap)), SIDE).figure


@style()
def draw_embeddings(untrained: torch.Tensor, trained: torch.Tensor, of: str) -> "Figure":
    """Draw two sets of unit-length embeddings (B, E) of the same things: values on the left, cosines on the right.

    of: what they are of, in the plural.
    """
    from matplotlib.figure import Figure

    sets = {"untrained": untrained, "this model": trained}
    values = colour_scale(torch.cat([untrained, trained]), centre=True, over_images=False, cut=0.002)
    cosines = [features @ features.T for features in sets.values()]
    alike = colour_scale(torch.stack(cosines), over_images=False, high=1.0)
    figure = Figure(figsize=(10, 5), layout="constrained")
    axes = figure.subplots(2, 2, width_ratios=(4, 1), sharex="col")
    for (left, right), (name, features), cosine in zip(axes, sets.items(), cosines, strict=True):
        left.imshow(as_array(features), cmap=values.cmap, norm=values.norm)
        right.imshow(as_array(cosine), cmap=alike.cmap, norm=alike.norm)
        left.set_title(
            f"{name}: effective rank {effective_rank(features):.1f} of at most {min(features.shape)}, "
            f"mean cosine of two {of} {mean_cosine(features):.2f}"
        )
        left.set_ylabel(of)
        right.set_box_aspect(1)
    axes[1, 0].set_xlabel("dimension of the embedding")
    axes[1, 1].set_xlabel(of)
    for axis in (axis for one in axes.flat for axis in (one.xaxis, one.yaxis)):
        axis.get_major_locator().set_params(integer=True)
    figure.colorbar(values, ax=axes[:, 0], label="value", aspect=60, pad=0.01)
    figure.colorbar(alike, ax=axes[:, 1], label="cosine", aspect=60, pad=0.04)
    return figure


@style()
def draw_match(
    images: torch.Tensor,
    texts: Sequence[str],
    cosines: torch.Tensor,
    probabilities: torch.Tensor,
    own: Sequence[int | None],
    probability_title: str,
) -> "Figure":
    """Draw images (B, 3, H, W) over the columns, texts at the rows: cosines (B, T), then probabilities (B, T).

    own: of each image the number of its own text, which is framed.
    """
    from matplotlib.figure import Figure

    count = len(images)
    rows, columns = (1, 2) if count <= 6 else (2, 1)
    # Inches: a column's width, which is the image's height too, and a row's height.
    cell, row = 0.62 if count <= 6 else 0.5 if count <= MAX_WRITTEN else max(0.12, 8 / count), 0.34
    across, down = count * cell, 0.05 + cell + len(texts) * row
    figure = Figure(figsize=(columns * across + (columns - 1) * 0.9, rows * down + (rows - 1) * 0.4))
    parts = figure.subplots(rows, columns, sharey=True)
    figure.subplots_adjust(left=0, right=1, bottom=0, top=1, wspace=0.9 / across, hspace=0.4 / down)
    scales = (
        colour_scale(cosines, over_images=False, colours="Blues"),
        colour_scale(probabilities, over_images=False, low=0.0, high=1.0, colours="Blues"),
    )
    thumbnails = mosaic(as_picture(images), count, (0, max(1, images.shape[-1] // 16)))
    titles = ("cosine", probability_title)
    for axes, title, values, scale in zip(parts, titles, (cosines, probabilities), scales, strict=True):
        axes.set_title(title)
        axes.imshow(as_array(values.T), cmap=scale.cmap, norm=scale.norm)
        above = -0.5 - (0.05 + cell) / row
        axes.imshow(thumbnails, extent=(-0.5, count - 0.5, above + cell / row, above))
        axes.set(xlim=(-0.5, count - 0.5), ylim=(len(texts) - 0.5, above), xticks=[])
        if count <= MAX_WRITTEN:
            _write_values(axes, values.T, scale)
        for number, text in enumerate(own):
            if text is not None:
                frame(axes, (number - 0.5, text - 0.5), 1, 1, "#0a7f5a", "white")
        axes.set_yticks(range(len(texts)), [wrapped(text, 36, 2) for text in texts], linespacing=1.0)
        axes.tick_params(length=0)
        figure.colorbar(scale, cax=axes.inset_axes((1 + 0.1 / across, 0, 0.08 / across, 1)))
    return figure


def _write_values(axes: "Axes", values: torch.Tensor, scale: "ScalarMappable") -> None:
    for (row, column), value in np.ndenumerate(as_array(values)):
        colour = "white" if scale.norm(value) > 0.55 else "black"
        axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour)
