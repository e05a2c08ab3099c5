import numpy as np
import pytest
import torch

from contrastive.evaluate.logistic import HISTORY, MAX_TRIALS, Descent


def minimise(function, start, *, curvature=None, tolerance=1e-9, max_iterations=1000):
    """Returns the Descent and how many evaluations it took."""
    descent = Descent(start, torch.ones_like(start) if curvature is None else curvature, tolerance, max_iterations)
    evaluations = 0
    while not descent.done:
        point = descent.point.clone().requires_grad_()
        value = function(point)
        (gradient,) = torch.autograd.grad(value, point)
        descent.tell(value.item(), gradient)
        evaluations += 1
        assert evaluations < 50_000
    return descent, evaluations


def quadratic(width, condition, seed=0):
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))[0]
    matrix = basis @ torch.diag(torch.logspace(0, np.log10(condition), width, dtype=torch.float64)) @ basis.T
    optimum = torch.randn(width, generator=generator, dtype=torch.float64)
    return lambda point: (point - optimum) @ matrix @ (point - optimum) / 2, optimum, matrix.diagonal().clone()


@pytest.mark.parametrize("curvature_factor", [1e-4, 1, 1e4])
def test_finds_the_minimum_however_wrong_the_curvature(curvature_factor):
    function, optimum, diagonal = quadratic(30, 1e4)
    start = torch.zeros(30, dtype=torch.float64)
    descent, evaluations = minimise(function, start, curvature=curvature_factor * diagonal)
    assert descent.converged
    assert torch.allclose(descent.point, optimum, atol=1e-8)
    assert descent.iterations <= evaluations <= 2 * descent.iterations + 2 * MAX_TRIALS


def test_the_exact_diagonal_takes_one_step():
    weights = torch.logspace(-3, 3, 20, dtype=torch.float64)
    descent, evaluations = minimise(
        lambda point: (weights * (point - 3) ** 2).sum() / 2,
        torch.zeros(20, dtype=torch.float64),
        curvature=weights,
    )
    assert (descent.iterations, evaluations) == (1, 2)


def test_a_far_overshoot_is_taken_back():
    # Nearly flat where it starts: the first trial lands where the slope is large the other way.
    function = lambda point: (point.cosh().log() + 1e-3 * (point - 1) ** 2).sum()  # noqa: E731
    start = torch.full((5,), 12.0, dtype=torch.float64)
    descent, _ = minimise(function, start, curvature=torch.full_like(start, 1e-6))
    assert descent.converged and descent.iterations < 40
    assert function(descent.point) < function(torch.zeros(5, dtype=torch.float64))


def test_values_that_overflow_count_as_risen():
    function = lambda point: (point.exp() - 2 * point).sum()  # noqa: E731
    start = torch.full((3,), -20.0, dtype=torch.float64)
    descent, _ = minimise(function, start, curvature=torch.full_like(start, 1e-4))
    assert descent.converged
    assert torch.allclose(descent.point, torch.full_like(start, 2.0).log())


def test_stops_where_it_is_told_to():
    function, _, _ = quadratic(30, 1e6)
    descent, _ = minimise(function, torch.zeros(30, dtype=torch.float64), max_iterations=HISTORY + 3)
    assert descent.done and not descent.converged and descent.iterations == HISTORY + 3


def test_gives_up_at_the_end_of_its_precision():
    function, optimum, diagonal = quadratic(30, 1e3)
    rounded = lambda point: function(point.double()).float()  # noqa: E731
    start = torch.zeros(30)
    descent, evaluations = minimise(rounded, start, curvature=diagonal.float(), tolerance=0.0)
    assert descent.done and (descent.converged or evaluations < 1000 + 2 * MAX_TRIALS)
    assert torch.allclose(descent.point.double(), optimum, atol=1e-3)


def test_starting_at_the_minimum_takes_no_step():
    descent, evaluations = minimise(lambda point: (point**2).sum(), torch.zeros(4))
    assert descent.converged and (descent.iterations, evaluations) == (0, 1)
