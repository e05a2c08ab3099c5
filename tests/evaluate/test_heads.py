import json

import numpy as np
import pytest
import torch
from probe_data import clouds, fitted
from sklearn.linear_model import LogisticRegression
from sklearn.naive_bayes import GaussianNB
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from contrastive.errors import UserError
from contrastive.evaluate.feature_probes import HEADS, Head, HeadTask
from contrastive.evaluate.probe_input import checked_input
from contrastive.registry import Registry

QUICK = {
    "mlp": {"hidden_layer_sizes": (16,), "max_iter": 50},
    "random_forest": {"n_estimators": 20},
    "extra_trees": {"n_estimators": 20},
    "gradient_boosting": {"max_iter": 5},
}
FITTED_AT_RANDOM = ("mlp", "random_forest", "extra_trees", "sgd")


def head_probe(name, given, options=None):
    return fitted(HeadTask, given, head=name, options=options or {})


def data(num_classes=7):
    return (*clouds(300, 12, num_classes, dtype=torch.float32), *clouds(200, 12, num_classes, 1, dtype=torch.float32))


@pytest.mark.parametrize("name", HEADS.names())
def test_every_head_learns_and_repeats_itself(name):
    given = data()
    options = QUICK.get(name)
    result = head_probe(name, checked_input(*given), options=options)
    predicted = result.pop("predicted")
    json.dumps(result)
    assert predicted.dtype == torch.int64
    assert result["acc1"] == pytest.approx(100 * (predicted == given[3]).double().mean().item())
    assert result["acc1"] > 3 * result["chance"] and result["acc5"] >= result["acc1"]
    assert result["mean_per_class_recall"] > 2 * result["chance"]
    assert (result["num_train"], result["num_test"], result["num_classes"]) == (300, 200, 7)
    assert torch.equal(predicted, head_probe(name, checked_input(*given), options=options)["predicted"])


@pytest.mark.parametrize("name", HEADS.names())
def test_two_classes(name):
    result = head_probe(name, checked_input(*data(2)), options=QUICK.get(name))
    assert result["acc1"] > 80 and "acc5" not in result and result["chance"] == 50


@pytest.mark.parametrize("name", FITTED_AT_RANDOM)
def test_the_seed_decides(name):
    given = data()
    options = {"max_iter": 2} if name in ("mlp", "sgd") else {"n_estimators": 2}
    first = head_probe(name, checked_input(*given), options=options)["predicted"]
    others = [
        head_probe(name, checked_input(*given), options | {"random_state": seed})["predicted"] for seed in (1, 2, 3)
    ]
    assert any(not torch.equal(first, other) for other in others)


def test_agrees_with_scikit_learn_standardised_or_not():
    train, train_labels, test, test_labels = (array.numpy() for array in data())
    for name, model in (
        ("linear", make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))),
        ("naive_bayes", GaussianNB()),
    ):
        model.fit(train, train_labels)
        result = head_probe(name, checked_input(*data()), options={"C": 0.1} if name == "linear" else None)
        assert np.array_equal(result["predicted"], model.predict(test))
        order = np.argsort(-model.predict_proba(test), axis=1)[:, :5]
        assert result["acc5"] == pytest.approx(100 * np.mean((order == test_labels[:, None]).any(axis=1)), abs=1e-4)
        assert result["acc1"] == pytest.approx(100 * model.score(test, test_labels), abs=1e-4)


def test_what_scikit_learn_warns_of_is_in_the_result():
    result = head_probe("linear", checked_input(*data()), options={"max_iter": 1})
    assert len(result["warnings"]) == 1 and "converge" in result["warnings"][0]
    assert "\n" not in result["warnings"][0]
    assert head_probe("linear", checked_input(*data()))["warnings"] == []


def test_a_head_of_ones_own(monkeypatch):
    registry = Registry("head")
    monkeypatch.setattr("contrastive.evaluate.feature_probes.HEADS", registry)

    class Majority:
        """Only what every classifier has."""

        def get_params(self):
            return {}

        def set_params(self):
            return self

        def fit(self, features, labels):
            self.label = np.bincount(labels).argmax()

        def predict(self, features):
            return np.full(len(features), self.label)

    registry.register("majority")(Head(Majority, standardise=False))
    given = data()
    result = head_probe("majority", checked_input(*given))
    assert (result["predicted"] == 0).all() and result["acc1"] == result["acc5"] > 0
    assert result["mean_per_class_recall"] == pytest.approx(100 / 7)


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("randomforest", None, r"unknown head 'randomforest'. Did you mean 'random_forest'\?"),
        ("random_forest", {"n_estimator": 5}, r"head random_forest has no option 'n_estimator'. Did you mean 'n_est"),
        ("linear", {"C": -1.0}, "head linear: The 'C' parameter of LogisticRegression must be"),
        ("knn", {"n_neighbors": 301}, "head knn: Expected n_neighbors <= n_samples_fit"),
    ],
)
def test_refuses(name, options, match):
    with pytest.raises(UserError, match=match) as caught:
        head_probe(name, checked_input(*data()), options=options)
    assert "\n" not in str(caught.value)
