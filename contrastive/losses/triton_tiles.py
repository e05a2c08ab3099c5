"""Tiles on a GPU: each call is one matrix product, and all that a loss needs is taken from its accumulator."""

import torch
import triton

from contrastive.losses.tiles import TilePairs
from contrastive.losses.triton_kernels import (
    MIN_BLOCK,
    merge_log_sum_exp_kernel,
    sigmoid_kernel,
    softmax_gradient_kernel,
    softmax_statistics_kernel,
)

GRADIENT_ALIGNMENT = 16
"""Columns that a row of the gradient is padded up to: wide stores here, aligned products after."""


class TritonTiles:
    """What TorchTiles does, for bfloat16 or float32 features (…, E) of a GPU, any row stride, last stride 1.

    The logits exist in registers alone, in float32. Nothing waits for the device, and after one call of each kind,
    which compiles and times its kernel, calls can be captured in a CUDA graph.

    Args:
        like: features that give device and type. rows, columns: size of the largest tile.
    """

    def __init__(self, like: torch.Tensor, rows: int, columns: int):
        self.rows, self.columns = rows, columns
        blocks_m, blocks_n = triton.cdiv(rows, MIN_BLOCK), triton.cdiv(columns, MIN_BLOCK)
        self._gradient = like.new_empty(rows * _padded(columns))
        self._sums = like.new_empty(2 * blocks_m * blocks_n, dtype=torch.float32)
        self._row_partials = like.new_empty(3 * blocks_n * rows, dtype=torch.float32)
        self._column_partials = like.new_empty(2 * blocks_m * columns, dtype=torch.float32)

    def sigmoid(self, x, y, scale, bias, pairs: TilePairs, gradient: bool):
        """Return (Σ −log σ(±z), Σ ∂/∂z, ∂/∂z) of z = scale · x·yᵀ + bias, the sums as 0-dim float64.

        Args:
            x: (r, E). y: (c, E), of the type of x. scale, bias: 0-dim float32, on the device of the features.
            gradient: whether the last two are wanted, else None. ∂/∂z (r, c) has the type of x, and its rows a
                stride of c or a little more.
        """
        blocks_m, blocks_n = _launch(
            sigmoid_kernel, x, y, pairs, scale=scale, bias=bias, gradient=self._gradient, sums=self._sums,
            gradient_stride=_padded(len(y)), GRADIENT=gradient,
        )  # fmt: skip
        sums = self._sums[: 2 * blocks_m * blocks_n].view(-1, 2)
        if not gradient:
            return sums[:, 0].sum(dtype=torch.float64), None, None
        loss, gradient_sum = sums.sum(0, dtype=torch.float64)
        return loss, gradient_sum, self._gradient_view(x, y)

    def softmax_statistics(self, x, y, scale, pairs: TilePairs):
        """Return the log-sum-exps of the rows (r,) and columns (c,) of a tile, and Σ of matched logits (r,) or None.

        All are float64, for they gather over many tiles, and of the logits to the base 2, scale · log₂e · x·yᵀ.
        With duplicates `positive` the matched logits are those of a row's positives. Otherwise there are none, and
        the log-sum-exps leave out each row's own pair.
        """
        blocks_m, blocks_n = _launch(
            softmax_statistics_kernel, x, y, pairs, scale=scale,
            row_partials=self._row_partials, column_partials=self._column_partials,
        )  # fmt: skip
        row_lse = _merge_log_sum_exp(self._row_partials, blocks_n, len(x))
        column_lse = _merge_log_sum_exp(self._column_partials, blocks_m, len(y))
        if pairs.duplicates != "positive":
            return row_lse, column_lse, None
        matched = self._row_partials[: 3 * blocks_n * len(x)].view(3, blocks_n, len(x))[2]
        return row_lse, column_lse, matched.sum(0, dtype=torch.float64)

    def softmax_gradient(self, x, y, scale, row_lse, column_lse, matched, pairs: TilePairs) -> torch.Tensor:
        """Return ½ (P_rows + P_columns) − target of a tile, (r, c) as above: B times the gradient of the loss by z.

        Args:
            row_lse, column_lse: (r,), (c,) float32, to the base 2, of all logits of the whole batch.
            matched: (r,) float32. With duplicates `positive`, the target of each of a row's positives. Otherwise
                the gradient of its own logit, to be put where it belongs instead of being computed here.
        """
        _launch(
            softmax_gradient_kernel, x, y, pairs, scale=scale, row_lse=row_lse, column_lse=column_lse,
            matched=matched, gradient=self._gradient, gradient_stride=_padded(len(y)),
        )  # fmt: skip
        return self._gradient_view(x, y)

    def _gradient_view(self, x, y) -> torch.Tensor:
        stride = _padded(len(y))
        return self._gradient[: len(x) * stride].view(len(x), stride)[:, : len(y)]


def _padded(columns: int) -> int:
    return triton.cdiv(columns, GRADIENT_ALIGNMENT) * GRADIENT_ALIGNMENT


def _launch(kernel, x, y, pairs: TilePairs, **arguments) -> tuple[int, int]:
    """Run a kernel over the blocks of a tile and return how many there are along rows and columns."""
    rows, columns = len(x), len(y)
    with torch.cuda.device_of(x):
        kernel[lambda meta: (triton.cdiv(rows, meta["BLOCK_M"]) * triton.cdiv(columns, meta["BLOCK_N"]),)](
            x=x,
            y=y,
            row_ids=pairs.row_ids,
            column_ids=pairs.column_ids,
            rows=rows,
            columns=columns,
            EMBED_DIM=x.shape[1],
            x_stride=x.stride(0),
            y_stride=y.stride(0),
            diagonal=pairs.diagonal,
            size_class=(rows * columns).bit_length(),
            DUPLICATES=pairs.duplicates,
            PRECISION="tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee",
            enable_fp_fusion=True,  # which Triton will turn off by default: the epilogue would grow
            **arguments,
        )
    blocks = kernel.best_config.kwargs
    return triton.cdiv(rows, blocks["BLOCK_M"]), triton.cdiv(columns, blocks["BLOCK_N"])


def _merge_log_sum_exp(partials: torch.Tensor, blocks: int, length: int) -> torch.Tensor:
    """Return the log-sum-exps (length,), float64, of partials that start with (2, blocks, length)."""
    lse = partials.new_empty(length, dtype=torch.float64)
    padded_blocks = triton.next_power_of_2(blocks)
    block = max(16, 2048 // padded_blocks)
    with torch.cuda.device_of(partials):
        merge_log_sum_exp_kernel[(triton.cdiv(length, block),)](
            partials, lse, blocks, length, BLOCKS=padded_blocks, BLOCK=block
        )
    return lse
