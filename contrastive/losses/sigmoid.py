"""The pairwise sigmoid loss of SigLIP (Zhai et al. 2023, "Sigmoid Loss for Language Image Pre-Training")."""

import math
from dataclasses import dataclass
from typing import Literal

import torch

from contrastive.losses.all_pairs import LN_2, LOG2_E, AllPairs, PairLoss, Tile
from contrastive.option_types import Positive


class SigmoidLoss(PairLoss):
    """−Σ log σ(±z) / B over all pairs, z = logit_scale · cos(image, text) + logit_bias (equation 1)."""

    def check_bias(self, logit_bias: torch.Tensor | None) -> None:
        if logit_bias is None:
            raise ValueError("SigmoidLoss needs a logit_bias: build the model with init_logit_bias")

    def sums(self, pairs: AllPairs) -> tuple[torch.Tensor, torch.Tensor]:
        """Return Σ −log σ(±z) over this rank's rows, and Σ ∂/∂z: three matrix products a tile, in one sweep.

        The gradient of a logit, σ(z) minus 1 for a match, needs no normaliser, so it is known as soon as the logit is.
        """
        loss_sum = torch.zeros((), dtype=torch.float64, device=pairs.image.device)
        bias_sum = torch.zeros_like(loss_sum)
        for tile in pairs.tiles(sigmoid_tile, gradients=True):
            loss, logit_gradient_sum, logit_gradient = sigmoid_tile(tile, pairs.scale, pairs.bias, any(pairs.wants))
            loss_sum += loss
            if logit_gradient is not None:
                bias_sum += logit_gradient_sum
                tile.add_gradient(logit_gradient)
        return loss_sum, bias_sum


def sigmoid_tile(tile: Tile, scale: torch.Tensor, bias: torch.Tensor, gradient: bool):
    """Return (Σ −log σ(±z), Σ ∂/∂z, ∂/∂z) of z = scale · x·yᵀ + bias, the sums as 0-dim float64.

    Args:
        scale, bias: 0-dim, float32 at least.
        gradient: whether the last two are wanted, else None. ∂/∂z (r, c) is valid until the next tile.
    """
    if tile.kernels is not None:
        return tile.kernels.sigmoid_tile(tile, scale, bias, gradient)
    z, *work = tile.matrices(4)
    torch.mm(tile.x * scale, tile.y.T, out=z)
    z += bias
    # A matching pair costs −log σ(z), the others −log σ(−z): with the sign of the former turned, all do.
    # Its gradient, σ(z) − 1, is −σ(−z), which unlike the difference keeps its digits when it is small.
    if tile.duplicates == "positive":
        sign = torch.where(tile.same(), -1.0, 1.0).to(z.dtype)
        z *= sign
    else:
        tile.own(z).neg_()
    if tile.duplicates == "ignore":
        z.masked_fill_(tile.left_out(), -torch.inf)
    loss = _softplus_sum(z, *work)
    if not gradient:
        return loss, None, None
    z.sigmoid_()
    if tile.duplicates == "positive":
        z *= sign
    else:
        tile.own(z).neg_()
    return loss, _sum(z), z


def _softplus_sum(z, e, u, rest) -> torch.Tensor:
    """Return Σ log(1 + e^z) as 0-dim float64, of z (r, c); the others, of the shape of z, are overwritten.

    It is max(z, 0) + log(1 + e), e = exp(−|z|). torch's log1p is five times as slow as its log2 on a CPU, so
    what rounding u = 1 + e loses is added back (Kahan): log(1 + e) = log u + (e − (u − 1)) / u.
    exp2 is likewise three times as fast as exp.
    """
    torch.abs(z, out=e).mul_(-LOG2_E).exp2_()
    torch.add(e, 1, out=u)
    torch.sub(u, 1, out=rest)
    torch.sub(e, rest, out=rest).div_(u)
    return _sum(rest) + _sum(u.log2_()) * LN_2 + _sum(torch.clamp(z, min=0, out=e))


def _sum(matrix: torch.Tensor) -> torch.Tensor:
    """Sum rows in the type of the matrix, which is fast, and these sums in float64, which is exact enough."""
    return matrix.sum(1).sum(dtype=torch.float64)


@dataclass(frozen=True)
class SigmoidLossConfig:
    """SigLIP's pairwise sigmoid loss."""

    duplicates: Literal["auto", "negative", "ignore", "positive"] = "auto"
    """Pairs with an identical caption: negatives, left out, or positives. auto: positive for class prompts."""
    max_logit_scale: Positive[float | None] = None
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
