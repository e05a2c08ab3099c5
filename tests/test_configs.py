"""Every file in configs/ is a valid configuration whose model can be built; what older runs wrote is still read."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from contrastive.config import parse, to_dict
from contrastive.data.preprocess import CLIP_MEAN, PreprocessConfig, PreprocessOptions
from contrastive.errors import UserError
from contrastive.models import DualEncoder, ImageClassifier
from contrastive.train.classify import TrainClassifierConfig, check_supervised
from contrastive.train.contrastive_task import PretrainConfig, check
from contrastive.train.finetune import FinetuneConfig

ALL = sorted((Path(__file__).resolve().parents[1] / "configs").glob("*.yaml"))
CLASSIFIERS = [path for path in ALL if path.stem.startswith("classifier")]
FINETUNINGS = [path for path in ALL if path.stem.startswith("finetune")]
FILES = [path for path in ALL if path not in CLASSIFIERS + FINETUNINGS]


@pytest.mark.parametrize("loss", ["sigmoid", "softmax"])
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_configuration(path, loss):
    config = parse(PretrainConfig, ["--loss", loss], path, prog="pretrain.py", description="")
    check(config)
    assert config.loss_name == loss
    text = replace(config.model.text, vocab_size=config.model.text.vocab_size or 512, eos_id=2, pad_id=0)
    with torch.device("meta"):
        DualEncoder(replace(config.model, text=text))


@pytest.mark.parametrize("path", CLASSIFIERS, ids=lambda path: path.stem)
def test_classifier(path):
    config = parse(TrainClassifierConfig, [], path, prog="train_classifier.py", description="")
    check_supervised(config)
    config.model.image.check()
    with torch.device("meta"):
        ImageClassifier(replace(config.model, num_classes=10))


@pytest.mark.parametrize("path", FINETUNINGS, ids=lambda path: path.stem)
def test_finetuning(path):
    config = parse(FinetuneConfig, [], path, prog="finetune.py", description="")
    check_supervised(config)


def test_the_recipes_are_there():
    names = {path.stem for path in FILES}
    assert {"quickstart", "flickr8k", "cifar10", "cc3m", "cc12m", "datacomp-small"} <= names
    assert {"classifier", "classifier-mnist", "classifier-cifar10", "finetune"} <= {path.stem for path in ALL}


SEEN = {"resize": "crop", "mean": CLIP_MEAN, "interpolation": "bilinear", "short_side": 40, "cut": "floor"}


@pytest.mark.parametrize("cls", [PretrainConfig, TrainClassifierConfig, FinetuneConfig])
def test_preprocessing_of_an_older_run(cls, tmp_path):
    """Its six options stood among those of the data; the folder of a model keeps them as ever, beside the size."""
    words = {"prog": "t", "description": ""}
    config = parse(cls, [], **words)
    config = replace(config, data=replace(config.data, preprocess=PreprocessOptions(**SEEN)))
    written = to_dict(config)
    old = tmp_path / "config.yaml"
    written["data"] |= {name: value for name, value in written["data"].pop("preprocess").items() if name != "patches"}
    old.write_text(yaml.safe_dump(written))
    assert to_dict(parse(cls, [], base=old, **words)) == to_dict(config)
    with pytest.raises(UserError, match=r"config.yaml: data\.\w+ is data\.preprocess\.\w+ now$"):
        parse(cls, [], old, **words)
    with pytest.raises(UserError, match=r"^--data\.short_side is --data\.preprocess\.short_side now$"):
        parse(cls, ["--data.short_side", "40"], **words)


def test_one_block_of_preprocessing_options():
    options = PreprocessOptions(**SEEN)
    assert options.at(32) == PreprocessConfig(32, **SEEN) and options.at(32).options == options
    with pytest.raises(UserError, match="short_side 40 needs a square image size, not 48×48, that is no larger"):
        options.at(48)
