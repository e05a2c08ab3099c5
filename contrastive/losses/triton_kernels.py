"""The kernels of TritonTiles: one product of features each, and the loss in its epilogue, on the accumulator.

A program makes one block (BLOCK_M, BLOCK_N) of a tile (r, c). What it sums goes to slots of its own, which the
caller adds up: no atomics, so the same call gives the same bits.

The epilogue is what such a kernel adds to a plain product, so it is kept short:

- Logits are to the base 2, since exp2 is one instruction and exp is two.
- Special functions (exp2, 1/√x) come at 16 per clock and multiprocessor, multiplications at 128: at most two of
  the former an entry.
- The few blocks that touch the diagonal or stick out of the tile are labelled in a branch that the rest skip.
"""

import math

import torch
import triton
import triton.language as tl

LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2))
GROUP_M = tl.constexpr(8)
"""Rows of blocks that run together: what they read of x and y stays in the L2 cache."""

SWIZZLE_BYTES = 128
"""A row of an operand's block in shared memory: what wgmma reads without bank conflicts."""
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
"""Whether kernels run as Python on a CPU, for tests."""


def _configurations() -> list[triton.Config]:
    if INTERPRETED.value:  # timing an interpreter is no use
        return [triton.Config({"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 16})]
    # Hopper: warps, stages and registers are such that two blocks of 128 x 128, or three of 128 x 64, share a
    # multiprocessor, of which one runs its epilogue while another multiplies. 128 x 256 reads less. The last two
    # are for small tiles, and for float32 without the tensor cores.
    shapes = [
        (128, 256, 8, 3, None),
        (128, 128, 8, 3, 128),
        (128, 128, 4, 3, None),
        (128, 64, 4, 3, 168),
        (64, 128, 4, 4, None),
        (64, 64, 4, 4, None),
    ]
    return [
        triton.Config({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k}, num_warps=warps, num_stages=stages, maxnreg=registers)
        for k in (SWIZZLE_BYTES // 2, SWIZZLE_BYTES // 4)
        for m, n, warps, stages, registers in shapes
    ]


CONFIGURATIONS = _configurations()
MIN_BLOCK = min(min(c.kwargs["BLOCK_M"], c.kwargs["BLOCK_N"]) for c in CONFIGURATIONS)
"""What the slots of partial results are counted by."""


def suitable(configs: list[triton.Config], _, x: torch.Tensor, **__) -> list[triton.Config]:
    """Keep the configurations whose BLOCK_K fits the type of the features."""
    return [c for c in configs if c.kwargs["BLOCK_K"] * x.element_size() == SWIZZLE_BYTES]


def _tuned(kernel):
    """Compile a kernel over blocks of a tile, with the fastest configuration for each kind of tile."""
    # `diagonal`, and the size of the last tile, take many values: none is worth a compilation. size_class stands for
    # the size in the key: kernels ignore it.
    kernel = triton.jit(kernel, do_not_specialize=["rows", "columns", "size_class", "diagonal"])
    return triton.autotune(
        configs=CONFIGURATIONS,
        key=[a for a in ("size_class", "EMBED_DIM", "DUPLICATES", "GRADIENT") if a in kernel.arg_names],  # and types
        prune_configs_by={"early_config_prune": suitable},
    )(kernel)


@triton.jit
def _block_numbers(rows, columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return the row and the column of this program's block among the blocks of the tile."""
    program = tl.program_id(0)
    blocks_m = tl.cdiv(rows, BLOCK_M)
    blocks_n = tl.cdiv(columns, BLOCK_N)
    group = program // (GROUP_M * blocks_n)
    within = program % (GROUP_M * blocks_n)
    height = tl.minimum(blocks_m - group * GROUP_M, GROUP_M)
    return group * GROUP_M + within % height, within // height


@triton.jit
def _product(
    x, y, i, j, rows, columns, x_stride, y_stride,
    EMBED_DIM: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return x[i] · y[j]ᵀ in float32. Rows past the end repeat the last one; the caller leaves them out.

    EMBED_DIM is a constant, so that the loop unrolls and its addresses need no arithmetic.
    """
    k = tl.arange(0, BLOCK_K)
    x_block = x + tl.minimum(i, rows - 1).to(tl.int64)[:, None] * x_stride + k[None, :]
    y_block = y + tl.minimum(j, columns - 1).to(tl.int64)[None, :] * y_stride + k[:, None]
    accumulator = tl.zeros((i.shape[0], j.shape[0]), tl.float32)
    for start in range(0, EMBED_DIM, BLOCK_K):
        if EMBED_DIM % BLOCK_K == 0:
            a = tl.load(x_block)
            b = tl.load(y_block)
        else:
            inside = k < EMBED_DIM - start
            a = tl.load(x_block, mask=inside[None, :], other=0.0)
            b = tl.load(y_block, mask=inside[:, None], other=0.0)
        if INTERPRETED:  # which knows no product of bfloat16
            a, b = a.to(tl.float32), b.to(tl.float32)
        accumulator = tl.dot(a, b, accumulator, input_precision=PRECISION)
        x_block += BLOCK_K
        y_block += BLOCK_K
    return accumulator


@triton.jit
def _is_special(
    block_m, block_n, rows, columns, diagonal,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DUPLICATES: tl.constexpr,
):  # fmt: skip
    """Return whether a block may hold anything but negatives: entries (i, i + diagonal), or past the tile's end."""
    first = block_m * BLOCK_M + diagonal
    on_diagonal = (first < (block_n + 1) * BLOCK_N) & (block_n * BLOCK_N < first + BLOCK_M)
    past_end = ((block_m + 1) * BLOCK_M > rows) | ((block_n + 1) * BLOCK_N > columns)
    return on_diagonal | past_end | (DUPLICATES != "negative")


@triton.jit
def _labels(i, j, rows, columns, diagonal, row_ids, column_ids, DUPLICATES: tl.constexpr):
    """Return which entries of a block are positives, and which count at all: bool (BLOCK_M, BLOCK_N)."""
    positive = (i + diagonal)[:, None] == j[None, :]
    counted = (i < rows)[:, None] & (j < columns)[None, :]
    if DUPLICATES != "negative":
        row_id = tl.load(row_ids + i, mask=i < rows, other=0)
        column_id = tl.load(column_ids + j, mask=j < columns, other=0)
        same = row_id[:, None] == column_id[None, :]
        if DUPLICATES == "positive":
            positive = same
        else:
            counted = counted & (positive | ~same)
    return positive, counted


@triton.jit
def _store_gradient(gradient, values, i, j, rows, gradient_stride):
    """Store a block of ∂/∂z, rounded once. Its rows are padded up to their stride, so that stores are wide."""
    target = gradient + i.to(tl.int64)[:, None] * gradient_stride + j[None, :]
    tl.store(target, values.to(gradient.dtype.element_ty), mask=(i < rows)[:, None] & (j < gradient_stride)[None, :])


@triton.jit
def _joint_excess(e):
    """Return Π (1 + e) − 1 over the two halves of each row of e (m, n): (m, n/2)."""
    # Halves, since the columns that a thread holds of an accumulator lie far apart: no value changes threads.
    a, b = tl.split(tl.permute(tl.reshape(e, (e.shape[0], 2, e.shape[1] // 2)), (0, 2, 1)))
    return a * b + (a + b)


@triton.jit
def _log2_one_plus(e):
    """Return log₂ Π (1 + e) over each 16 entries of a row of e (m, n) in [0, 1]: (m, n/16).

    It keeps float32's relative precision however small e is. The instruction for log₂ does not, just above 1, and
    tl.log2, which does, is some 20 operations: so 16 entries share one, at two operations each. What rounding
    u = 1 + q loses is added back (Kahan): log(1 + q) = log u + (q − (u − 1)) / u.
    """
    q = _joint_excess(_joint_excess(_joint_excess(_joint_excess(e))))
    u = 1 + q
    return tl.log2(u) + (q - (u - 1)) / u * LOG2_E


@_tuned
def sigmoid_kernel(
    x, y, scale, bias, row_ids, column_ids, gradient, sums,
    rows, columns, x_stride, y_stride, gradient_stride, diagonal, size_class,
    DUPLICATES: tl.constexpr, GRADIENT: tl.constexpr, EMBED_DIM: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Write Σ −log σ(±z) and Σ ∂/∂z of each block to sums (programs, 2), and ∂/∂z to gradient (r, ≥ c)."""
    block_m, block_n = _block_numbers(rows, columns, BLOCK_M, BLOCK_N)
    i = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    j = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    factor = tl.load(scale) * LOG2_E
    offset = tl.load(bias) * LOG2_E
    z = _product(x, y, i, j, rows, columns, x_stride, y_stride, EMBED_DIM, BLOCK_K, PRECISION)
    z = z * factor + offset
    special = _is_special(block_m, block_n, rows, columns, diagonal, BLOCK_M, BLOCK_N, DUPLICATES)
    # With the sign of positives turned every entry costs softplus(z), and nothing where z is −inf.
    if special:
        positive, counted = _labels(i, j, rows, columns, diagonal, row_ids, column_ids, DUPLICATES)
        z = tl.where(counted, tl.where(positive, -z, z), float("-inf"))
    e = tl.exp2(-tl.abs(z))
    # Sums over warps come last: their barriers would keep z and e in registers.
    loss = tl.sum(_log2_one_plus(e), 1) + tl.sum(tl.maximum(z, 0.0), 1)
    slot = sums + 2 * tl.program_id(0)
    if GRADIENT:
        # σ(z) is 1/(1 + e) or e/(1 + e), by the sign of z, which keeps its digits when it is small. The quotient
        # is (1/√u)²: a bare instruction and a product, where a division also minds the range of its divisor.
        root = tl.rsqrt(1 + e)
        g = tl.where(z > 0, 1.0, e) * (root * root)
        if special:
            positive, counted = _labels(i, j, rows, columns, diagonal, row_ids, column_ids, DUPLICATES)
            g = tl.where(positive, -g, g)
        tl.store(slot + 1, tl.sum(g))
        _store_gradient(gradient, g, i, j, rows, gradient_stride)
    tl.store(slot, tl.sum(loss) * LN_2)


@triton.jit
def _store_log_sum_exp(z, maxima, sums, index, length, AXIS: tl.constexpr):
    """Write the maximum m of z along an axis, and Σ 2^(z − m), to the slots `index` < length."""
    largest = tl.max(z, AXIS)
    shift = tl.where(largest == float("-inf"), 0.0, largest)  # all left out: −inf − −inf would be NaN
    total = tl.sum(tl.exp2(z - tl.expand_dims(shift, AXIS)), AXIS)
    tl.store(maxima + index, largest, mask=index < length)
    tl.store(sums + index, total, mask=index < length)


@_tuned
def softmax_statistics_kernel(
    x, y, scale, row_ids, column_ids, row_partials, column_partials,
    rows, columns, x_stride, y_stride, diagonal, size_class,
    DUPLICATES: tl.constexpr, EMBED_DIM: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Write what merges into the log-sum-exps of rows and columns, and into sums of each row's matched logits.

    Maxima and sums of powers go to row_partials (3, blocks along c, r) and column_partials (2, blocks along r, c).
    The last third of row_partials is for matched logits, and only with duplicates `positive`.
    """
    block_m, block_n = _block_numbers(rows, columns, BLOCK_M, BLOCK_N)
    i = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    j = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    factor = tl.load(scale) * LOG2_E
    z = _product(x, y, i, j, rows, columns, x_stride, y_stride, EMBED_DIM, BLOCK_K, PRECISION) * factor
    row_maxima = row_partials + block_n.to(tl.int64) * rows
    row_sums = row_maxima + tl.cdiv(columns, BLOCK_N).to(tl.int64) * rows
    if _is_special(block_m, block_n, rows, columns, diagonal, BLOCK_M, BLOCK_N, DUPLICATES):
        positive, counted = _labels(i, j, rows, columns, diagonal, row_ids, column_ids, DUPLICATES)
        if DUPLICATES == "positive":
            row_matched = row_sums + tl.cdiv(columns, BLOCK_N).to(tl.int64) * rows
            tl.store(row_matched + i, tl.sum(tl.where(positive & counted, z, 0.0), 1), mask=i < rows)
        else:
            counted = counted & ~positive
        z = tl.where(counted, z, float("-inf"))
    _store_log_sum_exp(z, row_maxima, row_sums, i, rows, 1)
    column_maxima = column_partials + block_m.to(tl.int64) * columns
    column_sums = column_maxima + tl.cdiv(rows, BLOCK_M).to(tl.int64) * columns
    _store_log_sum_exp(z, column_maxima, column_sums, j, columns, 0)


@triton.jit(do_not_specialize=["blocks", "length"])
def merge_log_sum_exp_kernel(partials, lse, blocks, length, BLOCKS: tl.constexpr, BLOCK: tl.constexpr):
    """Write log₂ Σ 2^maximum · sum over the blocks of partials (≥ 2, blocks, n) to lse (n,); BLOCKS ≥ blocks."""
    block = tl.arange(0, BLOCKS)[:, None]
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (block < blocks) & (index < length)
    maxima = tl.load(partials + block * length + index, mask=inside, other=float("-inf"))
    sums = tl.load(partials + (block + blocks) * length + index, mask=inside, other=0.0)
    largest = tl.max(maxima, 0, keep_dims=True)
    largest = tl.where(largest == float("-inf"), 0.0, largest)
    total = tl.sum(tl.exp2(maxima - largest) * sums, 0, keep_dims=True)
    tl.store(lse + index, tl.log2(total.to(tl.float64)) + largest, mask=index < length)


@_tuned
def softmax_gradient_kernel(
    x, y, scale, row_lse, column_lse, matched, row_ids, column_ids, gradient,
    rows, columns, x_stride, y_stride, gradient_stride, diagonal, size_class,
    DUPLICATES: tl.constexpr, EMBED_DIM: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Write ½ (P_rows + P_columns) − target to gradient (r, ≥ c)."""
    block_m, block_n = _block_numbers(rows, columns, BLOCK_M, BLOCK_N)
    i = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    j = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    factor = tl.load(scale) * LOG2_E
    z = _product(x, y, i, j, rows, columns, x_stride, y_stride, EMBED_DIM, BLOCK_K, PRECISION) * factor
    # The half goes into the exponent: 2^(z − 1) = ½ 2^z.
    row_shift = tl.load(row_lse + i, mask=i < rows, other=float("inf")) + 1
    column_shift = tl.load(column_lse + j, mask=j < columns, other=float("inf")) + 1
    g = tl.exp2(z - row_shift[:, None]) + tl.exp2(z - column_shift[None, :])
    if _is_special(block_m, block_n, rows, columns, diagonal, BLOCK_M, BLOCK_N, DUPLICATES):
        positive, counted = _labels(i, j, rows, columns, diagonal, row_ids, column_ids, DUPLICATES)
        row_matched = tl.load(matched + i, mask=i < rows, other=0.0)[:, None]
        if DUPLICATES == "positive":
            g = tl.where(positive, g - row_matched, g)
        else:
            g = tl.where(positive, row_matched, tl.where(counted, g, 0.0))
    _store_gradient(gradient, g, i, j, rows, gradient_stride)
