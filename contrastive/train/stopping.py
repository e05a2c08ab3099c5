"""Requests to stop, and how a run notes them."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """Collect SIGTERM, SIGUSR1 and Ctrl-C in a list, so that the run can save first; a second Ctrl-C ends it at once.

    Any one rank's request stops all of them at the same step: the loop sums how many there are over the ranks.
    """
    received: list[int] = []

    def note(number, frame) -> None:
        if number == signal.SIGINT in received:
            raise KeyboardInterrupt
        received.append(number)

    previous = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
