"""Who benchmarks/loss.py measures: our losses and the peers', each built for one case."""

import functools
import importlib.util
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal, get_args

import psutil
import torch

from contrastive.losses import SigmoidLoss, SoftmaxLoss

LossName = Literal["sigmoid", "softmax"]
RivalName = Literal["ours", "open_clip", "open_clip_chunked", "open_clip_compiled", "siglip_kernel"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PACKAGES = {"open_clip": "open_clip_torch", "siglip_kernel": "siglip-kernel"}
STORED_TENSORS = {"open_clip": 5, "open_clip_chunked": 3, "open_clip_compiled": 2}
"""Tensors of B² elements alive at a peer's peak; all ranks together hold as many as one process would."""
CHUNK_SIZE = 512  # as in the description of open_clip's chunk_size


@dataclass(frozen=True)
class Case:
    """What every rival is measured on."""

    loss: LossName
    batch: int
    dim: int
    dtype: str
    ranks: int
    device: str
    threads: int
    """Of each rank."""

    @property
    def rows(self) -> int:
        """The batch of one rank."""
        return self.batch // self.ranks

    @property
    def floor_flops(self) -> int:
        """Matrix products without which the loss cannot be had when logits are not stored.

        Sigmoid: S = X·Yᵀ, G·Y and Gᵀ·X. Softmax: S once more, for its normalisers.
        """
        return {"sigmoid": 3, "softmax": 4}[self.loss] * 2 * self.batch**2 * self.dim

    def __str__(self) -> str:
        ranks = f", {self.ranks} ranks" if self.ranks > 1 else ""
        return f"{self.loss} B={self.batch} D={self.dim} {self.dtype}{ranks}"


def build(name: str, case: Case, rank: int, ranks: int) -> Callable[..., torch.Tensor]:
    """Return loss(image, text, logit_scale, logit_bias), the bias None for softmax; the scale is exponentiated."""
    if name == "ours":
        return SigmoidLoss() if case.loss == "sigmoid" else SoftmaxLoss()
    if name == "siglip_kernel":
        from siglip_kernel import fused_siglip_loss

        return lambda image, text, scale, bias: fused_siglip_loss(image, text, scale.log(), bias)
    losses = _open_clip_losses()
    if case.loss == "softmax":
        loss = losses.ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=ranks)
    else:
        chunks = {"chunk_size": CHUNK_SIZE} if name == "open_clip_chunked" else {}
        loss = losses.SigLipLoss(rank=rank, world_size=ranks, **chunks)
    # Left to itself torch.compile makes the second size it sees dynamic, which is slower code.
    return torch.compile(loss, dynamic=False) if name == "open_clip_compiled" else loss


def choose(case: Case) -> tuple[list[str], dict[str, str]]:
    """Return the rivals that make sense for `case`, and why each other one does not."""
    refused = {name: why for name in get_args(RivalName) if (why := unfit(name, case))}
    if case.ranks > 1:
        refused.setdefault("open_clip_compiled", "collectives inside torch.compile; name it in --rivals to try")
    return [name for name in get_args(RivalName) if name not in refused], refused


def unfit(name: str, case: Case) -> str | None:
    """Return why `name` cannot be measured on `case`, or None."""
    module = name if name == "siglip_kernel" else "open_clip"
    if name != "ours" and importlib.util.find_spec(module) is None:
        return f"{PACKAGES[module]} is not installed"
    if name == "open_clip_chunked" and "chunk_size" not in inspect.signature(_open_clip_losses().SigLipLoss).parameters:
        return f"{package_version(name)} has no chunk_size"
    if name in ("siglip_kernel", "open_clip_chunked") and case.loss != "sigmoid":
        return f"{name} has the sigmoid loss only"
    if name == "siglip_kernel" and (case.device, case.dtype, case.ranks) != ("cuda", "bf16", 1):
        return "siglip_kernel is measured in bf16 on one GPU"
    return None


def too_large(name: str, case: Case) -> str | None:
    """Return why `name` would not fit into what the CPU's memory has left; a GPU's says so harmlessly itself."""
    need = STORED_TENSORS.get(name, 0) * case.batch**2 * DTYPES[case.dtype].itemsize
    left = psutil.virtual_memory().available
    if case.device == "cuda" or need <= left:
        return None
    size = f"{STORED_TENSORS[name]} B² tensors, about {need / 2**30:.1f} GiB"
    return f"not run: {size}, do not fit into the {left / 2**30:.1f} GiB of memory that are free"


def package_version(name: str) -> str | None:
    """Return distribution and version of a peer; None for ours, which the commit of a row tells."""
    module = "open_clip" if name.startswith("open_clip") else name
    return f"{PACKAGES[module]} {version(PACKAGES[module])}" if module in PACKAGES else None


@functools.cache
def _open_clip_losses():
    """The installed open_clip/loss.py alone: importing its package takes seconds and hundreds of MB, for timm."""
    package = importlib.util.find_spec("open_clip")
    spec = importlib.util.spec_from_file_location("open_clip_loss", Path(package.origin).with_name("loss.py"))
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
