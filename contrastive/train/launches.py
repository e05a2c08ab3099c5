"""A launch of a run: what it finds in the run folder, its claim on it, requests to stop, and how it ends.

.lock         which process trains here; it is gone when none does
starts.json   how often a launch has started here, from which step the last one did, how often in a row
stopped.json  at which step which signal has stopped the last one

A run that a signal stopped has saved, and ends with 128 + the signal's number: 130 after Ctrl-C, 143 after SIGTERM, 138
after SIGUSR1.
"""

import json
import os
import secrets
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import SoftFileLease, Timeout

from contrastive.distributed.collectives import gather_objects
from contrastive.distributed.launching import launched
from contrastive.errors import UserError
from contrastive.files import check_writable, locked, write_json
from contrastive.log import is_main_process, say, warn

LOCK, STARTS, STOPPED = ".lock", "starts.json", "stopped.json"
BEAT = 2.0  # seconds between the signs of life of a process that holds the lock
SILENT = 60.0  # without any, after which it is given up; all versions have to agree on it
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
AGAIN = 1.0  # seconds: a launcher passes on the Ctrl-C that its ranks have had from the terminal too


def check_folder(folder: Path, resume: bool) -> None:
    """Raise UserError if the folder is read-only, or holds a run and should not, or the other way round to `resume`."""
    if resume and not (folder / "config.yaml").exists():
        raise UserError(f"nothing to resume in {folder}: it has no config.yaml; drop --resume to start a run")
    is_free = not folder.exists() or (folder.is_dir() and all(map(_is_left_over, folder.iterdir())))
    if not (resume or is_free):
        raise UserError(f"{folder} exists; continue it with --resume, or name another folder with --out")
    check_writable(folder, "name another folder with --out")


def goes_on(folder: Path) -> bool:
    """Whether `--resume auto` goes on with a run; else there is nothing yet, and it starts one.

    A run writes its first checkpoint before its first step. One that a kill kept from that has nothing to lose.
    """
    metrics = folder / "metrics.jsonl"
    has_trained = any((folder / "checkpoints").glob("step-*")) or (metrics.exists() and metrics.stat().st_size > 0)
    return has_trained or (folder / "final").exists()


def check_start(folder: Path, resume: bool, automatic: bool) -> None:
    """As `check_folder`; with `automatic` also that what was there is still the same, and a start may have failed."""
    if automatic and goes_on(folder) != resume:
        raise UserError(f"another process has begun a run in {folder} meanwhile; start again")
    if not automatic or resume or not (folder / "config.yaml").exists():
        check_folder(folder, resume)


class RunLock:
    """The claim of one launch on a run folder, as a context: one process at a time, also on a network file system.

    number: how many launches there have been with this one. It only grows: it is how a process finds out that another
        has taken the folder over while it stood still. identity: of the run, by which trackers know it.

    The lock is a file that its holder touches every few seconds. Whoever waits for it counts on his own clock, which
    does not jump, how long it has not been touched. That of a process known to be gone is taken at once.
    """

    def __init__(self, folder: Path):
        self.folder, self.number, self.identity = folder, 0, ""
        self._lease = SoftFileLease(folder / LOCK, lease_duration=SILENT, heartbeat_interval=BEAT)

    def __enter__(self) -> "RunLock":
        self.folder.mkdir(parents=True, exist_ok=True)
        owner = self._lease.owner
        self._acquire()
        last = self._starts()
        self.number, self.identity = last.get("start", 0) + 1, last.get("id") or secrets.token_hex(4)
        if owner is not None:
            of = f"process {owner.pid} on {owner.hostname}"
            warn(f"taking {self.folder} over from {of}, which is gone without a word; this is launch {self.number}")
        return self

    def __exit__(self, *exception) -> None:
        self._lease.release()

    def _acquire(self) -> None:
        busy = f"another process is training in {self.folder}; wait for it or use another --out"
        before, looks = None, 0
        while True:
            try:
                self._lease.acquire(timeout=0)
                return
            except Timeout:
                sign = self._sign_of_life()
            if sign and before and sign != before:
                raise UserError(busy)
            if sign and sign[1] == 0 and looks * 0.1 > BEAT:  # of an older version, which held a lock on an empty file
                with locked(self.folder / LOCK, busy):
                    (self.folder / LOCK).unlink()
            before, looks = sign, looks + 1
            if looks * 0.1 == 2 * BEAT:
                say(f"{self.folder} is locked; up to {SILENT:g} seconds for a sign of life of who did that")
            time.sleep(0.1)

    def _sign_of_life(self) -> tuple[int, int, int] | None:
        """What changes whenever the holder of the lock touches it, and its size; None where nobody holds it."""
        try:
            with (self.folder / LOCK).open("rb") as file:  # a network file system asks for the newest on opening
                size = len(file.read())
            found = (self.folder / LOCK).stat()
        except FileNotFoundError:
            return None
        return found.st_mtime_ns, size, found.st_ino

    def begin(self, step: int, most: int | None) -> None:
        """Record that this launch starts from `step`.

        Args:
            most: launches in a row that may start from one step, of those that a launcher restarts; None: any.

        Raises:
            UserError: there were as many already, so that another would not get further either.
        """
        last = self._starts()
        times = last.get("times", 0) + 1 if last.get("step") == step and most is not None else 1
        if most is not None and times > most:
            raise UserError(
                f"{most} starts in a row from step {step} of {self.folder} got no further: see what they said last "
                "and mend it; then go on with --resume, or allow more with --max_restarts"
            )
        record = {"start": self.number, "step": step, "times": times, "id": self.identity}
        write_json(self.folder / STARTS, record)

    def check(self) -> None:
        """Raise UserError where another launch has taken the folder over: nothing may be written any more."""
        now = self._starts().get("start", self.number)
        if now != self.number:
            raise UserError(
                f"launch {now} has taken {self.folder} over from this one, launch {self.number}, which stood still for "
                f"{SILENT:g} seconds or more; nothing more is written here, that one goes on"
            )

    def _starts(self) -> dict[str, Any]:
        try:
            return json.loads((self.folder / STARTS).read_text())
        except (OSError, ValueError):  # none yet, or an older version's folder
            return {}


def _is_left_over(path: Path) -> bool:
    """Whether a start that failed leaves it, and nothing else."""
    return path.name in (LOCK, STARTS) or path.name.endswith(".partial")


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
