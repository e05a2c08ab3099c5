"""What enters the tower for a patch: its embedding and its position's, fixed or learned, resampled for other sizes.

B images, D is the tower's width, h and w rows and columns of patches, P a patch's side in pixels.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn


class PatchEmbedding(nn.Conv2d):
    """Patches to tokens, without positions: (B, 3, H, W) to (B, D, h, w). Two names are those of timm's."""

    grid_size: tuple[int, int]
    """Rows and columns of patches in images of the set size."""

    @property
    def num_patches(self) -> int:
        """Patches of an image of the set size."""
        return self.grid_size[0] * self.grid_size[1]

    @torch.no_grad()
    def resampled(self, patch_size: int) -> "PatchEmbedding":
        """Return the embedding of patches of another side, for as many of them; see `resample_patch_embedding`."""
        new = PatchEmbedding(3, self.out_channels, patch_size, patch_size, bias=self.bias is not None).to(self.weight)
        new.weight.copy_(resample_patch_embedding(self.weight, patch_size))
        if self.bias is not None:
            new.bias.copy_(self.bias)
        new.grid_size = self.grid_size
        return new


def resample_patch_embedding(weight: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Return the weights (D, 3, P, P) for patches of another side, (D, 3, P', P') (Beyer et al. 2023, "FlexiViT").

    They give a patch enlarged to P' (bilinear) what the old ones give it as it is; of patches made smaller what comes
    nearest: the pseudo-inverse of the resizing, as timm's `resample_patch_embed`.
    """
    side = torch.linalg.pinv(resampling(weight.shape[-1], patch_size, weight.device, "bilinear").double().T)
    return torch.einsum("ij,kl,dcjl->dcik", side, side, weight.double()).to(weight.dtype)


def sincos_position_embedding(grid_height: int, grid_width: int, width: int) -> torch.Tensor:
    """Return the fixed 2-D sin-cos embedding, (grid_height · grid_width, width), float32.

    A quarter of the width each for sin and cos of the column and of the row, temperature 10,000
    (Beyer et al. 2022, "Better plain ViT baselines"; big_vision `posemb_sincos_2d`). Width must divide by 4.
    """
    rows, columns = torch.meshgrid(
        torch.arange(grid_height, dtype=torch.float64),
        torch.arange(grid_width, dtype=torch.float64),
        indexing="ij",
    )
    quarter = width // 4
    frequency = 10_000.0 ** -(torch.arange(quarter, dtype=torch.float64) / max(quarter - 1, 1))
    x = columns.reshape(-1, 1) * frequency
    y = rows.reshape(-1, 1) * frequency
    return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=1).float()


def interpolate_position_embedding(
    embedding: torch.Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int], mode: str = "bicubic"
) -> torch.Tensor:
    """Resample a grid of position embeddings, (h·w, D) to (h'·w', D), with antialiasing; mode as torch's interpolate.

    Grids are (rows, columns). The same grid returns the embedding itself (ViT, section 3.2).
    """
    if old_grid == new_grid:
        return embedding
    rows, columns = (resampling(*sizes, embedding.device, mode) for sizes in zip(old_grid, new_grid, strict=True))
    grid = embedding.float().unflatten(0, old_grid)  # (h, w, D)
    with torch.autocast(grid.device.type, enabled=False):
        return torch.einsum("ih,jw,hwd->ijd", rows, columns, grid).flatten(0, 1).to(embedding.dtype)


def resampling(old: int, new: int, device: torch.device, mode: str) -> torch.Tensor:
    """Return the weights of resampling along one side, (new, old).

    As a matrix, because the gradient of F.interpolate is not deterministic on CUDA, and torch.compile cannot trace it
    for sizes that change.
    """
    each = torch.eye(old, device=device, dtype=torch.float32)[None, None]
    return F.interpolate(each, size=(new, old), mode=mode, antialias=True, align_corners=False)[0, 0]


class Places(NamedTuple):
    """Where patches are in their images: int64 (...,) each."""

    row: torch.Tensor
    column: torch.Tensor
    rows: torch.Tensor
    """Of patches in the image."""
    columns: torch.Tensor

    @classmethod
    def of(cls, grids: torch.Tensor, numbers: torch.Tensor) -> "Places":
        """Of patches with these numbers (...,), row by row, in grids (..., 2)."""
        rows, columns = grids.unbind(-1)
        return cls(
            numbers.div(columns, rounding_mode="floor"), numbers % columns, *torch.broadcast_tensors(rows, columns)
        )

    def sample(self, table: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Return what a grid of embeddings (h·w, D) is at these places, (..., D): bilinear, antialiased.

        The same as resampling the grid to each image's own, as transformers' Siglip2 does, without doing so for each.
        A place beyond its image, as padding is, gives anything.
        """
        rows, columns = _triangles(self.row, self.rows, grid[0]), _triangles(self.column, self.columns, grid[1])
        weights = (rows[..., :, None] * columns[..., None, :]).flatten(-2)
        wide = torch.promote_types(table.dtype, torch.float32)
        with torch.autocast(table.device.type, enabled=False):
            return (weights.to(wide) @ table.to(wide)).to(table.dtype)


def _triangles(number: torch.Tensor, count: torch.Tensor, old: int) -> torch.Tensor:
    """Weights of `old` cells in the cells of these numbers among `count` (...,), (..., old), as torch's interpolate."""
    # Cell k of n is centred at (2k + 1) / 2n: in whole numbers, so that nothing is rounded but the division.
    cells = 2 * torch.arange(old, device=number.device) + 1
    away = (cells * count[..., None] - (2 * number[..., None] + 1) * old).abs()
    weights = (1 - away / (2 * count.clamp(min=old))[..., None]).clamp(min=0.0)
    return weights / weights.sum(dim=-1, keepdim=True).clamp(min=1e-6)  # beyond the image nothing is in reach
