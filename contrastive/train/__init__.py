"""Pretraining: the loop, one step, checkpoints, the run folder."""

from contrastive.train.pretrain import pretrain
from contrastive.train.settings import PretrainConfig

__all__ = ["PretrainConfig", "pretrain"]
