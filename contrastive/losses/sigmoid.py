"""The pairwise sigmoid loss of SigLIP (Zhai et al. 2023, "Sigmoid Loss for Language Image Pre-Training")."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from contrastive.losses.base import LOSSES, Duplicates
from contrastive.losses.checks import checked_duplicates
from contrastive.losses.sweep import Gradient, Labels, sweep, tiles_for


class SigmoidLoss(nn.Module):
    """−Σ log σ(±z) / B over all pairs, z = logit_scale · cos(image, text) + logit_bias (equation 1).

    Under several ranks each takes its own images against every text and divides by its local batch; averaged
    over ranks, as DistributedDataParallel averages gradients, that is the loss of the global batch.

    Loss and gradients come from one sweep over tiles, in the forward pass, in memory linear in the batch.
    The backward pass does not communicate; it takes the gradient of the loss to be the same on all ranks.

    Args:
        duplicates: what a pair is whose caption equals the matching one: `negative` (as published), `ignore`
            (left out), or `positive`.
    """

    def __init__(self, duplicates: Duplicates = "negative"):
        super().__init__()
        self.duplicates = checked_duplicates(duplicates)

    def forward(
        self,
        image_features: torch.Tensor,
        text_features: torch.Tensor,
        logit_scale: torch.Tensor,
        logit_bias: torch.Tensor,
        caption_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return this rank's share of the loss, a scalar, in float32 at least.

        Args:
            image_features: (B/W, E), unit length. text_features: likewise, row i describing image i.
            logit_scale: scalar factor on the similarities (already exponentiated).
            logit_bias: scalar added to the logits.
            caption_ids: (B/W,) int64, equal where captions are; needed unless duplicates is `negative`.

        Raises:
            NonFiniteFeatures: NaN or infinity in features on a CPU; on a GPU, which is not waited for, the loss is NaN.
            ValueError: shapes, types or devices disagree, on any rank, or logit_bias or caption_ids is missing.
        """
        if logit_bias is None:
            raise ValueError("SigmoidLoss needs a logit_bias: build the model with init_logit_bias")
        from contrastive.losses.function import swept_loss

        pairs = image_features, text_features, logit_scale, logit_bias
        return swept_loss(_single_sweep, *pairs, caption_ids, self.duplicates)


def _single_sweep(image, text, scale, bias, *, labels: Labels, wants: tuple[bool, bool]):
    """Return (Σ −log σ(±z) over this rank's rows, its Gradient): three matrix products in one sweep.

    The gradient of a logit, σ(z) minus 1 for a match, needs no normaliser, so it is known as soon as the logit is.

    Args:
        image, text: (B/W, E), both bfloat16, float32 or float64. scale, bias: 0-dim, float32 at least.
        wants: whether the gradients of image and text are wanted; with neither, only the loss is computed.
    """
    tiles = tiles_for(image)
    loss = torch.zeros((), dtype=torch.float64, device=image.device)
    bias_sum = torch.zeros_like(loss) if any(wants) else None

    def visit(tile):
        value, tile_bias_sum, g = tiles.sigmoid(tile.x, tile.y, scale, bias, tile.pairs, any(wants))
        loss.add_(value)
        if bias_sum is not None:
            bias_sum.add_(tile_bias_sum)
        return g

    gradient = sweep(image, text, labels, tiles, visit, wants)
    return loss, Gradient(gradient.image, gradient.text, bias_sum)


@LOSSES.register("sigmoid")
@dataclass(frozen=True)
class SigmoidLossConfig:
    """SigLIP's pairwise sigmoid loss."""

    duplicates: Literal["auto", "negative", "ignore", "positive"] = "auto"
    """Pairs with an identical caption: negatives, left out, or positives. auto: positive for class prompts."""
    max_logit_scale: float | None = None
    """Clamp on the factor after each step; published SigLIP has none."""

    def initial_logits(self, global_batch_size: int) -> tuple[float, float | None]:
        """The bias is the log-odds of a match, −log(batch − 1), but at least −10."""
        return 10.0, max(-math.log(max(global_batch_size - 1, 1)), -10.0)

    def chance_loss(self, global_batch_size: int) -> float:
        """The best constant logit is the log-odds of a match: log B + (B − 1)·log(B / (B − 1))."""
        batch = max(global_batch_size, 2)
        return math.log(batch) + (batch - 1) * math.log(batch / (batch - 1))

    def build(self) -> SigmoidLoss:
        return SigmoidLoss("negative" if self.duplicates == "auto" else self.duplicates)
