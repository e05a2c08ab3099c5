"""Masked patches are to tell what the teacher sees there (Zhou et al. 2022, "iBOT"; Maninis et al. 2024, "TIPS")."""

import math
from dataclasses import dataclass

import torch
from torch import nn

from contrastive.data.extras import DrawnPlaces
from contrastive.models.image_tower import Hidden
from contrastive.objectives.objective import MicroBatch, Setting, Tensors
from contrastive.objectives.self_taught import PrototypeConfig, PrototypeObjective, at_places
from contrastive.option_types import Probability


@dataclass(frozen=True)
class MaskedConfig(PrototypeConfig):
    """Patches that the model does not see learn to be told as the teacher tells them, who sees the whole image."""

    NOT_NATIVE = "hides as many patches of each image"

    weight: float = 0.25
    """What its loss is multiplied by; that of the contrastive loss is 1."""
    share: Probability[float] = 0.5
    """Share of the patches that are hidden, drawn for each image; one at least."""
    center_images: bool = False
    """Take each image's mean off the teacher's logits: a patch is told by what sets it apart in its image. Else, where
    few samples are seen, all patches of an image go to the same prototypes, which tell images apart and not places."""

    def build(self, setting: Setting) -> "MaskedPrediction":
        return MaskedPrediction(self, setting)


class MaskedPrediction(PrototypeObjective):
    """See `MaskedConfig`. Each hidden patch's token, through the head, to the teacher's of the same place."""

    reads = "patches"

    def __init__(self, options: MaskedConfig, setting: Setting):
        super().__init__(options, setting)
        self.mask_token = nn.Parameter(torch.zeros(setting.model.image.width))
        self.extra = DrawnPlaces(self.name, self.first_step, options.share, setting.model.image.patch_size)

    def targets(self, part: MicroBatch, inputs: Tensors) -> dict[str, torch.Tensor]:
        patches, places = self.patches_of(self.teacher.tokens(part)), inputs["places"]
        if not self.options.center_images:
            return {"prototypes": self.teacher_head(at_places(patches, places))}
        logits = self.teacher_head(patches)
        return {"prototypes": at_places(logits - logits.mean(dim=1, keepdim=True), places)}

    def loss(self, part: MicroBatch, inputs: Tensors, targets: Tensors) -> torch.Tensor:
        tower, places = part.model.image_tower, inputs["places"]
        num_patches = math.prod(side // tower.config.patch_size for side in part.pixels.shape[-2:])
        hidden = torch.zeros(len(places), num_patches, dtype=torch.bool, device=places.device).scatter(1, places, True)
        tokens = tower.forward_features(part.pixels, Hidden(hidden, self.mask_token))
        return self.cross_entropy(self.head(at_places(self.patches_of(tokens), places)), targets["prototypes"])

    def describe(self) -> str:
        return f"{self.options.share:.0%} of the patches to {self.options.prototypes:,} prototypes, "
