"""The softmax (InfoNCE) loss of CLIP (Radford et al. 2021, figure 3)."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from contrastive.distributed.collectives import all_gather_even, all_reduce_max, all_reduce_sum, world_size
from contrastive.losses.all_pairs import LN_2, LOG2_E, AllPairs, PairLoss, Tile, row_products
from contrastive.option_types import Positive


class SoftmaxLoss(PairLoss):
    """Mean of image-to-text and text-to-image cross entropy over the global batch.

    Each rank takes its own texts against every image too. With duplicates `positive` the target is uniform over all
    that match, as in UniCL, and an image may have K texts, of which each is a column.
    One sweep over tiles finds the normalisers, a second the gradients.
    """

    def check_bias(self, logit_bias: torch.Tensor | None) -> None:
        if logit_bias is not None:
            raise ValueError("SoftmaxLoss takes no logit_bias: it cancels, and would never get a gradient")

    def sums(self, pairs: AllPairs) -> tuple[torch.Tensor]:
        """Return Σ over this rank's pairs of the mean of both cross entropies: four matrix products a tile.

        The first sweep finds the log-sum-exps of rows and columns, the second, if any gradient is wanted, the gradient
        of both cross entropies together.
        """
        row_lse, column_lse, matched = _log_sum_exps(pairs)
        if pairs.duplicates == "positive":
            weight = _target_weight(pairs)
            of_columns = column_lse[pairs.own].view(len(row_lse), -1).mean(dim=1)
            loss_sum = ((row_lse + of_columns) / 2 - matched * weight).sum() * LN_2
            column_lse, matched = column_lse + math.log2(pairs.texts_each), weight  # each column counts 1 / K
        else:
            # The log-sum-exps lack the own logit, by which all is known of the loss and its gradient without
            # subtracting numbers near 1: −log p = softplus(others − own), p − 1 = −σ(others − own).
            own_logits = _own_logits(pairs)
            margins = torch.stack([row_lse - own_logits, column_lse[pairs.own] - own_logits]) * LN_2
            loss_sum = F.softplus(margins, threshold=700).sum() / 2  # by default it is cut at 20
            row_lse, column_lse = _with_own(row_lse, column_lse, own_logits)
            matched = -margins.sigmoid().mean(dim=0)
        if any(pairs.wants):
            row_lse, column_lse, matched = (vector.to(pairs.scale.dtype) for vector in (row_lse, column_lse, matched))
            for tile in pairs.tiles(gradient_tile, gradients=True):
                lse = row_lse[tile.rows], column_lse[tile.columns]
                tile.add_gradient(gradient_tile(tile, pairs.scale, *lse, matched[tile.rows]))
        return (loss_sum,)


def log_sum_exps(pairs: AllPairs) -> tuple[torch.Tensor, torch.Tensor]:
    """Return those of own rows (B/W,) and all columns (B,), all of their logits, base 2; for duplicates `negative`."""
    row_lse, column_lse, _ = _log_sum_exps(pairs)
    return _with_own(row_lse, column_lse, _own_logits(pairs))


def _own_logits(pairs: AllPairs) -> torch.Tensor:
    """Return the logits of this rank's pairs, base 2, float64 (B/W,)."""
    return row_products(pairs.image, pairs.text) * (pairs.scale.double() * LOG2_E)


def _with_own(row_lse, column_lse, own_logits):
    return torch.logaddexp2(row_lse, own_logits), torch.logaddexp2(column_lse, all_gather_even(own_logits))


def _log_sum_exps(pairs: AllPairs):
    """Return log-sum-exps of own rows (B/W,) and all columns (B,), and sums of matched logits (B/W,), base 2.

    All are float64. What they are of is said in `statistics_tile`.
    """
    nothing = {"dtype": torch.float64, "device": pairs.image.device}
    row_lse = torch.full((len(pairs.image),), -torch.inf, **nothing)
    column_lse = torch.full((world_size() * len(pairs.text),), -torch.inf, **nothing)
    matched = torch.zeros(len(pairs.image), **nothing)
    for tile in pairs.tiles(statistics_tile):
        of_rows, of_columns, tile_matched = statistics_tile(tile, pairs.scale)
        row_lse[tile.rows] = torch.logaddexp2(row_lse[tile.rows], of_rows)
        column_lse[tile.columns] = torch.logaddexp2(column_lse[tile.columns], of_columns)
        if tile_matched is not None:
            matched[tile.rows] += tile_matched
    if world_size() > 1:  # each rank has seen its own rows only
        largest = all_reduce_max(column_lse)
        largest = largest.masked_fill(largest == -torch.inf, 0)
        column_lse = all_reduce_sum((column_lse - largest).exp2()).log2() + largest
    return row_lse, column_lse, matched


def _target_weight(pairs: AllPairs) -> torch.Tensor:
    """Return one over the number of texts that match each of this rank's images, float64 (B/W,)."""
    ids = pairs.column_ids.sort().values
    count = torch.searchsorted(ids, pairs.row_ids, right=True) - torch.searchsorted(ids, pairs.row_ids)
    return 1 / count.double()


def statistics_tile(tile: Tile, scale: torch.Tensor):
    """Return the log-sum-exps of the rows (r,) and columns (c,) of a tile, and Σ of matched logits (r,) or None.

    All are float64, for they gather over many tiles, and of the logits to the base 2, scale · log₂e · x·yᵀ.
    With duplicates `positive` the matched logits are those of a row's positives. Otherwise there are none, and
    the log-sum-exps leave out each row's own pair: what a softmax near 1 lacks of 1 is known exactly only from
    the others.
    """
    if tile.kernels is not None:
        return tile.kernels.statistics_tile(tile, scale)
    z, work = tile.matrices(2)
    _base_two_logits(tile, scale, z)
    matched = None
    if tile.duplicates == "positive":
        matched = torch.mul(tile.same(), z, out=work).sum(1).double()
    else:
        tile.own(z).fill_(-torch.inf)
    return _log2_sum_exp2(z, work, dim=1), _log2_sum_exp2(z, work, dim=0), matched


def gradient_tile(tile: Tile, scale, row_lse, column_lse, matched) -> torch.Tensor:
    """Return ½ (P_rows + P_columns) − target of a tile: B times the gradient of the loss by scale · x·yᵀ.

    Args:
        row_lse, column_lse: (r,), (c,) to the base 2, of all logits of the whole batch.
        matched: (r,). With duplicates `positive`, the target of each of a row's positives. Otherwise the
            gradient of its own logit, to be put where it belongs instead of being computed here.
    """
    if tile.kernels is not None:
        return tile.kernels.gradient_tile(tile, scale, row_lse, column_lse, matched)
    z, work = tile.matrices(2)
    _base_two_logits(tile, scale, z)
    # The half goes into the exponent: 2^(z − 1) = ½ 2^z.
    torch.sub(z, (row_lse + 1)[:, None], out=work).exp2_()
    z.sub_(column_lse + 1).exp2_().add_(work)
    if tile.duplicates == "positive":
        z -= torch.mul(tile.same(), matched[:, None], out=work)
    else:
        tile.own(z).copy_(tile.own_rows(matched))
    return z


def _base_two_logits(tile: Tile, scale: torch.Tensor, out: torch.Tensor) -> None:
    torch.mm(tile.x * (scale * LOG2_E), tile.y.T, out=out)
    if tile.duplicates == "ignore":
        out.masked_fill_(tile.left_out(), -torch.inf)


def _log2_sum_exp2(z: torch.Tensor, work: torch.Tensor, dim: int) -> torch.Tensor:
    """Return log₂ Σ 2^z along `dim`, float64; work, of the shape of z, is overwritten."""
    largest = z.amax(dim, keepdim=True)
    largest.masked_fill_(largest == -torch.inf, 0)  # all left out: −inf − −inf would be NaN
    return torch.sub(z, largest, out=work).exp2_().sum(dim).double().log2_() + largest.squeeze(dim)


@dataclass(frozen=True)
class SoftmaxLossConfig:
    """CLIP's softmax loss."""

    duplicates: Literal["auto", "negative", "ignore", "positive"] = "auto"
    """Pairs with an identical caption: negatives, left out, or positives. auto: positive for class prompts."""
    max_logit_scale: Positive[float | None] = 100.0
    """Clamp on the factor after each step, as in CLIP."""

    def initial_logits(self, global_batch_size: int) -> tuple[float, float | None]:
        return 1 / 0.07, None

    def chance_loss(self, global_batch_size: int) -> float:
        return math.log(global_batch_size)

    def build(self) -> SoftmaxLoss:
        return SoftmaxLoss("negative" if self.duplicates == "auto" else self.duplicates)
