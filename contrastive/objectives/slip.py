"""Two further views of an image are told from those of all other images (Mu et al. 2022, "SLIP"; SimCLR)."""

from dataclasses import dataclass
from typing import Literal

import torch

from contrastive.data.augment import AugmentConfig
from contrastive.data.extras import Crops, WhichImage
from contrastive.losses.sigmoid import SigmoidLoss, SigmoidLossConfig
from contrastive.losses.softmax import SoftmaxLoss
from contrastive.models import Features
from contrastive.models.encoders import unit_length
from contrastive.objectives.objective import MicroBatch, Objective, ObjectiveConfig, Setting, Tensors
from contrastive.objectives.self_taught import three_layers
from contrastive.option_types import Positive


@dataclass(frozen=True)
class SlipConfig(ObjectiveConfig):
    """Two further views of each image match each other, among the views of all images of the batch (SLIP)."""

    NOT_NATIVE = "cuts square views"

    loss: Literal["softmax", "sigmoid"] = "softmax"
    """softmax, as published, or sigmoid, with the bias that goes with the batch."""
    temperature: Positive[float] = 0.1
    """What cosines are divided by."""
    hidden: Positive[int] = 4096
    """Channels of the two hidden layers of the head."""
    out: Positive[int] = 256
    """Channels in which views are compared."""
    augment: AugmentConfig = AugmentConfig(
        crop_scale=(0.08, 1.0), flip=True, color_jitter=(0.4, 0.4, 0.4, 0.1), color_jitter_prob=0.8, gray_prob=0.2
    )
    """How the two are varied; the image that captions are compared with is as it is without them."""

    def build(self, setting: Setting) -> "Slip":
        return Slip(self, setting)


class TwoViews(WhichImage, Crops):
    """'views', uint8 (2, 3, S, S), and 'image', int, which image they are of."""


class Slip(Objective):
    """See `SlipConfig`. Of B images each of 2B views is compared with one that matches and 2B - 2 that do not."""

    options: SlipConfig

    def __init__(self, options: SlipConfig, setting: Setting):
        super().__init__(options, setting)
        setting.check_learns_images()
        self.head = three_layers(setting.model.image.width, options.hidden, options.out)
        self.normalize = setting.preprocess.normalize
        self.extra = TwoViews(self.name, self.first_step, 2, options.augment)
        # Views of one image that are no pair, each with itself above all, are left out.
        self.compare = SoftmaxLoss("ignore") if options.loss == "softmax" else SigmoidLoss("ignore")
        compared = 2 * setting.global_batch_size - 1
        self.bias = None if options.loss == "softmax" else SigmoidLossConfig().initial_logits(compared)[1]

    def targets(self, part: MicroBatch, inputs: Tensors) -> dict[str, torch.Tensor]:
        return {"image": inputs["image"]}

    def features(self, part: MicroBatch, inputs: Tensors) -> dict[str, torch.Tensor]:
        views = self.normalize(inputs["views"].transpose(0, 1).flatten(0, 1)).to(part.pixels.dtype)
        told = unit_length(self.head(part.model.image_tower(views, project=False)))
        return dict(zip(("first", "second"), told.chunk(2), strict=True))

    def loss_of_batch(self, features: Features, more: Tensors, targets: Tensors) -> torch.Tensor:
        first, second = more["first"], more["second"]
        pairs = torch.cat([first, second]), torch.cat([second, first])
        return self.compare(*pairs, 1 / self.options.temperature, self.bias, caption_ids=targets["image"].repeat(2))

    def describe(self) -> str:
        return f"two views, {self.options.loss} at temperature {self.options.temperature:g}, "
