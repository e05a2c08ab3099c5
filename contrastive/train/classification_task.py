"""Supervised classification as a task: labelled images in, cross entropy over the global batch."""

import math
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from contrastive.data.order import SampleOrder
from contrastive.data.preprocess import Preprocess
from contrastive.data.record import Source
from contrastive.data.samples import LabelledDataset
from contrastive.distributed.runtime import Runtime
from contrastive.evaluate.classification import classification
from contrastive.interop.bundle import save_classifier
from contrastive.models import ImageClassifier
from contrastive.train.classifier_settings import SupervisedConfig
from contrastive.train.mixing import Mixing
from contrastive.train.step import seed_step
from contrastive.train.task import Task, millions


class ClassificationTask(Task):
    """An image classifier that learns from the labels of `source`.

    Args:
        config: resolved. model: with its first weights.
        held_out: evaluated; their classes are the same as the source's.
    """

    advice = "check the labels, try a lower optimizer.lr, a longer schedule.warmup_steps or less augmentation"

    def __init__(self, config: SupervisedConfig, model: ImageClassifier, source: Source, held_out: list[Source]):
        self.config, self.model, self.source, self.held_out = config, model, source, held_out
        num_classes = model.config.num_classes
        self.preprocess = Preprocess(config.data.preprocess(model.config.image.image_size))
        self.mixing = Mixing(config.mixup, config.cutmix, num_classes)
        self.chance_loss = math.log(num_classes)
        self._accuracy = math.nan

    def dataset(self, order: SampleOrder) -> LabelledDataset:
        model, augment, seed = self.model.config, self.config.data.augment, self.config.train.seed
        return LabelledDataset(self.source, order, model.image.image_size, augment, seed, model.num_classes)

    def forward_backward(self, wrapped: nn.Module, batch: dict, step: int, runtime: Runtime) -> torch.Tensor:
        device, train = runtime.device, self.config.train
        pixels = self.preprocess.normalize(batch["image"].to(device, non_blocking=True))
        labels = batch["label"].to(device, non_blocking=True)
        total, hits = torch.zeros((), device=device), torch.zeros((), device=device)
        parts = list(zip(pixels.chunk(train.accumulate), labels.chunk(train.accumulate), strict=True))
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
        self._accuracy = 100 * hits.item()
        return total

    def figures(self) -> dict[str, float | None]:
        """'accuracy': percent of this rank's share of the batch, as it was varied."""
        return {"accuracy": self._accuracy}

    def evaluate(self, runtime: Runtime) -> dict[str, float]:
        figures = {}
        options = self.config.evaluation
        for source in self.held_out:
            result = classification(
                self, source, device=runtime.device, batch_size=options.batch_size, limit=options.limit
            )
            figures |= {
                f"classification/{source.name}/{name}": result[name]
                for name in ("acc1", "acc5", "mean_per_class_recall")
                if name in result
            }
        return figures

    def save(
        self, folder: Path, weights: Mapping[str, torch.Tensor], ema: Mapping[str, torch.Tensor] | None = None
    ) -> None:
        names = self.source.class_names
        save_classifier(folder, weights, self.model.config, self.preprocess.config, names, ema)

    def describe(self) -> list[tuple[str, str]]:
        image = self.model.config.image
        frozen = "" if any(p.requires_grad for p in self.model.image_tower.parameters()) else ", frozen"
        return [
            (
                "image tower",
                f"{millions(self.model.image_tower)}: {image.image_size} px, patch {image.patch_size}, "
                f"width {image.width}, depth {image.depth}{frozen}",
            ),
            ("head", f"{self.model.config.num_classes} classes on {self.model.config.embed_dim} channels"),
        ]
