"""The options that every kind of run has, and how those left open follow from its data."""

import math
import os
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Annotated, TypeVar

from contrastive.config import Gone, flatten, to_dict
from contrastive.data.preprocess import MOST_PATCHES, PreprocessOptions
from contrastive.data.record import Source
from contrastive.data.settings import ImageDataConfig
from contrastive.distributed.runtime import Compile, Precision
from contrastive.errors import UserError
from contrastive.models import ImageTowerConfig
from contrastive.named_sections import hidden, slot
from contrastive.optim import OPTIMIZERS, OptimizerConfig, ScheduleConfig
from contrastive.option_types import Bound, Positive, Probability, Share, check_bounds
from contrastive.train.health import HealthConfig

# Three ways to say how long to train; one of them is given.
LENGTHS = ("steps", "epochs", "samples")


@dataclass(frozen=True)
class TrainConfig:
    """The loop."""

    steps: Positive[int | None] = None
    """Optimizer steps; give these, epochs or samples."""
    epochs: Positive[float | None] = None
    """Passes over the data, instead of steps; of several sets, as many samples as all have together."""
    samples: Positive[int | None] = None
    """Samples seen, instead of steps: the unit that runs on different data and batches are compared in."""
    global_batch_size: Positive[int] = 256
    """Samples in one step over all ranks; each pair is a negative for all the others."""
    accumulate: Positive[int] = 1
    """Micro-batches a rank takes its share in: less memory, the same gradient. Of pairs that costs one more forward
    pass."""
    micro_batch_tokens: Positive[int | None] = None
    """Of native images instead: as few micro-batches as keep each at so many patches at most, and all equal."""
    precision: Precision = "auto"
    """bf16 or fp32 towers; the loss is fp32. auto: bf16 on a GPU that has it."""
    compile: Compile = "auto"
    """Compile the blocks of the towers with torch.compile. auto: on a GPU; on a CPU it takes a minute to gain 5 %."""
    gradient_checkpointing: Share[float] = 0.0
    """Share of each tower's blocks that are recomputed in backward: less memory, about a third more time with 1."""
    max_grad_norm: Positive[float] = 1.0
    """Clip the gradient's norm to this."""
    ema_decay: Probability[float | None] = None
    """Decay of an average of the weights, used for evaluation and the final model; none: no average."""
    seed: int = 0
    """Decides initial weights, data order, augmentation and dropout."""
    log_every: Positive[int] = 1
    """Steps between rows of metrics.jsonl."""
    max_skipped: Positive[int] = 5
    """Steps in a row with a loss or gradient that is not finite after which the run stops."""


@dataclass(frozen=True)
class EvaluationConfig:
    """Evaluation on data.eval during training and at the end."""

    every: Positive[int | None] = None
    """Steps between evaluations; none: after each epoch of a run of two to ten, else four over the run."""
    batch_size: Positive[int] = 256
    """Images embedded at once."""
    limit: Positive[int | None] = None
    """Images of each source, a fixed random subset; none: all."""


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints, from which `--resume` continues exactly."""

    every: Positive[int | None] = None
    """Steps between checkpoints; none: ten over the run."""
    keep: Positive[int] = 3
    """How many of the newest to keep; an older one goes when a newer one has been read back whole."""
    keep_every: Positive[int | None] = None
    """Steps between checkpoints that are kept for ever; none: no such."""
    background: bool = True
    """Copy the state into host memory and write it while training goes on; else training waits for the disk."""

    def due(self, step: int) -> bool:
        """Whether one is saved after so many steps."""
        return step % self.every == 0 or (self.keep_every is not None and step % self.keep_every == 0)


@dataclass(frozen=True)
class Stage:
    """A part of a run with images, or a share of their patches, of its own; what is left out is the model's."""

    until: Annotated[float, Bound("it must be above 0 and at most 1", lambda value: 0 < value <= 1)]
    """Where it ends, as a share of the run's steps."""
    image_size: Positive[int | None] = None
    """Height and width of the images in pixels; the patch size must divide it."""
    patch_dropout: Probability[float | None] = None
    """Share of the patches that are dropped."""


@dataclass(frozen=True)
class RunConfig:
    """What every kind of run can be told; each kind adds its `model`, and has `data` of its own."""

    RENAMED = {"optimizer.beta1": Gone(0.9), "optimizer.momentum": Gone(0.95)} | {
        f"model.{tower}.gradient_checkpointing": "train.gradient_checkpointing" for tower in ("image", "text")
    }
    SHORT_FLAGS = {  # flags that stand for longer ones
        "data": "data.train",
        "train_data": "data.train",
        "val_data": "data.eval",
        "epochs": "train.epochs",
        "num_epochs": "train.epochs",
        "batch_size": "train.global_batch_size",
        "lr": "optimizer.lr",
        "wd": "optimizer.weight_decay",
        "seed": "train.seed",
        "warmup": "schedule.warmup_steps",
        "accum_freq": "train.accumulate",
        "workers": "data.num_workers",
        "report_to": "trackers",
        "out": "run_folder",
        "output_dir": "run_folder",
        "eval": "data.eval",
    }

    run_folder: str = ""
    """Run folder; one that fits by default."""
    resume: bool = False
    """Continue the run from its newest whole checkpoint, with the options it was started with. `--resume auto` starts
    one where there is none yet, for launchers that start again by themselves."""
    max_restarts: Positive[int] = 3
    """With --resume auto: starts again from one and the same step, after which no more is tried."""
    dry_run: bool = False
    """Show what the run would learn from, and stop there; nothing is written."""
    optimizer: OptimizerConfig = slot(OPTIMIZERS, "adamw")
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    curriculum: tuple[Stage, ...] = ()
    """Stages of cheaper steps: smaller images, dropped patches. After the last one both are the model's own."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    trackers: tuple[str, ...] = ()
    """Also log to these: tensorboard, wandb, trackio, or another that Accelerate knows."""
    data: ImageDataConfig = field(default_factory=ImageDataConfig)
    given: dict[str, bool] | None = hidden()
    automatic: bool = hidden(False)

    def short_name(self) -> str:
        """What the run is called, after its configuration file, when no folder is named."""
        raise NotImplementedError


C = TypeVar("C", bound=RunConfig)


def given_options(config: RunConfig) -> dict[str, bool]:
    """The config's `given`; of one that was made in Python, all that is not as it is by default."""
    if config.given is not None:
        return config.given
    usual = type(config)()
    for part in fields(config):  # of a chosen loss or optimizer, its own defaults
        value = getattr(config, part.name)
        if is_dataclass(value) and type(value) is not type(getattr(usual, part.name)):
            usual = replace(usual, **{part.name: type(value)()})
    before = flatten(to_dict(usual))
    return {name: True for name, value in flatten(to_dict(config)).items() if value != before.get(name)}


def counts(config: RunConfig, name: str, cause: str) -> bool:
    """Whether option `name` was given and has to take effect though option `cause` keeps it from that.

    A flag has to. A file serves several choices: what it gives has to where the file itself gives the cause.
    """
    given = given_options(config)
    return given.get(name, False) or (name in given and given.get(cause) is False)


def check_run(config: RunConfig) -> None:
    """Raise UserError for options that no data can make right."""
    check_bounds(config)
    norms, log = config.health.norms_every, config.train.log_every
    if norms is not None and norms % log:
        raise UserError(f"health.norms_every {norms} is no multiple of train.log_every {log}, whose rows show them")
    given = [f"train.{name}" for name in LENGTHS if getattr(config.train, name) is not None]
    if len(given) != 1:
        said = f"said more than once ({', '.join(given)})" if given else "not said"
        raise UserError(f"how long to train is {said}: give one of --{', --'.join(f'train.{n}' for n in LENGTHS)}")
    if config.health.rolls_back and config.checkpoint.keep == 1:
        raise UserError("checkpoint.keep is 1: to roll back there must be an older one than the newest; use 2 or more")


def check_division(train: TrainConfig, world_size: int) -> None:
    """Raise UserError unless ranks and micro-batches get equal shares of the global batch."""
    if train.global_batch_size % (world_size * train.accumulate):
        raise UserError(
            f"train.global_batch_size {train.global_batch_size} does not divide into {world_size} ranks "
            f"with {train.accumulate} micro-batches each; use a multiple of {world_size * train.accumulate}"
        )


def micro_batches(train: TrainConfig, samples: int, patches: int | None) -> int:
    """Return in how many micro-batches a rank takes its samples of a step: the same on all ranks.

    patches: the most of a native image in this step.
    """
    if train.micro_batch_tokens is None:
        return train.accumulate
    parts = (n for n in range(1, samples + 1) if samples % n == 0)
    return next(n for n in parts if samples // n * patches <= train.micro_batch_tokens)


def parts_of_batch(train: TrainConfig, batch: dict) -> int:
    """Return the same of a batch as `train_loader` yields it."""
    patches = batch.get("patches")
    return micro_batches(train, len(batch["image"]), None if patches is None else int(patches[0]))


def resolve_run(config: C, source: Source, image: ImageTowerConfig) -> C:
    """Fill in what follows from the length of the data, how many steps of what, and from the images' tower.

    Raises:
        UserError: there are fewer samples than one batch, or as `resolve_native`.
    """
    batch = config.train.global_batch_size
    if batch > len(source):
        raise UserError(
            f"train.global_batch_size {batch} is larger than '{source.name}' with its {len(source)} samples; "
            f"use at most {len(source)}"
        )
    steps = _steps(config.train, len(source))
    each_epoch = 2 <= round(steps * batch / len(source)) <= 10
    evaluate_every = config.evaluation.every or (None if each_epoch else math.ceil(steps / 4))
    config = replace(
        config,
        train=replace(config.train, steps=steps, epochs=None, samples=None),
        schedule=config.schedule.resolved(steps),
        evaluation=replace(config.evaluation, every=evaluate_every),
        checkpoint=replace(config.checkpoint, every=config.checkpoint.every or math.ceil(steps / 10)),
    )
    return resolve_native(config, image)


def native_options(options: PreprocessOptions) -> PreprocessOptions:
    """Return them for native images, of which nothing is cut."""
    return replace(options, resize="native", short_side=None, cut="round")


def resolve_native(config: C, image: ImageTowerConfig) -> C:
    """Return the options with `data.preprocess` for a model whose images keep their aspect (native), or not.

    Raises:
        UserError: an option that is for native images alone, or for others alone.
    """
    data, train = config.data, config.train
    if not image.native:
        asked = {"data.preprocess.resize native": data.preprocess.resize == "native"}
        asked |= {"data.native.patches": data.native.patches, "data.preprocess.patches": data.preprocess.patches}
        asked |= {"train.micro_batch_tokens": train.micro_batch_tokens}
        mend = "give --model.image.native with it, or leave" if hasattr(config, "model") else "of this model leave"
        for name, given in asked.items():
            if given:
                raise UserError(f"{name} is for native images: {mend} it out")
        return config
    preprocess = native_options(data.preprocess)
    for name in ("resize", "short_side", "cut"):
        value = getattr(data.preprocess, name)
        option = f"data.preprocess.{name}"
        if value != getattr(preprocess, name) and counts(config, option, "model.image.native"):
            raise UserError(
                f"{option} {value} is not for model.image.native, which keeps the whole image in its aspect; leave "
                "one of them out"
            )
    if config.curriculum:
        raise UserError(
            "curriculum is not for model.image.native, whose images have no one size: use fewer patches, "
            "--data.native.patches"
        )
    for name in ("mixup", "cutmix"):
        if getattr(config, name, 0):
            raise UserError(f"{name} mixes images of one size, which model.image.native has not; leave one of them out")
    most = most_patches(config, image)
    if most > MOST_PATCHES:
        raise UserError(f"data.native.patches {most:,}: use at most {MOST_PATCHES:,}")
    if train.micro_batch_tokens is not None:
        if train.accumulate > 1:
            raise UserError("give train.accumulate or train.micro_batch_tokens, not both: each says the micro-batches")
        if train.micro_batch_tokens < most:
            raise UserError(
                f"train.micro_batch_tokens {train.micro_batch_tokens:,} is less than one image may have, {most:,} "
                f"patches; give {most:,} or more"
            )
    return replace(config, data=replace(data, preprocess=preprocess))


def most_patches(config: RunConfig, image: ImageTowerConfig) -> int:
    """Return how many patches a native image has at most in training."""
    return max(config.data.native.patches, default=config.data.preprocess.patches or image.num_patches)


def num_workers(config: ImageDataConfig, on_gpu: bool) -> int:
    """Loader processes per rank: as asked, or a fair share of this machine's cores where a GPU leaves them free."""
    if config.num_workers is not None:
        return config.num_workers
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return min(8, max(1, len(os.sched_getaffinity(0)) // ranks)) if on_gpu else 0


def _steps(train: TrainConfig, num_samples: int) -> int:
    if train.steps is not None:
        return train.steps
    samples = train.samples if train.epochs is None else train.epochs * num_samples
    return max(1, round(samples / train.global_batch_size))
