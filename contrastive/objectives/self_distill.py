"""Local crops are to tell what the whole image does (Naeem et al. 2024, "SILC"; SigLIP 2, section 2.3)."""

import math
from dataclasses import dataclass

import torch

from contrastive.data.augment import AugmentConfig
from contrastive.data.extras import Crops
from contrastive.errors import UserError
from contrastive.objectives.objective import MicroBatch, Setting, Tensors
from contrastive.objectives.self_taught import PrototypeConfig, PrototypeObjective
from contrastive.option_types import Positive

LOCAL_SHARE = 3 / 7
"""Side of a local crop as a share of the image's: 96 of 224 pixels."""


@dataclass(frozen=True)
class SelfDistillConfig(PrototypeConfig):
    """Crops of an image learn to be told as the whole image is, by a teacher that is the model's own average."""

    NOT_NATIVE = "cuts square crops"

    crops: Positive[int] = 8
    """Local crops of each image."""
    crop_size: Positive[int | None] = None
    """Their height and width in pixels, a multiple of the patch size; none: the one nearest 3/7 of the image's."""
    augment: AugmentConfig = AugmentConfig(
        crop_scale=(0.05, 0.4), flip=True, color_jitter=(0.4, 0.4, 0.2, 0.1), color_jitter_prob=0.8, gray_prob=0.2
    )
    """How they are varied; the whole image is as the contrastive loss has it."""

    def build(self, setting: Setting) -> "SelfDistill":
        return SelfDistill(self, setting)


class SelfDistill(PrototypeObjective):
    """See `SelfDistillConfig`. The pooled feature of each crop, through the head, to the teacher's of the image."""

    def __init__(self, options: SelfDistillConfig, setting: Setting):
        super().__init__(options, setting)
        patch, sizes = setting.model.image.patch_size, {}
        for size in setting.image_sizes:
            sizes[size] = crop = options.crop_size or _nearest(LOCAL_SHARE * size, patch)
            if crop >= size or crop % patch:
                raise UserError(
                    f"objectives.{self.name}.crop_size {crop}: it has to be below the images' {size} pixels, which a "
                    f"curriculum may make smaller, and a multiple of the patch size {patch}"
                )
        self.normalize = setting.preprocess.normalize
        self.extra = Crops(self.name, self.first_step, options.crops, options.augment, sizes)

    def targets(self, part: MicroBatch, inputs: Tensors) -> dict[str, torch.Tensor]:
        tower = self.teacher.tower
        pooled = tower.pooled(self.teacher.tokens(part), project=False)
        return {"prototypes": self.teacher_head(pooled)}

    def loss(self, part: MicroBatch, inputs: Tensors, targets: Tensors) -> torch.Tensor:
        crops = self.normalize(inputs["views"].flatten(0, 1)).to(part.pixels.dtype)
        told = self.head(part.model.image_tower(crops, project=False)).unflatten(0, (-1, self.options.crops))
        return self.cross_entropy(told, targets["prototypes"][:, None])

    def describe(self) -> str:
        return f"{self.options.crops} crops to {self.options.prototypes:,} prototypes, "


def _nearest(size: float, patch: int) -> int:
    return patch * max(1, math.floor(size / patch + 0.5))
