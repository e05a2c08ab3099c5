"""Exponential moving average of a model's weights."""

import torch
from torch import nn

from contrastive.distributed.sharding import local


class ExponentialMovingAverage:
    """average ← decay · average + (1 − decay) · weight after every step, in float32.

    The first steps use min(decay, (1 + step) / (10 + step)), so that random initial weights fade soon.

    Args:
        model: its parameters that learn are averaged, starting from their present values.
        decay: 0.999 averages about 1,000 steps.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.average = {name: p.detach().float().clone() for name, p in model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int, skipped: torch.Tensor) -> None:
        """Move the averages towards the weights; where `skipped` (bool, 0-dim, on their device) leave them."""
        decay = min(self.decay, (1 + step) / (10 + step))
        averages = [local(average) for average in self.average.values()]
        weights = [local(p.detach()).float() for name, p in model.named_parameters() if name in self.average]
        moved = torch._foreach_sub(weights, averages)
        torch._foreach_mul_(moved, torch.where(skipped, 0.0, 1 - decay))
        torch._foreach_add_(averages, moved)

    @torch.no_grad()
    def swap(self, model: nn.Module) -> None:
        """Exchange the model's weights with the averages; a second call undoes it."""
        for name, average in self.average.items():
            parameter = model.get_parameter(name)
            weight = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(weight)
