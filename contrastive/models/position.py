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
    rows, columns = (_resampling(old, new, embedding.device) for old, new in zip(old_grid, new_grid, strict=True))
    grid = embedding.float().unflatten(0, old_grid)  # (h, w, D)
    with torch.autocast(grid.device.type, enabled=False):
        return torch.einsum("ih,jw,hwd->ijd", rows, columns, grid).flatten(0, 1).to(embedding.dtype)


def _resampling(old: int, new: int, device: torch.device) -> torch.Tensor:
    """The weights of bicubic resampling along one side, (new, old).

    As a matrix, because the gradient of F.interpolate is not deterministic on CUDA, and torch.compile cannot trace it
    for sizes that change.
    """
    each = torch.eye(old, device=device)[None, None]
    return F.interpolate(each, size=(new, old), mode="bicubic", antialias=True, align_corners=False)[0, 0]
