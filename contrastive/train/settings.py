"""The options of a pretraining run, and how those left open follow from its data."""

import math
import os
from dataclasses import dataclass, field, replace
from pathlib import Path

from contrastive.config import preset, slot
from contrastive.data.record import Source
from contrastive.data.settings import DataConfig
from contrastive.data.tokenizer import Tokenizer
from contrastive.distributed.runtime import Precision
from contrastive.errors import UserError
from contrastive.losses import LOSSES, LossConfig
from contrastive.models import ModelConfig, list_models, model_config
from contrastive.optim import OPTIMIZERS, OptimizerConfig, ScheduleConfig

# Three ways to say how long to train; one of them is given.
LENGTHS = ("steps", "epochs", "samples")


@dataclass(frozen=True)
class TrainConfig:
    """The loop."""

    steps: int | None = None
    """Optimizer steps; give these, epochs or samples."""
    epochs: float | None = None
    """Passes over the data, instead of steps; of several sets, as many samples as all have together."""
    samples: int | None = None
    """Samples seen, instead of steps: the unit that runs on different data and batches are compared in."""
    global_batch_size: int = 256
    """Pairs in one step over all ranks; each is a negative for all the others."""
    accumulate: int = 1
    """Micro-batches a rank embeds its share in. Less memory, one more forward pass, the same negatives."""
    precision: Precision = "auto"
    """bf16 or fp32 towers; the loss is fp32. auto: bf16 on a GPU that has it."""
    max_grad_norm: float = 1.0
    """Clip the gradient's norm to this."""
    ema_decay: float | None = None
    """Decay of an average of the weights, used for evaluation and the final model; none: no average."""
    seed: int = 0
    """Decides initial weights, data order, augmentation and dropout."""
    log_every: int = 1
    """Steps between rows of metrics.jsonl."""
    max_skipped: int = 5
    """Steps in a row with a loss or gradient that is not finite after which the run stops."""


@dataclass(frozen=True)
class EvaluationConfig:
    """Evaluation on data.eval during training and at the end."""

    every: int | None = None
    """Steps between evaluations; none: four over the run."""
    batch_size: int = 256
    """Images embedded at once."""
    limit: int | None = None
    """Images of each source, a fixed random subset; none: all."""


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints, from which `--resume` continues exactly."""

    every: int | None = None
    """Steps between checkpoints; none: ten over the run."""
    keep: int = 3
    """How many of the newest to keep."""


@dataclass(frozen=True)
class PretrainConfig:
    """Everything a pretraining run can be told."""

    run_folder: str = ""
    """Run folder; by default runs/CONFIG-LOSS."""
    resume: bool = False
    """Continue the run from its newest whole checkpoint, with the options it was started with."""
    loss: LossConfig = slot(LOSSES, "sigmoid")
    model: ModelConfig = preset(model_config, tuple(list_models()), ModelConfig)
    optimizer: OptimizerConfig = slot(OPTIMIZERS, "adamw")
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    trackers: tuple[str, ...] = ()
    """Also log to these: tensorboard, wandb, trackio, or another that Accelerate knows."""

    @property
    def loss_name(self) -> str:
        return LOSSES.name_of(type(self.loss))


def check(config: PretrainConfig) -> None:
    """Raise UserError for options that no data can make right."""
    image, text, train = config.model.image, config.model.text, config.train
    above_zero = {
        **{
            f"model.image.{n}": getattr(image, n) for n in ("image_size", "patch_size", "width", "num_heads", "mlp_dim")
        },
        **{f"model.text.{n}": getattr(text, n) for n in ("context_length", "width", "num_heads", "mlp_dim")},
        **{
            f"train.{n}": getattr(train, n)
            for n in ("steps", "epochs", "samples", "global_batch_size", "accumulate", "log_every")
        },
        "train.max_grad_norm": train.max_grad_norm,
        "train.max_skipped": train.max_skipped,
        "model.embed_dim": config.model.embed_dim,
        "model.init_logit_scale": config.model.init_logit_scale,
        "loss.init_scale": config.loss.initial_logits(2)[0],
        "loss.max_logit_scale": config.loss.max_logit_scale,
        "optimizer.lr": config.optimizer.lr,
        "evaluation.every": config.evaluation.every,
        "evaluation.batch_size": config.evaluation.batch_size,
        "evaluation.limit": config.evaluation.limit,
        "checkpoint.every": config.checkpoint.every,
        "checkpoint.keep": config.checkpoint.keep,
        "data.timeout": config.data.timeout,
        "data.bad_window": config.data.bad_window,
        "data.window": config.data.window,
        "data.lanes": config.data.lanes,
    }
    for name, value in above_zero.items():
        if value is not None and not value > 0:
            raise UserError(f"{name} is {value}; it must be above 0")
    shares = {
        "model.image.dropout": image.dropout,
        "model.image.patch_dropout": image.patch_dropout,
        "model.text.dropout": text.dropout,
        "train.ema_decay": train.ema_decay,
    }
    if not 0 <= config.data.max_bad_share <= 1:
        raise UserError(f"data.max_bad_share is {config.data.max_bad_share}; it must be from 0 to 1")
    for name, value in shares.items():
        if value is not None and not 0 <= value < 1:
            raise UserError(f"{name} is {value}; it must be at least 0 and below 1")
    if config.data.num_workers is not None and config.data.num_workers < 0:
        raise UserError(f"data.num_workers is {config.data.num_workers}; it must be at least 0")
    given = [f"train.{name}" for name in LENGTHS if getattr(train, name) is not None]
    if len(given) != 1:
        said = f"said more than once ({', '.join(given)})" if given else "not said"
        raise UserError(f"how long to train is {said}: give one of --{', --'.join(f'train.{n}' for n in LENGTHS)}")
    if config.model.init_logit_bias is not None and config.loss.initial_logits(2)[1] is None:
        raise UserError("model.init_logit_bias is for losses with a bias (sigmoid); leave it out")
    config.model.image.check()


def check_division(train: TrainConfig, world_size: int) -> None:
    """Raise UserError unless ranks and micro-batches get equal shares of the global batch."""
    if train.global_batch_size % (world_size * train.accumulate):
        raise UserError(
            f"train.global_batch_size {train.global_batch_size} does not divide into {world_size} ranks "
            f"with {train.accumulate} micro-batches each; use a multiple of {world_size * train.accumulate}"
        )


def resolve(config: PretrainConfig, source: Source, tokenizer: Tokenizer) -> PretrainConfig:
    """Fill in what follows from the data and the tokenizer.

    Raises:
        UserError: the tokenizer does not fit the model, or there are fewer samples than one batch.
    """
    batch = config.train.global_batch_size
    if batch > len(source):
        raise UserError(
            f"train.global_batch_size {batch} is larger than '{source.name}' with its {len(source)} samples; "
            f"use at most {len(source)}"
        )
    steps = _steps(config.train, len(source))
    scale, bias = config.loss.initial_logits(batch)
    model = replace(
        config.model,
        text=_fit_text(config.model, tokenizer),
        init_logit_scale=scale if config.model.init_logit_scale is None else config.model.init_logit_scale,
        init_logit_bias=bias if config.model.init_logit_bias is None else config.model.init_logit_bias,
    )
    loss = config.loss
    if loss.duplicates == "auto":
        named = any(part.class_names for part in getattr(source, "parts", (source,)))
        loss = replace(loss, duplicates="positive" if named else "negative")
    return replace(
        config,
        model=model,
        loss=loss,
        train=replace(config.train, steps=steps, epochs=None, samples=None),
        evaluation=replace(config.evaluation, every=config.evaluation.every or math.ceil(steps / 4)),
        checkpoint=replace(config.checkpoint, every=config.checkpoint.every or math.ceil(steps / 10)),
    )


def _steps(train: TrainConfig, num_samples: int) -> int:
    if train.steps is not None:
        return train.steps
    samples = train.samples if train.epochs is None else train.epochs * num_samples
    return max(1, round(samples / train.global_batch_size))


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


def num_workers(config: DataConfig, on_gpu: bool) -> int:
    """Loader processes per rank: as asked, or a fair share of this machine's cores where a GPU leaves them free."""
    if config.num_workers is not None:
        return config.num_workers
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return min(8, max(1, len(os.sched_getaffinity(0)) // ranks)) if on_gpu else 0


def default_run(config_file: Path, loss: str) -> str:
    """The run folder when none is named."""
    return f"runs/{config_file.stem}-{loss}"
