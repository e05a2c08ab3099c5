"""AdamW as CLIP and SigLIP use it, and Muon for the hidden matrices."""

from dataclasses import dataclass

import torch
from torch import nn

from contrastive.optim.base import LOGIT_PARAMETERS, OPTIMIZERS, is_matrix, trainable
from contrastive.optim.muon import Muon


@OPTIMIZERS.register("adamw")
@dataclass(frozen=True)
class AdamWConfig:
    """AdamW (Loshchilov & Hutter 2019); weight decay on matrices only."""

    lr: float = 1e-3
    """Peak learning rate."""
    weight_decay: float = 0.1
    """Decoupled decay, multiplied by the learning rate."""
    beta1: float = 0.9
    """Decay of the gradient's average."""
    beta2: float = 0.95
    """Decay of the squared gradient's average; 0.95 stands large-batch loss spikes better than 0.999."""
    eps: float = 1e-6
    """Added to the denominator."""
    logit_lr_factor: float = 1.0
    """Learning rate of logit_scale and logit_bias, as a multiple of lr."""

    def build(self, model: nn.Module) -> list[torch.optim.Optimizer]:
        return [_adamw(trainable(model), self)]


@OPTIMIZERS.register("muon")
@dataclass(frozen=True)
class MuonConfig(AdamWConfig):
    """Muon (Jordan et al. 2024) for the transformers' matrices, AdamW for everything else."""

    muon_lr: float = 0.02
    """Peak learning rate of the matrices, whose updates are orthogonalised."""
    momentum: float = 0.95
    """Nesterov momentum of Muon."""

    def build(self, model: nn.Module) -> list[torch.optim.Optimizer]:
        hidden = {n: p for n, p in trainable(model).items() if p.ndim == 2 and "transformer.blocks" in n}
        muon = Muon(
            [{"params": list(hidden.values()), "peak_lr": self.muon_lr}],
            lr=self.muon_lr,
            weight_decay=self.weight_decay,
            momentum=self.momentum,
        )
        return [muon, _adamw({n: p for n, p in trainable(model).items() if n not in hidden}, self)]


def _adamw(parameters: dict[str, nn.Parameter], config: AdamWConfig) -> torch.optim.AdamW:
    logits = [p for name, p in parameters.items() if name in LOGIT_PARAMETERS]
    towers = [p for name, p in parameters.items() if name not in LOGIT_PARAMETERS]
    groups = [
        {
            "params": [p for p in towers if is_matrix(p)],
            "weight_decay": config.weight_decay,
            "peak_lr": config.lr,
        },
        {"params": [p for p in towers if not is_matrix(p)], "weight_decay": 0.0, "peak_lr": config.lr},
        {"params": logits, "weight_decay": 0.0, "peak_lr": config.lr * config.logit_lr_factor},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=towers[0].device.type in ("cuda", "cpu"),
    )
