"""What a rank sends in one optimizer step, from shapes alone. W ranks, B global batch, E embed_dim.

It is the least that each exchange takes by the usual ring: an all-reduce of n bytes sends 2·(W − 1)/W·n from every
rank, an all-gather or a reduce-scatter of n in the whole half of that. The few numbers by which ranks agree are left
out.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from contrastive.distributed.collectives import GATHER_BYTES
from contrastive.models.transformer import Transformer
from contrastive.optim import Muon


@dataclass(frozen=True)
class Exchange:
    """How a step of pairs is spread over ranks; all but `loss` holds for classifiers too."""

    world_size: int
    sharded: bool = False
    """Whether by FSDP2; else every rank has the whole model."""
    bf16: bool = False
    """Whether sharded weights travel in bfloat16."""
    reshard: bool = True
    """Whether blocks are let go of after their forward pass."""
    accumulate: int = 1
    """Micro-batches."""
    nccl: bool = True
    """Over GPUs; else gloo, which has no all-to-all: torch gathers instead."""
    loss: Literal["sigmoid", "softmax"] | None = "sigmoid"
    """None: it needs nothing of other ranks."""
    num_losses: int = 1
    """How many a step has: one for each caption of an image, and each two of them that are matched."""
    duplicates: Literal["negative", "ignore", "positive"] = "negative"
    global_batch_size: int = 256
    embed_dim: int = 512
    feature_bytes: int = 4
    """Of a number of the features that the loss compares: 2 in bf16 on a GPU, else 4."""


def step_traffic(model: nn.Module, optimizers: Iterable[torch.optim.Optimizer], how: Exchange) -> dict[str, float]:
    """Return bytes that each rank sends in a step: of 'gradients', 'weights', 'optimizer' and 'loss'.

    Not counted: buffers (fixed positions), which plain ranks are sent anew in every step.

    Args:
        model: not sharded, on any device, `meta` too. optimizers: those of its `OptimizerConfig.build`.
    """
    learning = [p for p in model.parameters() if p.requires_grad]
    total = dict.fromkeys(("gradients", "weights", "optimizer", "loss"), 0.0)
    if how.world_size == 1:
        return total
    if how.loss is not None:
        total["loss"] = how.num_losses * _loss_bytes(how)
    if not how.sharded:
        return total | {"gradients": 2 * _passed_on(4 * sum(p.numel() for p in learning), how)}
    total["gradients"] = how.accumulate * _passed_on(4 * _padded(learning, how), how)
    total["gradients"] += 2 * _passed_on(4 * sum(p.ndim == 0 for p in learning), how)  # scalars, which are whole
    total["weights"] = _gathered_weights(model, how)
    total["optimizer"] = sum(_muon_bytes(optimizer, how) for optimizer in optimizers if isinstance(optimizer, Muon))
    return total


def _passed_on(whole: float, how: Exchange) -> float:
    """What a rank sends when so many bytes in the whole are gathered, or summed and scattered."""
    return (how.world_size - 1) / how.world_size * whole


def _padded(parameters: Iterable[nn.Parameter], how: Exchange) -> int:
    """Numbers in sharded parameters, with the rows that make the parts of all ranks equal."""
    sharded = [p for p in parameters if p.ndim > 0]
    return sum(_up(len(p), how) * math.prod(p.shape[1:]) for p in sharded)


def _up(length: int, how: Exchange) -> int:
    return math.ceil(length / how.world_size) * how.world_size


def _gathered_weights(model: nn.Module, how: Exchange) -> float:
    """Each block is gathered for every pass through it, the rest once for each backward pass, at whose end it goes."""
    backwards = how.accumulate
    forwards = 1 if backwards == 1 else 2 * backwards  # micro-batches are embedded without a graph first
    width = 2 if how.bf16 else 4
    blocks = [block for part in model.modules() if isinstance(part, Transformer) for block in part.blocks]
    within = {id(p) for block in blocks for p in block.parameters()}
    total = backwards * width * _padded((p for p in model.parameters() if id(p) not in within), how)
    for block in blocks:
        learns = any(p.requires_grad for p in block.parameters())
        times = forwards + backwards * learns if how.reshard else backwards
        total += times * width * _padded(block.parameters(), how)
    return _passed_on(total, how)


def _muon_bytes(optimizer: Muon, how: Exchange) -> float:
    """Rows of all matrices of a shape against whole matrices of some, and back: twice an all-to-all."""
    total = 0
    for group in optimizer.param_groups:
        shapes = [tuple(parameter.shape) for parameter in group["params"]]
        for rows, columns in set(shapes):
            stack = 4 * _up(shapes.count((rows, columns)), how) * _up(rows, how) * columns
            # Of a rank's part, a W-th goes to each other; without an all-to-all, all of it does.
            total += 2 * _passed_on(stack, how) / (how.world_size if how.nccl else 1)
    return total


def _loss_bytes(how: Exchange) -> float:
    """Text features to all ranks and their gradient back (`every_block`), and what the normalisers take."""
    batch = how.global_batch_size
    features, gradients = (batch * how.embed_dim * width for width in (how.feature_bytes, 4))
    once = _passed_on(features, how)  # by a ring or a gather, the same
    gathers = how.nccl and features + gradients <= GATHER_BYTES
    # A ring's sums take a step more than a reduce-scatter: the last brings each home.
    total = once + (_passed_on(gradients, how) if gathers else gradients)
    if how.loss == "softmax":  # a sweep for the normalisers, then maxima and sums of the columns in float64
        total += once + 2 * 2 * _passed_on(8 * batch, how)
        if how.duplicates != "positive":
            total += _passed_on(8 * batch, how)  # of each pair its own logit
    if how.duplicates != "negative":
        total += _passed_on(8 * batch, how)  # caption ids
    return total
