"""Patch tokens: what text they look like, and their main directions as colours. P patches, T texts, E embed_dim."""

from typing import NamedTuple

import torch

from contrastive.models.dual_encoder import unit_length
from contrastive.models.image_tower import ImageTower

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
