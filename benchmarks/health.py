"""What a step pays for the health checks: one run in which every second step goes without them.

    python benchmarks/health.py
    python benchmarks/health.py --config configs/quickstart.yaml --steps 200

The checks are the hang watch, armed anew after each step, and the judge of each step's loss. Both sorts of steps are of
one process and one minute, timed by the processor, which a busy machine does not change; `share` is what the medians
differ by. `alone` is what the checks take by themselves, on average.
"""

import shlex
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from rows import append, run_benchmark

from contrastive.option_types import Positive
from contrastive.train.health import HangWatch, Judge
from contrastive.train.loop import Trainer
from contrastive.train.pretrain import PretrainConfig, pretrain
from contrastive.train.run import command

TOY = """
model:
  embed_dim: 16
  image: {image_size: 16, patch_size: 8, width: 16, depth: 1, num_heads: 2, mlp_dim: 32}
  text: {context_length: 8, width: 16, depth: 1, num_heads: 2, mlp_dim: 32}
data: {train: "digits:train", vocab_size: 300}
train: {global_batch_size: 16}
"""
SETTLE = 20  # steps at the start that do not count


@dataclass(frozen=True)
class Options:
    config: str | None = None
    """Of the run, instead of a toy."""
    steps: Positive[int] = 2000
    """How many."""
    results: str = "health"
    """Rows go to benchmarks/results/NAME.jsonl; an absolute NAME is a path of its own."""


class Clock:
    """Times the checks of every second step, and leaves them out of the others."""

    def __init__(self):
        self.step, self.began, self.alone = 0, 0.0, 0.0
        self.seconds: dict[bool, list[float]] = {True: [], False: []}
        self.checks: list[float] = []

    @property
    def on(self) -> bool:
        return self.step % 2 == 0

    def step_begins(self) -> None:
        now = time.process_time()
        if self.step >= SETTLE:
            self.seconds[self.on].append(now - self.began)
            if self.on:
                self.checks.append(self.alone)
        self.step, self.began, self.alone = self.step + 1, now, 0.0

    def timed(self, call):
        def inside(*args):
            if self.on:
                began = time.thread_time()
                call(*args)
                self.alone += time.thread_time() - began

        return inside


def main(options: Options) -> None:
    clock, one_step = Clock(), Trainer._one_step

    def one_timed_step(*args):
        clock.step_begins()
        return one_step(*args)

    Trainer._one_step = one_timed_step
    HangWatch.step_done, Judge.consider = clock.timed(HangWatch.step_done), clock.timed(Judge.consider)
    with tempfile.TemporaryDirectory() as folder:
        config = Path(options.config) if options.config else Path(folder, "toy.yaml")
        if not options.config:
            config.write_text(TOY)
        never = [flag for name in ("checkpoint", "evaluation") for flag in (f"--{name}.every", "1000000")]
        words = ["--config", str(config), "--run_folder", f"{folder}/run", "--train.steps", str(options.steps)]
        words += never if options.config else never[:2]
        command(PretrainConfig, pretrain, words, name="health", doc="", default_recipe=str(config), shown="")
    on, off = (statistics.median(clock.seconds[sort]) for sort in (True, False))
    row = {
        "what": "median processor time of a step with and without health checks, taken in turn",
        "config": options.config or "toy",
        "steps": len(clock.checks),
        "ms": {"on": round(1e3 * on, 4), "off": round(1e3 * off, 4)},
        "share": round(on / off - 1, 5),
        "alone_ms": round(1e3 * statistics.mean(clock.checks), 5),
        "alone_share": round(statistics.mean(clock.checks) / off, 5),
    }
    append(options.results, row, shlex.join(["python", "benchmarks/health.py", *sys.argv[1:]]))
    print(f"{1e3 * on:.3f} ms with, {1e3 * off:.3f} without; the checks alone {row['alone_share']:.2%}", flush=True)


if __name__ == "__main__":
    run_benchmark("health.py", Options, __doc__, main)
