"""What an objective is: a loss beside the contrastive one, with the data, modules and targets that it needs.

An objective never sees ranks, micro-batches or the optimizer. It says its loss in one of two ways, or in both:

    loss             a mean over samples, each of which is judged by itself (captions, masked patches)
    loss_of_batch    of the features of the global batch, which is compared with itself (teachers, second views)

b is this rank's share of the global batch, b' that of one micro-batch, E embed_dim.
"""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from contrastive.data.augment import AugmentConfig
from contrastive.data.extras import Extra
from contrastive.data.preprocess import Preprocess
from contrastive.data.record import Source
from contrastive.data.tokenizer import Tokenizer
from contrastive.errors import UserError
from contrastive.losses import LossConfig
from contrastive.models import DualEncoder, Features, ImageModel, ModelConfig, PackedTokens
from contrastive.models.encoders import unit_length
from contrastive.option_types import NotNegative, Probability
from contrastive.patches import Patches

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class ObjectiveConfig:
    """The options that every objective has; each is registered in OBJECTIVES and adds its own."""

    NEEDS_DATA: ClassVar[str] = ""
    """What it takes, in words, where it can only be built beside the run's data; `plan` leaves it out then."""

    NOT_NATIVE: ClassVar[str] = ""
    """What it does, in words, that images of any shape (model.image.native) do not allow."""

    weight: NotNegative[float] = 1.0
    """What its loss is multiplied by; that of the contrastive loss is 1."""
    start: Probability[float] = 0.0
    """Share of the run's steps after which it begins."""
    keep: bool = False
    """Keep its modules in final/ too; checkpoints always have them."""

    def build(self, setting: "Setting") -> "Objective":
        """Return the objective for a run; UserError where it cannot be had."""
        raise NotImplementedError


@dataclass(frozen=True)
class Setting:
    """The run that an objective is built for."""

    name: str
    """Of the objective in the run."""
    model: ModelConfig
    source: Source
    tokenizer: Tokenizer
    preprocess: Preprocess
    steps: int
    image_sizes: tuple[int, ...]
    """Of the images in turn, as the curriculum has them."""
    global_batch_size: int = 256
    caption_templates: tuple[str, ...] = ("{}",)
    captions_per_image: int = 1
    augment: AugmentConfig = AugmentConfig()
    image_column: str | None = None
    loss: LossConfig | None = None
    """The contrastive one."""
    all_captions: bool = False
    """Whether it takes all captions of an image together."""
    locked: bool = False
    """Whether the image tower does not learn."""
    drops_patches: bool = False
    """Whether it is shown a share of the patches alone (patch_dropout), in some stage of the curriculum at least."""
    others: Mapping[str, "Objective"] = field(default_factory=dict)
    """Those of the run that were built before this one."""

    def check_learns_images(self) -> None:
        """Raise UserError where the image tower does not learn."""
        if self.locked:
            raise UserError(f"--objectives {self.name} trains the image tower, which --lock image keeps as it is")


class MicroBatch:
    """A micro-batch on its way through the model; each part is computed when it is first asked for.

    Args:
        pixels: (b', 3, H, W), normalised, or Patches. texts: ids (b'·K, L), or packed.
    """

    def __init__(self, model: DualEncoder, pixels: torch.Tensor | Patches, texts: torch.Tensor | PackedTokens):
        self.model, self.pixels, self.texts = model, pixels, texts
        self._made: dict[str, Any] = {}

    @functools.cached_property
    def own_tokens(self) -> torch.Tensor | None:
        """Which of `patches` are an image's own, bool (b', N), where images of any shape leave padding; None: all."""
        return self.model.image_tower.own_tokens(self.pixels)

    @functools.cached_property
    def patches(self) -> torch.Tensor:
        """Tokens of the image tower after its final norm, (b', N, D), class token first where there is one."""
        return self.model.image_tower.forward_features(self.pixels)

    def once(self, what: str, make: Callable[[], Any]) -> Any:
        """Return what `make` makes; of several objectives that ask for one thing, the first has it made."""
        if what not in self._made:
            self._made[what] = make()
        return self._made[what]

    @functools.cached_property
    def features(self) -> Features:
        """What the contrastive loss is of: the model's own forward pass, by way of `patches`."""
        model = self.model
        image = unit_length(model.image_tower.pooled(self.patches, images=self.pixels))
        if isinstance(model, ImageModel):
            return Features(image, None, None, None)
        return Features(image, model.encode_text(self.texts), model.logit_scale.exp(), model.logit_bias)


class Objective(nn.Module):
    """Something that a run learns. Its modules are trained with the model, and are no part of what the run gives.

    All of its parameters that learn have to take part in each of its losses. What it draws at random is drawn where
    samples are made, by its `extra`, so that it depends on neither ranks nor micro-batches.
    """

    reads: Literal["patches", "images", "texts"] = "images"
    """What its losses are of: patch tokens alone, before any pooling; images; or texts too."""

    def __init__(self, options: ObjectiveConfig, setting: Setting):
        super().__init__()
        self.options, self.name = options, setting.name
        self.first_step = math.ceil(options.start * setting.steps)
        if self.first_step >= setting.steps:
            raise UserError(
                f"objectives.{setting.name}.start {options.start:g} of {setting.steps:,} steps is after the last one"
            )

        self.extra: Extra | None = None  # what it needs of each sample beside image and text

    def inputs(self, batch: dict[str, Any], extras: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return what of a batch goes to the device, in host memory: rows of b samples.

        Args:
            batch: as `train_loader` yields it. extras: what `extra` made, by its keys.
        """
        return extras

    def begin(self, model: DualEncoder) -> None:
        """Called without gradients before its first step: to copy weights that the model has by then."""

    def targets(self, part: MicroBatch, inputs: Tensors) -> dict[str, torch.Tensor]:
        """Return what the losses aim at, (b', ...) each; called without gradients, before `loss`."""
        return {}

    def whole_targets(self, targets: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the targets of this rank's share, (b, ...) each, from those of its micro-batches in turn.

        Called without gradients, once a step, on all ranks: what is taken over the global batch is taken here.
        """
        return targets

    def features(self, part: MicroBatch, inputs: Tensors) -> dict[str, torch.Tensor]:
        """Return features (b', E) beside the model's own, which `loss_of_batch` is of."""
        return {}

    def loss(self, part: MicroBatch, inputs: Tensors, targets: Tensors) -> torch.Tensor | None:
        """Return the mean over the micro-batch of a loss of each sample; None where it has none."""
        return None

    def loss_of_batch(self, features: Features, more: Tensors, targets: Tensors) -> torch.Tensor | None:
        """Return the loss of the global batch, so that its mean over ranks is that of one process; None for none.

        No parameter of its own has a part in it: heads belong in `features`.

        Args:
            features: of this rank's share, (b, E) and texts (b, E), or (b, K, E). more: from `features`, (b, E).
        """
        return None

    def after_update(self, model: DualEncoder, skipped: torch.Tensor) -> None:
        """Called without gradients after each of its steps; where `skipped` (bool, 0-dim) nothing may change."""

    def describe(self) -> str:
        """Return what it is, for the screen that a run begins with."""
        return ""
