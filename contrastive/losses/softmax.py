"""The softmax (InfoNCE) loss of CLIP (Radford et al. 2021, figure 3)."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from contrastive.distributed.collectives import all_gather_with_grad
from contrastive.losses.base import (
    LOSSES,
    Duplicates,
    check_features,
    full_precision,
    own_pairs,
    same_captions,
)


class SoftmaxLoss(nn.Module):
    """Mean of image-to-text and text-to-image cross entropy over the global batch.

    Under several ranks each takes its own images against every text and its own texts against every image;
    averaged over ranks, as DistributedDataParallel averages gradients, that is the loss of the global batch.

    Args:
        duplicates: what a pair is whose caption equals the matching one: `negative` (as published), `ignore`
            (left out), or `positive` (the target is uniform over all of them, as in UniCL).
    """

    def __init__(self, duplicates: Duplicates = "negative"):
        super().__init__()
        self.duplicates = duplicates

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
            ValueError: shapes or types of the features disagree, a bias is given, or caption_ids is missing.
        """
        check_features(image_features, text_features)
        if logit_bias is not None:
            raise ValueError("SoftmaxLoss takes no logit_bias: it cancels, and would never get a gradient")
        with torch.autocast(image_features.device.type, enabled=False):
            image, text = full_precision(image_features), full_precision(text_features)
            per_image = logit_scale * image @ all_gather_with_grad(text).T  # (B/W, B)
            per_text = logit_scale * text @ all_gather_with_grad(image).T
            positive = own_pairs(len(image), per_image.shape[1], image.device)
            if self.duplicates != "negative":
                if caption_ids is None:
                    raise ValueError(f"duplicates='{self.duplicates}' needs caption_ids")
                same = same_captions(caption_ids)
                if self.duplicates == "positive":
                    positive = same
                else:
                    left_out = same & ~positive
                    per_image = per_image.masked_fill(left_out, -torch.inf)
                    per_text = per_text.masked_fill(left_out, -torch.inf)
            return (_cross_entropy(per_image, positive) + _cross_entropy(per_text, positive)) / 2


def _cross_entropy(logits: torch.Tensor, positive: torch.Tensor) -> torch.Tensor:
    """Cross entropy with a target uniform over `positive`; logits and bool mask (B/W, B), a scalar out."""
    matched = torch.where(positive, logits, 0).sum(dim=1) / positive.sum(dim=1)
    return (logits.logsumexp(dim=1) - matched).mean()


@LOSSES.register("softmax")
@dataclass(frozen=True)
class SoftmaxLossConfig:
    """CLIP's softmax loss."""

    duplicates: Literal["auto", "negative", "ignore", "positive"] = "auto"
    """Pairs with an identical caption: negatives, left out, or positives. auto: positive for class prompts."""
    init_scale: float = 1 / 0.07
    """Initial factor on the cosine similarities."""
    max_logit_scale: float | None = 100.0
    """Clamp on the factor after each step, as in CLIP."""

    def initial_logits(self, global_batch_size: int) -> tuple[float, float | None]:
        return self.init_scale, None

    def chance_loss(self, global_batch_size: int) -> float:
        return math.log(global_batch_size)

    def build(self) -> SoftmaxLoss:
        return SoftmaxLoss("negative" if self.duplicates == "auto" else self.duplicates)
