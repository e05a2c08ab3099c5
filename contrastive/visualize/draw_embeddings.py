"""Drawing: embeddings of an untrained and of the trained tower, and images against texts."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from contrastive.visualize.drawing import (
    GAP,
    INK,
    MARGIN,
    Heat,
    as_picture,
    bare,
    colour_bar,
    new_figure,
    wrapped,
)
from contrastive.visualize.embeddings import effective_rank, mean_cosine

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_WRITTEN = 16
"""Rows and columns up to which each cell's value is written."""
LABEL_WIDTH = 2.3  # inches


def draw_embeddings(untrained: torch.Tensor, trained: torch.Tensor, *, title: str) -> "Figure":
    """Draw two sets of unit-length embeddings (B, E) of the same images: values on the left, cosines on the right."""
    values = Heat(torch.cat([untrained, trained]), centre=True, over_images=False, cut=0.002)
    cosines = [features @ features.T for features in (untrained, trained)]
    alike = Heat(torch.stack(cosines), over_images=False, high=1.0)
    figure = new_figure(10, 5.3)
    figure.text(0.012, 0.977, title, va="top", fontsize=10, color=INK, parse_math=False)
    for row, (name, features) in enumerate((("untrained", untrained), ("this model", trained))):
        bottom = 0.55 - row * 0.425
        left = figure.add_axes((0.045, bottom, 0.6, 0.31))
        left.imshow(
            features.cpu().numpy(), cmap=values.colours, norm=values.norm, aspect="auto", interpolation="nearest"
        )
        left.set_title(
            f"{name}: effective rank {effective_rank(features):.1f} of at most {min(features.shape)}, "
            f"mean cosine of two images {mean_cosine(features):.2f}",
            fontsize=8.5,
            loc="left",
            color=INK,
        )
        right = figure.add_axes((0.755, bottom, 0.165, 0.31))
        right.imshow(cosines[row].cpu().numpy(), cmap=alike.colours, norm=alike.norm, interpolation="nearest")
        for axes in (left, right):
            axes.tick_params(labelsize=7, length=2)
            axes.spines[:].set_visible(False)
        left.set_ylabel("image", fontsize=7.5)
        left.yaxis.get_major_locator().set_params(integer=True)
        right.xaxis.get_major_locator().set_params(integer=True)
        right.yaxis.get_major_locator().set_params(integer=True)
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
    figure = new_figure(width, height)
    figure.text(MARGIN / width, 1 - 0.12 / height, title, va="top", fontsize=10, color=INK, parse_math=False)
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
                _frame(cells, number, text)
        cells.set_yticks(range(len(texts)), [wrapped(text, 36, 2) for text in texts] if named else [])
        for label in cells.get_yticklabels():
            label.set(fontsize=7.5, parse_math=False, linespacing=1.0)
        bar = at(left + across + 0.1, top + 0.3 + cell, 0.08, max(down, 0.34))
        colour_bar(figure, bar, heat, "", "vertical")
    return figure


def _cells(axes, values: np.ndarray, heat: Heat, written: bool) -> None:
    axes.imshow(values, cmap=heat.colours, norm=heat.norm, aspect="auto", interpolation="nearest")
    bare(axes)
    axes.tick_params(length=0)
    if not written:
        return
    for (row, column), value in np.ndenumerate(values):
        colour = "white" if heat.norm(value) > 0.55 else "black"
        axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour)


def _frame(axes, column: int, row: int) -> None:
    from matplotlib.patches import Rectangle

    style = {"fill": False, "clip_on": False}
    for line, colour in ((2.6, "white"), (1.2, "#0a7f5a")):
        axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, edgecolor=colour, linewidth=line, **style))
