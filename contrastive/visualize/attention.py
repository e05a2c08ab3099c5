"""What an image tower attends to, by its own projections. B batch, H heads, M queries, N tokens, P patches, D width."""

from dataclasses import dataclass

import torch

from contrastive.errors import UserError
from contrastive.models.image_tower import ImageTower
from contrastive.models.transformer import Attention


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
