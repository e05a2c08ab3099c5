"""Where the death of a loader worker becomes an error: where a batch is waited for.

torch raises it from a signal handler, wherever the program happens to be: most often in the middle of a step, out of
reach of whoever could say what happened.
"""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

_torchs_handler: Callable[[int, FrameType | None], None] | None = None
_waiting = False


@contextlib.contextmanager
def waiting_for_batch() -> Iterator[None]:
    """Let torch raise for a worker that dies now, or has died since the last time, and at no other time.

    Use it around each `next` of a DataLoader's iterator. Outside the main thread it changes nothing.
    """
    global _waiting
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _hold_back()
    _waiting = True
    try:
        if _torchs_handler is not None:
            _torchs_handler(signal.SIGCHLD, None)
        yield
    finally:
        _waiting = False


def _hold_back() -> None:
    """Put our handler before torch's, which torch sets once in a process, with its first workers."""
    global _torchs_handler
    theirs = signal.getsignal(signal.SIGCHLD)
    if _torchs_handler is None and getattr(theirs, "__module__", "").startswith("torch.utils.data"):
        _torchs_handler = theirs
        signal.signal(signal.SIGCHLD, _on_child)


def _on_child(number: int, frame: FrameType | None) -> None:
    if _waiting:
        _torchs_handler(number, frame)
