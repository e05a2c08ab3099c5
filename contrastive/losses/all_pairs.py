"""All pairs of the global batch, a tile at a time, and a loss whose gradients are known once it is.

A loss over pairs asks this rank's images (B/W, E) against the texts of every rank, which come by block after block, so
memory is linear in the batch. B batch, W ranks, E width:

    pairs = AllPairs(image_features, text_features, logit_scale, logit_bias, caption_ids, duplicates)  # and checks them
    for tile in pairs.tiles(sigmoid_tile, gradients=True):  # (r, c) logits each
        ...                                        # the tile's part of the loss, and G, its gradient by the logits
        tile.add_gradient(g)                       # G·text and Gᵀ·image, summed
    return pairs.differentiable(loss_sum)
"""

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from contrastive.distributed.collectives import all_gather_even, every_block, rank, world_size
from contrastive.losses.checks import Duplicates, as_scalar, check_inputs, checked_duplicates

CPU_TILE = 1024
"""Rows and columns: 4 MiB of float32, near the top speed of a matrix product and small enough for its cache."""
GPU_TILE = 8192
"""128 MiB of bfloat16: few enough launches, and each product runs at the device's full rate."""
PLAIN_GPU_TILE = 4096
"""Where the kernels do not work: 64 MiB of float32, and plain torch takes up to five."""

LOG2_E = math.log2(math.e)
LN_2 = math.log(2)

# To compile a loss would be to retrace, for every batch size, what is matrix products already. Cached and called late,
# since torch.compiler.disable takes a second to load.
uncompiled = functools.cache(torch.compiler.disable)


@dataclass(frozen=True)
class Tile:
    """A tile of the logits on this rank: x·yᵀ, some of its images against some texts of the global batch."""

    x: torch.Tensor
    """Image features (r, E)."""
    y: torch.Tensor
    """Text features (c, E)."""
    diagonal: int
    """Row i of the tile matches its column i + diagonal, where the tile has such a column."""
    duplicates: Duplicates = "negative"
    row_ids: torch.Tensor | None = None
    """Caption ids (r,) int64, equal where captions are; None when duplicates is `negative`."""
    column_ids: torch.Tensor | None = None
    """Likewise (c,)."""
    rows: slice | None = None
    """Which of this rank's rows x is."""
    columns: slice | None = None
    """Which of the global batch's rows y is."""
    x_sum: torch.Tensor | None = None
    """Where G·y is added to, (r, E); None where it is not wanted."""
    y_sum: torch.Tensor | None = None
    """Where Gᵀ·x is added to, (c, E), likewise."""
    buffers: list[torch.Tensor] = field(default_factory=list)
    """Memory that the tiles of a sweep share, lest it grow with the batch; the first tile is the largest."""
    kernels: Any = None
    """`TritonTiles` on a GPU where they work, which compute logits and all that comes of them at once; else None."""

    def matrices(self, count: int) -> list[torch.Tensor]:
        """Return matrices of the size and type of the tile, which the next tile overwrites."""
        rows, columns = len(self.x), len(self.y)
        while len(self.buffers) < count:
            self.buffers.append(self.x.new_empty(rows * columns))
        return [buffer[: rows * columns].view(rows, columns) for buffer in self.buffers[:count]]

    def own(self, matrix: torch.Tensor) -> torch.Tensor:
        """Return the matching entries of a matrix (r, c) as a view (n,); n may be 0."""
        return matrix.diagonal(self.diagonal) if -len(matrix) < self.diagonal < matrix.shape[1] else matrix[:0, 0]

    def own_rows(self, values: torch.Tensor) -> torch.Tensor:
        """Return the values, of (r,), of rows that have their match in this tile, as a view (n,)."""
        return values[max(0, -self.diagonal) : max(0, len(self.y) - self.diagonal)]

    def same(self) -> torch.Tensor:
        """Return which captions are equal, bool (r, c)."""
        return self.row_ids[:, None] == self.column_ids

    def left_out(self) -> torch.Tensor:
        """Return which pairs have equal captions without being a pair of the data set, bool (r, c)."""
        mask = self.same()
        self.own(mask).fill_(False)
        return mask

    def add_gradient(self, g: torch.Tensor) -> None:
        """Add what g (r, c), B times the gradient of the loss by the logits, gives x and y, but for the logit scale."""
        if self.x_sum is not None:
            _add_product(self.x_sum, g, self.y)
        if self.y_sum is not None:
            _add_product(self.y_sum, g.T, self.x)


class AllPairs:
    """The pairs of the global batch as this rank sees them, and the sums that its gradients are made of.

    Args and errors are those of `PairLoss.forward`. Every rank's input is checked here before anything is exchanged.
    """

    def __init__(
        self,
        image_features: torch.Tensor,
        text_features: torch.Tensor,
        logit_scale: torch.Tensor | float,
        logit_bias: torch.Tensor | None = None,
        caption_ids: torch.Tensor | None = None,
        duplicates: Duplicates = "negative",
    ):
        features = {"image_features": image_features, "text_features": text_features}
        logit_scale, logit_bias = (as_scalar(number, image_features) for number in (logit_scale, logit_bias))
        scalars = {"logit_scale": logit_scale} | ({} if logit_bias is None else {"logit_bias": logit_bias})
        inputs = image_features, text_features, logit_scale, logit_bias
        self.needs = tuple(torch.is_grad_enabled() and t is not None and t.requires_grad for t in inputs)
        check_inputs(features, scalars, caption_ids, duplicates, self.needs)
        self.wants = self.needs[:2]
        """Whether G·text and Gᵀ·image are to be summed."""
        if not any(self.wants) and any(self.needs[2:]):
            self.wants = True, False  # the scalars' gradients are by-products of either

        self.own = slice(rank() * len(text_features), (rank() + 1) * len(text_features))  # texts, in the global batch
        self.duplicates, self.texts_each = duplicates, len(text_features) // len(image_features)  # K
        self.row_ids = self.column_ids = None
        if duplicates != "negative":
            self.row_ids = caption_ids
            self.column_ids = all_gather_even(caption_ids.repeat_interleave(self.texts_each))

        self._inputs = *inputs[:2], *(None if scalar is None else scalar.reshape(()) for scalar in inputs[2:])
        product_type = _product_type(image_features, text_features)
        exact = torch.promote_types(product_type, torch.float32)
        self.image, self.text = (tensor.detach().to(product_type).contiguous() for tensor in self._inputs[:2])
        self.scale, self.bias = (None if scalar is None else scalar.detach().to(exact) for scalar in self._inputs[2:])
        self.image_sum: torch.Tensor | None = None
        """Σ over texts of G·text, (B/W, E)."""
        self.text_sum: torch.Tensor | None = None
        """Σ over the images of all ranks of Gᵀ·image, (B/W, E)."""

    def tiles(self, of: Callable | None, gradients: bool = False) -> Iterator[Tile]:
        """Yield all tiles of the logits, for the function `of` (None: one without kernels), each valid until the next.

        With `gradients`, those that are wanted are summed over what is given to `Tile.add_gradient`, in float32 at
        least. After the last tile they are sums over ranks too, and ready for `differentiable`.
        """
        sum_images, sum_texts = (gradients and wanted for wanted in self.wants)
        size, buffers, kernels = CPU_TILE, [], None
        if _takes_kernels(self.image):
            from contrastive.losses.kernel_check import checked_kernels

            most = (min(GPU_TILE, n) for n in (len(self.image), world_size() * len(self.text)))
            kernels = of and checked_kernels(of, self.image, *most, self.duplicates, gradients and any(self.wants))
            size = GPU_TILE if kernels else PLAIN_GPU_TILE
        # Plain torch stores logits in the type of the features, and bfloat16 has no room for their digits.
        kind = self.image.dtype if kernels else self.scale.dtype
        self.image_sum = _zeros_like(self.image) if sum_images else None
        blocks = every_block(self.text)
        for first, block in blocks:
            block_sum = _zeros_like(block) if sum_texts else None
            for rows in _parts(len(self.image), size):
                for part in _parts(len(block), size):
                    columns = slice(first + part.start, first + part.stop)
                    yield Tile(
                        x=self.image[rows].to(kind),
                        y=block[part].to(kind),
                        diagonal=self.own.start + rows.start - columns.start,
                        duplicates=self.duplicates,
                        row_ids=None if self.row_ids is None else self.row_ids[rows],
                        column_ids=None if self.column_ids is None else self.column_ids[columns],
                        rows=rows,
                        columns=columns,
                        x_sum=self.image_sum[rows] if sum_images else None,
                        y_sum=block_sum[part] if sum_texts else None,
                        buffers=buffers,
                        kernels=kernels,
                    )
            if sum_texts:
                blocks.add(block_sum)
        self.text_sum = blocks.own_sum() if sum_texts else None

    def differentiable(self, loss_sum: torch.Tensor, bias_sum: torch.Tensor | None = None) -> torch.Tensor:
        """Return this rank's share of the loss as a scalar that autograd can differentiate once.

        Args:
            loss_sum: the loss times B/W, 0-dim. bias_sum: Σ G over all tiles, 0-dim, where there is a bias.
        """
        return _KeptGradients.apply(*self._inputs, self, loss_sum, bias_sum)


class PairLoss(nn.Module, ABC):
    """A loss over all pairs of the global batch, divided by its size; subclasses say what a tile contributes.

    Under several ranks each takes its own images against every text and divides by its local batch; averaged
    over ranks, as DistributedDataParallel averages gradients, that is the loss of the global batch.

    Loss and gradients come from sweeps over tiles, in the forward pass, in memory linear in the batch.
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
        logit_bias: torch.Tensor | None = None,
        caption_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return this rank's share of the loss, a scalar, in float32 at least.

        Args:
            image_features: (B/W, E), unit length. text_features: likewise, row i describing image i; K of each
                image in turn, (K·B/W, E), where duplicates is `positive`.
            logit_scale: factor on the similarities (already exponentiated), a scalar tensor or a number.
            logit_bias: likewise, added to the logits where the loss has one; else None.
            caption_ids: (B/W,) int64, equal where captions are; needed unless duplicates is `negative`.

        Raises:
            NonFiniteFeatures: NaN or infinity in features on a CPU; on a GPU, which is not waited for, the loss is NaN.
            ValueError: shapes, types or devices disagree, on any rank; a bias or caption_ids is missing or too many.
        """
        self.check_bias(logit_bias)
        inputs = image_features, text_features, logit_scale, logit_bias, caption_ids, self.duplicates
        return uncompiled(swept)(self.sums, *inputs)

    @abstractmethod
    def check_bias(self, logit_bias: torch.Tensor | None) -> None:
        """Raise ValueError for a bias that is missing, or one too many."""

    @abstractmethod
    def sums(self, pairs: AllPairs) -> tuple[torch.Tensor, ...]:
        """Sweep over `pairs`, handing in gradients, without autograd; return the arguments of `differentiable`."""


def swept(sums: Callable[[AllPairs], tuple[torch.Tensor, ...]], *inputs) -> torch.Tensor:
    """Return the loss whose sweeps `sums` makes, as `PairLoss.sums` does; `inputs` are those of AllPairs."""
    pairs = AllPairs(*inputs)  # all ranks' input is checked before any computes
    # The types of the products are chosen: float32 features on a CPU are not to become bfloat16 under autocast.
    with torch.autocast(pairs.image.device.type, enabled=False):
        with torch.no_grad():
            found = sums(pairs)  # whose tiles' buffers are free again before gradients are converted and kept
        return pairs.differentiable(*found)


class _KeptGradients(torch.autograd.Function):
    """A loss computed together with its gradients, which the backward pass only scales."""

    @staticmethod
    def forward(ctx, image, text, scale, bias, pairs: AllPairs, loss_sum, bias_sum):
        # ∂L/∂scale = Σ G·(x·yᵀ), which either features' gradient already holds: Σ x·(G·y) = Σ y·(Gᵀ·x).
        scale_sum = None
        if pairs.image_sum is not None:
            scale_sum = row_products(pairs.image, pairs.image_sum).sum()
        elif pairs.text_sum is not None:
            scale_sum = row_products(pairs.text, pairs.text_sum).sum()
        kept = [_kept(pairs.image_sum, image) if pairs.needs[0] else None]
        pairs.image_sum = None  # freed before the text's is converted
        kept.append(_kept(pairs.text_sum, text) if pairs.needs[1] else None)
        ctx.save_for_backward(*kept, pairs.scale, scale_sum, bias_sum)
        ctx.types = image.dtype, text.dtype
        ctx.batch = len(image)
        return (loss_sum / ctx.batch).to(pairs.scale.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        image_sum, text_sum, scale, scale_sum, bias_sum = ctx.saved_tensors
        factor = upstream * (scale / ctx.batch)
        in_place = not _graph_is_kept()
        image_grad = _scaled(image_sum, factor, ctx.types[0], in_place) if ctx.needs_input_grad[0] else None
        text_grad = _scaled(text_sum, factor, ctx.types[1], in_place) if ctx.needs_input_grad[1] else None
        share = upstream / ctx.batch
        scale_grad = (share * scale_sum).to(scale.dtype) if ctx.needs_input_grad[2] else None
        bias_grad = (share * bias_sum).to(scale.dtype) if ctx.needs_input_grad[3] else None
        return image_grad, text_grad, scale_grad, bias_grad, None, None, None


def row_products(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return a_i·b_i of two (n, E) as float64 (n,), some rows at a time to save memory."""
    rows = 1024 if a.device.type == "cpu" else 16384
    parts = zip(a.split(rows), b.split(rows), strict=True)
    return torch.cat([(x.double() * y).sum(dim=1) for x, y in parts])


def _product_type(image: torch.Tensor, text: torch.Tensor) -> torch.dtype:
    """Return what the matrix products take: bfloat16 on a GPU for such features or under such autocast.

    They gather in float32 all the same. Everything else is raised to float32 at least: a CPU gains nothing from
    bfloat16 here, and float16 has no room for the small gradients of many negatives.
    """
    kind = torch.promote_types(image.dtype, text.dtype)
    device = image.device.type
    under_bf16 = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.bfloat16
    if device == "cuda" and (kind == torch.bfloat16 or (under_bf16 and kind == torch.float32)):
        return torch.bfloat16
    return torch.promote_types(kind, torch.float32)


def _takes_kernels(features: torch.Tensor) -> bool:
    return features.is_cuda and features.dtype != torch.float64


def _parts(length: int, size: int) -> Iterator[slice]:
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


def _zeros_like(features: torch.Tensor) -> torch.Tensor:
    """Return zeros to gather products in: float32, or float64 for float64."""
    return torch.zeros_like(features, dtype=torch.promote_types(features.dtype, torch.float32))


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total += a @ b in the precision of `total`, in one pass."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:  # cuBLAS adds bfloat16 products to float32; torch.addmm itself has no `out` for this before 2.12
        torch.ops.aten.addmm.dtype_out(total, a, b, total.dtype, out=total)


def _kept(total: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Keep a gradient in the features' type, but float16's in float32: GradScaler has not scaled it yet."""
    return total if features.dtype == torch.float16 else total.to(features.dtype)


def _scaled(total: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype, in_place: bool) -> torch.Tensor:
    scaled = total.mul_(factor) if in_place else total * factor
    return scaled.to(dtype)


def _graph_is_kept() -> bool:
    """Whether this backward pass leaves the graph for another one, which needs what is saved unchanged.

    torch tells only through a private name; without it, assume so, which costs a copy of the gradients.
    """
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)
    return ask()
