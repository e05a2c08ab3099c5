"""The image tower: a Vision Transformer (Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words")."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from contrastive.errors import UserError
from contrastive.models.attention import Activation
from contrastive.models.pooling import AttentionPooling
from contrastive.models.position import interpolate_position_embedding, sincos_position_embedding
from contrastive.models.transformer import Transformer


@dataclass(frozen=True)
class ImageTowerConfig:
    """Options of the ViT. The defaults are SigLIP's B/16 at 224 pixels."""

    image_size: int = 224
    """Height and width of the input in pixels."""
    patch_size: int = 16
    """Height and width of a patch in pixels; must divide image_size."""
    width: int = 768
    """Channels of every token."""
    depth: int = 12
    """Number of transformer blocks."""
    num_heads: int = 12
    """Attention heads; must divide width."""
    mlp_dim: int = 3072
    """Hidden channels of the MLP."""
    pool: Literal["class", "average", "attention"] = "attention"
    """How tokens become one vector: the class token, their mean, or SigLIP's attention head (MAP)."""
    position: Literal["learned", "sincos"] = "learned"
    """Learned position embeddings, or fixed two-dimensional sin-cos ones."""
    class_token: bool = False
    """Prepend a learned class token; pool=class needs it."""
    pre_norm: bool = False
    """LayerNorm before the first block, as in CLIP."""
    patch_bias: bool = True
    """Bias in the patch embedding; CLIP has none."""
    projection: bool = False
    """Linear projection (no bias) to embed_dim after pooling, as in CLIP; without it width must equal embed_dim."""
    activation: Activation = "gelu_tanh"
    """Activation of the MLP."""
    norm_eps: float = 1e-6
    """Epsilon of every LayerNorm."""
    dropout: float = 0.0
    """Dropout probability after attention and MLP, and on attention weights."""
    patch_dropout: float = 0.0
    """Share of patches dropped in training (FLIP); 0.5 halves the tower's work."""
    gradient_checkpointing: bool = False
    """Recompute blocks in the backward pass: less memory, about a third more time."""

    @property
    def grid_size(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        return self.grid_size**2

    def check(self) -> None:
        """Raise UserError when the options contradict each other."""
        if self.image_size % self.patch_size:
            below = max(self.image_size - self.image_size % self.patch_size, self.patch_size)
            raise UserError(
                f"model.image.image_size {self.image_size} is not a multiple of model.image.patch_size "
                f"{self.patch_size}; use {below} or {below + self.patch_size}, or another patch size"
            )
        if self.width % self.num_heads:
            raise UserError(
                f"model.image.width {self.width} is not a multiple of model.image.num_heads {self.num_heads}"
            )
        if self.pool == "class" and not self.class_token:
            raise UserError("model.image.pool 'class' needs model.image.class_token true")
        if self.position == "sincos" and self.width % 4:
            raise UserError(f"model.image.position 'sincos' needs a width divisible by 4, not {self.width}")


class ImageTower(nn.Module):
    """ViT: pixels (B, 3, H, W) to one vector per image (B, E). E is embed_dim, D the width."""

    def __init__(self, config: ImageTowerConfig, embed_dim: int):
        super().__init__()
        config.check()
        if not config.projection and config.width != embed_dim:
            raise UserError(
                f"model.image.width {config.width} differs from model.embed_dim {embed_dim}: "
                "make them equal or set model.image.projection true"
            )
        self.config = config
        width = config.width
        self.patch_embed = nn.Conv2d(3, width, config.patch_size, config.patch_size, bias=config.patch_bias)
        self.class_token = nn.Parameter(torch.zeros(width)) if config.class_token else None
        num_positions = config.num_patches + config.class_token
        if config.position == "learned":
            self.position_embedding = nn.Parameter(torch.zeros(num_positions, width))
        else:
            fixed = sincos_position_embedding(config.grid_size, config.grid_size, width)
            prefix = fixed.new_zeros(int(config.class_token), width)
            self.register_buffer("position_embedding", torch.cat([prefix, fixed]), persistent=False)
        self.pre_norm = nn.LayerNorm(width, eps=config.norm_eps) if config.pre_norm else None
        self.transformer = Transformer(
            width=width,
            depth=config.depth,
            num_heads=config.num_heads,
            mlp_dim=config.mlp_dim,
            activation=config.activation,
            norm_eps=config.norm_eps,
            dropout=config.dropout,
            gradient_checkpointing=config.gradient_checkpointing,
        )
        self.norm = nn.LayerNorm(width, eps=config.norm_eps)
        if config.pool == "attention":
            self.head = AttentionPooling(width, config.num_heads, config.mlp_dim, config.activation, config.norm_eps)
        self.projection = nn.Linear(width, embed_dim, bias=False) if config.projection else None

    def embed_patches(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) to patch tokens with positions, (B, N, D), class token first when there is one.

        Another input size than the configured one gets interpolated positions. H and W must be multiples
        of the patch size (UserError).
        """
        patch = self.config.patch_size
        if pixels.shape[-2] % patch or pixels.shape[-1] % patch:
            raise UserError(f"image of {tuple(pixels.shape[-2:])} pixels: both must be multiples of {patch}")
        x = self.patch_embed(pixels)
        grid = (x.shape[-2], x.shape[-1])
        x = x.flatten(2).transpose(1, 2)  # (B, N, D)
        prefix, patches = self.position_embedding.split([int(self.config.class_token), self.config.num_patches])
        square = (self.config.grid_size, self.config.grid_size)
        x = x + interpolate_position_embedding(patches, square, grid).to(x.dtype)
        if self.training and self.config.patch_dropout > 0:
            x = drop_patches(x, self.config.patch_dropout)
        if self.class_token is not None:
            class_token = (self.class_token + prefix[0]).to(x.dtype).expand(x.shape[0], 1, -1)
            x = torch.cat([class_token, x], dim=1)
        return x

    def forward_features(self, pixels: torch.Tensor) -> torch.Tensor:
        """Tokens after the last block and the final LayerNorm: (B, 3, H, W) to (B, N, D)."""
        x = self.embed_patches(pixels)
        if self.pre_norm is not None:
            x = self.pre_norm(x)
        return self.norm(self.transformer(x))

    def forward(self, pixels: torch.Tensor, project: bool = True) -> torch.Tensor:
        """(B, 3, H, W) normalised pixels to (B, E), not L2-normalised; to (B, D) with project=False."""
        x = self.forward_features(pixels)
        if self.config.pool == "attention":
            x = self.head(x)
        elif self.config.pool == "class":
            x = x[:, 0]
        else:
            x = x[:, int(self.config.class_token) :].mean(dim=1)
        return self.projection(x) if project and self.projection is not None else x


def drop_patches(x: torch.Tensor, rate: float) -> torch.Tensor:
    """Keep a random subset of tokens per image: (B, N, D) to (B, max(1, round(N·(1 − rate))), D).

    Drawn on the tokens' own device. Source: Li et al. 2023, "Scaling Language-Image Pre-training via Masking".
    """
    num_keep = max(1, round(x.shape[1] * (1 - rate)))
    keep = torch.rand(x.shape[:2], device=x.device).topk(num_keep, dim=1).indices
    return x.gather(1, keep[..., None].expand(-1, -1, x.shape[2]))
