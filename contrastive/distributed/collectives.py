"""Collective operations over the process group; each is the identity on one process. W is the number of ranks."""

from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


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
    total = tensor.clone()  # gloo's reduce-scatter is slower than its all-reduce
    dist.all_reduce(total)
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
    if world_size() == 1:
        return tensor
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total


def all_reduce_max(tensor: torch.Tensor) -> torch.Tensor:
    """Return the elementwise maximum over ranks, same shape, no gradient."""
    if world_size() == 1:
        return tensor
    largest = tensor.detach().clone()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest


def gather_integers(values: list[int]) -> list[list[int]]:
    """Return every rank's few integers, as many on each, in rank order.

    They travel through host memory where the process group has a backend for it, so that a GPU is not waited for.
    """
    if world_size() == 1:
        return [values]
    has_host_backend = "cpu" in dist.get_backend_config()
    device = "cpu" if has_host_backend else torch.device("cuda", torch.cuda.current_device())
    return all_gather_even(torch.tensor([values], device=device)).tolist()


def gather_objects(value: T) -> list[T]:
    """Return every rank's picklable `value`, in rank order. For small things: counts, messages."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values
