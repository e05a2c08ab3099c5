"""The learning rate as a function of the step, and of nothing else: nothing to save, nothing to resume."""

import math
from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True)
class ScheduleConfig:
    """Linear warm-up, then decay."""

    warmup_steps: int | None = None
    """Steps of linear warm-up; none: 3 % of the run, at least 100 steps but at most a tenth of it."""
    decay: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the decay from the peak to final_fraction."""
    final_fraction: float = 0.0
    """Learning rate at the end, as a share of the peak."""

    def factor(self, step: int, total_steps: int) -> float:
        """Return what the peak learning rate is multiplied by at `step`, counted from 0, of `total_steps`."""
        warmup = self.warmup_steps
        if warmup is None:
            warmup = min(max(round(0.03 * total_steps), 100), total_steps // 10)
        if step < warmup:
            return (step + 1) / warmup
        if self.decay == "constant":
            return 1.0
        done = min((step - warmup) / max(total_steps - warmup, 1), 1.0)
        remaining = 0.5 * (1 + math.cos(math.pi * done)) if self.decay == "cosine" else 1 - done
        return self.final_fraction + (1 - self.final_fraction) * remaining


def set_learning_rates(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    """Set every group's learning rate to `factor` times its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
