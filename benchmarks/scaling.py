"""The same training on 1, 2 and 4 gloo processes, plain and with FSDP2: the same losses, and the bytes computed.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --model ViT-Ti-16-SigLIP --image_size 112 --batch 32 --ranks 1 2

Every case trains on the same global batches of rendered scenes, in float32, a thread a process. `loss_difference` is
the largest over the steps, relative to one process of the same loss and optimizer; above 1e-5 the benchmark fails, as
it does where a rank sends other bytes in a step than contrastive/train/counting.py computes. What is measured is what
reaches torch's process group, under the usual ring algorithm; `control` are the few numbers by which ranks agree.
Processes share this machine's cores: samples per second say what the exchange costs here, and nothing of other
machines. A row for each case goes to results/scaling.jsonl.
"""

import itertools
import json
import os
import shlex
import socket
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch.multiprocessing as mp
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rows import append, run_benchmark
from scaling_measure import Case, measure

from contrastive.errors import UserError

EXACT = 1e-5
PARTS = ("gradients", "weights", "optimizer", "loss")


@dataclass(frozen=True)
class Options:
    ranks: tuple[int, ...] = (1, 2, 4)
    """Processes; one is always measured, for the others to be compared with."""
    model: Literal["tiny", "ViT-Ti-16", "ViT-Ti-16-SigLIP"] = "tiny"
    """Towers; tiny: width 64, depth 2."""
    image_size: int = 32
    """Height and width of the images in pixels."""
    losses: tuple[Literal["sigmoid", "softmax"], ...] = ("sigmoid", "softmax")
    duplicates: Literal["negative", "ignore", "positive"] = "positive"
    """What pairs with identical captions are to the loss."""
    optimizers: tuple[Literal["adamw", "muon"], ...] = ("adamw", "muon")
    batch: int = 64
    """Global batch."""
    accumulate: int = 1
    """Micro-batches on each rank."""
    steps: int = 5
    """Timed steps, after two that are not."""
    results: str = "scaling"
    """Rows go to benchmarks/results/NAME.jsonl; an absolute NAME is a path of its own."""


def main(options: Options) -> None:
    for ranks in options.ranks:
        if ranks < 1 or options.batch % (ranks * options.accumulate):
            raise UserError(f"--batch {options.batch} does not divide among {ranks} ranks and their micro-batches")
    if options.steps < 1:
        raise UserError("--steps must be at least 1")
    mp.get_context("forkserver").set_forkserver_preload(["contrastive.train.pretrain"])
    rows = []
    for loss, optimizer in itertools.product(options.losses, options.optimizers):
        ways = [(1, False)] + [(n, way) for n in options.ranks if n > 1 for way in (False, True)]
        for ranks, sharded in ways:
            size = options.model, options.image_size, loss, options.duplicates
            case = Case(ranks, sharded, *size, optimizer, options.batch, options.accumulate, options.steps)
            found = _run(case)
            one = rows[-1]["of_one"] if ranks > 1 else found["losses"]
            rows.append({**_row(found, one), "of_one": one})
            kept = {name: value for name, value in rows[-1].items() if name != "of_one"}
            append(options.results, kept, shlex.join(["python", "benchmarks/scaling.py", *sys.argv[1:]]))
    _show(rows)
    wrong = [row for row in rows if row["loss_difference"] > EXACT or not row["bytes_agree"]]
    if wrong:
        raise UserError(f"{len(wrong)} cases have other losses than one process, or send other bytes than computed")


def _run(case: Case) -> dict:
    """Return what the ranks found, with the losses of all: their mean, as each has its share of the batch."""
    with socket.socket() as server, tempfile.TemporaryDirectory() as folder:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
        server.close()
        mp.start_processes(measure, (case, port, folder), nprocs=case.ranks, start_method="forkserver")
        found = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(case.ranks)]
    losses = [sum(of_ranks) / case.ranks for of_ranks in zip(*(each["losses"] for each in found), strict=True)]
    return {**found[0], "losses": losses}


def _row(found: dict, of_one: list[float]) -> dict:
    sent, computed = ({part: found[of].get(part, 0) for part in PARTS} for of in ("sent", "computed"))
    differences = [abs(ours / theirs - 1) for ours, theirs in zip(found["losses"], of_one, strict=True)]
    return {
        "what": "a training step on scenes in float32, a thread a process",
        **{name: value for name, value in found.items() if name not in ("losses", "sent", "computed")},
        "cores": len(os.sched_getaffinity(0)),
        "loss_difference": float(f"{max(differences):.1e}"),
        "samples_per_second": round(found["samples_per_second"], 1),
        "sent": sent | {"control": found["sent"].get("control", 0)},
        "computed": computed,
        "bytes_agree": sent == computed,
    }


def _show(rows: list[dict]) -> None:
    table = Table("loss", "optimizer", "ranks", "", "difference", "samples/s", box=SIMPLE_HEAD)
    for part in (*PARTS, "control"):
        table.add_column(f"{part}, kB", justify="right")
    table.add_column("computed")
    for row in rows:
        way = "FSDP2" if row["sharded"] else "plain"
        begins = row["loss"], row["optimizer"], str(row["ranks"]), way, f"{row['loss_difference']:.0e}"
        sent = [f"{row['sent'][part] / 1e3:,.1f}" for part in (*PARTS, "control")]
        table.add_row(*begins, f"{row['samples_per_second']:.0f}", *sent, "equal" if row["bytes_agree"] else "DIFFERS")
    Console(width=max(150, Console().width)).print(table)


if __name__ == "__main__":
    run_benchmark("scaling.py", Options, __doc__, main)
