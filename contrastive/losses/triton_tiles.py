"""Tiles on a GPU: each call is one matrix product, and all that a loss needs is taken from its accumulator."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import triton
from triton.compiler.errors import CompileTimeAssertionFailure
from triton.runtime.errors import OutOfResources, PTXASError

from contrastive.losses.all_pairs import Tile
from contrastive.losses.triton_kernels import (
    MIN_BLOCK,
    merge_log_sum_exp_kernel,
    sigmoid_kernel,
    softmax_gradient_kernel,
    softmax_statistics_kernel,
    suitable,
)

KERNELS = {
    "sigmoid_tile": sigmoid_kernel,
    "statistics_tile": softmax_statistics_kernel,
    "gradient_tile": softmax_gradient_kernel,
}
"""The kernel behind each method of TritonTiles."""
TOO_LARGE = (OutOfResources, CompileTimeAssertionFailure, PTXASError)
"""What a configuration that this GPU has no room for ends with: Triton then chooses among the others."""

GRADIENT_ALIGNMENT = 16
"""Columns that a row of the gradient is padded up to: wide stores here, aligned products after."""


class TritonTiles:
    """The tiles of sigmoid.py and softmax.py, for bfloat16 or float32 features of a GPU, any row stride, last stride 1.

    What the methods take and return is said there, at the function of the same name; here scalars and vectors are
    float32, and the rows of a gradient have a stride of c or a little more. The logits exist in registers alone, in
    float32. Nothing waits for the device, and after one call of each kind, which compiles and times its kernel, calls
    can be captured in a CUDA graph.

    Args:
        like: features that give device and type. rows, columns: size of the largest tile.
    """

    def __init__(self, like: torch.Tensor, rows: int, columns: int):
        blocks_m, blocks_n = triton.cdiv(rows, MIN_BLOCK), triton.cdiv(columns, MIN_BLOCK)
        self._gradient = like.new_empty(rows * _padded(columns))
        self._sums = like.new_empty(2 * blocks_m * blocks_n, dtype=torch.float32)
        self._row_partials = like.new_empty(3 * blocks_n * rows, dtype=torch.float32)
        self._column_partials = like.new_empty(2 * blocks_m * columns, dtype=torch.float32)

    def sigmoid_tile(self, tile: Tile, scale, bias, gradient: bool):
        """Σ −log σ(±z), Σ ∂/∂z, and ∂/∂z in the type of the features."""
        blocks_m, blocks_n = _launch(
            sigmoid_kernel, tile, scale=scale, bias=bias, gradient=self._gradient, sums=self._sums,
            gradient_stride=_padded(len(tile.y)), GRADIENT=gradient,
        )  # fmt: skip
        sums = self._sums[: 2 * blocks_m * blocks_n].view(-1, 2)
        if not gradient:
            return sums[:, 0].sum(dtype=torch.float64), None, None
        loss, gradient_sum = sums.sum(0, dtype=torch.float64)
        return loss, gradient_sum, self._gradient_of(tile)

    def statistics_tile(self, tile: Tile, scale):
        """Log-sum-exps of rows and columns, to the base 2, and Σ of matched logits or None; all float64."""
        blocks_m, blocks_n = _launch(
            softmax_statistics_kernel, tile, scale=scale,
            row_partials=self._row_partials, column_partials=self._column_partials,
        )  # fmt: skip
        rows = len(tile.x)
        row_lse = _merge_log_sum_exp(self._row_partials, blocks_n, rows)
        column_lse = _merge_log_sum_exp(self._column_partials, blocks_m, len(tile.y))
        if tile.duplicates != "positive":
            return row_lse, column_lse, None
        matched = self._row_partials[: 3 * blocks_n * rows].view(3, blocks_n, rows)[2]
        return row_lse, column_lse, matched.sum(0, dtype=torch.float64)

    def gradient_tile(self, tile: Tile, scale, row_lse, column_lse, matched) -> torch.Tensor:
        """½ (P_rows + P_columns) − target, in the type of the features."""
        _launch(
            softmax_gradient_kernel, tile, scale=scale, row_lse=row_lse, column_lse=column_lse, matched=matched,
            gradient=self._gradient, gradient_stride=_padded(len(tile.y)),
        )  # fmt: skip
        return self._gradient_of(tile)

    def _gradient_of(self, tile: Tile) -> torch.Tensor:
        rows, columns = len(tile.x), len(tile.y)
        stride = _padded(columns)
        return self._gradient[: rows * stride].view(rows, stride)[:, :columns]


def configurations(method: str, like: torch.Tensor) -> list[triton.Config]:
    """Return those of a method's kernel that may be chosen for the type of `like`."""
    every = KERNELS[method].configs
    return every if len(every) == 1 else suitable(every, None, like)


@contextmanager
def configured(method: str, configuration: triton.Config) -> Iterator[None]:
    """Let a method's kernel have this one configuration, which is then not timed."""
    kernel, every = KERNELS[method], KERNELS[method].configs
    kernel.configs = [configuration]
    try:
        yield
    finally:
        kernel.configs = every


def _padded(columns: int) -> int:
    return triton.cdiv(columns, GRADIENT_ALIGNMENT) * GRADIENT_ALIGNMENT


def _launch(kernel, tile: Tile, **arguments) -> tuple[int, int]:
    """Run a kernel over the blocks of a tile and return how many there are along rows and columns."""
    x, y, rows, columns = tile.x, tile.y, len(tile.x), len(tile.y)
    with torch.cuda.device_of(x):
        kernel[lambda meta: (triton.cdiv(rows, meta["BLOCK_M"]) * triton.cdiv(columns, meta["BLOCK_N"]),)](
            x=x,
            y=y,
            row_ids=tile.row_ids,
            column_ids=tile.column_ids,
            rows=rows,
            columns=columns,
            EMBED_DIM=x.shape[1],
            x_stride=x.stride(0),
            y_stride=y.stride(0),
            diagonal=tile.diagonal,
            size_class=(rows * columns).bit_length(),
            DUPLICATES=tile.duplicates,
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
