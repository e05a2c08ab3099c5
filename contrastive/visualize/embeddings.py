"""Embeddings of whole images: against an untrained tower, and against texts. B images, T texts, E embed_dim."""

from typing import Literal

import torch

from contrastive.models.image_tower import ImageTower
from contrastive.models.init import initialise_tower


def random_tower(tower: ImageTower, style: Literal["clip", "siglip"] = "siglip", seed: int = 0) -> ImageTower:
    """Return an untrained tower of the same options, drawn as training would begin, in eval mode on the same device.

    torch's global generator is left as it was.
    """
    embed_dim = tower.config.width if tower.projection is None else tower.projection.out_features
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = ImageTower(tower.config, embed_dim)
        initialise_tower(fresh, style)
    return fresh.eval().to(tower.patch_embed.weight.device)


def effective_rank(features: torch.Tensor) -> float:
    """Return how many directions the rows of (B, E) fill, from 1 to min(B, E).

    The exponential of the entropy of the singular values' shares (Roy & Vetterli 2007, "The effective rank"). The
    mean is not taken off: rows that all point one way have rank 1.
    """
    sizes = torch.linalg.svdvals(features.double())
    shares = sizes / sizes.sum()
    return torch.special.entr(shares).sum().exp().item()


def mean_cosine(features: torch.Tensor) -> float:
    """Return the mean cosine between two different rows of unit-length (B, E), B at least 2."""
    cosines = features @ features.T
    count = len(features)
    return ((cosines.sum() - cosines.trace()) / (count * (count - 1))).item()


def match_probabilities(
    cosines: torch.Tensor, logit_scale: torch.Tensor, logit_bias: torch.Tensor | None
) -> torch.Tensor:
    """Return what the loss makes of cosines (B, T) with the factor `logit_scale`, not its log: (B, T) in 0..1.

    With a bias each pair by itself, sigmoid(scale·cosine + bias) (Zhai et al. 2023, equation 1); without one
    softmax(scale·cosine) over the texts, so that each row sums to 1 (Radford et al. 2021, figure 3).
    """
    logits = logit_scale * cosines
    return logits.softmax(dim=1) if logit_bias is None else torch.sigmoid(logits + logit_bias)
