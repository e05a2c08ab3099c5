"""Write any source as WebDataset shards."""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import torch

from contrastive.data.record import BadSample, Source
from contrastive.data.shards.shard_folder import REPORT, ShardFolder, Tally, describe, write_json
from contrastive.data.shards.shard_sample import PackOptions, class_labels, pack
from contrastive.data.sources import open_source
from contrastive.distributed import end_with_parent
from contrastive.errors import UserError
from contrastive.log import console, say

SAMPLES_PER_SHARD = 10_000
_POLL_SECONDS = 0.2
_COUNTED_AT_ONCE = 32


@dataclass(frozen=True)
class _Job:
    """What every worker process knows."""

    source: Source
    folder: ShardFolder
    options: PackOptions
    samples_per_shard: int
    done: Any  # shared counter of samples, for the progress bar
    stop: Any  # shared event: leave the shard as it is


_job: _Job | None = None


def write_shards(
    source: Source,
    folder: Path,
    options: PackOptions | None = None,
    *,
    samples_per_shard: int = SAMPLES_PER_SHARD,
    workers: int | None = None,
    asked: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Write the samples of `source` to folder/00000.tar, ... and return the report, also in folder/report.json.

    Shard n holds those of the samples n * samples_per_shard onward that can be used, so its bytes do not depend
    on the number of workers. The key of a sample is its number in the source. Class names go to classes.json. A
    labelled source whose captions are only its class names in templates is stored by label alone.

    Finished shards of an earlier call with the same arguments are kept. The others are written to a temporary
    name, and renamed when whole.

    Args:
        folder: new, empty, or begun by an earlier call.
        workers: processes; None: one a core.
        asked: further options that shaped `source`, which a later call has to repeat.

    Raises:
        UserError: the folder is not ours or was begun otherwise, no sample can be used, or a worker died.
    """
    options = options or PackOptions()
    if len(source.parts) > 1:
        raise UserError(f"{source.name}: write shards of each part by itself; the weights are for training")
    if samples_per_shard < 1 or (workers is not None and workers < 1):
        raise UserError("samples_per_shard and workers have to be 1 or more")
    source = source.stored
    num_shards = -(-len(source) // samples_per_shard)
    output = ShardFolder(folder, num_shards)
    plan = {
        "samples_of_the_source": len(source),
        "fingerprint_of_the_source": source.fingerprint,
        "samples_per_shard": samples_per_shard,
        **asdict(options),
        **(asked or {}),
    }
    with output.claim(plan):
        if source.class_names:
            write_json(folder / "classes.json", list(source.class_names))
        missing = [number for number in range(num_shards) if output.finished(number) is None]
        if missing:
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            workers = min(workers or cores, len(missing))
            _write_missing(source, output, options, samples_per_shard, missing, workers)
        return _report(source, output, plan, kept=num_shards - len(missing))


def _write_missing(
    source: Source, output: ShardFolder, options: PackOptions, samples_per_shard: int, missing: list[int], workers: int
) -> None:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    job = _Job(source, output, options, samples_per_shard, context.Value("q", 0), context.Event())
    kept = len(source) - sum(len(_indices(job, number)) for number in missing)
    columns = (TextColumn("writing shards"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=len(source), completed=kept)
        _run(job, missing, workers, context, lambda: bar.update(task, completed=kept + job.done.value))


def _run(job: _Job, missing: list[int], workers: int, context: BaseContext, show: Callable[[], None]) -> None:
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(job,))
    try:
        # The pool is told of a few shards only: whatever it has been told of it starts, even when all should end.
        waiting, running = iter(missing), set()
        while True:
            while len(running) < workers and (number := next(waiting, None)) is not None:
                running.add(pool.submit(_write_shard, number))
            if not running:
                return
            finished, running = wait(running, _POLL_SECONDS, FIRST_COMPLETED)
            _raise_failure(finished)
            show()
    except BrokenProcessPool:
        raise UserError(
            f"a process that wrote to {job.folder.path} was killed, perhaps for its memory; the same command goes on "
            "from the shards that are finished, with fewer workers if need be"
        ) from None
    finally:
        job.stop.set()
        pool.shutdown(cancel_futures=True)


def _raise_failure(finished: set[Future]) -> None:
    for future in finished:
        future.result()


def _start_worker(job: _Job) -> None:
    global _job
    _job = job
    torch.set_num_threads(1)
    # Ctrl-C is for the parent: it sets `stop`, and each worker leaves its shard.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent(signal.SIGKILL)


def _indices(job: _Job, number: int) -> range:
    first = number * job.samples_per_shard
    return range(first, min(first + job.samples_per_shard, len(job.source)))


def _write_shard(number: int) -> None:
    from webdataset import TarWriter

    job, tally = _job, Tally()
    labels = class_labels(job.source)
    with job.folder.temporary(number).open("wb") as file:
        # No time, no user: the same samples are the same bytes.
        with TarWriter(file, user="", group="", mode=0o644, mtime=0, encoder=False) as tar:
            for index in _indices(job, number):
                if job.stop.is_set():
                    return
                members = _members(job, index, tally, labels)
                if members:
                    tar.write({"__key__": f"{index:09d}", **members})
                if index % _COUNTED_AT_ONCE == 0:
                    with job.done.get_lock():
                        job.done.value += _COUNTED_AT_ONCE
        file.flush()
        os.fsync(file.fileno())
    job.folder.finish(number, tally)


def _members(job: _Job, index: int, tally: Tally, labels: tuple[str, ...] | None) -> dict[str, bytes] | None:
    """Return the members of a sample, or None for one that cannot be used."""
    try:
        record = job.source[index]
        packed = pack(record, job.options, labels)
    except BadSample as fault:
        tally.reject(fault.reason, fault.key)
        return None
    for reason in packed.bad_captions:
        tally.reject_caption(reason, record.key)
    tally.samples += 1
    tally.resized += packed.resized
    return packed.members


def _report(source: Source, output: ShardFolder, plan: dict[str, Any], kept: int) -> dict[str, Any]:
    """Write and show what was done, after our own reader has opened it, which also makes its index."""
    total, shards = Tally(), {}
    for number in range(output.num_shards):
        tally = output.finished(number)
        total.add(tally)
        if tally.samples:
            shards[output.name(number)] = {"samples": tally.samples, "bytes": tally.bytes}
    report = {"made_from": {"source": source.name, **plan}, **vars(total), "shards": shards}
    write_json(output.path / REPORT, report)
    seen = len(source)
    if total.rejected:
        say(f"rejected {total.num_rejected():,} of {seen:,} samples; more keys in {output.path / REPORT}:")
    for line in describe(total.rejected):
        say(f"  {line}")
    if total.rejected_captions:
        say("captions left out of samples that are kept:")
    for line in describe(total.rejected_captions):
        say(f"  {line}")
    if not total.samples:
        raise UserError(f"{source.name}: none of its {seen:,} samples can be used; see {output.path / REPORT}")
    reread = len(open_source(output.pattern()))
    if reread != total.samples:
        raise UserError(f"{output.path} holds {reread:,} samples where {total.samples:,} were written; delete it")
    again = f" ({kept} of them were there)" if kept else ""
    resized = f", {total.resized:,} resized" if total.resized else ""
    say(
        f"{total.samples:,} samples{resized}, {total.bytes / 2**20:,.1f} MiB, "
        f"in {len(shards)} shards{again}: '{output.pattern()}'"
    )
    return report
