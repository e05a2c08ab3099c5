"""Position embeddings of an image grid: fixed sin-cos, and interpolation to another grid."""

import torch
import torch.nn.functional as F


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
    embedding: torch.Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int]
) -> torch.Tensor:
    """Resample a grid of position embeddings, (h·w, D) to (h'·w', D), bicubic with antialiasing.

    Grids are (rows, columns). The same grid returns the embedding itself (ViT, section 3.2).
    """
    if old_grid == new_grid:
        return embedding
    grid = embedding.unflatten(0, old_grid).permute(2, 0, 1)[None]  # (1, D, h, w)
    resized = F.interpolate(grid.float(), size=new_grid, mode="bicubic", antialias=True, align_corners=False)
    return resized[0].permute(1, 2, 0).flatten(0, 1).to(embedding.dtype)
