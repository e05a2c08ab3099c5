"""Tasks of a suite: what each asks of a model and of which data, and the figures it answers with.

A task is a frozen dataclass whose fields are its keys in a suite's file. `TASKS` holds them by name; another package
adds one by registration. Probes and the compositional choice stand in files of their own.

Figures come with percentile bootstrap intervals (Efron 1979): what other test samples might have given. A resample
draws as many test samples as there are, with replacement. How often each outcome is drawn is then multinomial, so the
counts of outcomes are drawn instead of the samples: the same distribution, at no cost in N. Every interval covers 95 %
and comes from 1,000 resamples of one seed. It says nothing of other training seeds.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from contrastive.data.class_joining import in_classes_of, load_class_set, warn_of_ids
from contrastive.data.class_sets import ClassSet
from contrastive.data.prompts import load_templates
from contrastive.errors import UserError
from contrastive.evaluate.classification import classification, score_zero_shot
from contrastive.evaluate.embeddings import Space, check_text_tower
from contrastive.evaluate.evaluated_model import EvaluatedModel
from contrastive.evaluate.retrieval import RECALL_AT, Ranks, score_retrieval
from contrastive.registry import Registry

TASKS: Registry[type["EvaluationTask"]] = Registry("task")
FEATURES = {"projected": "after the projection", "pooled": "before the projection"}
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
        elif name not in ("chance", "confusion"):  # C x C numbers: contrastive zero-shot draws them
            details[name] = value
    return Outcome(figures, headline, details)


class Need(NamedTuple):
    """Embeddings that a task reads."""

    data: str
    space: Space
    texts: bool = False


class EvaluationTask(ABC):
    """What the tasks share."""

    title: str
    """In tables."""
    reads_embeddings = True
    """Whether it scores the embeddings of its data, rather than the data themselves."""

    @property
    def data_title(self) -> str:
        """The data in tables."""
        return self.data

    @property
    def features(self) -> Space:
        """Which features it uses."""
        return getattr(self, "space", "projected")

    @property
    def features_title(self) -> str:
        """The features in tables."""
        return FEATURES[self.features]

    @property
    def subtitle(self) -> str:
        """The data, and the features where they are not the usual ones."""
        return f"{self.data_title}, before the projection" if self.features == "pooled" else self.data_title

    def check(self) -> None:  # noqa: B027 - most tasks have nothing to check
        """Raise UserError for options that cannot work, before any model is loaded."""

    def needs(self) -> list[Need]:
        """The embeddings it reads."""
        return [Need(self.data, self.features)] if self.reads_embeddings else []

    @abstractmethod
    def run(self, subject: EvaluatedModel) -> Outcome:
        """Evaluate `subject`; UserError where that cannot be."""


@TASKS.register("zero_shot")
@dataclass(frozen=True)
class ZeroShot(EvaluationTask):
    """Labelled images by their nearest class text."""

    title = "zero-shot"

    data: str
    classes: str | None = None
    """Class names: a set, or a file; none: the data's own."""
    templates: str | None = None
    """Prompts: a set, or a file; none: those that fit the data."""

    def check(self) -> None:
        if self.classes is not None:
            self._named()
        if self.templates is not None:
            load_templates(self.templates)

    def _named(self) -> ClassSet:
        try:
            return load_class_set(self.classes)
        except UserError as error:
            raise UserError(f"classes {error}") from None

    def run(self, subject: EvaluatedModel) -> Outcome:
        check_text_tower(subject.bundle, "zero-shot classification")
        images = subject.embeddings(self.data)
        names = None if self.classes is None else self._named()
        if names is None:
            warn_of_ids(images)
        templates = None if self.templates is None else load_templates(self.templates)
        result = score_zero_shot(subject.bundle, images, class_names=names, templates=templates, device=subject.device)
        return zero_shot_outcome(result, images.heldout_labels)


def zero_shot_outcome(result: Mapping, heldout_labels: Collection[int]) -> Outcome:
    """Turn what `zero_shot` returns into figures."""
    right, samples = _per_class(result)
    heldout = int(samples[sorted(heldout_labels)].sum())
    counts = {"heldout_acc1": heldout, "seen_acc1": int(samples.sum()) - heldout}
    return classification_outcome(result, (right, samples), counts=counts)


@TASKS.register("retrieval")
@dataclass(frozen=True)
class Retrieval(EvaluationTask):
    """Captions by image, and images by caption."""

    title = "retrieval"

    data: str
    captions: Literal["all", "first"] = "all"
    """Every caption of an image, or one."""

    def needs(self) -> list[Need]:
        return [Need(self.data, "projected", texts=True)]

    def run(self, subject: EvaluatedModel) -> Outcome:
        check_text_tower(subject.bundle, "retrieval")
        images = subject.embeddings(self.data, texts=True)
        result, ranks = score_retrieval(images, self.captions, subject.device)
        chance = result.pop("chance")
        names = [name for name, value in result.items() if isinstance(value, float)]
        figures = {
            name: Figure(result[name], _retrieval_interval(name, result[name], ranks), chance.get(name))
            for name in names
        }
        details = {name: value for name, value in result.items() if name not in names}
        return Outcome(figures, ("image_to_text_r1", "text_to_image_r1"), details)


def _retrieval_interval(name: str, value: float, of: Ranks) -> tuple[float, float]:
    by_image = name.startswith("image_to_text")
    ranks = of.images if by_image else of.texts
    if name.endswith("median_rank"):
        return median_interval(ranks.numpy() + 1)
    if by_image:
        return share_interval(value, len(ranks))
    k = next(k for k in RECALL_AT if name.endswith(f"_r{k}"))
    return clustered_interval((ranks < k).numpy(), of.text_image.numpy())


@TASKS.register("classification")
@dataclass(frozen=True)
class Classification(EvaluationTask):
    """Labelled images by a classifier's own head."""

    title, features_title = "classification", "scores of its head"
    reads_embeddings = False

    data: str

    def run(self, subject: EvaluatedModel) -> Outcome:
        if not getattr(subject.bundle.config, "num_classes", None):
            raise UserError(f"{subject.name} has no classifier's head, which classification needs")
        source = in_classes_of(subject.bundle.class_names, subject.name, subject.source(self.data))
        result = classification(subject.bundle, source, **subject.reading)
        return classification_outcome(result, _per_class(result))


def _per_class(result: dict) -> tuple[np.ndarray, np.ndarray]:
    """(C,) right samples and (C,) samples of each class."""
    confusion = np.array(result["confusion"])
    return confusion.diagonal(), confusion.sum(axis=1)


def share_interval(percent: float, count: int) -> Interval:
    """Interval of a share of `count` samples, in percent: accuracy, recall at k over single queries."""
    hits = np.random.default_rng(SEED).binomial(count, min(max(percent / 100, 0.0), 1.0), RESAMPLES)
    return bounds(100 * hits / count)


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
    return bounds(100 * recall.sum(axis=1) / (total > 0).sum(axis=1))


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
    return bounds(100 * (drawn @ outcomes[:, 0]) / (drawn @ outcomes[:, 1]))


def median_interval(values: np.ndarray) -> Interval:
    """Interval of the median of (N,) values, a median rank say."""
    values = np.asarray(values)
    rng = np.random.default_rng(SEED)
    block = max(1, BLOCK_ELEMENTS // len(values))
    medians = [
        np.median(values[rng.integers(0, len(values), (min(block, RESAMPLES - start), len(values)))], axis=1)
        for start in range(0, RESAMPLES, block)
    ]
    return bounds(np.concatenate(medians))


def bounds(figures: np.ndarray) -> Interval:
    tail = (100 - LEVEL) / 2
    low, high = np.percentile(figures, [tail, 100 - tail])
    return float(low), float(high)
