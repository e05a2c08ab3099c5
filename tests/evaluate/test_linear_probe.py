"""The linear probe against scikit-learn's LogisticRegression and against its objective written out."""

import json
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from probe_data import clouds, unit
from sklearn.linear_model import LogisticRegression

from contrastive.errors import UserError
from contrastive.evaluate import logistic as module
from contrastive.evaluate.linear_probe import held_out, linear_probe, sweep_weight_decay, weight_decay_at
from contrastive.evaluate.logistic import LinearProbe, LogisticProblem, fit_logistic
from contrastive.evaluate.probe_input import checked_input


def objective(weight, bias, features, labels, weight_decay):
    """The formula in fit_logistic's docstring."""
    factor = 2 if len(weight) == 2 else 1
    loss = F.cross_entropy(features @ weight.T + bias, labels, reduction="sum")
    return loss + factor * weight_decay / 2 * (weight**2).sum()


def sklearn_fit(features, labels, weight_decay):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newton-cholesky says when it falls back on lbfgs
        model = LogisticRegression(C=1 / weight_decay, solver="newton-cholesky", tol=1e-10, max_iter=1000)
        return model.fit(features.numpy(), labels.numpy())


@pytest.mark.parametrize("num_classes", [2, 3, 10])
@pytest.mark.parametrize("weight_decay", [1e-2, 1.0, 1e3])
def test_agrees_with_scikit_learn(num_classes, weight_decay):
    features, labels = clouds(400, 16, num_classes)
    theirs = sklearn_fit(features, labels, weight_decay)
    ours = fit_logistic(features, labels, num_classes, weight_decay, tolerance=1e-9)
    assert ours.converged
    weight, bias = ours.weight, ours.bias
    if num_classes == 2:
        weight, bias = weight[1:] - weight[:1], bias[1:] - bias[:1]
    np.testing.assert_allclose(weight, theirs.coef_, atol=5e-5)
    np.testing.assert_allclose(bias, theirs.intercept_, atol=5e-5)
    test, _ = clouds(300, 16, num_classes, seed=1)
    np.testing.assert_allclose(ours.scores(test).softmax(1), theirs.predict_proba(test.numpy()), atol=5e-5)
    np.testing.assert_array_equal(ours.scores(test).argmax(dim=1), theirs.predict(test.numpy()))


def test_more_dimensions_than_samples():
    features, labels = clouds(40, 120, 4)
    theirs = sklearn_fit(features, labels, 0.1)
    ours = fit_logistic(features, labels, 4, 0.1, tolerance=1e-9)
    np.testing.assert_allclose(ours.weight, theirs.coef_, atol=5e-5)
    np.testing.assert_allclose(ours.bias, theirs.intercept_, atol=5e-5)


@pytest.mark.parametrize("weight_decay", [1e-6, 1e-2, 1e6])
def test_the_gradient_of_the_formula_vanishes(weight_decay):
    features, labels = clouds(500, 24, 5)
    found = fit_logistic(features, labels, 5, weight_decay, tolerance=1e-10)
    weight, bias = found.weight.clone().requires_grad_(), found.bias.clone().requires_grad_()
    gradients = torch.autograd.grad(objective(weight, bias, features, labels, weight_decay), (weight, bias))
    at_zero = torch.zeros_like(weight).requires_grad_()
    (reference,) = torch.autograd.grad(objective(at_zero, bias.detach(), features, labels, 0.0), at_zero)
    assert found.converged
    assert max(gradient.abs().max() for gradient in gradients) < 1e-7 * reference.abs().max()


@pytest.mark.parametrize("block", [1, 7, 10**6])
def test_evaluates_the_formula_and_its_gradient_in_any_blocks(block, monkeypatch):
    features, labels = clouds(50, 6, 3)
    monkeypatch.setattr(module, "BLOCK_SCORES", block * 6)
    problem = LogisticProblem(features, labels, 3, "cpu")
    decays = [0.0, 0.3]
    weights = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values, gradients = problem.evaluate(weights, problem._penalties(decays))
    for one, value, gradient, decay in zip(weights, values, gradients, decays, strict=True):
        one = one.clone().requires_grad_()
        weight = one[:, :-1] @ problem._vectors.T / problem._scale
        expected = objective(weight, one[:, -1] - weight @ problem._mean, features, labels, decay)
        (slope,) = torch.autograd.grad(expected, one)
        assert torch.allclose(value, expected) and torch.allclose(gradient, slope)


def test_float32_comes_to_the_same_optimum():
    features, labels = clouds(2000, 64, 10)
    features = unit(features)
    exact = fit_logistic(features, labels, 10, 0.1, tolerance=1e-10)
    found = fit_logistic(features.float(), labels, 10, 0.1)
    assert found.converged and found.weight.dtype == torch.float32
    assert (found.scores(features.float()).softmax(1) - exact.scores(features).softmax(1)).abs().max() < 1e-4


def test_several_weight_decays_at_once_are_what_each_is_alone():
    features, labels = clouds(300, 12, 4)
    decays = [1e-3, 1.0, 1e4]
    options = {"max_iterations": 1000, "tolerance": 1e-9}
    together = LogisticProblem(features, labels, 4, "cpu").fit(decays, [None] * 3, **options)
    for probe, decay in zip(together, decays, strict=True):
        alone = fit_logistic(features, labels, 4, decay, tolerance=1e-9)
        assert probe.weight_decay == decay
        assert torch.allclose(probe.weight, alone.weight, atol=1e-7)


def test_a_start_saves_steps_and_changes_nothing():
    features, labels = clouds(300, 12, 4)
    first = fit_logistic(features, labels, 4, 0.1, tolerance=1e-9)
    again = fit_logistic(features, labels, 4, 0.1, tolerance=1e-8, start=first)
    near = fit_logistic(features, labels, 4, 0.12, tolerance=1e-9, start=first)
    cold = fit_logistic(features, labels, 4, 0.12, tolerance=1e-9)
    assert again.iterations == 0 and near.iterations < cold.iterations
    assert torch.allclose(near.weight, cold.weight, atol=1e-7)


def test_the_scale_of_the_features_is_the_weight_decays():
    features, labels = clouds(300, 12, 4)
    small = fit_logistic(features, labels, 4, 0.1)
    large = fit_logistic(1000 * features, labels, 4, 0.1 * 1000**2)
    assert small.iterations == large.iterations
    assert torch.allclose(small.scores(features), large.scores(1000 * features), atol=1e-6)


def test_few_iterations_are_said_not_to_have_converged():
    features, labels = clouds(300, 12, 4)
    found = fit_logistic(features, labels, 4, 1e-4, max_iterations=3)
    assert found.iterations == 3 and not found.converged


def test_features_that_are_all_alike_give_the_frequencies():
    labels = torch.tensor([0, 0, 0, 1])
    found = fit_logistic(torch.ones(4, 3), labels, 2, 1.0)
    assert torch.allclose(found.scores(torch.ones(1, 3)).softmax(1), torch.tensor([[0.75, 0.25]]), atol=1e-3)


def reference_sweep(train, train_labels, val, val_labels):
    """The search as CLIP's paper words it, with scikit-learn's fits."""
    accuracies = {}

    def add(exponent):
        if -6 <= exponent <= 6 and exponent not in accuracies:
            model = sklearn_fit(train, train_labels, 10.0**exponent)
            accuracies[exponent] = 100 * model.score(val.numpy(), val_labels.numpy())

    for exponent in range(-6, 7, 2):
        add(exponent)
    distance = 2.0
    while distance > 1 / 8:
        distance /= 2
        peak = max(accuracies, key=lambda e: (accuracies[e], e))
        add(peak - distance)
        add(peak + distance)
    return 10.0 ** max(accuracies, key=lambda e: (accuracies[e], e)), {10.0**e: a for e, a in accuracies.items()}


@pytest.mark.parametrize("spread", [2.0, 4.0])
def test_the_sweep_is_the_papers_with_scikit_learn(spread):
    (train, train_labels), (val, val_labels) = (clouds(n, 12, 4, seed, spread) for n, seed in ((150, 0), (400, 1)))
    best, accuracies = reference_sweep(train, train_labels, val, val_labels)
    found = sweep_weight_decay(train, train_labels, val, val_labels, 4, tolerance=1e-9)
    assert found.best.weight_decay == pytest.approx(best)
    assert list(found.accuracies) == pytest.approx(sorted(accuracies))
    assert list(found.accuracies.values()) == pytest.approx([accuracies[key] for key in sorted(accuracies)], abs=1e-4)
    assert len(accuracies) <= 15


def test_the_grid_has_96_steps():
    assert weight_decay_at(0) == 1e-6 and weight_decay_at(96) == 1e6 and weight_decay_at(48) == 1
    assert weight_decay_at(49) == pytest.approx(10 ** (1 / 8))


def test_among_equals_the_strongest_decay_wins_and_the_grids_end_is_kept():
    train, labels = torch.eye(4).repeat(10, 1), torch.arange(4).repeat(10)
    best, accuracies, _ = sweep_weight_decay(train, labels, train, labels, 4)
    assert set(accuracies.values()) == {100.0} and best.weight_decay == 1e6
    assert max(accuracies) == 1e6 and len(accuracies) == 11  # seven, and one below at each distance


def test_fits_that_stop_early_are_named():
    features, labels = clouds(300, 12, 4)
    found = sweep_weight_decay(features, labels, features, labels, 4, max_iterations=3)
    assert 1e-6 in found.unconverged and len(found.unconverged) < len(found.accuracies)


def test_a_fifth_of_each_class_is_held_out():
    labels = torch.tensor([0] * 10 + [1] * 7 + [2] * 2 + [3])
    held = held_out(labels, 0)
    assert torch.bincount(labels[held], minlength=4).tolist() == [2, 1, 1, 0]
    assert torch.equal(held, held_out(labels, 0))
    assert any(not torch.equal(held, held_out(labels, seed)) for seed in (1, 2, 3))
    with pytest.raises(UserError, match="no class has a second training sample"):
        held_out(torch.arange(5), 0)


@pytest.mark.parametrize("own_val", [True, False])
def test_the_result(own_val):
    (train, train_labels), (test, test_labels) = (clouds(n, 12, 7, seed, 3.0) for n, seed in ((600, 0), (500, 1)))
    val = clouds(200, 12, 7, 2, 3.0)
    more = (7, *val) if own_val else ()
    result = linear_probe(checked_input(train, train_labels, test, test_labels, *more), seed=3)
    predicted = result.pop("predicted")
    json.dumps(result)
    if own_val:
        assert result["num_train"] == 800
        parts = (train, train_labels, *val)
        train, train_labels = torch.cat([train, val[0]]), torch.cat([train_labels, val[1]])
    else:
        held = held_out(train_labels, 3)
        parts = (train[~held], train_labels[~held], train[held], train_labels[held])
    best, accuracies = reference_sweep(*parts)
    assert result["weight_decay"] == pytest.approx(best)
    assert result["val_acc1"] == pytest.approx(max(accuracies.values()))
    assert result["sweep"][f"{best:.4g}"] == result["val_acc1"] and len(result["sweep"]) == len(accuracies)
    theirs = sklearn_fit(train, train_labels, best).predict(test.numpy())
    assert np.mean(predicted.numpy() == theirs) > 0.999
    assert result["acc1"] == pytest.approx(100 * np.mean(predicted.numpy() == test_labels.numpy()))
    assert result["acc5"] > result["acc1"]
    assert result["converged"] and result["unconverged"] == []
    assert (result["num_test"], result["num_classes"], result["chance"]) == (500, 7, 100 / 7)


def test_scores_in_blocks(monkeypatch):
    features, labels = clouds(50, 6, 3)
    probe = fit_logistic(features, labels, 3, 1.0)
    whole = probe.scores(features)
    monkeypatch.setattr(module, "BLOCK_SCORES", 20)
    assert torch.allclose(LinearProbe(probe.weight, probe.bias, 1.0, 0, True).scores(features), whole)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_agrees():
    (train, train_labels), (test, test_labels) = (clouds(n, 64, 10, seed, 2.0) for n, seed in ((2000, 0), (1000, 1)))
    here = linear_probe(checked_input(train, train_labels, test, test_labels))
    there = linear_probe(checked_input(train, train_labels, test, test_labels), device="cuda")
    assert here["weight_decay"] == there["weight_decay"]
    assert here["acc1"] == pytest.approx(there["acc1"], abs=0.1)
