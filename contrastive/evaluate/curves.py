"""Line charts as inline SVG: they follow the page's light or dark colours and need no library to view."""

import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Literal

import numpy as np

WIDTH, HEIGHT = 370, 170
LEFT, RIGHT, TOP, BOTTOM = 42, 6, 8, 22
MAX_POINTS = 500
NUM_COLOURS = 6
SMOOTH_FROM = 60
"""Curves of at least so many points also get a smoothed line."""


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
        f'<figure class="chart" data-hover="{escape(json.dumps(hover))}">{_caption(title, series, unit)}'
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
    return f"c{place % NUM_COLOURS + 1}"


def _written(value: float, unit: str) -> str:
    if not math.isfinite(value):
        return "–"
    return f"{value:.1f} %" if unit == "%" else short(value)
