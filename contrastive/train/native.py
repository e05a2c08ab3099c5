"""Runs whose images keep their aspect (model.image.native): what goes with it, what does not, and micro-batches."""

from dataclasses import replace
from typing import TypeVar

import torch

from contrastive.data.preprocess import MOST_PATCHES, PreprocessOptions
from contrastive.errors import UserError
from contrastive.models import ImageTowerConfig
from contrastive.train.options import RunConfig, TrainConfig

C = TypeVar("C", bound=RunConfig)


def native_options(options: PreprocessOptions) -> PreprocessOptions:
    """Return them for native images, of which nothing is cut."""
    return replace(options, resize="native", short_side=None, cut="round")


def resolve_native(config: C, image: ImageTowerConfig) -> C:
    """Return the options with `data.preprocess` for a model that is native, or not.

    Raises:
        UserError: an option that is for native images alone, or for others alone.
    """
    from contrastive.train.given import counts

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
    patches: torch.Tensor | None = batch.get("patches")
    return micro_batches(train, len(batch["image"]), None if patches is None else int(patches[0]))
