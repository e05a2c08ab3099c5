"""kNN against its formula and against scikit-learn's."""

import json

import numpy as np
import pytest
import torch
from probe_data import clouds, fitted, unit
from sklearn.neighbors import KNeighborsClassifier

from contrastive.errors import UserError
from contrastive.evaluate import feature_probes as module
from contrastive.evaluate.feature_probes import Knn
from contrastive.evaluate.probe_input import checked_input


def votes(train, train_labels, test, k, temperature, num_classes):
    """By sorting the whole matrix."""
    similarity = (unit(test) @ unit(train).T).numpy()
    found = np.zeros((len(test), num_classes))
    for row, values in enumerate(similarity):
        for neighbour in np.argsort(-values)[:k]:
            found[row, train_labels[neighbour]] += np.exp(values[neighbour] / temperature)
    return found


def data(num_classes=7, seed=0):
    sets = (clouds(n, 12, num_classes, seed + s, 2.0) for s, n in enumerate((250, 120)))
    (train, train_labels), (test, test_labels) = sets
    return train - 2, train_labels, test - 2, test_labels


@pytest.mark.parametrize("block", [1, 250 * 50, 10**9])
@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_agrees_with_the_formula_in_any_blocks(block, temperature, monkeypatch):
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", block)
    train, train_labels, test, test_labels = data()
    result = fitted(
        Knn, checked_input(train, train_labels, test, test_labels), k=(1, 5, 20, 250), temperature=temperature
    )
    for k in (1, 5, 20, 250):
        found = votes(train, train_labels, test, k, temperature, 7)
        right = found.argmax(1) == test_labels.numpy()
        assert result[f"k{k}_acc1"] == pytest.approx(100 * right.mean(), abs=1e-4)
        if k == 20:
            assert result["acc1"] == result["k20_acc1"] and result["k"] == 20
            assert np.array_equal(result["predicted"], np.where(right, test_labels, found.argmax(1)))
            found[found == 0] = -1  # without a vote: behind the others, and the right one last
            own = np.take_along_axis(found, test_labels.numpy()[:, None], 1)
            ahead = (found > own).sum(1) + ((found == own).sum(1) - 1)
            assert result["acc5"] == pytest.approx(100 * np.mean(ahead < 5), abs=1e-4)
            recalls = [right[test_labels.numpy() == label].mean() for label in range(7)]
            assert result["mean_per_class_recall"] == pytest.approx(100 * np.mean(recalls), abs=1e-4)


def test_agrees_with_scikit_learn():
    train, train_labels, test, test_labels = data(num_classes=4, seed=5)
    result = fitted(Knn, checked_input(train.float(), train_labels, test.float(), test_labels), k=(10, 20, 100))
    for k in (10, 20, 100):
        theirs = KNeighborsClassifier(k, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07))
        theirs.fit(train.numpy(), train_labels.numpy())
        expected = 100 * theirs.score(test.numpy(), test_labels.numpy())
        assert result[f"k{k}_acc1"] == pytest.approx(expected, abs=1e-4)
        if k == 20:
            assert np.array_equal(result["predicted"], theirs.predict(test.numpy()))


def test_the_result():
    train, train_labels, test, test_labels = data(num_classes=4)
    result = fitted(Knn, checked_input(train, train_labels, test, test_labels), k=[30, 4, 6])
    assert result.pop("predicted").dtype == torch.int64
    json.dumps(result)
    assert result["k"] == 6 and result["acc1"] == result["k6_acc1"]
    assert {"k4_acc1", "k6_acc1", "k30_acc1"} < set(result) and "acc5" not in result
    assert (result["num_train"], result["num_test"], result["num_classes"], result["chance"]) == (250, 120, 4, 25)


def test_default_k_above_the_gallery_are_left_out():
    train, train_labels, test, test_labels = data(num_classes=3)
    result = fitted(Knn, checked_input(train[:50], train_labels[:50], test, test_labels))
    assert result["left_out_k"] == [100, 200] and {"k10_acc1", "k20_acc1"} < set(result)
    assert "k100_acc1" not in result
    with pytest.raises(UserError, match="the gallery has 9 images, fewer than the least k, 10"):
        fitted(Knn, checked_input(train[:9], train_labels[:9], test, test_labels))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"k": (10, 251)}, "k = 251 neighbours of a gallery of 250 images"),
        ({"k": (0, 10)}, "positive numbers of neighbours, got k = 0, 10"),
        ({"k": ()}, "positive numbers of neighbours"),
        ({"temperature": 0.0}, "the temperature is 0.0; it has to be positive"),
        ({"temperature": float("nan")}, "the temperature is nan"),
    ],
)
def test_refuses(options, match):
    with pytest.raises(UserError, match=match):
        fitted(Knn, checked_input(*data()), **options)


def test_a_tiny_temperature_does_not_overflow():
    train, train_labels, test, test_labels = data(num_classes=3)
    nearest = fitted(Knn, checked_input(train.float(), train_labels, test.float(), test_labels), k=(1,))
    result = fitted(
        Knn, checked_input(train.float(), train_labels, test.float(), test_labels), k=(20,), temperature=1e-6
    )
    assert result["acc1"] == nearest["acc1"]


def test_features_that_are_all_alike_score_nothing():
    labels = torch.arange(40) % 4
    result = fitted(Knn, checked_input(torch.ones(40, 3), labels, torch.ones(8, 3), torch.arange(8) % 4), k=(40,))
    assert result["acc1"] == 0
