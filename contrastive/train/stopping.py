"""Requests to stop: how a run notes them, what it leaves behind, and with which status it ends.

A run that a signal stopped has saved, left stopped.json in its folder, and ends with 128 + the signal's number: 130
after Ctrl-C, 143 after SIGTERM, 138 after SIGUSR1.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from contrastive.distributed.collectives import gather_objects
from contrastive.distributed.launching import launched
from contrastive.files import write_json
from contrastive.log import is_main_process, say

STOPPED = "stopped.json"
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
AGAIN = 1.0  # seconds: a launcher passes on the Ctrl-C that its ranks have had from the terminal too


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """Collect SIGTERM, SIGUSR1 and Ctrl-C in a list, so that the run can save first; a second Ctrl-C ends it at once.

    Any one rank's request stops all of them at the same step: the loop sums how many there are over the ranks. Those
    that come again change nothing, whatever the run is doing. What Ctrl-C cuts short is whole or absent.
    """
    received: list[int] = []
    since = 0.0

    def note(number, frame) -> None:
        nonlocal since
        if number == signal.SIGINT:
            if signal.SIGINT in received and time.monotonic() > since + AGAIN:
                raise KeyboardInterrupt
            if signal.SIGINT not in received:
                since = time.monotonic()
                if is_main_process():  # by itself: the signal may have come in the middle of printing
                    os.write(2, b"\nto be saved and stopped after this step; Ctrl-C again ends it at once\n")
        received.append(number)

    previous = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def record_stop(folder: Path, step: int, requests: list[int]) -> None:
    """Say, and leave in the run folder, at which step which signal has stopped the run; all ranks call."""
    number = next(number for of_rank in gather_objects(requests) for number in of_rank)
    if is_main_process():
        now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        write_json(folder / STOPPED, {"step": step, "signal": signal.Signals(number).name, "time": now})
    say(f"stopped at step {step} and saved; continue with --resume")


def stopped_status(folder: Path) -> int:
    """Return the exit status of a run that a signal has stopped."""
    try:
        name = json.loads((folder / STOPPED).read_text())["signal"]
    except (OSError, ValueError, KeyError):  # it goes on elsewhere already
        name = "SIGINT"
    return 128 + signal.Signals[name]


@contextmanager
def ending_at_once() -> Iterator[None]:
    """Let a signal end this process as an exception does, from within what it is doing, where nobody notes it.

    Not one of several: until the others have come it waits where no handler runs, and has to end with its launcher.
    """

    def end(number, frame) -> None:
        sys.exit(128 + number)

    # One that the caller ignores stays ignored: scripts/slurm.sh does so until a run can save.
    numbers = [] if launched() else [signal.SIGTERM, signal.SIGUSR1]
    numbers = [number for number in numbers if signal.getsignal(number) == signal.SIG_DFL]
    for number in numbers:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)
