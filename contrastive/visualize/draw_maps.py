"""Drawing: maps over images, and images beside what was made of them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from contrastive.visualize.drawing import Heat, Sheet, as_picture, balanced, shortened, wrapped

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_COLUMNS = 8
LABEL_CHARACTERS, NAME_CHARACTERS = 20, 17


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
