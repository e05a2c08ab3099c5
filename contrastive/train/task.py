"""What a run learns: all that the loop leaves to the kind of run it is."""

import bisect
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from contrastive.data.order import SampleOrder
from contrastive.data.preprocess import Preprocess
from contrastive.data.record import Source
from contrastive.data.samples import DrawnSize, ImageSize, SampleDataset
from contrastive.data.tokenizer import Tokenizer
from contrastive.distributed.runtime import Runtime
from contrastive.errors import UserError
from contrastive.models.image_tower import ImageTower
from contrastive.train.options import RunConfig, Stage

Weights = Mapping[str, torch.Tensor]
Inputs = dict[str, Any]  # tensors, or lists, dictionaries and named tuples of them
Losses = dict[str, torch.Tensor]  # scalars by name


class Curriculum:
    """Image size and patch dropout that `tower` learns with at each of a run's `steps`: a function of the step alone.

    Raises:
        UserError: a size that the patch size does not divide; a stage out of order, or without effect.
    """

    def __init__(self, stages: tuple[Stage, ...], steps: int, tower: ImageTower):
        image, locked = tower.config, not any(p.requires_grad for p in tower.parameters())
        own = (image.image_size, image.patch_dropout)
        given = [(stage.image_size, stage.patch_dropout) for stage in stages]
        self.ends = [round(stage.until * steps) for stage in stages]
        self.settings = [tuple(b if a is None else a for a, b in zip(pair, own, strict=True)) for pair in given] + [own]
        for number, (stage, end) in enumerate(zip(stages, self.ends, strict=True)):
            where, before = f"curriculum: the stage until {stage.until:g}", self.ends[number - 1] if number else 0
            if self.settings[number][0] % image.patch_size:
                raise UserError(
                    f"{where} has image_size {stage.image_size}, which is not a multiple of model.image.patch_size "
                    f"{image.patch_size}; use {image.nearest_sizes(stage.image_size)}"
                )
            if end <= before:
                why = f"ends at step {end} of {steps}, where it begins" if end == before else "ends before it begins"
                raise UserError(f"{where} {why}: each stage needs a larger until than the one before")
            if locked and stage.patch_dropout is not None:
                raise UserError(f"{where} has patch_dropout, which has no effect on a tower that does not learn")
            if self.settings[number] == self.settings[number + 1]:
                raise UserError(f"{where} changes nothing: what comes after it is the same; leave it out")

    def at(self, step: int) -> tuple[int, float]:
        """Return image size and patch dropout at `step`, counted from 0."""
        return self.settings[bisect.bisect_right(self.ends, step)]

    def image_size(self, step: int) -> int:
        return self.at(step)[0]

    def __str__(self) -> str:
        """'112 px, patch dropout 0.5 until step 60; then 224 px, patch dropout 0'."""
        said = [f"{size} px, patch dropout {dropout:g}" for size, dropout in self.settings]
        stages = [f"{what} until step {end:,}" for what, end in zip(said, self.ends, strict=False)]
        return "; ".join([*stages, f"then {said[-1]}"])


class TrainingTask(ABC):
    """A model with its data and its loss. Subclasses: ContrastiveTask, ClassificationTask.

    preprocess: how its images are made. curriculum: at which size they are, in training.

    Args:
        config: resolved, nothing in it is left open.
        model: the weights, not wrapped for several ranks.
        source: what it is trained on. held_out: what it is evaluated on.
    """

    tokenizer: Tokenizer | None = None
    """How its texts are made, where it has any."""
    chance_loss: float
    """The loss of a model that tells nothing apart."""
    advice: str
    """What to look at when the loss stays there."""
    chooses: bool = True
    """Whether `score` counts right choices, which guessing hits at times."""

    def __init__(self, config: RunConfig, model: nn.Module, source: Source, held_out: list[Source]):
        self.config, self.model, self.source, self.held_out = config, model, source, held_out
        self.curriculum = Curriculum(config.curriculum, config.train.steps, model.image_tower)
        image = model.config.image
        self.preprocess = Preprocess(config.data.preprocess.at(image.image_size, image.patch_size))

    def image_size(self, order: SampleOrder) -> ImageSize:
        """Return how large the images of a step are, or of all."""
        image = self.model.config.image
        if not image.native:
            return self.curriculum.image_size
        patches = self.config.data.native.patches or (self.preprocess.config.most_patches,)
        return DrawnSize(image.patch_size, patches, order.seed)

    @abstractmethod
    def dataset(self, order: SampleOrder) -> SampleDataset:
        """Return the training samples in this order."""

    @abstractmethod
    def inputs(self, batch: dict) -> Inputs:
        """Return what of a batch, as `train_loader` yields it, goes to the device; in host memory, images as uint8."""

    @abstractmethod
    def forward_backward(self, wrapped: nn.Module, inputs: Inputs, step: int, runtime: Runtime) -> Losses:
        """Add the gradient of the loss over the global batch; return this rank's losses, detached scalars by name.

        The first is 'loss'; others are what it is made of, where that is several things.

        Nothing in it waits for the device: no `.item()`, no shape that depends on values.

        Args:
            wrapped: the model as the runtime wraps it.
            inputs: what `inputs` chose of this rank's batch, on the device.

        Raises:
            NonFiniteFeatures: on all ranks alike; the step is skipped.
        """

    def begins(self, step: int) -> bool:
        """Whether the loss is another one from this step on, counted from 0."""
        return False

    def before_step(self, step: int) -> None:  # noqa: B027 - a hook, like `conclude`
        """Called without gradients before each step, counted from 0."""

    def after_update(self, step: int, skipped: torch.Tensor) -> None:  # noqa: B027 - a hook, like `conclude`
        """Keep parameters where the method wants them; called without gradients after the update of a step.

        skipped: bool, 0-dim: the weights have stayed as they were.
        """

    def figures(self) -> dict[str, torch.Tensor | None]:
        """Return what a row of metrics.jsonl says of the last step besides loss, norm and rate; detached scalars."""
        return {}

    @abstractmethod
    def score(self, source: Source, **how) -> tuple[str, dict[str, float]]:
        """Return the kind of evaluation and its figures in percent by name, the same on every rank.

        Args:
            source: one of `held_out`. how: device, batch_size and limit, as the evaluators take them.
        """

    def evaluate(self, runtime: Runtime) -> dict[str, float]:
        """Return figures in percent by 'KIND/SOURCE/NAME'; the same on every rank, all of which call it."""
        figures = {}
        for source in self.held_out:
            kind, scores = self.score(source, **self.how_to_evaluate(runtime))
            figures |= {f"{kind}/{source.name}/{name}": value for name, value in scores.items()}
        return figures

    def how_to_evaluate(self, runtime: Runtime) -> dict:
        options = self.config.evaluation
        return {"device": runtime.device, "batch_size": options.batch_size, "limit": options.limit}

    def conclude(self, folder: Path, runtime: Runtime) -> None:  # noqa: B027
        """Do what is left after the last step, before the model is saved; called on every rank.

        Args:
            folder: the run's.
        """

    def final_weights(self) -> Weights:
        """Return what of the weights is the model that the run gives."""
        return self.model.state_dict()

    @abstractmethod
    def save(self, folder: Path, weights: Weights, ema: Weights | None = None) -> None:
        """Write a model folder that `contrastive.load` takes into an existing folder."""

    @abstractmethod
    def describe(self) -> list[tuple[str, str]]:
        """Return (name, text) lines that say what is trained."""

    def report(self, device: torch.device) -> dict:
        """Return what `write_report` is to show besides curves and options."""
        return {}


def millions(module: nn.Module) -> str:
    """Return the number of parameters, as '12.3 M'."""
    return f"{sum(p.numel() for p in module.parameters()) / 1e6:.1f} M"


def describe_image_tower(tower: ImageTower, when_fixed: str) -> tuple[str, str]:
    """Return a line of `describe`; `when_fixed` ends that of a tower that does not learn."""
    fixed = "" if any(p.requires_grad for p in tower.parameters()) else f", {when_fixed}"
    image = tower.config
    size = f"{image.image_size} px, patch {image.patch_size}, width {image.width}, depth {image.depth}"
    return "image tower", f"{millions(tower)}: {size}{fixed}"


def seed_step(seed: int, step: int, rank: int, part: int = 0) -> None:
    """Make dropout and patch dropout a function of where we are, so that no random state needs saving."""
    place = f"{seed} {step} {rank} {part}".encode()
    torch.manual_seed(int.from_bytes(hashlib.blake2b(place, digest_size=7).digest()))
