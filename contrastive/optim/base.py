"""The optimizers' registry, what their options share, and how parameters are grouped."""

from typing import Protocol

import torch
from torch import nn

from contrastive.registry import Registry

LOGIT_PARAMETERS = ("logit_scale", "logit_bias")


class OptimizerConfig(Protocol):
    """The options of an optimizer: a frozen dataclass registered in OPTIMIZERS."""

    def build(self, model: nn.Module) -> list[torch.optim.Optimizer]:
        """Return the optimizers that step together; each group has its peak learning rate as `peak_lr`."""


OPTIMIZERS: Registry[type[OptimizerConfig]] = Registry("optimizer")


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that get gradients, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def is_matrix(parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: matrices and kernels, not biases, norms, tokens or scalars."""
    return parameter.ndim >= 2


def set_learning_rates(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    """Set every group's learning rate to `factor` times its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
