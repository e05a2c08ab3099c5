"""Every file in configs/ is a valid configuration whose model can be built."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from contrastive.config import parse
from contrastive.models import DualEncoder, ImageClassifier, ImageTowerConfig
from contrastive.train.classification_task import check_supervised
from contrastive.train.classify import TrainClassifierConfig
from contrastive.train.contrastive_task import PretrainConfig, check
from contrastive.train.finetune import FinetuneConfig, check_wise_ft

ALL = sorted((Path(__file__).resolve().parents[1] / "configs").glob("*.yaml"))
CLASSIFIERS = [path for path in ALL if path.stem.startswith("classifier")]
FINETUNINGS = [path for path in ALL if path.stem.startswith("finetune")]
FILES = [path for path in ALL if path not in CLASSIFIERS + FINETUNINGS]


@pytest.mark.parametrize("loss", ["sigmoid", "softmax"])
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_configuration(path, loss):
    config = parse(PretrainConfig, ["--loss", loss], [path], prog="pretrain.py", description="")
    check(config)
    assert config.loss_name == loss
    text = replace(config.model.text, vocab_size=config.model.text.vocab_size or 512, eos_id=2, pad_id=0)
    with torch.device("meta"):
        DualEncoder(replace(config.model, text=text))


@pytest.mark.parametrize("path", CLASSIFIERS, ids=lambda path: path.stem)
def test_classifier(path):
    config = parse(TrainClassifierConfig, [], [path], prog="train_classifier.py", description="")
    check_supervised(config, config.model.image)
    with torch.device("meta"):
        ImageClassifier(replace(config.model, num_classes=10))


@pytest.mark.parametrize("path", FINETUNINGS, ids=lambda path: path.stem)
def test_finetuning(path):
    config = parse(FinetuneConfig, [], [path], prog="finetune.py", description="")
    check_supervised(config, ImageTowerConfig())
    check_wise_ft(config.wise_ft)


def test_the_recipes_are_there():
    names = {path.stem for path in FILES}
    assert {"quickstart", "flickr8k", "cifar10", "cc3m", "cc12m", "datacomp-small"} <= names
    assert {"classifier", "classifier-mnist", "classifier-cifar10", "finetune"} <= {path.stem for path in ALL}
