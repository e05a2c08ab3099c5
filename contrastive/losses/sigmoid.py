"""The pairwise sigmoid loss of SigLIP (Zhai et al. 2023, "Sigmoid Loss for Language Image Pre-Training")."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
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


class SigmoidLoss(nn.Module):
    """−Σ log σ(±z) / B over all pairs, z = logit_scale · cos(image, text) + logit_bias (equation 1).

    Under several ranks each takes its own images against every text and divides by its local batch; averaged
    over ranks, as DistributedDataParallel averages gradients, that is the loss of the global batch.

    Args:
        duplicates: what a pair is whose caption equals the matching one: `negative` (as published), `ignore`
            (left out), or `positive`.
    """

    def __init__(self, duplicates: Duplicates = "negative"):
        super().__init__()
        self.duplicates = duplicates

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
            ValueError: shapes or types of the features disagree, or logit_bias or caption_ids is missing.
        """
        check_features(image_features, text_features)
        if logit_bias is None:
            raise ValueError("SigmoidLoss needs a logit_bias: build the model with init_logit_bias")
        with torch.autocast(image_features.device.type, enabled=False):
            image, text = full_precision(image_features), full_precision(text_features)
            logits = logit_scale * image @ all_gather_with_grad(text).T + logit_bias
            own = own_pairs(len(image), logits.shape[1], logits.device)
            if self.duplicates == "negative":
                positive, counted = own, None
            elif caption_ids is None:
                raise ValueError(f"duplicates='{self.duplicates}' needs caption_ids")
            else:
                same = same_captions(caption_ids)
                positive = same if self.duplicates == "positive" else own
                counted = own | ~same if self.duplicates == "ignore" else None
            terms = F.logsigmoid(torch.where(positive, logits, -logits))
            if counted is not None:
                terms = terms * counted
            return -terms.sum() / len(image)


@LOSSES.register("sigmoid")
@dataclass(frozen=True)
class SigmoidLossConfig:
    """SigLIP's pairwise sigmoid loss."""

    duplicates: Literal["auto", "negative", "ignore", "positive"] = "auto"
    """Pairs with an identical caption: negatives, left out, or positives. auto: positive for class prompts."""
    init_scale: float = 10.0
    """Initial factor on the cosine similarities."""
    init_bias: float | None = None
    """Initial bias; none: the log-odds of a match, −log(batch − 1), but at least −10."""
    max_logit_scale: float | None = None
    """Clamp on the factor after each step; published SigLIP has none."""

    def initial_logits(self, global_batch_size: int) -> tuple[float, float | None]:
        if self.init_bias is not None:
            return self.init_scale, self.init_bias
        return self.init_scale, max(-math.log(max(global_batch_size - 1, 1)), -10.0)

    def chance_loss(self, global_batch_size: int) -> float:
        """The best constant logit is the log-odds of a match: log B + (B − 1)·log(B / (B − 1))."""
        batch = max(global_batch_size, 2)
        return math.log(batch) + (batch - 1) * math.log(batch / (batch - 1))

    def build(self) -> SigmoidLoss:
        return SigmoidLoss("negative" if self.duplicates == "auto" else self.duplicates)
