"""Where a run hangs: the stacks of all threads of a rank, written when no step has ended for long."""

import faulthandler
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from contrastive.log import warn

STACKS = "stacks"  # in the run folder


class HangWatch:
    """Writes FOLDER/stacks/rank-N.txt when nothing has ended for too long, and goes on waiting; a context manager.

    The stacks are written by a thread of C that needs nothing of Python, whatever holds it up; a thread of Python says
    so, on the first rank, if it can. The file is gone at the end where nothing was written.

    Args:
        seconds: without the end of a step. patience: without the end of a start, an evaluation or a save.
    """

    def __init__(self, folder: Path, rank: int, seconds: float, patience: float):
        self.path = folder / STACKS / f"rank-{rank}.txt"
        self.seconds, self.patience = seconds, max(seconds, patience)
        self._limit = self._armed = 0.0
        self._ended = threading.Event()

    def __enter__(self) -> "HangWatch":
        self.path.parent.mkdir(exist_ok=True)
        self._file = self.path.open("a")
        self._written = self._size()
        self._arm(self.patience)
        self._speaker = threading.Thread(target=self._speak, name="hang watch", daemon=True)
        self._speaker.start()
        return self

    def __exit__(self, *error) -> None:
        faulthandler.cancel_dump_traceback_later()
        self._ended.set()
        self._speaker.join()
        if not self._size():
            self.path.unlink(missing_ok=True)
        self._file.close()
        with suppress(OSError):  # stacks of another rank are in it, or that rank has removed it
            self.path.parent.rmdir()

    def step_done(self) -> None:
        # Armed anew a tenth of a millisecond costs: not at every step of a small model.
        if self._limit != self.seconds or time.monotonic() - self._armed > min(1.0, self.seconds / 10):
            self._arm(self.seconds)

    @contextmanager
    def patient(self) -> Iterator[None]:
        """Meanwhile something goes on that may take longer than a step."""
        before = self._limit
        self._arm(self.patience)
        yield
        self._arm(before)

    def _arm(self, seconds: float) -> None:
        self._limit, self._armed = seconds, time.monotonic()
        faulthandler.dump_traceback_later(seconds, file=self._file)

    def _size(self) -> int:
        return os.fstat(self._file.fileno()).st_size

    def _speak(self) -> None:
        before = self._written
        while not self._ended.wait(min(5.0, self.seconds / 4)):
            size = self._size()
            if before == size != self._written:  # nothing is being written any more
                self._written = size
                warn(
                    f"no step, evaluation or save has ended for {self._limit:g} seconds: see where each rank stands in "
                    f"{self.path.parent}; still waiting"
                )
            before = size
