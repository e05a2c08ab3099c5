"""Start the real scripts, as a user does; or call them, where the process is not the point: a start takes seconds."""

import os
import subprocess
import sys
from pathlib import Path

import torch

from contrastive.commands.pretrain_command import main
from contrastive.log import read_metrics

ROOT = Path(__file__).resolve().parents[1]
ON_CPU = {"ACCELERATE_USE_CPU": "true"}
ACCELERATE = ("-m", "accelerate.commands.accelerate_cli", "launch")


def ranks(number: int, port: int) -> tuple[str, ...]:
    """Launch so many processes, with ON_CPU in the environment; `accelerate launch --cpu` ends in the same torchrun."""
    return ("-m", "torch.distributed.run", "--nproc_per_node", str(number), "--master_port", str(port))


def environment() -> dict[str, str]:
    """The caller's environment without what a launcher of its own may have set, one thread a process."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("ACCELERATE_") and k != "MASTER_PORT"}
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def command(*args: str, launcher: tuple[str, ...] = ()) -> list[str]:
    start = [sys.executable, *launcher] if launcher else [sys.executable]
    return [*start, str(ROOT / "scripts" / "pretrain.py"), *map(str, args)]


def pretrain_here(*args) -> None:
    """Run scripts/pretrain.py in this process, on one thread; a UserError is what the command would print."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        main(list(map(str, args)))
    finally:
        torch.set_num_threads(threads)


def pretrain(*args, launcher: tuple[str, ...] = (), **variables: str) -> subprocess.CompletedProcess:
    """Run to the end; `variables` change the environment, an empty one is removed."""
    env = {name: value for name, value in {**environment(), **variables}.items() if value}
    done = subprocess.run(command(*args, launcher=launcher), capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr
    return done


def rows(run_folder: Path, kind: str = "train") -> list[dict]:
    """Rows of one kind, also while the run is writing them."""
    return [row for row in read_metrics(run_folder / "metrics.jsonl") if row["kind"] == kind]


def assert_same_run(run: Path, whole: Path) -> None:
    """Loss of every step and final weights are equal to the bit."""
    ours, theirs = ([(row["step"], row["loss"].hex()) for row in rows(folder)] for folder in (run, whole))
    assert ours == theirs and [step for step, _ in ours] == list(range(1, len(ours) + 1))
    ours, theirs = ((folder / "final" / "model.safetensors").read_bytes() for folder in (run, whole))
    assert ours == theirs
