"""Distillation: a model learns how its teachers compare images with texts, and where they put each.

Teachers are models that embed each view of a run with preprocessing of their own, or embeddings that were stored.
b samples with K captions each; S, L: a teacher's image size and context length, F its embed_dim.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cosine_similarity

from contrastive.data.extras import DrawnSample, Extra
from contrastive.data.stored_views import StoredViews, find_views
from contrastive.data.tokenizer import Tokenizer
from contrastive.errors import UserError
from contrastive.interop.bundle import weights_key
from contrastive.interop.loading import load
from contrastive.losses.affinity import AffinityLoss, TeacherFeatures
from contrastive.losses.all_pairs import uncompiled
from contrastive.models import Features
from contrastive.objectives.objective import MicroBatch, Objective, ObjectiveConfig, Setting, Tensors
from contrastive.option_types import NotNegative, Positive

SIDES = ("image", "text")


@dataclass(frozen=True)
class DistillConfig(ObjectiveConfig):
    """Learn from teachers: how they compare the images with the texts of a batch (MobileCLIP, TinyCLIP)."""

    NEEDS_DATA = "live teachers take their own memory and time, stored ones none"

    NOT_NATIVE = "shows teachers square views"

    teacher: tuple[str, ...] = ()
    """Teachers: models, or folders that contrastive embed --views wrote; several are an ensemble."""
    scale: tuple[Positive[float], ...] = ()
    """Factor on the similarities of each teacher; none: its own logit scale. Smaller: softer targets."""
    feature_weight: NotNegative[float] = 0.0
    """Weight, within this objective, of 1 - cosine between the model's embeddings and each teacher's."""
    project: bool = False
    """Map the model's embeddings to each teacher's by a linear layer for that, as has to be where widths differ."""

    def build(self, setting: Setting) -> "Distill":
        return Distill(self, setting)


class Distill(Objective):
    """The affinity loss over the global batch, and the distance between embeddings where it has a weight.

    The teachers are no modules of it: neither trained nor saved. Checkpoints hold their keys, and go on with no others.
    """

    reads = "texts"

    def __init__(self, options: DistillConfig, setting: Setting):
        super().__init__(options, setting)
        section = f"objectives.{setting.name}"
        if not options.teacher:
            raise UserError(f"{section} has no teacher: give --{section}.teacher MODEL, or a folder of stored views")
        if options.scale and len(options.scale) != len(options.teacher):
            raise UserError(f"{section}.scale has {len(options.scale)} numbers for {len(options.teacher)} teachers")
        if options.project and not options.feature_weight:
            raise UserError(f"{section}.project is for {section}.feature_weight, which is 0: give it, or leave it out")
        self.teachers = [open_teacher(path, setting) for path in options.teacher]
        self.scales = options.scale or [one.logit_scale for one in self.teachers]
        self.extra = TeacherInputs(setting.name, self.first_step, self.teachers)
        self.heads = nn.ModuleList()
        width = setting.model.embed_dim
        for one in self.teachers:
            if options.project:
                self.heads.append(nn.ModuleDict({side: nn.Linear(width, one.embed_dim) for side in SIDES}))
            elif options.feature_weight and one.embed_dim != width:
                raise UserError(
                    f"teacher {one.path} has {one.embed_dim} channels, the model {width}: {section}.feature_weight "
                    f"needs a linear layer between them, --{section}.project, or --model.embed_dim {one.embed_dim}"
                )

    def get_extra_state(self) -> torch.Tensor:
        """Digests of the teachers' keys, uint8 (teachers, 32): what checkpoints hold of them."""
        digests = [list(hashlib.sha256(one.key.encode()).digest()) for one in self.teachers]
        return torch.tensor(digests, dtype=torch.uint8)

    def set_extra_state(self, state: torch.Tensor) -> None:
        if not torch.equal(state.cpu(), self.get_extra_state()):
            raise UserError(
                f"the teachers of objectives.{self.name} are not those that the checkpoint was trained with: give the "
                f"same, wherever they are now, with --objectives.{self.name}.teacher"
            )

    def targets(self, run: MicroBatch, inputs: Tensors) -> dict[str, torch.Tensor]:
        """Embeddings of teacher k: 'k.image' (b', F), 'k.text' (b', K, F)."""
        found = {}
        for k, one in enumerate(self.teachers):
            own = {name.removeprefix(f"{k}."): value for name, value in inputs.items() if name.startswith(f"{k}.")}
            found[f"{k}.image"], found[f"{k}.text"] = one.embeddings(own)
        return found

    def loss(self, run: MicroBatch, inputs: Tensors, targets: Tensors) -> torch.Tensor | None:
        """The mean of 1 - cosine over teachers, images and texts: half the squared distance of unit vectors."""
        if not self.options.feature_weight:
            return None
        distances = []
        for k in range(len(self.teachers)):
            for side in SIDES:
                own, theirs = getattr(run.features, side), targets[f"{k}.{side}"]
                mapped = self.heads[k][side](own) if self.heads else own
                distances.append(1 - cosine_similarity(mapped, theirs.reshape(len(own), -1), dim=1).mean())
        return self.options.feature_weight * torch.stack(distances).mean()

    def loss_of_batch(self, features: Features, more: Tensors, targets: Tensors) -> torch.Tensor:
        """The affinity loss; of K captions of an image the mean."""
        texts = features.text if features.text.ndim == 3 else features.text[:, None]
        losses = []
        for caption, text in enumerate(texts.unbind(1)):
            taught = [
                TeacherFeatures(targets[f"{k}.image"], targets[f"{k}.text"][:, caption], scale)
                for k, scale in enumerate(self.scales)
            ]
            losses.append(AffinityLoss()(features.image, text, features.logit_scale, taught))
        return sum(losses) / len(losses)

    def describe(self) -> str:
        each = zip(self.teachers, self.scales, strict=True)
        told = [f"{one.path} ({one.embed_dim} channels, scale {scale:.3g})" for one, scale in each]
        return f"taught by {', '.join(told)}, "


class Teacher(ABC):
    """What gives embeddings to learn from; frozen, and no part of the model that learns."""

    path: str
    embed_dim: int
    logit_scale: float
    """Its own factor on similarities."""
    key: str
    """Of its weights, and of the views where they are stored."""

    @abstractmethod
    def embeddings(self, inputs: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
        """Return those of images (b, F) and texts (b, K, F), unit length, from what `TeacherInputs` made for it."""


class LiveTeacher(Teacher):
    """A model that is asked at every step.

    Its pixels are the view that the model sees, cut and resized anew for its own size, with its own mean and std; its
    tokens are its own tokenizer's, of the same caption.

    Args:
        path: as `contrastive.load` takes it.

    Raises:
        UserError: no model there, or one without image tower, text tower, tokenizer or preprocessing.
    """

    def __init__(self, path: str):
        bundle = load(path)
        bundle.check_text_tower("a teacher compares images with texts")
        bundle.check_image_tower("a teacher compares images with texts")
        bundle.tokenizer(["a"])  # where its files are missing, this says so
        height, width = bundle.preprocess.config.size
        if height != width:
            raise UserError(f"teacher {path} takes images of {height}×{width}; views are square")
        self.path, self.image_size = path, height
        self.model = bundle.model.requires_grad_(False)
        self.preprocess, self.tokenizer = bundle.preprocess, bundle.tokenizer
        self.embed_dim, self.logit_scale = bundle.model.config.embed_dim, self.model.logit_scale.exp().item()
        self.key = weights_key(self.model)

    def embeddings(self, inputs: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
        # Of another architecture: to compile it with the model would take longer than it saves.
        return uncompiled(self._embed)(inputs["image"], inputs["tokens"])

    def _embed(self, images: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """images: uint8 (b, 3, S, S). tokens: int64 (b, K, L)."""
        self.model.to(images.device)
        pixels = self.preprocess.normalize(images).to(self.model.logit_scale.dtype)
        texts = self.model.encode_text(tokens.flatten(0, 1))
        return self.model.encode_image(pixels), texts.unflatten(0, tokens.shape[:2])


class StoredTeacher(Teacher):
    """Embeddings that contrastive embed --views wrote: the samples bring them along."""

    def __init__(self, stored: StoredViews):
        self.stored, self.path = stored, str(stored.folder)
        self.embed_dim, self.logit_scale, self.key = stored.embed_dim, stored.logit_scale, stored.key

    def embeddings(self, inputs: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
        return inputs["image"], inputs["text"]


def open_teacher(path: str, setting: Setting) -> Teacher:
    """Return the teacher at `path`: stored views, or a model.

    Raises:
        UserError: as from `LiveTeacher`; stored views that the run cannot draw again, or of captions that it changes.
    """
    stored = find_views(Path(path).expanduser())
    if stored is None:
        return LiveTeacher(path)
    stored.check(setting.source, setting.augment)
    if setting.caption_templates != ("{}",):
        raise UserError(
            f"{path} holds embeddings of captions as they are: leave data.caption_templates out, or give the teacher "
            f"itself ({stored.path})"
        )
    return StoredTeacher(stored)


class TeacherInputs(Extra):
    """What teachers need of a sample: under 'k.' of teacher k image and tokens, or image and text embeddings.

    With stored teachers, one of the views that all of them have is drawn for the sample.
    """

    def __init__(self, name: str, first_step: int, teachers: Sequence[Teacher]):
        super().__init__(name, first_step)
        # Workers get what a live teacher reads, not the model.
        self.read = [
            one.stored if isinstance(one, StoredTeacher) else (one.image_size, one.tokenizer) for one in teachers
        ]
        self.views = [one.stored.views for one in teachers if isinstance(one, StoredTeacher)]
        self._number = 0  # of the view that `draws` drew, for `of`, which is asked next of the same sample

    def draws(self, index: int, rng: np.random.Generator) -> np.random.Generator | None:
        if not self.views:
            return None
        self._number = int(rng.random() * min(views.count for views in self.views))
        return self.views[0].draws(index, self._number)

    def of(self, sample: DrawnSample) -> dict[str, Any]:
        made = {}
        for k, one in enumerate(self.read):
            own = self._stored(one, sample) if isinstance(one, StoredViews) else _live(*one, sample)
            made |= {f"{k}.{name}": value for name, value in own.items()}
        return made

    def _stored(self, stored: StoredViews, sample: DrawnSample) -> dict[str, torch.Tensor]:
        numbers = [sample.record.captions.index(caption) for caption in sample.captions]
        return {"image": stored.image(sample.index, self._number), "text": stored.texts(sample.index, numbers)}


def _live(image_size: int, tokenizer: Tokenizer, sample: DrawnSample) -> dict[str, torch.Tensor]:
    return {"image": sample.view(image_size), "tokens": tokenizer(list(sample.captions))}
