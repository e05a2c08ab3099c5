"""The mean of an image's patches is to be told from other images' as the teacher tells the whole (self-distillation).

A class token leaves the last block's patches unused, and attention pooling asks what serves all of them together; in
a mean each has to say what it shows. The loss is CLIP's softmax, both ways, against a teacher that is the model's
average, as in MoCo (He et al. 2020).
"""

from dataclasses import dataclass

import torch
from torch import nn

from contrastive.data.extras import WhichImage
from contrastive.errors import UserError
from contrastive.losses import NoLossConfig
from contrastive.losses.softmax import SoftmaxLoss
from contrastive.models import Features
from contrastive.models.encoders import unit_length
from contrastive.objectives.objective import MicroBatch, Setting, Tensors
from contrastive.objectives.self_taught import SelfTaught, SelfTaughtConfig
from contrastive.option_types import Positive


@dataclass(frozen=True)
class PatchMeanConfig(SelfTaughtConfig):
    """The mean of the patches learns to match what the model's own average says of the image, among the batch's."""

    temperature: Positive[float] = 0.1
    """What cosines are divided by."""

    def build(self, setting: Setting) -> "PatchMean":
        return PatchMean(self, setting)


class PatchMean(SelfTaught):
    """See `PatchMeanConfig`. The mean's linear map and the teacher's embeddings, (B, E) each, B pairs among B x B."""

    options: PatchMeanConfig

    def __init__(self, options: PatchMeanConfig, setting: Setting):
        super().__init__(options, setting)
        if setting.model.image.pool == "average":
            raise UserError(
                f"--objectives {self.name} is for model.image.pool class or attention; average is the patches' mean"
            )
        if isinstance(setting.loss, NoLossConfig):
            raise UserError(f"--objectives {self.name} aims at what the contrastive loss teaches; --loss none is none")
        self.head = nn.Linear(setting.model.image.width, setting.model.embed_dim)
        self.extra = WhichImage(self.name, self.first_step)
        self.compare = SoftmaxLoss("ignore")  # an image that is there twice is no wrong answer

    def targets(self, part: MicroBatch, inputs: Tensors) -> dict[str, torch.Tensor]:
        whole = self.teacher.tower.pooled(self.teacher.tokens(part), images=part.pixels)
        return {"whole": unit_length(whole), "image": inputs["image"]}

    def features(self, part: MicroBatch, inputs: Tensors) -> dict[str, torch.Tensor]:
        mean = part.model.image_tower.pool_tokens(part.patches, "average", part.pixels)
        return {"mean": unit_length(self.head(mean))}

    def loss_of_batch(self, features: Features, more: Tensors, targets: Tensors) -> torch.Tensor:
        pairs = more["mean"], targets["whole"]
        return self.compare(*pairs, 1 / self.options.temperature, None, caption_ids=targets["image"])

    def describe(self) -> str:
        return f"mean of the patches to the image's embedding, temperature {self.options.temperature:g}, "
