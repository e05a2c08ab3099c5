"""What every use of the ViT shares: patch embedding, positions and blocks, without norm, pooling and projection."""

import operator
from collections.abc import Collection
from dataclasses import replace

import torch
from torch import nn

from contrastive.errors import UserError
from contrastive.models.image_tower_config import ImageTowerConfig
from contrastive.models.position import interpolate_position_embedding, sincos_position_embedding
from contrastive.models.transformer import Transformer


class PatchEmbedding(nn.Conv2d):
    """Patches to tokens, without positions: (B, 3, H, W) to (B, D, h, w). Two names are those of timm's."""

    grid_size: tuple[int, int]
    """Rows and columns of patches in images of the set size."""

    @property
    def num_patches(self) -> int:
        """Patches of an image of the set size."""
        return self.grid_size[0] * self.grid_size[1]


class ImageTrunk(nn.Module):
    """Pixels (B, 3, H, W) to the hidden states of a ViT, (B, N, D) each.

    Hidden state 0 is what enters the first block, k what leaves block k. The class token, where there is one, comes
    first. `architecture` holds the options.
    """

    def __init__(self, config: ImageTowerConfig):
        super().__init__()
        config.check()
        self.architecture = config
        width = config.width
        self.patch_embed = PatchEmbedding(3, width, config.patch_size, config.patch_size, bias=config.patch_bias)
        self.patch_embed.grid_size = (config.grid_size, config.grid_size)
        self.class_token = nn.Parameter(torch.zeros(width)) if config.class_token else None
        if config.position == "learned":
            self.position_embedding = nn.Parameter(torch.zeros(config.num_patches + config.class_token, width))
        else:
            self.register_buffer("position_embedding", self._fixed_positions(), persistent=False)
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

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches that the positions are made for."""
        return self.patch_embed.grid_size

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before the patches: 1 with a class token, else 0."""
        return int(self.architecture.class_token)

    @property
    def input_size(self) -> tuple[int, int]:
        """Height and width in pixels of the images that the positions are made for."""
        return self.grid[0] * self.architecture.patch_size, self.grid[1] * self.architecture.patch_size

    def set_input_size(self, size: int | tuple[int, int]) -> None:
        """Resample the positions once, for images of another size in pixels: a side, or (height, width).

        Learned positions are interpolated from those at hand (bicubic, antialiased), fixed ones computed anew. The
        position parameter is a new one: call this before an optimizer or DDP takes hold of the parameters. A square
        size also becomes `architecture.image_size`.

        Raises:
            UserError: a side is not a multiple of the patch size.
        """
        height, width = (operator.index(side) for side in (size if isinstance(size, (tuple, list)) else (size, size)))
        patch = self.architecture.patch_size
        for side in (height, width):
            if side < 1 or side % patch:
                below = max(side - side % patch, patch)
                raise UserError(
                    f"input size {height}×{width}: {side} is not a multiple of the patch size {patch}; "
                    f"use {below} or {below + patch}"
                )
        grid = (height // patch, width // patch)
        old, self.patch_embed.grid_size = self.grid, grid
        if height == width:
            self.architecture = replace(self.architecture, image_size=height)
        if grid == old:
            return
        now = self.position_embedding
        if self.architecture.position == "learned":
            prefix, patches = now.detach().tensor_split([self.num_prefix_tokens])
            resampled = torch.cat([prefix, interpolate_position_embedding(patches, old, grid)])
            self.position_embedding = nn.Parameter(resampled, requires_grad=now.requires_grad)
        else:
            self.position_embedding = self._fixed_positions().to(now)

    def embed_patches(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) to patch tokens with positions, (B, N, D), class token first when there is one.

        An input of another size than `input_size` gets the positions that `set_input_size` would make. H and W must
        be multiples of the patch size (UserError).
        """
        patch = self.architecture.patch_size
        if pixels.shape[-2] % patch or pixels.shape[-1] % patch:
            raise UserError(f"image of {tuple(pixels.shape[-2:])} pixels: both must be multiples of {patch}")
        x = self.patch_embed(pixels)
        grid = (x.shape[-2], x.shape[-1])
        x = x.flatten(2).transpose(1, 2)  # (B, N, D)
        prefix, patches = self.position_embedding.tensor_split([self.num_prefix_tokens])
        if self.architecture.position == "learned":
            patches = interpolate_position_embedding(patches, self.grid, grid)
        elif grid != self.grid:
            patches = sincos_position_embedding(*grid, self.architecture.width).to(self.position_embedding)
        # Under autocast the sum is float32, and so is what the blocks add to: bfloat16 would round it at every block.
        x = x + patches
        if self.training and self.architecture.patch_dropout > 0:
            x = drop_patches(x, self.architecture.patch_dropout)
        if self.class_token is not None:
            class_token = (self.class_token + prefix[0]).expand(x.shape[0], 1, -1)
            x = torch.cat([class_token, x], dim=1)
        return x

    def embed(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) to hidden state 0, (B, N, D): after positions and, where there is one, `pre_norm`."""
        x = self.embed_patches(pixels)
        return x if self.pre_norm is None else self.pre_norm(x)

    def states(self, pixels: torch.Tensor, wanted: Collection[int]) -> dict[int, torch.Tensor]:
        """The hidden states of these numbers, (B, N, D) each, none of them normalised by the final LayerNorm."""
        return self.transformer.states(self.embed(pixels), wanted)

    def pool_tokens(self, x: torch.Tensor, pool: str) -> torch.Tensor:
        """(B, N, D) to (B, D); 'attention' needs the subclass's `head`."""
        if pool == "attention":
            return self.head(x)
        return x[:, 0] if pool == "class" else x[:, self.num_prefix_tokens :].mean(dim=1)

    def _fixed_positions(self) -> torch.Tensor:
        fixed = sincos_position_embedding(*self.grid, self.architecture.width)
        return torch.cat([fixed.new_zeros(self.num_prefix_tokens, self.architecture.width), fixed])


def drop_patches(x: torch.Tensor, rate: float) -> torch.Tensor:
    """Keep a random subset of tokens per image: (B, N, D) to (B, max(1, round(N·(1 − rate))), D).

    Drawn on the tokens' own device. Source: Li et al. 2023, "Scaling Language-Image Pre-training via Masking".
    """
    num_keep = max(1, round(x.shape[1] * (1 - rate)))
    keep = torch.rand(x.shape[:2], device=x.device).topk(num_keep, dim=1).indices
    return x.gather(1, keep[..., None].expand(-1, -1, x.shape[2]))
