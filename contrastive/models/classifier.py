"""The plain ViT classifier: an image tower and a linear head (Dosovitskiy et al. 2021)."""

from dataclasses import dataclass, field, replace

import torch
from torch import nn

from contrastive.errors import UserError, did_you_mean
from contrastive.models.dual_encoder import unit_length
from contrastive.models.image_tower import ImageTower, ImageTowerConfig
from contrastive.models.init import initialise_tower
from contrastive.models.presets import SIZE_NAMES, SIZES


@dataclass(frozen=True)
class ClassifierConfig:
    """Options of the classifier. The defaults are ViT-Base/16's, but for the number of classes."""

    image: ImageTowerConfig = field(default_factory=ImageTowerConfig)
    embed_dim: int | None = None
    """Channels that the head reads; none: the tower's width. Of use with model.image.projection."""
    num_classes: int | None = None
    """Classes; none: as many as the data has."""
    unit_features: bool = False
    """L2-normalise what the head reads, as a head made of text embeddings expects."""


class ImageClassifier(nn.Module):
    """An image tower and a linear head: pixels (B, 3, H, W) to class scores (B, C).

    The head starts at zero, so that the first scores favour no class.
    """

    def __init__(self, config: ClassifierConfig):
        super().__init__()
        if not config.num_classes:
            raise UserError("model.num_classes is not set: give the number of classes")
        width = config.image.width if config.embed_dim is None else config.embed_dim
        self.config = replace(config, embed_dim=width)
        self.image_tower = ImageTower(config.image, width)
        self.head = nn.Linear(width, config.num_classes)
        initialise_tower(self.image_tower, "siglip")
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def encode_image(self, pixels: torch.Tensor, normalize: bool = True, project: bool = True) -> torch.Tensor:
        """The features below the head, as `DualEncoder.encode_image` gives them."""
        features = self.image_tower(pixels, project)
        return unit_length(features) if normalize else features

    def scores(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) float, preprocessed, to class scores (B, C)."""
        features = self.encode_image(pixels, normalize=self.config.unit_features)
        # Cosines times 100 would be off by up to 0.2 in bfloat16.
        with torch.autocast(features.device.type, enabled=False):
            return self.head(features.to(self.head.weight.dtype))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """As `scores`; what a run wraps for its precision and its processes."""
        return self.scores(pixels)


def list_classifiers() -> list[str]:
    """Return the names that `classifier_config` takes."""
    return list(SIZE_NAMES)


def classifier_config(name: str) -> ClassifierConfig:
    """Return the options of 'tiny', 'small', 'base', 'large' or 'huge'; UserError for another name.

    Class token, learned positions, exact GELU. Patches of 16 pixels, of 14 for huge, as in the paper's tables.
    """
    if name not in SIZE_NAMES:
        raise UserError(f"unknown model '{name}'.{did_you_mean(name, SIZE_NAMES)} Known: {', '.join(SIZE_NAMES)}")
    width, depth, num_heads, mlp_dim = SIZES[SIZE_NAMES[name]]
    shape = ImageTowerConfig(width=width, depth=depth, num_heads=num_heads, mlp_dim=mlp_dim)
    patch_size = 14 if name == "huge" else 16
    image = replace(shape, pool="class", class_token=True, activation="gelu", patch_size=patch_size)
    return ClassifierConfig(image=image)
