"""One tower alone, as vision-only and text-only checkpoints hold it."""

from dataclasses import dataclass, field

import torch
from torch import nn

from contrastive.models.dual_encoder import unit_length
from contrastive.models.image_tower import ImageTower, ImageTowerConfig
from contrastive.models.init import initialise_tower
from contrastive.models.text_tower import TextTower, TextTowerConfig


@dataclass(frozen=True)
class ImageModelConfig:
    """Options of an image tower alone."""

    embed_dim: int = 768
    """Channels of the embedding; the tower's width where it has no projection."""
    image: ImageTowerConfig = field(default_factory=ImageTowerConfig)


@dataclass(frozen=True)
class TextModelConfig:
    """Options of a text tower alone."""

    embed_dim: int = 768
    """Channels of the embedding; the tower's width where it has no projection."""
    text: TextTowerConfig = field(default_factory=TextTowerConfig)


class ImageModel(nn.Module):
    """An image tower: pixels (B, 3, H, W) to (B, E)."""

    def __init__(self, config: ImageModelConfig):
        super().__init__()
        self.config = config
        self.image_tower = ImageTower(config.image, config.embed_dim)
        initialise_tower(self.image_tower, "siglip")

    def encode_image(self, pixels: torch.Tensor, normalize: bool = True, project: bool = True) -> torch.Tensor:
        """As `DualEncoder.encode_image`."""
        features = self.image_tower(pixels, project)
        return unit_length(features) if normalize else features

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """As `encode_image`, unit length."""
        return self.encode_image(pixels)


class TextModel(nn.Module):
    """A text tower: ids (B, N) to (B, E)."""

    def __init__(self, config: TextModelConfig):
        super().__init__()
        self.config = config
        self.text_tower = TextTower(config.text, config.embed_dim)
        initialise_tower(self.text_tower, "siglip")

    def encode_text(self, tokens: torch.Tensor, normalize: bool = True) -> torch.Tensor:
        """As `DualEncoder.encode_text`."""
        features = self.text_tower(tokens)
        return unit_length(features) if normalize else features

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """As `encode_text`, unit length."""
        return self.encode_text(tokens)
