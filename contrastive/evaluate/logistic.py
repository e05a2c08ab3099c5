"""Logistic regression on frozen features by full-batch L-BFGS, for one or several weight decays at once.

N samples, C classes, E embed_dim, L weight decays, P parameters.
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from contrastive.evaluate.probe_input import probe_device

MAX_ITERATIONS = 1000
TOLERANCE = 1e-5
DAMPING = 1e-3
"""Added to the variance of each direction, as a share of the whole, where the Hessian is guessed. Without it fits of
features that hardly vary in some directions take twice the steps; 1e-2 costs others half as many again."""
BLOCK_SCORES = 2**24
"""Scores held at once: 64 MB of float32."""
BLOCK_FEATURES = 2**20
"""Features read at once on a CPU: those of the product with the weights are still in its cache for the gradient."""
HISTORY = 10
SLOPE = 0.9
"""A step is taken when the slope along it has shrunk to this share: the curvature half of strong Wolfe."""
MAX_TRIALS = 20
"""Step sizes tried before a direction is given up: by then rounding hides the slope."""


@dataclass(frozen=True)
class LinearProbe:
    """A fitted linear classifier."""

    weight: torch.Tensor
    """(C, E)."""
    bias: torch.Tensor
    """(C,), of mean zero."""
    weight_decay: float
    iterations: int
    """Steps of L-BFGS."""
    converged: bool
    """Whether the gradient came below the tolerance, rather than the iterations or the precision to their end."""

    def scores(self, features: torch.Tensor) -> torch.Tensor:
        """Scores (N, C) of features (N, E), on the CPU; their softmax is the probability of each class."""
        rows = max(1, BLOCK_SCORES // max(self.weight.shape))
        blocks = (block.to(self.weight) @ self.weight.T + self.bias for block in features.split(rows))
        return torch.cat([block.cpu() for block in blocks])


def fit_logistic(
    features: torch.Tensor,
    labels: torch.Tensor,
    num_classes: int,
    weight_decay: float,
    *,
    max_iterations: int = MAX_ITERATIONS,
    tolerance: float = TOLERANCE,
    start: LinearProbe | None = None,
    device: str | torch.device = "cpu",
) -> LinearProbe:
    """Minimise  sum_n cross_entropy(weight @ x_n + bias, y_n) + weight_decay / 2 * |weight|²  (for two classes twice
    that penalty). This is scikit-learn's LogisticRegression(C=1 / weight_decay), whose single weight vector of two
    classes is the difference of ours.

    Args:
        features: (N, E), float32 or float64: all is computed in that type.
        labels: (N,) int64 in 0..C-1.
        weight_decay: positive, λ of the CLIP paper.
        tolerance: converged when the norm of the gradient is at most this share of its norm at zero weights, where the
            bias alone tells how frequent each class is; of centred features, scaled to length 1 in the square mean.
            float32 reaches 1e-6 or so, float64 1e-12. Where the penalty's own gradient is below this share (classes
            told apart without error, under next to no weight decay) the weights would still grow.
        start: where to begin; zero weights when None.
    """
    problem = LogisticProblem(features, labels, num_classes, device)
    return problem.fit([weight_decay], [start], max_iterations=max_iterations, tolerance=tolerance)[0]


class LogisticProblem:
    """Features prepared for fitting, reused for every weight decay.

    They are centred, which the bias undoes, and turned onto the eigenvectors of their covariance, which leaves
    |weight|² as it was. There the diagonal of the Hessian at zero weights is known for every weight decay, and
    L-BFGS that starts from it needs about an eighth of the steps (CLIP's features lie in a narrow cone and vary most
    along a few directions). Weights are held with one row for each class, and scores likewise: with the samples as
    the last dimension, products and softmax run several times faster on a CPU.
    """

    def __init__(self, features: torch.Tensor, labels: torch.Tensor, num_classes: int, device: str | torch.device):
        device = probe_device(device)
        num, width = features.shape
        self.num_classes = num_classes
        self.labels = labels.to(device)
        mean = features.mean(dim=0).to(device)
        rows = max(1, BLOCK_SCORES // width)
        scatter = torch.zeros(width, width, dtype=features.dtype, device=device)
        for block in features.split(rows):
            centred = block.to(device) - mean
            scatter.addmm_(centred.T, centred)
        eigenvalues, vectors = torch.linalg.eigh(scatter)
        eigenvalues = eigenvalues.clamp(min=0)
        self._mean, self._vectors = mean, vectors
        # Rows of length 1 in the square mean, so that tolerances and step sizes mean the same for all features.
        self._scale = (eigenvalues.sum() / num).sqrt().item() or 1.0
        self.rows = torch.ones(num, width + 1, dtype=features.dtype, device=device)  # the last column is the bias's
        for block, place in zip(features.split(rows), self.rows.split(rows), strict=True):
            place[:, :-1] = (block.to(device) - mean) @ (vectors / self._scale)
        spread = torch.cat([eigenvalues / self._scale**2, eigenvalues.new_tensor([num])])
        # p (1 - p) at zero weights, and a little more, or the first steps blow up the directions that hardly vary.
        self._curvature = (spread + DAMPING * num) * (num_classes - 1) / num_classes**2
        frequency = torch.bincount(self.labels, minlength=num_classes) / num
        bias = frequency.to(features.dtype).clamp(min=1 / (2 * num)).log()
        self._null = torch.zeros(num_classes, width + 1, dtype=features.dtype, device=device)
        self._null[:, -1] = bias - bias.mean()
        self._null_gradient = self.evaluate(self._null[None], self._penalties([0.0]))[1].norm().item()

    def fit(
        self,
        weight_decays: Sequence[float],
        starts: Sequence[LinearProbe | None],
        *,
        max_iterations: int,
        tolerance: float,
    ) -> list[LinearProbe]:
        """Fit one probe for each weight decay. Arguments as in `fit_logistic`."""
        penalties = self._penalties(weight_decays)
        descents = []
        for penalty, start in zip(penalties, starts, strict=True):
            point = self._null if start is None else self._inward(start)
            curvature = self._curvature + penalty
            curvature = curvature.repeat(self.num_classes)
            descents.append(Descent(point.flatten(), curvature, tolerance * self._null_gradient, max_iterations))
        while active := [place for place, descent in enumerate(descents) if not descent.done]:
            points = torch.stack([descents[place].point for place in active])
            values, gradients = self.evaluate(points.view(len(active), *self._null.shape), penalties[active])
            for place, value, gradient in zip(active, values.tolist(), gradients.flatten(1), strict=True):
                descents[place].tell(value, gradient)
        return [self._outward(*pair) for pair in zip(weight_decays, descents, strict=True)]

    def evaluate(self, weights: torch.Tensor, penalties: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The objective (L,), float64, and its gradient (L, C, E+1), at (L, C, E+1) with penalties (L, E+1)."""
        num, num_classes, width = weights.shape
        flat = weights.view(-1, width)
        values = torch.zeros(num, dtype=torch.float64, device=weights.device)
        gradient = torch.zeros_like(flat)
        size = BLOCK_SCORES // len(flat)
        if weights.device.type == "cpu":
            size = min(size, BLOCK_FEATURES // width)
        size = max(1, size)
        for rows, labels in zip(self.rows.split(size), self.labels.split(size), strict=True):
            own = labels.expand(num, 1, -1)
            log_probabilities = (flat @ rows.T).view(num, num_classes, -1).log_softmax(dim=1)
            values -= log_probabilities.gather(1, own).sum(dim=(1, 2), dtype=torch.float64)
            residuals = log_probabilities.exp_()
            residuals.scatter_add_(1, own, residuals.new_full((), -1.0).expand(own.shape))
            gradient.addmm_(residuals.view(len(flat), -1), rows)
        decayed = penalties[:, None] * weights
        values += (decayed * weights).sum(dim=(1, 2), dtype=torch.float64) / 2
        return values, gradient.view_as(weights) + decayed

    def _penalties(self, weight_decays: Sequence[float]) -> torch.Tensor:
        """(L, E+1): the penalty of each column, none for the bias."""
        factor = (2 if self.num_classes == 2 else 1) / self._scale**2
        penalties = self.rows.new_tensor([[factor * value] for value in weight_decays]).repeat(1, self.rows.shape[1])
        penalties[:, -1] = 0
        return penalties

    def _inward(self, probe: LinearProbe) -> torch.Tensor:
        """Weights of the prepared features, (C, E+1), from those of the features as given."""
        weight, bias = probe.weight.to(self.rows), probe.bias.to(self.rows)
        return torch.cat([weight @ self._vectors * self._scale, (bias + weight @ self._mean)[:, None]], dim=1)

    def _outward(self, weight_decay: float, descent: "Descent") -> LinearProbe:
        point = descent.point.view_as(self._null)
        weight = point[:, :-1] @ self._vectors.T / self._scale
        bias = point[:, -1] - weight @ self._mean
        return LinearProbe(weight, bias, weight_decay, descent.iterations, descent.converged)


def between(low: LinearProbe, high: LinearProbe, weight_decay: float) -> LinearProbe:
    """A guess at the probe of a weight decay between two: by interpolation in its logarithm."""
    whole = math.log(high.weight_decay / low.weight_decay)
    share = math.log(weight_decay / low.weight_decay) / whole
    weight, bias = torch.lerp(low.weight, high.weight, share), torch.lerp(low.bias, high.bias, share)
    return LinearProbe(weight, bias, weight_decay, 0, False)


class Descent:
    """Minimise a smooth convex function by L-BFGS (Liu and Nocedal 1989); it asks for one evaluation at a time.

    Whoever minimises several functions that are cheaper to evaluate together (the same data, other weight decays)
    holds one Descent for each, evaluates all their points at once, and tells each its own value and gradient.
    torch.optim.LBFGS in the same preconditioned variables needs a tenth more evaluations and a third more time.

    Args:
        start: (P,) where to begin.
        curvature: (P,) positive, about the diagonal of the Hessian. A good one decides the number of steps.
        tolerance: converged when the Euclidean norm of the gradient is not above this.
        max_iterations: steps to take at most.

    Attributes:
        point: (P,) where the next value and gradient are wanted; once `done`, the best point found.
        done: whether to stop asking. converged: whether the tolerance was reached.
        iterations: steps taken.
    """

    def __init__(self, start: torch.Tensor, curvature: torch.Tensor, tolerance: float, max_iterations: int):
        self.point = start
        self.done = self.converged = False
        self.iterations = 0
        self._curvature = curvature
        self._tolerance = tolerance
        self._max_iterations = max_iterations
        self._pairs: deque[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = deque(maxlen=HISTORY)
        self._gradient: torch.Tensor | None = None

    def tell(self, value: float, gradient: torch.Tensor) -> None:
        """Take in the value and the gradient (P,) at `point`, and choose the next point or be done."""
        if self._gradient is None:
            self._arrive(self.point, value, gradient)
            return
        slope = torch.dot(gradient, self._direction).item()
        # For a convex function the slopes tell all but a far overshoot; the value settles that, as far as it is exact.
        allowed = self._value + 10 * torch.finfo(gradient.dtype).eps * abs(self._value)
        risen = not value <= allowed  # NaN has risen too
        if abs(slope) <= -SLOPE * self._slope and not risen:
            step = self.point - self._base
            change = gradient - self._gradient
            product = torch.dot(step, change)
            if product > 0:
                self._pairs.append((step, change, product))
            self.iterations += 1
            self._arrive(self.point, value, gradient)
        else:
            self._try_another(slope, risen)

    def _arrive(self, point: torch.Tensor, value: float, gradient: torch.Tensor) -> None:
        self._base, self._value, self._gradient = point, value, gradient
        self.converged = gradient.norm().item() <= self._tolerance
        self.done = self.converged or self.iterations >= self._max_iterations
        if not self.done:
            self._set_out()

    def _set_out(self) -> None:
        """Choose a direction, and the unit step along it."""
        self._direction = -self._quasi_newton(self._gradient)
        self._slope = torch.dot(self._gradient, self._direction).item()
        self._size, self._trials = 1.0, 0
        self._low, self._low_slope, self._high, self._high_slope = 0.0, self._slope, None, 0.0
        self.point = self._base + self._direction

    def _quasi_newton(self, gradient: torch.Tensor) -> torch.Tensor:
        """The inverse Hessian, as far as it is known, times the gradient: the two-loop recursion."""
        result = gradient.clone()
        shares = []
        for step, change, product in reversed(self._pairs):
            shares.append(torch.dot(step, result) / product)
            result -= shares[-1] * change
        result /= self._curvature
        if self._pairs:
            _, change, product = self._pairs[-1]
            result *= product / torch.dot(change, change / self._curvature)
        for (step, change, product), share in zip(self._pairs, reversed(shares), strict=True):
            result += (share - torch.dot(change, result) / product) * step
        return result

    def _try_another(self, slope: float, risen: bool) -> None:
        """Close in on the minimum along the direction by its slopes."""
        self._trials += 1
        if self._trials >= MAX_TRIALS:
            self._give_up()
            return
        if slope > 0 or risen:
            self._high, self._high_slope = self._size, slope
        else:
            self._low, self._low_slope = self._size, slope
        if self._high is None:
            self._size *= 4
        else:
            width = self._high - self._low
            share = self._low_slope / (self._low_slope - self._high_slope) if self._high_slope > 0 else 0.5
            self._size = self._low + width * min(max(share, 0.1), 0.9)
        self.point = self._base + self._size * self._direction

    def _give_up(self) -> None:
        """Once more by the plain gradient; where even that finds no way down, the precision is at its end."""
        self.point = self._base
        if self._pairs:
            self._pairs.clear()
            self._set_out()
        else:
            self.done = True
