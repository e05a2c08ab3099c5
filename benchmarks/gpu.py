"""All that GPU.md lists, in order of worth, in one command; what has run is in a table at the end.

    python benchmarks/gpu.py                         # everything
    python benchmarks/gpu.py --minutes 9             # as much as fits
    python benchmarks/gpu.py --minutes 9 --continue  # what is not done yet; first what was not tried
    python benchmarks/gpu.py --only losses step      # these parts; --list shows all

Each part is a process of its own with a time of its own, and appends its rows to benchmarks/results/ as they come. What
it prints goes to WORK/NAME.log, what it trains to WORK/NAME: what an earlier run of the part left there is removed.
How each ended is in WORK/state.json, written after each. A part for which a package, data or a GPU is missing is
skipped, and one that would have less than a third of its time is not started: a shorter one may be.
"""

import importlib.util
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

if importlib.util.find_spec("tyro") is None:
    sys.exit("gpu.py: error: tyro is not installed, which reads the options of every benchmark; see the end of GPU.md")

import torch
from gpu_parts import PARTS, Part, Places
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rows import RESULTS, run_benchmark, run_here

from contrastive.errors import UserError, did_you_mean
from contrastive.files import read_json, write_json
from contrastive.option_types import Positive

ROOT = Path(__file__).resolve().parents[1]
TOY_MINUTES = 5.0  # seconds of work, but perhaps on a core that many share
GRACE = 5.0  # seconds that a part has to end when told to, and then a second for its children
END = 2 * GRACE  # what is left of the minutes for that, and for the table


@dataclass(frozen=True)
class Options:
    only: tuple[str, ...] = ()
    """Names of parts; none: all."""
    minutes: Positive[float | None] = None
    """End in time for this, tables and all; none: no limit but the parts' own."""
    resume: bool = False
    """Go on with what is not done yet; also --continue."""
    list: bool = False
    """Show the parts and end."""
    toy: bool = False
    """Every part at a toy size and on the CPU, to see that it runs."""
    data: str | None = None
    """Folder with flickr8k/ and cifar10/; none: $CONTRASTIVE_DATA, or shared/data where that is there."""
    work: str = "runs/gpu"
    """Where runs, logs and the state are kept."""
    results: str = str(RESULTS)
    """Folder of the rows."""


def main(options: Options) -> None:
    started = time.monotonic()
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    parts = _chosen(options.only)
    if options.list:
        return console.print(_listed(parts))
    if options.toy:
        os.environ.update(CUDA_VISIBLE_DEVICES="", ACCELERATE_USE_CPU="true")
    places = _places(options)
    state = _State(Path(places.work, "state.json"), options.toy)
    if not options.toy and torch.cuda.device_count() == 0:
        raise UserError(
            "this machine has no GPU that torch can use; --toy runs every part on a CPU, to see that it runs"
        )
    if options.resume:
        left = [part for part in parts if state.parts.get(part.name, {}).get("ended") != "done"]
        # One that failed, or takes long, must not keep those behind it from their turn.
        waiting = sorted(left, key=lambda part: part.name in state.parts and "skipped" not in state.ended(part))
    else:
        waiting = parts
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a part is ended with this process
    deadline = started + 60 * options.minutes - END if options.minutes else float("inf")
    columns = SpinnerColumn(), BarColumn(20), TimeElapsedColumn(), TextColumn("{task.description}", markup=False)
    try:
        with Progress(*columns, console=console) as progress:
            bar = progress.add_task("", total=len(waiting))
            for part in waiting:
                outcome = _outcome(
                    part, options.toy, places, deadline, lambda text: progress.update(bar, description=text)
                )
                state.note(part, outcome)
                console.print(f"{part.name}: {outcome['ended']}, {outcome['seconds']:.0f} s", soft_wrap=True)
                progress.advance(bar)
    finally:
        console.print(_table(parts, state))


def _chosen(names: tuple[str, ...]) -> list[Part]:
    known = {part.name: part for part in PARTS}
    for name in names:
        if name not in known:
            raise UserError(f"--only {name}: no such part.{did_you_mean(name, known)} --list shows them")
    return [part for part in PARTS if not names or part.name in names]


def _places(options: Options) -> Places:
    folders = [options.data] if options.data else [os.environ.get("CONTRASTIVE_DATA"), "shared/data", "../shared/data"]
    data = next((str(Path(ROOT, folder)) for folder in folders if folder and Path(ROOT, folder).is_dir()), "data")
    pairs = f"{data}/flickr8k/train-*.tar" if Path(data, "flickr8k").is_dir() else "scenes"
    work = Path(options.work).absolute()
    work.mkdir(parents=True, exist_ok=True)
    return Places(str(Path(options.results).absolute()), str(work), data, pairs)


class _State:
    """How parts ended, in a file that is whole at any time."""

    def __init__(self, path: Path, toy: bool):
        self.path, self.toy, self.parts = path, toy, {}
        if path.exists():
            content = read_json(path)
            if content.get("toy") != toy:
                size = "toy" if content.get("toy") else "full"
                raise UserError(f"{path} is of a run at {size} size; give another --work")
            self.parts = content["parts"]

    def ended(self, part: Part) -> str:
        return self.parts[part.name]["ended"]

    def note(self, part: Part, outcome: dict) -> None:
        # What was not tried keeps its place in the order, and what is known of an earlier try.
        if not outcome["ended"].startswith("not started"):
            self.parts[part.name] = outcome
            write_json(self.path, {"toy": self.toy, "parts": self.parts})


def _outcome(part: Part, toy: bool, places: Places, deadline: float, show) -> dict:
    """Run a part, unless something is missing; return how it `ended`, its `seconds` and what its rows say (`found`)."""
    nothing = {"seconds": 0.0, "found": ""}
    if why := part.missing(toy, places, torch.cuda.device_count):
        return nothing | {"ended": f"skipped: {why}"}
    limit = 60 * (TOY_MINUTES if toy else part.minutes)
    left = deadline - time.monotonic()
    if left < limit / 3:
        return nothing | {"ended": "not started: no time left"}
    shutil.rmtree(Path(places.work, part.name), ignore_errors=True)
    log, rows = Path(places.work, f"{part.name}.log"), Path(places.results, f"{part.rows}.jsonl")
    before = len(_rows(rows))
    started = time.monotonic()
    with _Process(part, toy, places, log) as process:
        while process.status() is None and time.monotonic() - started < min(limit, left):
            show(f"{part.name}: {part.what} | {_last_line(log)}"[:140])
            time.sleep(0.1)
        status = process.status()
    ended = "done"
    if status is None:
        ended = "out of time"
    elif status:
        ended = f"failed: {_last_line(log) or f'exit status {status}, and no word'}"
    return {"ended": ended, "seconds": round(time.monotonic() - started, 1), "found": part.found(_rows(rows)[before:])}


class _Process:
    """A part's process, in a session of its own; leaving the context ends it, with its children, if it has not."""

    def __init__(self, part: Part, toy: bool, places: Places, log: Path):
        self.toy = toy
        command = part.arguments(toy, places)
        with log.open("wb") as file:
            if toy:
                # To load torch takes longer than anything at toy size: a copy of this process has it.
                fork = multiprocessing.get_context("fork")
                self.process = fork.Process(target=_run_here, args=(command, file.fileno()))
                self.process.start()
            else:
                how = {"cwd": ROOT, "start_new_session": True, "stdout": file, "stderr": subprocess.STDOUT}
                paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
                environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | dict(part.environment)
                self.process = subprocess.Popen([sys.executable, *command], env=environment, **how)

    def status(self) -> int | None:
        """The exit status, None while it runs."""
        return self.process.exitcode if self.toy else self.process.poll()

    def __enter__(self) -> "_Process":
        return self

    def __exit__(self, *exception) -> None:
        self._signal(signal.SIGTERM)
        until = time.monotonic() + GRACE
        while self.status() is None and time.monotonic() < until:
            time.sleep(0.05)
        self._signal(signal.SIGKILL)  # its children too, which may have outlived it
        self.process.join() if self.toy else self.process.wait()

    def _signal(self, number: int) -> None:
        with suppress(ProcessLookupError):  # all have ended
            os.killpg(self.process.pid, number)


def _run_here(command: list[str], log: int) -> None:
    """Run a script as `python SCRIPT ...` would, in a process of its own that has been forked."""
    os.setsid()
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(ROOT)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    run_here(str(ROOT / command[0]), command[1:])


def _rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _last_line(log: Path) -> str:
    """The last line that says something: not one that is drawn."""
    lines = log.read_bytes()[-4000:].decode(errors="replace").replace("\r", "\n").splitlines()
    return next((line.strip() for line in reversed(lines) if any(map(str.isalnum, line))), "")


def _listed(parts: list[Part]) -> Table:
    table = Table("part", "what", "minutes", "expected", box=SIMPLE_HEAD)
    for part in parts:
        table.add_row(part.name, part.what, f"{part.minutes:g}", part.expected)
    return table


def _table(parts: list[Part], state: _State) -> Table:
    table = Table("part", "s", "ended", "expected", "found", box=SIMPLE_HEAD)
    for part in parts:
        outcome = state.parts.get(part.name, {"ended": "not run", "seconds": 0.0, "found": ""})
        seconds = f"{outcome['seconds']:.0f}" if outcome["seconds"] else ""
        table.add_row(part.name, seconds, outcome["ended"], part.expected, outcome["found"])
    return table


if __name__ == "__main__":
    run_benchmark("gpu.py", Options, __doc__, main, {"continue": "resume"})
