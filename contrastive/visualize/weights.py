"""What an image tower has learned that needs no image: position embeddings and patch filters. D width, p patch size."""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from contrastive.models.image_tower import ImageTower
from contrastive.visualize.patches import principal_components


@torch.no_grad()
def position_similarity(tower: ImageTower) -> torch.Tensor:
    """Return the cosine of every patch position's embedding with every other: (rows, columns, rows, columns).

    [i, j] is the map of position (i, j) of `tower.grid`; the class token's is left out. Source: Dosovitskiy et al.
    2021, figure 7.
    """
    positions = F.normalize(tower.position_embedding[tower.num_prefix_tokens :].float(), dim=-1)
    return (positions @ positions.T).unflatten(0, tower.grid).unflatten(-1, tower.grid)


def evenly_spread(size: int, most: int) -> list[int]:
    """Return `most` of the numbers 0..size-1, the first and the last among them; all where there are no more."""
    if size <= most:
        return list(range(size))
    return [round(place * (size - 1) / max(most - 1, 1)) for place in range(most)]


class FilterComponents(NamedTuple):
    """Principal components of the patch embedding."""

    filters: torch.Tensor
    """(K, 3, p, p), unit length each, largest variance first."""
    explained: torch.Tensor
    """(K,) share of the variance."""


@torch.no_grad()
def filter_components(tower: ImageTower) -> FilterComponents:
    """Return the principal components of the D filters of the patch embedding (Dosovitskiy et al. 2021, figure 7)."""
    filters = tower.patch_embed.weight.float()
    flat = filters.flatten(1)
    directions, variances = principal_components(flat - flat.mean(dim=0))
    return FilterComponents(directions.unflatten(1, filters.shape[1:]), variances / variances.sum().clamp(min=1e-12))


@torch.no_grad()
def strongest_filters(tower: ImageTower, most: int) -> torch.Tensor:
    """Return the filters of the patch embedding with the largest norms: (min(D, most), 3, p, p), largest first."""
    filters = tower.patch_embed.weight.float()
    return filters[filters.flatten(1).norm(dim=1).argsort(descending=True)[:most]]
