"""Tasks of a suite: what each asks of a model and of which data. `TASKS` holds them by name.

A task is a frozen dataclass whose fields are its keys in a suite's file. Another package adds one by registration.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from contrastive.data.class_sets import load_class_names
from contrastive.data.prompts import load_templates
from contrastive.errors import UserError
from contrastive.evaluate.classification import check_same_classes, classification, score_zero_shot
from contrastive.evaluate.compositional import compositional
from contrastive.evaluate.embeddings import Space, check_text_tower
from contrastive.evaluate.evaluated_model import EvaluatedModel
from contrastive.evaluate.outcome import (
    Figure,
    Outcome,
    classification_outcome,
    clustered_interval,
    median_interval,
    share_interval,
)
from contrastive.evaluate.retrieval import RECALL_AT, Ranks, score_retrieval
from contrastive.registry import Registry

TASKS: Registry[type["EvaluationTask"]] = Registry("task")
FEATURES = {"projected": "after the projection", "pooled": "before the projection"}


class Need(NamedTuple):
    """Embeddings that a task reads."""

    data: str
    space: Space
    texts: bool = False


class EvaluationTask(ABC):
    """What the tasks share."""

    title: str
    """In tables."""

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
        return [Need(self.data, self.features)]

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
            self._named(None)
        if self.templates is not None:
            load_templates(self.templates)

    def _named(self, own_names: Sequence[str] | None) -> tuple[str, ...]:
        try:
            return load_class_names(self.classes, own_names)
        except UserError as error:
            raise UserError(f"classes {error}") from None

    def run(self, subject: EvaluatedModel) -> Outcome:
        check_text_tower(subject.bundle, "zero-shot classification")
        images = subject.embeddings(self.data)
        names = None if self.classes is None else self._named(images.class_names)
        templates = None if self.templates is None else load_templates(self.templates)
        result = score_zero_shot(subject.bundle, images, class_names=names, templates=templates, device=subject.device)
        right, samples = _per_class(result)
        heldout = int(samples[sorted(images.heldout_labels)].sum())
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


@TASKS.register("compositional")
@dataclass(frozen=True)
class Compositional(EvaluationTask):
    """The right of two captions that differ in one word or their order: SugarCrepe's and Winoground's layouts."""

    title = "compositional"

    data: str
    """A JSON or JSONL file."""
    image_root: str | None = None
    """Folder of the images; none: that of the file."""

    def check(self) -> None:
        if not Path(self.data).expanduser().is_file():
            raise UserError(f"no file {self.data}")

    def needs(self) -> list[Need]:
        return []

    def run(self, subject: EvaluatedModel) -> Outcome:
        check_text_tower(subject.bundle, "the compositional choice")
        options = {"image_root": self.image_root, "limit": subject.limit, **subject.loading}
        result = compositional(subject.bundle, self.data, device=subject.device, **options)
        names = [name for name in ("acc1", "text_score", "image_score", "group_score") if name in result]
        chance, count = result["chance"], result["num_samples"]
        figures = {n: Figure(result[n], share_interval(result[n], count), chance.get(n)) for n in names}
        details = {n: v for n, v in result.items() if n not in (*names, "chance", "hits")}
        return Outcome(figures, tuple(names), details)


@TASKS.register("classification")
@dataclass(frozen=True)
class Classification(EvaluationTask):
    """Labelled images by a classifier's own head."""

    title = "classification"

    data: str

    @property
    def features_title(self) -> str:
        return "scores of its head"

    def needs(self) -> list[Need]:
        return []

    def run(self, subject: EvaluatedModel) -> Outcome:
        if not getattr(subject.bundle.config, "num_classes", None):
            raise UserError(f"{subject.name} has no classifier's head, which classification needs")
        source = subject.source(self.data)
        check_same_classes(subject.bundle.class_names, subject.name, source)
        result = classification(subject.bundle, source, device=subject.device, limit=subject.limit, **subject.loading)
        return classification_outcome(result, _per_class(result))


def _per_class(result: dict) -> tuple[np.ndarray, np.ndarray]:
    """(C,) right samples and (C,) samples of each class."""
    confusion = np.array(result["confusion"])
    return confusion.diagonal(), confusion.sum(axis=1)
