"""Optimizers by name, the learning-rate schedule, and the moving average of weights."""

from contrastive.optim.base import OPTIMIZERS, OptimizerConfig
from contrastive.optim.ema import ExponentialMovingAverage
from contrastive.optim.optimizers import AdamWConfig, MuonConfig
from contrastive.optim.schedule import ScheduleConfig

__all__ = [
    "OPTIMIZERS",
    "AdamWConfig",
    "ExponentialMovingAverage",
    "MuonConfig",
    "OptimizerConfig",
    "ScheduleConfig",
]
