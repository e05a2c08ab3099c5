"""What a task says of a model: figures with their intervals and chance levels."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from contrastive.evaluate.bootstrap import Interval, recall_interval, share_interval

_SHARE = re.compile(r"acc\d+|(k|shot)\d+_acc\d+|(seen|heldout)_acc1")


@dataclass(frozen=True)
class Figure:
    """A number: percent, but for median ranks."""

    value: float
    interval: Interval | None = None
    """95 % bootstrap interval over test samples."""
    chance: float | None = None
    """What guessing scores."""


@dataclass(frozen=True)
class Outcome:
    """The result of one task."""

    figures: dict[str, Figure]
    headline: tuple[str, ...]
    """Names of the figures to show first."""
    details: dict
    """Whatever else is known; JSON can hold it."""


def classification_outcome(
    result: Mapping,
    num_samples: int,
    per_class: tuple[np.ndarray, np.ndarray] | None,
    headline: tuple[str, ...] = ("acc1",),
    counts: Mapping[str, int] | None = None,
) -> Outcome:
    """Turn an evaluator's result into figures.

    Args:
        result: figures by name, 'chance' of one guess in percent, 'num_classes', and details.
        num_samples: test samples that were scored.
        per_class: (C,) right samples and (C,) samples of each class.
        counts: samples of figures that are not over all of them.
    """
    chance = result["chance"]
    figures, details = {}, {}
    for name, value in result.items():
        if name == "mean_per_class_recall":
            interval = None if per_class is None else recall_interval(*per_class)
            figures[name] = Figure(value, interval, chance)
        elif _SHARE.fullmatch(name):
            guesses = int(name.rpartition("acc")[2])
            count = (counts or {}).get(name, num_samples)
            figures[name] = Figure(value, share_interval(value, count), min(100.0, guesses * chance))
        elif name not in ("chance", "confusion"):  # C x C numbers: scripts/zero_shot.py draws them
            details[name] = value
    return Outcome(figures, headline, details)


def per_class_counts(predicted: torch.Tensor, labels: torch.Tensor, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """(C,) samples of each class that were predicted right, and (C,) samples of each class."""
    counts = torch.bincount(labels, minlength=num_classes)
    return torch.bincount(labels[predicted == labels], minlength=num_classes).numpy(), counts.numpy()
