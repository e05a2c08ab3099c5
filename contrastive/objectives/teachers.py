"""Teachers: models that embed each view of a run with preprocessing of their own, or embeddings that were stored.

b samples with K captions each; S, L: a teacher's image size and context length, F its embed_dim.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from contrastive.data.extras import DrawnSample, Extra
from contrastive.data.stored_views import StoredViews, find_views
from contrastive.data.tokenizer import Tokenizer
from contrastive.errors import UserError
from contrastive.interop.bundle import weights_key
from contrastive.interop.loading import load
from contrastive.losses.all_pairs import uncompiled
from contrastive.objectives.objective import Setting, Tensors


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
