"""Charts of a run as inline SVG, which follows the page's light or dark colours and needs no library to view.

What metrics.jsonl holds becomes rows without repeats, evaluation scores by name, headline figures, and line charts.
"""

import json
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

from contrastive.page import PARTS, filled
from contrastive.results import figure_title, figure_written, is_figure, is_rank, key_parts

TRAIN_CHARTS = (
    # title, key, unit, whether it is noisy
    ("loss", "loss", "", True),
    ("learning rate", "lr", "", False),
    ("gradient norm", "grad_norm", "", True),
    ("accuracy on varied images", "accuracy", "%", True),
    ("logit scale", "logit_scale", "", False),
    ("logit bias", "logit_bias", "", False),
    ("samples per second", "samples_per_second", "", True),
    ("time spent waiting for data", "data_wait", "%", True),
)
NUM_HEADLINES = 4
FINAL_ROWS = 20
"""The final loss is the mean of so many logged rows: one batch's loss is noisy."""

WIDTH, HEIGHT = 370, 170
LEFT, RIGHT, TOP, BOTTOM = 42, 6, 8, 22
MAX_POINTS = 500
DOTS_TO = 30
SMOOTH_FROM = 60
"""Curves of at least so many points also get a smoothed line."""


class Score(NamedTuple):
    """An evaluation figure over the rows of a run's evaluations; its key is 'TASK/DATA/NAME' or 'TASK/NAME'."""

    task: str
    data: str
    name: str
    values: np.ndarray
    """(rows,) float64, NaN where a row does not have it."""

    @property
    def source(self) -> str:
        """The data it is of, a long path by its end; empty when the key does not say."""
        return "/".join(self.data.split("/")[-2:])

    @property
    def title(self) -> str:
        """In words: 'image → text R@10'."""
        return figure_title(self.name)

    @property
    def family(self) -> tuple[str, str]:
        """(title of the chart it shares, name of its curve there)."""
        head, _, tail = self.title.rpartition(" ")
        of = f", {self.source}" if self.source else ""
        if is_rank(self.name):
            return f"median rank{of}", self.title.removesuffix(" median rank")
        return (f"{head}{of}", tail) if tail.startswith("R@") else (f"{self.task}{of}", self.title)

    @property
    def last(self) -> int:
        """The last row that has a value."""
        return int(np.flatnonzero(np.isfinite(self.values))[-1])

    @property
    def best(self) -> int:
        """The row of the best value."""
        return int(np.nanargmin(self.values) if is_rank(self.name) else np.nanargmax(self.values))

    def written(self, row: int) -> str:
        return figure_written(self.name, float(self.values[row]))


def rows_of(metrics: list[dict], kind: str) -> list[dict]:
    """Rows of one kind by rising step. A resumed run logs steps again: the last row of a step counts."""
    latest = {row["step"]: row for row in metrics if row.get("kind") == kind}
    return [latest[step] for step in sorted(latest)]


def column(rows: list[dict], key: str) -> np.ndarray:
    """(len(rows),) float64, NaN where a row has no number under `key`."""
    values = [row.get(key) for row in rows]
    return np.array([value if type(value) in (int, float) else math.nan for value in values], dtype=np.float64)


def scores_of(rows: list[dict]) -> list[Score]:
    """The evaluation scores, in the order they first come; counts and chance levels left out."""
    scores = [Score(*key_parts(key), column(rows, key)) for key in dict.fromkeys(key for row in rows for key in row)]
    return [score for score in scores if is_figure(score.name) and np.isfinite(score.values).any()]


def headlines(train: list[dict], evaluations: list[dict]) -> list[tuple[str, str, str]]:
    """(name, figure, remark) of the figures that matter most."""
    tiles = []
    loss = column(train, "loss")
    if np.isfinite(loss).any():
        tail = loss[np.isfinite(loss)][-FINAL_ROWS:]
        tiles.append(("final loss", f"{tail.mean():.4g}", f"mean of the last {len(tail)} logged steps"))
    speed = column(train, "samples_per_second")
    if np.isfinite(speed).any():
        wait = column(train, "data_wait")
        remark = f"{100 * np.nanmedian(wait):.0f} % waiting for data" if np.isfinite(wait).any() else "median"
        tiles.append(("samples per second", short(float(np.nanmedian(speed))), remark))
    found = scores_of(evaluations)
    chosen = [score for end in ("acc1", "_r1", "_r10") for score in found if score.name.endswith(end)]
    for score in chosen[:NUM_HEADLINES]:
        source = f"{score.source}, " if score.source else ""
        remark = f"{source}step\u00a0{evaluations[score.best]['step']:,}"
        tiles.append((f"best {score.title}", score.written(score.best), remark))
    return tiles


def training_charts(rows: list[dict]) -> list[str]:
    """A chart of each figure of training that the rows have."""
    made, steps = [], [row["step"] for row in rows]
    for title, key, unit, noisy in TRAIN_CHARTS:
        values = column(rows, key) * (100 if key == "data_wait" else 1)  # a share; others with that unit are percent
        if np.isfinite(values).any():
            made.append(line_chart(title, steps, {title: values}, unit=unit, smooth=noisy))
    names = dict.fromkeys(name for row in rows for name in row if name.endswith("_loss"))
    if parts := {name.removesuffix("_loss"): column(rows, name) for name in names}:
        made.append(line_chart("parts of the loss, before their weights", steps, parts, smooth=True))
    return made


def score_charts(rows: list[dict]) -> list[str]:
    """Charts of the evaluation scores, those of a kind together."""
    families: dict[str, dict[str, np.ndarray]] = defaultdict(dict)
    for score in sorted(scores_of(rows), key=lambda score: is_rank(score.name)):  # charts in percent stand together
        title, name = score.family
        families[title][name] = score.values
    steps = [row["step"] for row in rows]
    return [
        line_chart(title, steps, curves, unit="" if title.startswith("median rank") else "%")
        for title, curves in families.items()
    ]


def line_chart(
    title: str,
    steps: Sequence[int],
    series: Mapping[str, Sequence[float]],
    *,
    unit: Literal["", "%"] = "",
    smooth: bool = False,
) -> str:
    """Return a <figure> of curves over training steps.

    Args:
        title: what is drawn; a single curve needs no other name.
        steps: (n,) rising.
        series: name to (n,) values; those that are not finite are gaps.
        unit: '%' or nothing.
        smooth: draw long curves faint, with their running mean on top.

    Beyond 500 points runs of them are averaged.
    """
    steps, series = _thinned(steps, series)
    values = np.concatenate(list(series.values()))
    finite = values[np.isfinite(values)]
    ticks = _ticks(*((finite.min(), finite.max()) if len(finite) else (0.0, 1.0)))
    first, last = steps[0], max(steps[-1], steps[0] + 1)

    def at_x(step):
        return LEFT + (step - first) / (last - first) * (WIDTH - LEFT - RIGHT)

    def at_y(value):
        return HEIGHT - BOTTOM - (value - ticks[0]) / (ticks[-1] - ticks[0]) * (HEIGHT - TOP - BOTTOM)

    x, curves = at_x(steps), []
    for place, (name, values) in enumerate(series.items()):
        lines, dots = _drawn(x, values, at_y, smooth)
        shown = _written(next((y for y in reversed(values) if math.isfinite(y)), math.nan), unit)
        colour = f"c{place % 6 + 1}"  # the six that every page has
        curves.append({"name": name, "colour": colour, "last": shown, "lines": lines, "dots": dots})
    hover = {
        "steps": [int(step) for step in steps],
        "x": [round(position, 1) for position in x.tolist()],
        "values": [[_written(y, unit) for y in curve] for curve in series.values()],
    }
    # Steps are whole.
    marks = [tick for tick in _ticks(first, last) if first <= tick <= last and tick == int(tick)]
    return filled(
        PARTS / "chart.html.jinja",
        title=title,
        hover=json.dumps(hover),
        curves=curves,
        rows=[(at_y(tick), short(float(tick))) for tick in ticks],
        columns=[(at_x(tick), short(float(tick))) for tick in marks],
        width=WIDTH,
        height=HEIGHT,
        left=LEFT,
        right=WIDTH - RIGHT,
        top=TOP,
        bottom=HEIGHT - BOTTOM,
    )


def short(value: float) -> str:
    """A number in few characters: 12,345 as 12.3k, 0.00012 as 1.2e-4."""
    if value and abs(value) < 1e-2:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if suffix == 'k' else size):.3g}{suffix}"
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def _thinned(steps: Sequence[int], series: Mapping[str, Sequence[float]]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """At most MAX_POINTS points: means of runs, at the step each run ends on. Non-finite values stay out."""
    steps = np.asarray(steps, dtype=np.float64)
    curves = {name: np.asarray(curve, dtype=np.float64) for name, curve in series.items()}
    curves = {name: np.where(np.isfinite(curve), curve, np.nan) for name, curve in curves.items()}
    if len(steps) <= MAX_POINTS:
        return steps, curves
    runs = np.array_split(np.arange(len(steps)), MAX_POINTS)
    ends = np.array([run[-1] for run in runs])
    return steps[ends], {name: np.array([_mean(curve[run]) for run in runs]) for name, curve in curves.items()}


def _mean(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else math.nan


def _ticks(low: float, high: float) -> np.ndarray:
    from matplotlib.ticker import MaxNLocator

    # A constant gets a range around it; the margin keeps rounding noise from filling the chart.
    margin = max(abs(low), abs(high)) * 1e-3 or 1.0
    if high - low < margin:
        low, high = low - margin, high + margin
    return MaxNLocator(nbins=4, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)


def _drawn(
    x: np.ndarray, values: np.ndarray, at_y: Callable, smooth: bool
) -> tuple[list[tuple[str, str]], list[tuple[float, float]]]:
    """(style, path) of a curve, with its running mean where it is to be smooth, and the points that get a dot."""
    y = at_y(values)
    dots = [point for point in zip(x, y, strict=True) if len(x) <= DOTS_TO and math.isfinite(point[1])]
    if not smooth or len(x) < SMOOTH_FROM:
        return [("", _path(x, y))], dots
    half = max(3, len(values) // 25) // 2
    mean = np.array([_mean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))])
    return [(" faint", _path(x, y)), ("", _path(x, at_y(mean)))], dots


def _path(x: np.ndarray, y: np.ndarray) -> str:
    """An SVG path through the points (n,) in turn, interrupted where y is not finite."""
    pens = np.where(np.isfinite(np.append(np.nan, y[:-1])), "L", "M")
    return "".join(f"{pen}{a:.1f} {b:.1f}" for pen, a, b in zip(pens, x, y, strict=True) if math.isfinite(b))


def _written(value: float, unit: str) -> str:
    if not math.isfinite(value):
        return "–"
    return f"{value:.1f} %" if unit == "%" else short(value)
