"""Optimizers by name, the learning-rate schedule, and the moving average of weights."""

from contrastive.optim.ema import ExponentialMovingAverage
from contrastive.optim.optimizers import OPTIMIZERS, AdamWConfig, MuonConfig, OptimizerConfig, step_unless
from contrastive.optim.schedule import ScheduleConfig, set_learning_rates

__all__ = [
    "OPTIMIZERS",
    "AdamWConfig",
    "ExponentialMovingAverage",
    "MuonConfig",
    "OptimizerConfig",
    "ScheduleConfig",
    "set_learning_rates",
    "step_unless",
]
