"""What the pictures share: colours of values, panels side by side, colour bars. No patch is ever smoothed.

A figure is as large as what has to be seen needs; titles, labels and bars hang outside, and `png` makes room for them.
"""

import io
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

INK = "#1d1f23"
STYLE = {
    "figure.dpi": 130,
    "font.family": "sans-serif",
    "font.size": 7.5,
    "text.color": INK,
    "text.parse_math": False,
    "axes.titlesize": 8.5,
    "axes.titlelocation": "left",
    "axes.labelcolor": INK,
    "axes.linewidth": 0,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "xtick.major.size": 2,
    "ytick.major.size": 2,
    "image.interpolation": "nearest",
    "image.aspect": "auto",
}
HEAT_SHARE = 0.62
"""How much of the colour over an image is heat; the rest is the image in grey."""
PANEL, GAP, LINE = 1.3, 0.08, 0.135
"""Inches: width of a panel, space between two, height of a line of its label."""


@contextmanager
def style() -> Iterator[None]:
    """Sizes, colours and habits of all figures: what draws is decorated with it."""
    from matplotlib import rc_context

    with rc_context(STYLE):
        yield


def colour_scale(
    values: torch.Tensor,
    *,
    centre: bool = False,
    over_images: bool = True,
    low: float | None = None,
    high: float | None = None,
    cut: float = 0.0,
    root: bool = False,
    colours: str | None = None,
) -> "ScalarMappable":
    """Return one scale of colours for all panels of a figure; where values lie beyond it, its bar has an arrow.

    Args:
        values: all that will be shown; they set the scale.
        centre: where the scale is symmetric about 0, in blue and red.
        over_images: whether the colours are seen over images (see `over`), which makes them paler.
        low, high: the ends of the scale; None: the least and the largest value.
        cut: share of the highest (and, centred, the lowest) values that lie beyond the scale.
        root: colours follow the square root of the values, which have to be positive: few are large.
        colours: a matplotlib colour map; None: 'inferno', centred 'RdBu_r'.
    """
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize, PowerNorm

    numbers = as_array(values.abs() if centre else values)
    numbers = numbers[~np.isnan(numbers)]
    high = float(np.quantile(numbers, 1 - cut, method="higher")) if high is None else high
    low = -high if centre else float(numbers.min()) if low is None else low
    if high - low < 1e-6:
        low, high = low - 0.01, high + 0.01
    colour_map = colormaps[colours or ("RdBu_r" if centre else "inferno")]
    if over_images:
        colour_map = ListedColormap(HEAT_SHARE * colour_map(np.arange(256))[:, :3] + (1 - HEAT_SHARE) * 0.5)
    if numbers.max() - high > 1e-6 * (high - low):
        colour_map.colorbar_extend = "both" if centre else "max"
    return ScalarMappable(PowerNorm(0.5, low, high, clip=True) if root else Normalize(low, high, clip=True), colour_map)


def over(image: torch.Tensor, values: torch.Tensor, scale: "ScalarMappable") -> np.ndarray:
    """Lay values (rows, columns) over an image uint8 (3, H, W) in grey: uint8 (H, W, 3).

    Each value covers the pixels of its patch, no more and no less; H and W are multiples of rows and columns. Over
    middle grey the colours are those of the scale. NaN is white: there is no patch.
    """
    brightness = as_picture(image) / 255 @ np.array([0.299, 0.587, 0.114])
    # Of half the contrast: a white thing in the image shall not look like a high value.
    grey = (1 - HEAT_SHARE) * 0.5 * (brightness - 0.5)
    numbers = as_array(values)
    picture = spread(scale.to_rgba(numbers)[..., :3], image.shape[1:]) + grey[..., None]
    return as_uint8(np.where(spread(np.isnan(numbers), image.shape[1:])[..., None], 1, picture))


def as_array(values: torch.Tensor) -> np.ndarray:
    """A tensor of any device and dtype as float64."""
    return values.detach().cpu().double().numpy()


def as_picture(image: torch.Tensor) -> np.ndarray:
    """(..., 3, H, W) to (..., H, W, 3)."""
    return image.movedim(-3, -1).cpu().numpy()


def as_uint8(picture: np.ndarray) -> np.ndarray:
    """0..1 to 0..255."""
    return (255 * picture).round().astype(np.uint8)


def spread(cells: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """(rows, columns, ...) to (H, W, ...) of `size`, each cell over the pixels of its patch."""
    return cells.repeat(size[0] // cells.shape[0], axis=0).repeat(size[1] // cells.shape[1], axis=1)


def mosaic(tiles: np.ndarray, columns: int, gap: tuple[int, int], fill: float = 255) -> np.ndarray:
    """Tiles (K, h, w, ...) side by side in rows of `columns` as one array, `fill` in the gaps (down, across)."""
    height, width = tiles.shape[1:3]
    steps = down, across = height + gap[0], width + gap[1]
    rows = -(-len(tiles) // columns)
    whole = np.full((rows * down - gap[0], columns * across - gap[1], *tiles.shape[3:]), fill, tiles.dtype)
    for place, tile in enumerate(tiles):
        top, left = np.multiply(divmod(place, columns), steps)
        whole[top : top + height, left : left + width] = tile
    return whole


def whole_axes(picture: np.ndarray, width: float, scale: "ScalarMappable | None" = None) -> "Axes":
    """Return the axes of a new figure, so many inches wide, that a picture fills; coordinates are its pixels'.

    scale: of values (rows, columns); a picture (H, W, 3) has none.
    """
    from matplotlib.figure import Figure

    axes = Figure(figsize=(width, width * picture.shape[0] / picture.shape[1])).add_axes((0, 0, 1, 1))
    axes.imshow(picture, **({} if scale is None else {"cmap": scale.cmap, "norm": scale.norm}))
    axes.set(xticks=[], yticks=[])
    return axes


def panels(
    tiles: np.ndarray, columns: int, labels: Sequence[str], marked: tuple[float, float, float, float] | None = None
) -> "Axes":
    """Draw pictures (K, H, W, 3) as panels in one axes: a hundred axes take seconds to draw.

    Args:
        labels: K, what stands over each.
        marked: left, top, width and height in pixels of what is framed in each panel that has a label.
    """
    height, width = tiles.shape[1:3]
    lines, per_inch = 1 + max(label.count("\n") for label in labels), width / PANEL
    gap = round((GAP + 0.05 + LINE * lines) * per_inch), max(1, round(GAP * per_inch))
    picture = mosaic(tiles, columns, gap)
    axes = whole_axes(picture, picture.shape[1] / per_inch)
    for place, label in enumerate(labels):
        # Centres of pixels are whole numbers.
        top, left = np.multiply(divmod(place, columns), (height + gap[0], width + gap[1])) - 0.5
        axes.text(left + width / 2, top - 0.05 * per_inch, label, ha="center", va="baseline", linespacing=1.1)
        if marked and label:
            frame(axes, (left + marked[0], top + marked[1]), *marked[2:], "#5cf2ff", "black")
    return axes


def frame(axes: "Axes", place: tuple[float, float], width: float, height: float, colour: str, edge: str) -> None:
    """Frame a rectangle with a line that has an edge of another colour: it is seen on light and on dark."""
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke

    edged = [withStroke(linewidth=2.5, foreground=edge)]
    look = {"fill": False, "clip_on": False, "linewidth": 1.2, "edgecolor": colour, "path_effects": edged}
    axes.add_patch(Rectangle(place, width, height, **look))


def bar_below(axes: "Axes", scale: "ScalarMappable", label: str, distance: float = 0.16) -> None:
    """Draw the colours of a scale with their values so many inches below axes that fill their figure."""
    width, height = axes.figure.get_size_inches()
    place = axes.inset_axes((0.1 / width, -(distance + 0.1) / height, min(3.6, width) / width, 0.1 / height))
    axes.figure.colorbar(scale, cax=place, orientation="horizontal").set_label(label, labelpad=2)


@style()
def png(figure: "Figure", title: str) -> bytes:
    """Return the figure, and the title over all that it holds, as the bytes of a PNG file."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        # Scripts that the font lacks come out as boxes; the page has the texts in full.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.draw_without_rendering()
        box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
        figure.text(box.x0 / width, (box.y1 + 0.12) / height, title, va="bottom", fontsize=10)
        figure.savefig(file, format="png", bbox_inches="tight", pad_inches=0.12, metadata={"Software": None})
    return file.getvalue()


def wrapped(text: str, width: int, lines: int) -> str:
    """Return the text in at most so many lines of `width` characters; what does not fit becomes '…'."""
    text = " ".join(text.split())
    return "\n".join(textwrap.wrap(text, width, max_lines=lines, placeholder="…", break_on_hyphens=False))


def balanced(count: int, most: int) -> tuple[int, int]:
    """Return (rows, columns) for the panels of one image: few rows, of about equal length."""
    rows = -(-count // most)
    return rows, -(-count // rows)


def shortened(names: Sequence[str], length: int) -> list[str]:
    """File names for the space over a panel: the end of a long one says more than its beginning."""
    return [name if len(name) <= length else "…" + name[1 - length :] for name in names]
