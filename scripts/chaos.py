"""Does a run survive? Train while killing it at random moments, and compare with a run that nobody disturbed.

    python scripts/chaos.py --rounds 50
    python scripts/chaos.py --rounds 20 --fsdp
    python scripts/chaos.py --ranks 8 -- --config configs/flickr8k.yaml --train.steps 400 --checkpoint.every 20

A round starts the run again with --resume auto, waits for a moment in a start, a step, a save, an evaluation or the
export of the final model, and kills all processes, one rank, the launcher or a loader worker. At the end losses and
weights have to be equal to the bit, and no process, half-written folder or lock may be left. Flags after -- are those
of pretrain; without any a tiny model learns digits. Exit status 1: something differed or was left.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
from rich.box import SIMPLE_HEAD
from rich.table import Table

from contrastive.config import parse
from contrastive.entry import run_script
from contrastive.errors import UserError
from contrastive.files import sha256
from contrastive.log import console, read_metrics, say
from contrastive.option_types import Positive, check_bounds

PRETRAIN = Path(__file__).resolve().with_name("pretrain.py")
MARK = "CONTRASTIVE_CHAOS"  # in the environment of every process of a run, by which it is found
STEPS_A_ROUND = 30
TINY = """
model:
  embed_dim: 32
  image: {image_size: 16, patch_size: 4, width: 32, depth: 2, num_heads: 2, mlp_dim: 64, dropout: 0.1}
  text: {context_length: 8, width: 32, depth: 1, num_heads: 2, mlp_dim: 64}
data: {eval: ["digits:test"], vocab_size: 300, num_workers: 1}
train: {global_batch_size: 32, log_every: 1, ema_decay: 0.9}
checkpoint: {every: 10}
evaluation: {every: 15}
"""
PLACES = ("step", "step", "step", "save", "save", "evaluation", "start", "indexing")
WHOM = ("group", "group", "rank", "rank", "launcher", "worker")
SHARE_ASKED = 0.15  # of kills that are SIGTERM
NOBODY = "nobody, it had ended"
TIMES = ("samples_per_second", "data_wait")  # of a row, which differ between runs
LAST_TO_GO = 40  # seconds after a kill; torchrun gives its ranks 30 to end by themselves


@dataclass(frozen=True)
class ChaosConfig:
    """How to disturb a run."""

    rounds: Positive[int] = 10
    """How often to kill it."""
    ranks: Positive[int] = 2
    """Processes on this machine."""
    fsdp: bool = False
    """Shard the model by FSDP2."""
    seed: int = 0
    """Of the moments and of what is killed."""
    folder: str = "runs/chaos"
    """A new folder, for both runs and what each launch said."""

    def __post_init__(self):
        check_bounds(self)
        if self.fsdp and self.ranks == 1:
            raise UserError("--fsdp with one process shards nothing; give --ranks 2 or more")


@dataclass
class Round:
    """What became of one round."""

    whom: str
    where: str
    step: int
    seconds: float  # until no process was left
    went_on: int | None = None


class Run:
    """A run that is started time and again: its folder, its command, its processes."""

    def __init__(self, config: ChaosConfig, name: str, flags: Sequence[str]):
        self.folder, self.logs = Path(config.folder, name), Path(config.folder, "logs", name)
        self.logs.mkdir(parents=True)
        sharded = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"} if config.fsdp else {}
        self.environment = {"OMP_NUM_THREADS": "1"} | os.environ | sharded | {MARK: str(self.folder.resolve())}
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(config.ranks)]
        own = ["--run_folder", str(self.folder), "--resume", "auto", "--max_restarts", "100000"]
        self.command = [*start, str(PRETRAIN), *flags, *own]
        self.launches = 0

    def launch(self) -> psutil.Popen:
        self.launches += 1
        with self.log.open("w") as log:
            how = {"stdout": log, "stderr": log, "env": self.environment, "start_new_session": True}
            return psutil.Popen(self.command, **how)

    @property
    def log(self) -> Path:
        """What the newest launch said."""
        return self.logs / f"{self.launches:03d}.txt"

    def processes(self) -> list[psutil.Process]:
        """All that belong to this run, whoever their parent is by now."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self.environment[MARK] and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def last_row(self) -> dict:
        """The newest row of metrics.jsonl; of step 0 where there is none."""
        try:
            with (self.folder / "metrics.jsonl").open("rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - 10_000))
                for line in reversed(file.read().split(b"\n")[:-1]):
                    return json.loads(line)
        except (OSError, ValueError):  # a start is just writing it, or the row is longer than that
            pass
        return {"kind": "train", "step": 0}

    def metrics_file(self) -> int | None:
        """Which file metrics.jsonl is: each start that gets as far as training writes another."""
        path = self.folder / "metrics.jsonl"
        return path.stat().st_ino if path.exists() else None

    def resumed_from(self) -> int | None:
        _, found, after = self.log.read_text().partition(" from step-")
        return int(after[:8]) if found else None


class Killer:
    """Waits for a moment in a run, and kills.

    Args:
        whole: the undisturbed run.
        start_seconds: how long it took to get to its first step.
        index: a folder that reading the data for the first time makes; None: there is none.
    """

    def __init__(self, run: Run, draw: random.Random, whole: Run, start_seconds: float, index: Path | None):
        self.run, self.draw, self.start_seconds, self.index = run, draw, start_seconds, index
        self.expected = rows_by_step(whole)
        self.steps = max(step for _, step in self.expected)
        self.problems: list[str] = []

    def rounds(self, number: int) -> list[Round]:
        """So many rounds, the last eighth of them in the export; what was not as it should is in `problems`."""
        exports, done = max(1, number // 8), []
        for count in range(number):
            place = "export" if count >= number - exports else self.draw.choice(PLACES)
            done.append(self.round(place, int(self.steps * (count + self.draw.random()) / (number - exports + 1))))
            say(f"{count + 1}/{number}: {done[-1].whom}, in {done[-1].where}, at step {done[-1].step}")
            note_resumed(done[:-1], self.run)
            for (kind, step), row in rows_by_step(self.run).items():
                if self.expected.get((kind, step)) != row:
                    self.problems.append(f"round {count + 1}: another {kind} row at step {step}")
        return done

    def round(self, place: str, target: int) -> Round:
        """Start the run and kill it at `place`, not before step `target`."""
        run, draw = self.run, self.draw
        if place == "indexing" and self.index is not None:
            shutil.rmtree(self.index, ignore_errors=True)
        shutil.rmtree(run.folder / "final", ignore_errors=True)  # of a round that came too late
        before, begun = run.metrics_file(), time.monotonic()
        launcher = run.launch()
        moment = begun + self.start_seconds * draw.uniform(0.1, 1)
        while launcher.poll() is None and not self._is_there(place, target, before, moment):
            time.sleep(0.001)
        time.sleep(draw.choice((0, 0, draw.uniform(0, 0.05))))
        whom = self._kill(launcher)
        killed_at = time.monotonic()
        while (left := run.processes()) and time.monotonic() < killed_at + LAST_TO_GO:
            launcher.poll()
            time.sleep(0.02)
        seconds, where = time.monotonic() - killed_at, self._found(before)
        for process in left:
            process.kill()
        if left:
            self.problems.append(f"{len(left)} processes were left {LAST_TO_GO} seconds after {whom} was killed")
        if whom == NOBODY and launcher.wait() != 0:
            self.problems.append(f"a launch failed by itself: {run.log}")
        return Round(whom, where, run.last_row()["step"], seconds)

    def _is_there(self, place: str, target: int, before: int | None, moment: float) -> bool:
        folder = self.run.folder
        if place == "start" or (place == "indexing" and self.index is None):
            return time.monotonic() >= moment
        if place == "indexing":
            return self.index.exists()
        if self.run.metrics_file() == before:
            return False
        if place == "export":
            return any(folder.glob(".tmp-final*")) or (folder / "final").exists()
        row = self.run.last_row()
        if row["step"] < target:
            return False
        return place == "step" or place == self._found(before)

    def _found(self, before: int | None) -> str:
        """Where the run is, or was when it was killed, by what lies in its folder."""
        folder, row = self.run.folder, self.run.last_row()
        if self.run.metrics_file() == before:
            halfway = self.index is not None and self.index.exists() and not (self.index / "manifest.json").exists()
            return "indexing" if halfway else "start"
        if any((folder / "checkpoints").glob(".tmp-*")):
            return "save"
        if any(folder.glob(".tmp-final*")) or (folder / "final").exists():
            return "export"
        due = ("eval", row["step"]) in self.expected and row["kind"] == "train"
        return "evaluation" if due else "step"

    def _kill(self, launcher: psutil.Popen) -> str:
        """Kill somebody of the run; return whom."""
        try:
            children = launcher.children(recursive=True)
            ranks = [child for child in children if child.ppid() == launcher.pid]
            workers = [child for child in children if child.ppid() in {rank.pid for rank in ranks}]
        except psutil.NoSuchProcess:
            return NOBODY
        victims = {"group": [launcher, *children], "launcher": [launcher]}
        victims |= {"rank": [self.draw.choice(ranks)]} if ranks else {}
        victims |= {"worker": [self.draw.choice(workers)]} if workers else {}
        whom = self.draw.choice([name for name in WHOM if name in victims])
        # A loader worker is no process that anybody asks to stop.
        asked = whom != "worker" and self.draw.random() < SHARE_ASKED
        for victim in victims[whom]:
            try:
                victim.send_signal(signal.SIGTERM if asked else signal.SIGKILL)
            except psutil.NoSuchProcess:  # its parent was killed before it, and it noticed
                continue
        return f"{whom}, SIGTERM" if asked else whom


def rows_by_step(run: Run) -> dict[tuple[str, int], str]:
    """Each row of metrics.jsonl that has to be the same in both runs, as text, which is exact."""
    path = run.folder / "metrics.jsonl"
    rows = read_metrics(path) if path.exists() else []
    return {
        (row["kind"], row["step"]): json.dumps({key: row[key] for key in row if key not in TIMES})
        for row in rows
        if row["kind"] in ("train", "eval")
    }


def note_resumed(rounds: Sequence[Round], run: Run) -> None:
    """Tell the rounds that nothing went on from yet where the newest launch did, if it got so far."""
    for each in rounds:
        if each.went_on is None:
            each.went_on = run.resumed_from()


def undisturbed(run: Run) -> float:
    """Train to the end; return the seconds to the first step."""
    begun, started = time.monotonic(), None
    launcher = run.launch()
    while launcher.poll() is None:
        if started is None and run.metrics_file():
            started = time.monotonic() - begun
        time.sleep(0.01)
    if launcher.wait() != 0:
        raise UserError(f"the undisturbed run fails, see {run.log}")
    return started


def toy(folder: Path, rounds: int) -> tuple[list[str], Path]:
    """Return flags for a tiny model on shards of digits, and the folder of their index."""
    from contrastive.data.shards.shard_writing import PackOptions, write_shards
    from contrastive.data.sources import open_source

    data, config = folder / "data", folder / "tiny.yaml"
    write_shards(open_source("digits:train"), data, PackOptions(), samples_per_shard=500, workers=1, asked={})
    config.write_text(TINY)
    steps = str(STEPS_A_ROUND * (rounds + 1))
    return [
        "--config",
        str(config),
        "--data.train",
        f"{data}/*.tar",
        "--train.steps",
        steps,
    ], data / ".contrastive-index"


def differences(run: Run, whole: Run) -> list[str]:
    """What of the two finished runs is not equal, and what is left in the folder of the disturbed one."""
    found = []
    if rows_by_step(run) != rows_by_step(whole):
        found.append("metrics.jsonl has other rows")
    for path in (whole.folder / "final").glob("*.safetensors"):
        own = run.folder / "final" / path.name
        if not own.exists() or sha256(own) != sha256(path):
            found.append(f"final/{path.name} is another")
    if not (run.folder / "report.html").exists():
        found.append("there is no report.html")
    for pattern in (".tmp-*", ".old-*", "*.partial", ".lock"):
        found += [f"{path} is left behind" for path in run.folder.rglob(pattern)]
    return found + [f"process {process.pid} is left behind" for process in run.processes()]


def table_of(rounds: Sequence[Round]) -> Table:
    table = Table("round", "killed", "in", "at step", "went on at", "all gone after", box=SIMPLE_HEAD)
    for number, each in enumerate(rounds, 1):
        went_on = "" if each.went_on is None else f"{each.went_on:,}"
        table.add_row(str(number), each.whom, each.where, f"{each.step:,}", went_on, f"{each.seconds:.1f} s")
    return table


def main(args: list[str]) -> None:
    place = args.index("--") if "--" in args else len(args)
    config, flags = parse(ChaosConfig, args[:place], prog="chaos.py", description=__doc__), args[place + 1 :]
    folder, index = Path(config.folder), None
    if folder.exists():
        raise UserError(f"{folder} exists; give another --folder")
    folder.mkdir(parents=True)
    if not flags:
        flags, index = toy(folder, config.rounds)
    whole, run = Run(config, "whole", flags), Run(config, "run", flags)
    say(f"a run that nobody disturbs: {whole.folder}")
    killer = Killer(run, random.Random(config.seed), whole, undisturbed(whole), index)
    rounds = killer.rounds(config.rounds)
    if run.launch().wait() != 0:
        killer.problems.append(f"the last launch failed: {run.log}")
    note_resumed(rounds, run)
    problems = killer.problems + differences(run, whole)
    console.print(table_of(rounds))
    how = f"{config.rounds} rounds on {config.ranks} ranks{' by FSDP2' if config.fsdp else ''}, {killer.steps:,} steps"
    if problems:
        for problem in dict.fromkeys(problems):
            say(problem)
        say(f"{how}: NOT the run that nobody disturbed")
        sys.exit(1)
    say(f"{how}: losses and weights are those of the run that nobody disturbed, to the bit; nothing is left behind")


if __name__ == "__main__":
    run_script("chaos.py", main)
