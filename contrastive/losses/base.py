"""What every loss shares: its registry, its options' interface, and how pairs are labelled. B batch, W ranks."""

from typing import Literal, Protocol

import torch
from torch import nn

from contrastive.distributed.collectives import all_gather_rows, rank
from contrastive.registry import Registry

Duplicates = Literal["negative", "ignore", "positive"]


class LossConfig(Protocol):
    """The options of a loss: a frozen dataclass registered in LOSSES, with these members."""

    duplicates: str
    """`auto` lets the run decide by its data: `positive` where captions are class prompts."""
    max_logit_scale: float | None
    """The run clamps the factor on the similarities to at most this after each step; None: no clamp."""

    def initial_logits(self, global_batch_size: int) -> tuple[float, float | None]:
        """Return the initial factor on the similarities and the initial logit bias (None: no bias)."""

    def chance_loss(self, global_batch_size: int) -> float:
        """Return the loss of features that tell nothing apart: where a run that does not learn sits."""

    def build(self) -> nn.Module:
        """Return the loss, called as loss(image, text, logit_scale, logit_bias, caption_ids=...)."""


LOSSES: Registry[type[LossConfig]] = Registry("loss")


def check_features(image_features: torch.Tensor, text_features: torch.Tensor) -> None:
    """Raise ValueError unless both are floating (B, E) of one shape, B > 0."""
    shapes = f"image_features {tuple(image_features.shape)}, text_features {tuple(text_features.shape)}"
    if image_features.ndim != 2 or image_features.shape != text_features.shape or not len(image_features):
        raise ValueError(f"features must be two non-empty matrices (B, E) of one shape, got {shapes}")
    if not (image_features.is_floating_point() and text_features.is_floating_point()):
        raise ValueError(f"features must be floating point, got {image_features.dtype} and {text_features.dtype}")


def own_pairs(local_batch: int, global_batch: int, device: torch.device) -> torch.Tensor:
    """Return which of this rank's rows match which column of the global batch: bool (B/W, B)."""
    columns = torch.arange(local_batch, device=device) + rank() * local_batch
    return columns[:, None] == torch.arange(global_batch, device=device)


def same_captions(caption_ids: torch.Tensor) -> torch.Tensor:
    """Return which captions of the global batch equal this rank's own: int64 ids (B/W,) to bool (B/W, B)."""
    return caption_ids[:, None] == all_gather_rows(caption_ids)


def full_precision(tensor: torch.Tensor) -> torch.Tensor:
    """Raise half precisions to float32; float64 stays, for tests against the oracle."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
