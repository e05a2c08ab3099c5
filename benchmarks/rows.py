"""How a benchmark starts, and rows of benchmarks/results/*.jsonl: what was measured, on what, which versions, when."""

import datetime
import json
import multiprocessing
import os
import platform
import runpy
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

import torch

from contrastive.config import parse, rename_flags
from contrastive.entry import run_script
from contrastive.option_types import check_bounds

T = TypeVar("T")

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "torchvision", "accelerate", "numpy")


def run_benchmark(
    prog: str, options: type[T], description: str, main: Callable[[T], None], short: Mapping[str, str] | None = None
) -> None:
    """Run `main` with the command line's `options`; a wrong flag or value is one line and exit status 2.

    short: flags that stand for others: {"continue": "resume"}, where an option cannot have the name.
    """

    def start(args: list[str]) -> None:
        chosen = parse(options, rename_flags(args, short or {}), prog=prog, description=description)
        check_bounds(chosen)
        main(chosen)

    run_script(prog, start)


def in_a_copy(script: str | Path, args: Sequence[str]) -> int:
    """Run a script as `python SCRIPT ...` would, in a fork of this process, which has loaded torch; return its status.

    At toy size loading torch takes longer than all the rest.
    """
    process = multiprocessing.get_context("fork").Process(target=run_here, args=(str(script), args))
    process.start()
    process.join()
    return process.exitcode


def run_here(script: str, args: Sequence[str]) -> None:
    """Run a script in this process, as `python SCRIPT ...` would."""
    sys.path.insert(0, str(Path(script).parent))
    sys.argv = [script, *args]
    runpy.run_path(script, run_name="__main__")


def append(name: str, row: dict, command: str) -> dict:
    """Append `row` to results/NAME.jsonl with device, versions, commit, date and the command; return all of it."""
    full = {**row, "command": command, **_surroundings()}
    path = RESULTS / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(full) + "\n")
    return full


def _surroundings() -> dict:
    commit = _git("rev-parse", "--short", "HEAD") + ("+changes" if _git("status", "--porcelain") else "")
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "commit": commit,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine()
    )
    return f"{os.cpu_count()} cores of {model}"


def _git(*args: str) -> str:
    done = subprocess.run(["git", *args], capture_output=True, text=True, cwd=RESULTS.parent)
    return done.stdout.strip()
