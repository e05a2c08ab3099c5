"""What the report reads out of metrics.jsonl: rows without repeats, names, headline figures, charts."""

import math
import re
from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from contrastive.evaluate.curves import line_chart, short

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

_COUNTS = re.compile(r"num_|duplicate_|chance|seconds|epoch")


@dataclass(frozen=True)
class Score:
    """An evaluation figure, from its key 'KIND/SOURCE/NAME' or 'KIND/NAME'; the source may hold slashes."""

    key: str

    @property
    def kind(self) -> str:
        return self.key.partition("/")[0].replace("_", "-")

    @property
    def source(self) -> str:
        """The data it is of, a long path by its end; empty when the key does not say."""
        between = self.key.partition("/")[2].rpartition("/")[0]
        return "/".join(between.split("/")[-2:])

    @property
    def name(self) -> str:
        """In words: 'image_to_text_r10' as 'image → text R@10'."""
        text = re.sub(r"_r(\d+)$", r" R@\1", self.key.rpartition("/")[2])
        text = re.sub(r"acc(\d+)$", r"acc@\1", text).replace("_to_", " → ")
        return text.replace("heldout", "held-out").replace("_", " ")

    @property
    def is_rank(self) -> bool:
        """Ranks are better when lower, and not percent."""
        return self.name.endswith("rank")

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
        return f"{value:,.1f}" if self.is_rank else f"{value:.1f} %"


def rows_of(metrics: list[dict], kind: str) -> list[dict]:
    """Rows of one kind by rising step. A resumed run logs steps again: the last row of a step counts."""
    latest = {row["step"]: row for row in metrics if row.get("kind") == kind}
    return [latest[step] for step in sorted(latest)]


def column(rows: list[dict], key: str) -> np.ndarray:
    """(len(rows),) float64, NaN where a row has no number under `key`."""
    return np.array([_number(row.get(key)) for row in rows], dtype=np.float64)


def scores_of(rows: list[dict]) -> list[Score]:
    """The evaluation scores, in the order they first come; counts and chance levels left out."""
    keys = dict.fromkeys(key for row in rows for key in row if key not in ("kind", "step"))
    return [
        Score(key) for key in keys if not _COUNTS.match(key.rpartition("/")[2]) and np.isfinite(column(rows, key)).any()
    ]


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
        values = column(rows, key) * (
            100 if key == "data_wait" else 1
        )  # a share; all else is in percent where it has that unit
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


def _number(value) -> float:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
