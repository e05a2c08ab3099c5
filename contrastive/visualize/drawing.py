"""What the pictures share: a sheet of equal panels, heat laid over an image, colour bars. No patch is ever smoothed."""

import io
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 130
FONT = {"font.size": 8, "font.family": "sans-serif"}
INK, SOFT = "#1d1f23", "#62676f"
HEAT_SHARE = 0.62
"""How much of the colour over an image is heat; the rest is the image in grey."""
MARGIN, GAP = 0.12, 0.08  # inches


class Sheet:
    """A figure of equal panels with room for titles. All lie in one axes: a hundred axes take seconds to draw.

    Args:
        rows, columns: number of panels.
        shape: height and width of what a panel shows; sets its proportions.
        title: stands over all.
        panel: width of a panel in inches.
        title_lines: lines over each panel.
        has_bar: room for a colour bar at the foot.
    """

    def __init__(
        self,
        rows: int,
        columns: int,
        shape: tuple[int, int],
        *,
        title: str,
        panel: float = 1.3,
        title_lines: int = 1,
        has_bar: bool = True,
    ):
        self.panel, self.panel_height = panel, panel * shape[0] / shape[1]
        self.head, self.foot = 0.34, 0.52 if has_bar else MARGIN
        self.over = 0.05 + 0.135 * title_lines
        # A title may be wider than the panels of a small sheet.
        least = 0.075 * len(title) + 2 * MARGIN
        self.width = max(2 * MARGIN + columns * (panel + GAP) - GAP, least, 4.2 if has_bar else 0)
        self.height = self.head + self.foot + rows * (self.panel_height + self.over + GAP)
        self.figure = new_figure(self.width, self.height, title)
        self._axes = self.figure.add_axes((0, 0, 1, 1))  # in inches, from the top left corner
        self._axes.set(xlim=(0, self.width), ylim=(self.height, 0), autoscale_on=False)
        self._axes.set_axis_off()

    def show(self, row: int, column: int, rgb: np.ndarray, title: str = "") -> tuple[float, float]:
        """Draw an image (H, W, 3), uint8 or float in 0..1, into a panel; return its left and top in inches."""
        left, top = self._corner(row, column)
        extent = (left, left + self.panel, top + self.panel_height, top)
        self._axes.imshow(rgb, interpolation="nearest", aspect="auto", extent=extent)
        if title:
            place = {"ha": "center", "va": "baseline", "linespacing": 1.1}
            middle = left + self.panel / 2
            self._axes.text(middle, top - 0.05, title, fontsize=7.5, color=INK, parse_math=False, **place)
        return left, top

    def frame(self, row: int, column: int, cell: tuple[int, int], grid: tuple[int, int]) -> None:
        """Frame one (row, column) of a panel that is divided into a grid of (rows, columns)."""
        (left, top), height, width = self._corner(row, column), self.panel_height / grid[0], self.panel / grid[1]
        place = (left + cell[1] * width, top + cell[0] * height)
        frame(self._axes, place, width, height, ((2.4, "black"), (1.1, "#5cf2ff")))  # seen on light and on dark

    def _corner(self, row: int, column: int) -> tuple[float, float]:
        """Left and top of a panel in inches."""
        top = self.head + row * (self.panel_height + self.over + GAP) + self.over
        return MARGIN + column * (self.panel + GAP), top

    def bar(self, heat: "Heat", label: str) -> None:
        """Draw the colour bar at the foot."""
        top, length = self.height - self.foot + 0.1, min(3.6, self.width - 0.6)
        place = ((MARGIN + 0.1) / self.width, 1 - (top + 0.1) / self.height, length / self.width, 0.1 / self.height)
        colour_bar(self.figure, self.figure.add_axes(place), heat, label)


class Heat:
    """Values to colours, the same for all panels of a sheet.

    Args:
        values: all that will be shown; they set the scale.
        centre: where the scale is symmetric about 0, in blue and red.
        over_images: whether the colours are seen over grey images, which the bar then shows too.
        low: the least of the scale; None: the least value.
        cut: share of the highest (and, centred, the lowest) values that lie beyond the scale.
        root: colours follow the square root of the values, which have to be positive: few are large.
        colours: a matplotlib colour map; None: 'inferno', centred 'RdBu_r'.
    """

    def __init__(
        self,
        values: torch.Tensor,
        *,
        centre: bool = False,
        over_images: bool = True,
        low: float | None = None,
        high: float | None = None,
        cut: float = 0.0,
        root: bool = False,
        colours: str | None = None,
    ):
        from matplotlib import colormaps
        from matplotlib.colors import ListedColormap, Normalize, PowerNorm

        flat = np.sort((values.abs() if centre else values).detach().cpu().double().numpy().ravel())
        largest = float(flat[-1 - int(cut * (len(flat) - 1))]) if high is None else high
        least = -largest if centre else float(flat[0]) if low is None else low
        if largest - least < 1e-6:
            largest, least = largest + 1e-6, least - 1e-6
        self.ticks = _root_ticks(largest) if root else None
        self.cut_off = bool(flat[-1] - largest > 1e-6 * (largest - least))
        self.centre = centre
        self.colours = colormaps[colours or ("RdBu_r" if centre else "inferno")]
        self.norm = PowerNorm(0.5, least, largest, clip=True) if root else Normalize(least, largest, clip=True)
        self.bar_colours = self.colours
        if over_images:
            pure = self.colours(np.linspace(0, 1, 256))[:, :3]
            self.bar_colours = ListedColormap(HEAT_SHARE * pure + (1 - HEAT_SHARE) * 0.5)

    def show(self, axes: "Axes", values: np.ndarray, aspect: str = "auto") -> None:
        """Draw values (rows, columns) as cells that fill `axes`."""
        axes.imshow(values, cmap=self.colours, norm=self.norm, aspect=aspect, interpolation="nearest")

    def over(self, image: torch.Tensor, values: torch.Tensor) -> np.ndarray:
        """Lay values (rows, columns) over an image uint8 (3, H, W) in grey: float (H, W, 3) in 0..1.

        Each value covers the pixels of its patch, no more and no less; H and W are multiples of rows and columns.
        """
        pixels = image.permute(1, 2, 0).cpu().numpy().astype(np.float64) / 255
        # Of half the contrast: a white thing in the image shall not look like a high value.
        grey = 0.25 + 0.5 * pixels @ np.array([0.299, 0.587, 0.114])
        patch = (image.shape[1] // values.shape[0], image.shape[2] // values.shape[1])
        colours = self.colours(self.norm(values.detach().cpu().double().numpy()))[..., :3]
        spread = colours.repeat(patch[0], axis=0).repeat(patch[1], axis=1)
        return HEAT_SHARE * spread + (1 - HEAT_SHARE) * grey[..., None]


def new_figure(width: float, height: float, title: str) -> "Figure":
    """Return a figure of so many inches with nothing but a title, which draws without a display."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context(FONT):
        figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    place = (MARGIN / width, 1 - 0.12 / height)
    figure.text(*place, title, va="top", fontsize=10, color=INK, parse_math=False)
    return figure


def png(figure: "Figure") -> bytes:
    """Return the figure as the bytes of a PNG file."""
    import warnings

    from matplotlib import rc_context

    file = io.BytesIO()
    with warnings.catch_warnings(), rc_context(FONT):
        # Scripts that the font lacks come out as boxes; the page has the texts in full.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(file, format="png", dpi=DPI, metadata={"Software": None})
    return file.getvalue()


def bare(axes: "Axes") -> None:
    """Take off ticks and frame."""
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)


def frame(
    axes: "Axes", place: tuple[float, float], width: float, height: float, lines: Sequence[tuple[float, str]]
) -> None:
    """Frame a rectangle, one line (its width, its colour) upon the other."""
    from matplotlib.patches import Rectangle

    for line, colour in lines:
        axes.add_patch(Rectangle(place, width, height, fill=False, clip_on=False, linewidth=line, edgecolor=colour))


def colour_bar(figure: "Figure", axes: "Axes", heat: Heat, label: str, orientation: str = "horizontal") -> None:
    """Draw the colours of `heat` with their values into `axes`."""
    from matplotlib.cm import ScalarMappable

    extend = ("both" if heat.centre else "max") if heat.cut_off else "neither"
    colours = ScalarMappable(heat.norm, heat.bar_colours)
    bar = figure.colorbar(colours, cax=axes, orientation=orientation, extend=extend, ticks=heat.ticks)
    if heat.ticks:
        bar.ax.set_xticks(heat.ticks, [f"{tick:g}" for tick in heat.ticks])
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=7, length=2, color=SOFT, labelcolor=INK)
    bar.set_label(label, fontsize=7.5, color=INK, labelpad=2)


def _root_ticks(high: float) -> list[float]:
    """0, 1, 2, 5, 10, 20, ... up to `high`, those left out that would stand too close on a square-root scale."""
    ticks = [0.0]
    for place in range(-3, 7):
        for tick in (1, 2, 5):
            value = tick * 10.0**place
            if value <= high and value**0.5 - ticks[-1] ** 0.5 > 0.09 * high**0.5:
                ticks.append(value)
    return ticks


def as_picture(image: torch.Tensor) -> np.ndarray:
    """uint8 (3, H, W) to (H, W, 3)."""
    return image.permute(1, 2, 0).cpu().numpy()


def mosaic(tiles: torch.Tensor, columns: int, gap: int = 1) -> np.ndarray:
    """Tiles (K, h, w) or (K, 3, h, w), side by side in rows of `columns`, as one array with NaN between and after."""
    tiles = tiles.detach().cpu().double().numpy()
    if tiles.ndim == 4:
        tiles = tiles.transpose(0, 2, 3, 1)
    height, width = tiles.shape[1:3]
    rows = -(-len(tiles) // columns)
    sheet = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, *tiles.shape[3:]), np.nan)
    for place, tile in enumerate(tiles):
        top, left = place // columns * (height + gap), place % columns * (width + gap)
        sheet[top : top + height, left : left + width] = tile
    return sheet


def wrapped(text: str, width: int, lines: int) -> str:
    """Return the text in at most so many lines of `width` characters; what does not fit becomes '…'."""
    text = " ".join(text.split())
    return "\n".join(textwrap.wrap(text, width, max_lines=lines, placeholder="…", break_on_hyphens=False))


def balanced(panels: int, most: int) -> tuple[int, int]:
    """Return (rows, columns) for the panels of one image: few rows, of about equal length."""
    rows = -(-panels // most)
    return rows, -(-panels // rows)


def shortened(names: Sequence[str], length: int) -> list[str]:
    """File names for the space over a panel: the end of a long one says more than its beginning."""
    return [name if len(name) <= length else "…" + name[1 - length :] for name in names]
