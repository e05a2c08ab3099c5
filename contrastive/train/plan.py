"""What a run will need, before anyone pays: parameters, FLOPs, memory of a rank, traffic, hours."""

import math
from dataclasses import dataclass, replace

import torch

from contrastive.distributed.collectives import GATHER_BYTES
from contrastive.errors import UserError, did_you_mean
from contrastive.named_sections import by_name, chosen
from contrastive.objectives import OBJECTIVES
from contrastive.option_types import Positive
from contrastive.train.contrastive_task import PretrainConfig, check
from contrastive.train.counting import Exchange, Weights, count_weights, model_of, one_pass, step_traffic
from contrastive.train.options import check_division, micro_batches, most_patches, resolve_native
from contrastive.train.pretrain import CLIP_VOCABULARY

FLOAT, HALF = 4, 2  # bytes
GIB = 2**30
CONTEXT = 1.5 * GIB
"""What CUDA, cuBLAS and NCCL keep for themselves on each GPU; an assumption."""


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU, by its maker's data sheet."""

    memory: float
    """In GiB, as torch sees it."""
    teraflops: float
    """Of dense bf16 products, in 10¹² a second."""


GPUS = {
    "a100-40": Gpu(39.4, 312),
    "a100": Gpu(79.1, 312),
    "h100": Gpu(79.1, 989),
    "h200": Gpu(139.8, 989),
    "b200": Gpu(178.4, 2250),
    "l4": Gpu(22.0, 121),
    "l40s": Gpu(44.4, 362),
    "rtx3090": Gpu(23.6, 71),
    "rtx4090": Gpu(23.5, 165),
    "mi300x": Gpu(191.5, 1307),
}


@dataclass(frozen=True)
class PlanConfig(PretrainConfig):
    """A run, and what it is to run on."""

    gpus: Positive[tuple[int, ...]] = (8,)
    """How many, over all machines; several numbers are compared."""
    gpu: str = "h100"
    """What kind; 'list' shows them."""
    utilisation: Positive[float] = 0.4
    """Share of the GPU's bf16 rate that the towers reach (MFU): 0.3 to 0.5 is usual."""
    num_samples: Positive[int | None] = None
    """Samples in the data, where the length of the run is given in epochs."""
    tokens: Positive[float | None] = None
    """Mean tokens of a caption, for towers whose padding is not computed; none: the whole context."""
    json: bool = False
    """Print the plan as JSON, memory and traffic in bytes, instead of a table."""


def rank_memory(
    config: PretrainConfig, weights: Weights, gpus: int, batch: int, tokens: int, bf16: bool, fsdp: bool
) -> dict[str, float]:
    """Return the bytes at most on each rank, by part, of a micro-batch of `batch` pairs.

    Without FSDP it is a single process, or DDP where there are several.
    """
    keeps = gpus == 1
    seen = one_pass(config, batch, tokens, bf16, keeps=keeps, sharded=fsdp and bf16)
    gradients, ranks = FLOAT * weights.trainable, gpus if fsdp else 1
    beside = max(seen.peak - (gradients if keeps else 0), weights.optimizer_peak / ranks, 0)
    parts = {
        "weights": FLOAT * weights.all / ranks,
        "gradients": gradients / ranks,
        "optimizer": weights.optimizer / ranks,
        "activations": beside,
        "loss": loss_memory(config, gpus, bf16),
    }
    if config.train.ema_decay is not None:
        parts["averaged weights"] = FLOAT * weights.all / ranks
    if fsdp:
        width, rest = HALF if bf16 else FLOAT, weights.all - weights.in_blocks
        # All outside the blocks stays gathered from forward to the end of backward, and so do its gradients; of the
        # blocks one is used while the next arrives, and one's gradients are summed in float32.
        parts["gathered"] = 2 * width * rest + (3 * width + FLOAT) * weights.largest_block
    return parts


def loss_memory(config: PretrainConfig, gpus: int, bf16: bool) -> float:
    """Bytes of the loss: features, those of the other ranks as they come, gradients in float32."""
    own = config.train.global_batch_size // gpus
    per_row = config.model.embed_dim * ((HALF if bf16 else FLOAT) + FLOAT)
    gathered = gpus * own * per_row
    others = gathered if gathered <= GATHER_BYTES else 4 * own * per_row  # of the ring, two blocks and their sums
    return 2 * own * per_row * config.data.captions_per_image + (others if gpus > 1 else 0)


def fitting_batch(
    config: PretrainConfig, weights: Weights, gpus: int, tokens: int, bf16: bool, fsdp: bool, room: float
) -> int:
    """Return the most pairs of a micro-batch that fit into `room` bytes and divide a rank's share; 0 if none does.

    Memory is linear in the pairs: two numbers of them tell.
    """
    few, many = (sum(rank_memory(config, weights, gpus, n, tokens, bf16, fsdp).values()) for n in (8, 16))
    most = 8 + math.floor((room - few) / max(1.0, (many - few) / 8))
    own = config.train.global_batch_size // gpus
    return max((part for part in range(1, own + 1) if own % part == 0 and part <= most), default=0)


@dataclass(frozen=True)
class Forecast:
    """A run on a number of GPUs. Memory in bytes by part, for a micro-batch as configured."""

    gpus: int
    own_pairs: int
    """Of a rank, in a step."""
    micro_batch: int
    ddp: dict[str, float]
    fsdp: dict[str, float] | None
    """None on one GPU, where nothing is to be shared out."""
    ddp_batch: int
    """Pairs of the largest micro-batch that fits; 0 where none does."""
    fsdp_batch: int
    ddp_sent: float
    """Bytes that a rank sends in a step."""
    fsdp_sent: float
    samples_per_second: float
    hours: float | None
    """None where the length of the run is not known."""


@dataclass(frozen=True)
class Plan:
    """What `make_plan` found. FLOPs are of one pair, their mean over the run where objectives begin on the way:
    `model_flops` forward and backward, `flops` with what is computed twice to save memory. Memory is with all of them.
    """

    weights: Weights
    model_flops: float
    flops: float
    tokens: int
    room: float
    forecasts: list[Forecast]


def make_plan(config: PlanConfig) -> Plan:
    """Count what the run needs on each number of GPUs.

    Raises:
        UserError: an unknown GPU, options that cannot work, a batch that the GPUs do not divide.
    """
    if config.gpu not in GPUS:
        known = ", ".join(GPUS)
        raise UserError(f"unknown GPU '{config.gpu}'.{did_you_mean(config.gpu, GPUS)} known are {known}")
    check(config)
    if config.loss_name == "none":
        raise UserError("contrastive plan counts both towers; of runs with --loss none it knows nothing yet")
    for gpus in config.gpus:
        check_division(config.train, gpus)
    config = resolve_native(with_vocabulary(config), config.model.image)
    text, gpu = config.model.text, GPUS[config.gpu]
    if config.tokens is not None and (text.pool == "last" or (text.attend_padding and not text.causal)):
        raise UserError("tokens: this text tower computes its padding, so that all captions count as the whole context")
    tokens = math.ceil(config.tokens or text.context_length)
    bf16, weights = config.train.precision != "fp32", count_weights(config)
    flops = model_flops = again = 0.0
    for share, stage in stages(config):
        once = one_pass(stage, 8, tokens, bf16, keeps=False)
        plainly = replace(stage, train=replace(config.train, gradient_checkpointing=0.0))
        model_flops += share * one_pass(plainly, 8, tokens, bf16, keeps=False).both / 8
        flops += share * once.both / 8
        again += share * once.forward / 8
    room, samples = gpu.memory * GIB - CONTEXT, _samples(config)

    def on(gpus: int) -> tuple[PlanConfig, float]:
        samples, most = config.train.global_batch_size // gpus, most_patches(config, config.model.image)
        parts = micro_batches(config.train, samples, most)
        # Micro-batches are embedded once more, without a graph, before the loss of all of them is known.
        return replace(config, train=replace(config.train, accumulate=parts)), flops + (again if parts > 1 else 0)

    def forecast(gpus: int) -> Forecast:
        own_pairs = config.train.global_batch_size // gpus
        own, own_flops = on(gpus)
        micro_batch = own_pairs // own.train.accumulate
        common = own, weights, gpus
        rate = gpus * gpu.teraflops * 1e12 * config.utilisation / own_flops
        return Forecast(
            gpus,
            own_pairs,
            micro_batch,
            rank_memory(*common, micro_batch, tokens, bf16, False),
            rank_memory(*common, micro_batch, tokens, bf16, True) if gpus > 1 else None,
            fitting_batch(*common, tokens, bf16, False, room),
            fitting_batch(*common, tokens, bf16, True, room) if gpus > 1 else 0,
            sum(traffic(own, gpus, bf16, False).values()),
            sum(traffic(own, gpus, bf16, True).values()),
            rate,
            None if samples is None else samples / rate / 3600,
        )

    return Plan(weights, model_flops, on(config.gpus[0])[1], tokens, room, [forecast(gpus) for gpus in config.gpus])


def stages(config: PretrainConfig) -> list[tuple[float, PretrainConfig]]:
    """Return the shares of the run that have the same objectives, each with the options of a run of those alone."""
    options = by_name(config.objectives)
    starts = sorted({0.0, *(own.start for own in options.values())})
    found = []
    for start, end in zip(starts, [*starts[1:], 1.0], strict=True):
        active = {name: own for name, own in options.items() if own.start <= start}
        found.append((end - start, replace(config, objectives=chosen(OBJECTIVES, active))))
    return found


def traffic(config: PretrainConfig, gpus: int, bf16: bool, fsdp: bool) -> dict[str, float]:
    """Return the bytes that each GPU sends in a step, by what for."""
    with torch.device("meta"):
        model = model_of(config)
    captions = config.data.captions_per_image
    pairs_of_captions = captions * (captions - 1) // 2 if config.between_captions else 0
    how = Exchange(
        world_size=gpus,
        sharded=fsdp,
        bf16=bf16,
        accumulate=config.train.accumulate,
        loss=config.loss_name if config.loss_name in ("sigmoid", "softmax") else None,
        num_losses=captions + pairs_of_captions,
        duplicates="negative" if config.loss.duplicates == "auto" else config.loss.duplicates,
        global_batch_size=config.train.global_batch_size,
        embed_dim=config.model.embed_dim,
        feature_bytes=HALF if bf16 else FLOAT,
    )
    return step_traffic(model, config.optimizer.build(model), how)


def with_vocabulary(config: PlanConfig) -> PlanConfig:
    """Return the options with a vocabulary: the model's, else that of the tokenizer named, else the largest bpe."""
    if config.model.text.vocab_size is not None:
        return config
    size = CLIP_VOCABULARY if config.data.tokenizer == "clip" else config.data.vocab_size
    return replace(config, model=replace(config.model, text=replace(config.model.text, vocab_size=size)))


def _samples(config: PlanConfig) -> float | None:
    train = config.train
    if train.epochs is not None:
        return None if config.num_samples is None else train.epochs * config.num_samples
    return train.samples if train.samples is not None else train.steps * train.global_batch_size


def suggested(config: PlanConfig, recipe_batch: int) -> tuple[float, int | None]:
    """Return a learning rate and, where the run's length is known, a warm-up in steps, for the batch of `config`.

    The rate grows with the square root of the batch from the recipe's, as is usual for AdamW (Malladi et al. 2022,
    "On the SDEs and Scaling Rules for Adaptive Gradient Algorithms"). The warm-up is the recipe's, but a tenth at most.
    """
    growth, samples = config.train.global_batch_size / recipe_batch, _samples(config)
    rate = config.optimizer.lr * math.sqrt(growth)
    if samples is None:
        return rate, config.schedule.warmup_steps
    steps = max(1, round(samples / config.train.global_batch_size))
    usual = max(100, round(0.03 * steps)) if config.schedule.warmup_steps is None else config.schedule.warmup_steps
    return rate, min(usual, max(1, steps // 10))
