"""L-BFGS (Liu and Nocedal 1989) for convex functions, as an object that asks for one evaluation at a time.

Whoever minimises several functions that are cheaper to evaluate together (the same data, other weight decays) holds
one Descent for each, evaluates all their points at once, and tells each its own value and gradient.
"""

from collections import deque

import torch

HISTORY = 10
SLOPE = 0.9
"""A step is taken when the slope along it has shrunk to this share: the curvature half of strong Wolfe."""
MAX_TRIALS = 20
"""Step sizes tried before a direction is given up: by then rounding hides the slope."""


class Descent:
    """Minimise a smooth convex function.

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
