"""How long a save holds up training: written beside it from a copy in host memory, and by a loop that waits.

    python benchmarks/checkpoint.py
    python benchmarks/checkpoint.py --model clip_vit_b_32 --rounds 3 --folder /mnt/disk

A run's own saver saves a dual encoder with AdamW's state on a CPU, in turns: once the loop waits for the disk, once it
goes on. Medians over the rounds; `stall_share` is the median of the rounds' ratios of the two times in which the loop
stood still. The first save beside training, which makes the buffers, is no round: it is `first_stall_seconds`.

What the writer costs the steps beside it is apart: a step is matrix products on one thread with some Python between
them, alone (`step_ms`) and beside the writer (`step_ms_beside`). `longest_gil_wait_ms` is how long a thread that wants
to run Python every millisecond had to wait at most, alone and beside.
"""

import shlex
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rows import append, run_benchmark

import contrastive
from contrastive.data.preprocess import PreprocessConfig
from contrastive.data.tokenizer import train_bpe
from contrastive.errors import UserError
from contrastive.files import problem
from contrastive.interop.bundle import save_model
from contrastive.optim import AdamWConfig
from contrastive.option_types import Positive
from contrastive.train.options import CheckpointConfig
from contrastive.train.saver import CheckpointSaver


@dataclass(frozen=True)
class Options:
    model: str = "siglip_vit_b_16"
    """Whose state is saved; a name of contrastive.list_models()."""
    rounds: Positive[int] = 5
    """Saves of each kind."""
    step_size: Positive[int] = 512
    """Rows of the products in a step."""
    folder: Path | None = None
    """On the disk that is written to, removed at the end; none: a temporary folder."""
    results: str = "checkpoint"
    """Rows go to benchmarks/results/NAME.jsonl; an absolute NAME is a path of its own."""


class Waits:
    """A thread that sleeps for a millisecond again and again; `longest` is by how much it came late, in seconds."""

    def __enter__(self) -> "Waits":
        self.longest, self._ended = 0.0, threading.Event()
        self._thread = threading.Thread(target=self._wait)
        self._thread.start()
        return self

    def __exit__(self, *error) -> None:
        self._ended.set()
        self._thread.join()

    def _wait(self) -> None:
        before = time.perf_counter()
        while not self._ended.is_set():
            time.sleep(0.001)
            now = time.perf_counter()
            self.longest, before = max(self.longest, now - before - 0.001), now


def main(options: Options) -> None:
    torch.set_num_threads(1)
    model = contrastive.create_model(options.model)
    (optimizer,) = optimizers = AdamWConfig().build(model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    with _place(options.folder) as folder:
        row = _measure(model, optimizers, folder, options)
    row = {"what": "a save of a dual encoder with AdamW's state on a CPU", "model": options.model, **row}
    append(options.results, row, shlex.join(["python", "benchmarks/checkpoint.py", *sys.argv[1:]]))
    print("  ".join(f"{name} {value}" for name, value in row.items() if name != "what"))


@contextmanager
def _place(folder: Path | None):
    if folder is None:
        with tempfile.TemporaryDirectory() as made:
            yield Path(made)
        return
    if folder.exists():
        raise UserError(f"--folder {folder} exists; give one that can be made, and removed")
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _measure(model: torch.nn.Module, optimizers: list, folder: Path, options: Options) -> dict:
    tokenizer = train_bpe(["a red circle", "a blue star"], 300, 8)

    def save_parts(to: Path, weights, average) -> None:
        save_model(to, weights, model.config, PreprocessConfig(224), tokenizer, average)

    def saver(background: bool) -> CheckpointSaver:
        config = CheckpointConfig(every=1, keep=1, background=background)
        return CheckpointSaver(folder / str(background), config, model, optimizers, None, save_parts)

    step = partial(_step, torch.randn(options.step_size, options.step_size))
    seconds = {name: [] for name in ("waited", "stall", "writing", "alone", "beside")}
    longest = {"alone": 0.0, "beside": 0.0}
    with saver(False) as waiting, saver(True) as beside:
        first = _seconds(lambda: beside.save({"step": 0}, in_background=True))
        beside.finish()
        for number in range(1, options.rounds + 1):
            with Waits() as waits:
                seconds["alone"] += [_seconds(step) for _ in range(20)]
            longest["alone"] = max(longest["alone"], waits.longest)
            seconds["waited"].append(_seconds(lambda: waiting.save({"step": number}, in_background=True)))  # noqa: B023
            began = time.perf_counter()
            seconds["stall"].append(_seconds(lambda: beside.save({"step": number}, in_background=True)))  # noqa: B023
            with Waits() as waits:
                while not beside.failed and beside._pending is not None:
                    seconds["beside"].append(_seconds(step))
            seconds["writing"].append(time.perf_counter() - began)
            longest["beside"] = max(longest["beside"], waits.longest)
            beside.finish()
    newest = folder / "True" / f"step-{options.rounds:08d}"
    if problem(newest) is not None:
        raise UserError(f"{newest}: {problem(newest)}")
    median = {name: statistics.median(times) for name, times in seconds.items()}
    shares = [stall / waited for stall, waited in zip(seconds["stall"], seconds["waited"], strict=True)]
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "gigabytes": round(sum(path.stat().st_size for path in newest.rglob("*") if path.is_file()) / 1e9, 3),
        "rounds": options.rounds,
        "waited_seconds": round(median["waited"], 3),
        "stall_seconds": round(median["stall"], 4),
        "stall_share": round(statistics.median(shares), 4),
        "first_stall_seconds": round(first, 4),
        "writing_seconds": round(median["writing"], 3),
        "step_ms": round(median["alone"] * 1000, 2),
        "step_ms_beside": round(median["beside"] * 1000, 2),
        "longest_gil_wait_ms": {name: round(value * 1000, 1) for name, value in longest.items()},
    }


def _step(matrix: torch.Tensor) -> None:
    for _ in range(5):
        matrix @ matrix
        sum(range(5_000))


def _seconds(call: Callable[[], None]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


if __name__ == "__main__":
    run_benchmark("checkpoint.py", Options, __doc__, main)
