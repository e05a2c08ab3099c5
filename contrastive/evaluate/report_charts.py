"""Charts of a run as inline SVG, which follows the page's light or dark colours and needs no library to view.

What metrics.jsonl holds becomes rows without repeats, evaluation scores by name, headline figures, and line charts.
"""

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

import numpy as np

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
SMOOTH_FROM = 60
"""Curves of at least so many points also get a smoothed line."""


@dataclass(frozen=True)
class Score:
    """An evaluation figure, from its key 'KIND/SOURCE/NAME' or 'KIND/NAME'; the source may hold slashes."""

    key: str

    @property
    def kind(self) -> str:
        return key_parts(self.key)[0]

    @property
    def source(self) -> str:
        """The data it is of, a long path by its end; empty when the key does not say."""
        return "/".join(key_parts(self.key)[1].split("/")[-2:])

    @property
    def name(self) -> str:
        """In words: 'image → text R@10'."""
        return figure_title(key_parts(self.key)[2])

    @property
    def is_rank(self) -> bool:
        return is_rank(self.key)

    @property
    def family(self) -> tuple[str, str]:
        """(title of the chart it shares, name of its curve there)."""
        head, _, tail = self.name.rpartition(" ")
        of = f", {self.source}" if self.source else ""
        if self.is_rank:
            return f"median rank{of}", self.name.removesuffix(" median rank")
        if tail.startswith("R@"):
            return f"{head}{of}", tail
        return f"{self.kind}{of}", self.name

    def written(self, value: float) -> str:
        return figure_written(self.key, value)


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
    keys = dict.fromkeys(key for row in rows for key in row)
    return [Score(key) for key in keys if is_figure(key_parts(key)[2]) and np.isfinite(column(rows, key)).any()]


def best(rows: list[dict], score: Score) -> tuple[float, int]:
    """(best value, step it was reached at)."""
    values = column(rows, score.key)
    at = int(np.nanargmin(values) if score.is_rank else np.nanargmax(values))
    return float(values[at]), int(rows[at]["step"])


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
    chosen = [score for end in ("acc1", "_r1", "_r10") for score in found if score.key.endswith(end)]
    for score in chosen[:NUM_HEADLINES]:
        value, step = best(evaluations, score)
        source = f"{score.source}, " if score.source else ""
        tiles.append((f"best {score.name}", score.written(value), f"{source}step\u00a0{step:,}"))
    return tiles


def training_charts(rows: list[dict]) -> list[str]:
    """A chart of each figure of training that the rows have."""
    made = []
    for title, key, unit, noisy in TRAIN_CHARTS:
        values = column(rows, key) * (100 if key == "data_wait" else 1)  # a share; others with that unit are percent
        if np.isfinite(values).any():
            steps = [row["step"] for row in rows]
            made.append(line_chart(title, steps, {title: values}, unit=unit, smooth=noisy))
    return made


def score_charts(rows: list[dict]) -> list[str]:
    """Charts of the evaluation scores, those of a kind together."""
    made = []
    families: dict[str, dict[str, Score]] = defaultdict(dict)
    for score in scores_of(rows):
        title, name = score.family
        families[title][name] = score
    # Ranks come last: charts in percent stand together.
    for title, scores in sorted(families.items(), key=lambda family: family[0].startswith("median rank")):
        curves = {name: column(rows, score.key) for name, score in scores.items()}
        unit = "" if any(score.is_rank for score in scores.values()) else "%"
        made.append(line_chart(title, [row["step"] for row in rows], curves, unit=unit))
    return made


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
    x_low = float(steps[0])
    x_high = float(steps[-1]) if steps[-1] > steps[0] else x_low + 1

    def at_x(step: float) -> float:
        return LEFT + (step - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)

    def at_y(value: float) -> float:
        return HEIGHT - BOTTOM - (value - ticks[0]) / (ticks[-1] - ticks[0]) * (HEIGHT - TOP - BOTTOM)

    def placed(curve: np.ndarray) -> list[tuple[float, float] | None]:
        return [(at_x(x), at_y(y)) if math.isfinite(y) else None for x, y in zip(steps, curve, strict=True)]

    parts = [_grid(ticks, _ticks(x_low, x_high), at_x, at_y, x_low, x_high)]
    for place, curve in enumerate(series.values()):
        faint = smooth and len(steps) >= SMOOTH_FROM
        parts.append(_path(placed(curve), place, "faint" if faint else "", dots=len(steps) <= 30))
        if faint:
            parts.append(_path(placed(_running_mean(curve, max(3, len(curve) // 25))), place))
    hover = {
        "steps": [int(step) for step in steps],
        "x": [round(at_x(step), 1) for step in steps],
        "values": [[_written(y, unit) for y in curve] for curve in series.values()],
    }
    cursor = f'<line class="cursor" y1="{TOP}" y2="{HEIGHT - BOTTOM}" x1="-9" x2="-9"/>'
    return (
        f'<figure class="chart card" data-hover="{escape(json.dumps(hover))}">{_caption(title, series, unit)}'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)} over training steps">'
        f"{''.join(parts)}{cursor}</svg></figure>"
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


def _running_mean(curve: np.ndarray, window: int) -> np.ndarray:
    half = window // 2
    return np.array([_mean(curve[max(0, i - half) : i + half + 1]) for i in range(len(curve))])


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


def _grid(y_ticks, x_ticks, at_x, at_y, x_low: float, x_high: float) -> str:
    lines = []
    for tick in y_ticks:
        y = at_y(tick)
        lines.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        lines.append(f'<text x="{LEFT - 7}" y="{y + 3.5:.1f}" text-anchor="end">{short(float(tick))}</text>')
    for tick in x_ticks:
        # Steps are whole, and a label at the very edge would be cut.
        if x_low <= tick <= x_high and tick == int(tick):
            anchor = "end" if at_x(tick) > WIDTH - RIGHT - 14 else "middle"
            lines.append(f'<text x="{at_x(tick):.1f}" y="{HEIGHT - 6}" text-anchor="{anchor}">{short(tick)}</text>')
    return "".join(lines)


def _path(points: list[tuple[float, float] | None], place: int, extra: str = "", dots: bool = False) -> str:
    commands, pen = [], "M"
    for point in points:
        if point is None:
            pen = "M"
            continue
        commands.append(f"{pen}{point[0]:.1f} {point[1]:.1f}")
        pen = "L"
    style = f"line {_colour(place)} {extra}".strip()
    marks = [
        f'<circle class="{_colour(place)}" cx="{p[0]:.1f}" cy="{p[1]:.1f}" r="2.6"/>' for p in points if p and dots
    ]
    return f'<path class="{style}" d="{"".join(commands)}"/>{"".join(marks)}'


def _caption(title: str, series: Mapping[str, np.ndarray], unit: str) -> str:
    """The title, and each curve's last value; the page's script puts the value under the pointer there."""
    numbers = []
    for curve in series.values():
        last = _written(next((y for y in reversed(curve) if math.isfinite(y)), math.nan), unit)
        numbers.append(f'<b class="value" data-last="{escape(last)}">{escape(last)}</b>')
    legend = ""
    if len(series) > 1:
        named = zip(series, numbers, strict=True)
        items = [f'<span><i class="{_colour(i)}"></i>{escape(n)} {b}</span>' for i, (n, b) in enumerate(named)]
        legend = f'<div class="legend">{"".join(items)}</div>'
    alone = "" if legend else numbers[0]
    return f'<figcaption><b>{escape(title)}</b><span class="at"></span>{alone}</figcaption>{legend}'


def _colour(place: int) -> str:
    return f"c{place % 6 + 1}"  # the six that every page has


def _written(value: float, unit: str) -> str:
    if not math.isfinite(value):
        return "–"
    return f"{value:.1f} %" if unit == "%" else short(value)
