"""The image tower: a Vision Transformer (Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words")."""

import torch
from torch import nn

from contrastive.errors import UserError
from contrastive.models.image_tower_config import ImageTowerConfig
from contrastive.models.image_trunk import ImageTrunk
from contrastive.models.pooling import AttentionPooling


class ImageTower(ImageTrunk):
    """ViT: pixels (B, 3, H, W) to one vector per image (B, E). E is embed_dim, D the width."""

    def __init__(self, config: ImageTowerConfig, embed_dim: int):
        config.check()
        if not config.projection and config.width != embed_dim:
            raise UserError(
                f"model.image.width {config.width} differs from model.embed_dim {embed_dim}: "
                "make them equal or set model.image.projection true"
            )
        super().__init__(config)
        width = config.width
        self.norm = nn.LayerNorm(width, eps=config.norm_eps)
        if config.pool == "attention":
            self.head = AttentionPooling(width, config.num_heads, config.mlp_dim, config.activation, config.norm_eps)
        self.projection = nn.Linear(width, embed_dim, bias=False) if config.projection else None

    @property
    def config(self) -> ImageTowerConfig:
        """The options; image_size is the one set last where that was square."""
        return self.architecture

    def forward_features(self, pixels: torch.Tensor) -> torch.Tensor:
        """Tokens after the last block and the final LayerNorm: (B, 3, H, W) to (B, N, D)."""
        return self.norm(self.transformer(self.embed(pixels)))

    def forward(self, pixels: torch.Tensor, project: bool = True) -> torch.Tensor:
        """(B, 3, H, W) normalised pixels to (B, E), not L2-normalised; to (B, D) with project=False."""
        x = self.pool_tokens(self.forward_features(pixels), self.architecture.pool)
        return self.projection(x) if project and self.projection is not None else x
