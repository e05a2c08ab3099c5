"""Time a training run as a whole, score it, and append a row.

    python benchmarks/train.py quickstart pretrain.py --loss sigmoid --run_folder runs/bench-sigmoid
    python benchmarks/train.py classifier train_classifier.py --data mnist --run_folder runs/bench-mnist

The first word names results/NAME.jsonl, the second is the script; the rest is for the script, but for flags of
`accelerate launch`, all in one word: '--launch=--num_processes 2 --use_fsdp --fsdp_version 2'; `--launch none` runs the
script in a copy of this process, without a start of its own.
"""

import resource
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

from rows import append, in_a_copy

from contrastive.log import read_metrics
from contrastive.named_sections import take_option


def main(name: str, script: str, flags: list[str]) -> None:
    _, run_folder = take_option(flags, "run_folder")
    flags, launch = take_option(flags, "launch")
    started = time.perf_counter()
    if launch == "none":
        command = ["python", f"scripts/{script}", *flags]
        status = in_a_copy(command[1], flags)
    else:
        command = ["accelerate", "launch", *shlex.split(launch or ""), f"scripts/{script}", *flags]
        launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--quiet"]
        status = subprocess.run([*launcher, *command[2:]]).returncode
    if status:
        sys.exit(status)  # the script has said why
    seconds = time.perf_counter() - started
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    metrics = read_metrics(Path(run_folder) / "metrics.jsonl")
    training = [row for row in metrics if row["kind"] == "train"]
    last = [row for row in metrics if row["kind"] == "eval"][-1]
    row = {
        "what": "a whole process: start, training, evaluations, final model, report",
        "wall_seconds": round(seconds, 1),
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 1),
        "steps": training[-1]["step"],
        "samples_per_second_median": round(statistics.median(r["samples_per_second"] for r in training), 1),
        "data_wait_median": round(statistics.median(r["data_wait"] for r in training), 4),
        "final_loss": training[-1]["loss"],
        **{key: round(value, 2) for key, value in last.items() if "/" in key},
    }
    print(append(name, row, shlex.join(command)))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
