"""Contrastive losses over a global batch of image and text features, by name."""

import math
from dataclasses import dataclass
from typing import Protocol

from torch import nn

from contrastive.losses.checks import NonFiniteFeatures
from contrastive.losses.sigmoid import SigmoidLoss, SigmoidLossConfig
from contrastive.losses.softmax import SoftmaxLoss, SoftmaxLossConfig
from contrastive.registry import Registry
from contrastive.words import called_here

__all__ = [
    "LOSSES",
    "LossConfig",
    "NoLossConfig",
    "NonFiniteFeatures",
    "SigmoidLoss",
    "SigmoidLossConfig",
    "SoftmaxLoss",
    "SoftmaxLossConfig",
]


class LossConfig(Protocol):
    """The options of a loss: a frozen dataclass registered in LOSSES, with these members."""

    duplicates: str
    """`auto` lets the run decide by its data: `positive` where captions are class prompts."""
    max_logit_scale: float | None
    """The run clamps the factor on the similarities to at most this after each step; None: no clamp."""

    def initial_logits(self, global_batch_size: int) -> tuple[float, float | None]:
        """Return the initial factor on the similarities and the initial logit bias (None: no bias)."""

    def chance_loss(self, global_batch_size: int) -> float:
        """Return the loss of features that tell nothing apart: where a run that does not learn sits."""

    def build(self) -> nn.Module | None:
        """Return the loss, called as loss(image, text, logit_scale, logit_bias, caption_ids=...); None for none."""


@dataclass(frozen=True)
class NoLossConfig:
    """None: the run's objectives are all that is learnt, by an image tower without a text tower."""

    # No options, and so without types.
    duplicates = "negative"
    max_logit_scale = None

    def initial_logits(self, global_batch_size: int) -> tuple[float, float | None]:
        return 1.0, None

    def chance_loss(self, global_batch_size: int) -> float:
        return math.inf

    def build(self) -> None:
        return None


def __getattr__(name: str):
    raise AttributeError(f"module 'contrastive.losses' has no attribute '{name}'{called_here('contrastive', name)}")


LOSSES: Registry[type[LossConfig]] = Registry("loss")
LOSSES.register("sigmoid")(SigmoidLossConfig)
LOSSES.register("softmax")(SoftmaxLossConfig)
LOSSES.register("none")(NoLossConfig)
