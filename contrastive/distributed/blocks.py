"""Every rank's rows, block by block, and the sum over ranks of what each computes for them. B batch, W ranks, E width.

A loss over all pairs needs every rank's text features, and sends their gradient home. Two ways, one interface:

    exchange = every_block(rows)                  # (B/W, E) of this rank
    for first, block in exchange:                 # rows first, first + 1, … of the global batch
        exchange.add(computed_for(block))         # optional: (len(block), E)
    total = exchange.own_sum()                    # (B/W, E): summed over ranks

All ranks must take part with the same shapes and types.
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist

from contrastive.distributed.collectives import all_gather_even, over_nccl, rank, reduce_scatter_sum, world_size

GATHER_BYTES = 256 * 2**20
"""Over NCCL, what the gathered rows and their float32 gradient may take before the ring is used."""


class GatheredBlocks:
    """All rows at once: one all-gather, one reduce-scatter. Memory O(B·E); on one process, no communication."""

    def __init__(self, rows: torch.Tensor):
        self._rows = rows
        self._sum: torch.Tensor | None = None

    def __iter__(self) -> Iterator[tuple[int, torch.Tensor]]:
        yield 0, all_gather_even(self._rows)

    def add(self, contribution: torch.Tensor) -> None:
        """Take what this rank computed for the block: (B, E). It is kept, not copied."""
        self._sum = contribution

    def own_sum(self) -> torch.Tensor:
        return reduce_scatter_sum(self._sum)


class RingBlocks:
    """One rank's rows at a time: blocks and their running sums go round while the next is computed on.

    In step k rank r holds the block of rank r + k: it receives from r + 1 and sends to r − 1. The sum of a block
    follows it one step behind, and after W steps reaches the rank that owns it. Memory O(B/W·E).
    """

    def __init__(self, rows: torch.Tensor):
        self._rows = rows.contiguous()
        self._moving_sum: _Transfer | None = None

    def __iter__(self) -> Iterator[tuple[int, torch.Tensor]]:
        held, ranks = self._rows, world_size()
        for step in range(ranks):
            transfer = _Transfer(held, tag=0) if step < ranks - 1 else None
            yield (rank() + step) % ranks * len(held), held
            if transfer is not None:
                held = transfer.received()

    def add(self, contribution: torch.Tensor) -> None:
        """Take what this rank computed for the block it holds, (B/W, E); it is changed. Once per block."""
        if self._moving_sum is not None:
            contribution += self._moving_sum.received()
        self._moving_sum = _Transfer(contribution, tag=1)

    def own_sum(self) -> torch.Tensor:
        return self._moving_sum.received()


def every_block(rows: torch.Tensor) -> GatheredBlocks | RingBlocks:
    """Choose how all ranks see each other's rows (B/W, E).

    The ring hides its communication and needs the least memory. Over NCCL a gather of little data is faster: it
    uses all links at once, in one launch instead of W. Over gloo its collectives were the slower way at every size
    measured (2 and 4 processes, 0.1 to 16 MiB a block: docs/log.md).
    """
    ranks = world_size()
    gathered_bytes = ranks * rows.numel() * (rows.element_size() + 4)
    if ranks == 1 or (over_nccl(rows) and gathered_bytes <= GATHER_BYTES):
        return GatheredBlocks(rows)
    return RingBlocks(rows)


class _Transfer:
    """A tensor on its way to the previous rank, while one like it comes from the next."""

    def __init__(self, tensor: torch.Tensor, tag: int):
        self._sent = tensor  # must live until it has left
        self._arriving = torch.empty_like(tensor)
        before, after = (rank() - 1) % world_size(), (rank() + 1) % world_size()
        operations = [
            dist.P2POp(dist.isend, tensor, before, tag=tag),
            dist.P2POp(dist.irecv, self._arriving, after, tag=tag),
        ]
        self._works = dist.batch_isend_irecv(operations)  # over NCCL in one group: alone, they could wait for ever

    def received(self) -> torch.Tensor:
        for work in self._works:
            work.wait()  # over NCCL the stream waits, not the host
        return self._arriving
