"""Samples a second of one training step, ours beside open_clip's: forward, loss, backward, clip, AdamW.

    python benchmarks/step.py --data 'flickr8k/train-000000.tar'
    python benchmarks/step.py --data 'flickr8k/train-000000.tar' --models ViT-S-16 --sizes 224 --compile both
    python benchmarks/step.py --data scenes --models ViT-B-16 --sizes 224 --precision bf16 --rivals ours  # and its MFU

Both train the same towers from the same weights on the same real pairs, which lie decoded in memory: uint8 images for
ours, as a run's loader yields them and normalised in the step, floats for open_clip, as its own does; texts by CLIP's
tokenizer, padded to 77 ids for CLIP's towers and to 64 for SigLIP's. Ours is a run's own task, optimizer and clipping.
open_clip's is what `open_clip_train` does in a step, with fused AdamW, which it has no flag for and is faster with.

Rivals take turns of `--steps` steps in one process, so that the machine's drift hits all alike; medians over the
rounds, and the ratio is the median of the rounds' ratios. With `--compile` the faster of eager and compiled counts.
`loss_difference` is that of the first step, relative. A row for each model and size goes to results/step.jsonl.

`mfu`: the matrix products of the towers' blocks that a step of these pairs takes, three times forward's, without
padding and recomputation, over our time and the GPU's dense bf16 peak; null where that is not known here, or in fp32.
Alone (`--rivals ours`) open_clip need not be installed: texts are then split by a vocabulary learned from the data.
"""

import importlib.util
import itertools
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch
from rows import append, run_benchmark
from torch import nn

from contrastive.data.loader import train_loader
from contrastive.data.order import Order
from contrastive.data.record import Source
from contrastive.data.sources import open_source
from contrastive.data.tokenizer import clip_tokenizer, train_bpe
from contrastive.distributed.runtime import Runtime
from contrastive.errors import UserError
from contrastive.interop.bundle import Bundle
from contrastive.interop.formats import open_clip_folder
from contrastive.losses import LOSSES
from contrastive.models import ImageTowerConfig, ModelConfig, TextTowerConfig
from contrastive.models.presets import model_config
from contrastive.optim import AdamWConfig
from contrastive.option_types import Positive
from contrastive.train.contrastive_task import ContrastiveTask, PretrainConfig, resolve
from contrastive.train.options import TrainConfig

CLIP_MODELS = "ViT-Ti-16", "ViT-S-16", "ViT-B-32", "ViT-B-16"
ModelName = Literal[(*CLIP_MODELS, "ViT-Ti-16-SigLIP", "ViT-S-16-SigLIP", "ViT-B-16-SigLIP")]
RivalName = Literal["ours", "open_clip"]
PEAK_FLOPS = {"H200": 989e12, "H100 80GB HBM3": 989e12, "A100": 312e12}
"""A second, dense bf16, by a part of the GPU's name: NVIDIA's data sheets."""
NUM_BATCHES = 4  # different ones, in turn
MAX_GRAD_NORM = 1.0
Step = Callable[[], torch.Tensor]  # one step; returns its loss


@dataclass(frozen=True)
class Options:
    data: str
    """Image-text pairs: a shard of Flickr8k, or any other source."""
    models: tuple[ModelName, ...] = ("ViT-Ti-16", "ViT-S-16", "ViT-Ti-16-SigLIP", "ViT-S-16-SigLIP")
    """Towers. CLIP's train with the softmax loss, SigLIP's with the sigmoid loss."""
    rivals: tuple[RivalName, ...] = ("ours", "open_clip")
    """Who is measured; ours always is."""
    sizes: tuple[int, ...] = (112, 224)
    """Height and width of the images in pixels."""
    batch: Positive[int] = 64
    """Pairs in a step."""
    rounds: Positive[int] = 5
    """Turns of each rival."""
    steps: Positive[int] = 3
    """Steps in a turn."""
    threads: Positive[int | None] = None
    """CPU threads; none: torch's own number."""
    compile: Literal["none", "ours", "both"] = "none"
    """Who is measured compiled too, and takes the faster of both."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the towers; the losses are fp32."""
    results: str = "step"
    """Rows go to benchmarks/results/NAME.jsonl; an absolute NAME is a path of its own."""


class Pair:
    """One model, as both of us train it, on batches that lie in memory."""

    def __init__(self, name: str, size: int, source: Source, options: Options, runtime: Runtime):
        self.name, self.size, self.options, self.runtime = name, size, options, runtime
        self.is_siglip = "SigLIP" in name
        config = model_config(name)
        length = config.text.context_length
        if importlib.util.find_spec("open_clip"):
            tokenizer = clip_tokenizer(length)
        else:
            tokenizer = train_bpe((text for n in range(1000) for text in source.captions(n)), context_length=length)
        text = replace(config.text, vocab_size=tokenizer.vocab_size, eos_id=None, pad_id=None)
        config = PretrainConfig(
            loss=LOSSES.get("sigmoid" if self.is_siglip else "softmax")(),
            model=replace(config, image=replace(config.image, image_size=size), text=text),
            optimizer=AdamWConfig(lr=1e-4),
            train=TrainConfig(steps=NUM_BATCHES, global_batch_size=options.batch, max_grad_norm=MAX_GRAD_NORM),
        )
        self.config = resolve(config, source, tokenizer)
        self.tokenizer, self.source = tokenizer, source
        task = self.task()
        order = Order(len(source), options.batch, seed=0)
        self.batches = list(train_loader(task.dataset(order), num_steps=NUM_BATCHES))
        self.parameters = sum(p.numel() for p in task.model.parameters())

    def task(self) -> ContrastiveTask:
        """A run's task, with the same first weights at every call."""
        return ContrastiveTask(self.config, self.source, self.tokenizer, held_out=[])

    @cached_property
    def texts(self) -> list[torch.Tensor]:
        """The batches' ids, each text padded to the whole length, whatever our loader leaves out."""
        length, pad = self.config.model.text.context_length, self.tokenizer.pad_id
        return [
            nn.functional.pad(batch["tokens"], (0, length - batch["tokens"].shape[1]), value=pad)
            for batch in self.batches
        ]

    def ours(self, compiled: bool) -> Step:
        task, runtime, numbers = self.task(), self.runtime, itertools.count()
        model = task.model.to(runtime.device).train()
        if compiled:
            for tower in (model.image_tower, model.text_tower):
                tower.transformer.compile_blocks()
        optimizers, wrapped = self.config.optimizer.build(model), runtime.wrap(model)
        batches = runtime.on_device(itertools.cycle(self.batches), task.inputs)

        def step() -> torch.Tensor:
            _, inputs = next(batches)
            number = next(numbers)
            loss = task.forward_backward(wrapped, inputs, number, runtime)["loss"]
            nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
            with torch.no_grad():
                for optimizer in optimizers:
                    optimizer.step()
                task.after_update(number, torch.zeros((), dtype=torch.bool))
            for optimizer in optimizers:
                optimizer.zero_grad()
            return loss

        return step

    def open_clip(self, compiled: bool) -> Step:
        """What open_clip_train/train.py does in a step of one process, with main.py's groups of parameters."""
        from open_clip.loss import ClipLoss, SigLipLoss

        device, task, numbers = self.runtime.device, self.task(), itertools.count()
        model = self.exported(task).to(device).train()
        adam, forward = self.config.optimizer, torch.compile(model) if compiled else model
        optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
                {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": adam.weight_decay},
            ],
            lr=adam.lr,
            betas=(0.9, adam.beta2),
            eps=adam.eps,
            fused=True,
        )
        loss = SigLipLoss() if self.is_siglip else ClipLoss()
        pixels = [task.preprocess.normalize(batch["image"]) for batch in self.batches]
        amp = torch.autocast(device.type, torch.bfloat16, enabled=self.options.precision == "bf16")

        def step() -> torch.Tensor:
            number = next(numbers) % NUM_BATCHES
            optimizer.zero_grad()
            with amp:
                image, text = (tensors[number].to(device, non_blocking=True) for tensors in (pixels, self.texts))
                value = loss(*forward(image, text))
            value.backward()
            nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
            optimizer.step()
            with torch.no_grad():
                model.logit_scale.clamp_(0, 4.6052)
            return value.detach()

        return step

    def exported(self, task: ContrastiveTask) -> nn.Module:
        """open_clip's model with the task's sizes and weights."""
        import open_clip

        bundle = Bundle(task.model, task.preprocess, self.tokenizer, self.config.model, Path(self.name))
        with tempfile.TemporaryDirectory() as folder:
            open_clip_folder.write(bundle, Path(folder), Path(folder))
            return open_clip.create_model(f"local-dir:{folder}")


def main(options: Options) -> None:
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    runtime = Runtime(options.precision)
    source = open_source(options.data)
    if source.class_names is not None or len(source) < NUM_BATCHES * options.batch:
        raise UserError(f"--data {options.data}: give at least {NUM_BATCHES * options.batch} captioned images")
    for name, size in itertools.product(options.models, options.sizes):
        row = _measure(Pair(name, size, source, options, runtime))
        append(options.results, row, shlex.join(["python", "benchmarks/step.py", *sys.argv[1:]]))
        found = "  ".join(f"{rival} {rate}" for rival, rate in row["samples_per_second"].items())
        print(f"{name} {size} px, {row['parameters']:,} parameters: {found}{_told(row)}", flush=True)


def _measure(pair: Pair) -> dict:
    """Return the row of one model at one size."""
    options, device = pair.options, pair.runtime.device
    steps = {"ours": pair.ours(False)}
    if "open_clip" in options.rivals:
        steps["open_clip"] = pair.open_clip(False)
    if options.compile != "none":
        steps["ours_compiled"] = pair.ours(True)
    if options.compile == "both" and "open_clip" in options.rivals:
        steps["open_clip_compiled"] = pair.open_clip(True)
    first = {name: step().item() for name, step in steps.items()}
    for step in steps.values():  # a second one: the optimizer has its state now
        step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(options.rounds):
        for name, step in steps.items():
            seconds[name].append(_seconds(step, options.steps, device))
    best = {
        side: min((name for name in steps if name.startswith(side)), key=lambda name: statistics.median(seconds[name]))
        for side in dict.fromkeys(("ours", *options.rivals))
    }
    row = _row(
        pair, {name: round(options.batch / statistics.median(times), 1) for name, times in seconds.items()}, best
    )
    flops = block_flops(pair.config.model, options.batch, [(ids != pair.tokenizer.pad_id).sum(1) for ids in pair.texts])
    row["block_tflop"] = float(f"{flops / 1e12:.4g}")
    row["mfu"] = _mfu(flops / statistics.median(seconds[best["ours"]]), pair.runtime)
    if "open_clip" in options.rivals:
        ratios = [theirs / ours for ours, theirs in zip(seconds[best["ours"]], seconds[best["open_clip"]], strict=True)]
        row["ratio"] = round(statistics.median(ratios), 3)
        row["loss_difference"] = float(f"{abs(first['ours'] / first['open_clip'] - 1):.1e}")
        row["open_clip"] = version("open_clip_torch")
    return row


def _row(pair: Pair, rates: dict[str, float], best: dict[str, str]) -> dict:
    options = pair.options
    filled = torch.cat(pair.texts) != pair.tokenizer.pad_id
    return {
        "what": "a training step of prepared pairs: forward, loss, backward, clip, AdamW",
        "model": pair.name,
        "image_size": pair.size,
        "context_length": pair.config.model.text.context_length,
        "tokens_mean": round(filled.sum(1).float().mean().item(), 1),
        "batch": options.batch,
        "precision": pair.runtime.precision,
        "threads": torch.get_num_threads(),
        "rounds": options.rounds,
        "steps": options.steps,
        "parameters": pair.parameters,
        "samples_per_second": rates,
        "best": best,
    }


def block_flops(model: ModelConfig, batch: int, lengths: list[torch.Tensor]) -> float:
    """Return the FLOPs of a step's products in the blocks of both towers, forward and backward.

    Args:
        lengths: tokens of each text of several batches (B,), of which the mean is taken.
    """
    images = torch.full((batch,), model.image.num_patches + model.image.class_token)
    return _tower_flops(model.image, images) + sum(_tower_flops(model.text, n) for n in lengths) / len(lengths)


def _tower_flops(tower: ImageTowerConfig | TextTowerConfig, lengths: torch.Tensor) -> float:
    weights = 4 * tower.width**2 + 2 * tower.width * tower.mlp_dim
    # Queries by keys, and weights by values; what causal attention leaves out of a short text does not show.
    attention = 2 * tower.width * lengths.double().square().sum().item()
    return 3 * 2 * tower.depth * (weights * lengths.sum().item() + attention)


def _mfu(flops_per_second: float, runtime: Runtime) -> float | None:
    """Return the share of the GPU's peak, where it is known."""
    if runtime.device.type != "cuda" or runtime.precision != "bf16":
        return None
    name = torch.cuda.get_device_name()
    peak = next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)
    return peak and round(flops_per_second / peak, 4)


def _told(row: dict) -> str:
    return "".join(f"  {name} {row[name]}" for name in ("ratio", "mfu") if row.get(name) is not None)


def _seconds(step: Step, steps: int, device: torch.device) -> float:
    """Return the seconds of one of so many steps."""
    started = time.perf_counter()
    for _ in range(steps):
        loss = step()
    loss.item()  # a GPU is waited for
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / steps


if __name__ == "__main__":
    run_benchmark("step.py", Options, __doc__, main)
