"""The learning rate as a function of the step, and of nothing else: nothing to save, nothing to resume."""

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch

from contrastive.errors import UserError
from contrastive.option_types import Positive

COOLED_DOWN = ("wsd", "rsqrt")  # decays whose first steps do not depend on how many there will be


@dataclass(frozen=True)
class ScheduleConfig:
    """Linear warm-up, then decay."""

    warmup_steps: int | None = None
    """Steps of linear warm-up; none: 3 % of the run, at least 100 steps but at most a tenth of it."""
    decay: Literal["cosine", "linear", "constant", "wsd", "rsqrt"] = "cosine"
    """From the peak to final_fraction; wsd stays there, rsqrt falls as 1 / sqrt(step), until a linear cooldown."""
    final_fraction: float = 0.0
    """Learning rate at the end, as a share of the peak; of rsqrt's, of where the cooldown begins."""
    cooldown_steps: Positive[int | None] = None
    """Last steps, in which wsd and rsqrt fall to final_fraction; none: a fifth of the run."""

    def resolved(self, total_steps: int) -> "ScheduleConfig":
        """Return it with its warm-up settled, where longer runs begin alike; UserError where it exceeds the run."""
        if self.decay in ("cosine", "linear"):
            return self
        warmup, cooldown = self._ramps(total_steps)
        if self.decay in COOLED_DOWN and warmup + cooldown > total_steps:
            said = f"warmup_steps {warmup} and cooldown_steps {cooldown} are more than the {total_steps} of the run"
            raise UserError(f"schedule: {said}; give fewer")
        return replace(self, warmup_steps=warmup)

    def factor(self, step: int, total_steps: int) -> float:
        """Return what the peak learning rate is multiplied by at `step`, counted from 0, of `total_steps`."""
        warmup, cooldown = self._ramps(total_steps)
        if step < warmup:
            return (step + 1) / warmup
        if self.decay == "constant":
            return 1.0
        if self.decay in COOLED_DOWN:
            peak = math.sqrt(max(warmup, 1) / max(step, 1)) if self.decay == "rsqrt" else 1.0  # as in big_vision
            fallen = max(0.0, 1 - (total_steps - step) / cooldown)
            return peak * (1 - (1 - self.final_fraction) * fallen)
        done = min((step - warmup) / max(total_steps - warmup, 1), 1.0)
        remaining = 0.5 * (1 + math.cos(math.pi * done)) if self.decay == "cosine" else 1 - done
        return self.final_fraction + (1 - self.final_fraction) * remaining

    def _ramps(self, total_steps: int) -> tuple[int, int]:
        """Steps of warm-up and of cooldown."""
        usual = min(max(round(0.03 * total_steps), 100), total_steps // 10)
        warmup = usual if self.warmup_steps is None else self.warmup_steps
        return warmup, self.cooldown_steps or max(1, total_steps // 5)


def set_learning_rates(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    """Set every group's learning rate to `factor` times its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
