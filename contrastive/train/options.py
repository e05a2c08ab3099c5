"""The options that every kind of run has, and how those left open follow from its data."""

import math
import os
import re
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from contrastive.config import Gone, flatten, given_options, hidden, slot, to_dict
from contrastive.data.record import Source
from contrastive.data.settings import ImageDataConfig
from contrastive.distributed.runtime import Precision
from contrastive.errors import UserError
from contrastive.log import say
from contrastive.optim import OPTIMIZERS, OptimizerConfig, ScheduleConfig
from contrastive.option_types import Positive, Probability, check_bounds

# Three ways to say how long to train; one of them is given.
LENGTHS = ("steps", "epochs", "samples")
# What may differ when a run is resumed: nothing that decides which samples come, in what form, for what loss. The data
# may have moved: they are compared by their fingerprint, and so is their order, by `check_cursor`.
MAY_CHANGE = re.compile(
    r"trackers|init_key|(schedule|evaluation|checkpoint|wise_ft)\..*|"
    r"optimizer\.(lr|muon_lr|weight_decay|logit_lr_factor|layer_decay|beta2|eps)|"
    r"train\.(steps|accumulate|precision|max_grad_norm|log_every|max_skipped)|"
    r"data\.(train|eval|num_workers|timeout|max_bad_share|bad_window)|"
    r"train\.(seed|global_batch_size)|data\.(window|lanes|replacement)|model\.(image|text)\.gradient_checkpointing"
)


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
    precision: Precision = "auto"
    """bf16 or fp32 towers; the loss is fp32. auto: bf16 on a GPU that has it."""
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
    """Steps between evaluations; none: four over the run."""
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
    """How many of the newest to keep."""


@dataclass(frozen=True)
class RunConfig:
    """What every kind of run can be told; each kind adds its `model`, and has `data` of its own."""

    RENAMED = {"optimizer.beta1": Gone(0.9), "optimizer.momentum": Gone(0.95)}
    SHORT_FLAGS = {}  # flags that stand for longer ones: 'lr' for 'optimizer.lr'

    run_folder: str = ""
    """Run folder; one that fits by default."""
    resume: bool = False
    """Continue the run from its newest whole checkpoint, with the options it was started with."""
    dry_run: bool = False
    """Show what the run would learn from, and stop there; nothing is written."""
    optimizer: OptimizerConfig = slot(OPTIMIZERS, "adamw")
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    trackers: tuple[str, ...] = ()
    """Also log to these: tensorboard, wandb, trackio, or another that Accelerate knows."""
    data: ImageDataConfig = field(default_factory=ImageDataConfig)
    given: dict[str, bool] | None = hidden()

    def gave(self, name: str, *causes: str) -> bool:
        """Whether an option was given that is to count against `causes`, options which leave it without effect.

        One of a configuration file does not where a flag gave a cause: a file serves several choices.
        """
        given = given_options(self)
        return given.get(name, False) or (name in given and not any(given.get(cause) for cause in causes))

    def short_name(self) -> str:
        """What the run is called, after its configuration file, when no folder is named."""
        raise NotImplementedError


C = TypeVar("C", bound=RunConfig)


def check_run(config: RunConfig) -> None:
    """Raise UserError for options that no data can make right."""
    check_bounds(config)
    given = [f"train.{name}" for name in LENGTHS if getattr(config.train, name) is not None]
    if len(given) != 1:
        said = f"said more than once ({', '.join(given)})" if given else "not said"
        raise UserError(f"how long to train is {said}: give one of --{', --'.join(f'train.{n}' for n in LENGTHS)}")


def check_division(train: TrainConfig, world_size: int) -> None:
    """Raise UserError unless ranks and micro-batches get equal shares of the global batch."""
    if train.global_batch_size % (world_size * train.accumulate):
        raise UserError(
            f"train.global_batch_size {train.global_batch_size} does not divide into {world_size} ranks "
            f"with {train.accumulate} micro-batches each; use a multiple of {world_size * train.accumulate}"
        )


def changes_on_resume(config: RunConfig, before: dict[str, Any]) -> str:
    """Return which options a resumed run goes on with that are not those it had, in a line; '' where there are none.

    Args:
        config: resolved. before: what config.yaml says, by dotted names.

    Raises:
        UserError: an option that a run keeps from its start to its end.
    """
    now, given = flatten(to_dict(config)), given_options(config)
    asked = {name for name in now if name in given or (name.endswith(".name") and name[:-5] in given)}
    asked |= {"train.steps"} if any(f"train.{name}" in given for name in LENGTHS) else set()
    changed = [name for name in before if name in asked - {"resume", "run_folder"} and before[name] != now[name]]
    said = {name: f"{name} {before[name]} → {now[name]}" for name in changed}
    kept = [name for name in said if not MAY_CHANGE.fullmatch(name)]
    if kept:
        raise UserError(
            f"a resumed run keeps its {kept[0]} (asked for: {'; '.join(said[name] for name in kept)}): leave it as it "
            "was, or start another run with a --run_folder of its own; pretraining starts from these weights with "
            f"--init {config.run_folder}"
        )
    schedule = "; from here on the learning rate is that of a run of this length" if "train.steps" in said else ""
    return f"resuming with {'; '.join(said.values())}{schedule}" if said else ""


def check_brought(asked: C, config: C, flag: str) -> None:
    """Raise UserError for a given option that is another one in the model which `--flag` names; see `RunConfig.gave`.

    Args:
        asked: before, config: after the options were replaced by the model's.
    """
    before, now = flatten(to_dict(asked)), flatten(to_dict(config))
    other = [name for name in now if name in before and before[name] not in (None, now[name])]
    other = [name for name in other if name.startswith(("model.", "data."))]
    refused = [name for name in other if asked.gave(name, flag) or ("model." in name and asked.gave("model", flag))]
    if refused:
        said = "; ".join(f"{name} {before[name]} (the model's: {now[name]})" for name in refused)
        raise UserError(
            f"--{flag} {getattr(asked, flag)} brings its own {refused[0]}: {said}. Leave it out, or leave out --{flag}"
        )
    left = [name for name in other if name in given_options(asked)]
    if left:
        say(f"--{flag} brings its own; the configuration file's are left aside: {', '.join(left)}")


def resolve_run(config: C, source: Source) -> C:
    """Fill in what follows from the length of the data: how many steps of what.

    Raises:
        UserError: there are fewer samples than one batch.
    """
    batch = config.train.global_batch_size
    if batch > len(source):
        raise UserError(
            f"train.global_batch_size {batch} is larger than '{source.name}' with its {len(source)} samples; "
            f"use at most {len(source)}"
        )
    steps = _steps(config.train, len(source))
    return replace(
        config,
        train=replace(config.train, steps=steps, epochs=None, samples=None),
        evaluation=replace(config.evaluation, every=config.evaluation.every or math.ceil(steps / 4)),
        checkpoint=replace(config.checkpoint, every=config.checkpoint.every or math.ceil(steps / 10)),
    )


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
