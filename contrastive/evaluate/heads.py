"""Any classifier of scikit-learn as a head on frozen features; `HEADS` holds them by name.

N samples, C classes, E embed_dim.
"""

import importlib
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from contrastive.errors import UserError, did_you_mean
from contrastive.evaluate.classification import ranked
from contrastive.evaluate.probe_input import ProbeInput, ProbeTask, counts, hit_figures
from contrastive.evaluate.tasks import TASKS
from contrastive.registry import Registry


@dataclass(frozen=True)
class Head:
    """How to make a classifier.

    Args:
        build: returns an unfitted classifier of scikit-learn's kind.
        standardise: whether features are brought to mean 0 and deviation 1 first (by the training set's).
    """

    build: Callable[[], Any]
    standardise: bool = True


HEADS: Registry[Head] = Registry("head")


def head_probe(name: str, given: ProbeInput, *, seed: int = 0, options: Mapping[str, Any] | None = None) -> dict:
    """Fit the classifier `name` on training features, score it on test features.

    Args:
        seed: decides everything random in the fit.
        options: of the classifier, by scikit-learn's names, in place of the defaults here.

    Returns:
        A dict that JSON can hold but for 'predicted' (N,) int64: 'acc1', 'acc5' (more than five classes; among equal
        scores the right class comes last), 'mean_per_class_recall', 'chance' in percent, 'head', 'options',
        'warnings' (what scikit-learn said, such as iterations that did not suffice), 'num_train', 'num_test',
        'num_classes'.

    Raises:
        UserError: an unknown head or option, or a value the classifier refuses.
    """
    options = dict(options or {})
    estimator = build_head(name, options, seed)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            estimator.fit(given.train.numpy(), given.train_labels.numpy())
            predicted = torch.from_numpy(np.asarray(estimator.predict(given.test.numpy()), dtype=np.int64))
            rank = _rank(estimator, given, predicted)
        except (ValueError, TypeError) as error:
            raise UserError(f"head {name}: {_first_line(error)}") from None
    return {
        **hit_figures(rank, predicted, given),
        "head": name,
        "options": options,
        "warnings": sorted({_first_line(warning.message) for warning in caught}),
        **counts(given),
        "predicted": predicted,
    }


def build_head(name: str, options: Mapping[str, Any], seed: int = 0) -> Any:
    """Return the unfitted classifier; UserError for an unknown head or option."""
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    head = HEADS.get(name)
    classifier = head.build()
    known = classifier.get_params()
    for option in options:
        if option not in known:
            raise UserError(
                f"head {name} has no option '{option}'.{did_you_mean(option, known)} Known: {', '.join(sorted(known))}"
            )
    if "random_state" in known:
        classifier.set_params(random_state=seed)
    classifier.set_params(**options)
    return make_pipeline(StandardScaler(), classifier) if head.standardise else classifier


def _rank(estimator: Any, given: ProbeInput, predicted: torch.Tensor) -> torch.Tensor:
    """How many classes the classifier puts before the right one (N,)."""
    for method in ("predict_proba", "decision_function"):
        if hasattr(estimator, method):
            scores = torch.from_numpy(np.asarray(getattr(estimator, method)(given.test.numpy()), dtype=np.float64))
            if scores.ndim == 1:  # of the second of two classes
                scores = torch.stack([-scores, scores], dim=1)
            return ranked(scores, given.test_labels)[0]
    return torch.where(predicted == given.test_labels, 0, given.num_classes - 1)


def _first_line(message: object) -> str:
    return str(message).strip().splitlines()[0].rstrip(".: ")


def _sklearn(module: str, name: str, **defaults: Any) -> Callable[[], Any]:
    """A classifier of scikit-learn, imported when it is wanted."""

    def build() -> Any:
        return getattr(importlib.import_module(f"sklearn.{module}"), name)(**defaults)

    return build


@TASKS.register("head")
@dataclass(frozen=True)
class HeadTask(ProbeTask):
    """A classifier of scikit-learn, by its name in `HEADS`."""

    head: str = "linear"
    options: dict = field(default_factory=dict)
    """Of that classifier, by scikit-learn's names."""

    @property
    def title(self) -> str:
        return f"{self.head} head".replace("_", " ")

    def check(self) -> None:
        build_head(self.head, self.options)

    def fit(self, given: ProbeInput, **how) -> dict:
        return head_probe(self.head, given, options=self.options)


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
