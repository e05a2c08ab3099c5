"""One tile of the logits at a time, in plain torch: what a loss needs of it, and the gradient of its logits.

The two features of a tile are x (r, E), some rows of the batch, and y (c, E), some of its columns. A tile lives
in buffers that the next call overwrites, so the memory of a sweep does not grow with the batch.
"""

import math
from dataclasses import dataclass

import torch

from contrastive.losses.base import Duplicates

LOG2_E = math.log2(math.e)
LN_2 = math.log(2)


@dataclass(frozen=True)
class TilePairs:
    """Which entries of a tile belong together."""

    diagonal: int
    """Row i of the tile matches its column i + diagonal, where the tile has such a column."""
    duplicates: Duplicates = "negative"
    row_ids: torch.Tensor | None = None
    """Caption ids (r,) int64, equal where captions are; None when duplicates is `negative`."""
    column_ids: torch.Tensor | None = None
    """Likewise (c,)."""

    def own(self, tile: torch.Tensor) -> torch.Tensor:
        """Return the matching entries of a tile (r, c) as a view (n,); n may be 0."""
        return tile.diagonal(self.diagonal) if -len(tile) < self.diagonal < tile.shape[1] else tile[:0, 0]

    def own_rows(self, values: torch.Tensor, columns: int) -> torch.Tensor:
        """Return the values, of (r,), of rows that have their match among `columns`, as a view (n,)."""
        return values[max(0, -self.diagonal) : max(0, columns - self.diagonal)]

    def same(self) -> torch.Tensor:
        """Return which captions are equal, bool (r, c)."""
        return self.row_ids[:, None] == self.column_ids

    def left_out(self) -> torch.Tensor:
        """Return which pairs have equal captions without being a pair of the data set, bool (r, c)."""
        mask = self.same()
        self.own(mask).fill_(False)
        return mask


class TorchTiles:
    """Tiles on any device that torch knows, in float32 or float64.

    Args:
        like: features that give device and type. rows, columns: size of the largest tile.
    """

    def __init__(self, like: torch.Tensor, rows: int, columns: int):
        self.rows, self.columns = rows, columns
        self._like, self._buffers = like, []

    def sigmoid(self, x, y, scale, bias, pairs: TilePairs, gradient: bool):
        """Return (Σ −log σ(±z), Σ ∂/∂z, ∂/∂z) of z = scale · x·yᵀ + bias, the sums as 0-dim float64.

        Args:
            x: (r, E). y: (c, E). scale, bias: 0-dim, of the type of the features.
            gradient: whether the last two are wanted, else None.
        """
        z, *work = self._views(len(x), len(y), 4)
        torch.mm(x * scale, y.T, out=z)
        z += bias
        # A matching pair costs −log σ(z), the others −log σ(−z): with the sign of the former turned, all do.
        # Its gradient, σ(z) − 1, is −σ(−z), which unlike the difference keeps its digits when it is small.
        if pairs.duplicates == "positive":
            sign = torch.where(pairs.same(), -1.0, 1.0).to(z.dtype)
            z *= sign
        else:
            pairs.own(z).neg_()
        if pairs.duplicates == "ignore":
            z.masked_fill_(pairs.left_out(), -torch.inf)
        loss = _softplus_sum(z, *work)
        if not gradient:
            return loss, None, None
        z.sigmoid_()
        if pairs.duplicates == "positive":
            z *= sign
        else:
            pairs.own(z).neg_()
        return loss, _sum(z), z

    def softmax_statistics(self, x, y, scale, pairs: TilePairs):
        """Return the log-sum-exps of the rows (r,) and columns (c,) of a tile, and Σ of matched logits (r,) or None.

        All are float64, for they gather over many tiles, and of the logits to the base 2, scale · log₂e · x·yᵀ.
        With duplicates `positive` the matched logits are those of a row's positives. Otherwise there are none, and
        the log-sum-exps leave out each row's own pair: what a softmax near 1 lacks of 1 is known exactly only from
        the others.
        """
        z, work = self._views(len(x), len(y), 2)
        self._base_two_logits(x, y, scale, pairs, z)
        matched = None
        if pairs.duplicates == "positive":
            matched = torch.mul(pairs.same(), z, out=work).sum(1).double()
        else:
            pairs.own(z).fill_(-torch.inf)
        return _log2_sum_exp2(z, work, dim=1), _log2_sum_exp2(z, work, dim=0), matched

    def softmax_gradient(self, x, y, scale, row_lse, column_lse, matched, pairs: TilePairs) -> torch.Tensor:
        """Return ½ (P_rows + P_columns) − target of a tile: B times the gradient of the loss by scale · x·yᵀ.

        Args:
            row_lse, column_lse: (r,), (c,) to the base 2, of all logits of the whole batch.
            matched: (r,). With duplicates `positive`, the target of each of a row's positives. Otherwise the
                gradient of its own logit, to be put where it belongs instead of being computed here.
        """
        z, work = self._views(len(x), len(y), 2)
        self._base_two_logits(x, y, scale, pairs, z)
        # The half goes into the exponent: 2^(z − 1) = ½ 2^z.
        torch.sub(z, (row_lse + 1)[:, None], out=work).exp2_()
        z.sub_(column_lse + 1).exp2_().add_(work)
        if pairs.duplicates == "positive":
            z -= torch.mul(pairs.same(), matched[:, None], out=work)
        else:
            pairs.own(z).copy_(pairs.own_rows(matched, len(y)))
        return z

    def _base_two_logits(self, x, y, scale, pairs, out) -> None:
        torch.mm(x * (scale * LOG2_E), y.T, out=out)
        if pairs.duplicates == "ignore":
            out.masked_fill_(pairs.left_out(), -torch.inf)

    def _views(self, rows: int, columns: int, count: int) -> list[torch.Tensor]:
        while len(self._buffers) < count:
            self._buffers.append(self._like.new_empty(self.rows * self.columns))
        return [buffer[: rows * columns].view(rows, columns) for buffer in self._buffers]


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


def _log2_sum_exp2(z: torch.Tensor, work: torch.Tensor, dim: int) -> torch.Tensor:
    """Return log₂ Σ 2^z along `dim`, float64; work, of the shape of z, is overwritten."""
    largest = z.amax(dim, keepdim=True)
    largest.masked_fill_(largest == -torch.inf, 0)  # all left out: −inf − −inf would be NaN
    return torch.sub(z, largest, out=work).exp2_().sum(dim).double().log2_() + largest.squeeze(dim)


def _sum(matrix: torch.Tensor) -> torch.Tensor:
    """Sum rows in the type of the matrix, which is fast, and these sums in float64, which is exact enough."""
    return matrix.sum(1).sum(dtype=torch.float64)
