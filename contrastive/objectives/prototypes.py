"""Heads with prototypes, by which self_distill, masked and patch_distill compare what student and teacher see.

A head tells for a feature to which of K prototypes it belongs; the student's head is to say of what it sees what the
teacher's says of the whole image (Caron et al. 2021, "DINO"; Zhou et al. 2022, "iBOT").
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from contrastive.distributed.collectives import all_reduce_max, all_reduce_sum, world_size
from contrastive.models import DualEncoder
from contrastive.objectives.objective import Setting
from contrastive.objectives.self_taught import SelfTaught, SelfTaughtConfig, copy_weights, follow
from contrastive.option_types import Positive

CENTER_DECAY = 0.9
SINKHORN_ROUNDS = 3


@dataclass(frozen=True)
class PrototypeConfig(SelfTaughtConfig):
    """The options of a head with prototypes and of the teacher that it learns from."""

    prototypes: Positive[int] = 4096
    """K: among how many a feature is told apart."""
    hidden: Positive[int] = 2048
    """Channels of the head's two hidden layers."""
    bottleneck: Positive[int] = 256
    """Channels in which features and prototypes are compared."""
    student_temperature: Positive[float] = 0.1
    """What the student's cosines are divided by."""
    teacher_temperature: Positive[float] = 0.04
    """Likewise the teacher's; the lower, the more certain it is."""
    balance: Literal["center", "sinkhorn"] = "center"
    """What keeps all features from one prototype: their running mean taken off (DINO), or assignments that use all
    prototypes alike in each global batch (SwAV, DINOv2)."""


def three_layers(width: int, hidden: int, out: int) -> nn.Sequential:
    """Return the MLP of a head, (..., width) to (..., out), with two hidden layers."""
    layers = (nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, out))
    return nn.Sequential(*layers)


class PrototypeHead(nn.Module):
    """Features (..., D) to cosines with K prototypes (..., K): an MLP of three layers, unit length, unit prototypes."""

    def __init__(self, width: int, options: PrototypeConfig):
        super().__init__()
        self.mlp = three_layers(width, options.hidden, options.bottleneck)
        self.prototypes = nn.Parameter(torch.empty(options.prototypes, options.bottleneck))
        for parameter in self.parameters():
            if parameter.ndim == 1:
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(F.normalize(self.mlp(x), dim=-1), F.normalize(self.prototypes, dim=-1))


class PrototypeObjective(SelfTaught):
    """A student's head that learns from its own average, and the targets that it learns."""

    def __init__(self, options: PrototypeConfig, setting: Setting):
        super().__init__(options, setting)
        self.head = PrototypeHead(setting.model.image.width, options)
        self.teacher_head = PrototypeHead(setting.model.image.width, options).requires_grad_(False)
        self.register_buffer("center", torch.zeros(options.prototypes))
        self._next_center: torch.Tensor | None = None  # once the step is done

    def begin(self, model: DualEncoder) -> None:
        super().begin(model)
        copy_weights(self.head, self.teacher_head)

    def after_update(self, model: DualEncoder, skipped: torch.Tensor) -> None:
        super().after_update(model, skipped)
        follow(self.teacher_head, self.head, self.options.momentum, skipped)
        if self._next_center is not None:
            self.center.copy_(torch.where(skipped, self.center, self._next_center))

    def patches_of(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens (b', N, D) without the class token."""
        return tokens[:, self.teacher.tower.num_prefix_tokens :]

    def whole_targets(self, targets: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        logits = targets["prototypes"]  # (b, K) or (b, M, K)
        return {"prototypes": self.probabilities(logits.flatten(0, -2)).view_as(logits)}

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """The teacher's logits of this rank (n, K), as many on each, to probabilities (n, K), over the global batch."""
        logits = logits if logits.dtype == torch.float64 else logits.float()
        temperature = self.options.teacher_temperature
        if self.options.balance == "sinkhorn":
            return sinkhorn(logits / temperature)
        mean = all_reduce_sum(logits.mean(dim=0)) / world_size()
        self._next_center = self.center.lerp(mean.to(self.center.dtype), 1 - CENTER_DECAY)
        return ((logits - self.center) / temperature).softmax(dim=-1)

    def cross_entropy(self, logits: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
        """The student's logits (..., K) and what it is to say, (..., K), to a mean over all rows."""
        logits = logits if logits.dtype == torch.float64 else logits.float()
        told = (logits / self.options.student_temperature).log_softmax(dim=-1)
        return -(probabilities * told).sum(dim=-1).mean()


def sinkhorn(logits: torch.Tensor) -> torch.Tensor:
    """Rows (n, K) of every rank to probabilities that use all K alike, nearly: rows and columns normalised in turn.

    In logarithms; source: Caron et al. 2020, "SwAV", algorithm 1.
    """
    rows = logits.shape[0] * world_size()
    for _ in range(SINKHORN_ROUNDS):
        largest = all_reduce_max(logits.amax(dim=0))
        columns = all_reduce_sum((logits - largest).exp().sum(dim=0)).log() + largest
        logits = (logits - columns + math.log(rows / logits.shape[1])).log_softmax(dim=1)
    return logits.exp()


def at_places(x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """What (b', N, D) has at these patches, int64 (b', M): (b', M, D)."""
    return x.gather(1, places[..., None].expand(-1, -1, x.shape[-1]))
