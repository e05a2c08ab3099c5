"""What an image encoder gives out, and the names by which VLM code reads its shape."""

import operator
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch

from contrastive.errors import UserError
from contrastive.models.image_tower import ImageTowerConfig
from contrastive.patches import Patches

POOLS = ("class", "average", "attention", "tower")
ACTIVATION_NAMES = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "quick_gelu": "quick_gelu"}  # transformers'


@dataclass(frozen=True)
class ImageEncoderConfig:
    """Shape and choices of an `ImageEncoder`, by the names of transformers' vision configurations."""

    layer: int | tuple[int, ...]
    """The hidden states asked for, as given."""
    norm: bool
    """Whether the final LayerNorm is applied to them."""
    pool: str | None
    """How tokens become one vector: class, average, attention; None: not at all."""
    keep_prefix: bool
    """Whether the class token stays before the patch tokens."""
    tower_depth: int
    """Blocks of the tower that the encoder was made from."""
    hidden_size: int
    num_hidden_layers: int
    """Blocks of the encoder, which ends at the last layer asked for."""
    num_attention_heads: int
    intermediate_size: int
    image_size: int | tuple[int, int]
    """Side in pixels; (height, width) where they differ."""
    patch_size: int
    hidden_act: str
    layer_norm_eps: float
    num_channels: int = 3
    attention_dropout: float = 0.0
    model_type: str = "contrastive_image_encoder"

    def to_dict(self) -> dict[str, Any]:
        """The same as plain values."""
        return asdict(self)


class RaggedTokens(NamedTuple):
    """Tokens of B images of any shape without padding, T in all."""

    tokens: torch.Tensor
    """(T, D): one image behind the other, each row by row."""
    grids: torch.Tensor
    """(B, 2) int64, on the CPU: rows and columns of each image."""
    lengths: torch.Tensor
    """(B,) int64, on the CPU: tokens of each."""


def ragged(x: torch.Tensor, grids: torch.Tensor) -> RaggedTokens:
    """(B, N, D) patch tokens, anything behind those of an image, to T of them without padding."""
    grids = grids.cpu()  # what a processor made may have gone to a GPU as a whole
    lengths = grids.prod(dim=1)
    # Which are real is found on the CPU: a GPU would be waited for.
    real = (torch.arange(x.shape[1]) < lengths[:, None]).flatten().nonzero()[:, 0]
    return RaggedTokens(x.flatten(0, 1)[real.to(x.device)], grids, lengths)


def one_grid(images: Patches) -> tuple[int, int]:
    """Return the rows and columns that all images have; UserError where they differ."""
    found = images.grids.unique(dim=0).tolist()
    if len(found) > 1:
        told = ", ".join(f"{rows}×{columns}" for rows, columns in found[:3])
        raise UserError(f"images of {len(found)} grids ({told}) have no one (B, D, h, w): take their tokens (B, N, D)")
    return tuple(found[0])


def hidden_state_numbers(layers: tuple[int, ...], depth: int) -> tuple[int, ...]:
    """Count layers from the front, in the order given: of depth + 1 hidden states, -1 is the last, `depth`.

    Raises:
        UserError: no such layer, or none at all.
    """
    if not layers:
        raise UserError("layer is empty: give an integer or several, such as -2 or (6, 12)")
    for one in layers:
        if isinstance(one, bool) or not hasattr(one, "__index__"):
            raise UserError(f"layer is {one!r}: give an integer or several, such as -2 or (6, 12)")
        if not -depth - 1 <= operator.index(one) <= depth:
            raise UserError(
                f"layer {one} is not in an image tower of {depth} blocks: use {-depth - 1} to {depth}, where 0 is the "
                f"input of the first block and {depth} or -1 the output of the last"
            )
    return tuple(operator.index(one) % (depth + 1) for one in layers)


def check_pool(pool: str | None, tower: ImageTowerConfig) -> str | None:
    """Resolve 'tower' to what the tower itself does; UserError for a pooling that it has no weights for."""
    if pool is None:
        return None
    if pool not in POOLS:
        meant = {"avg": "average", "mean": "average", "cls": "class", "token": "class", "map": "attention"}.get(pool)
        hint = f" Did you mean '{meant}'?" if meant else ""
        raise UserError(f"unknown pool '{pool}'; use one of {', '.join(POOLS)}, or None for tokens.{hint}")
    if pool == "tower":
        return tower.pool
    if pool == "attention" and tower.pool != "attention":
        raise UserError(f"pool 'attention' needs the attention head of a tower that has one; this pools '{tower.pool}'")
    if pool == "class" and not tower.class_token:
        raise UserError("pool 'class' needs a tower with a class token; this has none, use 'average' or 'tower'")
    return pool
