"""AdamW as CLIP and SigLIP use it, and Muon for the hidden matrices."""

from dataclasses import dataclass

import torch
from torch import nn

from contrastive.optim.base import LOGIT_PARAMETERS, OPTIMIZERS, is_matrix, trainable
from contrastive.optim.layer_decay import layer_factors
from contrastive.optim.muon import Muon


@OPTIMIZERS.register("adamw")
@dataclass(frozen=True)
class AdamWConfig:
    """AdamW (Loshchilov & Hutter 2019); weight decay on matrices only."""

    lr: float = 1e-3
    """Peak learning rate."""
    weight_decay: float = 0.1
    """Decoupled decay, multiplied by the learning rate."""
    beta2: float = 0.95
    """Decay of the squared gradient's average; 0.95 stands large-batch loss spikes better than 0.999."""
    eps: float = 1e-6
    """Added to the denominator."""
    logit_lr_factor: float = 1.0
    """Learning rate of logit_scale and logit_bias, as a multiple of lr."""
    layer_decay: float = 1.0
    """Learning rate of a block as a share of that of the block above it; 1: all alike. 0.65 to 0.9 to fine-tune."""

    def build(self, model: nn.Module) -> list[torch.optim.Optimizer]:
        return [_adamw(trainable(model), self, layer_factors(model, self.layer_decay))]


@OPTIMIZERS.register("muon")
@dataclass(frozen=True)
class MuonConfig(AdamWConfig):
    """Muon (Jordan et al. 2024) for the transformers' matrices, AdamW for everything else."""

    muon_lr: float = 0.02
    """Peak learning rate of the matrices, whose updates are orthogonalised."""

    def build(self, model: nn.Module) -> list[torch.optim.Optimizer]:
        parameters, factors = trainable(model), layer_factors(model, self.layer_decay)
        hidden = {n: p for n, p in parameters.items() if p.ndim == 2 and "transformer.blocks" in n}
        others = {n: p for n, p in parameters.items() if n not in hidden}
        if not hidden:  # the towers are frozen
            return [_adamw(others, self, factors)]
        muon = Muon(
            [
                {"params": [p for n, p in hidden.items() if factors[n] == factor], "peak_lr": self.muon_lr * factor}
                for factor in sorted({factors[n] for n in hidden})
            ],
            lr=self.muon_lr,
            weight_decay=self.weight_decay,
        )
        return [muon, _adamw(others, self, factors)]


def _adamw(parameters: dict[str, nn.Parameter], config: AdamWConfig, factors: dict[str, float]) -> torch.optim.AdamW:
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        factor = config.logit_lr_factor if name in LOGIT_PARAMETERS else factors[name]
        decay = config.weight_decay if is_matrix(parameter) else 0.0
        groups.setdefault((decay, config.lr * factor), []).append(parameter)
    return torch.optim.AdamW(
        [{"params": group, "weight_decay": decay, "peak_lr": lr} for (decay, lr), group in groups.items()],
        lr=config.lr,
        betas=(0.9, config.beta2),
        eps=config.eps,
        fused=next(iter(parameters.values())).device.type in ("cuda", "cpu"),
    )
