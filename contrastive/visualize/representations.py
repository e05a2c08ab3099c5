"""What a tower attends to, and what its tokens, embeddings and weights hold, as numbers to be drawn.

B images, P patches, N tokens, M queries, H heads, T texts, D width, E embed_dim, p patch size.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from contrastive.errors import UserError
from contrastive.models.encoders import unit_length
from contrastive.models.image_tower import ImageTower
from contrastive.models.init import InitStyle, initialise_tower
from contrastive.models.transformer import Attention

OUTLIERS = 0.01
"""Share of patches at each end of a component that get the end's colour: one odd patch shall not fade all others."""


@dataclass(frozen=True)
class Trace:
    """What went through a tower."""

    inputs: tuple[torch.Tensor, ...]
    """Of each block, what enters it: (B, N, D)."""
    tokens: torch.Tensor
    """(B, N, D) after the last block and the final norm."""
    grid: tuple[int, int]
    """Rows and columns of patches."""
    num_prefix: int
    """Tokens before the patches: 1 with a class token, else 0."""

    @property
    def patch_tokens(self) -> torch.Tensor:
        """(B, P, D): `tokens` without the class token."""
        return self.tokens[:, self.num_prefix :]


@torch.no_grad()
def trace(tower: ImageTower, pixels: torch.Tensor) -> Trace:
    """Send normalised pixels (B, 3, H, W) through a tower in eval mode.

    `tokens` equals `tower.forward_features(pixels)`.
    """
    patch, depth = tower.config.patch_size, len(tower.transformer.blocks)
    states = tower.states(pixels, range(depth + 1))
    return Trace(
        inputs=tuple(states[number] for number in range(depth)),
        tokens=tower.norm(states[depth]),
        grid=(pixels.shape[-2] // patch, pixels.shape[-1] // patch),
        num_prefix=tower.num_prefix_tokens,
    )


@torch.no_grad()
def attention_weights(attention: Attention, x: torch.Tensor, query: torch.Tensor | None = None) -> torch.Tensor:
    """Return softmax(q·k / sqrt(D/H)) as float32 (B, H, M, N), for `query` (B, M, D), or x itself, and x (B, N, D).

    The model's fused kernel never shows these numbers, so they are computed again, by equation 1 of Vaswani et al.
    2017. Rows sum to 1.
    """
    q, k = (
        projected.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2).float()
        for projected in (attention.q_proj(x if query is None else query), attention.k_proj(x))
    )
    return (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)


def layer_index(tower: ImageTower, layer: int) -> int:
    """Return the block's number from 0; negative ones count from the end. UserError where there is no such block."""
    depth = len(tower.transformer.blocks)
    if not -depth <= layer < depth:
        raise UserError(f"layer {layer}: the image tower has {depth} blocks; give 0 to {depth - 1}, or -{depth} to -1")
    return layer % depth


def patch_index(grid: tuple[int, int], patch: tuple[int, int]) -> int:
    """Return the number of the patch at (row, column) of a grid, row by row. UserError where there is no such patch."""
    (row, column), (rows, columns) = patch, grid
    if not (0 <= row < rows and 0 <= column < columns):
        raise UserError(f"patch {row} {column}: the grid has rows 0 to {rows - 1} and columns 0 to {columns - 1}")
    return row * columns + column


def block_attention(tower: ImageTower, seen: Trace, layer: int = -1) -> torch.Tensor:
    """Return the attention weights of one block: (B, H, N, N), row the query, column what it attends to."""
    index = layer_index(tower, layer)
    block = tower.transformer.blocks[index]
    return attention_weights(block.attention, block.norm1(seen.inputs[index]))


def reading_attention(tower: ImageTower, seen: Trace, layer: int | None = None) -> torch.Tensor:
    """Return how much of what is read comes from each token, per head: (B, H, N), each sums to 1.

    Where the class token is pooled it is that token's attention in the block `layer` (None: the last). Otherwise no
    token of a block stands for the image, so it is what the patches attend to on average. With SigLIP's
    attention head and no `layer` it is the attention of the head's learned probe to the final tokens.
    """
    if layer is None and tower.config.pool == "attention":
        return _probe_attention(tower, seen)
    weights = block_attention(tower, seen, -1 if layer is None else layer)
    return _as_pooled(tower, seen, weights)


def query_attention(tower: ImageTower, seen: Trace, patch: tuple[int, int], layer: int = -1) -> torch.Tensor:
    """Return what the patch at (row, column) attends to in a block, per head: (B, H, N).

    Raises:
        UserError: no such block, or no such patch.
    """
    return block_attention(tower, seen, layer)[:, :, seen.num_prefix + patch_index(seen.grid, patch)]


def rollout(tower: ImageTower, seen: Trace) -> torch.Tensor:
    """Return attention rollout over all blocks: (B, N, N), row an output token, column an input token.

    Heads are averaged, half of each layer's attention is the residual connection, (A + I) / 2, and the layers are
    multiplied (Abnar & Zuidema 2020, "Quantifying Attention Flow in Transformers", section 3). Rows sum to 1.
    MLPs and the values' sizes are not in it: it tells where attention could have carried something from.
    """
    batch, num_tokens = seen.tokens.shape[:2]
    identity = torch.eye(num_tokens, device=seen.tokens.device)
    # From the first layer to the last, each multiplied from the left: row i says what token i has gathered so far.
    rolled = identity.expand(batch, -1, -1)
    for layer in range(len(seen.inputs)):
        rolled = (block_attention(tower, seen, layer).mean(dim=1) + identity) / 2 @ rolled
    return rolled


def rollout_reading(tower: ImageTower, seen: Trace) -> torch.Tensor:
    """Return rollout as the tower's pooling reads it: (B, N), sums to 1.

    The class token's row; the mean of the patches' rows; or those rows weighted by the attention head's probe, its
    heads averaged.
    """
    rolled = rollout(tower, seen)
    if tower.config.pool == "attention":
        return (_probe_attention(tower, seen).mean(dim=1, keepdim=True) @ rolled)[:, 0]
    return _as_pooled(tower, seen, rolled)


def _probe_attention(tower: ImageTower, seen: Trace) -> torch.Tensor:
    probe = tower.head.probe.to(seen.tokens.dtype).expand(seen.tokens.shape[0], -1, -1)
    return attention_weights(tower.head.attention, seen.tokens, probe)[:, :, 0]


def _as_pooled(tower: ImageTower, seen: Trace, weights: torch.Tensor) -> torch.Tensor:
    """(..., N, N) to (..., N): the class token's row where it is pooled, else the mean over the patches' rows."""
    if tower.config.pool == "class":
        return weights[..., 0, :]
    return weights[..., seen.num_prefix :, :].mean(dim=-2)


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


def random_tower(tower: ImageTower, style: InitStyle = "siglip") -> ImageTower:
    """Return an untrained tower of the same options, drawn as training would begin, in eval mode on the same device.

    torch's global generator is left as it was.
    """
    embed_dim = tower.config.width if tower.projection is None else tower.projection.out_features
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
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
