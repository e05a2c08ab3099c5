"""Training: pretraining on pairs, classifiers from scratch, fine-tuning; one loop, checkpoints, the run folder."""

from contrastive.train.classifier_settings import FinetuneConfig, TrainClassifierConfig
from contrastive.train.classify import finetune, train_classifier
from contrastive.train.pretrain import pretrain
from contrastive.train.settings import PretrainConfig

__all__ = [
    "FinetuneConfig",
    "PretrainConfig",
    "TrainClassifierConfig",
    "finetune",
    "pretrain",
    "train_classifier",
]
