"""Collective operations over the process group; each is the identity on one process. B batch, W ranks, E width."""

import datetime
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist

from contrastive.errors import UserError

T = TypeVar("T")

GATHER_BYTES = 256 * 2**20
"""Over NCCL, what the gathered rows and their float32 gradient may take before the ring is used."""


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


@contextmanager
def waiting_at_most(seconds: float) -> Iterator[None]:
    """Meanwhile what hosts exchange fails after so long; what GPUs exchange keeps the limit it began with."""
    if world_size() == 1 or "cpu" not in dist.get_backend_config():
        yield
        return
    backend, before = _host_backend(), _host_backend().options._timeout
    backend._set_default_timeout(datetime.timedelta(seconds=seconds))
    yield
    backend._set_default_timeout(before)


def _host_backend():
    return dist.group.WORLD._get_backend(torch.device("cpu"))


class _AllGather(torch.autograd.Function):
    """Concatenate over ranks; the backward sums each rank's gradient of this rank's rows.

    Without that sum a tower gradient comes out W times too small (open_clip without `gather_with_grad`).
    """

    @staticmethod
    def forward(ctx, tensor):
        return all_gather_even(tensor)

    @staticmethod
    def backward(ctx, grad):
        return reduce_scatter_sum(grad)


def over_nccl(tensor: torch.Tensor) -> bool:
    """Whether such a tensor travels over NCCL; gloo takes tensors of a GPU too."""
    return tensor.is_cuda and "cuda:nccl" in dist.get_backend_config()


def all_gather_even(tensor: torch.Tensor) -> torch.Tensor:
    """Concatenate (n, ...) of every rank in rank order, n the same on all: (W·n, ...). No gradient."""
    if world_size() == 1:
        return tensor
    gathered = tensor.new_empty(world_size() * tensor.shape[0], *tensor.shape[1:])
    dist.all_gather_into_tensor(gathered, tensor.contiguous())
    return gathered


def reduce_scatter_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum (W·n, ...) over ranks and return this rank's part, (n, ...). No gradient."""
    if world_size() == 1:
        return tensor
    rows = tensor.shape[0] // world_size()
    if over_nccl(tensor):
        own = tensor.new_empty(rows, *tensor.shape[1:])
        dist.reduce_scatter_tensor(own, tensor.contiguous())
        return own
    total = all_reduce_sum(tensor)  # gloo's reduce-scatter is slower than its all-reduce
    return total[rank() * rows : (rank() + 1) * rows]


def all_gather_with_grad(tensor: torch.Tensor) -> torch.Tensor:
    """Gather equal-sized rows of every rank: (B/W, ...) to (B, ...), rank order, differentiable.

    The gradient of a row is the sum over ranks of what each rank's loss gives it.
    """
    return _AllGather.apply(tensor) if world_size() > 1 else tensor


def all_gather_rows(tensor: torch.Tensor) -> torch.Tensor:
    """Concatenate (n_r, ...) of every rank in rank order; n_r may differ. No gradient."""
    if world_size() == 1:
        return tensor
    counts = torch.zeros(world_size(), dtype=torch.int64, device=tensor.device)
    counts[rank()] = tensor.shape[0]
    dist.all_reduce(counts)
    longest = int(counts.max())
    padded = tensor.new_zeros(longest, *tensor.shape[1:])
    padded[: tensor.shape[0]] = tensor
    gathered = tensor.new_empty(world_size() * longest, *tensor.shape[1:])
    dist.all_gather_into_tensor(gathered, padded)
    blocks = gathered.view(world_size(), longest, *tensor.shape[1:])
    return torch.cat([block[:count] for block, count in zip(blocks, counts.tolist(), strict=True)])


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Return the elementwise sum over ranks, same shape, no gradient."""
    return _reduced(tensor, dist.ReduceOp.SUM) if world_size() > 1 else tensor


def all_reduce_max(tensor: torch.Tensor) -> torch.Tensor:
    """Return the elementwise maximum over ranks, same shape, no gradient."""
    return _reduced(tensor, dist.ReduceOp.MAX) if world_size() > 1 else tensor


def _reduced(tensor: torch.Tensor, by: dist.ReduceOp) -> torch.Tensor:
    result = tensor.detach().clone()
    dist.all_reduce(result, op=by)
    return result


def gather_integers(values: list[int]) -> list[list[int]]:
    """Return every rank's few integers, as many on each, in rank order.

    They travel through host memory where the process group has a backend for it, so that a GPU is not waited for.
    """
    if world_size() == 1:
        return [values]
    has_host_backend = "cpu" in dist.get_backend_config()
    device = "cpu" if has_host_backend else torch.device("cuda", torch.cuda.current_device())
    return all_gather_even(torch.tensor([values], device=device)).tolist()


def gather_objects(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Return every rank's picklable `value`, in rank order. For small things: counts, messages."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value, group=group)
    return values


def together(call: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Return what `call` does, and wait for the other ranks; what fails on one of them fails on all.

    Raises:
        OSError, UserError: as from `call`, of this rank or of the first that has one; other errors stay on their rank.
    """
    result, failure = None, None
    try:
        result = call()
    except (OSError, UserError) as error:
        failure = error
    failures = [error for error in gather_objects(failure, group) if error is not None]
    if failures:
        raise failure or failures[0]  # a rank's own, with the traceback that does not travel
    return result


def every_block(rows: torch.Tensor) -> "GatheredBlocks | RingBlocks":
    """Return every rank's rows (B/W, E), block by block, and the sum over ranks of what each computes for them.

    A loss over all pairs needs every rank's text features, and sends their gradient home:

        exchange = every_block(rows)                  # (B/W, E) of this rank
        for first, block in exchange:                 # rows first, first + 1, … of the global batch
            exchange.add(computed_for(block))         # optional: (len(block), E)
        total = exchange.own_sum()                    # (B/W, E): summed over ranks

    All ranks must take part with the same shapes and types.
    """
    # The ring hides its communication and needs the least memory. Over NCCL a gather of little data is faster: it
    # uses all links at once, in one launch instead of W. Over gloo its collectives were the slower way at every size
    # measured (2 and 4 processes, 0.1 to 16 MiB a block: docs/log.md).
    ranks = world_size()
    gathered_bytes = ranks * rows.numel() * (rows.element_size() + 4)
    if ranks == 1 or (over_nccl(rows) and gathered_bytes <= GATHER_BYTES):
        return GatheredBlocks(rows)
    return RingBlocks(rows)


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
        # Over NCCL the stream waits, not the host. What gloo sends from one to another knows of no limit set later.
        limit = () if over_nccl(self._sent) else (_host_backend().options._timeout,)
        for work in self._works:
            work.wait(*limit)
        return self._arriving
