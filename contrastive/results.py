"""What evaluations leave in a run folder: figures by name, how a name is told, and the files that hold them.

metrics.jsonl                       rows of kind 'eval': 'TASK/DATA/NAME' or 'TASK/NAME' to value
zero_shot/DATA/zero_shot.json       'model', 'data', 'chance', and values by NAME
evaluation/SUITE/evaluation.json    'models', 'tasks', 'results' with figures by NAME; with 'format', EVALUATION_FORMAT
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

EVALUATION_FORMAT = "contrastive-evaluation-1"
EVALUATION_FILE, ZERO_SHOT_FILE = "evaluation.json", "zero_shot.json"
ZERO_SHOT_FIGURES = ("acc1", "acc5", "mean_per_class_recall", "seen_acc1", "heldout_acc1")
_FIGURE_ENDS = re.compile(r"(acc\d+|recall|_r\d+|median_rank|named|bleu4)$")


def folder_name(data: str) -> str:
    """Return a folder name for a data spec: the last two parts of a path, anything unusual as '-'."""
    tail = "-".join(part for part in data.rstrip("/").split("/")[-2:] if part not in ("", ".", ".."))
    return re.sub(r"[^A-Za-z0-9._]+", "-", tail).strip("-.") or "data"


def figure_title(name: str) -> str:
    """Return the name of a figure in words: 'acc@1', '5-shot acc@1', 'k=20 acc@1', 'image → text R@10', 'mIoU'."""
    text = re.sub(r"^shot(\d+)_", r"\1-shot ", name)
    text = re.sub(r"^k(\d+)_", r"k=\1 ", text)
    text = re.sub(r"_r(\d+)$", r" R@\1", text)
    text = re.sub(r"(^|_)(m?)iou(_|$)", r"\1\2IoU\3", text)
    text = re.sub(r"acc(\d+)$", r"acc@\1", text).replace("_to_", " → ")
    return text.replace("per_class", "per-class").replace("heldout", "held-out").replace("_", " ")


def key_parts(key: str) -> tuple[str, str, str]:
    """Return task in words, data and figure's name of a key 'TASK/DATA/NAME' or 'TASK/NAME'; data may hold slashes."""
    task, _, rest = key.partition("/")
    data, _, name = rest.rpartition("/")
    return task.replace("_", "-"), data, name


def is_figure(name: str) -> bool:
    """Whether it is the name of a figure, rather than of a count or of a chance level."""
    return _FIGURE_ENDS.search(name) is not None


def is_rank(name: str) -> bool:
    """Whether a figure is a rank: better when lower. All others are percent."""
    return name.endswith("rank")


def figure_written(name: str, value: float) -> str:
    """Return the value with its unit."""
    return f"{value:,.1f}" if is_rank(name) or name in ("bleu4", "cider") else f"{value:.1f} %"


def figure_told(name: str, value: float) -> str:
    """Return title and value: 'mean per-class recall 14.9 %'."""
    return f"{figure_title(name)} {figure_written(name, value)}"


@dataclass(frozen=True)
class RecordedFigure:
    """A figure of one task on one data set, as a run folder holds it."""

    task: str
    """In words: 'zero-shot'."""
    data: str
    name: str
    value: float
    interval: tuple[float, float] | None = None
    chance: float | None = None

    @property
    def written(self) -> tuple[str, str, str, str]:
        """Title, value, interval and chance as text."""
        interval = "" if self.interval is None else f"{self.interval[0]:.1f} to {self.interval[1]:.1f}"
        chance = "" if self.chance is None else figure_written(self.name, self.chance)
        return figure_title(self.name), figure_written(self.name, self.value), interval, chance


def figures_of_row(row: dict) -> Iterator[RecordedFigure]:
    """Read a row of kind 'eval' of metrics.jsonl."""
    for key, value in row.items():
        task, data, name = key_parts(key)
        if is_figure(name) and isinstance(value, (int, float)):
            yield RecordedFigure(task, data, name, value)


def figures_of_zero_shot(found: dict) -> Iterator[RecordedFigure]:
    """Read what zero_shot.json holds."""
    for name in ZERO_SHOT_FIGURES:
        if isinstance(found.get(name), (int, float)):
            chance = found.get("chance") if name in ("acc1", "mean_per_class_recall") else None
            yield RecordedFigure("zero-shot", found.get("data", ""), name, found[name], chance=chance)


def figures_of_evaluation(found: dict) -> Iterator[RecordedFigure]:
    """Read the headline figures of an evaluation.json of one model; nothing of one that compares several."""
    if len(found.get("models", ())) != 1:
        return
    for result in found.get("results", ()):
        task = found["tasks"][result["task"]]
        for name in result.get("headline", ()):
            figure = result["figures"][name]
            interval = None if figure["low"] is None else (figure["low"], figure["high"])
            kind, value = task["task"].replace("_", "-"), figure["value"]
            yield RecordedFigure(kind, task["data"], name, value, interval, figure["chance"])
