"""What a run's loaders passed over and replaced, counted over the ranks, and when it is too much."""

import math
from collections import deque
from collections.abc import Iterable

from contrastive.data.record import FaultCounts
from contrastive.distributed.collectives import gather_objects
from contrastive.errors import UserError


class BadSamples:
    """What a run's loaders passed over and replaced.

    Args:
        max_share: how many of the last `window` samples of all ranks may be bad, as a share.
        batch_size: samples of all ranks in a step.
    """

    def __init__(self, max_share: float, window: int, batch_size: int):
        self.max_share, self.window, self.batch_size = max_share, window, batch_size
        self._faults = FaultCounts()  # of this rank, since they were last taken
        # How many of all ranks were bad, in each of the last steps that make up a window.
        self._bad: deque[int] = deque(maxlen=math.ceil(window / batch_size))

    def note(self, faults: Iterable[tuple[str, str]]) -> None:
        """Count (reason, key) of this rank's batch."""
        for reason, key in faults:
            self._faults.add(reason, key)

    def too_many(self, bad: int) -> bool:
        """Add a step's bad samples, of all ranks; return whether more than the allowed share is bad.

        At the start, when fewer than `window` have been seen, the number allowed is that of a whole window, so
        that one bad sample among the first hundred stops nothing.
        """
        self._bad.append(bad)
        return sum(self._bad) > self.max_share * max(self.window, self._samples)

    def window_seen(self) -> str:
        """What a checkpoint keeps of the window: how many were bad in each of its steps, '0 0 3'."""
        return " ".join(map(str, self._bad))

    def go_on_from(self, seen: str) -> None:
        """Count on from what `window_seen` was; '' of a checkpoint that older versions wrote without it."""
        self._faults = FaultCounts()
        self._bad.clear()
        self._bad.extend(map(int, seen.split()))

    @property
    def _samples(self) -> int:
        return len(self._bad) * self.batch_size

    def take(self) -> dict:
        """Return {'counts': by reason, 'keys': the first of each} of all ranks since the last call; all must call.

        Counted from there anew, so that a resumed run counts nothing twice.
        """
        total = FaultCounts()
        for faults in gather_objects(self._faults):
            total.include(faults)
        self._faults = FaultCounts()
        return _as_row(total)

    def error(self, step: int, taken: dict) -> UserError:
        """Return what to stop with."""
        reasons = sorted(taken["counts"].items(), key=lambda item: -item[1])
        listed = "; ".join(
            f"{count} {reason} ({', '.join(taken['keys'][reason][:3])}, ...)" for reason, count in reasons
        )
        return UserError(
            f"stopped at step {step}: {sum(self._bad)} of the last {self._samples} samples could not be used, "
            f"more than {self.max_share:.2%} of {max(self.window, self._samples)}: {listed}. Repair the data "
            "(metrics.jsonl names more of them), or allow more with --data.max_bad_share"
        )


def merged(rows: Iterable[dict]) -> dict:
    """Return counts and keys of all 'bad_samples' rows of metrics.jsonl together, as `BadSamples.take` has them."""
    total = FaultCounts()
    for row in rows:
        # Rows of runs begun before keys were kept hold the counts by themselves.
        counts = row.get("counts") or {name: n for name, n in row.items() if name not in ("kind", "step")}
        for reason, count in counts.items():
            total.add(reason, *row.get("keys", {}).get(reason, ()), count=count)
    return _as_row(total)


def _as_row(faults: FaultCounts) -> dict:
    return {
        "counts": {reason: found["count"] for reason, found in faults.items()},
        "keys": {reason: found["keys"] for reason, found in faults.items()},
    }
