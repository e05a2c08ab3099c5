"""What a step allocates, multiplies and sends, from shapes alone. W ranks, B global batch, E embed_dim.

A micro-batch goes through the model as fake tensors, which have no content; all that operations make is counted as long
as somebody holds it, and their products are. Of each exchange it is the least that the usual ring takes: an all-reduce
of n bytes sends 2·(W − 1)/W·n from every rank, an all-gather or a reduce-scatter of n in the whole half of that. The
few numbers by which ranks agree are left out.
"""

import functools
import math
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

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
from contrastive.distributed.collectives import GATHER_BYTES
from contrastive.models import DualEncoder, TextTowerConfig
from contrastive.models.transformer import Transformer
from contrastive.named_sections import by_name
from contrastive.objectives import Setting
from contrastive.objectives.learner import Learner
from contrastive.optim import Muon
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


@functools.lru_cache(maxsize=64)  # seconds each, and the forecasts for several numbers of GPUs ask for many again
def one_pass(config: PretrainConfig, batch: int, tokens: int, bf16: bool, keeps: bool, sharded: bool = False) -> Pass:
    """Count a forward and backward pass of `batch` pairs of `tokens` tokens each.

    Args:
        keeps: whether gradients stay in tensors of their own, as on a single process; else they leave for DDP's or
            FSDP's as soon as they are known. sharded: bf16 weights come as such, and are no copies.
    """
    image = config.model.image
    with _without_content(torch.bfloat16 if sharded and bf16 else torch.float32):
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
    with _without_content():
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
def _without_content(dtype: torch.dtype = torch.float32) -> Iterator[None]:
    """Meanwhile new tensors are fake ones, of this dtype by default, and products torch's own: of oneDNN none count."""
    before = products.ONEDNN, torch.get_default_dtype()
    products.ONEDNN = False
    torch.set_default_dtype(dtype)
    try:
        with FakeTensorMode():
            yield
    finally:
        products.ONEDNN, default = before
        torch.set_default_dtype(default)


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
