"""Every file in configs/ is a valid configuration whose model can be built, with either loss."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from contrastive.config import parse
from contrastive.models import DualEncoder
from contrastive.train import PretrainConfig
from contrastive.train.settings import check

FILES = sorted((Path(__file__).resolve().parents[1] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("loss", ["sigmoid", "softmax"])
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_configuration(path, loss):
    config = parse(PretrainConfig, ["--loss", loss], [path], prog="pretrain.py", description="")
    check(config)
    assert config.loss_name == loss
    text = replace(config.model.text, vocab_size=config.model.text.vocab_size or 512, eos_id=2, pad_id=0)
    with torch.device("meta"):
        DualEncoder(replace(config.model, text=text))


def test_the_recipes_are_there():
    names = {path.stem for path in FILES}
    assert {"quickstart", "flickr8k", "cifar10", "cc3m", "cc12m", "datacomp-small"} <= names
