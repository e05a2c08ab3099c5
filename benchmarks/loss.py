"""Time, peak memory and error of our losses beside open_clip's, siglip-kernel's and bare matrix products.

    python benchmarks/loss.py                                       # a table for this CPU or GPU
    python benchmarks/loss.py --batch 65536 --dim 768 --dtype bf16  # on a GPU
    python benchmarks/loss.py --ranks 2 --loss sigmoid              # gloo ranks that share the cores

Every rival's row goes to results/loss.jsonl; one that fails leaves a row with an `error`.

Time: forward and backward. Rivals take turns, one sample each a round, so that the machine's drift hits all alike;
median and minimum over the rounds. A sample repeats quick calls to fill 0.1 s; with ranks the slowest counts.

Share of matmul: the time of the products the loss cannot do without (3 for sigmoid, 4 for softmax, 2·B²·D each), at
the rate torch.mm reaches on the same shapes (at most 8,192 rows) and dtype in the same rounds, over the rival's time.

Peak memory: what a step needs beyond features and their gradients, for each rank. On a GPU: the allocator's peak,
less what it held before the step, less the size of the gradients. On a CPU the same of the resident set, in fresh
processes for every rival: a step on 16 rows starts the libraries up, Linux's record of the peak is reset
(/proc/self/clear_refs), one step is taken. Freed tensors leave the process (malloc is told so); pages never touched
are not resident. torch.compile's code holds for one size, so there the first step has full size. null: no such record.

Errors: |found − expected| / |expected| against the float64 oracle, contrastive/losses/reference.py, up to B = 4,096.
With ranks, the mean loss and the gradients averaged as DistributedDataParallel does, and `ranks_error`: their
largest difference from the same rival in one process.
"""

import itertools
import json
import re
import shlex
import statistics
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.multiprocessing as mp
from loss_measure import measure
from loss_rivals import Case, LossName, RivalName, choose, package_version, too_large, unfit
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rows import RESULTS, append, run_benchmark
from torch.multiprocessing.spawn import ProcessException

from contrastive.errors import UserError


@dataclass(frozen=True)
class Options:
    batch: tuple[int, ...] = (1024, 4096, 8192)
    """Global batch sizes B."""
    dim: tuple[int, ...] = (512,)
    """Embedding widths D."""
    loss: tuple[LossName, ...] = ("sigmoid", "softmax")
    """Losses to measure."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Type of the features; logit_scale and logit_bias are fp32."""
    ranks: Literal[1, 2, 3, 4] = 1
    """Processes that share the batch: gloo on a CPU, sharing its cores; NCCL with a GPU each."""
    rivals: tuple[RivalName, ...] = ()
    """Who is measured; none named: all that make sense for the device, the dtype and the ranks."""
    repeats: int = 3
    """Rounds of timing."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU where there is one."""
    results: str = "loss"
    """Rows go to benchmarks/results/NAME.jsonl; an absolute NAME is a path of its own."""


class Job:
    """Processes of their own for a measurement, shown while they run."""

    def __init__(self, progress: Progress, jobs: int):
        self.progress, self.bar = progress, progress.add_task("", total=jobs)

    def run(self, case: Case, rivals: list[str], parts: tuple[str, ...], repeats: int) -> dict[str, dict]:
        """Return what was found by rival. Raises ProcessException when a process did not live to tell."""
        self.progress.update(self.bar, description=f"{case}: {' and '.join(parts)} of {', '.join(rivals)}")
        try:
            with tempfile.TemporaryDirectory() as folder:
                found = Path(folder, "found.json")
                try:
                    what = case, rivals, parts, repeats, folder
                    mp.start_processes(measure, what, nprocs=case.ranks, start_method="forkserver")
                except ProcessException:
                    # A gloo rank now and then aborts as it exits, after the last collective: then all is measured.
                    if not found.exists():
                        raise
                return json.loads(found.read_text())
        finally:
            self.progress.advance(self.bar)

    def reached(self, jobs: int) -> None:
        """Count refused measurements too, and repeated ones once."""
        self.progress.update(self.bar, completed=jobs)


def main(options: Options) -> None:
    cases = _cases(options)
    # Processes are forked from one that has loaded torch, and has no threads or CUDA context of a measurement.
    mp.get_context("forkserver").set_forkserver_preload(["loss_measure"])
    (RESULTS / f"{options.results}.jsonl").parent.mkdir(parents=True, exist_ok=True)
    console = Console(width=None if sys.stdout.isatty() else 140)
    table = _table(options.ranks)
    columns = (SpinnerColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    rivals = {case: list(options.rivals) or choose(case)[0] for case in cases}
    if not options.rivals:
        for name, why in {name: why for case in cases for name, why in choose(case)[1].items()}.items():
            console.print(f"{name} is left out: {why}", highlight=False)
    on_cpu = cases[0].device == "cpu"
    jobs = list(itertools.accumulate(1 + on_cpu * len(names) for names in rivals.values()))
    try:
        with Progress(*columns, console=console) as progress:
            job = Job(progress, jobs[-1])
            for (case, names), end in zip(rivals.items(), jobs, strict=True):
                found = _measure(case, names, options.repeats, job)
                rows = [_row(case, name, found[name], options.repeats) for name in names]
                for row in rows:
                    append(options.results, row, shlex.join(["python", "benchmarks/loss.py", *sys.argv[1:]]))
                    console.print(_line(case, row), highlight=False, soft_wrap=True)
                _add(table, rows)
                job.reached(end)
    finally:
        console.print(table)


def _cases(options: Options) -> list[Case]:
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and torch.cuda.device_count() < options.ranks:
        raise UserError(
            f"--ranks {options.ranks} on cuda needs as many GPUs, this machine has {torch.cuda.device_count()}"
        )
    if uneven := [batch for batch in options.batch if batch <= 0 or batch % options.ranks]:
        raise UserError(f"--batch {uneven[0]} does not divide evenly among {options.ranks} ranks")
    if not (options.batch and options.dim and options.loss):
        raise UserError("--batch, --dim and --loss need a value each")
    if options.repeats < 1:
        raise UserError(f"--repeats is {options.repeats}, expected at least 1")
    threads = max(1, torch.get_num_threads() // options.ranks)
    return [
        Case(loss, batch, dim, options.dtype, options.ranks, device, threads)
        for loss, batch, dim in itertools.product(options.loss, options.batch, options.dim)
    ]


def _measure(case: Case, rivals: list[str], repeats: int, job: Job) -> dict[str, dict]:
    """Return by rival what was found, or why there is an `error` instead."""
    found = {name: {"error": why} for name in rivals if (why := unfit(name, case) or too_large(name, case))}
    parts = ("memory", "time", "errors")
    if case.device == "cpu":
        for name in [name for name in rivals if name not in found]:
            found[name] = _alone(case, name, ("memory",), repeats, job)
        parts = ("time", "errors")
    left = [name for name in rivals if "error" not in found.get(name, {})]
    together = _together(case, left, parts, repeats, job)
    return {name: {**found.get(name, {}), **together.get(name, {})} for name in rivals}


def _together(case: Case, rivals: list[str], parts: tuple[str, ...], repeats: int, job: Job) -> dict[str, dict]:
    if len(rivals) < 2:
        return {name: _alone(case, name, parts, repeats, job) for name in rivals}
    try:
        return job.run(case, rivals, parts, repeats)
    except ProcessException:
        # One took the others down with it (out of memory, an illegal address): each for itself, to know which.
        return {name: {**_alone(case, name, parts, repeats, job), "timed_alone": True} for name in rivals}


def _alone(case: Case, name: str, parts: tuple[str, ...], repeats: int, job: Job) -> dict:
    try:
        return job.run(case, [name], parts, repeats)[name]
    except ProcessException as error:
        text = str(error).strip()
        exception = re.search(r"^[\w.]+: .*", text, re.MULTILINE)  # under its traceback
        return {"error": exception[0] if exception else text.splitlines()[-1]}


def _row(case: Case, name: str, found: dict, repeats: int) -> dict:
    described = asdict(case)
    described["device_type"] = described.pop("device")  # append() writes the device's name as `device`
    row = {
        "what": "contrastive loss, forward and backward",
        "rival": name,
        "rival_version": package_version(name) if "error" not in found else None,
        **described,
        "repeats": repeats,
    }
    if "error" in found:
        return {**row, "error": found["error"]}
    median = statistics.median(found["seconds"])
    peaks = found["peak_bytes_per_rank"]
    return {
        **row,
        "ms_median": _four_digits(median * 1e3),
        "ms_min": _four_digits(min(found["seconds"]) * 1e3),
        "share_of_matmul": _four_digits(case.floor_flops / found["matmul_flops"] / median),
        "tflops": _four_digits(case.floor_flops / median / 1e12),
        "matmul_tflops": _four_digits(found["matmul_flops"] / 1e12),
        "peak_bytes": None if None in peaks else max(peaks),
        "peak_bytes_per_rank": peaks,
        "errors": found["errors"],
        "max_error": max(found["errors"].values()) if found["errors"] else None,
        **{key: found[key] for key in ("ranks_error", "timed_alone") if key in found},
    }


def _four_digits(value: float) -> float:
    return float(f"{value:.4g}")


def _line(case: Case, row: dict) -> str:
    found = row.get("error") or f"{row['ms_median']:.2f} ms, peak {_size(row['peak_bytes'])}"
    return f"{case} {row['rival']}: {found}"


def _table(ranks: int) -> Table:
    table = Table(title="Forward and backward; × beside ours; share of the bare matrix products' rate", box=SIMPLE_HEAD)
    headings = ("loss", "B", "D", "rival", "ms", "min", "×", "TFLOP/s", "share", "peak", "×", "max error")
    for heading in headings + ("ranks error",) * (ranks > 1):
        table.add_column(heading, justify="left" if heading in ("loss", "rival") else "right")
    return table


def _add(table: Table, rows: list[dict]) -> None:
    ours = next((row for row in rows if row["rival"] == "ours" and "error" not in row), {})
    for row in rows:
        name = [row["loss"], str(row["batch"]), str(row["dim"]), row["rival"]]
        if "error" in row:
            table.add_row(*name, "failed")
            continue
        table.add_row(
            *name,
            f"{row['ms_median']:.2f}",
            f"{row['ms_min']:.2f}",
            _ratio(row["ms_median"], ours.get("ms_median")),
            f"{row['tflops']:.3g}",
            f"{row['share_of_matmul']:.0%}",
            _size(row["peak_bytes"]),
            _ratio(row["peak_bytes"], ours.get("peak_bytes")),
            "" if row["max_error"] is None else f"{row['max_error']:.1e}",
            *([f"{row['ranks_error']:.1e}"] if "ranks_error" in row else []),
        )
    table.add_section()


def _ratio(value: float | None, ours: float | None) -> str:
    return f"{value / ours:.2f}" if value is not None and ours else ""


def _size(size: int | None) -> str:
    return "?" if size is None else f"{size / 2**20:.1f} MiB"


if __name__ == "__main__":
    run_benchmark("loss.py", Options, __doc__, main)
