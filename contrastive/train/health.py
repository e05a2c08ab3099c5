"""How a run notices that it goes wrong: its options, and the judge of each step's loss and gradient norm."""

import math
import statistics
from collections import deque
from dataclasses import dataclass
from typing import Any, Literal

from contrastive.errors import UserError
from contrastive.log import warn
from contrastive.option_types import Positive

DEVIATION = 1.4826  # of a normal distribution, in median absolute deviations


@dataclass(frozen=True)
class HealthConfig:
    """How a run notices that it goes wrong, and what it does then."""

    hang_after: Positive[float] = 200.0
    """Seconds without the end of a step after which the stacks of all threads are written to stacks/ in the run folder;
    best below data.timeout. While it starts, evaluates or saves, it is health.patience."""
    patience: Positive[float] = 3600.0
    """Seconds that ranks wait for one another while the run starts, evaluates or saves; in a step data.timeout."""
    on_non_finite: Literal["stop", "roll_back"] = "stop"
    """After train.max_skipped steps in a row without a finite loss or gradient. roll_back: go on from the last
    checkpoint before them, without their batches."""
    on_spike: Literal["none", "warn", "roll_back"] = "warn"
    """What to do where the loss stays far above what it was. roll_back: as on_non_finite."""
    spike_window: Positive[int] = 100
    """Steps, after the warm-up too, whose losses say what is usual."""
    spike_threshold: Positive[float] = 10.0
    """Standard deviations above the median from which a loss is high, estimated so that outliers do not count; at least
    1 % of the median each."""
    spike_steps: Positive[int] = 5
    """Steps in a row with a high loss that make a spike, and whose batches are left out."""
    max_roll_backs: Positive[int] = 3
    """Times in a row that a run goes back to one checkpoint; then it stops."""

    norms_every: Positive[int | None] = None
    """Steps between rows of metrics.jsonl that also say how large the gradient and the output of each block are; none:
    none do."""

    @property
    def rolls_back(self) -> bool:
        return "roll_back" in (self.on_non_finite, self.on_spike)


class TroubleError(Exception):
    """Steps `first` to `last`, counted from 1, went wrong: `what`; a roll back is asked for."""

    def __init__(self, first: int, last: int, what: str):
        super().__init__(what)
        self.first, self.last, self.what = first, last, what


class Judge:
    """Looks at the outcomes of the steps in turn, the same on all ranks; says what is wrong, or raises it.

    Args:
        max_skipped: so many steps in a row without a finite loss or gradient are too many.
        warm_up: the first so many steps have no spikes.
    """

    def __init__(self, options: HealthConfig, max_skipped: int, warm_up: int = 0):
        self.options, self.max_skipped, self.warm_up = options, max_skipped, warm_up
        self._losses: deque[float] = deque(maxlen=options.spike_window)  # of steps that were as usual
        self._skipped = self._high = 0  # in a row

    def state(self) -> dict[str, Any]:
        """What a resumed run needs to judge as this one would."""
        return {"losses": list(self._losses), "skipped": self._skipped, "high": self._high}

    def restore(self, state: dict[str, Any]) -> None:
        self._losses = deque(state.get("losses", ()), maxlen=self.options.spike_window)
        self._skipped, self._high = state.get("skipped", 0), state.get("high", 0)

    def consider(self, step: int, loss: float, grad_norm: float) -> None:
        """Judge a step, counted from 1.

        Raises:
            UserError: too many steps in a row were not finite. TroubleError: the same, or a spike, where to roll back.
        """
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            warn(f"step {step} skipped: loss {loss}, gradient norm {grad_norm}")
            self._skipped += 1
            if self._skipped >= self.max_skipped:
                self._not_finite(step)
            return
        self._skipped = 0
        if self.options.on_spike != "none":
            self._look_for_spike(step, loss)

    def _not_finite(self, step: int) -> None:
        what = f"{self._skipped} steps in a row had no finite loss or gradient"
        if self.options.on_non_finite == "roll_back":
            raise TroubleError(step - self._skipped + 1, step, what)
        raise UserError(
            f"{what}; lower optimizer.lr or use --train.precision fp32, and continue from the last checkpoint with "
            "--resume, or have that done with --health.on_non_finite roll_back"
        )

    def _look_for_spike(self, step: int, loss: float) -> None:
        full = len(self._losses) == self.options.spike_window and step > self.warm_up
        # Almost no loss is above all of the last ones: nothing more is computed then.
        if not full or loss <= max(self._losses) or loss <= self._limit():
            self._losses.append(loss)
            self._high = 0
            return
        self._high += 1
        if self._high < self.options.spike_steps:
            return
        usual = statistics.median(self._losses)
        what = f"the loss was {loss:.4g} after {self._high} high steps, where {usual:.4g} was usual"
        first = step - self._high + 1
        self._high = 0
        self._losses.clear()  # of a loss that stays where it is this is said once
        if self.options.on_spike == "roll_back":
            raise TroubleError(first, step, what)
        warn(f"step {step}: {what}; to leave such steps out: --health.on_spike roll_back")

    def _limit(self) -> float:
        median = statistics.median(self._losses)
        spread = DEVIATION * statistics.median(abs(loss - median) for loss in self._losses)
        return median + self.options.spike_threshold * max(spread, 0.01 * abs(median))
