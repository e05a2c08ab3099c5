"""Small towers of each kind, with random weights that do something."""

from dataclasses import replace

import pytest
import torch

from contrastive.models.image_tower import ImageTower, ImageTowerConfig
from contrastive.models.init import initialise_tower

SMALL = ImageTowerConfig(image_size=24, patch_size=8, width=32, depth=3, num_heads=4, mlp_dim=48)
KINDS = {
    "class": replace(SMALL, pool="class", class_token=True, projection=True, pre_norm=True, patch_bias=False),
    "average": replace(SMALL, pool="average"),
    "average, class token": replace(SMALL, pool="average", class_token=True, projection=True),
    "attention": SMALL,
    "attention, projection": replace(SMALL, projection=True),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def small_tower(kind, seed=0, **options):
    config = replace(KINDS[kind], **options)
    torch.manual_seed(seed)
    tower = ImageTower(config, embed_dim=16 if config.projection else config.width)
    initialise_tower(tower, "siglip")
    with torch.no_grad():  # biases start at zero, and a picture that forgets them would not be noticed
        for weight in tower.parameters():
            if weight.ndim == 1:
                weight.add_(0.3 * torch.randn_like(weight))
    return tower.eval()


def noise(*size, seed=1):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))
