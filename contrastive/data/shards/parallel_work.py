"""The same work on many files: in processes, with a progress bar where it takes long."""

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from contrastive.errors import UserError
from contrastive.log import console, is_main_process

_PATIENCE = 2.0  # seconds before the bar shows
_MAX_WORKERS = 16
_QUEUED = 4  # jobs at hand a worker

Job = TypeVar("Job")
Result = TypeVar("Result")


class WorkProgress:
    """Counts pieces of work; shown on the main process, where it takes longer than two seconds.

    Args:
        what: is done, for the line. total: pieces. done: how many were there before.
    """

    def __init__(self, what: str, total: int, done: int = 0):
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self._task = self._progress.add_task(what, total=total, completed=done)
        self._shown_from = time.monotonic() + _PATIENCE
        self._started = False

    def __enter__(self) -> "WorkProgress":
        return self

    def advance(self) -> None:
        self._progress.advance(self._task)
        if not self._started and time.monotonic() > self._shown_from and is_main_process():
            self._started = True
            self._progress.start()

    def __exit__(self, *error: object) -> None:
        if self._started:
            self._progress.stop()


def in_parallel(
    function: Callable[[Job], Result], jobs: Sequence[Job], workers: int | None
) -> Iterator[tuple[Job, Result]]:
    """Yield each job with its result, in the order they are done.

    Args:
        workers: processes; None: one a core, 16 at most. With one, this process does it.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = min(workers or min(cores, _MAX_WORKERS), len(jobs))
    if count <= 1:
        yield from ((job, function(job)) for job in jobs)
        return
    # A fork costs milliseconds, a fresh interpreter seconds. All are started by the first job handed in.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    with ProcessPoolExecutor(count, mp_context=context) as pool:
        remaining, running = iter(jobs), {}
        try:
            while True:
                while len(running) < count * _QUEUED and (job := next(remaining, None)) is not None:
                    running[pool.submit(function, job)] = job
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    yield running.pop(future), _outcome(future)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _outcome(future: Future) -> object:
    try:
        return future.result()
    except BrokenProcessPool:
        raise UserError("a working process was killed (out of memory?); run it again, what is done is kept") from None
