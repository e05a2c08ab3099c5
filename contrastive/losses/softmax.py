"""The softmax (InfoNCE) loss of CLIP (Radford et al. 2021, figure 3)."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from contrastive.distributed.collectives import all_gather_even, all_reduce_max, all_reduce_sum, world_size
from contrastive.losses.base import LOSSES, Duplicates
from contrastive.losses.checks import checked_duplicates
from contrastive.losses.sweep import Gradient, Labels, row_products, sweep, tiles_for
from contrastive.losses.tiles import LN_2, LOG2_E


class SoftmaxLoss(nn.Module):
    """Mean of image-to-text and text-to-image cross entropy over the global batch.

    Under several ranks each takes its own images against every text and its own texts against every image;
    averaged over ranks, as DistributedDataParallel averages gradients, that is the loss of the global batch.

    One sweep over tiles finds the normalisers, a second the gradients, both in the forward pass and in memory
    linear in the batch. The backward pass does not communicate; it takes the gradient of the loss to be the same
    on all ranks.

    Args:
        duplicates: what a pair is whose caption equals the matching one: `negative` (as published), `ignore`
            (left out), or `positive` (the target is uniform over all of them, as in UniCL).
    """

    def __init__(self, duplicates: Duplicates = "negative"):
        super().__init__()
        self.duplicates = checked_duplicates(duplicates)

    def forward(
        self,
        image_features: torch.Tensor,
        text_features: torch.Tensor,
        logit_scale: torch.Tensor,
        logit_bias: torch.Tensor | None = None,
        caption_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return this rank's share of the loss, a scalar, in float32 at least.

        Args:
            image_features: (B/W, E), unit length. text_features: likewise, row i describing image i.
            logit_scale: scalar factor on the similarities (already exponentiated).
            logit_bias: must be None; a constant offset cancels in a softmax.
            caption_ids: (B/W,) int64, equal where captions are; needed unless duplicates is `negative`.

        Raises:
            NonFiniteFeatures: NaN or infinity in features on a CPU; on a GPU, which is not waited for, the loss is NaN.
            ValueError: shapes, types or devices disagree, on any rank, a bias is given, or caption_ids is missing.
        """
        if logit_bias is not None:
            raise ValueError("SoftmaxLoss takes no logit_bias: it cancels, and would never get a gradient")
        from contrastive.losses.function import swept_loss

        pairs = image_features, text_features, logit_scale, logit_bias
        return swept_loss(_two_sweeps, *pairs, caption_ids, self.duplicates)


def _two_sweeps(image, text, scale, bias: None, *, labels: Labels, wants: tuple[bool, bool]):
    """Return (Σ over this rank's pairs of the mean of both cross entropies, its Gradient): four matrix products.

    The first sweep finds the log-sum-exps of rows and columns, the second, if any gradient is wanted, the gradient
    of both cross entropies together.

    Args:
        image, text: (B/W, E), both bfloat16, float32 or float64. scale: 0-dim, float32 at least.
    """
    tiles = tiles_for(image)
    row_lse, column_lse, matched = _log_sum_exps(image, text, scale, labels, tiles)
    if labels.duplicates == "positive":
        weight = labels.target_weight()
        loss = ((row_lse + column_lse[labels.own]) / 2 - matched * weight).sum() * LN_2
        matched = weight
    else:
        # The log-sum-exps lack the own logit, by which all is known of the loss and its gradient without
        # subtracting numbers near 1: −log p = softplus(others − own), p − 1 = −σ(others − own).
        own_logits = row_products(image, text) * (scale.double() * LOG2_E)
        margins = torch.stack([row_lse - own_logits, column_lse[labels.own] - own_logits]) * LN_2
        loss = F.softplus(margins, threshold=700).sum() / 2  # by default it is cut at 20
        row_lse = torch.logaddexp2(row_lse, own_logits)
        column_lse = torch.logaddexp2(column_lse, all_gather_even(own_logits))
        matched = -margins.sigmoid().mean(dim=0)
    if not any(wants):
        return loss, Gradient()
    row_lse, column_lse, matched = (vector.to(scale.dtype) for vector in (row_lse, column_lse, matched))

    def visit(t):
        return tiles.softmax_gradient(t.x, t.y, scale, row_lse[t.rows], column_lse[t.columns], matched[t.rows], t.pairs)

    return loss, sweep(image, text, labels, tiles, visit, wants)


def _log_sum_exps(image, text, scale, labels: Labels, tiles):
    """Return log-sum-exps of own rows (B/W,) and all columns (B,), and sums of matched logits (B/W,), base 2.

    All are float64. What they are of is said in `TorchTiles.softmax_statistics`.
    """
    nothing = {"dtype": torch.float64, "device": image.device}
    row_lse = torch.full((len(image),), -torch.inf, **nothing)
    column_lse = torch.full((world_size() * len(text),), -torch.inf, **nothing)
    matched = torch.zeros(len(image), **nothing)

    def visit(t):
        of_rows, of_columns, tile_matched = tiles.softmax_statistics(t.x, t.y, scale, t.pairs)
        row_lse[t.rows] = torch.logaddexp2(row_lse[t.rows], of_rows)
        column_lse[t.columns] = torch.logaddexp2(column_lse[t.columns], of_columns)
        if tile_matched is not None:
            matched[t.rows] += tile_matched

    sweep(image, text, labels, tiles, visit)
    if world_size() > 1:  # each rank has seen its own rows only
        largest = all_reduce_max(column_lse)
        largest = largest.masked_fill(largest == -torch.inf, 0)
        column_lse = all_reduce_sum((column_lse - largest).exp2()).log2() + largest
    return row_lse, column_lse, matched


@LOSSES.register("softmax")
@dataclass(frozen=True)
class SoftmaxLossConfig:
    """CLIP's softmax loss."""

    duplicates: Literal["auto", "negative", "ignore", "positive"] = "auto"
    """Pairs with an identical caption: negatives, left out, or positives. auto: positive for class prompts."""
    max_logit_scale: float | None = 100.0
    """Clamp on the factor after each step, as in CLIP."""

    def initial_logits(self, global_batch_size: int) -> tuple[float, float | None]:
        return 1 / 0.07, None

    def chance_loss(self, global_batch_size: int) -> float:
        return math.log(global_batch_size)

    def build(self) -> SoftmaxLoss:
        return SoftmaxLoss("negative" if self.duplicates == "auto" else self.duplicates)
