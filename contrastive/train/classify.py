"""Supervised classification: labelled images in, cross entropy over the global batch; a ViT classifier from scratch."""

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from rich import box
from rich.table import Table
from torch import nn

from contrastive.data.class_joining import in_classes_of
from contrastive.data.decode import decode
from contrastive.data.order import SampleOrder
from contrastive.data.record import BadSample, Source, some_have
from contrastive.data.samples import LabelledDataset
from contrastive.data.settings import LabelledDataConfig
from contrastive.data.sources import announce, open_source
from contrastive.data.sources.open import held_out_spec
from contrastive.data.sources.subset import labelled_share
from contrastive.distributed.runtime import Runtime
from contrastive.errors import UserError
from contrastive.interop.bundle import save_model
from contrastive.log import console, is_main_process
from contrastive.models import ClassifierConfig, ImageClassifier, classifier_config, classifier_table
from contrastive.named_sections import preset
from contrastive.option_types import NotNegative, Positive, Probability
from contrastive.train.options import RunConfig, check_run, given_options, parts_of_batch, resolve_run
from contrastive.train.run import open_run, run
from contrastive.train.task import Inputs, Losses, TrainingTask, Weights, describe_image_tower, seed_step

SMALL = 64  # pixels: images up to this size are taken as they are
PATCHES_PER_SIDE = 8  # of those
IMAGES_MEASURED = 16  # for their size


@dataclass(frozen=True)
class SupervisedConfig(RunConfig):
    """What both kinds of supervised runs can be told."""

    data: LabelledDataConfig = field(default_factory=LabelledDataConfig)
    mixup: NotNegative[float] = 0.0
    """Alpha of mixup's Beta distribution; 0: no mixup."""
    cutmix: NotNegative[float] = 0.0
    """Alpha of CutMix's; with mixup too, one of them is drawn for each batch."""
    label_smoothing: Probability[float] = 0.0
    """Share of each label that is spread over all classes."""

    def short_name(self) -> str:
        """The last part of the data's path, anything unusual as '-'."""
        last = self.data.train.rstrip("/").rpartition("/")[2]
        return "".join(c if c.isalnum() else "-" for c in last).strip("-") or "data"


def check_supervised(config: SupervisedConfig) -> None:
    """Raise UserError for options that no data can make right."""
    if (config.mixup or config.cutmix) and config.train.global_batch_size < 2:
        raise UserError("mixup and cutmix mix the images of a batch: train.global_batch_size must be above 1")
    check_run(config)


class ClassificationTask(TrainingTask):
    """An image classifier that learns from the labels of `source`.

    Args:
        config: resolved. model: with its first weights.
        held_out: evaluated; their classes are the same as the source's.
    """

    advice = "check the labels, try a lower optimizer.lr, a longer schedule.warmup_steps or less augmentation"

    def __init__(self, config: SupervisedConfig, model: ImageClassifier, source: Source, held_out: list[Source]):
        super().__init__(config, model, source, held_out)
        num_classes = model.config.num_classes
        self.mixing = Mixing(config.mixup, config.cutmix, num_classes)
        self.chance_loss = math.log(num_classes)
        self._accuracy: torch.Tensor | None = None  # of the last step

    def dataset(self, order: SampleOrder) -> LabelledDataset:
        size, augment = self.image_size(order), self.config.data.augment
        return LabelledDataset(self.source, order, size, augment, self.model.config.num_classes)

    def inputs(self, batch: dict) -> Inputs:
        return {"image": batch["image"], "labels": batch["label"].chunk(parts_of_batch(self.config.train, batch))}

    def forward_backward(self, wrapped: nn.Module, inputs: Inputs, step: int, runtime: Runtime) -> Losses:
        device, train = runtime.device, self.config.train
        _, self.model.image_tower.patch_dropout = self.curriculum.at(step)
        pixels, labels = self.preprocess.normalize(inputs["image"]), inputs["labels"]
        total, hits = torch.zeros((), device=device), torch.zeros((), device=device)
        parts = list(zip(pixels.chunk(len(labels)), labels, strict=True))
        for number, (images, own) in enumerate(parts):
            seed_step(train.seed, step, runtime.rank, number)
            mixed, targets = self.mixing(images, own)
            with runtime.gradient_sync(wrapped, now=number == len(parts) - 1):
                scores = wrapped(mixed).float()
                # Parts are of one size, so the mean of their means is the batch's.
                loss = F.cross_entropy(scores, targets, label_smoothing=self.config.label_smoothing) / len(parts)
                loss.backward()
            total += loss.detach()
            hits += (scores.detach().argmax(dim=1) == own).float().mean() / len(parts)
        self._accuracy = 100 * hits.double()
        return {"loss": total}

    def figures(self) -> dict[str, torch.Tensor | None]:
        """'accuracy': percent of this rank's share of the batch, as it was varied."""
        return {"accuracy": self._accuracy}

    def score(self, source: Source, **how) -> tuple[str, dict[str, float]]:
        from contrastive.evaluate.classification import classification

        result = classification(self, source, **how)
        names = ("acc1", "acc5", "mean_per_class_recall")
        return "classification", {name: result[name] for name in names if name in result}

    def save(self, folder: Path, weights: Weights, ema: Weights | None = None) -> None:
        names = self.source.class_names
        save_model(folder, weights, self.model.config, self.preprocess.config, ema=ema, class_names=names)

    def describe(self) -> list[tuple[str, str]]:
        model = self.model.config
        return [
            describe_image_tower(self.model.image_tower, "frozen"),
            ("head", f"{model.num_classes} classes on {model.embed_dim} channels"),
        ]


class Mixing:
    """Mix each batch with a permutation of itself; of the two methods given, one is drawn for each batch.

    Args:
        mixup, cutmix: the alpha of the Beta distribution that shares are drawn from; 0 leaves the method out.

    Draws come from torch's global generator.
    """

    def __init__(self, mixup: float, cutmix: float, num_classes: int):
        from torchvision.transforms import v2  # takes longer to import than all that lies here

        methods = [v2.MixUp(alpha=mixup, num_classes=num_classes)] if mixup else []
        methods += [v2.CutMix(alpha=cutmix, num_classes=num_classes)] if cutmix else []
        self.methods = methods

    def __call__(self, pixels: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, 3, H, W) and (B,) int64 to mixed pixels and, where anything mixes, probabilities (B, C)."""
        if not self.methods:
            return pixels, labels
        # v2.RandomChoice draws in another way: a run that began with this draw would not resume exactly.
        return self.methods[int(torch.rand(()) * len(self.methods))](pixels, labels)


C = TypeVar("C", bound=SupervisedConfig)


@dataclass(frozen=True)
class TrainClassifierConfig(SupervisedConfig):
    """Everything a classifier trained from scratch can be told."""

    model: ClassifierConfig = preset(classifier_config, lambda: classifier_config("tiny"), classifier_table)
    image_size: Positive[int | None] = None
    """Pixels a side; none: that of images of at most 64 pixels, else model.image.image_size."""
    patch_size: Positive[int | None] = None
    """Pixels of a patch's side; none: an eighth of such small images, else model.image.patch_size."""


def train_classifier(config: TrainClassifierConfig) -> bool:
    """Train a classifier from scratch as configured; otherwise as `pretrain`."""
    check_supervised(config)
    config.model.image.check()
    checkpoint = open_run(config)
    source, held_out, config = open_data(config)
    model_config = fit_image(config, source)
    model_config = replace(model_config, num_classes=num_classes(source, config.model.num_classes))
    image = model_config.image
    config = replace(config, model=model_config, image_size=image.image_size, patch_size=image.patch_size)
    config = resolve_run(config, source, image)
    torch.manual_seed(config.train.seed)
    model = ImageClassifier(model_config)
    show_parameters(model)
    return run(ClassificationTask(config, model, source, held_out), checkpoint)


def open_data(config: C) -> tuple[Source, list[Source], C]:
    """Open training and held-out data; the options come back with the held-out data that was found."""
    data = config.data
    how = {"image_column": data.image_column, "classes": data.classes}
    source = open_source(data.train, **how)
    found = held_out_spec(data.train) if not data.eval else None
    config = replace(config, data=replace(data, eval=data.eval or ((found,) if found else ())))
    held_out = [open_source(spec, **how) for spec in config.data.eval]
    if data.share != 1:
        source = labelled_share(source, data.share)
    announce(source, "data.train")
    for other in held_out:
        if not some_have(other, lambda index, other=other: other.label(index) is not None):
            raise UserError(f"data.eval {other.name} has no class labels; classifiers are scored on labelled images")
    held_out = [in_classes_of(source.class_names, source.name, other) for other in held_out]
    for other in held_out:
        announce(other, "data.eval")
    return source, held_out, config


def num_classes(source: Source, asked: int | None) -> int:
    """Return how many classes there are.

    Raises:
        UserError: neither the data nor the options say so, or they differ.
    """
    names = source.class_names
    if names is None:
        if asked is None:
            raise UserError(
                f"{source.name} has no class names: put a classnames.txt beside the data (from scratch, "
                "--model.num_classes will do)"
            )
        if asked < 2:
            raise UserError(f"model.num_classes is {asked}; a classifier needs two at least")
        return asked
    if asked not in (None, len(names)):
        raise UserError(f"model.num_classes is {asked}, but {source.name} has {len(names)} classes; leave it out")
    if len(names) < 2:
        raise UserError(f"{source.name} has one class only; a classifier needs two")
    return len(names)


def fit_image(config: TrainClassifierConfig, source: Source) -> ClassifierConfig:
    """Return the model with the image and patch size that were asked for, or that fit small images.

    Raises:
        UserError: a size that is not a multiple of the patch size.
    """
    image, given = config.model.image, given_options(config)
    sizes: dict[str, Any] = {}
    for name in ("image_size", "patch_size"):
        short, full = getattr(config, name), getattr(image, name)
        own = f"model.image.{name}" in given
        if own and name in given and short not in (None, full):
            raise UserError(f"{name} is {short}, but model.image.{name} {full}: give one of them")
        sizes[name] = full if own else short
    side = _longest_side(source) if sizes["image_size"] is None else None
    if side is not None and side <= SMALL:
        patch = sizes["patch_size"] or max(1, round(side / PATCHES_PER_SIDE))
        sizes = {"image_size": -(-side // patch) * patch, "patch_size": patch}
    sizes = {name: value for name, value in sizes.items() if value is not None}
    image = replace(image, **sizes)
    image.check()
    return replace(config.model, image=image)


def _longest_side(source: Source) -> int | None:
    """Return the longest side of the first images, or None where none can be read."""
    sides = []
    for index in range(min(IMAGES_MEASURED, len(source))):
        try:
            sides.append(max(decode(source[index].image).shape[1:]))
        except BadSample:
            continue
    return max(sides, default=None)


def parameter_rows(model: ImageClassifier) -> list[tuple[str, str, int, int]]:
    """Return (part, shape of what it gives for one image, how many, parameters of each); the last row is the sum."""
    image, tower = model.config.image, model.image_tower
    tokens = f"{image.num_patches + image.class_token} x {image.width}"
    parts = [
        ("patch embedding", f"{image.num_patches} x {image.width}", 1, tower.patch_embed),
        (f"{image.depth} blocks", tokens, image.depth, tower.transformer.blocks[0]),
        ("final norm", tokens, 1, tower.norm),
        ("head", str(model.config.num_classes), 1, model.head),
    ]
    rows = [(name, shape, times, sum(p.numel() for p in part.parameters())) for name, shape, times, part in parts]
    total = sum(p.numel() for p in model.parameters())
    # What lies between patches and blocks: class token, positions, a norm there; and a pooling head.
    rest = total - sum(times * count for *_, times, count in rows)
    rows.insert(1, ("class token, positions and pooling", tokens, 1, rest))
    return [*rows, ("all", "", 1, total)]


def show_parameters(model: ImageClassifier) -> None:
    """Print the table."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("part")
    table.add_column("gives, for one image")
    table.add_column("parameters", justify="right")
    for name, shape, times, count in parameter_rows(model):
        table.add_row(name, shape, f"{count:,}" if name != f"{times} blocks" else f"{times} x {count:,}")
    if is_main_process():
        console.print(table)
