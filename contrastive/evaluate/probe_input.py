"""What the probes of frozen features share: their task, checks of what they are given, the figures of their result.

N samples, C classes, E embed_dim.
"""

from abc import abstractmethod
from dataclasses import dataclass, replace

import torch

from contrastive.data.class_joining import places_among
from contrastive.errors import UserError
from contrastive.evaluate.classification import per_class_counts
from contrastive.evaluate.embeddings import Space
from contrastive.evaluate.evaluated_model import EvaluatedModel
from contrastive.evaluate.tasks import EvaluationTask, Need, Outcome, classification_outcome


@dataclass(frozen=True)
class ProbeTask(EvaluationTask):
    """A task that fits something on frozen features of `train` and scores it on `test`."""

    train: str
    test: str
    space: Space = "projected"
    """Features after the projection, of unit length, or before it ('pooled'), as they come."""

    @property
    def data_title(self) -> str:
        return f"{self.train} → {self.test}"

    @property
    def data_used(self) -> tuple[str, ...]:
        """All data that it reads: training, test, and whatever `fit` asks for more."""
        return self.train, self.test

    def needs(self) -> list[Need]:
        return [Need(data, self.space) for data in self.data_used]

    @abstractmethod
    def fit(self, given: "ProbeInput", **how) -> dict:
        """Fit and score; `how`: device, progress.

        Returns:
            What `hit_figures` and `counts` say, in percent, details by name that JSON can hold, and 'predicted': (N,)
            int64, the classes of the test set.
        """

    def headline(self, result: dict) -> tuple[str, ...]:
        return ("acc1",)

    def run(self, subject: EvaluatedModel) -> Outcome:
        sets = [subject.embeddings(name, self.space).labelled(self.title) for name in self.data_used]
        train = sets[0]
        for number, other in enumerate(sets):
            if train.class_names != other.class_names:
                named = None not in (train.class_names, other.class_names)
                places = places_among(train.class_names, other) if named else None
                if places is None:
                    what = "have different classes" if named else "do not both name their classes (classnames.txt)"
                    raise UserError(f"{train.name} and {other.name} {what}; {self.title} needs the same")
                sets[number] = replace(other, labels=torch.tensor(places)[other.labels], class_names=train.class_names)
        test = sets[1]
        known = [len(one.class_names) for one in sets if one.class_names is not None]
        num_classes = known[0] if known else 1 + max(int(one.labels.max()) for one in sets)
        arrays = [array for one in sets for array in (one.features, one.labels)]
        given = checked_input(*arrays[:4], num_classes, *arrays[4:])  # after the test set comes the validation set
        found = self.fit(given, device=subject.device, progress=subject.progress)
        result = {**found, "skipped": dict(test.skipped)}
        right, samples = per_class_counts(result.pop("predicted"), test.labels, num_classes)
        return classification_outcome(result, (right.numpy(), samples.numpy()), self.headline(result))


@dataclass(frozen=True)
class ProbeInput:
    """Features (N, E), float32 or float64, and labels (N,) int64 in 0..C-1; every class is in the training set."""

    train: torch.Tensor
    train_labels: torch.Tensor
    test: torch.Tensor
    test_labels: torch.Tensor
    num_classes: int
    val: torch.Tensor | None = None
    val_labels: torch.Tensor | None = None


def checked_input(
    train: torch.Tensor,
    train_labels: torch.Tensor,
    test: torch.Tensor,
    test_labels: torch.Tensor,
    num_classes: int | None = None,
    val: torch.Tensor | None = None,
    val_labels: torch.Tensor | None = None,
) -> ProbeInput:
    """Return what fits together; classes are counted from the labels when `num_classes` is None.

    Raises:
        UserError: an empty set, as many labels as features missing, labels out of range, fewer than two classes, a
            class without training samples, widths that differ, features that are NaN or infinite, validation
            features without labels or the reverse.
    """
    if (val is None) != (val_labels is None):
        raise UserError("validation features and validation labels go together; one of them is missing")
    given = {"training": (train, train_labels), "test": (test, test_labels)}
    if val is not None:
        given["validation"] = (val, val_labels)
    sets = {name: _checked_set(name, *pair) for name, pair in given.items()}
    if num_classes is None:
        num_classes = 1 + max(int(labels.max()) for _, labels in sets.values())
    if num_classes < 2:
        raise UserError(f"{num_classes} class; a classifier needs at least two")
    width, dtype = sets["training"][0].shape[1], sets["training"][0].dtype
    for name, (features, labels) in sets.items():
        if features.shape[1] != width:
            raise UserError(
                f"{name} features are {features.shape[1]} wide, but the training features {width}; "
                "take both from the same model and the same side of its projection"
            )
        if labels.min() < 0 or labels.max() >= num_classes:
            span = f"{name} labels go from {labels.min()} to {labels.max()}"
            raise UserError(f"{span}, but there are {num_classes} classes: they have to be in 0..{num_classes - 1}")
        sets[name] = features.to(dtype), labels
    empty = (torch.bincount(sets["training"][1], minlength=num_classes) == 0).nonzero().flatten().tolist()
    if empty:
        which = f"class {empty[0]} has" if len(empty) == 1 else f"classes {', '.join(map(str, empty[:5]))} have"
        more = f" ({len(empty)} of {num_classes})" if len(empty) > 5 else ""
        raise UserError(f"{which} no training samples{more}; every class that is told apart needs at least one")
    return ProbeInput(*sets["training"], *sets["test"], num_classes, *sets.get("validation", (None, None)))


def _checked_set(name: str, features: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    features, labels = torch.as_tensor(features), torch.as_tensor(labels)
    if features.ndim != 2 or labels.ndim != 1 or len(features) != len(labels):
        shapes = f"{name} features have the shape {tuple(features.shape)} and their labels {tuple(labels.shape)}"
        raise UserError(f"{shapes}; expected (N, E) and (N,)")
    if len(features) == 0:
        raise UserError(f"there are no {name} samples")
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise UserError(f"{name} labels are {labels.dtype}; expected whole numbers")
    features = features if features.dtype == torch.float64 else features.float()
    bad = (~features.isfinite().all(dim=1)).nonzero().flatten()
    if len(bad):
        raise UserError(
            f"{name} features hold NaN or infinite values in {len(bad)} of {len(features)} rows, first in row {bad[0]}"
        )
    return features, labels.long()


def probe_device(device: str | torch.device) -> torch.device:
    """Where to compute; the CPU in place of MPS, which has neither float64 nor eigenvectors."""
    device = torch.device(device)
    return torch.device("cpu") if device.type == "mps" else device


def counts(given: ProbeInput) -> dict:
    """The chance level in percent, and how many samples and classes there are."""
    return {
        "chance": 100 / given.num_classes,
        "num_train": len(given.train),
        "num_test": len(given.test),
        "num_classes": given.num_classes,
    }
