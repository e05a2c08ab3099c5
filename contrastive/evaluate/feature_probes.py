"""Probes of frozen features, but for the linear one: few-shot, any classifier of scikit-learn, nearest neighbours.

Few-shot is ridge regression as in big_vision's evaluator fewshot_lsr (Dosovitskiy et al. 2021, section 4.1); nearest
neighbours have weighted votes (Wu et al. 2018; DINO, Caron et al. 2021, its eval_knn.py). `HEADS` holds scikit-learn's
classifiers by name. N samples, M gallery (training) samples, C classes, E embed_dim, S shots.
"""

import importlib
import itertools
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from contrastive.errors import UserError, did_you_mean, needs, reason_of
from contrastive.evaluate.classification import hit_figures, ranked
from contrastive.evaluate.evaluated_model import EvaluatedModel
from contrastive.evaluate.probe_input import ProbeInput, ProbeTask, counts, probe_device
from contrastive.evaluate.tasks import TASKS, Outcome
from contrastive.log import bar
from contrastive.registry import Registry

SHOTS = (1, 5, 10, 25)
L2 = 2.0**10
BIAS = 100.0
"""The constant feature: so large that its weight is hardly penalised."""
LEAST_DEVIATION = 1e-5
BLOCK_ROWS = 4096
NEIGHBOURS = (10, 20, 100, 200)
USUAL = 20
"""The k that DINO reports."""
BLOCK_ELEMENTS = 2**26
"""Similarities held at once: 256 MB of float32."""


@TASKS.register("few_shot")
@dataclass(frozen=True)
class FewShot(ProbeTask):
    """Ridge regression on a few images of each class (big_vision's few-shot evaluator)."""

    title = "few-shot"

    shots: tuple[int, ...] = SHOTS
    """Training images of each class, S. A number that some class has fewer images than is left out."""
    seeds: int = 3
    """Draws of the training images, of seeds 0, 1, ...; fewer shots of a seed are the first of its more."""

    def check(self) -> None:
        if self.seeds < 1:
            raise UserError(f"few-shot needs at least one seed, got {self.seeds}")
        if not self.shots or min(self.shots) < 1:
            got = ", ".join(map(str, self.shots)) or "none"
            raise UserError(f"few-shot needs positive numbers of shots, got {got}")

    def fit(self, given: ProbeInput, device: str | torch.device = "cpu", progress: bool = False) -> dict:
        """Fit on S training images of each class, score on the whole test set; for each S and several draws.

        Args:
            given: its features (N, E) are whitened here by the mean and deviation of the drawn images.

        Returns:
            Also in percent 'shot1_acc1' and 'shot1_std', ... mean and standard deviation (of the seeds) for each S; the
            other figures are means for the most shots. And 'shots' as used, 'left_out_shots', 'seeds', 'l2'.
            'predicted' is that of the most shots and seed 0.

        Raises:
            UserError: no number of shots that every class has.
        """
        used, device = self._used(given), probe_device(device)
        found: dict[int, list[dict[str, float]]] = {number: [] for number in used}
        for seed in bar(range(self.seeds), "few-shot", shown=progress):
            drawn = draw(given.train_labels, given.num_classes, seed)
            for number in used:
                rows = torch.cat([places[:number] for places in drawn])
                train, labels = given.train[rows].to(device), given.train_labels[rows]
                scores = ridge_scores(train, labels, given.test, given.num_classes)
                rank, predicted = ranked(scores, given.test_labels)
                found[number].append(hit_figures(rank, predicted, given.test_labels, given.num_classes))
            if seed == 0:
                first = predicted
        figures = {}
        for number, draws in found.items():
            accuracies = [figure["acc1"] for figure in draws]
            figures[f"shot{number}_acc1"] = np.mean(accuracies).item()
            figures[f"shot{number}_std"] = np.std(accuracies).item()
        most = found[used[-1]]
        return {
            **{name: np.mean([figure[name] for figure in most]).item() for name in most[0]},
            **figures,
            "shots": used,
            "left_out_shots": [number for number in self.shots if number not in used],
            "seeds": self.seeds,
            "l2": L2,
            **counts(given),
            "predicted": first,
        }

    def _used(self, given: ProbeInput) -> list[int]:
        images = torch.bincount(given.train_labels, minlength=given.num_classes)
        used = sorted({number for number in self.shots if number <= images.min()})
        if not used:
            raise UserError(
                f"class {images.argmin()} has {images.min()} training images, fewer than the least number of shots, "
                f"{min(self.shots)}; ask for fewer shots"
            )
        return used

    def headline(self, result: dict) -> tuple[str, ...]:
        return tuple(f"shot{number}_acc1" for number in result["shots"])

    def run(self, subject: EvaluatedModel) -> Outcome:
        outcome = super().run(subject)
        # A mean over draws, while 'predicted' is of one draw: no interval can be made around it from that.
        recall = replace(outcome.figures["mean_per_class_recall"], interval=None)
        return replace(outcome, figures={**outcome.figures, "mean_per_class_recall": recall})


def draw(labels: torch.Tensor, num_classes: int, seed: int) -> list[torch.Tensor]:
    """For each class its places in `labels` (N,), in an order drawn by `seed`: as big_vision draws them."""
    generator = np.random.default_rng(seed)
    labels = labels.numpy()
    return [torch.from_numpy(generator.permutation(np.where(labels == label)[0])) for label in range(num_classes)]


def ridge_scores(
    train: torch.Tensor, labels: torch.Tensor, test: torch.Tensor, num_classes: int, l2: float = L2
) -> torch.Tensor:
    """Scores (N, C) of test features by the ridge regression of -1 and +1 on whitened training features (n, E).

    In float64: mean and deviation (plus 1e-5) of each feature are taken out, a constant feature of 100 is added, and
    the weights solve  (XᵀX + l2 I) W = XᵀY,  by whichever of XᵀX and XXᵀ is smaller.
    """
    device = train.device
    train = train.double()
    mean, deviation = train.mean(dim=0), train.std(dim=0, correction=0) + LEAST_DEVIATION

    def whitened(features: torch.Tensor) -> torch.Tensor:
        return F.pad((features - mean) / deviation, (0, 1), value=BIAS)

    rows = whitened(train)
    targets = 2 * F.one_hot(labels.to(device), num_classes).double() - 1
    if len(rows) >= rows.shape[1]:
        weights = _solve(rows.T @ rows, l2, rows.T @ targets)
    else:
        weights = rows.T @ _solve(rows @ rows.T, l2, targets)
    return torch.cat([(whitened(block.to(device).double()) @ weights).cpu() for block in test.split(BLOCK_ROWS)])


def _solve(matrix: torch.Tensor, l2: float, target: torch.Tensor) -> torch.Tensor:
    matrix.diagonal().add_(l2)
    return torch.cholesky_solve(target, torch.linalg.cholesky(matrix))


@dataclass(frozen=True)
class Head:
    """How to make a classifier."""

    build: Callable[[], Any]
    """Returns an unfitted classifier of scikit-learn's kind."""
    standardise: bool = True
    """Whether features are brought to mean 0 and deviation 1 first (by the training set's)."""


HEADS: Registry[Head] = Registry("head")


@TASKS.register("head")
@dataclass(frozen=True)
class HeadTask(ProbeTask):
    """A classifier of scikit-learn, by its name in `HEADS`."""

    head: str = "linear"
    options: dict = field(default_factory=dict)
    """Of that classifier, by scikit-learn's names, in place of the defaults here; 'random_state' is 0."""

    @property
    def title(self) -> str:
        return f"{self.head} head".replace("_", " ")

    def check(self) -> None:
        self.build()

    def build(self) -> Any:
        """Return the unfitted classifier; UserError for an unknown head or option."""
        head = HEADS.get(self.head)
        needs(f"head {self.head}", "sklearn")
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        classifier = head.build()
        known = classifier.get_params()
        for name in self.options:
            if name not in known:
                hint = did_you_mean(name, known)
                raise UserError(f"head {self.head} has no option '{name}'.{hint} Known: {', '.join(sorted(known))}")
        if "random_state" in known:
            classifier.set_params(random_state=0)
        classifier.set_params(**self.options)
        return make_pipeline(StandardScaler(), classifier) if head.standardise else classifier

    def fit(self, given: ProbeInput, device: str | torch.device = "cpu", progress: bool = False) -> dict:
        """Fit the classifier on training features, score it on test features; on the CPU.

        Returns:
            Also 'head', 'options', 'warnings' (what scikit-learn said, such as iterations that did not suffice). Among
            equal scores the right class comes last.

        Raises:
            UserError: a value the classifier refuses.
        """
        estimator = self.build()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            warnings.simplefilter("ignore", DeprecationWarning)  # of scikit-learn's own calls
            try:
                estimator.fit(given.train.numpy(), given.train_labels.numpy())
                predicted = torch.from_numpy(np.asarray(estimator.predict(given.test.numpy()), dtype=np.int64))
                rank = _rank(estimator, given, predicted)
            except (ValueError, TypeError) as error:
                raise UserError(f"head {self.head}: {reason_of(error).rstrip('.: ')}") from None
        return {
            **hit_figures(rank, predicted, given.test_labels, given.num_classes),
            "head": self.head,
            "options": self.options,
            "warnings": sorted({reason_of(warning.message).rstrip(".: ") for warning in caught}),
            **counts(given),
            "predicted": predicted,
        }


def _rank(estimator: Any, given: ProbeInput, predicted: torch.Tensor) -> torch.Tensor:
    """How many classes the classifier puts before the right one (N,)."""
    for method in ("predict_proba", "decision_function"):
        if hasattr(estimator, method):
            scores = torch.from_numpy(np.asarray(getattr(estimator, method)(given.test.numpy()), dtype=np.float64))
            if scores.ndim == 1:  # of the second of two classes
                scores = torch.stack([-scores, scores], dim=1)
            return ranked(scores, given.test_labels)[0]
    return torch.where(predicted == given.test_labels, 0, given.num_classes - 1)


def _sklearn(module: str, name: str, **defaults: Any) -> Callable[[], Any]:
    """A classifier of scikit-learn, imported when it is wanted."""
    return lambda: getattr(importlib.import_module(f"sklearn.{module}"), name)(**defaults)


for _name, _head in {
    "linear": Head(_sklearn("linear_model", "LogisticRegression", max_iter=1000)),
    "ridge": Head(_sklearn("linear_model", "RidgeClassifier")),
    "sgd": Head(_sklearn("linear_model", "SGDClassifier")),
    "linear_svm": Head(_sklearn("svm", "LinearSVC")),
    "svm": Head(_sklearn("svm", "SVC")),
    "mlp": Head(_sklearn("neural_network", "MLPClassifier", hidden_layer_sizes=(512,))),
    "knn": Head(_sklearn("neighbors", "KNeighborsClassifier", n_neighbors=20, metric="cosine"), standardise=False),
    "nearest_mean": Head(_sklearn("neighbors", "NearestCentroid"), standardise=False),
    "naive_bayes": Head(_sklearn("naive_bayes", "GaussianNB"), standardise=False),
    "lda": Head(_sklearn("discriminant_analysis", "LinearDiscriminantAnalysis", solver="lsqr", shrinkage="auto")),
    "qda": Head(_sklearn("discriminant_analysis", "QuadraticDiscriminantAnalysis", reg_param=0.5)),
    "decision_tree": Head(_sklearn("tree", "DecisionTreeClassifier"), standardise=False),
    "random_forest": Head(_sklearn("ensemble", "RandomForestClassifier", n_jobs=-1), standardise=False),
    "extra_trees": Head(_sklearn("ensemble", "ExtraTreesClassifier", n_jobs=-1), standardise=False),
    "gradient_boosting": Head(_sklearn("ensemble", "HistGradientBoostingClassifier"), standardise=False),
}.items():
    HEADS.register(_name)(_head)


@TASKS.register("knn")
@dataclass(frozen=True)
class Knn(ProbeTask):
    """Votes of the nearest training images, by cosine (DINO, appendix F.1)."""

    title = "kNN"

    k: tuple[int, ...] = NEIGHBOURS
    """Numbers of neighbours, each evaluated; of the default ones those above the gallery's size are left out."""
    temperature: float = 0.07

    def check(self) -> None:
        if not self.k or min(self.k) < 1:
            got = ", ".join(map(str, self.k)) or "none"
            raise UserError(f"kNN needs positive numbers of neighbours, got k = {got}")
        if not self.temperature > 0:
            raise UserError(f"the temperature is {self.temperature}; it has to be positive")

    def fit(self, given: ProbeInput, device: str | torch.device = "cpu", progress: bool = False) -> dict:
        """Classify each test sample by its k nearest gallery samples, each voting exp(cosine / temperature).

        Args:
            given: its training features, (M, E), are the gallery; normalised here, like the test features (N, E).

        Returns:
            Also 'k10_acc1', ... in percent for each k; the other figures are of k = 20, or of the largest below where
            20 is not among them: 'k'. And 'temperature', 'left_out_k'. Ties count against the model; a right class
            without a vote is behind all others.

        Raises:
            UserError: a k above M.

        The N x M similarities are held in blocks of rows.
        """
        used = self._used(len(given.train))
        chosen = max((number for number in used if number <= USUAL), default=min(used))
        device = probe_device(device)
        gallery, owners = F.normalize(given.train.to(device), dim=1), given.train_labels.to(device)
        size = max(1, BLOCK_ELEMENTS // max(len(gallery), max(used) * given.num_classes))
        blocks = list(zip(given.test.split(size), given.test_labels.split(size), strict=True))
        parts: dict[int, list] = {number: [] for number in used}
        for block, labels in bar(blocks, "nearest neighbours", shown=progress):
            similarity, nearest = (F.normalize(block.to(device), dim=1) @ gallery.T).topk(max(used), dim=1)
            # Relative to the nearest one, which changes no order and cannot overflow.
            weights, classes = ((similarity - similarity[:, :1]) / self.temperature).exp(), owners[nearest]
            votes = similarity.new_zeros(len(block), given.num_classes)
            for before, number in itertools.pairwise((0, *used)):  # in rising order: each adds its further neighbours
                votes = votes.scatter_add(1, classes[:, before:number], weights[:, before:number])
                parts[number].append(ranked(votes.cpu(), labels))
        found = {number: tuple(map(torch.cat, zip(*of_blocks, strict=True))) for number, of_blocks in parts.items()}
        return {
            **hit_figures(*found[chosen], given.test_labels, given.num_classes),
            **{f"k{number}_acc1": 100 * (rank < 1).double().mean().item() for number, (rank, _) in found.items()},
            "k": chosen,
            "left_out_k": [number for number in self.k if number not in used],
            "temperature": self.temperature,
            **counts(given),
            "predicted": found[chosen][1],
        }

    def _used(self, gallery: int) -> list[int]:
        numbers = sorted(set(self.k))
        if self.k == NEIGHBOURS:
            numbers = [number for number in numbers if number <= gallery]
            if not numbers:
                least = NEIGHBOURS[0]
                raise UserError(f"the gallery has {gallery} images, fewer than the least k, {least}; give a smaller k")
        if numbers[-1] > gallery:
            most = numbers[-1]
            raise UserError(f"k = {most} neighbours of a gallery of {gallery} images; give a k of at most {gallery}")
        return numbers

    def headline(self, result: dict) -> tuple[str, ...]:
        return (f"k{result['k']}_acc1",)
