"""Samples a second of the quickstart on all cores: on a quiet machine, and beside a busy process for each core.

    python benchmarks/busy.py
    python benchmarks/busy.py --ways processes default 500 100000 passive

`processes`: one of a single thread for each core, as `make quickstart` starts them. The other ways are one process with
a thread for each core. A thread that is done with its part of a product spins until the others are, so many times
(GOMP_SPINCOUNT), before it sleeps: a number; `default`, what the package sets; `passive`, not at all (OMP_WAIT_POLICY).

Each is a training run; all but one are stopped at a time (SIGSTOP), so that the machine's drift hits all alike. Medians
over the rounds. The busy processes count to no end.
"""

import os
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
from rows import append, run_benchmark

from contrastive.errors import UserError
from contrastive.log import read_metrics
from contrastive.option_types import Positive

ROOT = Path(__file__).resolve().parents[1]
BATCH = 128
SETTLE = 1.0  # seconds at the start of a turn that do not count


@dataclass(frozen=True)
class Options:
    ways: tuple[str, ...] = ("processes", "default")
    """How the cores are used: 'processes', 'default', 'passive', or a number of spins."""
    rounds: Positive[int] = 5
    """Turns of each, quiet and busy."""
    seconds: Positive[float] = 6.0
    """Of a turn."""
    results: str = "busy"
    """Rows go to benchmarks/results/NAME.jsonl; an absolute NAME is a path of its own."""


class Run:
    """The quickstart, training until it is killed; it stands still outside `rate`."""

    def __init__(self, way: str, folder: Path):
        self.folder = folder
        never = ("--train.steps", "1000000", "--evaluation.every", "1000000", "--checkpoint.every", "1000000")
        command = ["scripts/pretrain.py", "--loss", "sigmoid", "--run_folder", str(folder), *never]
        environment = {key: value for key, value in os.environ.items() if key[:4] not in ("OMP_", "GOMP")}
        environment["PYTHONPATH"] = str(ROOT)
        if way == "processes":
            environment |= {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
            cores = len(os.sched_getaffinity(0))
            command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(cores), *command]
        elif way == "passive":
            environment["OMP_WAIT_POLICY"] = "PASSIVE"
        elif way != "default":
            environment["GOMP_SPINCOUNT"] = way
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = psutil.Popen([sys.executable, *command], cwd=ROOT, env=environment, **quiet)
        while self.steps() < 10:
            time.sleep(0.2)
            if self.process.poll() is not None:
                raise UserError(f"the quickstart ended by itself; see what `python {shlex.join(command)}` says")
        self.signal(signal.SIGSTOP)

    def signal(self, number: signal.Signals) -> None:
        """Signal the process and those it started."""
        for process in (*self.process.children(recursive=True), self.process):
            process.send_signal(number)

    def steps(self) -> int:
        path = self.folder / "metrics.jsonl"
        return sum(row["kind"] == "train" for row in read_metrics(path)) if path.exists() else 0

    def rate(self, seconds: float) -> float:
        """Return the samples a second of a turn."""
        self.signal(signal.SIGCONT)
        time.sleep(SETTLE)
        began, steps = time.perf_counter(), self.steps()
        time.sleep(seconds)
        steps, took = self.steps() - steps, time.perf_counter() - began
        self.signal(signal.SIGSTOP)
        return steps * BATCH / took


def main(options: Options) -> None:
    with tempfile.TemporaryDirectory() as folder:
        runs: dict[str, Run] = {}
        try:
            for way in options.ways:
                runs[way] = Run(way, Path(folder, way))
            quiet, busy = _turns(runs, options)
        finally:
            for run in runs.values():
                run.signal(signal.SIGKILL)
                run.process.wait()
    for way in options.ways:
        rates = {"quiet": statistics.median(quiet[way]), "busy": statistics.median(busy[way])}
        ratio = statistics.median(b / q for b, q in zip(busy[way], quiet[way], strict=True))
        row = {
            "what": "the quickstart on all cores, alone and beside a busy process for each core",
            "way": way,
            "rounds": options.rounds,
            "samples_per_second": {name: round(rate) for name, rate in rates.items()},
            "ratio": round(ratio, 3),
        }
        append(options.results, row, shlex.join(["python", "benchmarks/busy.py", *sys.argv[1:]]))
        print(f"{way}: quiet {rates['quiet']:.0f}  busy {rates['busy']:.0f}  ratio {ratio:.2f}", flush=True)


def _turns(runs: dict[str, Run], options: Options) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Return the rates of all turns by run, quiet and busy."""
    quiet, busy = ({way: [] for way in runs} for _ in range(2))
    for number in range(options.rounds):
        print(f"round {number + 1} of {options.rounds}", file=sys.stderr, flush=True)
        for way, run in runs.items():
            quiet[way].append(run.rate(options.seconds))
            others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in os.sched_getaffinity(0)]
            try:
                busy[way].append(run.rate(options.seconds))
            finally:
                for other in others:
                    other.kill()
                    other.wait()
    return quiet, busy


if __name__ == "__main__":
    run_benchmark("busy.py", Options, __doc__, main)
