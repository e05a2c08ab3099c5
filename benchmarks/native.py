"""Steps of training on images of mixed aspect, beside images of one size and as many patches.

    python benchmarks/native.py
    python benchmarks/native.py --patches 256 --width 384 --num-heads 6

Both kinds take turns of one step in one process, with one model's weights, texts, loss and optimizer: forward, loss,
backward, clip, AdamW, from uint8 in memory. The images of mixed aspect have sides in proportions from 1:8 to 8:1, all
equally likely on a log scale; those of one size fill a grid of as many patches, by the path of squares.

A row goes to results/native.jsonl: `mixed_ms` and `fixed_ms` are the processor's time of the median step of each kind,
`share` the median over the turns of fixed / mixed: 1 where mixed aspect takes no longer. `tokens` is how many patches
the images of mixed aspect have on average, for a grid seldom has just as many as it may.
"""

import math
import shlex
import statistics
import sys
import time
from dataclasses import dataclass

import torch
from rows import append, run_benchmark

from contrastive.data.preprocess import NativeSize, Preprocess, PreprocessConfig
from contrastive.distributed.runtime import Runtime
from contrastive.distributed.sharding import clip_gradients
from contrastive.losses import LOSSES
from contrastive.models import DualEncoder, ImageTowerConfig, ModelConfig, TextTowerConfig
from contrastive.optim import AdamWConfig, step_unless
from contrastive.option_types import Positive
from contrastive.patches import Patches
from contrastive.train.gradient import Batch, forward_backward

LENGTH, VOCABULARY, BATCHES = 32, 8192, 4


@dataclass(frozen=True)
class Options:
    patches: Positive[int] = 128
    """The most of an image; an even number."""
    patch_size: Positive[int] = 16
    """Side of a patch in pixels."""
    width: Positive[int] = 192
    """Channels of both towers."""
    depth: Positive[int] = 6
    """Blocks of both towers."""
    num_heads: Positive[int] = 3
    """Attention heads."""
    batch: Positive[int] = 32
    """Pairs in a step."""
    turns: Positive[int] = 12
    """Steps of each kind, after two that do not count."""
    results: str = "native"
    """Rows go to benchmarks/results/NAME.jsonl; an absolute NAME is a path of its own."""


def images_of(options: Options, generator: torch.Generator) -> Patches:
    """A batch of mixed aspect, uint8."""
    size, made = NativeSize(options.patch_size, options.patches), []
    for power in (6 * torch.rand(options.batch, generator=generator) - 3).tolist():
        height, width = size.of(round(1000 * 2 ** (power / 2)), round(1000 * 2 ** (-power / 2)))
        pixels = torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)
        made.append(Patches.of(pixels, options.patch_size))
    return Patches.batch(made)


def main(options: Options) -> None:
    side, runtime, patch = math.isqrt(options.patches), Runtime("fp32"), options.patch_size
    rows = next(n for n in range(side, 0, -1) if options.patches % n == 0)
    fixed = (rows * patch, options.patches // rows * patch)
    shape = {"width": options.width, "depth": options.depth, "num_heads": options.num_heads}
    shape |= {"mlp_dim": 4 * options.width}
    image = ImageTowerConfig(**shape, image_size=side * patch, patch_size=patch, native=True)
    text = TextTowerConfig(**shape, vocab_size=VOCABULARY, context_length=LENGTH)
    torch.manual_seed(0)
    model = DualEncoder(ModelConfig(options.width, image, text, init_logit_bias=-10.0))
    model.image_tower.set_input_size(fixed)  # so that nothing is resampled for images of the one size
    optimizers, loss = AdamWConfig().build(model), LOSSES.get("sigmoid")().build()
    normalize = Preprocess(PreprocessConfig(side * patch)).normalize
    generator = torch.Generator().manual_seed(1)
    batches = {
        "mixed": [images_of(options, generator) for _ in range(BATCHES)],
        "fixed": [torch.randint(0, 256, (options.batch, 3, *fixed), dtype=torch.uint8) for _ in range(BATCHES)],
    }
    tokens = torch.randint(0, VOCABULARY, (options.batch, LENGTH))
    ids, taken = torch.arange(options.batch), {name: [] for name in batches}
    for turn in range(options.turns + 2):
        for name, each in batches.items():
            began = time.process_time()
            batch = Batch(normalize(each[turn % BATCHES]), [tokens], ids)
            forward_backward(model, loss, batch, seed=(0, turn), runtime=runtime)
            clip_gradients(model.parameters(), 1.0)
            for optimizer in optimizers:
                step_unless(torch.tensor(False), optimizer)
                optimizer.zero_grad()
            taken[name].append(time.process_time() - began)
    mixed, one = (taken[name][2:] for name in ("mixed", "fixed"))
    row = {
        "what": "a step of training on images of mixed aspect, and on images of one size with as many patches",
        **{name: getattr(options, name) for name in ("patches", "patch_size", "width", "depth", "batch", "turns")},
        "tokens": round(torch.cat([each.lengths for each in batches["mixed"]]).float().mean().item(), 1),
        "mixed_ms": round(1e3 * statistics.median(mixed), 1),
        "fixed_ms": round(1e3 * statistics.median(one), 1),
        "share": round(statistics.median(b / a for a, b in zip(mixed, one, strict=True)), 3),
        "threads": torch.get_num_threads(),
    }
    append(options.results, row, shlex.join(["python", "benchmarks/native.py", *sys.argv[1:]]))
    print(row)


if __name__ == "__main__":
    run_benchmark("native.py", Options, __doc__, main)
