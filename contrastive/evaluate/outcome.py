"""What a task says of a model: figures with their intervals and chance levels.

The intervals are percentile bootstrap intervals (Efron 1979): what other test samples might have given. A resample
draws as many test samples as there are, with replacement. How often each outcome is drawn is then multinomial, so the
counts of outcomes are drawn instead of the samples: the same distribution, at no cost in N. Every interval covers 95 %
and comes from 1,000 resamples of one seed. It says nothing of other training seeds.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

RESAMPLES = 1000
LEVEL = 95
SEED = 0
BLOCK_ELEMENTS = 2**22

Interval = tuple[float, float]
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
    per_class: tuple[np.ndarray, np.ndarray],
    headline: tuple[str, ...] = ("acc1",),
    counts: Mapping[str, int] | None = None,
) -> Outcome:
    """Turn an evaluator's result into figures.

    Args:
        result: figures by name, 'chance' of one guess in percent, 'num_classes', and details.
        per_class: (C,) right samples and (C,) test samples of each class.
        counts: samples of figures that are not over all of them.
    """
    chance, num_samples = result["chance"], int(per_class[1].sum())
    figures, details = {}, {}
    for name, value in result.items():
        if name == "mean_per_class_recall":
            figures[name] = Figure(value, recall_interval(*per_class), chance)
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


def share_interval(percent: float, count: int) -> Interval:
    """Interval of a share of `count` samples, in percent: accuracy, recall at k over single queries."""
    hits = np.random.default_rng(SEED).binomial(count, min(max(percent / 100, 0.0), 1.0), RESAMPLES)
    return _bounds(100 * hits / count)


def recall_interval(correct: np.ndarray, counts: np.ndarray) -> Interval:
    """Interval of mean per-class recall in percent.

    Args:
        correct: (C,) samples of each class that are right. counts: (C,) samples of each class.

    Classes of which a resample draws no sample are left out of its mean, as those without samples are.
    """
    correct, counts = (np.asarray(values, np.int64) for values in (correct, counts))
    cells = np.concatenate([correct, counts - correct])
    drawn = np.random.default_rng(SEED).multinomial(cells.sum(), cells / cells.sum(), RESAMPLES)
    right, wrong = np.split(drawn, 2, axis=1)
    total = right + wrong
    recall = np.divide(right, total, out=np.zeros(total.shape), where=total > 0)
    return _bounds(100 * recall.sum(axis=1) / (total > 0).sum(axis=1))


def clustered_interval(hits: np.ndarray, cluster: np.ndarray) -> Interval:
    """Interval of the mean of `hits` in percent, whole clusters drawn: captions of one image are not independent.

    Args:
        hits: (M,) 0 or 1. cluster: (M,) int, the image of each.
    """
    _, cluster = np.unique(np.asarray(cluster), return_inverse=True)
    sums, sizes = np.bincount(cluster, np.asarray(hits, np.float64)), np.bincount(cluster)
    # Clusters with the same number of hits and the same size are one outcome.
    outcomes, times = np.unique(np.stack([sums, sizes], axis=1), axis=0, return_counts=True)
    drawn = np.random.default_rng(SEED).multinomial(len(sums), times / len(sums), RESAMPLES)
    return _bounds(100 * (drawn @ outcomes[:, 0]) / (drawn @ outcomes[:, 1]))


def median_interval(values: np.ndarray) -> Interval:
    """Interval of the median of (N,) values, a median rank say."""
    values = np.asarray(values)
    rng = np.random.default_rng(SEED)
    block = max(1, BLOCK_ELEMENTS // len(values))
    medians = [
        np.median(values[rng.integers(0, len(values), (min(block, RESAMPLES - start), len(values)))], axis=1)
        for start in range(0, RESAMPLES, block)
    ]
    return _bounds(np.concatenate(medians))


def _bounds(figures: np.ndarray) -> Interval:
    tail = (100 - LEVEL) / 2
    low, high = np.percentile(figures, [tail, 100 - tail])
    return float(low), float(high)
