"""Signals that ask a run to stop: noticed between steps, so that the run can save first."""

import signal


class StopRequest:
    """Set by SIGTERM, SIGUSR1 or Ctrl-C; a second Ctrl-C interrupts at once.

    Any one rank's request stops all of them at the same step: the loop sums `as_number` over ranks.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    def __init__(self):
        self.received: signal.Signals | None = None

    def __enter__(self) -> "StopRequest":
        self._previous = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def as_number(self) -> float:
        return float(self.received is not None)

    def _note(self, number, frame) -> None:
        if self.received == signal.SIGINT and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
