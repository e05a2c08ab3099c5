"""What a model says about a few images and texts, whichever library computes it."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Outputs:
    """Each is None where the format or the model has no such part."""

    image: torch.Tensor | None = None
    """(B, E) float32, unit length."""
    text: torch.Tensor | None = None
    """(T, E) float32, unit length."""
    logits: torch.Tensor | None = None
    """(B, T) float32: scale · image · textᵀ, plus the bias where there is one. Of a classifier its (B, C) scores."""
    pixels: torch.Tensor | None = None
    """(B, 3, H, W) float32: the images as the folder's own preprocessing makes them."""
    tokens: torch.Tensor | None = None
    """(T, N) int64: the texts as the folder's own tokenizer makes them."""
