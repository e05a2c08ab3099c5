"""Few-shot ridge regression against big_vision's formulae, by the eigendecomposition it uses."""

import json

import numpy as np
import pytest
import torch
from probe_data import clouds, fitted
from sklearn.linear_model import Ridge

from contrastive.errors import UserError
from contrastive.evaluate.feature_probes import FewShot, draw, ridge_scores
from contrastive.evaluate.probe_input import checked_input


def whiten(train, test):
    mean, deviation = train.mean(0), train.std(0) + 1e-5
    return ((np.pad((x - mean) / deviation, ((0, 0), (0, 1)), constant_values=100.0)) for x in (train, test))


def big_vision_scores(train, labels, test, num_classes, l2):
    x, x_test = whiten(train, test)
    y = 2 * np.eye(num_classes)[labels] - 1
    if x.shape[0] >= x.shape[1]:
        eigenvalues, q = np.linalg.eigh(x.T @ x)
        left, right = q, q.T @ (x.T @ y)
    else:
        eigenvalues, q = np.linalg.eigh(x @ x.T)
        left, right = x.T @ q, q.T @ y
    return x_test @ (left / (eigenvalues + l2) @ right)


@pytest.mark.parametrize("num", [20, 24, 25, 26, 300])  # 24 features and the constant one: both ways and their border
@pytest.mark.parametrize("l2", [1.0, 2.0**10])
def test_scores_are_big_visions(num, l2):
    (train, labels), (test, _) = clouds(num, 24, 5), clouds(100, 24, 5, seed=1)
    found = ridge_scores(train, labels, test, 5, l2)
    expected = big_vision_scores(train.numpy(), labels.numpy(), test.numpy(), 5, l2)
    np.testing.assert_allclose(found, expected, atol=1e-8)
    x, x_test = whiten(train.numpy(), test.numpy())
    ridge = Ridge(alpha=l2, fit_intercept=False, solver="cholesky").fit(x, 2 * np.eye(5)[labels.numpy()] - 1)
    np.testing.assert_allclose(found, ridge.predict(x_test), atol=1e-6)


def test_a_feature_that_never_varies_does_no_harm():
    train, labels = clouds(60, 8, 3)
    train[:, 2] = 7.0
    assert ridge_scores(train, labels, train, 3).isfinite().all()


def test_figures_are_means_over_draws():
    (train, labels), (test, test_labels) = clouds(600, 16, 7, 0, 1.5), clouds(300, 16, 7, 1, 1.5)
    result = fitted(FewShot, checked_input(train, labels, test, test_labels), shots=(5, 1), seeds=4)
    predicted = result.pop("predicted")
    json.dumps(result)
    for shots in (1, 5):
        accuracies, top5 = [], []
        for seed in range(4):
            generator = np.random.default_rng(seed)
            rows = [generator.permutation(np.where(labels.numpy() == label)[0])[:shots] for label in range(7)]
            rows = np.concatenate(rows)
            scores = big_vision_scores(train.numpy()[rows], labels.numpy()[rows], test.numpy(), 7, 2.0**10)
            accuracies.append(100 * np.mean(scores.argmax(1) == test_labels.numpy()))
            top5.append(100 * np.mean((np.argsort(-scores, 1)[:, :5] == test_labels.numpy()[:, None]).any(1)))
            if (shots, seed) == (5, 0):
                assert np.array_equal(predicted, scores.argmax(1))
        assert result[f"shot{shots}_acc1"] == pytest.approx(np.mean(accuracies), abs=1e-4)
        assert result[f"shot{shots}_std"] == pytest.approx(np.std(accuracies), abs=1e-4)
    assert result["acc1"] == result["shot5_acc1"] > result["shot1_acc1"] > result["chance"]
    assert result["acc5"] == pytest.approx(np.mean(top5), abs=1e-4)
    assert result["shots"] == [1, 5] and result["left_out_shots"] == [] and result["seeds"] == 4


def test_draws_nest_and_hold_one_class_each():
    labels = clouds(200, 4, 5)[1]
    for label, places in enumerate(draw(labels, 5, 0)):
        assert (labels[places] == label).all() and len(places) == (labels == label).sum()
    assert any(not torch.equal(one, other) for one, other in zip(draw(labels, 5, 0), draw(labels, 5, 1), strict=True))


def test_shots_that_a_class_does_not_have_are_left_out():
    (train, labels), (test, test_labels) = clouds(100, 8, 3), clouds(50, 8, 3, seed=1)
    kept = torch.cat([(labels == label).nonzero().flatten()[:count] for label, count in ((0, 20), (1, 12), (2, 6))])
    result = fitted(FewShot, checked_input(train[kept], labels[kept], test, test_labels))
    assert result["shots"] == [1, 5] and result["left_out_shots"] == [10, 25]
    assert "shot10_acc1" not in result and result["num_train"] == 38
    with pytest.raises(UserError, match="class 2 has 6 training images, fewer than the least number of shots, 10"):
        fitted(FewShot, checked_input(train[kept], labels[kept], test, test_labels), shots=(10, 25))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"shots": (0, 5)}, "positive numbers of shots, got 0, 5"),
        ({"shots": ()}, "positive numbers of shots, got none"),
        ({"seeds": 0}, "at least one seed, got 0"),
    ],
)
def test_refuses(options, match):
    with pytest.raises(UserError, match=match):
        fitted(FewShot, checked_input(*clouds(60, 8, 3), *clouds(20, 8, 3, seed=1)), **options)
