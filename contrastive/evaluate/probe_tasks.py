"""Tasks that fit something on frozen features of one data set and score it on another."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from contrastive.errors import UserError
from contrastive.evaluate.embedding_set import EmbeddingSet
from contrastive.evaluate.embeddings import Space
from contrastive.evaluate.outcome import Outcome, classification_outcome, per_class_counts
from contrastive.evaluate.subject import Subject
from contrastive.evaluate.tasks import TASKS, EvaluationTask, Need


@dataclass(frozen=True)
class _Probe(EvaluationTask):
    """Fit on `train`, scored on `test`."""

    train: str
    test: str
    space: Space = "projected"
    """Features after the projection, of unit length, or before it ('pooled'), as they come."""

    @property
    def data_title(self) -> str:
        return f"{self.train} → {self.test}"

    def needs(self) -> list[Need]:
        return [Need(data, self.space) for data in (self.train, self.test)]

    def sets(self, subject: Subject, *data: str) -> tuple[list[EmbeddingSet], int]:
        """The labelled embeddings of each of `data`, and how many classes they have."""
        sets = [subject.embeddings(name, self.space).labelled(self.title) for name in data]
        first = sets[0]
        for other in sets[1:]:
            if None not in (first.class_names, other.class_names) and first.class_names != other.class_names:
                raise UserError(f"{first.name} and {other.name} have different classes; {self.title} needs the same")
        known = [len(one.class_names) for one in sets if one.class_names is not None]
        return sets, known[0] if known else 1 + max(int(one.labels.max()) for one in sets)


def _outcome(result: Mapping, test: EmbeddingSet, num_classes: int, headline: tuple[str, ...] = ("acc1",)) -> Outcome:
    result = dict(result)
    predicted = torch.as_tensor(result.pop("predicted"))
    counts = per_class_counts(predicted, test.labels, num_classes)
    return classification_outcome({**result, "skipped": dict(test.skipped)}, len(test.labels), counts, headline)


@TASKS.register("linear_probe")
@dataclass(frozen=True)
class LinearProbeTask(_Probe):
    """Logistic regression by L-BFGS, its weight decay chosen on validation data (CLIP, appendix A.3)."""

    title = "linear probe"

    val: str | None = None
    """Data that the weight decay is chosen on; none: a part of `train`."""

    def needs(self) -> list[Need]:
        return super().needs() + ([] if self.val is None else [Need(self.val, self.space)])

    def run(self, subject: Subject) -> Outcome:
        from contrastive.evaluate.linear_probe import linear_probe

        data = (self.train, self.test) if self.val is None else (self.train, self.test, self.val)
        (train, test, *val), num_classes = self.sets(subject, *data)
        options = {"val": val[0].features, "val_labels": val[0].labels} if val else {}
        result = linear_probe(
            train.features,
            train.labels,
            test.features,
            test.labels,
            num_classes=num_classes,
            device=subject.device,
            progress=subject.progress,
            **options,
        )
        return _outcome(result, test, num_classes)


@TASKS.register("knn")
@dataclass(frozen=True)
class Knn(_Probe):
    """Votes of the nearest training images, by cosine (DINO, appendix F.1)."""

    title = "kNN"

    k: tuple[int, ...] = (10, 20, 100, 200)
    """Numbers of neighbours; acc1 is of 20 where it is among them."""
    temperature: float = 0.07

    def check(self) -> None:
        from contrastive.evaluate.knn import check_options

        check_options(self.k, self.temperature)

    def run(self, subject: Subject) -> Outcome:
        from contrastive.evaluate.knn import knn

        (train, test), num_classes = self.sets(subject, self.train, self.test)
        result = knn(
            train.features,
            train.labels,
            test.features,
            test.labels,
            k=self.k,
            temperature=self.temperature,
            num_classes=num_classes,
            device=subject.device,
            progress=subject.progress,
        )
        return _outcome(result, test, num_classes, (f"k{result['k']}_acc1",))


@TASKS.register("few_shot")
@dataclass(frozen=True)
class FewShot(_Probe):
    """Ridge regression on a few images of each class (big_vision's few-shot evaluator)."""

    title = "few-shot"

    shots: tuple[int, ...] = (1, 5, 10, 25)
    """Training images of each class."""
    seeds: int = 3
    """Draws of the training images; figures are means over them."""

    def check(self) -> None:
        from contrastive.evaluate.few_shot import check_options

        check_options(self.shots, self.seeds)

    def run(self, subject: Subject) -> Outcome:
        from contrastive.evaluate.few_shot import few_shot

        (train, test), num_classes = self.sets(subject, self.train, self.test)
        result = few_shot(
            train.features,
            train.labels,
            test.features,
            test.labels,
            shots=self.shots,
            seeds=self.seeds,
            num_classes=num_classes,
            device=subject.device,
            progress=subject.progress,
        )
        outcome = _outcome(result, test, num_classes, tuple(f"shot{number}_acc1" for number in result["shots"]))
        # A mean over draws, while 'predicted' is of one draw: no interval can be made around it from that.
        recall = replace(outcome.figures["mean_per_class_recall"], interval=None)
        return replace(outcome, figures={**outcome.figures, "mean_per_class_recall": recall})


@TASKS.register("head")
@dataclass(frozen=True)
class HeadTask(_Probe):
    """A classifier of scikit-learn, by its name in heads.py."""

    head: str = "linear"
    options: dict = field(default_factory=dict)
    """Of that classifier, by scikit-learn's names."""

    @property
    def title(self) -> str:
        return f"{self.head} head".replace("_", " ")

    def check(self) -> None:
        from contrastive.evaluate.heads import build_head

        build_head(self.head, self.options)

    def run(self, subject: Subject) -> Outcome:
        from contrastive.evaluate.heads import head_probe

        (train, test), num_classes = self.sets(subject, self.train, self.test)
        arrays = (train.features, train.labels, test.features, test.labels)
        result = head_probe(self.head, *arrays, options=self.options, num_classes=num_classes)
        return _outcome(result, test, num_classes)
