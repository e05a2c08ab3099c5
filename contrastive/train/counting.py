"""What a step allocates and multiplies, without computing it.

A micro-batch goes through the model as fake tensors, which have shapes and no content; all that operations make is
counted as long as somebody holds it, and their products are.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import default_collate
from torch.utils.flop_counter import FlopCounterMode

from contrastive import products
from contrastive.data.extras import DrawnSample
from contrastive.data.preprocess import Preprocess
from contrastive.data.record import Record
from contrastive.models import DualEncoder, TextTowerConfig
from contrastive.models.transformer import Transformer
from contrastive.named_sections import by_name
from contrastive.objectives import Setting
from contrastive.objectives.learner import Learner
from contrastive.train.contrastive_task import PretrainConfig
from contrastive.train.options import most_patches


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
        model = model_of(config).train()
        for part in model.modules():
            if isinstance(part, Transformer):
                part.gradient_checkpointing = config.train.gradient_checkpointing
        if not keeps:
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        height, width = (image.image_size, image.image_size)
        if image.native:  # the most patches in a row: as many tokens, none of which a shape depends on
            height, width = image.patch_size, most_patches(config, image) * image.patch_size
        pixels = torch.empty(batch, 3, height, width, dtype=torch.float32)
        ids = torch.ones(batch * config.data.captions_per_image, tokens, dtype=torch.int64)
        more = (example_inputs(config, model, batch),) if isinstance(model, Learner) else ()
        counter = FlopCounterMode(display=False)
        allocations = Allocations([*model.parameters(), *model.buffers(), ids])
        with allocations, counter:
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                total = scalar_of_all(model, (pixels, ids, *more))
            forward, activations = counter.get_total_flops(), allocations.now
            total.backward()
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
        model = model_of(config)
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


def model_of(config: PretrainConfig) -> DualEncoder:
    """Return the model of a run, its objectives with it, with fresh weights; of a locked tower none learn.

    Objectives that need the data are left out.

    Raises:
        UserError: an objective that cannot be had.
    """
    options = {name: own for name, own in by_name(config.objectives).items() if not own.NEEDS_DATA}
    image = config.model.image
    model = Learner(config.model) if options else DualEncoder(config.model)
    if config.lock == "image":
        model.image_tower.requires_grad_(False)
    preprocess = StandInPreprocess(config.data.preprocess.at(image.image_size, image.patch_size))
    parts = config.model, None, StandInTokenizer(config.model.text), preprocess, NEVER_ENDING
    for name, own in options.items():
        others = dict(model.objectives.items())
        setting = Setting(name, *parts, (image.image_size,), locked=config.lock == "image", others=others)
        model.objectives[name] = own.build(setting)
    return model


NEVER_ENDING = 10**9  # steps: whenever an objective begins, the run goes on after it


class StandInPreprocess(Preprocess):
    """Keeps no tensors, which would be fake ones, for later."""

    def normalize(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.float()


class StandInTokenizer:
    """Knows what an objective asks of a tokenizer that is not there yet; every caption fills the context."""

    eos_id, bos_id, pad_id = 1, None, 0

    def __init__(self, text: TextTowerConfig):
        self.vocab_size, self.context_length = text.vocab_size, text.context_length

    def tokenize_clean(self, captions: list[str]) -> torch.Tensor:
        return torch.full((len(captions), self.context_length), 2)


def example_inputs(config: PretrainConfig, model: Learner, batch: int) -> dict[str, dict[str, torch.Tensor]]:
    """Return what the objectives are given for so many samples: the right shapes, no content."""
    size, captions = config.model.image.image_size, ("a",) * config.data.captions_per_image
    grey = Record("", np.full((size, size, 3), 128, np.uint8))
    inputs = {}
    for name, one in model.objectives.items():
        with unset_fake_temporarily():
            rng = np.random.default_rng(0)
            sample = DrawnSample(grey, 0, captions, rng, size, lambda s: torch.zeros(3, s, s, dtype=torch.uint8))
            made = {} if one.extra is None else one.extra.of(sample)
            own = one.inputs({}, default_collate([made] * batch))
        inputs[name] = {key: torch.zeros(value.shape, dtype=value.dtype) for key, value in own.items()}
    return inputs


def scalar_of_all(model: DualEncoder, given: tuple) -> torch.Tensor:
    """A forward pass, targets first where there are objectives; a scalar that depends on all that learns."""
    if not isinstance(model, Learner):
        features = model(*given)
        return features.image.sum() + features.text.sum()
    with torch.no_grad():
        targets = {name: model.objectives[name].whole_targets(own) for name, own in model(*given).items()}
    seen = model(*given, targets)
    rest = [value.sum() for own in seen.more.values() for value in own.values()]
    return seen.features.image.sum() + seen.features.text.sum() + sum(rest) + sum(seen.losses.values())


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
