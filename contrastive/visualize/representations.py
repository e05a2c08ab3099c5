"""What a tower's tokens, embeddings and weights hold, as numbers to be drawn.

B images, P patches, T texts, D width, E embed_dim, p patch size.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from contrastive.models.encoders import unit_length
from contrastive.models.image_tower import ImageTower
from contrastive.models.init import InitStyle, initialise_tower

OUTLIERS = 0.01
"""Share of patches at each end of a component that get the end's colour: one odd patch shall not fade all others."""


@torch.no_grad()
def patch_embeddings(tower: ImageTower, patch_tokens: torch.Tensor) -> torch.Tensor:
    """Bring single patches into the space that images and texts share: (B, P, D) to (B, P, E), unit length.

    Each patch token, after the tower's final norm, goes through the tower's own pooling as if the image had no
    other token. That needs no new weights, and a picture of one patch is embedded just so:

    - class token: pooling takes one token as it is, so the patch token goes straight through the projection. Nothing
      in training asked patch tokens to lie in that space; what is seen there comes from the residual stream.
    - average: the mean of one token is that token, then the projection where there is one. The mean of these
      embeddings, before their length is made 1, is the image's embedding: the picture splits the score up.
    - attention (SigLIP): over one token the softmax is 1, so the token goes through the head's value and output
      projections and its MLP. The MLP is not linear: the parts do not add up to the image's embedding.
    """
    if tower.config.pool == "attention":
        pooled = tower.head(patch_tokens.flatten(0, 1)[:, None]).unflatten(0, patch_tokens.shape[:2])
    else:
        pooled = patch_tokens
    return unit_length(pooled if tower.projection is None else tower.projection(pooled))


def text_similarity(patches: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
    """Return cosines (B, T, P) of unit-length patches (B, P, E) and texts (T, E)."""
    return (patches @ texts.to(patches).T).transpose(1, 2)


def above_mean(similarity: torch.Tensor) -> torch.Tensor:
    """Return what sets each text apart: (B, T, P) minus its mean over the texts.

    What all texts share (the gap between the two towers' embeddings, patches that resemble any text) is gone.
    """
    return similarity - similarity.mean(dim=1, keepdim=True)


class Colours(NamedTuple):
    """Patch tokens as colours."""

    rgb: torch.Tensor
    """(B, P, 3) float32 in 0..1."""
    explained: torch.Tensor
    """(3,) share of the variance that each component holds."""


def pca_colours(patch_tokens: torch.Tensor) -> Colours:
    """Return the first three principal components of (B, P, D) tokens as red, green and blue.

    The components are those of all patches of all images together, so that a colour means the same in each image
    (Oquab et al. 2023, "DINOv2", figure 1; without its second PCA on the foreground). Each component is stretched
    to 0..1, `OUTLIERS` at each end cut off. Signs are arbitrary: colours of two models cannot be compared.
    """
    flat = patch_tokens.flatten(0, 1).float()
    flat = flat - flat.mean(dim=0)
    directions, variances = principal_components(flat)
    components = flat.new_zeros(len(flat), 3)
    found = min(3, len(directions))
    components[:, :found] = flat @ directions[:found].T
    low, high = (torch.quantile(components, share, dim=0) for share in (OUTLIERS, 1 - OUTLIERS))
    spread = high - low
    rgb = torch.where(spread > 1e-6, (components - low) / spread.clamp(min=1e-6), 0.5).clamp(0, 1)
    explained = flat.new_zeros(3)
    explained[:found] = (variances / variances.sum().clamp(min=1e-12))[:found]
    return Colours(rgb.unflatten(0, patch_tokens.shape[:2]), explained)


def principal_components(centred: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return directions (K, D), unit length, and their sums of squares (K,), largest first, of centred rows (R, D).

    K is the smaller of R and D. Of the two signs the one that makes the largest entry positive is taken.
    """
    rows = centred.double()  # squared below, where float32 would lose the small ones
    variances, directions = torch.linalg.eigh(rows.T @ rows)  # far less work for many rows than svd
    count = min(centred.shape)
    directions, variances = directions.T.flip(0)[:count], variances.flip(0)[:count].clamp(min=0)
    largest = directions.gather(1, directions.abs().argmax(dim=1, keepdim=True))
    return (directions * largest.sign()).to(centred.dtype), variances.to(centred.dtype)


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


def random_tower(tower: ImageTower, style: InitStyle = "siglip", seed: int = 0) -> ImageTower:
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
