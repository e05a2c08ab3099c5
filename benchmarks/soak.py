"""Memory, open files and threads of a training run over an hour: flat, or not.

    python benchmarks/soak.py --data 'flickr8k/train-*.tar'
    python benchmarks/soak.py --minutes 5

A run of small towers with loader workers, checkpoints and evaluations is looked at every few seconds, all its processes
together. Memory is the proportional set size: pages that several processes share count once. The slope is that of a
line through all looks after the first quarter, in MB an hour, with its standard error; what is allocated once is in the
quarter before. `rise` is the median of the last tenth less that of the tenth after the first quarter.
"""

import shlex
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
from rows import append, run_benchmark

from contrastive.errors import UserError
from contrastive.log import read_metrics
from contrastive.option_types import Positive

ROOT = Path(__file__).resolve().parents[1]
TO_END = 60  # seconds that the run has to save and end
Look = tuple[float, int, int, int, int]  # seconds, bytes, open files, threads, processes


@dataclass(frozen=True)
class Options:
    data: str = "scenes"
    """Image-text pairs."""
    minutes: Positive[float] = 60.0
    """How long to watch."""
    workers: Positive[int] = 2
    """Loader processes."""
    every: Positive[float] = 5.0
    """Seconds between two looks."""
    results: str = "soak"
    """Rows go to benchmarks/results/NAME.jsonl; an absolute NAME is a path of its own."""


def main(options: Options) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder, "run")
        flags = [
            "--model.embed_dim",
            "32",
            "--data",
            options.data,
            "--data.eval",
            options.data,
            "--data.num_workers",
            str(options.workers),
        ]
        flags += ["--model.image.width", "32", "--model.image.depth", "2", "--model.image.mlp_dim", "64"]
        flags += ["--train.steps", "100000000", "--train.global_batch_size", "32", "--checkpoint.every", "500"]
        flags += ["--evaluation.every", "1000", "--evaluation.limit", "256", "--run_folder", str(run)]
        with (Path(folder) / "log").open("w") as log:
            command = [sys.executable, "scripts/pretrain.py", *flags]
            process = psutil.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        try:
            looks = _watch(process, run / "metrics.jsonl", options, Path(folder) / "log")
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            process.wait(TO_END)
        steps = max(row["step"] for row in read_metrics(run / "metrics.jsonl"))
    row = {
        "what": "a training run watched: memory of all its processes, open files, threads",
        "minutes": options.minutes,
        "workers": options.workers,
        "steps": steps,
        **summary(looks),
    }
    append(options.results, row, shlex.join(["python", "benchmarks/soak.py", *sys.argv[1:]]))
    print(row)


def _watch(process: psutil.Process, metrics: Path, options: Options, log: Path) -> list[Look]:
    """Return what was seen from the first row of figures on, for so many minutes."""
    while not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.2)
        _check(process, log)
    started, looks = time.monotonic(), []
    while (seconds := time.monotonic() - started) < 60 * options.minutes:
        _check(process, log)
        looks.append(_look(process, seconds))
        if sys.stdout.isatty():
            told = f"{seconds / 60:.1f} of {options.minutes:g} minutes, {looks[-1][1] / 1e6:.0f} MB"
            print(told, end="\r", flush=True)
        time.sleep(options.every)
    return looks


def _check(process: psutil.Process, log: Path) -> None:
    if process.poll() is not None:
        raise UserError(f"the run ended by itself: {log.read_text().strip().splitlines()[-1:]}")


def _look(process: psutil.Process, seconds: float) -> Look:
    seen = []
    for each in (process, *process.children(recursive=True)):
        try:
            seen.append((each.memory_full_info().pss, each.num_fds(), each.num_threads(), 1))
        except psutil.NoSuchProcess:  # a worker of an evaluation, which has ended meanwhile
            continue
    return (seconds, *map(sum, zip(*seen, strict=True)))


def summary(looks: list[Look]) -> dict:
    """Return slopes and levels of what was seen."""
    seconds, memory, files, threads, _ = np.array(looks[len(looks) // 4 :], dtype=np.float64).T
    hours, megabytes = seconds / 3600, memory / 1e6
    (slope, _), covariance = np.polyfit(hours, megabytes, 1, cov=True)
    tenth = max(1, len(looks) // 10)
    return {
        "looks": len(looks),
        "megabytes_median": round(float(np.median(megabytes)), 1),
        "megabytes_per_hour": round(float(slope), 2),
        "megabytes_per_hour_error": round(float(covariance[0, 0]) ** 0.5, 2),
        "megabytes_rise": round(float(np.median(megabytes[-tenth:]) - np.median(megabytes[:tenth])), 2),
        "open_files": [int(files[:tenth].max()), int(files[-tenth:].max())],
        "threads": [int(threads[:tenth].max()), int(threads[-tenth:].max())],
    }


if __name__ == "__main__":
    run_benchmark("soak.py", Options, __doc__, main)
