"""Supervised classification as a task: labelled images in, cross entropy over the global batch."""

import math
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from contrastive.data.order import SampleOrder
from contrastive.data.preprocess import Preprocess
from contrastive.data.record import Source
from contrastive.data.samples import LabelledDataset
from contrastive.data.settings import LabelledDataConfig
from contrastive.distributed.runtime import Runtime
from contrastive.errors import UserError
from contrastive.interop.bundle import save_model
from contrastive.models import ImageClassifier
from contrastive.option_types import NotNegative, Probability
from contrastive.train.native import parts_of_batch
from contrastive.train.options import RunConfig, check_run
from contrastive.train.task import Curriculum, Inputs, Losses, TrainingTask, Weights, describe_image_tower, seed_step


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
        self.config, self.model, self.source, self.held_out = config, model, source, held_out
        num_classes = model.config.num_classes
        self.curriculum = Curriculum(config.curriculum, config.train.steps, model.image_tower)
        image = model.config.image
        self.preprocess = Preprocess(config.data.preprocess.at(image.image_size, image.patch_size))
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
            is_last = number == len(parts) - 1
            with nullcontext() if is_last else runtime.without_gradient_sync(wrapped):
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
            describe_image_tower(self.model.image_tower, model.image, "frozen"),
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
