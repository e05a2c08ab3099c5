"""How long a run is, said in steps, epochs or samples."""

from dataclasses import replace

import pytest

from contrastive.data.sources import open_source
from contrastive.data.tokenizer import train_bpe
from contrastive.errors import UserError
from contrastive.losses import SoftmaxLossConfig
from contrastive.train.contrastive_task import PretrainConfig, check, resolve
from contrastive.train.options import TrainConfig


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(["a zero", "a one"], 300, 8)


@pytest.mark.parametrize(
    ("length", "steps"),
    [
        ({"steps": 7}, 7),
        ({"epochs": 0.5}, 4),  # of 1,442 scans in batches of 200
        ({"epochs": 0.001}, 1),
        ({"samples": 12_800}, 64),
        ({"samples": 900}, 4),
        ({"samples": 901}, 5),
        ({"samples": 1}, 1),
    ],
)
def test_steps_that_follow(length, steps, tokenizer):
    config = PretrainConfig(train=TrainConfig(global_batch_size=200, **length))
    check(config)
    train = resolve(config, open_source("digits"), tokenizer).train
    assert (train.steps, train.epochs, train.samples) == (steps, None, None)


def test_an_epoch_of_a_mixture_is_as_many_samples_as_its_parts_have(tokenizer):
    config = PretrainConfig(train=TrainConfig(global_batch_size=100, epochs=2))
    assert resolve(config, open_source("digits:train=9,digits:test"), tokenizer).train.steps == 36  # 2 * 1,797


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ({}, "not said: give one of --train.steps, --train.epochs, --train.samples"),
        ({"steps": 1, "samples": 1}, r"more than once \(train.steps, train.samples\)"),
        ({"steps": 1, "samples": 1, "epochs": 1}, r"more than once \(train.steps, train.epochs, train.samples\)"),
        ({"samples": 0}, "train.samples is 0; it must be above 0"),
    ],
)
def test_exactly_one_is_given(lengths, message):
    with pytest.raises(UserError, match=message):
        check(PretrainConfig(train=TrainConfig(**lengths)))


@pytest.mark.parametrize(
    ("spec", "duplicates"),
    [
        ("digits", "positive"),
        ("scenes", "negative"),
        ("digits=2,scenes", "positive"),
        ("scenes,scenes:val", "negative"),
    ],
)
def test_equal_captions_of_a_labelled_part_are_positives(spec, duplicates, tokenizer):
    config = PretrainConfig(loss=SoftmaxLossConfig(), train=TrainConfig(steps=1))
    assert resolve(config, open_source(spec), tokenizer).loss.duplicates == duplicates
    asked = replace(config, loss=SoftmaxLossConfig(duplicates="negative"))
    assert resolve(asked, open_source(spec), tokenizer).loss.duplicates == "negative"
