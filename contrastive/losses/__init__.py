"""Contrastive losses over a global batch of image and text features."""

from contrastive.losses.base import LOSSES, LossConfig
from contrastive.losses.checks import NonFiniteFeatures
from contrastive.losses.sigmoid import SigmoidLoss, SigmoidLossConfig
from contrastive.losses.softmax import SoftmaxLoss, SoftmaxLossConfig

__all__ = [
    "LOSSES",
    "LossConfig",
    "NonFiniteFeatures",
    "SigmoidLoss",
    "SigmoidLossConfig",
    "SoftmaxLoss",
    "SoftmaxLossConfig",
]
