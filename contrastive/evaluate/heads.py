"""Any classifier of scikit-learn as a head on frozen features; `HEADS` holds them by name.

N samples, C classes, E embed_dim.
"""

import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from contrastive.errors import UserError, did_you_mean, needs
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
                hint = f"{did_you_mean(name, known)} Known: {', '.join(sorted(known))}"
                raise UserError(f"head {self.head} has no option '{name}'.{hint}")
        if "random_state" in known:
            classifier.set_params(random_state=0)
        classifier.set_params(**self.options)
        return make_pipeline(StandardScaler(), classifier) if head.standardise else classifier

    def fit(self, given: ProbeInput, device: str | torch.device = "cpu", progress: bool = False) -> dict:
        """Fit the classifier on training features, score it on test features; on the CPU.

        Returns:
            A dict that JSON can hold but for 'predicted' (N,) int64: 'acc1', 'acc5' (more than five classes; among
            equal scores the right class comes last), 'mean_per_class_recall', 'chance' in percent, 'head', 'options',
            'warnings' (what scikit-learn said, such as iterations that did not suffice), 'num_train', 'num_test',
            'num_classes'.

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
                raise UserError(f"head {self.head}: {_first_line(error)}") from None
        return {
            **hit_figures(rank, predicted, given),
            "head": self.head,
            "options": self.options,
            "warnings": sorted({_first_line(warning.message) for warning in caught}),
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


def _first_line(message: object) -> str:
    return str(message).strip().splitlines()[0].rstrip(".: ")


def _sklearn(module: str, name: str, **defaults: Any) -> Callable[[], Any]:
    """A classifier of scikit-learn, imported when it is wanted."""

    def build() -> Any:
        return getattr(importlib.import_module(f"sklearn.{module}"), name)(**defaults)

    return build


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
