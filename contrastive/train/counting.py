"""What a step allocates and multiplies, without computing it.

A micro-batch goes through the model as fake tensors, which have shapes and no content; all that operations make is
counted as long as somebody holds it, and their products are.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from contrastive import products
from contrastive.models import DualEncoder
from contrastive.models.transformer import Transformer
from contrastive.train.contrastive_task import PretrainConfig


class Allocations(TorchDispatchMode):
    """Counts the bytes of what operations under it make, as long as somebody holds it. `now` and `peak`, in bytes.

    known: tensors that were there before, and count for nothing.
    """

    def __init__(self, known: list[torch.Tensor]):
        super().__init__()
        self.now = self.peak = 0
        self._live = {tensor.untyped_storage()._cdata: 0 for tensor in known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        return made

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._live:
            self._live[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self._live.pop(key)


@dataclass(frozen=True)
class Pass:
    """What one micro-batch through forward and backward takes, in bytes and floating-point operations."""

    forward: float
    """FLOPs of the towers forward."""
    both: float
    """FLOPs forward and backward, recomputed blocks included."""
    activations: float
    """Bytes that are there at the end of the forward pass: kept for backward, and what bf16 makes of the weights."""
    peak: float
    """Bytes at most, gradients of the weights included if they are kept."""


def one_pass(config: PretrainConfig, batch: int, tokens: int, bf16: bool, keeps: bool, sharded: bool = False) -> Pass:
    """Count a forward and backward pass of `batch` pairs of `tokens` tokens each.

    Args:
        keeps: whether gradients stay in tensors of their own, as on a single process; else they leave for DDP's or
            FSDP's as soon as they are known. sharded: bf16 weights come as such, and are no copies.
    """
    image = config.model.image
    with _plain_products(), FakeTensorMode(), _default_dtype(torch.bfloat16 if sharded and bf16 else torch.float32):
        model = towers_of(config).train()
        for part in model.modules():
            if isinstance(part, Transformer):
                part.gradient_checkpointing = config.train.gradient_checkpointing
        if not keeps:
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        pixels = torch.empty(batch, 3, image.image_size, image.image_size, dtype=torch.float32)
        ids = torch.ones(batch * config.data.captions_per_image, tokens, dtype=torch.int64)
        counter = FlopCounterMode(display=False)
        allocations = Allocations([*model.parameters(), *model.buffers(), ids])
        with allocations, counter:
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                features = model(pixels, ids)
            forward, activations = counter.get_total_flops(), allocations.now
            (features.image.sum() + features.text.sum()).backward()
    return Pass(forward, counter.get_total_flops(), activations, allocations.peak)


@dataclass(frozen=True)
class Weights:
    """Numbers of parameters, and bytes that their optimizers keep for them and need while they step."""

    image: int
    text: int
    all: int
    trainable: int
    largest_block: int
    in_blocks: int
    optimizer: float
    optimizer_peak: float


def count_weights(config: PretrainConfig) -> Weights:
    """Count the model's parameters, and what its optimizers make of them in a step."""
    with _plain_products(), FakeTensorMode():
        model = towers_of(config)
        trainable = [p for p in model.parameters() if p.requires_grad]
        optimizers = config.optimizer.build(model)
        for parameter in trainable:
            parameter.grad = torch.empty_like(parameter)
        with Allocations([*model.parameters(), *(p.grad for p in trainable)]) as allocations:
            for optimizer in optimizers:
                optimizer.step()
        states = [t for o in optimizers for state in o.state.values() for t in state.values()]
        kept = sum(t.untyped_storage().nbytes() for t in states)
    blocks = [_numel(b) for part in model.modules() if isinstance(part, Transformer) for b in part.blocks]
    towers = _numel(model.image_tower), _numel(model.text_tower), _numel(model)
    learning = sum(p.numel() for p in trainable)
    return Weights(*towers, learning, max(blocks), sum(blocks), kept, allocations.peak - kept)


def towers_of(config: PretrainConfig) -> DualEncoder:
    """Return the model of a run, with fresh weights; of a locked tower none learn."""
    model = DualEncoder(config.model)
    if config.lock == "image":
        model.image_tower.requires_grad_(False)
    return model


def _numel(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def _plain_products() -> Iterator[None]:
    """Meanwhile products are torch's own: oneDNN's are not counted."""
    before, products.ONEDNN = products.ONEDNN, False
    try:
        yield
    finally:
        products.ONEDNN = before
