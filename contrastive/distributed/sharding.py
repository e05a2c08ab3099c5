"""Fully sharded data parallel (FSDP2): every rank keeps its part of each weight, gradient and optimizer state.

`accelerate launch --use_fsdp --fsdp_version 2`, or a configuration that says so, asks for it; torch's `fully_shard`
does it. A sharded tensor is a DTensor; scalars, which have no rows to share out, are whole on every rank.
"""

import copy
import os
import sys
from collections.abc import Callable, Iterable, Mapping

import torch
import torch.distributed as dist
from torch import nn

from contrastive.distributed.collectives import all_reduce_sum, world_size


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether each rank has a part of it."""
    # What makes DTensors imports them, which takes a second that the help and evaluations do not wait for.
    dtensors = sys.modules.get("torch.distributed.tensor")
    return dtensors is not None and isinstance(tensor, dtensors.DTensor)


def shard(model: nn.Module, units: Iterable[nn.Module], device: torch.device, bf16: bool) -> None:
    """Shard the model over all ranks in place: each unit is gathered when it is needed, the rest when the model is.

    Args:
        model: the same on all ranks. units: modules within it: the blocks. bf16: weights travel and are used in
            bfloat16; gradients are summed in float32.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(torch.bfloat16 if bf16 else None, torch.float32, cast_forward_inputs=False)
    how = {"mesh": init_device_mesh(device.type, (world_size(),)), "mp_policy": policy}
    if os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() in ("false", "shard_grad_op"):
        how["reshard_after_forward"] = False
    for unit in units:
        fully_shard(unit, **how)
    fully_shard(model, ignored_params={p for p in model.parameters() if p.ndim == 0}, **how)


def reshard(model: nn.Module) -> None:
    """Let go of what a forward pass has gathered that no backward pass follows."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def average_whole_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Average over ranks the gradients of what is not sharded, as those of the rest have been in backward."""
    for parameter in parameters:
        if parameter.grad is not None and not is_sharded(parameter):
            dist.all_reduce(parameter.grad)
            parameter.grad /= world_size()


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor, sharing its memory; of one that is not sharded, itself."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor from all ranks' parts, all of which must call; one that is not sharded as it is."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def like(tensor: torch.Tensor, sharded: torch.Tensor) -> torch.Tensor:
    """The whole `tensor` as `sharded` is: this rank's part of it where that is sharded. Nothing is exchanged."""
    if not is_sharded(sharded):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, sharded.device_mesh, sharded.placements, src_data_rank=None)


def whole_tensors(tensors: Mapping[str, torch.Tensor], keep: bool = True) -> Mapping[str, torch.Tensor]:
    """Return whole tensors for sharded ones, in host memory; all ranks must call, and those that `keep` get them.

    They are gathered one at a time, so that a GPU needs room for the largest alone, and share no memory with those
    given. Without sharded ones nothing is copied.
    """
    if not any(is_sharded(tensor) for tensor in tensors.values()):
        return tensors
    gathered = {}
    for name, tensor in tensors.items():
        full = whole(tensor.detach())
        if keep:
            gathered[name] = full.cpu() if is_sharded(tensor) else full.to("cpu", copy=True)
    return gathered


def unsharded(model: nn.Module, plain: nn.Module, device: torch.device) -> nn.Module:
    """Return a model like `plain`, whose own weights count for nothing, with those of the sharded `model`."""
    made = copy.deepcopy(plain).to_empty(device=device)
    made.load_state_dict(whole_tensors(model.state_dict()))
    for name, buffer in made.named_buffers():  # no state dict holds these; they are whole on every rank
        buffer.copy_(model.get_buffer(name))
    return made.train(model.training)


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> torch.Tensor:
    """Scale all gradients so that their norm over all ranks is `max_norm` at most; return what it was, 0-dim."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    parts = [gradient.to_local() for gradient in gradients if is_sharded(gradient)]
    rest = [gradient for gradient in gradients if not is_sharded(gradient)]
    norm = nn.utils.get_total_norm(rest)
    if parts:
        norm = (norm**2 + all_reduce_sum(nn.utils.get_total_norm(parts) ** 2)).sqrt()
    if gradients:  # a loss that was refused leaves none
        torch._foreach_mul_(parts + rest, (max_norm / (norm + 1e-6)).clamp(max=1))
    return norm


def by_whole_matrices(call: Callable[[torch.Tensor], torch.Tensor], parts: torch.Tensor, one: torch.Tensor):
    """Return call(stack) for a stack (k, m, n) of whole matrices, of which `parts` holds this rank's rows.

    Each rank calls it with some of the matrices and gets its rows of all, so that work and exchange are shared.

    Args:
        call: its result has the shape of its argument. one: a matrix (m, n) sharded as all of them are, by rows; if it
            is not, all ranks call it with all.
    """
    if not is_sharded(one):
        return call(parts)
    from torch.distributed.tensor import DTensor, Shard

    mesh, shape = one.device_mesh, (len(parts), *one.shape)
    strides = shape[1] * shape[2], shape[2], 1
    stack = DTensor.from_local(parts, mesh, [Shard(1)], shape=torch.Size(shape), stride=strides)
    own = stack.redistribute(placements=[Shard(0)]).to_local()
    called = call(own) if len(own) else own
    called = DTensor.from_local(called, mesh, [Shard(0)], shape=torch.Size(shape), stride=strides)
    return called.redistribute(placements=[Shard(1)]).to_local()
