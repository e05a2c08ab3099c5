"""The same work on many files: in processes, with a progress bar."""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

import torch

from contrastive.distributed import end_with_parent
from contrastive.errors import UserError
from contrastive.log import bar

Job = TypeVar("Job")
Done = TypeVar("Done")


def in_parallel(
    what: str,
    function: Callable[[Job], Done],
    jobs: Sequence[Job],
    workers: int | None = None,
    *,
    most: int | None = None,
    done: int = 0,
) -> Iterable[tuple[Job, Done]]:
    """Return each job with what `function` returns for it, in the order they are done.

    Args:
        what: is done, for the progress bar.
        function: handed to each process once, however large what it holds.
        workers: processes; None: one a core, and no more than `most`. With one, this process does the work.
        done: jobs that were done before, for the bar.

    Raises:
        UserError: a process was killed. What `function` raises comes out here too, and ends the others at once.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = min(workers or min(cores, most or cores), len(jobs))
    finished = _in_processes(function, jobs, count) if count > 1 else ((job, function(job)) for job in jobs)
    return bar(finished, what, done + len(jobs), done=done, forks=True)


def _in_processes(function: Callable[[Job], Done], jobs: Sequence[Job], count: int) -> Iterator[tuple[Job, Done]]:
    # A fork costs milliseconds, a fresh interpreter seconds.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(count, mp_context=context, initializer=_start_worker, initargs=(function,))
    try:
        running = {pool.submit(_do, job): job for job in jobs}
        for future in as_completed(running):
            yield running[future], future.result()
    except BaseException as error:
        # After a fault or Ctrl-C nobody waits for work half done.
        for process in set(multiprocessing.active_children()) - others:
            process.kill()
        if isinstance(error, BrokenProcessPool):
            raise UserError(
                "a working process was killed, perhaps for its memory; the same command goes on from what is "
                "finished, with fewer workers if need be"
            ) from None
        raise
    finally:
        pool.shutdown(cancel_futures=True)


_function: Callable | None = None  # of a worker


def _start_worker(function: Callable) -> None:
    global _function
    _function = function
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then ends its workers
    end_with_parent(signal.SIGKILL)


def _do(job: object) -> object:
    return _function(job)
