"""A picture of a confusion matrix."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

MAX_NAMED_CLASSES = 64
MAX_WRITTEN_CLASSES = 20


def save_confusion(confusion: np.ndarray, class_names: Sequence[str], path: Path, *, title: str) -> None:
    """Draw (C, C) counts, true by predicted class, each row as shares of its images, to a PNG at `path`.

    Up to 64 classes every one is named, beyond that some; up to 20 the share stands in each cell. The row of
    a class without images stays blank.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    counts = np.asarray(confusion, dtype=np.float64)
    totals = counts.sum(axis=1, keepdims=True)
    shares = np.divide(counts, totals, out=np.full_like(counts, np.nan), where=totals > 0)
    num_classes = len(counts)
    side = float(np.clip(0.2 * num_classes, 4.0, 13.0))
    figure = Figure(figsize=(side + 2.6, side + 1.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    axes.set_facecolor("#f0f0f0")
    step = -(-num_classes // MAX_NAMED_CLASSES)
    ticks = np.arange(0, num_classes, step)
    names = [_short(class_names[i]) for i in ticks]
    size = 9 if num_classes <= MAX_WRITTEN_CLASSES else 7
    axes.set_xticks(ticks, names, rotation=90, fontsize=size)
    axes.set_yticks(ticks, names, fontsize=size)
    axes.tick_params(length=0)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    axes.set_title(title, fontsize=11)
    axes.spines[:].set_visible(False)
    if num_classes <= MAX_WRITTEN_CLASSES:
        for row, column in zip(*np.nonzero(shares >= 0.005), strict=True):
            share = shares[row, column]
            colour = "white" if share > 0.55 else "black"
            axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=8, color=colour)
    bar = figure.colorbar(image, ax=axes, fraction=0.04, pad=0.02, format=lambda at, _: f"{100 * at:.0f} %")
    bar.set_label("share of the true class's images")
    bar.outline.set_visible(False)
    figure.savefig(path, dpi=120)


def _short(name: str, length: int = 24) -> str:
    # Matplotlib reads text between two dollar signs as mathematics.
    name = name.replace("$", r"\$")
    return name if len(name) <= length else name[: length - 1] + "…"
