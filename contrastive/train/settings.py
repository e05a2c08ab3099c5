"""The options of a pretraining run, and how those left open follow from its data."""

from collections import Counter
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Literal

from contrastive.config import preset, slot
from contrastive.data.record import Source
from contrastive.data.settings import DataConfig
from contrastive.data.tokenizer import Tokenizer
from contrastive.errors import UserError
from contrastive.losses import LOSSES, LossConfig
from contrastive.models import ModelConfig, list_models, model_config
from contrastive.train.options import (
    LENGTHS,
    CheckpointConfig,
    EvaluationConfig,
    RunConfig,
    TrainConfig,
    check_above_zero,
    check_run,
    check_shares,
    resolve_run,
)

__all__ = ["LENGTHS", "CheckpointConfig", "EvaluationConfig", "PretrainConfig", "TrainConfig", "check", "resolve"]


@dataclass(frozen=True)
class PretrainConfig(RunConfig):
    """Everything a pretraining run can be told."""

    loss: LossConfig = slot(LOSSES, "sigmoid")
    model: ModelConfig = preset(model_config, tuple(list_models()), ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    init: str | None = None
    """Start from this model's weights, with its architecture, tokenizer and preprocessing: a run or model folder."""
    init_image: str | None = None
    """Start the image tower from this model or classifier; the text tower starts at random."""
    lock: Literal["none", "image"] = "none"
    """image: train the text tower alone (LiT, Zhai et al. 2022), against the image tower of init_image or init."""

    @property
    def loss_name(self) -> str:
        return LOSSES.name_of(type(self.loss))


def check(config: PretrainConfig) -> None:
    """Raise UserError for options that no data can make right."""
    text = config.model.text
    check_above_zero(
        {
            **{f"model.text.{n}": getattr(text, n) for n in ("context_length", "width", "num_heads", "mlp_dim")},
            "model.embed_dim": config.model.embed_dim,
            "model.init_logit_scale": config.model.init_logit_scale,
            "loss.init_scale": config.loss.initial_logits(2)[0],
            "loss.max_logit_scale": config.loss.max_logit_scale,
        }
    )
    check_shares({"model.text.dropout": text.dropout})
    if config.model.init_logit_bias is not None and config.loss.initial_logits(2)[1] is None:
        raise UserError("model.init_logit_bias is for losses with a bias (sigmoid); leave it out")
    if config.init and config.init_image:
        raise UserError("give --init or --init_image, not both: --init starts both towers")
    if config.lock == "image" and not (config.init or config.init_image):
        raise UserError(
            "--lock image keeps the image tower as it is: say whose with --init_image MODEL or --init MODEL"
        )
    check_run(config, config.data, config.model.image)


def resolve(config: PretrainConfig, source: Source, tokenizer: Tokenizer) -> PretrainConfig:
    """Fill in what follows from the data and the tokenizer.

    Raises:
        UserError: the tokenizer does not fit the model, or there are fewer samples than one batch.
    """
    length = resolve_run(config, source)
    loss = config.loss
    if loss.duplicates == "auto":
        named = any(part.class_names for part in source.parts)
        loss = replace(loss, duplicates="positive" if named else "negative")
    scale, bias = loss.initial_logits(num_distinct(loss, source, config.train.global_batch_size))
    model = replace(
        config.model,
        text=_fit_text(config.model, tokenizer),
        init_logit_scale=scale if config.model.init_logit_scale is None else config.model.init_logit_scale,
        init_logit_bias=bias if config.model.init_logit_bias is None else config.model.init_logit_bias,
    )
    return replace(config, model=model, loss=loss, **length)


def num_distinct(loss: LossConfig, source: Source, global_batch_size: int) -> int | float:
    """Return how many captions of a batch differ in the eyes of the loss, as far as that is known beforehand.

    It is 1 / p, at most the batch, where p is the probability that a text of a batch matches an image of it, either
    drawn at random. Of C classes prompted alike, where equal ones are matches, it is C.
    """
    if loss.duplicates != "positive":
        return global_batch_size
    # Two draws agree on class c with probability q_c ** 2. Other captions count as all different: a match is then the
    # image's own text, one of the batch. In fractions, so that C classes give C and not nearly C.
    share_of_class, share_of_captions = Counter(), Fraction(0)
    for part, weight in zip(source.parts, source.weights, strict=True):
        share = Fraction(weight, sum(source.weights))
        if part.prompted:
            for name in part.class_names:  # one name in two parts is one class, as Record.caption_group has it
                share_of_class[name] += share / len(part.class_names)
        else:
            share_of_captions += share
    matching = sum(q**2 for q in share_of_class.values()) + share_of_captions / global_batch_size
    distinct = min(Fraction(global_batch_size), 1 / matching)
    return int(distinct) if distinct.denominator == 1 else float(distinct)


def _fit_text(model: ModelConfig, tokenizer: Tokenizer):
    text = model.text
    if text.vocab_size is not None and text.vocab_size < tokenizer.vocab_size:
        raise UserError(
            f"model.text.vocab_size {text.vocab_size} is smaller than the tokenizer's {tokenizer.vocab_size}; "
            "leave it out, or use the model's own tokenizer (--data.tokenizer)"
        )
    for name in ("eos_id", "pad_id"):
        ours, theirs = getattr(text, name), getattr(tokenizer, name)
        if ours is not None and ours != theirs:
            raise UserError(
                f"model.text.{name} is {ours}, but the tokenizer's is {theirs}; set --model.text.{name} {theirs}, "
                "or use the model's own tokenizer (--data.tokenizer)"
            )
    vocab_size = tokenizer.vocab_size if text.vocab_size is None else text.vocab_size
    return replace(text, vocab_size=vocab_size, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id)
