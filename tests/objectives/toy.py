"""An objective from outside the package that uses every hook there is."""

from dataclasses import dataclass

import torch
from torch import nn

from contrastive.data.augment import AugmentConfig
from contrastive.data.extras import Crops
from contrastive.distributed.collectives import all_reduce_sum, world_size
from contrastive.losses import SigmoidLoss
from contrastive.models.encoders import unit_length
from contrastive.objectives import OBJECTIVES, Objective, ObjectiveConfig, Setting


class WeighedCrop(Crops):
    """A second view, and a weight of the sample."""

    def of(self, sample):
        return {"weight": sample.rng.random(), "key": sample.record.key, **super().of(sample)}


class Toy(Objective):
    """Second views match their images; patches tell the mean colour of all images but their own."""

    def __init__(self, options, setting: Setting):
        super().__init__(options, setting)
        width, embed_dim = setting.model.image.width, setting.model.embed_dim
        self.head = nn.Linear(embed_dim, embed_dim)
        self.colour = nn.Linear(width, 3)
        self.normalize = setting.preprocess.normalize
        self.register_buffer("updates", torch.zeros(()))
        self.extra = WeighedCrop("toy", self.first_step, 1, AugmentConfig(crop_scale=(0.3, 0.6)))

    def inputs(self, batch, extras):
        return {"weight": extras["weight"].float(), "views": extras["views"]}

    def begin(self, model):
        self.updates.fill_(100)

    def targets(self, part, inputs):
        return {"colour": part.pixels.mean(dim=(2, 3))}

    def whole_targets(self, targets):
        colour = targets["colour"]
        total, count = all_reduce_sum(colour.sum(0)), len(colour) * world_size()
        return {"colour": (total - colour) / (count - 1)}

    def features(self, part, inputs):
        image = part.model.encode_image(self.normalize(inputs["views"][:, 0]).to(part.pixels.dtype))
        return {"second": unit_length(self.head(image))}

    def loss(self, part, inputs, targets):
        told = self.colour(part.patches).mean(dim=1)
        return (inputs["weight"][:, None] * (told - targets["colour"]) ** 2).mean()

    def loss_of_batch(self, features, more, targets):
        return SigmoidLoss()(features.image, more["second"], features.logit_scale, features.logit_bias)

    def after_update(self, model, skipped):
        self.updates += ~skipped

    def describe(self):
        return "a toy, "


@OBJECTIVES.register("toy")
@dataclass(frozen=True)
class ToyConfig(ObjectiveConfig):
    """A toy."""

    weight: float = 0.5

    def build(self, setting):
        return Toy(self, setting)
