"""A sweep over all pairs, tile by tile, in memory linear in the batch. B batch, W ranks, E width.

Each rank owns its images (B/W, E); the texts of all ranks come by block after block. Gradients are the sums G·text
and Gᵀ·image over tiles of G, the gradient of the logits times B, and are kept in float32 at least. What is left to
do is to multiply them by logit_scale / (B/W) and by what comes from above.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from contrastive.distributed.collectives import all_gather_even, every_block, rank, world_size
from contrastive.losses.base import Duplicates
from contrastive.losses.tiles import TilePairs, TorchTiles

CPU_TILE = 1024
"""Rows and columns: 4 MiB of float32, near the top speed of a matrix product and small enough for its cache."""
GPU_TILE = 8192
"""128 MiB of bfloat16: few enough launches, and each product runs at the device's full rate."""


@dataclass(frozen=True)
class Labels:
    """Which pairs of the global batch belong together, as this rank sees it."""

    duplicates: Duplicates
    row_ids: torch.Tensor | None
    """Caption ids of this rank (B/W,) int64; None when duplicates is `negative`."""
    column_ids: torch.Tensor | None
    """Caption ids of all ranks (B,)."""
    own: slice
    """This rank's rows in the global batch."""

    @classmethod
    def of(cls, duplicates: Duplicates, caption_ids: torch.Tensor | None, local_batch: int) -> "Labels":
        """Gather the caption ids of all ranks where they matter."""
        own = slice(rank() * local_batch, (rank() + 1) * local_batch)
        if duplicates == "negative":
            return cls(duplicates, None, None, own)
        return cls(duplicates, caption_ids, all_gather_even(caption_ids), own)

    def tile(self, rows: slice, columns: slice) -> TilePairs:
        """Rows are this rank's, columns the global batch's."""
        diagonal = self.own.start + rows.start - columns.start
        if self.duplicates == "negative":
            return TilePairs(diagonal)
        return TilePairs(diagonal, self.duplicates, self.row_ids[rows], self.column_ids[columns])

    def target_weight(self) -> torch.Tensor:
        """Return one over the number of captions equal to each of this rank's, float64 (B/W,)."""
        ids = self.column_ids.sort().values
        count = torch.searchsorted(ids, self.row_ids, right=True) - torch.searchsorted(ids, self.row_ids)
        return 1 / count.double()


@dataclass
class Gradient:
    """What a sweep leaves for the backward pass; each None unless wanted."""

    image: torch.Tensor | None = None
    """Σ over texts of G·text, (B/W, E)."""
    text: torch.Tensor | None = None
    """Σ over the images of all ranks of Gᵀ·image, (B/W, E)."""
    bias: torch.Tensor | None = None
    """Σ G, 0-dim float64."""


@dataclass(frozen=True)
class Tile:
    """A tile of the logits on this rank."""

    x: torch.Tensor
    """Image features (r, E)."""
    y: torch.Tensor
    """Text features (c, E)."""
    rows: slice
    """Which of this rank's rows x is."""
    columns: slice
    """Which of the global batch's rows y is."""
    pairs: TilePairs


def sweep(
    image: torch.Tensor,
    text: torch.Tensor,
    labels: Labels,
    tiles,
    visit: Callable[[Tile], torch.Tensor | None],
    wants: tuple[bool, bool] = (False, False),
) -> Gradient:
    """Visit every tile of the logits; sum the products of the gradients that visits return.

    Args:
        image, text: this rank's (B/W, E). tiles: what `tiles_for` returns; it knows the size of a tile.
        visit: returns G of a tile, (r, c), valid until the next visit; or None where no gradient is wanted.
        wants: whether the gradients of image and text are wanted.
    """
    blocks = every_block(text)
    image_sum = _zeros_like(image) if wants[0] else None
    for first, block in blocks:
        block_sum = _zeros_like(block) if wants[1] else None
        for rows in _parts(len(image), tiles.rows):
            for part in _parts(len(block), tiles.columns):
                columns = slice(first + part.start, first + part.stop)
                tile = Tile(image[rows], block[part], rows, columns, labels.tile(rows, columns))
                g = visit(tile)
                if wants[0]:
                    _add_product(image_sum[rows], g, tile.y)
                if wants[1]:
                    _add_product(block_sum[part], g.T, tile.x)
        if wants[1]:
            blocks.add(block_sum)
    return Gradient(image_sum, blocks.own_sum() if wants[1] else None)


def tiles_for(features: torch.Tensor):
    """Return the fastest way to compute tiles of such features (B/W, E): `TorchTiles` or, on a GPU, `TritonTiles`."""
    if features.is_cuda and features.dtype != torch.float64:
        from contrastive.losses.triton_tiles import TritonTiles  # needs a GPU, and takes a while to import

        kind, size = TritonTiles, GPU_TILE
    else:
        kind, size = TorchTiles, CPU_TILE
    return kind(features, min(size, len(features)), min(size, world_size() * len(features)))


def row_products(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return a_i·b_i of two (n, E) as float64 (n,), some rows at a time to save memory."""
    rows = 1024 if a.device.type == "cpu" else 16384
    parts = zip(a.split(rows), b.split(rows), strict=True)
    return torch.cat([(x.double() * y).sum(dim=1) for x, y in parts])


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
