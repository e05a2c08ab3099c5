"""The dual encoder: an image tower, a text tower, and the two scalars of the contrastive losses."""

import math
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from contrastive.models.image_tower import ImageTower, ImageTowerConfig
from contrastive.models.init import initialise
from contrastive.models.text_tower import TextTower, TextTowerConfig


@dataclass(frozen=True)
class ModelConfig:
    """Options of the dual encoder."""

    embed_dim: int = 768
    """Channels of the shared embedding space."""
    image: ImageTowerConfig = field(default_factory=ImageTowerConfig)
    text: TextTowerConfig = field(default_factory=TextTowerConfig)
    init: Literal["clip", "siglip"] = "siglip"
    """Initialisation of the weights: as OpenAI's CLIP or as big_vision's SigLIP."""
    init_logit_scale: float | None = None
    """Initial factor on the cosine similarities (10 for SigLIP, 14.3 for CLIP); none: as the loss prescribes."""
    init_logit_bias: float | None = None
    """Initial offset of the logits, for the sigmoid loss; none: as the loss prescribes."""


class Features(NamedTuple):
    """What the loss needs of a batch."""

    image: torch.Tensor
    """(B, E), L2-normalised."""
    text: torch.Tensor
    """(B, E), L2-normalised."""
    logit_scale: torch.Tensor
    """Scalar, already exponentiated."""
    logit_bias: torch.Tensor | None
    """Scalar, or None for losses without a bias."""


class DualEncoder(nn.Module):
    """Image and text towers with a shared embedding space (CLIP, Radford et al. 2021; SigLIP, Zhai et al. 2023).

    `logit_scale` holds the logarithm of the factor on the similarities. `logit_bias` is None unless
    `config.init_logit_bias` is a number.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.image_tower = ImageTower(config.image, config.embed_dim)
        self.text_tower = TextTower(config.text, config.embed_dim)
        scale = 1 / 0.07 if config.init_logit_scale is None else config.init_logit_scale
        self.logit_scale = nn.Parameter(torch.tensor(math.log(scale)))
        self.logit_bias = None
        if config.init_logit_bias is not None:
            self.logit_bias = nn.Parameter(torch.tensor(float(config.init_logit_bias)))
        initialise(self, config.init)

    def encode_image(self, pixels: torch.Tensor, normalize: bool = True, project: bool = True) -> torch.Tensor:
        """Embed images: (B, 3, H, W) float, preprocessed, to (B, E); unit length unless normalize=False.

        With project=False the features are those before the projection, (B, D); towers without one have the
        same either way.
        """
        features = self.image_tower(pixels, project)
        return unit_length(features) if normalize else features

    def encode_text(self, tokens: torch.Tensor, normalize: bool = True) -> torch.Tensor:
        """Embed texts: (B, context_length) int64 ids to (B, E); unit length unless normalize=False."""
        features = self.text_tower(tokens)
        return unit_length(features) if normalize else features

    def forward(self, pixels: torch.Tensor, tokens: torch.Tensor) -> Features:
        """Embed a batch of pairs; see `Features`."""
        return Features(self.encode_image(pixels), self.encode_text(tokens), self.logit_scale.exp(), self.logit_bias)


def unit_length(features: torch.Tensor) -> torch.Tensor:
    """L2-normalise rows in float32 at least: in bfloat16 their length would be off by up to 0.4 %."""
    return F.normalize(features if features.dtype == torch.float64 else features.float(), dim=-1)
